//! The vhost-user port: a virtual machine, or whatever drives a virtio-net device, at the other end of a socket.
//!
//! The control half ([`service`]) listens or connects, serves the front-end's messages and comes back to waiting when it
//! leaves. The data half ([`queues`]) has the rings and the memory, and moves packets. The first changes the second only
//! through their slot, between two breaths.
//!
//! It guarantees that a front-end may leave and come back at any time, that one that talks nonsense loses its session and one
//! whose driver breaks a ring loses that ring, and that nothing of it outlives them.
//!
//! In a packet's way this is the step between a guest's rings and a burst.

mod controlq;
mod device;
mod inflight;
mod iommu;
mod lanes;
mod queues;
mod rarp;
mod service;
mod state;
mod steering;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};

use virtnet_packet::{Burst, DropReason, Offloads, Picks, Port, PortCounters};
use virtnet_sys::Poller;
use virtnet_virtio::{Features, QueueConfig, RingFormat};

pub use service::{Step, VhostUserStatus};

use crate::{Control, EventLog, Held, PortError, RingStatus, Served, Slot};
use iommu::Missed;
use lanes::Lanes;
use queues::Queues;
use service::BackendService;

/// What can be left to either side of a network device, as far as it is done here for those who do not take it.
pub const OFFLOADS: Features = Features::CSUM
    .union(Features::HOST_TSO4)
    .union(Features::HOST_TSO6)
    .union(Features::HOST_ECN)
    .union(Features::HOST_USO)
    .union(Features::GUEST_CSUM)
    .union(Features::GUEST_TSO4)
    .union(Features::GUEST_TSO6)
    .union(Features::GUEST_ECN)
    .union(Features::GUEST_USO4)
    .union(Features::GUEST_USO6);

/// What a driver can ask for through a control queue that is left to the back-end.
pub(crate) const CONTROLS: Features = Features::CTRL_VQ
    .union(Features::CTRL_RX)
    .union(Features::CTRL_RX_EXTRA)
    .union(Features::CTRL_VLAN)
    .union(Features::CTRL_MAC_ADDR)
    .union(Features::CTRL_GUEST_OFFLOADS)
    .union(Features::DEVICE_STATS)
    .union(Features::NOTF_COAL)
    .union(Features::VQ_NOTF_COAL)
    .union(Features::HASH_REPORT);

/// What a vhost-user port is made of.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    /// Path of the socket.
    pub path: PathBuf,
    /// Connect to a listening front-end, again and again, instead of listening.
    pub client: bool,
    /// The most queue pairs a front-end may use: 1 to 128.
    pub queue_pairs: u16,
    /// The longest packet a front-end may announce, in bytes behind Ethernet's header; `None`: any.
    pub mtu: Option<u16>,
    /// The guest's MAC address, as the configuration space tells it.
    pub mac: Option<[u8; 6]>,
    /// The speed of the link in Mbit/s, likewise.
    pub speed_mbps: Option<u32>,
    /// Features not to offer, though they work.
    pub without: Features,
    /// Offer to wait for pages that arrive after the guest (post-copy migration). While a page is missing, the worker that needs it
    /// waits for the front-end, and so does everything else that this worker has: trust the front-end, or give the port a worker of
    /// its own.
    pub postcopy: bool,
    /// Offer kicks and calls that are messages, for front-ends that have no events. Slow, and QEMU (10.0) accepts what it cannot do.
    pub in_band: bool,
    /// Permissions of a socket that we listen on.
    pub mode: u32,
}

impl VhostUserOptions {
    /// Listens on `path`, offers one queue pair and everything that works.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            client: false,
            queue_pairs: 1,
            mtu: None,
            mac: None,
            speed_mbps: None,
            without: Features::empty(),
            postcopy: false,
            in_band: false,
            mode: 0o600,
        }
    }

    /// The features a port with these options offers.
    ///
    /// RING_RESET is not among them: vhost-user has no message for it, and QEMU (10.0) has a guest reset its rings without telling
    /// the back-end, which would go on writing to pages that have another use by then.
    #[must_use]
    pub fn features(&self) -> Features {
        let mut offered = Features::VERSION_1
            | Features::ANY_LAYOUT
            | Features::MRG_RXBUF
            | Features::INDIRECT_DESC
            | Features::EVENT_IDX
            | Features::RING_PACKED
            | Features::IN_ORDER
            | Features::MTU
            | Features::GUEST_ANNOUNCE
            | Features::STATUS
            | Features::ACCESS_PLATFORM
            | OFFLOADS
            | CONTROLS;
        if self.mac.is_some() {
            offered |= Features::MAC;
        }
        if self.speed_mbps.is_some() {
            offered |= Features::SPEED_DUPLEX;
        }
        if self.queue_pairs > 1 {
            offered |= Features::MQ | Features::RSS;
        }
        (offered - self.without).with_needs()
    }
}

