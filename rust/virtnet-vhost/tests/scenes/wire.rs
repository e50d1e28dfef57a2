//! Every byte of what comes back, and every place at which what goes in may be cut.

use std::os::fd::AsFd;

use virtnet_sys::{EventFd, Stream};
use virtnet_vhost::message::{Reply as Form, Request, RequestKind};
use virtnet_vhost::payload::Config;
use virtnet_vhost::{Backend, Offer, ProtocolFeatures, SessionError};

use crate::fake::{BY_EVENTS, FakeDevice, RING_PACKED, Scene, VERSION_1, bytes};
use crate::words::{
    Reply, Witness, base, call, enable, events_for, kick, place, raw, size, stop, whole_memory,
};

fn numbers(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn u1_answers_have_exactly_these_bytes() {
    let config = |offset, n| {
        Request::GetConfig(Config {
            offset,
            flags: 1,
            data: vec![0xee; n],
        })
    };
    // Request, flags of the reply (never anything but version and reply), size, payload.
    let cases = [
        (
            Request::GetFeatures,
            numbers(&[1, 5, 8, 1 << 30 | 1 << 26, 1 | 1 << 2]),
        ),
        (
            Request::GetProtocolFeatures,
            numbers(&[15, 5, 8, 0b1011_1001_1011_0111_0011_1111, 0]),
        ),
        (Request::GetQueueNum, numbers(&[17, 5, 8, 2, 0])),
        (Request::GetMaxMemSlots, numbers(&[36, 5, 8, 509, 0])),
        (Request::GetStatus, numbers(&[40, 5, 8, 0, 0])),
        (stop(3), numbers(&[11, 5, 8, 3, 0])),
        (
            config(4, 6),
            [numbers(&[24, 5, 18, 4, 6, 1]), vec![4, 5, 6, 7, 8, 9]].concat(),
        ),
        // Beyond the device's own there are zeros.
        (
            config(38, 4),
            [numbers(&[24, 5, 16, 38, 4, 1]), vec![38, 39, 0, 0]].concat(),
        ),
        // A question that is refused is answered by nothing at all.
        (config(255, 4), numbers(&[24, 5, 0])),
        (stop(4), numbers(&[11, 5, 0])),
    ];
    for need_reply in [false, true] {
        let mut scene = Scene::negotiated(BY_EVENTS);
        scene.device.config = (0..40).collect();
        for (request, expected) in &cases {
            let found = scene.exchange_with(request, need_reply, &[]);
            assert_eq!(found, *expected, "{request:?}");
        }
    }
}

#[test]
fn u1_acknowledgements_have_exactly_these_bytes() {
    let mut scene = Scene::negotiated(BY_EVENTS.difference(ProtocolFeatures::STATUS));
    let mut ask = |request: &Request| scene.exchange_with(request, true, &events_for(request));
    assert_eq!(ask(&size(0, 256)), numbers(&[8, 5, 8, 0, 0]));
    assert_eq!(ask(&size(0, 255)), numbers(&[8, 5, 8, 1, 0]));
    assert_eq!(ask(&whole_memory()), numbers(&[5, 5, 8, 0, 0]));
    // No structure, no such request, nothing to do with this device: a refusal has always the same form.
    let mut send = |bytes: Vec<u8>| {
        scene.send(&bytes, &[]);
        scene.serve().unwrap();
        scene.answers()
    };
    assert_eq!(send(raw(8, 9, &[0; 7])), numbers(&[8, 5, 8, 1, 0]));
    assert_eq!(send(raw(77, 9, &[0; 7])), numbers(&[77, 5, 8, 1, 0]));
    assert_eq!(send(raw(0, 9, &[])), numbers(&[0, 5, 8, 1, 0]));
    assert_eq!(send(raw(33, 9, &[])), numbers(&[33, 5, 8, 1, 0]));
    // Other flags are nobody's business, and not echoed.
    assert_eq!(send(raw(3, 0xffff_fff9, &[])), numbers(&[3, 5, 8, 0, 0]));
}

#[test]
fn u3_tb8_every_request_is_answered_by_the_rules_and_once() {
    for ack in [false, true] {
        for need_reply in [false, true] {
            for kind in RequestKind::ALL {
                let mut protocol = BY_EVENTS;
                protocol.set(ProtocolFeatures::REPLY_ACK, ack);
                let mut scene = Scene::negotiated(protocol);
                let zeros = (0..=64).find_map(|n| Request::decode(*kind, &vec![0; n]));
                let Some(request) = zeros else { continue };
                // Setting the protocol features is answered by the new ones: take none of them away.
                let request = match request {
                    Request::SetProtocolFeatures(_) => {
                        Request::SetProtocolFeatures(protocol.bits())
                    }
                    request => request,
                };
                let found = Reply::of(&scene.exchange(&request).clone());
                let found = if need_reply {
                    Reply::of(&scene.exchange_with(&request, true, &events_for(&request)))
                } else {
                    found
                };
                let name = kind.name();
                // The log is a file here, and the answer to it is its own.
                let own = kind.reply() != Form::Ack;
                let due = usize::from(own || ack && need_reply);
                assert_eq!(found.len(), due, "{name}: {found:?}");
                for reply in found {
                    assert_eq!((reply.code, reply.flags), (kind.code(), 5), "{name}");
                    if !own {
                        assert_eq!(reply.payload.len(), 8, "{name}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_the_device_refuses_of_a_running_ring_leaves_it_as_it_was() {
    let cases = [
        ("kick", kick(0)),
        ("call", call(0)),
        ("err", crate::words::err(0)),
        ("addresses", place(1)),
    ];
    for (name, request) in cases {
        let mut scene = running();
        let before = format!("{:?}", scene.backend.session());
        scene.device.refuses = Some(name);
        assert!(!scene.carries_out(&request), "{name}");
        assert_eq!(format!("{:?}", scene.backend.session()), before, "{name}");
        assert_eq!(scene.device.rings.len(), 2);
    }
}

/// Rings 0 and 1 run.
fn running() -> Scene {
    let mut scene = Scene::negotiated(BY_EVENTS.difference(ProtocolFeatures::STATUS));
    scene.exchange(&whole_memory());
    for ring in [0, 1] {
        for request in [size(ring, 256), base(ring, 3), place(ring)] {
            scene.exchange(&request);
        }
        scene.exchange(&kick(ring as u8));
        scene.exchange(&enable(ring, 1));
    }
    assert_eq!(scene.device.rings.len(), 2);
    scene.device.take_log();
    scene
}

#[test]
fn u8_tb33_bases_of_both_formats_come_back_whole() {
    for (more, told) in [
        (0, 0xfffe),
        (RING_PACKED, 0x8005_0003),
        (RING_PACKED, 0x0005_8003),
    ] {
        let mut scene = Scene::new();
        scene.exchange(&Request::SetFeatures(VERSION_1 | more));
        scene.exchange(&whole_memory());
        for request in [size(0, 256), base(0, told), place(0), kick(0)] {
            scene.exchange(&request);
        }
        assert_eq!(scene.device.rings[&0].base, told);
        scene.device.base = told + 1;
        assert_eq!(scene.exchange(&stop(0)), numbers(&[11, 5, 8, 0, told + 1]));
    }
}

#[test]
fn tb3_messages_in_heaps_cut_anywhere_mean_the_same() {
    let order = [
        Request::SetOwner,
        Request::SetFeatures(VERSION_1),
        size(0, 8),
        Request::GetFeatures,
        size(1, 16),
        Request::GetQueueNum,
    ];
    let heap: Vec<u8> = order.iter().flat_map(|r| bytes(r, false)).collect();
    let mut expected = None;
    for cut in 0..heap.len() {
        let mut scene = Scene::new();
        scene.send(&heap[..cut], &[]);
        scene.serve().unwrap();
        scene.send(&heap[cut..], &[]);
        scene.serve().unwrap();
        let found = (scene.answers(), format!("{:?}", scene.backend.session()));
        assert_eq!(
            *expected.get_or_insert_with(|| found.clone()),
            found,
            "{cut}"
        );
    }
}

#[test]
fn tb7_a_memory_table_that_counts_wrongly_is_refused() {
    let table = |count: u32, regions: usize| {
        let mut payload = [count.to_ne_bytes(), [0; 4]].concat();
        for number in 0..regions as u64 {
            let words = [number << 20, 0x1000, number << 30, 0];
            payload.extend(words.map(u64::to_ne_bytes).concat());
        }
        raw(5, 9, &payload)
    };
    let cases = [
        (2, 1),
        (1, 2),
        (0, 1),
        (u32::MAX, 1),
        (1 << 27, 0),
        (128, 126),
    ];
    for (count, regions) in cases {
        let mut scene = Scene::negotiated(ProtocolFeatures::REPLY_ACK);
        let event = EventFd::new().unwrap();
        scene.send(&table(count, regions), &[event.as_fd()]);
        scene.serve().unwrap();
        let replies = Reply::of(&scene.answers());
        assert_ne!(replies[0].payload, [0; 8], "{count} of {regions}");
        assert_eq!(scene.take_calls(), [""; 0]);
    }
}

#[test]
fn te7_a_peer_that_leaves_at_any_byte_leaves_nothing_behind() {
    let order = [whole_memory(), size(0, 256), place(0), call(0), kick(0)];
    let handshake: Vec<Vec<u8>> = order.iter().map(|r| bytes(r, false)).collect();
    let total: usize = handshake.iter().map(Vec::len).sum();
    for stop in 0..=total {
        let (peer, stream) = Stream::pair().unwrap();
        let mut backend = Backend::new(stream, Offer::new(VERSION_1, ProtocolFeatures::empty(), 1));
        let mut device = FakeDevice::default();
        let mut witnesses = Vec::new();
        let mut left = stop;
        peer.send(&bytes(&Request::SetFeatures(VERSION_1), false), &[])
            .unwrap();
        for (request, message) in order.iter().zip(&handshake) {
            let some = left.min(message.len());
            if some == 0 {
                break;
            }
            let (seen, given): (Vec<_>, Vec<_>) = (0..request.descriptor_count().0)
                .map(|_| Witness::new())
                .unzip();
            let fds: Vec<_> = given.iter().map(AsFd::as_fd).collect();
            peer.send(&message[..some], &fds).unwrap();
            witnesses.extend(seen);
            left -= some;
        }
        drop(peer);
        let error = backend.on_readable(&mut device).unwrap_err();
        assert!(matches!(error, SessionError::Disconnected), "{error}");
        assert!(device.disconnected == 1);
        drop((backend, device));
        witnesses.iter_mut().for_each(Witness::assert_closed);
    }
}
