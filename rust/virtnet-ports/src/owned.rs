//! Memory of our own, made to be shared: what a virtio driver outside a guest keeps its rings and buffers in.
//!
//! [`OwnMemory`] is one or several sealed memory files, mapped here as a [`GuestMemory`] and described, region by region, the
//! way a front-end describes its memory to a back-end ([`OwnRegion`]). It uses huge pages where some are free.
//!
//! It guarantees that whoever receives a descriptor can neither shrink nor grow the file under us, and that huge pages are
//! there once it is made. Guest and user addresses differ from each other on purpose, so that taking one for the other fails
//! at once.
//!
//! In a packet's way this is where a driver's packets lie while a back-end works on them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr};
use virtnet_sys::memfd::{self, HUGE_PAGE_SIZE};

use crate::PortError;

/// Guest address of memory that was asked for by size alone.
const START: GuestAddr = GuestAddr(1 << 32);

/// What is added to a guest address to get the user address.
const USER_BASE: u64 = 0x7000_0000_0000;

/// Size of an ordinary page.
const PAGE_SIZE: u64 = 4096;

/// Whether memory is made of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Huge {
    /// Where enough are free and it does not waste most of one.
    #[default]
    Auto,
    /// Always; it is an error if there are not enough.
    Yes,
    /// Never.
    No,
}

/// Where a region is to be: for [`OwnMemory::with_layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    /// First guest-physical address.
    pub guest: GuestAddr,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of the file in front of the region.
    pub offset: u64,
}

/// One region of our memory, as a front-end tells it to a back-end.
#[derive(Debug)]
pub struct OwnRegion {
    /// First guest-physical address.
    pub guest: GuestAddr,
    /// Size in bytes.
    pub size: u64,
    /// First address in our own space.
    pub user: UserAddr,
    /// Where the region starts in the file.
    pub mmap_offset: u64,
    fd: OwnedFd,
}

impl AsFd for OwnRegion {
    /// The memory file.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Memory of this process that another one may map.
#[derive(Debug)]
pub struct OwnMemory {
    memory: Arc<GuestMemory>,
    regions: Vec<OwnRegion>,
    huge: bool,
}

impl OwnMemory {
    /// Makes one region of at least `size` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// Too little memory or descriptors; no huge pages although [`Huge::Yes`]; a size of 0.
    pub fn new(size: u64, huge: Huge) -> Result<Self, PortError> {
        let size_in = |page| size.checked_next_multiple_of(page).unwrap_or(size);
        let layout = |page| {
            [RegionLayout {
                guest: START,
                size: size_in(page),
                offset: 0,
            }]
        };
        if wants_huge(huge, size) {
            match Self::make(&layout(HUGE_PAGE_SIZE), true) {
                Err(_) if huge == Huge::Auto => {}
                made => return made,
            }
        }
        Self::make(&layout(PAGE_SIZE), false)
    }

    /// Makes regions exactly as told, each a file of its own: with holes between them, or none, and offsets.
    ///
    /// # Errors
    /// As [`new`](Self::new), and whatever [`GuestMemory::new`] finds wrong with the layout.
    pub fn with_layout(layout: &[RegionLayout], huge: Huge) -> Result<Self, PortError> {
        let size = layout
            .iter()
            .fold(0u64, |sum, region| sum.saturating_add(region.size));
        if wants_huge(huge, size) {
            match Self::make(layout, true) {
                Err(_) if huge == Huge::Auto => {}
                made => return made,
            }
        }
        Self::make(layout, false)
    }

    fn make(layout: &[RegionLayout], huge: bool) -> Result<Self, PortError> {
        let page = if huge { HUGE_PAGE_SIZE } else { PAGE_SIZE };
        let mut mapped = Vec::with_capacity(layout.len());
        let mut regions = Vec::with_capacity(layout.len());
        for &RegionLayout {
            guest,
            size,
            offset,
        } in layout
        {
            let impossible = || PortError::Option {
                option: "memory size",
                found: format!("{size} bytes at offset {offset} and {guest}"),
                expected: "what fits into an address space".to_owned(),
            };
            let file_size = offset
                .checked_add(size)
                .and_then(|end| end.checked_next_multiple_of(page))
                .ok_or_else(impossible)?;
            let user = UserAddr(guest.0.checked_add(USER_BASE).ok_or_else(impossible)?);
            let fd = memfd::create("virtnet-memory", file_size, huge)?;
            let ours = fd
                .try_clone()
                .map_err(|source| PortError::io("map memory of our own", source))?;
            mapped.push(Region::map_file(ours, offset, size, guest, user)?);
            regions.push(OwnRegion {
                guest,
                size,
                user,
                mmap_offset: offset,
                fd,
            });
        }
        Ok(Self {
            memory: Arc::new(GuestMemory::new(mapped)?),
            regions,
            huge,
        })
    }

    /// The memory, as queues use it.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The regions, in the order of the layout.
    #[must_use]
    pub fn regions(&self) -> &[OwnRegion] {
        &self.regions
    }

    /// Whether it is made of huge pages.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.huge
    }
}

