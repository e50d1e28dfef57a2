//! The front-end's side of a session, as a state machine that touches no socket.
//!
//! *Theory of operation.* A front-end asks, a back-end answers, one request after the other. [`FrontendSession`] keeps the
//! requests that are still to be sent in a queue; [`FrontendSession::next_message`] hands out the next when the one before
//! is answered, or needs no answer, and [`FrontendSession::answered`] takes the answers. Where acknowledgements can be had
//! every request asks for one, so that a refusal is noticed where it happens.
//!
//! The handshake has two parts. The first finds out what is offered and ends with [`FrontendEvent::Offered`]; the second
//! tells what was chosen ([`FrontendSession::set_up`]) and ends with [`FrontendEvent::Running`]. An answer is matched with
//! the one request that awaits it and with its exact form; anything else ends the session.
//!
//! Spec: vhost-user, Starting and stopping rings; the order is that of DPDK's virtio-user

mod addresses;
mod answers;
mod postcopy;
mod rings;
mod state;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtnet_sys::EventFd;

use crate::bits;
use crate::connection::Message;
use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::message::{Reply, Request, RequestKind};
use crate::payload::{
    Config, InflightArea, Iotlb, MemoryRegion, MemoryTable, Payload, SingleRegion, VringState,
};
use crate::regions::{InflightFile, LogFile, MAX_TABLE_REGIONS, Region};
use crate::session::RingAddresses;
use answers::{optional, parse, wrong_length};
use postcopy::Postcopy;
use rings::RingMessages;

/// Status bits. Spec: virtio 1.4, 2.1, Device Status Field.
const ACKNOWLEDGE_AND_DRIVER: u64 = 1 | 2;
const DRIVER_OK: u64 = 4;
const FEATURES_OK: u64 = 8;
const NEEDS_RESET: u64 = 64;

/// Bytes of configuration space that are asked for: up to the hash types of a network device.
const CONFIG_LEN: usize = 24;

/// What a back-end offers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Offered {
    /// Virtio features, bit 30 included.
    pub features: u64,
    /// Protocol features; none if bit 30 is not offered.
    pub protocol_features: ProtocolFeatures,
    /// Queue pairs, if the back-end tells; nobody has checked the number.
    pub queue_pairs: Option<u64>,
    /// Memory slots, if the back-end tells; nobody has checked the number.
    pub memory_slots: Option<u64>,
    /// The beginning of the configuration space, if it was asked for and the back-end tells.
    pub config: Option<Vec<u8>>,
    /// The device status, if the back-end tells.
    pub status: Option<u8>,
}

/// What the driver has chosen and laid out.
#[derive(Debug)]
pub struct FrontendSetup {
    /// Virtio features accepted, without bit 30.
    pub features: u64,
    /// No packet will be longer, where the back-end wants to know.
    pub mtu: Option<u16>,
    /// The memory that rings and buffers lie in.
    pub regions: Vec<Region>,
    /// The rings, in order of their numbers.
    pub rings: Vec<FrontendRing>,
    /// A record of buffers in flight that the back-end is to use, or to make, where it knows of such.
    pub inflight: Option<InflightSetup>,
}

/// Which record of buffers in flight is used.
#[derive(Debug)]
pub enum InflightSetup {
    /// A new one, for as many rings and descriptors as this says.
    New(InflightArea),
    /// That of the back-end before this one.
    Kept(InflightFile),
}

/// A ring as a front-end tells it.
#[derive(Debug, Clone)]
pub struct FrontendRing {
    /// How many descriptors it has.
    pub size: u16,
    /// Where to begin.
    pub base: u32,
    /// Where it lies.
    pub addresses: RingAddresses,
    /// Signalled by us when there are available buffers.
    pub kick: Arc<EventFd>,
    /// Signalled by the back-end when there are used buffers.
    pub call: Arc<EventFd>,
}

