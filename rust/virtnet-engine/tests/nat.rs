//! A router that translates: flows out and back, services, errors, and what does not get through.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and their numbers are small"
)]

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;

use virtnet_engine::{
    Change, FunctionDetail, Node, NodeId, Place, Router, RouterCounters, RouterInterface,
    RouterOrders, RouterTables, Service, Translation, Worker,
};
use virtnet_packet::checksum::Sum;
use virtnet_packet::header::Mac;
use virtnet_packet::{Burst, DropReason, MemoryPort, Offload, Picks, Port, memory_pair};

const ROUTER: NodeId = NodeId(9);
const SECOND: u64 = 1_000_000_000;
const INSIDE: usize = 0;
const OUTSIDE: usize = 1;

type End = ([u8; 4], u16);
const GUEST: End = ([10, 0, 0, 9], 5_000);
const SERVER: End = ([192, 0, 2, 9], 80);
const OUTER: [u8; 4] = [192, 0, 2, 1];

const UDP: u8 = 17;
const TCP: u8 = 6;

/// The inside is `10.0.0.0/24` at gate 0, the outside `192.0.2.0/24` at gate 1; on either the router is `.1`.
struct Lab {
    worker: Worker,
    hosts: Vec<MemoryPort>,
    now: u64,
}

fn orders(
    outside: Vec<u16>,
    pool: Vec<[u8; 4]>,
    services: Vec<Service>,
    flows: usize,
) -> RouterOrders {
    let interface = |gate: u16, ip: [u8; 4], more: &[[u8; 4]]| RouterInterface {
        gate,
        mac: Mac([2, 0, 0, 0, 1, gate as u8]),
        mtu: 1_500,
        addresses: std::iter::once((ip.into(), 24))
            .chain(more.iter().map(|&ip| (ip.into(), 32)))
            .collect(),
    };
    let interfaces = vec![interface(0, [10, 0, 0, 1], &[]), interface(1, OUTER, &pool)];
    let pool = pool.into_iter().map(Ipv4Addr::from).collect();
    RouterOrders {
        tables: Arc::new(RouterTables::new(interfaces, []).unwrap()),
        errors_pps: 1_000,
        translation: Some(Arc::new(Translation::new(outside, pool, services, flows))),
    }
}

fn service(protocol: u8, at: End, backends: &[End]) -> Service {
    Service {
        protocol,
        at: (at.0.into(), at.1),
        backends: backends
            .iter()
            .map(|&(ip, port)| (ip.into(), port))
            .collect(),
    }
}

