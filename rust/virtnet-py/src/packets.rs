//! Packets on their way between the engine's bursts and Python's.
//!
//! A burst is copied once in either direction: its bodies may lie in the memory of a guest, which Python must never see
//! change. In Python's hands packets are a [`Packets`]: bytes end to end that Python may write, and beside them where each packet
//! starts, its length and what else is known of it. A part of a burst is another of these over the same bytes.

use std::fmt;
use std::ops::Range;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyByteArray, PyBytes};
use virtnet_packet::{Burst, HEAD_MAX, Offload, Origin};

use crate::columns::{self, Usual};
use crate::edit;

/// Bytes of a packet's offload metadata: the first ten of the virtio-net header.
pub(crate) const OFFLOAD_LEN: usize = 10;

/// Bytes of the hash that a packet came with: its value, and what was hashed.
const HASH_LEN: usize = 6;

/// Bytes of where a packet was seen.
const ORIGIN_LEN: usize = 4;

/// Packets that Python has not got yet.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    data: Vec<u8>,
    starts: Vec<u32>,
    lengths: Vec<u32>,
    /// Of all packets, or of none where all are plain.
    offloads: Vec<u8>,
    /// Of all packets, or of none.
    hashes: Vec<u8>,
}

impl Taken {
    /// Makes room for as many packets as are usual, with their bytes.
    pub(crate) fn reserve(&mut self, (packets, bytes): (usize, usize)) {
        self.data.reserve(bytes);
        self.starts.reserve(packets);
        self.lengths.reserve(packets);
    }

    pub(crate) fn len(&self) -> usize {
        self.lengths.len()
    }

    /// How many packets, and bytes.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.len(), self.data.len())
    }

    /// Appends a copy of all packets of a burst.
    pub(crate) fn append(&mut self, burst: &Burst) {
        let packets = 0..burst.len();
        self.append_rare(burst);
        for i in packets {
            let (start, len) = (self.data.len(), burst.frame_len(i));
            if len <= HEAD_MAX {
                self.data.extend_from_slice(burst.head(i));
            } else {
                self.data.resize(start + len, 0);
                burst.copy_frame(i, &mut self.data[start..]);
            }
            self.starts.push(u32::try_from(start).unwrap_or(u32::MAX));
            self.lengths.push(u32::try_from(len).unwrap_or(u32::MAX));
        }
    }

    /// Appends what most bursts do not have.
    fn append_rare(&mut self, burst: &Burst) {
        let (packets, before) = (0..burst.len(), self.len());
        let has_hashes = packets.clone().any(|i| burst.hash(i).report > 0);
        if has_hashes || !self.hashes.is_empty() {
            self.hashes.resize(HASH_LEN * before, 0);
            for hash in packets.clone().map(|i| burst.hash(i)) {
                self.hashes.extend(hash.value.to_ne_bytes());
                self.hashes.extend(hash.report.to_ne_bytes());
            }
        }
        let is_plain = packets.clone().all(|i| burst.offload(i).is_plain());
        if !is_plain || !self.offloads.is_empty() {
            self.offloads.resize(OFFLOAD_LEN * before, 0);
            packets.for_each(|i| self.offloads.extend(offload_bytes(burst.offload(i))));
        }
    }

    /// Takes away the packets from number `n` on.
    pub(crate) fn split_off(&mut self, n: usize) -> Self {
        let Some(&at) = self.starts.get(n) else {
            return Self::default();
        };
        let rest = |all: &mut Vec<u8>, len: usize| all.split_off((n * len).min(all.len()));
        Self {
            data: self.data.split_off(at as usize),
            starts: self
                .starts
                .split_off(n)
                .iter()
                .map(|start| start - at)
                .collect(),
            lengths: self.lengths.split_off(n),
            offloads: rest(&mut self.offloads, OFFLOAD_LEN),
            hashes: rest(&mut self.hashes, HASH_LEN),
        }
    }

    /// Appends packets from number `first` on to a burst, as many as it has room for; how many.
    pub(crate) fn fill(&self, first: usize, burst: &mut Burst) -> usize {
        let n = burst.room().min(self.len().saturating_sub(first));
        for i in first..first + n {
            let (start, len) = (self.starts[i] as usize, self.lengths[i] as usize);
            let offload = self.offloads.get(i * OFFLOAD_LEN..);
            let offload = offload.map_or_else(Offload::default, offload_from);
            burst.push_bytes(&self.data[start..start + len], offload);
        }
        n
    }
}

