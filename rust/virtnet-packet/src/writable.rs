//! Header fields that can be written, with the checksums that cover them.
//!
//! A checksum is changed by the difference that a field makes (RFC 1624), so that one that was wrong stays wrong, and payload is
//! never read. Where a sender left the checksum to be done, the field holds the sum of the pseudo-header, and that is kept up.

use crate::checksum::Sum;
use crate::{Fields, Offload};

/// A field that can be written where a packet has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writable {
    /// Ethernet's destination.
    EthDst,
    /// Ethernet's source.
    EthSrc,
    /// Number of the outer VLAN, of a packet that has a tag.
    Vlan,
    /// Time to live, or hop limit.
    IpTtl,
    /// IPv4's source.
    IpSrc,
    /// IPv4's destination.
    IpDst,
    /// IPv6's source.
    Ip6Src,
    /// IPv6's destination.
    Ip6Dst,
    /// Source port of TCP or UDP.
    L4Src,
    /// Destination port of TCP or UDP.
    L4Dst,
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Bytes of an Ethernet header.
const ETHERNET_LEN: usize = 14;

/// A place in a frame, and what covers it.
struct Place {
    at: usize,
    len: usize,
    /// IPv4's header checksum.
    in_header: bool,
    /// The pseudo-header of the transport's checksum.
    in_pseudo: bool,
    /// The transport's header.
    in_transport: bool,
}

impl Writable {
    /// The field that has this name among the columns.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "eth_dst" => Self::EthDst,
            "eth_src" => Self::EthSrc,
            "vlan" => Self::Vlan,
            "ip_ttl" => Self::IpTtl,
            "ip_src" => Self::IpSrc,
            "ip_dst" => Self::IpDst,
            "ip6_src" => Self::Ip6Src,
            "ip6_dst" => Self::Ip6Dst,
            "l4_src" => Self::L4Src,
            "l4_dst" => Self::L4Dst,
            _ => return None,
        })
    }

    /// Whether its values have 128 bits.
    #[must_use]
    pub fn is_wide(self) -> bool {
        matches!(self, Self::Ip6Src | Self::Ip6Dst)
    }

    /// Where the field is in a frame with these headers; `None` if it does not have it.
    #[must_use]
    pub fn bytes_of(self, fields: &Fields, frame_len: usize) -> Option<std::ops::Range<usize>> {
        let place = self.place(fields, frame_len)?;
        Some(place.at..place.at + place.len)
    }

    #[inline(always)]
    fn place(self, of: &Fields, frame_len: usize) -> Option<Place> {
        let (is_v4, is_v6) = (of.ip_version == 4, of.ip_version == 6);
        let has_ports = of.l4_at > 0 && matches!(of.ip_proto, TCP | UDP);
        let (is_there, at, len) = match self {
            Self::EthDst => (frame_len >= ETHERNET_LEN, 0, 6),
            Self::EthSrc => (frame_len >= ETHERNET_LEN, 6, 6),
            Self::Vlan => (of.vlan_at > 0, of.vlan_at, 2),
            Self::IpTtl => (is_v4 || is_v6, of.ip_at + if is_v6 { 7 } else { 8 }, 1),
            Self::IpSrc => (is_v4, of.ip_at + 12, 4),
            Self::IpDst => (is_v4, of.ip_at + 16, 4),
            Self::Ip6Src => (is_v6, of.ip_at + 8, 16),
            Self::Ip6Dst => (is_v6, of.ip_at + 24, 16),
            Self::L4Src => (has_ports, of.l4_at, 2),
            Self::L4Dst => (has_ports, of.l4_at + 2, 2),
        };
        let is_address = matches!(
            self,
            Self::IpSrc | Self::IpDst | Self::Ip6Src | Self::Ip6Dst
        );
        (is_there && at + len <= frame_len).then_some(Place {
            at,
            len,
            in_header: is_v4 && (is_address || self == Self::IpTtl),
            in_pseudo: is_address,
            in_transport: matches!(self, Self::L4Src | Self::L4Dst),
        })
    }

    /// Writes the low bits of `value` into a frame, or as much of it as there is; false if it does not have the field.
    pub fn write(self, frame: &mut [u8], offload: &Offload, value: u128) -> bool {
        let fields = Fields::parse(frame);
        self.write_to(frame, &fields, offload, value)
    }

    /// The same for a frame that was parsed; what was written since then has not moved anything. In line: who writes a field that is
    /// known there to many packets has a loop for just this one, at a third of the cost.
    #[inline(always)]
    pub fn write_to(
        self,
        frame: &mut [u8],
        fields: &Fields,
        offload: &Offload,
        value: u128,
    ) -> bool {
        let Some(place) = self.place(fields, frame.len()) else {
            return false;
        };
        let is_covered = place.in_header || place.in_pseudo || place.in_transport;
        // Checksums are of pairs of bytes: the time to live is the first of one.
        let pairs = place.at..place.at + place.len.next_multiple_of(2);
        if is_covered && frame.len() < pairs.end {
            return false;
        }
        let change = match place.len {
            1 if !is_covered => {
                frame[place.at] = low_byte(value);
                None
            }
            1 => change_word(frame, place.at, |old| {
                u16::from_be_bytes([low_byte(value), old.to_be_bytes()[1]])
            }),
            2 => change_word(frame, place.at, |old| match self {
                // The upper four bits are priority and drop eligibility.
                Self::Vlan => old & 0xf000 | low_word(value) & 0x0fff,
                _ => low_word(value),
            }),
            _ => {
                let bytes = value.to_be_bytes();
                change_bytes(&mut frame[pairs], &bytes[16 - place.len..])
            }
        };
        let Some(change) = change.filter(|_| is_covered) else {
            return true;
        };
        if place.in_header {
            renew_checksum(frame, fields.ip_at + 10, change, false);
        }
        if (place.in_pseudo || place.in_transport)
            && let Some(offset) = transport_checksum(fields)
        {
            let is_left_to_do = offload.flags & Offload::NEEDS_CSUM != 0;
            let is_udp = fields.ip_proto == UDP;
            let at = fields.l4_at + offset;
            let is_none = is_udp && frame.get(at..at + 2) == Some(&[0, 0]);
            if is_left_to_do && place.in_pseudo {
                renew_partial_sum(frame, at, change);
            } else if !is_left_to_do && !is_none {
                renew_checksum(frame, at, change, is_udp);
            }
        }
        true
    }
}

