//! The orders in which other front-ends say things, and what the device sees of it.

use std::os::fd::AsFd;

use virtnet_sys::EventFd;
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::VringFd;

use crate::fake::{
    BY_EVENTS, MEMORY, PROTOCOL, RING_PACKED, Scene, VERSION_1, memory, ring_at, state, table,
};

/// QEMU with two queue pairs: the questions of each pair, then all of them started, then stopped for a pause.
#[test]
fn qemu_starts_pauses_and_goes_on() {
    let mut scene = Scene::new();
    let event = EventFd::new().unwrap();
    let all = BY_EVENTS.difference(ProtocolFeatures::STATUS | ProtocolFeatures::CONFIG);
    for pair in 0..2u8 {
        scene.number(&Request::GetFeatures);
        if pair == 0 {
            scene.number(&Request::GetProtocolFeatures);
            scene.tell(&Request::SetProtocolFeatures(all.bits()), &[]);
            assert_eq!(scene.number(&Request::GetQueueNum), 2);
            assert_eq!(scene.number(&Request::GetMaxMemSlots), 509);
            scene.tell(&Request::SetOwner, &[]);
        }
        scene.number(&Request::GetFeatures);
        for ring in [2 * pair, 2 * pair + 1] {
            assert_eq!(
                scene.ack(
                    &Request::SetVringCall(VringFd::new(ring, true)),
                    &[event.as_fd()]
                ),
                0
            );
        }
    }
    // Pair 1 is off until the driver asks for it.
    for ring in 0..4 {
        scene.tell(
            &Request::SetVringEnable(state(ring, u32::from(ring < 2))),
            &[],
        );
    }
    assert_eq!(scene.device.take_log(), [""; 0]);

    let start = |scene: &mut Scene, base: u32| {
        for pair in 0..2u8 {
            scene.tell(&Request::SetFeatures(VERSION_1 | PROTOCOL), &[]);
            if pair == 0 {
                assert_eq!(scene.ack(&table(&[MEMORY]), &[memory().as_fd()]), 0);
            }
            for ring in [2 * pair, 2 * pair + 1] {
                let index = u32::from(ring);
                scene.tell(&Request::SetVringNum(state(index, 256)), &[]);
                scene.tell(&Request::SetVringBase(state(index, base)), &[]);
                scene.tell(&Request::SetVringAddr(ring_at(index)), &[]);
                scene.tell(
                    &Request::SetVringKick(VringFd::new(ring, true)),
                    &[event.as_fd()],
                );
                scene.tell(
                    &Request::SetVringCall(VringFd::new(ring, true)),
                    &[event.as_fd()],
                );
            }
        }
        for ring in 0..2 {
            scene.tell(&Request::SetVringEnable(state(ring, 1)), &[]);
        }
    };
    start(&mut scene, 0);
    assert_eq!(
        scene.device.take_log(),
        [
            "features 0x100000000",
            "memory 0x10000",
            "start 0 size 256 base 0x0 kick call enabled",
            "call 0 true",
            "start 1 size 256 base 0x0 kick call enabled",
            "call 1 true",
            "start 2 size 256 base 0x0 kick call",
            "call 2 true",
            "start 3 size 256 base 0x0 kick call",
            "call 3 true",
            "enable 0 true",
            "enable 1 true",
        ]
    );
    // The driver asks for the second pair.
    scene.tell(&Request::SetVringEnable(state(2, 1)), &[]);
    scene.tell(&Request::SetVringEnable(state(3, 1)), &[]);
    assert_eq!(scene.device.take_log(), ["enable 2 true", "enable 3 true"]);

    scene.device.base = 42;
    for ring in 0..4 {
        assert_eq!(
            scene.ask(&Request::GetVringBase(state(ring, 0)))[4..],
            [42, 0, 0, 0]
        );
    }
    assert_eq!(
        scene.device.take_log(),
        ["stop 0", "stop 1", "stop 2", "stop 3"]
    );
    start(&mut scene, 42);
    let log = scene.device.take_log();
    assert_eq!(log[0], "memory 0x10000", "the features have not changed");
    assert_eq!(
        log[7], "start 3 size 256 base 0x2a kick call enabled",
        "enabling is remembered"
    );
    assert_eq!(
        scene.backend.counters().1,
        0,
        "{:?}",
        scene.backend.last_refusal()
    );
}

