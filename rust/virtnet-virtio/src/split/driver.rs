//! The driver side of a split virtqueue: makes buffers available, takes them back used.

use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{GuestMemory, MemoryError, Pair32, Table, TableEntry, Window, Word};

use super::layout::{
    ALIGN, AVAIL_NO_INTERRUPT, DESC_NEXT, DESC_WRITE, Descriptor, ENTRIES, FLAGS, INDEX,
    USED_NO_NOTIFY, avail_bytes, used_bytes,
};
use crate::ids::Ids;
use crate::notify::need_event;
use crate::{DriverBuffer, Features, Positions, QueueConfig, RingError, Used};

/// So many are taken back in one go, where nobody asks which they are.
const REAPED_AT_ONCE: usize = 64;

/// What we know of one descriptor; the table itself is shared and never read back.
#[derive(Clone, Copy, Debug, Default)]
struct Shadow {
    /// What stands in the shared table.
    written: Descriptor,
    /// For the head of a chain that the device holds: its descriptors, else 0.
    chained: u16,
    /// For such a head: bytes that the device may write.
    writable: u32,
}

impl Shadow {
    /// Stores only the words that differ: an unchanged line stays in both caches.
    #[inline(always)]
    fn describe(&mut self, entry: &TableEntry, desc: Descriptor) {
        if self.written.addr != desc.addr {
            entry.store(Word::First, desc.addr, Ordering::Relaxed);
        }
        if self.written.rest() != desc.rest() {
            entry.store(Word::Second, desc.rest(), Ordering::Relaxed);
        }
        self.written = desc;
    }
}

/// A running split virtqueue, seen by the driver.
#[derive(Debug)]
pub struct SplitDriver {
    desc: Table,
    avail: Window,
    used: Window,
    size: u16,
    mask: u16,
    event_idx: bool,
    in_order: bool,
    shadow: Box<[Shadow]>,
    /// What stands in the shared available ring.
    offered: Box<[u16]>,
    /// Descriptors. A device that returns them in order leaves descriptor `i` in slot `i`: neither the table nor the available
    /// ring changes from lap to lap, and their lines stay in both caches.
    ids: Ids,
    /// Next available entry to write; free-running, ahead of what is published.
    next_avail: u16,
    published: u16,
    /// Next used entry to read.
    next_used: u16,
    /// In order: the last chain of a batch whose one used element has been seen, and that element's length.
    batch: Option<(u16, u32)>,
}

