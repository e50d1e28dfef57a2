//! Which station is behind which gate: a hash table for keys that guests choose.
//!
//! Open addressing, a power of two of 16-byte entries, four to a cache line, at most half of them taken: a lookup looks at
//! one or two lines. The hash is seeded anew for every table, since a guest that could tell where addresses fall could
//! make them all fall into one place. Old entries are taken out for real (what lies behind them moves up), so nothing
//! slows down with age.
//!
//! It grows to twice its size when half full, up to the room for its limit. A million entries are not moved within one
//! breath: the old table stays beside the new one and every change takes a few entries along. Nor are they looked through
//! in one when a cable is pulled: those behind its gate are as good as aged from then on.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;

use crate::graph::Gate;

/// The largest limit a table can have.
pub(crate) const MAX_ENTRIES: usize = 1 << 24;

const MIN_SLOTS: usize = 64;
/// Slots of a table whose lines are mostly in no cache: sixteen megabytes of them.
const LARGE: usize = 1 << 20;
/// Slots of an old table that each change takes along: more than two, so that it is empty before the next one is due.
const MOVED_PER_CHANGE: usize = 8;
/// Slots that are searched for aged entries before a table counts as full.
const SEARCHED_WHEN_FULL: usize = 64;

const MAC_BITS: u32 = 48;
const MAC_MASK: u64 = (1 << MAC_BITS) - 1;

/// A station's address as a number below 2^48, not zero; the order of the bytes is the caller's affair.
pub(crate) type MacKey = u64;

/// Slots of a table that is looked through at once for stations to be forgotten.
const SMALL: usize = 1 << 11;
/// Slots of a larger one that are looked through for them in each sweep.
const SEARCHED_TO_FORGET: usize = 1 << 12;

/// A station, the gate it is behind, and when it was last heard of. All zero: nobody.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// Address in the low 48 bits, gate above.
    station: u64,
    seen: u64,
}

impl Entry {
    fn new(mac: MacKey, gate: Gate, seen: u64) -> Self {
        let station = mac | u64::from(gate) << MAC_BITS;
        Self { station, seen }
    }

    #[inline]
    fn is_free(self) -> bool {
        self.station == 0
    }

    #[inline]
    fn mac(self) -> MacKey {
        self.station & MAC_MASK
    }

    #[inline]
    fn gate(self) -> Gate {
        u16::try_from(self.station >> MAC_BITS).unwrap_or_default()
    }
}

/// What became of an address that was heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Learnt {
    /// It was known there.
    Known,
    /// It is new.
    New,
    /// It was known behind another gate.
    Moved,
    /// It is new and there is no room.
    Full,
}

/// Stations and the gates they are behind.
pub(crate) struct MacTable {
    hash: RandomState,
    table: Slots,
    /// The table before the last growth, until it is empty, and how far it was emptied.
    old: Slots,
    old_at: usize,
    len: usize,
    limit: usize,
    ageing: u64,
    sweep_at: usize,
    aged: u64,
    /// Stations that were forgotten for age, if anyone wants to know.
    forgotten: Option<Vec<MacKey>>,
    /// When it was last searched for aged entries because it was full.
    searched_at: Option<u64>,
    /// By gate: whom it has heard of there up to then is forgotten. Empty before that was first so.
    forgot: Vec<u64>,
    /// Slots that are still to be swept for those, soon.
    to_forget: usize,
}

/// Beside the time a station was told of whom somebody else listens to: it does not age here.
const ELSEWHERE: u64 = 1 << 63;

impl std::fmt::Debug for MacTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MacTable({} of {} entries)", self.len, self.limit)
    }
}

impl MacTable {
    /// Judges all stations by another age from now on.
    pub(crate) fn set_ageing(&mut self, ageing: u64) {
        self.ageing = ageing;
    }

    /// An empty table for up to `limit` stations that are forgotten `ageing` ns after they were last heard of.
    pub(crate) fn new(limit: usize, ageing: u64) -> Self {
        Self {
            hash: RandomState::default(),
            table: Slots::new(MIN_SLOTS),
            old: Slots::new(0),
            old_at: 0,
            len: 0,
            limit: limit.clamp(1, MAX_ENTRIES),
            ageing,
            sweep_at: 0,
            aged: 0,
            forgotten: None,
            searched_at: None,
            forgot: Vec::new(),
            to_forget: 0,
        }
    }

