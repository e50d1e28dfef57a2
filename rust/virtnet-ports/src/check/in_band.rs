//! Checks of kicks and calls that are messages.

use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{BackRequest, Request};
use virtnet_vhost::payload::VringState;
use virtnet_virtio::RingFormat;
use virtnet_virtio::RingFormat::{Packed, Split};

use super::rig::{QUIET, Rig, Shape, index};
use super::session::Channel;
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds};

const IN_BAND: &str = "vhost-user, In-band notifications";

/// What they need, with them.
const NEEDED: ProtocolFeatures = ProtocolFeatures::INBAND_NOTIFICATIONS
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ);

/// The ring that is tried.
const TRANSMITQ: usize = 1;

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "in-band-not-alone",
        "INBAND_NOTIFICATIONS that is accepted without REPLY_ACK and BACKEND_REQ ends the connection",
        IN_BAND,
        |bench| {
            bench.session_with(NEEDED)?;
            let session = bench.connect()?;
            session.number(&Request::GetFeatures)?;
            session.number(&Request::GetProtocolFeatures)?;
            let alone = ProtocolFeatures::INBAND_NOTIFICATIONS | ProtocolFeatures::REPLY_ACK;
            session.tell(&Request::SetProtocolFeatures(alone.bits()), &[])?;
            let ended = session.is_ended();
            let found = if ended { "it was closed" } else { "it goes on" };
            holds(ended, found)
        },
    )
    .hostile(),
    Check::must(
        "in-band-kicks-split",
        "a ring without events starts at the first VRING_KICK, and what is available at each is taken",
        IN_BAND,
        |bench| kicks(bench, Split),
    ),
    Check::must(
        "in-band-kicks-packed",
        "the same on packed rings",
        IN_BAND,
        |bench| kicks(bench, Packed),
    ),
    Check::must(
        "in-band-calls",
        "a driver without a call event that asks to be called is called by VRING_CALL, which names the ring",
        IN_BAND,
        |bench| {
            let (mut rig, channel) = without_events(bench, Split, false)?;
            for number in 0..3 {
                rig.rings[TRANSMITQ].queue.arm();
                rig.send(0, &frame(number, 60))?;
                kick(&rig)?;
                if !is_called(&mut rig, &channel)? {
                    return failed(format!("frame {number}: no VRING_CALL"));
                }
                rig.wait_taken(0, 1)?;
            }
            Ok("3 times".to_owned())
        },
    ),
    Check::must(
        "in-band-event-first",
        "a ring with a call event is called by that, and by no message",
        IN_BAND,
        |bench| {
            let (mut rig, channel) = without_events(bench, Split, true)?;
            rig.rings[TRANSMITQ].queue.arm();
            rig.send(0, &frame(0, 60))?;
            kick(&rig)?;
            rig.wait_taken(0, 1)?;
            let called = rig.eventually(|rig| Ok(rig.rings[TRANSMITQ].call.drain().then_some(())))?;
            let told = channel.next(QUIET)?;
            match (called.is_some(), told) {
                (true, None) => Ok("by the event".to_owned()),
                (called, told) => failed(format!("by the event: {called}, and by a message: {told:?}")),
            }
        },
    ),
];

/// A driver whose rings have no events, or call events only; none has been kicked.
fn without_events(bench: &Bench, format: RingFormat, calls: bool) -> Result<(Rig, Channel), Stop> {
    let rig = bench.rig_with(&Shape::new(format), NEEDED)?;
    let channel = Channel::open(&rig.session)?;
    rig.tell_features()?;
    rig.tell_memory()?;
    for ring in 0..rig.rings.len() {
        rig.configure_ring(ring, rig.rings[ring].config.base)?;
        rig.set_call(ring, calls)?;
        rig.enable(ring, true)?;
    }
    Ok((rig, channel))
}

fn kick(rig: &Rig) -> Result<(), Stop> {
    let ring = VringState {
        index: index(TRANSMITQ),
        num: 0,
    };
    rig.session.insist(&Request::VringKick(ring), &[])
}

/// Whether the transmitq is called for in time; calls of the other ring are let by.
fn is_called(rig: &mut Rig, channel: &Channel) -> Result<bool, Stop> {
    let called = rig.eventually(|_| {
        let Some((request, waits)) = channel.next(QUIET)? else {
            return Ok(None);
        };
        if waits {
            channel.acknowledge(&request)?;
        }
        let ours =
            matches!(request, BackRequest::VringCall(ring) if ring.index == index(TRANSMITQ));
        Ok(ours.then_some(()))
    })?;
    Ok(called.is_some())
}

fn kicks(bench: &Bench, format: RingFormat) -> Verdict {
    let (mut rig, _channel) = without_events(bench, format, false)?;
    for number in 0..5 {
        std::thread::sleep(QUIET / 4);
        rig.send(0, &frame(number, 60))?;
        kick(&rig)?;
        rig.wait_taken(0, 1)?;
    }
    Ok("5 frames were taken".to_owned())
}
