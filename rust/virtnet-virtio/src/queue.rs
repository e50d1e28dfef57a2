//! A virtqueue of either format, from either side: chosen once per burst, so that the loops below know which they run.

use std::fmt;

use virtnet_mem::{
    GuestAddr, GuestMemory, GuestSlice, Iommu, LoggedArea, MemoryError, Miss, Table, Translate,
    UserAddr, Window,
};

use crate::packed::{self, PackedDevice, PackedDriver};
use crate::split::{self, SplitDevice, SplitDriver};
use crate::{Access, ChainBytes, Chains, Features, RingError, StartError};

/// The two formats of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RingFormat {
    /// Spec: virtio 1.4, 2.7, Split Virtqueues.
    Split,
    /// Spec: virtio 1.4, 2.8, Packed Virtqueues.
    Packed,
}

impl RingFormat {
    /// The format that negotiated features choose.
    #[must_use]
    pub fn of(features: Features) -> Self {
        if features.contains(Features::RING_PACKED) {
            Self::Packed
        } else {
            Self::Split
        }
    }

    /// Its name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Packed => "packed",
        }
    }

    /// The base of a ring that nobody has used yet: the form of SET_VRING_BASE.
    #[must_use]
    pub fn fresh_base(self) -> u32 {
        match self {
            Self::Split => 0,
            Self::Packed => 0x8000_8000,
        }
    }
}

impl fmt::Display for RingFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Everything that makes a queue run: settable until then, fixed from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Entries: 1 to 32768, a power of two for the split format.
    pub size: u16,
    /// Descriptor area, in the front-end's addresses.
    pub desc_area: UserAddr,
    /// Driver area: available ring, or driver event suppression.
    pub driver_area: UserAddr,
    /// Device area: used ring, or device event suppression.
    pub device_area: UserAddr,
    /// Where to start: the form of SET_VRING_BASE. A split ring starts where its used index stands, which is the same unless the
    /// base is out of date.
    pub base: u32,
    /// What was negotiated.
    pub features: Features,
}

impl QueueConfig {
    /// The most entries a queue can have.
    pub const SIZE_MAX: u16 = 32_768;

    /// The three areas of the ring: where each begins, and how many bytes it has.
    #[must_use]
    pub fn areas(&self) -> [(UserAddr, usize); 3] {
        let event_idx = self.features.contains(Features::EVENT_IDX);
        let [desc, driver, device] = match RingFormat::of(self.features) {
            RingFormat::Split => [
                split::layout::desc_bytes(self.size),
                split::layout::avail_bytes(self.size, event_idx),
                split::layout::used_bytes(self.size, event_idx),
            ],
            RingFormat::Packed => {
                let event = packed::layout::EVENT_BYTES;
                [Table::ENTRY * usize::from(self.size), event, event]
            }
        };
        [
            (self.desc_area, desc),
            (self.driver_area, driver),
            (self.device_area, device),
        ]
    }

    /// Whether the format allows this many entries.
    #[must_use]
    pub fn size_is_valid(size: u32, format: RingFormat) -> bool {
        (1..=u32::from(Self::SIZE_MAX)).contains(&size)
            && (format == RingFormat::Packed || size.is_power_of_two())
    }
}

/// A running queue seen by the device.
#[derive(Debug)]
pub enum DeviceQueue {
    /// Split format.
    Split(SplitDevice),
    /// Packed format.
    Packed(PackedDevice),
}

/// Where a queue stands, seen from one of its sides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// The next available entry: a free-running index of a split ring, a slot of a packed one.
    pub avail: u16,
    /// The next used entry, likewise.
    pub used: u16,
    /// The wrap counters of both, of a packed ring.
    pub wraps: Option<[bool; 2]>,
    /// Of a split ring, the index that the other side has published: nobody has checked it.
    pub published: Option<u16>,
    /// What the other side has published and this one has not looked at: chains of a split ring, slots of a packed one, at most as
    /// many as the ring has entries. A driver knows of a packed ring only whether it is none.
    pub waiting: u16,
}

macro_rules! either {
    ($queue:expr, $of:ident, $inner:ident => $what:expr) => {
        match $queue {
            $of::Split($inner) => $what,
            $of::Packed($inner) => $what,
        }
    };
}

