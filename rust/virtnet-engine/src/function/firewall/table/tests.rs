//! What the table finds is what reading the rules one by one finds.

use std::sync::Arc;

use proptest::prelude::*;
use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload, Picks};

use super::super::packet::{Piece, Seen, look_at};
use super::super::rules::RuleSet;
use super::super::sets::{AddressSet, Prefix};
use super::super::{Firewall, FirewallOrders, Timeouts};
use super::*;
use crate::function::{Fate, Filter, Instruction, Verdict};

const ICMP: u8 = 1;
const SCTP: u8 = 132;

/// A packet, of which `tags`, `options` and `is_first` say in what it is not one of the usual ones.
#[derive(Clone, Debug)]
struct Sent {
    is_v6: bool,
    protocol: u8,
    from: (u8, u8),
    to: (u8, u8),
    ports: (u16, u16),
    tags: usize,
    options: bool,
    is_first: bool,
    is_long: bool,
}

/// Few addresses, so that rules and packets meet, which differ in more than one word.
fn address(is_v6: bool, (net, host): (u8, u8)) -> u128 {
    let (net, host) = (u128::from(net), u128::from(host));
    match is_v6 {
        true => 0x2001_0db8 << 96 | net << 60 | host,
        false => 0x0a00_0000 | net << 8 | host,
    }
}

fn net_and_host() -> impl Strategy<Value = (u8, u8)> {
    (0..4_u8, 0..4_u8)
}

/// Ports near the ends of pages.
fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        6 => 0..8_u16,
        2 => 254..258_u16,
        1 => 510..514_u16,
        1 => u16::MAX - 257..=u16::MAX - 254,
        1 => u16::MAX - 1..=u16::MAX,
    ]
}

fn sent() -> impl Strategy<Value = Sent> {
    let protocol = prop_oneof![3 => Just(TCP), 3 => Just(UDP), 1 => Just(ICMP), 1 => Just(SCTP)];
    let tags = prop_oneof![3 => Just(0), 1 => Just(1), 1 => Just(2)];
    let rare = || prop::bool::weighted(0.15);
    let ends = (net_and_host(), net_and_host(), (port(), port()));
    let (is_v6, is_long) = (prop::bool::weighted(0.4), any::<bool>());
    (is_v6, protocol, ends, tags, rare(), rare(), is_long).prop_map(
        |(is_v6, protocol, (from, to, ports), tags, options, is_first, is_long)| Sent {
            is_v6,
            protocol,
            from,
            to,
            ports,
            tags,
            options,
            is_first,
            is_long,
        },
    )
}

impl Sent {
    fn frame(&self) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for _ in 0..self.tags {
            frame.extend_from_slice(&[0x81, 0, 0, 7]);
        }
        let (from, to) = (address(self.is_v6, self.from), address(self.is_v6, self.to));
        let mut above = [0; 20];
        above[..2].copy_from_slice(&self.ports.0.to_be_bytes());
        above[2..4].copy_from_slice(&self.ports.1.to_be_bytes());
        match self.protocol {
            TCP => above[12..14].copy_from_slice(&[0x50, 2]),
            // An echo request.
            ICMP => above[..2].copy_from_slice(&[8, 0]),
            _ => {}
        }
        let options = 8 * u8::from(self.options);
        let len = options + 20;
        if self.is_v6 {
            let piece = 8 * u8::from(self.is_first);
            frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, len + piece]);
            let first = match (self.options, self.is_first) {
                (true, _) => 60,
                (_, true) => 44,
                _ => self.protocol,
            };
            frame.extend_from_slice(&[first, 64]);
            frame.extend_from_slice(&from.to_be_bytes());
            frame.extend_from_slice(&to.to_be_bytes());
            if self.options {
                let next = if self.is_first { 44 } else { self.protocol };
                frame.extend_from_slice(&[next, 0, 1, 4, 0, 0, 0, 0]);
            }
            if self.is_first {
                frame.extend_from_slice(&[self.protocol, 0, 0, 1, 0, 0, 0, 1]);
            }
        } else {
            let more = 0x20 * u8::from(self.is_first);
            frame.extend_from_slice(&[8, 0, 0x45 + options / 4, 0, 0, 20 + len, 0, 1, more, 0]);
            frame.extend_from_slice(&[64, self.protocol, 0, 0]);
            frame.extend_from_slice(&from.to_be_bytes()[12..]);
            frame.extend_from_slice(&to.to_be_bytes()[12..]);
            frame.extend_from_slice(&[1; 8][..options.into()]);
        }
        frame.extend_from_slice(&above);
        let len = if self.is_long { 120 } else { 110 };
        frame.resize(len, 0);
        frame
    }
}

fn prefix() -> impl Strategy<Value = Prefix> {
    let free = prop_oneof![
        Just(128),
        Just(61),
        Just(60),
        Just(10),
        Just(8),
        Just(1),
        Just(0)
    ];
    let is_v6 = prop::bool::weighted(0.4);
    (net_and_host(), free, is_v6).prop_map(|(end, free, is_v6)| {
        let (version, width) = match is_v6 {
            true => (IpVersion::V6, 128_u8),
            false => (IpVersion::V4, 32),
        };
        Prefix {
            version,
            address: address(is_v6, end),
            len: width.saturating_sub(free),
        }
    })
}

