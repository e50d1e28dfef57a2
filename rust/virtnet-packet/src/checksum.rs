//! The internet checksum (RFC 1071), over bytes that lie together.

/// A sum of 16-bit words that is not folded yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The sum of `bytes`, which start on an even place; a last odd one counts as the upper half of a word.
    #[inline]
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // Native order, four bytes at once: one's complement sums do not mind (RFC 1071, 2), the result is turned round once.
        let sum: u64 = words
            .iter()
            .map(|&word| u64::from(u32::from_ne_bytes(word)))
            .sum();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        Self(u64::from(
            fold(sum + u64::from(u32::from_ne_bytes(last))).to_be(),
        ))
    }

    /// Both together, if the first had an even number of bytes.
    #[inline]
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// A word more.
    #[inline]
    #[must_use]
    pub fn and_word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// What goes into a packet.
    #[inline]
    #[must_use]
    pub fn checksum(self) -> u16 {
        !fold(self.0)
    }

    /// The same where nought means that there is no checksum (UDP): all ones are equal to it.
    #[inline]
    #[must_use]
    pub fn checksum_not_zero(self) -> u16 {
        match self.checksum() {
            0 => u16::MAX,
            sum => sum,
        }
    }
}

/// The sum in 16 bits, carries added where they belong: halves are added until one is left, without a branch.
#[inline]
fn fold(sum: u64) -> u16 {
    const LOW: u64 = u32::MAX as u64;
    let sum = (sum & LOW) + (sum >> 32);
    let sum = u32::try_from((sum + (sum >> 32)) & LOW).unwrap_or_default();
    // Either half gets the other, and the upper one the carry of the lower.
    let [a, b, ..] = sum.wrapping_add(sum.rotate_left(16)).to_be_bytes();
    u16::from_be_bytes([a, b])
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_sum_of_the_words_whatever_the_length() {
        let bytes: Vec<u8> = (0..300_u32).map(|n| (n * 37 % 251) as u8).collect();
        for len in 0..bytes.len() {
            let bytes = &bytes[..len];
            let word =
                |pair: &[u8]| u64::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u64::from);
            let mut plain: u64 = bytes.chunks(2).map(word).sum();
            while plain > 0xffff {
                plain = (plain & 0xffff) + (plain >> 16);
            }
            assert_eq!(u64::from(!Sum::of(bytes).checksum()), plain, "{len} bytes");
        }
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let sum = Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.checksum(), !0xddf2);
        let halves = Sum::of(&[0x00, 0x01, 0xf2, 0x03]).and(Sum::of(&[0xf4, 0xf5, 0xf6, 0xf7]));
        assert_eq!(halves.checksum(), !0xddf2);
        assert_eq!(Sum::default().and_word(0xffff).checksum_not_zero(), 0xffff);
    }
}
