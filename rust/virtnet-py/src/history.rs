//! What has happened in a port's life, and how its rings stand, as plain values.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_ports::{Datum, Event, RingStatus};

use crate::open::Watch;

/// The events from number `first` on, and how many were let go.
pub(crate) fn events<'py>(
    py: Python<'py>,
    watch: &Watch,
    first: u64,
) -> PyResult<(Vec<Bound<'py, PyDict>>, u64)> {
    let (events, dropped) = py.detach(|| watch.events(first));
    let events = events.iter().map(|event| to_dict(py, event));
    Ok((events.collect::<PyResult<_>>()?, dropped))
}

/// How the rings stand.
pub(crate) fn rings<'py>(py: Python<'py>, watch: &Watch) -> PyResult<Vec<Bound<'py, PyDict>>> {
    let rings = py.detach(|| watch.rings());
    rings.iter().map(|ring| ring_to_dict(py, ring)).collect()
}

fn to_dict<'py>(py: Python<'py>, event: &Event) -> PyResult<Bound<'py, PyDict>> {
    let data = PyDict::new(py);
    for (name, datum) in event.what.data() {
        match datum {
            Datum::Number(number) => data.set_item(name, number)?,
            Datum::Flag(flag) => data.set_item(name, flag)?,
            Datum::Text(text) => data.set_item(name, text)?,
        }
    }
    let all = PyDict::new(py);
    all.set_item("number", event.number)?;
    all.set_item("at_ns", event.at_ns)?;
    all.set_item("wall_ns", event.wall_ns)?;
    all.set_item("kind", event.what.kind())?;
    all.set_item("text", event.what.to_string())?;
    all.set_item("data", data)?;
    Ok(all)
}

fn ring_to_dict<'py>(py: Python<'py>, ring: &RingStatus) -> PyResult<Bound<'py, PyDict>> {
    let all = PyDict::new(py);
    all.set_item("index", ring.index)?;
    let kind = if ring.is_transmitq() {
        "transmitq"
    } else {
        "receiveq"
    };
    all.set_item("kind", kind)?;
    all.set_item("started", ring.started)?;
    all.set_item("enabled", ring.enabled)?;
    all.set_item("size", ring.size)?;
    all.set_item("format", ring.format)?;
    all.set_item("kick", ring.kick)?;
    all.set_item("call", ring.call)?;
    all.set_item("kicks", ring.kicks)?;
    all.set_item("calls", ring.calls)?;
    all.set_item("bursts", ring.bursts)?;
    all.set_item("taken_again", ring.taken_again)?;
    all.set_item("broken", ring.broken.as_deref())?;
    if let Some(at) = ring.positions {
        all.set_item("avail", at.avail)?;
        all.set_item("used", at.used)?;
        all.set_item("avail_wrap", at.wraps.map(|wraps| wraps[0]))?;
        all.set_item("used_wrap", at.wraps.map(|wraps| wraps[1]))?;
        all.set_item("published", at.published)?;
        all.set_item("waiting", at.waiting)?;
    }
    Ok(all)
}
