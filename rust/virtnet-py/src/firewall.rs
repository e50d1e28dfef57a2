//! Firewalls as `virtnet.firewalling` prepares them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_engine::{
    Action, AddressSet, Ends, Filter, FirewallOrders, Prefix, Rule, RuleSet, Timeouts,
};
use virtnet_packet::flow::IpVersion;

use crate::functions::filter;
use crate::open::get;

/// Addresses of IPv4 and of IPv6, each with its length behind.
type Packed = (Vec<u8>, Vec<u8>);

/// What a firewall is to do.
pub(crate) fn orders(options: &Bound<'_, PyDict>) -> PyResult<FirewallOrders> {
    let rules: Vec<Bound<'_, PyDict>> = get(options, "rules")?;
    let rules = rules.iter().map(rule).collect::<PyResult<_>>()?;
    let sets: Vec<Packed> = get(options, "sets")?;
    let sets = sets
        .iter()
        .map(|packed| Arc::new(prefixes(packed).collect::<AddressSet>()))
        .collect();
    let fragments: String = get(options, "fragments")?;
    Ok(FirewallOrders {
        rules: Arc::new(RuleSet::new(
            rules,
            sets,
            action(&get::<String>(options, "default")?),
            fragments == "follow",
        )),
        timeouts: timeouts(options)?,
    })
}

fn timeouts(options: &Bound<'_, PyDict>) -> PyResult<Timeouts> {
    let seconds: BTreeMap<String, f64> = get(options, "timeouts")?;
    let usual = Timeouts::default();
    let of = |name: &str, usual: Duration| match seconds.get(name) {
        Some(&seconds) => Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX),
        None => usual,
    };
    Ok(Timeouts {
        tcp_opening: of("tcp_opening", usual.tcp_opening),
        tcp: of("tcp", usual.tcp),
        tcp_closing: of("tcp_closing", usual.tcp_closing),
        unanswered: of("unanswered", usual.unanswered),
        udp: of("udp", usual.udp),
        icmp: of("icmp", usual.icmp),
        other: of("other", usual.other),
    })
}

fn rule(described: &Bound<'_, PyDict>) -> PyResult<Rule> {
    let version: Option<u8> = get(described, "version")?;
    let program = described.get_item("program")?;
    let matches: Option<Filter> = match program {
        Some(program) if !program.is_none() => Some(filter(described)?),
        _ => None,
    };
    Ok(Rule {
        action: action(&get::<String>(described, "action")?),
        came_in_by: get(described, "came_in_by")?,
        version: version.map(|version| match version {
            6 => IpVersion::V6,
            _ => IpVersion::V4,
        }),
        protocols: get(described, "protocols")?,
        ethertype: get(described, "ethertype")?,
        from: ends(described, "source")?,
        to: ends(described, "destination")?,
        filter: matches,
        keep_state: get(described, "keep_state")?,
        text: get(described, "text")?,
    })
}

fn action(name: &str) -> Action {
    match name {
        "pass" => Action::Pass,
        "reject" => Action::Reject,
        _ => Action::Drop,
    }
}

fn ends(described: &Bound<'_, PyDict>, which: &str) -> PyResult<Ends> {
    let (not, packed, sets, ports): (bool, Packed, Vec<usize>, Vec<(u16, u16)>) =
        get(described, which)?;
    Ok(Ends {
        not,
        prefixes: prefixes(&packed).collect(),
        sets,
        ports,
    })
}

fn prefixes(packed: &Packed) -> impl Iterator<Item = Prefix> + '_ {
    let v4 = packed.0.as_chunks::<5>().0.iter();
    let v6 = packed.1.as_chunks::<17>().0.iter();
    let v4 = v4.map(|&[a, b, c, d, len]| Prefix {
        version: IpVersion::V4,
        address: u32::from_be_bytes([a, b, c, d]).into(),
        len,
    });
    v4.chain(v6.filter_map(|bytes| {
        let (&len, address) = bytes.split_last()?;
        Some(Prefix {
            version: IpVersion::V6,
            address: u128::from_be_bytes(address.try_into().ok()?),
            len,
        })
    }))
}
