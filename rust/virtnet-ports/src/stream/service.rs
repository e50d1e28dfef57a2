//! Who is at the other end: connections are made and found again here, on the control thread.

use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtnet_sys::{Acceptor, Connection, Endpoint, EventFd, Interest, monotonic_ns};

use crate::events::{EventLog, Peer, What};
use crate::{PortError, Service};

/// How long it takes until it is tried again to connect.
const AGAIN_NS: u64 = 250_000_000;

/// What the two halves of a port share.
#[derive(Debug)]
pub(super) struct Shared {
    /// A connection waits to be taken.
    there: AtomicBool,
    waiting: Mutex<Option<Connection>>,
    /// Wakes the worker for it.
    pub(super) bell: EventFd,
    /// Tells the control thread that a connection is over.
    over: EventFd,
    up: AtomicBool,
    client: bool,
    sessions: AtomicU64,
    peer: Mutex<Known>,
    events: EventLog,
}

#[derive(Debug, Default)]
struct Known {
    pid: Option<i32>,
    last_error: Option<String>,
}

impl Shared {
    pub(super) fn new(client: bool) -> std::io::Result<Self> {
        Ok(Self {
            there: AtomicBool::new(false),
            waiting: Mutex::default(),
            bell: EventFd::new()?,
            over: EventFd::new()?,
            up: AtomicBool::new(false),
            client,
            sessions: AtomicU64::new(0),
            peer: Mutex::default(),
            events: EventLog::default(),
        })
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that waits, if there is one.
    pub(super) fn taken(&self) -> Option<Connection> {
        if !self.there.load(Ordering::Acquire) {
            return None;
        }
        self.there.store(false, Ordering::Relaxed);
        self.bell.drain();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.take()
    }

    /// The connection is over, and why if the other end did not simply leave.
    pub(super) fn lost(&self, why: Option<String>) {
        self.up.store(false, Ordering::Relaxed);
        let mut known = self.known();
        known.pid = None;
        if why.is_some() {
            known.last_error.clone_from(&why);
        }
        drop(known);
        let peer = Peer::Socket;
        self.events.record(What::Disconnected { peer, why });
        // Ours, and never full: what is pending is enough.
        drop(self.over.signal());
    }

    fn hand_over(&self, connection: Connection) {
        let pid = connection.peer_pid();
        self.known().pid = pid;
        self.sessions.fetch_add(1, Ordering::Relaxed);
        let peer = Peer::Socket;
        self.events.record(What::Connected { peer, pid });
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        *waiting = Some(connection);
        drop(waiting);
        self.up.store(true, Ordering::Relaxed);
        self.there.store(true, Ordering::Release);
        // As above.
        drop(self.bell.signal());
    }

    fn nobody(&self, why: String) {
        self.known().last_error = Some(why.clone());
        self.events.record_if_new(What::Nobody { why });
    }
}

/// Asks how a port with a connection stands, wherever the port is and whether it is there or not.
#[derive(Clone, Debug)]
pub struct StreamWatch(Arc<Shared>);

impl StreamWatch {
    pub(super) fn of(shared: &Arc<Shared>) -> Self {
        Self(Arc::clone(shared))
    }

    /// Whether somebody is at the other end.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.up.load(Ordering::Relaxed)
    }

    /// Whether the port connects, rather than listens.
    #[must_use]
    pub fn is_client(&self) -> bool {
        self.0.client
    }

    /// How often somebody has come.
    #[must_use]
    pub fn sessions(&self) -> u64 {
        self.0.sessions.load(Ordering::Relaxed)
    }

    /// The process at the other end, where the system tells.
    #[must_use]
    pub fn peer_pid(&self) -> Option<i32> {
        self.0.known().pid
    }

    /// What ended a connection last, or kept one from being made.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        self.0.known().last_error.clone()
    }

    /// What has happened.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }
}

/// The control half.
#[derive(Debug)]
pub(super) struct StreamService {
    at: Endpoint,
    shared: Arc<Shared>,
    acceptor: Option<Acceptor>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// For somebody who connects.
    Listening,
    /// For the moment to try again.
    Resting(u64),
    Connecting(Connection),
    /// Until the worker says that the connection is over.
    Connected,
}

impl StreamService {
    pub(super) fn new(
        at: &Endpoint,
        client: bool,
        shared: &Arc<Shared>,
    ) -> Result<Self, PortError> {
        let acceptor = (!client).then(|| Acceptor::bind(at)).transpose()?;
        let state = if client {
            State::Resting(0)
        } else {
            State::Listening
        };
        Ok(Self {
            at: at.clone(),
            shared: Arc::clone(shared),
            acceptor,
            state,
        })
    }

    fn connected(&mut self, connection: Connection) {
        self.state = State::Connected;
        self.shared.hand_over(connection);
    }

    fn rest(&mut self, why: String) {
        self.shared.nobody(why);
        self.state = State::Resting(monotonic_ns() + AGAIN_NS);
    }
}

impl Service for StreamService {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Listening => self.acceptor.as_ref().map(AsFd::as_fd),
            State::Resting(_) => None,
            State::Connecting(connection) => Some(connection.as_fd()),
            State::Connected => Some(self.shared.over.as_fd()),
        }
    }

    fn interest(&self) -> Interest {
        match self.state {
            State::Connecting(_) => Interest::Writable,
            _ => Interest::Readable,
        }
    }

    fn on_ready(&mut self, now_ns: u64) -> Result<(), PortError> {
        match mem::replace(&mut self.state, State::Resting(now_ns + AGAIN_NS)) {
            State::Listening => {
                self.state = State::Listening;
                let accepted = self.acceptor.as_ref().map(Acceptor::accept);
                if let Some(Ok(connection)) = accepted {
                    self.connected(connection);
                } else if let Some(Err(error)) = accepted
                    && error.kind() != std::io::ErrorKind::WouldBlock
                {
                    let what = format!("take a connection at {}", self.at);
                    return Err(PortError::io(what, error));
                }
            }
            State::Connecting(connection) => match connection.finish() {
                Ok(connection) => self.connected(connection),
                Err(error) => self.rest(format!("cannot connect to {}: {error}", self.at)),
            },
            State::Connected => {
                if !self.shared.over.drain() {
                    self.state = State::Connected;
                } else if self.acceptor.is_some() {
                    self.state = State::Listening;
                }
            }
            resting @ State::Resting(_) => self.state = resting,
        }
        Ok(())
    }

    fn deadline_ns(&self) -> Option<u64> {
        match self.state {
            State::Resting(until) => Some(until),
            _ => None,
        }
    }

    fn on_timer(&mut self, _now_ns: u64) -> Result<(), PortError> {
        match Connection::begin(&self.at) {
            Ok(connection) => self.state = State::Connecting(connection),
            Err(error) => self.rest(error.to_string()),
        }
        Ok(())
    }
}
