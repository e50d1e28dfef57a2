//! What a router reads of a packet: the fixed headers of IPv4 and IPv6, checked as far as forwarding needs it.
//!
//! Spec: RFC 791, RFC 1812 (5.2.2), RFC 8200.

use std::net::{Ipv4Addr, Ipv6Addr};

use virtnet_packet::checksum::Sum;
use virtnet_packet::header::{ETHERNET_LEN, Mac};
use virtnet_packet::{Burst, Offload};

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;

/// Bytes of an IPv4 header without options.
pub(super) const V4_LEN: usize = 20;
/// Bytes of an IPv6 header.
pub(super) const V6_LEN: usize = 40;

/// An IPv4 packet's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct V4 {
    pub(super) header_len: usize,
    pub(super) total_len: usize,
    /// Whether it must not be cut into fragments.
    pub(super) whole: bool,
    /// Whether it is a fragment but the first.
    pub(super) later: bool,
    /// Whether it is a fragment.
    pub(super) fragment: bool,
    pub(super) ttl: u8,
    pub(super) protocol: u8,
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
}

impl V4 {
    /// Reads the header of a frame of `frame_len` bytes; none: it is none, or its checksum is wrong.
    #[inline]
    pub(super) fn of(head: &[u8], frame_len: usize) -> Option<Self> {
        let ip = head.get(ETHERNET_LEN..)?;
        let fixed: &[u8; V4_LEN] = ip.first_chunk()?;
        let header_len = usize::from(fixed[0] & 15) * 4;
        let total_len = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        let fits = fixed[0] >> 4 == 4
            && header_len >= V4_LEN
            && total_len >= header_len
            && total_len + ETHERNET_LEN <= frame_len;
        if !fits {
            return None;
        }
        // Of a length that is known it is a few additions.
        let sum = if header_len == V4_LEN {
            Sum::of(fixed)
        } else {
            Sum::of(ip.get(..header_len)?)
        };
        if sum.checksum() != 0 {
            return None;
        }
        let fragment = u16::from_be_bytes([fixed[6], fixed[7]]);
        Some(Self {
            header_len,
            total_len,
            whole: fragment & 0x4000 != 0,
            later: fragment & 0x1fff != 0,
            fragment: fragment & 0x3fff != 0,
            ttl: fixed[8],
            protocol: fixed[9],
            source: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]),
            destination: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]),
        })
    }

    /// Where the transport's header is in the frame.
    #[inline]
    pub(super) fn transport(&self) -> usize {
        ETHERNET_LEN + self.header_len
    }

    /// Whether its source can be one station's. Spec: RFC 1812, 5.3.7.
    #[inline]
    pub(super) fn has_source(&self) -> bool {
        let ip = self.source;
        !(ip.is_multicast() || ip.is_loopback() || ip.octets()[0] == 0 || ip.is_broadcast())
    }
}

/// An IPv6 packet's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct V6 {
    pub(super) total_len: usize,
    pub(super) hops: u8,
    /// What comes behind it.
    pub(super) next: u8,
    pub(super) source: Ipv6Addr,
    pub(super) destination: Ipv6Addr,
}

impl V6 {
    /// Reads the header of a frame of `frame_len` bytes; none: it is none.
    #[inline]
    pub(super) fn of(head: &[u8], frame_len: usize) -> Option<Self> {
        let fixed: &[u8; V6_LEN] = head.get(ETHERNET_LEN..)?.first_chunk()?;
        let total_len = V6_LEN + usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
        if fixed[0] >> 4 != 6 || total_len + ETHERNET_LEN > frame_len {
            return None;
        }
        let (source, destination) = (fixed[8..24].first_chunk()?, fixed[24..40].first_chunk()?);
        Some(Self {
            total_len,
            hops: fixed[7],
            next: fixed[6],
            source: Ipv6Addr::from(*source),
            destination: Ipv6Addr::from(*destination),
        })
    }

