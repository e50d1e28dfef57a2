//! Rules as a table, for packets of TCP and UDP: what its protocol, its gate and its destination port leave of the rules is looked up, and
//! a packet is compared with eight of them at once. Mostly the first that is left is about any address: then there is nothing to compare.

mod line;
#[cfg(test)]
mod tests;

use virtnet_packet::flow::IpVersion;

use self::line::{ALL_PORTS, LINE, Line, Point, Span, words};
use super::packet::{End, Packet, TCP, UDP};
use super::rules::{Action, Ends, Rule};
use super::states::Usual;
use crate::graph::Gate;

/// A rule that would take more entries than this is looked at by itself instead.
const ENTRIES_MAX: usize = 64;

/// Where there would be more entries than this in all, ports are not told apart.
const ALL_MAX: usize = 1 << 16;

/// Ports of a page, and pages of all ports.
const PAGE: usize = 256;

/// 32-bit words of an address.
const V4: usize = 1;
const V6: usize = 4;

/// All rules that a packet of TCP or UDP can match.
#[derive(Clone, Debug)]
pub(super) struct RuleTable {
    v4: Parts<V4>,
    v6: Parts<V6>,
}

/// By protocol, TCP and UDP, and by gate.
type Parts<const WORDS: usize> = [[Part<WORDS>; 2]; 2];

/// What the rules say of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The number of the first rule that it matches; how many there are, if none.
    pub(super) rule: u32,
    pub(super) does: Does,
}

/// What becomes of a packet by a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Does {
    Pass,
    Drop,
    /// It begins a flow, or somebody is to be told.
    More,
}

/// Those for one protocol and one gate: a list for all ports between two that rules tell apart.
#[derive(Clone, Debug)]
struct Part<const WORDS: usize> {
    /// On which of the pages a port is, by its upper byte. Those in a row that are alike are one.
    page_of: [u8; PAGE],
    /// Which list is for a port, by its lower byte.
    pages: Vec<[u16; PAGE]>,
    lists: Vec<List<WORDS>>,
}

/// Rules in their order.
#[derive(Clone, Debug)]
pub(super) struct List<const WORDS: usize> {
    lines: Vec<Line<WORDS>>,
    /// What is found where no entry matches: by a rule that matches whatever is left.
    otherwise: Found,
    /// Whether the same is found for all packets that have the same ends.
    is_by_ends: bool,
}

/// A rule, or a part of it that says the same of all packets.
#[derive(Clone, Copy, Debug)]
struct Entry<const WORDS: usize> {
    from: Span<WORDS>,
    to: Span<WORDS>,
    found: Found,
    /// Whether the rule says more than the entry, and whether it is about nothing but ends.
    more: bool,
    is_by_ends: bool,
}

impl RuleTable {
    pub(super) fn new(rules: &[Rule], otherwise: Action) -> Self {
        let none = Found {
            rule: u32::try_from(rules.len()).unwrap_or(u32::MAX),
            does: Does::of(otherwise, false),
        };
        Self {
            v4: parts(rules, IpVersion::V4, none),
            v6: parts(rules, IpVersion::V6, none),
        }
    }

    /// The rules for a usual packet.
    #[inline]
    pub(super) fn list_for(&self, usual: &Usual, gate: Gate) -> &List<V4> {
        part(&self.v4, usual.protocol, gate).list(usual.destination().1)
    }

    /// What is found for any packet of TCP or UDP that has ports; `None` for others. `matches` tells of a rule whether it does, where
    /// that takes more than the packet's ends.
    pub(super) fn find(
        &self,
        packet: &Packet,
        gate: Gate,
        matches: impl Fn(usize) -> bool,
    ) -> Option<Found> {
        let (protocol, from, to) = (packet.protocol, packet.from, packet.to);
        if !packet.has_ports || !matches!(protocol, TCP | UDP) {
            return None;
        }
        Some(match packet.version {
            IpVersion::V4 => part(&self.v4, protocol, gate).find(from, to, matches),
            IpVersion::V6 => part(&self.v6, protocol, gate).find(from, to, matches),
        })
    }
}

