//! An impairment: a cable with the faults of a long one. It loses, doubles, garbles, delays and reorders packets, and carries so
//! many in a second, as it is told.
//!
//! Packets that wait are copied into buffers of the function, so no guest's buffer waits with them. When each leaves is worked out
//! from the worker's clock and kept in a timing wheel; nothing sleeps. What was asked for and what came of it are both counted.

mod line;
mod store;
mod track;
mod wheel;

pub use line::LineCounters;
pub use track::Track;

use std::sync::Arc;

use virtnet_packet::{Burst, Picks};

use self::line::Line;
use super::{Fate, Fates, Verdict};
use crate::EngineError;
use crate::graph::Gate;
use crate::stats::FunctionCounters;

/// The longest delay: an hour.
const DELAY_MAX_NS: f64 = 3.6e12;

/// What a cable does to the packets of one direction.
#[derive(Clone, Debug)]
pub struct ImpairOrders {
    /// How long a packet is on its way, in ns.
    pub delay_ns: Track,
    /// How much that varies, in ns: see [`Distribution`].
    pub jitter_ns: Track,
    /// How it varies.
    pub distribution: Distribution,
    /// Delays that would let a packet overtake another are made longer.
    pub keep_order: bool,
    /// Probability that a packet is lost.
    pub loss: Track,
    /// Losses that come together, beside the others.
    pub burst_loss: Option<GilbertElliott>,
    /// Probability that a packet comes twice, each with a delay of its own.
    pub duplicate: f64,
    /// Probability that a packet is not delayed, and so overtakes others.
    pub reorder: f64,
    /// Probability that a bit of a packet is turned over.
    pub corrupt: f64,
    /// Bits of frames per second, without preamble and check sequence; `None`: no limit.
    pub rate_bps: Option<Track>,
    /// Packets per second; `None`: no limit.
    pub rate_pps: Option<Track>,
    /// Bytes that may leave at once after a pause; 0: a packet leaves when its last bit would have.
    pub burst_bytes: f64,
    /// The same in packets, for a limit of packets.
    pub burst_packets: f64,
    /// Packets that may wait for the limits of rate; what comes then is dropped.
    pub queue_packets: usize,
    /// Bytes of them.
    pub queue_bytes: usize,
}

impl Default for ImpairOrders {
    /// A good cable.
    fn default() -> Self {
        Self {
            delay_ns: Track::constant(0.0),
            jitter_ns: Track::constant(0.0),
            distribution: Distribution::Uniform,
            keep_order: false,
            loss: Track::constant(0.0),
            burst_loss: None,
            duplicate: 0.0,
            reorder: 0.0,
            corrupt: 0.0,
            rate_bps: None,
            rate_pps: None,
            burst_bytes: 0.0,
            burst_packets: 0.0,
            queue_packets: 1_000,
            queue_bytes: usize::MAX,
        }
    }
}

impl ImpairOrders {
    /// The delay, if packets that are not lost are only delayed, all alike and always.
    fn only_delay(&self) -> Option<u64> {
        let [delay] = *self.delay_ns.values() else {
            return None;
        };
        let others = self.duplicate + self.reorder + self.corrupt;
        let is_limited = self.rate_bps.is_some() || self.rate_pps.is_some();
        let is_only = others == 0.0 && !is_limited && !self.keep_order && self.jitter_ns.is_zero();
        is_only.then(|| track::whole(delay))
    }

    pub(super) fn check(&self) -> Result<(), EngineError> {
        let chances = [self.duplicate, self.reorder, self.corrupt];
        let burst = self.burst_loss.map_or([0.0; 4], |model| model.chances());
        let mut chances = chances.iter().chain(&burst).chain(self.loss.values());
        let times = self.delay_ns.values().iter().chain(self.jitter_ns.values());
        let rates = [&self.rate_bps, &self.rate_pps].into_iter().flatten();
        let mut amounts = rates.flat_map(|rate| rate.values());
        let bursts = [self.burst_bytes, self.burst_packets];
        let wrong = if !chances.all(|chance| (0.0..=1.0).contains(chance)) {
            "a probability is a number from 0 to 1"
        } else if !times
            .into_iter()
            .all(|time| (0.0..=DELAY_MAX_NS).contains(time))
        {
            "a delay is 0 to 3600 seconds"
        } else if !amounts.all(|rate| rate.is_finite() && *rate >= 0.0) {
            "a rate is a number from 0"
        } else if !bursts
            .iter()
            .all(|burst| burst.is_finite() && *burst >= 0.0)
        {
            "a burst is a number from 0"
        } else if !self.distribution.is_sound() {
            "a distribution's table has at least one number, and all are finite"
        } else {
            return Ok(());
        };
        Err(EngineError::Impairment { wrong })
    }
}

