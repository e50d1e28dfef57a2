//! The queues of a network device, seen by the device: packets out of transmitqs, packets into receiveqs.

use std::sync::Arc;

use virtnet_mem::{GuestMemory, GuestSlice, Segment};
use virtnet_packet::{Burst, DropReason, Offload, Picks, PortCounters};

use super::ahead::{LINE, READ, WRITE, runs};
use super::header::{self, Allowed, HEADER_BASE, HEADER_MAX};
use super::rss::Hasher;
use super::{FRAME_MAX, FRAME_MIN};
use crate::{Access, CHAINS_MAX, ChainBytes, Chains, DeviceQueue, Features, RingError};

/// Frames of more buffers are long, and so many of them are taken at once: 64 KiB is thirty buffers of 2 KiB, so that a ring of 256 is
/// full with eight of them, and a driver that waits for all eight has nothing to fill while they are passed on.
const LONG: usize = 8;
const LONG_AT_ONCE: usize = 4;

/// A running transmitq: the driver's packets come out of it.
#[derive(Debug)]
pub struct TransmitQueue {
    queue: DeviceQueue,
    /// So many frames are taken at once, as long as those that were given back last were on average.
    at_once: usize,
    /// What the burst on its way still refers to.
    chains: Chains,
    header_len: u32,
    allowed: Allowed,
}

impl TransmitQueue {
    /// Gives a queue its meaning, by what was negotiated.
    #[must_use]
    pub fn new(queue: DeviceQueue, features: Features) -> Self {
        Self {
            queue,
            at_once: CHAINS_MAX,
            chains: Chains::new(),
            header_len: header_len(features),
            allowed: Allowed::driver(features),
        }
    }

    /// Appends packets that the driver has made available; how many chains were taken. [`Self::complete`] gives them back.
    ///
    /// A chain that is no packet is counted in `rx_drops`, and as received.
    ///
    /// # Errors
    /// [`RingError`]: the queue must be stopped. What was taken before stands in the burst and must still be completed.
    #[inline]
    pub fn drain(
        &mut self,
        memory: &Arc<GuestMemory>,
        burst: &mut Burst,
        counters: &mut PortCounters,
    ) -> Result<usize, RingError> {
        // Looking at an idle queue is not to cost the room for a burst.
        if !self.queue.has_work() {
            return Ok(0);
        }
        let before = self.chains.len();
        let mut buffers = ChainBytes::new();
        let taken = self.queue.take_with_bytes(
            memory,
            Access::Read,
            burst.room().min(self.at_once),
            &mut self.chains,
            &mut buffers,
        );
        if self.chains.len() == before {
            return taken;
        }
        burst.set_memory(memory);
        let chains = self.chains.entries_from(before);
        let buffers = &buffers.as_slice()[before..];
        let header_len = self.header_len as usize;
        let mut bytes_received = 0;
        let usual = buffers[0].len().saturating_sub(header_len).min(READ);
        for (fetch, take) in runs(chains.len(), usual) {
            for buffer in &buffers[fetch] {
                let frame = buffer.split_at(header_len).1;
                frame.prefetch(if usual > LINE { READ } else { LINE });
            }
            for k in take {
                let (chain, buffer) = (&chains[k], &buffers[k]);
                // A plain frame in one buffer takes a way of its own, on which the metadata is a constant: put together and taken out
                // of the stack again it waited for every store before it, a tenth of receiving.
                let bytes = buffer.split_at(header_len).1;
                let frame_len = bytes.len() as u64;
                if buffer.read().is_some_and(header::is_plain)
                    && (FRAME_MIN.into()..=FRAME_MAX.into()).contains(&frame_len)
                    && let Some(only) = chain.only()
                {
                    let name = || only.skip(self.header_len);
                    burst.push_guest_named(bytes, name, Offload::default());
                    bytes_received += frame_len;
                    continue;
                }
                match self.any_frame(memory, before + k, burst) {
                    Ok(bytes) => bytes_received += u64::from(bytes),
                    Err(reason) => counters.rx_drops.add(reason, 1),
                }
            }
        }
        counters.received += (self.chains.len() - before) as u64;
        counters.received_bytes += bytes_received;
        taken
    }

