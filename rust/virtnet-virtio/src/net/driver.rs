//! The queues of a network device, seen by the driver: packets out of receiveqs, packets into transmitqs.
//!
//! Every descriptor has a buffer of its own, at a fixed place in memory of ours. A frame starts on a line of its own with its
//! header in front of it, so that for plain packets the header's line never changes.

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, MemoryError, Segment, UserAddr};
use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload, Picks, PortCounters};

use super::header::{self, Allowed, HEADER_MAX};
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

    fn buffer(&self, memory: &GuestMemory, index: u16) -> Result<Buffer, MemoryError> {
        let addr = GuestAddr(self.start.0 + u64::from(index) * u64::from(Self::STRIDE));
        let mut hint = 0;
        match memory.translate(addr, Self::STRIDE, &mut hint) {
            Some(whole) => Ok(Buffer { addr, whole }),
            None => Err(MemoryError::NotMapped {
                addr: UserAddr(addr.0),
                size: u64::from(Self::STRIDE),
            }),
        }
    }

    fn buffers(&self, memory: &GuestMemory) -> Result<Box<[Buffer]>, MemoryError> {
        (0..self.count)
            .map(|index| self.buffer(memory, index))
            .collect()
    }
}

/// One buffer, as the device and as we see it.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    addr: GuestAddr,
    whole: Segment,
}

impl Buffer {
    /// Address and bytes from `header_len` before the frame on, `len` bytes in all.
    #[inline]
    fn with_header(&self, header_len: u32, len: u32) -> (GuestAddr, Segment) {
        let skip = HEADROOM - header_len;
        (
            GuestAddr(self.addr.0 + u64::from(skip)),
            self.whole.skip(skip).first(len),
        )
    }
}

