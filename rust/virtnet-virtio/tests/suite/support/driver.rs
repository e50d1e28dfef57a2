//! Drivers under test and beside it: ours, and a naive one written from the specification.

use std::collections::VecDeque;

use virtnet_virtio::{DriverBuffer, DriverQueue, Used};

use super::{Ram, Random, Setup};

/// Buffer continues in the next descriptor.
pub(crate) const NEXT: u16 = 1;
/// Buffer is device-writable.
pub(crate) const WRITE: u16 = 2;
/// Buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// The driver side of a queue, as the model uses it.
pub(crate) trait Driver {
    /// Descriptors that are free.
    fn free(&self) -> usize;
    /// Descriptors that a chain of `n` buffers takes, and its id; `None` when they are short.
    fn add(&mut self, buffers: &[DriverBuffer]) -> Option<(usize, u16)>;
    fn publish(&mut self) -> bool;
    fn reap(&mut self, max: usize) -> Vec<Used>;
    fn has_work(&self) -> bool;
    fn arm(&mut self) -> bool;
    fn disarm(&mut self);
}

impl Driver for DriverQueue {
    fn free(&self) -> usize {
        Self::free(self)
    }

    fn add(&mut self, buffers: &[DriverBuffer]) -> Option<(usize, u16)> {
        Self::add(self, buffers).map(|id| (buffers.len(), id))
    }

    fn publish(&mut self) -> bool {
        Self::publish(self)
    }

    fn reap(&mut self, max: usize) -> Vec<Used> {
        let mut used = vec![Used::default(); max];
        let n = Self::reap(self, &mut used).unwrap();
        used.truncate(n);
        used
    }

    fn has_work(&self) -> bool {
        Self::has_work(self)
    }

    fn arm(&mut self) -> bool {
        Self::arm(self)
    }

    fn disarm(&mut self) {
        Self::disarm(self);
    }
}

/// What stands in a descriptor: the fourth field is `next` in a split table and the buffer id in a packed ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) fourth: u16,
}

impl Desc {
    pub(crate) fn new(addr: u64, len: u32, flags: u16, fourth: u16) -> Self {
        Self {
            addr,
            len,
            flags,
            fourth,
        }
    }

    /// Writes it as entry `index` of the table at `table`, in either format.
    pub(crate) fn write(self, ram: &Ram, table: u64, index: u64, packed: bool) {
        let at = table + 16 * index;
        let (third, fourth) = if packed {
            (self.fourth, self.flags)
        } else {
            (self.flags, self.fourth)
        };
        ram.set_u64(at, self.addr);
        ram.set_u32(at + 8, self.len);
        ram.set_u16(at + 12, third);
        ram.set_u16(at + 14, fourth);
    }
}

/// Entries of an indirect table that the naive driver makes.
const TABLE: usize = 8;

/// A driver that counts in 64 bits, looks at every position, and uses indirect tables wherever it likes.
#[derive(Debug)]
pub(crate) struct NaiveDriver {
    setup: Setup,
    ram: Ram,
    /// Where indirect tables go: one for each descriptor.
    tables: u64,
    random: Random,
    indirect: bool,
    /// Free descriptors (split) or buffer ids (packed).
    free: Vec<u16>,
    free_slots: usize,
    /// Positions made available, and those of them that the device has been told.
    added: u64,
    published: u64,
    /// Positions taken back.
    reaped: u64,
    held: VecDeque<Held>,
    /// Packed: descriptors to be written when published, the first one last.
    staged: Vec<(u64, Desc)>,
}

#[derive(Debug)]
struct Held {
    id: u16,
    descs: Vec<u16>,
    slots: u64,
    writable: u32,
}

impl NaiveDriver {
    /// Bytes of its tables.
    pub(crate) fn table_bytes(setup: &Setup) -> u64 {
        16 * TABLE as u64 * u64::from(setup.size)
    }

