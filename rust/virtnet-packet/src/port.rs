//! The place where packets enter and leave, and the smallest one: two ports back to back in memory.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Burst, DropReason, Offload, Offloads, Picks, PortCounters};

/// Which way a packet was going where a copy of it was taken, seen from the network as a host sees its interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)] // as bits 0 and 1 of epb_flags, draft-ietf-opsawg-pcapng, 4.3.1
pub enum Direction {
    /// Nobody knows.
    #[default]
    Unknown = 0,
    /// It came into the network.
    Inbound = 1,
    /// It was leaving the network.
    Outbound = 2,
}

/// Where copies of packets were taken, and which way the packets were going.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Which of the places that a port takes copies from.
    pub place: u16,
    /// Which way the packets were going.
    pub direction: Direction,
}

/// A place where packets enter and leave. One worker owns it and calls it; nothing here blocks.
///
/// A breath of the worker calls, in this order: [`sync`](Self::sync), [`rx`](Self::rx), then (after the burst has gone its way)
/// [`complete`](Self::complete) on the port it came from, and [`flush`](Self::flush) on every port that was sent to.
pub trait Port: Send + fmt::Debug {
    /// Says that the caller will now poll this port from one thread, until [`detach`](Self::detach).
    fn attach(&mut self) {}

    /// Says that the caller has stopped polling this port. Dropping the port says so too.
    fn detach(&mut self) {}

    /// Takes over what the control side has decided since the last breath (a ring started, memory changed). Must be cheap when
    /// there is nothing. Returns whether something was taken over.
    fn sync(&mut self) -> bool {
        false
    }

    /// Appends packets that have arrived to an empty `burst`; how many. Their bodies may stay in the peer's memory until
    /// [`complete`](Self::complete).
    fn rx(&mut self, burst: &mut Burst) -> usize;

    /// Gives back to the peer what the last [`rx`](Self::rx) took: its buffers are not looked at any more.
    fn complete(&mut self) {}

    /// Whether what is sent can reach anyone now: of a part of a port, whether it has a queue that takes packets.
    fn is_up(&self) -> bool {
        true
    }

    /// What packets given to [`tx`](Self::tx) may leave to be done; of what they leave beyond that they are to be relieved before.
    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    /// Sends the picked packets, in order; how many of them were accepted, counted from the front. An accepted packet is sent
    /// or counted in `tx_drops`; the others were not taken because there is no room now.
    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize;

    /// From how many places it takes copies, each with a cable to a gate of its own. 0, as of almost all ports: it has one gate,
    /// and is not told where packets come from.
    fn places(&self) -> u16 {
        0
    }

    /// As [`tx`](Self::tx) for a port with [`places`](Self::places): copies from one of them.
    fn tx_copies(&mut self, _from: Origin, burst: &Burst, picks: &Picks) -> usize {
        self.tx(burst, picks)
    }

    /// As [`drop_tx`](Self::drop_tx) for copies.
    fn drop_copies(&mut self, _from: Origin, reason: DropReason, n: usize) {
        self.drop_tx(reason, n);
    }

    /// Makes what was sent visible to the peer and wakes it if it asks for that.
    fn flush(&mut self) {}

    /// Counts `n` packets that were offered and dropped because [`tx`](Self::tx) had no room for them.
    fn drop_tx(&mut self, reason: DropReason, n: usize);

    /// A descriptor that becomes readable when packets arrive after [`arm`](Self::arm). `None`: this port never wakes anyone
    /// (it is always or never ready).
    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Asks the peer to notify. Returns whether packets (or changes for [`sync`](Self::sync)) are already waiting, so that
    /// sleeping now would be wrong.
    fn arm(&mut self) -> bool {
        false
    }

    /// Tells the peer that notifications are not needed: the worker polls.
    fn disarm(&mut self) {}

    /// What has passed so far.
    fn counters(&self) -> PortCounters;
}

/// Two ports back to back: what one sends the other receives.
pub type PortPair = (MemoryPort, MemoryPort);

/// Makes two ports back to back, each holding up to `capacity` packets that the other has not taken yet.
#[must_use]
pub fn memory_pair(capacity: usize) -> PortPair {
    let (left, right) = (Arc::default(), Arc::default());
    let port = |inbox: &Arc<Way>, outbox: &Arc<Way>| MemoryPort {
        inbox: Arc::clone(inbox),
        outbox: Arc::clone(outbox),
        capacity,
        bell: None,
        counters: PortCounters::default(),
    };
    (port(&left, &right), port(&right, &left))
}

/// How many buffers are kept for the next packets, and how large one may be.
const SPARE_MAX: usize = 1024;
const SPARE_BYTES_MAX: usize = 2048;

