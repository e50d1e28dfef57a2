//! Which flow a packet belongs to: the addresses of its IP header, and the ports where there are any.

use crate::header::ETHERNET_LEN;

/// The version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IpVersion {
    /// Addresses of 4 bytes.
    V4,
    /// Addresses of 16 bytes.
    V6,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Protocol number 6.
    Tcp,
    /// Protocol number 17.
    Udp,
}

/// Where an IP packet comes from and goes to, as it stands in its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<'head> {
    /// The version of IP.
    pub version: IpVersion,
    /// Source and destination address, one behind the other: 8 or 32 bytes.
    pub addresses: &'head [u8],
    /// The protocol above IP and its ports, source and destination; `None` for other protocols, and for fragments, of which only
    /// the first has ports.
    pub transport: Option<(Transport, [u8; 4])>,
}

/// The hash of a packet's flow, as a device reports it to its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PacketHash {
    /// The hash; 0 where there is none.
    pub value: u32,
    /// What was hashed: 0 for nothing, otherwise one of the numbers that the specification has for it.
    pub report: u16,
}

/// Tags and extension headers that are followed: no packet of good will has more.
const HEADERS_MAX: usize = 8;

impl<'head> Flow<'head> {
    /// Finds the flow of the frame that starts with `head`, behind up to two VLAN tags; `None` where there is no IP.
    #[must_use]
    pub fn of(head: &'head [u8]) -> Option<Self> {
        let (mut at, mut ethertype) = (ETHERNET_LEN, head.get(12..14)?);
        while let ([0x81, 0x00] | [0x88, 0xa8], true) = (ethertype, at < ETHERNET_LEN + 8) {
            ethertype = head.get(at + 2..at + 4)?;
            at += 4;
        }
        let ip = head.get(at..)?;
        match ethertype {
            [0x08, 0x00] => Self::v4(ip),
            [0x86, 0xdd] => Self::v6(ip),
            _ => None,
        }
    }

    fn v4(ip: &'head [u8]) -> Option<Self> {
        let fixed = ip.first_chunk::<20>()?;
        // More fragments, or an offset. Spec: RFC 791, 3.1.
        let is_fragment = fixed[6] & 0x3f != 0 || fixed[7] != 0;
        let header_len = 4 * usize::from(fixed[0] & 0x0f);
        let transport = if is_fragment {
            None
        } else {
            transport(fixed[9], ip.get(header_len..)?)
        };
        Some(Self {
            version: IpVersion::V4,
            addresses: &ip[12..20],
            transport,
        })
    }

    /// Extension headers are skipped. Spec: RFC 8200, 4.
    fn v6(ip: &'head [u8]) -> Option<Self> {
        let addresses = ip.get(8..40)?;
        let (mut next, mut at) = (ip[6], 40);
        let mut found = None;
        for _ in 0..HEADERS_MAX {
            let rest = ip.get(at..).unwrap_or_default();
            match (next, rest) {
                // Hop-by-hop options, routing, destination options: in units of 8 bytes behind the first.
                (0 | 43 | 60, &[following, len, ..]) => {
                    (next, at) = (following, at + 8 * (1 + usize::from(len)));
                }
                // Authentication: in units of 4 bytes. Spec: RFC 4302, 2.2.
                (51, &[following, len, ..]) => {
                    (next, at) = (following, at + 4 * (2 + usize::from(len)));
                }
                _ => {
                    found = transport(next, rest);
                    break;
                }
            }
        }
        Some(Self {
            version: IpVersion::V6,
            addresses,
            transport: found,
        })
    }
}

fn transport(protocol: u8, header: &[u8]) -> Option<(Transport, [u8; 4])> {
    let transport = match protocol {
        6 => Transport::Tcp,
        17 => Transport::Udp,
        _ => return None,
    };
    Some((transport, *header.first_chunk()?))
}

