//! A device that lies to our driver.

use virtnet_mem::GuestAddr;
use virtnet_virtio::{DriverBuffer, DriverQueue, RingError, RingFormat, Used};

use crate::support::{Ram, Setup};

/// Our driver with chains out, and a device that writes what it likes.
struct Attack {
    setup: Setup,
    ram: Ram,
    driver: DriverQueue,
}

const LEN: u32 = 100;

impl Attack {
    fn new(setup: Setup) -> Self {
        let (memory, _) = setup.memory(1 << 16);
        let ram = Ram(memory);
        let driver = DriverQueue::new(&setup.config(), &ram.0).unwrap();
        Self { setup, ram, driver }
    }

    /// Makes a chain of `n` buffers available: the last one may be written.
    fn offer(&mut self, n: usize) -> u16 {
        let mut buffers = vec![
            DriverBuffer {
                addr: GuestAddr(self.setup.data()),
                len: LEN,
                writable: false,
            };
            n
        ];
        buffers[n - 1].writable = true;
        let id = self.driver.add(&buffers).unwrap();
        self.driver.publish();
        id
    }

    /// Split: writes the used element `at` and the index behind the last.
    fn write_used(&self, at: u64, id: u32, len: u32, index: u16) {
        let element = self.setup.device_area() + 4 + 8 * (at % u64::from(self.setup.size));
        self.ram.set_u32(element, id);
        self.ram.set_u32(element + 4, len);
        self.ram.set_u16(self.setup.device_area() + 2, index);
    }

    /// Packed: writes a used descriptor at position `at`.
    fn write_used_desc(&self, at: u64, id: u16, len: u32) {
        let desc = self.setup.desc() + 16 * (at % u64::from(self.setup.size));
        let lap = if self.setup.bits(at) & 0x8000 != 0 {
            0x8080
        } else {
            0
        };
        self.ram.set_u32(desc + 8, len);
        self.ram.set_u16(desc + 12, id);
        self.ram.set_u16(desc + 14, lap | 2);
    }

    /// Returns one chain, in either format.
    fn give(&self, at: u64, id: u16, len: u32) {
        if self.setup.is_packed() {
            self.write_used_desc(at, id, len);
        } else {
            self.write_used(at, u32::from(id), len, at as u16 + 1);
        }
    }

    fn reap(&mut self) -> Result<Vec<Used>, RingError> {
        let mut used = [Used::default(); 64];
        let n = self.driver.reap(&mut used)?;
        Ok(used[..n].to_vec())
    }

    /// The ring stays broken, however often it is looked at.
    fn assert_broken(&mut self, expected: RingError) {
        assert_eq!(self.reap(), Err(expected), "{:?}", self.setup);
        for _ in 0..3 {
            self.reap().unwrap_err();
        }
    }
}

#[test]
fn tc7_a_used_index_that_jumps_or_goes_back_breaks_the_ring() {
    for setup in Setup::all(8).filter(|setup| !setup.is_packed()) {
        for (found, expected) in [(4, 0), (9, 0), (0x8000, 0), (0xffff, 0), (0xfff8, 0)] {
            let mut attack = Attack::new(setup);
            let _out = [1; 3].map(|n| attack.offer(n));
            attack.write_used(0, 0, 0, found);
            attack.assert_broken(RingError::UsedIndex {
                found,
                expected,
                outstanding: 3,
            });
        }
        // Chains that were added but not shown cannot come back.
        let mut attack = Attack::new(setup);
        let id = attack.offer(1);
        let buffer = DriverBuffer {
            addr: GuestAddr(setup.data()),
            len: LEN,
            writable: true,
        };
        attack.driver.add(&[buffer]).unwrap();
        attack.write_used(0, u32::from(id), 0, 1);
        assert_eq!(attack.reap(), Ok(vec![Used { id, len: 0 }]));
        attack.write_used(1, 1, 0, 2);
        attack.assert_broken(RingError::UsedIndex {
            found: 2,
            expected: 1,
            outstanding: 0,
        });
    }
}

