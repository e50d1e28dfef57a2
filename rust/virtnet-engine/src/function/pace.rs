//! How many packets a moment allows: a token bucket over the worker's clock.

/// Rates are kept in thousandths, so that one in bits a second is as exact as one in packets.
const SECOND_NS: u128 = 1_000_000_000 * 1_000;

/// A steady rate in packets per second. What was missed is made up for, within bounds, so that the mean is exact and a
/// pause is not followed by a flood.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Packets in a thousand seconds.
    rate: u64,
    /// Packets that leave together.
    burst: u64,
    /// Packets that may leave at once after a pause, at least.
    least: u64,
    /// Since when it counts.
    start: u64,
    /// Packets spent since then.
    spent: u64,
}

impl Pace {
    /// `rate` packets per second from `now` on, the first one at once.
    pub(super) fn new(rate: u64, now: u64) -> Self {
        Self {
            least: 64,
            ..Self::in_bursts(rate.saturating_mul(1_000), 1, now)
        }
    }

    /// `rate` packets in a thousand seconds, `burst` of them together: the first ones at once, the next ones when the last of
    /// the first would have been due and one more time has passed.
    pub(super) fn in_bursts(rate: u64, burst: u64, now: u64) -> Self {
        Self {
            rate: rate.max(1),
            burst: burst.max(1),
            least: burst.max(8),
            start: now,
            spent: 0,
        }
    }

    /// `rate` packets per second from `now` on, and at once as many as after a pause.
    pub(super) fn rested(rate: u64, now: u64) -> Self {
        Self::new(rate, now).at_rest(now)
    }

    /// As it is after a pause.
    fn at_rest(mut self, now: u64) -> Self {
        let more = u128::from(self.bucket() - 1) * SECOND_NS / u128::from(self.rate);
        self.start = now.saturating_sub(to_u64(more));
        self
    }

    /// Whether it is the pace of that many packets per second.
    pub(super) fn is_of(&self, rate: u64) -> bool {
        self.rate == rate.saturating_mul(1_000)
    }

    /// How many packets may leave by `now`.
    pub(super) fn allowed(&mut self, now: u64) -> usize {
        let elapsed = u128::from(now.saturating_sub(self.start));
        let mut due = to_u64(elapsed * u128::from(self.rate) / SECOND_NS).saturating_add(1);
        if self.burst > 1 {
            due = due.div_ceil(self.burst).saturating_mul(self.burst);
        }
        let mut allowed = due.saturating_sub(self.spent);
        let most = self.bucket();
        if allowed > most {
            // Too late for the rest: count anew, with a full bucket.
            *self = Self { spent: 0, ..*self }.at_rest(now);
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
        let begun = if self.burst > 1 {
            self.spent / self.burst * self.burst
        } else {
            self.spent
        };
        let wait = u128::from(begun) * SECOND_NS;
        self.start + to_u64(wait.div_ceil(u128::from(self.rate)))
    }

    /// Packets that may leave at once after a pause: two milliseconds' worth, and not too few.
    fn bucket(&self) -> u64 {
        (self.rate / 500_000).max(self.least)
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
    fn bursts_leave_whole_and_the_mean_is_that_of_the_rate() {
        let mut pace = Pace::in_bursts(1_000_000, 10, 0);
        assert_eq!(pace.allowed(0), 10);
        pace.spend(4);
        assert_eq!((pace.due(), pace.allowed(0)), (0, 6));
        pace.spend(6);
        assert_eq!(pace.due(), SECOND / 100);
        assert_eq!(pace.allowed(SECOND / 100 - 1), 0);
        let mut sent = 10;
        for tick in 1..=1_000 {
            let n = pace.allowed(tick * SECOND / 1_000);
            assert!(n == 0 || n == 10, "{n} at {tick} ms");
            pace.spend(n);
            sent += n;
        }
        assert_eq!(sent, 1_010);
        let mut slow = Pace::in_bursts(500, 1, 0);
        slow.spend(1);
        assert_eq!(slow.due(), 2 * SECOND, "half a packet a second");
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
