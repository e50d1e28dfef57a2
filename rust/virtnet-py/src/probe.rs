//! A look at somebody's back-end.

use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_ports::{Offered, probe as probe_back_end};

use crate::errors::session_error;

/// Attaches to a back-end as a front-end and tells what it offers, then leaves.
#[pyfunction]
pub(crate) fn probe(py: Python<'_>, path: PathBuf, timeout_s: f64) -> PyResult<Bound<'_, PyDict>> {
    let timeout = Duration::try_from_secs_f64(timeout_s).unwrap_or(Duration::MAX);
    let found = py
        .detach(|| probe_back_end(&path, timeout))
        .map_err(session_error)?;
    let Offered {
        features,
        protocol_features,
        queue_pairs,
        memory_slots,
        ..
    } = found;
    let report = PyDict::new(py);
    report.set_item("features", features)?;
    report.set_item("protocol_features", protocol_features.bits())?;
    report.set_item("queue_pairs", queue_pairs)?;
    report.set_item("memory_slots", memory_slots)?;
    Ok(report)
}
