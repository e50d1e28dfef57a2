//! The control half of a vhost-user port: waits for a front-end, serves it, and waits again when it has left.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtnet_mem::{Iotlb, Miss, arm_guard, losses};
use virtnet_packet::header::Mac;
use virtnet_sys::{Interest, Listener, Stream, monotonic_ns};
use virtnet_vhost::message::BackRequest;
use virtnet_vhost::payload;
use virtnet_vhost::{Backend, Offer, ProtocolFeatures, SessionError};
use virtnet_virtio::Features;
use virtnet_virtio::net::rss::{HashTypes, KEY_MAX, TABLE_MAX};
use virtnet_virtio::net::{NetConfig, RssConfig};

use super::controlq::ControlHalf;
use super::device::Device;
use super::iommu::{Asked, Missed};
use super::lanes::Lanes;
use super::queues::Queues;
use super::{VhostUserOptions, format_name};
use crate::control::{Service, next_tick_ns};
use crate::events::{EventLog, Peer, What};
use crate::{PortError, RingStatus};

/// How often a client tries to connect.
const RETRY_NS: u64 = 200_000_000;

/// The MTU that is told where nobody has chosen one: that of Ethernet.
const MTU: u16 = 1500;

/// How far a front-end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// It is there.
    Greeting,
    /// It has agreed on features.
    Features,
    /// It has handed over its memory.
    Memory,
    /// It has started rings.
    Rings,
    /// Packets can flow.
    Running,
}

impl Step {
    /// Its name, in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Greeting => "greeting",
            Self::Features => "features",
            Self::Memory => "memory",
            Self::Rings => "rings",
            Self::Running => "running",
        }
    }
}

/// How a vhost-user session stands.
#[derive(Clone, Debug, Default)]
pub struct VhostUserStatus {
    /// `"listening"`, `"connecting"`, `"connected"` (a front-end is there), `"running"` (packets can flow).
    pub state: &'static str,
    /// How far the front-end has come, while it is there.
    pub step: Option<Step>,
    /// How far the last one had come that left.
    pub last_step: Option<Step>,
    /// Process that the front-end is.
    pub peer_pid: Option<i32>,
    /// Features offered.
    pub offered: u64,
    /// Features negotiated, while a front-end is there.
    pub negotiated: u64,
    /// Protocol features negotiated.
    pub protocol: u64,
    /// `"split"` or `"packed"`, while a front-end is there.
    pub ring_format: Option<&'static str>,
    /// Queue pairs whose transmitq runs.
    pub sources: usize,
    /// Queue pairs whose receiveq runs and is enabled.
    pub sinks: usize,
    /// Sessions so far.
    pub sessions: u64,
    /// Messages refused in all sessions.
    pub refusals: u64,
    /// Whether the link is up.
    pub link_up: bool,
    /// What the configuration space tells, while a front-end is there.
    pub config: Option<NetConfig>,
    /// What ended the last session, or was refused last, or why we cannot connect.
    pub last_error: Option<String>,
}

/// Serves one socket.
pub(super) struct BackendService {
    options: VhostUserOptions,
    listener: Option<Listener>,
    session: Option<Session>,
    lanes: Lanes,
    /// A ring had to be given up since the last look.
    needs_reset: Arc<AtomicBool>,
    /// What [`losses`] was at the last tick.
    losses: u64,
    /// What the queues have no translations for.
    missed: Missed,
    deadline_ns: Option<u64>,
    link_up: bool,
    sessions: u64,
    refusals: u64,
    last_error: Option<String>,
    last_step: Option<Step>,
    events: EventLog,
}

/// A front-end that is there, and the device it sees.
struct Session {
    backend: Backend,
    device: Device,
    peer_pid: Option<i32>,
    /// How far it has come at most.
    step: Step,
}

impl Session {
    /// Asks the front-end for a translation that a queue misses.
    fn ask(&mut self, miss: Miss) {
        let Self {
            backend, device, ..
        } = self;
        let asked = device.note_asked(miss);
        if asked == Asked::Before {
            return;
        }
        let message = BackRequest::IotlbMsg(payload::Iotlb {
            iova: miss.iova,
            size: Iotlb::PAGE,
            user_addr: 0,
            permission: miss.wanted.bits(),
            kind: payload::Iotlb::MISS,
        });
        if asked == Asked::TooMuch || !backend.ask(message) {
            device.refuse(miss.iova);
        }
    }

