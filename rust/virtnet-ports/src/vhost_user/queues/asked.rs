//! Where packets go that a driver with a choice of receiveqs, or with a control queue, is to receive.

use std::sync::Arc;

use virtnet_packet::{BURST_MAX, Burst, DropReason, Picks, PortCounters};
use virtnet_virtio::net::control::{QueueCounts, Settings};

use super::{Place, Queues};

impl Queues {
    /// Several receiveqs: a flow goes where the driver sends of it, and always to the same.
    pub(super) fn tx_spread(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let mut pairs = [0; BURST_MAX];
        for i in picks.iter() {
            pairs[i] = self.steering.pair(burst.head(i), &self.sinks);
        }
        self.tx_to_each(&pairs, burst, picks);
        picks.len()
    }

    /// Sends each pick to the pair that stands in its place. What that has no room for is dropped here, and what it does not take.
    fn tx_to_each(&mut self, pairs: &[usize; BURST_MAX], burst: &Burst, picks: &Picks) {
        let mut left = picks.len();
        for at in 0..self.sinks.len() {
            let Some(&pair) = self.sinks.get(at) else {
                break;
            };
            let mut share = Picks::default();
            picks
                .iter()
                .filter(|&i| pairs[i] == pair)
                .for_each(|i| share.push(i));
            if share.is_empty() {
                continue;
            }
            left -= share.len();
            self.tx_or_drop(pair, burst, &share);
        }
        self.counters.tx_drops.add(DropReason::PortDown, left);
    }

    /// Sends to a pair; what it has no room for is dropped here.
    fn tx_or_drop(&mut self, pair: usize, burst: &Burst, picks: &Picks) {
        let before = sent(&self.counters);
        let n = self.tx_to(pair, burst, picks);
        self.counters
            .tx_drops
            .add(DropReason::NoRoom, picks.len() - n);
        if self.settings.is_some() {
            add(
                &mut self.books[2 * pair].counts,
                sent(&self.counters),
                before,
            );
        }
    }

    /// The driver has a control queue: what it wants to receive, and where.
    #[inline(never)]
    pub(super) fn tx_as_asked(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let Some(settings) = self.settings.clone() else {
            return 0;
        };
        let mut wanted = *picks;
        if !settings.filter.takes_all() {
            wanted.clear();
            let taken = picks
                .iter()
                .filter(|&i| settings.filter.takes(burst.head(i)));
            taken.for_each(|i| wanted.push(i));
            self.counters
                .tx_drops
                .add(DropReason::NotWanted, picks.len() - wanted.len());
        }
        match (&settings.rss, self.sinks.as_slice()) {
            (Some(rss), _) => {
                let mut pairs = [usize::MAX; BURST_MAX];
                for i in wanted.iter() {
                    pairs[i] = self.place.here(rss.pair(burst.head(i)).into());
                }
                self.tx_to_each(&pairs, burst, &wanted);
            }
            (None, &[pair]) => self.tx_or_drop(pair, burst, &wanted),
            (None, _) => drop(self.tx_spread(burst, &wanted)),
        }
        picks.len()
    }

    /// Follows what the driver has asked for from now on; without it, nothing.
    pub(in crate::vhost_user) fn set_settings(
        &mut self,
        settings: Option<Arc<Settings>>,
        place: Place,
    ) {
        self.settings = settings;
        self.place = place;
        for pair in 0..self.pairs.len() {
            self.set_hasher(pair);
            self.set_holds(pair);
        }
        self.note_active();
    }

    /// Holds the notifications of a pair back as the driver has asked for.
    fn set_holds(&mut self, pair: usize) {
        for side in 0..2 {
            let in_device = 2 * self.place.device(pair) + side;
            let rules = self.settings.as_ref().map(|settings| &settings.coalescing);
            let rule = rules.and_then(|rules| rules.get(in_device).copied());
            self.set_hold(2 * pair + side, rule.unwrap_or_default());
        }
    }

    pub(super) fn set_hasher(&mut self, pair: usize) {
        let hasher = self
            .settings
            .as_ref()
            .and_then(|settings| settings.hasher.clone());
        if let Some(ring) = &mut self.pairs[pair].receive {
            ring.queue.set_hasher(hasher);
        }
    }

    /// What has passed a ring that runs.
    pub(in crate::vhost_user) fn counts(&self, ring: usize) -> QueueCounts {
        self.books
            .get(ring)
            .map(|books| books.counts)
            .unwrap_or_default()
    }
}

/// What a transmitq's statistics are made of: packets, bytes, drops, and those that made no sense.
pub(super) fn received(counters: &PortCounters) -> [u64; 4] {
    let drops = &counters.rx_drops;
    [
        counters.received,
        counters.received_bytes,
        drops.total(),
        drops.of(DropReason::Malformed) + drops.of(DropReason::BadOffload),
    ]
}

/// The same of a receiveq's: packets, bytes, drops, and those for lack of buffers.
fn sent(counters: &PortCounters) -> [u64; 4] {
    let drops = &counters.tx_drops;
    [
        counters.sent,
        counters.sent_bytes,
        drops.total(),
        drops.of(DropReason::NoRoom),
    ]
}

/// Adds what has passed between two readings.
pub(super) fn add(counts: &mut QueueCounts, now: [u64; 4], before: [u64; 4]) {
    let numbers = [
        &mut counts.packets,
        &mut counts.bytes,
        &mut counts.drops,
        &mut counts.drops_by_driver,
    ];
    for (number, (now, before)) in numbers.into_iter().zip(now.into_iter().zip(before)) {
        *number += now - before;
    }
}
