//! One copy routine for bytes that another process may be writing.

/// Copies `len` bytes from `src` to `dst`; short copies are a few wide moves in line, longer ones a call.
///
/// # Safety
/// `src` must be readable and `dst` writable for `len` bytes. They must not overlap unless they are the same shared memory
/// aliased by a hostile peer, in which case only the bytes written are unspecified.
#[inline(always)]
pub(crate) unsafe fn copy_bytes(src: *const u8, dst: *mut u8, len: usize) {
    // Two possibly overlapping moves of a fixed width cover every length between the width and its double.
    macro_rules! pair_of {
        ($width:literal) => {{
            // SAFETY: the caller's promise; `len >= width`, so both moves stay inside `len` bytes.
            let first = unsafe { src.cast::<[u8; $width]>().read() };
            // SAFETY: as above.
            let last = unsafe { src.add(len - $width).cast::<[u8; $width]>().read() };
            // SAFETY: as above.
            unsafe { dst.cast::<[u8; $width]>().write(first) };
            // SAFETY: as above.
            unsafe { dst.add(len - $width).cast::<[u8; $width]>().write(last) };
        }};
    }
    match len {
        0 => {}
        1 => {
            // SAFETY: the caller's promise for one byte.
            let byte = unsafe { src.read_volatile() };
            // SAFETY: as above.
            unsafe { dst.write_volatile(byte) };
        }
        2..4 => pair_of!(2),
        4..8 => pair_of!(4),
        8..16 => pair_of!(8),
        16..32 => pair_of!(16),
        32..64 => pair_of!(32),
        64..=128 => pair_of!(64),
        // SAFETY: the caller's promise. A peer racing us makes the bytes unspecified; they are data to us, never a decision.
        _ => unsafe { std::ptr::copy(src, dst, len) },
    }
}
