//! Unix stream sockets that carry descriptors, and the files they listen on.
//!
//! A [`Listener`] makes its file with exact permissions from the first moment, takes the place of a socket whose owner
//! is dead and of nothing else, and on drop removes the file only if it is still its own. A [`Stream`] never blocks;
//! whatever descriptors arrive are owned before anyone looks at a byte, and a message from which the kernel had to cut
//! descriptors is an error with everything closed.
//!
//! Paths only: abstract names have no permissions.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::cmsg_space;
use rustix::fs::{Mode, OFlags, fchmod, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, connect, listen, recvmsg, sendmsg, socket_with, socketpair, sockopt,
};

use crate::error::SysError;
use crate::event::kind;

/// The most descriptors the kernel lets one message carry.
pub const MAX_FDS: usize = 253;

/// Permissions of a socket file unless the caller says otherwise: its owner only.
const DEFAULT_MODE: u32 = 0o600;

/// The longest path that fits into a socket address, without its end mark.
const MAX_PATH: usize = 107;

const BACKLOG: i32 = 16;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A listening socket and its file.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    file: Option<SocketFile>,
}

/// The file of a socket, known by its inode so that somebody else's in its place is recognised.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Listener {
    /// Listens on `path`, which only this user may connect to.
    ///
    /// # Errors
    /// [`SysError::AddressInUse`], [`SysError::NotASocket`], [`SysError::ForeignSocket`], [`SysError::PathTooLong`],
    /// [`SysError::NoDirectory`]: what is in the way, by name. A file that is not a dead socket is never removed.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, SysError> {
        Self::bind_with_mode(path, DEFAULT_MODE)
    }

    /// Listens on `path` with the given permissions, whatever the process's umask.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn bind_with_mode(path: impl AsRef<Path>, mode: u32) -> Result<Self, SysError> {
        let path = path.as_ref();
        let address = address(path)?;
        let failed = |errno: Errno| SysError::os(format!("listen on {}", path.display()), errno);
        let fd =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None).map_err(failed)?;
        // The kernel makes the file with the socket's own mode: set before bind, there is no moment with another one.
        fchmod(&fd, Mode::from_raw_mode(mode)).map_err(failed)?;
        bind_replacing(&fd, &address, path)?;
        let file = SocketFile::of(path)
            .map_err(|error| SysError::os(format!("look at {}", path.display()), error))?;
        let listener = Self {
            fd,
            file: Some(file),
        };
        // The umask can only have taken bits away; give back what was asked for.
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|error| {
            SysError::os(format!("set the permissions of {}", path.display()), error)
        })?;
        listen(&listener.fd, BACKLOG).map_err(failed)?;
        Ok(listener)
    }

    /// Takes over a socket that already listens, from a supervisor for example; its file is not ours to remove.
    ///
    /// # Errors
    /// [`SysError::WrongKind`] if it is no listening unix stream socket.
    pub fn from_owned(fd: OwnedFd) -> Result<Self, SysError> {
        let expected = "listening unix stream socket";
        check_stream(&fd, expected)?;
        if !sockopt::socket_acceptconn(&fd).unwrap_or(false) {
            return Err(SysError::WrongKind {
                expected,
                found: "socket that does not listen",
            });
        }
        Ok(Self { fd, file: None })
    }

    /// Takes the next connection that waits.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if none waits; anything else means no descriptor could be had right now.
    pub fn accept(&self) -> io::Result<Stream> {
        Ok(Stream {
            fd: accept_with(&self.fd, FLAGS)?,
        })
    }

    /// Returns the path of the file, if this listener made one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    fn remove_if_unchanged(&self) -> io::Result<()> {
        match Self::of(&self.path) {
            Ok(now) if (now.device, now.inode) == (self.device, self.inode) => {
                fs::remove_file(&self.path)
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            // Nobody is left to tell; a file that stays is replaced by the next bind.
            let _ = file.remove_if_unchanged();
        }
    }
}

