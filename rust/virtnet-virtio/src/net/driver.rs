//! The queues of a network device, seen by the driver: packets out of receiveqs, packets into transmitqs.
//!
//! Every descriptor has a buffer of its own, at a fixed place in memory of ours. A frame starts on a line of its own with its
//! header in front of it, so that for plain packets the header's line never changes.

use std::num::NonZeroU64;
use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, GuestSlice, MemoryError, Segment, Slots};
use virtnet_packet::{BURST_MAX, Burst, DropReason, HEAD_MAX, Offload, Picks, PortCounters};

use super::header::{self, Allowed, HEADER_BASE};
use super::{FRAME_MAX, FRAME_MIN};
use crate::{DriverBuffer, DriverQueue, Features, RingError, Used};

/// Room in front of a frame for its header: a line.
const HEADROOM: u32 = 64;

/// Where a queue's buffers are: `count` of [`Self::STRIDE`] bytes, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct BufferArea {
    /// The first byte, on a line.
    pub start: GuestAddr,
    /// How many buffers; one for each descriptor of the queue.
    pub count: u16,
}

impl BufferArea {
    /// Bytes from buffer to buffer: 36 lines, so that buffers do not all fall on the same cache sets.
    pub const STRIDE: u32 = 2304;
    /// Bytes of a frame that one buffer holds.
    pub const FRAME_ROOM: u32 = Self::STRIDE - HEADROOM;

    /// Bytes of the whole area.
    #[must_use]
    pub fn bytes(count: u16) -> usize {
        usize::from(count) * Self::STRIDE as usize
    }
}

/// The same, found in memory: buffer `i` belongs to the queue's descriptor id `i`.
#[derive(Clone, Debug)]
struct Buffers {
    start: GuestAddr,
    slots: Slots,
    /// The whole area, to name what stays in a buffer.
    whole: Segment,
}

impl Buffers {
    fn new(memory: &GuestMemory, area: BufferArea) -> Result<Self, MemoryError> {
        let slots = memory.slots(area.start, area.count.into(), BufferArea::STRIDE)?;
        let mut hint = 0;
        let size = u32::from(area.count) * BufferArea::STRIDE;
        Ok(Self {
            start: area.start,
            slots,
            whole: memory
                .translate(area.start, size, &mut hint)
                .unwrap_or_default(),
        })
    }

    /// Where buffer `i` is for the device, from `front` bytes before the frame on.
    #[inline(always)]
    fn addr(&self, i: u16, front: u32) -> GuestAddr {
        let skip = u32::from(i) * BufferArea::STRIDE + HEADROOM - front;
        GuestAddr(self.start.0 + u64::from(skip))
    }

    /// Bytes of buffer `i`, from `front` bytes before the frame on.
    #[inline(always)]
    fn bytes(&self, i: u16, front: u32, len: u32) -> GuestSlice<'_> {
        self.slots.slice(i.into(), HEADROOM - front, len)
    }

    /// The room for a frame in buffer `i`.
    #[inline(always)]
    fn room(&self, i: u16) -> GuestSlice<'_> {
        self.bytes(i, 0, BufferArea::FRAME_ROOM)
    }

    /// Names the same bytes as [`Self::bytes`].
    #[inline(always)]
    fn segment(&self, i: u16, front: u32, len: u32) -> Segment {
        let skip = u32::from(i) * BufferArea::STRIDE + HEADROOM - front;
        self.whole.skip(skip).first(len)
    }
}

/// A running receiveq: the device's packets come out of it.
#[derive(Debug)]
pub struct DriverReceive {
    queue: DriverQueue,
    memory: Arc<GuestMemory>,
    buffers: Buffers,
    count: u16,
    header_len: u32,
    allowed: Allowed,
    mergeable: bool,
    /// Headers report hashes.
    reports_hash: bool,
    /// What was reaped: the first `done` are in the burst on its way or dropped, the others wait for the next one.
    used: Box<[Used]>,
    reaped: usize,
    done: usize,
    frame: Vec<Segment>,
}

