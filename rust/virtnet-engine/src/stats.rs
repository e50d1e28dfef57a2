//! What everything in a network has counted, read at one breath boundary.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use virtnet_packet::{DropCounters, PortCounters};

use crate::function::FunctionDetail;
use crate::graph::{NodeId, NodeKind};

/// All counters of a network at one moment between two breaths, so that they fit each other.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The worker's time, in ns since some fixed moment.
    pub at_ns: u64,
    /// The ports, in order of their nodes' numbers.
    pub ports: Vec<PortStats>,
    /// The functions, in order of their nodes' numbers.
    pub functions: Vec<FunctionStats>,
    /// The workers together.
    pub worker: WorkerStats,
    /// Each of them.
    pub workers: Vec<WorkerStats>,
    /// Both sides of the books, over everything that is and ever was in the network.
    pub balance: NetBalance,
}

impl Snapshot {
    /// What several workers of one network have counted, each between two of its breaths. What passed from one to another meanwhile
    /// is in the balance as handed over and not taken over, or the other way round.
    pub(crate) fn of_team(snapshots: impl IntoIterator<Item = Self>) -> Self {
        let mut ports: BTreeMap<NodeId, PortStats> = BTreeMap::new();
        let mut functions: BTreeMap<NodeId, FunctionStats> = BTreeMap::new();
        let mut all = Self {
            at_ns: 0,
            ports: Vec::new(),
            functions: Vec::new(),
            worker: WorkerStats::default(),
            workers: Vec::new(),
            balance: NetBalance::default(),
        };
        for one in snapshots {
            all.at_ns = all.at_ns.max(one.at_ns);
            all.worker.add(&one.worker);
            all.workers.extend(one.workers);
            all.balance.add(&one.balance);
            for port in one.ports {
                match ports.entry(port.node) {
                    Entry::Vacant(place) => drop(place.insert(port)),
                    Entry::Occupied(mut place) => {
                        let sum = place.get_mut();
                        sum.counters.merge(&port.counters);
                        sum.drops.merge(&port.drops);
                        sum.segmented += port.segmented;
                    }
                }
            }
            for function in one.functions {
                match functions.entry(function.node) {
                    Entry::Vacant(place) => drop(place.insert(function)),
                    Entry::Occupied(mut place) => {
                        let sum = place.get_mut();
                        sum.counters.add(&function.counters);
                        sum.detail.add(&function.detail);
                    }
                }
            }
        }
        all.ports = ports.into_values().collect();
        all.functions = functions.into_values().collect();
        all
    }
}

impl WorkerStats {
    fn add(&mut self, other: &Self) {
        self.breaths += other.breaths;
        self.busy_breaths += other.busy_breaths;
        self.packets += other.packets;
        self.sleeps += other.sleeps;
        self.cpu_ns += other.cpu_ns;
        self.longest_pause_ns = self.longest_pause_ns.max(other.longest_pause_ns);
    }
}

impl FunctionCounters {
    pub(crate) fn add(&mut self, other: &Self) {
        self.generated += other.generated;
        self.consumed += other.consumed;
        self.copied += other.copied;
        self.drops.merge(&other.drops);
        self.held += other.held;
    }
}

/// What one port has counted.
#[derive(Clone, Debug)]
pub struct PortStats {
    /// Its node.
    pub node: NodeId,
    /// The port's own counters, since it was made.
    pub counters: PortCounters,
    /// Packets from it that went no further: it has no cable, or what is behind it is not to be entered again.
    pub drops: DropCounters,
    /// Frames that were made of longer ones because it takes no long ones, beyond the first of each.
    pub segmented: u64,
}

/// What one function has counted.
#[derive(Clone, Debug)]
pub struct FunctionStats {
    /// Its node.
    pub node: NodeId,
    /// What it is.
    pub kind: NodeKind,
    /// What every function counts.
    pub counters: FunctionCounters,
    /// What this kind counts.
    pub detail: FunctionDetail,
}

/// What every function counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionCounters {
    /// Packets it made.
    pub generated: u64,
    /// Packets that ended here.
    pub consumed: u64,
    /// Packets it sent beyond the first copy of each: flooding to three gates makes two.
    pub copied: u64,
    /// Packets it dropped, or that had no way on from it.
    pub drops: DropCounters,
    /// Packets that wait in it.
    pub held: u64,
}

/// What a worker has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerStats {
    /// Rounds through all ports and functions.
    pub breaths: u64,
    /// Those that moved a packet.
    pub busy_breaths: u64,
    /// Packets that entered the network: received by ports and made by functions.
    pub packets: u64,
    /// Times it has slept.
    pub sleeps: u64,
    /// CPU time its thread has used, in ns; 0 without a thread.
    pub cpu_ns: u64,
    /// The longest time from the beginning of one breath to that of the next, in ns, sleep left out; 0 without a thread.
    pub longest_pause_ns: u64,
}

/// Both sides of the books: every packet that came to be has gone somewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetBalance {
    /// Frames that ports received.
    pub received: u64,
    /// Packets that functions made.
    pub generated: u64,
    /// Copies that flooding made, and segments beyond the first of a frame.
    pub copied: u64,
    /// Frames that ports sent.
    pub sent: u64,
    /// Packets that ended in a function.
    pub consumed: u64,
    /// Packets that were dropped, wherever and for whatever reason.
    pub dropped: u64,
    /// Packets that one worker has handed to another.
    pub handed_over: u64,
    /// Those that the other one has taken.
    pub taken_over: u64,
    /// Packets that wait in a function.
    pub held: u64,
}

impl NetBalance {
    /// Packets that came to be.
    #[must_use]
    pub fn income(&self) -> u64 {
        self.received + self.generated + self.copied + self.taken_over
    }

    /// Packets that have gone.
    #[must_use]
    pub fn outgo(&self) -> u64 {
        self.sent + self.consumed + self.dropped + self.handed_over
    }

    /// Packets between two workers. Those were counted one after the other, so it may be off, also below zero, by what has passed
    /// meanwhile; at rest it is 0.
    #[must_use]
    pub fn in_transit(&self) -> i64 {
        self.handed_over.wrapping_sub(self.taken_over).cast_signed()
    }

    /// Whether not a packet is missing or too many.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.income() == self.outgo() + self.held
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.received += other.received;
        self.generated += other.generated;
        self.copied += other.copied;
        self.sent += other.sent;
        self.consumed += other.consumed;
        self.dropped += other.dropped;
        self.handed_over += other.handed_over;
        self.taken_over += other.taken_over;
        self.held += other.held;
    }

    pub(crate) fn add_port(
        &mut self,
        counters: &PortCounters,
        drops: &DropCounters,
        segmented: u64,
    ) {
        self.copied += segmented;
        self.received += counters.received;
        self.sent += counters.sent;
        self.dropped += counters.rx_drops.total() + counters.tx_drops.total() + drops.total();
    }

    pub(crate) fn add_function(&mut self, counters: &FunctionCounters) {
        self.generated += counters.generated;
        self.consumed += counters.consumed;
        self.copied += counters.copied;
        self.dropped += counters.drops.total();
        self.held += counters.held;
    }
}
