//! The one place where errors of the crates below become exceptions of `virtnet.errors`.

use std::io::ErrorKind;

use pyo3::PyErr;
use virtnet_engine::EngineError;
use virtnet_ports::{Fault, PortError as RustPortError, SessionError};

/// The exceptions, which are written in Python; importing is left to their first use.
mod exceptions {
    use pyo3::import_exception;

    import_exception!(virtnet.errors, ConfigError);
    import_exception!(virtnet.errors, GuestError);
    import_exception!(virtnet.errors, PeerError);
    import_exception!(virtnet.errors, PeerGone);
    import_exception!(virtnet.errors, PortError);
    import_exception!(virtnet.errors, StateError);
}

pub(crate) use exceptions::{ConfigError, GuestError, PeerError, PeerGone, PortError, StateError};

/// By fault: ours who call, the guest's, the peer's, the host's.
pub(crate) fn port_error(error: RustPortError) -> PyErr {
    let message = error.to_string();
    match (&error, error.fault()) {
        (
            RustPortError::Stopped
            | RustPortError::NoService
            | RustPortError::NoControlQueue { .. }
            | RustPortError::NotNegotiated { .. }
            | RustPortError::NoTransfer { .. },
            _,
        ) => StateError::new_err(message),
        (RustPortError::System(_) | RustPortError::Io { .. } | RustPortError::Slot(_), _)
        | (_, Fault::Host) => PortError::new_err((errno(error.kind()), message)),
        (_, Fault::Guest) => GuestError::new_err(message),
        (_, Fault::Peer) => PeerError::new_err(message),
        _ => ConfigError::new_err(message),
    }
}

/// A change that is not possible is the caller's; a worker that does not answer is not.
pub(crate) fn engine_error(error: &EngineError) -> PyErr {
    let message = error.to_string();
    match error {
        EngineError::Start { source, .. } => PortError::new_err((errno(source.kind()), message)),
        EngineError::Stopped { .. }
        | EngineError::Failed { .. }
        | EngineError::Unresponsive { .. } => StateError::new_err(message),
        _ => ConfigError::new_err(message),
    }
}

/// What probing a back-end may end with.
pub(crate) fn session_error(error: SessionError) -> PyErr {
    let message = error.to_string();
    match error {
        SessionError::Disconnected => PeerGone::new_err(message),
        SessionError::System(error) => PortError::new_err((errno(error.kind()), message)),
        SessionError::Io { source, .. } => PortError::new_err((errno(source.kind()), message)),
        _ => PeerError::new_err(message),
    }
}

/// The number that Python's `OSError` knows the kind by.
pub(crate) fn errno(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::NotFound => 2,
        ErrorKind::PermissionDenied => 13,
        ErrorKind::AlreadyExists => 17,
        ErrorKind::InvalidInput => 22,
        ErrorKind::AddrInUse => 98,
        ErrorKind::TimedOut => 110,
        ErrorKind::ConnectionRefused => 111,
        _ => 5,
    }
}
