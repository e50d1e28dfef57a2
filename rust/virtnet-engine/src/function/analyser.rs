//! An analyser: packets of generators end here, and what became of each stream is counted.
//!
//! Packets are told apart by their numbers ([`signature`]). A window of the last numbers says which of them have
//! come, so that a packet that comes again is a duplicate, and one that comes late is no loss any more.

use virtnet_packet::checksum::Sum;
use virtnet_packet::{Burst, Fields, Offload, Picks};

use super::Fate;
use super::signature::{self, Found, Signature};
use crate::Histogram;

/// Numbers of a stream that are remembered.
const WINDOW: u64 = 1 << 16;
const WORDS: usize = 1 << 10;

/// Streams that one analyser tells apart.
const STREAMS_MAX: usize = 1_024;

/// How an analyser goes about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AnalyserOrders {
    /// Look at the checksums of packets, too.
    pub check: bool,
    /// How often it was reset: another number than before resets it.
    pub resets: u64,
}

/// What an analyser has counted.
#[derive(Clone, Debug, Default)]
pub struct AnalyserCounters {
    /// Packets without a signature.
    pub foreign: u64,
    /// Packets whose signature is damaged, or whose checksum is wrong where that is looked at.
    pub corrupted: u64,
    /// The streams it has met, in order of their numbers.
    pub streams: Vec<ReceivedStream>,
}

/// What has come of one stream. Sent and not lost are `received`; all that came are `received`, `duplicates` and `late`.
#[derive(Clone, Debug, Default)]
pub struct ReceivedStream {
    /// Its number.
    pub id: u16,
    /// Packets that came, each counted once.
    pub received: u64,
    /// Bytes of their frames.
    pub received_bytes: u64,
    /// Packets that have not come, of those up to the highest number that has.
    pub lost: u64,
    /// Of `received`, those that came behind one with a higher number (RFC 4737).
    pub reordered: u64,
    /// Packets that had come before.
    pub duplicates: u64,
    /// Packets so far behind that nobody knows whether they had come, or from before the last reset.
    pub late: u64,
    /// The number that counting began with; `None`: that of the next packet that comes.
    pub first_number: Option<u64>,
    /// When the first and the last came, by the worker's clock.
    pub first_ns: u64,
    /// See `first_ns`.
    pub last_ns: u64,
    /// How long packets were on their way, in ns.
    pub latency: Histogram,
}

/// Takes every packet and counts what became of streams.
#[derive(Debug, Default)]
pub struct Analyser {
    orders: AnalyserOrders,
    foreign: u64,
    corrupted: u64,
    /// By number.
    streams: Vec<Option<Box<Stream>>>,
    met: usize,
    /// For the bytes of a packet whose checksums are looked at.
    scratch: Vec<u8>,
}

#[derive(Debug)]
struct Stream {
    counts: ReceivedStream,
    /// The number that counting began with; `None`: the next that comes.
    base: Option<u64>,
    /// One more than the highest number that has come.
    next: u64,
    /// Which of the last numbers have come.
    window: Box<[u64; WORDS]>,
}

impl Analyser {
    /// An analyser.
    #[must_use]
    pub fn new(orders: AnalyserOrders) -> Self {
        Self {
            orders,
            ..Self::default()
        }
    }

    /// What it has counted since the last reset.
    #[must_use]
    pub fn counters(&self) -> AnalyserCounters {
        let met = self.streams.iter().flatten();
        AnalyserCounters {
            foreign: self.foreign,
            corrupted: self.corrupted,
            streams: met.map(|stream| stream.counters()).collect(),
        }
    }

    /// Takes new orders.
    pub(super) fn order(&mut self, orders: AnalyserOrders) {
        if orders.resets != self.orders.resets {
            self.foreign = 0;
            self.corrupted = 0;
            for stream in self.streams.iter_mut().flatten() {
                stream.reset();
            }
        }
        self.orders = orders;
    }

    #[inline]
    pub(super) fn take(&mut self, burst: &Burst, picks: &Picks, now: u64) -> Fate {
        for i in picks.iter() {
            self.take_one(burst, i, now);
        }
        Fate::Consumed
    }

    #[inline]
    fn take_one(&mut self, burst: &Burst, i: usize, now: u64) {
        let head = burst.head(i);
        let fields = Fields::parse(head);
        let signature = match Signature::find(head, signature::place(&fields)) {
            Found::Signature(signature) => signature,
            Found::Damaged => {
                self.corrupted += 1;
                return;
            }
            Found::Nothing => {
                self.foreign += 1;
                return;
            }
        };
        if self.orders.check && !is_sound(burst, i, &fields, &mut self.scratch) {
            self.corrupted += 1;
            return;
        }
        match self.stream(signature.stream) {
            Some(stream) => stream.take(&signature, burst.frame_len(i), now),
            None => self.foreign += 1,
        }
    }

