//! A guest's memory as one immutable table of regions, and translation into it.

use std::sync::Arc;

use crate::mapping::Mapping;
use crate::{
    DirtyLog, Extent, GuestAddr, GuestSlice, Iommu, Iotlb, MemoryError, Permission, Region, Slots,
    Table, Translate, UserAddr, Window,
};

/// Names bytes of one [`GuestMemory`]: region number, offset, length. Plain data, checked again when used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Bytes from the region's start.
    pub offset: usize,
    /// Length in bytes.
    pub len: u32,
    /// Which region of the table.
    pub region: u32,
}

impl Segment {
    /// The same bytes without the first `n` (all of them when there are fewer).
    #[must_use]
    #[inline]
    pub fn skip(self, n: u32) -> Self {
        let n = n.min(self.len);
        Self {
            offset: self.offset + n as usize,
            len: self.len - n,
            region: self.region,
        }
    }

    /// The first `n` of these bytes (all of them when there are fewer).
    #[must_use]
    #[inline]
    pub fn first(self, n: u32) -> Self {
        Self {
            len: self.len.min(n),
            ..self
        }
    }
}

/// The memory of one peer: regions in guest-physical order, never changed once made.
///
/// A changed memory table is a new value swapped in between bursts; views of the old one hold what they need. So is memory of
/// which writes are logged from now on, or no longer.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Box<[Region]>,
    log: Option<Arc<DirtyLog>>,
    /// With an IOMMU: what the addresses of rings and descriptors mean.
    iotlb: Option<Iotlb>,
}

impl GuestMemory {
    /// How many regions a table can hold: the slots that vhost-user front-ends know (QEMU's limit).
    pub const MAX_REGIONS: usize = 509;

