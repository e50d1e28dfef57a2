//! Frames from guests taken apart and checked, and frames for them put together. The formats are `smoltcp`'s.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    Icmpv4Packet, Icmpv6Packet, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, TcpPacket,
    UdpPacket, UdpRepr,
};
use virtnet_packet::Offload;

use super::status::Lost;

/// Bytes of the fixed headers.
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;

/// The hop limit of what starts here.
const HOPS: u8 = 64;

pub(super) type Mac = [u8; 6];

/// Everybody, in Ethernet.
pub(super) const BROADCAST: Mac = [0xff; 6];

/// What a guest has sent.
#[derive(Debug)]
pub(super) enum Inbound<'frame> {
    /// An ARP packet: request or not, who says it, and whom it is about.
    Arp {
        request: bool,
        mac: Mac,
        ip: Ipv4Addr,
        target: Ipv4Addr,
    },
    Ip(IpIn<'frame>),
}

/// A packet with an IP header whose lengths and checksums are right.
#[derive(Debug)]
pub(super) struct IpIn<'frame> {
    pub(super) mac: Mac,
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) protocol: IpProtocol,
    /// From the IP header on, without padding.
    pub(super) packet: &'frame [u8],
    pub(super) payload: &'frame [u8],
}

impl IpIn<'_> {
    /// Source and destination, where the transport has ports; the payload is long enough for them.
    pub(super) fn ends(&self) -> (SocketAddr, SocketAddr) {
        let port = |at: usize| {
            self.payload
                .get(at..at + 2)
                .map_or(0, |two| u16::from_be_bytes([two[0], two[1]]))
        };
        (
            SocketAddr::new(self.src, port(0)),
            SocketAddr::new(self.dst, port(2)),
        )
    }
}

/// Takes a frame apart that is for `me` or for many; its checksums are looked at unless the sender has left or verified them.
pub(super) fn parse(frame: &[u8], me: Mac, offload: Offload) -> Result<Inbound<'_>, Lost> {
    let ethernet = EthernetFrame::new_checked(frame).map_err(|_| Lost::Malformed)?;
    let (to, from) = (ethernet.dst_addr(), ethernet.src_addr());
    if to.0 != me && !to.is_multicast() {
        return Err(Lost::NotForUs);
    }
    if from.is_multicast() || from.0 == me {
        return Err(Lost::ForeignSource);
    }
    let summed = offload.flags & (Offload::NEEDS_CSUM | Offload::DATA_VALID) != 0;
    let payload = frame.get(ETHERNET..).unwrap_or_default();
    match ethernet.ethertype() {
        EthernetProtocol::Arp => parse_arp(payload),
        EthernetProtocol::Ipv4 => parse_ipv4(from.0, payload, summed).map(Inbound::Ip),
        EthernetProtocol::Ipv6 => parse_ipv6(from.0, payload, summed).map(Inbound::Ip),
        EthernetProtocol::Unknown(_) => Err(Lost::Unsupported),
    }
}

fn parse_arp(payload: &[u8]) -> Result<Inbound<'static>, Lost> {
    let packet = ArpPacket::new_checked(payload).map_err(|_| Lost::Malformed)?;
    let ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = ArpRepr::parse(&packet).map_err(|_| Lost::Malformed)?
    else {
        return Err(Lost::Unsupported);
    };
    if source_hardware_addr.is_multicast() {
        return Err(Lost::ForeignSource);
    }
    Ok(Inbound::Arp {
        request: operation == ArpOperation::Request,
        mac: source_hardware_addr.0,
        ip: source_protocol_addr,
        target: target_protocol_addr,
    })
}

