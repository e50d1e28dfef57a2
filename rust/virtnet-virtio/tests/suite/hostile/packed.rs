//! A driver that lies in a packed ring: laps, lists, ids, event areas.

use virtnet_mem::MemoryError;
use virtnet_virtio::{Access, ChainError, Chains, DeviceQueue, QueueConfig, RingFormat};

use super::{Attack, DATA, THIRD, everywhere};
use crate::support::Setup;
use crate::support::driver::{Desc, INDIRECT, NEXT};

const SIZES: [u16; 7] = [1, 2, 3, 8, 255, 256, 32_768];

fn packed() -> impl Iterator<Item = Setup> {
    let setups = SIZES.into_iter().flat_map(everywhere);
    setups.filter(Setup::is_packed)
}

/// Nothing is there, whichever way one asks.
fn assert_idle(attack: &mut Attack) {
    assert!(attack.take().is_empty());
    assert!(!attack.device.has_work());
    assert!(!attack.device.arm());
    assert!(!attack.device.publish());
}

#[test]
fn ta50_ta61_flags_that_are_not_those_of_this_lap_are_nothing() {
    for setup in packed() {
        let mut attack = Attack::new(setup, Access::Read);
        let (slot, here) = (setup.start % attack.size(), attack.available(setup.start));
        for bits in [0, 1 << 7, 1 << 15, 0x8080] {
            if bits == here {
                continue;
            }
            for more in [0, NEXT, INDIRECT, 0x7f7f] {
                let desc = Desc {
                    flags: bits | more,
                    ..attack.good()
                };
                desc.write(&attack.ram, setup.desc(), slot, true);
                let before = attack.ram.read(setup.desc(), 16 * usize::from(setup.size));
                for _ in 0..3 {
                    assert_idle(&mut attack);
                }
                let after = attack.ram.read(setup.desc(), before.len());
                assert!(before == after, "a descriptor was touched");
            }
        }
        // And then it is there.
        attack.offer(&[attack.good()]);
        assert_eq!(attack.take().len(), 1);
    }
}

#[test]
fn ta51_ta55_a_list_is_followed_as_it_stands_to_the_end_that_it_has() {
    for setup in packed().filter(|setup| setup.size >= 3) {
        let right = Attack::new(setup, Access::Read).right();
        // The flags of further descriptors say another lap, or that they are used: their head was shown too early.
        for lap in [0, 1 << 7, 1 << 15, 0x8080] {
            let mut attack = Attack::new(setup, Access::Read);
            let at = attack.at;
            attack.offer(&[attack.good(), attack.good(), attack.good()]);
            let second = Desc::new(THIRD.start, 9, right | NEXT | lap, 0x77);
            second.write(&attack.ram, setup.desc(), (at + 1) % attack.size(), true);
            let chain = attack.take().remove(0).unwrap();
            assert_eq!((chain.len(), chain[1]), (3, (THIRD.start, 9)));
            assert_eq!(
                attack.give_back(),
                [(u32::from((at as u16).wrapping_add(0x100)), 0)]
            );
        }
        // What was left there by the last lap: a list that ends early.
        let mut attack = Attack::new(setup, Access::Read);
        let at = attack.at;
        let mut head = attack.good();
        head.flags |= NEXT;
        attack.write_packed(at, head);
        let stale = Desc::new(0, 0, attack.available(at + 1) ^ 0x8080, 0x66);
        stale.write(&attack.ram, setup.desc(), (at + 1) % attack.size(), true);
        assert_eq!(attack.take(), [Ok(vec![(head.addr, 64)])]);
        attack.slots.push(2);
        assert_eq!(attack.give_back(), [(0x66, 0)]);
    }
}

