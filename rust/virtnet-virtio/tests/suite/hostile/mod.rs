//! Peers that lie. Names start with the row of the threat table that they play.
//!
//! Whatever a driver writes, a chain that makes no sense comes back with length 0 and the ring goes on, or the ring is given up
//! with an error that says why; whatever a device writes, a driver never takes back what it has not given. Nobody panics,
//! loops, or touches a byte that is not theirs.

mod chains;
mod device;
mod packed;
mod race;
mod random;
mod split;

use std::ops::Range;
use std::sync::Arc;

use virtnet_mem::GuestMemory;
use virtnet_virtio::{Access, ChainError, Chains, DeviceQueue, Features, QueueConfig};

use crate::support::driver::{Desc, NEXT, WRITE};
use crate::support::{Ram, Setup, region_of, zero_file};

/// Bytes behind the rings for buffers and tables.
const DATA: u64 = 64 << 10;

/// Three more regions: the first two follow each other in guest addresses (and nowhere else), then comes a hole.
const FIRST: Range<u64> = 0x4000_0000..0x4000_2000;
const SECOND: Range<u64> = 0x4000_2000..0x4000_3000;
const THIRD: Range<u64> = 0x4000_4000..0x4000_5000;

fn memory_of(setup: &Setup) -> Arc<GuestMemory> {
    let rings = setup.data() + DATA - setup.desc();
    let ranges = [setup.desc()..setup.desc() + rings, THIRD, FIRST, SECOND];
    let regions = ranges.map(|range| {
        let len = range.end - range.start;
        region_of(&zero_file(len), 0, len, range.start)
    });
    Arc::new(GuestMemory::new(regions.into()).unwrap())
}

/// Every kind of ring of `size`, standing at the first, a middle and the last place, and shortly before a counter wraps.
fn everywhere(size: u16) -> impl Iterator<Item = Setup> {
    Setup::all(size).flat_map(move |setup| {
        let n = u64::from(size);
        let wraps = if setup.is_packed() {
            [2 * n - 1, 3 * n]
        } else {
            [65_535, 65_536 - n / 2]
        };
        let mut starts = [0, n / 2, n - 1, wraps[0], wraps[1]];
        starts.sort_unstable();
        let mut starts = starts.to_vec();
        starts.dedup();
        starts
            .into_iter()
            .map(move |start| Setup { start, ..setup })
    })
}

/// A driver that writes what it likes, and our device.
struct Attack {
    setup: Setup,
    access: Access,
    ram: Ram,
    device: DeviceQueue,
    chains: Chains,
    /// Positions made available, and positions found used.
    at: u64,
    used_at: u64,
    /// Ring slots of the chains that the device has not returned, oldest first.
    slots: Vec<u64>,
    /// Next descriptor of a split table.
    next_desc: u64,
}

impl Attack {
    fn new(setup: Setup, access: Access) -> Self {
        Self::negotiated(setup, access, setup.features())
    }

    fn negotiated(setup: Setup, access: Access, features: Features) -> Self {
        let memory = memory_of(&setup);
        let ram = Ram(memory);
        if setup.is_packed() {
            // What the last lap left.
            let size = u64::from(setup.size);
            for at in setup.start.saturating_sub(size)..setup.start {
                let used = if setup.bits(at) & 0x8000 != 0 {
                    0x8080
                } else {
                    0
                };
                Desc::new(0, 0, used, 0).write(&ram, setup.desc(), at % size, true);
            }
        } else {
            ram.set_u16(setup.driver_area() + 2, setup.start as u16);
            ram.set_u16(setup.device_area() + 2, setup.start as u16);
        }
        let config = QueueConfig {
            features,
            ..setup.config()
        };
        Self {
            device: DeviceQueue::new(&config, &ram.0).unwrap(),
            setup,
            access,
            chains: Chains::new(),
            at: setup.start,
            used_at: setup.start,
            slots: Vec::new(),
            next_desc: 0,
            ram,
        }
    }

    fn size(&self) -> u64 {
        u64::from(self.setup.size)
    }

    /// The flag of a buffer that suits the queue.
    fn right(&self) -> u16 {
        match self.access {
            Access::Read | Access::Request => 0,
            Access::Write => WRITE,
        }
    }

    /// A good buffer: 64 bytes, somewhere.
    fn good(&self) -> Desc {
        let addr = self.setup.data() + (self.at % 64) * 64;
        Desc::new(addr, 64, self.right(), 0)
    }

    /// The bits that make a packed descriptor at `at` available.
    fn available(&self, at: u64) -> u16 {
        if self.setup.bits(at) & 0x8000 != 0 {
            1 << 7
        } else {
            1 << 15
        }
    }

    /// Writes a packed descriptor at ring position `at`, available.
    fn write_packed(&self, at: u64, mut desc: Desc) {
        desc.flags |= self.available(at);
        desc.write(&self.ram, self.setup.desc(), at % self.size(), true);
    }

