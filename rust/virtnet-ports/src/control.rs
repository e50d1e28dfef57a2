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

mod services;

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use virtnet_sys::{Events, Interest, monotonic_ns};

use crate::PortError;
use crate::slot::{Held, Slot, SlotError};
use services::Services;

/// How long a service that failed is left alone before it is served again.
pub const REST: Duration = Duration::from_millis(100);

/// How long a caller waits for the control thread, which may itself be waiting for a worker.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// How long stopping waits for the callback that is running.
const STOP_DEADLINE: Duration = Duration::from_secs(1);

/// How often a connection is asked whether it stands still.
const TICK_NS: u64 = 1_000_000_000;

/// When that is next: in a second at the latest, and at the same moment for all, so that the ports of an idle network wake their
/// thread once.
pub(crate) fn next_tick_ns(now_ns: u64) -> u64 {
    (now_ns / TICK_NS + 1) * TICK_NS
}

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

    /// Further descriptors to wait for, with what each is waited for, as [`source`](Self::source).
    fn more_sources(&self) -> Vec<(BorrowedFd<'_>, Interest)> {
        Vec::new()
    }

    /// A descriptor is ready. It may turn out not to be: a socket that would block is nothing to complain about.
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

    /// Runs `work` on many services of one thread in one visit; their answers, in order.
    ///
    /// # Errors
    /// As [`call`](Self::call), each for itself; [`PortError::NoService`] for a service of another thread than the first one's.
    pub fn call_all<R, F>(served: &[Arc<Self>], work: F) -> Vec<Result<R, PortError>>
    where
        R: Send + 'static,
        F: Fn(&mut S) -> R + Send + 'static,
    {
        let Some(first) = served.first() else {
            return Vec::new();
        };
        let ids: Vec<_> = served
            .iter()
            .map(|one| one.id.filter(|_| Arc::ptr_eq(&one.shared, &first.shared)))
            .collect();
        let answers = first.shared.run(move |services| {
            let ask = |id: Option<u64>| services.call(id.ok_or(PortError::NoService)?, &work);
            ids.into_iter().map(ask).collect()
        });
        answers.unwrap_or_else(|_| served.iter().map(|_| Err(PortError::Stopped)).collect())
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

#[cfg(test)]
mod tests;
