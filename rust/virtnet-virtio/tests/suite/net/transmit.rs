//! Out of a transmitq: frames of every length in every framing, and what is no packet.

use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload, PortCounters};
use virtnet_virtio::net::{FRAME_MAX, TransmitQueue};
use virtnet_virtio::{DeviceQueue, Features};

use super::{Guest, LENGTHS, Net, both, frame, frame_of};
use crate::support::driver::Driver;
use crate::support::{Random, Setup};

fn queue_of(guest: &Guest) -> TransmitQueue {
    let queue = DeviceQueue::new(&guest.net.config(), guest.memory()).unwrap();
    TransmitQueue::new(queue, guest.net.features)
}

/// How header and frame are spread over buffers: the lengths of the first ones, and of all that follow.
const FRAMINGS: [(&[usize], usize); 11] = [
    (&[], usize::MAX),
    (&[10], usize::MAX),
    (&[12], usize::MAX),
    (&[11], usize::MAX),
    (&[13], usize::MAX),
    (&[12, 14], usize::MAX),
    (&[26], 4096),
    (&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], usize::MAX),
    (&[5, 7], 1000),
    (&[3, 300], 1 << 15),
    (&[0, 12, 0, 1, 0], 1 << 14),
];

fn cut<'a>(bytes: &'a [u8], (first, rest): (&[usize], usize)) -> Vec<&'a [u8]> {
    let mut left = bytes;
    let mut pieces = Vec::new();
    for len in first.iter().copied().chain(std::iter::repeat(rest)) {
        if left.is_empty() {
            break;
        }
        let (piece, more) = left.split_at(len.min(left.len()));
        pieces.push(piece);
        left = more;
    }
    pieces
}

#[test]
fn a_frame_of_any_length_arrives_in_any_framing() {
    for net in Net::every(128, Features::empty()) {
        for indirect in [false, true] {
            let mut guest = Guest::new(net, indirect);
            let mut queue = queue_of(&guest);
            let mut burst = Burst::new();
            let mut counters = PortCounters::default();
            let (mut packets, mut bytes) = (0, 0);
            for len in LENGTHS {
                for framing in FRAMINGS {
                    let sent = frame(len, packets);
                    let chain = [vec![0; net.header_len()], sent.clone()].concat();
                    let id = guest.offer(&cut(&chain, framing));
                    let n = queue
                        .drain(guest.memory(), &mut burst, &mut counters)
                        .unwrap();
                    assert_eq!((n, burst.len()), (1, 1), "{len} bytes as {framing:?}");
                    assert_eq!(frame_of(&burst, 0), sent, "{len} bytes as {framing:?}");
                    assert_eq!(burst.offload(0), Offload::default());
                    assert!(guest.driver.reap(1).is_empty(), "its body still counts");
                    queue.complete();
                    let used = guest.driver.reap(2);
                    assert_eq!((used.len(), used[0].id, used[0].len), (1, id, 0));
                    burst.clear();
                    packets += 1;
                    bytes += len as u64;
                }
            }
            let expected = PortCounters {
                received: packets,
                received_bytes: bytes,
                ..PortCounters::default()
            };
            assert_eq!(counters, expected);
        }
    }
}

#[test]
fn of_long_frames_few_are_taken_at_once_so_that_the_driver_can_fill_others_meanwhile() {
    for net in Net::every(128, Features::empty()) {
        let mut guest = Guest::new(net, false);
        let mut queue = queue_of(&guest);
        let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
        let mut drain = |guest: &mut Guest, buffer: usize, n: usize| {
            let chain = vec![0; 1000];
            for _ in 0..n {
                guest.offer(&chain.chunks(buffer).collect::<Vec<_>>());
            }
            burst.clear();
            let drained = queue.drain(guest.memory(), &mut burst, &mut counters);
            queue.complete();
            assert_eq!(guest.driver.reap(64).len(), burst.len());
            drained.unwrap()
        };
        // The first tell what they are like, and so do short ones that follow.
        assert_eq!(drain(&mut guest, 100, 9), 9);
        assert_eq!(drain(&mut guest, 100, 8), 4);
        assert_eq!(drain(&mut guest, 100, 0), 4);
        assert_eq!(drain(&mut guest, 2000, 10), 4);
        assert_eq!(drain(&mut guest, 2000, 0), 6);
        assert_eq!(drain(&mut guest, 2000, 0), 0);
    }
}

