//! A router: IP packets from link to link, by the longest prefix of where they go.
//!
//! Each gate is a link, on which the router has an address of its own. A packet that is sent to that address is forwarded: its
//! time to live becomes less, its receiver's (or the next router's) address on the link is put in, and it leaves. What is only
//! a head of 192 bytes is changed in place; nothing else of a packet is looked at. A frame that is still to be cut into
//! segments passes as it is, if its segments fit the next link.
//!
//! What takes longer is done beside that: packets for stations whose address on the link is not known are copied and wait for
//! it ([`neighbours`]), what is longer than the next link carries is cut into fragments, senders are told of errors. Such
//! packets have ended here (consumed), and those that leave instead are the router's (generated), at the end of the breath.
//!
//! It may translate addresses on the way ([`nat`]): sources of what leaves to the outside, destinations that are services.
//!
//! Spec: RFC 1812 (IPv4), RFC 8200 and RFC 8504 (IPv6), RFC 826, RFC 4861. It reads no options and sends no redirects and no
//! router advertisements; it speaks no routing protocol. With several workers, one has it and the others hand over to it.

mod errors;
mod flows;
mod links;
mod local;
mod made;
mod maglev;
mod nat;
mod neighbours;
mod npt;
mod packet;
mod prefixes;
mod tables;
mod usual;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use virtnet_packet::header::{self, ETHERNET_LEN};
use virtnet_packet::{Burst, DropReason, Offload, Picks, Resolver};

pub use nat::{Service, Translation};
pub use npt::{PrefixPair, TRANSLATED_PREFIX_MAX};
pub use tables::{Route, RouterInterface, RouterTables};

use self::errors::{BEYOND_SCOPE6, HOPS_EXPIRED6, NO_NETWORK, NO_ROUTE6, TTL_EXPIRED, error};
use self::made::{Arp, IcmpError, fragment};
use self::nat::{Crossing, Nat, Plan};
use self::neighbours::{Neighbours, Station, Waiting};
use self::packet::{V4, V6, age_v4, longest, macs};
use self::tables::Next;
use self::usual::Hop;
use super::fragments::Early;
use super::outbox::Outbox;
use super::pace::Pace;
use super::{Fate, Fates, Verdict};
use crate::EngineError;
use crate::graph::Gate;

/// ICMP errors per second, if nothing else is said.
pub const ERRORS_PPS: u64 = 1_000;

/// What a router is to do; can be changed while it runs, and keeps whom it knows on the links that stay.
#[derive(Clone, Debug)]
pub struct RouterOrders {
    /// Its interfaces and routes.
    pub tables: Arc<RouterTables>,
    /// ICMP errors and resets of TCP that it sends in a second at most.
    pub errors_pps: u64,
    /// How it translates addresses, if it does. Flows that are there go on as they began.
    pub translation: Option<Arc<Translation>>,
}

impl RouterOrders {
    pub(super) fn check(&self) -> Result<(), EngineError> {
        if self.errors_pps == 0 {
            return Err(EngineError::ZeroRate);
        }
        Ok(())
    }
}

/// What a router has counted beyond what every function counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouterCounters {
    /// Routes it was given.
    pub routes: u64,
    /// Stations on its links whose address it knows.
    pub neighbours: u64,
    /// Packets that wait for the address of a station.
    pub waiting: u64,
    /// Packets it has sent on as they were but for their head.
    pub forwarded: u64,
    /// Questions for addresses that it has sent.
    pub asked: u64,
    /// Questions for its own addresses that it has answered.
    pub answered: u64,
    /// Pings it has answered.
    pub echo_answered: u64,
    /// ICMP errors and resets of TCP it has sent.
    pub errors_sent: u64,
    /// Those it has not sent because they would have been too many.
    pub errors_suppressed: u64,
    /// Packets it has cut into fragments.
    pub fragmented: u64,
    /// Flows whose addresses it translates.
    pub flows: u64,
    /// Such flows that have begun.
    pub flows_created: u64,
    /// Such flows that have ended.
    pub flows_expired: u64,
}

/// Sends IP packets from link to link.
#[derive(Debug)]
pub struct Router {
    tables: Arc<RouterTables>,
    neighbours: Neighbours,
    last: Last,
    outbox: Outbox,
    errors: Pace,
    resolver: Resolver,
    nat: Option<Box<Nat>>,
    counters: RouterCounters,
}

