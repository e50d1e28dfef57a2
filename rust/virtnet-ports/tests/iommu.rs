//! The vhost-user port behind an IOMMU: nothing is touched that the front-end has not told, or has taken back.
//!
//! The machine tells guest addresses that are nobody's, so that whoever forgets to translate touches nothing. Its I/O addresses are
//! those that its descriptors carry.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;
#[path = "support/translated.rs"]
mod translated;

use std::collections::BTreeSet;
use std::time::Duration;

use support::{PATIENCE, Pair, Wiring, beside_others, breathe, burst_of, send_or_drop, until};
use translated::{BOTH, CONTROL, FORMATS, Host, Machine, PAGE, READ, SIZE, frames};
use virtnet_mem::GuestAddr;
use virtnet_packet::header::Mac;
use virtnet_packet::{Burst, DropReason, Port};
use virtnet_ports::{Control, RingStatus, VhostUserPort};
use virtnet_testkit::{Buffer, FakeVm, FrontEnd, TempDir, frame};
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::Iotlb;
use virtnet_virtio::net::control::Command;
use virtnet_virtio::{Features, RingFormat};

#[test]
fn packets_pass_when_their_pages_are_told_and_each_is_asked_for_once() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new();
        let mut machine = Machine::start(&host, format);
        machine.echo(&frames(20));
        machine.echo(&frames(20));
        let pages: BTreeSet<_> = machine
            .asked
            .iter()
            .map(|miss| (miss.iova, miss.permission))
            .collect();
        assert_eq!(pages.len(), machine.asked.len(), "asked for twice");
        let status = host.status();
        assert_eq!((status.state, status.refusals), ("running", 0));
        assert!(Features::from_bits_retain(status.negotiated).contains(Features::ACCESS_PLATFORM));
        drop(host.echo.stop());
    }
}

#[test]
fn what_was_taken_back_is_neither_read_nor_written() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new();
        let mut machine = Machine::start(&host, format);
        machine.echo(&frames(3));

        // To be read: the packet that lies there when the page is told is the one that is sent, whatever was there before.
        let packet = machine.page(12 + 100, false);
        let page = packet.addr.0;
        machine.map(page, PAGE, READ);
        machine.unmap(page, PAGE);
        machine.withheld.insert(page);
        machine.write_packet(packet.addr, &[0xee; 100]);
        machine.offer(1, packet);
        until("the page is asked for", || {
            machine.serve();
            !machine.open.is_empty()
        });
        host.echo.assert_falls_asleep();
        assert_eq!(machine.vm.transmitted(0), 0, "the packet was not taken");
        let right = frame::pattern(100, 5);
        machine.write_packet(packet.addr, &right);
        machine.release();
        let mut back = Vec::new();
        until("the right packet comes back", || {
            machine.serve();
            back.extend(machine.vm.received(0));
            !back.is_empty()
        });
        assert_eq!(back, [right]);
        until("its buffer too", || machine.vm.transmitted(0) == 1);

        drop(machine);

        // To be written: all room there is lies in pages that were taken back, so packets find none.
        let mut machine = Machine::start(&host, format);
        let rooms: Vec<_> = (0..4).map(|_| machine.page(2048, true)).collect();
        for &room in &rooms {
            machine.map(room.addr.0, PAGE, BOTH);
            machine.offer(0, room);
        }
        for room in &rooms {
            machine.unmap(room.addr.0, PAGE);
            machine.withheld.insert(room.addr.0);
        }
        let mut taken = 0;
        for n in 0..8 {
            machine.vm.transmit(0, &frame::pattern(80, n));
            until("the packet is taken", || {
                machine.serve();
                taken += machine.vm.transmitted(0);
                taken == n + 1
            });
        }
        until("the rooms are asked for", || {
            machine.serve();
            machine.open.len() == rooms.len()
        });
        for room in &rooms {
            let bytes = machine.vm.guest.read(room.addr, 2048);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "written to");
        }
        assert!(machine.vm.received(0).is_empty());
        assert_eq!(machine.vm.rings[0].queue.outstanding(), rooms.len());
        machine.release();
        machine.echo(&frames(5));
        drop(host.echo.stop());
    }
}