/// The packets of a burst in Python's hands.
#[pyclass(frozen, module = "virtnet._virtnet")]
pub(crate) struct Packets {
    /// Shared by all parts of a burst.
    data: Py<PyByteArray>,
    /// Where each starts in the data, and its length.
    starts: Vec<u32>,
    lengths: Vec<u32>,
    /// No packet ends behind this.
    end: usize,
    offloads: Offloads,
    /// These of all packets, or of none.
    hashes: Vec<u8>,
    times: Vec<u8>,
    wire_lengths: Vec<u8>,
    origins: Vec<u8>,
}

impl fmt::Debug for Packets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packets({})", self.lengths.len())
    }
}

#[pymethods]
impl Packets {
    #[new]
    #[pyo3(signature = (data, starts, lengths, offloads=None, times=None, wire_lengths=None, origins=None))]
    fn new(
        data: Bound<'_, PyByteArray>,
        starts: &[u8],
        lengths: &[u8],
        offloads: Option<&[u8]>,
        times: Option<&[u8]>,
        wire_lengths: Option<&[u8]>,
        origins: Option<&[u8]>,
    ) -> PyResult<Self> {
        let py = data.py();
        let (starts, lengths) = (words(starts), words(lengths));
        let n = lengths.len();
        let is_for_all = |part: Option<&[u8]>, len| part.is_none_or(|part| part.len() == n * len);
        if starts.len() != n
            || !is_for_all(offloads, OFFLOAD_LEN)
            || !is_for_all(times, 8)
            || !is_for_all(wire_lengths, 4)
            || !is_for_all(origins, ORIGIN_LEN)
        {
            return Err(PyValueError::new_err("a burst's columns differ in length"));
        }
        let ends = starts.iter().zip(&lengths);
        let end = ends
            .map(|(&start, &len)| start as usize + len as usize)
            .max();
        Ok(Self {
            data: data.unbind(),
            starts,
            lengths,
            end: end.unwrap_or_default(),
            offloads: Offloads::of(py, offloads.unwrap_or_default()),
            hashes: Vec::new(),
            times: times.unwrap_or_default().to_vec(),
            wire_lengths: wire_lengths.unwrap_or_default().to_vec(),
            origins: origins.unwrap_or_default().to_vec(),
        })
    }

    fn __len__(&self) -> usize {
        self.lengths.len()
    }

    #[getter]
    fn data(&self, py: Python<'_>) -> Py<PyByteArray> {
        self.data.clone_ref(py)
    }

    fn n_bytes(&self) -> u64 {
        self.lengths.iter().copied().map(u64::from).sum()
    }

    fn span(&self, i: usize) -> PyResult<(u32, u32)> {
        match (self.starts.get(i), self.lengths.get(i)) {
            (Some(&start), Some(&len)) => Ok((start, len)),
            _ => Err(Self::no_packet(i, self.lengths.len())),
        }
    }

