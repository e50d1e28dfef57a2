//! What a packet costs in the rings, without a peer on another core: one thread plays driver and device in turn.
//!
//! `cargo bench -p virtnet-virtio` prints nanoseconds a packet; under `valgrind --tool=callgrind` the same loops give
//! instruction counts that do not depend on the machine's mood.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr};
use virtnet_packet::{Burst, Offload, Picks, PortCounters};
use virtnet_virtio::inflight::region_bytes;
use virtnet_virtio::net::{BufferArea, DriverReceive, DriverTransmit, ReceiveQueue, TransmitQueue};
use virtnet_virtio::{DeviceQueue, DriverQueue, Features, QueueConfig, RingFormat};

const SIZE: u16 = 256;
const BURST: usize = 32;

/// What a case has beside its ring.
#[derive(Clone, Copy, PartialEq)]
enum Extra {
    None,
    /// The device records what is in flight.
    Recorded,
    /// The driver sends the same packets again and again, as a source does: they stand in its buffers.
    Standing,
}

/// One queue in memory of its own: rings in the first 64 KiB, buffers behind.
fn queue(features: Features) -> (Arc<GuestMemory>, QueueConfig, BufferArea) {
    let memory = GuestMemory::anonymous(1 << 20, GuestAddr(0x10_0000)).unwrap();
    let at = |offset: u64| UserAddr(0x10_0000 + offset);
    let config = QueueConfig {
        size: SIZE,
        desc_area: at(0),
        driver_area: at(0x4000),
        device_area: at(0x8000),
        base: RingFormat::of(features).fresh_base(),
        features,
    };
    let area = BufferArea {
        start: GuestAddr(0x11_0000),
        count: SIZE,
    };
    (memory, config, area)
}

/// The device's side of a queue, with a record of what is in flight behind the rings if there is to be one.
fn device(config: &QueueConfig, memory: &Arc<GuestMemory>, recorded: bool) -> DeviceQueue {
    if !recorded {
        return DeviceQueue::new(config, memory).unwrap();
    }
    let bytes = region_bytes(RingFormat::of(config.features), SIZE);
    let record = memory
        .window(UserAddr(0x10_0000 + 0xc000), bytes, 64)
        .unwrap();
    DeviceQueue::resume(config, memory, &record).unwrap()
}

/// How costs grow: `CURVE=yes`, a line of JSON for each point.
fn print_curves() {
    let base = Features::VERSION_1 | Features::MRG_RXBUF | Features::IN_ORDER;
    for (name, features) in [("split", base), ("packed", base | Features::RING_PACKED)] {
        for burst in [1, 2, 4, 8, 16, 32, 64] {
            let ns: f64 = path(features, Extra::None, 64, 1_000_000, burst)
                .iter()
                .sum();
            point("burst", name, burst, ns);
        }
    }
    for regions in [1, 2, 4, 8, 16, 32, 64, 128, 256, 509] {
        for (name, run) in [("one after another", 64), ("anywhere", 1)] {
            point("regions", name, regions, translations(regions, run));
        }
    }
}

fn point(curve: &str, series: &str, x: usize, y: f64) {
    println!("{{\"curve\": \"{curve}\", \"series\": \"{series}\", \"x\": {x}, \"y\": {y:.2}}}");
}

/// ns to find an address in memory of so many regions, when `run` of them in a row are in one region: at the least.
fn translations(regions: usize, run: usize) -> f64 {
    const STRIDE: u64 = 0x10_000;
    let region = |n| Region::anonymous(0x8000, GuestAddr(n as u64 * STRIDE)).unwrap();
    let memory = GuestMemory::new((0..regions).map(region).collect()).unwrap();
    let mut state = 1_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        state >> 33
    };
    let addrs: Vec<_> = (0..65_536)
        .scan(0, |home, n| {
            if n % run == 0 {
                *home = next() % regions as u64;
            }
            Some(GuestAddr(*home * STRIDE + next() % 0x4000))
        })
        .collect();
    let mut hint = 0;
    let rounds = (0..50).map(|_| {
        let start = Instant::now();
        for &addr in &addrs {
            black_box(memory.translate(addr, 64, &mut hint).unwrap());
        }
        start.elapsed().as_secs_f64() * 1e9 / addrs.len() as f64
    });
    rounds.fold(f64::INFINITY, f64::min)
}

