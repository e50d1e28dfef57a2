//! Headers as columns: what `burst.columns` shows.
//!
//! Each packet is parsed once from its bytes, front to back, and whatever a packet does not have stays zero: a packet of
//! any content gives a row, never an error. Columns come back as packed native-endian arrays, which numpy takes as they are.
//!
//! It works on the copy that Python holds, after a burst has left the engine; the packet path does not use it.

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use virtnet_packet::Fields;

use crate::packets::Packets;

/// The headers of a burst's packets, whatever these are: all of a packet's are found on one way through it.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct Headers {
    rows: Vec<Fields>,
}

#[pymethods]
impl Headers {
    /// Parses packets.
    #[new]
    fn parse(py: Python<'_>, packets: &Packets) -> PyResult<Self> {
        let data = packets.bytes(py)?;
        let rows = packets.frames(&data).map(Fields::parse).collect();
        Ok(Self { rows })
    }

    /// One column as a packed native-endian array.
    fn column<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = pack(self, name)?.unwrap_or_default();
        Ok(PyBytes::new(py, &bytes))
    }
}

/// Where columns come from.
pub(crate) trait Rows {
    /// A field of each packet, one behind the other; `None` if this is not for these packets.
    fn pack<const N: usize>(&self, field: impl Fn(&Fields) -> [u8; N]) -> Option<Vec<u8>>;
}

impl Rows for Headers {
    fn pack<const N: usize>(&self, field: impl Fn(&Fields) -> [u8; N]) -> Option<Vec<u8>> {
        Some(self.rows.iter().flat_map(field).collect())
    }
}

/// Packets that are of the usual kind, all of them: what they have is where it always is, and a column is read by itself. That takes
/// a third of what it takes to parse them.
pub(crate) struct Usual<Frames>(pub(crate) Frames);

impl<'a, Frames: ExactSizeIterator<Item = &'a [u8]> + Clone> Rows for Usual<Frames> {
    #[inline]
    fn pack<const N: usize>(&self, field: impl Fn(&Fields) -> [u8; N]) -> Option<Vec<u8>> {
        let mut column = vec![0; N * self.0.len()];
        let (places, _) = column.as_chunks_mut();
        for (place, frame) in places.iter_mut().zip(self.0.clone()) {
            *place = field(&Fields::of_usual(frame)?);
        }
        Some(column)
    }
}

/// The column of a name; `None` if the rows are not for these packets.
pub(crate) fn pack(rows: &impl Rows, name: &str) -> PyResult<Option<Vec<u8>>> {
    Ok(match name {
        "eth_dst" => rows.pack(|row| row.eth_dst.to_ne_bytes()),
        "eth_src" => rows.pack(|row| row.eth_src.to_ne_bytes()),
        "eth_type" => rows.pack(|row| row.eth_type.to_ne_bytes()),
        "vlan" => rows.pack(|row| row.vlan.to_ne_bytes()),
        "ip_version" => rows.pack(|row| [row.ip_version]),
        "ip_proto" => rows.pack(|row| [row.ip_proto]),
        "ip_ttl" => rows.pack(|row| [row.ip_ttl]),
        "ip_src" => rows.pack(|row| row.ip_src.to_ne_bytes()),
        "ip_dst" => rows.pack(|row| row.ip_dst.to_ne_bytes()),
        "ip6_src" => rows.pack(|row| halves(row.ip6_src)),
        "ip6_dst" => rows.pack(|row| halves(row.ip6_dst)),
        "l4_src" => rows.pack(|row| row.l4_src.to_ne_bytes()),
        "l4_dst" => rows.pack(|row| row.l4_dst.to_ne_bytes()),
        "tcp_flags" => rows.pack(|row| [row.tcp_flags]),
        "payload" => rows.pack(|row| row.payload.to_ne_bytes()),
        _ => return Err(PyKeyError::new_err(format!("there is no column {name:?}"))),
    })
}

/// An IPv6 address as two numbers, the network's half first.
fn halves(address: u128) -> [u8; 16] {
    let mut bytes = [0; 16];
    let (high, low) = bytes.split_at_mut(8);
    let number = |half: u128| u64::try_from(half & u128::from(u64::MAX)).unwrap_or_default();
    high.copy_from_slice(&number(address >> 64).to_ne_bytes());
    low.copy_from_slice(&number(address).to_ne_bytes());
    bytes
}
