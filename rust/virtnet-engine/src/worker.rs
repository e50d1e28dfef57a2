//! A worker: the nodes it owns, and the breath.
//!
//! A *breath* takes up to a burst from every port, sends it on its way to the end, gives the buffers back, lets functions
//! that make packets make them, and wakes each receiver once. It is a plain function of the network and the time,
//! [`Worker::step`]: it does not wait, does not lock, and allocates nothing once the traffic is a steady one.
//!
//! Several workers share a network: each has the whole of it before it and some of its nodes, and hands packets for others to
//! whoever has them (see [`passage`](crate::passage)).
//!
//! The thread around it, with its clock, its sleep and its mailbox, is in [`engine`](crate::Engine); a test drives the same
//! steps by hand.

use std::sync::Arc;

use virtnet_packet::{Burst, Picks};

use crate::change::{Change, Node};
use crate::dispatch::{FunctionNode, Network, PortNode};
use crate::function::{Function, Impairment, Router, Update};
use crate::graph::{Gate, Graph, NodeId, NodeKind, Routes, Slot, Target};
use crate::passage::{Bell, PARCELS_A_BREATH, connect};
use crate::stats::{FunctionCounters, FunctionStats, NetBalance, PortStats, Snapshot, WorkerStats};
use crate::{EngineError, Rejected};

/// How often a firewall that nothing comes to is swept.
const FIREWALL_SWEEP_NS: u64 = 1_000_000_000;
/// How many bursts an impaired cable gives out in a breath, either way.
const RELEASES: usize = 4;

/// All of a network's nodes, and what moves packets between them, one breath at a time.
#[derive(Debug, Default)]
pub struct Worker {
    network: Network,
    /// The ports that are asked in every breath; the others doze until something wakes them.
    awake: Vec<usize>,
    /// The same network for people: who is who.
    graph: Graph,
    burst: Burst,
    /// All packets of a burst of the length seen last.
    all: Picks,
    stats: WorkerStats,
    /// The books of nodes that were removed.
    retired: NetBalance,
    /// Packets that functions had kept and have let go in this breath.
    released: usize,
}

/// A change that was found possible, worked out as far as it can be beside the running network.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    graph: Graph,
    routes: Routes,
    removed: Vec<(NodeId, Slot)>,
    added: Vec<(NodeId, Slot, Node)>,
    /// Gates of functions that stay, where a cable was that led elsewhere, or to a node that is another one now.
    recabled: Vec<(usize, Gate)>,
    updates: Vec<(Slot, Update)>,
}

impl Plan {
    /// Works out what `change` makes of `graph`.
    pub(crate) fn new(graph: &Graph, change: Change) -> Result<Self, Rejected> {
        let next = match graph.changed(&change) {
            Ok(next) => next,
            Err(error) => return Err(Rejected::new(error, change)),
        };
        let slot_in = |graph: &Graph, node| graph.slot(node).map(|slot| (node, slot));
        Ok(Self {
            routes: next.routes(),
            recabled: graph.recabled(&next, &change.removed),
            removed: change
                .removed
                .iter()
                .filter_map(|&node| slot_in(graph, node))
                .collect(),
            added: change
                .added
                .into_iter()
                .filter_map(|(node, what)| Some((node, next.slot(node)?, what)))
                .collect(),
            updates: change
                .updates
                .into_iter()
                .filter_map(|(node, update)| Some((next.slot(node)?, update)))
                .collect(),
            graph: next,
        })
    }

    /// Whether the port in `slot` is removed.
    pub(crate) fn removes_port(&self, slot: usize) -> bool {
        let removed = self.removed.iter();
        removed
            .into_iter()
            .any(|&(_, removed)| removed == Slot::Port(slot))
    }

    /// The network after the change.
    pub(crate) fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The plan for each of `workers`: the same change, with the nodes that each is to have.
    pub(crate) fn spread(self, workers: usize) -> Vec<Self> {
        let mut plans: Vec<Self> = (0..workers)
            .map(|_| Self {
                graph: self.graph.clone(),
                routes: self.routes.clone(),
                removed: self.removed.clone(),
                added: Vec::new(),
                recabled: self.recabled.clone(),
                updates: self.updates.clone(),
            })
            .collect();
        for (id, slot, node) in self.added {
            let home = slot.home(workers);
            let mut give = |worker: usize, node| plans[worker].added.push((id, slot, node));
            match node {
                Node::Port(_) => give(home, node),
                Node::Lanes(lanes) => {
                    for (k, lane) in lanes.into_iter().enumerate() {
                        give((home + k) % workers, Node::Port(lane));
                    }
                }
                Node::Function(function) => {
                    for (worker, part) in function.spread(workers, home).into_iter().enumerate() {
                        part.into_iter()
                            .for_each(|part| give(worker, Node::Function(part)));
                    }
                }
            }
        }
        plans
    }
}

