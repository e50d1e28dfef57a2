//! Several workers on one network: packets cross between them, switches agree, and every packet is accounted for.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and their numbers are small"
)]

mod common;

use std::thread;
use std::time::{Duration, Instant};

use common::{EVERYBODY, frame, put, station, take};
use virtnet_engine::{
    Change, Echo, Engine, EngineOptions, FunctionDetail, Node, NodeId, Place, Poll, Sink, Snapshot,
    Source, SourceOptions, SourceOrders, Switch, SwitchOptions, Wire,
};
use virtnet_packet::{Burst, DropReason, MemoryPort, Picks, Port, PortCounters, memory_pair};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const C: NodeId = NodeId(3);
const FUNCTION: NodeId = NodeId(10);

/// Workers that share the first CPU, so that each is interrupted anywhere.
fn team(workers: usize, poll: Poll) -> Engine {
    let options = EngineOptions {
        cpus: vec![0; workers],
        poll,
        ..EngineOptions::default()
    };
    Engine::new(options).unwrap()
}

fn wait_until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited too long");
        thread::sleep(Duration::from_micros(200));
    }
}

/// Sends frames into the network and wakes it.
fn send(outside: &mut MemoryPort, frames: &[Vec<u8>]) {
    put(outside, frames);
    outside.flush();
}

/// Ports with memory ends outside, cabled to a function's gates in order.
fn cabled(
    engine: &Engine,
    function: impl Into<Node>,
    nodes: &[NodeId],
    capacity: usize,
) -> Vec<MemoryPort> {
    let mut change = Change::new().add(FUNCTION, function);
    let mut outsides = Vec::new();
    for (gate, &node) in (0..).zip(nodes) {
        let (inside, outside) = memory_pair(capacity);
        change = change
            .add(node, inside)
            .connect(node, Place::new(FUNCTION, gate));
        outsides.push(outside);
    }
    engine.apply(change).unwrap();
    outsides
}

fn switch(ageing: Duration) -> Switch {
    let options = SwitchOptions {
        ageing,
        ..SwitchOptions::default()
    };
    Switch::new(options).unwrap()
}

/// All counters when nothing moves any more, which must fit each other.
fn at_rest(engine: &Engine) -> Snapshot {
    let mut before = engine.snapshot().unwrap();
    loop {
        thread::sleep(Duration::from_millis(2));
        let now = engine.snapshot().unwrap();
        assert!(now.balance.is_exact(), "{:?}", now.balance);
        if now.balance == before.balance && now.balance.in_transit() == 0 {
            return now;
        }
        before = now;
    }
}

#[test]
fn packets_between_ports_of_different_workers_arrive_in_order() {
    for poll in [Poll::Adaptive, Poll::Busy, Poll::Interrupt] {
        let engine = team(2, poll);
        let mut ends = cabled(&engine, Wire::new(), &[A, B], 4_096);
        let frames: Vec<_> = (0..1_000_usize)
            .map(|n| frame(station(2), station(1), 60 + n, (n % 251) as u8))
            .collect();
        for (from, to) in [(0, 1), (1, 0)] {
            send(&mut ends[from], &frames);
            let mut got = Vec::new();
            wait_until(|| engine.snapshot().unwrap().balance.sent >= 1_000 * (from as u64 + 1));
            got.extend(take(&mut ends[to]));
            assert_eq!(got, frames, "{poll:?}");
        }
        let seen = at_rest(&engine);
        assert_eq!(seen.balance.handed_over, 2_000);
        assert_eq!(seen.workers.len(), 2);
        for worker in &seen.workers {
            assert_eq!(worker.packets, 1_000, "{seen:?}");
        }
        assert_eq!(seen.worker.packets, 2_000);
    }
}

#[test]
fn a_sleeping_worker_is_woken_by_another() {
    for poll in [Poll::Adaptive, Poll::Interrupt] {
        let engine = team(2, poll);
        let mut ends = cabled(&engine, Wire::new(), &[A, B], 64);
        for round in 1..=100 {
            let bytes = [frame(station(2), station(1), 60, round)];
            send(&mut ends[0], &bytes);
            wait_until(|| engine.snapshot().unwrap().balance.sent == u64::from(round));
            assert_eq!(take(&mut ends[1]), bytes);
            if round % 3 == 0 {
                thread::sleep(Duration::from_micros(500));
            }
        }
        let seen = at_rest(&engine);
        assert!(seen.workers.iter().all(|worker| worker.sleeps > 0));
    }
}

