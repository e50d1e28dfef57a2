//! Fragments of packets, of which only the first has ports: later ones go where it went, and wait for it if they come before it.
//!
//! Where firsts went and what waits is in tables of a fixed size: each packet has few places by its name, where it takes that of
//! whoever is due to be forgotten first. They are two tables, so that fragments without a first, which cost nobody anything to
//! send, take nothing from packets whose first has come. What waited for nothing is a counted drop.
//!
//! Spec: RFC 4787, REQ-14; RFC 6146, 3.4 and 4 (FRAGMENT_MIN).

use std::hash::{BuildHasher, Hash};

use virtnet_packet::{Burst, Offload};

use crate::graph::Gate;

/// Places that a packet can have.
const WAYS: usize = 4;
/// Packets whose first fragment has come.
const FIRSTS: usize = 2_048;
/// Packets of which only later fragments have come.
const EARLY: usize = 512;
/// Their fragments, each packet's and together in bytes.
const EARLY_FRAGMENTS: usize = 128;
const EARLY_BYTES: usize = 4 << 20;

const SECOND: u64 = 1_000_000_000;
/// How long later fragments may take behind the first. Spec: RFC 791, 3.2.
const LATER_NS: u64 = 15 * SECOND;
/// How long the first may take behind later ones. Spec: RFC 6146, 4.
const FIRST_NS: u64 = 2 * SECOND;
/// What has waited for too long is looked for this often.
const LOOK_NS: u64 = SECOND / 4;

/// A fragment that waits for its first.
#[derive(Debug)]
pub(super) struct Early {
    pub(super) frame: Vec<u8>,
    pub(super) offload: Offload,
    /// The gate that it has come in by.
    pub(super) gate: Gate,
}

impl Early {
    pub(super) fn of(burst: &Burst, i: usize, gate: Gate) -> Self {
        let mut frame = vec![0; burst.frame_len(i)];
        burst.copy_frame(i, &mut frame);
        Self {
            frame,
            offload: burst.offload(i),
            gate,
        }
    }
}

/// Packets in fragments by their names `K`, and what is known of them: `V` of those whose first has come.
#[derive(Debug)]
pub(super) struct Fragments<K, V> {
    firsts: Places<K, V>,
    early: Places<K, Vec<Early>>,
    early_bytes: usize,
    /// Where room is made next.
    hand: usize,
    /// When what waits is looked through next, if anything does.
    look_at: Option<u64>,
    released: Vec<Early>,
    given_up: usize,
}

impl<K, V> Default for Fragments<K, V> {
    fn default() -> Self {
        Self {
            firsts: Places::new(FIRSTS),
            early: Places::new(EARLY),
            early_bytes: 0,
            hand: 0,
            look_at: None,
            released: Vec::new(),
            given_up: 0,
        }
    }
}

impl<K: Copy + Eq + Hash, V: Copy> Fragments<K, V> {
    /// What the first fragment of a packet has told.
    pub(super) fn find(&self, name: &K, now: u64) -> Option<V> {
        self.firsts.find(name, now).copied()
    }

    /// The first fragment of a packet has come: those that have waited for it are released.
    pub(super) fn tell(&mut self, name: K, what: V, now: u64) {
        if self.early_bytes > 0
            && let Some(waiting) = self.early.take(&name)
        {
            self.early_bytes -= bytes(&waiting);
            self.released.extend(waiting);
        }
        self.firsts.put(name, what, now + LATER_NS);
    }

    /// Keeps a fragment until the first of its packet comes.
    pub(super) fn keep(&mut self, name: K, fragment: Early, now: u64) {
        self.make_room(fragment.frame.len());
        let bytes = fragment.frame.len();
        match self.early.find_mut(&name, now) {
            Some(waiting) if waiting.len() >= EARLY_FRAGMENTS => {
                self.given_up += 1;
                return;
            }
            Some(waiting) => waiting.push(fragment),
            None => {
                let displaced = self.early.put(name, vec![fragment], now + FIRST_NS);
                self.give_up(displaced);
            }
        }
        self.early_bytes += bytes;
        self.look_at.get_or_insert(now + LOOK_NS);
    }

