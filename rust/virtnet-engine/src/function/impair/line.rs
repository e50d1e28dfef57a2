//! One direction of an impairment: a buffer that is emptied at a rate, and a long cable behind it.

use std::collections::VecDeque;

use virtnet_packet::{Burst, DropReason, Resolver};

use super::store::Store;
use super::track::{Moment, Track, whole};
use super::wheel::Wheel;
use super::{DELAY_MAX_NS, Distribution, GilbertElliott, ImpairOrders};
use crate::Histogram;
use crate::function::Fate;
use crate::function::random::Random;
use crate::stats::FunctionCounters;

/// The most memory that packets of one direction wait in, whatever is asked for, and what each costs beside its bytes.
const MEMORY_MAX: usize = 256 << 20;
const PACKET_COST: usize = 128;

/// What was asked for in one direction, and what came of it. Times are in ns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineCounters {
    /// Packets that came.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Packets that left.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Packets that were lost.
    pub lost: u64,
    /// Packets that found the buffer full.
    pub queue_full: u64,
    /// Packets that were doubled.
    pub duplicated: u64,
    /// Packets of which a bit was turned over.
    pub corrupted: u64,
    /// Packets that were sent without delay, to overtake others.
    pub hurried: u64,
    /// Packets that left behind one that had come later (RFC 4737).
    pub reordered: u64,
    /// Packets that wait.
    pub held: u64,
    /// When the first packet left, and the last.
    pub first_sent: Option<u64>,
    /// When the last packet left.
    pub last_sent: u64,
    /// Bytes of the first packet, which began before it had left.
    pub first_bytes: u64,
    /// How long packets waited for the limits of rate.
    pub queued: Histogram,
    /// The delays that were drawn.
    pub asked: Histogram,
    /// The delays that packets had behind the limits of rate.
    pub achieved: Histogram,
    /// How much later than asked packets left.
    pub late: Histogram,
}

/// The times of a packet that has left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Times {
    queued: u64,
    asked: u64,
    achieved: u64,
    late: u64,
}

impl LineCounters {
    /// Counts times that packets have in common.
    fn note(&mut self, times: Times, packets: u64) {
        self.queued.record_many(times.queued, packets);
        self.asked.record_many(times.asked, packets);
        self.achieved.record_many(times.achieved, packets);
        self.late.record_many(times.late, packets);
    }
}

#[derive(Debug)]
pub(super) struct Line {
    orders: ImpairOrders,
    /// The delay of all packets, if that is all that becomes of those that are not lost.
    only_delay: Option<u64>,
    /// When the orders were given: their values over time count from here.
    since: Option<u64>,
    chances: Chances,
    is_bad: bool,
    store: Store,
    /// What waits for the limits of rate.
    queue: VecDeque<u32>,
    queue_bytes: usize,
    bytes_done: Moment,
    packets_done: Moment,
    last_went: u64,
    /// When the first of the queue may go, if that is worked out.
    head: Option<Head>,
    /// What is on its way.
    wheel: Wheel,
    last_due: u64,
    resolver: Resolver,
    counters: LineCounters,
    /// Packets with the same times that left last: these are counted when others come.
    alike: (Times, u64),
    numbers: u64,
    latest: u64,
    /// Drops that nobody else counts, and copies.
    flushed: u64,
    copied: u64,
}

/// When the packet at the head of the queue may go, and where that leaves the limits.
#[derive(Clone, Copy, Debug)]
struct Head {
    goes: u64,
    bytes_done: Moment,
    packets_done: Moment,
}

/// Streams of random numbers, one for each use, so that changing one changes no other.
#[derive(Debug)]
struct Chances {
    loss: Random,
    burst: Random,
    duplicate: Random,
    reorder: Random,
    corrupt: Random,
    jitter: Random,
}

impl Chances {
    fn new(seed: u64, gate: u64) -> Self {
        let stream = |use_: u64| Random::new(seed, 2 * use_ + gate);
        Self {
            loss: stream(0),
            burst: stream(1),
            duplicate: stream(2),
            reorder: stream(3),
            corrupt: stream(4),
            jitter: stream(5),
        }
    }
}

