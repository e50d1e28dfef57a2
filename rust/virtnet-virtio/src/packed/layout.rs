//! Where things are in a packed virtqueue, and the positions that both sides keep. Spec: virtio 1.4, 2.8.

use crate::notify::need_event;

pub use crate::split::layout::{DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, desc_bytes};

/// Equals the driver's wrap counter in an available descriptor.
pub const DESC_AVAIL: u16 = 1 << 7;
/// Differs from it in an available descriptor, equals the device's wrap counter in a used one.
pub const DESC_USED: u16 = 1 << 15;

/// Bytes of an event suppression area.
pub const EVENT_BYTES: usize = 4;
/// Offset of the flags in an event suppression area.
pub const EVENT_FLAGS: usize = 2;
/// Notify always.
pub const EVENT_ENABLE: u16 = 0;
/// Do not notify.
pub const EVENT_DISABLE: u16 = 1;
/// Notify when a given descriptor is passed; only with EVENT_IDX.
pub const EVENT_DESC: u16 = 2;

/// Descriptors of a line of cache.
pub const DESCS_A_LINE: u16 = 4;

/// Alignment of the three areas: descriptor ring, driver event suppression, device event suppression.
pub const ALIGN: [usize; 3] = [16, 4, 4];

/// A place in the ring: slot and wrap counter. Spec: virtio 1.4, 2.8.1, Driver and Device Ring Wrap Counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Slot, below the size of the ring.
    pub slot: u16,
    /// Wrap counter: true on the first lap.
    pub wrap: bool,
}

impl Position {
    /// Where both sides start.
    pub const START: Self = Self {
        slot: 0,
        wrap: true,
    };

    /// From 16 bits: slot in bits 0 to 14, wrap counter in bit 15. A slot beyond the ring is taken round.
    #[must_use]
    pub fn from_bits(bits: u16, size: u16) -> Self {
        Self {
            slot: (bits & 0x7fff) % size,
            wrap: bits & 0x8000 != 0,
        }
    }

    /// To 16 bits.
    #[inline]
    #[must_use]
    pub fn bits(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }

    /// `n` slots on, at most one lap.
    #[inline]
    #[must_use]
    pub fn advance(self, n: u16, size: u16) -> Self {
        let left = size - self.slot;
        if n < left {
            Self {
                slot: self.slot + n,
                ..self
            }
        } else {
            Self {
                slot: n - left,
                wrap: !self.wrap,
            }
        }
    }

    /// `n` slots back, at most one lap.
    #[must_use]
    pub fn back(self, n: u16, size: u16) -> Self {
        if n <= self.slot {
            Self {
                slot: self.slot - n,
                ..self
            }
        } else {
            Self {
                slot: size - (n - self.slot),
                wrap: !self.wrap,
            }
        }
    }

    /// Whether a descriptor with `flags` at this place is available.
    #[inline]
    #[must_use]
    pub fn is_available(self, flags: u16) -> bool {
        flags & (DESC_AVAIL | DESC_USED) == self.available()
    }

    /// Whether a descriptor with `flags` at this place is used.
    #[inline]
    #[must_use]
    pub fn is_used(self, flags: u16) -> bool {
        flags & (DESC_AVAIL | DESC_USED) == self.used()
    }

    /// The two bits that make a descriptor at this place available.
    #[inline]
    #[must_use]
    pub fn available(self) -> u16 {
        if self.wrap { DESC_AVAIL } else { DESC_USED }
    }

    /// The two bits that make a descriptor at this place used.
    #[inline]
    #[must_use]
    pub fn used(self) -> u16 {
        if self.wrap { DESC_AVAIL | DESC_USED } else { 0 }
    }
}

/// Whether the other side is to be notified, now that we have moved from `old` to `new`; `event` is its event suppression area
/// as read in one load. Spec: virtio 1.4, 2.8.10, Event Suppression Structure Format. An unknown value means always.
#[must_use]
pub fn wants_event(event: u32, old: Position, new: Position, size: u16) -> bool {
    let [a, b, c, d] = event.to_le_bytes();
    match u16::from_le_bytes([c, d]) & 3 {
        EVENT_DISABLE => false,
        EVENT_DESC => {
            let bits = u16::from_le_bytes([a, b]);
            let (mut at, mut from) = (bits & 0x7fff, old.slot);
            if (bits & 0x8000 != 0) != new.wrap {
                at = at.wrapping_sub(size);
            }
            if new.slot <= from {
                from = from.wrapping_sub(size);
            }
            need_event(at, new.slot, from)
        }
        _ => true,
    }
}

/// Second word of a descriptor: length, buffer id, flags.
#[inline]
#[must_use]
pub fn word(len: u32, id: u16, flags: u16) -> u64 {
    u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48
}

/// The same taken apart.
#[inline(always)]
#[must_use]
pub fn parts(word: u64) -> (u32, u16, u16) {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    let (id, flags) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
    (u32::from_le_bytes([a, b, c, d]), id, flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Exhaustive for small rings: an event is due exactly when its descriptor is among those just passed.
    #[test]
    fn an_event_is_due_exactly_when_its_descriptor_was_passed() {
        for size in 1..=6_u16 {
            for start in 0..2 * size {
                let at = |n: u16| Position {
                    slot: n % size,
                    wrap: (n / size).is_multiple_of(2),
                };
                let old = at(start);
                for moved in 1..=size {
                    let new = at(start + moved);
                    assert_eq!(old.advance(moved, size), new);
                    assert_eq!(new.back(moved, size), old);
                    // The event may name any place of the lap ending at `new`.
                    for ago in 1..=size {
                        let event = new.back(ago, size);
                        let area = u32::from(event.bits()) | u32::from(EVENT_DESC) << 16;
                        assert_eq!(
                            wants_event(area, old, new, size),
                            ago <= moved,
                            "{old:?} {new:?} {event:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_descriptor_is_available_used_or_neither_by_its_two_bits() {
        for wrap in [true, false] {
            let here = Position { slot: 0, wrap };
            assert!(here.is_available(here.available()) && !here.is_used(here.available()));
            assert!(here.is_used(here.used()) && !here.is_available(here.used()));
            let last_lap = Position {
                slot: 0,
                wrap: !wrap,
            };
            assert!(!here.is_available(last_lap.used()) && !here.is_used(last_lap.available()));
        }
    }
}
