//! One queue of an interface: what is received on it, and the rings that packets leave by.
//!
//! Chunks of a queue's memory belong to one side at a time. The first `ring_size` of them go round by the fill ring, the kernel and
//! the receive ring, the others (of the queue that sends) by the transmit ring, the kernel and the completion ring; each ring has
//! room for all that can be in it.

use std::cell::Cell;
use std::io::ErrorKind;

use virtnet_mem::{GuestMemory, Segment};
use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload, PortCounters};
use virtnet_sys::{Consumer, Producer, XdpDesc, XdpRings, XdpSocket, XdpStatistics};

/// Bytes of a chunk: a page, which every driver can do with.
pub(super) const CHUNK: u32 = 4096;

/// The most chunks of one frame. Source: linux/skbuff.h, MAX_SKB_FRAGS
const CHUNKS_MAX: u32 = 17;

/// How often in a row the kernel may have no room for what waits in the transmit ring before it is left alone until more comes.
const TRIES: u32 = 1000;

/// What ENOBUFS is called, which has no name in the standard library.
const ENOBUFS: i32 = 105;
const EBUSY: i32 = 16;

/// The receiving half of a queue.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) socket: XdpSocket,
    fill: Producer<u64>,
    rx: Consumer<XdpDesc>,
    /// Which region of the port's memory is its own, and how many chunks of it, from the first on, are to receive into.
    region: u32,
    chunks: u32,
    /// Chunks that the kernel has filled and not got back.
    taken: Vec<u64>,
    pub(super) zero_copy: bool,
    /// The interface is gone.
    pub(super) gone: bool,
    /// What the kernel has counted, as far as it was asked: it forgets some of it when the interface goes.
    counted: Cell<XdpStatistics>,
}

/// The rings that packets leave by.
pub(super) type SendRings = (Producer<XdpDesc>, Consumer<u64>);

impl Queue {
    pub(super) fn new(
        socket: XdpSocket,
        rings: XdpRings,
        region: u32,
        chunks: u32,
    ) -> (Self, Option<SendRings>) {
        let queue = Self {
            socket,
            fill: rings.fill,
            rx: rings.rx,
            region,
            chunks,
            taken: Vec::with_capacity(chunks as usize),
            zero_copy: false,
            gone: false,
            counted: Cell::default(),
        };
        (queue, rings.tx.map(|tx| (tx, rings.completion)))
    }

    /// Gives all chunks to the kernel, for the first time.
    pub(super) fn fill_all(&mut self) {
        self.taken
            .extend((0..self.chunks).map(|k| u64::from(k) * u64::from(CHUNK)));
        self.give_back();
    }

    pub(super) fn has_frames(&self) -> bool {
        !self.rx.is_empty()
    }

    /// Appends frames that have arrived to `burst`. Their bodies stay where they are.
    pub(super) fn receive(
        &mut self,
        memory: &GuestMemory,
        burst: &mut Burst,
        counters: &mut PortCounters,
    ) {
        let there = self.rx.len();
        let mut seen = 0;
        while seen < there && burst.room() > 0 {
            let pieces = (seen..there)
                .take_while(|&k| self.rx.peek(k).has_more())
                .count();
            let pieces = u32::try_from(pieces).unwrap_or(u32::MAX);
            if seen + pieces == there {
                // The rest of it has not arrived. If it has no room to arrive in, it never will.
                if pieces == self.rx.capacity() {
                    counters.received += 1;
                    counters.rx_drops.add(DropReason::Malformed, 1);
                    (seen..there).for_each(|k| self.keep(self.rx.peek(k)));
                    seen = there;
                }
                break;
            }
            self.take(seen, pieces + 1, memory, burst, counters);
            seen += pieces + 1;
        }
        if seen > 0 {
            self.rx.release(seen);
        }
    }

