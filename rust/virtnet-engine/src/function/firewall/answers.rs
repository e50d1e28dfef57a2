//! What a sender is told whose packet is rejected: a reset of TCP, or that the port is not there.

use virtnet_packet::checksum::Sum;
use virtnet_packet::flow::IpVersion;

use super::packet::{ICMP, ICMP6, Packet, Piece, TCP};
use crate::function::tcp_reset::reset;

const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const HOPS: u8 = 64;

/// The most bytes of a packet that its sender is told about.
const QUOTED: usize = 128;

/// The frame to answer with, from whom the packet was for; `None` where nothing is to be said.
pub(super) fn refusal(packet: &Packet, head: &[u8]) -> Option<Vec<u8>> {
    let is_group = head.first()? & 1 != 0;
    let is_error = match (packet.protocol, head.get(packet.above)) {
        // Errors are not answered with errors. Spec: RFC 1122, 3.2.2; RFC 4443, 2.4.
        (ICMP, Some(kind)) => !matches!(kind, 0 | 8 | 13..=18),
        (ICMP6, Some(kind)) => *kind < 128,
        _ => false,
    };
    if is_group || is_error || packet.piece == Piece::Later {
        return None;
    }
    let (protocol, above) = match packet.protocol {
        TCP => (TCP, reset(head, packet.above, packet.end)?.to_vec()),
        _ if packet.version == IpVersion::V4 => (ICMP, unreachable(packet, head, [3, 3])?),
        _ => (ICMP6, unreachable(packet, head, [1, 4])?),
    };
    let mut frame = Vec::with_capacity(packet.ip + IPV6_LEN + above.len());
    frame.extend_from_slice(head.get(6..12)?);
    frame.extend_from_slice(head.get(0..6)?);
    // Tags and EtherType.
    frame.extend_from_slice(head.get(12..packet.ip)?);
    let ip = frame.len();
    let len = u16::try_from(above.len()).ok()?;
    match packet.version {
        IpVersion::V4 => {
            let [a, b] = (len + 20).to_be_bytes();
            frame.extend_from_slice(&[0x45, 0, a, b, 0, 0, 0x40, 0, HOPS, protocol, 0, 0]);
            frame.extend_from_slice(head.get(packet.ip + 16..packet.ip + 20)?);
            frame.extend_from_slice(head.get(packet.ip + 12..packet.ip + 16)?);
            let sum = Sum::of(&frame[ip..]).checksum();
            frame[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        }
        IpVersion::V6 => {
            let [a, b] = len.to_be_bytes();
            frame.extend_from_slice(&[0x60, 0, 0, 0, a, b, protocol, HOPS]);
            frame.extend_from_slice(head.get(packet.ip + 24..packet.ip + 40)?);
            frame.extend_from_slice(head.get(packet.ip + 8..packet.ip + 24)?);
        }
    }
    let start = frame.len();
    frame.extend_from_slice(&above);
    let mut sum = Sum::of(&frame[start..]);
    if protocol != ICMP {
        let addresses = match packet.version {
            IpVersion::V4 => &frame[ip + 12..ip + IPV4_LEN],
            IpVersion::V6 => &frame[ip + 8..ip + IPV6_LEN],
        };
        let pseudo = Sum::of(addresses).and_word(protocol.into()).and_word(len);
        sum = sum.and(pseudo);
    }
    let at = start + if protocol == TCP { 16 } else { 2 };
    frame[at..at + 2].copy_from_slice(&sum.checksum().to_be_bytes());
    Some(frame)
}

/// Spec: RFC 792; RFC 4443, 3.1.
fn unreachable(packet: &Packet, head: &[u8], kind: [u8; 2]) -> Option<Vec<u8>> {
    let end = packet.end.min(head.len()).min(packet.ip + QUOTED);
    let mut message = vec![kind[0], kind[1], 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(head.get(packet.ip..end)?);
    Some(message)
}
