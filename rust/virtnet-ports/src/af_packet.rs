//! A network interface of the host as a port: an uplink, or the end of a veth pair.
//!
//! What arrives on the interface is received here, and what is sent here leaves by it, beside the host's own network stack.
//! Frames come in a ring that is shared with the kernel and go in batches, with a virtio-net header in front of each: packets that
//! leave carry their offload metadata in it, and so do those that arrive (a veth pair leaves checksums and segments undone, and
//! cards put segments together).
//!
//! An interface may have several queues: the kernel hands over all frames of a flow by the same of them. Queues may belong to
//! different workers ([`AfPacketPort::in_lanes`]), and each worker sends by a queue of its own.
//!
//! It guarantees that a full queue of the host is "no room", that everything else the host refuses is a counted drop, and so is
//! what the host has received and lost because nobody took it. An interface that is down comes back by itself; one that is deleted
//! leaves the port quiet.
//!
//! In a packet's way this is a first and a last step with one copy by the kernel and one by us on each side.

use std::cell::Cell;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use virtnet_mem::Gather;
use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload, Offloads, Picks, Port, PortCounters};
use virtnet_sys::{
    Events, PACKET_FRAME_MAX, PACKET_HEADER_LEN, PacketBatch, PacketFrame, PacketRing,
    PacketSocket, Poller,
};
use virtnet_virtio::net::header;

use crate::link::Watched;
use crate::tap::{COPIED_MAX, EFAULT, left_to_do, net_header};
use crate::{Control, InterfaceWatch, PortError};

/// Bytes of a VLAN tag.
const TAG_LEN: u16 = 4;

/// What the kernel answers when the link is down, or the interface is gone.
const ENETDOWN: i32 = 100;
const ENXIO: i32 = 6;
/// What the kernel answers when the queue of a card is full.
const ENOBUFS: i32 = 105;
/// What the kernel answers to a frame longer than the link's.
const EMSGSIZE: i32 = 90;

/// One of the sockets that share what arrives.
#[derive(Debug)]
struct Queue {
    socket: PacketSocket,
    ring: PacketRing,
}

/// A network interface as a port, or some of its queues as a part of one.
#[derive(Debug)]
pub struct AfPacketPort {
    /// At least one; what leaves, leaves by the first.
    queues: Vec<Queue>,
    /// Which queue is asked first.
    turn: usize,
    poller: Poller,
    events: Events,
    to_send: PacketBatch,
    counters: PortCounters,
    /// Frames that the kernel has lost, as far as it was asked.
    lost: Cell<usize>,
    interface: Option<Watched>,
}

impl AfPacketPort {
    /// Opens the interface `name`; with `promiscuous` frames for other stations are received too, as a switch needs it.
    ///
    /// # Errors
    /// [`PortError::System`]: which right is missing, or that there is no such interface.
    pub fn open(name: &str, promiscuous: bool) -> Result<Self, PortError> {
        let mut lanes = Self::in_lanes(name, promiscuous, 1, 1)?;
        lanes.pop().ok_or(PortError::NoService)
    }

    /// The same with `queues` queues (at least one) in as many parts as there are workers, at most one for each queue.
    ///
    /// # Errors
    /// As [`AfPacketPort::open`], and [`PortError::System`] if the kernel cannot have several, or not while the interface is down.
    pub fn in_lanes(
        name: &str,
        promiscuous: bool,
        queues: u32,
        workers: usize,
    ) -> Result<Vec<Self>, PortError> {
        let opened = PacketSocket::open(name, promiscuous, queues)?;
        let mut lanes: Vec<Vec<Queue>> = Vec::new();
        lanes.resize_with(workers.clamp(1, opened.len()), Vec::new);
        let n = lanes.len();
        for (i, (socket, ring)) in opened.into_iter().enumerate() {
            lanes[i % n].push(Queue { socket, ring });
        }
        lanes.into_iter().map(Self::over).collect()
    }

    fn over(queues: Vec<Queue>) -> Result<Self, PortError> {
        let failed = |source| PortError::io("wait for a packet socket", source);
        let poller = Poller::new().map_err(failed)?;
        for (token, queue) in queues.iter().enumerate() {
            poller.add(&queue.socket, token as u64).map_err(failed)?;
        }
        Ok(Self {
            turn: 0,
            poller,
            events: Events::with_capacity(queues.len()),
            queues,
            to_send: PacketBatch::default(),
            counters: PortCounters::default(),
            lost: Cell::new(0),
            interface: None,
        })
    }

    /// Hears of the interface `name`, which is the port's, from now on, and tells how it stands; the parts of a port hear the same.
    ///
    /// # Errors
    /// [`PortError::System`]: there is none in the network namespace that the calling thread is in.
    pub fn watch(
        lanes: &mut [Self],
        name: &str,
        control: &Control,
    ) -> Result<InterfaceWatch, PortError> {
        let watched = Watched::interface(name, None, control)?;
        for lane in lanes {
            lane.interface = Some(watched.clone());
        }
        Ok(watched.watch())
    }

