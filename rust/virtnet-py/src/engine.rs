//! The engine that a `virtnet.Net` runs on: the graph by name, made what Python describes, whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyBytes, PyDict};
use virtnet_engine::{
    Change, Engine as RustEngine, EngineOptions, Gate, NetBalance, Node, NodeId, Place, Poll,
    Snapshot, WorkerStats,
};
use virtnet_ports::Control;

use crate::errors::{ConfigError, StateError, engine_error, port_error};
use crate::open::{Opened, Owner, Watch, open};
use crate::{commands, functions, history, stats};

/// Workers, and the graph they run.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct Engine {
    engine: RustEngine,
    /// Serves the sockets of all ports. Dropped after them, so that they can still say goodbye.
    control: Control,
    network: Mutex<Network>,
}

/// What runs, by name.
#[derive(Debug, Default)]
struct Network {
    nodes: BTreeMap<String, Known>,
    cables: BTreeMap<(String, String), (Place, Place)>,
    next_id: u32,
    /// The counters at the end.
    last: Option<(Snapshot, BTreeMap<NodeId, stats::Session>)>,
}

/// A node that runs, and what it was made of.
#[derive(Debug)]
struct Known {
    id: NodeId,
    kind: String,
    options: Py<PyDict>,
    /// How a port's session stands; functions have none.
    watch: Option<Watch>,
    /// Where its cables are plugged in, if what it was told depends on that.
    gates: functions::Gates,
}

type Described<'py> = (String, String, Bound<'py, PyDict>);

#[pymethods]
impl Engine {
    #[new]
    fn start(py: Python<'_>, cpus: Vec<usize>, poll: &str) -> PyResult<Self> {
        let poll = match poll {
            "busy" => Poll::Busy,
            "interrupt" => Poll::Interrupt,
            _ => Poll::Adaptive,
        };
        py.detach(|| {
            let options = EngineOptions {
                name: "virtnet".to_owned(),
                cpus,
                poll,
            };
            Ok(Self {
                engine: RustEngine::new(options).map_err(|error| engine_error(&error))?,
                control: Control::start("virtnet-control").map_err(port_error)?,
                network: Mutex::default(),
            })
        })
    }

    fn apply(
        &self,
        py: Python<'_>,
        nodes: Vec<Described<'_>>,
        cables: Vec<(String, String)>,
    ) -> PyResult<()> {
        let mut network = self.network(py);
        if network.last.is_some() {
            return Err(StateError::new_err("the network has been stopped"));
        }
        let plan = network.plan(py, &nodes, &cables, self.engine.workers(), &self.control)?;
        let Plan { change, next } = plan;
        let removed = py.detach(|| {
            self.engine
                .apply(change)
                .map_err(|rejected| engine_error(&rejected.error))
                .map(drop)
        });
        removed?;
        *network = next;
        Ok(())
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let network = self.network(py);
        let (snapshot, sessions) = match &network.last {
            Some((snapshot, sessions)) => (snapshot.clone(), sessions.clone()),
            None => py.detach(|| {
                let snapshot = self
                    .engine
                    .snapshot()
                    .map_err(|error| engine_error(&error))?;
                Ok::<_, PyErr>((snapshot, network.sessions()))
            })?,
        };
        network.stats(py, &snapshot, &sessions)
    }

    fn passed(&self, py: Python<'_>) -> PyResult<u64> {
        let network = self.network(py);
        let snapshot = match &network.last {
            Some((snapshot, _)) => Ok(snapshot.clone()),
            None => py.detach(|| self.engine.snapshot()),
        };
        let snapshot = snapshot.map_err(|error| engine_error(&error))?;
        let ports = snapshot.ports.iter().map(|port| port.counters);
        Ok(ports.map(|port| port.received + port.sent).sum())
    }

