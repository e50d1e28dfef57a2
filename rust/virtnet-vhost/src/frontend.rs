//! The front-end's end of a connection: attaches a driver of ours to somebody's back-end.
//!
//! *Theory of operation.* A front-end asks, a back-end answers, one request after the other. [`Frontend`] keeps the
//! requests that are still to be sent in a queue and sends the next when the one before is answered, or needs no answer. It
//! never waits: whoever serves the connection calls [`Frontend::on_readable`] when there is something to read, and gets
//! [`FrontendEvent`]s.
//!
//! The handshake has two parts. The first finds out what is offered and ends with [`FrontendEvent::Offered`]. The caller
//! chooses features, lays out memory and rings, and hands them in with [`Frontend::set_up`]; the second part tells the
//! back-end about them and ends with [`FrontendEvent::Running`]. Where acknowledgements can be had every request asks for
//! one, so that a refusal is noticed where it happens.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtnet_sys::{EventFd, Stream};

use crate::bits;
use crate::connection::{Connection, Message};
use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::message::{Reply, Request, RequestKind};
use crate::payload::{MemoryTable, Payload, VringAddresses, VringFd, VringState};
use crate::regions::Region;
use crate::session::RingAddresses;

/// Status bits of virtio 1.4, 2.1, Device Status Field.
const ACKNOWLEDGE_AND_DRIVER: u64 = 1 | 2;
const FEATURES_OK: u64 = 8;
const DRIVER_OK: u64 = 4;

/// What a back-end offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offered {
    /// Virtio features, bit 30 included.
    pub features: u64,
    /// Protocol features; none if bit 30 is not offered.
    pub protocol_features: ProtocolFeatures,
    /// Queue pairs, if the back-end tells.
    pub queue_pairs: Option<u64>,
    /// Memory slots, if the back-end tells.
    pub memory_slots: Option<u64>,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontendEvent {
    /// The first part of the handshake is over: choose, and call [`Frontend::set_up`].
    Offered(Offered),
    /// The back-end knows everything: packets can flow.
    Running,
    /// A ring has stopped, here.
    RingStopped {
        /// Which ring.
        ring: u32,
        /// Where to go on.
        base: u32,
    },
}

/// A connection to a back-end.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    /// What is still to be sent, in order.
    queue: VecDeque<Queued>,
    /// The request whose answer is awaited.
    awaited: Option<RequestKind>,
    offered: Offered,
    /// Protocol features in force.
    protocol: ProtocolFeatures,
    phase: Phase,
}

#[derive(Debug)]
struct Queued {
    request: Request,
    fds: Vec<OwnedFd>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Asking,
    Choosing,
    Telling,
    Running,
}

impl Frontend {
    /// Begins a session with a back-end that we have connected to, or that has connected.
    ///
    /// # Errors
    /// The connection is gone already.
    pub fn start(stream: Stream) -> Result<Self, SessionError> {
        let mut frontend = Self {
            connection: Connection::new(stream),
            queue: VecDeque::new(),
            awaited: None,
            offered: Offered::default(),
            protocol: ProtocolFeatures::empty(),
            phase: Phase::Asking,
        };
        frontend.ask(Request::SetOwner);
        frontend.ask(Request::GetFeatures);
        frontend.send_next()?;
        Ok(frontend)
    }

    /// Serves the answers that are there; never waits.
    ///
    /// # Errors
    /// The connection has ended: the back-end is gone, refused what cannot be done without, or talks nonsense.
    pub fn on_readable(&mut self) -> Result<Vec<FrontendEvent>, SessionError> {
        let mut events = Vec::new();
        while let Some(message) = self.connection.receive()? {
            events.extend(self.answered(message)?);
            events.extend(self.send_next()?);
        }
        Ok(events)
    }

    /// Sends on what the back-end did not take before; to be called when [`Frontend::wants_write`].
    ///
    /// # Errors
    /// The connection is gone.
    pub fn on_writable(&mut self) -> Result<(), SessionError> {
        self.connection.flush()
    }