    fn lengths<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, 4 * self.lengths.len(), |bytes| {
            let (places, _) = bytes.as_chunks_mut();
            for (place, len) in places.iter_mut().zip(&self.lengths) {
                *place = len.to_ne_bytes();
            }
            Ok(())
        })
    }

    /// The metadata of these packets begin in the array at a number.
    fn offloads(&self, py: Python<'_>) -> (Py<PyByteArray>, usize) {
        let array = self.offloads.array(py, self.lengths.len());
        (array.clone_ref(py), self.offloads.first)
    }

    fn hashes(&self) -> &[u8] {
        &self.hashes
    }

    fn times(&self) -> &[u8] {
        &self.times
    }

    fn wire_lengths(&self) -> &[u8] {
        &self.wire_lengths
    }

    fn origins(&self) -> &[u8] {
        &self.origins
    }

    /// Some of the packets, by number.
    fn pick(&self, py: Python<'_>, numbers: PyBuffer<i64>) -> PyResult<Self> {
        let n = self.lengths.len();
        let numbers = numbers.to_vec(py)?.into_iter().map(|number| {
            let number = if number < 0 {
                number.saturating_add_unsigned(n as u64)
            } else {
                number
            };
            usize::try_from(number)
                .ok()
                .filter(|&i| i < n)
                .ok_or_else(|| Self::no_packet(number, n))
        });
        let numbers = numbers.collect::<PyResult<Vec<_>>>()?;
        Ok(self.chosen(py, &numbers))
    }

    /// The `n` packets from number `first` on, which there are. Their metadata stay those of the whole.
    fn part(&self, py: Python<'_>, first: usize, n: usize) -> PyResult<Self> {
        let all = self.lengths.len();
        if first + n > all {
            return Err(Self::no_packet(first + n, all));
        }
        let numbers: Vec<_> = (first..first + n).collect();
        Ok(Self {
            offloads: self.offloads.from(py, first, all),
            ..self.chosen(py, &numbers)
        })
    }

    /// The packets cut after some bytes.
    fn cut(&self, py: Python<'_>, length: u32) -> Self {
        let lengths = self.lengths.iter().map(|&len| len.min(length)).collect();
        Self {
            data: self.data.clone_ref(py),
            starts: self.starts.clone(),
            lengths,
            end: self.end,
            offloads: self.offloads.from(py, 0, self.lengths.len()),
            hashes: self.hashes.clone(),
            times: self.times.clone(),
            wire_lengths: self.wire_lengths.clone(),
            origins: self.origins.clone(),
        }
    }

    /// One column, if all packets are of the usual kind; `Headers` has those of any.
    fn usual_column<'py>(
        &self,
        py: Python<'py>,
        name: &str,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let data = self.bytes(py)?;
        let column = columns::pack(&Usual(self.frames(&data)), name)?;
        Ok(column.map(|column| PyBytes::new(py, &column)))
    }

    /// Writes `values` (one number a packet, two of an IPv6 address) into a field of those packets that have it; how many that are.
    fn edit(&self, py: Python<'_>, field: &str, values: PyBuffer<u64>) -> PyResult<usize> {
        let mut data = self.bytes(py)?;
        let offloads = self.offloads.copied(py);
        let packets = self.spans().enumerate().map(|(i, span)| {
            let offload = offloads.get(i * OFFLOAD_LEN..);
            (span, offload.map_or_else(Offload::default, offload_from))
        });
        let edited = edit::edit(&mut data, packets, field, &values.to_vec(py)?)?;
        PyBuffer::<u8>::get(self.data.bind(py))?.copy_from_slice(py, &data)?;
        Ok(edited)
    }
}

impl Packets {
    /// The same packets for Python.
    pub(crate) fn of(py: Python<'_>, taken: Taken) -> Self {
        Self {
            data: PyByteArray::new(py, &taken.data).unbind(),
            end: taken.data.len(),
            starts: taken.starts,
            lengths: taken.lengths,
            offloads: Offloads::of(py, &taken.offloads),
            hashes: taken.hashes,
            times: Vec::new(),
            wire_lengths: Vec::new(),
            origins: Vec::new(),
        }
    }

    /// A copy that Python cannot change.
    pub(crate) fn taken(&self, py: Python<'_>) -> PyResult<Taken> {
        Ok(Taken {
            data: self.bytes(py)?,
            starts: self.starts.clone(),
            lengths: self.lengths.clone(),
            offloads: self.offloads.copied(py),
            hashes: Vec::new(),
        })
    }

