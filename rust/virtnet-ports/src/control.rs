//! The control thread: one thread that serves every socket and timer of a network's ports.
//!
//! What it serves is a [`Service`]: something with a descriptor to wait for and perhaps a deadline. [`Control::add`] puts a
//! service on the thread and gives a [`Served`], through which [`Served::call`] reaches it and [`Served::remove`] takes it back;
//! dropping the `Served` removes it too.
//!
//! It guarantees that a service never takes the thread down: one that fails rests for [`REST`] and is tried again, one that
//! panics is never called again, and both keep their last error. Without events the thread sleeps. It refuses to be waited for
//! from itself. There may be any number of control threads; they share nothing.
//!
//! In a packet's way there is no control thread: it changes the data halves of ports through their [`Slot`].

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use virtnet_sys::{Events, Interest, Poller, monotonic_ns};

use crate::PortError;
use crate::slot::{Held, Slot, SlotError, panic_message};

/// How long a service that failed is left alone before it is served again.
pub const REST: Duration = Duration::from_millis(100);

/// How long a caller waits for the control thread, which may itself be waiting for a worker.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// How long stopping waits for the callback that is running.
const STOP_DEADLINE: Duration = Duration::from_secs(1);

/// The bell of the thread's own slot; services count from one.
const BELL: u64 = 0;

/// Something that waits for a descriptor or a moment, on a [`Control`] thread. Callbacks must not block.
pub trait Service: Any + Send {
    /// The descriptor to wait for now: asked again after every callback and call, and free to change. `None` waits for nothing.
    fn source(&self) -> Option<BorrowedFd<'_>>;

    /// What the descriptor is waited for; a hang-up always counts.
    fn interest(&self) -> Interest {
        Interest::Readable
    }

    /// The descriptor is ready. It may turn out not to be: a socket that would block is nothing to complain about.
    ///
    /// # Errors
    /// Whatever keeps the service from going on now; it is served again after [`REST`].
    fn on_ready(&mut self, now_ns: u64) -> Result<(), PortError>;

    /// The moment, as [`monotonic_ns`] counts, to call [`on_timer`](Self::on_timer).
    fn deadline_ns(&self) -> Option<u64> {
        None
    }

    /// The deadline is over; a new one has to be set, or none.
    ///
    /// # Errors
    /// As [`on_ready`](Self::on_ready).
    fn on_timer(&mut self, now_ns: u64) -> Result<(), PortError> {
        let _ = now_ns;
        Ok(())
    }
}

/// A control thread. Dropping it stops it and drops its services.
pub struct Control {
    shared: Arc<Shared>,
    /// Taken by whoever stops the thread.
    running: Mutex<Option<Running>>,
}

/// What a [`Control`] and its [`Served`] have in common.
struct Shared {
    slot: Arc<Slot<Services>>,
    thread: ThreadId,
}

struct Running {
    handle: JoinHandle<()>,
    /// Disconnected when the thread is through.
    done: Receiver<()>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Control({:?})", self.shared.slot)
    }
}

