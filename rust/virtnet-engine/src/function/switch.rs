//! A learning switch: it remembers behind which gate each station is, and floods what it does not know.

use std::sync::Arc;
use std::time::Duration;

use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Picks};

use super::bridge::{Bridge, BridgeRules, Flap};
use super::departures::Departures;
use super::mac_table::{Learnt, MAX_ENTRIES, MacTable};
use super::{Fate, Fates, Verdict};
use crate::EngineError;
use crate::graph::Gate;
use crate::plan::Leftovers;

/// How a switch remembers.
#[derive(Clone, Copy, Debug)]
pub struct SwitchOptions {
    /// How long a station is remembered after it was last heard of.
    pub ageing: Duration,
    /// How many stations are remembered at once.
    pub max_entries: usize,
}

impl Default for SwitchOptions {
    /// 300 s, and a million stations.
    fn default() -> Self {
        Self {
            ageing: Duration::from_secs(300),
            max_entries: 1_000_000,
        }
    }
}

/// What a switch has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwitchCounters {
    /// Stations in the table, those included that have aged and were not swept out yet.
    pub entries: usize,
    /// Stations that were put into the table.
    pub learned: u64,
    /// Stations that were heard of behind another gate than before.
    pub moved: u64,
    /// Stations that were forgotten for age.
    pub aged: u64,
    /// Packets whose source could not be remembered because the table was full.
    pub table_full: u64,
    /// Packets that were flooded: to a group, or to a station that is not in the table.
    pub flooded: u64,
    /// How often a station was found to turn up behind one cable and another in turn.
    pub flaps: u64,
    /// The last one that was.
    pub last_flap: Option<Flap>,
}

impl SwitchCounters {
    /// Adds those of another part of the same switch, which has the same stations in its table.
    pub(crate) fn add(&mut self, other: &Self) {
        self.entries = self.entries.max(other.entries);
        self.learned += other.learned;
        self.moved += other.moved;
        self.aged += other.aged;
        self.table_full += other.table_full;
        self.flooded += other.flooded;
        self.flaps += other.flaps;
        self.last_flap = self.last_flap.or(other.last_flap);
    }
}

/// What one part of a switch, with one worker, tells the others: they know whom any of them has heard of.
///
/// A station is aged by the part that learnt it. Others that hear of it meanwhile leave it at that, and learn it anew when they are
/// told that it was forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SwitchNews {
    /// It has learnt where a station is.
    Learnt(u64, Gate),
    /// It has not heard of a station for too long.
    Forgotten(u64),
}

/// Forwards each packet to the gate its destination was last heard of, or to all others.
#[derive(Debug)]
pub struct Switch {
    table: MacTable,
    ageing: u64,
    /// Up to when the table was swept.
    swept: u64,
    counters: SwitchCounters,
    /// Whom it has learnt, if there are others to be told.
    learnt: Option<Vec<(u64, Gate)>>,
    /// What decides in place of all that, if there are rules for its cables.
    bridge: Option<Box<Bridge>>,
}

/// A quiet switch sweeps this often, a busy one about a thousand times as often and a thousandth as much.
const SWEEP_NS: u64 = 1_000_000_000;

/// What of a switch can be changed while it runs.
#[derive(Clone, Debug)]
pub struct SwitchOrders {
    /// After what silence a station is forgotten. Those that are in the table are judged by it from now on.
    pub ageing: Duration,
    /// What it does about its cables; none: a plain switch.
    pub rules: Option<Arc<BridgeRules>>,
}

impl SwitchOrders {
    pub(super) fn check(&self) -> Result<(), EngineError> {
        if self.ageing.is_zero() {
            return Err(EngineError::SwitchOptions { max: MAX_ENTRIES });
        }
        Ok(())
    }
}

