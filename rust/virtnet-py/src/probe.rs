//! A look at somebody's back-end.

use std::path::PathBuf;
use std::time::Duration;

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use virtnet_ports::check::{self, Check, Level};
use virtnet_ports::{Offered, probe as probe_back_end};

use crate::errors::{ConfigError, session_error};

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
        config,
        status,
    } = found;
    let report = PyDict::new(py);
    report.set_item("features", features)?;
    report.set_item("protocol_features", protocol_features.bits())?;
    report.set_item("queue_pairs", queue_pairs)?;
    report.set_item("memory_slots", memory_slots)?;
    report.set_item("config", config.map(|bytes| PyBytes::new(py, &bytes)))?;
    report.set_item("status", status)?;
    Ok(report)
}

/// Tries a back-end out, one check after the other.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct Checker {
    checks: Vec<&'static Check>,
    checker: Mutex<check::Checker>,
}

#[pymethods]
impl Checker {
    #[new]
    fn new(py: Python<'_>, path: PathBuf, timeout_s: f64) -> PyResult<Self> {
        let patience = Duration::try_from_secs_f64(timeout_s).unwrap_or(Duration::MAX);
        // So that a path nobody listens on is an error, and not a report full of them.
        py.detach(|| check::reach(&path)).map_err(session_error)?;
        Ok(Self {
            checks: check::checks(),
            checker: Mutex::new(check::Checker::new(path, patience)),
        })
    }

    /// All checks: id, demand, source, level, and whether it is hostile.
    fn checks(&self) -> Vec<(&str, &str, &str, &str, bool)> {
        let level = |level| match level {
            Level::Must => "must",
            Level::Should => "should",
        };
        let checks = self.checks.iter();
        checks
            .map(|c| (c.id, c.demand, c.source, level(c.level), c.hostile))
            .collect()
    }

    /// Runs the check with this number: outcome, what was found, seconds.
    fn run(&self, py: Python<'_>, number: usize) -> PyResult<(&'static str, String, f64)> {
        let Some(&check) = self.checks.get(number) else {
            return Err(ConfigError::new_err(format!("there is no check {number}")));
        };
        let finding = py.detach(|| {
            let mut checker = self.checker.lock().unwrap_or_else(PoisonError::into_inner);
            checker.run(check)
        });
        Ok((
            finding.outcome.name(),
            finding.found,
            finding.took.as_secs_f64(),
        ))
    }
}
