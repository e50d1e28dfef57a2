//! Receive-side scaling: which receiveq a packet goes to by the hash of its addresses and ports, and what the hash is.
//!
//! Spec: virtio 1.4, 5.1.9.4.3, Hash calculation for incoming packets; 5.1.9.5.7, Receive-side scaling.

use std::fmt;

use bitflags::bitflags;
use virtnet_packet::flow::{IpVersion, Transport};
use virtnet_packet::{Flow, PacketHash};

/// Bytes of the longest key, which is also what the longest input uses: 36 bytes and a window of 4.
pub const KEY_MAX: usize = 40;

/// Entries of the longest indirection table.
pub const TABLE_MAX: usize = 128;

/// Half-bytes of the longest input: two addresses of IPv6 and two ports.
const NIBBLES: usize = 72;

bitflags! {
    /// What may be hashed. Spec: virtio 1.4, 5.1.9.4.3.1, Supported/enabled hash types.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct HashTypes: u32 {
        /// Addresses of IPv4.
        const IPV4 = 1 << 0;
        /// Addresses of IPv4 and ports of TCP.
        const TCPV4 = 1 << 1;
        /// Addresses of IPv4 and ports of UDP.
        const UDPV4 = 1 << 2;
        /// Addresses of IPv6.
        const IPV6 = 1 << 3;
        /// Addresses of IPv6 and ports of TCP.
        const TCPV6 = 1 << 4;
        /// Addresses of IPv6 and ports of UDP.
        const UDPV6 = 1 << 5;

        // The others, which look into extension headers, are kept as they came, to be refused.
        const _ = !0;
    }
}

impl HashTypes {
    /// Those that are implemented.
    pub const SUPPORTED: Self = Self::from_bits_retain(0x3f);
}

/// Toeplitz' hash under one key: for each bit of the input that is set, the 32 bits of the key that start there, added without carry.
#[derive(Clone, PartialEq, Eq)]
pub struct Toeplitz {
    /// What each value of each half-byte of the input adds.
    table: Box<[[u32; 16]; NIBBLES]>,
}

impl fmt::Debug for Toeplitz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Toeplitz")
    }
}

impl Toeplitz {
    /// The hash under `key`, whose bytes behind [`KEY_MAX`] do not count; a shorter one goes on with zeros.
    #[must_use]
    pub fn new(key: &[u8]) -> Self {
        let byte = |at: usize| u64::from(key.get(at).copied().unwrap_or(0));
        // 40 bits from byte `at` on hold each window that starts in it.
        let window = |bit: usize| {
            let five = (0..5).fold(0, |bits, k| bits << 8 | byte(bit / 8 + k));
            u32::try_from(five >> (8 - bit % 8) & 0xffff_ffff).unwrap_or_default()
        };
        let mut table = Box::new([[0; 16]; NIBBLES]);
        for (nibble, sums) in table.iter_mut().enumerate() {
            for (value, sum) in sums.iter_mut().enumerate() {
                let set = (0..4).filter(|bit| value >> (3 - bit) & 1 == 1);
                *sum = set.fold(0, |sum, bit| sum ^ window(4 * nibble + bit));
            }
        }
        Self { table }
    }

    /// Hashes `parts`, one behind the other: 36 bytes at most count.
    #[must_use]
    pub fn hash(&self, parts: &[&[u8]]) -> u32 {
        let nibbles = parts
            .iter()
            .flat_map(|part| part.iter())
            .flat_map(|&byte| [byte >> 4, byte & 0x0f]);
        let sums = self.table.iter().zip(nibbles);
        sums.fold(0, |hash, (sums, nibble)| hash ^ sums[usize::from(nibble)])
    }
}

/// Hashes packets: what of them, and under which key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hasher {
    types: HashTypes,
    toeplitz: Toeplitz,
}

impl Hasher {
    /// A hasher of those of `types` that are [supported](HashTypes::SUPPORTED).
    #[must_use]
    pub fn new(types: HashTypes, key: &[u8]) -> Self {
        Self {
            types,
            toeplitz: Toeplitz::new(key),
        }
    }

