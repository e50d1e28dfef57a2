//! What can go wrong with a port, in the words of the person who has to fix it.
//!
//! A variant exists where the remedy differs. What a guest or a peer does wrong while packets flow is not here: that is a
//! counter, or an error of the session that the port keeps.

use std::io;
use std::path::PathBuf;

use virtnet_mem::MemoryError;
use virtnet_sys::{Fault, SysError};

use crate::slot::SlotError;

/// An error of a port or of the control side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PortError {
    /// The system refused.
    #[error(transparent)]
    System(#[from] SysError),
    /// The system refused, in a call that names its operation.
    #[error("cannot {operation}: {source}")]
    Io {
        /// The operation, with its object, as the end of a sentence that starts with "cannot".
        operation: String,
        /// What the system said.
        source: io::Error,
    },
    /// Memory of our own that was asked for does not make sense, or cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The data half of the port did not answer.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A capture file is not what it should be.
    #[error("{} is not a capture that can be read: {problem} ({place})", path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// Where: record number and byte offset.
        place: String,
    },
    /// An option has a value that cannot be.
    #[error("{option} is {found}, and {expected} is expected")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What was given.
        found: String,
        /// What would have done.
        expected: String,
    },
    /// There is no device that could be asked for something, or it has no control queue.
    #[error("there is no control queue to ask through: {why}")]
    NoControlQueue {
        /// Why, and what to do.
        why: &'static str,
    },
    /// A command needs a feature that was not negotiated with the device.
    #[error("the device does not do that: {feature} was not negotiated with it")]
    NotNegotiated {
        /// Names of the features.
        feature: String,
    },
    /// A command has no room in the memory that is shared with the device.
    #[error("a command has at most 4096 bytes: ask for less at once")]
    CommandTooLong,
    /// The device has refused a command.
    #[error("the device refused to {command}: it has changed nothing")]
    CommandRefused {
        /// What it was to do.
        command: &'static str,
    },
    /// The device leaves a command unanswered.
    #[error(
        "the device has not answered: it offers a control queue, and nobody there seems to serve it"
    )]
    Unanswered,
    /// The state of a device can not be had, or given.
    #[error("the device's state cannot be transferred: {why}")]
    NoTransfer {
        /// Why, and what to do.
        why: &'static str,
    },
    /// The back-end does not save or load the state of its device, though it offers to.
    #[error("the back-end refused to {what}: it says itself why")]
    TransferRefused {
        /// What it was to do.
        what: &'static str,
    },
    /// The control thread has been stopped.
    #[error("the control thread has been stopped: make a new one")]
    Stopped,
    /// The service is no longer on the control thread.
    #[error("the service has been removed from the control thread")]
    NoService,
    /// A service panicked; it gets no more calls.
    #[error("a service of the control thread panicked, which is a defect of virtnet: {message}")]
    ServicePanicked {
        /// What the panic said.
        message: String,
    },
    /// A service called its own thread and would have waited for itself.
    #[error(
        "the control thread would wait for itself: services must not call the control they run on"
    )]
    WouldDeadlock,
}

impl PortError {
    /// Whose fault it is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::System(error) => error.fault(),
            Self::Slot(error) => error.fault(),
            Self::Memory(MemoryError::Map { .. }) | Self::Io { .. } => Fault::Host,
            Self::Memory(_)
            | Self::Capture { .. }
            | Self::Option { .. }
            | Self::NoControlQueue { .. }
            | Self::NotNegotiated { .. }
            | Self::NoTransfer { .. }
            | Self::CommandTooLong
            | Self::Stopped
            | Self::NoService
            | Self::WouldDeadlock => Fault::Caller,
            Self::CommandRefused { .. } | Self::TransferRefused { .. } | Self::Unanswered => {
                Fault::Peer
            }
            Self::ServicePanicked { .. } => Fault::Host,
        }
    }

    /// The kind of system error this is, as [`std::io`] calls it; `Other` where it is none.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::System(error) => error.kind(),
            Self::Io { source, .. } => source.kind(),
            _ => io::ErrorKind::Other,
        }
    }

    pub(crate) fn io(operation: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            operation: operation.into(),
            source: source.into(),
        }
    }
}