/// A number for the flow of the frame that starts with `head`, the same in both of its directions; of its MAC addresses where there
/// is no IP. For spreading packets over queues so that a flow keeps its order.
#[must_use]
pub fn flow_hash(head: &[u8]) -> u32 {
    let (ends, ports) = match Flow::of(head) {
        Some(flow) => (
            flow.addresses,
            flow.transport.map_or([0; 4], |(_, ports)| ports),
        ),
        None => (head.get(..12).unwrap_or_default(), [0; 4]),
    };
    let (one, other) = ends.split_at(ends.len() / 2);
    let [a, b, c, d] = ports;
    finish(mix(one, [a, b]).wrapping_add(mix(other, [c, d])))
}

/// FNV-1a over words, for one end of a flow.
fn mix(address: &[u8], port: [u8; 2]) -> u32 {
    let step = |hash: u32, value: u32| (hash ^ value).wrapping_mul(0x0100_0193);
    let words = address.chunks(4).map(|word| {
        word.iter()
            .fold(0_u32, |value, &byte| value << 8 | u32::from(byte))
    });
    let hash = words.fold(0x811c_9dc5, step);
    finish(step(hash, u16::from_be_bytes(port).into()))
}

/// MurmurHash3's last step: every bit of the input changes the low bits that choose a queue.
fn finish(mut hash: u32) -> u32 {
    hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp(source_port: u16) -> Vec<u8> {
        let mut frame = vec![0; 42];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 17;
        frame[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        frame[34..36].copy_from_slice(&source_port.to_be_bytes());
        frame[36..38].copy_from_slice(&[0, 53]);
        frame
    }

    /// UDP over IPv6 behind these extension headers.
    fn udp6(extensions: &[u8], first: u8) -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[20] = first;
        frame[22..54].copy_from_slice(&[7; 32]);
        frame.extend(extensions);
        frame.extend([0, 1, 0, 2, 0, 8, 0, 0]);
        frame
    }

    #[test]
    fn a_flow_has_its_addresses_and_ports() {
        let frame = udp(7);
        let flow = Flow::of(&frame).unwrap();
        assert_eq!(flow.addresses, [10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(flow.transport, Some((Transport::Udp, [0, 7, 0, 53])));
        let mut tagged = frame[..12].to_vec();
        tagged.extend([0x88, 0xa8, 0, 1, 0x81, 0, 0, 2]);
        tagged.extend(&frame[12..]);
        assert_eq!(Flow::of(&tagged), Some(flow));
    }

    #[test]
    fn extension_headers_are_skipped_and_fragments_have_no_ports() {
        let ports = |frame: &[u8]| {
            let transport = Flow::of(frame).unwrap().transport;
            transport.map(|(_, ports)| ports)
        };
        assert_eq!(ports(&udp6(&[], 17)), Some([0, 1, 0, 2]));
        let options = [60, 0, 0, 0, 0, 0, 0, 0, 17, 1].iter().copied();
        let options: Vec<u8> = options.chain([0; 14]).collect();
        assert_eq!(ports(&udp6(&options, 0)), Some([0, 1, 0, 2]));
        assert_eq!(ports(&udp6(&[17, 0, 0, 0, 0, 0, 0, 0], 44)), None);
        // A chain without an end.
        assert_eq!(ports(&udp6(&[0; 80], 0)), None);
    }

    #[test]
    fn both_directions_of_a_flow_have_one_number_and_flows_spread() {
        let mut back = udp(7);
        back[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        back[34..38].copy_from_slice(&[0, 53, 0, 7]);
        assert_eq!(flow_hash(&udp(7)), flow_hash(&back));
        // Linux connects from every other port only.
        for step in [1, 2, 256] {
            let lanes: Vec<u32> = (0..=255).map(|k| flow_hash(&udp(step * k)) % 4).collect();
            for lane in 0..4 {
                let n = lanes.iter().filter(|&&l| l == lane).count();
                assert!((30..110).contains(&n), "lane {lane} has {n} of 256 flows");
            }
        }
    }

    #[test]
    fn fragments_of_a_packet_stay_together_and_runts_are_no_trouble() {
        let mut first = udp(1);
        first[20] = 0x20;
        let mut second = udp(2);
        second[21] = 1;
        assert_eq!(flow_hash(&first), flow_hash(&second));
        for len in 0..60 {
            let _ = flow_hash(&vec![0x81; len]);
            let _ = flow_hash(&udp6(&[0; 8], 0)[..len]);
        }
    }
}
