//! A source: packets prepared once, sent again and again in turn.

use std::net::Ipv4Addr;

use virtnet_packet::header::Mac;
use virtnet_packet::{BURST_MAX, Burst, Offload, Picks};

use super::frame::{self, Udp};
use super::pace::Pace;
use crate::EngineError;

/// How long a source waits before it tries again, in ns, when its receiver had room for nothing.
pub(super) const RETRY_NS: u64 = 250_000;

/// What a source makes.
#[derive(Clone, Copy, Debug)]
pub struct SourceOptions {
    /// Bytes of each frame, Ethernet header included, without a frame check sequence.
    pub frame_len: usize,
    /// Where the frames say they are from.
    pub source: Mac,
    /// Where they go.
    pub destination: Mac,
    /// How fast and how many.
    pub orders: SourceOrders,
}

impl Default for SourceOptions {
    /// Frames of 60 bytes, as fast and as many as the receiver takes, between two locally administered addresses.
    fn default() -> Self {
        Self {
            frame_len: Source::FRAME_LEN_MIN,
            source: Mac([0x02, 0, 0, 0, 0, 1]),
            destination: Mac([0x02, 0, 0, 0, 0, 2]),
            orders: SourceOrders::default(),
        }
    }
}

/// How fast and how many, from the moment it is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceOrders {
    /// Packets per second; `None`: as fast as the receiver takes them.
    pub rate: Option<u64>,
    /// Packets in all; `None`: without end; 0: pause.
    pub count: Option<u64>,
}

impl SourceOrders {
    pub(super) fn check(&self) -> Result<(), EngineError> {
        if self.rate == Some(0) {
            return Err(EngineError::ZeroRate);
        }
        Ok(())
    }
}

/// Makes packets: the same few in turn, unless told otherwise one of UDP over IPv4 between the addresses for benchmarks (RFC 2544).
///
/// It makes what the receiver takes and no more; a receiver without room costs nothing and is tried again.
#[derive(Debug)]
pub struct Source {
    /// The packets. Each is picked as often as it is to be sent.
    template: Option<Box<Burst>>,
    frames: usize,
    /// Which of them comes next.
    turn: usize,
    /// What was offered last, and the turn it began with.
    picks: Picks,
    picked_from: usize,
    frame_len: usize,
    orders: SourceOrders,
    pace: Option<Pace>,
    left: u64,
    /// Nothing was taken; when to try again.
    blocked_until: Option<u64>,
}

impl Source {
    /// The smallest frame: what Ethernet allows, without its check sequence.
    pub const FRAME_LEN_MIN: usize = 60;
    /// The largest frame: what a virtio-net header can describe.
    pub const FRAME_LEN_MAX: usize = 65_535;

    /// A source that starts when it is added to a network.
    ///
    /// # Errors
    /// [`EngineError::FrameSize`], [`EngineError::ZeroRate`]. The caller's fault.
    pub fn new(options: SourceOptions) -> Result<Self, EngineError> {
        let frame = frame::udp(&Udp {
            source: options.source,
            destination: options.destination,
            source_ip: Ipv4Addr::new(198, 18, 0, 1),
            destination_ip: Ipv4Addr::new(198, 19, 0, 1),
            frame_len: options.frame_len,
        });
        Self::of_frame(&frame, options.orders)
    }

