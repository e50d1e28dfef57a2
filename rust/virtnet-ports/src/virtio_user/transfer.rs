//! The state of the device at the other end, saved or loaded while its rings stand still.
//!
//! First all rings are stopped, because a state is one of a device that does nothing; then the bytes go through a pipe, the back-end
//! says whether it is content, and the rings go on where they stopped. Whoever asks gets a number and comes back for the answer.
//!
//! Spec: vhost-user, Migrating back-end state

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use virtnet_sys::PipeEnd;
use virtnet_vhost::ProtocolFeatures;

use super::queues::DriverQueues;
use super::service::{ServeError, Session};
use crate::{PortError, Slot};

/// The most that is saved, and loaded: what a pipe has room for.
const STATE_MAX: usize = 65_536;

/// A transfer on its way.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) id: u64,
    /// What is to be loaded; `None`: save.
    load: Option<Vec<u8>>,
    /// Rings that have stopped.
    stopped: usize,
    /// Where the state comes out if the back-end has no pipe of its own. Nothing is read before it has said so: one that has closes
    /// its end of ours first, which would look like the end of the state.
    ours: Option<PipeEnd>,
    /// Where the state comes out, and what has come.
    pipe: Option<PipeEnd>,
    saved: Vec<u8>,
}

/// The end of a transfer: its number, and what was saved.
pub(super) type Outcome = (u64, Result<Vec<u8>, PortError>);

impl Session {
    /// Begins to save the state of the device, or to load one.
    pub(super) fn begin_transfer(
        &mut self,
        id: u64,
        load: Option<Vec<u8>>,
        slot: &Slot<DriverQueues>,
    ) -> Result<(), PortError> {
        let agreed = self.frontend.session().protocol_features();
        let why = if self.transfer.is_some() {
            Some("another transfer is on its way")
        } else if !self.running {
            Some("nobody is at the other end")
        } else if !agreed.contains(ProtocolFeatures::DEVICE_STATE) {
            Some("the back-end does not offer DEVICE_STATE")
        } else if load.as_ref().is_some_and(|state| state.len() > STATE_MAX) {
            Some("a state has at most 65536 bytes")
        } else {
            None
        };
        if let Some(why) = why {
            return Err(PortError::NoTransfer { why });
        }
        slot.run(DriverQueues::pause)?;
        self.running = false;
        self.transfer = Some(Transfer {
            id,
            load,
            stopped: 0,
            ours: None,
            pipe: None,
            saved: Vec::new(),
        });
        for ring in (0..).zip(&self.rings).map(|(ring, _)| ring) {
            let stopped = self.frontend.stop_ring(ring);
            // The session's end is told when it is next served.
            stopped.map_err(|_| PortError::NoTransfer {
                why: "the back-end has left",
            })?;
        }
        Ok(())
    }

    /// A ring has stopped; when all have, the pipe is handed over.
    pub(super) fn ring_stopped(&mut self, ring: u32, base: u32) -> Result<(), ServeError> {
        let Some(transfer) = &mut self.transfer else {
            return Ok(());
        };
        let place = usize::try_from(ring)
            .ok()
            .and_then(|ring| self.rings.get_mut(ring));
        if let Some(ring) = place {
            ring.base = base;
            transfer.stopped += 1;
        }
        if transfer.stopped < self.rings.len() {
            return Ok(());
        }
        let failed = |source| PortError::io("make a pipe for the state of a device", source);
        let (reader, writer) = io::pipe().map_err(failed)?;
        let given = if let Some(state) = &transfer.load {
            let writer = PipeEnd::writer(writer.into()).map_err(PortError::from)?;
            write(&writer, state).map_err(failed)?;
            reader.into()
        } else {
            transfer.ours = Some(PipeEnd::reader(reader.into()).map_err(PortError::from)?);
            writer.into()
        };
        let load = transfer.load.is_some();
        Ok(self.frontend.transfer_state(load, given)?)
    }

    /// The back-end has taken the pipe, or has one of its own.
    pub(super) fn pipe_taken(&mut self) -> Result<(), ServeError> {
        let other = self.frontend.take_state_pipe();
        let Some(transfer) = &mut self.transfer else {
            return Ok(());
        };
        let ours = transfer.ours.take();
        match (&transfer.load, other) {
            (Some(state), Some(other)) => {
                let writer = PipeEnd::writer(other).map_err(PortError::from)?;
                let failed = |source| PortError::io("write the state of a device", source);
                write(&writer, state).map_err(failed)?;
            }
            (None, Some(other)) => {
                transfer.pipe = Some(PipeEnd::reader(other).map_err(PortError::from)?);
            }
            (_, None) => transfer.pipe = ours,
        }
        if transfer.load.is_some() {
            self.frontend.check_state()?;
        }
        self.read_state()
    }

    /// What is waited for while a state comes.
    pub(super) fn state_source(&self) -> Option<BorrowedFd<'_>> {
        let pipe = self.transfer.as_ref()?.pipe.as_ref()?;
        Some(pipe.as_fd())
    }

    /// Reads what has come of a state; at its end the back-end is asked whether that was all.
    pub(super) fn read_state(&mut self) -> Result<(), ServeError> {
        let Some(transfer) = &mut self.transfer else {
            return Ok(());
        };
        let Some(pipe) = &transfer.pipe else {
            return Ok(());
        };
        let mut bytes = [0; 4096];
        loop {
            match pipe.read_some(&mut bytes) {
                Ok(0) => break,
                Ok(n) if transfer.saved.len() + n <= STATE_MAX => {
                    transfer.saved.extend_from_slice(&bytes[..n]);
                }
                Ok(_) => return Err(ServeError::StateTooLong),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(source) => {
                    let what = "read the state of a device";
                    return Err(PortError::io(what, source).into());
                }
            }
        }
        transfer.pipe = None;
        Ok(self.frontend.check_state()?)
    }

    /// It is over, this way or that: the rings go on where they stopped.
    pub(super) fn end_transfer(
        &mut self,
        done: bool,
        slot: &Slot<DriverQueues>,
    ) -> Result<Option<Outcome>, ServeError> {
        let Some(transfer) = self.transfer.take() else {
            return Ok(None);
        };
        for (index, ring) in (0..).zip(&self.rings) {
            self.frontend.start_ring(index, ring)?;
            // A command that waits in its queue has been kicked for nobody. Our own eventfd: it cannot refuse a signal.
            drop(ring.kick.signal());
        }
        slot.run(DriverQueues::go_on).map_err(PortError::from)?;
        self.running = true;
        let what = if transfer.load.is_some() {
            "load this state into its device"
        } else {
            "save the state of its device"
        };
        let outcome = if done {
            Ok(transfer.saved)
        } else {
            Err(PortError::TransferRefused { what })
        };
        Ok(Some((transfer.id, outcome)))
    }
}

/// Writes all of a state into an empty pipe.
fn write(pipe: &PipeEnd, mut state: &[u8]) -> io::Result<()> {
    while !state.is_empty() {
        let n = pipe.write_some(state)?;
        state = state.get(n..).unwrap_or_default();
    }
    Ok(())
}
