//! A router between links: what it sends on, what it answers, and what it says of what it does not send on.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and their numbers are small"
)]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use common::Random;
use virtnet_engine::{
    Change, FunctionDetail, Node, NodeId, Place, Route, Router, RouterCounters, RouterInterface,
    RouterOrders, RouterTables, Worker,
};
use virtnet_packet::checksum::Sum;
use virtnet_packet::header::Mac;
use virtnet_packet::{Burst, DropReason, MemoryPort, Offload, Picks, Port, memory_pair};

const ROUTER: NodeId = NodeId(9);
const SECOND: u64 = 1_000_000_000;

/// The router's address on link `n`.
const fn router_mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 1, n]
}

/// A host's address on its link.
const fn host_mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

/// Links 0 to 2 with a host `.9` each, a memory port in its place: `10.0.n.0/24`, `fd00:n::/64`; link 2 has an MTU of 1280.
struct Lab {
    worker: Worker,
    hosts: Vec<MemoryPort>,
    now: u64,
}

fn interface(n: u8) -> RouterInterface {
    let v6 = Ipv6Addr::new(0xfd00, u16::from(n), 0, 0, 0, 0, 0, 1);
    RouterInterface {
        gate: u16::from(n),
        mac: Mac(router_mac(n)),
        mtu: if n == 2 { 1280 } else { 1500 },
        addresses: vec![([10, 0, n, 1].into(), 24), (v6.into(), 64)],
    }
}

fn route(to: &str, via: &str) -> Route {
    let (to, len) = to.split_once('/').unwrap();
    Route {
        to: to.parse().unwrap(),
        len: len.parse().unwrap(),
        via: Some(via.parse().unwrap()),
        gate: None,
    }
}

fn orders(routes: impl IntoIterator<Item = Route>) -> RouterOrders {
    let tables = RouterTables::new((0..3).map(interface).collect(), routes).unwrap();
    RouterOrders {
        tables: Arc::new(tables),
        errors_pps: 1_000,
        translation: None,
    }
}

impl Lab {
    fn new(routes: impl IntoIterator<Item = Route>) -> Self {
        let mut change = Change::new().add(ROUTER, Router::new(orders(routes)).unwrap());
        let mut hosts = Vec::new();
        for n in 0..3 {
            let (inside, outside) = memory_pair(1_024);
            let node = NodeId(u32::from(n));
            change = change
                .add(node, Node::from(inside))
                .connect(node, Place::new(ROUTER, n));
            hosts.push(outside);
        }
        let mut worker = Worker::new();
        worker.apply(change, 0).unwrap();
        Self {
            worker,
            hosts,
            now: SECOND,
        }
    }

    /// Host `n` sends a packet; what host `to` receives then.
    fn pass(&mut self, n: usize, frame: &[u8], to: usize) -> Vec<Vec<u8>> {
        self.put(n, &[(frame.to_vec(), Offload::default())]);
        self.take(to)
    }

    fn put(&mut self, n: usize, frames: &[(Vec<u8>, Offload)]) {
        let mut burst = Burst::new();
        for (frame, offload) in frames {
            burst.push_bytes(frame, *offload);
        }
        assert_eq!(
            self.hosts[n].tx(&burst, &Picks::first(frames.len())),
            frames.len()
        );
        self.breathe(0);
    }

    fn breathe(&mut self, ns: u64) {
        self.now += ns;
        for _ in 0..3 {
            self.worker.step(self.now);
        }
        assert!(self.worker.snapshot(self.now).balance.is_exact());
    }

    fn take(&mut self, n: usize) -> Vec<Vec<u8>> {
        common::take(&mut self.hosts[n])
    }

    /// Has every host tell the router where it is.
    fn greet(&mut self) {
        for n in 0..3 {
            let answers = self.pass(usize::from(n), &arp_request(n), usize::from(n));
            assert_eq!(answers.len(), 1, "{answers:02x?}");
            let answers = self.pass(usize::from(n), &solicitation(n), usize::from(n));
            assert_eq!(answers.len(), 1, "{answers:02x?}");
        }
    }