/// A vhost-user port, device side, or one worker's part of it.
#[derive(Debug)]
pub struct VhostUserPort {
    slot: Arc<Slot<Queues>>,
    held: Option<Held<Queues>>,
    /// Kicks and the slot's bell.
    poller: Arc<Poller>,
    service: Arc<Served<BackendService>>,
    events: EventLog,
}

impl VhostUserPort {
    /// Makes a port that `control` serves; it listens, or tries to connect, when this returns.
    ///
    /// # Errors
    /// An impossible option; a socket path that is in use, missing or not allowed.
    pub fn new(options: VhostUserOptions, control: &Control) -> Result<Self, PortError> {
        let mut lanes = Self::in_lanes(options, 1, control)?;
        lanes.pop().ok_or(PortError::NoService)
    }

    /// Makes a port in up to `n` parts, each for a worker of its own: one for each queue pair at most, with every `n`-th pair.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn in_lanes(
        options: VhostUserOptions,
        n: usize,
        control: &Control,
    ) -> Result<Vec<Self>, PortError> {
        if !(1..=128).contains(&options.queue_pairs) {
            return Err(PortError::Option {
                option: "queue_pairs",
                found: options.queue_pairs.to_string(),
                expected: "1 to 128".to_owned(),
            });
        }
        let failed = |source| PortError::io("make a vhost-user port", source);
        let needs_reset = Arc::<AtomicBool>::default();
        let missed = Missed::new().map_err(failed)?;
        let lane = |pairs| {
            let poller = Arc::new(Poller::new()?);
            let misses = missed.of_worker();
            let queues = Queues::new(pairs, Arc::clone(&poller), Arc::clone(&needs_reset), misses);
            let slot = Slot::new(queues)?;
            poller.add(&*slot, queues::BELL)?;
            Ok((slot, poller))
        };
        let lanes: io::Result<Vec<_>> = Lanes::share(options.queue_pairs, n).map(lane).collect();
        let lanes = lanes.map_err(failed)?;
        let slots = Lanes::new(lanes.iter().map(|(slot, _)| Arc::clone(slot)).collect());
        let service = BackendService::new(options, slots, needs_reset, missed)?;
        let events = service.events();
        let service = Arc::new(control.add(service)?);
        let port = |(slot, poller)| Self {
            slot,
            held: None,
            poller,
            service: Arc::clone(&service),
            events: events.clone(),
        };
        Ok(lanes.into_iter().map(port).collect())
    }

    /// How the session stands.
    ///
    /// # Errors
    /// The control thread does not answer.
    pub fn status(&self) -> Result<VhostUserStatus, PortError> {
        self.service.call(|service| service.status())
    }

    /// Takes the link down, or up again; the front-end is told if it wants to be. While it is down no packet passes.
    ///
    /// # Errors
    /// The control thread does not answer, or a worker.
    pub fn set_link(&self, up: bool) -> Result<(), PortError> {
        self.service.call(move |service| service.set_link(up))?
    }

    /// A handle to ask for the status while the port itself is with a worker.
    #[must_use]
    pub fn watch(&self) -> VhostUserWatch {
        VhostUserWatch {
            service: Arc::downgrade(&self.service),
            events: self.events.clone(),
        }
    }
}

/// Asks a port for its status, wherever the port is.
#[derive(Clone, Debug)]
pub struct VhostUserWatch {
    service: Weak<Served<BackendService>>,
    events: EventLog,
}

impl VhostUserWatch {
    /// How the session stands.
    ///
    /// # Errors
    /// The port is gone, or the control thread does not answer.
    pub fn status(&self) -> Result<VhostUserStatus, PortError> {
        let service = self.service.upgrade().ok_or(PortError::NoService)?;
        service.call(|service| service.status())
    }

    /// How all rings stand, in order of their numbers.
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
        &self.events
    }

    /// As [`VhostUserPort::set_link`].
    ///
    /// # Errors
    /// The port is gone, or the control thread does not answer, or a worker.
    pub fn set_link(&self, up: bool) -> Result<(), PortError> {
        let service = self.service.upgrade().ok_or(PortError::NoService)?;
        service.call(move |service| service.set_link(up))?
    }

    /// How the sessions of many ports stand, asked in one visit to their control thread.
    ///
    /// # Errors
    /// As [`Self::status`], each for itself.
    pub fn status_of_all(watches: &[Self]) -> Vec<Result<VhostUserStatus, PortError>> {
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

impl Port for VhostUserPort {
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

    fn is_up(&self) -> bool {
        self.held
            .as_ref()
            .is_some_and(|queues| queues.running().1 > 0)
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

/// What a running ring is asked for by the session, in the terms of the queues.
fn queue_config(setup: &virtnet_vhost::RingSetup, features: Features, base: u32) -> QueueConfig {
    use virtnet_mem::UserAddr;
    QueueConfig {
        size: setup.size,
        desc_area: UserAddr(setup.addresses.descriptor_area),
        driver_area: UserAddr(setup.addresses.driver_area),
        device_area: UserAddr(setup.addresses.device_area),
        base,
        features,
    }
}

/// The format of rings under these features, for reports.
fn format_name(features: Features) -> &'static str {
    RingFormat::of(features).name()
}
