//! The back-end's side of a session, as a state machine that touches no socket and no memory.
//!
//! *Theory of operation.* [`BackendSession::handle`] looks at one request and says what follows from it: a [`Step`] with
//! actions for the device and the form of the answer, or a [`Refusal`]. It changes nothing. The caller carries the
//! actions out, and when the device agreed hands the step back to [`BackendSession::commit`]; a step that is dropped has
//! never been. So a refused request leaves the state as it was, whoever refused it.
//!
//! What may come when is not written here: three columns of the table in [`message`](crate::message) (`needs`,
//! `descriptors`, `when`) are checked before a request is looked at. Beyond that any order is served. A front-end may
//! give a ring its size, place, start, kick and call in whatever order it likes, before or after the memory; the ring
//! starts at the message that completes it. With the STATUS protocol feature that message is the driver's DRIVER_OK.
//!
//! Spec: vhost-user, Front-end message types; Ring states

mod state;
mod step;

use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtnet_sys::EventFd;

use crate::bits;
use crate::error::{Refusal, SessionError};
use crate::features::ProtocolFeatures;
use crate::message::{Reply, Request, RequestKind, When};
use crate::payload::{
    Config, DeviceState, InflightArea, Iotlb, MAX_CONFIG_LEN, MemoryTable, SingleRegion, VringFd,
    VringState,
};
use crate::regions::{InflightFile, LogFile, MAX_SLOTS, Region, Regions};
use crate::ring_state::RingState;
use crate::transfer;

pub use state::{RingAddresses, RingSetup};
pub use step::{Action, Answer, Step};

use state::{Postcopy, Ring, State, check_alignment};

/// The largest ring there is.
const MAX_RING_SIZE: u32 = 32_768;

/// The most rings a message can tell apart.
const MAX_RINGS: usize = 256;

const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;

/// What a device offers to its front-ends.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Virtio features; bits 26 and 30 are added by the session, where there is something behind them.
    pub features: u64,
    /// Protocol features; those the session does not implement are left out.
    pub protocol_features: ProtocolFeatures,
    /// Queue pairs, as GET_QUEUE_NUM is answered.
    pub queue_pairs: u16,
    /// Rings in all: two for each queue pair, and one more if the control queue is served as well.
    pub rings: usize,
    /// The MTU a front-end may set.
    pub mtu: RangeInclusive<u16>,
}

impl Offer {
    /// Offers queue pairs without a control queue, and any MTU.
    #[must_use]
    pub fn new(features: u64, protocol_features: ProtocolFeatures, queue_pairs: u16) -> Self {
        Self {
            features,
            protocol_features,
            queue_pairs,
            rings: 2 * usize::from(queue_pairs),
            mtu: 68..=u16::MAX,
        }
    }
}
/// The back-end's side of a session.
#[derive(Debug)]
pub struct BackendSession {
    offer: Offer,
    state: State,
}
impl BackendSession {
    /// Begins a session in which nothing has been said.
    #[must_use]
    pub fn new(mut offer: Offer) -> Self {
        offer.protocol_features &= ProtocolFeatures::BACKEND;
        offer.features &= !(bits::PROTOCOL_FEATURES | bits::LOG_ALL);
        offer.rings = offer.rings.min(MAX_RINGS);
        let state = State {
            rings: vec![Ring::default(); offer.rings],
            ..State::default()
        };
        Self { offer, state }
    }

    /// Says what follows from a request that came with these descriptors, and changes nothing.
    ///
    /// # Errors
    /// The request is not carried out, and why. The descriptors are closed.
    pub fn handle(&self, request: &Request, fds: Vec<OwnedFd>) -> Result<Step, Refusal> {
        let ring = self.check_table(request, fds.len())?;
        let mut step = self.step();
        self.dispatch(request, ring, fds, &mut step)?;
        Ok(step)
    }

    /// A step from which nothing follows.
    fn step(&self) -> Step {
        Step {
            actions: Vec::new(),
            answer: Answer::Ack,
            reservation: None,
            next: self.state.clone(),
            resets: false,
        }
    }

    /// Makes a step whose actions have been carried out.
    pub fn commit(&mut self, step: Step) {
        self.state = step.next;
    }

