//! The tap port against the Linux network stack.
//!
//! Each test runs in a network namespace of its own: this program starts itself again in one. Where the machine does not allow
//! that (no user namespaces, no tun device), the test says so and passes.

mod namespace;

use std::net::UdpSocket;
use std::time::Duration;

use namespace::{in_namespace, inside, ip};
use virtnet_mem::Segment;
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, memory_pair};
use virtnet_ports::TapPort;
use virtnet_sys::{Events, Poller};
use virtnet_testkit::frame::{self, Endpoint};
use virtnet_testkit::{Backing, Limits, VmMemory, check_port_with, receive, send};

fn send_one(port: &mut TapPort, frame: &[u8], offload: Offload) {
    let mut burst = Burst::new();
    burst.push_bytes(frame, offload);
    assert_eq!(port.tx(&burst, &Picks::first(1)), 1);
    port.flush();
}

#[test]
fn two_taps_on_a_bridge_keep_the_promises_of_a_port() {
    in_namespace("inside_two_taps");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_two_taps() {
    inside();
    ip("link add bridge0 type bridge mcast_snooping 0");
    ip("link set bridge0 up");
    let open = |name: &str| {
        let port = TapPort::open(name).unwrap();
        port.interface().unwrap().set_mtu(65_521).unwrap();
        ip(&format!("link set {name} master bridge0"));
        port
    };
    let (mut a, mut b) = (open("tap0"), open("tap1"));
    let limits = Limits {
        back_pressure: false,
        ..Limits::default()
    };
    check_port_with(&mut a, &mut b, limits);
}

#[test]
fn the_host_answers_on_its_tap() {
    in_namespace("inside_host");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_host() {
    inside();
    let mut tap = TapPort::open("vn%d").unwrap();
    assert_eq!(tap.interface().unwrap().name(), "vn0");
    ip("addr add 10.0.0.1/24 dev vn0");
    let us = Endpoint::number(2);
    let mut host = Endpoint::number(1);
    let (mut nobody, _other) = memory_pair(1);

    // Who are you?
    assert_eq!(send(&mut tap, &[us.who_has(host.ip)]), 1);
    let answer = receive(&mut nobody, &mut tap, 1).remove(0);
    host.mac.0.copy_from_slice(&answer[6..12]);
    assert_eq!(answer, host.is_at(&us));
    assert_eq!(host.mac.0, tap.interface().unwrap().mac().unwrap());

    // An echo, and its checksums, are complete.
    let payload: Vec<_> = (0..=255).collect();
    assert_eq!(send(&mut tap, &[us.ping(&host, 7, &payload)]), 1);
    let answer = receive(&mut nobody, &mut tap, 1).remove(0);
    assert_eq!(answer.len(), 14 + 20 + 8 + 256);
    assert_eq!(frame::checksum(&answer[14..34]), 0);
    assert_eq!(frame::checksum(&answer[34..]), 0);
    assert!(answer.ends_with(&payload));

    // A checksum that is left to the host is completed there; a wrong one is not forgiven.
    let socket = UdpSocket::bind("10.0.0.1:1001").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let mut unfinished = us.udp(&host, b"unfinished");
    let mut pseudo = [us.ip.octets(), host.ip.octets()].concat();
    pseudo.extend([0, frame::UDP, 0, 8 + 10]);
    let partial = !frame::checksum(&pseudo);
    unfinished[40..42].copy_from_slice(&partial.to_be_bytes());
    send_one(&mut tap, &unfinished, Offload::default());
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start: 34,
        csum_offset: 6,
        ..Offload::default()
    };
    send_one(&mut tap, &unfinished, offload);
    assert_eq!(send(&mut tap, &[us.udp(&host, b"finished")]), 1);
    let mut bytes = [0; 100];
    for expected in [&b"unfinished"[..], b"finished"] {
        let n = socket.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..n], expected);
    }

    // The host leaves nothing to us.
    socket.send_to(b"to you", (us.ip, us.port)).unwrap();
    let datagram = receive(&mut nobody, &mut tap, 1).remove(0);
    assert_eq!(
        frame::transport_checksum(host.ip, us.ip, frame::UDP, &datagram[34..42 + 6]),
        0
    );

    let counters = tap.counters();
    assert_eq!((counters.sent, counters.received), (5, 3));
    assert_eq!(counters.tx_drops.total() + counters.rx_drops.total(), 0);
}

