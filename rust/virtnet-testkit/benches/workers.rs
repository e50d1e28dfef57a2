//! What several workers do together: queue pairs of two guests, spread over one and over two workers, and joined by a wire.
//!
//! Each queue pair's driver runs on the worker that has its device, so that two workers need no third core: what is measured is
//! whether they hinder each other. With one queue pair a port every packet crosses from one worker to the other.
//! A line of JSON for each point. `cargo bench -p virtnet-testkit`
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use virtnet_engine::{Change, Engine, EngineOptions, Node, NodeId, Place, Poll, Wire};
use virtnet_mem::{GuestAddr, GuestMemory, UserAddr};
use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload, Picks, Port, PortCounters};
use virtnet_virtio::net::{BufferArea, DriverReceive, DriverTransmit, ReceiveQueue, TransmitQueue};
use virtnet_virtio::{DeviceQueue, DriverQueue, Features, QueueConfig, RingFormat};

const SIZE: u16 = 256;
const WINDOW: Duration = Duration::from_millis(300);
const RUNS: usize = 5;

/// The queue pairs of a port that one worker has, with their drivers, who send without end and receive everything.
#[derive(Debug)]
struct Lane {
    pairs: Vec<Pair>,
    turn: usize,
    counters: PortCounters,
}

#[derive(Debug)]
struct Pair {
    memory: Arc<GuestMemory>,
    drain: TransmitQueue,
    fill: ReceiveQueue,
    send: DriverTransmit,
    receive: DriverReceive,
    frames: Burst,
    arrived: Burst,
    guest: PortCounters,
}

impl Pair {
    fn new() -> Self {
        let features = Features::VERSION_1 | Features::MRG_RXBUF | Features::IN_ORDER;
        let memory = GuestMemory::anonymous(2 << 20, GuestAddr(0x10_0000)).unwrap();
        let config = |offset: u64| QueueConfig {
            size: SIZE,
            desc_area: UserAddr(0x10_0000 + offset),
            driver_area: UserAddr(0x10_4000 + offset),
            device_area: UserAddr(0x10_8000 + offset),
            base: RingFormat::of(features).fresh_base(),
            features,
        };
        let area = |offset: u64| BufferArea {
            start: GuestAddr(0x12_0000 + offset),
            count: SIZE,
        };
        let device = |offset| DeviceQueue::new(&config(offset), &memory).unwrap();
        let driver = |offset| DriverQueue::new(&config(offset), &memory).unwrap();
        let shared = || Arc::clone(&memory);
        let mut receive = DriverReceive::new(driver(0), shared(), area(0), features).unwrap();
        receive.publish();
        let send = DriverTransmit::new(driver(0x1_0000), shared(), area(0xa_0000), features);
        let mut frames = Burst::new();
        for _ in 0..BURST_MAX {
            frames.push_bytes(&[2; 64], Offload::default());
        }
        Self {
            drain: TransmitQueue::new(device(0x1_0000), features),
            fill: ReceiveQueue::new(device(0), features),
            send: send.unwrap(),
            receive,
            frames,
            arrived: Burst::new(),
            guest: PortCounters::default(),
            memory,
        }
    }

    /// What the guest does in between: it sends, and takes what has come.
    fn play_guest(&mut self) {
        let all = Picks::first(BURST_MAX);
        self.send.send(&self.frames, &all, &mut self.guest).unwrap();
        self.send.publish();
        self.receive
            .receive(&mut self.arrived, &mut self.guest)
            .unwrap();
        self.receive.complete();
        self.arrived.clear();
    }
}

impl Port for Lane {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        self.turn = (self.turn + 1) % self.pairs.len();
        let pair = &mut self.pairs[self.turn];
        pair.play_guest();
        pair.drain
            .drain(&pair.memory, burst, &mut self.counters)
            .unwrap();
        burst.len()
    }

    fn complete(&mut self) {
        self.pairs[self.turn].drain.complete();
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let pair = &mut self.pairs[self.turn];
        let sent = pair
            .fill
            .fill(&pair.memory, burst, picks, &mut self.counters);
        sent.unwrap()
    }

    fn flush(&mut self) {
        self.pairs[self.turn].fill.publish();
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

/// A port of `pairs` queue pairs, in a part for each of up to `workers` workers.
fn port(pairs: usize, workers: usize) -> Node {
    let lanes = pairs.min(workers);
    let lane = |k: usize| -> Box<dyn Port> {
        let own = (k..pairs).step_by(lanes).map(|_| Pair::new()).collect();
        Box::new(Lane {
            pairs: own,
            turn: 0,
            counters: PortCounters::default(),
        })
    };
    Node::Lanes((0..lanes).map(lane).collect())
}

/// Packets that a wire between two such ports forwards, in Mpps: the median of some runs.
fn rate(pairs: usize, workers: usize) -> f64 {
    let mut rates: Vec<f64> = (0..RUNS)
        .map(|_| {
            let engine = Engine::new(EngineOptions {
                cpus: (0..workers).collect(),
                poll: Poll::Busy,
                ..EngineOptions::default()
            });
            let engine = engine.unwrap();
            let change = Change::new()
                .add(NodeId(0), Wire::new())
                .add(NodeId(1), port(pairs, workers))
                .add(NodeId(2), port(pairs, workers))
                .connect(NodeId(1), Place::new(NodeId(0), 0))
                .connect(NodeId(2), Place::new(NodeId(0), 1));
            engine.apply(change).unwrap();
            thread::sleep(WINDOW / 5);
            let before = engine.snapshot().unwrap();
            thread::sleep(WINDOW);
            let after = engine.snapshot().unwrap();
            assert!(after.balance.is_exact());
            let passed = after.balance.sent - before.balance.sent;
            #[expect(clippy::cast_precision_loss, reason = "a figure to print")]
            let rate = passed as f64 * 1e3 / (after.at_ns - before.at_ns) as f64;
            rate
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[RUNS / 2]
}

fn main() {
    for workers in [1, 2] {
        for pairs in [1, 2, 4, 8] {
            let series = match workers {
                1 => "one worker",
                _ => "two workers",
            };
            let y = rate(pairs, workers);
            println!(
                "{{\"curve\": \"pairs\", \"series\": \"{series}\", \"x\": {pairs}, \"y\": {y:.2}}}"
            );
        }
    }
}
