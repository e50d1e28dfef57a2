//! A driver that lies in a split ring: indexes, heads, links.

use virtnet_mem::MemoryError;
use virtnet_virtio::{Access, ChainError, Chains, DeviceQueue, RingError, RingFormat};

use super::{Attack, DATA, FIRST, THIRD, everywhere};
use crate::support::Setup;
use crate::support::driver::{Desc, INDIRECT, NEXT};

const SIZES: [u16; 5] = [1, 2, 8, 256, 32_768];

fn split() -> impl Iterator<Item = Setup> {
    let setups = SIZES.into_iter().flat_map(everywhere);
    setups.filter(|setup| !setup.is_packed())
}

/// Writes the available index.
fn set_index(attack: &Attack, index: u16) {
    attack.ram.set_u16(attack.setup.driver_area() + 2, index);
}

fn take(attack: &mut Attack) -> Result<usize, RingError> {
    attack
        .device
        .take(&attack.ram.0, attack.access, 64, &mut attack.chains)
}

#[test]
fn ta1_ta2_an_available_index_that_jumps_or_goes_back_breaks_the_ring() {
    for setup in split() {
        for ahead in [
            setup.size.wrapping_add(1),
            setup.size.wrapping_mul(2).wrapping_add(1),
            0xffff,
            0_u16.wrapping_sub(setup.size),
            0x8001,
        ] {
            let mut attack = Attack::new(setup, Access::Read);
            if ahead <= setup.size {
                continue;
            }
            let before = attack.snapshot();
            let found = (setup.start as u16).wrapping_add(ahead);
            set_index(&attack, found);
            let expected = RingError::AvailIndex {
                found,
                expected: setup.start as u16,
                size: setup.size,
            };
            for _ in 0..3 {
                assert_eq!(take(&mut attack), Err(expected));
            }
            assert!(attack.chains.is_empty());
            set_index(&attack, setup.start as u16);
            assert!(attack.snapshot() == before);
        }
    }
}

#[test]
fn ta2_an_index_that_goes_back_never_brings_a_chain_twice() {
    for setup in split().filter(|setup| setup.size >= 8) {
        let mut attack = Attack::new(setup, Access::Read);
        attack.offer_good(3);
        assert_eq!(take(&mut attack), Ok(3));
        attack.give_back();
        set_index(&attack, (setup.start as u16).wrapping_add(2));
        assert!(matches!(
            take(&mut attack),
            Err(RingError::AvailIndex { .. })
        ));
        assert!(attack.chains.is_empty());
    }
}

#[test]
fn ta3_an_index_that_goes_back_and_forth_brings_what_it_says_and_no_more() {
    for setup in split().filter(|setup| setup.size >= 8) {
        let mut attack = Attack::new(setup, Access::Read);
        attack.offer_good(4);
        let end = setup.start as u16;
        let mut brought = 0;
        for (ahead, expected) in [(1, 1), (4, 3), (4, 0), (4, 0)] {
            set_index(&attack, end.wrapping_add(ahead));
            assert_eq!(take(&mut attack), Ok(expected));
            brought += expected;
        }
        assert_eq!(brought, 4);
        // Seen before, taken later: the index that was seen counts.
        let mut attack = Attack::new(setup, Access::Read);
        attack.offer_good(4);
        let one = attack
            .device
            .take(&attack.ram.0, Access::Read, 1, &mut attack.chains);
        assert_eq!(one, Ok(1));
        set_index(&attack, end.wrapping_add(2));
        assert_eq!(
            attack.take().len(),
            1,
            "one more by the index that stands there now"
        );
        set_index(&attack, end.wrapping_add(4));
        assert_eq!(attack.take().len(), 2);
    }
}

