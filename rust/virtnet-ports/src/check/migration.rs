//! Checks of a move to another host: that every write is logged, that the guest is announced, that the device's state goes along.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use virtnet_sys::{PipeEnd, memfd, wait_readable};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{DeviceState, LogArea, Payload};
use virtnet_virtio::RingFormat::{Packed, Split};
use virtnet_virtio::{Features, RingFormat};

use super::rig::{Rig, Shape, index};
use super::session::Session;
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds, skipped};

const MIGRATION: &str = "vhost-user, Migration";
const STATE: &str = "vhost-user, Migrating back-end state";

/// Bytes of memory that a bit of the log stands for.
const PAGE: u64 = 4096;

pub(super) static CHECKS: &[Check] = &[
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
        "logs-every-page-split",
        "while writes are logged, every page that has changed is marked: rings and buffers, both directions",
        MIGRATION,
        |bench| logged_everywhere(bench, Split),
    ),
    Check::must(
        "logs-every-page-packed",
        "the same on packed rings",
        MIGRATION,
        |bench| logged_everywhere(bench, Packed),
    ),
    Check::must(
        "log-with-offset",
        "the log begins at its offset in the file, and nothing before it is written",
        "vhost-user, Log description",
        |bench| {
            let mut rig = logging_rig(bench, Split)?;
            rig.start()?;
            let log = Log::start(&mut rig, PAGE)?;
            rig.send(0, &frame(1, 60))?;
            rig.wait_taken(0, 1)?;
            let at = rig.guest_addr(rig.rings[1].config.device_area).0;
            // A device may mark after it has shown.
            let marked = rig.eventually(|_| Ok(log.is_marked(at)?.then_some(())))?;
            let first = log.bytes(0, log.end)?.iter().position(|byte| *byte != 0);
            let first = first.and_then(|at| u64::try_from(at).ok());
            let expected = PAGE + at / PAGE / 8;
            let place = first.map_or_else(
                || "nowhere".to_owned(),
                |at| format!("in byte {at} of the file"),
            );
            holds(
                marked.is_some() && first >= Some(PAGE),
                format!("the first mark is {place}; one belongs in byte {expected}"),
            )
        },
    ),
    Check::must(
        "rarp-is-acknowledged",
        "SEND_RARP is carried out: the network is told of a guest that has moved",
        MIGRATION,
        |bench| {
            let mut rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::RARP)?;
            rig.start()?;
            let mac = u64::from_le_bytes([2, 0, 0, 0, 0x0c, 1, 0, 0]);
            rig.session.insist(&Request::SendRarp(mac), &[])?;
            Ok("acknowledged".to_owned())
        },
    ),
    Check::must(
        "rarp-announces",
        "what SEND_RARP lets into the network is a broadcast that names the MAC address it was given",
        MIGRATION,
        announced,
    ),
    Check::must(
        "state-is-moved",
        "a device's state is written up to its end, read by another session's device, and both say that it worked",
        STATE,
        moved,
    ),
    Check::must(
        "state-leaves-rings",
        "rings go on where they stopped when the state of their device has been saved",
        STATE,
        |bench| {
            let mut rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::DEVICE_STATE)?;
            rig.start()?;
            for lap in 0..3 {
                rig.send(0, &frame(lap, 60))?;
                rig.wait_taken(0, 1)?;
                let mut bases = [0; 2];
                for (ring, base) in bases.iter_mut().enumerate() {
                    *base = rig.session.stop_ring(index(ring))?;
                }
                save(&rig.session)?;
                for (ring, base) in bases.into_iter().enumerate() {
                    rig.configure_ring(ring, base)?;
                    rig.set_call(ring, true)?;
                    rig.set_kick(ring, true)?;
                }
            }
            rig.send(0, &frame(3, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("3 times".to_owned())
        },
    ),
    Check::must(
        "state-cut-short",
        "half a state is not said to have been loaded",
        STATE,
        |bench| {
            let session = bench.session_with(ProtocolFeatures::DEVICE_STATE)?;
            let (state, _) = save(&session)?;
            drop(session);
            if state.len() < 2 {
                return Ok(format!("a state of {} bytes has no half", state.len()));
            }
            let session = bench.session_with(ProtocolFeatures::DEVICE_STATE)?;
            let (code, _) = load(&session, &state[..state.len() / 2])?;
            holds(
                code != 0,
                format!("CHECK_DEVICE_STATE was answered with {code}"),
            )
        },
    )
    .should()
    .hostile(),
    Check::must(
        "state-of-no-kind",
        "a direction and a phase that are none are refused, with no descriptor",
        STATE,
        |bench| {
            let session = bench.session_with(ProtocolFeatures::DEVICE_STATE)?;
            for (direction, phase) in [(2, 0), (0, 1)] {
                let (_reader, writer) = io::pipe().map_err(Stop::host)?;
                let asked = DeviceState { direction, phase };
                let request = Request::SetDeviceStateFd(asked);
                let (payload, files) = session.ask_with(&request, &[writer.as_fd()])?;
                let code = u64::from_bytes(&payload).unwrap_or_default();
                if code & ERROR == 0 || !files.is_empty() {
                    let files = files.len();
                    return failed(format!(
                        "{asked:?} was answered with {code:#x} and {files} descriptors"
                    ));
                }
            }
            Ok("direction 2 and phase 1 were refused".to_owned())
        },
    )
    .hostile(),
];

