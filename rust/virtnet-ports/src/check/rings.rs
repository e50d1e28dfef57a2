//! Checks of a ring's states: started and stopped, enabled and disabled, told to be looked at or not.

use std::os::fd::AsFd;

use virtnet_mem::GuestAddr;
use virtnet_sys::EventFd;
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::VringState;
use virtnet_virtio::RingFormat::{Packed, Split};
use virtnet_virtio::{Features, RingFormat};

use super::rig::{QUIET, Rig, Shape, word};
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds, skipped};
use crate::RegionLayout;

const STATES: &str = "vhost-user, Ring states";
const STARTING: &str = "vhost-user, Starting and stopping rings";

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "old-front-end",
        "without bit 30 in SET_FEATURES, rings are enabled from the start",
        STATES,
        |bench| {
            let shape = Shape {
                old: true,
                ..Shape::new(Split)
            };
            let mut rig = bench.running(&shape)?;
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("a frame was taken without SET_VRING_ENABLE".to_owned())
        },
    ),
    Check::must(
        "base-is-kept",
        "GET_VRING_BASE of a ring that never ran tells what SET_VRING_BASE set",
        "vhost-user, Front-end message types (GET_VRING_BASE)",
        |bench| {
            let rig = bench.rig(&Shape::new(Split))?;
            rig.tell_features()?;
            rig.session
                .insist(&Request::SetVringBase(VringState { index: 0, num: 7 }), &[])?;
            let base = rig.session.stop_ring(0)?;
            holds(base == 7, format!("{base} after 7 was set"))
        },
    ),
    Check::must(
        "disabled-supplies-nothing",
        "a ring that is started and disabled receives nothing",
        STATES,
        |bench| {
            bench.needs_return()?;
            let mut rig = enabled_as(bench, [false, true])?;
            rig.make_room(0, 4, 2048)?;
            rig.send(0, &frame(0, 60))?;
            std::thread::sleep(QUIET);
            let n = rig.received(0)?.len();
            holds(n == 0, format!("{n} frames were received"))
        },
    ),
    Check::must(
        "disabled-discards",
        "a network device takes what is sent on a disabled ring, and discards it",
        STATES,
        |bench| {
            let mut rig = enabled_as(bench, [true, false])?;
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("the frame was taken".to_owned())
        },
    ),
    Check::must(
        "enabled-while-stopped",
        "whether a ring is enabled is remembered while it is stopped",
        STATES,
        |bench| {
            let mut rig = bench.rig(&Shape::new(Split))?;
            needs_enable(&rig)?;
            rig.tell_features()?;
            rig.tell_memory()?;
            for ring in 0..2 {
                rig.enable(ring, true)?;
            }
            for ring in 0..2 {
                rig.configure_ring(ring, 0)?;
                rig.set_call(ring, true)?;
                rig.set_kick(ring, true)?;
            }
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("a frame was taken on rings that were enabled first".to_owned())
        },
    ),
    Check::must(
        "enabled-again",
        "rings that were disabled and enabled again go on",
        STATES,
        |bench| {
            let mut rig = bench.running(&Shape::new(Split))?;
            needs_enable(&rig)?;
            for number in 0..3 {
                rig.send(0, &frame(number, 60))?;
                rig.wait_taken(0, 1)?;
                for enabled in [false, true] {
                    rig.enable(0, enabled)?;
                    rig.enable(1, enabled)?;
                }
            }
            rig.send(0, &frame(9, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("three times".to_owned())
        },
    ),
    Check::must(
        "starts-without-kick-split",
        "what is available when a ring starts is taken although nobody kicks",
        STARTING,
        |bench| starts_without_kick(bench, Split),
    ),
    Check::must(
        "starts-without-kick-packed",
        "the same on packed rings",
        STARTING,
        |bench| starts_without_kick(bench, Packed),
    ),
    Check::must(
        "polls-without-kick",
        "a ring without a kick event (bit 8 of SET_VRING_KICK) is polled",
        "vhost-user, Front-end message types (SET_VRING_KICK)",
        |bench| {
            let mut rig = bench.rig(&Shape::new(Split))?;
            rig.tell_features()?;
            rig.tell_memory()?;
            for ring in 0..2 {
                rig.configure_ring(ring, 0)?;
                rig.set_call(ring, true)?;
                rig.set_kick(ring, false)?;
                rig.enable(ring, true)?;
            }
            for number in 0..3 {
                rig.send(0, &frame(number, 60))?;
                rig.wait_taken(0, 1)?;
            }
            Ok("3 frames were taken".to_owned())
        },
    ),
    Check::must(
        "works-without-call",
        "a ring without a call event (bit 8 of SET_VRING_CALL) works, and its driver polls",
        "vhost-user, Front-end message types (SET_VRING_CALL)",
        |bench| {
            let mut rig = bench.rig(&Shape::new(Split))?;
            rig.tell_features()?;
            rig.tell_memory()?;
            for ring in 0..2 {
                rig.configure_ring(ring, 0)?;
                rig.set_call(ring, false)?;
                rig.set_kick(ring, true)?;
                rig.enable(ring, true)?;
            }
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("a frame was taken".to_owned())
        },
    ),
    Check::must(
        "stop-tells-where-split",
        "GET_VRING_BASE tells the next available entry, with everything before it used",
        "vhost-user, Front-end message types (GET_VRING_BASE)",
        |bench| stop_tells_where(bench, Split),
    ),
    Check::must(
        "stop-tells-where-packed",
        "the same on packed rings: the next slot and its wrap counter",
        "vhost-user, Front-end message types (GET_VRING_BASE)",
        |bench| stop_tells_where(bench, Packed),
    ),
    Check::must(
        "stopped-stays-untouched",
        "a stopped ring is not looked at: nothing is taken, nothing in it changes, nobody is called",
        STATES,
        |bench| {
            let mut rig = bench.running(&Shape::new(Split))?;
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            for ring in 0..2 {
                rig.session.stop_ring(ring)?;
            }
            rig.rings[1].call.drain();
            rig.send(0, &frame(1, 60))?;
            drop(rig.rings[1].kick.signal());
            let before = rig.ring_bytes(1);
            std::thread::sleep(QUIET);
            let same = before == rig.ring_bytes(1);
            let called = rig.rings[1].call.drain();
            let what = match (same, called) {
                (true, false) => "nothing changed",
                (false, _) => "the ring changed",
                (true, true) => "the call event was signalled",
            };
            holds(same && !called, what)
        },
    ),
    Check::must(
        "goes-on-at-base-split",
        "a stopped ring that is started again at its base goes on there: nothing is lost or done twice",
        STARTING,
        |bench| goes_on_at_base(bench, Split),
    ),
    Check::must(
        "goes-on-at-base-packed",
        "the same on packed rings, round the end of the ring",
        STARTING,
        |bench| goes_on_at_base(bench, Packed),
    ),
    Check::must(
        "call-is-exchanged",
        "SET_VRING_CALL while a ring runs: the new event is signalled from then on",
        STARTING,
        |bench| {
            let mut rig = bench.running(&Shape::new(Split))?;
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            let call = EventFd::new().map_err(Stop::host)?;
            rig.session
                .insist(&Request::SetVringCall(word(1, true)), &[call.as_fd()])?;
            rig.rings[1].queue.arm();
            rig.send(0, &frame(1, 60))?;
            let called = rig.eventually(|_| Ok(call.drain().then_some(())))?;
            holds(
                called.is_some(),
                if called.is_some() {
                    "signalled"
                } else {
                    "not signalled"
                },
            )
        },
    ),
    Check::must(
        "kick-is-exchanged",
        "SET_VRING_KICK while a ring runs: kicks of the new event count from then on",
        STARTING,
        |bench| {
            let mut rig = bench.running(&Shape::new(Split))?;
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            let kick = EventFd::new().map_err(Stop::host)?;
            rig.session
                .insist(&Request::SetVringKick(word(1, true)), &[kick.as_fd()])?;
            rig.rings[1].kick = kick;
            for number in 1..4 {
                std::thread::sleep(QUIET / 4);
                rig.send(0, &frame(number, 60))?;
                rig.wait_taken(0, 1)?;
            }
            Ok("3 frames were taken".to_owned())
        },
    ),
    Check::must(
        "spurious-kicks",
        "kicks for nothing are harmless",
        "virtio 1.4, 2.7.13.3",
        |bench| {
            let mut rig = bench.running(&Shape::new(Split))?;
            for _ in 0..50 {
                drop(rig.rings[1].kick.signal());
                drop(rig.rings[0].kick.signal());
            }
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("a frame was taken after 100 of them".to_owned())
        },
    ),
    Check::must(
        "second-pair",
        "with MQ, the second queue pair works as the first",
        "vhost-user, Multiple queue support",
        |bench| {
            let session = bench.session()?;
            if !session.protocol.contains(ProtocolFeatures::MQ) {
                return skipped("MQ is not offered");
            }
            let n = session.number(&Request::GetQueueNum)?;
            if n < 2 {
                return skipped(format!("there is {n} queue pair"));
            }
            drop(session);
            let shape = Shape {
                pairs: 2,
                ..Shape::new(Split).with(Features::MQ)
            };
            let mut rig = bench.running(&shape)?;
            for pair in 0..2 {
                rig.send(pair, &frame(0, 60))?;
                rig.wait_taken(pair, 1)?;
            }
            Ok(format!("of {n} pairs, two were tried"))
        },
    ),
    Check::must(
        "comes-back",
        "who leaves under traffic and comes back finds everything as at first",
        "vhost-user, Communication (reconnection)",
        |bench| {
            for _ in 0..5 {
                let mut rig = bench.running(&Shape::new(Split))?;
                rig.make_room(0, 32, 2048)?;
                for number in 0..32 {
                    rig.send(0, &frame(number, 60))?;
                }
                drop(rig);
            }
            let mut rig = bench.running(&Shape::new(Split))?;
            rig.send(0, &frame(0, 60))?;
            rig.wait_taken(0, 1)?;
            Ok("5 times".to_owned())
        },
    ),
    Check::must(
        "memory-is-replaced",
        "SET_MEM_TABLE replaces the whole table, also when there was one",
        "vhost-user, Front-end message types (SET_MEM_TABLE)",
        |bench| {
            let mut first = bench.running(&Shape::new(Split))?;
            first.send(0, &frame(0, 60))?;
            first.wait_taken(0, 1)?;
            for ring in 0..2 {
                first.session.stop_ring(ring)?;
            }
            // The same session with other memory, at other addresses: some keep what lies where something lay before.
            let Rig { session, .. } = first;
            let elsewhere = RegionLayout {
                guest: GuestAddr(7 << 32),
                size: 1 << 20,
                offset: 0,
            };
            let shape = Shape {
                layout: Some(vec![elsewhere]),
                ..Shape::new(Split)
            };
            let mut second = Rig::new(session, &shape)?;
            second.tell_memory()?;
            for ring in 0..2 {
                second.start_ring(ring)?;
            }
            second.send(0, &frame(1, 60))?;
            second.wait_taken(0, 1)?;
            Ok("a frame was taken from the new memory".to_owned())
        },
    ),
];

/// Enabling can be said only where bit 30 is offered.
fn needs_enable(rig: &Rig) -> Result<(), Stop> {
    if rig.session.offered.contains(Features::PROTOCOL_FEATURES) {
        Ok(())
    } else {
        skipped("bit 30 is not offered: every ring is enabled")
    }
}

/// A pair of rings that are started, and enabled or not.
fn enabled_as(bench: &Bench, enabled: [bool; 2]) -> Result<Rig, Stop> {
    let rig = bench.rig(&Shape::new(Split))?;
    needs_enable(&rig)?;
    rig.tell_features()?;
    rig.tell_memory()?;
    for (ring, enabled) in enabled.into_iter().enumerate() {
        rig.configure_ring(ring, 0)?;
        rig.set_call(ring, true)?;
        rig.set_kick(ring, true)?;
        rig.enable(ring, enabled)?;
    }
    Ok(rig)
}

fn starts_without_kick(bench: &Bench, ring: RingFormat) -> Verdict {
    let mut rig = bench.rig(&Shape::new(ring))?;
    // Nobody listens to this event yet, and the ring's own is a fresh one.
    rig.send(0, &frame(0, 60))?;
    rig.rings[1].kick = EventFd::new().map_err(Stop::host)?;
    rig.start()?;
    rig.wait_taken(0, 1)?;
    Ok("the frame was taken".to_owned())
}

/// What a ring's base is after so many chains of one descriptor.
pub(super) fn base_after(ring: RingFormat, size: u16, chains: u32) -> u32 {
    match ring {
        Split => chains & 0xffff,
        Packed => {
            let size = u32::from(size);
            let wrap = u32::from((chains / size).is_multiple_of(2)) << 15;
            (chains % size) | wrap
        }
    }
}

fn stop_tells_where(bench: &Bench, ring: RingFormat) -> Verdict {
    let mut rig = bench.running(&Shape::new(ring))?;
    for number in 0..5 {
        rig.send(0, &frame(number, 60))?;
    }
    rig.wait_taken(0, 5)?;
    let base = rig.session.stop_ring(1)?;
    let expected = base_after(ring, rig.rings[1].config.size, 5);
    // Of a packed ring, some leave the used half away.
    let same = base == expected || ring == Packed && base == expected | expected << 16;
    holds(
        same,
        format!("{base:#x} after 5 frames, {expected:#x} is the next one"),
    )
}

fn goes_on_at_base(bench: &Bench, ring: RingFormat) -> Verdict {
    let mut rig = bench.running(&Shape::new(ring))?;
    let (mut sent, mut taken) = (0_u32, 0_usize);
    for lap in 0..6 {
        for _ in 0..25 {
            rig.send(0, &frame(sent, 60))?;
            sent += 1;
        }
        // Some are taken before the stop, the others after it.
        taken += rig.taken(0)?;
        let base = rig.session.stop_ring(1)?;
        taken += rig.taken(0)?;
        let seen = u32::try_from(taken).unwrap_or(u32::MAX);
        let expected = base_after(ring, rig.rings[1].config.size, seen);
        if base & 0xffff != expected {
            return failed(format!(
                "stop {lap}: the base is {base:#x}, and {taken} chains came back used, which is {expected:#x}"
            ));
        }
        rig.configure_ring(1, base)?;
        rig.set_call(1, true)?;
        rig.set_kick(1, true)?;
        let left = usize::try_from(sent).unwrap_or(usize::MAX) - taken;
        rig.wait_taken(0, left)?;
        taken += left;
    }
    Ok(format!("{sent} frames over 6 stops, each taken once"))
}