#[test]
fn ta4_ta6_a_head_outside_the_table_breaks_the_ring() {
    for setup in split() {
        for head in [setup.size, setup.size.wrapping_add(7), 0x8000, 0xffff] {
            if head < setup.size {
                continue;
            }
            let mut attack = Attack::new(setup, Access::Read);
            let good = u64::from(setup.size - 1).min(3);
            attack.offer_good(good);
            attack.offer_head(head);
            let expected = Err(RingError::HeadRange {
                head,
                size: setup.size,
            });
            assert_eq!(take(&mut attack), expected);
            // What came before is good, and can be given back.
            assert_eq!(attack.chains.len(), good as usize);
            assert_eq!(take(&mut attack), expected, "it stays broken");
            assert_eq!(attack.chains.len(), good as usize);
            assert_eq!(attack.give_back().len(), good as usize);
            let base = setup.start + good;
            assert_eq!(attack.device.base(), u32::from(base as u16));
        }
    }
}

#[test]
fn ta5_a_head_that_is_offered_twice_is_two_chains() {
    for setup in split().filter(|setup| setup.size >= 2) {
        let mut attack = Attack::new(setup, Access::Write);
        let good = (attack.good().addr, 64);
        let head = attack.offer(&[attack.good()]);
        attack.offer_head(head);
        assert_eq!(attack.take(), [Ok(vec![good]), Ok(vec![good])]);
        let used = (u32::from(head), 0);
        assert_eq!(attack.give_back(), [used, used]);
    }
}

#[test]
fn ta7_an_index_that_wraps_in_a_burst_is_an_index() {
    for size in [8, 256, 32_768] {
        for setup in Setup::all(size).filter(|setup| !setup.is_packed()) {
            for start in 65_530..=65_536 {
                let mut attack = Attack::new(Setup { start, ..setup }, Access::Read);
                let ids: Vec<u16> = (0..8).map(|_| attack.offer(&[attack.good()])).collect();
                assert_eq!(attack.take().len(), 8);
                let used: Vec<u32> = attack.give_back().iter().map(|u| u.0).collect();
                assert_eq!(
                    used,
                    ids.iter().map(|&id| u32::from(id)).collect::<Vec<_>>()
                );
            }
        }
    }
}

#[test]
fn ta8_a_used_ring_that_the_driver_writes_is_written_over() {
    for setup in split().filter(|setup| setup.size >= 2) {
        let mut attack = Attack::new(setup, Access::Read);
        for nonsense in [0, 1, 0x7fff, 0xffff] {
            let head = attack.offer(&[attack.good()]);
            attack.take();
            let area = attack.setup.device_area();
            attack.ram.set_u16(area + 2, nonsense);
            attack.ram.fill(area + 4, 8, 0xff);
            assert_eq!(attack.give_back(), [(u32::from(head), 0)]);
            assert_eq!(attack.ram.u16(area + 2), attack.used_at as u16);
        }
    }
}

#[test]
fn ta14_flags_of_the_available_ring_that_mean_nothing_are_not_looked_at() {
    for setup in split().filter(|setup| !setup.event_idx) {
        for (flags, call) in [(0, true), (0xfffe, true), (1, false), (0xffff, false)] {
            let mut attack = Attack::new(setup, Access::Read);
            attack.ram.set_u16(setup.driver_area(), flags);
            attack.offer(&[attack.good()]);
            attack.take();
            attack.device.give(&attack.chains, 0, &[0]);
            assert_eq!(attack.device.publish(), call, "{flags:#x}");
        }
    }
}

/// Links descriptors `links[k].0` to `links[k].1` and offers the first of them.
fn offer_links(attack: &mut Attack, links: &[(u16, u16)]) {
    for &(index, next) in links {
        let mut desc = attack.good();
        desc.flags |= NEXT;
        desc.fourth = next;
        desc.write(&attack.ram, attack.setup.desc(), u64::from(index), false);
    }
    attack.offer_head(links[0].0);
}

