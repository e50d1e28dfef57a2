//! Packets of a burst by what is to happen to them, so that each destination is called once.

use virtnet_packet::BURST_MAX;

use crate::function::Fate;

/// Packets of a burst by what is to happen to them: found in one pass, each group in the order of the packets.
pub(super) struct Groups {
    n: usize,
    fates: [Fate; BURST_MAX],
    /// The first and the last packet of each group, and for each packet the next one of its group.
    first: [u8; BURST_MAX],
    last: [u8; BURST_MAX],
    next: [u8; BURST_MAX],
}

impl Groups {
    /// Twice as many places as there can be groups, so that there is always a free one.
    const PLACES: usize = 2 * BURST_MAX;
    const FREE: u8 = u8::MAX;

    #[inline]
    pub(super) fn new(fates: &[Fate]) -> Self {
        let mut groups = Self {
            n: 0,
            fates: [Fate::Consumed; BURST_MAX],
            first: [0; BURST_MAX],
            last: [0; BURST_MAX],
            next: [0; BURST_MAX],
        };
        let mut places = [Self::FREE; Self::PLACES];
        for (k, &fate) in (0..).zip(fates) {
            let mut place = match fate {
                Fate::To(gate) => usize::from(gate),
                Fate::Drop(reason) => Self::PLACES - 1 - reason as usize,
                Fate::Consumed | Fate::Flood | Fate::Held => BURST_MAX,
            } % Self::PLACES;
            loop {
                let group = usize::from(places[place]);
                if places[place] == Self::FREE {
                    places[place] = groups.open(k, fate);
                    break;
                }
                if groups.fates[group] == fate {
                    groups.next[usize::from(groups.last[group])] = k;
                    groups.last[group] = k;
                    break;
                }
                place = (place + 1) % Self::PLACES;
            }
        }
        groups
    }

    /// Starts a group with packet `k`; its number.
    fn open(&mut self, k: u8, fate: Fate) -> u8 {
        let group = self.n;
        self.fates[group] = fate;
        self.first[group] = k;
        self.last[group] = k;
        self.n += 1;
        u8::try_from(group).unwrap_or(Self::FREE)
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.n
    }

    #[inline]
    pub(super) fn fate(&self, group: usize) -> Fate {
        self.fates[group]
    }

    /// Calls `each` with the packets of a group, in order.
    #[inline]
    pub(super) fn members(&self, group: usize, mut each: impl FnMut(usize)) {
        let (mut k, last) = (self.first[group], self.last[group]);
        each(usize::from(k));
        while k != last {
            k = self.next[usize::from(k)];
            each(usize::from(k));
        }
    }
}

#[cfg(test)]
mod tests {
    use virtnet_packet::DropReason;

    use super::*;

    fn grouped(fates: &[Fate]) -> Vec<(Fate, Vec<usize>)> {
        let groups = Groups::new(fates);
        let members = |group| {
            let mut members = Vec::new();
            groups.members(group, |k| members.push(k));
            members
        };
        (0..groups.len())
            .map(|group| (groups.fate(group), members(group)))
            .collect()
    }

    #[test]
    fn packets_are_grouped_by_fate_and_stay_in_order() {
        let drop = Fate::Drop(DropReason::Runt);
        // 5 and 133 want the same place.
        let fates = [5, 133, 5, 7, 133, 5].map(Fate::To);
        let fates = [&fates[..], &[drop, Fate::Consumed, drop]].concat();
        assert_eq!(
            grouped(&fates),
            [
                (Fate::To(5), vec![0, 2, 5]),
                (Fate::To(133), vec![1, 4]),
                (Fate::To(7), vec![3]),
                (drop, vec![6, 8]),
                (Fate::Consumed, vec![7]),
            ]
        );
    }

    #[test]
    fn a_full_burst_may_go_to_as_many_places_as_it_has_packets() {
        for step in [1, 2, 128, 1_000] {
            let fates: Vec<_> = (0..64).map(|n| Fate::To(n * step)).collect();
            let groups = grouped(&fates);
            assert_eq!(groups.len(), 64);
            for (k, (fate, members)) in groups.into_iter().enumerate() {
                assert_eq!((fate, members), (fates[k], vec![k]));
            }
        }
    }
}
