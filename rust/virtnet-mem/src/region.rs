//! One region of guest memory: a mapping, and where the peer sees it.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::mapping::Mapping;
use crate::{GuestAddr, MemoryError, UserAddr};

/// A contiguous piece of guest memory, mapped into this process for reading and writing.
///
/// Cloning shares the mapping; it is unmapped when the last clone and the last view made from it are gone.
#[derive(Clone, Debug)]
pub struct Region {
    pub(crate) guest: GuestAddr,
    pub(crate) user: UserAddr,
    pub(crate) size: u64,
    /// First byte of the region: inside `mapping`, and `size` bytes from there are inside it too.
    pub(crate) host: HostPtr,
    pub(crate) mapping: Arc<Mapping>,
}

/// A pointer into a mapping that is kept alive beside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostPtr(pub(crate) *mut u8);

// SAFETY: the pointer is only dereferenced by this crate's volatile and atomic accessors, which are valid from any thread
// for as long as the mapping stored beside it lives.
unsafe impl Send for HostPtr {}
// SAFETY: as above; concurrent access is the normal case for memory shared with another process.
unsafe impl Sync for HostPtr {}

impl Region {
    /// Maps `size` bytes of `fd` from byte `offset` on, seen by the peer at `guest` and at `user`.
    ///
    /// The descriptor is closed after mapping. `offset` need not be a multiple of the page size. Spec: vhost-user,
    /// "Memory region description".
    ///
    /// # Errors
    /// Any [`MemoryError`] about a single region; nothing stays mapped then.
    pub fn map_file(
        fd: OwnedFd,
        offset: u64,
        size: u64,
        guest: GuestAddr,
        user: UserAddr,
    ) -> Result<Self, MemoryError> {
        check_range(guest, user, size)?;
        let needed = offset
            .checked_add(size)
            .ok_or(MemoryError::Overflow { guest, size })?;
        let map_error = |cause: String| MemoryError::Map { guest, size, cause };

        let file = File::from(fd);
        let meta = file.metadata().map_err(|e| map_error(e.to_string()))?;
        if meta.len() < needed {
            return Err(MemoryError::ShortFile {
                guest,
                needed,
                found: meta.len(),
            });
        }
        // On hugetlbfs the block size is the huge page: offset and length of a mapping must be multiples of it.
        let page = meta.blksize().max(4096);
        let start = offset - offset % page;
        let end = needed
            .checked_next_multiple_of(page)
            .filter(|&end| end <= meta.len())
            .unwrap_or(needed);
        let length = usize::try_from(end - start).map_err(|e| map_error(e.to_string()))?;

        let page = usize::try_from(page).map_err(|e| map_error(e.to_string()))?;
        let mapping = Mapping::of_file(file, start, length, page).map_err(map_error)?;
        Self::over(mapping, offset - start, size, guest, user)
    }

    /// Maps `size` bytes of private memory: for tests and for rings that stay in this process.
    ///
    /// # Errors
    /// [`MemoryError::EmptyRegion`], [`MemoryError::Overflow`], or [`MemoryError::Map`] when memory is short.
    pub fn anonymous(size: u64, guest: GuestAddr) -> Result<Self, MemoryError> {
        let user = UserAddr(guest.0);
        check_range(guest, user, size)?;
        let map_error = |cause: String| MemoryError::Map { guest, size, cause };
        let length = usize::try_from(size).map_err(|e| map_error(e.to_string()))?;
        let mapping = Mapping::anonymous(length).map_err(map_error)?;
        Self::over(mapping, 0, size, guest, user)
    }

    fn over(
        mapping: Mapping,
        skip: u64,
        size: u64,
        guest: GuestAddr,
        user: UserAddr,
    ) -> Result<Self, MemoryError> {
        let map_error = |cause: String| MemoryError::Map { guest, size, cause };
        let skip = usize::try_from(skip).map_err(|e| map_error(e.to_string()))?;
        let mapping = Arc::new(mapping);
        // `skip + size` bytes were mapped above, so the pointer stays inside the mapping.
        let host = HostPtr(mapping.as_ptr().wrapping_add(skip));
        Ok(Self {
            guest,
            user,
            size,
            host,
            mapping,
        })
    }

    /// First guest-physical address.
    #[must_use]
    pub fn guest(&self) -> GuestAddr {
        self.guest
    }

    /// First address in the front-end's space.
    #[must_use]
    pub fn user(&self) -> UserAddr {
        self.user
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it begins in this process: what a front-end has to know that serves its page faults.
    #[must_use]
    pub fn host_addr(&self) -> u64 {
        self.host.0.addr() as u64
    }

    /// Has page faults in it told to `userfault`: whoever touches a page that is not there waits until the other end has brought it.
    ///
    /// # Errors
    /// What the kernel says: it catches faults in memory files only, and each region with one descriptor.
    pub fn catch_faults(&self, userfault: BorrowedFd<'_>) -> io::Result<()> {
        self.mapping.catch_faults(userfault, true)
    }

    /// Ends that. Whoever waits for a page goes on, and finds zeros where none has been brought.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn release_faults(&self, userfault: BorrowedFd<'_>) -> io::Result<()> {
        self.mapping.catch_faults(userfault, false)
    }

    /// Registers all of it with an AF_XDP socket, in chunks of `chunk` bytes: the kernel and its drivers read and write them from
    /// now on, as long as the socket is open.
    ///
    /// # Errors
    /// What the kernel says: the size is no multiple of the chunk's, or more memory would be locked than is allowed (ENOBUFS).
    pub fn register_umem(&self, socket: BorrowedFd<'_>, chunk: u32) -> io::Result<()> {
        self.mapping
            .register_umem(socket, self.host.0, self.size, chunk)
    }

    /// Whether a page of it is gone, because its file was shortened or there was no room for it; zeros have taken its place.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }
}

fn check_range(guest: GuestAddr, user: UserAddr, size: u64) -> Result<(), MemoryError> {
    if size == 0 {
        return Err(MemoryError::EmptyRegion { guest });
    }
    if guest.0.checked_add(size).is_none() || user.0.checked_add(size).is_none() {
        return Err(MemoryError::Overflow { guest, size });
    }
    Ok(())
}
