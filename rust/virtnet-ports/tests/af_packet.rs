//! The packet socket port on veth pairs.
//!
//! Each test runs in a network namespace of its own: this program starts itself again in one. Where the machine does not allow
//! that, the test says so and passes.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod namespace;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use namespace::{in_namespace, inside, ip};
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, memory_pair};
use virtnet_ports::AfPacketPort;
use virtnet_testkit::frame::{self, Endpoint};
use virtnet_testkit::{Limits, check_port_with, receive, send};

fn open(name: &str) -> AfPacketPort {
    AfPacketPort::open(name, true).unwrap()
}

/// A part for each of four queues, on a link that carries packets.
fn open_queues(name: &str) -> Vec<AfPacketPort> {
    AfPacketPort::in_lanes(name, true, 4, 8).unwrap()
}

/// A datagram of one of many flows, with its number within the flow.
fn of_flow(flow: u16, number: u8) -> Vec<u8> {
    let mut from = Endpoint::number(1);
    from.port = 2000 + flow;
    from.udp(&Endpoint::number(2), &[number; 40])
}

fn send_all(port: &mut AfPacketPort, frames: &[Vec<u8>]) {
    for frames in frames.chunks(50) {
        assert_eq!(send(port, frames), frames.len());
    }
}

/// What arrives at the parts of a port until there are `n` frames in all.
fn receive_of_all(lanes: &mut [AfPacketPort], n: usize) -> Vec<Vec<Vec<u8>>> {
    let mut got = vec![Vec::new(); lanes.len()];
    let (mut burst, start) = (Burst::new(), Instant::now());
    while got.iter().map(Vec::len).sum::<usize>() < n {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "some are missing"
        );
        for (lane, got) in lanes.iter_mut().zip(&mut got) {
            burst.clear();
            let n = lane.rx(&mut burst);
            got.extend((0..n).map(|i| burst.head(i).to_vec()));
        }
    }
    got
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

#[test]
fn a_flow_stays_on_one_of_several_queues_and_in_order() {
    in_namespace("inside_queues");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_queues() {
    inside();
    veth();
    let (mut near, mut far) = (open("near"), open_queues("far"));
    assert_eq!(far.len(), 4, "a part for each queue");
    let (flows, each) = (100, 10);
    let frames: Vec<_> = (0..each)
        .flat_map(|number| (0..flows).map(move |flow| of_flow(flow, number)))
        .collect();
    send_all(&mut near, &frames);
    let got = receive_of_all(&mut far, frames.len());
    let mut homes = HashMap::new();
    for (queue, (got, lane)) in got.iter().zip(&far).enumerate() {
        assert!(!got.is_empty(), "queue {queue} has nothing");
        assert_eq!(lane.counters().received, got.len() as u64);
        assert_eq!(lane.counters().rx_drops.total(), 0);
        // In the order in which they were sent, as far as they are the queue's.
        let mine: HashSet<_> = got.iter().collect();
        let sent: Vec<_> = frames.iter().filter(|frame| mine.contains(frame)).collect();
        assert_eq!(got.iter().collect::<Vec<_>>(), sent, "queue {queue}");
        for frame in got {
            let flow: [u8; 2] = *frame[34..].first_chunk().unwrap();
            assert_eq!(
                *homes.entry(flow).or_insert(queue),
                queue,
                "a flow has moved"
            );
        }
    }
    assert_eq!(homes.len(), usize::from(flows));

    // Each part sends, and none receives what another has sent.
    for lane in &mut far {
        assert_eq!(send(lane, &frames[..50]), 50);
        let (mut nobody, _other) = memory_pair(1);
        assert_eq!(receive(&mut nobody, &mut near, 50), frames[..50]);
        assert_eq!(lane.counters().sent, 50);
    }
    for lane in &mut far {
        assert_eq!(lane.rx(&mut Burst::new()), 0);
        assert!(!lane.arm());
    }

    // All queues in one part are a port like any other.
    let mut whole = AfPacketPort::in_lanes("far", true, 4, 1).unwrap();
    let mut whole = whole.pop().unwrap();
    let limits = Limits {
        back_pressure: false,
        ..Limits::default()
    };
    check_port_with(&mut near, &mut whole, limits);
}

#[test]
fn nothing_arrives_twice_while_several_queues_are_opened() {
    in_namespace("inside_opening");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_opening() {
    inside();
    veth();
    let enough = AtomicBool::new(false);
    let (mut arrived, mut different) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut near, start) = (open("near"), Instant::now());
            for number in 0_u64.. {
                if enough.load(Ordering::Relaxed) || start.elapsed() > Duration::from_secs(60) {
                    break;
                }
                let mut frame = of_flow(number.to_le_bytes()[0].into(), 0);
                frame.extend(number.to_le_bytes());
                send(&mut near, &[frame]);
            }
        });
        for _ in 0..20 {
            let mut far = open_queues("far");
            let got = receive_of_all(&mut far, 400).concat();
            arrived += got.len();
            different += got.iter().collect::<HashSet<_>>().len();
        }
        enough.store(true, Ordering::Relaxed);
    });
    assert_eq!(different, arrived);
}

