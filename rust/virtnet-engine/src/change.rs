//! What is to become different in a running network: nodes, cables, and orders to functions.
//!
//! A [`Change`] is a list of wishes that becomes true whole or not at all, at one breath boundary. Removals come first,
//! then additions, so that one change can replace a node by another of the same number.

use crate::function::{Function, Update};
use crate::graph::{Cable, NodeId, NodeKind, Place};
use virtnet_packet::Port;

/// A node to be added, with all its state; what a removed node is given back as.
#[derive(Debug)]
pub enum Node {
    /// A place where packets enter and leave the network.
    Port(Box<dyn Port>),
    /// The same in parts that different workers can own, each with queues of its own: at most as many as there are workers. It is
    /// given back as so many ports.
    Lanes(Vec<Box<dyn Port>>),
    /// Something that decides what happens to packets.
    Function(Function),
}

impl Node {
    /// What it is.
    #[must_use]
    pub fn kind(&self) -> NodeKind {
        match self {
            Self::Port(_) | Self::Lanes(_) => NodeKind::Port,
            Self::Function(function) => function.kind(),
        }
    }

    /// From how many places it takes copies: most nodes from none.
    pub(crate) fn places(&self) -> u16 {
        match self {
            Self::Port(port) => port.places(),
            Self::Lanes(lanes) => lanes.first().map_or(0, |lane| lane.places()),
            Self::Function(_) => 0,
        }
    }
}

impl<P: Port + 'static> From<P> for Node {
    fn from(port: P) -> Self {
        Self::Port(Box::new(port))
    }
}

/// A change to a network, put together step by step.
#[derive(Debug, Default)]
pub struct Change {
    pub(crate) removed: Vec<NodeId>,
    pub(crate) disconnected: Vec<Place>,
    pub(crate) added: Vec<(NodeId, Node)>,
    pub(crate) connected: Vec<Cable>,
    pub(crate) updates: Vec<(NodeId, Update)>,
}

impl Change {
    /// A change that changes nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes a node and its cables.
    #[must_use]
    pub fn remove(mut self, node: NodeId) -> Self {
        self.removed.push(node);
        self
    }

    /// Takes out the cable in `place`.
    #[must_use]
    pub fn disconnect(mut self, place: impl Into<Place>) -> Self {
        self.disconnected.push(place.into());
        self
    }

    /// Adds a node.
    #[must_use]
    pub fn add(mut self, node: NodeId, what: impl Into<Node>) -> Self {
        self.added.push((node, what.into()));
        self
    }

    /// Cables two gates. A bare [`NodeId`] is its gate 0.
    #[must_use]
    pub fn connect(mut self, a: impl Into<Place>, b: impl Into<Place>) -> Self {
        let (a, b) = (a.into(), b.into());
        self.connected.push(Cable { a, b });
        self
    }

    /// Gives a function new orders. It keeps its state and counters.
    #[must_use]
    pub fn update(mut self, node: NodeId, update: impl Into<Update>) -> Self {
        self.updates.push((node, update.into()));
        self
    }

    /// The nodes that were to be added, given back.
    #[must_use]
    pub fn into_added(self) -> Vec<(NodeId, Node)> {
        self.added
    }
}
