//! An engine: workers on threads of their own, and the handle to them.
//!
//! The handle and a worker share a mailbox and nothing else. The worker looks at one flag per breath; if it is set, it
//! takes the commands out, carries each out whole between two breaths, and answers. So to each worker a change is one for all
//! packets at once, and every snapshot is consistent; several workers do it within a breath or two of each other. What a change
//! needs is made, and what it replaces is freed, on the caller's thread (see [`plan`](crate::plan)).
//!
//! A worker that panics has failed: its ports are closed, and every later call says why. A worker that does not answer in
//! time is an error as well, never a wait without end.

use std::any::Any;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use virtnet_sys::{Poller, monotonic_ns, pin_current_thread, thread_cpu_time};

use crate::EngineError;
use crate::change::{Change, Node};
use crate::graph::{Graph, NodeId};
use crate::passage::Bell;
use crate::plan::{Plan, Share};
use crate::sleep::{Bed, unwatch};
use crate::stats::{NetBalance, Snapshot};
use crate::worker::Worker;

/// How long a worker that finds nothing to do looks again before it sleeps.
const IDLE_NS: u64 = 75_000;

/// How many breaths a worker that is told to stop may still take: two rings of 1024.
const LAST_BREATHS: u32 = 64;

/// How long is waited for the answer to a command.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How long is waited for the worker to stop.
const STOP_WITHIN: Duration = Duration::from_secs(1);

/// When a worker polls and when it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Poll {
    /// Polls while packets flow and sleeps when there were none for a moment.
    #[default]
    Adaptive,
    /// Never sleeps: the least latency for a CPU of its own.
    Busy,
    /// Sleeps whenever there is nothing to do: the least CPU time.
    Interrupt,
}

/// How an engine runs.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Name of the engine and of its thread.
    pub name: String,
    /// A CPU for each worker, which stays there; empty: one worker, anywhere.
    pub cpus: Vec<usize>,
    /// When a worker polls and when it sleeps.
    pub poll: Poll,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            name: "virtnet".to_owned(),
            cpus: Vec::new(),
            poll: Poll::default(),
        }
    }
}

/// A change that is not possible, given back with the reason.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Rejected {
    /// Why.
    pub error: EngineError,
    /// The change, with the nodes it was to add; `None` if the worker has it.
    pub change: Option<Box<Change>>,
}

impl Rejected {
    pub(crate) fn new(error: EngineError, change: Change) -> Self {
        Self {
            error,
            change: Some(Box::new(change)),
        }
    }

    fn lost(error: EngineError) -> Self {
        Self {
            error,
            change: None,
        }
    }
}

/// What is left of an engine that was stopped.
#[derive(Debug)]
pub struct Remains {
    /// Its nodes, in order of their numbers.
    pub nodes: Vec<(NodeId, Node)>,
    /// All counters after the last breath.
    pub snapshot: Snapshot,
}

/// What a worker is asked to do between two breaths.
enum Command {
    Adopt(Box<Share>, SyncSender<Box<Share>>),
    Snapshot(SyncSender<Snapshot>),
    Stop(SyncSender<(Remains, Worker)>),
}

/// What the handle and the worker share beside the commands.
struct Mailbox {
    /// There are commands.
    flag: AtomicBool,
    /// Ends the worker's sleep.
    bell: Arc<Bell>,
    life: Mutex<Life>,
}

enum Life {
    Running,
    Stopped,
    /// It panicked, with this message.
    Failed(String),
}

/// A network that runs on threads of its own. Dropping it stops it.
pub struct Engine {
    name: String,
    seats: Vec<Seat>,
    control: Mutex<Control>,
}

/// A worker's, seen from the handle.
struct Seat {
    mailbox: Arc<Mailbox>,
    commands: Sender<Command>,
    /// What it sleeps on.
    poller: Arc<Poller>,
}

/// What changes are planned on.
#[derive(Default)]
struct Control {
    graph: Graph,
    threads: Vec<JoinHandle<()>>,
    /// The books of nodes that were removed.
    retired: NetBalance,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Engine({:?})", self.name)
    }
}