    fn make_room(&mut self, bytes: usize) {
        while self.early_bytes + bytes > EARLY_BYTES {
            let waiting = self.early.take_at(self.hand);
            self.give_up(waiting);
            self.hand = (self.hand + 1) % EARLY;
        }
    }

    fn give_up(&mut self, waiting: Option<Vec<Early>>) {
        if let Some(waiting) = waiting {
            self.early_bytes -= bytes(&waiting);
            self.given_up += waiting.len();
        }
    }

    /// Gives up what has waited for too long.
    pub(super) fn pass_time(&mut self, now: u64) {
        if self.look_at.is_none_or(|at| now < at) {
            return;
        }
        for at in 0..EARLY {
            if self.early.until(at).is_some_and(|until| until <= now) {
                let waiting = self.early.take_at(at);
                self.give_up(waiting);
            }
        }
        self.look_at = (self.early_bytes > 0).then_some(now + LOOK_NS);
    }

    /// When time has to pass.
    pub(super) fn due(&self) -> Option<u64> {
        self.look_at
    }

    /// Whether there are fragments whose first has come.
    #[inline]
    pub(super) fn has_released(&self) -> bool {
        !self.released.is_empty()
    }

    /// Fragments whose first has come, as they have come.
    pub(super) fn take_released(&mut self) -> Vec<Early> {
        std::mem::take(&mut self.released)
    }

    /// How many were given up since this was asked last.
    pub(super) fn take_given_up(&mut self) -> usize {
        std::mem::take(&mut self.given_up)
    }
}

fn bytes(waiting: &[Early]) -> usize {
    waiting.iter().map(|one| one.frame.len()).sum()
}

#[derive(Debug)]
struct Entry<K, T> {
    name: K,
    until: u64,
    value: T,
}

/// A table of a fixed size, empty until something is put there.
#[derive(Debug)]
struct Places<K, T> {
    hash: foldhash::fast::RandomState,
    n: usize,
    all: Vec<Option<Entry<K, T>>>,
}

impl<K, T> Places<K, T> {
    fn new(n: usize) -> Self {
        Self {
            hash: foldhash::fast::RandomState::default(),
            n,
            all: Vec::new(),
        }
    }

    fn take_at(&mut self, at: usize) -> Option<T> {
        Some(self.all.get_mut(at)?.take()?.value)
    }

    fn until(&self, at: usize) -> Option<u64> {
        Some(self.all.get(at)?.as_ref()?.until)
    }
}

impl<K: Eq + Hash, T> Places<K, T> {
    /// Where the places of a name begin.
    fn of(&self, name: &K) -> usize {
        let sets = (self.n / WAYS) as u64;
        usize::try_from(self.hash.hash_one(name) % sets).unwrap_or_default() * WAYS
    }

    /// Where it is, whether or not its time is over.
    fn at(&self, name: &K) -> Option<usize> {
        let first = self.of(name);
        let places = self.all.get(first..first + WAYS)?;
        let is_it = |place: &Option<Entry<K, T>>| place.as_ref().is_some_and(|it| it.name == *name);
        places.iter().position(is_it).map(|way| first + way)
    }

    fn find(&self, name: &K, now: u64) -> Option<&T> {
        let it = self.all[self.at(name)?].as_ref()?;
        (now < it.until).then_some(&it.value)
    }

    fn find_mut(&mut self, name: &K, now: u64) -> Option<&mut T> {
        let at = self.at(name)?;
        let it = self.all[at].as_mut()?;
        (now < it.until).then_some(&mut it.value)
    }

    fn take(&mut self, name: &K) -> Option<T> {
        self.take_at(self.at(name)?)
    }

