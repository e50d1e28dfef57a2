//! The driver side of a packed virtqueue: makes buffers available, takes them back used.

use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{GuestMemory, MemoryError, Table, Window, Word};

use super::layout::{
    AHEAD, ALIGN, DESC_NEXT, DESC_WRITE, DESCS_A_LINE, EVENT_BYTES, EVENT_DESC, EVENT_DISABLE,
    EVENT_ENABLE, EVENT_FLAGS, Position, wants_event, word,
};
use crate::ids::Ids;
use crate::{DriverBuffer, Features, Positions, QueueConfig, RingError, Used};

/// What we know of one buffer id; the ring itself is shared and never trusted.
#[derive(Clone, Copy, Debug, Default)]
struct Shadow {
    /// Slots of the chain that the device holds under this id, else 0.
    slots: u16,
    /// The id set aside for the next slot of the same chain.
    next: u16,
    /// Bytes that the device may write.
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
    /// Buffer ids. A chain sets one aside for each of its slots, so as many slots are free as ids, and whoever keeps a buffer for
    /// each id has one for each slot.
    ids: Ids,
    /// In order: the last chain of a batch whose one used descriptor has been seen, and that one's length.
    batch: Option<(u16, u32)>,
    /// Next slot to write, ahead of what is published.
    next_avail: Position,
    /// The first descriptor of a batch, kept back until the batch is complete.
    first: Option<(u16, u64)>,
    /// Where `next_avail` stood when the device was last considered for a kick.
    signalled: Position,
    /// Next slot that the device will mark used.
    next_used: Position,
    /// How many chains came back last time.
    last_returned: usize,
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
            ids: Ids::new(size),
            batch: None,
            next_avail: Position::START,
            first: None,
            signalled: Position::START,
            next_used: Position::START,
            last_returned: 0,
        })
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many descriptors are free.
    #[inline]
    #[must_use]
    pub fn free(&self) -> usize {
        self.ids.free()
    }

    /// The id that will be taken after `k` others; see [`crate::DriverQueue::upcoming`].
    #[inline(always)]
    #[must_use]
    pub fn upcoming(&self, k: usize) -> Option<u16> {
        self.ids.upcoming(k)
    }

    /// Asks to own the lines of the next `n` descriptors, which are free; see [`crate::DriverQueue::prepare`].
    #[inline(always)]
    pub fn prepare(&self, n: usize) {
        let mut at = self.next_avail;
        for _ in 0..n.min(self.ids.free()).div_ceil(DESCS_A_LINE.into()) {
            self.desc.prefetch_write(at.slot.into());
            at = at.advance(DESCS_A_LINE.min(self.size), self.size);
        }
    }

    /// Makes chains of one buffer each available; see [`crate::DriverQueue::add_each`].
    #[inline(always)]
    pub fn add_each(&mut self, n: usize, mut buffer: impl FnMut(u16) -> DriverBuffer) {
        // The position stays in registers: see the split ring's.
        let mut at = self.next_avail;
        for _ in 0..n {
            let Some(id) = self.ids.take() else { break };
            let buffer = buffer(id);
            let rest = self.write_descriptor(at, &buffer, id, 0);
            self.hold(id, 1, if buffer.writable { buffer.len } else { 0 });
            self.show(rest);
            at = at.advance(1, self.size);
        }
        self.next_avail = at;
    }

    /// Makes one chain available; see [`crate::DriverQueue::add`].
    pub fn add(&mut self, buffers: &[DriverBuffer]) -> Option<u16> {
        let n = u16::try_from(buffers.len())
            .ok()
            .filter(|&n| n > 0 && usize::from(n) <= self.ids.free())?;
        let id = self.ids.upcoming(0)?;
        let (mut head, mut writable) = (None, 0_u32);
        for (k, buffer) in buffers.iter().enumerate() {
            let index = self.ids.take()?;
            let is_last = k + 1 == buffers.len();
            let flags = if is_last { 0 } else { DESC_NEXT };
            let rest = self.write_descriptor(self.next_avail, buffer, id, flags);
            self.next_avail = self.next_avail.advance(1, self.size);
            // A chain becomes available with the flags of its first descriptor, so those are written last.
            if head.is_none() {
                head = Some(rest);
            } else {
                self.store_rest(rest);
            }
            self.shadow[usize::from(index)].next = self.ids.upcoming(0).unwrap_or_default();
            if buffer.writable {
                writable = writable.saturating_add(buffer.len);
            }
        }
        self.show(head?);
        self.hold(id, n, writable);
        Some(id)
    }

    /// Writes the first word of the descriptor at `at`, and gives the second with its slot.
    #[inline(always)]
    fn write_descriptor(
        &self,
        at: Position,
        buffer: &DriverBuffer,
        id: u16,
        flags: u16,
    ) -> (u16, u64) {
        self.desc.store(
            at.slot.into(),
            Word::First,
            buffer.addr.0,
            Ordering::Relaxed,
        );
        let write = if buffer.writable { DESC_WRITE } else { 0 };
        let flags = at.available() | flags | write;
        (at.slot, word(buffer.len, id, flags))
    }

    /// Completes the head of a chain, unless it is the first of a batch.
    #[inline(always)]
    fn show(&mut self, rest: (u16, u64)) {
        if self.first.is_none() {
            self.first = Some(rest);
        } else {
            self.store_rest(rest);
        }
    }

    /// Notes what the device holds under an id.
    #[inline(always)]
    fn hold(&mut self, id: u16, slots: u16, writable: u32) {
        let shadow = &mut self.shadow[usize::from(id)];
        shadow.slots = slots;
        shadow.writable = writable;
    }

    /// Lets the device see everything added; whether it is to be kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let Some(rest) = self.first.take() else {
            return false;
        };
        self.store_rest(rest);
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
    #[inline(always)]
    pub fn reap(&mut self, used: &mut [Used]) -> Result<usize, RingError> {
        let (mut n, mut at) = (0, self.next_used);
        let mut outcome = Ok(());
        while let Some(place) = used.get_mut(n) {
            let Some((id, len)) = self.next_returned(at) else {
                break;
            };
            self.prefetch_ahead(at, n);
            match self.free_chain(id, len) {
                Ok(slots) => at = at.advance(slots, self.size),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            *place = Used { id, len };
            n += 1;
        }
        (self.next_used, self.last_returned) = (at, n);
        outcome.map(|()| n)
    }

    /// Asks for a line of descriptors some lines ahead, which will be written again soon, so that misses overlap. Only where the
    /// last burst reached, because beyond that the device may still be writing.
    #[inline(always)]
    fn prefetch_ahead(&self, at: Position, n: usize) {
        if at.slot.is_multiple_of(DESCS_A_LINE) && n + AHEAD < self.last_returned {
            self.desc.prefetch_write(at.line_ahead(self.size));
        }
    }

    /// Takes back everything that the device has returned; see [`crate::DriverQueue::reclaim`].
    ///
    /// # Errors
    /// As [`Self::reap`].
    #[inline(always)]
    pub fn reclaim(&mut self) -> Result<usize, RingError> {
        let (mut n, mut at) = (0, self.next_used);
        let mut outcome = Ok(());
        while let Some((id, len)) = self.next_returned(at) {
            match self.free_chain(id, len) {
                Ok(slots) => at = at.advance(slots, self.size),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            n += 1;
        }
        self.next_used = at;
        outcome.map(|()| n)
    }

    /// Id and length of the chain that the device has returned at `at`. With a device that uses buffers in order the last one of a
    /// batch has the length that the device wrote, those before it have no descriptors of their own and were used completely.
    /// Spec: virtio 1.4, 2.8.7.
    #[inline(always)]
    fn next_returned(&mut self, at: Position) -> Option<(u16, u32)> {
        let oldest = self.ids.oldest()?;
        let (last, len) = match self.batch {
            Some(batch) => batch,
            None => self.used_at(at)?,
        };
        if !self.in_order || oldest == last {
            self.batch = None;
            return Some((last, len));
        }
        let is_held = self
            .shadow
            .get(usize::from(last))
            .is_some_and(|shadow| shadow.slots > 0);
        if !is_held {
            return Some((last, len)); // which nobody will find
        }
        self.batch = Some((last, len));
        Some((oldest, self.shadow[usize::from(oldest)].writable))
    }

    /// Frees the ids of a chain that came back; how many slots it had.
    #[inline(always)]
    fn free_chain(&mut self, id: u16, len: u32) -> Result<u16, RingError> {
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
        self.ids.put(id);
        let mut index = id;
        for _ in 1..slots {
            index = self.shadow[usize::from(index)].next;
            self.ids.put(index);
        }
        Ok(slots)
    }

    /// Buffer id and bytes written of the descriptor at `at`, if the device has marked it used.
    #[inline(always)]
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

    /// Where the device is to go on, as far as it is known: see [`crate::DriverQueue::base`].
    #[must_use]
    pub fn base(&self) -> u32 {
        u32::from(self.next_used.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// Whether the device has returned something.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.batch.is_some() || (self.ids.held() > 0 && self.used_at(self.next_used).is_some())
    }

    /// Where the queue stands; see [`crate::DriverQueue::positions`].
    #[must_use]
    pub fn positions(&self) -> Positions {
        Positions {
            avail: self.next_avail.slot,
            used: self.next_used.slot,
            wraps: Some([self.next_avail.wrap, self.next_used.wrap]),
            published: None,
            waiting: u16::from(self.has_work()),
        }
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

    #[inline(always)]
    fn store_rest(&self, (slot, rest): (u16, u64)) {
        self.desc
            .store(slot.into(), Word::Second, rest, Ordering::Release);
    }
}