    /// Takes what the driver has made available and gives it back unread, counted as `reason`; how many chains.
    ///
    /// [`Self::complete`] lets the driver see it.
    ///
    /// # Errors
    /// As [`Self::drain`].
    pub fn discard(
        &mut self,
        memory: &GuestMemory,
        reason: DropReason,
        counters: &mut PortCounters,
    ) -> Result<usize, RingError> {
        let before = self.chains.len();
        let taken = self
            .queue
            .take(memory, Access::Read, CHAINS_MAX, &mut self.chains);
        let n = self.chains.len() - before;
        for i in before..self.chains.len() {
            let bytes = self.chains.bytes(i).unwrap_or(0);
            counters.received_bytes += u64::from(bytes.saturating_sub(self.header_len));
        }
        counters.received += n as u64;
        counters.rx_drops.add(reason, n);
        taken
    }

    /// Puts the frame of chain `i` into the burst, whatever it is: of several buffers, with something left to do, or none at all. Its
    /// length. It reads the header for itself, and decides on that alone: what was seen before only chose the way here.
    #[inline(never)]
    fn any_frame(
        &self,
        memory: &GuestMemory,
        i: usize,
        burst: &mut Burst,
    ) -> Result<u32, DropReason> {
        let bytes = self.chains.bytes(i).map_err(|_| DropReason::Malformed)?;
        let frame_len = bytes
            .checked_sub(self.header_len)
            .ok_or(DropReason::Malformed)?;
        if frame_len < FRAME_MIN {
            return Err(DropReason::Runt);
        }
        if frame_len > FRAME_MAX {
            return Err(DropReason::Malformed);
        }
        let mut header = [0; HEADER_MAX];
        let frame = split_header(
            memory,
            self.chains.segments(i),
            &mut header[..self.header_len as usize],
        );
        // A hash in it says nothing that a device has to believe.
        let [base @ .., _, _, _, _, _, _, _, _] = header;
        let (offload, _) = header::parse(base);
        let offload = self.allowed.check(offload, frame_len)?;
        burst.push_guest_runs(memory, frame, frame_len, offload);
        Ok(frame_len)
    }

    /// Gives back every chain whose packet has gone its way; whether the driver is to be called.
    #[inline]
    pub fn complete(&mut self) -> bool {
        if self.chains.is_empty() {
            return false;
        }
        self.queue.give_all(&self.chains);
        let are_long = self.chains.listed() > LONG * self.chains.len();
        self.at_once = if are_long { LONG_AT_ONCE } else { CHAINS_MAX };
        self.chains.clear();
        self.queue.publish()
    }

    /// Whether a chain is held back because its translation is missing; see [`DeviceQueue::missing`].
    #[must_use]
    #[inline]
    pub fn has_missed(&self) -> bool {
        self.chains.has_missed()
    }

    /// The queue below, for arming, positions and the end.
    #[must_use]
    pub fn queue(&self) -> &DeviceQueue {
        &self.queue
    }

    /// The same, to change.
    pub fn queue_mut(&mut self) -> &mut DeviceQueue {
        &mut self.queue
    }
}

fn header_len(features: Features) -> u32 {
    u32::try_from(features.header_len()).unwrap_or_default()
}

/// Reads the header from the first buffers of a chain; what follows it is the frame.
fn split_header<'a>(
    memory: &GuestMemory,
    buffers: &'a [Segment],
    header: &mut [u8],
) -> impl Iterator<Item = Segment> + 'a {
    let mut filled = 0;
    for &buffer in buffers {
        filled += memory.slice(buffer).copy_to(&mut header[filled..]);
    }
    let mut skip = u32::try_from(header.len()).unwrap_or_default();
    buffers.iter().filter_map(move |&buffer| {
        let rest = buffer.skip(skip);
        skip -= buffer.len - rest.len;
        (rest.len > 0).then_some(rest)
    })
}

