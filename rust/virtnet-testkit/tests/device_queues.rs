//! The device side of both queue formats against the fake guest: honest chains of every shape, and every attack.

use virtnet_mem::GuestAddr;
use virtnet_ports::{Huge, OwnMemory, RegionLayout};
use virtnet_testkit::{
    Attack, Buffer, Expect, FakeGuest, GuestQueue, PackedQueue, Returned, SplitQueue,
};
use virtnet_virtio::{Access, Chains, DeviceQueue, Features, RingError};

const SIZE: u16 = 8;

fn queue_of(guest: &mut FakeGuest, features: Features) -> Box<dyn GuestQueue> {
    if features.contains(Features::RING_PACKED) {
        Box::new(PackedQueue::new(guest, SIZE, features))
    } else {
        Box::new(SplitQueue::new(guest, SIZE, features))
    }
}

struct Bench {
    guest: FakeGuest,
    queue: Box<dyn GuestQueue>,
    device: DeviceQueue,
    chains: Chains,
    writable: bool,
}

impl Bench {
    fn new(mut guest: FakeGuest, features: Features, writable: bool) -> Self {
        let queue = queue_of(&mut guest, features);
        let device = DeviceQueue::new(&queue.config(&guest, features), guest.memory())
            .expect("the areas are in memory");
        Self {
            guest,
            queue,
            device,
            chains: Chains::new(),
            writable,
        }
    }

    /// One turn of the device: reads what there is to read, or fills every chain with a count.
    fn serve(&mut self) -> Result<Vec<Vec<u8>>, RingError> {
        let memory = self.guest.memory();
        let access = if self.writable {
            Access::Write
        } else {
            Access::Read
        };
        self.chains.clear();
        let taken = self.device.take(memory, access, 64, &mut self.chains);
        let mut seen = Vec::new();
        for i in 0..self.chains.len() {
            let len = self.chains.bytes(i).unwrap_or(0);
            let mut bytes = vec![0; len as usize];
            let mut at = 0;
            for &segment in self.chains.segments(i) {
                let slice = memory.slice(segment);
                if self.writable {
                    let fill: Vec<_> = (at..at + slice.len()).map(count).collect();
                    at += slice.copy_from(&fill);
                } else {
                    at += slice.copy_to(&mut bytes[at..]);
                }
            }
            assert_eq!(at, len as usize);
            self.device
                .give(&self.chains, i, &[if self.writable { len } else { 0 }]);
            seen.push(bytes);
        }
        self.device.publish();
        taken.map(|_| seen)
    }

    fn buffer(&mut self, len: usize) -> Buffer {
        if self.writable {
            self.guest.writable(u32::try_from(len).expect("short"))
        } else {
            let bytes: Vec<_> = (0..len).map(count).collect();
            self.guest.readable(&bytes)
        }
    }

    /// An honest chain goes through and comes back.
    fn honest(&mut self, lens: &[usize], indirect: bool) {
        let buffers: Vec<_> = lens.iter().map(|&len| self.buffer(len)).collect();
        let expected: Vec<_> = lens.iter().flat_map(|&len| (0..len).map(count)).collect();
        let (guest, queue) = (&mut self.guest, &mut self.queue);
        let id = if indirect {
            queue.offer_indirect(guest, &buffers)
        } else {
            queue.offer(guest, &buffers)
        };
        let seen = self.serve().expect("the ring is in order");
        let returned = self.queue.collect(&mut self.guest);
        if self.writable {
            let len: usize = lens.iter().sum();
            let expected = Returned {
                id,
                len: u32::try_from(len).expect("short"),
                bytes: (0..len).map(count).collect(),
            };
            assert_eq!(returned, [expected]);
        } else {
            assert_eq!(seen, [expected]);
            assert_eq!((returned.len(), returned[0].id), (1, id));
        }
    }
}

fn count(i: usize) -> u8 {
    u8::try_from(i % 251).expect("below 251")
}

/// Both formats, both directions, with and without what changes how a ring is walked.
fn everywhere(mut test: impl FnMut(Features, bool)) {
    for format in [Features::empty(), Features::RING_PACKED] {
        for more in [
            Features::INDIRECT_DESC,
            Features::INDIRECT_DESC | Features::EVENT_IDX,
            Features::INDIRECT_DESC | Features::IN_ORDER,
            Features::empty(),
        ] {
            for writable in [false, true] {
                test(Features::VERSION_1 | format | more, writable);
            }
        }
    }
}

#[test]
fn honest_chains_of_every_shape_pass() {
    everywhere(|features, writable| {
        let mut bench = Bench::new(FakeGuest::new(256 << 10), features, writable);
        for round in 0..5 {
            for lens in [
                &[1][..],
                &[12, 60],
                &[1500],
                &[1, 1, 1, 1, 1, 1, 1, 1],
                &[700, 800, 9000],
            ] {
                bench.honest(lens, false);
                if features.contains(Features::INDIRECT_DESC) {
                    bench.honest(lens, true);
                }
            }
            bench.honest(&[round + 1], false);
        }
    });
}

#[test]
fn a_buffer_may_lie_across_adjacent_regions() {
    let region = |guest, size| RegionLayout {
        guest: GuestAddr(guest),
        size,
        offset: 0x3000,
    };
    let layout = [
        region(0x1_0000, 0x2_0000),
        region(0x3_0000, 0x1_0000),
        region(0x9_0000, 0x1_0000),
    ];
    everywhere(|features, writable| {
        let own = OwnMemory::with_layout(&layout, Huge::No).unwrap();
        let mut bench = Bench::new(FakeGuest::over(own.memory()), features, writable);
        bench.honest(&[64], false);
        let buffer = Buffer {
            addr: GuestAddr(0x2_ff00),
            len: 0x200,
            writable,
        };
        let bytes: Vec<_> = (0..0x200).map(count).collect();
        if !writable {
            bench.guest.write(buffer.addr, &bytes);
        }
        bench.queue.offer(&mut bench.guest, &[buffer]);
        let seen = bench.serve().unwrap();
        let returned = bench.queue.collect(&mut bench.guest);
        let passed = if writable {
            &returned[0].bytes
        } else {
            &seen[0]
        };
        assert_eq!(*passed, bytes);
    });
}

#[test]
fn every_attack_costs_one_chain_or_the_ring_and_nothing_else() {
    everywhere(|features, writable| {
        for &attack in Attack::ALL {
            let what = format!("{attack:?} with {features:?}, writable: {writable}");
            let mut bench = Bench::new(FakeGuest::new(256 << 10), features, writable);
            bench.honest(&[100], false);
            bench.honest(&[12, 100], false);
            let (guest, queue) = (&mut bench.guest, &mut bench.queue);
            let Some(expect) = queue.attack(guest, attack, writable) else {
                continue;
            };
            let served = bench.serve();
            match expect {
                Expect::Returned(id) => {
                    served.unwrap_or_else(|error| panic!("{what}: {error}"));
                    let returned = bench.queue.collect(&mut bench.guest);
                    let bytes = Vec::new();
                    assert_eq!(returned, [Returned { id, len: 0, bytes }], "{what}");
                    for lens in [&[64][..], &[12, 1500], &[9, 9, 9]] {
                        bench.honest(lens, false);
                    }
                }
                Expect::Stopped => {
                    let error = served.expect_err(&what);
                    bench.guest.check();
                    assert!(!error.to_string().is_empty());
                }
                Expect::Survived => bench.guest.check(),
            }
        }
    });
}