/// Writes another word; by what that changes sums over it (RFC 1624, equation 3), or `None` if it was the same.
#[inline(always)]
fn change_word(frame: &mut [u8], at: usize, new: impl FnOnce(u16) -> u16) -> Option<Sum> {
    let place = frame.get_mut(at..)?.first_chunk_mut()?;
    let old = u16::from_be_bytes(*place);
    let new = new(old);
    *place = new.to_be_bytes();
    (new != old).then(|| Sum::default().and_word(!old).and_word(new))
}

/// The same for a number of words.
#[inline]
fn change_bytes(place: &mut [u8], new: &[u8]) -> Option<Sum> {
    if place == new {
        return None;
    }
    let without = words(place).fold(Sum::default(), |sum, word| sum.and_word(!word));
    place.copy_from_slice(new);
    Some(words(place).fold(without, Sum::and_word))
}

#[expect(clippy::cast_possible_truncation, reason = "the lowest 16 bits")]
fn low_word(value: u128) -> u16 {
    value as u16
}

#[expect(clippy::cast_possible_truncation, reason = "the lowest 8 bits")]
fn low_byte(value: u128) -> u8 {
    value as u8
}

/// The words of bytes that are pairs.
#[inline]
fn words(bytes: &[u8]) -> impl Iterator<Item = u16> {
    let (pairs, _) = bytes.as_chunks::<2>();
    pairs.iter().map(|&pair| u16::from_be_bytes(pair))
}

/// Where in its header a transport protocol has the checksum that covers the addresses.
#[inline]
fn transport_checksum(fields: &Fields) -> Option<usize> {
    match fields.ip_proto {
        _ if fields.l4_at == 0 => None,
        TCP => Some(16),
        UDP => Some(6),
        ICMPV6 if fields.ip_version == 6 => Some(2),
        _ => None,
    }
}

#[inline]
fn renew_checksum(frame: &mut [u8], at: usize, change: Sum, is_udp: bool) {
    let Some(place) = frame.get_mut(at..).and_then(<[u8]>::first_chunk_mut) else {
        return;
    };
    let sum = change.and_word(!u16::from_be_bytes(*place));
    let checksum = if is_udp {
        sum.checksum_not_zero()
    } else {
        sum.checksum()
    };
    *place = checksum.to_be_bytes();
}

fn renew_partial_sum(frame: &mut [u8], at: usize, change: Sum) {
    if let Some(place) = frame.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        let sum = change.and_word(u16::from_be_bytes(*place));
        *place = (!sum.checksum()).to_be_bytes();
    }
}
