//! What becomes of the interface: watched on the control thread, read by the workers.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtnet_sys::{LinkNews, LinkState, LinkWatch};

use crate::{EventLog, PortError, Service, What};

/// How the interface is, as the control thread has heard last.
#[derive(Debug)]
pub(super) struct Link {
    interface: String,
    native: bool,
    zero_copy: bool,
    up: AtomicBool,
    gone: AtomicBool,
    mtu: AtomicU32,
    pub(super) events: EventLog,
}

impl Link {
    pub(super) fn new(interface: &str, native: bool, zero_copy: bool) -> Self {
        Self {
            interface: interface.to_owned(),
            native,
            zero_copy,
            up: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            mtu: AtomicU32::new(0),
            events: EventLog::default(),
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// The largest payload of a frame.
    pub(super) fn mtu(&self) -> usize {
        self.mtu.load(Ordering::Relaxed) as usize
    }

    fn hear(&self, news: LinkNews) {
        let interface = || self.interface.clone();
        match news {
            LinkNews::State(LinkState { up, mtu }) => {
                self.mtu.store(mtu, Ordering::Relaxed);
                let before = self.up.swap(up, Ordering::Relaxed);
                if up && !before {
                    self.events.record(What::LinkUp {
                        interface: interface(),
                    });
                } else if before && !up {
                    self.events.record(What::LinkDown {
                        interface: interface(),
                    });
                }
            }
            LinkNews::Gone => {
                self.up.store(false, Ordering::Relaxed);
                if !self.gone.swap(true, Ordering::Relaxed) {
                    self.events.record(What::Removed {
                        interface: interface(),
                    });
                }
            }
        }
    }
}

/// Hears of changes.
#[derive(Debug)]
pub(super) struct LinkService {
    watch: LinkWatch,
    link: Arc<Link>,
}

impl LinkService {
    /// Hears how the interface is now.
    pub(super) fn new(watch: LinkWatch, link: Arc<Link>) -> Result<Self, PortError> {
        let mut service = Self { watch, link };
        service.on_ready(0)?;
        Ok(service)
    }
}

impl Service for LinkService {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        let gone = self.link.gone.load(Ordering::Relaxed);
        (!gone).then(|| self.watch.as_fd())
    }

    fn on_ready(&mut self, _now_ns: u64) -> Result<(), PortError> {
        let news = self.watch.news();
        let news = news.map_err(|source| PortError::io("hear of an interface", source))?;
        news.into_iter().for_each(|news| self.link.hear(news));
        Ok(())
    }
}

/// Asks how the interface of an AF_XDP port stands, wherever the port is and whether it is there or not.
#[derive(Clone, Debug)]
pub struct AfXdpWatch(Arc<Link>);

impl AfXdpWatch {
    pub(super) fn of(link: &Arc<Link>) -> Self {
        Self(Arc::clone(link))
    }

    /// Whether the interface is up, and so is the other end of its cable.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.is_up()
    }

    /// Whether the interface is gone for good.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.0.gone.load(Ordering::Relaxed)
    }

    /// The largest payload of a frame.
    #[must_use]
    pub fn mtu(&self) -> usize {
        self.0.mtu()
    }

    /// Where the program runs and whether the card shares our memory, in two words.
    #[must_use]
    pub fn how(&self) -> &'static str {
        match (self.0.native, self.0.zero_copy) {
            (true, true) => "native, zero-copy",
            (true, false) => "native, copy",
            (false, _) => "generic, copy",
        }
    }

    /// What has happened.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }
}
