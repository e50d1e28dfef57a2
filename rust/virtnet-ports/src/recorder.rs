//! A port that keeps what is sent to it in memory, up to a limit, for a program that looks at many packets at once.
//!
//! The worker fills a store of its own and hands it over between two breaths; whoever reads takes all there is. The two meet at
//! a lock that the worker only tries: where it is taken, it hands over a breath later.

use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtnet_packet::{Burst, DropReason, Offload, Offloads, Origin, Picks, Port, PortCounters};

use crate::pcap::wall_ns;

/// What a packet takes besides its bytes.
const PACKET_COST: usize = 34;

/// Positions in a store are words of 32 bits.
const MEMORY_MAX: usize = 1 << 31;

/// Packets end to end, each with its time.
#[derive(Debug, Default)]
pub struct Recorded {
    /// The bytes that were kept.
    pub data: Vec<u8>,
    /// Where each packet begins.
    pub starts: Vec<u32>,
    /// How many of its bytes were kept.
    pub lengths: Vec<u32>,
    /// How many there were.
    pub wire_lengths: Vec<u32>,
    /// When it passed, in nanoseconds since 1970.
    pub times_ns: Vec<u64>,
    /// What its sender left to be done.
    pub offloads: Vec<Offload>,
    /// Where it was seen, and which way it was going.
    pub origins: Vec<Origin>,
}

impl Recorded {
    fn size(&self) -> usize {
        self.data.len() + PACKET_COST * self.starts.len()
    }

    fn push(&mut self, from: Origin, burst: &Burst, i: usize, snap: usize, time_ns: u64) {
        let word = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (start, len) = (self.data.len(), burst.frame_len(i));
        self.data.resize(start + len, 0);
        burst.copy_frame(i, &mut self.data[start..]);
        self.data.truncate(start + len.min(snap));
        self.starts.push(word(start));
        self.lengths.push(word(len.min(snap)));
        self.wire_lengths.push(word(len));
        self.times_ns.push(time_ns);
        self.offloads.push(burst.offload(i));
        self.origins.push(from);
    }

    fn append(&mut self, other: &mut Self) {
        if self.starts.is_empty() {
            mem::swap(self, other);
            return;
        }
        let behind = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        self.data.append(&mut other.data);
        self.starts
            .extend(other.starts.drain(..).map(|start| start + behind));
        self.lengths.append(&mut other.lengths);
        self.wire_lengths.append(&mut other.wire_lengths);
        self.times_ns.append(&mut other.times_ns);
        self.offloads.append(&mut other.offloads);
        self.origins.append(&mut other.origins);
    }
}

#[derive(Debug, Default)]
struct Shared {
    store: Mutex<Recorded>,
    /// Its size.
    size: AtomicUsize,
    ended: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The port; see the module.
#[derive(Debug)]
pub struct RecorderPort {
    shared: Arc<Shared>,
    own: Recorded,
    places: u16,
    snap: usize,
    memory: usize,
    counters: PortCounters,
}

/// What a [`RecorderPort`] has recorded; stays when the port is gone.
#[derive(Clone, Debug)]
pub struct Recording(Arc<Shared>);

impl Recording {
    /// All that has come since this was called last.
    #[must_use]
    pub fn take(&self) -> Recorded {
        let mut store = self.0.lock();
        self.0.size.store(0, Ordering::Release);
        mem::take(&mut *store)
    }

    /// Whether there is something to take.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.size.load(Ordering::Acquire) == 0
    }

    /// Whether nothing more comes.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.ended.load(Ordering::Acquire)
    }
}

/// Makes a port that takes copies from `places` places (0: it takes packets) and keeps the first `snap` bytes of each, in `memory`
/// bytes at most. Packets that come when they are full find no room.
#[must_use]
pub fn recorder(places: u16, snap: usize, memory: usize) -> (RecorderPort, Recording) {
    let shared = Arc::new(Shared::default());
    let port = RecorderPort {
        shared: Arc::clone(&shared),
        own: Recorded::default(),
        places,
        snap,
        memory: memory.min(MEMORY_MAX),
        counters: PortCounters::default(),
    };
    (port, Recording(shared))
}