    /// What is behind the headers of IPv6, as far as the head shows; none in fragments but the first. Spec: RFC 8200, 4.
    pub(super) fn transport(&self, head: &[u8]) -> Option<Upper> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION: u8 = 60;
        let (mut kind, mut at) = (self.next, ETHERNET_LEN + V6_LEN);
        let (mut named_at, mut is_piece) = (ETHERNET_LEN + 6, false);
        loop {
            let len = match kind {
                HOP_BY_HOP | ROUTING | DESTINATION => 8 + usize::from(*head.get(at + 1)?) * 8,
                FRAGMENT if word(head, at + 2) & 0xfff8 == 0 => {
                    is_piece |= word(head, at + 2) & 1 != 0;
                    8
                }
                FRAGMENT => return None,
                _ => {
                    return Some(Upper {
                        kind,
                        at,
                        named_at,
                        is_piece,
                    });
                }
            };
            kind = *head.get(at)?;
            named_at = at;
            at += len;
        }
    }
}

/// What is behind the headers of IPv6.
#[derive(Clone, Copy, Debug)]
pub(super) struct Upper {
    /// What it is.
    pub(super) kind: u8,
    /// Where it begins in the frame.
    pub(super) at: usize,
    /// Where the frame says what it is.
    pub(super) named_at: usize,
    /// Whether it is only the beginning of a packet that was cut.
    pub(super) is_piece: bool,
}

/// The length of the longest IP packet that becomes of packet `i`, which is `total_len` long: where it is to be cut into
/// segments, that of one.
#[inline]
pub(super) fn longest(burst: &Burst, i: usize, total_len: usize) -> usize {
    let offload = burst.offload(i);
    if offload.segments() == Offload::GSO_NONE {
        return total_len;
    }
    let transport = usize::from(offload.csum_start);
    let header = match offload.segments() {
        Offload::GSO_UDP_L4 => 8,
        _ => burst
            .head(i)
            .get(transport + 12)
            .map_or(20, |words| usize::from(words >> 4) * 4),
    };
    (transport + header + usize::from(offload.gso_size))
        .saturating_sub(ETHERNET_LEN)
        .min(total_len)
}

/// The first bytes of a frame to one station from another.
pub(super) fn macs(to: Mac, from: Mac) -> [u8; 12] {
    let mut macs = [0; 12];
    macs[..6].copy_from_slice(&to.0);
    macs[6..].copy_from_slice(&from.0);
    macs
}

/// The word at `at`, 0 where there is none.
#[inline]
pub(super) fn word(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |&pair| u16::from_be_bytes(pair))
}

/// Writes a word at `at`, if there is one.
#[inline]
pub(super) fn put(bytes: &mut [u8], at: usize, word: u16) {
    if let Some(pair) = bytes.get_mut(at..at + 2) {
        pair.copy_from_slice(&word.to_be_bytes());
    }
}

/// Renews the checksum at `at` for a word under it that has become another. Spec: RFC 1624, 3.
#[inline]
pub(super) fn renew(bytes: &mut [u8], at: usize, was: u16, is: u16) {
    let sum = Sum::default()
        .and_word(!word(bytes, at))
        .and_word(!was)
        .and_word(is)
        .checksum();
    put(bytes, at, sum);
}

/// Takes one from the time to live of the IPv4 packet in a frame.
#[inline]
pub(super) fn age_v4(head: &mut [u8]) {
    let Some(ip) = head
        .get_mut(ETHERNET_LEN..)
        .and_then(<[u8]>::first_chunk_mut::<V4_LEN>)
    else {
        return;
    };
    age(ip);
}

/// Takes one from the time to live of an IPv4 header.
#[inline]
pub(super) fn age(ip: &mut [u8; V4_LEN]) {
    ip[8] = ip[8].wrapping_sub(1);
    // The word that the time is the upper half of has become 0x0100 less. Spec: RFC 1624, 3, for that one difference.
    let sum = u32::from(u16::from_be_bytes([ip[10], ip[11]])) + 0x0100;
    let [.., high, low] = (sum + u32::from(sum >= 0xffff)).to_be_bytes();
    [ip[10], ip[11]] = [high, low];
}

/// Makes the ping at `at` into its answer.
pub(super) fn answer_echo(head: &mut [u8], at: usize, answer: u8, is_finished: bool) {
    let was = word(head, at);
    put(head, at, u16::from(answer) << 8);
    // Of an unfinished checksum only addresses are in the sum.
    if is_finished {
        renew(head, at + 2, was, u16::from(answer) << 8);
    }
}
