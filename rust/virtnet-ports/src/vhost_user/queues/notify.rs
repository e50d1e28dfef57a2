//! Telling drivers of used buffers: at once, or as they have asked for, a while later and of several at a time.
//!
//! A notification that is held back ([`Hold`]) is sent when so many packets have passed since the last one, or so much time since it was
//! due; both are looked at in every breath while something is held back, and a timer wakes a port that dozes. Where nothing is held
//! back a burst pays one comparison.
//!
//! Spec: virtio 1.4, 5.1.9.5.9, Notifications Coalescing.

use virtnet_packet::PortCounters;
use virtnet_sys::{EventFd, Timer, monotonic_ns};
use virtnet_virtio::net::control::{Coalescing, QueueCounts};

use super::{Pair, Queues};

/// Token of the timer.
const TIMER: u64 = u64::MAX - 1;

/// What has passed a ring since it was started, and when its driver is to hear of it.
#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) counts: QueueCounts,
    /// Times that buffers were given back, of which the driver was told or did not want to be.
    pub(super) bursts: u64,
    /// Chains that a device before this one had taken.
    pub(super) taken_again: u16,
    pub(super) hold: Hold,
}

/// How notifications of a ring are held back.
#[derive(Debug, Default)]
pub(super) struct Hold {
    rule: Coalescing,
    /// Packets that had passed with the last notification.
    told: u64,
    /// When one that is held back has to be sent at the latest.
    due_ns: Option<u64>,
}

impl Hold {
    fn is_on(&self) -> bool {
        // One packet at a time, or no time at all, is at once.
        self.rule.max_packets > 1 && self.rule.max_usecs > 0
    }
}

impl Queues {
    /// The driver of a ring wants to know what was used.
    #[inline]
    pub(super) fn notify(&mut self, ring: usize) {
        if self.books[ring].hold.is_on() {
            self.hold_back(ring);
        } else {
            self.call(ring);
        }
    }

    #[inline]
    fn call(&mut self, ring: usize) {
        let to = call_of(&self.pairs, ring);
        self.books[ring].counts.calls += 1;
        call(to, &mut self.counters);
    }

    /// Holds a notification back, if it is not due with this.
    #[cold]
    fn hold_back(&mut self, ring: usize) {
        let hold = &mut self.books[ring].hold;
        if hold.due_ns.is_none() {
            let time_ns = u64::from(hold.rule.max_usecs) * 1000;
            hold.due_ns = Some(monotonic_ns().saturating_add(time_ns));
            self.held += 1;
        }
    }

    /// Sends those notifications that have been held back for long enough.
    #[cold]
    #[inline(never)]
    pub(super) fn release_held(&mut self) {
        let now_ns = monotonic_ns();
        for ring in 0..self.books.len() {
            let Books { hold, counts, .. } = &self.books[ring];
            let has_enough =
                counts.packets.saturating_sub(hold.told) >= u64::from(hold.rule.max_packets);
            let is_due = hold.due_ns.is_some_and(|due_ns| due_ns <= now_ns);
            if hold.due_ns.is_some() && (has_enough || is_due || !hold.is_on()) {
                self.release(ring);
            }
        }
    }

    /// Sends a notification that is held back, if one is.
    pub(super) fn release(&mut self, ring: usize) {
        let Books { hold, counts, .. } = &mut self.books[ring];
        hold.told = counts.packets;
        if hold.due_ns.take().is_some() {
            self.held -= 1;
            self.call(ring);
        }
    }

    /// Has the port wake up when the next notification is due that is held back. Where that is not possible none is.
    pub(super) fn set_timer(&mut self) {
        let due_ns = self.books.iter().filter_map(|books| books.hold.due_ns);
        let due_ns = due_ns.min();
        if due_ns == self.timer_at_ns {
            return;
        }
        self.timer_at_ns = due_ns;
        if self.timer.as_ref().is_none_or(|it| it.set(due_ns).is_err()) {
            (0..self.books.len()).for_each(|ring| self.release(ring));
        }
    }

    /// Holds notifications of ring `ring` back like this from now on.
    pub(super) fn set_hold(&mut self, ring: usize, rule: Coalescing) {
        let hold = &mut self.books[ring].hold;
        if hold.rule == rule {
            return;
        }
        hold.rule = rule;
        if hold.is_on() && self.timer.is_none() {
            self.timer = Timer::new().ok();
            let added = self.timer.as_ref().map(|it| self.poller.add(it, TIMER));
            if !matches!(added, Some(Ok(()))) {
                self.timer = None;
            }
        }
        // What was held back by another rule is not held back longer.
        self.release(ring);
        if self.timer.is_none() {
            self.books[ring].hold.rule = Coalescing::default();
        }
    }

    /// Begins the books of a ring, which has not run in this session, or was stopped.
    pub(super) fn open_books(&mut self, ring: usize, taken_again: u16) {
        self.release(ring);
        let rule = self.books[ring].hold.rule;
        self.books[ring] = Books {
            taken_again,
            ..Books::default()
        };
        self.books[ring].hold.rule = rule;
    }
}

fn call_of(pairs: &[Pair], ring: usize) -> Option<&EventFd> {
    let pair = pairs.get(ring / 2)?;
    let setup = if ring.is_multiple_of(2) {
        pair.receive.as_ref().map(|ring| &ring.setup)
    } else {
        pair.transmit.as_ref().map(|ring| &ring.setup)
    };
    setup?.call.as_deref()
}

pub(super) fn call(to: Option<&EventFd>, counters: &mut PortCounters) {
    if let Some(to) = to {
        // An eventfd that cannot be written is its owner's loss.
        drop(to.signal());
        counters.notifications += 1;
    }
}
