//! From the names and arguments of `virtnet.VirtioUserPort`'s requests to commands of a control queue, and from answers to values.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_packet::header::Mac;
use virtnet_virtio::net::control::{Coalescing, Command, ReceiveMode, RssConfig, StatsAsked};
use virtnet_virtio::net::rss::HashTypes;

use crate::errors::{ConfigError, PeerError};
use crate::open::get;

/// The command of a request; `virtnet.ports` has checked the arguments.
pub(crate) fn command(name: &str, arguments: &Bound<'_, PyDict>) -> PyResult<Command> {
    Ok(match name {
        "receive_mode" => {
            let number: usize = get(arguments, "mode")?;
            let mode = ReceiveMode::ALL.get(number).copied();
            let mode = mode.ok_or_else(|| ConfigError::new_err("there is no such receive mode"))?;
            Command::Receive(mode, get(arguments, "on")?)
        }
        "mac_table" => {
            let macs = |name: &str| -> PyResult<Vec<Mac>> {
                let macs: Vec<[u8; 6]> = get(arguments, name)?;
                Ok(macs.into_iter().map(Mac).collect())
            };
            Command::MacTable {
                unicast: macs("unicast")?,
                multicast: macs("multicast")?,
            }
        }
        "mac" => Command::SetMac(Mac(get(arguments, "mac")?)),
        "vlan" => {
            let vlan = get(arguments, "vlan")?;
            if get(arguments, "receive")? {
                Command::AddVlan(vlan)
            } else {
                Command::RemoveVlan(vlan)
            }
        }
        "queue_pairs" => Command::SetPairs(get(arguments, "n")?),
        "rss" => Command::Rss(RssConfig {
            types: HashTypes::from_bits_retain(get(arguments, "types")?),
            table: get(arguments, "table")?,
            unclassified: get(arguments, "unclassified")?,
            transmitqs: get(arguments, "transmitqs")?,
            key: get(arguments, "key")?,
        }),
        "hash" => Command::Hash(
            HashTypes::from_bits_retain(get(arguments, "types")?),
            get(arguments, "key")?,
        ),
        "offloads" => Command::SetOffloads(get(arguments, "offloads")?),
        "coalescing" => {
            let to = Coalescing {
                max_packets: get(arguments, "max_packets")?,
                max_usecs: get(arguments, "max_usecs")?,
            };
            match get::<Option<u16>>(arguments, "queue")? {
                Some(queue) => Command::CoalesceQueue(queue, to),
                None if get(arguments, "receive")? => Command::CoalesceReceive(to),
                None => Command::CoalesceTransmit(to),
            }
        }
        "stats" => Command::Stats(
            get::<Vec<(u16, u64)>>(arguments, "asked")?
                .into_iter()
                .map(|(queue, types)| StatsAsked { queue, types })
                .collect(),
        ),
        _ => {
            return Err(ConfigError::new_err(format!(
                "there is no command {name:?}"
            )));
        }
    })
}

/// Statistics out of an answer: of each queue that was asked for, its number and the numbers counted there.
///
/// Spec: virtio 1.4, 5.1.9.5.11, Device Statistics.
pub(crate) fn stats(answer: &[u8]) -> PyResult<Vec<(u16, Vec<u64>)>> {
    let nonsense = || PeerError::new_err("the device's statistics make no sense");
    let mut entries = Vec::new();
    let mut rest = answer;
    while !rest.is_empty() {
        let &[_, _, low, high, _, _, size_low, size_high] =
            rest.first_chunk().ok_or_else(nonsense)?;
        let size = usize::from(u16::from_le_bytes([size_low, size_high]));
        let (entry, after) = rest.split_at_checked(size).ok_or_else(nonsense)?;
        let (numbers, odd) = entry.get(8..).ok_or_else(nonsense)?.as_chunks();
        if !odd.is_empty() {
            return Err(nonsense());
        }
        let numbers = numbers.iter().map(|&number| u64::from_le_bytes(number));
        entries.push((u16::from_le_bytes([low, high]), numbers.collect()));
        rest = after;
    }
    Ok(entries)
}
