//! Who is behind which remote, as far as was heard.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

/// How many stations are known at most: nobody outside makes the table grow beyond.
const STATIONS_MAX: usize = 16_384;

/// Where stations are, by their MAC address.
#[derive(Debug)]
pub(super) struct Stations {
    known: HashMap<[u8; 6], Heard>,
    ageing_ns: u64,
    /// When those that are too old were removed last.
    swept_ns: u64,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    at: SocketAddr,
    when_ns: u64,
}

impl Stations {
    pub(super) fn new(ageing: Duration) -> Self {
        Self {
            known: HashMap::with_capacity(STATIONS_MAX),
            ageing_ns: u64::try_from(ageing.as_nanos()).unwrap_or(u64::MAX),
            swept_ns: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Notes that a station was heard of from `at`; the address of a group is none of a station.
    pub(super) fn learn(&mut self, mac: &[u8], at: SocketAddr, now_ns: u64) {
        let Ok(mac) = <[u8; 6]>::try_from(mac) else {
            return;
        };
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return;
        }
        let heard = Heard {
            at,
            when_ns: now_ns,
        };
        if let Some(known) = self.known.get_mut(&mac) {
            *known = heard;
            return;
        }
        if self.known.len() >= STATIONS_MAX {
            self.sweep(now_ns);
        }
        if self.known.len() < STATIONS_MAX {
            self.known.insert(mac, heard);
        }
    }

    /// Where a station is; `None` for groups and for those that were not heard of, or not for long.
    pub(super) fn find(&self, mac: &[u8], now_ns: u64) -> Option<SocketAddr> {
        let heard = self.known.get(<&[u8; 6]>::try_from(mac).ok()?)?;
        (now_ns.saturating_sub(heard.when_ns) < self.ageing_ns).then_some(heard.at)
    }

    /// Removes those that are too old, once a second at most.
    fn sweep(&mut self, now_ns: u64) {
        if now_ns.saturating_sub(self.swept_ns) < 1_000_000_000 {
            return;
        }
        self.swept_ns = now_ns;
        let ageing_ns = self.ageing_ns;
        self.known
            .retain(|_, heard| now_ns.saturating_sub(heard.when_ns) < ageing_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn at(last: u8) -> SocketAddr {
        ([192, 0, 2, last], 4789).into()
    }

    #[test]
    fn stations_move_and_are_forgotten_and_groups_are_none() {
        let mut stations = Stations::new(Duration::from_secs(10));
        let mac = [2, 0, 0, 0, 0, 1];
        assert_eq!(stations.find(&mac, SECOND), None);
        stations.learn(&mac, at(1), SECOND);
        stations.learn(&[0xff; 6], at(1), SECOND);
        assert_eq!(
            (stations.len(), stations.find(&[0xff; 6], SECOND)),
            (1, None)
        );
        assert_eq!(stations.find(&mac, 10 * SECOND), Some(at(1)));
        assert_eq!(stations.find(&mac, 11 * SECOND), None);
        stations.learn(&mac, at(2), 12 * SECOND);
        assert_eq!(stations.find(&mac, 12 * SECOND), Some(at(2)));
    }

    #[test]
    fn the_table_is_bounded_and_makes_room_when_stations_age() {
        let mut stations = Stations::new(Duration::from_secs(10));
        let mac = |n: u32| {
            let [a, b, c, d] = n.to_be_bytes();
            [2, 0, a, b, c, d]
        };
        for n in 0..20_000 {
            stations.learn(&mac(n), at(1), SECOND);
        }
        assert_eq!(stations.len(), STATIONS_MAX);
        stations.learn(&mac(1 << 20), at(1), 20 * SECOND);
        assert_eq!(stations.len(), 1);
    }
}
