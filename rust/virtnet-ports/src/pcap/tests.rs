use std::fs::{self, File};
use std::io::{PipeWriter, Read};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use virtnet_packet::{BURST_MAX, Direction};
use virtnet_sys::{Events, Poller};

use super::*;

const PCAPNG: format::Format = format::Format::Pcapng;

/// The beginning of a file with an interface that has no name.
fn header(out: &mut Vec<u8>) {
    format::header(PCAPNG, [&CapturePlace::default()].into_iter(), out);
}

/// A packet of `len` bytes at a time.
fn record(time_ns: u64, len: usize, out: &mut Vec<u8>) {
    let frame = |out: &mut Vec<u8>| out.extend(vec![1; len]);
    format::record(PCAPNG, Origin::default(), time_ns, out, frame);
}

/// A file in a directory of its own, which goes away with it.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str) -> Self {
        let thread = format!("{:?}", std::thread::current().id());
        let number: String = thread.chars().filter(char::is_ascii_digit).collect();
        let directory =
            std::env::temp_dir().join(format!("virtnet-pcap-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        Self(directory.join(name))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        fs::remove_dir_all(self.0.parent().unwrap()).unwrap();
    }
}

fn frame(i: usize) -> Vec<u8> {
    let len = 14 + i * 37 % 1500;
    (0..len)
        .map(|k| u8::try_from((k * 7 + i) % 251).unwrap())
        .collect()
}

fn write_frames(port: &mut PcapPort, range: std::ops::Range<usize>) {
    let mut burst = Burst::new();
    range.for_each(|i| burst.push_bytes(&frame(i), Offload::default()));
    assert_eq!(port.tx(&burst, &Picks::first(burst.len())), burst.len());
}

fn read_frames(port: &mut PcapPort) -> Vec<Vec<u8>> {
    let mut burst = Burst::new();
    let mut frames = Vec::new();
    while port.rx(&mut burst) > 0 {
        for i in 0..burst.len() {
            let mut bytes = vec![0; burst.frame_len(i)];
            burst.copy_frame(i, &mut bytes);
            frames.push(bytes);
        }
        burst.clear();
    }
    frames
}

#[test]
fn what_is_written_is_read_back_in_both_formats() {
    for (name, magic) in [
        ("a.pcap", [0x4d, 0x3c, 0xb2, 0xa1]),
        ("a.PCAP", [0x4d, 0x3c, 0xb2, 0xa1]),
        ("a.pcapng", [0x0a, 0x0d, 0x0d, 0x0a]),
        ("a", [0x0a, 0x0d, 0x0d, 0x0a]),
    ] {
        let file = TempFile::new(name);
        let mut out = PcapPort::open(&file.0, PcapMode::Write).unwrap();
        for start in [0, 50] {
            write_frames(&mut out, start..start + 50);
            out.flush();
        }
        assert_eq!(out.counters().sent, 100);
        drop(out);
        assert!(fs::read(&file.0).unwrap().starts_with(&magic), "{name}");

        let mut port = PcapPort::open(&file.0, PcapMode::READ).unwrap();
        assert_eq!(port.remaining(), Some(100));
        let expected: Vec<_> = (0..100).map(frame).collect();
        assert_eq!(read_frames(&mut port), expected, "{name}");
        assert_eq!(port.remaining(), Some(0));
        let counters = port.counters();
        assert_eq!(counters.received, 100);
        let bytes: usize = expected.iter().map(Vec::len).sum();
        assert_eq!(counters.received_bytes, bytes as u64);
    }
}

#[test]
fn a_written_file_is_whole_after_every_flush_and_after_drop() {
    let file = TempFile::new("a.pcapng");
    let mut out = PcapPort::open(&file.0, PcapMode::Write).unwrap();
    let count = || {
        let port = PcapPort::open(&file.0, PcapMode::READ).unwrap();
        port.remaining().unwrap()
    };
    assert_eq!(count(), 0);
    write_frames(&mut out, 0..3);
    assert_eq!(count(), 0);
    assert_eq!(out.counters().sent, 0);
    out.flush();
    assert_eq!(count(), 3);
    assert_eq!(out.counters().sent, 3);
    write_frames(&mut out, 3..5);
    drop(out);
    assert_eq!(count(), 5);
}

#[test]
fn a_file_that_cannot_be_written_is_refused_at_once() {
    let error = PcapPort::open("/dev/full", PcapMode::Write).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    let error = PcapPort::open("/nowhere/a.pcap", PcapMode::Write).unwrap_err();
    assert!(error.to_string().contains("/nowhere/a.pcap"), "{error}");
}