fn header(offload: Offload, header_len: usize) -> Vec<u8> {
    let mut bytes = vec![offload.flags, offload.gso_type];
    for word in [
        offload.hdr_len,
        offload.gso_size,
        offload.csum_start,
        offload.csum_offset,
        0,
    ] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.truncate(header_len);
    bytes
}

/// What becomes of one chain: the packet's metadata, or why it was dropped.
fn outcome(net: Net, chain: &[&[u8]]) -> Result<Offload, DropReason> {
    let mut guest = Guest::new(net, false);
    let mut queue = queue_of(&guest);
    let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
    let id = guest.offer(chain);
    assert_eq!(
        queue.drain(guest.memory(), &mut burst, &mut counters),
        Ok(1)
    );
    queue.complete();
    let used = guest.driver.reap(2);
    assert_eq!(
        (used.len(), used[0].id, used[0].len),
        (1, id, 0),
        "given back"
    );
    assert_eq!(counters.received, 1);
    assert_eq!(
        counters.received,
        burst.len() as u64 + counters.rx_drops.total()
    );
    if burst.is_empty() {
        return Err(counters.rx_drops.iter().next().unwrap().0);
    }
    Ok(burst.offload(0))
}

#[test]
fn ta70_a_chain_too_short_for_a_frame_is_dropped() {
    for net in Net::every(8, Features::CSUM) {
        let n = net.header_len();
        for (len, reason) in [
            (1, DropReason::Malformed),
            (n - 1, DropReason::Malformed),
            (n, DropReason::Runt),
            (n + 1, DropReason::Runt),
            (n + 13, DropReason::Runt),
        ] {
            let bytes = vec![0; len];
            for split in [1, len.div_ceil(2), len] {
                let pieces: Vec<&[u8]> = bytes.chunks(split.max(len.div_ceil(7))).collect();
                assert_eq!(outcome(net, &pieces), Err(reason), "{len} bytes");
            }
        }
        assert_eq!(outcome(net, &[&vec![0; n + 14]]), Ok(Offload::default()));
    }
}

#[test]
fn ta82_a_frame_longer_than_the_longest_is_dropped() {
    for net in Net::every(8, Features::empty()) {
        let longest = net.header_len() + FRAME_MAX as usize;
        for (len, expected) in [
            (longest, Ok(Offload::default())),
            (longest + 1, Err(DropReason::Malformed)),
            (longest + 100_000, Err(DropReason::Malformed)),
        ] {
            let bytes = vec![0; len];
            assert_eq!(outcome(net, &[&bytes]), expected);
            let halves: Vec<&[u8]> = bytes.chunks(len.div_ceil(2)).collect();
            assert_eq!(outcome(net, &halves), expected);
        }
    }
}

/// A checksum at the end of a 60-byte frame.
const CSUM: Offload = Offload {
    flags: Offload::NEEDS_CSUM,
    gso_type: 0,
    hdr_len: 54,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
};