/// Where the last packet of a burst went: most go where the one before them went, and need not be looked up.
#[derive(Debug, Default)]
struct Last {
    route: Option<(Ipv4Addr, Next)>,
    /// The station, and the first bytes of what is sent to it.
    station: Option<(Station, [u8; 12])>,
    /// Where usual packets to an address go.
    hop: Option<(Ipv4Addr, Hop)>,
}

impl Default for Router {
    /// A router without interfaces.
    fn default() -> Self {
        Self {
            tables: Arc::default(),
            neighbours: Neighbours::default(),
            last: Last::default(),
            outbox: Outbox::default(),
            errors: Pace::rested(ERRORS_PPS, 0),
            resolver: Resolver::default(),
            nat: None,
            counters: RouterCounters::default(),
        }
    }
}

impl Router {
    /// A router.
    ///
    /// # Errors
    /// [`EngineError::ZeroRate`]. The caller's fault.
    pub fn new(orders: RouterOrders) -> Result<Self, EngineError> {
        orders.check()?;
        let mut router = Self::default();
        router.order(orders, 0);
        Ok(router)
    }

    /// What it has counted.
    #[must_use]
    pub fn counters(&self) -> RouterCounters {
        let (neighbours, waiting) = self.neighbours.count();
        let flows = self.nat.as_ref().map(|nat| &nat.flows);
        RouterCounters {
            routes: self.tables.routes() as u64,
            neighbours,
            waiting,
            flows: flows.map_or(0, |flows| flows.len() as u64),
            flows_created: flows.map_or(0, |flows| flows.created),
            flows_expired: flows.map_or(0, |flows| flows.expired),
            ..self.counters
        }
    }

    /// Takes new orders and gives back what they replace: a million routes are not freed within a breath.
    pub(super) fn order(&mut self, orders: RouterOrders, now: u64) -> impl Send + use<> {
        if !self.errors.is_of(orders.errors_pps) {
            self.errors = Pace::rested(orders.errors_pps, now);
        }
        let tables = std::mem::replace(&mut self.tables, orders.tables);
        let (nat, rules) = match orders.translation {
            Some(rules) => (None, Some(self.nat.get_or_insert_default().order(rules))),
            None => (self.nat.take(), None),
        };
        (tables, nat, rules)
    }

    /// Other cables are in `gates` now, or none.
    pub(super) fn forget(&mut self, gates: &[Gate]) {
        let outbox = &mut self.outbox;
        self.neighbours
            .forget(gates, |_| outbox.lose(DropReason::NoNeighbour, 1));
    }

    #[inline]
    pub(super) fn classify(
        &mut self,
        burst: &mut Burst,
        picks: &Picks,
        came_in_by: Gate,
        now: u64,
        fates: &mut Fates,
    ) -> Verdict {
        let tables = Arc::clone(&self.tables);
        let Some(here) = tables.at(came_in_by) else {
            return Verdict::All(Fate::Drop(DropReason::NoInterface));
        };
        self.last = Last::default();
        for (fate, i) in fates.iter_mut().zip(picks.iter()) {
            *fate = match self.forward(burst, i, here, now) {
                Some(fate) => fate,
                None => self.decide(burst, i, here, now),
            };
        }
        if self
            .nat
            .as_ref()
            .is_some_and(|nat| nat.fragments.has_released())
        {
            self.send_released(now);
        }
        Verdict::of(&fates[..picks.len()])
    }

    #[inline(never)]
    fn decide(&mut self, burst: &mut Burst, i: usize, here: &RouterInterface, now: u64) -> Fate {
        let (head, frame_len) = (burst.head(i), burst.frame_len(i));
        let (Some(to), Some(&kind)) = (
            header::destination(head),
            head.get(12..).and_then(<[u8]>::first_chunk::<2>),
        ) else {
            return Fate::Drop(DropReason::Malformed);
        };
        match kind {
            [0x08, 0x00] if to == here.mac => match V4::of(head, frame_len) {
                Some(ip) => {
                    trim(burst, i, ip.total_len);
                    self.v4(burst, i, here.gate, ip, now)
                }
                None => Fate::Drop(DropReason::Malformed),
            },
            [0x86, 0xdd] if to == here.mac || to.is_group() => match V6::of(head, frame_len) {
                Some(ip) => {
                    trim(burst, i, ip.total_len);
                    self.v6(burst, i, here, ip, now)
                }
                None => Fate::Drop(DropReason::Malformed),
            },
            [0x08, 0x06] if to == here.mac || to.is_group() => match Arp::of(head) {
                Some(arp) => self.arp(here, arp, now),
                None => Fate::Drop(DropReason::Malformed),
            },
            [0x08, 0x00 | 0x06] | [0x86, 0xdd] => Fate::Drop(DropReason::NotForUs),
            _ => Fate::Drop(DropReason::UnknownProtocol),
        }
    }

