//! Doing what a sender left to be done, for a receiver that did not agree to it: checksums, and segments of long frames.
//!
//! A frame is put together once, and what leaves are frames with nothing left to do. What its headers say is believed no further
//! than its end. In a packet's way this stands between a burst and a port that cannot pass on its metadata.

use crate::checksum::Sum;
use crate::header::ETHERNET_LEN;
use crate::{Burst, Offload, Offloads};

/// Why a frame cannot be resolved: its headers are not what its metadata says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unresolvable;

/// Frames put together and taken apart: room that is used again and again.
#[derive(Debug, Default)]
pub struct Resolver {
    frame: Vec<u8>,
    segment: Vec<u8>,
    plan: Option<Plan>,
    /// Where in the frame the next segment starts.
    at: usize,
    n: u32,
}

/// How a long frame is cut.
#[derive(Clone, Copy, Debug)]
struct Plan {
    ip: usize,
    is_v4: bool,
    transport: usize,
    is_tcp: bool,
    payload: usize,
    size: usize,
}

impl Resolver {
    /// Takes packet `i` of a burst; [`next_frame`](Self::next_frame) gives what becomes of it.
    ///
    /// # Errors
    /// [`Unresolvable`]: the sender is at fault.
    pub fn take(&mut self, burst: &Burst, i: usize) -> Result<(), Unresolvable> {
        let offload = burst.offload(i);
        self.frame.resize(burst.frame_len(i), 0);
        burst.copy_frame(i, &mut self.frame);
        (self.at, self.n, self.plan) = (0, 0, None);
        if offload.segments() != Offload::GSO_NONE {
            let plan = Plan::of(&self.frame, offload).ok_or(Unresolvable)?;
            if self.frame.len() - plan.payload > plan.size {
                (self.plan, self.at) = (Some(plan), plan.payload);
                return Ok(());
            }
        }
        if offload.flags & Offload::NEEDS_CSUM != 0 {
            complete(&mut self.frame, offload).ok_or(Unresolvable)?;
        }
        Ok(())
    }

    /// The next finished frame of the packet that was taken.
    pub fn next_frame(&mut self) -> Option<&[u8]> {
        let Some(plan) = self.plan else {
            self.n += 1;
            return (self.n == 1).then_some(&self.frame[..]);
        };
        if self.at >= self.frame.len() {
            return None;
        }
        let end = self.frame.len().min(self.at + plan.size);
        self.segment.clear();
        self.segment.extend_from_slice(&self.frame[..plan.payload]);
        self.segment.extend_from_slice(&self.frame[self.at..end]);
        let place = Place {
            n: self.n,
            offset: u32::try_from(self.at - plan.payload).unwrap_or(u32::MAX),
            is_last: end == self.frame.len(),
        };
        plan.finish(&mut self.segment, place);
        (self.at, self.n) = (end, self.n + 1);
        Some(&self.segment)
    }
}

