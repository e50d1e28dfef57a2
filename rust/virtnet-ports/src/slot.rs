//! The meeting place of a port's two halves: the control side, and the data half that one thread owns at a time.
//!
//! A port is a control half (sockets, sessions, timers: slow, on the control thread) and a data half (rings, memory: fast,
//! with whoever moves packets). The data half lives in a [`Slot`]. A worker takes it out as a [`Held`] and uses it without any
//! lock; the control side reaches it with [`Slot::run`], wherever it is: parked, the closure runs there and then; held, the
//! closure is queued, the slot's bell wakes the holder, and the holder runs it at its next [`Held::sync`].
//!
//! It guarantees that one thread touches the data at a time, that a closure runs once or not at all and its sender learns
//! which, whatever panics or is dropped, and that a holder with nothing to do for the control side pays one relaxed load.
//! It refuses to wait without end: [`DEADLINE`] is how long a holder may take to look.
//!
//! In a packet's way this is the step before a breath: [`Port::sync`](virtnet_packet::Port::sync) is [`Held::sync`].

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtnet_sys::{EventFd, Fault};

/// How long [`Slot::run`] waits for the holder to look at what is queued.
pub const DEADLINE: Duration = Duration::from_secs(1);

/// Why a closure did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// The holder did not look in time; the closure has been withdrawn and will not run.
    #[error(
        "the worker did not answer within {waited:?}; nothing was changed: it is stuck or starved of CPU"
    )]
    Late {
        /// How long was waited.
        waited: Duration,
    },
    /// The holder began the closure and did not finish in time; it may still.
    #[error("the worker began a change and did not finish it within {waited:?}")]
    Unfinished {
        /// How long was waited.
        waited: Duration,
    },
    /// The closure panicked. The data may be half changed: take the port out of service.
    #[error("a change of a port panicked, which is a defect of virtnet: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// The holder panicked and the data went with it.
    #[error("the worker that held the port has panicked, and the port's data went with it")]
    Lost,
}

impl SlotError {
    /// Whose fault it is: a starved machine's, or ours.
    #[must_use]
    pub fn fault(&self) -> Fault {
        Fault::Host
    }
}

type Job<D> = Box<dyn FnOnce(&mut D) + Send>;

/// Where the data is.
enum Place<D> {
    /// Here: nobody owns it.
    Parked(D),
    /// Out, in a [`Held`].
    Held,
    /// Gone with a holder that panicked.
    Lost,
}

/// What the mutex guards. Jobs are queued only while the data is held.
struct Inner<D> {
    place: Place<D>,
    jobs: VecDeque<(u64, Job<D>)>,
    next_id: u64,
}

/// Keeps data for whoever owns it next, and carries closures to whoever owns it now.
pub struct Slot<D> {
    inner: Mutex<Inner<D>>,
    /// True while the bell is readable: both change under the mutex only.
    pending: AtomicBool,
    bell: EventFd,
}

impl<D> fmt::Debug for Slot<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        let place = match inner.place {
            Place::Parked(_) => "parked",
            Place::Held => "held",
            Place::Lost => "lost",
        };
        write!(f, "Slot({place}, {} queued)", inner.jobs.len())
    }
}

