//! One suite for every pair of connected ports: what one sends the other receives, and everything is counted.

use std::time::{Duration, Instant};

use virtnet_packet::{BURST_MAX, Burst, DropReason, HEAD_MAX, Offload, Picks, Port};
use virtnet_sys::{Events, Poller, thread_cpu_time};

use crate::frame;

/// How long a packet may take from port to port.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many packets a port may hold before the suite stops looking for its end.
const PLENTY: usize = 20_000;

/// What a pair of ports can do less than everything.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The longest frame that passes.
    pub max_len: usize,
    /// The shortest frame that passes as it is.
    pub min_len: usize,
    /// Whether packets pass from the second port to the first as well.
    pub duplex: bool,
    /// Whether a full port says so. Where the packets cross a network, it is that which loses them.
    pub back_pressure: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_len: 65_535,
            min_len: 14,
            duplex: true,
            back_pressure: true,
        }
    }
}

/// Holds two connected ports to the promises of [`Port`], in both directions.
///
/// Nothing else may send to them meanwhile. They are left attached and empty.
///
/// # Panics
/// When a promise is broken: the message says which.
#[track_caller]
pub fn check_port(a: &mut dyn Port, b: &mut dyn Port) {
    check_port_with(a, b, Limits::default());
}

/// [`check_port`] for ports that cannot do everything.
///
/// # Panics
/// As [`check_port`].
#[track_caller]
pub fn check_port_with(a: &mut dyn Port, b: &mut dyn Port, limits: Limits) {
    a.attach();
    b.attach();
    check_one_way(a, b, limits);
    if limits.duplex {
        check_one_way(b, a, limits);
    }
}

fn check_one_way(from: &mut dyn Port, to: &mut dyn Port, limits: Limits) {
    empty_rx_is_cheap(to);
    lengths_and_bytes_are_kept(from, to, limits);
    order_follows_the_picks(from, to, limits);
    a_burst_of_every_size_passes(from, to, limits);
    if limits.back_pressure {
        a_full_port_takes_part_and_loses_nothing(from, to, limits);
    }
    arrival_wakes_whoever_waits(from, to, limits);
    drops_of_the_caller_are_counted(from);
}

fn empty_rx_is_cheap(to: &mut dyn Port) {
    const CALLS: u32 = 1_000;
    let mut burst = Burst::new();
    let start = thread_cpu_time();
    for _ in 0..CALLS {
        to.sync();
        assert_eq!(to.rx(&mut burst), 0, "an empty port received something");
        to.complete();
    }
    let each = (thread_cpu_time() - start) / CALLS;
    assert!(
        each < Duration::from_micros(50),
        "an empty rx takes {each:?}"
    );
    assert!(burst.is_empty());
}

fn lengths_and_bytes_are_kept(from: &mut dyn Port, to: &mut dyn Port, limits: Limits) {
    let around = |len: usize| len.saturating_sub(1)..=len + 1;
    let interesting = [
        14, 60, 64, 128, HEAD_MAX, 256, 1514, 2048, 4096, 9014, 65_535,
    ];
    let lengths: Vec<_> = interesting
        .into_iter()
        .flat_map(around)
        .filter(|len| (limits.min_len..=limits.max_len).contains(len))
        .collect();
    assert!(!lengths.is_empty(), "no length is allowed: {limits:?}");
    let frames: Vec<_> = lengths
        .iter()
        .enumerate()
        .map(|(seed, &len)| frame::pattern(len, seed))
        .collect();
    for some in frames.chunks(8) {
        pass(from, to, some);
    }
}

fn order_follows_the_picks(from: &mut dyn Port, to: &mut dyn Port, limits: Limits) {
    let frames = numbered(limits, 0..10);
    let burst = burst_of(&frames);
    let mut picks = Picks::default();
    let order = [7, 2, 3, 9, 0];
    order.iter().for_each(|&i| picks.push(i));
    assert_eq!(from.tx(&burst, &picks), 5, "an empty port took only a part");
    from.flush();
    let expected: Vec<_> = order.iter().map(|&i| frames[i].clone()).collect();
    expect(from, to, &expected);
}

fn a_burst_of_every_size_passes(from: &mut dyn Port, to: &mut dyn Port, limits: Limits) {
    for n in [1, 2, 3, 31, 32, 33, BURST_MAX - 1, BURST_MAX] {
        pass(from, to, &numbered(limits, 0..n));
    }
}

fn a_full_port_takes_part_and_loses_nothing(
    from: &mut dyn Port,
    to: &mut dyn Port,
    limits: Limits,
) {
    let drops_before = from.counters().tx_drops.total();
    let mut sent = Vec::new();
    while sent.len() < PLENTY {
        let frames = numbered(limits, sent.len()..sent.len() + BURST_MAX);
        let taken = from.tx(&burst_of(&frames), &Picks::first(BURST_MAX));
        from.flush();
        assert!(taken <= BURST_MAX, "{taken} of {BURST_MAX} were taken");
        sent.extend(frames.into_iter().take(taken));
        if taken < BURST_MAX {
            break;
        }
    }
    // What was accepted and dropped would be missing below: a port that is full has to say so instead.
    let dropped = from.counters().tx_drops.total() - drops_before;
    assert_eq!(dropped, 0, "a full port accepted packets and dropped them");
    expect(from, to, &sent);
    // It has room again.
    pass(from, to, &numbered(limits, 0..1));
}

