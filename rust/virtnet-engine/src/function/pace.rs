//! How many packets a moment allows: a token bucket over the worker's clock.

const SECOND_NS: u128 = 1_000_000_000;

/// A steady rate in packets per second. What was missed is made up for, within bounds, so that the mean is exact and a
/// pause is not followed by a flood.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    rate: u64,
    /// Since when it counts.
    start: u64,
    /// Packets spent since then.
    spent: u64,
}

impl Pace {
    /// `rate` packets per second from `now` on, the first one at once.
    pub(super) fn new(rate: u64, now: u64) -> Self {
        Self {
            rate: rate.max(1),
            start: now,
            spent: 0,
        }
    }

    /// `rate` packets per second from `now` on, and at once as many as after a pause.
    pub(super) fn rested(rate: u64, now: u64) -> Self {
        let mut pace = Self::new(rate, now);
        let more = u128::from(pace.bucket() - 1) * SECOND_NS / u128::from(pace.rate);
        pace.start = now.saturating_sub(to_u64(more));
        pace
    }

    /// Whether it is the pace of that many packets per second.
    pub(super) fn is_of(&self, rate: u64) -> bool {
        self.rate == rate
    }

    /// How many packets may leave by `now`.
    pub(super) fn allowed(&mut self, now: u64) -> usize {
        let elapsed = u128::from(now.saturating_sub(self.start));
        let due = to_u64(elapsed * u128::from(self.rate) / SECOND_NS) + 1;
        let mut allowed = due.saturating_sub(self.spent);
        let most = self.bucket();
        if allowed > most {
            // Too late for the rest: count anew, with a full bucket.
            *self = Self::rested(self.rate, now);
            allowed = most;
        }
        usize::try_from(allowed).unwrap_or(usize::MAX)
    }

    /// `n` packets have left.
    pub(super) fn spend(&mut self, n: usize) {
        self.spent += n as u64;
    }

    /// When the next packet may leave.
    pub(super) fn due(&self) -> u64 {
        let wait = u128::from(self.spent) * SECOND_NS;
        self.start + to_u64(wait.div_ceil(u128::from(self.rate)))
    }

    /// Packets that may leave at once after a pause: two milliseconds' worth, at least a burst's.
    fn bucket(&self) -> u64 {
        (self.rate / 500).max(64)
    }
}

fn to_u64(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn the_mean_is_exact_at_any_rate() {
        for rate in [1, 3, 7, 1_000, 333_333, 14_880_952] {
            let mut pace = Pace::new(rate, 5);
            let mut sent = 0;
            for tick in 0..=2_000 {
                let n = pace.allowed(5 + tick * (SECOND / 1_000));
                pace.spend(n);
                sent += n as u64;
            }
            assert_eq!(sent, rate * 2 + 1, "at {rate} packets/s");
        }
    }

    #[test]
    fn nothing_is_allowed_before_it_is_due() {
        let mut pace = Pace::new(10, 0);
        assert_eq!(pace.allowed(0), 1);
        pace.spend(1);
        assert_eq!(pace.due(), SECOND / 10);
        assert_eq!(pace.allowed(SECOND / 10 - 1), 0);
        assert_eq!(pace.allowed(SECOND / 10), 1);
    }

    #[test]
    fn whoever_has_rested_may_leave_at_once() {
        let mut pace = Pace::rested(1_000, 60 * SECOND);
        assert_eq!(pace.allowed(60 * SECOND), 64);
        pace.spend(64);
        assert_eq!(pace.allowed(60 * SECOND), 0);
        assert_eq!(pace.allowed(60 * SECOND + SECOND / 1_000), 1);
    }

    #[test]
    fn a_pause_is_not_followed_by_a_flood() {
        let mut pace = Pace::new(1_000_000, 0);
        assert_eq!(pace.allowed(60 * SECOND), 2_000);
        pace.spend(2_000);
        assert_eq!(pace.allowed(60 * SECOND), 0);
        assert_eq!(pace.allowed(60 * SECOND + 1_000), 1);
    }
}
