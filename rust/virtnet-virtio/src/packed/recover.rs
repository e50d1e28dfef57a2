//! How far a device had got that is gone: read off the descriptor ring where the base cannot be right.
//!
//! A device that was killed could not be asked for its base, and a front-end then gives one that it knew before: QEMU that of the
//! last orderly stop, or a fresh one. A packed ring has no index that would tell. Its descriptors do, if one knows where they were
//! written from. Seen from the place where the device has to go on, and counted with the wrap counter there, a slot is
//!
//! - *ready*: available in this lap;
//! - *old*: used in the last one (or never touched, which looks the same);
//! - *stale*: available in the last one. What was used as a whole is marked at its first and its last slot only;
//! - *new*: used in this lap.
//!
//! From the right place on come ready slots, as many as there are, and then old and stale ones, an old one at the end. From any
//! other place a slot that should be old is new, or ready slots come behind stale ones, or a stale one is at the end. A full ring,
//! the usual state of a receiveq, has its place where ready slots begin to look stale. So at most one place fits.
//!
//! Two things may be half done. A driver shows the first slot of what it adds last: ready slots behind one that is not, which will
//! be ready in a moment. And a device shows the first slot of a batch last: ready slots with new ones behind. That batch is finished
//! here, so that nothing is given twice or not at all. What its first slot was to say was noted in the address of the next used
//! descriptor, or of the last slot of what takes several; see `PackedDevice::write_used_noting`. An address means nothing to a driver
//! there (Spec: virtio 1.4, 2.8.5, Element Address and Length), and one that is a lie is its own driver's loss.
//!
//! Where no place fits, or a device that does not mark last slots has left several, there is no answer: a device that guesses
//! writes into buffers that the driver has taken back.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use virtnet_mem::{Table, Word};

use super::layout::{DESC_AVAIL, DESC_NEXT, DESC_USED, DESC_WRITE, Position, word};

/// How often each slot may be looked at: a few times are enough, and a driver may have made a ring up that looks like many places.
const LOOKS: u32 = 64;

/// Where the device has to go on in a ring of `size` slots, if that can be told; a half-done batch is finished. `given` is the
/// base that the front-end gave.
pub(super) fn position(desc: &Table, size: u16, given: Position) -> Option<Position> {
    let ring = Ring::read(desc, size);
    let fitting = ring
        .fits(desc, given, false)
        .or_else(|| ring.search(desc, false))
        .or_else(|| ring.fits(desc, given, true))
        .or_else(|| ring.search(desc, true));
    // The front-end may know better than a ring that another kind of device has served.
    let may_be = given != Position::START && ring.may_be(given);
    match fitting {
        Some(fit) if fit.from == given || !may_be => {
            for (slot, rest) in fit.unshown {
                desc.store(slot.into(), Word::Second, rest, Ordering::Release);
            }
            Some(fit.go_on)
        }
        Some(_) => None,
        None => may_be.then_some(given),
    }
}

/// The second words of all descriptors, each read once.
struct Ring {
    words: Box<[u64]>,
    size: u16,
    /// How often slots have been looked at.
    looks: Cell<u32>,
}

/// What a slot is, seen from some place: see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Ready,
    Old,
    Stale,
    New,
}

/// A place that fits.
struct Fit {
    from: Position,
    /// The same, or behind the batch that was half done.
    go_on: Position,
    /// Used descriptors that the driver cannot see yet, in the order in which they are to be written: slots and second words.
    unshown: Vec<(u16, u64)>,
}

impl Ring {
    fn read(desc: &Table, size: u16) -> Self {
        let word = |slot: u16| desc.load(slot.into(), Word::Second, Ordering::Acquire);
        Self {
            words: (0..size).map(word).collect(),
            size,
            looks: Cell::new(0),
        }
    }

    /// The second word `k` slots on from a place, with the place.
    fn at(&self, from: Position, k: u16) -> (Position, u64) {
        let here = from.advance(k, self.size);
        let word = self.words.get(usize::from(here.slot)).copied();
        (here, word.unwrap_or_default())
    }

