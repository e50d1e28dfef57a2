//! The dirty log: a bitmap shared with a virtual machine monitor, in which whoever writes guest memory marks the pages.
//!
//! While a guest moves to another host its memory is copied as it runs, and pages that change meanwhile are copied again. Those
//! that the processor changes the monitor sees by itself; those that a device changes it learns from here. So a page is marked
//! *after* it was written: whoever takes the mark and then reads the page sees what was written.
//!
//! Spec: vhost-user, Migration

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::{GuestAddr, MemoryError, Region, UserAddr};

/// A bit for each page of guest memory, from guest address 0 on, in a file that is shared.
#[derive(Clone, Debug)]
pub struct DirtyLog {
    /// Its bytes. A log has no guest address; that it is mapped as guest memory is gives it the same checks.
    bytes: Region,
}

impl DirtyLog {
    /// Bytes of a page, as the log counts, whatever the machine's pages are.
    pub const PAGE: u64 = 4096;

    /// Maps the log: `size` bytes of `fd` from byte `offset` on, for eight pages each. The descriptor is closed after mapping.
    ///
    /// # Errors
    /// Any [`MemoryError`] about a single region; nothing stays mapped then.
    pub fn map_file(fd: OwnedFd, offset: u64, size: u64) -> Result<Self, MemoryError> {
        let bytes = Region::map_file(fd, offset, size, GuestAddr(0), UserAddr(0))?;
        Ok(Self { bytes })
    }

    /// Whether pages of the log itself are gone; see [`Region::is_lost`].
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.bytes.is_lost()
    }

    /// Marks the pages of `len` bytes at `addr`, which have been written. Those that the log does not reach are left out.
    pub fn mark(&self, addr: GuestAddr, len: u64) {
        let Some(last) = len.checked_sub(1) else {
            return;
        };
        let pages = addr.0 / Self::PAGE..=addr.0.saturating_add(last) / Self::PAGE;
        for page in pages {
            let (byte, bit) = (page / 8, page % 8);
            if byte >= self.bytes.size {
                break;
            }
            self.set(byte, 1 << bit);
        }
    }

    fn set(&self, byte: u64, bits: u8) {
        let Ok(offset) = usize::try_from(byte) else {
            return;
        };
        let at = self.bytes.host.0.wrapping_add(offset);
        // SAFETY: the byte is one of the log's `size`, as the caller checked, which are mapped while `self` lives; bytes need no
        // alignment, and the other side uses atomics too.
        let word = unsafe { AtomicU8::from_ptr(at) };
        word.fetch_or(bits, Ordering::Release);
    }
}

/// A structure in guest memory, such as a ring, whose writes are logged by their place in it.
#[derive(Clone, Debug)]
pub struct LoggedArea {
    log: Arc<DirtyLog>,
    start: GuestAddr,
}

impl LoggedArea {
    /// The structure that begins at `start`.
    #[must_use]
    pub fn new(log: &Arc<DirtyLog>, start: GuestAddr) -> Self {
        Self {
            log: Arc::clone(log),
            start,
        }
    }

    /// Marks bytes of it, counted from its beginning, which have been written.
    pub fn mark(&self, bytes: Range<usize>) {
        // Beyond the last address there is nothing to mark; nobody has checked where the peer says that this begins.
        if let Some(addr) = self.start.0.checked_add(bytes.start as u64) {
            self.log.mark(GuestAddr(addr), bytes.len() as u64);
        }
    }
}