    /// Keeps a list of the stations that are forgotten for age, for [`take_forgotten`](Self::take_forgotten).
    pub(crate) fn note_forgotten(&mut self) {
        self.forgotten = Some(Vec::new());
    }

    /// Whom it has forgotten for age since it was asked last.
    pub(crate) fn take_forgotten(&mut self) -> impl Iterator<Item = MacKey> + '_ {
        self.forgotten.iter_mut().flat_map(|list| list.drain(..))
    }

    /// Notes that `mac` was heard of at `gate` elsewhere: it stays until [`forget_elsewhere`](Self::forget_elsewhere). One that is
    /// heard of here as well, at the same gate, stays one of here.
    pub(crate) fn learn_elsewhere(&mut self, mac: MacKey, gate: Gate, now: u64) {
        if self.lookup(mac, now) != Some(gate) {
            let home = self.home(mac);
            self.note(Entry::new(mac, gate, now | ELSEWHERE), home, now);
        }
    }

    /// Notes that `mac` is not heard of elsewhere any more.
    pub(crate) fn forget_elsewhere(&mut self, mac: MacKey) {
        let home = self.home(mac);
        for slots in [&mut self.table, &mut self.old] {
            if !slots.is_empty()
                && let Some((at, entry)) = slots.find(mac, home)
                && entry.seen & ELSEWHERE != 0
            {
                slots.remove(at, &self.hash);
                self.len -= 1;
            }
        }
    }

    /// Notes that `mac` was heard of at `gate`.
    #[inline]
    pub(crate) fn learn(&mut self, mac: MacKey, gate: Gate, now: u64) -> Learnt {
        let heard = Entry::new(mac, gate, now);
        let home = self.home(mac);
        // Mostly it is known, there, and at home in the table.
        let at = home & self.table.mask;
        let was = self.table.at(at);
        if was.station == heard.station && was.seen & ELSEWHERE == 0 && !self.is_gone(was, now) {
            self.table.entries[at][1] = now;
            return Learnt::Known;
        }
        self.note(heard, home, now)
    }

    #[inline(never)]
    fn note(&mut self, heard: Entry, home: usize, now: u64) -> Learnt {
        let (mac, gate) = (heard.mac(), heard.gate());
        let found = match self.table.find(mac, home) {
            None if !self.old.is_empty() => self.take_along(mac, home),
            found => found,
        };
        let Some((at, was)) = found else {
            return self.insert(heard, home, now);
        };
        if self.is_gone(was, now) {
            self.aged += u64::from(self.is_aged(was, now));
            self.table.set(at, heard);
            return Learnt::New;
        }
        if was.gate() != gate {
            self.table.set(at, heard);
            return Learnt::Moved;
        }
        if was.seen & ELSEWHERE == 0 {
            self.table.entries[at][1] = heard.seen;
        }
        Learnt::Known
    }

    /// The gate that `mac` is behind.
    #[inline]
    pub(crate) fn lookup(&self, mac: MacKey, now: u64) -> Option<Gate> {
        let home = self.home(mac);
        let mut entry = self.table.at(home & self.table.mask);
        if entry.mac() != mac {
            entry = self.search(mac, home)?;
        }
        (!self.is_gone(entry, now)).then(|| entry.gate())
    }

    /// The entry of one that is not at home.
    #[inline(never)]
    fn search(&self, mac: MacKey, home: usize) -> Option<Entry> {
        let found = self.table.find(mac, home);
        let found = found.or_else(|| match self.old.is_empty() {
            true => None,
            false => self.old.find(mac, home),
        });
        found.map(|(_, entry)| entry)
    }

    /// Whether it is larger than a cache that is near.
    #[inline]
    pub(crate) fn is_large(&self) -> bool {
        self.table.len() >= LARGE
    }

    /// Reads what stands where `mac` would, to have it near.
    #[inline]
    pub(crate) fn peek(&self, mac: MacKey) -> u64 {
        self.table.at(self.home(mac) & self.table.mask).station
    }

    /// Forgets every station behind one of `gates`, which are in order. They leave a large table little by little.
    pub(crate) fn forget(&mut self, gates: &[Gate], now: u64) {
        if self.table.len() + self.old.len() <= SMALL {
            let is_behind = |entry: Entry| gates.binary_search(&entry.gate()).is_ok();
            let removed = [&mut self.table, &mut self.old]
                .map(|slots| slots.remove_all(&self.hash, is_behind));
            self.len -= removed.iter().sum::<usize>();
            return;
        }
        for gate in gates.iter().map(|&gate| usize::from(gate)) {
            if self.forgot.len() <= gate {
                self.forgot.resize(gate + 1, 0);
            }
            self.forgot[gate] = now;
        }
        self.to_forget = self.table.len() + self.old.len();
    }

    /// Whether a station counts as unknown: not heard of for too long, or not since it was forgotten.
    #[inline]
    fn is_gone(&self, entry: Entry, now: u64) -> bool {
        self.is_aged(entry, now) || !self.forgot.is_empty() && self.was_forgotten(entry)
    }

    #[inline]
    fn is_aged(&self, entry: Entry, now: u64) -> bool {
        now.saturating_sub(entry.seen) >= self.ageing
    }

    #[cold]
    #[inline(never)]
    fn was_forgotten(&self, entry: Entry) -> bool {
        let forgot = self.forgot.get(usize::from(entry.gate()));
        forgot.is_some_and(|&then| then != 0 && entry.seen & !ELSEWHERE <= then)
    }

    /// Takes out aged entries in the next `n` slots, round and round; in more where there are stations to be forgotten.
    pub(crate) fn sweep(&mut self, n: usize, now: u64) {
        let n = n.max(self.to_forget.min(SEARCHED_TO_FORGET));
        self.to_forget = self.to_forget.saturating_sub(n);
        self.migrate(n, now);
        for _ in 0..n.min(self.table.len()) {
            let at = self.sweep_at & self.table.mask;
            while !self.table.at(at).is_free() && self.is_gone(self.table.at(at), now) {
                self.note_gone(self.table.at(at), now);
                self.table.remove(at, &self.hash);
            }
            self.sweep_at = at + 1;
        }
    }

    /// Lets it hold so many stations from now on; it forgets none for that.
    #[inline]
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit.min(MAX_ENTRIES);
    }

    /// How many stations it can hold.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// How many stations it holds, those included that have aged and were not swept yet.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// How many slots a whole sweep has to look at.
    pub(crate) fn slots(&self) -> usize {
        self.table.len()
    }

    /// How many entries were forgotten for age.
    pub(crate) fn aged(&self) -> u64 {
        self.aged
    }

    #[inline]
    fn home(&self, mac: MacKey) -> usize {
        home(&self.hash, mac)
    }

    #[cold]
    fn insert(&mut self, entry: Entry, home: usize, now: u64) -> Learnt {
        if self.len >= self.limit {
            // Once a breath: whoever fills the table with addresses pays little for each more.
            if self.searched_at != Some(now) {
                self.searched_at = Some(now);
                self.sweep(SEARCHED_WHEN_FULL, now);
            }
            if self.len >= self.limit {
                return Learnt::Full;
            }
        }
        self.migrate(MOVED_PER_CHANGE, now);
        if (self.len + 1) * 2 > self.table.len() {
            self.grow(now);
        }
        self.table.put(entry, home);
        self.len += 1;
        Learnt::New
    }

    fn grow(&mut self, now: u64) {
        // Not needed by the arithmetic above; it makes sure that there is one old table at most.
        self.migrate(self.old.len(), now);
        let wider = Slots::new(self.table.len() * 2);
        self.old = std::mem::replace(&mut self.table, wider);
        self.old_at = 0;
    }

    /// Moves what the next `n` slots of the old table hold into the new one.
    fn migrate(&mut self, n: usize, now: u64) {
        if self.old.is_empty() {
            return;
        }
        let end = (self.old_at + n).min(self.old.len());
        while self.old_at < end {
            // Taking one out may move another one here.
            let entry = self.old.at(self.old_at);
            if entry.is_free() {
                self.old_at += 1;
                continue;
            }
            self.old.remove(self.old_at, &self.hash);
            if self.is_gone(entry, now) {
                self.note_gone(entry, now);
            } else {
                self.table.put(entry, home(&self.hash, entry.mac()));
            }
        }
        if self.old_at == self.old.len() {
            self.old = Slots::new(0);
        }
    }

    fn note_gone(&mut self, entry: Entry, now: u64) {
        self.len -= 1;
        if !self.is_aged(entry, now) {
            // Forgotten with its cable, and so by the others as well.
            return;
        }
        self.aged += 1;
        if let Some(list) = &mut self.forgotten {
            list.push(entry.mac());
        }
    }

    /// Moves one station that was heard of from the old table into the new one; where it is now.
    fn take_along(&mut self, mac: MacKey, home: usize) -> Option<(usize, Entry)> {
        let (at, entry) = self.old.find(mac, home)?;
        self.old.remove(at, &self.hash);
        Some((self.table.put(entry, home), entry))
    }
}

