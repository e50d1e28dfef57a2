//! Who talks with whom: flows that a rule has let begin, each until nothing was heard of it for too long.
//!
//! The table has its room from the start, so it never grows within a breath. Where it is full, a flow that has expired or has not
//! been answered yet makes room for a new one, if a few looks find one; otherwise the new one is not let in.

use std::collections::HashMap;
use std::time::Duration;

use foldhash::fast::RandomState;
use virtnet_packet::flow::IpVersion;

use super::packet::{End, Packet};
use super::tcp::{Connection, Phase};
use crate::graph::Gate;

/// The most flows that can be remembered.
pub(crate) const STATES_MAX: usize = 1 << 24;

/// How many flows are looked at to make room for one.
const LOOKS: usize = 16;

/// How long a flow is remembered after its last packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A connection of TCP that is being opened.
    pub tcp_opening: Duration,
    /// One that is open.
    pub tcp: Duration,
    /// One that is being closed, or was broken off.
    pub tcp_closing: Duration,
    /// A flow that was not answered yet.
    pub unanswered: Duration,
    /// UDP that was answered.
    pub udp: Duration,
    /// Pings.
    pub icmp: Duration,
    /// Other protocols, answered.
    pub other: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_opening: Duration::from_secs(30),
            tcp: Duration::from_secs(86_400),
            tcp_closing: Duration::from_secs(60),
            unanswered: Duration::from_secs(30),
            udp: Duration::from_secs(120),
            icmp: Duration::from_secs(20),
            other: Duration::from_secs(120),
        }
    }
}

/// Both ends of a flow, the same whichever way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    low: u128,
    high: u128,
    ports: u32,
    /// VLAN, protocol, version.
    kind: u32,
}

impl Key {
    #[inline]
    pub(super) fn of(packet: &Packet) -> Self {
        let (low, high) = match packet.from <= packet.to {
            true => (packet.from, packet.to),
            false => (packet.to, packet.from),
        };
        let version = u32::from(packet.version == IpVersion::V6);
        Self {
            low: low.address,
            high: high.address,
            ports: u32::from(low.port) << 16 | u32::from(high.port),
            kind: u32::from(packet.vlan) << 16 | u32::from(packet.protocol) << 8 | version,
        }
    }
}

/// A flow.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) key: Key,
    /// Who began it, and by which gate.
    pub(super) began: End,
    pub(super) gate: Gate,
    pub(super) rule: u32,
    pub(super) answered: bool,
    pub(super) tcp: Option<Connection>,
    pub(super) expires: u64,
}

impl State {
    fn makes_room(&self, now: u64) -> bool {
        let is_young = match &self.tcp {
            Some(connection) => connection.phase() == Phase::Opening || connection.is_over(),
            None => !self.answered,
        };
        now >= self.expires || is_young
    }
}

/// All flows.
#[derive(Debug)]
pub(super) struct States {
    index: HashMap<Key, u32, RandomState>,
    slots: Vec<Option<State>>,
    free: Vec<u32>,
    limit: usize,
    sweep_at: usize,
    look_at: usize,
    pub(super) created: u64,
    pub(super) expired: u64,
    pub(super) evicted: u64,
}

impl States {
    pub(super) fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, STATES_MAX);
        Self {
            index: HashMap::with_capacity_and_hasher(limit, RandomState::default()),
            slots: Vec::with_capacity(limit),
            free: Vec::with_capacity(limit),
            limit,
            sweep_at: 0,
            look_at: 0,
            created: 0,
            expired: 0,
            evicted: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// The flow of a key, unless it has expired.
    #[inline]
    pub(super) fn find(&mut self, key: &Key, now: u64) -> Option<&mut State> {
        let slot = *self.index.get(key)? as usize;
        let state = self.slots.get_mut(slot)?.as_mut()?;
        (now < state.expires).then_some(state)
    }

    /// Remembers a flow; false if there is no room. One of the same key is forgotten.
    pub(super) fn insert(&mut self, state: State, now: u64) -> bool {
        if let Some(&slot) = self.index.get(&state.key) {
            self.slots[slot as usize] = Some(state);
            self.created += 1;
            return true;
        }
        if self.len() >= self.limit && !self.make_room(now) {
            return false;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.slots[slot as usize] = Some(state);
        self.index.insert(state.key, slot);
        self.created += 1;
        true
    }

    fn make_room(&mut self, now: u64) -> bool {
        for _ in 0..LOOKS.min(self.slots.len()) {
            self.look_at = (self.look_at + 1) % self.slots.len();
            let Some(state) = &self.slots[self.look_at] else {
                continue;
            };
            if state.makes_room(now) {
                match now >= state.expires {
                    true => self.expired += 1,
                    false => self.evicted += 1,
                }
                self.remove(self.look_at);
                return true;
            }
        }
        false
    }

    fn remove(&mut self, slot: usize) {
        if let Some(state) = self.slots[slot].take() {
            self.index.remove(&state.key);
            self.free.push(u32::try_from(slot).unwrap_or(u32::MAX));
        }
    }

    /// Forgets what has expired among the next `n` places, round and round.
    pub(super) fn sweep(&mut self, n: usize, now: u64) {
        for _ in 0..n.min(self.slots.len()) {
            self.sweep_at = (self.sweep_at + 1) % self.slots.len();
            let state = &self.slots[self.sweep_at];
            if state.as_ref().is_some_and(|state| now >= state.expires) {
                self.expired += 1;
                self.remove(self.sweep_at);
            }
        }
    }

    /// How many places a whole sweep has to look at.
    pub(super) fn places(&self) -> usize {
        self.slots.len()
    }

    /// Gives flows the numbers that their rules have now.
    pub(super) fn renumber(&mut self, number: impl Fn(u32) -> u32) {
        for state in self.slots.iter_mut().flatten() {
            state.rule = number(state.rule);
        }
    }
}