fn arrival_wakes_whoever_waits(from: &mut dyn Port, to: &mut dyn Port, limits: Limits) {
    if to.wait_fd().is_none() {
        assert!(!to.arm(), "an empty port says that packets wait");
        to.disarm();
        return;
    }
    let poller = Poller::new().expect("a poller");
    if let Some(fd) = to.wait_fd() {
        poller.add(fd, 0).expect("wait_fd can be waited for");
    }
    let mut events = Events::with_capacity(1);
    for round in 0..3 {
        let start = Instant::now();
        // A port may have something to take over first, but not for ever.
        while to.arm() {
            to.sync();
            assert_eq!(
                to.rx(&mut Burst::new()),
                0,
                "an empty port received something"
            );
            assert!(start.elapsed() < PATIENCE, "an empty port cannot be armed");
        }
        let frames = numbered(limits, round..round + 1);
        assert_eq!(from.tx(&burst_of(&frames), &Picks::first(1)), 1);
        from.flush();
        let woken = poller.wait(&mut events, Some(PATIENCE));
        assert_eq!(woken.ok(), Some(1), "nobody was woken for a packet");
        assert!(to.arm(), "a packet waits and arming does not say so");
        to.disarm();
        expect(from, to, &frames);
    }
}

fn drops_of_the_caller_are_counted(from: &mut dyn Port) {
    let before = from.counters();
    from.drop_tx(DropReason::NoRoom, 3);
    let after = from.counters();
    assert_eq!(
        after.tx_drops.of(DropReason::NoRoom) - before.tx_drops.of(DropReason::NoRoom),
        3,
        "drop_tx is not counted"
    );
    assert_eq!(
        after.sent, before.sent,
        "a dropped packet was counted as sent"
    );
}

/// Sends frames and expects them at the other end, with exact counters on both sides.
fn pass(from: &mut dyn Port, to: &mut dyn Port, frames: &[Vec<u8>]) {
    let (sent_before, received_before) = (from.counters(), to.counters());
    assert_eq!(
        send(from, frames),
        frames.len(),
        "an empty port took only a part"
    );
    expect(from, to, frames);
    let (sent, received) = (from.counters(), to.counters());
    let (n, bytes) = (frames.len() as u64, total_bytes(frames));
    assert_eq!(sent.sent - sent_before.sent, n, "sent");
    assert_eq!(
        sent.sent_bytes - sent_before.sent_bytes,
        bytes,
        "sent_bytes"
    );
    assert_eq!(sent.tx_drops, sent_before.tx_drops, "tx_drops");
    assert_eq!(received.received - received_before.received, n, "received");
    assert_eq!(
        received.received_bytes - received_before.received_bytes,
        bytes,
        "received_bytes"
    );
    assert_eq!(received.rx_drops, received_before.rx_drops, "rx_drops");
}

/// Expects exactly these frames, in this order, and nothing after them.
fn expect(from: &mut dyn Port, to: &mut dyn Port, frames: &[Vec<u8>]) {
    let received = receive(from, to, frames.len());
    for (i, (found, expected)) in received.iter().zip(frames).enumerate() {
        assert_eq!(found.len(), expected.len(), "length of packet {i}");
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(differs, None, "packet {i} differs from that byte on");
    }
    assert_eq!(received.len(), frames.len(), "packets are missing");
    let mut burst = Burst::new();
    assert_eq!(to.rx(&mut burst), 0, "more packets arrived than were sent");
    to.complete();
}

/// Sends frames in one burst (at most [`BURST_MAX`]); how many were taken.
///
/// # Panics
/// When there are more.
pub fn send(port: &mut dyn Port, frames: &[Vec<u8>]) -> usize {
    port.sync();
    let taken = port.tx(&burst_of(frames), &Picks::first(frames.len()));
    port.flush();
    taken
}

/// Receives `n` frames at `to`, or fewer when they do not come; `from` is where they come from and is kept going.
///
/// # Panics
/// When the port's answer and its burst differ.
pub fn receive(from: &mut dyn Port, to: &mut dyn Port, n: usize) -> Vec<Vec<u8>> {
    let mut burst = Burst::new();
    let mut frames = Vec::with_capacity(n);
    let mut since = Instant::now();
    while frames.len() < n && since.elapsed() < PATIENCE {
        from.sync();
        from.flush();
        to.sync();
        burst.clear();
        let received = to.rx(&mut burst);
        assert_eq!(received, burst.len(), "rx does not say what it did");
        for i in 0..received {
            let mut bytes = vec![0; burst.frame_len(i)];
            assert_eq!(
                burst.copy_frame(i, &mut bytes),
                bytes.len(),
                "a short frame"
            );
            frames.push(bytes);
        }
        to.complete();
        to.flush();
        if received > 0 {
            since = Instant::now();
        } else {
            std::thread::yield_now();
        }
    }
    frames
}

fn numbered(limits: Limits, numbers: std::ops::Range<usize>) -> Vec<Vec<u8>> {
    let len = |i: usize| (64 + i % 7 * 30).clamp(limits.min_len, limits.max_len);
    numbers.map(|i| frame::pattern(len(i), i)).collect()
}

fn burst_of(frames: &[Vec<u8>]) -> Burst {
    let mut burst = Burst::new();
    for frame in frames {
        burst.push_bytes(frame, Offload::default());
    }
    burst
}

fn total_bytes(frames: &[Vec<u8>]) -> u64 {
    frames.iter().map(|frame| frame.len() as u64).sum()
}