fn ends() -> impl Strategy<Value = Ends> {
    let prefixes = prop_oneof![
        2 => Just(vec![]),
        2 => prop::collection::vec(prefix(), 1..4),
        1 => prop::collection::vec(prefix(), 9..12),
    ];
    let range = || (port(), 0..4_u16).prop_map(|(first, more)| (first, first.saturating_add(more)));
    let ports = prop_oneof![
        3 => Just(vec![]),
        3 => prop::collection::vec(range(), 1..3),
        1 => prop::collection::vec((port(), port()), 8..10),
    ];
    let (not, in_set) = (prop::bool::weighted(0.2), prop::bool::weighted(0.2));
    (not, prefixes, in_set, ports).prop_map(|(not, prefixes, in_set, ports)| Ends {
        not,
        prefixes,
        sets: if in_set { vec![0] } else { vec![] },
        ports,
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Pass), Just(Action::Drop), Just(Action::Reject)]
}

fn rule() -> impl Strategy<Value = Rule> {
    let rare = || prop::bool::weighted(0.15);
    let protocols = prop_oneof![
        3 => Just(vec![]),
        2 => Just(vec![TCP]),
        2 => Just(vec![UDP]),
        1 => Just(vec![ICMP, UDP]),
    ];
    let version = prop_oneof![
        4 => Just(None),
        1 => Just(Some(IpVersion::V4)),
        1 => Just(Some(IpVersion::V6)),
    ];
    let what = (action(), version, protocols);
    (what, ends(), ends(), rare(), rare(), 0..4_u16).prop_map(
        |((action, version, protocols), from, to, other, filtered, gate)| Rule {
            action,
            came_in_by: (gate < 2).then_some(gate),
            version,
            protocols,
            ethertype: other.then_some(0x0806),
            from,
            to,
            // Frames longer than 110 bytes.
            filter: filtered.then(|| {
                let program = [
                    (0x80, 0, 0, 0),
                    (0x25, 0, 1, 110),
                    (6, 0, 0, 1),
                    (6, 0, 0, 0),
                ];
                let program = program.map(|(code, jt, jf, k)| Instruction { code, jt, jf, k });
                Filter::new(&program).unwrap()
            }),
            keep_state: false,
            text: String::new(),
        },
    )
}

fn rule_set(rules: Vec<Rule>, otherwise: Action) -> RuleSet {
    let set = AddressSet::from_iter([
        Prefix {
            version: IpVersion::V4,
            address: address(false, (1, 0)),
            len: 24,
        },
        Prefix {
            version: IpVersion::V4,
            address: address(false, (0, 3)),
            len: 32,
        },
        Prefix {
            version: IpVersion::V6,
            address: address(true, (2, 0)),
            len: 68,
        },
    ]);
    RuleSet::new(rules, vec![set.into()], otherwise, true)
}

