//! A driver, a device, one memory, and a model that knows at every moment what each of them must see.

use std::collections::VecDeque;

use proptest::prelude::*;
use virtnet_mem::GuestAddr;
use virtnet_virtio::{Access, DriverBuffer, DriverQueue, Used};

use super::device::{Device, NaiveDevice, OurDevice};
use super::driver::{Driver, NaiveDriver};
use super::theirs::TheirDevice;
use super::{Ram, Random, Setup};

/// One step of one side.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// The driver adds chains of up to so many buffers.
    Add {
        chains: u8,
        buffers: u8,
    },
    PublishAvailable,
    Take(u8),
    Untake(u8),
    Give(u8),
    GiveBatch(u8),
    PublishUsed,
    Reap(u8),
    ArmDevice,
    DisarmDevice,
    ArmDriver,
    DisarmDriver,
    Restart,
}

impl Step {
    /// Any step; those that move chains are more likely.
    pub(crate) fn any() -> impl Strategy<Value = Self> {
        use Step::*;
        prop_oneof![
            6 => (1_u8..12, 1_u8..6).prop_map(|(chains, buffers)| Add { chains, buffers }),
            1 => Just(Add { chains: 255, buffers: 1 }),
            1 => (1_u8..3, 1_u8..40).prop_map(|(chains, buffers)| Add { chains, buffers }),
            6 => Just(PublishAvailable),
            5 => (1_u8..70).prop_map(Take),
            1 => (0_u8..20).prop_map(Untake),
            5 => (1_u8..70).prop_map(Give),
            2 => (1_u8..70).prop_map(GiveBatch),
            6 => Just(PublishUsed),
            5 => (1_u8..70).prop_map(Reap),
            2 => Just(ArmDevice),
            1 => Just(DisarmDevice),
            2 => Just(ArmDriver),
            1 => Just(DisarmDriver),
            1 => Just(Restart),
        ]
    }
}

/// Who plays which side: ours both, or ours against a naive one, or our driver against another implementation's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pair {
    Ours,
    NaiveDriver { indirect: bool },
    NaiveDevice,
    TheirDevice,
}

impl Pair {
    /// Theirs has split rings without in-order batches only.
    pub(crate) fn can_be(self, setup: &Setup) -> bool {
        self != Self::TheirDevice || !(setup.is_packed() || setup.in_order)
    }
}

/// Bytes of a place for a buffer; a buffer is somewhere inside.
const CELL: u64 = 64;
/// What stands in memory that nobody has written.
const POISON: u8 = 0xee;

/// A chain on its way.
#[derive(Clone, Debug)]
struct Chain {
    id: u16,
    descs: usize,
    /// What its bytes are made from.
    tag: u64,
    buffers: Vec<DriverBuffer>,
    cells: Vec<u64>,
}

impl Chain {
    fn bytes(&self) -> u32 {
        self.buffers.iter().map(|b| b.len).sum()
    }

    fn content(&self) -> impl Iterator<Item = u8> {
        let tag = self.tag;
        (0..self.bytes()).map(move |k| (tag.wrapping_mul(31) + u64::from(k) * 7 + 1) as u8)
    }
}

pub(crate) struct World {
    setup: Setup,
    access: Access,
    ram: Ram,
    driver: Box<dyn Driver>,
    device: Box<dyn Device>,
    random: Random,
    cells: Vec<u64>,
    added: u64,
    /// Ids on their way, and descriptors that they hold.
    ids: Vec<bool>,
    descs: usize,
    /// Chains by where they are: added, available, taken, given back, used.
    staged: VecDeque<Chain>,
    available: VecDeque<Chain>,
    taken: Vec<Chain>,
    given: Vec<(Chain, u32)>,
    used: VecDeque<(Chain, u32)>,
    /// Ring positions that driver and device have published.
    driver_at: u64,
    device_at: u64,
    /// A device that has just started does not know what the driver has been told, and may call in any case.
    just_started: bool,
    /// A side that asked to be told, and found nothing.
    device_sleeps: bool,
    driver_sleeps: bool,
    /// Chains that went all the way.
    pub(crate) finished: u64,
}

