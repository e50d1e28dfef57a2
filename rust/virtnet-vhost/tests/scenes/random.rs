//! Bytes and messages by chance: whatever comes, nobody panics, every answer is well formed, and nothing stays open.

use std::os::fd::AsFd;

use proptest::collection::vec;
use proptest::prelude::*;
use virtnet_vhost::message::{Request, RequestKind};
use virtnet_vhost::payload::{
    Config, MemoryRegion, MemoryTable, SingleRegion, VringAddresses, VringFd, VringState,
};

use crate::fake::{MEMORY, PROTOCOL, RING_PACKED, Scene, VERSION_1, bytes};
use crate::words::{Reply, Witness, raw};

/// Something that a front-end sends.
#[derive(Debug, Clone)]
struct Sent {
    bytes: Vec<u8>,
    fds: usize,
}

/// Numbers that are right, nearly right, and wrong.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..5_u32,
        2 => prop_oneof![Just(8_u32), Just(256), Just(32_768), Just(0x8000), Just(0x8000_8000)],
        1 => any::<u32>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0..16_u64).prop_map(|page| MEMORY.user_addr + page * 0x1000),
        1 => (0..0x2_0000_u64).prop_map(|offset| MEMORY.user_addr + offset),
        1 => any::<u64>(),
    ]
}