impl Worker {
    /// A worker of an empty network.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Workers that share a network, one for each bell, which is rung when another has something for it.
    pub(crate) fn team(bells: &[Arc<Bell>]) -> Vec<Self> {
        let worker = |passages| {
            let mut worker = Self::default();
            worker.network.passages = passages;
            worker
        };
        connect(bells).into_iter().map(worker).collect()
    }

    /// The network as it is.
    #[must_use]
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Makes a change true, whole or not at all. Gives back the nodes that were removed.
    ///
    /// # Errors
    /// [`Rejected`], with the change, if it is not possible. The caller's fault.
    pub fn apply(&mut self, change: Change, now: u64) -> Result<Vec<(NodeId, Node)>, Rejected> {
        let plan = Plan::new(&self.graph, change)?;
        let mine = plan.spread(1).pop().unwrap_or_default();
        Ok(self.adopt(mine, now))
    }

    /// Makes a planned change true. The plan must be for the network as it is.
    pub(crate) fn adopt(&mut self, plan: Plan, now: u64) -> Vec<(NodeId, Node)> {
        let mut given_back = Vec::with_capacity(plan.removed.len());
        for (node, slot) in plan.removed {
            if let Some(what) = self.take_out(slot) {
                given_back.push((node, what));
            }
        }
        for (node, slot, what) in plan.added {
            self.put_in(node, slot, what, now);
        }
        self.network.routes = plan.routes;
        for (slot, gate) in plan.recabled {
            if let Some(Some(node)) = self.network.functions.get_mut(slot) {
                node.function.recabled(gate);
            }
        }
        for (slot, update) in plan.updates {
            if let Slot::Function(slot) = slot
                && let Some(Some(node)) = self.network.functions.get_mut(slot)
            {
                node.function.update(update, now);
            }
        }
        self.network.find_held();
        self.graph = plan.graph;
        given_back
    }

    fn take_out(&mut self, slot: Slot) -> Option<Node> {
        match slot {
            Slot::Port(slot) => {
                let mut node = self.network.ports.get_mut(slot)?.take()?;
                self.awake.retain(|&awake| awake != slot);
                node.port.detach();
                self.burst.clear();
                self.burst.forget_memory();
                let passed = node.port.counters().since(&node.before);
                self.retired.add_port(&passed, &node.drops, node.segmented);
                Some(Node::Port(node.port))
            }
            Slot::Function(slot) => {
                let node = self.network.functions.get_mut(slot)?.take()?;
                let mut node = node;
                node.counters.add(&node.function.close());
                self.retired.add_function(&node.counters);
                let is_home = self.network.passages.is_home(Slot::Function(slot));
                is_home.then_some(Node::Function(node.function))
            }
        }
    }

    fn put_in(&mut self, node: NodeId, slot: Slot, what: Node, now: u64) {
        match (slot, what) {
            (Slot::Port(slot), Node::Port(mut port)) => {
                port.attach();
                let place = PortNode {
                    node,
                    before: port.counters(),
                    port,
                    drops: Default::default(),
                    sent_to: false,
                    segmented: 0,
                    heard: now,
                    dozes: false,
                    held_by: None,
                };
                self.awake.push(slot);
                *place_in(&mut self.network.ports, slot) = Some(place);
            }
            (Slot::Function(slot), Node::Function(function)) => {
                let place = FunctionNode {
                    node,
                    function,
                    counters: FunctionCounters::default(),
                };
                *place_in(&mut self.network.functions, slot) = Some(place);
            }
            _ => debug_assert!(false, "a node was planned for the wrong list, or whole"),
        }
    }

