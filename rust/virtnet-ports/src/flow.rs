//! Which flow a packet belongs to, as a number: for spreading packets over queues so that a flow keeps its order.

/// A hash of the addresses and ports in `head`, or of the MAC addresses where there is no IP.
pub(crate) fn flow_hash(head: &[u8]) -> u32 {
    let field = |at: usize, len: usize| head.get(at..at + len).unwrap_or_default();
    let (mut at, mut ethertype) = (12, field(12, 2));
    while let ([0x81, 0x00] | [0x88, 0xa8], true) = (ethertype, at < 20) {
        at += 4;
        ethertype = field(at, 2);
    }
    let ip = at + 2;
    match ethertype {
        [0x08, 0x00] => {
            let header_len = 4 * usize::from(head.get(ip).copied().unwrap_or(0x45) & 0x0f);
            let fragment = field(ip + 6, 2)
                .iter()
                .enumerate()
                .any(|(k, &b)| b & [0x3f, 0xff][k] != 0);
            let with_ports = matches!(field(ip + 9, 1), [6 | 17]) && !fragment;
            mix(&[
                field(ip + 12, 8),
                if with_ports {
                    field(ip + header_len, 4)
                } else {
                    &[]
                },
            ])
        }
        [0x86, 0xdd] => {
            let with_ports = matches!(field(ip + 6, 1), [6 | 17]);
            mix(&[
                field(ip + 8, 32),
                if with_ports { field(ip + 40, 4) } else { &[] },
            ])
        }
        _ => mix(&[field(0, 12)]),
    }
}

/// FNV-1a over words, then MurmurHash3's last step: every bit of the input changes the low bits that choose a queue.
fn mix(parts: &[&[u8]]) -> u32 {
    let mut hash = 0x811c_9dc5_u32;
    for word in parts.iter().flat_map(|part| part.chunks(4)) {
        let value = word
            .iter()
            .fold(0_u32, |value, &byte| value << 8 | u32::from(byte));
        hash = (hash ^ value).wrapping_mul(0x0100_0193);
    }
    hash = (hash ^ hash >> 16).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ hash >> 13).wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::flow_hash;

    fn udp(source_port: u16) -> Vec<u8> {
        let mut frame = vec![0; 42];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[23] = 17;
        frame[34..36].copy_from_slice(&source_port.to_be_bytes());
        frame
    }

    #[test]
    fn a_flow_keeps_its_number_and_flows_spread() {
        assert_eq!(flow_hash(&udp(7)), flow_hash(&udp(7)));
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
            flow_hash(&vec![0x81; len]);
        }
    }
}