/// How delays vary around their mean.
#[derive(Clone, Debug, PartialEq)]
pub enum Distribution {
    /// Evenly, by up to the jitter either way.
    Uniform,
    /// Normally; the jitter is the standard deviation.
    Normal,
    /// With a long tail: Pareto's distribution of shape 3; the jitter is the standard deviation.
    Pareto,
    /// As these numbers do, times the jitter.
    Table(Arc<[f64]>),
}

impl Distribution {
    fn is_sound(&self) -> bool {
        match self {
            Self::Table(table) => !table.is_empty() && table.iter().all(|x| x.is_finite()),
            _ => true,
        }
    }
}

/// Losses that come together (E. N. Gilbert, E. O. Elliott): a cable is good or bad, and changes with every packet or does not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GilbertElliott {
    /// Probability that a good cable becomes bad.
    pub to_bad: f64,
    /// Probability that a bad cable becomes good.
    pub to_good: f64,
    /// Probability that a bad cable loses a packet.
    pub loss_bad: f64,
    /// Probability that a good cable does.
    pub loss_good: f64,
}

impl GilbertElliott {
    fn chances(self) -> [f64; 4] {
        [self.to_bad, self.to_good, self.loss_bad, self.loss_good]
    }
}

/// A cable between gate 0 and gate 1 with faults in one direction or both.
#[derive(Debug)]
pub struct Impairment {
    /// For what came in by gate 0 and by gate 1; a direction without one is a good cable.
    lines: [Option<Box<Line>>; 2],
    /// What is about to leave. Taken out while it does.
    out: Option<Box<Burst>>,
}

impl Impairment {
    /// A cable with the faults of `orders` for what comes in by those gates. Two of the same `seed` do the same to the same packets.
    ///
    /// # Errors
    /// [`EngineError::Impairment`]. The caller's fault.
    pub fn new(orders: &ImpairOrders, gates: [bool; 2], seed: u64) -> Result<Self, EngineError> {
        orders.check()?;
        let line = |gate: u64, is_faulty: bool| {
            is_faulty.then(|| Box::new(Line::new(orders.clone(), seed, gate)))
        };
        Ok(Self {
            lines: [line(0, gates[0]), line(1, gates[1])],
            out: Some(Box::default()),
        })
    }

    /// What was asked for and what came of it, by the gate that packets came in by.
    #[must_use]
    pub fn counters(&self) -> [Option<LineCounters>; 2] {
        [0, 1].map(|gate: usize| self.lines[gate].as_ref().map(|line| line.counters()))
    }

    pub(super) fn order(&mut self, orders: &ImpairOrders, now: u64) {
        for line in self.lines.iter_mut().flatten() {
            line.order(orders.clone(), now);
        }
    }

    pub(super) fn classify(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        gate: Gate,
        now: u64,
        fates: &mut Fates,
    ) -> Verdict {
        let past = Fate::To(gate ^ 1);
        let Some(Some(line)) = self.lines.get_mut(usize::from(gate)) else {
            return Verdict::All(past);
        };
        for (fate, i) in fates.iter_mut().zip(picks.iter()) {
            *fate = line.take(burst, i, now).unwrap_or(past);
        }
        Verdict::of(&fates[..picks.len()])
    }

    /// Whether something is to leave by now.
    #[inline]
    pub(crate) fn is_due(&self, now: u64) -> bool {
        self.due().is_some_and(|due| due <= now)
    }

    /// When something is to leave next.
    #[inline]
    pub(super) fn due(&self) -> Option<u64> {
        self.lines
            .iter()
            .flatten()
            .filter_map(|line| line.due())
            .min()
    }

    /// What came in by `gate` and is to leave now, up to a burst. It comes back with [`left`](Self::left).
    pub(crate) fn release(&mut self, gate: Gate, now: u64) -> Option<Box<Burst>> {
        let line = self.lines.get_mut(usize::from(gate))?.as_mut()?;
        let mut out = self.out.take()?;
        out.clear();
        line.release(&mut out, now);
        if out.is_empty() {
            self.out = Some(out);
            return None;
        }
        Some(out)
    }

    /// The burst has left.
    pub(crate) fn left(&mut self, out: Box<Burst>) {
        self.out = Some(out);
    }

    /// What it counts in the books beyond what is counted of every function: copies, and what waits.
    pub(crate) fn books(&self) -> FunctionCounters {
        let mut books = FunctionCounters::default();
        for line in self.lines.iter().flatten() {
            line.add_books(&mut books);
        }
        books
    }

    /// Drops what waits; the last books. It begins anew if it is used again.
    pub(crate) fn close(&mut self) -> FunctionCounters {
        self.lines
            .iter_mut()
            .flatten()
            .for_each(|line| line.drop_all());
        let books = self.books();
        self.lines
            .iter_mut()
            .flatten()
            .for_each(|line| line.forget());
        books
    }
}

#[cfg(test)]
mod tests;
