//! Checks of packets: both formats, both directions, every byte; and who is called when.

use virtnet_mem::GuestAddr;
use virtnet_virtio::RingFormat::{Packed, Split};
use virtnet_virtio::{Features, RingFormat};

use super::rig::{HEADER, QUIET, Rig, Shape, write};
use super::{Bench, Check, Stop, Verdict, failed, holds};
use crate::RegionLayout;

const NET: &str = "virtio 1.4, 5.1.9";

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "takes-split",
        "what a driver sends on a split ring comes back used, each buffer once, none of it written",
        "virtio 1.4, 2.7.8",
        |bench| takes(bench, &Shape::new(Split), &[]),
    ),
    Check::must(
        "takes-packed",
        "the same on a packed ring, round its end",
        "virtio 1.4, 2.8",
        |bench| takes(bench, &Shape::new(Packed), &[]),
    ),
    Check::must(
        "takes-packed-odd-size",
        "a packed ring has any size up to 32768, also one that is no power of two",
        "virtio 1.4, 2.8.10.1",
        |bench| {
            takes(
                bench,
                &Shape {
                    size: 33,
                    ..Shape::new(Packed)
                },
                &[],
            )
        },
    ),
    Check::must(
        "takes-any-framing-split",
        "nothing is assumed about framing: a header in pieces, a frame in pieces, both in one",
        "virtio 1.4, 2.7.4.1",
        |bench| {
            takes(
                bench,
                &Shape::new(Split),
                &[&[1, 5, 11], &[12], &[13, 40], &[12, 26, 27]],
            )
        },
    ),
    Check::must(
        "takes-any-framing-packed",
        "the same on a packed ring",
        "virtio 1.4, 2.8.4",
        |bench| {
            takes(
                bench,
                &Shape::new(Packed),
                &[&[1, 5, 11], &[12], &[13, 40], &[12, 26, 27]],
            )
        },
    ),
    Check::must(
        "takes-small-ring",
        "rings of 2 and of 1024 entries work as others do",
        "virtio 1.4, 2.7",
        |bench| {
            for size in [2, 1024] {
                takes(
                    bench,
                    &Shape {
                        size,
                        ..Shape::new(Split)
                    },
                    &[],
                )?;
            }
            Ok("2 and 1024 entries".to_owned())
        },
    ),
    Check::must(
        "takes-in-order",
        "with IN_ORDER, buffers come back in the order in which they were made available",
        "virtio 1.4, 2.7.9",
        |bench| takes(bench, &Shape::new(Split).with(Features::IN_ORDER), &[]),
    ),
    Check::must(
        "takes-indirect-split",
        "with INDIRECT_DESC, a descriptor may point at a table of descriptors",
        "virtio 1.4, 2.7.5.3",
        |bench| indirect(bench, Split),
    ),
    Check::must(
        "takes-indirect-packed",
        "the same on a packed ring",
        "virtio 1.4, 2.8.8",
        |bench| indirect(bench, Packed),
    ),
    Check::must(
        "leaves-what-is-not-its-own",
        "nothing is written to device-readable buffers, the descriptor table or the available ring",
        "virtio 1.4, 2.7.4.1 and 2.7.5.1",
        |bench| {
            let mut rig = bench.running(&Shape::new(Split))?;
            for number in 0..8 {
                rig.send(0, &frame(number, 60))?;
            }
            let config = rig.rings[1].config;
            let size = usize::from(config.size);
            let owned = |rig: &Rig| {
                let slots = rig.memory.memory().user_addr(rig.rings[1].slots);
                let slots = slots.map_or_else(Vec::new, |addr| rig.read_user(addr, size * 2048));
                (
                    rig.read_user(config.desc_area, 16 * size),
                    rig.read_user(config.driver_area, 4 + 2 * size),
                    slots,
                )
            };
            let before = owned(&rig);
            rig.wait_taken(0, 8)?;
            holds(before == owned(&rig), "compared byte by byte")
        },
    ),
    Check::must(
        "region-with-offset",
        "a region begins at its offset in the file",
        "vhost-user, Memory regions description",
        |bench| {
            let layout = vec![RegionLayout {
                guest: GuestAddr(1 << 32),
                size: 1 << 20,
                offset: 0x1_0000,
            }];
            takes(
                bench,
                &Shape {
                    layout: Some(layout),
                    ..Shape::new(Split)
                },
                &[],
            )
        },
    ),
    Check::must(
        "buffer-across-regions",
        "a buffer may lie across two regions that are neighbours in guest addresses",
        "vhost-user, Memory regions description; virtio 1.4, 2.7.4",
        across_regions,
    ),
    Check::must(
        "returns-split",
        "frames arrive as they were sent, byte by byte: split ring, one buffer each",
        NET,
        |bench| round_trip(bench, &Shape::new(Split), 2048),
    ),
    Check::must("returns-packed", "the same on packed rings", NET, |bench| {
        round_trip(bench, &Shape::new(Packed), 2048)
    }),
    Check::must(
        "returns-mergeable-split",
        "with MRG_RXBUF, a frame longer than a buffer fills several, all but the last completely, and num_buffers counts them",
        "virtio 1.4, 5.1.9.4",
        |bench| round_trip(bench, &Shape::new(Split).with(Features::MRG_RXBUF), 256),
    ),
    Check::must(
        "returns-mergeable-packed",
        "the same on packed rings",
        "virtio 1.4, 5.1.9.4",
        |bench| round_trip(bench, &Shape::new(Packed).with(Features::MRG_RXBUF), 256),
    ),
    Check::must(
        "plain-header",
        "who accepted no offload gets none: flags and gso_type are 0, num_buffers is 1",
        "virtio 1.4, 5.1.9.4",
        |bench| {
            bench.needs_return()?;
            let mut rig = bench.running(&Shape::new(Split))?;
            rig.make_room(0, 8, 2048)?;
            rig.send(0, &frame(0, 60))?;
            let Some(header) =
                rig.eventually(|rig| Ok(rig.received(0)?.pop().map(|(header, _)| header)))?
            else {
                return failed("nothing was received");
            };
            let buffers = u16::from_le_bytes([header[10], header[11]]);
            holds(
                (header[0], header[1], buffers) == (0, 0, 1),
                format!(
                    "flags {}, gso_type {}, num_buffers {buffers}",
                    header[0], header[1]
                ),
            )
        },
    ),
    Check::must(
        "too-little-room",
        "without MRG_RXBUF, a frame that does not fit its buffer is dropped whole, and the next one arrives",
        "virtio 1.4, 5.1.9.4",
        |bench| {
            bench.needs_return()?;
            let mut rig = bench.running(&Shape::new(Split))?;
            rig.make_room(0, 8, 512)?;
            rig.send(0, &frame(0, 1514))?;
            rig.wait_taken(0, 1)?;
            std::thread::sleep(QUIET);
            if let Some((_, frame)) = rig.received(0)?.pop() {
                return failed(format!("{} bytes of a frame of 1514 arrived", frame.len()));
            }
            rig.send(0, &frame(1, 60))?;
            let next = rig.eventually(|rig| Ok(rig.received(0)?.pop()))?;
            holds(
                next.is_some(),
                if next.is_some() {
                    "the next one arrived"
                } else {
                    "the next one did not arrive"
                },
            )
        },
    ),
    Check::must(
        "calls-when-asked-split",
        "who asks to be called for used buffers is called",
        "virtio 1.4, 2.7.7.2",
        |bench| calls_when_asked(bench, &Shape::new(Split)),
    ),
    Check::must(
        "calls-when-asked-packed",
        "the same on packed rings",
        "virtio 1.4, 2.8.14",
        |bench| calls_when_asked(bench, &Shape::new(Packed)),
    ),
    Check::must(
        "calls-at-event-split",
        "with EVENT_IDX, who is called is who said at which buffer",
        "virtio 1.4, 2.7.7.2",
        |bench| calls_when_asked(bench, &Shape::new(Split).with(Features::EVENT_IDX)),
    ),
    Check::must(
        "calls-at-event-packed",
        "the same on packed rings",
        "virtio 1.4, 2.8.14",
        |bench| calls_when_asked(bench, &Shape::new(Packed).with(Features::EVENT_IDX)),
    ),
    Check::must(
        "quiet-when-asked-split",
        "who asks not to be called is not called",
        "virtio 1.4, 2.7.7.2",
        |bench| quiet_when_asked(bench, &Shape::new(Split)),
    )
    .should(),
    Check::must(
        "quiet-when-asked-packed",
        "the same on packed rings",
        "virtio 1.4, 2.8.14",
        |bench| quiet_when_asked(bench, &Shape::new(Packed)),
    )
    .should(),
    Check::must(
        "quiet-before-event-split",
        "with EVENT_IDX, nobody is called before the buffer that was said",
        "virtio 1.4, 2.7.7.2",
        |bench| quiet_when_asked(bench, &Shape::new(Split).with(Features::EVENT_IDX)),
    )
    .should(),
    Check::must(
        "asks-for-kicks",
        "a device that does not look at its ring asks to be kicked: a frame sent after a rest is taken",
        "virtio 1.4, 2.7.10",
        |bench| {
            for shape in [
                Shape::new(Split),
                Shape::new(Split).with(Features::EVENT_IDX),
            ] {
                let mut rig = match bench.running(&shape) {
                    Err(Stop::Skipped(_)) => continue,
                    rig => rig?,
                };
                for number in 0..3 {
                    std::thread::sleep(QUIET);
                    rig.send(0, &frame(number, 60))?;
                    rig.wait_taken(0, 1)?;
                }
            }
            Ok("3 times".to_owned())
        },
    ),
];

