//! A checked window over a fixed structure in shared memory: a ring area, resolved once, used for as long as the ring runs.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::mapping::Mapping;

/// A run of shared memory that holds ring words. Owns its mapping, so it cannot outlive it.
///
/// Words are little-endian, at offsets from the window's start that are multiples of their size. An access outside the window
/// is a defect of ours, not of the peer (offsets are masked or bounded before): loads give 0 and stores do nothing then, and
/// debug builds panic.
#[derive(Clone)]
pub struct Window {
    start: *mut u8,
    len: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: the window only gives atomic access to memory that its own mapping keeps alive.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Window({} bytes)", self.len)
    }
}

macro_rules! word {
    ($load:ident, $store:ident, $word:ty, $atomic:ty, $what:literal) => {
        #[doc = concat!("Loads the little-endian ", $what, " at byte `offset`.")]
        #[inline(always)]
        #[must_use]
        pub fn $load(&self, offset: usize, ordering: Ordering) -> $word {
            if !self.holds(offset, size_of::<$word>()) {
                return 0;
            }
            // SAFETY: the offset is inside the mapping and aligned (checked above); other sides use it as an atomic too.
            let word = unsafe { <$atomic>::from_ptr(self.start.add(offset).cast::<$word>()) };
            <$word>::from_le(word.load(ordering))
        }

        #[doc = concat!("Stores the little-endian ", $what, " at byte `offset`.")]
        #[inline(always)]
        pub fn $store(&self, offset: usize, value: $word, ordering: Ordering) {
            if !self.holds(offset, size_of::<$word>()) {
                return;
            }
            // SAFETY: the offset is inside the mapping and aligned (checked above); other sides use it as an atomic too.
            let word = unsafe { <$atomic>::from_ptr(self.start.add(offset).cast::<$word>()) };
            word.store(value.to_le(), ordering);
        }
    };
}

impl Window {
    /// # Safety
    /// `len` bytes from `start` must lie inside `mapping`.
    pub(crate) unsafe fn new(start: *mut u8, len: usize, mapping: Arc<Mapping>) -> Self {
        Self {
            start,
            len,
            _mapping: mapping,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    word!(load_u16, store_u16, u16, AtomicU16, "u16");
    word!(load_u32, store_u32, u32, AtomicU32, "u32");
    word!(load_u64, store_u64, u64, AtomicU64, "u64");

    /// Loads two little-endian words, the first at byte `offset`; one check for both.
    #[inline(always)]
    #[must_use]
    pub fn load_u32_pair(&self, offset: usize, ordering: Ordering) -> [u32; 2] {
        if !self.holds_words(offset, 8, 4) {
            return [0; 2];
        }
        [offset, offset + 4].map(|offset| {
            let at = self.start.wrapping_add(offset);
            // SAFETY: both words are inside the mapping and aligned (checked above); other sides use them as atomics too.
            let word = unsafe { AtomicU32::from_ptr(at.cast::<u32>()) };
            u32::from_le(word.load(ordering))
        })
    }

    /// Stores two little-endian words, the first at byte `offset`; one check for both.
    #[inline(always)]
    pub fn store_u32_pair(&self, offset: usize, values: [u32; 2], ordering: Ordering) {
        if !self.holds_words(offset, 8, 4) {
            return;
        }
        for (k, value) in values.into_iter().enumerate() {
            let at = self.start.wrapping_add(offset + 4 * k);
            // SAFETY: both words are inside the mapping and aligned (checked above); other sides use them as atomics too.
            let word = unsafe { AtomicU32::from_ptr(at.cast::<u32>()) };
            word.store(value.to_le(), ordering);
        }
    }

    /// Sets every byte to zero: for a ring's maker, before anyone else sees it.
    pub fn zero(&self) {
        // SAFETY: `len` bytes from `start` are mapped and writable (constructor).
        unsafe { self.start.write_bytes(0, self.len) };
    }

    #[inline(always)]
    fn holds(&self, offset: usize, size: usize) -> bool {
        self.holds_words(offset, size, size)
    }

    #[inline(always)]
    fn holds_words(&self, offset: usize, size: usize, align: usize) -> bool {
        let fits = offset.checked_add(size).is_some_and(|end| end <= self.len);
        let aligned = self.start.addr().wrapping_add(offset) & (align - 1) == 0;
        debug_assert!(
            fits && aligned,
            "word of {size} bytes at {offset} of a window of {}",
            self.len
        );
        fits && aligned
    }
}
