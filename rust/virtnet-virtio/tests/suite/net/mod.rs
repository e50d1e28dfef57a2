//! The queues of a network device: what a packet becomes on each side, and that every one of them is accounted for.

mod control;
mod driver;
mod receive;
mod transmit;

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory};
use virtnet_packet::{Burst, Offload, Picks};
use virtnet_virtio::{DriverBuffer, Features, QueueConfig, RingFormat};

use crate::support::driver::{Driver, NaiveDriver};
use crate::support::{Ram, Random, Setup};

/// Frame lengths at which something changes: the shortest, copy widths, the private head, Ethernet, the longest.
const LENGTHS: [usize; 24] = [
    14, 15, 16, 17, 32, 33, 59, 60, 64, 65, 127, 128, 129, 191, 192, 193, 204, 1500, 1518, 2048,
    9000, 65_535, 65_588, 65_589,
];

/// Bytes of a frame that no other frame has.
fn frame(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed ^ (len as u64) << 32);
    (0..len).map(|_| random.next() as u8).collect()
}

/// Frame `i` of a burst, put together.
fn frame_of(burst: &Burst, i: usize) -> Vec<u8> {
    let mut bytes = vec![0; burst.frame_len(i)];
    assert_eq!(burst.copy_frame(i, &mut bytes), bytes.len());
    bytes
}

fn burst_of(frames: &[Vec<u8>]) -> Burst {
    let mut burst = Burst::new();
    for frame in frames {
        burst.push_bytes(frame, Offload::default());
    }
    burst
}

fn all(burst: &Burst) -> Picks {
    Picks::first(burst.len())
}

/// A queue to be tested, and what was negotiated beside its format.
#[derive(Clone, Copy, Debug)]
struct Net {
    setup: Setup,
    features: Features,
}

impl Net {
    fn new(setup: Setup, more: Features) -> Self {
        Self {
            setup,
            features: setup.features() | more,
        }
    }

    /// Every kind of ring of `size`, with headers of 10 and of 12 bytes where both can be.
    fn every(size: u16, more: Features) -> impl Iterator<Item = Self> {
        Setup::all(size).flat_map(move |setup| {
            let modern = Self::new(setup, more);
            let legacy = Self {
                features: modern.features - Features::VERSION_1,
                ..modern
            };
            let short = legacy.header_len() == 10;
            [modern].into_iter().chain(short.then_some(legacy))
        })
    }

    fn header_len(&self) -> usize {
        let all = Features::VERSION_1 | Features::MRG_RXBUF | Features::RING_PACKED;
        if self.features.intersects(all) {
            12
        } else {
            10
        }
    }

    fn config(&self) -> QueueConfig {
        QueueConfig {
            features: self.features,
            ..self.setup.config()
        }
    }
}

/// One of each format.
fn both(size: u16) -> [Setup; 2] {
    [RingFormat::Split, RingFormat::Packed].map(|format| Setup::new(format, size))
}

/// A naive guest: its memory, its driver, and where the next buffer goes.
struct Guest {
    net: Net,
    ram: Ram,
    driver: NaiveDriver,
    next: u64,
}

/// Bytes of a guest's memory for buffers.
const ROOM: u64 = 8 << 20;

impl Guest {
    fn new(net: Net, indirect: bool) -> Self {
        let tables = NaiveDriver::table_bytes(&net.setup);
        let (memory, _) = net.setup.memory(tables + ROOM);
        let ram = Ram(memory);
        let start = net.setup.data();
        Self {
            net,
            driver: NaiveDriver::new(net.setup, &ram, start, indirect),
            ram,
            next: start + tables,
        }
    }

    fn memory(&self) -> &Arc<GuestMemory> {
        &self.ram.0
    }

    /// Everything behind the rings and tables.
    fn buffers(&self) -> Vec<u8> {
        let start = self.net.setup.data() + NaiveDriver::table_bytes(&self.net.setup);
        self.ram.read(start, ROOM as usize)
    }

    /// Room for `len` bytes, with a gap before it so that nothing merges by chance.
    fn place(&mut self, len: usize) -> u64 {
        let end = self.net.setup.data() + NaiveDriver::table_bytes(&self.net.setup) + ROOM;
        if self.next + len as u64 + 64 > end {
            self.next = end - ROOM;
        }
        let at = self.next + 3;
        self.next = at + len as u64;
        at
    }

    /// Makes one chain available whose buffers hold `pieces`, and shows it to the device.
    fn offer(&mut self, pieces: &[&[u8]]) -> u16 {
        let buffers: Vec<DriverBuffer> = pieces
            .iter()
            .map(|piece| {
                let addr = self.place(piece.len());
                self.ram.write(addr, piece);
                DriverBuffer {
                    addr: GuestAddr(addr),
                    len: piece.len() as u32,
                    writable: false,
                }
            })
            .collect();
        let (_, id) = self.driver.add(&buffers).unwrap();
        self.driver.publish();
        id
    }

    /// Makes a chain of device-writable buffers of these lengths available; where they are.
    fn offer_room(&mut self, lens: &[usize]) -> (u16, Vec<(u64, usize)>) {
        let places: Vec<(u64, usize)> = lens.iter().map(|&len| (self.place(len), len)).collect();
        let buffers: Vec<DriverBuffer> = places
            .iter()
            .map(|&(addr, len)| DriverBuffer {
                addr: GuestAddr(addr),
                len: len as u32,
                writable: true,
            })
            .collect();
        let (_, id) = self.driver.add(&buffers).unwrap();
        self.driver.publish();
        (id, places)
    }
}
