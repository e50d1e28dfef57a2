//! The events of a driver's rings, where notifications are messages: the other end of [`crate::in_band`].
//!
//! A driver knows events only. Its kicks are collected here and sent as VRING_KICK, and a VRING_CALL that comes signals the ring's
//! call. While a kick has not been answered, those that follow it are collected, and become one.
//!
//! Spec: vhost-user, In-band notifications

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use virtnet_sys::{EventFd, Events, Poller};

use crate::front_session::FrontendRing;

/// The rings whose notifications are messages.
#[derive(Debug)]
pub(crate) struct Bells {
    rings: Vec<Ring>,
    /// Waits for kicks: the token is the ring.
    poller: Poller,
    events: Events,
}

#[derive(Debug)]
struct Ring {
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    kicked: bool,
    stopped: bool,
}

impl Bells {
    pub(crate) fn new(rings: &[FrontendRing]) -> io::Result<Self> {
        let poller = Poller::new()?;
        for (token, ring) in (0..).zip(rings) {
            poller.add(&*ring.kick, token)?;
        }
        let of = |ring: &FrontendRing| Ring {
            kick: Arc::clone(&ring.kick),
            call: Arc::clone(&ring.call),
            kicked: false,
            stopped: false,
        };
        Ok(Self {
            rings: rings.iter().map(of).collect(),
            poller,
            events: Events::with_capacity(64),
        })
    }

    /// Notes the kicks that the driver has given.
    pub(crate) fn collect(&mut self) {
        if self
            .poller
            .wait(&mut self.events, Some(Duration::ZERO))
            .is_err()
        {
            return;
        }
        for event in self.events.iter() {
            let ring = usize::try_from(event.token).ok();
            if let Some(ring) = ring.and_then(|ring| self.rings.get_mut(ring)) {
                ring.kicked |= ring.kick.drain();
            }
        }
    }

    /// Takes the rings that are to be kicked.
    pub(crate) fn kicked(&mut self) -> impl Iterator<Item = u32> {
        let rings = (0..).zip(&mut self.rings);
        let running = rings.filter(|(_, ring)| !ring.stopped);
        running.filter_map(|(index, ring)| std::mem::take(&mut ring.kicked).then_some(index))
    }

    /// A ring is stopped, or started again: a kick would start one that is stopped, so it has to wait.
    pub(crate) fn set_stopped(&mut self, ring: u32, stopped: bool) {
        let ring = usize::try_from(ring)
            .ok()
            .and_then(|ring| self.rings.get_mut(ring));
        if let Some(ring) = ring {
            ring.stopped = stopped;
        }
    }

    /// A VRING_CALL has come; whether there is such a ring.
    pub(crate) fn call(&self, ring: u32) -> bool {
        let ring = usize::try_from(ring)
            .ok()
            .and_then(|ring| self.rings.get(ring));
        // Our own eventfd: it cannot refuse a signal.
        ring.map(|ring| drop(ring.call.signal())).is_some()
    }
}

impl AsFd for Bells {
    /// Readable when there are kicks to send.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::RingAddresses;

    #[test]
    fn kicks_become_one_and_calls_are_those_of_their_ring() {
        let ring = || FrontendRing {
            size: 4,
            base: 0,
            addresses: RingAddresses::default(),
            kick: Arc::new(EventFd::new().unwrap()),
            call: Arc::new(EventFd::new().unwrap()),
        };
        let rings = [ring(), ring()];
        let mut bells = Bells::new(&rings).unwrap();
        bells.collect();
        assert_eq!(bells.kicked().count(), 0);
        for _ in 0..3 {
            rings[1].kick.signal().unwrap();
            bells.collect();
        }
        assert_eq!(bells.kicked().collect::<Vec<_>>(), [1]);
        assert_eq!(bells.kicked().count(), 0, "they have been taken");
        rings[0].kick.signal().unwrap();
        bells.set_stopped(0, true);
        bells.collect();
        assert_eq!(bells.kicked().count(), 0, "it would start the ring");
        bells.set_stopped(0, false);
        assert_eq!(bells.kicked().collect::<Vec<_>>(), [0]);

        assert!(bells.call(0) && !bells.call(2));
        assert!(rings[0].call.drain() && !rings[1].call.drain());
    }
}
