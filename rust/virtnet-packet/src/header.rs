//! Views of the headers a switch looks at, on a packet's private head.

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_LEN: usize = 14;

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it names a group (multicast or broadcast) rather than one station.
    #[inline]
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The address as a number below 2^48.
    #[inline]
    #[must_use]
    pub fn as_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::fmt::Debug for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Destination of the frame that starts with `head`, or `None` for a runt.
#[inline]
#[must_use]
pub fn destination(head: &[u8]) -> Option<Mac> {
    head.first_chunk::<6>().map(|&mac| Mac(mac))
}

/// Source of the frame that starts with `head`, or `None` for a runt.
#[inline]
#[must_use]
pub fn source(head: &[u8]) -> Option<Mac> {
    head.first_chunk::<12>()
        .map(|&[_, _, _, _, _, _, a, b, c, d, e, f]| Mac([a, b, c, d, e, f]))
}

/// Swaps source and destination in place; a runt stays as it is.
#[inline]
pub fn swap_macs(head: &mut [u8]) {
    if let Some((macs, _)) = head.split_first_chunk_mut::<12>() {
        macs.rotate_left(6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: [u8; 14] = [2, 0, 0, 0, 0, 1, 6, 5, 4, 3, 2, 1, 8, 0];

    #[test]
    fn addresses_are_read_from_their_places() {
        let (to, from) = (Mac([2, 0, 0, 0, 0, 1]), Mac([6, 5, 4, 3, 2, 1]));
        assert_eq!(destination(&HEAD), Some(to));
        assert_eq!(source(&HEAD), Some(from));
        assert_eq!(from.as_u64(), 0x0605_0403_0201);
        assert_eq!(from.to_string(), "06:05:04:03:02:01");
        assert_eq!(format!("{from:?}"), from.to_string());
    }

    #[test]
    fn a_runt_has_no_addresses_and_stays_as_it_is() {
        assert_eq!(destination(&HEAD[..5]), None);
        assert_eq!(source(&HEAD[..11]), None);
        let mut runt = [1; 11];
        swap_macs(&mut runt);
        assert_eq!(runt, [1; 11]);
    }

    #[test]
    fn swapping_exchanges_the_addresses_and_nothing_else() {
        let mut head = HEAD;
        swap_macs(&mut head);
        assert_eq!(
            (destination(&head), source(&head)),
            (source(&HEAD), destination(&HEAD))
        );
        assert_eq!(head[12..], HEAD[12..]);
    }

    #[test]
    fn groups_are_told_by_the_lowest_bit_of_the_first_byte() {
        for (mac, group) in [
            (Mac::BROADCAST, true),
            (Mac([1, 0, 0x5e, 0, 0, 1]), true),
            (Mac([2, 0, 0, 0, 0, 1]), false),
            (Mac([0xfe; 6]), false),
        ] {
            assert_eq!(mac.is_group(), group, "{mac}");
        }
    }
}
