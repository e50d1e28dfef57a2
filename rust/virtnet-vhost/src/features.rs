//! The protocol's own features: which messages the two sides may exchange.
//!
//! They are negotiated apart from the virtio features, and only if virtio feature bit 30 is offered. All known bits have
//! a name here, whether this crate implements them or not, so that a person can be told what a peer offers.

bitflags::bitflags! {
    /// A set of vhost-user protocol features.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct ProtocolFeatures: u64 {
        /// More than one queue pair.
        const MQ = 1 << 0;
        /// The dirty log is a shared file.
        const LOG_SHMFD = 1 << 1;
        /// The back-end announces a guest that has moved.
        const RARP = 1 << 2;
        /// Any message can be acknowledged.
        const REPLY_ACK = 1 << 3;
        /// The front-end tells the MTU.
        const MTU = 1 << 4;
        /// The back-end has a channel for requests of its own.
        const BACKEND_REQ = 1 << 5;
        /// The rings may have the other byte order.
        const CROSS_ENDIAN = 1 << 6;
        /// Sessions of a crypto device.
        const CRYPTO_SESSION = 1 << 7;
        /// Memory faults are served by the front-end (post-copy migration).
        const PAGEFAULT = 1 << 8;
        /// The device configuration space travels over the socket.
        const CONFIG = 1 << 9;
        /// The back-end's requests may carry descriptors.
        const BACKEND_SEND_FD = 1 << 10;
        /// The back-end lends a doorbell page.
        const HOST_NOTIFIER = 1 << 11;
        /// Buffers in flight are recorded in shared memory.
        const INFLIGHT_SHMFD = 1 << 12;
        /// The device can be reset without losing the connection's state.
        const RESET_DEVICE = 1 << 13;
        /// Kicks and calls may be messages.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// Memory regions come and go one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// The virtio device status travels over the socket.
        const STATUS = 1 << 16;
        /// Memory is mapped through Xen.
        const XEN_MMAP = 1 << 17;
        /// Objects are shared between devices by UUID.
        const SHARED_OBJECT = 1 << 18;
        /// The device's own state can be saved and loaded.
        const DEVICE_STATE = 1 << 19;
        /// A ring can be stopped with buffers in flight.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
        /// Addresses in messages are guest physical.
        const GPA_ADDRESSES = 1 << 21;
        /// The back-end maps files into shared memory regions.
        const SHMEM = 1 << 22;
        /// A ring can be stopped without draining it.
        const GET_VRING_BASE_SKIP_DRAIN = 1 << 23;

        // Bits that have no name yet are carried, not lost.
        const _ = !0;
    }
}

impl ProtocolFeatures {
    /// The features this crate's back-end implements.
    pub const BACKEND: Self = Self::MQ
        .union(Self::LOG_SHMFD)
        .union(Self::RARP)
        .union(Self::REPLY_ACK)
        .union(Self::MTU)
        .union(Self::BACKEND_REQ)
        .union(Self::CONFIG)
        .union(Self::INFLIGHT_SHMFD)
        .union(Self::GET_VRING_BASE_INFLIGHT)
        .union(Self::GET_VRING_BASE_SKIP_DRAIN)
        .union(Self::BACKEND_SEND_FD)
        .union(Self::RESET_DEVICE)
        .union(Self::CONFIGURE_MEM_SLOTS)
        .union(Self::STATUS)
        .union(Self::PAGEFAULT)
        .union(Self::INBAND_NOTIFICATIONS)
        .union(Self::DEVICE_STATE)
        .union(Self::GPA_ADDRESSES);

    /// The features that this crate's front-end takes only where its owner asks for them: notifications by message, memory whose pages
    /// come later, and guest addresses (some back-ends mean something else by that bit).
    pub const ON_REQUEST: Self = Self::INBAND_NOTIFICATIONS
        .union(Self::PAGEFAULT)
        .union(Self::GPA_ADDRESSES);

    /// The features this crate's front-end implements, and takes where it is not told otherwise; beside these there are those
    /// [on request](Self::ON_REQUEST).
    pub const FRONTEND: Self = Self::MQ
        .union(Self::LOG_SHMFD)
        .union(Self::RARP)
        .union(Self::REPLY_ACK)
        .union(Self::MTU)
        .union(Self::BACKEND_REQ)
        .union(Self::CONFIG)
        .union(Self::INFLIGHT_SHMFD)
        .union(Self::BACKEND_SEND_FD)
        .union(Self::RESET_DEVICE)
        .union(Self::CONFIGURE_MEM_SLOTS)
        .union(Self::STATUS)
        .union(Self::DEVICE_STATE);

    /// Lists the names of the set's members, `bit 40` for one without a name.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        let known = Self::all()
            .iter_names()
            .map(|(name, flag)| (flag.bits(), name))
            .collect::<Vec<_>>();
        (0..u64::BITS)
            .filter(|bit| self.bits() & (1 << bit) != 0)
            .map(|bit| {
                let name = known.iter().find(|(bits, _)| *bits == 1 << bit);
                name.map_or_else(|| format!("bit {bit}"), |(_, name)| (*name).to_owned())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_bit_has_its_place() {
        let cases = [
            (0, "MQ"),
            (1, "LOG_SHMFD"),
            (2, "RARP"),
            (3, "REPLY_ACK"),
            (4, "MTU"),
            (5, "BACKEND_REQ"),
            (9, "CONFIG"),
            (12, "INFLIGHT_SHMFD"),
            (13, "RESET_DEVICE"),
            (15, "CONFIGURE_MEM_SLOTS"),
            (16, "STATUS"),
            (19, "DEVICE_STATE"),
            (22, "SHMEM"),
            (23, "GET_VRING_BASE_SKIP_DRAIN"),
            (40, "bit 40"),
            (63, "bit 63"),
        ];
        for (bit, name) in cases {
            assert_eq!(ProtocolFeatures::from_bits_retain(1 << bit).names(), [name]);
        }
        assert_eq!(
            ProtocolFeatures::from_bits_retain(0b101).names(),
            ["MQ", "RARP"]
        );
    }
}
