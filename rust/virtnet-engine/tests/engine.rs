//! Engines on their threads: commands are answered, sleepers are woken, failures are told.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{EVERYBODY, event_port, frame, put, station, take};
use virtnet_engine::{
    Change, Echo, Engine, EngineError, EngineOptions, Node, NodeId, Place, Poll, Sink, Source,
    SourceOptions, SourceOrders, Switch, SwitchOptions, Wire,
};
use virtnet_packet::{Burst, DropReason, Picks, Port, PortCounters, memory_pair};

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const FUNCTION: NodeId = NodeId(10);

fn engine(poll: Poll) -> Engine {
    let options = EngineOptions {
        poll,
        ..EngineOptions::default()
    };
    Engine::new(options).unwrap()
}

/// Waits until something is so, for as long as a busy machine may need.
fn wait_until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "waited too long");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn packets_flow_and_the_books_are_exact_while_they_do() {
    let engine = engine(Poll::Busy);
    let (a, mut left) = memory_pair(4_096);
    let (b, mut right) = memory_pair(4_096);
    let change = Change::new()
        .add(A, a)
        .add(B, b)
        .add(FUNCTION, Switch::new(SwitchOptions::default()).unwrap())
        .connect(A, Place::new(FUNCTION, 0))
        .connect(B, Place::new(FUNCTION, 1));
    engine.apply(change).unwrap();
    let frames: Vec<_> = (0..100)
        .map(|n| frame(station(2), station(1), 60, n))
        .collect();
    for round in 1..=20 {
        put(&mut left, &frames);
        wait_until(|| {
            let snapshot = engine.snapshot().unwrap();
            assert!(snapshot.balance.is_exact(), "{:?}", snapshot.balance);
            snapshot.balance.sent == round * 100
        });
        assert_eq!(take(&mut right), frames);
    }
    let remains = engine.stop().unwrap();
    let nodes: Vec<_> = remains.nodes.iter().map(|(node, _)| *node).collect();
    assert_eq!(nodes, [A, B, FUNCTION]);
    assert_eq!(remains.snapshot.balance.received, 2_000);
    assert!(matches!(engine.stop(), Err(EngineError::Stopped { .. })));
    assert!(matches!(
        engine.snapshot(),
        Err(EngineError::Stopped { .. })
    ));
}

#[test]
fn a_sleeping_worker_is_woken_by_a_packet() {
    for poll in [Poll::Adaptive, Poll::Interrupt] {
        let engine = engine(poll);
        let (port, outside) = event_port();
        let change = Change::new()
            .add(A, port)
            .add(FUNCTION, Echo::new())
            .connect(A, FUNCTION);
        engine.apply(change).unwrap();
        for round in 1..=50 {
            // Now and then into its sleep, now and then into its falling asleep.
            if round % 2 == 0 {
                wait_until(|| outside.is_armed());
            }
            outside.put(frame(EVERYBODY, station(1), 60, 0));
            wait_until(|| outside.sent() == round);
        }
        let snapshot = engine.snapshot().unwrap();
        assert!(snapshot.worker.sleeps > 0, "{poll:?}: {snapshot:?}");
    }
}

#[test]
fn an_idle_network_costs_no_cpu() {
    for poll in [Poll::Adaptive, Poll::Interrupt] {
        let engine = engine(poll);
        let (port, outside) = event_port();
        let change = Change::new()
            .add(A, port)
            .add(FUNCTION, Switch::new(SwitchOptions::default()).unwrap())
            .connect(A, FUNCTION);
        engine.apply(change).unwrap();
        // The switch has an entry to watch the age of.
        outside.put(frame(EVERYBODY, station(1), 60, 0));
        wait_until(|| engine.snapshot().unwrap().balance.received == 1);
        let before = engine.snapshot().unwrap().worker;
        thread::sleep(Duration::from_millis(300));
        let after = engine.snapshot().unwrap().worker;
        let (used, sleeps) = (after.cpu_ns - before.cpu_ns, after.sleeps - before.sleeps);
        assert!(used < 15_000_000, "{poll:?}: {used} ns of CPU time");
        assert!(sleeps < 10, "{poll:?}: woken {sleeps} times");
    }
}

