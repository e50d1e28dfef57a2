//! One end of a pipe that a peer sent, for data that goes one way and ends.
//!
//! Whether a call waits is a property of the open file, which the peer shares. So the end is opened anew here: what is read and
//! written never waits, whatever the peer does to its own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, open};
use rustix::io::{Errno, read, write};
use rustix::pipe::fcntl_setpipe_size;
use rustix::time::Timespec;

use crate::error::SysError;
use crate::event::kind;

/// An owned, non-blocking end of a pipe.
#[derive(Debug)]
pub struct PipeEnd {
    fd: OwnedFd,
}

impl PipeEnd {
    /// Takes over the end that is read from.
    ///
    /// # Errors
    /// [`SysError::WrongKind`] for anything else; the descriptor is closed.
    pub fn reader(fd: OwnedFd) -> Result<Self, SysError> {
        Self::open(fd, OFlags::RDONLY, "the end of a pipe that is read")
    }

    /// Takes over the end that is written to.
    ///
    /// # Errors
    /// As [`Self::reader`].
    pub fn writer(fd: OwnedFd) -> Result<Self, SysError> {
        Self::open(fd, OFlags::WRONLY, "the end of a pipe that is written")
    }

    // The descriptor is taken, so that it is closed once the end is open under another one.
    #[expect(clippy::needless_pass_by_value, reason = "it is closed here")]
    fn open(fd: OwnedFd, mode: OFlags, expected: &'static str) -> Result<Self, SysError> {
        let failed = |errno| SysError::os("look at a received descriptor", errno);
        let stat = fstat(&fd).map_err(failed)?;
        let found = kind(&fd).map_err(failed)?;
        let access = fcntl_getfl(&fd).map_err(failed)? & OFlags::ACCMODE;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo || access != mode {
            return Err(SysError::WrongKind { expected, found });
        }
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = mode | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::empty())
            .map_err(|errno| SysError::os("open a received pipe", errno))?;
        Ok(Self { fd })
    }

    /// Opens the end of the pipe at `path` that is written to, with as much room as one may have; `None` if nobody reads there
    /// yet.
    ///
    /// # Errors
    /// The system's, and [`io::ErrorKind::InvalidInput`] for what is no pipe.
    pub fn writer_at(path: &Path) -> io::Result<Option<Self>> {
        /// The most that the kernel gives to everybody.
        const ROOM: usize = 1 << 20;
        let fd = match open(
            path,
            OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Ok(fd) => fd,
            Err(Errno::NXIO) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        if FileType::from_raw_mode(fstat(&fd)?.st_mode) != FileType::Fifo {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Where there is less to be had, it is a smaller pipe.
        let _ = fcntl_setpipe_size(&fd, ROOM);
        Ok(Some(Self { fd }))
    }

    /// Writes as much as there is room for now; how much that was.
    ///
    /// # Errors
    /// There is no room at all ([`io::ErrorKind::WouldBlock`]), or nobody reads any more ([`io::ErrorKind::BrokenPipe`]).
    pub fn write_some(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(write(&self.fd, bytes)?)
    }

    /// Whether somebody still reads what is written.
    #[must_use]
    pub fn has_reader(&self) -> bool {
        !self.polled(Duration::ZERO).contains(PollFlags::ERR)
    }

    /// Waits until there is room, or nobody who would read; whether that happened in time.
    #[must_use]
    pub fn wait_writable(&self, timeout: Duration) -> bool {
        !self.polled(timeout).is_empty()
    }

    fn polled(&self, timeout: Duration) -> PollFlags {
        let timeout = Timespec::try_from(timeout).ok();
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => fds[0].revents(),
            Err(_) => PollFlags::empty(),
        }
    }

    /// Writes all of it without waiting. An empty pipe has room for 4096 bytes in any case, and for more where its user has not too
    /// many pipes.
    ///
    /// # Errors
    /// There is no room for all of it ([`io::ErrorKind::WouldBlock`]; a part may have been written), or nobody reads any more.
    pub fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let n = match self.write_some(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                written => written?,
            };
            bytes = bytes.get(n..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads what there is, as far as `bytes` has room; how much that was, and 0 at the end.
    ///
    /// # Errors
    /// There is nothing yet ([`io::ErrorKind::WouldBlock`]).
    pub fn read_some(&self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(read(&self.fd, bytes)?)
    }

    /// Reads what there is up to the end of it.
    ///
    /// # Errors
    /// The other end is still open ([`io::ErrorKind::WouldBlock`]); more than `most` bytes came ([`io::ErrorKind::InvalidData`]).
    pub fn read_all(&self, most: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; most + 1];
        let mut len = 0;
        while len <= most {
            match read(&self.fd, &mut bytes[len..]) {
                Ok(0) => {
                    bytes.truncate(len);
                    return Ok(bytes);
                }
                Ok(count) => len += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

impl AsFd for PipeEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_is_written_at_one_end_is_read_at_the_other_when_it_is_closed() {
        let (reader, writer) = io::pipe().unwrap();
        let reader = PipeEnd::reader(reader.into()).unwrap();
        let writer = PipeEnd::writer(writer.into()).unwrap();
        writer.write_all(&[7; 8192]).unwrap();
        let full = (0..1000).find_map(|_| writer.write_all(&[7; 5000]).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
        drop(writer);
        assert_eq!(
            reader.read_all(5000).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );

        let (reader, mut writer) = io::pipe().unwrap();
        let reader = PipeEnd::reader(reader.into()).unwrap();
        writer.write_all(b"state").unwrap();
        assert_eq!(
            reader.read_all(5).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(writer);
        assert_eq!(reader.read_all(5).unwrap(), b"", "the rest of it");
    }

    #[test]
    fn a_pipe_takes_what_it_has_room_for_and_tells_whether_somebody_reads() {
        let (mut reader, writer) = io::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
        let end = PipeEnd::writer_at(Path::new(&path)).unwrap().unwrap();
        drop(writer);
        let mut written = 0;
        let error = loop {
            match end.write_some(&[7; 100_000]) {
                Ok(n) => written += n,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(!end.wait_writable(Duration::ZERO));
        assert!(end.has_reader());
        reader.read_exact(&mut vec![0; written]).unwrap();
        assert!(end.wait_writable(Duration::ZERO));
        drop(reader);
        assert!(!end.has_reader());
        assert!(end.wait_writable(Duration::MAX), "it says so at once");
        let error = end.write_some(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        PipeEnd::writer_at(Path::new("/dev/null")).unwrap_err();
    }

    #[test]
    fn what_is_not_that_end_of_a_pipe_is_refused() {
        let (reader, writer) = io::pipe().unwrap();
        PipeEnd::reader(writer.into()).unwrap_err();
        PipeEnd::writer(reader.into()).unwrap_err();
        let null = File::options().write(true).open("/dev/null").unwrap();
        let error = PipeEnd::writer(null.into()).unwrap_err();
        assert!(error.to_string().contains("pipe"), "{error}");
    }
}