    /// How far it has come, as far as the session alone tells.
    fn step(&self) -> Step {
        let session = self.backend.session();
        if session.runs() {
            Step::Rings
        } else if self.device.has_memory() {
            Step::Memory
        } else if session.features().is_some() {
            Step::Features
        } else {
            Step::Greeting
        }
    }
}

impl BackendService {
    pub(super) fn new(
        mut options: VhostUserOptions,
        lanes: Lanes,
        needs_reset: Arc<AtomicBool>,
        missed: Missed,
    ) -> Result<Self, PortError> {
        let listener = if options.client {
            None
        } else {
            Some(Listener::bind_with_mode(&options.path, options.mode)?)
        };
        let deadline_ns = options.client.then(monotonic_ns);
        if lanes.len() > 1 {
            // A hash may point at a queue of another worker.
            options.without |= Features::RSS;
        }
        Ok(Self {
            options,
            listener,
            session: None,
            lanes,
            needs_reset,
            losses: losses(),
            missed,
            deadline_ns,
            link_up: true,
            sessions: 0,
            refusals: 0,
            last_error: None,
            last_step: None,
            events: EventLog::default(),
        })
    }

    /// What has happened so far.
    pub(super) fn events(&self) -> EventLog {
        self.events.clone()
    }

    /// How all rings stand, in order of their numbers.
    pub(super) fn rings(&self) -> Vec<RingStatus> {
        let lanes = self.lanes.run_all(|queues| queues.rings());
        let lanes = lanes.unwrap_or_default().into_iter().enumerate();
        let mut rings: Vec<RingStatus> = lanes
            .flat_map(|(lane, rings)| {
                rings.into_iter().map(move |ring| RingStatus {
                    index: self.lanes.ring_of(lane, ring.index),
                    ..ring
                })
            })
            .collect();
        rings.sort_by_key(|ring| ring.index);
        if let Some(session) = &self.session {
            for ring in &mut rings {
                ring.enabled = session.backend.ring_state(ring.index).enabled;
            }
        }
        rings
    }

    /// Tells of rings that had to be given up.
    fn tell_broken(&self) {
        let lanes = self.lanes.run_all(Queues::take_untold).unwrap_or_default();
        for (lane, broken) in lanes.into_iter().enumerate() {
            for (ring, why) in broken {
                self.events.record(What::RingBroken {
                    ring: self.lanes.ring_of(lane, ring),
                    why: why.to_string(),
                });
            }
        }
    }

    pub(super) fn status(&self) -> VhostUserStatus {
        let offered = self.options.features();
        let mut status = VhostUserStatus {
            state: if self.options.client {
                "connecting"
            } else {
                "listening"
            },
            offered: offered.bits(),
            sessions: self.sessions,
            refusals: self.refusals,
            link_up: self.link_up,
            last_error: self.last_error.clone(),
            last_step: self.last_step,
            ..VhostUserStatus::default()
        };
        let Some(session) = &self.session else {
            return status;
        };
        let lanes = self
            .lanes
            .run_all(|queues| (queues.features(), queues.running(), queues.broken()));
        let Ok(lanes) = lanes else {
            return status;
        };
        let (mut features, mut broken) = (Features::empty(), None);
        let (mut sources, mut sinks) = (0, 0);
        for (lane, (agreed, running, given_up)) in lanes.into_iter().enumerate() {
            features = agreed;
            (sources, sinks) = (sources + running.0, sinks + running.1);
            let in_device = given_up.map(|(ring, why)| (self.lanes.ring_of(lane, ring), why));
            broken = broken.or(in_device);
        }
        (status.state, status.step) = if sources > 0 && sinks > 0 {
            ("running", Some(Step::Running))
        } else {
            ("connected", Some(session.step()))
        };
        status.config = Some(session.device.config());
        status.peer_pid = session.peer_pid;
        status.negotiated = features.bits();
        status.protocol = session.backend.session().protocol_features().bits();
        status.ring_format = Some(format_name(features));
        (status.sources, status.sinks) = (sources, sinks);
        status.refusals += session.backend.counters().1;
        let control = session.device.control.broken();
        if let Some((ring, why)) = broken {
            status.last_error = Some(format!("ring {ring} was stopped, {why}"));
        } else if let Some(why) = control {
            status.last_error = Some(format!("the control queue was stopped, {why}"));
        } else if let Some(refusal) = session.backend.last_refusal() {
            status.last_error = Some(refusal.to_string());
        } else if let Some(iova) = session.device.last_refused() {
            status.last_error = Some(format!(
                "the front-end told no translation for I/O address {iova:#x}, which the driver uses"
            ));
        } else if let Some(error) = session.backend.channel_error() {
            status.last_error = Some(format!("the back-end's channel was given up: {error}"));
        }
        status
    }

