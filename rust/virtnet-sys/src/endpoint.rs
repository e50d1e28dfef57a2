//! Where a socket is: an IP address with a port, or a path.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// An IP address and a port.
    Inet(SocketAddr),
    /// The path of a unix socket.
    Unix(PathBuf),
}

impl Endpoint {
    /// Reads an address with a port, such as `127.0.0.1:5000` or `[::1]:5000`; everything else is a path.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        text.parse()
            .map_or_else(|_| Self::Unix(text.into()), Self::Inet)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}
