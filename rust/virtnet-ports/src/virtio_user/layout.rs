//! Where the rings and buffers of a driver's queues lie in its memory.

use virtnet_mem::{GuestAddr, GuestMemory, MemoryError, UserAddr};
use virtnet_virtio::net::BufferArea;
use virtnet_virtio::{Features, QueueConfig, RingFormat, packed, split};

/// Areas start on lines of their own, so that what one side writes does not take the other side's line away.
const LINE: u64 = 64;

/// One queue's place: three ring areas and a buffer for every descriptor, as offsets from the memory's start.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueLayout {
    size: u16,
    driver_area: u64,
    device_area: u64,
    buffers: u64,
    /// Offset of this queue, and the first byte behind it.
    start: u64,
    pub(super) end: u64,
}

impl QueueLayout {
    /// Lays out a queue of `size` descriptors from `start` on; the areas are large enough for either format.
    pub(super) fn new(size: u16, start: u64) -> Self {
        let after = |at: u64, bytes: usize| (at + bytes as u64).next_multiple_of(LINE);
        let driver_area = after(start, split::layout::desc_bytes(size));
        let device_area = after(
            driver_area,
            split::layout::avail_bytes(size, true).max(packed::layout::EVENT_BYTES),
        );
        let buffers = after(
            device_area,
            split::layout::used_bytes(size, true).max(packed::layout::EVENT_BYTES),
        );
        let end = after(buffers, BufferArea::bytes(size));
        Self {
            size,
            driver_area,
            device_area,
            buffers,
            start,
            end,
        }
    }

    /// The queue in `memory`, whose first byte is at `base`.
    pub(super) fn config(
        &self,
        memory: &GuestMemory,
        base: GuestAddr,
        features: Features,
    ) -> Result<QueueConfig, MemoryError> {
        let user = |offset: u64| {
            let addr = GuestAddr(base.0 + offset);
            memory.user_addr(addr).ok_or(MemoryError::NotMapped {
                addr: UserAddr(addr.0),
                size: 1,
            })
        };
        Ok(QueueConfig {
            size: self.size,
            desc_area: user(self.start)?,
            driver_area: user(self.driver_area)?,
            device_area: user(self.device_area)?,
            base: RingFormat::of(features).fresh_base(),
            features,
        })
    }

    /// The queue's buffers.
    pub(super) fn buffers(&self, base: GuestAddr) -> BufferArea {
        BufferArea {
            start: GuestAddr(base.0 + self.buffers),
            count: self.size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_lie_one_behind_the_other_on_lines_of_their_own() {
        for size in [1, 3, 256, 32_768] {
            let queue = QueueLayout::new(size, 4096);
            let marks = [
                queue.start,
                queue.driver_area,
                queue.device_area,
                queue.buffers,
                queue.end,
            ];
            assert!(
                marks.is_sorted() && marks.iter().all(|at| at % LINE == 0),
                "{queue:?}"
            );
            assert!(queue.end - queue.buffers >= BufferArea::bytes(size) as u64);
        }
    }
}
