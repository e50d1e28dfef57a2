//! A driver by hand beside a session: memory, rings, buffers, and the messages that tell of them, one by one or all at once.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use virtnet_mem::{GuestAddr, UserAddr};
use virtnet_sys::EventFd;
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{MemoryRegion, MemoryTable, VringAddresses, VringFd, VringState};
use virtnet_virtio::{DriverBuffer, DriverQueue, Features, QueueConfig, RingFormat, Used};

use super::session::Session;
use super::{Stop, failed, skipped};
use crate::{Huge, OwnMemory, RegionLayout};

/// Protocol features that are accepted where they are offered. Not STATUS: with it a back-end waits for more. Checks of others ask
/// for them.
pub(super) const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS);

/// Virtio-net header without extensions. Spec: virtio 1.4, 5.1.9.
pub(super) const HEADER: usize = 12;

/// Bytes kept for one buffer.
pub(super) const SLOT: u64 = 2048;

/// What no one has written yet.
const FRESH: u8 = 0xa5;

/// A quiet time, in which a thing that must not happen would have happened.
pub(super) const QUIET: Duration = Duration::from_millis(150);

/// What a driver is to be like.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// Features it cannot do without, besides VERSION_1.
    pub(super) features: Features,
    /// Entries of a ring.
    pub(super) size: u16,
    /// Queue pairs.
    pub(super) pairs: usize,
    /// Where memory lies; one region otherwise.
    pub(super) layout: Option<Vec<RegionLayout>>,
    /// Leave bit 30 out of SET_FEATURES, as old front-ends do.
    pub(super) old: bool,
}

impl Shape {
    pub(super) fn new(ring: RingFormat) -> Self {
        Self {
            features: match ring {
                RingFormat::Split => Features::empty(),
                RingFormat::Packed => Features::RING_PACKED,
            },
            size: 64,
            pairs: 1,
            layout: None,
            old: false,
        }
    }

    pub(super) fn with(mut self, features: Features) -> Self {
        self.features |= features;
        self
    }
}

/// One ring, its events and its buffers.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) queue: DriverQueue,
    pub(super) config: QueueConfig,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    /// Where its buffers are, one for each entry.
    pub(super) slots: GuestAddr,
    free: Vec<u64>,
    held: BTreeMap<u16, Held>,
}

/// A chain that the device holds.
#[derive(Debug)]
struct Held {
    slot: u64,
    bytes: Vec<u8>,
}

/// What was in a buffer when it was made available, and what the device says it wrote.
type Returned = (Vec<u8>, Vec<u8>);

/// The header and the frame of a packet.
pub(super) type Received = ([u8; HEADER], Vec<u8>);

/// A session, and a driver that goes with it.
pub(super) struct Rig {
    pub(super) session: Session,
    pub(super) memory: OwnMemory,
    /// Receiveqs at even places, transmitqs at odd ones.
    pub(super) rings: Vec<Ring>,
    pub(super) features: Features,
    /// Writes to rings are logged, and rings say where.
    pub(super) logs: bool,
    old: bool,
    next: u64,
}

impl Rig {
    /// Lays everything out; the back-end has been told nothing but the greeting.
    pub(super) fn new(session: Session, shape: &Shape) -> Result<Self, Stop> {
        let wanted = shape.features | Features::VERSION_1;
        let missing = wanted - session.offered;
        if !(missing - Features::VERSION_1).is_empty() {
            return skipped(format!("{} is not offered", missing.names().join(", ")));
        }
        let (size, pairs) = (u64::from(shape.size), shape.pairs as u64);
        let bytes = 2 * pairs * (size * (SLOT + 32) + 4 * 4096);
        let memory = match &shape.layout {
            Some(layout) => OwnMemory::with_layout(layout, Huge::No),
            None => OwnMemory::new(bytes, Huge::No),
        };
        let memory = memory.map_err(Stop::host)?;
        let features = wanted - missing;
        let mut rig = Self {
            next: memory.regions()[0].guest.0,
            session,
            memory,
            rings: Vec::new(),
            features,
            logs: false,
            old: shape.old,
        };
        for _ in 0..2 * shape.pairs {
            let ring = rig.lay_out(shape.size)?;
            rig.rings.push(ring);
        }
        Ok(rig)
    }

