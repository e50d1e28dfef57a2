//! A connection with both of its ends in this thread: what a front-end sends at one end a back-end serves at the other.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use virtnet_sys::{EventFd, Stream};
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{MemoryRegion, MemoryTable, VringAddresses, VringFd, VringState};
use virtnet_vhost::{Backend, Offer, ProtocolFeatures, SessionError};

use crate::device::Recorder;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PACKED: u64 = 1 << 34;
/// Protocol features can be negotiated.
pub(crate) const PROTOCOL: u64 = 1 << 30;

/// Memory of one region, as the front-end sees it.
pub(crate) const MEMORY: MemoryRegion = MemoryRegion {
    guest_addr: 0,
    size: 0x1_0000,
    user_addr: 0x7f00_0000_0000,
    mmap_offset: 0,
};

/// A back-end that is being talked to.
pub(crate) struct Line {
    pub(crate) peer: Stream,
    pub(crate) backend: Backend,
    pub(crate) device: Recorder,
}

impl Line {
    /// A back-end with everything this crate implements and two queue pairs.
    pub(crate) fn new() -> Self {
        Self::with(Offer::new(VERSION_1 | PACKED, ProtocolFeatures::all(), 2))
    }

    pub(crate) fn with(offer: Offer) -> Self {
        let (peer, stream) = Stream::pair().unwrap();
        Self {
            peer,
            backend: Backend::new(stream, offer),
            device: Recorder::new(),
        }
    }

    /// A back-end with which these protocol features have been agreed.
    pub(crate) fn agreed(protocol: ProtocolFeatures) -> Self {
        let mut line = Self::new();
        line.tell(&Request::SetFeatures(VERSION_1 | PROTOCOL));
        line.tell(&Request::SetProtocolFeatures(protocol.bits()));
        line.device.calls.clear();
        line
    }

    /// Sends all bytes, with descriptors at the first of them.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.peer.send(bytes, fds).unwrap(), bytes.len());
    }

    pub(crate) fn serve(&mut self) -> Result<(), SessionError> {
        self.backend.on_readable(&mut self.device)
    }

    /// Everything that has been answered and not been read yet.
    pub(crate) fn answer(&self) -> Vec<u8> {
        let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let mut fds = Vec::new();
            match self.peer.recv(&mut buffer, &mut fds) {
                Ok(0) => return bytes,
                Ok(count) => bytes.extend(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
                Err(error) => panic!("{error}"),
            }
            assert!(fds.is_empty(), "no answer carries descriptors");
        }
    }

    /// Sends a request with the descriptors it has to come with, has it served, and returns the answer.
    #[track_caller]
    pub(crate) fn tell(&mut self, request: &Request) -> Vec<u8> {
        self.tell_with(request, false, &events_for(request))
    }

    /// As [`Self::tell`], asking for an acknowledgement; whether there was one and it said yes.
    #[track_caller]
    pub(crate) fn ask(&mut self, request: &Request) -> bool {
        match Reply::of(&self.tell_with(request, true, &events_for(request)))[..] {
            [Reply { code, flags: 5, .. }] if code != request.kind().code() => {
                panic!("the answer is to request {code}")
            }
            [
                Reply {
                    flags: 5,
                    ref payload,
                    ..
                },
            ] if payload.len() == 8 => *payload == [0; 8],
            ref other => panic!("one acknowledgement was expected: {other:?}"),
        }
    }

    /// As [`Self::ask`], or for a question: whether there was an answer.
    #[track_caller]
    pub(crate) fn ask_or_answer(&mut self, request: &Request) -> bool {
        if request.kind().reply() == virtnet_vhost::message::Reply::Own {
            let answer = self.tell(request);
            return Reply::of(&answer).iter().all(|r| !r.payload.is_empty());
        }
        self.ask(request)
    }

    #[track_caller]
    pub(crate) fn tell_with(
        &mut self,
        request: &Request,
        need_reply: bool,
        fds: &[OwnedFd],
    ) -> Vec<u8> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.send(&bytes(request, need_reply), &fds);
        self.serve().unwrap();
        self.answer()
    }
}