/// What a driver has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontendEvent {
    /// The first part of the handshake is over: choose, and call [`FrontendSession::set_up`].
    Offered(Offered),
    /// The back-end knows everything: packets can flow.
    Running,
    /// The back-end logs what it writes, or does so no longer.
    Logging(bool),
    /// The configuration space is like this now.
    ConfigChanged(Vec<u8>),
    /// The device cannot go on before it is reset: see [`FrontendSession::reset`].
    NeedsReset,
    /// The back-end misses a translation: it gets one by [`FrontendSession::translate`], and in any case an answer by
    /// [`Frontend::answer_miss`](crate::Frontend::answer_miss).
    Miss(Iotlb),
    /// A translation was told, and is in force; or is gone, and is not used any more.
    Translated(Iotlb),
    /// The device has given up a ring, and says so by a message.
    RingBroken {
        /// Which ring, as the back-end says; nobody has checked the number.
        ring: u32,
    },
    /// The back-end uses the pipe that it was given for its device's state, or the one that
    /// [`Frontend::take_state_pipe`](crate::Frontend::take_state_pipe) hands out.
    StatePipe,
    /// All of the device's state has gone through the pipe, and the back-end is content with it.
    StateDone,
    /// The back-end has the memory whose pages are to come later, each region at its `user_addr`, and waits: serve the faults of
    /// [`Frontend::take_userfault`](crate::Frontend::take_userfault), and say so by
    /// [`Frontend::memory_is_served`](crate::Frontend::memory_is_served).
    MemoryMapped(Vec<MemoryRegion>),
    /// Post-copy is over: the back-end waits for no page any more.
    PostcopyEnded,
    /// A ring has stopped, here.
    RingStopped {
        /// Which ring.
        ring: u32,
        /// Where to go on, as the back-end says; nobody has checked the number.
        base: u32,
    },
    /// The back-end does not do something the session can go on without.
    Refused {
        /// What it was asked.
        request: RequestKind,
        /// What it answered.
        code: u64,
    },
}

/// The front-end's side of a session.
#[derive(Debug)]
pub struct FrontendSession {
    /// Protocol features that are accepted where they are offered.
    wanted: ProtocolFeatures,
    /// What is still to be sent, in order.
    queue: VecDeque<(Request, Vec<OwnedFd>)>,
    /// The socket that the back-end is to have for requests of its own.
    channel: Option<OwnedFd>,
    /// The request whose answer is awaited.
    awaited: Option<Request>,
    /// How many answers have been awaited so far.
    asked: u64,
    offered: Offered,
    /// Protocol features in force.
    protocol: ProtocolFeatures,
    /// Virtio features accepted, as they were told, without bit 26.
    features: u64,
    /// What [`FrontendSession::set_logging`] was called with, until all of it has been served.
    logging: Option<bool>,
    /// The record of buffers in flight, for the back-end after this one.
    inflight: Option<InflightFile>,
    /// The pipe that the back-end wants to use for its device's state instead of ours.
    state_pipe: Option<OwnedFd>,
    /// Where memory lies, if the back-end is told guest addresses.
    by_guest_address: Vec<MemoryRegion>,
    postcopy: Postcopy,
    /// The back-end's userfaultfd, until somebody takes it.
    userfault: Option<OwnedFd>,
    phase: Phase,
    events: VecDeque<FrontendEvent>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Asking,
    Choosing,
    Telling,
    Running,
}

impl FrontendSession {
    /// Begins a session that accepts no other protocol features than these; only with CONFIG it asks for the
    /// configuration space.
    #[must_use]
    pub fn new(wanted: ProtocolFeatures) -> Self {
        Self::begin(wanted.difference(ProtocolFeatures::BACKEND_REQ), None)
    }

    /// The same with a socket to hand to a back-end that has requests of its own, and takes BACKEND_REQ.
    #[must_use]
    pub fn with_channel(wanted: ProtocolFeatures, channel: OwnedFd) -> Self {
        Self::begin(wanted, Some(channel))
    }

    fn begin(wanted: ProtocolFeatures, channel: Option<OwnedFd>) -> Self {
        let mut session = Self {
            wanted: wanted & (ProtocolFeatures::FRONTEND | ProtocolFeatures::ON_REQUEST),
            queue: VecDeque::new(),
            channel,
            awaited: None,
            asked: 0,
            offered: Offered::default(),
            protocol: ProtocolFeatures::empty(),
            features: 0,
            logging: None,
            inflight: None,
            state_pipe: None,
            by_guest_address: Vec::new(),
            postcopy: Postcopy::Off,
            userfault: None,
            phase: Phase::Asking,
            events: VecDeque::new(),
        };
        session.ask(Request::SetOwner);
        session.ask(Request::GetFeatures);
        session
    }

