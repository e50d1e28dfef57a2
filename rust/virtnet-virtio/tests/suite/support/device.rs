//! Devices under test and beside it: ours, and a naive one written from the specification.

use virtnet_virtio::{Access, Chains, DeviceQueue, QueueConfig};

use super::driver::{INDIRECT, NEXT, WRITE};
use super::{Ram, Setup};

/// The device side of a queue, as the model uses it. Chains that it holds are numbered from the oldest.
pub(crate) trait Device {
    /// Takes up to `max` chains; how many.
    fn take(&mut self, access: Access, max: usize) -> usize;
    fn held(&self) -> usize;
    /// Chains that it can take before it has to give some back.
    fn room(&self) -> usize;
    /// Whether chains can be given back in any order.
    fn any_order(&self) -> bool;
    /// Whether it calls only when the driver wants that.
    fn knows_suppression(&self) -> bool {
        true
    }
    /// Address and length of the buffers of chain `i`.
    fn buffers(&self, i: usize) -> Vec<(u64, u32)>;
    fn give(&mut self, i: usize, len: u32);
    /// How many chains it would give back at once if it were asked for `n`; `None` if it cannot now.
    fn batch(&self, n: usize, access: Access) -> Option<usize>;
    /// Gives so many of the oldest chains back, with one element where the driver expects that.
    fn give_batch(&mut self, n: usize, last_len: u32);
    /// Puts the last `n` chains back; false when it cannot.
    fn untake(&mut self, n: usize) -> bool;
    fn publish(&mut self) -> bool;
    fn has_work(&self) -> bool;
    fn arm(&mut self) -> bool;
    fn disarm(&mut self);
    /// Stops and starts again from its base; it holds nothing.
    fn restart(&mut self);
}

/// Our device with the chains it holds.
#[derive(Debug)]
pub(crate) struct OurDevice {
    queue: DeviceQueue,
    ram: Ram,
    config: QueueConfig,
    chains: Chains,
    given: usize,
}

impl OurDevice {
    pub(crate) fn new(setup: &Setup, ram: &Ram) -> Self {
        let config = setup.config();
        Self {
            queue: DeviceQueue::new(&config, &ram.0).unwrap(),
            ram: ram.clone(),
            config,
            chains: Chains::new(),
            given: 0,
        }
    }

    fn forget_given(&mut self) {
        if self.given == self.chains.len() {
            self.chains.clear();
            self.given = 0;
        }
    }
}

impl Device for OurDevice {
    fn take(&mut self, access: Access, max: usize) -> usize {
        let before = self.chains.len();
        let n = self
            .queue
            .take(&self.ram.0, access, max, &mut self.chains)
            .unwrap();
        assert_eq!(self.chains.len(), before + n);
        n
    }

    fn held(&self) -> usize {
        self.chains.len() - self.given
    }

    fn room(&self) -> usize {
        self.chains.room()
    }

    fn any_order(&self) -> bool {
        false
    }

    fn buffers(&self, i: usize) -> Vec<(u64, u32)> {
        let i = self.given + i;
        let segments = self.chains.segments(i);
        let sum: u32 = segments.iter().map(|s| s.len).sum();
        assert_eq!(self.chains.bytes(i), Ok(sum));
        let start = |region: u32| self.ram.0.regions()[region as usize].guest().0;
        segments
            .iter()
            .map(|s| (start(s.region) + s.offset as u64, s.len))
            .collect()
    }

    fn give(&mut self, i: usize, len: u32) {
        assert_eq!(i, 0, "chains are given in order");
        self.queue.give(&self.chains, self.given, &[len]);
        self.given += 1;
        self.forget_given();
    }

    /// All that it holds, with nothing written.
    fn batch(&self, _n: usize, access: Access) -> Option<usize> {
        let all = self.held();
        (self.given == 0 && all > 0 && access == Access::Read).then_some(all)
    }

    fn give_batch(&mut self, n: usize, last_len: u32) {
        assert_eq!((n, last_len, self.given), (self.chains.len(), 0, 0));
        self.queue.give_all(&self.chains);
        self.given = n;
        self.forget_given();
    }

    fn untake(&mut self, n: usize) -> bool {
        self.queue.untake(n, &mut self.chains);
        self.forget_given();
        true
    }

    fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    fn has_work(&self) -> bool {
        self.queue.has_work()
    }

    fn arm(&mut self) -> bool {
        self.queue.arm()
    }

    fn disarm(&mut self) {
        self.queue.disarm();
    }

    fn restart(&mut self) {
        self.config.base = self.queue.base();
        self.queue = DeviceQueue::new(&self.config, &self.ram.0).unwrap();
    }
}

/// A device that counts in 64 bits and gives back in any order.
#[derive(Debug)]
pub(crate) struct NaiveDevice {
    setup: Setup,
    ram: Ram,
    held: Vec<Held>,
    /// Positions taken, written as used, and shown to the driver as used.
    taken: u64,
    used: u64,
    published: u64,
    /// Packed: used descriptors (place, id, length) to be written when published, the first one last.
    staged: Vec<(u64, u16, u32)>,
}

#[derive(Clone, Debug)]
struct Held {
    id: u16,
    slots: u64,
    buffers: Vec<(u64, u32)>,
}

impl NaiveDevice {
    pub(crate) fn new(setup: Setup, ram: &Ram) -> Self {
        Self {
            setup,
            ram: ram.clone(),
            held: Vec::new(),
            taken: setup.start,
            used: setup.start,
            published: setup.start,
            staged: Vec::new(),
        }
    }

