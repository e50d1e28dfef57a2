//! A capture file read into memory: pcap and pcapng, either byte order, any resolution of time.

use std::fmt;
use std::fs;
use std::path::Path;

use pcap_file::pcap::PcapParser;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::{Block, PcapNgParser};
use pcap_file::{DataLink, PcapError, TsResolution};

use virtnet_packet::{Direction, Offload, Origin};

use crate::{PortError, Recorded};

const NS_PER_S: u64 = 1_000_000_000;

/// What a pcapng file starts with, in either byte order.
const SECTION_HEADER: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// The packets of a capture file, with times counted from the first packet.
pub(super) struct Capture {
    bytes: Vec<u8>,
    packets: Vec<Record>,
}

/// Where a packet is in the file, and when and where it was seen.
struct Record {
    offset: usize,
    len: usize,
    wire_len: u32,
    time_ns: u64,
    origin: Origin,
}

/// All that a capture file says, with times since 1970.
#[derive(Default)]
struct Said {
    packets: Vec<Record>,
    /// What the interfaces are called, empty where nobody says.
    interfaces: Vec<String>,
}

impl Said {
    fn of(file: &[u8]) -> Result<Self, Defect> {
        if file.starts_with(&SECTION_HEADER) {
            read_pcapng(file)
        } else {
            read_pcap(file)
        }
    }

    /// The packets. `None`: they are more than a store holds.
    fn recorded(&self, file: &[u8]) -> Option<Recorded> {
        let mut recorded = Recorded::default();
        for packet in &self.packets {
            let frame = file.get(packet.offset..packet.offset + packet.len)?;
            recorded.starts.push(recorded.data.len().try_into().ok()?);
            recorded.data.extend(frame);
            recorded.lengths.push(frame.len().try_into().ok()?);
            recorded.wire_lengths.push(packet.wire_len);
            recorded.times_ns.push(packet.time_ns);
            recorded.offloads.push(Offload::default());
            recorded.origins.push(packet.origin);
        }
        Some(recorded)
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Capture({} packets)", self.packets.len())
    }
}

impl Capture {
    pub(super) fn open(path: &Path) -> Result<Self, PortError> {
        load(path, Self::parse)
    }

    fn parse(bytes: Vec<u8>) -> Result<Self, Defect> {
        let mut packets = Said::of(&bytes)?.packets;
        let first_ns = packets.first().map_or(0, |first| first.time_ns);
        for packet in &mut packets {
            // Clocks step back; what would be before the beginning is at the beginning.
            packet.time_ns = packet.time_ns.saturating_sub(first_ns);
        }
        Ok(Self { bytes, packets })
    }

    #[cfg(test)]
    pub(super) fn parse_for_tests(bytes: Vec<u8>) -> Vec<Vec<u8>> {
        let capture = Self::parse(bytes).unwrap_or_else(|defect| panic!("{}", defect.problem));
        let frames = (0..capture.len()).filter_map(|i| capture.frame(i));
        frames.map(<[u8]>::to_vec).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.packets.len()
    }

    pub(super) fn frame(&self, i: usize) -> Option<&[u8]> {
        let packet = self.packets.get(i)?;
        self.bytes.get(packet.offset..packet.offset + packet.len)
    }

    /// When packet `i` was seen, from the first one on.
    pub(super) fn time_ns(&self, i: usize) -> Option<u64> {
        self.packets.get(i).map(|packet| packet.time_ns)
    }

    pub(super) fn duration_ns(&self) -> u64 {
        let times = self.packets.iter().map(|packet| packet.time_ns);
        times.max().unwrap_or(0)
    }
}

/// Reads all packets of the capture file at `path`: pcap or pcapng, of Ethernet. With them come the names of the places where they
/// were seen, of which [`Origin::place`] is a position: of a pcap file one without a name.
///
/// # Errors
/// [`PortError::Io`] if it cannot be read; [`PortError::Capture`] if it is cut, malformed, not Ethernet, or has more than 4 GiB of
/// packets.
pub fn read_capture(path: impl AsRef<Path>) -> Result<(Recorded, Vec<String>), PortError> {
    load(path.as_ref(), |bytes| {
        let said = Said::of(&bytes)?;
        let recorded = said
            .recorded(&bytes)
            .ok_or_else(|| Defect::at(&bytes, &bytes, "", "its packets have more than 4 GiB"))?;
        Ok((recorded, said.interfaces))
    })
}