    /// Takes the link down, or up, and tells whoever is there.
    pub(super) fn set_link(&mut self, up: bool) -> Result<(), PortError> {
        self.lanes.run_all(move |queues| queues.set_link(up))?;
        self.link_up = up;
        if let Some(session) = &mut self.session
            && session.device.config.link_up != Some(up)
        {
            session.device.config.link_up = Some(up);
            session.backend.config_changed();
        }
        Ok(())
    }

    fn begin(&mut self, stream: Stream, now_ns: u64) {
        let protocol = ProtocolFeatures::MQ
            | ProtocolFeatures::LOG_SHMFD
            | ProtocolFeatures::RARP
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::MTU
            | ProtocolFeatures::BACKEND_REQ
            | ProtocolFeatures::CONFIG
            | ProtocolFeatures::BACKEND_SEND_FD
            | ProtocolFeatures::STATUS
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS
            | ProtocolFeatures::INFLIGHT_SHMFD
            | ProtocolFeatures::GET_VRING_BASE_INFLIGHT
            | ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN
            | ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::DEVICE_STATE
            | ProtocolFeatures::GPA_ADDRESSES;
        let optional = [
            (self.options.postcopy, ProtocolFeatures::PAGEFAULT),
            (self.options.in_band, ProtocolFeatures::INBAND_NOTIFICATIONS),
        ];
        let chosen = optional.iter().filter(|(wanted, _)| *wanted);
        let protocol = chosen.fold(protocol, |all, (_, one)| all | *one);
        let peer_pid = stream.peer().ok().map(|peer| peer.pid);
        let mut offer = Offer::new(
            self.options.features().bits(),
            protocol,
            self.options.queue_pairs,
        );
        if let Some(mtu) = self.options.mtu {
            offer.mtu = 68..=mtu;
        }
        if self.options.features().contains(Features::CTRL_VQ) {
            offer.rings += 1;
        }
        let device = Device::new(
            self.lanes.clone(),
            self.config(),
            ControlHalf::new(
                self.options.queue_pairs,
                self.options.mac.map(Mac),
                self.missed.of_worker(),
            ),
            self.events.clone(),
            now_ns,
        );
        self.events.record(What::Connected {
            peer: Peer::FrontEnd,
            pid: peer_pid,
        });
        self.session = Some(Session {
            backend: Backend::new(stream, offer),
            device,
            peer_pid,
            step: Step::Greeting,
        });
        self.sessions += 1;
        self.last_error = None;
        self.deadline_ns = Some(next_tick_ns(now_ns));
    }

    /// The configuration space as a session finds it.
    fn config(&self) -> NetConfig {
        NetConfig {
            mac: self.options.mac,
            link_up: Some(self.link_up),
            announce: false,
            max_queue_pairs: Some(self.options.queue_pairs),
            mtu: Some(self.options.mtu.unwrap_or(MTU)),
            speed_mbps: self.options.speed_mbps,
            full_duplex: self.options.speed_mbps.map(|_| true),
            rss: Some(RssConfig {
                max_key_len: u8::try_from(KEY_MAX).unwrap_or(u8::MAX),
                max_table_len: u16::try_from(TABLE_MAX).unwrap_or(u16::MAX),
                hash_types: HashTypes::SUPPORTED.bits(),
            }),
        }
    }

    /// The session is over; the device is told if it has not been.
    fn end(&mut self, error: &SessionError, now_ns: u64) {
        if let Some(mut session) = self.session.take() {
            self.refusals += session.backend.counters().1;
            self.last_step = Some(session.step.max(session.device.reached));
            session.backend.close(&mut session.device);
        }
        self.last_error = match error {
            SessionError::Disconnected => None,
            error => Some(error.to_string()),
        };
        self.events.record(What::Disconnected {
            peer: Peer::FrontEnd,
            why: self.last_error.clone(),
        });
        self.deadline_ns = self.options.client.then_some(now_ns + RETRY_NS);
    }

    /// Ends a session whose memory goes away under it; its rings have stopped by then, if a worker has them.
    fn look_for_losses(&mut self, now_ns: u64) {
        // Whoever took the signal since the last tick did not know that it is ours.
        arm_guard();
        if losses() == self.losses {
            return;
        }
        self.losses = losses();
        let lost = |session: &Session| {
            let peer = session.peer_pid.map(|pid| format!("process {pid}"));
            let peer = peer.unwrap_or_else(|| "the front-end".to_owned());
            session.device.lost(peer)
        };
        if let Some(error) = self.session.as_ref().and_then(lost) {
            self.end(&error, now_ns);
        }
    }