    /// Appends the frame of `pieces` entries from the entry `first` on.
    fn take(
        &mut self,
        first: u32,
        pieces: u32,
        memory: &GuestMemory,
        burst: &mut Burst,
        counters: &mut PortCounters,
    ) {
        let entries = first..first + pieces;
        entries.clone().for_each(|k| self.keep(self.rx.peek(k)));
        let segment = |k| self.segment(self.rx.peek(k));
        let len = entries
            .clone()
            .try_fold(0_u32, |sum, k| sum.checked_add(segment(k)?.len));
        counters.received += 1;
        let Some(len) = len else {
            counters.rx_drops.add(DropReason::Malformed, 1);
            return;
        };
        counters.received_bytes += u64::from(len);
        if (len as usize) < ETHERNET_LEN {
            counters.rx_drops.add(DropReason::Runt, 1);
        } else if pieces == 1 {
            if let Some(frame) = segment(first) {
                burst.push_guest(memory.slice(frame), frame, Offload::default());
            }
        } else {
            let runs = entries.filter_map(segment);
            burst.push_guest_runs(memory, runs, len, Offload::default());
        }
    }

    /// Remembers the chunk of an entry, which is to be given back.
    fn keep(&mut self, desc: XdpDesc) {
        let chunk = desc.addr / u64::from(CHUNK);
        if chunk < u64::from(self.chunks) && self.taken.len() < self.chunks as usize {
            self.taken.push(chunk * u64::from(CHUNK));
        }
    }

    /// The bytes of an entry, which must be within a chunk that is to receive into.
    fn segment(&self, desc: XdpDesc) -> Option<Segment> {
        let (chunk, at) = (desc.addr / u64::from(CHUNK), desc.addr % u64::from(CHUNK));
        let fits = chunk < u64::from(self.chunks) && at + u64::from(desc.len) <= u64::from(CHUNK);
        fits.then_some(Segment {
            offset: usize::try_from(desc.addr).ok()?,
            len: desc.len,
            region: self.region,
        })
    }

    /// Gives the kernel the chunks back whose frames are not looked at any more.
    pub(super) fn give_back(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let n = u32::try_from(self.taken.len()).unwrap_or(u32::MAX);
        let room = self.fill.room(n).min(n) as usize;
        for chunk in self.taken.drain(..room) {
            self.fill.push(chunk);
        }
        self.fill.publish();
        if self.fill.needs_wakeup() {
            self.socket.kick_rx();
        }
    }

    /// Adds what the kernel has dropped to `counters`.
    pub(super) fn count_drops(&self, counters: &mut PortCounters) {
        let earlier = self.counted.get();
        let found = self.socket.statistics().unwrap_or(earlier);
        let now = XdpStatistics {
            rx_dropped: found.rx_dropped.max(earlier.rx_dropped),
            rx_ring_full: found.rx_ring_full.max(earlier.rx_ring_full),
            fill_ring_empty: found.fill_ring_empty.max(earlier.fill_ring_empty),
            tx_invalid: found.tx_invalid.max(earlier.tx_invalid),
        };
        self.counted.set(now);
        // What was dropped and did not miss a chunk was longer than one. (Drivers that share the memory count their own tries.)
        let too_long = if self.zero_copy {
            0
        } else {
            now.rx_dropped.saturating_sub(now.fill_ring_empty)
        };
        let overrun = now.rx_dropped - too_long + now.rx_ring_full;
        let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        counters.received += too_long + overrun;
        counters.rx_drops.add(DropReason::TooBig, count(too_long));
        counters.rx_drops.add(DropReason::Overrun, count(overrun));
        let refused = now.tx_invalid.min(counters.sent);
        counters.sent -= refused;
        counters.tx_drops.add(DropReason::SendError, count(refused));
    }
}

/// The sending half of a queue.
#[derive(Debug)]
pub(super) struct Sender {
    tx: Producer<XdpDesc>,
    completion: Consumer<u64>,
    /// Chunks with nothing in them.
    free: Vec<u64>,
    chunks: u32,
    /// A frame may have several chunks.
    multi_buffer: bool,
    /// Frames were put in that the kernel has not seen.
    staged: bool,
    /// The kernel had no room for all that is in the ring.
    pub(super) unsent: bool,
    tries: u32,
    /// Where a frame of several chunks is put together.
    long: Vec<u8>,
}

