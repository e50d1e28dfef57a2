//! A switch that does something about its cables: VLANs, cables that are kept apart, limits, mirrors, bonds.
//!
//! It stands beside the plain switch, which has none of this to ask for. A packet is classified in the form it came in; its tag goes
//! in or out when it leaves, gate by gate ([`Departures`]). A bond is known by its first gate, and a packet leaves by the one of its
//! gates that the packet's flow points at.
//!
//! Source: IEEE 802.1Q-2022, 8.6 (the forwarding process) and 802.1AX (bonds, without their protocol).

mod limits;
mod rules;
mod tables;

use std::sync::Arc;

use virtnet_packet::{Burst, DropReason, Picks, flow_hash, tag_of};

use self::limits::{Guard, Many, Storm};
use self::tables::{Tables, key};
use super::departures::{Departures, VLAN_MASK};
use super::mac_table::Learnt;
use super::switch::{GROUP, SwitchCounters, SwitchNews, macs};
use crate::graph::Gate;

pub use self::limits::Flap;
pub use self::rules::{BridgeRules, CableRules, StormLimits, VlanSet};

/// Everybody, as [`macs`] reads it.
const BROADCAST: u64 = (1 << 48) - 1;

/// Tables are swept this often.
const SWEEP_NS: u64 = 100_000_000;

/// What a switch with rules knows.
#[derive(Debug)]
pub(super) struct Bridge {
    rules: Arc<BridgeRules>,
    tables: Tables,
    ageing: u64,
    swept: u64,
    storms: Vec<Storm>,
    guard: Guard,
    departures: Option<Box<Departures>>,
    counters: SwitchCounters,
    learnt: Option<Vec<(u64, Gate)>>,
}

/// The VLAN and address of either end of a packet, and the one gate that it left by.
#[derive(Clone, Copy, Debug)]
struct Directed {
    ends: [u64; 2],
    gate: Gate,
}

impl Bridge {
    pub(super) fn new(rules: Arc<BridgeRules>, limit: usize, ageing: u64) -> Self {
        Self {
            rules,
            tables: Tables::new(limit, ageing),
            ageing,
            swept: 0,
            storms: Vec::new(),
            guard: Guard::default(),
            departures: None,
            counters: SwitchCounters::default(),
            learnt: None,
        }
    }

    /// It tells others, and is told.
    pub(super) fn join(&mut self) {
        self.learnt = Some(Vec::new());
        self.tables.note_forgotten();
    }

    /// Takes new orders and gives back what they replace. Where VLANs begin or end to be told apart, nobody is known any more.
    pub(super) fn order(&mut self, rules: Arc<BridgeRules>, ageing: u64) -> impl Send + use<> {
        let tables = (rules.aware != self.rules.aware).then(|| {
            let emptied = self.tables.emptied();
            std::mem::replace(&mut self.tables, emptied)
        });
        let rules = std::mem::replace(&mut self.rules, rules);
        self.ageing = ageing;
        self.tables.set_ageing(ageing);
        (tables, rules)
    }

