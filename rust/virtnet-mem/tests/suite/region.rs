//! Mapping what a peer describes: every offset that can be, and nothing that cannot.

use std::fs::File;
use std::os::fd::OwnedFd;

use virtnet_mem::{GuestAddr, GuestMemory, MemoryError, Region, Segment, UserAddr};

use crate::{PAGE, byte_at, file_of};

fn map(file: &File, offset: u64, size: u64) -> Result<Region, MemoryError> {
    let fd = OwnedFd::from(file.try_clone().unwrap());
    Region::map_file(
        fd,
        offset,
        size,
        GuestAddr(0x10_0000),
        UserAddr(0x7f00_0000),
    )
}

fn first_bytes(region: Region, n: u32) -> Vec<u8> {
    let memory = GuestMemory::new(vec![region]).unwrap();
    let mut bytes = vec![0; n as usize];
    let whole = Segment {
        offset: 0,
        len: n,
        region: 0,
    };
    assert_eq!(memory.slice(whole).copy_to(&mut bytes), n as usize);
    bytes
}

#[test]
fn any_offset_of_a_file_can_be_mapped() {
    let file = file_of(5 * PAGE);
    for offset in [
        0,
        1,
        2,
        511,
        PAGE - 1,
        PAGE,
        PAGE + 1,
        3 * PAGE - 7,
        4 * PAGE,
    ] {
        for size in [1, 2, 100, PAGE - 1, PAGE] {
            let region = map(&file, offset, size).unwrap();
            assert_eq!(region.size(), size);
            let expected: Vec<u8> = (offset..offset + size).map(byte_at).collect();
            assert_eq!(
                first_bytes(region, size as u32),
                expected,
                "{size} bytes at {offset}"
            );
        }
    }
}

#[test]
fn the_last_byte_of_a_file_can_be_mapped_and_the_next_cannot() {
    for len in [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5] {
        let file = file_of(len);
        let region = map(&file, len - 1, 1).unwrap();
        assert_eq!(first_bytes(region, 1), [byte_at(len - 1)]);
        for (offset, size) in [(len - 1, 2), (len, 1), (0, len + 1), (len + 10 * PAGE, 1)] {
            let refused = map(&file, offset, size);
            assert!(
                matches!(refused, Err(MemoryError::ShortFile { needed, found, .. })
                    if needed == offset + size && found == len),
                "{size} bytes at {offset} of {len}: {refused:?}"
            );
        }
    }
}

#[test]
fn two_maps_of_one_file_show_the_same_bytes() {
    let file = file_of(2 * PAGE);
    let memories =
        [0, 100].map(|offset| GuestMemory::new(vec![map(&file, offset, PAGE).unwrap()]).unwrap());
    let at = |offset| Segment {
        offset,
        len: 4,
        region: 0,
    };
    memories[0].slice(at(100)).copy_from(b"here");
    assert_eq!(memories[1].slice(at(0)).read(), Some(*b"here"));
}

#[test]
fn a_region_of_no_bytes_is_refused() {
    assert!(matches!(
        map(&file_of(PAGE), 0, 0),
        Err(MemoryError::EmptyRegion {
            guest: GuestAddr(0x10_0000)
        })
    ));
    assert!(matches!(
        Region::anonymous(0, GuestAddr(5)),
        Err(MemoryError::EmptyRegion {
            guest: GuestAddr(5)
        })
    ));
}

/// (offset, size, guest, user): any sum that passes 2^64.
#[test]
fn a_region_that_wraps_around_is_refused() {
    let file = file_of(PAGE);
    let top = u64::MAX;
    let rows = [
        (0, 2, top, 0),
        (0, 2, 0, top),
        (top, 1, 0, 0),
        (top, top, 0, 0),
        (0, top, 1, 0),
        (0, top, 0, 1),
        (top - PAGE + 1, PAGE, 0, 0),
    ];
    for (offset, size, guest, user) in rows {
        let fd = OwnedFd::from(file.try_clone().unwrap());
        let refused = Region::map_file(fd, offset, size, GuestAddr(guest), UserAddr(user));
        assert!(
            matches!(refused, Err(MemoryError::Overflow { size: told, .. }) if told == size),
            "{size:#x} at {offset:#x}, {guest:#x}, {user:#x}: {refused:?}"
        );
    }
}

#[test]
fn what_is_no_plain_file_is_refused() {
    let unmappable = [
        File::open("/dev/null").unwrap(),
        File::open(std::env::temp_dir()).unwrap(),
        File::open("/proc/self/status").unwrap(),
    ];
    for file in unmappable {
        let refused = map(&file, 0, 1);
        assert!(
            matches!(
                refused,
                Err(MemoryError::ShortFile { .. } | MemoryError::Map { .. })
            ),
            "{file:?}: {refused:?}"
        );
    }
}

#[test]
fn ta45_a_file_opened_for_reading_only_is_refused() {
    let path = std::env::temp_dir().join(format!("virtnet-mem-{}-ro", std::process::id()));
    std::fs::write(&path, [0; 64]).unwrap();
    let file = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(map(&file, 0, 64), Err(MemoryError::Map { .. })));
}

/// Pairs of (guest, user, size); the second one is in the way of the first or is not.
#[test]
fn regions_that_share_an_address_are_refused() {
    let made = |(guest, user, size): (u64, u64, u64)| {
        let fd = OwnedFd::from(file_of(PAGE));
        Region::map_file(fd, 0, size, GuestAddr(guest), UserAddr(user)).unwrap()
    };
    let first = (0x1000, 0x9000, 0x100);
    let rows = [
        ((0x1100, 0x9100, 0x100), false),
        ((0x0f00, 0x8f00, 0x100), false),
        ((0x1100, 0x8f00, 0x100), false),
        ((0x1000, 0xa000, 0x100), true),
        ((0x10ff, 0xa000, 1), true),
        ((0x0f01, 0xa000, 0x100), true),
        ((0x1080, 0xa000, 1), true),
        ((0x0f00, 0xa000, 0x300), true),
        ((0x2000, 0x9000, 0x100), true),
        ((0x2000, 0x90ff, 1), true),
        ((0x2000, 0x8f01, 0x100), true),
    ];
    for (second, shared) in rows {
        for pair in [[first, second], [second, first]] {
            let table = GuestMemory::new(pair.map(made).into());
            let refused = matches!(table, Err(MemoryError::Overlap { .. }));
            assert_eq!(refused, shared, "{second:x?}: {table:?}");
        }
    }
}

#[test]
fn a_table_holds_as_many_regions_as_it_says() {
    let regions = |n: u64| -> Vec<Region> {
        (0..n)
            .map(|i| Region::anonymous(1, GuestAddr(i * 2)).unwrap())
            .collect()
    };
    let most = GuestMemory::MAX_REGIONS as u64;
    assert_eq!(
        GuestMemory::new(regions(most)).unwrap().regions().len(),
        GuestMemory::MAX_REGIONS
    );
    assert!(matches!(
        GuestMemory::new(regions(most + 1)),
        Err(MemoryError::TooManyRegions { found, limit }) if found == limit + 1
    ));
}