/// The bytes of a request.
pub(crate) fn bytes(request: &Request, need_reply: bool) -> Vec<u8> {
    let mut out = Vec::new();
    request.encode(need_reply, &mut out);
    out
}

/// The bytes of a message with anything in it.
pub(crate) fn raw(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len() as u32;
    let header = [code, flags, size].map(u32::to_ne_bytes).concat();
    [header, payload.to_vec()].concat()
}

/// As many eventfds as the request has to come with.
pub(crate) fn events_for(request: &Request) -> Vec<OwnedFd> {
    let (least, _) = request.descriptor_count();
    (0..least).map(|_| event()).collect()
}

pub(crate) fn event() -> OwnedFd {
    EventFd::new().unwrap().into()
}

/// A message of a back-end, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) code: u32,
    pub(crate) flags: u32,
    pub(crate) payload: Vec<u8>,
}

impl Reply {
    /// Takes apart whole messages that lie one behind the other.
    #[track_caller]
    pub(crate) fn of(mut bytes: &[u8]) -> Vec<Self> {
        let word = |bytes: &mut &[u8]| {
            let (word, rest) = bytes.split_first_chunk().expect("a whole header");
            *bytes = rest;
            u32::from_ne_bytes(*word)
        };
        let mut replies = Vec::new();
        while !bytes.is_empty() {
            let (code, flags) = (word(&mut bytes), word(&mut bytes));
            let size = word(&mut bytes) as usize;
            assert!(size <= bytes.len(), "a whole payload");
            let (payload, rest) = bytes.split_at(size);
            bytes = rest;
            replies.push(Self {
                code,
                flags,
                payload: payload.to_vec(),
            });
        }
        replies
    }
}

/// Tells whether a descriptor that was given away has been closed: the reading end of a pipe, whose writing end was sent.
pub(crate) struct Witness(std::io::PipeReader);

impl Witness {
    pub(crate) fn new() -> (Self, OwnedFd) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Self(reader), writer.into())
    }

    /// Whether nobody has the other end any more. Waits if somebody has: only to be asked when it should be closed.
    #[track_caller]
    pub(crate) fn assert_closed(&mut self) {
        let poller = virtnet_sys::Poller::new().unwrap();
        poller.add(&self.0, 0).unwrap();
        let mut events = virtnet_sys::Events::with_capacity(1);
        let now = Some(std::time::Duration::ZERO);
        let hung_up = poller.wait(&mut events, now).unwrap() == 1;
        assert!(hung_up, "a descriptor is still open");
        assert_eq!(self.0.read(&mut [0; 8]).unwrap(), 0);
    }
}

/// Where ring `index` lies: each has three pages of [`MEMORY`].
pub(crate) fn addresses(index: u32) -> VringAddresses {
    let start = MEMORY.user_addr + u64::from(index) * 0x3000;
    VringAddresses {
        index,
        flags: 0,
        desc: start,
        avail: start + 0x1000,
        used: start + 0x2000,
        log_guest_addr: 0,
    }
}

// Requests that most tests need, in few words.

pub(crate) fn memory() -> Request {
    Request::SetMemTable(MemoryTable(vec![MEMORY]))
}

pub(crate) fn size(index: u32, num: u32) -> Request {
    Request::SetVringNum(VringState { index, num })
}

pub(crate) fn base(index: u32, num: u32) -> Request {
    Request::SetVringBase(VringState { index, num })
}

pub(crate) fn place(index: u32) -> Request {
    Request::SetVringAddr(addresses(index))
}

pub(crate) fn kick(index: u8) -> Request {
    Request::SetVringKick(VringFd::new(index, true))
}

pub(crate) fn call(index: u8) -> Request {
    Request::SetVringCall(VringFd::new(index, true))
}

pub(crate) fn err(index: u8) -> Request {
    Request::SetVringErr(VringFd::new(index, true))
}

pub(crate) fn enable(index: u32, num: u32) -> Request {
    Request::SetVringEnable(VringState { index, num })
}

pub(crate) fn stop(index: u32) -> Request {
    Request::GetVringBase(VringState { index, num: 0 })
}
