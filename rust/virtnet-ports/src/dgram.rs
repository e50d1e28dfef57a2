//! A datagram socket as a port: a frame is a datagram, with nothing in front, over UDP or between two unix sockets.
//!
//! The other end is a QEMU guest (`-netdev dgram`), another virtnet, or whoever sends frames so. UDP datagrams of somebody else
//! than the remote are not received; whoever may write to a unix socket's path may send.
//!
//! It guarantees that an other end with no room is "no room" when some hundred frames wait for it here, and that one which is not there is a counted drop and an event, and
//! is found again when it comes.
//!
//! In a packet's way this is a first and a last step with one copy by the kernel and one by us on each side. Nothing is left to be
//! done by the other end.

mod backlog;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, PortCounters};
use virtnet_sys::{
    DATAGRAM_BATCH, DatagramBatch, DatagramSocket, Destination, Endpoint, Events, Poller, Timer,
    is_nobody, monotonic_ns,
};

use crate::PortError;
use crate::events::{EventLog, Peer, What};
use crate::vxlan::with_lost;
use backlog::Backlog;

/// Bytes that the kernel is asked to keep for us until we take them.
const SOCKET_BUFFER: usize = 4 << 20;

/// The longest frame: the largest segment, an Ethernet header and two tags.
const FRAME_MAX: usize = 65_535 + 14 + 8;

const EMSGSIZE: i32 = 90;
const ENOBUFS: i32 = 105;

/// A datagram socket as a port.
#[derive(Debug)]
pub struct DgramPort {
    socket: DatagramSocket,
    /// Where frames go; `None` where the socket is connected to it.
    remote: Option<Destination>,
    poller: Poller,
    events: Events,
    received: DatagramBatch,
    to_send: DatagramBatch,
    /// Counted as sent already.
    backlog: Backlog,
    /// When to look for room for it.
    timer: Timer,
    shared: Arc<Shared>,
    counters: PortCounters,
}

#[derive(Debug)]
struct Shared {
    /// Nothing was refused for want of somebody since something came or went.
    there: AtomicBool,
    events: EventLog,
}

/// Asks a datagram port how it stands, wherever the port is.
#[derive(Clone, Debug)]
pub struct DgramWatch(Arc<Shared>);

impl DgramWatch {
    /// Whether somebody is at the other end, as far as is known: until something was sent, it is taken for there.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.0.there.load(Ordering::Relaxed)
    }

    /// What has happened.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }
}

impl DgramPort {
    /// Opens a socket at `local` for frames to and from `remote`.
    ///
    /// # Errors
    /// [`PortError::Option`]: they are of different kinds; [`PortError::System`]: somebody else has the address or path.
    pub fn open(local: &Endpoint, remote: &Endpoint) -> Result<Self, PortError> {
        let same = match (local, remote) {
            (Endpoint::Inet(a), Endpoint::Inet(b)) => a.is_ipv4() == b.is_ipv4(),
            (Endpoint::Unix(_), Endpoint::Unix(_)) => true,
            _ => false,
        };
        if !same {
            return Err(PortError::Option {
                option: "remote",
                found: remote.to_string(),
                expected: format!("an address of the same kind as the local one, {local}"),
            });
        }
        let destination = Destination::try_from(remote)?;
        let socket = DatagramSocket::bind(local)?;
        socket.widen(SOCKET_BUFFER);
        let is_unix = matches!(remote, Endpoint::Unix(_));
        if !is_unix {
            let failed = |source| PortError::io(format!("send from {local} to {remote}"), source);
            socket.connect(&destination).map_err(failed)?;
        }
        let failed = |source| PortError::io("wait for a socket", source);
        let poller = Poller::new().map_err(failed)?;
        poller.add(&socket, 0).map_err(failed)?;
        let timer = Timer::new().map_err(failed)?;
        poller.add(&timer, 1).map_err(failed)?;
        Ok(Self {
            socket,
            // A path may be somebody else's the next time.
            remote: is_unix.then_some(destination),
            poller,
            events: Events::with_capacity(2),
            received: DatagramBatch::default(),
            to_send: DatagramBatch::default(),
            backlog: Backlog::default(),
            timer,
            shared: Arc::new(Shared {
                there: AtomicBool::new(true),
                events: EventLog::default(),
            }),
            counters: PortCounters::default(),
        })
    }

    /// Asks how the port stands, wherever it is.
    #[must_use]
    pub fn watch(&self) -> DgramWatch {
        DgramWatch(Arc::clone(&self.shared))
    }

    fn take(&mut self, i: usize, burst: &mut Burst) {
        self.counters.received += 1;
        let Some((frame, _)) = self.received.get(i) else {
            self.counters.rx_drops.add(DropReason::TooBig, 1);
            return;
        };
        self.counters.received_bytes += frame.len() as u64;
        if frame.len() < ETHERNET_LEN {
            self.counters.rx_drops.add(DropReason::Runt, 1);
        } else {
            burst.push_bytes(frame, Offload::default());
        }
    }