impl SplitDriver {
    /// Lays out an empty queue: zeroes its areas and starts at index 0.
    ///
    /// # Errors
    /// [`MemoryError`] when a ring area is not aligned or not wholly in memory.
    pub fn new(config: &QueueConfig, memory: &GuestMemory) -> Result<Self, MemoryError> {
        let event_idx = config.features.contains(Features::EVENT_IDX);
        let [_, avail_align, used_align] = ALIGN;
        let size = config.size;
        let desc = memory.table(config.desc_area, size.into())?;
        let avail = memory.window(
            config.driver_area,
            avail_bytes(size, event_idx),
            avail_align,
        )?;
        let used = memory.window(config.device_area, used_bytes(size, event_idx), used_align)?;
        desc.zero();
        for area in [&avail, &used] {
            area.zero();
        }
        Ok(Self {
            desc,
            avail,
            used,
            size,
            mask: size - 1,
            event_idx,
            in_order: config.features.contains(Features::IN_ORDER),
            shadow: vec![Shadow::default(); usize::from(size)].into(),
            offered: vec![0; usize::from(size)].into(),
            ids: Ids::new(size),
            next_avail: 0,
            published: 0,
            next_used: 0,
            batch: None,
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

    /// The descriptor that will be taken after `k` others; see [`crate::DriverQueue::upcoming`].
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

    /// Makes chains of one buffer each available; see [`crate::DriverQueue::add_each`].
    #[inline(always)]
    pub fn add_each(&mut self, n: usize, mut buffer: impl FnMut(u16) -> DriverBuffer) {
        let mut left = n.min(self.ids.free());
        while left > 0 {
            let added = self.add_run(left, &mut buffer);
            self.ids.skip(added.into());
            self.next_avail = self.next_avail.wrapping_add(added);
            left -= usize::from(added);
        }
    }

    /// Offers up to `most` buffers, up to the end of the available ring and of the circle of ids; how many.
    #[inline(always)]
    fn add_run(&mut self, most: usize, buffer: &mut impl FnMut(u16) -> DriverBuffer) -> u16 {
        let first = usize::from(self.next_avail & self.mask);
        let rest = usize::from(self.size) - first;
        let slots = self.avail.words(ENTRIES + 2 * first, rest).iter();
        let offered = self.offered.get_mut(first..).unwrap_or_default();
        let descriptors = self.desc.entries();
        let mut n = 0;
        for ((slot, offered), &head) in slots.zip(offered).zip(self.ids.run(most)) {
            let buffer = buffer(head);
            let shadow = &mut self.shadow[usize::from(head)];
            shadow.chained = 1;
            shadow.writable = if buffer.writable { buffer.len } else { 0 };
            shadow.describe(&descriptors[usize::from(head)], describe(&buffer, None));
            if *offered != head {
                *offered = head;
                slot.store(head, Ordering::Relaxed);
            }
            n += 1;
        }
        n
    }

    /// Makes one chain available; see [`crate::DriverQueue::add`].
    pub fn add(&mut self, buffers: &[DriverBuffer]) -> Option<u16> {
        let n = u16::try_from(buffers.len())
            .ok()
            .filter(|&n| n > 0 && usize::from(n) <= self.ids.free())?;
        let head = self.ids.upcoming(0)?;
        let mut writable = 0_u32;
        for (k, buffer) in buffers.iter().enumerate() {
            let index = self.ids.take()?;
            let next = if k + 1 < buffers.len() {
                self.ids.upcoming(0)
            } else {
                None
            };
            if buffer.writable {
                writable = writable.saturating_add(buffer.len);
            }
            self.shadow[usize::from(index)].describe(
                &self.desc.entries()[usize::from(index)],
                describe(buffer, next),
            );
        }
        let shadow = &mut self.shadow[usize::from(head)];
        (shadow.chained, shadow.writable) = (n, writable);
        let slot = usize::from(self.next_avail & self.mask);
        if self.offered[slot] != head {
            self.offered[slot] = head;
            self.avail
                .store_u16(ENTRIES + 2 * slot, head, Ordering::Relaxed);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(head)
    }

    /// Lets the device see everything added; whether it is to be kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_avail);
        if old == new {
            return false;
        }
        self.avail.store_u16(INDEX, new, Ordering::Release);
        self.published = new;
        // The index must be visible before the device's wish is read, or both sides may wait for ever.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self
                .used
                .load_u16(ENTRIES + 8 * usize::from(self.size), Ordering::Relaxed);
            need_event(event, new, old)
        } else {
            self.used.load_u16(FLAGS, Ordering::Relaxed) & USED_NO_NOTIFY == 0
        }
    }

    /// Takes back what the device has returned; see [`crate::DriverQueue::reap`].
    ///
    /// # Errors
    /// [`RingError::UsedIndex`], [`RingError::UsedId`], [`RingError::UsedLen`]: the device is at fault, the queue is lost.
    #[inline(always)]
    pub fn reap(&mut self, used: &mut [Used]) -> Result<usize, RingError> {
        let ready = self.ready()?.min(used.len());
        let mut n = 0;
        while n < ready {
            let plain = self.reap_plain(&mut used[n..ready]);
            self.next_used = self.next_used.wrapping_add(plain);
            n += usize::from(plain);
            if n == ready || (plain > 0 && self.next_used & self.mask == 0) {
                continue;
            }
            // What was seen only ended the run: what is decided about it, is on another look.
            let at = self.next_used;
            let (id, len) = match self.next_in_order(at) {
                Some(returned) => returned,
                None => self.element(at),
            };
            let id = self.free_chain(id, len)?;
            used[n] = Used { id, len };
            self.next_used = at.wrapping_add(1);
            n += 1;
        }
        Ok(n)
    }

    /// Takes back as many chains as `used` has places, up to the end of the ring, as long as each is of one descriptor and, with a device
    /// that uses buffers in order, the oldest: the usual case. How many.
    #[inline(always)]
    fn reap_plain(&mut self, used: &mut [Used]) -> u16 {
        if self.batch.is_some() {
            return 0;
        }
        let first = usize::from(self.next_used & self.mask);
        let most = used.len().min(usize::from(self.size) - first);
        let elements = self.used.pairs(ENTRIES + 8 * first, most).iter();
        let shadow = &mut self.shadow[..];
        let mut returned = |element: &Pair32, place: &mut Used, oldest: Option<u16>| {
            let [id, len] = element.load(Ordering::Relaxed);
            let id = u16::try_from(id).ok()?;
            let shadow = shadow.get_mut(usize::from(id))?;
            let is_next = oldest.is_none_or(|oldest| oldest == id);
            if !is_next || shadow.chained != 1 || len > shadow.writable {
                return None;
            }
            shadow.chained = 0;
            *place = Used { id, len };
            Some(id)
        };
        let pairs = elements.zip(used);
        let n = if self.in_order {
            let oldest_first = pairs.zip(self.ids.held_run());
            let returned = oldest_first
                .map_while(|((element, place), &id)| returned(element, place, Some(id)));
            let n = returned.count();
            self.ids.put_oldest(n);
            n
        } else {
            let returned = pairs.map_while(|(element, place)| returned(element, place, None));
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
        if self.in_order {
            return self.reclaim_oldest();
        }
        let mut used = [Used::default(); REAPED_AT_ONCE];
        while self.reap(&mut used)? > 0 {}
        Ok(())
    }

    /// The same of a device that uses buffers in order. What it returns needs no look at the used ring: its index says it all.
    #[inline(always)]
    fn reclaim_oldest(&mut self) -> Result<(), RingError> {
        let n = self.ready()?;
        let mut descriptors = 0;
        for _ in 0..n {
            let head = self.ids.held_after(descriptors).unwrap_or_default();
            let chained = std::mem::take(&mut self.shadow[usize::from(head)].chained);
            descriptors += usize::from(chained);
        }
        self.ids.put_oldest(descriptors);
        self.batch = None;
        #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
        {
            self.next_used = self.next_used.wrapping_add(n as u16);
        }
        Ok(())
    }

    /// How many chains the device has returned that were not taken back yet.
    #[inline(always)]
    fn ready(&self) -> Result<usize, RingError> {
        let found = self.used.load_u16(INDEX, Ordering::Acquire);
        let outstanding = self.published.wrapping_sub(self.next_used);
        let ready = found.wrapping_sub(self.next_used);
        if ready > outstanding {
            return Err(RingError::UsedIndex {
                found,
                expected: self.next_used,
                outstanding,
            });
        }
        Ok(ready.into())
    }

    /// Used element number `at`: chain and length.
    #[inline(always)]
    fn element(&self, at: u16) -> (u32, u32) {
        let at = ENTRIES + 8 * usize::from(at & self.mask);
        let [id, len] = self
            .used
            .pairs(at, 1)
            .first()
            .map_or([0; 2], |pair| pair.load(Ordering::Relaxed));
        (id, len)
    }

    /// The oldest chain of a device that uses buffers in order. The last one of a batch has the length that the device wrote, those
    /// before it have no elements of their own and were used completely. Spec: virtio 1.4, 2.7.9.
    #[inline(always)]
    fn next_in_order(&mut self, at: u16) -> Option<(u32, u32)> {
        if !self.in_order {
            return None;
        }
        let oldest = self.ids.oldest()?;
        let (last, len) = match self.batch {
            Some(batch) => batch,
            None => {
                let (id, len) = self.element(at);
                match u16::try_from(id) {
                    Ok(last) if last != oldest && self.is_held(last) => {
                        self.batch = Some((last, len));
                        (last, len)
                    }
                    _ => return Some((id, len)),
                }
            }
        };
        if oldest == last {
            self.batch = None;
            return Some((oldest.into(), len));
        }
        Some((oldest.into(), self.shadow[usize::from(oldest)].writable))
    }

    fn is_held(&self, id: u16) -> bool {
        let shadow = self.shadow.get(usize::from(id));
        shadow.is_some_and(|shadow| shadow.chained > 0)
    }

    /// Frees the descriptors of a chain that came back; its head.
    #[inline(always)]
    fn free_chain(&mut self, id: u32, len: u32) -> Result<u16, RingError> {
        let head = u16::try_from(id)
            .ok()
            .filter(|&head| head < self.size)
            .ok_or(RingError::UsedId { id })?;
        let shadow = &mut self.shadow[usize::from(head)];
        let chained = std::mem::take(&mut shadow.chained);
        if chained == 0 {
            return Err(RingError::UsedId { id });
        }
        if len > shadow.writable {
            return Err(RingError::UsedLen {
                id,
                len,
                size: shadow.writable,
            });
        }
        self.ids.put(head);
        let mut index = head;
        for _ in 1..chained {
            index = self.shadow[usize::from(index)].written.next;
            self.ids.put(index);
        }
        Ok(head)
    }

    /// Where the device is to go on, as far as it is known: see [`crate::DriverQueue::base`].
    #[must_use]
    pub fn base(&self) -> u32 {
        self.next_used.into()
    }

    /// Whether the device has returned something.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.used.load_u16(INDEX, Ordering::Acquire) != self.next_used
    }

    /// Where the queue stands; see [`crate::DriverQueue::positions`].
    #[must_use]
    pub fn positions(&self) -> Positions {
        let published = self.used.load_u16(INDEX, Ordering::Acquire);
        Positions {
            avail: self.next_avail,
            used: self.next_used,
            wraps: None,
            published: Some(published),
            waiting: published.wrapping_sub(self.next_used).min(self.size),
        }
    }

    /// Asks for a call with the next buffer returned; whether some have been returned already.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.avail.store_u16(
                ENTRIES + 2 * usize::from(self.size),
                self.next_used,
                Ordering::Relaxed,
            );
        } else {
            self.avail.store_u16(FLAGS, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Says that calls are not needed. With EVENT_IDX the event that was asked for last simply falls behind.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.avail
                .store_u16(FLAGS, AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        }
    }
}

/// A buffer's descriptor; `next` continues the chain.
#[inline(always)]
fn describe(buffer: &DriverBuffer, next: Option<u16>) -> Descriptor {
    let mut flags = if buffer.writable { DESC_WRITE } else { 0 };
    if next.is_some() {
        flags |= DESC_NEXT;
    }
    Descriptor {
        addr: buffer.addr.0,
        len: buffer.len,
        flags,
        next: next.unwrap_or_default(),
    }
}
