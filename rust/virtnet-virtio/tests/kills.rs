//! A device in a process of its own, killed a thousand times with SIGKILL while it works; its driver stays.
//!
//! The driver sees every chain come back exactly once, in order and whole, whichever instruction the device died at: in both ring
//! formats, with and without a record of what is in flight, and with a base that was right once, long ago.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "tests choose their numbers and fail loudly"
)]

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr, Window};
use virtnet_virtio::inflight::region_bytes;
use virtnet_virtio::{
    Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, Features, QueueConfig, RingFormat, Used,
};

const KILLS: usize = 1000;
const SIZE: u16 = 256;
const DRIVER_AREA: u64 = 16 << 10;
const DEVICE_AREA: u64 = 20 << 10;
const RECORD: u64 = 32 << 10;
const BUFFERS: u64 = 64 << 10;
const BUFFER: u64 = 64;
const MEMORY: u64 = 256 << 10;
const DEVICE: &str = "VIRTNET_TEST_DEVICE";

/// What is tried: every combination of these.
#[derive(Clone, Copy, Debug)]
struct Case {
    format: RingFormat,
    in_order: bool,
    access: Access,
    recorded: bool,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        (0..16).map(|bits: u8| Self {
            format: if bits & 1 == 0 {
                RingFormat::Split
            } else {
                RingFormat::Packed
            },
            in_order: bits & 2 != 0,
            access: if bits & 4 == 0 {
                Access::Read
            } else {
                Access::Write
            },
            recorded: bits & 8 != 0,
        })
    }

    fn config(self) -> QueueConfig {
        let mut features = Features::VERSION_1 | Features::EVENT_IDX;
        features.set(Features::RING_PACKED, self.format == RingFormat::Packed);
        features.set(Features::IN_ORDER, self.in_order);
        QueueConfig {
            size: SIZE,
            desc_area: UserAddr(0),
            driver_area: UserAddr(DRIVER_AREA),
            device_area: UserAddr(DEVICE_AREA),
            base: self.format.fresh_base(),
            features,
        }
    }

    fn record(self, memory: &GuestMemory) -> Window {
        let bytes = region_bytes(self.format, SIZE);
        memory.window(UserAddr(RECORD), bytes, 64).unwrap()
    }
}

fn map(file: &File) -> Arc<GuestMemory> {
    let fd = file.try_clone().unwrap().into();
    let region = Region::map_file(fd, 0, MEMORY, GuestAddr(0), UserAddr(0)).unwrap();
    Arc::new(GuestMemory::new(vec![region]).unwrap())
}

fn main() {
    let cases: Vec<_> = Case::all().collect();
    if let Ok(how) = std::env::var(DEVICE) {
        let (path, number) = how.split_once(' ').unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        run_device(cases[number.parse::<usize>().unwrap()], &map(&file));
    }
    let start = Instant::now();
    for (number, &case) in cases.iter().enumerate() {
        let kills = (KILLS * (number + 1)) / cases.len() - (KILLS * number) / cases.len();
        run_driver(case, number, kills);
    }
    println!("{KILLS} devices were killed in {:.1?}", start.elapsed());
}

/// Takes, works and gives back, in bursts, until it is killed. Its base is that of the beginning, always.
fn run_device(case: Case, memory: &GuestMemory) -> ! {
    let config = case.config();
    let mut queue = if case.recorded {
        DeviceQueue::resume(&config, memory, &case.record(memory)).unwrap()
    } else {
        let base = DeviceQueue::recover(&config, memory).unwrap();
        DeviceQueue::new(&QueueConfig { base, ..config }, memory).unwrap()
    };
    let mut chains = Chains::new();
    for burst in (1..=64).cycle() {
        queue.take(memory, case.access, burst, &mut chains).unwrap();
        // Of some bursts a part is put back.
        let put_back = if burst % 5 == 0 { chains.len() / 2 } else { 0 };
        let keep = chains.len() - put_back;
        if case.access == Access::Read && put_back == 0 {
            queue.give_all(&chains);
        } else {
            let lens: Vec<_> = (0..keep).map(|i| work(case, memory, &chains, i)).collect();
            queue.give(&chains, 0, &lens);
            queue.untake(put_back, &mut chains);
        }
        chains.clear();
        if burst % 3 > 0 {
            queue.publish();
        }
    }
    unreachable!("it goes round and round")
}

