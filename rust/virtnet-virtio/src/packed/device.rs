//! The device side of a packed virtqueue: takes chains, gives them back used.

use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{
    GuestAddr, GuestMemory, LoggedArea, MemoryError, Table, Translate, Window, Word,
};

use super::layout::{
    ALIGN, DESC_AVAIL, DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_USED, DESC_WRITE, DESCS_A_LINE,
    EVENT_BYTES, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, EVENT_FLAGS, Position, parts,
    wants_event, word,
};
use super::recover;
use crate::chain::Entry;
use crate::inflight::PackedRecord;
use crate::split::device::{add_buffer, indirect_entries, read_indirect};
use crate::split::layout::Descriptor;
use crate::{
    Access, CHAINS_MAX, ChainBytes, ChainError, Chains, DESCS_MAX, Features, Positions,
    QueueConfig, RingError, StartError,
};

/// A running packed virtqueue, seen by the device. Its geometry does not change while it runs.
#[derive(Debug)]
pub struct PackedDevice {
    desc: Table,
    driver_event: Window,
    device_event: Window,
    size: u16,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    /// Next descriptor to read.
    next_avail: Position,
    /// Next used descriptor to write, ahead of what is published.
    next_used: Position,
    /// Slots taken and not given back: never more than the ring has, whatever the driver does to its flags meanwhile.
    held: u16,
    /// The first used descriptor of a batch, kept back until the batch is complete: a driver that polls sees all or nothing.
    first: Option<(u16, u64)>,
    /// The word that is kept back stands in the address of another descriptor: see [`super::recover`].
    first_is_noted: bool,
    /// Where `next_used` stood when the driver was last considered for a call; `None` after a start: notify in any case.
    signalled: Option<Position>,
    /// Region of the last buffer.
    hint: u32,
    /// How many chains the last burst had.
    last_taken: usize,
    /// What is written to, while that is logged.
    log: Option<Logged>,
    /// What is in flight, where that is recorded.
    record: Option<Box<PackedRecord>>,
    /// How many chains it takes again, as far as that is known.
    resumed: u16,
}

/// The descriptor ring and the device event suppression, as areas whose writes are logged.
#[derive(Debug)]
struct Logged {
    descriptors: Option<LoggedArea>,
    event: LoggedArea,
}

impl PackedDevice {
    /// Where to start on the ring that `config` describes, by its base and by what the descriptors say; see the module `recover`.
    ///
    /// # Errors
    /// [`StartError`] when the ring is not in memory, or neither it nor the base says where its last device had got to.
    pub fn recover(config: &QueueConfig, memory: &GuestMemory) -> Result<u32, StartError> {
        let desc = memory.table(config.desc_area, config.size.into())?;
        let (_, next_used) = positions(config);
        let here = recover::position(&desc, config.size, next_used);
        let here = here.ok_or(StartError::Lost { base: config.base })?;
        Ok(u32::from(here.bits()) | u32::from(here.bits()) << 16)
    }

    /// Starts with a record of what is in flight, which comes first; see [`crate::DeviceQueue::resume`].
    ///
    /// # Errors
    /// [`StartError`] as of [`Self::recover`], and when the record makes no sense.
    pub fn resume(
        config: &QueueConfig,
        memory: &GuestMemory,
        record: &Window,
    ) -> Result<Self, StartError> {
        let desc = memory.table(config.desc_area, config.size.into())?;
        let (base, resumed) = match PackedRecord::open(record, &desc, config.size)? {
            Some((here, resumed)) => (
                u32::from(here.bits()) | u32::from(here.bits()) << 16,
                resumed,
            ),
            None => (Self::recover(config, memory)?, 0),
        };
        let mut queue = Self::new(&QueueConfig { base, ..*config }, memory)?;
        let record = PackedRecord::begin(record.clone(), config.size, queue.next_used);
        queue.record = Some(Box::new(record));
        queue.resumed = resumed;
        Ok(queue)
    }

    /// How many chains it takes again; see [`crate::DeviceQueue::taken_again`].
    #[must_use]
    pub fn taken_again(&self) -> u16 {
        self.resumed
    }

