//! A firewall between two gates: rules in their order, and what belongs to what they have let begin.
//!
//! A packet of a flow that is known passes without a look at the rules, if it is where that flow is; any other is judged by the first
//! rule that matches. A firewall has its flows in one place, so it is with one worker: others hand their packets over.
//!
//! Gate 1 is the inside where there is one.

mod answers;
mod closely;
mod counts;
mod packet;
mod rules;
mod sets;
mod shortly;
mod states;
mod table;
mod tcp;

use std::sync::Arc;
use std::time::Duration;

use virtnet_packet::{BURST_MAX, Burst, DropReason, Picks};

use self::closely::Datagram;
use self::packet::{Seen, UDP, look_at};
use self::shortly::{Run, Shortly};
use self::states::{Key, State, States, Usual};
use self::tcp::{Phase, Segment};
use super::fragments::Fragments;
use super::outbox::Outbox;
use super::{Fate, Fates, Verdict};
use crate::graph::Gate;

pub use self::rules::{Action, Ends, Rule, RuleSet};
pub use self::sets::{AddressSet, Prefix};
pub use self::states::Timeouts;

/// A firewall is swept once in this time.
const SWEEP_NS: u64 = 1_000_000_000;
/// And little by little where packets come, this often.
const SWEEP_PART_NS: u64 = 1_000_000;

/// What a firewall is to do.
#[derive(Clone, Debug)]
pub struct FirewallOrders {
    /// Its rules.
    pub rules: Arc<RuleSet>,
    /// How long flows are remembered.
    pub timeouts: Timeouts,
}

/// What a rule has counted, and its flows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleCounters {
    /// The rule as it was written; empty for what none matched.
    pub text: String,
    /// Packets that matched, and those of the flows that it let begin.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// What a firewall has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirewallCounters {
    /// Flows that are remembered, those included that have expired and were not swept out yet.
    pub states: usize,
    /// Flows that began.
    pub created: u64,
    /// Flows that were forgotten because nothing was heard of them.
    pub expired: u64,
    /// Flows that had to make room for others.
    pub evicted: u64,
    /// Packets of flows that were known, and ICMP errors about them.
    pub known: u64,
    /// Refusals that were sent.
    pub refused: u64,
    /// Each rule, and last what matched none.
    pub rules: Vec<RuleCounters>,
}

/// A firewall.
#[derive(Debug)]
pub struct Firewall {
    rules: Arc<RuleSet>,
    timeouts: InNs,
    states: States,
    /// Pieces of datagrams, of which the first has passed or is waited for.
    pieces: Fragments<Datagram, ()>,
    /// Pieces that have waited.
    outbox: Outbox,
    known: u64,
    refused: u64,
    /// What is to be sent back by each gate.
    answers: [Option<Box<Burst>>; 2],
    /// Room for what is read of a burst, and of those of its packets that are not usual ones.
    looked: Vec<Looked>,
    close: Vec<Close>,
    swept: u64,
}

/// Timeouts as they are used.
#[derive(Clone, Copy, Debug)]
struct InNs {
    tcp_opening: u64,
    tcp: u64,
    tcp_closing: u64,
    unanswered: u64,
    udp: u64,
    icmp: u64,
    other: u64,
}

impl From<Timeouts> for InNs {
    fn from(timeouts: Timeouts) -> Self {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            tcp_opening: ns(timeouts.tcp_opening),
            tcp: ns(timeouts.tcp),
            tcp_closing: ns(timeouts.tcp_closing),
            unanswered: ns(timeouts.unanswered),
            udp: ns(timeouts.udp),
            icmp: ns(timeouts.icmp),
            other: ns(timeouts.other),
        }
    }
}

impl InNs {
    fn of(&self, state: &State, protocol: u8) -> u64 {
        match &state.tcp {
            Some(connection) => match connection.phase() {
                Phase::Opening => self.tcp_opening,
                Phase::Established => self.tcp,
                Phase::Closing => self.tcp_closing,
            },
            None if protocol == packet::ICMP || protocol == packet::ICMP6 => self.icmp,
            None if !state.answered => self.unanswered,
            None if protocol == UDP => self.udp,
            None => self.other,
        }
    }
}

/// What was read of a packet.
#[derive(Clone, Copy, Debug)]
enum Looked {
    /// One of those that most are, with the hash of its flow.
    Usual(Usual, u64),
    /// Another: its number among these.
    Closely(usize),
}

