//! Ports on sockets: VXLAN, datagrams, and connections, over loopback and in short directories.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, memory_pair};
use virtnet_ports::{
    Control, DgramPort, Endpoint, StreamPort, StreamWatch, VxlanOptions, VxlanPort,
};
use virtnet_sys::{Events, Poller};
use virtnet_testkit::{Limits, TempDir, check_port_with, frame, receive, send};

const PATIENCE: Duration = Duration::from_secs(20);

#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Addresses of loopback that are free now.
fn free<const N: usize>(host: &str) -> [SocketAddr; N] {
    let sockets = [(); N].map(|()| UdpSocket::bind((host, 0)).unwrap());
    sockets.map(|socket| socket.local_addr().unwrap())
}

fn has_ipv6() -> bool {
    UdpSocket::bind("[::1]:0").is_ok()
}

fn hosts() -> Vec<&'static str> {
    let all = ["127.0.0.1", "::1"];
    all[..if has_ipv6() { 2 } else { 1 }].to_vec()
}

fn datagrams(max_len: usize) -> Limits {
    Limits {
        max_len,
        back_pressure: false,
        ..Limits::default()
    }
}

fn vxlan(local: SocketAddr, vni: u32, remotes: &[SocketAddr]) -> VxlanOptions {
    VxlanOptions::new(local, vni, remotes.to_vec())
}

#[test]
fn two_ends_of_a_vxlan_keep_the_promises_of_a_port() {
    for host in hosts() {
        for source_ports in [0, 1, 4] {
            let [a, b] = free(host);
            let open = |local, remote| {
                let mut options = vxlan(local, 42, &[remote]);
                options.source_ports = source_ports;
                VxlanPort::open(&options).unwrap()
            };
            check_port_with(&mut open(a, b), &mut open(b, a), datagrams(60_000));
        }
    }
}

/// A datagram with a frame of `len` bytes inside.
fn tunnelled(flags: u8, vni: u32, len: usize) -> Vec<u8> {
    let [_, a, b, c] = vni.to_be_bytes();
    let mut inner = frame::pattern(len, 1);
    inner.truncate(len);
    [vec![flags, 0, 0, 0, a, b, c, 0], inner].concat()
}

#[test]
fn a_vxlan_takes_what_is_its_own_and_counts_the_rest() {
    let [local, remote] = free("127.0.0.1");
    // Another port of the same host is the remote as well: senders choose their ports.
    let mut port = VxlanPort::open(&vxlan(local, 0x12_3456, &[remote])).unwrap();
    let friend = UdpSocket::bind("127.0.0.1:0").unwrap();
    let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
    let vni = 0x12_3456;
    for datagram in [
        tunnelled(0x08, vni, 60),
        // Reserved bits are not looked at.
        tunnelled(0xff, vni, 61),
        tunnelled(0xf7, vni, 62),
        tunnelled(0x08, vni + 1, 63),
        tunnelled(0x08, 0, 64),
        tunnelled(0x08, vni, 13),
        vec![0x08; 7],
        vec![],
        tunnelled(0x08, vni, 14),
    ] {
        friend.send_to(&datagram, local).unwrap();
    }
    stranger.send_to(&tunnelled(0x08, vni, 70), local).unwrap();
    let (mut nobody, _other) = memory_pair(1);
    let lens: Vec<_> = receive(&mut nobody, &mut port, 3)
        .iter()
        .map(Vec::len)
        .collect();
    assert_eq!(lens, [60, 61, 14]);
    eventually("all are counted", || {
        port.rx(&mut Burst::new());
        port.counters().received == 10
    });
    let drops = port.counters().rx_drops;
    let of = |reason| drops.of(reason);
    assert_eq!(of(DropReason::Malformed), 3);
    assert_eq!(of(DropReason::WrongVni), 2);
    assert_eq!(of(DropReason::Runt), 1);
    assert_eq!(of(DropReason::UnknownSender), 1);
    assert_eq!(drops.total(), 7);
}