/// DPDK's virtio-user with packed rings and the device status; its base for a fresh ring is half of one.
#[test]
fn virtio_user_starts_with_the_driver_and_stops_with_a_reset() {
    let mut scene = Scene::new();
    let event = EventFd::new().unwrap();
    let wanted = ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK | ProtocolFeatures::STATUS;
    scene.tell(&Request::SetOwner, &[]);
    scene.number(&Request::GetFeatures);
    scene.number(&Request::GetProtocolFeatures);
    scene.tell(&Request::SetProtocolFeatures(wanted.bits()), &[]);
    scene.number(&Request::GetQueueNum);
    for round in 0..3 {
        for status in [0, 1, 3] {
            assert_eq!(scene.ack(&Request::SetStatus(status), &[]), 0);
        }
        for ring in 0..2 {
            scene.tell(
                &Request::SetVringCall(VringFd::new(ring, true)),
                &[event.as_fd()],
            );
        }
        scene.tell(
            &Request::SetFeatures(VERSION_1 | RING_PACKED | PROTOCOL),
            &[],
        );
        assert_eq!(scene.ack(&Request::SetStatus(11), &[]), 0);
        assert_eq!(scene.number(&Request::GetStatus), 11);
        assert_eq!(scene.ack(&table(&[MEMORY]), &[memory().as_fd()]), 0);
        for ring in 0..2u8 {
            let index = u32::from(ring);
            scene.tell(&Request::SetVringNum(state(index, 200)), &[]);
            scene.tell(&Request::SetVringBase(state(index, 0x8000)), &[]);
            scene.tell(&Request::SetVringAddr(ring_at(index)), &[]);
            scene.tell(
                &Request::SetVringKick(VringFd::new(ring, true)),
                &[event.as_fd()],
            );
        }
        scene.tell(&Request::SetVringEnable(state(0, 1)), &[]);
        scene.tell(&Request::SetVringEnable(state(1, 1)), &[]);
        scene.device.take_log();
        assert_eq!(scene.ack(&Request::SetStatus(15), &[]), 0);
        let log = [
            "status 15",
            "start 0 size 200 base 0x80008000 kick call enabled",
            "start 1 size 200 base 0x80008000 kick call enabled",
        ];
        assert_eq!(scene.device.take_log(), log, "round {round}");
        scene.device.base = 0x8005_8005;
        assert_eq!(
            scene.ask(&Request::GetVringBase(state(0, 0)))[4..],
            [5, 0x80, 5, 0x80]
        );
        assert_eq!(scene.ack(&Request::SetStatus(0), &[]), 0);
        assert_eq!(
            scene.device.take_log(),
            ["stop 0", "stop 1", "reset", "status 0"]
        );
    }
    assert_eq!(
        scene.backend.counters().1,
        0,
        "{:?}",
        scene.backend.last_refusal()
    );
}

/// A front-end from before protocol features: nothing is enabled by message, everything is polled or not acknowledged.
#[test]
fn u4_an_old_front_end_without_protocol_features_is_served() {
    let mut scene = Scene::new();
    let event = EventFd::new().unwrap();
    scene.number(&Request::GetFeatures);
    scene.tell(&Request::SetFeatures(VERSION_1), &[]);
    scene.tell(&Request::SetOwner, &[]);
    scene.tell(&table(&[MEMORY]), &[memory().as_fd()]);
    for ring in 0..2u8 {
        let index = u32::from(ring);
        scene.tell(&Request::SetVringNum(state(index, 128)), &[]);
        scene.tell(&Request::SetVringAddr(ring_at(index)), &[]);
        scene.tell(&Request::SetVringBase(state(index, 0)), &[]);
        scene.tell(
            &Request::SetVringKick(VringFd::new(ring, true)),
            &[event.as_fd()],
        );
        scene.tell(&Request::SetVringCall(VringFd::new(ring, false)), &[]);
    }
    let log = scene.device.take_log();
    assert_eq!(
        log[2..],
        [
            "start 0 size 128 base 0x0 kick enabled",
            "call 0 false",
            "start 1 size 128 base 0x0 kick enabled",
            "call 1 false",
        ]
    );
    assert_eq!(scene.backend.counters().1, 0);
}
