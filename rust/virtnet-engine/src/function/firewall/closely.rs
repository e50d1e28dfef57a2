//! Packets that are looked at closely: those that are not usual ones, that begin a flow, or do not fit where theirs is.

use std::sync::Arc;

use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload};

use super::answers;
use super::counts::NOBODY;
use super::packet::{self, Echo, Packet, Piece, Seen, TCP, complaint, echo};
use super::rules::Action;
use super::states::{Key, State};
use super::tcp::{Connection, Segment};
use super::{Close, Firewall};
use crate::function::Fate;
use crate::function::fragments::Early;
use crate::graph::Gate;

/// What a packet is to a flow.
enum Place {
    /// It belongs to it.
    In,
    /// It does not fit where it is.
    Out,
    /// It is not about it: another may begin.
    Beside,
}

impl Firewall {
    /// Judges a packet by its datagram, its flow, or the rules: why it is dropped, if it is.
    pub(super) fn judge(
        &mut self,
        looked: &Close,
        head: &[u8],
        frame_len: usize,
        gate: Gate,
        now: u64,
    ) -> Result<(), DropReason> {
        let packet = match &looked.seen {
            Seen::Malformed => return Err(DropReason::Malformed),
            Seen::Other(_) => {
                return self.judge_by_rules(looked, None, head, frame_len, gate, now);
            }
            // It says that it is longer than it is.
            Seen::Ip(packet) if packet.end > frame_len => return Err(DropReason::Malformed),
            Seen::Ip(packet) => packet,
        };
        if packet.piece != Piece::Whole {
            if !self.rules.fragments {
                return Err(DropReason::Fragment);
            }
            if packet.piece == Piece::Later {
                let passed = self.pieces.find(&datagram(packet, gate), now);
                return passed.ok_or(DropReason::Fragment);
            }
        }
        self.judge_ip(looked, packet, head, frame_len, gate, now)?;
        if packet.piece == Piece::First {
            self.pieces.tell(datagram(packet, gate), (), now);
        }
        Ok(())
    }

    /// What does not pass is dropped, or is a piece that waits for the first of its datagram.
    #[cold]
    pub(super) fn leave_out(
        &mut self,
        looked: &Close,
        burst: &Burst,
        i: usize,
        gate: Gate,
        reason: DropReason,
        now: u64,
    ) -> Fate {
        match &looked.seen {
            Seen::Ip(packet) if reason == DropReason::Fragment && self.rules.fragments => {
                let piece = Early::of(burst, i, gate);
                self.pieces.keep(datagram(packet, gate), piece, now);
                Fate::Consumed
            }
            _ => Fate::Drop(reason),
        }
    }

    fn judge_ip(
        &mut self,
        looked: &Close,
        packet: &Packet,
        head: &[u8],
        frame_len: usize,
        gate: Gate,
        now: u64,
    ) -> Result<(), DropReason> {
        let segment = match packet.protocol {
            TCP => Some(Segment::of(packet.above, packet.end, head).ok_or(DropReason::Malformed)?),
            _ => None,
        };
        if let Some(about) = complaint(packet, head) {
            if self.is_about_a_flow(packet, &about, gate, now) {
                self.known += 1;
                return Ok(());
            }
        } else {
            let timeouts = self.timeouts;
            if let Some(state) = self.states.find(&looked.key, looked.hash, now) {
                match place(state, packet, segment.as_ref(), head, gate) {
                    Place::In => {
                        state.expires = now.saturating_add(timeouts.of(state, packet.protocol));
                        let rule = state.rule;
                        self.known += 1;
                        self.states.counts.count(rule, frame_len);
                        return Ok(());
                    }
                    Place::Out => return Err(DropReason::BadState),
                    Place::Beside => {}
                }
            }
        }
        let packet = Some((packet, segment));
        self.judge_by_rules(looked, packet, head, frame_len, gate, now)
    }

    /// Whether an ICMP error tells somebody of a flow about a packet of his.
    fn is_about_a_flow(&mut self, error: &Packet, about: &Packet, gate: Gate, now: u64) -> bool {
        let key = Key::of(about);
        let hash = self.states.hash(&key);
        let Some(state) = self.states.find(&key, hash, now) else {
            return false;
        };
        let began = about.is_low() == state.low_began;
        // It goes the other way than what it is about, and to whoever sent that.
        error.to.address == about.from.address && began == (gate != state.gate)
    }

