use std::time::Duration;

use virtnet_sys::{Fault, Stream, memfd};

use super::*;
use crate::frontend::Frontend;
use crate::message::{HEADER_LEN, Header, encode_reply};
use crate::payload::MemoryRegion;

const VERSION_1: u64 = 1 << 32;

/// All but memory that comes later, which does not go together with memory slots.
const WANTED: ProtocolFeatures = ProtocolFeatures::all().difference(ProtocolFeatures::PAGEFAULT);

/// A back-end as a function from a request to its answer; everything is acknowledged with zero unless it says otherwise.
struct Scripted<'a> {
    features: u64,
    protocol: ProtocolFeatures,
    special: &'a dyn Fn(&Request) -> Option<Vec<u8>>,
    /// What it was asked, in order.
    asked: Vec<String>,
}

impl<'a> Scripted<'a> {
    fn new(protocol: ProtocolFeatures) -> Self {
        Self::with(protocol, &|_| None)
    }

    fn with(protocol: ProtocolFeatures, special: &'a dyn Fn(&Request) -> Option<Vec<u8>>) -> Self {
        let bit = if protocol.is_empty() {
            0
        } else {
            bits::PROTOCOL_FEATURES
        };
        Self {
            features: VERSION_1 | bit,
            protocol,
            special,
            asked: Vec::new(),
        }
    }

    /// Answers until the session has nothing more to say; returns what the driver learns.
    fn serve(&mut self, session: &mut FrontendSession) -> Result<Vec<FrontendEvent>, SessionError> {
        while let Some((bytes, fds)) = session.next_message() {
            let (request, need_reply) = parse_request(&bytes);
            assert_eq!(
                request.descriptor_count(),
                (fds.len(), fds.len().max(request.descriptor_count().1))
            );
            self.asked.push(request.kind().name().to_owned());
            if request.kind().reply() != Reply::Ack || need_reply {
                let payload = self.answer(&request);
                session.answered(message(request.kind().code(), 5, payload))?;
            }
        }
        Ok(std::iter::from_fn(|| session.next_event()).collect())
    }

    fn answer(&self, request: &Request) -> Vec<u8> {
        if let Some(special) = (self.special)(request) {
            return special;
        }
        let number = match request {
            Request::GetFeatures => self.features,
            Request::GetProtocolFeatures => self.protocol.bits(),
            Request::GetQueueNum => 4,
            Request::GetMaxMemSlots => 32,
            Request::GetStatus => FEATURES_OK,
            Request::GetConfig(config) => return encode(config),
            Request::GetVringBase(state) => return encode(&VringState { num: 99, ..*state }),
            _ => 0,
        };
        number.to_ne_bytes().to_vec()
    }
}

fn encode(payload: &impl Payload) -> Vec<u8> {
    let mut bytes = Vec::new();
    payload.encode(&mut bytes);
    bytes
}

fn parse_request(bytes: &[u8]) -> (Request, bool) {
    let (header, payload) = bytes.split_first_chunk::<HEADER_LEN>().unwrap();
    let header = Header::from_bytes(*header);
    let kind = RequestKind::from_code(header.request).unwrap();
    (
        Request::decode(kind, payload).unwrap(),
        header.needs_reply(),
    )
}

fn message(request: u32, flags: u32, payload: Vec<u8>) -> Message {
    let size = u32::try_from(payload.len()).unwrap();
    Message {
        header: Header {
            request,
            flags,
            size,
        },
        payload,
        fds: Vec::new(),
        misplaced: false,
    }
}

fn region(number: u64) -> Region {
    let start = number << 16;
    let layout = MemoryRegion {
        guest_addr: start,
        size: 4096,
        user_addr: start,
        mmap_offset: 0,
    };
    Region {
        layout,
        file: memfd::create("virtnet-test", 4096, false).unwrap(),
    }
}

fn ring() -> FrontendRing {
    let event = || Arc::new(EventFd::new().unwrap());
    FrontendRing {
        size: 64,
        base: 0,
        addresses: RingAddresses::default(),
        kick: event(),
        call: event(),
    }
}

fn setup(regions: u64, rings: usize, mtu: Option<u16>) -> FrontendSetup {
    FrontendSetup {
        features: VERSION_1,
        mtu,
        regions: (0..regions).map(region).collect(),
        rings: vec![ring(); rings],
        inflight: None,
    }
}

