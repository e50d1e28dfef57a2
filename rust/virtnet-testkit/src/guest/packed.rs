//! A packed virtqueue, written by hand. Spec: virtio 1.4, 2.8.

use std::collections::VecDeque;

use virtnet_mem::GuestAddr;
use virtnet_virtio::{Features, QueueConfig};

use super::{Attack, Buffer, Calls, Expect, FakeGuest, GuestQueue, RawDescriptor, Returned};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A packed virtqueue of a [`FakeGuest`].
#[derive(Debug)]
pub struct PackedQueue {
    pub(super) size: u16,
    ring: u64,
    driver_event: u64,
    device_event: u64,
    in_order: bool,
    /// Where the next descriptor is written.
    avail: Place,
    /// Where the device's wish to be kicked has been asked for.
    asked: Place,
    /// Slots made available since then.
    unasked: u16,
    /// Where the next used descriptor is read.
    used: Place,
    /// Buffer ids that are not in use.
    ids: VecDeque<u16>,
    /// Chains that the device holds, in the order in which they were made available.
    held: VecDeque<Held>,
}

/// A slot, and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    fn next(self, size: u16) -> Self {
        if self.slot + 1 < size {
            Self {
                slot: self.slot + 1,
                ..self
            }
        } else {
            Self {
                slot: 0,
                wrap: !self.wrap,
            }
        }
    }

    fn bits(self) -> u16 {
        self.slot | if self.wrap { 0x8000 } else { 0 }
    }
}

#[derive(Debug)]
struct Held {
    id: u16,
    slots: usize,
    buffers: Vec<Buffer>,
}

impl PackedQueue {
    /// Lays out a queue of `size` entries, each area at an address that is aligned as it must be and no better.
    ///
    /// Of `features`, IN_ORDER matters here.
    ///
    /// # Panics
    /// When `size` is 0 or more than 32768, or memory is short.
    pub fn new(guest: &mut FakeGuest, size: u16, features: Features) -> Self {
        assert!(
            (1..=32_768).contains(&size),
            "a packed queue of {size} entries"
        );
        let ring = guest.alloc(16 * u64::from(size), 16).0;
        let driver_event = guest.alloc(4, 4).0;
        let device_event = guest.alloc(4, 4).0;
        guest.device_may_write(device_event..device_event + 4);
        for slot in 0..u64::from(size) {
            // Length, id and flags, and the address too: it means nothing in a used descriptor. Spec: virtio 1.4, 2.8.5.
            guest.device_may_write(ring + 16 * slot..ring + 16 * (slot + 1));
        }
        let start = Place {
            slot: 0,
            wrap: true,
        };
        Self {
            size,
            ring,
            driver_event,
            device_event,
            in_order: features.contains(Features::IN_ORDER),
            avail: start,
            asked: start,
            unasked: 0,
            used: start,
            // Ids are not slots, and not in the order of slots.
            ids: (0..size).rev().collect(),
            held: VecDeque::new(),
        }
    }

    /// Writes the descriptor of a slot as it is given, flags and all.
    pub fn write_descriptor(&mut self, guest: &mut FakeGuest, slot: u16, raw: RawDescriptor) {
        let addr = self.ring + 16 * u64::from(slot);
        let bytes = raw.packed_bytes();
        guest.write(GuestAddr(addr), &bytes[..14]);
        guest.barrier();
        guest.write(GuestAddr(addr + 14), &bytes[14..]);
        guest.barrier();
    }

    /// The slot that is written next.
    #[must_use]
    pub fn next_slot(&self) -> u16 {
        self.avail.slot
    }

    /// Makes a chain available: descriptors into the next slots, the flags of the first one last.
    #[track_caller]
    pub(super) fn make_available(
        &mut self,
        guest: &mut FakeGuest,
        raws: &[RawDescriptor],
        buffers: Vec<Buffer>,
    ) -> u16 {
        assert!(
            (1..=self.free()).contains(&raws.len()),
            "a chain of {} descriptors, {} are free",
            raws.len(),
            self.free()
        );
        guest.lend(&buffers);
        let id = self.ids.pop_front().expect("as many ids as slots");
        let mut first = None;
        for (i, &raw) in raws.iter().enumerate() {
            let Place { slot, wrap } = self.avail;
            let last = i + 1 == raws.len();
            let more = if last { 0 } else { RawDescriptor::NEXT };
            let raw = RawDescriptor {
                flags: raw.flags | more | if wrap { AVAIL } else { USED },
                // Only the last one's id counts.
                next_or_id: if last { id } else { 0xdead },
                ..raw
            };
            self.avail = self.avail.next(self.size);
            if first.is_none() {
                first = Some((slot, raw));
            } else {
                self.write_descriptor(guest, slot, raw);
            }
        }
        let (slot, raw) = first.expect("a chain has descriptors");
        self.write_descriptor(guest, slot, raw);
        let slots = raws.len();
        self.unasked += u16::try_from(slots).expect("no more than the ring has");
        self.held.push_back(Held { id, slots, buffers });
        id
    }

