//! The virtio-user port against back-ends that offer too little, say nonsense, or break the rings.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{
    Echo, PATIENCE, Wiring, alone, beside_others, breathe, burst_of, open_things, send_or_drop,
    until,
};
use virtnet_mem::{GuestAddr, GuestMemory, UserAddr};
use virtnet_packet::Port;
use virtnet_ports::{Control, VirtioUserPort, VirtioUserStatus, VirtioUserWatch};
use virtnet_sys::{EventFd, Events, Listener, Poller, Stream};
use virtnet_testkit::{TempDir, frame};
use virtnet_vhost::payload::MemoryRegion;
use virtnet_vhost::{
    Backend, BackendDevice, DeviceError, LogFile, Offer, ProtocolFeatures, Region, RingAddresses,
    RingSetup,
};
use virtnet_virtio::{Features, RingFormat};

/// What a sane back-end of one queue pair offers.
const OFFER: Features = Features::VERSION_1
    .union(Features::RING_PACKED)
    .union(Features::MRG_RXBUF);

/// A device that keeps the rings it is given, for a test to write into them.
#[derive(Default)]
struct Liar {
    memory: Option<Arc<GuestMemory>>,
    rings: BTreeMap<usize, RingSetup>,
}

impl Liar {
    /// Writes into a ring's Device Area, or its descriptors, and calls.
    fn write(&self, ring: usize, part: fn(&RingAddresses) -> u64, offset: u64, value: u16) {
        let setup = &self.rings[&ring];
        let memory = self.memory.as_ref().unwrap();
        let place = UserAddr(part(&setup.addresses) + offset);
        let window = memory.window(place, 2, 2).unwrap();
        window.store_u16(0, value, Ordering::SeqCst);
        setup.call.as_ref().unwrap().signal().unwrap();
    }
}

fn map(region: Region) -> Result<virtnet_mem::Region, DeviceError> {
    let layout = region.layout;
    Ok(virtnet_mem::Region::map_file(
        region.file,
        layout.mmap_offset,
        layout.size,
        GuestAddr(layout.guest_addr),
        UserAddr(layout.user_addr),
    )?)
}

