//! The control half of a virtio-user port: finds a back-end, negotiates with it, and starts over when it has gone.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtnet_sys::{Interest, Listener, Stream, monotonic_ns};
use virtnet_vhost::message::RequestKind;
use virtnet_vhost::payload::{InflightArea, MemoryRegion};
use virtnet_vhost::{
    Frontend, FrontendEvent, FrontendRing, FrontendSetup, InflightFile, InflightSetup, Offered,
    ProtocolFeatures, Region, RingAddresses, SessionError,
};
use virtnet_virtio::net::NetConfig;
use virtnet_virtio::net::control::Command;
use virtnet_virtio::{Features, QueueConfig, RingError, RingFormat};

use super::VirtioUserOptions;
use super::commands::Commands;
use super::iommu::Mapped;
use super::queues::{DriverQueues, LaidOut, NewQueues, RingEvents};
use super::transfer::{Outcome, Transfer};
use crate::control::{Service, next_tick_ns};
use crate::events::{EventLog, Peer, What};
use crate::{OwnRegion, PortError, RingStatus, Slot};

/// How often a back-end is tried.
const RETRY_NS: u64 = 200_000_000;

/// What makes a device hand over frames longer than Ethernet's.
const LONG_FRAMES: Features = Features::GUEST_TSO4
    .union(Features::GUEST_TSO6)
    .union(Features::GUEST_ECN)
    .union(Features::GUEST_USO4)
    .union(Features::GUEST_USO6);

/// How a virtio-user session stands.
#[derive(Clone, Debug, Default)]
pub struct VirtioUserStatus {
    /// `"connecting"`, `"listening"`, `"connected"` (a back-end is there), `"running"` (packets can flow).
    pub state: &'static str,
    /// Features that the back-end offers.
    pub offered: u64,
    /// Features negotiated, while a back-end is there.
    pub negotiated: u64,
    /// Protocol features that the back-end offers.
    pub protocol: u64,
    /// `"split"` or `"packed"`, while the rings run.
    pub ring_format: Option<&'static str>,
    /// Queue pairs that run.
    pub queue_pairs: usize,
    /// Sessions so far.
    pub sessions: u64,
    /// What the configuration space tells, where the back-end has one.
    pub config: Option<NetConfig>,
    /// What ended the last session, or why there is none.
    pub last_error: Option<String>,
}

/// Looks after one socket.
pub(super) struct FrontendService {
    options: VirtioUserOptions,
    listener: Option<Listener>,
    session: Option<Session>,
    slot: Arc<Slot<DriverQueues>>,
    /// The device has broken a ring.
    gave_up: Arc<AtomicBool>,
    deadline_ns: Option<u64>,
    /// Of the back-end before, if it can be gone on with.
    kept: Option<Kept>,
    sessions: u64,
    last_error: Option<String>,
    /// Transfers of the device's state so far, and the end of the last one that nobody has come back for.
    transfers: u64,
    transferred: Option<Outcome>,
    log: EventLog,
}

/// A back-end that is there.
pub(super) struct Session {
    pub(super) frontend: Frontend,
    negotiated: Features,
    /// What the device tells of itself.
    config: Option<NetConfig>,
    /// Laid out and told to the back-end, until it says that it runs.
    waiting: Option<Waiting>,
    /// The control queue, where there is one; it is asked through when the back-end says that it runs.
    pub(super) commands: Option<Commands>,
    pub(super) running: bool,
    /// The rings as the back-end was told of them.
    pub(super) rings: Vec<FrontendRing>,
    /// The device's state, on its way.
    pub(super) transfer: Option<Transfer>,
    /// That it wants to be announced has been acknowledged, and it has not said since that it knows.
    announced: bool,
    /// With an IOMMU, what the back-end may ask for.
    mapped: Option<Mapped>,
    /// With a record of what is in flight, what the next back-end goes on with.
    kept: Option<Kept>,
}

/// What a back-end is told about.
enum Waiting {
    New(Box<NewQueues>),
    Again(LaidOut),
}

/// Queues that outlive their back-end, and the record of what it had in flight.
struct Kept {
    laid_out: LaidOut,
    features: Features,
    record: InflightFile,
}

