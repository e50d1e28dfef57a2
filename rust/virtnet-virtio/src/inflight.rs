//! Buffers in flight, recorded in memory that outlives the device: what it has taken and not given back when it is killed is
//! neither lost nor given back twice.
//!
//! The record of a queue is a region of a file that the front-end keeps and hands to the next back-end. `SplitRecord` and
//! `PackedRecord` write it beside the queue, a burst at a time, and read it when a queue starts. The order of their stores is
//! what makes it right at every moment; each says where it stands.
//!
//! The front-end can write to the file as well. A record that makes no sense is refused, what it says is looked at once, and what
//! is needed while the queue runs is kept here: nothing is read back.
//!
//! Spec: vhost-user, Inflight I/O tracking

mod packed;
mod split;

use virtnet_mem::Window;

use crate::{RingFormat, StartError};

pub(crate) use packed::PackedRecord;
pub(crate) use split::SplitRecord;

/// Regions are multiples of a line of cache.
const REGION_ALIGN: usize = 64;

/// Offset of the version of a region: 0 where nobody has written to it yet.
const VERSION: usize = 8;
/// Offset of the number of descriptors that it is for.
const DESC_NUM: usize = 10;

/// Bytes of the record of a queue of `size` entries.
#[must_use]
pub fn region_bytes(format: RingFormat, size: u16) -> usize {
    let bytes = match format {
        RingFormat::Split => split::ENTRIES + split::ENTRY * usize::from(size),
        RingFormat::Packed => packed::ENTRIES + packed::ENTRY * usize::from(size),
    };
    bytes.next_multiple_of(REGION_ALIGN)
}

/// Whether somebody has written to the record, for a queue of this size.
fn is_written(region: &Window, size: u16) -> Result<bool, StartError> {
    use std::sync::atomic::Ordering::{Acquire, Relaxed};
    match (
        region.load_u16(VERSION, Acquire),
        region.load_u16(DESC_NUM, Relaxed),
    ) {
        (0, _) => Ok(false),
        (1, num) if num == size => Ok(true),
        (1, _) => Err(StartError::Record("it is for a queue of another size")),
        _ => Err(StartError::Record("it has a version that is not known")),
    }
}
