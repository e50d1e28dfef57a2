//! A guest that is written by hand: its memory, which it watches, and its queues.
//!
//! [`FakeGuest`] keeps a second copy of everything that it has written. Whatever differs from it, outside of what a device may
//! write, is found by [`FakeGuest::check`] and named by address. Buffers are poisoned when they are lent for writing and when
//! they come back, and unused bytes lie between them, so that a device that reads too late or writes too far does not get away
//! with it.
//!
//! Queues ([`SplitQueue`], [`PackedQueue`], both a [`GuestQueue`]) write their rings into that memory descriptor by descriptor.

mod attack;
mod net;
mod packed;
mod split;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtnet_mem::{GuestAddr, GuestMemory, Segment, UserAddr};
use virtnet_ports::{Huge, OwnMemory};
use virtnet_virtio::{Features, QueueConfig};

pub use attack::{Attack, Expect};
pub use net::{HEADER_LEN, net_header, offer_frame, packets};
pub use packed::PackedQueue;
pub use split::SplitQueue;

/// What memory is filled with when it is lent for writing.
pub(crate) const LENT: u8 = 0xa5;

/// What memory is filled with when it comes back.
const RETURNED: u8 = 0xdd;

/// Bytes that nobody may write between two things in memory.
const RED_ZONE: u64 = 16;

/// A buffer of the guest, as a descriptor names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it is.
    pub addr: GuestAddr,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes it (true) or reads it.
    pub writable: bool,
}

/// A chain that the device has given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Returned {
    /// What [`GuestQueue::offer`] answered.
    pub id: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
    /// What it wrote: that many bytes of the chain's device-writable buffers.
    pub bytes: Vec<u8>,
}

/// When the driver wants to be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// With everything that is used.
    Always,
    /// With nothing.
    Never,
    /// When the entry at this place is used: an index of the used ring (split), or a slot with the wrap counter in bit 15
    /// (packed). Needs EVENT_IDX.
    At(u16),
}

/// A descriptor, field by field, with whatever is put into them. A packed ring has the id where a split one has `next`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Address of the buffer.
    pub addr: u64,
    /// Length of the buffer.
    pub len: u32,
    /// [`Self::NEXT`], [`Self::WRITE`], [`Self::INDIRECT`], and two more in a packed ring.
    pub flags: u16,
    /// Index of the next descriptor, or buffer id.
    pub next_or_id: u16,
}

impl RawDescriptor {
    /// The chain goes on.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;

    /// Names a buffer.
    #[must_use]
    pub fn of(buffer: Buffer) -> Self {
        Self {
            addr: buffer.addr.0,
            len: buffer.len,
            flags: if buffer.writable { Self::WRITE } else { 0 },
            next_or_id: 0,
        }
    }

    /// As it stands in a split queue's table. Spec: virtio 1.4, 2.7.5.
    #[must_use]
    pub fn split_bytes(self) -> [u8; 16] {
        self.bytes(self.flags, self.next_or_id)
    }

    /// As it stands in a packed ring. Spec: virtio 1.4, 2.8.13.
    #[must_use]
    pub fn packed_bytes(self) -> [u8; 16] {
        self.bytes(self.next_or_id, self.flags)
    }

    fn bytes(self, first: u16, second: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&first.to_le_bytes());
        bytes[14..].copy_from_slice(&second.to_le_bytes());
        bytes
    }
}

/// A virtqueue of a [`FakeGuest`], of either format, as its driver.
pub trait GuestQueue: fmt::Debug {
    /// How the device is to be told about the queue. `features` decide nothing here: they are the caller's.
    fn config(&self, guest: &FakeGuest, features: Features) -> QueueConfig;

    /// Makes a chain of buffers available, one descriptor each; its id. Nobody is kicked.
    ///
    /// # Panics
    /// When there are no buffers, or more than free descriptors.
    fn offer(&mut self, guest: &mut FakeGuest, buffers: &[Buffer]) -> u16;

