//! Eight entries of a table of rules that are compared with a packet at once.

use virtnet_packet::flow::IpVersion;

use super::super::sets::Prefix;
use super::{Entry, Found};

/// Entries that are compared at once.
pub(super) const LINE: usize = 8;

pub(super) const ALL_PORTS: (u16, u16) = (0, u16::MAX);

/// So many entries; one that is none matches nothing.
#[derive(Clone, Debug)]
pub(super) struct Line<const WORDS: usize> {
    from: Side<WORDS>,
    to: Side<WORDS>,
    /// What is found with each entry, and whether its rule says more than the entry.
    pub(super) found: [(Found, bool); LINE],
}

/// An address and a port.
pub(in super::super) type Point<const WORDS: usize> = ([u32; WORDS], u16);

/// What is said of one end of a packet's way.
#[derive(Clone, Debug)]
struct Side<const WORDS: usize> {
    address: [[u32; LINE]; WORDS],
    mask: [[u32; LINE]; WORDS],
    /// Signed, because that is what is compared at once.
    first_port: [i32; LINE],
    last_port: [i32; LINE],
}

/// Addresses that begin alike, and ports in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span<const WORDS: usize> {
    pub(super) address: [u32; WORDS],
    pub(super) mask: [u32; WORDS],
    pub(super) ports: (u16, u16),
}

impl<const WORDS: usize> Line<WORDS> {
    pub(super) fn new(entries: &[Entry<WORDS>]) -> Self {
        let none = Entry {
            from: Span::NONE,
            ..entries[0]
        };
        let entries: [_; LINE] = std::array::from_fn(|i| *entries.get(i).unwrap_or(&none));
        Self {
            from: Side::new(entries.map(|entry| entry.from)),
            to: Side::new(entries.map(|entry| entry.to)),
            found: entries.map(|entry| (entry.found, entry.more)),
        }
    }

    /// Span entries a packet matches: two bits each, the first lowest. (Arrays that are computed whole are a few wide instructions, 70
    /// for a line; where each has a single bit compilers see shifts, which take twice as many.)
    #[inline(always)]
    pub(super) fn matching(&self, from: Point<WORDS>, to: Point<WORDS>) -> u32 {
        let (from, to) = (self.from.differs(from), self.to.differs(to));
        (0..LINE).fold(0, |matching, i| {
            matching | u32::from(from[i] | to[i] == 0).wrapping_neg() & 3 << (2 * i)
        })
    }
}

impl<const WORDS: usize> Side<WORDS> {
    fn new(entries: [Span<WORDS>; LINE]) -> Self {
        Self {
            address: std::array::from_fn(|word| entries.map(|entry| entry.address[word])),
            mask: std::array::from_fn(|word| entries.map(|entry| entry.mask[word])),
            first_port: entries.map(|entry| entry.ports.0.into()),
            last_port: entries.map(|entry| entry.ports.1.into()),
        }
    }

    /// In what an end differs from each entry: 0 from one that it matches.
    #[inline(always)]
    fn differs(&self, (address, port): Point<WORDS>) -> [u32; LINE] {
        let port = i32::from(port);
        let is_outside = |is: bool| u32::from(is).wrapping_neg();
        let mut differs = std::array::from_fn(|i| {
            is_outside(port < self.first_port[i]) | is_outside(port > self.last_port[i])
        });
        for ((wanted, mask), word) in self.address.iter().zip(&self.mask).zip(address) {
            for i in 0..LINE {
                differs[i] |= word & mask[i] ^ wanted[i];
            }
        }
        differs
    }
}

impl<const WORDS: usize> Span<WORDS> {
    pub(super) const ANY: Self = Self {
        address: [0; WORDS],
        mask: [0; WORDS],
        ports: ALL_PORTS,
    };

    /// No address has a bit set that does not count.
    const NONE: Self = Self {
        address: [1; WORDS],
        ..Self::ANY
    };

    /// What begins with a prefix, at any port; `None` for what no address begins with.
    pub(super) fn of(prefix: &Prefix) -> Option<Self> {
        let width = match prefix.version {
            IpVersion::V4 => u32::BITS,
            IpVersion::V6 => u128::BITS,
        };
        let free = width.saturating_sub(prefix.len.into());
        let mask = u128::MAX.checked_shl(free).unwrap_or_default();
        let is_one = prefix.address.checked_shr(width).unwrap_or_default() == 0;
        is_one.then_some(Self {
            address: words(prefix.address & mask),
            mask: words(mask),
            ..Self::ANY
        })
    }

    pub(super) fn is_any(&self) -> bool {
        self.mask == [0; WORDS] && self.ports == ALL_PORTS
    }
}

/// The words of an address, of IPv4 the lowest one alone.
#[expect(clippy::cast_possible_truncation, reason = "one word after the other")]
pub(super) fn words<const WORDS: usize>(address: u128) -> [u32; WORDS] {
    std::array::from_fn(|i| (address >> (32 * (WORDS - 1 - i))) as u32)
}
