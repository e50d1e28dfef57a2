//! The commands of a control queue as values, for whoever sends them and whoever carries them out.
//!
//! Spec: virtio 1.4, 5.1.9.5, Control Virtqueue.

use virtnet_packet::header::Mac;

use crate::Features;
use crate::net::rss::HashTypes;

/// What stands in front of every command: its class, and its number in the class.
const HEADER_LEN: usize = 2;

/// Bits of guest offloads whose number is not that of their feature, with the features' numbers: they belong to features beyond 64
/// bits, which nothing here negotiates. Spec: virtio 1.4, 5.1.9.5.8.
const OFFLOADS_MASK: u64 = Features::GUEST_OFFLOADS.bits() | 1 << 46 | 1 << 47;

/// A way of receiving that can be switched on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReceiveMode {
    /// Everything.
    Promiscuous,
    /// All multicast addresses.
    AllMulticast,
    /// All unicast addresses.
    AllUnicast,
    /// No multicast address.
    NoMulticast,
    /// No unicast address.
    NoUnicast,
    /// No broadcasts.
    NoBroadcast,
}

impl ReceiveMode {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 6] = [
        Self::Promiscuous,
        Self::AllMulticast,
        Self::AllUnicast,
        Self::NoMulticast,
        Self::NoUnicast,
        Self::NoBroadcast,
    ];
}

/// When notifications are held back: until so many packets wait, or the first of them has waited so long. Either of them 0: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Coalescing {
    /// Packets.
    pub max_packets: u32,
    /// Microseconds.
    pub max_usecs: u32,
}

/// How packets are to be spread over receiveqs, as it stands in a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RssConfig {
    /// What to hash.
    pub types: HashTypes,
    /// Numbers of queue pairs; a power of two of them.
    pub table: Vec<u16>,
    /// Where packets go that have no hash.
    pub unclassified: u16,
    /// How many transmitqs the driver uses.
    pub transmitqs: u16,
    /// The key.
    pub key: Vec<u8>,
}

/// Which statistics of which queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatsAsked {
    /// Number of the queue.
    pub queue: u16,
    /// Bits of the kinds of statistics.
    pub types: u64,
}

/// What a driver can ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Switch a receive mode.
    Receive(ReceiveMode, bool),
    /// Receive what is sent to these addresses.
    MacTable {
        /// Stations.
        unicast: Vec<Mac>,
        /// Groups.
        multicast: Vec<Mac>,
    },
    /// This is the device's address.
    SetMac(Mac),
    /// Receive this VLAN.
    AddVlan(u16),
    /// Do not receive this VLAN any more.
    RemoveVlan(u16),
    /// The driver has announced itself.
    AcknowledgeAnnounce,
    /// Use so many queue pairs.
    SetPairs(u16),
    /// Spread packets by their hash.
    Rss(RssConfig),
    /// Report hashes of these types under this key.
    Hash(HashTypes, Vec<u8>),
    /// Offloads that the driver takes from now on, by the bits of their features.
    SetOffloads(u64),
    /// Hold back notifications of all transmitqs.
    CoalesceTransmit(Coalescing),
    /// Hold back notifications of all receiveqs.
    CoalesceReceive(Coalescing),
    /// Hold back notifications of one queue.
    CoalesceQueue(u16, Coalescing),
    /// How are notifications of this queue held back?
    AskCoalescing(u16),
    /// Which statistics are there?
    AskStats,
    /// Statistics of these queues.
    Stats(Vec<StatsAsked>),
}

impl Command {
    /// Class and number.
    fn code(&self) -> [u8; HEADER_LEN] {
        match self {
            Self::Receive(mode, _) => {
                let number = ReceiveMode::ALL.iter().position(|one| one == mode);
                [
                    0,
                    u8::try_from(number.unwrap_or_default()).unwrap_or_default(),
                ]
            }
            Self::MacTable { .. } => [1, 0],
            Self::SetMac(_) => [1, 1],
            Self::AddVlan(_) => [2, 0],
            Self::RemoveVlan(_) => [2, 1],
            Self::AcknowledgeAnnounce => [3, 0],
            Self::SetPairs(_) => [4, 0],
            Self::Rss(_) => [4, 1],
            Self::Hash(..) => [4, 2],
            Self::SetOffloads(_) => [5, 0],
            Self::CoalesceTransmit(_) => [6, 0],
            Self::CoalesceReceive(_) => [6, 1],
            Self::CoalesceQueue(..) => [6, 2],
            Self::AskCoalescing(_) => [6, 3],
            Self::AskStats => [8, 0],
            Self::Stats(_) => [8, 1],
        }
    }

