//! The back-end's own channel, from either end: requests of a back-end to its front-end.
//!
//! It is a socket of its own that the front-end makes and hands over. [`BackChannel`] is the back-end's end: it asks and never
//! waits, and gives out the answers as they come. [`FrontChannel`] is the front-end's end: it gives out the requests that it can
//! serve, and refuses the rest. Neither ends the session: a channel that fails is given up, and everything else goes on.
//!
//! Spec: vhost-user, Back-end communication; Back-end message types

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use virtnet_sys::Stream;

use crate::connection::{Connection, Message};
use crate::error::SessionError;
use crate::features::ProtocolFeatures;
use crate::message::{BackRequest, BackRequestKind, Reply, encode_reply};
use crate::payload::Payload;

/// The most requests that wait for their answers.
pub(crate) const MAX_ASKED: usize = 512;

/// The back-end's end.
#[derive(Debug)]
pub(crate) struct BackChannel {
    connection: Connection,
    /// What has been asked and not answered, in order. Stays empty where there are no acknowledgements.
    asked: VecDeque<BackRequest>,
    /// The configuration has changed once more since the front-end was told.
    stale: bool,
}

/// An answer of the front-end: to which request, and 0 if it was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackAnswer {
    pub(crate) request: BackRequest,
    pub(crate) code: u64,
}

impl BackChannel {
    pub(crate) fn new(fd: OwnedFd) -> Result<Self, SessionError> {
        Ok(Self {
            connection: Connection::new(Stream::from_owned(fd)?),
            asked: VecDeque::new(),
            stale: false,
        })
    }

    /// Asks; whether that was possible. It is not while too much is asked and not answered.
    pub(crate) fn ask(
        &mut self,
        request: BackRequest,
        acknowledged: bool,
    ) -> Result<bool, SessionError> {
        if self.asked.len() >= MAX_ASKED {
            return Ok(false);
        }
        if request == BackRequest::ConfigChange && self.asked.contains(&request) {
            // One word is enough for all changes that it has not heard of.
            self.stale = true;
            return Ok(true);
        }
        let mut bytes = Vec::new();
        request.encode(acknowledged, &mut bytes);
        self.connection.send(bytes, Vec::new())?;
        if acknowledged {
            self.asked.push_back(request);
        }
        Ok(true)
    }

    /// Takes the answers that are there.
    pub(crate) fn answers(&mut self) -> Result<Vec<BackAnswer>, SessionError> {
        if self.connection.wants_write() {
            self.connection.flush()?;
        }
        let mut answers = Vec::new();
        while let Some(message) = self.connection.receive()? {
            let answer = self.answer(&message)?;
            if answer.request == BackRequest::ConfigChange && std::mem::take(&mut self.stale) {
                self.ask(BackRequest::ConfigChange, true)?;
            }
            answers.push(answer);
        }
        Ok(answers)
    }

    fn answer(&mut self, message: &Message) -> Result<BackAnswer, SessionError> {
        let header = message.header;
        let expected = self
            .asked
            .front()
            .map_or("nothing", |asked| asked.kind().name());
        let request = self
            .asked
            .pop_front()
            .filter(|asked| asked.kind().code() == header.request && header.is_reply());
        let Some(request) = request else {
            return Err(SessionError::NotTheReply {
                expected,
                found: header.request,
                flags: header.flags,
            });
        };
        let code = u64::from_bytes(&message.payload).ok_or(SessionError::ReplyLength {
            request: expected,
            expected: u64::LENGTH,
            found: message.payload.len(),
        })?;
        Ok(BackAnswer { request, code })
    }

    /// Ends a channel whose peer does not read, or sends half a message.
    pub(crate) fn check_progress(&mut self, now_ns: u64) -> Result<(), SessionError> {
        self.connection.check_progress(now_ns)
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// The front-end's end.
#[derive(Debug)]
pub(crate) struct FrontChannel {
    connection: Connection,
}

/// A request of a back-end that the front-end can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FrontAsked {
    pub(crate) request: BackRequest,
    /// Whether it is to be acknowledged.
    pub(crate) needs_reply: bool,
}

impl FrontChannel {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            connection: Connection::new(stream),
        }
    }

    /// Takes the next request that can be served; those that cannot are refused.
    pub(crate) fn next(
        &mut self,
        protocol: ProtocolFeatures,
    ) -> Result<Option<FrontAsked>, SessionError> {
        if self.connection.wants_write() {
            self.connection.flush()?;
        }
        while let Some(message) = self.connection.receive()? {
            let header = message.header;
            if header.is_reply() {
                return Err(SessionError::ReplyToNothing {
                    request: header.request,
                });
            }
            let needs_reply =
                header.needs_reply() && protocol.contains(ProtocolFeatures::REPLY_ACK);
            let kind = BackRequestKind::from_code(header.request);
            // Descriptors that come with it are closed here: no request that is served has one.
            let request = kind
                .filter(|kind| protocol.contains(kind.needs()))
                .filter(|_| message.fds.is_empty() && !message.misplaced)
                .and_then(|kind| BackRequest::decode(kind, &message.payload))
                .filter(|request| {
                    matches!(
                        request,
                        BackRequest::ConfigChange
                            | BackRequest::IotlbMsg(_)
                            | BackRequest::VringCall(_)
                            | BackRequest::VringErr(_)
                    )
                });
            if let Some(request) = request {
                return Ok(Some(FrontAsked {
                    request,
                    needs_reply,
                }));
            }
            if needs_reply || kind.is_some_and(|kind| kind.reply() == Reply::Own) {
                self.reply(header.request, 1)?;
            }
        }
        Ok(None)
    }

    /// Acknowledges a request; 0 says that it was carried out.
    pub(crate) fn acknowledge(
        &mut self,
        asked: &FrontAsked,
        code: u64,
    ) -> Result<(), SessionError> {
        if asked.needs_reply {
            self.reply(asked.request.kind().code(), code)?;
        }
        Ok(())
    }

    fn reply(&mut self, request: u32, code: u64) -> Result<(), SessionError> {
        let mut bytes = Vec::new();
        encode_reply(request, &code, &mut bytes);
        self.connection.send(bytes, Vec::new())
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }
}

