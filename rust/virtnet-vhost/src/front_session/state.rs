//! The state of the device at the other end, on its way out of it or into it.
//!
//! The front-end makes a pipe and hands over one end; the back-end uses it, or answers with an end of a pipe of its own. When all bytes
//! have gone through and the pipe is closed, the front-end asks whether the back-end is content.
//!
//! Spec: vhost-user, Migrating back-end state

use std::os::fd::OwnedFd;

use super::answers::parse;
use super::{FrontendEvent, FrontendSession, misuse};
use crate::connection::Message;
use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::message::Request;
use crate::payload::DeviceState;

/// In the answer to SET_DEVICE_STATE_FD: no descriptor comes with it; the rest of the low bits is an error.
const NO_FD: u64 = 1 << 8;
const ERROR: u64 = 0xff;

impl FrontendSession {
    /// Hands over the end of a pipe through which the device's state comes, or with `load` goes; [`FrontendEvent::StatePipe`] says
    /// that it is taken. All rings have to be stopped.
    ///
    /// # Errors
    /// The back-end does not do that, or does not run. Nothing was sent.
    pub fn transfer_state(&mut self, load: bool, pipe: OwnedFd) -> Result<(), SessionError> {
        if !self.protocol.contains(ProtocolFeatures::DEVICE_STATE) {
            return Err(misuse(
                "the back-end neither saves nor loads the state of its device".to_owned(),
            ));
        }
        let state = DeviceState {
            direction: load.into(),
            phase: 0,
        };
        self.queue
            .push_back((Request::SetDeviceStateFd(state), vec![pipe]));
        Ok(())
    }

    /// Asks whether that worked, when the pipe is at its end; [`FrontendEvent::StateDone`] says that it did.
    pub fn check_state(&mut self) {
        self.ask(Request::CheckDeviceState);
    }

    /// The pipe that the back-end wants to use instead, after [`FrontendEvent::StatePipe`].
    pub fn take_state_pipe(&mut self) -> Option<OwnedFd> {
        self.state_pipe.take()
    }

    pub(super) fn take_state_answer(
        &mut self,
        request: &Request,
        message: Message,
    ) -> Result<(), SessionError> {
        let code: u64 = parse(request, &message.payload)?;
        let found = message.fds.len();
        let mut files = message.fds.into_iter();
        let failed = code & ERROR != 0;
        let expected = usize::from(!failed && code & NO_FD == 0);
        if found != expected || message.misplaced {
            return Err(SessionError::ReplyDescriptors {
                request: request.kind().name(),
                found,
            });
        }
        self.state_pipe = files.next();
        self.events.push_back(if failed {
            FrontendEvent::Refused {
                request: request.kind(),
                code,
            }
        } else {
            FrontendEvent::StatePipe
        });
        Ok(())
    }
}