    /// The feature without which it cannot be sent, beside the control queue itself.
    #[must_use]
    pub fn needs(&self) -> Features {
        match self {
            Self::Receive(ReceiveMode::Promiscuous | ReceiveMode::AllMulticast, _)
            | Self::MacTable { .. } => Features::CTRL_RX,
            Self::Receive(..) => Features::CTRL_RX_EXTRA,
            Self::SetMac(_) => Features::CTRL_MAC_ADDR,
            Self::AddVlan(_) | Self::RemoveVlan(_) => Features::CTRL_VLAN,
            Self::AcknowledgeAnnounce => Features::GUEST_ANNOUNCE,
            Self::SetPairs(_) => Features::MQ,
            Self::Rss(_) => Features::RSS,
            Self::Hash(..) => Features::HASH_REPORT,
            Self::SetOffloads(_) => Features::CTRL_GUEST_OFFLOADS,
            Self::CoalesceTransmit(_) | Self::CoalesceReceive(_) => Features::NOTF_COAL,
            Self::CoalesceQueue(..) | Self::AskCoalescing(_) => Features::VQ_NOTF_COAL,
            Self::AskStats | Self::Stats(_) => Features::DEVICE_STATS,
        }
    }

    /// Whether nothing is different after it.
    pub(super) fn only_asks(&self) -> bool {
        matches!(
            self,
            Self::AcknowledgeAnnounce | Self::AskCoalescing(_) | Self::AskStats | Self::Stats(_)
        )
    }

    /// Bytes that the device writes *before* its verdict: only one command has data that the device writes, others have results,
    /// which stand behind it.
    #[must_use]
    pub fn data_len(&self) -> usize {
        data_len(self.code())
    }

