//! What a network driver puts into its queues: frames behind a virtio-net header. Spec: virtio 1.4, 5.1.9.

use virtnet_packet::Offload;

use super::{FakeGuest, GuestQueue, Returned};

/// Bytes of a virtio-net header, since virtio 1.0.
pub const HEADER_LEN: usize = 12;

/// A virtio-net header, field by field.
#[must_use]
pub fn net_header(offload: &Offload, num_buffers: u16) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[0] = offload.flags;
    header[1] = offload.gso_type;
    let words = [
        offload.hdr_len,
        offload.gso_size,
        offload.csum_start,
        offload.csum_offset,
        num_buffers,
    ];
    for (place, word) in header[2..].chunks_mut(2).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    header
}

/// Makes a header and a frame available on a transmitq; the chain's id.
///
/// `cuts` says where one buffer ends and the next one begins, in bytes from the start of the header: none for a single buffer,
/// `[12]` for a header and a frame apart.
///
/// # Panics
/// When the cuts are not in order and inside, or descriptors are short.
#[track_caller]
pub fn offer_frame(
    guest: &mut FakeGuest,
    queue: &mut dyn GuestQueue,
    header: &[u8],
    frame: &[u8],
    cuts: &[usize],
) -> u16 {
    let bytes = [header, frame].concat();
    let ends = cuts.iter().copied().chain([bytes.len()]);
    let mut start = 0;
    let buffers: Vec<_> = ends
        .map(|end| {
            let piece = &bytes[start..end];
            start = end;
            guest.readable(piece)
        })
        .collect();
    queue.offer(guest, &buffers)
}

/// The packets that a device has put into the buffers of a receiveq: header and frame of each.
///
/// # Panics
/// When a header is not whole, or says that more buffers belong to the packet than there are.
#[must_use]
#[track_caller]
pub fn packets(returned: &[Returned]) -> Vec<([u8; HEADER_LEN], Vec<u8>)> {
    let mut packets = Vec::new();
    let mut rest = returned;
    while let Some(first) = rest.first() {
        let Some((&header, frame)) = first.bytes.split_first_chunk() else {
            panic!("a packet of {} bytes has no whole header", first.len);
        };
        let n = usize::from(u16::from_le_bytes([header[10], header[11]]));
        assert!(
            (1..=rest.len()).contains(&n),
            "a packet says it has {n} buffers, {} were returned",
            rest.len()
        );
        let (more, after) = rest[1..].split_at(n - 1);
        let mut frame = frame.to_vec();
        more.iter().for_each(|part| frame.extend(&part.bytes));
        packets.push((header, frame));
        rest = after;
    }
    packets
}
