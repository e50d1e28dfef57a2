//! A firewall between two ports: rules, flows, pieces, refusals, and changes while it runs.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking, and their numbers are small"
)]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use common::{put, take};
use virtnet_engine::{
    Action, AddressSet, Change, Ends, Firewall, FirewallCounters, FirewallOrders, FunctionDetail,
    NodeId, Place, Prefix, Rule, RuleSet, Timeouts, Worker,
};
use virtnet_packet::checksum::Sum;
use virtnet_packet::flow::IpVersion;
use virtnet_packet::{DropReason, MemoryPort, memory_pair};

const OUTSIDE: NodeId = NodeId(1);
const INSIDE: NodeId = NodeId(2);
const FIREWALL: NodeId = NodeId(3);
const SECOND: u64 = 1_000_000_000;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn in_() -> IpAddr {
    Ipv4Addr::new(10, 0, 0, 1).into()
}

fn out() -> IpAddr {
    Ipv4Addr::new(192, 0, 2, 1).into()
}

fn in6() -> IpAddr {
    "2001:db8::1".parse::<Ipv6Addr>().unwrap().into()
}

fn out6() -> IpAddr {
    "2001:db8:ffff::1".parse::<Ipv6Addr>().unwrap().into()
}

/// An IP packet in a frame.
fn ip(from: IpAddr, to: IpAddr, protocol: u8, above: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let [a, b] = (20 + above.len() as u16).to_be_bytes();
            let mut header = vec![0x45, 0, a, b, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
            header.extend(from.octets());
            header.extend(to.octets());
            let sum = Sum::of(&header).checksum();
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend([8, 0]);
            frame.extend(header);
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let [a, b] = (above.len() as u16).to_be_bytes();
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, a, b, protocol, 64]);
            frame.extend(from.octets());
            frame.extend(to.octets());
        }
        _ => unreachable!(),
    }
    frame.extend(above);
    frame
}

fn ports(from: u16, to: u16) -> Vec<u8> {
    [from.to_be_bytes(), to.to_be_bytes()].concat()
}

