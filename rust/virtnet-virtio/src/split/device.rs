//! The device side of a split virtqueue: takes chains, gives them back used.

use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{
    GuestAddr, GuestMemory, LoggedArea, MemoryError, Pair32, Permission, Segment, Table, Translate,
    Window,
};

use super::layout::{
    ALIGN, AVAIL_NO_INTERRUPT, DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, Descriptor,
    ENTRIES, FLAGS, INDEX, USED_NO_NOTIFY, avail_bytes, used_bytes,
};
use crate::chain::Entry;
use crate::inflight::SplitRecord;
use crate::notify::need_event;
use crate::{
    Access, CHAINS_MAX, ChainBytes, ChainError, Chains, DESCS_MAX, Features, Positions,
    QueueConfig, RingError, StartError,
};

/// A running split virtqueue, seen by the device. Its geometry does not change while it runs.
#[derive(Debug)]
pub struct SplitDevice {
    desc: Table,
    avail: Window,
    used: Window,
    size: u16,
    mask: u16,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    /// Next available entry to read; free-running.
    next_avail: u16,
    /// The driver's available index as last read.
    seen_avail: u16,
    /// Next used entry to write; free-running, ahead of what is published.
    next_used: u16,
    /// The used index as last published.
    published: u16,
    /// Used index up to which the driver has been considered for a call; `None` after a start: notify in any case.
    signalled: Option<u16>,
    /// Region of the last buffer.
    hint: u32,
    /// The used ring, while what is written to it is logged.
    log: Option<LoggedArea>,
    /// What is in flight, where that is recorded.
    record: Option<Box<SplitRecord>>,
    /// What another device had taken and not given back, out of the ring's order: the heads up to index `again_end`.
    again: Box<[u16]>,
    again_end: u16,
    /// How many chains it takes again, as far as that is known.
    resumed: u16,
}

impl SplitDevice {
    /// Starts on the rings that `config` describes, where their used index stands. Spec: virtio 1.4, 2.7.
    ///
    /// # Errors
    /// [`MemoryError`] when a ring area is not aligned or not wholly in memory.
    pub fn new(config: &QueueConfig, memory: &GuestMemory) -> Result<Self, MemoryError> {
        let event_idx = config.features.contains(Features::EVENT_IDX);
        let [_, avail_align, used_align] = ALIGN;
        let used = memory.window(
            config.device_area,
            used_bytes(config.size, event_idx),
            used_align,
        )?;
        // How far the ring has got stands in the ring itself, and a base that differs is out of date: this device gives back all
        // that it takes, so where it stops both are equal, and where it was killed nobody could ask it. DPDK's virtio-user says
        // 0 then. What a device before this one had taken and not given back is taken again instead of being lost to the driver.
        let next_used = used.load_u16(INDEX, Ordering::Acquire);
        #[expect(clippy::cast_possible_truncation, reason = "the index is the low half")]
        let ahead = (config.base as u16).wrapping_sub(next_used);
        Ok(Self {
            desc: memory.table(config.desc_area, config.size.into())?,
            avail: memory.window(
                config.driver_area,
                avail_bytes(config.size, event_idx),
                avail_align,
            )?,
            used,
            size: config.size,
            mask: config.size - 1,
            event_idx,
            indirect: config.features.contains(Features::INDIRECT_DESC),
            in_order: config.features.contains(Features::IN_ORDER),
            next_avail: next_used,
            seen_avail: next_used,
            next_used,
            published: next_used,
            signalled: None,
            hint: 0,
            log: None,
            record: None,
            again: Box::default(),
            again_end: 0,
            resumed: if ahead <= config.size { ahead } else { 0 },
        })
    }

    /// The same with a record of what is in flight, which comes first; see [`crate::DeviceQueue::resume`].
    ///
    /// # Errors
    /// [`StartError`] when a ring area is not in memory, or the record makes no sense.
    pub fn resume(
        config: &QueueConfig,
        memory: &GuestMemory,
        record: &Window,
    ) -> Result<Self, StartError> {
        let mut queue = Self::new(config, memory)?;
        let (record, heads, taken) =
            SplitRecord::open(record.clone(), queue.size, queue.next_used)?;
        queue.record = Some(Box::new(record));
        let count = u16::try_from(heads.len()).unwrap_or(u16::MAX);
        let available = queue.avail.load_u16(INDEX, Ordering::Acquire);
        if count > available.wrapping_sub(queue.next_used) {
            return Err(StartError::Record("more is in flight than was available"));
        }
        // A device in between that knows nothing of it leaves an old number.
        queue.resumed = taken.min(available.wrapping_sub(queue.next_used));
        // Mostly they are what comes next anyway.
        let next = |k: u16| queue.head(queue.next_used.wrapping_add(k));
        if !(0..count).map(next).eq(heads.iter().copied()) {
            queue.again = heads.into();
            queue.again_end = queue.next_used.wrapping_add(count);
        }
        Ok(queue)
    }

