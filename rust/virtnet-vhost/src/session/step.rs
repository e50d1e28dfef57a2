//! What follows from a request: what the device has to do, the answer, and what the session knows then.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtnet_sys::EventFd;

use super::state::{RingAddresses, RingSetup, State, check_alignment};
use super::value;
use crate::bits;
use crate::error::Refusal;
use crate::payload::{Config, InflightArea, Iotlb, LogArea, MemoryRegion, MemoryTable};
use crate::regions::{InflightFile, LogFile, Region};

/// What a device has to do because of a request.
#[derive(Debug)]
pub enum Action {
    /// These virtio features are in force.
    SetFeatures(u64),
    /// This is the guest memory; the one before is gone.
    SetMemory(Vec<Region>),
    /// Guest memory grows.
    AddMemory(Region),
    /// Guest memory shrinks.
    RemoveMemory(MemoryRegion),
    /// Pages that are written are marked here, as long as the features say that they are.
    SetLog(LogFile),
    /// Rings that start from now on record here what is in flight.
    SetInflight(InflightFile),
    /// Begin to use a ring.
    StartRing(usize, RingSetup),
    /// Stop using a ring, and say where.
    StopRing(usize),
    /// A running ring is enabled or disabled.
    EnableRing(usize, bool),
    /// A running ring has another kick.
    SetKick(usize, Option<Arc<EventFd>>),
    /// A running ring has another call.
    SetCall(usize, Option<Arc<EventFd>>),
    /// A running ring has another error event.
    SetErr(usize, Option<Arc<EventFd>>),
    /// A running ring lies elsewhere, or is logged from now on.
    SetAddresses(usize, RingAddresses),
    /// The device is as it was in the beginning; all its rings have been stopped.
    Reset,
    /// The device status is this.
    SetStatus(u8),
    /// No packet will be longer.
    SetMtu(u16),
    /// Announce this MAC address.
    SendRarp([u8; 6]),
    /// Write to the configuration space.
    WriteConfig(Config),
    /// A translation of I/O addresses appears ([`Iotlb::UPDATE`]) or goes ([`Iotlb::INVALIDATE`]).
    Translate(Iotlb),
    /// Ask over this socket what the back-end has to ask.
    SetChannel(OwnedFd),
    /// A ring was kicked by message.
    Kick(usize),
    /// The front-end serves faults in guest memory from now on.
    CatchFaults,
    /// All pages have arrived.
    EndPostcopy,
    /// Write the device's state into this pipe.
    SaveState(OwnedFd),
    /// A state will come out of this pipe.
    LoadState(OwnedFd),
}

/// The form of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// An acknowledgement, if one is asked for.
    Ack,
    /// A number.
    Number(u64),
    /// The place where a ring stopped.
    Base(usize),
    /// A part of the configuration space, of this length.
    Config(Config),
    /// The dirty log, as it was told.
    Log(LogArea),
    /// A new record of buffers in flight, for so many rings of so many descriptors.
    Inflight(InflightArea),
    /// A descriptor through which page faults are served.
    Userfault,
    /// The regions that were told, with the addresses at which the device has them.
    Mapped(MemoryTable),
    /// One region, likewise.
    MappedSlot(MemoryRegion),
    /// Whether the transfer of the device's state worked.
    StateCheck,
}

/// What follows from a request.
#[derive(Debug)]
#[must_use = "a step that is not committed has not been made"]
pub struct Step {
    /// For the device, in this order.
    pub actions: Vec<Action>,
    /// For the front-end.
    pub answer: Answer,
    /// What is not as it should be although the request was carried out.
    pub reservation: Option<Refusal>,
    pub(super) next: State,
    /// The rings begin anew, wherever they stop.
    pub(super) resets: bool,
}
impl Step {
    /// Notes where a ring stopped, unless the device does not know or is reset.
    pub(crate) fn ring_stopped(&mut self, ring: usize, base: Option<u32>) {
        if let (Some(ring), false) = (self.next.rings.get_mut(ring), self.resets) {
            ring.base = base.or(ring.base);
        }
    }

    /// Notes that the device could not start a ring: it waits for another kick.
    pub(crate) fn ring_failed(&mut self, ring: usize) {
        if let Some(ring) = self.next.rings.get_mut(ring) {
            ring.runs = false;
            ring.state.started = false;
            ring.kick = None;
        }
    }

    /// Returns the position to report for a ring, once its actions are carried out.
    pub(crate) fn base(&self, ring: usize) -> u32 {
        self.next.base(ring)
    }

    pub(super) fn if_running(&mut self, ring: usize, action: Action) {
        if self.next.rings[ring].runs {
            self.actions.push(action);
        }
    }

    /// Starts the ring a request named if that was all it lacked; it has to be possible then.
    pub(super) fn start_named(
        &mut self,
        request: &'static str,
        ring: usize,
    ) -> Result<(), Refusal> {
        if self.next.is_complete(ring) {
            self.next.check_mapped(request, ring)?;
            self.start(request, ring)?;
        }
        Ok(())
    }

    /// Starts every ring that lacks nothing any more; one whose memory may still come goes on waiting.
    pub(super) fn start_complete(&mut self, request: &'static str) -> Result<(), Refusal> {
        for ring in 0..self.next.rings.len() {
            if self.next.is_complete(ring) && self.next.check_mapped(request, ring).is_ok() {
                self.start(request, ring)?;
            }
        }
        Ok(())
    }

    pub(super) fn start(&mut self, request: &'static str, index: usize) -> Result<(), Refusal> {
        let packed = self.next.is_packed();
        let base = self.next.base(index);
        let ring = &mut self.next.rings[index];
        let (Some(size), Some(addresses)) = (ring.size, ring.addresses) else {
            return Ok(());
        };
        check_alignment(request, addresses, packed)?;
        if packed {
            let slots = [base & 0x7fff, base >> 16 & 0x7fff];
            if slots.iter().any(|&slot| slot >= u32::from(size)) {
                return Err(value(
                    request,
                    "the base of a packed ring",
                    base,
                    "two slots within its size",
                ));
            }
        } else if !size.is_power_of_two() || base > u32::from(u16::MAX) {
            let (size, what) = (size.into(), "the size of a split ring, or its base,");
            return Err(value(
                request,
                what,
                size,
                "a power of two, with a base below 65536",
            ));
        }
        ring.runs = true;
        let setup = RingSetup {
            size,
            base,
            addresses,
            kick: ring.kick.clone(),
            call: ring.call.clone(),
            err: ring.err.clone(),
            enabled: ring.state.enabled,
        };
        self.actions.push(Action::StartRing(index, setup));
        Ok(())
    }

    /// Stops a ring. It keeps its call and error events, which some front-ends send only once; a new kick starts it.
    pub(super) fn stop(&mut self, index: usize) {
        self.if_running(index, Action::StopRing(index));
        let ring = &mut self.next.rings[index];
        ring.runs = false;
        ring.state.started = false;
        ring.kick = None;
    }

    pub(super) fn stop_all(&mut self) {
        let enabled = self
            .next
            .features
            .is_some_and(|features| features & bits::PROTOCOL_FEATURES == 0);
        for ring in 0..self.next.rings.len() {
            self.stop(ring);
            self.next.rings[ring].state.enabled = enabled;
        }
    }

    pub(super) fn reset(&mut self) {
        self.stop_all();
        self.resets = true;
        self.next.rings.iter_mut().for_each(|ring| ring.base = None);
        self.next.status = 0;
        self.next.features_refused = false;
        self.actions.push(Action::Reset);
    }
}