#[test]
fn nothing_counts_as_taken_back_before_the_worker_has_let_go_of_it() {
    let _gate = beside_others();
    for format in FORMATS {
        let (directory, control) = (TempDir::new(), Control::start("control").unwrap());
        let path = directory.join("port.sock");
        let mut port = Wiring::default().device(&path, &control);
        let mut machine = Machine::attach(Machine::vm(&path, format), &mut None);
        let packets = [0, 1].map(|_| machine.page(12 + 60, false));
        for packet in packets {
            machine.write_packet(packet.addr, &frame::pattern(60, 1));
            machine.map(packet.addr.0, PAGE, READ);
        }
        for page in machine.ring_pages(0).union(&machine.ring_pages(1)) {
            machine.map(*page, PAGE, BOTH);
        }
        port.attach();
        port.sync();
        machine.offer(1, packets[0]);
        let mut burst = Burst::new();
        assert_eq!(port.rx(&mut burst), 1, "{format:?}");
        // It is in the middle of a breath, and goes on with it for longer than anybody waits.
        let page = packets[1].addr.0;
        let invalidate = Request::IotlbMsg(Iotlb {
            iova: page,
            size: PAGE,
            kind: Iotlb::INVALIDATE,
            ..Iotlb::default()
        });
        let front_end = &machine.vm.front_end;
        assert!(!front_end.accepts(&invalidate, &[]), "nobody has let go");
        port.complete();
        // With the next breath it is gone all the same.
        port.sync();
        machine.offer(1, packets[1]);
        burst.clear();
        assert_eq!(port.rx(&mut burst), 0, "{format:?}");
        port.detach();
        machine.unmap(page, PAGE);
    }
}

#[test]
fn pages_are_taken_back_under_traffic_and_keep_what_is_in_them() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new();
        let mut machine = Machine::start(&host, format);
        let sent: Vec<_> = (0..16).map(|n| frame::pattern(64 + 100 * n, n)).collect();
        let mut rooms = Vec::new();
        for _ in 0..16 {
            let room = machine.page(2048, true);
            machine.offer(0, room);
            rooms.push(room);
        }
        let (mut arrived, mut untouched) = (0, 0);
        for round in 0..400_usize {
            // Some page of a receive buffer that the device holds, while packets are on their way into it.
            let victim = rooms[round % rooms.len()];
            if machine.vm.rings[1].queue.outstanding() < 8 {
                machine.vm.transmit(0, &sent[round % 16]);
                machine.vm.transmit(0, &sent[(round + 7) % 16]);
            }
            machine.withheld.insert(victim.addr.0);
            machine.unmap(victim.addr.0, PAGE);
            let then = machine.vm.guest.read(victim.addr, 2048);
            for n in 0..4 {
                if machine.vm.rings[1].queue.outstanding() < 8 {
                    machine.vm.transmit(0, &sent[(round + n) % 16]);
                }
                machine.serve();
                machine.vm.transmitted(0);
            }
            let now = machine.vm.guest.read(victim.addr, 2048);
            assert!(
                then == now,
                "round {round}: written to after it was taken back"
            );
            untouched += 1;
            machine.release();
            machine.serve();
            for frame in machine.vm.received(0) {
                assert!(sent.contains(&frame), "not what was sent");
                arrived += 1;
                // Its room lies in its page as before.
                let guest = &machine.vm.guest;
                let room = rooms.iter().find(|room| !guest.is_lent(**room));
                machine.offer(0, *room.unwrap());
            }
        }
        assert_eq!(untouched, 400);
        until("packets arrive in the end", || {
            machine.serve();
            if machine.vm.rings[1].queue.outstanding() < 8 {
                machine.vm.transmit(0, &sent[3]);
            }
            machine.vm.transmitted(0);
            arrived += machine.vm.received(0).len();
            arrived > 0
        });
        machine.vm.guest.check();
        drop(host.echo.stop());
    }
}