/// A log of all memory of a driver, which is told, and is in force.
struct Log {
    file: File,
    /// Where in the file it begins, and where the file ends.
    offset: u64,
    end: u64,
}

impl Log {
    fn start(rig: &mut Rig, offset: u64) -> Result<Self, Stop> {
        let ends = rig.regions().into_iter();
        let end = ends.map(|region| region.guest_addr + region.size).max();
        let bytes = end.unwrap_or_default().div_ceil(8 * PAGE);
        // With room for who counts the offset twice, so that this is found out and kills nobody.
        let size = bytes.next_multiple_of(PAGE) + offset;
        let file = memfd::create("virtnet-check", offset + size, false).map_err(Stop::host)?;
        let area = LogArea {
            mmap_size: size,
            mmap_offset: offset,
        };
        let request = Request::SetLogBase(area);
        rig.session.tell(&request, &[file.as_fd()])?;
        rig.session.answer_to(request.kind())?;
        rig.features |= Features::LOG_ALL;
        rig.tell_features()?;
        rig.logs = true;
        for ring in 0..rig.rings.len() {
            let request = Request::SetVringAddr(rig.addresses(ring));
            rig.session.insist(&request, &[])?;
        }
        let file = file.into();
        let end = offset + size;
        Ok(Self { file, offset, end })
    }

    fn bytes(&self, at: u64, len: u64) -> Result<Vec<u8>, Stop> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        let read = self.file.read_exact_at(&mut bytes, at);
        read.map_err(Stop::host)?;
        Ok(bytes)
    }

    /// Whether the page at a guest address is marked.
    fn is_marked(&self, guest_addr: u64) -> Result<bool, Stop> {
        let page = guest_addr / PAGE;
        let bytes = self.bytes(self.offset + page / 8, 1)?;
        Ok(bytes[0] >> (page % 8) & 1 == 1)
    }
}