fn main() {
    if std::env::var_os("CURVE").is_some() {
        return print_curves();
    }
    let packets: usize = std::env::var("PACKETS")
        .ok()
        .and_then(|p| p.parse().ok())
        .unwrap_or(2_000_000);
    let base = Features::VERSION_1 | Features::MRG_RXBUF;
    let rings = [
        ("split", base, Extra::None),
        ("split in-order", base | Features::IN_ORDER, Extra::None),
        ("packed", base | Features::RING_PACKED, Extra::None),
        (
            "packed in-order",
            base | Features::RING_PACKED | Features::IN_ORDER,
            Extra::None,
        ),
        ("split recorded", base, Extra::Recorded),
        (
            "packed recorded",
            base | Features::RING_PACKED,
            Extra::Recorded,
        ),
        ("split standing", base, Extra::Standing),
        (
            "packed standing",
            base | Features::RING_PACKED,
            Extra::Standing,
        ),
    ];
    println!(
        "{:16} {:>5} {:>9} {:>9} {:>9} {:>9}   ns a packet",
        "ring", "bytes", "send", "drain", "fill", "receive"
    );
    let only = std::env::var("ONLY").unwrap_or_default();
    for (name, features, extra) in rings {
        for bytes in [64, 256, 1518] {
            if !only.is_empty() && only != format!("{name} {bytes}") {
                continue;
            }
            let [send, drain, fill, receive] = path(features, extra, bytes, packets, BURST);
            println!("{name:16} {bytes:5} {send:9.1} {drain:9.1} {fill:9.1} {receive:9.1}");
        }
    }
}

/// Driver A sends, the device drains A's transmitq and fills B's receiveq, driver B receives.
fn path(features: Features, extra: Extra, bytes: usize, packets: usize, each: usize) -> [f64; 4] {
    let recorded = extra == Extra::Recorded;
    let (tx_memory, tx_config, tx_area) = queue(features);
    let (rx_memory, rx_config, rx_area) = queue(features);
    let tx_driver = DriverQueue::new(&tx_config, &tx_memory).unwrap();
    let mut send =
        DriverTransmit::new(tx_driver, Arc::clone(&tx_memory), tx_area, features).unwrap();
    let rx_driver = DriverQueue::new(&rx_config, &rx_memory).unwrap();
    let mut receive =
        DriverReceive::new(rx_driver, Arc::clone(&rx_memory), rx_area, features).unwrap();
    receive.publish();
    let mut drain = TransmitQueue::new(device(&tx_config, &tx_memory, recorded), features);
    let mut fill = ReceiveQueue::new(device(&rx_config, &rx_memory, recorded), features);

    let mut template = Burst::new();
    for _ in 0..each {
        template.push_bytes(&vec![0x5a; bytes], Offload::default());
    }
    if extra == Extra::Standing {
        template.keep_packets();
    }
    let picks = Picks::first(each);
    let (mut burst, mut arrived) = (Burst::new(), Burst::new());
    let mut counters = PortCounters::default();
    let mut spent = [0.0; 4];
    let rounds = packets / each;
    for _ in 0..rounds {
        let mut lap = Instant::now();
        let mut split = |into: &mut f64| {
            let now = Instant::now();
            *into += (now - lap).as_secs_f64();
            lap = now;
        };
        let [on_send, on_drain, on_fill, on_receive] = &mut spent;
        send_stage(&mut send, &template, &picks, &mut counters);
        split(on_send);
        drain_stage(&mut drain, &tx_memory, &mut burst, &mut counters);
        split(on_drain);
        fill_stage(&mut fill, &rx_memory, &burst, &picks, &mut counters);
        split(on_fill);
        drain.complete();
        burst.clear();
        split(on_drain);
        receive_stage(&mut receive, &mut arrived, &mut counters);
        split(on_receive);
    }
    spent.map(|seconds| seconds * 1e9 / (rounds * each) as f64)
}

// Each stage is a function of its own, so that a profile names it.

#[inline(never)]
fn send_stage(
    queue: &mut DriverTransmit,
    burst: &Burst,
    picks: &Picks,
    counters: &mut PortCounters,
) {
    assert_eq!(queue.send(burst, picks, counters).unwrap(), picks.len());
    queue.publish();
}

#[inline(never)]
fn drain_stage(
    queue: &mut TransmitQueue,
    memory: &Arc<GuestMemory>,
    burst: &mut Burst,
    counters: &mut PortCounters,
) {
    assert_ne!(queue.drain(memory, burst, counters).unwrap(), 0);
}

#[inline(never)]
fn fill_stage(
    queue: &mut ReceiveQueue,
    memory: &GuestMemory,
    burst: &Burst,
    picks: &Picks,
    counters: &mut PortCounters,
) {
    assert_eq!(
        queue.fill(memory, burst, picks, counters).unwrap(),
        picks.len()
    );
    queue.publish();
}

#[inline(never)]
fn receive_stage(queue: &mut DriverReceive, burst: &mut Burst, counters: &mut PortCounters) {
    assert_ne!(queue.receive(burst, counters).unwrap(), 0);
    black_box(&burst);
    queue.complete();
    burst.clear();
}
