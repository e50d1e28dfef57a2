//! What can go wrong between virtnet and the kernel, in the words of the person who has to fix it.
//!
//! A variant exists where the remedy differs; everything else is [`SysError::Os`], which keeps the errno and names
//! the operation and the object. All of them are the host's or the caller's fault: guests and peers never reach here.

use std::io;
use std::path::PathBuf;

/// Whose fault an error is; decides what the layer above does about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Our caller asked for something that cannot be.
    Caller,
    /// The driver in the guest broke a rule.
    Guest,
    /// The process at the other end of a socket broke the protocol or went away.
    Peer,
    /// The machine refused: a limit, a missing right, no memory.
    Host,
}

/// An error of this crate that a person has to act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SysError {
    /// Another process is listening on the socket path.
    #[error("{} is in use: another process is listening on it; stop it or choose another path", path.display())]
    AddressInUse {
        /// The path that was asked for.
        path: PathBuf,
    },
    /// The path exists and is something other than a socket.
    #[error("{} exists and is not a socket (it is a {found}); it was left alone, choose another path", path.display())]
    NotASocket {
        /// The path that was asked for.
        path: PathBuf,
        /// What is there, in one word.
        found: &'static str,
    },
    /// A stale socket belongs to another user.
    #[error("{} is a stale socket of uid {owner}; remove it as that user or choose another path", path.display())]
    ForeignSocket {
        /// The path that was asked for.
        path: PathBuf,
        /// The user id that owns it.
        owner: u32,
    },
    /// The path does not fit into a socket address.
    #[error("{} has {len} bytes and a socket path may have at most {max}; use a shorter directory", path.display())]
    PathTooLong {
        /// The path that was asked for.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
        /// The longest path a socket address holds.
        max: usize,
    },
    /// The directory of the path is missing.
    #[error("there is no directory {}; create it first", directory.display())]
    NoDirectory {
        /// The missing directory.
        directory: PathBuf,
    },
    /// Nobody listens on the path.
    #[error("nobody listens on {}: start the other side first, or wait for it", path.display())]
    NobodyListens {
        /// The path that was asked for.
        path: PathBuf,
    },
    /// An interface name the kernel would not take.
    #[error("{name:?} is no interface name: 1 to 15 bytes without '/' or space are expected")]
    InterfaceName {
        /// The name that was asked for.
        name: String,
    },
    /// A tap device could not be opened for want of rights.
    #[error(
        "no right to open tap {name:?}: run as root or with CAP_NET_ADMIN, or have root make it once with \
         `ip tuntap add dev {name} mode tap user $USER{}`", if *queues > 1 { " multi_queue" } else { "" }
    )]
    TapPermission {
        /// The interface name.
        name: String,
        /// How many queues were asked for.
        queues: usize,
    },
    /// A tap device exists with other properties than those asked for.
    #[error(
        "tap {name:?} exists and does not fit: it was made {}; remove it (`ip link del {name}`) or make it to fit",
        if *queues > 1 { "without multi_queue, and several queues were asked for" }
        else { "with another mode, or is in use" }
    )]
    TapMismatch {
        /// The interface name.
        name: String,
        /// How many queues were asked for.
        queues: usize,
    },
    /// The kernel has no tun driver within reach.
    #[error(
        "{} cannot be opened: load the tun module, or give the container the device",
        "/dev/net/tun"
    )]
    NoTun,
    /// A size that is not a multiple of the page size it should be made of.
    #[error("a size of {size} bytes is no multiple of the page size {page}")]
    UnalignedSize {
        /// The size that was asked for.
        size: u64,
        /// The size of a page.
        page: u64,
    },
    /// A descriptor of the wrong kind was handed over.
    #[error("a {expected} was expected and the descriptor is a {found}")]
    WrongKind {
        /// What was expected.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A refusal of the kernel that something can be done about.
    #[error("cannot {operation}: {source}; {remedy}")]
    Refused {
        /// The operation, with its object, as the end of a sentence that starts with "cannot".
        operation: String,
        /// What the kernel said.
        source: io::Error,
        /// What to do.
        remedy: String,
    },
    /// Any other refusal of the kernel.
    #[error("cannot {operation}: {source}")]
    Os {
        /// The operation, with its object, as the end of a sentence that starts with "cannot".
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl SysError {
    /// Returns whose fault the error is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::PathTooLong { .. }
            | Self::InterfaceName { .. }
            | Self::UnalignedSize { .. }
            | Self::WrongKind { .. } => Fault::Caller,
            _ => Fault::Host,
        }
    }

    /// Returns the kind of system error this is, as [`std::io`] calls it.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::AddressInUse { .. } | Self::NotASocket { .. } => io::ErrorKind::AddrInUse,
            Self::ForeignSocket { .. } | Self::TapPermission { .. } => {
                io::ErrorKind::PermissionDenied
            }
            Self::NoDirectory { .. } | Self::NoTun => io::ErrorKind::NotFound,
            Self::NobodyListens { .. } => io::ErrorKind::ConnectionRefused,
            Self::TapMismatch { .. } => io::ErrorKind::AlreadyExists,
            Self::PathTooLong { .. }
            | Self::InterfaceName { .. }
            | Self::UnalignedSize { .. }
            | Self::WrongKind { .. } => io::ErrorKind::InvalidInput,
            Self::Os { source, .. } | Self::Refused { source, .. } => source.kind(),
        }
    }

    /// A refusal, with what to do about it.
    pub(crate) fn refused(
        operation: impl Into<String>,
        remedy: impl Into<String>,
        source: io::Error,
    ) -> Self {
        Self::Refused {
            operation: operation.into(),
            source,
            remedy: remedy.into(),
        }
    }

    /// A refusal to have `bytes` more of memory locked.
    pub fn locking(operation: impl Into<String>, bytes: u64, source: io::Error) -> Self {
        if source.raw_os_error() != Some(libc::ENOBUFS) {
            return Self::os(operation, source);
        }
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        let limit = limit.map_or_else(|| "without end".to_owned(), |limit| limit.to_string());
        let remedy = format!(
            "it needs {bytes} bytes of locked memory, and RLIMIT_MEMLOCK is {limit}: raise that (`ulimit -l`), run with \
             CAP_IPC_LOCK, or make the rings smaller"
        );
        Self::refused(operation, remedy, source)
    }

    pub(crate) fn os(operation: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os {
            operation: operation.into(),
            source: source.into(),
        }
    }
}

impl From<SysError> for io::Error {
    fn from(error: SysError) -> Self {
        Self::new(error.kind(), error)
    }
}