impl DeviceQueue {
    /// Starts a queue in the negotiated format. The caller has checked [`QueueConfig::size_is_valid`].
    ///
    /// # Errors
    /// [`MemoryError`] when a ring area is not aligned or not wholly in memory.
    pub fn new(config: &QueueConfig, memory: &GuestMemory) -> Result<Self, MemoryError> {
        Ok(match RingFormat::of(config.features) {
            RingFormat::Split => Self::Split(SplitDevice::new(config, memory)?),
            RingFormat::Packed => Self::Packed(PackedDevice::new(config, memory)?),
        })
    }

    /// Logs from now on what is written to the queue of `config`, if the writes to `memory` are logged. `device_area` is where the
    /// Device Area is to be logged: it need not be in memory.
    pub fn log_to(&mut self, memory: &GuestMemory, config: &QueueConfig, device_area: GuestAddr) {
        let Some(log) = memory.log() else {
            return;
        };
        // Behind an IOMMU a front-end has only the I/O address to tell, and the log is one of guest addresses.
        let translated = memory
            .iotlb()
            .and_then(|_| memory.guest_addr(config.device_area));
        let device_area = LoggedArea::new(log, translated.unwrap_or(device_area));
        match self {
            Self::Split(queue) => queue.log_to(device_area),
            Self::Packed(queue) => {
                // Used descriptors are written to the Descriptor Area, about which a front-end says nothing.
                let descriptors = memory.guest_addr(config.desc_area);
                let descriptors = descriptors.map(|start| LoggedArea::new(log, start));
                queue.log_to(descriptors, device_area);
            }
        }
    }

    /// Logs all of the ring that a device writes, if writes to it are logged: for a queue that takes over from a device that was
    /// killed. What that has written it may not have lived to log, and what finding its place has changed is not logged otherwise.
    pub fn log_all(&self) {
        either!(self, Self, queue => queue.log_all());
    }

    /// The base to start from where the one in `config` may be out of date, because the device before this one was killed. Of a
    /// split ring it does not matter, see [`SplitDevice::new`]; of a packed ring it is compared with the descriptors.
    ///
    /// # Errors
    /// [`StartError`] when a ring area is not in memory, or it cannot be told where the queue is to go on.
    pub fn recover(config: &QueueConfig, memory: &GuestMemory) -> Result<u32, StartError> {
        match RingFormat::of(config.features) {
            RingFormat::Split => Ok(config.base),
            RingFormat::Packed => PackedDevice::recover(config, memory),
        }
    }

    /// Starts a queue and goes on recording what is in flight in `record`, whose first [`region_bytes`](crate::inflight::region_bytes)
    /// are looked at. What was in flight when the device before this one was killed comes first, and the base is that of the record
    /// where it has one.
    ///
    /// # Errors
    /// [`StartError`] as of [`Self::recover`], and when the record makes no sense.
    pub fn resume(
        config: &QueueConfig,
        memory: &GuestMemory,
        record: &Window,
    ) -> Result<Self, StartError> {
        Ok(match RingFormat::of(config.features) {
            RingFormat::Split => Self::Split(SplitDevice::resume(config, memory, record)?),
            RingFormat::Packed => Self::Packed(PackedDevice::resume(config, memory, record)?),
        })
    }

    /// How many chains a device before this one had taken and not given back, which this one takes again: by the record that it was
    /// resumed from, or by a base that is ahead of a split ring's used index. Where neither says so nothing is lost either, but
    /// nobody knows how many they are.
    #[must_use]
    pub fn taken_again(&self) -> u16 {
        either!(self, Self, queue => queue.taken_again())
    }

    /// Takes up to `max` chains; see [`SplitDevice::take`].
    ///
    /// # Errors
    /// [`RingError`] when the ring cannot be followed any further.
    #[inline(never)]
    pub fn take(
        &mut self,
        memory: &GuestMemory,
        access: Access,
        max: usize,
        chains: &mut Chains,
    ) -> Result<usize, RingError> {
        let mut bytes = ChainBytes::new();
        self.take_with_bytes(memory, access, max, chains, &mut bytes)
    }