fn parse_ipv4(mac: Mac, bytes: &[u8], summed: bool) -> Result<IpIn<'_>, Lost> {
    let packet = Ipv4Packet::new_checked(bytes).map_err(|_| Lost::Malformed)?;
    if packet.version() != 4 || usize::from(packet.header_len()) < IPV4 {
        return Err(Lost::Malformed);
    }
    if !packet.verify_checksum() {
        return Err(Lost::BadChecksum);
    }
    if packet.more_frags() || packet.frag_offset() != 0 {
        return Err(Lost::Fragment);
    }
    let (header, total) = (
        usize::from(packet.header_len()),
        usize::from(packet.total_len()),
    );
    let (src, dst, protocol) = (packet.src_addr(), packet.dst_addr(), packet.next_header());
    let whole = bytes.get(..total).ok_or(Lost::Malformed)?;
    let payload = whole.get(header..).ok_or(Lost::Malformed)?;
    let found = IpIn {
        mac,
        src: src.into(),
        dst: dst.into(),
        protocol,
        packet: whole,
        payload,
    };
    check_transport(&found, summed)?;
    Ok(found)
}

fn parse_ipv6(mac: Mac, bytes: &[u8], summed: bool) -> Result<IpIn<'_>, Lost> {
    let packet = Ipv6Packet::new_checked(bytes).map_err(|_| Lost::Malformed)?;
    if packet.version() != 6 {
        return Err(Lost::Malformed);
    }
    let (src, dst, protocol) = (packet.src_addr(), packet.dst_addr(), packet.next_header());
    let whole = bytes.get(..packet.total_len()).ok_or(Lost::Malformed)?;
    let payload = whole.get(IPV6..).ok_or(Lost::Malformed)?;
    let found = IpIn {
        mac,
        src: src.into(),
        dst: dst.into(),
        protocol,
        packet: whole,
        payload,
    };
    check_transport(&found, summed)?;
    Ok(found)
}

/// Lengths and checksum of the transport's header.
fn check_transport(found: &IpIn<'_>, summed: bool) -> Result<(), Lost> {
    let (src, dst) = (found.src.into(), found.dst.into());
    let malformed = |_| Lost::Malformed;
    let right = match found.protocol {
        IpProtocol::Tcp => {
            let packet = TcpPacket::new_checked(found.payload).map_err(malformed)?;
            if packet.src_port() == 0 || packet.dst_port() == 0 {
                return Err(Lost::Malformed);
            }
            summed || packet.verify_checksum(&src, &dst)
        }
        IpProtocol::Udp => {
            let packet = UdpPacket::new_checked(found.payload).map_err(malformed)?;
            if packet.src_port() == 0 || packet.dst_port() == 0 {
                return Err(Lost::Malformed);
            }
            summed || packet.verify_checksum(&src, &dst)
        }
        IpProtocol::Icmp => {
            let packet = Icmpv4Packet::new_checked(found.payload).map_err(malformed)?;
            packet.verify_checksum()
        }
        IpProtocol::Icmpv6 => {
            let packet = Icmpv6Packet::new_checked(found.payload).map_err(malformed)?;
            let (IpAddr::V6(src), IpAddr::V6(dst)) = (found.src, found.dst) else {
                return Err(Lost::Malformed);
            };
            packet.verify_checksum(&src, &dst)
        }
        _ => return Err(Lost::Unsupported),
    };
    if right {
        Ok(())
    } else {
        Err(Lost::BadChecksum)
    }
}

/// A frame with an Ethernet header before a payload.
pub(super) fn ethernet(to: Mac, from: Mac, ethertype: EthernetProtocol, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET + payload.len());
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&u16::from(ethertype).to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The type that goes with an IP packet of ours.
pub(super) fn ethertype_of(packet: &[u8]) -> EthernetProtocol {
    match packet.first().map_or(4, |byte| byte >> 4) {
        6 => EthernetProtocol::Ipv6,
        _ => EthernetProtocol::Ipv4,
    }
}

/// An ARP packet as a frame. Spec: RFC 826.
pub(super) fn arp(
    request: bool,
    (mac, ip): (Mac, Ipv4Addr),
    (to_mac, to_ip): (Mac, Ipv4Addr),
) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation: if request {
            ArpOperation::Request
        } else {
            ArpOperation::Reply
        },
        source_hardware_addr: EthernetAddress(mac),
        source_protocol_addr: ip,
        target_hardware_addr: EthernetAddress(if request { [0; 6] } else { to_mac }),
        target_protocol_addr: to_ip,
    };
    let mut payload = vec![0; repr.buffer_len()];
    repr.emit(&mut ArpPacket::new_unchecked(&mut payload[..]));
    ethernet(to_mac, mac, EthernetProtocol::Arp, &payload)
}

