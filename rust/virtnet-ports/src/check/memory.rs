//! Checks of how a back-end is told where memory is, beside the table that it has at first.

use std::os::fd::{AsFd, BorrowedFd};

use virtnet_mem::GuestAddr;
use virtnet_sys::memfd;
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{MemoryRegion, MemoryTable, SingleRegion, VringAddresses, VringState};
use virtnet_virtio::RingFormat;
use virtnet_virtio::RingFormat::{Packed, Split};

use super::rig::{Rig, Shape, index};
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds};
use crate::RegionLayout;

const SLOTS: &str = "vhost-user, VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS";

/// Bytes of a region of a driver that has two.
const REGION: u64 = 1 << 20;

/// The most regions that are tried.
const MANY: u64 = 600;

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "memory-slots",
        "GET_MAX_MEM_SLOTS tells a number, and regions come and go one by one",
        "vhost-user, VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS",
        |bench| {
            let rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
            rig.tell_features()?;
            let n = rig.session.number(&Request::GetMaxMemSlots)?;
            let region = SingleRegion(rig.regions()[0]);
            let fd = rig.memory.regions()[0].as_fd();
            rig.session.insist(&Request::AddMemReg(region), &[fd])?;
            rig.session.insist(&Request::RemMemReg(region), &[])?;
            rig.session.insist(&Request::AddMemReg(region), &[fd])?;
            holds(n > 0, format!("{n} slots"))
        },
    ),
    Check::must(
        "region-needs-one-file",
        "ADD_MEM_REG comes with exactly one file; without, it is refused",
        "vhost-user, Front-end message types (ADD_MEM_REG)",
        |bench| {
            bench.acknowledged_session()?;
            let rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
            rig.session
                .refuses(&Request::AddMemReg(SingleRegion(rig.regions()[0])), &[])
        },
    )
    .hostile(),
    Check::must(
        "unknown-region-stays",
        "REM_MEM_REG of a region that is not there is refused",
        "vhost-user, Front-end message types (REM_MEM_REG)",
        |bench| {
            bench.acknowledged_session()?;
            let rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
            rig.tell_memory()?;
            let region = MemoryRegion {
                guest_addr: 0x1000,
                ..rig.regions()[0]
            };
            rig.session
                .refuses(&Request::RemMemReg(SingleRegion(region)), &[])
        },
    )
    .hostile(),
    Check::must(
        "slots-can-be-used",
        "as many regions can be added as GET_MAX_MEM_SLOTS tells",
        SLOTS,
        |bench| fill_slots(bench).map(|(_, told)| format!("{told} were told")),
    ),
    Check::must(
        "slots-have-an-end",
        "one region more than GET_MAX_MEM_SLOTS tells is refused",
        SLOTS,
        |bench| {
            bench.acknowledged_session()?;
            let (rig, told) = fill_slots(bench)?;
            if told > MANY {
                return Ok(format!("{told} were told, more than are tried"));
            }
            let file = memfd::create("virtnet-check", 4096, false).map_err(Stop::host)?;
            let one = Request::AddMemReg(SingleRegion(page(told)));
            rig.session.refuses(&one, &[file.as_fd()])
        },
    )
    .hostile(),
    Check::must(
        "memory-comes-and-goes",
        "memory that is added while rings run is used, and when it is removed the rest goes on",
        SLOTS,
        comes_and_goes,
    ),
    Check::must(
        "guest-addresses-split",
        "with GPA_ADDRESSES, rings are where their guest addresses say",
        "vhost-user, VHOST_USER_PROTOCOL_F_GPA_ADDRESSES",
        |bench| guest_addresses(bench, Split),
    ),
    Check::must(
        "guest-addresses-packed",
        "the same on packed rings",
        "vhost-user, VHOST_USER_PROTOCOL_F_GPA_ADDRESSES",
        |bench| guest_addresses(bench, Packed),
    ),
];

/// A page of memory far away from everything else, one of many.
fn page(number: u64) -> MemoryRegion {
    MemoryRegion {
        guest_addr: (1 << 40) + number * 8192,
        size: 4096,
        user_addr: (1 << 45) + number * 8192,
        mmap_offset: 0,
    }
}

