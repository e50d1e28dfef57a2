//! The virtio-user port: a driver of ours at the other end of somebody's vhost-user back-end. A VM without a VM.
//!
//! The control half ([`service`]) connects or listens, negotiates as a front-end, and comes back when the back-end has gone.
//! The data half ([`queues`]) is the driver's side of the rings, in memory of our own that is made anew for each session, so
//! that a back-end that has gone cannot write to what the next one uses. Where the back-ends record what they have in flight, rings
//! and memory stay instead, and the next one goes on with them: nothing that was sent is lost with a back-end.
//!
//! In a packet's way this is the step between a burst and the rings of a device.

mod commands;
mod iommu;
mod layout;
mod queues;
mod service;
mod transfer;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use virtnet_packet::{Burst, DropReason, Offloads, Picks, Port, PortCounters};
use virtnet_sys::Poller;
use virtnet_virtio::net::control::Command;
use virtnet_virtio::{Features, QueueConfig, RingFormat};

pub use service::VirtioUserStatus;

use crate::OFFLOADS;
use crate::vhost_user::CONTROLS;
use crate::{Control, EventLog, Held, PortError, RingStatus, Served, Slot};
use queues::DriverQueues;
use service::FrontendService;

/// What a virtio-user port is made of.
#[derive(Clone, Debug)]
pub struct VirtioUserOptions {
    /// Path of the socket.
    pub path: PathBuf,
    /// Listen for a back-end that connects, instead of connecting again and again.
    pub server: bool,
    /// Queue pairs to use: 1 to 128, at most what the back-end has.
    pub queue_pairs: u16,
    /// Descriptors of each queue: 1 to 32768, a power of two for split rings.
    pub queue_size: u16,
    /// The ring format to insist on.
    pub format: RingFormat,
    /// Use a control queue, if the back-end offers one. Whether it also serves it cannot be seen: DPDK's does not.
    pub control: bool,
    /// Have the device tell the hash of each packet; needs the control queue.
    pub hash_report: bool,
    /// Be behind an IOMMU: what the back-end may touch it has to ask for, page by page. It must offer ACCESS_PLATFORM then.
    pub iommu: bool,
    /// Have the back-end record what is in flight, so that nothing in the queues is lost when it is killed.
    pub in_flight: bool,
    /// Notify, and be notified, by messages instead of events. The back-end must offer INBAND_NOTIFICATIONS then.
    pub in_band: bool,
    /// Features not to accept, though they work.
    pub without: Features,
    /// Permissions of a socket that we listen on.
    pub mode: u32,
}

impl VirtioUserOptions {
    /// Connects to `path` with one queue pair of 256 descriptors, split rings, and everything that works.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            server: false,
            queue_pairs: 1,
            queue_size: 256,
            format: RingFormat::Split,
            control: false,
            hash_report: false,
            iommu: false,
            in_flight: true,
            in_band: false,
            without: Features::empty(),
            mode: 0o600,
        }
    }

    /// The features a port with these options accepts where they are offered.
    #[must_use]
    pub fn features(&self) -> Features {
        let mut wanted = Features::VERSION_1
            | Features::MRG_RXBUF
            | Features::EVENT_IDX
            | Features::IN_ORDER
            | Features::MAC
            | Features::STATUS
            | Features::SPEED_DUPLEX
            | OFFLOADS;
        if self.format == RingFormat::Packed {
            wanted |= Features::RING_PACKED;
        }
        if self.queue_pairs > 1 {
            wanted |= Features::MQ;
        }
        if self.control {
            wanted |= CONTROLS | Features::RSS | Features::GUEST_ANNOUNCE;
        }
        if self.iommu {
            wanted |= Features::ACCESS_PLATFORM;
        }
        if !self.hash_report {
            wanted -= Features::HASH_REPORT;
        }
        wanted - self.without
    }

    fn check(&self) -> Result<(), PortError> {
        if !(1..=128).contains(&self.queue_pairs) {
            return Err(PortError::Option {
                option: "queue_pairs",
                found: self.queue_pairs.to_string(),
                expected: "1 to 128".to_owned(),
            });
        }
        if self.hash_report && !self.control {
            return Err(PortError::Option {
                option: "hash_report",
                found: "on".to_owned(),
                expected: "it only together with control".to_owned(),
            });
        }
        if !QueueConfig::size_is_valid(self.queue_size.into(), self.format) {
            return Err(PortError::Option {
                option: "queue_size",
                found: self.queue_size.to_string(),
                expected: match self.format {
                    RingFormat::Split => "a power of two up to 32768, for split rings".to_owned(),
                    RingFormat::Packed => "1 to 32768".to_owned(),
                },
            });
        }
        Ok(())
    }
}