    /// Notes that a request was refused, by the session or by the device.
    ///
    /// Only one refusal is remembered: after refused features the driver must not see FEATURES_OK.
    pub fn refused(&mut self, request: &Request) {
        if matches!(request, Request::SetFeatures(_)) {
            self.state.features_refused = true;
        }
    }

    /// Notes that the device cannot go on before it is reset; GET_STATUS says so from now on.
    pub fn set_needs_reset(&mut self) {
        self.state.status |= NEEDS_RESET;
    }

    /// Tells whether a message that asks for an acknowledgement gets one.
    #[must_use]
    pub fn acknowledges(&self) -> bool {
        self.state.protocol.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// Tells whether a request is answered whatever it asks for, with a payload of its own.
    #[must_use]
    pub fn has_own_reply(&self, kind: RequestKind) -> bool {
        match kind.reply() {
            Reply::Ack => false,
            Reply::Own => true,
            Reply::OwnWithLog => self.state.protocol.contains(ProtocolFeatures::LOG_SHMFD),
        }
    }

    /// Checks that notifications by message, where they are offered, are accepted with what they need.
    ///
    /// # Errors
    /// The connection has to end. Spec: vhost-user, In-band notifications
    pub fn check_in_band(&self, accepted: u64) -> Result<(), SessionError> {
        let found = ProtocolFeatures::from_bits_retain(accepted) & self.offer.protocol_features;
        let needs = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ;
        if found.contains(ProtocolFeatures::INBAND_NOTIFICATIONS) && !found.contains(needs) {
            return Err(SessionError::InBandAlone { found });
        }
        Ok(())
    }

    /// Tells whether rings without events are kicked, and call, by messages.
    #[must_use]
    pub fn is_in_band(&self) -> bool {
        self.state
            .protocol
            .contains(ProtocolFeatures::INBAND_NOTIFICATIONS)
    }

    /// Returns how many rings the device has.
    #[must_use]
    pub fn rings(&self) -> usize {
        self.state.rings.len()
    }

    /// Returns the virtio features that were accepted, without bit 30.
    #[must_use]
    pub fn features(&self) -> Option<u64> {
        self.state
            .features
            .map(|features| features & !bits::PROTOCOL_FEATURES)
    }

    /// Returns the protocol features that were accepted.
    #[must_use]
    pub fn protocol_features(&self) -> ProtocolFeatures {
        self.state.protocol
    }

    /// Tells whether the addresses of rings and descriptors go through an IOMMU.
    #[must_use]
    pub fn translates(&self) -> bool {
        self.state.translates
    }

    /// Returns the two states of a ring.
    #[must_use]
    pub fn ring_state(&self, ring: usize) -> RingState {
        self.state
            .rings
            .get(ring)
            .map_or_else(RingState::default, |ring| ring.state)
    }

    /// Tells whether the device uses a ring: it is started and nothing it needs is missing.
    #[must_use]
    pub fn ring_runs(&self, ring: usize) -> bool {
        self.state.rings.get(ring).is_some_and(|ring| ring.runs)
    }

    /// Whether any ring runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.state.rings.iter().any(|ring| ring.runs)
    }

    /// The features that may be accepted, with bits 26 and 30 if there is something behind them.
    fn offered_features(&self) -> u64 {
        let protocol = self.offer.protocol_features;
        let mut offered = self.offer.features;
        if !protocol.is_empty() {
            offered |= bits::PROTOCOL_FEATURES;
        }
        if protocol.contains(ProtocolFeatures::LOG_SHMFD) {
            offered |= bits::LOG_ALL;
        }
        offered
    }

