//! What the tests share: guest memory as plain bytes, a queue's layout in it, naive peers, and a model of what is right.

pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod theirs;
pub(crate) mod world;

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr};
use virtnet_virtio::{Features, QueueConfig, RingFormat};

/// Guest memory as one who is not careful sees it: bytes at addresses. An address outside it fails the test.
#[derive(Clone, Debug)]
pub(crate) struct Ram(pub(crate) Arc<GuestMemory>);

macro_rules! word {
    ($get:ident, $set:ident, $word:ty) => {
        pub(crate) fn $get(&self, addr: u64) -> $word {
            let bytes = self.read(addr, size_of::<$word>());
            <$word>::from_le_bytes(bytes.try_into().unwrap())
        }

        pub(crate) fn $set(&self, addr: u64, value: $word) {
            self.write(addr, &value.to_le_bytes());
        }
    };
}

impl Ram {
    word!(u16, set_u16, u16);
    word!(u32, set_u32, u32);
    word!(u64, set_u64, u64);

    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut at = 0;
        assert!(
            self.0.translate_all(GuestAddr(addr), len as u32, |piece| {
                at += self.0.slice(piece).copy_to(&mut bytes[at..]);
            }),
            "{len} bytes at {addr:#x} are not memory"
        );
        bytes
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        let mut at = 0;
        assert!(
            self.0
                .translate_all(GuestAddr(addr), bytes.len() as u32, |piece| {
                    at += self.0.slice(piece).copy_from(&bytes[at..]);
                }),
            "{} bytes at {addr:#x} are not memory",
            bytes.len()
        );
    }

    pub(crate) fn fill(&self, addr: u64, len: usize, byte: u8) {
        self.write(addr, &vec![byte; len]);
    }
}

/// A queue to be tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setup {
    pub(crate) format: RingFormat,
    pub(crate) size: u16,
    pub(crate) event_idx: bool,
    pub(crate) in_order: bool,
    /// Ring positions that went by before the test starts: entries (split), slots (packed).
    pub(crate) start: u64,
}

impl Setup {
    pub(crate) fn new(format: RingFormat, size: u16) -> Self {
        Self {
            format,
            size,
            event_idx: false,
            in_order: false,
            start: 0,
        }
    }

    /// Both formats with and without each option, wherever a ring of `size` is possible.
    pub(crate) fn all(size: u16) -> impl Iterator<Item = Self> {
        let options = (0..8).map(move |bits| Self {
            format: if bits & 1 == 0 {
                RingFormat::Split
            } else {
                RingFormat::Packed
            },
            event_idx: bits & 2 != 0,
            in_order: bits & 4 != 0,
            ..Self::new(RingFormat::Split, size)
        });
        options.filter(|s| QueueConfig::size_is_valid(u32::from(s.size), s.format))
    }

    pub(crate) fn is_packed(&self) -> bool {
        self.format == RingFormat::Packed
    }

    pub(crate) fn features(&self) -> Features {
        let mut features = Features::VERSION_1 | Features::INDIRECT_DESC;
        features.set(Features::RING_PACKED, self.is_packed());
        features.set(Features::EVENT_IDX, self.event_idx);
        features.set(Features::IN_ORDER, self.in_order);
        features
    }

    /// Slot and wrap counter (packed), or index (split), of ring position `at`.
    pub(crate) fn bits(&self, at: u64) -> u16 {
        let size = u64::from(self.size);
        if self.is_packed() {
            (at % size) as u16 | u16::from((at / size).is_multiple_of(2)) << 15
        } else {
            at as u16
        }
    }

    /// Start of the descriptor area. The others follow on pages of their own, then what [`Self::data`] says.
    pub(crate) fn desc(&self) -> u64 {
        0x10_0000
    }

    pub(crate) fn driver_area(&self) -> u64 {
        next_page(self.desc() + 16 * u64::from(self.size))
    }

    pub(crate) fn device_area(&self) -> u64 {
        next_page(self.driver_area() + 6 + 2 * u64::from(self.size))
    }

