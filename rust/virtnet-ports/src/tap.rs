//! A tap device as a port: the host's own network stack at the other end.
//!
//! What the host sends to the interface is received here, what is sent here arrives at the host. Every packet is one system
//! call. In front of each frame is a virtio-net header: packets that leave carry their offload metadata in it, and those that
//! arrive as well if the port [takes](TapPort::take_offloads) what the host would leave to it.
//!
//! A tap may have several queues, each with its own packets: the host receives a flow on the queue on which we send of it. Queues
//! may belong to different workers ([`TapPort::in_lanes`]).
//!
//! It guarantees that a full queue of the host is "no room" and everything else the host refuses is a counted drop. When the
//! interface is deleted, the port goes quiet and keeps the reason.
//!
//! In a packet's way this is a first and a last step with one copy by the kernel and one by us on each side.

use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use virtnet_mem::Gather;
use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload, Offloads, Picks, Port, PortCounters, flow_hash};
use virtnet_sys::{Events, Poller, Tap, TapOffloads, TapQueue};
use virtnet_virtio::net::header;

use crate::link::Watched;
use crate::{Control, InterfaceWatch, PortError};

/// Bytes of the virtio-net header in front of every frame.
const HEADER_LEN: usize = 12;

/// The longest frame: the largest MTU of a tap, an Ethernet header and two tags.
const FRAME_MAX: usize = 65_535 + ETHERNET_LEN + 8;

/// A longer frame is written from where it lies: a copy less, which pays for naming its pieces.
pub(crate) const COPIED_MAX: usize = 4096;

/// So many bytes of frames come in with a burst: what fits a near cache is passed on out of it, and nobody waits for 64 frames of
/// 64 KiB each.
const BURST_BYTES: usize = 256 << 10;

/// What the kernel answers when the link is down.
const EIO: i32 = 5;
/// What the kernel answers when the interface is gone.
const EBADFD: i32 = 77;
/// What the kernel answers when bytes to write are gone.
pub(crate) const EFAULT: i32 = 14;

/// A tap interface as a port, or some of its queues as a part of one.
#[derive(Debug)]
pub struct TapPort {
    queues: Vec<TapQueue>,
    /// Which queue is read first.
    turn: usize,
    tap: Option<Arc<Tap>>,
    interface: Option<Watched>,
    /// What a worker waits for: holds the queues until the interface is gone.
    poller: Poller,
    events: Events,
    /// Header and frame on their way out.
    bytes: Box<[u8]>,
    counters: PortCounters,
    gone: Option<io::Error>,
    /// The kernel segments UDP.
    knows_uso: bool,
}

impl TapPort {
    /// Opens the tap interface `name`, making it if it is not there (a `%d` in the name is numbered), and brings it up.
    ///
    /// An interface made here goes away with the port.
    ///
    /// # Errors
    /// [`PortError::System`]: each says which right or device is missing and what to do.
    pub fn open(name: &str) -> Result<Self, PortError> {
        let mut lanes = Self::in_lanes(name, 1, 1)?;
        lanes.pop().ok_or(PortError::NoService)
    }

    /// The same with `queues` queues (at least one) in as many parts as there are workers, at most one for each queue.
    ///
    /// # Errors
    /// As [`TapPort::open`].
    pub fn in_lanes(name: &str, queues: usize, workers: usize) -> Result<Vec<Self>, PortError> {
        let (tap, opened) = Tap::open(name, queues, true)?;
        tap.set_up(true)?;
        let tap = Arc::new(tap);
        let mut lanes: Vec<Vec<TapQueue>> = Vec::new();
        lanes.resize_with(workers.clamp(1, opened.len()), Vec::new);
        let n = lanes.len();
        for (i, queue) in opened.into_iter().enumerate() {
            lanes[i % n].push(queue);
        }
        let port = |queues| Self::over(queues, Some(Arc::clone(&tap)));
        lanes.into_iter().map(port).collect()
    }

