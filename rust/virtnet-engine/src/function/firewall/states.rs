//! Who talks with whom: flows that a rule has let begin, each until nothing was heard of it for too long.
//!
//! The table has its room from the start, so it never grows within a breath. Where it is full, a flow that has expired or has not
//! been answered yet makes room for a new one, if a few looks find one; otherwise the new one is not let in.

use std::hash::BuildHasher;
use std::time::Duration;

use foldhash::fast::RandomState;
use virtnet_packet::flow::IpVersion;
use virtnet_packet::header::ETHERNET_LEN;

use super::counts::Counts;
use super::packet::{End, Packet, Piece, TCP, UDP};
use super::rules::RuleSet;
use super::tcp::{Connection, Phase};
use crate::graph::Gate;

/// The most flows that can be remembered.
pub(crate) const STATES_MAX: usize = 1 << 24;

/// How many flows are looked at to make room for one.
const LOOKS: usize = 16;

/// Flows whose lines are mostly in no cache that is near.
const LARGE: usize = 1 << 12;

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
        let (low, high) = match packet.is_low() {
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

/// A packet of the kind that most are: IPv4 without tags, options or fragments, TCP or UDP. What it takes to judge it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Usual {
    /// An address and the port below it, which are in order as their ends are.
    from: u64,
    to: u64,
    pub(super) protocol: u8,
    /// Where the packet ends, in bytes of the frame.
    pub(super) end: usize,
}

impl Usual {
    /// Where what is above IP starts, in bytes of the frame.
    pub(super) const ABOVE: usize = ETHERNET_LEN + Self::IP_LEN;

    const IP_LEN: usize = 20;

    /// Reads a frame of `frame_len` bytes; none: it is another, or makes no sense.
    #[inline]
    pub(super) fn of(head: &[u8], frame_len: usize) -> Option<Self> {
        let (ethernet, rest) = head.split_first_chunk::<ETHERNET_LEN>()?;
        let ip: &[u8; Self::IP_LEN + 4] = rest.first_chunk()?;
        let end = ETHERNET_LEN + usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        let is_usual = ethernet[12..] == [0x08, 0x00]
            && ip[0] == 0x45
            && ip[6] & 0x3f | ip[7] == 0
            && matches!(ip[9], TCP | UDP)
            && (Self::ABOVE..=frame_len).contains(&end);
        if !is_usual {
            return None;
        }
        let &[.., a, b, c, d, e, f, g, h, p, q, r, s] = ip;
        Some(Self {
            from: u64::from_be_bytes([0, 0, a, b, c, d, p, q]),
            to: u64::from_be_bytes([0, 0, e, f, g, h, r, s]),
            protocol: ip[9],
            end,
        })
    }

    /// What its flow is called.
    #[inline]
    pub(super) fn key(&self) -> Key {
        let (low, high) = (self.from.min(self.to), self.from.max(self.to));
        Key {
            low: (low >> 16).into(),
            high: (high >> 16).into(),
            ports: u32::from(port(low)) << 16 | u32::from(port(high)),
            kind: u32::from(self.protocol) << 8,
        }
    }

    /// Whether it comes from the lower of its ends.
    #[inline]
    pub(super) fn is_low(&self) -> bool {
        self.from <= self.to
    }

    /// Whether both ends are one.
    #[inline]
    pub(super) fn is_to_itself(&self) -> bool {
        self.from == self.to
    }

    /// Whether it is from the same end to the same other one, by the same protocol.
    #[inline]
    pub(super) fn goes_like(&self, other: &Self) -> bool {
        (self.from, self.to, self.protocol) == (other.from, other.to, other.protocol)
    }

    /// The address and the port that it comes from.
    #[inline]
    pub(super) fn source(&self) -> (u32, u16) {
        (address(self.from), port(self.from))
    }

    /// And that it goes to.
    #[inline]
    pub(super) fn destination(&self) -> (u32, u16) {
        (address(self.to), port(self.to))
    }

    /// The same as it is seen of any packet.
    pub(super) fn packet(&self) -> Packet {
        let end = |end: u64| End {
            address: address(end).into(),
            port: port(end),
        };
        Packet {
            version: IpVersion::V4,
            vlan: 0,
            protocol: self.protocol,
            from: end(self.from),
            to: end(self.to),
            has_ports: true,
            piece: Piece::Whole,
            identification: 0,
            ip: ETHERNET_LEN,
            above: Self::ABOVE,
            end: self.end,
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the 32 bits above the port"
)]
fn address(end: u64) -> u32 {
    (end >> 16) as u32
}

#[expect(clippy::cast_possible_truncation, reason = "the lowest 16 bits")]
fn port(end: u64) -> u16 {
    end as u16
}

/// A flow: what every packet of it needs in one line of the cache, and what TCP needs beside it in the next.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct State {
    pub(super) key: Key,
    /// When it is forgotten; 0: there is none here.
    pub(super) expires: u64,
    /// Where its packets are counted.
    pub(super) rule: u32,
    /// By which gate it began, and whether by the lower of its ends.
    pub(super) gate: Gate,
    pub(super) low_began: bool,
    pub(super) answered: bool,
    pub(super) tcp: Option<Connection>,
}