    /// Checks a request against its line in the table; returns the ring it names, or zero.
    fn check_table(&self, request: &Request, fds: usize) -> Result<usize, Refusal> {
        let (kind, name) = (request.kind(), request.kind().name());
        let (least, most) = request.descriptor_count();
        if fds < least || fds > most {
            return Err(Refusal::DescriptorCount {
                request: name,
                expected: least,
                found: fds,
            });
        }
        if kind.when() == When::Never {
            return Err(Refusal::NotServed { request: name });
        }
        let (needs, negotiated) = (kind.needs(), self.state.protocol);
        if !negotiated.contains(needs) {
            return Err(Refusal::NotNegotiated {
                request: name,
                needs,
                negotiated,
            });
        }
        let Some(named) = request.ring() else {
            return Ok(0);
        };
        let rings = self.state.rings.len();
        let ring = usize::try_from(named).ok().filter(|&ring| ring < rings);
        let ring = ring.ok_or(Refusal::RingIndex {
            request: name,
            ring: named,
            rings,
        })?;
        if kind.when() == When::Stopped && self.state.rings[ring].runs {
            return Err(Refusal::RingRuns {
                request: name,
                ring,
            });
        }
        Ok(ring)
    }

    fn dispatch(
        &self,
        request: &Request,
        ring: usize,
        fds: Vec<OwnedFd>,
        step: &mut Step,
    ) -> Result<(), Refusal> {
        let name = request.kind().name();
        match request {
            Request::GetFeatures => step.answer = Answer::Number(self.offered_features()),
            Request::SetFeatures(features) => self.set_features(*features, step)?,
            Request::SetOwner => {}
            Request::ResetOwner => step.stop_all(),
            Request::GetProtocolFeatures => {
                step.answer = Answer::Number(self.offer.protocol_features.bits())
            }
            Request::SetProtocolFeatures(accepted) => self.set_protocol_features(*accepted, step),
            Request::GetQueueNum => step.answer = Answer::Number(self.offer.queue_pairs.into()),
            Request::GetMaxMemSlots => step.answer = Answer::Number(MAX_SLOTS as u64),

            Request::SetMemTable(MemoryTable(layouts)) => {
                if self.memory_arrives_later(name, step)? {
                    step.answer = Answer::Mapped(MemoryTable(layouts.clone()));
                }
                step.next.regions = Regions::table(name, layouts)?;
                let regions = layouts.iter().zip(fds).map(|(layout, file)| Region {
                    layout: *layout,
                    file,
                });
                step.actions.push(Action::SetMemory(regions.collect()));
                step.start_complete(name)?;
            }
            Request::AddMemReg(SingleRegion(layout)) => {
                if self.memory_arrives_later(name, step)? {
                    step.answer = Answer::MappedSlot(*layout);
                }
                step.next.regions.add(name, *layout)?;
                let regions = fds.into_iter().map(|file| {
                    Action::AddMemory(Region {
                        layout: *layout,
                        file,
                    })
                });
                step.actions.extend(regions);
                step.start_complete(name)?;
            }
            Request::RemMemReg(SingleRegion(layout)) => {
                let removed = step.next.regions.remove(name, *layout)?;
                step.actions.push(Action::RemoveMemory(removed));
            }

            Request::SetLogBase(area) => {
                let log = |file| Action::SetLog(LogFile { area: *area, file });
                step.actions.extend(fds.into_iter().map(log));
                step.answer = Answer::Log(*area);
            }
            Request::SetLogFd => {
                step.next.log_event = first_event(name, fds)?;
            }

            Request::GetInflightFd(area) => {
                self.check_inflight(name, *area)?;
                step.answer = Answer::Inflight(*area);
            }
            Request::SetInflightFd(area) => {
                self.check_inflight(name, *area)?;
                let record = |file| Action::SetInflight(InflightFile { area: *area, file });
                step.actions.extend(fds.into_iter().map(record));
            }

            Request::SetVringNum(VringState { num, .. }) => {
                step.next.rings[ring].size = Some(self.ring_size(*num)?);
                step.start_named(name, ring)?;
            }
            Request::SetVringBase(VringState { num, .. }) => {
                if self.state.is_split() && *num > u32::from(u16::MAX) {
                    return Err(value(name, "the base of a split ring", *num, "below 65536"));
                }
                step.next.rings[ring].base = Some(*num);
                step.start_named(name, ring)?;
            }
            Request::SetVringAddr(wire) => self.set_addresses(ring, (*wire).into(), step)?,
            Request::SetVringKick(word) => {
                let kick = event(name, *word, fds)?;
                step.next.rings[ring].kick.clone_from(&kick);
                step.next.rings[ring].state.started = true;
                if step.next.rings[ring].runs {
                    step.actions.push(Action::SetKick(ring, kick));
                } else {
                    step.start_named(name, ring)?;
                }
            }
            Request::SetVringCall(word) => {
                let call = event(name, *word, fds)?;
                step.next.rings[ring].call.clone_from(&call);
                step.if_running(ring, Action::SetCall(ring, call));
            }
            Request::SetVringErr(word) => {
                let err = event(name, *word, fds)?;
                step.next.rings[ring].err.clone_from(&err);
                step.if_running(ring, Action::SetErr(ring, err));
            }
            Request::SetVringEnable(VringState { num, .. }) => {
                if *num > 1 {
                    return Err(value(name, "the switch", *num, "0 or 1"));
                }
                step.next.rings[ring].state.enabled = *num == 1;
                step.if_running(ring, Action::EnableRing(ring, *num == 1));
            }
            // Nothing is ever in flight between two bursts, so nothing has to be waited for either way.
            Request::VringKick(_) => {
                step.next.rings[ring].state.started = true;
                if step.next.rings[ring].runs {
                    step.actions.push(Action::Kick(ring));
                } else {
                    step.start_named(name, ring)?;
                }
            }
            Request::GetVringBase(_) | Request::GetVringBaseSkipDrain(_) => {
                step.answer = Answer::Base(ring);
                step.stop(ring);
            }

            Request::PostcopyAdvise => {
                step.next.postcopy = Postcopy::Advised;
                step.answer = Answer::Userfault;
            }
            Request::PostcopyListen => {
                if self.state.postcopy != Postcopy::Advised || !self.state.regions.is_empty() {
                    return Err(Refusal::PostcopyOrder { request: name });
                }
                step.next.postcopy = Postcopy::Listening;
            }
            Request::PostcopyEnd => {
                step.next.postcopy = Postcopy::Off;
                step.actions.push(Action::EndPostcopy);
                step.answer = Answer::Number(0);
            }
            Request::SetDeviceStateFd(transfer) => self.transfer_state(*transfer, fds, step)?,
            Request::CheckDeviceState => step.answer = Answer::StateCheck,

            Request::ResetDevice => step.reset(),
            Request::SetStatus(status) => self.set_status(*status, step)?,
            Request::GetStatus => step.answer = Answer::Number(self.state.status.into()),
            Request::NetSetMtu(mtu) => {
                let mtu = u16::try_from(*mtu)
                    .ok()
                    .filter(|mtu| self.offer.mtu.contains(mtu))
                    .ok_or(Refusal::Value {
                        request: name,
                        what: "the MTU",
                        found: *mtu,
                        expected: "one the device can carry",
                    })?;
                step.actions.push(Action::SetMtu(mtu));
            }
            Request::SendRarp(word) => {
                let [a, b, c, d, e, f, _, _] = word.to_ne_bytes();
                if a & 1 != 0 {
                    let expected = "that of one station";
                    return Err(Refusal::Value {
                        request: name,
                        what: "the MAC address",
                        found: *word,
                        expected,
                    });
                }
                step.actions.push(Action::SendRarp([a, b, c, d, e, f]));
            }
            Request::IotlbMsg(change) => {
                let change = self.translation(name, *change)?;
                step.actions.push(Action::Translate(change));
            }
            Request::SetBackendReqFd => {
                step.actions.extend(fds.into_iter().map(Action::SetChannel))
            }
            Request::GetConfig(config) => step.answer = Answer::Config(check_config(name, config)?),
            Request::SetConfig(config) => step
                .actions
                .push(Action::WriteConfig(check_config(name, config)?)),

            // Lines of the table that nothing here serves yet: they need protocol features that are not offered.
            _ => return Err(Refusal::NotServed { request: name }),
        }
        Ok(())
    }