/// A session whose back-end has said what it offers.
fn offered(backend: &mut Scripted<'_>) -> FrontendSession {
    let mut session = FrontendSession::new(WANTED);
    let events = backend.serve(&mut session).unwrap();
    assert!(matches!(events[..], [FrontendEvent::Offered(_)]));
    backend.asked.clear();
    session
}

#[test]
fn everything_a_back_end_offers_is_found_out() {
    let mut backend = Scripted::new(ProtocolFeatures::all());
    let mut session = FrontendSession::with_channel(WANTED, Stream::pair().unwrap().0.into());
    let events = backend.serve(&mut session).unwrap();
    let expected = Offered {
        features: backend.features,
        protocol_features: ProtocolFeatures::all(),
        queue_pairs: Some(4),
        memory_slots: Some(32),
        config: Some(vec![0; 24]),
        status: Some(8),
    };
    assert_eq!(events, [FrontendEvent::Offered(expected)]);
    assert_eq!(
        session.protocol_features(),
        (ProtocolFeatures::FRONTEND | ProtocolFeatures::ON_REQUEST) & WANTED,
        "no more than is implemented"
    );
    assert_eq!(
        backend.asked,
        [
            "SET_OWNER",
            "GET_FEATURES",
            "GET_PROTOCOL_FEATURES",
            "SET_PROTOCOL_FEATURES",
            "SET_BACKEND_REQ_FD",
            "GET_QUEUE_NUM",
            "GET_MAX_MEM_SLOTS",
            "GET_CONFIG",
            "GET_STATUS",
        ]
    );
}

#[test]
fn a_back_end_without_protocol_features_is_asked_for_nothing_more() {
    let mut backend = Scripted::new(ProtocolFeatures::empty());
    let mut session = FrontendSession::new(WANTED);
    let events = backend.serve(&mut session).unwrap();
    assert_eq!(
        events,
        [FrontendEvent::Offered(Offered {
            features: VERSION_1,
            ..Offered::default()
        })]
    );
    assert_eq!(backend.asked, ["SET_OWNER", "GET_FEATURES"]);
}

#[test]
fn u30_only_accepted_protocol_features_are_used() {
    let mut backend = Scripted::new(ProtocolFeatures::all());
    let mut session = FrontendSession::new(ProtocolFeatures::REPLY_ACK);
    backend.serve(&mut session).unwrap();
    assert_eq!(session.protocol_features(), ProtocolFeatures::REPLY_ACK);
    assert_eq!(backend.asked.last().unwrap(), "SET_PROTOCOL_FEATURES");
}

#[test]
fn set_up_tells_everything_in_the_order_back_ends_expect() {
    let mut backend = Scripted::new(ProtocolFeatures::all());
    let mut session = offered(&mut backend);
    session.set_up(setup(1, 2, Some(9000))).unwrap();
    assert_eq!(
        backend.serve(&mut session).unwrap(),
        [FrontendEvent::Running]
    );
    let one_ring = [
        "SET_VRING_NUM",
        "SET_VRING_BASE",
        "SET_VRING_ADDR",
        "SET_VRING_KICK",
    ];
    let before = [
        "SET_STATUS",
        "SET_VRING_CALL",
        "SET_VRING_CALL",
        "SET_FEATURES",
        "SET_STATUS",
        "GET_STATUS",
        "NET_SET_MTU",
        "SET_MEM_TABLE",
    ];
    let after = [
        "SET_VRING_ENABLE",
        "SET_VRING_ENABLE",
        "SET_STATUS",
        "GET_FEATURES",
    ];
    assert_eq!(
        backend.asked,
        [&before[..], &one_ring, &one_ring, &after].concat()
    );
}

#[test]
fn set_up_without_protocol_features_enables_nothing_and_ends_with_an_answer() {
    let mut backend = Scripted::new(ProtocolFeatures::empty());
    let mut session = offered(&mut backend);
    session.set_up(setup(1, 1, Some(9000))).unwrap();
    assert_eq!(
        backend.serve(&mut session).unwrap(),
        [FrontendEvent::Running]
    );
    let all = [
        "SET_VRING_CALL",
        "SET_FEATURES",
        "SET_MEM_TABLE",
        "SET_VRING_NUM",
        "SET_VRING_BASE",
        "SET_VRING_ADDR",
        "SET_VRING_KICK",
        "GET_FEATURES",
    ];
    assert_eq!(backend.asked, all);
}

