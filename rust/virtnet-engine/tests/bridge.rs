//! A switch with rules for its cables: VLANs, cables that are kept apart, limits, mirrors, bonds, stations that flap.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{EVERYBODY, frame, put, station, take};
use virtnet_engine::{
    BridgeRules, CableRules, Change, FunctionDetail, Gate, NodeId, Place, StormLimits, Switch,
    SwitchCounters, SwitchOptions, SwitchOrders, VlanSet, Worker,
};
use virtnet_packet::{DropReason, MemoryPort, Offload, Picks, Port, memory_pair};

const SWITCH: NodeId = NodeId(100);
const MS: u64 = 1_000_000;

struct Lab {
    worker: Worker,
    outside: Vec<MemoryPort>,
    now: u64,
}

impl Lab {
    /// A switch with a port for each of the rules.
    fn new(aware: bool, guard: u32, rules: Vec<CableRules>) -> Self {
        let mut change = Change::new().add(SWITCH, Switch::new(SwitchOptions::default()).unwrap());
        let mut outside = Vec::new();
        for (gate, node) in (0..).zip((0..rules.len()).map(|n| NodeId(u32::try_from(n).unwrap()))) {
            let (inner, outer) = memory_pair(256);
            change = change
                .add(node, inner)
                .connect(node, Place::new(SWITCH, gate));
            outside.push(outer);
        }
        let mut worker = Worker::new();
        worker
            .apply(change.update(SWITCH, orders(aware, guard, rules)), 0)
            .unwrap();
        Self {
            worker,
            outside,
            now: MS,
        }
    }

    /// Sends frames into one port; what comes out of each.
    fn send(&mut self, from: usize, frames: &[Vec<u8>]) -> Vec<Vec<Vec<u8>>> {
        put(&mut self.outside[from], frames);
        self.worker.step(self.now);
        let out = self.outside.iter_mut().map(take).collect();
        let balance = self.worker.snapshot(0).balance;
        assert!(balance.is_exact(), "{balance:?}");
        out
    }

    /// Who gets a frame that is sent into a port.
    fn reached(&mut self, from: usize, frame: Vec<u8>) -> Vec<usize> {
        let out = self.send(from, &[frame]);
        (0..out.len()).filter(|&n| !out[n].is_empty()).collect()
    }

    fn drops(&self) -> Vec<(DropReason, u64)> {
        let snapshot = self.worker.snapshot(0);
        snapshot.functions[0].counters.drops.iter().collect()
    }

    fn counters(&self) -> SwitchCounters {
        match self.worker.snapshot(0).functions[0].detail {
            FunctionDetail::Switch(counters) => counters,
            _ => unreachable!(),
        }
    }
}

fn orders(aware: bool, guard: u32, rules: Vec<CableRules>) -> SwitchOrders {
    let rules = (0..).zip(rules);
    SwitchOrders {
        ageing: Duration::from_secs(300),
        rules: Some(Arc::new(BridgeRules::new(aware, guard, rules).unwrap())),
    }
}

fn access(vlan: u16) -> CableRules {
    CableRules {
        untagged: vlan,
        vlans: [vlan].into_iter().collect(),
        ..CableRules::default()
    }
}

fn trunk(vlans: &[u16], native: u16) -> CableRules {
    CableRules {
        untagged: native,
        vlans: vlans.iter().copied().collect(),
        ..CableRules::default()
    }
}

fn tagged(tci: u16, frame: &[u8]) -> Vec<u8> {
    let [c, d] = tci.to_be_bytes();
    [&frame[..12], &[0x81, 0, c, d], &frame[12..]].concat()
}

#[test]
fn a_vlan_is_a_network_of_its_own_with_a_tag_on_trunks_only() {
    let rules = vec![
        access(10),
        access(10),
        access(20),
        trunk(&[10, 20, 30], 0),
        trunk(&[1, 10], 1),
    ];
    let mut lab = Lab::new(true, 0, rules);
    // A long frame, so that its tag moves the border between head and body.
    let hello = frame(EVERYBODY, station(1), 1_500, 7);
    let out = lab.send(0, std::slice::from_ref(&hello));
    assert_eq!(out[1], std::slice::from_ref(&hello));
    assert_eq!(out[3], [tagged(10, &hello)]);
    assert_eq!(out[4], [tagged(10, &hello)]);
    assert!(out[2].is_empty());
    // The answer comes by the trunk, with a priority that is gone where the tag is.
    let answer = frame(station(1), station(2), 60, 8);
    let out = lab.send(3, &[tagged(0x600a, &answer)]);
    assert_eq!(out[0], std::slice::from_ref(&answer));
    assert!(out[1..].iter().all(Vec::is_empty));
    // The same address elsewhere is another station.
    assert_eq!(lab.reached(2, frame(station(1), station(3), 60, 1)), [3]);
    // From one trunk to the other the tag stays, priority and all.
    let across = tagged(0xe00a, &frame(station(2), station(9), 60, 2));
    assert_eq!(lab.send(4, std::slice::from_ref(&across))[3], [across]);
    // In the native VLAN with or without a tag; a tag of VLAN 0 is none.
    let native = frame(EVERYBODY, station(9), 60, 3);
    for form in [native.clone(), tagged(1, &native), tagged(0, &native)] {
        assert!(lab.reached(4, form).is_empty());
    }
    assert_eq!(lab.drops(), [(DropReason::NoCable, 3)]);
    assert!(
        lab.reached(3, frame(EVERYBODY, station(9), 60, 3))
            .is_empty()
    );
    assert!(lab.reached(0, tagged(20, &native)).is_empty());
    assert_eq!(
        lab.drops(),
        [(DropReason::NoCable, 3), (DropReason::Vlan, 2)]
    );
    assert_eq!(lab.counters().entries, 5);
}

