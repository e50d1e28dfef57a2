//! The front-end's end of a connection: attaches a driver of ours to somebody's back-end.
//!
//! [`Frontend`] sends what a [`FrontendSession`] has to say and hands it the answers. It never waits: whoever serves the
//! connection calls [`Frontend::on_readable`] when there is something to read, and gets [`FrontendEvent`]s; a back-end
//! that leaves a request unanswered is given up by [`Frontend::on_tick`].
//!
//! An error ends the connection: drop the front-end, and connect again.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use virtnet_sys::{PeerCredentials, Stream};

use crate::connection::{Connection, Patience};
use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::front_session::{FrontendEvent, FrontendRing, FrontendSession, FrontendSetup, Offered};
use crate::regions::{InflightFile, LogFile};
use crate::session::RingAddresses;

/// How long a back-end may take to answer; mapping much memory takes some of it.
const REPLY_PATIENCE: Duration = Duration::from_secs(10);

/// A connection to a back-end.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    session: FrontendSession,
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
        let (connection, session) = (Connection::new(stream), FrontendSession::new(wanted));
        let mut frontend = Self {
            connection,
            session,
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
        Ok(std::iter::from_fn(|| self.session.next_event()).collect())
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
        self.session.set_up(setup)?;
        self.send()
    }

    /// Asks the back-end to stop a ring; [`FrontendEvent::RingStopped`] says where.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn stop_ring(&mut self, ring: u32) -> Result<(), SessionError> {
        self.session.stop_ring(ring);
        self.send()
    }

    /// Starts a ring again that was stopped.
    ///
    /// # Errors
    /// There can be no such ring; out of descriptors; the connection is gone.
    pub fn start_ring(&mut self, index: u32, ring: &FrontendRing) -> Result<(), SessionError> {
        self.session.start_ring(index, ring)?;
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

    /// Hands out the record of buffers in flight, if there is one: for the back-end after this one.
    pub fn take_inflight(&mut self) -> Option<InflightFile> {
        self.session.take_inflight()
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
