//! Translation of IPv4 addresses and ports: of sources where packets leave to the outside, of destinations that are services.
//!
//! Packets of a flow are translated by both of its tuples ([`flows`](super::flows)), so all that a rule decides is how a flow
//! begins. ICMP errors belong to the flow of the packet that they quote, and are translated with the quotation. Fragments go where
//! the first of their packet went, and wait for it ([`fragments`](crate::function::fragments)). Checksums are changed by the
//! difference, whatever they were.
//!
//! Spec: RFC 2663, RFC 4787 (UDP), RFC 5382 (TCP), RFC 5508 (ICMP), RFC 1624. A mapping is a flow's alone (address and port
//! dependent, as Linux has it), its port stays what it was where that is free.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use virtnet_packet::checksum::Sum;
use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{DropReason, Offload, flow_hash};

use super::super::fragments::{Early, Fragments};
use super::flows::{Change, End, Flows, Place, Tuple};
use super::maglev::Maglev;
use super::npt::{Crossing6, DESTINATION, Pairs, PrefixPair, Unmappable, Way};
use super::packet::{ICMP, TCP, UDP, V4, V4_LEN, V6, put, renew, word};
use super::tables::{Next, RouterTables};
use crate::graph::Gate;

/// Ports that are looked at for a free one.
const TRIES: u32 = 128;
/// The lowest port that is given to a flow that cannot keep its own.
const PORT_MIN: u16 = 1_024;

/// Where in a frame an IPv4 header without options has its addresses, and where it ends.
const ADDRESSES: usize = ETHERNET_LEN + 12;
const TRANSPORT: usize = ETHERNET_LEN + V4_LEN;

/// How a router translates; without services and without an outside it does not.
#[derive(Debug, Default)]
pub struct Translation {
    outside: Vec<Gate>,
    pool: Vec<Ipv4Addr>,
    services: HashMap<(u8, End), Maglev, foldhash::fast::RandomState>,
    /// The addresses of services.
    served: HashSet<Ipv4Addr, foldhash::fast::RandomState>,
    flows_max: usize,
    prefixes: Pairs,
}

/// What is reached at an address of the router: a port of TCP (6) or UDP (17), or all ports (0).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// TCP or UDP.
    pub protocol: u8,
    /// The address and port.
    pub at: (Ipv4Addr, u16),
    /// Who serves it; several share the flows.
    pub backends: Vec<(Ipv4Addr, u16)>,
}

impl Translation {
    /// Has what leaves by `outside` gates get a source of `pool`, or of the router where that is empty, and what goes to
    /// services their back-ends. At most `flows_max` flows are translated at a time.
    #[must_use]
    pub fn new(
        outside: Vec<Gate>,
        pool: Vec<Ipv4Addr>,
        services: Vec<Service>,
        flows_max: usize,
    ) -> Self {
        Self {
            outside,
            pool,
            served: services.iter().map(|it| it.at.0).collect(),
            services: services
                .into_iter()
                .map(|it| ((it.protocol, it.at), Maglev::new(it.backends)))
                .collect(),
            flows_max,
            prefixes: Pairs::default(),
        }
    }

    /// Has prefixes of IPv6 inside be others outside.
    #[must_use]
    pub fn with_prefixes(mut self, pairs: &[PrefixPair]) -> Self {
        self.prefixes = Pairs::new(pairs);
        self
    }

    fn is_outside(&self, gate: Gate) -> bool {
        self.outside.contains(&gate)
    }
}

/// What a packet is to translation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Plan {
    /// It stays as it is.
    AsIs,
    /// It belongs to a flow.
    Known(Place),
    /// It is an error about a packet of a flow.
    Related(Place),
    /// A fragment but the first, of a packet whose addresses have become these.
    Fragment(Ipv4Addr, Ipv4Addr),
    /// It may begin a flow; to a service, with this back-end.
    New(Tuple, Option<End>),
}

/// By which gate a packet came, by which it leaves, and when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crossing {
    pub(super) came_by: Gate,
    pub(super) leaves_by: Gate,
    pub(super) now: u64,
}

/// What fragments of a packet have in common: source, destination, identification and protocol. Spec: RFC 791, 3.2.
type PacketKey = (Ipv4Addr, Ipv4Addr, u16, u8);

fn key_of(head: &[u8], ip: &V4) -> PacketKey {
    let identification = word(head, ETHERNET_LEN + 4);
    (ip.source, ip.destination, identification, ip.protocol)
}

