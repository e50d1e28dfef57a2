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

/// A little-endian word of 16 bits that others may change at any time.
#[derive(Debug)]
#[repr(transparent)]
pub struct Word16(AtomicU16);

impl Word16 {
    /// Loads it.
    #[inline(always)]
    #[must_use]
    pub fn load(&self, ordering: Ordering) -> u16 {
        u16::from_le(self.0.load(ordering))
    }

    /// Stores it.
    #[inline(always)]
    pub fn store(&self, value: u16, ordering: Ordering) {
        self.0.store(value.to_le(), ordering);
    }
}

/// Two little-endian words of 32 bits that others may change at any time, each by itself.
#[derive(Debug)]
#[repr(transparent)]
pub struct Pair32([AtomicU32; 2]);

impl Pair32 {
    /// Loads both.
    #[inline(always)]
    #[must_use]
    pub fn load(&self, ordering: Ordering) -> [u32; 2] {
        let [first, second] = &self.0;
        [first, second].map(|word| u32::from_le(word.load(ordering)))
    }

    /// Stores both.
    #[inline(always)]
    pub fn store(&self, [a, b]: [u32; 2], ordering: Ordering) {
        let [first, second] = &self.0;
        first.store(a.to_le(), ordering);
        second.store(b.to_le(), ordering);
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

    /// The `n` words of 16 bits from byte `offset` on, checked once for all of them; none where there are not as many.
    #[inline(always)]
    #[must_use]
    pub fn words(&self, offset: usize, n: usize) -> &[Word16] {
        if !self.holds_words(offset, n.saturating_mul(2), 2) {
            return &[];
        }
        // SAFETY: the words are inside the mapping and aligned (checked above); other sides use them as atomics too.
        unsafe { std::slice::from_raw_parts(self.start.wrapping_add(offset).cast(), n) }
    }

    /// The `n` pairs of 32-bit words from byte `offset` on, checked once for all of them; none where there are not as many.
    #[inline(always)]
    #[must_use]
    pub fn pairs(&self, offset: usize, n: usize) -> &[Pair32] {
        if !self.holds_words(offset, n.saturating_mul(8), 4) {
            return &[];
        }
        // SAFETY: the pairs are inside the mapping and aligned (checked above); other sides use their words as atomics too.
        unsafe { std::slice::from_raw_parts(self.start.wrapping_add(offset).cast(), n) }
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
