//! The vhost-user port against front-ends that lie, and against drivers that break their rings.
//!
//! The port is with a worker that sends back what it receives. Whatever is done to it, the worker neither panics nor spins, the
//! other rings and ports go on, and the port can be used again afterwards.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use support::host::{FORMATS, Honest, Host, SIZE};
use support::{Echo, Wiring, alone, beside_others, offered, open_things, until};
use virtnet_packet::Port;
use virtnet_ports::Control;
use virtnet_sys::{EventFd, Stream, memfd};
use virtnet_testkit::{Attack, Expect, FakeVm, FrontEnd, SplitQueue, TempDir, frame, is_signalled};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{
    MemoryRegion, MemoryTable, SingleRegion, VringAddresses, VringFd, VringState,
};
use virtnet_virtio::Features;

fn table(regions: &[MemoryRegion]) -> Request {
    Request::SetMemTable(MemoryTable(regions.to_vec()))
}

/// The one region of a machine.
fn region_of(machine: &FakeVm) -> (MemoryRegion, OwnedFd) {
    match machine.memory_table() {
        (Request::SetMemTable(MemoryTable(regions)), mut files) => {
            (regions[0], files.pop().unwrap())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn tb16_tb37_tb46_memory_that_is_not_what_it_is_said_to_be_is_refused() {
    let _gate = beside_others();
    let host = Host::new(1);
    let mut machine = host.running(Features::empty(), 1);
    let (region, file) = region_of(&machine);
    let short = memfd::create("virtnet-test", region.size - 4096, false).unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (socket, _other) = Stream::pair().unwrap();
    let read_only = File::open(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&file)
    ))
    .unwrap();
    let elsewhere = MemoryRegion {
        guest_addr: 1 << 50,
        user_addr: 1 << 45,
        ..region
    };
    let pebibyte = memfd::create("virtnet-test", 1 << 50, false).unwrap();
    let cases: Vec<(&str, MemoryRegion, OwnedFd)> = vec![
        ("a shorter file", region, short.try_clone().unwrap()),
        (
            "an offset beyond the end",
            MemoryRegion {
                mmap_offset: 1 << 30,
                ..region
            },
            file.try_clone().unwrap(),
        ),
        (
            "one page too many",
            MemoryRegion {
                mmap_offset: 4096,
                ..region
            },
            file.try_clone().unwrap(),
        ),
        (
            "a wrapping offset",
            MemoryRegion {
                mmap_offset: u64::MAX - 4095,
                ..region
            },
            file.try_clone().unwrap(),
        ),
        (
            "no size",
            MemoryRegion { size: 0, ..region },
            file.try_clone().unwrap(),
        ),
        ("a pipe", region, pipe.into()),
        ("a socket", region, socket.into()),
        ("a directory", region, File::open("/").unwrap().into()),
        ("a device", region, File::open("/dev/zero").unwrap().into()),
        ("an event", region, EventFd::new().unwrap().into()),
        ("what cannot be written", region, read_only.into()),
        (
            "a pebibyte",
            MemoryRegion {
                size: 1 << 50,
                user_addr: 0,
                guest_addr: 0,
                ..region
            },
            pebibyte,
        ),
    ];
    for (name, wrong, fd) in &cases {
        let done = machine.front_end.accepts(&table(&[*wrong]), &[fd.as_fd()]);
        assert!(!done, "{name}");
        // Beside a region that is right it does not help either.
        let both = [elsewhere, *wrong];
        let fds = [file.as_fd(), fd.as_fd()];
        let disjoint = wrong.size != 1 << 50;
        if disjoint {
            assert!(!machine.front_end.accepts(&table(&both), &fds), "{name}");
        }
        machine.echo_some(0);
    }
    let error = host.status().last_error.unwrap();
    assert!(error.contains("SET_MEM_TABLE"), "{error}");
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn tb24_tb29_rings_in_impossible_places_are_refused_and_start_when_told_right() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new(2);
        let mut machine = host.running(format, 1);
        let (region, _) = region_of(&machine);
        let end = region.user_addr + region.size;
        let right = VringAddresses {
            index: 3,
            ..machine.addresses(1)
        };
        let wrong = [
            (
                "misaligned table",
                VringAddresses {
                    desc: right.desc + 8,
                    ..right
                },
            ),
            (
                "misaligned driver area",
                VringAddresses {
                    avail: right.avail + 1,
                    ..right
                },
            ),
            (
                "misaligned device area",
                VringAddresses {
                    used: right.used + 2,
                    ..right
                },
            ),
            ("nowhere", VringAddresses { desc: 0, ..right }),
            (
                "guest address",
                VringAddresses {
                    desc: region.guest_addr,
                    ..right
                },
            ),
            ("behind the end", VringAddresses { used: end, ..right }),
            (
                "over the end",
                VringAddresses {
                    desc: end - 16,
                    ..right
                },
            ),
            (
                "wraps",
                VringAddresses {
                    desc: u64::MAX - 15,
                    ..right
                },
            ),
        ];
        let front_end = &machine.front_end;
        let state = |num| VringState { index: 3, num };
        for (name, addresses) in wrong {
            front_end.insist(&Request::SetVringNum(state(64)), &[]);
            // Noticed at once or when the ring is to start, and never later.
            let placed = front_end.accepts(&Request::SetVringAddr(addresses), &[]);
            if !placed {
                continue;
            }
            let kick = Request::SetVringKick(VringFd::new(3, false));
            assert!(!front_end.accepts(&kick, &[]), "{name}");
        }
        // Rings that no device has: this one has two pairs and a control queue.
        for index in [5, 255, 256, 1 << 16, u32::MAX] {
            let state = VringState { index, num: 64 };
            assert!(!front_end.accepts(&Request::SetVringNum(state), &[]));
            let request = Request::SetVringAddr(VringAddresses { index, ..right });
            assert!(!front_end.accepts(&request, &[]));
        }
        machine.echo_some(0);
        assert_eq!(host.status().sources, 1);
        drop(machine);
        host.assert_unharmed();
    }
}

