//! A back-end that goes in the middle of anything, and another that goes on with what its record says.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use support::{Pair, Wiring, beside_others, breathe, burst_of, send_or_drop, until};
use virtnet_packet::{DropReason, Port};
use virtnet_ports::{Control, VhostUserPort, What};
use virtnet_sys::memfd;
use virtnet_testkit::{FakeVm, FrontEnd, TempDir, frame, send};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{InflightArea, Payload, VringState};
use virtnet_virtio::{Features, RingFormat};

const SIZE: u16 = 64;
const FORMATS: [Features; 2] = [Features::empty(), Features::RING_PACKED];

/// A port, which the test is the worker of, and the record that its front-end keeps.
struct Scene {
    directory: TempDir,
    control: Control,
    features: Features,
    record: Option<(InflightArea, OwnedFd)>,
}

impl Scene {
    fn new(format: Features) -> Self {
        Self {
            directory: TempDir::new(),
            control: Control::start("control").unwrap(),
            features: Features::VERSION_1 | Features::EVENT_IDX | format,
            record: None,
        }
    }

    fn port(&self) -> VhostUserPort {
        let path = self.directory.join("port.sock");
        let mut port = Wiring::default().device(&path, &self.control);
        port.attach();
        port
    }

    fn front_end(&self) -> FrontEnd {
        FrontEnd::connect(&self.directory.join("port.sock"))
    }

    /// Tells the port everything.
    fn start(&mut self, port: &mut VhostUserPort, machine: Option<FakeVm>) -> FakeVm {
        let front_end = self.front_end();
        let record = &mut self.record;
        let features = self.features;
        aside(port, move || {
            let mut machine = match machine {
                Some(machine) => machine.reconnect(front_end),
                None => FakeVm::new(front_end, features, 1, SIZE),
            };
            machine.agree();
            if record.is_none() {
                *record = Some(ask_for_record(&machine.front_end));
            }
            if let Some((area, file)) = record {
                let request = Request::SetInflightFd(*area);
                machine.front_end.insist(&request, &[file.as_fd()]);
            }
            machine.tell_memory();
            machine.start_ring(0);
            machine.start_ring(1);
            machine
        })
    }
}

fn ask_for_record(front_end: &FrontEnd) -> (InflightArea, OwnedFd) {
    let asked = InflightArea {
        num_queues: 2,
        queue_size: SIZE,
        ..InflightArea::default()
    };
    let (payload, mut files) = front_end.ask_for_files(&Request::GetInflightFd(asked), &[]);
    let area = InflightArea::from_bytes(&payload).unwrap();
    assert_eq!((area.num_queues, area.queue_size), (2, SIZE));
    assert_eq!((area.mmap_offset, area.mmap_size % 64), (0, 0));
    assert_eq!(files.len(), 1);
    (area, files.remove(0))
}

/// Runs `tell` while nobody is the port's worker.
fn aside<R>(port: &mut VhostUserPort, tell: impl FnOnce() -> R) -> R {
    port.detach();
    let told = tell();
    port.attach();
    told
}

/// What a port has when it is gone: all of its process, without a word to anyone.
fn kill(port: VhostUserPort) {
    drop(port);
}

#[test]
fn a_record_is_made_as_long_as_the_format_says() {
    let _gate = beside_others();
    for (format, each) in [
        (Features::empty(), 16 + 16 * 64),
        (Features::RING_PACKED, 32 + 32 * 64),
    ] {
        let mut scene = Scene::new(format);
        let mut port = scene.port();
        let machine = scene.start(&mut port, None);
        let (area, file) = scene.record.take().unwrap();
        assert_eq!(area.mmap_size, 2 * u64::next_multiple_of(each, 64));
        assert_eq!(File::from(file).metadata().unwrap().len(), area.mmap_size);
        drop(machine);
    }
}

#[test]
fn packets_that_a_port_had_taken_when_it_went_are_taken_by_the_next_one() {
    let _gate = beside_others();
    for format in FORMATS {
        let mut scene = Scene::new(format);
        let (mut next, mut machine) = (0_u8, None);
        for round in 0..6 {
            let mut port = scene.port();
            let mut vm = scene.start(&mut port, machine.take());
            for _ in 0..5 + round {
                vm.transmit(0, &frame::pattern(100, next.into()));
                next += 1;
            }
            vm.make_room(0, 3, 2048);
            // It takes them, gives some of them on, and is gone before it has given anything back.
            let mut burst = virtnet_packet::Burst::new();
            assert_eq!(port.rx(&mut burst), 5 + round);
            send_or_drop(&mut port, &burst_of(&[frame::pattern(60, 1)]));
            kill(port);
            assert_eq!(vm.transmitted(0), 0);
            assert_eq!(vm.received(0).len(), 0);

            let mut port = scene.port();
            let mut vm = scene.start(&mut port, Some(vm));
            let told = port.watch().events().since(0).0;
            let recovered = told.iter().filter_map(|event| match event.what {
                What::RingRecovered {
                    ring, taken_again, ..
                } => Some((ring, taken_again)),
                _ => None,
            });
            let expected: Vec<_> = [(0, 1), (1, 5 + round as u16)].into();
            assert_eq!(recovered.collect::<Vec<_>>(), expected, "{format:?}");
            let frames = breathe(&mut port);
            let expected = (next - 5 - round as u8..next).map(|n| frame::pattern(100, n.into()));
            assert!(frames.into_iter().eq(expected), "{format:?}");
            assert_eq!(vm.transmitted(0), 5 + round);
            let all: Vec<_> = (0..3).map(|n| frame::pattern(70 + n, 9)).collect();
            assert_eq!(send_or_drop(&mut port, &burst_of(&all)), 3);
            port.flush();
            assert!(vm.received(0) == all, "{format:?}");
            kill(port);
            machine = Some(vm);
        }
    }
}