#[test]
fn a_page_that_is_refused_costs_the_chain_that_needs_it() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new();
        let mut machine = Machine::start(&host, format);
        machine.echo(&frames(3));
        // Refused in words, and by silence.
        for answers in [true, false] {
            let packet = machine.page(112, false);
            let page = packet.addr.0;
            machine.write_packet(packet.addr, &frame::pattern(100, 1));
            machine.offer(1, packet);
            until("the page is asked for", || {
                while let Some(miss) = machine.next_miss() {
                    if miss.iova == page {
                        if answers {
                            machine.acknowledge(1);
                        }
                        return true;
                    }
                    machine.map(miss.iova, PAGE, BOTH);
                    machine.acknowledge(0);
                }
                false
            });
            let mut back = 0;
            until("the chain is given back", || {
                back += machine.vm.transmitted(0);
                back == 1
            });
            if !answers {
                // In the end it says something; that it comes late harms nobody.
                machine.acknowledge(0);
            }
            let error = host.status().last_error.unwrap();
            assert!(error.contains(&format!("{page:#x}")), "{error}");
            machine.echo(&frames(3));
        }
        assert!(PATIENCE > Duration::from_secs(5));
        let port = host.echo.stop();
        let drops = port.counters().rx_drops;
        assert_eq!(drops.of(DropReason::Malformed), 2, "{drops:?}");
    }
}

#[test]
fn rings_that_are_taken_back_wait_and_go_on_where_they_were() {
    let _gate = beside_others();
    for (format, recorded) in FORMATS.into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let host = Host::new();
        let mut machine = if recorded {
            Machine::start_recorded(&host, format, &mut None)
        } else {
            Machine::start(&host, format)
        };
        for round in 0..10 {
            machine.echo(&frames(1 + 3 * round % 7));
            for ring in 0..2 {
                let page = *machine.ring_pages(ring).iter().next().unwrap();
                machine.unmap(page, PAGE);
                if round % 3 == 2 {
                    // Stopped while it waits: it says where it was, and starts there again.
                    let base = machine.vm.front_end.stop_ring(ring as u32);
                    let queue = &machine.vm.rings[ring].queue;
                    let config = queue.config(&machine.vm.guest, machine.vm.features);
                    if format.is_empty() && ring == 1 {
                        assert_eq!(base, config.base);
                    }
                    machine.restart_ring(ring, base);
                }
            }
        }
        machine.echo(&frames(20));
        assert_eq!(host.status().refusals, 0);
        drop(host.echo.stop());
    }
}

#[test]
fn what_a_port_had_taken_behind_an_iommu_is_taken_by_the_next_one() {
    let _gate = beside_others();
    for format in FORMATS {
        let (directory, mut record) = (TempDir::new(), None);
        let control = Control::start("control").unwrap();
        let path = directory.join("port.sock");
        let sent = frames(5);
        let mut port = Wiring::default().device(&path, &control);
        let mut machine = Machine::attach(Machine::vm(&path, format), &mut Some(&mut record));
        for frame in &sent {
            machine.vm.transmit(0, frame);
        }
        port.attach();
        assert!(take_all(&mut port, &mut machine, 5) == sent, "{format:?}");
        // It is gone before it has given anything back.
        drop(port);
        assert_eq!(machine.vm.transmitted(0), 0);

        let mut port = Wiring::default().device(&path, &control);
        let vm = machine.vm.reconnect(FrontEnd::connect(&path));
        let mut machine = Machine::attach(vm, &mut Some(&mut record));
        port.attach();
        assert!(take_all(&mut port, &mut machine, 5) == sent, "{format:?}");
        assert_eq!(port_rings(&mut port)[1].taken_again, 5, "{format:?}");
        port.attach();
        port.complete();
        assert_eq!(machine.vm.transmitted(0), 5);
        machine.vm.guest.check();
    }
}

