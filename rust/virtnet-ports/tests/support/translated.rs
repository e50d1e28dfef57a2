//! A machine behind an IOMMU, and the front-end's end of what its back-end asks for.
#![allow(unreachable_pub, reason = "one test file uses it")]

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use virtnet_mem::GuestAddr;
use virtnet_ports::{Control, VhostUserPort, VhostUserStatus, VhostUserWatch};
use virtnet_sys::Stream;
use virtnet_testkit::{Buffer, FakeVm, FrontEnd, TempDir, frame};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{
    InflightArea, Iotlb, MemoryRegion, MemoryTable, Payload, VringAddresses, VringState,
};
use virtnet_virtio::Features;
use virtnet_virtio::net::control::Command;

use super::support::{Echo, Wiring, until};

pub const PAGE: u64 = 4096;
pub const SIZE: u16 = 64;
pub const READ: u8 = 1;
pub const BOTH: u8 = 3;
pub const FORMATS: [Features; 2] = [Features::empty(), Features::RING_PACKED];

/// Guest addresses as they are told begin here; nothing that a device is to touch is named by them.
pub const ELSEWHERE: u64 = 1 << 45;

pub struct Host {
    pub echo: Echo<VhostUserPort>,
    pub watch: VhostUserWatch,
    pub path: PathBuf,
    pub _directory: TempDir,
    pub _control: Control,
}

impl Host {
    pub fn new() -> Self {
        let directory = TempDir::new();
        let control = Control::start("control").unwrap();
        let path = directory.join("port.sock");
        let port = Wiring::default().device(&path, &control);
        Self {
            watch: port.watch(),
            echo: Echo::start(port),
            path,
            _directory: directory,
            _control: control,
        }
    }

    pub fn status(&self) -> VhostUserStatus {
        self.watch.status().unwrap()
    }
}

/// What a front-end keeps of buffers in flight.
pub type Record = Option<(InflightArea, OwnedFd)>;

pub fn ask_for_record(front_end: &FrontEnd) -> (InflightArea, OwnedFd) {
    let asked = InflightArea {
        num_queues: 2,
        queue_size: SIZE,
        ..InflightArea::default()
    };
    let (payload, mut files) = front_end.ask_for_files(&Request::GetInflightFd(asked), &[]);
    (InflightArea::from_bytes(&payload).unwrap(), files.remove(0))
}

/// A machine with an IOMMU, and the front-end's end of the back-end's channel.
pub struct Machine {
    pub vm: FakeVm,
    pub channel: Stream,
    pub region: MemoryRegion,
    /// What has been asked for, in order.
    pub asked: Vec<Iotlb>,
    /// Pages that are not told for now.
    pub withheld: BTreeSet<u64>,
    /// Misses of those pages, not answered.
    pub open: Vec<Iotlb>,
}

impl Machine {
    /// A machine that has told everything but translations; its rings are started.
    pub fn start(host: &Host, format: Features) -> Self {
        Self::attach(Self::vm(&host.path, format), &mut None)
    }

    /// The same, with a record of what is in flight.
    pub fn start_recorded(host: &Host, format: Features, record: &mut Record) -> Self {
        Self::attach(Self::vm(&host.path, format), &mut Some(record))
    }

    pub fn vm(path: &Path, format: Features) -> FakeVm {
        Self::vm_of(path, format, 1)
    }

    /// One with as many rings as so many queue pairs have.
    pub fn vm_of(path: &Path, more: Features, pairs: usize) -> FakeVm {
        let features = Features::VERSION_1 | Features::EVENT_IDX | Features::ACCESS_PLATFORM | more;
        FakeVm::new(FrontEnd::connect(path), features, pairs, SIZE)
    }

