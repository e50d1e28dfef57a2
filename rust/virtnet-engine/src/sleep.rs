//! How a worker sleeps, and what wakes it.
//!
//! Every port is asked to notify ([`Port::arm`](virtnet_packet::Port::arm)) and says whether something came in the meantime;
//! only if nothing did, anywhere, does the worker wait: for the ports' descriptors, for its mailbox and the other workers, and for the moment
//! when a function has something to do. Awake again, it tells the ports that it polls.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use virtnet_sys::{Events, Interest, Poller};

use crate::dispatch::PortNode;
use crate::passage::Bell;
use crate::worker::Worker;

const MAILBOX: u64 = u64::MAX;

/// How long a worker sleeps at most while there is a port that should wake it and cannot.
const BLIND_NAP: Duration = Duration::from_millis(1);

/// What a worker sleeps on.
#[derive(Debug)]
pub(crate) struct Bed {
    poller: Poller,
    events: Events,
    bell: Arc<Bell>,
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
        })
    }

    /// Sleeps until something arrives, a command comes, or the time is `until`; or not at all if something is there
    /// already.
    pub(crate) fn sleep(&mut self, worker: &mut Worker, now: u64, until: Option<u64>) {
        let mut longest = until.map(|until| Duration::from_nanos(until.saturating_sub(now)));
        let mut waiting = longest == Some(Duration::ZERO);
        for (slot, node) in worker.ports_mut() {
            waiting |= node.port.arm();
            if self.watch(slot, node).is_err() {
                longest = Some(longest.map_or(BLIND_NAP, |time| time.min(BLIND_NAP)));
            }
        }
        // Said before it is looked whether there is something, so that whoever puts something there afterwards rings.
        self.bell.set_asleep(true);
        if !waiting && !worker.is_awaited() {
            worker.count_sleep();
            if self.poller.wait(&mut self.events, longest).is_err() {
                debug_assert!(false, "the descriptors of a worker are its own");
            }
            if self.events.iter().any(|event| event.token == MAILBOX) {
                self.bell.wake().drain();
            }
        }
        self.bell.set_asleep(false);
        for (_, node) in worker.ports_mut() {
            node.port.disarm();
        }
    }

    /// Sees to it that the port's descriptor, which may have become another one, ends the sleep.
    fn watch(&self, slot: usize, node: &mut PortNode) -> io::Result<()> {
        let fd = node.port.wait_fd();
        let number = fd.as_ref().map(AsRawFd::as_raw_fd);
        if number == node.waits_on && !node.changed {
            return Ok(());
        }
        if let Some(fd) = fd {
            let token = slot as u64;
            // A descriptor that was closed has left the set by itself, and its number may be another one's now.
            self.poller
                .modify(fd, token, Interest::Readable)
                .or_else(|_| self.poller.add(fd, token))?;
        }
        node.waits_on = number;
        node.changed = false;
        Ok(())
    }

    /// Stops waiting for a port that is to be removed.
    pub(crate) fn unwatch(&self, node: &mut PortNode) {
        if node.waits_on.take().is_some()
            && let Some(fd) = node.port.wait_fd()
        {
            // It may be gone from the set already: then there is nothing to do.
            let _ = self.poller.remove(fd);
        }
    }
}
