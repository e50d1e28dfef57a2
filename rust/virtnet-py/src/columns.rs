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

/// Extension headers looked at before giving up on an IPv6 packet.
const EXTENSIONS_MAX: usize = 8;

/// The headers of a burst's packets. A column is made when it is asked for: most programs look at two or three.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct Headers {
    rows: Vec<Row>,
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
            .map(|(&start, &len)| frame_at(&data, start, len).map(Row::parse))
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

fn pack<const N: usize>(rows: &[Row], field: impl Fn(&Row) -> [u8; N]) -> Vec<u8> {
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

/// The fields of one packet.
#[derive(Debug)]
pub(crate) struct Row {
    eth_dst: u64,
    eth_src: u64,
    eth_type: u16,
    vlan: i16,
    pub(crate) ip_version: u8,
    pub(crate) ip_proto: u8,
    ip_ttl: u8,
    ip_src: u32,
    ip_dst: u32,
    ip6_src: u128,
    ip6_dst: u128,
    l4_src: u16,
    l4_dst: u16,
    tcp_flags: u8,
    payload: u32,
    /// Where the number of the outer VLAN, the network's and the transport's header begin; 0 without.
    pub(crate) vlan_at: usize,
    pub(crate) ip_at: usize,
    pub(crate) l4_at: usize,
}

impl Row {
    pub(crate) fn parse(frame: &[u8]) -> Self {
        let mut row = Self {
            eth_dst: 0,
            eth_src: 0,
            eth_type: 0,
            vlan: -1,
            ip_version: 0,
            ip_proto: 0,
            ip_ttl: 0,
            ip_src: 0,
            ip_dst: 0,
            ip6_src: 0,
            ip6_dst: 0,
            l4_src: 0,
            l4_dst: 0,
            tcp_flags: 0,
            payload: 0,
            vlan_at: 0,
            ip_at: 0,
            l4_at: 0,
        };
        // Each step leaves in the row what it found; a packet that ends early ends the parsing, not the row.
        let _whole = row.ethernet(&mut Reader { frame, at: 0 });
        row
    }

    fn ethernet(&mut self, from: &mut Reader<'_>) -> Option<()> {
        self.eth_dst = from.mac()?;
        self.eth_src = from.mac()?;
        self.eth_type = from.u16()?;
        while matches!(self.eth_type, 0x8100 | 0x88a8 | 0x9100) {
            let at = from.at;
            let tag = from.u16()?;
            if self.vlan < 0 {
                self.vlan_at = at;
                self.vlan = i16::try_from(tag & 0x0fff).unwrap_or_default();
            }
            self.eth_type = from.u16()?;
        }
        self.payload = from.position();
        match self.eth_type {
            0x0800 => self.ipv4(from),
            0x86dd => self.ipv6(from),
            _ => Some(()),
        }
    }

    fn ipv4(&mut self, from: &mut Reader<'_>) -> Option<()> {
        let start = from.at;
        let first = from.u8()?;
        let header_len = usize::from(first & 0x0f) * 4;
        if first >> 4 != 4 || header_len < 20 {
            return None;
        }
        from.skip(5)?;
        let fragment = from.u16()?;
        self.ip_ttl = from.u8()?;
        self.ip_proto = from.u8()?;
        from.skip(2)?;
        self.ip_src = from.u32()?;
        self.ip_dst = from.u32()?;
        self.ip_version = 4;
        self.ip_at = start;
        from.at = start;
        from.skip(header_len)?;
        self.payload = from.position();
        if fragment & 0x1fff != 0 {
            return Some(());
        }
        self.transport(from)
    }

    fn ipv6(&mut self, from: &mut Reader<'_>) -> Option<()> {
        let start = from.at;
        if from.u8()? >> 4 != 6 {
            return None;
        }
        from.skip(5)?;
        self.ip_proto = from.u8()?;
        self.ip_ttl = from.u8()?;
        self.ip6_src = from.u128()?;
        self.ip6_dst = from.u128()?;
        self.ip_version = 6;
        self.ip_at = start;
        self.payload = from.position();
        for _ in 0..EXTENSIONS_MAX {
            let fragment = match self.ip_proto {
                // Hop-by-hop, routing, destination options, mobility, host identity, shim6.
                0 | 43 | 60 | 135 | 139 | 140 => {
                    self.ip_proto = from.u8()?;
                    let len = usize::from(from.u8()?);
                    from.skip(len * 8 + 6)?;
                    0
                }
                44 => {
                    self.ip_proto = from.u8()?;
                    from.skip(1)?;
                    let offset = from.u16()? >> 3;
                    from.skip(4)?;
                    offset
                }
                51 => {
                    self.ip_proto = from.u8()?;
                    let len = usize::from(from.u8()?);
                    from.skip(len * 4 + 6)?;
                    0
                }
                _ => break,
            };
            self.payload = from.position();
            if fragment != 0 {
                return Some(());
            }
        }
        self.transport(from)
    }

    fn transport(&mut self, from: &mut Reader<'_>) -> Option<()> {
        let start = from.at;
        self.l4_at = start;
        match self.ip_proto {
            6 => {
                self.l4_src = from.u16()?;
                self.l4_dst = from.u16()?;
                from.skip(8)?;
                let header_len = usize::from(from.u8()? >> 4) * 4;
                self.tcp_flags = from.u8()?;
                from.at = start;
                from.skip(header_len)?;
            }
            17 | 132 => {
                self.l4_src = from.u16()?;
                self.l4_dst = from.u16()?;
                from.skip(if self.ip_proto == 17 { 4 } else { 8 })?;
            }
            _ => return Some(()),
        }
        self.payload = from.position();
        Some(())
    }
}

/// Reads a frame front to back; `None` at its end.
struct Reader<'frame> {
    frame: &'frame [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.frame.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(bytes)
    }

    fn skip(&mut self, n: usize) -> Option<()> {
        self.frame.get(self.at..self.at + n)?;
        self.at += n;
        Some(())
    }

    fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u128(&mut self) -> Option<u128> {
        self.take().map(u128::from_be_bytes)
    }

    fn mac(&mut self) -> Option<u64> {
        let [a, b, c, d, e, f] = self.take()?;
        Some(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    fn position(&self) -> u32 {
        u32::try_from(self.at).unwrap_or(u32::MAX)
    }
}
