//! Who is cabled to whom: nodes, gates and cables as an immutable value.
//!
//! A [`Graph`] describes a network; a change makes a new one beside it ([`Graph::changed`]) or an error that names the
//! place, and the old one stays as it was. What a worker follows are [`Routes`]: the same cables, written down from each
//! gate's point of view, with positions in the worker's lists in place of names.
//!
//! Nothing here moves a packet, and nothing here is shared: a worker gets its routes whole, at a breath boundary.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use virtnet_packet::{Direction, Origin};

use crate::{Change, EngineError};

/// A node of one engine's network. The caller chooses the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// The place on a node where a cable ends, counted from 0.
pub type Gate = u16;

/// A gate of a node: one end of a cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The node.
    pub node: NodeId,
    /// Its gate.
    pub gate: Gate,
}

impl Place {
    /// Gate `gate` of node number `node`.
    #[must_use]
    pub fn new(node: NodeId, gate: Gate) -> Self {
        Self { node, gate }
    }
}

impl From<NodeId> for Place {
    /// The first gate, for nodes that have only that.
    fn from(node: NodeId) -> Self {
        Self { node, gate: 0 }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} gate {}", self.node, self.gate)
    }
}

/// A duplex cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cable {
    /// One end.
    pub a: Place,
    /// The other end.
    pub b: Place,
}

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NodeKind {
    /// A place where packets enter and leave the network.
    Port,
    /// Passes packets between its two gates.
    Wire,
    /// Does that, and copies some to a third gate.
    Tee,
    /// A wire that leads some packets by a program.
    Divert,
    /// Decides by a program.
    Element,
    /// A learning switch.
    Switch,
    /// Takes packets and counts them.
    Sink,
    /// Makes packets.
    Source,
    /// Sends packets back where they came from.
    Echo,
    /// A small network stack with an address.
    Host,
    /// Rules, and what belongs to what they have let begin.
    Firewall,
    /// A cable with faults.
    Impairment,
    /// Sends IP packets from link to link.
    Router,
    /// Makes streams of packets that say who they are; what comes passes between its two gates.
    Generator,
    /// Takes these and counts what became of them.
    Analyser,
}

impl NodeKind {
    /// Its name, in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Port => "port",
            Self::Wire => "wire",
            Self::Tee => "tee",
            Self::Divert => "divert",
            Self::Element => "element",
            Self::Switch => "switch",
            Self::Sink => "sink",
            Self::Source => "source",
            Self::Echo => "echo",
            Self::Host => "host",
            Self::Firewall => "firewall",
            Self::Impairment => "impairment",
            Self::Router => "router",
            Self::Generator => "generator",
            Self::Analyser => "analyser",
        }
    }

    /// How many gates it has.
    #[must_use]
    pub fn gates(self) -> u16 {
        match self {
            Self::Port | Self::Source | Self::Host => 1,
            Self::Wire | Self::Firewall | Self::Impairment | Self::Generator => 2,
            Self::Tee => 3,
            Self::Divert => 4,
            Self::Element
            | Self::Switch
            | Self::Sink
            | Self::Echo
            | Self::Router
            | Self::Analyser => Self::MANY_GATES,
        }
    }

    /// Gates of a node that has as many as anyone wants.
    const MANY_GATES: u16 = 4096;
}

impl fmt::Display for NodeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is there and how it is cabled.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: BTreeMap<NodeId, Entry>,
    /// Each cable twice, once from each end.
    cables: BTreeMap<Place, Place>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    kind: NodeKind,
    /// From how many places it takes copies, by gates of their own.
    places: u16,
    /// Its position in the worker's list of ports or of functions.
    slot: usize,
}

