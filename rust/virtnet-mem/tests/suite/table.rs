//! Tables: where they may be, what their words say, and that nothing is reached beyond them.

use std::sync::atomic::Ordering::Relaxed;

use virtnet_mem::{GuestAddr, GuestMemory, MemoryError, Region, Table, UserAddr, Word};

use crate::{PAGE, byte_at, file_of};

const USER: u64 = 0x7000_0000;

fn memory(size: u64) -> GuestMemory {
    let fd = file_of(PAGE).into();
    let region = Region::map_file(fd, 0, size, GuestAddr(0), UserAddr(USER)).unwrap();
    GuestMemory::new(vec![region]).unwrap()
}

#[test]
fn a_table_lies_wholly_inside_one_region_and_every_entry_on_its_own_place() {
    let memory = memory(0x200);
    let table = memory.table(UserAddr(USER + 16), 31).unwrap();
    assert_eq!((table.len(), table.is_empty()), (31, false));
    for (at, len) in [
        (16, 32),
        (0x200, 1),
        (0, usize::MAX),
        (0, usize::MAX / 16 + 2),
    ] {
        let error = memory.table(UserAddr(USER + at), len).unwrap_err();
        assert!(matches!(error, MemoryError::NotMapped { .. }), "{error}");
    }
    for at in [1, 2, 4, 8, 15] {
        let error = memory.table(UserAddr(USER + at), 1).unwrap_err();
        let told = matches!(error, MemoryError::Misaligned { align, .. } if align == Table::ENTRY);
        assert!(told, "{error}");
    }
}

#[test]
fn words_are_little_endian_and_where_they_say() {
    let memory = memory(PAGE);
    let table = memory.table(UserAddr(USER), 4).unwrap();
    for i in 0..4 {
        for (word, at) in [(Word::First, 0), (Word::Second, 8)] {
            let bytes = std::array::from_fn(|k| byte_at((16 * i + at + k) as u64));
            assert_eq!(table.load(i, word, Relaxed), u64::from_le_bytes(bytes));
        }
    }
    table.run(1, 3)[1].store(Word::Second, 0x0807_0605_0403_0201, Relaxed);
    assert_eq!((table.entries().len(), table.run(1, 3).len()), (4, 3));
    let mut hint = 0;
    let bytes = memory.translate(GuestAddr(40), 8, &mut hint).unwrap();
    assert_eq!(memory.slice(bytes).read(), Some([1, 2, 3, 4, 5, 6, 7, 8]));
    table.zero();
    assert_eq!(table.load(2, Word::Second, Relaxed), 0);
    let behind = memory.translate(GuestAddr(64), 1, &mut hint).unwrap();
    assert_eq!(memory.slice(behind).read(), Some([byte_at(64)]));
}

/// A prefetch may name any place, even one that is not there.
#[test]
fn asking_for_lines_changes_nothing() {
    let memory = memory(PAGE);
    let table = memory.table(UserAddr(USER + 64), 4).unwrap();
    for i in [0, 3, 4, 4096, usize::MAX / 2, usize::MAX] {
        table.prefetch(i);
        table.prefetch_write(i);
    }
    let whole = memory.translate(GuestAddr(0), PAGE as u32, &mut 0).unwrap();
    let mut bytes = vec![0; PAGE as usize];
    memory.slice(whole).copy_to(&mut bytes);
    assert_eq!(bytes, (0..PAGE).map(byte_at).collect::<Vec<_>>());
}

#[test]
fn a_table_outlives_the_memory_it_came_from() {
    let memory = memory(PAGE);
    let table = memory.table(UserAddr(USER), 4).unwrap();
    let copy = table.clone();
    drop(memory);
    table.store(1, Word::First, 77, Relaxed);
    drop(table);
    assert_eq!(copy.load(1, Word::First, Relaxed), 77);
}

/// A defect of ours: it is told where tests run, and does no harm where they do not.
#[test]
#[cfg_attr(debug_assertions, should_panic = "entry 4 of Table(4 entries)")]
fn an_entry_behind_the_last_is_nobodys() {
    let table = memory(PAGE).table(UserAddr(USER), 4).unwrap();
    assert_eq!(table.load(4, Word::First, Relaxed), 0);
}

#[test]
#[cfg_attr(
    debug_assertions,
    should_panic = "3 entries from 2 of Table(4 entries)"
)]
fn a_run_behind_the_last_entry_is_none() {
    let table = memory(PAGE).table(UserAddr(USER), 4).unwrap();
    assert!(table.run(2, 3).is_empty());
}
