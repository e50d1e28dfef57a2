//! Which of several back-ends a flow goes to: by a table in which each has its share of places, and few places change hands
//! when one comes or goes.
//!
//! Spec: Maglev, NSDI 2016, 3.4.

use super::flows::End;

/// Places, a prime number far above the number of back-ends.
const PLACES: usize = 65_537;

/// The places of some back-ends.
#[derive(Debug)]
pub(super) struct Maglev {
    places: Vec<u16>,
    ends: Vec<End>,
}

impl Maglev {
    /// Shares out the places; of more back-ends than 65535 the first.
    pub(super) fn new(mut ends: Vec<End>) -> Self {
        ends.truncate(usize::from(u16::MAX));
        if ends.len() < 2 {
            return Self {
                places: Vec::new(),
                ends,
            };
        }
        // Each has an order of its own in which it wants places, and takes the first that is free, in turn.
        let mut wishes: Vec<(usize, usize)> = ends.iter().map(wishes_of).collect();
        let mut places = vec![u16::MAX; PLACES];
        let mut left = PLACES;
        while left > 0 {
            for ((at, step), number) in wishes.iter_mut().zip(0_u16..) {
                while places[*at] != u16::MAX {
                    *at = (*at + *step) % PLACES;
                }
                places[*at] = number;
                left -= 1;
                if left == 0 {
                    break;
                }
            }
        }
        Self { places, ends }
    }

    /// The back-end for a flow of this hash; none if there are none.
    pub(super) fn find(&self, hash: u32) -> Option<End> {
        let number = self.places.get(hash as usize % PLACES);
        self.ends
            .get(usize::from(number.copied().unwrap_or_default()))
            .copied()
    }
}

/// Where a back-end begins to look for places, and how far apart it looks.
fn wishes_of(&(ip, port): &End) -> (usize, usize) {
    let number = u64::from(ip.to_bits()) << 16 | u64::from(port);
    let (offset, skip) = (mixed(number), mixed(!number));
    let below = |hash: u64, n: usize| usize::try_from(hash % n as u64).unwrap_or_default();
    (below(offset, PLACES), 1 + below(skip, PLACES - 1))
}

/// SplitMix64's last steps: the same in every process, since other balancers have to agree.
fn mixed(mut n: u64) -> u64 {
    n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::Ipv4Addr;

    use super::*;

    fn ends(n: u8) -> Vec<End> {
        (0..n).map(|k| (Ipv4Addr::new(10, 0, 0, k), 80)).collect()
    }

    #[test]
    fn each_has_its_share_and_few_places_change_hands() {
        let (ten, nine) = (Maglev::new(ends(10)), Maglev::new(ends(9)));
        let mut shares: HashMap<End, u32> = HashMap::new();
        let mut moved = 0;
        for hash in 0..65_537 {
            let (was, is) = (ten.find(hash).unwrap(), nine.find(hash).unwrap());
            *shares.entry(was).or_default() += 1;
            moved += u32::from(was != is && was.0.octets()[3] != 9);
        }
        assert!(
            shares.values().all(|&n| (6_500..6_610).contains(&n)),
            "{shares:?}"
        );
        assert!(moved < 65_537 / 20, "{moved} places of others moved");
        assert_eq!(Maglev::new(ends(0)).find(7), None);
        assert_eq!(
            Maglev::new(ends(1)).find(7),
            Some((Ipv4Addr::new(10, 0, 0, 0), 80))
        );
    }
}