    fn judge_by_rules(
        &mut self,
        looked: &Close,
        packet: Option<(&Packet, Option<Segment>)>,
        head: &[u8],
        frame_len: usize,
        gate: Gate,
        now: u64,
    ) -> Result<(), DropReason> {
        let rules = Arc::clone(&self.rules);
        let (rule, action, keeps) = match rules.first(&looked.seen, gate, head, frame_len) {
            Some((at, rule)) => (self.states.counts.place(at), rule.action, rule.keep_state),
            None => (NOBODY, rules.otherwise, false),
        };
        self.states.counts.count(rule, frame_len);
        match (action, packet) {
            (Action::Pass, Some((packet, segment))) if keeps => {
                let begun = State {
                    key: looked.key,
                    expires: 0,
                    rule,
                    gate,
                    low_began: packet.is_low(),
                    answered: false,
                    tcp: segment.as_ref().map(Connection::new),
                };
                self.begin(packet, begun, segment.as_ref(), looked.hash, head, now)
            }
            (Action::Pass, _) => Ok(()),
            (Action::Reject, Some((packet, _))) => {
                self.refuse(packet, head, gate);
                Err(DropReason::Filtered)
            }
            _ => Err(DropReason::Filtered),
        }
    }

    /// Remembers the flow that begins with a packet.
    fn begin(
        &mut self,
        packet: &Packet,
        mut state: State,
        segment: Option<&Segment>,
        hash: u64,
        head: &[u8],
        now: u64,
    ) -> Result<(), DropReason> {
        let is_icmp = matches!(packet.protocol, packet::ICMP | packet::ICMP6);
        if is_icmp {
            let kind = head.get(packet.above).and_then(|&kind| echo(packet, kind));
            match kind {
                Some(Echo::Request) => {}
                // An answer to nothing.
                Some(Echo::Reply) => return Err(DropReason::BadState),
                // Others begin nothing, and pass by themselves.
                None => return Ok(()),
            }
        }
        if segment.is_some_and(|segment| !segment.begins()) {
            return Err(DropReason::BadState);
        }
        state.expires = now.saturating_add(self.timeouts.of(&state, packet.protocol));
        let has_room = self.states.insert(state, hash, now);
        has_room.then_some(()).ok_or(DropReason::StatesFull)
    }

    fn refuse(&mut self, packet: &Packet, head: &[u8], gate: Gate) {
        let answers = self.answers[usize::from(gate) % 2].get_or_insert_default();
        // As many as fit into a burst: who sends more than that need not hear of each.
        if answers.len() < BURST_MAX
            && let Some(frame) = answers::refusal(packet, head)
        {
            answers.push_bytes(&frame, Offload::default());
        }
    }
}

/// What pieces of one datagram have in common.
pub(super) type Datagram = (u128, u128, u32, u8, u16, Gate);

fn datagram(packet: &Packet, gate: Gate) -> Datagram {
    let (from, to) = (packet.from.address, packet.to.address);
    let (id, protocol, vlan) = (packet.identification, packet.protocol, packet.vlan);
    (from, to, id, protocol, vlan, gate)
}

/// What a packet is to the flow that has its ends.
fn place(
    state: &mut State,
    packet: &Packet,
    segment: Option<&Segment>,
    head: &[u8],
    gate: Gate,
) -> Place {
    let began = gate == state.gate;
    if began != (packet.is_low() == state.low_began) && packet.from != packet.to {
        return Place::Out;
    }
    if let (Some(connection), Some(segment)) = (&mut state.tcp, segment) {
        if connection.is_over() && segment.begins() {
            return Place::Beside;
        }
        return match connection.take(usize::from(!began), segment) {
            true => Place::In,
            false => Place::Out,
        };
    }
    let kind = head.get(packet.above).and_then(|&kind| echo(packet, kind));
    match kind {
        Some(Echo::Request) if !began => return Place::Beside,
        Some(Echo::Reply) if began => return Place::Out,
        _ => {}
    }
    state.answered |= !began;
    Place::In
}