/// A time in ns, or without end.
fn in_ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Switch {
    /// A switch that knows nobody.
    ///
    /// # Errors
    /// [`EngineError::SwitchOptions`].
    pub fn new(options: SwitchOptions) -> Result<Self, EngineError> {
        let ageing = in_ns(options.ageing);
        if ageing == 0 || !(1..=MAX_ENTRIES).contains(&options.max_entries) {
            return Err(EngineError::SwitchOptions { max: MAX_ENTRIES });
        }
        Ok(Self {
            table: MacTable::new(options.max_entries, ageing),
            ageing,
            swept: 0,
            counters: SwitchCounters::default(),
            learnt: None,
            bridge: None,
        })
    }

    /// Another part of the same switch. Both tell and are told from now on; so far nobody may have been learnt.
    pub(super) fn part(&mut self) -> Self {
        let mut part = Self {
            table: MacTable::new(self.table.limit(), self.ageing),
            counters: SwitchCounters::default(),
            learnt: None,
            bridge: None,
            ..*self
        };
        for part in [self, &mut part] {
            part.learnt = Some(Vec::new());
            part.table.note_forgotten();
        }
        part
    }

    /// Takes new orders.
    pub(super) fn order(&mut self, orders: SwitchOrders, leftovers: &mut Leftovers) {
        self.ageing = in_ns(orders.ageing);
        self.table.set_ageing(self.ageing);
        match (orders.rules, &mut self.bridge) {
            (Some(rules), Some(bridge)) => {
                leftovers.keep(bridge.order(rules, self.ageing));
            }
            (Some(rules), bridge) => {
                let mut new = Bridge::new(rules, self.table.limit(), self.ageing);
                if self.learnt.is_some() {
                    new.join();
                }
                *bridge = Some(Box::new(new));
            }
            (None, bridge) => leftovers.keep(bridge.take()),
        }
    }

    /// What there is to tell the other parts.
    pub(crate) fn take_news(&mut self) -> impl Iterator<Item = SwitchNews> + '_ {
        let learnt = self.learnt.iter_mut().flat_map(|list| list.drain(..));
        let forgotten = self.table.take_forgotten().map(SwitchNews::Forgotten);
        // What was forgotten and learnt again is there.
        let own = forgotten.chain(learnt.map(|(mac, gate)| SwitchNews::Learnt(mac, gate)));
        own.chain(self.bridge.iter_mut().flat_map(|bridge| bridge.take_news()))
    }

    /// What another part tells.
    pub(crate) fn hear(&mut self, news: SwitchNews, now: u64) {
        if let Some(bridge) = &mut self.bridge {
            return bridge.hear(news, now);
        }
        let (SwitchNews::Learnt(station, _) | SwitchNews::Forgotten(station)) = news;
        if station >> 48 != 0 {
            // Of a VLAN: the other part has not heard yet that there are none any more.
            return;
        }
        match news {
            SwitchNews::Learnt(mac, gate) => self.table.learn_elsewhere(mac, gate, now),
            SwitchNews::Forgotten(mac) => self.table.forget_elsewhere(mac),
        }
    }

    /// What it has counted.
    #[must_use]
    pub fn counters(&self) -> SwitchCounters {
        if let Some(bridge) = &self.bridge {
            let mut both = bridge.counters();
            both.add(&self.counters);
            return both;
        }
        SwitchCounters {
            entries: self.table.len(),
            aged: self.table.aged(),
            ..self.counters
        }
    }

    #[inline]
    pub(super) fn classify(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        gate: Gate,
        now: u64,
        fates: &mut Fates,
    ) -> Verdict {
        if let Some(bridge) = &mut self.bridge {
            bridge.classify(burst, picks, gate, now);
            return Verdict::Spread;
        }
        self.sweep(now);
        if self.table.is_large() {
            self.fetch(burst, picks);
        }
        // Neighbours in a burst often share their addresses: what was just done is not done again.
        let (mut last_source, mut last_destination) = (0, u64::MAX);
        let mut fate = Fate::Consumed;
        let mut first = None;
        let mut uniform = true;
        for (k, i) in picks.iter().enumerate() {
            let Some((destination, source)) = macs(burst.head(i)) else {
                fates[k] = Fate::Drop(DropReason::Runt);
                uniform = false;
                continue;
            };
            if source != last_source {
                last_source = source;
                if self.learn(source, gate, now) {
                    last_destination = u64::MAX;
                }
            }
            if destination != last_destination {
                last_destination = destination;
                fate = self.decide(destination, gate, now);
            }
            self.counters.flooded += u64::from(fate == Fate::Flood);
            fates[k] = fate;
            uniform &= *first.get_or_insert(fate) == fate;
        }
        match first {
            Some(fate) if uniform => Verdict::All(fate),
            _ => Verdict::Each,
        }
    }

    /// Reads where every address of the burst is in a table that no cache holds, all misses beside each other: between a million
    /// stations a packet took 116 ns without and takes 86 with it. (In smaller tables it takes longer with it.)
    #[cold]
    fn fetch(&self, burst: &Burst, picks: &Picks) {
        let macs = picks.iter().filter_map(|i| macs(burst.head(i)));
        let seen = macs.fold(0, |seen, (destination, source)| {
            seen ^ self.table.peek(destination) ^ self.table.peek(source)
        });
        std::hint::black_box(seen);
    }

    /// Remembers a source; whether that may change where packets go.
    #[inline]
    fn learn(&mut self, source: u64, gate: Gate, now: u64) -> bool {
        if source & GROUP != 0 || source == 0 {
            return false;
        }
        match self.table.learn(source, gate, now) {
            Learnt::Known => return false,
            Learnt::New => self.counters.learned += 1,
            Learnt::Moved => self.counters.moved += 1,
            Learnt::Full => {
                self.counters.table_full += 1;
                return true;
            }
        }
        if let Some(list) = &mut self.learnt {
            list.push((source, gate));
        }
        true
    }

    #[inline]
    fn decide(&self, destination: u64, gate: Gate, now: u64) -> Fate {
        if destination & GROUP != 0 || destination == 0 {
            return Fate::Flood;
        }
        match self.table.lookup(destination, now) {
            Some(behind) if behind == gate => Fate::Drop(DropReason::SamePort),
            Some(behind) => Fate::To(behind),
            None => Fate::Flood,
        }
    }

    /// Looks at as many slots of the table as the time since the last look calls for: all of them in an eighth of the
    /// ageing time.
    #[inline]
    pub(crate) fn sweep(&mut self, now: u64) {
        if let Some(bridge) = &mut self.bridge {
            return bridge.sweep(now);
        }
        let since = now.saturating_sub(self.swept);
        if since >= SWEEP_NS / 1_000 {
            self.sweep_for(since, now);
        }
    }

    #[cold]
    fn sweep_for(&mut self, since: u64, now: u64) {
        let lap = u128::from(self.ageing / 8).max(1);
        let slots = self.table.slots();
        let n = (slots as u128 * u128::from(since)).div_ceil(lap);
        self.table
            .sweep(usize::try_from(n).unwrap_or(slots).min(slots), now);
        self.swept = now;
    }

    /// When the table wants to be swept if nothing happens.
    pub(super) fn due(&self) -> Option<u64> {
        if let Some(bridge) = &self.bridge {
            return bridge.due();
        }
        (self.table.len() > 0).then(|| self.swept.saturating_add(SWEEP_NS))
    }

    /// Forgets all stations behind `gates`, which are in order.
    pub(super) fn forget(&mut self, gates: &[Gate], now: u64) {
        self.table.forget(gates, now);
        if let Some(bridge) = &mut self.bridge {
            bridge.forget(gates, now);
        }
    }

    /// Whether packets may leave in another form than they came in.
    #[inline]
    pub(super) fn changes_packets(&self) -> bool {
        self.bridge
            .as_ref()
            .is_some_and(|bridge| bridge.changes_packets())
    }

    /// What was laid out for the last burst, if it has rules; to be given back.
    pub(crate) fn take_departures(&mut self) -> Option<Box<Departures>> {
        Some(self.bridge.as_mut()?.take_departures())
    }

    pub(crate) fn give_back(&mut self, departures: Box<Departures>) {
        if let Some(bridge) = &mut self.bridge {
            bridge.give_back(departures);
        }
    }

    /// Gives packets the form in which they leave by `gate`.
    #[inline]
    pub(crate) fn dress(
        &self,
        departures: &mut Departures,
        burst: &mut Burst,
        picks: &Picks,
        gate: Gate,
    ) {
        if let Some(bridge) = &self.bridge {
            bridge.dress(departures, burst, picks, gate);
        }
    }
}

