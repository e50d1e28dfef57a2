//! Snapshots as dictionaries with the field names of `virtnet.stats`.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_packet::{DropCounters, PortCounters};

/// The counters of a port.
pub(crate) fn port<'py>(
    py: Python<'py>,
    kind: &str,
    counters: &PortCounters,
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