/// Computes a checksum where it was left, over everything from there to the end: the sum of the pseudo header stands in its place.
fn complete(frame: &mut [u8], offload: Offload) -> Option<()> {
    let start = usize::from(offload.csum_start);
    let sum = Sum::of(frame.get(start..)?).checksum_not_zero();
    let at = start + usize::from(offload.csum_offset);
    frame
        .get_mut(at..at + 2)?
        .copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// Which segment of a frame one is.
#[derive(Clone, Copy, Debug)]
struct Place {
    n: u32,
    /// Bytes of payload before it.
    offset: u32,
    is_last: bool,
}

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TAGS: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = 6;
const UDP: u8 = 17;
const UDP_LEN: usize = 8;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

impl Plan {
    /// Reads the headers; what they say must agree with the metadata.
    fn of(frame: &[u8], offload: Offload) -> Option<Self> {
        let mut ip = ETHERNET_LEN;
        let mut kind = word(frame, ip - 2)?;
        while TAGS.contains(&kind) {
            ip += 4;
            kind = word(frame, ip - 2)?;
        }
        let transport = usize::from(offload.csum_start);
        let (is_v4, least) = match kind {
            IPV4 => (true, 20),
            IPV6 => (false, 40),
            _ => return None,
        };
        let is_tcp = match (offload.segments(), is_v4) {
            (Offload::GSO_TCPV4, true) | (Offload::GSO_TCPV6, false) => true,
            (Offload::GSO_UDP_L4, _) => false,
            _ => return None,
        };
        let first = *frame.get(ip)?;
        let header_len = if is_v4 {
            usize::from(first & 15) * 4
        } else {
            least
        };
        let is_whole = if is_v4 {
            // A fragment, or options that end elsewhere, is nothing to be segmented.
            ip + header_len == transport && word(frame, ip + 6)? & 0x3fff == 0
        } else {
            ip + header_len <= transport
        };
        let version = if is_v4 { 4 } else { 6 };
        if first >> 4 != version || header_len < least || !is_whole {
            return None;
        }
        let payload = transport
            + if is_tcp {
                usize::from(*frame.get(transport + 12)? >> 4) * 4
            } else {
                UDP_LEN
            };
        let least_transport = if is_tcp { 20 } else { UDP_LEN };
        let size = usize::from(offload.gso_size);
        (payload >= transport + least_transport && payload <= frame.len() && size > 0).then_some(
            Self {
                ip,
                is_v4,
                transport,
                is_tcp,
                payload,
                size,
            },
        )
    }

    /// Makes the headers of a copied segment its own.
    fn finish(&self, segment: &mut [u8], place: Place) {
        let (ip, transport) = (self.ip, self.transport);
        if self.is_v4 {
            put(segment, ip + 2, len_16(segment.len() - ip));
            // Each datagram is another one.
            let id = get(segment, ip + 4)
                .wrapping_add(u16::try_from(place.n & 0xffff).unwrap_or_default());
            put(segment, ip + 4, id);
            put(segment, ip + 10, 0);
            let sum = Sum::of(&segment[ip..transport]).checksum();
            put(segment, ip + 10, sum);
        } else {
            put(segment, ip + 4, len_16(segment.len() - ip - 40));
        }
        let at = if self.is_tcp {
            let sequence = &mut segment[transport + 4..transport + 8];
            let first = u32::from_be_bytes([sequence[0], sequence[1], sequence[2], sequence[3]]);
            sequence.copy_from_slice(&first.wrapping_add(place.offset).to_be_bytes());
            let flags = &mut segment[transport + 13];
            if !place.is_last {
                *flags &= !FIN_PSH;
            }
            if place.n > 0 {
                *flags &= !CWR;
            }
            transport + 16
        } else {
            put(segment, transport + 4, len_16(segment.len() - transport));
            transport + 6
        };
        put(segment, at, 0);
        let addresses = if self.is_v4 {
            ip + 12..ip + 20
        } else {
            ip + 8..ip + 40
        };
        let sum = Sum::of(&segment[addresses])
            .and_word(u16::from(if self.is_tcp { TCP } else { UDP }))
            .and_word(len_16(segment.len() - transport))
            .and(Sum::of(&segment[transport..]))
            .checksum_not_zero();
        put(segment, at, sum);
    }
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

fn get(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

fn put(frame: &mut [u8], at: usize, word: u16) {
    frame[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

fn len_16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// What a packet's metadata asks of a receiver.
impl From<Offload> for Offloads {
    fn from(offload: Offload) -> Self {
        let mut asked = Self::NONE;
        if offload.flags & Offload::NEEDS_CSUM != 0 {
            asked |= Self::CSUM;
        }
        asked |= match offload.segments() {
            Offload::GSO_NONE => Self::NONE,
            Offload::GSO_TCPV4 => Self::TSO4,
            Offload::GSO_TCPV6 => Self::TSO6,
            Offload::GSO_UDP_L4 => Self::USO,
            _ => Self::OTHER,
        };
        if offload.gso_type & Offload::ECN != 0 {
            asked |= Self::ECN;
        }
        asked
    }
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "numbers of tests are small"
)]
mod tests {
    use super::*;

    /// A frame as a driver sends it that leaves everything to be done: the sum of the pseudo header in place of the checksum, for the
    /// length of the whole.
    fn frame(v4: bool, tcp: bool, tags: usize, payload: usize) -> (Vec<u8>, Offload) {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        for tag in 0..tags {
            frame.extend([0x81, 0, 0, tag as u8 + 1]);
        }
        let (transport_len, protocol) = if tcp { (32, TCP) } else { (8, UDP) };
        let len = transport_len + payload;
        let (source, destination): (Vec<u8>, Vec<u8>) = if v4 {
            (vec![10, 0, 0, 1], vec![10, 0, 0, 2])
        } else {
            (vec![0xfd; 16], vec![0xfe; 16])
        };
        if v4 {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend(len_16(20 + len).to_be_bytes());
            frame.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(len_16(len).to_be_bytes());
            frame.extend([protocol, 64]);
        }
        frame.extend(&source);
        frame.extend(&destination);
        let start = frame.len();
        let pseudo = !Sum::of(&[source, destination].concat())
            .and_word(u16::from(protocol))
            .and_word(len_16(len))
            .checksum();
        if tcp {
            frame.extend([
                0x10, 0, 0, 80, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 1, 0x80, 0x99, 1, 0,
            ]);
            frame.extend(pseudo.to_be_bytes());
            frame.extend([0, 0, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            frame.extend([0x10, 0, 0, 9]);
            frame.extend(len_16(len).to_be_bytes());
            frame.extend(pseudo.to_be_bytes());
        }
        frame.extend((0..payload).map(|n| (n * 7 % 253) as u8));
        let gso_type = match (tcp, v4) {
            (true, true) => Offload::GSO_TCPV4,
            (true, false) => Offload::GSO_TCPV6,
            (false, _) => Offload::GSO_UDP_L4,
        };
        let offload = Offload {
            flags: Offload::NEEDS_CSUM,
            gso_type,
            hdr_len: 0,
            gso_size: 1000,
            csum_start: len_16(start),
            csum_offset: if tcp { 16 } else { 6 },
        };
        (frame, offload)
    }

    fn resolved(frame: &[u8], offload: Offload) -> Option<Vec<Vec<u8>>> {
        let mut burst = Burst::new();
        burst.push_bytes(frame, offload);
        let mut resolver = Resolver::default();
        resolver.take(&burst, 0).ok()?;
        let mut frames = Vec::new();
        while let Some(frame) = resolver.next_frame() {
            frames.push(frame.to_vec());
        }
        Some(frames)
    }

    /// Whether all lengths and checksums of a frame fit it; its transport header and payload.
    fn checked(frame: &[u8], v4: bool, tags: usize) -> &[u8] {
        let ip = ETHERNET_LEN + 4 * tags;
        let (addresses, transport, protocol) = if v4 {
            assert_eq!(usize::from(get(frame, ip + 2)), frame.len() - ip);
            assert_eq!(Sum::of(&frame[ip..ip + 20]).checksum(), 0);
            (&frame[ip + 12..ip + 20], ip + 20, frame[ip + 9])
        } else {
            assert_eq!(usize::from(get(frame, ip + 4)), frame.len() - ip - 40);
            (&frame[ip + 8..ip + 40], ip + 40, frame[ip + 6])
        };
        let rest = &frame[transport..];
        let sum = Sum::of(addresses)
            .and_word(u16::from(protocol))
            .and_word(len_16(rest.len()))
            .and(Sum::of(rest));
        assert_eq!(sum.checksum(), 0);
        rest
    }

    #[test]
    fn a_checksum_is_computed_over_what_it_covers() {
        for (v4, tcp, tags) in [
            (true, true, 0),
            (true, false, 1),
            (false, true, 2),
            (false, false, 0),
        ] {
            for payload in [0, 1, 100, 1_001] {
                let (frame, offload) = frame(v4, tcp, tags, payload);
                let offload = Offload {
                    gso_type: Offload::GSO_NONE,
                    ..offload
                };
                let finished = resolved(&frame, offload).unwrap();
                assert_eq!(finished.len(), 1);
                if v4 {
                    // Its header's own checksum was not left to be done.
                    let ip = ETHERNET_LEN + 4 * tags;
                    let mut whole = finished[0].clone();
                    let sum = Sum::of(&whole[ip..ip + 20]).checksum();
                    put(&mut whole, ip + 10, sum);
                    checked(&whole, v4, tags);
                } else {
                    checked(&finished[0], v4, tags);
                }
            }
        }
    }

    #[test]
    fn a_long_frame_becomes_segments_that_are_frames() {
        for (v4, tcp, tags) in [
            (true, true, 0),
            (false, true, 0),
            (true, false, 0),
            (false, false, 1),
            (true, true, 2),
        ] {
            for payload in [1_001, 2_000, 12_345, 60_000] {
                let (whole, offload) = frame(v4, tcp, tags, payload);
                let ecn = Offload {
                    gso_type: offload.gso_type | if tcp { Offload::ECN } else { 0 },
                    ..offload
                };
                let segments = resolved(&whole, ecn).unwrap();
                assert_eq!(segments.len(), payload.div_ceil(1_000));
                let header = if tcp { 32 } else { 8 };
                let mut bytes = Vec::new();
                for (n, segment) in segments.iter().enumerate() {
                    let rest = checked(segment, v4, tags);
                    if v4 {
                        assert_eq!(get(segment, ETHERNET_LEN + 4 * tags + 4), 0x1234 + n as u16);
                    }
                    if tcp {
                        let sequence = u32::from_be_bytes(rest[4..8].try_into().unwrap());
                        assert_eq!(sequence, 0xffff_fff0_u32.wrapping_add(bytes.len() as u32));
                        let is_last = n + 1 == segments.len();
                        let flags =
                            0x10 | if is_last { 0x09 } else { 0 } | if n == 0 { 0x80 } else { 0 };
                        assert_eq!(rest[13], flags, "segment {n}");
                    } else {
                        assert_eq!(usize::from(get(rest, 4)), rest.len());
                    }
                    bytes.extend_from_slice(&rest[header..]);
                }
                assert!(bytes == whole[whole.len() - payload..]);
            }
        }
    }

    #[test]
    fn a_frame_that_is_one_segment_only_needs_its_checksum() {
        let (whole, offload) = frame(false, true, 0, 1_000);
        let finished = resolved(&whole, offload).unwrap();
        assert_eq!(finished.len(), 1);
        checked(&finished[0], false, 0);
    }

    #[test]
    fn headers_that_are_not_what_the_metadata_says_are_refused() {
        let (whole, offload) = frame(true, true, 0, 5_000);
        let refused = |frame: &[u8], offload| resolved(frame, offload).is_none();
        assert!(refused(
            &whole,
            Offload {
                gso_type: Offload::GSO_TCPV6,
                ..offload
            }
        ));
        assert!(refused(
            &whole,
            Offload {
                gso_type: Offload::GSO_UDP,
                ..offload
            }
        ));
        assert!(refused(
            &whole,
            Offload {
                csum_start: 30,
                ..offload
            }
        ));
        assert!(refused(
            &whole,
            Offload {
                gso_size: 0,
                ..offload
            }
        ));
        assert!(
            refused(
                &whole[..60],
                Offload {
                    gso_size: 1,
                    ..offload
                }
            ),
            "its TCP header is longer"
        );
        for (at, byte) in [
            (12, 9),
            (14, 0x65),
            (14, 0x4f),
            (14, 0x41),
            (20, 0x20),
            (21, 1),
            (46, 0x40),
        ] {
            let mut other = whole.clone();
            other[at] = byte;
            assert!(refused(&other, offload), "byte {at}");
        }
        let beyond = Offload {
            gso_type: Offload::GSO_NONE,
            csum_start: 60_000,
            ..offload
        };
        assert!(refused(&whole, beyond));
    }

    #[test]
    fn whatever_comes_nothing_panics_and_every_frame_is_finished() {
        let mut state = 1_u64;
        let mut random = |below: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as usize % below
        };
        for _ in 0..30_000 {
            let (mut bytes, mut offload) =
                frame(random(2) == 0, random(2) == 0, random(3), random(3_000));
            for _ in 0..random(4) {
                let at = random(80).min(bytes.len() - 1);
                bytes[at] = random(256) as u8;
            }
            bytes.truncate(1 + random(bytes.len()));
            offload.gso_size = random(2_000) as u16;
            offload.csum_start = offload.csum_start.wrapping_add(random(5) as u16 * 7);
            if let Some(frames) = resolved(&bytes, offload) {
                assert!(!frames.is_empty());
                assert!(frames.iter().all(|frame| frame.len() <= bytes.len()));
            }
        }
    }
}
