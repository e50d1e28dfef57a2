//! Bytes of guest memory, borrowed: to copy in, to copy out, never to point at.

use std::fmt;
use std::marker::PhantomData;

use crate::copy::copy_bytes;

/// Bytes of a cache line, as far as it matters here.
const LINE: usize = 64;

/// A run of guest bytes. The peer may change them at any time, so they can only be copied.
#[derive(Clone, Copy)]
pub struct GuestSlice<'mem> {
    start: *mut u8,
    len: usize,
    memory: PhantomData<&'mem ()>,
}

impl fmt::Debug for GuestSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestSlice({} bytes)", self.len)
    }
}

impl<'mem> GuestSlice<'mem> {
    /// # Safety
    /// `len` bytes from `start` must stay mapped, readable and writable, for `'mem`.
    #[inline]
    pub(crate) unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self {
            start,
            len,
            memory: PhantomData,
        }
    }

    /// No bytes.
    #[inline]
    #[must_use]
    pub fn empty() -> Self {
        Self {
            start: std::ptr::dangling_mut(),
            len: 0,
            memory: PhantomData,
        }
    }

    /// Where it begins, to tell the kernel.
    pub(crate) fn start(&self) -> *const u8 {
        self.start
    }

    /// Length in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `n` bytes and the rest (everything and nothing when there are fewer).
    #[inline]
    #[must_use]
    pub fn split_at(self, n: usize) -> (Self, Self) {
        let n = n.min(self.len);
        let rest = Self {
            start: self.start.wrapping_add(n),
            len: self.len - n,
            memory: PhantomData,
        };
        (Self { len: n, ..self }, rest)
    }

    /// Copies the first bytes out into `dst`, as many as both have; how many.
    #[inline]
    pub fn copy_to(&self, dst: &mut [u8]) -> usize {
        let n = self.len.min(dst.len());
        // SAFETY: `n` bytes are mapped here (constructor) and present in `dst`.
        unsafe { copy_bytes(self.start, dst.as_mut_ptr(), n) };
        n
    }

    /// Copies `src` in over the first bytes, as many as both have; how many.
    #[inline]
    pub fn copy_from(&self, src: &[u8]) -> usize {
        let n = self.len.min(src.len());
        // SAFETY: `n` bytes are mapped and writable here (constructor) and present in `src`.
        unsafe { copy_bytes(src.as_ptr(), self.start, n) };
        n
    }

    /// Copies the first bytes into other guest memory, as many as both have; how many.
    #[inline]
    pub fn copy_to_guest(&self, dst: &GuestSlice<'_>) -> usize {
        let n = self.len.min(dst.len);
        // SAFETY: `n` bytes are mapped on both sides (constructors); an overlap can only be a peer's aliasing.
        unsafe { copy_bytes(self.start, dst.start, n) };
        n
    }

    /// The first `N` bytes in one read, or `None` when there are fewer.
    #[inline]
    #[must_use]
    pub fn read<const N: usize>(&self) -> Option<[u8; N]> {
        if self.len < N {
            return None;
        }
        // SAFETY: `N` bytes are mapped (checked above); the copy is what every decision is taken on.
        Some(unsafe { self.start.cast::<[u8; N]>().read_unaligned() })
    }

    /// Copies as many bytes as `dst` has out, if there are as many: moves in line, however many that are.
    #[inline(always)]
    #[must_use]
    pub fn copy_whole<const N: usize>(&self, dst: &mut [u8; N]) -> bool {
        const { assert!(N.is_multiple_of(LINE), "whole lines") };
        if self.len < N {
            return false;
        }
        for at in (0..N).step_by(LINE) {
            let (from, to) = (
                self.start.wrapping_add(at),
                dst.as_mut_ptr().wrapping_add(at),
            );
            // SAFETY: a line from `at` is mapped here and present in `dst`, which has `N` bytes as checked for this slice.
            unsafe { from.copy_to_nonoverlapping(to, LINE) };
        }
        true
    }

    /// Copies all of `src` in over the first bytes, if there are as many: moves in line, however many that are.
    #[inline(always)]
    #[must_use]
    pub fn copy_whole_from<const N: usize>(&self, src: &[u8; N]) -> bool {
        const { assert!(N.is_multiple_of(LINE), "whole lines") };
        if self.len < N {
            return false;
        }
        for at in (0..N).step_by(LINE) {
            let (from, to) = (src.as_ptr().wrapping_add(at), self.start.wrapping_add(at));
            // SAFETY: a line from `at` is present in `src` and mapped and writable here, as checked for `N` bytes.
            unsafe { from.copy_to_nonoverlapping(to, LINE) };
        }
        true
    }

    /// Asks for the lines of the first `len` bytes, to read them soon; for the first one whatever `len` is.
    #[inline(always)]
    pub fn prefetch(&self, len: usize) {
        prefetch_read(self.start);
        if len > LINE {
            self.further_lines(len, prefetch_read);
        }
    }

    /// The same to own them, and write them soon. Only for what the peer has handed over.
    #[inline(always)]
    pub fn prefetch_write(&self, len: usize) {
        prefetch_write(self.start);
        if len > LINE {
            self.further_lines(len, prefetch_write);
        }
    }

    /// The same of the line `offset` bytes on.
    #[inline(always)]
    pub fn prefetch_write_at(&self, offset: usize) {
        prefetch_write(self.start.wrapping_add(offset));
    }

    #[inline(always)]
    fn further_lines(&self, len: usize, fetch: impl Fn(*const u8)) {
        let end = len.min(self.len);
        let mut line = LINE;
        while line < end {
            fetch(self.start.wrapping_add(line));
            line += LINE;
        }
    }
}

#[inline(always)]
pub(crate) fn prefetch_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast::<i8>());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[inline(always)]
pub(crate) fn prefetch_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address, and changes no byte. (A processor without it does nothing.)
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