    /// A copy of the data, which has all packets: Python could have made it shorter.
    pub(crate) fn bytes(&self, py: Python<'_>) -> PyResult<Vec<u8>> {
        let data = self.data.bind(py).to_vec();
        if data.len() < self.end {
            let (found, end) = (data.len(), self.end);
            return Err(PyValueError::new_err(format!(
                "the packets of a burst end at byte {end}, but it has been cut to {found} bytes"
            )));
        }
        Ok(data)
    }

    /// Where each packet is in the data.
    fn spans(&self) -> impl ExactSizeIterator<Item = Range<usize>> + Clone {
        let spans = self.starts.iter().zip(&self.lengths);
        spans.map(|(&start, &len)| start as usize..start as usize + len as usize)
    }

    /// Each packet in a copy of the data.
    pub(crate) fn frames<'a>(
        &'a self,
        data: &'a [u8],
    ) -> impl ExactSizeIterator<Item = &'a [u8]> + Clone {
        self.spans().map(|span| &data[span])
    }

    /// The packets of these numbers, which there are.
    fn chosen(&self, py: Python<'_>, numbers: &[usize]) -> Self {
        let rows = |all: &[u8], len: usize| {
            let mut rows = Vec::new();
            if !all.is_empty() {
                let of = numbers.iter().map(|&i| &all[i * len..][..len]);
                of.for_each(|row| rows.extend_from_slice(row));
            }
            rows
        };
        Self {
            data: self.data.clone_ref(py),
            starts: numbers.iter().map(|&i| self.starts[i]).collect(),
            lengths: numbers.iter().map(|&i| self.lengths[i]).collect(),
            end: self.end,
            offloads: Offloads::of(py, &rows(&self.offloads.copied(py), OFFLOAD_LEN)),
            hashes: rows(&self.hashes, HASH_LEN),
            times: rows(&self.times, 8),
            wire_lengths: rows(&self.wire_lengths, 4),
            origins: rows(&self.origins, ORIGIN_LEN),
        }
    }

    fn no_packet(i: impl fmt::Display, n: usize) -> PyErr {
        PyIndexError::new_err(format!("there is no packet {i} in a burst of {n}"))
    }
}

/// Offload metadata of a burst's packets, in an array that Python may write, from one of its rows on. There is none as long as all
/// are plain and nobody has looked.
struct Offloads {
    array: PyOnceLock<Py<PyByteArray>>,
    first: usize,
}

impl Offloads {
    /// These; none where there are no bytes.
    fn of(py: Python<'_>, bytes: &[u8]) -> Self {
        let array = PyOnceLock::new();
        if !bytes.is_empty() {
            array.get_or_init(py, || PyByteArray::new(py, bytes).unbind());
        }
        Self { array, first: 0 }
    }

    /// The array, of a burst of `n` packets.
    fn array(&self, py: Python<'_>, n: usize) -> &Py<PyByteArray> {
        self.array.get_or_init(py, || {
            PyByteArray::new(py, &vec![0; n * OFFLOAD_LEN]).unbind()
        })
    }

    /// The same array from the row of packet `first` on, of `n` packets.
    fn from(&self, py: Python<'_>, first: usize, n: usize) -> Self {
        let array = PyOnceLock::new();
        array.get_or_init(py, || self.array(py, n).clone_ref(py));
        Self {
            array,
            first: self.first + first,
        }
    }

    /// A copy of what is there from the first packet's row on.
    fn copied(&self, py: Python<'_>) -> Vec<u8> {
        let array = self.array.get(py).map(|array| array.bind(py).to_vec());
        let mut rows = array.unwrap_or_default();
        rows.drain(..(self.first * OFFLOAD_LEN).min(rows.len()));
        rows
    }
}

/// Numbers of the machine's own order.
fn words(bytes: &[u8]) -> Vec<u32> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|&word| u32::from_ne_bytes(word)).collect()
}

/// The place of two bytes, the direction and a byte of nothing.
pub(crate) fn origin_bytes(origin: Origin) -> [u8; ORIGIN_LEN] {
    let [p0, p1] = origin.place.to_le_bytes();
    [p0, p1, origin.direction as u8, 0]
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