impl Line {
    pub(super) fn new(orders: ImpairOrders, seed: u64, gate: u64) -> Self {
        Self {
            only_delay: orders.only_delay(),
            orders,
            since: None,
            chances: Chances::new(seed, gate),
            is_bad: false,
            store: Store::default(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            bytes_done: Moment::default(),
            packets_done: Moment::default(),
            last_went: 0,
            head: None,
            wheel: Wheel::default(),
            last_due: 0,
            resolver: Resolver::default(),
            counters: LineCounters::default(),
            alike: (Times::default(), 0),
            numbers: 0,
            latest: 0,
            flushed: 0,
            copied: 0,
        }
    }

    /// New orders. What is on its way keeps its time; what waits in the buffer leaves at the new rate.
    pub(super) fn order(&mut self, orders: ImpairOrders, now: u64) {
        self.serve(now);
        // Clocks of the limits count from the orders.
        let since = self.since.unwrap_or(now);
        let moved = |done: Moment| Moment::at((since + done.reached()).saturating_sub(now));
        self.bytes_done = moved(self.bytes_done);
        self.packets_done = moved(self.packets_done);
        self.only_delay = orders.only_delay();
        self.orders = orders;
        self.since = Some(now);
        self.head = None;
        self.serve(now);
    }

    pub(super) fn counters(&self) -> LineCounters {
        let mut counters = LineCounters {
            held: self.store.len() as u64,
            ..self.counters.clone()
        };
        let (times, packets) = self.alike;
        counters.note(times, packets);
        counters
    }

    pub(super) fn add_books(&self, books: &mut FunctionCounters) {
        books.copied += self.copied;
        books.held += self.store.len() as u64;
        let flushed = usize::try_from(self.flushed).unwrap_or(usize::MAX);
        books.drops.add(DropReason::Flushed, flushed);
    }

    pub(super) fn drop_all(&mut self) {
        self.flushed += self.store.len() as u64;
        self.store = Store::default();
        self.queue.clear();
        (self.queue_bytes, self.head) = (0, None);
        self.wheel.clear();
    }

    /// Begins anew after its books were closed.
    pub(super) fn forget(&mut self) {
        (self.flushed, self.copied) = (0, 0);
    }

    /// What becomes of packet `i`; `None`: it goes on at once.
    pub(super) fn take(&mut self, burst: &Burst, i: usize, now: u64) -> Option<Fate> {
        let elapsed = now.saturating_sub(*self.since.get_or_insert(now));
        let len = burst.frame_len(i);
        self.counters.received += 1;
        self.counters.received_bytes += len as u64;
        if self.loses(elapsed) {
            self.counters.lost += 1;
            return Some(Fate::Drop(DropReason::Lost));
        }
        if let Some(delay) = self.only_delay.filter(|_| self.queue.is_empty()) {
            return self.take_plainly(burst, i, now, delay);
        }
        let is_double = self.chances.duplicate.happens(self.orders.duplicate);
        let is_corrupt = self.chances.corrupt.happens(self.orders.corrupt);
        self.serve(now);
        if !self.has_room(len * (1 + usize::from(is_double))) {
            self.counters.queue_full += 1;
            return Some(Fate::Drop(DropReason::QueueFull));
        }
        self.numbers += 1;
        if is_corrupt {
            if self.keep_corrupt(burst, i, now).is_none() {
                return Some(Fate::Drop(DropReason::BadOffload));
            }
        } else {
            let (key, _) = self.store.keep(burst, i);
            self.enter(key, now);
        }
        if is_double {
            self.counters.duplicated += 1;
            self.copied += 1;
            let (key, _) = self.store.keep(burst, i);
            self.enter(key, now);
        }
        Some(Fate::Held)
    }

    /// The same for a packet that is delayed, or not even that.
    #[inline]
    fn take_plainly(&mut self, burst: &Burst, i: usize, now: u64, delay: u64) -> Option<Fate> {
        let len = burst.frame_len(i);
        if delay == 0 && self.store.len() == 0 {
            self.numbers += 1;
            self.latest = self.numbers;
            self.note_sent(len, Times::default(), now);
            return None;
        }
        if !self.has_memory(len) {
            self.counters.queue_full += 1;
            return Some(Fate::Drop(DropReason::QueueFull));
        }
        self.numbers += 1;
        let (key, packet) = self.store.keep(burst, i);
        (packet.number, packet.came, packet.went) = (self.numbers, now, now);
        packet.delay = delay;
        self.wheel
            .insert(key, now.saturating_add(delay), self.numbers);
        Some(Fate::Held)
    }

    fn loses(&mut self, elapsed: u64) -> bool {
        let mut is_lost = self.chances.loss.happens(self.orders.loss.at(elapsed));
        if let Some(GilbertElliott {
            to_bad,
            to_good,
            loss_bad,
            loss_good,
        }) = self.orders.burst_loss
        {
            let draws = &mut self.chances.burst;
            let change = if self.is_bad { to_good } else { to_bad };
            self.is_bad ^= draws.happens(change);
            is_lost |= draws.happens(if self.is_bad { loss_bad } else { loss_good });
        }
        is_lost
    }

    fn is_limited(&self) -> bool {
        self.orders.rate_bps.is_some() || self.orders.rate_pps.is_some()
    }

    #[inline]
    fn has_memory(&self, len: usize) -> bool {
        let memory = self.store.bytes() + self.store.len() * PACKET_COST;
        memory + len + 2 * PACKET_COST <= MEMORY_MAX
    }

    fn has_room(&self, len: usize) -> bool {
        let in_queue = !self.is_limited()
            || (self.queue.len() < self.orders.queue_packets
                && self.queue_bytes + len <= self.orders.queue_bytes);
        self.has_memory(len) && in_queue
    }

    /// Keeps a packet with one bit turned over. What its sender left to be done is done first: a checksum made afterwards would
    /// fit the wrong bytes.
    fn keep_corrupt(&mut self, burst: &Burst, i: usize, now: u64) -> Option<()> {
        let mut resolver = std::mem::take(&mut self.resolver);
        let taken = resolver.take(burst, i);
        if taken.is_ok() {
            let mut n: u64 = 0;
            while let Some(frame) = resolver.next_frame() {
                let key = self.store.keep_frame(frame);
                let frame = &mut self.store.get(key).frame;
                if n == 0 && !frame.is_empty() {
                    let bit = self.chances.corrupt.below(frame.len() * 8);
                    frame[bit / 8] ^= 1 << (bit % 8);
                }
                self.enter(key, now);
                n += 1;
            }
            self.copied += n.saturating_sub(1);
            self.counters.corrupted += 1;
        }
        self.resolver = resolver;
        taken.ok()
    }

    /// A packet that was kept enters the buffer, or the cable if nothing limits the rate.
    fn enter(&mut self, key: u32, now: u64) {
        let waits = self.is_limited() || !self.queue.is_empty();
        let packet = self.store.get(key);
        (packet.number, packet.came) = (self.numbers, now);
        if waits {
            self.queue_bytes += packet.frame.len();
            self.queue.push_back(key);
        } else {
            self.go(key, now);
        }
    }

    /// Lets go what the limits of rate allow by now.
    fn serve(&mut self, now: u64) {
        while let Some(&key) = self.queue.front() {
            let head = match self.head {
                Some(head) => head,
                None => self.head_of_queue(key),
            };
            self.head = Some(head);
            if head.goes > now {
                return;
            }
            (self.bytes_done, self.packets_done) = (head.bytes_done, head.packets_done);
            self.last_went = head.goes;
            self.head = None;
            self.queue.pop_front();
            self.queue_bytes -= self.store.get(key).frame.len();
            self.go(key, head.goes);
        }
    }

    /// When the packet at the head may go. A bucket of tokens: it goes when its last bit would have left, but as much earlier as the
    /// burst takes at this rate.
    fn head_of_queue(&mut self, key: u32) -> Head {
        let since = self.since.unwrap_or_default();
        let packet = self.store.get(key);
        let came = packet.came.saturating_sub(since);
        let bits = packet.frame.len() as f64 * 8.0;
        let mut goes = packet.came.max(self.last_went);
        let mut limit = |rate: &Option<Track>, done: Moment, amount: f64, burst: f64| {
            let Some(rate) = rate else { return done };
            let start = if done > Moment::at(came) {
                done
            } else {
                Moment::at(came)
            };
            let Some(end) = rate.done(start, amount) else {
                goes = u64::MAX;
                return start;
            };
            let early = match rate.at(start.ns) {
                rate if rate > 0.0 => whole(burst * 1e9 / rate),
                _ => 0,
            };
            let reached = since.saturating_add(end.reached());
            goes = goes.max(reached.saturating_sub(early));
            end
        };
        let orders = &self.orders;
        let bytes_done = limit(
            &orders.rate_bps,
            self.bytes_done,
            bits,
            orders.burst_bytes * 8.0,
        );
        let packets_done = limit(
            &orders.rate_pps,
            self.packets_done,
            1.0,
            orders.burst_packets,
        );
        Head {
            goes,
            bytes_done,
            packets_done,
        }
    }

    /// A packet goes on its way at `at`.
    fn go(&mut self, key: u32, at: u64) {
        let delay = self.draw_delay(at);
        let mut due = at.saturating_add(delay);
        if self.orders.keep_order {
            due = due.max(self.last_due);
            self.last_due = due;
        }
        let packet = self.store.get(key);
        (packet.went, packet.delay) = (at, delay);
        let number = packet.number;
        self.wheel.insert(key, due, number);
    }

    fn draw_delay(&mut self, at: u64) -> u64 {
        if self.chances.reorder.happens(self.orders.reorder) {
            self.counters.hurried += 1;
            return 0;
        }
        let elapsed = at.saturating_sub(self.since.unwrap_or_default());
        let jitter = self.orders.jitter_ns.at(elapsed);
        let mean = self.orders.delay_ns.at(elapsed);
        if jitter == 0.0 {
            return whole(mean);
        }
        let draws = &mut self.chances.jitter;
        let deviation = match &self.orders.distribution {
            Distribution::Uniform => 2.0 * draws.unit() - 1.0,
            Distribution::Normal => draws.normal(),
            Distribution::Pareto => draws.pareto(),
            Distribution::Table(table) => table[draws.below(table.len())],
        };
        whole((mean + jitter * deviation).min(DELAY_MAX_NS))
    }

    /// When something is to leave the buffer or the cable next.
    pub(super) fn due(&self) -> Option<u64> {
        let head = match self.head {
            Some(head) => Some(head.goes).filter(|&goes| goes != u64::MAX),
            None => self.queue.front().map(|_| 0),
        };
        [head, self.wheel.next()].into_iter().flatten().min()
    }

    /// Puts what is to leave now into `out`, as much as there is room for.
    pub(super) fn release(&mut self, out: &mut Burst, now: u64) {
        self.serve(now);
        while out.room() > 0
            && let Some((key, due)) = self.wheel.pop(now)
        {
            let packet = self.store.get(key);
            let at = out.len();
            out.push_bytes(&packet.frame, packet.offload);
            if packet.hash.report != 0 {
                out.set_hash(at, packet.hash);
            }
            let (len, number) = (packet.frame.len(), packet.number);
            let times = Times {
                queued: packet.went.saturating_sub(packet.came),
                asked: packet.delay,
                achieved: now.saturating_sub(packet.went),
                late: now.saturating_sub(due),
            };
            if number < self.latest {
                self.counters.reordered += 1;
            }
            self.latest = self.latest.max(number);
            self.store.free(key);
            self.note_sent(len, times, now);
        }
    }

    #[inline]
    fn note_sent(&mut self, len: usize, times: Times, now: u64) {
        let counters = &mut self.counters;
        if counters.first_sent.is_none() {
            (counters.first_sent, counters.first_bytes) = (Some(now), len as u64);
        }
        counters.sent += 1;
        counters.sent_bytes += len as u64;
        counters.last_sent = now;
        let (alike, packets) = &mut self.alike;
        if *alike != times {
            counters.note(*alike, *packets);
            (*alike, *packets) = (times, 0);
        }
        *packets += 1;
    }
}
