//! Descriptors: owned from the instant of their receipt, and closed on every way a message can go.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use virtnet_sys::{EventFd, Stream};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{Request, RequestKind};
use virtnet_vhost::payload::{MemoryRegion, MemoryTable, SingleRegion, VringFd};

use crate::fake::{BY_EVENTS, MEMORY, Scene, bytes};
use crate::words::{
    Reply, Witness, base, call, enable, err, event, kick, place, raw, size, stop, whole_memory,
};

fn witnesses(count: usize) -> (Vec<Witness>, Vec<OwnedFd>) {
    (0..count).map(|_| Witness::new()).unzip()
}

/// Sends bytes with descriptors whose fate is known, and keeps none of them here.
fn send(scene: &Scene, bytes: &[u8], count: usize) -> Vec<Witness> {
    let (seen, given) = witnesses(count);
    let fds: Vec<_> = given.iter().map(AsFd::as_fd).collect();
    scene.send(bytes, &fds);
    seen
}

#[track_caller]
fn assert_closed(mut seen: Vec<Witness>) {
    seen.iter_mut().for_each(Witness::assert_closed);
}

/// Whether one acknowledgement came, and what it said.
#[track_caller]
fn acknowledged(scene: &Scene) -> bool {
    let replies = Reply::of(&scene.answers());
    assert_eq!(replies.len(), 1, "{replies:?}");
    replies[0].payload == [0; 8]
}

/// Rings 0 and 1 of four run.
fn running() -> Scene {
    let mut scene = Scene::negotiated(BY_EVENTS.difference(ProtocolFeatures::STATUS));
    scene.exchange(&whole_memory());
    for ring in [0, 1] {
        for request in [size(ring, 256), base(ring, 0), place(ring), enable(ring, 1)] {
            scene.exchange(&request);
        }
        scene.exchange(&kick(ring as u8));
    }
    assert_eq!(scene.device.rings.len(), 2);
    scene
}

#[test]
fn tb10_tb12_a_wrong_number_of_descriptors_is_refused_and_all_are_closed() {
    let nofd = |ring| VringFd::new(ring, false);
    let two = MemoryRegion {
        guest_addr: 1 << 40,
        user_addr: 1 << 20,
        ..MEMORY
    };
    let requests = [
        (Request::SetOwner, 0),
        (size(0, 64), 0),
        (whole_memory(), 1),
        (Request::SetMemTable(MemoryTable(vec![MEMORY, two])), 2),
        (Request::AddMemReg(SingleRegion(two)), 1),
        (kick(2), 1),
        (call(2), 1),
        (err(2), 1),
        (Request::SetVringKick(nofd(2)), 0),
        (Request::SetVringCall(nofd(2)), 0),
        (Request::SetVringErr(nofd(2)), 0),
    ];
    for (request, right) in requests {
        for count in [0, 1, 2, 3, 8, 9, 33, 253] {
            if count == right {
                continue;
            }
            let mut scene = running();
            scene.device.take_log();
            let seen = send(&scene, &bytes(&request, true), count);
            scene.serve().unwrap();
            assert!(!acknowledged(&scene), "{request:?} with {count}");
            assert_closed(seen);
            assert_eq!(scene.take_calls(), [""; 0]);
        }
    }
}

#[test]
fn tb10_descriptors_beside_a_question_are_closed_and_it_is_not_answered() {
    let mut scene = running();
    for request in [
        Request::GetFeatures,
        Request::GetQueueNum,
        Request::GetMaxMemSlots,
        stop(0),
    ] {
        let seen = send(&scene, &bytes(&request, false), 2);
        scene.serve().unwrap();
        let replies = Reply::of(&scene.answers());
        assert_eq!(replies.len(), 1);
        assert!(replies[0].payload.is_empty());
        assert_closed(seen);
    }
    assert_eq!(scene.device.rings.len(), 2, "the ring goes on");
}

