//! The record of a packed queue: the descriptors in flight, because their slots may have been written over.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use virtnet_mem::{Table, Window, Word};

use super::{DESC_NUM, VERSION, is_written};
use crate::StartError;
use crate::packed::layout::{DESC_AVAIL, DESC_USED, Position};

/// Next free entry, and before what is being given back: two halves of a word.
const FREE_HEADS: usize = 12;
/// Next used slot, the same before what is being given back, and the wrap counters of both: quarters of a word.
const USED_PLACES: usize = 16;
/// Where the entries begin, and bytes of each.
pub(super) const ENTRIES: usize = 32;
pub(super) const ENTRY: usize = 32;
/// In an entry: whether a chain in flight begins there (with padding), the next one of its chain or of the free ones, the last one of
/// the chain, how many the chain has, when it was taken, and two words of the descriptor.
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const NUM: usize = 6;
const COUNTER: usize = 8;
const REST: usize = 16;
const ADDR: usize = 24;

/// The record of a running packed queue.
#[derive(Debug)]
pub(crate) struct PackedRecord {
    region: Window,
    size: u16,
    /// The entry behind each entry; `size` ends the list.
    next: Box<[u16]>,
    free_head: u16,
    /// The next used slot as the driver knows it.
    used: Position,
    counter: u64,
    /// Chains in flight: first and last entry.
    held: VecDeque<(u16, u16)>,
    /// How many of them have been given back and are not published.
    given: usize,
}

