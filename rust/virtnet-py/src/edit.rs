//! Header fields of many packets written at once, with the checksums that cover them.
//!
//! A checksum is changed by the difference that a field makes (RFC 1624), so that one that was wrong stays wrong, and payload is
//! never read. Where a sender left the checksum to be done, the field holds the sum of the pseudo-header, and that is kept up.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyByteArray;
use virtnet_packet::Offload;
use virtnet_packet::checksum::Sum;

use crate::columns::{Row, frame_at};
use crate::packets::{OFFLOAD_LEN, offload_from};

/// Writes `values` (one number a packet, two of an IPv6 address) into a field of those packets that have it; how many that are.
#[pyfunction]
pub(crate) fn edit(
    py: Python<'_>,
    data: &Bound<'_, PyByteArray>,
    starts: PyBuffer<u32>,
    lengths: PyBuffer<u32>,
    offloads: &[u8],
    field: &str,
    values: PyBuffer<u64>,
) -> PyResult<usize> {
    let mut bytes = data.to_vec();
    let (starts, lengths) = (starts.to_vec(py)?, lengths.to_vec(py)?);
    let values = values.to_vec(py)?;
    let per_packet = if matches!(field, "ip6_src" | "ip6_dst") {
        2
    } else {
        1
    };
    if lengths.len() != starts.len()
        || values.len() != per_packet * starts.len()
        || offloads.len() != OFFLOAD_LEN * starts.len()
    {
        return Err(PyValueError::new_err("a burst's columns differ in length"));
    }
    let mut edited = 0;
    for (i, value) in values.chunks_exact(per_packet).enumerate() {
        frame_at(&bytes, starts[i], lengths[i])?;
        let start = starts[i] as usize;
        let frame = &mut bytes[start..start + lengths[i] as usize];
        let offload = offload_from(&offloads[OFFLOAD_LEN * i..]);
        edited += usize::from(write(frame, &offload, field, value)?);
    }
    PyBuffer::<u8>::get(data)?.copy_from_slice(py, &bytes)?;
    Ok(edited)
}

/// Writes a field of one packet; false if it has none.
fn write(frame: &mut [u8], offload: &Offload, field: &str, value: &[u64]) -> PyResult<bool> {
    let row = Row::parse(frame);
    let low = value.first().copied().unwrap_or_default().to_be_bytes();
    let is_v4 = row.ip_version == 4;
    let is_v6 = row.ip_version == 6;
    let has_ports = row.l4_at > 0 && matches!(row.ip_proto, TCP | UDP);
    let wide: Vec<u8> = value.iter().flat_map(|half| half.to_be_bytes()).collect();
    // Where it is, what is written, and whether the header's and the transport's checksums cover it.
    let (is_there, at, new, in_header, in_pseudo, in_transport) = match field {
        "eth_dst" => (frame.len() >= 14, 0, &low[2..], false, false, false),
        "eth_src" => (frame.len() >= 14, 6, &low[2..], false, false, false),
        "vlan" => (row.vlan_at > 0, row.vlan_at, &low[6..], false, false, false),
        "ip_ttl" if is_v6 => (true, row.ip_at + 7, &low[7..], false, false, false),
        "ip_ttl" => (is_v4, row.ip_at + 8, &low[7..], true, false, false),
        "ip_src" => (is_v4, row.ip_at + 12, &low[4..], true, true, false),
        "ip_dst" => (is_v4, row.ip_at + 16, &low[4..], true, true, false),
        "ip6_src" => (is_v6, row.ip_at + 8, &wide[..], false, true, false),
        "ip6_dst" => (is_v6, row.ip_at + 24, &wide[..], false, true, false),
        "l4_src" => (has_ports, row.l4_at, &low[6..], false, false, true),
        "l4_dst" => (has_ports, row.l4_at + 2, &low[6..], false, false, true),
        _ => {
            return Err(PyKeyError::new_err(format!(
                "the field {field:?} cannot be written"
            )));
        }
    };
    if !is_there {
        return Ok(false);
    }
    // Checksums are of pairs of bytes.
    let (from, to) = (at & !1, (at + new.len() + 1) & !1);
    let (from, to) = if in_header {
        (from, to)
    } else {
        (at, at + new.len())
    };
    let Some(old) = frame.get(from..to).map(<[u8]>::to_vec) else {
        return Ok(false);
    };
    if field == "vlan" {
        // The upper four bits are priority and drop eligibility.
        let kept = old[0] & 0xf0;
        frame[at] = kept | (new[0] & 0x0f);
        frame[at + 1] = new[1];
        return Ok(true);
    }
    frame[at..at + new.len()].copy_from_slice(new);
    let new = frame[from..to].to_vec();
    if in_header {
        change_checksum(frame, row.ip_at + 10, &old, &new, false);
    }
    if (in_pseudo || in_transport)
        && let Some(offset) = transport_checksum(&row)
    {
        let is_left_to_do = offload.flags & Offload::NEEDS_CSUM != 0;
        let at = row.l4_at + offset;
        let is_none = row.ip_proto == UDP && frame.get(at..at + 2) == Some(&[0, 0]);
        if is_left_to_do && in_pseudo {
            change_partial_sum(frame, at, &old, &new);
        } else if !is_left_to_do && !is_none {
            change_checksum(frame, at, &old, &new, row.ip_proto == UDP);
        }
    }
    Ok(true)
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Where in its header a transport protocol has the checksum that covers the addresses.
fn transport_checksum(row: &Row) -> Option<usize> {
    match row.ip_proto {
        _ if row.l4_at == 0 => None,
        TCP => Some(16),
        UDP => Some(6),
        ICMPV6 if row.ip_version == 6 => Some(2),
        _ => None,
    }
}

fn change_checksum(frame: &mut [u8], at: usize, old: &[u8], new: &[u8], is_udp: bool) {
    let Some(&[high, low]) = frame.get(at..).and_then(<[u8]>::first_chunk) else {
        return;
    };
    let sum = changed(!u16::from_be_bytes([high, low]), old, new);
    let checksum = if is_udp {
        sum.checksum_not_zero()
    } else {
        sum.checksum()
    };
    frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

fn change_partial_sum(frame: &mut [u8], at: usize, old: &[u8], new: &[u8]) {
    let Some(&[high, low]) = frame.get(at..).and_then(<[u8]>::first_chunk) else {
        return;
    };
    let sum = !changed(u16::from_be_bytes([high, low]), old, new).checksum();
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// A sum in which some bytes have become others (RFC 1624, equation 3).
fn changed(sum: u16, old: &[u8], new: &[u8]) -> Sum {
    let without: Vec<u8> = old.iter().map(|byte| !byte).collect();
    Sum::of(&without).and(Sum::of(new)).and_word(sum)
}
