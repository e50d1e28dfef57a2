//! The packed virtqueue. Spec: virtio 1.4, 2.8, Packed Virtqueues.

pub mod device;
pub mod driver;
pub mod layout;
mod recover;

pub use device::PackedDevice;
pub use driver::PackedDriver;