#[test]
fn an_offload_is_taken_over_or_the_frame_is_dropped() {
    let gso = |gso_type| Offload {
        gso_type,
        gso_size: 10,
        ..CSUM
    };
    let none = Features::empty();
    let csum = Features::CSUM;
    let tso4 = csum | Features::HOST_TSO4;
    let all =
        tso4 | Features::HOST_TSO6 | Features::HOST_ECN | Features::HOST_UFO | Features::HOST_USO;
    let dropped = Err(DropReason::BadOffload);
    let rows = [
        // What was not negotiated.
        ("checksum", none, CSUM, dropped),
        ("checksum", csum, CSUM, Ok(CSUM)),
        ("ta77 tcp4", csum, gso(1), dropped),
        ("ta77 tcp4", tso4, gso(1), Ok(gso(1))),
        ("ta77 tcp4", all, gso(1), Ok(gso(1))),
        ("ta77 udp", tso4, gso(3), dropped),
        ("ta77 udp", all, gso(3), Ok(gso(3))),
        ("ta77 tcp6", tso4, gso(4), dropped),
        ("ta77 tcp6", all, gso(4), Ok(gso(4))),
        ("ta77 udp_l4", tso4, gso(5), dropped),
        ("ta77 udp_l4", all, gso(5), Ok(gso(5))),
        ("ta77 ecn", tso4, gso(0x81), dropped),
        ("ta77 ecn", all, gso(0x81), Ok(gso(0x81))),
        ("ta77 ecn", all, gso(0x84), Ok(gso(0x84))),
        // What nobody knows.
        ("ta77 type 2", all, gso(2), dropped),
        ("ta77 type 6", all, gso(6), dropped),
        ("ta77 type 0x7f", all, gso(0x7f), dropped),
        ("ta77 ecn of nothing", all, gso(0x80), dropped),
        ("ta77 ecn of udp", all, gso(0x83), dropped),
        ("ta77 tunnel", all, gso(0x21), dropped),
        // What cannot be done.
        (
            "ta76 no size",
            all,
            Offload {
                gso_size: 0,
                ..gso(1)
            },
            dropped,
        ),
        (
            "ta78 no checksum",
            all,
            Offload { flags: 0, ..gso(1) },
            dropped,
        ),
        (
            "ta73 start",
            csum,
            Offload {
                csum_start: 43,
                ..CSUM
            },
            dropped,
        ),
        (
            "ta73 start",
            csum,
            Offload {
                csum_start: 42,
                ..CSUM
            },
            Ok(Offload {
                csum_start: 42,
                ..CSUM
            }),
        ),
        (
            "ta73 offset",
            csum,
            Offload {
                csum_offset: 25,
                ..CSUM
            },
            dropped,
        ),
        (
            "ta73 both",
            csum,
            Offload {
                csum_start: 0xffff,
                csum_offset: 0xffff,
                ..CSUM
            },
            dropped,
        ),
        (
            "ta73 both",
            csum,
            Offload {
                csum_start: 0xffff,
                csum_offset: 1,
                ..CSUM
            },
            dropped,
        ),
        // What means nothing on a frame that asks for nothing.
        (
            "ta91 flags",
            all,
            Offload {
                flags: 0xfe,
                ..Offload::default()
            },
            Ok(Offload::default()),
        ),
        (
            "n6 numbers",
            none,
            Offload { flags: 0, ..CSUM },
            Ok(Offload::default()),
        ),
        (
            "ta79 hdr_len",
            none,
            Offload {
                hdr_len: 0xffff,
                ..Offload::default()
            },
            Ok(Offload::default()),
        ),
        (
            "ta91 flags",
            csum,
            Offload {
                flags: 0xff,
                ..CSUM
            },
            Ok(CSUM),
        ),
    ];
    for setup in both(8) {
        for (name, features, asked, expected) in rows {
            let net = Net::new(setup, features);
            let bytes = [header(asked, net.header_len()), frame(60, 1)].concat();
            assert_eq!(outcome(net, &[&bytes]), expected, "{name}: {asked:?}");
            let pieces: Vec<&[u8]> = bytes.chunks(11).collect();
            assert_eq!(outcome(net, &pieces), expected, "{name}, cut: {asked:?}");
        }
    }
}

#[test]
fn a_burst_takes_what_it_has_room_for_and_the_rest_waits() {
    for setup in both(256) {
        let net = Net::new(setup, Features::empty());
        for room in [0, 1, 5, 63, 64] {
            let mut guest = Guest::new(net, false);
            let mut queue = queue_of(&guest);
            let sent: Vec<Vec<u8>> = (0..70).map(|k| frame(60 + k, k as u64)).collect();
            for frame in &sent {
                guest.offer(&[&vec![0; net.header_len()], frame]);
            }
            let mut counters = PortCounters::default();
            let mut arrived = Vec::new();
            // Another queue of the same guest has filled the burst up to here.
            let mut burst = Burst::new();
            burst.set_memory(guest.memory());
            for _ in room..BURST_MAX {
                burst.push_bytes(&frame(99, 7), Offload::default());
            }
            while arrived.len() < sent.len() {
                let before = burst.len();
                let n = queue
                    .drain(guest.memory(), &mut burst, &mut counters)
                    .unwrap();
                assert_eq!(n, (BURST_MAX - before).min(sent.len() - arrived.len()));
                assert_eq!(burst.len(), before + n);
                arrived.extend((before..burst.len()).map(|i| frame_of(&burst, i)));
                queue.complete();
                burst.clear();
            }
            assert_eq!(arrived, sent, "room {room}");
            assert_eq!(counters.received, 70);
        }
    }
}

