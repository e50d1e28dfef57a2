//! Our front-end against our back-end, over a pair of sockets in one thread.

use std::os::fd::AsFd;
use std::sync::Arc;

use virtnet_sys::{EventFd, Stream, memfd};
use virtnet_vhost::payload::{LogArea, MemoryRegion};
use virtnet_vhost::{
    Backend, Frontend, FrontendEvent, FrontendRing, FrontendSetup, LogFile, Offer, Offered,
    ProtocolFeatures, Region, RingAddresses, SessionError,
};

use crate::fake::{BY_EVENTS, FakeDevice, LOG_ALL, PROTOCOL, RING_PACKED, VERSION_1};

const SIZE: u64 = 0x2_0000;

/// Where rings stop.
const STOPS_AT: u32 = 77;

pub struct Pair {
    pub frontend: Frontend,
    pub backend: Backend,
    pub device: FakeDevice,
    events: Vec<FrontendEvent>,
}

impl Pair {
    pub fn new(offer: Offer, wanted: ProtocolFeatures) -> Self {
        let (front, back) = Stream::pair().unwrap();
        Self {
            frontend: Frontend::start_with(front, wanted).unwrap(),
            backend: Backend::new(back, offer),
            device: FakeDevice {
                base: STOPS_AT,
                config: (0..40).collect(),
                ..FakeDevice::default()
            },
            events: Vec::new(),
        }
    }

    /// Lets both speak until both are silent; what the front-end has to say.
    pub fn run(&mut self) -> Result<Vec<FrontendEvent>, SessionError> {
        loop {
            let (served, _) = self.backend.counters();
            self.backend.on_readable(&mut self.device)?;
            self.events.extend(self.frontend.on_readable()?);
            if self.backend.counters().0 == served {
                return Ok(std::mem::take(&mut self.events));
            }
        }
    }

    pub fn offered(&mut self) -> Offered {
        match &self.run().unwrap()[..] {
            [FrontendEvent::Offered(offered)] => offered.clone(),
            other => panic!("{other:?}"),
        }
    }
}

pub fn ring(number: u64, base: u32) -> FrontendRing {
    let start = (1 << 40) + number * 0x4000;
    FrontendRing {
        size: 128,
        base,
        addresses: RingAddresses {
            descriptor_area: start,
            driver_area: start + 0x1000,
            device_area: start + 0x2000,
            log_guest_addr: None,
        },
        kick: Arc::new(EventFd::new().unwrap()),
        call: Arc::new(EventFd::new().unwrap()),
    }
}

/// Memory in this many pieces, and rings in it.
pub fn setup(features: u64, regions: u64, rings: u64) -> FrontendSetup {
    let piece = SIZE / regions;
    let region = |number| {
        let layout = MemoryRegion {
            guest_addr: number * piece,
            size: piece,
            user_addr: (1 << 40) + number * piece,
            mmap_offset: 0,
        };
        let file = memfd::create("virtnet-test", piece, false).unwrap();
        Region { layout, file }
    };
    FrontendSetup {
        features,
        mtu: Some(1500),
        regions: (0..regions).map(region).collect(),
        rings: (0..rings).map(|number| ring(number, 0)).collect(),
        inflight: None,
    }
}

pub fn offer(protocol: ProtocolFeatures) -> Offer {
    Offer::new(VERSION_1 | RING_PACKED, protocol, 2)
}

/// Sets of protocol features that a back-end may offer, from nothing to everything.
fn offers() -> Vec<ProtocolFeatures> {
    let ack = ProtocolFeatures::REPLY_ACK;
    vec![
        ProtocolFeatures::empty(),
        ProtocolFeatures::MQ,
        ack,
        ack | ProtocolFeatures::MTU,
        ack | ProtocolFeatures::STATUS,
        ProtocolFeatures::STATUS,
        ProtocolFeatures::CONFIGURE_MEM_SLOTS,
        ProtocolFeatures::CONFIG,
        BY_EVENTS,
        ProtocolFeatures::all(),
    ]
}

