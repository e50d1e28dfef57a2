//! What the queues of a network device mean: virtio-net headers, receive and transmit queues of both sides.
//!
//! Spec: virtio 1.4, 5.1, Network Device.

pub mod device;
pub mod driver;
pub mod header;

pub use device::{ReceiveQueue, TransmitQueue};
pub use driver::{BufferArea, DriverReceive, DriverTransmit};

/// The longest frame: an IP packet of 65,535 bytes behind Ethernet and its tags. Spec: virtio 1.4, 5.1.9.3.1.
pub const FRAME_MAX: u32 = 65_589;

/// The shortest frame: an Ethernet header.
pub const FRAME_MIN: u32 = 14;
