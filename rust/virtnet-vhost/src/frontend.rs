//! The front-end's end of a connection: attaches a driver of ours to somebody's back-end.
//!
//! [`Frontend`] sends what a [`FrontendSession`] has to say and hands it the answers. It never waits: whoever serves the
//! connection calls [`Frontend::on_readable`] when there is something to read, and gets [`FrontendEvent`]s; a back-end
//! that leaves a request unanswered is given up by [`Frontend::on_tick`].
//!
//! An error ends the connection: drop the front-end, and connect again.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use virtnet_sys::{PeerCredentials, Stream};

use crate::bells::Bells;
use crate::channel::{FrontAsked, FrontChannel};
use crate::connection::{Connection, Patience};
use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::front_session::{FrontendEvent, FrontendRing, FrontendSession, FrontendSetup, Offered};
use crate::message::BackRequest;
use crate::payload::Iotlb;
use crate::regions::{InflightFile, LogFile};
use crate::session::RingAddresses;

/// How long a back-end may take to answer; mapping much memory takes some of it.
const REPLY_PATIENCE: Duration = Duration::from_secs(10);

/// The most requests of a back-end that one call serves, and that wait for an answer.
const MISSES_PER_CALL: usize = 512;

/// A connection to a back-end.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    session: FrontendSession,
    /// On which the back-end asks.
    channel: Option<FrontChannel>,
    channel_error: Option<SessionError>,
    /// Misses that have not been answered, in order.
    misses: VecDeque<FrontAsked>,
    /// The events of rings, where notifications are messages.
    bells: Option<Bells>,
    patience: Patience,
}

impl Frontend {
    /// Begins a session with a back-end that we have connected to, or that has connected.
    ///
    /// # Errors
    /// The connection is gone already.
    pub fn start(stream: Stream) -> Result<Self, SessionError> {
        // The others are for whoever has a guest: its configuration space, and its moving to another host.
        let wanted = ProtocolFeatures::FRONTEND
            - (ProtocolFeatures::CONFIG | ProtocolFeatures::LOG_SHMFD | ProtocolFeatures::RARP);
        Self::start_with(stream, wanted)
    }

    /// Begins a session that accepts no other protocol features than these, as [`FrontendSession::new`].
    ///
    /// # Errors
    /// The connection is gone already.
    pub fn start_with(stream: Stream, wanted: ProtocolFeatures) -> Result<Self, SessionError> {
        let (session, channel) = if wanted.contains(ProtocolFeatures::BACKEND_REQ) {
            let ends = Stream::pair().map_err(|source| SessionError::Io {
                operation: "make a channel for",
                source,
            })?;
            let session = FrontendSession::with_channel(wanted, ends.1.into());
            (session, Some(FrontChannel::new(ends.0)))
        } else {
            (FrontendSession::new(wanted), None)
        };
        let mut frontend = Self {
            connection: Connection::new(stream),
            session,
            channel,
            channel_error: None,
            misses: VecDeque::new(),
            bells: None,
            patience: Patience::default(),
        };
        frontend.send()?;
        Ok(frontend)
    }

    /// Serves the answers that are there; never waits.
    ///
    /// # Errors
    /// The connection has ended: the back-end is gone, refused what cannot be done without, or talks nonsense.
    pub fn on_readable(&mut self) -> Result<Vec<FrontendEvent>, SessionError> {
        while let Some(message) = self.connection.receive()? {
            self.session.answered(message)?;
            self.send()?;
        }
        let mut events: Vec<_> = std::iter::from_fn(|| self.session.next_event()).collect();
        self.serve_channel(&mut events);
        self.send_kicks()?;
        Ok(events)
    }

    /// Sends the kicks of rings whose notifications are messages, when the ones before have been answered.
    fn send_kicks(&mut self) -> Result<(), SessionError> {
        let Some(bells) = &mut self.bells else {
            return self.send();
        };
        if self.channel.is_none() {
            // Nothing is lost by polling, but nobody here polls: without calls it would stand still for ever.
            let why = self.channel_error.as_ref().map(ToString::to_string);
            return Err(SessionError::NoCalls {
                why: why.unwrap_or_else(|| "there is none".to_owned()),
            });
        }
        bells.collect();
        if self.session.is_idle() {
            bells.kicked().for_each(|ring| self.session.kick(ring));
        }
        self.send()
    }

    /// Sends on what the back-end did not take before; to be called when [`Frontend::wants_write`].
    ///
    /// # Errors
    /// The connection is gone.
    pub fn on_writable(&mut self) -> Result<(), SessionError> {
        self.connection.flush()
    }