impl RecorderPort {
    /// Hands over what there is, unless somebody takes something just now.
    fn hand_over(&mut self) {
        if self.own.starts.is_empty() {
            return;
        }
        if let Ok(mut store) = self.shared.store.try_lock() {
            store.append(&mut self.own);
            self.shared.size.store(store.size(), Ordering::Release);
        }
    }
}

impl Port for RecorderPort {
    fn rx(&mut self, _burst: &mut Burst) -> usize {
        self.hand_over();
        0
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn places(&self) -> u16 {
        self.places
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        self.tx_copies(Origin::default(), burst, picks)
    }

    fn tx_copies(&mut self, from: Origin, burst: &Burst, picks: &Picks) -> usize {
        let time_ns = wall_ns();
        let elsewhere = self.shared.size.load(Ordering::Acquire);
        let mut accepted = 0;
        for i in picks.iter() {
            let kept = burst.frame_len(i).min(self.snap) + PACKET_COST;
            if self.own.size() + elsewhere + kept > self.memory {
                break;
            }
            self.own.push(from, burst, i, self.snap, time_ns);
            self.counters.sent += 1;
            self.counters.sent_bytes += burst.frame_len(i) as u64;
            accepted += 1;
        }
        accepted
    }

    fn flush(&mut self) {
        self.hand_over();
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn arm(&mut self) -> bool {
        self.hand_over();
        !self.own.starts.is_empty()
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

impl Drop for RecorderPort {
    /// Not by its worker, which must not wait: whoever removes a port drops it.
    fn drop(&mut self) {
        let mut store = self.shared.lock();
        store.append(&mut self.own);
        self.shared.size.store(store.size(), Ordering::Release);
        drop(store);
        self.shared.ended.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(port: &mut RecorderPort, frames: &[&[u8]]) -> usize {
        let mut burst = Burst::new();
        frames
            .iter()
            .for_each(|frame| burst.push_bytes(frame, Offload::default()));
        let n = port.tx(&burst, &Picks::first(burst.len()));
        port.flush();
        n
    }

    #[test]
    fn what_was_sent_is_taken_once_in_order_and_cut_where_wanted() {
        let (mut port, recording) = recorder(0, 20, 10_000);
        assert!(recording.is_empty());
        assert_eq!(send(&mut port, &[&[1; 60], &[2; 14]]), 2);
        assert_eq!(send(&mut port, &[&[3; 30]]), 1);
        assert!(!recording.is_empty());
        let found = recording.take();
        assert_eq!(found.lengths, [20, 14, 20]);
        assert_eq!(found.wire_lengths, [60, 14, 30]);
        assert_eq!(found.starts, [0, 20, 34]);
        assert_eq!(found.data, [&[1; 20][..], &[2; 14], &[3; 20]].concat());
        assert!(found.times_ns.is_sorted() && found.times_ns[0] > 0);
        assert!(recording.is_empty());
        assert!(recording.take().starts.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_free_again_when_it_was_taken() {
        let (mut port, recording) = recorder(0, 100, 3 * (100 + PACKET_COST));
        assert_eq!(send(&mut port, &[&[1; 500][..]; 5]), 3);
        assert_eq!(send(&mut port, &[&[1; 14]]), 0);
        assert_eq!(recording.take().starts.len(), 3);
        assert_eq!(send(&mut port, &[&[1; 500][..]; 5]), 3);
    }

    #[test]
    fn a_taker_holds_nobody_up_and_gets_it_later() {
        let (mut port, recording) = recorder(0, 100, 10_000);
        let taking = recording.0.lock();
        assert_eq!(send(&mut port, &[&[1; 14]]), 1);
        assert!(port.arm(), "it must not sleep on it");
        drop(taking);
        assert!(!port.arm());
        assert_eq!(recording.take().starts.len(), 1);
        send(&mut port, &[&[1; 14]]);
        assert!(!recording.is_over());
        drop(port);
        assert!(recording.is_over());
        assert_eq!(recording.take().starts.len(), 1);
    }
}
