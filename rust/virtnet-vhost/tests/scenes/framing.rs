//! What arrives on the socket, before it is a request: pieces, lengths, flags, descriptors, acknowledgements.

use std::os::fd::AsFd;

use virtnet_sys::EventFd;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{Config, VringFd};
use virtnet_vhost::{ProtocolFeatures, Refusal, SessionError};

use crate::fake::{MEMORY, PROTOCOL, Scene, VERSION_1, bytes, memory, state, table};

const ACK: ProtocolFeatures = ProtocolFeatures::REPLY_ACK;

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let mut bytes: Vec<u8> = [request, flags, size]
        .iter()
        .flat_map(|n| n.to_ne_bytes())
        .collect();
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn tb1_a_handshake_may_come_byte_by_byte() {
    let mut scene = Scene::agreed(ACK);
    let event = EventFd::new().unwrap();
    let memory = memory();
    let messages = [
        (Request::SetFeatures(VERSION_1 | PROTOCOL), None),
        (table(&[MEMORY]), Some(memory.as_fd())),
        (Request::SetVringNum(state(0, 256)), None),
        (
            Request::SetVringCall(VringFd::new(0, true)),
            Some(event.as_fd()),
        ),
    ];
    for (request, fd) in messages {
        let bytes = bytes(&request, true);
        for (place, byte) in bytes.iter().enumerate() {
            assert_eq!(scene.answer(), None);
            scene
                .raw(&[*byte], fd.filter(|_| place == 0).as_slice())
                .unwrap();
        }
        assert_eq!(scene.answer_to(request.kind()), [0; 8], "{request:?}");
    }
    assert_eq!(
        scene.device.take_log(),
        ["features 0x100000000", "memory 0x10000"]
    );
}

#[test]
fn tb3_hundreds_of_messages_in_one_write_are_served_in_order() {
    let mut scene = Scene::agreed(ACK);
    let many: Vec<u8> = (0..300)
        .flat_map(|i| bytes(&Request::NetSetMtu(i), true))
        .collect();
    scene.raw(&many, &[]).unwrap();
    // One call serves a bounded number; the rest is still there to be read.
    let mut calls = 1;
    while scene.backend.counters().0 < 301 {
        scene.serve().unwrap();
        calls += 1;
    }
    assert!(calls > 1);
    let mut answers = Vec::new();
    while let Some(bytes) = scene.answer() {
        answers.extend(bytes);
        scene.backend.on_writable(&mut scene.device).unwrap();
    }
    let acks: Vec<u64> = answers
        .chunks(20)
        .map(|reply| u64::from_ne_bytes(reply[12..].try_into().unwrap()))
        .collect();
    assert_eq!(acks, vec![1; 300], "MTU was not negotiated");
}

#[test]
fn tb4_a_reply_from_a_front_end_ends_the_connection() {
    let mut scene = Scene::new();
    let error = scene.raw(&message(1, 5, &[]), &[]).unwrap_err();
    assert!(
        matches!(error, SessionError::ReplyToNothing { request: 1 }),
        "{error}"
    );
    assert_eq!(scene.device.disconnected, 1);
    scene.serve().unwrap_err();
    assert_eq!(scene.device.disconnected, 1, "told once");
}

#[test]
fn tb4_another_version_ends_the_connection_and_unknown_flags_do_not() {
    for flags in [0, 2, 3] {
        assert!(matches!(
            Scene::new().raw(&message(1, flags, &[]), &[]),
            Err(SessionError::Version { .. })
        ));
    }
    let mut scene = Scene::new();
    scene.raw(&message(1, 0xffff_fff1, &[]), &[]).unwrap();
    assert_eq!(scene.answer().unwrap().len(), 20);
}