#[inline]
fn home(hash: &RandomState, mac: MacKey) -> usize {
    let hashed = hash.hash_one(mac);
    // The halves together: a short table uses the low bits only.
    usize::try_from((hashed ^ hashed >> 32) & u64::from(u32::MAX)).unwrap_or_default()
}

/// The entries of one table, each at its home or behind it, without a gap between.
struct Slots {
    /// As numbers, since memory for so many zeros is had from the system without writing them.
    entries: Box<[[u64; 2]]>,
    mask: usize,
}

impl Slots {
    /// `n` free slots: a power of two, or none.
    fn new(n: usize) -> Self {
        Self {
            entries: vec![[0; 2]; n].into(),
            mask: n.saturating_sub(1),
        }
    }

    fn len(&self) -> usize {
        self.entries.len()
    }

    #[inline]
    fn at(&self, at: usize) -> Entry {
        let [station, seen] = self.entries[at];
        Entry { station, seen }
    }

    #[inline]
    fn set(&mut self, at: usize, entry: Entry) {
        self.entries[at] = [entry.station, entry.seen];
    }

    #[inline]
    fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Where `mac` is, and what stands there. There is always a free slot to end at.
    #[inline]
    fn find(&self, mac: MacKey, home: usize) -> Option<(usize, Entry)> {
        let mut at = home & self.mask;
        loop {
            let entry = self.at(at);
            if entry.mac() == mac {
                return Some((at, entry));
            }
            if entry.is_free() {
                return None;
            }
            at = (at + 1) & self.mask;
        }
    }