    /// Tells whether the pages of memory that is told now are still to come; then nobody may touch it yet.
    fn memory_arrives_later(
        &self,
        request: &'static str,
        step: &mut Step,
    ) -> Result<bool, Refusal> {
        if !matches!(self.state.postcopy, Postcopy::Listening | Postcopy::Told) {
            return Ok(false);
        }
        self.check_suspended(request)?;
        step.next.postcopy = Postcopy::Told;
        Ok(true)
    }

    /// Tells whether a message is no request, but says that faults in the memory told before are served from now on.
    ///
    /// It is a memory message that carries nothing, or a zero. Spec: vhost-user, POSTCOPY_LISTEN
    #[must_use]
    pub fn is_memory_ready(&self, kind: RequestKind, payload: &[u8]) -> bool {
        use RequestKind::{AddMemReg, RemMemReg, SetMemTable};
        self.state.postcopy == Postcopy::Told
            && matches!(kind, SetMemTable | AddMemReg | RemMemReg)
            && (payload.is_empty() || payload == [0; 8])
    }

    /// Says what follows from that.
    ///
    /// # Errors
    /// A ring cannot be where it was said to be.
    pub fn memory_is_ready(&self, kind: RequestKind) -> Result<Step, Refusal> {
        let mut step = self.step();
        step.next.postcopy = Postcopy::Listening;
        step.actions.push(Action::CatchFaults);
        step.start_complete(kind.name())?;
        Ok(step)
    }