    /// Starts on the ring that `config` describes, from its base. Spec: virtio 1.4, 2.8.
    ///
    /// # Errors
    /// [`MemoryError`] when a ring area is not aligned or not wholly in memory.
    pub fn new(config: &QueueConfig, memory: &GuestMemory) -> Result<Self, MemoryError> {
        let [_, driver_align, device_align] = ALIGN;
        let (next_avail, next_used) = positions(config);
        Ok(Self {
            desc: memory.table(config.desc_area, config.size.into())?,
            driver_event: memory.window(config.driver_area, EVENT_BYTES, driver_align)?,
            device_event: memory.window(config.device_area, EVENT_BYTES, device_align)?,
            size: config.size,
            event_idx: config.features.contains(Features::EVENT_IDX),
            indirect: config.features.contains(Features::INDIRECT_DESC),
            in_order: config.features.contains(Features::IN_ORDER),
            next_avail,
            next_used,
            held: 0,
            first: None,
            first_is_noted: false,
            signalled: None,
            hint: 0,
            last_taken: 0,
            log: None,
            record: None,
            resumed: 0,
        })
    }

    /// Logs from now on what is written to the descriptor ring and to the device event suppression.
    pub(crate) fn log_to(&mut self, descriptors: Option<LoggedArea>, event: LoggedArea) {
        self.log = Some(Logged { descriptors, event });
    }