/// Reads a file and takes it apart.
fn load<T>(path: &Path, parse: impl FnOnce(Vec<u8>) -> Result<T, Defect>) -> Result<T, PortError> {
    let bytes = fs::read(path)
        .map_err(|source| PortError::io(format!("read the capture {}", path.display()), source))?;
    parse(bytes).map_err(|defect| PortError::Capture {
        path: path.to_owned(),
        problem: defect.problem,
        place: defect.place,
    })
}

/// What is wrong with a file, and where.
struct Defect {
    problem: String,
    place: String,
}

impl Defect {
    /// `unit` is what the file consists of and its number: empty for its beginning.
    fn at(file: &[u8], rest: &[u8], unit: &str, problem: impl Into<String>) -> Self {
        let offset = file.len() - rest.len();
        Self {
            problem: problem.into(),
            place: format!("{unit}byte {offset} of {}", file.len()),
        }
    }

    fn of(file: &[u8], rest: &[u8], unit: &str, error: &PcapError) -> Self {
        let problem = match error {
            PcapError::IncompleteBuffer => format!(
                "it is cut: {} bytes are left, which is not all of it",
                rest.len()
            ),
            other => other.to_string(),
        };
        Self::at(file, rest, unit, problem)
    }
}

fn read_pcap(file: &[u8]) -> Result<Said, Defect> {
    let (mut rest, parser) = PcapParser::new(file).map_err(|error| match error {
        PcapError::IncompleteBuffer => {
            Defect::at(file, file, "", "it is shorter than the header of a capture")
        }
        _ => Defect::at(file, file, "", "it starts like neither pcap nor pcapng"),
    })?;
    let header = parser.header();
    check_link(header.datalink).map_err(|problem| Defect::at(file, file, "", problem))?;
    let fraction_ns = match header.ts_resolution {
        TsResolution::MicroSecond => 1000,
        TsResolution::NanoSecond => 1,
    };
    let mut packets = Vec::new();
    while !rest.is_empty() {
        // Not the checked form: it refuses every capture that was taken with a short snap length.
        let (next, packet) = parser.next_raw_packet(rest).map_err(|error| {
            let unit = format!("record {}, ", packets.len() + 1);
            Defect::of(file, rest, &unit, &error)
        })?;
        let time_ns = u64::from(packet.ts_sec) * NS_PER_S + u64::from(packet.ts_frac) * fraction_ns;
        let wire_len = packet.orig_len;
        packets.push(record(
            file,
            &packet.data,
            wire_len,
            time_ns,
            Origin::default(),
        ));
        rest = next;
    }
    Ok(Said {
        packets,
        interfaces: vec![String::new()],
    })
}

fn read_pcapng(file: &[u8]) -> Result<Said, Defect> {
    let (mut rest, mut parser) =
        PcapNgParser::new(file).map_err(|error| Defect::of(file, file, "", &error))?;
    let mut said = Said::default();
    // Where the interfaces of this section begin among all.
    let mut section = 0;
    let mut last_ns = 0;
    // The first block is the section header.
    for number in 2.. {
        let unit = || format!("block {number}, ");
        if rest.is_empty() {
            break;
        }
        let (next, block) = parser
            .next_block(rest)
            .map_err(|error| Defect::of(file, rest, &unit(), &error))?;
        let (interface, units, wire_len, data) = match &block {
            Block::EnhancedPacket(packet) => (
                packet.interface_id,
                Some(packet.timestamp.as_nanos()),
                packet.original_len,
                &packet.data,
            ),
            Block::Packet(packet) => (
                u32::from(packet.interface_id),
                Some(u128::from(packet.timestamp)),
                packet.original_len,
                &packet.data,
            ),
            Block::SimplePacket(packet) => (0, None, packet.original_len, &packet.data),
            other => {
                match other {
                    Block::SectionHeader(_) => section = said.interfaces.len(),
                    Block::InterfaceDescription(interface) => {
                        said.interfaces.push(name_of(interface));
                    }
                    _ => {}
                }
                rest = next;
                continue;
            }
        };
        let defect = |problem: String| Defect::at(file, rest, &unit(), problem);
        let described = usize::try_from(interface)
            .ok()
            .and_then(|index| parser.interfaces().get(index))
            .ok_or_else(|| {
                defect(format!(
                    "it names interface {interface}, which is not described"
                ))
            })?;
        check_link(described.linktype).map_err(defect)?;
        // A simple packet has no time: it comes right after the one before.
        last_ns = units.map_or(last_ns, |units| nanoseconds(units, described));
        let place = usize::try_from(interface).ok().map(|id| section + id);
        let place = place.and_then(|place| u16::try_from(place).ok());
        let origin = Origin {
            place: place.ok_or_else(|| defect("it has more than 65536 interfaces".to_owned()))?,
            direction: direction_of(&block),
        };
        let record = record(file, data, wire_len, last_ns, origin);
        said.packets.push(record);
        rest = next;
    }
    Ok(said)
}