#[test]
fn what_leaves_has_the_header_of_the_rfc_and_a_flow_keeps_its_source_port() {
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    let [local] = free("127.0.0.1");
    let options = vxlan(local, 0xab_cdef, &[far.local_addr().unwrap()]);
    let mut port = VxlanPort::open(&options).unwrap();
    let (us, them) = (frame::Endpoint::number(1), frame::Endpoint::number(2));
    let mut sources = std::collections::BTreeSet::new();
    for flow in 0..64 {
        let mut from = us;
        from.port = 1000 + flow;
        let frame = from.udp(&them, b"hello");
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..3 {
            assert_eq!(send(&mut port, std::slice::from_ref(&frame)), 1);
            let mut bytes = [0; 2000];
            let (n, source) = far.recv_from(&mut bytes).unwrap();
            assert_eq!(bytes[..8], [8, 0, 0, 0, 0xab, 0xcd, 0xef, 0]);
            assert_eq!(bytes[8..n], frame);
            seen.insert(source.port());
        }
        assert_eq!(seen.len(), 1, "a flow keeps its port");
        sources.extend(seen);
    }
    assert!((9..=16).contains(&sources.len()), "{sources:?}");
    assert!(!sources.contains(&local.port()));
}

#[test]
fn what_is_for_all_goes_to_every_remote_and_stations_are_learnt() {
    // Hosts are told apart by their addresses.
    let far = [2, 3, 4].map(|host| {
        let socket = UdpSocket::bind((format!("127.0.0.{host}"), 0)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    });
    let remotes: Vec<_> = far.iter().map(|s| s.local_addr().unwrap()).collect();
    let [mut local] = free("127.0.0.1");
    local.set_ip([0, 0, 0, 0].into());
    let mut port = VxlanPort::open(&vxlan(local, 7, &remotes)).unwrap();
    let (us, them) = (frame::Endpoint::number(1), frame::Endpoint::number(2));
    let count = || -> Vec<usize> {
        far.iter()
            .map(|s| {
                let mut bytes = [0; 2000];
                std::iter::from_fn(|| s.recv(&mut bytes).ok()).count()
            })
            .collect()
    };
    let frame = us.udp(&them, b"where are you?");
    assert_eq!(send(&mut port, &[frame.clone(), us.who_has(them.ip)]), 2);
    assert_eq!(count(), [2, 2, 2], "unknown, and for everybody");
    assert_eq!(port.counters().sent, 2);

    // It answers from the second host, by whatever port.
    let answer = [tunnelled(8, 7, 0), them.udp(&us, b"here")].concat();
    let [second] = free::<1>("127.0.0.3");
    let second = UdpSocket::bind(second).unwrap();
    let to = SocketAddr::from(([127, 0, 0, 1], local.port()));
    second.send_to(&answer, to).unwrap();
    let (mut nobody, _other) = memory_pair(1);
    assert_eq!(receive(&mut nobody, &mut port, 1).len(), 1);
    assert_eq!(send(&mut port, &[frame.clone(), us.who_has(them.ip)]), 2);
    assert_eq!(count(), [1, 2, 1], "known now");
    let detail = port.watch().detail();
    assert_eq!(
        detail,
        [("copies", 10), ("copies_lost", 0), ("stations", 1)]
    );

    // One that cannot be reached costs only its own copies.
    let mut options = vxlan(
        local,
        7,
        &[remotes[0], "255.255.255.255:1".parse().unwrap()],
    );
    drop(port);
    options.learn = false;
    let mut port = VxlanPort::open(&options).unwrap();
    assert_eq!(send(&mut port, &[frame.clone(), frame]), 2);
    assert_eq!(count(), [2, 0, 0]);
    let counters = port.counters();
    assert_eq!((counters.sent, counters.tx_drops.total()), (2, 0));
    assert_eq!(port.watch().detail()[1], ("copies_lost", 2));
    let (events, _) = port.watch().events().since(0);
    assert_eq!(events.len(), 1, "{events:?}");
}

#[test]
fn a_vxlan_that_cannot_be_is_refused_and_says_why() {
    let local: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let remote: SocketAddr = "127.0.0.1:4789".parse().unwrap();
    let six: SocketAddr = "[::1]:4789".parse().unwrap();
    for (options, says) in [
        (vxlan(local, 1 << 24, &[remote]), "vni is 16777216"),
        (vxlan(local, 1, &[]), "1 to 64"),
        (vxlan(local, 1, &[remote; 65]), "65 addresses"),
        (vxlan(local, 1, &[remote, six]), "same version of IP"),
        (
            vxlan("192.0.2.1:0".parse().unwrap(), 1, &[remote]),
            "no interface of this host has the address",
        ),
    ] {
        let error = VxlanPort::open(&options).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn datagram_sockets_keep_the_promises_of_a_port() {
    let directory = TempDir::new();
    let paths = [directory.join("a"), directory.join("b")].map(Endpoint::Unix);
    let mut pairs = vec![(paths, true)];
    pairs.extend(
        hosts()
            .iter()
            .map(|host| (free(host).map(Endpoint::Inet), false)),
    );
    for ([a, b], is_unix) in pairs {
        let mut one = DgramPort::open(&a, &b).unwrap();
        let mut other = DgramPort::open(&b, &a).unwrap();
        let limits = Limits {
            back_pressure: is_unix,
            ..datagrams(if is_unix { 65_535 } else { 65_487 })
        };
        check_port_with(&mut one, &mut other, limits);
    }
}

#[test]
fn a_datagram_socket_finds_its_other_end_again() {
    let directory = TempDir::new();
    let (ours, theirs) = (directory.join("ours"), directory.join("theirs"));
    let open = || {
        DgramPort::open(
            &Endpoint::Unix(ours.clone()),
            &Endpoint::Unix(theirs.clone()),
        )
        .unwrap()
    };
    let mut port = open();
    let watch = port.watch();
    let frame = frame::pattern(60, 1);
    for _ in 0..3 {
        assert_eq!(send(&mut port, std::slice::from_ref(&frame)), 1);
    }
    assert!(!watch.is_there());
    assert_eq!(port.counters().tx_drops.of(DropReason::PortDown), 3);
    let peer = UnixDatagram::bind(&theirs).unwrap();
    assert_eq!(send(&mut port, std::slice::from_ref(&frame)), 1);
    assert!(watch.is_there());
    let mut bytes = [0; 100];
    assert_eq!(peer.recv(&mut bytes).unwrap(), 60);
    for len in [0, 13, 14] {
        peer.send_to(&vec![1; len], &ours).unwrap();
    }
    let mut burst = Burst::new();
    eventually("it arrives", || port.rx(&mut burst) == 1);
    assert_eq!(port.counters().rx_drops.of(DropReason::Runt), 2);
    assert!(!port.arm());
    let kinds: Vec<_> = (watch.events().since(0).0.iter())
        .map(|event| event.what.kind())
        .collect();
    assert_eq!(kinds, ["nobody", "connected"]);
    // Nobody takes it over, and it goes with its port.
    let error = DgramPort::open(
        &Endpoint::Unix(ours.clone()),
        &Endpoint::Unix(theirs.clone()),
    );
    assert!(error.unwrap_err().to_string().contains("in use"));
    drop(port);
    assert!(!ours.exists());
    // What a killed process leaves is replaced.
    drop(UnixDatagram::bind(&ours).unwrap());
    drop(open());
    assert!(!ours.exists());
}

#[test]
fn a_peer_with_no_room_is_waited_for_and_what_it_never_takes_is_counted() {
    let directory = TempDir::new();
    let (ours, theirs) = (directory.join("ours"), directory.join("theirs"));
    let (ours, path) = (Endpoint::Unix(ours), Endpoint::Unix(theirs.clone()));
    let mut port = DgramPort::open(&ours, &path).unwrap();
    let peer = UnixDatagram::bind(&theirs).unwrap();
    let mut burst = Burst::new();
    burst.push_bytes(&frame::pattern(1000, 1), Offload::default());
    let mut accepted = 0;
    while port.tx(&burst, &Picks::first(1)) == 1 {
        accepted += 1;
        assert!(accepted < 100_000);
    }
    // Whoever waits is woken to try again, seldom.
    let poller = Poller::new().unwrap();
    poller.add(port.wait_fd().unwrap(), 0).unwrap();
    let mut events = Events::with_capacity(1);
    let (mut wakes, start) = (0, Instant::now());
    while start.elapsed() < Duration::from_millis(300) {
        if !port.arm() {
            wakes += poller.wait(&mut events, Some(PATIENCE)).unwrap();
        }
        port.rx(&mut Burst::new());
    }
    assert!((1..100).contains(&wakes), "{wakes} times");
    let mut bytes = [0; 2000];
    for _ in 0..100 {
        assert_eq!(peer.recv(&mut bytes).unwrap(), 1000);
        port.flush();
    }
    drop(peer);
    port.flush();
    let counters = port.counters();
    let lost = counters.tx_drops.of(DropReason::PortDown);
    assert!(lost > 0);
    assert_eq!(counters.sent + lost, accepted);
    assert_eq!(counters.sent_bytes, counters.sent * 1000);
    assert!(!port.arm(), "nothing is left to do");
}

#[test]
fn nobody_at_an_address_is_noticed() {
    let [a, b] = free("127.0.0.1");
    let mut port = DgramPort::open(&Endpoint::Inet(a), &Endpoint::Inet(b)).unwrap();
    let frame = frame::pattern(60, 1);
    eventually("it is refused", || {
        send(&mut port, std::slice::from_ref(&frame));
        !port.watch().is_there()
    });
    let peer = UdpSocket::bind(b).unwrap();
    peer.send_to(&frame, a).unwrap();
    let (mut nobody, _other) = memory_pair(1);
    assert_eq!(receive(&mut nobody, &mut port, 1), [frame]);
    assert!(port.watch().is_there());
    let unix = Endpoint::parse("/tmp/x");
    let error = DgramPort::open(&Endpoint::Inet(a), &unix).unwrap_err();
    assert!(error.to_string().contains("same kind"), "{error}");
}

/// A port and whoever serves it.
fn stream(at: &Endpoint, client: bool) -> (StreamPort, StreamWatch, Control) {
    let control = Control::start("test").unwrap();
    let port = StreamPort::open(at, client, &control).unwrap();
    let watch = port.watch();
    (port, watch, control)
}

fn wait_up(port: &mut StreamPort) {
    eventually("somebody comes", || port.sync() || port.is_up());
}

#[test]
fn connections_keep_the_promises_of_a_port() {
    let directory = TempDir::new();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    for at in [
        Endpoint::Unix(directory.join("s")),
        Endpoint::Inet(tcp.unwrap()),
    ] {
        // The client is first: it tries again.
        let (mut b, watch, _b) = stream(&at, true);
        eventually("nobody is told", || watch.last_error().is_some());
        let (mut a, _, _a) = stream(&at, false);
        wait_up(&mut a);
        wait_up(&mut b);
        check_port_with(&mut a, &mut b, Limits::default());
        assert_eq!(watch.sessions(), 1);
    }
}

#[test]
fn whoever_announces_what_is_no_frame_loses_its_connection_only() {
    let directory = TempDir::new();
    let path = directory.join("s");
    let (mut port, watch, _control) = stream(&Endpoint::Unix(path.clone()), false);
    let (mut nobody, _other) = memory_pair(1);
    for (session, length) in [69_633_u32, u32::MAX, 0x4745_5420].into_iter().enumerate() {
        let mut peer = UnixStream::connect(&path).unwrap();
        wait_up(&mut port);
        assert_eq!(watch.peer_pid(), i32::try_from(std::process::id()).ok());
        let good = frame::pattern(99, 1);
        peer.write_all(&99_u32.to_be_bytes()).unwrap();
        peer.write_all(&good).unwrap();
        peer.write_all(&length.to_be_bytes()).unwrap();
        assert_eq!(receive(&mut nobody, &mut port, 1), [good]);
        eventually("it is closed", || {
            port.rx(&mut Burst::new());
            !port.is_up()
        });
        let error = watch.last_error().unwrap();
        assert!(
            error.contains(&format!("a frame of {length} bytes")),
            "{error}"
        );
        assert!(peer.read(&mut [0]).map_or(true, |n| n == 0));
        assert_eq!(watch.sessions(), session as u64 + 1);
        assert_eq!(send(&mut port, &[frame::pattern(60, 1)]), 1);
    }
    let counters = port.counters();
    assert_eq!(counters.received, 3);
    assert_eq!(counters.tx_drops.of(DropReason::PortDown), 3);
}

#[test]
fn bytes_may_come_one_by_one_and_short_frames_are_counted() {
    let directory = TempDir::new();
    let path = directory.join("s");
    let (mut port, _, _control) = stream(&Endpoint::Unix(path.clone()), false);
    let mut peer = UnixStream::connect(&path).unwrap();
    wait_up(&mut port);
    let frame = frame::pattern(14, 3);
    let mut bytes = vec![0, 0, 0, 0, 0, 0, 0, 1, 9, 0, 0, 0, 14];
    bytes.extend(&frame);
    let mut burst = Burst::new();
    for (i, byte) in bytes.iter().enumerate() {
        assert_eq!(burst.len(), 0, "after {i} bytes");
        peer.write_all(&[*byte]).unwrap();
        port.rx(&mut burst);
    }
    assert_eq!((burst.len(), burst.head(0)), (1, &frame[..]));
    assert_eq!(port.counters().rx_drops.of(DropReason::Runt), 2);
    assert!(!port.arm(), "nothing is left to do");
}

#[test]
fn a_peer_that_does_not_read_fills_its_connection_and_no_more() {
    let directory = TempDir::new();
    let path = directory.join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (mut port, watch, _control) = stream(&Endpoint::Unix(path), true);
    let (mut peer, _) = listener.accept().unwrap();
    wait_up(&mut port);
    let mut burst = Burst::new();
    burst.push_bytes(&frame::pattern(1000, 1), Offload::default());
    let mut accepted = 0;
    while port.tx(&burst, &Picks::first(1)) == 1 {
        port.flush();
        accepted += 1;
        assert!(accepted < 100_000);
    }
    assert_eq!(port.counters().sent, accepted);
    assert!(!port.arm(), "a peer that does not read keeps nobody awake");
    // Half of it is read, then the peer goes.
    let mut bytes = vec![0; 1004 * 50];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..4], 1000_u32.to_be_bytes());
    eventually("there is room again", || {
        port.rx(&mut Burst::new());
        port.tx(&burst, &Picks::first(1)) == 1
    });
    drop(peer);
    eventually("it is noticed", || {
        port.flush();
        port.rx(&mut Burst::new());
        !port.is_up()
    });
    let counters = port.counters();
    let lost = counters.tx_drops.of(DropReason::PortDown);
    assert!(lost > 0, "what waited in the port");
    assert_eq!(counters.sent + lost, accepted + 1);
    assert_eq!(counters.sent_bytes, counters.sent * 1000);
    // And it comes back.
    let (_peer, _) = listener.accept().unwrap();
    wait_up(&mut port);
    assert_eq!(watch.sessions(), 2);
    let kinds: Vec<_> = (watch.events().since(0).0.iter())
        .map(|event| event.what.kind())
        .collect();
    assert_eq!(kinds, ["connected", "disconnected", "connected"]);
}

#[test]
fn a_second_peer_waits_until_the_first_has_gone() {
    let directory = TempDir::new();
    let path = directory.join("s");
    let (mut port, watch, _control) = stream(&Endpoint::Unix(path.clone()), false);
    let first = UnixStream::connect(&path).unwrap();
    wait_up(&mut port);
    let mut second = UnixStream::connect(&path).unwrap();
    second.write_all(&60_u32.to_be_bytes()).unwrap();
    second.write_all(&frame::pattern(60, 2)).unwrap();
    assert_eq!(port.rx(&mut Burst::new()), 0);
    drop(first);
    let mut burst = Burst::new();
    eventually("its frame comes", || {
        port.sync();
        port.rx(&mut burst) == 1
    });
    assert_eq!(watch.sessions(), 2);
}
