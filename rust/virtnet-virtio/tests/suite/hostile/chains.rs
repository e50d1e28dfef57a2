//! Chains that make no sense, in both formats: each costs itself and nothing else.

use virtnet_virtio::{Access, ChainError, DESCS_MAX};

use super::{Attack, DATA, FIRST, SECOND, THIRD, everywhere};
use crate::support::Setup;
use crate::support::driver::{Desc, INDIRECT, NEXT, WRITE};

const SIZES: [u16; 4] = [1, 2, 3, 8];

/// One bad chain between good ones, in every ring and at every place where there is room for it.
fn costs_itself(
    chain: impl Fn(&Attack) -> Vec<Desc>,
    expected: impl Fn(&Setup) -> Result<Vec<(u64, u32)>, ChainError>,
) {
    // The two formats without options.
    let largest = Setup::all(32_768).take(2);
    for setup in SIZES.into_iter().flat_map(everywhere).chain(largest) {
        for access in [Access::Read, Access::Write] {
            let mut attack = Attack::new(setup, access);
            if chain(&attack).len() > usize::from(setup.size) {
                continue;
            }
            one_among_others(&mut attack, &chain, expected(&setup));
        }
    }
}

fn one_among_others(
    attack: &mut Attack,
    chain: &impl Fn(&Attack) -> Vec<Desc>,
    expected: Result<Vec<(u64, u32)>, ChainError>,
) {
    let context = format!("{:?} {:?}", attack.setup, attack.access);
    let room = attack.size() as usize - chain(attack).len();
    let good = |attack: &Attack| (attack.good().addr, attack.good().len);
    let (mut ids, mut outcomes) = (Vec::new(), Vec::new());
    if room > 0 {
        outcomes.push(Ok(vec![good(attack)]));
        ids.push(attack.offer(&[attack.good()]));
    }
    let descs = chain(attack);
    ids.push(attack.offer(&descs));
    outcomes.push(expected);
    if room > 1 {
        outcomes.push(Ok(vec![good(attack)]));
        ids.push(attack.offer(&[attack.good()]));
    }
    let before = attack.snapshot();
    assert_eq!(attack.take(), outcomes, "{context}");
    let used: Vec<(u32, u32)> = ids.iter().map(|&id| (u32::from(id), 0)).collect();
    assert_eq!(attack.give_back(), used, "{context}");
    assert!(attack.snapshot() == before, "{context}: a byte was written");

    // The ring goes on.
    for _ in 0..3 {
        let expected = vec![Ok(vec![good(attack)])];
        let id = attack.offer(&[attack.good()]);
        assert_eq!(attack.take(), expected, "{context}");
        assert_eq!(attack.give_back(), [(u32::from(id), 0)], "{context}");
    }
    assert!(!attack.device.has_work());
}

fn is_refused(error: ChainError, chain: impl Fn(&Attack) -> Vec<Desc>) {
    costs_itself(chain, |_| Err(error));
}

/// A buffer of the right direction.
fn buffer(attack: &Attack, addr: u64, len: u32) -> Desc {
    Desc::new(addr, len, attack.right(), 0)
}

/// Where tables go: behind the good buffers.
fn table_addr(setup: &Setup) -> u64 {
    setup.data() + DATA / 2
}

#[test]
fn ta24_a_buffer_outside_every_region_is_a_chain_error() {
    for addr in [
        0,
        0x1000,
        FIRST.start - 1,
        SECOND.end,
        THIRD.end,
        1 << 47,
        u64::MAX,
    ] {
        is_refused(ChainError::Address, |a| vec![buffer(a, addr, 1)]);
        is_refused(ChainError::Address, |a| {
            vec![a.good(), buffer(a, addr, 100)]
        });
        is_refused(ChainError::Address, |a| {
            vec![buffer(a, addr, 100), a.good(), a.good()]
        });
    }
}

