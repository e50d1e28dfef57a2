//! The messages of both directions, as values and as bytes.
//!
//! [`Request`] is what a front-end may ask of a back-end, [`BackRequest`] the few things a back-end may ask on a channel
//! of its own. Both are one table each: a line is a request, with its payload, the descriptors that come with it, how it
//! is answered, which protocol features it needs and when it may come. A new request is a new line.
//!
//! A message is a header of twelve bytes and a payload; descriptors travel beside its first byte.

use crate::features::ProtocolFeatures;
use crate::payload::{
    Config, DeviceState, InflightArea, Iotlb, Length, LogArea, MemoryTable, Opaque, Payload,
    ShmemMapping, SingleRegion, Uuid, VringAddresses, VringArea, VringFd, VringState,
};

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;

/// The largest payload that is read; the largest one the protocol knows has 2056 bytes.
pub const MAX_PAYLOAD_LEN: usize = 4096;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What comes before a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Which request this is, or answers.
    pub request: u32,
    /// Version, reply and need-reply.
    pub flags: u32,
    /// Bytes of payload that follow.
    pub size: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn from_bytes(bytes: [u8; HEADER_LEN]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        Self {
            request: u32::from_ne_bytes([a, b, c, d]),
            flags: u32::from_ne_bytes([e, f, g, h]),
            size: u32::from_ne_bytes([i, j, k, l]),
        }
    }

    /// Tells whether this is the one version there is.
    #[must_use]
    pub fn is_version_1(&self) -> bool {
        self.flags & VERSION_MASK == VERSION
    }

    /// Tells whether this answers a request.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & REPLY != 0
    }

    /// Tells whether the sender asks for an acknowledgement.
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }
}

/// How many descriptors come with a request, and of which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptors {
    /// None.
    None,
    /// Exactly one file to map.
    File,
    /// Exactly one event.
    Event,
    /// One event, unless the payload says that there is none.
    EventByWord,
    /// One file for each region of the payload.
    FilePerRegion,
    /// None; one is taken and closed, because some front-ends send it.
    Spare,
    /// Exactly one socket.
    Socket,
    /// Exactly one end of a pipe.
    Pipe,
}

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// With an acknowledgement, if one is asked for.
    Ack,
    /// Always, with a payload of its own.
    Own,
    /// With a payload of its own if the dirty log is a file, otherwise as [`Reply::Ack`].
    OwnWithLog,
}

/// When a request may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// At any time.
    Any,
    /// Only while the ring it names is stopped.
    Stopped,
    /// While a ring runs only if nothing but dirty logging changes.
    QuietOrLog,
    /// Never: it belongs to another kind of device.
    Never,
}

