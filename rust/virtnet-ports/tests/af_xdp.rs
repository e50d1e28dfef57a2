//! The AF_XDP port on veth pairs, whose driver knows XDP.
//!
//! Each test runs in a network namespace of its own: this program starts itself again in one. Where the machine does not allow
//! that, the test says so and passes.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod namespace;

use std::process::Command;
use std::time::{Duration, Instant};

use namespace::{in_namespace_of_root, inside, ip};
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, memory_pair};
use virtnet_ports::{AfPacketPort, AfXdpOptions, AfXdpPort, Control, XdpAttach, XdpMode};
use virtnet_testkit::{Limits, check_port_with, frame, receive, send};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn control() -> Control {
    Control::start("test").unwrap()
}

fn options(name: &str) -> AfXdpOptions {
    AfXdpOptions {
        ring_size: 256,
        ..AfXdpOptions::new(name)
    }
}

fn open(options: &AfXdpOptions, control: &Control) -> AfXdpPort {
    AfXdpPort::in_lanes(options, 1, control).unwrap().remove(0)
}

fn veth(mtu: u32, queues: u32) {
    let queues = format!("numrxqueues {queues} numtxqueues {queues}");
    ip(&format!(
        "link add near {queues} type veth peer name far {queues}"
    ));
    for name in ["near", "far"] {
        ip(&format!("link set {name} mtu {mtu} up"));
    }
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends until something arrives: a link that was brought up carries packets a little later, on a busy machine much later.
fn wait_for_link(from: &mut dyn Port, to: &mut dyn Port) {
    let mut burst = Burst::new();
    burst.push_bytes(&frame::pattern(60, 1), Offload::default());
    let mut got = Burst::new();
    eventually("no link", || {
        from.tx(&burst, &Picks::first(1));
        from.flush();
        got.clear();
        let n = to.rx(&mut got);
        to.complete();
        n > 0
    });
    // What else was sent meanwhile.
    let mut quiet = 0;
    while quiet < 20 {
        got.clear();
        quiet = if to.rx(&mut got) > 0 { 0 } else { quiet + 1 };
        to.complete();
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_attached(name: &str) -> bool {
    let output = Command::new("ip")
        .args(["-d", "link", "show", name])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).contains("prog/xdp")
}

fn conformance(attach: XdpAttach, mtu: u32) {
    let control = control();
    veth(mtu, 1);
    let options = |name| AfXdpOptions {
        attach,
        ..options(name)
    };
    let (mut a, mut b) = (
        open(&options("near"), &control),
        open(&options("far"), &control),
    );
    let native = attach != XdpAttach::Generic;
    let how = if native {
        "native, copy"
    } else {
        "generic, copy"
    };
    assert_eq!(a.watch().how(), Some(how));
    assert!(is_attached("near"));
    wait_for_link(&mut a, &mut b);
    wait_for_link(&mut b, &mut a);
    let limits = Limits {
        max_len: mtu as usize + 14,
        back_pressure: false,
        ..Limits::default()
    };
    check_port_with(&mut a, &mut b, limits);
    drop((a, b));
    eventually("the program stays attached", || {
        !is_attached("near") && !is_attached("far")
    });
}

#[test]
fn two_ends_of_a_veth_pair_keep_the_promises_of_a_port() {
    in_namespace_of_root("inside_native");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_native() {
    inside();
    conformance(XdpAttach::Auto, 1500);
}

#[test]
fn generic_mode_keeps_them_too() {
    in_namespace_of_root("inside_generic");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_generic() {
    inside();
    conformance(XdpAttach::Generic, 1500);
}

#[test]
fn frames_of_several_chunks_pass() {
    in_namespace_of_root("inside_jumbo");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_jumbo() {
    inside();
    conformance(XdpAttach::Auto, 9000);
}

#[test]
fn an_interface_that_goes_down_comes_back_and_one_that_is_deleted_keeps_nobody_awake() {
    in_namespace_of_root("inside_down");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_down() {
    inside();
    veth(1500, 1);
    let control = control();
    let mut a = open(&options("near"), &control);
    let mut b = AfPacketPort::open("far", true).unwrap();
    wait_for_link(&mut a, &mut b);
    let (mut nobody, _other) = memory_pair(1);
    let watch = a.watch();
    let kinds = || -> Vec<_> {
        let events = watch.events().since(0).0;
        events.iter().map(|event| event.what.kind()).collect()
    };

    let mut burst = Burst::new();
    for len in [60, 3_000, 61, 70_000, 62] {
        burst.push_bytes(&frame::pattern(len, 1), Offload::default());
    }
    assert_eq!(a.tx(&burst, &Picks::first(5)), 5);
    a.flush();
    assert_eq!(a.counters().tx_drops.of(DropReason::TooBig), 2);
    let lens: Vec<_> = receive(&mut nobody, &mut b, 3)
        .iter()
        .map(Vec::len)
        .collect();
    assert_eq!(lens, [60, 61, 62]);

    ip("link set near down");
    eventually("it is down", || !watch.is_up());
    assert_eq!(a.tx(&burst, &Picks::first(1)), 1);
    a.flush();
    assert_eq!(a.counters().tx_drops.of(DropReason::PortDown), 1);
    assert_eq!(a.rx(&mut Burst::new()), 0);
    assert!(!a.arm(), "an interface that is down keeps nobody awake");
    ip("link set near up");
    eventually("it is up", || watch.is_up());
    wait_for_link(&mut a, &mut b);
    wait_for_link(&mut b, &mut a);
    assert!(
        kinds().ends_with(&["link_up", "link_down", "link_up"]),
        "{:?}",
        kinds()
    );

    ip("link del near");
    eventually("it is gone", || watch.is_gone());
    a.tx(&burst, &Picks::first(1));
    a.flush();
    assert_eq!(a.counters().tx_drops.of(DropReason::PortDown), 2);
    assert_eq!(a.rx(&mut Burst::new()), 0);
    eventually("it keeps nobody awake", || !a.arm());
    assert_eq!(kinds().last(), Some(&"removed"));
    let error = AfXdpPort::in_lanes(&options("near"), 1, &control).unwrap_err();
    assert!(
        error.to_string().contains("find interface \"near\""),
        "{error}"
    );
}

#[test]
fn what_does_not_fit_into_the_rings_is_counted() {
    in_namespace_of_root("inside_overrun");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_overrun() {
    inside();
    veth(1500, 1);
    let control = control();
    let tiny = AfXdpOptions {
        ring_size: 8,
        ..options("near")
    };
    let mut a = open(&tiny, &control);
    let mut b = AfPacketPort::open("far", true).unwrap();
    wait_for_link(&mut b, &mut a);
    let before = a.counters();
    let frames: Vec<_> = (0..60).map(|k| frame::pattern(60, k)).collect();
    assert_eq!(send(&mut b, &frames), 60);
    eventually("all are counted", || {
        let passed = a.counters().since(&before);
        passed.rx_drops.of(DropReason::Overrun) == 52
    });
    let (mut nobody, _other) = memory_pair(1);
    assert_eq!(receive(&mut nobody, &mut a, 8), frames[..8]);
    let passed = a.counters().since(&before);
    assert_eq!((passed.received, passed.rx_drops.total()), (60, 52));
    // The chunks have gone back: there is room again.
    assert_eq!(send(&mut b, &frames[..8]), 8);
    assert_eq!(receive(&mut nobody, &mut a, 8), frames[..8]);

    // A burst longer than the transmit ring leaves in parts.
    let mut burst = Burst::new();
    for frame in &frames {
        burst.push_bytes(frame, Offload::default());
    }
    let taken = a.tx(&burst, &Picks::first(60));
    assert_eq!(taken, 8);
    a.flush();
    assert_eq!(receive(&mut nobody, &mut b, 8), frames[..8]);
}

#[test]
fn each_queue_has_its_socket_and_each_worker_its_queues() {
    in_namespace_of_root("inside_queues");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_queues() {
    inside();
    veth(1500, 2);
    let control = control();
    let mut lanes = AfXdpPort::in_lanes(&options("near"), 5, &control).unwrap();
    assert_eq!(lanes.len(), 2);
    let mut far = AfXdpPort::in_lanes(&options("far"), 2, &control).unwrap();
    // A veth pair has the queue a frame left by, so what leaves by one arrives in the same.
    let (mut nobody, _other) = memory_pair(1);
    for (k, (near, far)) in lanes.iter_mut().zip(&mut far).enumerate() {
        wait_for_link(near, far);
        let seed = u8::try_from(k).unwrap();
        let frames: Vec<_> = (0..50)
            .map(|len| frame::pattern(60 + len, seed.into()))
            .collect();
        assert_eq!(send(near, &frames), 50);
        assert_eq!(receive(&mut nobody, far, 50), frames);
    }
    lanes.pop();
    assert!(is_attached("near"), "the other part is still there");
    drop((lanes, far));
    eventually("the program stays attached", || !is_attached("near"));

    // Both queues in one part.
    let mut near = open(&options("near"), &control);
    let mut far = AfXdpPort::in_lanes(&options("far"), 2, &control).unwrap();
    let frames: Vec<_> = (0..20).map(|len| frame::pattern(60 + len, 9)).collect();
    for far in &mut far {
        wait_for_link(far, &mut near);
        assert_eq!(send(far, &frames), 20);
        assert_eq!(receive(&mut nobody, &mut near, 20), frames);
    }
}

#[test]
fn what_cannot_be_is_told_with_what_to_do() {
    in_namespace_of_root("inside_refusals");
}

#[test]
#[ignore = "started by the test above, in a network namespace of its own"]
fn inside_refusals() {
    inside();
    veth(1500, 1);
    let control = control();
    let told = |options: AfXdpOptions, expected: &str| {
        let error = AfXdpPort::in_lanes(&options, 1, &control).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    let near = || options("near");
    told(
        AfXdpOptions {
            queues: Some(3),
            ..near()
        },
        "queues is 3, and 1 to 1, which is what near receives on",
    );
    told(
        AfXdpOptions {
            ring_size: 100,
            ..near()
        },
        "a power of two from 8 to 32768",
    );
    told(
        AfXdpOptions {
            mode: XdpMode::ZeroCopy,
            ..near()
        },
        "its driver cannot do without copying",
    );
    told(
        AfXdpOptions {
            mode: XdpMode::ZeroCopy,
            attach: XdpAttach::Generic,
            ..near()
        },
        "mode is zero-copy, and auto or copy for near",
    );
    told(
        AfXdpOptions {
            attach: XdpAttach::Native,
            ..options("lo")
        },
        "its driver knows no XDP",
    );
    assert!(!is_attached("near"), "a refusal leaves nothing behind");
    let _held = open(&near(), &control);
    told(near(), "another XDP program is there");
}