/// A rule that says nothing but to which ports.
fn to_ports(ports: Vec<(u16, u16)>) -> Rule {
    Rule {
        action: Action::Drop,
        came_in_by: None,
        version: None,
        protocols: vec![UDP],
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

fn udp_to(port: u16) -> Packet {
    let sent = Sent {
        is_v6: false,
        protocol: UDP,
        from: (1, 1),
        to: (2, 2),
        ports: (7, port),
        tags: 0,
        options: false,
        is_first: false,
        is_long: false,
    };
    match look_at(&sent.frame()) {
        Seen::Ip(packet) => packet,
        other => panic!("it is {other:?}"),
    }
}

proptest! {
    #[test]
    fn the_table_finds_the_rule_that_reading_them_finds(
        rules in prop::collection::vec(rule(), 0..20),
        packets in prop::collection::vec(sent(), 1..20),
        gate in 0_u16..2,
    ) {
        let rules = rule_set(rules, Action::Drop);
        for sent in packets {
            let head = sent.frame();
            let seen = look_at(&head);
            let read = rules.read(&seen, gate, &head, head.len());
            let found = rules.first(&seen, gate, &head, head.len());
            prop_assert_eq!(found.map(|(number, _)| number), read, "{:?}", sent);
            let is_usual = !sent.is_v6
                && sent.tags == 0
                && !sent.options
                && !sent.is_first
                && matches!(sent.protocol, TCP | UDP);
            let usual = Usual::of(&head, head.len());
            prop_assert_eq!(usual.is_some(), is_usual, "{:?}", sent);
            if let Some(usual) = usual {
                let list = rules.list_for(&usual, gate);
                let found = match list.for_all() {
                    Some(found) => found,
                    None => rules.find(list, &usual, gate, &head, head.len()),
                };
                let number = found.rule as usize;
                prop_assert_eq!((number < rules.rules.len()).then_some(number), read);
            }
        }
    }

    #[test]
    fn packets_of_a_burst_fare_as_each_by_itself_and_are_counted_by_their_rules(
        rules in prop::collection::vec(rule(), 0..12),
        otherwise in action(),
        packets in prop::collection::vec(sent(), 1..6),
        order in prop::collection::vec((0..6_usize, prop::collection::vec(any::<bool>(), 1..4)), 1..=BURST_MAX / 4),
        gate in 0_u16..2,
    ) {
        let rules = Arc::new(rule_set(rules, otherwise));
        let orders = FirewallOrders { rules: Arc::clone(&rules), timeouts: Timeouts::default() };
        let mut firewall = Firewall::new(orders, 100);
        let mut burst = Burst::new();
        let mut counted = vec![(0, 0); rules.rules.len() + 1];
        let mut expected = Vec::new();
        // Runs of packets that differ in nothing but their length.
        let sent = order.iter().flat_map(|(which, run)| {
            let sent = &packets[which % packets.len()];
            run.iter().map(|&is_long| Sent { is_long, ..sent.clone() })
        });
        for sent in sent {
            let frame = sent.frame();
            let at = rules.read(&look_at(&frame), gate, &frame, frame.len());
            let action = at.map_or(otherwise, |at| rules.rules[at].action);
            let count: &mut (u64, u64) = &mut counted[at.unwrap_or(rules.rules.len())];
            count.0 += 1;
            count.1 += frame.len() as u64;
            burst.push_bytes(&frame, Offload::default());
            expected.push(match action {
                Action::Pass => Fate::To(gate ^ 1),
                Action::Drop | Action::Reject => Fate::Drop(DropReason::Filtered),
            });
        }
        let picks = Picks::first(burst.len());
        let mut fates = [Fate::Consumed; BURST_MAX];
        let verdict = firewall.classify(&burst, &picks, gate, 1, &mut fates);
        if let Verdict::All(fate) = verdict {
            fates.fill(fate);
        }
        prop_assert_eq!(&fates[..burst.len()], &expected[..]);
        let counters = firewall.counters().rules;
        let counters: Vec<_> = counters.iter().map(|rule| (rule.packets, rule.bytes)).collect();
        prop_assert_eq!(counters, counted);
    }
}

#[test]
fn of_a_thousand_rules_for_other_ports_none_is_left_to_compare() {
    let rules: Vec<_> = (0..1_000)
        .map(|port| to_ports(vec![(2 * port, 2 * port)]))
        .collect();
    let table = RuleTable::new(&rules, Action::Pass);
    for port in 0..=u16::MAX {
        let found = match port {
            0..2_000 if port % 2 == 0 => (u32::from(port / 2), Does::Drop),
            _ => (1_000, Does::Pass),
        };
        let list = part(&table.v4, UDP, 0).list(port);
        let (rule, does) = found;
        assert_eq!(list.for_all(), Some(Found { rule, does }), "port {port}");
    }
}

#[test]
fn what_no_packet_gets_to_is_left_out() {
    let mut rules = vec![to_ports(vec![(5, 9)]), to_ports(vec![])];
    rules.extend((0..100).map(|n| {
        let mut rule = to_ports(vec![(5, 5)]);
        rule.from.prefixes.push(Prefix {
            version: IpVersion::V4,
            address: n,
            len: 32,
        });
        rule
    }));
    let table = RuleTable::new(&rules, Action::Pass);
    let lists = &part(&table.v4, UDP, 0).lists;
    assert!(lists.iter().all(|list| list.for_all().is_some()));
}

#[test]
fn where_there_are_too_many_entries_ports_are_compared_instead() {
    // Rules for all ports and for a port each: every one of the former would stand in a list for each of the latter.
    let rules: Vec<_> = (0..300_u16)
        .flat_map(|n| {
            let mut from = to_ports(vec![]);
            from.from.ports.push((1_000 + n, 1_000 + n));
            [from, to_ports(vec![(2 * n, 2 * n)])]
        })
        .collect();
    let table = RuleTable::new(&rules, Action::Pass);
    assert_eq!(part(&table.v4, UDP, 0).lists.len(), 1);
    for (port, rule) in [
        (0, 1),
        (1, 600),
        (2, 3),
        (598, 599),
        (599, 600),
        (u16::MAX, 600),
    ] {
        let found = table.find(&udp_to(port), 0, |_| panic!("ports say all"));
        assert_eq!(found.map(|found| found.rule), Some(rule), "port {port}");
    }
}

#[test]
fn packets_without_ports_are_not_in_the_table() {
    let table = RuleTable::new(&[to_ports(vec![])], Action::Pass);
    let packet = udp_to(9);
    assert!(table.find(&packet, 0, |_| true).is_some());
    let later = Packet {
        has_ports: false,
        piece: Piece::Later,
        ..packet
    };
    assert_eq!(table.find(&later, 0, |_| true), None);
    let other = Packet {
        protocol: SCTP,
        ..packet
    };
    assert_eq!(table.find(&other, 0, |_| true), None);
}
