//! A tee: a wire with a branch, by which copies of some packets leave.

use virtnet_packet::{Burst, Direction, Picks};

use super::{Fate, Fates, Filter, Verdict};
use crate::graph::Gate;

/// The gate that copies leave by.
pub(crate) const BRANCH: Gate = 2;

/// Passes packets between gate 0 and gate 1, and copies of those that match by gate 2. What comes in by gate 2 ends here.
#[derive(Clone, Debug, Default)]
pub struct Tee {
    filter: Filter,
}

impl Tee {
    /// A tee that copies what matches.
    #[must_use]
    pub fn new(filter: Filter) -> Self {
        Self { filter }
    }

    pub(super) fn classify(
        &self,
        burst: &Burst,
        picks: &Picks,
        came_in_by: Gate,
        fates: &mut Fates,
    ) -> Verdict {
        if came_in_by == BRANCH {
            return Verdict::All(Fate::Consumed);
        }
        let past = Fate::To(came_in_by ^ 1);
        let mut is_any_wanted = false;
        for (fate, i) in fates.iter_mut().zip(picks.iter()) {
            let is_wanted = self.filter.matches(burst.head(i), burst.frame_len(i));
            // To every other gate: that is the other end and the branch.
            *fate = if is_wanted { Fate::Flood } else { past };
            is_any_wanted |= is_wanted;
        }
        if is_any_wanted {
            Verdict::Copied
        } else {
            Verdict::All(past)
        }
    }

    /// Which way packets are going that came in by a gate: whoever is at the first one is outside.
    pub(crate) fn direction(came_in_by: Gate) -> Direction {
        match came_in_by {
            0 => Direction::Inbound,
            1 => Direction::Outbound,
            _ => Direction::Unknown,
        }
    }
}
