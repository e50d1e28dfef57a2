//! The way of a burst through the network: from where it enters to every place it ends.
//!
//! A function says what is to happen ([`Fate`]), and here it happens: packets are grouped by destination, each port is
//! called once for all its packets of the burst, functions behind functions are entered in turn. When all packets share one
//! fate, which is the usual case, nothing is regrouped.
//!
//! Every packet is accounted for. What a port has no room for is dropped and counted there, unless it was only *offered* by
//! whoever makes packets; then it was never made. Cables may form a circle: the way of a packet is at most [`MAX_DEPTH`]
//! functions long, and all packets of a burst together enter at most [`MAX_ENTRIES`] functions.
//!
//! A packet that was flooded is one packet in several places: a function that changes packets works on a copy then.

mod finisher;
mod giving;
mod groups;

use virtnet_packet::{
    BURST_MAX, Backlog, Burst, DropCounters, DropReason, Offloads, Picks, Port, PortCounters,
};

use self::finisher::Finisher;
use self::giving::{Giving, Sent};
use self::groups::Groups;
use crate::function::{BRANCH, Fate, Fates, Function, Tee, Verdict};
use crate::graph::{Gate, NodeId, Routes, Slot, Target};
use crate::passage::{Address, News, Passages};
use crate::patience::Patience;
use crate::plan::Resident;
use crate::stats::FunctionCounters;

/// The most functions on the way of one packet.
pub(crate) const MAX_DEPTH: usize = 8;

/// The most functions that one burst enters: where every function of a circle floods, their number would double and double.
pub(crate) const MAX_ENTRIES: u32 = 1_024;

/// What fates are before they are decided. Copied from here, since each would be a store of its own otherwise.
static UNDECIDED: Fates = [Fate::Consumed; BURST_MAX];

/// A port in its place in the network.
#[derive(Debug)]
pub(crate) struct PortNode {
    pub(crate) node: NodeId,
    pub(crate) port: Box<dyn Port>,
    /// What it had counted when it came here.
    pub(crate) before: PortCounters,
    pub(crate) drops: DropCounters,
    /// Something was sent to it in this breath.
    pub(crate) sent_to: bool,
    /// Frames that were made of longer ones for it, beyond the first of each.
    pub(crate) segmented: u64,
    /// When packets came from it last.
    pub(crate) heard: u64,
    /// How long it is left alone when it has nothing.
    pub(crate) patience: Patience,
    /// The worker waits for its descriptor, and does not ask it until then.
    pub(crate) dozes: bool,
    /// It is not asked while there is no room here for a burst of its packets.
    pub(crate) held_by: Option<Backlog>,
}

impl PortNode {
    /// Whether its packets are to stay where they are for now.
    #[inline]
    pub(crate) fn is_held(&self) -> bool {
        self.held_by
            .as_ref()
            .is_some_and(|backlog| backlog.room() < BURST_MAX)
    }
}

/// A function in its place in the network.
#[derive(Debug)]
pub(crate) struct FunctionNode {
    pub(crate) node: NodeId,
    pub(crate) function: Function,
    pub(crate) counters: FunctionCounters,
}

/// All nodes of a worker and the cables between them.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) ports: Vec<Option<Box<PortNode>>>,
    pub(crate) functions: Vec<Option<Box<FunctionNode>>>,
    pub(crate) routes: Routes,
    /// The ports that were sent to in this breath.
    pub(crate) sent_to: Vec<usize>,
    /// To the nodes that other workers have.
    pub(crate) passages: Passages,
    /// For packets of which a port is left with more than it takes.
    finisher: Box<Finisher>,
    /// For copies of flooded packets, one for each step of the way.
    copies: [Option<Box<Burst>>; MAX_DEPTH],
    entries_left: u32,
}

/// What is known of packets on their way.
#[derive(Clone, Copy, Debug)]
struct Way {
    now: u64,
    /// Functions entered so far.
    depth: usize,
    /// Who sends: where a packet is counted that has no way on.
    from: Slot,
    /// The packets are in several places, or are not the sender's to lose: they must not be changed.
    shared: bool,
    /// What finds no room was not sent at all.
    offered: bool,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            ports: Vec::new(),
            functions: Vec::new(),
            routes: Routes::default(),
            sent_to: Vec::new(),
            passages: Passages::default(),
            finisher: Box::default(),
            copies: std::array::from_fn(|_| Some(Box::default())),
            entries_left: 0,
        }
    }
}