/// An IP packet around a payload; both addresses are of one version, or there is none.
pub(super) fn ip_packet(
    src: IpAddr,
    dst: IpAddr,
    next: IpProtocol,
    payload: &[u8],
) -> Option<Vec<u8>> {
    let caps = ChecksumCapabilities::default();
    let len = payload.len();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) if len <= 65_535 - IPV4 => {
            let repr = Ipv4Repr {
                src_addr: src,
                dst_addr: dst,
                next_header: next,
                payload_len: len,
                hop_limit: HOPS,
            };
            let mut packet = vec![0; IPV4 + len];
            repr.emit(&mut Ipv4Packet::new_unchecked(&mut packet[..]), &caps);
            packet[IPV4..].copy_from_slice(payload);
            Some(packet)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) if len <= 65_535 => {
            // Neighbour discovery is believed only if it was not forwarded. Spec: RFC 4861, 4.
            let hop_limit = if next == IpProtocol::Icmpv6 {
                255
            } else {
                HOPS
            };
            let repr = Ipv6Repr {
                src_addr: src,
                dst_addr: dst,
                next_header: next,
                payload_len: len,
                hop_limit,
            };
            let mut packet = vec![0; IPV6 + len];
            repr.emit(&mut Ipv6Packet::new_unchecked(&mut packet[..]));
            packet[IPV6..].copy_from_slice(payload);
            Some(packet)
        }
        _ => None,
    }
}

/// A UDP datagram in an IP packet.
pub(super) fn udp_packet(src: SocketAddr, dst: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    if src.is_ipv4() != dst.is_ipv4() || data.len() > 65_535 - IPV4 - 8 {
        return None;
    }
    let repr = UdpRepr {
        src_port: src.port(),
        dst_port: dst.port(),
    };
    let mut datagram = vec![0; 8 + data.len()];
    repr.emit(
        &mut UdpPacket::new_unchecked(&mut datagram[..]),
        &src.ip().into(),
        &dst.ip().into(),
        data.len(),
        |buffer| buffer.copy_from_slice(data),
        &ChecksumCapabilities::default(),
    );
    ip_packet(src.ip(), dst.ip(), IpProtocol::Udp, &datagram)
}

/// The internet checksum, where it is put: `at` in an ICMPv6 message between two addresses.
pub(super) fn icmpv6_checksum(message: &mut [u8], src: Ipv6Addr, dst: Ipv6Addr) {
    if message.len() >= 4 {
        Icmpv6Packet::new_unchecked(message).fill_checksum(&src, &dst);
    }
}

/// The same for an ICMP message.
pub(super) fn icmpv4_checksum(message: &mut [u8]) {
    if message.len() >= 4 {
        Icmpv4Packet::new_unchecked(message).fill_checksum();
    }
}

/// Why a datagram did not get where it was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreachable {
    /// Nobody listens there.
    Port,
    /// There is no way there, or none that may be taken.
    Prohibited,
}

/// What a guest is told of a packet that did not get where it was to go. Spec: RFC 792; RFC 4443, 3.1.
pub(super) fn unreachable(
    why: Unreachable,
    packet: &[u8],
    src: IpAddr,
    dst: IpAddr,
) -> Option<Vec<u8>> {
    let v6 = src.is_ipv6();
    let (kind, code) = match (v6, why) {
        (false, Unreachable::Port) => (3, 3),
        (false, Unreachable::Prohibited) => (3, 13),
        (true, Unreachable::Port) => (1, 4),
        (true, Unreachable::Prohibited) => (1, 1),
    };
    // As much as fits into what every link takes.
    let quoted = &packet[..packet
        .len()
        .min(if v6 { 1280 - IPV6 - 8 } else { 576 - IPV4 - 8 })];
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(quoted);
    match (src, dst) {
        (IpAddr::V4(_), _) => icmpv4_checksum(&mut message),
        (IpAddr::V6(src), IpAddr::V6(dst)) => icmpv6_checksum(&mut message, src, dst),
        _ => return None,
    }
    ip_packet(
        src,
        dst,
        if v6 {
            IpProtocol::Icmpv6
        } else {
            IpProtocol::Icmp
        },
        &message,
    )
}