    /// Makes a chain of buffers available as one descriptor that points at a table; its id.
    ///
    /// # Panics
    /// As [`offer`](Self::offer).
    fn offer_indirect(&mut self, guest: &mut FakeGuest, buffers: &[Buffer]) -> u16;

    /// Makes something available that no driver should; what a device is to do with it.
    ///
    /// `writable` says what the queue is for: device-writable buffers (a receiveq) or device-readable ones. `None`: this format
    /// has no such attack. Needs 4 free descriptors.
    fn attack(&mut self, guest: &mut FakeGuest, attack: Attack, writable: bool) -> Option<Expect>;

    /// Takes back what the device has used, in the order of the ring, and checks all memory.
    ///
    /// # Panics
    /// When the device has returned what it does not hold, or written where it may not.
    fn collect(&mut self, guest: &mut FakeGuest) -> Vec<Returned>;

    /// Whether the device asked to be kicked for what was made available since the last question.
    fn take_kick(&mut self, guest: &FakeGuest) -> bool;

    /// Says when the driver wants to be called.
    fn set_calls(&mut self, guest: &mut FakeGuest, calls: Calls);

    /// How many descriptors are free.
    fn free(&self) -> usize;

    /// How many chains the device holds.
    fn outstanding(&self) -> usize;
}

/// Guest memory with a second copy, and room to put things.
pub struct FakeGuest {
    memory: Arc<GuestMemory>,
    /// What every region should contain, by its first address.
    shadow: BTreeMap<u64, Vec<u8>>,
    /// What the device may write at any time: its parts of rings.
    device_areas: Vec<Range<u64>>,
    /// Device-writable buffers that the device holds.
    lent: Vec<Range<u64>>,
    /// Where the next thing is put: everything from here to the end of its region is free.
    next: u64,
    /// What was allocated, by address, with its length.
    allocated: BTreeMap<u64, u64>,
    /// What has been given back, by length.
    freed: BTreeMap<u64, Vec<u64>>,
}

impl fmt::Debug for FakeGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "FakeGuest({} regions, {} buffers lent)",
            self.shadow.len(),
            self.lent.len()
        )
    }
}