impl Network {
    /// Sends on what port `slot` has received.
    #[inline]
    pub(crate) fn send_received(
        &mut self,
        slot: usize,
        burst: &mut Burst,
        picks: &Picks,
        now: u64,
    ) {
        let target = self.routes.ports.get(slot).copied().unwrap_or_default();
        self.entries_left = MAX_ENTRIES;
        let way = Way {
            now,
            depth: 0,
            from: Slot::Port(slot),
            shared: false,
            offered: false,
        };
        self.send(target, burst, picks, way);
    }

    /// Offers what function `slot` makes to whatever is cabled to its first gate; how many were taken. Those are counted
    /// as generated.
    #[inline]
    pub(crate) fn offer_made(
        &mut self,
        slot: usize,
        burst: &mut Burst,
        picks: &Picks,
        now: u64,
    ) -> usize {
        self.offer_made_at(slot, 0, burst, picks, now)
    }

    /// The same for whatever is cabled to `gate`.
    #[inline]
    pub(crate) fn offer_made_at(
        &mut self,
        slot: usize,
        gate: Gate,
        burst: &mut Burst,
        picks: &Picks,
        now: u64,
    ) -> usize {
        let routes = self.routes.functions.get(slot);
        let target = routes.map_or(Target::Nothing, |gates| gates.target(gate));
        self.entries_left = MAX_ENTRIES;
        let way = Way {
            now,
            depth: 1,
            from: Slot::Function(slot),
            shared: true,
            offered: true,
        };
        let refused = self.send(target, burst, picks, way);
        let taken = picks.len() - refused;
        if let Some(node) = self.functions.get_mut(slot).and_then(Option::as_mut) {
            node.counters.generated += taken as u64;
        }
        taken
    }

    /// Sends what function `slot` makes again and again to whatever is cabled to its first gate, whether there is room or not.
    pub(crate) fn send_lasting(&mut self, slot: usize, burst: &mut Burst, picks: &Picks, now: u64) {
        self.entries_left = MAX_ENTRIES;
        let way = Way {
            now,
            depth: 1,
            from: Slot::Function(slot),
            shared: true,
            offered: false,
        };
        if let Some(node) = self.functions.get_mut(slot).and_then(Option::as_mut) {
            node.counters.generated += picks.len() as u64;
        }
        self.send(self.first_target(slot), burst, picks, way);
    }

    /// Sends what function `slot` has made by one of its gates. It is counted as generated.
    pub(crate) fn send_made(
        &mut self,
        slot: usize,
        gate: Gate,
        burst: &mut Burst,
        picks: &Picks,
        now: u64,
    ) {
        if let Some(node) = self.functions.get_mut(slot).and_then(Option::as_mut) {
            node.counters.generated += picks.len() as u64;
        }
        self.send_kept(slot, gate, burst, picks, now);
    }

    /// Sends on by `gate` what function `slot` had kept.
    pub(crate) fn send_kept(
        &mut self,
        slot: usize,
        gate: Gate,
        burst: &mut Burst,
        picks: &Picks,
        now: u64,
    ) {
        let gates = self.routes.functions.get(slot);
        let target = gates.map_or(Target::Nothing, |gates| gates.target(gate));
        self.entries_left = MAX_ENTRIES;
        let way = Way {
            now,
            depth: 1,
            from: Slot::Function(slot),
            shared: false,
            offered: false,
        };
        self.send(target, burst, picks, way);
    }

    /// Takes out what is in a slot, if this worker has it or a part of it.
    pub(crate) fn take_out(&mut self, slot: Slot) -> Option<Resident> {
        match slot {
            Slot::Port(slot) => self.ports.get_mut(slot)?.take().map(Resident::Port),
            Slot::Function(slot) => {
                let node = self.functions.get_mut(slot)?.take();
                node.map(Resident::Function)
            }
        }
    }

    /// Puts a node into a slot of its kind.
    pub(crate) fn put_in(&mut self, slot: Slot, what: Resident) {
        match (slot, what) {
            (Slot::Port(slot), Resident::Port(node)) => {
                *place_in(&mut self.ports, slot) = Some(node)
            }
            (Slot::Function(slot), Resident::Function(node)) => {
                *place_in(&mut self.functions, slot) = Some(node);
            }
            _ => debug_assert!(false, "a node was planned for the wrong list"),
        }
    }

