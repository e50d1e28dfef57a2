use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::Sender;
use std::time::Instant;

use virtnet_sys::{EventFd, thread_cpu_time};

use super::*;

const MS: u64 = 1_000_000;

/// Counts what happens to it and does what its `on_event` says.
struct Probe {
    event: Option<EventFd>,
    deadline_ns: Option<u64>,
    ready: u32,
    timers: u32,
    on_event: fn(&mut Self) -> Result<(), PortError>,
    dropped: Option<Sender<ThreadId>>,
}

impl Probe {
    fn new(event: &EventFd) -> Self {
        Self {
            event: Some(event.try_clone().unwrap()),
            deadline_ns: None,
            ready: 0,
            timers: 0,
            on_event: |_| Ok(()),
            dropped: None,
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if let Some(dropped) = &self.dropped {
            let _ = dropped.send(thread::current().id());
        }
    }
}

impl Service for Probe {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(AsFd::as_fd)
    }

    fn on_ready(&mut self, _now_ns: u64) -> Result<(), PortError> {
        self.ready += 1;
        if let Some(event) = &self.event {
            event.drain();
        }
        (self.on_event)(self)
    }

    fn deadline_ns(&self) -> Option<u64> {
        self.deadline_ns
    }

    fn on_timer(&mut self, now_ns: u64) -> Result<(), PortError> {
        self.timers += 1;
        self.deadline_ns = (self.timers < 3).then_some(now_ns + 5 * MS);
        Ok(())
    }
}

fn eventually(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "it never happened"
        );
        thread::sleep(Duration::from_millis(1));
    }
}

fn failing(_: &mut Probe) -> Result<(), PortError> {
    Err(PortError::io(
        "do it",
        std::io::Error::other("out of order"),
    ))
}

#[test]
fn an_event_reaches_its_service_and_a_call_sees_it() {
    let control = Control::start("test").unwrap();
    let events: Vec<_> = (0..3).map(|_| EventFd::new().unwrap()).collect();
    let served: Vec<_> = events
        .iter()
        .map(|event| control.add(Probe::new(event)).unwrap())
        .collect();
    events[1].signal().unwrap();
    eventually(|| served[1].call(|probe| probe.ready).unwrap() == 1);
    assert_eq!(served[0].call(|probe| probe.ready).unwrap(), 0);
    assert_eq!(served[2].call(|probe| probe.ready).unwrap(), 0);
}

#[test]
fn a_timer_fires_at_its_deadline_and_again_when_it_says_so() {
    let control = Control::start("test").unwrap();
    let mut probe = Probe::new(&EventFd::new().unwrap());
    probe.deadline_ns = Some(monotonic_ns() + 5 * MS);
    let start = Instant::now();
    let served = control.add(probe).unwrap();
    eventually(|| served.call(|probe| probe.timers).unwrap() == 3);
    assert!(start.elapsed() >= Duration::from_millis(15));
    // A deadline given by a call counts as well.
    served
        .call(|probe| probe.deadline_ns = Some(monotonic_ns() + MS))
        .unwrap();
    eventually(|| served.call(|probe| probe.timers).unwrap() == 4);
}

/// Listens, then serves one connection, then listens again: the descriptor changes under the same number and another.
struct Echo {
    listener: UnixListener,
    connection: Option<UnixStream>,
    keep: Vec<UnixStream>,
}

impl Service for Echo {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(
            self.connection
                .as_ref()
                .map_or_else(|| self.listener.as_fd(), AsFd::as_fd),
        )
    }

    fn on_ready(&mut self, _now_ns: u64) -> Result<(), PortError> {
        let failed = |source| PortError::io("echo", source);
        let Some(connection) = &mut self.connection else {
            let (connection, _) = self.listener.accept().map_err(failed)?;
            // A duplicate keeps the file alive after the connection is closed: it must not be waited for any more.
            self.keep.push(connection.try_clone().map_err(failed)?);
            self.connection = Some(connection);
            return Ok(());
        };
        let mut bytes = [0; 16];
        let n = connection.read(&mut bytes).map_err(failed)?;
        if n == 0 {
            self.connection = None;
            return Ok(());
        }
        connection.write_all(&bytes[..n]).map_err(failed)
    }
}