impl FrontendService {
    pub(super) fn new(
        options: VirtioUserOptions,
        slot: Arc<Slot<DriverQueues>>,
        gave_up: Arc<AtomicBool>,
    ) -> Result<Self, PortError> {
        let listener = if options.server {
            Some(Listener::bind_with_mode(&options.path, options.mode)?)
        } else {
            None
        };
        let deadline_ns = (!options.server).then(monotonic_ns);
        Ok(Self {
            options,
            listener,
            session: None,
            slot,
            gave_up,
            deadline_ns,
            kept: None,
            sessions: 0,
            last_error: None,
            transfers: 0,
            transferred: None,
            log: EventLog::default(),
        })
    }

    /// What has happened so far.
    pub(super) fn log(&self) -> EventLog {
        self.log.clone()
    }

    /// How all rings stand, in order of their numbers; none while there is no back-end.
    pub(super) fn rings(&self) -> Vec<RingStatus> {
        self.slot.run(|queues| queues.rings()).unwrap_or_default()
    }

    pub(super) fn status(&self) -> VirtioUserStatus {
        let mut status = VirtioUserStatus {
            state: if self.options.server {
                "listening"
            } else {
                "connecting"
            },
            sessions: self.sessions,
            last_error: self.last_error.clone(),
            ..VirtioUserStatus::default()
        };
        let Some(session) = &self.session else {
            return status;
        };
        let offered = session.frontend.offered();
        status.offered = offered.features;
        status.protocol = offered.protocol_features.bits();
        status.negotiated = session.negotiated.bits();
        status.config = session.config;
        status.state = "connected";
        if let Ok((running, broken)) = self.slot.run(|queues| (queues.running(), queues.broken())) {
            status.queue_pairs = running;
            if running > 0 {
                status.state = "running";
                status.ring_format = Some(RingFormat::of(session.negotiated).name());
            }
            if let Some((ring, error)) = broken {
                status.last_error = Some(given_up(ring, &error));
            }
        }
        status
    }

    fn begin(&mut self, stream: Stream, now_ns: u64) {
        self.sessions += 1;
        self.gave_up.store(false, Ordering::Relaxed);
        self.log.record(What::Connected {
            peer: Peer::BackEnd,
            pid: stream.peer().ok().map(|peer| peer.pid),
        });
        let mut wanted = ProtocolFeatures::FRONTEND;
        wanted.set(ProtocolFeatures::INFLIGHT_SHMFD, self.options.in_flight);
        wanted.set(ProtocolFeatures::INBAND_NOTIFICATIONS, self.options.in_band);
        match Frontend::start_with(stream, wanted) {
            Ok(frontend) => {
                self.session = Some(Session {
                    frontend,
                    negotiated: Features::empty(),
                    config: None,
                    waiting: None,
                    commands: None,
                    running: false,
                    rings: Vec::new(),
                    transfer: None,
                    announced: false,
                    mapped: None,
                    kept: None,
                });
                self.deadline_ns = Some(next_tick_ns(now_ns));
            }
            Err(error) => self.end(&error, now_ns),
        }
    }

    /// The session is over; what the rings hold is kept for the next one if there is a record of it, and given up otherwise.
    fn end(&mut self, error: &dyn std::fmt::Display, now_ns: u64) {
        let kept = self.session.take().and_then(|session| session.kept);
        // One that left before it was told anything leaves what there was.
        self.kept = kept.or_else(|| self.kept.take());
        let why = error.to_string();
        self.last_error = Some(why.clone());
        self.log.record(What::Disconnected {
            peer: Peer::BackEnd,
            why: Some(why),
        });
        let stop = if self.kept.is_some() {
            DriverQueues::pause
        } else {
            DriverQueues::stop
        };
        // When the worker does not answer in time the change waits for it all the same.
        drop(self.slot.post(stop));
        self.deadline_ns = (!self.options.server).then_some(now_ns + RETRY_NS);
    }

