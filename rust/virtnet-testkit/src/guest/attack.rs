//! Shapes that no driver should make: what a hostile guest puts into its rings.
//!
//! Each [`Attack`] is launched by [`GuestQueue::attack`](super::GuestQueue::attack), which says what a device is to do
//! ([`Expect`]). Whatever it does, it must not panic, hang, or write outside of what it was given.

use virtnet_mem::GuestAddr;

use super::{Buffer, FakeGuest, PackedQueue, RawDescriptor, SplitQueue, length};

/// What a device is to do with an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Give the chain with this id back with length 0, and go on.
    Returned(u16),
    /// Stop the queue with an error.
    Stopped,
    /// Either of the two; there is no right answer.
    Survived,
}

macro_rules! attacks {
    ($($(#[$doc:meta])* $variant:ident,)*) => {
        /// A shape that no driver should make.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Attack {
            $($(#[$doc])* $variant,)*
        }

        impl Attack {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
        }
    };
}

attacks! {
    /// A descriptor that is its own successor.
    SelfLoop,
    /// Two descriptors that follow each other.
    Loop,
    /// A successor that is just outside the table.
    NextOutside,
    /// A successor that is far outside the table.
    NextFarOutside,
    /// A chain that never ends.
    Endless,
    /// A head that is just outside the table.
    HeadOutside,
    /// A head that is far outside the table.
    HeadFarOutside,
    /// The same chain made available twice.
    HeadTwice,
    /// An available index that is more ahead than the ring is long.
    IndexJump,
    /// An available index that goes backwards.
    IndexBack,
    /// A buffer of no bytes.
    ZeroLength,
    /// Two buffers of no bytes.
    ZeroLengths,
    /// A buffer of the direction that this queue is not for.
    WrongDirection,
    /// A second buffer of the direction that this queue is not for.
    MixedDirections,
    /// A buffer outside of memory.
    Outside,
    /// A buffer whose last byte is outside of memory.
    PastTheEnd,
    /// A second buffer outside of memory.
    SecondOutside,
    /// A buffer that wraps around the address space.
    Wraps,
    /// A buffer of the longest length there is.
    Longest,
    /// An indirect table inside an indirect table.
    IndirectNested,
    /// An indirect descriptor with a successor.
    IndirectWithNext,
    /// An indirect table of no bytes.
    IndirectEmpty,
    /// An indirect table that ends inside a descriptor.
    IndirectOdd,
    /// An indirect table with one descriptor more than the ring.
    IndirectTooLong,
    /// An indirect table outside of memory.
    IndirectOutside,
    /// An indirect table whose end is outside of memory.
    IndirectPastTheEnd,
    /// An indirect table with a loop.
    IndirectLoop,
    /// An indirect table with a successor outside of it.
    IndirectNextOutside,
    /// An indirect table with a buffer outside of memory.
    IndirectBadBuffer,
}

/// What an attack consists of where the format does not matter.
struct Shape {
    /// The chain, without what the format adds.
    raws: Vec<RawDescriptor>,
    /// The real buffers behind it.
    buffers: Vec<Buffer>,
}

impl Attack {
    pub(super) fn on_split(
        self,
        guest: &mut FakeGuest,
        queue: &mut SplitQueue,
        writable: bool,
    ) -> Option<Expect> {
        let good = some_buffer(guest, writable);
        let raw = RawDescriptor::of(good);
        match self {
            Self::HeadOutside | Self::HeadFarOutside => {
                let head = match self {
                    Self::HeadOutside => queue.size,
                    _ => u16::MAX,
                };
                queue.write_avail(guest, head);
                let index = queue.avail_index;
                queue.write_avail_index(guest, index);
                return Some(Expect::Stopped);
            }
            Self::IndexJump | Self::IndexBack => {
                let index = match self {
                    Self::IndexJump => queue.avail_index.wrapping_add(queue.size + 1),
                    _ => queue.avail_index.wrapping_sub(1),
                };
                queue.write_avail_index(guest, index);
                return Some(Expect::Stopped);
            }
            Self::HeadTwice => {
                let head = super::GuestQueue::offer(queue, guest, &[good]);
                queue.write_avail(guest, head);
                let index = queue.avail_index;
                queue.write_avail_index(guest, index);
                return Some(Expect::Survived);
            }
            _ => {}
        }
        let descriptors = queue.take_free(4);
        let [a, b, ..] = descriptors[..] else {
            unreachable!("four were taken");
        };
        // Every descriptor of the chain, with its successor.
        let links: Vec<(u16, RawDescriptor, Option<u16>)> = match self {
            Self::SelfLoop => vec![(a, raw, Some(a))],
            Self::Loop => vec![(a, raw, Some(b)), (b, raw, Some(a))],
            Self::NextOutside => vec![(a, raw, Some(queue.size))],
            Self::NextFarOutside => vec![(a, raw, Some(u16::MAX))],
            Self::Endless => {
                let next = |i: usize| descriptors[(i + 1) % 4];
                (0..4)
                    .map(|i| (descriptors[i], raw, Some(next(i))))
                    .collect()
            }
            Self::IndirectLoop => {
                let entry = linked(raw, 0);
                vec![(a, indirect(guest, &entry.split_bytes()), None)]
            }
            Self::IndirectNextOutside => {
                let entry = linked(raw, 1);
                vec![(a, indirect(guest, &entry.split_bytes()), None)]
            }
            _ => {
                let shape = self.shape(guest, good, queue.size, RawDescriptor::split_bytes);
                let links = shape.raws.iter().enumerate().map(|(i, &raw)| {
                    let next = (i + 1 < shape.raws.len()).then(|| descriptors[i + 1]);
                    (descriptors[i], raw, next)
                });
                let links = links.collect::<Vec<_>>();
                for &(index, raw, next) in &links {
                    let raw = next.map_or(raw, |next| linked(raw, next));
                    queue.write_descriptor(guest, index, raw);
                }
                let id = queue.make_available(guest, descriptors, shape.buffers);
                return Some(Expect::Returned(id));
            }
        };
        for (index, raw, next) in links {
            let raw = next.map_or(raw, |next| linked(raw, next));
            queue.write_descriptor(guest, index, raw);
        }
        let id = queue.make_available(guest, descriptors, vec![good]);
        Some(Expect::Returned(id))
    }

    pub(super) fn on_packed(
        self,
        guest: &mut FakeGuest,
        queue: &mut PackedQueue,
        writable: bool,
    ) -> Option<Expect> {
        let good = some_buffer(guest, writable);
        match self {
            // There are no successors and no indexes.
            Self::SelfLoop
            | Self::Loop
            | Self::NextOutside
            | Self::NextFarOutside
            | Self::HeadOutside
            | Self::HeadFarOutside
            | Self::HeadTwice
            | Self::IndexJump
            | Self::IndexBack
            | Self::IndirectLoop
            | Self::IndirectNextOutside => None,
            Self::Endless => {
                // Every slot says that the chain goes on, the last one too. Nothing says which id it has.
                let raw = linked(RawDescriptor::of(good), 0);
                let raws = vec![raw; super::GuestQueue::free(queue)];
                queue.make_available(guest, &raws, vec![good]);
                Some(Expect::Survived)
            }
            _ => {
                let shape = self.shape(guest, good, queue.size, RawDescriptor::packed_bytes);
                let id = queue.make_available(guest, &shape.raws, shape.buffers);
                Some(Expect::Returned(id))
            }
        }
    }

    /// The attacks that are the same in both formats, up to how a descriptor is written.
    fn shape(
        self,
        guest: &mut FakeGuest,
        good: Buffer,
        size: u16,
        bytes: fn(RawDescriptor) -> [u8; 16],
    ) -> Shape {
        let raw = RawDescriptor::of(good);
        let end = end_of_memory(guest);
        let at = |addr: u64, len: u32| RawDescriptor { addr, len, ..raw };
        let mut buffers = vec![good];
        let raws = match self {
            Self::ZeroLength => vec![at(raw.addr, 0)],
            Self::ZeroLengths => vec![at(raw.addr, 0); 2],
            Self::WrongDirection => {
                // To a device that believes it, this would be a buffer like any other.
                buffers = vec![some_buffer(guest, !good.writable)];
                vec![RawDescriptor::of(buffers[0])]
            }
            Self::MixedDirections => {
                buffers.push(some_buffer(guest, !good.writable));
                buffers.iter().copied().map(RawDescriptor::of).collect()
            }
            Self::Outside => vec![at(end + 4096, 64)],
            Self::PastTheEnd => vec![at(end - 63, 64)],
            Self::SecondOutside => vec![raw, at(end + 4096, 64)],
            Self::Wraps => vec![at(u64::MAX - 31, 64)],
            Self::Longest => vec![at(raw.addr, u32::MAX)],
            Self::IndirectNested => {
                let inner = indirect(guest, &bytes(raw));
                vec![indirect(guest, &bytes(inner))]
            }
            Self::IndirectWithNext => vec![indirect(guest, &bytes(raw)), raw],
            Self::IndirectEmpty => vec![RawDescriptor {
                len: 0,
                ..indirect(guest, &bytes(raw))
            }],
            Self::IndirectOdd => vec![RawDescriptor {
                len: 24,
                ..indirect(guest, &[bytes(raw), bytes(raw)].concat())
            }],
            Self::IndirectTooLong => {
                let entries = usize::from(size) + 1;
                let table: Vec<u8> = (1..=size + 1)
                    .flat_map(|next| {
                        let last = usize::from(next) == entries;
                        bytes(if last { raw } else { linked(raw, next) })
                    })
                    .collect();
                vec![indirect(guest, &table)]
            }
            Self::IndirectOutside => vec![RawDescriptor {
                flags: RawDescriptor::INDIRECT,
                ..at(end + 4096, 16)
            }],
            Self::IndirectPastTheEnd => vec![RawDescriptor {
                flags: RawDescriptor::INDIRECT,
                ..at(end - 8, 16)
            }],
            Self::IndirectBadBuffer => {
                let table = [bytes(linked(raw, 1)), bytes(at(end + 4096, 64))];
                vec![indirect(guest, &table.concat())]
            }
            other => unreachable!("{other:?} depends on the format"),
        };
        Shape { raws, buffers }
    }
}

/// A buffer long enough for a header and a frame.
fn some_buffer(guest: &mut FakeGuest, writable: bool) -> Buffer {
    if writable {
        guest.writable(128)
    } else {
        guest.readable(&[0; 128])
    }
}

/// With a successor.
fn linked(raw: RawDescriptor, next: u16) -> RawDescriptor {
    RawDescriptor {
        flags: raw.flags | RawDescriptor::NEXT,
        next_or_id: next,
        ..raw
    }
}

/// A descriptor of an indirect table with this content.
fn indirect(guest: &mut FakeGuest, table: &[u8]) -> RawDescriptor {
    let addr = guest.alloc(table.len() as u64, 16);
    guest.write(addr, table);
    RawDescriptor {
        addr: addr.0,
        len: length(table.len()),
        flags: RawDescriptor::INDIRECT,
        next_or_id: 0,
    }
}

/// The first address behind all memory.
fn end_of_memory(guest: &FakeGuest) -> u64 {
    let regions = guest.memory().regions();
    let ends = regions
        .iter()
        .map(|region| region.guest().0 + region.size());
    let GuestAddr(end) = GuestAddr(ends.max().unwrap_or_default());
    end
}
