//! Kicks and calls that travel as messages, where a front-end has agreed on that and hands over no events.
//!
//! A device knows events only. So a ring that has none gets events of our own in their place: a VRING_KICK message signals its kick,
//! and its call, when the device signals it, becomes a VRING_CALL over the back-end's channel. The packets' way is the same.
//!
//! While a call has not been answered it is not sent again; whatever the device has used meanwhile is told once, when the answer is
//! there. So a front-end that is slow to answer is not buried.
//!
//! Spec: vhost-user, In-band notifications

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use virtnet_sys::{EventFd, Events, Poller};

use crate::message::BackRequest;
use crate::payload::VringState;
use crate::session::RingSetup;

/// Stand-ins for the events of rings.
#[derive(Debug)]
pub(crate) struct InBand {
    rings: Vec<Ring>,
    /// Waits for calls and errors: token twice the ring, and one more for its errors.
    poller: Poller,
    events: Events,
}

#[derive(Debug, Default)]
struct Ring {
    kick: Option<Arc<EventFd>>,
    call: Told,
    err: Told,
}

/// Something of a ring that the front-end is told.
#[derive(Debug, Default)]
struct Told {
    event: Option<Arc<EventFd>>,
    /// The front-end has not answered yet.
    asked: bool,
    /// It came once more meanwhile.
    again: bool,
}

impl InBand {
    pub(crate) fn new(rings: usize) -> io::Result<Self> {
        Ok(Self {
            rings: (0..rings).map(|_| Ring::default()).collect(),
            poller: Poller::new()?,
            events: Events::with_capacity(64),
        })
    }

    /// Gives a ring that starts the events it has not got.
    pub(crate) fn complete(&mut self, ring: usize, setup: &mut RingSetup) -> io::Result<()> {
        setup.kick = self.kick_of(ring, setup.kick.take())?;
        setup.call = self.call_of(ring, setup.call.take())?;
        setup.err = self.err_of(ring, setup.err.take())?;
        Ok(())
    }

    /// The kick of a ring: the front-end's own, or one that messages signal.
    pub(crate) fn kick_of(
        &mut self,
        ring: usize,
        own: Option<Arc<EventFd>>,
    ) -> io::Result<Option<Arc<EventFd>>> {
        let ours = match own {
            Some(_) => None,
            None => Some(Arc::new(EventFd::new()?)),
        };
        if let Some(ring) = self.rings.get_mut(ring) {
            ring.kick.clone_from(&ours);
        }
        Ok(own.or(ours))
    }

    /// The call of a ring: the front-end's own, or one that becomes a message.
    pub(crate) fn call_of(
        &mut self,
        ring: usize,
        own: Option<Arc<EventFd>>,
    ) -> io::Result<Option<Arc<EventFd>>> {
        self.told(2 * ring, own)
    }

    /// The error event of a ring, likewise.
    pub(crate) fn err_of(
        &mut self,
        ring: usize,
        own: Option<Arc<EventFd>>,
    ) -> io::Result<Option<Arc<EventFd>>> {
        self.told(2 * ring + 1, own)
    }

    fn told(
        &mut self,
        token: usize,
        own: Option<Arc<EventFd>>,
    ) -> io::Result<Option<Arc<EventFd>>> {
        let Some(told) = find(&mut self.rings, token) else {
            return Ok(own);
        };
        if let Some(before) = told.event.take() {
            self.poller.remove(&*before)?;
        }
        if own.is_some() {
            return Ok(own);
        }
        let event = Arc::new(EventFd::new()?);
        self.poller.add(&*event, token as u64)?;
        told.event = Some(Arc::clone(&event));
        Ok(Some(event))
    }

    /// A VRING_KICK has come. A ring whose kick is an event is kicked by that alone.
    pub(crate) fn kick(&self, ring: usize) {
        if let Some(kick) = self.rings.get(ring).and_then(|ring| ring.kick.as_ref()) {
            // Our own eventfd: it cannot refuse a signal.
            drop(kick.signal());
        }
    }

