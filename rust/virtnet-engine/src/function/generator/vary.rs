//! Bytes that differ from packet to packet, and the checksums that cover them.
//!
//! What packet number *n* has in a place is a function of *n*, so a packet that was not taken is made again as it was. Checksums
//! are changed by the difference (RFC 1624): one that was wrong stays wrong, and payload is never read.

use std::sync::Arc;

use virtnet_packet::checksum::Sum;
use virtnet_packet::{Fields, Writable};

use crate::function::random::Random;

/// What differs from packet to packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vary {
    /// Where.
    pub place: VaryPlace,
    /// What packet after packet has there; of numbers too large, the lower bits.
    pub values: Values,
}

/// A place in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VaryPlace {
    /// A header field, which the frame must have.
    Field(Writable),
    /// Some bytes, 16 at most, as a big-endian number.
    Bytes {
        /// The first.
        offset: usize,
        /// How many.
        width: usize,
    },
}

/// Values in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Values {
    /// `start`, `start + step` and so on, `count` of them, then again from the first.
    Counter {
        /// The first.
        start: u128,
        /// From one to the next; wraps around, so a step down is a large number.
        step: u128,
        /// How many there are; 0 counts as 1.
        count: u64,
    },
    /// Random numbers, each as likely as any other, the same for the same seed.
    Random {
        /// The smallest.
        low: u128,
        /// The largest.
        high: u128,
        /// What they are made of.
        seed: u64,
    },
    /// These in turn; none count as 0.
    List(Arc<[u128]>),
}

impl Values {
    #[inline]
    fn of(&self, n: u64) -> u128 {
        match self {
            Self::Counter { start, step, count } => {
                let k = u128::from(n % (*count).max(1));
                start.wrapping_add(step.wrapping_mul(k))
            }
            Self::Random { low, high, seed } => {
                let mut random = Random::new(*seed, n);
                let wide = u128::from(random.next()) << 64 | u128::from(random.next());
                match high.wrapping_sub(*low).checked_add(1) {
                    Some(span) => low.wrapping_add(wide % span),
                    None => wide,
                }
            }
            Self::List(values) => {
                let at = usize::try_from(n % values.len().max(1) as u64).unwrap_or_default();
                values.get(at).copied().unwrap_or_default()
            }
        }
    }
}

/// A place that was found in a frame.
#[derive(Clone, Debug)]
pub(super) struct Varied {
    pub(super) at: usize,
    pub(super) width: usize,
    /// The bits that change.
    mask: u128,
    values: Values,
}

impl Varied {
    /// Finds the place in a frame with these headers.
    pub(super) fn new(vary: &Vary, fields: &Fields, frame_len: usize) -> Option<Self> {
        let (bytes, mask) = match vary.place {
            VaryPlace::Field(field) => {
                let mask = if field == Writable::Vlan {
                    0x0fff
                } else {
                    u128::MAX
                };
                (field.bytes_of(fields, frame_len)?, mask)
            }
            VaryPlace::Bytes { offset, width } => (offset..offset.checked_add(width)?, u128::MAX),
        };
        let width = bytes.len();
        ((1..=16).contains(&width) && bytes.end <= frame_len).then(|| Self {
            at: bytes.start,
            width,
            mask,
            values: vary.values.clone(),
        })
    }

    /// Writes what packet number `n` has.
    #[inline]
    pub(super) fn write(&self, head: &mut [u8], covers: &Covers, n: u64) {
        let mut bytes = self.values.of(n).to_be_bytes();
        let new = &mut bytes[16 - self.width..];
        if self.mask != u128::MAX {
            let mask = self.mask.to_be_bytes();
            let there = head.get(self.at..).unwrap_or_default();
            for ((new, old), mask) in new.iter_mut().zip(there).zip(&mask[16 - self.width..]) {
                *new = (*new & mask) | (old & !mask);
            }
        }
        covers.write(head, self.at, new);
    }
}

/// Which bytes of a frame its checksums cover.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Covers {
    /// IPv4's header, and where its checksum is.
    header: Option<(usize, usize, usize)>,
    /// The addresses in the pseudo-header, what the transport's checksum covers, and where that is.
    transport: Option<(usize, usize, usize)>,
    addresses: (usize, usize),
    is_udp: bool,
}