#[test]
fn ta52_descriptors_left_available_are_taken_once_a_lap() {
    for setup in packed().filter(|setup| setup.size <= 256) {
        let mut attack = Attack::new(setup, Access::Read);
        let size = attack.size();
        // All slots, for this lap and as it comes for the next: what is taken stays taken until it is given back.
        for at in 0..size {
            attack.write_packed(setup.start + at, attack.good());
        }
        let mut taken = 0;
        for _ in 0..10 {
            taken += attack.take().len() as u64;
            if attack.chains.room() == 0 {
                break;
            }
            // The driver turns everything round for the next lap, before it has anything back.
            for at in 0..size {
                attack.write_packed(setup.start + size + at, attack.good());
            }
        }
        assert_eq!(taken, size.min(64));
        for i in 0..attack.chains.len() {
            attack.device.give(&attack.chains, i, &[0]);
        }
        attack.chains.clear();
        attack.device.publish();
        assert!(attack.take().len() as u64 <= size);
    }
}

#[test]
fn ta53_a_list_without_an_end_is_a_chain_error() {
    for setup in packed() {
        for access in [Access::Read, Access::Write] {
            let mut attack = Attack::new(setup, access);
            let size = attack.size();
            for at in 0..size {
                let mut desc = attack.good();
                desc.flags |= NEXT;
                desc.fourth = at as u16;
                attack.write_packed(setup.start + at, desc);
            }
            assert_eq!(attack.take(), [Err(ChainError::TooLong)]);
            assert!(attack.take().is_empty(), "the whole ring is one chain");
            attack.slots.push(size);
            assert_eq!(attack.give_back(), [((size - 1) as u32, 0)]);
            attack.at += size;
            // As many as were skipped are skipped: the next one is a lap further.
            let id = attack.offer(&[attack.good()]);
            assert_eq!(attack.take().len(), 1);
            assert_eq!(attack.give_back(), [(u32::from(id), 0)]);
        }
    }
}

#[test]
fn ta53_a_list_that_runs_into_what_the_device_holds_is_a_chain_error() {
    for setup in packed().filter(|setup| setup.size >= 3) {
        let mut attack = Attack::new(setup, Access::Read);
        let size = attack.size();
        let id = attack.offer(&[attack.good()]);
        assert_eq!(attack.take().len(), 1);
        for at in 1..=size {
            let mut desc = attack.good();
            desc.flags |= NEXT;
            desc.fourth = 0x55;
            attack.write_packed(setup.start + at, desc);
        }
        assert_eq!(attack.take(), [Err(ChainError::TooLong)]);
        attack.slots.push(size - 1);
        assert_eq!(attack.give_back(), [(u32::from(id), 0), (0x55, 0)]);
        attack.at = setup.start + size;
        attack.offer(&[attack.good()]);
        assert_eq!(attack.take().len(), 1);
    }
}

#[test]
fn ta54_an_id_is_echoed_whatever_it_is() {
    for setup in packed().filter(|setup| setup.size >= 3) {
        let mut attack = Attack::new(setup, Access::Read);
        let ids = [setup.size, 0xffff, 0xffff];
        for id in ids {
            let mut desc = attack.good();
            desc.fourth = id;
            attack.write_packed(attack.at, desc);
            attack.at += 1;
            attack.slots.push(1);
        }
        assert_eq!(attack.take().len(), 3);
        assert_eq!(attack.give_back(), ids.map(|id| (u32::from(id), 0)));
    }
}

#[test]
fn ta56_an_event_area_of_nonsense_is_a_call_too_many_at_most() {
    for size in [1_u16, 2, 3, 8, 32_768] {
        for event_idx in [false, true] {
            let setup = Setup {
                event_idx,
                ..Setup::new(RingFormat::Packed, size)
            };
            let mut attack = Attack::new(setup, Access::Read);
            let mut publish = |off_wrap: u16, flags: u16| {
                attack.ram.set_u16(setup.driver_area(), off_wrap);
                attack.ram.set_u16(setup.driver_area() + 2, flags);
                attack.offer(&[attack.good()]);
                attack.take();
                attack.device.give(&attack.chains, 0, &[0]);
                attack.chains.clear();
                attack.device.publish()
            };
            publish(0, 0);
            for bits in (0..=u16::MAX).step_by(251) {
                for reserved in [0, 0xfffc] {
                    assert!(publish(bits, reserved), "always");
                    assert!(!publish(bits, reserved | 1), "never");
                    assert!(
                        publish(bits, reserved | 3),
                        "what nobody knows means always"
                    );
                    // Any place, even one that the ring does not have.
                    publish(bits, reserved | 2);
                }
            }
        }
    }
}

