//! The record of a split queue: which heads are in flight, and in which order they were taken.
//!
//! A device that gives back in the order in which it took has in flight exactly what the available ring says behind the used
//! index. Whoever goes on with the queue finds that there by itself, so of those heads nothing is recorded: writing each of them
//! down three times was a third of the time of switching short packets. What counts is recorded where the order is another one,
//! which is when a device before this one has left it so; and how far the ring was taken, which is for people to know.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use virtnet_mem::Window;

use super::{DESC_NUM, VERSION, is_written};
use crate::StartError;

/// Head of the list of what was given back last.
const LAST_BATCH_HEAD: usize = 12;
/// The used index that belongs to it.
const USED_INDEX: usize = 14;
/// Where the states of descriptors begin, and bytes of each.
pub(super) const ENTRIES: usize = 16;
pub(super) const ENTRY: usize = 16;
/// In a state: whether it is in flight (with padding), the next of the last batch, when it was taken.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
/// In the padding of the first state, where everyone else leaves it alone: the available index up to which chains were taken, and
/// a number that says that it is there.
const TAKEN: usize = ENTRIES + 2;
const TAKEN_TAG: usize = ENTRIES + 4;
const TAG: u16 = 0x766e;

/// The record of a running split queue.
#[derive(Debug)]
pub(crate) struct SplitRecord {
    region: Window,
    /// Which heads are recorded as in flight, and how many.
    in_flight: Box<[bool]>,
    recorded: usize,
    counter: u64,
    last_batch_head: u16,
    /// What has been given back and is not published.
    given: Vec<u16>,
}

impl SplitRecord {
    /// Takes the record up where a queue of `size` entries has its used index at `used`; with the heads that are in flight, in the
    /// order in which they were taken, and how many that are together with those of which nothing is recorded.
    pub(crate) fn open(
        region: Window,
        size: u16,
        used: u16,
    ) -> Result<(Self, Vec<u16>, u16), StartError> {
        let mut record = Self {
            region,
            in_flight: vec![false; size.into()].into(),
            recorded: 0,
            counter: 0,
            last_batch_head: 0,
            given: Vec::with_capacity(crate::CHAINS_MAX),
        };
        if !is_written(&record.region, size)? {
            (0..size).for_each(|head| record.mark(head, false));
            record.region.store_u64(0, 0, Relaxed);
            record.region.store_u16(DESC_NUM, size, Relaxed);
            record.region.store_u16(LAST_BATCH_HEAD, 0, Relaxed);
            record.region.store_u16(USED_INDEX, used, Relaxed);
            record.region.store_u16(TAKEN, used, Relaxed);
            record.region.store_u16(TAKEN_TAG, TAG, Relaxed);
            record.region.store_u16(VERSION, 1, Release);
            return Ok((record, Vec::new(), 0));
        }
        record.finish_batch(size, used)?;
        let mut found: Vec<_> = (0..size)
            .filter(|&head| record.load(head, INFLIGHT) & 0xff == 1)
            .map(|head| (record.region.load_u64(at(head, COUNTER), Relaxed), head))
            .collect();
        found.sort_unstable();
        record.counter = found.last().map_or(0, |&(last, _)| last.wrapping_add(1));
        for &(_, head) in &found {
            record.in_flight[usize::from(head)] = true;
        }
        record.recorded = found.len();
        let ahead = record.region.load_u16(TAKEN, Relaxed).wrapping_sub(used);
        let is_told = record.region.load_u16(TAKEN_TAG, Relaxed) == TAG && ahead <= size;
        let heads: Vec<_> = found.into_iter().map(|(_, head)| head).collect();
        let count = match u16::try_from(heads.len()).unwrap_or(size) {
            0 if is_told => ahead,
            recorded => recorded,
        };
        Ok((record, heads, count))
    }

    /// Says that chains have been taken up to available index `at`.
    #[inline]
    pub(crate) fn tell_taken(&self, at: u16) {
        self.region.store_u16(TAKEN, at, Relaxed);
    }

    /// What was published last is not in flight any more, though the device did not live to say so.
    fn finish_batch(&mut self, size: u16, used: u16) -> Result<(), StartError> {
        let published = used.wrapping_sub(self.region.load_u16(USED_INDEX, Acquire));
        if published > size {
            return Err(StartError::Record(
                "it is of another ring: the used index is far from it",
            ));
        }
        self.last_batch_head = self.region.load_u16(LAST_BATCH_HEAD, Relaxed) % size;
        let mut head = self.last_batch_head;
        for _ in 0..published {
            if head >= size {
                return Err(StartError::Record(
                    "its last batch names a descriptor that is none",
                ));
            }
            self.mark(head, false);
            head = self.load(head, NEXT);
        }
        self.region.store_u16(USED_INDEX, used, Release);
        Ok(())
    }

    /// Chains have been taken while others are in flight that the ring does not say.
    pub(crate) fn take(&mut self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            // One that was in flight before the device was killed, or was put back, keeps its place.
            if std::mem::replace(&mut self.in_flight[usize::from(head)], true) {
                continue;
            }
            self.region
                .store_u64(at(head, COUNTER), self.counter, Relaxed);
            self.counter = self.counter.wrapping_add(1);
            self.mark(head, true);
            self.recorded += 1;
        }
    }

    /// Chains have been given back; the driver cannot see it yet.
    #[inline]
    pub(crate) fn give(&mut self, heads: impl Iterator<Item = u16>) {
        if self.recorded > 0 {
            self.given.extend(heads);
        }
    }

    /// Before the used index moves: which chains it will be for.
    #[inline]
    pub(crate) fn before_publish(&mut self) {
        if self.given.is_empty() {
            return;
        }
        for &head in &self.given {
            self.region
                .store_u16(at(head, NEXT), self.last_batch_head, Relaxed);
            self.last_batch_head = head;
        }
        self.region
            .store_u16(LAST_BATCH_HEAD, self.last_batch_head, Release);
    }

    /// After the used index has moved to `used`.
    #[inline]
    pub(crate) fn after_publish(&mut self, used: u16) {
        for &head in &self.given {
            let was = std::mem::replace(&mut self.in_flight[usize::from(head)], false);
            self.recorded -= usize::from(was);
            self.mark(head, false);
        }
        self.given.clear();
        self.region.store_u16(USED_INDEX, used, Release);
    }

    fn mark(&self, head: u16, in_flight: bool) {
        self.region
            .store_u16(at(head, INFLIGHT), in_flight.into(), Release);
    }

    fn load(&self, head: u16, field: usize) -> u16 {
        self.region.load_u16(at(head, field), Relaxed)
    }
}

/// Where a field of the state of a head is.
fn at(head: u16, field: usize) -> usize {
    ENTRIES + ENTRY * usize::from(head) + field
}