    /// Tells a new back-end everything but translations.
    pub fn attach(vm: FakeVm, record: &mut Option<&mut Record>) -> Self {
        let features = vm.features;
        let (channel, theirs) = Stream::pair().unwrap();
        let (table, files) = vm.memory_table();
        let Request::SetMemTable(MemoryTable(mut regions)) = table else {
            unreachable!("that is how memory is told");
        };
        let [region] = regions[..] else {
            panic!("one region is as much as these tests think of");
        };
        regions[0].guest_addr = ELSEWHERE;
        let mut protocol =
            ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::RARP;
        if record.is_some() {
            protocol |= ProtocolFeatures::INFLIGHT_SHMFD;
        }
        let front_end = &vm.front_end;
        front_end.tell(&Request::SetOwner, &[]);
        front_end.ask(&Request::GetFeatures, &[]);
        front_end.insist(&Request::SetProtocolFeatures(protocol.bits()), &[]);
        front_end.insist(&Request::SetBackendReqFd, &[theirs.as_fd()]);
        let accepted = features | Features::PROTOCOL_FEATURES;
        front_end.insist(&Request::SetFeatures(accepted.bits()), &[]);
        if let Some(record) = record {
            let (area, file) = record.get_or_insert_with(|| ask_for_record(front_end));
            front_end.insist(&Request::SetInflightFd(*area), &[file.as_fd()]);
        }
        let table = Request::SetMemTable(MemoryTable(regions));
        front_end.insist(&table, &[files[0].as_fd()]);
        let mut machine = Self {
            vm,
            channel,
            region,
            asked: Vec::new(),
            withheld: BTreeSet::new(),
            open: Vec::new(),
        };
        (0..2).for_each(|ring| machine.start_ring(ring));
        machine
    }

    /// Starts a ring, which lies at I/O addresses.
    pub fn start_ring(&mut self, ring: usize) {
        let config = self.vm.rings[ring]
            .queue
            .config(&self.vm.guest, self.vm.features);
        let index = ring as u32;
        let front_end = &self.vm.front_end;
        let num = u32::from(SIZE);
        front_end.insist(&Request::SetVringNum(VringState { index, num }), &[]);
        let num = config.base;
        front_end.insist(&Request::SetVringBase(VringState { index, num }), &[]);
        let addresses = VringAddresses {
            index,
            flags: 0,
            desc: self.iova(config.desc_area.0),
            used: self.iova(config.device_area.0),
            avail: self.iova(config.driver_area.0),
            log_guest_addr: 0,
        };
        front_end.insist(&Request::SetVringAddr(addresses), &[]);
        let word = FakeVm::word(ring);
        let events = &self.vm.rings[ring];
        front_end.insist(&Request::SetVringCall(word), &[events.call.as_fd()]);
        front_end.insist(&Request::SetVringErr(word), &[events.err.as_fd()]);
        front_end.insist(&Request::SetVringKick(word), &[events.kick.as_fd()]);
        front_end.insist(&Request::SetVringEnable(VringState { index, num: 1 }), &[]);
    }

    /// The pages in which a ring lies.
    pub fn ring_pages(&self, ring: usize) -> BTreeSet<u64> {
        let config = self.vm.rings[ring]
            .queue
            .config(&self.vm.guest, self.vm.features);
        let page = |(at, len): (virtnet_mem::UserAddr, usize)| {
            let first = self.iova(at.0);
            (first / PAGE..=(first + len as u64 - 1) / PAGE).map(|n| n * PAGE)
        };
        config.areas().into_iter().flat_map(page).collect()
    }

    pub fn iova(&self, user: u64) -> u64 {
        user - self.region.user_addr + self.region.guest_addr
    }

    pub fn update(&self, iova: u64, size: u64, permission: u8) -> Request {
        Request::IotlbMsg(Iotlb {
            iova,
            size,
            user_addr: iova - self.region.guest_addr + self.region.user_addr,
            permission,
            kind: Iotlb::UPDATE,
        })
    }

    #[track_caller]
    pub fn map(&self, iova: u64, size: u64, permission: u8) {
        let update = self.update(iova, size, permission);
        self.vm.front_end.insist(&update, &[]);
    }

    /// Takes translations back. When this returns, nothing of them may be used.
    #[track_caller]
    pub fn unmap(&self, iova: u64, size: u64) {
        let invalidate = Iotlb {
            iova,
            size,
            kind: Iotlb::INVALIDATE,
            ..Iotlb::default()
        };
        self.vm
            .front_end
            .insist(&Request::IotlbMsg(invalidate), &[]);
    }

    /// The next request on the channel, if there is one.
    pub fn next_miss(&mut self) -> Option<Iotlb> {
        let mut bytes = [0; 44];
        let n = self.channel.recv(&mut bytes, &mut Vec::new()).ok()?;
        assert_eq!(n, 44, "a whole message");
        // IOTLB_MSG of version 1, with an answer wanted.
        assert_eq!((bytes[0], bytes[4], bytes[8]), (1, 9, 32));
        let miss = Iotlb::from_bytes(&bytes[12..]).unwrap();
        assert_eq!((miss.kind, miss.iova % PAGE), (Iotlb::MISS, 0));
        self.asked.push(miss);
        Some(miss)
    }