impl State {
    fn makes_room(&self, now: u64) -> bool {
        let is_young = match &self.tcp {
            Some(connection) => connection.phase() == Phase::Opening || connection.is_over(),
            None => !self.answered,
        };
        now >= self.expires || is_young
    }

    fn is_there(&self) -> bool {
        self.expires != 0
    }
}

/// A place of the index: the upper half of a hash, and the number of a flow counted from 1; 0: nobody.
#[derive(Clone, Copy)]
struct Entry(u64);

impl Entry {
    fn new(hash: u64, slot: usize) -> Self {
        Self(hash >> 32 << 32 | (slot as u64 + 1))
    }

    #[inline]
    fn slot(self) -> Option<usize> {
        let number = self.0 & u64::from(u32::MAX);
        usize::try_from(number).ok()?.checked_sub(1)
    }

    #[inline]
    fn may_be(self, hash: u64) -> bool {
        self.0 >> 32 == hash >> 32
    }
}

/// All flows, and an index of them: open addressing, at most half full, as for stations.
pub(super) struct States {
    hash: RandomState,
    index: Vec<u64>,
    mask: usize,
    slots: Vec<State>,
    free: Vec<u32>,
    len: usize,
    limit: usize,
    sweep_at: usize,
    look_at: usize,
    pub(super) created: u64,
    pub(super) expired: u64,
    pub(super) evicted: u64,
    /// What rules have counted, which stays for as long as they have flows.
    pub(super) counts: Counts,
}

impl std::fmt::Debug for States {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "States({} of {})", self.len, self.limit)
    }
}

