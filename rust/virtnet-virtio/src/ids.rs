//! A driver's descriptor ids: which are free, and in which order the others went out.

/// Ids 0 to the size of the queue, each of them free or held by the device.
///
/// They stand in a circle. From `head` on come the free ones, in the order in which they will be taken; behind them the held ones,
/// oldest first for as long as the device returns them in that order. So what is put back belongs where the oldest stands, and
/// with a device that keeps the order no id ever changes its place: slot, descriptor and buffer stay together from lap to lap.
#[derive(Debug)]
pub(crate) struct Ids {
    /// As many places as there are ids, and more up to a power of two, so that a position needs no division.
    circle: Box<[u16]>,
    size: usize,
    /// How many ids were ever taken, and put back on top of those that were free at first: positions in the circle.
    head: usize,
    tail: usize,
}

impl Ids {
    /// All of them free.
    pub(crate) fn new(size: u16) -> Self {
        let mut circle = vec![0; usize::from(size).next_power_of_two()];
        (0..size)
            .zip(&mut circle)
            .for_each(|(id, place)| *place = id);
        Self {
            circle: circle.into(),
            size: size.into(),
            head: 0,
            tail: size.into(),
        }
    }

    /// How many are free.
    #[inline(always)]
    pub(crate) fn free(&self) -> usize {
        self.tail.wrapping_sub(self.head)
    }

    /// How many the device holds.
    #[inline(always)]
    pub(crate) fn held(&self) -> usize {
        self.size - self.free()
    }

    /// The id that will be taken after `k` others.
    #[inline(always)]
    pub(crate) fn upcoming(&self, k: usize) -> Option<u16> {
        (k < self.free()).then(|| self.at(self.head.wrapping_add(k)))
    }

    /// The ids that will be taken next, up to `most` and to the end of the circle: at least one, where one is free and wanted.
    #[inline(always)]
    pub(crate) fn run(&self, most: usize) -> &[u16] {
        let first = self.head & (self.circle.len() - 1);
        let end = self.circle.len().min(first + most.min(self.free()));
        self.circle.get(first..end).unwrap_or_default()
    }

    /// Takes the next `n` free ids, all of which [`Self::run`] has shown.
    #[inline(always)]
    pub(crate) fn skip(&mut self, n: usize) {
        debug_assert!(n <= self.free(), "{n} of {self:?}");
        self.head = self.head.wrapping_add(n);
    }

    /// Copies the ids that will be taken next to `ids`, as many as are free and have room there; how many.
    #[inline(always)]
    pub(crate) fn copy_next(&self, ids: &mut [u16]) -> usize {
        let n = ids.len().min(self.free());
        let first = self.run(n);
        let (here, round) = ids[..n].split_at_mut(first.len());
        here.copy_from_slice(first);
        round.copy_from_slice(&self.circle[..round.len()]);
        n
    }

    /// The id that went out first of those that the device holds, if it keeps the order.
    #[inline(always)]
    pub(crate) fn oldest(&self) -> Option<u16> {
        self.held_after(0)
    }

    /// The id that went out `k` places after the oldest, likewise.
    #[inline(always)]
    pub(crate) fn held_after(&self, k: usize) -> Option<u16> {
        let first = self.tail.wrapping_sub(self.size);
        (k < self.held()).then(|| self.at(first.wrapping_add(k)))
    }

    /// The held ids, the oldest first, up to the end of the circle: of a device that keeps the order.
    #[inline(always)]
    pub(crate) fn held_run(&self) -> &[u16] {
        let first = self.tail.wrapping_sub(self.size) & (self.circle.len() - 1);
        let end = self.circle.len().min(first + self.held());
        self.circle.get(first..end).unwrap_or_default()
    }

    /// Puts the `n` oldest held ids back, of a device that keeps the order. Where there are as many places as ids, they stand where they
    /// belong.
    #[inline(always)]
    pub(crate) fn put_oldest(&mut self, n: usize) {
        debug_assert!(n <= self.held(), "{n} of {self:?}");
        if self.circle.len() == self.size {
            self.tail = self.tail.wrapping_add(n);
            return;
        }
        for _ in 0..n {
            self.put(self.at(self.tail.wrapping_sub(self.size)));
        }
    }

