//! What packets leave to be done: passed on to whoever takes it, done here for the others, and accounted for.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and their numbers are small"
)]

use virtnet_engine::{
    Change, Node, NodeId, Place, Snapshot, Source, SourceOrders, Switch, SwitchOptions, Wire,
    Worker,
};
use virtnet_packet::{
    Burst, DropReason, MemoryPort, Offload, Offloads, Picks, Port, PortCounters, Resolver,
    memory_pair,
};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const C: NodeId = NodeId(3);
const FUNCTION: NodeId = NodeId(10);

/// A port that can be left with so much.
#[derive(Debug)]
struct Takes(MemoryPort, Offloads);

impl Port for Takes {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        self.0.rx(burst)
    }
    fn offloads(&self) -> Offloads {
        self.1
    }
    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        for i in picks.iter() {
            assert!(
                self.1.contains(burst.offload(i).into()),
                "left with too much"
            );
        }
        self.0.tx(burst, picks)
    }
    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.0.drop_tx(reason, n);
    }
    fn counters(&self) -> PortCounters {
        self.0.counters()
    }
}

/// A TCP segment over IPv4 or a datagram over IPv6, with `payload` bytes, of which nothing is finished.
fn packet(tcp: bool, payload: usize, gso: bool, number: u8) -> (Vec<u8>, Offload) {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, number]);
    let start = if tcp {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((40 + payload as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let start = frame.len();
        frame.extend([
            0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
        ]);
        start
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((8 + payload as u16).to_be_bytes());
        frame.extend([17, 64]);
        frame.extend([0xfd; 32]);
        let start = frame.len();
        frame.extend([0, 1, 0, 2]);
        frame.extend((8 + payload as u16).to_be_bytes());
        frame.extend([0, 0]);
        start
    };
    frame.extend((0..payload).map(|n| n as u8 ^ number));
    let gso_type = match (gso, tcp) {
        (false, _) => Offload::GSO_NONE,
        (true, true) => Offload::GSO_TCPV4,
        (true, false) => Offload::GSO_UDP_L4,
    };
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        gso_type,
        hdr_len: 0,
        gso_size: if gso { 1_000 } else { 0 },
        csum_start: start as u16,
        csum_offset: if tcp { 16 } else { 6 },
    };
    (frame, offload)
}

fn plain(number: u8) -> (Vec<u8>, Offload) {
    let (frame, _) = packet(true, 100, false, number);
    (frame, Offload::default())
}

/// What packets become for a receiver that takes so much.
fn expected(packets: &[(Vec<u8>, Offload)], takes: Offloads) -> Vec<(Vec<u8>, Offload)> {
    let mut resolver = Resolver::default();
    let mut all = Vec::new();
    for (frame, offload) in packets {
        if takes.contains((*offload).into()) {
            all.push((frame.clone(), *offload));
            continue;
        }
        let mut burst = Burst::new();
        burst.push_bytes(frame, *offload);
        resolver.take(&burst, 0).unwrap();
        while let Some(frame) = resolver.next_frame() {
            all.push((frame.to_vec(), Offload::default()));
        }
    }
    all
}

fn put(outside: &mut MemoryPort, packets: &[(Vec<u8>, Offload)]) {
    let mut burst = Burst::new();
    for (frame, offload) in packets {
        burst.push_bytes(frame, *offload);
    }
    assert_eq!(
        outside.tx(&burst, &Picks::first(packets.len())),
        packets.len()
    );
}

fn take(outside: &mut MemoryPort) -> Vec<(Vec<u8>, Offload)> {
    let (mut all, mut burst) = (Vec::new(), Burst::new());
    while outside.rx(&mut burst) > 0 {
        for i in 0..burst.len() {
            let mut frame = vec![0; burst.frame_len(i)];
            burst.copy_frame(i, &mut frame);
            all.push((frame, burst.offload(i)));
        }
        burst.clear();
    }
    all
}

fn read(worker: &Worker) -> Snapshot {
    let snapshot = worker.snapshot(0);
    assert!(snapshot.balance.is_exact(), "{:?}", snapshot.balance);
    snapshot
}

const SETS: [Offloads; 4] = [
    Offloads::NONE,
    Offloads::CSUM,
    Offloads::TSO4,
    Offloads::ALL,
];

