//! Network functions as Python describes them: by kind, with a dictionary of options.

use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_engine::{
    Divert, DivertOrders, Echo, Filter, Instruction, Late, Node, Sink, Source, SourceOrders,
    Switch, SwitchOptions, SwitchOrders, Tee, Update, Wire,
};
use virtnet_packet::Backlog;

use crate::errors::{ConfigError, engine_error};
use crate::open::get;
use crate::packets::offload_from;
use crate::ports::Port;

/// Makes a function; none if that is no kind of function.
pub(crate) fn make(kind: &str, options: &Bound<'_, PyDict>) -> PyResult<Option<Node>> {
    let invalid = |error| engine_error(&error);
    let function: Node = match kind {
        "switch" => Switch::new(SwitchOptions {
            ageing: switch_orders(options)?.ageing,
            ..SwitchOptions::default()
        })
        .map_err(invalid)?
        .into(),
        "wire" => Wire::new().into(),
        "tee" => Tee::new(filter(options)?).into(),
        "divert" => Divert::new(divert_orders(options)?, backlogs(options)?).into(),
        "sink" if get(options, "copy")? => Sink::copying().into(),
        "sink" => Sink::new().into(),
        "source" => {
            let packets: Vec<(Vec<u8>, Vec<u8>)> = get(options, "packets")?;
            let packets = packets
                .iter()
                .map(|(frame, offload)| (&frame[..], offload_from(offload)));
            Source::of_packets(packets, source_orders(options)?)
                .map_err(invalid)?
                .into()
        }
        "echo" => Echo::new().into(),
        _ => return Ok(None),
    };
    Ok(Some(function))
}

/// What is to change at a function that runs, if its kind can change at all.
pub(crate) fn update(kind: &str, options: &Bound<'_, PyDict>) -> PyResult<Option<Update>> {
    Ok(match kind {
        "divert" => Some(divert_orders(options)?.into()),
        "switch" => Some(switch_orders(options)?.into()),
        "source" => Some(source_orders(options)?.into()),
        _ => None,
    })
}

fn switch_orders(options: &Bound<'_, PyDict>) -> PyResult<SwitchOrders> {
    let ageing = Duration::try_from_secs_f64(get(options, "ageing_s")?).unwrap_or(Duration::MAX);
    Ok(SwitchOrders { ageing })
}

fn divert_orders(options: &Bound<'_, PyDict>) -> PyResult<DivertOrders> {
    let late = match get::<String>(options, "late")?.as_str() {
        "drop" => Late::Drop,
        "hold" => Late::Hold,
        _ => Late::Pass,
    };
    Ok(DivertOrders {
        filter: filter(options)?,
        late,
        enabled: get(options, "enabled")?,
    })
}

/// What the programs behind a divert have not taken yet, by direction.
fn backlogs(options: &Bound<'_, PyDict>) -> PyResult<[Option<Backlog>; 2]> {
    let queue: usize = get(options, "queue")?;
    let ends: [Option<Bound<'_, Port>>; 2] = get(options, "ends")?;
    Ok(ends.map(|end| Some(end?.get().backlog()?.limited(queue))))
}

/// A filter as libpcap has compiled it.
fn filter(options: &Bound<'_, PyDict>) -> PyResult<Filter> {
    let program: Vec<(u16, u8, u8, u32)> = get(options, "program")?;
    let program: Vec<_> = program
        .into_iter()
        .map(|(code, jt, jf, k)| Instruction { code, jt, jf, k })
        .collect();
    Filter::new(&program).map_err(|error| ConfigError::new_err(error.to_string()))
}

fn source_orders(options: &Bound<'_, PyDict>) -> PyResult<SourceOrders> {
    Ok(SourceOrders {
        rate: rate(options)?,
        count: get(options, "count")?,
    })
}

/// Packets per second as a whole number, at least one.
fn rate(options: &Bound<'_, PyDict>) -> PyResult<Option<u64>> {
    let rate: Option<f64> = get(options, "rate_pps")?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float becomes the nearest number there is"
    )]
    Ok(rate.map(|rate| rate.max(1.0).round() as u64))
}
