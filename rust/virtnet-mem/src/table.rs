//! A checked table over shared memory: descriptors of a ring, resolved once, used for as long as the ring runs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapping::Mapping;

/// Entries of sixteen bytes, two words each, in shared memory. Owns its mapping, so it cannot outlive it.
///
/// Beside a [`Window`](crate::Window) it knows that every entry is aligned, so that one comparison checks an access: descriptors
/// are what a packet's way touches most. Words are little-endian. An access behind the last entry is a defect of ours, not of the
/// peer: loads give 0 and stores do nothing then, and debug builds panic.
#[derive(Clone)]
pub struct Table {
    /// Aligned to an entry.
    start: *mut Entry,
    len: usize,
    _mapping: Arc<Mapping>,
}

type Entry = [u64; 2];

/// One of the two words of an entry.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
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
    pub const ENTRY: usize = size_of::<Entry>();

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

    /// Loads a word of entry `i`.
    #[inline(always)]
    #[must_use]
    pub fn load(&self, i: usize, word: Word, ordering: Ordering) -> u64 {
        match self.word(i, word) {
            Some(word) => u64::from_le(word.load(ordering)),
            None => 0,
        }
    }

    /// Stores a word of entry `i`.
    #[inline(always)]
    pub fn store(&self, i: usize, word: Word, value: u64, ordering: Ordering) {
        if let Some(word) = self.word(i, word) {
            word.store(value.to_le(), ordering);
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
    fn word(&self, i: usize, word: Word) -> Option<&AtomicU64> {
        debug_assert!(i < self.len, "entry {i} of a table of {}", self.len);
        if i >= self.len {
            return None;
        }
        let at = self
            .start
            .wrapping_add(i)
            .cast::<u64>()
            .wrapping_add(word as usize);
        // SAFETY: the entry is inside the mapping (checked above), which lives as long as the table, and its words are aligned
        // (constructor); other sides use them as atomics too.
        Some(unsafe { AtomicU64::from_ptr(at) })
    }
}
