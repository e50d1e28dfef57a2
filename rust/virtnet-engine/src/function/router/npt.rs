//! Prefixes of IPv6 in place of one another: an address inside is one outside, and the other way round.
//!
//! Nothing is remembered. What another prefix adds to checksums is taken back in a word of the address that the prefix does not
//! reach, so no checksum changes, whatever is behind the header and however much of it there is.
//!
//! Packets that leave to the outside get a source there, those for an address outside their receiver inside; both if they are
//! from one station inside to another. ICMPv6 errors quote what their receivers have sent.
//!
//! Spec: RFC 6296.

use std::net::Ipv6Addr;

use virtnet_packet::checksum::Sum;
use virtnet_packet::header::ETHERNET_LEN;

use super::packet::{ICMPV6, V6, V6_LEN};

/// The longest prefix that can be translated: behind it is a station's own part of the address.
pub const TRANSLATED_PREFIX_MAX: u8 = 64;

/// Where an IPv6 header has its addresses.
pub(super) const SOURCE: usize = 8;
pub(super) const DESTINATION: usize = 24;

/// What can make up for another prefix: all words but this one, which is as good as 0 to a checksum.
const NEUTRAL: u16 = 0xffff;

/// A prefix inside and the one it is outside, of the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixPair {
    /// Inside.
    pub inside: Ipv6Addr,
    /// Outside.
    pub outside: Ipv6Addr,
    /// Their length in bits, up to [`TRANSLATED_PREFIX_MAX`].
    pub len: u8,
}

/// Which way an address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    In,
    Out,
}

/// Which addresses of a packet are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Crossing6 {
    /// Its source, which is inside.
    pub(super) out: bool,
    /// Its destination, which is outside.
    pub(super) into: bool,
}

/// No address of the other side is the same as this one; where it stands in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unmappable(pub(super) usize);

#[derive(Clone, Copy, Debug)]
struct Pair {
    inside: u128,
    outside: u128,
    mask: u128,
    len: u8,
    /// What an address that goes out makes up for.
    adjustment: u16,
}

/// All pairs, the longest first.
#[derive(Debug, Default)]
pub(super) struct Pairs(Vec<Pair>);

impl Pairs {
    pub(super) fn new(pairs: &[PrefixPair]) -> Self {
        let mut all: Vec<Pair> = pairs.iter().map(Pair::new).collect();
        all.sort_by_key(|pair| std::cmp::Reverse(pair.len));
        Self(all)
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What an address is on the other side; itself, if it is not of a prefix that is translated. None: nothing can be.
    pub(super) fn map(&self, ip: Ipv6Addr, way: Way) -> Option<Ipv6Addr> {
        let pair = self.0.iter().find(|pair| pair.has(ip, way));
        pair.map_or(Some(ip), |pair| pair.map(ip, way))
    }

    /// Translates the addresses of the packet in a frame, and of the one that it quotes if it is an error.
    pub(super) fn carry_out(
        &self,
        head: &mut [u8],
        ip: &V6,
        crossing: Crossing6,
    ) -> Result<(), Unmappable> {
        let all = [
            (crossing.out, SOURCE, DESTINATION, Way::Out),
            (crossing.into, DESTINATION, SOURCE, Way::In),
        ];
        let quoted = quoted(head, ip);
        for (is_wanted, at, quoted_at, way) in all {
            if !is_wanted {
                continue;
            }
            if !self.rewrite(head, ETHERNET_LEN + at, way) {
                return Err(Unmappable(at));
            }
            if let Some(inner) = quoted {
                self.rewrite(head, inner + quoted_at, way);
            }
        }
        Ok(())
    }

    /// Gives a packet that was to leave the addresses that it has come with, as far as they show it: of two stations inside that
    /// call each other by their addresses there, none was translated.
    pub(super) fn restore(&self, head: &mut [u8], ip: &V6) {
        let is_within = self.0.iter().any(|pair| pair.has(ip.source, Way::Out));
        self.rewrite(head, ETHERNET_LEN + SOURCE, Way::In);
        if !is_within {
            self.rewrite(head, ETHERNET_LEN + DESTINATION, Way::Out);
        }
    }

    /// Translates the address at `at`, if it is there and of a prefix that is; false: it cannot be.
    fn rewrite(&self, head: &mut [u8], at: usize, way: Way) -> bool {
        let Some(place) = head.get_mut(at..).and_then(<[u8]>::first_chunk_mut) else {
            return true;
        };
        match self.map(Ipv6Addr::from(*place), way) {
            Some(ip) => {
                *place = ip.octets();
                true
            }
            None => false,
        }
    }
}

impl Pair {
    fn new(pair: &PrefixPair) -> Self {
        let len = pair.len.min(TRANSLATED_PREFIX_MAX);
        let mask = u128::MAX
            .checked_shl(128 - u32::from(len))
            .unwrap_or_default();
        let (inside, outside) = (pair.inside.to_bits() & mask, pair.outside.to_bits() & mask);
        let sum = |prefix: u128| !Sum::of(&prefix.to_be_bytes()).checksum();
        Self {
            inside,
            outside,
            mask,
            len,
            adjustment: plus(sum(inside), !sum(outside)),
        }
    }

