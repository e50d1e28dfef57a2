//! Random numbers that are the same for the same seed, on every host.
//!
//! The generator is xoshiro256++ of D. Blackman and S. Vigna, filled from a seed by SplitMix64, as its authors advise
//! (<https://prng.di.unimi.it>). Each use has a stream of its own, so that what one draws moves no other.

/// A stream of random numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Random([u64; 4]);

impl Random {
    /// Stream number `stream` of `seed`.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut fill = SplitMix(seed ^ SplitMix(stream).next());
        Self(std::array::from_fn(|_| fill.next()))
    }

    /// 64 random bits.
    #[inline]
    pub(super) fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number from 0 up to 1, without 1.
    #[inline]
    pub(super) fn unit(&mut self) -> f64 {
        // 53 bits are what a float of this size holds exactly.
        (self.next() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// Whether something happens that does so with this probability. Certainty draws nothing.
    #[inline]
    pub(super) fn happens(&mut self, probability: f64) -> bool {
        probability > 0.0 && (probability >= 1.0 || self.unit() < probability)
    }

    /// A number below `n`, which is above 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        // What this prefers small numbers by is n in 2^64.
        let product = u128::from(self.next()) * n as u128;
        usize::try_from(product >> 64).unwrap_or_default()
    }

    /// A normal number of mean 0 and standard deviation 1 (Box and Muller).
    pub(super) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// A number with Pareto's distribution of shape 3, moved and stretched to mean 0 and standard deviation 1.
    pub(super) fn pareto(&mut self) -> f64 {
        let value = (1.0 - self.unit()).cbrt().recip();
        (value - 1.5) / 0.75_f64.sqrt()
    }
}

struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generators_give_the_published_numbers() {
        let mut seeds = SplitMix(1_234_567);
        let published = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
        ];
        published
            .into_iter()
            .for_each(|number| assert_eq!(seeds.next(), number));
        let mut random = Random([1, 2, 3, 4]);
        let published = [
            41_943_041,
            58_720_359,
            3_588_806_011_781_223,
            3_591_011_842_654_386,
            9_228_616_714_210_784_205,
        ];
        published
            .into_iter()
            .for_each(|number| assert_eq!(random.next(), number));
    }

    #[test]
    fn streams_of_a_seed_differ_and_are_the_same_every_time() {
        let first = |seed, stream| Random::new(seed, stream).next();
        assert_eq!(first(1, 0), first(1, 0));
        assert_ne!(first(1, 0), first(1, 1));
        assert_ne!(first(1, 0), first(2, 0));
    }

    /// Mean and standard deviation of `n` draws.
    fn moments(n: u32, mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let draws: Vec<f64> = (0..n).map(|_| draw()).collect();
        let mean = draws.iter().sum::<f64>() / f64::from(n);
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
        (mean, variance.sqrt())
    }

    #[test]
    fn distributions_have_the_moments_they_should() {
        let mut random = Random::new(7, 0);
        let (mean, deviation) = moments(1_000_000, || random.unit());
        assert!((mean - 0.5).abs() < 0.002 && (deviation - 12_f64.sqrt().recip()).abs() < 0.002);
        let (mean, deviation) = moments(1_000_000, || random.normal());
        assert!(mean.abs() < 0.005 && (deviation - 1.0).abs() < 0.005);
        let (mean, deviation) = moments(1_000_000, || random.pareto());
        // Its fourth moment has no bound, so the deviation settles slowly.
        assert!(mean.abs() < 0.01 && (deviation - 1.0).abs() < 0.1);
    }

    #[test]
    fn chances_are_as_asked_for() {
        let mut random = Random::new(3, 0);
        let n = (0..100_000).filter(|_| random.happens(0.1)).count();
        assert!((9_600..10_400).contains(&n), "{n}");
        assert!((0..1_000).all(|_| random.happens(1.0) && !random.happens(0.0)));
        let mut seen = [0; 5];
        (0..50_000).for_each(|_| seen[random.below(5)] += 1);
        assert!(seen.iter().all(|n| (9_500..10_500).contains(n)), "{seen:?}");
    }
}