#[test]
fn the_descriptor_of_a_service_may_change_at_any_callback() {
    let directory = std::env::temp_dir().join(format!("virtnet-control-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("echo.sock");
    let control = Control::start("test").unwrap();
    let served = control
        .add(Echo {
            listener: UnixListener::bind(&path).unwrap(),
            connection: None,
            keep: Vec::new(),
        })
        .unwrap();
    for round in 0..3u8 {
        let mut client = UnixStream::connect(&path).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        client.write_all(&[round; 4]).unwrap();
        let mut answer = [0; 4];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [round; 4]);
    }
    eventually(|| served.call(|echo| echo.connection.is_none()).unwrap());
    let echo = served.remove().unwrap();
    assert_eq!(echo.keep.len(), 3);
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_service_that_fails_rests_and_is_tried_again_while_others_go_on() {
    let control = Control::start("test").unwrap();
    let (bad_event, good_event) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let mut probe = Probe::new(&bad_event);
    probe.on_event = failing;
    let bad = control.add(probe).unwrap();
    let good = control.add(Probe::new(&good_event)).unwrap();
    assert!(bad.last_error().unwrap().is_none());
    bad_event.signal().unwrap();
    eventually(|| bad.last_error().unwrap().is_some());
    let error = bad.last_error().unwrap().unwrap();
    assert_eq!(error.to_string(), "cannot do it: out of order");

    let start = Instant::now();
    bad_event.signal().unwrap();
    good_event.signal().unwrap();
    eventually(|| good.call(|probe| probe.ready).unwrap() == 1);
    eventually(|| bad.call(|probe| probe.ready).unwrap() == 2);
    assert!(start.elapsed() >= REST / 2, "{:?}", start.elapsed());
}

#[test]
fn a_service_that_panics_is_never_called_again_and_can_be_taken_out() {
    let control = Control::start("test").unwrap();
    let (bad_event, good_event) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let mut probe = Probe::new(&bad_event);
    probe.on_event = |_| panic!("defect");
    let bad = control.add(probe).unwrap();
    let good = control.add(Probe::new(&good_event)).unwrap();
    bad_event.signal().unwrap();
    eventually(|| bad.last_error().unwrap().is_some());
    bad_event.signal().unwrap();
    good_event.signal().unwrap();
    eventually(|| good.call(|probe| probe.ready).unwrap() == 1);
    let error = bad.call(|probe| probe.ready).unwrap_err();
    assert!(error.to_string().contains("defect"), "{error}");
    assert_eq!(bad.remove().unwrap().ready, 1);
}

#[test]
fn a_panicking_call_is_the_callers_error_and_the_thread_goes_on() {
    let control = Control::start("test").unwrap();
    let event = EventFd::new().unwrap();
    let one = control.add(Probe::new(&event)).unwrap();
    let other = control.add(Probe::new(&event)).unwrap();
    let error = one.call(|_| panic!("oops")).unwrap_err();
    assert!(
        matches!(error, PortError::ServicePanicked { ref message } if message == "oops"),
        "{error}"
    );
    assert_eq!(other.call(|probe| probe.ready).unwrap(), 0);
}

#[test]
fn a_removed_service_comes_back_and_is_not_called_any_more() {
    let control = Control::start("test").unwrap();
    let event = EventFd::new().unwrap();
    let served = control.add(Probe::new(&event)).unwrap();
    let probe = served.remove().unwrap();
    event.signal().unwrap();
    thread::sleep(Duration::from_millis(10));
    assert_eq!(probe.ready, 0);
    assert!(event.drain());
}

#[test]
fn dropping_the_handle_or_the_control_drops_the_service_on_its_thread() {
    let control = Control::start("test").unwrap();
    let (sender, dropped) = mpsc::channel();
    let add = || {
        let mut probe = Probe::new(&EventFd::new().unwrap());
        probe.dropped = Some(sender.clone());
        control.add(probe).unwrap()
    };
    drop(add());
    let first = dropped.try_recv().unwrap();
    assert_ne!(first, thread::current().id());

    let served = add();
    drop(control);
    assert_eq!(dropped.try_recv().unwrap(), first);
    let error = served.call(|probe| probe.ready).unwrap_err();
    assert!(matches!(error, PortError::Stopped), "{error}");
    drop(served);
}

#[test]
fn a_service_cannot_wait_for_its_own_thread_but_can_drop_what_it_has_there() {
    struct Outer {
        event: EventFd,
        inner: Option<Served<Probe>>,
        answer: Option<String>,
    }
    impl Service for Outer {
        fn source(&self) -> Option<BorrowedFd<'_>> {
            Some(self.event.as_fd())
        }
        fn on_ready(&mut self, _now_ns: u64) -> Result<(), PortError> {
            self.event.drain();
            let inner = self.inner.take();
            let error = inner.and_then(|inner| inner.call(|probe| probe.ready).err());
            self.answer = error.map(|error| error.to_string());
            Ok(())
        }
    }
    let control = Control::start("test").unwrap();
    let (sender, dropped) = mpsc::channel();
    let event = EventFd::new().unwrap();
    let mut probe = Probe::new(&EventFd::new().unwrap());
    probe.dropped = Some(sender);
    let outer = control
        .add(Outer {
            event: event.try_clone().unwrap(),
            inner: Some(control.add(probe).unwrap()),
            answer: None,
        })
        .unwrap();
    event.signal().unwrap();
    dropped.recv_timeout(Duration::from_secs(5)).unwrap();
    let answer = outer.call(|outer| outer.answer.clone()).unwrap().unwrap();
    assert!(answer.contains("wait for itself"), "{answer}");
}

#[test]
fn stopping_is_quick_when_idle_and_bounded_when_a_service_is_stuck() {
    let control = Control::start("test").unwrap();
    let start = Instant::now();
    control.stop();
    assert!(start.elapsed() < Duration::from_millis(500));
    control.stop();
    let refused = control.add(Probe::new(&EventFd::new().unwrap()));
    assert!(matches!(refused, Err(PortError::Stopped)));

    let control = Control::start("test").unwrap();
    let event = EventFd::new().unwrap();
    let mut probe = Probe::new(&event);
    probe.on_event = |_| {
        thread::sleep(Duration::from_secs(3));
        Ok(())
    };
    let served = control.add(probe).unwrap();
    event.signal().unwrap();
    thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    control.stop();
    let waited = start.elapsed();
    assert!(
        waited >= STOP_DEADLINE && waited < STOP_DEADLINE * 2,
        "{waited:?}"
    );
    drop(served);
}

#[test]
fn an_idle_thread_uses_no_cpu() {
    let control = Control::start("test").unwrap();
    let _served = control.add(Probe::new(&EventFd::new().unwrap())).unwrap();
    let used = || control.shared.run(|_| thread_cpu_time()).unwrap();
    let before = used();
    thread::sleep(Duration::from_millis(200));
    let used = used() - before;
    assert!(used < Duration::from_millis(2), "{used:?}");
}

#[test]
fn ten_controls_live_side_by_side() {
    let events: Vec<_> = (0..10).map(|_| EventFd::new().unwrap()).collect();
    let running: Vec<_> = events
        .iter()
        .map(|event| {
            let control = Control::start("test").unwrap();
            let served = control.add(Probe::new(event)).unwrap();
            (control, served)
        })
        .collect();
    for (event, (_, served)) in events.iter().zip(&running).rev() {
        event.signal().unwrap();
        eventually(|| served.call(|probe| probe.ready).unwrap() == 1);
    }
}