impl DriverReceive {
    /// Gives an empty queue its meaning and makes all its buffers available; the device sees them after [`Self::publish`].
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] when the buffers are not inside `memory`.
    pub fn new(
        queue: DriverQueue,
        memory: Arc<GuestMemory>,
        area: BufferArea,
        features: Features,
    ) -> Result<Self, MemoryError> {
        let mut receive = Self {
            queue,
            buffers: Buffers::new(&memory, area)?,
            memory,
            count: area.count,
            header_len: u32::try_from(features.header_len()).unwrap_or_default(),
            allowed: Allowed::device(features),
            mergeable: features.contains(Features::MRG_RXBUF),
            reports_hash: features.contains(Features::HASH_REPORT),
            used: vec![Used::default(); BURST_MAX.max(area.count.into())].into(),
            reaped: 0,
            done: 0,
            frame: Vec::new(),
        };
        receive.post(area.count.into());
        Ok(receive)
    }

    /// Makes the buffers of the next `n` ids available.
    #[inline]
    fn post(&mut self, n: usize) {
        let (buffers, header_len) = (&self.buffers, self.header_len);
        let len = header_len + BufferArea::FRAME_ROOM;
        self.queue.add_each(n, |id| DriverBuffer {
            addr: buffers.addr(id, header_len),
            len,
            writable: true,
        });
    }

    /// Appends packets that the device has written; how many buffers were taken. [`Self::complete`] gives them back.
    ///
    /// # Errors
    /// [`RingError`]: the device is at fault, the queue is lost.
    pub fn receive(
        &mut self,
        burst: &mut Burst,
        counters: &mut PortCounters,
    ) -> Result<usize, RingError> {
        let before = self.done;
        // Once, unless packets take several buffers each: then until the burst is full or nothing more is there.
        while self.reap()? > 0 || self.done < self.reaped {
            burst.set_memory(&self.memory);
            self.queue.prepare(self.reaped - self.done);
            let (packets, waited) = (burst.len(), self.reaped - self.done);
            self.receive_reaped(burst, counters)?;
            let got = burst.len() - packets;
            if burst.room() == 0 || got == waited || self.reaped == self.used.len() {
                break;
            }
        }
        Ok(self.done - before)
    }

    /// Takes what the device has used, a burst of it at most.
    #[inline]
    fn reap(&mut self) -> Result<usize, RingError> {
        let room = self.used.len().min(self.reaped + BURST_MAX);
        let n = self.queue.reap(&mut self.used[self.reaped..room])?;
        // The frames are on their way here while the first of them are looked at.
        for used in &self.used[self.reaped..self.reaped + n] {
            self.buffers.room(used.id).prefetch(0);
        }
        self.reaped += n;
        Ok(n)
    }

    /// Puts the packets that are there whole into the burst.
    #[inline(always)]
    fn receive_reaped(
        &mut self,
        burst: &mut Burst,
        counters: &mut PortCounters,
    ) -> Result<(), RingError> {
        if !self.reports_hash {
            self.receive_plain(burst, counters);
        }
        while self.done < self.reaped && burst.room() > 0 {
            let waiting = self.reaped - self.done;
            let first = self.used[self.done];
            let (bytes, offload, num_buffers) = self.header(first);
            // Without a whole header there is no count: a buffer that was returned empty.
            let n = if self.mergeable && bytes.is_some() {
                usize::from(num_buffers)
            } else {
                1
            };
            if n == 0 || n > usize::from(self.count) || n > BURST_MAX {
                return Err(RingError::NumBuffers {
                    found: num_buffers,
                    available: available(waiting),
                });
            }
            if n > waiting {
                // The device returns all buffers of a packet at once, so they are there already or will not come.
                if self.reaped < self.used.len() && !self.queue.has_work() {
                    return Err(RingError::NumBuffers {
                        found: num_buffers,
                        available: available(waiting),
                    });
                }
                break;
            }
            counters.received += 1;
            match self.frame(n, bytes, offload, burst) {
                Ok(frame_len) => {
                    counters.received_bytes += u64::from(frame_len);
                    if self.reports_hash {
                        self.note_hash(first, burst);
                    }
                }
                Err(reason) => counters.rx_drops.add(reason, 1),
            }
            self.done += n;
        }
        Ok(())
    }

    /// Puts the frames that come next into the burst as long as they are plain and in one buffer each: the usual case.
    #[inline(always)]
    fn receive_plain(&mut self, burst: &mut Burst, counters: &mut PortCounters) {
        let waiting = &self.used[self.done..self.reaped];
        let waiting = &waiting[..waiting.len().min(burst.room())];
        let (mut n, mut bytes) = (0, 0);
        for used in waiting {
            // In one buffer, with nothing left to do: one comparison. What is neither, or has a shorter header, is looked at closer.
            let whole = self.buffers.bytes(used.id, self.header_len, used.len);
            if whole.read() != Some(header::PLAIN) {
                break;
            }
            let frame = whole.split_at(self.header_len as usize).1;
            let frame_len = used.len - self.header_len;
            if check_len(frame_len).is_err() {
                break;
            }
            let name = || self.buffers.segment(used.id, 0, frame_len);
            burst.push_guest_named(frame, name, Offload::default());
            n += 1;
            bytes += u64::from(frame_len);
        }
        self.done += n;
        counters.received += n as u64;
        counters.received_bytes += bytes;
    }

    /// What the device says it has written of a buffer, header and all.
    #[inline(always)]
    fn written(&self, used: Used) -> Segment {
        self.buffers.segment(used.id, self.header_len, used.len)
    }

    /// The hash in the header of the packet that was put into the burst last.
    fn note_hash(&self, first: Used, burst: &mut Burst) {
        let whole = self.memory.slice(self.written(first));
        if let Some(hash) = whole.split_at(HEADER_BASE).1.read() {
            burst.set_hash(burst.len() - 1, header::parse_hash(hash));
        }
    }

    /// Bytes behind the header in its buffer, and what the header says.
    #[inline]
    fn header(&self, used: Used) -> (Option<u32>, Offload, u16) {
        let whole = self.written(used);
        let mut bytes = [0; HEADER_BASE];
        let len = HEADER_BASE.min(self.header_len as usize);
        self.memory.slice(whole).copy_to(&mut bytes[..len]);
        let (offload, num_buffers) = header::parse(bytes);
        (used.len.checked_sub(self.header_len), offload, num_buffers)
    }

    /// Puts the frame of the next `n` buffers into the burst; its length.
    #[inline]
    fn frame(
        &mut self,
        n: usize,
        first: Option<u32>,
        offload: Offload,
        burst: &mut Burst,
    ) -> Result<u32, DropReason> {
        let mut len = first.ok_or(DropReason::Malformed)?;
        let offload = if offload.is_plain() {
            offload
        } else {
            self.allowed.check(offload, self.frame_len(n, len))?
        };
        let head = self.buffers.segment(self.used[self.done].id, 0, len);
        if n == 1 {
            check_len(len)?;
            burst.push_guest(self.memory.slice(head), head, offload);
            return Ok(len);
        }
        self.frame.clear();
        self.frame.push(head);
        for k in 1..n {
            let bytes = self.written(self.used[self.done + k]);
            self.frame.push(bytes);
            len += bytes.len;
        }
        check_len(len)?;
        burst.push_guest_runs(&self.memory, self.frame.iter().copied(), len, offload);
        Ok(len)
    }

    /// Bytes of the frame of the next `n` buffers, `first` of them in the first.
    fn frame_len(&self, n: usize, first: u32) -> u32 {
        let others = &self.used[self.done + 1..self.done + n];
        first + others.iter().map(|used| used.len).sum::<u32>()
    }

    /// Gives the buffers of packets that have gone their way back to the device; whether it is to be kicked.
    #[inline]
    pub fn complete(&mut self) -> bool {
        if self.done == 0 {
            return false;
        }
        // Ids come round in the order in which they came back, so these are the next.
        self.post(self.done);
        self.used.copy_within(self.done..self.reaped, 0);
        self.reaped -= self.done;
        self.done = 0;
        self.queue.publish()
    }

    /// Lets the device see the buffers; whether it is to be kicked.
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    /// The queue below.
    #[must_use]
    pub fn queue(&self) -> &DriverQueue {
        &self.queue
    }

    /// The same, to change.
    pub fn queue_mut(&mut self) -> &mut DriverQueue {
        &mut self.queue
    }

    /// Whether packets wait.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.reaped > self.done || self.queue.has_work()
    }
}

