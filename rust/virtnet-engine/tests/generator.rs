//! Streams through networks, breath by breath: what an analyser counts is what happened.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::{EVERYBODY, frame, put, station, take};
use virtnet_engine::{
    Analyser, AnalyserCounters, AnalyserOrders, Change, FunctionDetail, Generator, GeneratorOrders,
    ImpairOrders, Impairment, NodeId, Place, ReceivedStream, StreamOrders, Track, Worker,
};
use virtnet_packet::{DropReason, MemoryPort, memory_pair};

const MS: u64 = 1_000_000;
const GENERATOR: NodeId = NodeId(1);
const ANALYSER: NodeId = NodeId(2);
const CABLE: NodeId = NodeId(3);
const PORT: NodeId = NodeId(4);
const OTHER: NodeId = NodeId(5);

fn stream(id: u16, count: u64) -> StreamOrders {
    StreamOrders {
        id,
        frame: frame(EVERYBODY, station(1), 60, 0).into(),
        vary: Vec::new(),
        rate: Some(100_000 * 1_000),
        burst: 1,
        count: Some(count),
    }
}

fn generator(count: u64) -> Generator {
    Generator::new(&orders(stream(0, count))).unwrap()
}

fn orders(stream: StreamOrders) -> GeneratorOrders {
    GeneratorOrders {
        streams: vec![stream],
    }
}

fn run(worker: &mut Worker, from: u64, to: u64) {
    for now in (from..to).step_by(10_000) {
        worker.step(now);
    }
}

fn counters(worker: &Worker) -> AnalyserCounters {
    let snapshot = worker.snapshot(0);
    assert!(snapshot.balance.is_exact(), "{:?}", snapshot.balance);
    let mut functions = snapshot.functions.into_iter();
    let analyser = functions.find(|function| function.node == ANALYSER);
    match analyser.unwrap().detail {
        FunctionDetail::Analyser(counters) => counters,
        other => panic!("{other:?}"),
    }
}

fn only(worker: &Worker) -> ReceivedStream {
    let counters = counters(worker);
    assert_eq!(counters.streams.len(), 1);
    counters.streams[0].clone()
}

/// A generator and an analyser with a cable between that does as it is told.
fn over(cable: &ImpairOrders, count: u64) -> Worker {
    let change = Change::new()
        .add(GENERATOR, generator(count))
        .add(ANALYSER, Analyser::new(AnalyserOrders::default()))
        .add(CABLE, Impairment::new(cable, [true, true], 1).unwrap())
        .connect(GENERATOR, Place::new(CABLE, 0))
        .connect(ANALYSER, Place::new(CABLE, 1));
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    worker
}

#[test]
fn a_delay_is_the_latency_to_the_breath() {
    let mut worker = over(
        &ImpairOrders {
            delay_ns: Track::constant(3e6),
            ..ImpairOrders::default()
        },
        1_000,
    );
    run(&mut worker, 0, 100 * MS);
    let found = only(&worker);
    assert_eq!((found.received, found.lost, found.reordered), (1_000, 0, 0));
    let shape = found.latency.summary();
    assert!(
        shape.min >= 3 * MS && shape.max <= 3 * MS + 10_000,
        "{shape:?}"
    );
    assert_eq!((found.first_ns, found.first_number), (3 * MS, Some(0)));
}

#[test]
fn losses_duplicates_and_what_overtakes_are_those_of_the_cable() {
    let mut worker = over(
        &ImpairOrders {
            delay_ns: Track::constant(2e6),
            loss: Track::constant(0.1),
            duplicate: 0.05,
            reorder: 0.01,
            ..ImpairOrders::default()
        },
        5_000,
    );
    run(&mut worker, 0, 200 * MS);
    let found = only(&worker);
    let snapshot = worker.snapshot(0);
    let cable = snapshot.functions.iter().find(|one| one.node == CABLE);
    let FunctionDetail::Impairment(lines) = &cable.unwrap().detail else {
        panic!("no cable");
    };
    let line = lines[0].as_ref().unwrap();
    assert!(line.lost > 300 && line.duplicated > 100);
    assert_eq!((found.lost, found.duplicates), (line.lost, line.duplicated));
    assert_eq!(found.received + found.duplicates, line.sent);
    assert!(found.reordered > 0 && found.late == 0);
}

/// What a generator has made, as frames outside of any network, and a port that leads to an analyser.
fn by_hand(count: u64) -> (Vec<Vec<u8>>, Worker, MemoryPort) {
    let (inside, mut made) = memory_pair(4_096);
    let change = Change::new()
        .add(GENERATOR, generator(count))
        .add(PORT, inside)
        .connect(GENERATOR, PORT);
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    run(&mut worker, 0, 50 * MS);
    let frames = take(&mut made);
    assert_eq!(frames.len() as u64, count);
    let (inside, outside) = memory_pair(4_096);
    let change = Change::new()
        .add(OTHER, inside)
        .add(ANALYSER, Analyser::new(AnalyserOrders::default()))
        .connect(OTHER, Place::new(ANALYSER, 0));
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    (frames, worker, outside)
}