impl Graph {
    /// The nodes in order of their numbers.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, NodeKind)> + '_ {
        self.nodes.iter().map(|(&id, entry)| (id, entry.kind))
    }

    /// The cables, each once.
    pub fn cables(&self) -> impl Iterator<Item = Cable> + '_ {
        self.cables
            .iter()
            .filter(|(a, b)| a < b)
            .map(|(&a, &b)| Cable { a, b })
    }

    /// What is at the other end of the cable in `place`.
    #[must_use]
    pub fn peer(&self, place: Place) -> Option<Place> {
        self.cables.get(&place).copied()
    }

    /// The lowest gate of `node` without a cable.
    #[must_use]
    pub fn free_gate(&self, node: NodeId) -> Option<Gate> {
        let gates = self.nodes.get(&node)?.gates();
        (0..gates).find(|&gate| !self.cables.contains_key(&Place { node, gate }))
    }

    /// The graph after `change`: removals first, then additions; cables of a removed node go with it.
    ///
    /// # Errors
    /// What the change asks for is not possible; the error names the place. The caller's fault.
    pub fn changed(&self, change: &Change) -> Result<Self, EngineError> {
        let mut next = self.clone();
        for &node in &change.removed {
            next.remove(node)?;
        }
        for &place in &change.disconnected {
            next.disconnect(place)?;
        }
        for (node, what) in &change.added {
            next.add(*node, what.kind(), what.places())?;
        }
        for &cable in &change.connected {
            next.connect(cable)?;
        }
        for (node, update) in &change.updates {
            let found = next.entry(*node)?.kind;
            let expected = update.kind();
            if found != expected {
                return Err(EngineError::WrongKind {
                    node: *node,
                    expected,
                    found,
                });
            }
            update.check()?;
        }
        Ok(next)
    }

    fn entry(&self, node: NodeId) -> Result<Entry, EngineError> {
        self.nodes
            .get(&node)
            .copied()
            .ok_or(EngineError::UnknownNode { node })
    }

    fn add(&mut self, node: NodeId, kind: NodeKind, places: u16) -> Result<(), EngineError> {
        if let Some(there) = self.nodes.get(&node) {
            let kind = there.kind;
            return Err(EngineError::NodeExists { node, kind });
        }
        let slot = self.free_slot(kind == NodeKind::Port);
        self.nodes.insert(node, Entry { kind, places, slot });
        Ok(())
    }

    fn free_slot(&self, port: bool) -> usize {
        let mut taken: Vec<usize> = self
            .nodes
            .values()
            .filter(|entry| (entry.kind == NodeKind::Port) == port)
            .map(|entry| entry.slot)
            .collect();
        taken.sort_unstable();
        (0..).zip(&taken).take_while(|(i, slot)| i == *slot).count()
    }

    fn remove(&mut self, node: NodeId) -> Result<(), EngineError> {
        self.entry(node)?;
        self.nodes.remove(&node);
        self.cables.retain(|a, b| a.node != node && b.node != node);
        Ok(())
    }

    fn connect(&mut self, Cable { a, b }: Cable) -> Result<(), EngineError> {
        if a == b {
            return Err(EngineError::SelfCable { place: a });
        }
        for place in [a, b] {
            let entry = self.entry(place.node)?;
            let (kind, gates) = (entry.kind, entry.gates());
            if place.gate >= gates {
                return Err(EngineError::NoSuchGate { place, kind, gates });
            }
            if let Some(&other) = self.cables.get(&place) {
                return Err(EngineError::GateTaken { place, other });
            }
        }
        self.cables.insert(a, b);
        self.cables.insert(b, a);
        Ok(())
    }

    fn disconnect(&mut self, place: Place) -> Result<(), EngineError> {
        self.entry(place.node)?;
        let Some(other) = self.cables.remove(&place) else {
            return Err(EngineError::NotCabled { place });
        };
        self.cables.remove(&other);
        Ok(())
    }

    /// Where a node sits in the worker's lists.
    pub(crate) fn slot(&self, node: NodeId) -> Option<Slot> {
        let Entry { kind, slot, .. } = *self.nodes.get(&node)?;
        Some(match kind {
            NodeKind::Port => Slot::Port(slot),
            _ => Slot::Function(slot),
        })
    }

    /// Gates of functions in both graphs, by slot and in order, whose cable led elsewhere before `next`, or to one of the nodes
    /// `removed` (which may be back as other ones of the same number).
    pub(crate) fn recabled(&self, next: &Self, removed: &[NodeId]) -> Vec<(usize, Vec<Gate>)> {
        let removed: BTreeSet<_> = removed.iter().collect();
        let stays = |node| !removed.contains(&node);
        let led_elsewhere = |&(place, peer): &(&Place, &Place)| {
            stays(place.node) && !(stays(peer.node) && next.peer(*place) == Some(*peer))
        };
        let mut recabled: Vec<(usize, Vec<Gate>)> = Vec::new();
        for (place, _) in self.cables.iter().filter(led_elsewhere) {
            let Some(Slot::Function(slot)) = self.slot(place.node) else {
                continue;
            };
            match recabled.last_mut() {
                Some((last, gates)) if *last == slot => gates.push(place.gate),
                _ => recabled.push((slot, vec![place.gate])),
            }
        }
        recabled
    }

    /// The ports, by slot, that may have to wait for a function in `next`, or may have had to before: only a divert has them wait.
    pub(crate) fn may_be_held(&self, next: &Self) -> Vec<usize> {
        let diverts = [self, next].map(|graph| {
            let gates = graph.cables.iter();
            gates.filter(|(place, _)| graph.nodes[&place.node].kind == NodeKind::Divert)
        });
        let ports = diverts.into_iter().flatten();
        ports
            .filter_map(|(_, peer)| match next.slot(peer.node)? {
                Slot::Port(slot) => Some(slot),
                Slot::Function(_) => None,
            })
            .collect()
    }

    /// The same network as a worker follows it.
    pub(crate) fn routes(&self) -> Routes {
        let mut routes = Routes::default();
        for (&node, entry) in &self.nodes {
            match entry.kind {
                NodeKind::Port => {
                    grow_to(&mut routes.port_nodes, entry.slot);
                    routes.port_nodes[entry.slot] = Some(node);
                    grow_to(&mut routes.ports, entry.slot);
                    routes.ports[entry.slot] = self.target(Place { node, gate: 0 });
                }
                _ => {
                    grow_to(&mut routes.function_nodes, entry.slot);
                    routes.function_nodes[entry.slot] = Some(node);
                    grow_to(&mut routes.functions, entry.slot);
                    routes.functions[entry.slot] = self.gates_of(node);
                }
            }
        }
        routes
    }

    fn gates_of(&self, node: NodeId) -> Gates {
        let ends = Place { node, gate: 0 }..=Place {
            node,
            gate: Gate::MAX,
        };
        let mut gates = Gates::default();
        for place in self.cables.range(ends).map(|(&place, _)| place) {
            let target = self.target(place);
            grow_to(&mut gates.by_number, usize::from(place.gate));
            gates.by_number[usize::from(place.gate)] = target;
            gates.cabled.push((place.gate, target));
        }
        gates
    }

    fn target(&self, from: Place) -> Target {
        let Some(&Place { node, gate }) = self.cables.get(&from) else {
            return Target::Nothing;
        };
        let takes_copies = self.nodes.get(&node).is_some_and(|entry| entry.places > 0);
        match self.slot(node) {
            Some(Slot::Port(slot)) if takes_copies => Target::Copies(
                slot,
                Origin {
                    place: gate,
                    direction: Direction::Unknown,
                },
            ),
            Some(Slot::Port(slot)) => Target::Port(slot),
            Some(Slot::Function(slot)) => Target::Function(slot, gate),
            None => Target::Nothing,
        }
    }
}

