//! What the engine itself costs: ns per packet through a function between ports that do nothing.
//!
//! The ports hand out the same burst again and again and accept whatever comes, without touching a byte, so what is
//! measured is the breath: taking, classifying, grouping, sending. One line per case; the median of several rounds.
//! `cargo bench -p virtnet-engine`
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a bench prints its figures and stops where something is wrong"
)]

mod networks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtnet_engine::{
    BridgeRules, CableRules, Change, Echo, NodeId, Sink, Source, SourceOptions, Switch,
    SwitchOptions, SwitchOrders, Worker,
};
use virtnet_packet::BURST_MAX;

use networks::{
    FakePort, datagrams, firewall_of_flows, flows, frame, of_case, switch, switch_with, worker,
};

/// One breath: a function of its own, so that a profile names it.
#[inline(never)]
fn breath_stage(worker: &mut Worker, now: u64) -> usize {
    worker.step(now)
}

/// Whether all packets of a case leave twice.
fn is_copied(name: &str) -> bool {
    matches!(name, "tee" | "mirror, 2 stations")
}

/// So many packets through one function, to have their instructions counted: `ONLY=wire PACKETS=16000`.
fn run_only(name: &str, packets: usize) {
    const WARM_UP: u64 = 64;
    let mut worker = of_case(name);
    let arrived = |worker: &Worker, now| {
        let balance = worker.snapshot(now).balance;
        balance.sent + balance.consumed
    };
    let breath = |n: u64| 1_000_000_000 + n * 3_000;
    for n in 0..WARM_UP {
        worker.step(breath(n));
    }
    let before = arrived(&worker, breath(WARM_UP));
    let breaths = (packets / BURST_MAX) as u64;
    for n in WARM_UP..WARM_UP + breaths {
        assert!(breath_stage(&mut worker, breath(n)) >= BURST_MAX);
    }
    let arrived = arrived(&worker, breath(WARM_UP + breaths)) - before;
    let copies = if is_copied(name) { 2 } else { 1 };
    assert_eq!(
        arrived,
        copies * breaths * BURST_MAX as u64,
        "packets were lost"
    );
}

/// Median ns per packet of several rounds.
fn ns_per_packet(worker: &mut Worker) -> f64 {
    const ROUNDS: usize = 9;
    const BREATHS: u64 = 8_000;
    let mut now = 1_000_000_000;
    let mut rounds: Vec<f64> = (0..=ROUNDS)
        .map(|_| {
            let start = Instant::now();
            let mut packets = 0;
            for _ in 0..BREATHS {
                now += 3_000;
                packets += worker.step(now);
            }
            start.elapsed().as_nanos() as f64 / packets as f64
        })
        .skip(1)
        .collect();
    assert!(worker.snapshot(now).balance.is_exact());
    rounds.sort_by(f64::total_cmp);
    rounds[rounds.len() / 2]
}

/// How the cost of a packet grows with the stations that a switch knows: `CURVE=macs`, a line of JSON for each point.
fn print_curve() {
    for stations in [10, 100, 1_000, 10_000, 100_000, 1_000_000] {
        // Half of them send to the other half.
        let frames = flows(stations / 2, 1 << 20);
        let nothing = ns_per_packet(&mut worker(Sink::new(), frames.clone(), 0));
        let known = switch(stations / 2, 2, 1 << 20);
        let ns = ns_per_packet(&mut worker(known, frames, 2)) - nothing;
        println!(
            "{{\"curve\": \"macs\", \"series\": \"switch\", \"x\": {stations}, \"y\": {ns:.2}}}"
        );
    }
}

fn main() {
    if std::env::var_os("CURVE").is_some() {
        return print_curve();
    }
    if let Ok(name) = std::env::var("ONLY") {
        let packets = std::env::var("PACKETS").ok().and_then(|p| p.parse().ok());
        return run_only(&name, packets.unwrap_or(16_000));
    }
    // What a fake port itself costs, to be taken off the others: packets that end at once.
    let nothing = ns_per_packet(&mut worker(Sink::new(), flows(1, 1 << 20), 0));
    println!(
        "{:40} {nothing:6.2} ns a packet",
        "fake port and plain sink"
    );
    let report = |name: &str, mut worker: Worker| {
        let ns = ns_per_packet(&mut worker);
        println!(
            "{name:40} {ns:6.2} ns a packet, {:6.2} above that",
            ns - nothing
        );
    };
    report("wire", of_case("wire"));
    report("echo", worker(Echo::new(), flows(1, 1 << 20), 0));
    report(
        "copying sink",
        worker(Sink::copying(), flows(1, 1 << 20), 0),
    );
    for (stations, receivers) in [
        (1, 1),
        (8, 1),
        (1_000, 1),
        (100_000, 1),
        (8, 4),
        (1_000, 4),
        (1_000, 32),
    ] {
        let known = switch(stations, receivers, 1 << 20);
        report(
            &format!("switch, {stations} flows to {receivers} ports"),
            worker(known, flows(stations, 1 << 20), receivers),
        );
    }
    for (name, native) in [("all untagged", 1), ("a tag on the way", 0)] {
        let out = CableRules {
            untagged: native,
            ..CableRules::default()
        };
        let gates = (1..=4).map(|gate| (gate, out.clone()));
        let rules = || {
            let gates = gates.clone().chain([(0, CableRules::default())]);
            BridgeRules::new(true, 0, gates).unwrap()
        };
        let teaching = (1..=4).map(|gate| (gate, CableRules::default()));
        let known = switch_with(
            Some(BridgeRules::new(true, 0, teaching.chain([(0, CableRules::default())])).unwrap()),
            1_000,
            4,
            1 << 20,
        );
        let mut worker = worker(known, flows(1_000, 1 << 20), 4);
        let orders = SwitchOrders {
            ageing: Duration::from_secs(300),
            rules: Some(Arc::new(rules())),
        };
        let change = Change::new().update(NodeId(0), orders);
        worker.apply(change, 0).unwrap();
        report(
            &format!("switch with VLANs, 1000 flows to 4, {name}"),
            worker,
        );
    }
    for flows in [10, 1_000, 100_000, 1_000_000] {
        report(
            &format!("firewall, {flows} flows"),
            worker(firewall_of_flows(), datagrams(flows), 1),
        );
    }
    let broadcast = vec![frame(usize::MAX, 1); BURST_MAX];
    let flooding = Switch::new(SwitchOptions::default()).unwrap();
    report(
        "switch, flooding to 4 ports",
        worker(flooding, broadcast, 4),
    );

    let mut sourced = Worker::new();
    let source = Source::new(SourceOptions::default()).unwrap();
    let change = Change::new()
        .add(NodeId(0), source)
        .add(NodeId(1), FakePort::new(Vec::new(), BURST_MAX, false))
        .connect(NodeId(0), NodeId(1));
    sourced.apply(change, 0).unwrap();
    let ns = ns_per_packet(&mut sourced);
    println!("{:40} {ns:6.2} ns a packet", "source to a fake port");
}
