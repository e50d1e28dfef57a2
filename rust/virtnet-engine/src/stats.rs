//! What everything in a network has counted, read at one breath boundary.

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
    /// The worker.
    pub worker: WorkerStats,
    /// Both sides of the books, over everything that is and ever was in the network.
    pub balance: NetBalance,
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
}

/// Both sides of the books: every packet that came to be has gone somewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetBalance {
    /// Frames that ports received.
    pub received: u64,
    /// Packets that functions made.
    pub generated: u64,
    /// Copies that flooding made.
    pub copied: u64,
    /// Frames that ports sent.
    pub sent: u64,
    /// Packets that ended in a function.
    pub consumed: u64,
    /// Packets that were dropped, wherever and for whatever reason.
    pub dropped: u64,
}

impl NetBalance {
    /// Packets that came to be.
    #[must_use]
    pub fn income(&self) -> u64 {
        self.received + self.generated + self.copied
    }

    /// Packets that have gone.
    #[must_use]
    pub fn outgo(&self) -> u64 {
        self.sent + self.consumed + self.dropped
    }

    /// Whether not a packet is missing or too many.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.income() == self.outgo()
    }

    pub(crate) fn add_port(&mut self, counters: &PortCounters, drops: &DropCounters) {
        self.received += counters.received;
        self.sent += counters.sent;
        self.dropped += counters.rx_drops.total() + counters.tx_drops.total() + drops.total();
    }

    pub(crate) fn add_function(&mut self, counters: &FunctionCounters) {
        self.generated += counters.generated;
        self.consumed += counters.consumed;
        self.copied += counters.copied;
        self.dropped += counters.drops.total();
    }
}