#[test]
fn every_receiver_gets_what_it_takes_whatever_the_sender_left() {
    let tso = Offloads::CSUM | Offloads::TSO4;
    for takes in [SETS[0], SETS[1], tso, tso | Offloads::USO, SETS[3]] {
        for tcp in [true, false] {
            for gso in [true, false] {
                let packets = [
                    plain(1),
                    packet(tcp, 5_500, gso, 2),
                    packet(!tcp, 60_000, true, 3),
                    plain(4),
                    plain(5),
                    packet(tcp, 1, false, 6),
                ];
                let (a, mut left) = memory_pair(4_096);
                let (b, mut right) = memory_pair(4_096);
                let mut worker = Worker::new();
                let change = Change::new()
                    .add(A, a)
                    .add(B, Takes(b, takes))
                    .add(FUNCTION, Wire::new())
                    .connect(A, Place::new(FUNCTION, 0))
                    .connect(B, Place::new(FUNCTION, 1));
                worker.apply(change, 0).unwrap();
                put(&mut left, &packets);
                worker.step(1);
                let wanted = expected(&packets, takes);
                assert!(take(&mut right) == wanted, "{takes:?}");
                let seen = read(&worker);
                assert_eq!(
                    seen.ports[1].segmented,
                    (wanted.len() - packets.len()) as u64
                );
                assert_eq!(seen.balance.sent, wanted.len() as u64);
                // A port that is taken out leaves its segments in the books.
                worker.apply(Change::new().remove(B), 2).unwrap();
                read(&worker);
            }
        }
    }
}

#[test]
fn a_flooded_packet_reaches_each_receiver_as_it_takes_it() {
    let (a, mut left) = memory_pair(64);
    let (b, mut plain_end) = memory_pair(64);
    let (c, mut knowing_end) = memory_pair(64);
    let mut worker = Worker::new();
    let change = Change::new()
        .add(FUNCTION, Switch::new(SwitchOptions::default()).unwrap())
        .add(A, a)
        .add(B, Takes(b, Offloads::NONE))
        .add(C, Takes(c, Offloads::ALL))
        .connect(A, Place::new(FUNCTION, 0))
        .connect(B, Place::new(FUNCTION, 1))
        .connect(C, Place::new(FUNCTION, 2));
    worker.apply(change, 0).unwrap();
    let packets = [packet(true, 3_000, true, 1), plain(2)];
    put(&mut left, &packets);
    worker.step(1);
    assert!(take(&mut plain_end) == expected(&packets, Offloads::NONE));
    assert!(take(&mut knowing_end) == packets);
    assert_eq!(read(&worker).balance.sent, 4 + 2);
}

#[test]
fn segments_without_room_and_headers_without_sense_are_counted_drops() {
    let (a, mut left) = memory_pair(64);
    let (b, mut right) = memory_pair(3);
    let mut worker = Worker::new();
    let change = Change::new()
        .add(A, a)
        .add(B, Takes(b, Offloads::NONE))
        .add(FUNCTION, Wire::new())
        .connect(A, Place::new(FUNCTION, 0))
        .connect(B, Place::new(FUNCTION, 1));
    worker.apply(change, 0).unwrap();
    let (mut nonsense, offload) = packet(true, 5_000, true, 1);
    nonsense[14] = 0x65;
    put(
        &mut left,
        &[
            (nonsense, offload),
            packet(true, 10_000, true, 2),
            packet(true, 10_000, true, 3),
        ],
    );
    worker.step(1);
    let seen = read(&worker);
    let drops: Vec<_> = seen.ports[1].counters.tx_drops.iter().collect();
    assert_eq!(
        drops,
        [(DropReason::BadOffload, 1), (DropReason::NoRoom, 7 + 1)]
    );
    assert_eq!((seen.balance.sent, seen.ports[1].segmented), (3, 9));
    assert_eq!(take(&mut right).len(), 3);
}

#[test]
fn what_is_only_offered_is_made_when_there_is_room() {
    let (b, mut right) = memory_pair(10);
    let (frame, offload) = packet(false, 5_000, true, 1);
    let source = Source::of_packets([(&frame[..], offload)], SourceOrders::default()).unwrap();
    let mut worker = Worker::new();
    let change = Change::new()
        .add(FUNCTION, Node::from(source))
        .add(B, Takes(b, Offloads::NONE))
        .connect(FUNCTION, B);
    worker.apply(change, 0).unwrap();
    worker.step(1);
    let seen = read(&worker);
    assert_eq!(
        (
            seen.balance.generated,
            seen.balance.sent,
            seen.balance.dropped
        ),
        (2, 10, 0)
    );
    assert_eq!(take(&mut right).len(), 10);
    worker.step(1_000_000);
    assert_eq!(read(&worker).balance.generated, 4);
}
