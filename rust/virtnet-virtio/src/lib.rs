//! Virtqueues, split and packed, device and driver side, and the virtio-net layer on them.
//!
//! Two formats, two sides: [`split`] and [`packed`] hold the same files with the same function names, so that a difference
//! between them is a difference of the specification. [`DeviceQueue`] and [`DriverQueue`] choose between them once per burst.
//! [`net`] gives the queues their meaning: virtio-net headers, mergeable buffers, features.
//!
//! It guarantees that every word of a ring is read once and decided on as read, that a peer's nonsense is an error with a name
//! ([`ChainError`] costs one chain, [`RingError`] stops the ring) and never a panic, a loop or an access outside memory, and
//! that what is published is complete. A queue owns no eventfd: it answers whether a notification is due.
//!
//! In a packet's way this crate turns chains into packets of a burst and packets into chains (see `ARCHITECTURE.md`).
#![forbid(unsafe_code)]

mod chain;
mod error;
pub mod features;
mod ids;
pub mod inflight;
pub mod net;
pub mod notify;
pub mod packed;
mod queue;
pub mod split;

pub use chain::{Access, CHAINS_MAX, ChainBytes, Chains, DESCS_MAX};
pub use error::{ChainError, RingError, StartError};
pub use features::Features;
pub use queue::{DeviceQueue, DriverBuffer, DriverQueue, Positions, QueueConfig, RingFormat, Used};
