//! Rings shared with the kernel: one side puts entries in and moves the producer index, the other takes them out and moves the
//! consumer index. Indexes run freely and are masked; the far side's is read once a burst and bounded by the ring's size.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

/// A frame, or a piece of one. The kernel's `struct xdp_desc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct XdpDesc {
    /// Where it begins in the memory.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    options: u32,
}

impl XdpDesc {
    /// A piece of a frame, of which `more` pieces follow or not.
    #[must_use]
    pub fn new(addr: u64, len: u32, more: bool) -> Self {
        let options = if more { libc::XDP_PKT_CONTD } else { 0 };
        Self { addr, len, options }
    }

    /// Whether the frame goes on in the next one.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.options & libc::XDP_PKT_CONTD != 0
    }
}

/// A ring's mapping and the places in it, which are inside and aligned. An entry is a `u64` or an [`XdpDesc`]: plain numbers, for
/// which any bytes are a value.
pub(super) struct Mapped<T> {
    start: *mut u8,
    len: usize,
    producer: usize,
    consumer: usize,
    flags: usize,
    entries: usize,
    size: u32,
    entry: PhantomData<T>,
}

// SAFETY: the mapping belongs to this value; what is in it is only accessed as atomics and with volatile copies.
unsafe impl<T: Send> Send for Mapped<T> {}

impl<T: Copy> Mapped<T> {
    /// Maps the ring at `place` of a socket's file; the kernel has said where things are in it.
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        place: u64,
        offset: libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let odd = || io::Error::other("the kernel tells of a ring that makes no sense");
        let place = libc::off_t::try_from(place).map_err(|_| odd())?;
        let at = |offset: u64| usize::try_from(offset).map_err(|_| odd());
        let entries = at(offset.desc)?;
        let bytes = (size as usize).checked_mul(size_of::<T>());
        let len = bytes
            .and_then(|bytes| bytes.checked_add(entries))
            .ok_or_else(odd)?;
        let words = [offset.producer, offset.consumer, offset.flags];
        let fits = |word: &u64| word.is_multiple_of(4) && *word + 4 <= len as u64;
        if !size.is_power_of_two() || !words.iter().all(fits) || !entries.is_multiple_of(8) {
            return Err(odd());
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping, wherever there is room.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                access,
                kind,
                fd.as_raw_fd(),
                place,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            len,
            producer: at(offset.producer)?,
            consumer: at(offset.consumer)?,
            flags: at(offset.flags)?,
            entries,
            size,
            entry: PhantomData,
        })
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: each place given here is aligned and inside the mapping (constructor), which lives as long as `self`; the kernel
        // uses it as an atomic too.
        unsafe { AtomicU32::from_ptr(self.start.wrapping_add(at).cast()) }
    }

    fn entry(&self, index: u32) -> *mut T {
        let at = (index & (self.size - 1)) as usize * size_of::<T>();
        self.start.wrapping_add(self.entries + at).cast()
    }

    fn read(&self, index: u32) -> T {
        // SAFETY: the index is masked, so the entry is inside the mapping; any bytes are an entry.
        unsafe { self.entry(index).read_volatile() }
    }

    fn write(&self, index: u32, entry: T) {
        // SAFETY: the index is masked, so the entry is inside the mapping.
        unsafe { self.entry(index).write_volatile(entry) }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and nothing points into it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A ring that the kernel takes entries out of.
pub struct Producer<T> {
    ring: Mapped<T>,
    /// Where the next entry goes; published up to some earlier one.
    next: u32,
    /// The kernel's index when it was last looked at.
    taken: u32,
}

impl<T> fmt::Debug for Producer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Producer({} of {})",
            self.next.wrapping_sub(self.taken),
            self.ring.size
        )
    }
}

impl<T: Copy> Producer<T> {
    pub(super) fn new(ring: Mapped<T>) -> Self {
        Self {
            ring,
            next: 0,
            taken: 0,
        }
    }

    /// How many entries have room, at least `wanted` if so many have.
    pub fn room(&mut self, wanted: u32) -> u32 {
        let known = self.ring.size - self.pending();
        if known >= wanted {
            return known;
        }
        self.taken = self.ring.word(self.ring.consumer).load(Ordering::Acquire);
        self.ring.size - self.pending()
    }

    /// Entries that the kernel had not taken at the last look.
    fn pending(&self) -> u32 {
        self.next.wrapping_sub(self.taken).min(self.ring.size)
    }

    /// Whether the kernel has taken everything out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting() == 0
    }

    /// How many entries the kernel has not taken yet.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        let taken = self.ring.word(self.ring.consumer).load(Ordering::Acquire);
        self.next.wrapping_sub(taken).min(self.ring.size)
    }

    /// Puts an entry in, for which there must be [`room`](Self::room); false if there is none.
    pub fn push(&mut self, entry: T) -> bool {
        if self.pending() >= self.ring.size {
            return false;
        }
        self.ring.write(self.next, entry);
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Lets the kernel see what was put in.
    pub fn publish(&mut self) {
        let producer = self.ring.word(self.ring.producer);
        producer.store(self.next, Ordering::Release);
    }

    /// Whether the kernel wants to be told of new entries.
    #[must_use]
    pub fn needs_wakeup(&self) -> bool {
        let flags = self.ring.word(self.ring.flags).load(Ordering::Relaxed);
        flags & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// A ring that the kernel puts entries into.
pub struct Consumer<T> {
    ring: Mapped<T>,
    /// The next entry to look at.
    next: u32,
}

impl<T> fmt::Debug for Consumer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Consumer(of {})", self.ring.size)
    }
}

impl<T: Copy> Consumer<T> {
    pub(super) fn new(ring: Mapped<T>) -> Self {
        Self { ring, next: 0 }
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        let producer = self.ring.word(self.ring.producer).load(Ordering::Acquire);
        producer.wrapping_sub(self.next).min(self.ring.size)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entry `k` places on, of those that [`len`](Self::len) tells of.
    #[must_use]
    pub fn peek(&self, k: u32) -> T {
        self.ring.read(self.next.wrapping_add(k))
    }

    /// Gives the places of the first `n` entries back to the kernel.
    pub fn release(&mut self, n: u32) {
        self.next = self.next.wrapping_add(n);
        let consumer = self.ring.word(self.ring.consumer);
        consumer.store(self.next, Ordering::Release);
    }

    /// How many entries the ring holds.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.ring.size
    }
}
