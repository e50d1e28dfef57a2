//! Guests that move from one vhost-user port to another while packets flow, and the dirty log that makes it possible.
//!
//! The test is the virtual machine monitor. It has a copy of the guest's memory that follows what the driver writes byte by byte,
//! as a monitor sees its own processors' writes, and what the device writes only by the pages that the device has marked. So a
//! write that is not marked is missing in the copy.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use support::{Echo, Wiring, alone, beside_others, breathe, burst_of, open_things, send_or_drop};
use virtnet_mem::{DirtyLog, GuestAddr};
use virtnet_packet::{Offload, Port};
use virtnet_ports::{Control, VhostUserOptions, VhostUserPort};
use virtnet_testkit::{DirtyPages, FakeVm, FrontEnd, TempDir, frame, net_header, offer_frame};
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::LogArea;
use virtnet_virtio::Features;

const PAGE: usize = DirtyLog::PAGE as usize;

/// Every format with what decides which words of its rings are written.
fn variants() -> Vec<(Features, u16)> {
    let modern = Features::VERSION_1 | Features::INDIRECT_DESC;
    let mut variants = Vec::new();
    for (format, size) in [(Features::empty(), 16), (Features::RING_PACKED, 13)] {
        for more in [
            Features::EVENT_IDX | Features::MRG_RXBUF,
            Features::EVENT_IDX | Features::MRG_RXBUF | Features::IN_ORDER,
            Features::MRG_RXBUF,
            Features::empty(),
        ] {
            variants.push((modern | format | more, size));
        }
        // Rings that cover several pages.
        variants.push((modern | format | Features::EVENT_IDX, 1024));
    }
    variants
}

/// Numbers without a pattern, the same ones each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (self.0 >> 33) % n
    }
}

/// A guest, the port that it is attached to, and the copy that is to become its memory elsewhere.
struct Source {
    vm: FakeVm,
    port: VhostUserPort,
    control: Control,
    directory: TempDir,
    log: DirtyPages,
    logging: bool,
    copy: Vec<u8>,
    /// Pages that were marked and not copied again yet.
    dirty: BTreeSet<u64>,
    dice: Dice,
    /// What each side has been given, and what has come out at the other.
    to_guest: Vec<Vec<u8>>,
    at_guest: Vec<Vec<u8>>,
    from_guest: Vec<Vec<u8>>,
    at_port: Vec<Vec<u8>>,
}

impl Source {
    fn new(features: Features, size: u16) -> Self {
        let directory = TempDir::new();
        let control = Control::start("control").unwrap();
        let path = directory.join("source.sock");
        let port = Wiring::default().device(&path, &control);
        let mut vm = FakeVm::new(FrontEnd::connect(&path), features, 1, size);
        vm.start();
        let log = DirtyPages::new(&vm.guest);
        Self {
            copy: vm.guest.contents(),
            vm,
            port,
            control,
            directory,
            log,
            logging: false,
            dirty: BTreeSet::new(),
            dice: Dice(7),
            to_guest: Vec::new(),
            at_guest: Vec::new(),
            from_guest: Vec::new(),
            at_port: Vec::new(),
        }
    }

    fn start_log(&mut self) {
        self.vm.start_log(&self.log);
        self.logging = true;
        self.dirty.clear();
        self.copy = self.vm.guest.contents();
    }

    fn stop_log(&mut self) {
        self.vm.stop_log();
        self.logging = false;
        drop(self.log.take());
    }

    /// Something that the driver does.
    fn driver<R>(&mut self, act: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.vm.guest.contents();
        let result = act(self);
        let after = self.vm.guest.contents();
        for page in changed_pages(&before, &after) {
            for at in page * PAGE..(page + 1) * PAGE {
                if before[at] != after[at] {
                    self.copy[at] = after[at];
                }
            }
        }
        result
    }

    /// Something that the device does: every page that changes has to be marked, and none while nothing is logged.
    #[track_caller]
    fn device<R>(&mut self, act: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.vm.guest.contents();
        let result = act(self);
        let after = self.vm.guest.contents();
        let first = self.vm.guest.memory().regions()[0].guest().0;
        let changed = changed_pages(&before, &after).map(|page| first + (page * PAGE) as u64);
        let marked = self.log.take();
        if self.logging {
            for page in changed {
                assert!(marked.contains(&page), "{} is not marked", GuestAddr(page));
            }
            self.dirty.extend(marked);
        } else {
            assert!(marked.is_empty(), "marked without being asked: {marked:?}");
        }
        result
    }

