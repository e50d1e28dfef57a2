//! A connection: bytes and descriptors in, whole messages out, and the other way round.
//!
//! It never blocks and never reads further than the end of the message at hand, since the kernel ties descriptors to
//! bytes and would hand over those of the next message too early. A message may come in as many pieces as the peer
//! likes; its length is checked before a byte of payload is read. What cannot be sent at once is queued, up to a bound:
//! a peer that does not read is an error, not a growing queue.
//!
//! It looks at no payload. Deadlines are counted from one [`Connection::check_progress`] to the next, with the caller's
//! clock.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use virtnet_sys::Stream;

use crate::error::SessionError;
use crate::message::{HEADER_LEN, Header, MAX_PAYLOAD_LEN};

/// The most bytes that wait for a peer that does not read.
const MAX_QUEUED_BYTES: usize = 64 << 10;

/// How long half a message may stay half a message, or a peer may leave what it is sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// One whole message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Descriptors came beside a byte that was not the first one; they are closed.
    pub(crate) misplaced: bool,
}

/// A stream that carries messages.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Stream,
    incoming: Incoming,
    outgoing: VecDeque<Outgoing>,
    /// Counts what has moved, so that standing still can be seen.
    moved: u64,
    patience: Patience,
}

/// The message that is being received.
#[derive(Debug)]
struct Incoming {
    bytes: Vec<u8>,
    header: Option<Header>,
    fds: Vec<OwnedFd>,
    misplaced: bool,
}

/// A message that is being sent.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Empty once the first byte is sent.
    fds: Vec<OwnedFd>,
}

/// Measures how long something has stood still, from one look at it to the next.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    stands: Option<(u64, u64)>,
}

impl Patience {
    /// Returns how long the number has been this one; `None` begins anew.
    pub(crate) fn waited(&mut self, number: Option<u64>, now_ns: u64) -> Duration {
        self.stands = match (self.stands, number) {
            (Some((before, since)), Some(number)) if before == number => Some((before, since)),
            (_, number) => number.map(|number| (number, now_ns)),
        };
        let since = self.stands.map_or(now_ns, |(_, since)| since);
        Duration::from_nanos(now_ns.saturating_sub(since))
    }
}

impl Connection {
    pub(crate) fn new(stream: Stream) -> Self {
        let incoming = Incoming {
            bytes: Vec::with_capacity(256),
            header: None,
            fds: Vec::new(),
            misplaced: false,
        };
        Self {
            stream,
            incoming,
            outgoing: VecDeque::new(),
            moved: 0,
            patience: Patience::default(),
        }
    }

    /// Receives the next whole message, or nothing if it is not all there yet.
    pub(crate) fn receive(&mut self) -> Result<Option<Message>, SessionError> {
        loop {
            if let Some(message) = self.incoming.take_whole() {
                return Ok(Some(message));
            }
            let mut buffer = [0; MAX_PAYLOAD_LEN];
            let wanted = self.incoming.wanted();
            let mut fds = Vec::new();
            match self.stream.recv(&mut buffer[..wanted], &mut fds) {
                Ok(0) => return Err(SessionError::Disconnected),
                Ok(count) => self.incoming.push(&buffer[..count], fds)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(lost(error, "receive from")),
            }
            self.moved = self.moved.wrapping_add(1);
        }
    }