/// Whether to try huge pages for `size` bytes.
fn wants_huge(huge: Huge, size: u64) -> bool {
    match huge {
        Huge::Yes => true,
        Huge::No => false,
        Huge::Auto => {
            size >= HUGE_PAGE_SIZE && {
                let pages = size.div_ceil(HUGE_PAGE_SIZE);
                memfd::huge_pages()
                    .iter()
                    .any(|pool| pool.page_size == HUGE_PAGE_SIZE && pool.free >= pages)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use virtnet_mem::MemoryError;

    use super::*;

    fn write(memory: &GuestMemory, addr: GuestAddr, bytes: &[u8]) -> bool {
        let len = u32::try_from(bytes.len()).unwrap();
        memory
            .translate(addr, len, &mut 0)
            .is_some_and(|segment| memory.slice(segment).copy_from(bytes) == bytes.len())
    }

    /// Maps the regions as a back-end would and reads.
    fn read_as_back_end(own: &OwnMemory, addr: GuestAddr, len: u32) -> Option<Vec<u8>> {
        let regions = own
            .regions()
            .iter()
            .map(|r| {
                let fd = r.as_fd().try_clone_to_owned().unwrap();
                Region::map_file(fd, r.mmap_offset, r.size, r.guest, r.user).unwrap()
            })
            .collect();
        let memory = GuestMemory::new(regions).unwrap();
        let mut bytes = vec![0; len as usize];
        memory
            .slice(memory.translate(addr, len, &mut 0)?)
            .copy_to(&mut bytes);
        Some(bytes)
    }

    #[test]
    fn a_back_end_that_maps_the_regions_sees_what_we_write() {
        for huge in [Huge::No, Huge::Auto] {
            let own = OwnMemory::new(3 << 20, huge).unwrap();
            let last = GuestAddr(START.0 + (3 << 20) - 4);
            assert!(write(own.memory(), last, b"last"));
            assert_eq!(read_as_back_end(&own, last, 4).unwrap(), b"last");
            assert_eq!(
                own.memory().user_addr(START),
                Some(own.regions()[0].user),
                "ring addresses are user addresses"
            );
        }
    }

    #[test]
    fn sizes_are_rounded_up_to_pages() {
        let own = OwnMemory::new(5000, Huge::Auto).unwrap();
        assert_eq!(own.regions()[0].size, 8192);
        assert!(!own.is_huge(), "one small buffer is not worth a huge page");
    }

    #[test]
    fn huge_pages_are_used_when_they_are_free_and_missed_only_when_demanded() {
        let free = memfd::huge_pages()
            .iter()
            .find(|pool| pool.page_size == HUGE_PAGE_SIZE)
            .map_or(0, |pool| pool.free);
        let too_many = (free + 10_000) * HUGE_PAGE_SIZE;
        assert!(!OwnMemory::new(too_many, Huge::Auto).unwrap().is_huge());
        let error = OwnMemory::new(too_many, Huge::Yes).unwrap_err();
        assert!(error.to_string().contains("huge pages"), "{error}");
        if free > 16 {
            let own = OwnMemory::new(HUGE_PAGE_SIZE + 1, Huge::Auto).unwrap();
            assert!(own.is_huge());
            assert_eq!(own.regions()[0].size, 2 * HUGE_PAGE_SIZE);
        }
    }

    #[test]
    fn a_layout_is_followed_exactly_holes_and_offsets_included() {
        let layout = [
            RegionLayout {
                guest: GuestAddr(0x1000),
                size: 0x3000,
                offset: 0x2000,
            },
            RegionLayout {
                guest: GuestAddr(0x4000),
                size: 0x1000,
                offset: 0,
            },
            RegionLayout {
                guest: GuestAddr(0x10_0000),
                size: 0x1800,
                offset: 0x234,
            },
        ];
        let own = OwnMemory::with_layout(&layout, Huge::Auto).unwrap();
        let memory = own.memory();
        for (addr, there) in [
            (0x0fff, false),
            (0x1000, true),
            (0x3fff, true),
            (0x4000, true),
            (0x5000, false),
            (0x10_17ff, true),
            (0x10_1800, false),
        ] {
            let found = write(memory, GuestAddr(addr), b"x");
            assert_eq!(found, there, "{addr:#x}");
            let seen = read_as_back_end(&own, GuestAddr(addr), 1);
            assert_eq!(seen, there.then(|| b"x".to_vec()), "{addr:#x}");
        }
    }

    #[test]
    fn whoever_has_the_descriptor_cannot_change_the_size() {
        let own = OwnMemory::new(8192, Huge::No).unwrap();
        let file = File::from(own.regions()[0].as_fd().try_clone_to_owned().unwrap());
        file.set_len(0).unwrap_err();
        file.set_len(1 << 20).unwrap_err();
    }

    #[test]
    fn impossible_sizes_and_layouts_are_refused() {
        let error = OwnMemory::new(0, Huge::No).unwrap_err();
        assert!(matches!(
            error,
            PortError::Memory(MemoryError::EmptyRegion { .. })
        ));
        OwnMemory::new(u64::MAX, Huge::No).unwrap_err();
        let region = RegionLayout {
            guest: START,
            size: 4096,
            offset: 0,
        };
        let error = OwnMemory::with_layout(&[region; 2], Huge::No).unwrap_err();
        assert!(error.to_string().contains("overlap"), "{error}");
    }
}