#[test]
fn whatever_is_offered_the_handshake_ends_with_the_rings_running() {
    for protocol in offers() {
        for regions in [1, 8] {
            let mut pair = Pair::new(offer(protocol), ProtocolFeatures::FRONTEND);
            let offered = pair.offered();
            let known = protocol & ProtocolFeatures::BACKEND;
            let more = if known.is_empty() { 0 } else { PROTOCOL };
            let logs = known.contains(ProtocolFeatures::LOG_SHMFD);
            let more = more | if logs { LOG_ALL } else { 0 };
            assert_eq!(offered.features, VERSION_1 | RING_PACKED | more);
            assert_eq!(offered.protocol_features, known);
            let pairs = known.contains(ProtocolFeatures::MQ).then_some(2);
            assert_eq!(offered.queue_pairs, pairs);
            let config = known.contains(ProtocolFeatures::CONFIG);
            assert_eq!(offered.config, config.then(|| (0..24).collect()));

            let wanted = setup(VERSION_1, regions, 4);
            let events: Vec<_> = wanted
                .rings
                .iter()
                .map(|ring| (Arc::clone(&ring.kick), Arc::clone(&ring.call)))
                .collect();
            pair.frontend.set_up(wanted).unwrap();
            assert_eq!(
                pair.run().unwrap(),
                [FrontendEvent::Running],
                "{protocol:?}"
            );
            assert_eq!(
                pair.backend.counters().1,
                0,
                "{:?}",
                pair.backend.last_refusal()
            );
            assert_eq!(pair.device.regions.len(), regions as usize);
            assert_eq!(pair.device.rings.len(), 4);
            for (number, (kick, call)) in events.iter().enumerate() {
                let setup = &pair.device.rings[&number];
                assert!(setup.enabled && setup.size == 128 && setup.base == 0);
                kick.signal().unwrap();
                assert!(setup.kick.as_ref().unwrap().drain());
                setup.call.as_ref().unwrap().signal().unwrap();
                assert!(call.drain());
            }
            let mtu = known.contains(ProtocolFeatures::MTU);
            assert_eq!(pair.device.log.contains(&"mtu 1500".to_owned()), mtu);
        }
    }
}

#[test]
fn more_regions_than_a_table_holds_go_one_by_one_where_that_is_possible() {
    let mut pair = Pair::new(offer(ProtocolFeatures::all()), ProtocolFeatures::FRONTEND);
    assert_eq!(pair.offered().memory_slots, Some(509));
    pair.frontend.set_up(setup(VERSION_1, 32, 2)).unwrap();
    assert_eq!(pair.run().unwrap(), [FrontendEvent::Running]);
    assert_eq!(pair.device.regions.len(), 32);
    assert_eq!(pair.device.rings.len(), 2);

    let mut pair = Pair::new(offer(ProtocolFeatures::MQ), ProtocolFeatures::FRONTEND);
    pair.offered();
    let error = pair.frontend.set_up(setup(VERSION_1, 32, 2)).unwrap_err();
    assert!(matches!(error, SessionError::Misuse { .. }), "{error}");
}