fn udp(from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<u8> {
    let above = [ports(from.1, to.1), vec![0, 12, 0, 0], vec![7; 4]].concat();
    ip(from.0, to.0, 17, &above)
}

struct Tcp {
    from: (IpAddr, u16),
    to: (IpAddr, u16),
    flags: u8,
    sequence: u32,
    acknowledged: u32,
    len: usize,
}

impl Tcp {
    fn frame(&self) -> Vec<u8> {
        let options: &[u8] = match self.flags & SYN {
            0 => &[],
            _ => &[1, 3, 3, 7],
        };
        let header = (5 + options.len() as u8 / 4) << 4;
        let above = [
            &ports(self.from.1, self.to.1),
            &self.sequence.to_be_bytes()[..],
            &self.acknowledged.to_be_bytes(),
            &[header, self.flags, 0x10, 0, 0, 0, 0, 0],
            options,
            &vec![9; self.len],
        ]
        .concat();
        ip(self.from.0, self.to.0, 6, &above)
    }
}

fn tcp(out_to_in: bool, flags: u8, sequence: u32, acknowledged: u32, len: usize) -> Vec<u8> {
    let (inner, outer) = ((in_(), 4_000), (out(), 80));
    let (from, to) = if out_to_in {
        (outer, inner)
    } else {
        (inner, outer)
    };
    Tcp {
        from,
        to,
        flags,
        sequence,
        acknowledged,
        len,
    }
    .frame()
}

fn rule(text: &str, action: Action) -> Rule {
    Rule {
        action,
        came_in_by: None,
        version: None,
        protocols: Vec::new(),
        ethertype: None,
        from: Ends::default(),
        to: Ends::default(),
        filter: None,
        keep_state: false,
        text: text.to_owned(),
    }
}

/// Everything from the inside passes, and what belongs to it.
fn out_keeps() -> Rule {
    Rule {
        came_in_by: Some(1),
        keep_state: true,
        ..rule("pass out keep-state", Action::Pass)
    }
}

fn rules(rules: Vec<Rule>) -> FirewallOrders {
    FirewallOrders {
        rules: Arc::new(RuleSet::new(rules, Vec::new(), Action::Drop, true)),
        timeouts: Timeouts::default(),
    }
}

struct Lab {
    worker: Worker,
    /// Outer ends: of the outside, of the inside.
    ends: [MemoryPort; 2],
    /// What has not arrived.
    missing: Vec<Vec<u8>>,
    now: u64,
}

impl Lab {
    fn new(orders: FirewallOrders, states: usize) -> Self {
        let (a, outside) = memory_pair(256);
        let (b, inside) = memory_pair(256);
        let change = Change::new()
            .add(OUTSIDE, a)
            .add(INSIDE, b)
            .add(FIREWALL, Firewall::new(orders, states))
            .connect(OUTSIDE, Place::new(FIREWALL, 0))
            .connect(INSIDE, Place::new(FIREWALL, 1));
        let mut worker = Worker::new();
        worker.apply(change, 0).unwrap();
        Self {
            worker,
            ends: [outside, inside],
            missing: Vec::new(),
            now: SECOND,
        }
    }

    /// Whether a frame from outside (0) or inside (1) arrives at the other side; and what comes back.
    fn send(&mut self, from: usize, frame: &[u8]) -> (bool, Vec<Vec<u8>>) {
        put(&mut self.ends[from], &[frame.to_vec()]);
        self.worker.step(self.now);
        self.missing.push(frame.to_vec());
        let arrived = take(&mut self.ends[1 - from]);
        for one in &arrived {
            let at = self.missing.iter().rposition(|it| it == one);
            self.missing.remove(at.unwrap());
        }
        let balance = self.worker.snapshot(0).balance;
        assert!(balance.is_exact(), "{balance:?}");
        (
            arrived.contains(&frame.to_vec()),
            take(&mut self.ends[from]),
        )
    }

    fn goes_in(&mut self, frame: &[u8]) -> bool {
        self.send(0, frame).0
    }

    fn goes_out(&mut self, frame: &[u8]) -> bool {
        self.send(1, frame).0
    }

    fn drops(&self) -> Vec<(DropReason, u64)> {
        let snapshot = self.worker.snapshot(0);
        snapshot.functions[0].counters.drops.iter().collect()
    }

    fn counters(&self) -> FirewallCounters {
        match &self.worker.snapshot(0).functions[0].detail {
            FunctionDetail::Firewall(counters) => (**counters).clone(),
            _ => unreachable!(),
        }
    }

    fn order(&mut self, orders: FirewallOrders) {
        let change = Change::new().update(FIREWALL, orders);
        self.worker.apply(change, self.now).unwrap();
    }
}

fn prefix(address: IpAddr, len: u8) -> Prefix {
    let (version, address) = match address {
        IpAddr::V4(address) => (IpVersion::V4, u32::from(address).into()),
        IpAddr::V6(address) => (IpVersion::V6, u128::from(address)),
    };
    Prefix {
        version,
        address,
        len,
    }
}

#[test]
fn the_first_rule_that_matches_counts() {
    let web = Rule {
        protocols: vec![6, 17],
        to: Ends {
            prefixes: vec![prefix(in_(), 24)],
            ports: vec![(80, 80), (8_000, 8_100)],
            ..Ends::default()
        },
        ..rule("web", Action::Pass)
    };
    let others = Rule {
        came_in_by: Some(0),
        from: Ends {
            not: true,
            prefixes: vec![prefix(out(), 24)],
            ..Ends::default()
        },
        ..rule("others", Action::Drop)
    };
    let six = Rule {
        version: Some(IpVersion::V6),
        ..rule("six", Action::Pass)
    };
    let arp = Rule {
        ethertype: Some(0x0806),
        ..rule("arp", Action::Pass)
    };
    let mut lab = Lab::new(rules(vec![others, web, six, arp]), 10);
    assert!(lab.goes_in(&udp((out(), 9), (in_(), 80))));
    assert!(lab.goes_in(&udp((out(), 9), (in_(), 8_050))));
    assert!(!lab.goes_in(&udp((out(), 9), (in_(), 81))));
    let stranger: IpAddr = Ipv4Addr::new(198, 51, 100, 1).into();
    assert!(!lab.goes_in(&udp((stranger, 9), (in_(), 80))));
    assert!(lab.goes_out(&udp((stranger, 9), (in_(), 80))));
    assert!(!lab.goes_in(&udp((in6(), 9), (out6(), 80))));
    assert!(lab.goes_out(&udp((in6(), 9), (out6(), 81))));
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6]);
    arp.resize(60, 0);
    assert!(lab.goes_in(&arp));
    arp[13] = 7;
    assert!(!lab.goes_in(&arp));
    let counted: Vec<_> = lab
        .counters()
        .rules
        .iter()
        .map(|rule| rule.packets)
        .collect();
    assert_eq!(counted, [2, 3, 1, 1, 2]);
    assert_eq!(lab.drops(), [(DropReason::Filtered, 4)]);
}