    /// One breath at time `now`, in ns since some fixed moment. Returns how many packets entered the network or came from
    /// another worker, so 0 means that nothing is going on.
    #[inline]
    pub fn step(&mut self, now: u64) -> usize {
        let mut moved = 0;
        let taken_over = if self.network.passages.is_alone() {
            0
        } else {
            self.take_over(now)
        };
        for at in 0..self.awake.len() {
            moved += self.breathe_in(self.awake[at], now);
        }
        for slot in 0..self.network.functions.len() {
            moved += self.let_make(slot, now);
        }
        while let Some(slot) = self.network.sent_to.pop() {
            if let Some(Some(node)) = self.network.ports.get_mut(slot) {
                node.sent_to = false;
                node.port.flush();
            }
        }
        if !self.network.passages.is_alone() {
            self.network.tell_news();
            self.network.passages.flush();
        }
        let taken_over = taken_over + std::mem::take(&mut self.released);
        self.stats.breaths += 1;
        self.stats.busy_breaths += u64::from(moved + taken_over > 0);
        self.stats.packets += moved as u64;
        moved + taken_over
    }

    /// Takes what other workers have handed over on its way; how many packets that are.
    fn take_over(&mut self, now: u64) -> usize {
        let mut packets = 0;
        for inlet in 0..self.network.passages.inlets() {
            while let Some(news) = self.network.passages.next_news(inlet) {
                self.network.hear(news, now);
            }
            for _ in 0..PARCELS_A_BREATH {
                let Some(mut parcel) = self.network.passages.next_parcel(inlet) else {
                    break;
                };
                let n = parcel.burst.len();
                packets += n;
                let (address, burst) = (parcel.address, &mut parcel.burst);
                if !self.network.send_taken_over(address, burst, now) {
                    self.retired.dropped += n as u64;
                }
                self.network.passages.give_back(inlet, parcel.burst);
            }
        }
        packets
    }

    /// Takes what port `slot` has received and sends it on.
    #[inline]
    fn breathe_in(&mut self, slot: usize, now: u64) -> usize {
        let Some(node) = &mut self.network.ports[slot] else {
            return 0;
        };
        let has_changed = node.port.sync();
        self.burst.clear();
        if has_changed {
            // Its guest may have left: nobody else is to keep that guest's memory.
            self.burst.forget_memory();
        }
        if node.is_held() {
            return 0;
        }
        let n = node.port.rx(&mut self.burst);
        if n > 0 {
            node.heard = now;
            if self.all.len() != n {
                self.all = Picks::first(n);
            }
            self.network
                .send_received(slot, &mut self.burst, &self.all, now);
        }
        // Also when nothing came of what was received: its buffers are to go back all the same.
        if let Some(node) = &mut self.network.ports[slot] {
            node.port.complete();
        }
        n
    }

    /// Lets function `slot` make packets, if it is one that does.
    #[inline]
    fn let_make(&mut self, slot: usize, now: u64) -> usize {
        let Some(node) = &mut self.network.functions[slot] else {
            return 0;
        };
        match &mut node.function {
            Function::Source(_) => self.let_source_make(slot, now),
            Function::Host(_) => self.let_host_make(slot, now),
            Function::Impairment(cable) => {
                if cable.is_due(now) {
                    self.let_kept_leave(slot, now);
                }
                0
            }
            Function::Router(router) => {
                router.prepare(now);
                self.let_router_make(slot, now)
            }
            Function::Switch(switch) => {
                switch.sweep(now);
                0
            }
            Function::Firewall(_) => self.let_firewall_answer(slot, now),
            Function::Wire(_)
            | Function::Tee(_)
            | Function::Divert(_)
            | Function::Element(_)
            | Function::Sink(_)
            | Function::Echo(_) => 0,
        }
    }

    fn let_source_make(&mut self, slot: usize, now: u64) -> usize {
        if self.network.first_target(slot) == Target::Nothing {
            return 0;
        }
        let Some((mut burst, picks)) = self.source(slot).and_then(|source| source.offer(now))
        else {
            return 0;
        };
        let taken = self.network.offer_made(slot, &mut burst, &picks, now);
        if let Some(source) = self.source(slot) {
            source.sent(burst, taken, now);
        }
        taken
    }

