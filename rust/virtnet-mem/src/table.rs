//! A checked table over shared memory: descriptors of a ring, resolved once, used for as long as the ring runs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapping::Mapping;

/// Entries of sixteen bytes, two words each, in shared memory. Owns its mapping, so it cannot outlive it.
///
/// Beside a [`Window`](crate::Window) it knows that every entry is aligned, so that one comparison checks an access, or that to a run
/// of [`entries`](Self::entries): descriptors are what a packet's way touches most. Words are little-endian. An access behind the
/// last entry is a defect of ours, not of the peer: loads give 0 and stores do nothing then, and debug builds panic.
#[derive(Clone)]
pub struct Table {
    /// Aligned to an entry.
    start: *mut TableEntry,
    len: usize,
    _mapping: Arc<Mapping>,
}

/// An entry of a [`Table`]: two words that others may change at any time.
#[derive(Debug)]
#[repr(transparent)]
pub struct TableEntry([AtomicU64; 2]);

impl TableEntry {
    /// Loads a word.
    #[inline(always)]
    #[must_use]
    pub fn load(&self, word: Word, ordering: Ordering) -> u64 {
        u64::from_le(self.word(word).load(ordering))
    }

    /// Stores a word.
    #[inline(always)]
    pub fn store(&self, word: Word, value: u64, ordering: Ordering) {
        self.word(word).store(value.to_le(), ordering);
    }

    #[inline(always)]
    fn word(&self, word: Word) -> &AtomicU64 {
        let [first, second] = &self.0;
        match word {
            Word::First => first,
            Word::Second => second,
        }
    }
}

/// One of the two words of an entry.
#[derive(Clone, Copy, Debug)]
pub enum Word {
    /// Bytes 0 to 7.
    First,
    /// Bytes 8 to 15.
    Second,
}

// SAFETY: the table only gives atomic access to memory that its own mapping keeps alive.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({} entries)", self.len)
    }
}

impl Table {
    /// Bytes of an entry, and its alignment.
    pub const ENTRY: usize = size_of::<TableEntry>();

    /// # Safety
    /// `len` entries from `start` must lie inside `mapping`, and `start` must be a multiple of [`Self::ENTRY`].
    pub(crate) unsafe fn new(start: *mut u8, len: usize, mapping: Arc<Mapping>) -> Self {
        Self {
            start: start.cast(),
            len,
            _mapping: mapping,
        }
    }

    /// How many entries it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries.
    #[inline(always)]
    #[must_use]
    pub fn entries(&self) -> &[TableEntry] {
        // SAFETY: `len` aligned entries from `start` are inside the mapping (constructor), which lives as long as the table; other sides
        // use their words as atomics too.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// The `n` entries from `first` on; none where there are fewer.
    #[inline(always)]
    #[must_use]
    pub fn run(&self, first: u16, n: u16) -> &[TableEntry] {
        let (first, n) = (usize::from(first), usize::from(n));
        let run = self.entries().get(first..first + n);
        debug_assert!(run.is_some(), "{n} entries from {first} of {self:?}");
        run.unwrap_or_default()
    }

    /// Loads a word of entry `i`.
    #[inline(always)]
    #[must_use]
    pub fn load(&self, i: usize, word: Word, ordering: Ordering) -> u64 {
        self.entry(i).map_or(0, |entry| entry.load(word, ordering))
    }

    /// Stores a word of entry `i`.
    #[inline(always)]
    pub fn store(&self, i: usize, word: Word, value: u64, ordering: Ordering) {
        if let Some(entry) = self.entry(i) {
            entry.store(word, value, ordering);
        }
    }

    /// Asks for the line of entry `i`, to read it soon.
    #[inline(always)]
    pub fn prefetch(&self, i: usize) {
        crate::slice::prefetch_read(self.start.wrapping_add(i).cast());
    }

    /// Asks to own the line of entry `i`, to write it soon. Only for what the peer has handed over already: a line that it still
    /// writes would be taken from it.
    #[inline(always)]
    pub fn prefetch_write(&self, i: usize) {
        crate::slice::prefetch_write(self.start.wrapping_add(i).cast());
    }

    /// Sets every byte to zero: for a ring's maker, before anyone else sees it.
    pub fn zero(&self) {
        // SAFETY: `len` entries from `start` are mapped and writable (constructor).
        unsafe { self.start.write_bytes(0, self.len) };
    }

    #[inline(always)]
    fn entry(&self, i: usize) -> Option<&TableEntry> {
        let entry = self.entries().get(i);
        debug_assert!(entry.is_some(), "entry {i} of {self:?}");
        entry
    }
}
