//! Waiting for many descriptors at once: epoll, level-triggered unless a peer could abuse that.
//!
//! A [`Poller`] is a descriptor itself and readable when anything in it is, so that one can be waited for inside
//! another: a port brings its own and the worker adds that one. A token is any number the caller likes; it comes back
//! with each event.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

/// Waits until a single descriptor can be read, or has been hung up on; whether that happened in time.
///
/// # Errors
/// The system's; a signal counts as the end of the time.
pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(timeout).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    });
    match poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&timeout),
    ) {
        Ok(n) => Ok(n > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// What a descriptor is waited for; a hang-up is always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Interest {
    /// Something can be read.
    Readable,
    /// Something can be written.
    Writable,
    /// Either.
    Both,
    /// Nothing but a hang-up.
    Neither,
}

impl Interest {
    /// What a connection is waited for: to read from it, and to write to it where something waits to be sent.
    #[must_use]
    pub fn of(wants_write: bool) -> Self {
        if wants_write {
            Self::Both
        } else {
            Self::Readable
        }
    }

    fn flags(self) -> EventFlags {
        match self {
            Self::Readable => EventFlags::IN,
            Self::Writable => EventFlags::OUT,
            Self::Both => EventFlags::IN | EventFlags::OUT,
            Self::Neither => EventFlags::empty(),
        }
    }
}

/// A set of descriptors that are waited for together.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// Makes an empty set.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    /// Adds a descriptor that is waited for until it is readable.
    ///
    /// # Errors
    /// The descriptor is in the set already, or is of a kind that cannot be waited for (a regular file).
    pub fn add(&self, source: impl AsFd, token: u64) -> io::Result<()> {
        self.add_with(source, token, Interest::Readable)
    }

    /// Adds a descriptor with the given interest.
    ///
    /// # Errors
    /// As [`Poller::add`].
    pub fn add_with(&self, source: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            source,
            EventData::new_u64(token),
            interest.flags(),
        )?)
    }

    /// Adds a descriptor that is reported once each time it is signalled, not for as long as it is readable: whoever can
    /// leave it readable for ever is heard once.
    ///
    /// # Errors
    /// As [`Poller::add`].
    pub fn add_edge(&self, source: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            source,
            EventData::new_u64(token),
            EventFlags::IN | EventFlags::ET,
        )?)
    }

    /// Changes token and interest of a descriptor in the set.
    ///
    /// # Errors
    /// The descriptor is not in the set.
    pub fn modify(&self, source: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(
            &self.epoll,
            source,
            EventData::new_u64(token),
            interest.flags(),
        )?)
    }

    /// Waits for a descriptor to be readable, once: after its event it is not waited for until this is said again. It may be in
    /// the set already, with whatever interest.
    ///
    /// # Errors
    /// The descriptor is of a kind that cannot be waited for.
    pub fn wait_once(&self, source: impl AsFd, token: u64) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::ONESHOT;
        let data = EventData::new_u64(token);
        // A descriptor that was closed has left the set by itself, and its number may be another one's now.
        epoll::modify(&self.epoll, &source, data, flags)
            .or_else(|_| epoll::add(&self.epoll, &source, data, flags))?;
        Ok(())
    }

    /// Takes a descriptor out of the set; do so before closing it if a duplicate of it may exist elsewhere.
    ///
    /// # Errors
    /// The descriptor is not in the set.
    pub fn remove(&self, source: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, source)?)
    }

    /// Waits until something happens or the time is over, and returns how many events there are.
    ///
    /// `None` waits without end. A signal ends the wait early with no events, so that a caller can look at what the
    /// signal meant.
    ///
    /// # Errors
    /// None in practice: the set is a valid one.
    pub fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> io::Result<usize> {
        events.list.clear();
        let timeout = timeout.map(timespec);
        match epoll::wait(
            &self.epoll,
            spare_capacity(&mut events.list),
            timeout.as_ref(),
        ) {
            Ok(count) => Ok(count),
            Err(Errno::INTR) => Ok(0),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Room for the events of one wait; made once, used again and again.
pub struct Events {
    list: Vec<epoll::Event>,
}

// SAFETY: the kernel's event could carry a pointer; ours carry plain numbers, and nothing here ever reads the pointer.
unsafe impl Send for Events {}
// SAFETY: as above.
unsafe impl Sync for Events {}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Events {
    /// Makes room for at most `capacity` events a wait, at least one.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            list: Vec::with_capacity(capacity.max(1)),
        }
    }

    /// How many events the last wait had.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether the last wait had none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The token of an event of the last wait.
    ///
    /// # Panics
    /// When there are not as many.
    #[must_use]
    pub fn token(&self, at: usize) -> u64 {
        self.list[at].data.u64()
    }

    /// Walks the events of the last wait.
    pub fn iter(&self) -> impl Iterator<Item = Event> + '_ {
        self.list.iter().map(|event| {
            let flags = event.flags;
            Event {
                token: event.data.u64(),
                readable: flags.intersects(EventFlags::IN),
                writable: flags.intersects(EventFlags::OUT),
                hangup: flags.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP),
            }
        })
    }
}

