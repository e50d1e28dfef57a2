//! A generator: streams of packets that differ from each other, each of which says who it is and when it was sent.
//!
//! Each stream has some rows of one burst, whose frames were laid out once; what differs (fields, signature) is written into their
//! heads when they are offered. Number *n* of a stream is the same packet whenever it is made, so one that was not taken is
//! made again, with its new time.

mod vary;

use std::sync::Arc;

use virtnet_packet::{BURST_MAX, Burst, Fields, HEAD_MAX, Offload, Picks};

use super::Fate;
use super::pace::Pace;
use super::signature::{self, SIGNATURE_LEN, Signature};
use super::source::{RETRY_NS, Source};
use crate::EngineError;
use crate::graph::Gate;
use vary::{Covers, Varied};

pub use vary::{Values, Vary, VaryPlace};

/// One stream of packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamOrders {
    /// Its number, by which an analyser knows it.
    pub id: u16,
    /// What each packet is but for what differs. Checksums that are right stay right.
    pub frame: Arc<[u8]>,
    /// What differs from packet to packet.
    pub vary: Vec<Vary>,
    /// Packets in a thousand seconds; `None`: as fast as the receiver takes them.
    pub rate: Option<u64>,
    /// Packets that leave together, where there is a rate.
    pub burst: u64,
    /// Packets in all, from the moment it is said; `None`: without end; 0: pause.
    pub count: Option<u64>,
}

/// What a generator makes, from the moment it is said. A stream that has its number from before goes on counting its packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratorOrders {
    /// The streams, [`BURST_MAX`] at most.
    pub streams: Vec<StreamOrders>,
}

/// What a generator has made of one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamCounters {
    /// Its number.
    pub id: u16,
    /// Packets it has sent.
    pub sent: u64,
    /// Bytes of their frames.
    pub sent_bytes: u64,
    /// Packets that are left of its count; `None`: without end.
    pub left: Option<u64>,
    /// When the first one was sent since the last orders, by the worker's clock; `None`: none was.
    pub first_ns: Option<u64>,
    /// When the last one was.
    pub last_ns: u64,
}

impl GeneratorOrders {
    pub(super) fn check(&self) -> Result<(), EngineError> {
        self.build(&[]).map(drop)
    }

    /// Streams that go on where those of the same numbers stand, and the burst with their rows.
    fn build(&self, before: &[Stream]) -> Result<(Vec<Stream>, Burst), EngineError> {
        let count = self.streams.len();
        if !(1..=BURST_MAX).contains(&count) {
            return Err(EngineError::FrameCount { count });
        }
        let rows = BURST_MAX / count;
        let mut template = Burst::new();
        let mut streams: Vec<Stream> = Vec::with_capacity(count);
        for (k, orders) in self.streams.iter().enumerate() {
            if streams.iter().any(|other| other.id == orders.id) {
                return Err(stream_error(orders.id, "another stream has its number"));
            }
            let mut stream = Stream::new(orders, k * rows, rows)?;
            if let Some(old) = before.iter().find(|old| old.id == orders.id) {
                stream.next = old.next;
                stream.sent = old.sent;
                stream.sent_bytes = old.sent_bytes;
            }
            for row in k * rows..(k + 1) * rows {
                template.push_bytes(&orders.frame, Offload::default());
                stream.sign_first(template.head_mut(row));
            }
            streams.push(stream);
        }
        template.keep_bodies();
        Ok((streams, template))
    }
}

fn stream_error(id: u16, wrong: &'static str) -> EngineError {
    EngineError::Stream { id, wrong }
}

/// Makes packets that an [`Analyser`](super::Analyser) recognises.
///
/// It stands in a cable: what it makes leaves by gate 0, and what comes in by either gate leaves by the other.
///
/// A stream with a rate sends when it is time, whether there is room or not. One without makes what its receiver takes; where
/// that is a function, packet by packet, since only so it is known which were taken.
#[derive(Debug)]
pub struct Generator {
    template: Option<Box<Burst>>,
    streams: Vec<Stream>,
    /// The stream of each packet that was offered last.
    offered: [u8; BURST_MAX],
    /// Who is first next time.
    turn: usize,
}

