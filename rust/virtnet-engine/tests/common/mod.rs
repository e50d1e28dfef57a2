//! What the tests of this crate share: frames, random numbers, and ports that do as they are told.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use virtnet_packet::{Burst, DropReason, MemoryPort, Offload, Picks, Port, PortCounters};
use virtnet_sys::EventFd;

/// A station's address.
pub fn station(n: u8) -> [u8; 6] {
    [0x02, 0, 0, 0, 0, n]
}

pub const EVERYBODY: [u8; 6] = [0xff; 6];

/// A frame of `len` bytes, each of which tells the frame's number.
pub fn frame(to: [u8; 6], from: [u8; 6], len: usize, number: u8) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &[0x88, 0xb5]].concat();
    frame.resize(len, number);
    frame
}

/// Sends frames into the network through the outer end of a memory pair, which must have room.
pub fn put(outside: &mut MemoryPort, frames: &[Vec<u8>]) {
    assert_eq!(offer(outside, frames), frames.len());
}

/// Sends as many frames as there is room for; how many.
pub fn offer(outside: &mut MemoryPort, frames: &[Vec<u8>]) -> usize {
    let send = |frames: &[Vec<u8>]| {
        let mut burst = Burst::new();
        for frame in frames {
            burst.push_bytes(frame, Offload::default());
        }
        outside.tx(&burst, &Picks::first(frames.len()))
    };
    frames.chunks(64).map(send).sum()
}

/// Takes everything that has come out of the network.
pub fn take(outside: &mut MemoryPort) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut burst = Burst::new();
    loop {
        burst.clear();
        let n = outside.rx(&mut burst);
        if n == 0 {
            return frames;
        }
        for i in 0..n {
            let mut frame = vec![0; burst.frame_len(i)];
            assert_eq!(burst.copy_frame(i, &mut frame), frame.len());
            frames.push(frame);
        }
    }
}

/// Numbers that look random and are the same for the same seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    /// Whether something happens that does so once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The inside and the outside of a port that notifies by an eventfd when it was asked to.
pub fn event_port() -> (EventPort, EventOutside) {
    let event = EventFd::new().unwrap();
    let shared = Arc::new(Mutex::new(Shared::default()));
    let outside = EventOutside {
        shared: Arc::clone(&shared),
        event: event.try_clone().unwrap(),
    };
    let port = EventPort {
        shared,
        event,
        counters: PortCounters::default(),
    };
    (port, outside)
}

#[derive(Debug, Default)]
struct Shared {
    frames: VecDeque<Vec<u8>>,
    armed: bool,
    sent: u64,
}

#[derive(Debug)]
pub struct EventPort {
    shared: Arc<Mutex<Shared>>,
    event: EventFd,
    counters: PortCounters,
}

#[derive(Debug)]
pub struct EventOutside {
    shared: Arc<Mutex<Shared>>,
    event: EventFd,
}

impl EventOutside {
    /// Gives the port a frame; notifies as a good peer does: when it was asked to, once.
    pub fn put(&self, frame: Vec<u8>) {
        let mut shared = self.shared.lock().unwrap();
        shared.frames.push_back(frame);
        if std::mem::take(&mut shared.armed) {
            self.event.signal().unwrap();
        }
    }

    pub fn sent(&self) -> u64 {
        self.shared.lock().unwrap().sent
    }

    pub fn is_armed(&self) -> bool {
        self.shared.lock().unwrap().armed
    }
}

impl Port for EventPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        let mut shared = self.shared.lock().unwrap();
        let n = shared.frames.len().min(burst.room());
        for frame in shared.frames.drain(..n) {
            burst.push_bytes(&frame, Offload::default());
        }
        self.counters.received += n as u64;
        n
    }

    fn tx(&mut self, _: &Burst, picks: &Picks) -> usize {
        self.shared.lock().unwrap().sent += picks.len() as u64;
        self.counters.sent += picks.len() as u64;
        picks.len()
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn arm(&mut self) -> bool {
        let mut shared = self.shared.lock().unwrap();
        shared.armed = true;
        !shared.frames.is_empty()
    }

    fn disarm(&mut self) {
        self.shared.lock().unwrap().armed = false;
        self.event.drain();
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}