/// The group bit of an address as [`macs`] reads it.
pub(super) const GROUP: u64 = 1;

/// Destination and source as numbers, first byte lowest; `None` for a runt.
#[inline]
pub(super) fn macs(head: &[u8]) -> Option<(u64, u64)> {
    const MASK: u64 = (1 << 48) - 1;
    let header = head.first_chunk::<ETHERNET_LEN>()?;
    let &[d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = header;
    Some((
        u64::from_le_bytes([d0, d1, d2, d3, d4, d5, s0, s1]) & MASK,
        u64::from_le_bytes([s0, s1, s2, s3, s4, s5, t0, t1]) & MASK,
    ))
}

#[cfg(test)]
mod tests {
    use virtnet_packet::{BURST_MAX, Offload};

    use super::*;

    const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
    const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
    const ALL: [u8; 6] = [0xff; 6];
    const SECOND: u64 = 1_000_000_000;

    fn switch() -> Switch {
        Switch::new(SwitchOptions::default()).unwrap()
    }

    /// The fates of frames given as (destination, source), arriving together by `gate`.
    fn fates(
        switch: &mut Switch,
        gate: Gate,
        now: u64,
        frames: &[([u8; 6], [u8; 6])],
    ) -> Vec<Fate> {
        let mut burst = Burst::new();
        for (destination, source) in frames {
            let frame = [&destination[..], source, &[8, 0], &[0; 46]].concat();
            burst.push_bytes(&frame, Offload::default());
        }
        let mut fates = [Fate::Consumed; BURST_MAX];
        match switch.classify(&burst, &Picks::first(frames.len()), gate, now, &mut fates) {
            Verdict::All(fate) => vec![fate; frames.len()],
            Verdict::Each => fates[..frames.len()].to_vec(),
            Verdict::Copied | Verdict::Spread => unreachable!("it has no rules for its cables"),
        }
    }

    #[test]
    fn the_unknown_is_flooded_and_the_known_forwarded() {
        let mut switch = switch();
        assert_eq!(fates(&mut switch, 1, 0, &[(B, A)]), [Fate::Flood]);
        assert_eq!(fates(&mut switch, 2, 0, &[(A, B)]), [Fate::To(1)]);
        assert_eq!(fates(&mut switch, 1, 0, &[(B, A)]), [Fate::To(2)]);
        let counters = switch.counters();
        assert_eq!(
            (counters.entries, counters.learned, counters.flooded),
            (2, 2, 1)
        );
    }

    #[test]
    fn groups_are_flooded_and_never_learned() {
        let mut switch = switch();
        assert_eq!(fates(&mut switch, 1, 0, &[(ALL, A)]), [Fate::Flood]);
        let group = [1, 0, 0x5e, 0, 0, 1];
        assert_eq!(fates(&mut switch, 1, 0, &[(group, group)]), [Fate::Flood]);
        assert_eq!(switch.counters().entries, 1);
    }

    #[test]
    fn nothing_goes_back_where_it_came_from() {
        let mut switch = switch();
        fates(&mut switch, 1, 0, &[(ALL, A)]);
        assert_eq!(
            fates(&mut switch, 1, 0, &[(A, B)]),
            [Fate::Drop(DropReason::SamePort)]
        );
    }

    #[test]
    fn a_station_that_moves_is_found_at_its_new_place_within_the_burst() {
        let mut switch = switch();
        fates(&mut switch, 2, 0, &[(ALL, B)]);
        let same = Fate::Drop(DropReason::SamePort);
        // The second frame says that B is now behind gate 1, too.
        assert_eq!(
            fates(&mut switch, 1, 0, &[(B, A), (B, B), (B, A)]),
            [Fate::To(2), same, same]
        );
        assert_eq!(switch.counters().moved, 1);
    }

    #[test]
    fn a_station_is_forgotten_when_it_was_silent_for_the_ageing_time() {
        let mut switch = switch();
        fates(&mut switch, 1, 0, &[(ALL, A)]);
        assert_eq!(
            fates(&mut switch, 2, 300 * SECOND - 1, &[(A, B)]),
            [Fate::To(1)]
        );
        assert_eq!(
            fates(&mut switch, 2, 300 * SECOND, &[(A, B)]),
            [Fate::Flood]
        );
        switch.sweep(700 * SECOND);
        assert_eq!(switch.counters().entries, 0);
        assert_eq!(switch.counters().aged, 2);
        assert_eq!(switch.due(), None);
    }

    #[test]
    fn another_ageing_time_is_that_of_those_who_are_known_too() {
        let mut switch = switch();
        fates(&mut switch, 1, 0, &[(ALL, A)]);
        let orders = SwitchOrders {
            ageing: Duration::from_secs(5),
            rules: None,
        };
        switch.order(orders, &mut Leftovers::default());
        assert_eq!(
            fates(&mut switch, 2, 5 * SECOND - 1, &[(A, B)]),
            [Fate::To(1)]
        );
        assert_eq!(fates(&mut switch, 2, 5 * SECOND, &[(A, B)]), [Fate::Flood]);
        let none = SwitchOrders {
            ageing: Duration::ZERO,
            rules: None,
        };
        assert!(none.check().is_err());
    }

    #[test]
    fn a_quiet_switch_forgets_by_its_timer() {
        let mut switch = switch();
        fates(&mut switch, 1, 0, &[(ALL, A)]);
        let mut now = 0;
        while let Some(due) = switch.due() {
            assert!(due > now && due <= now + SECOND);
            now = due;
            switch.sweep(now);
        }
        assert!((300 * SECOND..340 * SECOND).contains(&now), "{now}");
    }

    #[test]
    fn a_table_that_is_full_is_counted_and_the_packet_goes_its_way() {
        let mut switch = Switch::new(SwitchOptions {
            max_entries: 1,
            ..SwitchOptions::default()
        })
        .unwrap();
        fates(&mut switch, 1, 0, &[(ALL, A)]);
        assert_eq!(fates(&mut switch, 2, 0, &[(A, B)]), [Fate::To(1)]);
        assert_eq!(switch.counters().table_full, 1);
        assert_eq!(fates(&mut switch, 1, 0, &[(B, A)]), [Fate::Flood]);
    }

    #[test]
    fn a_runt_is_dropped_and_its_neighbours_are_not() {
        let mut switch = switch();
        let mut burst = Burst::new();
        burst.push_bytes(&[0xff; 13], Offload::default());
        burst.push_bytes(&[0xff; 60], Offload::default());
        let mut fates = [Fate::Consumed; BURST_MAX];
        let verdict = switch.classify(&burst, &Picks::first(2), 0, 0, &mut fates);
        assert_eq!(verdict, Verdict::Each);
        assert_eq!(fates[..2], [Fate::Drop(DropReason::Runt), Fate::Flood]);
    }

    #[test]
    fn impossible_options_are_refused() {
        for (ageing, max_entries) in [
            (Duration::ZERO, 10),
            (Duration::from_secs(1), 0),
            (Duration::from_secs(1), MAX_ENTRIES + 1),
        ] {
            let options = SwitchOptions {
                ageing,
                max_entries,
            };
            Switch::new(options).unwrap_err();
        }
    }
}