    /// Ends a connection that stands still in the middle of a message; to be called about once a second.
    ///
    /// # Errors
    /// It stood still.
    pub fn on_tick(&mut self, now_ns: u64) -> Result<(), SessionError> {
        self.connection.check_progress(now_ns)
    }

    /// Tells whether a request waits until the back-end reads.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Returns what the back-end offers, as far as it is known.
    #[must_use]
    pub fn offered(&self) -> Offered {
        self.offered
    }

    /// Tells the back-end what was chosen. Once, after [`FrontendEvent::Offered`].
    ///
    /// # Errors
    /// Called at another time; out of descriptors; the connection is gone.
    pub fn set_up(&mut self, setup: FrontendSetup) -> Result<(), SessionError> {
        if self.phase != Phase::Choosing {
            return Err(misuse(
                "set_up: the back-end has not said yet what it offers, or was told already",
            ));
        }
        self.phase = Phase::Telling;
        let with_protocol = self.offered.features & bits::PROTOCOL_FEATURES;
        let has = |feature| self.protocol.contains(feature);
        let (status, mtu) = (has(ProtocolFeatures::STATUS), has(ProtocolFeatures::MTU));

        if status {
            self.ask(Request::SetStatus(ACKNOWLEDGE_AND_DRIVER));
        }
        // The first message about a ring makes some back-ends allocate it, and they want that before the features.
        for (index, ring) in setup.rings.iter().enumerate() {
            self.ask_with(
                Request::SetVringCall(VringFd::new(ring_u8(index)?, true)),
                vec![event(&ring.call)?],
            );
        }
        self.ask(Request::SetFeatures(setup.features | with_protocol));
        if status {
            self.ask(Request::SetStatus(ACKNOWLEDGE_AND_DRIVER | FEATURES_OK));
            self.ask(Request::GetStatus);
        }
        if let Some(mtu) = setup.mtu.filter(|_| mtu) {
            self.ask(Request::NetSetMtu(mtu.into()));
        }
        let (layouts, files) = setup
            .regions
            .into_iter()
            .map(|region| (region.layout, region.file))
            .unzip();
        self.ask_with(Request::SetMemTable(MemoryTable(layouts)), files);
        for (index, ring) in setup.rings.iter().enumerate() {
            let number = u32::from(ring_u8(index)?);
            self.ask(Request::SetVringNum(VringState {
                index: number,
                num: ring.size.into(),
            }));
            self.ask(Request::SetVringBase(VringState {
                index: number,
                num: ring.base,
            }));
            self.ask(Request::SetVringAddr(addresses(number, &ring.addresses)));
            self.ask_with(
                Request::SetVringKick(VringFd::new(ring_u8(index)?, true)),
                vec![event(&ring.kick)?],
            );
        }
        if with_protocol != 0 {
            for index in 0..setup.rings.len() {
                let number = u32::from(ring_u8(index)?);
                self.ask(Request::SetVringEnable(VringState {
                    index: number,
                    num: 1,
                }));
            }
        }
        if status {
            self.ask(Request::SetStatus(
                ACKNOWLEDGE_AND_DRIVER | FEATURES_OK | DRIVER_OK,
            ));
        }
        // An answer to this one says that everything before it has been served, with or without acknowledgements.
        self.ask(Request::GetFeatures);
        self.send_next().map(drop)
    }

