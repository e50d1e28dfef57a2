//! Translation against a model that looks at every byte.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use virtnet_mem::{GuestAddr, GuestMemory, Region, Segment, UserAddr};

/// Where each region starts and ends, in guest addresses.
type Layout = Vec<(u64, u64)>;

/// A small guest: regions of 1 to 40 bytes with holes of 0 (adjacent) to 20 between them.
fn layouts() -> impl Strategy<Value = Layout> {
    prop::collection::vec((0_u64..20, any::<bool>(), 1_u64..40), 0..12).prop_map(|steps| {
        let mut at = 100;
        steps
            .into_iter()
            .map(|(hole, adjacent, size)| {
                let start = if adjacent { at } else { at + hole };
                at = start + size;
                (start, at)
            })
            .collect()
    })
}

/// The memory of `layout`, made in an order of its own, with user addresses that run the other way.
fn memory_of(layout: &Layout, rotate: usize) -> GuestMemory {
    let mut regions: Vec<Region> = layout
        .iter()
        .map(|&(start, end)| Region::anonymous(end - start, GuestAddr(start)).unwrap())
        .collect();
    if !regions.is_empty() {
        regions.rotate_left(rotate % layout.len());
    }
    GuestMemory::new(regions).unwrap()
}

/// The region that holds the byte at `addr`.
fn region_at(layout: &Layout, addr: u64) -> Option<usize> {
    layout
        .iter()
        .position(|&(start, end)| (start..end).contains(&addr))
}

/// The pieces of `len` bytes at `addr`, byte by byte; `None` when one is missing.
fn pieces(layout: &Layout, addr: u64, len: u32) -> Option<Vec<Segment>> {
    let mut pieces: Vec<Segment> = Vec::new();
    for at in (0..u64::from(len)).map(|k| addr.checked_add(k)) {
        let region = region_at(layout, at?)?;
        match pieces.last_mut() {
            Some(last) if last.region as usize == region => last.len += 1,
            _ => pieces.push(Segment {
                offset: (at? - layout[region].0) as usize,
                len: 1,
                region: region as u32,
            }),
        }
    }
    Some(pieces)
}

/// Compares both translations of one buffer with the model, from every hint a caller may bring.
fn check(memory: &GuestMemory, layout: &Layout, addr: u64, len: u32) {
    let expected = pieces(layout, addr, len);
    let mut found = Vec::new();
    let whole = memory.translate_all(GuestAddr(addr), len, |piece| found.push(piece));
    assert_eq!(whole.then_some(found), expected, "{len} at {addr:#x}");

    let one = expected
        .filter(|_| len > 0)
        .and_then(|pieces| match *pieces {
            [one] => Some(one),
            _ => None,
        });
    for hint in [0, 1, 5, 508, u32::MAX] {
        let mut hint = hint;
        let found = memory.translate(GuestAddr(addr), len, &mut hint);
        if len > 0 {
            assert_eq!(found, one, "{len} at {addr:#x}");
        }
        if let Some(found) = found {
            assert_eq!(hint, found.region, "the hint is where the last one was");
            assert_eq!(
                memory.translate(GuestAddr(addr), len, &mut hint),
                Some(found)
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        rng_seed: RngSeed::Fixed(0x6d65_6d31),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn translation_finds_what_a_look_at_every_byte_finds(
        layout in layouts(),
        rotate in 0_usize..12,
        buffers in prop::collection::vec((80_u64..700, 0_u32..130), 40),
    ) {
        let memory = memory_of(&layout, rotate);
        for (addr, len) in buffers {
            check(&memory, &layout, addr, len);
        }
        for &(start, end) in &layout {
            let size = (end - start) as u32;
            for (addr, len) in [
                (start, size),
                (start, size + 1),
                (start - 1, 1),
                (start - 1, 2),
                (start - 1, size + 2),
                (end - 1, 1),
                (end - 1, 2),
                (end, 1),
                (start, u32::MAX),
            ] {
                check(&memory, &layout, addr, len);
            }
        }
    }

    #[test]
    fn what_is_written_through_one_translation_is_read_through_another(
        layout in layouts(),
        addr in 80_u64..500,
        len in 1_u32..200,
    ) {
        let memory = memory_of(&layout, 0);
        let bytes: Vec<u8> = (0..len).map(|k| (k * 7 + 1) as u8).collect();
        let mut written = 0;
        if memory.translate_all(GuestAddr(addr), len, |piece| {
            written += memory.slice(piece).copy_from(&bytes[written..]);
        }) {
            for (k, expected) in bytes.iter().enumerate() {
                let byte = memory.translate(GuestAddr(addr + k as u64), 1, &mut 0).unwrap();
                prop_assert_eq!(memory.slice(byte).read(), Some([*expected]));
            }
        }
    }
}

#[test]
fn translation_holds_with_as_many_regions_as_there_can_be() {
    let layout: Layout = (0..GuestMemory::MAX_REGIONS as u64)
        .scan(0x1000, |at, i| {
            let start = *at + [0, 0, 3, 1][i as usize % 4];
            *at = start + 1 + i % 5;
            Some((start, *at))
        })
        .collect();
    let memory = memory_of(&layout, 77);
    let end = layout.last().unwrap().1;
    for addr in 0x0ff0..end + 16 {
        for len in [0, 1, 2, 3, 8, 17] {
            check(&memory, &layout, addr, len);
        }
    }
    check(&memory, &layout, 0x1000, u32::MAX);
}

#[test]
fn no_memory_has_no_addresses() {
    let memory = GuestMemory::default();
    for addr in [0, 1, u64::MAX] {
        check(&memory, &Layout::new(), addr, 0);
        check(&memory, &Layout::new(), addr, 1);
        assert_eq!(memory.user_addr(GuestAddr(addr)), None);
    }
}

#[test]
fn a_buffer_at_the_top_of_the_address_space_ends_there() {
    let (start, size) = (u64::MAX - 0x100, 0x100);
    let layout = vec![(start, start + size)];
    let memory = memory_of(&layout, 0);
    for addr in [start - 1, start, start + size - 1, start + size, u64::MAX] {
        for len in [0, 1, 2, 0xff, 0x100, 0x101, u32::MAX] {
            check(&memory, &layout, addr, len);
        }
    }
}

#[test]
fn user_addresses_follow_guest_addresses_region_by_region() {
    let region = |guest, user| {
        let fd = crate::file_of(0x100).into();
        Region::map_file(fd, 0, 0x100, GuestAddr(guest), UserAddr(user)).unwrap()
    };
    let memory = GuestMemory::new(vec![region(0x1000, 0x7000), region(0x2000, 0x3000)]).unwrap();
    for (guest, user) in [
        (0x1000, Some(0x7000)),
        (0x10ff, Some(0x70ff)),
        (0x1100, None),
        (0x0fff, None),
        (0x2001, Some(0x3001)),
        (u64::MAX, None),
    ] {
        assert_eq!(
            memory.user_addr(GuestAddr(guest)),
            user.map(UserAddr),
            "{guest:#x}"
        );
    }
}

#[test]
fn a_segment_is_cut_and_shortened_within_itself() {
    let whole = Segment {
        offset: 10,
        len: 5,
        region: 3,
    };
    for n in 0..8_u32 {
        let (rest, first) = (whole.skip(n), whole.first(n));
        let cut = n.min(5);
        assert_eq!(
            (rest.offset, rest.len, rest.region),
            (10 + cut as usize, 5 - cut, 3)
        );
        assert_eq!((first.offset, first.len, first.region), (10, cut, 3));
    }
    assert_eq!(whole.skip(u32::MAX).len, 0);
}
