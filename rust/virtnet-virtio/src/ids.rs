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

    /// The id that went out first of those that the device holds, if it keeps the order.
    #[inline(always)]
    pub(crate) fn oldest(&self) -> Option<u16> {
        (self.held() > 0).then(|| self.at(self.tail.wrapping_sub(self.size)))
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
