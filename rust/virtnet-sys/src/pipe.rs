//! One end of a pipe that a peer sent, for data that goes one way and ends.
//!
//! Whether a call waits is a property of the open file, which the peer shares. So the end is opened anew here: what is read and
//! written never waits, whatever the peer does to its own.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, open};
use rustix::io::{Errno, read, write};

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

    /// Writes all of it at once, or nothing. A pipe that is empty has room for 4096 bytes.
    ///
    /// # Errors
    /// There is no room for all of it ([`io::ErrorKind::WouldBlock`]), it is too long, or nobody reads any more.
    pub fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        const ATOMIC: usize = 4096;
        if bytes.len() > ATOMIC {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        write(&self.fd, bytes)?;
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_written_at_one_end_is_read_at_the_other_when_it_is_closed() {
        let (reader, writer) = io::pipe().unwrap();
        let reader = PipeEnd::reader(reader.into()).unwrap();
        let writer = PipeEnd::writer(writer.into()).unwrap();
        writer.write_all(&[7; 4096]).unwrap();
        let full = (0..1000).find_map(|_| writer.write_all(&[7; 4096]).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(
            writer.write_all(&[7; 4097]).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
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
    fn what_is_not_that_end_of_a_pipe_is_refused() {
        let (reader, writer) = io::pipe().unwrap();
        PipeEnd::reader(writer.into()).unwrap_err();
        PipeEnd::writer(reader.into()).unwrap_err();
        let null = File::options().write(true).open("/dev/null").unwrap();
        let error = PipeEnd::writer(null.into()).unwrap_err();
        assert!(error.to_string().contains("pipe"), "{error}");
    }
}
