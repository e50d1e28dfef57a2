//! The control queue between a virtio-user and a vhost-user port: what the driver asks for is what packets find.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::collections::BTreeSet;

use support::{Pair, Wiring, beside_others, breathe, burst_of, offered, send_or_drop, until};
use virtnet_packet::header::Mac;
use virtnet_packet::{Burst, DropReason, Offloads, Port};
use virtnet_ports::{Control, PortError, VhostUserOptions, VhostUserPort};
use virtnet_sys::{Events, Poller};
use virtnet_testkit::{TempDir, frame};
use virtnet_virtio::net::control::{Coalescing, Command, ReceiveMode, RssConfig, StatsAsked};
use virtnet_virtio::net::rss::{HashTypes, Hasher};
use virtnet_virtio::{Features, RingFormat};

const FORMATS: [RingFormat; 2] = [RingFormat::Split, RingFormat::Packed];
const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
const GROUP: Mac = Mac([1, 0, 0x5e, 0, 0, 1]);

fn wiring(format: RingFormat, queue_pairs: u16) -> Wiring {
    Wiring {
        format,
        queue_pairs,
        control: true,
        ..Wiring::default()
    }
}

/// A pair of ports with all of their queue pairs in use, neither of them attached.
#[track_caller]
fn connect(wiring: &Wiring) -> Pair {
    let pair = wiring.connect();
    until("all queue pairs are in use", || {
        let sinks = pair.device.status().unwrap().sinks;
        let driver = pair.driver.status().unwrap().queue_pairs;
        (sinks, driver) == (wiring.queue_pairs.into(), wiring.queue_pairs.into())
    });
    pair
}

/// Has the device carry a command out.
#[track_caller]
fn ask(pair: &Pair, command: Command) -> Vec<u8> {
    pair.driver.watch().command(command).unwrap()
}

fn udp(from: u16, to: u16) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9]);
    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
    frame[17] = 46;
    frame[23] = 17;
    let (a, b) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let ends = if from < to { [a, b] } else { [b, a] };
    frame[26..34].copy_from_slice(ends.as_flattened());
    frame[34..36].copy_from_slice(&from.to_be_bytes());
    frame[36..38].copy_from_slice(&to.to_be_bytes());
    frame
}

/// Does something with a port that is attached meanwhile.
fn with<P: Port, R>(port: &mut P, work: impl FnOnce(&mut P) -> R) -> R {
    port.attach();
    port.sync();
    let answer = work(port);
    port.flush();
    port.detach();
    answer
}

/// Sends all of them.
fn give(port: &mut impl Port, frames: &[Vec<u8>]) {
    for some in frames.chunks(64) {
        with(port, |port| send_or_drop(port, &burst_of(some)));
    }
}

/// Sends from the device; the frames that the driver has received.
fn send(pair: &mut Pair, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut received = Vec::new();
    for some in frames.chunks(64) {
        give(&mut pair.device, some);
        loop {
            let more = with(&mut pair.driver, |driver| breathe(driver));
            if more.is_empty() {
                break;
            }
            received.extend(more);
        }
    }
    received
}

/// How many packets have passed each receiveq, as the device says.
fn packets_by_receiveq(pair: &Pair, pairs: u16) -> Vec<u64> {
    let asked = (0..pairs).map(|pair| StatsAsked {
        queue: 2 * pair,
        types: 1,
    });
    let answer = ask(pair, Command::Stats(asked.collect()));
    let (entries, rest) = answer.as_chunks::<56>();
    assert!(rest.is_empty());
    let packets = |entry: &[u8; 56]| u64::from_le_bytes(entry[16..24].try_into().unwrap());
    entries.iter().map(packets).collect()
}

fn frame_to(to: Mac) -> Vec<u8> {
    let mut frame = frame::pattern(60, 60);
    frame[..6].copy_from_slice(&to.0);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame
}

