//! Snapshots as dictionaries with the field names of `virtnet.stats`.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_engine::{FunctionDetail, FunctionStats, Gate, Histogram, LineCounters, NetBalance};
use virtnet_packet::header::Mac;
use virtnet_packet::{DropCounters, PortCounters};
use virtnet_ports::{
    DgramWatch, InterfaceWatch, PcapWatch, Step, StreamWatch, UserNetWatch, VhostUserStatus,
    VirtioUserStatus, VxlanWatch,
};
use virtnet_virtio::net::NetConfig;

use crate::{traffic, user_net};

/// How a port and whoever is at its other end get on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Session {
    pub(crate) connected: bool,
    state: Option<&'static str>,
    features: Option<u64>,
    protocol_features: Option<u64>,
    ring: Option<&'static str>,
    queue_pairs: usize,
    sessions: u64,
    last_error: Option<String>,
    offered: Option<u64>,
    step: Option<&'static str>,
    last_step: Option<&'static str>,
    peer_pid: Option<i32>,
    refusals: u64,
    config: NetConfig,
    xdp: Option<&'static str>,
    detail: Vec<(&'static str, u64)>,
    user_net: Option<UserNetWatch>,
}

impl Session {
    /// There is nobody to come or go.
    pub(crate) fn always() -> Self {
        Self {
            connected: true,
            ..Self::default()
        }
    }
}

impl From<&UserNetWatch> for Session {
    /// A gateway is there as long as its port is.
    fn from(watch: &UserNetWatch) -> Self {
        Self {
            user_net: Some(watch.clone()),
            ..Self::always()
        }
    }
}

impl From<&InterfaceWatch> for Session {
    fn from(watch: &InterfaceWatch) -> Self {
        Self {
            connected: watch.is_up(),
            last_error: watch.is_gone().then(|| "the interface is gone".to_owned()),
            config: NetConfig {
                link_up: Some(watch.is_up()),
                mtu: u16::try_from(watch.mtu()).ok(),
                ..NetConfig::default()
            },
            xdp: watch.how(),
            ..Self::default()
        }
    }
}

impl From<&VxlanWatch> for Session {
    fn from(watch: &VxlanWatch) -> Self {
        Self {
            detail: watch.detail().to_vec(),
            ..Self::always()
        }
    }
}

impl From<&DgramWatch> for Session {
    fn from(watch: &DgramWatch) -> Self {
        Self {
            connected: watch.is_there(),
            ..Self::default()
        }
    }
}

impl From<&StreamWatch> for Session {
    fn from(watch: &StreamWatch) -> Self {
        let connected = watch.is_up();
        Self {
            connected,
            state: Some(match (connected, watch.is_client()) {
                (true, _) => "running",
                (false, true) => "connecting",
                (false, false) => "listening",
            }),
            sessions: watch.sessions(),
            last_error: watch.last_error(),
            peer_pid: watch.peer_pid(),
            ..Self::default()
        }
    }
}

impl From<&PcapWatch> for Session {
    fn from(watch: &PcapWatch) -> Self {
        let state = watch.state();
        Self {
            connected: state == "writing",
            state: Some(state),
            last_error: watch.why().map(str::to_owned),
            ..Self::default()
        }
    }
}

impl From<VhostUserStatus> for Session {
    fn from(status: VhostUserStatus) -> Self {
        let there = status.ring_format.is_some();
        Self {
            connected: status.state == "running",
            state: Some(status.state),
            features: there.then_some(status.negotiated),
            protocol_features: there.then_some(status.protocol),
            ring: status.ring_format,
            queue_pairs: status.sources.min(status.sinks),
            sessions: status.sessions,
            last_error: status.last_error,
            offered: Some(status.offered),
            step: status.step.map(Step::name),
            last_step: status.last_step.map(Step::name),
            peer_pid: status.peer_pid,
            refusals: status.refusals,
            xdp: None,
            detail: Vec::new(),
            user_net: None,
            config: NetConfig {
                link_up: Some(status.link_up),
                ..status.config.unwrap_or_default()
            },
        }
    }
}

impl From<VirtioUserStatus> for Session {
    fn from(status: VirtioUserStatus) -> Self {
        let there = status.ring_format.is_some();
        Self {
            connected: status.state == "running",
            state: Some(status.state),
            features: there.then_some(status.negotiated),
            protocol_features: there.then_some(status.protocol),
            ring: status.ring_format,
            queue_pairs: status.queue_pairs,
            sessions: status.sessions,
            last_error: status.last_error,
            offered: there.then_some(status.offered),
            config: status.config.unwrap_or_default(),
            ..Self::default()
        }
    }
}