#[test]
fn tc8_tc15_tc16_a_chain_that_the_device_does_not_hold_breaks_the_ring() {
    for setup in Setup::all(8) {
        // Nobody has them, or somebody will, or they are the middle of another.
        for id in [3, 5, 7, 8, 0x7fff, 0xffff] {
            let mut attack = Attack::new(setup);
            let head = attack.offer(3);
            if id == head {
                continue;
            }
            attack.give(0, id, 0);
            attack.assert_broken(RingError::UsedId { id: u32::from(id) });
        }
        if !setup.is_packed() {
            for id in [1, 2, 0x1_0000, u32::MAX] {
                let mut attack = Attack::new(setup);
                attack.offer(3);
                attack.write_used(0, id, 0, 1);
                attack.assert_broken(RingError::UsedId { id });
            }
        }
        // The same one twice.
        let mut attack = Attack::new(setup);
        let first = attack.offer(1);
        attack.offer(1);
        attack.give(0, first, 7);
        assert_eq!(attack.reap(), Ok(vec![Used { id: first, len: 7 }]));
        attack.give(1, first, 7);
        attack.assert_broken(RingError::UsedId {
            id: u32::from(first),
        });
        // And the same one when it is out again is the same one again.
        let mut attack = Attack::new(setup);
        for lap in 0..40 {
            let id = attack.offer(1);
            attack.give(lap, id, 7);
            assert_eq!(attack.reap(), Ok(vec![Used { id, len: 7 }]));
        }
    }
}

#[test]
fn tc9_a_length_beyond_what_may_be_written_breaks_the_ring() {
    for setup in Setup::all(8) {
        for (len, good) in [
            (0, true),
            (LEN, true),
            (LEN + 1, false),
            (2 * LEN, false),
            (u32::MAX, false),
        ] {
            let mut attack = Attack::new(setup);
            // Two buffers, of which one may be written.
            let id = attack.offer(2);
            attack.give(0, id, len);
            if good {
                assert_eq!(attack.reap(), Ok(vec![Used { id, len }]));
            } else {
                attack.assert_broken(RingError::UsedLen {
                    id: u32::from(id),
                    len,
                    size: LEN,
                });
            }
        }
    }
}

#[test]
fn tc9_a_packed_length_without_write_is_none() {
    for setup in Setup::all(8).filter(Setup::is_packed) {
        let mut attack = Attack::new(setup);
        let id = attack.offer(1);
        attack.write_used_desc(0, id, u32::MAX);
        let flags = setup.desc() + 14;
        attack.ram.set_u16(flags, attack.ram.u16(flags) & !2);
        assert_eq!(attack.reap(), Ok(vec![Used { id, len: 0 }]));
    }
}

#[test]
fn tc14_a_device_that_scribbles_over_the_ring_harms_itself() {
    for setup in Setup::all(8) {
        let mut attack = Attack::new(setup);
        for lap in 0..20 {
            let id = attack.offer(1);
            if setup.is_packed() {
                // All but the descriptor that it returns.
                for slot in (0..8).filter(|&slot| slot != lap % 8) {
                    attack.ram.fill(setup.desc() + 16 * slot, 12, 0xff);
                }
            } else {
                attack.ram.fill(setup.desc(), 16 * 8, 0xff);
                attack.ram.fill(setup.driver_area() + 4, 2 * 8, 0xff);
            }
            attack.give(lap, id, 1);
            assert_eq!(attack.reap(), Ok(vec![Used { id, len: 1 }]));
            assert_eq!(attack.driver.free(), 8);
        }
    }
}

#[test]
fn tc15_a_packed_descriptor_of_another_lap_is_nothing() {
    for setup in Setup::all(3).filter(Setup::is_packed) {
        let mut attack = Attack::new(setup);
        for at in 0..12 {
            // Nor is one of this lap, when nothing is out.
            attack.give(at, 0, 0);
            assert_eq!(attack.reap(), Ok(vec![]));
            assert!(!attack.driver.has_work());
            let id = attack.offer(1);
            let desc = setup.desc() + 16 * (at % 3);
            let lap = if setup.bits(at) & 0x8000 != 0 {
                0x8080
            } else {
                0
            };
            for flags in [0, 1 << 7, 1 << 15, 0x8080] {
                if flags != lap {
                    attack.ram.set_u16(desc + 14, flags);
                    assert_eq!(attack.reap(), Ok(vec![]));
                    assert!(!attack.driver.has_work());
                }
            }
            attack.give(at, id, 0);
            assert_eq!(attack.reap(), Ok(vec![Used { id, len: 0 }]));
        }
    }
}