#[test]
fn tb27_what_shapes_a_ring_cannot_change_while_it_runs() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new(1);
        let mut machine = host.running(format, 1);
        for index in [0, 1] {
            for num in [1, 32, 64, 128, 32_768] {
                let state = VringState { index, num };
                let front_end = &machine.front_end;
                assert!(!front_end.accepts(&Request::SetVringNum(state), &[]));
                assert!(!front_end.accepts(&Request::SetVringBase(state), &[]));
                let other = machine.features ^ Features::RING_PACKED;
                let features = (other | Features::PROTOCOL_FEATURES).bits();
                assert!(!front_end.accepts(&Request::SetFeatures(features), &[]));
                machine.echo_some(0);
            }
        }
        drop(machine);
        host.assert_unharmed();
    }
}

#[test]
fn tb41_a_memory_table_that_changes_under_traffic_loses_nothing() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new(2);
        let mut machine = host.running(format, 2);
        let (region, file) = region_of(&machine);
        let more = MemoryRegion {
            guest_addr: 1 << 50,
            user_addr: 1 << 45,
            ..region
        };
        let other_file = memfd::create("virtnet-test", region.size, false).unwrap();
        for round in 0..100 {
            // Frames are under way, in both pairs, when the table changes.
            for pair in [0, 1] {
                let room = machine.rings[2 * pair].queue.outstanding();
                machine.make_room(pair, 8_usize.saturating_sub(room), 2048);
            }
            for pair in [0, 1] {
                machine.transmit(pair, &frame::pattern(200, 2 * round));
                machine.transmit(pair, &frame::pattern(200, 2 * round + 1));
            }
            let fds = [file.as_fd(), other_file.as_fd()];
            match round % 4 {
                0 => machine.front_end.insist(&table(&[region, more]), &fds),
                1 => machine.front_end.insist(&table(&[region]), &fds[..1]),
                2 => {
                    let slot = Request::AddMemReg(SingleRegion(more));
                    machine.front_end.insist(&slot, &fds[1..]);
                }
                _ => {
                    let slot = Request::RemMemReg(SingleRegion(more));
                    machine.front_end.insist(&slot, &[]);
                }
            }
            // Frames may leave by either pair: the host spreads flows over both.
            let mut back = Vec::new();
            let mut taken = 0;
            until("four frames come back", || {
                for pair in [0, 1] {
                    taken += machine.transmitted(pair);
                    back.extend(machine.received(pair));
                }
                (back.len(), taken) == (4, 4)
            });
            back.sort();
            let mut sent: Vec<_> = [0, 0, 1, 1]
                .map(|n| frame::pattern(200, 2 * round + n))
                .into();
            sent.sort();
            assert!(back == sent, "round {round}");
        }
        drop(machine);
        host.assert_unharmed();
    }
}