/// The counters of a port, and how its session stands.
pub(crate) fn port<'py>(
    py: Python<'py>,
    kind: &str,
    counters: &PortCounters,
    session: &Session,
) -> PyResult<Bound<'py, PyDict>> {
    let stats = PyDict::new(py);
    stats.set_item("kind", kind)?;
    stats.set_item("received", counters.received)?;
    stats.set_item("sent", counters.sent)?;
    stats.set_item("received_bytes", counters.received_bytes)?;
    stats.set_item("sent_bytes", counters.sent_bytes)?;
    stats.set_item("rx_drops", drops(py, &counters.rx_drops)?)?;
    stats.set_item("tx_drops", drops(py, &counters.tx_drops)?)?;
    stats.set_item("notifications", counters.notifications)?;
    stats.set_item("connected", session.connected)?;
    stats.set_item("state", session.state)?;
    stats.set_item("features", session.features)?;
    stats.set_item("protocol_features", session.protocol_features)?;
    stats.set_item("ring", session.ring)?;
    stats.set_item("queue_pairs", session.queue_pairs)?;
    stats.set_item("sessions", session.sessions)?;
    stats.set_item("last_error", session.last_error.as_deref())?;
    stats.set_item("offered", session.offered)?;
    stats.set_item("step", session.step)?;
    stats.set_item("last_step", session.last_step)?;
    stats.set_item("peer_pid", session.peer_pid)?;
    stats.set_item("refusals", session.refusals)?;
    stats.set_item("xdp", session.xdp)?;
    let user_net = session.user_net.as_ref();
    let user_net = user_net
        .map(|watch| user_net::stats(py, watch))
        .transpose()?;
    stats.set_item("user_net", user_net)?;
    let detail = PyDict::new(py);
    for (name, n) in &session.detail {
        detail.set_item(name, n)?;
    }
    stats.set_item("detail", detail)?;
    config(&stats, &session.config)?;
    Ok(stats)
}

/// What a configuration space tells.
pub(crate) fn config(into: &Bound<'_, PyDict>, config: &NetConfig) -> PyResult<()> {
    let mac = config
        .mac
        .map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
    into.set_item("mac", mac)?;
    into.set_item("link_up", config.link_up)?;
    into.set_item("mtu", config.mtu)?;
    into.set_item("speed_mbps", config.speed_mbps)
}

/// What a function has counted; `ends`: who is plugged in where.
pub(crate) fn function<'py>(
    py: Python<'py>,
    function: &FunctionStats,
    ends: &BTreeMap<Gate, &str>,
) -> PyResult<Bound<'py, PyDict>> {
    let stats = PyDict::new(py);
    stats.set_item("kind", function.kind.name())?;
    stats.set_item("generated", function.counters.generated)?;
    stats.set_item("consumed", function.counters.consumed)?;
    stats.set_item("copied", function.counters.copied)?;
    stats.set_item("drops", drops(py, &function.counters.drops)?)?;
    stats.set_item("detail", detail(py, &function.detail, ends)?)?;
    Ok(stats)
}