    /// What it does, as the end of a sentence.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Receive(..) => "switch a receive mode",
            Self::MacTable { .. } => "receive more addresses",
            Self::SetMac(_) => "have that MAC address",
            Self::AddVlan(_) => "receive a VLAN",
            Self::RemoveVlan(_) => "receive a VLAN no more",
            Self::AcknowledgeAnnounce => "have an announcement acknowledged",
            Self::SetPairs(_) => "use that many queue pairs",
            Self::Rss(_) => "spread packets by their hash",
            Self::Hash(..) => "report hashes",
            Self::SetOffloads(_) => "change offloads",
            Self::CoalesceTransmit(_) | Self::CoalesceReceive(_) | Self::CoalesceQueue(..) => {
                "hold back notifications"
            }
            Self::AskCoalescing(_) => "tell how notifications are held back",
            Self::AskStats | Self::Stats(_) => "tell statistics",
        }
    }

    /// As it stands in device-readable buffers.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.code().to_vec();
        let put16 = |bytes: &mut Vec<u8>, word: u16| bytes.extend(word.to_le_bytes());
        let put32 = |bytes: &mut Vec<u8>, word: u32| bytes.extend(word.to_le_bytes());
        match self {
            Self::Receive(_, on) => bytes.push((*on).into()),
            Self::MacTable { unicast, multicast } => {
                for table in [unicast, multicast] {
                    put32(&mut bytes, u32::try_from(table.len()).unwrap_or(u32::MAX));
                    table.iter().for_each(|mac| bytes.extend(mac.0));
                }
            }
            Self::SetMac(mac) => bytes.extend(mac.0),
            Self::AddVlan(number) | Self::RemoveVlan(number) | Self::SetPairs(number) => {
                put16(&mut bytes, *number)
            }
            Self::AcknowledgeAnnounce | Self::AskStats => {}
            Self::Rss(config) => {
                put32(&mut bytes, config.types.bits());
                let entries = u16::try_from(config.table.len()).unwrap_or(u16::MAX);
                put16(&mut bytes, entries.wrapping_sub(1));
                put16(&mut bytes, config.unclassified);
                config
                    .table
                    .iter()
                    .for_each(|&pair| put16(&mut bytes, pair));
                put16(&mut bytes, config.transmitqs);
                put_key(&mut bytes, &config.key);
            }
            Self::Hash(types, key) => {
                put32(&mut bytes, types.bits());
                bytes.extend([0; 8]);
                put_key(&mut bytes, key);
            }
            Self::SetOffloads(offloads) => bytes.extend(offloads.to_le_bytes()),
            Self::CoalesceTransmit(to) | Self::CoalesceReceive(to) => {
                put32(&mut bytes, to.max_packets);
                put32(&mut bytes, to.max_usecs);
            }
            Self::CoalesceQueue(queue, to) => {
                put32(&mut bytes, u32::from(*queue));
                put32(&mut bytes, to.max_packets);
                put32(&mut bytes, to.max_usecs);
            }
            Self::AskCoalescing(queue) => put32(&mut bytes, u32::from(*queue)),
            Self::Stats(entries) => {
                for entry in entries {
                    put16(&mut bytes, entry.queue);
                    bytes.extend([0; 6]);
                    bytes.extend(entry.types.to_le_bytes());
                }
            }
        }
        bytes
    }

    /// Reads what a driver has sent; `None` where it is no command, or not all of one. Bytes behind its end mean nothing.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (&[class, number], data) = bytes.split_first_chunk()?;
        let mut data = Reader(data);
        let command = match (class, number) {
            (0, _) => {
                let mode = *ReceiveMode::ALL.get(usize::from(number))?;
                Self::Receive(mode, data.switch()?)
            }
            (1, 0) => Self::MacTable {
                unicast: data.macs()?,
                multicast: data.macs()?,
            },
            (1, 1) => Self::SetMac(Mac(data.take()?)),
            (2, 0) => Self::AddVlan(data.u16()?),
            (2, 1) => Self::RemoveVlan(data.u16()?),
            (3, 0) => Self::AcknowledgeAnnounce,
            (4, 0) => Self::SetPairs(data.u16()?),
            (4, 1) => {
                let types = HashTypes::from_bits_retain(data.u32()?);
                let mask = data.u16()?;
                let unclassified = data.u16()?;
                let table = data.words(1 + usize::from(mask))?;
                Self::Rss(RssConfig {
                    types,
                    table,
                    unclassified,
                    transmitqs: data.u16()?,
                    key: data.key()?,
                })
            }
            (4, 2) => {
                let types = HashTypes::from_bits_retain(data.u32()?);
                data.take::<8>()?;
                Self::Hash(types, data.key()?)
            }
            (5, 0) => Self::SetOffloads(data.u64()?),
            (6, 0) => Self::CoalesceTransmit(data.coalescing()?),
            (6, 1) => Self::CoalesceReceive(data.coalescing()?),
            (6, 2) => Self::CoalesceQueue(data.queue()?, data.coalescing()?),
            (6, 3) => Self::AskCoalescing(data.queue()?),
            (8, 0) => Self::AskStats,
            (8, 1) => Self::Stats(data.stats()?),
            _ => return None,
        };
        Some(command)
    }
}

/// See [`Command::data_len`]: by class and number.
pub(super) fn data_len(code: [u8; HEADER_LEN]) -> usize {
    if code == [6, 3] { 8 } else { 0 }
}

/// The features whose offloads a command names, if every bit is that of an offload.
pub(super) fn offloads_of(bits: u64) -> Option<Features> {
    (bits & !OFFLOADS_MASK == 0).then(|| Features::from_bits_retain(bits))
}

fn put_key(bytes: &mut Vec<u8>, key: &[u8]) {
    bytes.push(u8::try_from(key.len()).unwrap_or(u8::MAX));
    bytes.extend(key);
}