    fn serve(&mut self) -> Result<(), ServeError> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        if session.frontend.wants_write() {
            session.frontend.on_writable()?;
        }
        for event in session.frontend.on_readable()? {
            match event {
                FrontendEvent::Offered(offered) => {
                    self.log.record(What::Offered {
                        features: offered.features,
                        protocol: offered.protocol_features.bits(),
                    });
                    let kept = self.kept.take();
                    session.choose(&self.options, offered, kept, &self.slot)?;
                    self.log.record(What::Features {
                        features: session.negotiated.bits(),
                    });
                }
                FrontendEvent::Running => {
                    let Some(waiting) = session.waiting.take() else {
                        continue;
                    };
                    session.start(&self.slot, &self.options, waiting)?;
                    self.last_error = None;
                    self.log.record(What::Running {
                        queue_pairs: self.options.queue_pairs.into(),
                    });
                }
                FrontendEvent::ConfigChanged(bytes) => {
                    session.note_config(&bytes);
                    let link_up = session.link_up();
                    self.slot
                        .run(move |data| data.set_link(link_up))
                        .map_err(PortError::from)?;
                }
                FrontendEvent::NeedsReset => {
                    self.slot.run(DriverQueues::stop).map_err(PortError::from)?;
                    session.running = false;
                    self.last_error = Some("the device said that it needs a reset".to_owned());
                    session.frontend.reset()?;
                }
                FrontendEvent::Miss(miss) => {
                    let mapped = session.mapped.as_ref();
                    let told = mapped.and_then(|mapped| mapped.translation(&miss));
                    if let Some(translation) = told {
                        session.frontend.translate(translation)?;
                    }
                    session.frontend.answer_miss(told.is_some());
                }
                FrontendEvent::RingBroken { ring } => self.log.record(What::RingBroken {
                    ring: usize::try_from(ring).unwrap_or(usize::MAX),
                    why: "the device says so".to_owned(),
                }),
                FrontendEvent::RingStopped { ring, base } => session.ring_stopped(ring, base)?,
                FrontendEvent::StatePipe => session.pipe_taken()?,
                FrontendEvent::StateDone => {
                    self.transferred = session.end_transfer(true, &self.slot)?;
                }
                FrontendEvent::Refused {
                    request: RequestKind::SetDeviceStateFd | RequestKind::CheckDeviceState,
                    ..
                } => self.transferred = session.end_transfer(false, &self.slot)?,
                // A driver that is its own guest neither moves nor logs.
                FrontendEvent::MemoryMapped(_)
                | FrontendEvent::PostcopyEnded
                | FrontendEvent::Translated(_)
                | FrontendEvent::Logging(_)
                | FrontendEvent::Refused { .. } => {}
            }
        }
        session.read_state()?;
        if session.acknowledge_announce()? {
            self.log.record(What::Announce);
        }
        session.serve_commands(&self.slot)
    }

    // The device's state.

    /// Begins to save the state of the device, or to load one; the number of the answer.
    pub(super) fn transfer(&mut self, load: Option<Vec<u8>>) -> Result<u64, PortError> {
        let session = self.session.as_mut().ok_or(PortError::NoTransfer {
            why: "nobody is at the other end",
        })?;
        self.transfers += 1;
        session.begin_transfer(self.transfers, load, &self.slot)?;
        Ok(self.transfers)
    }

    /// Nobody waits any more: whoever is at the other end is left.
    pub(super) fn give_up_transfer(&mut self) {
        if self.session.as_ref().is_some_and(|s| s.transfer.is_some()) {
            let why = "it does not come to an end with the state of its device";
            self.end(&why, monotonic_ns());
        }
    }

    /// What was saved, when it is there and the rings go on.
    pub(super) fn transferred(&mut self, id: u64) -> Option<Result<Vec<u8>, PortError>> {
        let session = self.session.as_ref().map(|s| s.frontend.session());
        if self.transferred.is_some() && session.is_some_and(|s| !s.is_idle()) {
            return None;
        }
        if let Some((_, outcome)) = self.transferred.take_if(|(of, _)| *of == id) {
            return Some(outcome);
        }
        let transfer = self.session.as_ref().and_then(|s| s.transfer.as_ref());
        let gone = Err(PortError::NoTransfer {
            why: "the back-end has left meanwhile",
        });
        transfer.is_none_or(|t| t.id != id).then_some(gone)
    }

    // Commands.

    /// Sends a command; the number of its answer.
    pub(super) fn ask(&mut self, command: Command) -> Result<u64, PortError> {
        let session = self.session.as_mut().filter(|session| session.running);
        let session = session.ok_or(PortError::NoControlQueue {
            why: "nobody is at the other end",
        })?;
        let commands = session.commands.as_mut().ok_or(PortError::NoControlQueue {
            why: if self.options.control {
                "the back-end offers none"
            } else {
                "the port was opened without, open it with control=True"
            },
        })?;
        if let Command::SetPairs(n) = command {
            let most = self.options.queue_pairs;
            if !(1..=most).contains(&n) {
                return Err(PortError::Option {
                    option: "queue_pairs",
                    found: n.to_string(),
                    expected: format!("1 to {most}, with which the port was opened,"),
                });
            }
            // Fewer at once, more when the device knows.
            let n = usize::from(n);
            self.slot
                .run(move |queues| queues.use_pairs(n.min(queues.running())))?;
        }
        commands.ask(command)
    }

    /// The answer to a command, when it is there.
    pub(super) fn answer(&mut self, id: u64) -> Option<Result<Vec<u8>, PortError>> {
        let commands = self.session.as_mut().and_then(|s| s.commands.as_mut());
        match commands {
            Some(commands) => commands.answer(id),
            None => Some(Err(PortError::NoControlQueue {
                why: "the back-end has left",
            })),
        }
    }

    /// Nobody comes back for this answer.
    pub(super) fn forget(&mut self, id: u64) {
        if let Some(commands) = self.session.as_mut().and_then(|s| s.commands.as_mut()) {
            commands.forget(id);
        }
    }
}

