//! What becomes of the interface: watched on the control thread, read by the workers.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtnet_sys::{LinkNews, LinkState, LinkWatch, TapQueue, in_network_namespace_of};

use crate::{Control, EventLog, PortError, Served, Service, What};

/// How the interface is, as the control thread has heard last.
#[derive(Debug)]
pub(crate) struct Link {
    interface: String,
    /// Of AF_XDP, where the program runs and whether the card shares our memory, in two words.
    how: Option<&'static str>,
    up: AtomicBool,
    gone: AtomicBool,
    mtu: AtomicU32,
    pub(crate) events: EventLog,
}

impl Link {
    pub(crate) fn new(interface: &str, how: Option<&'static str>) -> Self {
        Self {
            interface: interface.to_owned(),
            how,
            up: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            mtu: AtomicU32::new(0),
            events: EventLog::default(),
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// The largest payload of a frame.
    pub(crate) fn mtu(&self) -> usize {
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
pub(crate) struct LinkService {
    watch: LinkWatch,
    link: Arc<Link>,
    /// Of a tap, which can go to another network namespace and work on.
    queue: Option<TapQueue>,
}

impl LinkService {
    /// Hears how the interface is now.
    pub(crate) fn new(watch: LinkWatch, link: Arc<Link>) -> Result<Self, PortError> {
        let mut service = Self {
            watch,
            link,
            queue: None,
        };
        service.on_ready(0)?;
        Ok(service)
    }
}

impl LinkService {
    /// Watches the interface where it has gone to, if it is a tap that lives on there.
    fn elsewhere(&self) -> Option<LinkWatch> {
        let namespace = self.queue.as_ref()?.namespace().ok()?;
        let name = self.link.interface.as_str();
        let watch =
            in_network_namespace_of(namespace.as_fd(), "of a tap", || LinkWatch::open(name));
        watch.ok()?.ok()
    }
}

impl Service for LinkService {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        let gone = self.link.gone.load(Ordering::Relaxed);
        (!gone).then(|| self.watch.as_fd())
    }

    fn on_ready(&mut self, _now_ns: u64) -> Result<(), PortError> {
        let failed = |source| PortError::io("hear of an interface", source);
        for news in self.watch.news().map_err(failed)? {
            if news == LinkNews::Gone
                && let Some(watch) = self.elsewhere()
            {
                self.watch = watch;
                // How it is there is the first news.
                for news in self.watch.news().map_err(failed)? {
                    self.link.hear(news);
                }
                break;
            }
            self.link.hear(news);
        }
        Ok(())
    }
}

/// Hears of an interface as long as it is held; a copy hears of the same.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    link: Arc<Link>,
    _served: Arc<Served<LinkService>>,
}

impl Watched {
    /// Begins to watch the interface `name` of the network namespace that the calling thread is in.
    ///
    /// A tap, of which `queue` is one, is followed when it is moved to another namespace.
    pub(crate) fn interface(
        name: &str,
        queue: Option<TapQueue>,
        control: &Control,
    ) -> Result<Self, PortError> {
        let link = Arc::new(Link::new(name, None));
        let mut service = LinkService::new(LinkWatch::open(name)?, Arc::clone(&link))?;
        service.queue = queue;
        Ok(Self {
            link,
            _served: Arc::new(control.add(service)?),
        })
    }

    pub(crate) fn watch(&self) -> InterfaceWatch {
        InterfaceWatch::of(&self.link)
    }
}

/// Asks how the interface of a port stands, wherever the port is and whether it is there or not.
#[derive(Clone, Debug)]
pub struct InterfaceWatch(Arc<Link>);

impl InterfaceWatch {
    pub(crate) fn of(link: &Arc<Link>) -> Self {
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

    /// Of an AF_XDP port, where the program runs and whether the card shares our memory, in two words.
    #[must_use]
    pub fn how(&self) -> Option<&'static str> {
        self.0.how
    }

    /// What has happened.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }
}
