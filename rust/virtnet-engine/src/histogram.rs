//! How long things took: counts in buckets that are narrow where values are small.
//!
//! Buckets are linear within each power of two, so that a value is known to about 3 % over the whole range of `u64`.

use std::fmt;

/// Buckets per power of two.
const FINE: usize = 32;
const FINE_BITS: usize = 5;
const BUCKETS: usize = (64 - FINE_BITS + 1) * FINE;

/// Counts of values, by size.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    sum: u128,
    min: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: Box::new([0; BUCKETS]),
            sum: 0,
            min: u64::MAX,
            max: 0,
        }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Histogram").field(&self.summary()).finish()
    }
}

/// The shape of a [`Histogram`] in a few numbers, all of the unit of the values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// How many values there are.
    pub count: u64,
    /// The smallest.
    pub min: u64,
    /// Their mean.
    pub mean: u64,
    /// Half of them are no larger.
    pub p50: u64,
    /// Nine of ten are no larger.
    pub p90: u64,
    /// 99 of 100 are no larger.
    pub p99: u64,
    /// 999 of 1000 are no larger.
    pub p999: u64,
    /// 9999 of 10 000 are no larger.
    pub p9999: u64,
    /// The largest.
    pub max: u64,
}

impl Histogram {
    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        self.record_many(value, 1);
    }

    /// Counts a value that came `n` times; 0 is none.
    pub fn record_many(&mut self, value: u64, n: u64) {
        if n == 0 {
            return;
        }
        self.counts[bucket(value)] += n;
        self.sum += u128::from(value) * u128::from(n);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Adds the values of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts.iter()) {
            *mine += theirs;
        }
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// How many values there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The sum of all values.
    #[must_use]
    pub fn sum(&self) -> u128 {
        self.sum
    }

    /// The buckets that hold something, in order: the smallest and the largest value that belongs there, and how many there are.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let counts = self.counts.iter().enumerate();
        counts
            .filter(|&(_, &n)| n > 0)
            .map(|(index, &n)| (lower_edge(index), upper_edge(index), n))
    }

    /// A value that `per_mille` of 1000 values do not pass by more than a bucket's width; 0 if there are none.
    #[must_use]
    pub fn percentile(&self, per_mille: u64) -> u64 {
        self.quantile(per_mille, 1_000)
    }

    /// The same for `part` of `of` values.
    #[must_use]
    pub fn quantile(&self, part: u64, of: u64) -> u64 {
        let count = self.count();
        if count == 0 {
            return 0;
        }
        let rank = (u128::from(count) * u128::from(part.min(of))).div_ceil(u128::from(of.max(1)));
        let mut below = 0;
        for (index, n) in self.counts.iter().enumerate() {
            below += u128::from(*n);
            if below >= rank.max(1) {
                return upper_edge(index).clamp(self.min, self.max);
            }
        }
        self.max
    }

    /// Its shape in a few numbers.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let count = self.count();
        if count == 0 {
            return Summary::default();
        }
        Summary {
            count,
            min: self.min,
            mean: u64::try_from(self.sum / u128::from(count)).unwrap_or(u64::MAX),
            p50: self.percentile(500),
            p90: self.percentile(900),
            p99: self.percentile(990),
            p999: self.percentile(999),
            p9999: self.quantile(9_999, 10_000),
            max: self.max,
        }
    }
}

fn bucket(value: u64) -> usize {
    let magnitude = 64 - value.leading_zeros() as usize;
    let octave = magnitude.saturating_sub(FINE_BITS + 1);
    // The top bits of the value; from the second power of two on their first one is always set.
    let fine = usize::try_from(value >> octave).unwrap_or(FINE);
    (octave * FINE + fine).min(BUCKETS - 1)
}

/// The smallest value of a bucket.
fn lower_edge(index: usize) -> u64 {
    match index {
        0 => 0,
        _ => upper_edge(index - 1).saturating_add(1),
    }
}

/// The largest value of a bucket.
fn upper_edge(index: usize) -> u64 {
    let octave = (index / FINE).saturating_sub(1);
    let fine = (index - octave * FINE) as u128;
    u64::try_from(((fine + 1) << octave) - 1).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_the_bucket_that_says_so_to_about_three_percent() {
        let mut values: Vec<u64> = (0..200_000).collect();
        values.extend((0..64).flat_map(|bit| [1 << bit, (1 << bit) - 1, (1 << bit) | 1]));
        values.push(u64::MAX);
        for value in values {
            let edge = upper_edge(bucket(value));
            assert!(edge >= value, "{value} is above {edge}");
            assert!(edge - value <= value / 32, "{value} is far from {edge}");
        }
    }

    #[test]
    fn percentiles_of_a_known_series() {
        let mut histogram = Histogram::default();
        (1..=1_000).for_each(|value| histogram.record(value));
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.min, summary.max), (1_000, 1, 1_000));
        assert_eq!(summary.mean, 500);
        for (found, expected) in [(summary.p50, 500), (summary.p90, 900), (summary.p99, 990)] {
            assert!(found >= expected && found <= expected + expected / 32);
        }
    }

    #[test]
    fn merging_is_as_if_all_were_recorded_in_one() {
        let (mut left, mut right, mut both) = (
            Histogram::default(),
            Histogram::default(),
            Histogram::default(),
        );
        for value in [0, 5, 77, 1 << 40] {
            left.record(value);
            both.record(value);
        }
        for value in [3, u64::MAX] {
            right.record(value);
            both.record(value);
        }
        left.merge(&right);
        assert_eq!(left, both);
    }

    #[test]
    fn buckets_that_hold_something_say_what_belongs_there() {
        let mut histogram = Histogram::default();
        for value in [0, 7, 7, 1_000, u64::MAX] {
            histogram.record(value);
        }
        let buckets: Vec<_> = histogram.buckets().collect();
        assert_eq!(buckets[..2], [(0, 0, 1), (7, 7, 2)]);
        assert_eq!(buckets[2], (992, 1_007, 1));
        assert_eq!((buckets[3].1, buckets[3].2), (u64::MAX, 1));
        assert_eq!(histogram.sum(), u128::from(u64::MAX) + 1_014);
    }

    #[test]
    fn an_empty_one_is_all_zero() {
        assert_eq!(Histogram::default().summary(), Summary::default());
    }
}
