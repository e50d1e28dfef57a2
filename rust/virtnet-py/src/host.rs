//! What this host is like.

use pyo3::prelude::*;

use crate::errors::{ConfigError, PortError, errno, port_error};

/// Fails where there can be no AF_XDP ports.
#[pyfunction]
pub(crate) fn try_af_xdp() -> PyResult<()> {
    virtnet_ports::try_af_xdp().map_err(port_error)
}

/// Nanoseconds that a cache line takes from one CPU to another.
#[pyfunction]
pub(crate) fn line_cost_ns(py: Python<'_>, cpu: usize, other: usize) -> PyResult<f64> {
    match py.detach(|| virtnet_engine::line_cost(cpu, other)) {
        Ok(cost) => Ok(cost.as_secs_f64() * 1e9),
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
            Err(PortError::new_err((errno(error.kind()), error.to_string())))
        }
        Err(error) => Err(ConfigError::new_err(error.to_string())),
    }
}