    /// Receives from a queue until it is empty or the burst is full.
    fn receive(&mut self, queue: usize, burst: &mut Burst) {
        let (Queue { socket, ring }, counters) = (&mut self.queues[queue], &mut self.counters);
        while burst.room() > 0 {
            let wanted = burst.room();
            let take = |frame: Option<PacketFrame<'_>>| match frame {
                Some(frame) => take(&frame, burst, counters),
                None => {
                    counters.received += 1;
                    counters.rx_drops.add(DropReason::Overrun, 1);
                }
            };
            if ring.receive(socket, wanted, take) < wanted {
                break;
            }
        }
    }

    /// Sends what is in `to_send`; how many of it were accepted or refused for good.
    fn send_batch(&mut self) -> usize {
        let mut done = 0;
        while done < self.to_send.len() {
            let error = match self.queues[0].socket.send(&self.to_send, done) {
                Ok(n) => {
                    let frames = (done..done + n).filter_map(|i| self.to_send.get(i));
                    self.counters.sent_bytes +=
                        frames.map(|frame| frame.bytes.len() as u64).sum::<u64>();
                    self.counters.sent += n as u64;
                    done += n;
                    continue;
                }
                Err(error) => error,
            };
            match refusal(&error) {
                Refusal::TryAgain => continue,
                Refusal::NoRoom => break,
                Refusal::Drop(reason) => self.counters.tx_drops.add(reason, 1),
            }
            done += 1;
        }
        done
    }

    /// Sends a long frame from where it lies, a copy less; whether there was room for it, or none if it is to be copied after all.
    fn send_in_place(&mut self, burst: &Burst, i: usize) -> Option<bool> {
        let [header @ .., _, _] = net_header(&burst.offload(i));
        let mut gather = Gather::default();
        if !gather.push(&header) || !burst.gather_frame(i, &mut gather) {
            return None;
        }
        loop {
            let error = match gather.write(&self.queues[0].socket) {
                Ok(_) => {
                    self.counters.sent += 1;
                    self.counters.sent_bytes += burst.frame_len(i) as u64;
                    return Some(true);
                }
                Err(error) if error.raw_os_error() == Some(EFAULT) => return None,
                Err(error) => error,
            };
            match refusal(&error) {
                Refusal::TryAgain => {}
                Refusal::NoRoom => return Some(false),
                Refusal::Drop(reason) => {
                    self.counters.tx_drops.add(reason, 1);
                    return Some(true);
                }
            }
        }
    }
}

/// What an error says of a frame.
enum Refusal {
    TryAgain,
    NoRoom,
    Drop(DropReason),
}

fn refusal(error: &io::Error) -> Refusal {
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::Interrupted, _) => Refusal::TryAgain,
        (ErrorKind::WouldBlock, _) | (_, Some(ENOBUFS)) => Refusal::NoRoom,
        (_, Some(ENETDOWN | ENXIO)) => Refusal::Drop(DropReason::PortDown),
        (_, Some(EMSGSIZE)) => Refusal::Drop(DropReason::TooBig),
        _ => Refusal::Drop(DropReason::SendError),
    }
}

/// Appends a frame that has arrived.
fn take(frame: &PacketFrame<'_>, burst: &mut Burst, counters: &mut PortCounters) {
    counters.received += 1;
    counters.received_bytes += frame.bytes.len() as u64;
    if frame.bytes.len() < ETHERNET_LEN {
        counters.rx_drops.add(DropReason::Runt, 1);
        return;
    }
    let mut header = [0; header::HEADER_BASE];
    header[..PACKET_HEADER_LEN].copy_from_slice(frame.header);
    let mut offload = left_to_do(header::parse(header).0);
    if frame.tag_put_back && offload.flags & Offload::NEEDS_CSUM != 0 {
        // The header speaks of the frame without its tag.
        offload.csum_start = offload.csum_start.saturating_add(TAG_LEN);
        if offload.hdr_len > 0 {
            offload.hdr_len = offload.hdr_len.saturating_add(TAG_LEN);
        }
    }
    burst.push_bytes(frame.bytes, offload);
}

impl Port for AfPacketPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        let before = burst.len();
        let n = self.queues.len();
        for k in 0..n {
            self.receive((self.turn + k) % n, burst);
        }
        self.turn = (self.turn + 1) % n;
        burst.len() - before
    }

    fn offloads(&self) -> Offloads {
        Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let mut done = 0;
        while done < picks.len() {
            let first = picks.get(done);
            if (COPIED_MAX + 1..=PACKET_FRAME_MAX).contains(&burst.frame_len(first)) {
                match self.send_in_place(burst, first) {
                    Some(true) => {
                        done += 1;
                        continue;
                    }
                    Some(false) => break,
                    None => {}
                }
            }
            self.to_send.clear();
            for i in picks.iter().skip(done) {
                // A long one leaves by itself, after these.
                if burst.frame_len(i) > COPIED_MAX && !self.to_send.is_empty() {
                    break;
                }
                let [header @ .., _, _] = net_header(&burst.offload(i));
                let write = |bytes: &mut [u8]| {
                    burst.copy_frame(i, bytes);
                };
                if !self.to_send.push(header, burst.frame_len(i), write) {
                    break;
                }
            }
            let filled = self.to_send.len();
            if filled == 0 {
                // The next one is too long for any interface.
                self.counters.tx_drops.add(DropReason::TooBig, 1);
                done += 1;
                continue;
            }
            let accepted = self.send_batch();
            done += accepted;
            if accepted < filled {
                break;
            }
        }
        done
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn arm(&mut self) -> bool {
        let ready = self.poller.wait(&mut self.events, Some(Duration::ZERO));
        if ready.is_ok_and(|ready| ready > 0) {
            for event in self.events.iter().filter(|event| event.hangup) {
                // The interface went down: told once, and nothing to stay awake for.
                let queue = usize::try_from(event.token).ok();
                let queue = queue.and_then(|queue| self.queues.get(queue));
                drop(queue.map(|queue| queue.socket.take_error()));
            }
        }
        self.queues.iter().any(|queue| queue.ring.has_frames())
    }

    fn counters(&self) -> PortCounters {
        let lost = |queue: &Queue| queue.socket.take_lost().unwrap_or_default() as usize;
        let lost = self.lost.get() + self.queues.iter().map(lost).sum::<usize>();
        self.lost.set(lost);
        let mut counters = self.counters;
        counters.received += lost as u64;
        counters.rx_drops.add(DropReason::Overrun, lost);
        counters
    }
}
