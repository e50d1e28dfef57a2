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

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtnet_engine::{
    Action, BridgeRules, CableRules, Change, ERRORS_PPS, Echo, Ends, Firewall, FirewallOrders,
    Node, NodeId, Place, Router, RouterInterface, RouterOrders, RouterTables, Rule, RuleSet, Sink,
    Source, SourceOptions, Switch, SwitchOptions, SwitchOrders, Timeouts, Wire, Worker,
};
use virtnet_packet::checksum::Sum;
use virtnet_packet::header::Mac;
use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload, Picks, Port, PortCounters};

/// Hands out bursts of frames made beforehand, each a copy of a head and no more, and accepts everything.
#[derive(Debug)]
struct FakePort {
    frames: Vec<[u8; 64]>,
    at: usize,
    per_rx: usize,
    /// How many bursts it hands out.
    bursts: u64,
    counters: PortCounters,
}

impl FakePort {
    fn new(frames: Vec<[u8; 64]>, per_rx: usize, refill: bool) -> Self {
        Self {
            frames,
            at: 0,
            per_rx,
            bursts: if refill { u64::MAX } else { 0 },
            counters: PortCounters::default(),
        }
    }
}

impl Port for FakePort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        if self.bursts == 0 {
            return 0;
        }
        self.bursts -= 1;
        for _ in 0..self.per_rx {
            burst.push_bytes(&self.frames[self.at], Offload::default());
            self.at = (self.at + 1) % self.frames.len();
        }
        self.counters.received += self.per_rx as u64;
        self.per_rx
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        black_box((burst, picks));
        self.counters.sent += picks.len() as u64;
        picks.len()
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

fn mac(n: usize) -> [u8; 6] {
    let [.., a, b, c, d] = n.to_be_bytes();
    [2, 0, a, b, c, d]
}

fn frame(to: usize, from: usize) -> [u8; 64] {
    let mut frame = [0; 64];
    frame[..6].copy_from_slice(&mac(to));
    frame[6..12].copy_from_slice(&mac(from));
    frame
}

/// Frames of `flows` stations behind gate 0 to as many others, in an order that is no order.
fn flows(flows: usize, others: usize) -> Vec<[u8; 64]> {
    (0..flows.max(BURST_MAX))
        .map(|n| {
            let flow = n.wrapping_mul(0x9e37_79b1) % flows;
            frame(others + flow, 1 + flow)
        })
        .collect()
}

/// A worker with a function between a port that sends `frames` and `receivers` that take them.
fn worker(function: impl Into<Node>, frames: Vec<[u8; 64]>, receivers: u16) -> Worker {
    let centre = NodeId(0);
    let mut change = Change::new()
        .add(centre, function)
        .add(NodeId(1), FakePort::new(frames, BURST_MAX, true))
        .connect(NodeId(1), Place::new(centre, 0));
    for gate in 1..=receivers {
        let node = NodeId(1 + u32::from(gate));
        change = change
            .add(node, FakePort::new(Vec::new(), BURST_MAX, false))
            .connect(node, Place::new(centre, gate));
    }
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    worker
}

/// A switch that knows where everyone is: `stations` others, spread over the receivers' gates.
fn switch(stations: usize, receivers: u16, first: usize) -> Switch {
    switch_with(None, stations, receivers, first)
}

/// The same with rules for its cables.
fn switch_with(
    rules: Option<BridgeRules>,
    stations: usize,
    receivers: u16,
    first: usize,
) -> Switch {
    let teach = Switch::new(SwitchOptions::default()).unwrap();
    let orders = SwitchOrders {
        ageing: Duration::from_secs(300),
        rules: rules.map(Arc::new),
    };
    let mut change = Change::new()
        .add(NodeId(0), teach)
        .update(NodeId(0), orders);
    for gate in 1..=receivers {
        let node = NodeId(u32::from(gate));
        let theirs: Vec<_> = (0..stations)
            .filter(|n| n % usize::from(receivers) == usize::from(gate - 1))
            .map(|n| frame(usize::MAX, first + n))
            .collect();
        change = change
            .add(node, FakePort::new(theirs, BURST_MAX, true))
            .connect(node, Place::new(NodeId(0), gate));
    }
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    for now in 0..(stations / BURST_MAX + 1) as u64 {
        worker.step(now);
    }
    // Taken out by itself, it forgets nothing.
    let removed = worker.apply(Change::new().remove(NodeId(0)), 0).unwrap();
    match removed.into_iter().next() {
        Some((_, Node::Function(virtnet_engine::Function::Switch(switch)))) => *switch,
        other => panic!("a switch was put in, and {other:?} came out"),
    }
}