    fn lay_out(&mut self, size: u16) -> Result<Ring, Stop> {
        let entries = u64::from(size);
        let format = RingFormat::of(self.features);
        let desc = self.alloc(16 * entries, 4096);
        let driver = self.alloc(2 * entries + 6, 64);
        let device = self.alloc(8 * entries + 6, 64);
        let slots = self.alloc(entries * SLOT, 64);
        let user = |addr: GuestAddr| self.memory.memory().user_addr(addr).unwrap_or(UserAddr(0));
        let config = QueueConfig {
            size,
            desc_area: user(desc),
            driver_area: user(driver),
            device_area: user(device),
            base: format.fresh_base(),
            features: self.features,
        };
        Ok(Ring {
            queue: DriverQueue::new(&config, self.memory.memory()).map_err(Stop::host)?,
            config,
            kick: EventFd::new().map_err(Stop::host)?,
            call: EventFd::new().map_err(Stop::host)?,
            slots,
            free: (0..entries).rev().collect(),
            held: BTreeMap::new(),
        })
    }

    pub(super) fn alloc(&mut self, len: u64, align: u64) -> GuestAddr {
        let at = self.next.next_multiple_of(align);
        self.next = at + len;
        GuestAddr(at)
    }

    // What the back-end is told.

    /// Tells everything; packets can flow from now on.
    pub(super) fn start(&mut self) -> Result<(), Stop> {
        self.tell_features()?;
        // As front-ends do it: from the calls some back-ends count how many rings there will be.
        for ring in 0..self.rings.len() {
            self.set_call(ring, true)?;
        }
        self.tell_memory()?;
        for ring in 0..self.rings.len() {
            self.start_ring(ring)?;
        }
        Ok(())
    }

    pub(super) fn tell_features(&self) -> Result<(), Stop> {
        let mut features = self.features;
        if !self.old && self.session.offered.contains(Features::PROTOCOL_FEATURES) {
            features |= Features::PROTOCOL_FEATURES;
        }
        self.session
            .insist(&Request::SetFeatures(features.bits()), &[])
    }

    pub(super) fn tell_memory(&self) -> Result<(), Stop> {
        let files: Vec<BorrowedFd<'_>> = self.memory.regions().iter().map(AsFd::as_fd).collect();
        self.session.insist(&self.memory_table(), &files)
    }

    pub(super) fn memory_table(&self) -> Request {
        Request::SetMemTable(MemoryTable(self.regions()))
    }

    pub(super) fn regions(&self) -> Vec<MemoryRegion> {
        let regions = self.memory.regions().iter();
        regions
            .map(|region| MemoryRegion {
                guest_addr: region.guest.0,
                size: region.size,
                user_addr: region.user.0,
                mmap_offset: region.mmap_offset,
            })
            .collect()
    }

    /// Size, base and place of a ring, its events, and that it is enabled.
    pub(super) fn start_ring(&self, ring: usize) -> Result<(), Stop> {
        self.configure_ring(ring, self.rings[ring].config.base)?;
        self.set_call(ring, true)?;
        self.set_kick(ring, true)?;
        self.enable(ring, true)
    }

    pub(super) fn configure_ring(&self, ring: usize, base: u32) -> Result<(), Stop> {
        let index = index(ring);
        let num = u32::from(self.rings[ring].config.size);
        let session = &self.session;
        session.insist(&Request::SetVringNum(VringState { index, num }), &[])?;
        session.insist(&Request::SetVringBase(VringState { index, num: base }), &[])?;
        session.insist(&Request::SetVringAddr(self.addresses(ring)), &[])
    }

    pub(super) fn addresses(&self, ring: usize) -> VringAddresses {
        let config = &self.rings[ring].config;
        VringAddresses {
            index: index(ring),
            flags: self.logs.into(),
            desc: config.desc_area.0,
            used: config.device_area.0,
            avail: config.driver_area.0,
            log_guest_addr: self.guest_addr(config.device_area).0 * u64::from(self.logs),
        }
    }

    /// Where the guest sees what lies at a user address.
    pub(super) fn guest_addr(&self, user: UserAddr) -> GuestAddr {
        let guest = self.memory.memory().guest_addr(user);
        guest.unwrap_or(GuestAddr(0))
    }

    /// Hands the kick event over, or says that there is none. With it, the ring starts.
    pub(super) fn set_kick(&self, ring: usize, has_fd: bool) -> Result<(), Stop> {
        let kick = [self.rings[ring].kick.as_fd()];
        let request = Request::SetVringKick(word(ring, has_fd));
        self.session.insist(&request, &kick[..usize::from(has_fd)])
    }