    fn events<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        first: u64,
    ) -> PyResult<(Vec<Bound<'py, PyDict>>, u64)> {
        match self.watch(py, name) {
            Some(watch) => history::events(py, &watch, first),
            None => Ok((Vec::new(), 0)),
        }
    }

    fn rings<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Vec<Bound<'py, PyDict>>> {
        match self.watch(py, name) {
            Some(watch) => history::rings(py, &watch),
            None => Ok(Vec::new()),
        }
    }

    fn set_link(&self, py: Python<'_>, name: &str, up: bool) -> PyResult<()> {
        let watch = self.known_watch(py, name)?;
        py.detach(|| watch.set_link(up))
    }

    fn command(
        &self,
        py: Python<'_>,
        name: &str,
        command: &str,
        arguments: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let command = commands::command(command, arguments)?;
        self.known_watch(py, name)?.ask(py, command).map(drop)
    }

    fn device_stats(
        &self,
        py: Python<'_>,
        name: &str,
        arguments: &Bound<'_, PyDict>,
    ) -> PyResult<Vec<(u16, Vec<u64>)>> {
        let command = commands::command("stats", arguments)?;
        let answer = self.known_watch(py, name)?.ask(py, command)?;
        commands::stats(&answer)
    }

    fn device_state<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        state: Option<Vec<u8>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let saved = self.known_watch(py, name)?.device_state(py, state)?;
        Ok(PyBytes::new(py, &saved))
    }

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        let mut network = self.network(py);
        if network.last.is_some() {
            return Ok(());
        }
        let running = &mut *network;
        py.detach(|| {
            let sessions = running.sessions();
            let remains = self.engine.stop().map_err(|error| engine_error(&error))?;
            running.last = Some((remains.snapshot, sessions));
            // The ports close their sockets on the control thread, so they go before it does.
            drop(remains.nodes);
            self.control.stop();
            Ok(())
        })
    }
}

