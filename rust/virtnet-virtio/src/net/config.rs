//! The configuration space of a network device: what it tells its driver of itself.

use crate::Features;

/// Bytes of the space, up to the hash types.
pub const CONFIG_LEN: usize = 24;

/// Bits of `status`.
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

/// What stands in `speed` and `duplex` where they are not known.
const SPEED_UNKNOWN: u32 = u32::MAX;
const DUPLEX_UNKNOWN: u8 = 0xff;

/// What a network device tells of itself; `None` for a field that its features do not give it.
///
/// Spec: virtio 1.4, 5.1.4, Device configuration layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address, with MAC.
    pub mac: Option<[u8; 6]>,
    /// Whether the link is up, with STATUS.
    pub link_up: Option<bool>,
    /// Whether the driver is to announce itself, with STATUS and GUEST_ANNOUNCE.
    pub announce: bool,
    /// The most queue pairs a driver may use, with MQ or RSS.
    pub max_queue_pairs: Option<u16>,
    /// The longest packet behind Ethernet's header in bytes, with MTU.
    pub mtu: Option<u16>,
    /// Megabits a second, with SPEED_DUPLEX; `None` too where it is not known.
    pub speed_mbps: Option<u32>,
    /// Whether both directions carry packets at once, likewise.
    pub full_duplex: Option<bool>,
    /// What it can do with hashes, with RSS or HASH_REPORT.
    pub rss: Option<RssConfig>,
}

/// What a network device can do with hashes of packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RssConfig {
    /// The longest key, in bytes: 40 or more.
    pub max_key_len: u8,
    /// The most entries of an indirection table, with RSS: 128 or more.
    pub max_table_len: u16,
    /// Which kinds of packets it hashes.
    pub hash_types: u32,
}

impl NetConfig {
    /// The space as the driver reads it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; CONFIG_LEN] {
        let rss = self.rss.unwrap_or_default();
        let bit = |is_set, bit| if is_set { bit } else { 0 };
        let status = bit(self.link_up == Some(true), LINK_UP) | bit(self.announce, ANNOUNCE);
        // 1 full, 0 half; the one sentence of the specification that has it the other way round contradicts the field's own text.
        let duplex = self.full_duplex.map_or(DUPLEX_UNKNOWN, u8::from);
        let mut bytes = [0; CONFIG_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.mac.unwrap_or_default());
        put(&status.to_le_bytes());
        put(&self.max_queue_pairs.unwrap_or(1).to_le_bytes());
        put(&self.mtu.unwrap_or_default().to_le_bytes());
        put(&self.speed_mbps.unwrap_or(SPEED_UNKNOWN).to_le_bytes());
        put(&[duplex, rss.max_key_len]);
        put(&rss.max_table_len.to_le_bytes());
        put(&rss.hash_types.to_le_bytes());
        bytes
    }

    /// What a device that offers `features` says in `bytes`: fields exist by what is offered, and as far as the bytes reach.
    ///
    /// Nothing of it has been checked: an MTU may be 0.
    #[must_use]
    pub fn parse(bytes: &[u8], features: Features) -> Self {
        let u16_at = |at| field(bytes, at).map(u16::from_le_bytes);
        let u32_at = |at| field(bytes, at).map(u32::from_le_bytes);
        let u8_at = |at| field(bytes, at).map(|[byte]: [u8; 1]| byte);
        let if_offered = |any_of: Features| features.intersects(any_of);
        let rss = || {
            Some(RssConfig {
                max_key_len: u8_at(17)?,
                max_table_len: u16_at(18)?,
                hash_types: u32_at(20)?,
            })
        };
        let status = u16_at(6).filter(|_| if_offered(Features::STATUS));
        let speed = u32_at(12).filter(|_| if_offered(Features::SPEED_DUPLEX));
        let duplex = u8_at(16).filter(|_| if_offered(Features::SPEED_DUPLEX));
        Self {
            mac: field(bytes, 0).filter(|_| if_offered(Features::MAC)),
            link_up: status.map(|status| status & LINK_UP != 0),
            announce: status
                .filter(|_| if_offered(Features::GUEST_ANNOUNCE))
                .is_some_and(|status| status & ANNOUNCE != 0),
            max_queue_pairs: u16_at(8).filter(|_| if_offered(Features::MQ | Features::RSS)),
            mtu: u16_at(10).filter(|_| if_offered(Features::MTU)),
            speed_mbps: speed.filter(|&speed| speed <= 0x7fff_ffff),
            full_duplex: duplex
                .filter(|&duplex| duplex <= 1)
                .map(|duplex| duplex == 1),
            rss: rss().filter(|_| if_offered(Features::RSS | Features::HASH_REPORT)),
        }
    }
}

/// The `N` bytes at `at`, if there are as many.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: NetConfig = NetConfig {
        mac: Some([2, 0, 0, 0, 0, 7]),
        link_up: Some(true),
        announce: true,
        max_queue_pairs: Some(4),
        mtu: Some(9000),
        speed_mbps: Some(10_000),
        full_duplex: Some(true),
        rss: Some(RssConfig {
            max_key_len: 40,
            max_table_len: 128,
            hash_types: 0x3f,
        }),
    };

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let golden = [
            2, 0, 0, 0, 0, 7, 3, 0, 4, 0, 0x28, 0x23, 0x10, 0x27, 0, 0, 1, 40, 128, 0, 0x3f, 0, 0,
            0,
        ];
        assert_eq!(FULL.to_bytes(), golden);
        assert_eq!(NetConfig::parse(&golden, Features::all()), FULL);
    }

    #[test]
    fn a_field_exists_by_what_is_offered_and_as_far_as_the_space_reaches() {
        let bytes = FULL.to_bytes();
        assert_eq!(
            NetConfig::parse(&bytes, Features::empty()),
            NetConfig::default()
        );
        let only_mtu = NetConfig {
            mtu: FULL.mtu,
            ..NetConfig::default()
        };
        assert_eq!(NetConfig::parse(&bytes, Features::MTU), only_mtu);
        let longer = [&bytes[..], &[0xee; 40]].concat();
        assert_eq!(NetConfig::parse(&longer, Features::all()), FULL);
        for len in 0..CONFIG_LEN {
            let short = NetConfig::parse(&bytes[..len], Features::all());
            assert_eq!(short.mac.is_some(), len >= 6);
            assert_eq!(short.mtu.is_some(), len >= 12);
            assert_eq!(short.rss, None);
        }
    }

    #[test]
    fn what_is_not_known_is_said_to_be_unknown() {
        let bytes = NetConfig::default().to_bytes();
        assert_eq!(bytes[12..17], [0xff; 5]);
        let parsed = NetConfig::parse(&bytes, Features::all());
        assert_eq!((parsed.speed_mbps, parsed.full_duplex), (None, None));
        assert_eq!(parsed.link_up, Some(false));
    }
}
