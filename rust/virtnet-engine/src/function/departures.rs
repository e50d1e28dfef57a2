//! Where the packets of a burst leave when one may leave by several gates, in a form of its own at each.

use virtnet_packet::{BURST_MAX, Burst, DropCounters, DropReason, Picks};

use crate::graph::Gate;

/// What a function lays out for a burst: who leaves by which gate, in which form, and who does not leave.
///
/// Room is kept from burst to burst, so a steady traffic allocates nothing.
pub(crate) struct Departures {
    gates: Vec<(Gate, Picks)>,
    /// For each gate its place in `gates`, counted from 1.
    places: Vec<u16>,
    drops: DropCounters,
    leaving: usize,
    copies: u64,
    /// The tag that a packet came with, and that it has now.
    came: [Option<u16>; BURST_MAX],
    now: [Option<u16>; BURST_MAX],
    /// The VLAN that it is in.
    vlan: [u16; BURST_MAX],
}

impl std::fmt::Debug for Departures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.gates).finish()
    }
}

impl Default for Departures {
    fn default() -> Self {
        Self {
            gates: Vec::new(),
            places: Vec::new(),
            drops: DropCounters::default(),
            leaving: 0,
            copies: 0,
            came: [None; BURST_MAX],
            now: [None; BURST_MAX],
            vlan: [0; BURST_MAX],
        }
    }
}

impl Departures {
    /// Begins with nothing.
    pub(super) fn clear(&mut self) {
        for (gate, _) in self.gates.drain(..) {
            self.places[usize::from(gate)] = 0;
        }
        (self.drops, self.copies, self.leaving) = (DropCounters::default(), 0, 0);
    }

    /// Begins with packet `i`, which came with this tag and is in this VLAN.
    #[inline]
    pub(super) fn begin(&mut self, i: usize, tag: Option<u16>, vlan: u16) {
        (self.came[i], self.now[i], self.vlan[i]) = (tag, tag, vlan);
        self.leaving = 0;
    }

    /// Packet `i`, with which was begun last, leaves by `gate` too.
    #[inline]
    pub(super) fn leave(&mut self, i: usize, gate: Gate) {
        let at = usize::from(gate);
        if self.places.len() <= at {
            self.places.resize(at + 1, 0);
        }
        if self.places[at] == 0 {
            self.gates.push((gate, Picks::default()));
            self.places[at] = u16::try_from(self.gates.len()).unwrap_or(u16::MAX);
        }
        self.gates[usize::from(self.places[at]) - 1].1.push(i);
        self.copies += u64::from(self.leaving > 0);
        self.leaving += 1;
    }

    /// The packet with which was begun last is dropped. Where it leaves all the same, for a mirror, that is a copy.
    #[inline]
    pub(super) fn drop_one(&mut self, reason: DropReason) {
        self.drops.add(reason, 1);
        self.copies += u64::from(self.leaving > 0);
    }

    /// By how many gates anybody leaves.
    pub(crate) fn len(&self) -> usize {
        self.gates.len()
    }

    /// The `k`-th gate, and who leaves by it.
    pub(crate) fn get(&self, k: usize) -> (Gate, Picks) {
        self.gates[k]
    }

    /// Who does not leave.
    pub(crate) fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// How often a packet leaves by a gate beyond its first.
    pub(crate) fn copies(&self) -> u64 {
        self.copies
    }

    /// Gives packets the form that they leave a VLAN switch in: without a tag those of VLAN `untagged`, all others with theirs.
    #[inline]
    pub(super) fn dress(&mut self, burst: &mut Burst, picks: &Picks, untagged: u16) {
        for i in picks.iter() {
            let vlan = self.vlan[i];
            let wanted = (vlan != untagged).then(|| {
                // It keeps the priority that it came with.
                self.came[i].unwrap_or_default() & !VLAN_MASK | vlan
            });
            if self.now[i] != wanted {
                self.change(burst, i, wanted);
            }
        }
    }

    /// Gives packets the form back that they came in.
    pub(super) fn undress(&mut self, burst: &mut Burst, picks: &Picks) {
        for i in picks.iter() {
            let wanted = self.came[i];
            if self.now[i] != wanted {
                self.change(burst, i, wanted);
            }
        }
    }

    fn change(&mut self, burst: &mut Burst, i: usize, wanted: Option<u16>) {
        match (self.now[i], wanted) {
            (None, Some(tci)) => burst.push_tag(i, tci),
            (Some(_), Some(tci)) => burst.set_tag(i, tci),
            (_, None) => {
                burst.pop_tag(i);
            }
        }
        self.now[i] = wanted;
    }
}

/// The bits of a tag that say which VLAN. Spec: IEEE 802.1Q-2022, 9.6.
pub(super) const VLAN_MASK: u16 = 0x0fff;
