//! Connections that carry bytes, over TCP or unix sockets: made without waiting, on either side.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
    sockopt,
};

use crate::endpoint::Endpoint;
use crate::error::SysError;
use crate::unix::{Listener, Stream};

/// Where others connect to.
#[derive(Debug)]
pub enum Acceptor {
    /// By TCP.
    Inet(TcpListener),
    /// By a path.
    Unix(Listener),
}

impl Acceptor {
    /// Listens at an address of this host, or at a path that only this user may connect to.
    ///
    /// # Errors
    /// [`SysError`]: somebody else has the address or path.
    pub fn bind(at: &Endpoint) -> Result<Self, SysError> {
        match at {
            Endpoint::Unix(path) => Listener::bind(path).map(Self::Unix),
            Endpoint::Inet(address) => TcpListener::bind(address)
                .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                .map(Self::Inet)
                .map_err(|error| SysError::os(format!("listen at {at}"), error)),
        }
    }

    /// Takes the next connection that waits.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if none waits.
    pub fn accept(&self) -> io::Result<Connection> {
        let fd = match self {
            Self::Unix(listener) => listener.accept()?.into(),
            Self::Inet(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                OwnedFd::from(stream)
            }
        };
        Ok(Connection { fd }.at_once())
    }

    /// Where it listens, of one that has an IP address.
    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        match self {
            Self::Inet(listener) => listener.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }
}

impl AsFd for Acceptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Inet(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

/// One end of a connection, or of one that is being made.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

impl Connection {
    /// Begins to connect; when the descriptor can be written to, [`finish`](Self::finish) says how it went.
    ///
    /// # Errors
    /// [`SysError`]: nobody listens there, as far as that is known at once.
    pub fn begin(to: &Endpoint) -> Result<Self, SysError> {
        let address = match to {
            Endpoint::Unix(path) => {
                let fd = Stream::connect(path)?.into();
                return Ok(Self { fd });
            }
            Endpoint::Inet(address) => address,
        };
        let failed = |errno: Errno| SysError::os(format!("connect to {to}"), errno);
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(family, SocketType::STREAM, flags, None).map_err(failed)?;
        match connect(&fd, address) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Self { fd }),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Says whether what was begun has succeeded.
    ///
    /// # Errors
    /// Why it has not.
    pub fn finish(self) -> io::Result<Self> {
        match sockopt::socket_error(&self.fd)? {
            Ok(()) => Ok(self.at_once()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes two ends that are connected to each other.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = Stream::pair()?;
        Ok((Self { fd: a.into() }, Self { fd: b.into() }))
    }

    /// Has what is written leave at once, where that is not so anyway.
    fn at_once(self) -> Self {
        // Unix sockets do not know of it and need it not.
        let _ = sockopt::set_tcp_nodelay(&self.fd, true);
        self
    }

    /// The process at the other end, where the system tells.
    #[must_use]
    pub fn peer_pid(&self) -> Option<i32> {
        let of_unix = sockopt::socket_domain(&self.fd).ok()? == AddressFamily::UNIX;
        let credentials = of_unix.then(|| sockopt::socket_peercred(&self.fd).ok())??;
        Some(credentials.pid.as_raw_pid())
    }

    /// Reads what is there; how many bytes, 0 when the other end has closed.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing is there.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let (n, _) = recv(&self.fd, buffer, RecvFlags::empty())?;
        Ok(n)
    }

    /// Writes; how many bytes were taken.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if the other end does not read.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(&self.fd, bytes, SendFlags::NOSIGNAL)?)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<TcpStream> for Connection {
    fn from(stream: TcpStream) -> Self {
        Self { fd: stream.into() }
    }
}
