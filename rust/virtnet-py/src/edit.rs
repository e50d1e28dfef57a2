//! Header fields of many packets written at once, in the copy that Python holds.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyByteArray;
use virtnet_packet::Writable;

use crate::columns::frame_at;
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
    let field = Writable::named(field)
        .ok_or_else(|| PyKeyError::new_err(format!("the field {field:?} cannot be written")))?;
    let per_packet = if field.is_wide() { 2 } else { 1 };
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
        let wide = value
            .iter()
            .fold(0, |wide, &half| wide << 64 | u128::from(half));
        edited += usize::from(field.write(frame, &offload, wide));
    }
    PyBuffer::<u8>::get(data)?.copy_from_slice(py, &bytes)?;
    Ok(edited)
}