#[test]
fn what_any_of_several_queues_has_lost_is_counted() {
    in_namespace("inside_lost_by_queues");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_lost_by_queues() {
    inside();
    veth();
    let mut near = open("near");
    let mut far = AfPacketPort::in_lanes("far", true, 4, 2).unwrap();
    assert_eq!(far.len(), 2, "two queues for each of two workers");
    let frames: Vec<_> = (0..64).map(|flow| of_flow(flow, 0)).collect();
    let (mut sent, start) = (0, Instant::now());
    let lost = |lane: &AfPacketPort| lane.counters().rx_drops.of(DropReason::Overrun);
    while far.iter().map(lost).any(|lost| lost == 0) {
        assert!(start.elapsed() < Duration::from_secs(20), "all found room");
        sent += send(&mut near, &frames) as u64;
    }
    let mut taken = 0;
    let received =
        |far: &[AfPacketPort]| -> u64 { far.iter().map(|lane| lane.counters().received).sum() };
    while received(&far) < sent {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "some are missing"
        );
        for lane in &mut far {
            taken += lane.rx(&mut Burst::new());
        }
    }
    let lost: u64 = far.iter().map(lost).sum();
    assert_eq!(taken as u64 + lost, sent);
    assert_eq!(received(&far), sent);
    assert!(taken > 0 && far.iter().all(|lane| lane.counters().rx_drops.total() > 0));
}

#[test]
fn several_queues_come_back_with_their_interface_and_leave_nothing() {
    in_namespace("inside_queues_down");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_queues_down() {
    inside();
    veth();
    let (mut near, mut far) = (open("near"), open_queues("far"));
    let frames: Vec<_> = (0..100).map(|flow| of_flow(flow, 0)).collect();
    let everywhere = |near: &mut AfPacketPort, far: &mut [AfPacketPort]| {
        send_all(near, &frames);
        receive_of_all(far, frames.len())
            .iter()
            .all(|got| !got.is_empty())
    };
    assert!(everywhere(&mut near, &mut far));
    ip("link set far down");
    for lane in &mut far {
        assert_eq!(lane.rx(&mut Burst::new()), 0);
        assert!(!lane.arm(), "an interface that is down keeps nobody awake");
    }
    ip("link set far up");
    wait_for_link("near", "far");
    for lane in &mut far {
        while lane.rx(&mut Burst::new()) > 0 {}
    }
    assert!(everywhere(&mut near, &mut far));

    // Another group has all of it as well, and does not end when the first does.
    let mut other = open_queues("far");
    assert!(everywhere(&mut near, &mut other));
    receive_of_all(&mut far, frames.len());
    drop(far);
    assert!(everywhere(&mut near, &mut other));
    drop(other);

    // On an interface that is down: opened, or told what to do by kernels that cannot.
    ip("link set far down");
    match AfPacketPort::in_lanes("far", true, 4, 4) {
        Ok(mut far) => {
            ip("link set far up");
            wait_for_link("near", "far");
            for lane in &mut far {
                while lane.rx(&mut Burst::new()) > 0 {}
            }
            assert!(everywhere(&mut near, &mut far));
            ip("link del near");
            for lane in &mut far {
                assert_eq!(lane.rx(&mut Burst::new()), 0);
                assert!(!lane.arm());
            }
        }
        Err(error) => assert!(
            error.to_string().ends_with("`ip link set far up`"),
            "{error}"
        ),
    }
}