    #[track_caller]
    fn take_held(&mut self, id: u16) -> Vec<Held> {
        let named = self.held.iter().position(|held| held.id == id);
        let named =
            named.unwrap_or_else(|| panic!("the device returned {id}, which it does not hold"));
        if self.in_order {
            // Spec: virtio 1.4, 2.8.7: the id of the last one of a batch stands for the whole batch.
            self.held.drain(..=named).collect()
        } else {
            self.held.remove(named).into_iter().collect()
        }
    }
}

impl GuestQueue for PackedQueue {
    fn config(&self, guest: &FakeGuest, features: Features) -> QueueConfig {
        let used = u32::from(self.used.bits());
        QueueConfig {
            size: self.size,
            desc_area: guest.user_addr(GuestAddr(self.ring)),
            driver_area: guest.user_addr(GuestAddr(self.driver_event)),
            device_area: guest.user_addr(GuestAddr(self.device_event)),
            base: used | used << 16,
            features,
        }
    }

    #[track_caller]
    fn offer(&mut self, guest: &mut FakeGuest, buffers: &[Buffer]) -> u16 {
        let raws: Vec<_> = buffers.iter().copied().map(RawDescriptor::of).collect();
        self.make_available(guest, &raws, buffers.to_vec())
    }

    #[track_caller]
    fn offer_indirect(&mut self, guest: &mut FakeGuest, buffers: &[Buffer]) -> u16 {
        assert!(!buffers.is_empty(), "a table without buffers");
        let table: Vec<u8> = buffers
            .iter()
            .flat_map(|&buffer| {
                // Ids and all flags but one mean nothing in a table.
                let raw = RawDescriptor {
                    next_or_id: 0xdead,
                    ..RawDescriptor::of(buffer)
                };
                raw.packed_bytes()
            })
            .collect();
        let table = guest.readable(&table);
        let raw = RawDescriptor {
            flags: RawDescriptor::INDIRECT,
            ..RawDescriptor::of(table)
        };
        self.make_available(guest, &[raw], [buffers, &[table]].concat())
    }

    fn attack(&mut self, guest: &mut FakeGuest, attack: Attack, writable: bool) -> Option<Expect> {
        attack.on_packed(guest, self, writable)
    }

    #[track_caller]
    fn collect(&mut self, guest: &mut FakeGuest) -> Vec<Returned> {
        guest.barrier();
        let mut returned = Vec::new();
        while !self.held.is_empty() {
            let addr = self.ring + 16 * u64::from(self.used.slot);
            let flags = guest.read_u16(addr + 14);
            guest.barrier();
            let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
            if avail != self.used.wrap || used != self.used.wrap {
                break;
            }
            // Without the flag, nothing was written and the length says nothing.
            let len = if flags & RawDescriptor::WRITE == 0 {
                0
            } else {
                guest.read_u32(addr + 8)
            };
            let chains = self.take_held(guest.read_u16(addr + 12));
            let last = chains.len() - 1;
            for (i, held) in chains.into_iter().enumerate() {
                let len = if i == last { len } else { 0 };
                let bytes = guest.settle(&held.buffers, len);
                self.ids.push_back(held.id);
                for _ in 0..held.slots {
                    self.used = self.used.next(self.size);
                }
                returned.push(Returned {
                    id: held.id,
                    len,
                    bytes,
                });
            }
        }
        guest.check();
        returned
    }

    fn take_kick(&mut self, guest: &FakeGuest) -> bool {
        guest.barrier();
        let since = std::mem::replace(&mut self.asked, self.avail);
        let passed = std::mem::take(&mut self.unasked);
        match guest.read_u16(self.device_event + 2) & 3 {
            1 => false,
            2 => {
                let event = guest.read_u16(self.device_event);
                let mut place = since;
                (0..passed).any(|_| {
                    let here = place;
                    place = place.next(self.size);
                    here.bits() == event
                })
            }
            _ => passed > 0,
        }
    }

    fn set_calls(&mut self, guest: &mut FakeGuest, calls: Calls) {
        let (event, flags) = match calls {
            Calls::Always => (0, 0),
            Calls::Never => (0, 1),
            Calls::At(place) => (place, 2),
        };
        guest.write_u16(self.driver_event, event);
        guest.barrier();
        guest.write_u16(self.driver_event + 2, flags);
        guest.barrier();
    }

    fn free(&self) -> usize {
        let taken: usize = self.held.iter().map(|held| held.slots).sum();
        usize::from(self.size) - taken
    }

    fn outstanding(&self) -> usize {
        self.held.len()
    }
}