impl Engine {
    /// Starts an engine with an empty network.
    ///
    /// # Errors
    /// [`EngineError::Start`]: no such CPU, or the host is out of threads or descriptors.
    pub fn new(options: EngineOptions) -> Result<Self, EngineError> {
        let name = options.name.replace('\0', "");
        let start_error = |source| EngineError::Start {
            name: name.clone(),
            source,
        };
        let cpus: Vec<Option<usize>> = if options.cpus.is_empty() {
            vec![None]
        } else {
            options.cpus.iter().copied().map(Some).collect()
        };
        let bells = cpus.iter().map(|_| Bell::new().map(Arc::new));
        let bells = bells.collect::<Result<Vec<_>, _>>().map_err(start_error)?;
        // Stopped when it is dropped because one of its workers cannot start.
        let mut engine = Self {
            name: name.clone(),
            seats: Vec::new(),
            control: Mutex::default(),
        };
        let team = Worker::team(&bells);
        for (number, ((worker, bell), cpu)) in team.into_iter().zip(bells).zip(cpus).enumerate() {
            let thread_name = match number {
                0 => name.clone(),
                _ => format!("{name}-{number}"),
            };
            let (seat, thread) =
                Seat::start(thread_name, worker, bell, cpu, options.poll).map_err(start_error)?;
            engine.seats.push(seat);
            engine.control().threads.push(thread);
        }
        Ok(engine)
    }