    // IPv4.

    #[inline]
    fn v4(&mut self, burst: &mut Burst, i: usize, gate: Gate, ip: V4, now: u64) -> Fate {
        let to = ip.destination;
        if !ip.has_source() || to.is_loopback() || to.is_unspecified() {
            return Fate::Drop(DropReason::Martian);
        }
        if to.is_multicast() || to.is_broadcast() {
            return Fate::Drop(DropReason::NotForUs);
        }
        let (plan, to) = match &mut self.nat {
            Some(nat) => nat.plan(burst.head(i), &ip, now),
            None => (Plan::AsIs, to),
        };
        let next = match self.last.route {
            Some((last, next)) if last == to => next,
            _ => {
                let next = self.tables.next(to.into());
                self.last.route = Some((to, next));
                next
            }
        };
        let to = IpAddr::V4(to);
        let station = match next {
            Next::Link(gate) => (gate, to),
            Next::Via(gate, via) => (gate, via),
            Next::Local => return self.local_v4(burst, i, gate, ip, now),
            Next::Broadcast => return Fate::Drop(DropReason::NotForUs),
            Next::Nowhere => {
                self.tell_v4(burst, i, gate, &ip, NO_NETWORK, now);
                return Fate::Drop(DropReason::NoRoute);
            }
        };
        if ip.ttl <= 1 {
            self.tell_v4(burst, i, gate, &ip, TTL_EXPIRED, now);
            return Fate::Drop(DropReason::TtlExpired);
        }
        let mtu = self.mtu(station.0);
        let is_too_long = longest(burst, i, ip.total_len) > mtu;
        if is_too_long && ip.whole {
            let wanted = IcmpError {
                rest: u32::try_from(mtu).unwrap_or_default(),
                ..error(3, 4)
            };
            self.tell_v4(burst, i, gate, &ip, wanted, now);
            return Fate::Drop(DropReason::TooBig);
        }
        if let Some(nat) = &mut self.nat {
            let offload = burst.offload(i);
            let crossing = Crossing {
                came_by: gate,
                leaves_by: station.0,
                now,
            };
            let head = burst.head_mut(i);
            if let Err(reason) = nat.carry_out(plan, head, &ip, offload, crossing, &self.tables) {
                return match reason {
                    DropReason::Fragment => self.keep_fragment(burst, i, gate, &ip, now),
                    _ => Fate::Drop(reason),
                };
            }
        }
        age_v4(burst.head_mut(i));
        if is_too_long {
            return self.cut(burst, i, station, now);
        }
        self.send_on(burst, i, station, now)
    }

    /// A fragment of which nobody can tell yet where it goes: it waits for the first of its packet.
    #[cold]
    fn keep_fragment(&mut self, burst: &Burst, i: usize, gate: Gate, ip: &V4, now: u64) -> Fate {
        if let Some(nat) = &mut self.nat {
            nat.keep(ip, burst.head(i), Early::of(burst, i, gate), now);
        }
        Fate::Consumed
    }

    /// Sends on fragments whose first has come.
    #[cold]
    fn send_released(&mut self, now: u64) {
        let tables = Arc::clone(&self.tables);
        let released = self.nat.as_mut().map(|nat| nat.fragments.take_released());
        let mut burst = Burst::new();
        for early in released.unwrap_or_default() {
            burst.clear();
            burst.push_bytes(&early.frame, early.offload);
            let fate = match tables.at(early.gate) {
                Some(here) => self.decide(&mut burst, 0, here, now),
                None => Fate::Drop(DropReason::NoInterface),
            };
            match fate {
                Fate::To(gate) => {
                    let mut frame = early.frame;
                    burst.copy_frame(0, &mut frame);
                    self.outbox.push(gate, &frame, early.offload);
                }
                Fate::Drop(reason) => self.outbox.lose(reason, 1),
                Fate::Consumed | Fate::Flood | Fate::Held => {}
            }
        }
    }