fn region() -> impl Strategy<Value = MemoryRegion> {
    prop_oneof![
        3 => Just(MEMORY),
        2 => (0..4_u64).prop_map(|n| MemoryRegion {
            guest_addr: n << 17,
            user_addr: MEMORY.user_addr + (n << 17),
            ..MEMORY
        }),
        1 => (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(
            |(guest_addr, size, user_addr, mmap_offset)| MemoryRegion {
                guest_addr,
                size,
                user_addr,
                mmap_offset,
            }
        ),
    ]
}

/// A request that has the right form, whatever its numbers.
fn request() -> impl Strategy<Value = Request> {
    let state = || (number(), number()).prop_map(|(index, num)| VringState { index, num });
    let word = || {
        let ring = prop_oneof![4 => 0..5_u64, 1 => any::<u64>()];
        (ring, any::<bool>()).prop_map(|(ring, fd)| VringFd {
            word: if fd { ring & !0x100 } else { ring | 0x100 },
        })
    };
    let features = prop_oneof![
        Just(VERSION_1),
        Just(VERSION_1 | PROTOCOL),
        Just(VERSION_1 | RING_PACKED),
        any::<u64>(),
    ];
    let addresses = (number(), 0..2_u32, address(), address(), address()).prop_map(
        |(index, flags, desc, used, avail)| VringAddresses {
            index,
            flags,
            desc,
            used,
            avail,
            log_guest_addr: 0,
        },
    );
    let config = || {
        (number(), number(), vec(any::<u8>(), 0..300)).prop_map(|(offset, flags, data)| Config {
            offset,
            flags,
            data,
        })
    };
    let protocol = prop_oneof![3 => Just(u64::MAX), 1 => any::<u64>(), 1 => Just(0)];
    let agreement = prop_oneof![
        features.prop_map(Request::SetFeatures),
        protocol.prop_map(Request::SetProtocolFeatures),
        prop_oneof![Just(0_u64), Just(15), Just(7), any::<u64>()].prop_map(Request::SetStatus),
        Just(Request::ResetOwner),
        Just(Request::ResetDevice),
    ];
    let memory = prop_oneof![
        3 => vec(region(), 0..3).prop_map(|regions| Request::SetMemTable(MemoryTable(regions))),
        1 => region().prop_map(|region| Request::AddMemReg(SingleRegion(region))),
        1 => region().prop_map(|region| Request::RemMemReg(SingleRegion(region))),
    ];
    let rings = prop_oneof![
        3 => state().prop_map(Request::SetVringNum),
        1 => state().prop_map(Request::SetVringBase),
        3 => addresses.prop_map(Request::SetVringAddr),
        3 => word().prop_map(Request::SetVringKick),
        1 => word().prop_map(Request::SetVringCall),
        1 => word().prop_map(Request::SetVringErr),
        1 => state().prop_map(Request::SetVringEnable),
        1 => state().prop_map(Request::GetVringBase),
    ];
    let rest = prop_oneof![
        any::<u64>().prop_map(Request::NetSetMtu),
        any::<u64>().prop_map(Request::SendRarp),
        config().prop_map(Request::GetConfig),
        config().prop_map(Request::SetConfig),
        Just(Request::GetFeatures),
        Just(Request::GetQueueNum),
        Just(Request::GetMaxMemSlots),
        Just(Request::GetStatus),
        Just(Request::SetOwner),
    ];
    prop_oneof![2 => agreement, 2 => memory, 6 => rings, 1 => rest]
}

/// A request with the descriptors it needs, or now and then with others.
fn sent() -> impl Strategy<Value = Sent> {
    let fds = prop_oneof![9 => Just(None), 1 => (0..4_usize).prop_map(Some)];
    let right = (request(), any::<bool>(), fds).prop_map(|(request, need_reply, fds)| Sent {
        fds: fds.unwrap_or_else(|| request.descriptor_count().0),
        bytes: bytes(&request, need_reply),
    });
    let code = prop_oneof![0..50_u32, any::<u32>()];
    let odd = (code, any::<bool>(), vec(any::<u8>(), 0..80), 0..3_usize).prop_map(
        |(code, need_reply, payload, fds)| Sent {
            bytes: raw(code, if need_reply { 9 } else { 1 }, &payload),
            fds,
        },
    );
    prop_oneof![12 => right, 1 => odd]
}

/// Tells whether every reply answers a request of this name in the form it has.
fn check_reply(reply: &Reply, sent: &Sent) {
    assert_eq!(reply.code.to_ne_bytes(), sent.bytes[..4]);
    assert_eq!(reply.flags, 5);
    let length = reply.payload.len();
    match RequestKind::from_code(reply.code) {
        Some(RequestKind::GetConfig) => assert!(length == 0 || length == sent.bytes.len() - 12),
        // These are answered by what was told, filled in.
        Some(
            RequestKind::SetLogBase
            | RequestKind::GetInflightFd
            | RequestKind::SetMemTable
            | RequestKind::AddMemReg,
        ) => assert!(
            [0, 8, sent.bytes.len() - 12].contains(&length),
            "{length} bytes"
        ),
        _ => assert!(length == 0 || length == 8, "{length} bytes"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn tb21_messages_in_any_order_never_panic_never_leak_and_are_answered_at_most_once(
        messages in vec(sent(), 1..60),
    ) {
        let mut scene = Scene::new();
        let mut witnesses = Vec::new();
        for message in &messages {
            let (seen, given): (Vec<_>, Vec<_>) = (0..message.fds).map(|_| Witness::new()).unzip();
            let fds: Vec<_> = given.iter().map(AsFd::as_fd).collect();
            scene.send(&message.bytes, &fds);
            witnesses.extend(seen);
            drop(given);
            // Every message here has a form that can be followed, so the connection stays.
            scene.serve().unwrap();
            let replies = Reply::of(&scene.answers());
            prop_assert!(replies.len() <= 1);
            replies.iter().for_each(|reply| check_reply(reply, message));
            // The device and the session never differ about what runs.
            for ring in 0..4 {
                prop_assert_eq!(
                    scene.backend.session().ring_runs(ring),
                    scene.device.rings.contains_key(&ring),
                    "ring {}", ring
                );
            }
        }
        drop(scene);
        witnesses.iter_mut().for_each(Witness::assert_closed);
    }

    #[test]
    fn bytes_by_chance_never_panic_and_never_leak(
        pieces in vec((vec(any::<u8>(), 1..200), 0..3_usize), 1..20),
        sane in any::<bool>(),
    ) {
        let mut scene = Scene::new();
        let mut witnesses = Vec::new();
        for (mut bytes, fds) in pieces {
            if sane && bytes.len() >= 12 {
                // Now and then a header that can be followed, so that more than the first bytes is looked at.
                bytes[0] %= 46;
                bytes[1..4].fill(0);
                bytes[4] = bytes[4] & 8 | 1;
                bytes[9..12].fill(0);
            }
            let (seen, given): (Vec<_>, Vec<_>) = (0..fds).map(|_| Witness::new()).unzip();
            let fds: Vec<_> = given.iter().map(AsFd::as_fd).collect();
            if scene.peer.send(&bytes, &fds).is_err() {
                break;
            }
            witnesses.extend(seen);
            if scene.serve().is_err() {
                assert!(scene.device.disconnected == 1);
                break;
            }
            scene.answers();
        }
        drop(scene);
        witnesses.iter_mut().for_each(Witness::assert_closed);
    }

    #[test]
    fn tb3_how_messages_are_cut_into_pieces_makes_no_difference(
        messages in vec(request(), 1..12),
        cuts in vec(1..40_usize, 1..20),
    ) {
        // Without descriptors, which are tied to their byte; those requests are refused, and that the same way.
        let heap: Vec<u8> = messages.iter().flat_map(|request| bytes(request, true)).collect();
        let (mut whole, mut pieces) = (Scene::new(), Scene::new());
        whole.send(&heap, &[]);
        whole.serve().unwrap();
        let mut rest = &heap[..];
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            pieces.send(piece, &[]);
            pieces.serve().unwrap();
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(whole.answer(), pieces.answer());
        prop_assert_eq!(whole.device.log, pieces.device.log);
    }
}
