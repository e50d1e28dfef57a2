//! The two states of a ring: started or stopped, enabled or disabled.
//!
//! They are independent. A ring starts with SET_VRING_KICK and stops with GET_VRING_BASE; it is enabled and disabled by
//! SET_VRING_ENABLE, and remembers that while it is stopped. What a network device may do follows from both.

/// Whether a ring is started, and whether it is enabled.
///
/// Spec: vhost-user, Ring states
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RingState {
    /// Between SET_VRING_KICK and GET_VRING_BASE.
    pub started: bool,
    /// Set by SET_VRING_ENABLE, or from the beginning where protocol features were not accepted.
    pub enabled: bool,
}

/// What a network device may do with a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RingAccess {
    /// Nothing: not even look at its memory.
    None,
    /// Take packets from a transmitq and throw them away; leave a receiveq alone.
    Drain,
    /// Everything.
    Full,
}

impl RingState {
    /// Returns what may be done in this state.
    #[must_use]
    pub fn access(self) -> RingAccess {
        match (self.started, self.enabled) {
            (false, _) => RingAccess::None,
            (true, false) => RingAccess::Drain,
            (true, true) => RingAccess::Full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_the_four_states_has_its_rule() {
        let cases = [
            (false, false, RingAccess::None),
            (false, true, RingAccess::None),
            (true, false, RingAccess::Drain),
            (true, true, RingAccess::Full),
        ];
        for (started, enabled, access) in cases {
            assert_eq!(RingState { started, enabled }.access(), access);
        }
        assert_eq!(RingState::default().access(), RingAccess::None);
    }
}
