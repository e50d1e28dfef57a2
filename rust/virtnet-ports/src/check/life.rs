//! Checks of what a virtual machine lives through: a back-end that is replaced, a move to another host, an IOMMU.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::thread;

use virtnet_mem::UserAddr;
use virtnet_sys::{Stream, memfd};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{
    InflightArea, Iotlb, LogArea, MemoryRegion, MemoryTable, Payload, VringAddresses,
};
use virtnet_virtio::RingFormat::{Packed, Split};
use virtnet_virtio::inflight::region_bytes;
use virtnet_virtio::{Features, RingFormat};

use super::rig::{self, QUIET, Rig, Shape, index};
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds, skipped};

const INFLIGHT: &str = "vhost-user, Inflight I/O tracking";
const MIGRATION: &str = "vhost-user, Migration";
const IOMMU: &str = "vhost-user, IOMMU support";

/// Bytes of memory that a bit of the log stands for.
const PAGE: u64 = 4096;

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "inflight-record-is-made",
        "GET_INFLIGHT_FD answers with a file that has room for the record of every ring that was asked for",
        INFLIGHT,
        |bench| {
            let rig = with(bench, &Shape::new(Split), ProtocolFeatures::INFLIGHT_SHMFD)?;
            let (area, file) = record(&rig)?;
            let len = file.metadata().map_err(Stop::host)?.len();
            let needed = 2 * region_bytes(Split, rig.rings[0].config.size) as u64;
            let end = area.mmap_offset.saturating_add(area.mmap_size);
            let found = format!(
                "{} bytes for {} rings in a file of {len}",
                area.mmap_size, area.num_queues
            );
            holds(area.mmap_size >= needed && end <= len, found)
        },
    ),
    Check::must(
        "inflight-split",
        "with a record of what is in flight, each buffer comes back once, and a ring that is stopped has none in flight",
        INFLIGHT,
        |bench| recorded(bench, Split),
    ),
    Check::must(
        "inflight-packed",
        "the same on packed rings",
        INFLIGHT,
        |bench| recorded(bench, Packed),
    ),
    Check::must(
        "logs-used-split",
        "while writes are logged, the page of the log that a used ring is said to be at is marked when buffers are used",
        MIGRATION,
        |bench| logged_rings(bench, Split),
    ),
    Check::must(
        "logs-used-packed",
        "the same of a packed ring: used descriptors are written to the descriptor ring",
        MIGRATION,
        |bench| logged_rings(bench, Packed),
    ),
    Check::must(
        "logs-buffers",
        "while writes are logged, the pages of every buffer that a packet is received in are marked",
        MIGRATION,
        logged_buffers,
    ),
    Check::must(
        "rarp-is-acknowledged",
        "SEND_RARP is carried out: the network is told of a guest that has moved",
        MIGRATION,
        |bench| {
            let mut rig = with(bench, &Shape::new(Split), ProtocolFeatures::RARP)?;
            rig.start()?;
            let mac = u64::from_le_bytes([2, 0, 0, 0, 0x0c, 1, 0, 0]);
            rig.session.insist(&Request::SendRarp(mac), &[])?;
            Ok("acknowledged".to_owned())
        },
    ),
    Check::must(
        "translates-split",
        "with ACCESS_PLATFORM, the addresses of rings and buffers are those that were told by IOTLB_MSG",
        IOMMU,
        |bench| translated(bench, Split),
    ),
    Check::must(
        "translates-packed",
        "the same on packed rings",
        IOMMU,
        |bench| translated(bench, Packed),
    ),
];

/// A driver whose session has agreed on one more of the protocol's features, none of it told.
fn with(bench: &Bench, shape: &Shape, feature: ProtocolFeatures) -> Result<Rig, Stop> {
    let mut session = bench.connect()?;
    session.greet(rig::PROTOCOL | feature)?;
    if !session.protocol.contains(feature) {
        return skipped(format!("{} is not offered", feature.names().join(", ")));
    }
    Rig::new(session, shape)
}

