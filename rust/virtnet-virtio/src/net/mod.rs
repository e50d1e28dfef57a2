//! What the queues of a network device mean: virtio-net headers, receive and transmit queues of both sides.
//!
//! Spec: virtio 1.4, 5.1, Network Device.

mod ahead;
pub mod config;
pub mod control;
mod device;
pub mod driver;
pub mod header;
pub mod rss;

use virtnet_packet::Offloads;

use crate::Features;

pub use config::{CONFIG_LEN, NetConfig, RssConfig};
pub use device::{ReceiveQueue, TransmitQueue};
pub use driver::{BufferArea, DriverReceive, DriverTransmit};

/// What a driver that negotiated `features` may leave to its device.
#[must_use]
pub fn offloads_to_device(features: Features) -> Offloads {
    header::Allowed::driver(features).offloads()
}

/// What a device may leave to its driver that negotiated `features`: segments of UDP only if over both versions of IP, since a
/// packet's metadata does not tell which.
#[must_use]
pub fn offloads_to_driver(features: Features) -> Offloads {
    let both = Features::GUEST_USO4 | Features::GUEST_USO6;
    let features = if features.contains(both) {
        features
    } else {
        features - both
    };
    header::Allowed::device(features).offloads()
}

/// The longest frame: an IP packet of 65,535 bytes behind Ethernet and its tags. Spec: virtio 1.4, 5.1.9.3.1.
pub const FRAME_MAX: u32 = 65_589;

/// The shortest frame: an Ethernet header.
pub const FRAME_MIN: u32 = 14;