/// Defines an enum of requests from their table.
macro_rules! requests {
    ($(#[$meta:meta])* $Request:ident, $Kind:ident, {
        $($code:literal $NAME:ident $Variant:ident $(($payload:ty))?, $fds:ident, $reply:ident, $when:ident,
          [$($needs:ident)*], $doc:literal;)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum $Request {
            $(#[doc = $doc] $Variant $(($payload))?,)*
        }

        #[doc = concat!("Which [`", stringify!($Request), "`] one is, and what the table says about it.")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $Kind {
            $(#[doc = $doc] $Variant = $code,)*
        }

        impl $Request {
            /// Returns which request this is.
            #[must_use]
            pub fn kind(&self) -> $Kind {
                match self {
                    $(Self::$Variant { .. } => $Kind::$Variant,)*
                }
            }

            /// Reads the payload of a request; `None` if it has not the length the request has.
            #[must_use]
            pub fn decode(kind: $Kind, bytes: &[u8]) -> Option<Self> {
                match kind {
                    $($Kind::$Variant => requests!(@decode bytes $Variant $($payload)?),)*
                }
            }

            fn encode_payload(&self, out: &mut Vec<u8>) {
                match self {
                    $(requests!(@pattern value $Variant $($payload)?) => requests!(@encode value out $($payload)?),)*
                }
            }
        }

        impl $Kind {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$Variant),*];

            /// Finds the request with a number.
            #[must_use]
            pub fn from_code(code: u32) -> Option<Self> {
                match code {
                    $($code => Some(Self::$Variant),)*
                    _ => None,
                }
            }

            /// Returns its number.
            #[must_use]
            pub fn code(self) -> u32 {
                self as u32
            }

            /// Returns its name in the specification.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$Variant => stringify!($NAME),)* }
            }

            /// Returns the length of its payload.
            #[must_use]
            pub fn length(self) -> Length {
                match self { $(Self::$Variant => requests!(@length $($payload)?),)* }
            }

            /// Returns which descriptors come with it.
            #[must_use]
            pub fn descriptors(self) -> Descriptors {
                match self { $(Self::$Variant => Descriptors::$fds,)* }
            }

            /// Returns how it is answered.
            #[must_use]
            pub fn reply(self) -> Reply {
                match self { $(Self::$Variant => Reply::$reply,)* }
            }

            /// Returns when it may come.
            #[must_use]
            pub fn when(self) -> When {
                match self { $(Self::$Variant => When::$when,)* }
            }

            /// Returns the protocol features it needs.
            #[must_use]
            pub fn needs(self) -> ProtocolFeatures {
                match self {
                    $(Self::$Variant => ProtocolFeatures::empty()$(.union(ProtocolFeatures::$needs))*,)*
                }
            }
        }
    };
    (@decode $bytes:ident $Variant:ident) => { <()>::from_bytes($bytes).map(|()| Self::$Variant) };
    (@decode $bytes:ident $Variant:ident $payload:ty) => { <$payload>::from_bytes($bytes).map(Self::$Variant) };
    (@pattern $value:ident $Variant:ident) => { Self::$Variant };
    (@pattern $value:ident $Variant:ident $payload:ty) => { Self::$Variant($value) };
    (@encode $value:ident $out:ident) => { {} };
    (@encode $value:ident $out:ident $payload:ty) => { $value.encode($out) };
    (@length) => { <() as Payload>::LENGTH };
    (@length $payload:ty) => { <$payload as Payload>::LENGTH };
}

