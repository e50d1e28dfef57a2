//! Our front-end has memory arrive after the guest, at our back-end.

use virtnet_sys::memfd;
use virtnet_vhost::message::RequestKind;
use virtnet_vhost::payload::MemoryRegion;
use virtnet_vhost::{FrontendEvent, ProtocolFeatures, SessionError};

use crate::fake::{MAPPED_AT, VERSION_1};
use crate::together::{Pair, offer, setup};

const WANTED: ProtocolFeatures = ProtocolFeatures::FRONTEND.union(ProtocolFeatures::PAGEFAULT);

/// By its length it is known again.
const STAND_IN_LEN: u64 = 12_288;

/// A back-end that offers these as well as PAGEFAULT, and has made its offer.
fn pair(protocol: ProtocolFeatures) -> Pair {
    let mut pair = Pair::new(offer(protocol | ProtocolFeatures::PAGEFAULT), WANTED);
    let stand_in = memfd::create("virtnet-test", STAND_IN_LEN, false);
    pair.device.userfault = Some(stand_in.unwrap());
    pair.offered();
    pair
}

fn misuse(error: &SessionError) -> bool {
    matches!(error, SessionError::Misuse { .. })
}

#[test]
fn u27_the_handshake_waits_between_memory_and_rings_until_faults_are_served() {
    for protocol in [ProtocolFeatures::empty(), ProtocolFeatures::BACKEND] {
        let mut pair = pair(protocol);
        let told = setup(VERSION_1, 4, 2);
        let regions: Vec<_> = told.regions.iter().map(|region| region.layout).collect();
        pair.frontend.advise_postcopy().unwrap();
        pair.frontend.set_up(told).unwrap();

        let places = regions.iter().map(|region| MemoryRegion {
            user_addr: MAPPED_AT + region.guest_addr,
            ..*region
        });
        let mapped = FrontendEvent::MemoryMapped(places.collect());
        assert_eq!(pair.run().unwrap(), [mapped]);
        let userfault = std::fs::File::from(pair.frontend.take_userfault().unwrap());
        assert_eq!(userfault.metadata().unwrap().len(), STAND_IN_LEN);
        assert!(pair.frontend.take_userfault().is_none());
        assert_eq!(pair.run().unwrap(), [], "it waits");
        assert!(pair.device.rings.is_empty());

        pair.device.take_log();
        pair.frontend.memory_is_served().unwrap();
        assert_eq!(pair.run().unwrap(), [FrontendEvent::Running]);
        assert_eq!(pair.device.rings.len(), 2);
        assert_eq!(pair.device.take_log()[0], "catch", "before any ring starts");

        pair.frontend.end_postcopy().unwrap();
        assert_eq!(pair.run().unwrap(), [FrontendEvent::PostcopyEnded]);
        assert_eq!(pair.device.take_log(), ["end"]);
        assert!(misuse(&pair.frontend.end_postcopy().unwrap_err()));
        assert_eq!(pair.backend.counters().1, 0, "nothing was refused");
    }
}

#[test]
fn post_copy_has_its_moments() {
    let mut pair = pair(ProtocolFeatures::REPLY_ACK);
    assert!(misuse(&pair.frontend.memory_is_served().unwrap_err()));
    assert!(misuse(&pair.frontend.end_postcopy().unwrap_err()));
    pair.frontend.advise_postcopy().unwrap();
    assert!(misuse(&pair.frontend.advise_postcopy().unwrap_err()));
    pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
    pair.run().unwrap();
    pair.frontend.memory_is_served().unwrap();
    assert!(misuse(&pair.frontend.memory_is_served().unwrap_err()));
    assert_eq!(pair.run().unwrap(), [FrontendEvent::Running]);
    assert!(misuse(&pair.frontend.advise_postcopy().unwrap_err()));
}

#[test]
fn only_who_asks_for_it_gets_it_and_then_without_slots() {
    let all = ProtocolFeatures::all();
    let mut plain = Pair::new(offer(all), ProtocolFeatures::FRONTEND);
    plain.offered();
    let agreed = plain.frontend.session().protocol_features();
    assert!(!agreed.contains(ProtocolFeatures::PAGEFAULT));
    assert!(agreed.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS));
    assert!(misuse(&plain.frontend.advise_postcopy().unwrap_err()));

    let agreed = pair(all).frontend.session().protocol_features();
    assert!(agreed.contains(ProtocolFeatures::PAGEFAULT));
    assert!(!agreed.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS));
}

#[test]
fn a_back_end_that_has_no_userfaultfd_to_give_is_told_of() {
    let mut pair = pair(ProtocolFeatures::REPLY_ACK);
    pair.device.userfault = None;
    pair.frontend.advise_postcopy().unwrap();
    let error = pair.run().unwrap_err();
    assert!(
        matches!(error, SessionError::NoUserfault { found: 0 }),
        "{error}"
    );
    assert!(error.to_string().contains("vm.unprivileged_userfaultfd"));
    assert!(
        error
            .to_string()
            .contains(RequestKind::PostcopyAdvise.name())
    );
}