impl FakeGuest {
    /// A guest with one region of `size` bytes, whose user addresses are not its guest addresses.
    ///
    /// # Panics
    /// When the system has no memory.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let own = OwnMemory::new(size, Huge::No).expect("memory for a guest");
        Self::over(own.memory())
    }

    /// A guest in given memory, with as many regions as that has. What it contains is what it should.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn over(memory: &Arc<GuestMemory>) -> Self {
        let mut guest = Self {
            memory: Arc::clone(memory),
            shadow: BTreeMap::new(),
            device_areas: Vec::new(),
            lent: Vec::new(),
            next: 0,
            allocated: BTreeMap::new(),
            freed: BTreeMap::new(),
        };
        for (index, region) in memory.regions().iter().enumerate() {
            guest
                .shadow
                .insert(region.guest().0, guest.read_region(index));
        }
        let first = guest.shadow.keys().next();
        guest.next = *first.expect("a guest needs memory");
        guest
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The front-end's address of a guest address.
    ///
    /// # Panics
    /// When it is not in memory.
    #[must_use]
    #[track_caller]
    pub fn user_addr(&self, addr: GuestAddr) -> UserAddr {
        let user = self.memory.user_addr(addr);
        user.unwrap_or_else(|| panic!("{addr} is not in memory"))
    }

    /// Reads memory.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    #[track_caller]
    pub fn read(&self, addr: GuestAddr, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut at = 0;
        let there = self
            .memory
            .translate_all(addr, length(len), |segment: Segment| {
                at += self.memory.slice(segment).copy_to(&mut bytes[at..]);
            });
        assert!(there, "{len} bytes at {addr} are not in memory");
        bytes
    }

    /// Writes memory.
    ///
    /// # Panics
    /// When it is not there.
    #[track_caller]
    pub fn write(&mut self, addr: GuestAddr, bytes: &[u8]) {
        let mut at = 0;
        let there = self
            .memory
            .translate_all(addr, length(bytes.len()), |segment: Segment| {
                at += self.memory.slice(segment).copy_from(&bytes[at..]);
            });
        assert!(there, "{} bytes at {addr} are not in memory", bytes.len());
        self.note(addr, bytes);
    }

    /// Everything that its memory contains: the regions in order.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.barrier();
        let regions = (0..self.shadow.len()).map(|index| self.read_region(index));
        regions.collect::<Vec<_>>().concat()
    }

    /// Goes on in other memory, of the same layout, that contains this.
    ///
    /// # Panics
    /// When it is too small.
    pub(crate) fn move_to(&mut self, memory: &Arc<GuestMemory>, mut contents: &[u8]) {
        for (index, (&start, bytes)) in self.shadow.iter().enumerate() {
            let region = &memory.regions()[index];
            assert_eq!(region.guest(), GuestAddr(start), "another layout");
            let (here, rest) = contents.split_at(bytes.len());
            contents = rest;
            let whole = Segment {
                offset: 0,
                len: length(here.len()),
                region: length(index),
            };
            memory.slice(whole).copy_from(here);
        }
        self.memory = Arc::clone(memory);
    }

    /// Sees the device's writes, and lets it see ours.
    pub(crate) fn barrier(&self) {
        fence(Ordering::SeqCst);
    }

    pub(crate) fn read_u16(&self, addr: u64) -> u16 {
        let bytes = self.read(GuestAddr(addr), 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    pub(crate) fn read_u32(&self, addr: u64) -> u32 {
        let bytes = self.read(GuestAddr(addr), 4);
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    pub(crate) fn write_u16(&mut self, addr: u64, value: u16) {
        self.write(GuestAddr(addr), &value.to_le_bytes());
    }

    /// Finds room for `len` bytes at an odd multiple of `align`, so that nothing is aligned by accident.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn alloc(&mut self, len: u64, align: u64) -> GuestAddr {
        let room = len.max(1);
        if align == 1
            && let Some(addr) = self.freed.get_mut(&room).and_then(Vec::pop)
        {
            self.allocated.insert(addr, room);
            return GuestAddr(addr);
        }
        let even = align * 2;
        let mut addr = (self.next + RED_ZONE).next_multiple_of(even) + align;
        while !self.has(addr, room) {
            // The region is full: on to the next one.
            let start = self.shadow.range(self.next + 1..).next();
            let (&start, _) = start.unwrap_or_else(|| panic!("no room for {len} bytes"));
            self.next = start;
            addr = (start + RED_ZONE).next_multiple_of(even) + align;
        }
        self.next = addr + room;
        self.allocated.insert(addr, room);
        GuestAddr(addr)
    }

    /// Puts what comes next at `addr` or behind it, whatever is free before that.
    ///
    /// # Panics
    /// When it is not in memory.
    #[track_caller]
    pub fn allocate_from(&mut self, addr: GuestAddr) {
        assert!(self.has(addr.0, 1), "{addr} is not in memory");
        self.next = addr.0;
        self.freed.clear();
    }

    /// A device-readable buffer with these bytes.
    #[track_caller]
    pub fn readable(&mut self, bytes: &[u8]) -> Buffer {
        let addr = self.alloc(bytes.len() as u64, 1);
        self.write(addr, bytes);
        Buffer {
            addr,
            len: length(bytes.len()),
            writable: false,
        }
    }

    /// A device-writable buffer of `len` bytes, poisoned.
    #[track_caller]
    pub fn writable(&mut self, len: u32) -> Buffer {
        let addr = self.alloc(u64::from(len), 1);
        Buffer {
            addr,
            len,
            writable: true,
        }
    }

    /// Lets the device write `range` at any time.
    pub(crate) fn device_may_write(&mut self, range: Range<u64>) {
        self.device_areas.push(range);
    }

    /// Hands buffers to the device: the writable ones are poisoned and may be written from now on.
    pub(crate) fn lend(&mut self, buffers: &[Buffer]) {
        for buffer in buffers.iter().filter(|buffer| buffer.writable) {
            self.write(buffer.addr, &vec![LENT; buffer.len as usize]);
            self.lent.push(range_of(buffer));
        }
    }

    /// Whether the device holds this device-writable buffer.
    #[must_use]
    pub fn is_lent(&self, buffer: Buffer) -> bool {
        self.lent.contains(&range_of(&buffer))
    }

    /// Takes buffers back of which the device says that it wrote the first `len` writable bytes; those bytes.
    ///
    /// Memory that came from [`readable`](Self::readable) or [`writable`](Self::writable) is poisoned and free again.
    #[track_caller]
    pub(crate) fn settle(&mut self, buffers: &[Buffer], len: u32) -> Vec<u8> {
        let mut written = Vec::new();
        let mut left = len;
        for buffer in buffers.iter().filter(|buffer| buffer.writable) {
            let range = range_of(buffer);
            let lent = self.lent.iter().position(|lent| *lent == range);
            self.lent
                .swap_remove(lent.expect("a buffer that is held is lent"));
            let here = left.min(buffer.len);
            left -= here;
            let bytes = self.read(buffer.addr, here as usize);
            self.note(buffer.addr, &bytes);
            written.extend(bytes);
        }
        assert_eq!(
            left,
            0,
            "the device says it wrote {len} bytes, and the chain has room for {}",
            written.len()
        );
        // Before the poison hides what was written behind the last byte.
        self.check();
        for buffer in buffers {
            if let Some(room) = self.allocated.remove(&buffer.addr.0) {
                self.write(buffer.addr, &vec![RETURNED; buffer.len as usize]);
                self.freed.entry(room).or_default().push(buffer.addr.0);
            }
        }
        written
    }

    /// Compares all memory with what it should contain, except for what the device may write.
    ///
    /// # Panics
    /// When it differs.
    #[track_caller]
    pub fn check(&self) {
        self.barrier();
        for (index, (&start, expected)) in self.shadow.iter().enumerate() {
            let mut found = self.read_region(index);
            for range in self.device_areas.iter().chain(&self.lent) {
                let within = |addr: u64| {
                    let offset = addr.saturating_sub(start).min(expected.len() as u64);
                    usize::try_from(offset).unwrap_or(usize::MAX)
                };
                let hidden = within(range.start)..within(range.end);
                found[hidden.clone()].copy_from_slice(&expected[hidden]);
            }
            if found == *expected {
                continue;
            }
            let differs = found.iter().zip(expected).position(|(a, b)| a != b);
            let at = differs.unwrap_or_default();
            panic!(
                "the device wrote where it may not: at {} there is {:#04x} instead of {:#04x}",
                GuestAddr(start + at as u64),
                found[at],
                expected[at]
            );
        }
    }

    /// Whether `len` bytes at `addr` are in one region.
    fn has(&self, addr: u64, len: u64) -> bool {
        let region = self.shadow.range(..=addr).next_back();
        region.is_some_and(|(start, bytes)| addr - start + len + RED_ZONE <= bytes.len() as u64)
    }

    fn read_region(&self, index: usize) -> Vec<u8> {
        let size = self.memory.regions()[index].size();
        let segment = Segment {
            offset: 0,
            len: u32::try_from(size).expect("a fake guest is small"),
            region: length(index),
        };
        let mut bytes = vec![0; segment.len as usize];
        self.memory.slice(segment).copy_to(&mut bytes);
        bytes
    }

    /// From now on, memory should contain `bytes` at `addr`.
    fn note(&mut self, addr: GuestAddr, bytes: &[u8]) {
        for (at, &byte) in (addr.0..).zip(bytes) {
            let region = self.shadow.range_mut(..=at).next_back();
            let (start, region) = region.expect("it was written");
            region[usize::try_from(at - start).unwrap_or(usize::MAX)] = byte;
        }
    }
}

fn range_of(buffer: &Buffer) -> Range<u64> {
    buffer.addr.0..buffer.addr.0 + u64::from(buffer.len)
}

/// A length as descriptors count.
pub(crate) fn length(len: usize) -> u32 {
    u32::try_from(len).expect("a fake guest is small")
}

#[cfg(test)]
mod tests;