#[test]
fn ta25_a_buffer_that_wraps_around_is_a_chain_error() {
    for (addr, len) in [
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 9, 11),
        (u64::MAX - 0xffff, 0xffff_0000),
        (THIRD.start, 0xffff_0000),
    ] {
        is_refused(ChainError::Address, |a| vec![buffer(a, addr, len)]);
        is_refused(ChainError::Address, |a| {
            vec![a.good(), buffer(a, addr, len)]
        });
    }
}

#[test]
fn ta26_a_buffer_one_byte_over_the_end_is_a_chain_error() {
    for end in [SECOND.end, THIRD.end] {
        for len in [1, 2, 64, 0x1000] {
            is_refused(ChainError::Address, |a| {
                vec![buffer(a, end - u64::from(len) + 1, len)]
            });
            is_refused(ChainError::Address, |a| {
                vec![a.good(), buffer(a, end - u64::from(len) + 1, len)]
            });
        }
    }
}

#[test]
fn ta27_a_buffer_over_a_hole_is_a_chain_error() {
    for (start, end) in [
        (SECOND.end - 1, THIRD.start + 1),
        (SECOND.start, THIRD.end),
        (FIRST.start, THIRD.end),
        (FIRST.end - 5, THIRD.start + 5),
        (FIRST.start - 1, FIRST.start + 1),
    ] {
        is_refused(ChainError::Address, |a| {
            vec![buffer(a, start, (end - start) as u32)]
        });
    }
}

#[test]
fn ta28_a_buffer_over_two_adjacent_regions_is_one_buffer_in_two_pieces() {
    for (before, behind) in [(1, 1), (100, 28), (0x2000, 0x1000), (1, 0x1000)] {
        let pieces = vec![(FIRST.end - before, before as u32), (SECOND.start, behind)];
        costs_itself(
            |a| vec![buffer(a, FIRST.end - before, before as u32 + behind)],
            |_| Ok(pieces.clone()),
        );
    }
}

#[test]
fn ta29_a_buffer_of_no_bytes_is_tolerated_and_a_chain_of_none_is_an_error() {
    let good = |setup: &Setup| Ok(vec![(setup.data() + 4096, 10)]);
    let ten = |a: &Attack| buffer(a, a.setup.data() + 4096, 10);
    let none = |a: &Attack| buffer(a, a.setup.data(), 0);
    costs_itself(|a| vec![none(a), ten(a)], good);
    costs_itself(|a| vec![ten(a), none(a)], good);
    costs_itself(|a| vec![none(a), none(a), ten(a), none(a)], good);
    is_refused(ChainError::Empty, |a| vec![none(a)]);
    is_refused(ChainError::Empty, |a| vec![none(a), none(a), none(a)]);
    is_refused(ChainError::Empty, |a| {
        vec![a.table(table_addr(&a.setup), &[none(a)])]
    });
}

#[test]
fn ta30_the_address_of_no_bytes_is_not_looked_at() {
    for addr in [0, 1, SECOND.end, u64::MAX] {
        is_refused(ChainError::Empty, |a| vec![buffer(a, addr, 0)]);
        costs_itself(
            |a| vec![buffer(a, addr, 0), buffer(a, THIRD.start, 7)],
            |_| Ok(vec![(THIRD.start, 7)]),
        );
    }
}

#[test]
fn ta31_ta32_a_buffer_of_the_wrong_direction_is_a_chain_error() {
    let wrong = |a: &Attack| Desc {
        flags: a.right() ^ WRITE,
        ..a.good()
    };
    is_refused(ChainError::Direction, |a| vec![wrong(a)]);
    is_refused(ChainError::Direction, |a| vec![wrong(a), wrong(a)]);
    is_refused(ChainError::Direction, |a| vec![a.good(), wrong(a)]);
    is_refused(ChainError::Direction, |a| vec![wrong(a), a.good()]);
    is_refused(ChainError::Direction, |a| {
        vec![a.good(), wrong(a), a.good(), wrong(a)]
    });
    is_refused(ChainError::Direction, |a| {
        vec![a.table(table_addr(&a.setup), &[wrong(a)])]
    });
}