#[test]
fn u22_logging_begins_and_ends_while_rings_run_with_and_without_acknowledgements() {
    for protocol in offers() {
        let mut pair = Pair::new(offer(protocol), ProtocolFeatures::FRONTEND);
        let can_log = pair
            .offered()
            .protocol_features
            .contains(ProtocolFeatures::LOG_SHMFD);
        pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
        pair.run().unwrap();
        pair.device.take_log();
        let area = LogArea {
            mmap_size: 4096,
            mmap_offset: 0,
        };
        let file = memfd::create("virtnet-test", 4096, false).unwrap();
        let handed = pair.frontend.set_log(LogFile { area, file });
        let rings = [0, 1].map(|number| RingAddresses {
            log_guest_addr: Some(0x2000 * (number + 1)),
            ..ring(number, 0).addresses
        });
        if !can_log {
            assert!(matches!(handed, Err(SessionError::Misuse { .. })));
            pair.frontend.set_logging(true, &rings).unwrap_err();
            continue;
        }
        handed.unwrap();
        pair.frontend.set_logging(true, &rings).unwrap();
        assert_eq!(pair.run().unwrap(), [FrontendEvent::Logging(true)]);
        assert!(pair.device.dirty_log.is_some());
        assert_eq!(pair.device.features, Some(VERSION_1 | LOG_ALL));
        let logged = |pair: &Pair| [0, 1].map(|r| pair.device.rings[&r].addresses.log_guest_addr);
        assert_eq!(logged(&pair), [Some(0x2000), Some(0x4000)]);
        pair.frontend.set_logging(false, &rings).unwrap();
        assert_eq!(pair.run().unwrap(), [FrontendEvent::Logging(false)]);
        assert_eq!(pair.device.features, Some(VERSION_1));
        assert_eq!(logged(&pair), [None; 2]);
        let of = |number: u64| {
            format!(
                "addresses {number} {:#x}",
                rings[number as usize].descriptor_area
            )
        };
        let expected = [
            "log 4096 0".to_owned(),
            format!("features {:#x}", VERSION_1 | LOG_ALL),
            of(0),
            of(1),
            of(0),
            of(1),
            format!("features {VERSION_1:#x}"),
        ];
        assert_eq!(pair.device.take_log(), expected);
    }
}

#[test]
fn u20_a_guest_that_has_moved_is_announced_where_that_can_be_had() {
    let wanted = ProtocolFeatures::FRONTEND;
    let mut pair = Pair::new(offer(ProtocolFeatures::RARP), wanted);
    pair.offered();
    pair.frontend.send_rarp([2, 0, 0, 0, 0, 7]).unwrap();
    pair.run().unwrap();
    assert_eq!(pair.device.take_log(), ["rarp [02, 00, 00, 00, 00, 07]"]);
    let mut pair = Pair::new(offer(ProtocolFeatures::MQ), wanted);
    pair.offered();
    let error = pair.frontend.send_rarp([2, 0, 0, 0, 0, 7]).unwrap_err();
    assert!(matches!(error, SessionError::Misuse { .. }), "{error}");
}

#[test]
fn u31_a_ring_stops_and_goes_on_where_it_stopped() {
    for protocol in offers() {
        let mut pair = Pair::new(offer(protocol), ProtocolFeatures::FRONTEND);
        pair.offered();
        pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
        pair.run().unwrap();
        pair.frontend.stop_ring(1).unwrap();
        let stopped = FrontendEvent::RingStopped {
            ring: 1,
            base: STOPS_AT,
        };
        assert_eq!(pair.run().unwrap(), [stopped]);
        assert_eq!(pair.device.rings.len(), 1);
        pair.frontend.start_ring(1, &ring(1, STOPS_AT)).unwrap();
        assert_eq!(pair.run().unwrap(), []);
        assert_eq!(pair.device.rings[&1].base, STOPS_AT);
        assert!(pair.device.rings[&1].enabled, "it stays enabled");
        if protocol.contains(BY_EVENTS) {
            pair.frontend.enable_ring(1, false).unwrap();
            pair.run().unwrap();
            assert!(!pair.device.rings[&1].enabled);
        }
    }
}

#[test]
fn features_that_the_device_refuses_end_the_handshake_with_its_name() {
    // Noticed by the acknowledgement, or by the status, whichever there is.
    for protocol in [ProtocolFeatures::REPLY_ACK, ProtocolFeatures::STATUS] {
        let mut pair = Pair::new(offer(protocol), ProtocolFeatures::FRONTEND);
        pair.offered();
        pair.device.refuses = Some("features");
        pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
        let error = pair.run().unwrap_err();
        assert!(
            matches!(
                error,
                SessionError::Refused {
                    request: "SET_FEATURES",
                    ..
                }
            ),
            "{protocol:?}: {error}"
        );
    }
}