#[test]
fn bit_30_is_accepted_exactly_where_it_is_offered() {
    for (protocol, bit) in [
        (ProtocolFeatures::MQ, bits::PROTOCOL_FEATURES),
        (ProtocolFeatures::empty(), 0),
    ] {
        let mut session = offered(&mut Scripted::new(protocol));
        session.set_up(setup(1, 0, None)).unwrap();
        let accepted = session.queue.iter().find_map(|(request, _)| match request {
            Request::SetFeatures(features) => Some(*features),
            _ => None,
        });
        assert_eq!(accepted, Some(VERSION_1 | bit));
    }
}

#[test]
fn many_regions_are_told_one_by_one() {
    let mut backend = Scripted::new(ProtocolFeatures::all());
    let mut session = offered(&mut backend);
    session.set_up(setup(9, 0, None)).unwrap();
    assert_eq!(
        backend.serve(&mut session).unwrap(),
        [FrontendEvent::Running]
    );
    assert_eq!(
        backend
            .asked
            .iter()
            .filter(|name| *name == "ADD_MEM_REG")
            .count(),
        9
    );
    assert!(!backend.asked.iter().any(|name| name == "SET_MEM_TABLE"));

    for (protocol, regions, most) in [
        (ProtocolFeatures::all(), 33, "32"),
        (ProtocolFeatures::MQ, 9, "8"),
    ] {
        let mut session = offered(&mut Scripted::new(protocol));
        let error = session.set_up(setup(regions, 0, None)).unwrap_err();
        assert!(
            error.to_string().contains(&format!("at most {most} ")),
            "{error}"
        );
        assert_eq!(error.fault(), Fault::Caller);
        assert!(session.next_message().is_none(), "nothing was sent");
        session.set_up(setup(1, 0, None)).unwrap();
    }
}

#[test]
fn set_up_has_one_moment() {
    let mut backend = Scripted::new(ProtocolFeatures::all());
    let mut session = FrontendSession::new(WANTED);
    assert!(matches!(
        session.set_up(setup(1, 1, None)),
        Err(SessionError::Misuse { .. })
    ));
    backend.serve(&mut session).unwrap();
    session.set_up(setup(1, 1, None)).unwrap();
    assert!(matches!(
        session.set_up(setup(1, 1, None)),
        Err(SessionError::Misuse { .. })
    ));
    backend.serve(&mut session).unwrap();
    assert!(matches!(
        session.set_up(setup(1, 1, None)),
        Err(SessionError::Misuse { .. })
    ));
}

#[test]
fn a_ring_stops_and_starts_again() {
    let mut backend = Scripted::new(ProtocolFeatures::all());
    let mut session = offered(&mut backend);
    session.set_up(setup(1, 2, None)).unwrap();
    backend.serve(&mut session).unwrap();
    backend.asked.clear();
    session.stop_ring(1);
    assert_eq!(
        backend.serve(&mut session).unwrap(),
        [FrontendEvent::RingStopped { ring: 1, base: 99 }]
    );
    session.start_ring(1, &ring()).unwrap();
    session.enable_ring(1, false);
    assert_eq!(backend.serve(&mut session).unwrap(), []);
    let all = [
        "GET_VRING_BASE",
        "SET_VRING_CALL",
        "SET_VRING_NUM",
        "SET_VRING_BASE",
        "SET_VRING_ADDR",
        "SET_VRING_KICK",
        "SET_VRING_ENABLE",
    ];
    assert_eq!(backend.asked, all);
    assert!(matches!(
        session.start_ring(256, &ring()),
        Err(SessionError::Misuse { .. })
    ));
}