impl Control {
    /// Starts a control thread; `name` is what the thread is called.
    ///
    /// # Errors
    /// The process is out of descriptors or threads.
    pub fn start(name: &str) -> Result<Self, PortError> {
        let failed = |source| PortError::io(format!("start control thread {name}"), source);
        let slot = Slot::new(Services::new().map_err(failed)?).map_err(failed)?;
        slot.run({
            let bell = Arc::clone(&slot);
            move |services| services.poller.add(&*bell, BELL)
        })?
        .map_err(failed)?;
        let held = slot.take().ok_or(PortError::Stopped)?;
        let (finished, done) = mpsc::channel::<()>();
        let handle = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                serve(held);
                drop(finished);
            })
            .map_err(failed)?;
        let thread = handle.thread().id();
        Ok(Self {
            shared: Arc::new(Shared { slot, thread }),
            running: Mutex::new(Some(Running { handle, done })),
        })
    }

    /// Puts a service on the thread; it is being waited for when this returns.
    ///
    /// # Errors
    /// [`PortError::Stopped`]; [`PortError::WouldDeadlock`] from a service; the descriptor cannot be waited for.
    pub fn add<S: Service>(&self, service: S) -> Result<Served<S>, PortError> {
        let id = self
            .shared
            .run(move |services| services.add(Box::new(service)))??;
        Ok(Served {
            shared: Arc::clone(&self.shared),
            id: Some(id),
            service: PhantomData,
        })
    }

    /// Stops the thread after the callback that is running, and drops its services. Waits for at most one second.
    pub fn stop(&self) {
        let running = self
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(running) = running else { return };
        // The only refusal is that the thread is gone.
        drop(self.shared.slot.post(|services| services.stopped = true));
        if self.shared.is_current() {
            return;
        }
        match running.done.recv_timeout(STOP_DEADLINE) {
            // Still inside a callback: it stops when that returns, and nobody waits for it.
            Err(RecvTimeoutError::Timeout) => {}
            // A panic of the thread has been told to everyone who called it.
            _ => drop(running.handle.join()),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn is_current(&self) -> bool {
        thread::current().id() == self.thread
    }

    fn run<R, F>(&self, work: F) -> Result<R, PortError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Services) -> R + Send + 'static,
    {
        if self.is_current() {
            return Err(PortError::WouldDeadlock);
        }
        self.slot
            .run_within(CALL_DEADLINE, work)
            .map_err(|error| match error {
                SlotError::Lost => PortError::Stopped,
                error => error.into(),
            })
    }
}

/// A service on a control thread. Dropping it removes the service.
pub struct Served<S> {
    shared: Arc<Shared>,
    /// Empty once removed.
    id: Option<u64>,
    service: PhantomData<fn() -> S>,
}

impl<S> fmt::Debug for Served<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Served({})", std::any::type_name::<S>())
    }
}

impl<S: Service> Served<S> {
    /// Runs `work` on the service, on the control thread, between its callbacks; its answer.
    ///
    /// # Errors
    /// [`PortError::Stopped`], [`PortError::WouldDeadlock`] from a service, [`PortError::ServicePanicked`] now or before, and
    /// [`PortError::Slot`] when the thread does not answer.
    pub fn call<R, F>(&self, work: F) -> Result<R, PortError>
    where
        R: Send + 'static,
        F: FnOnce(&mut S) -> R + Send + 'static,
    {
        let id = self.id.ok_or(PortError::NoService)?;
        self.shared.run(move |services| services.call(id, work))?
    }

    /// The last error of the service, if it ever failed.
    ///
    /// # Errors
    /// As [`call`](Self::call), except that a service that panicked still answers.
    pub fn last_error(&self) -> Result<Option<Arc<PortError>>, PortError> {
        let id = self.id.ok_or(PortError::NoService)?;
        self.shared
            .run(move |services| Ok(services.entry(id)?.last_error.clone()))?
    }

    /// Takes the service off the thread and hands it back; none of its callbacks runs any more when this returns.
    ///
    /// # Errors
    /// As [`call`](Self::call), except that a service that panicked can be removed too.
    pub fn remove(mut self) -> Result<S, PortError> {
        let id = self.id.take().ok_or(PortError::NoService)?;
        self.shared
            .run(move |services| services.remove(id)?.downcast().map(|service| *service))?
    }
}

impl<S> Drop for Served<S> {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else { return };
        let remove = move |services: &mut Services| drop(services.remove(id));
        // Waiting means that what the service holds (a socket's path) is free again; a service can only ask.
        let gone = if self.shared.is_current() {
            self.shared.slot.post(remove).map_err(PortError::from)
        } else {
            self.shared.run(remove)
        };
        // A thread that does not answer has the request queued or is gone with all its services.
        drop(gone);
    }
}

