//! Networks to be measured: one function between ports that do nothing.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use virtnet_engine::{
    Action, AddressSet, BridgeRules, CableRules, Change, ERRORS_PPS, Element, Ends, Filter,
    Firewall, FirewallOrders, ImpairOrders, Impairment, Instruction, Node, NodeId, Place, Prefix,
    Program, Route, Router, RouterInterface, RouterOrders, RouterTables, Rule, RuleSet, Service,
    Sink, Step, Switch, SwitchOptions, SwitchOrders, Tee, Timeouts, Track, Translation, Wire,
    Worker,
};
use virtnet_packet::checksum::Sum;
use virtnet_packet::flow::IpVersion;
use virtnet_packet::header::Mac;
use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload, Picks, Port, PortCounters};

/// Hands out bursts of frames made beforehand, each a copy of a head and no more, and accepts everything.
#[derive(Debug)]
pub(crate) struct FakePort {
    frames: Vec<[u8; 64]>,
    at: usize,
    per_rx: usize,
    /// How many bursts it hands out.
    bursts: u64,
    counters: PortCounters,
}

impl FakePort {
    pub(crate) fn new(frames: Vec<[u8; 64]>, per_rx: usize, refill: bool) -> Self {
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

pub(crate) fn frame(to: usize, from: usize) -> [u8; 64] {
    let mut frame = [0; 64];
    frame[..6].copy_from_slice(&mac(to));
    frame[6..12].copy_from_slice(&mac(from));
    frame
}

/// Frames of `flows` stations behind gate 0 to as many others, in an order that is no order.
pub(crate) fn flows(flows: usize, others: usize) -> Vec<[u8; 64]> {
    (0..flows.max(BURST_MAX))
        .map(|n| {
            let flow = n.wrapping_mul(0x9e37_79b1) % flows;
            frame(others + flow, 1 + flow)
        })
        .collect()
}

/// A worker with a function between a port that sends `frames` and `receivers` that take them.
pub(crate) fn worker(function: impl Into<Node>, frames: Vec<[u8; 64]>, receivers: u16) -> Worker {
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
pub(crate) fn switch(stations: usize, receivers: u16, first: usize) -> Switch {
    switch_with(None, stations, receivers, first)
}

/// The same with rules for its cables.
pub(crate) fn switch_with(
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
pub(crate) fn datagrams(flows: usize) -> Vec<[u8; 64]> {
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

/// The same of IPv6.
fn datagrams_v6(flows: usize) -> Vec<[u8; 64]> {
    let datagram = |n: usize| {
        let mut frame = frame(1, 2);
        frame[12..22].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 10, 17, 64]);
        let flow = u32::try_from(n.wrapping_mul(0x9e37_79b1) % flows).unwrap();
        frame[34..38].copy_from_slice(&(flow / 1_000).to_be_bytes());
        frame[54..58].copy_from_slice(&(flow % 1_000 * 0x10000 + 53).to_be_bytes());
        frame
    };
    (0..flows.max(BURST_MAX)).map(datagram).collect()
}

/// A rule about UDP to some ports; none: to any.
fn rule(action: Action, ports: &[u16]) -> Rule {
    let ports = ports.iter().map(|&port| (port, port)).collect();
    Rule {
        action,
        came_in_by: None,
        version: None,
        protocols: vec![17],
        ethertype: None,
        from: Ends::default(),
        to: Ends {
            ports,
            ..Ends::default()
        },
        filter: None,
        keep_state: false,
        text: String::new(),
    }
}

fn firewall(rules: Vec<Rule>, sets: Vec<Arc<AddressSet>>) -> Firewall {
    let rules = RuleSet::new(rules, sets, Action::Drop, true);
    let orders = FirewallOrders {
        rules: Arc::new(rules),
        timeouts: Timeouts::default(),
    };
    Firewall::new(orders, 2_000_000)
}

/// A firewall that lets everything begin.
pub(crate) fn firewall_of_flows() -> Firewall {
    let rule = Rule {
        keep_state: true,
        ..rule(Action::Pass, &[])
    };
    firewall(vec![rule], Vec::new())
}

/// One of so many rules, of which the last lets everything pass and no other matches.
fn firewall_of_rules(n: u16) -> Firewall {
    let others = (1..n).map(|number| rule(Action::Drop, &[1_000 + number]));
    firewall(
        others.chain([rule(Action::Pass, &[])]).collect(),
        Vec::new(),
    )
}

/// One whose first rules are about an address each, which nobody has.
fn firewall_of_hosts(n: u16) -> Firewall {
    let others = (1..n).map(|number| Rule {
        from: Ends {
            prefixes: vec![Prefix {
                version: IpVersion::V4,
                address: 0x0b00_0000 + u128::from(number),
                len: 32,
            }],
            ..Ends::default()
        },
        ..rule(Action::Drop, &[])
    });
    firewall(
        others.chain([rule(Action::Pass, &[])]).collect(),
        Vec::new(),
    )
}

/// One with a set of 100 000 addresses, of which nobody is one.
fn firewall_of_addresses() -> Firewall {
    let address = |n: u128| Prefix {
        version: IpVersion::V4,
        address: 0x0b00_0000 + n,
        len: 32,
    };
    let blocked = Rule {
        from: Ends {
            sets: vec![0],
            ..Ends::default()
        },
        ..rule(Action::Drop, &[])
    };
    let rules = vec![blocked, rule(Action::Pass, &[])];
    firewall(rules, vec![Arc::new((0..100_000).map(address).collect())])
}

/// Datagrams for a router at gate 0 to so many destinations from so many ports, finished but for what they say.
fn routed(destinations: usize, flows: usize) -> Vec<[u8; 64]> {
    let datagram = |n: usize| {
        let mut packet = frame(1, 3);
        packet[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17]);
        packet[26..34].copy_from_slice(&[10, 0, 1, 9, 10, 0, 2, 9]);
        let mixed = n.wrapping_mul(0x9e37_79b1);
        if destinations > 1 {
            let route = mixed % destinations * (ROUTES / destinations);
            packet[30..34].copy_from_slice(&(address_of(route) | 7).to_be_bytes());
        }
        let port = u16::try_from(mixed % flows).unwrap();
        packet[34..36].copy_from_slice(&(1_024 + port).to_be_bytes());
        packet[36..38].copy_from_slice(&53_u16.to_be_bytes());
        packet[38..42].copy_from_slice(&[0, 30, 0x12, 0x34]);
        let checksum = Sum::of(&packet[14..34]).checksum();
        packet[24..26].copy_from_slice(&checksum.to_be_bytes());
        packet
    };
    (0..destinations.max(flows).max(BURST_MAX))
        .map(datagram)
        .collect()
}

/// Routes of a large table, each a /24.
const ROUTES: usize = 1_000_000;

fn address_of(route: usize) -> u32 {
    u32::try_from(0x1000_0000 + route * 256).unwrap()
}

/// A router with a link at either gate, behind gate 1 a station that makes itself known and is the next router of all `routes`.
pub(crate) fn router(
    routes: usize,
    translation: Option<Translation>,
    packets: Vec<[u8; 64]>,
) -> Worker {
    let interface = |gate: u16, n, net| RouterInterface {
        gate,
        mac: Mac(mac(n)),
        mtu: 1_500,
        addresses: vec![(Ipv4Addr::new(10, 0, net, 1).into(), 24)],
    };
    let routes = (0..routes).map(|n| Route {
        to: Ipv4Addr::from_bits(address_of(n)).into(),
        len: 24,
        via: Some(Ipv4Addr::new(10, 0, 2, 9).into()),
        gate: None,
    });
    let tables = RouterTables::new(vec![interface(0, 1, 1), interface(1, 2, 2)], routes).unwrap();
    let orders = RouterOrders {
        tables: Arc::new(tables),
        errors_pps: ERRORS_PPS,
        translation: translation.map(Arc::new),
    };
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
    let sender = FakePort::new(packets, BURST_MAX, true);
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

/// A router that gives its own address to whatever leaves.
fn nat(flows: usize) -> Worker {
    let rules = Translation::new(vec![1], Vec::new(), Vec::new(), 100_000);
    router(0, Some(rules), routed(1, flows))
}

/// A router that is asked for a service which the station behind it serves at four ports.
fn load_balancer(flows: usize) -> Worker {
    let service = Service {
        protocol: 17,
        at: (Ipv4Addr::new(10, 0, 2, 9), 53),
        backends: (1..=4)
            .map(|port| (Ipv4Addr::new(10, 0, 2, 9), port))
            .collect(),
    };
    let rules = Translation::new(Vec::new(), Vec::new(), vec![service], 100_000);
    router(0, Some(rules), routed(1, flows))
}

/// `tcp port 80`, as libpcap compiles it for IPv4.
fn tcp_port_80() -> Filter {
    let program = [
        (0x28, 0, 0, 12),
        (0x15, 0, 8, 0x0800),
        (0x30, 0, 0, 23),
        (0x15, 0, 6, 6),
        (0x28, 0, 0, 20),
        (0x45, 4, 0, 0x1fff),
        (0xb1, 0, 0, 14),
        (0x48, 0, 0, 16),
        (0x15, 0, 1, 80),
        (0x06, 0, 0, 262_144),
        (0x06, 0, 0, 0),
    ];
    let program = program.map(|(code, jt, jf, k)| Instruction { code, jt, jf, k });
    Filter::new(&program).unwrap()
}

fn element(steps: &[(&str, &str, &[i128])]) -> Element {
    let step = |&(op, dtype, args): &(&str, &str, &[i128])| Step {
        op: op.to_owned(),
        dtype: dtype.to_owned(),
        args: args.to_vec(),
    };
    let steps: Vec<_> = steps.iter().map(step).collect();
    Element::new(Program::new(&steps, Vec::new()).unwrap())
}

/// An element that lets pass what two comparisons say, and counts down the time to live.
fn element_that_decides() -> Element {
    element(&[
        ("column:l4_dst", "uint16", &[]),
        ("number", "uint16", &[53]),
        ("equal", "bool", &[0, 1]),
        ("column:ip_ttl", "uint8", &[]),
        ("number", "uint8", &[1]),
        ("greater", "bool", &[3, 4]),
        ("bitwise_and", "bool", &[2, 5]),
        ("subtract", "uint8", &[3, 4]),
        ("write:ip_ttl", "uint8", &[7]),
        ("answer", "bool", &[6]),
    ])
}

/// An element that counts down the time to live and no more.
fn element_that_counts_down() -> Element {
    element(&[
        ("column:ip_ttl", "uint8", &[]),
        ("number", "uint8", &[1]),
        ("subtract", "uint8", &[0, 1]),
        ("write:ip_ttl", "uint8", &[2]),
    ])
}

/// An element that sends what comes to another address and port.
fn element_that_sends_elsewhere() -> Element {
    element(&[
        ("number", "uint32", &[0x0a00_0009]),
        ("write:ip_dst", "uint32", &[0]),
        ("number", "uint16", &[5353]),
        ("write:l4_dst", "uint16", &[2]),
    ])
}

/// A cable with faults that hardly ever show.
fn cable(orders: ImpairOrders) -> Impairment {
    let orders = ImpairOrders {
        loss: Track::constant(1e-9),
        ..orders
    };
    Impairment::new(&orders, [true, false], 1).unwrap()
}

/// Limits that are not reached.
fn with_rate() -> ImpairOrders {
    ImpairOrders {
        rate_bps: Some(Track::constant(1e15)),
        ..ImpairOrders::default()
    }
}

/// A delay of a tenth of a millisecond: some 2000 packets are on their way.
fn with_delay() -> ImpairOrders {
    ImpairOrders {
        delay_ns: Track::constant(1e5),
        ..ImpairOrders::default()
    }
}

/// A switch with VLANs that knows `stations` stations behind as many gates as there are `receivers`, all of one VLAN. The last
/// gate behind these, if it is to be a mirror's, has copies of all that comes in by gate 0.
fn vlan_switch(stations: usize, receivers: u16, mirrored: bool) -> Worker {
    let rules = |mirror| {
        let first = CableRules {
            mirror,
            ..CableRules::default()
        };
        let others = (1..=receivers + 1).map(|gate| (gate, CableRules::default()));
        BridgeRules::new(true, 0, others.chain([(0, first)])).unwrap()
    };
    let known = switch_with(Some(rules(None)), stations, receivers, 1 << 20);
    let mut worker = worker(known, flows(stations, 1 << 20), receivers + 1);
    if mirrored {
        let orders = SwitchOrders {
            ageing: Duration::from_secs(300),
            rules: Some(Arc::new(rules(Some(receivers + 1)))),
        };
        let change = Change::new().update(NodeId(0), orders);
        worker.apply(change, 0).unwrap();
    }
    worker
}

/// The network of a case whose instructions are counted.
pub(crate) fn of_case(name: &str) -> Worker {
    match name {
        "wire" => worker(Wire::new(), flows(1, 1 << 20), 1),
        "copying sink" => worker(Sink::copying(), flows(1, 1 << 20), 0),
        "switch, 2 stations" => worker(switch(1, 1, 1 << 20), flows(1, 1 << 20), 1),
        "switch, 1000 stations" => worker(switch(500, 4, 1 << 20), flows(500, 1 << 20), 4),
        "switch with VLANs, 2 stations" => vlan_switch(1, 1, false),
        "switch with VLANs, 1000 flows" => vlan_switch(1_000, 4, false),
        "mirror, 2 stations" => vlan_switch(1, 1, true),
        "tee" => worker(Tee::new(Filter::default()), flows(1, 1 << 20), 2),
        "tee that copies nothing" => worker(Tee::new(tcp_port_80()), datagrams(1), 2),
        "element" => worker(element_that_decides(), datagrams(1_000), 1),
        "element that counts down" => worker(element_that_counts_down(), datagrams(1_000), 1),
        "element that writes addresses" => {
            worker(element_that_sends_elsewhere(), datagrams(1_000), 1)
        }
        "cable that loses packets" => worker(cable(ImpairOrders::default()), datagrams(1_000), 1),
        "cable with a rate" => worker(cable(with_rate()), datagrams(1_000), 1),
        "cable that delays packets" => worker(cable(with_delay()), datagrams(1_000), 1),
        "firewall, 1 flow" => worker(firewall_of_flows(), datagrams(1), 1),
        "firewall, 1000 flows" => worker(firewall_of_flows(), datagrams(1_000), 1),
        "firewall of 10 rules, 1 flow" => worker(firewall_of_rules(10), datagrams(1), 1),
        "firewall of 10 rules, 1000 flows" => worker(firewall_of_rules(10), datagrams(1_000), 1),
        "firewall of 1000 rules, 1000 flows" => {
            worker(firewall_of_rules(1_000), datagrams(1_000), 1)
        }
        "firewall of 1000 rules, 1000 flows of IPv6" => {
            worker(firewall_of_rules(1_000), datagrams_v6(1_000), 1)
        }
        "firewall of 32 rules with addresses, 1000 flows" => {
            worker(firewall_of_hosts(32), datagrams(1_000), 1)
        }
        "firewall of 100000 addresses, 1000 flows" => {
            worker(firewall_of_addresses(), datagrams(1_000), 1)
        }
        "router, 1 destination" => router(0, None, routed(1, 1)),
        "router, 1000 destinations of 1000000 routes" => router(ROUTES, None, routed(1_000, 1)),
        "NAT, 1 flow" => nat(1),
        "NAT, 1000 flows" => nat(1_000),
        "load balancer, 1 flow" => load_balancer(1),
        "load balancer, 1000 flows" => load_balancer(1_000),
        _ => panic!("{name} is none of those that are counted"),
    }
}
