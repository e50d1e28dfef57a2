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

/// How many looks pass between two searches for silent ports.
const SEARCH_EVERY: u32 = 64;

/// What a worker sleeps on.
#[derive(Debug)]
pub(crate) struct Bed {
    poller: Poller,
    events: Events,
    bell: Arc<Bell>,
    breaths: u32,
    dozing: usize,
}

impl Bed {
    /// A bed that `bell` wakes from: rung for a command, or by another worker.
    pub(crate) fn new(bell: &Arc<Bell>) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(bell.wake(), MAILBOX)?;
        Ok(Self {
            poller,
            events: Events::with_capacity(16),
            bell: Arc::clone(bell),
            breaths: 0,
            dozing: 0,
        })
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
        if self.dozing > 0 {
            self.wait(worker, Some(Duration::ZERO), now);
        }
        if self.breaths.is_multiple_of(LOOK_EVERY * SEARCH_EVERY) {
            let is_silent = |node: &PortNode| now.saturating_sub(node.heard) > DOZE_AFTER_NS;
            self.let_doze(worker, is_silent);
        }
    }

    /// Sleeps until something arrives, a command comes, or the time is `until`; or not at all if something is there
    /// already.
    pub(crate) fn sleep(&mut self, worker: &mut Worker, now: u64, until: Option<u64>) {
        // Said before it is looked whether there is something, so that whoever puts something there afterwards rings.
        self.bell.set_asleep(true);
        let mut longest = until.map(|until| Duration::from_nanos(until.saturating_sub(now)));
        let lately = worker.awake().to_vec();
        let found = self.let_doze(worker, |_| true);
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

    /// Lets those ports doze that are awake and fit; what kept others from it.
    fn let_doze(&mut self, worker: &mut Worker, fits: impl Fn(&PortNode) -> bool) -> Kept {
        let mut kept = Kept::default();
        for at in 0..worker.awake().len() {
            let slot = worker.awake()[at];
            let Some(node) = worker.port_mut(slot).filter(|node| fits(node)) else {
                continue;
            };
            if node.is_held() {
                kept.blind = true;
                continue;
            }
            let is_waiting = node.port.arm();
            // One without a descriptor, for which nothing waits, is never ready.
            let fd = node.port.wait_fd();
            let is_watched = fd.is_none_or(|fd| self.poller.wait_once(fd, slot as u64).is_ok());
            node.dozes = !is_waiting && is_watched;
            if !node.dozes {
                node.port.disarm();
            }
            kept.waiting |= is_waiting;
            kept.blind |= !is_watched;
            self.dozing += usize::from(node.dozes);
        }
        worker.keep_awake(|node| !node.dozes);
        kept
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

    /// Asks a port in every breath again, if it dozes.
    fn rouse(&mut self, worker: &mut Worker, slot: usize) {
        if let Some(node) = worker.port_mut(slot)
            && node.dozes
        {
            node.dozes = false;
            node.port.disarm();
            self.dozing -= 1;
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

    /// Stops waiting for a port that is to be removed.
    pub(crate) fn unwatch(&mut self, node: &mut PortNode) {
        if std::mem::take(&mut node.dozes) {
            self.dozing -= 1;
        }
        if let Some(fd) = node.port.wait_fd() {
            // It may never have dozed: then there is nothing to do.
            let _ = self.poller.remove(fd);
        }
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