#[test]
fn what_is_left_to_be_done_to_a_packet_moves_with_its_tag() {
    let mut lab = Lab::new(true, 0, vec![access(10), trunk(&[10], 0)]);
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start: 34,
        csum_offset: 6,
        ..Offload::default()
    };
    let mut burst = virtnet_packet::Burst::new();
    burst.push_bytes(&frame(EVERYBODY, station(1), 300, 1), offload);
    lab.outside[0].tx(&burst, &Picks::first(1));
    lab.worker.step(MS);
    burst.clear();
    lab.outside[1].rx(&mut burst);
    assert_eq!(burst.frame_len(0), 304);
    assert_eq!(burst.offload(0).csum_start, 38);
}

#[test]
fn rules_change_in_place_and_what_is_known_stays() {
    let mut lab = Lab::new(true, 0, vec![access(10), access(10), access(20)]);
    lab.send(0, &[frame(EVERYBODY, station(1), 60, 0)]);
    lab.send(1, &[frame(EVERYBODY, station(2), 60, 0)]);
    let moved = orders(true, 0, vec![access(10), access(10), access(10)]);
    lab.worker
        .apply(Change::new().update(SWITCH, moved), 0)
        .unwrap();
    assert_eq!(lab.reached(2, frame(station(1), station(3), 60, 0)), [0]);
    let plain = SwitchOrders {
        ageing: Duration::from_secs(300),
        rules: None,
    };
    lab.worker
        .apply(Change::new().update(SWITCH, plain), 0)
        .unwrap();
    assert_eq!(lab.reached(2, frame(station(1), station(3), 60, 0)), [0, 1]);
}

#[test]
fn cables_that_are_apart_reach_only_others() {
    let isolated = CableRules {
        isolated: true,
        ..CableRules::default()
    };
    let horizon = CableRules {
        horizon: 1,
        ..CableRules::default()
    };
    let rules = vec![
        isolated.clone(),
        isolated,
        horizon.clone(),
        horizon,
        CableRules::default(),
    ];
    let mut lab = Lab::new(false, 0, rules);
    assert_eq!(
        lab.reached(0, frame(EVERYBODY, station(1), 60, 0)),
        [2, 3, 4]
    );
    assert_eq!(
        lab.reached(2, frame(EVERYBODY, station(3), 60, 0)),
        [0, 1, 4]
    );
    assert_eq!(lab.reached(4, frame(station(1), station(5), 60, 0)), [0]);
    assert!(
        lab.reached(1, frame(station(1), station(2), 60, 0))
            .is_empty()
    );
    assert!(
        lab.reached(3, frame(station(3), station(4), 60, 0))
            .is_empty()
    );
    assert_eq!(lab.drops(), [(DropReason::Isolated, 2)]);
}

#[test]
fn storms_are_held_to_their_limits_each_kind_by_itself() {
    let limited = CableRules {
        limits: StormLimits {
            broadcast: Some(100),
            multicast: Some(0),
            unknown: None,
        },
        ..CableRules::default()
    };
    let mut lab = Lab::new(false, 0, vec![limited, CableRules::default()]);
    let storm = vec![frame(EVERYBODY, station(1), 60, 0); 50];
    // 100 a second, and what a tenth of a second may be late.
    assert_eq!(lab.send(0, &storm)[1].len(), 11);
    lab.now += 100 * MS;
    assert_eq!(lab.send(0, &storm)[1].len(), 10);
    let group = [1, 0, 0x5e, 0, 0, 1];
    assert!(lab.reached(0, frame(group, station(1), 60, 0)).is_empty());
    assert_eq!(lab.reached(0, frame(station(9), station(1), 60, 0)), [1]);
    assert_eq!(lab.drops(), [(DropReason::Storm, 80)]);
    assert_eq!(lab.send(1, &storm)[0].len(), 50);
}

