//! Rings that have to be given up although nobody has asked for it.

use std::sync::atomic::Ordering;

use virtnet_mem::{GuestAddr, Region, losses};
use virtnet_sys::EventFd;
use virtnet_virtio::RingError;

use super::Queues;

/// Why a ring was given up although nobody had asked for it.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub(in crate::vhost_user) enum Broken {
    /// It cannot be followed any further.
    #[error("its driver is at fault: {0}")]
    Driver(RingError),
    /// Its memory was taken away.
    #[error("it does not lie in the memory of the front-end any more")]
    Memory,
    /// Pages of the guest's memory are gone, be they its own or those of buffers.
    #[error("pages of the front-end's memory region at {0} are gone")]
    Lost(GuestAddr),
}

impl Queues {
    /// The ring that had to be given up last in this session, and why.
    pub(in crate::vhost_user) fn broken(&self) -> Option<(usize, Broken)> {
        self.broken
    }

    /// The rings that had to be given up since the last question, and why.
    pub(in crate::vhost_user) fn take_untold(&mut self) -> Vec<(usize, Broken)> {
        let (untold, why) = (&mut self.untold, &self.why);
        untold
            .drain(..)
            .filter_map(|ring| Some((ring, why.get(ring).copied().flatten()?)))
            .collect()
    }

    /// Some memory has been lost in this process: stops all rings if it was this guest's.
    #[cold]
    pub(super) fn look_for_losses(&mut self) {
        self.losses = losses();
        let Some(lost) = self.memory.lost_region().map(Region::guest) else {
            return;
        };
        for ring in 0..2 * self.pairs.len() {
            if self.setup(ring).is_some() {
                self.give_up(ring, Broken::Lost(lost));
            }
        }
    }

    #[cold]
    pub(super) fn break_ring(&mut self, ring: usize, error: RingError) {
        // What was taken before the error is still on its way; a transmitq gives it back when it is completed.
        if let Some(transmit) = self
            .pairs
            .get_mut(ring / 2)
            .and_then(|pair| pair.transmit.as_mut())
            && !ring.is_multiple_of(2)
        {
            transmit.queue.complete();
        }
        self.give_up(ring, Broken::Driver(error));
    }

    /// Stops a ring that cannot go on, tells its driver, and remembers where that was.
    pub(super) fn give_up(&mut self, ring: usize, why: Broken) {
        let err = self.setup(ring).and_then(|setup| setup.err.clone());
        let base = self.base(ring);
        if let Some(place) = self.given_up_at.get_mut(ring) {
            *place = base;
        }
        self.note_broken(ring, why, err.as_deref());
        self.drop_ring(ring);
    }

    pub(super) fn note_broken(&mut self, ring: usize, why: Broken, err: Option<&EventFd>) {
        if let Some(err) = err {
            // An eventfd that cannot be written is its owner's loss.
            drop(err.signal());
        }
        self.broken = Some((ring, why));
        if let Some(place) = self.why.get_mut(ring) {
            *place = Some(why);
        }
        if !self.untold.contains(&ring) {
            self.untold.push(ring);
        }
        self.needs_reset.store(true, Ordering::Relaxed);
    }
}
