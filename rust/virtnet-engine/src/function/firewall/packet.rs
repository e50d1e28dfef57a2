//! What a firewall reads of a packet: everything is checked once, here.

use virtnet_packet::flow::IpVersion;
use virtnet_packet::header::ETHERNET_LEN;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP6: u8 = 58;
const UDP_LITE: u8 = 136;
const DCCP: u8 = 33;
const SCTP: u8 = 132;

/// Extension headers that are followed: no packet of good will has more.
const HEADERS_MAX: usize = 8;

/// What a frame is to a firewall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// No IP; its EtherType.
    Other(u16),
    /// IP whose headers are cut short or contradict each other.
    Malformed,
    /// IP.
    Ip(Packet),
}

/// Which piece of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// All of it.
    Whole,
    /// The first of several.
    First,
    /// A later one, which has no ports.
    Later,
}

/// One end of a flow: an address (IPv4 in the low 32 bits), and a port or what stands for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct End {
    pub(super) address: u128,
    pub(super) port: u16,
}

/// An IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) version: IpVersion,
    /// The outermost VLAN, 0 for none.
    pub(super) vlan: u16,
    pub(super) protocol: u8,
    pub(super) from: End,
    pub(super) to: End,
    /// Whether the ports are ports.
    pub(super) has_ports: bool,
    pub(super) piece: Piece,
    /// What tells datagrams apart whose pieces these are.
    pub(super) identification: u32,
    /// Where the IP header starts, where what is above it does, and where the packet ends, in bytes of the frame.
    pub(super) ip: usize,
    pub(super) above: usize,
    pub(super) end: usize,
}

impl Packet {
    /// Whether it comes from the lower of its ends.
    #[inline]
    pub(super) fn is_low(&self) -> bool {
        self.from <= self.to
    }
}

/// Looks at the frame that starts with `head`.
pub(super) fn look_at(head: &[u8]) -> Seen {
    let Some(mut kind) = word(head, 12) else {
        return Seen::Malformed;
    };
    let (mut at, mut vlan) = (ETHERNET_LEN, 0);
    while matches!(kind, 0x8100 | 0x88a8) && at < ETHERNET_LEN + 8 {
        let (Some(tci), Some(next)) = (word(head, at), word(head, at + 2)) else {
            return Seen::Malformed;
        };
        if vlan == 0 {
            vlan = tci & 0x0fff;
        }
        (kind, at) = (next, at + 4);
    }
    let found = match kind {
        0x0800 => v4(head, at, vlan),
        0x86dd => v6(head, at, vlan),
        _ => return Seen::Other(kind),
    };
    found.map_or(Seen::Malformed, Seen::Ip)
}

/// Spec: RFC 791, 3.1.
pub(super) fn v4(head: &[u8], ip: usize, vlan: u16) -> Option<Packet> {
    let fixed: &[u8; 20] = head.get(ip..)?.first_chunk()?;
    let header_len = 4 * usize::from(fixed[0] & 0x0f);
    let total = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
    if fixed[0] >> 4 != 4 || header_len < 20 || total < header_len {
        return None;
    }
    let offset = u16::from_be_bytes([fixed[6], fixed[7]]);
    let packet = Packet {
        version: IpVersion::V4,
        vlan,
        protocol: fixed[9],
        from: end(&fixed[12..16]),
        to: end(&fixed[16..20]),
        has_ports: false,
        piece: piece(offset & 0x1fff, offset & 0x2000 != 0),
        identification: u16::from_be_bytes([fixed[4], fixed[5]]).into(),
        ip,
        above: ip + header_len,
        end: ip + total,
    };
    with_ports(packet, head)
}

