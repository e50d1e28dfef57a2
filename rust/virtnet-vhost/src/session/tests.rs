mod rings;

use std::fs::File;

use super::*;
use crate::message::RequestKind;
use crate::payload::{DeviceState, InflightArea, LogArea, MemoryRegion, VringAddresses};

const VERSION_1: u64 = 1 << 32;
const PACKED: u64 = bits::RING_PACKED;
const PROTOCOL: u64 = bits::PROTOCOL_FEATURES;

/// User addresses of memory, and of a ring that lies in it.
const MEMORY: MemoryRegion = MemoryRegion {
    guest_addr: 0,
    size: 0x10000,
    user_addr: 0x7000_0000,
    mmap_offset: 0,
};
const RING: VringAddresses = VringAddresses {
    index: 0,
    flags: 0,
    desc: 0x7000_0000,
    avail: 0x7000_1000,
    used: 0x7000_2000,
    log_guest_addr: 0,
};

fn session(protocol: ProtocolFeatures) -> BackendSession {
    BackendSession::new(Offer::new(VERSION_1 | PACKED, protocol, 1))
}

fn fd() -> OwnedFd {
    EventFd::new().unwrap().into()
}

fn state(num: u32) -> VringState {
    VringState { index: 0, num }
}

fn kick() -> Request {
    Request::SetVringKick(VringFd::new(0, true))
}

/// As many descriptors as a request has to come with, all of them events.
fn fds_for(request: &Request) -> Vec<OwnedFd> {
    (0..request.descriptor_count().0).map(|_| fd()).collect()
}

/// Has a request carried out by a device that can do everything and stops rings at 77.
fn tell(session: &mut BackendSession, request: Request) -> Result<(Vec<String>, Answer), Refusal> {
    let mut step = session
        .handle(&request, fds_for(&request))
        .inspect_err(|_| session.refused(&request))?;
    let mut names = Vec::new();
    for action in std::mem::take(&mut step.actions) {
        if let Action::StopRing(ring) = action {
            step.ring_stopped(ring, Some(77));
        }
        let name = format!("{action:?}");
        names.push(name.split(['(', ' ']).next().unwrap_or_default().to_owned());
    }
    let answer = match step.answer.clone() {
        Answer::Base(ring) => Answer::Number(step.base(ring).into()),
        answer => answer,
    };
    session.commit(step);
    Ok((names, answer))
}

fn actions(session: &mut BackendSession, request: Request) -> Vec<String> {
    tell(session, request).unwrap().0
}

/// The requests that bring a session from nothing to a running ring, in four parts.
fn handshake() -> [Vec<Request>; 4] {
    [
        vec![],
        vec![
            Request::SetOwner,
            Request::SetFeatures(VERSION_1 | PROTOCOL),
            Request::SetProtocolFeatures(
                ProtocolFeatures::BACKEND
                    .difference(ProtocolFeatures::STATUS)
                    .bits(),
            ),
        ],
        vec![
            Request::SetMemTable(MemoryTable(vec![MEMORY])),
            Request::SetVringNum(state(256)),
            Request::SetVringBase(state(5)),
            Request::SetVringAddr(RING),
            Request::SetVringCall(VringFd::new(0, true)),
        ],
        vec![kick(), Request::SetVringEnable(state(1))],
    ]
}

/// A session that has come so far: 0 fresh, 1 agreed, 2 ready to start, 3 running.
fn at(phase: usize) -> BackendSession {
    let mut session = session(ProtocolFeatures::BACKEND);
    for request in handshake().into_iter().take(phase + 1).flatten() {
        tell(&mut session, request).unwrap();
    }
    assert_eq!(session.ring_runs(0), phase == 3);
    session
}

const INFLIGHT: InflightArea = InflightArea {
    mmap_size: 8192,
    mmap_offset: 0,
    num_queues: 2,
    queue_size: 128,
};