    /// Looks up anew which of some ports have to wait for a function.
    pub(crate) fn find_held(&mut self, ports: &[usize]) {
        for &slot in ports {
            let Some(Some(node)) = self.ports.get_mut(slot) else {
                continue;
            };
            let target = self.routes.ports.get(slot).copied().unwrap_or_default();
            node.held_by = match target {
                Target::Function(slot, gate) => {
                    let function = self.functions.get(slot).and_then(Option::as_ref);
                    function.and_then(|node| node.function.holds(gate)).cloned()
                }
                Target::Port(_) | Target::Copies(..) | Target::Nothing => None,
            };
        }
    }

    /// What is cabled to the first gate of function `slot`.
    #[inline]
    pub(crate) fn first_target(&self, slot: usize) -> Target {
        self.routes
            .functions
            .get(slot)
            .map_or(Target::Nothing, |gates| gates.target(0))
    }

    /// Gives packets to one destination; how many were refused. Only offered packets ever are.
    #[inline]
    fn send(&mut self, target: Target, burst: &mut Burst, picks: &Picks, way: Way) -> usize {
        match target {
            Target::Port(slot) => self.send_to_port(slot, Sent, burst, picks, way),
            Target::Function(slot, gate) => self.enter(slot, gate, burst, picks, way),
            Target::Copies(..) | Target::Nothing => self.send_aside(target, burst, picks, way),
        }
    }

    /// What is neither sent to a port nor enters a function. Kept out of the way of what is.
    #[inline(never)]
    fn send_aside(&mut self, target: Target, burst: &Burst, picks: &Picks, way: Way) -> usize {
        if let Target::Copies(slot, from) = target {
            return self.send_to_port(slot, from, burst, picks, way);
        }
        self.count_drops(way.from, DropReason::NoCable, picks.len());
        0
    }

    #[inline]
    fn send_to_port<G: Giving>(
        &mut self,
        slot: usize,
        giving: G,
        burst: &Burst,
        picks: &Picks,
        way: Way,
    ) -> usize {
        let Some(node) = self.ports.get_mut(slot).and_then(Option::as_mut) else {
            return self.hand_over(giving.target(slot), burst, picks, way);
        };
        if !node.sent_to {
            node.sent_to = true;
            self.sent_to.push(slot);
        }
        if burst.needs() != Offloads::NONE && !node.port.offloads().contains(burst.needs()) {
            return self.send_finished(slot, giving, burst, picks, way);
        }
        let accepted = giving.give(&mut *node.port, burst, picks);
        let refused = picks.len().saturating_sub(accepted);
        if refused == 0 {
            return 0;
        }
        if !self.passages.is_home(Slot::Port(slot)) && !node.port.is_up() {
            // None of the queues of this part takes packets; the first part has those that are used first.
            return self.hand_over(giving.target(slot), burst, &picks.skip(accepted), way);
        }
        if !way.offered {
            giving.drop(&mut *node.port, DropReason::NoRoom, refused);
            return 0;
        }
        refused
    }

    /// Sends packets to a port that cannot be left with all that they leave to be done: those it can as they are, the others
    /// finished here. How many were refused.
    #[cold]
    fn send_finished<G: Giving>(
        &mut self,
        slot: usize,
        giving: G,
        burst: &Burst,
        picks: &Picks,
        way: Way,
    ) -> usize {
        let is_home = self.passages.is_home(Slot::Port(slot));
        let Some(node) = self.ports.get_mut(slot).and_then(Option::as_mut) else {
            return 0;
        };
        if !is_home && !node.port.is_up() {
            return self.hand_over(giving.target(slot), burst, picks, way);
        }
        let takes = node.port.offloads();
        let passes = |k: usize| takes.contains(burst.offload(picks.get(k)).into());
        let mut at = 0;
        while at < picks.len() {
            let mut run = Picks::default();
            (at..picks.len())
                .take_while(|&k| passes(k))
                .for_each(|k| run.push(picks.get(k)));
            let (n, accepted) = if run.is_empty() {
                let accepted = self.finisher.send(node, giving, burst, picks.get(at));
                (1, usize::from(accepted))
            } else {
                (run.len(), giving.give(&mut *node.port, burst, &run))
            };
            if accepted < n {
                if way.offered {
                    return picks.len() - at - accepted;
                }
                giving.drop(&mut *node.port, DropReason::NoRoom, n - accepted);
            }
            at += n;
        }
        0
    }