    /// Gives up a back-end that leaves half a message, or a request without an answer; to be called about once a second.
    ///
    /// # Errors
    /// It did.
    pub fn on_tick(&mut self, now_ns: u64) -> Result<(), SessionError> {
        self.connection.check_progress(now_ns)?;
        let awaited = self.session.awaited();
        let waited = self
            .patience
            .waited(awaited.map(|(_, number)| number), now_ns);
        match awaited {
            Some((request, _)) if waited >= REPLY_PATIENCE => Err(SessionError::NoReply {
                request,
                after: REPLY_PATIENCE,
            }),
            _ => Ok(()),
        }
    }

    /// Tells whether a request waits until the back-end reads.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Tells the back-end what was chosen. Once, after [`FrontendEvent::Offered`].
    ///
    /// # Errors
    /// Called at another time; more memory or rings than the back-end takes; out of descriptors; the connection is gone.
    pub fn set_up(&mut self, setup: FrontendSetup) -> Result<(), SessionError> {
        let bells = self
            .session
            .is_in_band()
            .then(|| Bells::new(&setup.rings))
            .transpose()
            .map_err(|source| SessionError::Io {
                operation: "wait for kicks for",
                source,
            })?;
        self.session.set_up(setup)?;
        self.bells = bells;
        self.send()
    }