/// Asks for a record of all rings.
fn record(rig: &Rig) -> Result<(InflightArea, File), Stop> {
    let asked = InflightArea {
        num_queues: u16::try_from(rig.rings.len()).unwrap_or(u16::MAX),
        queue_size: rig.rings[0].config.size,
        ..InflightArea::default()
    };
    let (payload, mut files) = rig.session.ask_for_files(&Request::GetInflightFd(asked))?;
    match (InflightArea::from_bytes(&payload), files.pop()) {
        (Some(area), Some(file)) => Ok((area, file.into())),
        (area, file) => {
            let (bytes, files) = (payload.len(), usize::from(file.is_some()));
            let is_whole = area.is_some();
            failed(format!(
                "the answer has {bytes} bytes, whole: {is_whole}, and {files} descriptors"
            ))
        }
    }
}

fn recorded(bench: &Bench, format: RingFormat) -> Verdict {
    let mut rig = with(bench, &Shape::new(format), ProtocolFeatures::INFLIGHT_SHMFD)?;
    rig.tell_features()?;
    let (area, file) = record(&rig)?;
    let session = &rig.session;
    session.insist(&Request::SetInflightFd(area), &[file.as_fd()])?;
    rig.tell_memory()?;
    for ring in 0..rig.rings.len() {
        rig.start_ring(ring)?;
    }
    for round in 0..10 {
        for number in 0..20 {
            rig.send(0, &frame(20 * round + number, 60))?;
        }
        rig.wait_taken(0, 20)?;
    }
    let transmitq = index(1);
    rig.session.stop_ring(transmitq)?;
    // Spec: vhost-user, Inflight I/O tracking: the state of a descriptor begins with whether it is in flight.
    let size = usize::from(rig.rings[1].config.size);
    let bytes = region_bytes(format, rig.rings[1].config.size);
    let (first, each) = match format {
        Split => (16, 16),
        Packed => (32, 32),
    };
    let mut region = vec![0; bytes];
    let at = area.mmap_offset + area.mmap_size / 2;
    file.read_exact_at(&mut region, at).map_err(Stop::host)?;
    let in_flight = (0..size).filter(|entry| region[first + each * entry] == 1);
    let in_flight = in_flight.count();
    holds(
        in_flight == 0,
        format!("200 frames, {in_flight} descriptors in flight at the end"),
    )
}

/// A log of all memory of a driver, which is told, and is in force.
struct Log(File);

impl Log {
    fn start(rig: &mut Rig) -> Result<Self, Stop> {
        let ends = rig.regions().into_iter();
        let end = ends.map(|region| region.guest_addr + region.size).max();
        let bytes = end.unwrap_or_default().div_ceil(8 * PAGE);
        let size = bytes.next_multiple_of(PAGE);
        let file = memfd::create("virtnet-check", size, false).map_err(Stop::host)?;
        let area = LogArea {
            mmap_size: size,
            mmap_offset: 0,
        };
        let request = Request::SetLogBase(area);
        rig.session.tell(&request, &[file.as_fd()])?;
        rig.session.answer_to(request.kind())?;
        rig.features |= Features::LOG_ALL;
        rig.tell_features()?;
        for ring in 0..rig.rings.len() {
            let device_area = rig.rings[ring].config.device_area;
            let addresses = VringAddresses {
                flags: 1,
                log_guest_addr: guest_addr(rig, device_area),
                ..rig.addresses(ring)
            };
            let request = Request::SetVringAddr(addresses);
            rig.session.insist(&request, &[])?;
        }
        Ok(Self(file.into()))
    }

    /// Whether the page at a guest address is marked.
    fn is_marked(&self, guest_addr: u64) -> Result<bool, Stop> {
        let (mut byte, page) = ([0], guest_addr / PAGE);
        self.0
            .read_exact_at(&mut byte, page / 8)
            .map_err(Stop::host)?;
        Ok(byte[0] >> (page % 8) & 1 == 1)
    }
}

fn guest_addr(rig: &Rig, user: UserAddr) -> u64 {
    let mut regions = rig.regions().into_iter();
    let region = regions.find(|region| user.0.wrapping_sub(region.user_addr) < region.size);
    region.map_or(0, |region| user.0 - region.user_addr + region.guest_addr)
}

