//! Checks of messages: what is offered, what is answered, and what is refused.

use std::os::fd::AsFd;

use virtnet_sys::EventFd;
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{MAX_PAYLOAD_LEN, Request, RequestKind};
use virtnet_vhost::payload::{MemoryRegion, MemoryTable, VringAddresses, VringState};
use virtnet_virtio::{Features, RingFormat};

use super::rig::Shape;
use super::session::{Answer, NEED_REPLY, Session, VERSION};
use super::{Bench, Check, Stop, failed, holds, skipped};

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "offers-version-1",
        "a device offers VERSION_1",
        "virtio 1.4, 6.1",
        |bench| {
            let offered = bench.session()?.offered;
            holds(offered.contains(Features::VERSION_1), names(offered))
        },
    ),
    Check::must(
        "offers-what-features-need",
        "no feature is offered without those it needs",
        "virtio 1.4, 5.1.3.1",
        |bench| {
            let offered = bench.session()?.offered;
            // What needs a controlq is not looked at: over vhost-user that is mostly the front-end's.
            let alone = offered - offered.with_needs();
            holds(alone.is_empty(), if alone.is_empty() { "all are complete".to_owned() } else { names(alone) })
        },
    ),
    Check::must(
        "answer-form",
        "an answer has the request's number, the flags version 1 and reply and no others, and its payload's size",
        "vhost-user, Header",
        |bench| {
            let session = bench.connect()?;
            session.send_raw(RequestKind::GetFeatures.code(), VERSION, &[])?;
            match session.receive("GET_FEATURES")? {
                Some((header, payload)) => holds(
                    (header.request, header.flags, payload.len()) == (1, 5, 8),
                    format!("request {}, flags {:#x}, {} bytes", header.request, header.flags, payload.len()),
                ),
                None => failed("the connection was closed"),
            }
        },
    ),
    Check::must(
        "features-before-owner",
        "features are told before SET_OWNER, and are the same after it",
        "vhost-user, Communication; QEMU asks in this order",
        |bench| {
            let session = bench.connect()?;
            let before = session.number(&Request::GetFeatures)?;
            session.tell(&Request::SetOwner, &[])?;
            let after = session.number(&Request::GetFeatures)?;
            holds(before == after, format!("{before:#x} and {after:#x}"))
        },
    ),
    Check::must(
        "protocol-features-first",
        "protocol features are negotiated before SET_FEATURES if bit 30 is offered",
        "vhost-user, Protocol features",
        |bench| {
            let session = protocol(bench)?;
            let offered = session.number(&Request::GetProtocolFeatures)?;
            session.tell(&Request::SetProtocolFeatures(offered & ProtocolFeatures::MQ.bits()), &[])?;
            session.number(&Request::GetFeatures)?;
            Ok(ProtocolFeatures::from_bits_retain(offered).names().join(" "))
        },
    ),
    Check::must(
        "features-after-reconnect",
        "who connects again is offered no less than before",
        "vhost-user, Communication (reconnection)",
        |bench| {
            let first = bench.session()?.offered;
            let again = bench.session()?.offered;
            holds(again.contains(first), format!("{:#x} and then {:#x}", first.bits(), again.bits()))
        },
    ),
    Check::must(
        "acknowledges",
        "with REPLY_ACK, a request without an answer of its own that sets need_reply is answered with 0",
        "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
        |bench| {
            let session = bench.acknowledged_session()?;
            let features = (session.offered & (Features::VERSION_1 | Features::PROTOCOL_FEATURES)).bits();
            let size = VringState { index: 0, num: 64 };
            for request in [
                Request::SetOwner,
                Request::SetFeatures(features),
                Request::SetVringNum(size),
                Request::SetVringBase(VringState { index: 0, num: 0 }),
            ] {
                session.insist(&request, &[])?;
            }
            Ok("SET_OWNER, SET_FEATURES, SET_VRING_NUM, SET_VRING_BASE".to_owned())
        },
    ),
    Check::must(
        "answers-once",
        "a request with an answer of its own is answered once, also when it sets need_reply",
        "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
        |bench| {
            let session = bench.acknowledged_session()?;
            session.send_raw(RequestKind::GetFeatures.code(), VERSION | NEED_REPLY, &[])?;
            session.answer_to(RequestKind::GetFeatures)?;
            session.number(&Request::GetProtocolFeatures)?;
            holds(!session.says_something(super::rig::QUIET), "one answer to GET_FEATURES")
        },
    ),
    Check::must(
        "silent-unless-asked",
        "a request that does not ask for an acknowledgement gets none",
        "vhost-user, Communication",
        |bench| {
            let session = bench.acknowledged_session()?;
            session.tell(&Request::SetOwner, &[])?;
            session.tell(&Request::SetVringNum(VringState { index: 0, num: 64 }), &[])?;
            session.number(&Request::GetFeatures)?;
            Ok("nothing came between".to_owned())
        },
    ),
    Check::must(
        "refuses-unknown-request",
        "an unknown request that sets need_reply is answered with another number than 0, or ends the connection",
        "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
        |bench| {
            let session = bench.acknowledged_session()?;
            session.send_raw(200, VERSION | NEED_REPLY, &[])?;
            match session.acknowledgement(200, "request 200")? {
                Answer::Done => failed("answered with 0"),
                answer => Ok(answer.to_string()),
            }
        },
    )
    .hostile(),
    Check::must(
        "refuses-unoffered-feature",
        "a feature that was not offered is refused",
        "virtio 1.4, 2.2.2",
        |bench| {
            let session = bench.acknowledged_session()?;
            let unoffered = (0..64).map(|bit| 1u64 << bit).rev();
            let mut unoffered = unoffered.filter(|bit| session.offered.bits() & bit == 0);
            let Some(bit) = unoffered.next() else {
                return skipped("all 64 are offered");
            };
            session.refuses(&Request::SetFeatures(Features::VERSION_1.bits() | bit), &[])
        },
    )
    .hostile(),
    Check::must(
        "refuses-ring-beyond-last",
        "a ring that does not exist is refused",
        "vhost-user, VHOST_USER_PROTOCOL_F_REPLY_ACK",
        |bench| {
            let session = bench.acknowledged_session()?;
            session.refuses(&Request::SetVringNum(VringState { index: 0xffff, num: 64 }), &[])
        },
    )
    .hostile(),
    Check::must(
        "refuses-size",
        "a split ring's size is a power of two up to 32768; another one is refused",
        "virtio 1.4, 2.7",
        |bench| {
            let mut found = Vec::new();
            for num in [3, 0x1_0000] {
                let session = bench.acknowledged_session()?;
                let features = session.offered & (Features::VERSION_1 | Features::PROTOCOL_FEATURES);
                session.insist(&Request::SetFeatures(features.bits()), &[])?;
                let answer = session.refuses(&Request::SetVringNum(VringState { index: 0, num }), &[]);
                match answer {
                    Ok(how) => found.push(format!("{num}: {how}")),
                    Err(Stop::Failed(how)) => return failed(format!("{num}: {how}")),
                    Err(skipped) => return Err(skipped),
                }
            }
            Ok(found.join("; "))
        },
    )
    .hostile(),
    Check::must(
        "refuses-version",
        "a message of another version is not carried out",
        "vhost-user, Header",
        |bench| {
            let session = bench.connect()?;
            session.send_raw(RequestKind::GetFeatures.code(), 2, &[])?;
            match session.receive("GET_FEATURES of version 2") {
                Ok(None) => Ok("the connection was closed".to_owned()),
                Ok(Some(_)) => failed("it was answered"),
                Err(_) => Ok("it was not answered".to_owned()),
            }
        },
    )
    .should()
    .hostile(),
    Check::must(
        "refuses-size-of-payload",
        "a payload that is too short or too long is refused, or ends the connection",
        "vhost-user, Message specification",
        |bench| {
            let mut found = Vec::new();
            let longest = u32::try_from(MAX_PAYLOAD_LEN).unwrap_or(u32::MAX);
            for (payload, what) in [(4, "4 bytes for 8"), (24, "24 bytes for 8")] {
                let session = bench.acknowledged_session()?;
                let code = RequestKind::SetVringNum.code();
                session.send_raw(code, VERSION | NEED_REPLY, &vec![0; payload])?;
                match session.acknowledgement(code, "SET_VRING_NUM")? {
                    Answer::Done => return failed(format!("{what}: answered with 0")),
                    answer => found.push(format!("{what}: {answer}")),
                }
            }
            let session = bench.connect()?;
            let header = [1, VERSION, 256 * longest].map(u32::to_ne_bytes).concat();
            session.send_bytes(&header, &[])?;
            if !session.is_ended() {
                return failed(format!("a header that announces {} bytes: the connection stays", 256 * longest));
            }
            Ok(found.join("; "))
        },
    )
    .hostile(),
    Check::must(
        "refuses-descriptor-count",
        "a memory table with more or fewer files than regions is refused",
        "vhost-user, Front-end message types (SET_MEM_TABLE)",
        |bench| {
            let shape = Shape::new(RingFormat::Split);
            let mut found = Vec::new();
            for files in [0, 2] {
                bench.acknowledged_session()?;
                let rig = bench.rig(&shape)?;
                rig.tell_features()?;
                let fd = rig.memory.regions()[0].as_fd();
                match rig.session.refuses(&rig.memory_table(), &vec![fd; files]) {
                    Ok(how) => found.push(format!("{files} files: {how}")),
                    Err(Stop::Failed(how)) => return failed(format!("{files} files for one region: {how}")),
                    Err(skipped) => return Err(skipped),
                }
            }
            Ok(found.join("; "))
        },
    )
    .hostile(),
    Check::must(
        "refuses-table-too-long",
        "a memory table says at most 8 regions; more are refused",
        "vhost-user, Memory regions description",
        |bench| {
            let session = bench.acknowledged_session()?;
            let regions = (0..9).map(|i| MemoryRegion {
                guest_addr: i << 20,
                size: 4096,
                user_addr: i << 20,
                mmap_offset: 0,
            });
            // Without files: no back-end gets to the point of mapping one.
            session.refuses(&Request::SetMemTable(MemoryTable(regions.collect())), &[])
        },
    )
    .hostile(),
    Check::must(
        "refuses-wrapping-region",
        "a region whose end passes the last address is refused",
        "vhost-user, Memory regions description",
        |bench| {
            bench.acknowledged_session()?;
            let rig = bench.rig(&Shape::new(RingFormat::Split))?;
            let region = MemoryRegion {
                mmap_offset: u64::MAX - 4095,
                ..rig.regions()[0]
            };
            let fd = rig.memory.regions()[0].as_fd();
            rig.session.refuses(&Request::SetMemTable(MemoryTable(vec![region])), &[fd])
        },
    )
    .hostile(),
    Check::must(
        "kick-needs-what-it-says",
        "SET_VRING_KICK without bit 8 comes with a descriptor; without one it is refused",
        "vhost-user, Front-end message types (SET_VRING_KICK)",
        |bench| {
            let session = bench.acknowledged_session()?;
            session.refuses(&Request::SetVringKick(super::rig::word(0, true)), &[])
        },
    )
    .hostile(),
    Check::must(
        "rings-outside-memory",
        "a ring whose areas lie in no region is refused, or never runs",
        "vhost-user, Memory access",
        |bench| {
            bench.acknowledged_session()?;
            let rig = bench.rig(&Shape::new(RingFormat::Split))?;
            rig.tell_features()?;
            rig.tell_memory()?;
            let num = VringState { index: 0, num: 64 };
            rig.session.insist(&Request::SetVringNum(num), &[])?;
            let addresses = VringAddresses { index: 0, desc: 0x1000, used: 0x2000, avail: 0x3000, ..Default::default() };
            match rig.session.acknowledged(&Request::SetVringAddr(addresses), &[])? {
                Answer::Done => {}
                answer => return Ok(answer.to_string()),
            }
            let event = EventFd::new().map_err(Stop::host)?;
            let word = super::rig::word(0, true);
            let answer = rig.session.acknowledged(&Request::SetVringKick(word), &[event.as_fd()])?;
            if answer != Answer::Ended {
                rig.session.number(&Request::GetFeatures)?;
            }
            Ok(format!("SET_VRING_ADDR was answered with 0, SET_VRING_KICK: {answer}"))
        },
    )
    .hostile(),
    Check::must(
        "half-a-message",
        "who leaves in the middle of a message costs nobody anything",
        "vhost-user, Communication",
        |bench| {
            let session = bench.connect()?;
            session.send_bytes(&[1, 0, 0, 0, 1], &[])?;
            drop(session);
            bench.greets()?;
            Ok("the next one is served".to_owned())
        },
    )
    .hostile(),
    Check::must(
        "queue-num",
        "GET_QUEUE_NUM tells how many queues there are, at least one",
        "vhost-user, Multiple queue support",
        |bench| {
            let session = bench.session_with(ProtocolFeatures::MQ)?;
            let n = session.number(&Request::GetQueueNum)?;
            holds((1..=0x8000).contains(&n), n.to_string())
        },
    ),
    Check::must(
        "gives-descriptors-back",
        "a session that ends leaves no descriptor behind",
        "vhost-user, Communication",
        |bench| {
            let Some(pid) = bench.connect()?.peer_pid() else {
                return skipped("the kernel does not tell who the back-end is");
            };
            let open = || std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
            if open().is_err() {
                return skipped(format!("what process {pid} has open is not for us to see"));
            }
            if pid == i32::try_from(std::process::id()).unwrap_or(0) {
                return skipped("the back-end is this process, which opens descriptors for this check too");
            }
            let mut counts = Vec::new();
            for _ in 0..5 {
                for _ in 0..4 {
                    drop(bench.running(&Shape::new(RingFormat::Split))?);
                }
                bench.greets()?;
                std::thread::sleep(super::rig::QUIET);
                counts.push(open().unwrap_or_default());
            }
            let grows = counts.windows(2).all(|pair| pair[1] > pair[0]);
            holds(!grows, format!("{counts:?} open after every 4 sessions"))
        },
    ),
];

fn names(features: Features) -> String {
    features.names().join(" ")
}

/// A session whose back-end has protocol features, none negotiated.
fn protocol(bench: &Bench) -> Result<Session, Stop> {
    let session = bench.connect()?;
    let offered = Features::from_bits_retain(session.number(&Request::GetFeatures)?);
    if offered.contains(Features::PROTOCOL_FEATURES) {
        Ok(session)
    } else {
        skipped("bit 30 is not offered: there are no protocol features")
    }
}
