//! A mapping of this process, from its making to its end.

use std::fs::File;
use std::os::fd::AsRawFd;

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use crate::guard::Guard;

/// The smallest page.
const SMALL_PAGE: usize = 4096;

/// Mapped memory. Everything that is made from it keeps it alive.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Comes first, so that nothing is guarded any more when it is unmapped. None where no page can be lost.
    guard: Option<Guard>,
    memory: MmapRegion,
}

impl Mapping {
    /// Maps `length` bytes of a file from `start` on, for reading and writing; `page` bytes of it are there or not together.
    pub(crate) fn of_file(
        file: File,
        start: u64,
        length: usize,
        page: usize,
    ) -> Result<Self, String> {
        // A pool of huge pages can run dry behind a seal.
        let is_safe = page == SMALL_PAGE && is_sealed_against_shrinking(&file);
        let memory = MmapRegionBuilder::new(length)
            .with_file_offset(FileOffset::new(file, start))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| error.to_string())?;
        // SAFETY: the mapping lies at a page of its file and lives as long as the guard, which is dropped first. It is shared with
        // another process, so nobody relies on what is in it.
        let guard = (!is_safe).then(|| unsafe { Guard::new(memory.as_ptr(), memory.size(), page) });
        dont_fork(&memory);
        Ok(Self { guard, memory })
    }

    /// Maps private memory.
    pub(crate) fn anonymous(length: usize) -> Result<Self, String> {
        let memory = MmapRegion::new(length).map_err(|error| error.to_string())?;
        dont_fork(&memory);
        Ok(Self {
            guard: None,
            memory,
        })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Whether a page of it had to be replaced.
    pub(crate) fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_lost)
    }
}

/// Whether a file can never become shorter. Only memory files know seals; whatever else is asked says no.
fn is_sealed_against_shrinking(file: &File) -> bool {
    // SAFETY: this question changes nothing and takes no argument.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_SHRINK != 0
}

/// Keeps guest memory out of child processes and core files; a refusal costs nothing but that.
fn dont_fork(memory: &MmapRegion) {
    let (start, length) = (memory.as_ptr().cast::<libc::c_void>(), memory.size());
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: the range is a live mapping of ours; these two advices change no byte of it.
        unsafe { libc::madvise(start, length, advice) };
    }
}
