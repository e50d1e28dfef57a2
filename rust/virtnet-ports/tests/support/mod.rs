//! What the tests of the vhost-user and virtio-user ports share: workers, pairs of ports, and a look at what is open.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part of it"
)]

pub mod host;
pub mod other_pipe;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, PortCounters};
use virtnet_ports::{Control, VhostUserOptions, VhostUserPort, VirtioUserOptions, VirtioUserPort};
use virtnet_sys::{Events, Poller};
use virtnet_testkit::TempDir;
use virtnet_virtio::{Features, RingFormat};

/// How long anything may take on a machine that has other things to do.
pub const PATIENCE: Duration = Duration::from_secs(20);

static GATE: RwLock<()> = RwLock::new(());

/// To be held by a test that may run beside others.
pub fn beside_others() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(PoisonError::into_inner)
}

/// To be held by a test that counts what this process has open: every other test waits.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    GATE.write().unwrap_or_else(PoisonError::into_inner)
}

/// Open descriptors of this process, and mappings of memory files.
pub fn open_things() -> (usize, usize) {
    let fds = fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps.lines().filter(|line| line.contains("/memfd:"));
    (fds, mapped.count())
}

/// Waits until something is so.
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}: it never is");
        thread::sleep(Duration::from_micros(200));
    }
}

/// What a pair of a vhost-user and a virtio-user port is made of.
#[derive(Clone, Debug)]
pub struct Wiring {
    pub format: RingFormat,
    pub queue_pairs: u16,
    pub queue_size: u16,
    /// Features that the driver does not accept.
    pub without: Features,
    /// The device connects and the driver listens.
    pub swapped: bool,
    /// The driver uses a control queue, and has hashes told.
    pub control: bool,
    pub hash_report: bool,
    /// The driver is behind an IOMMU.
    pub iommu: bool,
    /// Kicks and calls are messages.
    pub in_band: bool,
}

impl Default for Wiring {
    fn default() -> Self {
        Self {
            format: RingFormat::Split,
            queue_pairs: 1,
            queue_size: 256,
            without: Features::empty(),
            swapped: false,
            control: false,
            hash_report: false,
            iommu: false,
            in_band: false,
        }
    }
}

impl Wiring {
    pub fn device(&self, path: &Path, control: &Control) -> VhostUserPort {
        let mut options = VhostUserOptions::new(path);
        options.client = self.swapped;
        options.in_band = self.in_band;
        options.queue_pairs = self.queue_pairs;
        VhostUserPort::new(options, control).unwrap()
    }

    pub fn driver(&self, path: &Path, control: &Control) -> VirtioUserPort {
        let mut options = VirtioUserOptions::new(path);
        options.server = self.swapped;
        options.queue_pairs = self.queue_pairs;
        options.queue_size = self.queue_size;
        options.format = self.format;
        options.without = self.without;
        options.control = self.control;
        options.hash_report = self.hash_report;
        options.iommu = self.iommu;
        options.in_band = self.in_band;
        VirtioUserPort::new(options, control).unwrap()
    }

    /// Two ports on one control thread, with packets able to flow.
    #[track_caller]
    pub fn connect(&self) -> Pair {
        let directory = TempDir::new();
        let control = Control::start("control").unwrap();
        let path = directory.join("port.sock");
        // Whoever connects may be first.
        let (device, driver) = if self.queue_size.is_multiple_of(3) {
            let driver = self.driver(&path, &control);
            (self.device(&path, &control), driver)
        } else {
            let device = self.device(&path, &control);
            (device, self.driver(&path, &control))
        };
        let pair = Pair {
            device,
            driver,
            control,
            directory,
        };
        pair.wait_until_running();
        pair
    }
}

/// A vhost-user port and a virtio-user port, connected to each other.
#[derive(Debug)]
pub struct Pair {
    pub device: VhostUserPort,
    pub driver: VirtioUserPort,
    pub control: Control,
    pub directory: TempDir,
}

impl Pair {
    /// Waits for both ports, neither of which may be attached.
    #[track_caller]
    pub fn wait_until_running(&self) {
        until("the device runs", || {
            self.device.status().unwrap().state == "running"
        });
        until("the driver runs", || {
            self.driver.status().unwrap().state == "running"
        });
    }
}

/// A worker with one port, which sends back what it receives. It sleeps when there is nothing.
#[derive(Debug)]
pub struct Echo<P> {
    thread: JoinHandle<P>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    breaths: AtomicU64,
}

impl<P: Port + 'static> Echo<P> {
    pub fn start(mut port: P) -> Self {
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            port.attach();
            let poller = Poller::new().unwrap();
            poller.add(port.wait_fd().unwrap(), 0).unwrap();
            let (mut events, mut burst) = (Events::with_capacity(1), Burst::new());
            while !seen.stop.load(Ordering::Relaxed) {
                seen.breaths.fetch_add(1, Ordering::Relaxed);
                let has_changed = port.sync();
                burst.clear();
                if has_changed {
                    burst.forget_memory();
                }
                let n = port.rx(&mut burst);
                send_or_drop(&mut port, &burst);
                port.complete();
                port.flush();
                if n == 0 {
                    if !port.arm() {
                        poller
                            .wait(&mut events, Some(Duration::from_millis(50)))
                            .unwrap();
                    }
                    port.disarm();
                }
            }
            port.detach();
            port
        });
        Self { thread, shared }
    }

    /// Ends the worker; the port is not attached any more.
    pub fn stop(self) -> P {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the worker did not panic")
    }

    /// How many breaths the worker takes in this time.
    pub fn breaths_in(&self, time: Duration) -> u64 {
        let before = self.shared.breaths.load(Ordering::Relaxed);
        thread::sleep(time);
        self.shared.breaths.load(Ordering::Relaxed) - before
    }

    /// Waits until the worker has nothing to do, and fails if it never has.
    #[track_caller]
    pub fn assert_falls_asleep(&self) {
        until("the worker sleeps", || {
            self.breaths_in(Duration::from_millis(40)) < 8
        });
    }
}

/// Sends all of a burst; what there is no room for is dropped and counted.
pub fn send_or_drop(port: &mut dyn Port, burst: &Burst) -> usize {
    let n = burst.len();
    let taken = port.tx(burst, &Picks::first(n));
    port.drop_tx(DropReason::NoRoom, n - taken);
    taken
}

/// A burst of these frames.
pub fn burst_of(frames: &[Vec<u8>]) -> Burst {
    let mut burst = Burst::new();
    for frame in frames {
        burst.push_bytes(frame, Offload::default());
    }
    burst
}

/// One breath of a port that only receives: the frames that came.
pub fn breathe(port: &mut dyn Port) -> Vec<Vec<u8>> {
    let mut burst = Burst::new();
    port.sync();
    port.rx(&mut burst);
    let frames = (0..burst.len())
        .map(|i| {
            let mut frame = vec![0; burst.frame_len(i)];
            assert_eq!(burst.copy_frame(i, &mut frame), frame.len());
            frame
        })
        .collect();
    port.complete();
    port.flush();
    frames
}

/// What was offered to a port, by its own counters.
pub fn offered(counters: &PortCounters) -> u64 {
    counters.sent + counters.tx_drops.total()
}