    /// A driver that stands where `setup` starts, with its tables at `tables`.
    pub(crate) fn new(setup: Setup, ram: &Ram, tables: u64, indirect: bool) -> Self {
        if setup.is_packed() {
            // What the last lap left: used descriptors.
            let size = u64::from(setup.size);
            for at in setup.start.saturating_sub(size)..setup.start {
                let used = if setup.bits(at) & 0x8000 != 0 {
                    0x8080
                } else {
                    0
                };
                Desc::new(0, 0, used, 0).write(ram, setup.desc(), at % size, true);
            }
        } else {
            ram.set_u16(setup.driver_area() + 2, setup.start as u16);
            ram.set_u16(setup.device_area() + 2, setup.start as u16);
        }
        Self {
            setup,
            ram: ram.clone(),
            tables,
            random: Random::new(setup.start),
            indirect,
            free: (0..setup.size).collect(),
            free_slots: usize::from(setup.size),
            added: setup.start,
            published: setup.start,
            reaped: setup.start,
            held: VecDeque::new(),
            staged: Vec::new(),
        }
    }

    /// Writes a table of `buffers` for the chain with descriptor or id `id`; the descriptor that points at it. Every field that
    /// the device is to ignore holds something.
    fn table(&mut self, id: u16, buffers: &[DriverBuffer]) -> Desc {
        let packed = self.setup.is_packed();
        let table = self.tables + 16 * TABLE as u64 * u64::from(id);
        // Split entries are linked, so they may stand in any order behind the first.
        let mut places: Vec<u16> = (0..buffers.len() as u16).collect();
        if !packed && buffers.len() > 2 {
            let k = self.random.below(buffers.len() - 1);
            places[1..].rotate_left(k);
        }
        for (k, buffer) in buffers.iter().enumerate() {
            let write = if buffer.writable { WRITE } else { 0 };
            let desc = match places.get(k + 1) {
                _ if packed => Desc::new(
                    buffer.addr.0,
                    buffer.len,
                    write | self.random.next() as u16 & !WRITE,
                    self.random.next() as u16,
                ),
                Some(&next) => Desc::new(buffer.addr.0, buffer.len, write | NEXT, next),
                None => Desc::new(buffer.addr.0, buffer.len, write, 0xffff),
            };
            desc.write(&self.ram, table, u64::from(places[k]), packed);
        }
        let write = if self.random.below(2) == 0 { WRITE } else { 0 };
        Desc::new(table, 16 * buffers.len() as u32, INDIRECT | write, 0xffff)
    }

    fn add_split(&mut self, buffers: &[DriverBuffer], direct: usize, n: usize) -> u16 {
        let descs: Vec<u16> = (0..n)
            .map(|_| self.free.swap_remove(self.random.below(self.free.len())))
            .collect();
        for (k, &at) in descs.iter().enumerate() {
            let mut desc = match buffers.get(k) {
                Some(buffer) if k < direct => {
                    let write = if buffer.writable { WRITE } else { 0 };
                    Desc::new(buffer.addr.0, buffer.len, write, 0xffff)
                }
                _ => self.table(at, &buffers[direct..]),
            };
            if let Some(&next) = descs.get(k + 1) {
                desc.flags |= NEXT;
                desc.fourth = next;
            }
            desc.write(&self.ram, self.setup.desc(), u64::from(at), false);
        }
        let head = descs[0];
        let slot = self.added % u64::from(self.setup.size);
        self.ram
            .set_u16(self.setup.driver_area() + 4 + 2 * slot, head);
        self.added += 1;
        self.hold(head, descs, 1, buffers);
        head
    }

    fn add_packed(&mut self, buffers: &[DriverBuffer], indirect: bool, n: usize) -> u16 {
        let id = self.free.swap_remove(self.random.below(self.free.len()));
        for k in 0..n {
            let mut desc = if indirect {
                self.table(id, buffers)
            } else {
                let write = if buffers[k].writable { WRITE } else { 0 };
                Desc::new(buffers[k].addr.0, buffers[k].len, write, 0)
            };
            // Only the last descriptor's id counts.
            desc.fourth = if k + 1 == n { id } else { 0xdead };
            if k + 1 < n {
                desc.flags |= NEXT;
            }
            desc.flags |= if self.setup.bits(self.added) & 0x8000 != 0 {
                1 << 7
            } else {
                1 << 15
            };
            self.staged.push((self.added, desc));
            self.added += 1;
        }
        self.hold(id, vec![id], n as u64, buffers);
        id
    }

    fn hold(&mut self, id: u16, descs: Vec<u16>, slots: u64, buffers: &[DriverBuffer]) {
        let writable = buffers.iter().filter(|b| b.writable).map(|b| b.len).sum();
        self.held.push_back(Held {
            id,
            descs,
            slots,
            writable,
        });
    }