#[test]
fn tb30_a_ring_whose_memory_goes_stops_and_says_so() {
    let _gate = beside_others();
    for format in FORMATS {
        for slots in [false, true] {
            let host = Host::new(1);
            let mut machine = host.running(format, 1);
            let (region, file) = region_of(&machine);
            let elsewhere = MemoryRegion {
                guest_addr: 1 << 50,
                user_addr: 1 << 45,
                ..region
            };
            if slots {
                let gone = Request::RemMemReg(SingleRegion(region));
                machine.front_end.insist(&gone, &[]);
            } else {
                let gone = table(&[elsewhere]);
                machine.front_end.insist(&gone, &[file.as_fd()]);
            }
            for ring in [0, 1] {
                assert!(machine.is_told_of_error(ring), "ring {ring}");
            }
            let status = host.status();
            assert_eq!((status.sources, status.sinks), (0, 0));
            // It says where it had come to, and goes on there once the memory is back.
            let bases = [0, 1].map(|ring| machine.front_end.stop_ring(ring));
            machine.front_end.insist(&table(&[region]), &[file.as_fd()]);
            for ring in [0, 1] {
                machine.start_ring_at(ring, SIZE, bases[ring]);
            }
            machine.echo_some(0);
            drop(machine);
            host.assert_unharmed();
        }
    }
}

#[test]
fn ta1_a_ring_that_its_driver_breaks_stops_alone() {
    let _gate = beside_others();
    // A transmitq and a receiveq of the first pair; the second pair goes on.
    for broken in [1, 0] {
        let host = Host::new(2);
        let mut machine = host.running(Features::empty(), 2);
        let FakeVm { rings, guest, .. } = &mut machine;
        let ring = &mut rings[broken];
        let expected = ring.queue.attack(guest, Attack::IndexJump, broken == 0);
        assert_eq!(expected, Some(Expect::Stopped));
        ring.kick.signal().unwrap();
        if broken == 0 {
            provoke(&mut machine);
        }
        assert!(machine.is_told_of_error(broken));
        until("the ring has stopped", || {
            let status = host.status();
            let expected = if broken == 1 { (1, 2) } else { (2, 1) };
            (status.sources, status.sinks) == expected
        });
        let error = host.status().last_error.unwrap();
        assert!(error.contains(&format!("ring {broken}")), "{error}");
        host.echo.assert_falls_asleep();

        // Frames go out by the pair that is whole, and come back by whichever receiveq there is.
        let sent = frame::pattern(100, 77);
        for pair in [0, 1] {
            if 2 * pair != broken {
                machine.make_room(pair, 4, 2048);
            }
        }
        machine.transmit(1, &sent);
        let mut back = Vec::new();
        until("the frame comes back", || {
            for pair in (0..2).filter(|pair| 2 * pair != broken) {
                back.extend(machine.received(pair));
            }
            back.contains(&sent)
        });
        drop(machine);
        host.assert_unharmed();
    }
}

/// Sends by the first pair, by which it comes back: a receiveq is looked at when it is needed.
fn provoke(machine: &mut FakeVm) {
    machine.transmit(0, &frame::pattern(100, 1));
}

#[test]
fn every_attack_on_a_ring_leaves_the_worker_the_other_ring_and_the_port_unharmed() {
    let _gate = beside_others();
    for format in FORMATS {
        for &attack in Attack::ALL {
            for broken in [1, 0] {
                let host = Host::new(1);
                let mut machine = host.running(format | Features::INDIRECT_DESC, 1);
                let FakeVm { rings, guest, .. } = &mut machine;
                let ring = &mut rings[broken];
                let Some(expected) = ring.queue.attack(guest, attack, broken == 0) else {
                    continue;
                };
                ring.kick.signal().unwrap();
                // Something to do for the receiveq, or something after the attack.
                if broken == 0 || expected != Expect::Stopped && ring.queue.free() > 0 {
                    machine.transmit(0, &frame::pattern(100, 1));
                }
                if expected == Expect::Stopped {
                    let told = is_signalled(&machine.rings[broken].err);
                    assert!(told, "{attack:?} on ring {broken}: nobody was told");
                }
                host.echo.assert_falls_asleep();
                // Memory is as it should be outside of what was lent.
                machine.guest.check();
                drop(machine);
                drop(host.running(format, 1));
                drop(host.echo.stop());
            }
        }
    }
}