#[test]
fn what_is_sent_to_a_port_that_reads_is_dropped_and_counted() {
    let file = TempFile::new("a.pcap");
    drop(PcapPort::open(&file.0, PcapMode::Write).unwrap());
    let mut port = PcapPort::open(&file.0, PcapMode::READ).unwrap();
    write_frames(&mut port, 0..4);
    assert_eq!(port.counters().tx_drops.of(DropReason::PortDown), 4);
    assert!(!port.arm());
    assert_eq!(port.rx(&mut Burst::new()), 0);
}

#[test]
fn a_looped_capture_never_ends() {
    let file = TempFile::new("a.pcap");
    let mut out = PcapPort::open(&file.0, PcapMode::Write).unwrap();
    write_frames(&mut out, 0..3);
    drop(out);
    let mode = PcapMode::Read {
        looped: true,
        pace: Pace::Fast,
    };
    let mut port = PcapPort::open(&file.0, mode).unwrap();
    assert_eq!(port.remaining(), None);
    let mut burst = Burst::new();
    for start in [0, BURST_MAX] {
        assert!(port.arm());
        burst.clear();
        assert_eq!(port.rx(&mut burst), BURST_MAX);
        for i in 0..BURST_MAX {
            assert_eq!(burst.frame_len(i), frame((start + i) % 3).len());
        }
    }
    assert!(port.wait_fd().is_none());

    // An empty one has nothing to begin again with.
    drop(PcapPort::open(&file.0, PcapMode::Write).unwrap());
    let mut port = PcapPort::open(&file.0, mode).unwrap();
    assert_eq!(port.rx(&mut Burst::new()), 0);
    assert_eq!(port.remaining(), Some(0));
}

/// Three packets, at 0, 10 and 30 ms.
fn paced_file(file: &TempFile) {
    let mut bytes = Vec::new();
    header(&mut bytes);
    for ms in [100, 110, 130] {
        record(ms * 1_000_000, 60, &mut bytes);
    }
    fs::write(&file.0, bytes).unwrap();
}

#[test]
fn recorded_pace_keeps_distances_and_rounds() {
    let file = TempFile::new("a.pcapng");
    paced_file(&file);
    let mode = PcapMode::Read {
        looped: true,
        pace: Pace::Recorded,
    };
    let mut port = PcapPort::open(&file.0, mode).unwrap();
    // A round is 30 ms and one mean distance of 15 ms.
    let (start_ns, ms) = (5_000_000_000, 1_000_000);
    let mut burst = Burst::new();
    for (at_ms, expected) in [
        (0, 1),
        (0, 0),
        (9, 0),
        (10, 1),
        (29, 0),
        (44, 1),
        (45, 1),
        (54, 0),
        (55, 1),
        (100, 3),
        (1000, 60),
    ] {
        burst.clear();
        let found = port.rx_at(&mut burst, start_ns + at_ms * ms);
        assert_eq!(found, expected, "at {at_ms} ms");
    }
}

#[test]
fn a_worker_is_woken_when_the_next_packet_is_due() {
    let file = TempFile::new("a.pcapng");
    paced_file(&file);
    let mode = PcapMode::Read {
        looped: false,
        pace: Pace::Recorded,
    };
    let mut port = PcapPort::open(&file.0, mode).unwrap();
    let poller = Poller::new().unwrap();
    poller.add(port.wait_fd().unwrap(), 0).unwrap();
    let mut events = Events::with_capacity(1);
    let mut burst = Burst::new();
    assert!(port.arm());
    let start_ns = monotonic_ns();
    let (mut found, mut waits) = (port.rx(&mut burst), 0);
    while found < 3 {
        burst.clear();
        if !port.arm() {
            waits += 1;
            poller
                .wait(&mut events, Some(Duration::from_secs(5)))
                .unwrap();
        }
        found += port.rx(&mut burst);
    }
    assert!(monotonic_ns() - start_ns >= 29_000_000);
    assert!(waits <= 3, "{waits} waits for two packets");
    // Nothing is left: the timer stays quiet.
    assert!(!port.arm());
    let quiet = poller.wait(&mut events, Some(Duration::from_millis(5)));
    assert_eq!(quiet.unwrap(), 0);
}

#[test]
fn a_loop_without_duration_has_no_recorded_pace() {
    let file = TempFile::new("a.pcapng");
    let mut bytes = Vec::new();
    header(&mut bytes);
    record(5, 60, &mut bytes);
    fs::write(&file.0, bytes).unwrap();
    let mode = PcapMode::Read {
        looped: true,
        pace: Pace::Recorded,
    };
    let error = PcapPort::open(&file.0, mode).unwrap_err();
    assert!(error.to_string().contains("same time"), "{error}");
}

#[test]
fn a_missing_file_and_a_cut_one_say_so() {
    let file = TempFile::new("a.pcapng");
    let error = PcapPort::open(&file.0, PcapMode::READ).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    paced_file(&file);
    let mut bytes = fs::read(&file.0).unwrap();
    bytes.truncate(bytes.len() - 10);
    fs::write(&file.0, bytes).unwrap();
    let error = PcapPort::open(&file.0, PcapMode::READ).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("cut") && text.contains("block 5, byte 268"),
        "{text}"
    );
}