    pub(super) fn take_news(&mut self) -> impl Iterator<Item = SwitchNews> + '_ {
        let learnt = self.learnt.iter_mut().flat_map(|list| list.drain(..));
        let forgotten = self.tables.take_forgotten().map(SwitchNews::Forgotten);
        forgotten.chain(learnt.map(|(key, gate)| SwitchNews::Learnt(key, gate)))
    }

    pub(super) fn hear(&mut self, news: SwitchNews, now: u64) {
        match news {
            SwitchNews::Learnt(key, gate) => self.tables.learn_elsewhere(key, gate, now),
            SwitchNews::Forgotten(key) => self.tables.forget_elsewhere(key),
        }
    }

    pub(super) fn counters(&self) -> SwitchCounters {
        SwitchCounters {
            entries: self.tables.len(),
            aged: self.tables.aged(),
            flaps: self.guard.flaps,
            last_flap: self.guard.last,
            ..self.counters
        }
    }

    /// Whether packets may leave in another form than they came in.
    #[inline]
    pub(super) fn changes_packets(&self) -> bool {
        self.rules.aware
    }

    pub(super) fn forget(&mut self, gates: &[Gate], now: u64) {
        self.tables.forget(gates, now);
    }

    #[inline]
    pub(super) fn sweep(&mut self, now: u64) {
        let since = now.saturating_sub(self.swept);
        if since >= SWEEP_NS {
            self.tables.sweep(since, self.ageing / 8, now);
            self.swept = now;
        }
    }

    pub(super) fn due(&self) -> Option<u64> {
        (self.tables.len() > 0).then(|| self.swept.saturating_add(10 * SWEEP_NS))
    }

    /// Lays out where each packet leaves.
    pub(super) fn classify(&mut self, burst: &Burst, picks: &Picks, gate: Gate, now: u64) {
        self.sweep(now);
        let mut departures = self.departures.take().unwrap_or_default();
        departures.clear();
        let rules = Arc::clone(&self.rules);
        let from = rules.cable(gate).filter(|_| !rules.watches(gate));
        let mut last = None;
        for i in picks.iter() {
            let directed = self.direct(
                &rules,
                &mut departures,
                &mut last,
                burst,
                i,
                (gate, from),
                now,
            );
            if let Err(reason) = directed {
                departures.drop_one(reason);
            }
        }
        self.departures = Some(departures);
    }

    /// Directs one packet, or says why it does not leave.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "it is the body of a loop")]
    fn direct(
        &mut self,
        rules: &BridgeRules,
        departures: &mut Departures,
        last: &mut Option<Directed>,
        burst: &Burst,
        i: usize,
        (gate, from): (Gate, Option<&CableRules>),
        now: u64,
    ) -> Result<(), DropReason> {
        let head = burst.head(i);
        let (mut tag, mut vlan) = (None, 0);
        if rules.aware {
            tag = tag_of(head);
            // A tag for priority alone counts as none. Spec: IEEE 802.1Q-2022, 6.9.1.
            vlan = tag.map_or(0, |tci| tci & VLAN_MASK);
            if vlan == 0 {
                vlan = from.map_or(0, |cable| cable.untagged);
            }
        }
        departures.begin(i, tag, vlan);
        let (destination, source) = macs(head).ok_or(DropReason::Runt)?;
        let ends = [key(vlan, destination), key(vlan, source)];
        // Neighbours in a burst often share their addresses: what was just done is not done again (370 instructions of 490).
        if let Some(directed) = last.filter(|last| last.ends == ends) {
            departures.leave(i, directed.gate);
            return Ok(());
        }
        *last = None;
        let cable = from.ok_or(DropReason::Isolated)?;
        if let Some(watch) = cable.mirror {
            departures.leave(i, watch);
        }
        if rules.aware && !cable.vlans.contains(vlan) {
            return Err(DropReason::Vlan);
        }
        let lead = rules.lead(gate);
        let mut is_settled = true;
        if cable.learning && source & GROUP == 0 && source != 0 {
            is_settled = self.learn(rules, vlan, source, lead, now)?;
        }
        let known = if destination & GROUP != 0 || destination == 0 {
            None
        } else {
            let fixed = match rules.stations.is_empty() {
                true => None,
                false => rules.stations.get(&(vlan, destination)).copied(),
            };
            fixed.or_else(|| self.tables.lookup(vlan, destination, now))
        };
        if let Some(behind) = known {
            let by = Self::forward(rules, departures, i, head, (gate, cable), behind, vlan)?;
            if is_settled && cable.mirror.is_none() {
                *last = by.map(|gate| Directed { ends, gate });
            }
            return Ok(());
        }
        let many = match destination {
            BROADCAST => Many::Broadcast,
            _ if destination & GROUP != 0 => Many::Multicast,
            _ => Many::Unknown,
        };
        self.counters.flooded += 1;
        if !self.storm(gate).takes(cable, many, now) {
            return Err(DropReason::Storm);
        }
        let mut anybody = false;
        for &behind in rules.members(vlan) {
            if behind == lead {
                continue;
            }
            let Some(other) = rules.cable(behind) else {
                continue;
            };
            if !BridgeRules::apart(cable, other) {
                Self::leave(rules, departures, i, head, cable, behind);
                anybody = true;
            }
        }
        anybody.then_some(()).ok_or(DropReason::NoCable)
    }

    /// Directs a packet to the one station it is for. Returns the gate that it and all of its kind leave by, if that is one alone.
    #[inline]
    fn forward(
        rules: &BridgeRules,
        departures: &mut Departures,
        i: usize,
        head: &[u8],
        (gate, cable): (Gate, &CableRules),
        behind: Gate,
        vlan: u16,
    ) -> Result<Option<Gate>, DropReason> {
        let other = rules.cable(behind).ok_or(DropReason::NoCable)?;
        if behind == rules.lead(gate) {
            return Err(DropReason::SamePort);
        }
        if BridgeRules::apart(cable, other) || rules.watches(behind) {
            return Err(DropReason::Isolated);
        }
        if rules.aware && !other.vlans.contains(vlan) {
            return Err(DropReason::Vlan);
        }
        Self::leave(rules, departures, i, head, cable, behind);
        let is_alone = rules.bond(behind).len() <= 1 && other.mirror.is_none();
        Ok(is_alone.then_some(behind))
    }

    /// A packet leaves by a gate or by one of a bond, and by that one's mirror.
    #[inline]
    fn leave(
        rules: &BridgeRules,
        departures: &mut Departures,
        i: usize,
        head: &[u8],
        from: &CableRules,
        behind: Gate,
    ) {
        let gate = match rules.bond(behind) {
            [] | [_] => behind,
            bond => bond[flow_hash(head) as usize % bond.len()],
        };
        departures.leave(i, gate);
        if let Some(watch) = rules.cable(gate).and_then(|other| other.mirror)
            && from.mirror != Some(watch)
        {
            departures.leave(i, watch);
        }
    }

    fn storm(&mut self, gate: Gate) -> &mut Storm {
        let at = usize::from(gate);
        if self.storms.len() <= at {
            self.storms.resize(at + 1, Storm::default());
        }
        &mut self.storms[at]
    }

    /// Learns where a source is; false: there was no room, which is counted for each packet.
    #[inline]
    fn learn(
        &mut self,
        rules: &BridgeRules,
        vlan: u16,
        source: u64,
        lead: Gate,
        now: u64,
    ) -> Result<bool, DropReason> {
        if !rules.stations.is_empty() && rules.stations.contains_key(&(vlan, source)) {
            return Ok(true);
        }
        let key = key(vlan, source);
        if self.guard.holds(key, now) && self.tables.lookup(vlan, source, now) != Some(lead) {
            return Err(DropReason::Flapping);
        }
        match self.tables.learn(vlan, source, lead, now) {
            Learnt::Known => return Ok(true),
            Learnt::New => self.counters.learned += 1,
            Learnt::Moved => {
                self.counters.moved += 1;
                self.guard.moved(key, lead, rules.loop_guard, now);
            }
            Learnt::Full => {
                self.counters.table_full += 1;
                return Ok(false);
            }
        }
        if let Some(list) = &mut self.learnt {
            list.push((key, lead));
        }
        Ok(true)
    }

    pub(super) fn take_departures(&mut self) -> Box<Departures> {
        self.departures.take().unwrap_or_default()
    }

    pub(super) fn give_back(&mut self, departures: Box<Departures>) {
        self.departures = Some(departures);
    }

    /// Gives packets the form in which they leave by `gate`.
    #[inline]
    pub(super) fn dress(
        &self,
        departures: &mut Departures,
        burst: &mut Burst,
        picks: &Picks,
        gate: Gate,
    ) {
        if !self.rules.aware {
            return;
        }
        if self.rules.watches(gate) {
            departures.undress(burst, picks);
        } else {
            let untagged = self.rules.cable(gate).map_or(0, |cable| cable.untagged);
            departures.dress(burst, picks, untagged);
        }
    }
}
