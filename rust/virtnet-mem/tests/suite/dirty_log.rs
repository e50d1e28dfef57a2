//! The dirty log against a set of page numbers.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use virtnet_mem::{
    DirtyLog, GuestAddr, GuestMemory, LoggedArea, MemoryError, Region, Segment, UserAddr,
};

use crate::PAGE;

/// An empty file of `len` bytes, and as much of it from `offset` on mapped as the log has bytes.
fn log(len: u64, offset: u64, size: u64) -> (File, Result<DirtyLog, MemoryError>) {
    let file = crate::file_of(0);
    file.set_len(len).unwrap();
    let fd = OwnedFd::from(file.try_clone().unwrap());
    (file, DirtyLog::map_file(fd, offset, size))
}

/// Numbers of the bits that are set in a whole file.
fn bits(file: &File) -> BTreeSet<u64> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let is_set = |bit: &u64| bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
    (0..8 * bytes.len() as u64).filter(is_set).collect()
}

#[test]
fn u21_the_pages_of_every_range_are_marked_and_no_others() {
    let ranges = [
        (0, 1),
        (0, 0),
        (PAGE - 1, 1),
        (PAGE - 1, 2),
        (7 * PAGE + 1, PAGE),
        (8 * PAGE, PAGE),
        (3 * PAGE, 20 * PAGE),
        (31 * PAGE + 5, 17),
    ];
    for (addr, len) in ranges {
        let (file, log) = log(PAGE, 0, 4);
        log.unwrap().mark(GuestAddr(addr), len);
        let page = |addr: u64| addr / PAGE;
        let expected: BTreeSet<_> = (addr..addr + len).map(page).collect();
        assert_eq!(bits(&file), expected, "{len} bytes at {addr:#x}");
    }
}

#[test]
fn what_the_log_does_not_reach_is_left_out() {
    let (file, log) = log(PAGE, 100, 4);
    let log = Arc::new(log.unwrap());
    let end = 32 * PAGE;
    for (addr, len) in [
        (end, 1),
        (end + 1, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (1 << 62, 1 << 63),
    ] {
        log.mark(GuestAddr(addr), len);
        LoggedArea::new(&log, GuestAddr(addr)).mark(0..2);
    }
    LoggedArea::new(&log, GuestAddr(u64::MAX)).mark(1..2);
    assert_eq!(bits(&file), BTreeSet::new());
    log.mark(GuestAddr(end - 1), u64::MAX);
    assert_eq!(bits(&file), [8 * 100 + 31].into());
}

#[test]
fn a_log_lies_anywhere_in_its_file_and_never_beyond_its_end() {
    for offset in [0, 1, 4000, PAGE, PAGE + 3] {
        let (file, log) = log(3 * PAGE, offset, 100);
        log.unwrap().mark(GuestAddr(9 * PAGE), 1);
        assert_eq!(bits(&file), [8 * offset + 9].into());
    }
    let refused = |len, offset, size| log(len, offset, size).1.unwrap_err();
    assert!(matches!(
        refused(PAGE, 1, PAGE),
        MemoryError::ShortFile { .. }
    ));
    assert!(matches!(
        refused(PAGE, u64::MAX, 2),
        MemoryError::Overflow { .. }
    ));
    assert!(matches!(
        refused(PAGE, 0, 0),
        MemoryError::EmptyRegion { .. }
    ));
}

#[test]
fn marks_of_two_writers_in_one_byte_are_both_there() {
    for _ in 0..200 {
        let (file, log) = log(PAGE, 0, 1);
        let log = log.unwrap();
        thread::scope(|scope| {
            for first in [0, 1] {
                let log = &log;
                scope.spawn(move || {
                    (first..8)
                        .step_by(2)
                        .for_each(|page| log.mark(GuestAddr(page * PAGE), 1));
                });
            }
        });
        assert_eq!(bits(&file), (0..8).collect());
    }
}

#[test]
fn memory_marks_a_segment_at_its_guest_address() {
    let (file, log) = log(PAGE, 0, PAGE);
    let regions = vec![
        Region::anonymous(4 * PAGE, GuestAddr(0x10_0000)).unwrap(),
        Region::anonymous(4 * PAGE, GuestAddr(0x20_0000)).unwrap(),
    ];
    let segment = Segment {
        offset: PAGE as usize - 1,
        len: 2,
        region: 1,
    };
    let plain = GuestMemory::new(regions).unwrap();
    assert!(plain.log().is_none());
    plain.mark_written(segment);
    assert_eq!(bits(&file), BTreeSet::new());
    let memory = plain.with_log(Some(Arc::new(log.unwrap())));
    memory.mark_written(segment);
    memory.mark_written(Segment {
        region: 2,
        ..segment
    });
    assert_eq!(bits(&file), [0x200, 0x201].into());
}

#[test]
fn a_user_address_has_the_guest_address_of_its_region() {
    let at = |guest, user, file: File| {
        Region::map_file(file.into(), 0, PAGE, GuestAddr(guest), UserAddr(user)).unwrap()
    };
    let memory = GuestMemory::new(vec![
        at(0x1000, 0x9000, crate::file_of(PAGE)),
        at(0x5000, 0x7000, crate::file_of(PAGE)),
    ])
    .unwrap();
    for (user, guest) in [
        (0x9000, Some(0x1000)),
        (0x9fff, Some(0x1fff)),
        (0xa000, None),
        (0x7010, Some(0x5010)),
        (0x8000, None),
        (0x6fff, None),
        (0, None),
    ] {
        assert_eq!(memory.guest_addr(UserAddr(user)), guest.map(GuestAddr));
    }
}