/// One descriptor that something happened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The number given when the descriptor was added.
    pub token: u64,
    /// There is something to read.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The other end is gone, or the descriptor has an error.
    pub hangup: bool,
}

/// The kernel's form of a duration; one beyond its range waits as long as it can.
fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use rustix::pipe::pipe;

    use super::*;
    use crate::EventFd;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    fn poll_now(poller: &Poller) -> Vec<Event> {
        let mut events = Events::with_capacity(8);
        poller.wait(&mut events, NOW).unwrap();
        events.iter().collect()
    }

    #[test]
    fn a_readable_descriptor_comes_back_with_its_token() {
        let (poller, event) = (Poller::new().unwrap(), EventFd::new().unwrap());
        poller.add(&event, 7).unwrap();
        assert_eq!(poll_now(&poller), []);
        event.signal().unwrap();
        assert_eq!(
            poll_now(&poller),
            [Event {
                token: 7,
                readable: true,
                writable: false,
                hangup: false
            }]
        );
        event.drain();
        assert_eq!(poll_now(&poller), []);
    }

    #[test]
    fn interest_can_be_changed_and_withdrawn() {
        let (poller, event) = (Poller::new().unwrap(), EventFd::new().unwrap());
        event.signal().unwrap();
        poller.add_with(&event, 1, Interest::Neither).unwrap();
        assert_eq!(poll_now(&poller), []);
        poller.modify(&event, 2, Interest::Both).unwrap();
        assert_eq!(
            poll_now(&poller),
            [Event {
                token: 2,
                readable: true,
                writable: true,
                hangup: false
            }]
        );
        poller.remove(&event).unwrap();
        assert_eq!(poll_now(&poller), []);
        poller.remove(&event).unwrap_err();
    }

    #[test]
    fn a_nested_poller_is_readable_when_its_content_is() {
        let (outer, inner, event) = (
            Poller::new().unwrap(),
            Poller::new().unwrap(),
            EventFd::new().unwrap(),
        );
        inner.add(&event, 1).unwrap();
        outer.add(&inner, 2).unwrap();
        assert_eq!(poll_now(&outer), []);
        event.signal().unwrap();
        assert_eq!(poll_now(&outer)[0].token, 2);
        assert_eq!(poll_now(&inner)[0].token, 1);
        event.drain();
        assert_eq!(poll_now(&outer), []);
    }

    #[test]
    fn an_edge_is_heard_once_however_long_it_stays() {
        let (outer, inner, event) = (
            Poller::new().unwrap(),
            Poller::new().unwrap(),
            EventFd::new().unwrap(),
        );
        event.signal().unwrap();
        inner.add_edge(&event, 1).unwrap();
        outer.add(&inner, 2).unwrap();
        // Also one from before it was added, and every one after it.
        for _ in 0..3 {
            assert_eq!(poll_now(&outer).len(), 1);
            assert_eq!(poll_now(&outer).len(), 1, "the inner one was not asked");
            assert_eq!(poll_now(&inner).len(), 1);
            assert_eq!(poll_now(&outer), [], "it is still readable");
            event.signal().unwrap();
        }
        let (reader, writer) = pipe().unwrap();
        drop(writer);
        inner.add_edge(&reader, 3).unwrap();
        poll_now(&inner);
        assert_eq!(poll_now(&outer), [], "its far end is still away");
    }

    #[test]
    fn what_is_waited_for_once_is_told_once() {
        let (poller, event) = (Poller::new().unwrap(), EventFd::new().unwrap());
        for round in 0..3 {
            poller.wait_once(&event, round).unwrap();
            assert_eq!(poll_now(&poller), []);
            event.signal().unwrap();
            assert_eq!(poll_now(&poller)[0].token, round);
            assert_eq!(poll_now(&poller), [], "it is still readable");
            poller.wait_once(&event, round).unwrap();
            assert_eq!(poll_now(&poller).len(), 1, "it was readable before");
            event.drain();
        }
    }

    #[test]
    fn the_far_end_going_away_is_a_hangup() {
        let poller = Poller::new().unwrap();
        let (reader, writer) = pipe().unwrap();
        poller.add(&reader, 3).unwrap();
        drop(writer);
        assert!(poll_now(&poller)[0].hangup);
    }

    #[test]
    fn a_wait_ends_when_the_time_is_over() {
        let poller = Poller::new().unwrap();
        let start = std::time::Instant::now();
        assert_eq!(
            poller
                .wait(
                    &mut Events::with_capacity(0),
                    Some(Duration::from_millis(15))
                )
                .unwrap(),
            0
        );
        let waited = start.elapsed();
        assert!(
            waited >= Duration::from_millis(14) && waited < Duration::from_secs(2),
            "{waited:?}"
        );
    }
}
