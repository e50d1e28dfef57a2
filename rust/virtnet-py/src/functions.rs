//! Network functions as Python describes them: by kind, with a dictionary of options.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_engine::{
    Analyser, BridgeRules, CableRules, Distribution, Divert, DivertOrders, Echo, Element, Filter,
    Firewall, Gate, Generator, GilbertElliott, ImpairOrders, Impairment, Instruction, Late, Node,
    Program, Router, Sink, Source, SourceOrders, Step, StormLimits, Switch, SwitchOptions,
    SwitchOrders, Table, Tee, Track, Update, Wire,
};
use virtnet_packet::Backlog;

use crate::errors::{ConfigError, engine_error};
use crate::firewall;
use crate::open::get;
use crate::packets::offload_from;
use crate::ports::Port;
use crate::{routing, traffic};

/// Makes a function; none if that is no kind of function.
pub(crate) fn make(kind: &str, options: &Bound<'_, PyDict>) -> PyResult<Option<Node>> {
    let invalid = |error| engine_error(&error);
    let function: Node = match kind {
        "switch" => Switch::new(SwitchOptions {
            ageing: ageing(options)?,
            ..SwitchOptions::default()
        })
        .map_err(invalid)?
        .into(),
        "wire" => Wire::new().into(),
        "tee" => Tee::new(filter(options)?).into(),
        "divert" => Divert::new(divert_orders(options)?, backlogs(options)?).into(),
        "element" => Element::new(program(options)?).into(),
        "firewall" => Firewall::new(firewall::orders(options)?, get(options, "states")?).into(),
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
        "generator" => Generator::new(&traffic::generator(options)?)
            .map_err(invalid)?
            .into(),
        "analyser" => Analyser::new(traffic::analyser(options)?).into(),
        "echo" => Echo::new().into(),
        "impairment" => {
            let direction: String = get(options, "direction")?;
            let gates = [direction != "to", direction != "from"];
            Impairment::new(&impair_orders(options)?, gates, get(options, "seed")?)
                .map_err(invalid)?
                .into()
        }
        // It is told of its interfaces when its cables are plugged in.
        "router" | "nat" | "load_balancer" => Router::default().into(),
        _ => return Ok(None),
    };
    Ok(Some(function))
}

/// By the name of who is at the other end, where each of a function's cables is plugged in.
pub(crate) type Gates = BTreeMap<String, Gate>;

/// Whether what a function is told depends on where its cables are plugged in, so that it has to be told when they are.
pub(crate) fn asks_for_gates(options: &Bound<'_, PyDict>) -> PyResult<bool> {
    Ok(options
        .get_item("cables")?
        .is_some_and(|cables| !cables.is_none()))
}

/// What is to change at a function that runs, if its kind can change at all.
pub(crate) fn update(
    kind: &str,
    options: &Bound<'_, PyDict>,
    gates: &Gates,
) -> PyResult<Option<Update>> {
    Ok(match kind {
        "divert" => Some(divert_orders(options)?.into()),
        "element" => Some(program(options)?.into()),
        "firewall" => Some(firewall::orders(options)?.into()),
        "switch" => Some(switch_orders(options, gates)?.into()),
        "source" => Some(source_orders(options)?.into()),
        "impairment" => Some(impair_orders(options)?.into()),
        "generator" => Some(traffic::generator(options)?.into()),
        "analyser" => Some(traffic::analyser(options)?.into()),
        "router" | "nat" | "load_balancer" => Some(routing::orders(options, gates)?.into()),
        _ => None,
    })
}