/// Adds as many regions as the back-end says it takes, or as are tried.
fn fill_slots(bench: &Bench) -> Result<(Rig, u64), Stop> {
    let rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
    rig.tell_features()?;
    let told = rig.session.number(&Request::GetMaxMemSlots)?;
    let file = memfd::create("virtnet-check", 4096, false).map_err(Stop::host)?;
    for number in 0..told.min(MANY) {
        let request = Request::AddMemReg(SingleRegion(page(number)));
        if let Err(Stop::Failed(why)) = rig.session.insist(&request, &[file.as_fd()]) {
            return failed(format!(
                "{told} were told, and {number} could be added: {why}"
            ));
        }
    }
    Ok((rig, told))
}

fn comes_and_goes(bench: &Bench) -> Verdict {
    let layout = [0, 2].map(|at| RegionLayout {
        guest: GuestAddr((1 << 32) + at * REGION),
        size: REGION,
        offset: 0,
    });
    let shape = Shape {
        layout: Some(layout.to_vec()),
        ..Shape::new(Split)
    };
    let mut rig = bench.rig_with(&shape, ProtocolFeatures::CONFIGURE_MEM_SLOTS)?;
    rig.tell_features()?;
    for ring in 0..2 {
        rig.set_call(ring, true)?;
    }
    let change = |rig: &Rig, region: usize, comes: bool| {
        let (told, memory) = (rig.regions()[region], &rig.memory.regions()[region]);
        let region = SingleRegion(told);
        if comes {
            let request = Request::AddMemReg(region);
            rig.session.insist(&request, &[memory.as_fd()])
        } else {
            rig.session.insist(&Request::RemMemReg(region), &[])
        }
    };
    change(&rig, 0, true)?;
    for ring in 0..2 {
        rig.start_ring(ring)?;
    }
    let near = rig.rings[1].slots;
    let far = GuestAddr(layout[1].guest.0);
    for round in 0..3 {
        rig.send(0, &frame(2 * round, 60))?;
        rig.wait_taken(0, 1)?;
        change(&rig, 1, true)?;
        rig.rings[1].slots = far;
        rig.send(0, &frame(2 * round + 1, 60))?;
        rig.wait_taken(0, 1)?;
        change(&rig, 1, false)?;
        rig.rings[1].slots = near;
    }
    rig.send(0, &frame(6, 60))?;
    rig.wait_taken(0, 1)?;
    Ok("3 times".to_owned())
}

fn guest_addresses(bench: &Bench, format: RingFormat) -> Verdict {
    let mut rig = bench.rig_with(&Shape::new(format), ProtocolFeatures::GPA_ADDRESSES)?;
    rig.tell_features()?;
    let regions = rig.regions().into_iter().map(|region| MemoryRegion {
        user_addr: region.guest_addr,
        ..region
    });
    let table = Request::SetMemTable(MemoryTable(regions.collect()));
    let files: Vec<BorrowedFd<'_>> = rig.memory.regions().iter().map(AsFd::as_fd).collect();
    rig.session.insist(&table, &files)?;
    for ring in 0..2 {
        let config = rig.rings[ring].config;
        let guest = |area| rig.guest_addr(area).0;
        let addresses = VringAddresses {
            desc: guest(config.desc_area),
            used: guest(config.device_area),
            avail: guest(config.driver_area),
            ..rig.addresses(ring)
        };
        let word = |num| VringState {
            index: index(ring),
            num,
        };
        let size = Request::SetVringNum(word(config.size.into()));
        rig.session.insist(&size, &[])?;
        let base = Request::SetVringBase(word(config.base));
        rig.session.insist(&base, &[])?;
        let addresses = Request::SetVringAddr(addresses);
        rig.session.insist(&addresses, &[])?;
        rig.set_call(ring, true)?;
        rig.set_kick(ring, true)?;
        rig.enable(ring, true)?;
    }
    for number in 0..20 {
        rig.send(0, &frame(number, 60))?;
    }
    rig.wait_taken(0, 20)?;
    Ok("20 frames were taken".to_owned())
}
