//! The back-end's end of a connection: reads requests, has a device carry them out, answers.
//!
//! [`Backend::on_readable`] takes what is there, one message after the other. The session says what follows from it,
//! the [`BackendDevice`] does it, and only then the answer goes out: an acknowledgement means done. What the session or the
//! device refuses is answered with a non-zero acknowledgement (if one was asked for), counted, and changes nothing.
//!
//! An error ends the connection. The device is told once, and the owner drops the back-end and listens again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use virtnet_sys::{PeerCredentials, Stream};

use crate::channel::BackChannel;
use crate::connection::{Connection, Message};
use crate::device::{BackendDevice, DeviceError};
use crate::error::{Refusal, SessionError};
use crate::in_band::InBand;
use crate::message::{BackRequest, Request, RequestKind, encode_reply};
use crate::payload::{Config, LogArea, MemoryTable, Payload, SingleRegion, VringState};
use crate::regions::InflightFile;
use crate::ring_state::RingState;
use crate::session::{Action, Answer, BackendSession, Offer, RingSetup, Step};
use crate::transfer::{self, Transfer};

/// The most messages one call of [`Backend::on_readable`] serves; the rest is still readable after it.
const MESSAGES_PER_CALL: usize = 64;

/// A connection to a front-end.
#[derive(Debug)]
pub struct Backend {
    connection: Connection,
    session: BackendSession,
    /// For requests of our own, once the front-end has handed it over.
    channel: Option<BackChannel>,
    channel_error: Option<SessionError>,
    /// Stand-ins for events, where notifications are messages.
    in_band: Option<InBand>,
    /// A transfer of the device's state of which has not been asked whether it worked.
    transfer: Option<Transfer>,
    ended: bool,
    messages: u64,
    refusals: u64,
    last_refusal: Option<Refusal>,
}

impl Backend {
    /// Serves a front-end that has connected, or was connected to.
    #[must_use]
    pub fn new(stream: Stream, offer: Offer) -> Self {
        Self {
            connection: Connection::new(stream),
            session: BackendSession::new(offer),
            channel: None,
            channel_error: None,
            in_band: None,
            transfer: None,
            ended: false,
            messages: 0,
            refusals: 0,
            last_refusal: None,
        }
    }

    /// Serves the messages that are there; never waits.
    ///
    /// # Errors
    /// The connection has ended and the device has been told; drop the back-end.
    pub fn on_readable(&mut self, device: &mut dyn BackendDevice) -> Result<(), SessionError> {
        let served = self.serve_some(device);
        // Translations come over the connection, and that they have been sent over the channel: in this order they are in force.
        self.serve_channel(device);
        self.send_calls();
        self.end_on_error(served, device)
    }

    /// Sends on what the front-end did not take before; to be called when [`Backend::wants_write`].
    ///
    /// # Errors
    /// As [`Backend::on_readable`].
    pub fn on_writable(&mut self, device: &mut dyn BackendDevice) -> Result<(), SessionError> {
        let flushed = self.connection.flush();
        self.end_on_error(flushed, device)
    }

    /// Ends a connection that stands still in the middle of a message; to be called about once a second.
    ///
    /// # Errors
    /// As [`Backend::on_readable`].
    pub fn on_tick(
        &mut self,
        now_ns: u64,
        device: &mut dyn BackendDevice,
    ) -> Result<(), SessionError> {
        let progress = self.connection.check_progress(now_ns);
        self.with_channel(|channel| channel.check_progress(now_ns));
        self.end_on_error(progress, device)
    }

    /// Ends the connection from our side; the device is told.
    pub fn close(mut self, device: &mut dyn BackendDevice) {
        self.end(device);
    }

    /// Tells whether an answer waits until the front-end reads.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Tells the driver, where the status is negotiated, that the device needs a reset.
    pub fn set_needs_reset(&mut self) {
        self.session.set_needs_reset();
    }

    /// Tells the front-end that the configuration space has changed, if it wants to be told; whether it does.
    pub fn config_changed(&mut self) -> bool {
        self.ask(BackRequest::ConfigChange)
    }