    fn counters(&self) -> RouterCounters {
        match self.worker.snapshot(self.now).functions[0].detail {
            FunctionDetail::Router(counters) => counters,
            ref other => panic!("{other:?}"),
        }
    }

    fn drops(&self, reason: DropReason) -> u64 {
        self.worker.snapshot(self.now).functions[0]
            .counters
            .drops
            .of(reason)
    }
}

fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

fn arp_request(n: u8) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(host_mac(n));
    arp.extend([10, 0, n, 9, 0, 0, 0, 0, 0, 0, 10, 0, n, 1]);
    ethernet([0xff; 6], host_mac(n), 0x0806, &arp)
}

fn host6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, u16::from(n), 0, 0, 0, 0, 0, 9)
}

fn solicitation(n: u8) -> Vec<u8> {
    let target = Ipv6Addr::new(0xfd00, u16::from(n), 0, 0, 0, 0, 0, 1);
    let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend(target.octets());
    icmp.extend([1, 1]);
    icmp.extend(host_mac(n));
    finish6(&mut icmp, host6(n), group);
    ethernet(
        [0x33, 0x33, 0xff, 0, 0, 1],
        host_mac(n),
        0x86dd,
        &v6(58, 255, host6(n), group, &icmp),
    )
}

fn finish6(icmp: &mut [u8], from: Ipv6Addr, to: Ipv6Addr) {
    let sum = pseudo6(icmp, from, to);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
}

fn pseudo6(icmp: &[u8], from: Ipv6Addr, to: Ipv6Addr) -> u16 {
    let pseudo = [
        &from.octets()[..],
        &to.octets(),
        &[0, 0],
        &(icmp.len() as u16).to_be_bytes(),
        &[0, 0, 0, 58],
    ];
    Sum::of(&pseudo.concat()).and(Sum::of(icmp)).checksum()
}

fn v6(next: u8, hops: u8, from: Ipv6Addr, to: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u16).to_be_bytes();
    [
        &[0x60, 0, 0, 0, len[0], len[1], next, hops][..],
        &from.octets(),
        &to.octets(),
        payload,
    ]
    .concat()
}

/// An IPv4 packet whose header has these flags, time to live and protocol.
fn v4(flags: u8, ttl: u8, protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let len = (20 + payload.len() as u16).to_be_bytes();
    let mut packet = vec![
        0x45, 0, len[0], len[1], 0x12, 0x34, flags, 0, ttl, protocol, 0, 0,
    ];
    packet.extend(from);
    packet.extend(to);
    let sum = Sum::of(&packet).checksum();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

/// UDP from host `from` to host `to`, as host `from` sends it.
fn udp(from: u8, to: [u8; 4], ttl: u8, len: usize, flags: u8) -> Vec<u8> {
    let mut payload = vec![0, 7, 0, 9];
    payload.extend((8 + len as u16).to_be_bytes());
    payload.extend([0, 0]);
    payload.extend((0..len).map(|k| k as u8));
    let packet = v4(flags, ttl, 17, [10, 0, from, 9], to, &payload);
    ethernet(router_mac(from), host_mac(from), 0x0800, &packet)
}

fn udp6(from: u8, to: Ipv6Addr, hops: u8, len: usize) -> Vec<u8> {
    let mut payload = vec![7; 8 + len];
    let [a, b] = (8 + len as u16).to_be_bytes();
    payload[4..8].copy_from_slice(&[a, b, 0, 0]);
    let pseudo = Sum::of(&[host6(from).octets(), to.octets()].concat())
        .and_word(17)
        .and_word(8 + len as u16);
    let sum = pseudo.and(Sum::of(&payload)).checksum_not_zero();
    payload[6..8].copy_from_slice(&sum.to_be_bytes());
    ethernet(
        router_mac(from),
        host_mac(from),
        0x86dd,
        &v6(17, hops, host6(from), to, &payload),
    )
}

/// What a packet is expected to become on link `to`.
fn forwarded(frame: &[u8], to: u8) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&host_mac(to));
    frame[6..12].copy_from_slice(&router_mac(to));
    if frame[12] == 8 {
        frame[22] -= 1;
        frame[24..26].fill(0);
        let sum = Sum::of(&frame[14..34]).checksum();
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        frame[21] -= 1;
    }
    frame
}

