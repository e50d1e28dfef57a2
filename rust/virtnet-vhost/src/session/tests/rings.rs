//! When rings start, run and stop, and where they go on.

use super::*;

#[test]
fn tb21_a_ring_starts_with_the_message_that_completes_it_in_any_order() {
    let parts = || {
        vec![
            Request::SetFeatures(VERSION_1 | PROTOCOL),
            Request::SetMemTable(MemoryTable(vec![MEMORY])),
            Request::SetVringNum(state(256)),
            Request::SetVringAddr(RING),
            kick(),
        ]
    };
    for order in permutations(parts().len()) {
        let mut session = session(ProtocolFeatures::BACKEND);
        let mut parts: Vec<_> = parts().into_iter().map(Some).collect();
        for (place, &part) in order.iter().enumerate() {
            let request = parts[part].take().unwrap();
            let started = actions(&mut session, request).contains(&"StartRing".to_owned());
            assert_eq!(started, place == order.len() - 1, "{order:?} at {place}");
        }
        assert!(session.ring_runs(0));
    }
}

fn permutations(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![vec![]];
    }
    let shorter = permutations(n - 1);
    let insert = |p: &Vec<usize>, at| [&p[..at], &[n - 1], &p[at..]].concat();
    shorter
        .iter()
        .flat_map(|p| (0..n).map(move |at| insert(p, at)))
        .collect()
}

#[test]
fn regions_that_come_one_by_one_start_a_ring_when_all_of_it_is_there() {
    let mut session = session(ProtocolFeatures::BACKEND);
    let [_, agree, _, _] = handshake();
    for request in agree {
        tell(&mut session, request).unwrap();
    }
    let halves = [
        MemoryRegion {
            size: 0x2000,
            ..MEMORY
        },
        MemoryRegion {
            guest_addr: 0x2000,
            user_addr: MEMORY.user_addr + 0x2000,
            size: 0x2000,
            mmap_offset: 0,
        },
    ];
    for request in [
        Request::SetVringNum(state(256)),
        Request::SetVringAddr(RING),
        kick(),
    ] {
        assert_eq!(actions(&mut session, request), [""; 0]);
    }
    assert_eq!(
        actions(&mut session, Request::AddMemReg(SingleRegion(halves[0]))),
        ["AddMemory"]
    );
    assert_eq!(
        actions(&mut session, Request::AddMemReg(SingleRegion(halves[1]))),
        ["AddMemory", "StartRing"]
    );
}

#[test]
fn u5_enabling_is_remembered_while_a_ring_is_stopped() {
    let mut session = at(2);
    assert_eq!(
        actions(&mut session, Request::SetVringEnable(state(1))),
        [""; 0]
    );
    let step = session.handle(&kick(), vec![fd()]).unwrap();
    assert!(matches!(&step.actions[..], [Action::StartRing(0, setup)] if setup.enabled));
    session.commit(step);
    assert_eq!(
        actions(&mut session, Request::SetVringEnable(state(0))),
        ["EnableRing"]
    );
    tell(&mut session, Request::GetVringBase(state(0))).unwrap();
    assert_eq!(
        session.ring_state(0),
        RingState {
            started: false,
            enabled: false
        }
    );
    assert!(matches!(
        tell(&mut session, Request::SetVringEnable(state(2))),
        Err(Refusal::Value { .. })
    ));
}

#[test]
fn u4_without_protocol_features_all_rings_are_enabled() {
    let mut session = at(2);
    tell(&mut session, Request::SetFeatures(VERSION_1)).unwrap();
    assert!(session.ring_state(0).enabled && session.ring_state(1).enabled);
    tell(&mut session, kick()).unwrap();
    tell(&mut session, Request::ResetOwner).unwrap();
    assert!(
        session.ring_state(0).enabled,
        "nobody would enable it again"
    );
}

