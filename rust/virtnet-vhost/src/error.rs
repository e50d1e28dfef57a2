//! What the two sides can hold against each other.
//!
//! A [`Refusal`] is in-band: one request is not carried out, nothing has changed, the connection stays, and the
//! front-end hears of it if it asked for an acknowledgement. A [`SessionError`] ends the connection, because the bytes on
//! it can no longer be trusted or because there is nobody at the other end.

use std::io;
use std::time::Duration;

use virtnet_sys::{Fault, SysError};

use crate::device::DeviceError;
use crate::features::ProtocolFeatures;
use crate::payload::Length;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A request with a number nobody knows.
    #[error("the front-end sent request {code}, which does not exist")]
    Unknown {
        /// The number.
        code: u32,
    },
    /// A payload that is not as long as the request says.
    #[error(
        "{request}: a payload of {expected} was expected and {found} bytes came, or they count wrongly"
    )]
    PayloadLength {
        /// The request.
        request: &'static str,
        /// The length it has.
        expected: Length,
        /// The length that came.
        found: usize,
    },
    /// More or fewer descriptors than the request has.
    #[error("{request}: {expected} descriptors were expected and {found} came")]
    DescriptorCount {
        /// The request.
        request: &'static str,
        /// How many it has.
        expected: usize,
        /// How many came.
        found: usize,
    },
    /// Descriptors beside a later byte than the first.
    #[error(
        "{request}: descriptors came in the middle of the message, they have to come with its first byte"
    )]
    DescriptorPlace {
        /// The request.
        request: &'static str,
    },
    /// A descriptor that cannot do what it is for.
    #[error("{request}: {source}")]
    DescriptorKind {
        /// The request.
        request: &'static str,
        /// What it is and what it should be.
        source: SysError,
    },
    /// A request that belongs to features that were not accepted.
    #[error("{request} needs protocol features {needs:?} and {negotiated:?} were negotiated")]
    NotNegotiated {
        /// The request.
        request: &'static str,
        /// What it needs.
        needs: ProtocolFeatures,
        /// What there is.
        negotiated: ProtocolFeatures,
    },
    /// A request for another kind of device, or one that is not implemented.
    #[error("{request} is not served by this device")]
    NotServed {
        /// The request.
        request: &'static str,
    },
    /// A ring that does not exist.
    #[error("{request} names ring {ring} and the device has {rings}, counted from 0")]
    RingIndex {
        /// The request.
        request: &'static str,
        /// The ring that was named.
        ring: u64,
        /// How many there are.
        rings: usize,
    },
    /// A request that may only come while the ring is stopped.
    #[error("{request}: ring {ring} runs, stop it with GET_VRING_BASE first")]
    RingRuns {
        /// The request.
        request: &'static str,
        /// The ring.
        ring: usize,
    },
    /// Virtio features that were never offered.
    #[error("SET_FEATURES accepts {unoffered:#x}, which was not offered ({offered:#x} was)")]
    FeaturesNotOffered {
        /// The bits too many.
        unoffered: u64,
        /// What was offered.
        offered: u64,
    },
    /// Protocol features that were never offered; the rest of them holds.
    #[error(
        "SET_PROTOCOL_FEATURES accepts {unoffered:?}, which was not offered; the others are in force"
    )]
    ProtocolFeaturesNotOffered {
        /// The bits too many.
        unoffered: ProtocolFeatures,
    },
    /// Virtio features that change under a running ring.
    #[error(
        "SET_FEATURES changes {changed:#x} while a ring runs; only dirty logging may change then"
    )]
    FeaturesWhileRunning {
        /// The bits that would change.
        changed: u64,
    },
    /// A translation, where addresses are not translated.
    #[error(
        "{request}: addresses are not translated: that takes ACCESS_PLATFORM, and the protocol features REPLY_ACK and BACKEND_REQ before it"
    )]
    NotTranslated {
        /// The request.
        request: &'static str,
    },
    /// A number outside its range.
    #[error("{request}: {what} is {found:#x} and has to be {expected}")]
    Value {
        /// The request.
        request: &'static str,
        /// Which number.
        what: &'static str,
        /// What it is.
        found: u64,
        /// What it may be.
        expected: &'static str,
    },
    /// Part of a ring in no region of guest memory.
    #[error(
        "{request}: the {area} of ring {ring} is at user address {address:#x}, which is in no memory region"
    )]
    RingUnmapped {
        /// The request.
        request: &'static str,
        /// The ring.
        ring: usize,
        /// Which part of it.
        area: &'static str,
        /// Where it should be.
        address: u64,
    },
    /// A memory region that reaches beyond the end of an address space.
    #[error(
        "{request}: region {region} of {size:#x} bytes has no length or reaches beyond the last address"
    )]
    RegionRange {
        /// The request.
        request: &'static str,
        /// Which region of the message.
        region: usize,
        /// Its length.
        size: u64,
    },
    /// Two memory regions in one place.
    #[error("{request}: region {region} overlaps another one")]
    RegionOverlap {
        /// The request.
        request: &'static str,
        /// Which region of the message.
        region: usize,
    },
    /// More memory regions than there is room for.
    #[error("{request}: there may be 1 to {most} regions and would be {found}")]
    RegionCount {
        /// The request.
        request: &'static str,
        /// How many there may be.
        most: usize,
        /// How many there would be.
        found: usize,
    },
    /// A memory region that is to be removed and is not there.
    #[error(
        "{request}: there is no region at guest address {guest_addr:#x} with that length and user address"
    )]
    NoSuchRegion {
        /// The request.
        request: &'static str,
        /// Where it should be.
        guest_addr: u64,
    },
    /// A step of a post-copy migration in the wrong order.
    #[error("{request} has to come after POSTCOPY_ADVISE and before any memory")]
    PostcopyOrder {
        /// The request.
        request: &'static str,
    },
    /// A question about a transfer that there is not.
    #[error("{request}: there was no transfer of the device's state, or it failed")]
    NoTransfer {
        /// The request.
        request: &'static str,
    },
    /// The device could not do it.
    #[error("{request}: {source}")]
    Device {
        /// The request.
        request: &'static str,
        /// Why not.
        source: DeviceError,
    },
}

