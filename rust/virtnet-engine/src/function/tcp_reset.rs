//! The segment of TCP that says that there is no such connection.

/// Bytes of the segment.
pub(super) const RESET_LEN: usize = 20;

/// The answer to the segment whose header is at `at` of a frame whose packet ends at `end`, without its checksum; none where it is
/// a reset itself, or not there. Spec: RFC 9293, 3.10.7.1.
pub(super) fn reset(head: &[u8], at: usize, end: usize) -> Option<[u8; RESET_LEN]> {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    let header: &[u8; 20] = head.get(at..)?.first_chunk()?;
    let [
        s0,
        s1,
        d0,
        d1,
        n0,
        n1,
        n2,
        n3,
        a0,
        a1,
        a2,
        a3,
        words,
        flags,
        ..,
    ] = *header;
    if flags & RST != 0 {
        return None;
    }
    let payload = end.checked_sub(at + 4 * usize::from(words >> 4))?;
    let len =
        u32::try_from(payload).ok()? + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let (sequence, acknowledged, flags) = if flags & ACK != 0 {
        ([a0, a1, a2, a3], [0; 4], RST)
    } else {
        let next = u32::from_be_bytes([n0, n1, n2, n3]).wrapping_add(len);
        ([0; 4], next.to_be_bytes(), RST | ACK)
    };
    let mut segment = [0; RESET_LEN];
    segment[..4].copy_from_slice(&[d0, d1, s0, s1]);
    segment[4..8].copy_from_slice(&sequence);
    segment[8..12].copy_from_slice(&acknowledged);
    segment[12..14].copy_from_slice(&[0x50, flags]);
    Some(segment)
}
