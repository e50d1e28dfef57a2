//! Frames that have arrived on a packet socket, in slots of memory shared with the kernel: no system call brings them.
//!
//! Receiving a frame from it costs the machine half of what a batch of `recvmmsg` does, all told, and the receiver next to nothing
//! (330 and 690 ns beyond the sending of 64 bytes over a veth pair, on one processor). Sending from such a ring gains nothing there
//! (1250 and 1160 ns for each), so frames leave by `sendmmsg`.
//!
//! A slot has room for an ordinary frame; one that is longer (segments that were put together) waits in the socket's own queue, and
//! its slot says so. Source: Documentation/networking/packet_mmap.rst, version 2 of the ring.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{
    PACKET_BATCH, PACKET_HEADER_LEN, PacketBatch, PacketFrame, PacketSocket,
    TP_STATUS_VLAN_TPID_VALID, TP_STATUS_VLAN_VALID,
};

/// Bytes of a slot, and how many there are.
const SLOT: usize = 4096;
const SLOTS: usize = 1024;
/// Bytes that the kernel allocates at once.
const BLOCK: usize = 64 << 10;

/// Whose a slot is, and that its frame waits in the queue. Source: linux/if_packet.h
const TP_STATUS_KERNEL: u32 = 0;
const TP_STATUS_USER: u32 = 1;
const TP_STATUS_COPY: u32 = 1 << 1;
const TPACKET_V2: i32 = 1;

/// Bytes of frames that may wait in the socket's own queue.
const QUEUE: i32 = 4 << 20;

/// Where things are in the kernel's `struct tpacket2_hdr` at a slot's beginning.
const LEN: usize = 4;
const KEPT: usize = 8;
const MAC: usize = 12;
const TAG: usize = 24;

/// Bytes of two addresses, behind which a tag belongs.
const ADDRESSES: usize = 12;

/// Frames that have arrived.
pub struct PacketRing {
    start: *mut u8,
    /// The slot that is filled next.
    at: usize,
    /// Long frames out of the queue.
    queued: PacketBatch,
}

// SAFETY: the mapping belongs to this value, which is used by one thread at a time.
unsafe impl Send for PacketRing {}

impl fmt::Debug for PacketRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PacketRing(slot {} of {SLOTS})", self.at)
    }
}