fn logged_rings(bench: &Bench, format: RingFormat) -> Verdict {
    let mut rig = logging_rig(bench, format)?;
    rig.start()?;
    let log = Log::start(&mut rig, 0)?;
    let config = rig.rings[1].config;
    let (name, area) = match format {
        Split => ("the used ring", config.device_area),
        Packed => ("the descriptor ring", config.desc_area),
    };
    rig.send(0, &frame(1, 60))?;
    rig.wait_taken(0, 1)?;
    let at = rig.guest_addr(area).0;
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
    let mut rig = logging_rig(bench, Split)?;
    rig.start()?;
    let log = Log::start(&mut rig, 0)?;
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

/// A driver whose writes can be logged, none of it told.
fn logging_rig(bench: &Bench, format: RingFormat) -> Result<Rig, Stop> {
    let rig = bench.rig_with(&Shape::new(format), ProtocolFeatures::LOG_SHMFD)?;
    if rig.session.offered.contains(Features::LOG_ALL) {
        Ok(rig)
    } else {
        skipped("LOG_ALL is not offered")
    }
}

/// How often frames are sent again that did not all come back: a network may lose what it gets before it has heard that
/// the port's rings run again.
const LAPS: usize = 4;

/// What a page has when nobody but the device writes, before and after.
fn logged_everywhere(bench: &Bench, format: RingFormat) -> Verdict {
    let expected = if bench.needs_return().is_ok() { 16 } else { 0 };
    let mut lap = Lap::run(bench, format, expected)?;
    for _ in 1..LAPS {
        if lap.came >= expected {
            break;
        }
        lap = Lap::run(bench, format, expected)?;
    }
    let Lap {
        came,
        changed,
        unmarked,
    } = lap;
    if came < expected {
        return failed(format!(
            "{LAPS} times, of {expected} frames {came} came back while writes were logged"
        ));
    }
    let (missing, list) = (unmarked.len(), unmarked.join(", "));
    let found = format!("{changed} pages have changed, {missing} of them are not marked: {list}");
    holds(
        unmarked.is_empty() && changed > 0,
        found.trim_end_matches(": "),
    )
}

/// What 16 frames out, and those of them that came back, did to the memory and its log.
struct Lap {
    came: usize,
    /// Pages that have changed, and where those of them are that the log does not mark.
    changed: usize,
    unmarked: Vec<String>,
}

impl Lap {
    fn run(bench: &Bench, format: RingFormat, expected: usize) -> Result<Self, Stop> {
        let mut rig = logging_rig(bench, format)?;
        rig.start()?;
        for ring in 0..2 {
            rig.session.stop_ring(index(ring))?;
        }
        // All that the driver writes, it writes now.
        rig.make_room(0, 16, 2048)?;
        for number in 0..16 {
            rig.send(0, &frame(number, 1514))?;
        }
        let before = memory(&rig);
        let log = Log::start(&mut rig, 0)?;
        for ring in 0..2 {
            rig.start_ring(ring)?;
        }
        rig.wait_taken(0, 16)?;
        let mut came = 0;
        rig.eventually(|rig| {
            came += rig.received(0)?.len();
            Ok((came >= expected).then_some(()))
        })?;
        for ring in 0..2 {
            rig.session.stop_ring(index(ring))?;
        }
        let (mut changed, mut unmarked) = (0, Vec::new());
        for ((guest, was), (_, is)) in before.iter().zip(memory(&rig)) {
            let pages = was.chunks(4096).zip(is.chunks(4096));
            for (addr, _) in (*guest..)
                .step_by(4096)
                .zip(pages)
                .filter(|(_, (was, is))| was != is)
            {
                changed += 1;
                if !log.is_marked(addr)? {
                    unmarked.push(format!("{addr:#x}"));
                }
            }
        }
        Ok(Self {
            came,
            changed,
            unmarked,
        })
    }
}

/// All memory of a driver, region by region.
pub(super) fn memory(rig: &Rig) -> Vec<(u64, Vec<u8>)> {
    let regions = rig.memory.regions().iter();
    regions
        .map(|region| {
            let len = usize::try_from(region.size).unwrap_or_default();
            (region.guest.0, rig.read_user(region.user, len))
        })
        .collect()
}

fn announced(bench: &Bench) -> Verdict {
    bench.needs_return()?;
    let mut rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::RARP)?;
    rig.start()?;
    rig.make_room(0, 16, 2048)?;
    let mac = [2, 0, 0, 0, 0x0c, 1];
    let [a, b, c, d, e, f] = mac;
    let word = u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]);
    rig.session.insist(&Request::SendRarp(word), &[])?;
    // Some let it in beside the next packet.
    rig.send(0, &frame(0, 60))?;
    // What an echo does not change: type, and that of a question who asks for the address of itself. Spec: RFC 903
    let rest = [
        &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3][..],
        &mac,
        &[0; 4],
        &mac,
    ];
    let rest = rest.concat();
    let came = rig.eventually(|rig| {
        let mut frames = rig.received(0)?.into_iter();
        Ok(frames.find(|(_, frame)| frame[12..].starts_with(&rest)))
    })?;
    match came {
        Some((_, frame)) => Ok(format!("{} bytes", frame.len())),
        None => failed("no RARP request with the address came back"),
    }
}