    /// A source of copies of one frame.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_frame(frame: &[u8], orders: SourceOrders) -> Result<Self, EngineError> {
        Self::of_packets([(frame, Offload::default())], orders)
    }

    /// A source of copies of several packets, in turn: at most [`BURST_MAX`] of them.
    ///
    /// # Errors
    /// As [`Self::new`]; [`EngineError::FrameCount`].
    pub fn of_packets<'a>(
        packets: impl IntoIterator<Item = (&'a [u8], Offload)>,
        orders: SourceOrders,
    ) -> Result<Self, EngineError> {
        let (min, max) = (Self::FRAME_LEN_MIN, Self::FRAME_LEN_MAX);
        orders.check()?;
        let mut template = Burst::new();
        let (mut count, mut longest) = (0, 0);
        for (frame, offload) in packets {
            if !(min..=max).contains(&frame.len()) {
                let size = frame.len();
                return Err(EngineError::FrameSize { size, min, max });
            }
            count += 1;
            longest = longest.max(frame.len());
            if template.room() > 0 {
                template.push_bytes(frame, offload);
            }
        }
        if !(1..=BURST_MAX).contains(&count) {
            return Err(EngineError::FrameCount { count });
        }
        template.keep_packets();
        Ok(Self {
            template: Some(Box::new(template)),
            frames: count,
            turn: 0,
            picks: Picks::default(),
            picked_from: 0,
            frame_len: longest,
            orders,
            pace: None,
            left: orders.count.unwrap_or(u64::MAX),
            blocked_until: None,
        })
    }

    /// Bytes of each frame it makes; of the longest, where they differ.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        self.frame_len
    }

    /// The packets that are to leave now, if any. The burst comes back with [`sent`](Self::sent).
    #[inline]
    pub(crate) fn offer(&mut self, now: u64) -> Option<(Box<Burst>, Picks)> {
        let n = self.allowed(now);
        if n == 0 {
            return None;
        }
        if self.picks.len() != n || self.picked_from != self.turn {
            self.picks.clear();
            (0..n).for_each(|k| self.picks.push((self.turn + k) % self.frames));
            self.picked_from = self.turn;
        }
        Some((self.template.take()?, self.picks))
    }

    /// `n` of the packets offered were taken.
    #[inline]
    pub(crate) fn sent(&mut self, template: Box<Burst>, n: usize, now: u64) {
        self.template = Some(template);
        self.turn = (self.turn + n) % self.frames;
        self.blocked_until = (n == 0).then(|| now.saturating_add(RETRY_NS));
        if self.left != u64::MAX {
            self.left = self.left.saturating_sub(n as u64);
        }
        if let Some(pace) = &mut self.pace {
            pace.spend(n);
        }
    }

    #[inline]
    fn allowed(&mut self, now: u64) -> usize {
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        let n = left.min(BURST_MAX);
        match self.orders.rate {
            Some(rate) if n > 0 => {
                let pace = self.pace.get_or_insert_with(|| Pace::new(rate, now));
                n.min(pace.allowed(now))
            }
            _ => n,
        }
    }

    /// When the next packet is due.
    pub(super) fn due(&self) -> Option<u64> {
        if self.left == 0 {
            return None;
        }
        let paced = self.pace.map_or(0, |pace| pace.due());
        Some(paced.max(self.blocked_until.unwrap_or(0)))
    }

    /// Takes new orders.
    pub(super) fn order(&mut self, orders: SourceOrders, now: u64) {
        self.orders = orders;
        self.left = orders.count.unwrap_or(u64::MAX);
        self.pace = orders.rate.map(|rate| Pace::new(rate, now));
        self.blocked_until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(source: &mut Source, now: u64, taken: usize) -> usize {
        let Some((burst, picks)) = source.offer(now) else {
            return 0;
        };
        let n = picks.len().min(taken);
        source.sent(burst, n, now);
        n
    }

    #[test]
    fn sizes_beyond_what_ethernet_and_virtio_allow_are_refused() {
        for frame_len in [0, 59, 65_536] {
            let options = SourceOptions {
                frame_len,
                ..SourceOptions::default()
            };
            let error = Source::new(options).unwrap_err();
            assert!(error.to_string().contains("60 to 65535"), "{error}");
        }
        for frame_len in [60, 1_518, 65_535] {
            let options = SourceOptions {
                frame_len,
                ..SourceOptions::default()
            };
            let mut source = Source::new(options).unwrap();
            let (burst, picks) = source.offer(0).unwrap();
            assert_eq!(burst.frame_len(picks.get(63)), frame_len);
        }
    }

    #[test]
    fn a_count_is_kept_to_the_packet_and_only_what_is_taken_counts() {
        let mut source = Source::new(SourceOptions {
            orders: SourceOrders {
                count: Some(100),
                rate: None,
            },
            ..SourceOptions::default()
        })
        .unwrap();
        assert_eq!(run(&mut source, 0, 64), 64);
        assert_eq!(run(&mut source, 0, 0), 0);
        assert_eq!(source.due(), Some(RETRY_NS));
        assert_eq!(run(&mut source, 0, 30), 30);
        assert_eq!(run(&mut source, 0, 64), 6);
        assert_eq!(run(&mut source, 0, 64), 0);
        assert_eq!(source.due(), None);
    }

    #[test]
    fn frames_take_turns_whatever_is_taken() {
        let frames: Vec<Vec<u8>> = (0..3_u8).map(|k| vec![k; 60 + usize::from(k)]).collect();
        let orders = SourceOrders::default();
        let plain = |frame| (frame, Offload::default());
        let packets = frames.iter().map(Vec::as_slice).map(plain);
        let mut source = Source::of_packets(packets, orders).unwrap();
        assert_eq!(source.frame_len(), 62);
        let mut expected = 0;
        for taken in [64, 1, 0, 7, 30, 64] {
            let (burst, picks) = source.offer(0).unwrap();
            for (k, i) in picks.iter().enumerate() {
                assert_eq!(usize::from(burst.head(i)[0]), (expected + k) % 3);
            }
            source.sent(burst, taken, 0);
            expected += taken;
        }
        let many = std::iter::repeat_n(plain(&[0; 60][..]), 65);
        let refused = Source::of_packets(many, orders).unwrap_err();
        assert!(refused.to_string().contains("1 to 64"), "{refused}");
        Source::of_packets([], orders).unwrap_err();
    }

    #[test]
    fn a_rate_bounds_the_sleep_until_the_next_packet() {
        let mut source = Source::new(SourceOptions {
            orders: SourceOrders {
                count: None,
                rate: Some(1_000),
            },
            ..SourceOptions::default()
        })
        .unwrap();
        assert_eq!(run(&mut source, 77, 64), 1);
        assert_eq!(source.due(), Some(77 + 1_000_000));
        assert_eq!(run(&mut source, 77 + 999_999, 64), 0);
        assert_eq!(run(&mut source, 77 + 1_000_000, 64), 1);
    }

    #[test]
    fn new_orders_count_from_the_moment_they_are_given() {
        let mut source = Source::new(SourceOptions::default()).unwrap();
        assert_eq!(run(&mut source, 0, 64), 64);
        let pause = SourceOrders {
            count: Some(0),
            rate: None,
        };
        source.order(pause, 5);
        assert_eq!(run(&mut source, 5, 64), 0);
        assert_eq!(source.due(), None);
        let three = SourceOrders {
            count: Some(3),
            rate: Some(1),
        };
        source.order(three, 10);
        assert_eq!(run(&mut source, 10, 64), 1);
        assert_eq!(source.due(), Some(1_000_000_010));
    }
}
