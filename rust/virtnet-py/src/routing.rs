//! Routers as Python describes them: interfaces by the name of who is at the cable, routes as a dictionary of text.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_engine::{
    Gate, PrefixPair, Route, RouterInterface, RouterOrders, RouterTables, Service, Translation,
};
use virtnet_packet::header::Mac;

use crate::errors::{ConfigError, engine_error};
use crate::functions::Gates;
use crate::open::get;

/// The gates of interfaces whose cables are not plugged in: no router has such.
const UNPLUGGED: Gate = 4_096;

/// An interface by its address on the link, MTU, and addresses with their prefixes' lengths.
type Described = ([u8; 6], usize, Vec<(String, u8)>);

/// A service by its protocol, address and port, and who serves it.
type DescribedService = (u8, [u8; 4], u16, Vec<([u8; 4], u16)>);

/// Says what is wrong with a router's interfaces and routes.
#[pyfunction]
pub(crate) fn check_router(
    interfaces: BTreeMap<String, Described>,
    routes: &Bound<'_, PyDict>,
) -> PyResult<()> {
    tables(interfaces, routes, &BTreeMap::new()).map(|_| ())
}

/// What a router is to do, with its cables plugged in at `gates`.
pub(crate) fn orders(options: &Bound<'_, PyDict>, gates: &Gates) -> PyResult<RouterOrders> {
    // Who is at the end of a cable may stand before whom the interface is named after.
    let cables: BTreeMap<String, Option<String>> = get(options, "cables")?;
    let places = cables
        .iter()
        .filter_map(|(end, interface)| Some((interface.as_deref()?, *gates.get(end)?)));
    let places: BTreeMap<&str, Gate> = places.collect();
    let routes: Bound<'_, PyDict> = get(options, "routes")?;
    let tables = tables(get(options, "stations")?, &routes, &places)?;
    Ok(RouterOrders {
        tables: Arc::new(tables),
        errors_pps: get(options, "errors_pps")?,
        translation: translation(options, &places)?.map(Arc::new),
    })
}

/// How a router translates addresses, if it does.
fn translation(
    options: &Bound<'_, PyDict>,
    places: &BTreeMap<&str, Gate>,
) -> PyResult<Option<Translation>> {
    if !options.contains("services")? {
        return Ok(None);
    }
    let outside: Vec<String> = get(options, "outside_of")?;
    let outside = outside.iter();
    let gates = outside.filter_map(|name| places.get(name.as_str()).copied());
    let pool: Vec<[u8; 4]> = get(options, "addresses")?;
    let services: Vec<DescribedService> = get(options, "services")?;
    let services = services.into_iter().map(|(protocol, ip, port, ends)| {
        let backends = ends
            .into_iter()
            .map(|(ip, port)| (Ipv4Addr::from(ip), port));
        Service {
            protocol,
            at: (ip.into(), port),
            backends: backends.collect(),
        }
    });
    let pairs: Vec<([u8; 16], [u8; 16], u8)> = get(options, "pairs")?;
    let pairs = pairs.into_iter().map(|(inside, outside, len)| PrefixPair {
        inside: Ipv6Addr::from(inside),
        outside: Ipv6Addr::from(outside),
        len,
    });
    let translation = Translation::new(
        gates.collect(),
        pool.into_iter().map(Ipv4Addr::from).collect(),
        services.collect(),
        get(options, "flows_max")?,
    );
    Ok(Some(
        translation.with_prefixes(&pairs.collect::<Vec<PrefixPair>>()),
    ))
}

fn tables(
    described: BTreeMap<String, Described>,
    routes: &Bound<'_, PyDict>,
    places: &BTreeMap<&str, Gate>,
) -> PyResult<RouterTables> {
    let mut gates: BTreeMap<String, Gate> = BTreeMap::new();
    let mut interfaces = Vec::with_capacity(described.len());
    for ((name, (mac, mtu, given)), spare) in described.into_iter().zip(UNPLUGGED..) {
        let gate = places.get(name.as_str()).copied().unwrap_or(spare);
        let mut addresses = Vec::with_capacity(given.len());
        for (ip, len) in given {
            addresses.push((address(&ip)?, len));
        }
        interfaces.push(RouterInterface {
            gate,
            mac: Mac(mac),
            mtu,
            addresses,
        });
        gates.insert(name, gate);
    }
    let mut parsed = Vec::with_capacity(routes.len());
    for (to, hop) in routes {
        let (to, hop): (Bound<'_, PyAny>, Bound<'_, PyAny>) = (to, hop);
        parsed.push(route(to.extract()?, hop.extract()?, &gates)?);
    }
    RouterTables::new(interfaces, parsed).map_err(|error| engine_error(&error))
}

/// A route to `PREFIX/LENGTH` over `ADDRESS`, `NODE` or `ADDRESS%NODE`.
fn route(to: &str, hop: &str, gates: &BTreeMap<String, Gate>) -> PyResult<Route> {
    let wrong = |what: &str| ConfigError::new_err(format!("routes.{to}: {what}, found {hop:?}"));
    let prefix = to.split_once('/');
    let prefix = prefix.and_then(|(ip, len)| Some((ip.parse().ok()?, len.parse().ok()?)));
    let (ip, len): (IpAddr, u8) = prefix.ok_or_else(|| {
        ConfigError::new_err(format!(
            "routes: expected ADDRESS/LENGTH, such as 10.0.0.0/8, found {to:?}"
        ))
    })?;
    let gate_of = |name: &str| {
        let known = || gates.keys().map(String::as_str).collect::<Vec<_>>();
        gates.get(name).copied().ok_or_else(|| {
            wrong(&format!(
                "expected an address, or a node that has an interface ({})",
                known().join(", ")
            ))
        })
    };
    let (via, gate) = match hop.split_once('%') {
        Some((via, name)) => {
            let via = via.parse();
            let via = via.map_err(|_| wrong("expected an address before the %"))?;
            (Some(via), Some(gate_of(name)?))
        }
        None => match hop.parse() {
            Ok(via) => (Some(via), None),
            Err(_) => (None, Some(gate_of(hop)?)),
        },
    };
    Ok(Route {
        to: ip,
        len,
        via,
        gate,
    })
}

fn address(text: &str) -> PyResult<IpAddr> {
    text.parse()
        .map_err(|_| ConfigError::new_err(format!("expected an address, found {text:?}")))
}