    fn has(&self, ip: Ipv6Addr, way: Way) -> bool {
        let prefix = match way {
            Way::In => self.outside,
            Way::Out => self.inside,
        };
        ip.to_bits() & self.mask == prefix
    }

    /// Spec: RFC 6296, 3.1 to 3.7.
    fn map(&self, ip: Ipv6Addr, way: Way) -> Option<Ipv6Addr> {
        let (prefix, adjustment) = match way {
            Way::In => (self.inside, !self.adjustment),
            Way::Out => (self.outside, self.adjustment),
        };
        let mapped = Ipv6Addr::from_bits(prefix | ip.to_bits() & !self.mask);
        let mut words = mapped.segments();
        let places = if self.len <= 48 { 3..4 } else { 4..8 };
        let word = words[places].iter_mut().find(|word| **word != NEUTRAL)?;
        *word = match plus(*word, adjustment) {
            NEUTRAL => 0,
            word => word,
        };
        Some(Ipv6Addr::from(words))
    }
}

/// The sum of two words in one's complement.
fn plus(a: u16, b: u16) -> u16 {
    !Sum::default().and_word(a).and_word(b).checksum()
}

/// Where the packet begins that an ICMPv6 error quotes, as far as it shows its addresses.
fn quoted(head: &[u8], ip: &V6) -> Option<usize> {
    let upper = ip.transport(head)?;
    let is_error = upper.kind == ICMPV6 && *head.get(upper.at)? < 128;
    let inner = upper.at + 8;
    let is_quoted = is_error && head.get(inner)? >> 4 == 6 && head.len() >= inner + V6_LEN;
    is_quoted.then_some(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    fn pairs(inside: &str, outside: &str, len: u8) -> Pairs {
        Pairs::new(&[PrefixPair {
            inside: ip(inside),
            outside: ip(outside),
            len,
        }])
    }

    #[test]
    fn the_example_of_the_specification_comes_out() {
        // Spec: RFC 6296, 3.6.
        let all = pairs("fd01:203:405::", "2001:db8:1::", 48);
        let (inner, outer) = (ip("fd01:203:405:1::1234"), ip("2001:db8:1:d550::1234"));
        assert_eq!(all.map(inner, Way::Out), Some(outer));
        assert_eq!(all.map(outer, Way::In), Some(inner));
        assert_eq!(
            all.map(ip("2001:db8:2::1"), Way::In),
            Some(ip("2001:db8:2::1"))
        );
    }

    #[test]
    fn sums_stay_and_the_way_back_is_the_way_out_reversed() {
        let sum = |ip: Ipv6Addr| match Sum::of(&ip.octets()).checksum() {
            0xffff => 0,
            sum => sum,
        };
        for (inside, outside, len) in [
            ("fd00::", "2001:db8:ffff::", 48),
            ("fd00:1:2::", "2001:db8::", 32),
            ("fd00:1:2:300::", "2001:db8:0:ff00::", 56),
            ("fd00:1:2:3::", "2001:db8:a:b::", 64),
        ] {
            let all = pairs(inside, outside, len);
            for subnet in [0u16, 1, 0x80, 0x7fff, 0xfffe] {
                for own in [
                    0u64,
                    1,
                    0xffff,
                    0xffff_0000_0000_0000,
                    u64::MAX - 1,
                    0x1234_5678_9abc_def0,
                ] {
                    let rest = u128::from(subnet) << 64 | u128::from(own);
                    let mask = u128::MAX >> len;
                    let inner = Ipv6Addr::from_bits(ip(inside).to_bits() | rest & mask);
                    let outer = all.map(inner, Way::Out).unwrap();
                    assert_eq!(outer.to_bits() & !mask, ip(outside).to_bits());
                    assert_eq!(sum(outer), sum(inner), "{inner} {outer}");
                    assert_eq!(all.map(outer, Way::In), Some(inner), "{outer}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_make_up_for_the_prefix_is_not_translated() {
        let all = pairs("fd00::", "2001:db8::", 48);
        assert_eq!(all.map(ip("fd00:0:0:ffff::1"), Way::Out), None);
        let all = pairs("fd00::", "2001:db8::", 64);
        assert_eq!(all.map(ip("fd00::ffff:ffff:ffff:ffff"), Way::Out), None);
        assert!(all.map(ip("fd00::ffff:ffff:ffff:fffe"), Way::Out).is_some());
    }
}