#[test]
fn a_driver_of_ours_behind_an_iommu_tells_what_it_is_asked_for() {
    let _gate = beside_others();
    for (format, control) in [
        (RingFormat::Split, false),
        (RingFormat::Packed, false),
        (RingFormat::Split, true),
    ] {
        let wiring = Wiring {
            format,
            control,
            iommu: true,
            ..Wiring::default()
        };
        let Pair {
            mut device,
            mut driver,
            directory: _directory,
            control: _control,
        } = wiring.connect();
        let translated = Features::from_bits_retain(device.status().unwrap().negotiated);
        assert!(translated.contains(Features::ACCESS_PLATFORM));
        device.attach();
        driver.attach();
        let sent = frames(60);
        let (mut there, mut back) = (Vec::new(), Vec::new());
        let mut left = sent.iter();
        until("all have gone there and come back", || {
            driver.sync();
            if there.len() + 1 > sent.len() - left.len() {
                let next: Vec<_> = left.next().cloned().into_iter().collect();
                send_or_drop(&mut driver, &burst_of(&next));
                driver.flush();
            }
            let came = breathe(&mut device);
            // Room that is not known yet when a packet comes is there for the next.
            send_or_drop(&mut device, &burst_of(&came));
            device.flush();
            there.extend(came);
            back.extend(breathe(&mut driver));
            there.len() == sent.len()
        });
        assert!(there == sent, "{format}");
        until("a packet comes the other way", || {
            device.sync();
            send_or_drop(&mut device, &burst_of(&sent[..1]));
            device.flush();
            device.complete();
            back.extend(breathe(&mut driver));
            back.last() == Some(&sent[0])
        });
        assert!(back.iter().all(|frame| sent.contains(frame)));
    }
}

#[test]
fn a_control_queue_behind_an_iommu_is_served_when_its_pages_are_told() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new();
        let control = Features::CTRL_VQ | Features::CTRL_MAC_ADDR | Features::GUEST_ANNOUNCE;
        let vm = Machine::vm_of(&host.path, format | control, 2);
        let mut machine = Machine::attach(vm, &mut None);
        machine.start_ring(CONTROL);
        for round in 0..6_u8 {
            let mac = Mac([2, 0, 0, 0, 1, round]);
            assert_eq!(machine.command(&Command::SetMac(mac)), 0);
            let config = host.status().config.unwrap();
            assert_eq!(config.mac, Some(mac.0), "{format:?}");
            // Once the ring itself goes away for a while, and once a request that nobody tells of.
            let page = *machine.ring_pages(CONTROL).iter().next().unwrap();
            machine.unmap(page, PAGE);
        }
        machine.echo(&frames(3));
        let base = machine.vm.front_end.stop_ring(CONTROL as u32);
        machine.restart_ring(CONTROL, base);
        let set = Command::SetMac(Mac([2, 0, 0, 0, 2, 0]));
        assert_eq!(machine.command(&set), 0);
        assert_eq!(machine.command(&Command::SetPairs(1)), 1, "not negotiated");
        // Whoever has moved is to say so, and does.
        machine.vm.front_end.insist(&Request::SendRarp(2), &[]);
        until("the driver is to announce itself", || {
            host.status().config.unwrap().announce
        });
        assert_eq!(machine.command(&Command::AcknowledgeAnnounce), 0);
        assert!(!host.status().config.unwrap().announce);
        drop(host.echo.stop());
    }
}

/// The next `n` frames that a port takes, which gives no buffer back.
#[track_caller]
fn take_all(port: &mut VhostUserPort, machine: &mut Machine, n: usize) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    until("all of them are taken", || {
        machine.serve();
        port.sync();
        let mut burst = Burst::new();
        port.rx(&mut burst);
        frames.extend((0..burst.len()).map(|i| {
            let mut frame = vec![0; burst.frame_len(i)];
            burst.copy_frame(i, &mut frame);
            frame
        }));
        frames.len() == n
    });
    frames
}

