//! Captures into columns: a port that records, and what Python reads of it or of a file.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyTuple};
use virtnet_packet::Port;
use virtnet_ports::{Recorded, RecorderPort, Recording, recorder};

use crate::errors::{StateError, port_error};
use crate::packets::{offload_bytes, origin_bytes};

/// A port that records, until a network takes it, and its recording.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct Recorder {
    port: Mutex<Option<RecorderPort>>,
    recording: Recording,
}

#[pymethods]
impl Recorder {
    #[new]
    fn new(places: u16, snap: usize, memory: usize) -> Self {
        let (port, recording) = recorder(places, snap, memory);
        Self {
            port: Mutex::new(Some(port)),
            recording,
        }
    }

    /// All that has come since the last time: bytes, starts, lengths, offload metadata, times, lengths on the wire, origins.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let found = py.detach(|| self.recording.take());
        columns(py, &found)
    }

    fn is_empty(&self) -> bool {
        self.recording.is_empty()
    }

    fn is_over(&self) -> bool {
        self.recording.is_over()
    }
}

impl Recorder {
    /// The port, for the network that is to run it.
    pub(crate) fn take_port(&self) -> PyResult<impl Port + use<>> {
        self.port
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .ok_or_else(|| StateError::new_err("the capture has ended"))
    }
}

/// The packets of a capture file as a recording gives them, and the names of the places where they were seen.
#[pyfunction]
pub(crate) fn read_capture(
    py: Python<'_>,
    path: PathBuf,
) -> PyResult<(Bound<'_, PyTuple>, Vec<String>)> {
    let (found, places) = py
        .detach(|| virtnet_ports::read_capture(path))
        .map_err(port_error)?;
    Ok((columns(py, &found)?, places))
}

fn columns<'py>(py: Python<'py>, found: &Recorded) -> PyResult<Bound<'py, PyTuple>> {
    let offloads: Vec<u8> = found
        .offloads
        .iter()
        .flat_map(|&offload| offload_bytes(offload))
        .collect();
    let words = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        PyBytes::new(py, &bytes)
    };
    let times: Vec<u8> = found
        .times_ns
        .iter()
        .flat_map(|time| time.to_ne_bytes())
        .collect();
    let origins: Vec<u8> = found
        .origins
        .iter()
        .flat_map(|&origin| origin_bytes(origin))
        .collect();
    (
        PyByteArray::new(py, &found.data),
        words(&found.starts),
        words(&found.lengths),
        PyByteArray::new(py, &offloads),
        PyBytes::new(py, &times),
        words(&found.wire_lengths),
        PyBytes::new(py, &origins),
    )
        .into_pyobject(py)
}