/// Spec: RFC 8200, 3 and 4.
pub(super) fn v6(head: &[u8], ip: usize, vlan: u16) -> Option<Packet> {
    let fixed: &[u8; 40] = head.get(ip..)?.first_chunk()?;
    if fixed[0] >> 4 != 6 {
        return None;
    }
    let mut packet = Packet {
        version: IpVersion::V6,
        vlan,
        protocol: fixed[6],
        from: end(&fixed[8..24]),
        to: end(&fixed[24..40]),
        has_ports: false,
        piece: Piece::Whole,
        identification: 0,
        ip,
        above: ip + 40,
        end: ip + 40 + usize::from(u16::from_be_bytes([fixed[4], fixed[5]])),
    };
    for _ in 0..HEADERS_MAX {
        let (unit, plus) = match packet.protocol {
            0 | 43 | 60 => (8, 1),
            // Authentication. Spec: RFC 4302, 2.2.
            51 => (4, 2),
            44 => {
                let fragment: &[u8; 8] = head.get(packet.above..)?.first_chunk()?;
                let offset = u16::from_be_bytes([fragment[2], fragment[3]]);
                packet.piece = piece(offset >> 3, offset & 1 != 0);
                let [_, _, _, _, id @ ..] = *fragment;
                packet.identification = u32::from_be_bytes(id);
                packet.protocol = fragment[0];
                packet.above += 8;
                if packet.piece == Piece::Later {
                    return Some(packet);
                }
                continue;
            }
            _ => return with_ports(packet, head),
        };
        let &[next, len, ..] = head.get(packet.above..)? else {
            return None;
        };
        packet.protocol = next;
        packet.above += unit * (plus + usize::from(len));
    }
    None
}

fn end(address: &[u8]) -> End {
    let number = match (address.first_chunk::<16>(), address.first_chunk::<4>()) {
        (Some(&v6), _) => u128::from_be_bytes(v6),
        (None, Some(&v4)) => u32::from_be_bytes(v4).into(),
        (None, None) => 0,
    };
    End {
        address: number,
        port: 0,
    }
}

fn piece(offset: u16, more: bool) -> Piece {
    match (offset, more) {
        (0, false) => Piece::Whole,
        (0, true) => Piece::First,
        _ => Piece::Later,
    }
}

/// Ports, and for echoes their identifier, which tells one ping from another.
fn with_ports(mut packet: Packet, head: &[u8]) -> Option<Packet> {
    if packet.piece == Piece::Later {
        return Some(packet);
    }
    match packet.protocol {
        TCP | UDP | UDP_LITE | DCCP | SCTP => {
            packet.from.port = word(head, packet.above)?;
            packet.to.port = word(head, packet.above + 2)?;
            packet.has_ports = true;
        }
        ICMP | ICMP6 => {
            let [kind, ..] = *head.get(packet.above..)? else {
                return None;
            };
            if echo(&packet, kind).is_some() {
                let identifier = word(head, packet.above + 4)?;
                (packet.from.port, packet.to.port) = (identifier, identifier);
            }
        }
        _ => {}
    }
    Some(packet)
}

/// Whether an ICMP message of this type is an echo: a question, or its answer.
pub(super) fn echo(packet: &Packet, kind: u8) -> Option<Echo> {
    match (packet.protocol, kind) {
        (ICMP, 8) | (ICMP6, 128) => Some(Echo::Request),
        (ICMP, 0) | (ICMP6, 129) => Some(Echo::Reply),
        _ => None,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    Request,
    Reply,
}

/// The packet that an ICMP error is about, as far as it is there: that of the other direction.
///
/// Errors are destination unreachable, time exceeded, parameter problem, source quench, packet too big.
pub(super) fn complaint(packet: &Packet, head: &[u8]) -> Option<Packet> {
    let kind = *head.get(packet.above)?;
    let inner = packet.above + 8;
    match (packet.protocol, kind) {
        (ICMP, 3 | 4 | 11 | 12) => v4(head, inner, packet.vlan),
        (ICMP6, 1..=4) => v6(head, inner, packet.vlan),
        _ => None,
    }
}

#[inline]
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let &[a, b] = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes([a, b]))
}

#[inline]
pub(super) fn long(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}