#[test]
fn a_connection_passes_from_its_beginning_to_its_end_and_nothing_else() {
    let mut lab = Lab::new(rules(vec![out_keeps()]), 10);
    assert!(!lab.goes_in(&tcp(true, SYN, 1, 0, 0)), "nobody asked");
    assert!(!lab.goes_out(&tcp(false, ACK, 1, 1, 0)), "nothing began");
    assert!(lab.goes_out(&tcp(false, SYN, 999, 0, 0)));
    assert!(lab.goes_out(&tcp(false, SYN, 1_000, 0, 0)), "asked anew");
    assert!(
        !lab.goes_in(&tcp(true, ACK, 5_000, 1_001, 9)),
        "not agreed yet"
    );
    assert!(!lab.goes_in(&tcp(true, SYN | ACK, 5_000, 7_777_777, 0)));
    assert!(lab.goes_in(&tcp(true, SYN | ACK, 5_000, 1_001, 0)));
    assert!(lab.goes_out(&tcp(false, ACK, 1_001, 5_001, 0)));
    assert!(lab.goes_out(&tcp(false, ACK, 1_001, 5_001, 100)));
    assert!(lab.goes_in(&tcp(true, ACK, 5_001, 1_101, 1_400)));
    assert!(
        lab.goes_in(&tcp(true, ACK, 5_001, 1_101, 1_400)),
        "once more"
    );
    // A stranger who guesses ports must guess the place, too: the window is 0x1000 << 7.
    assert!(!lab.goes_in(&tcp(true, ACK, 6_401 + (0x1000 << 7), 1_101, 10)));
    assert!(!lab.goes_in(&tcp(true, RST, 3_000_000_000, 0, 0)));
    assert!(
        !lab.goes_in(&tcp(true, ACK, 6_401, 1_102, 0)),
        "was not sent"
    );
    assert!(lab.goes_in(&tcp(true, FIN | ACK, 6_401, 1_101, 0)));
    assert!(lab.goes_out(&tcp(false, FIN | ACK, 1_101, 6_402, 0)));
    assert!(lab.goes_in(&tcp(true, ACK, 6_402, 1_102, 0)));
    // The same ports again.
    assert!(lab.goes_out(&tcp(false, SYN, 900_000_000, 0, 0)));
    assert!(lab.goes_in(&tcp(true, RST | ACK, 0, 900_000_001, 0)));
    let drops = lab.drops();
    assert_eq!(
        drops,
        [(DropReason::Filtered, 1), (DropReason::BadState, 6)]
    );
    assert_eq!((lab.counters().states, lab.counters().created), (1, 2));
    // It is forgotten a minute after its end.
    lab.now += 61 * SECOND;
    assert!(!lab.goes_in(&tcp(true, ACK, 1, 1, 0)));
    lab.now += SECOND;
    lab.worker.step(lab.now);
    assert_eq!((lab.counters().states, lab.counters().expired), (0, 1));
}

