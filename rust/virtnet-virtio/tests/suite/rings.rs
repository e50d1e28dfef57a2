//! Device against driver: every chain arrives as it was sent, whoever plays which side, in whatever order they move.

use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use virtnet_virtio::{Access, Chains, DeviceQueue, RingFormat};

use crate::support::driver::Desc;
use crate::support::world::{Pair, Step, World};
use crate::support::{Ram, Setup};

const PAIRS: [Pair; 5] = [
    Pair::Ours,
    Pair::NaiveDriver { indirect: false },
    Pair::NaiveDriver { indirect: true },
    Pair::NaiveDevice,
    Pair::TheirDevice,
];
const BOTH: [Access; 2] = [Access::Read, Access::Write];

/// Ring positions a naive driver may start at: fresh, in the middle of a lap, and shortly before the counters wrap.
fn starts(setup: Setup, pair: Pair) -> Vec<u64> {
    let size = u64::from(setup.size);
    match pair {
        Pair::NaiveDriver { .. } => vec![0, size - 1, size + size / 2, 65_530],
        _ => vec![0],
    }
}

/// Every pairing of drivers and devices over every kind of ring of `size`.
fn worlds(size: u16, mut each: impl FnMut(Setup, Pair, Access)) {
    for setup in Setup::all(size) {
        for pair in PAIRS.into_iter().filter(|pair| pair.can_be(&setup)) {
            for start in starts(setup, pair) {
                for access in BOTH {
                    each(Setup { start, ..setup }, pair, access);
                }
            }
        }
    }
}