#[cfg(test)]
mod tests {
    use virtnet_sys::EventFd;

    use std::os::fd::AsFd;

    use super::*;
    use crate::payload::{Iotlb, Uuid, VringArea, VringState};

    const MISS: Iotlb = Iotlb {
        iova: 0x1000,
        size: 0x1000,
        user_addr: 0,
        permission: 1,
        kind: 1,
    };

    const ALL: ProtocolFeatures = ProtocolFeatures::BACKEND_REQ
        .union(ProtocolFeatures::REPLY_ACK)
        .union(ProtocolFeatures::CONFIG);

    fn ends() -> (BackChannel, FrontChannel) {
        let (front, back) = Stream::pair().unwrap();
        (
            BackChannel::new(back.into()).unwrap(),
            FrontChannel::new(front),
        )
    }

    #[test]
    fn what_is_asked_is_served_and_answered_in_order() {
        let (mut back, mut front) = ends();
        for request in [BackRequest::IotlbMsg(MISS), BackRequest::ConfigChange] {
            assert!(back.ask(request, true).unwrap());
        }
        for (code, expected) in [
            (7, BackRequest::IotlbMsg(MISS)),
            (0, BackRequest::ConfigChange),
        ] {
            let asked = front.next(ALL).unwrap().unwrap();
            assert_eq!((&asked.request, asked.needs_reply), (&expected, true));
            assert_eq!(back.answers().unwrap(), []);
            front.acknowledge(&asked, code).unwrap();
            let answer = BackAnswer {
                request: expected,
                code,
            };
            assert_eq!(back.answers().unwrap(), [answer]);
        }
        assert_eq!(front.next(ALL).unwrap(), None);
    }

    #[test]
    fn changes_that_follow_each_other_are_told_once_more_not_each() {
        let (mut back, mut front) = ends();
        for _ in 0..1000 {
            back.ask(BackRequest::ConfigChange, true).unwrap();
        }
        for _ in 0..2 {
            let asked = front.next(ALL).unwrap().unwrap();
            front.acknowledge(&asked, 0).unwrap();
            assert_eq!(back.answers().unwrap().len(), 1);
        }
        assert_eq!(front.next(ALL).unwrap(), None);
    }

    #[test]
    fn a_front_end_that_does_not_answer_is_not_asked_without_end() {
        let (mut back, _front) = ends();
        let asked =
            (0..2 * MAX_ASKED).filter(|_| back.ask(BackRequest::IotlbMsg(MISS), true).unwrap());
        assert_eq!(asked.count(), MAX_ASKED);
    }

    #[test]
    fn what_cannot_be_served_is_refused_and_the_channel_goes_on() {
        let (back, mut front) = ends();
        let event = EventFd::new().unwrap();
        let stream = back.connection.stream();
        let send = |request: &BackRequest, fds: &[_]| {
            let mut bytes = Vec::new();
            request.encode(true, &mut bytes);
            stream.send(&bytes, fds).unwrap();
        };
        let state = VringState { index: 0, num: 0 };
        send(
            &BackRequest::VringHostNotifier(VringArea::default()),
            &[event.as_fd()],
        );
        send(&BackRequest::VringCall(state), &[]);
        send(&BackRequest::SharedObjectLookup(Uuid::default()), &[]);
        send(&BackRequest::IotlbMsg(MISS), &[event.as_fd()]);
        stream
            .send(&[99, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], &[])
            .unwrap();
        send(&BackRequest::ConfigChange, &[]);
        let asked = front.next(ALL).unwrap().unwrap();
        assert_eq!(asked.request, BackRequest::ConfigChange);
        front.acknowledge(&asked, 0).unwrap();
        let mut answers = [0; 512];
        let n = stream.recv(&mut answers, &mut Vec::new()).unwrap();
        let codes: Vec<_> = answers[..n].chunks(20).map(|answer| answer[12]).collect();
        assert_eq!(codes, [1, 1, 1, 1, 1, 0]);
        let without = ALL - ProtocolFeatures::CONFIG;
        send(&BackRequest::ConfigChange, &[]);
        assert_eq!(front.next(without).unwrap(), None, "it was not agreed on");
    }

    #[test]
    fn an_answer_to_nothing_is_an_error() {
        let (mut back, mut front) = ends();
        front.reply(2, 0).unwrap();
        let error = back.answers().unwrap_err();
        assert!(matches!(error, SessionError::NotTheReply { .. }), "{error}");

        let (mut back, mut front) = ends();
        back.ask(BackRequest::ConfigChange, true).unwrap();
        front.reply(1, 0).unwrap();
        let error = back.answers().unwrap_err();
        assert!(
            matches!(
                error,
                SessionError::NotTheReply {
                    expected: "CONFIG_CHANGE_MSG",
                    ..
                }
            ),
            "{error}"
        );
    }
}