fn logged_rings(bench: &Bench, format: RingFormat) -> Verdict {
    let mut rig = with(bench, &Shape::new(format), ProtocolFeatures::LOG_SHMFD)?;
    can_log(&rig)?;
    rig.start()?;
    let log = Log::start(&mut rig)?;
    let config = rig.rings[1].config;
    let (name, area) = match format {
        Split => ("the used ring", config.device_area),
        Packed => ("the descriptor ring", config.desc_area),
    };
    rig.send(0, &frame(1, 60))?;
    rig.wait_taken(0, 1)?;
    let at = guest_addr(&rig, area);
    // A device may mark after it has shown.
    let marked = rig.eventually(|_| Ok(log.is_marked(at)?.then_some(())))?;
    let what = if marked.is_some() { "is" } else { "is not" };
    holds(
        marked.is_some(),
        format!("the page of {name} at {at:#x} {what} marked"),
    )
}

fn logged_buffers(bench: &Bench) -> Verdict {
    bench.needs_return()?;
    let shape = Shape::new(Split);
    let mut rig = with(bench, &shape, ProtocolFeatures::LOG_SHMFD)?;
    can_log(&rig)?;
    rig.start()?;
    let log = Log::start(&mut rig)?;
    rig.make_room(0, 8, 2048)?;
    rig.send(0, &frame(1, 60))?;
    let came = rig.eventually(|rig| Ok((!rig.received(0)?.is_empty()).then_some(())))?;
    if came.is_none() {
        return failed("no frame came back while writes were logged");
    }
    // Buffers are used in the order in which they were made available.
    let at = rig.rings[0].slots.0;
    let marked = log.is_marked(at)?;
    let what = if marked { "is" } else { "is not" };
    holds(
        marked,
        format!("the page of the buffer at {at:#x} {what} marked"),
    )
}

fn can_log(rig: &Rig) -> Result<(), Stop> {
    if rig.session.offered.contains(Features::LOG_ALL) {
        Ok(())
    } else {
        skipped("LOG_ALL is not offered")
    }
}

/// Where guest memory is told to be that only translations lead to.
const ELSEWHERE: u64 = 1 << 45;

fn translated(bench: &Bench, format: RingFormat) -> Verdict {
    let shape = Shape::new(format).with(Features::ACCESS_PLATFORM);
    let mut rig = with(bench, &shape, ProtocolFeatures::BACKEND_REQ)?;
    // What is missed is told before anybody can ask; the channel is there because it has to be.
    let (_channel, theirs) = Stream::pair().map_err(Stop::host)?;
    let session = &rig.session;
    session.insist(&Request::SetBackendReqFd, &[theirs.as_fd()])?;
    rig.tell_features()?;
    for ring in 0..rig.rings.len() {
        rig.set_call(ring, true)?;
    }
    let (ours, mut told) = (rig.regions(), rig.regions());
    told.iter_mut()
        .for_each(|region| region.guest_addr |= ELSEWHERE);
    let files: Vec<BorrowedFd<'_>> = rig.memory.regions().iter().map(AsFd::as_fd).collect();
    let table = Request::SetMemTable(MemoryTable(told));
    rig.session.insist(&table, &files)?;
    // Rings are named by user addresses, buffers by those of the guest.
    let iovas = |region: &MemoryRegion| [region.user_addr, region.guest_addr];
    let change = |rig: &Rig, kind: u8| {
        for region in &ours {
            for iova in iovas(region) {
                let message = Iotlb {
                    iova,
                    size: region.size,
                    user_addr: region.user_addr,
                    permission: 3,
                    kind,
                };
                rig.session.insist(&Request::IotlbMsg(message), &[])?;
            }
        }
        Ok(())
    };
    change(&rig, Iotlb::UPDATE)?;
    for ring in 0..rig.rings.len() {
        rig.start_ring(ring)?;
    }
    for number in 0..20 {
        rig.send(0, &frame(number, 60))?;
    }
    rig.wait_taken(0, 20)?;
    change(&rig, Iotlb::INVALIDATE)?;
    rig.send(0, &frame(20, 60))?;
    thread::sleep(QUIET);
    if rig.taken(0)? > 0 {
        return failed("a frame was taken from a page that had been taken back");
    }
    change(&rig, Iotlb::UPDATE)?;
    rig.wait_taken(0, 1)?;
    Ok("20 frames, none while nothing was told, and one when it was again".to_owned())
}