/// How long a device may take to answer a command.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// How long a back-end may take to save or load a state.
const STATE_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked for.
const ANSWER_NAP: Duration = Duration::from_micros(100);

/// A virtio-user port, driver side.
#[derive(Debug)]
pub struct VirtioUserPort {
    slot: Arc<Slot<DriverQueues>>,
    held: Option<Held<DriverQueues>>,
    /// Calls and the slot's bell.
    poller: Arc<Poller>,
    service: Arc<Served<FrontendService>>,
    log: EventLog,
}

impl VirtioUserPort {
    /// Makes a port that `control` serves; it tries to connect, or listens, when this returns.
    ///
    /// # Errors
    /// An impossible option; a socket path that is in use, missing or not allowed.
    pub fn new(options: VirtioUserOptions, control: &Control) -> Result<Self, PortError> {
        options.check()?;
        let failed = |source| PortError::io("make a virtio-user port", source);
        let poller = Arc::new(Poller::new().map_err(failed)?);
        let queues = DriverQueues::new(Arc::clone(&poller));
        let gave_up = Arc::clone(queues.gave_up());
        let slot = Slot::new(queues).map_err(failed)?;
        poller.add(&*slot, queues::BELL).map_err(failed)?;
        let service = FrontendService::new(options, Arc::clone(&slot), gave_up)?;
        let log = service.log();
        let service = Arc::new(control.add(service)?);
        Ok(Self {
            slot,
            held: None,
            poller,
            service,
            log,
        })
    }

    /// How the session stands.
    ///
    /// # Errors
    /// The control thread does not answer.
    pub fn status(&self) -> Result<VirtioUserStatus, PortError> {
        self.service.call(|service| service.status())
    }

    /// A handle to ask for the status while the port itself is with a worker.
    #[must_use]
    pub fn watch(&self) -> VirtioUserWatch {
        VirtioUserWatch {
            service: Arc::downgrade(&self.service),
            log: self.log.clone(),
        }
    }
}

/// Asks a port for its status, wherever the port is.
#[derive(Clone, Debug)]
pub struct VirtioUserWatch {
    service: Weak<Served<FrontendService>>,
    log: EventLog,
}

impl VirtioUserWatch {
    /// How the session stands.
    ///
    /// # Errors
    /// The port is gone, or the control thread does not answer.
    pub fn status(&self) -> Result<VirtioUserStatus, PortError> {
        let service = self.service.upgrade().ok_or(PortError::NoService)?;
        service.call(|service| service.status())
    }

