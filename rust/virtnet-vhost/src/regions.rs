//! Guest memory as the session knows it: which regions there are, without their contents.
//!
//! A region is checked here against the arithmetic of addresses and against its neighbours; whether its file is long
//! enough is for whoever maps it to find out. Regions overlap neither in guest nor in user addresses.

use std::os::fd::OwnedFd;

use crate::error::Refusal;
use crate::payload::{InflightArea, LogArea, MemoryRegion};

/// The most regions one SET_MEM_TABLE carries.
pub const MAX_TABLE_REGIONS: usize = 8;

/// The most regions there may be if they come one by one.
pub const MAX_SLOTS: usize = 509;

/// A region and the file it lies in.
#[derive(Debug)]
pub struct Region {
    /// Where it lies.
    pub layout: MemoryRegion,
    /// The file.
    pub file: OwnedFd,
}

/// The dirty log and the file it lies in.
#[derive(Debug)]
pub struct LogFile {
    /// Which part of the file it is.
    pub area: LogArea,
    /// The file.
    pub file: OwnedFd,
}

/// A record of buffers in flight and the file it lies in.
#[derive(Debug)]
pub struct InflightFile {
    /// Which part of the file it is, and which rings it is for.
    pub area: InflightArea,
    /// The file.
    pub file: OwnedFd,
}

/// The layouts of all regions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Regions {
    list: Vec<MemoryRegion>,
}

impl Regions {
    /// Makes the table that SET_MEM_TABLE carries.
    pub(crate) fn table(request: &'static str, layouts: &[MemoryRegion]) -> Result<Self, Refusal> {
        if layouts.is_empty() || layouts.len() > MAX_TABLE_REGIONS {
            return Err(Refusal::RegionCount {
                request,
                most: MAX_TABLE_REGIONS,
                found: layouts.len(),
            });
        }
        let mut regions = Self::default();
        for (number, layout) in layouts.iter().enumerate() {
            regions.push(request, number, *layout)?;
        }
        Ok(regions)
    }

    /// Adds one region.
    pub(crate) fn add(
        &mut self,
        request: &'static str,
        layout: MemoryRegion,
    ) -> Result<(), Refusal> {
        let found = self.list.len() + 1;
        if found > MAX_SLOTS {
            return Err(Refusal::RegionCount {
                request,
                most: MAX_SLOTS,
                found,
            });
        }
        self.push(request, 0, layout)
    }

    /// Takes one region away; where it lies in its file does not matter.
    pub(crate) fn remove(
        &mut self,
        request: &'static str,
        layout: MemoryRegion,
    ) -> Result<MemoryRegion, Refusal> {
        let key = |r: &MemoryRegion| (r.guest_addr, r.user_addr, r.size);
        let place = self
            .list
            .iter()
            .position(|region| key(region) == key(&layout));
        let place = place.ok_or(Refusal::NoSuchRegion {
            request,
            guest_addr: layout.guest_addr,
        })?;
        Ok(self.list.remove(place))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Tells whether a user address is in one of the regions.
    pub(crate) fn contains_user(&self, address: u64) -> bool {
        self.list
            .iter()
            .any(|r| address >= r.user_addr && address - r.user_addr < r.size)
    }

    fn push(
        &mut self,
        request: &'static str,
        region: usize,
        layout: MemoryRegion,
    ) -> Result<(), Refusal> {
        let size = layout.size;
        let fits = |start: u64| start.checked_add(size).is_some();
        if size == 0
            || !fits(layout.guest_addr)
            || !fits(layout.user_addr)
            || !fits(layout.mmap_offset)
        {
            return Err(Refusal::RegionRange {
                request,
                region,
                size,
            });
        }
        let overlaps = |a: u64, b: u64, b_size: u64| a < b + b_size && b < a + size;
        if self.list.iter().any(|other| {
            overlaps(layout.guest_addr, other.guest_addr, other.size)
                || overlaps(layout.user_addr, other.user_addr, other.size)
        }) {
            return Err(Refusal::RegionOverlap { request, region });
        }
        self.list.push(layout);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest_addr: u64, user_addr: u64, size: u64) -> MemoryRegion {
        MemoryRegion {
            guest_addr,
            size,
            user_addr,
            mmap_offset: 0,
        }
    }

    #[test]
    fn tb38_regions_that_wrap_are_refused() {
        let good = region(0, 0x1000, 0x1000);
        let bad = [
            region(u64::MAX - 10, 0, 100),
            region(0, u64::MAX - 10, 100),
            MemoryRegion {
                mmap_offset: u64::MAX - 10,
                ..region(0, 0, 100)
            },
            region(0, 0, 0),
        ];
        for layout in bad {
            let error = Regions::table("X", &[good, layout]).unwrap_err();
            assert!(
                matches!(error, Refusal::RegionRange { region: 1, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn tb39_regions_never_overlap() {
        let base = region(0x1000, 0x8000, 0x1000);
        let overlapping = [
            base,
            region(0x1fff, 0x20000, 1),
            region(0, 0x20000, 0x1001),
            region(0x20000, 0x8fff, 1),
            region(0x20000, 0x7000, 0x1001),
        ];
        for layout in overlapping {
            assert!(matches!(
                Regions::table("X", &[base, layout]),
                Err(Refusal::RegionOverlap { region: 1, .. })
            ));
        }
        let touching = [base, region(0x2000, 0x9000, 1), region(0xfff, 0x7fff, 1)];
        assert_eq!(Regions::table("X", &touching).unwrap().list.len(), 3);
    }

    #[test]
    fn tb36_a_table_has_one_to_eight_regions() {
        let many: Vec<_> = (0..9).map(|i| region(i << 12, i << 12, 0x1000)).collect();
        assert!(matches!(
            Regions::table("X", &many),
            Err(Refusal::RegionCount { found: 9, .. })
        ));
        assert!(matches!(
            Regions::table("X", &[]),
            Err(Refusal::RegionCount { found: 0, .. })
        ));
        assert_eq!(Regions::table("X", &many[..8]).unwrap().list.len(), 8);
    }

    #[test]
    fn tb42_slots_are_limited() {
        let mut regions = Regions::default();
        for i in 0..MAX_SLOTS as u64 {
            regions.add("X", region(i << 12, i << 12, 0x1000)).unwrap();
        }
        assert!(matches!(
            regions.add("X", region(1 << 40, 1 << 40, 1)),
            Err(Refusal::RegionCount { .. })
        ));
    }

    #[test]
    fn tb43_a_region_is_removed_only_if_it_is_exactly_that() {
        let mut regions = Regions::table("X", &[region(0, 0x1000, 0x1000)]).unwrap();
        for layout in [
            region(0, 0x1000, 0x800),
            region(0x10, 0x1000, 0x1000),
            region(0, 0x1010, 0x1000),
        ] {
            assert!(matches!(
                regions.remove("X", layout),
                Err(Refusal::NoSuchRegion { .. })
            ));
        }
        assert!(
            regions.contains_user(0x1fff)
                && !regions.contains_user(0x2000)
                && !regions.contains_user(0xfff)
        );
        regions
            .remove(
                "X",
                MemoryRegion {
                    mmap_offset: 77,
                    ..region(0, 0x1000, 0x1000)
                },
            )
            .unwrap();
        assert!(regions.is_empty());
    }
}
