//! The virtio-net header in front of every frame. Spec: virtio 1.4, 5.1.9, Device Operation (`struct virtio_net_hdr`).

use virtnet_packet::Offload;

/// Bytes of the longest header we use; without `num_buffers` it is two shorter.
pub const HEADER_MAX: usize = 12;

/// Takes a header apart: offload metadata, and `num_buffers`.
#[inline]
#[must_use]
pub fn parse(bytes: [u8; HEADER_MAX]) -> (Offload, u16) {
    let [flags, gso_type, a, b, c, d, e, f, g, h, i, j] = bytes;
    let offload = Offload {
        flags,
        gso_type,
        hdr_len: u16::from_le_bytes([a, b]),
        gso_size: u16::from_le_bytes([c, d]),
        csum_start: u16::from_le_bytes([e, f]),
        csum_offset: u16::from_le_bytes([g, h]),
    };
    (offload, u16::from_le_bytes([i, j]))
}

/// Puts a header together.
#[inline]
#[must_use]
pub fn build(offload: Offload, num_buffers: u16) -> [u8; HEADER_MAX] {
    let [a, b] = offload.hdr_len.to_le_bytes();
    let [c, d] = offload.gso_size.to_le_bytes();
    let [e, f] = offload.csum_start.to_le_bytes();
    let [g, h] = offload.csum_offset.to_le_bytes();
    let [i, j] = num_buffers.to_le_bytes();
    [
        offload.flags,
        offload.gso_type,
        a,
        b,
        c,
        d,
        e,
        f,
        g,
        h,
        i,
        j,
    ]
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
