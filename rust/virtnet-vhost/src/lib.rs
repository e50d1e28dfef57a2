//! vhost-user: messages, session as a pure state machine, connection; both roles.
//!
//! A *back-end* processes the virtqueues, a *front-end* owns the memory they lie in; the two talk over a unix socket
//! about features, memory, rings and descriptors. [`Backend`] and [`Frontend`] are the two ends of such a connection.
//! Neither ever blocks, so one thread can serve many; both are made of a session, which decides and touches no
//! socket, and a connection, which moves bytes and decides nothing.
//!
//! Reading order: [`message`] has the table of all requests, [`BackendSession`] says what may come when, [`Backend`]
//! shows how a message becomes calls on a [`BackendDevice`] and an answer, [`Frontend`] is the other side of it.
//! The protocol is that of QEMU's vhost-user document as of 2026.
#![forbid(unsafe_code)]

mod backend;
mod bells;
mod channel;
mod connection;
mod device;
mod error;
mod features;
mod front_session;
mod frontend;
mod in_band;
pub mod message;
pub mod payload;
mod probe;
mod regions;
mod ring_state;
mod session;
mod transfer;

pub use backend::Backend;
pub use device::{BackendDevice, DeviceError};
pub use error::{Refusal, SessionError};
pub use features::ProtocolFeatures;
pub use front_session::{
    FrontendEvent, FrontendRing, FrontendSession, FrontendSetup, InflightSetup, Offered,
};
pub use frontend::Frontend;
pub use probe::probe;
pub use regions::{InflightFile, LogFile, MAX_SLOTS, MAX_TABLE_REGIONS, Region};
pub use ring_state::{RingAccess, RingState};
pub use session::{Action, Answer, BackendSession, Offer, RingAddresses, RingSetup, Step};
pub use transfer::MAX_STATE_LEN;
pub use virtnet_sys::Fault;

/// Virtio feature bits that change how this protocol itself works.
mod bits {
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;
    pub(crate) const RING_PACKED: u64 = 1 << 34;
}
