//! Rules as a table, for the packets that most are: a packet is compared with eight rules at once, and only with those that its
//! protocol, its gate and its destination port leave.

use virtnet_packet::flow::IpVersion;

use super::packet::{TCP, UDP};
use super::rules::{Ends, Rule};
use super::sets::Prefix;
use super::states::Usual;
use crate::graph::Gate;

/// A rule that would take more entries than this is looked at by itself instead.
const ENTRIES_MAX: usize = 64;

/// Where there would be more entries than this in all, ports are not told apart.
const ALL_MAX: usize = 1 << 16;

/// Entries that are compared at once.
const LINE: usize = 8;

/// All rules that a usual packet can match.
#[derive(Clone, Debug)]
pub(super) struct RuleTable {
    /// By protocol, TCP and UDP, and by gate.
    parts: [[Part; 2]; 2],
}

/// Those for one protocol and one gate.
#[derive(Clone, Debug)]
struct Part {
    /// The lowest of the destination ports that each of the lists is for, and those above it up to the next.
    ports: Vec<u16>,
    lists: Vec<List>,
    /// Whether a verdict holds for all packets that have the same ends.
    is_by_ends: bool,
}

/// Rules in their order.
#[derive(Clone, Debug, Default)]
struct List {
    lines: Vec<Line>,
    /// Of each entry the number of its rule, and whether the rule says more than the entry.
    rules: Vec<(usize, bool)>,
}

/// Eight entries; one that is none matches nothing.
#[derive(Clone, Debug)]
struct Line {
    from: Side,
    to: Side,
}

/// What is said of one end of a packet's way.
#[derive(Clone, Debug)]
struct Side {
    address: [u32; LINE],
    mask: [u32; LINE],
    /// Signed, because that is what is compared at once.
    first_port: [i32; LINE],
    last_port: [i32; LINE],
}

/// The same of one entry.
#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u32,
    mask: u32,
    ports: (u16, u16),
}

impl RuleTable {
    pub(super) fn new(rules: &[Rule]) -> Self {
        let part = |protocol, gate| Part::new(rules, protocol, gate);
        Self {
            parts: [TCP, UDP].map(|protocol| [0, 1].map(|gate| part(protocol, gate))),
        }
    }

    /// The number of the first rule that a packet matches. `matches` tells of a rule whether it does, where that takes more than the
    /// packet's ends.
    #[inline]
    pub(super) fn first(
        &self,
        usual: &Usual,
        gate: Gate,
        matches: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let list = self.part(usual.protocol, gate).list(usual.destination().1);
        for (line, rules) in list.lines.iter().zip(list.rules.chunks(LINE)) {
            let differs = line.differs(usual);
            // Most lines have none.
            if !differs.contains(&0) {
                continue;
            }
            for (_, &(rule, more)) in differs
                .iter()
                .zip(rules)
                .filter(|(differs, _)| **differs == 0)
            {
                if !more || matches(rule) {
                    return Some(rule);
                }
            }
        }
        None
    }

    /// Whether all packets with these ends have one verdict.
    #[inline]
    pub(super) fn is_by_ends(&self, protocol: u8, gate: Gate) -> bool {
        self.part(protocol, gate).is_by_ends
    }

    #[inline]
    fn part(&self, protocol: u8, gate: Gate) -> &Part {
        &self.parts[usize::from(protocol == UDP)][usize::from(gate & 1)]
    }
}

impl Part {
    fn new(rules: &[Rule], protocol: u8, gate: Gate) -> Self {
        let mut entries = Vec::new();
        let mut is_by_ends = true;
        for (number, rule) in rules.iter().enumerate() {
            let is_for_it = rule.came_in_by.is_none_or(|wanted| wanted == gate)
                && rule.version.is_none_or(|wanted| wanted == IpVersion::V4)
                && (rule.protocols.is_empty() || rule.protocols.contains(&protocol))
                && rule.ethertype.is_none();
            if is_for_it {
                is_by_ends &= rule.filter.is_none();
                entries.extend(entries_of(rule).map(|(from, to, more)| (from, to, (number, more))));
            }
        }
        let mut part = Self {
            ports: ports_of(entries.iter().map(|(_, to, _)| to.ports)),
            lists: Vec::new(),
            is_by_ends,
        };
        let lists_of = |part: &Self, to: &Entry| part.place(to.ports.0)..=part.place(to.ports.1);
        let all = entries.iter().map(|(_, to, _)| lists_of(&part, to).count());
        if all.sum::<usize>() > ALL_MAX {
            part.ports = vec![0];
        }
        let mut lists = vec![(Vec::new(), Vec::new()); part.ports.len()];
        for (from, to, rule) in entries {
            for (ends, rules) in &mut lists[lists_of(&part, &to)] {
                ends.push((from, to));
                rules.push(rule);
            }
        }
        let lists = lists.into_iter().map(|(ends, rules)| List {
            lines: ends.chunks(LINE).map(Line::new).collect(),
            rules,
        });
        part.lists.extend(lists);
        part
    }

