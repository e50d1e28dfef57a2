//! Checks of what is in flight: the record of it, and a back-end that is replaced by another.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;

use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{InflightArea, Payload, VringState};
use virtnet_virtio::RingFormat;
use virtnet_virtio::RingFormat::{Packed, Split};
use virtnet_virtio::inflight::region_bytes;

use super::rig::{HEADER, QUIET, Rig, Shape, index, write};
use super::rings::base_after;
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds};

const INFLIGHT: &str = "vhost-user, Inflight I/O tracking";
const SKIP_DRAIN: &str = "vhost-user, Front-end message types (GET_VRING_BASE_SKIP_DRAIN)";

/// The ring that is tried.
const TRANSMITQ: usize = 1;

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "inflight-record-is-made",
        "GET_INFLIGHT_FD answers with a file that has room for the record of every ring that was asked for",
        INFLIGHT,
        |bench| {
            let rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::INFLIGHT_SHMFD)?;
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
        "inflight-taken-again",
        "what a record says was in flight is taken again by the next back-end, in the order in which it was taken, and the rest once",
        INFLIGHT,
        taken_again,
    ),
    Check::must(
        "stops-at-once-split",
        "a ring that GET_VRING_BASE_SKIP_DRAIN stops has everything before its base used, or in flight by its record",
        SKIP_DRAIN,
        |bench| stops_at_once(bench, Split),
    ),
    Check::must(
        "stops-at-once-packed",
        "the same on packed rings",
        SKIP_DRAIN,
        |bench| stops_at_once(bench, Packed),
    ),
];

/// Asks for a record of all rings.
fn record(rig: &Rig) -> Result<(InflightArea, File), Stop> {
    let asked = InflightArea {
        num_queues: u16::try_from(rig.rings.len()).unwrap_or(u16::MAX),
        queue_size: rig.rings[0].config.size,
        ..InflightArea::default()
    };
    let (payload, mut files) = rig.session.ask_with(&Request::GetInflightFd(asked), &[])?;
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

/// A driver whose back-end keeps a record, with its rings running.
fn with_record(
    bench: &Bench,
    format: RingFormat,
    features: ProtocolFeatures,
) -> Result<(Rig, InflightArea, File), Stop> {
    let features = ProtocolFeatures::INFLIGHT_SHMFD | features;
    let rig = bench.rig_with(&Shape::new(format), features)?;
    rig.tell_features()?;
    let (area, file) = record(&rig)?;
    let request = Request::SetInflightFd(area);
    rig.session.insist(&request, &[file.as_fd()])?;
    rig.tell_memory()?;
    for ring in 0..rig.rings.len() {
        rig.start_ring(ring)?;
    }
    Ok((rig, area, file))
}

/// How many descriptors of the transmitq a record has in flight.
fn in_flight(rig: &Rig, area: InflightArea, file: &File) -> Result<usize, Stop> {
    // Spec: vhost-user, Inflight I/O tracking: the state of a descriptor begins with whether it is in flight.
    let config = &rig.rings[TRANSMITQ].config;
    let format = RingFormat::of(config.features);
    let (first, each) = match format {
        Split => (16, 16),
        Packed => (32, 32),
    };
    let mut region = vec![0; region_bytes(format, config.size)];
    file.read_exact_at(&mut region, start(area))
        .map_err(Stop::host)?;
    let states = (0..usize::from(config.size)).map(|entry| region[first + each * entry]);
    Ok(states.filter(|state| *state == 1).count())
}

/// Where the transmitq's part of a record begins: the second half.
fn start(area: InflightArea) -> u64 {
    area.mmap_offset + area.mmap_size / 2
}

fn recorded(bench: &Bench, format: RingFormat) -> Verdict {
    let (mut rig, area, file) = with_record(bench, format, ProtocolFeatures::empty())?;
    for round in 0..10 {
        for number in 0..20 {
            rig.send(0, &frame(20 * round + number, 60))?;
        }
        rig.wait_taken(0, 20)?;
    }
    rig.session.stop_ring(index(TRANSMITQ))?;
    let left = in_flight(&rig, area, &file)?;
    holds(
        left == 0,
        format!("200 frames, {left} descriptors in flight at the end"),
    )
}

/// A back-end that took three chains of four and gave the second one back, as it left things when it was killed.
fn taken_again(bench: &Bench) -> Verdict {
    let rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::INFLIGHT_SHMFD)?;
    rig.tell_features()?;
    let (area, file) = record(&rig)?;
    drop(rig);
    let mut rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::INFLIGHT_SHMFD)?;
    let mut heads = Vec::new();
    for number in 0..4 {
        let bytes = [&[0; HEADER], frame(number, 60).as_slice()].concat();
        heads.push(rig.add(TRANSMITQ, bytes, &[], false)?);
    }
    rig.publish(TRANSMITQ);
    // The used ring: one element, and the index that says so. Spec: virtio 1.4, 2.7.8
    let used = rig.guest_addr(rig.rings[TRANSMITQ].config.device_area).0;
    let element = [u32::from(heads[1]).to_le_bytes(), [0; 4]].concat();
    let memory = rig.memory.memory();
    write(memory, used + 4, &element);
    write(memory, used + 2, &1_u16.to_le_bytes());
    // The record: its version, how many states, the last batch, the used index; and of two states when they were taken.
    let start = start(area);
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, start + at).map_err(Stop::host);
    put(0, &[0; 8])?;
    for (at, value) in [
        (8, 1),
        (10, rig.rings[TRANSMITQ].config.size),
        (12, heads[1]),
        (14, 1),
    ] {
        put(at, &value.to_ne_bytes())?;
    }
    for (head, counter) in [(heads[0], 0_u64), (heads[2], 2)] {
        let state = 16 + 16 * u64::from(head);
        put(state, &[1])?;
        put(state + 8, &counter.to_ne_bytes())?;
    }
    rig.tell_features()?;
    let request = Request::SetInflightFd(area);
    rig.session.insist(&request, &[file.as_fd()])?;
    rig.tell_memory()?;
    rig.rings[TRANSMITQ].config.base = 1;
    for ring in 0..2 {
        rig.start_ring(ring)?;
    }
    rig.wait_taken(0, 4)?;
    thread::sleep(QUIET);
    if rig.taken(0)? > 0 {
        return failed("more came back than were made available");
    }
    let base = rig.session.stop_ring(index(TRANSMITQ))?;
    let elements = rig.read_user(rig.rings[TRANSMITQ].config.device_area, 4 + 8 * 4);
    let order: Vec<u16> = (0..4)
        .map(|element| u16::from_le_bytes([elements[4 + 8 * element], elements[5 + 8 * element]]))
        .collect();
    let again: Vec<u16> = order
        .iter()
        .copied()
        .filter(|head| *head != heads[3])
        .collect();
    let left = in_flight(&rig, area, &file)?;
    holds(
        base == 4 && left == 0 && again == [heads[1], heads[0], heads[2]],
        format!("{order:?} came back of {heads:?}, {left} are in flight, and the base is {base}"),
    )
}