impl Lab {
    fn new(orders: RouterOrders) -> Self {
        let mut change = Change::new().add(ROUTER, Router::new(orders).unwrap());
        let mut hosts = Vec::new();
        for n in 0..2 {
            let (inside, outside) = memory_pair(4_096);
            let node = NodeId(u32::from(n));
            change = change
                .add(node, Node::from(inside))
                .connect(node, Place::new(ROUTER, n));
            hosts.push(outside);
        }
        let mut worker = Worker::new();
        worker.apply(change, 0).unwrap();
        let mut lab = Self {
            worker,
            hosts,
            now: SECOND,
        };
        for (n, ips) in [(0, [10, 0, 0]), (1, [192, 0, 2])].into_iter() {
            for last in 2..30 {
                let mut arp = vec![0xff; 6];
                arp.extend([2, 0, 0, 0, n as u8, last, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
                arp.extend([2, 0, 0, 0, n as u8, last]);
                arp.extend(ips);
                arp.extend([last, 0, 0, 0, 0, 0, 0]);
                arp.extend(ips);
                arp.push(1);
                assert_eq!(lab.pass(n, arp, n).len(), 1);
            }
        }
        lab
    }

    fn pass(&mut self, from: usize, frame: Vec<u8>, to: usize) -> Vec<Vec<u8>> {
        self.pass_with(from, frame, Offload::default(), to)
    }

    fn pass_with(
        &mut self,
        from: usize,
        frame: Vec<u8>,
        offload: Offload,
        to: usize,
    ) -> Vec<Vec<u8>> {
        let mut burst = Burst::new();
        burst.push_bytes(&frame, offload);
        assert_eq!(self.hosts[from].tx(&burst, &Picks::first(1)), 1);
        for _ in 0..2 {
            self.worker.step(self.now);
        }
        assert!(self.worker.snapshot(self.now).balance.is_exact());
        common::take(&mut self.hosts[to])
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

fn framed(gate: usize, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![
        2, 0, 0, 0, 1, gate as u8, 2, 0, 0, 0, gate as u8, packet[15], 8, 0,
    ];
    frame.extend(packet);
    frame
}

fn ip(protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let len = (20 + payload.len() as u16).to_be_bytes();
    let mut packet = vec![
        0x45, 0, len[0], len[1], 0x12, 0x34, 0, 0, 64, protocol, 0, 0,
    ];
    packet.extend(from);
    packet.extend(to);
    let sum = Sum::of(&packet).checksum();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn pseudo(protocol: u8, from: [u8; 4], to: [u8; 4], len: usize) -> Sum {
    Sum::of(&[from, to].concat())
        .and_word(u16::from(protocol))
        .and_word(len as u16)
}

/// A packet with all checksums, of TCP with these flags.
fn packet(protocol: u8, from: End, to: End, flags: u8, data: &[u8]) -> Vec<u8> {
    let mut payload = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    let at = if protocol == TCP {
        payload.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 1, 0, 0, 0, 0, 0]);
        16
    } else {
        payload.extend((8 + data.len() as u16).to_be_bytes());
        payload.extend([0, 0]);
        6
    };
    payload.extend(data);
    let sum = pseudo(protocol, from.0, to.0, payload.len()).and(Sum::of(&payload));
    payload[at..at + 2].copy_from_slice(&sum.checksum_not_zero().to_be_bytes());
    ip(protocol, from.0, to.0, &payload)
}

fn ping(kind: u8, from: [u8; 4], to: [u8; 4], id: u16) -> Vec<u8> {
    let mut icmp = vec![kind, 0, 0, 0];
    icmp.extend(id.to_be_bytes());
    icmp.extend([0, 1, 7, 8, 9, 10]);
    let sum = Sum::of(&icmp).checksum();
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    ip(1, from, to, &icmp)
}

fn error(from: [u8; 4], to: [u8; 4], about: &[u8]) -> Vec<u8> {
    let mut icmp = vec![3, 4, 0, 0, 0, 0, 5, 0];
    icmp.extend(&about[..about.len().min(100)]);
    let sum = Sum::of(&icmp).checksum();
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    ip(1, from, to, &icmp)
}

/// Both ends of a packet with ports, its checksums checked.
fn ends(frame: &[u8]) -> (End, End) {
    let packet = &frame[14..];
    assert_eq!(Sum::of(&packet[..20]).checksum(), 0, "header");
    let ip = |at: usize| <[u8; 4]>::try_from(&packet[at..at + 4]).unwrap();
    let len = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let (from, to, body) = (ip(12), ip(16), &packet[20..len]);
    assert_eq!(
        pseudo(packet[9], from, to, body.len())
            .and(Sum::of(body))
            .checksum(),
        0,
        "transport"
    );
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    ((from, port(0)), (to, port(2)))
}

fn masquerade() -> Lab {
    Lab::new(orders(vec![1], vec![], vec![], 1_000))
}

#[test]
fn a_flow_goes_out_by_the_outer_address_and_its_answers_find_back() {
    for protocol in [UDP, TCP] {
        let mut lab = masquerade();
        for data in [&b""[..], b"x", &[7; 400]] {
            let out = lab.pass(
                INSIDE,
                framed(0, &packet(protocol, GUEST, SERVER, 0x10, data)),
                OUTSIDE,
            );
            assert_eq!(ends(&out[0]), ((OUTER, 5_000), SERVER));
            assert_eq!(out[0][22], 63);
            let back = lab.pass(
                OUTSIDE,
                framed(1, &packet(protocol, SERVER, (OUTER, 5_000), 0x10, data)),
                INSIDE,
            );
            assert_eq!(ends(&back[0]), (SERVER, GUEST));
        }
        assert_eq!(lab.counters().flows, 1);
    }
}

#[test]
fn two_stations_with_one_port_are_told_apart() {
    let mut lab = masquerade();
    let other = ([10, 0, 0, 8], 5_000);
    let first = ends(
        &lab.pass(
            INSIDE,
            framed(0, &packet(UDP, GUEST, SERVER, 0, b"a")),
            OUTSIDE,
        )[0],
    )
    .0;
    let second = ends(
        &lab.pass(
            INSIDE,
            framed(0, &packet(UDP, other, SERVER, 0, b"b")),
            OUTSIDE,
        )[0],
    )
    .0;
    assert_eq!((first.0, second.0), (OUTER, OUTER));
    assert_ne!(first.1, second.1);
    for (outer, inner) in [(first, GUEST), (second, other)] {
        let back = lab.pass(
            OUTSIDE,
            framed(1, &packet(UDP, SERVER, outer, 0, b"c")),
            INSIDE,
        );
        assert_eq!(ends(&back[0]), (SERVER, inner));
    }
}

#[test]
fn unfinished_checksums_stay_unfinished_and_right() {
    let mut lab = masquerade();
    let mut frame = framed(0, &packet(TCP, GUEST, SERVER, 0x10, &[1; 3_000]));
    let len = frame.len() - 34;
    let partial = |from: [u8; 4]| !pseudo(TCP, from, SERVER.0, len).checksum();
    frame[50..52].copy_from_slice(&partial(GUEST.0).to_be_bytes());
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        gso_type: Offload::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1_460,
        csum_start: 34,
        csum_offset: 16,
    };
    let out = lab.pass_with(INSIDE, frame, offload, OUTSIDE);
    assert_eq!(out.len(), 1, "it is one frame still");
    assert_eq!(out[0][50..52], partial(OUTER).to_be_bytes());
}

#[test]
fn what_nobody_has_asked_for_does_not_come_in() {
    let mut lab = masquerade();
    lab.pass(
        INSIDE,
        framed(0, &packet(UDP, GUEST, SERVER, 0, b"a")),
        OUTSIDE,
    );
    let elsewhere = ([192, 0, 2, 8], 80);
    for (from, to) in [
        (SERVER, ([10, 0, 0, 9], 5_000)),
        (elsewhere, ([10, 0, 0, 9], 22)),
    ] {
        assert!(
            lab.pass(OUTSIDE, framed(1, &packet(UDP, from, to, 0, b"x")), INSIDE)
                .is_empty()
        );
    }
    assert_eq!(lab.drops(DropReason::NoMapping), 2);
    // To the router's own address, at a port that is nobody's: it answers for itself.
    assert!(
        lab.pass(
            OUTSIDE,
            framed(1, &packet(UDP, elsewhere, (OUTER, 5_000), 0, b"x")),
            INSIDE
        )
        .is_empty()
    );
}

#[test]
fn pings_and_errors_find_back_with_what_they_quote() {
    let mut lab = masquerade();
    let out = &lab.pass(INSIDE, framed(0, &ping(8, GUEST.0, SERVER.0, 77)), OUTSIDE)[0];
    assert_eq!(
        (&out[26..30], &out[38..40], Sum::of(&out[34..]).checksum()),
        (&OUTER[..], &[0, 77][..], 0)
    );
    let back = &lab.pass(OUTSIDE, framed(1, &ping(0, SERVER.0, OUTER, 77)), INSIDE)[0];
    assert_eq!(
        (&back[30..34], Sum::of(&back[34..]).checksum()),
        (&GUEST.0[..], 0)
    );
    for protocol in [UDP, TCP] {
        for data in [&b""[..], b"odd", &[5; 200]] {
            let out = lab.pass(
                INSIDE,
                framed(0, &packet(protocol, GUEST, SERVER, 0x10, data)),
                OUTSIDE,
            );
            // From a router in the middle.
            let middle = [192, 0, 2, 20];
            let told = error(middle, OUTER, &out[0][14..]);
            let back = &lab.pass(OUTSIDE, framed(1, &told), INSIDE)[0];
            assert_eq!((&back[26..30], &back[30..34]), (&middle[..], &GUEST.0[..]));
            assert_eq!(Sum::of(&back[14..34]).checksum(), 0);
            assert_eq!(
                Sum::of(&back[34..]).checksum(),
                0,
                "{protocol} {}",
                data.len()
            );
            let mut quoted = back[42..].to_vec();
            assert_eq!(Sum::of(&quoted[..20]).checksum(), 0, "the quoted header");
            assert_eq!(
                (&quoted[12..16], &quoted[20..22]),
                (&GUEST.0[..], &GUEST.1.to_be_bytes()[..])
            );
            if data.len() < 60 {
                quoted.splice(0..0, [0; 14]);
                assert_eq!(ends(&quoted), (GUEST, SERVER));
            }
        }
    }
    // An error about a ping.
    let out = lab.pass(INSIDE, framed(0, &ping(8, GUEST.0, SERVER.0, 78)), OUTSIDE);
    let back = &lab.pass(
        OUTSIDE,
        framed(1, &error(SERVER.0, OUTER, &out[0][14..])),
        INSIDE,
    )[0];
    assert_eq!(
        (&back[30..34], Sum::of(&back[34..]).checksum()),
        (&GUEST.0[..], 0)
    );
    // About nothing that was sent: it ends in the router.
    let other = packet(UDP, (OUTER, 9), SERVER, 0, b"x");
    assert!(
        lab.pass(OUTSIDE, framed(1, &error(SERVER.0, OUTER, &other)), INSIDE)
            .is_empty()
    );
}

#[test]
fn services_are_reached_from_outside_and_from_inside() {
    let web = (OUTER, 8_080);
    let mut lab = Lab::new(orders(
        vec![1],
        vec![],
        vec![service(TCP, web, &[([10, 0, 0, 5], 80)])],
        1_000,
    ));
    let client = ([192, 0, 2, 7], 40_000);
    let there = ([10, 0, 0, 5], 80);
    let out = lab.pass(
        OUTSIDE,
        framed(1, &packet(TCP, client, web, 2, b"")),
        INSIDE,
    );
    assert_eq!(ends(&out[0]), (client, there));
    let back = lab.pass(
        INSIDE,
        framed(0, &packet(TCP, there, client, 0x12, b"")),
        OUTSIDE,
    );
    assert_eq!(ends(&back[0]), (web, client));
    // An error from inside is shown as the service's.
    let told = error(there.0, client.0, &out[0][14..]);
    let shown = &lab.pass(INSIDE, framed(0, &told), OUTSIDE)[0];
    assert_eq!(
        (&shown[26..30], Sum::of(&shown[34..]).checksum()),
        (&OUTER[..], 0)
    );
    assert_eq!(&shown[58..62], &OUTER);
    // From the service's own link, by the outer address.
    let out = lab.pass(INSIDE, framed(0, &packet(TCP, GUEST, web, 2, b"")), INSIDE);
    assert_eq!(ends(&out[0]), ((OUTER, 5_000), there));
    let back = lab.pass(
        INSIDE,
        framed(0, &packet(TCP, there, (OUTER, 5_000), 0x12, b"")),
        INSIDE,
    );
    assert_eq!(ends(&back[0]), (web, GUEST));
}

#[test]
fn fragments_follow_the_first() {
    let whole = packet(UDP, GUEST, SERVER, 0, &[9; 64]);
    let part = |from: usize, to: usize, more: bool| {
        let mut part = ip(UDP, GUEST.0, SERVER.0, &whole[20 + from..20 + to]);
        part[6..8].copy_from_slice(&(u16::from(more) << 13 | (from as u16 / 8)).to_be_bytes());
        part[10..12].fill(0);
        let sum = Sum::of(&part[..20]).checksum();
        part[10..12].copy_from_slice(&sum.to_be_bytes());
        framed(0, &part)
    };
    let offset =
        |frame: &[u8]| usize::from(u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff) * 8;
    let parts = [(0, 24, true), (24, 48, true), (48, 72, false)];
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for order in orders {
        let mut lab = masquerade();
        let mut out = Vec::new();
        for k in order {
            let (from, to, more) = parts[k];
            out.extend(lab.pass(INSIDE, part(from, to, more), OUTSIDE));
        }
        out.sort_by_key(|frame| offset(frame));
        assert_eq!(out.len(), 3, "{order:?}");
        for frame in &out {
            let sum = Sum::of(&frame[14..34]).checksum();
            assert_eq!((&frame[26..30], sum), (&OUTER[..], 0));
        }
        let bodies = out.iter().flat_map(|frame| frame[34..].to_vec());
        let mut joined = ip(UDP, OUTER, SERVER.0, &bodies.collect::<Vec<u8>>());
        joined.splice(0..0, [0; 14]);
        assert_eq!(ends(&joined), ((OUTER, 5_000), SERVER));
    }
    // Some whose first never comes.
    let mut lab = masquerade();
    for _ in 0..200 {
        assert!(lab.pass(INSIDE, part(48, 72, false), OUTSIDE).is_empty());
    }
    assert_eq!(lab.drops(DropReason::Fragment), 72);
    lab.now += 3 * SECOND;
    assert!(lab.pass(INSIDE, vec![0; 60], OUTSIDE).is_empty());
    assert_eq!(lab.drops(DropReason::Fragment), 200);
}

#[test]
fn fragments_to_a_service_wait_and_others_between_insides_do_not() {
    let at = ([10, 0, 0, 1], 53);
    let services = vec![service(UDP, at, &[SERVER])];
    let mut lab = Lab::new(orders(vec![], vec![], services, 10));
    let part = |to: End, from: usize, end: usize, more: bool| {
        let whole = packet(UDP, GUEST, to, 0, &[9; 40]);
        let mut part = ip(UDP, GUEST.0, to.0, &whole[20 + from..20 + end]);
        part[6..8].copy_from_slice(&(u16::from(more) << 13 | (from as u16 / 8)).to_be_bytes());
        part[10..12].fill(0);
        let sum = Sum::of(&part[..20]).checksum();
        part[10..12].copy_from_slice(&sum.to_be_bytes());
        framed(0, &part)
    };
    let direct = lab.pass(INSIDE, part(SERVER, 16, 48, false), OUTSIDE);
    assert_eq!(direct.len(), 1);
    assert!(
        lab.pass(INSIDE, part(at, 16, 48, false), OUTSIDE)
            .is_empty()
    );
    let both = lab.pass(INSIDE, part(at, 0, 16, true), OUTSIDE);
    let to: Vec<&[u8]> = both.iter().map(|frame| &frame[30..34]).collect();
    assert_eq!(to, [&SERVER.0, &SERVER.0]);
}

#[test]
fn a_pool_has_a_place_for_each_and_tables_have_an_end() {
    let pool = vec![[192, 0, 2, 100], [192, 0, 2, 101]];
    let mut lab = Lab::new(orders(vec![1], pool.clone(), vec![], 10));
    for last in 2..12 {
        for port in [1, 2] {
            let from = ([10, 0, 0, last], port);
            let out = lab.pass(
                INSIDE,
                framed(0, &packet(UDP, from, SERVER, 0, b"")),
                OUTSIDE,
            );
            if (last - 2) * 2 + port as u8 <= 10 {
                assert_eq!(ends(&out[0]).0.0, pool[usize::from(last) % 2]);
            } else {
                assert!(out.is_empty());
            }
        }
    }
    assert_eq!(lab.drops(DropReason::TableFull), 10);
    assert_eq!(lab.counters().flows, 10);
    // Their time is over.
    lab.now += 301 * SECOND;
    let mut arp = Lab::new(orders(vec![1], vec![], vec![], 1));
    assert_eq!(arp.counters().flows, 0);
    lab.worker.step(lab.now);
    assert_eq!(
        (lab.counters().flows, lab.counters().flows_expired),
        (0, 10)
    );
    arp.now += 1;
}

#[test]
fn connections_last_longer_than_what_opens_or_closes() {
    let mut lab = masquerade();
    let out = |lab: &mut Lab, flags| {
        lab.pass(
            INSIDE,
            framed(0, &packet(TCP, GUEST, SERVER, flags, b"")),
            OUTSIDE,
        )
    };
    let back = |lab: &mut Lab, flags| {
        lab.pass(
            OUTSIDE,
            framed(1, &packet(TCP, SERVER, (OUTER, 5_000), flags, b"")),
            INSIDE,
        )
    };
    out(&mut lab, 2);
    back(&mut lab, 0x12);
    lab.now += 7_000 * SECOND;
    lab.worker.step(lab.now);
    assert_eq!(lab.counters().flows, 1);
    out(&mut lab, 0x11);
    lab.now += 241 * SECOND;
    lab.worker.step(lab.now);
    assert_eq!(lab.counters().flows, 0);
}

#[test]
fn back_ends_share_flows_and_those_that_have_begun_stay() {
    let vip = (OUTER, 80);
    let farm: Vec<End> = (5..9).map(|last| ([10, 0, 0, last], 8_000)).collect();
    let balance = |ends: &[End]| orders(vec![], vec![], vec![service(TCP, vip, ends)], 10_000);
    let mut lab = Lab::new(balance(&farm));
    let client = |port: u16| ([192, 0, 2, 7], port);
    let mut before = Vec::new();
    for port in 1_000..1_400 {
        let out = lab.pass(
            OUTSIDE,
            framed(1, &packet(TCP, client(port), vip, 2, b"")),
            INSIDE,
        );
        let (from, to) = ends(&out[0]);
        assert_eq!(from, client(port));
        before.push(to);
    }
    for end in &farm {
        let share = before.iter().filter(|to| *to == end).count();
        assert!((60..140).contains(&share), "{share} of 400");
    }
    let back = lab.pass(
        INSIDE,
        framed(0, &packet(TCP, before[0], client(1_000), 0x12, b"")),
        OUTSIDE,
    );
    assert_eq!(ends(&back[0]), (vip, client(1_000)));
    lab.worker
        .apply(Change::new().update(ROUTER, balance(&farm[..3])), lab.now)
        .unwrap();
    let mut moved = 0;
    for (port, &was) in (1_000..1_400).zip(&before) {
        let out = lab.pass(
            OUTSIDE,
            framed(1, &packet(TCP, client(port), vip, 0x10, b"")),
            INSIDE,
        );
        assert_eq!(ends(&out[0]).1, was, "it has begun");
        // The same ports, to a table without their flows.
        let mut fresh = port;
        fresh += 10_000;
        let out = lab.pass(
            OUTSIDE,
            framed(1, &packet(TCP, client(fresh), vip, 2, b"")),
            INSIDE,
        );
        moved += u32::from(!farm[..3].contains(&ends(&out[0]).1));
    }
    assert_eq!(moved, 0, "nothing new goes to the one that has gone");
    assert_eq!(lab.counters().flows, 800);
}

#[test]
fn senders_are_told_of_who_does_not_answer_in_their_own_addresses() {
    let mut lab = Lab::new(orders(vec![1], vec![], vec![], 100));
    let nobody = ([192, 0, 2, 99], 80);
    let sent = packet(UDP, GUEST, nobody, 0, b"hello");
    assert_eq!(
        lab.pass(INSIDE, framed(INSIDE, &sent), OUTSIDE).len(),
        1,
        "a question"
    );
    for _ in 0..4 {
        lab.now += SECOND;
        lab.worker.step(lab.now);
    }
    let told = common::take(&mut lab.hosts[INSIDE]);
    let [told] = &told[..] else {
        panic!("{told:02x?}")
    };
    assert_eq!(told[26..30], [10, 0, 0, 1]);
    assert_eq!(told[34..36], [3, 1]);
    let quoted = &told[42..];
    assert_eq!(Sum::of(&quoted[..20]).checksum(), 0);
    assert_eq!(quoted[12..], sent[12..]);
    assert!(lab.worker.snapshot(lab.now).balance.is_exact());
}