    /// Copies what has been marked.
    fn copy_dirty(&mut self) {
        let contents = self.vm.guest.contents();
        let first = self.vm.guest.memory().regions()[0].guest().0;
        for page in std::mem::take(&mut self.dirty) {
            let page = usize::try_from(page - first).unwrap();
            self.copy[page..page + PAGE].copy_from_slice(&contents[page..page + PAGE]);
        }
    }

    /// Makes buffers for packets available, of every shape.
    fn make_room(&mut self) {
        let mergeable = self.vm.features.contains(Features::MRG_RXBUF);
        let chains = self.dice.below(5);
        for _ in 0..chains {
            let n = if mergeable { 1 + self.dice.below(3) } else { 3 };
            let queue = &mut self.vm.rings[0].queue;
            if queue.free() < n as usize {
                continue;
            }
            let mut len = || 200 + self.dice.below(300) as u32;
            let buffers: Vec<_> = (0..n)
                .map(|_| self.vm.guest.writable(if mergeable { len() } else { 800 }))
                .collect();
            if self.dice.below(3) == 0 {
                queue.offer_indirect(&mut self.vm.guest, &buffers);
            } else {
                queue.offer(&mut self.vm.guest, &buffers);
            }
        }
        self.vm.kick(0);
    }

    fn transmit(&mut self) {
        let frames = self.dice.below(4);
        for _ in 0..frames {
            let queue = &mut self.vm.rings[1].queue;
            if queue.free() < 2 {
                break;
            }
            let bytes = frame::pattern(60 + self.dice.below(900) as usize, self.from_guest.len());
            let header = net_header(&Offload::default(), 0);
            offer_frame(&mut self.vm.guest, &mut **queue, &header, &bytes, &[]);
            self.from_guest.push(bytes);
        }
        self.vm.kick(1);
    }

    fn collect(&mut self) {
        self.at_guest.extend(self.vm.received(0));
        self.vm.transmitted(0);
    }

    /// Sends to the guest and receives from it, in one breath.
    fn breath(&mut self) {
        self.port.attach();
        self.port.sync();
        let n = self.dice.below(6);
        let frames: Vec<_> = (0..n)
            .map(|k| {
                let len = 60 + self.dice.below(900) as usize;
                frame::pattern(len, self.to_guest.len() + k as usize)
            })
            .collect();
        let taken = send_or_drop(&mut self.port, &burst_of(&frames));
        self.to_guest.extend(frames.into_iter().take(taken));
        self.at_port.extend(breathe(&mut self.port));
        if self.dice.below(3) == 0 {
            self.port.arm();
            self.port.disarm();
        }
        self.port.detach();
    }

    fn some_traffic(&mut self, rounds: u32) {
        for _ in 0..rounds {
            self.driver(Self::make_room);
            self.driver(Self::transmit);
            self.device(Self::breath);
            self.driver(Self::collect);
        }
    }

    /// Stops the rings; where.
    fn stop(&mut self) -> Vec<u32> {
        self.device(|s| (0..2).map(|ring| s.vm.front_end.stop_ring(ring)).collect())
    }

    /// Starts the rings again where they stopped.
    fn start_at(&mut self, size: u16, bases: &[u32]) {
        for (ring, &base) in bases.iter().enumerate() {
            self.vm.start_ring_at(ring, size, base);
        }
    }

    /// The same guest at another port, from the copy.
    fn move_on(mut self, size: u16, bases: &[u32]) -> Self {
        let path = self.directory.join("destination.sock");
        let port = Wiring::default().device(&path, &self.control);
        let mut vm = self.vm.move_to(FrontEnd::connect(&path), &self.copy);
        vm.agree();
        vm.tell_memory();
        (self.vm, self.port, self.logging) = (vm, port, false);
        self.start_at(size, bases);
        self.log = DirtyPages::new(&self.vm.guest);
        self
    }
}

/// Numbers of the pages that differ.
fn changed_pages(before: &[u8], after: &[u8]) -> impl Iterator<Item = usize> {
    let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
    let changed: Vec<_> = pages
        .filter(|(_, (before, after))| before != after)
        .map(|(page, _)| page)
        .collect();
    changed.into_iter()
}