    /// The hash of the frame that starts with `head`: of the most that is known of it and was asked for.
    #[must_use]
    pub fn hash(&self, head: &[u8]) -> PacketHash {
        let Some(flow) = Flow::of(head) else {
            return PacketHash::default();
        };
        let (ip, tcp, udp) = match flow.version {
            IpVersion::V4 => (HashTypes::IPV4, HashTypes::TCPV4, HashTypes::UDPV4),
            IpVersion::V6 => (HashTypes::IPV6, HashTypes::TCPV6, HashTypes::UDPV6),
        };
        if let Some((transport, ports)) = flow.transport {
            let with_ports = match transport {
                Transport::Tcp => tcp,
                Transport::Udp => udp,
            };
            if self.types.contains(with_ports) {
                return self.report(with_ports, &[flow.addresses, &ports]);
            }
        }
        if self.types.contains(ip) {
            self.report(ip, &[flow.addresses])
        } else {
            PacketHash::default()
        }
    }

    /// Spec: virtio 1.4, 5.1.9.4.4, Hash reporting for incoming packets: the number of the bit in [`HashTypes`], and one.
    fn report(&self, hashed: HashTypes, parts: &[&[u8]]) -> PacketHash {
        let bit = u16::try_from(hashed.bits().trailing_zeros()).unwrap_or_default();
        PacketHash {
            value: self.toeplitz.hash(parts),
            report: bit + 1,
        }
    }
}

/// Where packets go by their hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rss {
    hasher: Hasher,
    /// Numbers of queue pairs, counted from 0; a power of two of them.
    table: Box<[u16]>,
    unclassified: u16,
}

impl Rss {
    /// Receive-side scaling over a `table` of 1 to [`TABLE_MAX`] numbers of queue pairs, a power of two of them; `unclassified` is
    /// where packets go that have no hash. `None` for another table.
    #[must_use]
    pub fn new(hasher: Hasher, table: &[u16], unclassified: u16) -> Option<Self> {
        let fits = table.len().is_power_of_two() && table.len() <= TABLE_MAX;
        fits.then(|| Self {
            hasher,
            table: table.into(),
            unclassified,
        })
    }

    /// The queue pair that the frame that starts with `head` goes to.
    #[must_use]
    pub fn pair(&self, head: &[u8]) -> u16 {
        let PacketHash { value, report } = self.hasher.hash(head);
        if report == 0 {
            return self.unclassified;
        }
        let mask = self.table.len() - 1;
        self.table
            .get(value as usize & mask)
            .copied()
            .unwrap_or(self.unclassified)
    }