/// What ends a session: its other side, or ours.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Port(#[from] PortError),
    #[error("the back-end does not come to an end with the state of its device")]
    StateTooLong,
    #[error("the control queue was given up, the device is at fault: {0}")]
    Control(RingError),
    #[error("the back-end does not offer {missing}: {remedy}")]
    Missing {
        missing: String,
        remedy: &'static str,
    },
}

impl Session {
    fn note_config(&mut self, bytes: &[u8]) {
        let offered = Features::from_bits_retain(self.frontend.offered().features);
        self.config = Some(NetConfig::parse(bytes, offered));
    }

    /// Whether packets can pass, as far as the device says. Spec: virtio 1.4, 5.1.4.2: without STATUS the link is up.
    fn link_up(&self) -> bool {
        let said = self.config.and_then(|config| config.link_up);
        !self.negotiated.contains(Features::STATUS) || said.unwrap_or(true)
    }

    /// The back-end runs: so do the queues. With a control queue one pair is in use until the device has agreed to more.
    fn start(
        &mut self,
        slot: &Slot<DriverQueues>,
        options: &VirtioUserOptions,
        mut waiting: Waiting,
    ) -> Result<(), ServeError> {
        let (negotiated, link_up) = (self.negotiated, self.link_up());
        let control = match &mut waiting {
            Waiting::New(queues) => queues.control.take(),
            Waiting::Again(_) => None,
        };
        self.commands = control.map(|(queue, events)| Commands::new(queue, events, negotiated));
        let has_more = options.queue_pairs > 1 && negotiated.contains(Features::MQ);
        let asks = self.commands.as_mut().filter(|_| has_more);
        let in_use = if asks.is_some() {
            1
        } else {
            options.queue_pairs.into()
        };
        let running = slot.run(move |data| {
            data.set_link(link_up);
            match waiting {
                Waiting::New(queues) => data.start(*queues, in_use),
                Waiting::Again(laid_out) => {
                    data.go_on();
                    Ok(laid_out)
                }
            }
        });
        let laid_out = running.map_err(PortError::from)??;
        self.kept = self.frontend.take_inflight().map(|record| Kept {
            laid_out,
            features: negotiated,
            record,
        });
        if let Some(commands) = asks {
            commands.ask(Command::SetPairs(options.queue_pairs))?;
        }
        self.running = true;
        Ok(())
    }

    /// Tells a device that wants to be announced that it is; whether it has just begun to want that.
    ///
    /// Spec: virtio 1.4, 5.1.6.5.4 and 5.1.9.5.4, Gratuitous Packet Sending
    fn acknowledge_announce(&mut self) -> Result<bool, PortError> {
        let wanted = self.negotiated.contains(Features::GUEST_ANNOUNCE)
            && self.config.is_some_and(|config| config.announce);
        let Some(commands) = self.commands.as_mut().filter(|_| self.running) else {
            return Ok(false);
        };
        let begins = wanted && !self.announced;
        if begins {
            commands.ask(Command::AcknowledgeAnnounce)?;
        }
        self.announced = wanted;
        Ok(begins)
    }