    /// Offers a list of descriptors as one chain; its id. All but the last get NEXT; split ones are linked.
    fn offer(&mut self, descs: &[Desc]) -> u16 {
        let (size, n) = (self.size(), descs.len() as u64);
        assert!(n <= size);
        if self.setup.is_packed() {
            let id = (self.at as u16).wrapping_add(0x100);
            for (k, &desc) in descs.iter().enumerate() {
                let mut desc = desc;
                if k + 1 < descs.len() {
                    desc.flags |= NEXT;
                }
                desc.fourth = id;
                self.write_packed(self.at + k as u64, desc);
            }
            self.at += n;
            self.slots.push(n);
            return id;
        }
        let head = self.next_desc % size;
        for (k, &desc) in descs.iter().enumerate() {
            let index = (self.next_desc + k as u64) % size;
            let mut desc = desc;
            if k + 1 < descs.len() {
                desc.flags |= NEXT;
                desc.fourth = ((index + 1) % size) as u16;
            }
            desc.write(&self.ram, self.setup.desc(), index, false);
        }
        self.next_desc += n;
        self.offer_head(head as u16);
        head as u16
    }

    /// Offers `n` chains of one good buffer.
    fn offer_good(&mut self, n: u64) {
        for _ in 0..n {
            self.offer(&[self.good()]);
        }
    }

    /// Split: offers the chain that starts at descriptor `head`.
    fn offer_head(&mut self, head: u16) {
        let area = self.setup.driver_area();
        self.ram
            .set_u16(area + 4 + 2 * (self.at % self.size()), head);
        self.at += 1;
        self.ram.set_u16(area + 2, self.at as u16);
        self.slots.push(1);
    }

    /// Writes an indirect table; the descriptor that names it.
    fn table(&self, addr: u64, entries: &[Desc]) -> Desc {
        for (index, entry) in entries.iter().enumerate() {
            entry.write(&self.ram, addr, index as u64, self.setup.is_packed());
        }
        Desc::new(
            addr,
            16 * entries.len() as u32,
            crate::support::driver::INDIRECT,
            0,
        )
    }

    /// Takes all chains; what each of them is: address and length of its buffers, or its error.
    fn take(&mut self) -> Vec<Result<Vec<(u64, u32)>, ChainError>> {
        let first = self.chains.len();
        let n = self
            .device
            .take(&self.ram.0, self.access, 64, &mut self.chains);
        assert_eq!(n, Ok(self.chains.len() - first));
        (first..self.chains.len()).map(|i| self.chain(i)).collect()
    }

    fn chain(&self, i: usize) -> Result<Vec<(u64, u32)>, ChainError> {
        let bytes = self.chains.bytes(i);
        let segments = self.chains.segments(i);
        if bytes.is_err() {
            assert!(segments.is_empty(), "a bad chain has no buffers");
        }
        let start = |region: u32| self.ram.0.regions()[region as usize].guest().0;
        let buffers: Vec<(u64, u32)> = segments
            .iter()
            .map(|s| (start(s.region) + s.offset as u64, s.len))
            .collect();
        bytes.map(|bytes| {
            assert_eq!(bytes, buffers.iter().map(|&(_, len)| len).sum::<u32>());
            buffers
        })
    }

    /// Gives all chains back empty; what the driver finds used: id and length of each.
    fn give_back(&mut self) -> Vec<(u32, u32)> {
        for i in 0..self.chains.len() {
            self.device.give(&self.chains, i, &[0]);
        }
        let n = self.chains.len();
        self.chains.clear();
        self.device.publish();
        (0..n).map(|_| self.next_used().unwrap()).collect()
    }

    /// The next used element.
    fn next_used(&mut self) -> Option<(u32, u32)> {
        let (setup, ram) = (&self.setup, &self.ram);
        let slot = self.used_at % self.size();
        if setup.is_packed() {
            let at = setup.desc() + 16 * slot;
            let used = if setup.bits(self.used_at) & 0x8000 != 0 {
                0x8080
            } else {
                0
            };
            let found = (ram.u16(at + 14) & 0x8080 == used)
                .then(|| (u32::from(ram.u16(at + 12)), ram.u32(at + 8)));
            self.used_at += self.slots.remove(0);
            return found;
        }
        if ram.u16(setup.device_area() + 2) == self.used_at as u16 {
            return None;
        }
        let at = setup.device_area() + 4 + 8 * slot;
        self.used_at += 1;
        self.slots.remove(0);
        Some((ram.u32(at), ram.u32(at + 4)))
    }

    /// All guest memory but what a device may write when it returns nothing: used ring, or descriptors and its event area.
    fn snapshot(&self) -> Vec<Vec<u8>> {
        let setup = &self.setup;
        let mut parts = vec![
            self.ram.read(
                setup.driver_area(),
                (setup.device_area() - setup.driver_area()) as usize,
            ),
            self.ram.read(setup.data(), DATA as usize),
        ];
        for range in [FIRST, SECOND, THIRD] {
            parts.push(
                self.ram
                    .read(range.start, (range.end - range.start) as usize),
            );
        }
        if !setup.is_packed() {
            let len = (setup.driver_area() - setup.desc()) as usize;
            parts.push(self.ram.read(setup.desc(), len));
        }
        parts
    }
}