fn name_of(interface: &InterfaceDescriptionBlock<'_>) -> String {
    let mut options = interface.options.iter();
    let name = options.find_map(|option| match option {
        InterfaceDescriptionOption::IfName(name) => Some(name.to_string()),
        _ => None,
    });
    name.unwrap_or_default()
}

/// Spec: draft-ietf-opsawg-pcapng, 4.3.1, bits 0 and 1 of `epb_flags`.
fn direction_of(block: &Block<'_>) -> Direction {
    let Block::EnhancedPacket(packet) = block else {
        return Direction::Unknown;
    };
    let flags = packet.options.iter().find_map(|option| match option {
        EnhancedPacketOption::Flags(flags) => Some(flags & 3),
        _ => None,
    });
    match flags {
        Some(1) => Direction::Inbound,
        Some(2) => Direction::Outbound,
        _ => Direction::Unknown,
    }
}

/// The parser hands out parts of the file itself, never copies.
fn record(file: &[u8], data: &[u8], wire_len: u32, time_ns: u64, origin: Origin) -> Record {
    Record {
        offset: data.as_ptr().addr() - file.as_ptr().addr(),
        len: data.len(),
        wire_len,
        time_ns,
        origin,
    }
}

fn check_link(link: DataLink) -> Result<(), String> {
    match link {
        DataLink::ETHERNET => Ok(()),
        other => Err(format!(
            "its packets are of link type {}, and Ethernet (1) is expected",
            u32::from(other)
        )),
    }
}

/// What a count of an interface's time units is in nanoseconds.
fn nanoseconds(units: u128, interface: &InterfaceDescriptionBlock<'_>) -> u64 {
    let mut resolution = 6;
    let mut offset_s = 0;
    for option in &interface.options {
        match option {
            InterfaceDescriptionOption::IfTsResol(value) => resolution = *value,
            InterfaceDescriptionOption::IfTsOffset(value) => offset_s = *value,
            _ => {}
        }
    }
    let exponent = u32::from(resolution & 0x7f);
    let base: u128 = if resolution & 0x80 == 0 { 10 } else { 2 };
    let per_second = base.checked_pow(exponent).unwrap_or(u128::MAX);
    let since_ns = units * u128::from(NS_PER_S) / per_second;
    let since_ns = u64::try_from(since_ns).unwrap_or(u64::MAX);
    since_ns.wrapping_add(offset_s.wrapping_mul(NS_PER_S))
}

#[cfg(test)]
mod tests {
    use virtnet_packet::{Direction, Origin};

    use super::*;