/// A translator with its flows.
#[derive(Debug, Default)]
pub(super) struct Nat {
    rules: Arc<Translation>,
    pub(super) flows: Flows,
    /// What the addresses of a packet's fragments become.
    pub(super) fragments: Fragments<PacketKey, (Ipv4Addr, Ipv4Addr)>,
    random: u32,
}

impl Nat {
    /// Takes new rules and gives back the old ones.
    pub(super) fn order(&mut self, rules: Arc<Translation>) -> Arc<Translation> {
        std::mem::replace(&mut self.rules, rules)
    }

    /// What is to become of a packet, whose addresses are those in its head, and where it goes then.
    #[inline]
    pub(super) fn plan(&mut self, head: &[u8], ip: &V4, now: u64) -> (Plan, Ipv4Addr) {
        let as_is = (Plan::AsIs, ip.destination);
        if ip.later {
            return match self.fragments.find(&key_of(head, ip), now) {
                Some((source, destination)) => (Plan::Fragment(source, destination), destination),
                None => as_is,
            };
        }
        let at = ip.transport();
        if ip.protocol == ICMP && !matches!(head.get(at), Some(0 | 8)) {
            let quoted = quoted(head, at).map(|(_, tuple)| tuple.turned());
            return match quoted.and_then(|tuple| self.flows.find(&tuple, now)) {
                Some((place, goes_to)) => (Plan::Related(place), goes_to),
                None => as_is,
            };
        }
        let Some(tuple) = tuple_of(head, at, ip.protocol, ip.source, ip.destination) else {
            return as_is;
        };
        if let Some((place, goes_to)) = self.flows.find(&tuple, now) {
            return (Plan::Known(place), goes_to);
        }
        // An answer begins nothing.
        if ip.protocol == ICMP && head.get(at) == Some(&0) {
            return as_is;
        }
        let services = &self.rules.services;
        let service = services.get(&(tuple.protocol, tuple.destination));
        let backend = service.and_then(|service| service.find(flow_hash(head)));
        let goes_to = backend.map_or(ip.destination, |(ip, _)| ip);
        (Plan::New(tuple, backend), goes_to)
    }

    /// The flow that a usual packet of TCP or UDP belongs to, and where the packet goes then.
    #[inline]
    pub(super) fn known(&self, head: &[u8], protocol: u8, now: u64) -> Option<(Place, Ipv4Addr)> {
        let &[a, b, c, d, e, f, g, h, p0, p1, q0, q1] = head.get(ADDRESSES..)?.first_chunk()?;
        let tuple = Tuple {
            protocol,
            source: (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([p0, p1])),
            destination: (Ipv4Addr::new(e, f, g, h), u16::from_be_bytes([q0, q1])),
        };
        matches!(protocol, TCP | UDP).then_some(())?;
        self.flows.find(&tuple, now)
    }

    /// Translates such a packet of a flow.
    #[inline]
    pub(super) fn carry_on(
        &mut self,
        place: Place,
        head: &mut [u8],
        protocol: u8,
        offload: Offload,
        now: u64,
    ) {
        let flags = match protocol {
            TCP => head.get(TRANSPORT + 13).copied().unwrap_or_default(),
            _ => 0,
        };
        if let Some((leaving, change)) = self.flows.pass(place, flags, now) {
            rewrite_at(head, (protocol, TRANSPORT), offload, (&leaving, change));
        }
    }

    /// Translates a packet that came in by one gate and leaves by another.
    #[inline]
    pub(super) fn carry_out(
        &mut self,
        plan: Plan,
        head: &mut [u8],
        ip: &V4,
        offload: Offload,
        crossing: Crossing,
        tables: &RouterTables,
    ) -> Result<(), DropReason> {
        let Crossing {
            came_by,
            leaves_by,
            now,
        } = crossing;
        match plan {
            Plan::AsIs => {
                // Nobody outside is shown an address that is not translated, and nobody from there comes in by one.
                let crosses = self.rules.is_outside(came_by) != self.rules.is_outside(leaves_by);
                if ip.later && (crosses || self.rules.served.contains(&ip.destination)) {
                    return Err(DropReason::Fragment);
                }
                if crosses {
                    return Err(DropReason::NoMapping);
                }
            }
            Plan::Fragment(source, destination) => readdress(head, (source, destination)),
            Plan::Related(place) => {
                if let Some((arriving, leaving)) = self.flows.tuples(place) {
                    translate_error(head, ip, &arriving, &leaving);
                }
            }
            Plan::Known(place) => {
                let flags = if ip.protocol == TCP {
                    head.get(ip.transport() + 13).copied().unwrap_or_default()
                } else {
                    0
                };
                if let Some((leaving, change)) = self.flows.pass(place, flags, now) {
                    rewrite(head, ip, offload, (&leaving, change));
                }
            }
            Plan::New(tuple, backend) => {
                if let Some(place) = self.begin(&tuple, backend, crossing, tables)?
                    && let Some((leaving, change)) = self.flows.pass(place, 0, now)
                {
                    rewrite(head, ip, offload, (&leaving, change));
                }
            }
        }
        if ip.fragment && !ip.later {
            self.tell_fragments(head, ip, now);
        }
        Ok(())
    }