#[test]
fn tb5_unknown_requests_are_skipped_and_refused() {
    let mut scene = Scene::agreed(ACK);
    let event = EventFd::new().unwrap();
    for code in [0, 46, 100, u32::MAX] {
        scene
            .raw(&message(code, 9, &[7; 100]), &[event.as_fd()])
            .unwrap();
        let reply = scene.answer().unwrap();
        assert_eq!(reply[..4], code.to_ne_bytes());
        assert_eq!(reply[12..], 1u64.to_ne_bytes());
        scene.raw(&message(code, 1, &[7; 100]), &[]).unwrap();
        assert_eq!(scene.answer(), None);
    }
    assert!(matches!(
        scene.backend.last_refusal(),
        Some(Refusal::Unknown { .. })
    ));
    assert_eq!(scene.backend.counters().1, 8);
    assert_eq!(
        scene.ack(&Request::SetOwner, &[]),
        0,
        "the wire is still in step"
    );
}

#[test]
fn tb6_a_message_that_is_too_long_ends_the_connection_before_it_is_read() {
    for size in [4097, u32::MAX] {
        let mut header = message(2, 1, &[]);
        header[8..].copy_from_slice(&size.to_ne_bytes());
        let error = Scene::new().raw(&header, &[]).unwrap_err();
        assert!(matches!(error, SessionError::TooLong { .. }), "{error}");
    }
}

#[test]
fn tb7_a_payload_of_another_length_is_skipped_and_refused() {
    let mut scene = Scene::agreed(ACK | ProtocolFeatures::CONFIG);
    let mut table_of_two_with_one = bytes(&table(&[MEMORY]), false)[12..].to_vec();
    table_of_two_with_one[0] = 2;
    let cases = [
        (2, vec![0; 7]),
        (2, vec![0; 9]),
        (3, vec![0; 1]),
        (5, vec![]),
        (5, table_of_two_with_one),
        (8, vec![0; 4096]),
        (9, vec![0; 39]),
    ];
    for (code, payload) in cases {
        scene.raw(&message(code, 9, &payload), &[]).unwrap();
        assert_eq!(
            scene.answer().unwrap()[12..],
            1u64.to_ne_bytes(),
            "{code} with {} bytes",
            payload.len()
        );
        assert!(matches!(
            scene.backend.last_refusal(),
            Some(Refusal::PayloadLength { .. })
        ));
    }
    assert_eq!(scene.device.take_log(), [""; 0]);
}

#[test]
fn tb8_u3_acknowledgements_come_when_agreed_and_asked_for_and_once() {
    for agreed in [true, false] {
        let mut scene = Scene::agreed(if agreed {
            ACK
        } else {
            ProtocolFeatures::empty()
        });
        for need_reply in [true, false] {
            scene
                .raw(&bytes(&Request::SetOwner, need_reply), &[])
                .unwrap();
            assert_eq!(scene.answer().is_some(), agreed && need_reply);
            // A request with an answer of its own has one answer, whatever is asked for.
            scene
                .raw(&bytes(&Request::GetFeatures, need_reply), &[])
                .unwrap();
            assert_eq!(scene.answer().unwrap().len(), 20);
            // Refused, the same holds.
            scene
                .raw(&bytes(&Request::NetSetMtu(1500), need_reply), &[])
                .unwrap();
            assert_eq!(scene.answer().is_some(), agreed && need_reply);
            scene
                .raw(&bytes(&Request::GetQueueNum, need_reply), &[])
                .unwrap();
            assert_eq!(scene.answer().unwrap(), message(17, 5, &[]));
        }
    }
}

#[test]
fn the_message_that_agrees_on_acknowledgements_is_acknowledged() {
    let mut scene = Scene::new();
    assert_eq!(scene.ack(&Request::SetProtocolFeatures(ACK.bits()), &[]), 0);
    assert_eq!(
        scene.ack(&Request::SetProtocolFeatures(ACK.bits() | 1 << 40), &[]),
        1,
        "with reservations"
    );
    assert_eq!(scene.ack(&Request::SetOwner, &[]), 0);
}

#[test]
fn tb9_a_front_end_that_never_reads_is_given_up() {
    let mut scene = Scene::new();
    let question = bytes(&Request::GetFeatures, false);
    let error = loop {
        if scene.peer.send(&question, &[]).is_err() {
            panic!("the back-end stopped reading");
        }
        if let Err(error) = scene.serve() {
            break error;
        }
    };
    assert!(matches!(error, SessionError::NotReading { .. }), "{error}");
    assert_eq!(scene.device.disconnected, 1);
}

