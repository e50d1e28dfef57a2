//! The device's own state on its way through a pipe: out of the device that a guest leaves, into the one it comes to.
//!
//! The state of a network device is small, so it is written at once, and read at once when the front-end asks whether that worked.
//! Nothing here waits for the other end.
//!
//! Spec: vhost-user, Migrating back-end state

use std::io;
use std::os::fd::OwnedFd;

use virtnet_sys::{PipeEnd, SysError};

use crate::device::{BackendDevice, DeviceError};

/// The most bytes that a state has. An empty pipe has room for as much, unless its user has very many.
pub const MAX_STATE_LEN: usize = 8192;

/// The answer to SET_DEVICE_STATE_FD that says: it is done with the pipe that came.
pub(crate) const ACCEPTED: u64 = 1 << 8;

/// The one that says: it is not done, and there is no other pipe.
pub(crate) const REFUSED: u64 = ACCEPTED | 1;

/// A transfer of which the front-end has not asked yet whether it worked.
#[derive(Debug)]
pub(crate) enum Transfer {
    /// All of the state is in the pipe.
    Saved,
    /// The state is to be read from here.
    Loading(PipeEnd),
}

impl Transfer {
    /// Writes the state of the device into a pipe, and closes it.
    pub(crate) fn save(pipe: OwnedFd, device: &mut dyn BackendDevice) -> Result<Self, DeviceError> {
        let pipe = PipeEnd::writer(pipe)?;
        let state = device.save_state()?;
        if state.len() > MAX_STATE_LEN {
            let len = state.len();
            return Err(format!("a state of {len} bytes does not fit into a pipe").into());
        }
        pipe.write_all(&state)?;
        Ok(Self::Saved)
    }

    /// Takes the end of a pipe that a state will come out of.
    pub(crate) fn load(pipe: OwnedFd) -> Result<Self, SysError> {
        Ok(Self::Loading(PipeEnd::reader(pipe)?))
    }

    /// Ends it: a state that has come is given to the device.
    pub(crate) fn finish(self, device: &mut dyn BackendDevice) -> Result<(), DeviceError> {
        let Self::Loading(pipe) = self else {
            return Ok(());
        };
        let state = pipe.read_all(MAX_STATE_LEN).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => {
                "the front-end has not closed its end of the pipe, so the state may not be whole".to_owned()
            }
            io::ErrorKind::InvalidData => {
                format!("a state has at most {MAX_STATE_LEN} bytes, and more came")
            }
            _ => format!("cannot read the state: {error}"),
        })?;
        device.load_state(&state)
    }
}