    /// Tells the back-end what was chosen. Once, after [`FrontendEvent::Offered`].
    ///
    /// # Errors
    /// Called at another time; more memory or rings than the back-end takes; out of descriptors. Nothing was sent.
    pub fn set_up(&mut self, setup: FrontendSetup) -> Result<(), SessionError> {
        if self.phase != Phase::Choosing {
            return Err(misuse(
                "the back-end has not said yet what it offers, or was told already".to_owned(),
            ));
        }
        let with_protocol = self.offered.features & bits::PROTOCOL_FEATURES;
        self.features = setup.features | with_protocol;
        let regions = self.told_regions(setup.regions);
        let memory = self.memory(regions)?;
        let in_band = self.is_in_band();
        let rings = setup
            .rings
            .iter()
            .enumerate()
            .map(|(index, ring)| RingMessages::new(index, &self.told_ring(ring), in_band));
        let rings = rings.collect::<Result<Vec<_>, _>>()?;
        let status = self.protocol.contains(ProtocolFeatures::STATUS);

        if status {
            self.ask(Request::SetStatus(ACKNOWLEDGE_AND_DRIVER));
        }
        // The first message about a ring makes some back-ends allocate it, and they want that before the features.
        let (calls, rings): (Vec<_>, Vec<_>) = rings
            .into_iter()
            .map(|ring| (ring.call, ring.others))
            .unzip();
        self.queue.extend(calls.into_iter().flatten());
        self.ask(Request::SetFeatures(self.features));
        if status {
            self.ask(Request::SetStatus(ACKNOWLEDGE_AND_DRIVER | FEATURES_OK));
            self.ask(Request::GetStatus);
        }
        if let Some(mtu) = setup
            .mtu
            .filter(|_| self.protocol.contains(ProtocolFeatures::MTU))
        {
            self.ask(Request::NetSetMtu(mtu.into()));
        }
        let recorded = self.protocol.contains(ProtocolFeatures::INFLIGHT_SHMFD);
        match setup.inflight.filter(|_| recorded) {
            Some(InflightSetup::New(area)) => self.ask(Request::GetInflightFd(area)),
            Some(InflightSetup::Kept(record)) => {
                let message = use_record(&record)?;
                self.queue.push_back(message);
                self.inflight = Some(record);
            }
            None => {}
        }
        self.queue.extend(memory);
        let count = u32::try_from(rings.len()).unwrap_or(u32::MAX);
        self.queue.extend(rings.into_iter().flatten());
        if with_protocol != 0 {
            (0..count).for_each(|ring| self.enable_ring(ring, true));
        }
        if status {
            self.ask(Request::SetStatus(
                ACKNOWLEDGE_AND_DRIVER | FEATURES_OK | DRIVER_OK,
            ));
        }
        // An answer to this one says that everything before it has been served, with or without acknowledgements.
        self.ask(Request::GetFeatures);
        self.phase = Phase::Telling;
        Ok(())
    }

    /// Has the device reset, and the handshake begin anew where features are chosen: [`FrontendEvent::Offered`] comes once more.
    ///
    /// # Errors
    /// The back-end can neither be reset by RESET_DEVICE nor by STATUS. Nothing was sent.
    pub fn reset(&mut self) -> Result<(), SessionError> {
        let reset = self.protocol.contains(ProtocolFeatures::RESET_DEVICE);
        let status = self.protocol.contains(ProtocolFeatures::STATUS);
        if !reset && !status {
            return Err(misuse(
                "the back-end cannot be reset: connect to it anew".to_owned(),
            ));
        }
        if reset {
            self.ask(Request::ResetDevice);
        }
        if status {
            self.ask(Request::SetStatus(0));
        }
        self.phase = Phase::Asking;
        self.postcopy = Postcopy::Off;
        Ok(())
    }

