//! Buffers of our own in shared memory, one behind the other, resolved once.

use std::fmt;
use std::sync::Arc;

use crate::GuestSlice;
use crate::mapping::Mapping;

/// `count` buffers of `stride` bytes each. Owns its mapping, so it cannot outlive it.
///
/// Beside a [`Segment`](crate::Segment) a buffer is found by its number with two comparisons: for whoever laid the memory out. Bytes
/// outside a buffer are a defect of ours: an empty slice then, and debug builds panic.
#[derive(Clone)]
pub struct Slots {
    start: *mut u8,
    count: u32,
    stride: u32,
    _mapping: Arc<Mapping>,
}

// SAFETY: slots only give slices of memory that their own mapping keeps alive.
unsafe impl Send for Slots {}
// SAFETY: as above.
unsafe impl Sync for Slots {}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slots({} of {} bytes)", self.count, self.stride)
    }
}

impl Slots {
    /// # Safety
    /// `count` times `stride` bytes from `start` must lie inside `mapping`.
    pub(crate) unsafe fn new(
        start: *mut u8,
        count: u32,
        stride: u32,
        mapping: Arc<Mapping>,
    ) -> Self {
        Self {
            start,
            count,
            stride,
            _mapping: mapping,
        }
    }

    /// `len` bytes of buffer `i`, from byte `from` of it on.
    #[inline(always)]
    #[must_use]
    pub fn slice(&self, i: u32, from: u32, len: u32) -> GuestSlice<'_> {
        let is_inside = i < self.count && from <= self.stride && len <= self.stride - from;
        debug_assert!(
            is_inside,
            "{len} bytes from {from} of buffer {i} of {self:?}"
        );
        if !is_inside {
            return GuestSlice::empty();
        }
        let offset = i as usize * self.stride as usize + from as usize;
        // SAFETY: the bytes lie inside buffer `i` (checked above), which is mapped as long as the slots live (constructor).
        unsafe { GuestSlice::new(self.start.wrapping_add(offset), len as usize) }
    }
}