    /// Takes the calls that devices have made, as messages to be sent.
    pub(crate) fn calls(&mut self) -> Vec<BackRequest> {
        let waited = self.poller.wait(&mut self.events, Some(Duration::ZERO));
        if waited.is_err() {
            return Vec::new();
        }
        let mut calls = Vec::new();
        for event in self.events.iter() {
            let token = usize::try_from(event.token).unwrap_or(usize::MAX);
            let Some(told) = find(&mut self.rings, token) else {
                continue;
            };
            if !told.event.as_ref().is_some_and(|event| event.drain()) {
                continue;
            }
            if told.asked {
                told.again = true;
            } else {
                calls.push(message(token));
            }
        }
        calls
    }

    /// A message was sent, and will be answered or not.
    pub(crate) fn sent(&mut self, request: &BackRequest, acknowledged: bool) {
        if let Some(told) = token(request).and_then(|token| find(&mut self.rings, token)) {
            told.asked = acknowledged;
        }
    }

    /// A message was answered; what is to be sent now.
    pub(crate) fn answered(&mut self, request: &BackRequest) -> Option<BackRequest> {
        let token = token(request)?;
        let told = find(&mut self.rings, token)?;
        told.asked = false;
        std::mem::take(&mut told.again).then(|| message(token))
    }
}

impl AsFd for InBand {
    /// Readable when there are calls to send.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}

fn find(rings: &mut [Ring], token: usize) -> Option<&mut Told> {
    let ring = rings.get_mut(token / 2)?;
    Some(if token.is_multiple_of(2) {
        &mut ring.call
    } else {
        &mut ring.err
    })
}

fn message(token: usize) -> BackRequest {
    let state = VringState {
        index: u32::try_from(token / 2).unwrap_or(u32::MAX),
        num: 0,
    };
    if token.is_multiple_of(2) {
        BackRequest::VringCall(state)
    } else {
        BackRequest::VringErr(state)
    }
}

fn token(request: &BackRequest) -> Option<usize> {
    match request {
        BackRequest::VringCall(state) => Some(2 * usize::try_from(state.index).ok()?),
        BackRequest::VringErr(state) => Some(2 * usize::try_from(state.index).ok()? + 1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(index: u32) -> BackRequest {
        BackRequest::VringCall(VringState { index, num: 0 })
    }

    #[test]
    fn a_call_is_a_message_and_a_second_one_waits_for_the_answer() {
        let mut in_band = InBand::new(4).unwrap();
        let event = in_band.call_of(3, None).unwrap().unwrap();
        assert_eq!(in_band.calls(), []);
        event.signal().unwrap();
        assert_eq!(in_band.calls(), [call(3)]);
        in_band.sent(&call(3), true);
        for _ in 0..10 {
            event.signal().unwrap();
            assert_eq!(in_band.calls(), []);
        }
        assert_eq!(in_band.answered(&call(3)), Some(call(3)));
        in_band.sent(&call(3), true);
        assert_eq!(in_band.answered(&call(3)), None);
        event.signal().unwrap();
        assert_eq!(in_band.calls(), [call(3)]);
    }

    #[test]
    fn an_event_of_the_front_end_comes_first() {
        let mut in_band = InBand::new(1).unwrap();
        let own = Arc::new(EventFd::new().unwrap());
        let kick = in_band.kick_of(0, Some(Arc::clone(&own))).unwrap().unwrap();
        in_band.kick(0);
        assert!(!kick.drain(), "the message says nothing");
        let ours = in_band.kick_of(0, None).unwrap().unwrap();
        in_band.kick(0);
        assert!(ours.drain());

        let ours = in_band.err_of(0, None).unwrap().unwrap();
        let theirs = in_band.err_of(0, Some(own)).unwrap().unwrap();
        ours.signal().unwrap();
        theirs.signal().unwrap();
        assert_eq!(in_band.calls(), []);
        // Rings that do not exist are nobody's.
        in_band.kick(7);
        assert!(in_band.call_of(7, None).unwrap().is_none());
        assert_eq!(in_band.answered(&call(7)), None);
    }
}
