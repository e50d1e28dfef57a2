//! An echo: every packet goes back where it came from, with source and destination address swapped.

use virtnet_packet::{Burst, Picks, header};

use super::Fate;
use crate::graph::Gate;

/// Swaps the MAC addresses of each packet and sends it out of the gate it came in by.
#[derive(Clone, Copy, Debug, Default)]
pub struct Echo(());

impl Echo {
    /// An echo.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[inline]
    pub(super) fn turn_around(burst: &mut Burst, picks: &Picks, came_in_by: Gate) -> Fate {
        for i in picks.iter() {
            header::swap_macs(burst.head_mut(i));
        }
        Fate::To(came_in_by)
    }
}
