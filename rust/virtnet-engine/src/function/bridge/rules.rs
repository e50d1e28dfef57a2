//! What a switch does about its cables: VLANs, who is kept apart, limits, mirrors, bonds; checked, and laid out for looking up.

use std::collections::{BTreeMap, HashMap};

use foldhash::fast::RandomState;

use crate::EngineError;
use crate::graph::Gate;

/// VLAN numbers, and one more for where there are none: 0.
pub(super) const VLANS: usize = 4096;

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; VLANS / 64]>);

impl VlanSet {
    /// No VLAN.
    #[must_use]
    pub fn new() -> Self {
        Self(Box::new([0; VLANS / 64]))
    }

    /// Puts one in; a number that is none is left out.
    pub fn insert(&mut self, vlan: u16) {
        if let Some(word) = self.0.get_mut(usize::from(vlan) / 64) {
            *word |= 1 << (vlan % 64);
        }
    }

    /// Whether one is in it.
    #[inline]
    #[must_use]
    pub fn contains(&self, vlan: u16) -> bool {
        let word = self.0.get(usize::from(vlan) / 64);
        word.is_some_and(|word| word >> (vlan % 64) & 1 != 0)
    }
}

impl Default for VlanSet {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vlans = (0..4096_u16).filter(|&vlan| self.contains(vlan));
        f.debug_set().entries(vlans).finish()
    }
}

impl FromIterator<u16> for VlanSet {
    fn from_iter<I: IntoIterator<Item = u16>>(vlans: I) -> Self {
        let mut set = Self::new();
        vlans.into_iter().for_each(|vlan| set.insert(vlan));
        set
    }
}

/// How many packets of a kind a cable may send in a second; none: as many as it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StormLimits {
    /// To everybody.
    pub broadcast: Option<u32>,
    /// To another group.
    pub multicast: Option<u32>,
    /// To a station that is not known.
    pub unknown: Option<u32>,
}

/// What a switch does about one of its cables.
#[derive(Clone, Debug)]
pub struct CableRules {
    /// The VLAN of frames without a tag, or 0: these are dropped. They leave without one, too.
    pub untagged: u16,
    /// The VLANs that it carries, `untagged` among them.
    pub vlans: VlanSet,
    /// Keeps it apart from all other cables that are isolated.
    pub isolated: bool,
    /// Keeps it apart from all other cables with the same number, if that is not 0 (split horizon).
    pub horizon: u16,
    /// Whether stations are learnt there.
    pub learning: bool,
    /// Limits for what it sends to many.
    pub limits: StormLimits,
    /// Makes it one of several cables that are as one, if not 0: those of the same number.
    pub bond: u16,
    /// Where copies of all that passes here go, either way.
    pub mirror: Option<Gate>,
    /// Stations that are there, whatever is heard: VLAN (0 in a switch without) and address.
    pub stations: Vec<(u16, [u8; 6])>,
}

impl Default for CableRules {
    /// In VLAN 1, and nothing special.
    fn default() -> Self {
        Self {
            untagged: 1,
            vlans: [1].into_iter().collect(),
            isolated: false,
            horizon: 0,
            learning: true,
            limits: StormLimits::default(),
            bond: 0,
            mirror: None,
            stations: Vec::new(),
        }
    }
}

/// What a switch does about all its cables.
#[derive(Debug)]
pub struct BridgeRules {
    pub(super) aware: bool,
    pub(super) loop_guard: u32,
    /// By gate; none where there is no cable.
    cables: Vec<Option<CableRules>>,
    /// By gate: the first of its bond.
    leads: Vec<Gate>,
    /// By gate, of the first of a bond: all of it.
    bonds: Vec<Vec<Gate>>,
    /// By gate: whether it is where a mirror's copies go.
    watches: Vec<bool>,
    /// By VLAN: which list of the gates that belong to it, each bond by its first.
    members_of: Vec<u16>,
    members: Vec<Vec<Gate>>,
    pub(super) stations: HashMap<(u16, u64), Gate, RandomState>,
}

