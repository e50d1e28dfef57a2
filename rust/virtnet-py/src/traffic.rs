//! Generators and analysers as Python describes them, and what they have counted.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_engine::{
    AnalyserCounters, AnalyserOrders, GeneratorOrders, Histogram, ReceivedStream, StreamCounters,
    StreamOrders, Values, Vary, VaryPlace,
};
use virtnet_packet::Writable;

use crate::errors::ConfigError;
use crate::open::get;
use crate::stats::summary;

/// The streams of a generator, as `virtnet.generating` prepares them.
pub(crate) fn generator(options: &Bound<'_, PyDict>) -> PyResult<GeneratorOrders> {
    let streams: Vec<Bound<'_, PyDict>> = get(options, "orders")?;
    let streams = streams.iter().map(stream).collect::<PyResult<_>>()?;
    Ok(GeneratorOrders { streams })
}

fn stream(options: &Bound<'_, PyDict>) -> PyResult<StreamOrders> {
    let frame: Vec<u8> = get(options, "frame")?;
    let vary: Vec<Bound<'_, PyDict>> = get(options, "vary")?;
    Ok(StreamOrders {
        id: get(options, "id")?,
        frame: frame.into(),
        vary: vary.iter().map(varied).collect::<PyResult<_>>()?,
        rate: get(options, "rate")?,
        burst: get(options, "burst")?,
        count: get(options, "count")?,
    })
}

fn varied(options: &Bound<'_, PyDict>) -> PyResult<Vary> {
    let place = match get::<Option<String>>(options, "field")? {
        Some(name) => VaryPlace::Field(Writable::named(&name).ok_or_else(|| {
            ConfigError::new_err(format!("the field {name:?} cannot be written"))
        })?),
        None => VaryPlace::Bytes {
            offset: get(options, "offset")?,
            width: get(options, "width")?,
        },
    };
    let values = match get::<String>(options, "how")?.as_str() {
        "counter" => Values::Counter {
            start: get(options, "start")?,
            step: get::<i128>(options, "step")?.cast_unsigned(),
            count: get(options, "count")?,
        },
        "random" => Values::Random {
            low: get(options, "low")?,
            high: get(options, "high")?,
            seed: get(options, "seed")?,
        },
        _ => Values::List(get::<Vec<u128>>(options, "values")?.into()),
    };
    Ok(Vary { place, values })
}

/// How an analyser goes about it.
pub(crate) fn analyser(options: &Bound<'_, PyDict>) -> PyResult<AnalyserOrders> {
    Ok(AnalyserOrders {
        check: get(options, "check")?,
        resets: get(options, "resets")?,
    })
}

/// What a generator has made, by stream.
pub(crate) fn made<'py>(counts: &Bound<'py, PyDict>, streams: &[StreamCounters]) -> PyResult<()> {
    let py = counts.py();
    let streams = streams.iter().map(|stream| {
        let counted = PyDict::new(py);
        counted.set_item("id", stream.id)?;
        counted.set_item("sent", stream.sent)?;
        counted.set_item("sent_bytes", stream.sent_bytes)?;
        counted.set_item("left", stream.left)?;
        counted.set_item("first_ns", stream.first_ns)?;
        counted.set_item("last_ns", stream.last_ns)?;
        Ok(counted)
    });
    counts.set_item("streams", streams.collect::<PyResult<Vec<_>>>()?)
}

/// What an analyser has counted.
pub(crate) fn analysed<'py>(
    counts: &Bound<'py, PyDict>,
    analyser: &AnalyserCounters,
) -> PyResult<()> {
    counts.set_item("foreign", analyser.foreign)?;
    counts.set_item("corrupted", analyser.corrupted)?;
    let streams = analyser.streams.iter();
    let streams = streams.map(|stream| received(counts.py(), stream));
    counts.set_item("streams", streams.collect::<PyResult<Vec<_>>>()?)
}

fn received<'py>(py: Python<'py>, stream: &ReceivedStream) -> PyResult<Bound<'py, PyDict>> {
    let counted = PyDict::new(py);
    counted.set_item("id", stream.id)?;
    counted.set_item("received", stream.received)?;
    counted.set_item("received_bytes", stream.received_bytes)?;
    counted.set_item("lost", stream.lost)?;
    counted.set_item("reordered", stream.reordered)?;
    counted.set_item("duplicates", stream.duplicates)?;
    counted.set_item("late", stream.late)?;
    counted.set_item("first_number", stream.first_number)?;
    counted.set_item("first_ns", stream.first_ns)?;
    counted.set_item("last_ns", stream.last_ns)?;
    counted.set_item("latency_ns", summary(py, &stream.latency)?)?;
    counted.set_item("latency_sum_ns", stream.latency.sum())?;
    counted.set_item("latency_buckets", buckets(&stream.latency))?;
    Ok(counted)
}

/// The buckets that hold something: their smallest and largest values, and how many they hold.
fn buckets(histogram: &Histogram) -> Vec<(u64, u64, u64)> {
    histogram.buckets().collect()
}