#[test]
fn all_parts_of_a_switch_know_whom_one_has_heard_of() {
    let engine = team(3, Poll::Adaptive);
    let mut ends = cabled(&engine, switch(Duration::from_secs(60)), &[A, B, C], 4_096);
    let hello = |n| [frame(EVERYBODY, station(n), 60, 0)];
    for (n, end) in (1..).zip(&mut ends) {
        send(end, &hello(n));
        wait_until(|| engine.snapshot().unwrap().balance.sent == u64::from(n) * 2);
    }
    at_rest(&engine);
    ends.iter_mut().for_each(|end| drop(take(end)));
    for (from, to, other) in [(0, 1, 2), (1, 2, 0), (2, 0, 1)] {
        let bytes = [frame(station(to as u8 + 1), station(from as u8 + 1), 60, 7)];
        send(&mut ends[from], &bytes);
        wait_until(|| engine.snapshot().unwrap().balance.sent == 7 + from as u64);
        at_rest(&engine);
        assert_eq!(take(&mut ends[to]), bytes);
        assert!(take(&mut ends[other]).is_empty(), "it was flooded");
    }
    // The station moves: whoever learnt it first believes the others.
    send(&mut ends[2], &hello(1));
    wait_until(|| engine.snapshot().unwrap().balance.sent == 11);
    at_rest(&engine);
    ends.iter_mut().for_each(|end| drop(take(end)));
    send(&mut ends[1], &[frame(station(1), station(2), 60, 8)]);
    wait_until(|| engine.snapshot().unwrap().balance.sent == 12);
    assert_eq!(take(&mut ends[2]).len(), 1);
    let seen = at_rest(&engine);
    let FunctionDetail::Switch(counted) = &seen.functions[0].detail else {
        panic!("{seen:?}")
    };
    assert_eq!((counted.entries, counted.learned, counted.moved), (3, 3, 1));
}

#[test]
fn what_one_part_of_a_switch_forgets_the_others_forget() {
    let engine = team(2, Poll::Adaptive);
    let nodes = [A, B, C];
    let mut ends = cabled(&engine, switch(Duration::from_millis(200)), &nodes, 4_096);
    send(&mut ends[0], &[frame(EVERYBODY, station(1), 60, 0)]);
    wait_until(|| engine.snapshot().unwrap().balance.sent == 2);
    let entries = || match engine.snapshot().unwrap().functions[0].detail {
        FunctionDetail::Switch(counted) => counted.entries,
        _ => panic!("a switch"),
    };
    assert_eq!(entries(), 1);
    wait_until(|| entries() == 0);
    at_rest(&engine);
    ends.iter_mut().for_each(|end| drop(take(end)));
    send(&mut ends[1], &[frame(station(1), station(2), 60, 1)]);
    wait_until(|| engine.snapshot().unwrap().balance.sent == 4);
    assert_eq!(take(&mut ends[0]).len(), 1);
    assert_eq!(take(&mut ends[2]).len(), 1, "it is not known any more");
}

#[test]
fn what_makes_packets_is_with_one_worker_and_reaches_all() {
    let engine = team(2, Poll::Adaptive);
    let (port, mut outside) = memory_pair(8_192);
    let orders = SourceOrders {
        count: Some(5_000),
        rate: None,
    };
    let source = |frame_len| {
        Source::new(SourceOptions {
            frame_len,
            orders,
            ..SourceOptions::default()
        })
        .unwrap()
    };
    // The source is at home with the first worker, the port with the first, the other source and the sink with the second.
    let change = Change::new()
        .add(NodeId(20), source(60))
        .add(NodeId(21), source(1_514))
        .add(A, port)
        .add(NodeId(22), Sink::new())
        .connect(NodeId(21), A)
        .connect(NodeId(20), NodeId(22));
    engine.apply(change).unwrap();
    wait_until(|| {
        let seen = engine.snapshot().unwrap().balance;
        seen.sent == 5_000 && seen.consumed == 5_000
    });
    let seen = at_rest(&engine);
    assert_eq!(seen.balance.generated, 10_000);
    assert_eq!(seen.balance.dropped, 0, "what is offered is not dropped");
    assert_eq!(take(&mut outside).len(), 5_000);
}

