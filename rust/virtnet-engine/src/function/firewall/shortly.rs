//! Packets that are judged by rules alone: most firewalls without state see no others.

use virtnet_packet::{Burst, DropReason, Picks};

use super::Firewall;
use super::counts::Counts;
use super::packet::TCP;
use super::rules::RuleSet;
use super::states::Usual;
use super::table::{Does, Found, List};
use super::tcp::Segment;
use crate::function::{Fate, Fates, Verdict};
use crate::graph::Gate;

/// Packets one behind the other that match the same rule, which are counted together.
#[derive(Default)]
pub(super) struct Run {
    rule: u32,
    packets: u64,
    bytes: u64,
    /// The last packet that was compared with rules, and what was found.
    last: Option<(Usual, Found)>,
}

impl Run {
    #[inline]
    fn count(&mut self, rule: u32, bytes: usize, counts: &mut Counts) {
        if self.rule != rule {
            self.finish(counts);
            (self.rule, self.packets, self.bytes) = (rule, 0, 0);
        }
        self.packets += 1;
        self.bytes += bytes as u64;
    }

    /// Compares a packet with rules, unless the last that was compared went the same way.
    #[inline(never)]
    fn compare(
        &mut self,
        rules: &RuleSet,
        list: &List<1>,
        usual: &Usual,
        gate: Gate,
        head: &[u8],
        frame_len: usize,
    ) -> Found {
        if let Some((last, found)) = self.last
            && list.is_by_ends()
            && last.goes_like(usual)
        {
            return found;
        }
        let found = rules.find(list, usual, gate, head, frame_len);
        self.last = Some((*usual, found));
        found
    }

    /// Counts them.
    #[inline]
    pub(super) fn finish(&self, counts: &mut Counts) {
        if self.packets > 0 {
            let place = counts.place(self.rule as usize);
            counts.count_all(place, self.packets, self.bytes);
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
        let mut run = Run::default();
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
        run.finish(&mut self.states.counts);
        if all_pass {
            Verdict::All(on)
        } else {
            Verdict::Each
        }
    }

    /// Judges a usual packet that belongs to no flow by the rules alone, if that is all it takes.
    #[inline(always)]
    pub(super) fn judge_shortly(
        &mut self,
        usual: &Usual,
        run: &mut Run,
        head: &[u8],
        frame_len: usize,
        gate: Gate,
    ) -> Shortly {
        if usual.protocol == TCP && !Segment::makes_sense(Usual::ABOVE, usual.end, head) {
            return Shortly::IsDropped(DropReason::Malformed);
        }
        let list = self.rules.list_for(usual, gate);
        let found = match list.for_all() {
            Some(found) => found,
            None => run.compare(&self.rules, list, usual, gate, head, frame_len),
        };
        let verdict = match found.does {
            Does::Pass => Shortly::Passes,
            Does::Drop => Shortly::IsDropped(DropReason::Filtered),
            Does::More => return Shortly::AskedMore,
        };
        run.count(found.rule, frame_len, &mut self.states.counts);
        verdict
    }
}