#[test]
fn u8_a_stopped_ring_says_where_and_goes_on_there() {
    let mut session = at(3);
    let stop = || Request::GetVringBase(state(0));
    assert_eq!(
        tell(&mut session, stop()).unwrap(),
        (vec!["StopRing".to_owned()], Answer::Number(77))
    );
    assert_eq!(
        tell(&mut session, stop()).unwrap(),
        (vec![], Answer::Number(77)),
        "it is stopped already"
    );
    // The call came once, and still holds.
    let step = session.handle(&kick(), vec![fd()]).unwrap();
    assert!(
        matches!(&step.actions[..], [Action::StartRing(0, s)] if s.base == 77 && s.call.is_some())
    );
}

#[test]
fn tb25_a_ring_that_was_never_made_stops_where_it_would_begin() {
    let cases = [(VERSION_1, 0), (VERSION_1 | PACKED, 0x8000_8000)];
    for (features, base) in cases {
        let mut session = session(ProtocolFeatures::BACKEND);
        tell(&mut session, Request::SetFeatures(features | PROTOCOL)).unwrap();
        let answer = tell(&mut session, Request::GetVringBase(state(0))).unwrap();
        assert_eq!(answer, (vec![], Answer::Number(base)));
    }
}

#[test]
fn tb32_p17_bases_are_checked_and_completed() {
    let packed = VERSION_1 | PACKED | PROTOCOL;
    // Features, base told, base the ring starts with (None: refused at last when it starts).
    let cases = [
        (VERSION_1 | PROTOCOL, 0xffff, Some(0xffff)),
        (VERSION_1 | PROTOCOL, 0x1_0000, None),
        (packed, 0x8000, Some(0x8000_8000)),
        (packed, 0x8000_8000, Some(0x8000_8000)),
        (packed, 0x0005_8007, Some(0x0005_8007)),
        (packed, 0x0000_0003, Some(3)),
        (packed, 0x8000_8100, None),
        (packed, 0x8100_8000, None),
        (packed, 0x80ff_80ff, Some(0x80ff_80ff)),
    ];
    for (features, told, expected) in cases {
        let mut session = at(2);
        tell(&mut session, Request::SetFeatures(features)).unwrap();
        let base = tell(&mut session, Request::SetVringBase(state(told)));
        let found = base
            .and_then(|_| session.handle(&kick(), vec![fd()]))
            .ok()
            .map(|step| match &step.actions[..] {
                [Action::StartRing(0, setup)] => setup.base,
                other => panic!("{other:?}"),
            });
        assert_eq!(found, expected, "{told:#x} with {features:#x}");
    }
}

#[test]
fn tb26_ta58_sizes_are_checked() {
    let cases = [
        (0, false, false),
        (1, true, true),
        (3, false, true),
        (256, true, true),
        (32_768, true, true),
    ];
    let too_large = [32_769, 65_535, 65_536, 1 << 31, u32::MAX].map(|size| (size, false, false));
    for (size, split, packed) in cases.into_iter().chain(too_large) {
        for (features, expected) in [(VERSION_1, split), (VERSION_1 | PACKED, packed)] {
            let mut session = session(ProtocolFeatures::BACKEND);
            tell(&mut session, Request::SetFeatures(features | PROTOCOL)).unwrap();
            let outcome = tell(&mut session, Request::SetVringNum(state(size)));
            assert_eq!(
                outcome.is_ok(),
                expected,
                "{size} with {features:#x}: {outcome:?}"
            );
        }
    }
}

#[test]
fn tb26_a_size_told_before_the_features_is_checked_when_the_ring_starts() {
    let mut session = session(ProtocolFeatures::BACKEND);
    tell(&mut session, Request::SetVringNum(state(3))).unwrap();
    tell(&mut session, Request::SetFeatures(VERSION_1 | PROTOCOL)).unwrap();
    tell(
        &mut session,
        Request::SetMemTable(MemoryTable(vec![MEMORY])),
    )
    .unwrap();
    tell(&mut session, Request::SetVringAddr(RING)).unwrap();
    assert!(matches!(
        tell(&mut session, kick()),
        Err(Refusal::Value { .. })
    ));
    assert!(!session.ring_runs(0));
}