/// A request that is right in itself.
fn sample(kind: RequestKind) -> Request {
    let elsewhere = MemoryRegion {
        guest_addr: 1 << 32,
        user_addr: 1 << 40,
        ..MEMORY
    };
    let config = Config {
        offset: 0,
        flags: 0,
        data: vec![0; 24],
    };
    match kind {
        RequestKind::SetFeatures => Request::SetFeatures(VERSION_1 | PROTOCOL),
        RequestKind::SetProtocolFeatures => {
            Request::SetProtocolFeatures(ProtocolFeatures::REPLY_ACK.bits())
        }
        RequestKind::SetMemTable => Request::SetMemTable(MemoryTable(vec![MEMORY])),
        RequestKind::AddMemReg => Request::AddMemReg(SingleRegion(elsewhere)),
        RequestKind::RemMemReg => Request::RemMemReg(SingleRegion(MEMORY)),
        RequestKind::SetVringNum => Request::SetVringNum(state(128)),
        RequestKind::SetVringAddr => Request::SetVringAddr(RING),
        RequestKind::SetVringKick => kick(),
        RequestKind::SetVringCall => Request::SetVringCall(VringFd::new(0, true)),
        RequestKind::SetVringErr => Request::SetVringErr(VringFd::new(0, false)),
        RequestKind::SetVringEnable => Request::SetVringEnable(state(1)),
        RequestKind::NetSetMtu => Request::NetSetMtu(1500),
        RequestKind::GetConfig => Request::GetConfig(config),
        RequestKind::SetConfig => Request::SetConfig(config),
        RequestKind::SetLogBase => Request::SetLogBase(LogArea::default()),
        RequestKind::GetInflightFd => Request::GetInflightFd(INFLIGHT),
        RequestKind::SetInflightFd => Request::SetInflightFd(INFLIGHT),
        kind => {
            let zeros = (0..=64).find_map(|length| Request::decode(kind, &vec![0; length]));
            zeros.unwrap_or_else(|| panic!("{kind:?} needs a sample"))
        }
    }
}

/// Which request is served when. STATUS is not negotiated here; it has tests of its own.
const ORDER: &str = "
                          fresh agreed ready running
    GET_FEATURES            yes    yes   yes    yes
    SET_FEATURES            yes    yes   yes    yes
    SET_OWNER               yes    yes   yes    yes
    RESET_OWNER             yes    yes   yes    yes
    SET_MEM_TABLE           yes    yes   yes    yes
    SET_LOG_BASE             no    yes   yes    yes
    SET_LOG_FD               no    yes   yes    yes
    SET_VRING_NUM           yes    yes   yes     no
    SET_VRING_ADDR          yes    yes   yes    yes
    SET_VRING_BASE          yes    yes   yes     no
    GET_VRING_BASE          yes    yes   yes    yes
    SET_VRING_KICK          yes    yes   yes    yes
    SET_VRING_CALL          yes    yes   yes    yes
    SET_VRING_ERR           yes    yes   yes    yes
    GET_PROTOCOL_FEATURES   yes    yes   yes    yes
    SET_PROTOCOL_FEATURES   yes    yes   yes    yes
    GET_QUEUE_NUM            no    yes   yes    yes
    SET_VRING_ENABLE        yes    yes   yes    yes
    SEND_RARP                no    yes   yes    yes
    NET_SET_MTU              no    yes   yes    yes
    SET_BACKEND_REQ_FD       no    yes   yes    yes
    IOTLB_MSG                no     no    no     no
    SET_VRING_ENDIAN         no     no    no     no
    GET_CONFIG               no    yes   yes    yes
    SET_CONFIG               no    yes   yes    yes
    CREATE_CRYPTO_SESSION    no     no    no     no
    CLOSE_CRYPTO_SESSION     no     no    no     no
    POSTCOPY_ADVISE         no    yes   yes    yes
    POSTCOPY_LISTEN          no     no    no     no
    POSTCOPY_END            no    yes   yes    yes
    GET_INFLIGHT_FD          no    yes   yes    yes
    SET_INFLIGHT_FD          no    yes   yes    yes
    GPU_SET_SOCKET           no     no    no     no
    RESET_DEVICE             no    yes   yes    yes
    VRING_KICK              no    yes   yes    yes
    GET_MAX_MEM_SLOTS        no    yes   yes    yes
    ADD_MEM_REG              no    yes   yes    yes
    REM_MEM_REG              no     no   yes    yes
    SET_STATUS               no     no    no     no
    GET_STATUS               no     no    no     no
    GET_SHARED_OBJECT        no     no    no     no
    SET_DEVICE_STATE_FD     no    yes   yes     no
    CHECK_DEVICE_STATE      no    yes   yes    yes
    GET_SHMEM_CONFIG         no     no    no     no
    GET_VRING_BASE_SKIP_DRAIN no   yes   yes    yes