    // IPv6.

    #[inline]
    fn v6(
        &mut self,
        burst: &mut Burst,
        i: usize,
        here: &RouterInterface,
        ip: V6,
        now: u64,
    ) -> Fate {
        let (gate, to) = (here.gate, ip.destination);
        let is_nobody = to.is_loopback() || to.is_unspecified();
        if ip.source.is_multicast() || ip.source.is_loopback() || is_nobody {
            return Fate::Drop(DropReason::Martian);
        }
        let is_near = to.is_multicast() || to.is_unicast_link_local();
        if is_near || ip.source.is_unspecified() || !to_us(burst, i, here) {
            return self.near_v6(burst, i, here, ip, now);
        }
        let (goes_to, is_translated) = match &self.nat {
            Some(nat) if nat.has_prefixes() => match nat.plan6(&ip, &self.tables) {
                Ok(goes_to) => (goes_to, true),
                Err(at) => return self.tell_unmappable(burst, i, gate, &ip, at, now),
            },
            _ => (to, false),
        };
        let station = match self.tables.next(goes_to.into()) {
            Next::Link(gate) => (gate, goes_to.into()),
            Next::Via(gate, via) => (gate, via),
            Next::Local | Next::Broadcast => return self.local_v6(burst, i, here, ip, now),
            Next::Nowhere => {
                self.tell_v6(burst, i, gate, &ip, NO_ROUTE6, now);
                return Fate::Drop(DropReason::NoRoute);
            }
        };
        if ip.source.is_unicast_link_local() {
            self.tell_v6(burst, i, gate, &ip, BEYOND_SCOPE6, now);
            return Fate::Drop(DropReason::NoRoute);
        }
        if ip.hops <= 1 {
            self.tell_v6(burst, i, gate, &ip, HOPS_EXPIRED6, now);
            return Fate::Drop(DropReason::TtlExpired);
        }
        let mtu = self.mtu(station.0);
        if longest(burst, i, ip.total_len) > mtu {
            let wanted = IcmpError {
                rest: u32::try_from(mtu).unwrap_or_default(),
                ..error(2, 0)
            };
            self.tell_v6(burst, i, gate, &ip, wanted, now);
            return Fate::Drop(DropReason::TooBig);
        }
        if is_translated
            && let Some(nat) = &self.nat
            && let Err(at) = nat.carry_out6(burst.head_mut(i), &ip, goes_to, gate, station.0)
        {
            return self.tell_unmappable(burst, i, gate, &ip, at, now);
        }
        burst.head_mut(i)[ETHERNET_LEN + 7] = ip.hops - 1;
        self.send_on(burst, i, station, now)
    }

    /// Where an answer to `source` goes, which was heard on the link of `gate`.
    fn back_to(&self, source: IpAddr, gate: Gate) -> Option<Station> {
        if let IpAddr::V6(ip) = source
            && ip.is_unicast_link_local()
        {
            return Some((gate, source));
        }
        match self.tables.next(source) {
            Next::Link(gate) => Some((gate, source)),
            Next::Via(gate, via) => Some((gate, via)),
            Next::Nowhere | Next::Local | Next::Broadcast => None,
        }
    }

    // The way out.

    fn mtu(&self, gate: Gate) -> usize {
        self.tables.at(gate).map_or(usize::MAX, |there| there.mtu)
    }

    /// Sends a packet of the burst to a station, or has it wait for the station's address.
    #[inline]
    fn send_on(&mut self, burst: &mut Burst, i: usize, station: Station, now: u64) -> Fate {
        if self.last.station.is_none_or(|(last, _)| last != station) {
            self.last.station = self.neighbours.find(station, now).map(|mac| {
                let from = self.tables.at(station.0).map(|there| there.mac);
                (station, macs(mac, from.unwrap_or_default()))
            });
        }
        if let Some((_, known)) = self.last.station
            && let Some(macs) = burst.head_mut(i).first_chunk_mut()
        {
            *macs = known;
            self.counters.forwarded += 1;
            return Fate::To(station.0);
        }
        let from = self.tables.at(station.0).map(|there| there.mac);
        if let Some(macs) = burst.head_mut(i).get_mut(6..12) {
            macs.copy_from_slice(&from.unwrap_or_default().0);
        }
        let mut frame = vec![0; burst.frame_len(i)];
        burst.copy_frame(i, &mut frame);
        let offload = burst.offload(i);
        if self.neighbours.wait(station, Waiting { frame, offload }) {
            Fate::Consumed
        } else {
            Fate::Drop(DropReason::NoNeighbour)
        }
    }