/// Good and bad chains in any mixture and any rhythm: what was received is what arrived and what was dropped.
#[test]
fn every_chain_is_a_packet_or_a_drop() {
    for (seed, setup) in Setup::all(64).chain(Setup::all(8)).enumerate() {
        let net = Net::new(setup, Features::empty());
        let mut guest = Guest::new(net, seed % 2 == 0);
        let mut queue = queue_of(&guest);
        let mut random = Random::new(seed as u64);
        let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
        let (mut expected, mut arrived) = (Vec::new(), Vec::new());
        let (mut offered, mut returned) = (0, 0);
        let mut reasons = [0; 3];
        for _ in 0..400 {
            for _ in 0..random.below(12) {
                if guest.driver.free() < 4 {
                    break;
                }
                let mut chain = vec![0; net.header_len()];
                let sent = frame(14 + random.below(3000), offered);
                match random.below(8) {
                    0 => {
                        chain.truncate(1 + random.below(chain.len() - 1));
                        reasons[0] += 1;
                    }
                    1 => {
                        chain.extend(&sent[..random.below(14)]);
                        reasons[1] += 1;
                    }
                    2 => {
                        chain[0] = Offload::NEEDS_CSUM;
                        chain.extend(&sent);
                        reasons[2] += 1;
                    }
                    _ => {
                        chain.extend(&sent);
                        expected.push(sent);
                    }
                }
                let piece = chain.len().div_ceil(1 + random.below(4));
                let pieces: Vec<&[u8]> = chain.chunks(piece).collect();
                guest.offer(&pieces);
                offered += 1;
            }
            for _ in 0..random.below(3) {
                queue
                    .drain(guest.memory(), &mut burst, &mut counters)
                    .unwrap();
            }
            if random.below(2) == 0 {
                arrived.extend((0..burst.len()).map(|i| frame_of(&burst, i)));
                burst.clear();
                queue.complete();
            }
            returned += guest.driver.reap(random.below(64)).len() as u64;
        }
        while returned < offered {
            queue
                .drain(guest.memory(), &mut burst, &mut counters)
                .unwrap();
            arrived.extend((0..burst.len()).map(|i| frame_of(&burst, i)));
            burst.clear();
            queue.complete();
            returned += guest.driver.reap(64).len() as u64;
        }
        assert!(arrived == expected, "{setup:?}: frames differ");
        assert_eq!(counters.received, offered);
        assert_eq!(
            counters.received,
            arrived.len() as u64 + counters.rx_drops.total()
        );
        let bytes: usize = arrived.iter().map(Vec::len).sum();
        assert_eq!(counters.received_bytes, bytes as u64);
        let of = |reason| counters.rx_drops.of(reason);
        assert_eq!(
            [
                of(DropReason::Malformed),
                of(DropReason::Runt),
                of(DropReason::BadOffload)
            ],
            reasons
        );
        assert!(guest.driver.free() == usize::from(setup.size));
    }
}

#[test]
fn a_disabled_queue_is_emptied_and_counted() {
    for setup in both(16) {
        let net = Net::new(setup, Features::empty());
        let mut guest = Guest::new(net, false);
        let mut queue = queue_of(&guest);
        let mut counters = PortCounters::default();
        for k in 0..5 {
            guest.offer(&[&vec![0; net.header_len()], &frame(100, k)]);
        }
        guest.offer(&[&[0; 3]]);
        let reason = DropReason::Disabled;
        let n = queue
            .discard(guest.memory(), reason, &mut counters)
            .unwrap();
        queue.complete();
        assert_eq!((n, guest.driver.reap(64).len()), (6, 6));
        assert_eq!((counters.received, counters.received_bytes), (6, 500));
        assert_eq!(counters.rx_drops.of(reason), 6);
        assert_eq!(counters.rx_drops.total(), 6);
    }
}

#[test]
fn completing_nothing_calls_nobody() {
    for setup in both(8) {
        let mut guest = Guest::new(Net::new(setup, Features::empty()), false);
        let mut queue = queue_of(&guest);
        assert!(!queue.complete());
        guest.offer(&[&[0; 100]]);
        let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
        queue
            .drain(guest.memory(), &mut burst, &mut counters)
            .unwrap();
        assert!(queue.complete());
        assert!(!queue.complete());
    }
}