impl States {
    pub(super) fn new(limit: usize, rules: &RuleSet) -> Self {
        let limit = limit.clamp(1, STATES_MAX);
        let places = (2 * limit).next_power_of_two();
        Self {
            hash: RandomState::default(),
            index: vec![0; places],
            mask: places - 1,
            slots: Vec::with_capacity(limit),
            free: Vec::with_capacity(limit),
            len: 0,
            limit,
            sweep_at: 0,
            look_at: 0,
            created: 0,
            expired: 0,
            evicted: 0,
            counts: Counts::new(rules),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(super) fn hash(&self, key: &Key) -> u64 {
        self.hash.hash_one(key)
    }

    /// Whether it is larger than a cache that is near.
    #[inline]
    pub(super) fn is_large(&self) -> bool {
        self.slots.len() >= LARGE
    }

    /// Reads what stands where a flow of this hash would, to have it near; the number of a flow that may be it.
    #[inline]
    pub(super) fn peek(&self, hash: u64) -> usize {
        let entry = Entry(self.index[self.home(hash)]);
        entry.slot().unwrap_or_default()
    }

    /// The same for a flow by its number.
    #[inline]
    pub(super) fn peek_at(&self, slot: usize) -> u64 {
        self.slots
            .get(slot)
            .map_or(0, |state| state.expires ^ u64::from(state.tcp.is_some()))
    }

    #[inline]
    fn home(&self, hash: u64) -> usize {
        usize::try_from(hash & self.mask as u64).unwrap_or_default()
    }

    /// Where in the index a flow stands, and its number.
    #[inline]
    fn place(&self, key: &Key, hash: u64) -> Option<(usize, usize)> {
        let mut at = self.home(hash);
        loop {
            let entry = Entry(self.index[at]);
            let slot = entry.slot()?;
            if entry.may_be(hash) && self.slots[slot].key == *key {
                return Some((at, slot));
            }
            at = (at + 1) & self.mask;
        }
    }

    /// The flow of a key, unless it has expired.
    #[inline]
    pub(super) fn find(&mut self, key: &Key, hash: u64, now: u64) -> Option<&mut State> {
        let (_, slot) = self.place(key, hash)?;
        let state = &mut self.slots[slot];
        (now < state.expires).then_some(state)
    }

    /// Remembers a flow; false if there is no room. One of the same key is forgotten.
    pub(super) fn insert(&mut self, state: State, hash: u64, now: u64) -> bool {
        if let Some((_, slot)) = self.place(&state.key, hash) {
            self.counts.begin(state.rule);
            self.counts.end(self.slots[slot].rule);
            self.slots[slot] = state;
            self.created += 1;
            return true;
        }
        if self.len >= self.limit && !self.make_room(now) {
            return false;
        }
        let slot = match self.free.pop() {
            Some(slot) => slot as usize,
            None => {
                self.slots.push(state);
                self.slots.len() - 1
            }
        };
        self.slots[slot] = state;
        let mut at = self.home(hash);
        while Entry(self.index[at]).slot().is_some() {
            at = (at + 1) & self.mask;
        }
        self.index[at] = Entry::new(hash, slot).0;
        self.counts.begin(state.rule);
        self.len += 1;
        self.created += 1;
        true
    }

    fn make_room(&mut self, now: u64) -> bool {
        for _ in 0..LOOKS.min(self.slots.len()) {
            self.look_at = (self.look_at + 1) % self.slots.len();
            let state = &self.slots[self.look_at];
            if state.is_there() && state.makes_room(now) {
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
        let key = self.slots[slot].key;
        if let Some((at, _)) = self.place(&key, self.hash(&key)) {
            self.close_gap(at);
            self.slots[slot].expires = 0;
            self.counts.end(self.slots[slot].rule);
            self.free.push(u32::try_from(slot).unwrap_or(u32::MAX));
            self.len -= 1;
        }
    }

    /// Takes an entry out of the index; those behind it that may move up do.
    fn close_gap(&mut self, mut hole: usize) {
        let mut at = hole;
        loop {
            at = (at + 1) & self.mask;
            let entry = Entry(self.index[at]);
            let Some(slot) = entry.slot() else {
                break;
            };
            let home = self.home(self.hash(&self.slots[slot].key));
            let from_home = at.wrapping_sub(home) & self.mask;
            let from_hole = at.wrapping_sub(hole) & self.mask;
            if from_home >= from_hole {
                self.index[hole] = entry.0;
                hole = at;
            }
        }
        self.index[hole] = 0;
    }

    /// Forgets what has expired among the next `n` places, round and round.
    pub(super) fn sweep(&mut self, n: usize, now: u64) {
        for _ in 0..n.min(self.slots.len()) {
            self.sweep_at = (self.sweep_at + 1) % self.slots.len();
            let state = &self.slots[self.sweep_at];
            if state.is_there() && now >= state.expires {
                self.expired += 1;
                self.remove(self.sweep_at);
            }
        }
    }

    /// How many places a whole sweep has to look at.
    pub(super) fn places(&self) -> usize {
        self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::packet::{Piece, Seen, look_at};
    use super::super::rules::Action;
    use super::*;

    fn state(n: u8, expires: u64) -> State {
        State {
            key: Key {
                low: n.into(),
                high: 7,
                ports: 0,
                kind: 1,
            },
            expires,
            rule: 0,
            gate: 0,
            low_began: true,
            answered: true,
            tcp: None,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn it_agrees_with_a_plain_map(ops in prop::collection::vec((0..4_u8, 0..60_u8), 1..800)) {
            let rules = RuleSet::new(Vec::new(), Vec::new(), Action::Drop, true);
            let mut states = States::new(32, &rules);
            let mut model: HashMap<u8, u64> = HashMap::new();
            let mut now = 1;
            for (op, n) in ops {
                let state = state(n, now + 20);
                let hash = states.hash(&state.key);
                match op {
                    0 | 1 => {
                        let fits = states.insert(state, hash, now);
                        prop_assert!(fits || states.len() == 32);
                        if fits {
                            model.insert(n, now + 20);
                        }
                    }
                    2 => states.sweep(usize::from(n), now),
                    _ => now += u64::from(n) / 8,
                }
                for (&n, &expires) in &model {
                    let key = self::state(n, 0).key;
                    let found = states.find(&key, states.hash(&key), now).map(|state| state.expires);
                    prop_assert_eq!(found, (now < expires).then_some(expires));
                }
                prop_assert!(states.len() <= 32);
            }
            states.sweep(usize::MAX, now);
            model.retain(|_, &mut expires| now < expires);
            prop_assert_eq!(states.len(), model.len());
        }
    }

    #[test]
    fn the_short_look_finds_what_the_close_look_finds() {
        let mut found = 0;
        for protocol in [0, 1, 6, 17, 58, 132] {
            for (at, byte) in [
                (0, 0),
                (12, 0x81),
                (14, 0x46),
                (14, 0x44),
                (17, 19),
                (20, 0x20),
                (21, 1),
                (30, 1),
            ] {
                for len in [13, 33, 34, 37, 38, 60] {
                    let mut frame = [0_u8; 60];
                    frame[12..24]
                        .copy_from_slice(&[8, 0, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, protocol]);
                    frame[26..38].copy_from_slice(&[10, 0, 0, 9, 9, 0, 0, 9, 1, 2, 3, 4]);
                    frame[at] = byte;
                    let head = &frame[..len];
                    let Some(usual) = Usual::of(head, len) else {
                        continue;
                    };
                    let Seen::Ip(packet) = look_at(head) else {
                        panic!("{head:?} is usual, and not IP");
                    };
                    assert_eq!(packet.piece, Piece::Whole);
                    assert_eq!(usual.key(), Key::of(&packet));
                    assert_eq!(
                        (usual.is_low(), usual.is_to_itself()),
                        (packet.is_low(), packet.from == packet.to)
                    );
                    let end = (packet.protocol, packet.above, packet.end);
                    assert_eq!((usual.protocol, Usual::ABOVE, usual.end), end);
                    assert!(packet.end <= len);
                    found += 1;
                }
            }
        }
        assert_eq!(
            found, 4,
            "of two protocols, with addresses either way round"
        );
    }

    #[test]
    fn a_flow_is_two_lines_of_the_cache() {
        assert_eq!(size_of::<State>(), 128);
    }
}