#[test]
fn a_mirror_has_what_passes_a_cable_either_way_as_it_came_and_as_it_left() {
    let watched = CableRules {
        mirror: Some(2),
        ..access(10)
    };
    let mut lab = Lab::new(true, 0, vec![watched, trunk(&[10], 0), access(10)]);
    let hello = frame(EVERYBODY, station(1), 60, 1);
    let out = lab.send(0, std::slice::from_ref(&hello));
    assert_eq!(
        (&out[1], &out[2]),
        (&vec![tagged(10, &hello)], &vec![hello])
    );
    let answer = tagged(10, &frame(station(1), station(2), 60, 2));
    let out = lab.send(1, std::slice::from_ref(&answer));
    assert_eq!((out[0].len(), &out[2]), (1, &vec![answer]));
    // What does not pass is seen, and counted as dropped.
    let out = lab.send(0, &[tagged(99, &frame(EVERYBODY, station(1), 60, 3))]);
    assert_eq!((out[1].len(), out[2].len()), (0, 1));
    // Nobody hears whoever watches.
    assert!(
        lab.reached(2, frame(EVERYBODY, station(7), 60, 4))
            .is_empty()
    );
    assert_eq!(
        lab.drops(),
        [(DropReason::Vlan, 1), (DropReason::Isolated, 1)]
    );
}

#[test]
fn a_bond_is_one_cable_of_which_a_flow_has_one() {
    let bonded = CableRules {
        bond: 7,
        ..CableRules::default()
    };
    let rules = vec![
        CableRules::default(),
        bonded.clone(),
        bonded.clone(),
        bonded,
    ];
    let mut lab = Lab::new(false, 0, rules);
    assert_eq!(lab.reached(0, frame(EVERYBODY, station(1), 60, 0)).len(), 1);
    // What comes by one of them does not go back by another.
    assert_eq!(lab.reached(2, frame(EVERYBODY, station(2), 60, 0)), [0]);
    let (mut used, mut counts) = (VlanSet::new(), 0);
    for n in 10..40 {
        let reached = lab.reached(0, frame(station(2), station(n), 60, 0));
        assert_eq!(
            reached,
            lab.reached(0, frame(station(2), station(n), 60, 1))
        );
        assert_eq!(reached.len(), 1);
        let gate = u16::try_from(reached[0]).unwrap();
        counts += usize::from(!used.contains(gate));
        used.insert(gate);
    }
    assert_eq!(counts, 3, "thirty flows take all three cables");
    assert_eq!(lab.counters().moved, 0);
}

#[test]
fn a_station_that_flaps_is_held_where_it_is_and_reported() {
    let mut lab = Lab::new(false, 3, vec![CableRules::default(); 3]);
    let hello = || frame(EVERYBODY, station(1), 60, 0);
    for n in 0..4 {
        assert_eq!(lab.reached(n % 2, hello()).len(), 2);
    }
    let moves = lab.counters();
    assert_eq!((moves.moved, moves.flaps), (3, 0));
    assert_eq!(lab.reached(0, hello()), [1, 2]);
    let flap = lab.counters().last_flap.unwrap();
    assert_eq!((flap.mac, flap.gate, flap.vlan), (station(1), 0, 0));
    assert!(lab.reached(1, hello()).is_empty());
    assert_eq!(lab.reached(0, hello()), [1, 2]);
    assert_eq!(lab.drops(), [(DropReason::Flapping, 1)]);
    lab.now += 10_000 * MS;
    assert_eq!(lab.reached(1, hello()), [0, 2]);
}

#[test]
fn stations_that_are_given_stay_where_they_are() {
    let given = CableRules {
        stations: vec![(0, station(9))],
        ..CableRules::default()
    };
    let mut lab = Lab::new(
        false,
        0,
        vec![CableRules::default(), given, CableRules::default()],
    );
    assert_eq!(lab.reached(0, frame(station(9), station(1), 60, 0)), [1]);
    lab.reached(2, frame(EVERYBODY, station(9), 60, 0));
    assert_eq!(lab.reached(0, frame(station(9), station(1), 60, 0)), [1]);
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    let one = |rules: CableRules| BridgeRules::new(true, 0, [(0 as Gate, rules)]);
    one(access(4095)).unwrap_err();
    one(trunk(&[10], 11)).unwrap_err();
    one(trunk(&[0], 0)).unwrap_err();
    let mirror = CableRules {
        mirror: Some(4),
        ..CableRules::default()
    };
    one(mirror).unwrap_err();
}