#[test]
fn tb5_descriptors_of_an_unknown_request_are_closed() {
    let mut scene = running();
    for code in [0, 46, 47, 100, u32::MAX] {
        let seen = send(&scene, &raw(code, 9, &[1; 100]), 5);
        scene.serve().unwrap();
        assert!(!acknowledged(&scene));
        assert_closed(seen);
        // Without need-reply there is silence.
        let seen = send(&scene, &raw(code, 1, &[1; 100]), 5);
        scene.serve().unwrap();
        assert_eq!(scene.answers(), [0; 0]);
        assert_closed(seen);
    }
    assert!(scene.carries_out(&Request::SetOwner));
}

#[test]
fn tb13_descriptors_in_the_middle_of_a_message_are_closed_and_it_is_refused() {
    for at in [1, 5, 12, 15, 19] {
        let mut scene = running();
        let message = bytes(&kick(0), true);
        scene.send(&message[..at], &[]);
        scene.serve().unwrap();
        let seen = send(&scene, &message[at..], 1);
        scene.serve().unwrap();
        assert!(!acknowledged(&scene), "at {at}");
        let refusal = scene.backend.last_refusal().unwrap().to_string();
        assert!(refusal.contains("SET_VRING_KICK"), "{refusal}");
        assert_closed(seen);
        // The next message starts afresh.
        assert!(scene.carries_out(&kick(0)));
    }
}

#[test]
fn tb13_descriptors_at_the_first_byte_and_at_another_are_all_closed() {
    let mut scene = running();
    let message = bytes(&kick(0), true);
    let first = send(&scene, &message[..3], 1);
    let second = send(&scene, &message[3..], 1);
    scene.serve().unwrap();
    assert!(!acknowledged(&scene));
    assert_closed(first);
    assert_closed(second);
}

#[test]
fn tb11_more_descriptors_than_regions_are_all_closed() {
    let regions: Vec<_> = (0..8)
        .map(|n| MemoryRegion {
            guest_addr: n << 30,
            user_addr: n << 31,
            ..MEMORY
        })
        .collect();
    let table = Request::SetMemTable(MemoryTable(regions));
    for count in [7, 9, 253] {
        let mut scene = running();
        let seen = send(&scene, &bytes(&table, true), count);
        scene.serve().unwrap();
        assert!(!acknowledged(&scene), "{count}");
        assert_closed(seen);
        assert_eq!(scene.device.regions.len(), 1, "the old memory stays");
    }
    let mut scene = running();
    let seen = send(&scene, &bytes(&table, true), 8);
    scene.serve().unwrap();
    assert!(acknowledged(&scene));
    assert_eq!(scene.device.regions.len(), 8);
    drop(scene);
    assert_closed(seen);
}

#[test]
fn u17_a_region_that_goes_may_bring_one_descriptor_which_is_closed() {
    let region = SingleRegion(MemoryRegion {
        guest_addr: 1 << 40,
        user_addr: 1 << 20,
        ..MEMORY
    });
    let mut scene = running();
    for (count, accepted) in [(0, true), (1, true), (2, false)] {
        assert!(scene.carries_out(&Request::AddMemReg(region)));
        let seen = send(&scene, &bytes(&Request::RemMemReg(region), true), count);
        scene.serve().unwrap();
        assert_eq!(acknowledged(&scene), accepted, "{count}");
        assert_closed(seen);
    }
}

#[test]
fn tb16_what_is_no_event_is_refused_by_name_and_closed() {
    let (socket, other_end) = Stream::pair().unwrap();
    let path = File::open("/proc/self/exe").unwrap();
    let kinds: [(OwnedFd, &str); 4] = [
        (socket.into(), "socket"),
        (path.into(), "regular file"),
        (File::open("/").unwrap().into(), "directory"),
        (File::open("/dev/null").unwrap().into(), "device"),
    ];
    let mut scene = running();
    for (fd, name) in kinds {
        for request in [kick(0), call(0), err(0), kick(2)] {
            scene.send(&bytes(&request, true), &[fd.as_fd()]);
            scene.serve().unwrap();
            assert!(!acknowledged(&scene), "{name}");
            let refusal = scene.backend.last_refusal().unwrap().to_string();
            assert!(refusal.contains(name), "{refusal}");
        }
    }
    // Nobody has the socket any more: it was not kept.
    let mut buffer = [0; 1];
    assert_eq!(other_end.recv(&mut buffer, &mut Vec::new()).unwrap(), 0);
    assert!(scene.device.rings[&0].kick.is_some(), "the old kick stays");
}