    fn slot(&self, from: Position, k: u16) -> Slot {
        self.looks.set(self.looks.get().saturating_add(1));
        let (here, word) = self.at(from, k);
        match flags(word) & (DESC_AVAIL | DESC_USED) {
            bits if bits == here.available() => Slot::Ready,
            bits if bits == here.used() => Slot::New,
            0 | 0x8080 => Slot::Old,
            _ => Slot::Stale,
        }
    }

    /// How many slots from `k` on are as `is` says.
    fn run(&self, from: Position, k: u16, is: impl Fn(Slot) -> bool) -> u16 {
        let others = (k..self.size).find(|&k| !is(self.slot(from, k)));
        others.unwrap_or(self.size) - k
    }

    /// The only place that fits. What lies before it is used, or ready in a full ring, or new where a batch is that is not shown.
    fn search(&self, desc: &Table, refilled: bool) -> Option<Fit> {
        let mut found = None;
        let slots = (0..self.size).flat_map(|slot| [(slot, false), (slot, true)]);
        for (slot, wrap) in slots {
            let from = Position { slot, wrap };
            let (before, here) = (self.slot(from, self.size - 1), self.slot(from, 0));
            let may_fit = match before {
                Slot::Old => here != Slot::New,
                Slot::Ready => matches!(here, Slot::Ready | Slot::Old),
                Slot::New => here == Slot::Ready,
                Slot::Stale => false,
            };
            if !may_fit {
                continue;
            }
            if let Some(fit) = self.fits(desc, from, refilled)
                && found.replace(fit).is_some()
            {
                return None;
            }
            if self.looks.get() / u32::from(self.size) > LOOKS {
                return None;
            }
        }
        found
    }

    /// Whether the ring looks as it has to from a place. `refilled`: the driver may be adding as many slots as there are.
    fn fits(&self, desc: &Table, from: Position, refilled: bool) -> Option<Fit> {
        let ready = self.run(from, 0, |slot| slot == Slot::Ready);
        let mut fit = Fit {
            from,
            go_on: from,
            unshown: Vec::new(),
        };
        let mut k = ready;
        if ready < self.size && self.slot(from, ready) == Slot::New {
            let batch = self.half_done(desc, from, ready, &mut fit.unshown)?;
            fit.go_on = from.advance(batch, self.size);
            k = batch + self.run(from, batch, |slot| slot == Slot::Ready);
        }
        if k == self.size {
            return Some(fit);
        }
        // The driver's part. The first slot of what it is adding is not ready yet.
        let first = self.slot(from, k);
        let added = self.run(from, k + 1, |slot| slot == Slot::Ready);
        let is_driver_s = match first {
            // A full ring looks like that too, from the place before its own, and so does a full one with a batch not shown.
            slot if k + 1 + added == self.size => {
                slot == Slot::Old && (added == 0 || k > 0 || refilled)
            }
            Slot::Old | Slot::Stale if added > 0 => self.is_given_back(from, k + 1 + added),
            Slot::Old | Slot::Stale => self.is_given_back(from, k),
            Slot::Ready | Slot::New => false,
        };
        is_driver_s.then_some(fit)
    }

    /// Whether all slots from `k` on are used ones, with stale ones only in what takes several. Of the first, the driver may have
    /// overwritten a part.
    fn is_given_back(&self, from: Position, mut k: u16) -> bool {
        let start = k;
        while k < self.size {
            let within = k + u16::from(self.slot(from, k) == Slot::Old);
            let stale = self.run(from, within, |slot| slot == Slot::Stale);
            let last = within + stale;
            let (_, mark) = self.at(from, last);
            let is_mark = last < self.size
                && self.slot(from, last) == Slot::Old
                && flags(mark) & DESC_WRITE == 0;
            let is_marked = |least: u32, most: u32| is_mark && (least..=most).contains(&len(mark));
            let slots = u32::from(last + 1 - k);
            k = match within > k {
                true if stale == 0 => k + 1,
                true if is_marked(slots, slots) && self.same_id(from, k, last) => last + 1,
                false if k == start && is_marked(slots + 1, self.size.into()) => last + 1,
                _ => return false,
            };
        }
        true
    }

