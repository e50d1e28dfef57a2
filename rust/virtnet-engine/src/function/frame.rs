//! The few frames that a host and a source make, and the few that a host understands.
//!
//! Spec: RFC 826 (ARP), RFC 791 (IPv4), RFC 792 (ICMP echo), RFC 768 (UDP), RFC 1624 (checksum update).

use std::net::Ipv4Addr;

use virtnet_packet::header::{ETHERNET_LEN, Mac};

const IPV4_LEN: usize = 20;
const UDP_LEN: usize = 8;
/// Shortest frame on the wire, without its check sequence.
const MIN_LEN: usize = 60;

const ETHERTYPE: usize = 12;
const IPV4_ETHERTYPE: [u8; 2] = [0x08, 0x00];
const ARP_ETHERTYPE: [u8; 2] = [0x08, 0x06];
/// Ethernet and IPv4, addresses of 6 and 4 bytes.
const ARP_PREFIX: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;

const PROTO_ICMP: u8 = 1;
const PROTO_UDP: u8 = 17;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
/// The discard service: nobody answers.
const DISCARD_PORT: [u8; 2] = [0, 9];

/// What a host sees in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Who has `target`? Tell `sender` at `mac`.
    ArpRequest {
        mac: Mac,
        sender: Ipv4Addr,
        target: Ipv4Addr,
    },
    /// `sender` is at `mac`.
    ArpReply { mac: Mac, sender: Ipv4Addr },
    /// A ping.
    EchoRequest { target: Ipv4Addr },
    /// A pong.
    EchoReply {
        sender: Ipv4Addr,
        id: u16,
        sequence: u16,
    },
    /// A UDP packet.
    Udp,
    /// Anything else.
    Other,
}

/// Looks at the head of a frame of `frame_len` bytes.
pub(super) fn look_at(head: &[u8], frame_len: usize) -> Seen {
    let seen = match head.get(ETHERTYPE..ETHERNET_LEN) {
        Some(ethertype) if ethertype == IPV4_ETHERTYPE => look_at_ipv4(head, frame_len),
        Some(ethertype) if ethertype == ARP_ETHERTYPE => look_at_arp(head),
        _ => None,
    };
    seen.unwrap_or(Seen::Other)
}

fn look_at_arp(head: &[u8]) -> Option<Seen> {
    let arp: &[u8; 28] = head.get(ETHERNET_LEN..)?.first_chunk()?;
    let (prefix, rest) = arp.split_at(ARP_PREFIX.len());
    if prefix != ARP_PREFIX {
        return None;
    }
    let &[0, operation, ref addresses @ ..] = rest else {
        return None;
    };
    let mac = Mac(*addresses.first_chunk()?);
    let sender = ip_at(addresses, 6)?;
    let target = ip_at(addresses, 16)?;
    match operation {
        ARP_REQUEST => Some(Seen::ArpRequest {
            mac,
            sender,
            target,
        }),
        ARP_REPLY => Some(Seen::ArpReply { mac, sender }),
        _ => None,
    }
}

fn look_at_ipv4(head: &[u8], frame_len: usize) -> Option<Seen> {
    let ip = head.get(ETHERNET_LEN..)?;
    let header: &[u8; IPV4_LEN] = ip.first_chunk()?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fits =
        header_len >= IPV4_LEN && total_len >= header_len && total_len + ETHERNET_LEN <= frame_len;
    // A fragment says nothing about ports or echoes, unless it is the first one, which nobody here needs.
    let whole = u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0;
    if header[0] >> 4 != 4 || !fits || !whole {
        return None;
    }
    match header[9] {
        PROTO_UDP => Some(Seen::Udp),
        PROTO_ICMP => {
            let &[kind, 0, _, _, id0, id1, s0, s1] = ip.get(header_len..)?.first_chunk()? else {
                return None;
            };
            match kind {
                ECHO_REQUEST => Some(Seen::EchoRequest {
                    target: ip_at(header, 16)?,
                }),
                ECHO_REPLY => Some(Seen::EchoReply {
                    sender: ip_at(header, 12)?,
                    id: u16::from_be_bytes([id0, id1]),
                    sequence: u16::from_be_bytes([s0, s1]),
                }),
                _ => None,
            }
        }
        _ => None,
    }
}

