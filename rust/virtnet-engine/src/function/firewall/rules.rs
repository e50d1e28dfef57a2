//! Rules, and finding the first that a packet matches.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use virtnet_packet::flow::IpVersion;

use super::packet::{Packet, Piece, Seen};
use super::sets::{AddressSet, Prefix};
use super::states::Usual;
use super::table::{Found, List, RuleTable};
use crate::function::Filter;
use crate::graph::Gate;

/// What is done to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on.
    Pass,
    /// It is dropped.
    Drop,
    /// It is dropped, and its sender told: by a reset (TCP) or an unreachable port.
    Reject,
}

/// What a rule says of one end of a packet's way. Nothing: any.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// Turns the meaning of the addresses round: all but these.
    pub not: bool,
    /// Addresses.
    pub prefixes: Vec<Prefix>,
    /// Addresses by number of a set.
    pub sets: Vec<usize>,
    /// First and last port of ranges.
    pub ports: Vec<(u16, u16)>,
}

impl Ends {
    fn is_any(&self) -> bool {
        self.prefixes.is_empty() && self.sets.is_empty()
    }

    fn matches(&self, sets: &[Arc<AddressSet>], version: IpVersion, address: u128) -> bool {
        self.is_any() || self.not != self.names(sets, version, address)
    }

    fn names(&self, sets: &[Arc<AddressSet>], version: IpVersion, address: u128) -> bool {
        let mut prefixes = self.prefixes.iter();
        prefixes.any(|prefix| prefix.contains(version, address))
            || self
                .sets
                .iter()
                .filter_map(|&set| sets.get(set))
                .any(|set| set.contains(version, address))
    }

    fn has_port(&self, port: u16) -> bool {
        let mut ports = self.ports.iter();
        self.ports.is_empty() || ports.any(|&(first, last)| (first..=last).contains(&port))
    }
}

/// A rule.
#[derive(Clone, Debug)]
pub struct Rule {
    /// What is done.
    pub action: Action,
    /// By which gate a packet has to come.
    pub came_in_by: Option<Gate>,
    /// Of which version of IP it has to be.
    pub version: Option<IpVersion>,
    /// Of which protocols above IP; none: any.
    pub protocols: Vec<u8>,
    /// Of which EtherType, for what is no IP.
    pub ethertype: Option<u16>,
    /// Where it comes from.
    pub from: Ends,
    /// Where it goes.
    pub to: Ends,
    /// What else it has to match.
    pub filter: Option<Filter>,
    /// Whether what belongs to a packet that matches passes, too.
    pub keep_state: bool,
    /// The rule as it was written; what is counted is counted by it.
    pub text: String,
}

impl Rule {
    /// Whether only IP can match.
    fn is_about_ip(&self) -> bool {
        let ends = [&self.from, &self.to];
        self.version.is_some()
            || !self.protocols.is_empty()
            || self.keep_state
            || ends
                .iter()
                .any(|end| !end.is_any() || !end.ports.is_empty())
    }

    fn matches(
        &self,
        sets: &[Arc<AddressSet>],
        seen: &Seen,
        gate: Gate,
        head: &[u8],
        frame_len: usize,
    ) -> bool {
        if self.came_in_by.is_some_and(|wanted| wanted != gate) {
            return false;
        }
        let fits = match seen {
            Seen::Ip(packet) => self.ethertype.is_none() && self.matches_ip(sets, packet),
            Seen::Other(kind) => {
                !self.is_about_ip() && self.ethertype.is_none_or(|wanted| wanted == *kind)
            }
            Seen::Malformed => false,
        };
        fits && self
            .filter
            .as_ref()
            .is_none_or(|filter| filter.matches(head, frame_len))
    }

    fn matches_ip(&self, sets: &[Arc<AddressSet>], packet: &Packet) -> bool {
        let Packet {
            version,
            protocol,
            from,
            to,
            ..
        } = *packet;
        let asks_ports = !self.from.ports.is_empty() || !self.to.ports.is_empty();
        let has_ports = packet.has_ports && packet.piece != Piece::Later;
        self.version.is_none_or(|wanted| wanted == version)
            && (self.protocols.is_empty() || self.protocols.contains(&protocol))
            && (!asks_ports
                || has_ports && self.from.has_port(from.port) && self.to.has_port(to.port))
            && self.from.matches(sets, version, from.address)
            && self.to.matches(sets, version, to.address)
    }
}