fn parts<const WORDS: usize>(rules: &[Rule], version: IpVersion, none: Found) -> Parts<WORDS> {
    let part = |protocol, gate| {
        let is_for_it = |rule: &Rule| {
            rule.came_in_by.is_none_or(|wanted| wanted == gate)
                && rule.version.is_none_or(|wanted| wanted == version)
                && (rule.protocols.is_empty() || rule.protocols.contains(&protocol))
                && rule.ethertype.is_none()
        };
        let rules = (0..).zip(rules).filter(|(_, rule)| is_for_it(rule));
        let entries = rules.flat_map(|(number, rule)| entries_of(number, rule, version));
        Part::new(entries.collect(), none)
    };
    [TCP, UDP].map(|protocol| [0, 1].map(|gate| part(protocol, gate)))
}

#[inline]
fn part<const WORDS: usize>(parts: &Parts<WORDS>, protocol: u8, gate: Gate) -> &Part<WORDS> {
    &parts[usize::from(protocol == UDP)][usize::from(gate & 1)]
}

impl Does {
    fn of(action: Action, keep_state: bool) -> Self {
        match action {
            Action::Pass if keep_state => Self::More,
            Action::Pass => Self::Pass,
            Action::Drop => Self::Drop,
            Action::Reject => Self::More,
        }
    }
}

impl<const WORDS: usize> Part<WORDS> {
    fn new(mut entries: Vec<Entry<WORDS>>, none: Found) -> Self {
        let mut starts = starts_of(entries.iter().map(|entry| entry.to.ports));
        let place = |port| starts.partition_point(|&first| first <= port) - 1;
        let lists_of = |entry: &Entry<WORDS>| place(entry.to.ports.0)..place(entry.to.ports.1) + 1;
        let mut ranges: Vec<_> = entries.iter().map(lists_of).collect();
        if ranges.iter().map(ExactSizeIterator::len).sum::<usize>() > ALL_MAX {
            starts = vec![0];
            ranges.fill(0..1);
        } else {
            for entry in &mut entries {
                // Its lists say it already.
                entry.to.ports = ALL_PORTS;
            }
        }
        let mut lists = vec![Vec::new(); starts.len()];
        for (entry, range) in entries.into_iter().zip(ranges) {
            lists[range].iter_mut().for_each(|list| list.push(entry));
        }
        let (page_of, pages) = pages_of(&starts);
        Self {
            page_of,
            pages,
            lists: lists
                .iter()
                .map(|entries| List::new(entries, none))
                .collect(),
        }
    }

    #[inline]
    fn list(&self, port: u16) -> &List<WORDS> {
        let [upper, lower] = port.to_be_bytes().map(usize::from);
        let page = &self.pages[usize::from(self.page_of[upper])];
        &self.lists[usize::from(page[lower])]
    }

    fn find(&self, from: End, to: End, matches: impl Fn(usize) -> bool) -> Found {
        let of = |end: End| (words(end.address), end.port);
        self.list(to.port).find(of(from), of(to), matches)
    }
}

/// Where ranges of ports begin and others end, each once and in order, from 0 on.
fn starts_of(ranges: impl Iterator<Item = (u16, u16)>) -> Vec<u16> {
    let ends = ranges.flat_map(|(first, last)| [Some(first), last.checked_add(1)]);
    let mut starts: Vec<_> = ends.flatten().chain([0]).collect();
    starts.sort_unstable();
    starts.dedup();
    starts
}