    fn transfer_state(
        &self,
        transfer: DeviceState,
        fds: Vec<OwnedFd>,
        step: &mut Step,
    ) -> Result<(), Refusal> {
        let name = "SET_DEVICE_STATE_FD";
        self.check_suspended(name)?;
        if transfer.phase != 0 {
            let (what, expected) = ("the phase", "0: all rings are stopped");
            return Err(value(name, what, transfer.phase, expected));
        }
        let action = match transfer.direction {
            0 => Action::SaveState,
            1 => Action::LoadState,
            other => return Err(value(name, "the direction", other, "0 (save) or 1 (load)")),
        };
        step.actions.extend(fds.into_iter().map(action));
        step.answer = Answer::Number(transfer::ACCEPTED);
        Ok(())
    }

    /// Checks that no ring runs.
    fn check_suspended(&self, request: &'static str) -> Result<(), Refusal> {
        match self.state.rings.iter().position(|ring| ring.runs) {
            Some(ring) => Err(Refusal::RingRuns { request, ring }),
            None => Ok(()),
        }
    }

    fn set_features(&self, features: u64, step: &mut Step) -> Result<(), Refusal> {
        let offered = self.offered_features();
        let unoffered = features & !offered;
        if unoffered != 0 {
            return Err(Refusal::FeaturesNotOffered { unoffered, offered });
        }
        let changed = features ^ self.state.features.unwrap_or(features);
        if changed & !bits::LOG_ALL != 0 && self.state.rings.iter().any(|ring| ring.runs) {
            return Err(Refusal::FeaturesWhileRunning { changed });
        }
        step.next.features = Some(features);
        step.next.features_refused = false;
        // Who cannot be asked for translations has none to tell: its addresses are plain, whatever the driver was offered.
        let asks = ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK;
        step.next.translates =
            features & bits::ACCESS_PLATFORM != 0 && self.state.protocol.contains(asks);
        if self.state.features.is_none()
            || changed != 0
            || step.next.translates != self.state.translates
        {
            let hidden = if step.next.translates {
                bits::PROTOCOL_FEATURES
            } else {
                bits::PROTOCOL_FEATURES | bits::ACCESS_PLATFORM
            };
            step.actions.push(Action::SetFeatures(features & !hidden));
        }
        if features & bits::PROTOCOL_FEATURES == 0 {
            for ring in 0..step.next.rings.len() {
                step.next.rings[ring].state.enabled = true;
                step.if_running(ring, Action::EnableRing(ring, true));
            }
        }
        step.start_complete("SET_FEATURES")
    }

    /// Takes what was offered and leaves the rest: no front-end checks whether this is refused.
    fn set_protocol_features(&self, accepted: u64, step: &mut Step) {
        let accepted = ProtocolFeatures::from_bits_retain(accepted);
        let unoffered = accepted.difference(self.offer.protocol_features);
        if !unoffered.is_empty() {
            step.reservation = Some(Refusal::ProtocolFeaturesNotOffered { unoffered });
        }
        step.next.protocol = accepted.intersection(self.offer.protocol_features);
    }