impl World {
    pub(crate) fn new(setup: Setup, pair: Pair, access: Access) -> Self {
        let n_cells = u64::from(setup.size) + 64;
        let tables = setup.data() + n_cells * CELL;
        let (memory, file) = setup.memory(n_cells * CELL + NaiveDriver::table_bytes(&setup));
        let ram = Ram(memory);
        let driver: Box<dyn Driver> = match pair {
            Pair::NaiveDriver { indirect } => {
                Box::new(NaiveDriver::new(setup, &ram, tables, indirect))
            }
            _ => {
                assert_eq!(setup.start, 0, "our driver starts at 0");
                Box::new(DriverQueue::new(&setup.config(), &ram.0).unwrap())
            }
        };
        let device: Box<dyn Device> = match pair {
            Pair::NaiveDevice => Box::new(NaiveDevice::new(setup, &ram)),
            Pair::TheirDevice => Box::new(TheirDevice::new(&setup, &file)),
            Pair::Ours | Pair::NaiveDriver { .. } => Box::new(OurDevice::new(&setup, &ram)),
        };
        Self {
            access,
            driver,
            random: Random::new(u64::from(setup.size)),
            cells: (0..n_cells).map(|k| setup.data() + k * CELL).collect(),
            added: 0,
            ids: vec![false; usize::from(setup.size)],
            descs: 0,
            staged: VecDeque::new(),
            available: VecDeque::new(),
            taken: Vec::new(),
            given: Vec::new(),
            used: VecDeque::new(),
            driver_at: setup.start,
            device_at: setup.start,
            just_started: true,
            device,
            device_sleeps: false,
            driver_sleeps: false,
            finished: 0,
            setup,
            ram,
        }
    }

    /// How many ring positions a chain takes.
    fn positions(&self, chain: &Chain) -> u64 {
        if self.setup.is_packed() {
            chain.descs as u64
        } else {
            1
        }
    }

    pub(crate) fn step(&mut self, step: Step) {
        match step {
            Step::Add { chains, buffers } => {
                for _ in 0..chains {
                    let n = 1 + self.random.below(usize::from(buffers));
                    if !self.add(n) {
                        break;
                    }
                }
            }
            Step::PublishAvailable => self.publish_available(),
            Step::Take(n) => self.take(usize::from(n)),
            Step::Untake(n) => self.untake(usize::from(n)),
            Step::Give(n) => self.give(usize::from(n)),
            Step::GiveBatch(n) => self.give_batch(usize::from(n)),
            Step::PublishUsed => self.publish_used(),
            Step::Reap(n) => self.reap(usize::from(n)),
            Step::ArmDevice => {
                let waiting = self.device.arm();
                assert_eq!(waiting, !self.available.is_empty(), "device armed");
                self.device_sleeps = !waiting;
            }
            Step::DisarmDevice => {
                self.device.disarm();
                self.device_sleeps = false;
            }
            Step::ArmDriver => {
                let waiting = self.driver.arm();
                assert_eq!(waiting, !self.used.is_empty(), "driver armed");
                self.driver_sleeps = !waiting;
            }
            Step::DisarmDriver => {
                self.driver.disarm();
                self.driver_sleeps = false;
            }
            Step::Restart => self.restart(),
        }
        self.check_work();
    }

