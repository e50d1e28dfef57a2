//! The parts of a vhost-user port that different workers own: queue pair `p` of a device is in lane `p % n`.
//!
//! The session knows rings by their number in the device; a lane knows those of its own, counted from 0.

use std::sync::Arc;

use virtnet_virtio::net::control::Settings;

use super::queues::{Place, Queues};
use crate::{Slot, SlotError};

/// The data halves of a port, one for each worker that has a part of it. At least one.
#[derive(Clone, Debug)]
pub(super) struct Lanes(Vec<Arc<Slot<Queues>>>);

impl Lanes {
    pub(super) fn new(lanes: Vec<Arc<Slot<Queues>>>) -> Self {
        debug_assert!(!lanes.is_empty(), "a port has a data half");
        Self(lanes)
    }

    /// How many of `pairs` queue pairs are in each of `n` lanes, of which there are at most as many as pairs.
    pub(super) fn share(pairs: u16, n: usize) -> impl Iterator<Item = u16> {
        let n = u16::try_from(n).unwrap_or(u16::MAX).clamp(1, pairs.max(1));
        (0..n).map(move |lane| (pairs - lane).div_ceil(n))
    }

    /// Runs `work` on the lane that has ring `ring`, with the ring's number there.
    pub(super) fn run<R: Send + 'static>(
        &self,
        ring: usize,
        work: impl FnOnce(&mut Queues, usize) -> R + Send + 'static,
    ) -> Result<R, SlotError> {
        let (pair, n) = (ring / 2, self.0.len());
        let here = 2 * (pair / n) + ring % 2;
        self.0[pair % n].run(move |queues| work(queues, here))
    }

    /// Runs `work` on every lane; the answers, in order.
    pub(super) fn run_all<R: Send + 'static>(
        &self,
        work: impl Fn(&mut Queues) -> R + Send + Sync + 'static,
    ) -> Result<Vec<R>, SlotError> {
        let work = Arc::new(work);
        let run = |lane: &Arc<Slot<Queues>>| {
            let work = Arc::clone(&work);
            lane.run(move |queues| work(queues))
        };
        self.0.iter().map(run).collect()
    }

    /// Has every lane follow what the driver has asked for.
    pub(super) fn set_settings(&self, settings: Option<&Arc<Settings>>) -> Result<(), SlotError> {
        let step = self.0.len();
        for (first, lane) in self.0.iter().enumerate() {
            let settings = settings.map(Arc::clone);
            lane.run(move |queues| queues.set_settings(settings, Place { first, step }))?;
        }
        Ok(())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Runs `work` on every lane without waiting for it.
    pub(super) fn post_all(&self, work: impl Fn(&mut Queues) + Send + Sync + 'static) {
        let work = Arc::new(work);
        for lane in &self.0 {
            let work = Arc::clone(&work);
            // A lane whose worker has panicked has nothing left to change.
            drop(lane.post(move |queues| work(queues)));
        }
    }

    /// The number in the device of ring `here` of lane `lane`.
    pub(super) fn ring_of(&self, lane: usize, here: usize) -> usize {
        2 * (here / 2 * self.0.len() + lane) + here % 2
    }
}

#[cfg(test)]
mod tests {
    use virtnet_sys::Poller;

    use super::*;
    use crate::vhost_user::iommu::Missed;

    #[test]
    fn every_pair_is_in_one_lane_and_none_is_empty() {
        for pairs in 1..=128 {
            for n in [1, 2, 3, 8, 128, 500] {
                let shares: Vec<_> = Lanes::share(pairs, n).collect();
                assert_eq!(shares.len(), n.min(usize::from(pairs)));
                assert_eq!(shares.iter().sum::<u16>(), pairs);
                assert!(shares.iter().all(|&share| share > 0), "{shares:?}");
            }
        }
    }

    #[test]
    fn a_ring_has_one_number_in_the_device() {
        let lane = |pairs| {
            let (poller, missed) = (Poller::new().unwrap(), Missed::new().unwrap());
            let queues = Queues::new(pairs, Arc::new(poller), Arc::default(), missed.of_worker());
            Slot::new(queues).unwrap()
        };
        let lanes = Lanes::new(Lanes::share(5, 3).map(lane).collect());
        let mut seen: Vec<_> = (0..10)
            .map(|ring| lanes.run(ring, |_, here| here).unwrap())
            .collect();
        assert_eq!(seen, [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]);
        let back = |ring: usize| lanes.ring_of(ring / 2 % 3, seen[ring]);
        assert_eq!(
            (0..10).map(back).collect::<Vec<_>>(),
            (0..10).collect::<Vec<_>>()
        );
        seen.clear();
    }
}
