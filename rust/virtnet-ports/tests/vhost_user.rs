//! The vhost-user port against the virtio-user port, over real sockets in one process.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use support::{
    PATIENCE, Pair, Wiring, alone, beside_others, breathe, burst_of, offered, open_things,
    send_or_drop, until,
};
use virtnet_packet::{BURST_MAX, DropReason, Port};
use virtnet_ports::{Control, VhostUserOptions, VhostUserPort};
use virtnet_sys::{Events, Poller};
use virtnet_testkit::frame::{self, Endpoint};
use virtnet_testkit::{Limits, TempDir, check_port_with, receive, send};
use virtnet_virtio::net::BufferArea;
use virtnet_virtio::{Features, RingFormat};

const FORMATS: [RingFormat; 2] = [RingFormat::Split, RingFormat::Packed];

/// The longest frame of which a burst fits into rings of this size.
fn limits(wiring: &Wiring) -> Limits {
    let buffers = usize::from(wiring.queue_size) / 8;
    let buffers = if wiring.without.contains(Features::MRG_RXBUF) {
        1
    } else {
        buffers
    };
    Limits {
        max_len: (buffers * BufferArea::FRAME_ROOM as usize).min(65_535),
        ..Limits::default()
    }
}

#[test]
fn both_ports_keep_the_promises_of_a_port_whatever_was_negotiated() {
    let _gate = beside_others();
    for format in FORMATS {
        for without in [
            Features::empty(),
            Features::IN_ORDER,
            Features::MRG_RXBUF,
            Features::EVENT_IDX,
            Features::IN_ORDER | Features::MRG_RXBUF | Features::EVENT_IDX,
        ] {
            for queue_size in [64, 256, 1024, 4096] {
                let wiring = Wiring {
                    format,
                    queue_size,
                    without,
                    swapped: queue_size == 256,
                    ..Wiring::default()
                };
                let mut pair = wiring.connect();
                let status = pair.device.status().unwrap();
                let negotiated = Features::from_bits_retain(status.negotiated);
                assert_eq!(negotiated & without, Features::empty());
                assert_eq!(status.ring_format, Some(format.name()));
                check_port_with(&mut pair.device, &mut pair.driver, limits(&wiring));
            }
        }
    }
}

#[test]
fn odd_sizes_of_packed_rings_work_too() {
    let _gate = beside_others();
    for queue_size in [65, 99, 1000] {
        let wiring = Wiring {
            format: RingFormat::Packed,
            queue_size,
            ..Wiring::default()
        };
        let mut pair = wiring.connect();
        check_port_with(&mut pair.device, &mut pair.driver, limits(&wiring));
    }
}

/// Frames of many flows, each numbered within its flow.
fn flows(flows: u8, each: u32) -> Vec<Vec<u8>> {
    let to = Endpoint::number(200);
    (0..each)
        .flat_map(|number| (0..flows).map(move |flow| (flow, number)))
        .map(|(flow, number)| {
            let mut payload = vec![flow; 40 + usize::from(flow)];
            payload[..4].copy_from_slice(&number.to_be_bytes());
            Endpoint::number(flow).udp(&to, &payload)
        })
        .collect()
}

/// By flow, the numbers of its frames in the order of their arrival.
fn by_flow(frames: &[Vec<u8>]) -> BTreeMap<u8, Vec<u32>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for frame in frames {
        let payload = &frame[42..];
        let number = u32::from_be_bytes(payload[..4].try_into().unwrap());
        flows.entry(payload[4]).or_default().push(number);
    }
    flows
}

#[test]
fn four_queue_pairs_carry_every_frame_and_keep_the_order_of_a_flow() {
    let _gate = beside_others();
    for format in FORMATS {
        for queue_size in [64, 1024] {
            let wiring = Wiring {
                format,
                queue_pairs: 4,
                queue_size,
                ..Wiring::default()
            };
            let mut pair = wiring.connect();
            assert_eq!(pair.device.status().unwrap().sources, 4);
            assert_eq!(pair.driver.status().unwrap().queue_pairs, 4);
            pair.device.attach();
            pair.driver.attach();
            let frames = flows(16, 60);
            assert_spread(&mut pair.device, &mut pair.driver, &frames);
            assert_spread(&mut pair.driver, &mut pair.device, &frames);
        }
    }
}