    /// Hands packets to the worker that has the node they go to; how many were refused.
    #[cold]
    fn hand_over(&mut self, to: Target, burst: &Burst, picks: &Picks, way: Way) -> usize {
        let home = to.slot().map(|slot| slot.home(self.passages.workers()));
        let accepted = match home.zip(self.routes.node(to)) {
            Some((home, node)) => {
                let parcel = Address {
                    to,
                    node,
                    depth: way.depth,
                };
                self.passages.hand_over(home, parcel, burst, picks)
            }
            None => 0,
        };
        let refused = picks.len() - accepted;
        if refused > 0 && !way.offered {
            self.count_drops(way.from, DropReason::NoRoom, refused);
            return 0;
        }
        refused
    }

    /// Sends on what another worker has handed over. False: the node is not there any more.
    pub(crate) fn send_taken_over(
        &mut self,
        address: Address,
        burst: &mut Burst,
        now: u64,
    ) -> bool {
        let Some(from) = address.to.slot() else {
            return false;
        };
        let here = match from {
            Slot::Port(slot) => self
                .ports
                .get(slot)
                .and_then(Option::as_ref)
                .map(|node| node.node),
            Slot::Function(slot) => {
                let node = self.functions.get(slot).and_then(Option::as_ref);
                node.map(|node| node.node)
            }
        };
        if here != Some(address.node) {
            return false;
        }
        self.entries_left = MAX_ENTRIES;
        let way = Way {
            now,
            depth: address.depth,
            from,
            shared: false,
            offered: false,
        };
        let all = Picks::first(burst.len());
        self.send(address.to, burst, &all, way);
        true
    }

    /// Tells the other workers what the switches among `functions` have learnt.
    pub(crate) fn tell_news(&mut self, functions: &[usize]) {
        for &slot in functions {
            if let Some(FunctionNode {
                node,
                function: Function::Switch(switch),
                ..
            }) = self.functions[slot].as_deref_mut()
            {
                for what in switch.take_news() {
                    self.passages.tell(News {
                        changes: self.passages.changes,
                        slot,
                        node: *node,
                        what,
                    });
                }
            }
        }
    }

    /// What another worker's switch has learnt.
    pub(crate) fn hear(&mut self, news: News, now: u64) {
        if let Some(Some(node)) = self.functions.get_mut(news.slot)
            && node.node == news.node
            && let Function::Switch(switch) = &mut node.function
        {
            switch.hear(news.what, now);
        }
    }

    /// Has a function decide, and does what it says.
    fn enter(
        &mut self,
        slot: usize,
        gate: Gate,
        burst: &mut Burst,
        picks: &Picks,
        way: Way,
    ) -> usize {
        if way.depth >= MAX_DEPTH || self.entries_left == 0 {
            self.count_drops(way.from, DropReason::Loop, picks.len());
            return 0;
        }
        self.entries_left -= 1;
        let Some(node) = self.functions.get_mut(slot).and_then(Option::as_mut) else {
            return self.hand_over(Target::Function(slot, gate), burst, picks, way);
        };
        if way.shared && node.function.changes_packets() {
            return self.enter_with_copies(slot, gate, burst, picks, way);
        }
        let mut fates = UNDECIDED;
        let verdict = node
            .function
            .classify(burst, picks, gate, way.now, &mut fates);
        let way = Way {
            depth: way.depth + 1,
            from: Slot::Function(slot),
            ..way
        };
        match verdict {
            Verdict::All(fate) => self.act(slot, gate, fate, burst, picks, way),
            Verdict::Each => self.act_on_each(slot, gate, &fates, burst, picks, way),
            Verdict::Copied => self.act_on_copies(slot, gate, &fates, burst, picks, way),
            Verdict::Spread => self.act_as_laid_out(slot, burst, way),
        }
    }

