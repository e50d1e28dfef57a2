//! Packets on their way between the engine's bursts and Python's arrays.
//!
//! A burst is copied once in either direction: its bodies may lie in the memory of a guest, which Python must never see
//! change. In Python's hands packets are five buffers: bytes end to end, starts, lengths, offload metadata,
//! and hashes, where they came with any.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyTuple};
use virtnet_packet::{Burst, Offload};

use crate::columns::frame_at;

/// Bytes of a packet's offload metadata: the first ten of the virtio-net header.
pub(crate) const OFFLOAD_LEN: usize = 10;

/// Bytes of the hash that a packet came with: its value, and what was hashed.
const HASH_LEN: usize = 6;

/// Packets that belong to nobody else.
#[derive(Debug, Default)]
pub(crate) struct Packets {
    data: Vec<u8>,
    starts: Vec<u32>,
    lengths: Vec<u32>,
    offloads: Vec<u8>,
    /// Of all packets, or of none.
    hashes: Vec<u8>,
}

impl Packets {
    pub(crate) fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Appends a copy of all packets of a burst.
    pub(crate) fn append(&mut self, burst: &Burst) {
        let has_hashes = (0..burst.len()).any(|i| burst.hash(i).report > 0);
        if has_hashes && self.hashes.is_empty() {
            self.hashes.resize(HASH_LEN * self.len(), 0);
        }
        if has_hashes || !self.hashes.is_empty() {
            for hash in (0..burst.len()).map(|i| burst.hash(i)) {
                self.hashes.extend(hash.value.to_ne_bytes());
                self.hashes.extend(hash.report.to_ne_bytes());
            }
        }
        for i in 0..burst.len() {
            let start = self.data.len();
            let len = burst.frame_len(i);
            self.data.resize(start + len, 0);
            burst.copy_frame(i, &mut self.data[start..]);
            self.starts.push(u32::try_from(start).unwrap_or(u32::MAX));
            self.lengths.push(u32::try_from(len).unwrap_or(u32::MAX));
            self.offloads.extend(offload_bytes(burst.offload(i)));
        }
    }

    /// Takes away the packets from number `n` on.
    pub(crate) fn split_off(&mut self, n: usize) -> Self {
        let Some(&at) = self.starts.get(n) else {
            return Self::default();
        };
        Self {
            data: self.data.split_off(at as usize),
            starts: self
                .starts
                .split_off(n)
                .iter()
                .map(|start| start - at)
                .collect(),
            lengths: self.lengths.split_off(n),
            offloads: self.offloads.split_off(n * OFFLOAD_LEN),
            hashes: self.hashes.split_off((n * HASH_LEN).min(self.hashes.len())),
        }
    }

    /// Copies packets out of Python's buffers; the lists must be equally long and point into the data.
    pub(crate) fn from_python(
        py: Python<'_>,
        data: &Bound<'_, PyByteArray>,
        starts: &PyBuffer<u32>,
        lengths: &PyBuffer<u32>,
        offloads: &[u8],
    ) -> PyResult<Self> {
        let packets = Self {
            data: data.to_vec(),
            starts: starts.to_vec(py)?,
            lengths: lengths.to_vec(py)?,
            offloads: offloads.to_vec(),
            hashes: Vec::new(),
        };
        let n = packets.len();
        if packets.starts.len() != n || packets.offloads.len() != n * OFFLOAD_LEN {
            return Err(PyValueError::new_err("a burst's columns differ in length"));
        }
        for i in 0..n {
            frame_at(&packets.data, packets.starts[i], packets.lengths[i])?;
        }
        Ok(packets)
    }

    /// Appends packets from number `first` on to a burst, as many as it has room for; how many.
    pub(crate) fn fill(&self, first: usize, burst: &mut Burst) -> usize {
        let n = burst.room().min(self.len().saturating_sub(first));
        for i in first..first + n {
            let (start, len) = (self.starts[i] as usize, self.lengths[i] as usize);
            let offload = &self.offloads[i * OFFLOAD_LEN..];
            burst.push_bytes(&self.data[start..start + len], offload_from(offload));
        }
        n
    }

    /// The five buffers that `virtnet.burst` makes its arrays of.
    pub(crate) fn into_python(self, py: Python<'_>) -> PyResult<Bound<'_, PyTuple>> {
        (
            PyByteArray::new(py, &self.data),
            native_bytes(py, &self.starts),
            native_bytes(py, &self.lengths),
            PyByteArray::new(py, &self.offloads),
            PyBytes::new(py, &self.hashes),
        )
            .into_pyobject(py)
    }
}

fn native_bytes<'py>(py: Python<'py>, numbers: &[u32]) -> Bound<'py, PyBytes> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
    PyBytes::new(py, &bytes)
}

pub(crate) fn offload_bytes(offload: Offload) -> [u8; OFFLOAD_LEN] {
    let [h0, h1] = offload.hdr_len.to_le_bytes();
    let [g0, g1] = offload.gso_size.to_le_bytes();
    let [s0, s1] = offload.csum_start.to_le_bytes();
    let [o0, o1] = offload.csum_offset.to_le_bytes();
    [
        offload.flags,
        offload.gso_type,
        h0,
        h1,
        g0,
        g1,
        s0,
        s1,
        o0,
        o1,
    ]
}

pub(crate) fn offload_from(bytes: &[u8]) -> Offload {
    let Some(&[flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1]) = bytes.first_chunk() else {
        return Offload::default();
    };
    Offload {
        flags,
        gso_type,
        hdr_len: u16::from_le_bytes([h0, h1]),
        gso_size: u16::from_le_bytes([g0, g1]),
        csum_start: u16::from_le_bytes([s0, s1]),
        csum_offset: u16::from_le_bytes([o0, o1]),
    }
}