impl BridgeRules {
    /// Lays out what was asked for.
    ///
    /// # Arguments
    /// `aware`: whether VLANs are told apart; otherwise tags are passed on unread, and what a cable says of VLANs is nothing.
    /// `loop_guard`: how often in a second a station may turn up behind another cable, 0 for as often as it likes.
    ///
    /// # Errors
    /// [`EngineError::Vlan`], [`EngineError::Mirror`]: the caller's fault.
    pub fn new(
        aware: bool,
        loop_guard: u32,
        cables: impl IntoIterator<Item = (Gate, CableRules)>,
    ) -> Result<Self, EngineError> {
        let given: BTreeMap<Gate, CableRules> = cables.into_iter().collect();
        let n = given.last_key_value().map_or(0, |(&gate, _)| gate + 1);
        let mut rules = Self {
            aware,
            loop_guard,
            cables: vec![None; n.into()],
            leads: (0..n).collect(),
            bonds: vec![Vec::new(); n.into()],
            watches: vec![false; n.into()],
            members_of: vec![0; VLANS],
            members: vec![Vec::new()],
            stations: HashMap::default(),
        };
        let mut first_of: HashMap<u16, Gate> = HashMap::new();
        for (&gate, cable) in &given {
            check_vlans(gate, cable)?;
            let lead = match cable.bond {
                0 => gate,
                bond => *first_of.entry(bond).or_insert(gate),
            };
            rules.leads[usize::from(gate)] = lead;
            rules.bonds[usize::from(lead)].push(gate);
            for &(vlan, mac) in &cable.stations {
                let vlan = if aware { vlan } else { 0 };
                rules.stations.insert((vlan, mac_key(mac)), lead);
            }
            if let Some(to) = cable.mirror {
                if to == gate || !given.contains_key(&to) {
                    return Err(EngineError::Mirror { gate, to });
                }
                rules.watches[usize::from(to)] = true;
            }
        }
        for (gate, cable) in given {
            rules.cables[usize::from(gate)] = Some(cable);
        }
        rules.list_members();
        Ok(rules)
    }

    fn list_members(&mut self) {
        let mut known: HashMap<Vec<Gate>, u16> = HashMap::from([(Vec::new(), 0)]);
        let vlans = if self.aware { 1..4095 } else { 0..1_u16 };
        for vlan in vlans {
            let belongs = |&gate: &Gate| {
                let cable = self.cable(gate);
                self.leads[usize::from(gate)] == gate
                    && !self.watches(gate)
                    && cable.is_some_and(|cable| !self.aware || cable.vlans.contains(vlan))
            };
            let gates: Vec<Gate> = (0..self.leads.len())
                .filter_map(|gate| Gate::try_from(gate).ok())
                .filter(belongs)
                .collect();
            let list = *known.entry(gates).or_insert_with_key(|gates| {
                self.members.push(gates.clone());
                u16::try_from(self.members.len() - 1).unwrap_or_default()
            });
            self.members_of[usize::from(vlan)] = list;
        }
    }

    /// What is to be done about the cable at `gate`.
    #[inline]
    pub(super) fn cable(&self, gate: Gate) -> Option<&CableRules> {
        self.cables.get(usize::from(gate))?.as_ref()
    }

    /// The first gate of the bond that `gate` belongs to: itself, mostly.
    #[inline]
    pub(super) fn lead(&self, gate: Gate) -> Gate {
        self.leads.get(usize::from(gate)).copied().unwrap_or(gate)
    }

    /// The gates of the bond whose first is `lead`.
    #[inline]
    pub(super) fn bond(&self, lead: Gate) -> &[Gate] {
        self.bonds.get(usize::from(lead)).map_or(&[], Vec::as_slice)
    }

    /// Whether copies go there and nothing else.
    #[inline]
    pub(super) fn watches(&self, gate: Gate) -> bool {
        self.watches.get(usize::from(gate)) == Some(&true)
    }

    /// The gates of a VLAN, each bond by its first.
    #[inline]
    pub(super) fn members(&self, vlan: u16) -> &[Gate] {
        let list = self.members_of[usize::from(vlan) % VLANS];
        &self.members[usize::from(list)]
    }

    /// Whether what comes from one cable must not leave by the other.
    #[inline]
    pub(super) fn apart(one: &CableRules, other: &CableRules) -> bool {
        one.isolated && other.isolated || one.horizon != 0 && one.horizon == other.horizon
    }
}

/// Numbers of VLANs are 1 to 4094. Spec: IEEE 802.1Q-2022, table 9-2.
fn check_vlans(gate: Gate, cable: &CableRules) -> Result<(), EngineError> {
    let untagged = cable.untagged;
    let is_carried = untagged == 0 || cable.vlans.contains(untagged);
    if untagged > 4094 || !is_carried || cable.vlans.contains(0) || cable.vlans.contains(4095) {
        return Err(EngineError::Vlan { gate });
    }
    Ok(())
}

/// An address as [`macs`](super::super::switch::macs) reads it.
fn mac_key(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}
