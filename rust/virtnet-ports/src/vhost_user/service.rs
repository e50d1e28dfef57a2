//! The control half of a vhost-user port: waits for a front-end, serves it, and waits again when it has left.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtnet_mem::{
    DirtyLog, GuestAddr, GuestMemory, Iotlb, Miss, Region, UserAddr, arm_guard, losses,
};
use virtnet_sys::{EventFd, Interest, Listener, Stream, Userfault, monotonic_ns};
use virtnet_vhost::message::BackRequest;
use virtnet_vhost::payload::{self, InflightArea, MemoryRegion};
use virtnet_vhost::{
    Backend, BackendDevice, DeviceError, InflightFile, LogFile, Offer, ProtocolFeatures, Refusal,
    RingAddresses, RingSetup, SessionError,
};
use virtnet_virtio::net::rss::{HashTypes, KEY_MAX, TABLE_MAX};
use virtnet_virtio::net::{NetConfig, RssConfig};
use virtnet_virtio::{Features, RingFormat};

use super::controlq::ControlHalf;
use super::inflight::Record;
use super::iommu::{Asked, Missed, Translations};
use super::lanes::Lanes;
use super::queues::Queues;
use super::state::State;
use super::{VhostUserOptions, format_name};
use crate::control::Service;
use crate::events::{EventLog, Peer, What};
use crate::{PortError, RingStatus};

/// How often a client tries to connect.
const RETRY_NS: u64 = 200_000_000;