    /// What hashes packets.
    #[must_use]
    pub fn hasher(&self) -> &Hasher {
        &self.hasher
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key and the results that Microsoft publishes for whoever verifies a hash calculation.
    const KEY: [u8; 40] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    /// Source and destination with their ports, and the hash without and with the ports.
    type Known<A> = (A, u16, A, u16, u32, u32);

    const V4: [Known<[u8; 4]>; 5] = [
        (
            [66, 9, 149, 187],
            2794,
            [161, 142, 100, 80],
            1766,
            0x323e_8fc2,
            0x51cc_c178,
        ),
        (
            [199, 92, 111, 2],
            14_230,
            [65, 69, 140, 83],
            4739,
            0xd718_262a,
            0xc626_b0ea,
        ),
        (
            [24, 19, 198, 95],
            12_898,
            [12, 22, 207, 184],
            38_024,
            0xd2d0_a5de,
            0x5c2b_394a,
        ),
        (
            [38, 27, 205, 30],
            48_228,
            [209, 142, 163, 6],
            2217,
            0x8298_9176,
            0xafc7_327f,
        ),
        (
            [153, 39, 163, 191],
            44_251,
            [202, 188, 127, 2],
            1303,
            0x5d18_09c5,
            0x10e8_28a2,
        ),
    ];

    const V6: [Known<&str>; 3] = [
        (
            "3ffe:2501:200:1fff::7",
            2794,
            "3ffe:2501:200:3::1",
            1766,
            0x2cc1_8cd5,
            0x4020_7d3d,
        ),
        (
            "3ffe:501:8::260:97ff:fe40:efab",
            14_230,
            "ff02::1",
            4739,
            0x0f0c_461c,
            0xdde5_1bbf,
        ),
        (
            "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
            44_251,
            "fe80::200:f8ff:fe21:67cf",
            38_024,
            0x4b61_e985,
            0x02d1_feef,
        ),
    ];

    fn frame(protocol: u8, from: &[u8], to: &[u8], ports: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        if from.len() == 4 {
            frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
        }
        frame.extend(from.iter().chain(to));
        ports
            .iter()
            .for_each(|port| frame.extend(port.to_be_bytes()));
        frame.resize(frame.len() + 16, 0);
        frame
    }

    fn known() -> impl Iterator<Item = (Vec<u8>, Vec<u8>, [u16; 2], u32, u32)> {
        let v4 = V4.iter().map(|&(from, sport, to, dport, ip, with_ports)| {
            (from.to_vec(), to.to_vec(), [sport, dport], ip, with_ports)
        });
        let bytes = |text: &str| {
            let address: std::net::Ipv6Addr = text.parse().unwrap();
            address.octets().to_vec()
        };
        let v6 = V6
            .iter()
            .map(move |&(from, sport, to, dport, ip, with_ports)| {
                (bytes(from), bytes(to), [sport, dport], ip, with_ports)
            });
        v4.chain(v6)
    }

    #[test]
    fn hashes_are_those_that_everybody_knows() {
        let toeplitz = Toeplitz::new(&KEY);
        for (from, to, [sport, dport], ip, with_ports) in known() {
            assert_eq!(toeplitz.hash(&[&from, &to]), ip);
            let (sport, dport) = (sport.to_be_bytes(), dport.to_be_bytes());
            assert_eq!(toeplitz.hash(&[&from, &to, &sport, &dport]), with_ports);
        }
    }

    #[test]
    fn the_most_that_was_asked_for_is_hashed() {
        let all = Hasher::new(HashTypes::SUPPORTED, &KEY);
        let addresses = Hasher::new(HashTypes::IPV4 | HashTypes::IPV6, &KEY);
        for (from, to, ports, ip, with_ports) in known() {
            let base = if from.len() == 4 { 1 } else { 4 };
            let hash = |hasher: &Hasher, protocol: u8| {
                let PacketHash { value, report } = hasher.hash(&frame(protocol, &from, &to, ports));
                (value, report)
            };
            assert_eq!(hash(&all, 6), (with_ports, base + 1));
            assert_eq!(hash(&all, 17), (with_ports, base + 2));
            assert_eq!(hash(&all, 1), (ip, base));
            assert_eq!(hash(&addresses, 6), (ip, base));
            let none = Hasher::new(HashTypes::empty(), &KEY);
            assert_eq!(hash(&none, 6), (0, 0));
        }
        let mut arp = vec![0; 60];
        arp[12..14].copy_from_slice(&[8, 6]);
        assert_eq!(all.hash(&arp), PacketHash::default());
        let (from, to, ports, ip, _) = known().next().unwrap();
        let mut fragment = frame(6, &from, &to, ports);
        fragment[20] = 0x20;
        assert_eq!(
            all.hash(&fragment),
            PacketHash {
                value: ip,
                report: 1
            }
        );
    }

    #[test]
    fn a_packet_goes_where_its_hash_points_and_others_where_those_go_that_have_none() {
        let table: Vec<u16> = (0..128).collect();
        let hasher = Hasher::new(HashTypes::SUPPORTED, &KEY);
        let rss = Rss::new(hasher.clone(), &table, 200).unwrap();
        for (from, to, ports, ip, with_ports) in known() {
            let pair = |protocol| u32::from(rss.pair(&frame(protocol, &from, &to, ports)));
            assert_eq!(pair(6), with_ports % 128);
            assert_eq!(pair(1), ip % 128);
        }
        assert_eq!(rss.pair(&[0; 60]), 200);
        for len in [0, 3, 129, 256] {
            assert_eq!(Rss::new(hasher.clone(), &vec![0; len], 0), None);
        }
    }

    #[test]
    fn a_short_key_goes_on_with_zeros() {
        let mut long = [0; 40];
        long[..3].copy_from_slice(&KEY[..3]);
        assert_eq!(Toeplitz::new(&KEY[..3]), Toeplitz::new(&long));
        assert_eq!(Toeplitz::new(&[]).hash(&[&[0xff; 36]]), 0);
    }
}