/// Counts how often it is asked for packets.
#[derive(Debug)]
struct Asked<P>(P, Arc<AtomicU64>);

impl<P: Port> Port for Asked<P> {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.rx(burst)
    }
    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        self.0.tx(burst, picks)
    }
    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.0.drop_tx(reason, n);
    }
    fn wait_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.0.wait_fd()
    }
    fn arm(&mut self) -> bool {
        self.0.arm()
    }
    fn disarm(&mut self) {
        self.0.disarm();
    }
    fn counters(&self) -> PortCounters {
        self.0.counters()
    }
}

#[test]
fn silent_ports_doze_beside_busy_ones_and_are_woken() {
    let engine = engine(Poll::Adaptive);
    let (silent, outside) = event_port();
    let asked = Arc::new(AtomicU64::new(0));
    let (far, _far_outside) = event_port();
    // The source keeps the worker awake.
    let change = Change::new()
        .add(A, Asked(silent, Arc::clone(&asked)))
        .add(FUNCTION, Source::new(SourceOptions::default()).unwrap())
        .add(NodeId(11), Sink::new())
        .add(B, far)
        .connect(FUNCTION, NodeId(11))
        .connect(A, B);
    engine.apply(change).unwrap();
    let breaths = || engine.snapshot().unwrap().worker.breaths;
    for round in 1..=50 {
        wait_until(|| outside.is_armed());
        let (asked_before, breaths_before) = (asked.load(Ordering::Relaxed), breaths());
        wait_until(|| breaths() > breaths_before + 1_000);
        let asked_now = asked.load(Ordering::Relaxed) - asked_before;
        assert!(asked_now < 100, "asked {asked_now} times while it dozed");
        outside.put(frame(EVERYBODY, station(1), 60, 0));
        wait_until(|| engine.snapshot().unwrap().ports[1].counters.sent == round);
    }
    // One that dozes can be removed, and put back.
    wait_until(|| outside.is_armed());
    let mut removed = engine.apply(Change::new().remove(A)).unwrap();
    let (_, port) = removed.pop().unwrap();
    let Node::Port(port) = port else {
        panic!("a port")
    };
    outside.put(frame(EVERYBODY, station(1), 60, 0));
    engine
        .apply(Change::new().add(A, Node::Port(port)).connect(A, B))
        .unwrap();
    wait_until(|| engine.snapshot().unwrap().ports[1].counters.sent == 51);
    // Before there was anything to do it may have slept.
    assert!(engine.snapshot().unwrap().worker.sleeps <= 1);
}

#[test]
fn a_busy_worker_never_sleeps() {
    let engine = engine(Poll::Busy);
    let (port, outside) = event_port();
    engine.apply(Change::new().add(A, port)).unwrap();
    outside.put(frame(EVERYBODY, station(1), 60, 0));
    wait_until(|| engine.snapshot().unwrap().balance.received == 1);
    let snapshot = engine.snapshot().unwrap();
    assert_eq!(snapshot.worker.sleeps, 0);
    assert_eq!(
        snapshot.ports[0].drops.iter().collect::<Vec<_>>(),
        [(DropReason::NoCable, 1)]
    );
}

#[test]
fn a_slow_source_keeps_its_rate_and_sleeps_in_between() {
    let engine = engine(Poll::Adaptive);
    let source = Source::new(SourceOptions {
        orders: SourceOrders {
            rate: Some(100),
            count: Some(20),
        },
        ..SourceOptions::default()
    });
    let change = Change::new()
        .add(FUNCTION, source.unwrap())
        .add(B, Sink::new())
        .connect(FUNCTION, B);
    let start = Instant::now();
    engine.apply(change).unwrap();
    wait_until(|| engine.snapshot().unwrap().balance.consumed == 20);
    assert!(start.elapsed() >= Duration::from_millis(185));
    let worker = engine.snapshot().unwrap().worker;
    assert!(worker.sleeps >= 15, "{worker:?}");
}

