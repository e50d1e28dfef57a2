//! A device is gone at any moment; the next one goes on where it was, whatever base it is given.

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory};
use virtnet_virtio::{
    Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, QueueConfig, StartError, Used,
};

use crate::support::driver::Desc;
use crate::support::{Ram, Random, Setup};

/// A driver, its ring, and devices that come and go. Chains are numbered by the id that the driver has them under.
struct Crashes {
    setup: Setup,
    access: Access,
    memory: Arc<GuestMemory>,
    config: QueueConfig,
    driver: DriverQueue,
    device: DeviceQueue,
    chains: Chains,
    /// What the driver has added and not got back, in order, with what the device has written of it.
    outstanding: Vec<u16>,
    /// Chains given back and published, and only given back, since the driver looked last.
    published: usize,
    given: usize,
    /// Position up to which the driver can see used chains.
    shown: u32,
    returned: u64,
}

const LEN: u32 = 64;
const FRESH: u32 = 0x8000_8000;

impl Crashes {
    fn new(setup: Setup, access: Access) -> Self {
        let (memory, _) = setup.memory(1 << 20);
        let config = QueueConfig {
            base: FRESH,
            ..setup.config()
        };
        Self {
            setup,
            access,
            driver: DriverQueue::new(&config, &memory).unwrap(),
            device: DeviceQueue::new(&config, &memory).unwrap(),
            memory,
            config,
            chains: Chains::new(),
            outstanding: Vec::new(),
            published: 0,
            given: 0,
            shown: config.base,
            returned: 0,
        }
    }

    fn add(&mut self, buffers: usize) {
        let buffer = DriverBuffer {
            addr: GuestAddr(self.setup.data()),
            len: LEN,
            writable: self.access == Access::Write,
        };
        let buffers = vec![buffer; buffers];
        self.outstanding.extend(self.driver.add(&buffers));
    }

    fn take(&mut self, n: usize) {
        let chains = &mut self.chains;
        self.device
            .take(&self.memory, self.access, n, chains)
            .unwrap();
        assert!((0..self.chains.len()).all(|i| self.chains.bytes(i).is_ok()));
    }

    /// Gives back the first `n` chains and puts the others back.
    fn give(&mut self, n: usize) {
        let left = self.chains.len() - n;
        if left == 0 && self.access == Access::Read && self.given == 0 {
            self.device.give_all(&self.chains);
        } else {
            let lens: Vec<_> = (0..n)
                .map(|i| match self.access {
                    Access::Write => self.chains.bytes(i).unwrap(),
                    Access::Read | Access::Request => 0,
                })
                .collect();
            self.device.give(&self.chains, 0, &lens);
        }
        self.device.untake(left, &mut self.chains);
        self.chains.clear();
        self.given += n;
    }

    fn publish(&mut self) {
        self.device.publish();
        self.published += std::mem::take(&mut self.given);
        self.shown = self.device.base();
    }

    fn reap(&mut self, n: usize) {
        let mut used = vec![Used::default(); n];
        let n = self.driver.reap(&mut used).unwrap();
        assert!(n <= self.published);
        self.published -= n;
        let expected: Vec<_> = self.outstanding.drain(..n).collect();
        let ids: Vec<_> = used[..n].iter().map(|used| used.id).collect();
        assert_eq!(ids, expected, "each exactly once, in order");
        self.returned += n as u64;
    }

    /// The device is gone. The next one is given `base`.
    fn crash(&mut self, base: u32) {
        let slots = |base: u32| base >> 16;
        if self.driver.free() == 0 {
            // A whole lap that is about to be shown looks like one that is, from the next slot.
            self.driver.publish();
        }
        // A batch of which the second descriptor was written is finished; one that is only begun has never been.
        let finished = self.given > 1 || (self.given == 1 && self.last_given_is_marked());
        let expected = slots(if finished {
            self.device.base()
        } else {
            self.shown
        });
        let recover = |base| {
            let config = QueueConfig {
                base,
                ..self.config
            };
            DeviceQueue::recover(&config, &self.memory)
        };
        let ram = Ram(Arc::clone(&self.memory));
        let words: Vec<_> = (0..u64::from(self.setup.size.min(64)))
            .map(|slot| format!("{:016x}", ram.u64(self.setup.desc() + 16 * slot + 8)))
            .collect();
        // A stale base may look right to a device that does not know what served the ring before: then it says so.
        let found = match recover(base) {
            Err(_) if base != FRESH && slots(base) != slots(self.shown) => recover(FRESH),
            found => found,
        };
        let context = format!(
            "{:?}, at {expected:#x}, given {base:#x}, {} chains given: {words:?}",
            self.setup, self.given
        );
        let found = found.unwrap_or_else(|error| panic!("{error}: {context}"));
        assert_eq!(slots(found), expected, "{context}");
        assert_eq!(found & 0xffff, expected);
        if finished {
            self.published += self.given;
        }
        self.given = 0;
        self.chains.clear();
        self.config.base = found;
        self.shown = found;
        self.device = DeviceQueue::new(&self.config, &self.memory).unwrap();
    }

    /// Whether the only chain given has several slots, of which the last was marked.
    fn last_given_is_marked(&self) -> bool {
        let size = u32::from(self.setup.size);
        let slot = |base: u32| (base >> 16) & 0x7fff;
        let slots = (size + slot(self.device.base()) - slot(self.shown)) % size;
        slots != 1 && size > 1
    }
}

