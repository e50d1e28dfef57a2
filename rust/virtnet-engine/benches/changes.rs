//! What changes cost a worker: the longest time between two polls of a port that they do not concern.
//!
//! It is CPU time of the worker's thread, so what else runs on the machine does not show. One line per kind of change, each done
//! and undone a few times; the longest of each. `cargo bench -p virtnet-engine --bench changes`
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    missing_docs,
    reason = "a bench prints its figures and stops where something is wrong"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use virtnet_engine::{
    Action, Change, Ends, Engine, EngineOptions, Firewall, FirewallOrders, NodeId, Place, Rule,
    RuleSet, Sink, Switch, SwitchOptions, Timeouts,
};
use virtnet_packet::{
    BURST_MAX, Burst, DropReason, Offload, Picks, Port, PortCounters, memory_pair,
};
use virtnet_sys::thread_cpu_time;

/// Nodes that are there throughout.
const BUSY: NodeId = NodeId(0);
const SINK: NodeId = NodeId(1);
const SWITCH: NodeId = NodeId(2);
const FIREWALL: NodeId = NodeId(3);
const TEACHER: NodeId = NodeId(4);
/// The first of those that come and go.
const FIRST: u32 = 100;
const MANY: u32 = 1_000;

/// A port that is never without packets, and notes how long it was not asked for any.
#[derive(Debug)]
struct Busy {
    last: Duration,
    longest_ns: Arc<AtomicU64>,
    /// Where the frames come from: each from another of so many stations.
    stations: u32,
    at: u32,
    counters: PortCounters,
}

impl Busy {
    fn new(longest_ns: &Arc<AtomicU64>, stations: u32) -> Self {
        Self {
            last: Duration::MAX,
            longest_ns: Arc::clone(longest_ns),
            stations,
            at: 0,
            counters: PortCounters::default(),
        }
    }
}

impl Port for Busy {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        let now = thread_cpu_time();
        let since = now.saturating_sub(self.last);
        self.longest_ns
            .fetch_max(u64::try_from(since.as_nanos()).unwrap(), Ordering::Relaxed);
        self.last = now;
        for _ in 0..BURST_MAX {
            self.at = (self.at + 1) % self.stations;
            let mut frame = [0; 64];
            frame[..6].copy_from_slice(&[2, 0xff, 0, 0, 0, 1]);
            frame[6..8].copy_from_slice(&[2, 0]);
            frame[8..12].copy_from_slice(&self.at.to_be_bytes());
            burst.push_bytes(&frame, Offload::default());
        }
        self.counters.received += BURST_MAX as u64;
        BURST_MAX
    }

    fn tx(&mut self, _: &Burst, picks: &Picks) -> usize {
        self.counters.sent += picks.len() as u64;
        picks.len()
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

fn rules(n: u32) -> FirewallOrders {
    let rule = |n: u32| Rule {
        action: Action::Pass,
        came_in_by: None,
        version: None,
        protocols: vec![17],
        ethertype: None,
        from: Ends::default(),
        to: Ends::default(),
        filter: None,
        keep_state: true,
        text: format!("pass proto udp to any port {n}"),
    };
    let rules = RuleSet::new((0..n).map(rule).collect(), Vec::new(), Action::Drop, true);
    FirewallOrders {
        rules: Arc::new(rules),
        timeouts: Timeouts::default(),
    }
}

fn add_port(change: Change, n: u32) -> Change {
    let gate = Place::new(SWITCH, u16::try_from(10 + n).unwrap());
    let node = NodeId(FIRST + n);
    change.add(node, memory_pair(64).0).connect(node, gate)
}

struct Rig {
    engine: Engine,
    longest_ns: Arc<AtomicU64>,
}

impl Rig {
    fn new() -> Self {
        let engine = Engine::new(EngineOptions::default()).unwrap();
        let longest_ns = Arc::default();
        let change = Change::new()
            .add(BUSY, Busy::new(&longest_ns, 1))
            .add(SINK, Sink::new())
            .connect(BUSY, SINK)
            .add(SWITCH, Switch::new(SwitchOptions::default()).unwrap())
            .add(FIREWALL, Firewall::new(rules(0), 1_000_000));
        engine.apply(change).unwrap();
        Self { engine, longest_ns }
    }

    fn apply(&self, change: Change) {
        drop(self.engine.apply(change).unwrap());
    }

    fn measure(&self, what: &str, act: impl Fn(&Self)) {
        thread::sleep(Duration::from_millis(20));
        self.longest_ns.store(0, Ordering::Relaxed);
        act(self);
        thread::sleep(Duration::from_millis(20));
        let us = self.longest_ns.load(Ordering::Relaxed) as f64 / 1e3;
        println!("{what:60} {us:9.1} us");
    }
}

fn main() {
    let rig = Rig::new();
    rig.measure("nothing", |_| thread::sleep(Duration::from_millis(200)));
    for _ in 0..2 {
        rig.measure("1000 ports, one after another, come", |rig| {
            (0..MANY).for_each(|n| rig.apply(add_port(Change::new(), n)));
        });
        rig.measure("counters are read of 1000 ports", |rig| {
            (0..20).for_each(|_| drop(rig.engine.snapshot().unwrap()));
        });
        rig.measure("1000 ports, one after another, go", |rig| {
            (0..MANY).for_each(|n| rig.apply(Change::new().remove(NodeId(FIRST + n))));
        });
        rig.measure("1000 ports at once come", |rig| {
            rig.apply((0..MANY).fold(Change::new(), add_port));
        });
        rig.measure("1000 ports at once go", |rig| {
            let change =
                (0..MANY).fold(Change::new(), |change, n| change.remove(NodeId(FIRST + n)));
            rig.apply(change);
        });
        rig.measure("1000 rules come and go, 20 by 20", |rig| {
            for n in (0..=MANY).step_by(20).chain((0..=MANY).rev().step_by(20)) {
                rig.apply(Change::new().update(FIREWALL, rules(n)));
            }
        });
        rig.measure("1000 rules at once come", |rig| {
            rig.apply(Change::new().update(FIREWALL, rules(MANY)));
        });
        rig.measure("1000 rules at once go", |rig| {
            rig.apply(Change::new().update(FIREWALL, rules(0)));
        });
    }
    rig.measure("a switch learns a million stations", |rig| {
        let other = Arc::default();
        rig.apply(
            Change::new()
                .add(TEACHER, Busy::new(&other, 1_000_000))
                .connect(TEACHER, Place::new(SWITCH, 0)),
        );
        thread::sleep(Duration::from_millis(2000));
    });
    rig.measure("its port with all of them goes", |rig| {
        rig.apply(Change::new().remove(TEACHER));
    });
    rig.measure(
        "100 other ports of that switch come and go at once",
        |rig| {
            rig.apply((0..100).fold(Change::new(), add_port));
            rig.apply((0..100).fold(Change::new(), |change, n| change.remove(NodeId(FIRST + n))));
        },
    );
    rig.measure("it goes itself", |rig| {
        rig.apply(Change::new().remove(SWITCH))
    });
}