";

#[test]
fn tb20_tb21_tb87_every_request_is_served_or_refused_in_every_phase_as_the_table_says() {
    let mut lines = ORDER.lines().skip(2);
    for kind in RequestKind::ALL {
        let mut words = lines.next().unwrap().split_whitespace();
        assert_eq!(words.next(), Some(kind.name()));
        for (phase, expected) in words.enumerate() {
            let (mut session, request) = (at(phase), sample(*kind));
            let outcome = tell(&mut session, request);
            let found = if outcome.is_ok() { "yes" } else { "no" };
            assert_eq!(
                found,
                expected,
                "{} in phase {phase}: {outcome:?}",
                kind.name()
            );
        }
    }
}

#[test]
fn a_refused_request_changes_nothing() {
    for kind in RequestKind::ALL {
        for phase in 0..4 {
            let (mut session, request) = (at(phase), sample(*kind));
            let before = format!("{:?}", session.state);
            if tell(&mut session, request).is_err() {
                assert_eq!(format!("{:?}", session.state), before, "{}", kind.name());
            }
        }
    }
}

#[test]
fn a_step_that_is_not_committed_has_not_been_made() {
    let session = at(2);
    let step = session.handle(&kick(), vec![fd()]).unwrap();
    assert!(matches!(step.actions[..], [Action::StartRing(0, _)]));
    drop(step);
    assert!(!session.ring_state(0).started);
}

#[test]
fn tb10_tb12_tb35_descriptors_come_in_the_number_the_table_says() {
    let session = at(3);
    for kind in RequestKind::ALL {
        let request = sample(*kind);
        let (least, most) = request.descriptor_count();
        for count in (0..4).filter(|count| !(least..=most).contains(count)) {
            let refusal = session
                .handle(&request, (0..count).map(|_| fd()).collect())
                .unwrap_err();
            assert!(
                matches!(refusal, Refusal::DescriptorCount { found, .. } if found == count),
                "{refusal}"
            );
        }
    }
}

#[test]
fn ta110_what_is_no_event_is_refused() {
    let mut session = at(3);
    for path in ["/dev/zero", "/"] {
        let refusal = session
            .handle(&kick(), vec![File::open(path).unwrap().into()])
            .unwrap_err();
        assert!(
            matches!(refusal, Refusal::DescriptorKind { .. }),
            "{refusal}"
        );
    }
    assert_eq!(actions(&mut session, kick()), ["SetKick"]);
}

#[test]
fn tb22_features_are_checked_against_the_offer_and_frozen_while_a_ring_runs() {
    let features =
        |session: &mut BackendSession, features| tell(session, Request::SetFeatures(features));
    let mut fresh = at(0);
    assert!(matches!(
        features(&mut fresh, 1 << 5),
        Err(Refusal::FeaturesNotOffered {
            unoffered: 0x20,
            ..
        })
    ));
    assert_eq!(fresh.features(), None);

    let mut running = at(3);
    let agreed = VERSION_1 | PROTOCOL;
    assert!(matches!(
        features(&mut running, agreed | PACKED),
        Err(Refusal::FeaturesWhileRunning { .. })
    ));
    assert_eq!(
        features(&mut running, agreed).unwrap().0,
        [""; 0],
        "nothing new"
    );
    assert_eq!(
        features(&mut running, agreed | bits::LOG_ALL).unwrap().0,
        ["SetFeatures"]
    );
    assert_eq!(features(&mut running, agreed).unwrap().0, ["SetFeatures"]);
    tell(&mut running, Request::GetVringBase(state(0))).unwrap();
    features(&mut running, agreed | PACKED).unwrap();
}

#[test]
fn bit_26_is_offered_when_there_is_a_log_to_write_to() {
    for (protocol, bit) in [
        (
            ProtocolFeatures::MQ | ProtocolFeatures::LOG_SHMFD,
            bits::LOG_ALL,
        ),
        (ProtocolFeatures::MQ, 0),
    ] {
        let offer = Offer::new(VERSION_1 | bits::LOG_ALL, protocol, 1);
        let session = BackendSession::new(offer);
        assert_eq!(session.offered_features() & bits::LOG_ALL, bit);
    }
}