    /// Asks the front-end something, without waiting; whether that was possible: it has handed over a channel, has agreed on what
    /// the request needs, and answers.
    pub fn ask(&mut self, request: BackRequest) -> bool {
        let agreed = self.session.protocol_features();
        if !agreed.contains(request.kind().needs()) {
            return false;
        }
        let acknowledged = self.session.acknowledges();
        self.with_channel(|channel| channel.ask(request, acknowledged))
            .unwrap_or(false)
    }

    /// The socket of the channel, to be waited for beside the connection's, and whether something waits to be sent over it.
    #[must_use]
    pub fn channel(&self) -> Option<(BorrowedFd<'_>, bool)> {
        let connection = self.channel.as_ref()?.connection();
        Some((connection.stream().as_fd(), connection.wants_write()))
    }

    /// Readable when there are calls to be sent over the channel; to be waited for beside the connection.
    #[must_use]
    pub fn calls(&self) -> Option<BorrowedFd<'_>> {
        self.in_band.as_ref().map(AsFd::as_fd)
    }

    /// Returns why the channel was given up, if it was.
    #[must_use]
    pub fn channel_error(&self) -> Option<&SessionError> {
        self.channel_error.as_ref()
    }

    /// Returns what has been agreed so far.
    #[must_use]
    pub fn session(&self) -> &BackendSession {
        &self.session
    }

    /// Returns the two states of a ring.
    #[must_use]
    pub fn ring_state(&self, ring: usize) -> RingState {
        self.session.ring_state(ring)
    }

    /// Returns who the front-end is.
    ///
    /// # Errors
    /// None in practice.
    pub fn peer(&self) -> std::io::Result<PeerCredentials> {
        self.connection.stream().peer()
    }

    /// Returns how many messages have been served, and how many of them were refused.
    #[must_use]
    pub fn counters(&self) -> (u64, u64) {
        (self.messages, self.refusals)
    }

    /// Returns the latest refusal.
    #[must_use]
    pub fn last_refusal(&self) -> Option<&Refusal> {
        self.last_refusal.as_ref()
    }

    fn serve_some(&mut self, device: &mut dyn BackendDevice) -> Result<(), SessionError> {
        if self.ended {
            return Err(SessionError::Disconnected);
        }
        for _ in 0..MESSAGES_PER_CALL {
            let Some(message) = self.connection.receive()? else {
                break;
            };
            self.messages += 1;
            self.serve(message, device)?;
        }
        Ok(())
    }

    /// Hands the front-end's answers to the device.
    fn serve_channel(&mut self, device: &mut dyn BackendDevice) {
        let answers = self.with_channel(BackChannel::answers).unwrap_or_default();
        for answer in answers {
            let next = self
                .in_band
                .as_mut()
                .and_then(|in_band| in_band.answered(&answer.request));
            if let Some(call) = next {
                self.send_call(call);
            }
            device.answered(&answer.request, answer.code);
        }
    }

    /// Sends what devices have signalled that have no events of the front-end's.
    fn send_calls(&mut self) {
        let calls = self.in_band.as_mut().map(InBand::calls);
        for call in calls.unwrap_or_default() {
            self.send_call(call);
        }
    }

    fn send_call(&mut self, call: BackRequest) {
        // A front-end that has no channel, or gave it up, polls.
        let sent = self.ask(call.clone());
        let acknowledged = sent && self.session.acknowledges();
        if let Some(in_band) = &mut self.in_band {
            in_band.sent(&call, acknowledged);
        }
    }

    /// Does something with the channel; one that fails is given up, and the session goes on without.
    fn with_channel<R>(
        &mut self,
        work: impl FnOnce(&mut BackChannel) -> Result<R, SessionError>,
    ) -> Option<R> {
        match work(self.channel.as_mut()?) {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.channel = None;
                self.channel_error = Some(error);
                None
            }
        }
    }

    fn set_channel(&mut self, fd: OwnedFd) -> Result<(), Refusal> {
        let wrong = |error| match error {
            SessionError::System(source) => Refusal::DescriptorKind {
                request: RequestKind::SetBackendReqFd.name(),
                source,
            },
            error => Refusal::Device {
                request: RequestKind::SetBackendReqFd.name(),
                source: error.into(),
            },
        };
        self.channel = Some(BackChannel::new(fd).map_err(wrong)?);
        self.channel_error = None;
        Ok(())
    }

    fn serve(
        &mut self,
        message: Message,
        device: &mut dyn BackendDevice,
    ) -> Result<(), SessionError> {
        let header = message.header;
        if header.is_reply() {
            return Err(SessionError::ReplyToNothing {
                request: header.request,
            });
        }
        let kind = RequestKind::from_code(header.request);
        let done = match kind {
            Some(kind) => self.carry_out(kind, message, device)?,
            None => Err(Refusal::Unknown {
                code: header.request,
            }),
        };
        let (answer, refusal) = match done {
            Ok(Done {
                answer,
                reservation,
            }) => (answer, reservation),
            Err(refusal) if kind == Some(RequestKind::SetDeviceStateFd) => {
                (Reaction::Number(transfer::REFUSED), Some(refusal))
            }
            Err(refusal) if kind == Some(RequestKind::CheckDeviceState) => {
                (Reaction::Number(1), Some(refusal))
            }
            // A refused question is answered by nothing, which no right answer is.
            Err(refusal) if kind.is_some_and(|kind| self.session.has_own_reply(kind)) => {
                (Reaction::Nothing, Some(refusal))
            }
            Err(refusal) => (Reaction::Ack, Some(refusal)),
        };
        let refused = refusal.is_some();
        if let Some(refusal) = refusal {
            device.refused(&refusal);
            self.refusals += 1;
            self.last_refusal = Some(refusal);
        }
        let code = header.request;
        match answer {
            Reaction::Descriptor(fd) => self.reply_with(code, &(), vec![fd]),
            Reaction::Table(table) => self.reply(code, &table),
            Reaction::Slot(region) => self.reply(code, &region),
            Reaction::Number(number) => self.reply(code, &number),
            Reaction::Base(state) => self.reply(code, &state),
            Reaction::Config(config) => self.reply(code, &config),
            Reaction::Log(area) => self.reply(code, &area),
            Reaction::Inflight(record) => self.reply_with(code, &record.area, vec![record.file]),
            Reaction::Nothing => self.reply(code, &()),
            Reaction::Ack if header.needs_reply() && self.session.acknowledges() => {
                self.reply(code, &u64::from(refused))
            }
            Reaction::Ack => Ok(()),
        }
    }

    /// Has the session decide and the device do; the session moves on only if the device could do all of it.
    fn carry_out(
        &mut self,
        kind: RequestKind,
        message: Message,
        device: &mut dyn BackendDevice,
    ) -> Result<Result<Done, Refusal>, SessionError> {
        let name = kind.name();
        if message.misplaced {
            return Ok(Err(Refusal::DescriptorPlace { request: name }));
        }
        if self.session.is_memory_ready(kind, &message.payload) {
            return match self.session.memory_is_ready(kind) {
                Ok(step) => self.make(kind, step, device),
                Err(refusal) => Ok(Err(refusal)),
            };
        }
        let Some(request) = Request::decode(kind, &message.payload) else {
            let found = message.payload.len();
            return Ok(Err(Refusal::PayloadLength {
                request: name,
                expected: kind.length(),
                found,
            }));
        };
        if let Request::SetProtocolFeatures(accepted) = &request {
            self.session.check_in_band(*accepted)?;
        }
        let done = match self.session.handle(&request, message.fds) {
            Ok(step) => self.make(kind, step, device)?,
            Err(refusal) => Err(refusal),
        };
        if done.is_err() {
            self.session.refused(&request);
        }
        Ok(done)
    }

    /// Has the device do what follows from a request.
    fn make(
        &mut self,
        kind: RequestKind,
        mut step: Step,
        device: &mut dyn BackendDevice,
    ) -> Result<Result<Done, Refusal>, SessionError> {
        let name = kind.name();
        let by_device = |source| Refusal::Device {
            request: name,
            source,
        };
        for action in std::mem::take(&mut step.actions) {
            match action {
                Action::StopRing(ring) => {
                    let base = device
                        .stop_ring(ring)
                        .map_err(|source| SessionError::Device { ring, source })?;
                    step.ring_stopped(ring, base);
                }
                // The request itself was right; the ring stays stopped and waits for another kick.
                Action::StartRing(ring, setup) => {
                    let started = self
                        .with_events(ring, setup)
                        .and_then(|setup| device.start_ring(ring, setup));
                    if let Err(source) = started {
                        step.ring_failed(ring);
                        step.reservation = Some(by_device(source));
                    }
                }
                Action::SetChannel(fd) => {
                    if let Err(refusal) = self.set_channel(fd) {
                        return Ok(Err(refusal));
                    }
                }
                Action::Kick(ring) => {
                    if let Some(in_band) = &self.in_band {
                        in_band.kick(ring);
                    }
                }
                Action::SaveState(pipe) => {
                    self.transfer = None;
                    match Transfer::save(pipe, device) {
                        Ok(transfer) => self.transfer = Some(transfer),
                        Err(source) => return Ok(Err(by_device(source))),
                    }
                }
                Action::LoadState(pipe) => match Transfer::load(pipe) {
                    Ok(transfer) => self.transfer = Some(transfer),
                    Err(source) => {
                        self.transfer = None;
                        return Ok(Err(by_device(source.into())));
                    }
                },
                action => {
                    let done = self
                        .with_stand_in(action)
                        .and_then(|action| act(action, device));
                    if let Err(source) = done {
                        return Ok(Err(by_device(source)));
                    }
                }
            }
        }
        let answer = match step.answer.clone() {
            Answer::Ack => Reaction::Ack,
            Answer::Number(number) => Reaction::Number(number),
            Answer::Base(ring) => Reaction::Base(VringState {
                index: u32::try_from(ring).unwrap_or(u32::MAX),
                num: step.base(ring),
            }),
            Answer::Config(mut config) => {
                // What the question carried is not to be seen in the answer.
                config.data.fill(0);
                device.read_config(config.offset, &mut config.data);
                Reaction::Config(config)
            }
            // Some front-ends take any answer, one only what it has said itself.
            Answer::Log(area) => Reaction::Log(area),
            Answer::Inflight(area) => match device.make_inflight(area) {
                Ok(record) => Reaction::Inflight(record),
                Err(source) => {
                    let request = name;
                    return Ok(Err(Refusal::Device { request, source }));
                }
            },
            Answer::Userfault => match device.advise_postcopy() {
                Ok(fd) => Reaction::Descriptor(fd),
                Err(source) => return Ok(Err(by_device(source))),
            },
            Answer::Mapped(MemoryTable(mut layouts)) => {
                for layout in &mut layouts {
                    layout.user_addr = device.mapped_at(layout);
                }
                Reaction::Table(MemoryTable(layouts))
            }
            Answer::MappedSlot(mut layout) => {
                layout.user_addr = device.mapped_at(&layout);
                Reaction::Slot(SingleRegion(layout))
            }
            Answer::StateCheck => {
                match self.transfer.take().map(|transfer| transfer.finish(device)) {
                    Some(Ok(())) => Reaction::Number(0),
                    Some(Err(source)) => return Ok(Err(by_device(source))),
                    None => return Ok(Err(Refusal::NoTransfer { request: name })),
                }
            }
        };
        let reservation = step.reservation.take();
        self.session.commit(step);
        Ok(Ok(Done {
            answer,
            reservation,
        }))
    }

    /// A ring's setup with events for those that the front-end notifies of, and is notified of, by message.
    fn with_events(&mut self, ring: usize, mut setup: RingSetup) -> Result<RingSetup, DeviceError> {
        if self.session.is_in_band() {
            self.in_band()?.complete(ring, &mut setup)?;
        }
        Ok(setup)
    }

    /// The same for one event that changes.
    fn with_stand_in(&mut self, action: Action) -> Result<Action, DeviceError> {
        if !self.session.is_in_band() {
            return Ok(action);
        }
        Ok(match action {
            Action::SetKick(ring, kick) => {
                Action::SetKick(ring, self.in_band()?.kick_of(ring, kick)?)
            }
            Action::SetCall(ring, call) => {
                Action::SetCall(ring, self.in_band()?.call_of(ring, call)?)
            }
            Action::SetErr(ring, err) => Action::SetErr(ring, self.in_band()?.err_of(ring, err)?),
            action => action,
        })
    }

    fn in_band(&mut self) -> Result<&mut InBand, DeviceError> {
        let rings = self.session.rings();
        let in_band = match self.in_band.take() {
            Some(in_band) => in_band,
            None => InBand::new(rings)?,
        };
        Ok(self.in_band.insert(in_band))
    }

    fn reply(&mut self, code: u32, payload: &impl Payload) -> Result<(), SessionError> {
        self.reply_with(code, payload, Vec::new())
    }

    fn reply_with(
        &mut self,
        code: u32,
        payload: &impl Payload,
        fds: Vec<OwnedFd>,
    ) -> Result<(), SessionError> {
        let mut bytes = Vec::new();
        encode_reply(code, payload, &mut bytes);
        self.connection.send(bytes, fds)
    }

    fn end_on_error(
        &mut self,
        outcome: Result<(), SessionError>,
        device: &mut dyn BackendDevice,
    ) -> Result<(), SessionError> {
        if outcome.is_err() {
            self.end(device);
        }
        outcome
    }

    fn end(&mut self, device: &mut dyn BackendDevice) {
        if !std::mem::replace(&mut self.ended, true) {
            self.channel = None;
            device.disconnected();
        }
    }
}

