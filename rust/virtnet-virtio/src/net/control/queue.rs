//! A control queue over either ring format, from either side. The rings are our own on both sides: commands are few, and a second
//! implementation for split rings alone would be a second way for the same bytes.

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, MemoryError, Segment};

use super::ERR;
use crate::{Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, RingError, Used};

/// Bytes of the longest request that is read; more is no command that anyone sends.
pub const CONTROL_MAX: u32 = 1 << 16;

/// A control queue seen by the device.
#[derive(Debug)]
pub struct ControlQueue {
    queue: DeviceQueue,
    chains: Chains,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl ControlQueue {
    /// Gives a queue its meaning.
    #[must_use]
    pub fn new(queue: DeviceQueue) -> Self {
        Self {
            queue,
            chains: Chains::new(),
            request: Vec::new(),
            answer: Vec::new(),
        }
    }

    /// Has the next request answered, if there is one: `answer` gets its bytes and appends the answer's. What follows from it has to
    /// be in force when that returns. Whether there was a request; [`Self::publish`] lets the driver see the answer.
    ///
    /// A request that makes no sense as buffers, or is too long, is answered by an error here.
    ///
    /// # Errors
    /// [`RingError`]: the queue must be stopped.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        answer: impl FnOnce(&[u8], &mut Vec<u8>),
    ) -> Result<bool, RingError> {
        self.chains.clear();
        let taken = self
            .queue
            .take(memory, Access::Request, 1, &mut self.chains)?;
        if taken == 0 {
            return Ok(false);
        }
        let (readable, writable) = self.chains.request();
        self.answer.clear();
        if read(memory, readable, &mut self.request) {
            answer(&self.request, &mut self.answer);
        } else {
            self.answer.push(ERR);
        }
        let written = write(memory, writable, &self.answer);
        self.queue.give(&self.chains, 0, &[written]);
        self.chains.clear();
        Ok(true)
    }

    /// Lets the driver see the answers; whether it is to be called.
    pub fn publish(&mut self) -> bool {
        self.queue.publish()
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

/// Copies a request out; whether it is short enough, and there is one.
fn read(memory: &GuestMemory, buffers: &[Segment], into: &mut Vec<u8>) -> bool {
    into.clear();
    let lens = buffers.iter().map(|buffer| u64::from(buffer.len));
    let len: u64 = lens.sum();
    if len == 0 || len > u64::from(CONTROL_MAX) {
        return false;
    }
    into.resize(usize::try_from(len).unwrap_or_default(), 0);
    let mut filled = 0;
    for &buffer in buffers {
        filled += memory.slice(buffer).copy_to(&mut into[filled..]);
    }
    true
}

/// Copies an answer in, as much as there is room for; how many bytes.
fn write(memory: &GuestMemory, buffers: &[Segment], answer: &[u8]) -> u32 {
    let mut written = 0;
    for &buffer in buffers {
        let here = memory.slice(buffer).copy_from(&answer[written..]);
        memory.mark_written(buffer.first(u32::try_from(here).unwrap_or_default()));
        written += here;
    }
    u32::try_from(written).unwrap_or_default()
}

/// A control queue seen by the driver: one command at a time, in memory of its own.
#[derive(Debug)]
pub struct DriverControl {
    queue: DriverQueue,
    memory: Arc<GuestMemory>,
    /// Where the request is written; the answer follows at [`Self::ROOM`].
    area: GuestAddr,
    /// Names the same bytes.
    whole: Segment,
    is_asking: bool,
}

impl DriverControl {
    /// Bytes of a request at most, and of an answer.
    pub const ROOM: u32 = 4096;

    /// Bytes of the area that a control queue needs beside its ring.
    pub const AREA: u32 = 2 * Self::ROOM;

    /// Descriptors that a control queue needs.
    pub const DESCRIPTORS: u16 = 2;

    /// Gives an empty queue of at least [`Self::DESCRIPTORS`] its meaning.
    ///
    /// # Errors
    /// [`MemoryError::NotMapped`] when the area of [`Self::AREA`] bytes is not inside `memory`.
    pub fn new(
        queue: DriverQueue,
        memory: Arc<GuestMemory>,
        area: GuestAddr,
    ) -> Result<Self, MemoryError> {
        let whole = memory.translate(area, Self::AREA, &mut 0);
        let whole = whole.ok_or_else(|| MemoryError::NotMapped {
            addr: virtnet_mem::UserAddr(area.0),
            size: Self::AREA.into(),
        })?;
        Ok(Self {
            queue,
            memory,
            area,
            whole,
            is_asking: false,
        })
    }

    /// Whether a request is still to be answered.
    #[must_use]
    pub fn is_asking(&self) -> bool {
        self.is_asking
    }

    /// Makes a request available; whether the device is to be kicked. `None`: the one before has not been answered, or it is longer
    /// than [`Self::ROOM`].
    pub fn ask(&mut self, request: &[u8]) -> Option<bool> {
        let len = u32::try_from(request.len()).ok()?;
        if self.is_asking || len > Self::ROOM {
            return None;
        }
        self.memory.slice(self.whole).copy_from(request);
        let readable = DriverBuffer {
            addr: self.area,
            len,
            writable: false,
        };
        let writable = DriverBuffer {
            addr: GuestAddr(self.area.0 + u64::from(Self::ROOM)),
            len: Self::ROOM,
            writable: true,
        };
        self.queue.add(&[readable, writable])?;
        self.is_asking = true;
        // The answer is worth a call, whenever it comes.
        self.queue.arm();
        Some(self.queue.publish())
    }

    /// The bytes that the device has answered with, when it has.
    ///
    /// # Errors
    /// [`RingError`]: the device is at fault, the queue is lost.
    pub fn answer(&mut self) -> Result<Option<Vec<u8>>, RingError> {
        let mut used = [Used::default()];
        if self.queue.reap(&mut used)? == 0 {
            return Ok(None);
        }
        self.is_asking = false;
        let [Used { len, .. }] = used;
        let written = self.whole.skip(Self::ROOM).first(len);
        let mut bytes = vec![0; written.len as usize];
        self.memory.slice(written).copy_to(&mut bytes);
        Ok(Some(bytes))
    }
}
