//! The driver side of a packed virtqueue: makes buffers available, takes them back used.

use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{GuestMemory, MemoryError, Table, Window, Word};

use super::layout::{
    ALIGN, DESC_NEXT, DESC_WRITE, EVENT_BYTES, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE,
    EVENT_FLAGS, Position, wants_event, word,
};
use crate::{DriverBuffer, Features, QueueConfig, RingError, Used};

/// What we know of one buffer id; the ring itself is shared and never trusted.
#[derive(Clone, Copy, Debug, Default)]
struct Shadow {
    /// Slots of the chain that the device holds under this id, else 0.
    slots: u16,
    /// Bytes of it that the device may write.
    writable: u32,
}

/// A running packed virtqueue, seen by the driver.
#[derive(Debug)]
pub struct PackedDriver {
    desc: Table,
    driver_event: Window,
    device_event: Window,
    size: u16,
    event_idx: bool,
    in_order: bool,
    shadow: Box<[Shadow]>,
    /// Free buffer ids, taken from the front and put back behind.
    ids: Box<[u16]>,
    ids_head: usize,
    n_ids: usize,
    /// Free slots of the ring.
    n_free: u16,
    /// Ids that the device holds, oldest first: what an in-order device returns next.
    held: Box<[u16]>,
    held_head: usize,
    n_held: usize,
    /// In order: chains of a batch whose one used descriptor has been seen, still to be reported; and that one's length.
    batch: usize,
    batch_len: u32,
    /// Next slot to write, ahead of what is published.
    next_avail: Position,
    /// The first descriptor of a batch, kept back until the batch is complete.
    first: Option<(u16, u64)>,
    /// Where `next_avail` stood when the device was last considered for a kick.
    signalled: Position,
    /// Next slot that the device will mark used.
    next_used: Position,
}

impl PackedDriver {
    /// Lays out an empty queue: zeroes its areas and starts at slot 0.
    ///
    /// # Errors
    /// [`MemoryError`] when a ring area is not aligned or not wholly in memory.
    pub fn new(config: &QueueConfig, memory: &GuestMemory) -> Result<Self, MemoryError> {
        let [_, driver_align, device_align] = ALIGN;
        let size = config.size;
        let desc = memory.table(config.desc_area, size.into())?;
        let driver_event = memory.window(config.driver_area, EVENT_BYTES, driver_align)?;
        let device_event = memory.window(config.device_area, EVENT_BYTES, device_align)?;
        desc.zero();
        for area in [&driver_event, &device_event] {
            area.zero();
        }
        Ok(Self {
            desc,
            driver_event,
            device_event,
            size,
            event_idx: config.features.contains(Features::EVENT_IDX),
            in_order: config.features.contains(Features::IN_ORDER),
            shadow: vec![Shadow::default(); usize::from(size)].into(),
            ids: (0..size).collect(),
            ids_head: 0,
            n_ids: usize::from(size),
            n_free: size,
            held: vec![0; usize::from(size)].into(),
            held_head: 0,
            n_held: 0,
            batch: 0,
            batch_len: 0,
            next_avail: Position::START,
            first: None,
            signalled: Position::START,
            next_used: Position::START,
        })
    }

    /// How many descriptors are free.
    #[inline]
    #[must_use]
    pub fn free(&self) -> usize {
        usize::from(self.n_free)
    }

    /// Makes one chain available; see [`crate::DriverQueue::add`].
    #[inline]
    pub fn add(&mut self, buffers: &[DriverBuffer]) -> Option<u16> {
        let n = u16::try_from(buffers.len())
            .ok()
            .filter(|&n| n > 0 && n <= self.n_free)?;
        let id = self.ids[self.ids_head];
        self.ids_head = wrapped(self.ids_head + 1, self.ids.len());
        self.n_ids -= 1;

        let mut head = None;
        let mut writable = 0_u32;
        for (k, buffer) in buffers.iter().enumerate() {
            let mut flags = self.next_avail.available();
            if buffer.writable {
                flags |= DESC_WRITE;
                writable = writable.saturating_add(buffer.len);
            }
            if k + 1 < buffers.len() {
                flags |= DESC_NEXT;
            }
            let slot = self.next_avail.slot;
            self.desc
                .store(slot.into(), Word::First, buffer.addr.0, Ordering::Relaxed);
            let rest = word(buffer.len, id, flags);
            // A chain becomes available with the flags of its first descriptor, so those are written last.
            if head.is_none() {
                head = Some((slot, rest));
            } else {
                self.store_rest(slot, rest);
            }
            self.next_avail = self.next_avail.advance(1, self.size);
        }
        match head {
            Some(head) if self.first.is_none() => self.first = Some(head),
            Some((slot, rest)) => self.store_rest(slot, rest),
            None => {}
        }
        self.n_free -= n;
        let shadow = &mut self.shadow[usize::from(id)];
        shadow.slots = n;
        shadow.writable = writable;
        let tail = wrapped(self.held_head + self.n_held, self.held.len());
        self.held[tail] = id;
        self.n_held += 1;
        Some(id)
    }

