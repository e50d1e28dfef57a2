//! Ports used by hand: what `virtnet.Port` stands on.
//!
//! A port here has no worker; the calling thread plays its part for the length of one call, with the interpreter detached.
//! A wait comes back to Python at least every [`SLICE`], so that Ctrl-C is answered.
//!
//! A second thread that calls the same port waits for the first. Closing does not wait for a port in `rx`: that gives up
//! when it next looks.

use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use virtnet_packet::{
    Backlog, Burst, MemoryPort, Picks, PortCounters, memory_pair as packet_memory_pair,
};
use virtnet_ports::{Control, wait_readable};
use virtnet_virtio::net::control::Command;

use crate::commands;
use crate::errors::{StateError, port_error};
use crate::open::{Opened, Owner, Watch, open};
use crate::packets::{Packets, Taken};
use crate::{history, stats};

/// The longest time that is waited without looking whether Ctrl-C was pressed.
const SLICE: Duration = Duration::from_millis(100);

/// A port that wakes nobody is looked at this often, at first and when nothing comes.
const NAP_MIN: Duration = Duration::from_micros(20);
const NAP_MAX: Duration = Duration::from_millis(2);

/// Two ports back to back.
#[pyfunction]
pub(crate) fn memory_pair(capacity: usize) -> (Port, Port) {
    let (left, right) = packet_memory_pair(capacity);
    let port = |port: MemoryPort| {
        let backlog = Some(port.backlog());
        Port {
            backlog,
            ..Port::new("memory", Box::new(port), Watch::Always, None)
        }
    };
    (port(left), port(right))
}

/// One port, used by hand.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct Port {
    kind: String,
    hand: Mutex<Hand>,
    watch: Watch,
    closed: AtomicBool,
    /// What a memory port has not taken yet.
    backlog: Option<Backlog>,
}

/// The port itself, the burst that it fills, and what was taken beyond what was asked for; without a port after closing.
#[derive(Debug)]
struct Hand {
    port: Option<Box<dyn virtnet_packet::Port>>,
    burst: Burst,
    rest: Taken,
    /// How much was taken at once the last time.
    usual: (usize, usize),
    last: PortCounters,
    /// Serves the port's socket; it goes after the port.
    control: Option<Control>,
}

#[pymethods]
impl Port {
    #[new]
    fn open(
        py: Python<'_>,
        kind: &str,
        r#where: &str,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        let options = options.copy()?;
        options.set_item("where", r#where)?;
        let control = py
            .detach(|| Control::start("virtnet-port"))
            .map_err(port_error)?;
        let Opened { mut lanes, watch } = open(kind, &options, Owner::Hands, &control)?;
        let port = lanes
            .pop()
            .ok_or_else(|| port_error(virtnet_ports::PortError::NoService))?;
        Ok(Self::new(kind, port, watch, Some(control)))
    }

    fn rx(&self, py: Python<'_>, max_packets: usize, timeout_s: Option<f64>) -> PyResult<Packets> {
        let deadline = Deadline::after(timeout_s);
        loop {
            let packets = py.detach(|| self.take(max_packets, deadline.slice()))?;
            if packets.len() > 0 || deadline.is_over() {
                return Ok(Packets::of(py, packets));
            }
            py.check_signals()?;
        }
    }

    fn tx(&self, py: Python<'_>, packets: &Packets) -> PyResult<usize> {
        let packets = packets.taken(py)?;
        py.detach(|| self.give(&packets))
    }

    fn wait_connected(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<bool> {
        let deadline = Deadline::after(timeout_s);
        loop {
            py.check_signals()?;
            if self.is_closed() {
                return Err(Self::closed_error());
            }
            if py.detach(|| self.watch.session()).connected {
                return Ok(true);
            }
            if deadline.is_over() {
                return Ok(false);
            }
            py.detach(|| std::thread::sleep(NAP_MAX));
        }
    }

    fn set_link(&self, py: Python<'_>, up: bool) -> PyResult<()> {
        if self.is_closed() {
            return Err(Self::closed_error());
        }
        py.detach(|| self.watch.set_link(up))
    }

    /// Has the device at the other end carry out a command.
    fn command(&self, py: Python<'_>, name: &str, arguments: &Bound<'_, PyDict>) -> PyResult<()> {
        self.ask(py, commands::command(name, arguments)?).map(drop)
    }

    /// What the device at the other end has counted, by queue.
    fn device_stats(
        &self,
        py: Python<'_>,
        arguments: &Bound<'_, PyDict>,
    ) -> PyResult<Vec<(u16, Vec<u64>)>> {
        let answer = self.ask(py, commands::command("stats", arguments)?)?;
        commands::stats(&answer)
    }

    /// Saves the state of the device at the other end, or loads one.
    fn device_state<'py>(
        &self,
        py: Python<'py>,
        state: Option<Vec<u8>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        if self.is_closed() {
            return Err(Self::closed_error());
        }
        let saved = self.watch.device_state(py, state)?;
        Ok(PyBytes::new(py, &saved))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (counters, session) = py.detach(|| (self.hand().counters(), self.session()));
        stats::port(py, &self.kind, &counters, &session)
    }

    fn events<'py>(&self, py: Python<'py>, first: u64) -> PyResult<(Vec<Bound<'py, PyDict>>, u64)> {
        history::events(py, &self.watch, first)
    }

    fn rings<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        history::rings(py, &self.watch)
    }

    fn close(&self, py: Python<'_>) {
        self.closed.store(true, Ordering::Release);
        py.detach(|| self.hand().close());
    }
}

