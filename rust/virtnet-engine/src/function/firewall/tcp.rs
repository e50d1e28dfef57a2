//! How far a connection of TCP has come, and whether a segment can belong to it.
//!
//! A segment must lie in the window that its receiver has given, and must not acknowledge what was not sent: so a stranger who knows
//! addresses and ports has still to guess a place in 2^32. What is looked at is what passes here, which may be less than what
//! was sent, so every bound is one on the generous side.
//!
//! Source: van Rooij, Real Stateful TCP Packet Filtering in IP Filter (2001); RFC 9293, 3.10; RFC 7323, 2 (window scale).

use super::packet::{long, word};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// How far behind an acknowledgement may be: the largest window without a scale.
const BEHIND: u32 = 66_000;

/// What a segment says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    flags: u8,
    sequence: u32,
    acknowledged: u32,
    window: u16,
    /// Sequence numbers that it takes, SYN and FIN among them.
    len: u32,
    /// The window scale of a SYN.
    scale: Option<u8>,
}

impl Segment {
    /// Reads the segment whose header begins at `at`, of a packet that ends at `end`; none: it makes no sense.
    pub(super) fn of(at: usize, end: usize, head: &[u8]) -> Option<Self> {
        let (header, flags) = header(at, end, head)?;
        let options = head.get(at + 20..(at + header).min(head.len()));
        let scale = (flags & SYN != 0)
            .then(|| window_scale(options.unwrap_or_default()))
            .flatten();
        Some(Self {
            flags,
            sequence: long(head, at + 4)?,
            acknowledged: long(head, at + 8)?,
            window: word(head, at + 14)?,
            len: u32::try_from(end - at - header).unwrap_or(u32::MAX)
                + u32::from(flags & SYN != 0)
                + u32::from(flags & FIN != 0),
            scale,
        })
    }

    /// Whether there is one.
    #[inline]
    pub(super) fn makes_sense(at: usize, end: usize, head: &[u8]) -> bool {
        header(at, end, head).is_some()
    }

    /// Whether a connection begins with it.
    pub(super) fn begins(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn end(&self) -> u32 {
        self.sequence.wrapping_add(self.len)
    }
}

/// How long a header is, and its flags; none: it makes no sense.
#[inline]
fn header(at: usize, end: usize, head: &[u8]) -> Option<(usize, u8)> {
    let fixed: &[u8; 20] = head.get(at..)?.first_chunk()?;
    let header = 4 * usize::from(fixed[12] >> 4);
    let flags = fixed[13];
    let is_odd = flags & SYN != 0 && flags & (FIN | RST) != 0;
    (header >= 20 && at + header <= end && !is_odd).then_some((header, flags))
}

/// Spec: RFC 7323, 2.2.
fn window_scale(mut options: &[u8]) -> Option<u8> {
    loop {
        match *options {
            [3, 3, scale, ..] => return Some(scale.min(14)),
            [1, ..] => options = &options[1..],
            [0 | 3, ..] | [] | [_] => return None,
            [_, len, ..] => options = options.get(usize::from(len).max(2)..)?,
        }
    }
}

/// What is known of one side.
#[derive(Clone, Copy, Debug, Default)]
struct Side {
    /// The end of what it has sent, and the end of what it may send.
    end: u32,
    limit: u32,
    /// The largest window it has given.
    window: u32,
    scale: u8,
    heard: bool,
    fin: bool,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// One side has asked.
    Opening,
    /// Both have agreed.
    Established,
    /// One side at least has ended, or broken off.
    Closing,
}

/// A connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    /// Who began, and the other.
    sides: [Side; 2],
    scaled: bool,
    agreed: bool,
    reset: bool,
}

impl Connection {
    /// Begins with the first segment.
    pub(super) fn new(first: &Segment) -> Self {
        let asker = Side {
            end: first.end(),
            limit: first.end(),
            window: u32::from(first.window).max(1),
            scale: first.scale.unwrap_or_default(),
            heard: true,
            fin: false,
        };
        Self {
            sides: [asker, Side::default()],
            scaled: first.scale.is_some(),
            agreed: false,
            reset: false,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        if self.reset || self.sides.iter().any(|side| side.fin) {
            Phase::Closing
        } else if self.agreed {
            Phase::Established
        } else {
            Phase::Opening
        }
    }

    /// Whether it is over, so that another may begin with the same ports.
    pub(super) fn is_over(&self) -> bool {
        self.reset || self.sides.iter().all(|side| side.fin)
    }

    /// Takes a segment of who began (0) or of the other (1): whether it can belong to this connection.
    pub(super) fn take(&mut self, from: usize, segment: &Segment) -> bool {
        if from == 0 && segment.begins() && !self.sides[1].heard {
            // Asked again, perhaps anew.
            *self = Self::new(segment);
            return true;
        }
        let (mut sender, mut receiver) = (self.sides[from], self.sides[1 - from]);
        if !sender.heard {
            // The other side agrees, or refuses.
            if !segment.has(SYN | RST) {
                return false;
            }
            sender = Side {
                end: segment.end(),
                limit: segment.end().wrapping_add(receiver.window),
                window: 1,
                scale: segment.scale.unwrap_or_default(),
                heard: segment.has(SYN),
                fin: false,
            };
            self.scaled &= segment.scale.is_some();
        }
        let acknowledged = match segment.has(ACK) {
            true => segment.acknowledged,
            false => receiver.end,
        };
        let oldest = sender.end.wrapping_sub(receiver.window.max(BEHIND));
        let least = receiver.end.wrapping_sub(sender.window.max(BEHIND));
        if is_after(segment.sequence, sender.limit)
            || is_after(oldest, segment.end())
            || is_after(acknowledged, receiver.end)
            || is_after(least, acknowledged)
        {
            return false;
        }
        // The window of a SYN is never scaled.
        let shift = if segment.has(SYN) || !self.scaled {
            0
        } else {
            sender.scale
        };
        let window = (u32::from(segment.window) << shift).max(1);
        sender.window = sender.window.max(window);
        if is_after(segment.end(), sender.end) {
            sender.end = segment.end();
        }
        let limit = acknowledged.wrapping_add(window);
        if is_after(limit, receiver.limit) {
            receiver.limit = limit;
        }
        sender.fin |= segment.has(FIN);
        self.agreed |= from == 0 && segment.has(ACK) && !segment.has(SYN | RST) && receiver.heard;
        self.reset |= segment.has(RST);
        self.sides[from] = sender;
        self.sides[1 - from] = receiver;
        true
    }
}

/// Whether one sequence number comes after another. Spec: RFC 9293, 3.4.
fn is_after(one: u32, other: u32) -> bool {
    let ahead = one.wrapping_sub(other);
    ahead != 0 && ahead < 1 << 31
}
