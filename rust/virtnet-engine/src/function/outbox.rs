//! Packets that a function has made, until they leave at the end of the breath.

use std::collections::VecDeque;

use virtnet_packet::{Burst, DropCounters, DropReason, Offload, Picks};

use crate::graph::Gate;

/// Bursts that wait at most.
const BURSTS_MAX: usize = 64;

/// A burst that waits, and by which gate each packet of it leaves.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) burst: Box<Burst>,
    pub(crate) gates: Vec<Gate>,
}

impl Made {
    /// Packets that leave by the same gate one behind the other.
    pub(crate) fn runs(&self) -> Vec<(Gate, Picks)> {
        let mut at = 0;
        let runs = self.gates.chunk_by(|a, b| a == b).map(|run| {
            let mut picks = Picks::default();
            (at..at + run.len()).for_each(|i| picks.push(i));
            at += run.len();
            (run[0], picks)
        });
        runs.collect()
    }
}

/// Packets that wait to leave, and those that came to nothing. Room is kept.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: VecDeque<Made>,
    spare: Vec<Made>,
    lost: Option<DropCounters>,
}

impl Outbox {
    /// Adds a frame; where there is no room it is lost.
    pub(super) fn push(&mut self, gate: Gate, frame: &[u8], offload: Offload) {
        if self
            .waiting
            .back()
            .is_none_or(|made| made.burst.room() == 0)
        {
            if self.waiting.len() >= BURSTS_MAX {
                self.lose(DropReason::NoRoom, 1);
                return;
            }
            self.waiting.push_back(self.spare.pop().unwrap_or_default());
        }
        if let Some(made) = self.waiting.back_mut() {
            made.burst.push_bytes(frame, offload);
            made.gates.push(gate);
        }
    }

    /// Counts packets that waited or were made, and came to nothing.
    pub(super) fn lose(&mut self, reason: DropReason, n: usize) {
        self.lost.get_or_insert_default().add(reason, n);
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The packets that have waited longest.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<Made> {
        self.waiting.pop_front()
    }

    /// Those that were taken have left.
    pub(crate) fn give_back(&mut self, mut made: Made) {
        made.burst.clear();
        made.gates.clear();
        self.spare.push(made);
    }

    /// Packets that came to nothing since this was asked last.
    #[inline]
    pub(crate) fn take_lost(&mut self) -> Option<DropCounters> {
        self.lost.take()
    }
}