fn assert_spread(from: &mut dyn Port, to: &mut dyn Port, frames: &[Vec<u8>]) {
    let mut arrived = Vec::new();
    for some in frames.chunks(BURST_MAX / 2) {
        assert_eq!(send(from, some), some.len());
        arrived.extend(receive(from, to, some.len()));
    }
    assert_eq!(arrived.len(), frames.len());
    assert_eq!(from.counters().tx_drops.total(), 0);
    assert_eq!(by_flow(&arrived), by_flow(frames));
}

#[test]
fn without_mergeable_buffers_long_frames_pass_one_way_and_are_counted_the_other() {
    let _gate = beside_others();
    for format in FORMATS {
        let wiring = Wiring {
            format,
            without: Features::MRG_RXBUF,
            ..Wiring::default()
        };
        let mut pair = wiring.connect();
        let Pair { device, driver, .. } = &mut pair;
        device.attach();
        driver.attach();
        let fits = frame::pattern(BufferArea::FRAME_ROOM as usize, 1);
        let long = [frame::pattern(9014, 2), fits.clone()];
        assert_eq!(send(driver, &long), 2);
        assert!(receive(driver, device, 2) == long);
        assert_eq!(send(device, &long), 2);
        assert!(receive(device, driver, 1) == [fits]);
        let counters = device.counters();
        assert_eq!(counters.sent, 1);
        assert_eq!(counters.tx_drops.of(DropReason::TooBig), 1);
    }
}

#[test]
fn a_port_that_nobody_is_connected_to_drops_and_counts() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let wiring = Wiring::default();
    let burst = burst_of(&[frame::pattern(60, 0)]);
    let check = |port: &mut dyn Port| {
        port.attach();
        assert_eq!(send_or_drop(port, &burst), 0);
        assert_eq!(breathe(port), [[0_u8; 0]; 0]);
        assert!(!port.arm(), "there is nothing to wait for");
        assert_eq!(port.counters().tx_drops.of(DropReason::PortDown), 1);
    };
    check(&mut wiring.device(&directory.join("a.sock"), &control));
    check(&mut wiring.driver(&directory.join("b.sock"), &control));
}

/// Waits until a port's descriptor is readable.
#[track_caller]
fn assert_wakes(poller: &Poller, what: &str) {
    let woken = poller.wait(&mut Events::with_capacity(1), Some(PATIENCE));
    assert_eq!(woken.unwrap(), 1, "{what} wakes nobody");
}

/// Asks to be woken, taking over whatever changes first.
#[track_caller]
fn arm(port: &mut dyn Port) {
    until("the port can be armed", || {
        port.sync();
        !port.arm()
    });
}