impl<D: Send + 'static> Slot<D> {
    /// Parks `data` in a new slot.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(data: D) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            inner: Mutex::new(Inner {
                place: Place::Parked(data),
                jobs: VecDeque::new(),
                next_id: 0,
            }),
            pending: AtomicBool::new(false),
            bell: EventFd::new()?,
        }))
    }

    /// Runs `work` on the data, here if it is parked, otherwise on the holder's thread; its answer. Waits up to [`DEADLINE`].
    ///
    /// Not to be called from inside another closure of the same slot, nor by the holder itself.
    ///
    /// # Errors
    /// [`SlotError`]: whether the closure ran is in the variant.
    pub fn run<R, F>(&self, work: F) -> Result<R, SlotError>
    where
        R: Send + 'static,
        F: FnOnce(&mut D) -> R + Send + 'static,
    {
        self.run_within(DEADLINE, work)
    }

    /// [`run`](Self::run) with another deadline.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_within<R, F>(&self, deadline: Duration, work: F) -> Result<R, SlotError>
    where
        R: Send + 'static,
        F: FnOnce(&mut D) -> R + Send + 'static,
    {
        let (id, answer) = {
            let mut inner = self.lock();
            match &mut inner.place {
                Place::Parked(data) => return guarded(data, work),
                Place::Lost => return Err(SlotError::Lost),
                Place::Held => self.queue(&mut inner, work),
            }
        };
        match answer.recv_timeout(deadline) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Disconnected) => Err(SlotError::Lost),
            Err(RecvTimeoutError::Timeout) if self.withdraw(id) => {
                Err(SlotError::Late { waited: deadline })
            }
            // The holder has taken it out, so it is running or just done.
            Err(RecvTimeoutError::Timeout) => match answer.recv_timeout(deadline) {
                Ok(outcome) => outcome,
                Err(RecvTimeoutError::Disconnected) => Err(SlotError::Lost),
                Err(RecvTimeoutError::Timeout) => Err(SlotError::Unfinished {
                    waited: deadline * 2,
                }),
            },
        }
    }

    /// Runs `work` on the data without waiting: here if it is parked, otherwise at the holder's next look.
    ///
    /// For what may be late and has no answer; the holder itself may call it.
    ///
    /// # Errors
    /// [`SlotError::Lost`], and the panic of a closure that ran here.
    pub fn post<F>(&self, work: F) -> Result<(), SlotError>
    where
        F: FnOnce(&mut D) + Send + 'static,
    {
        let mut inner = self.lock();
        match &mut inner.place {
            Place::Parked(data) => guarded(data, work),
            Place::Lost => Err(SlotError::Lost),
            Place::Held => {
                self.queue(&mut inner, work);
                Ok(())
            }
        }
    }

    fn queue<R, F>(
        &self,
        inner: &mut Inner<D>,
        work: F,
    ) -> (u64, mpsc::Receiver<Result<R, SlotError>>)
    where
        R: Send + 'static,
        F: FnOnce(&mut D) -> R + Send + 'static,
    {
        let (sender, answer) = mpsc::sync_channel(1);
        let id = inner.next_id;
        inner.next_id += 1;
        let job = move |data: &mut D| {
            let outcome = guarded(data, work);
            // Nobody listens any more when the caller has given up; then nobody needs the answer.
            drop(sender.try_send(outcome));
        };
        inner.jobs.push_back((id, Box::new(job)));
        if !self.pending.swap(true, Ordering::Relaxed) {
            // Our own eventfd: it cannot refuse a signal.
            drop(self.bell.signal());
        }
        (id, answer)
    }

    fn withdraw(&self, id: u64) -> bool {
        // What a closure holds is dropped without the mutex.
        let withdrawn = {
            let jobs = &mut self.lock().jobs;
            let at = jobs.iter().position(|(queued, _)| *queued == id);
            at.and_then(|at| jobs.remove(at))
        };
        withdrawn.is_some()
    }

    /// Takes the data out to own it; `None` when somebody else holds it, or it was lost.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Held<D>> {
        let mut inner = self.lock();
        match std::mem::replace(&mut inner.place, Place::Held) {
            Place::Parked(data) => Some(Held {
                slot: Arc::clone(self),
                data: Some(data),
            }),
            other => {
                inner.place = other;
                None
            }
        }
    }

    /// The next job for the holder; without one, what was pending is over.
    fn next_job(&self) -> Option<Job<D>> {
        let mut inner = self.lock();
        let job = inner.jobs.pop_front().map(|(_, job)| job);
        if job.is_none() {
            self.settle();
        }
        job
    }

    /// Parks the data if nothing is queued; otherwise hands it back with the next job.
    fn park(&self, data: D) -> Option<(D, Job<D>)> {
        let mut inner = self.lock();
        if let Some((_, job)) = inner.jobs.pop_front() {
            return Some((data, job));
        }
        self.settle();
        inner.place = Place::Parked(data);
        None
    }

    /// Gives up the data. Dropping the queued jobs tells their senders.
    fn lose(&self) {
        let jobs = {
            let mut inner = self.lock();
            self.settle();
            inner.place = Place::Lost;
            std::mem::take(&mut inner.jobs)
        };
        drop(jobs);
    }

    /// Nothing is queued: quiets the bell. Called with the mutex locked.
    fn settle(&self) {
        if self.pending.swap(false, Ordering::Relaxed) {
            self.bell.drain();
        }
    }
}

impl<D> Slot<D> {
    fn lock(&self) -> MutexGuard<'_, Inner<D>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D> AsFd for Slot<D> {
    /// The bell: readable while closures wait for the holder. It belongs into the port's `wait_fd`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// The data of a [`Slot`], owned. Dropping it runs what is queued and parks the data again; dropping it in a panic loses it.
pub struct Held<D: Send + 'static> {
    slot: Arc<Slot<D>>,
    /// Empty only inside `drop`.
    data: Option<D>,
}

impl<D: Send + 'static> Held<D> {
    /// Runs what the control side has queued; whether there was anything. One relaxed load when there is not.
    #[inline]
    pub fn sync(&mut self) -> bool {
        self.has_pending() && self.run_queued()
    }

    /// Whether the control side has queued something: to be asked before sleeping.
    #[inline]
    #[must_use]
    pub fn has_pending(&self) -> bool {
        self.slot.pending.load(Ordering::Relaxed)
    }

    /// Gives the data back, after running what is queued. The same as dropping it.
    pub fn put_back(self) {}

    #[cold]
    fn run_queued(&mut self) -> bool {
        let mut any = false;
        while let Some(job) = self.slot.next_job() {
            job(self);
            any = true;
        }
        any
    }
}

impl<D: Send + 'static> Deref for Held<D> {
    type Target = D;

    #[inline]
    fn deref(&self) -> &D {
        match &self.data {
            Some(data) => data,
            None => unreachable!("held data is there until drop"),
        }
    }
}

impl<D: Send + 'static> DerefMut for Held<D> {
    #[inline]
    fn deref_mut(&mut self) -> &mut D {
        match &mut self.data {
            Some(data) => data,
            None => unreachable!("held data is there until drop"),
        }
    }
}

impl<D: Send + 'static> Drop for Held<D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.slot.lose();
            return;
        }
        let mut unparked = self.data.take();
        while let Some(data) = unparked {
            unparked = self.slot.park(data).map(|(mut data, job)| {
                job(&mut data);
                data
            });
        }
    }
}

impl<D: Send + fmt::Debug + 'static> fmt::Debug for Held<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.data).finish()
    }
}

/// Runs `work`; a panic of it becomes an error.
fn guarded<D, R>(data: &mut D, work: impl FnOnce(&mut D) -> R) -> Result<R, SlotError> {
    catch_unwind(AssertUnwindSafe(|| work(data))).map_err(|panic| SlotError::Panicked {
        message: panic_message(&*panic),
    })
}

/// What a panic said, where it said something.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests;