/// The chain that `links` make costs itself.
fn links_are(error: ChainError, links: impl Fn(u16) -> Vec<(u16, u16)>) {
    for setup in split() {
        let links = links(setup.size);
        if links.iter().any(|&(index, _)| index >= setup.size) {
            continue;
        }
        for access in [Access::Read, Access::Write] {
            let mut attack = Attack::new(setup, access);
            offer_links(&mut attack, &links);
            let before = attack.snapshot();
            assert_eq!(attack.take(), [Err(error)], "{setup:?}");
            assert_eq!(attack.give_back(), [(u32::from(links[0].0), 0)]);
            assert!(attack.snapshot() == before);
            attack.next_desc = 0;
            let good = vec![(attack.good().addr, 64)];
            attack.offer(&[attack.good()]);
            assert_eq!(attack.take(), [Ok(good)]);
        }
    }
}

#[test]
fn ta20_a_loop_in_next_is_a_chain_error() {
    links_are(ChainError::TooLong, |_| vec![(0, 0)]);
    links_are(ChainError::TooLong, |_| vec![(0, 1), (1, 0)]);
    links_are(ChainError::TooLong, |_| vec![(0, 1), (1, 1)]);
    links_are(ChainError::TooLong, |size| {
        (0..size).map(|k| (k, (k + 1) % size)).collect()
    });
    links_are(ChainError::TooLong, |size| {
        (0..size).map(|k| (k, (k + 1).min(size - 1))).collect()
    });
}

#[test]
fn ta21_a_next_outside_the_table_is_a_chain_error() {
    for beyond in [0, 1, 1000] {
        links_are(ChainError::NextRange, |size| {
            vec![(0, size.saturating_add(beyond))]
        });
        links_are(ChainError::NextRange, |size| {
            vec![(0, 1), (1, size.saturating_add(beyond))]
        });
    }
    links_are(ChainError::NextRange, |_| vec![(0, 0xffff)]);
}

#[test]
fn ta34_a_table_in_a_table_is_a_chain_error() {
    for setup in split() {
        let mut attack = Attack::new(setup, Access::Read);
        let table = setup.data() + DATA / 2;
        let inner = attack.table(table + 4096, &[attack.good()]);
        let chain = attack.table(table, &[inner]);
        attack.offer(&[chain]);
        assert_eq!(attack.take(), [Err(ChainError::Indirect)]);
        // Even one that names itself.
        let itself = attack.table(table, &[Desc::new(table, 16, INDIRECT, 0)]);
        attack.offer(&[itself]);
        assert_eq!(attack.take(), [Err(ChainError::Indirect)]);
        assert_eq!(attack.give_back().len(), 2);
    }
}

#[test]
fn ta40_a_table_whose_links_lead_out_or_around_is_a_chain_error() {
    for setup in split().filter(|setup| setup.size >= 8) {
        let rows: [(&[u16], ChainError); 6] = [
            (&[3], ChainError::NextRange),
            (&[0xffff], ChainError::NextRange),
            (&[1, 3], ChainError::NextRange),
            (&[0], ChainError::TooLong),
            (&[1, 0], ChainError::TooLong),
            (&[2, 2, 1], ChainError::TooLong),
        ];
        for (nexts, expected) in rows {
            let mut attack = Attack::new(setup, Access::Read);
            let mut entries = vec![attack.good(); 3];
            for (entry, &next) in entries.iter_mut().zip(nexts) {
                entry.flags |= NEXT;
                entry.fourth = next;
            }
            let table = attack.table(setup.data() + DATA / 2, &entries);
            attack.offer(&[table]);
            let before = attack.snapshot();
            assert_eq!(attack.take(), [Err(expected)], "{nexts:?}");
            attack.give_back();
            assert!(attack.snapshot() == before);
        }
    }
}

#[test]
fn ta41_buffers_may_come_before_a_table() {
    for setup in split().filter(|setup| setup.size >= 8) {
        for direct in 0..5 {
            let mut attack = Attack::new(setup, Access::Write);
            let mut entries = [(THIRD.start, 5), (FIRST.start, 6)]
                .map(|(addr, len)| Desc::new(addr, len, attack.right(), 0));
            entries[0].flags |= NEXT;
            entries[0].fourth = 1;
            let mut descs = vec![Desc::new(FIRST.start + 100, 7, attack.right(), 0); direct];
            descs.push(attack.table(setup.data() + DATA / 2, &entries));
            attack.offer(&descs);
            let mut expected = vec![(FIRST.start + 100, 7); direct];
            expected.extend([(THIRD.start, 5), (FIRST.start, 6)]);
            assert_eq!(attack.take(), [Ok(expected)]);
        }
    }
}