/// One direction.
#[derive(Debug, Default)]
struct Way {
    lane: Mutex<Lane>,
    /// How many packets are on their way, for who only wants to know that.
    waiting: AtomicUsize,
}

impl Way {
    fn lock(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_waiting(&self, lane: &Lane) {
        self.waiting.store(lane.packets.len(), Ordering::Relaxed);
    }
}

/// Asks how many packets the other end of a [`MemoryPort`] has not taken yet, from anywhere.
#[derive(Clone, Debug)]
pub struct Backlog {
    way: Arc<Way>,
    limit: usize,
}

impl Backlog {
    /// The same where `limit` packets are enough.
    #[must_use]
    pub fn limited(&self, limit: usize) -> Self {
        Self {
            way: Arc::clone(&self.way),
            limit,
        }
    }

    /// How many more may come before there are enough. Others may send meanwhile.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        let waiting = self.way.waiting.load(Ordering::Relaxed);
        self.limit.saturating_sub(waiting)
    }
}

/// What is on its way in one direction, and how its receiver wants to hear of it.
#[derive(Debug, Default)]
struct Lane {
    packets: VecDeque<(Offload, Vec<u8>)>,
    /// What packets lay in that were taken, to be used again: allocating takes longer than copying a short frame.
    spare: Vec<Vec<u8>>,
    /// The receiver sleeps on the other end of this; made when it first does.
    bell: Option<PipeWriter>,
    armed: bool,
    /// The bell has a byte in it that the receiver has not taken out.
    rung: bool,
}

/// One of two ports back to back in memory; see [`memory_pair`].
#[derive(Debug)]
pub struct MemoryPort {
    inbox: Arc<Way>,
    outbox: Arc<Way>,
    capacity: usize,
    bell: Option<PipeReader>,
    counters: PortCounters,
}

impl MemoryPort {
    /// What this end has not taken yet.
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        Backlog {
            way: Arc::clone(&self.inbox),
            limit: self.capacity,
        }
    }

    /// Has the sender ring when something comes. At most one byte is ever in the pipe, so that neither end blocks.
    fn listen(&mut self) -> io::Result<()> {
        let mut inbox = self.inbox.lock();
        if self.bell.is_none() {
            let (reader, writer) = io::pipe()?;
            inbox.bell = Some(writer);
            self.bell = Some(reader);
        }
        inbox.armed = true;
        Ok(())
    }
}

impl Port for MemoryPort {
    fn detach(&mut self) {
        let mut inbox = self.inbox.lock();
        inbox.armed = false;
        inbox.rung = false;
        inbox.bell = None;
        self.bell = None;
    }

    fn rx(&mut self, burst: &mut Burst) -> usize {
        let mut inbox = self.inbox.lock();
        let n = burst.room().min(inbox.packets.len());
        let Lane { packets, spare, .. } = &mut *inbox;
        for (offload, mut frame) in packets.drain(..n) {
            self.counters.received += 1;
            self.counters.received_bytes += frame.len() as u64;
            burst.push_bytes(&frame, offload);
            if spare.len() < SPARE_MAX && frame.capacity() <= SPARE_BYTES_MAX {
                frame.clear();
                spare.push(frame);
            }
        }
        self.inbox.tell_waiting(&inbox);
        n
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let mut outbox = self.outbox.lock();
        let room = self.capacity.saturating_sub(outbox.packets.len());
        for i in picks.iter().take(room) {
            let mut frame = outbox.spare.pop().unwrap_or_default();
            frame.resize(burst.frame_len(i), 0);
            burst.copy_frame(i, &mut frame);
            self.counters.sent += 1;
            self.counters.sent_bytes += frame.len() as u64;
            outbox.packets.push_back((burst.offload(i), frame));
        }
        self.outbox.tell_waiting(&outbox);
        picks.len().min(room)
    }

    fn flush(&mut self) {
        let mut outbox = self.outbox.lock();
        if outbox.armed && !outbox.rung && !outbox.packets.is_empty() {
            outbox.rung = outbox
                .bell
                .as_mut()
                .is_some_and(|bell| bell.write_all(&[0]).is_ok());
            self.counters.notifications += u64::from(outbox.rung);
        }
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.bell.as_ref().map(AsFd::as_fd)
    }

    fn arm(&mut self) -> bool {
        // Out of descriptors, it cannot be woken: better not to sleep.
        self.listen().is_err() || !self.inbox.lock().packets.is_empty()
    }

    fn disarm(&mut self) {
        let mut inbox = self.inbox.lock();
        inbox.armed = false;
        if inbox.rung
            && let Some(bell) = &mut self.bell
        {
            inbox.rung = bell.read_exact(&mut [0]).is_err();
        }
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

impl Drop for MemoryPort {
    fn drop(&mut self) {
        self.detach();
    }
}