/// One lane of a port, up or down.
#[derive(Debug)]
struct Lane(MemoryPort, bool);

impl Port for Lane {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        self.0.rx(burst)
    }
    fn is_up(&self) -> bool {
        self.1
    }
    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        if self.1 { self.0.tx(burst, picks) } else { 0 }
    }
    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.0.drop_tx(reason, n);
    }
    fn counters(&self) -> PortCounters {
        self.0.counters()
    }
}

#[test]
fn lanes_keep_packets_with_their_worker_unless_they_are_down() {
    for second_is_up in [true, false] {
        let engine = team(2, Poll::Busy);
        let (a0, mut out_a0) = memory_pair(4_096);
        let (a1, mut out_a1) = memory_pair(4_096);
        let lanes: Vec<Box<dyn Port>> =
            vec![Box::new(Lane(a0, true)), Box::new(Lane(a1, second_is_up))];
        let change = Change::new()
            .add(A, Node::Lanes(lanes))
            .add(FUNCTION, Echo::new())
            .connect(A, FUNCTION);
        engine.apply(change).unwrap();
        let frames: Vec<_> = (0..100)
            .map(|n| frame(station(2), station(1), 60, n))
            .collect();
        send(&mut out_a0, &frames);
        send(&mut out_a1, &frames);
        wait_until(|| engine.snapshot().unwrap().balance.sent == 200);
        let seen = at_rest(&engine);
        assert_eq!(seen.ports.len(), 1, "lanes are one port");
        assert_eq!(seen.ports[0].counters.received, 200);
        let (back0, back1) = (take(&mut out_a0).len(), take(&mut out_a1).len());
        let (expected, handed_over) = match second_is_up {
            true => ((100, 100), 0),
            false => ((200, 0), 100),
        };
        assert_eq!((back0, back1), expected);
        assert_eq!(seen.balance.handed_over, handed_over);
        let remains = engine.stop().unwrap();
        let nodes: Vec<_> = remains.nodes.iter().map(|(node, _)| *node).collect();
        assert_eq!(nodes, [A, A, FUNCTION], "each lane, and the function once");
    }
}

#[test]
fn changes_and_the_end_lose_no_account_of_a_packet() {
    let engine = team(2, Poll::Adaptive);
    let source = Source::new(SourceOptions::default()).unwrap();
    let (a, outside) = memory_pair(1 << 20);
    let change = Change::new()
        .add(NodeId(20), source)
        .add(FUNCTION, switch(Duration::from_secs(60)))
        .add(A, a)
        .connect(NodeId(20), Place::new(FUNCTION, 0))
        .connect(A, Place::new(FUNCTION, 1));
    engine.apply(change).unwrap();
    for round in 0..60 {
        // B is at home with the other worker than A, and is taken away in the middle of the stream.
        let (b, mut far) = memory_pair(1 << 16);
        let change = Change::new().add(B, b).connect(B, Place::new(FUNCTION, 2));
        engine.apply(change).unwrap();
        wait_until(|| {
            let seen = engine.snapshot().unwrap();
            assert!(seen.balance.is_exact(), "round {round}: {:?}", seen.balance);
            seen.ports.iter().any(|port| port.counters.sent > 200)
        });
        let removed = engine.apply(Change::new().remove(B)).unwrap();
        let (_, Node::Port(port)) = &removed[0] else {
            panic!("{removed:?}")
        };
        assert_eq!(take(&mut far).len() as u64, port.counters().sent);
    }
    let remains = engine.stop().unwrap();
    let balance = remains.snapshot.balance;
    assert!(balance.is_exact(), "{balance:?}");
    assert_eq!(balance.in_transit(), 0, "{balance:?}");
    drop(outside);
}