fn ip_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let ip: &[u8; 4] = bytes.get(at..)?.first_chunk()?;
    Some(Ipv4Addr::from(*ip))
}

/// Makes a ping, given by the head of its frame, into its answer.
pub(super) fn answer_echo(head: &mut [u8]) {
    virtnet_packet::header::swap_macs(head);
    let Some(ip) = head.get_mut(ETHERNET_LEN..) else {
        return;
    };
    // Swapped addresses have the same sum, so the header's checksum stays.
    if let Some(addresses) = ip.get_mut(12..20) {
        addresses.rotate_left(4);
    }
    let header_len = usize::from(ip.first().copied().unwrap_or_default() & 0xf) * 4;
    if let Some([kind, code, sum0, sum1, ..]) = ip.get_mut(header_len..) {
        let was = u16::from_be_bytes([*kind, *code]);
        *kind = ECHO_REPLY;
        let is = u16::from_be_bytes([*kind, *code]);
        let sum = updated_checksum(u16::from_be_bytes([*sum0, *sum1]), was, is);
        [*sum0, *sum1] = sum.to_be_bytes();
    }
}

/// An ARP request from `mac` and `ip`: who has `target`?
pub(super) fn arp_request(mac: Mac, ip: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    arp(
        ARP_REQUEST,
        (mac, ip),
        (Mac::default(), target),
        Mac::BROADCAST,
    )
}

/// An ARP reply from `mac` and `ip` to the station that asked.
pub(super) fn arp_reply(mac: Mac, ip: Ipv4Addr, asker: Mac, asker_ip: Ipv4Addr) -> Vec<u8> {
    arp(ARP_REPLY, (mac, ip), (asker, asker_ip), asker)
}

fn arp(operation: u8, from: (Mac, Ipv4Addr), about: (Mac, Ipv4Addr), to: Mac) -> Vec<u8> {
    let mut frame = Vec::with_capacity(MIN_LEN);
    ethernet(&mut frame, to, from.0, ARP_ETHERTYPE);
    frame.extend(ARP_PREFIX);
    frame.extend([0, operation]);
    for (mac, ip) in [from, about] {
        frame.extend(mac.0);
        frame.extend(ip.octets());
    }
    frame.resize(MIN_LEN, 0);
    frame
}

/// Who sends what to whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Udp {
    pub(super) source: Mac,
    pub(super) destination: Mac,
    pub(super) source_ip: Ipv4Addr,
    pub(super) destination_ip: Ipv4Addr,
    /// Bytes of the whole frame; fewer than its headers make just the headers.
    pub(super) frame_len: usize,
}

/// A UDP packet to the discard service, filled with zeros, without a UDP checksum.
pub(super) fn udp(udp: &Udp) -> Vec<u8> {
    let payload_len = udp.frame_len.saturating_sub(ETHERNET_LEN + IPV4_LEN);
    let mut frame = Vec::with_capacity(udp.frame_len);
    ethernet(&mut frame, udp.destination, udp.source, IPV4_ETHERTYPE);
    ipv4(
        &mut frame,
        PROTO_UDP,
        payload_len,
        udp.source_ip,
        udp.destination_ip,
    );
    frame.extend(DISCARD_PORT);
    frame.extend(DISCARD_PORT);
    frame.extend(len_u16(payload_len.max(UDP_LEN)).to_be_bytes());
    frame.extend([0, 0]);
    frame.resize(udp.frame_len, 0);
    frame
}

/// Names one ping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Echo {
    pub(super) source: Mac,
    pub(super) destination: Mac,
    pub(super) source_ip: Ipv4Addr,
    pub(super) destination_ip: Ipv4Addr,
    pub(super) id: u16,
    pub(super) sequence: u16,
}

