//! Packets that are judged by rules alone: most firewalls without state see no others.

use virtnet_packet::{Burst, DropReason, Picks};

use super::counts::NOBODY;
use super::packet::TCP;
use super::states::Usual;
use super::tcp::Segment;
use super::{Action, Firewall};
use crate::function::{Fate, Fates, Verdict};
use crate::graph::Gate;

/// Packets that go the same way, one behind the other, and what rules say of them.
pub(super) struct Run {
    usual: Usual,
    /// Where they are counted.
    place: u32,
    passes: bool,
    packets: u64,
    bytes: u64,
}

impl Run {
    #[inline]
    fn verdict(&self) -> Shortly {
        match self.passes {
            true => Shortly::Passes,
            false => Shortly::IsDropped(DropReason::Filtered),
        }
    }
}

/// What becomes of a packet that is judged by rules alone.
pub(super) enum Shortly {
    Passes,
    IsDropped(DropReason),
    /// It begins a flow, or somebody is to be told.
    AskedMore,
}

impl Firewall {
    /// Judges packets by rules alone: there are no flows, and none begins.
    pub(super) fn classify_by_rules(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        gate: Gate,
        now: u64,
        fates: &mut Fates,
    ) -> Verdict {
        let on = Fate::To(gate ^ 1);
        let mut all_pass = true;
        let mut run = None;
        for (fate, i) in fates.iter_mut().zip(picks.iter()) {
            *fate = on;
            let (head, frame_len) = (burst.head(i), burst.frame_len(i));
            let verdict = match Usual::of(head, frame_len) {
                Some(usual) => self.judge_shortly(&usual, &mut run, head, frame_len, gate),
                None => Shortly::AskedMore,
            };
            match verdict {
                Shortly::Passes => continue,
                Shortly::IsDropped(reason) => *fate = Fate::Drop(reason),
                Shortly::AskedMore => {
                    let close = self.look_closely(head);
                    match self.judge(&close, head, frame_len, gate, now) {
                        Ok(()) => continue,
                        Err(reason) => {
                            *fate = self.leave_out(&close, burst, i, gate, reason, now);
                        }
                    }
                }
            }
            all_pass = false;
        }
        self.finish(run);
        if all_pass {
            Verdict::All(on)
        } else {
            Verdict::Each
        }
    }

    /// Judges a usual packet that belongs to no flow by the rules alone, if that is all it takes. Of packets that follow each other the
    /// same way the first is judged: they are a run.
    #[inline]
    pub(super) fn judge_shortly(
        &mut self,
        usual: &Usual,
        run: &mut Option<Run>,
        head: &[u8],
        frame_len: usize,
        gate: Gate,
    ) -> Shortly {
        if usual.protocol == TCP && Segment::of(Usual::ABOVE, usual.end, head).is_none() {
            return Shortly::IsDropped(DropReason::Malformed);
        }
        if let Some(run) = run.as_mut().filter(|run| run.usual.goes_like(usual)) {
            run.packets += 1;
            run.bytes += frame_len as u64;
            return run.verdict();
        }
        let (place, action) = match self.rules.first_for(usual, gate, head, frame_len) {
            Some(at) => {
                let rule = &self.rules.rules[at];
                if rule.keep_state && rule.action == Action::Pass {
                    return Shortly::AskedMore;
                }
                (self.states.counts.place(at), rule.action)
            }
            None => (NOBODY, self.rules.otherwise),
        };
        if action == Action::Reject {
            return Shortly::AskedMore;
        }
        let begun = Run {
            usual: *usual,
            place,
            passes: action == Action::Pass,
            packets: 1,
            bytes: frame_len as u64,
        };
        let verdict = begun.verdict();
        let ended = match self.rules.is_by_ends(usual.protocol, gate) {
            true => run.replace(begun),
            false => Some(begun),
        };
        self.finish(ended);
        verdict
    }

    /// Counts a run.
    #[inline]
    pub(super) fn finish(&mut self, run: Option<Run>) {
        if let Some(run) = run {
            self.states
                .counts
                .count_all(run.place, run.packets, run.bytes);
        }
    }
}