    /// How all rings stand, in order of their numbers; none while there is no back-end.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn rings(&self) -> Result<Vec<RingStatus>, PortError> {
        let service = self.service.upgrade().ok_or(PortError::NoService)?;
        service.call(|service| service.rings())
    }

    /// What has happened in the port's life; readable also when the port is gone.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.log
    }

    /// Has the device carry out a command; what it answers beside its verdict. Waits up to two seconds.
    ///
    /// # Errors
    /// There is no device or no control queue, the command was not negotiated, the device refuses it or does not answer.
    pub fn command(&self, command: Command) -> Result<Vec<u8>, PortError> {
        let service = self.service.upgrade().ok_or(PortError::NoService)?;
        let id = service.call(|service| service.ask(command))??;
        let deadline = Instant::now() + ANSWER_PATIENCE;
        loop {
            if let Some(answer) = service.call(move |service| service.answer(id))? {
                return answer;
            }
            if Instant::now() >= deadline {
                service.call(move |service| service.forget(id))?;
                return Err(PortError::Unanswered);
            }
            thread::sleep(ANSWER_NAP);
        }
    }

    /// Saves the state of the device, or loads one that was saved before, while its rings stand still for a moment; what was saved.
    /// Waits up to ten seconds.
    ///
    /// # Errors
    /// There is no device, the back-end does not offer that, refuses it or leaves.
    pub fn transfer_state(&self, load: Option<Vec<u8>>) -> Result<Vec<u8>, PortError> {
        let service = self.service.upgrade().ok_or(PortError::NoService)?;
        let id = service.call(|service| service.transfer(load))??;
        let deadline = Instant::now() + STATE_PATIENCE;
        while Instant::now() < deadline {
            if let Some(outcome) = service.call(move |service| service.transferred(id))? {
                return outcome;
            }
            thread::sleep(ANSWER_NAP);
        }
        // A back-end that leaves a request unanswered is left by then; one that keeps a pipe open is not.
        service.call(FrontendService::give_up_transfer)?;
        Err(PortError::TransferRefused {
            what: "come to an end with the state of its device",
        })
    }

    /// How the sessions of many ports stand, asked in one visit to their control thread.
    ///
    /// # Errors
    /// As [`Self::status`], each for itself.
    pub fn status_of_all(watches: &[Self]) -> Vec<Result<VirtioUserStatus, PortError>> {
        let services: Vec<_> = watches
            .iter()
            .map(|watch| watch.service.upgrade())
            .collect();
        let there: Vec<_> = services.iter().flatten().cloned().collect();
        let mut answers = Served::call_all(&there, |service| service.status()).into_iter();
        let answer = |service: &Option<_>| {
            let answer = service.as_ref().and_then(|_| answers.next());
            answer.unwrap_or(Err(PortError::NoService))
        };
        services.iter().map(answer).collect()
    }
}

impl Port for VirtioUserPort {
    fn attach(&mut self) {
        self.held = self.slot.take();
    }

    fn detach(&mut self) {
        self.held = None;
    }

    #[inline]
    fn sync(&mut self) -> bool {
        self.held.as_mut().is_some_and(Held::sync)
    }

    #[inline]
    fn rx(&mut self, burst: &mut Burst) -> usize {
        self.held.as_mut().map_or(0, |queues| queues.rx(burst))
    }

    #[inline]
    fn complete(&mut self) {
        if let Some(queues) = &mut self.held {
            queues.complete();
        }
    }

    fn offloads(&self) -> Offloads {
        self.held
            .as_ref()
            .map_or(Offloads::ALL, |queues| queues.offloads())
    }

    #[inline]
    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        self.held
            .as_mut()
            .map_or(0, |queues| queues.tx(burst, picks))
    }

    #[inline]
    fn flush(&mut self) {
        if let Some(queues) = &mut self.held {
            queues.flush();
        }
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        if let Some(queues) = &mut self.held {
            queues.drop_tx(reason, n);
        }
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.held
            .as_mut()
            .is_some_and(|held| held.has_pending() || held.arm() || held.has_pending())
    }

    fn disarm(&mut self) {
        if let Some(queues) = &mut self.held {
            queues.disarm();
        }
    }

    fn counters(&self) -> PortCounters {
        match &self.held {
            Some(queues) => queues.counters(),
            None => self
                .slot
                .run(|queues| queues.counters())
                .unwrap_or_default(),
        }
    }
}
