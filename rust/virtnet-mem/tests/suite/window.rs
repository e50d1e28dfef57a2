//! Windows: where they may be, and that nothing is reached beyond them.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use virtnet_mem::{GuestAddr, GuestMemory, MemoryError, Region, UserAddr};

use crate::{PAGE, byte_at, file_of};

const USER: u64 = 0x7000_0000;
const SIZE: u64 = 0x200;

/// One region whose first byte is `offset` bytes into its file, and another one right behind it in user addresses.
fn memory(offset: u64) -> GuestMemory {
    let region = |guest, user| {
        let fd = file_of(2 * PAGE).into();
        Region::map_file(fd, offset, SIZE, GuestAddr(guest), UserAddr(user)).unwrap()
    };
    let regions = vec![region(0x1000, USER), region(0x9000, USER + SIZE)];
    GuestMemory::new(regions).unwrap()
}

/// (address, size) from the region's start; a window lies wholly inside one region.
#[test]
fn a_window_lies_wholly_inside_one_region() {
    let memory = memory(0);
    let rows = [
        (0, SIZE as usize, true),
        (0, 0, true),
        (SIZE - 16, 16, true),
        (SIZE - 16, 17, false),
        (0, SIZE as usize + 1, false),
        (SIZE, 16, true),
        (2 * SIZE - 16, 17, false),
        (2 * SIZE, 0, false),
        (2 * SIZE, 16, false),
        (0u64.wrapping_sub(16), 16, false),
        (0u64.wrapping_sub(16), 32, false),
        (0, usize::MAX, false),
        (16, usize::MAX, false),
    ];
    for (at, size, inside) in rows {
        let addr = UserAddr(USER.wrapping_add(at));
        match memory.window(addr, size, 1) {
            Ok(window) => {
                assert!(inside, "{size} bytes at {addr}");
                assert_eq!((window.len(), window.is_empty()), (size, size == 0));
            }
            Err(error) => {
                assert!(!inside, "{size} bytes at {addr}: {error}");
                let told = matches!(error, MemoryError::NotMapped { addr: a, size: s }
                    if a == addr && s == size as u64);
                assert!(told, "{error}");
            }
        }
    }
    for addr in [0, u64::MAX] {
        memory.window(UserAddr(addr), 1, 1).unwrap_err();
    }
}

/// All bytes of the first region.
fn contents(memory: &GuestMemory) -> Vec<u8> {
    let whole = memory
        .translate(GuestAddr(0x1000), SIZE as u32, &mut 0)
        .unwrap();
    let mut bytes = vec![0; SIZE as usize];
    memory.slice(whole).copy_to(&mut bytes);
    bytes
}

#[test]
fn a_window_is_aligned_where_the_peer_and_where_we_see_it() {
    for offset in [0, 2, 4, 8, 16, 1] {
        let memory = memory(offset);
        for at in 0..40 {
            for align in [1, 2, 4, 8, 16] {
                let aligned = at % align == 0 && (offset + at) % align == 0;
                let window = memory.window(UserAddr(USER + at), 16, align as usize);
                assert_eq!(
                    window.is_ok(),
                    aligned,
                    "at {at} of offset {offset}, align {align}"
                );
                if let Err(error) = window {
                    assert!(matches!(error, MemoryError::Misaligned { .. }), "{error}");
                }
            }
        }
    }
}

