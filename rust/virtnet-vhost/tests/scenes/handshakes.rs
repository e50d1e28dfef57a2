//! The orders in which front-ends really speak, and some that they could: all of them end with the same rings running.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use virtnet_sys::EventFd;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{MemoryRegion, SingleRegion, VringFd};
use virtnet_vhost::{ProtocolFeatures, RingAccess};

use crate::fake::{BY_EVENTS, MEMORY, PROTOCOL, RING_PACKED, Scene, VERSION_1, ring_at};
use crate::words::{base, call, enable, err, kick, place, size, stop, whole_memory};

/// Where each ring is told to begin.
const BASE: u32 = 7;

/// Protocol features as they are agreed by a front-end that knows nothing of the device status.
const PLAIN: u64 = BY_EVENTS.difference(ProtocolFeatures::STATUS).bits();

fn features(more: u64) -> Request {
    Request::SetFeatures(VERSION_1 | more)
}

fn protocol(bits: u64) -> Request {
    Request::SetProtocolFeatures(bits)
}

/// QEMU: calls before the features, memory, then each ring with its kick before its call.
fn qemu() -> Vec<Request> {
    let mut order = vec![
        Request::GetFeatures,
        Request::GetProtocolFeatures,
        protocol(PLAIN),
        Request::GetQueueNum,
        Request::GetMaxMemSlots,
        Request::SetOwner,
        Request::GetFeatures,
        call(0),
        call(1),
        features(PROTOCOL),
        whole_memory(),
    ];
    for ring in [0, 1] {
        let rest = [size(ring, 256), base(ring, BASE), place(ring)];
        order.extend(rest);
        order.extend([kick(ring as u8), call(ring as u8)]);
    }
    order.extend([enable(0, 1), enable(1, 1)]);
    order
}

/// DPDK's virtio-user: the status from the beginning, the driver ready at last.
fn virtio_user() -> Vec<Request> {
    let all = ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK | ProtocolFeatures::STATUS;
    let mut order = vec![
        Request::SetOwner,
        Request::GetFeatures,
        Request::GetProtocolFeatures,
        protocol(all.bits()),
        Request::SetStatus(0),
        Request::SetStatus(1),
        Request::SetStatus(3),
        call(0),
        call(1),
        features(PROTOCOL),
        Request::SetStatus(11),
        Request::GetStatus,
        whole_memory(),
    ];
    for ring in [0, 1] {
        order.extend([size(ring, 256), base(ring, BASE), place(ring)]);
        order.push(kick(ring as u8));
    }
    order.extend([enable(0, 1), enable(1, 1), Request::SetStatus(15)]);
    order
}

/// A front-end from before protocol features: rings need no enabling.
fn old() -> Vec<Request> {
    let mut order = vec![
        Request::SetOwner,
        Request::GetFeatures,
        features(0),
        whole_memory(),
    ];
    for ring in [0, 1] {
        order.extend([size(ring, 256), place(ring), base(ring, BASE)]);
        order.extend([kick(ring as u8), call(ring as u8)]);
    }
    order
}

/// rust-vmm's front-ends: call before kick, everything of one ring and then it is enabled.
fn rust_vmm() -> Vec<Request> {
    let mut order = vec![
        Request::SetOwner,
        Request::GetFeatures,
        features(PROTOCOL),
        Request::GetProtocolFeatures,
        protocol(PLAIN),
        whole_memory(),
    ];
    for ring in [0, 1] {
        order.extend([size(ring, 256), place(ring), base(ring, BASE)]);
        order.extend([call(ring as u8), kick(ring as u8), enable(ring, 1)]);
    }
    order
}

fn rings_before_memory() -> Vec<Request> {
    let mut order = vec![protocol(PLAIN), features(PROTOCOL)];
    for ring in [0, 1] {
        order.extend([size(ring, 256), base(ring, BASE), place(ring)]);
        order.extend([call(ring as u8), kick(ring as u8), enable(ring, 1)]);
    }
    order.push(whole_memory());
    order
}

fn kick_before_everything_else_of_a_ring() -> Vec<Request> {
    let mut order = vec![protocol(PLAIN), features(PROTOCOL), whole_memory()];
    for ring in [0, 1] {
        order.extend([enable(ring, 1), kick(ring as u8), call(ring as u8)]);
        order.extend([base(ring, BASE), size(ring, 256), place(ring)]);
    }
    order
}

