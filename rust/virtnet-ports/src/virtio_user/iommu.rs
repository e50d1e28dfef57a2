//! The IOMMU before a driver of ours: what it answers a back-end that misses a translation.
//!
//! Buffers are named by guest addresses and rings by user addresses; what is told of the memory itself are other guest addresses, which
//! are nobody's. So a back-end that does not translate, or touches what it has not been told, finds nothing.

use virtnet_vhost::payload::{Iotlb, MemoryRegion};

/// How far guest addresses are told to be from where descriptors have them.
const ELSEWHERE: u64 = 1 << 45;

/// Bytes of a page, which is what one answer tells.
const PAGE: u64 = 4096;

/// The I/O addresses of a driver's memory.
#[derive(Debug)]
pub(super) struct Mapped(Vec<MemoryRegion>);

impl Mapped {
    /// Puts an IOMMU before memory that is described like this; it is told otherwise from then on.
    pub(super) fn hide<'a>(regions: impl Iterator<Item = &'a mut MemoryRegion>) -> Self {
        let hide = |region: &mut MemoryRegion| {
            let mapped = *region;
            region.guest_addr |= ELSEWHERE;
            mapped
        };
        Self(regions.map(hide).collect())
    }

    /// The translation of the page that was missed, if there is one.
    pub(super) fn translation(&self, miss: &Iotlb) -> Option<Iotlb> {
        let iova = miss.iova & !(PAGE - 1);
        let offset = |region: &MemoryRegion| {
            let starts = [region.guest_addr, region.user_addr];
            let offsets = starts.map(|start| iova.wrapping_sub(start));
            offsets.into_iter().find(|&offset| offset < region.size)
        };
        let (region, offset) = self
            .0
            .iter()
            .find_map(|region| Some((region, offset(region)?)))?;
        Some(Iotlb {
            iova,
            size: PAGE.min(region.size - offset),
            user_addr: region.user_addr + offset,
            permission: miss.permission,
            kind: Iotlb::UPDATE,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn miss(iova: u64) -> Iotlb {
        Iotlb {
            iova,
            permission: 1,
            kind: Iotlb::MISS,
            ..Iotlb::default()
        }
    }

    #[test]
    fn buffers_and_rings_have_addresses_and_nothing_else_has() {
        let mut region = MemoryRegion {
            guest_addr: 1 << 32,
            size: 0x2800,
            user_addr: 0x7000_0000_0000,
            mmap_offset: 0,
        };
        let mapped = Mapped::hide([&mut region].into_iter());
        assert_eq!(region.guest_addr, 1 << 45 | 1 << 32);
        for start in [1 << 32, 0x7000_0000_0000] {
            let told = mapped.translation(&miss(start + 0x1234)).unwrap();
            let expected = (start + 0x1000, 0x1000, 0x7000_0000_1000, 1, Iotlb::UPDATE);
            let found = (
                told.iova,
                told.size,
                told.user_addr,
                told.permission,
                told.kind,
            );
            assert_eq!(found, expected);
            assert_eq!(
                mapped.translation(&miss(start + 0x2000)).unwrap().size,
                0x800
            );
            assert_eq!(mapped.translation(&miss(start + 0x3000)), None);
        }
        assert_eq!(mapped.translation(&miss(region.guest_addr)), None);
        assert_eq!(mapped.translation(&miss(u64::MAX)), None);
    }
}