#[test]
fn memory_that_the_device_refuses_ends_the_handshake_and_an_mtu_does_not() {
    let everything = offer(ProtocolFeatures::all());
    let mut pair = Pair::new(everything.clone(), ProtocolFeatures::FRONTEND);
    pair.offered();
    pair.device.refuses = Some("memory");
    pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
    let error = pair.run().unwrap_err();
    assert!(error.to_string().contains("SET_MEM_TABLE"), "{error}");

    let mut pair = Pair::new(everything, ProtocolFeatures::FRONTEND);
    pair.offered();
    pair.device.refuses = Some("mtu");
    pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
    let events = pair.run().unwrap();
    assert!(
        matches!(
            events[..],
            [FrontendEvent::Refused { .. }, FrontendEvent::Running]
        ),
        "{events:?}"
    );
}

#[test]
fn te7_either_end_notices_that_the_other_has_gone_and_leaves_nothing_behind() {
    // After every number of messages of the handshake.
    for messages in 0..40 {
        for front_goes in [true, false] {
            let mut pair = Pair::new(offer(ProtocolFeatures::all()), ProtocolFeatures::FRONTEND);
            let mut chosen = false;
            for _ in 0..messages {
                pair.backend.on_readable(&mut pair.device).unwrap();
                for event in pair.frontend.on_readable().unwrap() {
                    if matches!(event, FrontendEvent::Offered(_)) && !chosen {
                        pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
                        chosen = true;
                    }
                }
            }
            let Pair {
                mut frontend,
                mut backend,
                mut device,
                ..
            } = pair;
            if front_goes {
                drop(frontend);
                let ended = (0..3).find_map(|_| backend.on_readable(&mut device).err());
                assert!(
                    matches!(ended, Some(SessionError::Disconnected)),
                    "{ended:?}"
                );
                assert!(device.disconnected == 1);
            } else {
                backend.close(&mut device);
                assert!(device.disconnected == 1);
                let ended = (0..3).find_map(|_| frontend.on_readable().err());
                assert!(
                    matches!(ended, Some(SessionError::Disconnected)),
                    "{ended:?}"
                );
            }
        }
    }
}

#[test]
fn ten_sessions_live_side_by_side_in_one_thread() {
    let mut pairs: Vec<_> = (0..10)
        .map(|_| Pair::new(offer(ProtocolFeatures::all()), ProtocolFeatures::FRONTEND))
        .collect();
    // One message of each in turn.
    let mut running = 0;
    for _ in 0..60 {
        for pair in &mut pairs {
            pair.backend.on_readable(&mut pair.device).unwrap();
            for event in pair.frontend.on_readable().unwrap() {
                match event {
                    FrontendEvent::Offered(_) => {
                        pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
                    }
                    FrontendEvent::Running => running += 1,
                    other => panic!("{other:?}"),
                }
            }
        }
    }
    assert_eq!(running, 10);
    drop(pairs.remove(3));
    for pair in &mut pairs {
        pair.frontend.stop_ring(0).unwrap();
        assert_eq!(pair.run().unwrap().len(), 1);
    }
    let fds: Vec<_> = pairs.iter().map(|pair| pair.backend.as_fd()).collect();
    assert_eq!(fds.len(), 9);
}

/// Both roles, with rings that run.
fn running() -> Pair {
    let mut pair = Pair::new(offer(BY_EVENTS), ProtocolFeatures::FRONTEND);
    pair.offered();
    pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
    assert_eq!(pair.run().unwrap(), [FrontendEvent::Running]);
    pair
}

#[test]
fn a_change_of_the_configuration_space_reaches_the_driver() {
    let mut pair = running();
    assert!(pair.backend.channel().is_some() && pair.frontend.channel().is_some());
    pair.device.config[6] = 0xee;
    assert!(pair.backend.config_changed());
    // Asked over one socket, read over the other.
    let changed = (0..3).find_map(|_| pair.run().unwrap().pop());
    let expected: Vec<u8> = (0..6).chain([0xee]).chain(7..24).collect();
    assert_eq!(changed, Some(FrontendEvent::ConfigChanged(expected)));
    assert_eq!(pair.backend.counters().1, 0);
}