/// A number that stands for a text: two that differ have the same one with a chance of 2^-128.
fn digest(text: &str) -> u128 {
    let half = |which: u8| {
        let mut hasher = DefaultHasher::new();
        (which, text).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// Rules in their order, with the sets that they name.
#[derive(Clone, Debug)]
pub struct RuleSet {
    /// The rules; the first that matches counts.
    pub(super) rules: Vec<Rule>,
    /// The sets.
    pub(super) sets: Vec<Arc<AddressSet>>,
    /// What is done to what no rule matches.
    pub(super) otherwise: Action,
    /// Whether pieces of a datagram go where its first piece went; otherwise none passes.
    pub(super) fragments: bool,
    /// What each rule is known by, with its number, in order: worked out here, so that a worker that takes other rules finds those
    /// that stay in one pass through two lists.
    by_text: Vec<(u128, u32)>,
    /// The same rules for packets of TCP and UDP.
    table: RuleTable,
    keeps_state: bool,
}

impl RuleSet {
    /// Rules in their order, with the sets that they name.
    #[must_use]
    pub fn new(
        rules: Vec<Rule>,
        sets: Vec<Arc<AddressSet>>,
        otherwise: Action,
        fragments: bool,
    ) -> Self {
        let mut by_text: Vec<_> = rules
            .iter()
            .map(|rule| digest(&rule.text))
            .zip(0..)
            .collect();
        by_text.sort_unstable();
        Self {
            table: RuleTable::new(&rules, otherwise),
            keeps_state: rules.iter().any(|rule| rule.keep_state),
            rules,
            sets,
            otherwise,
            fragments,
            by_text,
        }
    }

    /// For each rule the number that a rule of the same text had in `before`, if there was one; no number is given twice.
    pub(super) fn stayed<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (u32, Option<u32>)> + 'a {
        let mut old = before.by_text.iter().peekable();
        self.by_text.iter().map(move |&(digest, number)| {
            while old.next_if(|&&(other, _)| other < digest).is_some() {}
            let same = old.next_if(|&&(other, _)| other == digest);
            (number, same.map(|&(_, number)| number))
        })
    }

    /// The first rule that matches, by its number. Of those for TCP and UDP only what the table leaves are looked at.
    pub(super) fn first(
        &self,
        seen: &Seen,
        gate: Gate,
        head: &[u8],
        frame_len: usize,
    ) -> Option<(usize, &Rule)> {
        let found = match seen {
            Seen::Ip(packet) => self.table.find(packet, gate, |at| {
                self.rules[at].matches(&self.sets, seen, gate, head, frame_len)
            }),
            _ => None,
        };
        let at = match found {
            Some(found) => found.rule as usize,
            None => self.read(seen, gate, head, frame_len)?,
        };
        Some((at, self.rules.get(at)?))
    }

    /// The same by reading one after the other.
    pub(super) fn read(
        &self,
        seen: &Seen,
        gate: Gate,
        head: &[u8],
        frame_len: usize,
    ) -> Option<usize> {
        let mut rules = self.rules.iter();
        rules.position(|rule| rule.matches(&self.sets, seen, gate, head, frame_len))
    }

    /// The rules for a usual packet.
    #[inline]
    pub(super) fn list_for(&self, usual: &Usual, gate: Gate) -> &List<1> {
        self.table.list_for(usual, gate)
    }

    /// What the first of these says that a usual packet matches. What it costs depends on how many there are, an eighth of a rule's cost
    /// for each.
    #[inline]
    pub(super) fn find(
        &self,
        list: &List<1>,
        usual: &Usual,
        gate: Gate,
        head: &[u8],
        frame_len: usize,
    ) -> Found {
        let of = |(address, port)| ([address], port);
        list.find(of(usual.source()), of(usual.destination()), |rule| {
            let seen = Seen::Ip(usual.packet());
            self.rules[rule].matches(&self.sets, &seen, gate, head, frame_len)
        })
    }

    /// Whether some rule lets flows begin.
    #[inline]
    pub(super) fn keeps_state(&self) -> bool {
        self.keeps_state
    }
}