impl Engine {
    /// Waits without holding up other Python threads.
    fn network(&self, py: Python<'_>) -> MutexGuard<'_, Network> {
        self.network
            .lock_py_attached(py)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever can be asked about the port of this name, which there must be.
    fn known_watch(&self, py: Python<'_>, name: &str) -> PyResult<Watch> {
        self.watch(py, name)
            .ok_or_else(|| ConfigError::new_err(format!("there is no port {name:?}")))
    }

    /// Whoever can be asked about the port of this name, if there is one.
    fn watch(&self, py: Python<'_>, name: &str) -> Option<Watch> {
        self.network(py).nodes.get(name)?.watch.clone()
    }
}

/// A change, and the network after it.
struct Plan {
    change: Change,
    next: Network,
}

impl Network {
    /// Works out what has to change, and opens what is new. Nothing has happened yet when this fails.
    fn plan(
        &self,
        py: Python<'_>,
        nodes: &[Described<'_>],
        cables: &[(String, String)],
        workers: usize,
        control: &Control,
    ) -> PyResult<Plan> {
        let mut change = Change::new();
        let mut next = Self {
            next_id: self.next_id,
            ..Self::default()
        };
        let mut told = BTreeSet::new();
        let described: BTreeMap<&String, &Described<'_>> =
            nodes.iter().map(|node| (&node.0, node)).collect();
        for (name, known) in &self.nodes {
            let fate = described
                .get(name)
                .map(|described| known.fate(py, described))
                .transpose()?;
            match fate.unwrap_or(Fate::Goes) {
                Fate::Stays => {}
                Fate::Changes => {
                    told.insert(name.clone());
                }
                Fate::Goes => change = change.remove(known.id),
            }
        }
        for described in nodes {
            let (name, kind, options) = described;
            if let Some(known) = self.nodes.get(name)
                && !matches!(known.fate(py, described)?, Fate::Goes)
            {
                let options = options.copy()?.unbind();
                let known = Known {
                    options,
                    ..known.clone_ref(py)
                };
                next.nodes.insert(name.clone(), known);
                continue;
            }
            let id = NodeId(next.next_id);
            next.next_id += 1;
            let (node, watch) = make(kind, options, workers, control)?;
            change = change.add(id, node);
            let known = Known {
                id,
                kind: kind.clone(),
                options: options.copy()?.unbind(),
                watch,
                gates: functions::Gates::new(),
            };
            next.nodes.insert(name.clone(), known);
        }
        let change = next.cable(py, self, change, cables)?;
        let change = next.tell(py, change, &mut told)?;
        Ok(Plan { change, next })
    }

    /// Tells functions what has changed: their options, or where their cables are.
    fn tell(
        &mut self,
        py: Python<'_>,
        mut change: Change,
        told: &mut BTreeSet<String>,
    ) -> PyResult<Change> {
        let mut plugged: BTreeMap<String, functions::Gates> = BTreeMap::new();
        for ((one, other), (a, b)) in &self.cables {
            for (name, place, end) in [(one, a, other), (other, b, one)] {
                let known = self.nodes.get(name);
                let asks = known.map(|known| functions::asks_for_gates(known.options.bind(py)));
                if asks.transpose()? == Some(true) {
                    let gates = plugged.entry(name.clone()).or_default();
                    gates.insert(end.clone(), place.gate);
                }
            }
        }
        for (name, gates) in plugged {
            if let Some(known) = self.nodes.get_mut(&name)
                && known.gates != gates
            {
                known.gates = gates;
                told.insert(name);
            }
        }
        for name in told.iter() {
            if let Some(known) = self.nodes.get(name)
                && let Some(update) =
                    functions::update(&known.kind, known.options.bind(py), &known.gates)?
            {
                change = change.update(known.id, update);
            }
        }
        Ok(change)
    }

    /// Keeps the cables that stay where they are, takes out those that go or are to be in other gates, plugs new ones into free
    /// gates.
    fn cable(
        &mut self,
        py: Python<'_>,
        before: &Self,
        mut change: Change,
        cables: &[(String, String)],
    ) -> PyResult<Change> {
        let wanted: BTreeSet<&(String, String)> = cables.iter().collect();
        let mut taken: BTreeSet<Place> = BTreeSet::new();
        for (ends, &(a, b)) in &before.cables {
            let there = |name: &String| {
                self.nodes
                    .get(name)
                    .zip(before.nodes.get(name))
                    .is_some_and(|(now, then)| now.id == then.id)
            };
            let stays = wanted.contains(ends)
                && self.fits(py, &ends.0, a, &ends.1)?
                && self.fits(py, &ends.1, b, &ends.0)?;
            match (stays, there(&ends.0), there(&ends.1)) {
                (true, true, true) => {
                    self.cables.insert(ends.clone(), (a, b));
                    taken.extend([a, b]);
                }
                // A cable goes with a node that goes.
                (_, true, true) => change = change.disconnect(a),
                _ => {}
            }
        }
        for ends in cables {
            if self.cables.contains_key(ends) {
                continue;
            }
            let mut free = |name: &String, other: &String| {
                let known = self.nodes.get(name);
                let known = known
                    .ok_or_else(|| ConfigError::new_err(format!("there is no node {name:?}")))?;
                let id = known.id;
                let gate = known
                    .gates_for(py, other)?
                    .map(|gate| Place::new(id, gate))
                    .find(|place| !taken.contains(place));
                let place =
                    gate.ok_or_else(|| ConfigError::new_err(format!("{name:?} has no gate left")))?;
                taken.insert(place);
                Ok::<_, PyErr>(place)
            };
            let (a, b) = (free(&ends.0, &ends.1)?, free(&ends.1, &ends.0)?);
            change = change.connect(a, b);
            self.cables.insert(ends.clone(), (a, b));
        }
        Ok(change)
    }

    /// Whether a cable from `other` may be where it is at `name`, if that is still there.
    fn fits(&self, py: Python<'_>, name: &str, at: Place, other: &str) -> PyResult<bool> {
        let gates = self.nodes.get(name).map(|known| known.gates_for(py, other));
        Ok(gates
            .transpose()?
            .is_some_and(|mut gates| gates.any(|gate| gate == at.gate)))
    }

    /// Who is plugged in where.
    fn ends_of(&self, name: &str) -> BTreeMap<Gate, &str> {
        let ends = self
            .cables
            .iter()
            .filter_map(|((one, other), (a, b))| match name {
                _ if name == one => Some((a.gate, other.as_str())),
                _ if name == other => Some((b.gate, one.as_str())),
                _ => None,
            });
        ends.collect()
    }

    fn sessions(&self) -> BTreeMap<NodeId, stats::Session> {
        let ports = self
            .nodes
            .values()
            .filter_map(|known| Some((known.id, known.watch.clone()?)));
        let (ids, watches): (Vec<_>, Vec<_>) = ports.unzip();
        ids.into_iter().zip(Watch::sessions(&watches)).collect()
    }

    fn stats<'py>(
        &self,
        py: Python<'py>,
        snapshot: &Snapshot,
        sessions: &BTreeMap<NodeId, stats::Session>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (ports, functions) = (PyDict::new(py), PyDict::new(py));
        let mut gone = snapshot.balance;
        let nobody = stats::Session::default();
        for (name, known) in &self.nodes {
            if let Some(found) = snapshot.ports.iter().find(|port| port.node == known.id) {
                let mut counters = found.counters;
                counters.rx_drops.merge(&found.drops);
                take_off(
                    &mut gone,
                    &NetBalance {
                        received: counters.received,
                        copied: found.segmented,
                        sent: counters.sent,
                        dropped: counters.rx_drops.total() + counters.tx_drops.total(),
                        ..NetBalance::default()
                    },
                );
                let session = sessions.get(&known.id).unwrap_or(&nobody);
                let port = stats::port(py, &known.kind, &counters, session)?;
                port.set_item("segmented", found.segmented)?;
                ports.set_item(name, port)?;
            }
            if let Some(found) = snapshot
                .functions
                .iter()
                .find(|function| function.node == known.id)
            {
                take_off(
                    &mut gone,
                    &NetBalance {
                        generated: found.counters.generated,
                        consumed: found.counters.consumed,
                        copied: found.counters.copied,
                        dropped: found.counters.drops.total(),
                        ..NetBalance::default()
                    },
                );
                let names = self.ends_of(name);
                let counted = stats::function(py, found, &names)?;
                // What is one function to the engine may have several kinds.
                counted.set_item("kind", &known.kind)?;
                functions.set_item(name, counted)?;
            }
        }
        let all = PyDict::new(py);
        all.set_item("ports", ports)?;
        all.set_item("functions", functions)?;
        all.set_item("gone", stats::balance(py, &gone)?)?;
        let held = snapshot.balance.held.cast_signed();
        let transit = snapshot.balance.in_transit() + held;
        all.set_item("in_transit", transit)?;
        all.set_item("worker", worker(py, &snapshot.worker)?)?;
        let workers = snapshot.workers.iter().map(|stats| worker(py, stats));
        all.set_item("workers", workers.collect::<PyResult<Vec<_>>>()?)?;
        Ok(all)
    }
}

fn worker<'py>(py: Python<'py>, counted: &WorkerStats) -> PyResult<Bound<'py, PyDict>> {
    let stats = PyDict::new(py);
    stats.set_item("breaths", counted.breaths)?;
    stats.set_item("busy_breaths", counted.busy_breaths)?;
    stats.set_item("sleeps", counted.sleeps)?;
    let seconds = |ns| Duration::from_nanos(ns).as_secs_f64();
    stats.set_item("cpu_s", seconds(counted.cpu_ns))?;
    stats.set_item("longest_pause_s", seconds(counted.longest_pause_ns))?;
    Ok(stats)
}