    /// What a firewall has to say to those it rejects; what finds no room is not said.
    fn let_firewall_answer(&mut self, slot: usize, now: u64) -> usize {
        let mut made = 0;
        for gate in 0..2 {
            let Some(Function::Firewall(firewall)) = self.function(slot) else {
                return made;
            };
            firewall.sweep(now, FIREWALL_SWEEP_NS);
            let Some(mut answers) = firewall.take_answers(gate) else {
                continue;
            };
            let all = Picks::first(answers.len());
            let network = &mut self.network;
            let sent = network.offer_made_at(slot, gate, &mut answers, &all, now);
            if let Some(Function::Firewall(firewall)) = self.function(slot) {
                firewall.give_back(gate, answers, sent);
            }
            made += sent;
        }
        made
    }

    fn function(&mut self, slot: usize) -> Option<&mut Function> {
        let node = self.network.functions.get_mut(slot)?.as_mut()?;
        Some(&mut node.function)
    }

    /// A host's answers and questions leave one by one, since it must know which of them were taken; its bulk packets as a
    /// source's.
    fn let_host_make(&mut self, slot: usize, now: u64) -> usize {
        if self.network.first_target(slot) == Target::Nothing {
            return 0;
        }
        let mut made = 0;
        let waiting = self.host(slot).and_then(|host| {
            host.prepare(now);
            host.offer()
        });
        if let Some((mut out, mut at)) = waiting {
            while at < out.len() {
                let mut one = Picks::default();
                one.push(at);
                if self.network.offer_made(slot, &mut out, &one, now) == 0 {
                    break;
                }
                at += 1;
                made += 1;
            }
            if let Some(host) = self.host(slot) {
                host.sent(out, at, now);
            }
        }
        let bulk = self.source(slot).and_then(|source| source.offer(now));
        if let Some((mut burst, picks)) = bulk {
            let taken = self.network.offer_made(slot, &mut burst, &picks, now);
            if let Some(source) = self.source(slot) {
                source.sent(burst, taken, now);
            }
            if let Some(host) = self.host(slot) {
                host.blasted(taken);
            }
            made += taken;
        }
        made
    }

    /// Lets an impaired cable give out what is due.
    #[cold]
    fn let_kept_leave(&mut self, slot: usize, now: u64) {
        for gate in [0, 1] {
            for _ in 0..RELEASES {
                let Some(mut out) = self.cable(slot).and_then(|cable| cable.release(gate, now))
                else {
                    break;
                };
                self.released += out.len();
                let all = Picks::first(out.len());
                self.network.send_kept(slot, gate ^ 1, &mut out, &all, now);
                if let Some(cable) = self.cable(slot) {
                    cable.left(out);
                }
            }
        }
    }

    fn cable(&mut self, slot: usize) -> Option<&mut Impairment> {
        match &mut self.network.functions[slot].as_mut()?.function {
            Function::Impairment(cable) => Some(cable),
            _ => None,
        }
    }

    /// What a router has made leaves by the gates it is for, and what finds no room is dropped there: it does not wait.
    fn let_router_make(&mut self, slot: usize, now: u64) -> usize {
        let mut n = 0;
        while let Some(mut made) = self.router(slot).and_then(Router::take_made) {
            for run in made.runs() {
                let (gate, picks) = run;
                n += picks.len();
                self.network
                    .send_made(slot, gate, &mut made.burst, &picks, now);
            }
            if let Some(router) = self.router(slot) {
                router.give_back(made);
            }
        }
        if let Some(Some(node)) = self.network.functions.get_mut(slot)
            && let Function::Router(router) = &mut node.function
        {
            let lost = router.take_lost();
            node.counters.generated += lost.total();
            node.counters.drops.merge(&lost);
        }
        n
    }

    fn router(&mut self, slot: usize) -> Option<&mut Router> {
        match &mut self.network.functions[slot].as_mut()?.function {
            Function::Router(router) => Some(router),
            _ => None,
        }
    }

    /// Drops what functions have kept, before the last snapshot.
    pub(crate) fn drop_kept(&mut self) {
        for node in self.network.functions.iter_mut().flatten() {
            node.counters.add(&node.function.close());
        }
    }

    /// The source at `slot`, or that of the host there.
    fn source(&mut self, slot: usize) -> Option<&mut crate::function::Source> {
        match &mut self.network.functions[slot].as_mut()?.function {
            Function::Source(source) => Some(source),
            Function::Host(host) => host.blaster(),
            _ => None,
        }
    }