    /// How many chains it takes again; see [`crate::DeviceQueue::taken_again`].
    #[must_use]
    pub fn taken_again(&self) -> u16 {
        self.resumed
    }

    /// Logs from now on what is written to the used ring.
    pub(crate) fn log_to(&mut self, used: LoggedArea) {
        self.log = Some(used);
    }

    /// Takes up to `max` chains of buffers that allow `access`; how many. Chains that make no sense are among them, as errors. The bytes
    /// of plain ones are found on the way.
    ///
    /// # Errors
    /// [`RingError`] when the available ring cannot be followed; what was taken before stands in `chains`.
    #[inline(always)]
    pub fn take<'mem>(
        &mut self,
        memory: &'mem impl Translate,
        access: Access,
        max: usize,
        chains: &mut Chains,
        bytes: &mut ChainBytes<'mem>,
    ) -> Result<usize, RingError> {
        let max = max.min(chains.room());
        if !self.again.is_empty() {
            let n = self.take_again(memory, access, max, chains);
            if n > 0 || memory.has_missed() {
                return Ok(n);
            }
        }
        let mut pending = usize::from(self.seen_avail.wrapping_sub(self.next_avail));
        if pending < max {
            let found = self.avail.load_u16(INDEX, Ordering::Acquire);
            let ahead = found.wrapping_sub(self.next_avail);
            if ahead > self.size {
                return Err(RingError::AvailIndex {
                    found,
                    expected: self.next_avail,
                    size: self.size,
                });
            }
            self.seen_avail = found;
            pending = usize::from(ahead);
        }
        let n = pending.min(max);
        let (mut at, mut taken) = (self.next_avail, 0);
        while taken < n {
            let plain = self.take_plain(memory, access, at, n - taken, chains, bytes);
            taken += usize::from(plain);
            at = at.wrapping_add(plain);
            if taken == n || (plain > 0 && at & self.mask == 0) {
                continue;
            }
            // What was seen only ended the run: what is decided about it, is on another look.
            let head = self.head(at);
            if head >= self.size {
                self.next_avail = at;
                return Err(RingError::HeadRange {
                    head,
                    size: self.size,
                });
            }
            self.walk(memory, access, head, self.descriptor(head), chains);
            if memory.has_missed() {
                // It stays where it is, and what is behind it, until its place is known.
                chains.pop(1);
                break;
            }
            taken += 1;
            at = at.wrapping_add(1);
        }
        self.next_avail = at;
        if let Some(record) = &mut self.record {
            if !self.again.is_empty() {
                record.take(chains.last(taken).iter().map(|entry| entry.id));
            }
            record.tell_taken(at);
        }
        Ok(taken)
    }

    /// Takes up to `most` chains from index `at` on, up to the end of the ring, as long as each is one plain buffer: the usual case. How
    /// many.
    #[inline(always)]
    fn take_plain<'mem>(
        &mut self,
        memory: &'mem impl Translate,
        access: Access,
        at: u16,
        most: usize,
        chains: &mut Chains,
        bytes: &mut ChainBytes<'mem>,
    ) -> u16 {
        let wanted = match access {
            Access::Write => DESC_WRITE,
            Access::Read | Access::Request => 0,
        };
        let permission = access.permission();
        let mut hint = self.hint;
        let mut near = memory.extent(hint);
        let slot = usize::from(at & self.mask);
        let most = most.min(usize::from(self.size) - slot);
        let heads = self.avail.words(ENTRIES + 2 * slot, most);
        let descriptors = self.desc.entries();
        let n = chains.push_plain(heads, bytes, |head| {
            let head = head.load(Ordering::Relaxed);
            let desc = Descriptor::of(descriptors.get(usize::from(head))?);
            let kind = DESC_NEXT | DESC_INDIRECT | DESC_WRITE;
            if desc.flags & kind != wanted || desc.len == 0 {
                return None;
            }
            let addr = GuestAddr(desc.addr);
            let found = memory.translate_near(addr, desc.len, permission, &mut hint, &mut near)?;
            Some((head, found))
        });
        self.hint = hint;
        #[expect(clippy::cast_possible_truncation, reason = "at most CHAINS_MAX")]
        {
            n as u16
        }
    }

    /// Looks at up to `most` chains that could be taken next, so that `memory` can say where it misses something.
    pub fn look_ahead(
        &self,
        memory: &impl Translate,
        access: Access,
        most: u16,
        scratch: &mut Chains,
    ) {
        let found = self.avail.load_u16(INDEX, Ordering::Acquire);
        let ahead = found.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return;
        }
        // What was in flight comes first, and not from the available ring.
        let left = usize::from(self.again_end.wrapping_sub(self.next_avail));
        let again = self
            .again
            .len()
            .checked_sub(left)
            .map(|from| &self.again[from..]);
        let again = again.unwrap_or_default();
        let fresh = (0..ahead).skip(again.len());
        let fresh = fresh.map(|k| self.head(self.next_avail.wrapping_add(k)));
        for head in again.iter().copied().chain(fresh).take(most.into()) {
            if head >= self.size {
                return;
            }
            scratch.clear();
            self.walk(memory, access, head, self.descriptor(head), scratch);
        }
    }

    /// Takes what was in flight when another device was killed, while there is some; how many.
    #[cold]
    fn take_again(
        &mut self,
        memory: &impl Translate,
        access: Access,
        max: usize,
        chains: &mut Chains,
    ) -> usize {
        let until_end = |at: u16| match usize::from(self.again_end.wrapping_sub(at)) {
            left if left <= self.again.len() => left,
            _ => 0,
        };
        let left = until_end(self.next_avail);
        if left == 0 {
            // When all of them have been given back, what is in flight is what the ring says. To wait until nothing is would be too
            // late in a queue that is never empty: indexes come round.
            if until_end(self.published) == 0 {
                self.again = Box::default();
            }
            return 0;
        }
        let heads = &self.again[self.again.len() - left..][..left.min(max)];
        let mut n = 0;
        for &head in heads {
            self.walk(memory, access, head, self.descriptor(head), chains);
            if memory.has_missed() {
                chains.pop(1);
                break;
            }
            n += 1;
        }
        self.next_avail = self
            .again_end
            .wrapping_sub(u16::try_from(left - n).unwrap_or(0));
        // What comes behind them has not been looked at.
        self.seen_avail = self.next_avail;
        n
    }

    /// The head at index `at` of the available ring.
    fn head(&self, at: u16) -> u16 {
        let slot = usize::from(at & self.mask);
        self.avail.load_u16(ENTRIES + 2 * slot, Ordering::Relaxed)
    }

    /// Puts the last `n` chains back as if they had not been taken.
    ///
    /// A record goes on saying that they are in flight: they come next in any case, and while it was changed one by one a crash
    /// would leave a gap in it, behind which nobody could tell what was taken.
    pub fn untake(&mut self, n: usize, chains: &mut Chains) {
        let slots = chains.pop(n);
        self.next_avail = self.next_avail.wrapping_sub(slots);
        if !self.again.is_empty() {
            self.seen_avail = self.next_avail;
        }
        if let Some(record) = &self.record {
            record.tell_taken(self.next_avail);
        }
    }

    /// Marks chains from the `first` on used, each with so many bytes written. The driver sees them after [`Self::publish`].
    #[inline]
    pub fn give(&mut self, chains: &Chains, first: usize, lens: &[u32]) {
        let given = chains.entries_from(first);
        let mut entries = given.iter().zip(lens);
        let mut at = self.next_used;
        while entries.len() > 0 {
            // Up to the end of the ring, and then from its start.
            let slot = usize::from(at & self.mask);
            let elements = self.elements(slot, entries.len());
            for (element, (entry, &len)) in elements.iter().zip(&mut entries) {
                element.store([entry.id.into(), len], Ordering::Relaxed);
            }
            #[expect(clippy::cast_possible_truncation, reason = "at most CHAINS_MAX")]
            {
                at = at.wrapping_add(elements.len() as u16);
            }
        }
        self.next_used = at;
        self.record_given(given, lens.len());
    }

    /// Up to `most` used elements, from that in `slot` on.
    #[inline(always)]
    fn elements(&self, slot: usize, most: usize) -> &[Pair32] {
        let n = most.min(usize::from(self.size) - slot);
        self.used.pairs(ENTRIES + 8 * slot, n)
    }

    /// Marks all chains used with nothing written: one used element says it for all where the driver expects that.
    #[inline]
    pub fn give_all(&mut self, chains: &Chains) {
        match chains.entries() {
            // Spec: virtio 1.4, 2.7.9, In-order use of descriptors: the id of the last, in the place of the first.
            entries @ [.., last] if self.in_order => {
                if let [element] = self.elements(usize::from(self.next_used & self.mask), 1) {
                    element.store([last.id.into(), 0], Ordering::Relaxed);
                }
                #[expect(clippy::cast_possible_truncation, reason = "at most CHAINS_MAX")]
                {
                    self.next_used = self.next_used.wrapping_add(entries.len() as u16);
                }
                self.record_given(entries, entries.len());
            }
            entries => self.give(chains, 0, &[0; CHAINS_MAX][..entries.len()]),
        }
    }

    /// Records that the first `n` chains of `entries` have been given back.
    #[inline]
    fn record_given(&mut self, entries: &[Entry], n: usize) {
        if let Some(record) = &mut self.record {
            record.give(entries.iter().take(n).map(|entry| entry.id));
        }
    }

    /// Lets the driver see everything given back; whether it is to be called.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        if let Some(record) = &mut self.record {
            record.before_publish();
        }
        self.used.store_u16(INDEX, new, Ordering::Release);
        self.published = new;
        if let Some(record) = &mut self.record {
            record.after_publish(new);
        }
        if let Some(log) = &self.log {
            self.log_used(log, old, new);
        }
        // The index must be visible before the driver's wish is read, or both sides may wait for ever.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.avail.load_u16(FLAGS, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0;
        }
        let event = self
            .avail
            .load_u16(ENTRIES + 2 * usize::from(self.size), Ordering::Relaxed);
        match self.signalled.replace(new) {
            None => true,
            Some(since) => need_event(event, new, since),
        }
    }

    /// Marks all that a device writes; see [`crate::DeviceQueue::log_all`].
    pub(crate) fn log_all(&self) {
        if let Some(log) = &self.log {
            log.mark(0..used_bytes(self.size, self.event_idx));
        }
    }

    /// Marks the used elements from `old` up to `new`, and the used index.
    #[cold]
    fn log_used(&self, log: &LoggedArea, old: u16, new: u16) {
        let element = |slot: usize| ENTRIES + 8 * slot;
        let (first, size) = (usize::from(old & self.mask), usize::from(self.size));
        let end = first + usize::from(new.wrapping_sub(old));
        log.mark(element(first)..element(end.min(size)));
        log.mark(element(0)..element(end.saturating_sub(size)));
        log.mark(INDEX..INDEX + 2);
    }

    /// Whether chains wait to be taken.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.avail.load_u16(INDEX, Ordering::Acquire) != self.next_avail
    }

    /// Asks for a kick with the next chain; whether chains are waiting already.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.store_wish(self.avail_event(), self.next_avail);
        } else {
            self.store_wish(FLAGS, 0);
        }
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Says that kicks are not needed. With EVENT_IDX the event that was asked for last simply falls behind.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.store_wish(FLAGS, USED_NO_NOTIFY);
        }
    }

    /// Stores when kicks are wanted: an event, or flags.
    fn store_wish(&self, at: usize, wish: u16) {
        self.used.store_u16(at, wish, Ordering::Relaxed);
        if let Some(log) = &self.log {
            log.mark(at..at + 2);
        }
    }

    /// Where to go on after a stop: the form of SET_VRING_BASE. Everything taken must have been given back.
    #[must_use]
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    /// Where the queue stands; see [`crate::DeviceQueue::positions`].
    #[must_use]
    pub fn positions(&self) -> Positions {
        let published = self.avail.load_u16(INDEX, Ordering::Acquire);
        Positions {
            avail: self.next_avail,
            used: self.next_used,
            wraps: None,
            published: Some(published),
            waiting: published.wrapping_sub(self.next_avail).min(self.size),
        }
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    fn avail_event(&self) -> usize {
        ENTRIES + 8 * usize::from(self.size)
    }

    #[inline]
    fn descriptor(&self, index: u16) -> Descriptor {
        let entry = self.desc.entries().get(usize::from(index));
        entry.map_or_else(Descriptor::default, Descriptor::of)
    }

    /// Takes a chain that is more than one plain buffer: several descriptors, an indirect table, several regions, or nonsense.
    #[inline(never)]
    fn walk(
        &self,
        memory: &impl Translate,
        access: Access,
        head: u16,
        desc: Descriptor,
        chains: &mut Chains,
    ) {
        let first = chains.mark();
        let walked = self.walk_direct(memory, access, desc, chains);
        chains.close(head, 1, first, walked);
    }

    fn walk_direct(
        &self,
        memory: &impl Translate,
        access: Access,
        mut desc: Descriptor,
        chains: &mut Chains,
    ) -> Result<u32, ChainError> {
        let mut total = 0;
        for _ in 0..self.size.min(DESCS_MAX) {
            if desc.flags & DESC_INDIRECT != 0 {
                if !self.indirect || desc.flags & DESC_NEXT != 0 {
                    return Err(ChainError::Indirect);
                }
                return self.walk_table(memory, access, desc, total, chains);
            }
            total = add_buffer(memory, access, desc, total, chains)?;
            if desc.flags & DESC_NEXT == 0 {
                return Ok(total);
            }
            if desc.next >= self.size {
                return Err(ChainError::NextRange);
            }
            desc = self.descriptor(desc.next);
        }
        Err(ChainError::TooLong)
    }

    /// Spec: virtio 1.4, 2.7.5.3, Indirect Descriptors.
    fn walk_table(
        &self,
        memory: &impl Translate,
        access: Access,
        table: Descriptor,
        mut total: u32,
        chains: &mut Chains,
    ) -> Result<u32, ChainError> {
        let entries = indirect_entries(table.len, self.size)?;
        let mut index = 0;
        for _ in 0..entries.min(DESCS_MAX) {
            let desc = read_indirect(memory, table.addr, index)?;
            if desc.flags & DESC_INDIRECT != 0 {
                return Err(ChainError::Indirect);
            }
            total = add_buffer(memory, access, desc, total, chains)?;
            if desc.flags & DESC_NEXT == 0 {
                return Ok(total);
            }
            if desc.next >= entries {
                return Err(ChainError::NextRange);
            }
            index = desc.next;
        }
        Err(ChainError::TooLong)
    }
}

