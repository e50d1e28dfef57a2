//! The driver side of a packed virtqueue: makes buffers available, takes them back used.

use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{GuestMemory, MemoryError, Table, TableEntry, Window, Word};

use super::layout::{
    ALIGN, DESC_NEXT, DESC_WRITE, DESCS_A_LINE, EVENT_BYTES, EVENT_DESC, EVENT_DISABLE,
    EVENT_ENABLE, EVENT_FLAGS, Position, parts, wants_event, word,
};
use crate::ids::Ids;
use crate::{DriverBuffer, Features, Positions, QueueConfig, RingError, Used};

/// So many are taken back in one go, where nobody asks which they are.
const REAPED_AT_ONCE: usize = 64;

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

    /// The ids that will be taken next; see [`crate::DriverQueue::next_ids`].
    #[inline(always)]
    pub fn next_ids(&self, ids: &mut [u16]) -> usize {
        self.ids.copy_next(ids)
    }

    /// Asks to own the lines of the next `n` descriptors, which are free; see [`crate::DriverQueue::prepare`].
    #[inline(always)]
    pub fn prepare(&self, n: usize) {
        self.prefetch_write(self.next_avail, n.min(self.ids.free()));
    }

    /// Asks to own the lines of `n` descriptors from `at` on.
    #[inline(always)]
    fn prefetch_write(&self, mut at: Position, n: usize) {
        for _ in 0..n.div_ceil(DESCS_A_LINE.into()) {
            self.desc.prefetch_write(at.slot.into());
            at = at.advance(DESCS_A_LINE.min(self.size), self.size);
        }
    }

    /// Makes chains of one buffer each available; see [`crate::DriverQueue::add_each`].
    #[inline(always)]
    pub fn add_each(&mut self, n: usize, mut buffer: impl FnMut(u16) -> DriverBuffer) {
        let mut left = n.min(self.ids.free());
        if left > 0 && self.first.is_none() {
            let id = self.ids.run(1).first().copied().unwrap_or_default();
            let buffer = buffer(id);
            self.first = Some(self.write_descriptor(self.next_avail, &buffer, id, 0));
            self.hold(id, 1, if buffer.writable { buffer.len } else { 0 });
            self.next_avail = self.next_avail.advance(1, self.size);
            self.ids.skip(1);
            left -= 1;
        }
        while left > 0 {
            let added = self.add_run(left, &mut buffer);
            self.next_avail = self.next_avail.advance(added, self.size);
            self.ids.skip(added.into());
            left -= usize::from(added);
        }
    }

    /// Writes up to `most` descriptors, up to the end of the ring and of the circle of ids, for as many buffers; how many.
    #[inline(always)]
    fn add_run(&mut self, most: usize, buffer: &mut impl FnMut(u16) -> DriverBuffer) -> u16 {
        let at = self.next_avail;
        let slots = self.desc.run(at.slot, self.size - at.slot);
        let ids = self.ids.run(most);
        let mut n = 0;
        for (slot, &id) in slots.iter().zip(ids) {
            let buffer = buffer(id);
            let (write, writable) = if buffer.writable {
                (DESC_WRITE, buffer.len)
            } else {
                (0, 0)
            };
            self.shadow[usize::from(id)] = Shadow {
                slots: 1,
                next: 0,
                writable,
            };
            slot.store(Word::First, buffer.addr.0, Ordering::Relaxed);
            let rest = word(buffer.len, id, at.available() | write);
            slot.store(Word::Second, rest, Ordering::Release);
            n += 1;
        }
        n
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
        let head = head?;
        if self.first.is_none() {
            self.first = Some(head);
        } else {
            self.store_rest(head);
        }
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
        // These lines will be written again soon: all are asked for at once. Only when the first has come back, and only as many as came
        // back last time, because beyond that the device may still be writing.
        if self.has_work() {
            self.prefetch_write(self.next_used, self.last_returned.min(used.len()));
        }
        let (mut n, mut outcome) = (0, Ok(()));
        while n < used.len() {
            let plain = self.reap_plain(&mut used[n..]);
            self.next_used = self.next_used.advance(plain, self.size);
            n += usize::from(plain);
            if n == used.len() || (plain > 0 && self.next_used.slot == 0) {
                continue;
            }
            // What was seen only ended the run: what is decided about it, is on another look.
            let Some((id, len)) = self.next_returned(self.next_used) else {
                break;
            };
            match self.free_chain(id, len) {
                Ok(slots) => self.next_used = self.next_used.advance(slots, self.size),
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            used[n] = Used { id, len };
            n += 1;
        }
        self.last_returned = n;
        outcome.map(|()| n)
    }

    /// Takes back chains up to the end of the ring, as long as each is of one slot and, with a device that uses buffers in order, the
    /// oldest: the usual case. How many.
    #[inline(always)]
    fn reap_plain(&mut self, used: &mut [Used]) -> u16 {
        let at = self.next_used;
        if self.batch.is_some() {
            return 0;
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
        let held = self.ids.held() as u16;
        let run = self.desc.run(at.slot, held.min(self.size - at.slot));
        let shadow = &mut self.shadow[..];
        let mut returned = |slot: &TableEntry, place: &mut Used, oldest: Option<u16>| {
            let (len, id, flags) = parts(slot.load(Word::Second, Ordering::Acquire));
            let len = if flags & DESC_WRITE != 0 { len } else { 0 };
            let shadow = shadow.get_mut(usize::from(id))?;
            let is_next = oldest.is_none_or(|oldest| oldest == id);
            if !at.is_used(flags) || !is_next || shadow.slots != 1 || len > shadow.writable {
                return None;
            }
            shadow.slots = 0;
            *place = Used { id, len };
            Some(id)
        };
        let pairs = run.iter().zip(used);
        let n = if self.in_order {
            let oldest_first = pairs.zip(self.ids.held_run());
            let returned =
                oldest_first.map_while(|((slot, place), &id)| returned(slot, place, Some(id)));
            let n = returned.count();
            self.ids.put_oldest(n);
            n
        } else {
            let returned = pairs.map_while(|(slot, place)| returned(slot, place, None));
            self.ids.put_each(returned)
        };
        #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
        {
            n as u16
        }
    }

    /// Takes back everything that the device has returned; see [`crate::DriverQueue::reclaim`].
    ///
    /// # Errors
    /// As [`Self::reap`].
    #[inline(always)]
    pub fn reclaim(&mut self) -> Result<(), RingError> {
        let mut used = [Used::default(); REAPED_AT_ONCE];
        loop {
            while self.reclaim_batch() {}
            if self.reap(&mut used)? == 0 {
                return Ok(());
            }
        }
    }

    /// Takes back a batch of which a device that uses buffers in order has returned the last alone, at one look; whether there is one.
    #[inline(always)]
    fn reclaim_batch(&mut self) -> bool {
        if !self.in_order || self.batch.is_some() {
            return false;
        }
        let (Some(oldest), Some((last, len))) = (self.ids.oldest(), self.used_at(self.next_used))
        else {
            return false;
        };
        let is_held = |shadow: &Shadow| shadow.slots > 0 && len <= shadow.writable;
        if last == oldest || !self.shadow.get(usize::from(last)).is_some_and(is_held) {
            return false;
        }
        let mut slots = 0;
        while let Some(id) = self.ids.held_after(slots.into()) {
            slots += std::mem::take(&mut self.shadow[usize::from(id)].slots).max(1);
            if id == last {
                break;
            }
        }
        self.ids.put_oldest(slots.into());
        self.next_used = self.next_used.advance(slots, self.size);
        true
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
        let (len, id, flags) = parts(rest);
        let len = if flags & DESC_WRITE != 0 { len } else { 0 };
        at.is_used(flags).then_some((id, len))
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