/// Tells everything about a ring, and takes it if that is refused.
fn try_to_start(vm: &FakeVm, ring: usize) {
    let state = |num| VringState {
        index: ring as u32,
        num,
    };
    let base = vm.rings[ring].queue.config(&vm.guest, vm.features).base;
    let front_end = &vm.front_end;
    front_end.insist(&Request::SetVringNum(state(SIZE.into())), &[]);
    front_end.insist(&Request::SetVringBase(state(base)), &[]);
    front_end.insist(&Request::SetVringAddr(vm.addresses(ring)), &[]);
    let kick = [vm.rings[ring].kick.as_fd()];
    front_end.accepts(&Request::SetVringKick(FakeVm::word(ring)), &kick);
}

#[test]
fn tb71_records_that_make_no_sense_start_no_ring_and_harm_nobody() {
    let _gate = beside_others();
    for format in FORMATS {
        let mut scene = Scene::new(format);
        let mut port = scene.port();
        let mut machine = Some(scene.start(&mut port, None));
        let (area, file) = scene.record.take().unwrap();
        let bytes = File::from(file.try_clone().unwrap());
        let mut seed = 1_u64;
        for round in 0..60_u8 {
            // Written all over, with a version and a size that are right, or not.
            let mut words = vec![0; area.mmap_size as usize];
            for byte in &mut words {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (seed >> 60) as u8 * (round % 3 + 1);
            }
            for region in words.chunks_mut(area.mmap_size as usize / 2) {
                region[8..10].copy_from_slice(&[1, 0]);
                region[10..12].copy_from_slice(&SIZE.to_le_bytes());
            }
            bytes.write_all_at(&words, 0).unwrap();
            drop(machine.take());
            let front_end = scene.front_end();
            let (features, file) = (scene.features, &file);
            machine = Some(aside(&mut port, move || {
                let mut vm = FakeVm::new(front_end, features, 1, SIZE);
                vm.agree();
                vm.front_end
                    .insist(&Request::SetInflightFd(area), &[file.as_fd()]);
                vm.tell_memory();
                for ring in 0..2 {
                    try_to_start(&vm, ring);
                }
                vm
            }));
            breathe(&mut port);
            port.flush();
        }
        // Too short for what it is said to be for.
        drop(machine.take());
        let front_end = scene.front_end();
        let short = memfd::create("virtnet-test", 4096, false).unwrap();
        aside(&mut port, move || {
            let big = InflightArea {
                mmap_size: 8192,
                ..area
            };
            let protocol = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::INFLIGHT_SHMFD;
            front_end.insist(&Request::SetProtocolFeatures(protocol.bits()), &[]);
            assert!(!front_end.accepts(&Request::SetInflightFd(big), &[short.as_fd()]));
        });
    }
}

/// Both ways through ports of ours, of which the vhost-user one is gone again and again in the middle of a breath.
#[test]
fn nothing_that_was_sent_is_lost_with_a_back_end_or_comes_twice() {
    let _gate = beside_others();
    for format in [RingFormat::Split, RingFormat::Packed] {
        for without in [Features::empty(), Features::IN_ORDER] {
            let wiring = Wiring {
                format,
                without,
                queue_size: 64,
                ..Wiring::default()
            };
            let Pair {
                mut device,
                mut driver,
                control,
                directory,
            } = wiring.connect();
            let mut next = 0;
            for round in 0..8 {
                device.attach();
                driver.attach();
                let sent: Vec<_> = (next..next + 10).map(|n| frame::pattern(100, n)).collect();
                next += 10;
                assert_eq!(send(&mut driver, &sent), 10);
                let mut burst = virtnet_packet::Burst::new();
                if round % 2 == 0 {
                    assert_eq!(device.rx(&mut burst), 10);
                }
                // Given to the driver, but not shown: lost with the device, as packets on a wire are, but not their buffers.
                send_or_drop(&mut device, &burst_of(&sent[..3]));
                drop(device);
                driver.detach();
                until("the driver has noticed", || {
                    driver.status().unwrap().state != "running"
                });
                driver.attach();
                let lost = burst_of(&[frame::pattern(60, 0)]);
                assert_eq!(send_or_drop(&mut driver, &lost), 0, "nobody is there");
                driver.detach();

                device = wiring.device(&directory.join("port.sock"), &control);
                until("they have found each other", || {
                    device.status().unwrap().state == "running"
                        && driver.status().unwrap().state == "running"
                });
                device.attach();
                driver.attach();
                assert!(breathe(&mut device) == sent, "{format:?} {round}");
                assert_eq!(breathe(&mut driver).len(), 0);
                // All buffers are there, in both directions.
                let full: Vec<_> = (0..64).map(|n| frame::pattern(80, n)).collect();
                assert_eq!(send(&mut device, &full), 64);
                assert!(breathe(&mut driver) == full);
                assert_eq!(send(&mut driver, &full), 64);
                assert!(breathe(&mut device) == full);
                device.detach();
                driver.detach();
            }
            let counters = driver.counters();
            assert_eq!((counters.sent, counters.received), (8 * 74, 8 * 64));
            assert_eq!(counters.tx_drops.of(DropReason::PortDown), 8);
        }
    }
}