    fn put(&mut self, entry: Entry, home: usize) -> usize {
        let mut at = home & self.mask;
        while !self.at(at).is_free() {
            at = (at + 1) & self.mask;
        }
        self.set(at, entry);
        at
    }

    /// Takes out what is in `hole` and closes the gap with those behind it that may move up.
    fn remove(&mut self, mut hole: usize, hash: &RandomState) {
        let mut at = hole;
        loop {
            at = (at + 1) & self.mask;
            let entry = self.at(at);
            if entry.is_free() {
                break;
            }
            let from_home = at.wrapping_sub(home(hash, entry.mac())) & self.mask;
            let from_hole = at.wrapping_sub(hole) & self.mask;
            if from_home >= from_hole {
                self.set(hole, entry);
                hole = at;
            }
        }
        self.set(hole, Entry::default());
    }

    fn remove_all(&mut self, hash: &RandomState, unwanted: impl Fn(Entry) -> bool) -> usize {
        let mut removed = 0;
        for at in 0..self.len() {
            while !self.at(at).is_free() && unwanted(self.at(at)) {
                self.remove(at, hash);
                removed += 1;
            }
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const AGEING: u64 = 1_000;

    #[derive(Clone, Debug)]
    enum Op {
        Learn(u64, Gate),
        Lookup(u64),
        Forget(Gate),
        Wait(u64),
        Sweep(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        // Few addresses, so that they meet again; many, so that the table grows.
        let mac = prop_oneof![1..40_u64, 1..2_000_u64, Just(MAC_MASK)];
        prop_oneof![
            8 => (mac.clone(), 0..4_u16).prop_map(|(mac, gate)| Op::Learn(mac, gate)),
            4 => mac.prop_map(Op::Lookup),
            1 => (0..4_u16).prop_map(Op::Forget),
            2 => (0..AGEING).prop_map(Op::Wait),
            1 => (0..512_usize).prop_map(Op::Sweep),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn it_agrees_with_a_plain_map(ops in prop::collection::vec(op(), 1..1_500)) {
            let mut table = MacTable::new(1_000_000, AGEING);
            let mut model: HashMap<u64, (Gate, u64)> = HashMap::new();
            let mut now = 0;
            for op in ops {
                match op {
                    Op::Learn(mac, gate) => {
                        let expected = match model.insert(mac, (gate, now)) {
                            Some((_, seen)) if now - seen >= AGEING => Learnt::New,
                            Some((was, _)) if was == gate => Learnt::Known,
                            Some(_) => Learnt::Moved,
                            None => Learnt::New,
                        };
                        prop_assert_eq!(table.learn(mac, gate, now), expected);
                    }
                    Op::Lookup(mac) => {
                        let expected = model
                            .get(&mac)
                            .filter(|&&(_, seen)| now - seen < AGEING)
                            .map(|&(gate, _)| gate);
                        prop_assert_eq!(table.lookup(mac, now), expected);
                    }
                    Op::Forget(gate) => {
                        table.forget(&[gate], now);
                        model.retain(|_, &mut (behind, _)| behind != gate);
                    }
                    Op::Wait(ns) => now += ns,
                    Op::Sweep(n) => table.sweep(n, now),
                }
            }
            table.sweep(table.old.len(), now);
            table.sweep(table.slots(), now);
            table.sweep(table.slots(), now);
            model.retain(|_, &mut (_, seen)| now - seen < AGEING);
            prop_assert_eq!(table.len(), model.len());
            for (&mac, &(gate, _)) in &model {
                prop_assert_eq!(table.lookup(mac, now), Some(gate));
            }
        }
    }

    #[test]
    fn it_grows_to_a_million_and_finds_all_of_them() {
        const N: u64 = 1_000_000;
        let mut table = MacTable::new(1_000_000, AGEING);
        for mac in 1..=N {
            assert_eq!(table.learn(mac, 7, 1), Learnt::New);
            assert!(table.len() * 2 <= table.slots());
        }
        assert_eq!(table.learn(N + 1, 7, 1), Learnt::Full);
        assert!((1..=N).all(|mac| table.lookup(mac, 1) == Some(7)));
        assert_eq!(table.lookup(N + 1, 1), None);
        assert_eq!(table.slots(), 1 << 21);
    }

    #[test]
    fn a_full_table_takes_new_stations_when_old_ones_have_aged() {
        let mut table = MacTable::new(3, AGEING);
        for mac in 1..=3 {
            table.learn(mac, 0, 0);
        }
        assert_eq!(table.learn(4, 0, AGEING - 1), Learnt::Full);
        assert_eq!(table.learn(4, 0, AGEING), Learnt::New);
        assert!(table.len() <= 3);
    }

    #[test]
    fn stations_leave_a_large_table_little_by_little_and_are_unknown_at_once() {
        let mut table = MacTable::new(1_000_000, AGEING);
        for mac in 1..=10_000 {
            table.learn(mac, u16::try_from(mac % 4).unwrap(), 1);
        }
        table.learn_elsewhere(20_001, 1, 1);
        table.forget(&[1, 3], 2);
        assert!(table.len() > 9_000, "looked through in one breath");
        for mac in (1..=10_000).chain([20_001]) {
            let gate = u16::try_from(mac % 4).unwrap();
            let expected = (gate % 2 == 0).then_some(gate);
            assert_eq!(table.lookup(mac, 2), expected);
        }
        assert_eq!(table.learn(1, 1, 3), Learnt::New);
        assert_eq!(table.lookup(1, 3), Some(1));
        while table.to_forget > 0 {
            table.sweep(1, 3);
        }
        assert_eq!((table.len(), table.aged()), (5_001, 0));
    }

    #[test]
    fn being_heard_of_keeps_a_station_young() {
        let mut table = MacTable::new(10, AGEING);
        table.learn(1, 0, 0);
        table.learn(1, 0, 900);
        assert_eq!(table.lookup(1, 1_899), Some(0));
        assert_eq!(table.lookup(1, 1_900), None);
        assert_eq!(table.learn(1, 0, 1_900), Learnt::New);
    }
}