/// A running receiveq: packets go into the driver's buffers.
#[derive(Debug)]
pub struct ReceiveQueue {
    queue: DeviceQueue,
    chains: Chains,
    header_len: u32,
    mergeable: bool,
    /// The header has room for a hash.
    reports_hash: bool,
    /// Computes it, if the driver has asked for that.
    hasher: Option<Arc<Hasher>>,
}

impl ReceiveQueue {
    /// Gives a queue its meaning, by what was negotiated.
    #[must_use]
    pub fn new(queue: DeviceQueue, features: Features) -> Self {
        Self {
            queue,
            chains: Chains::new(),
            header_len: header_len(features),
            mergeable: features.contains(Features::MRG_RXBUF),
            reports_hash: features.contains(Features::HASH_REPORT),
            hasher: None,
        }
    }

    /// Says what computes the hashes that headers report, if HASH_REPORT was negotiated; without it they report none.
    pub fn set_hasher(&mut self, hasher: Option<Arc<Hasher>>) {
        self.hasher = hasher.filter(|_| self.reports_hash);
    }

    /// Writes the picked packets into the driver's buffers, in order; how many were accepted, counted from the front.
    ///
    /// An accepted packet is written or counted in `tx_drops`; the others found no buffers. The driver sees them after
    /// [`Self::publish`].
    ///
    /// # Errors
    /// [`RingError`]: the queue must be stopped. Nothing was accepted.
    #[inline]
    pub fn fill(
        &mut self,
        memory: &GuestMemory,
        burst: &Burst,
        picks: &Picks,
        counters: &mut PortCounters,
    ) -> Result<usize, RingError> {
        // Packets of several buffers use up what was taken early: another round, as long as the last one got on.
        let mut accepted = 0;
        while accepted < picks.len() {
            let (more, outcome) = self.fill_some(memory, burst, picks, accepted, counters);
            accepted += more;
            match outcome {
                // What was accepted before stands; the next call meets the error again.
                Err(error) if accepted == 0 => return Err(error),
                Ok(()) if more > 0 => {}
                _ => break,
            }
        }
        Ok(accepted)
    }