/// How many of these ports, but for the first, are not above a port: for all ports, in pages.
fn pages_of(starts: &[u16]) -> ([u8; PAGE], Vec<[u16; PAGE]>) {
    let mut all = vec![[0; PAGE]; PAGE];
    let firsts = starts.iter().map(|&first| usize::from(first));
    let ends = firsts.clone().skip(1).chain([PAGE * PAGE]);
    for ((number, first), end) in (0..).zip(firsts).zip(ends) {
        all.as_flattened_mut()[first..end].fill(number);
    }
    let mut number = 0;
    let page_of = std::array::from_fn(|page| {
        number += u8::from(page > 0 && all[page] != all[page - 1]);
        number
    });
    all.dedup();
    all.shrink_to_fit();
    (page_of, all)
}

impl<const WORDS: usize> List<WORDS> {
    fn new(entries: &[Entry<WORDS>], none: Found) -> Self {
        let last = entries.iter().position(Entry::matches_all);
        let otherwise = last.map_or(none, |last| entries[last].found);
        let entries = &entries[..last.unwrap_or(entries.len())];
        Self {
            lines: entries.chunks(LINE).map(Line::new).collect(),
            otherwise,
            is_by_ends: entries.iter().all(|entry| entry.is_by_ends),
        }
    }

    /// What is found for any packet, if there is nothing to compare.
    #[inline]
    pub(super) fn for_all(&self) -> Option<Found> {
        self.lines.is_empty().then_some(self.otherwise)
    }

    /// Whether the same is found for all packets that have the same ends.
    #[inline]
    pub(super) fn is_by_ends(&self) -> bool {
        self.is_by_ends
    }

    /// What is found for a packet with these ends. `matches` tells of a rule whether it does, where that takes more.
    #[inline]
    pub(super) fn find(
        &self,
        from: Point<WORDS>,
        to: Point<WORDS>,
        matches: impl Fn(usize) -> bool,
    ) -> Found {
        for line in &self.lines {
            let mut matching = line.matching(from, to);
            // Mostly none does.
            while matching != 0 {
                let at = matching.trailing_zeros() as usize / 2;
                let (found, more) = line.found[at % LINE];
                if !more || matches(found.rule as usize) {
                    return found;
                }
                matching &= !(3 << (2 * at));
            }
        }
        self.otherwise
    }
}

/// Entries of which one matches where a rule does.
fn entries_of<const WORDS: usize>(
    number: u32,
    rule: &Rule,
    version: IpVersion,
) -> impl Iterator<Item = Entry<WORDS>> + use<WORDS> {
    let is_simple = |ends: &Ends| !ends.not && ends.sets.is_empty();
    let of = |ends: &Ends| {
        let spans: Vec<_> = match is_simple(ends) && !ends.prefixes.is_empty() {
            true => {
                let prefixes = ends.prefixes.iter();
                let prefixes = prefixes.filter(|prefix| prefix.version == version);
                prefixes.filter_map(Span::of).collect()
            }
            false => vec![Span::ANY],
        };
        let ports = match ends.ports.is_empty() {
            true => vec![ALL_PORTS],
            false => ends.ports.clone(),
        };
        let ports = ports.into_iter().filter(|(first, last)| first <= last);
        let with = |ports| {
            let spans = spans.iter();
            spans.map(move |&span| Span { ports, ..span })
        };
        ports.flat_map(with).collect::<Vec<_>>()
    };
    let (mut from, mut to) = (of(&rule.from), of(&rule.to));
    let is_short = from.len() * to.len() <= ENTRIES_MAX;
    if !is_short {
        (from, to) = (vec![Span::ANY], vec![Span::ANY]);
    }
    let is_by_ends = rule.filter.is_none();
    let says_all = is_short && is_simple(&rule.from) && is_simple(&rule.to) && is_by_ends;
    let found = Found {
        rule: number,
        does: Does::of(rule.action, rule.keep_state),
    };
    from.into_iter().flat_map(move |from| {
        let pairs = to.clone().into_iter();
        pairs.map(move |to| Entry {
            from,
            to,
            found,
            more: !says_all,
            is_by_ends,
        })
    })
}

impl<const WORDS: usize> Entry<WORDS> {
    fn matches_all(&self) -> bool {
        !self.more && self.from.is_any() && self.to.is_any()
    }
}
