//! A split virtqueue, written by hand. Spec: virtio 1.4, 2.7.

use std::collections::VecDeque;

use virtnet_mem::GuestAddr;
use virtnet_virtio::{Features, QueueConfig};

use super::{Attack, Buffer, Calls, Expect, FakeGuest, GuestQueue, RawDescriptor, Returned};

/// A split virtqueue of a [`FakeGuest`].
#[derive(Debug)]
pub struct SplitQueue {
    pub(super) size: u16,
    table: u64,
    avail: u64,
    used: u64,
    in_order: bool,
    event_idx: bool,
    /// Next available index to write; free-running.
    pub(super) avail_index: u16,
    /// Available index up to which the device's wish to be kicked has been asked for.
    asked: u16,
    /// Next used index to read; free-running.
    used_index: u16,
    /// Free descriptors, in the order in which they are taken.
    free: VecDeque<u16>,
    /// Chains that the device holds, in the order in which they were made available.
    held: VecDeque<Held>,
}

#[derive(Debug)]
struct Held {
    head: u16,
    descriptors: Vec<u16>,
    buffers: Vec<Buffer>,
}

impl SplitQueue {
    /// Lays out a queue of `size` entries, each area at an address that is aligned as it must be and no better.
    ///
    /// Of `features`, EVENT_IDX and IN_ORDER matter here.
    ///
    /// # Panics
    /// When `size` is no power of two, or memory is short.
    pub fn new(guest: &mut FakeGuest, size: u16, features: Features) -> Self {
        assert!(size.is_power_of_two(), "a split queue of {size} entries");
        let entries = u64::from(size);
        let table = guest.alloc(16 * entries, 16).0;
        let avail = guest.alloc(4 + 2 * entries + 2, 2).0;
        let used = guest.alloc(4 + 8 * entries + 2, 4).0;
        guest.device_may_write(used..used + 4 + 8 * entries + 2);
        let in_order = features.contains(Features::IN_ORDER);
        // Descriptors of a chain are neither neighbours nor in order, unless they have to be.
        let index = |i: u16| {
            if in_order {
                i
            } else {
                i.wrapping_mul(5).wrapping_add(3) % size
            }
        };
        Self {
            size,
            table,
            avail,
            used,
            in_order,
            event_idx: features.contains(Features::EVENT_IDX),
            avail_index: 0,
            asked: 0,
            used_index: 0,
            free: (0..size).map(index).collect(),
            held: VecDeque::new(),
        }
    }

    /// Writes a descriptor of the table.
    pub fn write_descriptor(&mut self, guest: &mut FakeGuest, index: u16, raw: RawDescriptor) {
        let addr = GuestAddr(self.table + 16 * u64::from(index));
        guest.write(addr, &raw.split_bytes());
    }

    /// Writes the next entry of the available ring, without showing it.
    pub fn write_avail(&mut self, guest: &mut FakeGuest, head: u16) {
        let slot = u64::from(self.avail_index % self.size);
        guest.write_u16(self.avail + 4 + 2 * slot, head);
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Writes the available index.
    pub fn write_avail_index(&mut self, guest: &mut FakeGuest, index: u16) {
        guest.barrier();
        guest.write_u16(self.avail + 2, index);
        guest.barrier();
    }

    /// The available index that follows what was made available.
    #[must_use]
    pub fn avail_index(&self) -> u16 {
        self.avail_index
    }

    /// The used index, as the device has written it.
    #[must_use]
    pub fn used_index(&self, guest: &FakeGuest) -> u16 {
        guest.barrier();
        guest.read_u16(self.used + 2)
    }

    /// Takes `n` descriptors.
    #[track_caller]
    pub(super) fn take_free(&mut self, n: usize) -> Vec<u16> {
        assert!(
            (1..=self.free.len()).contains(&n),
            "a chain of {n} descriptors, {} are free",
            self.free.len()
        );
        self.free.drain(..n).collect()
    }

    /// Makes a chain available whose descriptors have been written.
    pub(super) fn make_available(
        &mut self,
        guest: &mut FakeGuest,
        descriptors: Vec<u16>,
        buffers: Vec<Buffer>,
    ) -> u16 {
        guest.lend(&buffers);
        let head = descriptors[0];
        self.held.push_back(Held {
            head,
            descriptors,
            buffers,
        });
        self.write_avail(guest, head);
        self.write_avail_index(guest, self.avail_index);
        head
    }

    /// Writes descriptors that are chained in this order.
    fn write_chain(&mut self, guest: &mut FakeGuest, indexes: &[u16], raws: &[RawDescriptor]) {
        for (i, (&index, &raw)) in indexes.iter().zip(raws).enumerate() {
            let next = indexes.get(i + 1);
            let raw = RawDescriptor {
                flags: raw.flags | next.map_or(0, |_| RawDescriptor::NEXT),
                // What no device may look at is no valid index.
                next_or_id: next.copied().unwrap_or(0xbeef),
                ..raw
            };
            self.write_descriptor(guest, index, raw);
        }
    }

    /// Takes the chain out that the device returned as `id`, and those that this returns with it.
    #[track_caller]
    fn take_held(&mut self, id: u32) -> Vec<Held> {
        let named = self.held.iter().position(|held| u32::from(held.head) == id);
        let named =
            named.unwrap_or_else(|| panic!("the device returned {id}, which it does not hold"));
        if self.in_order {
            // Spec: virtio 1.4, 2.7.9: the id of the last one of a batch stands for the whole batch.
            self.held.drain(..=named).collect()
        } else {
            self.held.remove(named).into_iter().collect()
        }
    }
}

impl GuestQueue for SplitQueue {
    fn config(&self, guest: &FakeGuest, features: Features) -> QueueConfig {
        QueueConfig {
            size: self.size,
            desc_area: guest.user_addr(GuestAddr(self.table)),
            driver_area: guest.user_addr(GuestAddr(self.avail)),
            device_area: guest.user_addr(GuestAddr(self.used)),
            base: u32::from(self.used_index),
            features,
        }
    }

