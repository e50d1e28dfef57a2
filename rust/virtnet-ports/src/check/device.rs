//! Checks of what is told of the whole device: its configuration space, MTU and status, and that it is reset.

use std::thread;

use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{Config, Payload};
use virtnet_virtio::Features;
use virtnet_virtio::RingFormat::Split;

use super::rig::{QUIET, Rig, Shape};
use super::session::{Answer, Session};
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds, skipped};

const CONFIG: &str = "vhost-user, Front-end message types (GET_CONFIG)";

/// ACKNOWLEDGE and DRIVER. Spec: virtio 1.4, 2.1
const STARTED: u64 = 1 | 2;
const FEATURES_OK: u64 = 8;
const DRIVER_OK: u64 = 4;

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "config-size",
        "the answer to GET_CONFIG carries as many bytes as were asked for",
        "vhost-user, Front-end message types (GET_CONFIG)",
        |bench| {
            let session = bench.session_with(ProtocolFeatures::CONFIG)?;
            let payload = session.ask(&Request::GetConfig(Config {
                offset: 0,
                flags: 0,
                data: vec![0; 12],
            }))?;
            match Config::from_bytes(&payload) {
                Some(config) if config.data.len() == 12 => Ok(format!("{:02x?}", config.data)),
                _ => failed(format!("{} bytes of payload", payload.len())),
            }
        },
    ),
    Check::must(
        "config-in-parts",
        "a part of the configuration space is what the whole has there",
        CONFIG,
        |bench| {
            let session = bench.session_with(ProtocolFeatures::CONFIG)?;
            let whole = config(&session, 0, 12)?;
            for (offset, len) in [(0, 6), (6, 2), (8, 2), (2, 9)] {
                let at = usize::try_from(offset).unwrap_or_default();
                let part = config(&session, offset, len)?;
                if part != whole[at..at + len] {
                    return failed(format!("{part:02x?} at {offset}, and {whole:02x?} in all"));
                }
            }
            Ok(format!("{whole:02x?}"))
        },
    ),
    Check::must(
        "config-beyond-end",
        "what lies beyond 256 bytes is not told: the answer is empty, or the connection ends",
        CONFIG,
        |bench| {
            let session = bench.session_with(ProtocolFeatures::CONFIG)?;
            let asked = Config {
                offset: 250,
                flags: 0,
                data: vec![0; 12],
            };
            session.tell(&Request::GetConfig(asked), &[])?;
            match session.receive("GET_CONFIG")? {
                None => Ok("the connection was closed".to_owned()),
                Some((_, payload)) => holds(
                    payload.is_empty(),
                    format!("{} bytes of payload", payload.len()),
                ),
            }
        },
    )
    .hostile(),
    Check::must(
        "mac-is-read-only",
        "the MAC address is not changed by SET_CONFIG: a driver has the control queue for that",
        "virtio 1.4, 5.1.4",
        |bench| {
            let session = bench.session_with(ProtocolFeatures::CONFIG)?;
            let before = config(&session, 0, 6)?;
            let data = before.iter().map(|byte| byte ^ 0x10).collect();
            let write = Request::SetConfig(Config {
                offset: 0,
                flags: 0,
                data,
            });
            let how = if session.acknowledges() {
                match session.acknowledged(&write, &[])? {
                    Answer::Ended => return Ok(Answer::Ended.to_string()),
                    answer => answer.to_string(),
                }
            } else {
                session.tell(&write, &[])?;
                "not answered".to_owned()
            };
            let after = config(&session, 0, 6)?;
            holds(
                before == after,
                format!("{how}; {before:02x?} and then {after:02x?}"),
            )
        },
    )
    .hostile(),
    Check::must(
        "mtu-in-bounds",
        "NET_SET_MTU of 1500 is accepted and of 67 refused",
        "vhost-user, Front-end message types (NET_SET_MTU); virtio 1.4, 5.1.4.1",
        |bench| {
            let session = bench.session_with(ProtocolFeatures::MTU)?;
            if !session.acknowledges() {
                return skipped("REPLY_ACK is not offered, so a refusal cannot be told");
            }
            let features = session.offered
                & (Features::VERSION_1 | Features::PROTOCOL_FEATURES | Features::MTU);
            session.insist(&Request::SetFeatures(features.bits()), &[])?;
            session.insist(&Request::NetSetMtu(1500), &[])?;
            session.refuses(&Request::NetSetMtu(67), &[])
        },
    ),
    Check::must(
        "mtu-beyond-16-bits",
        "NET_SET_MTU of a number that only has a good end is refused",
        "vhost-user, Front-end message types (NET_SET_MTU)",
        |bench| {
            bench.acknowledged_session()?;
            let session = bench.session_with(ProtocolFeatures::MTU)?;
            let features = session.offered
                & (Features::VERSION_1 | Features::PROTOCOL_FEATURES | Features::MTU);
            session.insist(&Request::SetFeatures(features.bits()), &[])?;
            session.refuses(&Request::NetSetMtu((1 << 16) + 1500), &[])
        },
    )
    .hostile(),
    Check::must(
        "mtu-is-carried",
        "a frame as long as the MTU that was set is taken, and comes back whole",
        "virtio 1.4, 5.1.4.1",
        |bench| {
            let shape = Shape::new(Split);
            let mut rig = bench.rig_with(&shape, ProtocolFeatures::MTU)?;
            rig.tell_features()?;
            rig.session.insist(&Request::NetSetMtu(1500), &[])?;
            rig.start()?;
            rig.make_room(0, 8, 2048)?;
            let sent = frame(0, 1514);
            rig.send(0, &sent)?;
            rig.wait_taken(0, 1)?;
            if bench.needs_return().is_err() {
                return Ok("it was taken".to_owned());
            }
            let came = rig.eventually(|rig| Ok(rig.received(0)?.pop()))?;
            let len = came.map_or(0, |(_, frame)| frame.len());
            holds(
                len == sent.len(),
                format!("{len} bytes came back of {}", sent.len()),
            )
        },
    ),
    Check::must(
        "status-is-kept",
        "GET_STATUS tells what SET_STATUS set, and 0 after 0 was set",
        "vhost-user, VHOST_USER_PROTOCOL_F_STATUS; virtio 1.4, 2.1",
        |bench| {
            let session = bench.session_with(ProtocolFeatures::STATUS)?;
            let mut seen = Vec::new();
            for status in [0, 1, 3, 0] {
                session.insist(&Request::SetStatus(status), &[])?;
                let found = session.number(&Request::GetStatus)?;
                if found != status {
                    return failed(format!("{found:#x} after {status:#x} was set"));
                }
                seen.push(found.to_string());
            }
            Ok(seen.join(", "))
        },
    ),
    Check::must(
        "status-gates",
        "with STATUS, a ring that has everything is not looked at before DRIVER_OK, and is from then on",
        "virtio 1.4, 3.1.1 and 2.1.2",
        |bench| {
            let mut rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::STATUS)?;
            begin(&rig)?;
            rig.start()?;
            rig.send(0, &frame(0, 60))?;
            thread::sleep(QUIET);
            if rig.taken(0)? > 0 {
                return failed("a frame was taken before DRIVER_OK");
            }
            set_status(&rig, FEATURES_OK | DRIVER_OK)?;
            rig.wait_taken(0, 1)?;
            Ok("a frame was taken after DRIVER_OK, and not before".to_owned())
        },
    ),
    Check::must(
        "status-tells-refusal",
        "after features that were refused, FEATURES_OK is not set",
        "virtio 1.4, 2.2.2; vhost-user, Front-end message types (SET_STATUS)",
        |bench| {
            bench.acknowledged_session()?;
            let rig = bench.rig_with(&Shape::new(Split), ProtocolFeatures::STATUS)?;
            begin(&rig)?;
            let unoffered = (0..64).map(|bit| 1_u64 << bit).rev();
            let mut unoffered = unoffered.filter(|bit| rig.session.offered.bits() & bit == 0);
            let Some(bit) = unoffered.next() else {
                return skipped("all 64 are offered");
            };
            let features = Request::SetFeatures(rig.features.bits() | bit);
            match rig.session.acknowledged(&features, &[])? {
                Answer::Done => return failed("a feature that is not offered was accepted"),
                Answer::Ended => return Ok(Answer::Ended.to_string()),
                Answer::Refused(_) => {}
            }
            // What becomes of this is told by the next.
            rig.session
                .acknowledged(&Request::SetStatus(STARTED | FEATURES_OK), &[])?;
            let status = rig.session.number(&Request::GetStatus)?;
            holds(
                status & FEATURES_OK == 0,
                format!("the status is {status:#x}"),
            )
        },
    )
    .hostile(),
    Check::must(
        "status-zero-resets",
        "a device whose status was set to 0 looks at no ring, and can be set up again",
        "virtio 1.4, 2.4",
        |bench| {
            let feature = ProtocolFeatures::STATUS;
            let reset = Request::SetStatus(0);
            begins_anew(bench, feature, &reset, |rig| {
                begin(rig)?;
                rig.start()?;
                set_status(rig, FEATURES_OK | DRIVER_OK)
            })
        },
    ),
    Check::must(
        "reset-keeps-session",
        "RESET_DEVICE keeps the session: what was negotiated of the protocol holds",
        "vhost-user, Front-end message types (RESET_DEVICE)",
        |bench| {
            let session = bench.session_with(ProtocolFeatures::RESET_DEVICE)?;
            session.insist(&Request::ResetDevice, &[])?;
            session.insist(&Request::SetOwner, &[])?;
            Ok("acknowledged, and so is what follows".to_owned())
        },
    ),
    Check::must(
        "reset-stops-rings",
        "a device that was reset by RESET_DEVICE looks at no ring, and can be set up again",
        "vhost-user, Front-end message types (RESET_DEVICE)",
        |bench| {
            let feature = ProtocolFeatures::RESET_DEVICE;
            begins_anew(bench, feature, &Request::ResetDevice, Rig::start)
        },
    ),
];