/// A running receiveq: the device's packets come out of it.
#[derive(Debug)]
pub struct DriverReceive {
    queue: DriverQueue,
    memory: Arc<GuestMemory>,
    buffers: Box<[Buffer]>,
    /// Which buffer stands behind an id that the device holds.
    buffer_of: Box<[u16]>,
    header_len: u32,
    allowed: Allowed,
    mergeable: bool,
    /// What was reaped: the first `done` are in the burst on its way or dropped, the others wait for the next one.
    used: [Used; BURST_MAX],
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
        let buffers = area.buffers(&memory)?;
        let mut receive = Self {
            queue,
            memory,
            buffer_of: vec![0; buffers.len()].into(),
            buffers,
            header_len: u32::try_from(features.header_len()).unwrap_or_default(),
            allowed: Allowed::device(features),
            mergeable: features.contains(Features::MRG_RXBUF),
            used: [Used::default(); BURST_MAX],
            reaped: 0,
            done: 0,
            frame: Vec::new(),
        };
        for buffer in 0..area.count {
            receive.post(buffer);
        }
        Ok(receive)
    }

    #[inline]
    fn post(&mut self, buffer: u16) {
        let len = self.header_len + BufferArea::FRAME_ROOM;
        let (addr, _) = self.buffers[usize::from(buffer)].with_header(self.header_len, len);
        // There is a descriptor for every buffer, so this always finds one.
        if let Some(id) = self.queue.add(&[DriverBuffer {
            addr,
            len,
            writable: true,
        }]) {
            self.buffer_of[usize::from(id)] = buffer;
        }
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
        self.reaped += self.queue.reap(&mut self.used[self.reaped..])?;
        if self.done == self.reaped {
            return Ok(0);
        }
        burst.set_memory(&self.memory);
        // The frames are on their way here while the first of them are looked at.
        for used in &self.used[self.done..self.reaped] {
            let frame = self.buffer(*used).whole.skip(HEADROOM);
            self.memory.slice(frame).prefetch();
        }
        let before = self.done;
        while self.done < self.reaped && burst.room() > 0 {
            if let Some(frame_len) = self.plain_frame(burst) {
                counters.received += 1;
                counters.received_bytes += u64::from(frame_len);
                self.done += 1;
                continue;
            }
            let waiting = self.reaped - self.done;
            let first = self.used[self.done];
            let (bytes, offload, num_buffers) = self.header(first);
            // Without a whole header there is no count: a buffer that was returned empty.
            let n = if self.mergeable && bytes.is_some() {
                usize::from(num_buffers)
            } else {
                1
            };
            if n == 0 || n > usize::from(self.buffers_len()) || n > BURST_MAX {
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
                Ok(frame_len) => counters.received_bytes += u64::from(frame_len),
                Err(reason) => counters.rx_drops.add(reason, 1),
            }
            self.done += n;
        }
        Ok(self.done - before)
    }

    /// Puts the next frame into the burst if it is a plain one in one buffer, the usual case; its length.
    #[inline]
    fn plain_frame(&self, burst: &mut Burst) -> Option<u32> {
        let used = self.used[self.done];
        let buffer = self.buffer(used);
        let (_, whole) = buffer.with_header(self.header_len, used.len);
        let whole = self.memory.slice(whole);
        let header = whole.read()?;
        let is_single = !self.mergeable || header::num_buffers(header) == 1;
        let frame_len = used.len.checked_sub(self.header_len)?;
        if !is_single || !header::is_plain(header) || check_len(frame_len).is_err() {
            return None;
        }
        let bytes = whole.split_at(self.header_len as usize).1;
        let frame = buffer.whole.skip(HEADROOM).first(frame_len);
        burst.push_guest(bytes, frame, Offload::default());
        Some(frame_len)
    }

    /// The buffer behind an id that came back.
    #[inline]
    fn buffer(&self, used: Used) -> &Buffer {
        &self.buffers[usize::from(self.buffer_of[usize::from(used.id)])]
    }

    fn buffers_len(&self) -> u16 {
        u16::try_from(self.buffers.len()).unwrap_or(u16::MAX)
    }

    /// Bytes behind the header in its buffer, and what the header says.
    #[inline]
    fn header(&self, used: Used) -> (Option<u32>, Offload, u16) {
        let (_, whole) = self.buffer(used).with_header(self.header_len, used.len);
        let mut bytes = [0; HEADER_MAX];
        self.memory
            .slice(whole)
            .copy_to(&mut bytes[..self.header_len as usize]);
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
        let head = self.buffer(self.used[self.done]);
        let head = head.whole.skip(HEADROOM).first(len);
        if n == 1 {
            check_len(len)?;
            burst.push_guest(self.memory.slice(head), head, offload);
            return Ok(len);
        }
        self.frame.clear();
        self.frame.push(head);
        for k in 1..n {
            let used = self.used[self.done + k];
            let (_, bytes) = self.buffer(used).with_header(self.header_len, used.len);
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
        for k in 0..self.done {
            let buffer = self.buffer_of[usize::from(self.used[k].id)];
            self.post(buffer);
        }
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

/// Whether there are buffers for a frame.
enum Room {
    Found,
    NotNow,
    /// It takes more than there are.
    Never,
}

/// How many buffers a frame takes.
#[inline]
fn buffers_for(frame_len: usize) -> usize {
    frame_len.div_ceil(BufferArea::FRAME_ROOM as usize).max(1)
}

/// A running transmitq: packets go into the device.
#[derive(Debug)]
pub struct DriverTransmit {
    queue: DriverQueue,
    memory: Arc<GuestMemory>,
    buffers: Box<[Buffer]>,
    /// Free buffers, taken from the front and put back behind.
    free: Box<[u16]>,
    free_head: usize,
    n_free: usize,
    /// First buffer of the chain that the device holds under an id, and how many.
    chain_of: Box<[(u16, u16)]>,
    /// Next buffer of the same chain.
    next_of: Box<[u16]>,
    /// The header that stands in each buffer: one that stays the same is not written again.
    header_of: Box<[[u8; HEADER_MAX]]>,
    header_len: u32,
    used: [Used; BURST_MAX],
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
        let buffers = area.buffers(&memory)?;
        let count = buffers.len();
        let header_len = u32::try_from(features.header_len()).unwrap_or_default();
        for buffer in &buffers {
            memory
                .slice(buffer.whole.first(HEADROOM))
                .copy_from(&[0; HEADROOM as usize]);
        }
        Ok(Self {
            queue,
            memory,
            buffers,
            free: (0..area.count).collect(),
            free_head: 0,
            n_free: count,
            chain_of: vec![(0, 0); count].into(),
            next_of: vec![0; count].into(),
            header_of: vec![[0; HEADER_MAX]; count].into(),
            header_len,
            used: [Used::default(); BURST_MAX],
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
        if self.n_free < picks.len() {
            self.reap()?;
        }
        // The device read these lines last: all are fetched at once, not one after the other in the order of the stores.
        let ahead = self.free[self.free_head..].iter().take(picks.len());
        for &buffer in ahead.take(self.n_free) {
            let frame = self.buffers[usize::from(buffer)].whole.skip(HEADROOM);
            self.memory.slice(frame).prefetch_write();
        }
        let (mut accepted, mut sent, mut sent_bytes) = (0, 0, 0);
        for i in picks.iter() {
            let frame_len = burst.frame_len(i);
            let n = buffers_for(frame_len);
            if n > self.n_free {
                match self.find_room(n) {
                    Ok(Room::Found) => {}
                    Ok(Room::Never) => {
                        counters.tx_drops.add(DropReason::TooBig, 1);
                        accepted += 1;
                        continue;
                    }
                    // What was accepted before stands; the next call meets the error again.
                    Err(error) if accepted == 0 => return Err(error),
                    Ok(Room::NotNow) | Err(_) => break,
                }
            }
            if !self.send_one(burst, i, n) {
                break;
            }
            accepted += 1;
            sent += 1;
            sent_bytes += frame_len as u64;
        }
        counters.sent += sent;
        counters.sent_bytes += sent_bytes;
        Ok(accepted)
    }

    /// Whether `n` buffers are free once those that have come back meanwhile are counted.
    #[cold]
    fn find_room(&mut self, n: usize) -> Result<Room, RingError> {
        if n > self.buffers.len() {
            return Ok(Room::Never);
        }
        self.reap()?;
        Ok(if n <= self.n_free {
            Room::Found
        } else {
            Room::NotNow
        })
    }

    /// Takes back the buffers that the device has done with.
    fn reap(&mut self) -> Result<(), RingError> {
        loop {
            let n = self.queue.reap(&mut self.used)?;
            for k in 0..n {
                let id = usize::from(self.used[k].id);
                let (mut buffer, count) = self.chain_of[id];
                for _ in 0..count {
                    let tail = self.free_head + self.n_free;
                    let tail = if tail >= self.free.len() {
                        tail - self.free.len()
                    } else {
                        tail
                    };
                    self.free[tail] = buffer;
                    self.n_free += 1;
                    buffer = self.next_of[usize::from(buffer)];
                }
            }
            if n < self.used.len() {
                return Ok(());
            }
        }
    }

    /// Puts packet `i` into the next `n` buffers, which are free.
    #[inline]
    fn send_one(&mut self, burst: &Burst, i: usize, n: usize) -> bool {
        let frame_len = burst.frame_len(i);
        let first = self.pop_free();
        let header = header::build(burst.offload(i), 0);
        let buffer = self.buffers[usize::from(first)];
        if self.header_of[usize::from(first)] != header {
            self.header_of[usize::from(first)] = header;
            let (_, at) = buffer.with_header(self.header_len, self.header_len);
            self.memory
                .slice(at)
                .copy_from(&header[..self.header_len as usize]);
        }
        let head = burst.head(i);
        let room = self.memory.slice(buffer.whole.skip(HEADROOM));
        room.copy_from(head);
        if n > 1 {
            return self.send_chain(burst, i, first, n);
        }
        if frame_len > head.len() {
            let mut rest = room.split_at(head.len()).1;
            for piece in burst.body(i) {
                let written = piece.copy_to_guest(&rest);
                rest = rest.split_at(written).1;
            }
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a frame that fits one buffer"
        )]
        let (addr, bytes) = buffer.with_header(self.header_len, self.header_len + frame_len as u32);
        let added = self.queue.add(&[DriverBuffer {
            addr,
            len: bytes.len,
            writable: false,
        }]);
        self.note(added, first, 1)
    }

    /// A frame of several buffers; its header and head stand in the first already.
    #[inline(never)]
    fn send_chain(&mut self, burst: &Burst, i: usize, first: u16, n: usize) -> bool {
        let mut chain = Vec::with_capacity(n);
        let mut index = first;
        let mut filled = burst.head(i).len();
        let mut left = burst.frame_len(i);
        let mut body = burst.body(i);
        let mut piece = body.next();
        for k in 0..n {
            let buffer = self.buffers[usize::from(index)];
            let here = left.min(BufferArea::FRAME_ROOM as usize);
            let room = self.memory.slice(buffer.whole.skip(HEADROOM));
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
            let front = if k == 0 { self.header_len } else { 0 };
            #[expect(
                clippy::cast_possible_truncation,
                reason = "here is at most a buffer's room"
            )]
            let (addr, bytes) = buffer.with_header(front, front + here as u32);
            chain.push(DriverBuffer {
                addr,
                len: bytes.len,
                writable: false,
            });
            left -= here;
            filled = 0;
            if k + 1 < n {
                let next = self.pop_free();
                self.next_of[usize::from(index)] = next;
                index = next;
            }
        }
        let added = self.queue.add(&chain);
        self.note(added, first, u16::try_from(n).unwrap_or(u16::MAX))
    }

    #[inline]
    fn note(&mut self, added: Option<u16>, first: u16, count: u16) -> bool {
        // There is a descriptor for every buffer, so whoever finds buffers free finds descriptors free.
        debug_assert!(added.is_some(), "descriptors ran out before buffers");
        if let Some(id) = added {
            self.chain_of[usize::from(id)] = (first, count);
        }
        added.is_some()
    }

    #[inline]
    fn pop_free(&mut self) -> u16 {
        let index = self.free[self.free_head];
        self.free_head += 1;
        if self.free_head == self.free.len() {
            self.free_head = 0;
        }
        self.n_free -= 1;
        index
    }

    /// Lets the device see what was sent; whether it is to be kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
    }

    /// Packets that the device has not returned yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.free.len() - self.n_free
    }

    /// The queue below.
    pub fn queue_mut(&mut self) -> &mut DriverQueue {
        &mut self.queue
    }
}
