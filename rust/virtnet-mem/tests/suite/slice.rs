//! Slices: copies of every length and alignment, and never a byte beyond.

use virtnet_mem::{GuestAddr, GuestMemory, GuestSlice, Region, Segment};

/// Bytes of the memory under test; copies stay in its middle.
const SIZE: u32 = 1024;
const MIDDLE: usize = 256;

fn memory() -> GuestMemory {
    let memory = GuestMemory::new(vec![
        Region::anonymous(u64::from(SIZE), GuestAddr(0x1000)).unwrap(),
    ])
    .unwrap();
    fill(&memory, 0xee);
    memory
}

fn at(offset: usize, len: usize) -> Segment {
    Segment {
        offset,
        len: len as u32,
        region: 0,
    }
}

fn fill(memory: &GuestMemory, byte: u8) {
    memory
        .slice(at(0, SIZE as usize))
        .copy_from(&[byte; SIZE as usize]);
}

fn bytes(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    memory.slice(at(0, SIZE as usize)).copy_to(&mut bytes);
    bytes
}

/// Distinct bytes, so that a copy in the wrong place shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|k| (k * 31 + 7 + k / 256) as u8).collect()
}

#[test]
fn a_copy_moves_its_bytes_and_no_other_at_every_length_and_alignment() {
    let (from, to) = (memory(), memory());
    let source = pattern(SIZE as usize);
    from.slice(at(0, SIZE as usize)).copy_from(&source);
    for len in 0..=300 {
        for src in 0..16 {
            for dst in 0..16 {
                let (src, dst) = (MIDDLE + src, MIDDLE + dst);
                let mut expected = [0xee; SIZE as usize];
                expected[dst..dst + len].copy_from_slice(&source[src..src + len]);

                let mut out = [0xee; SIZE as usize];
                let slice = from.slice(at(src, len));
                assert_eq!(slice.copy_to(&mut out[dst..]), len);
                assert_eq!(out, expected, "out: {len} bytes from {src} to {dst}");

                assert_eq!(to.slice(at(dst, len)).copy_from(&source[src..]), len);
                assert_eq!(bytes(&to), expected, "in: {len} bytes from {src} to {dst}");
                to.slice(at(dst, len)).copy_from(&[0xee; 300]);

                assert_eq!(slice.copy_to_guest(&to.slice(at(dst, len))), len);
                assert_eq!(
                    bytes(&to),
                    expected,
                    "across: {len} bytes from {src} to {dst}"
                );
                to.slice(at(dst, len)).copy_from(&[0xee; 300]);
            }
        }
    }
}

#[test]
fn the_shorter_side_bounds_a_copy() {
    let memory = memory();
    for (have, want) in [(0, 5), (5, 0), (3, 5), (5, 3), (200, 300), (300, 200)] {
        fill(&memory, 0xee);
        let n = have.min(want);
        let source = pattern(want);
        assert_eq!(memory.slice(at(10, have)).copy_from(&source), n);
        let after = bytes(&memory);
        assert_eq!(after[10..10 + n], source[..n]);
        assert!(
            after[..10]
                .iter()
                .chain(&after[10 + n..])
                .all(|&b| b == 0xee)
        );
        let mut out = vec![0; want];
        assert_eq!(memory.slice(at(10, have)).copy_to(&mut out), n);
        assert_eq!(
            memory
                .slice(at(10, have))
                .copy_to_guest(&memory.slice(at(600, want))),
            n
        );
    }
}

/// A peer may give two buffers that overlap: its bytes are garbled, nobody else's.
#[test]
fn an_overlapping_copy_stays_inside_its_destination() {
    let memory = memory();
    for len in [1, 2, 7, 16, 33, 64, 65, 128, 129, 300] {
        for shift in [0, 1, 8, 31, 64, 200] {
            for (src, dst) in [(MIDDLE, MIDDLE + shift), (MIDDLE + shift, MIDDLE)] {
                fill(&memory, 0xee);
                memory.slice(at(src, len)).copy_from(&pattern(len));
                let before = bytes(&memory);
                memory
                    .slice(at(src, len))
                    .copy_to_guest(&memory.slice(at(dst, len)));
                let after = bytes(&memory);
                assert_eq!(after[..dst], before[..dst]);
                assert_eq!(after[dst + len..], before[dst + len..]);
            }
        }
    }
}

#[test]
fn a_read_takes_the_first_bytes_or_nothing() {
    let memory = memory();
    memory.slice(at(3, 20)).copy_from(&pattern(20));
    let slice = memory.slice(at(3, 12));
    assert_eq!(slice.read::<12>().map(Vec::from), Some(pattern(12)));
    assert_eq!(slice.read::<5>().map(Vec::from), Some(pattern(5)));
    assert_eq!(slice.read::<13>(), None);
    assert_eq!(slice.read::<0>(), Some([]));
    assert_eq!(GuestSlice::empty().read::<1>(), None);
}

#[test]
fn a_slice_is_split_within_itself() {
    let memory = memory();
    memory.slice(at(0, 10)).copy_from(&pattern(10));
    for n in [0, 1, 9, 10, 11, usize::MAX] {
        let (first, rest) = memory.slice(at(0, 10)).split_at(n);
        let cut = n.min(10);
        assert_eq!((first.len(), rest.len()), (cut, 10 - cut));
        assert_eq!(rest.is_empty(), n >= 10);
        let mut out = [0; 10];
        first.copy_to(&mut out);
        rest.copy_to(&mut out[cut..]);
        assert_eq!(out[..], pattern(10));
    }
}

#[test]
fn asking_for_lines_changes_nothing() {
    let memory = memory();
    let before = bytes(&memory);
    for (offset, len) in [(0, 0), (0, 1), (63, 2), (0, SIZE as usize), (1000, 24)] {
        let slice = memory.slice(at(offset, len));
        slice.prefetch(0);
        slice.prefetch(usize::MAX);
        slice.prefetch_write(usize::MAX);
    }
    GuestSlice::empty().prefetch(1);
    GuestSlice::empty().prefetch_write(1);
    assert_eq!(bytes(&memory), before);
}

/// A segment of another memory is a defect of ours: debug builds say so, others cut it to what exists.
#[test]
fn a_foreign_segment_never_leaves_the_memory() {
    let memory = memory();
    let size = SIZE as usize;
    let rows = [
        (at(0, size + 1), size),
        (at(size - 1, 2), 1),
        (at(size, 1), 0),
        (at(size + 1, 1), 0),
        (at(usize::MAX, 1), 0),
        (at(usize::MAX - 1, u32::MAX as usize), 0),
        (at(1, u32::MAX as usize), size - 1),
    ];
    for (segment, kept) in rows {
        let cut = std::panic::catch_unwind(|| memory.slice(segment).len());
        if cfg!(debug_assertions) {
            assert!(cut.is_err(), "{segment:?}");
        } else {
            assert_eq!(cut.unwrap(), kept, "{segment:?}");
        }
    }
    for region in [1, 7, u32::MAX] {
        let elsewhere = Segment {
            region,
            ..at(0, 10)
        };
        assert!(memory.slice(elsewhere).is_empty());
        assert!(GuestMemory::default().slice(elsewhere).is_empty());
    }
}
