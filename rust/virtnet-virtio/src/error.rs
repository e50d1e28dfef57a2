//! What a peer can get wrong in a virtqueue: an error that costs one chain, or one that stops the ring.

use virtnet_mem::MemoryError;

/// A chain that makes no sense. It is given back with length 0, counted, and the ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ChainError {
    /// More descriptors than the ring has or than [`DESCS_MAX`](crate::DESCS_MAX), which is also what a loop looks like.
    #[error("the chain has more descriptors than the queue or than are followed, or loops")]
    TooLong,
    /// A `next` field outside its table.
    #[error("a descriptor's next field is outside its table")]
    NextRange,
    /// A buffer that is not in the guest's memory.
    #[error("a buffer is not inside the guest's memory")]
    Address,
    /// An indirect descriptor that was not negotiated, is nested, or also has NEXT.
    #[error("an indirect descriptor is not allowed here")]
    Indirect,
    /// An indirect table whose length is 0, no multiple of 16, or more than the ring's size.
    #[error("an indirect table has an impossible length")]
    IndirectLen,
    /// A buffer of the wrong direction: device-writable on a transmitq, device-readable on a receiveq.
    #[error("a buffer has the wrong direction for this queue")]
    Direction,
    /// No bytes at all.
    #[error("the chain has no bytes")]
    Empty,
    /// More bytes than a chain may have.
    #[error("the chain has more than 2^32 - 1 bytes")]
    TooBig,
}

/// A ring that cannot be followed any further: the queue stops, other queues go on. The other side is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The available index is further ahead than the ring is long.
    #[error("the available index {found} is more than {size} ahead of {expected}")]
    AvailIndex {
        /// What the driver wrote.
        found: u16,
        /// Next index that we would read.
        expected: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A head outside the descriptor table.
    #[error("available ring entry names descriptor {head} of {size}")]
    HeadRange {
        /// What the driver wrote.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// The used index is further ahead than buffers are outstanding.
    #[error("the used index {found} is more than {outstanding} ahead of {expected}")]
    UsedIndex {
        /// What the device wrote.
        found: u16,
        /// Next index that we would read.
        expected: u16,
        /// Buffers that the device holds.
        outstanding: u16,
    },
    /// The device returned a buffer that it does not hold.
    #[error("the device returned buffer {id}, which it does not hold")]
    UsedId {
        /// What the device wrote.
        id: u32,
    },
    /// The device says it wrote more than the buffer holds.
    #[error("the device wrote {len} bytes to buffer {id} of {size}")]
    UsedLen {
        /// Which buffer.
        id: u32,
        /// What the device wrote.
        len: u32,
        /// What was given to it.
        size: u32,
    },
    /// A packet's `num_buffers` is 0 or more than the device returned.
    #[error("the device says a packet spans {found} buffers, {available} were returned")]
    NumBuffers {
        /// What the device wrote.
        found: u16,
        /// Buffers that were returned.
        available: u16,
    },
}

/// Why a queue cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A ring area is not aligned, or not wholly in memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Neither the base nor the descriptor ring says how far the device before this one had got.
    #[error(
        "where its last device stopped cannot be told: the base {base:#010x} is not what the descriptor ring says, which fits no \
         place or several; the driver has to reset the device"
    )]
    Lost {
        /// What the front-end gave.
        base: u32,
    },
    /// The record of buffers in flight makes no sense.
    #[error(
        "the record of buffers in flight cannot be used: {0}; the front-end has to ask for another"
    )]
    Record(&'static str),
}