fn available(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

fn check_len(len: u32) -> Result<(), DropReason> {
    match len {
        0..FRAME_MIN => Err(DropReason::Runt),
        FRAME_MIN..=FRAME_MAX => Ok(()),
        _ => Err(DropReason::Malformed),
    }
}

/// Whether frame `i` fits one buffer.
#[inline]
fn is_small(burst: &Burst, i: usize) -> bool {
    burst.frame_len(i) <= BufferArea::FRAME_ROOM as usize
}

/// How many buffers a frame takes.
#[inline]
fn buffers_for(frame_len: usize) -> usize {
    frame_len.div_ceil(BufferArea::FRAME_ROOM as usize).max(1)
}

/// What was written to a buffer last.
#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    header: [u8; HEADER_BASE],
    /// The packet, or the body behind the room of a head, if it is one that lasts.
    name: Option<NonZeroU64>,
}

/// A running transmitq: packets go into the device.
#[derive(Debug)]
pub struct DriverTransmit {
    queue: DriverQueue,
    buffers: Buffers,
    /// What stands in each buffer: what stays the same is not written again.
    standing: Box<[Standing]>,
    header_len: u32,
    /// The buffers of a long frame.
    chain: Vec<DriverBuffer>,
}

impl DriverTransmit {
    /// Gives an empty queue its meaning.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] when the buffers are not inside `memory`.
    pub fn new(
        queue: DriverQueue,
        memory: Arc<GuestMemory>,
        area: BufferArea,
        features: Features,
    ) -> Result<Self, MemoryError> {
        let buffers = Buffers::new(&memory, area)?;
        for i in 0..area.count {
            let headroom = buffers.bytes(i, HEADROOM, HEADROOM);
            headroom.copy_from(&[0; HEADROOM as usize]);
        }
        debug_assert_eq!(
            queue.free(),
            usize::from(area.count),
            "a buffer for each id"
        );
        Ok(Self {
            buffers,
            standing: vec![Standing::default(); queue.free()].into(),
            queue,
            header_len: u32::try_from(features.header_len()).unwrap_or_default(),
            chain: Vec::new(),
        })
    }