    /// Takes what the device has answered.
    fn serve_commands(&mut self, slot: &Slot<DriverQueues>) -> Result<(), ServeError> {
        let Some(commands) = &mut self.commands else {
            return Ok(());
        };
        if let Some(n) = commands.serve().map_err(ServeError::Control)? {
            slot.run(move |queues| queues.use_pairs(n.into()))
                .map_err(PortError::from)?;
        }
        Ok(())
    }

    /// Decides on features, lays out the queues and tells the back-end.
    fn choose(
        &mut self,
        options: &VirtioUserOptions,
        offered: Offered,
        kept: Option<Kept>,
        slot: &Slot<DriverQueues>,
    ) -> Result<(), ServeError> {
        let mut accepted = options.features() & Features::from_bits_retain(offered.features);
        if !accepted.contains(Features::MRG_RXBUF) {
            // Long frames take several of our buffers.
            accepted -= LONG_FRAMES;
        }
        if let Some(config) = &offered.config {
            self.note_config(config);
        } else {
            // What these promise would stand there.
            accepted -= Features::MAC
                | Features::STATUS
                | Features::SPEED_DUPLEX
                | Features::GUEST_ANNOUNCE;
        }
        let accepted = accepted.with_needs();
        if options.format == RingFormat::Packed && !accepted.contains(Features::RING_PACKED) {
            return Err(ServeError::Missing {
                missing: "packed rings".to_owned(),
                remedy: "use ring=split, or switch them on over there",
            });
        }
        let translated = self.frontend.session().protocol_features();
        let translated = translated.contains(ProtocolFeatures::BACKEND_REQ)
            && accepted.contains(Features::ACCESS_PLATFORM);
        if options.iommu && !translated {
            return Err(ServeError::Missing {
                missing: "translated addresses (ACCESS_PLATFORM, and a channel to ask for them)"
                    .to_owned(),
                remedy: "leave out iommu, or switch it on over there",
            });
        }
        if options.in_band && !self.frontend.session().is_in_band() {
            return Err(ServeError::Missing {
                missing: "notifications by messages (INBAND_NOTIFICATIONS, REPLY_ACK, and a channel for calls)"
                    .to_owned(),
                remedy: "leave out in_band, or switch it on over there",
            });
        }
        let most = offered.queue_pairs.unwrap_or(1);
        if u64::from(options.queue_pairs) > most {
            return Err(ServeError::Missing {
                missing: format!("{} queue pairs, only {most}", options.queue_pairs),
                remedy: "ask for fewer, or give it more",
            });
        }
        let recorded = self.frontend.session().protocol_features();
        // What was asked through a control queue goes with its session, and so do its queues.
        let recorded = recorded.contains(ProtocolFeatures::INFLIGHT_SHMFD)
            && !accepted.contains(Features::CTRL_VQ);
        let kept = kept.filter(|kept| recorded && kept.features == accepted);
        let (waiting, inflight) = if let Some(mut kept) = kept {
            let bases = slot.run(|data| data.bases()).map_err(PortError::from)?;
            for ((config, _), base) in kept.laid_out.rings.iter_mut().zip(bases) {
                config.base = base;
            }
            let record = InflightSetup::Kept(kept.record);
            (Waiting::Again(kept.laid_out), record)
        } else {
            let queues = NewQueues::new(options.queue_pairs, options.queue_size, accepted)?;
            let record = InflightSetup::New(InflightArea {
                num_queues: 2 * options.queue_pairs,
                queue_size: options.queue_size,
                ..InflightArea::default()
            });
            (Waiting::New(Box::new(queues)), record)
        };
        let laid_out = match &waiting {
            Waiting::New(queues) => &queues.laid_out,
            Waiting::Again(laid_out) => laid_out,
        };
        let mut regions = laid_out
            .memory
            .regions()
            .iter()
            .map(region)
            .collect::<Result<Vec<_>, _>>()?;
        let layouts = regions.iter_mut().map(|region| &mut region.layout);
        self.mapped = options.iommu.then(|| Mapped::hide(layouts));
        let rings = laid_out
            .rings
            .iter()
            .map(|(config, events)| ring(config, events));
        let rings: Vec<_> = rings.collect();
        self.rings.clone_from(&rings);
        let setup = FrontendSetup {
            features: accepted.bits(),
            mtu: None,
            regions,
            rings,
            inflight: recorded.then_some(inflight),
        };
        self.frontend.set_up(setup)?;
        self.negotiated = accepted;
        self.waiting = Some(waiting);
        Ok(())
    }
}