    /// Writes the packets picked from the `first` on into as many chains as there are packets; how many were accepted, and what
    /// is wrong with the ring behind them.
    #[inline]
    fn fill_some(
        &mut self,
        memory: &GuestMemory,
        burst: &Burst,
        picks: &Picks,
        first: usize,
        counters: &mut PortCounters,
    ) -> (usize, Result<(), RingError>) {
        let wanted = picks.len() - first;
        let usual = picks.iter_from(first).next();
        let usual = usual.map_or(0, |i| burst.frame_len(i)).min(WRITE);
        // The driver wrote these lines last, or read them. Stores wait for them in their order: 40 % of the time of a short packet,
        // unless they come while descriptors are read.
        let own_at = (usual <= LINE).then_some(self.header_len as usize);
        let mut rooms = ChainBytes::owned_at(own_at);
        let mut outcome = self
            .queue
            .take_with_bytes(memory, Access::Write, wanted, &mut self.chains, &mut rooms)
            .map(|_| ());
        let mut lens = [0; CHAINS_MAX];
        let (plain, mut sent_bytes) = if self.reports_hash {
            (0, 0)
        } else {
            let rooms = rooms.as_slice();
            self.fill_plain(rooms, usual, burst, picks, first, &mut lens)
        };
        let (mut next, mut accepted, mut sent) = (plain, plain, plain as u64);
        for i in picks.iter_from(first + plain) {
            let frame_len = burst.frame_len(i);
            let need = self.header_len as usize + frame_len;
            let Some(room) = self.next_room(&mut next, &mut lens, counters) else {
                break;
            };
            if room >= need {
                self.write(memory, next, 1, burst, i);
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "need is at most the chain's u32 length"
                )]
                {
                    lens[next] = need as u32;
                }
                next += 1;
            } else if self.mergeable {
                match self.merge(memory, next, need) {
                    Ok(Merged::Chains(n)) => {
                        self.write(memory, next, n, burst, i);
                        self.spread(need, &mut lens, next, n);
                        next += n;
                    }
                    Ok(Merged::NotNow) => break,
                    Ok(Merged::Never(reason)) => {
                        counters.tx_drops.add(reason, 1);
                        accepted += 1;
                        continue;
                    }
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                }
            } else {
                counters.tx_drops.add(DropReason::TooBig, 1);
                accepted += 1;
                continue;
            }
            accepted += 1;
            sent += 1;
            sent_bytes += frame_len as u64;
        }
        if memory.log().is_some() {
            self.log_written(memory, &lens[..next]);
        }
        self.queue.give(&self.chains, 0, &lens[..next]);
        let left = self.chains.len() - next;
        if left > 0 {
            self.queue.untake(left, &mut self.chains);
        }
        self.chains.clear();
        counters.sent += sent;
        counters.sent_bytes += sent_bytes;
        (accepted, outcome)
    }

    /// Marks what was written: so many bytes of each chain.
    #[cold]
    fn log_written(&self, memory: &GuestMemory, lens: &[u32]) {
        for (chain, &len) in lens.iter().enumerate() {
            let mut left = len;
            for &buffer in self.chains.segments(chain) {
                let written = buffer.first(left);
                memory.mark_written(written);
                left -= written.len;
            }
        }
    }

    /// Writes the packets picked from the `first` on as long as each fits the one buffer of the chain that is next, the usual case;
    /// how many, and their bytes. Frames of `usual` bytes or a little more are expected; what is more than a line of each is fetched ahead.
    #[inline(always)]
    fn fill_plain(
        &self,
        rooms: &[GuestSlice<'_>],
        usual: usize,
        burst: &Burst,
        picks: &Picks,
        first: usize,
        lens: &mut [u32; CHAINS_MAX],
    ) -> (usize, u64) {
        let header_len = self.header_len as usize;
        let n = self.chains.len().min(picks.len() - first);
        let (mut filled, mut bytes) = (0, 0);
        'frames: for (fetch, fill) in runs(n, usual) {
            if usual > LINE {
                let frames = picks.iter_from(first + fetch.start);
                for (i, room) in frames.zip(&rooms[fetch]) {
                    let room = room.split_at(header_len).1;
                    room.prefetch_write(burst.frame_len(i).min(WRITE));
                }
            }
            let picked = picks.iter_from(first + fill.start);
            let room = rooms[fill.clone()].iter();
            for ((i, room), len) in picked.zip(room).zip(&mut lens[fill]) {
                let frame_len = burst.frame_len(i);
                let need = header_len + frame_len;
                if room.len() < need {
                    break 'frames;
                }
                // A line that already says the right thing stays in both caches.
                let header = header::build(burst.offload(i), 1);
                if room.read().is_none_or(|found| found != header) {
                    write_header(room, header_len, burst, i);
                }
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "need is at most the buffer's u32 length"
                )]
                {
                    *len = need as u32;
                }
                filled += 1;
                bytes += frame_len as u64;
                burst.copy_frame_to_guest(i, &room.split_at(header_len).1);
            }
        }
        (filled, bytes)
    }

    /// Bytes of the next chain that is of any use; those before it make no sense, or would not even hold a header, and are given
    /// back.
    #[inline]
    fn next_room(
        &self,
        next: &mut usize,
        lens: &mut [u32; CHAINS_MAX],
        counters: &mut PortCounters,
    ) -> Option<usize> {
        while *next < self.chains.len() {
            match self.chains.bytes(*next) {
                Ok(bytes) if bytes >= self.header_len => return Some(bytes as usize),
                _ => {
                    lens[*next] = 0;
                    counters.bad_buffers += 1;
                    *next += 1;
                }
            }
        }
        None
    }

    /// How many chains from `next` on hold `need` bytes together, taking more from the ring as needed.
    #[inline(never)]
    fn merge(
        &mut self,
        memory: &GuestMemory,
        next: usize,
        need: usize,
    ) -> Result<Merged, RingError> {
        let (mut n, mut room) = (0, 0);
        loop {
            while next + n < self.chains.len() {
                let Ok(bytes) = self.chains.bytes(next + n) else {
                    // A bad buffer in the middle ends the run; it will be given back when it comes to the front.
                    return Ok(Merged::Never(DropReason::BadBuffer));
                };
                room += bytes as usize;
                n += 1;
                if room >= need {
                    return Ok(Merged::Chains(n));
                }
            }
            if self.chains.room() == 0 {
                return Ok(if next == 0 {
                    Merged::Never(DropReason::TooBig)
                } else {
                    Merged::NotNow
                });
            }
            if n >= usize::from(self.queue.size()) {
                return Ok(Merged::Never(DropReason::TooBig));
            }
            if self
                .queue
                .take(memory, Access::Write, CHAINS_MAX, &mut self.chains)?
                == 0
            {
                return Ok(Merged::NotNow);
            }
        }
    }

    /// Every buffer of a merged packet but the last is full. Spec: virtio 1.4, 5.1.9.4, Processing of Incoming Packets.
    fn spread(&self, need: usize, lens: &mut [u32; CHAINS_MAX], next: usize, n: usize) {
        let mut left = u32::try_from(need).unwrap_or(u32::MAX);
        for (i, len) in lens.iter_mut().enumerate().skip(next).take(n) {
            *len = self.chains.bytes(i).unwrap_or(0).min(left);
            left -= *len;
        }
    }

    /// Writes header and frame of packet `i` over `n` chains from `first` on, however many buffers they have.
    #[inline(never)]
    fn write(&self, memory: &GuestMemory, first: usize, n: usize, burst: &Burst, i: usize) {
        #[expect(clippy::cast_possible_truncation, reason = "n is at most CHAINS_MAX")]
        let base = header::build(burst.offload(i), n as u16);
        let mut header = [0; HEADER_MAX];
        header[..HEADER_BASE].copy_from_slice(&base);
        if let Some(hasher) = &self.hasher {
            let hash = header::build_hash(hasher.hash(burst.head(i)));
            header[HEADER_BASE..].copy_from_slice(&hash);
        }
        let header = &header[..self.header_len as usize];
        let mut room = (first..first + n)
            .flat_map(|c| self.chains.segments(c))
            .map(|&s| memory.slice(s));
        let mut at = GuestSlice::empty();
        scatter_bytes(header, &mut at, &mut room);
        scatter_bytes(burst.head(i), &mut at, &mut room);
        for mut piece in burst.body(i) {
            while !piece.is_empty() {
                if at.is_empty() {
                    let Some(next) = room.next() else { return };
                    at = next;
                }
                let written = piece.copy_to_guest(&at);
                at = at.split_at(written).1;
                piece = piece.skip(written);
            }
        }
    }

    /// Lets the driver see what was written; whether it is to be called.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    /// As [`TransmitQueue::has_missed`].
    #[must_use]
    #[inline]
    pub fn has_missed(&self) -> bool {
        self.chains.has_missed()
    }

    /// The queue below, for arming, positions and the end.
    #[must_use]
    pub fn queue(&self) -> &DeviceQueue {
        &self.queue
    }

    /// The same, to change.
    pub fn queue_mut(&mut self) -> &mut DeviceQueue {
        &mut self.queue
    }
}

/// How a packet that needs several buffers fares.
enum Merged {
    /// It spans so many chains.
    Chains(usize),
    /// The driver has not made enough buffers available yet.
    NotNow,
    /// The driver's buffers cannot hold it, now or later.
    Never(DropReason),
}

/// Writes as much of the header of a frame in one buffer as was negotiated.
#[cold]
#[inline(never)]
fn write_header(room: &GuestSlice<'_>, header_len: usize, burst: &Burst, i: usize) {
    let header = header::build(burst.offload(i), 1);
    room.copy_from(&header[..header_len.min(HEADER_BASE)]);
}

/// Writes bytes over consecutive pieces of guest memory.
fn scatter_bytes<'mem>(
    mut bytes: &[u8],
    at: &mut GuestSlice<'mem>,
    room: &mut impl Iterator<Item = GuestSlice<'mem>>,
) {
    while !bytes.is_empty() {
        if at.is_empty() {
            let Some(next) = room.next() else { return };
            *at = next;
        }
        let written = at.copy_from(bytes);
        *at = at.split_at(written).1;
        bytes = &bytes[written..];
    }
}
