//! A divert: a wire that leads some packets by a program, which sends back what is to go on.

use virtnet_packet::{Backlog, Burst, DropReason, Picks};

use super::{Fate, Fates, Filter, Verdict};
use crate::graph::Gate;

/// The gate to the program for what came in by gate 0; what came in by gate 1 has the next one.
const PROGRAM: Gate = 2;

/// What becomes of packets for which the program has no time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Late {
    /// They go on as if they were not wanted.
    #[default]
    Pass,
    /// They are dropped, and counted as late.
    Drop,
    /// The port they come from is left alone until the program has caught up. What comes from elsewhere than a port is dropped.
    Hold,
}

/// What a divert is to do; can be changed while it runs.
#[derive(Clone, Debug, Default)]
pub struct DivertOrders {
    /// Which packets the program wants.
    pub filter: Filter,
    /// What becomes of those it has no time for.
    pub late: Late,
    /// Without this everything passes, and what comes back from the program still goes on.
    pub enabled: bool,
}

/// Passes packets between gate 0 and gate 1, but those that match by way of a program: by gate 2 what came in by gate 0, by gate 3
/// what came in by gate 1. What comes back by such a gate goes on where the packets were going that leave by it.
#[derive(Clone, Debug)]
pub struct Divert {
    orders: DivertOrders,
    /// What the program has not taken yet, by direction; packets of a direction without one are not for it.
    backlogs: [Option<Backlog>; 2],
    late: u64,
}

impl Divert {
    /// A divert to the programs whose backlogs these are, one for each direction that is to be diverted.
    #[must_use]
    pub fn new(orders: DivertOrders, backlogs: [Option<Backlog>; 2]) -> Self {
        Self {
            orders,
            backlogs,
            late: 0,
        }
    }

    /// The same for another worker.
    pub(super) fn part(&self) -> Self {
        Self::new(self.orders.clone(), self.backlogs.clone())
    }

    /// Takes new orders and gives back the old ones.
    pub(super) fn order(&mut self, orders: DivertOrders) -> DivertOrders {
        std::mem::replace(&mut self.orders, orders)
    }

    /// What a port cabled to `gate` has to wait for, if it has to wait at all.
    pub(crate) fn holds(&self, gate: Gate) -> Option<&Backlog> {
        let is_holding = self.orders.enabled && self.orders.late == Late::Hold;
        self.backlog(gate).filter(|_| is_holding)
    }

    fn backlog(&self, gate: Gate) -> Option<&Backlog> {
        self.backlogs.get(usize::from(gate))?.as_ref()
    }

    /// Packets for which the program had no time, whatever became of them.
    #[must_use]
    pub fn late(&self) -> u64 {
        self.late
    }

    pub(super) fn classify(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        came_in_by: Gate,
        fates: &mut Fates,
    ) -> Verdict {
        if came_in_by >= PROGRAM {
            return Verdict::All(Fate::To((came_in_by - PROGRAM) ^ 1));
        }
        let past = Fate::To(came_in_by ^ 1);
        let Some(backlog) = self.backlog(came_in_by).filter(|_| self.orders.enabled) else {
            return Verdict::All(past);
        };
        let late = match self.orders.late {
            Late::Pass => past,
            // A port that is held is not asked while there is no room for a burst; this is for whoever else sends here.
            Late::Drop | Late::Hold => Fate::Drop(DropReason::Late),
        };
        let mut room = backlog.room();
        let mut n_late = 0;
        for (fate, i) in fates.iter_mut().zip(picks.iter()) {
            *fate = if !self
                .orders
                .filter
                .matches(burst.head(i), burst.frame_len(i))
            {
                past
            } else if room == 0 {
                n_late += 1;
                late
            } else {
                room -= 1;
                Fate::To(PROGRAM + came_in_by)
            };
        }
        self.late += n_late;
        Verdict::Each
    }
}