impl Sender {
    pub(super) fn new(
        tx: Producer<XdpDesc>,
        completion: Consumer<u64>,
        chunks: u32,
        multi_buffer: bool,
    ) -> Self {
        // They lie behind those to receive into, and are as many.
        let chunk = |k| u64::from(chunks + k) * u64::from(CHUNK);
        Self {
            tx,
            completion,
            free: (0..chunks).map(chunk).collect(),
            chunks,
            multi_buffer,
            staged: false,
            unsent: false,
            tries: 0,
            long: Vec::new(),
        }
    }

    /// Takes the chunks back whose frames have left.
    pub(super) fn reap(&mut self) {
        let n = self.completion.len();
        for k in 0..n {
            let chunk = self.completion.peek(k) / u64::from(CHUNK);
            let ours = u64::from(self.chunks)..u64::from(self.chunks) * 2;
            if ours.contains(&chunk) && self.free.len() < self.chunks as usize {
                self.free.push(chunk * u64::from(CHUNK));
            }
        }
        if n > 0 {
            self.completion.release(n);
        }
    }

    /// Whether a frame of `len` bytes can ever be sent.
    pub(super) fn takes(&self, len: usize) -> bool {
        let most = if self.multi_buffer {
            CHUNKS_MAX.min(self.chunks)
        } else {
            1
        };
        len <= most as usize * CHUNK as usize
    }

    /// Puts a frame into the ring; false when it has no room now. Every queue that sends has the first region of its port.
    pub(super) fn send(&mut self, memory: &GuestMemory, burst: &Burst, i: usize) -> bool {
        let len = burst.frame_len(i);
        let pieces = len.div_ceil(CHUNK as usize);
        if self.free.len() < pieces || (self.tx.room(CHUNKS_MAX) as usize) < pieces {
            return false;
        }
        let segment = |chunk: u64, len: u32| Segment {
            offset: usize::try_from(chunk).unwrap_or(usize::MAX),
            len,
            region: 0,
        };
        self.staged = true;
        if pieces == 1 {
            let (Some(chunk), Ok(len)) = (self.free.pop(), u32::try_from(len)) else {
                return false;
            };
            burst.copy_frame_to_guest(i, &memory.slice(segment(chunk, len)));
            return self.tx.push(XdpDesc::new(chunk, len, false));
        }
        self.long.resize(len, 0);
        burst.copy_frame(i, &mut self.long);
        for (k, piece) in self.long.chunks(CHUNK as usize).enumerate() {
            let (Some(chunk), Ok(len)) = (self.free.pop(), u32::try_from(piece.len())) else {
                return false;
            };
            memory.slice(segment(chunk, len)).copy_from(piece);
            self.tx.push(XdpDesc::new(chunk, len, k + 1 < pieces));
        }
        true
    }

    /// Lets the kernel see what was put in.
    pub(super) fn publish(&mut self, socket: &XdpSocket) {
        if std::mem::take(&mut self.staged) {
            self.tx.publish();
            self.tries = 0;
            self.kick(socket);
        }
    }

    /// Has the kernel send, if it wants to be told, as long as it gets on.
    pub(super) fn kick(&mut self, socket: &XdpSocket) {
        self.unsent = false;
        let mut waiting = self.tx.waiting();
        while self.tx.needs_wakeup() {
            let Err(error) = socket.kick_tx() else { return };
            match (error.kind(), error.raw_os_error()) {
                (ErrorKind::Interrupted, _) => continue,
                // A part is still there. (Each call sends a few, however many there are.)
                (ErrorKind::WouldBlock, _) | (_, Some(EBUSY | ENOBUFS)) => {}
                // The interface is down or gone: there is nothing to try until it is up.
                _ => return,
            }
            let now = self.tx.waiting();
            if now == 0 {
                return;
            }
            if now == waiting {
                self.tries += 1;
                self.unsent = true;
                return;
            }
            (waiting, self.tries) = (now, 0);
        }
    }

    /// Whether to look at the ring again before sleeping, though nothing has come.
    pub(super) fn wants_another_try(&self) -> bool {
        self.unsent && self.tries < TRIES
    }
}