#[test]
fn ta112_a_call_is_due_exactly_when_the_event_was_passed() {
    for start in [0, 5, 65_533, 65_535] {
        let setup = Setup {
            start,
            event_idx: true,
            ..Setup::new(RingFormat::Split, 8)
        };
        for event in (0..=u16::MAX)
            .step_by(97)
            .chain(0..40)
            .chain(65_500..=u16::MAX)
        {
            let mut attack = Attack::new(setup, Access::Read);
            let mut at = setup.start;
            // The first publish after a start may call in any case.
            for n in [1, 3, 2, 8, 1] {
                attack.offer_good(n);
                attack.take();
                (0..n as usize).for_each(|i| attack.device.give(&attack.chains, i, &[0]));
                attack.chains.clear();
                attack.ram.set_u16(setup.driver_area() + 4 + 16, event);
                let call = attack.device.publish();
                let due = (at..at + n).any(|k| k as u16 == event);
                assert!(
                    call == due || (call && at == setup.start),
                    "{event} at {at}"
                );
                at += n;
            }
        }
    }
}

#[test]
fn ta62_areas_that_are_not_memory_or_not_aligned_are_refused() {
    for setup in split() {
        let attack = Attack::new(setup, Access::Read);
        let end = setup.data() + DATA;
        let config = setup.config();
        let at = crate::support::user;
        let used_bytes = if setup.event_idx { 6 } else { 4 } + 8 * attack.size();
        let rows = [
            (
                at(end - 16 * attack.size() + 16),
                config.driver_area,
                config.device_area,
                false,
            ),
            (config.desc_area, at(end - 2), config.device_area, false),
            (
                config.desc_area,
                config.driver_area,
                at(end - used_bytes.next_multiple_of(4) + 4),
                false,
            ),
            (at(0), config.driver_area, config.device_area, false),
            (
                at(setup.desc() + 8),
                config.driver_area,
                config.device_area,
                true,
            ),
            (
                config.desc_area,
                at(setup.driver_area() + 1),
                config.device_area,
                true,
            ),
            (
                config.desc_area,
                config.driver_area,
                at(setup.device_area() + 2),
                true,
            ),
        ];
        for (desc_area, driver_area, device_area, misaligned) in rows {
            let config = virtnet_virtio::QueueConfig {
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

/// Rings that lie on top of each other: the driver harms itself.
#[test]
fn ta9_ta12_areas_on_top_of_each_other_and_queues_that_share_them_do_no_harm() {
    for setup in [2, 8, 256].into_iter().flat_map(everywhere) {
        let attack = Attack::new(setup, Access::Write);
        let mut config = setup.config();
        config.driver_area = config.desc_area;
        config.device_area = config.desc_area;
        let before = attack.ram.read(setup.data(), DATA as usize);
        for byte in [0, 1, 0x80, 0xff] {
            let ring = (setup.driver_area() - setup.desc()) as usize;
            attack.ram.fill(setup.desc(), ring, byte);
            let mut devices = [config, config, setup.config()]
                .map(|config| DeviceQueue::new(&config, &attack.ram.0).unwrap());
            for _ in 0..50 {
                for device in &mut devices {
                    let mut chains = Chains::new();
                    let taken = device.take(&attack.ram.0, Access::Write, 8, &mut chains);
                    (0..chains.len()).for_each(|i| device.give(&chains, i, &[1]));
                    device.publish();
                    device.arm();
                    assert!(taken.is_ok() || !setup.is_packed());
                }
            }
        }
        assert!(before == attack.ram.read(setup.data(), DATA as usize));
    }
}