    #[inline]
    fn stream(&mut self, id: u16) -> Option<&mut Stream> {
        let at = usize::from(id);
        if self.streams.get(at).is_none_or(Option::is_none) {
            self.meet(at, id);
        }
        self.streams.get_mut(at)?.as_deref_mut()
    }

    #[cold]
    fn meet(&mut self, at: usize, id: u16) {
        if self.met == STREAMS_MAX {
            return;
        }
        self.met += 1;
        if self.streams.len() <= at {
            self.streams.resize_with(at + 1, || None);
        }
        // What was sent before the first packet came is lost; after a reset nobody knows what was.
        let base = (self.orders.resets == 0).then_some(0);
        self.streams[at] = Some(Box::new(Stream::new(id, base)));
    }
}

impl Stream {
    fn new(id: u16, base: Option<u64>) -> Self {
        Self {
            counts: ReceivedStream {
                id,
                ..ReceivedStream::default()
            },
            base,
            next: base.unwrap_or_default(),
            window: Box::new([0; WORDS]),
        }
    }

    fn reset(&mut self) {
        self.counts = ReceivedStream {
            id: self.counts.id,
            ..ReceivedStream::default()
        };
        self.base = Some(self.next);
    }

    fn counters(&self) -> ReceivedStream {
        let base = self.base.unwrap_or(self.next);
        ReceivedStream {
            first_number: self.base,
            lost: (self.next - base).saturating_sub(self.counts.received),
            ..self.counts.clone()
        }
    }

    #[inline]
    fn take(&mut self, signature: &Signature, frame_len: usize, now: u64) {
        let number = signature.number;
        let base = *self.base.get_or_insert_with(|| {
            self.next = number;
            number
        });
        if number >= self.next {
            self.forget_until(number);
            self.next = number + 1;
        } else if number < base || self.next - number > WINDOW {
            self.counts.late += 1;
            return;
        } else if self.has_come(number) {
            self.counts.duplicates += 1;
            return;
        } else {
            self.counts.reordered += 1;
        }
        self.mark(number);
        let counts = &mut self.counts;
        if counts.received == 0 {
            counts.first_ns = now;
        }
        counts.last_ns = now;
        counts.received += 1;
        counts.received_bytes += frame_len as u64;
        counts.latency.record(signature.age(now));
    }

    #[inline]
    fn has_come(&self, number: u64) -> bool {
        let (word, bit) = slot(number);
        self.window[word] & bit != 0
    }

    #[inline]
    fn mark(&mut self, number: u64) {
        let (word, bit) = slot(number);
        self.window[word] |= bit;
    }

    /// Makes room for the numbers up to `number`, none of which has come.
    #[inline]
    fn forget_until(&mut self, number: u64) {
        if number - self.next >= WINDOW {
            self.window.fill(0);
            return;
        }
        for gone in self.next..=number {
            let (word, bit) = slot(gone);
            self.window[word] &= !bit;
        }
    }
}

#[inline]
fn slot(number: u64) -> (usize, u64) {
    let at = usize::try_from(number % WINDOW).unwrap_or_default();
    (at / 64 % WORDS, 1 << (at % 64))
}

/// Whether the checksums of a packet fit: of IPv4's header, of TCP, UDP and ICMP. What has none, or has one that is left to be
/// done, fits.
fn is_sound(burst: &Burst, i: usize, fields: &Fields, frame: &mut Vec<u8>) -> bool {
    let head = burst.head(i);
    let (ip, l4) = (fields.ip_at, fields.l4_at);
    let word = |at: usize| {
        let bytes = head.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |&bytes| u16::from_be_bytes(bytes))
    };
    let total = match fields.ip_version {
        4 if l4 > ip => {
            if Sum::of(head.get(ip..l4).unwrap_or_default()).checksum() != 0 {
                return false;
            }
            usize::from(word(ip + 2))
        }
        6 => 40 + usize::from(word(ip + 4)),
        _ => return true,
    };
    let end = ip + total;
    if l4 == 0 || end < l4 || end > burst.frame_len(i) {
        return l4 == 0;
    }
    let left_to_do = burst.offload(i).flags & (Offload::NEEDS_CSUM | Offload::DATA_VALID) != 0;
    let is_v6 = fields.ip_version == 6;
    let has_pseudo = match fields.ip_proto {
        17 if word(l4 + 6) == 0 => return true,
        6 | 17 => true,
        58 if is_v6 => true,
        1 if !is_v6 => false,
        _ => return true,
    };
    if left_to_do {
        return true;
    }
    frame.resize(burst.frame_len(i), 0);
    burst.copy_frame(i, frame);
    let mut sum = Sum::of(&frame[l4..end]);
    if has_pseudo {
        let addresses = if is_v6 {
            ip + 8..ip + 40
        } else {
            ip + 12..ip + 20
        };
        let len = u16::try_from(end - l4).unwrap_or_default();
        sum = sum
            .and(Sum::of(frame.get(addresses).unwrap_or_default()))
            .and_word(len)
            .and_word(u16::from(fields.ip_proto));
    }
    sum.checksum() == 0
}
