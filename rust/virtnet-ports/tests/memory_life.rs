//! Guest memory through the life of a machine: it comes, moves and goes under traffic, or is taken away without a word.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::os::fd::AsFd;

use support::host::{FORMATS, Honest, Host};
use support::until;
use support::{beside_others, offered};
use virtnet_mem::GuestAddr;
use virtnet_packet::{Offload, Port};
use virtnet_testkit::{
    Backing, Buffer, DirtyPages, FakeVm, HEADER_LEN, VmMemory, frame, net_header, offer_frame,
};
use virtnet_vhost::MAX_SLOTS;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{MemoryRegion, SingleRegion};
use virtnet_virtio::Features;

/// Frames on a transmitq of which the device has not been told yet.
fn offer(machine: &mut FakeVm, n: usize) {
    let header = net_header(&Offload::default(), 0);
    let FakeVm { rings, guest, .. } = machine;
    for n in 0..n {
        offer_frame(
            guest,
            &mut *rings[1].queue,
            &header,
            &frame::pattern(900, n),
            &[],
        );
    }
}

/// Lets a machine take its memory away, but for the first bytes, while its frames are under way.
fn take_away(machine: &mut FakeVm, left: u64) {
    machine.start();
    machine.echo_some(0);
    machine.make_room(0, 40, 2048);
    offer(machine, 40);
    machine.rings[1].kick.signal().unwrap();
    machine.memory.resize(0, left);
    // Whatever had been taken before, these lie in what is gone, be it their bytes or their descriptors.
    offer(machine, 5);
    machine.rings[1].kick.signal().unwrap();
}