/// A ping with the 56 bytes of data that pings have.
pub(super) fn echo_request(echo: &Echo) -> Vec<u8> {
    const DATA_LEN: usize = 56;
    let mut frame = Vec::with_capacity(ETHERNET_LEN + IPV4_LEN + 8 + DATA_LEN);
    ethernet(&mut frame, echo.destination, echo.source, IPV4_ETHERTYPE);
    ipv4(
        &mut frame,
        PROTO_ICMP,
        8 + DATA_LEN,
        echo.source_ip,
        echo.destination_ip,
    );
    let start = frame.len();
    frame.extend([ECHO_REQUEST, 0, 0, 0]);
    frame.extend(echo.id.to_be_bytes());
    frame.extend(echo.sequence.to_be_bytes());
    frame.extend((0u8..).take(DATA_LEN));
    let sum = checksum(&frame[start..]);
    frame[start + 2..start + 4].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn ethernet(frame: &mut Vec<u8>, to: Mac, from: Mac, ethertype: [u8; 2]) {
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend(ethertype);
}

fn ipv4(frame: &mut Vec<u8>, proto: u8, payload_len: usize, from: Ipv4Addr, to: Ipv4Addr) {
    let start = frame.len();
    frame.extend([0x45, 0]);
    frame.extend(len_u16(IPV4_LEN + payload_len).to_be_bytes());
    // No identification, not to be fragmented.
    frame.extend([0, 0, 0x40, 0]);
    frame.extend([64, proto, 0, 0]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    let sum = checksum(&frame[start..]);
    frame[start + 10..start + 12].copy_from_slice(&sum.to_be_bytes());
}

fn len_u16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// The Internet checksum of `bytes`.
fn checksum(bytes: &[u8]) -> u16 {
    let sum = bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or_default()))
        .sum();
    !folded(sum)
}

/// The checksum after one word under it has changed.
fn updated_checksum(checksum: u16, was: u16, is: u16) -> u16 {
    !folded(u64::from(!checksum) + u64::from(!was) + u64::from(is))
}

fn folded(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const IP_A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const IP_B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn see(frame: &[u8]) -> Seen {
        look_at(&frame[..frame.len().min(192)], frame.len())
    }

    #[test]
    fn what_is_made_is_understood() {
        assert_eq!(
            see(&arp_request(A, IP_A, IP_B)),
            Seen::ArpRequest {
                mac: A,
                sender: IP_A,
                target: IP_B
            }
        );
        assert_eq!(
            see(&arp_reply(A, IP_A, B, IP_B)),
            Seen::ArpReply {
                mac: A,
                sender: IP_A
            }
        );
        let udp = udp(&Udp {
            source: A,
            destination: B,
            source_ip: IP_A,
            destination_ip: IP_B,
            frame_len: 1_514,
        });
        assert_eq!((udp.len(), see(&udp)), (1_514, Seen::Udp));
    }

    #[test]
    fn a_ping_and_its_answer_have_correct_checksums() {
        let mut frame = echo_request(&Echo {
            source: A,
            destination: B,
            source_ip: IP_A,
            destination_ip: IP_B,
            id: 0x1234,
            sequence: 0xfffe,
        });
        assert_eq!(frame.len(), 98);
        assert_eq!(see(&frame), Seen::EchoRequest { target: IP_B });
        // The sum over anything that holds its own checksum is nothing.
        assert_eq!(checksum(&frame[14..34]), 0);
        assert_eq!(checksum(&frame[34..]), 0);
        answer_echo(&mut frame);
        assert_eq!(
            see(&frame),
            Seen::EchoReply {
                sender: IP_B,
                id: 0x1234,
                sequence: 0xfffe
            }
        );
        assert_eq!(checksum(&frame[14..34]), 0);
        assert_eq!(checksum(&frame[34..]), 0);
        assert_eq!((&frame[..6], &frame[6..12]), (&A.0[..], &B.0[..]));
    }

    #[test]
    fn nonsense_is_something_else_and_never_a_panic() {
        let ping = echo_request(&Echo {
            source: A,
            destination: B,
            source_ip: IP_A,
            destination_ip: IP_B,
            id: 1,
            sequence: 1,
        });
        for len in 0..ping.len() {
            assert_eq!(see(&ping[..len]), Seen::Other, "cut to {len}");
        }
        for at in 0..ping.len() {
            for flip in [0xff, 0x0f, 1] {
                let mut frame = ping.clone();
                frame[at] ^= flip;
                see(&frame);
                answer_echo(&mut frame);
            }
        }
        let request = arp_request(A, IP_A, IP_B);
        for len in 0..42 {
            assert_eq!(see(&request[..len]), Seen::Other, "cut to {len}");
        }
    }
}