    /// Adds one chain of `n` buffers if there is room for it.
    fn add(&mut self, n: usize) -> bool {
        if n > self.cells.len() {
            return false;
        }
        let at = self.cells.len() - n;
        let cells = self.cells.split_off(at);
        let mut buffers = Vec::new();
        for &cell in &cells {
            let offset = self.random.below(16) as u64;
            // Some buffers have no bytes, but no chain does.
            let len = match self.random.below(8) {
                0 if !buffers.is_empty() => 0,
                _ => 1 + self.random.below(48) as u32,
            };
            buffers.push(DriverBuffer {
                addr: GuestAddr(cell + offset),
                len,
                writable: self.access == Access::Write,
            });
        }
        let mut chain = Chain {
            id: 0,
            descs: n,
            tag: self.added,
            buffers,
            cells,
        };
        for &cell in &chain.cells {
            self.ram.fill(cell, CELL as usize, POISON);
        }
        if self.access == Access::Read {
            let mut content = chain.content();
            for buffer in &chain.buffers {
                let bytes: Vec<u8> = content.by_ref().take(buffer.len as usize).collect();
                self.ram.write(buffer.addr.0, &bytes);
            }
        }
        let free = self.driver.free();
        assert_eq!(free, usize::from(self.setup.size) - self.descs);
        let Some((descs, id)) = self.driver.add(&chain.buffers) else {
            assert!(
                n > free,
                "{n} buffers found no room among {free} descriptors"
            );
            self.cells.append(&mut chain.cells);
            return false;
        };
        assert!(descs <= free && id < self.setup.size);
        let taken = std::mem::replace(&mut self.ids[usize::from(id)], true);
        assert!(!taken, "id {id} is not free");
        self.descs += descs;
        chain.descs = descs;
        chain.id = id;
        self.added += 1;
        self.staged.push_back(chain);
        true
    }

    pub(crate) fn free(&self) -> usize {
        self.driver.free()
    }

    fn publish_available(&mut self) {
        let moved: u64 = self.staged.iter().map(|c| self.positions(c)).sum();
        let (old, new) = (self.driver_at, self.driver_at + moved);
        let due = self.setup.kick_is_due(&self.ram, old, new);
        let kick = self.driver.publish();
        assert_eq!(kick, due, "kick from {old} to {new}");
        if moved > 0 {
            assert!(kick || !self.device_sleeps, "the device sleeps for ever");
            self.device_sleeps = false;
        }
        self.driver_at = new;
        self.available.append(&mut self.staged);
    }

    fn take(&mut self, max: usize) {
        let expected = max.min(self.available.len()).min(self.device.room());
        let n = self.device.take(self.access, max);
        assert_eq!(n, expected);
        let first = self.taken.len();
        self.taken.extend(self.available.drain(..n));
        assert_eq!(self.device.held(), self.taken.len());
        for (i, chain) in self.taken.iter().enumerate().skip(first) {
            let buffers = chain.buffers.iter().filter(|b| b.len > 0);
            let expected: Vec<(u64, u32)> = buffers.map(|b| (b.addr.0, b.len)).collect();
            assert_eq!(self.device.buffers(i), expected, "buffers of chain {i}");
            if self.access == Access::Read {
                let bytes = expected
                    .iter()
                    .flat_map(|&(addr, len)| self.ram.read(addr, len as usize));
                assert!(bytes.eq(chain.content()), "bytes of chain {i}");
            }
        }
    }

    fn untake(&mut self, n: usize) {
        let n = n.min(self.taken.len());
        if self.device.untake(n) {
            let at = self.taken.len() - n;
            for chain in self.taken.drain(at..).rev() {
                self.available.push_front(chain);
            }
        }
        assert_eq!(self.device.held(), self.taken.len());
    }

    /// Writes the first `len` bytes of a chain as the device.
    fn fill(&self, i: usize, len: u32) {
        let mut content = self.taken[i].content().take(len as usize);
        for (addr, len) in self.device.buffers(i) {
            let bytes: Vec<u8> = content.by_ref().take(len as usize).collect();
            if !bytes.is_empty() {
                self.ram.write(addr, &bytes);
            }
        }
    }