fn features_at_last() -> Vec<Request> {
    let mut order = vec![protocol(PLAIN), whole_memory()];
    for ring in [0, 1] {
        order.extend([size(ring, 256), base(ring, BASE), place(ring)]);
        order.extend([call(ring as u8), kick(ring as u8), enable(ring, 1)]);
    }
    order.push(features(PROTOCOL));
    order
}

/// Memory that comes in slots, with the rings told between them.
fn memory_in_slots() -> Vec<Request> {
    let half = MEMORY.size / 2;
    let second = MemoryRegion {
        guest_addr: MEMORY.guest_addr + half,
        user_addr: MEMORY.user_addr + half,
        size: half,
        mmap_offset: half,
    };
    let first = MemoryRegion {
        size: half,
        ..MEMORY
    };
    let mut order = vec![
        features(PROTOCOL),
        protocol(PLAIN),
        Request::GetMaxMemSlots,
        Request::AddMemReg(SingleRegion(second)),
    ];
    for ring in [0, 1] {
        order.extend([size(ring, 256), base(ring, BASE), place(ring)]);
        order.extend([call(ring as u8), enable(ring, 1)]);
    }
    order.push(Request::AddMemReg(SingleRegion(first)));
    order.extend([kick(0), kick(1)]);
    order
}

/// A guest reboots: its rings are stopped and told anew, the memory is not.
fn stopped_and_told_again() -> Vec<Request> {
    let mut order = qemu();
    order.extend([enable(0, 0), enable(1, 0), stop(0), stop(1)]);
    for ring in [0, 1] {
        order.extend([size(ring, 256), base(ring, BASE), place(ring)]);
        order.extend([kick(ring as u8), call(ring as u8)]);
    }
    order.extend([enable(0, 1), enable(1, 1)]);
    order
}

/// The driver's own reset, and a second beginning on the same connection.
fn reset_and_told_again() -> Vec<Request> {
    let mut order = virtio_user();
    order.push(Request::SetStatus(0));
    order.extend(virtio_user().into_iter().skip(5));
    order
}

/// Tells a scene everything in this order; our ends of the events that went with it, the latest of each kind and ring.
fn tell(
    scene: &mut Scene,
    order: &[Request],
    need_reply: bool,
) -> BTreeMap<(&'static str, u64), EventFd> {
    let mut ours = BTreeMap::new();
    for request in order {
        let fds: Vec<OwnedFd> = (0..request.descriptor_count().0)
            .map(|_| {
                let event = EventFd::new().unwrap();
                let theirs = event.try_clone().unwrap().into();
                if let Some(ring) = request.ring() {
                    ours.insert((request.kind().name(), ring), event);
                }
                theirs
            })
            .collect();
        scene.exchange_with(request, need_reply, &fds);
        let refused = scene.backend.last_refusal();
        assert!(refused.is_none(), "{}: {refused:?}", request.kind().name());
    }
    ours
}

#[test]
fn tb21_u5_every_order_ends_with_the_same_rings_running() {
    type Order = fn() -> Vec<Request>;
    let orders: [(&str, Order); 10] = [
        ("qemu", qemu),
        ("virtio-user", virtio_user),
        ("old", old),
        ("rust-vmm", rust_vmm),
        ("rings before memory", rings_before_memory),
        ("kick first", kick_before_everything_else_of_a_ring),
        ("features last", features_at_last),
        ("memory in slots", memory_in_slots),
        ("stopped and told again", stopped_and_told_again),
        ("reset and told again", reset_and_told_again),
    ];
    for (name, order) in orders {
        for need_reply in [false, true] {
            let mut scene = Scene::new();
            let ours = tell(&mut scene, &order(), need_reply);
            assert_eq!(scene.device.features, Some(VERSION_1), "{name}");
            let running: Vec<_> = scene.device.rings.keys().copied().collect();
            assert_eq!(running, [0, 1], "{name}");
            for (&ring, setup) in &scene.device.rings {
                let what = format!("{name}, ring {ring}");
                let wire = ring_at(ring as u32);
                let place = setup.addresses;
                assert_eq!((setup.size, setup.base), (256, BASE), "{what}");
                assert_eq!(
                    (place.descriptor_area, place.driver_area, place.device_area),
                    (wire.desc, wire.avail, wire.used),
                    "{what}"
                );
                assert!(setup.enabled, "{what}");
                let state = scene.backend.ring_state(ring);
                assert_eq!(state.access(), RingAccess::Full, "{what}");

                // The events are the ones that were sent last, and not each other's.
                let (kick, call) = (setup.kick.as_ref(), setup.call.as_ref());
                let (kick, call) = (kick.expect(&what), call.expect(&what));
                ours[&("SET_VRING_KICK", ring as u64)].signal().unwrap();
                assert!(kick.drain() && !call.drain(), "{what}");
                call.signal().unwrap();
                assert!(
                    ours[&("SET_VRING_CALL", ring as u64)].drain(),
                    "{what}: the call does not arrive"
                );
            }
        }
    }
}