impl BackendDevice for Liar {
    fn set_features(&mut self, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_memory(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        let regions = regions.into_iter().map(map).collect::<Result<_, _>>()?;
        self.memory = Some(Arc::new(GuestMemory::new(regions)?));
        Ok(())
    }
    fn add_memory(&mut self, _: Region) -> Result<(), DeviceError> {
        Err("one table is enough".into())
    }
    fn remove_memory(&mut self, _: MemoryRegion) -> Result<(), DeviceError> {
        Err("one table is enough".into())
    }
    fn set_log(&mut self, _: LogFile) -> Result<(), DeviceError> {
        Err("no guest of ours moves".into())
    }
    fn start_ring(&mut self, ring: usize, setup: RingSetup) -> Result<(), DeviceError> {
        self.rings.insert(ring, setup);
        Ok(())
    }
    fn stop_ring(&mut self, ring: usize) -> Result<Option<u32>, DeviceError> {
        self.rings.remove(&ring);
        Ok(None)
    }
    fn enable_ring(&mut self, _: usize, _: bool) {}
    fn set_kick(&mut self, _: usize, _: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_call(&mut self, _: usize, _: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_err(&mut self, _: usize, _: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn set_addresses(&mut self, _: usize, _: RingAddresses) -> Result<(), DeviceError> {
        Ok(())
    }
    fn disconnected(&mut self) {}
}

/// A place where back-ends listen, and a driver that looks for one there.
struct Scene {
    path: PathBuf,
    listener: Option<Listener>,
    watch: VirtioUserWatch,
    port: VirtioUserPort,
    wiring: Wiring,
    control: Control,
    _directory: TempDir,
}

impl Scene {
    fn new(wiring: Wiring) -> Self {
        let directory = TempDir::new();
        let control = Control::start("control").unwrap();
        let path = directory.join("port.sock");
        let listener = Listener::bind(&path).unwrap();
        let port = wiring.driver(&path, &control);
        Self {
            listener: Some(listener),
            watch: port.watch(),
            port,
            path,
            wiring,
            control,
            _directory: directory,
        }
    }

    fn status(&self) -> VirtioUserStatus {
        self.watch.status().unwrap()
    }

    /// The next connection of the driver.
    #[track_caller]
    fn accept(&self) -> Stream {
        let mut accepted = None;
        until("the driver connects", || {
            accepted = self.listener.as_ref().unwrap().accept().ok();
            accepted.is_some()
        });
        accepted.unwrap()
    }

    /// A back-end that does everything right until the rings run, and a device to lie with.
    #[track_caller]
    fn liar(&self, offer: Features) -> (Backend, Liar) {
        let offer = Offer::new(offer.bits(), ProtocolFeatures::all(), 1);
        let mut backend = Backend::new(self.accept(), offer);
        let mut device = Liar::default();
        until("the driver runs", || {
            drop(backend.on_readable(&mut device));
            self.status().state == "running"
        });
        assert_eq!(device.rings.len(), 2);
        (backend, device)
    }

    /// The last words: with a back-end that is right everything is right.
    #[track_caller]
    fn assert_recovers(mut self) {
        self.listener = None;
        let device = self.wiring.device(&self.path, &self.control);
        until("the driver runs", || self.status().state == "running");
        let echo = Echo::start(device);
        self.port.attach();
        let sent = frame::pattern(100, 1);
        let mut back = Vec::new();
        until("the frame comes back", || {
            if back.is_empty() {
                send_or_drop(&mut self.port, &burst_of(std::slice::from_ref(&sent)));
            }
            back.extend(breathe(&mut self.port));
            back.contains(&sent)
        });
        drop(echo.stop());
    }
}

#[test]
fn tc3_tc4_a_back_end_that_offers_too_little_is_left_with_what_is_missing() {
    let _gate = beside_others();
    let packed = Wiring {
        format: RingFormat::Packed,
        ..Wiring::default()
    };
    let four = Wiring {
        queue_pairs: 4,
        ..Wiring::default()
    };
    let hidden = Wiring {
        iommu: true,
        ..Wiring::default()
    };
    let cases = [
        (packed, OFFER - Features::RING_PACKED, 1, "packed rings"),
        (hidden, OFFER, 1, "translated addresses"),
        (four, OFFER, 2, "4 queue pairs, only 2"),
    ];
    for (wiring, offer, pairs, text) in cases {
        let scene = Scene::new(wiring);
        let offer = Offer::new(offer.bits(), ProtocolFeatures::all(), pairs);
        let mut backend = Backend::new(scene.accept(), offer);
        let mut device = Liar::default();
        let mut left = false;
        until("the driver leaves", || {
            left |= backend.on_readable(&mut device).is_err();
            left
        });
        until("the driver says why", || {
            let status = scene.status();
            let error = status.last_error.unwrap_or_default();
            status.state == "connecting" && error.contains(text)
        });
        scene.assert_recovers();
    }
}

#[test]
fn tc1_a_back_end_that_talks_nonsense_is_left_and_tried_again() {
    let _gate = beside_others();
    let scene = Scene::new(Wiring::default());
    let message = |code: u32, flags: u32, payload: &[u8]| {
        let header = [code, flags, payload.len() as u32].map(u32::to_ne_bytes);
        [&header.concat(), payload].concat()
    };
    let cases = [
        ("another version", message(1, 6, &[0; 8])),
        ("no reply", message(1, 1, &[0; 8])),
        ("another request", message(15, 5, &[0; 8])),
        ("too short", message(1, 5, &[0; 7])),
        ("too long", message(1, 5, &[0; 9])),
        ("nothing", message(1, 5, &[])),
        (
            "an endless one",
            [1, 5, u32::MAX].map(u32::to_ne_bytes).concat(),
        ),
        ("none of the kind", b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec()),
    ];
    for (name, bytes) in cases {
        let stream = scene.accept();
        stream.send(&bytes, &[]).unwrap();
        until(name, || scene.status().state == "connecting");
        assert!(scene.status().last_error.is_some(), "{name}");
    }
    // One with descriptors that nobody asked for.
    let stream = scene.accept();
    let event = EventFd::new().unwrap();
    let fd = std::os::fd::AsFd::as_fd(&event);
    stream.send(&message(1, 5, &[0; 8]), &[fd]).unwrap();
    until("descriptors", || scene.status().state == "connecting");
    let error = scene.status().last_error.unwrap();
    assert!(error.contains("descriptors"), "{error}");
    drop(stream);
    scene.assert_recovers();
}

/// What a device can write so that a driver cannot go on: a part of the ring, an offset in it, a value.
type Lie = (&'static str, fn(&RingAddresses) -> u64, u64, u16);

#[test]
fn tc7_tc8_a_device_that_breaks_a_ring_is_left_and_tried_again() {
    let _gate = beside_others();
    let device_area: fn(&RingAddresses) -> u64 = |place| place.device_area;
    let descriptors: fn(&RingAddresses) -> u64 = |place| place.descriptor_area;
    let split: [Lie; 2] = [
        // The id of an entry first, and then the index that makes the driver look.
        ("an index beyond", device_area, 2, 1000),
        ("an index behind", device_area, 2, 0xfff0),
    ];
    // The first descriptor used on the first lap, with an id that was never given.
    let packed: [Lie; 1] = [("an id from nowhere", descriptors, 14, 0x8080)];
    for (format, lies) in [
        (RingFormat::Split, &split[..]),
        (RingFormat::Packed, &packed[..]),
    ] {
        for &(name, part, offset, value) in lies {
            for ring in [0, 1] {
                let mut scene = Scene::new(Wiring {
                    format,
                    ..Wiring::default()
                });
                let (backend, device) = scene.liar(OFFER);
                scene.port.attach();
                // Something is with the device, on either ring.
                let frames = [frame::pattern(100, 1)];
                assert_eq!(send_or_drop(&mut scene.port, &burst_of(&frames)), 1);
                scene.port.flush();
                if format == RingFormat::Packed {
                    device.write(ring, descriptors, 12, 999);
                }
                device.write(ring, part, offset, value);
                let mut refused = 0;
                until(name, || {
                    // A transmitq is looked at when it is full.
                    breathe(&mut scene.port);
                    refused =
                        send_or_drop(&mut scene.port, &burst_of(&vec![frames[0].clone(); 64]));
                    scene.port.flush();
                    refused == 0
                });
                scene.port.detach();
                until("the driver leaves the device", || {
                    let error = scene.status().last_error.unwrap_or_default();
                    scene.status().state == "connecting" && error.contains(&format!("ring {ring}"))
                });
                drop((backend, device));
                scene.assert_recovers();
            }
        }
    }
}

#[test]
fn tc17_a_device_that_takes_nothing_fills_the_ring_and_no_more() {
    let _gate = beside_others();
    for format in [RingFormat::Split, RingFormat::Packed] {
        let mut scene = Scene::new(Wiring {
            format,
            ..Wiring::default()
        });
        let (backend, device) = scene.liar(OFFER);
        scene.port.attach();
        let burst = burst_of(&vec![frame::pattern(100, 1); 64]);
        let mut taken = 0;
        for _ in 0..20 {
            taken += send_or_drop(&mut scene.port, &burst);
            scene.port.flush();
            assert!(breathe(&mut scene.port).is_empty());
        }
        assert_eq!(taken, 256);
        let counters = scene.port.counters();
        assert_eq!((counters.sent, counters.tx_drops.total()), (256, 1024));
        scene.port.detach();
        drop((backend, device));
        scene.assert_recovers();
    }
}

#[test]
fn tc18_calls_for_nothing_wake_a_worker_and_do_not_keep_it_awake() {
    let _gate = beside_others();
    let mut scene = Scene::new(Wiring::default());
    let (backend, device) = scene.liar(OFFER);
    scene.port.attach();
    let poller = Poller::new().unwrap();
    poller.add(scene.port.wait_fd().unwrap(), 0).unwrap();
    let call = device.rings[&0].call.clone().unwrap();
    for _ in 0..100 {
        until("the port can be armed", || {
            scene.port.sync();
            !scene.port.arm()
        });
        call.signal().unwrap();
        let woken = poller.wait(&mut Events::with_capacity(1), Some(PATIENCE));
        assert_eq!(woken.unwrap(), 1);
        scene.port.disarm();
    }
    until("the port can be armed", || !scene.port.arm());
    let still = poller.wait(&mut Events::with_capacity(1), Some(Duration::ZERO));
    assert_eq!(still.unwrap(), 0, "the last call is heard twice");
    scene.port.detach();
    drop((backend, device));
    scene.assert_recovers();
}

#[test]
fn te12_back_ends_that_come_and_go_leave_nothing_behind() {
    let _gate = alone();
    let scene = Scene::new(Wiring::default());
    let mut open = None;
    for _ in 0..12 {
        let (backend, device) = scene.liar(OFFER);
        drop((backend, device));
        until("the driver looks for another", || {
            scene.status().state == "connecting"
        });
        // Nobody is there, on either side.
        let things = open_things();
        assert_eq!(*open.get_or_insert(things), things);
    }
    scene.assert_recovers();
}