    /// Sends copies of the packets that a tee has chosen by its branch, and then all packets on: so what becomes of a packet
    /// further on is seen after it.
    #[inline(never)]
    fn act_on_copies(
        &mut self,
        slot: usize,
        came_in_by: Gate,
        fates: &Fates,
        burst: &mut Burst,
        picks: &Picks,
        way: Way,
    ) -> usize {
        let is_chosen = |fate: &Fate| *fate == Fate::Flood;
        let mut some = Picks::default();
        let chosen = if fates[..picks.len()].iter().all(is_chosen) {
            picks // as mostly
        } else {
            let marked = picks.iter().zip(fates).filter(|(_, fate)| is_chosen(fate));
            marked.for_each(|(i, _)| some.push(i));
            &some
        };
        let gates = &self.routes.functions[slot];
        let (branch, past) = (gates.target(BRANCH), gates.target(came_in_by ^ 1));
        let way = Way {
            offered: false,
            ..way
        };
        if branch != Target::Nothing {
            if let Some(node) = &mut self.functions[slot] {
                node.counters.copied += chosen.len() as u64;
            }
            let copies = Way {
                shared: true,
                ..way
            };
            self.send(
                branch.going(Tee::direction(came_in_by)),
                burst,
                chosen,
                copies,
            );
        }
        self.send(past, burst, picks, way)
    }

    /// Has packets leave by the gates that a switch has laid out for them, at each in its own form. Kept out of the way of those
    /// that need no such thing.
    #[inline(never)]
    fn act_as_laid_out(&mut self, slot: usize, burst: &mut Burst, way: Way) -> usize {
        let Some(FunctionNode {
            function: Function::Switch(switch),
            counters,
            ..
        }) = self.functions[slot].as_deref_mut()
        else {
            return 0;
        };
        // It may be entered again further on its packets' way, so they are not left with it.
        let Some(mut departures) = switch.take_departures() else {
            return 0;
        };
        counters.drops.merge(departures.drops());
        counters.copied += departures.copies();
        let is_each_alone = departures.copies() == 0;
        let way = Way {
            shared: way.shared || !is_each_alone,
            offered: way.offered && is_each_alone,
            ..way
        };
        let mut refused = 0;
        for k in 0..departures.len() {
            let (gate, picks) = departures.get(k);
            if let Some(FunctionNode {
                function: Function::Switch(switch),
                ..
            }) = self.functions[slot].as_deref()
            {
                switch.dress(&mut departures, burst, &picks, gate);
            }
            let target = self.routes.functions[slot].target(gate);
            refused += self.send(target, burst, &picks, way);
        }
        if let Some(FunctionNode {
            function: Function::Switch(switch),
            ..
        }) = self.functions[slot].as_deref_mut()
        {
            switch.give_back(departures);
        }
        refused
    }

    #[cold]
    fn enter_with_copies(
        &mut self,
        slot: usize,
        gate: Gate,
        burst: &Burst,
        picks: &Picks,
        way: Way,
    ) -> usize {
        // Each step of the way has its own, so it is there.
        let Some(mut copies) = self.copies.get_mut(way.depth).and_then(Option::take) else {
            self.count_drops(way.from, DropReason::Loop, picks.len());
            return 0;
        };
        copies.clear();
        picks.iter().for_each(|i| copies.push_copy(burst, i));
        let way_of_copies = Way {
            shared: false,
            ..way
        };
        let all = Picks::first(copies.len());
        let refused = self.enter(slot, gate, &mut copies, &all, way_of_copies);
        self.copies[way.depth] = Some(copies);
        refused
    }

    /// Does the same to all packets.
    #[inline]
    fn act(
        &mut self,
        slot: usize,
        came_in_by: Gate,
        fate: Fate,
        burst: &mut Burst,
        picks: &Picks,
        way: Way,
    ) -> usize {
        match fate {
            Fate::To(gate) => {
                let target = self.routes.functions[slot].target(gate);
                self.send(target, burst, picks, way)
            }
            Fate::Flood => {
                self.flood(slot, came_in_by, burst, picks, way);
                0
            }
            Fate::Drop(reason) => {
                self.count_drops(way.from, reason, picks.len());
                0
            }
            // In the function's own books.
            Fate::Held => 0,
            Fate::Consumed => {
                if let Some(node) = &mut self.functions[slot] {
                    node.counters.consumed += picks.len() as u64;
                }
                0
            }
        }
    }