#[test]
fn u10_rings_without_events_are_started_and_polled() {
    let mut scene = Scene::new();
    let nothing = |ring| VringFd::new(ring, false);
    let mut order = old();
    for request in &mut order {
        *request = match request {
            Request::SetVringKick(word) => Request::SetVringKick(nothing(word.index() as u8)),
            Request::SetVringCall(word) => Request::SetVringCall(nothing(word.index() as u8)),
            _ => continue,
        };
    }
    tell(&mut scene, &order, false);
    for setup in scene.device.rings.values() {
        assert!(setup.kick.is_none() && setup.call.is_none() && setup.enabled);
    }
    assert_eq!(scene.device.rings.len(), 2);
}

#[test]
fn a_ring_does_not_start_while_anything_is_missing() {
    // Everything that a ring needs, each once the last to come.
    let needs = [
        protocol(PLAIN | ProtocolFeatures::STATUS.bits()),
        features(PROTOCOL),
        whole_memory(),
        size(0, 256),
        place(0),
        kick(0),
        Request::SetStatus(15),
    ];
    for missing in 1..needs.len() {
        let mut scene = Scene::new();
        for (number, request) in needs.iter().enumerate() {
            if number != missing {
                scene.exchange(request);
            }
        }
        let name = needs[missing].kind().name();
        assert!(scene.device.rings.is_empty(), "without {name}");
        scene.exchange(&needs[missing]);
        assert_eq!(scene.device.rings.len(), 1, "after {name}");
    }
}

#[test]
fn four_queue_pairs_start_one_by_one() {
    let mut scene = Scene::offering(virtnet_vhost::Offer::new(
        VERSION_1 | RING_PACKED,
        ProtocolFeatures::all(),
        4,
    ));
    for request in [protocol(PLAIN), features(PROTOCOL), whole_memory()] {
        scene.exchange(&request);
    }
    for ring in 0..8_u32 {
        let word = ring as u8;
        // All of them may lie in one place: nobody looks there.
        let shared = virtnet_vhost::payload::VringAddresses {
            index: ring,
            ..ring_at(0)
        };
        let order = [
            size(ring, 1 << ring),
            base(ring, ring),
            Request::SetVringAddr(shared),
            kick(word),
            call(word),
            err(word),
            enable(ring, ring & 1),
        ];
        order
            .iter()
            .for_each(|request| drop(scene.exchange(request)));
        assert_eq!(scene.device.rings.len(), ring as usize + 1);
        let setup = &scene.device.rings[&(ring as usize)];
        assert_eq!(
            (setup.size, setup.base, setup.enabled),
            (1 << ring, ring, ring & 1 == 1)
        );
        assert!(setup.err.is_some());
    }
    // One of them stops; the others do not notice.
    scene.exchange(&stop(5));
    let running: Vec<_> = scene.device.rings.keys().copied().collect();
    assert_eq!(running, [0, 1, 2, 3, 4, 6, 7]);
}

#[test]
fn what_is_told_to_a_running_ring_reaches_the_device_and_nothing_else() {
    let mut scene = Scene::new();
    tell(&mut scene, &qemu(), false);
    scene.device.take_log();
    let moved = virtnet_vhost::payload::VringAddresses {
        desc: MEMORY.user_addr + 0x8000,
        ..ring_at(0)
    };
    let cases: [(Request, &[&str]); 9] = [
        (kick(0), &["kick"]),
        (call(0), &["call"]),
        (err(0), &["err"]),
        (enable(0, 0), &["enable"]),
        (Request::SetVringAddr(moved), &["addresses"]),
        (whole_memory(), &["memory"]),
        (features(PROTOCOL), &[]),
        (Request::SetOwner, &[]),
        (stop(0), &["stop"]),
    ];
    for (request, calls) in cases {
        assert!(scene.carries_out(&request), "{}", request.kind().name());
        assert_eq!(scene.take_calls(), calls, "{}", request.kind().name());
    }
}