#[test]
fn runts_of_a_capture_are_counted_and_not_passed_on() {
    let file = TempFile::new("a.pcapng");
    let mut bytes = Vec::new();
    header(&mut bytes);
    for len in [0, 13, 14] {
        record(5, len, &mut bytes);
    }
    fs::write(&file.0, bytes).unwrap();
    let mut port = PcapPort::open(&file.0, PcapMode::READ).unwrap();
    assert_eq!(port.rx(&mut Burst::new()), 1);
    let counters = port.counters();
    assert_eq!((counters.received, counters.received_bytes), (3, 27));
    assert_eq!(counters.rx_drops.of(DropReason::Runt), 2);
}

/// A capture into a pipe.
fn piped(writer: PipeWriter) -> PcapPort {
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let options = CaptureOptions {
        places: vec![CapturePlace {
            name: "vm1".to_owned(),
            filter: "arp".to_owned(),
        }],
        ..CaptureOptions::default()
    };
    let port = PcapPort::capture(path, options).unwrap();
    drop(writer);
    port
}

#[test]
fn each_place_is_an_interface_with_its_own_counts_and_packets_say_which_way_they_were_going() {
    let file = TempFile::new("a.pcapng");
    let place = |name: &str, filter: &str| CapturePlace {
        name: name.to_owned(),
        filter: filter.to_owned(),
    };
    let options = CaptureOptions {
        places: vec![place("vm1", ""), place("vm2", "arp")],
        ..CaptureOptions::default()
    };
    let mut port = PcapPort::capture(&file.0, options).unwrap();
    assert_eq!(port.places(), 2);
    let mut burst = Burst::new();
    burst.push_bytes(&[7; 15], Offload::default());
    let origins = [
        (0, Direction::Inbound),
        (1, Direction::Outbound),
        (1, Direction::Inbound),
    ];
    for (place, direction) in origins {
        let from = Origin { place, direction };
        assert_eq!(port.tx_copies(from, &burst, &Picks::first(1)), 1);
    }
    let from = Origin {
        place: 1,
        direction: Direction::Inbound,
    };
    port.drop_copies(from, DropReason::NoRoom, 4);
    let unknown = Origin {
        place: 2,
        direction: Direction::Inbound,
    };
    assert_eq!(port.tx_copies(unknown, &burst, &Picks::first(1)), 0);
    drop(port);

    let bytes = fs::read(&file.0).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut packets, mut statistics) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < bytes.len() {
        let (kind, len) = (word(at), word(at + 4) as usize);
        let block = &bytes[at..at + len];
        match kind {
            // Behind 15 bytes and one of padding: option 2 of 4 bytes, and the end of options.
            6 => {
                assert_eq!(block[44..48], [2, 0, 4, 0]);
                assert_eq!(block[52..56], [0; 4]);
                packets.push((word(at + 8), word(at + 48)));
            }
            5 => {
                let has = |code: u8, count: u8| {
                    let option = [code, 0, 8, 0, count, 0, 0, 0, 0, 0, 0, 0];
                    block.windows(12).any(|bytes| bytes == option)
                };
                statistics.push((word(at + 8), has(4, 1), has(6, 6), has(5, 4), has(8, 2)));
            }
            _ => {}
        }
        at += len;
    }
    assert_eq!(packets, [(0, 1), (1, 2), (1, 1)]);
    let expected = [(0, true, false, false, false), (1, false, true, true, true)];
    assert_eq!(statistics, expected);
    assert_eq!(Capture::parse_for_tests(bytes), vec![vec![7; 15]; 3]);
}

/// What a breath does with a port that nothing comes from.
fn breathe(port: &mut PcapPort) {
    port.disarm();
    assert_eq!(port.rx(&mut Burst::new()), 0);
    assert!(!port.arm());
}

#[test]
fn a_reader_gets_packets_while_they_come_and_the_statistics_at_the_end() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut port = piped(writer);
    write_frames(&mut port, 0..3);
    port.flush();
    assert_eq!(port.counters().sent, 3);
    let mut live = vec![0; 4096];
    let n = reader.read(&mut live).unwrap();
    let recorded = Capture::parse_for_tests(live[..n].to_vec());
    assert_eq!(recorded, (0..3).map(frame).collect::<Vec<_>>());
    assert!(live[..n].windows(3).any(|text| text == b"vm1"));
    assert!(live[..n].windows(4).any(|text| text == b"\0arp"));
    port.drop_tx(DropReason::NoRoom, 2);
    drop(port);
    let mut end = Vec::new();
    reader.read_to_end(&mut end).unwrap();
    assert_eq!(
        end[..4],
        5u32.to_le_bytes(),
        "an interface statistics block"
    );
    for (code, count) in [(5u16, 2u64), (6, 5), (8, 3)] {
        let option = [
            &code.to_le_bytes()[..],
            &8u16.to_le_bytes(),
            &count.to_le_bytes(),
        ]
        .concat();
        assert!(
            end.windows(12).any(|bytes| bytes == option),
            "{code}: {end:?}"
        );
    }
}