/// A frame to everybody, of the local experimental type, that says which one it is.
pub(super) fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend([0x02, 0, 0, 0, 0x0c, 0x01, 0x88, 0xb5]);
    bytes.extend(number.to_be_bytes());
    let filler = (0_u32..).map(|at| at.wrapping_mul(31).wrapping_add(number).to_le_bytes()[0]);
    let missing = len.saturating_sub(bytes.len());
    bytes.extend(filler.take(missing));
    bytes
}

/// What of a frame no echo changes: everything behind the addresses.
fn body(frame: &[u8]) -> &[u8] {
    frame.get(12..).unwrap_or_default()
}

/// Whether a frame comes back to who sent it.
pub(super) fn comes_back(bench: &Bench) -> Result<bool, Stop> {
    let mut rig = bench.running(&Shape::new(Split))?;
    rig.make_room(0, 16, 2048)?;
    let sent = frame(0xffff, 60);
    rig.send(0, &sent)?;
    let came = rig.eventually(|rig| {
        let mut frames = rig.received(0)?.into_iter();
        Ok(frames.find(|(_, found)| body(found) == body(&sent)))
    })?;
    Ok(came.is_some())
}

/// Sends three laps of frames, framed in turn as told.
fn takes(bench: &Bench, shape: &Shape, framings: &[&[usize]]) -> Verdict {
    let mut rig = bench.running(shape)?;
    let size = u32::from(shape.size);
    let longest = framings
        .iter()
        .map(|cuts| cuts.len() + 1)
        .max()
        .unwrap_or(1);
    let at_once = (usize::from(shape.size) / longest).clamp(1, 32);
    let rounds = (3 * usize::from(shape.size).min(100)).div_ceil(at_once);
    let (mut number, mut cuts) = (0, framings.iter().cycle());
    for _ in 0..rounds {
        for _ in 0..at_once {
            let len = 60 + usize::try_from(number * 7 % 200).unwrap_or_default();
            rig.send_cut(
                0,
                &frame(number, len),
                cuts.next().copied().unwrap_or_default(),
            )?;
            number += 1;
        }
        rig.wait_taken(0, at_once)?;
    }
    Ok(format!("{number} frames on rings of {size}"))
}