    /// Puts held ids back, one after the other; how many.
    #[inline(always)]
    pub(crate) fn put_each(&mut self, ids: impl Iterator<Item = u16>) -> usize {
        // In a local: a field would be stored with every id, and looked at again.
        let (circle, mut tail) = (&mut self.circle[..], self.tail);
        let mask = circle.len() - 1;
        for id in ids {
            circle[tail & mask] = id;
            tail = tail.wrapping_add(1);
        }
        let n = tail.wrapping_sub(self.tail);
        self.tail = tail;
        n
    }

    /// Takes the next free id.
    #[inline(always)]
    pub(crate) fn take(&mut self) -> Option<u16> {
        let id = self.upcoming(0)?;
        self.head = self.head.wrapping_add(1);
        Some(id)
    }

    /// Puts a held id back.
    #[inline(always)]
    pub(crate) fn put(&mut self, id: u16) {
        let place = self.tail & (self.circle.len() - 1);
        self.circle[place] = id;
        self.tail = self.tail.wrapping_add(1);
    }

    #[inline(always)]
    fn at(&self, position: usize) -> u16 {
        self.circle[position & (self.circle.len() - 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_come_back_in_order_keep_their_places() {
        let mut ids = Ids::new(5);
        for lap in 0..20 {
            let taken: Vec<_> = (0..3).filter_map(|_| ids.take()).collect();
            let expected: Vec<_> = (0..3).map(|k| (3 * lap + k) % 5).collect();
            assert_eq!(taken, expected);
            assert_eq!((ids.free(), ids.held()), (2, 3));
            for id in taken {
                assert_eq!(ids.oldest(), Some(id));
                ids.put(id);
            }
            assert_eq!(ids.oldest(), None);
        }
    }

    #[test]
    fn runs_are_what_would_be_seen_one_by_one() {
        for size in [4, 5] {
            let mut ids = Ids::new(size);
            for lap in 0..20_usize {
                let n = 1 + lap % 3;
                let expected: Vec<_> = (0..n).filter_map(|k| ids.upcoming(k)).collect();
                let mut copied = [u16::MAX; 8];
                assert_eq!(ids.copy_next(&mut copied[..n]), n);
                assert_eq!((&copied[..n], copied[n]), (&expected[..], u16::MAX));
                while let left @ 1.. = n - ids.held() {
                    let run = ids.run(left);
                    assert!(!run.is_empty() && expected[ids.held()..].starts_with(run));
                    let shown = run.len();
                    ids.skip(shown);
                }
                assert!(expected.starts_with(ids.held_run()));
                match lap % 2 {
                    0 => ids.put_oldest(n),
                    _ => assert_eq!(ids.put_each(expected.into_iter().rev()), n),
                }
                let free: Vec<_> = (0..9).filter_map(|k| ids.upcoming(k)).collect();
                assert_eq!((free.len(), ids.held()), (usize::from(size), 0));
                assert!((0..size).all(|id| free.contains(&id)));
            }
            let mut few = [0; 9];
            assert_eq!(ids.copy_next(&mut few), usize::from(size));
        }
    }

    #[test]
    fn ids_are_taken_in_the_order_in_which_they_came_back() {
        let mut ids = Ids::new(4);
        let taken: Vec<_> = std::iter::from_fn(|| ids.take()).collect();
        assert_eq!(taken, [0, 1, 2, 3]);
        assert_eq!((ids.take(), ids.upcoming(0)), (None, None));
        for id in [2, 0, 3, 1] {
            ids.put(id);
        }
        assert_eq!([0, 3, 4].map(|k| ids.upcoming(k)), [Some(2), Some(1), None]);
        let taken: Vec<_> = std::iter::from_fn(|| ids.take()).collect();
        assert_eq!(taken, [2, 0, 3, 1]);
    }
}