/// The file of a datagram socket, which goes with it.
#[derive(Debug)]
pub(crate) struct DatagramFile(SocketFile);

impl Drop for DatagramFile {
    fn drop(&mut self) {
        // As above.
        let _ = self.0.remove_if_unchanged();
    }
}

/// Binds a datagram socket to `path`, which only this user may send to; a dead socket in the way is removed.
pub(crate) fn bind_datagram(fd: &OwnedFd, path: &Path) -> Result<DatagramFile, SysError> {
    let address = address(path)?;
    fchmod(fd, Mode::from_raw_mode(DEFAULT_MODE))
        .map_err(|errno| SysError::os(format!("make the socket {}", path.display()), errno))?;
    bind_replacing(fd, &address, path)?;
    SocketFile::of(path)
        .map(DatagramFile)
        .map_err(|error| SysError::os(format!("look at {}", path.display()), error))
}

/// One end of a connection.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
}

impl Stream {
    /// Connects to whoever listens on `path`.
    ///
    /// # Errors
    /// [`SysError::NobodyListens`] if the file is missing or its owner dead; a full backlog is
    /// [`io::ErrorKind::WouldBlock`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, SysError> {
        let path = path.as_ref();
        let address = address(path)?;
        let failed = |errno: Errno| match errno {
            Errno::CONNREFUSED | Errno::NOENT => SysError::NobodyListens {
                path: path.to_owned(),
            },
            _ => SysError::os(format!("connect to {}", path.display()), errno),
        };
        let fd =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None).map_err(failed)?;
        connect(&fd, &address).map_err(failed)?;
        Ok(Self { fd })
    }

    /// Makes two ends that are connected to each other.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Takes over a connected socket, from a supervisor for example.
    ///
    /// # Errors
    /// [`SysError::WrongKind`] if it is no unix stream socket: descriptors could not travel over it.
    pub fn from_owned(fd: OwnedFd) -> Result<Self, SysError> {
        check_stream(&fd, "connected unix stream socket")?;
        Ok(Self { fd })
    }

    /// Sends bytes, the descriptors riding on the first of them; returns how many bytes were taken.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if the peer does not read, and then nothing was sent; a peer that is gone is
    /// [`io::ErrorKind::BrokenPipe`].
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            let text = format!(
                "{} descriptors in one message, at most {MAX_FDS} are possible",
                fds.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(sendmsg(
            &self.fd,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?)
    }

    /// Receives what is there: bytes into `buffer`, descriptors onto the end of `fds`; returns the number of bytes,
    /// zero when the peer has closed.
    ///
    /// Descriptors belong to one send: the kernel never returns those of two sends from one call. It may however
    /// return the rest of an earlier send before them, so ask for no more bytes than the message at hand still has.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing is there; [`io::ErrorKind::InvalidData`] if descriptors were lost on
    /// the way (this process is out of them), and then `fds` is as it was and those that came are closed.
    pub fn recv(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        // Room for the most descriptors there can be and for a little that nobody asked for.
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let slices = &mut [IoSliceMut::new(buffer)];
        let message = recvmsg(&self.fd, slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let held = fds.len();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            fds.truncate(held);
            let text = "descriptors of a message were lost; is this process out of descriptors?";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(message.bytes)
    }

    /// Returns who is at the other end.
    ///
    /// # Errors
    /// None in practice: the socket is a connected unix socket.
    pub fn peer(&self) -> io::Result<PeerCredentials> {
        let credentials = sockopt::socket_peercred(&self.fd)?;
        Ok(PeerCredentials {
            pid: credentials.pid.as_raw_pid(),
            uid: credentials.uid.as_raw(),
            gid: credentials.gid.as_raw(),
        })
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Stream> for OwnedFd {
    fn from(stream: Stream) -> Self {
        stream.fd
    }
}

/// Who made the other end of a connection, as the kernel noted at that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// The process.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

/// Turns a path into a socket address, or says why it cannot be one.
pub(crate) fn address(path: &Path) -> Result<SocketAddrUnix, SysError> {
    let len = path.as_os_str().as_bytes().len();
    if len > MAX_PATH {
        return Err(SysError::PathTooLong {
            path: path.to_owned(),
            len,
            max: MAX_PATH,
        });
    }
    if len == 0 {
        return Err(SysError::os("use an empty socket path", Errno::INVAL));
    }
    SocketAddrUnix::new(path)
        .map_err(|errno| SysError::os(format!("use {} as a socket path", path.display()), errno))
}

/// Binds, after removing a dead socket in the way if there is one.
fn bind_replacing(fd: &OwnedFd, address: &SocketAddrUnix, path: &Path) -> Result<(), SysError> {
    let failed = |errno: Errno| match errno {
        Errno::NOENT | Errno::NOTDIR => SysError::NoDirectory {
            directory: path.parent().unwrap_or(path).to_owned(),
        },
        Errno::ADDRINUSE => SysError::AddressInUse {
            path: path.to_owned(),
        },
        _ => SysError::os(format!("make the socket {}", path.display()), errno),
    };
    match bind(fd, address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path)?;
            // Somebody who was faster in between keeps the path.
            bind(fd, address).map_err(failed)
        }
        other => other.map_err(failed),
    }
}

/// Removes the socket file at `path` if it is one, is ours, and nobody listens on it.
fn remove_stale(path: &Path) -> Result<(), SysError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(SysError::os(format!("look at {}", path.display()), error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(SysError::NotASocket {
            path: path.to_owned(),
            found: name_of(metadata.file_type()),
        });
    }
    if !is_dead(path) {
        // Alive, or unknown: either way not ours to remove.
        return Err(SysError::AddressInUse {
            path: path.to_owned(),
        });
    }
    let me = rustix::process::geteuid();
    if !me.is_root() && metadata.uid() != me.as_raw() {
        return Err(SysError::ForeignSocket {
            path: path.to_owned(),
            owner: metadata.uid(),
        });
    }
    let probed = SocketFile {
        path: path.to_owned(),
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    probed
        .remove_if_unchanged()
        .map_err(|error| SysError::os(format!("remove the stale socket {}", path.display()), error))
}

/// Whether nobody has the socket at `path` open, of whatever kind it is.
fn is_dead(path: &Path) -> bool {
    let tried = |kind| {
        let fd = socket_with(AddressFamily::UNIX, kind, FLAGS, None).ok()?;
        connect(&fd, &address(path).ok()?).err()
    };
    // A socket of another kind than ours is "of the wrong type" while it is open.
    [SocketType::STREAM, SocketType::DGRAM]
        .into_iter()
        .all(|kind| matches!(tried(kind), Some(Errno::CONNREFUSED | Errno::NOENT)))
}

fn name_of(file_type: fs::FileType) -> &'static str {
    if file_type.is_dir() {
        "directory"
    } else if file_type.is_symlink() {
        "symbolic link"
    } else if file_type.is_file() {
        "regular file"
    } else {
        "special file"
    }
}

/// Checks that a descriptor is a unix stream socket and makes it non-blocking.
fn check_stream(fd: &OwnedFd, expected: &'static str) -> Result<(), SysError> {
    let failed = |errno: Errno| SysError::os("look at a socket", errno);
    let found = kind(fd).map_err(failed)?;
    if found != "socket" {
        return Err(SysError::WrongKind { expected, found });
    }
    if sockopt::socket_domain(fd).map_err(failed)? != AddressFamily::UNIX {
        return Err(SysError::WrongKind {
            expected,
            found: "socket of another family",
        });
    }
    if sockopt::socket_type(fd).map_err(failed)? != SocketType::STREAM {
        return Err(SysError::WrongKind {
            expected,
            found: "unix socket that is no stream",
        });
    }
    let flags = fcntl_getfl(fd).map_err(failed)?;
    fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(failed)
}

#[cfg(test)]
mod tests;
