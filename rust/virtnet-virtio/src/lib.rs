//! Virtqueues, split and packed, device and driver side, and the virtio-net layer on them.
#![forbid(unsafe_code)]