    /// Hands the picked packets to the device, in order; how many were accepted, counted from the front.
    ///
    /// An accepted packet is sent or counted in `tx_drops`; the others found no buffers. The device sees them after
    /// [`Self::publish`].
    ///
    /// # Errors
    /// [`RingError`]: the device is at fault, the queue is lost. Nothing was accepted.
    #[inline]
    pub fn send(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        counters: &mut PortCounters,
    ) -> Result<usize, RingError> {
        if self.queue.free() < picks.len() {
            self.queue.reclaim()?;
        }
        self.queue.prepare(picks.len());
        let mut accepted = 0;
        while accepted < picks.len() {
            accepted += self.send_small(burst, picks, accepted, counters);
            if accepted == picks.len() || is_small(burst, picks.get(accepted)) {
                break;
            }
            match self.send_large(burst, picks.get(accepted), counters) {
                Ok(true) => accepted += 1,
                // What was accepted before stands; the next call meets the error again.
                Err(error) if accepted == 0 => return Err(error),
                Ok(false) | Err(_) => break,
            }
        }
        Ok(accepted)
    }

    /// Sends packets that fit one buffer each, from the pick `first` on, as far as they do and there are free buffers; how many.
    #[inline(always)]
    fn send_small(
        &mut self,
        burst: &Burst,
        picks: &Picks,
        first: usize,
        counters: &mut PortCounters,
    ) -> usize {
        let (buffers, header_len) = (&self.buffers, self.header_len);
        let picked = || picks.iter_from(first);
        let (mut ids, mut lens, mut small) = ([0; BURST_MAX], [0; BURST_MAX], 0);
        for (i, len) in picked().zip(&mut lens) {
            let frame_len = burst.frame_len(i);
            if !is_small(burst, i) {
                break;
            }
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a frame that fits one buffer"
            )]
            {
                *len = header_len + frame_len as u32;
            }
            small += 1;
        }
        let n = self.queue.next_ids(&mut ids[..small]);
        // Copies first and descriptors after, each in a loop of its own: the lines of the one are not waited for by the other.
        if !all_stand(&self.standing, burst, picked(), &ids[..n]) {
            write_all(
                buffers,
                &mut self.standing,
                header_len,
                burst,
                picked(),
                &ids[..n],
            );
        }
        let (mut lens, mut bytes) = (lens.iter(), 0);
        self.queue.add_each(n, |id| {
            let len = lens.next().copied().unwrap_or_default();
            bytes += u64::from(len);
            DriverBuffer {
                addr: buffers.addr(id, header_len),
                len,
                writable: false,
            }
        });
        bytes -= n as u64 * u64::from(header_len);
        counters.sent += n as u64;
        counters.sent_bytes += bytes;
        n
    }

    /// Sends a packet that takes several buffers, or counts why not; whether there was room for it.
    #[inline(never)]
    fn send_large(
        &mut self,
        burst: &Burst,
        i: usize,
        counters: &mut PortCounters,
    ) -> Result<bool, RingError> {
        let frame_len = burst.frame_len(i);
        let n = buffers_for(frame_len);
        if n > self.standing.len() {
            counters.tx_drops.add(DropReason::TooBig, 1);
            return Ok(true);
        }
        if n > self.queue.free() {
            self.queue.reclaim()?;
        }
        let Some(first) = self.queue.upcoming(0) else {
            return Ok(false);
        };
        if n > self.queue.free() {
            return Ok(false);
        }
        let (buffers, header_len) = (&self.buffers, self.header_len);
        let stands = &mut self.standing[usize::from(first)];
        write_header(buffers, header_len, stands, first, burst.offload(i));
        let head = burst.head(i);
        let mut filled = buffers.room(first).copy_from(head);
        let mut left = frame_len;
        let mut body = burst.body(i);
        let mut piece = body.next();
        self.chain.clear();
        for k in 0..n {
            let Some(id) = self.queue.upcoming(k) else {
                break;
            };
            // The next buffer is on its way here while this one is filled: the device read it last.
            if let Some(next) = self.queue.upcoming(k + 1).filter(|_| k + 1 < n) {
                let room = buffers.room(next);
                room.prefetch_write(left.saturating_sub(BufferArea::FRAME_ROOM as usize));
            }
            let here = left.min(BufferArea::FRAME_ROOM as usize);
            let room = buffers.room(id);
            self.standing[usize::from(id)].name = None;
            while filled < here {
                let Some(bytes) = piece else { break };
                let written = bytes.copy_to_guest(&room.split_at(here).0.split_at(filled).1);
                filled += written;
                let rest = bytes.skip(written);
                piece = if rest.is_empty() {
                    body.next()
                } else {
                    Some(rest)
                };
            }
            let front = if k == 0 { header_len } else { 0 };
            #[expect(
                clippy::cast_possible_truncation,
                reason = "here is at most a buffer's room"
            )]
            self.chain.push(DriverBuffer {
                addr: buffers.addr(id, front),
                len: front + here as u32,
                writable: false,
            });
            left -= here;
            filled = 0;
        }
        drop(body);
        if self.queue.add(&self.chain).is_none() {
            return Ok(false);
        }
        counters.sent += 1;
        counters.sent_bytes += frame_len as u64;
        Ok(true)
    }

    /// Lets the device see what was sent; whether it is to be kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    /// Buffers that the device has not returned yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.standing.len() - self.queue.free()
    }

    /// The queue below.
    #[must_use]
    pub fn queue(&self) -> &DriverQueue {
        &self.queue
    }

    /// The same, to change.
    pub fn queue_mut(&mut self) -> &mut DriverQueue {
        &mut self.queue
    }
}