#[test]
fn flows_of_udp_and_pings_pass_their_answers() {
    let mut lab = Lab::new(rules(vec![out_keeps()]), 10);
    for (inner, outer) in [(in_(), out()), (in6(), out6())] {
        assert!(!lab.goes_in(&udp((outer, 53), (inner, 999))));
        assert!(lab.goes_out(&udp((inner, 999), (outer, 53))));
        assert!(lab.goes_in(&udp((outer, 53), (inner, 999))));
        assert!(!lab.goes_in(&udp((outer, 54), (inner, 999))));
        assert!(
            !lab.goes_in(&udp((inner, 999), (outer, 53))),
            "from the wrong side"
        );
        let (protocol, request, reply) = match inner {
            IpAddr::V4(_) => (1, 8, 0),
            IpAddr::V6(_) => (58, 128, 129),
        };
        let echo = |kind: u8, id: u8| vec![kind, 0, 0, 0, 0, id, 0, 1];
        assert!(!lab.goes_in(&ip(outer, inner, protocol, &echo(reply, 1))));
        assert!(lab.goes_out(&ip(inner, outer, protocol, &echo(request, 1))));
        assert!(lab.goes_in(&ip(outer, inner, protocol, &echo(reply, 1))));
        assert!(!lab.goes_in(&ip(outer, inner, protocol, &echo(reply, 2))));
        assert!(!lab.goes_in(&ip(outer, inner, protocol, &echo(request, 1))));
    }
    // One that was not answered is forgotten earlier than one that was.
    assert!(lab.goes_out(&udp((in_(), 1), (out(), 53))));
    lab.now += 31 * SECOND;
    assert!(!lab.goes_in(&udp((out(), 53), (in_(), 1))));
    assert!(lab.goes_in(&udp((out(), 53), (in_(), 999))));
}

#[test]
fn errors_pass_that_are_about_a_flow() {
    let mut lab = Lab::new(rules(vec![out_keeps()]), 10);
    let asked = udp((in_(), 999), (out(), 53));
    let router: IpAddr = Ipv4Addr::new(203, 0, 113, 9).into();
    let about = |frame: &[u8], to: IpAddr| {
        let message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &frame[14..14 + 28]].concat();
        ip(router, to, 1, &message)
    };
    assert!(!lab.goes_in(&about(&asked, in_())));
    assert!(lab.goes_out(&asked));
    assert!(lab.goes_in(&about(&asked, in_())));
    let elsewhere: IpAddr = Ipv4Addr::new(10, 0, 0, 2).into();
    assert!(!lab.goes_in(&about(&asked, elsewhere)), "to somebody else");
    assert!(!lab.goes_in(&about(&udp((out(), 53), (in_(), 999)), in_())));
    let six = udp((in6(), 999), (out6(), 53));
    let message = [&[1, 4, 0, 0, 0, 0, 0, 0][..], &six[14..14 + 48]].concat();
    let error = ip(out6(), in6(), 58, &message);
    assert!(!lab.goes_in(&error));
    assert!(lab.goes_out(&six));
    assert!(lab.goes_in(&error));
}

#[test]
fn pieces_go_where_the_first_one_went() {
    let piece = |offset: u16, more: bool, id: u8, port: u16| {
        let mut frame = udp((in_(), port), (out(), 53));
        let word = offset | u16::from(more) << 13;
        frame[14 + 6..14 + 8].copy_from_slice(&word.to_be_bytes());
        frame[14 + 5] = id;
        frame
    };
    let mut lab = Lab::new(rules(vec![out_keeps()]), 10);
    assert!(!lab.goes_out(&piece(3, true, 1, 999)), "before the first");
    assert!(!lab.goes_out(&piece(6, false, 1, 999)), "before the first");
    assert!(!lab.goes_in(&piece(6, true, 1, 999)), "from the other side");
    assert_eq!((lab.missing.len(), lab.drops()), (3, vec![]));
    assert!(lab.goes_out(&piece(0, true, 1, 999)));
    assert_eq!(lab.missing, [piece(6, true, 1, 999)], "the others followed");
    assert!(lab.goes_out(&piece(3, true, 1, 999)));
    assert!(lab.goes_out(&piece(6, false, 1, 999)));
    assert!(!lab.goes_out(&piece(3, false, 2, 999)));
    assert!(
        !lab.goes_in(&piece(0, true, 3, 999)),
        "the first did not pass"
    );
    assert!(!lab.goes_in(&piece(3, false, 3, 999)));
    assert_eq!(lab.drops(), [(DropReason::BadState, 1)]);
    lab.now += 3 * SECOND;
    assert!(!lab.goes_out(&piece(3, false, 9, 999)));
    assert!(
        lab.drops().contains(&(DropReason::Fragment, 3)),
        "what waited for nothing is given up"
    );
    let none = FirewallOrders {
        rules: Arc::new(RuleSet::new(
            vec![out_keeps()],
            Vec::new(),
            Action::Drop,
            false,
        )),
        timeouts: Timeouts::default(),
    };
    lab.order(none);
    assert!(!lab.goes_out(&piece(0, true, 4, 999)));
    assert!(lab.drops().contains(&(DropReason::Fragment, 4)));
}

