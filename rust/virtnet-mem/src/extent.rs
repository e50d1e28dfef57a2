//! Where the last buffer was: a loop over buffers finds the next one there without looking anything up.

use std::marker::PhantomData;

use crate::{GuestAddr, GuestSlice, Segment};

/// The addresses of a region, for a loop to keep in registers.
#[derive(Clone, Copy, Debug)]
pub struct Extent<'mem> {
    first: u64,
    /// How many there are; 0: none.
    size: u64,
    region: u32,
    host: *mut u8,
    memory: PhantomData<&'mem ()>,
}

impl<'mem> Extent<'mem> {
    /// No addresses: nothing is found in it.
    #[inline(always)]
    #[must_use]
    pub fn none() -> Self {
        // SAFETY: no bytes at all.
        unsafe { Self::new(GuestAddr(0), 0, 0, std::ptr::dangling_mut()) }
    }

    /// # Safety
    /// `size` bytes from `host` must stay mapped, readable and writable, for `'mem`.
    #[inline(always)]
    pub(crate) unsafe fn new(first: GuestAddr, size: u64, region: u32, host: *mut u8) -> Self {
        Self {
            first: first.0,
            size,
            region,
            host,
            memory: PhantomData,
        }
    }

    /// The `len` bytes at `addr`, if there are some and all of them are in it: their name, and themselves.
    #[inline(always)]
    #[must_use]
    pub fn find(&self, addr: GuestAddr, len: u32) -> Option<(Segment, GuestSlice<'mem>)> {
        let from = addr.0.wrapping_sub(self.first);
        let last = self.size.checked_sub(len.into())?;
        if from > last || len == 0 {
            return None;
        }
        let from = crate::memory::to_usize(from);
        let name = Segment {
            offset: from,
            len,
            region: self.region,
        };
        let start = self.host.wrapping_add(from);
        // SAFETY: from + len <= size, and `size` bytes from `host` are mapped (constructor).
        Some((name, unsafe { GuestSlice::new(start, len as usize) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestMemory, Region, Translate};

    #[test]
    fn an_extent_has_what_is_wholly_in_it() {
        let region = Region::anonymous(4096, GuestAddr(0x1_0000)).unwrap();
        let memory = GuestMemory::new(vec![region]).unwrap();
        let extent = Translate::extent(&memory, 0);
        let whole = Segment {
            offset: 0,
            len: 4096,
            region: 0,
        };
        for (addr, skipped) in [(0x1_0000, 0), (0x1_0fff, 4095), (0x1_0010, 16)] {
            let segment = whole.skip(skipped);
            let (name, bytes) = extent.find(GuestAddr(addr), segment.len).unwrap();
            assert_eq!(name, segment);
            assert_eq!(bytes.start(), memory.slice(segment).start());
            assert_eq!(bytes.len(), segment.len as usize);
        }
        for (addr, len) in [
            (0xffff, 1),
            (0x1_0000, 4097),
            (0x1_0fff, 2),
            (0x1_1000, 0),
            (0x1_1000, 1),
            (0, u32::MAX),
            (u64::MAX, 1),
        ] {
            let found = extent.find(GuestAddr(addr), len);
            assert!(found.is_none(), "{len} at {addr:#x}");
        }
        let nowhere = Translate::extent(&memory, 1);
        assert!(nowhere.find(GuestAddr(0), 0).is_none());
        assert!(nowhere.find(GuestAddr(0x1_0000), 1).is_none());
    }
}