/// What only one kind of function counts.
fn detail<'py>(
    py: Python<'py>,
    detail: &FunctionDetail,
    ends: &BTreeMap<Gate, &str>,
) -> PyResult<Bound<'py, PyDict>> {
    let counts = PyDict::new(py);
    match detail {
        FunctionDetail::Divert { late } => counts.set_item("late", late)?,
        FunctionDetail::Switch(switch) => {
            counts.set_item("entries", switch.entries)?;
            counts.set_item("learned", switch.learned)?;
            counts.set_item("moved", switch.moved)?;
            counts.set_item("aged", switch.aged)?;
            counts.set_item("table_full", switch.table_full)?;
            counts.set_item("flooded", switch.flooded)?;
            counts.set_item("flaps", switch.flaps)?;
            let flap = switch.last_flap.map(|flap| {
                let found = PyDict::new(py);
                found.set_item("vlan", flap.vlan)?;
                found.set_item("mac", Mac(flap.mac).to_string())?;
                found.set_item("cable", ends.get(&flap.gate))?;
                Ok::<_, PyErr>(found)
            });
            counts.set_item("last_flap", flap.transpose()?)?;
        }
        FunctionDetail::Firewall(firewall) => {
            counts.set_item("states", firewall.states)?;
            counts.set_item("created", firewall.created)?;
            counts.set_item("expired", firewall.expired)?;
            counts.set_item("evicted", firewall.evicted)?;
            counts.set_item("known", firewall.known)?;
            counts.set_item("refused", firewall.refused)?;
            let rules = firewall.rules.iter().map(|rule| {
                let counted = PyDict::new(py);
                counted.set_item("text", &rule.text)?;
                counted.set_item("packets", rule.packets)?;
                counted.set_item("bytes", rule.bytes)?;
                Ok(counted)
            });
            counts.set_item("rules", rules.collect::<PyResult<Vec<_>>>()?)?;
        }
        FunctionDetail::Impairment(lines) => {
            for (name, line) in ["from", "to"].into_iter().zip(lines.iter()) {
                if let Some(line) = line {
                    counts.set_item(name, impaired(py, line)?)?;
                }
            }
        }
        FunctionDetail::Router(router) => {
            counts.set_item("routes", router.routes)?;
            counts.set_item("neighbours", router.neighbours)?;
            counts.set_item("waiting", router.waiting)?;
            counts.set_item("forwarded", router.forwarded)?;
            counts.set_item("asked", router.asked)?;
            counts.set_item("answered", router.answered)?;
            counts.set_item("echo_answered", router.echo_answered)?;
            counts.set_item("errors_sent", router.errors_sent)?;
            counts.set_item("errors_suppressed", router.errors_suppressed)?;
            counts.set_item("fragmented", router.fragmented)?;
            counts.set_item("flows", router.flows)?;
            counts.set_item("flows_created", router.flows_created)?;
            counts.set_item("flows_expired", router.flows_expired)?;
        }
        FunctionDetail::Generator(streams) => traffic::made(&counts, streams)?,
        FunctionDetail::Analyser(analyser) => traffic::analysed(&counts, analyser)?,
        _ => {}
    }
    Ok(counts)
}

/// What came of one direction of an impairment.
fn impaired<'py>(py: Python<'py>, line: &LineCounters) -> PyResult<Bound<'py, PyDict>> {
    let counts = PyDict::new(py);
    counts.set_item("received", line.received)?;
    counts.set_item("received_bytes", line.received_bytes)?;
    counts.set_item("sent", line.sent)?;
    counts.set_item("sent_bytes", line.sent_bytes)?;
    counts.set_item("lost", line.lost)?;
    counts.set_item("queue_full", line.queue_full)?;
    counts.set_item("duplicated", line.duplicated)?;
    counts.set_item("corrupted", line.corrupted)?;
    counts.set_item("hurried", line.hurried)?;
    counts.set_item("reordered", line.reordered)?;
    counts.set_item("held", line.held)?;
    let first = line.first_sent.unwrap_or(line.last_sent);
    counts.set_item("sending_ns", line.last_sent - first)?;
    counts.set_item("first_bytes", line.first_bytes)?;
    counts.set_item("queued_ns", summary(py, &line.queued)?)?;
    counts.set_item("asked_ns", summary(py, &line.asked)?)?;
    counts.set_item("achieved_ns", summary(py, &line.achieved)?)?;
    counts.set_item("late_ns", summary(py, &line.late)?)?;
    Ok(counts)
}

/// The shape of a histogram.
pub(crate) fn summary<'py>(py: Python<'py>, histogram: &Histogram) -> PyResult<Bound<'py, PyDict>> {
    let shape = histogram.summary();
    let values = PyDict::new(py);
    values.set_item("min", shape.min)?;
    values.set_item("mean", shape.mean)?;
    values.set_item("p50", shape.p50)?;
    values.set_item("p90", shape.p90)?;
    values.set_item("p99", shape.p99)?;
    values.set_item("p999", shape.p999)?;
    values.set_item("p9999", shape.p9999)?;
    values.set_item("max", shape.max)?;
    Ok(values)
}

/// Both sides of the books.
pub(crate) fn balance<'py>(py: Python<'py>, balance: &NetBalance) -> PyResult<Bound<'py, PyDict>> {
    let stats = PyDict::new(py);
    stats.set_item("received", balance.received)?;
    stats.set_item("generated", balance.generated)?;
    stats.set_item("copied", balance.copied)?;
    stats.set_item("sent", balance.sent)?;
    stats.set_item("consumed", balance.consumed)?;
    stats.set_item("dropped", balance.dropped)?;
    Ok(stats)
}

/// Drops by reason, those that have happened.
pub(crate) fn drops<'py>(py: Python<'py>, drops: &DropCounters) -> PyResult<Bound<'py, PyDict>> {
    let counts = PyDict::new(py);
    for (reason, n) in drops.iter() {
        counts.set_item(reason.name(), n)?;
    }
    Ok(counts)
}