/// Entries of an indirect table of `len` bytes; no more than the ring has, so that one chain cannot cost more than another.
pub(crate) fn indirect_entries(len: u32, size: u16) -> Result<u16, ChainError> {
    let entries = len / 16;
    match u16::try_from(entries) {
        Ok(entries) if len.is_multiple_of(16) && (1..=size).contains(&entries) => Ok(entries),
        _ => Err(ChainError::IndirectLen),
    }
}

/// Reads entry `index` of the indirect table at `addr`.
pub(crate) fn read_indirect(
    memory: &impl Translate,
    addr: u64,
    index: u16,
) -> Result<Descriptor, ChainError> {
    let at = addr
        .checked_add(16 * u64::from(index))
        .ok_or(ChainError::Address)?;
    let mut bytes = [0; DESC_SIZE];
    let mut filled = 0;
    let whole = memory.translate_all(GuestAddr(at), 16, Permission::READ, |segment| {
        let piece = memory.memory().slice(segment);
        filled += piece.copy_to(&mut bytes[filled..]);
    });
    if !whole {
        return Err(ChainError::Address);
    }
    Ok(Descriptor::from_bytes(bytes))
}

/// Adds the buffer of one descriptor to the chain being walked; the chain's length with it.
pub(crate) fn add_buffer(
    memory: &impl Translate,
    access: Access,
    desc: Descriptor,
    total: u32,
    chains: &mut Chains,
) -> Result<u32, ChainError> {
    let writable = desc.flags & DESC_WRITE != 0;
    let fits = match access {
        Access::Read => !writable,
        Access::Write => writable,
        Access::Request => chains.request_buffer(writable),
    };
    if !fits {
        return Err(ChainError::Direction);
    }
    let total = total.checked_add(desc.len).ok_or(ChainError::TooBig)?;
    let each = |segment: Segment| chains.push_segment(segment);
    let wanted = if writable {
        Access::Write.permission()
    } else {
        Access::Read.permission()
    };
    let addr = GuestAddr(desc.addr);
    if !memory.translate_all(addr, desc.len, wanted, each) {
        return Err(ChainError::Address);
    }
    Ok(total)
}
