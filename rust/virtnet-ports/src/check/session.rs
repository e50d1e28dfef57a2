//! A front-end by hand: any bytes, any requests, and what comes back, each with a deadline.
//!
//! It is not [`virtnet_vhost::Frontend`], which keeps the rules and gives up where the back-end does not; here the other end is on
//! trial, so a refusal, a silence and a hang-up are answers like others.

use std::cell::{Cell, RefCell};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use virtnet_sys::{Events, Poller, Stream};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{
    BackRequest, BackRequestKind, HEADER_LEN, Header, Request, RequestKind, encode_reply,
};
use virtnet_vhost::payload::{Payload, VringState};
use virtnet_virtio::Features;

use super::{Stop, failed};

/// The longest answer that is read.
const MAX_ANSWER: usize = 4096;

/// Flags of a request: version 1, and that an acknowledgement is asked for.
pub(super) const VERSION: u32 = 1;
pub(super) const NEED_REPLY: u32 = 1 << 3;

/// One connection to the back-end.
pub(super) struct Session {
    stream: Stream,
    poller: Poller,
    patience: Duration,
    /// Virtio features offered, once [`Session::greet`] has asked.
    pub(super) offered: Features,
    /// Protocol features in force.
    pub(super) protocol: ProtocolFeatures,
    /// The back-end has closed the connection.
    ended: Cell<bool>,
    /// Descriptors that came with the last answer that had some.
    files: RefCell<Vec<OwnedFd>>,
}

/// What a back-end made of a request that asked for an acknowledgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Refused(u64),
    Ended,
}

