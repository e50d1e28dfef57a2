//! A table of stations for each VLAN; together they hold as many as the switch may remember.

use super::super::mac_table::{Learnt, MacTable};
use super::rules::VLANS;
use crate::graph::Gate;

/// Who is where, by VLAN. A VLAN has a table from when its first station is learnt.
#[derive(Debug)]
pub(super) struct Tables {
    /// By VLAN: which table, counted from 1.
    of: Vec<u16>,
    all: Vec<(u16, MacTable)>,
    len: usize,
    limit: usize,
    ageing: u64,
    notes: bool,
}

impl Tables {
    pub(super) fn new(limit: usize, ageing: u64) -> Self {
        Self {
            of: vec![0; VLANS],
            all: Vec::new(),
            len: 0,
            limit,
            ageing,
            notes: false,
        }
    }

    /// The same without anybody.
    pub(super) fn emptied(&self) -> Self {
        Self {
            notes: self.notes,
            ..Self::new(self.limit, self.ageing)
        }
    }

    pub(super) fn set_ageing(&mut self, ageing: u64) {
        self.ageing = ageing;
        self.tables().for_each(|table| table.set_ageing(ageing));
    }

    /// Keeps lists of who is forgotten, for [`take_forgotten`](Self::take_forgotten).
    pub(super) fn note_forgotten(&mut self) {
        self.notes = true;
        self.tables().for_each(MacTable::note_forgotten);
    }

    /// Whom it has forgotten for age: VLAN and address.
    pub(super) fn take_forgotten(&mut self) -> impl Iterator<Item = u64> + '_ {
        self.all.iter_mut().flat_map(|(vlan, table)| {
            let vlan = *vlan;
            table.take_forgotten().map(move |mac| key(vlan, mac))
        })
    }

    #[inline]
    pub(super) fn learn(&mut self, vlan: u16, mac: u64, gate: Gate, now: u64) -> Learnt {
        self.with(vlan, |table| table.learn(mac, gate, now))
    }

    pub(super) fn learn_elsewhere(&mut self, key: u64, gate: Gate, now: u64) {
        let (vlan, mac) = parts(key);
        self.with(vlan, |table| table.learn_elsewhere(mac, gate, now));
    }

    pub(super) fn forget_elsewhere(&mut self, key: u64) {
        let (vlan, mac) = parts(key);
        self.with(vlan, |table| table.forget_elsewhere(mac));
    }

    #[inline]
    fn with<T>(&mut self, vlan: u16, act: impl FnOnce(&mut MacTable) -> T) -> T {
        let mut at = self.of[usize::from(vlan) % VLANS];
        if at == 0 {
            at = self.open(vlan);
        }
        let table = &mut self.all[usize::from(at) - 1].1;
        let others = self.len - table.len();
        table.set_limit(self.limit.saturating_sub(others));
        let result = act(table);
        self.len = others + table.len();
        result
    }

    #[cold]
    fn open(&mut self, vlan: u16) -> u16 {
        let mut table = MacTable::new(self.limit, self.ageing);
        if self.notes {
            table.note_forgotten();
        }
        self.all.push((vlan, table));
        let at = u16::try_from(self.all.len()).unwrap_or(u16::MAX);
        self.of[usize::from(vlan) % VLANS] = at;
        at
    }

    #[inline]
    pub(super) fn lookup(&self, vlan: u16, mac: u64, now: u64) -> Option<Gate> {
        let at = self.of[usize::from(vlan) % VLANS].checked_sub(1)?;
        self.all[usize::from(at)].1.lookup(mac, now)
    }

    pub(super) fn forget(&mut self, gates: &[Gate], now: u64) {
        self.tables().for_each(|table| table.forget(gates, now));
        self.count();
    }

    /// Looks through as much of each table as the time since the last look calls for: all of it in `lap` ns.
    pub(super) fn sweep(&mut self, since: u64, lap: u64, now: u64) {
        for table in self.tables() {
            let slots = table.slots();
            let n = (slots as u128 * u128::from(since)).div_ceil(u128::from(lap.max(1)));
            table.sweep(usize::try_from(n).unwrap_or(slots).min(slots), now);
        }
        self.count();
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn aged(&self) -> u64 {
        self.all.iter().map(|(_, table)| table.aged()).sum()
    }

    fn count(&mut self) {
        self.len = self.all.iter().map(|(_, table)| table.len()).sum();
    }

    fn tables(&mut self) -> impl Iterator<Item = &mut MacTable> {
        self.all.iter_mut().map(|(_, table)| table)
    }
}

/// VLAN and address in one number.
#[inline]
pub(super) fn key(vlan: u16, mac: u64) -> u64 {
    u64::from(vlan) << 48 | mac
}

fn parts(key: u64) -> (u16, u64) {
    let vlan = u16::try_from(key >> 48).unwrap_or_default();
    (vlan, key & ((1 << 48) - 1))
}