    fn ring_size(&self, num: u32) -> Result<u16, Refusal> {
        let expected = "a power of two (packed: any number) from 1 to 32768";
        let possible =
            (1..=MAX_RING_SIZE).contains(&num) && (!self.state.is_split() || num.is_power_of_two());
        let size = u16::try_from(num).ok().filter(|_| possible);
        size.ok_or_else(|| value("SET_VRING_NUM", "the size of a ring", num, expected))
    }

    /// Checks for which rings a record of buffers in flight is.
    fn check_inflight(&self, request: &'static str, area: InflightArea) -> Result<(), Refusal> {
        let refused =
            |what, found: u16, expected| Err(value(request, what, found.into(), expected));
        if !(1..=self.state.rings.len()).contains(&area.num_queues.into()) {
            let expected = "one to as many as the device has";
            return refused("the number of queues", area.num_queues, expected);
        }
        if self.ring_size(area.queue_size.into()).is_err() {
            return refused("the size of a queue", area.queue_size, "that of a ring");
        }
        Ok(())
    }

    fn set_addresses(
        &self,
        ring: usize,
        addresses: RingAddresses,
        step: &mut Step,
    ) -> Result<(), Refusal> {
        let name = "SET_VRING_ADDR";
        check_alignment(name, addresses, self.state.is_packed())?;
        step.next.rings[ring].addresses = Some(addresses);
        if step.next.rings[ring].runs {
            step.next.check_mapped(name, ring)?;
            step.actions.push(Action::SetAddresses(ring, addresses));
            return Ok(());
        }
        step.start_named(name, ring)
    }

    fn translation(&self, request: &'static str, change: Iotlb) -> Result<Iotlb, Refusal> {
        if !self.state.translates {
            return Err(Refusal::NotTranslated { request });
        }
        let wrong = |what, found: u8, expected| Refusal::Value {
            request,
            what,
            found: found.into(),
            expected,
        };
        match (change.kind, change.permission) {
            (Iotlb::UPDATE, 1..=3) | (Iotlb::INVALIDATE, _) => Ok(change),
            (Iotlb::UPDATE, permission) => Err(wrong("the permission", permission, "1, 2 or 3")),
            (kind, _) => Err(wrong("the kind", kind, "2 (update) or 3 (invalidate)")),
        }
    }

    fn set_status(&self, status: u64, step: &mut Step) -> Result<(), Refusal> {
        let request = "SET_STATUS";
        let Ok(mut status) = u8::try_from(status) else {
            let (what, expected) = ("the device status", "below 256");
            return Err(Refusal::Value {
                request,
                what,
                found: status,
                expected,
            });
        };
        if status == 0 {
            step.reset();
        } else {
            if self.state.features_refused {
                status &= !FEATURES_OK;
            }
            step.next.status = status | self.state.status & NEEDS_RESET;
        }
        step.actions.push(Action::SetStatus(status));
        step.start_complete(request)
    }
}
fn check_config(request: &'static str, config: &Config) -> Result<Config, Refusal> {
    let end = usize::try_from(config.offset)
        .ok()
        .and_then(|offset| offset.checked_add(config.data.len()));
    if end.is_none_or(|end| end > MAX_CONFIG_LEN) {
        let (what, expected) = ("the offset", "within 256 bytes, with all that is asked for");
        return Err(Refusal::Value {
            request,
            what,
            found: config.offset.into(),
            expected,
        });
    }
    Ok(config.clone())
}

/// Takes the event that came with a message, if one did.
fn event(
    request: &'static str,
    word: VringFd,
    fds: Vec<OwnedFd>,
) -> Result<Option<Arc<EventFd>>, Refusal> {
    debug_assert_eq!(word.has_fd(), !fds.is_empty(), "the table has been checked");
    first_event(request, fds)
}

fn first_event(request: &'static str, fds: Vec<OwnedFd>) -> Result<Option<Arc<EventFd>>, Refusal> {
    let event = fds.into_iter().next().map(EventFd::from_owned).transpose();
    Ok(event
        .map_err(|source| Refusal::DescriptorKind { request, source })?
        .map(Arc::new))
}

fn value(request: &'static str, what: &'static str, found: u32, expected: &'static str) -> Refusal {
    Refusal::Value {
        request,
        what,
        found: found.into(),
        expected,
    }
}

#[cfg(test)]
mod tests;