/// Reads numbers from the front, none of them beyond the end.
struct Reader<'bytes>(&'bytes [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (&first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(first)
    }

    fn bytes(&mut self, n: usize) -> Option<&[u8]> {
        let (first, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(first)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn switch(&mut self) -> Option<bool> {
        match self.take()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    /// So many addresses as a number in front of them says. What is there is what room is made for.
    fn macs(&mut self) -> Option<Vec<Mac>> {
        let n = usize::try_from(self.u32()?).ok()?;
        let (macs, _) = self.bytes(n.checked_mul(6)?)?.as_chunks();
        Some(macs.iter().map(|&mac| Mac(mac)).collect())
    }

    fn words(&mut self, n: usize) -> Option<Vec<u16>> {
        let (words, _) = self.bytes(2 * n)?.as_chunks();
        Some(words.iter().map(|&word| u16::from_le_bytes(word)).collect())
    }

    fn key(&mut self) -> Option<Vec<u8>> {
        let [n] = self.take()?;
        self.bytes(n.into()).map(<[u8]>::to_vec)
    }

    fn coalescing(&mut self) -> Option<Coalescing> {
        Some(Coalescing {
            max_packets: self.u32()?,
            max_usecs: self.u32()?,
        })
    }

    /// A queue's number, and two bytes that are reserved.
    fn queue(&mut self) -> Option<u16> {
        let queue = self.u16()?;
        self.u16().map(|_| queue)
    }

    fn stats(&mut self) -> Option<Vec<StatsAsked>> {
        let (entries, rest) = self.0.as_chunks::<16>();
        let entry = |&[low, high, _, _, _, _, _, _, ref types @ ..]: &[u8; 16]| StatsAsked {
            queue: u16::from_le_bytes([low, high]),
            types: u64::from_le_bytes(*types),
        };
        (rest.is_empty() && !entries.is_empty()).then(|| entries.iter().map(entry).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each() -> Vec<Command> {
        let macs = |n: u8| (0..n).map(|k| Mac([2, 0, 0, 0, 0, k])).collect::<Vec<_>>();
        let rss = RssConfig {
            types: HashTypes::SUPPORTED,
            table: vec![0, 1, 1, 0],
            unclassified: 1,
            transmitqs: 2,
            key: (0..40).collect(),
        };
        let held = Coalescing {
            max_packets: 7,
            max_usecs: 70_000,
        };
        let asked = StatsAsked {
            queue: 3,
            types: 1 << 32 | 5,
        };
        let mut commands: Vec<_> = ReceiveMode::ALL
            .iter()
            .flat_map(|&mode| [true, false].map(|on| Command::Receive(mode, on)))
            .collect();
        commands.extend([
            Command::MacTable {
                unicast: macs(3),
                multicast: Vec::new(),
            },
            Command::SetMac(Mac([2, 3, 4, 5, 6, 7])),
            Command::AddVlan(4095),
            Command::RemoveVlan(1),
            Command::AcknowledgeAnnounce,
            Command::SetPairs(8),
            Command::Rss(rss),
            Command::Hash(HashTypes::IPV4, vec![1, 2, 3]),
            Command::SetOffloads(1 << 7 | 2),
            Command::CoalesceTransmit(held),
            Command::CoalesceReceive(held),
            Command::CoalesceQueue(5, held),
            Command::AskCoalescing(5),
            Command::AskStats,
            Command::Stats(vec![asked; 2]),
        ]);
        commands
    }

    #[test]
    fn a_command_survives_the_round_trip_and_its_beginning_is_none() {
        for command in one_of_each() {
            let bytes = command.encode();
            assert_eq!(Command::decode(&bytes).as_ref(), Some(&command));
            for len in 0..bytes.len() {
                let less = Command::decode(&bytes[..len]);
                // Statistics of one queue less are a command too.
                let fewer = matches!(less, Some(Command::Stats(_)));
                assert!(less.is_none() || fewer, "{command:?} cut to {len} bytes");
            }
        }
    }

    #[test]
    fn bytes_are_those_of_the_specification() {
        let bytes = |command: Command| command.encode();
        assert_eq!(bytes(Command::SetPairs(0x102)), [4, 0, 2, 1]);
        assert_eq!(bytes(Command::AddVlan(5)), [2, 0, 5, 0]);
        let rss = RssConfig {
            types: HashTypes::TCPV4,
            table: vec![0, 1],
            unclassified: 3,
            transmitqs: 4,
            key: vec![9],
        };
        let expected = [4, 1, 2, 0, 0, 0, 1, 0, 3, 0, 0, 0, 1, 0, 4, 0, 1, 9];
        assert_eq!(bytes(Command::Rss(rss)), expected);
        let hash = Command::Hash(HashTypes::IPV4, vec![9]);
        assert_eq!(
            bytes(hash),
            [4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 9]
        );
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for bytes in [
            &[][..],
            &[0],
            &[0, 6, 0],
            &[0, 0, 2],
            &[7, 0, 0, 0, 0, 0],
            &[8, 1],
            &[8, 1, 0],
            &[255, 255, 255, 255],
            // More addresses than there are bytes in the world.
            &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        ] {
            assert_eq!(Command::decode(bytes), None, "{bytes:?}");
        }
    }
}
