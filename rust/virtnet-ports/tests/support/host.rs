//! A vhost-user port with a worker that sends back what it receives, and machines that attach to it.

use std::path::PathBuf;

use virtnet_ports::{Control, VhostUserOptions, VhostUserPort, VhostUserStatus, VhostUserWatch};
use virtnet_testkit::{FakeVm, FrontEnd, TempDir, VmMemory, frame};
use virtnet_virtio::Features;

use super::{Echo, until};

/// Entries of a machine's rings.
pub const SIZE: u16 = 64;

/// What makes rings split or packed.
pub const FORMATS: [Features; 2] = [Features::empty(), Features::RING_PACKED];

/// A vhost-user port with a worker.
pub struct Host {
    pub echo: Echo<VhostUserPort>,
    watch: VhostUserWatch,
    path: PathBuf,
    _directory: TempDir,
    _control: Control,
}

impl Host {
    pub fn new(queue_pairs: u16) -> Self {
        Self::with(|options| options.queue_pairs = queue_pairs)
    }

    /// One with other options than usual.
    pub fn with(change: impl FnOnce(&mut VhostUserOptions)) -> Self {
        let directory = TempDir::new();
        let control = Control::start("control").unwrap();
        let path = directory.join("port.sock");
        let mut options = VhostUserOptions::new(&path);
        change(&mut options);
        let port = VhostUserPort::new(options, &control).unwrap();
        Self {
            watch: port.watch(),
            echo: Echo::start(port),
            path,
            _directory: directory,
            _control: control,
        }
    }

    pub fn status(&self) -> VhostUserStatus {
        self.watch.status().unwrap()
    }

    pub fn front_end(&self) -> FrontEnd {
        FrontEnd::connect(&self.path)
    }

    /// A machine that has not told anything yet.
    pub fn machine(&self, format: Features, queue_pairs: usize) -> FakeVm {
        FakeVm::new(self.front_end(), features(format), queue_pairs, SIZE)
    }

    /// The same with this memory.
    pub fn machine_in(&self, format: Features, queue_pairs: usize, memory: VmMemory) -> FakeVm {
        FakeVm::over(
            self.front_end(),
            features(format),
            queue_pairs,
            SIZE,
            memory,
        )
    }

    /// A machine whose packets flow.
    pub fn running(&self, format: Features, queue_pairs: usize) -> FakeVm {
        let mut machine = self.machine(format, queue_pairs);
        machine.start();
        for pair in 0..queue_pairs {
            machine.echo_some(pair);
        }
        machine
    }

    /// The last words: the worker sleeps, another machine is served, and nothing panicked.
    #[track_caller]
    pub fn assert_unharmed(self) {
        until("the connection has been given up", || {
            self.status().state == "listening"
        });
        self.echo.assert_falls_asleep();
        drop(self.running(Features::empty(), 1));
        drop(self.echo.stop());
    }
}

fn features(format: Features) -> Features {
    Features::VERSION_1 | Features::EVENT_IDX | format
}

/// Frames, and what else a test makes a machine do.
pub trait Honest {
    fn echo_some(&mut self, pair: usize);
}

impl Honest for FakeVm {
    #[track_caller]
    fn echo_some(&mut self, pair: usize) {
        let frames: Vec<_> = (0..20).map(|n| frame::pattern(60 + 70 * n, n)).collect();
        self.echo(pair, &frames);
    }
}