#[test]
fn a_driver_receives_what_it_wants_and_the_rest_is_counted() {
    let _shared = beside_others();
    for format in FORMATS {
        let mut pair = connect(&wiring(format, 1));
        let mut tagged = frame_to(OWN);
        tagged[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
        let frames = [OWN, OTHER, GROUP, Mac::BROADCAST].map(frame_to);
        let all = [&frames[..], &[tagged.clone()]].concat();
        let wanted = |indexes: &[usize]| -> Vec<Vec<u8>> {
            indexes.iter().map(|&i| all[i].clone()).collect()
        };
        assert_eq!(send(&mut pair, &all), all, "before anything is said");
        ask(&pair, Command::Receive(ReceiveMode::Promiscuous, false));
        assert_eq!(send(&mut pair, &all), wanted(&[0, 1, 3]), "no address yet");
        ask(&pair, Command::SetMac(OWN));
        assert_eq!(send(&mut pair, &all), wanted(&[0, 3]));
        ask(&pair, Command::AddVlan(5));
        assert_eq!(send(&mut pair, &all), wanted(&[0, 3, 4]));
        ask(
            &pair,
            Command::MacTable {
                unicast: vec![OTHER],
                multicast: vec![GROUP],
            },
        );
        ask(&pair, Command::RemoveVlan(5));
        assert_eq!(send(&mut pair, &all), wanted(&[0, 1, 2, 3]));
        ask(&pair, Command::Receive(ReceiveMode::NoBroadcast, true));
        assert_eq!(send(&mut pair, &all), wanted(&[0, 1, 2]));
        ask(&pair, Command::Receive(ReceiveMode::Promiscuous, true));
        assert_eq!(send(&mut pair, &all), all);
        let counters = pair.device.counters();
        assert_eq!(offered(&counters), 7 * 5);
        assert_eq!(
            counters.tx_drops.of(DropReason::NotWanted),
            2 + 3 + 2 + 1 + 2
        );
        assert_eq!(counters.tx_drops.total(), 10);
    }
}

#[test]
fn a_device_has_the_address_that_its_driver_gives_it() {
    let _shared = beside_others();
    let (directory, control) = (TempDir::new(), Control::start("control").unwrap());
    let path = directory.join("port.sock");
    let mut options = VhostUserOptions::new(&path);
    options.mac = Some(OWN.0);
    let wiring = wiring(RingFormat::Split, 1);
    let mut pair = Pair {
        device: VhostUserPort::new(options, &control).unwrap(),
        driver: wiring.driver(&path, &control),
        control,
        directory,
    };
    pair.wait_until_running();
    let mac = |pair: &Pair| pair.device.status().unwrap().config.unwrap().mac;
    assert_eq!(mac(&pair), Some(OWN.0));
    // It is the address that is received without a word of the driver.
    ask(&pair, Command::Receive(ReceiveMode::Promiscuous, false));
    let frames = [OWN, OTHER].map(frame_to);
    assert_eq!(send(&mut pair, &frames), frames[..1]);
    ask(&pair, Command::SetMac(OTHER));
    assert_eq!(mac(&pair), Some(OTHER.0));
    assert_eq!(send(&mut pair, &frames), frames[1..]);
    // The next driver finds it as it was.
    pair.driver = wiring.driver(&path, &pair.control);
    pair.wait_until_running();
    assert_eq!(mac(&pair), Some(OWN.0));
}

#[test]
fn a_new_session_has_asked_for_nothing() {
    let _shared = beside_others();
    let wiring = wiring(RingFormat::Split, 1);
    let mut pair = connect(&wiring);
    ask(&pair, Command::Receive(ReceiveMode::NoUnicast, true));
    ask(&pair, Command::Receive(ReceiveMode::Promiscuous, false));
    assert!(send(&mut pair, &[frame_to(OWN)]).is_empty());
    pair.driver = wiring.driver(&pair.directory.join("port.sock"), &pair.control);
    pair.wait_until_running();
    assert_eq!(send(&mut pair, &[frame_to(OWN)]).len(), 1);
}

#[test]
fn an_answer_comes_back_on_the_pair_of_its_question() {
    let _shared = beside_others();
    for format in FORMATS {
        let mut pair = connect(&wiring(format, 4));
        let ports: Vec<u16> = (1000..1040).collect();
        let questions: Vec<_> = ports.iter().map(|&port| udp(port, 53_000)).collect();
        for question in &questions {
            // One flow at a time, so that the device's statistics tell the two directions of it.
            let before = packets_by_receiveq(&pair, 4);
            give(&mut pair.driver, std::slice::from_ref(question));
            let came = with(&mut pair.device, |device| breathe(device));
            assert_eq!(came.len(), 1);
            let came_by = transmitq_of(&pair);
            let port = u16::from_be_bytes([question[34], question[35]]);
            assert_eq!(send(&mut pair, &[udp(53_000, port)]).len(), 1);
            let after = packets_by_receiveq(&pair, 4);
            let went_to: Vec<usize> = (0..4).filter(|&i| after[i] > before[i]).collect();
            assert_eq!(went_to, [came_by], "port {port}");
        }
        let used = packets_by_receiveq(&pair, 4);
        assert!(used.iter().all(|&n| n > 0), "{used:?}");
    }
}

/// The queue pair by which the last packet came, by the device's statistics.
fn transmitq_of(pair: &Pair) -> usize {
    thread_local! {
        static SEEN: std::cell::RefCell<Vec<u64>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    let asked = (0..4).map(|pair| StatsAsked {
        queue: 2 * pair + 1,
        types: 1 << 16,
    });
    let answer = ask(pair, Command::Stats(asked.collect()));
    let (entries, _) = answer.as_chunks::<56>();
    let now: Vec<u64> = entries
        .iter()
        .map(|entry| u64::from_le_bytes(entry[16..24].try_into().unwrap()))
        .collect();
    SEEN.with_borrow_mut(|seen| {
        if seen.iter().sum::<u64>() >= now.iter().sum() {
            // Another pair of ports.
            seen.clear();
        }
        seen.resize(4, 0);
        let moved: Vec<usize> = (0..4).filter(|&i| now[i] > seen[i]).collect();
        *seen = now;
        assert_eq!(moved.len(), 1);
        moved[0]
    })
}

#[test]
fn the_number_of_pairs_changes_under_traffic_and_every_packet_is_accounted_for() {
    let _shared = beside_others();
    for format in FORMATS {
        let mut pair = connect(&wiring(format, 4));
        let frames: Vec<_> = (1..=500).map(|port| udp(port, 53_000)).collect();
        let mut arrived = 0;
        for n in [4, 1, 3, 2, 4, 1] {
            // In the middle of packets that the driver has not received yet.
            give(&mut pair.device, &frames[..64]);
            ask(&pair, Command::SetPairs(n));
            assert_eq!(pair.device.status().unwrap().sinks, usize::from(n));
            let before = packets_by_receiveq(&pair, 4);
            arrived += send(&mut pair, &frames).len();
            let after = packets_by_receiveq(&pair, 4);
            let used: BTreeSet<usize> = (0..4).filter(|&i| after[i] > before[i]).collect();
            assert_eq!(used, (0..usize::from(n)).collect(), "C9: none on another");
        }
        let (device, driver) = (pair.device.counters(), pair.driver.counters());
        assert_eq!(device.sent, driver.received);
        assert_eq!(arrived as u64, driver.received);
        assert_eq!(offered(&device), 6 * 564);
        assert_eq!(device.tx_drops.total(), 0);
    }
}

#[test]
fn packets_go_where_the_table_says() {
    let _shared = beside_others();
    for format in FORMATS {
        let mut pair = connect(&wiring(format, 4));
        let key: Vec<u8> = (1..=40).collect();
        let hasher = Hasher::new(HashTypes::SUPPORTED, &key);
        ask(
            &pair,
            Command::Rss(RssConfig {
                types: HashTypes::SUPPORTED,
                table: vec![3, 1],
                unclassified: 2,
                transmitqs: 4,
                key,
            }),
        );
        let mut frames: Vec<_> = (1..=200).map(|port| udp(port, 53_000)).collect();
        let odd = frames.iter().filter(|f| hasher.hash(f).value % 2 == 1);
        let odd = odd.count() as u64;
        assert!((50..150).contains(&odd));
        frames.extend((0..7).map(|_| {
            let mut arp = frame_to(Mac::BROADCAST);
            arp[12..14].copy_from_slice(&[8, 6]);
            arp
        }));
        assert_eq!(send(&mut pair, &frames).len(), 207);
        assert_eq!(packets_by_receiveq(&pair, 4), [0, odd, 7, 200 - odd]);
        // The last command counts: back to one pair, and steering by the device.
        ask(&pair, Command::SetPairs(1));
        assert_eq!(send(&mut pair, &frames).len(), 207);
        assert_eq!(packets_by_receiveq(&pair, 4), [207, odd, 7, 200 - odd]);
    }
}

#[test]
fn hashes_are_told_once_they_were_asked_for() {
    let _shared = beside_others();
    for format in FORMATS {
        let mut pair = connect(&Wiring {
            hash_report: true,
            ..wiring(format, 1)
        });
        let negotiated = Features::from_bits_retain(pair.driver.status().unwrap().negotiated);
        assert_eq!(negotiated.header_len(), 20);
        let frames: Vec<_> = (1..=40).map(|port| udp(port, 53_000)).collect();
        let key = vec![7; 40];
        let hasher = Hasher::new(HashTypes::UDPV4, &key);
        for is_asked in [false, true] {
            if is_asked {
                ask(&pair, Command::Hash(HashTypes::UDPV4, key.clone()));
            }
            give(&mut pair.device, &frames);
            let mut burst = Burst::new();
            pair.driver.attach();
            assert_eq!(pair.driver.rx(&mut burst), 40);
            for (i, frame) in frames.iter().enumerate() {
                let expected = hasher.hash(frame);
                assert_eq!((burst.hash(i) == expected, expected.report), (is_asked, 3));
                assert_eq!(burst.head(i), frame);
            }
            pair.driver.complete();
            pair.driver.detach();
            // The other way the room for a hash is there and says nothing.
            give(&mut pair.driver, &frames);
            let came = with(&mut pair.device, |device| breathe(device));
            assert_eq!(came, frames);
        }
    }
}

#[test]
fn offloads_can_be_switched_off_and_on() {
    let _shared = beside_others();
    let mut pair = connect(&wiring(RingFormat::Split, 1));
    let offloads = |pair: &mut Pair| with(&mut pair.device, |device| device.offloads());
    let all = offloads(&mut pair);
    assert!(all.contains(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6));
    ask(&pair, Command::SetOffloads(Features::GUEST_CSUM.bits()));
    assert_eq!(offloads(&mut pair), Offloads::CSUM);
    ask(&pair, Command::SetOffloads(0));
    assert_eq!(offloads(&mut pair), Offloads::NONE);
    let back = Features::GUEST_OFFLOADS
        & Features::from_bits_retain(pair.driver.status().unwrap().negotiated);
    ask(&pair, Command::SetOffloads(back.bits()));
    assert_eq!(offloads(&mut pair), all);
}

#[test]
fn what_cannot_be_asked_says_why() {
    let _shared = beside_others();
    let pair = Wiring::default().connect();
    let watch = pair.driver.watch();
    let error = watch.command(Command::SetMac(OWN)).unwrap_err();
    assert!(matches!(error, PortError::NoControlQueue { .. }), "{error}");
    assert!(error.to_string().contains("control=True"), "{error}");
    let pair = Wiring {
        without: Features::CTRL_VLAN,
        ..wiring(RingFormat::Split, 2)
    };
    let pair = connect(&pair);
    let watch = pair.driver.watch();
    let error = |command| watch.command(command).unwrap_err().to_string();
    assert!(error(Command::AddVlan(1)).contains("ctrl_vlan"));
    assert!(error(Command::SetPairs(0)).contains("1 to 2"));
    assert!(error(Command::SetPairs(3)).contains("1 to 2"));
    assert!(error(Command::SetMac(GROUP)).contains("refused"));
    let many = Command::MacTable {
        unicast: vec![OWN; 2000],
        multicast: Vec::new(),
    };
    assert!(error(many).contains("4096"));
    // And it goes on.
    ask(&pair, Command::SetPairs(1));
    assert_eq!(pair.driver.status().unwrap().queue_pairs, 1);
}

#[test]
fn a_back_end_without_a_control_queue_is_used_without_one() {
    let _shared = beside_others();
    let mut options = VhostUserOptions::new("unused");
    options.without = Features::CTRL_VQ;
    let offered = options.features();
    assert!(!offered.intersects(Features::CONTROLLED | Features::CTRL_VQ));
    let all = VhostUserOptions::new("unused").features();
    assert!(all.contains(Features::CTRL_VQ | Features::CTRL_RX) && !all.contains(Features::RSS));
}

/// How often the device has notified the driver of receiveq 0, or of what it sent.
fn calls(pair: &Pair, ring: usize) -> u64 {
    pair.device.watch().rings().unwrap()[ring].calls
}

/// Has the driver want to hear of the next buffer, and the device use `n` of its receive buffers.
fn receive_some(pair: &mut Pair, n: usize) {
    with(&mut pair.driver, |driver| driver.arm());
    let frames: Vec<_> = (0..n).map(|n| frame::pattern(60, n)).collect();
    with(&mut pair.device, |device| {
        assert_eq!(send_or_drop(device, &burst_of(&frames)), n);
        device.flush();
        device.complete();
    });
    let received = with(&mut pair.driver, |driver| breathe(driver));
    assert_eq!(received.len(), n);
}

const LONG: u32 = u32::MAX;

fn hold(max_packets: u32, max_usecs: u32) -> Coalescing {
    Coalescing {
        max_packets,
        max_usecs,
    }
}

#[test]
fn notifications_wait_for_as_many_packets_as_the_driver_has_said() {
    let _shared = beside_others();
    for format in FORMATS {
        let mut pair = connect(&wiring(format, 1));
        receive_some(&mut pair, 1);
        let before = calls(&pair, 0);
        receive_some(&mut pair, 1);
        assert_eq!(calls(&pair, 0), before + 1, "nothing is held back yet");
        ask(&pair, Command::CoalesceReceive(hold(10, LONG)));
        for _ in 0..3 {
            receive_some(&mut pair, 3);
            assert_eq!(calls(&pair, 0), before + 1);
        }
        receive_some(&mut pair, 1);
        assert_eq!(calls(&pair, 0), before + 2, "ten packets have passed");
        receive_some(&mut pair, 9);
        assert_eq!(calls(&pair, 0), before + 2);
        // Another rule for one queue: what is held back by the old one is told.
        ask(&pair, Command::CoalesceQueue(0, hold(2, LONG)));
        with(&mut pair.device, |_| ());
        assert_eq!(calls(&pair, 0), before + 3);
        let told = ask(&pair, Command::AskCoalescing(0));
        assert_eq!(told, [2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        receive_some(&mut pair, 1);
        assert_eq!(calls(&pair, 0), before + 3);
        receive_some(&mut pair, 1);
        assert_eq!(calls(&pair, 0), before + 4);
        // And none.
        ask(&pair, Command::CoalesceReceive(hold(0, 0)));
        receive_some(&mut pair, 1);
        assert_eq!(calls(&pair, 0), before + 5);
    }
}

#[test]
fn notifications_are_held_back_no_longer_than_the_driver_has_said() {
    let _shared = beside_others();
    for format in FORMATS {
        let mut pair = connect(&wiring(format, 1));
        receive_some(&mut pair, 1);
        ask(&pair, Command::CoalesceReceive(hold(1000, 20_000)));
        let before = calls(&pair, 0);
        receive_some(&mut pair, 1);
        let since = std::time::Instant::now();
        // Nothing comes any more: the port sleeps, and wakes up for this.
        pair.device.attach();
        assert!(!pair.device.arm(), "it can sleep");
        let (poller, mut events) = (Poller::new().unwrap(), Events::with_capacity(1));
        poller.add(pair.device.wait_fd().unwrap(), 0).unwrap();
        let woken = poller.wait(&mut events, Some(std::time::Duration::from_secs(20)));
        assert_eq!(woken.unwrap(), 1, "{format}");
        pair.device.disarm();
        pair.device.complete();
        assert!(since.elapsed().as_millis() >= 10, "not at once");
        // It is not woken again.
        assert!(!pair.device.arm());
        let woken = poller.wait(&mut events, Some(std::time::Duration::from_millis(50)));
        assert_eq!(woken.unwrap(), 0, "{format}");
        pair.device.disarm();
        pair.device.detach();
        assert_eq!(calls(&pair, 0), before + 1);
    }
}

#[test]
fn a_notification_that_is_held_back_is_not_lost_with_its_ring_or_its_memory() {
    let _shared = beside_others();
    let mut pair = connect(&wiring(RingFormat::Split, 1));
    receive_some(&mut pair, 1);
    ask(&pair, Command::CoalesceReceive(hold(1000, LONG)));
    ask(&pair, Command::CoalesceTransmit(hold(1000, LONG)));
    receive_some(&mut pair, 1);
    give(&mut pair.driver, &[frame::pattern(60, 1)]);
    with(&mut pair.device, |device| breathe(device));
    let status = pair.device.watch().rings().unwrap();
    let totals = pair.device.counters().notifications;
    assert_eq!(status[1].bursts, 1);
    drop(pair.driver);
    until("it has gone", || {
        pair.device.status().unwrap().state == "listening"
    });
    assert_eq!(pair.device.counters().notifications, totals + 2);
}