#[test]
fn u21_the_log_is_handed_on_and_its_event_is_held() {
    let mut session = at(3);
    let area = LogArea {
        mmap_size: 4096,
        mmap_offset: 64,
    };
    let (names, answer) = tell(&mut session, Request::SetLogBase(area)).unwrap();
    assert_eq!(
        (&names[..], answer),
        (&["SetLog".to_owned()][..], Answer::Log(area))
    );
    assert_eq!(actions(&mut session, Request::SetLogFd), [""; 0]);
    assert!(session.state.log_event.is_some());
    let file = File::open("/dev/null").unwrap();
    let refused = session.handle(&Request::SetLogFd, vec![file.into()]);
    assert!(matches!(refused, Err(Refusal::DescriptorKind { .. })));
    let refused = session.handle(&Request::SetLogBase(area), vec![]);
    assert!(matches!(refused, Err(Refusal::DescriptorCount { .. })));
}

#[test]
fn bit_30_is_offered_when_there_are_protocol_features() {
    for (protocol, bit) in [
        (ProtocolFeatures::MQ, PROTOCOL),
        (ProtocolFeatures::empty(), 0),
    ] {
        let mut session = session(protocol);
        let Answer::Number(features) = tell(&mut session, Request::GetFeatures).unwrap().1 else {
            panic!()
        };
        assert_eq!(features & PROTOCOL, bit);
    }
}

#[test]
fn tb23_protocol_features_beyond_the_offer_are_left_out_and_reported() {
    let everything = ProtocolFeatures::from_bits_retain(u64::MAX);
    let mut session = session(everything);
    let request = Request::GetProtocolFeatures;
    let offered = tell(&mut session, request).unwrap().1;
    assert_eq!(
        offered,
        Answer::Number(ProtocolFeatures::BACKEND.bits()),
        "only what works is offered"
    );
    let mut step = session
        .handle(&Request::SetProtocolFeatures(u64::MAX), Vec::new())
        .unwrap();
    assert!(matches!(
        step.reservation.take(),
        Some(Refusal::ProtocolFeaturesNotOffered { .. })
    ));
    session.commit(step);
    assert_eq!(session.protocol_features(), ProtocolFeatures::BACKEND);
}

/// A session with STATUS, ready but for the driver.
fn with_status() -> BackendSession {
    let mut session = session(ProtocolFeatures::BACKEND);
    tell(
        &mut session,
        Request::SetProtocolFeatures(ProtocolFeatures::BACKEND.bits()),
    )
    .unwrap();
    let [_, _, ready, run] = handshake();
    tell(&mut session, Request::SetFeatures(VERSION_1 | PROTOCOL)).unwrap();
    for request in ready.into_iter().chain(run) {
        tell(&mut session, request).unwrap();
    }
    session
}

#[test]
fn u34_v8_rings_wait_for_the_driver_where_the_status_is_negotiated() {
    let mut session = with_status();
    assert!(session.ring_state(0).started && !session.ring_runs(0));
    assert_eq!(actions(&mut session, Request::SetStatus(3)), ["SetStatus"]);
    assert_eq!(
        actions(&mut session, Request::SetStatus(15)),
        ["SetStatus", "StartRing"]
    );
    assert_eq!(
        tell(&mut session, Request::GetStatus).unwrap().1,
        Answer::Number(15)
    );
    assert_eq!(actions(&mut session, Request::SetStatus(15)), ["SetStatus"]);
}

#[test]
fn u34_v3_features_ok_stays_clear_after_refused_features() {
    let mut session = with_status();
    tell(&mut session, Request::SetFeatures(1 << 60)).unwrap_err();
    tell(&mut session, Request::SetStatus(11)).unwrap();
    assert_eq!(
        tell(&mut session, Request::GetStatus).unwrap().1,
        Answer::Number(3)
    );
    tell(&mut session, Request::SetFeatures(VERSION_1)).unwrap();
    tell(&mut session, Request::SetStatus(11)).unwrap();
    assert_eq!(
        tell(&mut session, Request::GetStatus).unwrap().1,
        Answer::Number(11)
    );
}

