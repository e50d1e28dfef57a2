//! The compiled half of the `virtnet` package: `virtnet._virtnet`.
//!
//! It turns Python values into the options of `virtnet-engine` and `virtnet-ports`, and their snapshots and errors
//! back into Python values. It is the only crate that names Python; what it offers is private to the package, which
//! documents it in `_virtnet.pyi`.
//!
//! It decides nothing about packets, and no thread of the engine ever enters the interpreter.
#![forbid(unsafe_code)]

use pyo3::prelude::*;

mod build;
mod columns;
mod commands;
mod edit;
mod engine;
mod errors;
mod firewall;
mod functions;
mod history;
mod host;
mod open;
mod packets;
mod ports;
mod probe;
mod recorder;
mod rings;
mod routing;
mod sockets;
mod stats;
mod traffic;
mod user_net;

/// The module `virtnet._virtnet`.
#[pymodule]
fn _virtnet(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(build::build_info, module)?)?;
    module.add_class::<probe::Checker>()?;
    module.add_class::<columns::Headers>()?;
    module.add_class::<packets::Packets>()?;
    module.add_function(wrap_pyfunction!(host::line_cost_ns, module)?)?;
    module.add_function(wrap_pyfunction!(host::try_af_xdp, module)?)?;
    module.add_function(wrap_pyfunction!(ports::memory_pair, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe, module)?)?;
    module.add_function(wrap_pyfunction!(recorder::read_capture, module)?)?;
    module.add_function(wrap_pyfunction!(rings::queue_pair, module)?)?;
    module.add_function(wrap_pyfunction!(routing::check_router, module)?)?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<rings::DeviceQueue>()?;
    module.add_class::<rings::DriverQueue>()?;
    module.add_class::<rings::GuestMemory>()?;
    module.add_class::<ports::Port>()?;
    module.add_class::<recorder::Recorder>()?;
    Ok(())
}
