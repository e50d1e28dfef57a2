//! The configuration space of a vhost-user port, as the virtio-user port reads it and follows it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use support::{Pair, Wiring, beside_others, until};
use virtnet_packet::{DropReason, Port};
use virtnet_ports::{Control, VhostUserOptions, VhostUserPort};
use virtnet_testkit::frame::Endpoint;
use virtnet_testkit::{TempDir, receive, send};
use virtnet_virtio::Features;
use virtnet_virtio::net::{NetConfig, RssConfig};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn connect(change: impl FnOnce(&mut VhostUserOptions)) -> Pair {
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let mut options = VhostUserOptions::new(&path);
    change(&mut options);
    let pair = Pair {
        device: VhostUserPort::new(options, &control).unwrap(),
        driver: Wiring::default().driver(&path, &control),
        control,
        directory,
    };
    pair.wait_until_running();
    pair
}

/// What a device with hashes tells of them. Spec: virtio 1.4, 5.1.4.
const RSS: RssConfig = RssConfig {
    max_key_len: 40,
    max_table_len: 128,
    hash_types: 0x3f,
};

#[test]
fn the_driver_reads_what_the_device_is_told_to_say() {
    let _gate = beside_others();
    let pair = connect(|options| {
        options.mac = Some(MAC);
        options.mtu = Some(9000);
        options.speed_mbps = Some(25_000);
        options.queue_pairs = 4;
    });
    let expected = NetConfig {
        mac: Some(MAC),
        link_up: Some(true),
        announce: false,
        max_queue_pairs: Some(4),
        mtu: Some(9000),
        speed_mbps: Some(25_000),
        full_duplex: Some(true),
        rss: Some(RSS),
    };
    let status = pair.driver.status().unwrap();
    assert_eq!(status.config, Some(expected));
    assert_eq!(pair.device.status().unwrap().config, Some(expected));
    let negotiated = Features::from_bits_retain(status.negotiated);
    assert!(negotiated.contains(Features::MAC | Features::STATUS | Features::SPEED_DUPLEX));
}

#[test]
fn a_device_without_options_says_what_holds_for_any() {
    let _gate = beside_others();
    let pair = connect(|_| {});
    let expected = NetConfig {
        link_up: Some(true),
        mtu: Some(1500),
        rss: Some(RSS),
        ..NetConfig::default()
    };
    assert_eq!(pair.driver.status().unwrap().config, Some(expected));
}

#[test]
fn a_link_that_goes_down_is_followed_at_once_and_nothing_passes() {
    let _gate = beside_others();
    let mut pair = connect(|_| {});
    let frame = Endpoint::number(1).udp(&Endpoint::number(2), &[7; 100]);
    let link = |pair: &Pair| pair.driver.status().unwrap().config.unwrap().link_up;
    for round in 1..=3 {
        pair.device.set_link(false).unwrap();
        until("the driver knows", || link(&pair) == Some(false));
        let status = pair.device.status().unwrap();
        assert_eq!((status.state, status.link_up), ("connected", false));
        for port in [&mut pair.device as &mut dyn Port, &mut pair.driver] {
            port.attach();
            port.sync();
            assert_eq!(send(port, std::slice::from_ref(&frame)), 0);
            port.drop_tx(DropReason::NoRoom, 1);
            port.detach();
            let drops = port.counters().tx_drops;
            assert_eq!(drops.of(DropReason::PortDown), round, "{drops:?}");
        }
        pair.device.set_link(true).unwrap();
        until("the driver knows", || link(&pair) == Some(true));
        pair.wait_until_running();
        pair.driver.attach();
        pair.device.attach();
        assert_eq!(send(&mut pair.driver, std::slice::from_ref(&frame)), 1);
        let back = receive(&mut pair.driver, &mut pair.device, 1);
        pair.driver.detach();
        pair.device.detach();
        assert_eq!(back, std::slice::from_ref(&frame));
    }
}

#[test]
fn a_link_that_is_down_before_anyone_comes_is_found_down() {
    let _gate = beside_others();
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let device = VhostUserPort::new(VhostUserOptions::new(&path), &control).unwrap();
    device.set_link(false).unwrap();
    let driver = Wiring::default().driver(&path, &control);
    until("the driver runs", || {
        driver.status().unwrap().state == "running"
    });
    assert_eq!(
        driver.status().unwrap().config.unwrap().link_up,
        Some(false)
    );
    device.set_link(true).unwrap();
    until("the driver knows", || {
        driver.status().unwrap().config.unwrap().link_up == Some(true)
    });
}
