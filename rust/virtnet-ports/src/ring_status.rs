//! How one ring of a port stands, for a person who wants to know why nothing moves.

use virtnet_virtio::Positions;

/// How a ring stands, as far as this side knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RingStatus {
    /// Its number: twice its queue pair's, and one more for a transmitq. Spec: virtio 1.4, 5.1.2.
    pub index: usize,
    /// Whether it runs.
    pub started: bool,
    /// Whether it is enabled; remembered while it is stopped.
    pub enabled: bool,
    /// How many entries it has, while it runs.
    pub size: Option<u16>,
    /// `"split"` or `"packed"`, while it runs.
    pub format: Option<&'static str>,
    /// Where it stands, while it runs.
    pub positions: Option<Positions>,
    /// Whether there is an event that says that buffers are available; without, the device polls.
    pub kick: bool,
    /// Whether there is an event that says that buffers are used; without, the driver polls.
    pub call: bool,
    /// Notifications of available buffers: those that the device heard, or that the driver gave. Whoever polls hears none.
    pub kicks: u64,
    /// Notifications of used buffers that the device gave.
    pub calls: u64,
    /// Times that this side has shown buffers to the other. It did not want to be told of those that its notifications are fewer.
    pub bursts: u64,
    /// Chains that a device before this one had taken when it was killed, and that were taken again, as far as that is known.
    pub taken_again: u16,
    /// Why it had to be given up, if it was.
    pub broken: Option<String>,
}

impl RingStatus {
    /// Whether it is a transmitq, which the driver sends by; otherwise it is a receiveq.
    #[must_use]
    pub fn is_transmitq(&self) -> bool {
        !self.index.is_multiple_of(2)
    }
}