#[test]
fn a_refusal_ends_the_handshake_at_the_request_it_belongs_to() {
    let one = 1u64.to_ne_bytes().to_vec();
    for refused in [
        RequestKind::SetFeatures,
        RequestKind::SetMemTable,
        RequestKind::SetVringKick,
    ] {
        let refuse = |request: &Request| (request.kind() == refused).then(|| one.clone());
        let mut backend = Scripted::with(ProtocolFeatures::all(), &refuse);
        let mut session = offered(&mut backend);
        session.set_up(setup(1, 2, None)).unwrap();
        let error = backend.serve(&mut session).unwrap_err();
        assert!(
            matches!(error, SessionError::Refused { request, code: 1 } if request == refused.name()),
            "{error}"
        );
        assert_eq!(
            (error.fault(), backend.asked.last().unwrap().as_str()),
            (Fault::Peer, refused.name())
        );
    }
}

#[test]
fn a_refused_mtu_and_what_is_refused_later_are_told_and_borne() {
    let refuse = |request: &Request| {
        let borne = matches!(
            request,
            Request::NetSetMtu(_) | Request::SetVringEnable(VringState { num: 0, .. })
        );
        borne.then(|| 7u64.to_ne_bytes().to_vec())
    };
    let mut backend = Scripted::with(ProtocolFeatures::all(), &refuse);
    let mut session = offered(&mut backend);
    session.set_up(setup(1, 1, Some(1500))).unwrap();
    let refused = |request| FrontendEvent::Refused { request, code: 7 };
    let events = backend.serve(&mut session).unwrap();
    assert_eq!(
        events,
        [refused(RequestKind::NetSetMtu), FrontendEvent::Running]
    );
    session.enable_ring(0, false);
    assert_eq!(
        backend.serve(&mut session).unwrap(),
        [refused(RequestKind::SetVringEnable)]
    );
}

#[test]
fn tc3_a_back_end_that_clears_features_ok_has_refused_the_features() {
    let status = |request: &Request| {
        matches!(request, Request::GetStatus).then(|| 3u64.to_ne_bytes().to_vec())
    };
    let mut backend = Scripted::with(ProtocolFeatures::all(), &status);
    let mut session = offered(&mut backend);
    session.set_up(setup(1, 1, None)).unwrap();
    let error = backend.serve(&mut session).unwrap_err();
    assert!(
        matches!(
            error,
            SessionError::Refused {
                request: "SET_FEATURES",
                code: 3
            }
        ),
        "{error}"
    );
}

#[test]
fn tc4_tc6_odd_answers_about_numbers_are_passed_on_and_open_ones_left_open() {
    let huge = |request: &Request| match request {
        Request::GetQueueNum => Some(u64::MAX.to_ne_bytes().to_vec()),
        Request::GetStatus => Some(256u64.to_ne_bytes().to_vec()),
        Request::GetMaxMemSlots | Request::GetConfig(_) => Some(Vec::new()),
        _ => None,
    };
    let session = offered(&mut Scripted::with(ProtocolFeatures::all(), &huge));
    let Offered {
        queue_pairs,
        memory_slots,
        config,
        status,
        ..
    } = session.offered().clone();
    assert_eq!(
        (queue_pairs, memory_slots, config, status),
        (Some(u64::MAX), None, None, None)
    );
}

#[test]
fn tc6_configuration_has_the_length_that_was_asked_for_or_none() {
    for (len, expected) in [
        (0, Some(None)),
        (23, None),
        (24, Some(Some(vec![0; 24]))),
        (25, None),
    ] {
        let config = |request: &Request| match request {
            Request::GetConfig(_) => Some(encode(&Config {
                data: vec![0; len],
                ..Config::default()
            })),
            _ => None,
        };
        let mut session = FrontendSession::new(WANTED);
        let outcome = Scripted::with(ProtocolFeatures::all(), &config).serve(&mut session);
        let found = outcome.ok().map(|_| session.offered().config.clone());
        assert_eq!(found, expected, "{len} bytes");
    }
}

/// A session that awaits the answer to GET_FEATURES.
fn awaiting() -> FrontendSession {
    let mut session = FrontendSession::new(WANTED);
    while session.next_message().is_some() {}
    assert_eq!(
        session.awaited().map(|(name, _)| name),
        Some("GET_FEATURES")
    );
    session
}

