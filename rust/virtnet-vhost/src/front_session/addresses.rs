//! The addresses that a back-end is told, where it wants those of the guest instead of ours.
//!
//! With GPA_ADDRESSES every address in a message of the front-end's is a guest physical one, and a region's user address repeats where
//! it lies for the guest. Rings behind an IOMMU are where their I/O addresses say, either way.
//!
//! Spec: vhost-user, Protocol features, `VHOST_USER_PROTOCOL_F_GPA_ADDRESSES`

use super::{FrontendRing, FrontendSession};
use crate::bits;
use crate::features::ProtocolFeatures;
use crate::payload::{Iotlb, MemoryRegion};
use crate::regions::Region;
use crate::session::RingAddresses;

impl FrontendSession {
    /// Notes where memory lies; the regions as the back-end is told them.
    pub(super) fn told_regions(&mut self, mut regions: Vec<Region>) -> Vec<Region> {
        self.by_guest_address.clear();
        if self.protocol.contains(ProtocolFeatures::GPA_ADDRESSES) {
            let layouts = regions.iter().map(|region| region.layout);
            self.by_guest_address.extend(layouts);
            for Region { layout, .. } in &mut regions {
                layout.user_addr = layout.guest_addr;
            }
        }
        regions
    }

    pub(super) fn told_ring(&self, ring: &FrontendRing) -> FrontendRing {
        FrontendRing {
            addresses: self.told_addresses(ring.addresses),
            ..ring.clone()
        }
    }

    pub(super) fn told_addresses(&self, ring: RingAddresses) -> RingAddresses {
        // Who cannot ask for translations gets plain addresses, whatever was accepted.
        let asks = ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK;
        if self.features & bits::ACCESS_PLATFORM != 0 && self.protocol.contains(asks) {
            return ring;
        }
        RingAddresses {
            descriptor_area: self.told_address(ring.descriptor_area),
            driver_area: self.told_address(ring.driver_area),
            device_area: self.told_address(ring.device_area),
            ..ring
        }
    }

    pub(super) fn told_translation(&self, translation: Iotlb) -> Iotlb {
        Iotlb {
            user_addr: self.told_address(translation.user_addr),
            ..translation
        }
    }

    /// What lies nowhere is told as it is: the back-end finds out.
    fn told_address(&self, user_addr: u64) -> u64 {
        let offset_in = |region: &MemoryRegion| {
            let offset = user_addr.checked_sub(region.user_addr)?;
            (offset < region.size).then_some(region.guest_addr + offset)
        };
        let mut regions = self.by_guest_address.iter();
        regions.find_map(offset_in).unwrap_or(user_addr)
    }
}