/// Kind, code and rest of the ICMP error in a frame, checked, and what it quotes.
fn error_in(frame: &[u8]) -> (u8, u8, u32, &[u8]) {
    let icmp = if frame[12] == 8 {
        assert_eq!(Sum::of(&frame[14..34]).checksum(), 0, "header");
        assert_eq!(Sum::of(&frame[34..]).checksum(), 0, "ICMP");
        assert_eq!(frame[23], 1);
        &frame[34..]
    } else {
        let ip = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).unwrap());
        assert_eq!(pseudo6(&frame[54..], ip(22), ip(38)), 0, "ICMPv6");
        assert_eq!(frame[20], 58);
        &frame[54..]
    };
    (
        icmp[0],
        icmp[1],
        u32::from_be_bytes(icmp[4..8].try_into().unwrap()),
        &icmp[8..],
    )
}

#[test]
fn packets_go_from_link_to_link_with_one_hop_less() {
    let mut lab = Lab::new([]);
    lab.greet();
    for len in [0, 18, 200, 1_472] {
        let frame = udp(0, [10, 0, 1, 9], 64, len, 0);
        assert_eq!(lab.pass(0, &frame, 1), [forwarded(&frame, 1)], "{len}");
        if len < 1_400 {
            let frame = udp6(0, host6(1), 2, len);
            assert_eq!(lab.pass(0, &frame, 1), [forwarded(&frame, 1)], "{len}");
        }
    }
    assert_eq!(lab.counters().forwarded, 7);
    assert_eq!(lab.counters().neighbours, 6);
}

#[test]
fn the_longest_prefix_decides_and_routes_change_in_place() {
    let far = [172, 16, 5, 5];
    let mut lab = Lab::new([
        route("0.0.0.0/0", "10.0.1.9"),
        route("172.16.0.0/12", "10.0.2.9"),
    ]);
    lab.greet();
    let frame = udp(0, far, 64, 18, 0);
    assert_eq!(lab.pass(0, &frame, 2), [forwarded(&frame, 2)]);
    let more = [
        route("0.0.0.0/0", "10.0.1.9"),
        route("172.16.5.0/24", "10.0.1.9"),
        route("172.16.0.0/12", "10.0.2.9"),
    ];
    lab.worker
        .apply(Change::new().update(ROUTER, orders(more)), lab.now)
        .unwrap();
    // Nobody has to be asked for again.
    assert_eq!(lab.pass(0, &frame, 1), [forwarded(&frame, 1)]);
    let elsewhere = udp(0, [8, 8, 8, 8], 64, 18, 0);
    assert_eq!(lab.pass(0, &elsewhere, 1), [forwarded(&elsewhere, 1)]);
    assert_eq!(lab.counters().routes, 3);
    lab.worker
        .apply(Change::new().update(ROUTER, orders([])), lab.now)
        .unwrap();
    let told = lab.pass(0, &elsewhere, 0);
    assert_eq!(error_in(&told[0]).0, 3);
    assert_eq!(lab.drops(DropReason::NoRoute), 1);
}