impl PacketRing {
    /// Makes the ring of a socket that is not bound yet.
    pub(super) fn new(socket: &PacketSocket) -> io::Result<Self> {
        let number = |n: usize| libc::c_uint::try_from(n).unwrap_or_default();
        let ring = libc::tpacket_req {
            tp_block_size: number(BLOCK),
            tp_block_nr: number(SLOTS * SLOT / BLOCK),
            tp_frame_size: number(SLOT),
            tp_frame_nr: number(SLOTS),
        };
        socket.set(libc::PACKET_VERSION, &TPACKET_V2)?;
        socket.set(libc::PACKET_COPY_THRESH, &1_i32)?;
        socket.set(libc::PACKET_RX_RING, &ring)?;
        socket.widen(QUEUE);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let (kind, fd) = (libc::MAP_SHARED | libc::MAP_POPULATE, socket.fd.as_raw_fd());
        // SAFETY: a new mapping, wherever there is room.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), SLOTS * SLOT, access, kind, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            at: 0,
            queued: PacketBatch::default(),
        })
    }

    /// Has `take` look at frames that have arrived, up to `max`, in order; how many. What is there instead of a frame that was too
    /// long for its slot and found no room in the queue is nothing.
    pub fn receive(
        &mut self,
        socket: &PacketSocket,
        max: usize,
        mut take: impl FnMut(Option<PacketFrame<'_>>),
    ) -> usize {
        let mut n = 0;
        while n < max {
            let status = self.status(self.at).load(Ordering::Acquire);
            if status & TP_STATUS_USER == 0 {
                break;
            }
            if status & TP_STATUS_COPY == 0 {
                take(self.frame(self.at, status));
                self.give_back(1);
                n += 1;
                continue;
            }
            let run = self.long_ones(max - n);
            // The first try may bring no more than the news that the interface went down.
            let there = socket.receive(&mut self.queued, run);
            let there = there.or_else(|_| socket.receive(&mut self.queued, run));
            let there = there.unwrap_or_default();
            (0..there).for_each(|i| take(self.queued.get(i)));
            if there == 0 {
                take(None);
            }
            self.give_back(there.max(1));
            n += there.max(1);
        }
        n
    }

    /// Whether a frame has arrived.
    #[must_use]
    pub fn has_frames(&self) -> bool {
        self.status(self.at).load(Ordering::Relaxed) & TP_STATUS_USER != 0
    }

    /// How many slots in a row, up to `max`, say that their frame is in the queue; one at least does.
    fn long_ones(&self, max: usize) -> usize {
        const BOTH: u32 = TP_STATUS_USER | TP_STATUS_COPY;
        let is_long = |k: &usize| {
            let slot = (self.at + k) % SLOTS;
            self.status(slot).load(Ordering::Acquire) & BOTH == BOTH
        };
        1 + (1..max.min(PACKET_BATCH)).take_while(is_long).count()
    }

    fn status(&self, slot: usize) -> &AtomicU32 {
        let at = self.start.wrapping_add(slot % SLOTS * SLOT);
        // SAFETY: the word is inside the mapping and aligned, and the kernel uses it as an atomic too.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    /// The frame in a slot that is ours; none if it is not all there.
    fn frame(&mut self, slot: usize, status: u32) -> Option<PacketFrame<'_>> {
        let at = self
            .start
            .wrapping_add(slot % SLOTS * SLOT + size_of::<u32>());
        // SAFETY: the bytes of the slot behind its status are inside the mapping, and as long as the slot is ours (the caller has
        // seen that) the kernel leaves them alone.
        let bytes = unsafe { std::slice::from_raw_parts_mut(at, SLOT - size_of::<u32>()) };
        let place = |at: usize| at - size_of::<u32>();
        let word = |at: usize| {
            let bytes = bytes.get(place(at)..)?.first_chunk()?;
            Some(u32::from_ne_bytes(*bytes) as usize)
        };
        let (len, kept) = (word(LEN)?, word(KEPT)?);
        let mac = bytes.get(place(MAC)..)?.first_chunk()?;
        let mac = usize::from(u16::from_ne_bytes(*mac)).checked_sub(size_of::<u32>())?;
        let tag = tag_in(bytes.get(place(TAG)..)?, status);
        // The header goes where no tag can overwrite it.
        let header: [u8; PACKET_HEADER_LEN] = *bytes
            .get(mac.checked_sub(PACKET_HEADER_LEN)?..)?
            .first_chunk()?;
        bytes[..PACKET_HEADER_LEN].copy_from_slice(&header);
        let (mut start, end) = (mac, mac.checked_add(kept)?);
        if kept < len || end > bytes.len() {
            return None;
        }
        if let Some(tag) = tag.filter(|_| kept >= ADDRESSES) {
            let begin = start.checked_sub(tag.len())?;
            bytes.copy_within(start..start + ADDRESSES, begin);
            bytes[begin + ADDRESSES..start + ADDRESSES].copy_from_slice(&tag);
            start = begin;
        }
        Some(PacketFrame {
            header: bytes.first_chunk()?,
            tag_put_back: start < mac,
            bytes: &bytes[start..end],
        })
    }

    fn give_back(&mut self, n: usize) {
        for _ in 0..n {
            self.status(self.at)
                .store(TP_STATUS_KERNEL, Ordering::Release);
            self.at = (self.at + 1) % SLOTS;
        }
    }
}

impl Drop for PacketRing {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and nothing points into it any more.
        unsafe { libc::munmap(self.start.cast(), SLOTS * SLOT) };
    }
}

/// The tag that the kernel has taken out of a frame: its TCI and what kind of tag it is stand behind each other.
fn tag_in(bytes: &[u8], status: u32) -> Option<[u8; 4]> {
    if status & TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let &[a, b, c, d] = bytes.first_chunk()?;
    let kind = if status & TP_STATUS_VLAN_TPID_VALID == 0 {
        0x8100
    } else {
        u16::from_ne_bytes([c, d])
    };
    let ([a, b], [c, d]) = (kind.to_be_bytes(), u16::from_ne_bytes([a, b]).to_be_bytes());
    Some([a, b, c, d])
}
