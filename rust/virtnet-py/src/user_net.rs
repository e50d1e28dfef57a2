//! User-mode networks: from the options that `virtnet.spec` has checked to a port, and what it tells as dictionaries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use virtnet_ports::{
    Forward, Lost, StaticLease, Transport, UserNetOptions, UserNetPort, UserNetWatch,
};

use crate::errors::{ConfigError, port_error};
use crate::open::{get, parse_mac};

/// Makes the network and its port.
pub(crate) fn open(options: &Bound<'_, PyDict>) -> PyResult<UserNetPort> {
    let wanted = read(options)?;
    options
        .py()
        .detach(|| UserNetPort::new(wanted))
        .map_err(port_error)
}

fn read(options: &Bound<'_, PyDict>) -> PyResult<UserNetOptions> {
    let place: String = get(options, "where")?;
    let (network, prefix) = place
        .split_once('/')
        .and_then(|(network, prefix)| Some((network.parse().ok()?, prefix.parse().ok()?)))
        .ok_or_else(|| odd("where", &place))?;
    let usual = UserNetOptions::new(network, prefix);
    let network6: String = get(options, "ipv6")?;
    let network6 = match network6.split_once('/') {
        Some((network, _)) => Some(parse::<Ipv6Addr>("ipv6", network)?),
        None => None,
    };
    Ok(UserNetOptions {
        gateway: parsed(options, "gateway")?.unwrap_or(usual.gateway),
        first: parsed(options, "first")?.unwrap_or(usual.first),
        network6,
        mac: get::<Option<String>>(options, "mac")?.and_then(|mac| parse_mac(&mac)),
        mtu: get(options, "mtu")?,
        lease_s: get(options, "lease_s")?,
        outside: get(options, "outside")?,
        host_loopback: get(options, "host_loopback")?,
        resolver: parsed::<SocketAddr>(options, "resolver")?,
        domain: get(options, "domain")?,
        names: each(options, "names", name)?,
        leases: each(options, "leases", lease)?,
        forward: each(options, "forward", forward)?,
        tcp_idle_s: get(options, "tcp_idle_s")?,
        udp_idle_s: get(options, "udp_idle_s")?,
        ..usual
    })
}

fn name(text: &str) -> Option<(String, IpAddr)> {
    let (name, ip) = text.split_once('/')?;
    Some((name.to_owned(), ip.parse().ok()?))
}

fn lease(text: &str) -> Option<StaticLease> {
    let mut parts = text.split('/');
    Some(StaticLease {
        mac: parse_mac(parts.next()?)?,
        ip: parts.next()?.parse::<Ipv4Addr>().ok()?,
        host_name: parts.next().map(str::to_owned),
    })
}

fn forward(text: &str) -> Option<Forward> {
    let mut parts = text.split('/');
    let transport = match parts.next()? {
        "udp" => Transport::Udp,
        _ => Transport::Tcp,
    };
    Some(Forward {
        transport,
        host: parts.next()?.parse().ok()?,
        guest: parts.next()?.parse().ok()?,
    })
}

/// The parts of an option that has several.
fn each<T>(
    options: &Bound<'_, PyDict>,
    option: &'static str,
    read: impl Fn(&str) -> Option<T>,
) -> PyResult<Vec<T>> {
    let texts: Vec<String> = get(options, option)?;
    let read = |text: &String| read(text).ok_or_else(|| odd(option, text));
    texts.iter().map(read).collect()
}

fn parsed<T: std::str::FromStr>(
    options: &Bound<'_, PyDict>,
    option: &'static str,
) -> PyResult<Option<T>> {
    let text: Option<String> = get(options, option)?;
    text.map(|text| parse(option, &text)).transpose()
}

fn parse<T: std::str::FromStr>(option: &'static str, text: &str) -> PyResult<T> {
    text.parse().map_err(|_| odd(option, text))
}

/// `virtnet.spec` lets no such thing through.
fn odd(option: &str, found: &str) -> PyErr {
    ConfigError::new_err(format!("user-net option {option}: found {found:?}"))
}

/// How a network stands, with the field names of `virtnet.UserNetStats`.
pub(crate) fn stats<'py>(py: Python<'py>, watch: &UserNetWatch) -> PyResult<Bound<'py, PyDict>> {
    let status = watch.status();
    let stats = PyDict::new(py);
    let leases = PyList::empty(py);
    let now_ns = virtnet_ports::monotonic_ns();
    for lease in &status.leases {
        let entry = PyDict::new(py);
        let mac = lease.mac.map(|byte| format!("{byte:02x}")).join(":");
        entry.set_item("mac", mac)?;
        entry.set_item("ip", lease.ip.to_string())?;
        entry.set_item("host_name", lease.host_name.as_deref())?;
        let left_s = |until: u64| until.saturating_sub(now_ns) / 1_000_000_000;
        entry.set_item("expires_s", lease.until_ns.map(left_s))?;
        leases.append(entry)?;
    }
    stats.set_item("leases", leases)?;
    stats.set_item("tcp_flows", status.tcp_flows)?;
    stats.set_item("udp_flows", status.udp_flows)?;
    stats.set_item("ping_flows", status.ping_flows)?;
    stats.set_item("flows", status.flows)?;
    stats.set_item("answered", status.answered)?;
    let lost = PyDict::new(py);
    for &reason in Lost::ALL {
        if status.lost(reason) > 0 {
            lost.set_item(reason.name(), status.lost(reason))?;
        }
    }
    stats.set_item("lost", lost)?;
    let listening = watch.listening().iter();
    let listening: Vec<_> = listening
        .map(|at| at.map(|at| at.to_string()).unwrap_or_default())
        .collect();
    stats.set_item("listening", listening)?;
    Ok(stats)
}