/// All that was read of a packet, and what its flow is called.
#[derive(Clone, Copy, Debug)]
struct Close {
    seen: Seen,
    key: Key,
    hash: u64,
}

/// Whether a packet belongs to a flow.
enum Known {
    Yes,
    /// There is no flow of its ends.
    No,
    /// There is one, and it is not clear at once what the packet is to it.
    Doubtful,
}

impl Firewall {
    /// A firewall that remembers up to `states` flows.
    #[must_use]
    pub fn new(orders: FirewallOrders, states: usize) -> Self {
        Self {
            states: States::new(states, &orders.rules),
            rules: orders.rules,
            timeouts: orders.timeouts.into(),
            pieces: Fragments::default(),
            outbox: Outbox::default(),
            known: 0,
            refused: 0,
            answers: [None, None],
            looked: Vec::with_capacity(BURST_MAX),
            close: Vec::with_capacity(BURST_MAX),
            swept: 0,
        }
    }

    /// Takes new orders. Flows stay, also those that would not begin any more; rules that stay as written go on counting.
    pub(super) fn order(&mut self, orders: FirewallOrders) -> impl Send + use<> {
        self.timeouts = orders.timeouts.into();
        let places = self.states.counts.order(&orders.rules, &self.rules);
        (std::mem::replace(&mut self.rules, orders.rules), places)
    }

    pub(super) fn counters(&self) -> FirewallCounters {
        let texts = self.rules.rules.iter().map(|rule| rule.text.clone());
        let rules = texts.chain([String::new()]).zip(self.states.counts.all());
        FirewallCounters {
            states: self.states.len(),
            created: self.states.created,
            expired: self.states.expired,
            evicted: self.states.evicted,
            known: self.known,
            refused: self.refused,
            rules: rules
                .map(|(text, (packets, bytes))| RuleCounters {
                    text,
                    packets,
                    bytes,
                })
                .collect(),
        }
    }

    pub(super) fn classify(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        gate: Gate,
        now: u64,
        fates: &mut Fates,
    ) -> Verdict {
        self.sweep(now, SWEEP_PART_NS);
        let verdict = if self.states.len() == 0 && !self.rules.keeps_state() {
            self.classify_by_rules(burst, picks, gate, now, fates)
        } else {
            self.classify_by_flows(burst, picks, gate, now, fates)
        };
        if self.pieces.has_released() {
            for piece in self.pieces.take_released() {
                let gate = piece.gate ^ 1;
                self.outbox.push(gate, &piece.frame, piece.offload);
            }
        }
        verdict
    }

    /// Judges packets by the flows that they belong to, and others by rules.
    fn classify_by_flows(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        gate: Gate,
        now: u64,
        fates: &mut Fates,
    ) -> Verdict {
        let on = Fate::To(gate ^ 1);
        let mut all_pass = true;
        let mut looked = std::mem::take(&mut self.looked);
        let mut close = std::mem::take(&mut self.close);
        looked.clear();
        close.clear();
        looked.extend(picks.iter().map(|i| {
            let (head, frame_len) = (burst.head(i), burst.frame_len(i));
            self.look(head, frame_len, &mut close)
        }));
        if self.states.is_large() {
            self.fetch(&looked, &close);
        }
        let mut run = Run::default();
        for ((fate, looked), i) in fates.iter_mut().zip(&looked).zip(picks.iter()) {
            *fate = on;
            let (head, frame_len) = (burst.head(i), burst.frame_len(i));
            let close = match looked {
                Looked::Usual(usual, hash) => {
                    let verdict = match self.know(usual, *hash, head, frame_len, gate, now) {
                        Known::Yes => continue,
                        Known::No => self.judge_shortly(usual, &mut run, head, frame_len, gate),
                        Known::Doubtful => Shortly::AskedMore,
                    };
                    match verdict {
                        Shortly::Passes => continue,
                        Shortly::IsDropped(reason) => {
                            all_pass = false;
                            *fate = Fate::Drop(reason);
                            continue;
                        }
                        Shortly::AskedMore => &self.look_closely(head),
                    }
                }
                Looked::Closely(number) => &close[*number],
            };
            if let Err(reason) = self.judge(close, head, frame_len, gate, now) {
                all_pass = false;
                *fate = self.leave_out(close, burst, i, gate, reason, now);
            }
        }
        run.finish(&mut self.states.counts);
        (self.looked, self.close) = (looked, close);
        if all_pass {
            Verdict::All(on)
        } else {
            Verdict::Each
        }
    }