#[test]
fn ta33_a_table_that_was_not_negotiated_is_a_chain_error() {
    for setup in SIZES.into_iter().flat_map(everywhere) {
        for access in [Access::Read, Access::Write] {
            let features = setup.features() - virtnet_virtio::Features::INDIRECT_DESC;
            let mut attack = Attack::negotiated(setup, access, features);
            let chain = |a: &Attack| vec![a.table(table_addr(&a.setup), &[a.good()])];
            one_among_others(&mut attack, &chain, Err(ChainError::Indirect));
        }
    }
}

#[test]
fn ta35_a_table_descriptor_that_goes_on_is_a_chain_error() {
    is_refused(ChainError::Indirect, |a| {
        vec![a.table(table_addr(&a.setup), &[a.good()]), a.good()]
    });
    is_refused(ChainError::Indirect, |a| {
        let table = a.table(table_addr(&a.setup), &[a.good()]);
        vec![table, table, table]
    });
}

#[test]
fn ta36_ta60_a_table_of_no_entries_or_half_ones_is_a_chain_error() {
    for len in [0, 1, 8, 15, 17, 24, 31] {
        is_refused(ChainError::IndirectLen, |a| {
            let table = a.table(table_addr(&a.setup), &[a.good(), a.good()]);
            vec![Desc { len, ..table }]
        });
    }
}

#[test]
fn ta37_a_table_longer_than_the_ring_is_a_chain_error() {
    for more in [16, 160, 16 * 65_535, 16 * 65_536, 0xffff_fff0] {
        is_refused(ChainError::IndirectLen, |a| {
            let table = a.table(table_addr(&a.setup), &[a.good()]);
            let len = (16 * u32::from(a.setup.size)).saturating_add(more) & !15;
            vec![Desc { len, ..table }]
        });
    }
}

#[test]
fn ta38_a_table_outside_memory_is_a_chain_error_and_one_over_two_regions_is_none() {
    for addr in [
        0,
        THIRD.end,
        THIRD.end - 8,
        SECOND.end - 15,
        u64::MAX - 7,
        u64::MAX - 15,
    ] {
        is_refused(ChainError::Address, |_| {
            vec![Desc::new(addr, 16, INDIRECT, 0)]
        });
    }
    // The second entry is out.
    is_refused(ChainError::Address, |a| {
        let first = Desc {
            flags: a.right() | NEXT,
            fourth: 1,
            ..a.good()
        };
        if a.setup.size == 1 {
            return vec![Desc::new(0, 16, INDIRECT, 0)];
        }
        a.table(THIRD.end - 16, &[first]);
        vec![Desc::new(THIRD.end - 16, 32, INDIRECT, 0)]
    });
    for before in [1, 8, 12, 14, 15] {
        costs_itself(
            |a| {
                let entry = buffer(a, THIRD.start, 5);
                vec![a.table(FIRST.end - before, &[entry])]
            },
            |_| Ok(vec![(THIRD.start, 5)]),
        );
    }
}

#[test]
fn ta42_a_tables_own_direction_is_not_looked_at() {
    costs_itself(
        |a| {
            let mut table = a.table(table_addr(&a.setup), &[buffer(a, THIRD.start, 5)]);
            table.flags |= WRITE;
            vec![table]
        },
        |_| Ok(vec![(THIRD.start, 5)]),
    );
}

/// Nothing in `setup` reserves these bits for us.
#[test]
fn ta14_flags_that_mean_nothing_are_not_looked_at() {
    costs_itself(
        |a| {
            // All but NEXT, WRITE, INDIRECT, and the two bits of a packed ring's laps.
            let mut desc = buffer(a, THIRD.start, 5);
            desc.flags |= 0x7f78;
            vec![desc, desc]
        },
        |_| Ok(vec![(THIRD.start, 5), (THIRD.start, 5)]),
    );
}

