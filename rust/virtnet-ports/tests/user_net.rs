//! A gateway against guests that mean harm: whatever they send, it answers the next one.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use virtnet_packet::{Burst, Offload, Picks, Port};
use virtnet_ports::{UserNetOptions, UserNetPort};

const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Frames that are right but for checksums: ARP, DHCP, DNS, TCP, echo, neighbour discovery.
fn seeds() -> Vec<Vec<u8>> {
    let ethernet =
        |kind: u16, rest: &[u8]| [&[0xff; 6][..], &GUEST, &kind.to_be_bytes(), rest].concat();
    let ipv4 = |protocol: u8, payload: &[u8]| {
        let mut header = vec![
            0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2,
        ];
        let total = u16::try_from(header.len() + payload.len()).expect("short");
        header[2..4].copy_from_slice(&total.to_be_bytes());
        let words = header
            .chunks(2)
            .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
        let sum: u32 = words.sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("short");
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        ethernet(0x0800, &[&header[..], payload].concat())
    };
    let udp = |port: u16, data: &[u8]| {
        let len = u16::try_from(8 + data.len()).expect("short").to_be_bytes();
        ipv4(
            17,
            &[&[0, 68][..], &port.to_be_bytes(), &len, &[0, 0], data].concat(),
        )
    };
    let mut dhcp = vec![0; 240];
    dhcp[..3].copy_from_slice(&[1, 1, 6]);
    dhcp[28..34].copy_from_slice(&GUEST);
    dhcp[236..].copy_from_slice(&[99, 130, 83, 99]);
    dhcp.extend_from_slice(&[53, 1, 3, 12, 3, b'v', b'm', b'1', 50, 4, 10, 0, 2, 20, 255]);
    let question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x07gateway\0\0\x01\0\x01";
    let syn = [
        0x30, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 255, 255, 0, 0, 0, 0, 2, 4, 5, 180,
    ];
    let mut solicit = vec![0x60, 0, 0, 0, 0, 32, 58, 255];
    solicit.extend_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    solicit.extend_from_slice(&[0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 2]);
    solicit.extend_from_slice(&[
        135, 0, 0, 0, 0, 0, 0, 0, 0xfd, 0x76, 0x6e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
    ]);
    solicit.extend_from_slice(&[1, 1, 2, 0, 0, 0, 0, 1]);
    vec![
        arp(),
        udp(67, &dhcp),
        udp(53, question),
        ipv4(6, &syn),
        ipv4(1, &[8, 0, 0, 0, 0, 1, 0, 1]),
        ethernet(0x86dd, &solicit),
    ]
}

fn arp() -> Vec<u8> {
    let mut frame = [
        &[0xff; 6][..],
        &GUEST,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &GUEST,
    ]
    .concat();
    frame.extend_from_slice(&[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    frame
}

/// Offers one frame, for as long as there is no room; everything that comes meanwhile is let go.
fn send(port: &mut UserNetPort, frame: &[u8], offload: Offload) {
    let (mut out, mut back) = (Burst::new(), Burst::new());
    out.push_bytes(frame, offload);
    let deadline = Instant::now() + Duration::from_secs(60);
    while port.tx(&out, &Picks::first(1)) == 0 {
        assert!(
            Instant::now() < deadline,
            "the gateway takes nothing any more"
        );
        back.clear();
        port.rx(&mut back);
        thread::sleep(Duration::from_millis(1));
    }
    port.flush();
    back.clear();
    port.rx(&mut back);
}

#[test]
fn whatever_guests_send_the_next_one_is_answered() {
    let options = UserNetOptions {
        outside: false,
        ..UserNetOptions::new(Ipv4Addr::new(10, 0, 2, 0), 24)
    };
    let mut port = UserNetPort::new(options).unwrap();
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % n
    };
    // Checksums that a guest leaves to be done are not looked at: what is wrong behind them is seen by everything else.
    let undone = Offload {
        flags: Offload::NEEDS_CSUM,
        ..Offload::default()
    };
    let seeds = seeds();
    for round in 0..6000 {
        let mut frame = seeds[round % seeds.len()].clone();
        for _ in 0..random(4) {
            let at = 14 + random(frame.len() - 14);
            frame[at] = u8::try_from(random(256)).unwrap();
        }
        if random(8) == 0 {
            frame.truncate(random(frame.len()));
        }
        send(
            &mut port,
            &frame,
            if round % 3 == 0 {
                Offload::default()
            } else {
                undone
            },
        );
    }
    let answered = port.watch().status().answered;
    assert!(answered > 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while port.watch().status().answered <= answered {
        assert!(Instant::now() < deadline, "it does not answer any more");
        send(&mut port, &arp(), Offload::default());
        thread::sleep(Duration::from_millis(5));
    }
}
