//! The split virtqueue. Spec: virtio 1.4, 2.7, Split Virtqueues.

pub mod device;
pub mod driver;
pub mod layout;

pub use device::SplitDevice;
pub use driver::SplitDriver;
