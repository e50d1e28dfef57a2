//! Event descriptors: the kick, call and error signals of a queue, and a thread's own wake-up.
//!
//! [`EventFd::signal`] and [`EventFd::drain`] never wait. The value carried has no meaning: many signals before one
//! drain are one event. A descriptor made by a peer may be an eventfd or a pipe and nothing else, and is put into
//! non-blocking mode on receipt.
//!
//! Non-blocking is a property of the open file, which the peer shares and could take back. Reading therefore asks the
//! kernel not to wait with every call. Writing has no such request; what remains is that a peer that clears the mode
//! *and* saturates its own eventfd can hold up one `signal`, until anyone reads that eventfd.

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read, write};

use crate::error::SysError;

/// An owned, non-blocking, close-on-exec event descriptor.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

impl EventFd {
    /// Makes a new eventfd without a pending event.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    /// Takes over a descriptor that a peer sent: an eventfd or a pipe.
    ///
    /// # Errors
    /// [`SysError::WrongKind`] for anything else; the descriptor is closed.
    pub fn from_owned(fd: OwnedFd) -> Result<Self, SysError> {
        let found =
            kind(&fd).map_err(|errno| SysError::os("look at a received descriptor", errno))?;
        if !matches!(found, "eventfd" | "pipe") {
            return Err(SysError::WrongKind {
                expected: "eventfd or pipe",
                found,
            });
        }
        fcntl_getfl(&fd)
            .and_then(|flags| fcntl_setfl(&fd, flags | OFlags::NONBLOCK))
            .map_err(|errno| SysError::os("make a received descriptor non-blocking", errno))?;
        Ok(Self { fd })
    }

    /// Signals the event; one that is pending already stays pending.
    ///
    /// # Errors
    /// The other end of a pipe is closed, or the descriptor cannot be written to.
    pub fn signal(&self) -> io::Result<()> {
        match write(&self.fd, &1u64.to_ne_bytes()) {
            // A full eventfd or pipe has a signal pending: there is nothing to add.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Takes what is pending; returns whether anything was.
    pub fn drain(&self) -> bool {
        let mut value = [0; 8];
        let slice = &mut [IoSliceMut::new(&mut value)];
        match preadv2(&self.fd, slice, u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(count) => count > 0,
            // Kernels and files without the flag: the mode set on receipt has to do.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::SPIPE | Errno::INVAL) => {
                read(&self.fd, &mut value).is_ok_and(|count| count > 0)
            }
            Err(_) => false,
        }
    }

    /// Returns another descriptor of the same event.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
        })
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<EventFd> for OwnedFd {
    fn from(event: EventFd) -> Self {
        event.fd
    }
}

/// Names what a descriptor is, without reading from or writing to it.
pub(crate) fn kind(fd: &OwnedFd) -> rustix::io::Result<&'static str> {
    let stat = fstat(fd)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        FileType::Symlink => "symbolic link",
        FileType::Unknown => anonymous_kind(fd),
    })
}

/// Tells an eventfd from the other files without a type, by the name the kernel gives them.
///
/// Without `/proc` it passes as an eventfd: reading or writing another one of them fails and does not wait.
fn anonymous_kind(fd: &OwnedFd) -> &'static str {
    match fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(name) if !name.to_string_lossy().contains("eventfd") => "file without a type",
        _ => "eventfd",
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::event::epoll;
    use rustix::pipe::pipe;

    use super::*;

    #[test]
    fn a_signal_is_drained_once() {
        let event = EventFd::new().unwrap();
        assert!(!event.drain());
        event.signal().unwrap();
        event.signal().unwrap();
        assert!(event.drain());
        assert!(!event.drain());
    }

    #[test]
    fn a_clone_is_the_same_event() {
        let event = EventFd::new().unwrap();
        event.try_clone().unwrap().signal().unwrap();
        assert!(event.drain());
    }

    #[test]
    fn ta111_a_saturated_eventfd_does_not_hold_up_a_signal() {
        let event = EventFd::new().unwrap();
        write(&event.fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal().unwrap();
        assert!(event.drain());
    }

    #[test]
    fn ta110_a_blocking_eventfd_is_never_waited_for() {
        let foreign = eventfd(0, EventfdFlags::empty()).unwrap();
        let shared = foreign.try_clone().unwrap();
        let event = EventFd::from_owned(foreign).unwrap();
        assert!(!event.drain());
        // The peer shares the open file and makes it blocking again.
        fcntl_setfl(&shared, OFlags::empty()).unwrap();
        assert!(!event.drain());
        event.signal().unwrap();
        assert!(event.drain());
    }

    #[test]
    fn a_pipe_serves_as_both_ends() {
        let (reader, writer) = pipe().unwrap();
        let reader = EventFd::from_owned(reader).unwrap();
        let writer = EventFd::from_owned(writer).unwrap();
        assert!(!reader.drain());
        writer.signal().unwrap();
        assert!(reader.drain());
        // A full pipe is a pending event, not an error.
        for _ in 0..20_000 {
            writer.signal().unwrap();
        }
        assert!(reader.drain());
    }

    #[test]
    fn a_pipe_without_a_reader_is_an_error_and_no_signal_kills_us() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let error = EventFd::from_owned(writer).unwrap().signal().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn ta110_other_kinds_are_refused_by_name() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let cases: Vec<(OwnedFd, &str)> = vec![
            (File::open("/dev/zero").unwrap().into(), "device"),
            (File::open("/proc/self/exe").unwrap().into(), "regular file"),
            (File::open("/").unwrap().into(), "directory"),
            (socket.into(), "socket"),
            (epoll, "file without a type"),
        ];
        for (fd, name) in cases {
            let error = EventFd::from_owned(fd).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