    /// Reads a frame, and hashes what its flow is called.
    #[inline]
    fn look(&self, head: &[u8], frame_len: usize, close: &mut Vec<Close>) -> Looked {
        if let Some(usual) = Usual::of(head, frame_len) {
            return Looked::Usual(usual, self.states.hash(&usual.key()));
        }
        close.push(self.look_closely(head));
        Looked::Closely(close.len() - 1)
    }

    #[inline(never)]
    fn look_closely(&self, head: &[u8]) -> Close {
        let seen = look_at(head);
        let key = match &seen {
            Seen::Ip(packet) => Key::of(packet),
            _ => Key::default(),
        };
        let hash = self.states.hash(&key);
        Close { seen, key, hash }
    }

    /// Whether a usual packet belongs to a flow and is where that is; otherwise nothing has come of it yet.
    #[inline]
    fn know(
        &mut self,
        usual: &Usual,
        hash: u64,
        head: &[u8],
        frame_len: usize,
        gate: Gate,
        now: u64,
    ) -> Known {
        let Some(state) = self.states.find(&usual.key(), hash, now) else {
            return Known::No;
        };
        let began = gate == state.gate;
        if began != (usual.is_low() == state.low_began) && !usual.is_to_itself() {
            return Known::Doubtful;
        }
        if let Some(connection) = &mut state.tcp {
            let Some(segment) = Segment::of(Usual::ABOVE, usual.end, head) else {
                return Known::Doubtful;
            };
            let begins_anew = connection.is_over() && segment.begins();
            if begins_anew || !connection.take(usize::from(!began), &segment) {
                return Known::Doubtful;
            }
        } else {
            state.answered |= !began;
        }
        state.expires = now.saturating_add(self.timeouts.of(state, usual.protocol));
        let rule = state.rule;
        self.known += 1;
        self.states.counts.count(rule, frame_len);
        Known::Yes
    }

    /// Reads where the flows of a burst are in a table that no cache holds, all misses beside each other.
    #[cold]
    fn fetch(&self, looked: &[Looked], close: &[Close]) {
        let mut slots = [0; BURST_MAX];
        for (slot, looked) in slots.iter_mut().zip(looked) {
            *slot = self.states.peek(match looked {
                Looked::Usual(_, hash) => *hash,
                Looked::Closely(number) => close[*number].hash,
            });
        }
        let slots = slots[..looked.len()].iter();
        let seen = slots.fold(0, |seen, &slot| seen ^ self.states.peek_at(slot));
        std::hint::black_box(seen);
    }

    /// Pieces that have waited, and those that did so for nothing.
    #[inline]
    pub(crate) fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// What is to be sent by a gate, to be given back empty.
    pub(crate) fn take_answers(&mut self, gate: Gate) -> Option<Box<Burst>> {
        self.answers[usize::from(gate) % 2].take_if(|answers| !answers.is_empty())
    }

    pub(crate) fn give_back(&mut self, gate: Gate, mut answers: Box<Burst>, sent: usize) {
        answers.clear();
        self.answers[usize::from(gate) % 2] = Some(answers);
        self.refused += sent as u64;
    }

    /// Forgets flows, as many as the time since the last look calls for; not before so long has passed.
    #[inline]
    pub(crate) fn sweep(&mut self, now: u64, after: u64) {
        self.pieces.pass_time(now);
        let given_up = self.pieces.take_given_up();
        if given_up > 0 {
            self.outbox.lose(DropReason::Fragment, given_up);
        }
        let since = now.saturating_sub(self.swept);
        if since >= after {
            let places = self.states.places();
            let n = (places as u128 * u128::from(since)).div_ceil(SWEEP_NS.into());
            self.states.sweep(usize::try_from(n).unwrap_or(places), now);
            self.swept = now;
        }
    }

    pub(super) fn due(&self) -> Option<u64> {
        if !self.outbox.is_empty() {
            return Some(0);
        }
        let states = (self.states.len() > 0).then(|| self.swept.saturating_add(SWEEP_NS));
        states.into_iter().chain(self.pieces.due()).min()
    }
}
