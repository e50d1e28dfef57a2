//! A change on its way: worked out beside the running network, made true by its workers, and tidied up beside them again.
//!
//! What a worker does of it is to take pointers: nodes come ready in boxes of their own, routes whole, and whatever that replaces
//! leaves the worker with the same [`Share`]. To make and to free things is for whoever asked for the change, however many there are
//! of them: a worker that frees a million routes loses packets of ports that have nothing to do with them.

use std::any::Any;
use std::fmt;

use crate::Rejected;
use crate::change::{Change, Node};
use crate::dispatch::{FunctionNode, PortNode};
use crate::function::Update;
use crate::graph::{Gate, Graph, NodeId, Routes, Slot};
use crate::patience::Patience;
use crate::stats::{FunctionCounters, NetBalance};

/// A change that was found possible.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    graph: Graph,
    routes: Routes,
    removed: Vec<(NodeId, Slot)>,
    added: Vec<(NodeId, Slot, Node)>,
    recabled: Vec<(usize, Vec<Gate>)>,
    updates: Vec<(usize, Update)>,
    may_be_held: Vec<usize>,
}

/// What one worker has to do for a change; and then what it had before.
#[derive(Debug, Default)]
pub(crate) struct Share {
    pub(crate) graph: Graph,
    pub(crate) routes: Routes,
    pub(crate) removed: Vec<Removed>,
    pub(crate) added: Vec<(Slot, Resident)>,
    /// Gates of functions that stay, where a cable was that led elsewhere, or to a node that is another one now.
    pub(crate) recabled: Vec<(usize, Vec<Gate>)>,
    pub(crate) updates: Vec<(usize, Update)>,
    /// The ports that wait for a function now, or did before.
    pub(crate) may_be_held: Vec<usize>,
    pub(crate) leftovers: Leftovers,
}

/// A node that goes.
#[derive(Debug)]
pub(crate) struct Removed {
    node: NodeId,
    pub(crate) slot: Slot,
    /// Whether this worker has it, or the part of it that is given back.
    pub(crate) is_home: bool,
    pub(crate) what: Option<Resident>,
}

/// A node with its place in the network.
#[derive(Debug)]
pub(crate) enum Resident {
    Port(Box<PortNode>),
    Function(Box<FunctionNode>),
}

/// What a change has replaced, to be freed by whoever asked for it.
#[derive(Default)]
pub(crate) struct Leftovers(Vec<Box<dyn Any + Send>>);

impl Leftovers {
    /// Has something freed elsewhere.
    pub(crate) fn keep(&mut self, what: impl Send + 'static) {
        self.0.push(Box::new(what));
    }
}

impl fmt::Debug for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Leftovers({})", self.0.len())
    }
}

impl Plan {
    /// Works out what `change` makes of `graph`.
    pub(crate) fn new(graph: &Graph, change: Change) -> Result<Self, Rejected> {
        let next = match graph.changed(&change) {
            Ok(next) => next,
            Err(error) => return Err(Rejected::new(error, change)),
        };
        let removed = change.removed.iter();
        let updates = change.updates.into_iter();
        Ok(Self {
            routes: next.routes(),
            recabled: graph.recabled(&next, &change.removed),
            may_be_held: graph.may_be_held(&next),
            removed: removed
                .filter_map(|&node| Some((node, graph.slot(node)?)))
                .collect(),
            added: change
                .added
                .into_iter()
                .filter_map(|(node, what)| Some((node, next.slot(node)?, what)))
                .collect(),
            updates: updates
                .filter_map(|(node, update)| match next.slot(node)? {
                    Slot::Function(slot) => Some((slot, update)),
                    Slot::Port(_) => None,
                })
                .collect(),
            graph: next,
        })
    }

    /// The network after the change.
    pub(crate) fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The share of each of `workers`: the same change, with the nodes that each is to have.
    pub(crate) fn spread(self, workers: usize, now: u64) -> Vec<Share> {
        let removed = || {
            let removed = self.removed.iter().map(|&(node, slot)| Removed {
                node,
                slot,
                is_home: false,
                what: None,
            });
            removed.collect()
        };
        let mut shares: Vec<Share> = (0..workers)
            .map(|_| Share {
                graph: self.graph.clone(),
                routes: self.routes.clone(),
                removed: removed(),
                added: Vec::with_capacity(self.added.len()),
                recabled: self.recabled.clone(),
                updates: self.updates.clone(),
                may_be_held: self.may_be_held.clone(),
                leftovers: Leftovers::default(),
            })
            .collect();
        for (id, slot, node) in self.added {
            let home = slot.home(workers);
            let mut give = |worker: usize, what| shares[worker].added.push((slot, what));
            match node {
                Node::Port(port) => give(home, Resident::port(id, port, now)),
                Node::Lanes(lanes) => {
                    for (k, lane) in lanes.into_iter().enumerate() {
                        give((home + k) % workers, Resident::port(id, lane, now));
                    }
                }
                Node::Function(function) => {
                    for (worker, part) in function.spread(workers, home).into_iter().enumerate() {
                        part.into_iter().for_each(|function| {
                            give(
                                worker,
                                Resident::Function(Box::new(FunctionNode {
                                    node: id,
                                    function,
                                    counters: FunctionCounters::default(),
                                })),
                            );
                        });
                    }
                }
            }
        }
        shares
    }
}

impl Share {
    /// The ports that were taken out.
    pub(crate) fn removed_ports(&self) -> impl Iterator<Item = &PortNode> {
        self.removed
            .iter()
            .filter_map(|removed| match &removed.what {
                Some(Resident::Port(node)) => Some(&**node),
                _ => None,
            })
    }