    /// How many slots a batch has that begins at a place, with `ready` slots before the first that is new; the words that are
    /// missing of it.
    fn half_done(
        &self,
        desc: &Table,
        from: Position,
        ready: u16,
        unshown: &mut Vec<(u16, u64)>,
    ) -> Option<u16> {
        // What was noted at slot `k` for slot `to`, where it can be what a device writes: an address that has stayed can look like it.
        let noted = |k: u16, to: u16, id_at: u16| {
            let (here, _) = self.at(from, k);
            let word = desc.load(here.slot.into(), Word::First, Ordering::Relaxed);
            let (at, available) = self.at(from, to);
            let is_whole = match flags(word) ^ at.used() {
                0 => len(word) == 0,
                DESC_WRITE => len(word) > 0 && (k == id_at || len(word) <= len(available)),
                _ => false,
            };
            let is_its = id(word) == id(self.at(from, id_at).1);
            (is_whole && is_its).then_some((at.slot, word))
        };
        // The batch begins with what takes several slots and is marked at its last, or with one slot. Behind that there may be what
        // takes several and is marked at its last only; its own word stands there, and that of a buffer that was read is known.
        let (mut k, first) = if self.is_last_of(from, ready, ready + 1) {
            (ready + 1, noted(ready, 0, ready)?)
        } else if ready == 1 {
            (1, noted(1, 0, 0)?)
        } else if self.is_last_of(from, ready, ready) {
            let (_, next) = noted(ready, 1, ready)?;
            let id = id(self.at(from, 0).1);
            let read = flags(next) & DESC_WRITE == 0;
            (1, read.then(|| (from.slot, word(0, id, from.used())))?)
        } else {
            return None;
        };
        // All that is new belongs to it.
        let end = (ready..self.size)
            .rev()
            .find(|&k| self.slot(from, k) == Slot::New)?
            + 1;
        while k < end {
            let is_new = self.slot(from, k) == Slot::New;
            let within = k + u16::from(is_new);
            let last = within + self.run(from, within, |slot| slot == Slot::Ready);
            let slots = last + 1 - k;
            let is_whole = last < end && self.is_last_of(from, last, slots);
            match (is_new, is_whole) {
                (true, true) if self.same_id(from, k, last) => k = last + 1,
                (true, _) if !self.is_mark(from, k) => k += 1,
                (false, true) => {
                    unshown.push(noted(last, k, last)?);
                    k = last + 1;
                }
                _ => return None,
            }
        }
        unshown.push(first);
        (k == end).then_some(end)
    }

    /// Whether slot `k` is marked as the last of `slots` slots.
    fn is_last_of(&self, from: Position, k: u16, slots: u16) -> bool {
        self.is_mark(from, k) && len(self.at(from, k).1) == u32::from(slots)
    }

    /// Whether slot `k` says that several slots are used.
    fn is_mark(&self, from: Position, k: u16) -> bool {
        let (here, word) = self.at(from, k);
        flags(word) == here.used() && len(word) > 1
    }

    fn same_id(&self, from: Position, a: u16, b: u16) -> bool {
        id(self.at(from, a).1) == id(self.at(from, b).1)
    }

    /// Whether a place is not contradicted by a ring whose last device did not mark last slots: ready slots, then used ones and
    /// what is left of the lists behind them.
    fn may_be(&self, from: Position) -> bool {
        let mut k = self.run(from, 0, |slot| slot == Slot::Ready);
        let mut has_old = k == self.size;
        while k < self.size {
            let (_, word) = self.at(from, k);
            let goes_on = flags(word) & DESC_NEXT != 0;
            match self.slot(from, k) {
                Slot::Old => has_old = true,
                Slot::Stale if !goes_on => {
                    if k + 1 < self.size && self.slot(from, k + 1) != Slot::Old {
                        return false;
                    }
                }
                Slot::Stale => {}
                Slot::Ready | Slot::New => return false,
            }
            k += 1;
        }
        has_old
    }
}

#[expect(clippy::cast_possible_truncation, reason = "takes the word apart")]
fn len(word: u64) -> u32 {
    word as u32
}

#[expect(clippy::cast_possible_truncation, reason = "takes the word apart")]
fn id(word: u64) -> u16 {
    (word >> 32) as u16
}

fn flags(word: u64) -> u16 {
    (word >> 48) as u16
}