    /// Begins a flow, if it is one that is translated.
    fn begin(
        &mut self,
        tuple: &Tuple,
        backend: Option<End>,
        crossing: Crossing,
        tables: &RouterTables,
    ) -> Result<Option<Place>, DropReason> {
        let (rules, now) = (Arc::clone(&self.rules), crossing.now);
        let from_outside = rules.is_outside(crossing.came_by);
        let to_outside = rules.is_outside(crossing.leaves_by);
        if backend.is_none() && from_outside && !to_outside {
            return Err(DropReason::NoMapping);
        }
        // Who asks for a service on its own side has to get the answers from where it has asked.
        let is_hairpin =
            backend.is_some() && !rules.outside.is_empty() && !from_outside && !to_outside;
        let is_hidden = (to_outside && !from_outside) || is_hairpin;
        if backend.is_none() && !is_hidden {
            return Ok(None);
        }
        let mut reply = Tuple {
            protocol: tuple.protocol,
            source: backend.unwrap_or(tuple.destination),
            destination: tuple.source,
        };
        if is_hidden {
            let outer = if is_hairpin {
                tuple.destination.0
            } else {
                self.outer(tuple, crossing.leaves_by, tables)?
            };
            reply.destination = self.free_port(reply, outer, &rules, now)?;
        } else if !self.flows.is_free(&reply, now) {
            return Err(DropReason::TableFull);
        }
        match self.flows.insert(*tuple, reply, rules.flows_max, now) {
            Some(place) => Ok(Some(place)),
            None => Err(DropReason::TableFull),
        }
    }

    /// The address that a flow is seen by outside: for one station always the same.
    fn outer(
        &self,
        tuple: &Tuple,
        gate: Gate,
        tables: &RouterTables,
    ) -> Result<Ipv4Addr, DropReason> {
        let pool = &self.rules.pool;
        if let Some(n) = u32::try_from(pool.len()).ok().filter(|&n| n > 0) {
            return Ok(pool[(tuple.source.0.to_bits() % n) as usize]);
        }
        match tables.source(gate, tuple.destination.0.into()) {
            Some(IpAddr::V4(ip)) => Ok(ip),
            _ => Err(DropReason::NoMapping),
        }
    }

    /// A port at `outer` by which the flow's answers are told from all others; its own, if it can be.
    fn free_port(
        &mut self,
        mut reply: Tuple,
        outer: Ipv4Addr,
        rules: &Translation,
        now: u64,
    ) -> Result<End, DropReason> {
        let own = reply.destination.1;
        reply.destination = (outer, own);
        for _ in 0..TRIES {
            let is_service = rules
                .services
                .contains_key(&(reply.protocol, reply.destination));
            if !is_service && self.flows.is_free(&reply, now) {
                return Ok(reply.destination);
            }
            if !matches!(reply.protocol, TCP | UDP | ICMP) {
                break;
            }
            self.random = self
                .random
                .wrapping_mul(1_664_525)
                .wrapping_add(1_013_904_223);
            let port = u16::try_from(self.random >> 16).unwrap_or_default();
            reply.destination.1 = PORT_MIN + port % (u16::MAX - PORT_MIN);
        }
        Err(DropReason::TableFull)
    }

    /// Whether prefixes of IPv6 are translated.
    #[inline]
    pub(super) fn has_prefixes(&self) -> bool {
        !self.rules.prefixes.is_empty()
    }

    /// The address that a packet goes to: if it is not one of the router's own, that of the station inside.
    pub(super) fn plan6(&self, ip: &V6, tables: &RouterTables) -> Result<Ipv6Addr, Unmappable> {
        let to = ip.destination;
        match self.rules.prefixes.map(to, Way::In) {
            Some(within) if within == to => Ok(to),
            _ if tables.next(to.into()) == Next::Local => Ok(to),
            Some(within) => Ok(within),
            None => Err(Unmappable(DESTINATION)),
        }
    }