    /// Sends a message, or queues what the peer does not take at once.
    pub(crate) fn send(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Result<(), SessionError> {
        self.outgoing.push_back(Outgoing {
            bytes,
            sent: 0,
            fds,
        });
        self.flush()?;
        let queued = self.queued_bytes();
        if queued > MAX_QUEUED_BYTES {
            Err(SessionError::NotReading { queued })
        } else {
            Ok(())
        }
    }

    /// Sends what is queued, as far as the peer takes it.
    pub(crate) fn flush(&mut self) -> Result<(), SessionError> {
        while let Some(message) = self.outgoing.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(AsFd::as_fd).collect();
            match self.stream.send(&message.bytes[message.sent..], &fds) {
                Ok(count) => {
                    message.sent += count;
                    message.fds.clear();
                    self.moved = self.moved.wrapping_add(1);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(lost(error, "send to")),
            }
            if message.sent == message.bytes.len() {
                self.outgoing.pop_front();
            }
        }
        Ok(())
    }

    /// Tells whether something waits until the peer reads.
    pub(crate) fn wants_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Ends a connection that has stood still for too long in the middle of something.
    ///
    /// To be called now and then; a connection on which nothing is begun may stand still for ever.
    pub(crate) fn check_progress(&mut self, now_ns: u64) -> Result<(), SessionError> {
        let half = self.incoming.is_begun();
        if !half && self.outgoing.is_empty() {
            self.patience.waited(None, now_ns);
            return Ok(());
        }
        if self.patience.waited(Some(self.moved), now_ns) < PATIENCE {
            Ok(())
        } else if half {
            Err(SessionError::HalfMessage { after: PATIENCE })
        } else {
            Err(SessionError::NotReading {
                queued: self.queued_bytes(),
            })
        }
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    fn queued_bytes(&self) -> usize {
        self.outgoing
            .iter()
            .map(|message| message.bytes.len() - message.sent)
            .sum()
    }
}

impl Incoming {
    /// Returns how many bytes are missing from the header, or from the payload after it.
    fn wanted(&self) -> usize {
        let whole = self
            .header
            .map_or(HEADER_LEN, |header| HEADER_LEN + payload_len(&header));
        whole - self.bytes.len()
    }

    fn is_begun(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Takes bytes, at most as many as are wanted, and the descriptors that came with them.
    fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), SessionError> {
        if self.bytes.is_empty() {
            self.fds = fds;
        } else if !fds.is_empty() {
            self.misplaced = true;
        }
        self.bytes.extend_from_slice(bytes);
        if self.header.is_none()
            && let Ok(bytes) = self.bytes.as_slice().try_into()
        {
            let header = Header::from_bytes(bytes);
            let (request, flags, size) = (header.request, header.flags, header.size);
            if !header.is_version_1() {
                return Err(SessionError::Version { request, flags });
            }
            if payload_len(&header) > MAX_PAYLOAD_LEN {
                return Err(SessionError::TooLong {
                    request,
                    size,
                    most: MAX_PAYLOAD_LEN,
                });
            }
            self.header = Some(header);
        }
        Ok(())
    }

    fn take_whole(&mut self) -> Option<Message> {
        let header = self.header.filter(|_| self.wanted() == 0)?;
        self.header = None;
        let payload = self.bytes[HEADER_LEN..].to_vec();
        self.bytes.clear();
        let mut fds = std::mem::take(&mut self.fds);
        let misplaced = std::mem::take(&mut self.misplaced);
        if misplaced {
            fds.clear();
        }
        Some(Message {
            header,
            payload,
            fds,
            misplaced,
        })
    }
}

fn payload_len(header: &Header) -> usize {
    usize::try_from(header.size).unwrap_or(usize::MAX)
}

/// A connection that the kernel gives up on has no one at the other end.
fn lost(source: io::Error, operation: &'static str) -> SessionError {
    match source.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected => {
            SessionError::Disconnected
        }
        _ => SessionError::Io { operation, source },
    }
}

#[cfg(test)]
mod tests {
    use virtnet_sys::EventFd;

    use super::*;
    use crate::message::{Request, RequestKind};

    const SECOND: u64 = 1_000_000_000;

    fn pair() -> (Stream, Connection) {
        let (peer, ours) = Stream::pair().unwrap();
        (peer, Connection::new(ours))
    }

    fn bytes(request: &Request) -> Vec<u8> {
        let mut out = Vec::new();
        request.encode(false, &mut out);
        out
    }

    #[test]
    fn tb1_a_message_may_come_byte_by_byte() {
        let (peer, mut connection) = pair();
        let bytes = bytes(&Request::SetFeatures(0x1122_3344));
        let event = EventFd::new().unwrap();
        for (place, byte) in bytes.iter().enumerate() {
            assert!(connection.receive().unwrap().is_none());
            let fds: &[_] = if place == 0 { &[event.as_fd()] } else { &[] };
            peer.send(&[*byte], fds).unwrap();
        }
        let message = connection.receive().unwrap().unwrap();
        assert_eq!(message.header.request, RequestKind::SetFeatures.code());
        assert_eq!(message.payload, 0x1122_3344u64.to_ne_bytes());
        assert_eq!((message.fds.len(), message.misplaced), (1, false));
        assert!(connection.receive().unwrap().is_none());
    }

    #[test]
    fn tb3_tb14_messages_in_one_write_keep_order_and_descriptors() {
        let (peer, mut connection) = pair();
        let event = EventFd::new().unwrap();
        let both = [bytes(&Request::SetOwner), bytes(&Request::GetFeatures)].concat();
        peer.send(&both, &[]).unwrap();
        peer.send(&bytes(&Request::SetLogFd), &[event.as_fd()])
            .unwrap();
        peer.send(
            &bytes(&Request::GpuSetSocket),
            &[event.as_fd(), event.as_fd()],
        )
        .unwrap();
        let seen: Vec<_> = (0..4)
            .map(|_| connection.receive().unwrap().unwrap())
            .map(|message| (message.header.request, message.fds.len()))
            .collect();
        assert_eq!(seen, [(3, 0), (1, 0), (7, 1), (33, 2)]);
    }