    /// Acknowledges a miss: 0 says that its translation has been told.
    pub fn acknowledge(&self, code: u64) {
        let mut reply: Vec<u8> = [1_u32, 5, 8].iter().flat_map(|n| n.to_ne_bytes()).collect();
        reply.extend(code.to_ne_bytes());
        assert_eq!(self.channel.send(&reply, &[]).unwrap(), 20);
    }

    /// Tells whatever is missing, one page for each question, but for what is withheld.
    #[track_caller]
    pub fn serve(&mut self) {
        while let Some(miss) = self.next_miss() {
            if self.withheld.contains(&miss.iova) {
                self.open.push(miss);
            } else {
                self.map(miss.iova, PAGE, miss.permission);
            }
            self.acknowledge(0);
        }
    }

    /// Tells what has been withheld, if it was asked for.
    #[track_caller]
    pub fn release(&mut self) {
        self.withheld.clear();
        for miss in std::mem::take(&mut self.open) {
            self.map(miss.iova, PAGE, miss.permission);
        }
    }

    /// A buffer in a page of its own.
    pub fn page(&mut self, len: u32, writable: bool) -> Buffer {
        let addr = self.vm.guest.alloc(PAGE, PAGE);
        Buffer {
            addr,
            len,
            writable,
        }
    }

    pub fn write_packet(&mut self, at: GuestAddr, frame: &[u8]) {
        let packet = [&[0; 12], frame].concat();
        self.vm.guest.write(at, &packet);
    }

    pub fn offer(&mut self, ring: usize, buffer: Buffer) {
        self.vm.rings[ring]
            .queue
            .offer(&mut self.vm.guest, &[buffer]);
        self.vm.kick(ring);
    }

    /// Sends frames and expects them back; what is missing is told on the way.
    #[track_caller]
    pub fn echo(&mut self, frames: &[Vec<u8>]) {
        let (mut back, mut taken) = (Vec::new(), 0);
        for frame in frames {
            let before = back.len();
            // Buffers are asked for when they are seen: one that came too late for a packet is there for the next.
            until("a frame comes back", || {
                let outstanding = self.vm.rings[0].queue.outstanding();
                if outstanding < 8 {
                    self.vm.make_room(0, 8 - outstanding, 2048);
                }
                if taken == 0 {
                    self.vm.transmit(0, frame);
                    taken += 1;
                }
                self.serve();
                taken -= self.vm.transmitted(0);
                back.extend(self.vm.received(0));
                back.len() > before
            });
            assert_eq!(&back[before..], std::slice::from_ref(frame));
            until("the frame's own buffer comes back", || {
                self.serve();
                taken -= self.vm.transmitted(0);
                back.extend(self.vm.received(0));
                taken == 0
            });
            back.truncate(before + 1);
        }
        self.vm.guest.check();
    }
}

pub fn frames(n: usize) -> Vec<Vec<u8>> {
    (0..n).map(|n| frame::pattern(60 + 70 * n, n)).collect()
}

impl Machine {
    /// Starts a ring that was stopped, where it was.
    pub fn restart_ring(&mut self, ring: usize, base: u32) {
        let index = ring as u32;
        let front_end = &self.vm.front_end;
        front_end.insist(&Request::SetVringBase(VringState { index, num: base }), &[]);
        let word = FakeVm::word(ring);
        let events = &self.vm.rings[ring];
        front_end.insist(&Request::SetVringKick(word), &[events.kick.as_fd()]);
    }
}

/// Number of the control queue of a device with one queue pair.
pub const CONTROL: usize = 2;

impl Machine {
    /// Has a command carried out, whose pages are told when they are asked for; the verdict.
    pub fn command(&mut self, command: &Command) -> u8 {
        let bytes = command.encode();
        let request = self.page(bytes.len() as u32, false);
        self.vm.guest.write(request.addr, &bytes);
        let answer = self.page(1, true);
        let queue = &mut self.vm.rings[CONTROL].queue;
        queue.offer(&mut self.vm.guest, &[request, answer]);
        self.vm.kick(CONTROL);
        let mut returned = Vec::new();
        until("a command is answered", || {
            self.serve();
            let queue = &mut self.vm.rings[CONTROL].queue;
            returned.extend(queue.collect(&mut self.vm.guest));
            !returned.is_empty()
        });
        returned[0].bytes[0]
    }
}
