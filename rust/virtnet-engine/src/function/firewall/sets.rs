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
    v4: Lengths<u32>,
    v6: Lengths<u128>,
}

/// By length, longest first.
type Lengths<Address> = Vec<(u8, HashSet<Address, RandomState>)>;

impl AddressSet {
    /// Whether an address is in it.
    #[inline]
    #[must_use]
    pub fn contains(&self, version: IpVersion, address: u128) -> bool {
        match version {
            IpVersion::V4 => {
                let mut lengths = self.v4.iter();
                lengths.any(|(len, set)| set.contains(&low(cut(version, address, *len))))
            }
            IpVersion::V6 => {
                let mut lengths = self.v6.iter();
                lengths.any(|(len, set)| set.contains(&cut(version, address, *len)))
            }
        }
    }
}

impl FromIterator<Prefix> for AddressSet {
    fn from_iter<I: IntoIterator<Item = Prefix>>(prefixes: I) -> Self {
        let mut set = Self::default();
        for prefix in prefixes {
            let len = prefix.len.min(width(prefix.version));
            let address = cut(prefix.version, prefix.address, len);
            match prefix.version {
                IpVersion::V4 => of_length(&mut set.v4, len).insert(low(address)),
                IpVersion::V6 => of_length(&mut set.v6, len).insert(address),
            };
        }
        set
    }
}

/// Those of one length, which may be the first.
fn of_length<Address>(
    lengths: &mut Lengths<Address>,
    len: u8,
) -> &mut HashSet<Address, RandomState> {
    let at = match lengths.binary_search_by(|(there, _)| len.cmp(there)) {
        Ok(at) => at,
        Err(at) => {
            lengths.insert(at, (len, HashSet::default()));
            at
        }
    };
    &mut lengths[at].1
}

/// An IPv4 address: a table of them takes a quarter.
#[expect(
    clippy::cast_possible_truncation,
    reason = "IPv4's are in the low 32 bits"
)]
fn low(address: u128) -> u32 {
    address as u32
}