    /// Translates a packet that came in by one gate and leaves by another.
    pub(super) fn carry_out6(
        &self,
        head: &mut [u8],
        ip: &V6,
        goes_to: Ipv6Addr,
        came_by: Gate,
        leaves_by: Gate,
    ) -> Result<(), Unmappable> {
        let from_outside = self.rules.is_outside(came_by);
        let into = goes_to != ip.destination;
        let out = !from_outside && (into || self.rules.is_outside(leaves_by));
        let into = into || from_outside;
        let crossing = Crossing6 { out, into };
        self.rules.prefixes.carry_out(head, ip, crossing)
    }

    /// Gives a packet of IPv6 that was to leave the addresses that it has come with.
    pub(super) fn restore6(&self, head: &mut [u8], ip: &V6) {
        self.rules.prefixes.restore(head, ip);
    }

    /// The first fragment of a packet says where the others go, which have no ports.
    #[cold]
    fn tell_fragments(&mut self, head: &[u8], ip: &V4, now: u64) {
        if let Some(&[a, b, c, d, e, f, g, h]) = head.get(ETHERNET_LEN + 12..ETHERNET_LEN + 20) {
            let addresses = (Ipv4Addr::new(a, b, c, d), Ipv4Addr::new(e, f, g, h));
            self.fragments.tell(key_of(head, ip), addresses, now);
        }
    }

    /// Keeps a fragment until the first one of its packet comes.
    pub(super) fn keep(&mut self, ip: &V4, head: &[u8], fragment: Early, now: u64) {
        self.fragments.keep(key_of(head, ip), fragment, now);
    }

    /// When time has to pass.
    pub(super) fn due(&self) -> Option<u64> {
        let flows = self.flows.due();
        flows.into_iter().chain(self.fragments.due()).min()
    }

    /// Gives a packet that was to leave the addresses that it has come with.
    pub(super) fn restore(&self, head: &mut [u8], ip: &V4, offload: Offload, now: u64) {
        let at = ip.transport();
        let leaving = tuple_of(head, at, ip.protocol, ip.source, ip.destination);
        let place = leaving.and_then(|tuple| self.flows.find(&tuple.turned(), now));
        if let Some((back, change)) = place.and_then(|(place, _)| self.flows.changed(place)) {
            rewrite(head, ip, offload, (&back.turned(), change));
        }
    }
}

/// Writes the addresses and ports of a packet, and mends its checksums.
#[inline]
fn rewrite(head: &mut [u8], ip: &V4, offload: Offload, by: (&Tuple, Change)) {
    rewrite_at(head, (ip.protocol, ip.transport()), offload, by);
}

/// The same for a packet of a protocol whose header is at a place.
#[inline]
fn rewrite_at(
    head: &mut [u8],
    (protocol, at): (u8, usize),
    offload: Offload,
    (to, change): (&Tuple, Change),
) {
    write_addresses(head, ETHERNET_LEN, (to.source.0, to.destination.0));
    add(head, ETHERNET_LEN + 10, change.addresses);
    retell(head, at, to);
    let is_left_to_do = offload.flags & Offload::NEEDS_CSUM != 0;
    mend(head, at, protocol, change, is_left_to_do);
}

/// The tuple of the packet whose transport's header is at `at`; none for errors.
fn tuple_of(
    head: &[u8],
    at: usize,
    protocol: u8,
    source: Ipv4Addr,
    destination: Ipv4Addr,
) -> Option<Tuple> {
    let (from, to) = match protocol {
        TCP | UDP => {
            head.get(at..at + 4)?;
            (word(head, at), word(head, at + 2))
        }
        ICMP => match head.get(at)? {
            8 => (word(head, at + 4), 0),
            0 => (0, word(head, at + 4)),
            _ => return None,
        },
        _ => (0, 0),
    };
    Some(Tuple {
        protocol,
        source: (source, from),
        destination: (destination, to),
    })
}

/// The packet that the ICMP error at `at` quotes: where its transport's header is, and its tuple.
fn quoted(head: &[u8], at: usize) -> Option<(usize, Tuple)> {
    if !matches!(head.get(at)?, 3 | 4 | 11 | 12) {
        return None;
    }
    let ip = at + 8;
    let fixed: &[u8; 20] = head.get(ip..)?.first_chunk()?;
    let header_len = usize::from(fixed[0] & 15) * 4;
    let is_later = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x1fff != 0;
    if fixed[0] >> 4 != 4 || header_len < 20 || is_later {
        return None;
    }
    let address = |at: usize| Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]);
    let inner = ip + header_len;
    let tuple = tuple_of(head, inner, fixed[9], address(12), address(16))?;
    Some((inner, tuple))
}