#[derive(Debug)]
struct Stream {
    id: u16,
    frame_len: u64,
    signature_at: usize,
    covers: Covers,
    varied: Vec<Varied>,
    /// Its part of the burst.
    first_row: usize,
    rows: usize,
    /// In a thousand seconds, and how many leave together.
    rate: Option<(u64, u64)>,
    /// Since the first packet was allowed.
    pace: Option<Pace>,
    left: Option<u64>,
    /// Number of its next packet.
    next: u64,
    /// Nothing was taken; when to try again.
    blocked_until: u64,
    sent: u64,
    sent_bytes: u64,
    first_ns: Option<u64>,
    last_ns: u64,
}

impl Stream {
    fn new(orders: &StreamOrders, first_row: usize, rows: usize) -> Result<Self, EngineError> {
        let frame = &orders.frame[..];
        let (size, min, max) = (frame.len(), Source::FRAME_LEN_MIN, Source::FRAME_LEN_MAX);
        if !(min..=max).contains(&size) {
            return Err(EngineError::FrameSize { size, min, max });
        }
        if orders.rate == Some(0) {
            return Err(EngineError::ZeroRate);
        }
        let wrong = |what| stream_error(orders.id, what);
        let head = &frame[..size.min(HEAD_MAX)];
        let fields = Fields::parse(head);
        let covers = Covers::new(frame, &fields);
        let signature_at = signature::place(&fields);
        let signature = signature_at..signature_at + SIGNATURE_LEN;
        let end = match covers.transport_end() {
            0 => head.len(),
            end => end.min(head.len()),
        };
        if signature.end > end {
            return Err(wrong(
                "there is no room for the signature: its frame needs 18 bytes behind the headers, within the first 192",
            ));
        }
        let mut varied = Vec::with_capacity(orders.vary.len());
        for vary in &orders.vary {
            let found = Varied::new(vary, &fields, head.len()).ok_or_else(|| {
                wrong(
                    "what varies is a field that its frame has, or 1 to 16 bytes of the first 192",
                )
            })?;
            if found.at < signature.end && signature.start < found.at + found.width {
                return Err(wrong(
                    "what varies overlaps the signature, the 18 bytes behind the headers",
                ));
            }
            varied.push(found);
        }
        Ok(Self {
            id: orders.id,
            frame_len: size as u64,
            signature_at,
            covers,
            varied,
            first_row,
            rows,
            rate: orders.rate.map(|rate| (rate, orders.burst)),
            pace: None,
            left: orders.count,
            next: 0,
            blocked_until: 0,
            sent: 0,
            sent_bytes: 0,
            first_ns: None,
            last_ns: 0,
        })
    }

    #[inline]
    fn allowed(&mut self, now: u64) -> usize {
        let left = self.left.map_or(usize::MAX, |left| {
            usize::try_from(left).unwrap_or(usize::MAX)
        });
        let n = left.min(self.rows);
        match self.rate {
            Some((rate, burst)) if n > 0 => {
                let pace = self
                    .pace
                    .get_or_insert_with(|| Pace::in_bursts(rate, burst, now));
                n.min(pace.allowed(now))
            }
            _ => n,
        }
    }

    /// Writes packet number `number` into a head that was one of this stream.
    #[inline]
    fn write(&self, head: &mut [u8], number: u64, now: u64) {
        for varied in &self.varied {
            varied.write(head, &self.covers, number);
        }
        let signature = Signature {
            stream: self.id,
            number,
            sent_ns: now,
        };
        // There is one already, and all of them have the same sum: checksums stay.
        let place = self.signature_at..self.signature_at + SIGNATURE_LEN;
        head[place].copy_from_slice(&signature.bytes());
    }