#[test]
fn u21_a_guest_moves_under_traffic_and_nothing_of_it_is_left_behind() {
    let _gate = beside_others();
    for (features, size) in variants() {
        let mut guest = Source::new(features, size);
        guest.some_traffic(10);
        guest.start_log();
        for _ in 0..4 {
            guest.some_traffic(8);
            guest.copy_dirty();
        }
        // What the device has not looked at yet when it is stopped goes along.
        guest.driver(Source::make_room);
        guest.driver(Source::transmit);
        let bases = guest.stop();
        guest.copy_dirty();
        assert!(
            guest.vm.guest.contents() == guest.copy,
            "{features:?}: the copy is not what the guest's memory was"
        );

        let mut guest = guest.move_on(size, &bases);
        guest.some_traffic(20);
        guest.device(|s| {
            s.port.attach();
            s.at_port.extend(breathe(&mut s.port));
            s.port.detach();
        });
        guest.driver(Source::collect);
        assert!(guest.to_guest.len() > 50 && guest.from_guest.len() > 50);
        assert!(
            guest.at_guest == guest.to_guest,
            "{features:?}: to the guest"
        );
        assert!(
            guest.at_port == guest.from_guest,
            "{features:?}: from the guest"
        );
    }
}

#[test]
fn u22_nothing_is_marked_before_logging_begins_or_after_it_has_ended() {
    let _gate = beside_others();
    for (features, size) in variants() {
        let mut guest = Source::new(features, size);
        guest.some_traffic(5);
        for _ in 0..3 {
            guest.start_log();
            guest.some_traffic(5);
            let bases = guest.stop();
            guest.device(|s| s.start_at(size, &bases));
            guest.some_traffic(5);
            assert!(!guest.dirty.is_empty());
            guest.stop_log();
            guest.some_traffic(5);
        }
    }
}

#[test]
fn u22_a_log_that_replaces_another_is_the_only_one_that_is_written() {
    let _gate = beside_others();
    for (features, size) in variants() {
        let mut guest = Source::new(features, size);
        guest.start_log();
        guest.some_traffic(3);
        let before = std::mem::replace(&mut guest.log, DirtyPages::new(&guest.vm.guest));
        guest.start_log();
        drop(before.take());
        guest.some_traffic(3);
        assert!(!guest.dirty.is_empty());
        assert_eq!(before.take(), BTreeSet::new());
    }
}

#[test]
fn u12_logging_goes_on_and_off_under_traffic_and_no_packet_is_lost() {
    let _gate = beside_others();
    for (features, _) in variants() {
        let directory = TempDir::new();
        let control = Control::start("control").unwrap();
        let path = directory.join("port.sock");
        let echo = Echo::start(Wiring::default().device(&path, &control));
        let mut vm = FakeVm::new(FrontEnd::connect(&path), features, 1, 64);
        vm.start();
        let frames: Vec<_> = (0..20).map(|n| frame::pattern(60 + 20 * n, n)).collect();
        for round in 0..10 {
            let log = DirtyPages::new(&vm.guest);
            // What is on its way meets the change: nobody waits for it.
            vm.make_room(0, 8, 1000);
            frames[..8].iter().for_each(|frame| vm.transmit(0, frame));
            vm.start_log(&log);
            let mut back = Vec::new();
            support::until("what was on its way is back", || {
                back.extend(vm.received(0));
                back.len() == 8
            });
            assert!(back == frames[..8], "{features:?}: round {round}");
            support::until("all buffers are back", || {
                vm.transmitted(0);
                vm.rings[1].queue.outstanding() == 0
            });
            vm.echo(0, &frames);
            vm.stop_log();
            assert!(log.take().len() > 2, "buffers and rings were written");
            vm.echo(0, &frames);
            assert_eq!(log.take(), BTreeSet::new());
        }
        drop(vm);
        echo.assert_falls_asleep();
        drop(echo.stop());
    }
}