    /// Asks the back-end to stop a ring; [`FrontendEvent::RingStopped`] says where.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn stop_ring(&mut self, ring: u32) -> Result<(), SessionError> {
        self.ask(Request::GetVringBase(VringState {
            index: ring,
            num: 0,
        }));
        self.send_next().map(drop)
    }

    fn ask(&mut self, request: Request) {
        self.ask_with(request, Vec::new());
    }

    fn ask_with(&mut self, request: Request, fds: Vec<OwnedFd>) {
        self.queue.push_back(Queued { request, fds });
    }

    /// Sends what can be sent before the next answer.
    fn send_next(&mut self) -> Result<Option<FrontendEvent>, SessionError> {
        while self.awaited.is_none() {
            let Some(Queued { request, fds }) = self.queue.pop_front() else {
                return Ok(self.queue_is_empty());
            };
            let kind = request.kind();
            let own_reply = kind.reply() != Reply::Ack;
            let acknowledged = !own_reply && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
            let mut bytes = Vec::new();
            request.encode(acknowledged, &mut bytes);
            self.connection.send(bytes, fds)?;
            if own_reply || acknowledged {
                self.awaited = Some(kind);
            }
        }
        Ok(None)
    }

    /// Everything of this part of the handshake has been sent and answered.
    fn queue_is_empty(&mut self) -> Option<FrontendEvent> {
        let (next, event) = match self.phase {
            Phase::Asking => (Phase::Choosing, FrontendEvent::Offered(self.offered)),
            Phase::Telling => (Phase::Running, FrontendEvent::Running),
            Phase::Choosing | Phase::Running => return None,
        };
        self.phase = next;
        Some(event)
    }

    fn answered(&mut self, message: Message) -> Result<Option<FrontendEvent>, SessionError> {
        let code = message.header.request;
        let Some(kind) = self
            .awaited
            .take()
            .filter(|kind| kind.code() == code && message.header.is_reply())
        else {
            return Err(SessionError::ReplyToNothing { request: code });
        };
        if kind == RequestKind::GetVringBase {
            let state = VringState::from_bytes(&message.payload)
                .ok_or_else(|| misuse("GET_VRING_BASE: the answer has another length"))?;
            return Ok(Some(FrontendEvent::RingStopped {
                ring: state.index,
                base: state.num,
            }));
        }
        let number =
            u64::from_bytes(&message.payload).ok_or_else(|| misuse("the answer is no number"))?;
        match kind {
            RequestKind::GetFeatures if self.phase == Phase::Asking => {
                self.offered.features = number;
                if number & bits::PROTOCOL_FEATURES != 0 {
                    self.ask(Request::GetProtocolFeatures);
                }
            }
            RequestKind::GetFeatures => {}
            RequestKind::GetProtocolFeatures => {
                let offered = ProtocolFeatures::from_bits_retain(number);
                self.offered.protocol_features = offered;
                let accepted = offered & ProtocolFeatures::FRONTEND;
                // In force for all that comes after it; it is not acknowledged itself.
                let mut bytes = Vec::new();
                Request::SetProtocolFeatures(accepted.bits()).encode(false, &mut bytes);
                self.connection.send(bytes, Vec::new())?;
                self.protocol = accepted;
                if accepted.contains(ProtocolFeatures::MQ) {
                    self.ask(Request::GetQueueNum);
                }
                if accepted.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
                    self.ask(Request::GetMaxMemSlots);
                }
            }
            RequestKind::GetQueueNum => self.offered.queue_pairs = Some(number),
            RequestKind::GetMaxMemSlots => self.offered.memory_slots = Some(number),
            RequestKind::GetStatus if number & FEATURES_OK == 0 => {
                return Err(SessionError::Refused {
                    request: "SET_FEATURES",
                    code: number,
                });
            }
            RequestKind::GetStatus => {}
            kind if number != 0 => {
                return Err(SessionError::Refused {
                    request: kind.name(),
                    code: number,
                });
            }
            _ => {}
        }
        Ok(None)
    }
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.stream().as_fd()
    }
}

fn addresses(index: u32, at: &RingAddresses) -> VringAddresses {
    VringAddresses {
        index,
        flags: 0,
        desc: at.descriptor_area,
        used: at.device_area,
        avail: at.driver_area,
        log_guest_addr: 0,
    }
}

fn event(event: &EventFd) -> Result<OwnedFd, SessionError> {
    let copy = event
        .try_clone()
        .map_err(|error| misuse(&format!("a descriptor for the back-end: {error}")))?;
    Ok(copy.into())
}

fn ring_u8(index: usize) -> Result<u8, SessionError> {
    u8::try_from(index).map_err(|_| misuse("a front-end has at most 256 rings"))
}

fn misuse(what: &str) -> SessionError {
    SessionError::Misuse {
        what: what.to_owned(),
    }
}
