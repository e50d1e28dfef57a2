//! How packets are given to a port: as what is sent to it, or as copies that were taken somewhere.

use virtnet_packet::{Burst, DropReason, Origin, Picks, Port};

use crate::graph::Target;

/// How packets are given to a port.
pub(super) trait Giving: Copy {
    /// Where they go.
    fn target(self, slot: usize) -> Target;
    /// Gives them; how many were accepted, counted from the front.
    fn give(self, port: &mut dyn Port, burst: &Burst, picks: &Picks) -> usize;
    /// Counts what was given and not accepted.
    fn drop(self, port: &mut dyn Port, reason: DropReason, n: usize);
}

/// As what is sent to it.
#[derive(Clone, Copy)]
pub(super) struct Sent;

impl Giving for Sent {
    fn target(self, slot: usize) -> Target {
        Target::Port(slot)
    }

    fn give(self, port: &mut dyn Port, burst: &Burst, picks: &Picks) -> usize {
        port.tx(burst, picks)
    }

    fn drop(self, port: &mut dyn Port, reason: DropReason, n: usize) {
        port.drop_tx(reason, n);
    }
}

/// As copies from a place.
impl Giving for Origin {
    fn target(self, slot: usize) -> Target {
        Target::Copies(slot, self)
    }

    fn give(self, port: &mut dyn Port, burst: &Burst, picks: &Picks) -> usize {
        port.tx_copies(self, burst, picks)
    }

    fn drop(self, port: &mut dyn Port, reason: DropReason, n: usize) {
        port.drop_copies(self, reason, n);
    }
}