fn stops_at_once(bench: &Bench, format: RingFormat) -> Verdict {
    let features =
        ProtocolFeatures::GET_VRING_BASE_INFLIGHT | ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN;
    let (mut rig, area, file) = with_record(bench, format, features)?;
    let (mut sent, mut taken) = (0_u32, 0_usize);
    let transmitq = index(TRANSMITQ);
    for lap in 0..6 {
        for _ in 0..20 {
            rig.send(0, &frame(sent, 60))?;
            sent += 1;
        }
        let named = VringState {
            index: transmitq,
            num: 0,
        };
        let payload = rig.session.ask(&Request::GetVringBaseSkipDrain(named))?;
        let Some(stopped) = VringState::from_bytes(&payload) else {
            return failed(format!("an answer of {} bytes instead of 8", payload.len()));
        };
        if stopped.index != transmitq {
            return failed(format!("answered for ring {}", stopped.index));
        }
        taken += rig.taken(0)?;
        let left = in_flight(&rig, area, &file)?;
        let seen = u32::try_from(taken + left).unwrap_or(u32::MAX);
        let expected = base_after(format, rig.rings[TRANSMITQ].config.size, seen);
        if stopped.num & 0xffff != expected {
            return failed(format!(
                "stop {lap}: the base is {:#x}; {taken} chains came back, {left} are in flight, which is {expected:#x}",
                stopped.num
            ));
        }
        rig.configure_ring(TRANSMITQ, stopped.num)?;
        rig.set_call(TRANSMITQ, true)?;
        rig.set_kick(TRANSMITQ, true)?;
        let left = usize::try_from(sent).unwrap_or(usize::MAX) - taken;
        rig.wait_taken(0, left)?;
        taken += left;
    }
    Ok(format!("{sent} frames over 6 stops, each taken once"))
}