    /// Closes the books of what was removed, adds them to `retired`, and gives it back. Everything else that was replaced is freed.
    pub(crate) fn settle(self, retired: &mut NetBalance) -> Vec<(NodeId, Node)> {
        let mut given_back = Vec::with_capacity(self.removed.len());
        for Removed {
            node: id,
            is_home,
            what,
            ..
        } in self.removed
        {
            match what {
                Some(Resident::Port(mut node)) => {
                    node.port.detach();
                    let passed = node.port.counters().since(&node.before);
                    retired.add_port(&passed, &node.drops, node.segmented);
                    given_back.push((id, Node::Port(node.port)));
                }
                Some(Resident::Function(mut node)) => {
                    node.counters.add(&node.function.close());
                    retired.add_function(&node.counters);
                    if is_home {
                        given_back.push((id, Node::Function(node.function)));
                    }
                }
                None => {}
            }
        }
        given_back
    }
}

impl Resident {
    fn port(id: NodeId, mut port: Box<dyn virtnet_packet::Port>, now: u64) -> Self {
        port.attach();
        Self::Port(Box::new(PortNode {
            node: id,
            before: port.counters(),
            port,
            drops: Default::default(),
            sent_to: false,
            segmented: 0,
            heard: now,
            patience: Patience::default(),
            dozes: false,
            held_by: None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, Weak};
    use std::thread::{self, ThreadId};
    use std::time::Duration;

    use virtnet_packet::{Burst, DropReason, Picks, Port, PortCounters};

    use super::*;
    use crate::{
        Action, BridgeRules, Firewall, FirewallOrders, Router, RouterOrders, RouterTables, RuleSet,
        Switch, SwitchOptions, SwitchOrders, Timeouts, Translation, Worker,
    };

    /// Notes which threads it is attached on, detached and dropped.
    #[derive(Debug, Default)]
    struct Noting(Arc<Mutex<Vec<(&'static str, ThreadId)>>>);

    impl Noting {
        fn note(&self, what: &'static str) {
            self.0.lock().unwrap().push((what, thread::current().id()));
        }
    }

    impl Drop for Noting {
        fn drop(&mut self) {
            self.note("dropped");
        }
    }

    impl Port for Noting {
        fn attach(&mut self) {
            self.note("attached");
        }

        fn detach(&mut self) {
            self.note("detached");
        }

        fn rx(&mut self, _: &mut Burst) -> usize {
            0
        }

        fn tx(&mut self, _: &Burst, _: &Picks) -> usize {
            0
        }

        fn drop_tx(&mut self, _: DropReason, _: usize) {}

        fn counters(&self) -> PortCounters {
            PortCounters::default()
        }
    }

    const PORT: NodeId = NodeId(0);
    const ROUTER: NodeId = NodeId(1);
    const FIREWALL: NodeId = NodeId(2);
    const SWITCH: NodeId = NodeId(3);

    /// Of each of some things whether it was not freed yet.
    type Lives = Vec<Box<dyn Fn() -> bool>>;

    /// Orders for each function, and whether what they hold is there still.
    fn orders() -> ([Update; 3], Lives) {
        fn lives<T: 'static>(what: &Arc<T>) -> Box<dyn Fn() -> bool> {
            let what: Weak<T> = Arc::downgrade(what);
            Box::new(move || what.strong_count() > 0)
        }
        let tables = Arc::new(RouterTables::default());
        let translation = Arc::new(Translation::default());
        let rules = Arc::new(RuleSet::new(Vec::new(), Vec::new(), Action::Drop, true));
        let bridge = Arc::new(BridgeRules::new(true, 0, []).unwrap());
        let live = vec![
            lives(&tables),
            lives(&translation),
            lives(&rules),
            lives(&bridge),
        ];
        let router = RouterOrders {
            tables,
            errors_pps: 1,
            translation: Some(translation),
        };
        let firewall = FirewallOrders {
            rules,
            timeouts: Timeouts::default(),
        };
        let switch = SwitchOrders {
            ageing: Duration::from_secs(1),
            rules: Some(bridge),
        };
        ([router.into(), firewall.into(), switch.into()], live)
    }

    fn order(change: Change) -> (Change, Lives) {
        let ([router, firewall, switch], live) = orders();
        let change = change.update(ROUTER, router).update(FIREWALL, firewall);
        (change.update(SWITCH, switch), live)
    }

    #[test]
    fn what_a_change_replaces_is_freed_by_whoever_asked_for_it() {
        let port = Noting::default();
        let notes = Arc::clone(&port.0);
        let ([Update::Router(router), Update::Firewall(firewall), _], _) = orders() else {
            panic!("orders are for a router, a firewall and a switch");
        };
        let (change, before) = order(
            Change::new()
                .add(PORT, port)
                .add(ROUTER, Router::new(router).unwrap())
                .add(FIREWALL, Firewall::new(firewall, 1))
                .add(SWITCH, Switch::new(SwitchOptions::default()).unwrap()),
        );
        let mut worker = Worker::new();
        worker.apply(change, 0).unwrap();
        assert!(before.iter().all(|lives| lives()));

        let (change, after) = order(Change::new().remove(PORT));
        let plan = Plan::new(worker.graph(), change).unwrap();
        let mut share = plan.spread(1, 0).pop().unwrap();
        let (mut worker, share) = thread::spawn(move || {
            worker.adopt(&mut share, 1);
            worker.step(2);
            (worker, share)
        })
        .join()
        .unwrap();
        assert!(before.iter().all(|lives| lives()), "freed by the worker");
        drop(worker.settle(share));
        assert!(before.iter().all(|lives| !lives()), "still there");
        assert!(after.iter().all(|lives| lives()));
        let here = thread::current().id();
        let expected = ["attached", "detached", "dropped"].map(|what| (what, here));
        assert_eq!(*notes.lock().unwrap(), expected);
    }
}
