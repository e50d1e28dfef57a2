//! The virtio-net header in front of every frame. Spec: virtio 1.4, 5.1.9, Device Operation (`struct virtio_net_hdr`).

use virtnet_packet::{DropReason, Offload, Offloads, PacketHash};

use crate::Features;

/// Bytes of a header up to `num_buffers`; without it, it is two shorter.
pub const HEADER_BASE: usize = 12;

/// Bytes of a header with a hash, the longest that we use.
pub const HEADER_MAX: usize = 20;

// A header is put together and taken apart in registers. Written byte by byte and then compared as a whole it would have to
// wait until all stores before it, to lines that the other side owns, are through: that cost two thirds of sending.

/// Takes a header apart: offload metadata, and `num_buffers`.
#[inline(always)]
#[must_use]
pub fn parse(bytes: [u8; HEADER_BASE]) -> (Offload, u16) {
    let mut whole = [0; 16];
    whole[..HEADER_BASE].copy_from_slice(&bytes);
    let whole = u128::from_le_bytes(whole);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "takes fields out of the whole"
    )]
    let (byte, word) = (
        |at: u32| (whole >> at) as u8,
        |at: u32| (whole >> at) as u16,
    );
    let offload = Offload {
        flags: byte(0),
        gso_type: byte(8),
        hdr_len: word(16),
        gso_size: word(32),
        csum_start: word(48),
        csum_offset: word(64),
    };
    (offload, word(80))
}

/// Whether a header says of its frame that nothing is left to do and nothing vouched for.
#[inline(always)]
#[must_use]
pub(crate) fn is_plain(bytes: [u8; HEADER_BASE]) -> bool {
    let [metadata @ .., _, _] = bytes;
    metadata == [0; HEADER_BASE - 2]
}

/// The header of a frame with nothing left to do and nothing vouched for, in one buffer.
pub(crate) const PLAIN: [u8; HEADER_BASE] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Puts a header together.
#[inline(always)]
#[must_use]
pub fn build(offload: Offload, num_buffers: u16) -> [u8; HEADER_BASE] {
    let first = u64::from(offload.flags)
        | u64::from(offload.gso_type) << 8
        | u64::from(offload.hdr_len) << 16
        | u64::from(offload.gso_size) << 32
        | u64::from(offload.csum_start) << 48;
    let rest = u32::from(offload.csum_offset) | u32::from(num_buffers) << 16;
    let mut bytes = [0; HEADER_BASE];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&rest.to_le_bytes());
    bytes
}

/// Takes the hash out of what follows the base.
#[must_use]
pub(crate) fn parse_hash(rest: [u8; HEADER_MAX - HEADER_BASE]) -> PacketHash {
    let [a, b, c, d, low, high, _, _] = rest;
    PacketHash {
        value: u32::from_le_bytes([a, b, c, d]),
        report: u16::from_le_bytes([low, high]),
    }
}

/// What follows the base where hashes are reported.
#[must_use]
pub(crate) fn build_hash(hash: PacketHash) -> [u8; HEADER_MAX - HEADER_BASE] {
    let [a, b, c, d] = hash.value.to_le_bytes();
    let [low, high] = hash.report.to_le_bytes();
    [a, b, c, d, low, high, 0, 0]
}

const TCPV4_ECN: u8 = Offload::GSO_TCPV4 | Offload::ECN;
const TCPV6_ECN: u8 = Offload::GSO_TCPV6 | Offload::ECN;

/// What one side may leave to the other, by the names of the driver's direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowed(Features);

impl Allowed {
    /// To a driver that negotiated `features`.
    pub(crate) fn driver(features: Features) -> Self {
        Self(features)
    }

    /// To the device of a driver that negotiated `features`.
    pub(crate) fn device(features: Features) -> Self {
        let names = [
            (Features::GUEST_CSUM, Features::CSUM),
            (Features::GUEST_TSO4, Features::HOST_TSO4),
            (Features::GUEST_TSO6, Features::HOST_TSO6),
            (Features::GUEST_ECN, Features::HOST_ECN),
            (Features::GUEST_UFO, Features::HOST_UFO),
            (Features::GUEST_USO4, Features::HOST_USO),
            (Features::GUEST_USO6, Features::HOST_USO),
        ];
        let negotiated = names
            .into_iter()
            .filter(|&(name, _)| features.contains(name));
        Self(negotiated.map(|(_, same)| same).collect())
    }

    /// The same, by the names of packets' metadata.
    pub(crate) fn offloads(self) -> Offloads {
        let names = [
            (Features::CSUM, Offloads::CSUM),
            (Features::CSUM | Features::HOST_TSO4, Offloads::TSO4),
            (Features::CSUM | Features::HOST_TSO6, Offloads::TSO6),
            (Features::HOST_ECN, Offloads::ECN),
            (Features::CSUM | Features::HOST_USO, Offloads::USO),
        ];
        let left = names.into_iter().filter(|&(name, _)| self.0.contains(name));
        left.map(|(_, set)| set).collect()
    }

    /// What counts of the metadata of a frame of `frame_len` bytes. Flags that ask for nothing, and numbers without a request,
    /// mean nothing to anyone. Spec: virtio 1.4, 5.1.9.2.2 and 5.1.9.4.1.
    ///
    /// # Errors
    /// [`DropReason::BadOffload`] when it asks for what was not negotiated, or cannot be done.
    #[inline(never)]
    pub(crate) fn check(self, offload: Offload, frame_len: u32) -> Result<Offload, DropReason> {
        let flags = offload.flags & Offload::NEEDS_CSUM;
        let needed = match offload.gso_type {
            Offload::GSO_NONE if flags == 0 => return Ok(Offload::default()),
            Offload::GSO_NONE => Features::CSUM,
            Offload::GSO_TCPV4 => Features::CSUM | Features::HOST_TSO4,
            Offload::GSO_TCPV6 => Features::CSUM | Features::HOST_TSO6,
            TCPV4_ECN => Features::CSUM | Features::HOST_TSO4 | Features::HOST_ECN,
            TCPV6_ECN => Features::CSUM | Features::HOST_TSO6 | Features::HOST_ECN,
            Offload::GSO_UDP => Features::CSUM | Features::HOST_UFO,
            Offload::GSO_UDP_L4 => Features::CSUM | Features::HOST_USO,
            _ => return Err(DropReason::BadOffload),
        };
        if self.0.contains(needed) && offload.fits(frame_len) {
            Ok(Offload { flags, ..offload })
        } else {
            Err(DropReason::BadOffload)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_round_trip() {
        let offload = Offload {
            flags: 1,
            gso_type: 4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        };
        assert_eq!(parse(build(offload, 3)), (offload, 3));
        assert_eq!(
            build(Offload::default(), 1),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
        );
    }
}