#[test]
fn a_sleeping_port_is_woken_by_packets_and_by_changes_of_its_session() {
    let _gate = beside_others();
    for format in FORMATS {
        let wiring = Wiring {
            format,
            ..Wiring::default()
        };
        let Pair {
            mut device,
            mut driver,
            control,
            directory,
        } = wiring.connect();
        device.attach();
        driver.attach();
        let (at_device, at_driver) = (Poller::new().unwrap(), Poller::new().unwrap());
        at_device.add(device.wait_fd().unwrap(), 0).unwrap();
        at_driver.add(driver.wait_fd().unwrap(), 0).unwrap();
        let frames = [frame::pattern(100, 1)];

        for _ in 0..3 {
            arm(&mut device);
            assert_eq!(send(&mut driver, &frames), 1);
            assert_wakes(&at_device, "a kick");
            device.disarm();
            assert!(receive(&mut driver, &mut device, 1) == frames);

            arm(&mut driver);
            assert_eq!(send(&mut device, &frames), 1);
            assert_wakes(&at_driver, "a call");
            driver.disarm();
            assert!(receive(&mut device, &mut driver, 1) == frames);
        }

        // The driver leaves while the device sleeps, and comes back.
        arm(&mut device);
        drop(driver);
        assert_wakes(&at_device, "the end of a session");
        assert!(device.sync(), "the end of a session is a change");
        assert_eq!(send_or_drop(&mut device, &burst_of(&frames)), 0);
        arm(&mut device);
        let mut driver = wiring.driver(&directory.join("port.sock"), &control);
        assert_wakes(&at_device, "the beginning of a session");
        driver.attach();
        until("packets flow again", || {
            device.sync();
            driver.sync();
            send_or_drop(&mut driver, &burst_of(&frames));
            driver.flush();
            !breathe(&mut device).is_empty()
        });

        // And the same the other way round.
        arm(&mut driver);
        let at_driver = Poller::new().unwrap();
        at_driver.add(driver.wait_fd().unwrap(), 0).unwrap();
        drop(device);
        assert_wakes(&at_driver, "the end of a session");
        assert!(driver.sync(), "the end of a session is a change");
    }
}

/// What has passed one way, over all lives of the ports at both ends.
#[derive(Debug, Default)]
struct Passed {
    offered: u64,
    sent: u64,
    received: u64,
}

/// Offers a few frames each way and takes what has arrived.
fn pump(from: &mut dyn Port, to: &mut dyn Port, passed: &mut Passed) -> u64 {
    let frames: Vec<_> = (0..8).map(|n| frame::pattern(60 + 300 * n, n)).collect();
    from.sync();
    send_or_drop(from, &burst_of(&frames));
    from.flush();
    passed.offered += frames.len() as u64;
    let arrived = breathe(to).len() as u64;
    passed.received += arrived;
    arrived
}