    #[inline]
    fn list(&self, port: u16) -> &List {
        &self.lists[self.place(port)]
    }

    /// Which list is for a port.
    #[inline]
    fn place(&self, port: u16) -> usize {
        match self.ports.len() {
            1 => 0,
            // The first is 0.
            _ => self
                .ports
                .partition_point(|&first| first <= port)
                .saturating_sub(1),
        }
    }
}

/// Where ranges of ports begin and end, each once and in order, from 0 on.
fn ports_of(ranges: impl Iterator<Item = (u16, u16)>) -> Vec<u16> {
    let ends = ranges.flat_map(|(first, last)| [Some(first), last.checked_add(1)]);
    let mut ports: Vec<_> = ends.flatten().chain([0]).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Entries of which one matches where a rule does, and whether the rule says more than they do.
fn entries_of(rule: &Rule) -> impl Iterator<Item = (Entry, Entry, bool)> + use<> {
    let is_simple = |ends: &Ends| !ends.not && ends.sets.is_empty();
    let of = |ends: &Ends| {
        let addresses: Vec<_> = match is_simple(ends) && !ends.prefixes.is_empty() {
            true => ends.prefixes.iter().filter_map(address_and_mask).collect(),
            false => vec![(0, 0)],
        };
        let ports = match ends.ports.is_empty() {
            true => vec![(0, u16::MAX)],
            false => ends.ports.clone(),
        };
        let ports = ports.into_iter().filter(|(first, last)| first <= last);
        let with = |ports| {
            let addresses = addresses.iter();
            addresses.map(move |&(address, mask)| Entry {
                address,
                mask,
                ports,
            })
        };
        ports.flat_map(with).collect::<Vec<_>>()
    };
    let (mut from, mut to) = (of(&rule.from), of(&rule.to));
    let is_short = from.len() * to.len() <= ENTRIES_MAX;
    if !is_short {
        (from, to) = (vec![Entry::ANY], vec![Entry::ANY]);
    }
    let says_all =
        is_short && is_simple(&rule.from) && is_simple(&rule.to) && rule.filter.is_none();
    from.into_iter().flat_map(move |from| {
        let pairs = to.clone().into_iter();
        pairs.map(move |to| (from, to, !says_all))
    })
}

fn address_and_mask(prefix: &Prefix) -> Option<(u32, u32)> {
    let address = u32::try_from(prefix.address).ok()?;
    let others = u32::MAX.checked_shr(prefix.len.into()).unwrap_or_default();
    (prefix.version == IpVersion::V4).then_some((address & !others, !others))
}

impl Entry {
    const ANY: Self = Self {
        address: 0,
        mask: 0,
        ports: (0, u16::MAX),
    };

    /// No address has a bit set that does not count.
    const NONE: Self = Self {
        address: 1,
        ..Self::ANY
    };
}

impl Line {
    fn new(entries: &[(Entry, Entry)]) -> Self {
        let none = (Entry::NONE, Entry::NONE);
        let at = |i: usize| entries.get(i).copied().unwrap_or(none);
        Self {
            from: Side::new(std::array::from_fn(|i| at(i).0)),
            to: Side::new(std::array::from_fn(|i| at(i).1)),
        }
    }

    /// In what a packet differs from each entry: 0 from one that it matches. (Arrays that are computed whole are a few wide
    /// instructions: 57 for a line, where a look at each entry is 110.)
    #[inline]
    fn differs(&self, usual: &Usual) -> [u32; LINE] {
        let from = self.from.differs(usual.source());
        let to = self.to.differs(usual.destination());
        std::array::from_fn(|i| from[i] | to[i])
    }
}

impl Side {
    fn new(entries: [Entry; LINE]) -> Self {
        Self {
            address: entries.map(|entry| entry.address),
            mask: entries.map(|entry| entry.mask),
            first_port: entries.map(|entry| entry.ports.0.into()),
            last_port: entries.map(|entry| entry.ports.1.into()),
        }
    }

    #[inline(always)]
    fn differs(&self, (address, port): (u32, u16)) -> [u32; LINE] {
        let port = i32::from(port);
        std::array::from_fn(|i| {
            let is_outside = |is: bool| u32::from(is).wrapping_neg();
            (address & self.mask[i] ^ self.address[i])
                | is_outside(port < self.first_port[i])
                | is_outside(port > self.last_port[i])
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::packet::look_at;
    use super::super::rules::{Action, RuleSet};
    use super::super::sets::AddressSet;
    use super::*;
    use crate::function::{Filter, Instruction};

    /// Few addresses and ports, so that rules and packets meet.
    fn address() -> impl Strategy<Value = u32> {
        (0_u32..4, 0_u32..4).prop_map(|(net, host)| 0x0a00_0000 | net << 8 | host)
    }

    fn prefix() -> impl Strategy<Value = Prefix> {
        let len = prop_oneof![Just(0), Just(22), Just(24), Just(31), Just(32)];
        (address(), len, prop::bool::weighted(0.1)).prop_map(|(address, len, is_v6)| Prefix {
            version: if is_v6 { IpVersion::V6 } else { IpVersion::V4 },
            address: address.into(),
            len,
        })
    }

    fn ends() -> impl Strategy<Value = Ends> {
        let prefixes = prop_oneof![
            3 => prop::collection::vec(prefix(), 0..3),
            1 => prop::collection::vec(prefix(), 9..12),
        ];
        let ports = prop_oneof![
            2 => prop::collection::vec((0_u16..6, 0_u16..8), 0..3),
            1 => Just(vec![(u16::MAX - 1, u16::MAX)]),
            1 => prop::collection::vec((0_u16..6, 0_u16..8), 8..10),
        ];
        let (not, in_set) = (prop::bool::weighted(0.2), prop::bool::weighted(0.2));
        (not, prefixes, in_set, ports).prop_map(|(not, prefixes, in_set, ports)| Ends {
            not,
            prefixes,
            sets: if in_set { vec![0] } else { vec![] },
            ports,
        })
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let rare = || prop::bool::weighted(0.15);
        let protocols = prop_oneof![
            3 => Just(vec![]),
            2 => Just(vec![TCP]),
            2 => Just(vec![UDP]),
            1 => Just(vec![1, UDP]),
        ];
        (protocols, ends(), ends(), rare(), rare(), rare(), 0..4_u16).prop_map(
            |(protocols, from, to, other, only_v6, filtered, gate)| Rule {
                action: Action::Pass,
                came_in_by: (gate < 2).then_some(gate),
                version: only_v6.then_some(IpVersion::V6),
                protocols,
                ethertype: other.then_some(0x0806),
                from,
                to,
                // Frames longer than 60 bytes.
                filter: filtered.then(|| {
                    let program = [
                        (0x80, 0, 0, 0),
                        (0x25, 0, 1, 60),
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

    fn frame(from: u32, to: u32, ports: (u16, u16), protocol: u8, len: usize) -> Vec<u8> {
        let mut frame = vec![0; len];
        frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        frame[17] = 46;
        frame[23] = protocol;
        frame[26..30].copy_from_slice(&from.to_be_bytes());
        frame[30..34].copy_from_slice(&to.to_be_bytes());
        frame[34..36].copy_from_slice(&ports.0.to_be_bytes());
        frame[36..38].copy_from_slice(&ports.1.to_be_bytes());
        frame
    }

    proptest! {
        #[test]
        fn the_table_finds_the_rule_that_reading_them_finds(
            rules in prop::collection::vec(rule(), 0..20),
            packets in prop::collection::vec(
                (address(), address(), (0_u16..8, prop_oneof![4 => 0_u16..8, 1 => Just(u16::MAX)]), any::<bool>(), any::<bool>()),
                1..20,
            ),
            gate in 0_u16..2,
        ) {
            let set = AddressSet::from_iter([
                Prefix { version: IpVersion::V4, address: 0x0a00_0100, len: 24 },
                Prefix { version: IpVersion::V4, address: 0x0a00_0003, len: 32 },
            ]);
            let rules = RuleSet::new(rules, vec![set.into()], Action::Drop, true);
            for (from, to, ports, is_tcp, is_long) in packets {
                let protocol = if is_tcp { TCP } else { UDP };
                let head = frame(from, to, ports, protocol, if is_long { 64 } else { 60 });
                let usual = Usual::of(&head, head.len()).unwrap();
                let seen = look_at(&head);
                let read = rules.first(&seen, gate, &head, head.len()).map(|(number, _)| number);
                prop_assert_eq!(rules.first_for(&usual, gate, &head, head.len()), read);
            }
        }
    }
}
