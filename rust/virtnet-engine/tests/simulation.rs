//! Random networks under random traffic and random changes: the books are exact after every breath.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

mod common;

use std::collections::BTreeMap;

use common::{EVERYBODY, Random, frame, offer, station, take};
use virtnet_engine::{
    Change, Echo, ImpairOrders, Impairment, Node, NodeId, Place, Sink, Source, SourceOptions,
    SourceOrders, Switch, SwitchOptions, Track, Wire, Worker,
};
use virtnet_packet::{MemoryPort, Port, memory_pair};

/// A network, and the far ends of its ports.
struct Simulation {
    random: Random,
    worker: Worker,
    outsides: BTreeMap<NodeId, MemoryPort>,
    next_node: u32,
    now: u64,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        Self {
            random: Random::new(seed),
            worker: Worker::new(),
            outsides: BTreeMap::new(),
            next_node: 0,
            now: 0,
        }
    }

    fn turn(&mut self) {
        if self.random.one_in(4) {
            self.change();
        }
        for _ in 0..self.random.below(4) {
            self.send();
        }
        for _ in 0..=self.random.below(3) {
            self.now += self.random.next() % 10_000_000;
            self.worker.step(self.now);
            self.check();
        }
        if self.random.one_in(3) {
            for outside in self.outsides.values_mut() {
                take(outside);
            }
        }
    }

    /// Adds, removes, cables or uncables something, if it is possible.
    fn change(&mut self) {
        let nodes: Vec<_> = self.worker.graph().nodes().collect();
        let mut change = Change::new();
        let mut added = Vec::new();
        for _ in 0..=self.random.below(2) {
            if nodes.len() + added.len() < 12 {
                let node = NodeId(self.next_node);
                self.next_node += 1;
                let what = self.any_node(node);
                change = change.add(node, what);
                added.push(node);
            }
        }
        if nodes.len() > 6 && self.random.one_in(2) {
            change = change.remove(nodes[self.random.below(nodes.len())].0);
        }
        let cables: Vec<_> = self.worker.graph().cables().collect();
        if !cables.is_empty() && self.random.one_in(4) {
            change = change.disconnect(cables[self.random.below(cables.len())].a);
        }
        let all: Vec<_> = nodes.iter().map(|&(node, _)| node).chain(added).collect();
        for _ in 0..self.random.below(4) {
            let gate = self.random.below(4) as u16;
            let other_gate = self.random.below(4) as u16;
            let a = all[self.random.below(all.len())];
            let b = all[self.random.below(all.len())];
            change = change.connect(Place::new(a, gate), Place::new(b, other_gate));
        }
        self.apply(change);
    }

    /// Makes the change true; one that is refused, by a gate that is taken or not there, must change nothing.
    fn apply(&mut self, change: Change) {
        let before: Vec<_> = self.worker.graph().nodes().collect();
        match self.worker.apply(change, self.now) {
            Ok(removed) => {
                for (node, _) in removed {
                    self.outsides.remove(&node);
                }
            }
            Err(rejected) => {
                assert_eq!(self.worker.graph().nodes().collect::<Vec<_>>(), before);
                for (node, what) in rejected.change.unwrap().into_added() {
                    if let Node::Port(port) = what {
                        assert_eq!(port.counters().received, 0);
                    }
                    self.outsides.remove(&node);
                }
            }
        }
        self.check();
    }

    fn any_node(&mut self, node: NodeId) -> Node {
        match self.random.below(11) {
            0..4 => {
                let (inside, outside) = memory_pair(1 + self.random.below(100));
                self.outsides.insert(node, outside);
                inside.into()
            }
            4 | 5 => Switch::new(SwitchOptions {
                max_entries: 1 + self.random.below(20),
                ..SwitchOptions::default()
            })
            .unwrap()
            .into(),
            6 => Wire::new().into(),
            7 => Echo::new().into(),
            8 if self.random.one_in(2) => Sink::copying().into(),
            8 => Sink::new().into(),
            9 => {
                let orders = ImpairOrders {
                    delay_ns: Track::constant(self.random.below(20_000_000) as f64),
                    jitter_ns: Track::constant(self.random.below(3_000_000) as f64),
                    loss: Track::constant(0.1),
                    duplicate: 0.1,
                    corrupt: 0.1,
                    rate_pps: self.random.one_in(2).then(|| Track::constant(20_000.0)),
                    queue_packets: self.random.below(200),
                    ..ImpairOrders::default()
                };
                let gates = [true, self.random.one_in(2)];
                Impairment::new(&orders, gates, self.random.next())
                    .unwrap()
                    .into()
            }
            _ => Source::new(SourceOptions {
                frame_len: 60 + self.random.below(2_000),
                orders: SourceOrders {
                    rate: self.random.one_in(2).then_some(10_000),
                    count: self.random.one_in(2).then_some(500),
                },
                ..SourceOptions::default()
            })
            .unwrap()
            .into(),
        }
    }

    fn send(&mut self) {
        let nodes: Vec<_> = self.outsides.keys().copied().collect();
        if nodes.is_empty() {
            return;
        }
        let node = nodes[self.random.below(nodes.len())];
        let frames: Vec<_> = (0..self.random.below(100))
            .map(|n| self.any_frame(n))
            .collect();
        // What does not fit into the pair was never sent.
        offer(self.outsides.get_mut(&node).unwrap(), &frames);
    }

    fn any_frame(&mut self, n: usize) -> Vec<u8> {
        if self.random.one_in(30) {
            return vec![0xff; self.random.below(14).max(1)];
        }
        let to = match self.random.below(6) {
            0 => EVERYBODY,
            n => station(self.random.below(10 * n) as u8),
        };
        let from = station(self.random.below(30) as u8);
        let len = 14 + self.random.below(1_600);
        frame(to, from, len, n as u8)
    }

    fn check(&self) {
        let snapshot = self.worker.snapshot(self.now);
        let balance = snapshot.balance;
        assert!(balance.is_exact(), "{balance:?}");
        for port in &snapshot.ports {
            let outside = self.outsides[&port.node].counters();
            assert!(port.counters.received <= outside.sent);
            assert!(port.counters.sent >= outside.received);
        }
    }
}

#[test]
fn the_books_are_exact_whatever_happens() {
    for seed in 1..=60 {
        let mut simulation = Simulation::new(seed);
        for _ in 0..150 {
            simulation.turn();
        }
    }
}