#[test]
fn words_are_little_endian_and_touch_their_own_bytes_only() {
    let memory = memory(0);
    let window = memory.window(UserAddr(USER + 64), 32, 16).unwrap();
    let before = |at: u64| byte_at(64 + at);
    assert_eq!(
        window.load_u16(6, Relaxed),
        u16::from_le_bytes([before(6), before(7)])
    );
    window.store_u16(2, 0x0102, Relaxed);
    window.store_u32(4, 0x0304_0506, Relaxed);
    window.store_u64(8, 0x0708_090a_0b0c_0d0e, Relaxed);
    let pairs = window.pairs(8, 2);
    pairs[1].store([0x1112_1314, 0x1516_1718], Relaxed);
    window.store_u64(24, u64::MAX, Relaxed);
    let words = (window.load_u16(2, Relaxed), window.load_u32(4, Relaxed));
    assert_eq!(words, (0x0102, 0x0304_0506));
    assert_eq!(window.load_u64(8, Relaxed), 0x0708_090a_0b0c_0d0e);
    assert_eq!(pairs[0].load(Relaxed), [0x0b0c_0d0e, 0x0708_090a]);
    let words = window.words(2, 15);
    assert_eq!((words.len(), words[0].load(Relaxed)), (15, 0x0102));
    words[14].store(0x2122, Relaxed);

    let bytes = contents(&memory);
    let mut expected: Vec<u8> = (0..SIZE).map(byte_at).collect();
    expected[66..80].copy_from_slice(&[2, 1, 6, 5, 4, 3, 14, 13, 12, 11, 10, 9, 8, 7]);
    expected[80..88].copy_from_slice(&[20, 19, 18, 17, 24, 23, 22, 21]);
    expected[88..94].fill(0xff);
    expected[94..96].copy_from_slice(&[0x22, 0x21]);
    assert_eq!(bytes[..], expected);
}

#[test]
fn zero_clears_the_window_and_no_more() {
    let memory = memory(0);
    memory.window(UserAddr(USER + 32), 48, 16).unwrap().zero();
    let bytes = contents(&memory);
    for (at, &byte) in bytes.iter().enumerate() {
        let expected = if (32..80).contains(&at) {
            0
        } else {
            byte_at(at as u64)
        };
        assert_eq!(byte, expected, "byte {at}");
    }
}

#[test]
fn a_window_outlives_the_memory_it_came_from() {
    let memory = Arc::new(memory(0));
    let window = memory.window(UserAddr(USER), 16, 16).unwrap();
    let copy = window.clone();
    drop(memory);
    window.store_u32(4, 77, Relaxed);
    drop(window);
    assert_eq!(copy.load_u32(4, Relaxed), 77);
}

/// Offsets at which a word of 2, 4 or 8 bytes is not inside a window of 16 or not aligned.
const WRONG: [(usize, usize); 10] = [
    (2, 15),
    (2, 16),
    (2, usize::MAX),
    (2, usize::MAX - 1),
    (4, 14),
    (4, 2),
    (4, 16),
    (8, 12),
    (8, 16),
    (8, 4),
];

/// What a defect of ours would do: loads 0 or nothing stored, never another byte.
fn misuse(width: usize, offset: usize) {
    let memory = memory(0);
    let window = memory.window(UserAddr(USER + 64), 16, 16).unwrap();
    let loaded = match width {
        2 => {
            window.store_u16(offset, 0xaaaa, Relaxed);
            u64::from(window.load_u16(offset, Relaxed))
        }
        4 => {
            window.store_u32(offset, 0xaaaa_aaaa, Relaxed);
            u64::from(window.load_u32(offset, Relaxed))
        }
        _ => {
            window.store_u64(offset, u64::MAX, Relaxed);
            window.load_u64(offset, Relaxed)
        }
    };
    assert_eq!(loaded, 0);
    let bytes = contents(&memory);
    let untouched: Vec<u8> = (0..SIZE).map(byte_at).collect();
    assert_eq!(bytes[..], untouched);
}

#[test]
fn a_word_outside_the_window_is_a_defect_that_touches_nothing() {
    for (width, offset) in WRONG {
        let outcome = std::panic::catch_unwind(|| misuse(width, offset));
        assert_eq!(
            outcome.is_err(),
            cfg!(debug_assertions),
            "word of {width} at {offset}"
        );
    }
}

/// Runs that are not wholly inside, or not aligned: none of it, however the numbers wrap.
#[test]
fn a_run_that_is_not_wholly_inside_the_window_is_none() {
    let runs = [
        (0, 9),
        (2, 8),
        (16, 1),
        (1, 1),
        (0, usize::MAX / 2 + 2),
        (0, usize::MAX),
    ];
    for (offset, n) in runs {
        let outcome = std::panic::catch_unwind(|| {
            let window = memory(0).window(UserAddr(USER + 64), 16, 16).unwrap();
            assert!(window.words(offset, n).is_empty());
            assert!(window.pairs(offset, n).is_empty());
        });
        assert_eq!(outcome.is_err(), cfg!(debug_assertions), "{n} at {offset}");
    }
}