#[test]
fn a_broken_ring_is_cured_by_stopping_and_starting_it() {
    let _gate = beside_others();
    let host = Host::new(1);
    let mut machine = host.running(Features::empty(), 1);
    let FakeVm { rings, guest, .. } = &mut machine;
    rings[1].queue.attack(guest, Attack::IndexJump, false);
    rings[1].kick.signal().unwrap();
    assert!(machine.is_told_of_error(1));
    machine.front_end.stop_ring(1);
    // The driver begins anew, with a ring of its own.
    let features = machine.features;
    machine.rings[1].queue = Box::new(SplitQueue::new(&mut machine.guest, SIZE, features));
    machine.start_ring(1);
    machine.echo_some(0);
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn ta1_where_the_status_is_negotiated_it_asks_for_a_reset_which_cures() {
    let _gate = beside_others();
    let host = Host::new(1);
    let mut machine = host.machine(Features::empty(), 1);
    let status = |machine: &FakeVm| {
        let answer = machine.front_end.ask(&Request::GetStatus, &[]);
        u64::from_ne_bytes(answer.try_into().unwrap())
    };
    machine.agree();
    let protocol = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::STATUS;
    let protocol = Request::SetProtocolFeatures(protocol.bits());
    machine.front_end.insist(&protocol, &[]);
    for broken in [true, false] {
        machine.front_end.insist(&Request::SetStatus(15), &[]);
        machine.tell_memory();
        (0..2).for_each(|ring| machine.start_ring(ring));
        machine.echo_some(0);
        assert_eq!(status(&machine), 15);
        if broken {
            let FakeVm { rings, guest, .. } = &mut machine;
            rings[1].queue.attack(guest, Attack::IndexJump, false);
            rings[1].kick.signal().unwrap();
            assert!(machine.is_told_of_error(1));
            assert_eq!(status(&machine), 15 | 64, "the device asks for a reset");
            machine.front_end.insist(&Request::SetStatus(0), &[]);
            assert_eq!(status(&machine), 0);
            let host_status = host.status();
            assert_eq!((host_status.sources, host_status.sinks), (0, 0));
            // The driver lays out its rings anew.
            let (features, guest) = (machine.features, &mut machine.guest);
            for ring in &mut machine.rings {
                ring.queue = Box::new(SplitQueue::new(guest, SIZE, features));
            }
        }
    }
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn te7_a_front_end_that_closes_in_the_middle_of_anything_is_forgotten() {
    let _gate = beside_others();
    let host = Host::new(1);
    let (request, _) = host.machine(Features::empty(), 1).memory_table();
    let mut bytes = Vec::new();
    request.encode(true, &mut bytes);
    let file = memfd::create("virtnet-test", 1 << 20, false).unwrap();
    for cut in 0..bytes.len() {
        let front_end = host.front_end();
        front_end.send_bytes(&bytes[..cut], &[file.as_fd()][..usize::from(cut > 0)]);
    }
    // And in the middle of traffic, with frames on their way.
    for format in FORMATS {
        for n in 0..10 {
            let mut machine = host.running(format, 1);
            machine.make_room(0, n, 2048);
            (0..n).for_each(|n| machine.transmit(0, &frame::pattern(100, n)));
            drop(machine);
        }
    }
    host.assert_unharmed();
}

#[test]
fn tb91_a_second_front_end_waits_until_the_first_has_left() {
    let _gate = beside_others();
    let host = Host::new(1);
    let mut first = host.running(Features::empty(), 1);
    let mut second = host.machine(Features::RING_PACKED, 1);
    second.front_end.tell(&Request::SetOwner, &[]);
    for _ in 0..5 {
        first.echo_some(0);
    }
    assert_eq!(host.status().sessions, 1);
    drop(first);
    second.start();
    second.echo_some(0);
    assert_eq!(host.status().sessions, 2);
    drop(second);
    host.assert_unharmed();
}

#[test]
fn tb90_front_ends_that_come_and_go_leave_nothing() {
    let _gate = alone();
    let host = Host::new(1);
    drop(host.running(Features::empty(), 1));
    until("nobody is there", || host.status().state == "listening");
    // The worker lets go of the machine's memory a moment after it has left.
    host.echo.assert_falls_asleep();
    let before = open_things();
    for n in 0..200 {
        let front_end = host.front_end();
        if n % 3 == 0 {
            front_end.ask(&Request::GetFeatures, &[]);
        }
    }
    for format in FORMATS {
        for _ in 0..10 {
            drop(host.running(format, 1));
        }
    }
    until("everybody has left", || {
        host.status().state == "listening" && open_things() == before
    });
    host.assert_unharmed();
}

#[test]
fn tb4_tb6_nonsense_ends_the_session_and_the_next_one_is_served() {
    let _gate = beside_others();
    let host = Host::new(1);
    let header = |code: u32, flags: u32, size: u32| {
        let words = [code, flags, size].map(u32::to_ne_bytes);
        words.concat()
    };
    for bytes in [
        header(1, 5, 0),
        header(1, 2, 0),
        header(1, 1, u32::MAX),
        header(1, 1, 4097),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 64],
    ] {
        let machine = host.running(Features::empty(), 1);
        machine.front_end.send_bytes(&bytes, &[]);
        assert!(machine.front_end.is_hung_up(), "{bytes:x?}");
        until("the port listens again", || {
            host.status().state == "listening"
        });
        assert!(host.status().last_error.is_some());
    }
    host.assert_unharmed();
}

#[test]
fn o3_events_that_are_always_ready_do_not_make_the_worker_spin() {
    let _gate = beside_others();
    let host = Host::new(1);
    let mut machine = host.running(Features::empty(), 1);
    // A pipe whose other end is closed is readable for ever, and has nothing to read.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(writer);
    let request = Request::SetVringKick(FakeVm::word(1));
    machine.front_end.insist(&request, &[reader.as_fd()]);
    host.echo.assert_falls_asleep();
    // The writing end of a pipe that nobody reads.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    machine.front_end.insist(&request, &[writer.as_fd()]);
    host.echo.assert_falls_asleep();
    // With a kick that works the ring works.
    let kick = machine.rings[1].kick.try_clone().unwrap();
    machine.front_end.insist(&request, &[kick.as_fd()]);
    machine.echo_some(0);
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn tb17_one_event_as_kick_and_call_does_not_make_the_worker_spin() {
    let _gate = beside_others();
    let host = Host::new(1);
    let mut machine = host.running(Features::empty(), 1);
    let shared = EventFd::new().unwrap();
    for ring in [0, 1] {
        let word = FakeVm::word(ring);
        for request in [Request::SetVringKick(word), Request::SetVringCall(word)] {
            machine.front_end.insist(&request, &[shared.as_fd()]);
        }
    }
    host.echo.assert_falls_asleep();
    machine.make_room(0, 4, 2048);
    machine.transmit(0, &frame::pattern(100, 1));
    shared.signal().unwrap();
    until("the frame comes back", || !machine.received(0).is_empty());
    host.echo.assert_falls_asleep();
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn tb33_a_ring_stopped_under_traffic_goes_on_where_it_stopped() {
    let _gate = beside_others();
    for format in FORMATS {
        for stopped in [1, 0] {
            let host = Host::new(1);
            let mut machine = host.running(format, 1);
            let (mut sent, mut back) = (Vec::new(), Vec::new());
            for round in 0..60 {
                for n in 0..5 {
                    let frame = frame::pattern(90, 10 * round + n);
                    let room = machine.rings[0].queue.outstanding();
                    machine.make_room(0, 20_usize.saturating_sub(room), 2048);
                    machine.transmit(0, &frame);
                    sent.push(frame);
                }
                let base = machine.front_end.stop_ring(stopped as u32);
                machine.start_ring_at(stopped, SIZE, base);
                until("all frames have been taken", || {
                    back.extend(machine.received(0));
                    machine.transmitted(0);
                    machine.rings[1].queue.outstanding() == 0
                });
            }
            let device = host.echo.stop();
            back.extend(machine.received(0));
            // Every frame was taken once, and what was given back came once.
            let before = 20;
            let counters = device.counters();
            assert_eq!(counters.received, before + sent.len() as u64);
            assert_eq!(counters.sent, before + back.len() as u64);
            assert_eq!(offered(&counters), counters.received);
            let mut left = sent.iter();
            assert!(back.iter().all(|frame| left.any(|other| other == frame)));
            if stopped == 1 {
                assert_eq!(back.len(), sent.len(), "nothing is lost");
            }
        }
    }
}

#[test]
fn tb34_a_disabled_ring_takes_nothing_in_and_lets_nothing_out() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new(1);
        let mut machine = host.running(format, 1);
        let enable = |machine: &FakeVm, index, num| {
            let request = Request::SetVringEnable(VringState { index, num });
            machine.front_end.insist(&request, &[]);
        };
        // Its frames are taken and thrown away.
        enable(&machine, 1, 0);
        machine.make_room(0, 3, 2048);
        for n in 0..3 {
            machine.transmit(0, &frame::pattern(100, n));
        }
        until("the frames have been taken", || {
            machine.transmitted(0);
            machine.rings[1].queue.outstanding() == 0
        });
        assert!(machine.received(0).is_empty());
        enable(&machine, 1, 1);

        // Its room is left alone.
        enable(&machine, 0, 0);
        machine.transmit(0, &frame::pattern(100, 9));
        until("the frame has been taken", || {
            machine.transmitted(0);
            machine.rings[1].queue.outstanding() == 0
        });
        assert_eq!(machine.rings[0].queue.outstanding(), 3);
        enable(&machine, 0, 1);
        machine.transmit(0, &frame::pattern(100, 4));
        let mut back = Vec::new();
        until("the frame comes back", || {
            back.extend(machine.received(0));
            !back.is_empty()
        });
        assert!(back == [frame::pattern(100, 4)]);
        drop(machine);
        host.assert_unharmed();
    }
}

#[test]
fn te10_a_holder_that_does_not_look_delays_its_front_end_and_nothing_is_half_done() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let mut port = Wiring::default().device(&path, &control);
    port.attach();
    let features = Features::VERSION_1 | Features::EVENT_IDX;
    let mut machine = FakeVm::new(FrontEnd::connect(&path), features, 1, SIZE);
    let protocol = Request::SetProtocolFeatures(ProtocolFeatures::REPLY_ACK.bits());
    machine.front_end.insist(&protocol, &[]);
    let accepted = (features | Features::PROTOCOL_FEATURES).bits();
    let request = Request::SetFeatures(accepted);
    assert!(
        !machine.front_end.accepts(&request, &[]),
        "nobody took it over"
    );
    port.detach();
    let error = port.status().unwrap().last_error.unwrap();
    assert!(error.contains("worker"), "{error}");
    assert_eq!(port.status().unwrap().negotiated, 0);
    machine.start();
    let echo = Echo::start(port);
    machine.echo_some(0);
    drop(echo.stop());
}

#[test]
fn o8_another_port_of_the_same_control_thread_goes_on() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let wiring = Wiring::default();
    let paths = [directory.join("a.sock"), directory.join("b.sock")];
    let echoes: Vec<_> = paths
        .iter()
        .map(|path| Echo::start(wiring.device(path, &control)))
        .collect();
    let features = Features::VERSION_1 | Features::EVENT_IDX;
    let vm = |path| FakeVm::new(FrontEnd::connect(path), features, 1, SIZE);
    let mut healthy = vm(&paths[0]);
    healthy.start();
    for n in 0..30 {
        let mut hostile = vm(&paths[1]);
        match n % 3 {
            0 => drop(hostile.front_end.send_bytes(&[0xff; 100], &[])),
            1 => {
                hostile.start();
                let FakeVm { rings, guest, .. } = &mut hostile;
                rings[1].queue.attack(guest, Attack::IndexJump, false);
                rings[1].kick.signal().unwrap();
            }
            // Half a message, and silence while others are served.
            _ => drop(hostile.front_end.send_bytes(&[1, 0, 0], &[])),
        }
        healthy.echo_some(0);
    }
    drop(healthy);
    for echo in echoes {
        drop(echo.stop());
    }
}
