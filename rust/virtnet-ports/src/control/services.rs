//! What a control thread serves: its services, what each waits for, and how each fares.

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use virtnet_sys::{Interest, Poller};

use super::{BELL, REST, Service};
use crate::PortError;
use crate::slot::panic_message;

/// What the thread serves.
pub(super) struct Services {
    pub(super) poller: Poller,
    entries: BTreeMap<u64, Entry>,
    last_id: u64,
    pub(super) stopped: bool,
}

impl Services {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            poller: Poller::new()?,
            entries: BTreeMap::new(),
            last_id: BELL,
            stopped: false,
        })
    }

    pub(super) fn add(&mut self, service: Box<dyn Service>) -> Result<u64, PortError> {
        if self.stopped {
            return Err(PortError::Stopped);
        }
        let id = self.last_id + 1;
        let mut entry = Entry::new(service);
        entry.guarded(&self.poller, id, |_| Ok(()))?;
        self.last_id = id;
        self.entries.insert(id, entry);
        Ok(id)
    }

    pub(super) fn entry(&mut self, id: u64) -> Result<&mut Entry, PortError> {
        let missing = self.missing();
        self.entries.get_mut(&id).ok_or(missing)
    }

    /// Why an entry is not there.
    fn missing(&self) -> PortError {
        if self.stopped {
            PortError::Stopped
        } else {
            PortError::NoService
        }
    }

    pub(super) fn call<S: Service, R>(
        &mut self,
        id: u64,
        work: impl FnOnce(&mut S) -> R,
    ) -> Result<R, PortError> {
        let missing = self.missing();
        let entry = self.entries.get_mut(&id).ok_or(missing)?;
        entry.guarded(&self.poller, id, |service| {
            let service: &mut dyn Any = service;
            let service = service.downcast_mut().ok_or(PortError::NoService)?;
            Ok(work(service))
        })
    }

    pub(super) fn remove(&mut self, id: u64) -> Result<Removed, PortError> {
        let entry = self.entries.remove(&id);
        entry
            .map(|entry| Removed(entry.service))
            .ok_or_else(|| self.missing())
    }

    pub(super) fn on_ready(&mut self, id: u64, now_ns: u64) {
        // An earlier callback of the same round may have removed it.
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.run(&self.poller, id, now_ns, |service| service.on_ready(now_ns));
        }
    }

    pub(super) fn on_timers(&mut self, now_ns: u64) {
        for (&id, entry) in &mut self.entries {
            if entry.due_ns().is_none_or(|due| due > now_ns) {
                continue;
            }
            if entry.rest_until_ns.take().is_some() {
                entry.run(&self.poller, id, now_ns, |_| Ok(()));
            } else {
                entry.run(&self.poller, id, now_ns, |service| service.on_timer(now_ns));
            }
        }
    }

    pub(super) fn next_deadline_ns(&self) -> Option<u64> {
        self.entries.values().filter_map(Entry::due_ns).min()
    }

    pub(super) fn stop(&mut self) {
        self.stopped = true;
        for (_, entry) in std::mem::take(&mut self.entries) {
            // A service that panics on its way out has no one left to hurt.
            drop(catch_unwind(AssertUnwindSafe(move || drop(entry))));
        }
    }
}

/// A service on its way back to its owner.
pub(super) struct Removed(Box<dyn Service>);

impl Removed {
    pub(super) fn downcast<S: Service>(self) -> Result<Box<S>, PortError> {
        let service: Box<dyn Any> = self.0;
        service.downcast().map_err(|_| PortError::NoService)
    }
}

/// One service and how it fares.
pub(super) struct Entry {
    service: Box<dyn Service>,
    watch: Option<Watch>,
    /// When the service is served again after a failure.
    rest_until_ns: Option<u64>,
    /// The deadline, as the service last said.
    deadline_ns: Option<u64>,
    /// What the service's panic said; it is not called any more.
    panicked: Option<String>,
    pub(super) last_error: Option<Arc<PortError>>,
}

/// A service's descriptors, in a small poller of their own that is in the thread's.
///
/// A descriptor that is closed and one that is opened may have the same number, and a closed one may live on in a duplicate:
/// so a change gets a new poller, and nothing of the old one can be left behind.
struct Watch {
    poller: Poller,
    sources: Vec<(RawFd, Interest)>,
}

impl Entry {
    fn new(service: Box<dyn Service>) -> Self {
        Self {
            service,
            watch: None,
            rest_until_ns: None,
            deadline_ns: None,
            panicked: None,
            last_error: None,
        }
    }

    fn due_ns(&self) -> Option<u64> {
        self.rest_until_ns.or(self.deadline_ns)
    }

    /// A callback: its failure is kept, and the service rests.
    fn run(
        &mut self,
        outer: &Poller,
        id: u64,
        now_ns: u64,
        callback: impl FnOnce(&mut dyn Service) -> Result<(), PortError>,
    ) {
        if self.rest_until_ns.is_some() || self.panicked.is_some() {
            return;
        }
        let Err(error) = self.guarded(outer, id, callback) else {
            return;
        };
        if self.panicked.is_none() {
            self.last_error = Some(Arc::new(error));
            self.watch = None;
            let rest_ns = u64::try_from(REST.as_nanos()).unwrap_or(u64::MAX);
            self.rest_until_ns = Some(now_ns.saturating_add(rest_ns));
        }
    }

    /// Runs `work` on the service and looks at what it waits for afterwards. A panic is the end of the service.
    fn guarded<R>(
        &mut self,
        outer: &Poller,
        id: u64,
        work: impl FnOnce(&mut dyn Service) -> Result<R, PortError>,
    ) -> Result<R, PortError> {
        if let Some(message) = &self.panicked {
            let message = message.clone();
            return Err(PortError::ServicePanicked { message });
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let answer = work(&mut *self.service)?;
            self.deadline_ns = self.service.deadline_ns();
            if self.rest_until_ns.is_none() {
                let first = self.service.source();
                let mut sources = self.service.more_sources();
                sources.extend(first.map(|source| (source, self.service.interest())));
                let failed = |source| PortError::io("wait for a service's descriptor", source);
                update_watch(&mut self.watch, &sources, outer, id).map_err(failed)?;
            }
            Ok(answer)
        }));
        outcome.unwrap_or_else(|panic| {
            let message = panic_message(&*panic);
            self.panicked = Some(message.clone());
            (self.watch, self.deadline_ns, self.rest_until_ns) = (None, None, None);
            let error = || PortError::ServicePanicked {
                message: message.clone(),
            };
            self.last_error = Some(Arc::new(error()));
            Err(error())
        })
    }
}

fn update_watch(
    watch: &mut Option<Watch>,
    sources: &[(BorrowedFd<'_>, Interest)],
    outer: &Poller,
    id: u64,
) -> io::Result<()> {
    if sources.is_empty() {
        *watch = None;
        return Ok(());
    }
    let numbers = || {
        sources
            .iter()
            .map(|(source, interest)| (source.as_raw_fd(), *interest))
    };
    // The kernel knows whether these numbers still mean the files that are being waited for.
    if let Some(watch) = watch
        && watch.sources.iter().copied().eq(numbers())
        && sources
            .iter()
            .all(|(source, interest)| watch.poller.modify(source, 0, *interest).is_ok())
    {
        return Ok(());
    }
    *watch = None;
    let poller = Poller::new()?;
    for (source, interest) in sources {
        poller.add_with(source, 0, *interest)?;
    }
    outer.add(&poller, id)?;
    *watch = Some(Watch {
        poller,
        sources: numbers().collect(),
    });
    Ok(())
}
