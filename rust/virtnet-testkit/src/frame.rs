//! Builds packets, with correct lengths and checksums: Ethernet, VLAN, ARP, IPv4, UDP, TCP, ICMP.
//!
//! Every function takes what it wraps and gives back bytes, so that layers are put together by nesting calls. [`Endpoint`] has
//! shorthands for whole frames between two stations.

use std::net::Ipv4Addr;

use virtnet_packet::header::Mac;

/// Ethertype of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethertype of ARP.
pub const ARP: u16 = 0x0806;
/// Ethertype of a VLAN tag.
pub const VLAN: u16 = 0x8100;

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;

/// A station: who sends or receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its MAC address.
    pub mac: Mac,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its UDP or TCP port.
    pub port: u16,
}

impl Endpoint {
    /// Station `n` of a test: MAC 02:00:00:00:00:n, address 10.0.0.n, port 1000 + n.
    #[must_use]
    pub fn number(n: u8) -> Self {
        Self {
            mac: Mac([2, 0, 0, 0, 0, n]),
            ip: Ipv4Addr::new(10, 0, 0, n),
            port: 1000 + u16::from(n),
        }
    }

    /// A frame with a UDP datagram to another station.
    #[must_use]
    pub fn udp(&self, to: &Self, payload: &[u8]) -> Vec<u8> {
        let datagram = udp((self.ip, self.port), (to.ip, to.port), payload);
        ethernet(
            to.mac,
            self.mac,
            IPV4,
            &ipv4(self.ip, to.ip, UDP, &datagram),
        )
    }

    /// A frame with a TCP segment to another station.
    #[must_use]
    pub fn tcp(&self, to: &Self, flags: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let segment = tcp(
            (self.ip, self.port),
            (to.ip, to.port),
            flags,
            sequence,
            payload,
        );
        ethernet(to.mac, self.mac, IPV4, &ipv4(self.ip, to.ip, TCP, &segment))
    }

    /// A frame with an ICMP echo request to another station.
    #[must_use]
    pub fn ping(&self, to: &Self, sequence: u16, payload: &[u8]) -> Vec<u8> {
        let echo = icmp_echo(8, 1, sequence, payload);
        ethernet(to.mac, self.mac, IPV4, &ipv4(self.ip, to.ip, ICMP, &echo))
    }

    /// A broadcast that asks who has the address of another station.
    #[must_use]
    pub fn who_has(&self, ip: Ipv4Addr) -> Vec<u8> {
        let question = arp(1, (self.mac, self.ip), (Mac::default(), ip));
        ethernet(Mac::BROADCAST, self.mac, ARP, &question)
    }

    /// The answer to [`who_has`](Self::who_has).
    #[must_use]
    pub fn is_at(&self, to: &Self) -> Vec<u8> {
        let answer = arp(2, (self.mac, self.ip), (to.mac, to.ip));
        ethernet(to.mac, self.mac, ARP, &answer)
    }
}

/// A frame of `len` bytes (at least 14) whose content is a function of `seed`: two of them differ.
#[must_use]
pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    let mut frame = ethernet(
        Mac([2, 0, 0, 0, 0, 2]),
        Mac([2, 0, 0, 0, 0, 1]),
        0x88b5,
        &[],
    );
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    frame.resize_with(len.max(frame.len()), || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let [.., high] = state.to_le_bytes();
        high
    });
    frame
}

/// An Ethernet frame. Not padded: 60 bytes are a matter of the wire.
#[must_use]
pub fn ethernet(to: Mac, from: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &ethertype.to_be_bytes(), payload].concat()
}

/// The same frame with a VLAN tag put in.
///
/// # Panics
/// When `frame` is shorter than an Ethernet header.
#[must_use]
pub fn vlan(frame: &[u8], id: u16, priority: u8) -> Vec<u8> {
    let (macs, rest) = frame.split_at(12);
    let tag = id & 0xfff | u16::from(priority) << 13;
    [macs, &VLAN.to_be_bytes(), &tag.to_be_bytes(), rest].concat()
}

/// An ARP packet for IPv4 over Ethernet; `operation` is 1 for a request, 2 for a reply.
#[must_use]
pub fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let header = [0, 1, 8, 0, 6, 4];
    [
        &header[..],
        &operation.to_be_bytes(),
        &sender.0.0,
        &sender.1.octets(),
        &target.0.0,
        &target.1.octets(),
    ]
    .concat()
}