    /// Puts a signature where the frame has something else.
    fn sign_first(&self, head: &mut [u8]) {
        let signature = Signature {
            stream: self.id,
            number: 0,
            sent_ns: 0,
        };
        self.covers
            .write(head, self.signature_at, &signature.bytes());
    }

    fn due(&self) -> Option<u64> {
        if self.left == Some(0) {
            return None;
        }
        Some(
            self.pace
                .map_or(0, |pace| pace.due())
                .max(self.blocked_until),
        )
    }
}

impl Generator {
    /// A generator that starts when it is added to a network.
    ///
    /// # Errors
    /// [`EngineError::FrameCount`], [`EngineError::FrameSize`], [`EngineError::ZeroRate`], [`EngineError::Stream`]. The caller's
    /// fault.
    pub fn new(orders: &GeneratorOrders) -> Result<Self, EngineError> {
        let (streams, template) = orders.build(&[])?;
        Ok(Self {
            template: Some(Box::new(template)),
            streams,
            offered: [0; BURST_MAX],
            turn: 0,
        })
    }

    /// What it has made of each stream.
    #[must_use]
    pub fn counters(&self) -> Vec<StreamCounters> {
        let counters = self.streams.iter().map(|stream| StreamCounters {
            id: stream.id,
            sent: stream.sent,
            sent_bytes: stream.sent_bytes,
            left: stream.left,
            first_ns: stream.first_ns,
            last_ns: stream.last_ns,
        });
        counters.collect()
    }

    #[inline]
    pub(super) fn fate(gate: Gate) -> Fate {
        Fate::To(gate ^ 1)
    }

    /// The packets that are to leave now: those of streams with a rate (`paced`), or of the others. The burst comes back with
    /// [`sent`](Self::sent).
    #[inline]
    pub(crate) fn offer(&mut self, paced: bool, now: u64) -> Option<(Box<Burst>, Picks)> {
        let mut picks = Picks::default();
        let template = self.template.as_mut()?;
        let n_streams = self.streams.len();
        for k in 0..n_streams {
            let at = (self.turn + k) % n_streams;
            let stream = &mut self.streams[at];
            if stream.rate.is_some() != paced || now < stream.blocked_until {
                continue;
            }
            for j in 0..stream.allowed(now) {
                let row = stream.first_row + j;
                stream.write(template.head_mut(row), stream.next + j as u64, now);
                self.offered[picks.len()] = u8::try_from(at).unwrap_or_default();
                picks.push(row);
            }
        }
        if picks.is_empty() {
            return None;
        }
        self.turn = (self.turn + 1) % n_streams;
        Some((self.template.take()?, picks))
    }

    /// The first `n` of the packets offered were taken.
    #[inline]
    pub(crate) fn sent(&mut self, template: Box<Burst>, offered: usize, n: usize, now: u64) {
        self.template = Some(template);
        for &at in &self.offered[..n] {
            let stream = &mut self.streams[usize::from(at)];
            stream.next += 1;
            stream.sent += 1;
            stream.sent_bytes += stream.frame_len;
            stream.first_ns.get_or_insert(now);
            stream.last_ns = now;
            stream.left = stream.left.map(|left| left.saturating_sub(1));
            if let Some(pace) = &mut stream.pace {
                pace.spend(1);
            }
        }
        if n == 0 {
            for &at in &self.offered[..offered] {
                self.streams[usize::from(at)].blocked_until = now.saturating_add(RETRY_NS);
            }
        }
    }

    /// When the next packet is due.
    pub(super) fn due(&self) -> Option<u64> {
        self.streams.iter().filter_map(Stream::due).min()
    }

    /// Takes new orders, which were checked when they were given. Gives back what they replace.
    pub(super) fn order(&mut self, orders: &GeneratorOrders) -> impl Send + 'static + use<> {
        let Ok((streams, template)) = orders.build(&self.streams) else {
            return None;
        };
        self.turn = 0;
        let streams = std::mem::replace(&mut self.streams, streams);
        Some((streams, self.template.replace(Box::new(template))))
    }
}

#[cfg(test)]
mod tests;