/// UDP datagrams of so many flows, in an order that is no order.
fn datagrams(flows: usize) -> Vec<[u8; 64]> {
    let datagram = |n: usize| {
        let mut frame = frame(1, 2);
        frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17]);
        let flow = u32::try_from(n.wrapping_mul(0x9e37_79b1) % flows).unwrap();
        frame[26..30].copy_from_slice(&(0x0a00_0000 + flow / 1_000).to_be_bytes());
        frame[30..34].copy_from_slice(&[192, 0, 2, 1]);
        frame[34..38].copy_from_slice(&(flow % 1_000 * 0x10000 + 53).to_be_bytes());
        frame
    };
    (0..flows.max(BURST_MAX)).map(datagram).collect()
}

/// A firewall that lets everything begin.
fn firewall() -> Firewall {
    let rule = Rule {
        action: Action::Pass,
        came_in_by: None,
        version: None,
        protocols: vec![17],
        ethertype: None,
        from: Ends::default(),
        to: Ends::default(),
        filter: None,
        keep_state: true,
        text: String::new(),
    };
    let rules = RuleSet::new(vec![rule], Vec::new(), Action::Drop, true);
    let orders = FirewallOrders {
        rules: Arc::new(rules),
        timeouts: Timeouts::default(),
    };
    Firewall::new(orders, 2_000_000)
}

/// The same for a router with a link at either gate, behind one of them a station that makes itself known.
fn router() -> Worker {
    let interface = |gate: u16, n, net| RouterInterface {
        gate,
        mac: Mac(mac(n)),
        mtu: 1_500,
        addresses: vec![(Ipv4Addr::new(10, 0, net, 1).into(), 24)],
    };
    let tables =
        RouterTables::new(vec![interface(0, 1, 1), interface(1, 2, 2)], Vec::new()).unwrap();
    let orders = RouterOrders {
        tables: Arc::new(tables),
        errors_pps: ERRORS_PPS,
        translation: None,
    };
    let mut packet = frame(1, 3);
    packet[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17]);
    packet[26..34].copy_from_slice(&[10, 0, 1, 9, 10, 0, 2, 9]);
    let checksum = Sum::of(&packet[14..34]).checksum();
    packet[24..26].copy_from_slice(&checksum.to_be_bytes());
    let mut question = frame(usize::MAX, 4);
    question[..6].copy_from_slice(&[0xff; 6]);
    question[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    question[22..28].copy_from_slice(&mac(4));
    question[28..32].copy_from_slice(&[10, 0, 2, 9]);
    question[38..42].copy_from_slice(&[10, 0, 2, 1]);
    let station = FakePort {
        bursts: 1,
        ..FakePort::new(vec![question], 1, false)
    };
    let sender = FakePort::new(vec![packet; BURST_MAX], BURST_MAX, true);
    let change = Change::new()
        .add(NodeId(0), Router::new(orders).unwrap())
        .add(NodeId(1), sender)
        .add(NodeId(2), station)
        .connect(NodeId(1), Place::new(NodeId(0), 0))
        .connect(NodeId(2), Place::new(NodeId(0), 1));
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    worker
}

/// A switch that knows a thousand stations behind four gates of one VLAN.
fn vlan_switch() -> Worker {
    let rules = || {
        let gates = (0..=4).map(|gate| (gate, CableRules::default()));
        BridgeRules::new(true, 0, gates).unwrap()
    };
    let known = switch_with(Some(rules()), 1_000, 4, 1 << 20);
    worker(known, flows(1_000, 1 << 20), 4)
}

/// One breath: a function of its own, so that a profile names it.
#[inline(never)]
fn breath_stage(worker: &mut Worker, now: u64) -> usize {
    worker.step(now)
}

/// So many packets through one function, to have their instructions counted: `ONLY=wire PACKETS=16000`.
fn run_only(name: &str, packets: usize) {
    const WARM_UP: u64 = 64;
    let mut worker = match name {
        "wire" => worker(Wire::new(), flows(1, 1 << 20), 1),
        "switch, 2 stations" => worker(switch(1, 1, 1 << 20), flows(1, 1 << 20), 1),
        "switch, 1000 stations" => worker(switch(500, 4, 1 << 20), flows(500, 1 << 20), 4),
        "switch with VLANs, 1000 flows" => vlan_switch(),
        "firewall, 1000 flows" => worker(firewall(), datagrams(1_000), 1),
        "router" => router(),
        _ => panic!("{name} is none of those that are counted"),
    };
    let sent = |worker: &Worker, now| worker.snapshot(now).balance.sent;
    let breath = |n: u64| 1_000_000_000 + n * 3_000;
    for n in 0..WARM_UP {
        worker.step(breath(n));
    }
    let before = sent(&worker, breath(WARM_UP));
    let breaths = (packets / BURST_MAX) as u64;
    for n in WARM_UP..WARM_UP + breaths {
        assert_eq!(breath_stage(&mut worker, breath(n)), BURST_MAX);
    }
    let arrived = sent(&worker, breath(WARM_UP + breaths)) - before;
    assert_eq!(arrived, breaths * BURST_MAX as u64, "packets were lost");
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
    report("wire", worker(Wire::new(), flows(1, 1 << 20), 1));
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
            worker(firewall(), datagrams(flows), 1),
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
