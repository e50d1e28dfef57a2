//! Our front-end tells guest addresses where both want that.

use virtnet_vhost::payload::Iotlb;
use virtnet_vhost::{FrontendEvent, Offer, ProtocolFeatures, RingAddresses};

use crate::fake::VERSION_1;
use crate::together::{Pair, offer, ring, setup};

const ACCESS_PLATFORM: u64 = 1 << 33;

/// What the setups here have user addresses above.
const USER: u64 = 1 << 40;

fn pair(features: u64) -> Pair {
    let wanted = ProtocolFeatures::FRONTEND | ProtocolFeatures::GPA_ADDRESSES;
    let offer = Offer::new(features, ProtocolFeatures::BACKEND, 2);
    let mut pair = Pair::new(offer, wanted);
    pair.offered();
    pair.frontend.set_up(setup(features, 4, 2)).unwrap();
    assert_eq!(pair.run().unwrap(), [FrontendEvent::Running]);
    pair
}

fn moved(ring: RingAddresses) -> RingAddresses {
    RingAddresses {
        descriptor_area: ring.descriptor_area - USER,
        driver_area: ring.driver_area - USER,
        device_area: ring.device_area - USER,
        ..ring
    }
}

#[test]
fn regions_and_rings_are_where_the_guest_has_them() {
    let mut pair = pair(VERSION_1);
    assert_eq!(pair.device.regions.len(), 4);
    for region in &pair.device.regions {
        assert_eq!(region.layout.user_addr, region.layout.guest_addr);
    }
    let expected = [0, 1].map(|number| moved(ring(number, 0).addresses));
    let found = |pair: &Pair| [0, 1].map(|number| pair.device.rings[&number].addresses);
    assert_eq!(found(&pair), expected);

    // One that starts again, too.
    pair.frontend.stop_ring(1).unwrap();
    pair.run().unwrap();
    pair.frontend.start_ring(1, &ring(1, 0)).unwrap();
    pair.run().unwrap();
    assert_eq!(found(&pair), expected);
}

#[test]
fn rings_behind_an_iommu_are_where_their_io_addresses_say_and_translations_lead_to_the_guest() {
    let mut pair = pair(VERSION_1 | ACCESS_PLATFORM);
    let found = [0, 1].map(|number| pair.device.rings[&number].addresses);
    assert_eq!(found, [0, 1].map(|number| ring(number, 0).addresses));
    pair.device.take_log();
    let translation = Iotlb {
        iova: 0x7000,
        size: 0x1000,
        user_addr: USER + 0x3000,
        permission: 3,
        kind: Iotlb::UPDATE,
    };
    pair.frontend.translate(translation).unwrap();
    pair.run().unwrap();
    let log = pair.device.take_log();
    assert_eq!(log, ["translate 0x7000 to 0x3000"]);
}

#[test]
fn user_addresses_are_told_to_everybody_else() {
    let mut pair = Pair::new(offer(ProtocolFeatures::BACKEND), ProtocolFeatures::FRONTEND);
    pair.offered();
    pair.frontend.set_up(setup(VERSION_1, 4, 2)).unwrap();
    pair.run().unwrap();
    assert_eq!(pair.device.rings[&1].addresses, ring(1, 0).addresses);
}
