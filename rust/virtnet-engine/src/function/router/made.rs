//! The frames that a router makes: questions and answers about addresses, and errors.
//!
//! Spec: RFC 826 (ARP), RFC 4861 (neighbour discovery), RFC 792 and RFC 1812 (ICMP errors), RFC 4443 (ICMPv6 errors), RFC 791
//! (fragments).

use std::net::{Ipv4Addr, Ipv6Addr};

use virtnet_packet::checksum::Sum;
use virtnet_packet::header::{ETHERNET_LEN, Mac};

use super::packet::{ICMP, ICMPV6, TCP, V4_LEN, put, word};
use crate::function::tcp_reset::RESET_LEN;

/// The most bytes of an ICMP error's packet. Spec: RFC 1812, 4.3.2.3.
const ERROR4_LEN: usize = 576;
/// The same of ICMPv6. Spec: RFC 4443, 2.4 (c).
const ERROR6_LEN: usize = 1280;
/// Shortest frame on the wire, without its check sequence.
const FRAME_MIN: usize = 60;
/// What the packets of a router begin with.
const TTL: u8 = 64;
/// The bits of a type of service, or traffic class, that are about congestion. Spec: RFC 3168, 5.
const ECN: u8 = 3;
/// Of neighbour discovery: it has not been forwarded.
const HOPS_MAX: u8 = 255;

pub(super) const SOLICITATION: u8 = 135;
pub(super) const ADVERTISEMENT: u8 = 136;
const TARGET_ADDRESS: u8 = 2;
const SOURCE_ADDRESS: u8 = 1;

const ARP_PREFIX: [u8; 7] = [0, 1, 8, 0, 6, 4, 0];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;

/// What an ARP packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arp {
    pub(super) is_request: bool,
    pub(super) mac: Mac,
    pub(super) sender: Ipv4Addr,
    pub(super) target: Ipv4Addr,
}

impl Arp {
    /// Reads what is in a frame.
    pub(super) fn of(head: &[u8]) -> Option<Self> {
        let arp: &[u8; 28] = head.get(ETHERNET_LEN..)?.first_chunk()?;
        let is_request = match arp[7] {
            ARP_REQUEST => true,
            ARP_REPLY => false,
            _ => return None,
        };
        let ip = |at: usize| Ipv4Addr::new(arp[at], arp[at + 1], arp[at + 2], arp[at + 3]);
        (arp[..7] == ARP_PREFIX).then_some(Self {
            is_request,
            mac: Mac(*arp[8..].first_chunk()?),
            sender: ip(14),
            target: ip(24),
        })
    }

    /// Makes the frame that says it, to `to`, who may be the target.
    pub(super) fn frame(&self, to: Mac) -> Vec<u8> {
        let mut frame = ethernet(to, self.mac, [0x08, 0x06], 28);
        frame.extend(ARP_PREFIX);
        frame.push(if self.is_request {
            ARP_REQUEST
        } else {
            ARP_REPLY
        });
        frame.extend(self.mac.0);
        frame.extend(self.sender.octets());
        frame.extend(if self.is_request { [0; 6] } else { to.0 });
        frame.extend(self.target.octets());
        frame.resize(FRAME_MIN, 0);
        frame
    }
}

/// A question, or an answer, of neighbour discovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Discovery {
    pub(super) is_question: bool,
    pub(super) source: Ipv6Addr,
    pub(super) destination: Ipv6Addr,
    /// Whom it is about.
    pub(super) target: Ipv6Addr,
    /// In a question the asker's address on the link, in an answer the target's.
    pub(super) mac: Option<Mac>,
}

impl Discovery {
    /// Reads what is in a frame, whose IPv6 header was read; none: it is nothing of this, or not as it has to be.
    /// Spec: RFC 4861, 7.1.
    pub(super) fn of(head: &[u8], source: Ipv6Addr, destination: Ipv6Addr) -> Option<Self> {
        let len = usize::from(word(head, ETHERNET_LEN + 4));
        let icmp = head.get(ETHERNET_LEN + 40..)?.get(..len)?;
        let &[kind, 0, _, _, _, _, _, _, ref rest @ ..] = icmp else {
            return None;
        };
        let is_question = match kind {
            SOLICITATION => true,
            ADVERTISEMENT => false,
            _ => return None,
        };
        let passed_hops = HOPS_MAX - head[ETHERNET_LEN + 7];
        if passed_hops > 0 || sum6(source, destination, icmp).checksum() != 0 {
            return None;
        }
        let (target, mut options) = rest.split_first_chunk::<16>()?;
        let mut mac = None;
        while let &[kind, len, ref option @ ..] = options {
            let wanted = if is_question {
                SOURCE_ADDRESS
            } else {
                TARGET_ADDRESS
            };
            if kind == wanted {
                mac = option.first_chunk().map(|&mac| Mac(mac));
            }
            if len == 0 {
                return None;
            }
            options = options.get(usize::from(len) * 8..).unwrap_or_default();
        }
        Some(Self {
            is_question,
            source,
            destination,
            target: Ipv6Addr::from(*target),
            mac,
        })
    }

