//! Limits of a switch: packets of a kind in a second, and stations that turn up behind one cable and another in turn.

use super::rules::{CableRules, StormLimits};
use crate::graph::Gate;

/// A rate that came too late may be caught up with for so long, in ns.
const SLACK_NS: u64 = 100_000_000;
const SECOND: u64 = 1_000_000_000;

/// A rate limit: when the next packet is due. (The generic cell rate algorithm; ITU-T I.371, annex A.)
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    next: u64,
}

impl Bucket {
    #[inline]
    fn take(&mut self, per_second: u32, now: u64) -> bool {
        let next = self.next.max(now);
        if per_second == 0 || next - now > SLACK_NS {
            return false;
        }
        self.next = next + SECOND / u64::from(per_second);
        true
    }
}

/// What a packet is sent to, if not to a station that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Many {
    Broadcast,
    Multicast,
    Unknown,
}

/// How a cable stands with its limits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Storm {
    buckets: [Bucket; 3],
}

impl Storm {
    /// Whether one packet more may pass.
    #[inline]
    pub(super) fn takes(&mut self, cable: &CableRules, many: Many, now: u64) -> bool {
        let StormLimits {
            broadcast,
            multicast,
            unknown,
        } = cable.limits;
        let (limit, bucket) = match many {
            Many::Broadcast => (broadcast, &mut self.buckets[0]),
            Many::Multicast => (multicast, &mut self.buckets[1]),
            Many::Unknown => (unknown, &mut self.buckets[2]),
        };
        limit.is_none_or(|limit| bucket.take(limit, now))
    }
}

/// Stations that were seen to move lately, at most.
const MOVERS: usize = 256;

/// How long a station that flaps stays where it is known.
const HOLD_NS: u64 = 10 * SECOND;

/// A station that has moved: its VLAN and address, how often since when, and how long it is held.
#[derive(Clone, Copy, Debug, Default)]
struct Mover {
    key: u64,
    since: u64,
    moves: u32,
    until: u64,
}

/// A station that was heard of behind several cables in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flap {
    /// Its VLAN; 0 in a switch without.
    pub vlan: u16,
    /// Its address.
    pub mac: [u8; 6],
    /// Where it was heard of last.
    pub gate: Gate,
}

/// Watches over stations that move.
#[derive(Debug, Default)]
pub(super) struct Guard {
    movers: Vec<Mover>,
    /// How often a station began to be held.
    pub(super) flaps: u64,
    pub(super) last: Option<Flap>,
}

impl Guard {
    /// Whether a station has to stay where it is known.
    #[inline]
    pub(super) fn holds(&self, key: u64, now: u64) -> bool {
        !self.movers.is_empty() && {
            let mover = self.movers[place(key)];
            mover.key == key && now < mover.until
        }
    }

    /// A station has moved to `gate`; more than `limit` times in a second is flapping.
    #[cold]
    pub(super) fn moved(&mut self, key: u64, gate: Gate, limit: u32, now: u64) {
        if limit == 0 {
            return;
        }
        if self.movers.is_empty() {
            self.movers = vec![Mover::default(); MOVERS];
        }
        let mover = &mut self.movers[place(key)];
        if mover.key != key || now.saturating_sub(mover.since) >= SECOND {
            *mover = Mover {
                key,
                since: now,
                ..Mover::default()
            };
        }
        mover.moves += 1;
        if mover.moves > limit {
            mover.until = now + HOLD_NS;
            self.flaps += 1;
            let [a, b, c, d, e, f, vlan @ ..] = key.to_le_bytes();
            self.last = Some(Flap {
                vlan: u16::from_le_bytes(vlan),
                mac: [a, b, c, d, e, f],
                gate,
            });
        }
    }
}

fn place(key: u64) -> usize {
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    usize::try_from(mixed).unwrap_or_default() % MOVERS
}