/// What is left of the books without one node. The engine counts each node in, so nothing goes below zero.
fn take_off(books: &mut NetBalance, node: &NetBalance) {
    books.received = books.received.saturating_sub(node.received);
    books.generated = books.generated.saturating_sub(node.generated);
    books.copied = books.copied.saturating_sub(node.copied);
    books.sent = books.sent.saturating_sub(node.sent);
    books.consumed = books.consumed.saturating_sub(node.consumed);
    books.dropped = books.dropped.saturating_sub(node.dropped);
}

/// What becomes of a node that runs.
enum Fate {
    Stays,
    /// It takes new orders and keeps its state.
    Changes,
    /// It is removed; what has its name afterwards is another one.
    Goes,
}

impl Known {
    fn fate(&self, py: Python<'_>, described: &Described<'_>) -> PyResult<Fate> {
        let (_, kind, options) = described;
        if *kind != self.kind {
            return Ok(Fate::Goes);
        }
        let before = self.options.bind(py);
        if before.eq(options)? {
            return Ok(Fate::Stays);
        }
        // Everything else has to be as it was, but for who is at its gates: that is a matter of cables.
        let Some(changeable) = options.get_item("changeable")? else {
            return Ok(Fate::Goes);
        };
        let mut is_same = true;
        for (name, value) in options {
            if value.eq(before.get_item(&name)?)? || name.eq("gates")? {
                continue;
            }
            if !changeable.contains(&name)? {
                return Ok(Fate::Goes);
            }
            is_same = false;
        }
        if is_same {
            return Ok(Fate::Stays);
        }
        Ok(Fate::Changes)
    }

    /// The gates that a cable from `other` may be plugged into, in order.
    fn gates_for(&self, py: Python<'_>, other: &str) -> PyResult<impl Iterator<Item = u16>> {
        let branches = self.options.bind(py).get_item("gates")?;
        let branches: BTreeMap<String, u16> =
            branches.map_or(Ok(BTreeMap::new()), |b| b.extract())?;
        let own = branches.get(other).copied();
        Ok((0..=u16::MAX).filter(move |gate| match own {
            Some(own) => *gate == own,
            None => !branches.values().any(|taken| taken == gate),
        }))
    }

    fn clone_ref(&self, py: Python<'_>) -> Self {
        Self {
            id: self.id,
            kind: self.kind.clone(),
            options: self.options.clone_ref(py),
            watch: self.watch.clone(),
            gates: self.gates.clone(),
        }
    }
}

/// Makes a function, or opens a port.
fn make(
    kind: &str,
    options: &Bound<'_, PyDict>,
    workers: usize,
    control: &Control,
) -> PyResult<(Node, Option<Watch>)> {
    if let Some(function) = functions::make(kind, options)? {
        return Ok((function, None));
    }
    let Opened { lanes, watch } = open(kind, options, Owner::Workers(workers), control)?;
    Ok((Node::Lanes(lanes), Some(watch)))
}