#[test]
fn tb9_answers_wait_for_a_slow_front_end() {
    let mut scene = Scene::new();
    let mut asked = 0;
    while !scene.backend.wants_write() {
        scene
            .raw(&bytes(&Request::GetFeatures, false), &[])
            .unwrap();
        asked += 1;
    }
    let mut answered = 0;
    while let Some(bytes) = scene.answer() {
        answered += bytes.len();
        scene.backend.on_writable(&mut scene.device).unwrap();
    }
    assert_eq!(answered, asked * 20);
    assert!(!scene.backend.wants_write());
}

#[test]
fn tb10_tb12_descriptors_too_many_or_too_few_are_refused() {
    let mut scene = Scene::agreed(ACK);
    let event = EventFd::new().unwrap();
    let fd = event.as_fd();
    assert_eq!(scene.ack(&Request::SetOwner, &[fd]), 1);
    assert_eq!(scene.ack(&table(&[MEMORY]), &[]), 1);
    assert_eq!(scene.ack(&table(&[MEMORY]), &[fd, fd]), 1);
    assert_eq!(
        scene.ack(&Request::SetVringKick(VringFd::new(0, true)), &[]),
        1
    );
    assert_eq!(
        scene.ack(&Request::SetVringKick(VringFd::new(0, false)), &[fd]),
        1
    );
    assert_eq!(scene.ack(&Request::SetOwner, &[fd; 253]), 1);
    assert_eq!(scene.backend.counters().1, 6);
    assert!(
        scene
            .backend
            .last_refusal()
            .unwrap()
            .to_string()
            .contains("253")
    );
    assert_eq!(scene.device.take_log(), [""; 0]);
}

#[test]
fn tb13_descriptors_beside_the_payload_are_refused() {
    let mut scene = Scene::agreed(ACK);
    let event = EventFd::new().unwrap();
    let request = Request::SetVringCall(VringFd::new(0, true));
    let bytes = bytes(&request, true);
    scene.raw(&bytes[..12], &[]).unwrap();
    scene.raw(&bytes[12..], &[event.as_fd()]).unwrap();
    assert_eq!(scene.answer_to(request.kind()), 1u64.to_ne_bytes());
    assert!(matches!(
        scene.backend.last_refusal(),
        Some(Refusal::DescriptorPlace { .. })
    ));
}

#[test]
fn tb2_half_a_message_has_five_seconds() {
    const SECOND: u64 = 1_000_000_000;
    let mut scene = Scene::new();
    scene
        .raw(&bytes(&Request::GetFeatures, false)[..6], &[])
        .unwrap();
    scene.backend.on_tick(SECOND, &mut scene.device).unwrap();
    scene
        .backend
        .on_tick(5 * SECOND, &mut scene.device)
        .unwrap();
    let error = scene
        .backend
        .on_tick(6 * SECOND, &mut scene.device)
        .unwrap_err();
    assert!(matches!(error, SessionError::HalfMessage { .. }), "{error}");
    assert_eq!(scene.device.disconnected, 1);
}

#[test]
fn te7_te8_a_front_end_that_goes_away_leaves_nothing_running() {
    let mut scene = Scene::running(ACK);
    scene
        .raw(&bytes(&Request::GetFeatures, false)[..6], &[])
        .unwrap();
    let Scene {
        peer,
        mut backend,
        mut device,
    } = scene;
    drop(peer);
    assert!(matches!(
        backend.on_readable(&mut device),
        Err(SessionError::Disconnected)
    ));
    assert_eq!((device.disconnected, device.regions.len()), (1, 0));
}

#[test]
fn closing_tells_the_device() {
    let Scene {
        backend,
        mut device,
        ..
    } = Scene::running(ACK);
    backend.close(&mut device);
    assert_eq!(device.disconnected, 1);
}

#[test]
fn u18_tb80_a_refused_question_about_configuration_is_answered_with_nothing() {
    let mut scene = Scene::agreed(ProtocolFeatures::CONFIG);
    let beyond = Config {
        offset: 250,
        flags: 0,
        data: vec![0; 10],
    };
    assert_eq!(scene.ask(&Request::GetConfig(beyond)), [0; 0]);
}