    /// Asks how the device is; [`FrontendEvent::NeedsReset`] comes if it has to be reset. Nothing happens where the back-end has no
    /// STATUS.
    pub fn check_status(&mut self) {
        if self.is_idle() && self.protocol.contains(ProtocolFeatures::STATUS) {
            self.ask(Request::GetStatus);
        }
    }

    /// Whether the back-end runs and everything that was asked has been answered.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Running && self.awaited.is_none() && self.queue.is_empty()
    }

    /// Whether kicks and calls are messages.
    #[must_use]
    pub fn is_in_band(&self) -> bool {
        self.protocol
            .contains(ProtocolFeatures::INBAND_NOTIFICATIONS)
    }

    /// Kicks a ring by a message.
    pub(crate) fn kick(&mut self, ring: u32) {
        self.ask(Request::VringKick(VringState {
            index: ring,
            num: 0,
        }));
    }

    /// Asks for the configuration space; [`FrontendEvent::ConfigChanged`] brings it. Nothing happens where the back-end has none.
    pub fn read_config(&mut self) {
        if self.protocol.contains(ProtocolFeatures::CONFIG) {
            self.ask(Request::GetConfig(whole_config()));
        }
    }

    /// Tells a translation, or takes one back; [`FrontendEvent::Translated`] says that it was done.
    pub fn translate(&mut self, translation: Iotlb) {
        self.ask(Request::IotlbMsg(self.told_translation(translation)));
    }

    /// Asks the back-end to stop a ring; [`FrontendEvent::RingStopped`] says where.
    pub fn stop_ring(&mut self, ring: u32) {
        self.ask(Request::GetVringBase(VringState {
            index: ring,
            num: 0,
        }));
    }

    /// Starts a ring again that was stopped.
    ///
    /// # Errors
    /// There can be no such ring; out of descriptors. Nothing was sent.
    pub fn start_ring(&mut self, index: u32, ring: &FrontendRing) -> Result<(), SessionError> {
        let number = usize::try_from(index).unwrap_or(usize::MAX);
        let messages = RingMessages::new(number, &self.told_ring(ring), self.is_in_band())?;
        self.queue.extend(messages.call);
        self.queue.extend(messages.others);
        Ok(())
    }

    /// Enables or disables a ring.
    pub fn enable_ring(&mut self, ring: u32, enabled: bool) {
        self.ask(Request::SetVringEnable(VringState {
            index: ring,
            num: enabled.into(),
        }));
    }

    /// Hands over the dirty log; while [logging](Self::set_logging) is on, the back-end marks there what it writes.
    ///
    /// # Errors
    /// The back-end has no such log. Nothing was sent.
    pub fn set_log(&mut self, log: LogFile) -> Result<(), SessionError> {
        self.check_can_log()?;
        let request = Request::SetLogBase(log.area);
        self.queue.push_back((request, vec![log.file]));
        Ok(())
    }

    /// Begins to have logged what the back-end writes, or ends it; [`FrontendEvent::Logging`] says when that is done.
    ///
    /// `rings` says where each lies, in order of their numbers, and where its Device Area is to be logged.
    ///
    /// # Errors
    /// The back-end cannot log, or has not been told everything yet. Nothing was sent.
    pub fn set_logging(&mut self, on: bool, rings: &[RingAddresses]) -> Result<(), SessionError> {
        self.check_can_log()?;
        let features = Request::SetFeatures(self.features | if on { bits::LOG_ALL } else { 0 });
        let addresses = (0..).zip(rings).map(|(index, ring)| {
            let log_guest_addr = ring.log_guest_addr.filter(|_| on);
            Request::SetVringAddr(
                RingAddresses {
                    log_guest_addr,
                    ..self.told_addresses(*ring)
                }
                .of_ring(index),
            )
        });
        let addresses: Vec<_> = addresses.collect();
        // A ring is logged only within the time in which anything is.
        if on {
            self.ask(features);
            addresses.into_iter().for_each(|request| self.ask(request));
        } else {
            addresses.into_iter().for_each(|request| self.ask(request));
            self.ask(features);
        }
        // An answer to this one says that everything before it has been served, with or without acknowledgements.
        self.ask(Request::GetFeatures);
        self.logging = Some(on);
        Ok(())
    }

    /// Has the back-end announce a MAC address to the network, because its guest has moved here.
    ///
    /// # Errors
    /// The back-end cannot announce anything. Nothing was sent.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), SessionError> {
        if !self.protocol.contains(ProtocolFeatures::RARP) {
            return Err(misuse(
                "the back-end does not announce guests that have moved".to_owned(),
            ));
        }
        let [a, b, c, d, e, f] = mac;
        let word = u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]);
        self.ask(Request::SendRarp(word));
        Ok(())
    }

    fn check_can_log(&self) -> Result<(), SessionError> {
        let possible = self.protocol.contains(ProtocolFeatures::LOG_SHMFD)
            && self.offered.features & bits::LOG_ALL != 0;
        if self.phase != Phase::Running || !possible {
            return Err(misuse(
                "the back-end does not run yet, or does not log what it writes".to_owned(),
            ));
        }
        Ok(())
    }

    /// Returns the next message to send and the descriptors that go with it, if the answer before it has come.
    pub fn next_message(&mut self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        if self.awaited.is_some() || self.postcopy == Postcopy::Mapped {
            return None;
        }
        let Some((request, fds)) = self.queue.pop_front() else {
            self.queue_is_empty();
            return None;
        };
        let own_reply =
            request.kind().reply() != Reply::Ack || self.is_answered_with_places(&request);
        let acknowledged = !own_reply
            && !Self::is_served_note(&request)
            && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        let mut bytes = Vec::new();
        request.encode(acknowledged, &mut bytes);
        if let Request::SetProtocolFeatures(accepted) = request {
            // In force for all that comes after it.
            self.protocol = ProtocolFeatures::from_bits_retain(accepted);
        }
        if own_reply || acknowledged {
            self.awaited = Some(request);
            self.asked += 1;
        }
        Some((bytes, fds))
    }

    /// Takes a message that came from the back-end: the answer to the request that awaits one, or the end.
    ///
    /// # Errors
    /// The session has ended: it is not that answer, or the back-end refused what cannot be done without.
    pub(crate) fn answered(&mut self, message: Message) -> Result<(), SessionError> {
        let header = message.header;
        let expected = self
            .awaited
            .as_ref()
            .map_or("nothing", |request| request.kind().name());
        let request = self
            .awaited
            .take()
            .filter(|r| r.kind().code() == header.request && header.is_reply());
        let Some(request) = request else {
            return Err(SessionError::NotTheReply {
                expected,
                found: header.request,
                flags: header.flags,
            });
        };
        let name = request.kind().name();
        if matches!(request, Request::GetInflightFd(_)) {
            return self.take_record(&request, message);
        }
        if matches!(request, Request::SetDeviceStateFd(_)) {
            return self.take_state_answer(&request, message);
        }
        if matches!(request, Request::PostcopyAdvise) {
            return self.take_advice(message);
        }
        if !message.fds.is_empty() || message.misplaced {
            return Err(SessionError::ReplyDescriptors {
                request: name,
                found: message.fds.len(),
            });
        }
        self.take_answer(&request, &message.payload)
    }

    /// Takes the record that the back-end has made, and has it used. One that makes none answers with nothing.
    fn take_record(&mut self, request: &Request, message: Message) -> Result<(), SessionError> {
        let area = optional::<InflightArea>(request, &message.payload)?;
        let found = message.fds.len();
        let mut files = message.fds.into_iter();
        match (area, files.next(), files.next()) {
            (None, None, _) => Ok(()),
            (Some(area), Some(file), None) if !message.misplaced => {
                let record = InflightFile { area, file };
                self.queue.push_front(use_record(&record)?);
                self.inflight = Some(record);
                Ok(())
            }
            _ => Err(SessionError::ReplyDescriptors {
                request: request.kind().name(),
                found,
            }),
        }
    }

    /// Hands out the record of buffers in flight, if there is one: for the back-end after this one.
    pub fn take_inflight(&mut self) -> Option<InflightFile> {
        self.inflight.take()
    }

    /// Returns what the driver has to know next.
    pub fn next_event(&mut self) -> Option<FrontendEvent> {
        self.events.pop_front()
    }

    /// Returns what the back-end offers, as far as it is known.
    #[must_use]
    pub fn offered(&self) -> &Offered {
        &self.offered
    }

    /// Returns the protocol features in force.
    #[must_use]
    pub fn protocol_features(&self) -> ProtocolFeatures {
        self.protocol
    }

    /// Returns the request whose answer is awaited, and its number among all of them.
    pub(crate) fn awaited(&self) -> Option<(&'static str, u64)> {
        self.awaited
            .as_ref()
            .map(|request| (request.kind().name(), self.asked))
    }

    fn ask(&mut self, request: Request) {
        self.queue.push_back((request, Vec::new()));
    }

    /// Everything of this part of the handshake has been sent and answered.
    fn queue_is_empty(&mut self) {
        let (next, event) = match self.phase {
            Phase::Asking => (
                Phase::Choosing,
                FrontendEvent::Offered(self.offered.clone()),
            ),
            Phase::Telling => (Phase::Running, FrontendEvent::Running),
            Phase::Choosing | Phase::Running => return,
        };
        self.phase = next;
        self.events.push_back(event);
    }

    fn take_answer(&mut self, request: &Request, payload: &[u8]) -> Result<(), SessionError> {
        match request {
            Request::GetFeatures if self.phase == Phase::Asking => {
                self.offered.features = parse(request, payload)?;
                if self.offered.features & bits::PROTOCOL_FEATURES != 0 {
                    self.ask(Request::GetProtocolFeatures);
                }
            }
            Request::GetFeatures => {
                let _: u64 = parse(request, payload)?;
                let logging = self.logging.take();
                self.events.extend(logging.map(FrontendEvent::Logging));
            }
            // Back-ends answer this with what they were told, with a number, or with nothing.
            Request::SetLogBase(_) => {}
            Request::SetMemTable(_) if self.is_answered_with_places(request) => {
                self.take_places(request, payload)?;
            }
            Request::GetProtocolFeatures => {
                self.offered.protocol_features =
                    ProtocolFeatures::from_bits_retain(parse(request, payload)?);
                self.ask_more(self.offered.protocol_features & self.wanted);
            }
            Request::GetQueueNum => self.offered.queue_pairs = optional(request, payload)?,
            Request::GetMaxMemSlots => self.offered.memory_slots = optional(request, payload)?,
            Request::GetConfig(asked) => {
                let config =
                    optional::<Config>(request, payload)?.filter(|config| !config.data.is_empty());
                if config
                    .as_ref()
                    .is_some_and(|config| config.data.len() != asked.data.len())
                {
                    return Err(wrong_length(request, payload, Config::LENGTH));
                }
                if self.phase != Phase::Asking
                    && let Some(config) = &config
                {
                    let event = FrontendEvent::ConfigChanged(config.data.clone());
                    self.events.push_back(event);
                }
                self.offered.config = config.map(|config| config.data);
            }
            Request::GetStatus if self.phase == Phase::Asking => {
                let status = optional::<u64>(request, payload)?;
                self.offered.status = status.and_then(|status| u8::try_from(status).ok());
            }
            Request::GetStatus if self.phase == Phase::Running => {
                if parse::<u64>(request, payload)? & NEEDS_RESET != 0 {
                    self.events.push_back(FrontendEvent::NeedsReset);
                }
            }
            Request::GetStatus => {
                let code = parse(request, payload)?;
                if code & FEATURES_OK == 0 {
                    return Err(SessionError::Refused {
                        request: "SET_FEATURES",
                        code,
                    });
                }
            }
            Request::GetVringBase(asked) => {
                let VringState { index, num } = parse(request, payload)?;
                if index != asked.index {
                    return Err(SessionError::ReplyRing {
                        asked: asked.index,
                        found: index,
                    });
                }
                self.events.push_back(FrontendEvent::RingStopped {
                    ring: index,
                    base: num,
                });
            }
            _ => match parse(request, payload)? {
                0 => self.events.extend(match request {
                    Request::IotlbMsg(told) => Some(FrontendEvent::Translated(*told)),
                    Request::CheckDeviceState => Some(FrontendEvent::StateDone),
                    Request::PostcopyEnd => {
                        self.postcopy = Postcopy::Off;
                        Some(FrontendEvent::PostcopyEnded)
                    }
                    _ => None,
                }),
                code => self.refused(request.kind(), code)?,
            },
        }
        Ok(())
    }

    /// Asks what only back-ends with these protocol features can tell.
    fn ask_more(&mut self, mut accepted: ProtocolFeatures) {
        // Spec: vhost-user, In-band notifications: calls need the channel, and kicks are acknowledged.
        let needs = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ;
        if !accepted.contains(needs) {
            accepted -= ProtocolFeatures::INBAND_NOTIFICATIONS;
        }
        // Spec: vhost-user, CONFIGURE_MEM_SLOTS: with it there are no messages of post-copy.
        if accepted.contains(ProtocolFeatures::PAGEFAULT) {
            accepted -= ProtocolFeatures::CONFIGURE_MEM_SLOTS;
        }
        let questions = [
            (ProtocolFeatures::MQ, Request::GetQueueNum),
            (
                ProtocolFeatures::CONFIGURE_MEM_SLOTS,
                Request::GetMaxMemSlots,
            ),
            (ProtocolFeatures::CONFIG, Request::GetConfig(whole_config())),
            (ProtocolFeatures::STATUS, Request::GetStatus),
        ];
        self.ask(Request::SetProtocolFeatures(accepted.bits()));
        if accepted.contains(ProtocolFeatures::BACKEND_REQ)
            && let Some(channel) = self.channel.take()
        {
            self.queue
                .push_back((Request::SetBackendReqFd, vec![channel]));
        }
        for (needs, question) in questions {
            if accepted.contains(needs) {
                self.ask(question);
            }
        }
    }

    /// What is refused during the handshake cannot be done without, except telling the MTU and taking the channel.
    fn refused(&mut self, request: RequestKind, code: u64) -> Result<(), SessionError> {
        let optional = [RequestKind::NetSetMtu, RequestKind::SetBackendReqFd];
        if self.phase == Phase::Running || optional.contains(&request) {
            self.events
                .push_back(FrontendEvent::Refused { request, code });
            return Ok(());
        }
        Err(SessionError::Refused {
            request: request.name(),
            code,
        })
    }

    /// The messages that tell the memory: one table, or one region after the other if they are too many for it.
    fn memory(&self, regions: Vec<Region>) -> Result<Vec<(Request, Vec<OwnedFd>)>, SessionError> {
        let count = regions.len();
        if count <= MAX_TABLE_REGIONS {
            let (layouts, files) = regions
                .into_iter()
                .map(|region| (region.layout, region.file))
                .unzip();
            return Ok(vec![(Request::SetMemTable(MemoryTable(layouts)), files)]);
        }
        let most = self
            .offered
            .memory_slots
            .unwrap_or(MAX_TABLE_REGIONS as u64);
        if count as u64 > most {
            return Err(misuse(format!(
                "the back-end takes at most {most} memory regions, not {count}"
            )));
        }
        let message = |region: Region| {
            (
                Request::AddMemReg(SingleRegion(region.layout)),
                vec![region.file],
            )
        };
        Ok(regions.into_iter().map(message).collect())
    }
}

/// The message that has a record of buffers in flight used.
fn use_record(record: &InflightFile) -> Result<(Request, Vec<OwnedFd>), SessionError> {
    let copy = record.file.try_clone().map_err(|source| SessionError::Io {
        operation: "hand a record of buffers in flight to",
        source,
    })?;
    Ok((Request::SetInflightFd(record.area), vec![copy]))
}

/// The question for all of the configuration space that is understood.
fn whole_config() -> Config {
    Config {
        data: vec![0; CONFIG_LEN],
        ..Config::default()
    }
}

fn misuse(what: String) -> SessionError {
    SessionError::Misuse { what }
}

#[cfg(test)]
mod tests;
