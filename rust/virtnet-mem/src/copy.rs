//! One copy routine for bytes that another process may be writing.

/// Copies `len` bytes from `src` to `dst`; short copies are a few wide moves in line, longer ones a call.
///
/// Every length between a width and its double is two moves of that width, which may overlap.
///
/// # Safety
/// `src` must be readable and `dst` writable for `len` bytes. They must not overlap unless they are the same shared memory
/// aliased by a hostile peer, in which case only the bytes written are unspecified.
#[inline(always)]
pub(crate) unsafe fn copy_bytes(src: *const u8, dst: *mut u8, len: usize) {
    match len {
        // SAFETY: the caller's promise, and `len` is between the width and its double.
        33..=64 => unsafe { pair::<Wide, 2>(src, dst, len) },
        // SAFETY: as above.
        65..=128 => unsafe { pair::<Wide, 4>(src, dst, len) },
        // SAFETY: the caller's promise. A peer racing us makes the bytes unspecified: data to us, never a decision.
        129.. => unsafe { std::ptr::copy(src, dst, len) },
        // SAFETY: as for the first.
        17..=32 => unsafe { pair::<Wide, 1>(src, dst, len) },
        // SAFETY: as for the first.
        9..=16 => unsafe { pair::<u64, 1>(src, dst, len) },
        // SAFETY: as for the first.
        5..=8 => unsafe { pair::<u32, 1>(src, dst, len) },
        // SAFETY: as for the first.
        2..=4 => unsafe { pair::<u16, 1>(src, dst, len) },
        // SAFETY: as for the first.
        1 => unsafe { pair::<u8, 1>(src, dst, len) },
        0 => {}
    }
}

/// Sixteen bytes that the compiler keeps in one register.
#[cfg(target_arch = "x86_64")]
type Wide = std::arch::x86_64::__m128i;
#[cfg(not(target_arch = "x86_64"))]
type Wide = u128;

/// The first and the last `N` words of `len` bytes; all loads come before the stores.
///
/// # Safety
/// As [`copy_bytes`], and `len` is at least `N` words and at most twice that.
#[inline(always)]
unsafe fn pair<T: Copy, const N: usize>(src: *const u8, dst: *mut u8, len: usize) {
    let back = len - N * size_of::<T>();
    let words = [src, src.wrapping_add(back)].map(|at| {
        // SAFETY: `N` words are inside `len` bytes, from the start and from `back` on; the type has alignment one.
        unsafe { at.cast::<Unaligned<T, N>>().read() }
    });
    for (at, words) in [dst, dst.wrapping_add(back)].into_iter().zip(words) {
        // SAFETY: as for the reads.
        unsafe { at.cast::<Unaligned<T, N>>().write(words) };
    }
}

/// Words wherever they lie.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T, const N: usize>([T; N]);