/// A batch is as long as the driver says; a device that names a chain behind it claims no more than it could.
#[test]
fn tc16_a_batch_is_never_longer_than_what_is_out() {
    for setup in Setup::all(8).filter(|setup| setup.in_order) {
        let mut attack = Attack::new(setup);
        let ids: Vec<u16> = (0..4).map(|_| attack.offer(1)).collect();
        // The last of four, in the place of the first.
        attack.give(0, ids[3], 9);
        if !setup.is_packed() {
            attack.ram.set_u16(setup.device_area() + 2, 4);
        }
        let lens = [LEN, LEN, LEN, 9];
        let expected: Vec<Used> = ids
            .iter()
            .zip(lens)
            .map(|(&id, len)| Used { id, len })
            .collect();
        assert_eq!(attack.reap(), Ok(expected));
        assert_eq!(attack.driver.free(), 8);
        // And once more, when none of them is out.
        attack.offer(1);
        attack.give(4, ids[3], 9);
        attack.assert_broken(RingError::UsedId {
            id: u32::from(ids[3]),
        });
    }
}

#[test]
fn tc19_any_wish_of_a_device_is_answered_with_a_kick_or_none() {
    for size in [1, 8, 32_768] {
        for setup in Setup::all(size) {
            let mut attack = Attack::new(setup);
            let mut at = 0;
            for word in (0..=u16::MAX).step_by(509) {
                for flags in [0, 1, 2, 3, 0xffff] {
                    let area = setup.device_area();
                    if setup.is_packed() || !setup.event_idx {
                        attack
                            .ram
                            .set_u16(area, if setup.is_packed() { word } else { flags });
                    }
                    if setup.is_packed() {
                        attack.ram.set_u16(area + 2, flags);
                    } else if setup.event_idx {
                        attack.ram.set_u16(area + 4 + 8 * u64::from(size), word);
                    }
                    let due = setup.kick_is_due(&attack.ram, at, at + 1);
                    let buffer = DriverBuffer {
                        addr: GuestAddr(setup.data()),
                        len: LEN,
                        writable: true,
                    };
                    let id = attack.driver.add(&[buffer]).unwrap();
                    let kick = attack.driver.publish();
                    // A place that the ring does not have may mean anything.
                    let somewhere = u64::from(word & 0x7fff) < u64::from(size);
                    if !setup.is_packed() || flags & 3 != 2 || somewhere {
                        assert_eq!(kick, due, "{setup:?}: {word:#x} {flags:#x}");
                    }
                    attack.give(at, id, 0);
                    assert_eq!(attack.reap().unwrap().len(), 1);
                    at += 1;
                }
            }
        }
    }
}

#[test]
fn a_chain_of_no_buffers_or_too_many_is_not_added() {
    for setup in Setup::all(8) {
        let mut attack = Attack::new(setup);
        let buffer = DriverBuffer {
            addr: GuestAddr(setup.data()),
            len: LEN,
            writable: true,
        };
        assert_eq!(attack.driver.add(&[]), None);
        for n in [9, 100, 65_536, 65_537] {
            assert_eq!(attack.driver.add(&vec![buffer; n]), None);
        }
        attack.offer(5);
        assert_eq!(attack.driver.add(&[buffer; 4]), None);
        assert_eq!(attack.driver.free(), 3);
        attack.offer(3);
        assert_eq!(attack.driver.add(&[buffer]), None);
        assert!(!attack.driver.publish(), "nothing new");
    }
}

#[test]
fn areas_that_are_not_memory_are_refused() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let setup = Setup::new(format, 8);
        let (memory, _) = setup.memory(0);
        let mut config = setup.config();
        config.device_area = crate::support::user(0);
        DriverQueue::new(&config, &memory).unwrap_err();
    }
}
