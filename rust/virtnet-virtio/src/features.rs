//! Feature bits of virtio and virtio-net, by their names in the specification.

use bitflags::bitflags;

bitflags! {
    /// Feature bits 0 to 63, as offered, acked or negotiated. Spec: virtio 1.4, 2.2, Feature Bits; 5.1.3; 6.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// The driver may leave checksums to the device.
        const CSUM = 1 << 0;
        /// The device may leave checksums to the driver.
        const GUEST_CSUM = 1 << 1;
        /// The driver can change offloads at run time.
        const CTRL_GUEST_OFFLOADS = 1 << 2;
        /// The device tells its MTU.
        const MTU = 1 << 3;
        /// The device has a MAC address.
        const MAC = 1 << 5;
        /// The driver takes unsegmented TCP over IPv4.
        const GUEST_TSO4 = 1 << 7;
        /// The driver takes unsegmented TCP over IPv6.
        const GUEST_TSO6 = 1 << 8;
        /// The driver takes segmentation with ECN.
        const GUEST_ECN = 1 << 9;
        /// The driver takes unfragmented UDP.
        const GUEST_UFO = 1 << 10;
        /// The device takes unsegmented TCP over IPv4.
        const HOST_TSO4 = 1 << 11;
        /// The device takes unsegmented TCP over IPv6.
        const HOST_TSO6 = 1 << 12;
        /// The device takes segmentation with ECN.
        const HOST_ECN = 1 << 13;
        /// The device takes unfragmented UDP.
        const HOST_UFO = 1 << 14;
        /// A packet may span several receive buffers.
        const MRG_RXBUF = 1 << 15;
        /// The link state is in the configuration.
        const STATUS = 1 << 16;
        /// There is a controlq.
        const CTRL_VQ = 1 << 17;
        /// Receive modes can be set.
        const CTRL_RX = 1 << 18;
        /// VLANs can be filtered.
        const CTRL_VLAN = 1 << 19;
        /// More receive modes can be set.
        const CTRL_RX_EXTRA = 1 << 20;
        /// The driver can announce itself when asked.
        const GUEST_ANNOUNCE = 1 << 21;
        /// There may be several queue pairs.
        const MQ = 1 << 22;
        /// The MAC address can be set.
        const CTRL_MAC_ADDR = 1 << 23;
        /// (legacy) Notify when the available ring runs empty.
        const NOTIFY_ON_EMPTY = 1 << 24;
        /// (vhost) Log every page written.
        const LOG_ALL = 1 << 26;
        /// (legacy) Any framing of descriptors.
        const ANY_LAYOUT = 1 << 27;
        /// A descriptor may point at a table of descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// Notifications are asked for by ring position.
        const EVENT_IDX = 1 << 29;
        /// (vhost-user) There are protocol features; never shown to a guest.
        const PROTOCOL_FEATURES = 1 << 30;
        /// Virtio 1.0 or later.
        const VERSION_1 = 1 << 32;
        /// Addresses go through an IOMMU.
        const ACCESS_PLATFORM = 1 << 33;
        /// The packed ring format.
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order they were made available.
        const IN_ORDER = 1 << 35;
        /// Memory is ordered as the platform does.
        const ORDER_PLATFORM = 1 << 36;
        /// A kick carries data.
        const NOTIFICATION_DATA = 1 << 38;
        /// One queue can be reset.
        const RING_RESET = 1 << 40;
        /// Statistics can be asked for.
        const DEVICE_STATS = 1 << 50;
        /// Notifications of one queue can be coalesced.
        const VQ_NOTF_COAL = 1 << 52;
        /// Notifications can be coalesced.
        const NOTF_COAL = 1 << 53;
        /// The driver takes unsegmented UDP over IPv4.
        const GUEST_USO4 = 1 << 54;
        /// The driver takes unsegmented UDP over IPv6.
        const GUEST_USO6 = 1 << 55;
        /// The device takes unsegmented UDP.
        const HOST_USO = 1 << 56;
        /// The header carries a hash.
        const HASH_REPORT = 1 << 57;
        /// The driver gives the exact header length.
        const GUEST_HDRLEN = 1 << 59;
        /// Receive-side scaling.
        const RSS = 1 << 60;
        /// Hints of coalesced segments.
        const RSC_EXT = 1 << 61;
        /// A stand-by device.
        const STANDBY = 1 << 62;
        /// Speed and duplex are in the configuration.
        const SPEED_DUPLEX = 1 << 63;

        // Bits that have no name here are kept as they came.
        const _ = !0;
    }
}

impl Features {
    /// What a device may leave to its driver.
    pub const GUEST_OFFLOADS: Self = Self::GUEST_CSUM
        .union(Self::GUEST_TSO4)
        .union(Self::GUEST_TSO6)
        .union(Self::GUEST_ECN)
        .union(Self::GUEST_UFO)
        .union(Self::GUEST_USO4)
        .union(Self::GUEST_USO6);

    /// What a driver asks for through the control queue, and can not without one. Several queue pairs and announcements are not among
    /// them: where the front-end serves the control queue, it says by itself which rings are enabled, and has the driver announce itself.
    pub const CONTROLLED: Self = Self::CTRL_RX
        .union(Self::CTRL_RX_EXTRA)
        .union(Self::CTRL_VLAN)
        .union(Self::CTRL_MAC_ADDR)
        .union(Self::CTRL_GUEST_OFFLOADS)
        .union(Self::DEVICE_STATS)
        .union(Self::NOTF_COAL)
        .union(Self::VQ_NOTF_COAL)
        .union(Self::HASH_REPORT)
        .union(Self::RSS);

    /// Length of the virtio-net header, in bytes, once these features are negotiated.
    ///
    /// Spec: virtio 1.4, 5.1.9, Device Operation (`num_buffers` exists with VERSION_1 or MRG_RXBUF, hashes
    /// with HASH_REPORT).
    #[must_use]
    pub fn header_len(self) -> usize {
        if self.contains(Self::HASH_REPORT) {
            20
        } else if self.intersects(Self::VERSION_1 | Self::MRG_RXBUF | Self::RING_PACKED) {
            12
        } else {
            10
        }
    }

    /// Those of which everything they need is there as well. Spec: virtio 1.4, 5.1.3.1, Feature bit requirements.
    #[must_use]
    pub fn with_needs(mut self) -> Self {
        let guest_segments = Self::GUEST_TSO4 | Self::GUEST_TSO6;
        let host_segments = Self::HOST_TSO4 | Self::HOST_TSO6;
        // In the order in which one may take the next one with it.
        let needs = [
            (guest_segments, Self::GUEST_CSUM),
            (
                Self::GUEST_UFO | Self::GUEST_USO4 | Self::GUEST_USO6,
                Self::GUEST_CSUM,
            ),
            (Self::GUEST_ECN, guest_segments),
            (host_segments | Self::HOST_UFO | Self::HOST_USO, Self::CSUM),
            (Self::HOST_ECN, host_segments),
            (Self::CONTROLLED | Self::GUEST_ANNOUNCE, Self::CTRL_VQ),
        ];
        for (features, one_of) in needs {
            if !self.intersects(one_of) {
                self -= features;
            }
        }
        self
    }

    /// Names of the bits that are set; a bit without a name as its number.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        use bitflags::Flags;
        let name_of = |bit: u32| {
            let known = Self::FLAGS.iter().find(|f| f.value().bits() == 1 << bit);
            known.map_or_else(|| format!("BIT_{bit}"), |f| f.name().to_owned())
        };
        (0..u64::BITS)
            .filter(|&bit| self.bits() >> bit & 1 == 1)
            .map(name_of)
            .collect()
    }
}