#[test]
fn who_did_not_agree_on_it_is_not_told_of_changes() {
    for without in [ProtocolFeatures::BACKEND_REQ, ProtocolFeatures::CONFIG] {
        let wanted = ProtocolFeatures::FRONTEND.difference(without);
        let mut pair = Pair::new(offer(BY_EVENTS), wanted);
        pair.offered();
        assert!(!pair.backend.config_changed());
        assert_eq!(pair.run().unwrap(), []);
    }
}

#[test]
fn a_device_that_needs_a_reset_is_reset_and_set_up_anew() {
    let mut pair = running();
    pair.frontend.check_status().unwrap();
    assert_eq!(pair.run().unwrap(), []);
    pair.backend.set_needs_reset();
    pair.frontend.check_status().unwrap();
    assert_eq!(pair.run().unwrap(), [FrontendEvent::NeedsReset]);
    pair.frontend.reset().unwrap();
    let offered = pair.offered();
    assert_eq!(offered.protocol_features, BY_EVENTS);
    assert!(!pair.backend.session().runs());
    pair.frontend.set_up(setup(VERSION_1, 1, 2)).unwrap();
    assert_eq!(pair.run().unwrap(), [FrontendEvent::Running]);
    assert!(pair.backend.session().ring_runs(1));
    pair.frontend.check_status().unwrap();
    assert_eq!(pair.run().unwrap(), [], "the reset has taken it back");
}

#[test]
fn a_back_end_without_reset_or_status_says_so() {
    let wanted = ProtocolFeatures::REPLY_ACK;
    let mut pair = Pair::new(offer(BY_EVENTS), wanted);
    pair.offered();
    let error = pair.frontend.reset().unwrap_err();
    assert!(matches!(error, SessionError::Misuse { .. }), "{error}");
}

/// Lets both serve what is no message yet.
fn settle(pair: &mut Pair) {
    for _ in 0..2 {
        pair.run().unwrap();
    }
}

#[test]
fn u24_where_notifications_are_messages_kicks_become_some_and_calls_signal_events() {
    let wanted = ProtocolFeatures::FRONTEND | ProtocolFeatures::INBAND_NOTIFICATIONS;
    let mut pair = Pair::new(offer(ProtocolFeatures::all()), wanted);
    pair.offered();
    assert!(pair.frontend.session().is_in_band());
    let wanted = setup(VERSION_1, 1, 2);
    let events: Vec<_> = wanted
        .rings
        .iter()
        .map(|ring| (Arc::clone(&ring.kick), Arc::clone(&ring.call)))
        .collect();
    // A kick before the rings run is not lost.
    events[1].0.signal().unwrap();
    pair.frontend.set_up(wanted).unwrap();
    assert_eq!(pair.run().unwrap(), [FrontendEvent::Running]);
    let of = |pair: &Pair, ring: usize| {
        let setup = &pair.device.rings[&ring];
        (setup.kick.clone().unwrap(), setup.call.clone().unwrap())
    };
    let rings = [of(&pair, 0), of(&pair, 1)];
    settle(&mut pair);
    assert!(rings[1].0.drain());
    rings[0].0.drain();

    for ring in [0, 1] {
        for _ in 0..3 {
            events[ring].0.signal().unwrap();
        }
        settle(&mut pair);
        assert!(rings[ring].0.drain() && !rings[1 - ring].0.drain());
        rings[ring].1.signal().unwrap();
        settle(&mut pair);
        assert!(events[ring].1.drain() && !events[1 - ring].1.drain());
    }

    // Events only where one of the two does not want it otherwise, or acknowledges nothing.
    let without = ProtocolFeatures::all() - ProtocolFeatures::REPLY_ACK;
    for (offered, wanted) in [
        (ProtocolFeatures::all(), ProtocolFeatures::FRONTEND),
        (without, ProtocolFeatures::all()),
    ] {
        let mut pair = Pair::new(offer(offered), wanted);
        pair.offered();
        assert!(!pair.frontend.session().is_in_band());
    }
}
