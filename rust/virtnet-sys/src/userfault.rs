//! Page faults that another process serves: how memory arrives after a guest does (post-copy migration).
//!
//! A [`Userfault`] is two things, depending on who holds it. For the process that made it, it is what ranges of its memory are
//! registered with (guest memory does that itself: `Region::catch_faults` in `virtnet-mem`). For whoever gets a copy of its
//! descriptor, it is where the faults in those ranges are read, and how their pages are put in place. A thread that touches a
//! missing page waits until somebody does, or until the range is not registered any more.
//!
//! Source: Linux, Documentation/admin-guide/mm/userfaultfd.rst

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, read};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use crate::error::SysError;

const API: Opcode = opcode::read_write::<Handshake>(0xaa, 0x3f);
const COPY: Opcode = opcode::read_write::<Copy>(0xaa, 0x03);
const WAKE: Opcode = opcode::read::<Range>(0xaa, 0x02);
const NEW: Opcode = opcode::none(0xaa, 0x00);

/// The one version there is.
const VERSION: u64 = 0xaa;

/// The only event that is asked for: a page fault.
const PAGEFAULT: u8 = 0x12;

/// Bytes of an event.
const EVENT_LEN: usize = 32;

/// Flags of a new descriptor, as numbers, for the device file.
const CLOEXEC_NONBLOCK: usize = 0o2_000_000 | 0o4_000;

#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// A descriptor through which page faults are told and served.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Makes one for the memory of this process. Where the machine lets nobody catch the faults of system calls, those in our own
    /// code are caught.
    ///
    /// # Errors
    /// The kernel refuses, and what to do about it.
    pub fn new() -> Result<Self, SysError> {
        let fd = Self::open().map_err(|errno| {
            let advice = "serve page faults from another process (post-copy): allow it with sysctl vm.unprivileged_userfaultfd=1, \
                          or by access to /dev/userfaultfd";
            SysError::os(advice, errno)
        })?;
        let mut handshake = Handshake {
            api: VERSION,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API takes a pointer to this struct, which it reads and writes.
        let request = unsafe { Updater::<API, _>::new(&mut handshake) };
        // SAFETY: the kernel touches nothing but the struct.
        unsafe { ioctl(&fd, request) }.map_err(|errno| {
            SysError::os("agree with the kernel on how page faults are told", errno)
        })?;
        Ok(Self { fd })
    }

    fn open() -> rustix::io::Result<OwnedFd> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: a new descriptor has no memory registered with it, so nothing can be done to any.
        match unsafe { userfaultfd(flags) } {
            Err(Errno::PERM) => {}
            made => return made,
        }
        if let Ok(device) = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
        {
            // SAFETY: the request takes a number and returns a descriptor that nobody else owns.
            return unsafe { ioctl(&device, NewUserfault) };
        }
        // SAFETY: as above.
        unsafe { userfaultfd(flags | UserfaultfdFlags::from_bits_retain(1)) }
    }

    /// Takes over one that another process made for its own memory, to serve its faults.
    #[must_use]
    pub fn from_owned(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Another descriptor of the same, to be given away.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn to_owned_fd(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// The next address at which a thread waits for a page, in the process that made this; `None` if none does.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn next_fault(&self) -> io::Result<Option<u64>> {
        let mut event = [0; EVENT_LEN];
        loop {
            match read(&self.fd, &mut event) {
                Ok(EVENT_LEN) if event[0] == PAGEFAULT => {
                    let [.., a, b, c, d, e, f, g, h, _, _, _, _, _, _, _, _] = event;
                    return Ok(Some(u64::from_ne_bytes([a, b, c, d, e, f, g, h])));
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Puts pages in place at `to`, in the process that made this, and lets go on who waits for them. Whole pages only, and only
    /// where none are and faults are caught.
    ///
    /// # Errors
    /// There is a page already ([`io::ErrorKind::AlreadyExists`]); the range is not registered; the process is gone.
    pub fn copy(&self, to: u64, bytes: &[u8]) -> io::Result<()> {
        let mut copy = Copy {
            to,
            from: bytes.as_ptr().addr() as u64,
            len: bytes.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: UFFDIO_COPY takes a pointer to this struct, which it reads and writes.
        let request = unsafe { Updater::<COPY, _>::new(&mut copy) };
        // SAFETY: the kernel reads `bytes`, which outlive the call, and fills pages that are missing in registered ranges; those
        // are memory that is shared with other processes, so nobody relies on what is in it.
        unsafe { ioctl(&self.fd, request) }?;
        Ok(())
    }

    /// Lets go on who waits for pages in this range, which have been put in place by other means.
    ///
    /// # Errors
    /// The range is not made of whole pages; the process is gone.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = Range { start, len };
        // SAFETY: UFFDIO_WAKE takes a pointer to this struct, which it reads.
        let request = unsafe { Updater::<WAKE, _>::new(&mut range) };
        // SAFETY: the kernel touches no memory but the struct.
        unsafe { ioctl(&self.fd, request) }?;
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// USERFAULTFD_IOC_NEW: a new descriptor from the device file.
struct NewUserfault;

// SAFETY: the opcode is that of the request; its argument is a number, and what it returns is a new descriptor.
unsafe impl Ioctl for NewUserfault {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        NEW
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        std::ptr::without_provenance_mut(CLOEXEC_NONBLOCK)
    }

    unsafe fn output_from_ptr(
        out: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        // SAFETY: the kernel has just made it, for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_nobody_uses_has_no_faults() {
        let ours = match Userfault::new() {
            Ok(ours) => ours,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let theirs = Userfault::from_owned(ours.to_owned_fd().unwrap());
        assert_eq!(theirs.next_fault().unwrap(), None);
        // Nothing is registered, so nothing can be put anywhere.
        theirs.copy(0x1000_0000, &[0; 4096]).unwrap_err();
        theirs.wake(0x1000_0000, 1).unwrap_err();
        drop(ours);
    }
}