    /// Puts it where it was, where there is room, or where what is there is the first to be forgotten; gives back what was there.
    fn put(&mut self, name: K, value: T, until: u64) -> Option<T> {
        if self.all.is_empty() {
            self.all.resize_with(self.n, || None);
        }
        let at = self.at(&name).unwrap_or_else(|| {
            let first = self.of(&name);
            let ends = |&at: &usize| self.until(at).unwrap_or_default();
            (first..first + WAYS).min_by_key(ends).unwrap_or(first)
        });
        let was = self.all[at].replace(Entry { name, until, value });
        was.map(|it| it.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn early(len: usize) -> Early {
        Early {
            frame: vec![0; len],
            offload: Offload::default(),
            gate: 0,
        }
    }

    fn waiting(all: &Fragments<u32, u8>) -> (usize, usize) {
        let places = all.early.all.iter().flatten();
        let frames = places.flat_map(|it| &it.value);
        (
            frames.clone().count(),
            frames.map(|it| it.frame.len()).sum(),
        )
    }

    #[test]
    fn later_ones_wait_for_the_first_and_follow_it() {
        let mut all = Fragments::default();
        all.keep(7, early(100), 0);
        all.keep(7, early(50), 1);
        all.keep(8, early(20), 1);
        assert_eq!((all.find(&7, 1), all.has_released()), (None, false));
        all.tell(7, 3, 2);
        let released: Vec<usize> = all
            .take_released()
            .iter()
            .map(|it| it.frame.len())
            .collect();
        assert_eq!((released, waiting(&all)), (vec![100, 50], (1, 20)));
        assert_eq!(all.find(&7, 1 + LATER_NS), Some(3));
        assert_eq!(all.find(&7, 2 + LATER_NS), None);
        assert_eq!(all.find(&8, 2), None);
    }

    #[test]
    fn what_waits_for_nothing_is_given_up_and_nothing_is_due_then() {
        let mut all: Fragments<u32, u8> = Fragments::default();
        assert_eq!(all.due(), None);
        all.keep(7, early(100), 0);
        let mut looks = 0;
        while let Some(due) = all.due() {
            all.pass_time(due);
            looks += 1;
        }
        assert_eq!((looks, all.take_given_up()), (8, 1));
        assert_eq!((all.early_bytes, waiting(&all)), (0, (0, 0)));
        all.tell(7, 3, 3 * SECOND);
        assert!(!all.has_released());
    }

    #[test]
    fn a_flood_has_its_bounds_and_takes_nothing_from_those_whose_first_has_come() {
        const N: u32 = 100_000;
        for len in [60, 1_500, 65_000] {
            let mut all = Fragments::default();
            (0..100).for_each(|name| all.tell(name, 1, 0));
            for name in 1_000..1_000 + N {
                all.keep(name, early(len), 1);
                assert!(all.early_bytes <= EARLY_BYTES);
            }
            let (n, bytes) = waiting(&all);
            assert!(n <= EARLY && bytes == all.early_bytes);
            assert_eq!(all.take_given_up(), N as usize - n);
            assert!((0..100).all(|name| all.find(&name, 1) == Some(1)));
            // Who comes in the middle of it has its chance.
            all.keep(7, early(len), 1);
            all.tell(7, 2, 1);
            assert_eq!(all.take_released().len(), 1);
        }
        let mut all: Fragments<u32, u8> = Fragments::default();
        (0..N).for_each(|_| all.keep(7, early(60), 1));
        assert_eq!(waiting(&all).0, EARLY_FRAGMENTS);
        assert_eq!(all.take_given_up(), N as usize - EARLY_FRAGMENTS);
    }

    #[test]
    fn firsts_take_the_place_of_whoever_was_first() {
        let mut all: Fragments<u32, u8> = Fragments::default();
        for (name, now) in (0..).zip(0..10 * FIRSTS as u64) {
            all.tell(name, 1, now);
            assert_eq!(all.find(&name, now), Some(1));
        }
        assert_eq!(all.firsts.all.len(), FIRSTS);
    }
}