impl Covers {
    /// Those of a frame with these headers.
    pub(super) fn new(frame: &[u8], fields: &Fields) -> Self {
        let (ip, l4) = (fields.ip_at, fields.l4_at);
        let word = |at: usize| {
            let bytes = frame.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map(|&bytes| u16::from_be_bytes(bytes))
        };
        let (header, addresses, end) = match fields.ip_version {
            4 => {
                let len = usize::from(frame.get(ip).map_or(0, |byte| byte & 0x0f)) * 4;
                let total = usize::from(word(ip + 2).unwrap_or_default());
                (
                    Some((ip, ip + len, ip + 10)),
                    (ip + 12, ip + 20),
                    ip + total,
                )
            }
            6 => {
                let len = usize::from(word(ip + 4).unwrap_or_default());
                (None, (ip + 8, ip + 40), ip + 40 + len)
            }
            _ => return Self::default(),
        };
        let is_v6 = fields.ip_version == 6;
        let (offset, has_pseudo) = match fields.ip_proto {
            6 => (Some(16), true),
            17 => (Some(6), true),
            1 if !is_v6 => (Some(2), false),
            58 if is_v6 => (Some(2), true),
            _ => (None, false),
        };
        let is_udp = fields.ip_proto == 17;
        let checksum_at = offset.filter(|_| l4 > 0).map(|offset| l4 + offset);
        let is_there = |at: &usize| match word(*at) {
            // Of UDP, nought is no checksum.
            Some(sum) => !(is_udp && sum == 0),
            None => false,
        };
        Self {
            header,
            transport: checksum_at
                .filter(is_there)
                .map(|at| (l4, end.min(frame.len()), at)),
            addresses: if has_pseudo { addresses } else { (0, 0) },
            is_udp,
        }
    }

    /// Where what the transport's checksum covers ends; 0 if there is none.
    pub(super) fn transport_end(&self) -> usize {
        self.transport.map_or(0, |(_, end, _)| end)
    }

    /// Writes bytes into a frame, or as much of it as there is.
    #[inline]
    pub(super) fn write(&self, head: &mut [u8], at: usize, bytes: &[u8]) {
        // Sums are of pairs of bytes, and headers begin on even places.
        let pairs = at & !1..(at + bytes.len()).next_multiple_of(2);
        let (mut in_header, mut in_transport) = (Change::default(), Change::default());
        for pair in pairs.step_by(2) {
            let old = word_at(head, pair);
            for k in pair.max(at)..(pair + 2).min(at + bytes.len()) {
                if let Some(byte) = head.get_mut(k) {
                    *byte = bytes[k - at];
                }
            }
            let new = word_at(head, pair);
            if old == new {
                continue;
            }
            if self
                .header
                .is_some_and(|(start, end, _)| (start..end).contains(&pair))
            {
                in_header.add(old, new);
            }
            let is_address = (self.addresses.0..self.addresses.1).contains(&pair);
            if self
                .transport
                .is_some_and(|(start, end, _)| is_address || (start..end).contains(&pair))
            {
                in_transport.add(old, new);
            }
        }
        if let Some((_, _, at)) = self.header {
            in_header.renew(head, at, false);
        }
        if let Some((_, _, at)) = self.transport {
            in_transport.renew(head, at, self.is_udp);
        }
    }
}

/// What words under a checksum were, and what they are.
#[derive(Default)]
struct Change {
    is_any: bool,
    sum: Sum,
}

impl Change {
    #[inline]
    fn add(&mut self, old: u16, new: u16) {
        self.is_any = true;
        self.sum = self.sum.and_word(!old).and_word(new);
    }

    #[inline]
    fn renew(&self, head: &mut [u8], at: usize, is_udp: bool) {
        if !self.is_any {
            return;
        }
        let sum = self.sum.and_word(!word_at(head, at));
        let checksum = if is_udp {
            sum.checksum_not_zero()
        } else {
            sum.checksum()
        };
        if let Some(place) = head.get_mut(at..at + 2) {
            place.copy_from_slice(&checksum.to_be_bytes());
        }
    }
}

#[inline]
fn word_at(head: &[u8], at: usize) -> u16 {
    let byte = |at| head.get(at).copied().unwrap_or_default();
    u16::from_be_bytes([byte(at), byte(at + 1)])
}
