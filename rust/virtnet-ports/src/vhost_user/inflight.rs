//! The record of buffers in flight of a device: a file that outlives it, with a region for each ring.

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr, Window};
use virtnet_sys::memfd;
use virtnet_vhost::payload::InflightArea;
use virtnet_vhost::{DeviceError, InflightFile};
use virtnet_virtio::RingFormat;
use virtnet_virtio::inflight::region_bytes;

/// Regions start on lines of cache.
const ALIGN: usize = 64;

/// A record that a front-end has handed over.
#[derive(Debug)]
pub(super) struct Record {
    memory: Arc<GuestMemory>,
    area: InflightArea,
}

impl Record {
    /// Makes an empty one for as many rings and descriptors as `area` says, sealed at its size.
    pub(super) fn make(
        area: InflightArea,
        format: RingFormat,
    ) -> Result<InflightFile, DeviceError> {
        let bytes = region_bytes(format, area.queue_size) * usize::from(area.num_queues);
        let area = InflightArea {
            mmap_size: u64::try_from(bytes)?,
            mmap_offset: 0,
            ..area
        };
        let file = memfd::create("virtnet-inflight", area.mmap_size, false)?;
        Ok(InflightFile { area, file })
    }

    /// Maps one that was made here or by another back-end.
    pub(super) fn map(record: InflightFile) -> Result<Self, DeviceError> {
        let InflightFile { area, file } = record;
        let (size, offset) = (area.mmap_size, area.mmap_offset);
        let region =
            Region::map_file(file, offset, size, GuestAddr(0), UserAddr(0)).map_err(|error| {
                format!("the record of buffers in flight cannot be mapped: {error}")
            })?;
        Ok(Self {
            memory: Arc::new(GuestMemory::new(vec![region])?),
            area,
        })
    }

    /// The region of ring number `ring` of `size` descriptors; none where the record is for fewer rings.
    pub(super) fn window(
        &self,
        ring: usize,
        size: u16,
        format: RingFormat,
    ) -> Result<Option<Window>, DeviceError> {
        let InflightArea {
            num_queues,
            queue_size,
            ..
        } = self.area;
        if ring >= num_queues.into() {
            return Ok(None);
        }
        if size > queue_size {
            return Err(format!(
                "a ring of {size} descriptors does not fit its record of buffers in flight, which is for {queue_size}"
            )
            .into());
        }
        let start = u64::try_from(ring * region_bytes(format, queue_size))?;
        let bytes = region_bytes(format, size);
        Ok(Some(self.memory.window(UserAddr(start), bytes, ALIGN)?))
    }
}