#[test]
fn tb48_tb49_v10_a_status_of_zero_resets_the_device_and_keeps_the_session() {
    let mut session = with_status();
    tell(&mut session, Request::SetStatus(15)).unwrap();
    session.set_needs_reset();
    assert_eq!(
        tell(&mut session, Request::GetStatus).unwrap().1,
        Answer::Number(15 | 64)
    );
    assert!(matches!(
        tell(&mut session, Request::SetStatus(256)),
        Err(Refusal::Value { .. })
    ));
    tell(&mut session, Request::SetStatus(7)).unwrap();
    assert_eq!(
        tell(&mut session, Request::GetStatus).unwrap().1,
        Answer::Number(7 | 64),
        "only a reset cures"
    );

    assert_eq!(
        actions(&mut session, Request::SetStatus(0)),
        ["StopRing", "Reset", "SetStatus"]
    );
    assert_eq!(
        tell(&mut session, Request::GetStatus).unwrap().1,
        Answer::Number(0)
    );
    assert_eq!(session.ring_state(0), RingState::default());
    assert_eq!(session.protocol_features(), ProtocolFeatures::BACKEND);
    assert_eq!(
        tell(&mut session, Request::GetVringBase(state(0)))
            .unwrap()
            .1,
        Answer::Number(0),
        "begins anew"
    );
}

#[test]
fn u33_tb48_reset_requests_stop_the_rings_and_keep_what_was_agreed() {
    for (request, base, expected) in [
        (Request::ResetDevice, 0, vec!["StopRing", "Reset"]),
        (Request::ResetOwner, 77, vec!["StopRing"]),
    ] {
        let mut session = at(3);
        assert_eq!(actions(&mut session, request.clone()), expected);
        assert_eq!(session.ring_state(0), RingState::default());
        assert!(session.acknowledges());
        assert_eq!(
            actions(&mut session, request),
            expected[1..],
            "again is harmless"
        );
        let step = session.handle(&kick(), vec![fd()]).unwrap();
        assert!(matches!(&step.actions[..], [Action::StartRing(0, setup)] if setup.base == base));
    }
}

#[test]
fn u19_tb82_the_mtu_is_checked() {
    let mut session = at(1);
    for (mtu, valid) in [
        (0, false),
        (67, false),
        (68, true),
        (65_535, true),
        (65_536, false),
        (u64::MAX, false),
    ] {
        assert_eq!(
            tell(&mut session, Request::NetSetMtu(mtu)).is_ok(),
            valid,
            "{mtu}"
        );
    }
}

#[test]
fn tb83_only_the_address_of_a_station_is_announced() {
    let mut session = at(1);
    let word = |mac: [u8; 8]| Request::SendRarp(u64::from_ne_bytes(mac));
    let step = session
        .handle(&word([2, 0, 0, 0, 0, 9, 7, 7]), Vec::new())
        .unwrap();
    assert!(matches!(
        step.actions[..],
        [Action::SendRarp([2, 0, 0, 0, 0, 9])]
    ));
    tell(&mut session, word([0xff; 8])).unwrap_err();
}

#[test]
fn tb80_configuration_beyond_the_end_is_refused() {
    let mut session = at(1);
    for (offset, len, valid) in [
        (0, 256, true),
        (255, 1, true),
        (256, 1, false),
        (0, 257, false),
        (u32::MAX, 1, false),
    ] {
        let config = Config {
            offset,
            flags: 0,
            data: vec![0; len],
        };
        assert_eq!(
            tell(&mut session, Request::GetConfig(config.clone())).is_ok(),
            valid,
            "{offset}+{len}"
        );
        assert_eq!(
            tell(&mut session, Request::SetConfig(config)).is_ok(),
            valid,
            "{offset}+{len}"
        );
    }
}

#[test]
fn tb39_tb42_refused_memory_leaves_the_old_one() {
    let mut session = at(2);
    let overlapping = MemoryTable(vec![MEMORY, MEMORY]);
    tell(&mut session, Request::SetMemTable(overlapping)).unwrap_err();
    tell(&mut session, Request::AddMemReg(SingleRegion(MEMORY))).unwrap_err();
    assert_eq!(actions(&mut session, kick()), ["StartRing"]);
}

#[test]
fn tb71_a_record_of_buffers_in_flight_is_for_rings_that_can_be() {
    let wrong = |num_queues, queue_size| InflightArea {
        num_queues,
        queue_size,
        ..INFLIGHT
    };
    for area in [
        wrong(0, 128),
        wrong(3, 128),
        wrong(u16::MAX, 128),
        wrong(2, 0),
        wrong(2, 100),
        wrong(2, 32_769),
    ] {
        let mut session = at(1);
        for request in [Request::GetInflightFd(area), Request::SetInflightFd(area)] {
            let refused = tell(&mut session, request);
            assert!(matches!(refused, Err(Refusal::Value { .. })), "{area:?}");
        }
    }
    let (names, answer) = tell(&mut at(1), Request::GetInflightFd(INFLIGHT)).unwrap();
    assert_eq!((names.len(), answer), (0, Answer::Inflight(INFLIGHT)));
}