/// A part of the configuration space.
fn config(session: &Session, offset: u32, len: usize) -> Result<Vec<u8>, Stop> {
    let data = vec![0; len];
    let asked = Config {
        offset,
        flags: 0,
        data,
    };
    let payload = session.ask(&Request::GetConfig(asked))?;
    match Config::from_bytes(&payload) {
        Some(config) if config.data.len() == len => Ok(config.data),
        _ => failed(format!(
            "{len} bytes at {offset} were asked for, and {} came",
            payload.len()
        )),
    }
}

/// The driver has found the device.
fn begin(rig: &Rig) -> Result<(), Stop> {
    for status in [0, 1, STARTED] {
        rig.session.insist(&Request::SetStatus(status), &[])?;
    }
    Ok(())
}

/// What has been set stays set.
fn set_status(rig: &Rig, more: u64) -> Result<(), Stop> {
    let status = Request::SetStatus(STARTED | more);
    rig.session.insist(&status, &[])
}

/// Resets a device whose rings run, and sets it up again.
fn begins_anew(
    bench: &Bench,
    feature: ProtocolFeatures,
    reset: &Request,
    start: fn(&mut Rig) -> Result<(), Stop>,
) -> Verdict {
    let shape = Shape::new(Split);
    let mut rig = bench.rig_with(&shape, feature)?;
    start(&mut rig)?;
    for number in 0..5 {
        rig.send(0, &frame(number, 60))?;
    }
    rig.wait_taken(0, 5)?;
    rig.session.insist(reset, &[])?;
    rig.send(0, &frame(5, 60))?;
    drop(rig.rings[1].kick.signal());
    let before = rig.ring_bytes(1);
    thread::sleep(QUIET);
    if before != rig.ring_bytes(1) {
        return failed("a ring changed after the reset");
    }
    let mut again = Rig::new(rig.session, &shape)?;
    start(&mut again)?;
    again.send(0, &frame(6, 60))?;
    again.wait_taken(0, 1)?;
    Ok("nothing was taken after the reset, and everything after that".to_owned())
}