impl Session {
    /// Connects; a back-end that is still busy with the one before gets a little time.
    pub(super) fn connect(path: &Path, patience: Duration) -> Result<Self, Stop> {
        let start = Instant::now();
        let stream = loop {
            match Stream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > patience => return failed(error.to_string()),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        Self::over(stream, patience)
    }

    fn over(stream: Stream, patience: Duration) -> Result<Self, Stop> {
        let poller = Poller::new().map_err(Stop::host)?;
        poller.add(&stream, 0).map_err(Stop::host)?;
        Ok(Self {
            stream,
            poller,
            patience,
            offered: Features::empty(),
            protocol: ProtocolFeatures::empty(),
            ended: Cell::new(false),
            files: RefCell::default(),
        })
    }

    /// Asks what is offered, accepts of the protocol's features those in `wanted`, and owns the session: the order is QEMU's.
    pub(super) fn greet(&mut self, wanted: ProtocolFeatures) -> Result<(), Stop> {
        self.offered = Features::from_bits_retain(self.number(&Request::GetFeatures)?);
        if self.offered.contains(Features::PROTOCOL_FEATURES) {
            let offered = self.number(&Request::GetProtocolFeatures)?;
            let accepted = ProtocolFeatures::from_bits_retain(offered) & wanted;
            self.tell(&Request::SetProtocolFeatures(accepted.bits()), &[])?;
            self.protocol = accepted;
        }
        self.insist(&Request::SetOwner, &[])
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// Process that the back-end is.
    pub(super) fn peer_pid(&self) -> Option<i32> {
        self.stream.peer().ok().map(|peer| peer.pid)
    }

    /// Whether requests can be acknowledged.
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// Sends bytes, descriptors beside the first of them. Nothing is sent any more once the back-end has gone.
    pub(super) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Stop> {
        let start = Instant::now();
        let (mut at, mut fds) = (0, fds);
        while at < bytes.len() && !self.ended.get() {
            match self.stream.send(&bytes[at..], fds) {
                Ok(n) => (at, fds) = (at + n, &[]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if start.elapsed() > self.patience {
                        return failed("the back-end does not read what it is sent");
                    }
                    thread::sleep(Duration::from_millis(1));
                }
                Err(_) => self.ended.set(true),
            }
        }
        Ok(())
    }

    /// Sends a message that may be none: any number, any flags, any payload.
    pub(super) fn send_raw(&self, code: u32, flags: u32, payload: &[u8]) -> Result<(), Stop> {
        let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let header = [code, flags, size].map(u32::to_ne_bytes).concat();
        self.send_bytes(&[&header, payload].concat(), &[])
    }

    /// Sends a request and asks for no answer.
    pub(super) fn tell(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Stop> {
        self.send(request, false, fds)
    }

    /// Sends a request and waits for its own answer: the payload.
    pub(super) fn ask(&self, request: &Request) -> Result<Vec<u8>, Stop> {
        self.tell(request, &[])?;
        self.answer_to(request.kind())
    }

    /// The same where descriptors go along, and may come with the answer.
    pub(super) fn ask_with(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), Stop> {
        self.files.take();
        self.tell(request, fds)?;
        let payload = self.answer_to(request.kind())?;
        Ok((payload, self.files.take()))
    }

    /// Asks for a number.
    pub(super) fn number(&self, request: &Request) -> Result<u64, Stop> {
        let payload = self.ask(request)?;
        u64::from_bytes(&payload).ok_or_else(|| {
            let (name, n) = (request.kind().name(), payload.len());
            Stop::Failed(format!("the answer to {name} has {n} bytes instead of 8"))
        })
    }

    /// Sends a request that asks for an acknowledgement, and waits for that.
    pub(super) fn acknowledged(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, Stop> {
        self.send(request, true, fds)?;
        self.acknowledgement(request.kind().code(), request.kind().name())
    }

    /// Waits for the acknowledgement of the request with this number.
    pub(super) fn acknowledgement(&self, code: u32, name: &str) -> Result<Answer, Stop> {
        let Some((header, payload)) = self.receive(name)? else {
            return Ok(Answer::Ended);
        };
        expect_header(&header, code, name)?;
        match u64::from_bytes(&payload) {
            Some(0) => Ok(Answer::Done),
            Some(code) => Ok(Answer::Refused(code)),
            None => failed(format!(
                "the acknowledgement of {name} has {} bytes instead of 8",
                payload.len()
            )),
        }
    }

    /// Sends a request that has to be carried out.
    pub(super) fn insist(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Stop> {
        let name = request.kind().name();
        if !self.acknowledges() {
            self.tell(request, fds)?;
            // Answers come in the order of the requests: with this one, that one has been looked at.
            return self.number(&Request::GetFeatures).map(drop);
        }
        match self.acknowledged(request, fds)? {
            Answer::Done => Ok(()),
            Answer::Refused(code) => failed(format!("{name} was answered with {code}")),
            Answer::Ended => failed(format!("the connection was closed at {name}")),
        }
    }

    /// Sends a request that nobody should carry out: it is refused, or the connection ends. How, in words.
    pub(super) fn refuses(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<String, Stop> {
        match self.acknowledged(request, fds)? {
            Answer::Done => failed(format!("{} was answered with 0", request.kind().name())),
            answer => Ok(answer.to_string()),
        }
    }

    /// Stops a ring: where.
    pub(super) fn stop_ring(&self, index: u32) -> Result<u32, Stop> {
        let payload = self.ask(&Request::GetVringBase(VringState { index, num: 0 }))?;
        match VringState::from_bytes(&payload) {
            Some(state) if state.index == index => Ok(state.num),
            Some(state) => failed(format!(
                "GET_VRING_BASE of ring {index} was answered for ring {}",
                state.index
            )),
            None => failed(format!(
                "the answer to GET_VRING_BASE has {} bytes instead of 8",
                payload.len()
            )),
        }
    }

    /// Whether the back-end ends the connection in time; what it sends before does not matter.
    pub(super) fn is_ended(&self) -> bool {
        loop {
            match self.receive("anything") {
                Ok(None) => return true,
                Ok(Some(_)) => {}
                Err(_) => return false,
            }
        }
    }

    /// Whether a message comes within a time in which nothing should.
    pub(super) fn says_something(&self, within: Duration) -> bool {
        let mut events = Events::with_capacity(1);
        matches!(self.poller.wait(&mut events, Some(within)), Ok(n) if n > 0)
    }

    fn send(
        &self,
        request: &Request,
        need_reply: bool,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Stop> {
        let mut bytes = Vec::new();
        request.encode(need_reply, &mut bytes);
        self.send_bytes(&bytes, fds)
    }

    /// Waits for the own answer of a request: of one that has any, or has one now, as memory does during post-copy.
    pub(super) fn answer_to(&self, kind: RequestKind) -> Result<Vec<u8>, Stop> {
        let Some((header, payload)) = self.receive(kind.name())? else {
            return failed(format!("the connection was closed at {}", kind.name()));
        };
        expect_header(&header, kind.code(), kind.name())?;
        Ok(payload)
    }

    /// Waits for a whole message; `None` when the connection ends.
    pub(super) fn receive(&self, name: &str) -> Result<Option<(Header, Vec<u8>)>, Stop> {
        let Some(bytes) = self.receive_bytes(HEADER_LEN, name)? else {
            return Ok(None);
        };
        let Ok(bytes) = bytes.try_into() else {
            return Ok(None);
        };
        let header = Header::from_bytes(bytes);
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        if size > MAX_ANSWER {
            return failed(format!("the answer to {name} announces {size} bytes"));
        }
        Ok(self
            .receive_bytes(size, name)?
            .map(|payload| (header, payload)))
    }

    fn receive_bytes(&self, len: usize, name: &str) -> Result<Option<Vec<u8>>, Stop> {
        let start = Instant::now();
        let mut events = Events::with_capacity(1);
        let (mut bytes, mut at) = (vec![0; len], 0);
        while at < len {
            // Descriptors that nobody asks for are closed with the next that come.
            let mut files = Vec::new();
            let received = self.stream.recv(&mut bytes[at..], &mut files);
            if !files.is_empty() {
                self.files.replace(files);
            }
            match received {
                Ok(0) => {
                    self.ended.set(true);
                    return Ok(None);
                }
                Ok(n) => at += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = self.patience.saturating_sub(start.elapsed());
                    if left.is_zero() {
                        return failed(format!(
                            "{name} was not answered within {:?}",
                            self.patience
                        ));
                    }
                    self.poller
                        .wait(&mut events, Some(left))
                        .map_err(Stop::host)?;
                }
                Err(_) => {
                    self.ended.set(true);
                    return Ok(None);
                }
            }
        }
        Ok(Some(bytes))
    }
}

/// The front-end's end of the back-end's own channel.
pub(super) struct Channel(Session);

impl Channel {
    /// Makes one and hands its other end over.
    pub(super) fn open(session: &Session) -> Result<Self, Stop> {
        let (ours, theirs) = Stream::pair().map_err(Stop::host)?;
        session.insist(&Request::SetBackendReqFd, &[theirs.as_fd()])?;
        Session::over(ours, session.patience).map(Self)
    }

    /// The next request that comes within a time, and whether it waits to be acknowledged.
    pub(super) fn next(&self, within: Duration) -> Result<Option<(BackRequest, bool)>, Stop> {
        if self.0.ended.get() || !self.0.says_something(within) {
            return Ok(None);
        }
        let Some((header, payload)) = self.0.receive("a request of the back-end's own")? else {
            return Ok(None);
        };
        let kind = BackRequestKind::from_code(header.request);
        let request = kind.and_then(|kind| BackRequest::decode(kind, &payload));
        let Some(request) = request else {
            return failed(format!(
                "the back-end asked for {} with {} bytes, which is nothing it can ask for",
                header.request,
                payload.len()
            ));
        };
        Ok(Some((request, header.needs_reply())))
    }

    /// Says that a request was carried out.
    pub(super) fn acknowledge(&self, request: &BackRequest) -> Result<(), Stop> {
        let mut answer = Vec::new();
        encode_reply(request.kind().code(), &0_u64, &mut answer);
        self.0.send_bytes(&answer, &[])
    }
}

/// Spec: vhost-user, Header: an answer has the request's number and the flags version and reply.
fn expect_header(header: &Header, code: u32, name: &str) -> Result<(), Stop> {
    if (header.request, header.flags) == (code, 0x5) {
        return Ok(());
    }
    failed(format!(
        "the answer to {name} (request {code}) has request {} and flags {:#x} instead of 0x5",
        header.request, header.flags
    ))
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => f.write_str("answered with 0"),
            Self::Refused(code) => write!(f, "answered with {code}"),
            Self::Ended => f.write_str("the connection was closed"),
        }
    }
}