#[test]
fn a_tap_that_is_down_or_deleted_drops_and_stays_quiet() {
    in_namespace("inside_down");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_down() {
    inside();
    let mut tap = TapPort::open("vn0").unwrap();
    let frame = frame::pattern(60, 1);
    send_one(&mut tap, &frame, Offload::default());
    ip("link set vn0 down");
    send_one(&mut tap, &frame, Offload::default());
    assert_eq!(tap.counters().tx_drops.of(DropReason::PortDown), 1);
    ip("link set vn0 up");
    send_one(&mut tap, &frame, Offload::default());
    assert_eq!(tap.counters().sent, 2);
    assert!(tap.error().is_none());

    // Too short for an Ethernet frame: the kernel refuses it. Too long for any: it does not get there.
    send_one(&mut tap, &[1; 10], Offload::default());
    send_one(&mut tap, &[1; 70_000], Offload::default());
    let drops = tap.counters().tx_drops;
    assert_eq!(drops.of(DropReason::SendError), 1);
    assert_eq!(drops.of(DropReason::TooBig), 1);

    let poller = Poller::new().unwrap();
    poller.add(tap.wait_fd().unwrap(), 0).unwrap();
    let mut events = Events::with_capacity(1);
    ip("link del vn0");
    poller
        .wait(&mut events, Some(Duration::from_secs(2)))
        .unwrap();
    assert_eq!(tap.rx(&mut Burst::new()), 0);
    assert!(tap.error().is_some());
    assert!(!tap.arm());
    let woken = poller.wait(&mut events, Some(Duration::from_millis(20)));
    assert_eq!(woken.unwrap(), 0, "a deleted interface keeps nobody awake");
    send_one(&mut tap, &frame, Offload::default());
    assert_eq!(tap.counters().tx_drops.of(DropReason::PortDown), 2);
}

#[test]
fn a_long_frame_whose_memory_is_taken_away_leaves_with_zeros() {
    in_namespace("inside_taken_away");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_taken_away() {
    inside();
    let mut tap = TapPort::open("vn0").unwrap();
    let vm = VmMemory::of_size(1 << 20, Backing::Resizable).unwrap();
    let memory = vm.memory();
    let frame = Segment {
        offset: 0,
        len: 9000,
        region: 0,
    };
    let mut burst = Burst::new();
    burst.set_memory(memory);
    burst.push_guest(memory.slice(frame), frame, Offload::default());
    for expected in 1..=2 {
        assert_eq!(tap.tx(&burst, &Picks::first(1)), 1);
        assert_eq!(tap.counters().sent, expected);
        assert_eq!(tap.counters().tx_drops.total(), 0);
        // All but the first page.
        vm.resize(0, 4096);
    }
}

#[test]
fn a_flow_stays_on_the_queue_on_which_it_was_sent() {
    in_namespace("inside_queues");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_queues() {
    inside();
    let mut lanes = TapPort::in_lanes("vn0", 4, 2).unwrap();
    assert_eq!(lanes.len(), 2);
    for lane in &mut lanes {
        lane.take_offloads().unwrap();
    }
    ip("addr add 10.0.0.1/24 dev vn0");
    let mut host = Endpoint::number(1);
    host.mac.0 = lanes[0].interface().unwrap().mac().unwrap();
    let server = UdpSocket::bind(("10.0.0.1", host.port)).unwrap();
    server
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut us = Endpoint::number(2);
    ip(&format!(
        "neigh add 10.0.0.2 lladdr {} dev vn0",
        us.mac.0.map(|byte| format!("{byte:02x}")).join(":")
    ));
    // Each lane sends flows of its own; the answers come back to it.
    for flow in 0..40_u16 {
        us.port = 2000 + flow;
        let (mine, other) = (usize::from(flow % 2), usize::from(1 - flow % 2));
        assert_eq!(send(&mut lanes[mine], &[us.udp(&host, b"question")]), 1);
        let mut bytes = [0; 100];
        let (n, from) = server.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..n], from.port()), (&b"question"[..], us.port));
        server.send_to(b"answer", from).unwrap();
        let (mut nobody, _other) = memory_pair(1);
        assert_eq!(receive(&mut nobody, &mut lanes[mine], 1).len(), 1);
        assert_eq!(lanes[other].rx(&mut Burst::new()), 0);
    }
    // The whole interface is gone for all.
    let control = virtnet_ports::Control::start("test").unwrap();
    let watch = TapPort::watch(&mut lanes, &control).unwrap().unwrap();
    assert!(watch.is_up());
    ip("link del vn0");
    for lane in &mut lanes {
        lane.rx(&mut Burst::new());
        assert!(lane.error().is_some() && !lane.arm());
    }
    let start = std::time::Instant::now();
    while !watch.is_gone() {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    let (events, _) = watch.events().since(0);
    assert_eq!(events.last().unwrap().what.kind(), "removed");
}