    pub(crate) fn data(&self) -> u64 {
        next_page(self.device_area() + 6 + 8 * u64::from(self.size))
    }

    pub(crate) fn config(&self) -> QueueConfig {
        let start = u32::from(self.bits(self.start));
        QueueConfig {
            size: self.size,
            desc_area: user(self.desc()),
            driver_area: user(self.driver_area()),
            device_area: user(self.device_area()),
            base: if self.is_packed() {
                start | start << 16
            } else {
                start
            },
            features: self.features(),
        }
    }

    /// Memory that holds the rings and `data` bytes behind them, all zero, and the file behind it.
    ///
    /// The front-end has it at other addresses than the guest.
    pub(crate) fn memory(&self, data: u64) -> (Arc<GuestMemory>, File) {
        let len = next_page(self.data() + data) - self.desc();
        let file = zero_file(len);
        let region = region_of(&file, 0, len, self.desc());
        let memory = GuestMemory::new(vec![region]).unwrap();
        (Arc::new(memory), file)
    }

    /// Whether a side that wrote `word` is to be notified when the other one has gone from `old` to `new`: looks at every
    /// position in between. `flags` are those of a split ring without event index.
    fn is_due(&self, event: u16, old: u64, new: u64) -> bool {
        (old..new).any(|at| self.bits(at) == event)
    }

    /// Whether the driver that went from `old` to `new` has to kick, by what the device has written.
    pub(crate) fn kick_is_due(&self, ram: &Ram, old: u64, new: u64) -> bool {
        let area = self.device_area();
        if self.is_packed() {
            return self.packed_is_due(ram, area, old, new);
        }
        if self.event_idx {
            self.is_due(ram.u16(area + 4 + 8 * u64::from(self.size)), old, new)
        } else {
            new > old && ram.u16(area) & 1 == 0
        }
    }

    /// Whether the device that went from `old` to `new` has to call, by what the driver has written.
    pub(crate) fn call_is_due(&self, ram: &Ram, old: u64, new: u64) -> bool {
        let area = self.driver_area();
        if self.is_packed() {
            return self.packed_is_due(ram, area, old, new);
        }
        if self.event_idx {
            self.is_due(ram.u16(area + 4 + 2 * u64::from(self.size)), old, new)
        } else {
            new > old && ram.u16(area) & 1 == 0
        }
    }

    fn packed_is_due(&self, ram: &Ram, area: u64, old: u64, new: u64) -> bool {
        match ram.u16(area + 2) & 3 {
            1 => false,
            2 => self.is_due(ram.u16(area), old, new),
            _ => new > old,
        }
    }
}

/// Where the front-end has what the guest has at `addr`.
pub(crate) fn user(addr: u64) -> UserAddr {
    UserAddr(addr + 0x7f00_0000_0000)
}

/// A nameless file of `len` zeros.
pub(crate) fn zero_file(len: u64) -> File {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let (process, n) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let shared = Path::new("/dev/shm");
    let folder = if shared.is_dir() {
        shared.to_owned()
    } else {
        std::env::temp_dir()
    };
    let path = folder.join(format!("virtnet-virtio-{process}-{n}"));
    let file = File::create_new(&path).unwrap();
    file.set_len(len).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file
}

/// `len` bytes of `file` from `offset` on, at guest address `addr`.
pub(crate) fn region_of(file: &File, offset: u64, len: u64, addr: u64) -> Region {
    let fd = file.try_clone().unwrap().into();
    Region::map_file(fd, offset, len, GuestAddr(addr), user(addr)).unwrap()
}

fn next_page(addr: u64) -> u64 {
    addr.next_multiple_of(4096)
}

/// Numbers that look random and are the same in every run.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub(crate) fn next(&mut self) -> u64 {
        // Steele and Vigna's splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `n`; 0 for no numbers.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        if n == 0 {
            0
        } else {
            (self.next() % n as u64) as usize
        }
    }
}
