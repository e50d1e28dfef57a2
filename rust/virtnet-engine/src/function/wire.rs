//! A wire: what comes in by one gate leaves by the other.

use super::Fate;
use crate::graph::Gate;

/// Passes every packet between gate 0 and gate 1 unchanged and unlooked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wire(());

impl Wire {
    /// A wire.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[inline]
    pub(super) fn fate(came_in_by: Gate) -> Fate {
        Fate::To(came_in_by ^ 1)
    }
}