    fn serve(
        &mut self,
        now_ns: u64,
        work: impl FnOnce(&mut Backend, &mut Device) -> Result<(), SessionError>,
    ) {
        let was_broken = self.needs_reset.swap(false, Ordering::Relaxed);
        if was_broken {
            self.tell_broken();
        }
        let Some(session) = &mut self.session else {
            return;
        };
        if was_broken {
            session.backend.set_needs_reset();
        }
        session.device.set_now(now_ns);
        let served = work(&mut session.backend, &mut session.device);
        if session.device.control.serve(&session.device.lanes) {
            session.backend.set_needs_reset();
        }
        if session.device.take_news() {
            session.backend.config_changed();
        }
        for miss in self.missed.take() {
            session.ask(miss);
        }
        match served {
            Ok(()) => session.step = session.step.max(session.step()),
            Err(error) => self.end(&error, now_ns),
        }
    }
}

impl Service for BackendService {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        match (&self.session, &self.listener) {
            (Some(session), _) => Some(session.backend.as_fd()),
            (None, Some(listener)) => Some(listener.as_fd()),
            (None, None) => None,
        }
    }

    fn more_sources(&self) -> Vec<(BorrowedFd<'_>, Interest)> {
        let backend = self.session.as_ref().map(|session| &session.backend);
        let channel = backend.and_then(Backend::channel);
        let channel = channel.map(|(fd, wants_write)| (fd, Interest::of(wants_write)));
        let calls = backend.and_then(Backend::calls);
        let calls = calls.map(|fd| (fd, Interest::Readable));
        let bell = (self.missed.bell().as_fd(), Interest::Readable);
        let control = self
            .session
            .as_ref()
            .and_then(|session| session.device.control.wait_fd());
        let control = control.map(|fd| (fd, Interest::Readable));
        channel
            .into_iter()
            .chain(calls)
            .chain([bell])
            .chain(control)
            .collect()
    }

    fn interest(&self) -> Interest {
        Interest::of(matches!(&self.session, Some(session) if session.backend.wants_write()))
    }

    fn on_ready(&mut self, now_ns: u64) -> Result<(), PortError> {
        if self.session.is_none() {
            // Nobody is there to be asked any more.
            self.missed.take().for_each(drop);
            let Some(listener) = &self.listener else {
                return Ok(());
            };
            match listener.accept() {
                Ok(stream) => self.begin(stream, now_ns),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    let path = self.options.path.display();
                    return Err(PortError::io(
                        format!("accept a front-end on {path}"),
                        error,
                    ));
                }
            }
            return Ok(());
        }
        self.serve(now_ns, |backend, device| {
            if backend.wants_write() {
                backend.on_writable(device)?;
            }
            backend.on_readable(device)
        });
        Ok(())
    }

    fn deadline_ns(&self) -> Option<u64> {
        let control = self.session.as_ref().map(|session| &session.device.control);
        let control = control.and_then(|control| control.deadline_ns(monotonic_ns()));
        self.deadline_ns.into_iter().chain(control).min()
    }

    fn on_timer(&mut self, now_ns: u64) -> Result<(), PortError> {
        if self.session.is_some() {
            // Or it is the control queue that nobody kicks.
            let is_tick = self.deadline_ns.is_none_or(|deadline| deadline <= now_ns);
            if is_tick {
                self.deadline_ns = Some(next_tick_ns(now_ns));
            }
            self.serve(now_ns, |backend, device| match is_tick {
                true => {
                    device.forget_and_refuse();
                    backend.on_tick(now_ns, device)
                }
                false => Ok(()),
            });
            if is_tick {
                self.look_for_losses(now_ns);
            }
            return Ok(());
        }
        self.deadline_ns = self.options.client.then_some(now_ns + RETRY_NS);
        if self.options.client {
            match Stream::connect(&self.options.path) {
                Ok(stream) => self.begin(stream, now_ns),
                // Nobody listens yet: that is what trying again is for.
                Err(error) => {
                    let why = error.to_string();
                    self.last_error = Some(why.clone());
                    self.events.record_if_new(What::Nobody { why });
                }
            }
        }
        Ok(())
    }
}

impl Drop for BackendService {
    fn drop(&mut self) {
        if let Some(mut session) = self.session.take() {
            session.backend.close(&mut session.device);
        }
    }
}
