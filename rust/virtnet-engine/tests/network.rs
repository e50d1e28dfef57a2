//! Small networks, breath by breath: where each packet goes, and what is counted.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{EVERYBODY, frame, put, station, take};
use virtnet_engine::{
    Blast, Change, Echo, Filter, FunctionDetail, FunctionStats, Host, HostCounters, HostOptions,
    HostOrders, Instruction, Node, NodeId, Ping, Place, Sink, Snapshot, Source, SourceOptions,
    SourceOrders, Switch, SwitchOptions, Tee, Wire, Worker,
};
use virtnet_packet::header::Mac;
use virtnet_packet::{
    Burst, Direction, DropReason, MemoryPort, Offload, Origin, Picks, Port, PortCounters,
    memory_pair,
};

const SECOND: u64 = 1_000_000_000;
const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const C: NodeId = NodeId(3);
const SWITCH: NodeId = NodeId(10);
const OTHER: NodeId = NodeId(11);

fn switch() -> Switch {
    Switch::new(SwitchOptions::default()).unwrap()
}

/// A worker with a switch and one port for each of `nodes` at gates 0, 1, …; the outer ends.
fn switched(nodes: &[NodeId], capacity: usize) -> (Worker, Vec<MemoryPort>) {
    let mut change = Change::new().add(SWITCH, switch());
    let mut outsides = Vec::new();
    for (gate, &node) in (0..).zip(nodes) {
        let (inside, outside) = memory_pair(capacity);
        change = change
            .add(node, inside)
            .connect(node, Place::new(SWITCH, gate));
        outsides.push(outside);
    }
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    (worker, outsides)
}

/// All counters, which must fit each other.
fn read(worker: &Worker) -> Snapshot {
    let snapshot = worker.snapshot(0);
    assert!(snapshot.balance.is_exact(), "{:?}", snapshot.balance);
    snapshot
}

fn function(snapshot: &Snapshot, node: NodeId) -> &FunctionStats {
    let mut functions = snapshot.functions.iter();
    functions.find(|function| function.node == node).unwrap()
}

fn drops_of(snapshot: &Snapshot, node: NodeId) -> Vec<(DropReason, u64)> {
    match snapshot.ports.iter().find(|port| port.node == node) {
        Some(port) => {
            let mut drops = port.drops;
            drops.merge(&port.counters.tx_drops);
            drops.iter().collect()
        }
        None => function(snapshot, node).counters.drops.iter().collect(),
    }
}

#[test]
fn a_tee_copies_what_matches_to_its_branch_and_passes_everything() {
    let (a, mut left) = memory_pair(64);
    let (b, mut right) = memory_pair(64);
    let (c, mut branch) = memory_pair(64);
    // Frames longer than 60 bytes.
    let program = [
        (0x80, 0, 0, 0),
        (0x25, 0, 1, 60),
        (6, 0, 0, 1),
        (6, 0, 0, 0),
    ];
    let program = program.map(|(code, jt, jf, k)| Instruction { code, jt, jf, k });
    let mut worker = Worker::new();
    let change = Change::new()
        .add(A, a)
        .add(B, b)
        .add(C, c)
        .add(OTHER, Tee::new(Filter::new(&program).unwrap()))
        .connect(A, Place::new(OTHER, 0))
        .connect(B, Place::new(OTHER, 1))
        .connect(C, Place::new(OTHER, 2));
    worker.apply(change, 0).unwrap();
    let frames: Vec<_> = [60, 61, 60, 1_500]
        .map(|len| frame(station(2), station(1), len, 7))
        .to_vec();
    let wanted = [frames[1].clone(), frames[3].clone()];
    put(&mut left, &frames);
    put(&mut right, &frames[1..2]);
    put(&mut branch, &frames);
    worker.step(1);
    assert_eq!(take(&mut right), frames);
    assert_eq!(take(&mut left), frames[1..2]);
    let copied = take(&mut branch);
    assert_eq!(copied.len(), 3);
    assert_eq!(copied[..2], wanted);
    let balance = worker.snapshot(2).balance;
    assert!(balance.is_exact(), "{balance:?}");
    assert_eq!((balance.copied, balance.consumed), (3, 4));
}