    /// Takes over the descriptor of a tap queue that somebody with the rights has opened, with a virtio-net header of 12 bytes.
    ///
    /// # Errors
    /// [`PortError::System`] if it is something else; the descriptor is closed.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, PortError> {
        Self::over(vec![TapQueue::from_owned(fd)?], None)
    }

    fn over(queues: Vec<TapQueue>, tap: Option<Arc<Tap>>) -> Result<Self, PortError> {
        let failed = |source| PortError::io("wait for a tap", source);
        let poller = Poller::new().map_err(failed)?;
        for queue in &queues {
            queue.set_offloads(TapOffloads::empty())?;
            poller.add(queue, 0).map_err(failed)?;
        }
        Ok(Self {
            queues,
            turn: 0,
            tap,
            interface: None,
            poller,
            events: Events::with_capacity(1),
            bytes: vec![0; HEADER_LEN + FRAME_MAX].into(),
            counters: PortCounters::default(),
            gone: None,
            knows_uso: false,
        })
    }

    /// Has the host hand over what it would leave to a network card, checksums and segments, as far as it knows how.
    ///
    /// # Errors
    /// [`PortError::System`] if it does not know of checksums.
    pub fn take_offloads(&mut self) -> Result<(), PortError> {
        let tcp = TapOffloads::CSUM | TapOffloads::TSO4 | TapOffloads::TSO6 | TapOffloads::TSO_ECN;
        let all = tcp | TapOffloads::USO4 | TapOffloads::USO6;
        for queue in &self.queues {
            // Kernels before 6.2 know nothing of segments of UDP.
            self.knows_uso = queue.set_offloads(all).is_ok();
            if !self.knows_uso {
                queue.set_offloads(tcp)?;
            }
        }
        Ok(())
    }

    /// The interface, unless the port was made from a descriptor.
    #[must_use]
    pub fn interface(&self) -> Option<&Tap> {
        self.tap.as_deref()
    }

    /// Hears of the interface from now on, wherever it is moved, and tells how it stands; the parts of a port hear the same.
    ///
    /// # Errors
    /// [`PortError::System`]: it is not in the network namespace that the calling thread is in.
    pub fn watch(
        lanes: &mut [Self],
        control: &Control,
    ) -> Result<Option<InterfaceWatch>, PortError> {
        let Some((tap, queue)) =
            (lanes.first()).and_then(|lane| Some((lane.interface()?, lane.queues.first()?)))
        else {
            return Ok(None);
        };
        let failed = |source| PortError::io("watch a tap", source);
        let queue = queue.try_clone().map_err(failed)?;
        let watched = Watched::interface(tap.name(), Some(queue), control)?;
        for lane in lanes {
            lane.interface = Some(watched.clone());
        }
        Ok(Some(watched.watch()))
    }

    /// Why the port is quiet for good, once it is.
    #[must_use]
    pub fn error(&self) -> Option<&io::Error> {
        self.gone.as_ref()
    }

    /// The interface is gone: nothing will ever arrive, and nobody is to be woken for it.
    fn lose(&mut self, error: io::Error) {
        if self.gone.is_none() {
            for queue in &self.queues {
                // It was added when the port was made, and only this takes it out.
                drop(self.poller.remove(queue));
            }
            self.gone = Some(error);
        }
    }

    /// Reads from a queue until it is empty or the burst is full.
    fn read(&mut self, queue: usize, burst: &mut Burst) {
        let mut bytes = 0;
        while burst.room() > 0 && bytes < BURST_BYTES && self.gone.is_none() {
            let room = burst.own_room(HEADER_LEN + FRAME_MAX);
            let len = match self.queues[queue].read(room) {
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => {
                    self.lose(error);
                    break;
                }
            };
            let header = room.first_chunk().copied().unwrap_or_default();
            let (offload, _) = header::parse(header);
            let frame_len = len.saturating_sub(HEADER_LEN);
            self.counters.received += 1;
            self.counters.received_bytes += frame_len as u64;
            bytes += frame_len;
            if frame_len < ETHERNET_LEN {
                self.counters.rx_drops.add(DropReason::Runt, 1);
            } else {
                burst.push_read(HEADER_LEN, frame_len, left_to_do(offload));
            }
        }
    }

    /// Writes one frame; `false` when the kernel has no room for it.
    fn send(&mut self, burst: &Burst, i: usize) -> bool {
        let frame_len = burst.frame_len(i);
        if frame_len > FRAME_MAX {
            self.counters.tx_drops.add(DropReason::TooBig, 1);
            return true;
        }
        let queue = match self.queues.len() {
            1 => 0,
            n => flow_hash(burst.head(i)) as usize % n,
        };
        let reason = match self.write(queue, burst, i) {
            Ok(_) => {
                self.counters.sent += 1;
                self.counters.sent_bytes += frame_len as u64;
                return true;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => match error.raw_os_error() {
                Some(EIO) => DropReason::PortDown,
                Some(EBADFD) => {
                    self.lose(error);
                    DropReason::PortDown
                }
                _ => DropReason::SendError,
            },
        };
        self.counters.tx_drops.add(reason, 1);
        true
    }

    fn write(&mut self, queue: usize, burst: &Burst, i: usize) -> io::Result<usize> {
        let (queue, frame_len) = (&self.queues[queue], burst.frame_len(i));
        let header = net_header(&burst.offload(i));
        if frame_len > COPIED_MAX {
            let mut gather = Gather::default();
            if gather.push(&header) && burst.gather_frame(i, &mut gather) {
                match gather.write(queue) {
                    // The sender has taken its pages away: a copy has zeros for them.
                    Err(error) if error.raw_os_error() == Some(EFAULT) => {}
                    outcome => return outcome,
                }
            }
        }
        let (to_header, to_frame) = self.bytes.split_at_mut(HEADER_LEN);
        to_header.copy_from_slice(&header);
        burst.copy_frame(i, &mut to_frame[..frame_len]);
        queue.write_vectored(&[IoSlice::new(&self.bytes[..HEADER_LEN + frame_len])])
    }
}

