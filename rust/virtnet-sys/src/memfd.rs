//! Memory that can be shared: a file without a name, sealed at its size.
//!
//! The size is sealed in both directions and further seals are refused, so that whoever receives the descriptor can
//! neither shrink it under us (which would turn our next access into a fault) nor seal it against writing. Huge pages
//! are an option and never needed.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;

use crate::error::SysError;

/// The huge page size that [`create`] uses: 2 MiB.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// Makes a sealed memory file of `size` bytes, filled with zeros, out of 2 MiB pages if asked.
///
/// # Errors
/// [`SysError::UnalignedSize`] if huge pages are asked for and `size` is no multiple of 2 MiB; otherwise what the
/// kernel says. Huge pages are taken from the pool here and now (see [`huge_pages`]), because a pool that runs dry later
/// would show as a fault.
pub fn create(name: &str, size: u64, huge_pages: bool) -> Result<OwnedFd, SysError> {
    let fd = create_resizable(name, size, huge_pages)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|errno| SysError::os("seal a memory file", errno))?;
    Ok(fd)
}

/// As [`create`], without a seal: whoever has the file may change its size, whatever others have mapped.
///
/// # Errors
/// As [`create`].
pub fn create_resizable(name: &str, size: u64, huge_pages: bool) -> Result<OwnedFd, SysError> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge_pages {
        if !size.is_multiple_of(HUGE_PAGE_SIZE) {
            return Err(SysError::UnalignedSize {
                size,
                page: HUGE_PAGE_SIZE,
            });
        }
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let fd = memfd_create(name, flags)
        .map_err(|errno| SysError::os(format!("make a memory file of {size} bytes"), errno))?;
    ftruncate(&fd, size)
        .map_err(|errno| SysError::os(format!("size a memory file to {size} bytes"), errno))?;
    if huge_pages {
        take_huge_pages(&fd, size)
            .map_err(|errno| SysError::os(format!("take {size} bytes of huge pages"), errno))?;
    }
    Ok(fd)
}

/// Backs the whole file with pages of the pool. Looks first, because the kernel would hand out what is there before it fails.
fn take_huge_pages(fd: &OwnedFd, size: u64) -> Result<(), Errno> {
    let short =
        |pool: &HugePages| pool.page_size == HUGE_PAGE_SIZE && pool.free < size / HUGE_PAGE_SIZE;
    if huge_pages().iter().any(short) {
        return Err(Errno::NOSPC);
    }
    fallocate(fd, FallocateFlags::empty(), 0, size)
}

/// The kernel's pool of huge pages of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// Bytes in one page.
    pub page_size: u64,
    /// Pages nobody has taken.
    pub free: u64,
    /// Pages in all.
    pub total: u64,
}

/// Reads the pools of huge pages, smallest page first; empty where the kernel has none or `/sys` is out of reach.
#[must_use]
pub fn huge_pages() -> Vec<HugePages> {
    let Ok(directory) = fs::read_dir("/sys/kernel/mm/hugepages") else {
        return Vec::new();
    };
    let mut pools: Vec<_> = directory
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib: u64 = name
                .to_str()?
                .strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()?;
            let number = |file| {
                fs::read_to_string(entry.path().join(file))
                    .ok()?
                    .trim()
                    .parse()
                    .ok()
            };
            Some(HugePages {
                page_size: kib << 10,
                free: number("free_hugepages")?,
                total: number("nr_hugepages")?,
            })
        })
        .collect();
    pools.sort_by_key(|pool| pool.page_size);
    pools
}

#[cfg(test)]
mod tests {
    use rustix::fs::{fcntl_get_seals, fstat};

    use super::*;

    #[test]
    fn the_size_is_exact_and_cannot_be_changed() {
        let fd = create("virtnet-test", 12_288, false).unwrap();
        assert_eq!(fstat(&fd).unwrap().st_size, 12_288);
        ftruncate(&fd, 4096).unwrap_err();
        ftruncate(&fd, 16_384).unwrap_err();
        fcntl_add_seals(&fd, SealFlags::WRITE).unwrap_err();
        assert!(fcntl_get_seals(&fd).unwrap().contains(SealFlags::SHRINK));
    }

    #[test]
    fn a_part_of_a_huge_page_is_refused() {
        let error = create("virtnet-test", 4096, true).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a size of 4096 bytes is no multiple of the page size 2097152"
        );
    }

    #[test]
    fn huge_pages_are_taken_when_the_file_is_made() {
        let free = || {
            huge_pages()
                .iter()
                .find(|pool| pool.page_size == HUGE_PAGE_SIZE)
                .map_or(0, |pool| pool.free)
        };
        match create("virtnet-test", HUGE_PAGE_SIZE, true) {
            Ok(fd) => assert_eq!(fstat(&fd).unwrap().st_blocks * 512, 2 << 20),
            Err(error) => assert_eq!(free(), 0, "{error}"),
        }
        let more = (free() + 10_000) * HUGE_PAGE_SIZE;
        let error = create("virtnet-test", more, true).unwrap_err();
        assert!(error.to_string().contains("huge pages"), "{error}");
    }

    #[test]
    fn huge_page_pools_are_sorted_and_consistent() {
        let pools = huge_pages();
        assert!(pools.is_sorted_by_key(|pool| pool.page_size));
        assert!(pools.iter().all(|pool| pool.free <= pool.total));
    }
}