/// Sends frames of many lengths and expects each to come back, whole and once.
fn round_trip(bench: &Bench, shape: &Shape, buffer: usize) -> Verdict {
    bench.needs_return()?;
    let mut rig = bench.running(shape)?;
    let room = usize::from(shape.size);
    rig.make_room(0, room, buffer)?;
    let mut number = 0;
    for round in 0..8 {
        let lens = [60, 64, 65, 128, 192, 193, 590, 1514];
        let sent: Vec<_> = lens
            .map(|len| {
                number += 1;
                frame(number, len)
            })
            .into();
        for one in &sent {
            rig.send(0, one)?;
        }
        let mut missing: Vec<&[u8]> = sent.iter().map(|one| body(one)).collect();
        let (mut taken, mut strange) = (0, None);
        let all = rig.eventually(|rig| {
            taken += rig.taken(0)?;
            let came = rig.received(0)?;
            for (_, found) in &came {
                match missing.iter().position(|one| *one == body(found)) {
                    Some(at) => drop(missing.swap_remove(at)),
                    // Somebody else's frames are no matter; ours that are changed are.
                    None if body(found).starts_with(&[0x88, 0xb5]) => strange = Some(found.len()),
                    None => {}
                }
            }
            let used: usize = came
                .iter()
                .map(|(_, found)| (found.len() + HEADER).div_ceil(buffer))
                .sum();
            rig.make_room(0, used, buffer)?;
            Ok((missing.is_empty() && taken == sent.len()).then_some(()))
        })?;
        if let Some(len) = strange {
            return failed(format!(
                "round {round}: a frame of {len} bytes arrived that was not sent like that"
            ));
        }
        if all.is_none() {
            return failed(format!(
                "round {round}: {} of {} frames did not arrive, {taken} were taken",
                missing.len(),
                sent.len()
            ));
        }
    }
    Ok(format!("{number} frames of 60 to 1514 bytes"))
}