requests! {
    /// What a front-end asks of a back-end.
    Request, RequestKind, {
     1 GET_FEATURES          GetFeatures,                       None, Own, Any, [], "Which virtio features are offered?";
     2 SET_FEATURES          SetFeatures(u64),                  None, Ack, QuietOrLog, [], "These virtio features were accepted.";
     3 SET_OWNER             SetOwner,                          None, Ack, Any, [], "The session begins.";
     4 RESET_OWNER           ResetOwner,                        None, Ack, Any, [], "Stop all rings (deprecated).";
     5 SET_MEM_TABLE         SetMemTable(MemoryTable),          FilePerRegion, Ack, Any, [], "This is the whole guest memory.";
     6 SET_LOG_BASE          SetLogBase(LogArea),               File, OwnWithLog, Any, [LOG_SHMFD], "This is the dirty log.";
     7 SET_LOG_FD            SetLogFd,                          Event, Ack, Any, [LOG_SHMFD], "Signal this when the log is written to.";
     8 SET_VRING_NUM         SetVringNum(VringState),           None, Ack, Stopped, [], "A ring's size.";
     9 SET_VRING_ADDR        SetVringAddr(VringAddresses),      None, Ack, Any, [], "A ring's place in memory.";
    10 SET_VRING_BASE        SetVringBase(VringState),          None, Ack, Stopped, [], "Where in a ring to begin.";
    11 GET_VRING_BASE        GetVringBase(VringState),          None, Own, Any, [], "Stop a ring; where did it stop?";
    12 SET_VRING_KICK        SetVringKick(VringFd),             EventByWord, Ack, Any, [], "Start a ring; this event says that it has work.";
    13 SET_VRING_CALL        SetVringCall(VringFd),             EventByWord, Ack, Any, [], "Signal this when a ring has used buffers.";
    14 SET_VRING_ERR         SetVringErr(VringFd),              EventByWord, Ack, Any, [], "Signal this when a ring is broken.";
    15 GET_PROTOCOL_FEATURES GetProtocolFeatures,               None, Own, Any, [], "Which protocol features are offered?";
    16 SET_PROTOCOL_FEATURES SetProtocolFeatures(u64),          None, Ack, Any, [], "These protocol features were accepted.";
    17 GET_QUEUE_NUM         GetQueueNum,                       None, Own, Any, [MQ], "How many queue pairs are there?";
    18 SET_VRING_ENABLE      SetVringEnable(VringState),        None, Ack, Any, [], "Enable or disable a ring.";
    19 SEND_RARP             SendRarp(u64),                     None, Ack, Any, [RARP], "Announce the guest's MAC address.";
    20 NET_SET_MTU           NetSetMtu(u64),                    None, Ack, Any, [MTU], "The largest packet there will be.";
    21 SET_BACKEND_REQ_FD    SetBackendReqFd,                   Socket, Ack, Any, [BACKEND_REQ], "The back-end's own channel.";
    22 IOTLB_MSG             IotlbMsg(Iotlb),                   None, Ack, Any, [REPLY_ACK BACKEND_REQ], "A translation appears or goes.";
    23 SET_VRING_ENDIAN      SetVringEndian(VringState),        None, Ack, Stopped, [CROSS_ENDIAN], "A ring's byte order.";
    24 GET_CONFIG            GetConfig(Config),                 None, Own, Any, [CONFIG], "Read the configuration space.";
    25 SET_CONFIG            SetConfig(Config),                 None, Ack, Any, [CONFIG], "Write the configuration space.";
    26 CREATE_CRYPTO_SESSION CreateCryptoSession(Opaque),       None, Own, Never, [CRYPTO_SESSION], "Crypto devices only.";
    27 CLOSE_CRYPTO_SESSION  CloseCryptoSession(u64),           None, Ack, Never, [CRYPTO_SESSION], "Crypto devices only.";
    28 POSTCOPY_ADVISE       PostcopyAdvise,                    None, Own, Any, [PAGEFAULT], "Prepare for post-copy.";
    29 POSTCOPY_LISTEN       PostcopyListen,                    None, Ack, Any, [PAGEFAULT], "Post-copy begins.";
    30 POSTCOPY_END          PostcopyEnd,                       None, Own, Any, [PAGEFAULT], "Post-copy has ended.";
    31 GET_INFLIGHT_FD       GetInflightFd(InflightArea),       None, Own, Any, [INFLIGHT_SHMFD], "Make a record of buffers in flight.";
    32 SET_INFLIGHT_FD       SetInflightFd(InflightArea),       File, Ack, Any, [INFLIGHT_SHMFD], "Use this record of buffers in flight.";
    33 GPU_SET_SOCKET        GpuSetSocket,                      Socket, Ack, Never, [], "Display devices only.";
    34 RESET_DEVICE          ResetDevice,                       None, Ack, Any, [RESET_DEVICE], "Reset the device, keep the session.";
    35 VRING_KICK            VringKick(VringState),             None, Ack, Any, [INBAND_NOTIFICATIONS], "A ring has work.";
    36 GET_MAX_MEM_SLOTS     GetMaxMemSlots,                    None, Own, Any, [CONFIGURE_MEM_SLOTS], "How many regions may there be?";
    37 ADD_MEM_REG           AddMemReg(SingleRegion),           File, Ack, Any, [CONFIGURE_MEM_SLOTS], "Guest memory grows.";
    38 REM_MEM_REG           RemMemReg(SingleRegion),           Spare, Ack, Any, [CONFIGURE_MEM_SLOTS], "Guest memory shrinks.";
    39 SET_STATUS            SetStatus(u64),                    None, Ack, Any, [STATUS], "The driver sets the device status.";
    40 GET_STATUS            GetStatus,                         None, Own, Any, [STATUS], "What is the device status?";
    41 GET_SHARED_OBJECT     GetSharedObject(Uuid),             None, Own, Any, [SHARED_OBJECT], "Find an object.";
    42 SET_DEVICE_STATE_FD   SetDeviceStateFd(DeviceState),     Pipe, Own, Any, [DEVICE_STATE], "Save or load the device's state.";
    43 CHECK_DEVICE_STATE    CheckDeviceState,                  None, Own, Any, [DEVICE_STATE], "Did that work?";
    44 GET_SHMEM_CONFIG      GetShmemConfig,                    None, Own, Any, [SHMEM], "Which shared memory regions are there?";
    45 GET_VRING_BASE_SKIP_DRAIN GetVringBaseSkipDrain(VringState), None, Own, Any, [INFLIGHT_SHMFD GET_VRING_BASE_INFLIGHT GET_VRING_BASE_SKIP_DRAIN], "Stop a ring at once; where did it stop?";
    }
}