    #[track_caller]
    fn offer(&mut self, guest: &mut FakeGuest, buffers: &[Buffer]) -> u16 {
        let descriptors = self.take_free(buffers.len());
        let raws: Vec<_> = buffers.iter().copied().map(RawDescriptor::of).collect();
        self.write_chain(guest, &descriptors, &raws);
        self.make_available(guest, descriptors, buffers.to_vec())
    }

    #[track_caller]
    fn offer_indirect(&mut self, guest: &mut FakeGuest, buffers: &[Buffer]) -> u16 {
        let n = u16::try_from(buffers.len()).expect("few buffers");
        let mut table = Vec::new();
        for (i, &buffer) in (1..).zip(buffers) {
            let more = i < n;
            let raw = RawDescriptor::of(buffer);
            let raw = RawDescriptor {
                flags: raw.flags | if more { RawDescriptor::NEXT } else { 0 },
                next_or_id: if more { i } else { 0xbeef },
                ..raw
            };
            table.extend(raw.split_bytes());
        }
        let table = guest.readable(&table);
        let raw = RawDescriptor {
            flags: RawDescriptor::INDIRECT,
            ..RawDescriptor::of(table)
        };
        let descriptors = self.take_free(1);
        self.write_chain(guest, &descriptors, &[raw]);
        let buffers = [buffers, &[table]].concat();
        self.make_available(guest, descriptors, buffers)
    }

    fn attack(&mut self, guest: &mut FakeGuest, attack: Attack, writable: bool) -> Option<Expect> {
        attack.on_split(guest, self, writable)
    }

    #[track_caller]
    fn collect(&mut self, guest: &mut FakeGuest) -> Vec<Returned> {
        let index = self.used_index(guest);
        let ahead = usize::from(index.wrapping_sub(self.used_index));
        assert!(
            ahead <= self.held.len(),
            "the used index is {ahead} ahead, and the device holds {} chains",
            self.held.len()
        );
        let mut returned = Vec::new();
        while returned.len() < ahead {
            let slot = u64::from(self.used_index % self.size);
            let element = self.used + 4 + 8 * slot;
            let (id, len) = (guest.read_u32(element), guest.read_u32(element + 4));
            let chains = self.take_held(id);
            let last = chains.len() - 1;
            for (i, held) in chains.into_iter().enumerate() {
                // Of a batch, only the length of the last is told.
                let len = if i == last { len } else { 0 };
                let bytes = guest.settle(&held.buffers, len);
                self.free.extend(held.descriptors);
                self.used_index = self.used_index.wrapping_add(1);
                returned.push(Returned {
                    id: held.head,
                    len,
                    bytes,
                });
            }
        }
        assert_eq!(returned.len(), ahead, "a batch passes the used index");
        guest.check();
        returned
    }

    fn take_kick(&mut self, guest: &FakeGuest) -> bool {
        guest.barrier();
        let since = std::mem::replace(&mut self.asked, self.avail_index);
        if !self.event_idx {
            return since != self.avail_index && guest.read_u16(self.used) & 1 == 0;
        }
        let event = guest.read_u16(self.used + 4 + 8 * u64::from(self.size));
        let mut passed = since;
        while passed != self.avail_index {
            if passed == event {
                return true;
            }
            passed = passed.wrapping_add(1);
        }
        false
    }

    fn set_calls(&mut self, guest: &mut FakeGuest, calls: Calls) {
        let event = self.avail + 4 + 2 * u64::from(self.size);
        match calls {
            Calls::At(index) => guest.write_u16(event, index),
            // With EVENT_IDX there is neither; the next one, and one that is a lap behind, come close.
            Calls::Always if self.event_idx => guest.write_u16(event, self.used_index),
            Calls::Never if self.event_idx => {
                guest.write_u16(event, self.used_index.wrapping_sub(1));
            }
            Calls::Always => guest.write_u16(self.avail, 0),
            Calls::Never => guest.write_u16(self.avail, 1),
        }
        guest.barrier();
    }

    fn free(&self) -> usize {
        self.free.len()
    }

    fn outstanding(&self) -> usize {
        self.held.len()
    }
}
