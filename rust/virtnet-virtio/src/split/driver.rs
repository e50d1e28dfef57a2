//! The driver side of a split virtqueue: makes buffers available, takes them back used.

use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{GuestMemory, MemoryError, Table, Window, Word};

use super::layout::{
    ALIGN, AVAIL_NO_INTERRUPT, DESC_NEXT, DESC_WRITE, Descriptor, ENTRIES, FLAGS, INDEX,
    USED_NO_NOTIFY, avail_bytes, used_bytes,
};
use crate::notify::need_event;
use crate::{DriverBuffer, Features, QueueConfig, RingError, Used};

/// What we know of one descriptor; the table itself is shared and never read back.
#[derive(Clone, Copy, Debug, Default)]
struct Shadow {
    /// What stands in the shared table.
    written: Descriptor,
    /// For the head of a chain that the device holds: its descriptors, else 0.
    chained: u16,
    /// For such a head: bytes that the device may write.
    writable: u32,
    /// What stands in the shared available ring, at the slot of this number.
    avail_entry: u16,
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
    /// Free descriptors, taken from the front and put back behind: a queue that returns in order keeps descriptor `i` in slot
    /// `i`, and neither the table nor the available ring changes from lap to lap.
    free: Box<[u16]>,
    free_head: u16,
    n_free: u16,
    /// Next available entry to write; free-running, ahead of what is published.
    next_avail: u16,
    published: u16,
    /// Next used entry to read.
    next_used: u16,
    /// In order: chains of a batch whose one used element has been seen, still to be reported; and that element's length.
    batch: u16,
    batch_len: u32,
    /// In order: heads that the device holds, oldest first, at the slot they were made available in.
    heads: Box<[u16]>,
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
            free: (0..size).collect(),
            free_head: 0,
            n_free: size,
            next_avail: 0,
            published: 0,
            next_used: 0,
            batch: 0,
            batch_len: 0,
            heads: vec![0; usize::from(size)].into(),
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
        let head = self.free[usize::from(self.free_head & self.mask)];
        let mut writable = 0_u32;
        for (k, buffer) in buffers.iter().enumerate() {
            let index = self.free[usize::from(self.free_head & self.mask)];
            self.free_head = self.free_head.wrapping_add(1);
            let mut desc = Descriptor {
                addr: buffer.addr.0,
                len: buffer.len,
                flags: 0,
                next: 0,
            };
            if buffer.writable {
                desc.flags |= DESC_WRITE;
                writable = writable.saturating_add(buffer.len);
            }
            if k + 1 < buffers.len() {
                desc.flags |= DESC_NEXT;
                desc.next = self.free[usize::from(self.free_head & self.mask)];
            }
            self.write_descriptor(index, desc);
        }
        self.n_free -= n;
        let slot = usize::from(self.next_avail & self.mask);
        let shadow = &mut self.shadow[usize::from(head)];
        shadow.chained = n;
        shadow.writable = writable;
        self.heads[slot] = head;
        if self.shadow[slot].avail_entry != head {
            self.shadow[slot].avail_entry = head;
            self.avail
                .store_u16(ENTRIES + 2 * slot, head, Ordering::Relaxed);
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(head)
    }

    /// Stores only the words that differ: an unchanged line stays in both caches.
    #[inline]
    fn write_descriptor(&mut self, index: u16, desc: Descriptor) {
        let written = &mut self.shadow[usize::from(index)].written;
        let at = usize::from(index);
        if written.addr != desc.addr {
            self.desc
                .store(at, Word::First, desc.addr, Ordering::Relaxed);
        }
        if written.rest() != desc.rest() {
            self.desc
                .store(at, Word::Second, desc.rest(), Ordering::Relaxed);
        }
        *written = desc;
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
    #[inline]
    pub fn reap(&mut self, used: &mut [Used]) -> Result<usize, RingError> {
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
        let n = usize::from(ready).min(used.len());
        for place in used.iter_mut().take(n) {
            *place = self.take_back()?;
        }
        Ok(n)
    }

    #[inline]
    fn take_back(&mut self) -> Result<Used, RingError> {
        let slot = usize::from(self.next_used & self.mask);
        let (id, len) = if self.batch > 0 {
            // The rest of an in-order batch has no elements of its own. Spec: virtio 1.4, 2.7.9.
            self.batch -= 1;
            self.oldest_of_batch(slot)
        } else {
            let entry = ENTRIES + 8 * slot;
            let id = self.used.load_u32(entry, Ordering::Relaxed);
            let len = self.used.load_u32(entry + 4, Ordering::Relaxed);
            if self.in_order && id != u32::from(self.heads[slot]) {
                self.batch = self.batch_up_to(id)?;
                self.batch_len = len;
                self.oldest_of_batch(slot)
            } else {
                (id, len)
            }
        };

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
        let mut index = head;
        for _ in 0..chained {
            let back = self.free_head.wrapping_add(self.n_free) & self.mask;
            self.free[usize::from(back)] = index;
            self.n_free += 1;
            index = self.shadow[usize::from(index)].written.next;
        }
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Used { id: head, len })
    }

    /// How many chains an in-order device has returned behind the oldest, when it names `id` as the last.
    fn batch_up_to(&self, id: u32) -> Result<u16, RingError> {
        let outstanding = self.published.wrapping_sub(self.next_used);
        (1..outstanding)
            .find(|&k| {
                let slot = self.next_used.wrapping_add(k) & self.mask;
                u32::from(self.heads[usize::from(slot)]) == id
            })
            .ok_or(RingError::UsedId { id })
    }

    /// The oldest chain of a batch: the last one has the length that the device wrote, the others were used completely.
    fn oldest_of_batch(&self, slot: usize) -> (u32, u32) {
        let head = self.heads[slot];
        let len = if self.batch == 0 {
            self.batch_len
        } else {
            self.shadow[usize::from(head)].writable
        };
        (u32::from(head), len)
    }

    /// Whether the device has returned something.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.used.load_u16(INDEX, Ordering::Acquire) != self.next_used
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