/// How the rings of a port stand that nobody runs meanwhile.
fn port_rings(port: &mut VhostUserPort) -> Vec<RingStatus> {
    port.detach();
    port.watch().rings().unwrap()
}

#[test]
fn tb84_translations_that_make_no_sense_are_refused_and_many_do_no_harm() {
    let _gate = beside_others();
    let host = Host::new();
    let mut machine = Machine::start(&host, Features::empty());
    machine.echo(&frames(3));
    let good = Iotlb {
        iova: 1 << 50,
        size: PAGE,
        user_addr: machine.region.user_addr,
        permission: BOTH,
        kind: Iotlb::UPDATE,
    };
    let bad = [
        Iotlb { size: 0, ..good },
        Iotlb {
            size: u64::MAX,
            ..good
        },
        Iotlb {
            iova: u64::MAX - 10,
            ..good
        },
        Iotlb {
            user_addr: 0,
            ..good
        },
        Iotlb {
            user_addr: u64::MAX - 10,
            ..good
        },
        Iotlb {
            user_addr: machine.region.user_addr + machine.region.size - 10,
            ..good
        },
        Iotlb {
            permission: 0,
            ..good
        },
        Iotlb {
            permission: 4,
            ..good
        },
        Iotlb {
            kind: Iotlb::MISS,
            ..good
        },
        Iotlb { kind: 4, ..good },
        Iotlb { kind: 0xff, ..good },
    ];
    for change in bad {
        assert!(
            !machine
                .vm
                .front_end
                .accepts(&Request::IotlbMsg(change), &[]),
            "{change:?}"
        );
    }
    for n in 0..5_000_u64 {
        let iova = (1 << 50) + 2 * n * PAGE;
        machine
            .vm
            .front_end
            .insist(&Request::IotlbMsg(Iotlb { iova, ..good }), &[]);
    }
    machine.echo(&frames(10));
    machine.unmap(0, u64::MAX);
    machine.echo(&frames(10));
    drop(host.echo.stop());
}

#[test]
fn a_driver_that_names_addresses_without_end_is_asked_about_no_faster_than_it_is_answered() {
    let _gate = beside_others();
    let host = Host::new();
    let mut machine = Machine::start(&host, Features::empty());
    machine.echo(&frames(3));
    // Nobody answers any more.
    for n in 0..u64::from(SIZE) {
        let nowhere = Buffer {
            addr: GuestAddr((1 << 50) + n * (1 << 20)),
            len: 65_600,
            writable: false,
        };
        machine.vm.rings[1]
            .queue
            .offer(&mut machine.vm.guest, &[nowhere]);
    }
    machine.vm.rings[1].kick.signal().unwrap();
    let mut back = 0;
    until("all of them are given back", || {
        back += machine.vm.transmitted(0);
        back == usize::from(SIZE)
    });
    until("it is silent", || {
        let before = machine.asked.len();
        while machine.next_miss().is_some() {}
        machine.asked.len() == before
    });
    let asked = machine.asked.len();
    assert!(asked <= 64 * 21 + 20, "{asked} questions");
    assert_eq!(host.status().state, "running");
    host.echo.assert_falls_asleep();
    drop(host.echo.stop());
}

#[test]
fn who_cannot_be_asked_has_plain_addresses() {
    let _gate = beside_others();
    let host = Host::new();
    let features = Features::VERSION_1 | Features::ACCESS_PLATFORM;
    let mut vm = FakeVm::new(FrontEnd::connect(&host.path), features, 1, SIZE);
    vm.start();
    vm.echo(0, &frames(10));
    let update = Request::IotlbMsg(Iotlb {
        kind: Iotlb::INVALIDATE,
        ..Iotlb::default()
    });
    assert!(
        !vm.front_end.accepts(&update, &[]),
        "there is nothing to translate"
    );
    drop(host.echo.stop());
}