#[test]
fn u20_a_guest_that_has_moved_is_announced_once_and_counted_as_if_it_had_spoken() {
    let _gate = beside_others();
    let mut guest = Source::new(variants()[0].0, 16);
    let mac = [0x52, 0x54, 0, 0x0a, 0, 1];
    let [a, b, c, d, e, f] = mac;
    let word = |mac: [u8; 6]| {
        let [a, b, c, d, e, f] = mac;
        Request::SendRarp(u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]))
    };
    let frame = [
        &[0xff; 6][..],
        &mac,
        &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3],
        &[a, b, c, d, e, f, 0, 0, 0, 0],
        &[a, b, c, d, e, f, 0, 0, 0, 0],
        &[0; 18],
    ]
    .concat();
    // With the packets of a burst, and alone while nothing else comes.
    for frames in [2, 0] {
        let sent: Vec<_> = (0..frames).map(|n| frame::pattern(300, n)).collect();
        sent.iter().for_each(|frame| guest.vm.transmit(0, frame));
        guest.vm.front_end.insist(&word(mac), &[]);
        let before = guest.port.counters();
        guest.port.attach();
        assert!(guest.port.arm(), "there is something to say");
        let mut expected = sent;
        expected.push(frame.clone());
        assert!(breathe(&mut guest.port) == expected);
        assert_eq!(breathe(&mut guest.port), [[0_u8; 0]; 0]);
        assert!(!guest.port.arm());
        guest.port.detach();
        let counters = guest.port.counters();
        let bytes = 300 * frames as u64 + 60;
        assert_eq!(counters.received - before.received, frames as u64 + 1);
        assert_eq!(counters.received_bytes - before.received_bytes, bytes);
        guest.vm.transmitted(0);
    }
    let group = word([1, 0, 0x5e, 0, 0, 1]);
    assert!(!guest.vm.front_end.accepts(&group, &[]));
}

#[test]
fn u22_every_worker_of_a_port_logs_its_own_queue_pairs() {
    let _gate = beside_others();
    for format in [Features::empty(), Features::RING_PACKED] {
        let directory = TempDir::new();
        let control = Control::start("control").unwrap();
        let mut options = VhostUserOptions::new(directory.join("port.sock"));
        options.queue_pairs = 2;
        let lanes = VhostUserPort::in_lanes(options, 2, &control).unwrap();
        let echoes: Vec<_> = lanes.into_iter().map(Echo::start).collect();
        let features = Features::VERSION_1 | Features::EVENT_IDX | Features::MQ | format;
        let front_end = FrontEnd::connect(&directory.join("port.sock"));
        let mut vm = FakeVm::new(front_end, features, 2, 64);
        vm.start();
        let frames: Vec<_> = (0..20).map(|n| frame::pattern(100, n)).collect();
        for _ in 0..5 {
            let log = DirtyPages::new(&vm.guest);
            vm.start_log(&log);
            for pair in 0..2 {
                vm.echo(pair, &frames);
                // Addresses of what this pair's device has written: its rings lie apart from those of the other.
                let ring =
                    |n: usize| vm.addresses(n).log_guest_addr / DirtyLog::PAGE * DirtyLog::PAGE;
                let marked = log.take();
                for n in [2 * pair, 2 * pair + 1] {
                    assert!(marked.contains(&ring(n)), "ring {n} of {format:?}");
                }
            }
            vm.stop_log();
            // A worker that fell asleep has still said so.
            drop(log.take());
            (0..2).for_each(|pair| vm.echo(pair, &frames));
            assert_eq!(log.take(), BTreeSet::new());
        }
        drop(vm);
        echoes.into_iter().for_each(|echo| drop(echo.stop()));
    }
}

#[test]
fn a_log_that_cannot_be_mapped_is_refused_and_the_one_before_it_stays() {
    let _gate = beside_others();
    let mut guest = Source::new(variants()[0].0, 16);
    guest.start_log();
    let area = |mmap_size, mmap_offset| {
        Request::SetLogBase(LogArea {
            mmap_size,
            mmap_offset,
        })
    };
    let short = DirtyPages::new(&guest.vm.guest);
    for request in [
        area(0, 0),
        area(short.size(), 1),
        area(1 << 40, 0),
        area(u64::MAX, u64::MAX),
    ] {
        let answer = guest.vm.front_end.ask(&request, &[short.as_fd()]);
        assert_eq!(answer.len(), 0, "{request:?}");
    }
    guest.some_traffic(5);
    assert!(!guest.dirty.is_empty());
    assert_eq!(short.take(), BTreeSet::new());
}

#[test]
fn a_log_is_given_up_with_its_session() {
    let _gate = alone();
    let before = {
        let guest = Source::new(variants()[0].0, 16);
        drop(guest);
        open_things()
    };
    for _ in 0..3 {
        let mut guest = Source::new(variants()[0].0, 16);
        guest.start_log();
        guest.some_traffic(2);
    }
    support::until("everything has gone", || open_things() == before);
}