/// What the kernel says of a packet, without what it vouches for.
pub(crate) fn left_to_do(offload: Offload) -> Offload {
    let flags = offload.flags & Offload::NEEDS_CSUM;
    if flags == 0 {
        Offload::default()
    } else {
        Offload { flags, ..offload }
    }
}

impl Port for TapPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        let before = burst.len();
        let n = self.queues.len();
        for k in 0..n {
            self.read((self.turn + k) % n, burst);
        }
        self.turn = (self.turn + 1) % n;
        burst.len() - before
    }

    fn offloads(&self) -> Offloads {
        let tcp = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        if self.knows_uso {
            tcp | Offloads::USO
        } else {
            tcp
        }
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let refused = picks.iter().position(|i| !self.send(burst, i));
        refused.unwrap_or(picks.len())
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.poller
            .wait(&mut self.events, Some(Duration::ZERO))
            .is_ok_and(|ready| ready > 0)
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

/// The virtio-net header of a frame, little-endian. Spec: virtio 1.4, 5.1.9, Device Operation.
pub(crate) fn net_header(offload: &Offload) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[0] = offload.flags & Offload::NEEDS_CSUM;
    header[1] = offload.gso_type;
    header[2..4].copy_from_slice(&offload.hdr_len.to_le_bytes());
    header[4..6].copy_from_slice(&offload.gso_size.to_le_bytes());
    header[6..8].copy_from_slice(&offload.csum_start.to_le_bytes());
    header[8..10].copy_from_slice(&offload.csum_offset.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_frame_has_a_header_of_zeros() {
        assert_eq!(net_header(&Offload::default()), [0; HEADER_LEN]);
        let verified = Offload {
            flags: Offload::DATA_VALID,
            ..Offload::default()
        };
        assert_eq!(net_header(&verified), [0; HEADER_LEN]);
    }

    #[test]
    fn what_is_left_to_be_done_is_told_to_the_kernel() {
        let offload = Offload {
            flags: Offload::NEEDS_CSUM,
            gso_type: Offload::GSO_TCPV4,
            hdr_len: 0x0102,
            gso_size: 0x0304,
            csum_start: 0x0506,
            csum_offset: 0x0708,
        };
        let expected = [1, 1, 2, 1, 4, 3, 6, 5, 8, 7, 0, 0];
        assert_eq!(net_header(&offload), expected);
    }
}