    fn give(&mut self, n: usize) {
        for _ in 0..n.min(self.taken.len()) {
            let i = if self.device.any_order() {
                self.random.below(self.taken.len())
            } else {
                0
            };
            let len = match self.access {
                Access::Read | Access::Request => 0,
                Access::Write => self.random.below(self.taken[i].bytes() as usize + 1) as u32,
            };
            self.fill(i, len);
            self.device.give(i, len);
            let chain = self.taken.remove(i);
            self.given.push((chain, len));
        }
    }

    /// One used element for several chains: all but the last were used completely.
    fn give_batch(&mut self, n: usize) {
        let Some(n) = self.device.batch(n.min(self.taken.len()), self.access) else {
            return;
        };
        let mut lens = Vec::new();
        for i in 0..n {
            let bytes = self.taken[i].bytes();
            let len = match self.access {
                Access::Read | Access::Request => 0,
                Access::Write if i + 1 < n => bytes,
                Access::Write => self.random.below(bytes as usize + 1) as u32,
            };
            self.fill(i, len);
            lens.push(len);
        }
        self.device.give_batch(n, lens[n - 1]);
        self.given.extend(self.taken.drain(..n).zip(lens));
    }

    fn publish_used(&mut self) {
        let moved: u64 = self.given.iter().map(|(c, _)| self.positions(c)).sum();
        let (old, new) = (self.device_at, self.device_at + moved);
        let due = self.setup.call_is_due(&self.ram, old, new);
        let call = self.device.publish();
        let may_call = moved > 0
            && (std::mem::take(&mut self.just_started) || !self.device.knows_suppression());
        assert!(
            call == due || (call && may_call),
            "call from {old} to {new}: {call}"
        );
        if moved > 0 {
            assert!(call || !self.driver_sleeps, "the driver sleeps for ever");
            self.driver_sleeps = false;
        }
        self.device_at = new;
        self.used.extend(self.given.drain(..));
    }

    fn reap(&mut self, max: usize) {
        let found = self.driver.reap(max);
        let expected = max.min(self.used.len());
        assert!(
            found.len() >= expected,
            "reaped {} of {expected}",
            found.len()
        );
        for used in found {
            let (chain, len) = self.used.pop_front().unwrap();
            assert_eq!(used, Used { id: chain.id, len });
            self.check_written(&chain, len);
            self.ids[usize::from(chain.id)] = false;
            self.descs -= chain.descs;
            self.cells.extend(chain.cells);
            self.finished += 1;
        }
    }

    /// What was written stands in the buffers, in order; everything else is as it was.
    fn check_written(&self, chain: &Chain, len: u32) {
        let mut content = chain.content().take(match self.access {
            Access::Read | Access::Request => chain.bytes() as usize,
            Access::Write => len as usize,
        });
        for (buffer, &cell) in chain.buffers.iter().zip(&chain.cells) {
            let start = (buffer.addr.0 - cell) as usize;
            for (k, byte) in self.ram.read(cell, CELL as usize).into_iter().enumerate() {
                let inside = (start..start + buffer.len as usize).contains(&k);
                let expected = inside.then(|| content.next()).flatten();
                assert_eq!(byte, expected.unwrap_or(POISON), "byte {k} at {cell:#x}");
            }
        }
    }

    /// Stops the device where it is and starts it again.
    fn restart(&mut self) {
        let n = self.taken.len();
        self.untake(n);
        self.give(n);
        self.publish_used();
        self.device.restart();
        self.just_started = true;
    }

    fn check_work(&self) {
        assert_eq!(self.device.has_work(), !self.available.is_empty());
        assert_eq!(self.driver.has_work(), !self.used.is_empty());
    }

    /// Lets everything on its way arrive.
    pub(crate) fn finish(&mut self) {
        self.step(Step::PublishAvailable);
        while self.descs > 0 {
            for step in [
                Step::Take(64),
                Step::Give(64),
                Step::PublishUsed,
                Step::Reap(64),
            ] {
                self.step(step);
            }
        }
        assert_eq!(self.finished, self.added);
        assert_eq!(self.driver.free(), usize::from(self.setup.size));
    }
}