    /// The same with the bytes of those that are one plain buffer: the usual case, in which they need not be looked for again. The
    /// others' places in `bytes` stay as they are.
    ///
    /// # Errors
    /// As [`Self::take`].
    #[inline(always)]
    pub fn take_with_bytes<'mem>(
        &mut self,
        memory: &'mem GuestMemory,
        access: Access,
        max: usize,
        chains: &mut Chains,
        bytes: &mut ChainBytes<'mem>,
    ) -> Result<usize, RingError> {
        match memory.iotlb() {
            None => either!(self, Self, queue => queue.take(memory, access, max, chains, bytes)),
            Some(_) => self.take_through_iommu(memory, access, max, chains, bytes),
        }
    }

    /// The same through an IOMMU: a chain with an address that it does not know stays in the queue.
    #[cold]
    #[inline(never)]
    fn take_through_iommu<'mem>(
        &mut self,
        memory: &'mem GuestMemory,
        access: Access,
        max: usize,
        chains: &mut Chains,
        bytes: &mut ChainBytes<'mem>,
    ) -> Result<usize, RingError> {
        let Some(iommu) = Iommu::of(memory) else {
            return Ok(0);
        };
        let before = chains.len();
        let mut passing = ChainBytes::new();
        let taken =
            either!(self, Self, queue => queue.take(&iommu, access, max, chains, &mut passing));
        chains.set_missed(iommu.has_missed());
        // What was found lives as long as the IOMMU's view here, the memory's own bytes as long as the caller wants.
        let places = bytes.places_from(before).iter_mut();
        for (bytes, chain) in places.zip(chains.entries_from(before)) {
            *bytes = chain
                .only()
                .map_or_else(GuestSlice::empty, |only| memory.slice(only));
        }
        taken
    }

    /// What is missing to take the next `most` chains; nothing without an IOMMU. `scratch` is room that the caller keeps for it.
    #[must_use]
    pub fn missing(
        &self,
        memory: &GuestMemory,
        access: Access,
        most: u16,
        scratch: &mut Chains,
    ) -> Vec<Miss> {
        let Some(iommu) = Iommu::of(memory) else {
            return Vec::new();
        };
        either!(self, Self, queue => queue.look_ahead(&iommu, access, most, scratch));
        iommu.into_misses()
    }

    /// Puts the last `n` chains back as if they had not been taken.
    pub fn untake(&mut self, n: usize, chains: &mut Chains) {
        either!(self, Self, queue => queue.untake(n, chains));
    }

    /// Marks chains from the `first` on used, each with so many bytes written. Chains are given in the order they were taken.
    #[inline]
    pub fn give(&mut self, chains: &Chains, first: usize, lens: &[u32]) {
        either!(self, Self, queue => queue.give(chains, first, lens));
    }

    /// Marks all chains used with nothing written.
    #[inline]
    pub fn give_all(&mut self, chains: &Chains) {
        either!(self, Self, queue => queue.give_all(chains));
    }

    /// Lets the driver see everything given; whether it is to be called.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, Self, queue => queue.publish())
    }

    /// Whether chains wait to be taken.
    #[must_use]
    pub fn has_work(&self) -> bool {
        either!(self, Self, queue => queue.has_work())
    }

    /// Asks for a kick with the next chain; whether chains are waiting already.
    pub fn arm(&mut self) -> bool {
        either!(self, Self, queue => queue.arm())
    }

    /// Says that kicks are not needed.
    pub fn disarm(&mut self) {
        either!(self, Self, queue => queue.disarm());
    }

    /// Where to go on after a stop: the form of SET_VRING_BASE.
    #[must_use]
    pub fn base(&self) -> u32 {
        either!(self, Self, queue => queue.base())
    }

    /// Where the queue stands.
    #[must_use]
    pub fn positions(&self) -> Positions {
        either!(self, Self, queue => queue.positions())
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        either!(self, Self, queue => queue.size())
    }

    /// The ring's format.
    #[must_use]
    pub fn format(&self) -> RingFormat {
        match self {
            Self::Split(_) => RingFormat::Split,
            Self::Packed(_) => RingFormat::Packed,
        }
    }
}

/// A buffer that the driver makes available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverBuffer {
    /// Where it is.
    pub addr: GuestAddr,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes it (true) or reads it.
    pub writable: bool,
}

/// A buffer that the device has returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// What [`DriverQueue::add`] answered when it was made available.
    pub id: u16,
    /// Bytes that the device says it wrote; at most what the buffer holds.
    pub len: u32,
}

/// A running queue seen by the driver.
#[derive(Debug)]
pub enum DriverQueue {
    /// Split format.
    Split(SplitDriver),
    /// Packed format.
    Packed(PackedDriver),
}

