//! A mapping of this process, from its making to its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use crate::guard::Guard;

/// The smallest page.
const SMALL_PAGE: usize = 4096;

/// UFFDIO_REGISTER and UFFDIO_UNREGISTER.
const REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UNREGISTER: libc::Ioctl = 0x8010_aa01_u32 as libc::Ioctl;

/// Faults of pages that are not there are told, no others.
const MISSING: u64 = 1;

/// What those requests are about: the kernel's `struct uffdio_register`, which begins with a `struct uffdio_range`.
#[repr(C)]
struct FaultRange {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// Mapped memory. Everything that is made from it keeps it alive.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Comes first, so that nothing is guarded any more when it is unmapped. None where no page can be lost.
    guard: Option<Guard>,
    memory: MmapRegion,
    /// Bytes that are there or not together.
    page: usize,
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
        Ok(Self {
            guard,
            memory,
            page,
        })
    }

    /// Maps private memory.
    pub(crate) fn anonymous(length: usize) -> Result<Self, String> {
        let memory = MmapRegion::new(length).map_err(|error| error.to_string())?;
        dont_fork(&memory);
        Ok(Self {
            guard: None,
            memory,
            page: SMALL_PAGE,
        })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.memory.as_ptr()
    }

    /// Has faults for missing pages told to `userfault`, or not any more; then whoever waits for one goes on.
    pub(crate) fn catch_faults(&self, userfault: BorrowedFd<'_>, catch: bool) -> io::Result<()> {
        let mut range = FaultRange {
            start: self.memory.as_ptr().addr() as u64,
            len: self.memory.size().next_multiple_of(self.page) as u64,
            mode: MISSING,
            ioctls: 0,
        };
        let request = if catch { REGISTER } else { UNREGISTER };
        // SAFETY: both requests read a range, the first of them a mode behind it, and may write the struct. The range is guest
        // mapping of ours, on whose bytes nobody relies, so whoever serves its faults may put there what it likes.
        let done = unsafe { libc::ioctl(userfault.as_raw_fd(), request, &raw mut range) };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Registers the `len` bytes from `start` on with an AF_XDP socket.
    pub(crate) fn register_umem(
        &self,
        socket: BorrowedFd<'_>,
        start: *mut u8,
        len: u64,
        chunk: u32,
    ) -> io::Result<()> {
        let offset = start.addr().checked_sub(self.memory.as_ptr().addr());
        let room = offset.and_then(|offset| self.memory.size().checked_sub(offset));
        if room.is_none_or(|room| len > room as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // As kernels before 5.4 know it too.
        let umem = libc::xdp_umem_reg_v1 {
            addr: start.addr() as u64,
            len,
            chunk_size: chunk,
            headroom: 0,
        };
        let size = size_of_val(&umem);
        // SAFETY: the kernel reads the struct during the call. What it names lies in this mapping (checked above), whose bytes may
        // change at any time for everybody who uses it; the kernel holds the pages itself, so they may even be unmapped first.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_XDP,
                libc::XDP_UMEM_REG,
                (&raw const umem).cast(),
                libc::socklen_t::try_from(size).unwrap_or_default(),
            )
        };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
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