fn random_schedules(size: u16, cases: u32, steps: usize) {
    worlds(size, |setup, pair, access| {
        let config = ProptestConfig {
            cases,
            max_shrink_iters: 10_000,
            rng_seed: RngSeed::Fixed(0x7269_6e67),
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        let schedule = prop::collection::vec(Step::any(), 1..steps);
        let outcome = TestRunner::new(config).run(&schedule, |schedule| {
            let mut world = World::new(setup, pair, access);
            for step in schedule {
                world.step(step);
            }
            world.finish();
            Ok(())
        });
        assert!(
            outcome.is_ok(),
            "{setup:?} {pair:?} {access:?}: {}",
            outcome.unwrap_err()
        );
    });
}

macro_rules! schedules {
    ($($name:ident: $size:literal, $cases:literal, $steps:literal;)*) => {
        $(#[test]
        fn $name() {
            random_schedules($size, $cases, $steps);
        })*
    };
}

schedules! {
    every_chain_arrives_in_a_ring_of_1: 1, 12, 300;
    every_chain_arrives_in_a_ring_of_2: 2, 12, 300;
    every_chain_arrives_in_a_ring_of_3: 3, 12, 300;
    every_chain_arrives_in_a_ring_of_8: 8, 16, 300;
    every_chain_arrives_in_a_ring_of_255: 255, 6, 300;
    every_chain_arrives_in_a_ring_of_256: 256, 6, 300;
    every_chain_arrives_in_a_ring_of_1024: 1024, 4, 300;
    every_chain_arrives_in_a_ring_of_32768: 32_768, 2, 300;
}

/// Runs a world so that chains of 1 to `buffers` buffers go round, some of them still on their way at any moment.
fn go_round(world: &mut World, buffers: u8, chains: u64) {
    while world.finished < chains {
        for step in [
            Step::Add { chains: 7, buffers },
            Step::PublishAvailable,
            Step::Take(5),
            Step::Add { chains: 3, buffers },
            Step::Untake(1),
            Step::Give(3),
            Step::PublishAvailable,
            Step::PublishUsed,
            Step::Reap(4),
            Step::Take(64),
            Step::GiveBatch(255),
            Step::Give(2),
            Step::PublishUsed,
            Step::Reap(64),
        ] {
            world.step(step);
        }
    }
    world.finish();
}

/// The split indexes wrap after 65,536 chains, the packed counters with every lap.
#[test]
fn counters_wrap_and_nothing_is_lost() {
    for size in [1, 2, 3, 4] {
        for setup in Setup::all(size) {
            let once_round = if setup.is_packed() || size < 4 {
                3_000
            } else {
                66_000
            };
            let mut world = World::new(setup, Pair::Ours, Access::Write);
            go_round(&mut world, 2, once_round);
            let mut world = World::new(setup, Pair::NaiveDevice, Access::Write);
            go_round(&mut world, 2, 3_000);
        }
    }
}

/// Lists, tables and single descriptors in any mixture, in rings whose end falls in the middle of them.
#[test]
fn ta64_lists_that_wrap_in_the_middle_are_lists() {
    for size in [3, 5, 7, 255] {
        for setup in Setup::all(size) {
            for pair in [
                Pair::Ours,
                Pair::NaiveDriver { indirect: true },
                Pair::NaiveDevice,
            ] {
                let mut world = World::new(setup, pair, Access::Read);
                go_round(&mut world, 5, 4_000);
            }
        }
    }
}

#[test]
fn the_largest_ring_goes_round() {
    for setup in Setup::all(32_768) {
        let mut world = World::new(setup, Pair::Ours, Access::Read);
        for _ in 0..3 {
            // Full, then empty: the widest distance that the counters can have.
            while world.free() > 0 {
                world.step(Step::Add {
                    chains: 255,
                    buffers: 1,
                });
            }
            world.finish();
            world.step(Step::Restart);
        }
        assert_eq!(world.finished, 3 * 32_768);
    }
}

/// Whatever the position of the ring, and however much is on its way in each direction.
#[test]
fn a_device_goes_on_from_its_base_wherever_it_is_stopped() {
    for size in [1_u16, 2, 3, 4, 5, 8] {
        for setup in Setup::all(size) {
            let laps = 4 * u64::from(size);
            for start in (0..laps).chain(65_536 - laps..65_536 + laps) {
                for (waiting, taken) in [(0, 0), (1, 0), (1, 1), (size, 0), (size, 1), (size, size)]
                {
                    let setup = Setup { start, ..setup };
                    let pair = Pair::NaiveDriver { indirect: false };
                    let mut world = World::new(setup, pair, Access::Read);
                    world.step(Step::Add {
                        chains: waiting as u8,
                        buffers: 1,
                    });
                    world.step(Step::PublishAvailable);
                    world.step(Step::Take(taken as u8));
                    world.step(Step::Restart);
                    world.step(Step::ArmDriver);
                    world.finish();
                    world.step(Step::Restart);
                    go_round(&mut world, 1, u64::from(waiting) + 3 * u64::from(size));
                }
            }
        }
    }
}

/// A device that was killed could not be asked where it was: the ring itself tells, whatever the front-end makes of it.
#[test]
fn a_split_ring_goes_on_where_its_used_index_stands_when_the_base_is_out_of_date() {
    for (used, base) in [(300, 0), (65_500, 0), (7, 9), (9, 7)] {
        let setup = Setup {
            start: base,
            ..Setup::new(RingFormat::Split, 256)
        };
        let (memory, _file) = setup.memory(0x1000);
        let ram = Ram(memory);
        ram.set_u16(setup.device_area() + 2, used);
        ram.set_u16(setup.driver_area() + 2, used.wrapping_add(3));
        for slot in 0..3 {
            let slot = used.wrapping_add(slot) % 256;
            ram.set_u16(setup.driver_area() + 4 + 2 * u64::from(slot), slot);
            Desc::new(setup.data(), 64, 0, 0).write(&ram, setup.desc(), u64::from(slot), false);
        }
        let mut device = DeviceQueue::new(&setup.config(), &ram.0).unwrap();
        let mut chains = Chains::new();
        assert_eq!(device.take(&ram.0, Access::Read, 64, &mut chains), Ok(3));
        device.give_all(&chains);
        device.publish();
        assert_eq!(ram.u16(setup.device_area() + 2), used.wrapping_add(3));
        assert_eq!(device.base(), u32::from(used.wrapping_add(3)));
    }
}

/// One chain at a time through every position of several laps: each side asks to be told, or does not, at each of them.
#[test]
fn a_side_that_sleeps_is_woken_at_every_position() {
    for size in [1, 2, 3, 8] {
        for setup in Setup::all(size) {
            for pair in PAIRS.into_iter().filter(|pair| pair.can_be(&setup)) {
                let mut world = World::new(setup, pair, Access::Read);
                for round in 0..16 * u64::from(size) {
                    let sleeps = [
                        (Step::ArmDevice, Step::DisarmDevice),
                        (Step::ArmDriver, Step::DisarmDriver),
                    ];
                    for (k, (arm, disarm)) in sleeps.into_iter().enumerate() {
                        world.step(if round >> k & 1 == 0 { arm } else { disarm });
                    }
                    for step in [
                        Step::Add {
                            chains: 1 + (round % 3) as u8,
                            buffers: 1,
                        },
                        Step::PublishAvailable,
                        Step::PublishAvailable,
                        Step::Take(64),
                        Step::Give(64),
                        Step::PublishUsed,
                        Step::PublishUsed,
                        Step::Reap(64),
                    ] {
                        world.step(step);
                    }
                }
                world.finish();
            }
        }
    }
}