    fn somebody(&self) {
        if !self.shared.there.load(Ordering::Relaxed) {
            self.shared.there.store(true, Ordering::Relaxed);
            let peer = Peer::Socket;
            self.shared
                .events
                .record(What::Connected { peer, pid: None });
        }
    }

    fn nobody(&self, error: &io::Error) {
        if self.shared.there.swap(false, Ordering::Relaxed) {
            let why = error.to_string();
            self.shared.events.record(What::Nobody { why });
        }
    }

    /// Sends what is in `to_send`: how many of it were accepted or refused for good. Those accepted count as sent.
    fn send_batch(&mut self) -> usize {
        let mut done = 0;
        while done < self.to_send.len() {
            let rest = (done..self.to_send.len()).map(|i| (i, self.remote.as_ref()));
            let error = match self.socket.send(&self.to_send, rest) {
                Ok(n) => {
                    let frames = (done..done + n).filter_map(|i| self.to_send.get(i));
                    self.counters.sent_bytes +=
                        frames.map(|(frame, _)| frame.len() as u64).sum::<u64>();
                    self.counters.sent += n as u64;
                    done += n;
                    if self.remote.is_some() {
                        self.somebody();
                    }
                    continue;
                }
                Err(error) => error,
            };
            let reason = match (error.kind(), error.raw_os_error()) {
                (ErrorKind::Interrupted, _) => continue,
                (ErrorKind::WouldBlock, _) | (_, Some(ENOBUFS)) => break,
                (_, Some(EMSGSIZE)) => DropReason::TooBig,
                _ if is_nobody(&error) => {
                    self.nobody(&error);
                    DropReason::PortDown
                }
                _ => DropReason::SendError,
            };
            self.counters.tx_drops.add(reason, 1);
            done += 1;
        }
        done
    }

    /// Sends what waits, as far as there is room now.
    fn send_backlog(&mut self) {
        while !self.backlog.is_empty() {
            self.to_send.clear();
            let mut bytes = 0;
            for frame in self.backlog.frames() {
                if !self
                    .to_send
                    .push(frame.len(), |to| to.copy_from_slice(frame))
                {
                    break;
                }
                bytes += frame.len() as u64;
            }
            let n = self.to_send.len();
            // They are counted anew, as what becomes of them.
            self.counters.sent -= n as u64;
            self.counters.sent_bytes -= bytes;
            let gone = self.send_batch();
            let left = (gone..n).filter_map(|i| self.to_send.get(i));
            self.counters.sent += (n - gone) as u64;
            self.counters.sent_bytes += left.map(|(frame, _)| frame.len() as u64).sum::<u64>();
            self.backlog.gone(gone);
            if gone < n {
                return;
            }
        }
    }

    /// Has a frame wait; false if too many do.
    fn keep(&mut self, burst: &Burst, i: usize) -> bool {
        let len = burst.frame_len(i);
        let kept = self.backlog.push(len, |bytes| {
            burst.copy_frame(i, bytes);
        });
        if kept {
            self.counters.sent += 1;
            self.counters.sent_bytes += len as u64;
        }
        kept
    }
}

impl Port for DgramPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        self.send_backlog();
        let before = burst.len();
        let mut refused = false;
        while burst.room() > 0 {
            let wanted = burst.room().min(DATAGRAM_BATCH);
            let n = match self.socket.receive(&mut self.received, wanted) {
                Ok(n) => n,
                // Told once, in front of what has come; there may be more of it.
                Err(error) if is_nobody(&error) && !refused => {
                    self.nobody(&error);
                    refused = true;
                    continue;
                }
                Err(_) => break,
            };
            self.somebody();
            for i in 0..n {
                self.take(i, burst);
            }
            if n < wanted {
                break;
            }
        }
        burst.len() - before
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        self.send_backlog();
        let mut done = 0;
        while done < picks.len() {
            self.to_send.clear();
            for i in picks.iter().skip(done) {
                let len = burst.frame_len(i);
                let write = |bytes: &mut [u8]| {
                    burst.copy_frame(i, bytes);
                };
                if len > FRAME_MAX || !self.to_send.push(len, write) {
                    break;
                }
            }
            let filled = self.to_send.len();
            if filled == 0 {
                // The next one is longer than any.
                self.counters.tx_drops.add(DropReason::TooBig, 1);
                done += 1;
                continue;
            }
            let accepted = if self.backlog.is_empty() {
                self.send_batch()
            } else {
                0
            };
            let rest = picks.iter().skip(done + accepted).take(filled - accepted);
            let kept = rest.take_while(|&i| self.keep(burst, i)).count();
            done += accepted + kept;
            if accepted + kept < filled {
                break;
            }
        }
        done
    }

    fn flush(&mut self) {
        self.send_backlog();
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn arm(&mut self) -> bool {
        let again = (!self.backlog.is_empty()).then(|| monotonic_ns() + self.backlog.nap_ns());
        // One that has rung is silenced by being set.
        if self.timer.set(again).is_err() {
            return true;
        }
        self.poller
            .wait(&mut self.events, Some(Duration::ZERO))
            .is_ok_and(|ready| ready > 0)
    }

    fn counters(&self) -> PortCounters {
        with_lost(self.counters, &self.socket)
    }
}