/// Cuts an IPv4 packet into what fits `mtu`; nothing comes of one that cannot be cut. Spec: RFC 791, 3.2.
pub(super) fn fragments(packet: Vec<u8>, mtu: usize, ident: u16) -> Vec<Vec<u8>> {
    if packet.len() <= mtu {
        return vec![packet];
    }
    if packet[0] >> 4 != 4 || mtu < IPV4 + 8 {
        return Vec::new();
    }
    let (header, payload) = packet.split_at(IPV4);
    let step = (mtu - IPV4) & !7;
    let count = payload.len().div_ceil(step);
    let piece = |(n, part): (usize, &[u8])| {
        let mut bytes = [header, part].concat();
        let total = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        let offset = u16::try_from(n * step / 8).unwrap_or(u16::MAX);
        bytes[2..4].copy_from_slice(&total.to_be_bytes());
        bytes[4..6].copy_from_slice(&ident.to_be_bytes());
        let more = if n + 1 < count { 0x2000 } else { 0 };
        bytes[6..8].copy_from_slice(&(offset | more).to_be_bytes());
        Ipv4Packet::new_unchecked(&mut bytes[..]).fill_checksum();
        bytes
    };
    payload.chunks(step).enumerate().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Mac = [2, 0, 0, 0, 0, 1];
    const GUEST: Mac = [2, 0, 0, 0, 0, 2];

    fn datagram(len: usize) -> Vec<u8> {
        let at = |n, port| SocketAddr::from(([10, 0, 2, n], port));
        udp_packet(at(15, 1000), at(2, 53), &vec![7; len]).unwrap()
    }

    fn framed(packet: &[u8]) -> Vec<u8> {
        ethernet(ME, GUEST, ethertype_of(packet), packet)
    }

    #[test]
    fn what_is_put_together_is_taken_apart() {
        let frame = framed(&datagram(100));
        let Ok(Inbound::Ip(found)) = parse(&frame, ME, Offload::default()) else {
            panic!("no IP packet");
        };
        let (src, dst) = found.ends();
        assert_eq!(
            (src.to_string(), dst.to_string()),
            ("10.0.2.15:1000".into(), "10.0.2.2:53".into())
        );
        assert_eq!((found.mac, found.payload.len()), (GUEST, 108));
    }

    #[test]
    fn every_wrong_byte_is_found_or_does_no_harm() {
        let right = framed(&datagram(20));
        for at in 0..right.len() {
            for bit in 0..8 {
                let mut frame = right.clone();
                frame[at] ^= 1 << bit;
                let found = parse(&frame, ME, Offload::default());
                assert!(at < 14 || found.is_err(), "byte {at} bit {bit}: {found:?}");
            }
        }
        for len in 0..right.len() {
            assert!(
                parse(&right[..len], ME, Offload::default()).is_err(),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn a_long_datagram_is_cut_and_whole_again() {
        let packet = datagram(4000);
        let parts = fragments(packet.clone(), 1500, 9);
        assert_eq!(parts.len(), 3);
        let mut whole = Vec::new();
        for part in &parts {
            let part = Ipv4Packet::new_checked(&part[..]).unwrap();
            assert!(part.verify_checksum() && part.total_len() <= 1500);
            assert_eq!(usize::from(part.frag_offset()), whole.len());
            whole.extend_from_slice(part.payload());
        }
        assert_eq!(whole, packet[20..]);
        assert_eq!(
            parse(&framed(&parts[0]), ME, Offload::default()).unwrap_err(),
            Lost::Fragment
        );
    }
}