    /// Makes the frame that says it.
    pub(super) fn frame(&self, from: Mac, to: Mac) -> Vec<u8> {
        const LEN: usize = 32;
        let mut frame = ethernet(to, from, [0x86, 0xdd], 40 + LEN);
        header6(&mut frame, HOPS_MAX, LEN, self.source, self.destination);
        // An answer comes from a router, to whoever asked, and is news.
        let is_asked = !self.destination.is_multicast();
        let (kind, flags, option) = match (self.is_question, is_asked) {
            (true, _) => (SOLICITATION, 0, SOURCE_ADDRESS),
            (false, true) => (ADVERTISEMENT, 0xe0, TARGET_ADDRESS),
            (false, false) => (ADVERTISEMENT, 0xa0, TARGET_ADDRESS),
        };
        frame.extend([kind, 0, 0, 0, flags, 0, 0, 0]);
        frame.extend(self.target.octets());
        frame.extend([option, 1]);
        frame.extend(self.mac.unwrap_or_default().0);
        finish6(&mut frame, self.source, self.destination);
        frame
    }
}

/// The group that a station's address belongs to, and its address on the link. Spec: RFC 4291, 2.7.1; RFC 2464, 7.
pub(super) fn solicited(ip: Ipv6Addr) -> (Ipv6Addr, Mac) {
    let [.., a, b, c] = ip.octets();
    let low = u16::from_be_bytes([b, c]);
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), low);
    (group, Mac([0x33, 0x33, 0xff, a, b, c]))
}

/// All stations of a link.
pub(super) const ALL_NODES: (Ipv6Addr, Mac) = (
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
    Mac([0x33, 0x33, 0, 0, 0, 1]),
);

/// An error about a packet, of which `quoted` is the beginning, behind Ethernet's header; `rest` is the word that some kinds have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IcmpError {
    pub(super) kind: u8,
    pub(super) code: u8,
    pub(super) rest: u32,
}

impl IcmpError {
    /// Makes a frame to be addressed.
    pub(super) fn v4(self, source: Ipv4Addr, destination: Ipv4Addr, quoted: &[u8]) -> Vec<u8> {
        let quoted = &quoted[..quoted.len().min(ERROR4_LEN - V4_LEN - 8)];
        let mut frame = ethernet(
            Mac::default(),
            Mac::default(),
            [0x08, 0x00],
            V4_LEN + 8 + quoted.len(),
        );
        // What the network itself has to say goes first, with the type of service it is about. Spec: RFC 1812, 4.3.2.5.
        let service = quoted.get(1).copied().unwrap_or_default() & 0x1e;
        frame.extend([0x45, 0xc0 | service]);
        frame.extend(len_16(V4_LEN + 8 + quoted.len()).to_be_bytes());
        frame.extend([0, 0, 0, 0, TTL, ICMP, 0, 0]);
        frame.extend(source.octets());
        frame.extend(destination.octets());
        let sum = Sum::of(&frame[ETHERNET_LEN..]).checksum();
        put(&mut frame, ETHERNET_LEN + 10, sum);
        self.put(&mut frame, quoted);
        let at = ETHERNET_LEN + V4_LEN;
        let sum = Sum::of(&frame[at..]).checksum();
        put(&mut frame, at + 2, sum);
        frame
    }

    /// The same of IPv6.
    pub(super) fn v6(self, source: Ipv6Addr, destination: Ipv6Addr, quoted: &[u8]) -> Vec<u8> {
        let quoted = &quoted[..quoted.len().min(ERROR6_LEN - 48)];
        let len = 8 + quoted.len();
        let mut frame = ethernet(Mac::default(), Mac::default(), [0x86, 0xdd], 40 + len);
        header6(&mut frame, TTL, len, source, destination);
        self.put(&mut frame, quoted);
        finish6(&mut frame, source, destination);
        frame
    }

    fn put(self, frame: &mut Vec<u8>, quoted: &[u8]) {
        frame.extend([self.kind, self.code, 0, 0]);
        frame.extend(self.rest.to_be_bytes());
        frame.extend_from_slice(quoted);
    }
}

/// Makes the frame of a reset, to be addressed, in answer to a packet of this type of service.
pub(super) fn reset4(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    service: u8,
    mut segment: [u8; RESET_LEN],
) -> Vec<u8> {
    let ends = Sum::of(&source.octets()).and(Sum::of(&destination.octets()));
    finish_reset(&mut segment, ends);
    let mut frame = ethernet(
        Mac::default(),
        Mac::default(),
        [0x08, 0x00],
        V4_LEN + RESET_LEN,
    );
    // What cannot be cut needs no number. Spec: RFC 6864, 4.1.
    frame.extend([0x45, service & !ECN]);
    frame.extend(len_16(V4_LEN + RESET_LEN).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, TTL, TCP, 0, 0]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    let sum = Sum::of(&frame[ETHERNET_LEN..]).checksum();
    put(&mut frame, ETHERNET_LEN + 10, sum);
    frame.extend(segment);
    frame
}