#[test]
fn u27_memory_that_arrives_later_is_answered_with_its_place_and_not_touched_before_it_is_served() {
    let mut session = session(ProtocolFeatures::BACKEND - ProtocolFeatures::STATUS);
    let [_, agree, _, _] = handshake();
    for request in agree {
        tell(&mut session, request).unwrap();
    }
    for request in [
        Request::SetVringNum(state(256)),
        Request::SetVringAddr(RING),
        kick(),
    ] {
        tell(&mut session, request).unwrap();
    }
    let order = |error| matches!(error, Err(Refusal::PostcopyOrder { .. }));
    assert!(order(tell(&mut session, Request::PostcopyListen)));
    tell(&mut session, Request::PostcopyAdvise).unwrap();
    tell(&mut session, Request::PostcopyListen).unwrap();
    let kind = RequestKind::SetMemTable;
    assert!(!session.is_memory_ready(kind, &[0; 8]), "none has come");
    let table = MemoryTable(vec![MEMORY]);
    let told = tell(&mut session, Request::SetMemTable(table.clone())).unwrap();
    assert_eq!(told, (vec!["SetMemory".to_owned()], Answer::Mapped(table)));
    assert!(!session.ring_runs(0));

    // Front-ends say in two ways that they are ready.
    assert!(session.is_memory_ready(kind, &[]) && session.is_memory_ready(kind, &[0; 8]));
    assert!(!session.is_memory_ready(kind, &[1, 0, 0, 0, 0, 0, 0, 0]));
    assert!(!session.is_memory_ready(RequestKind::GetFeatures, &[]));
    let step = session.memory_is_ready(kind).unwrap();
    assert!(matches!(
        &step.actions[..],
        [Action::CatchFaults, Action::StartRing(0, _)]
    ));
    session.commit(step);
    assert!(session.ring_runs(0));

    // A running ring would touch what is not served yet.
    let more = MemoryRegion {
        guest_addr: 1 << 40,
        user_addr: 1 << 40,
        ..MEMORY
    };
    let add = Request::AddMemReg(SingleRegion(more));
    let refused = tell(&mut session, add.clone());
    assert!(matches!(refused, Err(Refusal::RingRuns { ring: 0, .. })));
    tell(&mut session, Request::GetVringBase(state(0))).unwrap();
    let told = tell(&mut session, add).unwrap();
    assert_eq!(told.1, Answer::MappedSlot(more));
    let end = tell(&mut session, Request::PostcopyEnd).unwrap();
    assert_eq!(end, (vec!["EndPostcopy".to_owned()], Answer::Number(0)));
    let plain = tell(
        &mut session,
        Request::SetMemTable(MemoryTable(vec![MEMORY])),
    );
    assert_eq!(plain.unwrap().1, Answer::Ack);
}

#[test]
fn u26_a_state_is_transferred_while_the_device_is_suspended() {
    let transfer = |direction, phase| Request::SetDeviceStateFd(DeviceState { direction, phase });
    let mut session = at(3);
    let refused = tell(&mut session, transfer(0, 0));
    assert!(matches!(refused, Err(Refusal::RingRuns { .. })));
    tell(&mut session, Request::GetVringBase(state(0))).unwrap();
    for (direction, action) in [(0, "SaveState"), (1, "LoadState")] {
        let told = tell(&mut session, transfer(direction, 0)).unwrap();
        assert_eq!(told, (vec![action.to_owned()], Answer::Number(0x100)));
    }
    for wrong in [transfer(2, 0), transfer(0, 1)] {
        let refused = tell(&mut session, wrong);
        assert!(matches!(refused, Err(Refusal::Value { .. })));
    }
}

#[test]
fn u24_a_message_starts_and_kicks_a_ring() {
    let mut session = at(2);
    let kick = Request::VringKick(state(0));
    assert_eq!(actions(&mut session, kick.clone()), ["StartRing"]);
    assert_eq!(actions(&mut session, kick), ["Kick"]);
}
