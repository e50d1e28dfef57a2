//! Words for what front-ends say, answers taken apart, and descriptors that tell whether they have been closed.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use virtnet_sys::{EventFd, Events, Poller};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{self, Request};
use virtnet_vhost::payload::VringFd;

use crate::fake::{MEMORY, PROTOCOL, Scene, VERSION_1, bytes, ring_at, state, table};

impl Scene {
    /// A scene in which version 1 and these protocol features have been agreed on.
    pub fn negotiated(protocol: ProtocolFeatures) -> Self {
        let mut scene = Self::agreed(protocol);
        scene.exchange(&Request::SetFeatures(VERSION_1 | PROTOCOL));
        scene.device.take_log();
        scene
    }

    /// Sends all bytes, with descriptors at the first of them.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.peer.send(bytes, fds).unwrap(), bytes.len());
    }

    /// Everything that has been answered and not been read yet.
    pub fn answers(&self) -> Vec<u8> {
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

    /// Sends a request with the descriptors it has to come with, has it served, and returns what is answered.
    #[track_caller]
    pub fn exchange(&mut self, request: &Request) -> Vec<u8> {
        self.exchange_with(request, false, &events_for(request))
    }

    #[track_caller]
    pub fn exchange_with(
        &mut self,
        request: &Request,
        need_reply: bool,
        fds: &[OwnedFd],
    ) -> Vec<u8> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.send(&bytes(request, need_reply), &fds);
        self.serve().unwrap();
        self.answers()
    }

    /// As [`Self::exchange`], asking for an acknowledgement where there is no other answer; whether it was carried out.
    #[track_caller]
    pub fn carries_out(&mut self, request: &Request) -> bool {
        let found = Reply::of(&self.exchange_with(request, true, &events_for(request)));
        let [reply] = &found[..] else {
            panic!("one answer was expected: {found:?}");
        };
        assert_eq!((reply.code, reply.flags), (request.kind().code(), 5));
        if request.kind().reply() == message::Reply::Own {
            !reply.payload.is_empty()
        } else {
            assert_eq!(reply.payload.len(), 8);
            reply.payload == [0; 8]
        }
    }

    /// The names of the calls of the device since the last time.
    pub fn take_calls(&mut self) -> Vec<String> {
        let first = |line: String| line.split(' ').next().unwrap_or_default().to_owned();
        self.device.take_log().into_iter().map(first).collect()
    }
}

/// The bytes of a message with anything in it.
pub fn raw(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len() as u32;
    let header = [code, flags, size].map(u32::to_ne_bytes).concat();
    [header, payload.to_vec()].concat()
}

/// As many eventfds as the request has to come with.
pub fn events_for(request: &Request) -> Vec<OwnedFd> {
    let (least, _) = request.descriptor_count();
    (0..least).map(|_| event()).collect()
}

pub fn event() -> OwnedFd {
    EventFd::new().unwrap().into()
}

/// A message of a back-end, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub code: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
}

impl Reply {
    /// Takes apart whole messages that lie one behind the other.
    #[track_caller]
    pub fn of(mut bytes: &[u8]) -> Vec<Self> {
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
pub struct Witness(std::io::PipeReader);

impl Witness {
    pub fn new() -> (Self, OwnedFd) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Self(reader), writer.into())
    }

    /// Whether nobody has the other end any more. Waits if somebody has: only to be asked when it should be closed.
    #[track_caller]
    pub fn assert_closed(&mut self) {
        let poller = Poller::new().unwrap();
        poller.add(&self.0, 0).unwrap();
        let mut events = Events::with_capacity(1);
        let now = Some(Duration::ZERO);
        let hung_up = poller.wait(&mut events, now).unwrap() == 1;
        assert!(hung_up, "a descriptor is still open");
        assert_eq!(self.0.read(&mut [0; 8]).unwrap(), 0);
    }
}

// Requests that most tests need, in few words.

pub fn whole_memory() -> Request {
    table(&[MEMORY])
}

pub fn size(index: u32, num: u32) -> Request {
    Request::SetVringNum(state(index, num))
}

pub fn base(index: u32, num: u32) -> Request {
    Request::SetVringBase(state(index, num))
}

pub fn place(index: u32) -> Request {
    Request::SetVringAddr(ring_at(index))
}

pub fn kick(index: u8) -> Request {
    Request::SetVringKick(VringFd::new(index, true))
}

pub fn call(index: u8) -> Request {
    Request::SetVringCall(VringFd::new(index, true))
}

pub fn err(index: u8) -> Request {
    Request::SetVringErr(VringFd::new(index, true))
}

pub fn enable(index: u32, num: u32) -> Request {
    Request::SetVringEnable(state(index, num))
}

pub fn stop(index: u32) -> Request {
    Request::GetVringBase(state(index, 0))
}