requests! {
    /// What a back-end asks of a front-end, on a channel of its own.
    BackRequest, BackRequestKind, {
     1 IOTLB_MSG            IotlbMsg(Iotlb),                None, Ack, Any, [BACKEND_REQ], "A translation is missing.";
     2 CONFIG_CHANGE_MSG    ConfigChange,                   None, Ack, Any, [BACKEND_REQ CONFIG], "The configuration space has changed.";
     3 VRING_HOST_NOTIFIER  VringHostNotifier(VringArea),   Spare, Ack, Any, [BACKEND_REQ HOST_NOTIFIER], "A doorbell page for a ring.";
     4 VRING_CALL           VringCall(VringState),          None, Ack, Any, [BACKEND_REQ INBAND_NOTIFICATIONS], "A ring has used buffers.";
     5 VRING_ERR            VringErr(VringState),           None, Ack, Any, [BACKEND_REQ INBAND_NOTIFICATIONS], "A ring is broken.";
     6 SHARED_OBJECT_ADD    SharedObjectAdd(Uuid),          None, Ack, Any, [BACKEND_REQ SHARED_OBJECT], "There is a new object.";
     7 SHARED_OBJECT_REMOVE SharedObjectRemove(Uuid),       None, Ack, Any, [BACKEND_REQ SHARED_OBJECT], "An object is gone.";
     8 SHARED_OBJECT_LOOKUP SharedObjectLookup(Uuid),       None, Own, Any, [BACKEND_REQ SHARED_OBJECT], "Find an object.";
     9 SHMEM_MAP            ShmemMap(ShmemMapping),         File, Ack, Any, [BACKEND_REQ SHMEM], "Map a file into a region.";
    10 SHMEM_UNMAP          ShmemUnmap(ShmemMapping),       None, Ack, Any, [BACKEND_REQ SHMEM], "Take a mapping away.";
    }
}

impl Request {
    /// Appends the whole message, asking for an acknowledgement or not.
    pub fn encode(&self, need_reply: bool, out: &mut Vec<u8>) {
        let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
        encode_message(self.kind().code(), flags, out, |out| {
            self.encode_payload(out)
        });
    }

    /// Returns the ring it names, if it names one; a number that no ring has is returned as it came.
    #[must_use]
    pub fn ring(&self) -> Option<u64> {
        match self {
            Self::SetVringNum(state)
            | Self::SetVringBase(state)
            | Self::GetVringBase(state)
            | Self::GetVringBaseSkipDrain(state)
            | Self::SetVringEnable(state)
            | Self::SetVringEndian(state)
            | Self::VringKick(state) => Some(state.index.into()),
            Self::SetVringAddr(addresses) => Some(addresses.index.into()),
            Self::SetVringKick(word) | Self::SetVringCall(word) | Self::SetVringErr(word) => {
                Some(word.index())
            }
            _ => None,
        }
    }

    /// Returns how many descriptors have to come with it, at least and at most.
    #[must_use]
    pub fn descriptor_count(&self) -> (usize, usize) {
        match (self.kind().descriptors(), self) {
            (Descriptors::None, _) => (0, 0),
            (Descriptors::Spare, _) => (0, 1),
            (
                Descriptors::EventByWord,
                Self::SetVringKick(w) | Self::SetVringCall(w) | Self::SetVringErr(w),
            ) => {
                let count = usize::from(w.has_fd());
                (count, count)
            }
            (Descriptors::FilePerRegion, Self::SetMemTable(MemoryTable(regions))) => {
                (regions.len(), regions.len())
            }
            _ => (1, 1),
        }
    }
}

impl BackRequest {
    /// Appends the whole message, asking for an acknowledgement or not.
    pub fn encode(&self, need_reply: bool, out: &mut Vec<u8>) {
        let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
        encode_message(self.kind().code(), flags, out, |out| {
            self.encode_payload(out)
        });
    }
}