    fn interface(resolution: Option<u8>) -> InterfaceDescriptionBlock<'static> {
        let mut interface = InterfaceDescriptionBlock::new(DataLink::ETHERNET, 0);
        let option = resolution.map(InterfaceDescriptionOption::IfTsResol);
        interface.options.extend(option);
        interface
    }

    #[test]
    fn times_are_scaled_as_the_interface_says() {
        for (resolution, units, expected_ns) in [
            (None, 1_500_000, 1_500_000_000),
            (Some(6), 3, 3000),
            (Some(9), 3, 3),
            (Some(3), 2, 2_000_000),
            (Some(0), 2, 2_000_000_000),
            (Some(12), 5_000, 5),
            (Some(0x80 | 10), 512, 500_000_000),
            (Some(0x7f), u128::from(u64::MAX), 0),
        ] {
            let found = nanoseconds(units, &interface(resolution));
            assert_eq!(found, expected_ns, "{resolution:?}");
        }
    }

    fn pcap(magic: u32, big_endian: bool, link: u32, packets: &[(u32, u32, &[u8])]) -> Vec<u8> {
        let word = |value: u32| {
            if big_endian {
                value.to_be_bytes()
            } else {
                value.to_le_bytes()
            }
        };
        let mut file = Vec::new();
        let version = if big_endian { 0x0002_0004 } else { 0x0004_0002 };
        for value in [magic, version, 0, 0, 64, link] {
            file.extend(word(value));
        }
        for (seconds, fraction, data) in packets {
            let len = u32::try_from(data.len()).unwrap();
            for value in [*seconds, *fraction, len, 1500] {
                file.extend(word(value));
            }
            file.extend_from_slice(data);
        }
        file
    }

    #[test]
    fn both_byte_orders_and_both_resolutions_of_pcap_are_read() {
        for (magic, fraction, big_endian) in [
            (0xa1b2_c3d4, 2, false),
            (0xa1b2_c3d4, 2, true),
            (0xa1b2_3c4d, 2000, false),
            (0xa1b2_3c4d, 2000, true),
        ] {
            let file = pcap(
                magic,
                big_endian,
                1,
                &[(7, 0, b"one"), (7, fraction, b"two")],
            );
            let capture = Capture::parse(file).map_err(|d| d.problem).unwrap();
            assert_eq!(capture.frame(0).unwrap(), b"one");
            assert_eq!(capture.frame(1).unwrap(), b"two");
            assert_eq!(capture.frame(2), None);
            assert_eq!(capture.time_ns(1), Some(2000));
        }
    }

    #[test]
    fn every_cut_of_a_file_is_refused_with_its_place_or_is_a_shorter_file() {
        let file = pcap(0xa1b2_c3d4, false, 1, &[(1, 0, b"abcd"), (2, 0, b"efgh")]);
        for len in 0..file.len() {
            let whole_records = match len {
                24 => Some(0),
                44 => Some(1),
                _ => None,
            };
            match (Capture::parse(file[..len].to_vec()), whole_records) {
                (Ok(capture), Some(n)) => assert_eq!(capture.len(), n),
                (Err(defect), None) if len < 24 => {
                    assert_eq!(defect.place, format!("byte 0 of {len}"));
                }
                (Err(defect), None) => {
                    let (number, offset) = if len < 44 { (1, 24) } else { (2, 44) };
                    let place = format!("record {number}, byte {offset} of {len}");
                    assert_eq!(defect.place, place);
                    assert!(defect.problem.contains("cut"), "{}", defect.problem);
                }
                (Ok(_), None) => panic!("{len} bytes were read"),
                (Err(defect), Some(_)) => panic!("{len} bytes: {}", defect.problem),
            }
        }
    }

    #[test]
    fn other_files_and_other_links_are_refused_by_name() {
        let refused = |file: Vec<u8>| Capture::parse(file).unwrap_err_problem();
        assert!(refused(vec![b'x'; 100]).contains("neither pcap nor pcapng"));
        let file = pcap(0xa1b2_c3d4, false, 101, &[]);
        assert!(refused(file).contains("link type 101"));
    }

    trait Problem {
        fn unwrap_err_problem(self) -> String;
    }

    impl Problem for Result<Capture, Defect> {
        fn unwrap_err_problem(self) -> String {
            self.map_err(|defect| defect.problem).unwrap_err()
        }
    }

    /// Whatever bytes follow a valid start: an error or packets inside the file, never a panic.
    #[test]
    fn garbled_files_never_panic() {
        let mut random = 1u32;
        let mut next = move || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random >> 8
        };
        let pcap = pcap(0xa1b2_c3d4, false, 1, &[(1, 0, b"abcd"), (2, 0, b"efgh")]);
        let mut pcapng = Vec::new();
        let place = super::super::CapturePlace::default();
        let places = [&place].into_iter();
        super::super::format::header(super::super::format::Format::Pcapng, places, &mut pcapng);
        for direction in [Direction::Unknown, Direction::Inbound, Direction::Outbound] {
            let from = Origin {
                place: 0,
                direction,
            };
            super::super::format::record(
                super::super::format::Format::Pcapng,
                from,
                5,
                &mut pcapng,
                |out| out.extend(b"abcde"),
            );
        }
        assert_eq!(
            Capture::parse(pcapng.clone())
                .map_err(|d| d.problem)
                .unwrap()
                .len(),
            3
        );
        for file in [pcap, pcapng] {
            for _ in 0..5_000 {
                let mut garbled = file.clone();
                for _ in 0..=next() % 4 {
                    let at = next() as usize % garbled.len();
                    garbled[at] = match next() % 4 {
                        0 => 0,
                        1 => 0xff,
                        2 => garbled[at] ^ 1,
                        _ => u8::try_from(next() % 256).unwrap(),
                    };
                }
                if let Ok(capture) = Capture::parse(garbled) {
                    assert!((0..capture.len()).all(|i| capture.frame(i).is_some()));
                }
            }
        }
    }
}