/// Whether packets stand in their buffers since they were sent last, as those of a source do: then there is nothing to write, and the
/// lines stay in both caches.
#[inline(always)]
fn all_stand(
    standing: &[Standing],
    burst: &Burst,
    mut picked: impl Iterator<Item = usize>,
    ids: &[u16],
) -> bool {
    burst.packets_last()
        && ids.iter().all(|&id| {
            let packet = picked.next().and_then(|i| burst.lasting_packet(i));
            packet.is_some() && standing[usize::from(id)].name == packet
        })
}

/// Writes packets into buffers, each with its header.
#[inline(always)]
fn write_all(
    buffers: &Buffers,
    standing: &mut [Standing],
    header_len: u32,
    burst: &Burst,
    picked: impl Iterator<Item = usize> + Clone,
    ids: &[u16],
) {
    // The device read these lines last: all are fetched at once, not one after the other in the order of the stores.
    let rooms = ids.iter().map(|&id| buffers.room(id));
    // Of long heads all lines, as far as the first one reaches: its neighbours mostly differ little.
    let head = picked.clone().next().map_or(0, |i| burst.head(i).len());
    rooms.for_each(|room| room.prefetch_write(head));
    for (i, &id) in picked.zip(ids) {
        let stands = &mut standing[usize::from(id)];
        write_header(buffers, header_len, stands, id, burst.offload(i));
        write_frame(buffers, stands, id, burst, i);
    }
}

/// Puts a header in front of the frame of buffer `id`, unless it stands there already.
#[inline(always)]
fn write_header(
    buffers: &Buffers,
    header_len: u32,
    stands: &mut Standing,
    id: u16,
    offload: Offload,
) {
    let header = header::build(offload, 0);
    if stands.header != header {
        stands.header = header;
        rewrite_header(buffers.bytes(id, header_len, header_len), header);
    }
}

/// The room for a hash behind it stays as it is: a driver has none to tell.
#[cold]
#[inline(never)]
fn rewrite_header(room: GuestSlice<'_>, header: [u8; HEADER_BASE]) {
    room.copy_from(&header[..HEADER_BASE.min(room.len())]);
}

/// Writes frame `i` into buffer `id`, without a body that stands there already.
#[inline(always)]
fn write_frame(buffers: &Buffers, stands: &mut Standing, id: u16, burst: &Burst, i: usize) {
    let room = buffers.room(id);
    if burst.frame_len(i) <= HEAD_MAX {
        stands.name = burst.lasting_packet(i);
        room.copy_from(burst.head(i));
        return;
    }
    let body = burst.lasting_body(i);
    if body.is_some() && stands.name == body {
        room.copy_from(burst.head(i));
        return;
    }
    stands.name = body;
    burst.copy_frame_to_guest(i, &room);
}
