//! Where the last buffer was: a loop over buffers finds the next one there without looking anything up.

use crate::memory::to_usize;
use crate::{GuestAddr, Segment};

/// Addresses that are in one piece in one region. Plain data, for a loop to keep in registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    pub(crate) first: u64,
    /// How many there are; 0: none.
    pub(crate) size: u64,
    /// Bytes from the region's start to the first.
    pub(crate) offset: u64,
    pub(crate) region: u32,
}

impl Extent {
    /// The `len` bytes at `addr`, if there are some and all of them are in it.
    #[inline(always)]
    #[must_use]
    pub fn segment(&self, addr: GuestAddr, len: u32) -> Option<Segment> {
        let from = addr.0.wrapping_sub(self.first);
        let last = self.size.checked_sub(len.into())?;
        (from <= last && len > 0).then(|| Segment {
            offset: to_usize(self.offset + from),
            len,
            region: self.region,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_has_what_is_wholly_in_it() {
        let extent = Extent {
            first: 0x1000,
            size: 0x100,
            offset: 0x40,
            region: 3,
        };
        let found = |addr, len| extent.segment(GuestAddr(addr), len);
        let whole = Segment {
            offset: 0x40,
            len: 0x100,
            region: 3,
        };
        assert_eq!(found(0x1000, 0x100), Some(whole));
        assert_eq!(found(0x10ff, 1), Some(whole.skip(0xff)));
        for (addr, len) in [
            (0xfff, 1),
            (0x1000, 0x101),
            (0x1100, 0),
            (0x10ff, 2),
            (0, u32::MAX),
            (u64::MAX, 1),
        ] {
            assert_eq!(found(addr, len), None, "{len} at {addr:#x}");
        }
        assert_eq!(Extent::default().segment(GuestAddr(0), 0), None);
    }
}