/// A frame whose buffer begins in one region and ends in the next.
fn across_regions(bench: &Bench) -> Verdict {
    let (start, size) = (1 << 32, 1 << 20);
    let layout = [0, size].map(|at| RegionLayout {
        guest: GuestAddr(start + at),
        size,
        offset: 0,
    });
    let shape = Shape {
        layout: Some(layout.to_vec()),
        ..Shape::new(Split)
    };
    let mut rig = bench.running(&shape)?;
    let sent = frame(1, 200);
    // The ring's first slot, which is taken first, is at the border now.
    rig.rings[1].slots = GuestAddr(start + size - 40);
    rig.make_room(0, 8, 2048)?;
    rig.send(0, &sent)?;
    rig.wait_taken(0, 1)?;
    if bench.needs_return().is_err() {
        return Ok("it was taken".to_owned());
    }
    let came = rig.eventually(|rig| Ok(rig.received(0)?.pop()))?;
    match came {
        Some((_, found)) => holds(
            body(&found) == body(&sent),
            "it came back, compared byte by byte",
        ),
        None => failed("it was taken, and did not come back"),
    }
}

/// A chain whose one descriptor points at a table of three.
fn indirect(bench: &Bench, format: RingFormat) -> Verdict {
    let mut rig = bench.running(&Shape::new(format).with(Features::INDIRECT_DESC))?;
    let table = rig.rings[1].slots.0 + 2048 * 8;
    let sent = frame(5, 60);
    let data = table + 256;
    write(
        rig.memory.memory(),
        data,
        &[&[0; HEADER], sent.as_slice()].concat(),
    );
    let pieces = [(0_u64, 12_u32), (12, 20), (32, 40)];
    let mut bytes = Vec::new();
    for (i, (at, len)) in (1_u16..).zip(pieces) {
        let more = i < 3;
        bytes.extend((data + at).to_le_bytes());
        bytes.extend(len.to_le_bytes());
        // In a packed ring's table the entries follow each other, and flags and ids mean nothing.
        let (flags, next) = if format == Split && more {
            (1_u16, i)
        } else {
            (0, 0)
        };
        let words = if format == Split {
            [flags, next]
        } else {
            [0, 0]
        };
        bytes.extend(words.map(u16::to_le_bytes).concat());
    }
    write(rig.memory.memory(), table, &bytes);
    super::hostile::Raw::new(&rig, 1)?.offer_one(table, 48, super::hostile::INDIRECT);
    drop(rig.rings[1].kick.signal());
    let raw = super::hostile::Raw::new(&rig, 1)?;
    let used = rig.eventually(|_| Ok(raw.is_used().then_some(())))?;
    holds(
        used.is_some(),
        if used.is_some() { "taken" } else { "not taken" },
    )
}

fn calls_when_asked(bench: &Bench, shape: &Shape) -> Verdict {
    let mut rig = bench.running(shape)?;
    for number in 0..3 {
        rig.rings[1].queue.arm();
        rig.send(0, &frame(number, 60))?;
        let called = rig.eventually(|rig| Ok(rig.rings[1].call.drain().then_some(())))?;
        if called.is_none() {
            let taken = rig.taken(0)?;
            return failed(format!(
                "frame {number}: nobody was called, {taken} were taken"
            ));
        }
        rig.wait_taken(0, 1)?;
    }
    Ok("3 of 3 times".to_owned())
}

fn quiet_when_asked(bench: &Bench, shape: &Shape) -> Verdict {
    let mut rig = bench.running(shape)?;
    // The first one may call: the wish not to be called is not older than the ring.
    rig.rings[1].queue.arm();
    rig.send(0, &frame(0, 60))?;
    rig.wait_taken(0, 1)?;
    rig.rings[1].queue.disarm();
    std::thread::sleep(QUIET);
    rig.rings[1].call.drain();
    for number in 1..9 {
        rig.send(0, &frame(number, 60))?;
        rig.wait_taken(0, 1)?;
    }
    std::thread::sleep(QUIET);
    let called = rig.rings[1].call.drain();
    holds(
        !called,
        if called {
            "called in 8 frames"
        } else {
            "not called in 8 frames"
        },
    )
}