fn ageing(options: &Bound<'_, PyDict>) -> PyResult<Duration> {
    let seconds = get(options, "ageing_s")?;
    Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

fn switch_orders(options: &Bound<'_, PyDict>, gates: &Gates) -> PyResult<SwitchOrders> {
    let ageing = ageing(options)?;
    if !asks_for_gates(options)? {
        return Ok(SwitchOrders {
            ageing,
            rules: None,
        });
    }
    let cables: BTreeMap<String, Option<Bound<'_, PyDict>>> = get(options, "cables")?;
    let mut rules = Vec::with_capacity(cables.len());
    for (end, table) in cables {
        if let Some(&gate) = gates.get(&end) {
            rules.push((gate, cable_rules(table, gates)?));
        }
    }
    let rules = BridgeRules::new(get(options, "aware")?, get(options, "loop_guard")?, rules);
    Ok(SwitchOrders {
        ageing,
        rules: Some(Arc::new(rules.map_err(|error| engine_error(&error))?)),
    })
}

fn cable_rules(table: Option<Bound<'_, PyDict>>, gates: &Gates) -> PyResult<CableRules> {
    let Some(table) = table else {
        return Ok(CableRules::default());
    };
    let vlans: Vec<u16> = get(&table, "vlans")?;
    let mirror: Option<String> = get(&table, "mirror")?;
    Ok(CableRules {
        untagged: get(&table, "untagged")?,
        vlans: vlans.into_iter().collect(),
        isolated: get(&table, "isolated")?,
        horizon: get(&table, "horizon")?,
        learning: get(&table, "learning")?,
        limits: StormLimits {
            broadcast: get(&table, "broadcast")?,
            multicast: get(&table, "multicast")?,
            unknown: get(&table, "unknown")?,
        },
        bond: get(&table, "bond")?,
        mirror: mirror.and_then(|end| gates.get(&end).copied()),
        stations: get(&table, "stations")?,
    })
}

/// The program of an element, as `virtnet.elements` writes it.
fn program(options: &Bound<'_, PyDict>) -> PyResult<Program> {
    type Entries = (Vec<i128>, Vec<i128>, i128);
    let steps: Vec<(String, String, Vec<i128>)> = get(options, "steps")?;
    let tables: Vec<Entries> = get(options, "tables")?;
    let steps: Vec<Step> = steps
        .into_iter()
        .map(|(op, dtype, args)| Step { op, dtype, args })
        .collect();
    let tables = tables.into_iter().map(|(keys, values, default)| Table {
        entries: keys
            .into_iter()
            .map(word)
            .zip(values.into_iter().map(word))
            .collect(),
        default: word(default),
    });
    Program::new(&steps, tables.collect()).map_err(|error| ConfigError::new_err(error.to_string()))
}

/// A number in 64 bits, filled up with its sign if it is below zero.
fn word(number: i128) -> u64 {
    u64::try_from(number & i128::from(u64::MAX)).unwrap_or_default()
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
pub(crate) fn filter(options: &Bound<'_, PyDict>) -> PyResult<Filter> {
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

/// What a cable is to do to packets; quantities over time are lists, of one value if it stays.
fn impair_orders(options: &Bound<'_, PyDict>) -> PyResult<ImpairOrders> {
    let step = Duration::try_from_secs_f64(get(options, "step_s")?).unwrap_or(Duration::MAX);
    let step_ns = u64::try_from(step.as_nanos()).unwrap_or(u64::MAX);
    let mut tracks: BTreeMap<String, Vec<f64>> = get(options, "tracks")?;
    let mut track = |name: &str, factor: f64| {
        let values = tracks.remove(name)?;
        let values = values.into_iter().map(|value| value * factor).collect();
        Some(Track::of(values, step_ns))
    };
    let zero = || Track::constant(0.0);
    let table: Option<Vec<f64>> = get(options, "table")?;
    let distribution = match (table, get::<Option<String>>(options, "shape")?.as_deref()) {
        (Some(table), _) => Distribution::Table(table.into()),
        (None, Some("normal")) => Distribution::Normal,
        (None, Some("pareto")) => Distribution::Pareto,
        (None, _) => Distribution::Uniform,
    };
    let model: Option<[f64; 4]> = get(options, "gemodel")?;
    let burst_loss = model.map(|[to_bad, to_good, loss_bad, loss_good]| GilbertElliott {
        to_bad,
        to_good,
        loss_bad,
        loss_good,
    });
    Ok(ImpairOrders {
        delay_ns: track("delay_ms", 1e6).unwrap_or_else(zero),
        jitter_ns: track("jitter_ms", 1e6).unwrap_or_else(zero),
        distribution,
        keep_order: get(options, "keep_order")?,
        loss: track("loss", 1.0).unwrap_or_else(zero),
        burst_loss,
        duplicate: get(options, "duplicate")?,
        reorder: get(options, "reorder")?,
        corrupt: get(options, "corrupt")?,
        rate_bps: track("rate_bps", 1.0),
        rate_pps: track("rate_pps", 1.0),
        burst_bytes: get(options, "burst_bytes")?,
        burst_packets: get(options, "burst_packets")?,
        queue_packets: get(options, "queue_packets")?,
        queue_bytes: get::<Option<usize>>(options, "queue_bytes")?.unwrap_or(usize::MAX),
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