#[test]
fn ports_that_always_have_something_waiting_keep_the_worker_awake() {
    let engine = engine(Poll::Interrupt);
    let (inside, outside) = memory_pair(1);
    let port = Test {
        inner: inside,
        on_rx: || {},
        always_waiting: true,
    };
    engine.apply(Change::new().add(A, port)).unwrap();
    let before = engine.snapshot().unwrap().worker;
    thread::sleep(Duration::from_millis(5));
    let after = engine.snapshot().unwrap().worker;
    assert_eq!(after.sleeps, before.sleeps);
    assert!(after.breaths > before.breaths + 100);
    drop(outside);
}

#[test]
fn a_port_can_be_replaced_while_the_worker_sleeps_on_it() {
    let engine = engine(Poll::Interrupt);
    let (first, first_outside) = event_port();
    let change = Change::new()
        .add(A, first)
        .add(FUNCTION, Echo::new())
        .connect(A, FUNCTION);
    engine.apply(change).unwrap();
    wait_until(|| first_outside.is_armed());
    let (second, second_outside) = event_port();
    let change = Change::new().remove(A).add(A, second).connect(A, FUNCTION);
    let removed = engine.apply(change).unwrap();
    assert_eq!(removed.len(), 1);
    wait_until(|| second_outside.is_armed());
    second_outside.put(frame(EVERYBODY, station(1), 60, 0));
    wait_until(|| second_outside.sent() == 1);
    // What happens to the first one is nobody's business here any more.
    first_outside.put(frame(EVERYBODY, station(1), 60, 0));
    let sleeps = engine.snapshot().unwrap().worker.sleeps;
    thread::sleep(Duration::from_millis(20));
    assert!(engine.snapshot().unwrap().worker.sleeps <= sleeps + 3);
    drop(removed);
}

#[test]
fn a_worker_that_panics_is_a_failed_engine_that_says_why() {
    let engine = engine(Poll::Adaptive);
    let (inside, _outside) = memory_pair(1);
    let dropped = Arc::new(AtomicBool::new(false));
    let guard = SetOnDrop(Arc::clone(&dropped));
    let port = Test {
        inner: inside,
        on_rx: move || {
            let _guard = &guard;
            panic!("the port of this test broke");
        },
        always_waiting: false,
    };
    // It may fail before it answers, or after.
    let _ = engine.apply(Change::new().add(A, port));
    wait_until(|| engine.failure().is_some());
    for error in [
        engine.failure().unwrap(),
        engine.snapshot().unwrap_err(),
        engine.apply(Change::new()).unwrap_err().error,
        engine.stop().unwrap_err(),
    ] {
        assert!(matches!(error, EngineError::Failed { .. }), "{error}");
        assert!(error.to_string().contains("the port of this test broke"));
    }
    wait_until(|| dropped.load(Ordering::SeqCst));
}