impl Refusal {
    /// Returns whose fault it is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::DescriptorKind {
                source: SysError::Os { .. },
                ..
            } => Fault::Host,
            _ => Fault::Peer,
        }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The other end closed it, or its process ended.
    #[error("the peer has closed the connection")]
    Disconnected,
    /// The kernel refused to receive or send.
    #[error("cannot {operation} the peer: {source}")]
    Io {
        /// Receive from or send to.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A message of another version.
    #[error("message {request} has flags {flags:#x}: version 1 was expected")]
    Version {
        /// Its number.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// A message that is longer than any can be.
    #[error("message {request} announces {size} bytes of payload, at most {most} were expected")]
    TooLong {
        /// Its number.
        request: u32,
        /// The length it announces.
        size: u32,
        /// The most that is read.
        most: usize,
    },
    /// Notifications by message, without what they need.
    #[error(
        "SET_PROTOCOL_FEATURES accepts {found:?}: INBAND_NOTIFICATIONS needs REPLY_ACK and BACKEND_REQ"
    )]
    InBandAlone {
        /// What it accepts.
        found: ProtocolFeatures,
    },
    /// Notifications by message, without a channel for calls.
    #[error(
        "the back-end's channel is gone, and without it the peer cannot call by messages: {why}"
    )]
    NoCalls {
        /// What became of it.
        why: String,
    },
    /// A reply to nothing.
    #[error("a reply to request {request} came from a front-end: only requests were expected")]
    ReplyToNothing {
        /// The request it says it answers.
        request: u32,
    },
    /// Half a message, and then silence.
    #[error("the peer began a message and did not end it within {after:?}")]
    HalfMessage {
        /// How long was waited.
        after: Duration,
    },
    /// A peer that takes none of what it is sent.
    #[error("the peer does not read: {queued} bytes wait to be sent")]
    NotReading {
        /// How many bytes wait.
        queued: usize,
    },
    /// No answer to a request.
    #[error(
        "{request} was not answered within {after:?}: is the back-end stuck, or serving somebody else?"
    )]
    NoReply {
        /// The request.
        request: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// A message where the answer to a request was expected.
    #[error("an answer to {expected} was expected and message {found} with flags {flags:#x} came")]
    NotTheReply {
        /// What was asked, or "nothing".
        expected: &'static str,
        /// The number of what came.
        found: u32,
        /// The flags of what came.
        flags: u32,
    },
    /// An answer about another ring than the one that was asked about.
    #[error("GET_VRING_BASE for ring {asked} was answered for ring {found}")]
    ReplyRing {
        /// The ring that was asked about.
        asked: u32,
        /// The ring of the answer.
        found: u32,
    },
    /// An answer that is too long or too short.
    #[error("the answer to {request} has {found} bytes and should have {expected}")]
    ReplyLength {
        /// The request.
        request: &'static str,
        /// The length it should have.
        expected: Length,
        /// The length it has.
        found: usize,
    },
    /// Descriptors in an answer that has none.
    #[error("the answer to {request} came with {found} descriptors, none were expected")]
    ReplyDescriptors {
        /// The request.
        request: &'static str,
        /// How many came.
        found: usize,
    },
    /// An answer to `POSTCOPY_ADVISE` without what it is for.
    #[error(
        "the answer to POSTCOPY_ADVISE came with {found} descriptors and one was expected, the back-end's userfaultfd: may its \
         process have one (sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd)?"
    )]
    NoUserfault {
        /// How many came.
        found: usize,
    },
    /// An answer about other memory than was told.
    #[error(
        "the answer to SET_MEM_TABLE names other regions than it was told: the same were expected, each with the address at which \
         the back-end has it"
    )]
    ReplyRegions,
    /// The back-end refused what cannot be done without.
    #[error("the back-end refused {request} (it answered {code})")]
    Refused {
        /// The request.
        request: &'static str,
        /// Its answer.
        code: u64,
    },
    /// Our caller asked for something the session cannot do now.
    #[error("{what}")]
    Misuse {
        /// What, and what would be right.
        what: String,
    },
    /// Our device could not stop a ring, so its state is unknown.
    #[error("ring {ring} could not be stopped: {source}")]
    Device {
        /// The ring.
        ring: usize,
        /// Why not.
        source: DeviceError,
    },
    /// Pages of a memory region are gone while it is mapped.
    #[error(
        "pages of {peer}'s memory region at guest address {guest_addr:#x} ({size:#x} bytes) are gone: its file was shortened \
         while it was mapped, or there is no room for its pages; take a region back (REM_MEM_REG, SET_MEM_TABLE) before \
         its file changes"
    )]
    MemoryLost {
        /// Whose it is.
        peer: String,
        /// Where the region begins.
        guest_addr: u64,
        /// Its length.
        size: u64,
    },
    /// Pages of the dirty log are gone while it is in use.
    #[error(
        "pages of {peer}'s dirty log are gone: its file was shortened while it was mapped; hand over another log first"
    )]
    LogLost {
        /// Whose it is.
        peer: String,
    },
    /// Our side of the connection could not be made.
    #[error(transparent)]
    System(#[from] SysError),
}

impl SessionError {
    /// Returns whose fault it is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Misuse { .. } => Fault::Caller,
            Self::Io { .. } | Self::Device { .. } => Fault::Host,
            Self::System(error) => error.fault(),
            _ => Fault::Peer,
        }
    }
}