/// Writes the addresses of the IPv4 header in a frame.
fn readdress(head: &mut [u8], (source, destination): (Ipv4Addr, Ipv4Addr)) {
    readdress_at(head, ETHERNET_LEN, source, destination);
}

fn readdress_at(head: &mut [u8], ip: usize, source: Ipv4Addr, destination: Ipv4Addr) {
    let addresses = ip + 12..ip + 20;
    let sum = |head: &[u8]| {
        head.get(addresses.clone())
            .map(|them| !Sum::of(them).checksum())
    };
    let was = sum(head);
    write_addresses(head, ip, (source, destination));
    if let Some((was, is)) = was.zip(sum(head)) {
        renew(head, ip + 10, was, is);
    }
}

#[inline]
fn write_addresses(head: &mut [u8], ip: usize, (source, destination): (Ipv4Addr, Ipv4Addr)) {
    if let Some(addresses) = head.get_mut(ip + 12..ip + 20) {
        addresses[..4].copy_from_slice(&source.octets());
        addresses[4..].copy_from_slice(&destination.octets());
    }
}

/// Adds a change to what the checksum at `at` covers.
#[inline]
fn add(head: &mut [u8], at: usize, change: u16) {
    let sum = Sum::default().and_word(!word(head, at)).and_word(change);
    put(head, at, sum.checksum());
}

/// Writes the ports, or a ping's identifier.
fn retell(head: &mut [u8], at: usize, tuple: &Tuple) {
    match tuple.protocol {
        TCP | UDP => {
            put(head, at, tuple.source.1);
            put(head, at + 2, tuple.destination.1);
        }
        ICMP if head.get(at) == Some(&8) => put(head, at + 4, tuple.source.1),
        ICMP => put(head, at + 4, tuple.destination.1),
        _ => {}
    }
}

/// Mends a transport's checksum after a change of what it covers.
#[inline]
fn mend(head: &mut [u8], at: usize, protocol: u8, change: Change, is_left_to_do: bool) {
    match (protocol, is_left_to_do) {
        // The sum of the pseudo-header stands there, as it is.
        (TCP | UDP, true) => {
            let place = at + if protocol == TCP { 16 } else { 6 };
            let sum = Sum::default()
                .and_word(word(head, place))
                .and_word(change.addresses);
            put(head, place, !sum.checksum());
        }
        (TCP, false) => {
            add(head, at + 16, change.addresses);
            add(head, at + 16, change.ports);
        }
        // 0 says that there is none.
        (UDP, false) if word(head, at + 6) != 0 => {
            let sum = Sum::default()
                .and_word(!word(head, at + 6))
                .and_word(change.addresses)
                .and_word(change.ports);
            put(head, at + 6, sum.checksum_not_zero());
        }
        (ICMP, false) => add(head, at + 2, change.ports),
        _ => {}
    }
}

/// Translates an ICMP error about a packet of a flow, and the packet it quotes, which went the other way.
fn translate_error(head: &mut [u8], ip: &V4, arriving: &Tuple, leaving: &Tuple) {
    let at = ip.transport();
    let Some((inner, _)) = quoted(head, at) else {
        return;
    };
    let even = head.len() - (head.len() - at) % 2;
    let before = Sum::of(&head[at..even]).checksum();
    let back = leaving.turned();
    readdress_at(head, at + 8, back.source.0, back.destination.0);
    let checksum = inner
        + match back.protocol {
            TCP => 16,
            _ => 6,
        };
    // Only what is there of the quoted transport's header.
    if matches!(back.protocol, TCP | UDP) && head.get(checksum..checksum + 2).is_some() {
        let was_back = arriving.turned();
        let covered = |tuple: &Tuple| {
            let words = [tuple.source, tuple.destination]
                .map(|(ip, port)| Sum::of(&ip.octets()).and_word(port));
            !words[0].and(words[1]).checksum()
        };
        if back.protocol == TCP || word(head, checksum) != 0 {
            renew(head, checksum, covered(&was_back), covered(&back));
        }
    }
    retell(head, inner, &back);
    let after = !Sum::of(&head[at..even]).checksum();
    let sum = Sum::default()
        .and_word(!word(head, at + 2))
        .and_word(before)
        .and_word(after)
        .checksum();
    put(head, at + 2, sum);
    // Whoever is in the middle is shown outside as the station behind it.
    let source = if arriving.source == leaving.source {
        ip.source
    } else {
        leaving.source.0
    };
    readdress(head, (source, leaving.destination.0));
}