fn feed(worker: &mut Worker, outside: &mut MemoryPort, frames: &[Vec<u8>]) {
    put(outside, frames);
    while worker.step(100 * MS) > 0 {}
}

#[test]
fn every_number_is_counted_once_and_as_what_it_is() {
    let (frames, mut worker, mut outside) = by_hand(20);
    let pick = |numbers: &[usize]| -> Vec<Vec<u8>> {
        numbers.iter().map(|&n| frames[n].clone()).collect()
    };
    feed(&mut worker, &mut outside, &pick(&[2, 3, 3, 7, 5, 5, 4]));
    let found = only(&worker);
    // 0, 1 and 6 are missing; 5 and 4 came behind 7.
    assert_eq!((found.received, found.lost), (5, 3));
    assert_eq!((found.reordered, found.duplicates, found.late), (2, 2, 0));
    feed(&mut worker, &mut outside, &pick(&[6, 0, 1]));
    let found = only(&worker);
    assert_eq!((found.received, found.lost, found.reordered), (8, 0, 5));
    // Damaged, strange, and cut short.
    let mut odd = pick(&[9, 9, 9]);
    odd[0][20] ^= 4;
    odd[1][14] ^= 4;
    odd[2].truncate(31);
    feed(&mut worker, &mut outside, &odd);
    let all = counters(&worker);
    assert_eq!((all.corrupted, all.foreign), (1, 2));
    assert_eq!(all.streams[0].received, 8);
}

#[test]
fn after_a_reset_counting_begins_where_the_stream_is() {
    let (frames, mut worker, mut outside) = by_hand(20);
    feed(&mut worker, &mut outside, &frames[..10]);
    let again = AnalyserOrders {
        resets: 1,
        ..AnalyserOrders::default()
    };
    worker
        .apply(Change::new().update(ANALYSER, again), 0)
        .unwrap();
    assert_eq!(only(&worker).received, 0);
    feed(&mut worker, &mut outside, &frames[8..9]);
    feed(&mut worker, &mut outside, &frames[11..]);
    let found = only(&worker);
    assert_eq!((found.received, found.lost, found.late), (9, 1, 1));
    assert_eq!(found.first_number, Some(10));
    assert_eq!(found.latency.count(), 9);
}

#[test]
fn numbers_far_behind_are_late_and_those_within_the_window_are_not() {
    let (_, mut worker, mut outside) = by_hand(1);
    let numbered = |number: u64| {
        // As a generator would write it, whose clock says nought.
        let mut bytes = frame(EVERYBODY, station(1), 60, 0);
        bytes[14..18].copy_from_slice(&[0x76, 0x6e, 0, 0]);
        bytes[18..24].copy_from_slice(&number.to_be_bytes()[2..]);
        bytes[24..30].fill(0);
        let words = bytes[14..30].chunks(2);
        let mut sum: u32 = words
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        bytes[30..32].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
        bytes
    };
    let far = 1 << 40;
    let numbers = [
        0,
        far,
        far - 65_535,
        far - 65_536,
        0,
        far - 65_535,
        far + 65_536,
        far,
        far + 1,
    ];
    let frames: Vec<_> = numbers.into_iter().map(numbered).collect();
    feed(&mut worker, &mut outside, &frames);
    let found = only(&worker);
    assert_eq!((found.received, found.reordered), (5, 2));
    assert_eq!((found.duplicates, found.late), (1, 3));
    assert_eq!(found.lost, far + 65_537 - 5);
}

#[test]
fn what_a_full_port_drops_is_made_and_lost_and_a_stream_without_a_rate_waits() {
    let (inside, mut outside) = memory_pair(64);
    let change = Change::new()
        .add(GENERATOR, generator(200))
        .add(PORT, inside)
        .connect(GENERATOR, PORT);
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    run(&mut worker, 0, 10 * MS);
    let snapshot = worker.snapshot(0);
    assert!(snapshot.balance.is_exact());
    let drops = snapshot.ports[0].counters.tx_drops;
    assert_eq!(
        drops.iter().collect::<Vec<_>>(),
        [(DropReason::NoRoom, 136)]
    );
    assert_eq!(take(&mut outside).len(), 64);
    let unpaced = StreamOrders {
        rate: None,
        ..stream(0, 100)
    };
    worker
        .apply(Change::new().update(GENERATOR, orders(unpaced)), 10 * MS)
        .unwrap();
    run(&mut worker, 10 * MS, 20 * MS);
    assert_eq!(take(&mut outside).len(), 64);
    run(&mut worker, 20 * MS, 30 * MS);
    assert_eq!(take(&mut outside).len(), 36);
    assert_eq!(worker.snapshot(0).ports[0].counters.tx_drops.total(), 136);
}