impl Entry {
    /// How many gates the node has.
    fn gates(&self) -> u16 {
        self.kind.gates().max(self.places)
    }
}

fn grow_to<T: Default + Clone>(list: &mut Vec<T>, last: usize) {
    if list.len() <= last {
        list.resize(last + 1, T::default());
    }
}

/// A node's position in the worker's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    Port(usize),
    Function(usize),
}

impl Slot {
    /// Which of `workers` has what is in this slot, or has the first part of it.
    pub(crate) fn home(self, workers: usize) -> usize {
        let (Self::Port(slot) | Self::Function(slot)) = self;
        slot % workers.max(1)
    }
}

impl Target {
    /// The slot it leads to.
    pub(crate) fn slot(self) -> Option<Slot> {
        match self {
            Self::Nothing => None,
            Self::Port(slot) | Self::Copies(slot, _) => Some(Slot::Port(slot)),
            Self::Function(slot, _) => Some(Slot::Function(slot)),
        }
    }

    /// The same for copies of packets that were going some way.
    pub(crate) fn going(self, direction: Direction) -> Self {
        match self {
            Self::Copies(slot, from) => Self::Copies(slot, Origin { direction, ..from }),
            other => other,
        }
    }
}

/// What is at the far end of a cable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Target {
    /// There is no cable.
    #[default]
    Nothing,
    /// A port, by slot.
    Port(usize),
    /// A function, by slot, and the gate that is entered by.
    Function(usize, Gate),
    /// A port that takes copies, by slot, and where they come from.
    Copies(usize, Origin),
}

/// The cables of one function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gates {
    by_number: Vec<Target>,
    cabled: Vec<(Gate, Target)>,
}

impl Gates {
    /// Where a packet goes that leaves by `gate`.
    #[inline]
    pub(crate) fn target(&self, gate: Gate) -> Target {
        self.by_number
            .get(usize::from(gate))
            .copied()
            .unwrap_or_default()
    }

    /// All gates that have a cable, in order.
    #[inline]
    pub(crate) fn cabled(&self) -> &[(Gate, Target)] {
        &self.cabled
    }
}

/// Where packets go, by slot: what a worker follows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Routes {
    pub(crate) ports: Vec<Target>,
    pub(crate) functions: Vec<Gates>,
    /// Which node is in each slot.
    pub(crate) port_nodes: Vec<Option<NodeId>>,
    pub(crate) function_nodes: Vec<Option<NodeId>>,
}

