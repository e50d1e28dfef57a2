//! The frame by which a network learns that a guest has moved.
//!
//! Switches know from the source address of what they see where a station is. A guest that has moved to another host says nothing
//! about it unless it is asked to; one that cannot be asked is spoken for by its device. Any frame would do: the customary one is a
//! broadcast in which the guest asks for its own address.

/// Bytes of the shortest frame, without its checksum.
const FRAME_LEN: usize = 60;

/// A request of `mac` for its own address, to everybody. Spec: RFC 903.
pub(super) fn request(mac: [u8; 6]) -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // EtherType; Ethernet and IPv4, with the lengths of their addresses; request reverse.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}
