//! Sets of addresses and prefixes. Looking one up costs a hash for each length of prefix that is in use, however many there are.

use std::collections::HashSet;

use foldhash::fast::RandomState;
use virtnet_packet::flow::IpVersion;

/// Addresses that begin alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Of which version.
    pub version: IpVersion,
    /// The address, IPv4 in the low 32 bits.
    pub address: u128,
    /// How many bits count.
    pub len: u8,
}

impl Prefix {
    #[inline]
    pub(super) fn contains(&self, version: IpVersion, address: u128) -> bool {
        self.version == version && cut(version, address ^ self.address, self.len) == 0
    }
}

/// The first `len` bits of an address.
#[inline]
fn cut(version: IpVersion, address: u128, len: u8) -> u128 {
    let width = width(version);
    let shift = u32::from(width.saturating_sub(len));
    address.checked_shr(shift).map_or(0, |kept| kept << shift)
}

fn width(version: IpVersion) -> u8 {
    match version {
        IpVersion::V4 => 32,
        IpVersion::V6 => 128,
    }
}

/// A set of prefixes.
#[derive(Clone, Debug, Default)]
pub struct AddressSet {
    /// By length, longest first.
    v4: Vec<(u8, HashSet<u128, RandomState>)>,
    v6: Vec<(u8, HashSet<u128, RandomState>)>,
}

impl AddressSet {
    /// Whether an address is in it.
    #[inline]
    #[must_use]
    pub fn contains(&self, version: IpVersion, address: u128) -> bool {
        let lengths = match version {
            IpVersion::V4 => &self.v4,
            IpVersion::V6 => &self.v6,
        };
        lengths
            .iter()
            .any(|(len, set)| set.contains(&cut(version, address, *len)))
    }
}

impl FromIterator<Prefix> for AddressSet {
    fn from_iter<I: IntoIterator<Item = Prefix>>(prefixes: I) -> Self {
        let mut set = Self::default();
        for prefix in prefixes {
            let lengths = match prefix.version {
                IpVersion::V4 => &mut set.v4,
                IpVersion::V6 => &mut set.v6,
            };
            let len = prefix.len.min(width(prefix.version));
            let at = match lengths.binary_search_by(|(there, _)| len.cmp(there)) {
                Ok(at) => at,
                Err(at) => {
                    lengths.insert(at, (len, HashSet::default()));
                    at
                }
            };
            lengths[at]
                .1
                .insert(cut(prefix.version, prefix.address, len));
        }
        set
    }
}