    /// Takes up to `max` chains of buffers that allow `access`; how many. Chains that make no sense are among them, as errors. The bytes
    /// of plain ones are found on the way.
    ///
    /// # Errors
    /// None: a packed ring has no index that could lie. The form is the split queue's.
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
        let (mut at, mut held, mut n) = (self.next_avail, self.held, 0);
        if self.available(at).is_some() {
            self.prefetch_expected(max, access);
        }
        while n < max && held < self.size {
            let left = (self.size - at.slot).min(self.size - held);
            let most = left.min(slots_u16(max - n));
            let plain = self.take_plain(memory, access, at, most, chains, bytes);
            n += usize::from(plain);
            held += plain;
            at = at.advance(plain, self.size);
            if plain == most {
                continue;
            }
            // What was seen only ends the run: what is decided about it, is on another look.
            let Some((id, desc)) = self.available(at) else {
                break;
            };
            let from = (at, held);
            let Some(slots) = self.walk_unless_missed(memory, access, from, id, desc, chains)
            else {
                break;
            };
            n += 1;
            held += slots;
            at = at.advance(slots, self.size);
        }
        if self.record.is_some() {
            self.record_taken(chains.last(n));
        }
        (self.next_avail, self.held, self.last_taken) = (at, held, n);
        Ok(n)
    }

    /// Takes up to `most` chains from `at` on, up to the end of the ring, as long as each is one plain buffer: the usual case. How many.
    #[inline(always)]
    fn take_plain<'mem>(
        &mut self,
        memory: &'mem impl Translate,
        access: Access,
        at: Position,
        most: u16,
        chains: &mut Chains,
        bytes: &mut ChainBytes<'mem>,
    ) -> u16 {
        let writable = match access {
            Access::Write => DESC_WRITE,
            Access::Read | Access::Request => 0,
        };
        let wanted = at.available() | writable;
        let permission = access.permission();
        let mut hint = self.hint;
        let mut near = memory.extent(hint);
        let run = self.desc.run(at.slot, most);
        let n = chains.push_plain(run, bytes, |entry| {
            let (len, id, flags) = parts(entry.load(Word::Second, Ordering::Acquire));
            let kind = DESC_AVAIL | DESC_USED | DESC_NEXT | DESC_INDIRECT | DESC_WRITE;
            if flags & kind != wanted || len == 0 {
                return None;
            }
            let addr = GuestAddr(entry.load(Word::First, Ordering::Relaxed));
            let found = memory.translate_near(addr, len, permission, &mut hint, &mut near)?;
            Some((id, found))
        });
        self.hint = hint;
        slots_u16(n)
    }

    /// Records chains that lie from `next_avail` on.
    #[cold]
    #[inline(never)]
    fn record_taken(&mut self, entries: &[Entry]) {
        if let Some(record) = &mut self.record {
            let slots = entries.iter().map(|entry| entry.slots);
            record.take(&self.desc, self.next_avail, slots);
        }
    }

    /// Records that so many chains have been given back.
    #[cold]
    #[inline(never)]
    fn record_given(&mut self, n: usize) {
        if let Some(record) = &mut self.record {
            record.give(n);
        }
    }

    /// Asks for the lines of up to `max` descriptors that come next, so that their misses overlap. Only when the first is there, and only
    /// as many as the last burst had, because beyond that the driver may still be writing.
    #[inline(always)]
    fn prefetch_expected(&self, max: usize, access: Access) {
        // Lines whose descriptors will be given back one by one are fetched to be written.
        let only_read = self.in_order && access == Access::Read;
        let start = usize::from(self.next_avail.slot);
        for ahead in (0..self.last_taken.min(max)).step_by(DESCS_A_LINE.into()) {
            let mut slot = start + ahead;
            if slot >= self.size.into() {
                slot -= usize::from(self.size);
            }
            if only_read {
                self.desc.prefetch(slot);
            } else {
                self.desc.prefetch_write(slot);
            }
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
        let (mut at, mut held) = (self.next_avail, self.held);
        for _ in 0..most {
            let Some((id, desc)) = self.available(at).filter(|_| held < self.size) else {
                return;
            };
            scratch.clear();
            let slots = self.walk(memory, access, (at, held), id, desc, scratch);
            held += slots;
            at = at.advance(slots, self.size);
        }
    }

    /// Puts the last `n` chains back as if they had not been taken.
    pub fn untake(&mut self, n: usize, chains: &mut Chains) {
        if let Some(record) = &mut self.record {
            record.untake(n.min(chains.len()));
        }
        let slots = chains.pop(n);
        self.held -= slots;
        self.next_avail = self.next_avail.back(slots, self.size);
    }

    /// Marks chains from the `first` on used, each with so many bytes written. The driver sees them after [`Self::publish`].
    #[inline]
    pub fn give(&mut self, chains: &Chains, first: usize, lens: &[u32]) {
        let (mut at, mut slots) = (self.next_used, 0);
        let (mut entries, mut lens_left) = (chains.entries_from(first), lens);
        while !self.first_is_noted
            && let ([entry, rest @ ..], [len, rest_lens @ ..]) = (entries, lens_left)
        {
            self.write_used_noting(at, entry.slots, used_word(at, entry.id, *len));
            slots += entry.slots;
            at = at.advance(entry.slots, self.size);
            (entries, lens_left) = (rest, rest_lens);
        }
        while !entries.is_empty() && !lens_left.is_empty() {
            let given = self.give_plain(at, entries, lens_left);
            slots += given;
            at = at.advance(given, self.size);
            entries = entries.get(usize::from(given)..).unwrap_or_default();
            lens_left = lens_left.get(usize::from(given)..).unwrap_or_default();
            if let ([entry, rest @ ..], [len, rest_lens @ ..]) = (entries, lens_left)
                && entry.slots > 1
            {
                let word = used_word(at, entry.id, *len);
                self.note_span(at, entry.slots, word);
                self.store_rest(at.slot, word);
                slots += entry.slots;
                at = at.advance(entry.slots, self.size);
                (entries, lens_left) = (rest, rest_lens);
            }
        }
        self.next_used = at;
        self.held -= slots;
        if self.record.is_some() {
            self.record_given(lens.len().min(chains.len().saturating_sub(first)));
        }
    }

    /// Marks chains from `at` on used, up to the end of the ring, as long as each is one slot: the usual case. How many.
    #[inline(always)]
    fn give_plain(&self, at: Position, entries: &[Entry], lens: &[u32]) -> u16 {
        let run = self.desc.run(at.slot, self.size - at.slot).iter();
        let mut n = 0;
        for ((descriptor, entry), &len) in run.zip(entries).zip(lens) {
            if entry.slots > 1 {
                break;
            }
            let word = used_word(at, entry.id, len);
            descriptor.store(Word::Second, word, Ordering::Release);
            n += 1;
        }
        n
    }

    /// Marks all chains used with nothing written: one used descriptor says it for all where the driver expects that.
    #[inline]
    pub fn give_all(&mut self, chains: &Chains) {
        match chains.entries() {
            // Spec: virtio 1.4, 2.8.7, In-order use of descriptors: the id of the last, in the place of the first.
            entries @ [.., last] if self.in_order => {
                let slots = entries.iter().map(|entry| entry.slots).sum();
                let at = self.next_used;
                self.write_used_noting(at, slots, used_word(at, last.id, 0));
                self.next_used = at.advance(slots, self.size);
                self.held -= slots;
                if self.record.is_some() {
                    self.record_given(entries.len());
                }
            }
            entries => self.give(chains, 0, &[0; CHAINS_MAX][..entries.len()]),
        }
    }

    /// Marks `slots` slots from `at` on used, when they are of the first two chains of a batch or several, so that a device that comes
    /// after this one can tell how far it got: see [`super::recover`]. What is noted stands where a used descriptor has nothing: in
    /// its address, or in a slot that the driver passes over.
    #[inline(never)]
    fn write_used_noting(&mut self, at: Position, slots: u16, rest: u64) {
        if slots > 1 {
            self.note_span(at, slots, rest);
        }
        let Some((_, first)) = self.first else {
            self.first = Some((at.slot, rest));
            self.first_is_noted = slots > 1;
            return;
        };
        if !std::mem::replace(&mut self.first_is_noted, true) {
            self.note(at.slot, first);
        }
        self.store_rest(at.slot, rest);
    }

    /// Says in the last of several slots that were used as a whole how many they are, and what the first of them says.
    #[cold]
    #[inline(never)]
    fn note_span(&self, at: Position, slots: u16, rest: u64) {
        let last = at.advance(slots - 1, self.size);
        self.note(last.slot, rest);
        self.store_rest(last.slot, last_word(last, slots, rest));
    }

    fn note(&self, slot: u16, rest: u64) {
        self.desc
            .store(slot.into(), Word::First, rest, Ordering::Relaxed);
    }

    /// Lets the driver see everything given back; whether it is to be called.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let Some((slot, rest)) = self.first.take() else {
            return false;
        };
        self.first_is_noted = false;
        if let Some(record) = &mut self.record {
            record.before_publish(self.next_used);
        }
        self.store_rest(slot, rest);
        if let Some(record) = &mut self.record {
            record.after_publish(self.next_used);
        }
        if let Some(log) = &self.log {
            self.log_used(log, slot);
        }
        // The descriptors must be visible before the driver's wish is read, or both sides may wait for ever.
        fence(Ordering::SeqCst);
        let event = self.driver_event.load_u32(0, Ordering::Relaxed);
        match self.signalled.replace(self.next_used) {
            None => true,
            Some(since) => wants_event(event, since, self.next_used, self.size),
        }
    }

    /// Marks all that a device writes; see [`crate::DeviceQueue::log_all`].
    pub(crate) fn log_all(&self) {
        if let Some(log) = &self.log {
            if let Some(descriptors) = &log.descriptors {
                descriptors.mark(0..DESC_SIZE * usize::from(self.size));
            }
            log.event.mark(0..EVENT_BYTES);
        }
    }

    /// Marks the descriptors of a batch that began in slot `first`.
    #[cold]
    fn log_used(&self, log: &Logged, first: u16) {
        let Some(log) = &log.descriptors else {
            return;
        };
        let descriptor = |slot: u16| DESC_SIZE * usize::from(slot);
        let end = self.next_used.slot;
        if first < end {
            log.mark(descriptor(first)..descriptor(end));
        } else {
            log.mark(descriptor(first)..descriptor(self.size));
            log.mark(0..descriptor(end));
        }
    }

    /// Whether chains wait to be taken.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.available(self.next_avail).is_some()
    }

    /// Asks for a kick with the next chain; whether chains are waiting already.
    pub fn arm(&mut self) -> bool {
        let flags = if self.event_idx {
            EVENT_DESC
        } else {
            EVENT_ENABLE
        };
        let event = u32::from(self.next_avail.bits()) | u32::from(flags) << 16;
        self.device_event.store_u32(0, event, Ordering::Release);
        self.log_event();
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Says that kicks are not needed.
    pub fn disarm(&mut self) {
        self.device_event
            .store_u16(EVENT_FLAGS, EVENT_DISABLE, Ordering::Relaxed);
        self.log_event();
    }

    fn log_event(&self) {
        if let Some(log) = &self.log {
            log.event.mark(0..EVENT_BYTES);
        }
    }

    /// Where to go on after a stop: the form of SET_VRING_BASE, both halves. Everything taken must have been given back.
    #[must_use]
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// Where the queue stands; see [`crate::DeviceQueue::positions`].
    #[must_use]
    pub fn positions(&self) -> Positions {
        let slots = (0..self.size).map(|n| self.next_avail.advance(n, self.size));
        let waiting = slots.take_while(|&at| self.available(at).is_some()).count();
        Positions {
            avail: self.next_avail.slot,
            used: self.next_used.slot,
            wraps: Some([self.next_avail.wrap, self.next_used.wrap]),
            published: None,
            waiting: u16::try_from(waiting).unwrap_or(self.size),
        }
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor at `at` and its buffer id, if the driver has made it available.
    #[inline]
    fn available(&self, at: Position) -> Option<(u16, Descriptor)> {
        let rest = self
            .desc
            .load(at.slot.into(), Word::Second, Ordering::Acquire);
        let (id, desc) = self.descriptor(at.slot, rest);
        at.is_available(desc.flags).then_some((id, desc))
    }

    #[inline]
    fn descriptor(&self, slot: u16, rest: u64) -> (u16, Descriptor) {
        let addr = self.desc.load(slot.into(), Word::First, Ordering::Relaxed);
        let (len, id, flags) = parts(rest);
        (
            id,
            Descriptor {
                addr,
                len,
                flags,
                next: 0,
            },
        )
    }

    #[inline]
    fn store_rest(&self, slot: u16, rest: u64) {
        self.desc
            .store(slot.into(), Word::Second, rest, Ordering::Release);
    }

    /// As [`walk`](Self::walk), unless a place was missed: then the chain stays where it is, and what is behind it, until its place
    /// is known.
    #[inline(never)]
    fn walk_unless_missed(
        &self,
        memory: &impl Translate,
        access: Access,
        from: (Position, u16),
        id: u16,
        desc: Descriptor,
        chains: &mut Chains,
    ) -> Option<u16> {
        let slots = self.walk(memory, access, from, id, desc, chains);
        if memory.has_missed() {
            chains.pop(1);
            return None;
        }
        Some(slots)
    }

    /// Takes a chain that is more than one plain buffer: several descriptors, an indirect table, several regions, or nonsense. How
    /// many slots it has; `from` is where it begins and how many are held before it.
    ///
    /// The list is followed to its end even when it is wrong, because its id stands in its last descriptor.
    #[inline(never)]
    fn walk(
        &self,
        memory: &impl Translate,
        access: Access,
        from: (Position, u16),
        id: u16,
        desc: Descriptor,
        chains: &mut Chains,
    ) -> u16 {
        let first = chains.mark();
        let ((mut at, held), mut id, mut desc, mut slots) = (from, id, desc, 1);
        let mut walked = self.walk_one(memory, access, desc, Ok(0), slots, chains);
        while desc.flags & DESC_NEXT != 0 {
            if held + slots == self.size {
                walked = Err(ChainError::TooLong);
                break;
            }
            at = at.advance(1, self.size);
            slots += 1;
            let rest = self
                .desc
                .load(at.slot.into(), Word::Second, Ordering::Relaxed);
            (id, desc) = self.descriptor(at.slot, rest);
            walked = self.walk_one(memory, access, desc, walked, slots, chains);
        }
        chains.close(id, slots, first, walked);
        slots
    }

    fn walk_one(
        &self,
        memory: &impl Translate,
        access: Access,
        desc: Descriptor,
        so_far: Result<u32, ChainError>,
        slots: u16,
        chains: &mut Chains,
    ) -> Result<u32, ChainError> {
        let total = so_far?;
        if slots > DESCS_MAX {
            return Err(ChainError::TooLong);
        }
        if desc.flags & DESC_INDIRECT == 0 {
            return add_buffer(memory, access, desc, total, chains);
        }
        if !self.indirect || desc.flags & DESC_NEXT != 0 || slots > 1 {
            return Err(ChainError::Indirect);
        }
        self.walk_table(memory, access, desc, chains)
    }

    /// Entries follow each other; only WRITE means something in them. Spec: virtio 1.4, 2.8.8, Indirect Descriptors.
    fn walk_table(
        &self,
        memory: &impl Translate,
        access: Access,
        table: Descriptor,
        chains: &mut Chains,
    ) -> Result<u32, ChainError> {
        let entries = indirect_entries(table.len, self.size)?;
        if entries > DESCS_MAX {
            return Err(ChainError::TooLong);
        }
        let mut total = 0;
        for index in 0..entries {
            // Read in the split form, where flags and next stand in the place of id and flags.
            let entry = read_indirect(memory, table.addr, index)?;
            let desc = Descriptor {
                flags: entry.next & DESC_WRITE,
                next: 0,
                ..entry
            };
            total = add_buffer(memory, access, desc, total, chains)?;
        }
        Ok(total)
    }
}

/// A number of chains or slots, which is at most that of [`CHAINS_MAX`] or of the ring.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "a ring has at most 32768 slots"
)]
fn slots_u16(n: usize) -> u16 {
    n as u16
}

/// Second word of a used descriptor at `at`.
#[inline(always)]
fn used_word(at: Position, id: u16, len: u32) -> u64 {
    let written = if len > 0 { DESC_WRITE } else { 0 };
    word(len, id, at.used() | written)
}

/// Second word of the last of `slots` slots that were used as a whole: how many, and the id in the first one's word.
fn last_word(at: Position, slots: u16, first: u64) -> u64 {
    let [.., a, b, _, _] = first.to_le_bytes();
    word(u32::from(slots), u16::from_le_bytes([a, b]), at.used())
}

/// Where a queue is to go on reading, and writing.
fn positions(config: &QueueConfig) -> (Position, Position) {
    let [a, b, c, d] = config.base.to_le_bytes();
    let (avail, used) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    let next_avail = Position::from_bits(avail, config.size);
    // DPDK's virtio-user gives a fresh ring 0x8000: the used half is left out, and equal.
    let next_used = if config.base == 0x8000 {
        Position::START
    } else {
        Position::from_bits(used, config.size)
    };
    (next_avail, next_used)
}
