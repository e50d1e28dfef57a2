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

use std::collections::VecDeque;
use std::sync::Arc;

use virtnet_packet::{Burst, Picks};

use crate::change::{Change, Node};
use crate::dispatch::{Network, PortNode};
use crate::function::{Function, Generator, Impairment, Outbox};
use crate::graph::{Graph, NodeId, NodeKind, Slot, Target};
use crate::passage::{Bell, PARCELS_A_BREATH, connect};
use crate::plan::{Plan, Resident, Share};
use crate::stats::{FunctionStats, NetBalance, PortStats, Snapshot, WorkerStats};
use crate::{EngineError, Rejected};

/// How often a firewall that nothing comes to is swept.
const FIREWALL_SWEEP_NS: u64 = 1_000_000_000;
/// How many bursts an impaired cable gives out in a breath, either way.
const RELEASES: usize = 4;

/// How many ports that have come are asked for the first time in a breath: they are in nobody's cache yet.
const NEWCOMERS: usize = 16;

/// All of a network's nodes, and what moves packets between them, one breath at a time.
#[derive(Debug, Default)]
pub struct Worker {
    network: Network,
    /// The ports that are asked in every breath; the others doze until something wakes them.
    awake: Vec<usize>,
    /// Ports that have come and were not asked yet.
    newcomers: VecDeque<usize>,
    /// How many ports there are.
    ports: usize,
    /// The functions that may have something to do where no packet arrives.
    makers: Vec<usize>,
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
        let mut share = plan.spread(1, now).pop().unwrap_or_default();
        self.adopt(&mut share, now);
        Ok(self.settle(share))
    }

    /// Makes a planned change true, which must be one of the network as it is. Pointers change hands and nothing is freed: what
    /// was there before is in `share` afterwards.
    pub(crate) fn adopt(&mut self, share: &mut Share, now: u64) {
        self.network.passages.changes += 1;
        for removed in &mut share.removed {
            removed.what = self.network.take_out(removed.slot);
            removed.is_home = self.network.passages.is_home(removed.slot);
            let is_port = matches!(removed.what, Some(Resident::Port(_)));
            self.ports -= usize::from(is_port);
        }
        if !share.removed.is_empty() {
            let Network {
                ports, functions, ..
            } = &self.network;
            self.awake.retain(|&slot| ports[slot].is_some());
            self.newcomers.retain(|&slot| ports[slot].is_some());
            self.makers.retain(|&slot| functions[slot].is_some());
            // Nobody else is to keep the memory of a guest that is gone.
            self.burst.clear();
            self.burst.forget_memory();
        }
        for (slot, what) in share.added.drain(..) {
            match (slot, &what) {
                (Slot::Port(slot), Resident::Port(_)) => {
                    self.newcomers.push_back(slot);
                    self.ports += 1;
                }
                (Slot::Function(slot), Resident::Function(node)) => {
                    if node.function.may_make() {
                        self.makers.push(slot);
                    }
                }
                _ => debug_assert!(false, "a node was planned for the wrong list"),
            }
            self.network.put_in(slot, what);
        }
        std::mem::swap(&mut self.network.routes, &mut share.routes);
        std::mem::swap(&mut self.graph, &mut share.graph);
        for (slot, gates) in &share.recabled {
            if let Some(Some(node)) = self.network.functions.get_mut(*slot) {
                node.function.recabled(gates, now);
            }
        }
        for (slot, update) in share.updates.drain(..) {
            if let Some(Some(node)) = self.network.functions.get_mut(slot) {
                node.function.update(update, now, &mut share.leftovers);
            }
        }
        self.network.find_held(&share.may_be_held);
    }

    /// Closes the books of what a change has removed, and gives it back.
    pub(crate) fn settle(&mut self, share: Share) -> Vec<(NodeId, Node)> {
        share.settle(&mut self.retired)
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
        if !self.newcomers.is_empty() {
            let n = self.newcomers.len().min(NEWCOMERS);
            self.awake.extend(self.newcomers.drain(..n));
        }
        for at in 0..self.awake.len() {
            moved += self.breathe_in(self.awake[at], now);
        }
        for at in 0..self.makers.len() {
            moved += self.let_make(self.makers[at], now);
        }
        while let Some(slot) = self.network.sent_to.pop() {
            if let Some(Some(node)) = self.network.ports.get_mut(slot) {
                node.sent_to = false;
                node.port.flush();
            }
        }
        if !self.network.passages.is_alone() {
            self.network.tell_news(&self.makers);
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
        if node.is_held() || node.patience.waits(now) {
            return 0;
        }
        let n = node.port.rx(&mut self.burst);
        node.patience.found(n, now);
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
                self.let_outbox_leave(slot, now)
            }
            Function::Switch(switch) => {
                switch.sweep(now);
                0
            }
            Function::Firewall(_) => {
                self.let_firewall_answer(slot, now) + self.let_outbox_leave(slot, now)
            }
            Function::Generator(_) => self.let_generator_make(slot, now),
            Function::Wire(_)
            | Function::Tee(_)
            | Function::Divert(_)
            | Function::Element(_)
            | Function::Sink(_)
            | Function::Echo(_)
            | Function::Analyser(_) => 0,
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

    /// Streams with a rate are sent; the others are offered: to a port together, to a function one by one, since what is refused
    /// on the way may be any of them.
    fn let_generator_make(&mut self, slot: usize, now: u64) -> usize {
        let target = self.network.first_target(slot);
        if target == Target::Nothing {
            return 0;
        }
        let mut made = 0;
        for paced in [true, false] {
            let Some((mut burst, picks)) = self
                .generator(slot)
                .and_then(|generator| generator.offer(paced, now))
            else {
                continue;
            };
            let network = &mut self.network;
            let sent = match target {
                _ if paced => {
                    network.send_lasting(slot, &mut burst, &picks, now);
                    picks.len()
                }
                Target::Port(_) => network.offer_made(slot, &mut burst, &picks, now),
                Target::Function(..) | Target::Copies(..) | Target::Nothing => {
                    let mut one_by_one = picks.iter().take_while(|&i| {
                        let mut one = Picks::default();
                        one.push(i);
                        network.offer_made(slot, &mut burst, &one, now) == 1
                    });
                    one_by_one.by_ref().count()
                }
            };
            if let Some(generator) = self.generator(slot) {
                generator.sent(burst, picks.len(), sent, now);
            }
            made += sent;
        }
        made
    }

    fn generator(&mut self, slot: usize) -> Option<&mut Generator> {
        match &mut self.network.functions[slot].as_mut()?.function {
            Function::Generator(generator) => Some(generator),
            _ => None,
        }
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

    /// What a router or firewall has made leaves by the gates it is for, and what finds no room is dropped there: it does not wait.
    fn let_outbox_leave(&mut self, slot: usize, now: u64) -> usize {
        let mut n = 0;
        while let Some(mut made) = self.outbox(slot).and_then(Outbox::take) {
            for run in made.runs() {
                let (gate, picks) = run;
                n += picks.len();
                self.network
                    .send_made(slot, gate, &mut made.burst, &picks, now);
            }
            if let Some(outbox) = self.outbox(slot) {
                outbox.give_back(made);
            }
        }
        if let Some(lost) = self.outbox(slot).and_then(Outbox::take_lost)
            && let Some(Some(node)) = self.network.functions.get_mut(slot)
        {
            node.counters.generated += lost.total();
            node.counters.drops.merge(&lost);
        }
        n
    }

    fn outbox(&mut self, slot: usize) -> Option<&mut Outbox> {
        match &mut self.network.functions[slot].as_mut()?.function {
            Function::Router(router) => Some(router.outbox()),
            Function::Firewall(firewall) => Some(firewall.outbox()),
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
        let makers = self.makers.iter();
        makers
            .filter_map(|&slot| {
                let function = &self.network.functions[slot].as_ref()?.function;
                let makes = matches!(
                    function.kind(),
                    NodeKind::Source | NodeKind::Host | NodeKind::Generator
                );
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
        self.network.ports.get_mut(slot)?.as_deref_mut()
    }

    /// How many ports are asked only when something has woken them.
    pub(crate) fn dozing(&self) -> usize {
        self.ports - self.awake.len() - self.newcomers.len()
    }

    /// Does not ask the port number `at` of those that are awake any more; another one has its number then.
    pub(crate) fn let_doze(&mut self, at: usize) {
        self.awake.swap_remove(at);
    }

    /// Asks a port that dozed in every breath again.
    pub(crate) fn wake(&mut self, slot: usize) {
        self.awake.push(slot);
    }

    pub(crate) fn ports_mut(&mut self) -> impl Iterator<Item = (usize, &mut PortNode)> {
        let ports = self.network.ports.iter_mut().enumerate();
        ports.filter_map(|(slot, node)| Some((slot, node.as_deref_mut()?)))
    }

    /// Whether it has the network for itself.
    pub(crate) fn is_alone(&self) -> bool {
        self.network.passages.is_alone()
    }

    /// Whether there are ports that it has not asked yet, other workers have something for it, or it has news that they have not
    /// taken yet.
    pub(crate) fn is_awaited(&self) -> bool {
        !self.newcomers.is_empty() || self.network.passages.is_waiting()
    }

    /// The packets that are still on their way to it when all workers have stopped.
    pub(crate) fn left_behind(&mut self) -> u64 {
        self.network.passages.left_behind()
    }

    /// Takes note of how long ago the breath before began.
    #[inline]
    pub(crate) fn count_pause(&mut self, ns: u64) {
        self.stats.longest_pause_ns = self.stats.longest_pause_ns.max(ns);
    }

    pub(crate) fn count_sleep(&mut self) {
        self.stats.sleeps += 1;
    }
}

impl From<Rejected> for EngineError {
    fn from(rejected: Rejected) -> Self {
        rejected.error
    }
}