    /// Lets the device see everything added; whether it is to be kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let Some((slot, rest)) = self.first.take() else {
            return false;
        };
        self.store_rest(slot, rest);
        // The descriptors must be visible before the device's wish is read, or both sides may wait for ever.
        fence(Ordering::SeqCst);
        let event = self.device_event.load_u32(0, Ordering::Relaxed);
        let since = std::mem::replace(&mut self.signalled, self.next_avail);
        wants_event(event, since, self.next_avail, self.size)
    }

    /// Takes back what the device has returned; see [`crate::DriverQueue::reap`].
    ///
    /// # Errors
    /// [`RingError::UsedId`], [`RingError::UsedLen`]: the device is at fault, the queue is lost.
    #[inline]
    pub fn reap(&mut self, used: &mut [Used]) -> Result<usize, RingError> {
        let mut n = 0;
        while let Some(place) = used.get_mut(n) {
            let Some(returned) = self.take_back()? else {
                break;
            };
            *place = returned;
            n += 1;
        }
        Ok(n)
    }

    #[inline]
    fn take_back(&mut self) -> Result<Option<Used>, RingError> {
        let (id, len) = if self.batch > 0 {
            // The rest of an in-order batch has no descriptors of its own. Spec: virtio 1.4, 2.8.7.
            self.batch -= 1;
            self.oldest_of_batch()
        } else {
            if self.n_held == 0 {
                return Ok(None);
            }
            let Some((id, len)) = self.used_at(self.next_used) else {
                return Ok(None);
            };
            if self.in_order && id != self.held[self.held_head] {
                self.batch = self.batch_up_to(id)?;
                self.batch_len = len;
                self.oldest_of_batch()
            } else {
                (id, len)
            }
        };
        let Some(shadow) = self.shadow.get_mut(usize::from(id)).filter(|s| s.slots > 0) else {
            return Err(RingError::UsedId { id: u32::from(id) });
        };
        if len > shadow.writable {
            return Err(RingError::UsedLen {
                id: u32::from(id),
                len,
                size: shadow.writable,
            });
        }
        let slots = std::mem::take(&mut shadow.slots);
        self.n_free += slots;
        self.held_head = wrapped(self.held_head + 1, self.held.len());
        self.n_held -= 1;
        let tail = wrapped(self.ids_head + self.n_ids, self.ids.len());
        self.ids[tail] = id;
        self.n_ids += 1;
        self.next_used = self.next_used.advance(slots, self.size);
        Ok(Some(Used { id, len }))
    }

    /// How many chains an in-order device has returned behind the oldest, when it names `id` as the last.
    fn batch_up_to(&self, id: u16) -> Result<usize, RingError> {
        (1..self.n_held)
            .find(|k| self.held[wrapped(self.held_head + k, self.held.len())] == id)
            .ok_or_else(|| RingError::UsedId { id: u32::from(id) })
    }

    /// The oldest chain of a batch: the last one has the length that the device wrote, the others were used completely.
    fn oldest_of_batch(&self) -> (u16, u32) {
        let id = self.held[self.held_head];
        let len = if self.batch == 0 {
            self.batch_len
        } else {
            self.shadow[usize::from(id)].writable
        };
        (id, len)
    }

    /// Buffer id and bytes written of the descriptor at `at`, if the device has marked it used.
    #[inline]
    fn used_at(&self, at: Position) -> Option<(u16, u32)> {
        let rest = self
            .desc
            .load(at.slot.into(), Word::Second, Ordering::Acquire);
        let [a, b, c, d, e, f, g, h] = rest.to_le_bytes();
        let flags = u16::from_le_bytes([g, h]);
        let len = if flags & DESC_WRITE != 0 {
            u32::from_le_bytes([a, b, c, d])
        } else {
            0
        };
        at.is_used(flags)
            .then_some((u16::from_le_bytes([e, f]), len))
    }

    /// Whether the device has returned something.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.batch > 0 || (self.n_held > 0 && self.used_at(self.next_used).is_some())
    }

    /// Asks for a call with the next buffer returned; whether some have been returned already.
    pub fn arm(&mut self) -> bool {
        let flags = if self.event_idx {
            EVENT_DESC
        } else {
            EVENT_ENABLE
        };
        let event = u32::from(self.next_used.bits()) | u32::from(flags) << 16;
        self.driver_event.store_u32(0, event, Ordering::Release);
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Says that calls are not needed.
    pub fn disarm(&mut self) {
        self.driver_event
            .store_u16(EVENT_FLAGS, EVENT_DISABLE, Ordering::Relaxed);
    }

    #[inline]
    fn store_rest(&self, slot: u16, rest: u64) {
        self.desc
            .store(slot.into(), Word::Second, rest, Ordering::Release);
    }
}

/// Place `at` of a circular buffer of `len` places; at most one lap too far. (A division would cost more than the rest.)
#[inline]
fn wrapped(at: usize, len: usize) -> usize {
    if at >= len { at - len } else { at }
}