    /// The same for the call event.
    pub(super) fn set_call(&self, ring: usize, has_fd: bool) -> Result<(), Stop> {
        let call = [self.rings[ring].call.as_fd()];
        let request = Request::SetVringCall(word(ring, has_fd));
        self.session.insist(&request, &call[..usize::from(has_fd)])
    }

    /// Enables or disables a ring, if that can be said at all.
    pub(super) fn enable(&self, ring: usize, enabled: bool) -> Result<(), Stop> {
        if self.old || !self.session.offered.contains(Features::PROTOCOL_FEATURES) {
            return Ok(());
        }
        let state = VringState {
            index: index(ring),
            num: enabled.into(),
        };
        self.session.insist(&Request::SetVringEnable(state), &[])
    }

    // Buffers.

    /// Makes a frame available on a transmitq, cut into descriptors at these places, and kicks if that is asked for.
    pub(super) fn send_cut(
        &mut self,
        pair: usize,
        frame: &[u8],
        cuts: &[usize],
    ) -> Result<(), Stop> {
        let bytes = [&[0; HEADER], frame].concat();
        let ring = 2 * pair + 1;
        self.add(ring, bytes, cuts, false)?;
        self.publish(ring);
        Ok(())
    }

    pub(super) fn send(&mut self, pair: usize, frame: &[u8]) -> Result<(), Stop> {
        self.send_cut(pair, frame, &[])
    }

    /// Makes `n` buffers of `len` bytes available on a receiveq.
    pub(super) fn make_room(&mut self, pair: usize, n: usize, len: usize) -> Result<(), Stop> {
        for _ in 0..n {
            self.add(2 * pair, vec![FRESH; len], &[], true)?;
        }
        self.publish(2 * pair);
        Ok(())
    }

    /// Makes a chain available that the device does not see yet: its number.
    pub(super) fn add(
        &mut self,
        ring: usize,
        bytes: Vec<u8>,
        cuts: &[usize],
        writable: bool,
    ) -> Result<u16, Stop> {
        let memory = self.memory.memory();
        let ring = &mut self.rings[ring];
        let Some(slot) = ring.free.pop() else {
            return Err(Stop::host("buffers of its own ring"));
        };
        let start = ring.slots.0 + slot * SLOT;
        write(memory, start, &bytes);
        let ends = cuts.iter().copied().chain([bytes.len()]);
        let mut at = 0;
        let buffers: Vec<DriverBuffer> = ends
            .map(|end| {
                let addr = GuestAddr(start + at as u64);
                let len = length(end - at);
                at = end;
                DriverBuffer {
                    addr,
                    len,
                    writable,
                }
            })
            .collect();
        let Some(id) = ring.queue.add(&buffers) else {
            return Err(Stop::host("descriptors of its own ring"));
        };
        ring.held.insert(id, Held { slot, bytes });
        Ok(id)
    }

    /// Shows the device what was added, and kicks if that is asked for.
    pub(super) fn publish(&mut self, ring: usize) -> bool {
        let ring = &mut self.rings[ring];
        let kicks = ring.queue.publish();
        if kicks {
            // Our own event; a counter that is full kicks all the same.
            drop(ring.kick.signal());
        }
        kicks
    }

    /// Takes back what the device has used: what was in each buffer at first, and what it says it wrote.
    fn reap(&mut self, ring: usize) -> Result<Vec<Returned>, Stop> {
        let memory = self.memory.memory();
        let name = format!("ring {ring}");
        let ring = &mut self.rings[ring];
        let mut used = [Used::default(); 64];
        let mut returned = Vec::new();
        loop {
            let n = match ring.queue.reap(&mut used) {
                Ok(0) => return Ok(returned),
                Ok(n) => n,
                Err(error) => return failed(format!("{name} was broken: {error}")),
            };
            for Used { id, len } in &used[..n] {
                let Some(held) = ring.held.remove(id) else {
                    return failed(format!("{name}: chain {id} came back twice"));
                };
                let len = usize::try_from(*len)
                    .unwrap_or(usize::MAX)
                    .min(held.bytes.len());
                let written = read(memory, ring.slots.0 + held.slot * SLOT, len);
                ring.free.push(held.slot);
                returned.push((held.bytes, written));
            }
        }
    }

    /// How many frames of a transmitq came back used since the last question.
    pub(super) fn taken(&mut self, pair: usize) -> Result<usize, Stop> {
        let returned = self.reap(2 * pair + 1)?;
        match returned.iter().find(|(_, written)| !written.is_empty()) {
            Some((_, written)) => failed(format!(
                "a device-readable buffer came back as written, {} bytes",
                written.len()
            )),
            None => Ok(returned.len()),
        }
    }