impl AsFd for Backend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.stream().as_fd()
    }
}

/// A request that was carried out.
struct Done {
    answer: Reaction,
    reservation: Option<Refusal>,
}

/// What goes back over the socket.
enum Reaction {
    Ack,
    Number(u64),
    Base(VringState),
    Config(Config),
    Log(LogArea),
    Inflight(InflightFile),
    Table(MemoryTable),
    Slot(SingleRegion),
    Descriptor(OwnedFd),
    Nothing,
}

/// Has the device do one thing that it can refuse. Starting and stopping a ring have consequences for the session.
fn act(action: Action, device: &mut dyn BackendDevice) -> Result<(), DeviceError> {
    match action {
        Action::SetFeatures(features) => device.set_features(features),
        Action::SetMemory(regions) => device.set_memory(regions),
        Action::AddMemory(region) => device.add_memory(region),
        Action::RemoveMemory(region) => device.remove_memory(region),
        Action::SetLog(log) => device.set_log(log),
        Action::SetInflight(record) => device.set_inflight(record),
        Action::StartRing(ring, setup) => device.start_ring(ring, setup),
        Action::StopRing(ring) => device.stop_ring(ring).map(drop),
        Action::EnableRing(ring, enabled) => {
            device.enable_ring(ring, enabled);
            Ok(())
        }
        Action::SetKick(ring, kick) => device.set_kick(ring, kick),
        Action::SetCall(ring, call) => device.set_call(ring, call),
        Action::SetErr(ring, err) => device.set_err(ring, err),
        Action::SetAddresses(ring, addresses) => device.set_addresses(ring, addresses),
        Action::Reset => {
            device.reset();
            Ok(())
        }
        Action::SetStatus(status) => {
            device.set_status(status);
            Ok(())
        }
        Action::SetMtu(mtu) => device.set_mtu(mtu),
        Action::SendRarp(mac) => device.send_rarp(mac),
        Action::WriteConfig(config) => device.write_config(&config),
        Action::Translate(change) => device.translate(change),
        Action::CatchFaults => device.catch_faults(),
        Action::EndPostcopy => {
            device.end_postcopy();
            Ok(())
        }
        // They are the connection's business.
        Action::SetChannel(_) | Action::Kick(_) | Action::SaveState(_) | Action::LoadState(_) => {
            Ok(())
        }
    }
}