/// Fills a buffer with its own place, a different number of bytes each time; how many.
fn work(case: Case, memory: &GuestMemory, chains: &Chains, i: usize) -> u32 {
    if case.access == Access::Read {
        return 0;
    }
    let [segment] = *chains.segments(i) else {
        unreachable!("one buffer each");
    };
    let len = 8 + (segment.offset as u32 / 64 + segment.len) % 50;
    let bytes = vec![(segment.offset / 64) as u8; len as usize];
    memory.slice(segment).copy_from(&bytes) as u32
}

struct Ring<'a> {
    case: Case,
    memory: &'a Arc<GuestMemory>,
    driver: DriverQueue,
    /// Ids that the device holds, in order.
    outstanding: VecDeque<u16>,
    returned: u64,
}

impl Ring<'_> {
    /// Fills the ring, and takes back what has come back.
    fn turn(&mut self) {
        while self.driver.free() > 0 {
            let id = self.driver.upcoming(0).unwrap();
            let buffer = DriverBuffer {
                addr: GuestAddr(BUFFERS + BUFFER * u64::from(id)),
                len: BUFFER as u32,
                writable: self.case.access == Access::Write,
            };
            assert_eq!(self.driver.add(&[buffer]), Some(id));
            self.outstanding.push_back(id);
        }
        self.driver.publish();
        let mut used = [Used::default(); 64];
        let n = self.driver.reap(&mut used).unwrap();
        for used in &used[..n] {
            let expected = self.outstanding.pop_front();
            assert_eq!(
                Some(used.id),
                expected,
                "{:?}: lost, or given twice",
                self.case
            );
            if self.case.access == Access::Write {
                self.check(*used);
            }
        }
        self.returned += n as u64;
    }

    /// What came back is whole: as long as the device says, and of nothing but its own bytes.
    fn check(&self, used: Used) {
        let mut hint = 0;
        let addr = GuestAddr(BUFFERS + BUFFER * u64::from(used.id));
        let segment = self.memory.translate(addr, used.len, &mut hint).unwrap();
        let mut bytes = vec![0; used.len as usize];
        self.memory.slice(segment).copy_to(&mut bytes);
        let tag = (segment.offset / 64) as u8;
        assert!(
            used.len >= 8 && bytes.iter().all(|&byte| byte == tag),
            "{:?}: {used:?} {bytes:?}",
            self.case
        );
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            let waited = start.elapsed();
            assert!(waited < Duration::from_secs(60), "{:?}: {what}", self.case);
            self.turn();
            std::thread::yield_now();
        }
    }
}

fn run_driver(case: Case, number: usize, kills: usize) {
    let path = std::env::temp_dir().join(format!("virtnet-kills-{}", std::process::id()));
    let file = File::create_new(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file.set_len(MEMORY).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let memory = map(&File::options().read(true).write(true).open(&path).unwrap());
    let mut ring = Ring {
        case,
        driver: DriverQueue::new(&case.config(), &memory).unwrap(),
        memory: &memory,
        outstanding: VecDeque::new(),
        returned: 0,
    };
    ring.turn();
    let spawn = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(DEVICE, format!("{path} {number}"));
        Reaped(command.spawn().unwrap())
    };
    for kill in 0..kills as u64 {
        let mut device = spawn();
        // It has found its place when something has come back, and dies somewhere in the middle of what it does then.
        let more = ring.returned + 1 + kill * 37 % 300;
        ring.until("a device that was killed is not gone on for", |ring| {
            assert!(device.0.try_wait().unwrap().is_none(), "{:?}", ring.case);
            ring.returned >= more
        });
        drop(device);
    }
    // And nothing is missing.
    let _device = spawn();
    let end = ring.returned + 2 * u64::from(SIZE);
    ring.until("what is in flight comes back", |ring| ring.returned >= end);
}

/// A process that is killed when it is not needed any more.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