    /// Readable when there are kicks to be sent as messages; to be waited for beside the connection.
    #[must_use]
    pub fn kicks(&self) -> Option<BorrowedFd<'_>> {
        self.bells.as_ref().map(AsFd::as_fd)
    }

    /// Asks the back-end to stop a ring; [`FrontendEvent::RingStopped`] says where.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn stop_ring(&mut self, ring: u32) -> Result<(), SessionError> {
        self.session.stop_ring(ring);
        if let Some(bells) = &mut self.bells {
            bells.set_stopped(ring, true);
        }
        self.send()
    }

    /// Starts a ring again that was stopped.
    ///
    /// # Errors
    /// There can be no such ring; out of descriptors; the connection is gone.
    pub fn start_ring(&mut self, index: u32, ring: &FrontendRing) -> Result<(), SessionError> {
        self.session.start_ring(index, ring)?;
        if let Some(bells) = &mut self.bells {
            bells.set_stopped(index, false);
        }
        self.send()
    }

    /// Enables or disables a ring.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn enable_ring(&mut self, ring: u32, enabled: bool) -> Result<(), SessionError> {
        self.session.enable_ring(ring, enabled);
        self.send()
    }

    /// Hands over the dirty log, as [`FrontendSession::set_log`].
    ///
    /// # Errors
    /// The back-end has no such log; the connection is gone.
    pub fn set_log(&mut self, log: LogFile) -> Result<(), SessionError> {
        self.session.set_log(log)?;
        self.send()
    }

    /// Begins or ends logging what the back-end writes, as [`FrontendSession::set_logging`].
    ///
    /// # Errors
    /// The back-end cannot log, or does not run yet; the connection is gone.
    pub fn set_logging(&mut self, on: bool, rings: &[RingAddresses]) -> Result<(), SessionError> {
        self.session.set_logging(on, rings)?;
        self.send()
    }

    /// Has the back-end announce a guest that has moved, as [`FrontendSession::send_rarp`].
    ///
    /// # Errors
    /// The back-end cannot announce anything; the connection is gone.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), SessionError> {
        self.session.send_rarp(mac)?;
        self.send()
    }

    /// Tells that the memory's pages will come later, as [`FrontendSession::advise_postcopy`].
    ///
    /// # Errors
    /// Not between the offer and the memory; PAGEFAULT was not negotiated; the connection is gone.
    pub fn advise_postcopy(&mut self) -> Result<(), SessionError> {
        self.session.advise_postcopy()?;
        self.send()
    }

    /// The back-end's userfaultfd, after [`FrontendEvent::MemoryMapped`].
    pub fn take_userfault(&mut self) -> Option<OwnedFd> {
        self.session.take_userfault()
    }

    /// Says that faults are served from now on, as [`FrontendSession::memory_is_served`].
    ///
    /// # Errors
    /// The back-end has not said where it has the memory; the connection is gone.
    pub fn memory_is_served(&mut self) -> Result<(), SessionError> {
        self.session.memory_is_served()?;
        self.send()
    }

    /// Tells that all pages have arrived; [`FrontendEvent::PostcopyEnded`] says that it is over.
    ///
    /// # Errors
    /// Nobody serves faults; the connection is gone.
    pub fn end_postcopy(&mut self) -> Result<(), SessionError> {
        self.session.end_postcopy()?;
        self.send()
    }

    /// Hands out the record of buffers in flight, if there is one: for the back-end after this one.
    pub fn take_inflight(&mut self) -> Option<InflightFile> {
        self.session.take_inflight()
    }

    /// Has the device reset; the handshake begins anew where features are chosen: [`FrontendEvent::Offered`] comes once more.
    ///
    /// # Errors
    /// The back-end cannot be reset; the connection is gone.
    pub fn reset(&mut self) -> Result<(), SessionError> {
        self.session.reset()?;
        self.send()
    }

    /// Asks how the device is; [`FrontendEvent::NeedsReset`] comes if it has to be reset.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn check_status(&mut self) -> Result<(), SessionError> {
        self.session.check_status();
        self.send()
    }

    /// Hands over the end of a pipe for the device's state, as [`FrontendSession::transfer_state`].
    ///
    /// # Errors
    /// The back-end does not do that; the connection is gone.
    pub fn transfer_state(&mut self, load: bool, pipe: OwnedFd) -> Result<(), SessionError> {
        self.session.transfer_state(load, pipe)?;
        self.send()
    }

    /// The pipe that the back-end wants to use instead, after [`FrontendEvent::StatePipe`].
    pub fn take_state_pipe(&mut self) -> Option<OwnedFd> {
        self.session.take_state_pipe()
    }

    /// Asks whether that worked; [`FrontendEvent::StateDone`] says that it did.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn check_state(&mut self) -> Result<(), SessionError> {
        self.session.check_state();
        self.send()
    }

    /// Tells a translation, or takes one back; [`FrontendEvent::Translated`] says that it was done.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn translate(&mut self, translation: Iotlb) -> Result<(), SessionError> {
        self.session.translate(translation);
        self.send()
    }

    /// Answers the oldest [`FrontendEvent::Miss`] that has no answer yet: whether the translation has been told.
    pub fn answer_miss(&mut self, told: bool) {
        let Some(asked) = self.misses.pop_front() else {
            return;
        };
        self.with_channel(|channel| channel.acknowledge(&asked, u64::from(!told)));
    }

    /// The socket on which the back-end asks, to be waited for beside the connection's, and whether an answer waits to be sent.
    #[must_use]
    pub fn channel(&self) -> Option<(BorrowedFd<'_>, bool)> {
        let connection = self.channel.as_ref()?.connection();
        Some((connection.stream().as_fd(), connection.wants_write()))
    }

    /// Returns why the channel was given up, if it was.
    #[must_use]
    pub fn channel_error(&self) -> Option<&SessionError> {
        self.channel_error.as_ref()
    }

    /// Serves what the back-end asks on its channel.
    fn serve_channel(&mut self, events: &mut Vec<FrontendEvent>) {
        let protocol = self.session.protocol_features();
        // A back-end that asks faster than it can be answered comes round again.
        for _ in 0..MISSES_PER_CALL {
            let Some(Some(asked)) = self.with_channel(|channel| channel.next(protocol)) else {
                return;
            };
            match asked.request {
                BackRequest::IotlbMsg(miss) if self.misses.len() < MISSES_PER_CALL => {
                    events.push(FrontendEvent::Miss(miss));
                    self.misses.push_back(asked);
                }
                BackRequest::ConfigChange => {
                    self.session.read_config();
                    self.with_channel(|channel| channel.acknowledge(&asked, 0));
                }
                BackRequest::VringCall(state) => {
                    let rings = self.bells.as_ref();
                    let is_there = rings.is_some_and(|bells| bells.call(state.index));
                    let code = u64::from(!is_there);
                    self.with_channel(|channel| channel.acknowledge(&asked, code));
                }
                BackRequest::VringErr(state) => {
                    events.push(FrontendEvent::RingBroken { ring: state.index });
                    self.with_channel(|channel| channel.acknowledge(&asked, 0));
                }
                _ => {
                    self.with_channel(|channel| channel.acknowledge(&asked, 1));
                }
            }
        }
    }

    /// Does something with the channel; one that fails is given up, and the session goes on without.
    fn with_channel<R>(
        &mut self,
        work: impl FnOnce(&mut FrontChannel) -> Result<R, SessionError>,
    ) -> Option<R> {
        match work(self.channel.as_mut()?) {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.channel = None;
                self.channel_error = Some(error);
                None
            }
        }
    }

    /// Returns what the back-end offers, as far as it is known.
    #[must_use]
    pub fn offered(&self) -> &Offered {
        self.session.offered()
    }

    /// Returns what has been agreed so far.
    #[must_use]
    pub fn session(&self) -> &FrontendSession {
        &self.session
    }

    /// Returns who the back-end is.
    ///
    /// # Errors
    /// None in practice.
    pub fn peer(&self) -> std::io::Result<PeerCredentials> {
        self.connection.stream().peer()
    }

    fn send(&mut self) -> Result<(), SessionError> {
        while let Some((bytes, fds)) = self.session.next_message() {
            self.connection.send(bytes, fds)?;
        }
        Ok(())
    }
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.stream().as_fd()
    }
}