    /// The frames that came into a receiveq since the last question, each with its header.
    pub(super) fn received(&mut self, pair: usize) -> Result<Vec<Received>, Stop> {
        let returned = self.reap(2 * pair)?;
        let mut frames = Vec::new();
        let mut rest = returned.as_slice();
        while let Some(((_, first), mut more)) = rest.split_first() {
            let Some((&header, frame)) = first.split_first_chunk() else {
                return failed(format!(
                    "a received packet has {} bytes, not even a header",
                    first.len()
                ));
            };
            let mut frame = frame.to_vec();
            // Without MRG_RXBUF it says 1, or should: that is a check of its own.
            let buffers = if self.features.contains(Features::MRG_RXBUF) {
                usize::from(u16::from_le_bytes([header[10], header[11]]))
            } else {
                1
            };
            if buffers == 0 || buffers > 1 + more.len() {
                return failed(format!(
                    "num_buffers is {buffers}, and {} came back together",
                    1 + more.len()
                ));
            }
            let room_left = |(before, written): &Returned| written.len() < before.len();
            if rest[..buffers - 1].iter().any(room_left) {
                return failed("a buffer that is not its packet's last is not filled");
            }
            for (_, written) in &more[..buffers - 1] {
                frame.extend(written);
            }
            more = &more[buffers - 1..];
            frames.push((header, frame));
            rest = more;
        }
        Ok(frames)
    }

    /// Waits until as many frames of a transmitq have come back.
    pub(super) fn wait_taken(&mut self, pair: usize, n: usize) -> Result<(), Stop> {
        let mut taken = 0;
        let all = self.eventually(|rig| {
            taken += rig.taken(pair)?;
            Ok((taken >= n).then_some(()))
        })?;
        match all {
            Some(()) => Ok(()),
            None => failed(format!(
                "of {n} frames {taken} were taken within {:?}",
                self.session.patience()
            )),
        }
    }

    /// Asks again and again, as long as the back-end may take.
    pub(super) fn eventually<T>(
        &mut self,
        mut question: impl FnMut(&mut Self) -> Result<Option<T>, Stop>,
    ) -> Result<Option<T>, Stop> {
        let start = Instant::now();
        loop {
            let late = start.elapsed() > self.session.patience();
            let answer = question(self)?;
            if answer.is_some() || late {
                return Ok(answer);
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// The bytes of an area, as they are now.
    pub(super) fn read_user(&self, addr: UserAddr, len: usize) -> Vec<u8> {
        read(self.memory.memory(), self.guest_addr(addr).0, len)
    }

    /// Everything a ring consists of, as it is now.
    pub(super) fn ring_bytes(&self, ring: usize) -> Vec<u8> {
        let QueueConfig {
            size,
            desc_area,
            driver_area,
            device_area,
            ..
        } = self.rings[ring].config;
        let entries = usize::from(size);
        [
            self.read_user(desc_area, 16 * entries),
            self.read_user(driver_area, 2 * entries + 6),
            self.read_user(device_area, 8 * entries + 6),
        ]
        .concat()
    }
}

pub(super) fn write(memory: &virtnet_mem::GuestMemory, addr: u64, bytes: &[u8]) {
    let mut at = 0;
    let there = memory.translate_all(GuestAddr(addr), length(bytes.len()), |segment| {
        at += memory.slice(segment).copy_from(&bytes[at..]);
    });
    debug_assert!(there, "our own buffers lie in our own memory");
}

fn read(memory: &virtnet_mem::GuestMemory, addr: u64, len: usize) -> Vec<u8> {
    let (mut bytes, mut at) = (vec![0; len], 0);
    let there = memory.translate_all(GuestAddr(addr), length(len), |segment| {
        at += memory.slice(segment).copy_to(&mut bytes[at..]);
    });
    debug_assert!(there, "our own buffers lie in our own memory");
    bytes
}

pub(super) fn index(ring: usize) -> u32 {
    u32::try_from(ring).unwrap_or(u32::MAX)
}

pub(super) fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// The word that names a ring in a message with, or without, a descriptor.
pub(super) fn word(ring: usize, has_fd: bool) -> VringFd {
    VringFd::new(u8::try_from(ring).unwrap_or(u8::MAX), has_fd)
}
