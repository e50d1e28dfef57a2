//! The memory pair: what one end sends the other receives, to the packet.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::HashSet;

use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, memory_pair};

fn burst_of(frames: &[&[u8]]) -> Burst {
    let mut burst = Burst::new();
    for (n, frame) in (0..).zip(frames) {
        let offload = Offload {
            hdr_len: n,
            ..Offload::default()
        };
        burst.push_bytes(frame, offload);
    }
    burst
}

#[test]
fn picked_packets_arrive_in_order_with_their_offloads() {
    let (mut a, mut b) = memory_pair(8);
    let burst = burst_of(&[&[1; 60], &[2; 700], &[3; 61]]);
    let mut picks = Picks::default();
    picks.push(2);
    picks.push(1);
    assert!(!b.arm());
    assert_eq!(a.tx(&burst, &picks), 2);
    assert!(b.arm(), "what has arrived is waiting");
    let mut got = Burst::new();
    assert_eq!(b.rx(&mut got), 2);
    assert_eq!((got.frame_len(0), got.frame_len(1)), (61, 700));
    assert_eq!((got.offload(0).hdr_len, got.offload(1).hdr_len), (2, 1));
    let (a, b) = (a.counters(), b.counters());
    assert_eq!((a.sent, a.sent_bytes), (2, 761));
    assert_eq!((b.received, b.received_bytes), (2, 761));
}

#[test]
fn what_has_no_room_is_not_taken_and_dropping_it_is_the_senders_word() {
    let (mut a, mut b) = memory_pair(3);
    let burst = burst_of(&[&[0; 60][..]; 5]);
    assert_eq!(a.tx(&burst, &Picks::first(5)), 3);
    assert_eq!(a.tx(&burst, &Picks::first(5).skip(3)), 0);
    assert_eq!(a.counters().tx_drops.total(), 0);
    a.drop_tx(DropReason::NoRoom, 2);
    assert_eq!(a.counters().tx_drops.of(DropReason::NoRoom), 2);
    assert_eq!(b.rx(&mut Burst::new()), 3);
    assert_eq!(a.tx(&burst, &Picks::first(5)), 3);
}

#[test]
fn more_than_a_burst_arrives_in_several() {
    let (mut a, mut b) = memory_pair(100);
    let burst = burst_of(&[&[0; 60][..]; 50]);
    a.tx(&burst, &Picks::first(50));
    a.tx(&burst, &Picks::first(50));
    let mut got = Burst::new();
    assert_eq!(b.rx(&mut got), 64);
    got.clear();
    assert_eq!(b.rx(&mut got), 36);
}

#[test]
fn every_drop_reason_has_a_name_of_its_own() {
    let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
    assert_eq!(names.len(), DropReason::COUNT);
    let is_plain = |name: &str| name.chars().all(|c| c == '_' || c.is_ascii_lowercase());
    assert!(names.iter().all(|name| is_plain(name)), "{names:?}");
}
