//! The packet socket port on veth pairs.
//!
//! Each test runs in a network namespace of its own: this program starts itself again in one. Where the machine does not allow
//! that, the test says so and passes.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod namespace;

use std::time::{Duration, Instant};

use namespace::{in_namespace, inside, ip};
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, memory_pair};
use virtnet_ports::AfPacketPort;
use virtnet_testkit::{Limits, check_port_with, frame, receive, send};

fn open(name: &str) -> AfPacketPort {
    AfPacketPort::open(name, true).unwrap()
}

fn veth() {
    ip("link add near type veth peer name far");
    for name in ["near", "far"] {
        ip(&format!("link set {name} mtu 65521 up"));
    }
    for (from, to) in [("near", "far"), ("far", "near")] {
        wait_for_link(from, to);
    }
}

/// Sends until something arrives: a link that was brought up carries packets a little later, on a busy machine much later.
fn wait_for_link(from: &str, to: &str) {
    let (mut from, mut to) = (open(from), open(to));
    let mut burst = Burst::new();
    burst.push_bytes(&frame::pattern(60, 1), Offload::default());
    let start = Instant::now();
    while to.rx(&mut Burst::new()) == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "no link");
        from.tx(&burst, &Picks::first(1));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn two_ends_of_a_veth_pair_keep_the_promises_of_a_port() {
    in_namespace("inside_veth");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_veth() {
    inside();
    veth();
    let (mut a, mut b) = (open("near"), open("far"));
    let limits = Limits {
        back_pressure: false,
        ..Limits::default()
    };
    check_port_with(&mut a, &mut b, limits);
}

#[test]
fn tags_that_the_kernel_takes_out_are_put_back() {
    in_namespace("inside_tags");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_tags() {
    inside();
    veth();
    let (mut near, mut far) = (open("near"), open("far"));
    let (mut nobody, _other) = memory_pair(1);
    let frames: Vec<_> = [[0x81, 0, 0x60, 77], [0x88, 0xa8, 0, 5]]
        .iter()
        .map(|tag| {
            let mut frame = frame::pattern(90, 1);
            frame.splice(12..12, *tag);
            frame
        })
        .collect();
    assert_eq!(send(&mut near, &frames), 2);
    assert_eq!(receive(&mut nobody, &mut far, 2), frames);

    // What is left to be done is left to be done behind the tag.
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start: 38,
        csum_offset: 6,
        ..Offload::default()
    };
    let mut burst = Burst::new();
    burst.push_bytes(&frames[0], offload);
    assert_eq!(near.tx(&burst, &Picks::first(1)), 1);
    burst.clear();
    while far.rx(&mut burst) == 0 {}
    assert_eq!(burst.offload(0), offload);
}

#[test]
fn what_an_interface_refuses_is_counted_and_it_may_come_back() {
    in_namespace("inside_down");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_down() {
    inside();
    veth();
    ip("link set near mtu 1500");
    let (mut a, mut b) = (open("near"), open("far"));
    let (mut nobody, _other) = memory_pair(1);
    let mut burst = Burst::new();
    for len in [60, 3_000, 61, 70_000, 62] {
        burst.push_bytes(&frame::pattern(len, 1), Offload::default());
    }
    assert_eq!(a.tx(&burst, &Picks::first(5)), 5);
    assert_eq!(a.counters().tx_drops.of(DropReason::TooBig), 2);
    let lens: Vec<_> = receive(&mut nobody, &mut b, 3)
        .iter()
        .map(Vec::len)
        .collect();
    assert_eq!(lens, [60, 61, 62]);

    ip("link set near down");
    assert_eq!(a.tx(&burst, &Picks::first(1)), 1);
    assert_eq!(a.counters().tx_drops.of(DropReason::PortDown), 1);
    assert_eq!(a.rx(&mut Burst::new()), 0);
    assert!(!a.arm(), "an interface that is down keeps nobody awake");
    ip("link set near up");
    wait_for_link("near", "far");
    while b.rx(&mut Burst::new()) > 0 {}
    assert_eq!(a.tx(&burst, &Picks::first(1)), 1);
    assert_eq!(receive(&mut nobody, &mut b, 1), [frame::pattern(60, 1)]);

    ip("link del near");
    a.tx(&burst, &Picks::first(1));
    assert_eq!(a.rx(&mut Burst::new()), 0);
    assert!(!a.arm());
    let error = AfPacketPort::open("near", true).unwrap_err();
    assert!(
        error.to_string().contains("find interface \"near\""),
        "{error}"
    );
}

#[test]
fn what_nobody_takes_out_in_time_is_counted() {
    in_namespace("inside_lost");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_lost() {
    inside();
    veth();
    let (mut near, mut far) = (open("near"), open("far"));
    let mut burst = Burst::new();
    for seed in 0..64 {
        burst.push_bytes(&frame::pattern(1_500, seed), Offload::default());
    }
    let (mut sent, start) = (0, Instant::now());
    while far.counters().rx_drops.of(DropReason::Overrun) == 0 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "all of it found room"
        );
        sent += near.tx(&burst, &Picks::first(64)) as u64;
    }
    // What is still on its way arrives, and then there is nothing more to come.
    let mut got = Burst::new();
    while far.counters().received < sent {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "some are not accounted for"
        );
        got.clear();
        far.rx(&mut got);
    }
    let counters = far.counters();
    let taken = counters.received - counters.rx_drops.total();
    assert!(taken > 0 && counters.received == sent, "{counters:?}");
}

#[test]
fn short_and_long_frames_stay_in_order_round_and_round_the_ring() {
    in_namespace("inside_order");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_order() {
    inside();
    veth();
    let (mut near, mut far) = (open("near"), open("far"));
    let (mut nobody, _other) = memory_pair(1);
    for round in 0..60_usize {
        let len = |k: usize| {
            if (k / 3 + round).is_multiple_of(3) {
                5_000 + k
            } else {
                60 + k
            }
        };
        let frames: Vec<_> = (0..40).map(|k| frame::pattern(len(k), k + round)).collect();
        assert_eq!(send(&mut near, &frames), 40);
        assert_eq!(receive(&mut nobody, &mut far, 40), frames, "round {round}");
    }
    assert_eq!(far.counters().rx_drops.total(), 0);
    assert!(!far.arm(), "there is nothing left");
}
