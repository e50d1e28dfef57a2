//! What requests do to the device, and what comes back.

use std::os::fd::AsFd;

use virtnet_sys::EventFd;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{
    Config, LogArea, MemoryRegion, SingleRegion, VringAddresses, VringFd,
};
use virtnet_vhost::{Fault, ProtocolFeatures, Refusal, SessionError};

use crate::fake::{
    BY_EVENTS, LOG_ALL, MEMORY, PROTOCOL, RING_PACKED, Scene, VERSION_1, memory, ring_at, state,
    table,
};

const ACK: ProtocolFeatures = ProtocolFeatures::REPLY_ACK;
const NONE: [&str; 0] = [];

fn kick() -> Request {
    Request::SetVringKick(VringFd::new(0, true))
}

#[test]
fn questions_are_answered_from_the_offer() {
    let mut scene = Scene::agreed(BY_EVENTS);
    assert_eq!(
        scene.number(&Request::GetFeatures),
        VERSION_1 | RING_PACKED | PROTOCOL | LOG_ALL
    );
    assert_eq!(
        scene.number(&Request::GetProtocolFeatures),
        BY_EVENTS.bits()
    );
    assert_eq!(scene.number(&Request::GetQueueNum), 2);
    assert_eq!(scene.number(&Request::GetMaxMemSlots), 509);
    assert_eq!(scene.number(&Request::GetStatus), 0);
}

