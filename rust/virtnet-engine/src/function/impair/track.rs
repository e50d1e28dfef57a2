//! A quantity over time: one value, or several one after the other, each for as long.

/// A value that stays, or values that take turns, from the first again after the last. Time counts from the moment it was ordered.
#[derive(Clone, Debug, PartialEq)]
pub struct Track {
    values: Vec<f64>,
    step_ns: u64,
}

impl Track {
    /// A value that stays.
    #[must_use]
    pub fn constant(value: f64) -> Self {
        Self {
            values: vec![value],
            step_ns: u64::MAX,
        }
    }

    /// Values of `step_ns` each; without any it is 0.
    #[must_use]
    pub fn of(values: Vec<f64>, step_ns: u64) -> Self {
        match values[..] {
            [] => Self::constant(0.0),
            [value] => Self::constant(value),
            _ => Self {
                values,
                step_ns: step_ns.max(1),
            },
        }
    }

    /// The values.
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The value `elapsed` ns after it was ordered.
    #[inline]
    pub(super) fn at(&self, elapsed: u64) -> f64 {
        match self.values[..] {
            [value] => value,
            _ => self.values[self.number(elapsed)],
        }
    }

    /// Whether it is always 0.
    #[inline]
    pub(super) fn is_zero(&self) -> bool {
        self.values.iter().all(|&value| value == 0.0)
    }

    fn number(&self, elapsed: u64) -> usize {
        usize::try_from(elapsed / self.step_ns).unwrap_or(usize::MAX) % self.values.len()
    }

    /// When `amount` is done that is begun at `start`, if the values are how much is done in a second; `None`: never.
    pub(super) fn done(&self, start: Moment, mut amount: f64) -> Option<Moment> {
        if let [rate] = self.values[..] {
            return (rate > 0.0).then(|| start.plus(amount * SECOND_NS / rate));
        }
        let cycle_ns = self.step_ns.checked_mul(self.values.len() as u64)?;
        let in_a_cycle = self.values.iter().sum::<f64>() * self.step_ns as f64 / SECOND_NS;
        if in_a_cycle <= 0.0 {
            return None;
        }
        let cycles = (amount / in_a_cycle).floor();
        amount -= cycles * in_a_cycle;
        let mut at = start;
        at.ns = at.ns.checked_add(whole(cycles).checked_mul(cycle_ns)?)?;
        // What is left takes a cycle at most, and the step that was begun in the middle once more.
        for _ in 0..=self.values.len() + 1 {
            let rate = self.at(at.ns);
            let end = (at.ns / self.step_ns + 1).checked_mul(self.step_ns)?;
            let left_ns = (end - at.ns) as f64 - at.fraction;
            if rate * left_ns / SECOND_NS >= amount {
                return Some(at.plus(amount * SECOND_NS / rate.max(f64::MIN_POSITIVE)));
            }
            amount -= rate * left_ns / SECOND_NS;
            at = Moment {
                ns: end,
                fraction: 0.0,
            };
        }
        Some(at)
    }
}

const SECOND_NS: f64 = 1e9;

/// A moment finer than a nanosecond: a short frame on a fast cable takes a few of them, and errors would add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub(super) struct Moment {
    pub(super) ns: u64,
    fraction: f64,
}

impl Moment {
    pub(super) fn at(ns: u64) -> Self {
        Self { ns, fraction: 0.0 }
    }

    fn plus(self, ns: f64) -> Self {
        let sum = self.fraction + ns;
        Self {
            ns: self.ns.saturating_add(whole(sum)),
            fraction: sum - sum.floor(),
        }
    }

    /// The first whole nanosecond from then on.
    pub(super) fn reached(self) -> u64 {
        self.ns.saturating_add(u64::from(self.fraction > 0.0))
    }
}

/// A duration in ns as a whole number; what is below 0 is 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float becomes the nearest number there is"
)]
pub(super) fn whole(ns: f64) -> u64 {
    ns.max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn values_take_turns() {
        let track = Track::of(vec![1.0, 2.0, 3.0], 10 * MS);
        let seen = [0, 9, 10, 29, 30, 45].map(|ms| track.at(ms * MS));
        assert_eq!(seen, [1.0, 1.0, 2.0, 3.0, 1.0, 2.0]);
        assert_eq!(Track::constant(7.0).at(u64::MAX), 7.0);
        assert!(Track::of(Vec::new(), 0).is_zero());
    }

    #[test]
    fn work_is_done_at_the_rate_of_its_time() {
        let when = |track: &Track, start, amount| {
            track
                .done(Moment::at(start * MS), amount)
                .map(|at| at.reached() / 1_000)
        };
        // 1000 a second is one a millisecond.
        let steady = Track::constant(1_000.0);
        assert_eq!(when(&steady, 5, 2.5), Some(7_500));
        let steps = Track::of(vec![1_000.0, 0.0, 2_000.0], 10 * MS);
        assert_eq!(when(&steps, 0, 10.0), Some(10_000));
        assert_eq!(when(&steps, 0, 11.0), Some(20_500));
        assert_eq!(when(&steps, 15, 20.0), Some(30_000));
        assert_eq!(when(&steps, 15, 21.0), Some(31_000));
        assert_eq!(when(&steps, 5, 300.0), Some(305_000), "ten rounds of 30");
        assert_eq!(when(&Track::constant(0.0), 0, 1.0), None);
        assert_eq!(when(&Track::of(vec![0.0, 0.0], MS), 0, 1.0), None);
    }

    #[test]
    fn fractions_add_up() {
        // 64 bytes at 100 Gbit/s: 5.12 ns.
        let track = Track::constant(100e9);
        let mut at = Moment::at(1 << 50);
        for _ in 0..1_000_000 {
            at = track.done(at, 512.0).unwrap();
        }
        let elapsed = at.reached() - (1 << 50);
        assert!((5_119_999..=5_120_001).contains(&elapsed), "{elapsed}");
    }
}