#[test]
fn ta57_ta58_any_size_up_to_the_largest_is_valid() {
    for size in 0..=70_000_u32 {
        let possible = (1..=32_768).contains(&size);
        let valid = |format| QueueConfig::size_is_valid(size, format);
        assert_eq!(valid(RingFormat::Packed), possible);
        assert_eq!(valid(RingFormat::Split), possible && size.is_power_of_two());
    }
}

#[test]
fn ta59_what_means_nothing_in_a_table_is_not_looked_at() {
    for setup in packed().filter(|setup| setup.size >= 3) {
        let mut attack = Attack::new(setup, Access::Write);
        let right = attack.right();
        let entries = [0, NEXT, INDIRECT | NEXT, 0xfffd]
            .map(|flags| Desc::new(THIRD.start, 5, right | flags, 0xbeef));
        let table = attack.table(setup.data() + DATA / 2, &entries[1..]);
        attack.offer(&[table]);
        assert_eq!(attack.take(), [Ok(vec![(THIRD.start, 5); 3])]);
        attack.give_back();
        // A table is never part of a list, wherever it stands.
        attack.offer(&[attack.good(), table]);
        assert_eq!(attack.take(), [Err(ChainError::Indirect)]);
        attack.give_back();
        attack.offer(&[table, attack.good()]);
        assert_eq!(attack.take(), [Err(ChainError::Indirect)]);
        assert_eq!(attack.give_back().len(), 1);
    }
}

#[test]
fn ta62_areas_that_are_not_memory_or_not_aligned_are_refused() {
    for setup in packed() {
        let attack = Attack::new(setup, Access::Read);
        let end = setup.data() + DATA;
        let config = setup.config();
        let (desc, driver, device) = (config.desc_area, config.driver_area, config.device_area);
        let at = crate::support::user;
        let rows = [
            (at(end - 16 * attack.size() + 16), driver, device, false),
            (desc, at(end), device, false),
            (desc, driver, at(setup.desc() - 4), false),
            (at(setup.desc() + 8), driver, device, true),
            (desc, at(setup.driver_area() + 2), device, true),
            (desc, driver, at(setup.device_area() + 1), true),
        ];
        for (desc_area, driver_area, device_area, misaligned) in rows {
            let config = QueueConfig {
                desc_area,
                driver_area,
                device_area,
                ..config
            };
            let refused = DeviceQueue::new(&config, &attack.ram.0).unwrap_err();
            let told = matches!(refused, MemoryError::Misaligned { .. });
            assert_eq!(told, misaligned, "{config:?}: {refused}");
        }
    }
}

#[test]
fn a_base_from_anywhere_is_taken_as_it_can_be() {
    for size in [1_u16, 2, 3, 8, 255, 32_768] {
        let setup = Setup::new(RingFormat::Packed, size);
        for base in [
            0,
            0x8000,
            0x8000_8000,
            0x8000_0000,
            u32::MAX,
            0x7fff_7fff,
            0x1234_5678,
        ] {
            let attack = Attack::new(setup, Access::Read);
            let config = QueueConfig {
                base,
                ..setup.config()
            };
            let mut device = DeviceQueue::new(&config, &attack.ram.0).unwrap();
            let told = device.base();
            for half in [told & 0x7fff, told >> 16 & 0x7fff] {
                assert!(half < u32::from(size), "{base:#x} became {told:#x}");
            }
            let mut chains = Chains::new();
            device
                .take(&attack.ram.0, Access::Read, 64, &mut chains)
                .unwrap();
        }
        // A fresh ring as DPDK's virtio-user has it.
        let config = QueueConfig {
            base: 0x8000,
            ..setup.config()
        };
        let attack = Attack::new(setup, Access::Read);
        let device = DeviceQueue::new(&config, &attack.ram.0).unwrap();
        assert_eq!(device.base(), 0x8000_8000);
    }
}
