//! What can be asked of an engine that it cannot do.

use std::io;
use std::time::Duration;

use virtnet_packet::BURST_MAX;
use virtnet_sys::Fault;

use crate::graph::{Gate, NodeId, NodeKind, Place};

/// Why the engine, or a change to its network, was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A change names a node that is not there.
    #[error("there is no {node} in this network")]
    UnknownNode {
        /// The node that was named.
        node: NodeId,
    },
    /// A change adds a node under a name that is taken.
    #[error("{node} is there already (a {kind}); remove it first or choose another number")]
    NodeExists {
        /// The node that was to be added.
        node: NodeId,
        /// What is there.
        kind: NodeKind,
    },
    /// A cable ends at a gate that the node does not have.
    #[error("{place} does not exist: a {kind} has {gates} gate(s), numbered from 0")]
    NoSuchGate {
        /// Where the cable was to end.
        place: Place,
        /// What kind of node it is.
        kind: NodeKind,
        /// How many gates it has.
        gates: u16,
    },
    /// A gate takes one cable.
    #[error("{place} is cabled to {other} already; disconnect that first")]
    GateTaken {
        /// Where the cable was to end.
        place: Place,
        /// The far end of the cable that is there.
        other: Place,
    },
    /// Both ends of a cable in one gate.
    #[error("{place} cannot be cabled to itself")]
    SelfCable {
        /// The gate.
        place: Place,
    },
    /// A cable that is to be taken out is not there.
    #[error("{place} is not cabled, there is nothing to disconnect")]
    NotCabled {
        /// The gate.
        place: Place,
    },
    /// An update is meant for another kind of node.
    #[error("{node} is a {found}, the update is for a {expected}")]
    WrongKind {
        /// The node that was named.
        node: NodeId,
        /// What the update is for.
        expected: NodeKind,
        /// What the node is.
        found: NodeKind,
    },
    /// A frame size that cannot be.
    #[error("a frame of {size} bytes cannot be generated: {min} to {max} are possible")]
    FrameSize {
        /// The size asked for, in bytes.
        size: usize,
        /// The smallest.
        min: usize,
        /// The largest.
        max: usize,
    },
    /// A source of no packets, or of more than it can hold.
    #[error("a source makes copies of 1 to {BURST_MAX} packets in turn, {count} were given")]
    FrameCount {
        /// How many were given.
        count: usize,
    },
    /// A stream that cannot be made.
    #[error("stream {id} cannot be generated: {wrong}")]
    Stream {
        /// The stream's number.
        id: u16,
        /// What is wrong.
        wrong: &'static str,
    },
    /// A rate of nothing.
    #[error("a rate of 0 packets/s generates nothing; leave the rate out for as fast as possible")]
    ZeroRate,
    /// Faults that no cable can have.
    #[error("a cable cannot be impaired like this: {wrong}")]
    Impairment {
        /// What is wrong, and what would be right.
        wrong: &'static str,
    },
    /// A switch that could remember nobody, or forgets at once.
    #[error("a switch needs room for 1 to {max} MAC addresses and an ageing time above 0")]
    SwitchOptions {
        /// The largest table there can be.
        max: usize,
    },
    /// Numbers of VLANs that are none.
    #[error(
        "gate {gate}: VLANs are 1 to 4094, and that of frames without a tag (0 for none) is one of them"
    )]
    Vlan {
        /// The switch's gate.
        gate: Gate,
    },
    /// A mirror of a cable that leads nowhere.
    #[error("gate {gate} cannot be mirrored to gate {to}: that has to be another one with a cable")]
    Mirror {
        /// The switch's gate.
        gate: Gate,
        /// Where the copies were to go.
        to: Gate,
    },
    /// A router that cannot be.
    #[error("{what}")]
    Router {
        /// Which of its interfaces or routes, and why not.
        what: String,
    },
    /// The worker thread could not be set up.
    #[error("cannot start worker {name:?}: {source}")]
    Start {
        /// The engine's name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The worker's thread panicked: a defect of this library. Its ports are closed.
    #[error("worker {name:?} has failed and its ports are closed; please report this: {message}")]
    Failed {
        /// The engine's name.
        name: String,
        /// The panic's message.
        message: String,
    },
    /// The worker does not answer.
    #[error("worker {name:?} has not answered for {} ms: it hangs in a port or gets no CPU", waited.as_millis())]
    Unresponsive {
        /// The engine's name.
        name: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The engine was stopped.
    #[error("engine {name:?} is stopped")]
    Stopped {
        /// The engine's name.
        name: String,
    },
}

impl EngineError {
    /// Whose fault the error is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Start { .. } | Self::Failed { .. } | Self::Unresponsive { .. } => Fault::Host,
            _ => Fault::Caller,
        }
    }
}
