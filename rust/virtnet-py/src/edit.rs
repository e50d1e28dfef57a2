//! Header fields of many packets written at once, in the copy that Python holds.

use std::ops::Range;

use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;
use virtnet_packet::{Offload, Writable};

/// Writes `values` (one number a packet, two of an IPv6 address) into a field of those packets that have it; how many that are.
/// Packets are given by where they are in the data, which is inside of it.
pub(crate) fn edit(
    data: &mut [u8],
    packets: impl ExactSizeIterator<Item = (Range<usize>, Offload)>,
    field: &str,
    values: &[u64],
) -> PyResult<usize> {
    let field = Writable::named(field)
        .ok_or_else(|| PyKeyError::new_err(format!("the field {field:?} cannot be written")))?;
    let per_packet = if field.is_wide() { 2 } else { 1 };
    if values.len() != per_packet * packets.len() {
        return Err(PyValueError::new_err("a burst's columns differ in length"));
    }
    let mut edited = 0;
    for (value, (span, offload)) in values.chunks_exact(per_packet).zip(packets) {
        let wide = value
            .iter()
            .fold(0, |wide, &half| wide << 64 | u128::from(half));
        edited += usize::from(field.write(&mut data[span], &offload, wide));
    }
    Ok(edited)
}