#[test]
fn a_worker_that_hangs_is_not_waited_for_without_end() {
    let engine = engine(Poll::Busy);
    let (inside, _outside) = memory_pair(1);
    let port = Test {
        inner: inside,
        on_rx: || thread::sleep(Duration::from_millis(2_500)),
        always_waiting: false,
    };
    engine.apply(Change::new().add(A, port)).unwrap();
    thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    let error = engine.stop().unwrap_err();
    assert!(matches!(error, EngineError::Unresponsive { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_millis(1_500));
}

#[test]
fn dropping_an_engine_stops_it_and_drops_its_ports() {
    let dropped = Arc::new(AtomicBool::new(false));
    let guard = SetOnDrop(Arc::clone(&dropped));
    let engine = engine(Poll::Adaptive);
    let port = Test {
        inner: memory_pair(1).0,
        on_rx: move || {
            let _guard = &guard;
        },
        always_waiting: false,
    };
    engine.apply(Change::new().add(A, port)).unwrap();
    drop(engine);
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn what_came_before_the_stop_is_received() {
    for poll in [Poll::Busy, Poll::Adaptive, Poll::Interrupt] {
        for _ in 0..20 {
            let engine = engine(poll);
            let (port, mut outside) = memory_pair(1_024);
            let change = Change::new()
                .add(A, port)
                .add(B, Sink::new())
                .connect(A, Place::new(B, 0));
            engine.apply(change).unwrap();
            let frames = vec![frame(station(2), station(1), 60, 0); 1_000];
            put(&mut outside, &frames);
            let balance = engine.stop().unwrap().snapshot.balance;
            assert_eq!(balance.received, 1_000);
        }
    }
}

#[test]
fn a_removed_port_is_dropped_by_whoever_removed_it() {
    let engine = engine(Poll::Adaptive);
    let dropped = Arc::new(AtomicBool::new(false));
    let guard = SetOnDrop(Arc::clone(&dropped));
    let port = Test {
        inner: memory_pair(1).0,
        on_rx: move || {
            let _guard = &guard;
        },
        always_waiting: false,
    };
    engine.apply(Change::new().add(A, port)).unwrap();
    let removed = engine.apply(Change::new().remove(A)).unwrap();
    engine.snapshot().unwrap();
    assert!(!dropped.load(Ordering::SeqCst));
    drop(removed);
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn a_refused_change_comes_back_with_its_nodes() {
    let engine = engine(Poll::Adaptive);
    let change = Change::new()
        .add(FUNCTION, Wire::new())
        .connect(FUNCTION, Place::new(FUNCTION, 2));
    let rejected = engine.apply(change).unwrap_err();
    assert_eq!(
        rejected.to_string(),
        "node 10 gate 2 does not exist: a wire has 2 gate(s), numbered from 0"
    );
    assert_eq!(rejected.change.unwrap().into_added().len(), 1);
    assert_eq!(engine.graph().nodes().count(), 0);
}

#[test]
fn a_worker_that_cannot_be_pinned_is_not_started() {
    let options = EngineOptions {
        name: "nowhere".to_owned(),
        cpus: vec![1 << 20],
        ..EngineOptions::default()
    };
    let error = Engine::new(options).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("cannot start worker \"nowhere\""),
        "{text}"
    );
    assert!(text.contains("1048576"), "{text}");
}

#[test]
fn ten_engines_live_side_by_side_and_are_used_from_many_threads() {
    let engines: Vec<_> = (0..10).map(|_| engine(Poll::Adaptive)).collect();
    thread::scope(|scope| {
        for engine in &engines {
            for n in 0..2 {
                scope.spawn(move || {
                    engine
                        .apply(Change::new().add(NodeId(n), Sink::new()))
                        .unwrap();
                    engine.snapshot().unwrap();
                });
            }
        }
    });
    for engine in engines {
        assert_eq!(engine.stop().unwrap().nodes.len(), 2);
    }
}

/// A memory port that does something of the test's in each `rx`.
struct Test<F> {
    inner: virtnet_packet::MemoryPort,
    on_rx: F,
    always_waiting: bool,
}

impl<F> std::fmt::Debug for Test<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Test")
    }
}

impl<F: FnMut() + Send> Port for Test<F> {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        (self.on_rx)();
        self.inner.rx(burst)
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        self.inner.tx(burst, picks)
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.inner.drop_tx(reason, n);
    }

    fn arm(&mut self) -> bool {
        self.always_waiting
    }

    fn counters(&self) -> PortCounters {
        self.inner.counters()
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
