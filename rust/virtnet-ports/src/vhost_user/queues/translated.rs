//! Queues behind an IOMMU: rings that wait until it is known where they are, and what is asked for.

use std::sync::Arc;

use virtnet_mem::{GuestMemory, Window};
use virtnet_vhost::{DeviceError, RingSetup};
use virtnet_virtio::{Access, QueueConfig};

use super::{Broken, Queues};
use crate::vhost_user::iommu::touches_ring;
use crate::vhost_user::queue_config;

/// A ring that is to run as soon as it is known where it is.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) setup: RingSetup,
    pub(super) record: Option<Window>,
    /// It has not run yet: where it begins may have to be found out.
    pub(super) is_new: bool,
}

/// How many chains of a ring are looked at ahead for addresses that have to be asked for.
const AHEAD: u16 = 64;

impl Queues {
    /// The memory is seen through other translations, which differ in `size` bytes at `iova`.
    pub(in crate::vhost_user) fn set_view(
        &mut self,
        memory: Arc<GuestMemory>,
        iova: u64,
        size: u64,
    ) {
        self.memory = memory;
        self.misses.settle(iova, size);
        for ring in 0..2 * self.pairs.len() {
            let Some(setup) = self.setup(ring) else {
                continue;
            };
            let base = self.base(ring).unwrap_or(setup.base);
            let config = queue_config(setup, self.features, base);
            let is_touched = touches_ring(&config, iova, size);
            if is_touched || self.waiting[ring].is_some() {
                let err = setup.err.clone();
                // All of it is known then, and it is in several pieces, or somewhere a ring cannot be.
                if self.restart(ring).is_err() {
                    self.given_up_at[ring] = Some(base);
                    self.note_broken(ring, Broken::Memory, err.as_deref());
                }
            }
        }
    }

    /// Starts a ring anew where it is, or one that waits.
    pub(super) fn restart(&mut self, ring: usize) -> Result<(), DeviceError> {
        let Some(setup) = self.setup(ring).cloned() else {
            return Ok(());
        };
        let setup = RingSetup {
            base: self.base(ring).unwrap_or(setup.base),
            ..setup
        };
        let is_new = self.waiting[ring].as_ref().is_some_and(|it| it.is_new);
        let record = self.record(ring);
        self.drop_ring(ring);
        if is_new {
            self.start_ring(ring, setup, record).map(drop)
        } else {
            self.go_on(ring, setup, record)
        }
    }

    /// See [`Misses::must_wait`](crate::vhost_user::iommu::Misses::must_wait).
    pub(super) fn must_wait(&mut self, config: &QueueConfig) -> bool {
        self.misses.must_wait(&self.memory, config)
    }

    pub(super) fn wait(
        &mut self,
        ring: usize,
        setup: RingSetup,
        record: Option<Window>,
        is_new: bool,
    ) -> Result<(), DeviceError> {
        let Some(place) = self.waiting.get_mut(ring) else {
            return Err(format!("there is no ring {ring}").into());
        };
        *place = Some(Waiting {
            setup,
            record,
            is_new,
        });
        Ok(())
    }

    /// Asks for what the next chains of a ring need.
    #[cold]
    pub(super) fn ask_ahead(&mut self, ring: usize) {
        let access = if ring.is_multiple_of(2) {
            Access::Write
        } else {
            Access::Read
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        if let Some(queue) = self.queue(ring) {
            let missing = queue.missing(&self.memory, access, AHEAD, &mut scratch);
            self.misses.ask(missing);
        }
    }

    /// Asks for what receiveqs need, before there is a packet that would find no room.
    #[cold]
    pub(super) fn ask_ahead_of_packets(&mut self) {
        for i in 0..self.sinks.len() {
            self.ask_ahead(2 * self.sinks[i]);
        }
    }
}
