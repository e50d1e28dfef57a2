//! The signature of a packet that a generator has made: which stream, which number, when it was sent.
//!
//! 18 bytes, big-endian, the first ones behind the headers of the packet, so that the shortest frame of UDP over IPv4 has just
//! the room: a magic number (16 bits), the stream (16), the number of the packet in it (48), the sender's monotonic clock in ns
//! (48), and a word that makes the one's complement sum of all nine words zero. So a checksum that covers a signature is the
//! same whatever the signature says, and whoever reads one sees whether it was damaged.

use virtnet_packet::Fields;
use virtnet_packet::checksum::Sum;

const MAGIC: [u8; 2] = [0x76, 0x6e];
const BITS_48: u64 = (1 << 48) - 1;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Type, code, checksum, and what echoes have for themselves.
const ICMP_LEN: usize = 8;

/// Bytes of a signature.
pub(super) const SIGNATURE_LEN: usize = 18;

/// What a signature says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Signature {
    pub(super) stream: u16,
    /// Number of the packet in its stream, from 0; 48 bits.
    pub(super) number: u64,
    /// The sender's clock in ns; the lower 48 bits.
    pub(super) sent_ns: u64,
}

/// What stands where a signature would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Signature(Signature),
    /// A signature, which has been changed on its way.
    Damaged,
    /// Somebody else's bytes, or none.
    Nothing,
}

/// Where the signature stands in a packet: right behind its headers.
#[inline]
pub(super) fn place(fields: &Fields) -> usize {
    let payload = fields.payload as usize;
    match fields.ip_proto {
        ICMP | ICMPV6 if fields.l4_at > 0 => payload + ICMP_LEN,
        _ => payload,
    }
}

impl Signature {
    #[inline]
    pub(super) fn bytes(&self) -> [u8; SIGNATURE_LEN] {
        let mut bytes = [0; SIGNATURE_LEN];
        bytes[..2].copy_from_slice(&MAGIC);
        bytes[2..4].copy_from_slice(&self.stream.to_be_bytes());
        bytes[4..10].copy_from_slice(&self.number.to_be_bytes()[2..]);
        bytes[10..16].copy_from_slice(&self.sent_ns.to_be_bytes()[2..]);
        let rest = Sum::of(&bytes[..16]).checksum();
        bytes[16..].copy_from_slice(&rest.to_be_bytes());
        bytes
    }

    /// Reads what stands at `at` in a frame, or as much of it as there is.
    #[inline]
    pub(super) fn find(frame: &[u8], at: usize) -> Found {
        let bytes = frame
            .get(at..)
            .and_then(<[u8]>::first_chunk::<SIGNATURE_LEN>);
        let Some(
            &[
                m0,
                m1,
                s0,
                s1,
                n0,
                n1,
                n2,
                n3,
                n4,
                n5,
                t0,
                t1,
                t2,
                t3,
                t4,
                t5,
                _,
                _,
            ],
        ) = bytes
        else {
            return Found::Nothing;
        };
        if [m0, m1] != MAGIC {
            return Found::Nothing;
        }
        if bytes.is_none_or(|bytes| Sum::of(bytes).checksum() != 0) {
            return Found::Damaged;
        }
        Found::Signature(Self {
            stream: u16::from_be_bytes([s0, s1]),
            number: u64::from_be_bytes([0, 0, n0, n1, n2, n3, n4, n5]),
            sent_ns: u64::from_be_bytes([0, 0, t0, t1, t2, t3, t4, t5]),
        })
    }

    /// How long ago it was sent, in ns. A clock that is read on another processor may be behind a little: that is no time at all.
    #[inline]
    pub(super) fn age(&self, now: u64) -> u64 {
        let age = now.wrapping_sub(self.sent_ns) & BITS_48;
        if age > BITS_48 / 2 { 0 } else { age }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found_and_sums_to_nothing() {
        for (stream, number, sent_ns) in [
            (0, 0, 0),
            (1, 2, 3),
            (u16::MAX, BITS_48, BITS_48),
            (7, 0xffff_0000_1234, 0xfeed_beef_0001),
        ] {
            let signature = Signature {
                stream,
                number,
                sent_ns,
            };
            let bytes = signature.bytes();
            assert_eq!(Sum::of(&bytes).checksum(), 0);
            assert_eq!(Signature::find(&bytes, 0), Found::Signature(signature));
            assert_eq!(Signature::find(&bytes[1..], 0), Found::Nothing);
            for bit in 16..SIGNATURE_LEN * 8 {
                let mut damaged = bytes;
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Signature::find(&damaged, 0), Found::Damaged, "bit {bit}");
            }
        }
    }

    #[test]
    fn an_age_survives_the_turn_of_the_clock_and_is_never_below_nothing() {
        let sent = |sent_ns| Signature {
            stream: 0,
            number: 0,
            sent_ns,
        };
        assert_eq!(sent(5).age(12), 7);
        assert_eq!(sent(12).age(5), 0);
        assert_eq!(sent(BITS_48).age(BITS_48 + 10), 10);
    }
}
