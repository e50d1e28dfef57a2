//! Every byte of what comes back, and every place at which what goes in may be cut.

use std::os::fd::AsFd;

use virtnet_sys::{EventFd, Stream};
use virtnet_vhost::message::{Reply as Form, Request, RequestKind};
use virtnet_vhost::payload::Config;
use virtnet_vhost::{Backend, Offer, ProtocolFeatures, SessionError};

use crate::device::Recorder;
use crate::line::{
    Line, PACKED, Reply, VERSION_1, Witness, base, bytes, call, enable, events_for, kick, memory,
    place, raw, size, stop,
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
            numbers(&[1, 5, 8, 1 << 30, 1 | 1 << 2]),
        ),
        (
            Request::GetProtocolFeatures,
            numbers(&[15, 5, 8, 0b1_1010_0010_0001_1101, 0]),
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
        let mut line = Line::agreed(ProtocolFeatures::BACKEND);
        for (request, expected) in &cases {
            let found = line.tell_with(request, need_reply, &[]);
            assert_eq!(found, *expected, "{request:?}");
        }
    }
}

#[test]
fn u1_acknowledgements_have_exactly_these_bytes() {
    let mut line = Line::agreed(ProtocolFeatures::BACKEND.difference(ProtocolFeatures::STATUS));
    let mut ask = |request: &Request| line.tell_with(request, true, &events_for(request));
    assert_eq!(ask(&size(0, 256)), numbers(&[8, 5, 8, 0, 0]));
    assert_eq!(ask(&size(0, 255)), numbers(&[8, 5, 8, 1, 0]));
    assert_eq!(ask(&memory()), numbers(&[5, 5, 8, 0, 0]));
    // No structure, no such request, nothing to do with this device: a refusal has always the same form.
    let mut send = |bytes: Vec<u8>| {
        line.send(&bytes, &[]);
        line.serve().unwrap();
        line.answer()
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
                let mut protocol = ProtocolFeatures::BACKEND;
                protocol.set(ProtocolFeatures::REPLY_ACK, ack);
                let mut line = Line::agreed(protocol);
                let zeros = (0..=64).find_map(|n| Request::decode(*kind, &vec![0; n]));
                let Some(request) = zeros else { continue };
                // Setting the protocol features is answered by the new ones: take none of them away.
                let request = match request {
                    Request::SetProtocolFeatures(_) => {
                        Request::SetProtocolFeatures(protocol.bits())
                    }
                    request => request,
                };
                let found = Reply::of(&line.tell(&request).clone());
                let found = if need_reply {
                    Reply::of(&line.tell_with(&request, true, &events_for(&request)))
                } else {
                    found
                };
                let name = kind.name();
                let own = kind.reply() == Form::Own;
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
        ("set_kick", kick(0)),
        ("set_call", call(0)),
        ("set_err", crate::line::err(0)),
        ("set_addresses", place(1)),
    ];
    for (name, request) in cases {
        let mut line = running();
        let before = format!("{:?}", line.backend.session());
        line.device.refuses = Some(name);
        assert!(!line.ask(&request), "{name}");
        assert_eq!(format!("{:?}", line.backend.session()), before, "{name}");
        assert_eq!(line.device.rings.len(), 2);
    }
}

/// Rings 0 and 1 run.
fn running() -> Line {
    let mut line = Line::agreed(ProtocolFeatures::BACKEND.difference(ProtocolFeatures::STATUS));
    line.tell(&memory());
    for ring in [0, 1] {
        for request in [size(ring, 256), base(ring, 3), place(ring)] {
            line.tell(&request);
        }
        line.tell(&kick(ring as u8));
        line.tell(&enable(ring, 1));
    }
    assert_eq!(line.device.rings.len(), 2);
    line.device.calls.clear();
    line
}

#[test]
fn u8_tb33_bases_of_both_formats_come_back_whole() {
    for (more, told) in [(0, 0xfffe), (PACKED, 0x8005_0003), (PACKED, 0x0005_8003)] {
        let mut line = Line::new();
        line.tell(&Request::SetFeatures(VERSION_1 | more));
        line.tell(&memory());
        for request in [size(0, 256), base(0, told), place(0), kick(0)] {
            line.tell(&request);
        }
        assert_eq!(line.device.rings[&0].base, told);
        line.device.stops_at = Some(told + 1);
        assert_eq!(line.tell(&stop(0)), numbers(&[11, 5, 8, 0, told + 1]));
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
        let mut line = Line::new();
        line.send(&heap[..cut], &[]);
        line.serve().unwrap();
        line.send(&heap[cut..], &[]);
        line.serve().unwrap();
        let found = (line.answer(), format!("{:?}", line.backend.session()));
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
        let mut line = Line::agreed(ProtocolFeatures::REPLY_ACK);
        let event = EventFd::new().unwrap();
        line.send(&table(count, regions), &[event.as_fd()]);
        line.serve().unwrap();
        let replies = Reply::of(&line.answer());
        assert_ne!(replies[0].payload, [0; 8], "{count} of {regions}");
        assert_eq!(line.device.take_calls(), [""; 0]);
    }
}

#[test]
fn te7_a_peer_that_leaves_at_any_byte_leaves_nothing_behind() {
    let order = [memory(), size(0, 256), place(0), call(0), kick(0)];
    let handshake: Vec<Vec<u8>> = order.iter().map(|r| bytes(r, false)).collect();
    let total: usize = handshake.iter().map(Vec::len).sum();
    for stop in 0..=total {
        let (peer, stream) = Stream::pair().unwrap();
        let mut backend = Backend::new(stream, Offer::new(VERSION_1, ProtocolFeatures::empty(), 1));
        let mut device = Recorder::new();
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
        assert!(device.gone);
        drop((backend, device));
        witnesses.iter_mut().for_each(Witness::assert_closed);
    }
}

#[test]
fn tb4_tb6_what_cannot_be_followed_ends_the_connection_at_once() {
    let header =
        |code: u32, flags: u32, size: u32| [code, flags, size].map(u32::to_ne_bytes).concat();
    let cases = [
        ("version 0", header(1, 0, 0), "version 1 was expected"),
        ("version 2", header(1, 2, 0), "version 1 was expected"),
        ("version 3", header(1, 3, 0), "version 1 was expected"),
        ("a reply", header(1, 5, 0), "only requests were expected"),
        ("a reply nobody knows", header(999, 5, 0), "only requests"),
        ("too long", header(1, 1, 4097), "at most 4096"),
        ("longest", header(1, 1, u32::MAX), "at most 4096"),
        ("longest of an unknown", header(999, 1, u32::MAX), "at most"),
    ];
    for (name, header, text) in cases {
        let mut line = Line::agreed(ProtocolFeatures::REPLY_ACK);
        line.send(&header, &[]);
        let error = line.serve().unwrap_err();
        assert!(error.to_string().contains(text), "{name}: {error}");
        assert_eq!(line.answer(), [0; 0], "{name}");
        assert!(line.device.gone, "{name}: the device was not told");
    }
}