/// An IPv4 packet.
///
/// # Panics
/// When the payload does not fit.
#[must_use]
pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(be16(20 + payload.len()));
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend_from_slice(payload);
    header
}

/// A UDP datagram.
///
/// # Panics
/// When the payload does not fit.
#[must_use]
pub fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    datagram.extend(be16(8 + payload.len()));
    datagram.extend([0, 0]);
    datagram.extend_from_slice(payload);
    let sum = match transport_checksum(from.0, to.0, UDP, &datagram) {
        // Zero means that there is no checksum.
        0 => 0xffff,
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}

/// A TCP segment without options.
///
/// # Panics
/// When the payload does not fit.
#[must_use]
pub fn tcp(
    from: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    flags: u8,
    sequence: u32,
    payload: &[u8],
) -> Vec<u8> {
    let mut segment = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    segment.extend(sequence.to_be_bytes());
    segment.extend([0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(payload);
    let sum = transport_checksum(from.0, to.0, TCP, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// An ICMP echo message; `kind` is 8 for a request, 0 for a reply.
#[must_use]
pub fn icmp_echo(kind: u8, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0];
    message.extend(id.to_be_bytes());
    message.extend(sequence.to_be_bytes());
    message.extend_from_slice(payload);
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// The Internet checksum of `bytes`: 0 when they already contain a correct one. Spec: RFC 1071.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// The checksum of a UDP or TCP packet with its pseudo header: 0 when it already contains a correct one.
///
/// # Panics
/// When it is longer than an IPv4 packet can be.
#[must_use]
pub fn transport_checksum(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, packet: &[u8]) -> u16 {
    let mut bytes = [from.octets(), to.octets()].concat();
    bytes.extend([0, protocol]);
    bytes.extend(be16(packet.len()));
    bytes.extend_from_slice(packet);
    checksum(&bytes)
}

fn be16(value: usize) -> [u8; 2] {
    match u16::try_from(value) {
        Ok(value) => value.to_be_bytes(),
        Err(_) => panic!("{value} bytes do not fit into a packet"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_header_has_the_known_checksum() {
        // A header whose checksum is well known.
        let header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x00, 0x00, 0xc0, 0xa8,
            0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7,
        ];
        assert_eq!(checksum(&header), 0xb861);
    }

    #[test]
    fn what_is_built_checks_out() {
        let (one, two) = (Endpoint::number(1), Endpoint::number(2));
        for len in [0, 1, 2, 17, 1472] {
            let payload = vec![0xab; len];
            for (frame, protocol) in [
                (one.udp(&two, &payload), UDP),
                (one.tcp(&two, 2, 7, &payload), TCP),
            ] {
                assert_eq!(frame[12..14], IPV4.to_be_bytes());
                let (header, packet) = frame[14..].split_at(20);
                assert_eq!(checksum(header), 0);
                assert_eq!(
                    usize::from(u16::from_be_bytes([header[2], header[3]])),
                    frame.len() - 14
                );
                let sum = transport_checksum(one.ip, two.ip, protocol, packet);
                assert_eq!(sum, 0);
                assert!(packet.ends_with(&payload));
            }
            let ping = one.ping(&two, 3, &payload);
            assert_eq!(checksum(&ping[34..]), 0);
        }
    }

    #[test]
    fn arp_and_vlan_are_where_they_belong() {
        let (one, two) = (Endpoint::number(1), Endpoint::number(2));
        let question = one.who_has(two.ip);
        assert_eq!(question.len(), 42);
        assert!(question.starts_with(&[0xff; 6]));
        assert_eq!(question[38..], two.ip.octets());
        let tagged = vlan(&two.is_at(&one), 100, 5);
        assert_eq!(tagged[12..18], [0x81, 0x00, 0xa0, 0x64, 0x08, 0x06]);
    }

    #[test]
    fn patterns_have_their_length_and_differ() {
        assert_eq!(pattern(14, 1).len(), 14);
        assert_eq!(pattern(1500, 1), pattern(1500, 1));
        assert_ne!(pattern(60, 1), pattern(60, 2));
    }
}