/// Expects that a session has ended because its memory is gone.
#[track_caller]
fn assert_given_up(host: &Host, machine: &FakeVm) {
    until("the session has ended", || {
        host.status().state == "listening"
    });
    assert!(machine.front_end.is_hung_up());
    let error = host.status().last_error.unwrap();
    let process = format!("process {}", std::process::id());
    for word in [&process, "0x100000000", "(0x100000 bytes)", "shortened"] {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn tb45_a_front_end_that_shortens_its_memory_loses_its_session_and_nobody_else_notices() {
    let _gate = beside_others();
    for format in FORMATS {
        let other = Host::new(1);
        let mut neighbour = other.running(format, 1);
        // All of it; all but the first page, which has a part of a ring; the buffers only.
        let lost = [0, 4096, 16 << 10].map(|left| (left, Host::new(1)));
        for backing in [Backing::Resizable, Backing::File] {
            let machines = lost.each_ref().map(|(left, host)| {
                let memory = VmMemory::of_size(1 << 20, backing).unwrap();
                let mut machine = host.machine_in(format, 1, memory);
                take_away(&mut machine, *left);
                neighbour.echo_some(0);
                machine
            });
            for ((_, host), machine) in lost.iter().zip(&machines) {
                assert_given_up(host, machine);
                neighbour.echo_some(0);
            }
        }
        drop(neighbour);
        other.assert_unharmed();
        for (_, host) in lost {
            host.assert_unharmed();
        }
    }
}

#[test]
fn tb45_huge_pages_that_are_taken_away_are_replaced_whole() {
    let _gate = beside_others();
    let memory = match VmMemory::of_size(4 << 20, Backing::ResizableHugePages) {
        Ok(memory) => memory,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let host = Host::new(1);
    let mut machine = host.machine_in(Features::empty(), 1, memory);
    machine.start();
    machine.echo_some(0);
    offer(&mut machine, 40);
    machine.memory.resize(0, 0);
    machine.rings[1].kick.signal().unwrap();
    until("the session has ended", || {
        host.status().state == "listening"
    });
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn tb45_memory_that_is_not_used_may_go_unnoticed_and_is_noticed_when_it_is() {
    let _gate = beside_others();
    let regions = [0, 1].map(|n| VmMemory::region(VmMemory::START + n * (1 << 20), 1 << 20));
    let memory = VmMemory::new(&regions, Backing::Resizable).unwrap();
    let host = Host::new(1);
    let mut machine = host.machine_in(Features::empty(), 1, memory);
    machine.start();
    machine.memory.resize(1, 0);
    machine.echo_some(0);
    assert_eq!(host.status().state, "running");
    // A buffer there; its frame is longer than what is looked at on the way.
    let FakeVm { rings, guest, .. } = &mut machine;
    let buffer = Buffer {
        addr: GuestAddr(regions[1].guest_addr),
        len: 1000,
        writable: false,
    };
    rings[1].queue.offer(guest, &[buffer]);
    machine.rings[1].kick.signal().unwrap();
    until("the session has ended", || {
        host.status().state == "listening"
    });
    let error = host.status().last_error.unwrap();
    assert!(error.contains("0x100100000"), "{error}");
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn tb64_a_dirty_log_that_is_taken_away_ends_the_session() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new(1);
        let mut machine = host.running(format, 1);
        let log = DirtyPages::new(&machine.guest);
        machine.start_log(&log);
        machine.echo_some(0);
        log.shorten();
        machine.echo_some(0);
        until("the session has ended", || {
            host.status().state == "listening"
        });
        let error = host.status().last_error.unwrap();
        assert!(error.contains("dirty log are gone"), "{error}");
        drop(machine);
        host.assert_unharmed();
    }
}

/// A place for what a machine puts into it: begins somewhere, with or without neighbours, and somewhere in its file.
fn slot(number: u64, size: u64, gap: u64, mmap_offset: u64) -> MemoryRegion {
    let guest = VmMemory::START + (1 << 30) + number * (size + gap);
    MemoryRegion {
        mmap_offset,
        ..VmMemory::region(guest, size)
    }
}

/// A machine whose rings have a region of their own, with slots beside it of which the back-end does not know yet.
fn machine_with_slots(
    host: &Host,
    format: Features,
    slots: impl Iterator<Item = MemoryRegion>,
    backing: Backing,
) -> FakeVm {
    let rings = VmMemory::region(VmMemory::START, 2 << 20);
    let regions: Vec<_> = [rings].into_iter().chain(slots).collect();
    let memory = VmMemory::new(&regions, backing).unwrap();
    let mut machine = host.machine_in(format, 1, memory);
    machine.agree();
    add(&machine, 0);
    for ring in 0..machine.rings.len() {
        machine.start_ring(ring);
    }
    machine
}

/// Tells of a region that is new.
#[track_caller]
fn add(machine: &FakeVm, region: usize) {
    let request = Request::AddMemReg(SingleRegion(machine.memory.regions()[region]));
    let file = machine.memory.file(region);
    machine.front_end.insist(&request, &[file.as_fd()]);
}

/// Takes a region back; whether that is possible.
#[track_caller]
fn remove(machine: &FakeVm, region: usize) {
    let request = Request::RemMemReg(SingleRegion(machine.memory.regions()[region]));
    machine.front_end.insist(&request, &[]);
}

/// Lets frames come back whose buffers, on both ways, lie in this region.
#[track_caller]
fn echo_in(machine: &mut FakeVm, region: usize) {
    let guest_addr = machine.memory.regions()[region].guest_addr;
    machine.guest.allocate_from(GuestAddr(guest_addr));
    let frames: Vec<_> = (0..2)
        .map(|n| frame::pattern(60 + 400 * n, region + n))
        .collect();
    machine.echo(0, &frames);
}

/// Lets one frame come back, while something is done.
#[track_caller]
fn echo_one_during(machine: &mut FakeVm, number: usize, work: impl FnOnce(&FakeVm)) {
    let frame = frame::pattern(300, number);
    machine.make_room(0, 1, 2048);
    machine.transmit(0, &frame);
    work(machine);
    let (mut taken, mut back) = (0, Vec::new());
    until("the frame and its buffer come back", || {
        taken += machine.transmitted(0);
        back.extend(machine.received(0));
        (taken, back.len()) == (1, 1)
    });
    assert!(back == [frame], "another frame came back");
}

#[test]
fn tb41_tb42_slots_come_and_go_one_by_one_up_to_the_last_while_packets_flow() {
    let _gate = beside_others();
    for format in FORMATS {
        let (host, other) = (Host::new(1), Host::new(1));
        let mut neighbour = other.running(format, 1);
        let slots = (1..MAX_SLOTS as u64).map(|n| slot(n, 8192, 4096, 0));
        let mut machine = machine_with_slots(&host, format, slots, Backing::Sealed);
        for number in 1..MAX_SLOTS {
            if !number.is_multiple_of(5) {
                add(&machine, number);
                continue;
            }
            // What is under way while the memory grows lies in what was there before.
            echo_one_during(&mut machine, number, |machine| add(machine, number));
            if number.is_multiple_of(50) {
                echo_in(&mut machine, number);
                echo_in(&mut machine, number / 2 + 1);
                neighbour.echo_some(0);
            }
        }
        // There is no slot behind the last one, and nothing has become of the attempt.
        let more = Request::AddMemReg(SingleRegion(slot(MAX_SLOTS as u64, 8192, 4096, 0)));
        let file = machine.memory.file(1);
        assert!(!machine.front_end.accepts(&more, &[file.as_fd()]));
        let error = host.status().last_error.unwrap();
        assert!(error.contains("1 to 509 regions"), "{error}");
        echo_in(&mut machine, MAX_SLOTS - 1);
        machine
            .guest
            .allocate_from(GuestAddr(VmMemory::START + (1 << 20)));
        for number in (1..MAX_SLOTS).rev() {
            if number.is_multiple_of(5) {
                echo_one_during(&mut machine, number, |machine| remove(machine, number));
            } else {
                remove(&machine, number);
            }
        }
        machine.echo_some(0);
        neighbour.echo_some(0);
        drop((machine, neighbour));
        host.assert_unharmed();
        other.assert_unharmed();
    }
}

#[test]
fn tb40_a_slot_that_goes_with_buffers_in_it_costs_those_and_comes_back() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new(1);
        let slots = (0..2).map(|n| slot(n, 64 << 10, 0, 0));
        let mut machine = machine_with_slots(&host, format, slots, Backing::Resizable);
        add(&machine, 2);
        for round in 0..10 {
            add(&machine, 1);
            echo_in(&mut machine, 1);
            // Three frames and the room for five are in the slot that goes.
            machine.make_room(0, 5, 2048);
            offer(&mut machine, 3);
            remove(&machine, 1);
            machine.kick(1);
            // The slot behind it has room for all that comes. What nobody can read or write any more comes back empty, and a
            // frame that finds only such room is lost: at most one for each of them.
            machine
                .guest
                .allocate_from(GuestAddr(machine.memory.regions()[2].guest_addr));
            machine.make_room(0, 8, 2048);
            let frames: Vec<_> = (0..8).map(|n| frame::pattern(700, round + n)).collect();
            let (mut taken, mut came) = (0, Vec::new());
            for frame in &frames {
                machine.transmit(0, frame);
                let all = frame == &frames[7];
                until("the frame is dealt with", || {
                    taken += machine.transmitted(0);
                    let returned = machine.rings[0].queue.collect(&mut machine.guest);
                    let written = returned.into_iter().filter(|chain| chain.len > 0);
                    came.extend(written.map(|chain| chain.bytes[HEADER_LEN..].to_vec()));
                    taken > 3 && (!all || taken == 11 && came.ends_with(&frames[5..]))
                });
            }
            let room = machine.rings[0].queue.outstanding();
            let rest: Vec<_> = (0..room).map(|n| frame::pattern(100, n)).collect();
            machine.echo(0, &rest);
        }
        drop(machine);
        let port = host.echo.stop();
        let counters = port.counters();
        let rejected = counters.rx_drops.total();
        assert_eq!(counters.received - rejected, offered(&counters));
        assert!(rejected + counters.bad_buffers > 0, "{counters:?}");
    }
}

#[test]
fn memory_of_every_kind_in_every_layout_carries_packets() {
    let _gate = beside_others();
    let backings = [
        Backing::Sealed,
        Backing::Resizable,
        Backing::File,
        Backing::HugePages,
    ];
    let host = Host::new(1);
    for (format, backing) in FORMATS.into_iter().flat_map(|f| backings.map(|b| (f, b))) {
        let page = if backing == Backing::HugePages {
            2 << 20
        } else {
            4096
        };
        // Neighbours that touch, holes between them, and offsets of one page, many, and no whole page.
        for (gap, offset) in [(0, 0), (4096, 4096), (1 << 30, 5 << 20), (0, 8192 + 64)] {
            for count in [1, 2, 7] {
                let slots = (0..count).map(|n| slot(n, 16 << 10, gap, offset));
                let rings = MemoryRegion {
                    mmap_offset: offset,
                    ..VmMemory::region(VmMemory::START, 1 << 20)
                };
                let regions: Vec<_> = [rings].into_iter().chain(slots).collect();
                let memory = match VmMemory::new(&regions, backing) {
                    Ok(memory) => memory,
                    Err(error) => {
                        eprintln!("skipped {backing:?} in pages of {page} bytes: {error}");
                        continue;
                    }
                };
                let mut machine = host.machine_in(format, 1, memory);
                machine.start();
                machine.echo_some(0);
                for region in 1..regions.len() {
                    echo_in(&mut machine, region);
                }
                drop(machine);
                until("it has left", || host.status().state == "listening");
            }
        }
    }
    host.assert_unharmed();
}
