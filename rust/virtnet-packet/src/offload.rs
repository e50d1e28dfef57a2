//! What a packet's sender left to be done, or says it has done: checksum and segmentation metadata.

/// What may be left to a receiver: a set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u8);

impl Offloads {
    /// Nothing: frames are to be finished.
    pub const NONE: Self = Self(0);
    /// Checksums.
    pub const CSUM: Self = Self(1);
    /// Segments of TCP over IPv4.
    pub const TSO4: Self = Self(2);
    /// Segments of TCP over IPv6.
    pub const TSO6: Self = Self(4);
    /// Segments of TCP that knows explicit congestion notification.
    pub const ECN: Self = Self(8);
    /// Segments of UDP.
    pub const USO: Self = Self(16);
    /// What only those can be left with who know it: nothing here does it.
    pub const OTHER: Self = Self(32);
    /// Everything: metadata is passed on as it is.
    pub const ALL: Self = Self(63);

    /// Whether everything in `other` is in it.
    #[inline]
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for Offloads {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for Offloads {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl FromIterator<Self> for Offloads {
    fn from_iter<I: IntoIterator<Item = Self>>(sets: I) -> Self {
        sets.into_iter().fold(Self::NONE, |all, set| all | set)
    }
}

/// Offload metadata of one packet, with the meaning of the first ten bytes of the virtio-net header.
///
/// It travels with the packet from port to port and is resolved only at a port that cannot pass it on. All zero means a plain
/// frame: nothing left to do, nothing vouched for. Spec: virtio 1.4, 5.1.9, Device Operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)] // in the header's order, so that eight bytes of a header are one load
pub struct Offload {
    /// [`Self::NEEDS_CSUM`], [`Self::DATA_VALID`], …
    pub flags: u8,
    /// [`Self::GSO_NONE`] or how the frame is to be segmented.
    pub gso_type: u8,
    /// Length of all headers in bytes: a hint, never trusted.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where checksumming starts, in bytes from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum goes, in bytes from `csum_start`.
    pub csum_offset: u16,
}

impl Offload {
    /// The checksum is still to be computed.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum has been verified.
    pub const DATA_VALID: u8 = 2;
    /// Not to be segmented.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// UDP fragmentation.
    pub const GSO_UDP: u8 = 3;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// UDP segmentation.
    pub const GSO_UDP_L4: u8 = 5;
    /// Or-ed to the segmentation of TCP: the sender knows explicit congestion notification.
    pub const ECN: u8 = 0x80;

    /// How the frame is to be segmented, without [`Self::ECN`].
    #[inline]
    #[must_use]
    pub fn segments(&self) -> u8 {
        self.gso_type & !Self::ECN
    }

    /// Nothing left to do and nothing vouched for.
    #[inline]
    #[must_use]
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// Whether what it asks for can be done to a frame of `frame_len` bytes; a sender's numbers are not to be trusted.
    #[must_use]
    pub fn fits(&self, frame_len: u32) -> bool {
        let csum_fits = self.flags & Self::NEEDS_CSUM == 0
            || u32::from(self.csum_start) + u32::from(self.csum_offset) + 2 <= frame_len;
        let gso_fits = self.gso_type == Self::GSO_NONE
            || (self.gso_size > 0
                && self.flags & Self::NEEDS_CSUM != 0
                && u32::from(self.hdr_len) <= frame_len);
        csum_fits && gso_fits
    }
}
