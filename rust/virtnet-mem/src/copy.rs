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
/// The words are given names: an array of them went through the stack, twice, and short packets took up to a tenth longer.
///
/// # Safety
/// As [`copy_bytes`], and `len` is at least `N` words and at most twice that.
#[inline(always)]
unsafe fn pair<T: Copy, const N: usize>(src: *const u8, dst: *mut u8, len: usize) {
    let (word, back) = (size_of::<T>(), len - N * size_of::<T>());
    let (src_back, dst_back) = (src.wrapping_add(back), dst.wrapping_add(back));
    // SAFETY: of the words at 0, 1, … `N` - 1 from the start and from `back` on, which are inside `len` bytes (the caller's promise),
    // none is used that is not one of these.
    let load =
        |at: *const u8, i: usize| unsafe { at.wrapping_add(i * word).cast::<T>().read_unaligned() };
    // SAFETY: as for the loads.
    let store = |at: *mut u8, i: usize, value: T| unsafe {
        at.wrapping_add(i * word).cast::<T>().write_unaligned(value);
    };
    match N {
        1 => {
            let (a, z) = (load(src, 0), load(src_back, 0));
            store(dst, 0, a);
            store(dst_back, 0, z);
        }
        2 => {
            let (a, b) = (load(src, 0), load(src, 1));
            let (y, z) = (load(src_back, 0), load(src_back, 1));
            store(dst, 0, a);
            store(dst, 1, b);
            store(dst_back, 0, y);
            store(dst_back, 1, z);
        }
        _ => {
            const { assert!(N == 1 || N == 2 || N == 4) };
            let (a, b, c, d) = (load(src, 0), load(src, 1), load(src, 2), load(src, 3));
            let (w, x) = (load(src_back, 0), load(src_back, 1));
            let (y, z) = (load(src_back, 2), load(src_back, 3));
            store(dst, 0, a);
            store(dst, 1, b);
            store(dst, 2, c);
            store(dst, 3, d);
            store(dst_back, 0, w);
            store(dst_back, 1, x);
            store(dst_back, 2, y);
            store(dst_back, 3, z);
        }
    }
}