fn given_up(ring: usize, error: &RingError) -> String {
    format!("ring {ring} was given up, the device is at fault: {error}")
}

fn region(own: &OwnRegion) -> Result<Region, PortError> {
    let file = own.as_fd().try_clone_to_owned();
    let file = file.map_err(|source| PortError::io("hand memory to a back-end", source))?;
    let layout = MemoryRegion {
        guest_addr: own.guest.0,
        size: own.size,
        user_addr: own.user.0,
        mmap_offset: own.mmap_offset,
    };
    Ok(Region { layout, file })
}

fn ring(config: &QueueConfig, events: &RingEvents) -> FrontendRing {
    FrontendRing {
        size: config.size,
        base: config.base,
        addresses: RingAddresses {
            descriptor_area: config.desc_area.0,
            driver_area: config.driver_area.0,
            device_area: config.device_area.0,
            log_guest_addr: None,
        },
        kick: Arc::clone(&events.kick),
        call: Arc::clone(&events.call),
    }
}

impl Service for FrontendService {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        match (&self.session, &self.listener) {
            (Some(session), _) => Some(session.frontend.as_fd()),
            (None, Some(listener)) => Some(listener.as_fd()),
            (None, None) => None,
        }
    }

    fn more_sources(&self) -> Vec<(BorrowedFd<'_>, Interest)> {
        let channel = self
            .session
            .as_ref()
            .and_then(|session| session.frontend.channel());
        let channel = channel.map(|(fd, wants_write)| (fd, Interest::of(wants_write)));
        let commands = self
            .session
            .as_ref()
            .and_then(|session| session.commands.as_ref());
        let answers = commands.map(|commands| (commands.wait_fd(), Interest::Readable));
        let kicks = self
            .session
            .as_ref()
            .and_then(|session| session.frontend.kicks());
        let kicks = kicks.map(|kicks| (kicks, Interest::Readable));
        let state = self.session.as_ref().and_then(Session::state_source);
        let state = state.map(|state| (state, Interest::Readable));
        let more = [channel, answers, kicks, state];
        more.into_iter().flatten().collect()
    }

    fn interest(&self) -> Interest {
        Interest::of(matches!(&self.session, Some(session) if session.frontend.wants_write()))
    }

    fn on_ready(&mut self, now_ns: u64) -> Result<(), PortError> {
        if self.session.is_some() {
            if let Err(error) = self.serve() {
                self.end(&error, now_ns);
            }
            return Ok(());
        }
        let Some(listener) = &self.listener else {
            return Ok(());
        };
        match listener.accept() {
            Ok(stream) => self.begin(stream, now_ns),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                let path = self.options.path.display();
                return Err(PortError::io(format!("accept a back-end on {path}"), error));
            }
        }
        Ok(())
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.deadline_ns
    }

    fn on_timer(&mut self, now_ns: u64) -> Result<(), PortError> {
        if let Some(session) = &mut self.session {
            self.deadline_ns = Some(next_tick_ns(now_ns));
            let asked = session.frontend.check_status();
            if let Err(error) = asked.and_then(|()| session.frontend.on_tick(now_ns)) {
                self.end(&error, now_ns);
            } else if self.gave_up.swap(false, Ordering::Relaxed) {
                // A device that has broken a ring can only begin anew, and so can we.
                (session.kept, self.kept) = (None, None);
                let broken = self.slot.run(|queues| queues.broken()).ok().flatten();
                let why = broken.map_or_else(String::new, |(ring, error)| {
                    self.log.record(What::RingBroken {
                        ring,
                        why: format!("the device is at fault: {error}"),
                    });
                    given_up(ring, &error)
                });
                self.end(&why, now_ns);
            }
            return Ok(());
        }
        self.deadline_ns = (!self.options.server).then_some(now_ns + RETRY_NS);
        if !self.options.server {
            match Stream::connect(&self.options.path) {
                Ok(stream) => self.begin(stream, now_ns),
                // Nobody listens yet: that is what trying again is for.
                Err(error) => {
                    let why = error.to_string();
                    self.last_error = Some(why.clone());
                    self.log.record_if_new(What::Nobody { why });
                }
            }
        }
        Ok(())
    }
}
