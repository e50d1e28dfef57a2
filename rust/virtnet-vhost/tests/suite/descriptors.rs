//! Descriptors: owned from the instant of their receipt, and closed on every way a message can go.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use virtnet_sys::{EventFd, Stream};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{Request, RequestKind};
use virtnet_vhost::payload::{MemoryRegion, MemoryTable, SingleRegion, VringFd};

use crate::line::{
    Line, MEMORY, Reply, Witness, base, bytes, call, enable, err, event, kick, memory, place, raw,
    size, stop,
};

fn witnesses(count: usize) -> (Vec<Witness>, Vec<OwnedFd>) {
    (0..count).map(|_| Witness::new()).unzip()
}

/// Sends bytes with descriptors whose fate is known, and keeps none of them here.
fn send(line: &Line, bytes: &[u8], count: usize) -> Vec<Witness> {
    let (seen, given) = witnesses(count);
    let fds: Vec<_> = given.iter().map(AsFd::as_fd).collect();
    line.send(bytes, &fds);
    seen
}

#[track_caller]
fn assert_closed(mut seen: Vec<Witness>) {
    seen.iter_mut().for_each(Witness::assert_closed);
}

/// Whether one acknowledgement came, and what it said.
#[track_caller]
fn acknowledged(line: &Line) -> bool {
    let replies = Reply::of(&line.answer());
    assert_eq!(replies.len(), 1, "{replies:?}");
    replies[0].payload == [0; 8]
}

/// Rings 0 and 1 of four run.
fn running() -> Line {
    let mut line = Line::agreed(ProtocolFeatures::BACKEND.difference(ProtocolFeatures::STATUS));
    line.tell(&memory());
    for ring in [0, 1] {
        for request in [size(ring, 256), base(ring, 0), place(ring), enable(ring, 1)] {
            line.tell(&request);
        }
        line.tell(&kick(ring as u8));
    }
    assert_eq!(line.device.rings.len(), 2);
    line
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
        (memory(), 1),
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
            let mut line = running();
            line.device.calls.clear();
            let seen = send(&line, &bytes(&request, true), count);
            line.serve().unwrap();
            assert!(!acknowledged(&line), "{request:?} with {count}");
            assert_closed(seen);
            assert_eq!(line.device.take_calls(), [""; 0]);
        }
    }
}

#[test]
fn tb10_descriptors_beside_a_question_are_closed_and_it_is_not_answered() {
    let mut line = running();
    for request in [
        Request::GetFeatures,
        Request::GetQueueNum,
        Request::GetMaxMemSlots,
        stop(0),
    ] {
        let seen = send(&line, &bytes(&request, false), 2);
        line.serve().unwrap();
        let replies = Reply::of(&line.answer());
        assert_eq!(replies.len(), 1);
        assert!(replies[0].payload.is_empty());
        assert_closed(seen);
    }
    assert_eq!(line.device.rings.len(), 2, "the ring goes on");
}

#[test]
fn tb5_descriptors_of_an_unknown_request_are_closed() {
    let mut line = running();
    for code in [0, 45, 46, 100, u32::MAX] {
        let seen = send(&line, &raw(code, 9, &[1; 100]), 5);
        line.serve().unwrap();
        assert!(!acknowledged(&line));
        assert_closed(seen);
        // Without need-reply there is silence.
        let seen = send(&line, &raw(code, 1, &[1; 100]), 5);
        line.serve().unwrap();
        assert_eq!(line.answer(), [0; 0]);
        assert_closed(seen);
    }
    assert!(line.ask(&Request::SetOwner));
}

#[test]
fn tb13_descriptors_in_the_middle_of_a_message_are_closed_and_it_is_refused() {
    for at in [1, 5, 12, 15, 19] {
        let mut line = running();
        let message = bytes(&kick(0), true);
        line.send(&message[..at], &[]);
        line.serve().unwrap();
        let seen = send(&line, &message[at..], 1);
        line.serve().unwrap();
        assert!(!acknowledged(&line), "at {at}");
        let refusal = line.backend.last_refusal().unwrap().to_string();
        assert!(refusal.contains("SET_VRING_KICK"), "{refusal}");
        assert_closed(seen);
        // The next message starts afresh.
        assert!(line.ask(&kick(0)));
    }
}

