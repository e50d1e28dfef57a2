//! How ports doze and workers sleep, and what wakes them.
//!
//! A port that has been silent for a while is asked to notify ([`Port::arm`](virtnet_packet::Port::arm)) and left alone until its
//! descriptor says that something came: among a few that are busy, hundreds of idle ports cost nothing. When all ports are
//! silent they all doze, and the worker sleeps until one of them wakes, a command or something from another worker comes, or a
//! function has something to do. What wakes is told that it is polled; the others go on dozing.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtnet_sys::{Events, Poller};

use crate::dispatch::PortNode;
use crate::passage::Bell;
use crate::worker::Worker;

const MAILBOX: u64 = u64::MAX;

/// How long a worker sleeps at most while there is a port that should wake it and cannot.
const BLIND_NAP: Duration = Duration::from_millis(1);

/// How long a port is silent before it dozes while others are busy.
const DOZE_AFTER_NS: u64 = 1_000_000;

/// How lately a port was heard of that is asked again as soon as another one has woken its worker.
const SPARED_NS: u64 = 10_000_000;

/// How many breaths pass between two looks whether a port has woken: mostly some tens of microseconds.
const LOOK_EVERY: u32 = 16;

/// How many looks pass before a search for silent ports begins, if the one before is over.
const SEARCH_EVERY: u32 = 64;

/// How many ports a look searches, and how many of them it lets doze: that takes system calls, and others wait meanwhile.
const SEARCHED: usize = 16;
const PUT_TO_SLEEP: usize = 2;

/// What a worker sleeps on.
#[derive(Debug)]
pub(crate) struct Bed {
    poller: Arc<Poller>,
    events: Events,
    bell: Arc<Bell>,
    breaths: u32,
    /// How far the search for silent ports has come among those that are awake.
    searched: usize,
}

impl Bed {
    /// A bed that `bell` wakes from: rung for a command, or by another worker.
    pub(crate) fn new(bell: &Arc<Bell>) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(bell.wake(), MAILBOX)?;
        Ok(Self {
            poller: Arc::new(poller),
            events: Events::with_capacity(16),
            bell: Arc::clone(bell),
            breaths: 0,
            searched: usize::MAX,
        })
    }

    /// What it waits with.
    pub(crate) fn poller(&self) -> Arc<Poller> {
        Arc::clone(&self.poller)
    }

    /// To be called after every breath of a worker that may let ports doze.
    #[inline]
    pub(crate) fn after_breath(&mut self, worker: &mut Worker, now: u64) {
        self.breaths = self.breaths.wrapping_add(1);
        if self.breaths.is_multiple_of(LOOK_EVERY) {
            self.look(worker, now);
        }
    }

    #[cold]
    fn look(&mut self, worker: &mut Worker, now: u64) {
        if worker.dozing() > 0 {
            self.wait(worker, Some(Duration::ZERO), now);
        }
        if self.searched < worker.awake().len() {
            self.search(worker, now);
        } else if self.breaths.is_multiple_of(LOOK_EVERY * SEARCH_EVERY) {
            self.searched = 0;
        }
    }

    /// Lets silent ports doze, a few at a time.
    fn search(&mut self, worker: &mut Worker, now: u64) {
        let mut dozing = 0;
        for _ in 0..SEARCHED {
            let Some(&slot) = worker.awake().get(self.searched) else {
                return;
            };
            let is_silent = |node: &PortNode| now.saturating_sub(node.heard) > DOZE_AFTER_NS;
            if worker.port_mut(slot).is_some_and(|node| is_silent(node))
                && self.try_doze(worker, slot).is_none()
            {
                worker.let_doze(self.searched);
                dozing += 1;
                if dozing == PUT_TO_SLEEP {
                    return;
                }
            } else {
                self.searched += 1;
            }
        }
    }

    /// Sleeps until something arrives, a command comes, or the time is `until`; or not at all if something is there
    /// already.
    pub(crate) fn sleep(&mut self, worker: &mut Worker, now: u64, until: Option<u64>) {
        // Said before it is looked whether there is something, so that whoever puts something there afterwards rings.
        self.bell.set_asleep(true);
        let mut longest = until.map(|until| Duration::from_nanos(until.saturating_sub(now)));
        let lately = worker.awake().to_vec();
        let found = self.let_all_doze(worker);
        if found.blind {
            longest = Some(longest.map_or(BLIND_NAP, |time| time.min(BLIND_NAP)));
        }
        if !found.waiting && !worker.is_awaited() && longest != Some(Duration::ZERO) {
            worker.count_sleep();
            if self.wait(worker, longest, now) {
                self.bell.wake().drain();
            }
        }
        self.bell.set_asleep(false);
        // Who was heard of a moment ago has its part in what comes now, and is spared notifying.
        for slot in lately {
            let was_busy = |node: &PortNode| now.saturating_sub(node.heard) < SPARED_NS;
            if worker.port_mut(slot).is_some_and(|node| was_busy(node)) {
                self.rouse(worker, slot);
            }
        }
    }

    /// Lets all ports doze; what kept some from it.
    fn let_all_doze(&mut self, worker: &mut Worker) -> Kept {
        let mut all = Kept::default();
        let mut at = 0;
        while let Some(&slot) = worker.awake().get(at) {
            match self.try_doze(worker, slot) {
                None => worker.let_doze(at),
                Some(kept) => {
                    all.waiting |= kept.waiting;
                    all.blind |= kept.blind;
                    at += 1;
                }
            }
        }
        all
    }

    /// Lets a port doze that is awake, if nothing keeps it from that.
    fn try_doze(&mut self, worker: &mut Worker, slot: usize) -> Option<Kept> {
        let Some(node) = worker.port_mut(slot) else {
            return Some(Kept::default());
        };
        if node.is_held() {
            return Some(Kept {
                waiting: false,
                blind: true,
            });
        }
        let waiting = node.port.arm();
        // One without a descriptor, for which nothing waits, is never ready.
        let fd = node.port.wait_fd();
        let is_watched = fd.is_none_or(|fd| self.poller.wait_once(fd, slot as u64).is_ok());
        node.dozes = !waiting && is_watched;
        if node.dozes {
            return None;
        }
        node.port.disarm();
        Some(Kept {
            waiting,
            blind: !is_watched,
        })
    }

    /// Waits for one of the ports that doze, and for the bell; whether that rang.
    fn wait(&mut self, worker: &mut Worker, longest: Option<Duration>, now: u64) -> bool {
        let mut rung = false;
        if self.poller.wait(&mut self.events, longest).is_err() {
            debug_assert!(false, "the descriptors of a worker are its own");
        }
        for at in 0..self.events.len() {
            match self.events.token(at) {
                // It goes on ringing until the worker has slept: what it rang for is looked at after that.
                MAILBOX => rung = true,
                slot => {
                    let slot = usize::try_from(slot).unwrap_or(usize::MAX);
                    self.rouse(worker, slot);
                    if let Some(node) = worker.port_mut(slot) {
                        node.heard = now;
                    }
                }
            }
        }
        rung
    }

    /// Asks a port in every breath again, from the next one on.
    fn rouse(&mut self, worker: &mut Worker, slot: usize) {
        let Some(node) = worker.port_mut(slot) else {
            return;
        };
        node.patience.end_wait();
        if node.dozes {
            node.dozes = false;
            node.port.disarm();
            worker.wake(slot);
        }
    }

    /// Asks every port again.
    pub(crate) fn rouse_all(&mut self, worker: &mut Worker) {
        let slots: Vec<usize> = worker.ports_mut().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.rouse(worker, slot);
        }
    }
}

