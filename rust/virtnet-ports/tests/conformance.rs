//! Ports that need nothing of the machine: the memory pair, and captures.

use virtnet_packet::{BURST_MAX, Port, memory_pair};
use virtnet_ports::{PcapMode, PcapPort};
use virtnet_testkit::{TempDir, check_port, frame, receive, send};

#[test]
fn a_memory_pair_keeps_the_promises_of_a_port_at_any_capacity() {
    for capacity in [BURST_MAX, BURST_MAX + 1, 1000] {
        let (mut a, mut b) = memory_pair(capacity);
        check_port(&mut a, &mut b);
    }
}

/// A capture is a pair of ports with time between them: what was sent to the file arrives when it is opened again.
#[test]
fn a_capture_gives_back_what_was_sent_to_it() {
    let directory = TempDir::new();
    for name in ["a.pcap", "a.pcapng"] {
        let path = directory.join(name);
        let frames: Vec<_> = (14..300)
            .chain([1500, 1514, 9014, 65_534, 65_535])
            .map(|len| frame::pattern(len, len))
            .collect();
        let mut file = PcapPort::open(&path, PcapMode::Write).unwrap();
        for burst in frames.chunks(BURST_MAX) {
            assert_eq!(send(&mut file, burst), burst.len());
        }
        let sent = file.counters();
        assert_eq!(sent.sent, frames.len() as u64);
        assert_eq!(sent.tx_drops.total(), 0);

        let mut again = PcapPort::open(&path, PcapMode::READ).unwrap();
        assert!(receive(&mut file, &mut again, frames.len()) == frames);
        let received = again.counters();
        assert_eq!(received.received, sent.sent);
        assert_eq!(received.received_bytes, sent.sent_bytes);
        assert!(!again.arm(), "nothing is left");
    }
}
