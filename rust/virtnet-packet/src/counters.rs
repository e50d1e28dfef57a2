//! Counters of a port: plain fields owned by its worker.

use crate::DropReason;

/// Packets dropped, by reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropCounters([u64; DropReason::COUNT]);

impl Default for DropCounters {
    fn default() -> Self {
        Self([0; DropReason::COUNT])
    }
}

impl DropCounters {
    /// Counts `n` packets dropped for `reason`.
    #[inline]
    pub fn add(&mut self, reason: DropReason, n: usize) {
        self.0[reason as usize] += n as u64;
    }

    /// Packets dropped for `reason`.
    #[must_use]
    pub fn of(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Packets dropped for any reason.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Reasons that have happened, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> {
        DropReason::ALL
            .iter()
            .map(|&reason| (reason, self.of(reason)))
            .filter(|&(_, n)| n > 0)
    }

    /// What has been dropped since an earlier reading of the same counters.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut passed = *self;
        for (mine, theirs) in passed.0.iter_mut().zip(earlier.0) {
            *mine = mine.saturating_sub(theirs);
        }
        passed
    }

    /// Adds another set of counters to this one.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }
}

/// What has passed a port. `rx` is into the engine, `tx` out of it.
///
/// `received` counts every frame the peer handed over; those in `rx_drops` never became packets of a burst. `sent` counts
/// frames handed to the peer; a frame in `tx_drops` reached the port and went no further. Bytes are those of the frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Frames taken from the peer.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames given to the peer.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames taken from the peer that could not become packets.
    pub rx_drops: DropCounters,
    /// Packets offered to the port that could not be given to the peer.
    pub tx_drops: DropCounters,
    /// Receive buffers of the peer that make no sense and were given back empty. No packet is lost with them.
    pub bad_buffers: u64,
    /// Kicks and calls written to the peer.
    pub notifications: u64,
}

impl PortCounters {
    /// What has passed since an earlier reading of the same counters.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            received: self.received.saturating_sub(earlier.received),
            received_bytes: self.received_bytes.saturating_sub(earlier.received_bytes),
            sent: self.sent.saturating_sub(earlier.sent),
            sent_bytes: self.sent_bytes.saturating_sub(earlier.sent_bytes),
            rx_drops: self.rx_drops.since(&earlier.rx_drops),
            tx_drops: self.tx_drops.since(&earlier.tx_drops),
            bad_buffers: self.bad_buffers.saturating_sub(earlier.bad_buffers),
            notifications: self.notifications.saturating_sub(earlier.notifications),
        }
    }

    /// Adds the counters of another part of the same port.
    pub fn merge(&mut self, other: &Self) {
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.sent += other.sent;
        self.sent_bytes += other.sent_bytes;
        self.rx_drops.merge(&other.rx_drops);
        self.tx_drops.merge(&other.tx_drops);
        self.bad_buffers += other.bad_buffers;
        self.notifications += other.notifications;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_of_readings_is_what_passed_between_them() {
        let mut earlier = PortCounters {
            received: 5,
            sent_bytes: 100,
            ..PortCounters::default()
        };
        earlier.tx_drops.add(DropReason::NoRoom, 3);
        let mut now = earlier;
        now.received += 2;
        now.tx_drops.add(DropReason::NoRoom, 4);
        now.rx_drops.add(DropReason::Runt, 1);
        let passed = now.since(&earlier);
        assert_eq!((passed.received, passed.sent_bytes), (2, 0));
        assert_eq!(passed.tx_drops.of(DropReason::NoRoom), 4);
        assert_eq!(passed.rx_drops.total(), 1);
    }

    #[test]
    fn only_reasons_that_have_happened_are_listed() {
        let mut drops = DropCounters::default();
        drops.add(DropReason::Loop, 2);
        let mut sum = drops;
        sum.merge(&drops);
        assert_eq!(sum.iter().collect::<Vec<_>>(), [(DropReason::Loop, 4)]);
    }
}
