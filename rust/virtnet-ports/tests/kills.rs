//! Drivers in processes of their own, killed hundreds of times with SIGKILL while packets pass; their device stays.
//!
//! Whoever comes next is served by itself, each frame comes back whole, and in the end nothing of those that are gone is left: no
//! memory, no descriptor, no packet that is not accounted for.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::io::{Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{Echo, Wiring, burst_of, open_things, send_or_drop, until};
use virtnet_packet::{Burst, Port};
use virtnet_ports::Control;
use virtnet_testkit::{TempDir, frame};
use virtnet_virtio::{Features, RingFormat};

const KILLS: usize = 1000;
const DRIVER: &str = "VIRTNET_TEST_DRIVER";

/// What is tried: formats, in order or not, and which side listens.
fn cases() -> Vec<Wiring> {
    let mut cases = Vec::new();
    for format in [RingFormat::Split, RingFormat::Packed] {
        for without in [Features::empty(), Features::IN_ORDER] {
            for queue_pairs in [1, 2] {
                cases.push(Wiring {
                    format,
                    without,
                    queue_pairs,
                    ..Wiring::default()
                });
            }
        }
    }
    cases
}

fn main() {
    let cases = cases();
    if let Ok(how) = std::env::var(DRIVER) {
        let (path, number) = how.split_once(' ').unwrap();
        run_driver(&cases[number.parse::<usize>().unwrap()], path);
    }
    let start = Instant::now();
    for (number, wiring) in cases.iter().enumerate() {
        let kills = (KILLS * (number + 1)) / cases.len() - (KILLS * number) / cases.len();
        run_device(wiring, number, kills);
    }
    println!("{KILLS} drivers were killed in {:.1?}", start.elapsed());
}

/// Sends and receives until it is killed. Writes a byte for each burst that has come back.
fn run_driver(wiring: &Wiring, path: &str) -> ! {
    let control = Control::start("control").unwrap();
    let mut port = wiring.driver(path.as_ref(), &control);
    until("the driver runs", || {
        port.status().unwrap().state == "running"
    });
    port.attach();
    let frames: Vec<_> = (0..32).map(|n| frame::pattern(60 + 40 * n, n)).collect();
    let mut burst = Burst::new();
    let mut out = std::io::stdout();
    loop {
        let sent = burst_of(&frames);
        send_or_drop(&mut port, &sent);
        port.flush();
        let (mut came, since) = (0, Instant::now());
        while came < frames.len() && since.elapsed() < Duration::from_secs(20) {
            port.sync();
            burst.clear();
            port.rx(&mut burst);
            for i in 0..burst.len() {
                let mut bytes = vec![0; burst.frame_len(i)];
                burst.copy_frame(i, &mut bytes);
                assert!(frames.contains(&bytes), "not what was sent");
            }
            came += burst.len();
            port.complete();
            port.flush();
            if burst.is_empty() {
                thread::yield_now();
            }
        }
        assert_eq!(came, frames.len(), "not all came back");
        out.write_all(&[1]).unwrap();
        out.flush().unwrap();
    }
}

fn run_device(wiring: &Wiring, number: usize, kills: usize) {
    let directory = TempDir::new();
    let control = Control::start("control").unwrap();
    let path = directory.join("port.sock");
    let port = wiring.device(&path, &control);
    let watch = port.watch();
    let echo = Echo::start(port);
    let spawn = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(DRIVER, format!("{} {number}", path.display()));
        Driver::new(command.stdout(Stdio::piped()).spawn().unwrap())
    };
    let nobody = || watch.status().unwrap().state == "listening";
    drop(spawn());
    until("nobody is there", nobody);
    echo.assert_falls_asleep();
    let before = open_things();
    for kill in 0..kills {
        let mut driver = spawn();
        driver.wait_for_bursts(1 + kill * 37 % 20);
        // Somewhere in the middle of what it does then.
        drop(driver);
    }
    let mut last = spawn();
    last.wait_for_bursts(50);
    drop(last);
    until("nobody is left", nobody);
    until("nothing is left", || open_things() == before);
    let port = echo.stop();
    let counters = port.counters();
    let sent = counters.sent + counters.tx_drops.total();
    assert_eq!(counters.received, sent, "{counters:?}");
}

/// A process that is killed when it is not needed any more.
struct Driver {
    child: Child,
    out: ChildStdout,
}

impl Driver {
    fn new(mut child: Child) -> Self {
        let out = child.stdout.take().unwrap();
        Self { child, out }
    }

    /// Waits until so many bursts have come back to it.
    fn wait_for_bursts(&mut self, n: usize) {
        let mut bytes = vec![0; n];
        self.out.read_exact(&mut bytes).expect("the driver lives");
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