#[test]
fn tb29_misplaced_rings_are_refused() {
    let cases = [
        (
            VringAddresses {
                desc: RING.desc + 8,
                ..RING
            },
            "Descriptor Area",
        ),
        (
            VringAddresses {
                avail: RING.avail + 1,
                ..RING
            },
            "Driver Area",
        ),
        (
            VringAddresses {
                used: RING.used + 2,
                ..RING
            },
            "Device Area",
        ),
        (
            VringAddresses {
                desc: 0x7001_0000,
                ..RING
            },
            "Descriptor Area",
        ),
        (
            VringAddresses {
                avail: 0x6fff_fffe,
                ..RING
            },
            "Driver Area",
        ),
        (
            VringAddresses {
                used: u64::MAX - 3,
                ..RING
            },
            "Device Area",
        ),
    ];
    for (addresses, area) in cases {
        for phase in [2, 3] {
            let mut session = at(phase);
            let refusal = tell(&mut session, Request::SetVringAddr(addresses))
                .and_then(|_| tell(&mut session, kick()));
            let text = refusal.unwrap_err().to_string();
            assert!(text.contains(area), "{text}");
            assert_eq!(session.ring_runs(0), phase == 3);
        }
    }
}

#[test]
fn tb24_a_ring_that_does_not_exist_is_refused() {
    let mut session = at(1);
    for index in [2, 255, 256, 1 << 16, u32::MAX] {
        let state = VringState { index, num: 1 };
        let requests = [
            Request::SetVringNum(state),
            Request::SetVringBase(state),
            Request::GetVringBase(state),
            Request::SetVringEnable(state),
            Request::SetVringAddr(VringAddresses { index, ..RING }),
            Request::SetVringKick(VringFd {
                word: u64::from(index) & !0x100 | u64::from(index) << 32,
            }),
            Request::SetVringCall(VringFd { word: 1 << 63 }),
        ];
        for request in requests {
            let refusal = tell(&mut session, request).unwrap_err();
            assert!(
                matches!(refusal, Refusal::RingIndex { rings: 2, .. }),
                "{refusal}"
            );
        }
    }
}

#[test]
fn tb27_a_running_ring_keeps_its_size_and_base() {
    let mut session = at(3);
    for request in [
        Request::SetVringNum(state(128)),
        Request::SetVringBase(state(0)),
    ] {
        assert!(matches!(
            tell(&mut session, request),
            Err(Refusal::RingRuns { ring: 0, .. })
        ));
    }
    tell(&mut session, Request::GetVringBase(state(0))).unwrap();
    tell(&mut session, Request::SetVringNum(state(128))).unwrap();
}

#[test]
fn u12_a_running_ring_takes_new_events_and_addresses() {
    let mut session = at(3);
    let moved = VringAddresses {
        desc: RING.desc + 0x4000,
        flags: 1,
        log_guest_addr: 9,
        ..RING
    };
    assert_eq!(actions(&mut session, kick()), ["SetKick"]);
    assert_eq!(
        actions(&mut session, Request::SetVringCall(VringFd::new(0, false))),
        ["SetCall"]
    );
    assert_eq!(
        actions(&mut session, Request::SetVringErr(VringFd::new(0, true))),
        ["SetErr"]
    );
    assert_eq!(
        actions(&mut session, Request::SetVringAddr(moved)),
        ["SetAddresses"]
    );
    assert_eq!(
        session.state.rings[0].addresses.unwrap().log_guest_addr,
        Some(9)
    );
}

#[test]
fn u10_a_kick_without_a_descriptor_starts_a_ring_that_is_polled() {
    let mut session = at(2);
    let request = Request::SetVringKick(VringFd::new(0, false));
    let step = session.handle(&request, Vec::new()).unwrap();
    assert!(matches!(&step.actions[..], [Action::StartRing(0, setup)] if setup.kick.is_none()));
    session.commit(step);
    assert!(session.ring_state(0).started);
}