#[test]
fn a_reader_that_does_not_keep_up_costs_packets_and_no_time() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut port = piped(writer);
    let mut burst = Burst::new();
    (0..BURST_MAX).for_each(|_| burst.push_bytes(&[7; 9000], Offload::default()));
    let mut taken = 0;
    let mut refused = 0;
    for _ in 0..50 {
        let n = port.tx(&burst, &Picks::first(burst.len()));
        port.drop_tx(DropReason::NoRoom, burst.len() - n);
        port.flush();
        taken += n;
        refused += burst.len() - n;
    }
    assert!(taken > 0 && refused > 0);
    let counters = port.counters();
    assert_eq!(counters.sent, taken as u64);
    assert_eq!(counters.tx_drops.of(DropReason::NoRoom), refused as u64);
    // It sleeps until there is room, and goes on then.
    breathe(&mut port);
    let poller = Poller::new().unwrap();
    poller.add(port.wait_fd().unwrap(), 1).unwrap();
    let mut events = Events::with_capacity(1);
    assert_eq!(poller.wait(&mut events, Some(Duration::ZERO)).unwrap(), 0);
    let reading = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        Capture::parse_for_tests(all).len()
    });
    while !matches!(&port.side, Side::Write(writer) if writer.is_empty()) {
        poller.wait(&mut events, None).unwrap();
        breathe(&mut port);
    }
    drop(port);
    assert_eq!(
        reading.join().unwrap(),
        taken,
        "whole packets, all that were taken"
    );
}

#[test]
fn a_reader_that_leaves_ends_the_capture_and_is_named() {
    let (reader, writer) = io::pipe().unwrap();
    let mut port = piped(writer);
    let watch = port.watch().unwrap();
    assert_eq!(watch.state(), "writing");
    breathe(&mut port);
    let poller = Poller::new().unwrap();
    poller.add(port.wait_fd().unwrap(), 1).unwrap();
    let mut events = Events::with_capacity(1);
    drop(reader);
    // Without a packet.
    assert_eq!(poller.wait(&mut events, None).unwrap(), 1);
    breathe(&mut port);
    assert_eq!(
        (watch.state(), watch.why()),
        ("ended", Some("its reader has left"))
    );
    assert_eq!(poller.wait(&mut events, Some(Duration::ZERO)).unwrap(), 0);
    write_frames(&mut port, 0..4);
    port.flush();
    assert_eq!(port.counters().tx_drops.of(DropReason::PortDown), 4);
    assert_eq!(port.counters().sent, 0);
}

#[test]
fn a_reader_that_stopped_reading_is_not_waited_for_long_at_the_end() {
    let (_reader, writer) = io::pipe().unwrap();
    let mut port = piped(writer);
    let mut burst = Burst::new();
    (0..BURST_MAX).for_each(|_| burst.push_bytes(&[7; 60_000], Offload::default()));
    port.tx(&burst, &Picks::first(burst.len()));
    port.flush();
    let began = Instant::now();
    drop(port);
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_capture_begins_when_somebody_reads() {
    let file = TempFile::new("fifo");
    let made = Command::new("mkfifo").arg(&file.0).status().unwrap();
    assert!(made.success());
    let mut port = PcapPort::open(&file.0, PcapMode::Write).unwrap();
    assert_eq!(port.watch().unwrap().state(), "waiting");
    write_frames(&mut port, 0..2);
    port.flush();
    assert_eq!(port.counters().tx_drops.of(DropReason::PortDown), 2);
    let path = file.0.clone();
    let opening = std::thread::spawn(move || File::open(path).unwrap());
    let poller = Poller::new().unwrap();
    poller.add(port.wait_fd().unwrap(), 1).unwrap();
    let mut events = Events::with_capacity(1);
    while port.watch().unwrap().state() == "waiting" {
        // It looks again by itself.
        poller.wait(&mut events, None).unwrap();
        breathe(&mut port);
    }
    assert_eq!(port.watch().unwrap().state(), "writing");
    write_frames(&mut port, 2..3);
    port.flush();
    let mut reader = opening.join().unwrap();
    let mut live = vec![0; 4096];
    let n = reader.read(&mut live).unwrap();
    assert_eq!(Capture::parse_for_tests(live[..n].to_vec()), [frame(2)]);
}