    /// Address, length, third and fourth field of entry `index` of the descriptor area.
    fn desc(&self, index: u64) -> (u64, u32, u16, u16) {
        let at = self.setup.desc() + 16 * index;
        let ram = &self.ram;
        (
            ram.u64(at),
            ram.u32(at + 8),
            ram.u16(at + 12),
            ram.u16(at + 14),
        )
    }

    fn next_chain(&mut self, access: Access) -> Held {
        let size = u64::from(self.setup.size);
        let slot = self.taken % size;
        let mut buffers = Vec::new();
        let mut push = |addr, len, flags: u16| {
            assert_eq!(flags & WRITE != 0, access == Access::Write);
            assert_eq!(flags & INDIRECT, 0, "our driver makes no tables");
            if len > 0 {
                buffers.push((addr, len));
            }
        };
        if self.setup.is_packed() {
            let mut slots = 0;
            loop {
                let (addr, len, id, flags) = self.desc((slot + slots) % size);
                assert!(self.is_available(self.taken + slots, flags), "half a chain");
                push(addr, len, flags);
                slots += 1;
                if flags & NEXT == 0 {
                    return Held { id, slots, buffers };
                }
            }
        }
        let head = self.ram.u16(self.setup.driver_area() + 4 + 2 * slot);
        let mut at = head;
        loop {
            let (addr, len, flags, next) = self.desc(u64::from(at));
            push(addr, len, flags);
            if flags & NEXT == 0 {
                return Held {
                    id: head,
                    slots: 1,
                    buffers,
                };
            }
            at = next;
        }
    }

    fn is_available(&self, at: u64, flags: u16) -> bool {
        let wrap = self.setup.bits(at) & 0x8000 != 0;
        (flags & 1 << 7 != 0) == wrap && (flags & 1 << 15 != 0) != wrap
    }

    fn write_used(&mut self, id: u16, len: u32, slots: u64) {
        if self.setup.is_packed() {
            self.staged.push((self.used, id, len));
        } else {
            let slot = self.used % u64::from(self.setup.size);
            let at = self.setup.device_area() + 4 + 8 * slot;
            self.ram.set_u32(at, u32::from(id));
            self.ram.set_u32(at + 4, len);
        }
        self.used += slots;
    }
}

impl Device for NaiveDevice {
    fn take(&mut self, access: Access, max: usize) -> usize {
        let before = self.held.len();
        while self.held.len() < before + max && self.has_work() {
            let chain = self.next_chain(access);
            self.taken += chain.slots;
            self.held.push(chain);
        }
        self.held.len() - before
    }

    fn held(&self) -> usize {
        self.held.len()
    }

    fn room(&self) -> usize {
        usize::MAX
    }

    fn any_order(&self) -> bool {
        !self.setup.in_order
    }

    fn buffers(&self, i: usize) -> Vec<(u64, u32)> {
        self.held[i].buffers.clone()
    }

    fn give(&mut self, i: usize, len: u32) {
        let chain = self.held.remove(i);
        self.write_used(chain.id, len, chain.slots);
    }

    fn batch(&self, n: usize, _access: Access) -> Option<usize> {
        (self.setup.in_order && n > 0).then_some(n)
    }

    fn give_batch(&mut self, n: usize, last_len: u32) {
        let batch: Vec<Held> = self.held.drain(..n).collect();
        let slots = batch.iter().map(|chain| chain.slots).sum();
        self.write_used(batch.last().unwrap().id, last_len, slots);
    }

    fn untake(&mut self, _n: usize) -> bool {
        false
    }

    fn publish(&mut self) -> bool {
        let (setup, ram) = (self.setup, self.ram.clone());
        for (at, id, len) in self.staged.drain(..).rev() {
            let desc = setup.desc() + 16 * (at % u64::from(setup.size));
            let wrap = setup.bits(at) & 0x8000 != 0;
            let written = if len > 0 { WRITE } else { 0 };
            ram.set_u32(desc + 8, len);
            ram.set_u16(desc + 12, id);
            ram.set_u16(desc + 14, written | if wrap { 0x8080 } else { 0 });
        }
        if !setup.is_packed() {
            ram.set_u16(setup.device_area() + 2, self.used as u16);
        }
        let old = std::mem::replace(&mut self.published, self.used);
        setup.call_is_due(&ram, old, self.used)
    }

    fn has_work(&self) -> bool {
        if self.setup.is_packed() {
            let flags = self.desc(self.taken % u64::from(self.setup.size)).3;
            return self.is_available(self.taken, flags);
        }
        self.ram.u16(self.setup.driver_area() + 2) != self.taken as u16
    }

    fn arm(&mut self) -> bool {
        let (setup, ram) = (&self.setup, &self.ram);
        let area = setup.device_area();
        if setup.is_packed() {
            ram.set_u16(area, setup.bits(self.taken));
            ram.set_u16(area + 2, if setup.event_idx { 2 } else { 0 });
        } else if setup.event_idx {
            ram.set_u16(area + 4 + 8 * u64::from(setup.size), self.taken as u16);
        } else {
            ram.set_u16(area, 0);
        }
        self.has_work()
    }

    fn disarm(&mut self) {
        let area = self.setup.device_area();
        if self.setup.is_packed() {
            self.ram.set_u16(area + 2, 1);
        } else if !self.setup.event_idx {
            self.ram.set_u16(area, 1);
        }
    }

    fn restart(&mut self) {}
}