    #[test]
    fn tb13_descriptors_beside_a_later_byte_are_closed_and_told() {
        let (peer, mut connection) = pair();
        let bytes = bytes(&Request::SetFeatures(1));
        let event = EventFd::new().unwrap();
        peer.send(&bytes[..HEADER_LEN], &[event.as_fd()]).unwrap();
        assert!(connection.receive().unwrap().is_none());
        peer.send(&bytes[HEADER_LEN..], &[event.as_fd()]).unwrap();
        let message = connection.receive().unwrap().unwrap();
        assert_eq!((message.fds.len(), message.misplaced), (0, true));
    }

    #[test]
    fn tb4_tb6_what_cannot_be_a_message_ends_the_connection() {
        let header = |flags: u32, size: u32| {
            [1, flags, size]
                .iter()
                .flat_map(|n| n.to_ne_bytes())
                .collect::<Vec<_>>()
        };
        let (peer, mut connection) = pair();
        peer.send(&header(2, 0), &[]).unwrap();
        assert!(matches!(
            connection.receive(),
            Err(SessionError::Version { flags: 2, .. })
        ));
        for size in [4097, u32::MAX] {
            let (peer, mut connection) = pair();
            peer.send(&header(1, size), &[]).unwrap();
            assert!(matches!(
                connection.receive(),
                Err(SessionError::TooLong { .. })
            ));
        }
        let (peer, mut connection) = pair();
        peer.send(&header(1 | 0xffff_fff0, 0), &[]).unwrap();
        assert!(
            connection.receive().unwrap().is_some(),
            "unknown flags are ignored"
        );
    }

    #[test]
    fn te7_a_peer_that_goes_away_in_the_middle_is_gone() {
        let (peer, mut connection) = pair();
        let event = EventFd::new().unwrap();
        peer.send(&bytes(&Request::SetLogFd)[..5], &[event.as_fd()])
            .unwrap();
        assert!(connection.receive().unwrap().is_none());
        drop(peer);
        assert!(matches!(
            connection.receive(),
            Err(SessionError::Disconnected)
        ));
        assert!(matches!(
            connection.send(vec![0], Vec::new()),
            Err(SessionError::Disconnected)
        ));
    }

    #[test]
    fn tb2_te10_half_a_message_has_a_deadline_and_silence_has_none() {
        let (peer, mut connection) = pair();
        for second in 0..100 {
            connection.check_progress(second * SECOND).unwrap();
        }
        peer.send(&[1], &[]).unwrap();
        assert!(connection.receive().unwrap().is_none());
        connection.check_progress(100 * SECOND).unwrap();
        connection.check_progress(104 * SECOND).unwrap();
        // A byte more is progress, and the count begins again.
        peer.send(&[0], &[]).unwrap();
        assert!(connection.receive().unwrap().is_none());
        connection.check_progress(106 * SECOND).unwrap();
        connection.check_progress(110 * SECOND).unwrap();
        assert!(matches!(
            connection.check_progress(111 * SECOND),
            Err(SessionError::HalfMessage { after: PATIENCE })
        ));
    }

    #[test]
    fn tb9_a_peer_that_does_not_read_is_given_up() {
        let (peer, mut connection) = pair();
        let error = (0..10_000)
            .find_map(|_| connection.send(vec![7; 4096], Vec::new()).err())
            .unwrap();
        assert!(matches!(error, SessionError::NotReading { queued } if queued > MAX_QUEUED_BYTES));
        assert!(connection.wants_write());

        // What was queued goes out in order once the peer reads.
        let (mut buffer, mut total) = ([0; 4096], 0);
        while let Ok(count) = peer.recv(&mut buffer, &mut Vec::new()) {
            assert!(buffer[..count].iter().all(|&byte| byte == 7));
            total += count;
            connection.flush().unwrap();
        }
        assert!(!connection.wants_write() && total % 4096 == 0);
    }

    #[test]
    fn tb9_a_peer_that_leaves_its_replies_is_given_up_after_a_while() {
        let (_peer, mut connection) = pair();
        while !connection.wants_write() {
            connection.send(vec![7; 4096], Vec::new()).unwrap();
        }
        connection.check_progress(0).unwrap();
        connection.check_progress(4 * SECOND).unwrap();
        assert!(matches!(
            connection.check_progress(5 * SECOND),
            Err(SessionError::NotReading { .. })
        ));
    }
}