/// As many descriptors as the ring has, but no more than a device cares to follow; a table likewise.
#[test]
fn ta22_ta115_the_longest_chain_is_as_long_as_the_ring_or_as_a_device_follows() {
    for setup in [1, 2, 3, 8, 1024, 2048, 32_768]
        .into_iter()
        .flat_map(Setup::all)
    {
        let longest = setup.size.min(DESCS_MAX);
        for (n, good) in [
            (longest, true),
            (longest.saturating_add(1), false),
            (setup.size, setup.size == longest),
        ] {
            if n > setup.size {
                continue;
            }
            let n = usize::from(n);
            let mut attack = Attack::new(setup, Access::Read);
            let expected = if good {
                Ok(vec![(attack.good().addr, 64); n])
            } else {
                Err(ChainError::TooLong)
            };
            let id = u32::from(attack.offer(&vec![attack.good(); n]));
            assert!(attack.take() == [expected.clone()], "{n} of {setup:?}");
            assert_eq!(attack.give_back(), [(id, 0)], "all of it comes back");

            let mut attack = Attack::new(setup, Access::Read);
            let mut entries = vec![attack.good(); n];
            if !setup.is_packed() {
                for (k, entry) in entries[..n - 1].iter_mut().enumerate() {
                    entry.flags |= NEXT;
                    entry.fourth = k as u16 + 1;
                }
            }
            if 16 * n as u64 <= DATA / 2 {
                let table = attack.table(table_addr(&setup), &entries);
                attack.offer(&[table]);
                assert!(attack.take() == [expected], "table of {n} for {setup:?}");
            }
        }
    }
}

#[test]
fn ta23_a_chain_of_more_than_four_gigabytes_is_a_chain_error() {
    use virtnet_mem::{GuestAddr, GuestMemory, Region};
    use virtnet_virtio::{Chains, DeviceQueue};

    // Untouched memory costs nothing.
    const START: u64 = 1 << 40;
    const HUGE: u64 = 0xffff_f000;
    for setup in Setup::all(8) {
        let all = Desc::new(START, HUGE as u32, WRITE, 0);
        let rest = Desc::new(START, 0x0fff, WRITE, 0);
        for (chain, expected) in [
            (vec![all, rest], Ok(u32::MAX)),
            (vec![all, rest, Desc { len: 0, ..rest }], Ok(u32::MAX)),
            (
                vec![all, rest, Desc { len: 1, ..rest }],
                Err(ChainError::TooBig),
            ),
            (vec![all, all], Err(ChainError::TooBig)),
            (vec![all; 8], Err(ChainError::TooBig)),
        ] {
            let mut attack = Attack::new(setup, Access::Write);
            let mut regions = attack.ram.0.regions().to_vec();
            regions.push(Region::anonymous(HUGE, GuestAddr(START)).unwrap());
            let memory = GuestMemory::new(regions).unwrap();
            attack.offer(&chain);
            let mut device = DeviceQueue::new(&setup.config(), &memory).unwrap();
            let mut chains = Chains::new();
            device.take(&memory, Access::Write, 1, &mut chains).unwrap();
            assert_eq!(chains.bytes(0), expected);
        }
    }
}

/// The front-end takes a region away while chains that name it wait.
#[test]
fn ta44_a_buffer_in_memory_that_is_gone_is_a_chain_error() {
    use virtnet_mem::GuestMemory;

    for setup in [3, 8].into_iter().flat_map(everywhere) {
        let mut attack = Attack::new(setup, Access::Read);
        let in_third = buffer(&attack, THIRD.start, 5);
        attack.offer(&[in_third]);
        assert_eq!(attack.take(), [Ok(vec![(THIRD.start, 5)])]);
        attack.give_back();
        let in_first = buffer(&attack, FIRST.start, 5);
        attack.offer(&[in_third]);
        attack.offer(&[in_first]);
        let regions = attack.ram.0.regions().iter();
        let kept = regions.filter(|r| r.guest().0 != THIRD.start).cloned();
        let smaller = GuestMemory::new(kept.collect()).unwrap();
        let taken = attack
            .device
            .take(&smaller, Access::Read, 64, &mut attack.chains);
        assert_eq!(taken, Ok(2));
        assert_eq!(attack.chain(0), Err(ChainError::Address));
        assert_eq!(attack.chain(1), Ok(vec![(FIRST.start, 5)]));
        assert_eq!(attack.give_back().len(), 2);
    }
}
