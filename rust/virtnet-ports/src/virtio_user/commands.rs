//! What a virtio-user port asks of its device through the control queue, one command after the other.
//!
//! Whoever asks gets a number and comes back for the answer: the control thread never waits for a device, which may itself be served
//! by the same thread.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};

use virtnet_virtio::net::control::{Command, DriverControl, OK};
use virtnet_virtio::{Features, RingError};

use super::queues::RingEvents;
use crate::PortError;

/// Commands that wait at most; nobody asks more at once who waits for answers.
const WAITING_MAX: usize = 64;

/// The control queue of a session, and what is on its way.
#[derive(Debug)]
pub(super) struct Commands {
    queue: DriverControl,
    events: RingEvents,
    negotiated: Features,
    /// Queue pairs that the device has agreed to.
    pairs: u16,
    last_id: u64,
    waiting: VecDeque<Asked>,
    /// The one that the device has.
    asked: Option<Asked>,
    answers: BTreeMap<u64, Result<Vec<u8>, PortError>>,
}

/// A command on its way.
#[derive(Debug)]
struct Asked {
    id: u64,
    command: Command,
}

impl Commands {
    pub(super) fn new(queue: DriverControl, events: RingEvents, negotiated: Features) -> Self {
        Self {
            queue,
            events,
            negotiated,
            // Spec: virtio 1.4, 5.1.9.5.6: until the driver asks for more.
            pairs: 1,
            last_id: 0,
            waiting: VecDeque::new(),
            asked: None,
            answers: BTreeMap::new(),
        }
    }

    /// What says that the device has answered.
    pub(super) fn wait_fd(&self) -> BorrowedFd<'_> {
        self.events.call.as_fd()
    }

    /// Sends a command, or has it wait for its turn; the number of its answer.
    pub(super) fn ask(&mut self, command: Command) -> Result<u64, PortError> {
        let missing = command.needs() - self.negotiated;
        if !missing.is_empty() {
            return Err(PortError::NotNegotiated {
                feature: missing.names().join(", ").to_lowercase(),
            });
        }
        if self.waiting.len() >= WAITING_MAX {
            return Err(PortError::Unanswered);
        }
        self.last_id += 1;
        let id = self.last_id;
        self.waiting.push_back(Asked { id, command });
        self.send();
        Ok(id)
    }

    /// The answer to a command, once, when it is there.
    pub(super) fn answer(&mut self, id: u64) -> Option<Result<Vec<u8>, PortError>> {
        self.answers.remove(&id)
    }

    /// Nobody comes back for this answer.
    pub(super) fn forget(&mut self, id: u64) {
        self.answers.remove(&id);
        self.waiting.retain(|asked| asked.id != id);
    }

    /// Takes what the device has answered; how many queue pairs are agreed on now, if it was asked about them.
    pub(super) fn serve(&mut self) -> Result<Option<u16>, RingError> {
        self.events.call.drain();
        let mut pairs = None;
        while let Some(bytes) = self.queue.answer()? {
            if let Some(Asked { id, command }) = self.asked.take() {
                let answer = verdict(&command, bytes);
                if let Command::SetPairs(n) = command {
                    self.pairs = if answer.is_ok() { n } else { self.pairs };
                    pairs = Some(self.pairs);
                }
                // Those that nobody has come back for are not kept for ever.
                if self.answers.len() >= WAITING_MAX {
                    self.answers.pop_first();
                }
                self.answers.insert(id, answer);
            }
            self.send();
        }
        Ok(pairs)
    }

    fn send(&mut self) {
        if self.queue.is_asking() {
            return;
        }
        let Some(next) = self.waiting.pop_front() else {
            return;
        };
        match self.queue.ask(&next.command.encode()) {
            Some(kick) => {
                if kick {
                    // Our own eventfd: it cannot refuse a signal.
                    drop(self.events.kick.signal());
                }
                self.asked = Some(next);
            }
            None => drop(self.answers.insert(next.id, Err(PortError::CommandTooLong))),
        }
    }
}

/// What stands beside the verdict: behind it, or before it where the device writes data.
fn verdict(command: &Command, mut bytes: Vec<u8>) -> Result<Vec<u8>, PortError> {
    let at = command.data_len();
    if at >= bytes.len() || bytes.remove(at) != OK {
        return Err(PortError::CommandRefused {
            command: command.name(),
        });
    }
    Ok(bytes)
}