#[test]
fn tb13_descriptors_at_the_first_byte_and_at_another_are_all_closed() {
    let mut line = running();
    let message = bytes(&kick(0), true);
    let first = send(&line, &message[..3], 1);
    let second = send(&line, &message[3..], 1);
    line.serve().unwrap();
    assert!(!acknowledged(&line));
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
        let mut line = running();
        let seen = send(&line, &bytes(&table, true), count);
        line.serve().unwrap();
        assert!(!acknowledged(&line), "{count}");
        assert_closed(seen);
        assert_eq!(line.device.regions.len(), 1, "the old memory stays");
    }
    let mut line = running();
    let seen = send(&line, &bytes(&table, true), 8);
    line.serve().unwrap();
    assert!(acknowledged(&line));
    assert_eq!(line.device.regions.len(), 8);
    drop(line);
    assert_closed(seen);
}

#[test]
fn u17_a_region_that_goes_may_bring_one_descriptor_which_is_closed() {
    let region = SingleRegion(MemoryRegion {
        guest_addr: 1 << 40,
        user_addr: 1 << 20,
        ..MEMORY
    });
    let mut line = running();
    for (count, accepted) in [(0, true), (1, true), (2, false)] {
        assert!(line.ask(&Request::AddMemReg(region)));
        let seen = send(&line, &bytes(&Request::RemMemReg(region), true), count);
        line.serve().unwrap();
        assert_eq!(acknowledged(&line), accepted, "{count}");
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
    let mut line = running();
    for (fd, name) in kinds {
        for request in [kick(0), call(0), err(0), kick(2)] {
            line.send(&bytes(&request, true), &[fd.as_fd()]);
            line.serve().unwrap();
            assert!(!acknowledged(&line), "{name}");
            let refusal = line.backend.last_refusal().unwrap().to_string();
            assert!(refusal.contains(name), "{refusal}");
        }
    }
    // Nobody has the socket any more: it was not kept.
    let mut buffer = [0; 1];
    assert_eq!(other_end.recv(&mut buffer, &mut Vec::new()).unwrap(), 0);
    assert!(line.device.rings[&0].kick.is_some(), "the old kick stays");
}

#[test]
fn tb17_one_event_may_serve_in_several_roles() {
    let mut line = running();
    let shared = EventFd::new().unwrap();
    for request in [kick(0), kick(1), call(0), call(1), err(0)] {
        line.send(&bytes(&request, true), &[shared.as_fd()]);
        line.serve().unwrap();
        assert!(acknowledged(&line), "{request:?}");
    }
    shared.signal().unwrap();
    assert!(line.device.rings[&0].kick.as_ref().unwrap().drain());
}

#[test]
fn tb18_only_the_latest_event_of_a_thousand_is_kept() {
    let mut line = running();
    for request in [kick(0), call(0), err(0), kick(3), call(3), err(3)] {
        let mut all = Vec::new();
        for _ in 0..200 {
            all.extend(send(&line, &bytes(&request, true), 1));
            line.serve().unwrap();
            assert!(acknowledged(&line));
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
        assert!(line.ask(&without));
        assert_closed(vec![latest]);
    }
}

#[test]
fn u8_the_kick_of_a_stopped_ring_is_closed_and_its_call_kept() {
    let mut line = running();
    let kicked = send(&line, &bytes(&kick(0), false), 1);
    let called = send(&line, &bytes(&call(0), false), 1);
    line.serve().unwrap();
    line.tell(&stop(0));
    assert_closed(kicked);
    line.tell(&kick(0));
    assert!(line.device.rings[&0].call.is_some());
    drop(line);
    assert_closed(called);
}

#[test]
fn u15_memory_that_is_replaced_is_closed_at_once() {
    let mut line = running();
    let first = send(&line, &bytes(&memory(), true), 1);
    line.serve().unwrap();
    assert!(acknowledged(&line));
    let second = send(&line, &bytes(&memory(), true), 1);
    line.serve().unwrap();
    assert!(acknowledged(&line));
    assert_closed(first);
    // What the device refuses is closed too, and the memory before it stays.
    line.device.refuses = Some("set_memory");
    let refused = send(&line, &bytes(&memory(), true), 1);
    line.serve().unwrap();
    assert!(!acknowledged(&line));
    assert_closed(refused);
    assert_eq!(line.device.regions.len(), 1);
    drop(line);
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
            let mut line = running();
            let seen = send(&line, &bytes(&request, true), count);
            line.serve().unwrap();
            drop(line);
            assert_closed(seen);
        }
    }
}

#[test]
fn tb16_events_of_a_peer_never_make_us_wait() {
    let mut line = running();
    // A pipe that is full, and one that nobody reads: the device may signal them.
    let (reader, writer) = std::io::pipe().unwrap();
    line.send(&bytes(&call(0), true), &[writer.as_fd()]);
    line.serve().unwrap();
    assert!(acknowledged(&line));
    let called = line.device.rings[&0].call.clone().unwrap();
    (0..20_000).for_each(|_| called.signal().unwrap());
    drop(reader);
    called.signal().unwrap_err();
    drop(event());
}