    /// The used element at the place where the next one is expected.
    fn element(&self) -> Option<(u16, u32)> {
        let (setup, ram) = (&self.setup, &self.ram);
        let slot = self.reaped % u64::from(setup.size);
        if setup.is_packed() {
            let at = setup.desc() + 16 * slot;
            let flags = ram.u16(at + 14);
            let wrap = setup.bits(self.reaped) & 0x8000 != 0;
            let used = (flags & 1 << 7 != 0) == wrap && (flags & 1 << 15 != 0) == wrap;
            let len = ram.u32(at + 8);
            // A used descriptor says nothing but who it is, and whether something was written.
            let rest = flags & (NEXT | INDIRECT | WRITE);
            let written = if len > 0 { WRITE } else { 0 };
            assert!(!used || rest == written, "flags {flags:#x}, {len} bytes");
            return used.then(|| (ram.u16(at + 12), len));
        }
        let at = setup.device_area() + 4 + 8 * slot;
        let ready = ram.u16(setup.device_area() + 2) != self.reaped as u16;
        ready.then(|| (u16::try_from(ram.u32(at)).unwrap(), ram.u32(at + 4)))
    }

    fn take_back(&mut self, at: usize) -> Held {
        let held = self.held.remove(at).unwrap();
        self.reaped += held.slots;
        self.free.extend(&held.descs);
        self.free_slots += if self.setup.is_packed() {
            held.slots as usize
        } else {
            held.descs.len()
        };
        held
    }
}

impl Driver for NaiveDriver {
    fn free(&self) -> usize {
        self.free_slots
    }

    fn add(&mut self, buffers: &[DriverBuffer]) -> Option<(usize, u16)> {
        let packed = self.setup.is_packed();
        let mut direct = buffers.len();
        if self.indirect && buffers.len() <= TABLE.min(usize::from(self.setup.size)) {
            // None of them indirect, all, or (split only) those behind the first few.
            direct = match self.random.below(3) {
                0 => buffers.len(),
                1 => 0,
                _ if packed => 0,
                _ => self.random.below(buffers.len()),
            };
        }
        let n = if direct == buffers.len() {
            direct
        } else {
            direct + 1
        };
        if buffers.is_empty() || n > self.free_slots {
            return None;
        }
        self.free_slots -= n;
        let id = if packed {
            self.add_packed(buffers, direct == 0, n)
        } else {
            self.add_split(buffers, direct, n)
        };
        Some((n, id))
    }

    fn publish(&mut self) -> bool {
        let (setup, ram) = (self.setup, self.ram.clone());
        for (at, desc) in self.staged.drain(..).rev() {
            desc.write(&ram, setup.desc(), at % u64::from(setup.size), true);
        }
        if !setup.is_packed() {
            ram.set_u16(setup.driver_area() + 2, self.added as u16);
        }
        let old = std::mem::replace(&mut self.published, self.added);
        setup.kick_is_due(&ram, old, self.added)
    }

    fn reap(&mut self, max: usize) -> Vec<Used> {
        let mut used = Vec::new();
        while used.len() < max {
            let Some((id, len)) = self.element() else {
                break;
            };
            let place = self.held.iter().position(|held| held.id == id);
            let place = place.unwrap_or_else(|| panic!("the device does not hold {id}"));
            if self.setup.in_order {
                // One element may stand for several chains: those before the one it names were used completely.
                for _ in 0..place {
                    let skipped = self.take_back(0);
                    used.push(Used {
                        id: skipped.id,
                        len: skipped.writable,
                    });
                }
                self.take_back(0);
            } else {
                self.take_back(place);
            }
            used.push(Used { id, len });
        }
        used
    }

    fn has_work(&self) -> bool {
        self.element().is_some()
    }

    fn arm(&mut self) -> bool {
        let (setup, ram) = (&self.setup, &self.ram);
        let area = setup.driver_area();
        if setup.is_packed() {
            ram.set_u16(area, setup.bits(self.reaped));
            ram.set_u16(area + 2, if setup.event_idx { 2 } else { 0 });
        } else if setup.event_idx {
            ram.set_u16(area + 4 + 2 * u64::from(setup.size), self.reaped as u16);
        } else {
            ram.set_u16(area, 0);
        }
        self.has_work()
    }

    fn disarm(&mut self) {
        let area = self.setup.driver_area();
        if self.setup.is_packed() {
            self.ram.set_u16(area + 2, 1);
        } else if !self.setup.event_idx {
            self.ram.set_u16(area, 1);
        }
    }
}