/// Appends the answer to the request with number `code`.
///
/// The flags are version and reply and nothing else: some front-ends refuse any other bit.
pub fn encode_reply(code: u32, payload: &impl Payload, out: &mut Vec<u8>) {
    encode_message(code, VERSION | REPLY, out, |out| payload.encode(out));
}

fn encode_message(code: u32, flags: u32, out: &mut Vec<u8>, payload: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    for number in [code, flags, 0] {
        out.extend_from_slice(&number.to_ne_bytes());
    }
    payload(out);
    let size = u32::try_from(out.len() - start - HEADER_LEN).unwrap_or(u32::MAX);
    out[start + 8..start + HEADER_LEN].copy_from_slice(&size.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::MemoryRegion;

    fn bytes(request: &Request, need_reply: bool) -> Vec<u8> {
        let mut out = Vec::new();
        request.encode(need_reply, &mut out);
        out
    }

    #[test]
    fn requests_are_numbered_without_gaps() {
        for (number, kind) in (1..).zip(RequestKind::ALL) {
            assert_eq!(
                (kind.code(), RequestKind::from_code(number)),
                (number, Some(*kind))
            );
        }
        for (number, kind) in (1..).zip(BackRequestKind::ALL) {
            assert_eq!(
                (kind.code(), BackRequestKind::from_code(number)),
                (number, Some(*kind))
            );
        }
        assert_eq!(
            (RequestKind::ALL.len(), BackRequestKind::ALL.len()),
            (45, 10)
        );
        assert_eq!(
            (RequestKind::from_code(0), RequestKind::from_code(46)),
            (None, None)
        );
    }

    #[test]
    fn messages_have_the_bytes_of_the_specification() {
        assert_eq!(
            bytes(&Request::GetFeatures, false),
            [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(
            bytes(
                &Request::SetVringNum(VringState {
                    index: 3,
                    num: 0x1234
                }),
                true
            ),
            [
                8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0x34, 0x12, 0, 0
            ]
        );
        let mut out = vec![0xee];
        encode_reply(RequestKind::GetQueueNum.code(), &4u64, &mut out);
        assert_eq!(
            out,
            [
                0xee, 17, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0
            ]
        );
        let mut out = Vec::new();
        BackRequest::ConfigChange.encode(true, &mut out);
        assert_eq!(out, [2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let table = MemoryTable(vec![
            MemoryRegion {
                size: 4096,
                ..Default::default()
            };
            8
        ]);
        let requests = [
            Request::SetFeatures(1 << 32),
            Request::SetMemTable(table),
            Request::SetVringKick(VringFd::new(1, false)),
            Request::GetConfig(Config {
                offset: 0,
                flags: 0,
                data: vec![0; 24],
            }),
            Request::GetStatus,
        ];
        for request in requests {
            let bytes = bytes(&request, true);
            let (header, payload) = bytes.split_first_chunk().unwrap();
            let header = Header::from_bytes(*header);
            assert!(header.is_version_1() && header.needs_reply() && !header.is_reply());
            assert_eq!(usize::try_from(header.size).unwrap(), payload.len());
            let kind = RequestKind::from_code(header.request).unwrap();
            assert_eq!(Request::decode(kind, payload), Some(request));
        }
    }

    #[test]
    fn the_table_says_how_many_descriptors_come() {
        let table = Request::SetMemTable(MemoryTable(vec![MemoryRegion::default(); 3]));
        let cases = [
            (Request::SetOwner, (0, 0)),
            (table, (3, 3)),
            (Request::SetVringCall(VringFd::new(0, true)), (1, 1)),
            (Request::SetVringCall(VringFd::new(0, false)), (0, 0)),
            (Request::AddMemReg(SingleRegion::default()), (1, 1)),
            (Request::RemMemReg(SingleRegion::default()), (0, 1)),
            (Request::SetLogFd, (1, 1)),
        ];
        for (request, count) in cases {
            assert_eq!(request.descriptor_count(), count, "{request:?}");
        }
    }

    #[test]
    fn no_payload_is_longer_than_what_is_read() {
        for kind in RequestKind::ALL {
            if let Length::Exact(length) = kind.length() {
                assert!(length <= MAX_PAYLOAD_LEN);
            }
        }
    }
}
