//! Checks of translated addresses: none is used that was not told, or was taken back, and what is missing is asked for.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{BackRequest, Request};
use virtnet_vhost::payload::{Iotlb, MemoryRegion, MemoryTable};
use virtnet_virtio::RingFormat::{Packed, Split};
use virtnet_virtio::{Features, RingFormat};

use super::rig::{QUIET, Rig, Shape};
use super::session::Channel;
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds};

const IOMMU: &str = "vhost-user, IOMMU support";

pub(super) static CHECKS: &[Check] = &[
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
    Check::must(
        "asks-for-translations-split",
        "an address that was not told is asked for by IOTLB_MSG on the back-end's own channel, and the chain goes on when it is",
        IOMMU,
        |bench| asks(bench, Split),
    ),
    Check::must(
        "asks-for-translations-packed",
        "the same on packed rings",
        IOMMU,
        |bench| asks(bench, Packed),
    ),
];

/// Where guest memory is told to be that only translations lead to.
const ELSEWHERE: u64 = 1 << 45;

/// A page, as an IOMMU has them.
const PAGE: u64 = 4096;

/// A driver behind an IOMMU whose rings have not been told, and the channel on which it is asked.
fn behind_iommu(bench: &Bench, format: RingFormat) -> Result<(Rig, Channel), Stop> {
    let shape = Shape::new(format).with(Features::ACCESS_PLATFORM);
    let rig = bench.rig_with(&shape, ProtocolFeatures::BACKEND_REQ)?;
    let channel = Channel::open(&rig.session)?;
    rig.tell_features()?;
    for ring in 0..rig.rings.len() {
        rig.set_call(ring, true)?;
    }
    let mut told = rig.regions();
    told.iter_mut()
        .for_each(|region| region.guest_addr |= ELSEWHERE);
    let files: Vec<BorrowedFd<'_>> = rig.memory.regions().iter().map(AsFd::as_fd).collect();
    let table = Request::SetMemTable(MemoryTable(told));
    rig.session.insist(&table, &files)?;
    Ok((rig, channel))
}

/// Tells translations, or takes them back: rings are named by user addresses, buffers by those of the guest.
fn change(rig: &Rig, kind: u8, iova: fn(&MemoryRegion) -> u64) -> Result<(), Stop> {
    for region in rig.regions() {
        let message = Iotlb {
            iova: iova(&region),
            size: region.size,
            user_addr: region.user_addr,
            permission: 3,
            kind,
        };
        rig.session.insist(&Request::IotlbMsg(message), &[])?;
    }
    Ok(())
}

fn of_rings(region: &MemoryRegion) -> u64 {
    region.user_addr
}

fn of_buffers(region: &MemoryRegion) -> u64 {
    region.guest_addr
}

fn translated(bench: &Bench, format: RingFormat) -> Verdict {
    // What is missed is told before anybody can ask; the channel is there because it has to be.
    let (mut rig, _channel) = behind_iommu(bench, format)?;
    change(&rig, Iotlb::UPDATE, of_rings)?;
    change(&rig, Iotlb::UPDATE, of_buffers)?;
    for ring in 0..rig.rings.len() {
        rig.start_ring(ring)?;
    }
    for number in 0..20 {
        rig.send(0, &frame(number, 60))?;
    }
    rig.wait_taken(0, 20)?;
    change(&rig, Iotlb::INVALIDATE, of_rings)?;
    change(&rig, Iotlb::INVALIDATE, of_buffers)?;
    rig.send(0, &frame(20, 60))?;
    thread::sleep(QUIET);
    if rig.taken(0)? > 0 {
        return failed("a frame was taken from a page that had been taken back");
    }
    change(&rig, Iotlb::UPDATE, of_rings)?;
    change(&rig, Iotlb::UPDATE, of_buffers)?;
    rig.wait_taken(0, 1)?;
    Ok("20 frames, none while nothing was told, and one when it was again".to_owned())
}

/// Sends a frame and tells the pages that are asked for, until it is taken: which these were.
fn answer_until_taken(rig: &mut Rig, channel: &Channel, number: u32) -> Result<Vec<u64>, Stop> {
    rig.send(0, &frame(number, 60))?;
    let (mut asked, regions) = (Vec::new(), rig.regions());
    let taken = rig.eventually(|rig| {
        if let Some((request, waits)) = channel.next(QUIET / 10)? {
            let BackRequest::IotlbMsg(miss) = request else {
                return failed(format!("the back-end asked for {}", request.kind().name()));
            };
            let page = miss.iova & !(PAGE - 1);
            let mut places = regions.iter();
            let place = places.find(|region| page.wrapping_sub(region.guest_addr) < region.size);
            let (Some(region), Iotlb::MISS, 1..=3) = (place, miss.kind, miss.permission) else {
                return failed(format!(
                    "the back-end misses what no descriptor names: {miss:?}"
                ));
            };
            asked.push(page);
            let update = Iotlb {
                iova: page,
                size: PAGE,
                user_addr: region.user_addr + (page - region.guest_addr),
                permission: 3,
                kind: Iotlb::UPDATE,
            };
            rig.session.insist(&Request::IotlbMsg(update), &[])?;
            if waits {
                channel.acknowledge(&request)?;
            }
        }
        Ok((rig.taken(0)? > 0).then_some(()))
    })?;
    match taken {
        Some(()) => Ok(asked),
        None => failed(format!(
            "the frame was not taken, and {asked:x?} were asked for"
        )),
    }
}

fn asks(bench: &Bench, format: RingFormat) -> Verdict {
    let (mut rig, channel) = behind_iommu(bench, format)?;
    change(&rig, Iotlb::UPDATE, of_rings)?;
    for ring in 0..rig.rings.len() {
        rig.start_ring(ring)?;
    }
    let first = answer_until_taken(&mut rig, &channel, 0)?;
    if first.is_empty() {
        return failed("a frame was taken whose address was neither told nor asked for");
    }
    change(&rig, Iotlb::INVALIDATE, of_buffers)?;
    let again = answer_until_taken(&mut rig, &channel, 1)?;
    let found = format!(
        "{} at first, and {} after they were taken back",
        pages(&first),
        pages(&again)
    );
    holds(!again.is_empty(), found)
}

fn pages(asked: &[u64]) -> String {
    let asked: Vec<_> = asked.iter().map(|page| format!("{page:#x}")).collect();
    format!("[{}]", asked.join(", "))
}