#[test]
fn te8_traffic_resumes_whichever_side_is_made_anew_and_nothing_is_left_behind() {
    let _gate = alone();
    for format in FORMATS {
        for swapped in [false, true] {
            let wiring = Wiring {
                format,
                swapped,
                ..Wiring::default()
            };
            let Pair {
                mut device,
                mut driver,
                control,
                directory,
            } = wiring.connect();
            let path = directory.join("port.sock");
            device.attach();
            driver.attach();
            let (mut down, mut up) = (Passed::default(), Passed::default());
            let mut open = None;
            for round in 0..20 {
                let start = Instant::now();
                let (mut downwards, mut upwards) = (0, 0);
                while downwards < 100 || upwards < 100 {
                    downwards += pump(&mut device, &mut driver, &mut down);
                    upwards += pump(&mut driver, &mut device, &mut up);
                    assert!(start.elapsed() < PATIENCE, "no traffic in round {round}");
                    if downwards == 0 || upwards == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                let (fds, maps) = open_things();
                let (fds_before, maps_before) = *open.get_or_insert((fds, maps));
                assert_eq!(fds, fds_before, "descriptors in round {round}");
                assert_eq!(maps, maps_before, "mappings in round {round}");
                if round % 2 == 0 {
                    let counters = device.counters();
                    assert_eq!(counters.rx_drops.total(), 0);
                    down.sent += counters.sent;
                    drop(device);
                    // The driver goes on for a while, into the void.
                    pump_alone(&mut driver, &mut up, &mut down);
                    device = wiring.device(&path, &control);
                    device.attach();
                } else {
                    let counters = driver.counters();
                    assert_eq!(counters.rx_drops.total(), 0);
                    up.sent += counters.sent;
                    drop(driver);
                    pump_alone(&mut device, &mut down, &mut up);
                    driver = wiring.driver(&path, &control);
                    driver.attach();
                }
            }
            down.sent += device.counters().sent;
            up.sent += driver.counters().sent;
            for passed in [down, up] {
                // At most a ring full of frames is lost with every session.
                let lost = passed.sent - passed.received;
                assert!(lost <= 21 * u64::from(wiring.queue_size), "{passed:?}");
                assert!(passed.sent <= passed.offered, "{passed:?}");
            }
        }
    }
}

/// One port goes on while the other is away: it loses nothing from its counters.
fn pump_alone(port: &mut dyn Port, out: &mut Passed, back: &mut Passed) {
    let before = port.counters();
    let start = out.offered;
    for _ in 0..50 {
        let mut nobody = virtnet_packet::memory_pair(1).0;
        pump(port, &mut nobody, out);
        back.received += breathe(port).len() as u64;
        std::thread::sleep(Duration::from_micros(200));
    }
    let after = port.counters();
    assert_eq!(offered(&after) - offered(&before), out.offered - start);
}

#[test]
fn te13_te14_sockets_in_the_way_are_replaced_only_if_they_are_dead() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let wiring = Wiring::default();
    let path = directory.join("port.sock");
    let refused = |path: &std::path::Path| {
        let options = VhostUserOptions::new(path);
        let error = VhostUserPort::new(options, &control)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
        error
    };

    // Alive: it stays with its owner, who still can be connected to.
    let first = wiring.device(&path, &control);
    let error = refused(&path);
    assert!(
        error.contains("in use") || error.contains("listens"),
        "{error}"
    );
    let driver = wiring.driver(&path, &control);
    until("the first owner is served", || {
        driver.status().unwrap().state == "running"
    });
    drop((first, driver));
    assert!(!path.exists(), "a socket goes with its port");

    // Dead: left behind by a process that is gone.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let second = wiring.device(&path, &control);
    let driver = wiring.driver(&path, &control);
    until("the second owner is served", || {
        driver.status().unwrap().state == "running"
    });
    drop((second, driver));

    // Something else: nobody's to remove.
    std::fs::write(&path, "precious").unwrap();
    let error = refused(&path);
    assert!(error.contains("regular file"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let link = directory.join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    refused(&link);
    assert!(link.is_symlink());
    let nowhere = directory.join("nowhere");
    let options = VhostUserOptions::new(nowhere.join("port.sock"));
    let error = VhostUserPort::new(options, &control).unwrap_err();
    assert!(
        error.to_string().contains(&*nowhere.to_string_lossy()),
        "{error}"
    );
    refused(&directory.join(&"long".repeat(40)));
}

#[test]
fn ports_of_several_networks_share_nothing() {
    let _gate = beside_others();
    let mut pairs: Vec<_> = (0..10)
        .map(|n| {
            Wiring {
                format: FORMATS[n % 2],
                swapped: n % 3 == 0,
                queue_size: 64,
                ..Wiring::default()
            }
            .connect()
        })
        .collect();
    for pair in &mut pairs {
        pair.device.attach();
        pair.driver.attach();
    }
    for (n, pair) in pairs.iter_mut().enumerate() {
        let frames = [frame::pattern(100, n)];
        assert_eq!(send(&mut pair.device, &frames), 1);
    }
    drop(pairs.remove(0));
    for (n, pair) in (1..).zip(&mut pairs) {
        let Pair { device, driver, .. } = pair;
        assert!(receive(device, driver, 1) == [frame::pattern(100, n)]);
    }
}

#[test]
fn everything_goes_with_a_pair_of_ports() {
    let _gate = alone();
    let wiring = Wiring {
        queue_pairs: 4,
        ..Wiring::default()
    };
    drop(wiring.connect());
    let before = open_things();
    for _ in 0..5 {
        let mut pair = wiring.connect();
        pair.device.attach();
        pair.driver.attach();
        let frames = [frame::pattern(100, 1)];
        assert_eq!(send(&mut pair.driver, &frames), 1);
        let Pair { device, driver, .. } = &mut pair;
        assert!(receive(driver, device, 1) == frames);
    }
    until("everything has gone", || open_things() == before);
}
