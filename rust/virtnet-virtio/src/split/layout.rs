//! Where things are in a split virtqueue. Spec: virtio 1.4, 2.7.5 to 2.7.8.

use std::sync::atomic::Ordering;

use virtnet_mem::{TableEntry, Word};

/// The buffer continues in the descriptor named by `next`.
pub const DESC_NEXT: u16 = 1;
/// The buffer is device-writable.
pub const DESC_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// Available ring flag: the driver does not want calls.
pub const AVAIL_NO_INTERRUPT: u16 = 1;
/// Used ring flag: the device does not want kicks.
pub const USED_NO_NOTIFY: u16 = 1;

/// Bytes of a descriptor.
pub const DESC_SIZE: usize = 16;
/// Offset of a ring's flags.
pub const FLAGS: usize = 0;
/// Offset of a ring's index.
pub const INDEX: usize = 2;
/// Offset of a ring's entries.
pub const ENTRIES: usize = 4;

/// Alignment of the three areas: descriptor table, available ring, used ring.
pub const ALIGN: [usize; 3] = [16, 2, 4];

/// Bytes of the descriptor table.
#[must_use]
pub fn desc_bytes(size: u16) -> usize {
    DESC_SIZE * usize::from(size)
}

/// Bytes of the available ring. The event word exists only with EVENT_IDX.
#[must_use]
pub fn avail_bytes(size: u16, event_idx: bool) -> usize {
    ENTRIES + 2 * usize::from(size) + if event_idx { 2 } else { 0 }
}

/// Bytes of the used ring. The event word exists only with EVENT_IDX.
#[must_use]
pub fn used_bytes(size: u16, event_idx: bool) -> usize {
    ENTRIES + 8 * usize::from(size) + if event_idx { 2 } else { 0 }
}

/// A descriptor as read: one copy, decided on as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`DESC_NEXT`], [`DESC_WRITE`], [`DESC_INDIRECT`].
    pub flags: u16,
    /// Where the chain continues.
    pub next: u16,
}

impl Descriptor {
    /// As it stands in the table.
    #[inline(always)]
    #[must_use]
    pub fn of(entry: &TableEntry) -> Self {
        Self::from_words(
            entry.load(Word::First, Ordering::Relaxed),
            entry.load(Word::Second, Ordering::Relaxed),
        )
    }

    /// From its two little-endian words.
    #[inline]
    #[must_use]
    pub fn from_words(addr: u64, rest: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = rest.to_le_bytes();
        Self {
            addr,
            len: u32::from_le_bytes([a, b, c, d]),
            flags: u16::from_le_bytes([e, f]),
            next: u16::from_le_bytes([g, h]),
        }
    }

    /// Its second word: everything but the address.
    #[inline]
    #[must_use]
    pub fn rest(self) -> u64 {
        u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48
    }

    /// From its sixteen bytes.
    #[inline]
    #[must_use]
    pub fn from_bytes(bytes: [u8; DESC_SIZE]) -> Self {
        let whole = u128::from_le_bytes(bytes);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "takes the two halves apart"
        )]
        Self::from_words(whole as u64, (whole >> 64) as u64)
    }
}