impl Routes {
    /// The node that is at the end of a cable.
    pub(crate) fn node(&self, target: Target) -> Option<NodeId> {
        let node = match target {
            Target::Nothing => None,
            Target::Port(slot) | Target::Copies(slot, _) => self.port_nodes.get(slot),
            Target::Function(slot, _) => self.function_nodes.get(slot),
        };
        node.copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use virtnet_packet::memory_pair;

    use super::*;
    use crate::{Node, Wire};

    const P0: NodeId = NodeId(0);
    const P1: NodeId = NodeId(1);
    const WIRE: NodeId = NodeId(2);

    fn port() -> Node {
        memory_pair(1).0.into()
    }

    fn wire_between_ports() -> Change {
        Change::new()
            .add(P0, port())
            .add(P1, port())
            .add(WIRE, Wire::new())
            .connect(P0, Place::new(WIRE, 0))
            .connect(Place::new(WIRE, 1), P1)
    }

    fn refusal(graph: &Graph, change: &Change) -> String {
        graph.changed(change).unwrap_err().to_string()
    }

    #[test]
    fn routes_follow_the_cables_from_both_ends() {
        let graph = Graph::default().changed(&wire_between_ports()).unwrap();
        let routes = graph.routes();
        assert_eq!(
            routes.ports,
            [Target::Function(0, 0), Target::Function(0, 1)]
        );
        let wire = &routes.functions[0];
        assert_eq!(wire.target(0), Target::Port(0));
        assert_eq!(wire.target(1), Target::Port(1));
        assert_eq!(wire.target(2), Target::Nothing);
        assert_eq!(graph.cables().count(), 2);
    }

    #[test]
    fn a_removed_node_takes_its_cables_with_it_and_frees_its_slot() {
        let graph = Graph::default().changed(&wire_between_ports()).unwrap();
        let graph = graph.changed(&Change::new().remove(P0)).unwrap();
        assert_eq!(graph.peer(Place::new(WIRE, 0)), None);
        assert_eq!(graph.routes().ports[0], Target::Nothing);
        let p3 = NodeId(3);
        let graph = graph.changed(&Change::new().add(p3, port())).unwrap();
        assert_eq!(graph.slot(p3), Some(Slot::Port(0)));
    }

    #[test]
    fn a_node_can_be_replaced_in_one_change() {
        let graph = Graph::default().changed(&wire_between_ports()).unwrap();
        let change = Change::new()
            .remove(P1)
            .add(P1, port())
            .connect(P1, Place::new(WIRE, 1));
        let graph = graph.changed(&change).unwrap();
        assert_eq!(graph.peer(P1.into()), Some(Place::new(WIRE, 1)));
    }

    #[test]
    fn what_is_impossible_is_refused_by_place() {
        let graph = Graph::default().changed(&wire_between_ports()).unwrap();
        let cases = [
            (
                Change::new().remove(NodeId(9)),
                "there is no node 9 in this network",
            ),
            (
                Change::new().connect(NodeId(9), P0),
                "there is no node 9 in this network",
            ),
            (
                Change::new().add(WIRE, port()),
                "node 2 is there already (a wire); remove it first or choose another number",
            ),
            (
                Change::new()
                    .add(NodeId(3), port())
                    .connect(Place::new(NodeId(3), 1), Place::new(WIRE, 1)),
                "node 3 gate 1 does not exist: a port has 1 gate(s), numbered from 0",
            ),
            (
                Change::new()
                    .add(NodeId(3), port())
                    .connect(NodeId(3), Place::new(WIRE, 2)),
                "node 2 gate 2 does not exist: a wire has 2 gate(s), numbered from 0",
            ),
            (
                Change::new()
                    .add(NodeId(3), port())
                    .connect(NodeId(3), Place::new(WIRE, 1)),
                "node 2 gate 1 is cabled to node 1 gate 0 already; disconnect that first",
            ),
            (
                Change::new()
                    .add(NodeId(3), port())
                    .connect(NodeId(3), NodeId(3)),
                "node 3 gate 0 cannot be cabled to itself",
            ),
            (
                Change::new().add(NodeId(3), port()).disconnect(NodeId(3)),
                "there is no node 3 in this network",
            ),
        ];
        for (change, text) in cases {
            assert_eq!(refusal(&graph, &change), text);
        }
        let bare = Graph::default()
            .changed(&Change::new().add(P0, port()))
            .unwrap();
        assert_eq!(
            refusal(&bare, &Change::new().disconnect(P0)),
            "node 0 gate 0 is not cabled, there is nothing to disconnect"
        );
    }

    #[test]
    fn the_lowest_free_gate_is_found() {
        let graph = Graph::default().changed(&wire_between_ports()).unwrap();
        assert_eq!(graph.free_gate(WIRE), None);
        let graph = graph.changed(&Change::new().disconnect(P0)).unwrap();
        assert_eq!(graph.free_gate(WIRE), Some(0));
        assert_eq!(graph.free_gate(NodeId(9)), None);
    }
}
