//! Headers as columns: what `burst.columns` shows.
//!
//! Each packet is parsed once from its bytes, front to back, and whatever a packet does not have stays zero: a packet of
//! any content gives a row, never an error. Columns come back as packed native-endian arrays, which numpy takes as they are.
//!
//! It works on the copy that Python holds, after a burst has left the engine; the packet path does not use it.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};
use virtnet_packet::Fields;

/// The headers of a burst's packets. A column is made when it is asked for: most programs look at two or three.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct Headers {
    rows: Vec<Fields>,
}

#[pymethods]
impl Headers {
    /// Parses the packets that lie in `data` at `starts` with `lengths`.
    #[new]
    fn parse(
        py: Python<'_>,
        data: &Bound<'_, PyByteArray>,
        starts: PyBuffer<u32>,
        lengths: PyBuffer<u32>,
    ) -> PyResult<Self> {
        let data = data.to_vec();
        let (starts, lengths) = (starts.to_vec(py)?, lengths.to_vec(py)?);
        let rows = starts
            .iter()
            .zip(&lengths)
            .map(|(&start, &len)| frame_at(&data, start, len).map(Fields::parse))
            .collect::<PyResult<Vec<_>>>()?;
        Ok(Self { rows })
    }

    /// One column as a packed native-endian array.
    fn column<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let rows = &self.rows;
        let bytes = match name {
            "eth_dst" => pack(rows, |row| row.eth_dst.to_ne_bytes()),
            "eth_src" => pack(rows, |row| row.eth_src.to_ne_bytes()),
            "eth_type" => pack(rows, |row| row.eth_type.to_ne_bytes()),
            "vlan" => pack(rows, |row| row.vlan.to_ne_bytes()),
            "ip_version" => pack(rows, |row| [row.ip_version]),
            "ip_proto" => pack(rows, |row| [row.ip_proto]),
            "ip_ttl" => pack(rows, |row| [row.ip_ttl]),
            "ip_src" => pack(rows, |row| row.ip_src.to_ne_bytes()),
            "ip_dst" => pack(rows, |row| row.ip_dst.to_ne_bytes()),
            "ip6_src" => pack(rows, |row| halves(row.ip6_src)),
            "ip6_dst" => pack(rows, |row| halves(row.ip6_dst)),
            "l4_src" => pack(rows, |row| row.l4_src.to_ne_bytes()),
            "l4_dst" => pack(rows, |row| row.l4_dst.to_ne_bytes()),
            "tcp_flags" => pack(rows, |row| [row.tcp_flags]),
            "payload" => pack(rows, |row| row.payload.to_ne_bytes()),
            _ => return Err(PyKeyError::new_err(format!("there is no column {name:?}"))),
        };
        Ok(PyBytes::new(py, &bytes))
    }
}

/// The bytes of one packet.
pub(crate) fn frame_at(data: &[u8], start: u32, len: u32) -> PyResult<&[u8]> {
    let (start, len) = (start as usize, len as usize);
    data.get(start..start + len).ok_or_else(|| {
        PyValueError::new_err(format!(
            "a packet of {len} bytes at {start} lies outside the burst's {} bytes",
            data.len()
        ))
    })
}

fn pack<const N: usize>(rows: &[Fields], field: impl Fn(&Fields) -> [u8; N]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(rows.len() * N);
    rows.iter()
        .for_each(|row| bytes.extend_from_slice(&field(row)));
    bytes
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