/// The thread's loop.
fn serve(mut services: Held<Services>) {
    let mut events = Events::with_capacity(16);
    loop {
        services.sync();
        if services.stopped {
            break;
        }
        let timeout = services
            .next_deadline_ns()
            .map(|at| Duration::from_nanos(at.saturating_sub(monotonic_ns())));
        if services.poller.wait(&mut events, timeout).is_err() {
            break;
        }
        let now_ns = monotonic_ns();
        for event in events.iter().filter(|event| event.token != BELL) {
            services.on_ready(event.token, now_ns);
        }
        services.on_timers(now_ns);
    }
    services.stop();
}

/// What the thread serves.
struct Services {
    poller: Poller,
    entries: BTreeMap<u64, Entry>,
    last_id: u64,
    stopped: bool,
}

impl Services {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            poller: Poller::new()?,
            entries: BTreeMap::new(),
            last_id: BELL,
            stopped: false,
        })
    }

    fn add(&mut self, service: Box<dyn Service>) -> Result<u64, PortError> {
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

    fn entry(&mut self, id: u64) -> Result<&mut Entry, PortError> {
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

    fn call<S: Service, R>(
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

    fn remove(&mut self, id: u64) -> Result<Removed, PortError> {
        let entry = self.entries.remove(&id);
        entry
            .map(|entry| Removed(entry.service))
            .ok_or_else(|| self.missing())
    }

    fn on_ready(&mut self, id: u64, now_ns: u64) {
        // An earlier callback of the same round may have removed it.
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.run(&self.poller, id, now_ns, |service| service.on_ready(now_ns));
        }
    }

    fn on_timers(&mut self, now_ns: u64) {
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

    fn next_deadline_ns(&self) -> Option<u64> {
        self.entries.values().filter_map(Entry::due_ns).min()
    }

    fn stop(&mut self) {
        self.stopped = true;
        for (_, entry) in std::mem::take(&mut self.entries) {
            // A service that panics on its way out has no one left to hurt.
            drop(catch_unwind(AssertUnwindSafe(move || drop(entry))));
        }
    }
}

/// A service on its way back to its owner.
struct Removed(Box<dyn Service>);

impl Removed {
    fn downcast<S: Service>(self) -> Result<Box<S>, PortError> {
        let service: Box<dyn Any> = self.0;
        service.downcast().map_err(|_| PortError::NoService)
    }
}

/// One service and how it fares.
struct Entry {
    service: Box<dyn Service>,
    watch: Option<Watch>,
    /// When the service is served again after a failure.
    rest_until_ns: Option<u64>,
    /// The deadline, as the service last said.
    deadline_ns: Option<u64>,
    /// What the service's panic said; it is not called any more.
    panicked: Option<String>,
    last_error: Option<Arc<PortError>>,
}

/// A service's descriptor, alone in a small poller that is in the thread's.
///
/// A descriptor that is closed and one that is opened may have the same number, and a closed one may live on in a duplicate:
/// so a change gets a new poller, and nothing of the old one can be left behind.
struct Watch {
    poller: Poller,
    number: RawFd,
    interest: Interest,
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
                let interest = self.service.interest();
                let failed = |source| PortError::io("wait for a service's descriptor", source);
                update_watch(&mut self.watch, self.service.source(), interest, outer, id)
                    .map_err(failed)?;
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
    source: Option<BorrowedFd<'_>>,
    interest: Interest,
    outer: &Poller,
    id: u64,
) -> std::io::Result<()> {
    let Some(source) = source else {
        *watch = None;
        return Ok(());
    };
    let number = source.as_raw_fd();
    // The kernel knows whether this number still means the file that is being waited for.
    if let Some(watch) = watch
        && (watch.number, watch.interest) == (number, interest)
        && watch.poller.modify(source, 0, interest).is_ok()
    {
        return Ok(());
    }
    *watch = None;
    let poller = Poller::new()?;
    poller.add_with(source, 0, interest)?;
    outer.add(&poller, id)?;
    *watch = Some(Watch {
        poller,
        number,
        interest,
    });
    Ok(())
}

#[cfg(test)]
mod tests;