impl Port {
    fn new(
        kind: &str,
        port: Box<dyn virtnet_packet::Port>,
        watch: Watch,
        control: Option<Control>,
    ) -> Self {
        let hand = Hand {
            port: Some(port),
            burst: Burst::new(),
            rest: Taken::default(),
            usual: (0, 0),
            last: PortCounters::default(),
            control,
        };
        Self {
            kind: kind.to_owned(),
            hand: Mutex::new(hand),
            watch,
            closed: AtomicBool::new(false),
            backlog: None,
        }
    }

    /// What this end of a memory port has not taken yet.
    pub(crate) fn backlog(&self) -> Option<&Backlog> {
        self.backlog.as_ref()
    }

    /// Gives the port itself to somebody who will run it; this end is closed.
    pub(crate) fn take_over(&self) -> PyResult<Box<dyn virtnet_packet::Port>> {
        let port = self.hand().port.take().ok_or_else(Self::closed_error)?;
        self.closed.store(true, Ordering::Release);
        Ok(port)
    }

    fn ask(&self, py: Python<'_>, command: Command) -> PyResult<Vec<u8>> {
        if self.is_closed() {
            return Err(Self::closed_error());
        }
        self.watch.ask(py, command)
    }

    fn session(&self) -> stats::Session {
        if self.is_closed() {
            stats::Session::default()
        } else {
            self.watch.session()
        }
    }

    fn hand(&self) -> MutexGuard<'_, Hand> {
        self.hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn closed_error() -> PyErr {
        StateError::new_err("the port is closed")
    }

    /// Takes packets; waits until `until` when there are none.
    fn take(&self, max_packets: usize, until: Instant) -> PyResult<Taken> {
        let mut packets = Taken::default();
        let mut nap = NAP_MIN;
        loop {
            if self.is_closed() {
                return Err(Self::closed_error());
            }
            self.hand().take(&mut packets, max_packets)?;
            let now = Instant::now();
            if packets.len() > 0 || now >= until {
                return Ok(packets);
            }
            let listened = if nap > NAP_MIN { self.listen() } else { None };
            match listened {
                Some(bell) => {
                    // Whatever ended the wait, the port is looked at again.
                    drop(wait_readable(bell.as_fd(), until - now));
                    self.hand().hush();
                }
                None => {
                    std::thread::sleep(nap.min(until - now));
                    nap = (nap * 2).min(NAP_MAX);
                }
            }
        }
    }

    /// Asks for a sign when something comes, of a port that nobody else looks after between two calls.
    fn listen(&self) -> Option<OwnedFd> {
        if !matches!(self.watch, Watch::Always | Watch::UserNet(_)) {
            return None;
        }
        let mut hand = self.hand();
        let port = hand.port.as_mut()?;
        let is_waiting = port.arm();
        let bell = port.wait_fd().filter(|_| !is_waiting);
        let bell = bell.and_then(|fd| fd.try_clone_to_owned().ok());
        if bell.is_none() {
            port.disarm();
        }
        bell
    }

    fn give(&self, packets: &Taken) -> PyResult<usize> {
        if self.is_closed() {
            return Err(Self::closed_error());
        }
        self.hand().give(packets)
    }
}

impl Hand {
    /// Appends packets until there are `max_packets` or no more.
    fn take(&mut self, packets: &mut Taken, max_packets: usize) -> PyResult<()> {
        let port = self.port.as_mut().ok_or_else(Port::closed_error)?;
        // Between two calls nobody polls, and the control side changes the port by itself.
        port.attach();
        port.sync();
        mem::swap(packets, &mut self.rest);
        while packets.len() < max_packets {
            self.burst.clear();
            let n = port.rx(&mut self.burst);
            if n > 0 && packets.len() == 0 {
                packets.reserve(self.usual);
            }
            packets.append(&self.burst);
            port.complete();
            if n == 0 {
                break;
            }
        }
        // Nobody looks after the port until the next call, and its peer may leave.
        self.burst.clear();
        self.burst.forget_memory();
        port.detach();
        self.rest = packets.split_off(max_packets);
        if packets.len() > 0 {
            self.usual = packets.size();
        }
        Ok(())
    }

    fn give(&mut self, packets: &Taken) -> PyResult<usize> {
        let port = self.port.as_mut().ok_or_else(Port::closed_error)?;
        // Between two calls nobody polls, and the control side changes the port by itself.
        port.attach();
        port.sync();
        let mut given = 0;
        while given < packets.len() {
            self.burst.clear();
            let n = packets.fill(given, &mut self.burst);
            let accepted = port.tx(&self.burst, &Picks::first(n));
            given += accepted;
            if accepted < n {
                break;
            }
        }
        port.flush();
        port.detach();
        Ok(given)
    }

    /// Ends what [`Port::listen`] began, descriptors and all.
    fn hush(&mut self) {
        if let Some(port) = &mut self.port {
            port.disarm();
            port.detach();
        }
    }

    fn counters(&self) -> PortCounters {
        self.port.as_ref().map_or(self.last, |port| port.counters())
    }

    fn close(&mut self) {
        self.last = self.counters();
        self.port = None;
        self.control = None;
    }
}

/// The end of a wait.
struct Deadline(Option<Instant>);

impl Deadline {
    fn after(seconds: Option<f64>) -> Self {
        // A time too long to add up is as good as none.
        Self(seconds.and_then(|seconds| {
            Duration::try_from_secs_f64(seconds)
                .ok()
                .and_then(|time| Instant::now().checked_add(time))
        }))
    }

    fn is_over(&self) -> bool {
        self.0.is_some_and(|end| Instant::now() >= end)
    }

    /// When to look up from waiting.
    fn slice(&self) -> Instant {
        let slice = Instant::now() + SLICE;
        self.0.map_or(slice, |end| end.min(slice))
    }
}