/// Takes copies from two places, and notes where each was taken, which way it was going, and how long it is.
#[derive(Debug, Default)]
struct Copies {
    seen: Arc<Mutex<Vec<(u16, Direction, usize)>>>,
    dropped: Arc<Mutex<Vec<(u16, DropReason, usize)>>>,
    /// Takes this many, and no more.
    room: usize,
    counters: PortCounters,
}

impl Port for Copies {
    fn rx(&mut self, _: &mut Burst) -> usize {
        0
    }

    fn tx(&mut self, _: &Burst, _: &Picks) -> usize {
        panic!("it takes nothing but copies")
    }

    fn drop_tx(&mut self, _: DropReason, _: usize) {
        panic!("it takes nothing but copies")
    }

    fn places(&self) -> u16 {
        2
    }

    fn tx_copies(&mut self, from: Origin, burst: &Burst, picks: &Picks) -> usize {
        let mut seen = self.seen.lock().unwrap();
        let n = picks.len().min(self.room);
        self.room -= n;
        let taken = picks.iter().take(n);
        seen.extend(taken.map(|i| (from.place, from.direction, burst.frame_len(i))));
        self.counters.sent += n as u64;
        n
    }

    fn drop_copies(&mut self, from: Origin, reason: DropReason, n: usize) {
        self.dropped.lock().unwrap().push((from.place, reason, n));
        self.counters.tx_drops.add(reason, n);
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

/// Two tees in the way from a port to an echo, of which the second copies to the first gate of a port, and the outer end.
fn copied_twice(port: Copies) -> (Worker, MemoryPort) {
    let (a, outside) = memory_pair(64);
    let tee = || Tee::new(Filter::default());
    let (first, second, echo) = (NodeId(20), NodeId(21), NodeId(22));
    let mut worker = Worker::new();
    let change = Change::new()
        .add(A, a)
        .add(B, port)
        .add(first, tee())
        .add(second, tee())
        .add(echo, Echo::new())
        .connect(A, Place::new(first, 0))
        .connect(Place::new(first, 1), Place::new(second, 0))
        .connect(Place::new(second, 1), Place::new(echo, 0))
        .connect(Place::new(first, 2), Place::new(B, 1))
        .connect(Place::new(second, 2), Place::new(B, 0));
    worker.apply(change, 0).unwrap();
    (worker, outside)
}

#[test]
fn copies_tell_where_they_were_taken_and_which_way_they_were_going_in_the_order_of_what_happened() {
    let port = Copies {
        room: 100,
        ..Copies::default()
    };
    let seen = Arc::clone(&port.seen);
    let (mut worker, mut outside) = copied_twice(port);
    put(&mut outside, &[frame(station(2), station(1), 77, 0)]);
    worker.step(1);
    assert_eq!(take(&mut outside).len(), 1);
    let expected = [
        (1, Direction::Inbound, 77),
        (0, Direction::Inbound, 77),
        (0, Direction::Outbound, 77),
        (1, Direction::Outbound, 77),
    ];
    assert_eq!(*seen.lock().unwrap(), expected);
    let balance = read(&worker).balance;
    assert_eq!((balance.copied, balance.sent), (4, 5));
}

#[test]
fn copies_that_find_no_room_are_counted_for_their_place_and_nobody_else_misses_them() {
    let port = Copies {
        room: 3,
        ..Copies::default()
    };
    let dropped = Arc::clone(&port.dropped);
    let (mut worker, mut outside) = copied_twice(port);
    let frames = vec![frame(station(2), station(1), 60, 0); 2];
    put(&mut outside, &frames);
    worker.step(1);
    assert_eq!(take(&mut outside).len(), 2);
    let no_room = DropReason::NoRoom;
    assert_eq!(
        *dropped.lock().unwrap(),
        [(0, no_room, 1), (0, no_room, 2), (1, no_room, 2)]
    );
    read(&worker);
}

#[test]
fn a_port_has_as_many_gates_as_it_takes_copies_from_places() {
    let mut worker = Worker::new();
    let change = Change::new().add(A, Copies::default()).add(B, Sink::new());
    worker.apply(change, 0).unwrap();
    assert_eq!(worker.graph().free_gate(A), Some(0));
    let change = Change::new().connect(Place::new(A, 2), Place::new(B, 0));
    let error = worker.apply(change, 0).unwrap_err().error;
    assert!(error.to_string().contains("2 gate(s)"), "{error}");
    let change = Change::new()
        .connect(Place::new(A, 1), Place::new(B, 0))
        .connect(Place::new(A, 0), Place::new(B, 1));
    worker.apply(change, 0).unwrap();
    assert_eq!(worker.graph().free_gate(A), None);
}

#[test]
fn a_wire_passes_frames_unchanged_and_in_order_both_ways() {
    let (a, mut left) = memory_pair(256);
    let (b, mut right) = memory_pair(256);
    let mut worker = Worker::new();
    let change = Change::new()
        .add(A, a)
        .add(B, b)
        .add(OTHER, Wire::new())
        .connect(A, Place::new(OTHER, 0))
        .connect(B, Place::new(OTHER, 1));
    worker.apply(change, 0).unwrap();
    let there: Vec<_> = (0..150)
        .map(|n| frame(station(2), station(1), 60 + 20 * usize::from(n), n))
        .collect();
    let back = vec![frame(station(1), station(2), 60, 0)];
    put(&mut left, &there);
    put(&mut right, &back);
    assert_eq!(worker.step(0), 65);
    assert_eq!(worker.step(0), 64);
    assert_eq!(worker.step(0), 22);
    assert_eq!(worker.step(0), 0);
    assert_eq!(take(&mut right), there);
    assert_eq!(take(&mut left), back);
    assert_eq!(read(&worker).worker.busy_breaths, 3);
}

#[test]
fn two_ports_can_be_cabled_without_anything_between() {
    let (a, mut left) = memory_pair(8);
    let (b, mut right) = memory_pair(8);
    let mut worker = Worker::new();
    let change = Change::new().add(A, a).add(B, b).connect(A, B);
    worker.apply(change, 0).unwrap();
    let frames = vec![frame(station(2), station(1), 700, 3)];
    put(&mut left, &frames);
    worker.step(0);
    assert_eq!(take(&mut right), frames);
    read(&worker);
}

#[test]
fn a_flooded_frame_reaches_every_other_port_and_the_copies_are_counted() {
    let (mut worker, mut outsides) = switched(&[A, B, C], 8);
    let frames = vec![
        frame(EVERYBODY, station(1), 60, 0),
        frame(station(2), station(1), 900, 1),
    ];
    put(&mut outsides[0], &frames);
    worker.step(0);
    assert_eq!(take(&mut outsides[0]), Vec::<Vec<u8>>::new());
    assert_eq!(take(&mut outsides[1]), frames);
    assert_eq!(take(&mut outsides[2]), frames);
    let snapshot = read(&worker);
    assert_eq!(function(&snapshot, SWITCH).counters.copied, 2);
    assert_eq!((snapshot.balance.received, snapshot.balance.sent), (2, 4));
}

#[test]
fn a_burst_of_every_fate_keeps_its_order_at_each_port() {
    let (mut worker, mut outsides) = switched(&[A, B, C], 64);
    for (n, outside) in (1..).zip(&mut outsides) {
        put(outside, &[frame(EVERYBODY, station(n), 60, 0)]);
    }
    worker.step(0);
    outsides.iter_mut().for_each(|outside| drop(take(outside)));
    let frames = [
        frame(station(2), station(1), 60, 0),
        frame(station(3), station(1), 60, 1),
        frame(EVERYBODY, station(1), 60, 2),
        frame(station(1), station(1), 60, 3),
        vec![0; 13],
        frame(station(2), station(1), 60, 5),
        frame(station(99), station(1), 60, 6),
    ];
    put(&mut outsides[0], &frames);
    worker.step(0);
    let pick = |wanted: &[usize]| {
        wanted
            .iter()
            .map(|&i| frames[i].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(take(&mut outsides[1]), pick(&[0, 2, 5, 6]));
    assert_eq!(take(&mut outsides[2]), pick(&[1, 2, 6]));
    let snapshot = read(&worker);
    assert_eq!(
        drops_of(&snapshot, SWITCH),
        [(DropReason::Runt, 1), (DropReason::SamePort, 1)]
    );
    // The same without anything to flood takes the other way through the code.
    let frames = [&frames[..2], &frames[3..6]].concat();
    put(&mut outsides[0], &frames);
    worker.step(0);
    assert_eq!(take(&mut outsides[1]), pick(&[0, 5]));
    assert_eq!(take(&mut outsides[2]), pick(&[1]));
    read(&worker);
}

#[test]
fn what_a_port_has_no_room_for_is_dropped_and_counted_there() {
    let (mut worker, mut outsides) = switched(&[A, B], 3);
    for _ in 0..2 {
        let frames = vec![frame(station(2), station(1), 60, 0); 3];
        put(&mut outsides[0], &frames);
        worker.step(0);
    }
    let snapshot = read(&worker);
    assert_eq!(drops_of(&snapshot, B), [(DropReason::NoRoom, 3)]);
    assert_eq!(take(&mut outsides[1]).len(), 3);
}

#[test]
fn packets_without_a_way_on_are_counted_where_they_got_stuck() {
    let (mut worker, mut outsides) = switched(&[A], 8);
    put(&mut outsides[0], &[frame(EVERYBODY, station(1), 60, 0)]);
    worker.step(0);
    let no_cable = [(DropReason::NoCable, 1)];
    assert_eq!(drops_of(&read(&worker), SWITCH), no_cable);
    worker.apply(Change::new().disconnect(A), 0).unwrap();
    put(&mut outsides[0], &[frame(EVERYBODY, station(1), 60, 0)]);
    worker.step(0);
    assert_eq!(drops_of(&read(&worker), A), no_cable);
}

#[test]
fn an_echo_answers_with_swapped_addresses_and_leaves_the_neighbours_copy_alone() {
    // The echo sits at a gate before the neighbour's: what it does to a shared packet would be seen there.
    let (mut worker, mut outsides) = switched(&[A], 8);
    let (inside, mut neighbour) = memory_pair(8);
    let change = Change::new()
        .add(OTHER, Echo::new())
        .connect(OTHER, Place::new(SWITCH, 1))
        .add(B, inside)
        .connect(B, Place::new(SWITCH, 2));
    worker.apply(change, 0).unwrap();
    // Long enough to have a body, to an address nobody knows.
    let flooded = frame(station(77), station(1), 1_000, 5);
    put(&mut outsides[0], std::slice::from_ref(&flooded));
    worker.step(0);
    assert_eq!(take(&mut neighbour), [flooded]);
    let answer = frame(station(1), station(77), 1_000, 5);
    assert_eq!(take(&mut outsides[0]), [answer]);
    // Now the switch knows that 77 is behind the echo: nothing is shared, unless a neighbour in the burst is flooded.
    let known = frame(station(77), station(1), 60, 6);
    let answer = frame(station(1), station(77), 60, 6);
    put(&mut outsides[0], std::slice::from_ref(&known));
    worker.step(0);
    assert_eq!(take(&mut outsides[0]), std::slice::from_ref(&answer));
    assert_eq!(take(&mut neighbour).len(), 0);
    let flooded = frame(station(78), station(1), 60, 7);
    put(&mut outsides[0], &[known, flooded.clone()]);
    worker.step(0);
    assert_eq!(take(&mut neighbour), [flooded]);
    let other_answer = frame(station(1), station(78), 60, 7);
    assert_eq!(take(&mut outsides[0]), [answer, other_answer]);
    read(&worker);
}

#[test]
fn two_switches_cabled_twice_circle_within_bounds() {
    let (mut worker, mut outsides) = switched(&[A, B], 8);
    let change = Change::new()
        .add(OTHER, switch())
        .connect(Place::new(SWITCH, 10), Place::new(OTHER, 10))
        .connect(Place::new(SWITCH, 11), Place::new(OTHER, 11));
    worker.apply(change, 0).unwrap();
    put(&mut outsides[0], &[frame(EVERYBODY, station(1), 60, 0)]);
    assert_eq!(worker.step(0), 1);
    // Once directly, and three times in each direction of the circle, until it has passed eight switches.
    assert_eq!(take(&mut outsides[1]).len(), 7);
    assert_eq!(take(&mut outsides[0]).len(), 6);
    let snapshot = read(&worker);
    assert_eq!(drops_of(&snapshot, OTHER), [(DropReason::Loop, 2)]);
}

#[test]
fn many_circles_at_once_do_not_hang() {
    let (mut worker, mut outsides) = switched(&[A, B], 64);
    let mut change = Change::new().add(OTHER, switch());
    for gate in 10..42 {
        change = change.connect(Place::new(SWITCH, gate), Place::new(OTHER, gate));
    }
    worker.apply(change, 0).unwrap();
    put(
        &mut outsides[0],
        &vec![frame(EVERYBODY, station(1), 60, 0); 64],
    );
    let start = Instant::now();
    worker.step(0);
    // 32 circles to the depth of 8 would be 10^10 visits.
    assert!(start.elapsed() < Duration::from_secs(5));
    read(&worker);
}

#[test]
fn a_source_makes_only_what_its_receiver_takes() {
    let (a, mut outside) = memory_pair(100);
    let mut worker = Worker::new();
    let source = Source::new(SourceOptions {
        frame_len: 1_518,
        ..SourceOptions::default()
    });
    let change = Change::new()
        .add(A, a)
        .add(OTHER, source.unwrap())
        .connect(A, OTHER);
    worker.apply(change, 0).unwrap();
    let made: Vec<_> = (0..4).map(|_| worker.step(0)).collect();
    assert_eq!(made, [64, 36, 0, 0]);
    let snapshot = read(&worker);
    assert_eq!(function(&snapshot, OTHER).counters.generated, 100);
    assert_eq!(drops_of(&snapshot, A), []);
    let frames = take(&mut outside);
    assert!(frames.iter().all(|frame| *frame == frames[0]));
    assert_eq!((frames.len(), frames[0].len()), (100, 1_518));
    assert_eq!(worker.step(0), 64);
}

#[test]
fn a_source_behind_functions_is_held_back_the_same_way() {
    let (b, mut outside) = memory_pair(10);
    let mut worker = Worker::new();
    let change = Change::new()
        .add(B, b)
        .add(OTHER, Source::new(SourceOptions::default()).unwrap())
        .add(SWITCH, switch())
        .connect(OTHER, Place::new(SWITCH, 0))
        .connect(B, Place::new(SWITCH, 1));
    worker.apply(change, 0).unwrap();
    put(&mut outside, &[frame(EVERYBODY, station(2), 60, 0)]);
    // The receiver is known before the source's first packet, so nothing is flooded.
    assert_eq!(worker.step(0), 11);
    assert_eq!(worker.step(0), 0);
    let snapshot = read(&worker);
    assert_eq!(function(&snapshot, OTHER).counters.generated, 10);
    assert_eq!(drops_of(&snapshot, B), []);
}

#[test]
fn a_source_without_a_cable_makes_nothing_and_lets_the_worker_sleep() {
    let mut worker = Worker::new();
    let source = Source::new(SourceOptions::default()).unwrap();
    worker.apply(Change::new().add(OTHER, source), 0).unwrap();
    assert_eq!(worker.step(0), 0);
    assert_eq!(worker.due(), None);
    let sink = Change::new().add(A, Sink::new()).connect(A, OTHER);
    worker.apply(sink, 0).unwrap();
    assert_eq!(worker.step(0), 64);
    assert_eq!(worker.due(), Some(0));
    let orders = SourceOrders {
        rate: Some(10),
        count: Some(2),
    };
    worker
        .apply(Change::new().update(OTHER, orders), SECOND)
        .unwrap();
    let mut now = SECOND;
    let mut made = 0;
    while let Some(due) = worker.due() {
        now = due.max(now);
        made += worker.step(now);
    }
    assert_eq!((made, now), (2, SECOND + SECOND / 10));
    read(&worker);
}

#[test]
fn a_removed_port_comes_back_with_its_counters_and_can_be_put_in_again() {
    let (mut worker, mut outsides) = switched(&[A, B], 8);
    put(&mut outsides[0], &[frame(EVERYBODY, station(1), 60, 0)]);
    worker.step(0);
    let mut removed = worker.apply(Change::new().remove(A), 0).unwrap();
    let (node, Node::Port(port)) = removed.remove(0) else {
        panic!("a port was removed");
    };
    assert_eq!((node, port.counters().received), (A, 1));
    // What a port has done elsewhere is not part of this network's books.
    read(&worker);
    let again = Change::new()
        .add(C, Node::Port(port))
        .connect(C, Place::new(SWITCH, 5));
    worker.apply(again, 0).unwrap();
    put(&mut outsides[0], &[frame(EVERYBODY, station(1), 60, 0)]);
    worker.step(0);
    let snapshot = read(&worker);
    assert_eq!(snapshot.balance.received, 2);
    assert_eq!(snapshot.ports[1].counters.received, 2);
}

#[test]
fn a_change_that_is_refused_changes_nothing_and_comes_back() {
    let (mut worker, _outsides) = switched(&[A, B], 8);
    let change = Change::new()
        .add(C, memory_pair(1).0)
        .connect(C, Place::new(SWITCH, 0));
    let rejected = worker.apply(change, 0).unwrap_err();
    assert_eq!(
        rejected.to_string(),
        "node 10 gate 0 is cabled to node 1 gate 0 already; disconnect that first"
    );
    assert_eq!(rejected.change.unwrap().into_added().len(), 1);
    assert_eq!(worker.graph().nodes().count(), 3);
    assert_eq!(worker.snapshot(0).ports.len(), 2);
}

#[test]
fn stations_behind_a_gate_that_is_recabled_are_forgotten() {
    let (mut worker, mut outsides) = switched(&[A, B, C], 8);
    put(&mut outsides[1], &[frame(EVERYBODY, station(2), 60, 0)]);
    worker.step(0);
    let (inside, mut replaced) = memory_pair(8);
    let change = Change::new()
        .remove(B)
        .add(B, inside)
        .connect(B, Place::new(SWITCH, 1));
    worker.apply(change, 0).unwrap();
    outsides.iter_mut().for_each(|outside| drop(take(outside)));
    // Flooded, not sent to gate 1 alone as before.
    put(&mut outsides[0], &[frame(station(2), station(1), 60, 0)]);
    worker.step(0);
    assert_eq!(take(&mut replaced).len(), 1);
    assert_eq!(take(&mut outsides[2]).len(), 1);
    read(&worker);
}

#[test]
fn a_station_that_was_silent_for_the_ageing_time_is_flooded_to_again() {
    let (mut worker, mut outsides) = switched(&[A, B, C], 8);
    put(&mut outsides[1], &[frame(EVERYBODY, station(2), 60, 0)]);
    worker.step(0);
    take(&mut outsides[2]);
    for (now, strangers) in [(SECOND, 0), (299 * SECOND, 0), (300 * SECOND, 1)] {
        put(&mut outsides[0], &[frame(station(2), station(1), 60, 0)]);
        worker.step(now);
        assert_eq!(take(&mut outsides[2]).len(), strangers, "at {now}");
    }
    // Nothing happens any more, and the table empties by itself.
    let mut now = 300 * SECOND;
    while let Some(due) = worker.due() {
        assert!(now < 700 * SECOND);
        now = due;
        worker.step(now);
    }
    let snapshot = read(&worker);
    let FunctionDetail::Switch(counters) = function(&snapshot, SWITCH).detail else {
        panic!("a switch counts as one");
    };
    assert_eq!((counters.entries, counters.aged), (0, 2));
}

fn host(n: u8, orders: HostOrders) -> Host {
    Host::new(HostOptions {
        mac: Mac(station(n)),
        ip: address(n),
        orders,
    })
    .unwrap()
}

fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, n)
}

fn host_counters(snapshot: &Snapshot, node: NodeId) -> HostCounters {
    match &function(snapshot, node).detail {
        FunctionDetail::Host(counters) => HostCounters::clone(counters),
        other => panic!("a host counts as one, not as {other:?}"),
    }
}

#[test]
fn hosts_on_a_switch_resolve_ping_and_blast_each_other() {
    let pinging = HostOrders {
        ping: Some(Ping {
            peers: vec![address(2), address(3)],
            ..Ping::default()
        }),
        blast: None,
    };
    let mut change = Change::new().add(A, host(1, pinging)).add(SWITCH, switch());
    for (n, node) in [(2, B), (3, C)] {
        change = change.add(node, host(n, HostOrders::default()));
    }
    for (gate, node) in [(0, A), (1, B), (2, C)] {
        change = change.connect(node, Place::new(SWITCH, gate));
    }
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    for now in 0..100 {
        worker.step(now * 1_000);
    }
    let snapshot = read(&worker);
    let counters = host_counters(&snapshot, A);
    assert_eq!(counters.resolved, 2);
    assert!(counters.pings_answered > 100, "{counters:?}");
    assert_eq!(counters.pings_lost, 0);
    assert!(counters.rtt.summary().max <= 1_000);

    let blasting = HostOrders {
        ping: None,
        blast: Some(Blast {
            peer: address(3),
            frame_len: 1_500,
            orders: SourceOrders {
                count: Some(1_000),
                rate: None,
            },
        }),
    };
    worker
        .apply(Change::new().update(A, blasting), 100_000)
        .unwrap();
    for now in 100..200 {
        worker.step(now * 1_000);
    }
    let snapshot = read(&worker);
    assert_eq!(host_counters(&snapshot, A).blasted, 1_000);
    let received = host_counters(&snapshot, C);
    assert_eq!(
        (received.udp_received, received.udp_bytes),
        (1_000, 1_500_000)
    );
    assert_eq!(host_counters(&snapshot, B).udp_received, 0);
    assert_eq!(
        worker.due(),
        Some(SECOND),
        "only the switch's sweep is left"
    );
}

#[test]
fn a_host_keeps_what_its_full_port_does_not_take() {
    let (a, mut outside) = memory_pair(1);
    let orders = HostOrders {
        ping: Some(Ping {
            peers: (2..6).map(address).collect(),
            ..Ping::default()
        }),
        blast: None,
    };
    let mut worker = Worker::new();
    let change = Change::new()
        .add(A, a)
        .add(OTHER, host(1, orders))
        .connect(A, OTHER);
    worker.apply(change, 0).unwrap();
    let asked: Vec<_> = (0..4)
        .map(|now| (worker.step(now), take(&mut outside)))
        .collect();
    let targets: Vec<u8> = asked
        .iter()
        .map(|(n, frames)| {
            assert_eq!((*n, frames.len()), (1, 1));
            frames[0][41]
        })
        .collect();
    assert_eq!(targets, [2, 3, 4, 5]);
    assert_eq!(drops_of(&read(&worker), A), []);
}

#[test]
fn updates_for_another_kind_or_with_nonsense_are_refused() {
    let (mut worker, _outsides) = switched(&[A], 8);
    let source = Source::new(SourceOptions::default()).unwrap();
    worker.apply(Change::new().add(OTHER, source), 0).unwrap();
    let stop = SourceOrders {
        rate: Some(0),
        count: None,
    };
    for (node, orders, text) in [
        (
            SWITCH,
            SourceOrders::default(),
            "node 10 is a switch, the update is for a source",
        ),
        (
            NodeId(99),
            SourceOrders::default(),
            "there is no node 99 in this network",
        ),
        (
            OTHER,
            stop,
            "a rate of 0 packets/s generates nothing; leave the rate out for as fast as possible",
        ),
    ] {
        let rejected = worker
            .apply(Change::new().update(node, orders), 0)
            .unwrap_err();
        assert_eq!(rejected.to_string(), text);
    }
}

/// Writes down what it is asked to do.
#[derive(Debug)]
struct Diary {
    name: &'static str,
    entries: Arc<Mutex<Vec<String>>>,
    arrives: usize,
}

impl Diary {
    fn note(&self, what: &str) {
        let mut entries = self.entries.lock().unwrap();
        entries.push(format!("{} {what}", self.name));
    }
}

impl Port for Diary {
    fn attach(&mut self) {
        self.note("attach");
    }

    fn detach(&mut self) {
        self.note("detach");
    }

    fn sync(&mut self) -> bool {
        self.note("sync");
        false
    }

    fn rx(&mut self, burst: &mut Burst) -> usize {
        assert!(burst.is_empty());
        self.note("rx");
        for _ in 0..self.arrives {
            burst.push_bytes(&[0; 60], Offload::default());
        }
        self.arrives
    }

    fn complete(&mut self) {
        self.note("complete");
    }

    fn tx(&mut self, _: &Burst, picks: &Picks) -> usize {
        self.note("tx");
        picks.len()
    }

    fn flush(&mut self) {
        self.note("flush");
    }

    fn drop_tx(&mut self, _: DropReason, _: usize) {}

    fn counters(&self) -> PortCounters {
        PortCounters::default()
    }
}

#[test]
fn a_breath_asks_ports_in_the_promised_order() {
    let entries = Arc::default();
    let diary = |name, arrives| Diary {
        name,
        entries: Arc::clone(&entries),
        arrives,
    };
    let mut worker = Worker::new();
    let change = Change::new()
        .add(A, diary("a", 2))
        .add(B, diary("b", 0))
        .connect(A, B);
    worker.apply(change, 0).unwrap();
    worker.step(0);
    worker.apply(Change::new().remove(B), 0).unwrap();
    assert_eq!(
        entries.lock().unwrap().join(", "),
        "a attach, b attach, a sync, a rx, b tx, a complete, b sync, b rx, b complete, b flush, b detach"
    );
}