#[test]
fn a_packet_waits_for_its_receivers_address() {
    let mut lab = Lab::new([]);
    let frames: Vec<_> = (1..4)
        .map(|len| udp(0, [10, 0, 1, 9], 64, len, 0))
        .collect();
    lab.put(
        0,
        &frames
            .iter()
            .map(|frame| (frame.clone(), Offload::default()))
            .collect::<Vec<_>>(),
    );
    let asked = lab.take(1);
    assert_eq!(asked.len(), 1);
    assert_eq!(&asked[0][..6], &[0xff; 6]);
    assert_eq!(&asked[0][12..22], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    assert_eq!(
        (&asked[0][22..28], &asked[0][28..32], &asked[0][38..42]),
        (&router_mac(1)[..], &[10, 0, 1, 1][..], &[10, 0, 1, 9][..])
    );
    assert_eq!(lab.counters().waiting, 3);
    let mut reply = arp_request(1);
    reply[21] = 2;
    reply[..6].copy_from_slice(&router_mac(1));
    reply[32..38].copy_from_slice(&router_mac(1));
    let wanted: Vec<_> = frames.iter().map(|frame| forwarded(frame, 1)).collect();
    assert_eq!(lab.pass(1, &reply, 1), wanted);
    // The same of IPv6.
    let frame = udp6(0, host6(1), 64, 5);
    let asked = lab.pass(0, &frame, 1);
    assert_eq!(&asked[0][..6], &[0x33, 0x33, 0xff, 0, 0, 9]);
    let mut icmp = vec![136, 0, 0, 0, 0x60, 0, 0, 0];
    icmp.extend(host6(1).octets());
    icmp.extend([2, 1]);
    icmp.extend(host_mac(1));
    let router: Ipv6Addr = "fd00:1::1".parse().unwrap();
    finish6(&mut icmp, host6(1), router);
    let answer = ethernet(
        router_mac(1),
        host_mac(1),
        0x86dd,
        &v6(58, 255, host6(1), router, &icmp),
    );
    assert_eq!(lab.pass(1, &answer, 1), [forwarded(&frame, 1)]);
}

#[test]
fn who_does_not_answer_is_unreachable() {
    let mut lab = Lab::new([]);
    lab.greet();
    for frame in [
        udp(0, [10, 0, 1, 77], 64, 18, 0),
        udp6(0, "fd00:1::77".parse().unwrap(), 64, 18),
    ] {
        let before = lab.drops(DropReason::NoNeighbour);
        assert_eq!(lab.pass(0, &frame, 1).len(), 1);
        for _ in 0..4 {
            lab.breathe(SECOND);
        }
        assert_eq!(lab.take(1).len(), 2, "asked twice more");
        let told = lab.take(0);
        let (kind, code, _, quoted) = error_in(&told[0]);
        assert_eq!((kind, code), if frame[12] == 8 { (3, 1) } else { (1, 3) });
        assert_eq!(quoted.len(), frame.len() - 14);
        assert_eq!(lab.drops(DropReason::NoNeighbour), before + 1);
    }
}

#[test]
fn pings_to_it_are_answered_at_any_of_its_addresses() {
    let mut lab = Lab::new([]);
    lab.greet();
    for to in [[10, 0, 0, 1], [10, 0, 2, 1]] {
        for len in [8, 64, 1_400] {
            let mut icmp = vec![8, 0, 0, 0, 0xab, 0xcd, 0, 1];
            icmp.resize(len, 0x5a);
            let sum = Sum::of(&icmp).checksum();
            icmp[2..4].copy_from_slice(&sum.to_be_bytes());
            let ping = ethernet(
                router_mac(0),
                host_mac(0),
                0x0800,
                &v4(0, 1, 1, [10, 0, 0, 9], to, &icmp),
            );
            let pong = &lab.pass(0, &ping, 0)[0];
            assert_eq!(
                (&pong[..6], &pong[6..12]),
                (&host_mac(0)[..], &router_mac(0)[..])
            );
            assert_eq!(
                (&pong[26..30], &pong[30..34], pong[22]),
                (&to[..], &[10, 0, 0, 9][..], 64)
            );
            let (kind, code, rest, data) = error_in(pong);
            assert_eq!((kind, code, rest, data), (0, 0, 0xabcd_0001, &icmp[8..]));
        }
    }
    for to in ["fd00::1", "fd00:1::1", "fe80::ff:fe00:100"] {
        let to: Ipv6Addr = to.parse().unwrap();
        let mut icmp = vec![128, 0, 0, 0, 0xab, 0xcd, 0, 1, 1, 2, 3];
        finish6(&mut icmp, host6(0), to);
        let ping = ethernet(
            router_mac(0),
            host_mac(0),
            0x86dd,
            &v6(58, 64, host6(0), to, &icmp),
        );
        let pongs = lab.pass(0, &ping, 0);
        assert_eq!(error_in(&pongs[0]).0, 129, "{to}");
        assert_eq!(&pongs[0][22..38], &to.octets());
    }
    assert_eq!(lab.counters().echo_answered, 9);
}

#[test]
fn who_tries_whether_its_address_is_free_learns_that_it_is_not() {
    let mut lab = Lab::new([]);
    let mut frame = solicitation(0);
    frame[22..38].fill(0);
    let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    let mut icmp = frame[54..78].to_vec();
    icmp[2..4].fill(0);
    finish6(&mut icmp, Ipv6Addr::UNSPECIFIED, group);
    let probe = ethernet(
        [0x33, 0x33, 0xff, 0, 0, 1],
        host_mac(0),
        0x86dd,
        &v6(58, 255, Ipv6Addr::UNSPECIFIED, group, &icmp),
    );
    let told = &lab.pass(0, &probe, 0)[0];
    assert_eq!(
        (&told[..6], told[54], told[58]),
        (&[0x33, 0x33, 0, 0, 0, 1][..], 136, 0xa0)
    );
    assert_eq!(lab.counters().neighbours, 0);
}

#[test]
fn errors_say_what_became_of_a_packet_and_quote_it() {
    let mut lab = Lab::new([]);
    lab.greet();
    let router = IpAddr::from(Ipv4Addr::new(10, 0, 0, 1));
    let big = udp(0, [10, 0, 2, 9], 64, 1_400, 0x40);
    let cases = [
        (
            udp(0, [10, 0, 1, 9], 1, 18, 0),
            (11, 0, 0),
            DropReason::TtlExpired,
        ),
        (
            udp(0, [9, 9, 9, 9], 64, 18, 0),
            (3, 0, 0),
            DropReason::NoRoute,
        ),
        (big, (3, 4, 1_280), DropReason::TooBig),
        (udp6(0, host6(1), 1, 18), (3, 0, 0), DropReason::TtlExpired),
        (
            udp6(0, "2001:db8::1".parse().unwrap(), 64, 18),
            (1, 0, 0),
            DropReason::NoRoute,
        ),
        (
            udp6(0, host6(2), 64, 1_300),
            (2, 0, 1_280),
            DropReason::TooBig,
        ),
    ];
    for (frame, (kind, code, rest), reason) in cases {
        let before = lab.drops(reason);
        let told = lab.pass(0, &frame, 0);
        assert_eq!(told.len(), 1, "{kind}/{code}");
        let (found_kind, found_code, found_rest, quoted) = error_in(&told[0]);
        assert_eq!((found_kind, found_code, found_rest), (kind, code, rest));
        assert_eq!(quoted, &frame[14..14 + quoted.len()]);
        let most = if frame[12] == 8 { 548 } else { 1_232 };
        assert_eq!(quoted.len(), most.min(frame.len() - 14));
        assert_eq!(lab.drops(reason), before + 1);
        if frame[12] == 8 {
            assert_eq!(
                IpAddr::from(<[u8; 4]>::try_from(&told[0][26..30]).unwrap()),
                router
            );
        }
    }
    // A port nobody listens at.
    assert_eq!(
        error_in(&lab.pass(0, &udp(0, [10, 0, 0, 1], 64, 18, 0), 0)[0]).1,
        3
    );
    assert_eq!(
        error_in(&lab.pass(0, &udp6(0, "fd00::1".parse().unwrap(), 64, 18), 0)[0]).1,
        4
    );
}

/// A segment that opens a connection, or has these flags, from host 0.
fn segment(to: IpAddr, flags: u8) -> Vec<u8> {
    let mut payload = vec![0x0f, 0xa0, 0, 80, 0, 0, 0, 9, 0, 0, 0, 77, 0x50, flags];
    payload.extend([1, 0, 0, 0, 0, 0]);
    let (ends, kind) = match to {
        IpAddr::V4(to) => ([[10, 0, 0, 9], to.octets()].concat(), 0x0800),
        IpAddr::V6(to) => ([host6(0).octets(), to.octets()].concat(), 0x86dd),
    };
    let pseudo = Sum::of(&ends).and_word(6).and_word(20);
    let sum = pseudo.and(Sum::of(&payload)).checksum();
    payload[16..18].copy_from_slice(&sum.to_be_bytes());
    let packet = match to {
        IpAddr::V4(to) => v4(0, 64, 6, [10, 0, 0, 9], to.octets(), &payload),
        IpAddr::V6(to) => v6(6, 64, host6(0), to, &payload),
    };
    ethernet(router_mac(0), host_mac(0), kind, &packet)
}

#[test]
fn what_it_does_not_serve_is_refused_and_not_too_often() {
    let mut lab = Lab::new([]);
    lab.greet();
    for (to, above) in [("10.0.0.1", 34), ("10.0.1.1", 34), ("fd00::1", 54)] {
        let to: IpAddr = to.parse().unwrap();
        let told = lab.pass(0, &segment(to, 2), 0);
        assert_eq!(
            &told[0][above..above + 14],
            [0, 80, 0x0f, 0xa0, 0, 0, 0, 0, 0, 0, 0, 10, 0x50, 0x14]
        );
        let told = lab.pass(0, &segment(to, 0x10), 0);
        assert_eq!(&told[0][above + 4..above + 8], [0, 0, 0, 77]);
        assert!(lab.pass(0, &segment(to, 4), 0).is_empty(), "a reset");
        let mut wrong = segment(to, 2);
        wrong[above + 17] ^= 1;
        let malformed = lab.drops(DropReason::Malformed);
        assert!(lab.pass(0, &wrong, 0).is_empty());
        assert_eq!(lab.drops(DropReason::Malformed), malformed + 1);
    }
    let packet = v4(0, 64, 253, [10, 0, 0, 9], [10, 0, 0, 1], b"what?");
    let frame = ethernet(router_mac(0), host_mac(0), 0x0800, &packet);
    let told = lab.pass(0, &frame, 0);
    assert_eq!((error_in(&told[0]).0, error_in(&told[0]).1), (3, 2));
    let to = "fd00::1".parse().unwrap();
    let packet = v6(253, 64, host6(0), to, b"what?");
    let told = lab.pass(0, &ethernet(router_mac(0), host_mac(0), 0x86dd, &packet), 0);
    assert_eq!(error_in(&told[0]).2, 6, "where the header is named");
    let before = lab.counters();
    for _ in 0..2_000 {
        lab.pass(0, &segment([10, 0, 0, 1].into(), 2), 0);
    }
    let after = lab.counters();
    assert!(after.errors_sent <= before.errors_sent + 1_000);
    assert_eq!(
        after.errors_sent + after.errors_suppressed,
        before.errors_sent + before.errors_suppressed + 2_000
    );
}

#[test]
fn what_is_behind_a_packet_does_not_go_on_with_it() {
    let mut lab = Lab::new([]);
    lab.greet();
    for len in [0, 10, 150, 400] {
        let frames = [
            udp(0, [10, 0, 1, 9], 64, len, 0),
            udp6(0, host6(1), 64, len),
        ];
        for frame in frames {
            for more in [1, 18, 200, 900] {
                let mut longer = frame.clone();
                longer.extend(vec![0xee; more]);
                assert_eq!(lab.pass(0, &longer, 1), [forwarded(&frame, 1)]);
            }
        }
    }
}

#[test]
fn nobody_is_told_of_errors_about_errors_and_not_too_often() {
    let mut lab = Lab::new([]);
    lab.greet();
    let error = ethernet(
        router_mac(0),
        host_mac(0),
        0x0800,
        &v4(
            0,
            1,
            1,
            [10, 0, 0, 9],
            [10, 0, 1, 9],
            &[3, 1, 0, 0, 0, 0, 0, 0],
        ),
    );
    assert!(lab.pass(0, &error, 0).is_empty());
    let mut later = udp(0, [10, 0, 1, 9], 1, 18, 0);
    later[21] = 5;
    later[24..26].fill(0);
    let sum = Sum::of(&later[14..34]).checksum();
    later[24..26].copy_from_slice(&sum.to_be_bytes());
    assert!(lab.pass(0, &later, 0).is_empty(), "a later fragment");
    let burst = vec![(udp(0, [10, 0, 1, 9], 1, 18, 0), Offload::default()); 64];
    for _ in 0..10 {
        lab.put(0, &burst);
    }
    let (told, counters) = (lab.take(0).len() as u64, lab.counters());
    assert_eq!(told, counters.errors_sent);
    assert_eq!(told + counters.errors_suppressed, 640);
    assert_eq!(told, 64, "as many as may come at once");
}

#[test]
fn what_is_too_long_is_cut_where_that_is_allowed() {
    let mut lab = Lab::new([]);
    lab.greet();
    let frame = udp(0, [10, 0, 2, 9], 64, 1_400, 0);
    let parts = lab.pass(0, &frame, 2);
    assert_eq!(parts.len(), 2);
    let mut whole = Vec::new();
    for (k, part) in parts.iter().enumerate() {
        assert!(part.len() <= 14 + 1_280);
        assert_eq!(Sum::of(&part[14..34]).checksum(), 0);
        assert_eq!((&part[18..20], part[22]), (&[0x12, 0x34][..], 63));
        let place = u16::from_be_bytes([part[20], part[21]]);
        assert_eq!(place & 0x2000 != 0, k == 0);
        assert_eq!(usize::from(place & 0x1fff) * 8, whole.len());
        whole.extend_from_slice(&part[34..]);
    }
    assert_eq!(whole, frame[34..]);
    assert_eq!(lab.counters().fragmented, 1);
}

#[test]
fn frames_that_are_still_to_be_cut_pass_as_they_are_if_their_segments_fit() {
    let mut lab = Lab::new([]);
    lab.greet();
    let tcp = |to: u8, flags| {
        let mut payload = vec![
            0, 7, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
        ];
        payload.resize(20 + 8_000, 3);
        ethernet(
            router_mac(0),
            host_mac(0),
            0x0800,
            &v4(flags, 64, 6, [10, 0, 0, 9], [10, 0, to, 9], &payload),
        )
    };
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        gso_type: Offload::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1_460,
        csum_start: 34,
        csum_offset: 16,
    };
    lab.put(0, &[(tcp(1, 0x40), offload)]);
    let mut burst = Burst::new();
    assert_eq!(lab.hosts[1].rx(&mut burst), 1);
    assert_eq!((burst.frame_len(0), burst.offload(0)), (8_054, offload));
    // Segments of 1500 bytes do not fit 1280: their sender is told, or they are cut.
    lab.put(0, &[(tcp(2, 0x40), offload)]);
    assert_eq!(error_in(&lab.take(0)[0]).2, 1_280);
    lab.put(0, &[(tcp(2, 0), offload)]);
    let parts = lab.take(2);
    assert_eq!(parts.len(), 11, "five of six segments in two");
    assert!(parts.iter().all(|part| part.len() <= 1_294));
}