    /// Does to each packet what was said of it, destination by destination.
    fn act_on_each(
        &mut self,
        slot: usize,
        came_in_by: Gate,
        fates: &Fates,
        burst: &mut Burst,
        picks: &Picks,
        way: Way,
    ) -> usize {
        let fates = &fates[..picks.len()];
        if fates.contains(&Fate::Flood) {
            self.act_with_floods(slot, came_in_by, fates, burst, picks, way);
            return 0;
        }
        let groups = Groups::new(fates);
        let mut refused = 0;
        for group in 0..groups.len() {
            let mut members = Picks::default();
            groups.members(group, |k| members.push(picks.get(k)));
            refused += self.act(slot, came_in_by, groups.fate(group), burst, &members, way);
        }
        refused
    }

    /// As [`act_on_each`](Self::act_on_each) where some packets go to every gate: each gate gets its own and the flooded
    /// ones together, in order.
    #[cold]
    fn act_with_floods(
        &mut self,
        slot: usize,
        came_in_by: Gate,
        fates: &[Fate],
        burst: &mut Burst,
        picks: &Picks,
        way: Way,
    ) {
        let way = Way {
            shared: true,
            offered: false,
            ..way
        };
        let pick = |wanted: &dyn Fn(Fate) -> bool| {
            let mut picked = Picks::default();
            let wanted = picks.iter().zip(fates).filter(|&(_, &fate)| wanted(fate));
            wanted.for_each(|(i, _)| picked.push(i));
            picked
        };
        let flooded = pick(&|fate| fate == Fate::Flood);
        let gates = self.count_flood(slot, came_in_by, flooded.len(), way);
        for at in 0..self.routes.functions[slot].cabled().len() {
            let (gate, target) = self.routes.functions[slot].cabled()[at];
            let floods = gates > 0 && gate != came_in_by;
            let there = pick(&|fate| fate == Fate::To(gate) || (floods && fate == Fate::Flood));
            if !there.is_empty() {
                self.send(target, burst, &there, way);
            }
        }
        // What is left goes nowhere: drops, what ends here, gates without a cable.
        for (&fate, i) in fates.iter().zip(picks.iter()) {
            let nowhere = match fate {
                Fate::To(gate) => self.routes.functions[slot].target(gate) == Target::Nothing,
                Fate::Flood | Fate::Held => false,
                Fate::Drop(_) | Fate::Consumed => true,
            };
            if nowhere {
                let mut one = Picks::default();
                one.push(i);
                self.act(slot, came_in_by, fate, burst, &one, way);
            }
        }
    }

    fn flood(&mut self, slot: usize, came_in_by: Gate, burst: &mut Burst, picks: &Picks, way: Way) {
        let gates = self.count_flood(slot, came_in_by, picks.len(), way);
        let way = Way {
            shared: way.shared || gates > 1,
            offered: false,
            ..way
        };
        for at in 0..self.routes.functions[slot].cabled().len() {
            let (gate, target) = self.routes.functions[slot].cabled()[at];
            if gate != came_in_by {
                self.send(target, burst, picks, way);
            }
        }
    }

    /// Counts `n` packets that are to go to every other gate: the copies, or the packets as dropped if there is no other
    /// gate. Returns how many gates that are.
    fn count_flood(&mut self, slot: usize, came_in_by: Gate, n: usize, way: Way) -> usize {
        let gates = self.routes.functions[slot]
            .cabled()
            .iter()
            .filter(|&&(gate, _)| gate != came_in_by)
            .count();
        match gates.checked_sub(1) {
            None => self.count_drops(way.from, DropReason::NoCable, n),
            Some(copies) => {
                if let Some(node) = &mut self.functions[slot] {
                    node.counters.copied += (copies * n) as u64;
                }
            }
        }
        gates
    }

    fn count_drops(&mut self, at: Slot, reason: DropReason, n: usize) {
        let drops = match at {
            Slot::Port(slot) => self.ports[slot].as_mut().map(|node| &mut node.drops),
            Slot::Function(slot) => self.functions[slot]
                .as_mut()
                .map(|node| &mut node.counters.drops),
        };
        if let Some(drops) = drops {
            drops.add(reason, n);
        }
    }
}

fn place_in<T>(list: &mut Vec<Option<T>>, slot: usize) -> &mut Option<T> {
    if list.len() <= slot {
        list.resize_with(slot + 1, || None);
    }
    &mut list[slot]
}