impl DriverQueue {
    /// Lays out an empty queue in memory of our own. The caller has checked [`QueueConfig::size_is_valid`].
    ///
    /// # Errors
    /// [`MemoryError`] when a ring area is not aligned or not wholly in memory.
    pub fn new(config: &QueueConfig, memory: &GuestMemory) -> Result<Self, MemoryError> {
        Ok(match RingFormat::of(config.features) {
            RingFormat::Split => Self::Split(SplitDriver::new(config, memory)?),
            RingFormat::Packed => Self::Packed(PackedDriver::new(config, memory)?),
        })
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        either!(self, Self, queue => queue.size())
    }

    /// The ring's format.
    #[must_use]
    pub fn format(&self) -> RingFormat {
        match self {
            Self::Split(_) => RingFormat::Split,
            Self::Packed(_) => RingFormat::Packed,
        }
    }

    /// How many descriptors are free.
    #[inline]
    #[must_use]
    pub fn free(&self) -> usize {
        either!(self, Self, queue => queue.free())
    }

    /// The id that will be taken after `k` others. Ids are below the size of the queue and as many as descriptors, so whoever keeps
    /// a buffer for each id has one for each descriptor, and prepares those first that come first.
    #[inline(always)]
    #[must_use]
    pub fn upcoming(&self, k: usize) -> Option<u16> {
        either!(self, Self, queue => queue.upcoming(k))
    }

    /// Copies the ids that will be taken next to `ids`, as many as descriptors are free and it has places; how many.
    #[inline(always)]
    pub fn next_ids(&self, ids: &mut [u16]) -> usize {
        either!(self, Self, queue => queue.next_ids(ids))
    }

    /// Asks to own what the next `n` chains will be written to, for a caller with something else to do first. The device has read or
    /// written these lines last. (In a split ring they are not written at all from lap to lap.)
    #[inline(always)]
    pub fn prepare(&self, n: usize) {
        if let Self::Packed(queue) = self {
            queue.prepare(n);
        }
    }

    /// Makes `n` chains of one buffer each available, as long as descriptors are free; `buffer` says what stands behind an id. The
    /// device sees them after [`Self::publish`].
    #[inline(always)]
    pub fn add_each(&mut self, n: usize, buffer: impl FnMut(u16) -> DriverBuffer) {
        either!(self, Self, queue => queue.add_each(n, buffer));
    }

    /// Makes one chain of `buffers` available, readable ones first; its id, or `None` when descriptors are short (or there is no
    /// buffer). It takes the next ids, as many as it has buffers, and is known by the first. The device sees it after
    /// [`Self::publish`].
    pub fn add(&mut self, buffers: &[DriverBuffer]) -> Option<u16> {
        either!(self, Self, queue => queue.add(buffers))
    }

    /// Lets the device see everything added; whether it is to be kicked.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, Self, queue => queue.publish())
    }

    /// Takes back what the device has returned, at most as many as `used` has places; how many.
    ///
    /// # Errors
    /// [`RingError`] when the device returns what it does not hold.
    #[inline]
    pub fn reap(&mut self, used: &mut [Used]) -> Result<usize, RingError> {
        either!(self, Self, queue => queue.reap(used))
    }

    /// Takes back everything that the device has returned, whatever it has written. Where it returns them in order, that takes one look.
    ///
    /// # Errors
    /// As [`Self::reap`].
    #[inline]
    pub fn reclaim(&mut self) -> Result<(), RingError> {
        either!(self, Self, queue => queue.reclaim())
    }

    /// Where a device is to go on that takes the queue over: behind what has come back. The form of SET_VRING_BASE.
    #[must_use]
    pub fn base(&self) -> u32 {
        either!(self, Self, queue => queue.base())
    }

    /// Whether the device has returned something.
    #[must_use]
    pub fn has_work(&self) -> bool {
        either!(self, Self, queue => queue.has_work())
    }

    /// Asks for a call with the next buffer returned; whether some have been returned already.
    pub fn arm(&mut self) -> bool {
        either!(self, Self, queue => queue.arm())
    }

    /// Says that calls are not needed.
    pub fn disarm(&mut self) {
        either!(self, Self, queue => queue.disarm());
    }

    /// Where the queue stands.
    #[must_use]
    pub fn positions(&self) -> Positions {
        either!(self, Self, queue => queue.positions())
    }
}