    fn host(&mut self, slot: usize) -> Option<&mut crate::function::Host> {
        match &mut self.network.functions[slot].as_mut()?.function {
            Function::Host(host) => Some(host),
            _ => None,
        }
    }

    /// When a function has something to do even if no packet arrives; `None`: never.
    #[must_use]
    pub fn due(&self) -> Option<u64> {
        let nodes = self.network.functions.iter().enumerate();
        nodes
            .filter_map(|(slot, node)| {
                let function = &node.as_ref()?.function;
                let makes = matches!(function.kind(), NodeKind::Source | NodeKind::Host);
                if makes && self.network.first_target(slot) == Target::Nothing {
                    return None;
                }
                function.due()
            })
            .min()
    }

    /// All counters, between two breaths.
    #[must_use]
    pub fn snapshot(&self, now: u64) -> Snapshot {
        let mut balance = NetBalance {
            handed_over: self.network.passages.handed_over,
            taken_over: self.network.passages.taken_over,
            ..self.retired
        };
        let mut ports = Vec::with_capacity(self.network.ports.len());
        for node in self.network.ports.iter().flatten() {
            let counters = node.port.counters();
            balance.add_port(&counters.since(&node.before), &node.drops, node.segmented);
            ports.push(PortStats {
                node: node.node,
                counters,
                drops: node.drops,
                segmented: node.segmented,
            });
        }
        let mut functions = Vec::with_capacity(self.network.functions.len());
        for node in self.network.functions.iter().flatten() {
            let mut counters = node.counters;
            counters.add(&node.function.books());
            balance.add_function(&counters);
            functions.push(FunctionStats {
                node: node.node,
                kind: node.function.kind(),
                counters,
                detail: node.function.detail(),
            });
        }
        ports.sort_by_key(|port| port.node);
        functions.sort_by_key(|function| function.node);
        Snapshot {
            at_ns: now,
            ports,
            functions,
            worker: self.stats,
            workers: vec![self.stats],
            balance,
        }
    }

    /// Takes all nodes out and gives them back, in order of their numbers.
    pub fn take_all(&mut self) -> Vec<(NodeId, Node)> {
        let mut change = Change::new();
        for (node, _) in self.graph.nodes() {
            change = change.remove(node);
        }
        self.apply(change, 0).unwrap_or_default()
    }

    /// The ports that are asked in every breath.
    pub(crate) fn awake(&self) -> &[usize] {
        &self.awake
    }

    pub(crate) fn port_mut(&mut self, slot: usize) -> Option<&mut PortNode> {
        self.network.ports.get_mut(slot)?.as_mut()
    }

    /// Asks only `awake` of those ports from now on that were asked in every breath.
    pub(crate) fn keep_awake(&mut self, awake: impl Fn(&PortNode) -> bool) {
        let ports = &self.network.ports;
        let stays = |&slot: &usize| ports.get(slot).and_then(Option::as_ref).is_some_and(&awake);
        self.awake.retain(stays);
    }

    /// Asks a port that dozed in every breath again.
    pub(crate) fn wake(&mut self, slot: usize) {
        self.awake.push(slot);
    }

    pub(crate) fn ports_mut(&mut self) -> impl Iterator<Item = (usize, &mut PortNode)> {
        let ports = self.network.ports.iter_mut().enumerate();
        ports.filter_map(|(slot, node)| Some((slot, node.as_mut()?)))
    }

    /// Whether it has the network for itself.
    pub(crate) fn is_alone(&self) -> bool {
        self.network.passages.is_alone()
    }

    /// Whether other workers have something for it, or it has news that they have not taken yet.
    pub(crate) fn is_awaited(&self) -> bool {
        self.network.passages.is_waiting()
    }

    /// The packets that are still on their way to it when all workers have stopped.
    pub(crate) fn left_behind(&mut self) -> u64 {
        self.network.passages.left_behind()
    }

    pub(crate) fn count_sleep(&mut self) {
        self.stats.sleeps += 1;
    }
}

fn place_in<T>(list: &mut Vec<Option<T>>, slot: usize) -> &mut Option<T> {
    if list.len() <= slot {
        list.resize_with(slot + 1, || None);
    }
    &mut list[slot]
}

impl From<Rejected> for EngineError {
    fn from(rejected: Rejected) -> Self {
        rejected.error
    }
}