/// Stops waiting for a port that was removed.
pub(crate) fn unwatch(poller: &Poller, node: &PortNode) {
    if let Some(fd) = node.port.wait_fd() {
        // It may never have dozed: then there is nothing to do.
        let _ = poller.remove(fd);
    }
}

/// What kept ports from dozing.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    /// Something has come already.
    waiting: bool,
    /// Its descriptor cannot be waited for.
    blind: bool,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use virtnet_packet::{Burst, DropReason, Picks, Port, PortCounters};

    use super::*;
    use crate::patience::Patience;
    use crate::{Change, NodeId};

    /// Has nothing, and counts how often it is asked.
    #[derive(Debug)]
    struct Asked(Arc<AtomicU32>);

    impl Port for Asked {
        fn rx(&mut self, _: &mut Burst) -> usize {
            self.0.fetch_add(1, Ordering::Relaxed);
            0
        }

        fn tx(&mut self, _: &Burst, _: &Picks) -> usize {
            0
        }

        fn drop_tx(&mut self, _: DropReason, _: usize) {}

        fn counters(&self) -> PortCounters {
            PortCounters::default()
        }
    }

    #[test]
    fn a_port_that_is_left_alone_is_asked_when_all_are_roused() {
        let asked = Arc::new(AtomicU32::new(0));
        let mut worker = Worker::new();
        let change = Change::new().add(NodeId(0), Asked(Arc::clone(&asked)));
        worker.apply(change, 0).unwrap();
        worker.port_mut(0).unwrap().patience = Patience::of_wait(1_000);
        let asked_by = |worker: &mut Worker, now| {
            worker.step(now);
            asked.load(Ordering::Relaxed)
        };
        assert_eq!(asked_by(&mut worker, 10), 1);
        assert_eq!(asked_by(&mut worker, 20), 1);
        let mut bed = Bed::new(&Arc::new(Bell::new().unwrap())).unwrap();
        bed.rouse_all(&mut worker);
        assert_eq!(asked_by(&mut worker, 30), 2);
    }
}