/// How often a connection is asked whether it stands still.
const TICK_NS: u64 = 1_000_000_000;

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
        let now_ns = device.now_ns;
        let Some(translations) = &mut device.translations else {
            return;
        };
        let asked = translations.note_asked(miss, now_ns);
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
        } else if !self.device.regions.is_empty() {
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
        status.config = Some(session.device.config);
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
        let device = Device {
            lanes: self.lanes.clone(),
            config: self.config(),
            regions: Vec::new(),
            reached: Step::Greeting,
            log: None,
            logging: false,
            events: self.events.clone(),
            format: RingFormat::Split,
            record: None,
            memory: Arc::default(),
            translations: None,
            now_ns,
            features: Features::empty(),
            mtu: None,
            userfault: None,
            control: ControlHalf::new(self.options.queue_pairs),
        };
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
        self.deadline_ns = Some(now_ns + TICK_NS);
    }

    /// The configuration space as a session finds it.
    fn config(&self) -> NetConfig {
        NetConfig {
            mac: self.options.mac,
            link_up: Some(self.link_up),
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
        let lost = |session: &mut Session| {
            let peer = session.peer_pid.map(|pid| format!("process {pid}"));
            let peer = peer.unwrap_or_else(|| "the front-end".to_owned());
            let device = &session.device;
            if device.log.as_ref().is_some_and(|log| log.is_lost()) {
                return Some(SessionError::LogLost { peer });
            }
            let region = device.regions.iter().find(|region| region.is_lost())?;
            Some(SessionError::MemoryLost {
                peer,
                guest_addr: region.guest().0,
                size: region.size(),
            })
        };
        if let Some(error) = self.session.as_mut().and_then(lost) {
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
        session.device.now_ns = now_ns;
        let served = work(&mut session.backend, &mut session.device);
        if session.device.control.serve(&session.device.lanes) {
            session.backend.set_needs_reset();
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
                self.deadline_ns = Some(now_ns + TICK_NS);
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

/// The device that a session changes: a network device behind its slots.
struct Device {
    lanes: Lanes,
    config: NetConfig,
    /// What the memory is made of, so that slots can come and go.
    regions: Vec<Region>,
    /// How far the front-end has come; it may be gone before anybody asks.
    reached: Step,
    /// Where writes are logged while they are, which the features say.
    log: Option<Arc<DirtyLog>>,
    logging: bool,
    events: EventLog,
    /// Which format the features say.
    format: RingFormat,
    /// Where rings record what is in flight, where the front-end wants that.
    record: Option<Record>,
    memory: Arc<GuestMemory>,
    /// With an IOMMU: what the front-end has told.
    translations: Option<Translations>,
    /// The time of what is being served.
    now_ns: u64,
    features: Features,
    /// The longest packet, if the front-end has said so.
    mtu: Option<u16>,
    /// What faults in the memory are told to, while pages of it are still to come.
    userfault: Option<Userfault>,
    control: ControlHalf,
}

impl Device {
    /// Makes `regions` the memory of the queues. With an IOMMU nothing is known of it then.
    fn install(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        if let Some(translations) = &mut self.translations {
            translations.clear();
        }
        self.show(regions)
    }

    /// Lets the queues see `regions`, logged and translated as it is now.
    fn show(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        let log = self.log.clone().filter(|_| self.logging);
        let memory = Arc::new(GuestMemory::new(regions.clone())?.with_log(log));
        let seen = match &self.translations {
            None => Arc::clone(&memory),
            Some(translations) => translations.view(&memory),
        };
        self.control.set_memory(&seen);
        self.lanes
            .run_all(move |queues| queues.set_memory(Arc::clone(&seen)))?;
        (self.regions, self.memory) = (regions, memory);
        Ok(())
    }

    /// The same, because the front-end says so.
    fn install_new(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        self.install(regions)?;
        self.reached = self.reached.max(Step::Memory);
        self.events.record(What::Memory {
            regions: self.regions.len(),
            bytes: self.regions.iter().map(Region::size).sum(),
        });
        Ok(())
    }

    /// Makes the memory anew, because it is logged elsewhere from now on, or not any more.
    fn install_again(&mut self) -> Result<(), DeviceError> {
        self.show(self.regions.clone())
    }

    /// Lets the queues see translations that differ in `size` bytes at `iova`, at their next look.
    fn post_view(&self, iova: u64, size: u64) {
        if let Some(translations) = &self.translations {
            let view = translations.view(&self.memory);
            self.lanes
                .post_all(move |queues| queues.set_view(Arc::clone(&view), iova, size));
        }
    }

    /// A page has no translation: what needs it is given back.
    fn refuse(&mut self, iova: u64) {
        if let Some(translations) = &mut self.translations {
            translations.refuse(iova, self.now_ns);
            self.post_view(iova, Iotlb::PAGE);
        }
    }

    /// The page that was refused last.
    fn last_refused(&self) -> Option<u64> {
        self.translations.as_ref()?.last_refused
    }

    /// Refuses what was not told in time, and lets go of refusals that are old.
    fn forget_and_refuse(&mut self) {
        let now_ns = self.now_ns;
        let Some(translations) = &mut self.translations else {
            return;
        };
        let (overdue, forgiven) = (translations.overdue(now_ns), translations.forgive(now_ns));
        if forgiven {
            // Nothing is known that was not, but rings that wait may ask again.
            self.post_view(u64::MAX, 1);
        }
        for iova in overdue {
            self.refuse(iova);
        }
    }
}

fn map(region: virtnet_vhost::Region) -> Result<Region, DeviceError> {
    let MemoryRegion {
        guest_addr,
        size,
        user_addr,
        mmap_offset,
    } = region.layout;
    Ok(Region::map_file(
        region.file,
        mmap_offset,
        size,
        GuestAddr(guest_addr),
        UserAddr(user_addr),
    )?)
}

impl BackendDevice for Device {
    fn set_features(&mut self, features: u64) -> Result<(), DeviceError> {
        let features = Features::from_bits_retain(features);
        self.features = features;
        self.lanes
            .run_all(move |queues| queues.set_features(features))?;
        self.format = RingFormat::of(features);
        let logging = features.contains(Features::LOG_ALL);
        if std::mem::replace(&mut self.logging, logging) != logging && self.log.is_some() {
            self.install_again()?;
        }
        if self.control.set_features(features) {
            self.reset();
        }
        self.reached = self.reached.max(Step::Features);
        self.events.record(What::Features {
            features: features.bits(),
        });
        let translates = features.contains(Features::ACCESS_PLATFORM);
        if translates != self.translations.is_some() {
            // No ring runs while features change.
            self.translations = translates.then(Translations::default);
            self.install(self.regions.clone())?;
        }
        Ok(())
    }

    fn set_memory(&mut self, regions: Vec<virtnet_vhost::Region>) -> Result<(), DeviceError> {
        let regions = regions.into_iter().map(map).collect::<Result<_, _>>()?;
        self.install_new(regions)
    }

    fn add_memory(&mut self, region: virtnet_vhost::Region) -> Result<(), DeviceError> {
        let mut regions = self.regions.clone();
        regions.push(map(region)?);
        self.install_new(regions)
    }

    fn remove_memory(&mut self, region: MemoryRegion) -> Result<(), DeviceError> {
        let mut regions = self.regions.clone();
        regions.retain(|r| {
            (r.guest().0, r.user().0, r.size())
                != (region.guest_addr, region.user_addr, region.size)
        });
        self.install_new(regions)
    }

    fn set_log(&mut self, log: LogFile) -> Result<(), DeviceError> {
        let (area, file) = (log.area, log.file);
        let log = DirtyLog::map_file(file, area.mmap_offset, area.mmap_size)
            .map_err(|error| format!("the dirty log cannot be mapped: {error}"))?;
        self.log = Some(Arc::new(log));
        if self.logging {
            self.install_again()?;
        }
        Ok(())
    }

    fn make_inflight(&mut self, area: InflightArea) -> Result<InflightFile, DeviceError> {
        Record::make(area, self.format)
    }

    fn set_inflight(&mut self, record: InflightFile) -> Result<(), DeviceError> {
        self.record = Some(Record::map(record)?);
        Ok(())
    }

    fn start_ring(&mut self, ring: usize, setup: RingSetup) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            return self.control.start(setup, &self.lanes);
        }
        let started = What::RingStarted {
            ring,
            size: setup.size,
            base: setup.base,
            enabled: setup.enabled,
        };
        let record = match &self.record {
            Some(record) => record.window(ring, setup.size, self.format)?,
            None => None,
        };
        self.lanes.run(ring, move |queues, ring| {
            queues.start_ring(ring, setup, record)
        })??;
        self.reached = self.reached.max(Step::Rings);
        self.events.record(started);
        Ok(())
    }

    fn stop_ring(&mut self, ring: usize) -> Result<Option<u32>, DeviceError> {
        if ring == self.control.number() {
            return Ok(self.control.stop());
        }
        let base = self
            .lanes
            .run(ring, |queues, ring| queues.stop_ring(ring))?;
        self.events.record(What::RingStopped { ring, base });
        Ok(base)
    }

    fn enable_ring(&mut self, ring: usize, enabled: bool) {
        if ring == self.control.number() {
            return self.control.enable(enabled);
        }
        // A worker that does not answer has been reported by the call before, and will be by the next.
        drop(
            self.lanes
                .run(ring, move |queues, ring| queues.enable_ring(ring, enabled)),
        );
        self.events.record(What::RingEnabled { ring, enabled });
    }

    fn set_kick(&mut self, ring: usize, kick: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            return self.control.set_kick(kick);
        }
        self.lanes
            .run(ring, |queues, ring| queues.set_kick(ring, kick))?
    }

    fn set_call(&mut self, ring: usize, call: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            self.control.set_call(call);
            return Ok(());
        }
        Ok(self
            .lanes
            .run(ring, |queues, ring| queues.set_call(ring, call))?)
    }

    fn set_err(&mut self, ring: usize, err: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            self.control.set_err(err);
            return Ok(());
        }
        Ok(self
            .lanes
            .run(ring, |queues, ring| queues.set_err(ring, err))?)
    }

    fn set_addresses(&mut self, ring: usize, addresses: RingAddresses) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            return self.control.set_addresses(addresses);
        }
        self.lanes.run(ring, move |queues, ring| {
            queues.set_addresses(ring, addresses)
        })?
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), DeviceError> {
        // Which worker says it is all the same.
        Ok(self
            .lanes
            .run(0, move |queues, _| queues.set_moved_here(mac))?)
    }

    fn reset(&mut self) {
        self.control.reset(None);
        // A worker that does not answer has been reported by the call before, and will be by the next.
        drop(self.lanes.set_settings(None));
        self.events.record(What::Reset);
    }

    fn advise_postcopy(&mut self) -> Result<OwnedFd, DeviceError> {
        self.end_postcopy();
        let userfault = Userfault::new()?;
        let theirs = userfault.to_owned_fd()?;
        self.userfault = Some(userfault);
        Ok(theirs)
    }

    fn mapped_at(&self, region: &MemoryRegion) -> u64 {
        let key = (region.guest_addr, region.size);
        let mut regions = self.regions.iter();
        let mapped = regions.find(|mapped| (mapped.guest().0, mapped.size()) == key);
        mapped.map_or(0, Region::host_addr)
    }

    fn catch_faults(&mut self) -> Result<(), DeviceError> {
        let userfault = self.userfault.as_ref();
        let userfault = userfault.ok_or("nobody has asked for faults to be caught")?;
        for region in &self.regions {
            region.catch_faults(userfault.as_fd()).map_err(|error| {
                let (at, size) = (region.guest(), region.size());
                format!("the kernel does not catch faults in the region at {at} ({size:#x} bytes): {error}")
            })?;
        }
        Ok(())
    }

    fn end_postcopy(&mut self) {
        let Some(userfault) = self.userfault.take() else {
            return;
        };
        for region in &self.regions {
            // One that was never registered says so, and has nobody waiting.
            drop(region.release_faults(userfault.as_fd()));
        }
    }

    fn save_state(&mut self) -> Result<Vec<u8>, DeviceError> {
        let state = State {
            features: self.features - Features::LOG_ALL,
            mtu: self.mtu,
        };
        Ok(state.to_bytes())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let state = State::from_bytes(state)?;
        let (saved, ours) = (state.features, self.features - Features::LOG_ALL);
        // QEMU loads the state of a device before it has told the features.
        if !ours.is_empty() && saved != ours {
            let differ = saved ^ ours;
            return Err(
                format!("the state was saved under other features: {differ:?} differ").into(),
            );
        }
        if let Some(mtu) = state.mtu {
            self.set_mtu(mtu)?;
        }
        Ok(())
    }

    fn refused(&mut self, refusal: &Refusal) {
        self.events.record(What::Refused {
            why: refusal.to_string(),
        });
    }

    fn translate(&mut self, change: payload::Iotlb) -> Result<(), DeviceError> {
        let Some(translations) = &mut self.translations else {
            return Err("no addresses are translated".into());
        };
        let (iova, size) = (change.iova, change.size);
        if change.kind == payload::Iotlb::UPDATE {
            translations.insert(&self.memory, &change)?;
            self.post_view(iova, size);
            return Ok(());
        }
        translations.remove(iova, size);
        let view = translations.view(&self.memory);
        let see = move |queues: &mut Queues| queues.set_view(Arc::clone(&view), iova, size);
        // The front-end has its answer when every worker has let go.
        let seen = self.lanes.run_all(see.clone());
        if seen.is_err() {
            self.lanes.post_all(see);
        }
        seen?;
        Ok(())
    }

    fn answered(&mut self, request: &BackRequest, code: u64) {
        match request {
            BackRequest::IotlbMsg(miss) if code != 0 => self.refuse(miss.iova),
            _ => {}
        }
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), DeviceError> {
        self.config.mtu = Some(mtu);
        self.mtu = Some(mtu);
        Ok(())
    }

    fn read_config(&mut self, offset: u32, buffer: &mut [u8]) {
        let space = self.config.to_bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        let rest = rest.unwrap_or_default();
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
    }

    fn disconnected(&mut self) {
        // A worker that waits for a page would wait for ever.
        self.end_postcopy();
        self.regions.clear();
        self.log = None;
        self.logging = false;
        self.record = None;
        self.control = ControlHalf::new(self.control.pairs());
        // When the worker does not answer in time the change waits for it all the same.
        self.lanes.post_all(Queues::stop_all);
    }
}