#[test]
fn what_is_not_for_it_is_dropped_by_reason() {
    let mut lab = Lab::new([]);
    lab.greet();
    let good = udp(0, [10, 0, 1, 9], 64, 18, 0);
    let changed = |at: usize, to: u8| {
        let mut frame = good.clone();
        frame[at] = to;
        if (14..24).contains(&at) || (26..34).contains(&at) {
            frame[24..26].fill(0);
            let sum = Sum::of(&frame[14..34]).checksum();
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        frame
    };
    for (frame, reason) in [
        (changed(5, 0x77), DropReason::NotForUs),
        (changed(13, 0x99), DropReason::UnknownProtocol),
        (changed(14, 0x65), DropReason::Malformed),
        (changed(14, 0x44), DropReason::Malformed),
        (changed(16, 9), DropReason::Malformed),
        (changed(24, 0x11), DropReason::Malformed),
        (changed(26, 127), DropReason::Martian),
        (changed(26, 230), DropReason::Martian),
        (changed(30, 230), DropReason::NotForUs),
        (changed(33, 255), DropReason::NotForUs),
        (good[..20].to_vec(), DropReason::Malformed),
    ] {
        let before = lab.drops(reason);
        lab.put(0, &[(frame, Offload::default())]);
        assert_eq!(lab.drops(reason), before + 1, "{reason:?}");
    }
    assert!(lab.take(0).is_empty() && lab.take(1).is_empty());
}

#[test]
fn whatever_comes_the_books_are_exact() {
    let mut random = Random::new(7);
    let mut lab = Lab::new([route("0.0.0.0/0", "10.0.1.9"), route("::/0", "fd00:2::9")]);
    lab.greet();
    for _ in 0..3_000 {
        let n = random.below(3) as u8;
        let to = [10, 0, random.below(4) as u8, random.below(12) as u8];
        let far = Ipv6Addr::new(
            0xfd00,
            random.below(4) as u16,
            0,
            0,
            0,
            0,
            0,
            random.below(12) as u16,
        );
        let mut frame = match random.below(5) {
            0 => udp(
                n,
                to,
                random.below(4) as u8,
                random.below(1_473),
                random.below(8) as u8 * 32,
            ),
            1 => udp6(n, far, random.below(4) as u8, random.below(1_400)),
            2 => arp_request(n),
            3 => solicitation(n),
            _ => udp(n, to, 64, random.below(300), 0),
        };
        for _ in 0..random.below(3) {
            let at = random.below(frame.len().min(90));
            frame[at] = random.below(256) as u8;
        }
        if random.one_in(4) {
            frame.truncate(14 + random.below(frame.len() - 13));
        }
        let offload = Offload {
            flags: random.below(2) as u8,
            gso_type: [0, 0, 1, 4, 5][random.below(5)],
            gso_size: random.below(2_000) as u16,
            csum_start: 34,
            csum_offset: 6,
            ..Offload::default()
        };
        let offload = if offload.fits(frame.len() as u32) {
            offload
        } else {
            Offload::default()
        };
        lab.put(usize::from(n), &[(frame, offload)]);
        if random.one_in(50) {
            lab.breathe(SECOND / 2);
        }
        for n in 0..3 {
            lab.take(n);
        }
    }
}

#[test]
fn tables_that_cannot_be_are_refused_by_what_is_wrong() {
    let refused = |interfaces: Vec<RouterInterface>, routes: &[Route]| {
        RouterTables::new(interfaces, routes.iter().copied())
            .unwrap_err()
            .to_string()
    };
    let all = || (0..3).map(interface).collect::<Vec<_>>();
    assert!(refused(vec![interface(0), interface(0)], &[]).contains("gate 0 has two"));
    assert!(refused(all(), &[route("0.0.0.0/0", "192.0.2.1")]).contains("on no link"));
    assert!(refused(all(), &[route("0.0.0.0/0", "10.0.1.1")]).contains("is this router"));
    assert!(refused(all(), &[route("::/0", "10.0.1.9")]).contains("of the other kind"));
    assert!(refused(all(), &[route("10.0.0.0/33", "10.0.1.9")]).contains("0 to 32 bits"));
    let mut small = interface(0);
    small.mtu = 1_000;
    assert!(refused(vec![small], &[]).contains("from 1280"));
}