#[test]
fn u18_configuration_is_read_in_the_length_asked_for() {
    let mut scene = Scene::agreed(ProtocolFeatures::CONFIG | ACK);
    scene.device.config = vec![1, 2, 3, 4];
    let question = |offset, len| {
        Request::GetConfig(Config {
            offset,
            flags: 0,
            data: vec![9; len],
        })
    };
    assert_eq!(scene.ask(&question(0, 2))[12..], [1, 2]);
    assert_eq!(
        scene.ask(&question(3, 4))[12..],
        [4, 0, 0, 0],
        "zero beyond the end"
    );
    assert_eq!(
        scene.ask(&question(1, 1))[..12],
        [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(scene.ask(&question(200, 56))[12..], [0; 56]);
    let write = Request::SetConfig(Config {
        offset: 6,
        flags: 1,
        data: vec![0, 0],
    });
    assert_eq!(scene.ack(&write, &[]), 0);
    assert_eq!(scene.device.take_log(), ["config 6 1"]);
    scene.device.refuses = Some("config");
    assert_eq!(scene.ack(&write, &[]), 1);
}

#[test]
fn u21_u22_the_log_is_answered_as_it_was_told_and_may_come_and_go_while_rings_run() {
    let mut scene = Scene::running(ACK | ProtocolFeatures::LOG_SHMFD);
    scene.device.take_log();
    let area = LogArea {
        mmap_size: 0x2000,
        mmap_offset: 0x1000,
    };
    let (log, file) = (Request::SetLogBase(area), memory());
    let told: Vec<u8> = [0x2000_u64, 0x1000]
        .iter()
        .flat_map(|n| n.to_ne_bytes())
        .collect();
    assert_eq!(scene.ask(&Request::GetFeatures).len(), 8);
    assert_eq!(scene.ask_with(&log, &[file.as_fd()]), told);
    let on = Request::SetFeatures(VERSION_1 | PROTOCOL | LOG_ALL);
    assert_eq!(scene.ack(&on, &[]), 0);
    let logged = VringAddresses {
        flags: 1,
        log_guest_addr: 0x77,
        ..ring_at(0)
    };
    assert_eq!(scene.ack(&Request::SetVringAddr(logged), &[]), 0);
    assert_eq!(scene.device.rings[&0].addresses.log_guest_addr, Some(0x77));
    let event = EventFd::new().unwrap();
    assert_eq!(scene.ack(&Request::SetLogFd, &[event.as_fd()]), 0);
    // A log that cannot be mapped is answered by nothing, which no right answer is.
    scene.device.refuses = Some("log");
    assert_eq!(scene.ask_with(&log, &[file.as_fd()]), [0; 0]);
    scene.device.refuses = None;
    assert_eq!(scene.ack(&Request::SetVringAddr(ring_at(0)), &[]), 0);
    assert_eq!(scene.device.rings[&0].addresses.log_guest_addr, None);
    let off = Request::SetFeatures(VERSION_1 | PROTOCOL);
    assert_eq!(scene.ack(&off, &[]), 0);
    let desc = format!("{:#x}", ring_at(0).desc);
    let expected = [
        "log 8192 4096".to_owned(),
        format!("features {:#x}", VERSION_1 | LOG_ALL),
        format!("addresses 0 {desc}"),
        "log 8192 4096".to_owned(),
        format!("addresses 0 {desc}"),
        format!("features {VERSION_1:#x}"),
    ];
    assert_eq!(scene.device.take_log(), expected);
    // Where no log was agreed on it is a request like others.
    let mut scene = Scene::running(ACK);
    assert_eq!(scene.ack(&log, &[file.as_fd()]), 1);
}

#[test]
fn u1_a_stopped_ring_is_answered_with_its_number_and_base() {
    let mut scene = Scene::running(ACK);
    scene.device.base = 0x1234;
    assert_eq!(
        scene.ask(&Request::GetVringBase(state(0, 0))),
        [0, 0, 0, 0, 0x34, 0x12, 0, 0]
    );
    assert_eq!(scene.device.take_log(), ["stop 0"]);
    assert_eq!(
        scene.ask(&Request::GetVringBase(state(9, 0))),
        [0; 0],
        "no such ring"
    );
    let event = EventFd::new().unwrap();
    assert_eq!(scene.ack(&kick(), &[event.as_fd()]), 0);
    assert_eq!(
        scene.device.take_log(),
        ["start 0 size 256 base 0x1234 kick call"]
    );
}

#[test]
fn a_device_that_cannot_stop_a_ring_ends_the_session() {
    let mut scene = Scene::running(ACK);
    scene.device.refuses = Some("stop");
    let request = crate::fake::bytes(&Request::GetVringBase(state(0, 0)), false);
    let error = scene.raw(&request, &[]).unwrap_err();
    assert!(matches!(error, SessionError::Device { ring: 0, .. }) && error.fault() == Fault::Host);
    assert_eq!(scene.device.disconnected, 1);
}

#[test]
fn what_the_device_refuses_is_refused_and_changes_nothing() {
    let event = EventFd::new().unwrap();
    let (file, fd) = (memory(), event.as_fd());
    let moved = VringAddresses {
        desc: MEMORY.user_addr + 0x4000,
        ..ring_at(0)
    };
    let elsewhere = MemoryRegion {
        guest_addr: 1 << 32,
        user_addr: 1 << 40,
        ..MEMORY
    };
    let cases = [
        ("memory", table(&[MEMORY]), vec![file.as_fd()]),
        (
            "add",
            Request::AddMemReg(SingleRegion(elsewhere)),
            vec![file.as_fd()],
        ),
        ("remove", Request::RemMemReg(SingleRegion(MEMORY)), vec![]),
        ("kick", kick(), vec![fd]),
        (
            "call",
            Request::SetVringCall(VringFd::new(0, true)),
            vec![fd],
        ),
        ("err", Request::SetVringErr(VringFd::new(0, false)), vec![]),
        ("addresses", Request::SetVringAddr(moved), vec![]),
        ("mtu", Request::NetSetMtu(1500), vec![]),
        ("rarp", Request::SendRarp(2), vec![]),
    ];
    for (word, request, fds) in cases {
        let mut scene = Scene::running(BY_EVENTS.difference(ProtocolFeatures::STATUS));
        let before = format!("{:?}", scene.backend.session());
        scene.device.refuses = Some(word);
        assert_eq!(scene.ack(&request, &fds), 1, "{word}");
        assert!(matches!(
            scene.backend.last_refusal(),
            Some(Refusal::Device { .. })
        ));
        assert_eq!(format!("{:?}", scene.backend.session()), before, "{word}");
        scene.device.refuses = None;
        assert_eq!(scene.ack(&request, &fds), 0, "{word}");
    }
}

#[test]
fn features_that_the_device_refuses_keep_features_ok_clear() {
    let mut scene = Scene::agreed(ACK | ProtocolFeatures::STATUS);
    scene.device.refuses = Some("features");
    assert_eq!(scene.ack(&Request::SetFeatures(VERSION_1), &[]), 1);
    assert_eq!(scene.ack(&Request::SetStatus(11), &[]), 0);
    assert_eq!(scene.number(&Request::GetStatus), 3);
    assert_eq!(scene.backend.session().features(), None);
}

#[test]
fn a_ring_that_cannot_start_waits_for_another_kick() {
    let mut scene = Scene::running(ACK);
    scene.ask(&Request::GetVringBase(state(0, 0)));
    let event = EventFd::new().unwrap();
    scene.device.refuses = Some("start");
    assert_eq!(scene.ack(&kick(), &[event.as_fd()]), 1);
    assert!(!scene.backend.ring_state(0).started);
    // What else would start it does not: its kick is gone.
    scene.device.refuses = None;
    scene.device.take_log();
    assert_eq!(scene.ack(&Request::SetVringAddr(ring_at(0)), &[]), 0);
    assert_eq!(scene.device.take_log(), NONE);
    assert_eq!(scene.ack(&kick(), &[event.as_fd()]), 0);
    assert!(scene.backend.session().ring_runs(0));
}

#[test]
fn tb25_tb30_memory_that_lets_a_ring_start_starts_it() {
    let mut scene = Scene::agreed(ACK);
    let event = EventFd::new().unwrap();
    scene.tell(&kick(), &[event.as_fd()]);
    scene.tell(&Request::SetVringAddr(ring_at(0)), &[]);
    scene.tell(&Request::SetVringNum(state(0, 64)), &[]);
    scene.tell(&Request::SetFeatures(VERSION_1 | PROTOCOL), &[]);
    assert_eq!(scene.ack(&table(&[MEMORY]), &[memory().as_fd()]), 0);
    let log = [
        "features 0x100000000",
        "memory 0x10000",
        "start 0 size 64 base 0x0 kick",
    ];
    assert_eq!(scene.device.take_log(), log);
}

#[test]
fn tb38_tb39_bad_tables_are_refused_whole() {
    let mut scene = Scene::running(ACK);
    let file = memory();
    let cases = [
        vec![MEMORY, MEMORY],
        vec![
            MEMORY,
            MemoryRegion {
                guest_addr: u64::MAX,
                ..MEMORY
            },
        ],
        vec![MemoryRegion { size: 0, ..MEMORY }],
        vec![MemoryRegion {
            size: 1 << 63,
            user_addr: 1 << 63,
            ..MEMORY
        }],
        vec![MemoryRegion {
            mmap_offset: u64::MAX,
            ..MEMORY
        }],
        vec![],
    ];
    for regions in cases {
        let fds = vec![file.as_fd(); regions.len()];
        assert_eq!(scene.ack(&table(&regions), &fds), 1, "{regions:?}");
    }
    assert_eq!(scene.device.take_log(), NONE);
    assert!(scene.backend.session().ring_runs(0));
}

#[test]
fn u17_tb43_slots_come_and_go_and_a_descriptor_too_many_is_closed() {
    let mut scene = Scene::agreed(ACK | ProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let file = memory();
    let slot = |n: u64| {
        SingleRegion(MemoryRegion {
            guest_addr: n << 20,
            user_addr: n << 20,
            ..MEMORY
        })
    };
    for n in 1..=20 {
        assert_eq!(scene.ack(&Request::AddMemReg(slot(n)), &[file.as_fd()]), 0);
    }
    let SingleRegion(region) = slot(3);
    let with_offset = SingleRegion(MemoryRegion {
        mmap_offset: 4096,
        ..region
    });
    assert_eq!(
        scene.ack(&Request::RemMemReg(with_offset), &[file.as_fd()]),
        0
    );
    assert_eq!(
        scene.ack(&Request::RemMemReg(slot(3)), &[]),
        1,
        "gone already"
    );
    assert_eq!(
        scene.ack(&Request::RemMemReg(slot(21)), &[]),
        1,
        "never there"
    );
    assert_eq!(scene.device.regions.len(), 19);
}

#[test]
fn tb28_a_size_told_over_and_over_is_just_the_last() {
    let mut scene = Scene::agreed(ACK);
    for round in 0..3000 {
        scene.tell(&Request::SetVringNum(state(0, 1 << (round % 16))), &[]);
    }
    assert_eq!(scene.backend.counters().1, 0);
}

#[test]
fn tb33_a_ring_can_be_stopped_and_started_at_every_index() {
    let mut scene = Scene::running(ACK);
    let event = EventFd::new().unwrap();
    for base in (0..=0xffff).step_by(251) {
        scene.device.base = base;
        scene.ask(&Request::GetVringBase(state(0, 0)));
        scene.tell(&kick(), &[event.as_fd()]);
        let log = scene.device.take_log();
        assert_eq!(log[1], format!("start 0 size 256 base {base:#x} kick call"));
    }
}

#[test]
fn refusals_are_counted_and_named() {
    let mut scene = Scene::agreed(ACK);
    assert_eq!(scene.ack(&Request::SetVringNum(state(0, 0)), &[]), 1);
    let refusal = scene.backend.last_refusal().unwrap();
    assert_eq!(refusal.fault(), Fault::Peer);
    let text = refusal.to_string();
    assert_eq!(
        text,
        "SET_VRING_NUM: the size of a ring is 0x0 and has to be a power of two (packed: any number) from 1 to 32768"
    );
    assert_eq!(scene.backend.counters(), (2, 1));
}

#[test]
fn the_front_end_is_known_by_its_process() {
    let scene = Scene::new();
    assert_eq!(
        u32::try_from(scene.backend.peer().unwrap().pid).unwrap(),
        std::process::id()
    );
}