    /// Cuts a packet into what its link carries.
    #[cold]
    fn cut(&mut self, burst: &Burst, i: usize, station: Station, now: u64) -> Fate {
        let mtu = self.mtu(station.0);
        let mut resolver = std::mem::take(&mut self.resolver);
        if resolver.take(burst, i).is_err() {
            self.resolver = resolver;
            return Fate::Drop(DropReason::BadOffload);
        }
        self.counters.fragmented += 1;
        while let Some(frame) = resolver.next_frame() {
            let header_len = usize::from(frame[ETHERNET_LEN] & 15) * 4;
            fragment(frame, header_len, mtu, |part| {
                self.send_frame(part.to_vec(), Offload::default(), station, now);
            });
        }
        self.resolver = resolver;
        Fate::Consumed
    }

    fn send_frame(&mut self, mut frame: Vec<u8>, offload: Offload, station: Station, now: u64) {
        let from = self.tables.at(station.0).map(|there| there.mac);
        frame[6..12].copy_from_slice(&from.unwrap_or_default().0);
        match self.neighbours.find(station, now) {
            Some(mac) => {
                frame[..6].copy_from_slice(&mac.0);
                self.outbox.push(station.0, &frame, offload);
            }
            None => {
                if !self.neighbours.wait(station, Waiting { frame, offload }) {
                    self.outbox.lose(DropReason::NoNeighbour, 1);
                }
            }
        }
    }

    // In every breath.

    /// Lays out what is due by now: questions, and packets whose receiver has answered.
    #[inline]
    pub(crate) fn prepare(&mut self, now: u64) {
        if let Some(nat) = &mut self.nat {
            nat.flows.sweep(now);
            nat.fragments.pass_time(now);
            let given_up = nat.fragments.take_given_up();
            if given_up > 0 {
                self.outbox.lose(DropReason::Fragment, given_up);
            }
        }
        if self.neighbours.is_pending() || self.neighbours.due().is_some_and(|due| due <= now) {
            self.do_what_is_due(now);
        }
    }

    #[cold]
    fn do_what_is_due(&mut self, now: u64) {
        while let Some(((gate, _), mac, waiting)) = self.neighbours.next_answered() {
            for mut one in waiting {
                one.frame[..6].copy_from_slice(&mac.0);
                self.outbox.push(gate, &one.frame, one.offload);
            }
        }
        let mut unanswered = Vec::new();
        self.neighbours
            .pass_time(now, |gate, waiting| unanswered.push((gate, waiting)));
        for (gate, waiting) in unanswered {
            self.outbox.lose(DropReason::NoNeighbour, 1);
            self.tell_of_unanswered(gate, &waiting, now);
        }
        for question in std::mem::take(&mut self.neighbours.questions) {
            self.ask(question);
        }
    }

    /// What is to be sent, and what came to nothing.
    #[inline]
    pub(crate) fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// When it has something to do again if nothing arrives.
    pub(super) fn due(&self) -> Option<u64> {
        if self.neighbours.is_pending() || !self.outbox.is_empty() {
            return Some(0);
        }
        let nat = self.nat.as_ref().and_then(|nat| nat.due());
        self.neighbours.due().into_iter().chain(nat).min()
    }
}

/// Takes off what a frame has behind its packet: what fills short ones up, and trailers. Spec: RFC 1122, 2.3.1.
#[inline]
fn trim(burst: &mut Burst, i: usize, total_len: usize) {
    if burst.frame_len(i) > ETHERNET_LEN + total_len {
        burst.trim(i, ETHERNET_LEN + total_len);
    }
}

/// Whether a frame is to this interface alone, and not to a group.
fn to_us(burst: &Burst, i: usize, here: &RouterInterface) -> bool {
    header::destination(burst.head(i)) == Some(here.mac)
}