/// In the answer to SET_DEVICE_STATE_FD: an error, and that no descriptor comes with it.
const ERROR: u64 = 0xff;
const NO_FD: u64 = 1 << 8;

/// Hands over one end of a pipe; the end that is to be used here, and whose pipe it is.
fn exchange(session: &Session, load: bool) -> Result<(PipeEnd, &'static str), Stop> {
    let (reader, writer) = io::pipe().map_err(Stop::host)?;
    let (ours, theirs): (OwnedFd, OwnedFd) = if load {
        (writer.into(), reader.into())
    } else {
        (reader.into(), writer.into())
    };
    let asked = DeviceState {
        direction: load.into(),
        phase: 0,
    };
    let request = Request::SetDeviceStateFd(asked);
    let (payload, mut files) = session.ask_with(&request, &[theirs.as_fd()])?;
    let Some(code) = u64::from_bytes(&payload) else {
        let bytes = payload.len();
        return failed(format!("an answer of {bytes} bytes instead of 8"));
    };
    let (end, whose) = match (code & ERROR, code & NO_FD, files.pop()) {
        (0, NO_FD, None) => (ours, "our pipe"),
        (0, 0, Some(file)) if files.is_empty() => (file, "a pipe of its own"),
        (_, _, file) => {
            let files = files.len() + usize::from(file.is_some());
            return failed(format!("answered with {code:#x} and {files} descriptors"));
        }
    };
    let end = if load {
        PipeEnd::writer(end)
    } else {
        PipeEnd::reader(end)
    };
    match end {
        Ok(end) => Ok((end, whose)),
        Err(error) => failed(format!("{whose}: {error}")),
    }
}

/// What the device says of a transfer whose pipe is closed.
fn outcome(session: &Session) -> Result<u64, Stop> {
    session.number(&Request::CheckDeviceState)
}

/// Saves the state of a device that does nothing: its bytes, and through whose pipe.
fn save(session: &Session) -> Result<(Vec<u8>, &'static str), Stop> {
    let (pipe, whose) = exchange(session, false)?;
    let (mut state, mut bytes) = (Vec::new(), [0; 4096]);
    loop {
        match pipe.read_some(&mut bytes) {
            Ok(0) => break,
            Ok(n) => state.extend_from_slice(&bytes[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let more = wait_readable(pipe.as_fd(), session.patience());
                if !more.map_err(Stop::host)? {
                    return failed(format!("after {} bytes the state has no end", state.len()));
                }
            }
            Err(error) => return Err(Stop::host(error)),
        }
    }
    drop(pipe);
    match outcome(session)? {
        0 => Ok((state, whose)),
        code => failed(format!(
            "CHECK_DEVICE_STATE after saving was answered with {code}"
        )),
    }
}

/// Loads a state: what the device says of it, and through whose pipe.
fn load(session: &Session, mut state: &[u8]) -> Result<(u64, &'static str), Stop> {
    let (pipe, whose) = exchange(session, true)?;
    while !state.is_empty() {
        match pipe.write_some(state) {
            Ok(n) => state = &state[n..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !pipe.wait_writable(session.patience()) {
                    return failed("the back-end does not read its state");
                }
            }
            // It has seen enough; what it makes of that it will say.
            Err(_) => break,
        }
    }
    drop(pipe);
    Ok((outcome(session)?, whose))
}

fn moved(bench: &Bench) -> Verdict {
    let session = bench.session_with(ProtocolFeatures::DEVICE_STATE)?;
    let (state, from) = save(&session)?;
    drop(session);
    let session = bench.session_with(ProtocolFeatures::DEVICE_STATE)?;
    let (code, to) = load(&session, &state)?;
    if code != 0 {
        return failed(format!(
            "CHECK_DEVICE_STATE after loading was answered with {code}"
        ));
    }
    let (again, _) = save(&session)?;
    let len = state.len();
    holds(
        again.len() == len,
        format!(
            "{len} bytes out through {from}, in through {to}, and {} out again",
            again.len()
        ),
    )
}
