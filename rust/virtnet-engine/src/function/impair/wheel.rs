//! A timing wheel: what is due when, for any number of packets at the same small cost for each.
//!
//! Time is cut into ticks. A packet lies in the slot of its tick, or in a coarser slot that is spread over finer ones when its
//! time begins, so each is moved a few times at most. Those of the tick that has begun lie in a heap by their exact time.
//!
//! A packet that is due behind the one that came in before it, which is each where delays do not vary, waits in a queue beside the
//! wheel instead.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// A tick is 2^13 ns, some 8 µs: how many packets share one is what the heap is about.
const TICK_BITS: u32 = 13;
const SLOT_BITS: u32 = 9;
const SLOTS: usize = 1 << SLOT_BITS;
/// So many levels reach over all of a `u64`.
const LEVELS: usize = 6;
const NONE: u32 = u32::MAX;

/// Packets by the time at which they are due, under keys of the caller's: small numbers, each at most once.
#[derive(Debug)]
pub(super) struct Wheel {
    /// The tick that has begun.
    tick: u64,
    levels: Box<[Level; LEVELS]>,
    begun: BinaryHeap<Reverse<(u64, u64, u32)>>,
    /// What is known of each key in the wheel.
    waits: Vec<Wait>,
    /// How many are in it.
    len: usize,
    /// Those that came in order: when they are due, their order, their keys.
    queue: VecDeque<(u64, u64, u32)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Wait {
    due: u64,
    order: u64,
    next: u32,
}

#[derive(Clone, Debug)]
struct Level {
    /// The first key of the chain in each slot.
    first: [u32; SLOTS],
    /// Which slots have one.
    taken: [u64; SLOTS / 64],
}

impl Level {
    /// The first slot behind `index` that is taken.
    fn after(&self, index: usize) -> Option<usize> {
        let from = index + 1;
        let words = self.taken.iter().enumerate().skip(from / 64);
        words
            .map(|(at, &word)| {
                let skipped = if at == from / 64 { from % 64 } else { 0 };
                (at, word & (u64::MAX << skipped))
            })
            .find(|&(_, word)| word != 0)
            .map(|(at, word)| at * 64 + word.trailing_zeros() as usize)
    }
}

impl Default for Wheel {
    fn default() -> Self {
        let level = || Level {
            first: [NONE; SLOTS],
            taken: [0; SLOTS / 64],
        };
        Self {
            tick: 0,
            levels: Box::new(std::array::from_fn(|_| level())),
            begun: BinaryHeap::new(),
            waits: Vec::new(),
            len: 0,
            queue: VecDeque::new(),
        }
    }
}

impl Wheel {
    /// How many packets wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.len + self.queue.len()
    }

    /// Puts `key` in. Of several that are due at once the one with the least `order` comes first.
    #[inline]
    pub(super) fn insert(&mut self, key: u32, due: u64, order: u64) {
        let last = self.queue.back();
        if last.is_none_or(|&(last, before, _)| (last, before) <= (due, order)) {
            self.queue.push_back((due, order, key));
        } else {
            self.insert_between(key, due, order);
        }
    }

    fn insert_between(&mut self, key: u32, due: u64, order: u64) {
        let at = key as usize;
        if self.waits.len() <= at {
            self.waits.resize(at + 1, Wait::default());
        }
        self.waits[at] = Wait {
            due,
            order,
            next: NONE,
        };
        self.len += 1;
        self.place(key);
    }

    fn place(&mut self, key: u32) {
        let Wait { due, order, .. } = self.waits[key as usize];
        let tick = due >> TICK_BITS;
        if tick <= self.tick {
            self.begun.push(Reverse((due, order, key)));
            return;
        }
        // Slots of one level are those that have all coarser digits of the time in common.
        let level = (63 - (tick ^ self.tick).leading_zeros()) / SLOT_BITS;
        let slot = index(tick, level);
        let level = &mut self.levels[level as usize];
        self.waits[key as usize].next = std::mem::replace(&mut level.first[slot], key);
        level.taken[slot / 64] |= 1 << (slot % 64);
    }

    /// The first slot that is taken: its level, its number, and the tick with which it begins.
    fn first_slot(&self) -> Option<(u32, usize, u64)> {
        (0..).zip(self.levels.iter()).find_map(|(number, level)| {
            let slot = level.after(index(self.tick, number))?;
            let shift = number * SLOT_BITS;
            let coarser = self.tick >> shift >> SLOT_BITS << SLOT_BITS;
            Some((number, slot, (coarser | slot as u64) << shift))
        })
    }

    /// The next packet that is due by `now`, with the time at which it was. Time must not go back.
    #[inline]
    pub(super) fn pop(&mut self, now: u64) -> Option<(u32, u64)> {
        if self.len > 0 {
            return self.pop_first(now);
        }
        self.tick = self.tick.max(now >> TICK_BITS);
        self.pop_queue(now)
    }