    /// The engine's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many workers it has.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.seats.len()
    }

    /// The network as it is.
    #[must_use]
    pub fn graph(&self) -> Graph {
        self.control().graph.clone()
    }

    /// Why the worker has failed, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<EngineError> {
        let lives = self.seats.iter().map(|seat| lock(&seat.mailbox.life));
        lives.into_iter().find_map(|life| match &*life {
            Life::Failed(message) => Some(self.failed(message)),
            Life::Running | Life::Stopped => None,
        })
    }

    /// Makes a change true, whole or not at all, at one breath boundary of each worker. Gives back the nodes that were removed,
    /// which no worker touches any more.
    ///
    /// # Errors
    /// [`Rejected`], with the change, if it is not possible (the caller's fault) or the engine is stopped; without it if
    /// the worker has failed or does not answer.
    pub fn apply(&self, change: Change) -> Result<Vec<(NodeId, Node)>, Rejected> {
        let mut control = self.control();
        if let Some(error) = self.gone() {
            return Err(Rejected::new(error, change));
        }
        let plan = Plan::new(&control.graph, change)?;
        let next = plan.graph().clone();
        let mut shares = plan.spread(self.seats.len(), monotonic_ns()).into_iter();
        let answers = self
            .ask_all(|answer| Command::Adopt(Box::new(shares.next().unwrap_or_default()), answer))
            .map_err(Rejected::lost)?;
        // Commands are carried out in order: also one that is answered late comes before the next.
        control.graph = next;
        let adopted = self.wait_all(&answers, ANSWER_WITHIN);
        let adopted = adopted.map_err(Rejected::lost)?;
        let given_back = self.seats.iter().zip(adopted).map(|(seat, share)| {
            let ports = share.removed_ports();
            ports.for_each(|node| unwatch(&seat.poller, node));
            share.settle(&mut control.retired)
        });
        Ok(in_order(given_back))
    }

    /// Reads all counters, each worker's at one of its breath boundaries.
    ///
    /// # Errors
    /// [`EngineError::Stopped`], [`EngineError::Failed`], [`EngineError::Unresponsive`].
    pub fn snapshot(&self) -> Result<Snapshot, EngineError> {
        // Not while a change is half done: what it has removed is in nobody's books then.
        let control = self.control();
        let answers = self.ask_all(Command::Snapshot)?;
        let mut snapshot = Snapshot::of_team(self.wait_all(&answers, ANSWER_WITHIN)?);
        snapshot.balance.add(&control.retired);
        Ok(snapshot)
    }

    /// Stops the workers, each after the breath it is in, and gives back what there was.
    ///
    /// # Errors
    /// As [`Self::snapshot`]; the nodes are dropped then, by the worker if it ever answers again.
    pub fn stop(&self) -> Result<Remains, EngineError> {
        let mut control = self.control();
        let answers = self.ask_all(Command::Stop)?;
        let (remains, mut workers): (Vec<_>, Vec<_>) =
            self.wait_all(&answers, STOP_WITHIN)?.into_iter().unzip();
        control.graph = Graph::default();
        for thread in control.threads.drain(..) {
            // It has answered as the last thing it does.
            let _ = thread.join();
        }
        let (nodes, snapshots): (Vec<_>, Vec<_>) = remains
            .into_iter()
            .map(|Remains { nodes, snapshot }| (nodes, snapshot))
            .unzip();
        let mut snapshot = Snapshot::of_team(snapshots);
        snapshot.balance.add(&control.retired);
        // Nobody sends any more: what is between two workers now goes no further.
        let left: u64 = workers.iter_mut().map(Worker::left_behind).sum();
        snapshot.balance.taken_over += left;
        snapshot.balance.dropped += left;
        Ok(Remains {
            nodes: in_order(nodes),
            snapshot,
        })
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// Asks every worker, and gives where each is to answer.
    fn ask_all<T>(
        &self,
        mut command: impl FnMut(SyncSender<T>) -> Command,
    ) -> Result<Vec<Receiver<T>>, EngineError> {
        if let Some(error) = self.gone() {
            return Err(error);
        }
        let ask = |seat: &Seat| {
            let (answer, answered) = sync_channel(1);
            match seat.post(command(answer)) {
                true => Ok(answered),
                false => Err(self.why_gone()),
            }
        };
        self.seats.iter().map(ask).collect()
    }

    /// Everyone's answer.
    fn wait_all<T>(
        &self,
        answers: &[Receiver<T>],
        within: Duration,
    ) -> Result<Vec<T>, EngineError> {
        answers
            .iter()
            .map(|answered| self.wait(answered, within))
            .collect()
    }

    fn wait<T>(&self, answered: &Receiver<T>, within: Duration) -> Result<T, EngineError> {
        match answered.recv_timeout(within) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => Err(self.unresponsive(within)),
            Err(RecvTimeoutError::Disconnected) => Err(self.why_gone()),
        }
    }

    fn gone(&self) -> Option<EngineError> {
        self.seats
            .iter()
            .find_map(|seat| match &*lock(&seat.mailbox.life) {
                Life::Running => None,
                Life::Stopped => Some(EngineError::Stopped {
                    name: self.name.clone(),
                }),
                Life::Failed(message) => Some(self.failed(message)),
            })
    }

    /// Why the worker has let go of its mailbox. A panic takes a moment to be reported.
    fn why_gone(&self) -> EngineError {
        let start = Instant::now();
        loop {
            if let Some(error) = self.gone() {
                return error;
            }
            let waited = start.elapsed();
            if waited > STOP_WITHIN {
                return self.unresponsive(waited);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn failed(&self, message: &str) -> EngineError {
        EngineError::Failed {
            name: self.name.clone(),
            message: message.to_owned(),
        }
    }

    fn unresponsive(&self, waited: Duration) -> EngineError {
        EngineError::Unresponsive {
            name: self.name.clone(),
            waited,
        }
    }
}

impl Seat {
    /// Starts a worker's thread, and waits until it stays where it is to stay.
    fn start(
        name: String,
        worker: Worker,
        bell: Arc<Bell>,
        cpu: Option<usize>,
        poll: Poll,
    ) -> io::Result<(Self, JoinHandle<()>)> {
        let bed = Bed::new(&bell)?;
        let poller = bed.poller();
        let mailbox = Arc::new(Mailbox {
            flag: AtomicBool::new(false),
            bell,
            life: Mutex::new(Life::Running),
        });
        let (commands, inbox) = channel();
        let (started, start) = sync_channel(1);
        let body = {
            let mailbox = Arc::clone(&mailbox);
            move || {
                let pinned = cpu.map_or(Ok(()), |cpu| pin_current_thread(&[cpu]));
                let runs = pinned.is_ok();
                // The handle waits for this; if it is gone, so is the reason to run.
                if started.send(pinned).is_ok() && runs {
                    live(worker, &mailbox, inbox, bed, poll);
                }
            }
        };
        let thread = thread::Builder::new().name(name).spawn(body)?;
        let pinned = start
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread ended at once")));
        pinned?;
        let seat = Self {
            mailbox,
            commands,
            poller,
        };
        Ok((seat, thread))
    }

    /// Puts a command where the worker looks; whether it is there to look.
    fn post(&self, command: Command) -> bool {
        let there = self.commands.send(command).is_ok();
        if there {
            self.mailbox.flag.store(true, Ordering::Release);
            self.mailbox.bell.ring();
        }
        there
    }
}

/// What several workers give back, in order of the nodes' numbers.
fn in_order(given_back: impl IntoIterator<Item = Vec<(NodeId, Node)>>) -> Vec<(NodeId, Node)> {
    let mut all: Vec<_> = given_back.into_iter().flatten().collect();
    all.sort_by_key(|&(node, _)| node);
    all
}

impl Drop for Engine {
    fn drop(&mut self) {
        // An engine that is stopped, or has failed, has nothing to give back.
        let _ = self.stop();
    }
}

/// The worker's life, from its thread's start to its end, whichever way it ends.
fn live(mut worker: Worker, mailbox: &Mailbox, inbox: Receiver<Command>, bed: Bed, poll: Poll) {
    let end = catch_unwind(AssertUnwindSafe(|| {
        run(&mut worker, mailbox, &inbox, bed, poll);
    }));
    if let Err(panic) = end {
        *lock(&mailbox.life) = Life::Failed(message_of(&*panic));
        // Its ports are closed here. Whatever they do, the reason above stands.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(worker)));
    }
}

/// Breath after breath, until it is told to stop.
fn run(
    worker: &mut Worker,
    mailbox: &Mailbox,
    inbox: &Receiver<Command>,
    mut bed: Bed,
    poll: Poll,
) {
    let mut last_busy = monotonic_ns();
    let mut last_breath = last_busy;
    loop {
        if mailbox.flag.load(Ordering::Relaxed) && !serve(worker, mailbox, inbox, &mut bed) {
            return;
        }
        let now = monotonic_ns();
        worker.count_pause(now.saturating_sub(last_breath));
        last_breath = now;
        let moved = worker.step(now);
        if poll != Poll::Busy {
            bed.after_breath(worker, now);
        }
        if moved > 0 {
            last_busy = now;
            continue;
        }
        let rests = match poll {
            Poll::Busy => false,
            Poll::Adaptive => now.saturating_sub(last_busy) >= IDLE_NS,
            Poll::Interrupt => true,
        };
        if rests {
            let due = worker.due();
            bed.sleep(worker, now, due);
            last_breath = monotonic_ns();
        } else {
            std::hint::spin_loop();
        }
    }
}

/// Carries out the commands that have come. False: it was told to stop.
#[cold]
fn serve(worker: &mut Worker, mailbox: &Mailbox, inbox: &Receiver<Command>, bed: &mut Bed) -> bool {
    // Before the commands are taken out, so that one that comes now is seen next time.
    mailbox.flag.swap(false, Ordering::AcqRel);
    // An answer that nobody waits for any more is dropped, and what it gives back with it: then it is freed here.
    for command in inbox.try_iter() {
        match command {
            Command::Adopt(mut share, answer) => {
                worker.adopt(&mut share, monotonic_ns());
                if let Err(unanswered) = answer.send(share) {
                    drop(worker.settle(*unanswered.0));
                }
            }
            Command::Snapshot(answer) => {
                let _ = answer.send(snapshot(worker));
            }
            Command::Stop(answer) => {
                finish(worker, bed);
                worker
                    .ports_mut()
                    .for_each(|(_, node)| unwatch(&bed.poller(), node));
                worker.drop_kept();
                let snapshot = snapshot(worker);
                let nodes = worker.take_all();
                *lock(&mailbox.life) = Life::Stopped;
                let _ = answer.send((Remains { nodes, snapshot }, std::mem::take(worker)));
                return false;
            }
        }
    }
    true
}

/// Moves what had come before the stop, as far as [`LAST_BREATHS`] reach: what a peer has sent, and has counted as sent, is
/// received. One of a team leaves it in the rings, since those it hands packets to may have stopped.
fn finish(worker: &mut Worker, bed: &mut Bed) {
    if !worker.is_alone() {
        return;
    }
    bed.rouse_all(worker);
    for _ in 0..LAST_BREATHS {
        if worker.step(monotonic_ns()) == 0 {
            break;
        }
    }
}

fn snapshot(worker: &Worker) -> Snapshot {
    let mut snapshot = worker.snapshot(monotonic_ns());
    snapshot.worker.cpu_ns = u64::try_from(thread_cpu_time().as_nanos()).unwrap_or(u64::MAX);
    snapshot.workers = vec![snapshot.worker];
    snapshot
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "it did not say why".to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