#[test]
fn tc1_an_answer_has_to_be_the_one_that_is_awaited() {
    let number = || vec![0; 8];
    for (code, flags) in [(2, 5), (15, 5), (0, 5), (u32::MAX, 5), (1, 1), (1, 9)] {
        let error = awaiting()
            .answered(message(code, flags, number()))
            .unwrap_err();
        assert!(
            matches!(
                error,
                SessionError::NotTheReply {
                    expected: "GET_FEATURES",
                    ..
                }
            ),
            "{error}"
        );
    }
    let mut session = awaiting();
    session.answered(message(1, 5, number())).unwrap();
    let error = session.answered(message(1, 5, number())).unwrap_err();
    assert!(
        matches!(
            error,
            SessionError::NotTheReply {
                expected: "nothing",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn tc1_an_answer_has_its_length_and_no_descriptors() {
    for len in [0, 7, 9] {
        let error = awaiting()
            .answered(message(1, 5, vec![0; len]))
            .unwrap_err();
        assert!(
            matches!(error, SessionError::ReplyLength { found, .. } if found == len),
            "{error}"
        );
    }
    let mut with_fds = message(1, 5, vec![0; 8]);
    with_fds.fds.push(EventFd::new().unwrap().into());
    assert!(matches!(
        awaiting().answered(with_fds),
        Err(SessionError::ReplyDescriptors { found: 1, .. })
    ));
    let misplaced = Message {
        misplaced: true,
        ..message(1, 5, vec![0; 8])
    };
    assert!(matches!(
        awaiting().answered(misplaced),
        Err(SessionError::ReplyDescriptors { .. })
    ));
}

#[test]
fn tc5_a_base_of_another_ring_is_no_answer() {
    let other = |request: &Request| match request {
        Request::GetVringBase(_) => Some(encode(&VringState { index: 7, num: 0 })),
        _ => None,
    };
    let mut backend = Scripted::with(ProtocolFeatures::all(), &other);
    let mut session = offered(&mut backend);
    session.stop_ring(0);
    let error = backend.serve(&mut session).unwrap_err();
    assert!(
        matches!(error, SessionError::ReplyRing { asked: 0, found: 7 }),
        "{error}"
    );
}

#[test]
fn u29_a_question_for_a_base_says_nothing_else() {
    let mut session = offered(&mut Scripted::new(ProtocolFeatures::all()));
    session.stop_ring(3);
    let (request, _) = parse_request(&session.next_message().unwrap().0);
    assert_eq!(
        request,
        Request::GetVringBase(VringState { index: 3, num: 0 })
    );
}

#[test]
fn tc2_a_back_end_has_ten_seconds_for_each_answer() {
    const SECOND: u64 = 1_000_000_000;
    let (ours, backend) = Stream::pair().unwrap();
    let mut frontend = Frontend::start(ours).unwrap();
    frontend.on_tick(0).unwrap();
    frontend.on_tick(9 * SECOND).unwrap();
    // An answer, and the next question: the time begins anew.
    let mut reply = Vec::new();
    encode_reply(
        RequestKind::GetFeatures.code(),
        &bits::PROTOCOL_FEATURES,
        &mut reply,
    );
    backend.send(&reply, &[]).unwrap();
    assert_eq!(frontend.on_readable().unwrap(), []);
    frontend.on_tick(12 * SECOND).unwrap();
    frontend.on_tick(21 * SECOND).unwrap();
    let error = frontend.on_tick(22 * SECOND).unwrap_err();
    let ten = Duration::from_secs(10);
    assert!(
        matches!(error, SessionError::NoReply { request: "GET_PROTOCOL_FEATURES", after } if after == ten),
        "{error}"
    );
}

#[test]
fn silence_is_no_fault_when_nothing_was_asked() {
    let (ours, backend) = Stream::pair().unwrap();
    let mut frontend = Frontend::start(ours).unwrap();
    let mut reply = Vec::new();
    encode_reply(RequestKind::GetFeatures.code(), &VERSION_1, &mut reply);
    backend.send(&reply, &[]).unwrap();
    assert_eq!(frontend.on_readable().unwrap().len(), 1);
    for hour in 0..24 {
        frontend.on_tick(hour * 3_600_000_000_000).unwrap();
    }
    drop(backend);
    assert!(matches!(
        frontend.on_readable(),
        Err(SessionError::Disconnected)
    ));
}