impl PackedRecord {
    /// Takes the record up: the place where the queue is to go on with how many chains that were in flight, or `None` where it does
    /// not know one. They stand in the ring from there on, available once more: the slots behind the next used one are the device's,
    /// and what they say is between the device and itself.
    pub(crate) fn open(
        region: &Window,
        desc: &Table,
        size: u16,
    ) -> Result<Option<(Position, u16)>, StartError> {
        if !is_written(region, size)? {
            return Ok(None);
        }
        let places = region.load_u64(USED_PLACES, Acquire).to_le_bytes();
        let [a, b, c, d, wrap, old_wrap, _, _] = places;
        let place = |slot, wrap| Position {
            slot,
            wrap: wrap != 0,
        };
        let used = place(u16::from_le_bytes([a, b]), wrap);
        let mut start = place(u16::from_le_bytes([c, d]), old_wrap);
        if used.slot >= size || start.slot >= size {
            return Err(StartError::Record("its used slot is outside the ring"));
        }
        let [a, b, c, d] = region.load_u32(FREE_HEADS, Relaxed).to_le_bytes();
        let (free_head, mut old_free_head) =
            (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        if used != start {
            let [.., a, b] = desc
                .load(start.slot.into(), Word::Second, Acquire)
                .to_le_bytes();
            // Whether the driver was shown what was being given back.
            if !start.is_available(u16::from_le_bytes([a, b])) {
                (start, old_free_head) = (used, free_head);
            }
        }
        let chains = Chains::read(region, size, old_free_head)?;
        let mut at = start;
        for (rest, addr) in chains.descriptors {
            let [.., a, b] = rest.to_le_bytes();
            let flags = u16::from_le_bytes([a, b]) & !(DESC_AVAIL | DESC_USED) | at.available();
            let rest = rest & !(0xffff << 48) | u64::from(flags) << 48;
            desc.store(at.slot.into(), Word::First, addr, Relaxed);
            desc.store(at.slot.into(), Word::Second, rest, Release);
            at = at.advance(1, size);
        }
        Ok(Some((start, chains.count)))
    }

    /// Begins a record in which nothing is in flight. While it is written it says nothing; the ring says it all.
    pub(crate) fn begin(region: Window, size: u16, used: Position) -> Self {
        region.store_u16(VERSION, 0, Release);
        let record = Self {
            region,
            size,
            next: (1..=size).collect(),
            free_head: 0,
            used,
            counter: 0,
            held: VecDeque::with_capacity(size.into()),
            given: 0,
        };
        for entry in 0..size {
            record.store(entry, INFLIGHT, 0);
            record.store(entry, NEXT, entry + 1);
        }
        record.region.store_u64(0, 0, Relaxed);
        record.region.store_u16(DESC_NUM, size, Relaxed);
        record.store_free_heads();
        record.store_places(used, used);
        record.region.store_u16(VERSION, 1, Release);
        record
    }

    /// Chains have been taken whose descriptors lie in `desc` from `from` on: how many slots each has. They are in flight together,
    /// when they are not free any more.
    pub(crate) fn take(&mut self, desc: &Table, from: Position, slots: impl Iterator<Item = u16>) {
        let mut at = from;
        for slots in slots {
            let (first, mut entry, mut last) = (self.free_head, self.free_head, self.free_head);
            for _ in 0..slots {
                // Copied, not read: whoever takes it up looks at it as at any descriptor.
                let words = [Word::First, Word::Second]
                    .map(|word| desc.load(at.slot.into(), word, Relaxed));
                self.store_u64(entry, ADDR, words[0]);
                self.store_u64(entry, REST, words[1].rotate_left(32));
                last = entry;
                entry = self.next_of(entry);
                at = at.advance(1, self.size);
            }
            self.store_u64(first, COUNTER, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.store_head(first, last, slots);
            self.free_head = entry;
            self.held.push_back((first, last));
        }
        self.store_free_heads();
    }

    /// The last `n` chains have been put back.
    pub(crate) fn untake(&mut self, n: usize) {
        for _ in 0..n {
            let Some((first, last)) = self.held.pop_back() else {
                return;
            };
            self.store(first, INFLIGHT, 0);
            self.free(first, last);
            self.store_free_heads();
        }
    }

    /// The first `n` chains have been given back; the driver cannot see it yet.
    pub(crate) fn give(&mut self, n: usize) {
        self.given += n;
    }

    /// Before the driver can see it: where the next used slot will be, and which entries will be free.
    #[cold]
    pub(crate) fn before_publish(&mut self, used: Position) {
        for k in 0..self.given.min(self.held.len()) {
            let (first, last) = self.held[k];
            self.free(first, last);
        }
        self.region.store_u16(FREE_HEADS, self.free_head, Release);
        self.store_places(used, self.used);
    }

    /// After the driver can see it.
    #[cold]
    pub(crate) fn after_publish(&mut self, used: Position) {
        let given = std::mem::take(&mut self.given).min(self.held.len());
        for (first, _) in self.held.drain(..given) {
            let field = at(first, INFLIGHT);
            self.region.store_u16(field, 0, Release);
        }
        self.used = used;
        self.store_free_heads();
        self.store_places(used, used);
    }

    /// Puts the entries from `first` to `last` in front of the free ones.
    fn free(&mut self, first: u16, last: u16) {
        if let Some(next) = self.next.get_mut(usize::from(last)) {
            *next = self.free_head;
        }
        self.store(last, NEXT, self.free_head);
        self.free_head = first;
    }

    fn next_of(&self, entry: u16) -> u16 {
        self.next
            .get(usize::from(entry))
            .copied()
            .unwrap_or(self.size)
    }

    fn store_free_heads(&self) {
        let both = u32::from(self.free_head) | u32::from(self.free_head) << 16;
        self.region.store_u32(FREE_HEADS, both, Release);
    }

    fn store_places(&self, used: Position, old: Position) {
        let slots = u64::from(used.slot) | u64::from(old.slot) << 16;
        let wraps = u64::from(used.wrap) | u64::from(old.wrap) << 8;
        self.region
            .store_u64(USED_PLACES, slots | wraps << 32, Release);
    }

    /// Says in one word that a chain in flight begins at `first`, and ends at `last` after `num` entries.
    fn store_head(&self, first: u16, last: u16, num: u16) {
        if first < self.size {
            let fields = [1, self.next_of(first), last, num];
            let word = fields
                .iter()
                .rev()
                .fold(0, |word, &field| word << 16 | u64::from(field));
            self.region.store_u64(at(first, INFLIGHT), word, Release);
        }
    }

    fn store(&self, entry: u16, field: usize, value: u16) {
        if entry < self.size {
            self.region.store_u16(at(entry, field), value, Release);
        }
    }

    fn store_u64(&self, entry: u16, field: usize, value: u64) {
        if entry < self.size {
            self.region.store_u64(at(entry, field), value, Relaxed);
        }
    }
}

/// Descriptors in flight as a record has them: second and first words, chain by chain in the order in which they were taken.
struct Chains {
    descriptors: Vec<(u64, u64)>,
    count: u16,
}

impl Chains {
    /// Reads what is in flight and not free.
    fn read(region: &Window, size: u16, free_head: u16) -> Result<Self, StartError> {
        let load = |entry, field| region.load_u16(at(entry, field), Relaxed);
        let mut seen = vec![false; size.into()];
        let mut see = |entry: u16| {
            let place = seen.get_mut(usize::from(entry));
            place.is_some_and(|seen| !std::mem::replace(seen, true))
        };
        let mut entry = free_head;
        while entry < size {
            if !see(entry) {
                return Err(StartError::Record("its list of free entries has no end"));
            }
            entry = load(entry, NEXT);
        }
        let is_free = seen.clone();
        let mut see = |entry: u16| {
            let place = seen.get_mut(usize::from(entry));
            place.is_some_and(|seen| !std::mem::replace(seen, true))
        };
        let mut heads: Vec<_> = (0..size)
            .filter(|&entry| !is_free[usize::from(entry)] && load(entry, INFLIGHT) & 0xff == 1)
            .map(|entry| (region.load_u64(at(entry, COUNTER), Relaxed), entry))
            .collect();
        heads.sort_unstable();
        let mut descriptors = Vec::new();
        let count = u16::try_from(heads.len()).unwrap_or(size);
        for (_, head) in heads {
            let (mut entry, num) = (head, load(head, NUM));
            for k in 0..num {
                if !see(entry) {
                    return Err(StartError::Record(
                        "its chains share entries, or leave them",
                    ));
                }
                let rest = region.load_u64(at(entry, REST), Relaxed).rotate_right(32);
                descriptors.push((rest, region.load_u64(at(entry, ADDR), Relaxed)));
                if k + 1 < num {
                    entry = load(entry, NEXT);
                }
            }
            if num == 0 {
                return Err(StartError::Record("it has a chain without descriptors"));
            }
        }
        Ok(Self { descriptors, count })
    }
}

/// Where a field of an entry is.
fn at(entry: u16, field: usize) -> usize {
    ENTRIES + ENTRY * usize::from(entry) + field
}