#[test]
fn who_is_rejected_is_told_so() {
    let mut lab = Lab::new(rules(vec![rule("reject", Action::Reject)]), 10);
    let (passed, back) = lab.send(0, &tcp(true, SYN, 77, 0, 0));
    assert!(!passed);
    let reset = &back[0];
    assert_eq!(reset[..12], [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    assert_eq!(reset[26..34], [10, 0, 0, 1, 192, 0, 2, 1]);
    assert_eq!(reset[34..38], ports(4_000, 80)[..]);
    assert_eq!(reset[34 + 8..34 + 12], 78_u32.to_be_bytes());
    assert_eq!(reset[34 + 13], RST | ACK);
    assert_eq!(Sum::of(&reset[14..34]).checksum(), 0);
    let pseudo = Sum::of(&reset[26..34]).and_word(6).and_word(20);
    assert_eq!(pseudo.and(Sum::of(&reset[34..])).checksum(), 0);
    let asked = udp((out(), 9), (in_(), 53));
    let (_, back) = lab.send(0, &asked);
    assert_eq!((back[0][23], back[0][34], back[0][35]), (1, 3, 3));
    assert_eq!(Sum::of(&back[0][34..]).checksum(), 0);
    assert_eq!(back[0][42..], asked[14..]);
    let six = udp((out6(), 9), (in6(), 53));
    let (_, back) = lab.send(0, &six);
    assert_eq!((back[0][54], back[0][55]), (1, 4));
    let len = (back[0].len() - 54) as u16;
    let pseudo = Sum::of(&back[0][22..54]).and_word(58).and_word(len);
    assert_eq!(pseudo.and(Sum::of(&back[0][54..])).checksum(), 0);
    // Nobody answers a reset, an error, or what was for many.
    assert!(lab.send(0, &tcp(true, RST, 77, 0, 0)).1.is_empty());
    let error = ip(out(), in_(), 1, &[3, 3, 0, 0, 0, 0, 0, 0]);
    assert!(lab.send(0, &error).1.is_empty());
    let mut many = asked;
    many[..6].fill(0xff);
    assert!(lab.send(0, &many).1.is_empty());
    assert_eq!(lab.counters().refused, 3);
}

#[test]
fn a_table_that_is_full_lets_none_in_but_for_those_who_are_not_answered() {
    let mut lab = Lab::new(rules(vec![out_keeps()]), 2);
    for port in [1, 2] {
        assert!(lab.goes_out(&udp((in_(), port), (out(), 53))));
        assert!(lab.goes_in(&udp((out(), 53), (in_(), port))));
    }
    assert!(!lab.goes_out(&udp((in_(), 3), (out(), 53))));
    assert_eq!(lab.drops(), [(DropReason::StatesFull, 1)]);
    lab.now += 121 * SECOND;
    assert!(lab.goes_out(&udp((in_(), 3), (out(), 53))));
    assert!(lab.goes_out(&udp((in_(), 4), (out(), 53))));
    assert!(lab.goes_out(&udp((in_(), 5), (out(), 53))));
    let counters = lab.counters();
    assert_eq!((counters.states, counters.evicted), (2, 1));
}

#[test]
fn rules_change_in_place_and_flows_stay() {
    let web = |text: &str| Rule {
        came_in_by: Some(0),
        ..rule(text, Action::Drop)
    };
    let mut lab = Lab::new(rules(vec![web("old"), out_keeps()]), 10);
    assert!(lab.goes_out(&tcp(false, SYN, 1_000, 0, 0)));
    assert!(!lab.goes_in(&udp((out(), 1), (in_(), 1))));
    lab.order(rules(vec![web("new"), web("newer"), out_keeps()]));
    assert!(lab.goes_in(&tcp(true, SYN | ACK, 5_000, 1_001, 0)));
    let counted: Vec<_> = lab
        .counters()
        .rules
        .iter()
        .map(|rule| rule.packets)
        .collect();
    assert_eq!(counted, [0, 0, 2, 0], "by what is written");
    lab.order(rules(vec![rule("nothing", Action::Drop)]));
    assert!(lab.goes_out(&tcp(false, ACK, 1_001, 5_001, 0)));
    assert!(!lab.goes_out(&udp((in_(), 1), (out(), 1))));
}

#[test]
fn sets_of_a_hundred_thousand_are_looked_up() {
    let many = (0..100_000_u32).map(|n| prefix(Ipv4Addr::from(0x0a00_0000 + n * 2).into(), 32));
    let wide = [
        prefix(Ipv4Addr::new(172, 16, 0, 0).into(), 12),
        prefix(in6(), 64),
    ];
    let set: AddressSet = many.chain(wide).collect();
    let orders = FirewallOrders {
        rules: Arc::new(RuleSet::new(
            vec![Rule {
                from: Ends {
                    sets: vec![0],
                    ..Ends::default()
                },
                ..rule("pass from <set>", Action::Pass)
            }],
            vec![Arc::new(set)],
            Action::Drop,
            true,
        )),
        timeouts: Timeouts::default(),
    };
    let mut lab = Lab::new(orders, 10);
    let mut passes = |from: IpAddr, to: IpAddr| lab.goes_in(&udp((from, 1), (to, 1)));
    assert!(passes(
        Ipv4Addr::from(0x0a00_0000 + 2 * 99_999).into(),
        out()
    ));
    assert!(!passes(Ipv4Addr::from(0x0a00_0001).into(), out()));
    assert!(!passes(
        Ipv4Addr::from(0x0a00_0000 + 2 * 100_000).into(),
        out()
    ));
    assert!(passes(Ipv4Addr::new(172, 31, 255, 255).into(), out()));
    assert!(!passes(Ipv4Addr::new(172, 32, 0, 0).into(), out()));
    assert!(passes("2001:db8::ffff".parse().unwrap(), out6()));
    assert!(!passes("2001:db8:0:1::".parse().unwrap(), out6()));
}

#[test]
fn nonsense_is_malformed_and_nothing_else() {
    let mut lab = Lab::new(rules(vec![rule("pass", Action::Pass)]), 10);
    let whole = Tcp {
        from: (out(), 1),
        to: (in_(), 2),
        flags: SYN,
        sequence: 0,
        acknowledged: 0,
        len: 0,
    }
    .frame();
    for len in 0..whole.len() {
        lab.goes_in(&whole[..len.max(1)]);
    }
    // It says that it is longer than it is.
    assert!(!lab.goes_in(&udp((out(), 1), (in_(), 2))[..14 + 31]));
    assert!(lab.goes_in(&udp((out(), 1), (in_(), 2))));
    let mut random = common::Random::new(7);
    for _ in 0..20_000 {
        let mut frame = whole.clone();
        for _ in 0..1 + random.below(4) {
            let at = 12 + random.below(frame.len() - 12);
            frame[at] = random.next() as u8;
        }
        lab.goes_in(&frame);
        let mut six = ip(
            out6(),
            in6(),
            [0, 6, 43, 44, 58][random.below(5)],
            &whole[34..],
        );
        let at = 12 + random.below(six.len() - 12);
        six[at] = random.next() as u8;
        lab.send(0, &six);
    }
    assert!(
        lab.drops()
            .iter()
            .all(|&(reason, _)| reason == DropReason::Malformed || reason == DropReason::Fragment)
    );
    let timeouts = Timeouts {
        udp: Duration::ZERO,
        ..Timeouts::default()
    };
    let orders = FirewallOrders {
        timeouts,
        ..rules(vec![out_keeps()])
    };
    lab.order(orders);
}