    /// Makes a table of `regions`, in any order.
    ///
    /// # Errors
    /// [`MemoryError::TooManyRegions`]; [`MemoryError::Overlap`] in guest or in user addresses.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > Self::MAX_REGIONS {
            return Err(MemoryError::TooManyRegions {
                found: regions.len(),
                limit: Self::MAX_REGIONS,
            });
        }
        for key in [|r: &Region| r.user.0, |r: &Region| r.guest.0] {
            regions.sort_by_key(key);
            for pair in regions.windows(2) {
                let [first, second] = pair else { continue };
                if key(second) - key(first) < first.size {
                    return Err(MemoryError::Overlap {
                        first: first.guest,
                        second: second.guest,
                    });
                }
            }
        }
        Ok(Self {
            regions: regions.into(),
            log: None,
            iotlb: None,
        })
    }

    /// The same memory, whose writers mark in `log` what they have written.
    #[must_use]
    pub fn with_log(self, log: Option<Arc<DirtyLog>>) -> Self {
        Self { log, ..self }
    }

    /// Where writers mark what they have written, while that is asked for.
    #[inline]
    #[must_use]
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// Marks the pages of a segment that has been written, where that is asked for.
    pub fn mark_written(&self, segment: Segment) {
        let region = self.regions.get(segment.region as usize);
        if let (Some(log), Some(region)) = (&self.log, region) {
            let addr = region.guest.0 + segment.offset as u64;
            log.mark(GuestAddr(addr), segment.len.into());
        }
    }

    /// The same memory seen through an IOMMU: rings and descriptors carry addresses that `iotlb` translates.
    #[must_use]
    pub fn translated(&self, iotlb: Iotlb) -> Self {
        Self {
            regions: self.regions.clone(),
            log: self.log.clone(),
            iotlb: Some(iotlb),
        }
    }

    /// The translations, with an IOMMU; [`Iommu`] uses them.
    #[must_use]
    #[inline]
    pub fn iotlb(&self) -> Option<&Iotlb> {
        self.iotlb.as_ref()
    }

    /// One private region of `size` bytes at guest address `guest`: for tests and in-process queues.
    ///
    /// # Errors
    /// As [`Region::anonymous`].
    pub fn anonymous(size: u64, guest: GuestAddr) -> Result<Arc<Self>, MemoryError> {
        Ok(Arc::new(Self::new(vec![Region::anonymous(size, guest)?])?))
    }

    /// The regions, in guest-physical order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The first region of which a page has been lost; see [`losses`](crate::losses) for when to ask.
    #[must_use]
    pub fn lost_region(&self) -> Option<&Region> {
        self.regions.iter().find(|region| region.is_lost())
    }

    /// Translates a buffer that lies inside one region; `hint` remembers the region of the last one.
    ///
    /// `None` when it is not wholly inside one region: it may still span two adjacent ones, see [`Self::translate_all`].
    #[inline]
    #[must_use]
    pub fn translate(&self, addr: GuestAddr, len: u32, hint: &mut u32) -> Option<Segment> {
        if let Some(segment) = self.within(*hint, addr, len) {
            return Some(segment);
        }
        let found = self.find(addr)?;
        *hint = found;
        self.within(found, addr, len)
    }

    /// Translates a buffer piece by piece, over adjacent regions where it spans them.
    ///
    /// False when any byte of it is in no region; `each` may have been called for earlier pieces then.
    #[must_use]
    pub fn translate_all(&self, addr: GuestAddr, len: u32, mut each: impl FnMut(Segment)) -> bool {
        let (mut at, mut left) = (addr.0, len);
        while left > 0 {
            let Some(index) = self.find(GuestAddr(at)) else {
                return false;
            };
            let Some(region) = self.regions.get(index as usize) else {
                return false;
            };
            let offset = at - region.guest.0;
            let here = u32::try_from(region.size - offset)
                .unwrap_or(u32::MAX)
                .min(left);
            each(Segment {
                offset: to_usize(offset),
                len: here,
                region: index,
            });
            left -= here;
            match at.checked_add(u64::from(here)) {
                Some(next) => at = next,
                None => return left == 0,
            }
        }
        true
    }

    /// The bytes a segment names. A segment of another memory is cut to what exists here, never out of bounds.
    #[inline]
    #[must_use]
    pub fn slice(&self, segment: Segment) -> GuestSlice<'_> {
        let Some(region) = self.regions.get(segment.region as usize) else {
            return GuestSlice::empty();
        };
        let mut len = segment.len as usize;
        let last = to_usize(region.size).checked_sub(len);
        if last.is_none_or(|last| segment.offset > last) {
            len = Self::cut(segment, region);
        }
        let start = region.host.0.wrapping_add(segment.offset);
        // SAFETY: offset + len <= size, and `size` bytes from `host` are mapped while `self` (which holds the mapping) lives.
        unsafe { GuestSlice::new(start, len) }
    }

    /// How many bytes there are of a segment that is not wholly in `region`.
    #[cold]
    #[inline(never)]
    fn cut(segment: Segment, region: &Region) -> usize {
        debug_assert!(false, "{segment:?} does not belong to this memory");
        to_usize(region.size).saturating_sub(segment.offset)
    }

    /// A ring area: `size` bytes at the front-end's address `addr`, aligned to `align`, inside one region.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`], [`MemoryError::Misaligned`].
    pub fn window(&self, addr: UserAddr, size: usize, align: usize) -> Result<Window, MemoryError> {
        let (start, mapping) = self.area(addr, size, align)?;
        // SAFETY: `size` bytes from `start` lie inside the mapping, as `area` says.
        Ok(unsafe { Window::new(start, size, mapping) })
    }

    /// A descriptor area: `len` entries at the front-end's address `addr`, inside one region.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`], [`MemoryError::Misaligned`].
    pub fn table(&self, addr: UserAddr, len: usize) -> Result<Table, MemoryError> {
        let size = len.saturating_mul(Table::ENTRY);
        let (start, mapping) = self.area(addr, size, Table::ENTRY)?;
        // SAFETY: `size` bytes from `start` lie inside the mapping and `start` is aligned, as `area` says.
        Ok(unsafe { Table::new(start, len, mapping) })
    }

    /// `count` buffers of `stride` bytes each, the first one at `addr`, all inside one region.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`].
    pub fn slots(&self, addr: GuestAddr, count: u32, stride: u32) -> Result<Slots, MemoryError> {
        let not_mapped = MemoryError::NotMapped {
            addr: UserAddr(addr.0),
            size: u64::from(count) * u64::from(stride),
        };
        let mut hint = 0;
        let whole = count
            .checked_mul(stride)
            .and_then(|size| self.translate(addr, size, &mut hint));
        let Some((whole, region)) =
            whole.and_then(|whole| Some((whole, self.regions.get(whole.region as usize)?)))
        else {
            return Err(not_mapped);
        };
        let start = region.host.0.wrapping_add(whole.offset);
        // SAFETY: the segment lies inside its region, which is mapped by its mapping.
        Ok(unsafe { Slots::new(start, count, stride, Arc::clone(&region.mapping)) })
    }

    /// The first of `size` bytes at `addr`, a multiple of `align`, and the mapping in which all of them lie.
    fn area(
        &self,
        addr: UserAddr,
        size: usize,
        align: usize,
    ) -> Result<(*mut u8, Arc<Mapping>), MemoryError> {
        let not_mapped = MemoryError::NotMapped {
            addr,
            size: size as u64,
        };
        let Some((region, offset)) = self.place(addr, size) else {
            return Err(not_mapped);
        };
        if region.size - offset < size as u64 {
            return Err(not_mapped);
        }
        let start = region.host.0.wrapping_add(to_usize(offset));
        if !start.addr().is_multiple_of(align) || !addr.0.is_multiple_of(align as u64) {
            return Err(MemoryError::Misaligned { addr, align });
        }
        Ok((start, Arc::clone(&region.mapping)))
    }

    /// The front-end's address of a guest-physical one.
    #[must_use]
    pub fn user_addr(&self, addr: GuestAddr) -> Option<UserAddr> {
        let region = self.regions.get(self.find(addr)? as usize)?;
        Some(UserAddr(region.user.0 + (addr.0 - region.guest.0)))
    }

    /// The guest-physical address of a ring's, which is the front-end's own, or goes through the IOMMU.
    #[must_use]
    pub fn guest_addr(&self, addr: UserAddr) -> Option<GuestAddr> {
        let (region, offset) = self.place(addr, 1)?;
        Some(GuestAddr(region.guest.0 + offset))
    }

    /// Where `size` bytes of a ring begin, as a region and an offset in it.
    fn place(&self, addr: UserAddr, size: usize) -> Option<(&Region, u64)> {
        let Some(iommu) = Iommu::of(self) else {
            let offset = |region: &Region| addr.0.wrapping_sub(region.user.0);
            let mut regions = self.regions.iter();
            let region = regions.find(|region| offset(region) < region.size)?;
            return Some((region, offset(region)));
        };
        // With an IOMMU rings lie at addresses like those of descriptors, and both sides write to parts of them.
        let (addr, size) = (GuestAddr(addr.0), u32::try_from(size).ok()?);
        let segment = iommu.translate(addr, size, Permission::BOTH, &mut 0)?;
        let region = self.regions.get(segment.region as usize)?;
        Some((region, segment.offset as u64))
    }

    /// The addresses of region `index`; none where there is no such region.
    #[inline(always)]
    pub(crate) fn extent(&self, index: u32) -> Extent<'_> {
        let Some(region) = self.regions.get(index as usize) else {
            return Extent::none();
        };
        // SAFETY: a region's bytes are mapped while `self` (which holds the mapping) lives.
        unsafe { Extent::new(region.guest, region.size, index, region.host.0) }
    }

    #[inline]
    fn within(&self, index: u32, addr: GuestAddr, len: u32) -> Option<Segment> {
        let extent = self.extent(index);
        let (segment, _) = extent.find(addr, len.max(1))?;
        Some(segment.first(len))
    }

    /// Makes `hint` the region that `addr` is in, if it is in one.
    #[cold]
    #[inline(never)]
    pub(crate) fn look_elsewhere(&self, addr: GuestAddr, hint: &mut u32) {
        if let Some(found) = self.find(addr) {
            *hint = found;
        }
    }

    #[cold]
    fn find(&self, addr: GuestAddr) -> Option<u32> {
        let after = self.regions.partition_point(|r| r.guest <= addr);
        let index = after.checked_sub(1)?;
        let region = self.regions.get(index)?;
        (addr.0 - region.guest.0 < region.size).then(|| u32::try_from(index).unwrap_or(u32::MAX))
    }
}

/// A length or offset inside a mapping, as this process counts.
#[inline(always)]
pub(crate) fn to_usize(bytes: u64) -> usize {
    const {
        assert!(
            usize::BITS == 64,
            "virtnet maps whole guests and needs a 64-bit host"
        )
    };
    #[expect(
        clippy::cast_possible_truncation,
        reason = "usize has 64 bits, asserted above"
    )]
    {
        bytes as usize
    }
}