/// The same of IPv6, in answer to a packet of this traffic class.
pub(super) fn reset6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    class: u8,
    mut segment: [u8; RESET_LEN],
) -> Vec<u8> {
    let ends = Sum::of(&source.octets()).and(Sum::of(&destination.octets()));
    finish_reset(&mut segment, ends);
    let mut frame = ethernet(Mac::default(), Mac::default(), [0x86, 0xdd], 40 + RESET_LEN);
    let [first, second] = (0x6000 | u16::from(class & !ECN) << 4).to_be_bytes();
    frame.extend([first, second, 0, 0]);
    frame.extend(len_16(RESET_LEN).to_be_bytes());
    frame.extend([TCP, TTL]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(segment);
    frame
}

fn finish_reset(segment: &mut [u8; RESET_LEN], ends: Sum) {
    let pseudo = ends.and_word(TCP.into()).and_word(len_16(RESET_LEN));
    let sum = pseudo.and(Sum::of(segment)).checksum();
    put(segment, 16, sum);
}

/// Cuts the IPv4 packet in a finished frame into fragments of at most `mtu` bytes, and hands each to `push`; how many.
/// Spec: RFC 791, 3.2.
pub(super) fn fragment(
    frame: &[u8],
    header_len: usize,
    mtu: usize,
    mut push: impl FnMut(&[u8]),
) -> u64 {
    let start = ETHERNET_LEN + header_len;
    let end = (ETHERNET_LEN + usize::from(word(frame, ETHERNET_LEN + 2))).min(frame.len());
    let size = mtu.saturating_sub(header_len) & !7;
    let (Some(payload), true) = (frame.get(start..end), size > 0) else {
        return 0;
    };
    let place = word(frame, ETHERNET_LEN + 6);
    let (flags, offset) = (place & 0xe000, place & 0x1fff);
    const MORE: u16 = 0x2000;
    let mut header = frame[..start].to_vec();
    let mut out = Vec::with_capacity(ETHERNET_LEN + mtu);
    let n = payload.chunks(size).len();
    for (k, part) in payload.chunks(size).enumerate() {
        let at = offset + len_16(k * size / 8);
        let more = if k + 1 < n { MORE } else { flags & MORE };
        put(
            &mut header,
            ETHERNET_LEN + 2,
            len_16(header_len + part.len()),
        );
        put(&mut header, ETHERNET_LEN + 6, (flags & !MORE) | more | at);
        put(&mut header, ETHERNET_LEN + 10, 0);
        let sum = Sum::of(&header[ETHERNET_LEN..]).checksum();
        put(&mut header, ETHERNET_LEN + 10, sum);
        out.clear();
        out.extend_from_slice(&header);
        out.extend_from_slice(part);
        push(&out);
        if k == 0 {
            blank_options(&mut header[ETHERNET_LEN + V4_LEN..]);
        }
    }
    n as u64
}

/// Makes options that belong into the first fragment only into such that say nothing.
fn blank_options(options: &mut [u8]) {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    let mut at = 0;
    while let Some(&kind) = options.get(at) {
        let len = match kind {
            END => return,
            NOTHING => 1,
            _ => usize::from(options.get(at + 1).copied().unwrap_or_default()).max(2),
        };
        let end = (at + len).min(options.len());
        let is_copied = kind & 0x80 != 0;
        if !is_copied {
            options[at..end].fill(NOTHING);
        }
        at = end;
    }
}

fn ethernet(to: Mac, from: Mac, ethertype: [u8; 2], len: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity((ETHERNET_LEN + len).max(FRAME_MIN));
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend(ethertype);
    frame
}

fn header6(frame: &mut Vec<u8>, hops: u8, len: usize, source: Ipv6Addr, destination: Ipv6Addr) {
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(len_16(len).to_be_bytes());
    frame.extend([ICMPV6, hops]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
}

fn finish6(frame: &mut [u8], source: Ipv6Addr, destination: Ipv6Addr) {
    let at = ETHERNET_LEN + 40;
    let sum = sum6(source, destination, &frame[at..]).checksum();
    put(frame, at + 2, sum);
}

fn sum6(source: Ipv6Addr, destination: Ipv6Addr, icmp: &[u8]) -> Sum {
    Sum::of(&source.octets())
        .and(Sum::of(&destination.octets()))
        .and_word(u16::from(ICMPV6))
        .and_word(len_16(icmp.len()))
        .and(Sum::of(icmp))
}

fn len_16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}