fn packed_rings() -> impl Iterator<Item = Setup> {
    let sizes = [1, 2, 3, 5, 8, 64, 255, 256];
    let setups = sizes.into_iter().flat_map(Setup::all);
    setups.filter(|setup| setup.is_packed() && !setup.event_idx)
}

#[test]
fn a_device_that_was_killed_at_any_step_is_gone_on_for_from_where_it_was() {
    for setup in packed_rings() {
        for access in [Access::Read, Access::Write] {
            for (seed, longest) in [(1, 1), (2, 1), (3, 2), (4, 5), (5, 40)] {
                let mut random = Random::new(seed);
                let mut ring = Crashes::new(setup, access);
                let full = seed == 2;
                let mut stale = ring.config.base;
                for _ in 0..4000 {
                    match random.below(10) {
                        0..3 => {
                            for _ in 0..random.below(20) {
                                ring.add(1 + random.below(longest));
                            }
                            if random.below(4) > 0 {
                                ring.driver.publish();
                            }
                        }
                        3..6 => {
                            ring.take(random.below(30));
                            if random.below(6) > 0 {
                                let n = ring.chains.len();
                                ring.give(n - random.below(n + 1) / 2);
                            }
                        }
                        6 | 7 => ring.publish(),
                        8 => {
                            ring.reap(random.below(100));
                            if full {
                                (0..setup.size).for_each(|_| ring.add(1));
                                ring.driver.publish();
                            }
                        }
                        _ if random.below(4) == 0 => {
                            // Of an orderly stop long ago, of the start, or nothing that ever was.
                            let base = match random.below(3) {
                                0 => stale,
                                1 => FRESH,
                                _ => ring.shown,
                            };
                            ring.crash(base);
                            if random.below(10) == 0 {
                                stale = ring.config.base;
                            }
                        }
                        _ => {}
                    }
                }
                assert!(ring.returned > 100, "{setup:?}: {} chains", ring.returned);
            }
        }
    }
}

#[test]
fn a_ring_that_fits_no_place_is_not_guessed_at() {
    let setup = packed_rings().find(|setup| setup.size == 8).unwrap();
    let lost = |bits: [u16; 8], base: u32| {
        let (memory, _) = setup.memory(4096);
        let ram = Ram(Arc::clone(&memory));
        for (slot, bits) in (0..).zip(bits) {
            Desc::new(setup.data(), 64, bits, 1).write(&ram, setup.desc(), slot, true);
        }
        let before = ram.read(setup.desc(), 128);
        let config = QueueConfig {
            base,
            ..setup.config()
        };
        let outcome = DeviceQueue::recover(&config, &memory);
        assert_eq!(ram.read(setup.desc(), 128), before, "nothing is written");
        match outcome {
            Err(StartError::Lost { base: named }) => assert_eq!(named, base),
            found => panic!("{bits:x?}: {found:x?}"),
        }
    };
    let (a, u, both) = (1 << 7, 1 << 15, 0x8080);
    for base in [0x8000_8000, 0x0003_0003, 0x8005_8005] {
        lost([a, u, a, u, a, u, a, u], base);
        lost([both, 0, both, 0, both, 0, both, 0], base);
        lost([a, a, both, a, u, both, a, 0], base);
    }
}

#[test]
fn what_is_noted_of_a_batch_is_not_believed_when_it_cannot_be() {
    let setup = packed_rings().find(|setup| setup.size == 8).unwrap();
    let mut ring = Crashes::new(setup, Access::Write);
    (0..4).for_each(|_| ring.add(1));
    ring.driver.publish();
    ring.take(3);
    ring.give(3);
    // The word for slot 0, in the address of slot 1: of another lap, or not used at all.
    let noted = setup.desc() + 16;
    let ram = Ram(Arc::clone(&ring.memory));
    let right = ram.u64(noted);
    for wrong in [0, !0, right ^ 1 << 63, right ^ 1 << 48, setup.data()] {
        ram.set_u64(noted, wrong);
        let outcome = DeviceQueue::recover(&ring.config, &ring.memory);
        assert!(matches!(outcome, Err(StartError::Lost { .. })), "{wrong:x}");
    }
    ram.set_u64(noted, right);
    ring.crash(0x8000_8000);
    ring.reap(8);
    assert_eq!(ring.returned, 3);
}

#[test]
fn rings_made_up_to_take_long_to_read_do_not() {
    let setup = Setup {
        size: 32_768,
        ..packed_rings().next().unwrap()
    };
    let (memory, _) = setup.memory(4096);
    let ram = Ram(Arc::clone(&memory));
    let config = QueueConfig {
        base: FRESH,
        ..setup.config()
    };
    let mut random = Random::new(9);
    let bits = [0, 1 << 7, 1 << 15, 0x8080];
    let start = std::time::Instant::now();
    for period in 1..40 {
        let pattern: Vec<_> = (0..period).map(|_| bits[random.below(4)]).collect();
        let words = (0..u32::from(setup.size)).flat_map(|slot| {
            let flags: u16 = pattern[slot as usize % period];
            let lens = [0, 2, 3, period as u32];
            let rest = u64::from(lens[random.below(4)]) | u64::from(flags) << 48;
            [rest, rest].map(u64::to_le_bytes).concat()
        });
        ram.write(setup.desc(), &words.collect::<Vec<_>>());
        let _ = DeviceQueue::recover(&config, &memory);
    }
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}