#[test]
fn tb17_one_event_may_serve_in_several_roles() {
    let mut scene = running();
    let shared = EventFd::new().unwrap();
    for request in [kick(0), kick(1), call(0), call(1), err(0)] {
        scene.send(&bytes(&request, true), &[shared.as_fd()]);
        scene.serve().unwrap();
        assert!(acknowledged(&scene), "{request:?}");
    }
    shared.signal().unwrap();
    assert!(scene.device.rings[&0].kick.as_ref().unwrap().drain());
}

#[test]
fn tb18_only_the_latest_event_of_a_thousand_is_kept() {
    let mut scene = running();
    for request in [kick(0), call(0), err(0), kick(3), call(3), err(3)] {
        let mut all = Vec::new();
        for _ in 0..200 {
            all.extend(send(&scene, &bytes(&request, true), 1));
            scene.serve().unwrap();
            assert!(acknowledged(&scene));
        }
        let latest = all.pop().unwrap();
        assert_closed(all);
        // And that one goes when the ring is told to do without.
        let word = VringFd::new(request.ring().unwrap() as u8, false);
        let without = match request {
            Request::SetVringKick(_) => Request::SetVringKick(word),
            Request::SetVringCall(_) => Request::SetVringCall(word),
            _ => Request::SetVringErr(word),
        };
        assert!(scene.carries_out(&without));
        assert_closed(vec![latest]);
    }
}

#[test]
fn u8_the_kick_of_a_stopped_ring_is_closed_and_its_call_kept() {
    let mut scene = running();
    let kicked = send(&scene, &bytes(&kick(0), false), 1);
    let called = send(&scene, &bytes(&call(0), false), 1);
    scene.serve().unwrap();
    scene.exchange(&stop(0));
    assert_closed(kicked);
    scene.exchange(&kick(0));
    assert!(scene.device.rings[&0].call.is_some());
    drop(scene);
    assert_closed(called);
}

#[test]
fn u15_memory_that_is_replaced_is_closed_at_once() {
    let mut scene = running();
    let first = send(&scene, &bytes(&whole_memory(), true), 1);
    scene.serve().unwrap();
    assert!(acknowledged(&scene));
    let second = send(&scene, &bytes(&whole_memory(), true), 1);
    scene.serve().unwrap();
    assert!(acknowledged(&scene));
    assert_closed(first);
    // What the device refuses is closed too, and the memory before it stays.
    scene.device.refuses = Some("memory");
    let refused = send(&scene, &bytes(&whole_memory(), true), 1);
    scene.serve().unwrap();
    assert!(!acknowledged(&scene));
    assert_closed(refused);
    assert_eq!(scene.device.regions.len(), 1);
    drop(scene);
    assert_closed(second);
}

/// Every request there is, with one descriptor too many and with exactly enough, on the way to being refused or served.
#[test]
fn u13_nothing_of_any_request_outlives_the_connection() {
    for kind in RequestKind::ALL {
        let Some(request) = (0..=64).find_map(|n| Request::decode(*kind, &vec![0; n])) else {
            continue;
        };
        let (least, _) = request.descriptor_count();
        for count in [least, least + 1] {
            let mut scene = running();
            let seen = send(&scene, &bytes(&request, true), count);
            scene.serve().unwrap();
            drop(scene);
            assert_closed(seen);
        }
    }
}

#[test]
fn tb16_events_of_a_peer_never_make_us_wait() {
    let mut scene = running();
    // A pipe that is full, and one that nobody reads: the device may signal them.
    let (reader, writer) = std::io::pipe().unwrap();
    scene.send(&bytes(&call(0), true), &[writer.as_fd()]);
    scene.serve().unwrap();
    assert!(acknowledged(&scene));
    let called = scene.device.rings[&0].call.clone().unwrap();
    (0..20_000).for_each(|_| called.signal().unwrap());
    drop(reader);
    called.signal().unwrap_err();
    drop(event());
}