    #[inline]
    fn pop_queue(&mut self, now: u64) -> Option<(u32, u64)> {
        let &(due, _, key) = self.queue.front()?;
        if due > now {
            return None;
        }
        self.queue.pop_front();
        Some((key, due))
    }

    /// The first of what is in the wheel and what is in the queue.
    fn pop_first(&mut self, now: u64) -> Option<(u32, u64)> {
        self.advance(now >> TICK_BITS);
        let queued = self.queue.front().map(|&(due, order, _)| (due, order));
        let begun = self.begun.peek().map(|Reverse(first)| *first);
        let Some((due, _, key)) =
            begun.filter(|&(due, order, _)| queued.is_none_or(|queued| (due, order) < queued))
        else {
            return self.pop_queue(now);
        };
        if due > now {
            return None;
        }
        self.begun.pop();
        self.len -= 1;
        Some((key, due))
    }

    fn advance(&mut self, to: u64) {
        while self.tick < to {
            let Some((number, slot, begins)) = self.first_slot().filter(|&(.., at)| at <= to)
            else {
                self.tick = to;
                return;
            };
            self.tick = begins;
            let level = &mut self.levels[number as usize];
            let mut key = std::mem::replace(&mut level.first[slot], NONE);
            level.taken[slot / 64] &= !(1 << (slot % 64));
            while key != NONE {
                let next = self.waits[key as usize].next;
                self.place(key);
                key = next;
            }
        }
    }

    /// When something is due next, or a moment before that.
    #[inline]
    pub(super) fn next(&self) -> Option<u64> {
        let queued = self.queue.front().map(|&(due, ..)| due);
        if self.len == 0 {
            return queued;
        }
        let begun = self.begun.peek().map(|Reverse((due, ..))| *due);
        let in_wheel = begun.or_else(|| self.first_slot().map(|(.., begins)| begins << TICK_BITS));
        queued.into_iter().chain(in_wheel).min()
    }

    /// Takes all out.
    pub(super) fn clear(&mut self) {
        let (tick, waits) = (self.tick, std::mem::take(&mut self.waits));
        *self = Self {
            tick,
            waits,
            ..Self::default()
        };
    }
}

fn index(tick: u64, level: u32) -> usize {
    usize::try_from(tick >> (level * SLOT_BITS)).unwrap_or_default() % SLOTS
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::function::random::Random;

    #[test]
    fn packets_leave_when_they_are_due_and_in_order() {
        let mut wheel = Wheel::default();
        let start = 5_000_000_000_000;
        assert_eq!(wheel.pop(start), None);
        let dues = [
            0,
            1,
            1,
            8_191,
            8_192,
            4_194_304,
            10_000_000_000,
            3_600_000_000_000,
        ];
        for (key, due) in (0..).zip(dues) {
            wheel.insert(key, start + due, u64::from(key));
        }
        for (key, due) in (0..).zip(dues) {
            assert_eq!(wheel.len(), dues.len() - key as usize);
            if due > 0 {
                assert_eq!(wheel.pop(start + due - 1), None, "before {due}");
            }
            assert!(wheel.next().unwrap() <= start + due);
            assert_eq!(wheel.pop(start + due), Some((key, start + due)));
        }
        assert_eq!((wheel.len(), wheel.next()), (0, None));
    }

    /// Against a sorted set, over times from nanoseconds to months.
    #[test]
    fn it_agrees_with_a_sorted_set() {
        for seed in 0..20 {
            let mut random = Random::new(seed, 0);
            let (mut wheel, mut sorted) = (Wheel::default(), BTreeSet::new());
            let mut free: Vec<u32> = (0..500).collect();
            let mut now = random.next() >> (10 + random.below(50));
            for order in 0..20_000 {
                let far = random.next() >> (14 + random.below(50));
                if let Some(key) = free.pop() {
                    wheel.insert(key, now + far, order);
                    sorted.insert((now + far, order, key));
                }
                now += random.next() >> (20 + random.below(44));
                while let Some(&(due, order, key)) = sorted.first()
                    && due <= now
                {
                    assert_eq!(wheel.pop(now), Some((key, due)), "seed {seed}");
                    sorted.remove(&(due, order, key));
                    free.push(key);
                }
                assert_eq!(wheel.pop(now), None);
                assert_eq!(wheel.len(), sorted.len());
                // Who sleeps until then misses nothing, and does not wake at once.
                let first = sorted.first().map(|&(due, ..)| due);
                assert!(wheel.next() <= first && wheel.next().is_some() == first.is_some());
                assert!(wheel.next().is_none_or(|next| next > now));
            }
        }
    }
}
