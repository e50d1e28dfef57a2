//! A connection as a port: frames follow each other in a stream of bytes, each behind its length, over TCP or a unix socket.
//!
//! The other end is a QEMU guest (`-netdev stream`), another virtnet, or whoever frames packets so: four bytes of length,
//! big-endian, then the frame. One peer at a time; others wait in line until it has gone.
//!
//! It guarantees that a peer which sends a length that no frame has loses its connection and nothing else, that frames which had
//! not left when a peer went are counted as dropped, and that the other end is found again when it comes back.
//!
//! In a packet's way this is a first and a last step with two copies on each side: frames pass through a buffer that holds what
//! fits into one system call. Connections are made on the control thread and handed over. Nothing is left to be done by the other
//! end.

mod framing;
mod service;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, PortCounters};
use virtnet_sys::{Connection, Endpoint, Events, Interest, Poller};

use crate::{Control, PortError, Served};
use framing::{FRAME_MAX, Incoming, Outgoing};
pub use service::StreamWatch;
use service::{Shared, StreamService};

/// Tokens of what a worker waits for.
const BELL: u64 = 0;
const CONNECTION: u64 = 1;

/// A connection as a port.
#[derive(Debug)]
pub struct StreamPort {
    connection: Option<Connection>,
    incoming: Incoming,
    outgoing: Outgoing,
    /// The poller waits for room to write as well.
    wants_room: bool,
    poller: Poller,
    events: Events,
    shared: Arc<Shared>,
    counters: PortCounters,
    _served: Served<StreamService>,
}

impl StreamPort {
    /// Listens at `at`, or as `client` connects to it again and again.
    ///
    /// # Errors
    /// [`PortError::System`]: somebody else has the address or path.
    pub fn open(at: &Endpoint, client: bool, control: &Control) -> Result<Self, PortError> {
        let failed = |source| PortError::io("wait for a connection", source);
        let shared = Arc::new(Shared::new(client).map_err(failed)?);
        let poller = Poller::new().map_err(failed)?;
        poller.add(&shared.bell, BELL).map_err(failed)?;
        let service = StreamService::new(at, client, &shared)?;
        Ok(Self {
            connection: None,
            incoming: Incoming::default(),
            outgoing: Outgoing::default(),
            wants_room: false,
            poller,
            events: Events::with_capacity(2),
            shared,
            counters: PortCounters::default(),
            _served: control.add(service)?,
        })
    }

    /// Asks how the port stands, wherever it is.
    #[must_use]
    pub fn watch(&self) -> StreamWatch {
        StreamWatch::of(&self.shared)
    }

    /// The connection is over: what had not left is dropped, and the control thread looks for another.
    fn lose(&mut self, why: Option<String>) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        // It was added when it came, and only this takes it out.
        drop(self.poller.remove(&connection));
        drop(connection);
        let (frames, bytes) = self.outgoing.abandon();
        self.counters.sent -= frames;
        self.counters.sent_bytes -= bytes;
        let frames = usize::try_from(frames).unwrap_or(usize::MAX);
        self.counters.tx_drops.add(DropReason::PortDown, frames);
        self.incoming = Incoming::default();
        self.wants_room = false;
        self.shared.lost(why);
    }

    /// Writes what waits, as far as the other end takes it.
    fn write(&mut self) {
        let Some(connection) = &self.connection else {
            return;
        };
        while !self.outgoing.is_empty() {
            match connection.write(self.outgoing.bytes()) {
                Ok(n) => self.outgoing.written(n),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return self.lose(reason(&error)),
            }
        }
        let wants_room = !self.outgoing.is_empty();
        if wants_room != self.wants_room {
            let interest = Interest::of(wants_room);
            self.wants_room = wants_room;
            if let Err(error) = self.poller.modify(connection, CONNECTION, interest) {
                self.lose(Some(error.to_string()));
            }
        }
    }

    /// Reads what is there once, if the buffer has less than a frame.
    fn read(&mut self) {
        let Some(connection) = &self.connection else {
            return;
        };
        match connection.read(self.incoming.room()) {
            Ok(0) => self.lose(None),
            Ok(n) => self.incoming.filled(n),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => self.lose(reason(&error)),
        }
    }

    /// Appends the frames that are whole.
    fn unpack(&mut self, burst: &mut Burst) {
        while burst.room() > 0 {
            match self.incoming.next() {
                Ok(Some(frame)) => {
                    self.counters.received += 1;
                    self.counters.received_bytes += frame.len() as u64;
                    if frame.len() < ETHERNET_LEN {
                        self.counters.rx_drops.add(DropReason::Runt, 1);
                    } else if frame.len() > FRAME_MAX {
                        self.counters.rx_drops.add(DropReason::TooBig, 1);
                    } else {
                        burst.push_bytes(frame, Offload::default());
                    }
                }
                Ok(None) => return,
                Err(wrong) => return self.lose(Some(wrong.to_string())),
            }
        }
    }
}

/// That the other end has gone is no reason; anything else is one.
fn reason(error: &io::Error) -> Option<String> {
    let gone = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
    (!gone.contains(&error.kind())).then(|| error.to_string())
}

impl Port for StreamPort {
    fn sync(&mut self) -> bool {
        let Some(connection) = self.shared.taken() else {
            return false;
        };
        match self.poller.add(&connection, CONNECTION) {
            Ok(()) => self.connection = Some(connection),
            Err(error) => self.shared.lost(Some(error.to_string())),
        }
        true
    }

    fn rx(&mut self, burst: &mut Burst) -> usize {
        let before = burst.len();
        if self.wants_room {
            self.write();
        }
        self.unpack(burst);
        if burst.room() > 0 {
            self.read();
            self.unpack(burst);
        }
        burst.len() - before
    }

    fn is_up(&self) -> bool {
        self.connection.is_some()
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        if self.connection.is_none() {
            self.drop_tx(DropReason::PortDown, picks.len());
            return picks.len();
        }
        for (done, i) in picks.iter().enumerate() {
            let len = burst.frame_len(i);
            if len > FRAME_MAX {
                self.drop_tx(DropReason::TooBig, 1);
                continue;
            }
            if !self.outgoing.has_room(len) {
                self.write();
                if self.connection.is_none() {
                    self.drop_tx(DropReason::PortDown, picks.len() - done);
                    return picks.len();
                }
                if !self.outgoing.has_room(len) {
                    return done;
                }
            }
            self.outgoing.push(len, |bytes| {
                burst.copy_frame(i, bytes);
            });
            self.counters.sent += 1;
            self.counters.sent_bytes += len as u64;
        }
        picks.len()
    }

    fn flush(&mut self) {
        self.write();
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.incoming.has_frame()
            || self
                .poller
                .wait(&mut self.events, Some(Duration::ZERO))
                .is_ok_and(|ready| ready > 0)
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}
