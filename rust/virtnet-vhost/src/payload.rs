//! What messages carry: plain structures with the layout the protocol gives them.
//!
//! Each has exactly one length on the wire, or one for each number of its elements; anything longer or shorter does
//! not decode. Numbers have the byte order of the machine, as both ends run on it. Nothing here is checked beyond its
//! shape: what the numbers mean is the session's business.

use std::fmt;

/// The most bytes of configuration space one message carries.
pub const MAX_CONFIG_LEN: usize = 256;

/// The most regions that fit into a message of the largest size; the protocol's own limit is lower.
const MAX_DECODED_REGIONS: usize = 127;

/// The length of a payload, in words for an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// One length.
    Exact(usize),
    /// A fixed part and elements whose number the fixed part says.
    Counted {
        /// Bytes of the fixed part.
        fixed: usize,
        /// Bytes of an element.
        element: usize,
    },
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(length) => write!(f, "{length} bytes"),
            Self::Counted { fixed, element } => {
                write!(f, "{fixed} bytes and {element} for each element it counts")
            }
        }
    }
}

/// A structure that is the payload of a message.
pub trait Payload: Sized {
    /// Its length on the wire.
    const LENGTH: Length;

    /// Appends its bytes.
    fn encode(&self, out: &mut Vec<u8>);

    /// Takes its bytes off the front; `None` if they are too few or count wrongly.
    fn decode(bytes: &mut Cursor<'_>) -> Option<Self>;

    /// Reads it from bytes that have to be exactly it.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut cursor = Cursor(bytes);
        let value = Self::decode(&mut cursor)?;
        cursor.0.is_empty().then_some(value)
    }
}

/// Bytes that are taken off from the front.
#[derive(Debug)]
pub struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*value)
    }

    fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0).to_vec()
    }

    fn u8(&mut self) -> Option<u8> {
        self.take().map(u8::from_ne_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }
}

impl Payload for () {
    const LENGTH: Length = Length::Exact(0);

    fn encode(&self, _: &mut Vec<u8>) {}

    fn decode(_: &mut Cursor<'_>) -> Option<Self> {
        Some(())
    }
}

impl Payload for u64 {
    const LENGTH: Length = Length::Exact(8);

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_ne_bytes());
    }

    fn decode(bytes: &mut Cursor<'_>) -> Option<Self> {
        bytes.u64()
    }
}

/// Defines a structure of numbers that lie one after the other, with so many bytes of padding before and after.
macro_rules! plain {
    ($($(#[$meta:meta])* $Name:ident [$length:literal] $before:literal
       { $($(#[$field_meta:meta])* $field:ident: $type:ident,)* } $after:literal)*) => { $(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $Name { $($(#[$field_meta])* pub $field: $type,)* }

        impl Payload for $Name {
            const LENGTH: Length = Length::Exact($length);

            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&[0; $before]);
                $(out.extend_from_slice(&self.$field.to_ne_bytes());)*
                out.extend_from_slice(&[0; $after]);
            }

            fn decode(bytes: &mut Cursor<'_>) -> Option<Self> {
                bytes.take::<$before>()?;
                let value = Self { $($field: bytes.$type()?,)* };
                bytes.take::<$after>()?;
                Some(value)
            }
        }
    )* };
}

plain! {
    /// A ring, and a number that means what the request says.
    VringState [8] 0 {
        /// The ring.
        index: u32,
        /// Size, base, or one for on and zero for off.
        num: u32,
    } 0

    /// Where the three areas of a ring lie, as user addresses of the front-end.
    VringAddresses [40] 0 {
        /// The ring.
        index: u32,
        /// Bit 0: writes to the used ring are logged.
        flags: u32,
        /// The Descriptor Area.
        desc: u64,
        /// The Device Area: the used ring, or the device event suppression of a packed ring.
        used: u64,
        /// The Driver Area: the available ring, or the driver event suppression of a packed ring.
        avail: u64,
        /// Where writes to the used ring are logged, as a guest physical address.
        log_guest_addr: u64,
    } 0

    /// A piece of guest memory inside a file.
    MemoryRegion [32] 0 {
        /// Where the guest sees it.
        guest_addr: u64,
        /// How long it is.
        size: u64,
        /// Where the front-end has mapped it.
        user_addr: u64,
        /// Where in the file it begins.
        mmap_offset: u64,
    } 0

    /// The dirty log inside a file.
    LogArea [16] 0 {
        /// Its length in bytes.
        mmap_size: u64,
        /// Where in the file it begins.
        mmap_offset: u64,
    } 0

    /// A change of, or a question about, the translation of I/O addresses.
    Iotlb [32] 0 {
        /// The I/O address.
        iova: u64,
        /// How many bytes.
        size: u64,
        /// The front-end's user address.
        user_addr: u64,
        /// 1 readable, 2 writable, 3 both.
        permission: u8,
        /// 1 miss, 2 update, 3 invalidate, 4 access failed.
        kind: u8,
    } 6

    /// A part of a file for one ring.
    VringArea [24] 0 {
        /// The ring in bits 0 to 7; bit 8: without a descriptor.
        word: u64,
        /// Its length in bytes.
        size: u64,
        /// Where in the file it begins.
        offset: u64,
    } 0

    /// The record of buffers in flight inside a file.
    InflightArea [24] 0 {
        /// Its length in bytes.
        mmap_size: u64,
        /// Where in the file it begins.
        mmap_offset: u64,
        /// How many rings it is for.
        num_queues: u16,
        /// How many descriptors a ring has.
        queue_size: u16,
    } 4

    /// Which way the device's state goes.
    DeviceState [8] 0 {
        /// 0 save, 1 load.
        direction: u32,
        /// 0: all rings stopped.
        phase: u32,
    } 0

    /// A mapping into a shared memory region.
    ShmemMapping [40] 0 {
        /// The region, and padding.
        shmid: u64,
        /// Where in the file it begins.
        fd_offset: u64,
        /// Where in the region it begins.
        shm_offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Bit 0: writable.
        flags: u64,
    } 0

    /// A ring, and whether a descriptor comes with the message.
    VringFd [8] 0 {
        /// The ring in bits 0 to 7; bit 8: no descriptor.
        word: u64,
    } 0
}

impl Iotlb {
    /// What a back-end says that misses a translation.
    pub const MISS: u8 = 1;
    /// What a front-end says that tells one.
    pub const UPDATE: u8 = 2;
    /// What a front-end says that takes one back.
    pub const INVALIDATE: u8 = 3;
}

impl VringFd {
    const NO_FD: u64 = 1 << 8;

    /// Makes the word for a ring, with or without a descriptor.
    #[must_use]
    pub fn new(index: u8, has_fd: bool) -> Self {
        Self {
            word: u64::from(index) | if has_fd { 0 } else { Self::NO_FD },
        }
    }

    /// Returns the ring; bits that should be zero make it one that does not exist.
    #[must_use]
    pub fn index(self) -> u64 {
        self.word & !Self::NO_FD
    }

    /// Tells whether a descriptor has to come with the message.
    #[must_use]
    pub fn has_fd(self) -> bool {
        self.word & Self::NO_FD == 0
    }
}

/// The whole guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryTable(
    /// Its regions, each with a descriptor of its own.
    pub Vec<MemoryRegion>,
);

impl Payload for MemoryTable {
    const LENGTH: Length = Length::Counted {
        fixed: 8,
        element: 32,
    };

    fn encode(&self, out: &mut Vec<u8>) {
        // A longer table than this count can say could not be sent anyway.
        let count = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&count.to_ne_bytes());
        out.extend_from_slice(&[0; 4]);
        self.0.iter().for_each(|region| region.encode(out));
    }

    fn decode(bytes: &mut Cursor<'_>) -> Option<Self> {
        let count = usize::try_from(bytes.u32()?).ok()?;
        bytes.take::<4>()?;
        if count > MAX_DECODED_REGIONS {
            return None;
        }
        (0..count)
            .map(|_| MemoryRegion::decode(bytes))
            .collect::<Option<_>>()
            .map(Self)
    }
}

/// One region that is added to or taken from guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SingleRegion(
    /// The region.
    pub MemoryRegion,
);

impl Payload for SingleRegion {
    const LENGTH: Length = Length::Exact(40);

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[0; 8]);
        self.0.encode(out);
    }

    fn decode(bytes: &mut Cursor<'_>) -> Option<Self> {
        bytes.take::<8>()?;
        MemoryRegion::decode(bytes).map(Self)
    }
}

/// A part of the device configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// Where in the space it begins.
    pub offset: u32,
    /// 1: written during migration, where read-only fields may change.
    pub flags: u32,
    /// Its bytes; in a question, as many as are asked for.
    pub data: Vec<u8>,
}

impl Payload for Config {
    const LENGTH: Length = Length::Counted {
        fixed: 12,
        element: 1,
    };

    fn encode(&self, out: &mut Vec<u8>) {
        let size = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        for number in [self.offset, size, self.flags] {
            out.extend_from_slice(&number.to_ne_bytes());
        }
        out.extend_from_slice(&self.data);
    }

    fn decode(bytes: &mut Cursor<'_>) -> Option<Self> {
        let (offset, size, flags) = (bytes.u32()?, bytes.u32()?, bytes.u32()?);
        let data = bytes.rest();
        (usize::try_from(size) == Ok(data.len())).then_some(Self {
            offset,
            flags,
            data,
        })
    }
}

/// The name of a shared object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Uuid(
    /// Its bytes in the order they are written in.
    pub [u8; 16],
);

impl Payload for Uuid {
    const LENGTH: Length = Length::Exact(16);

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    fn decode(bytes: &mut Cursor<'_>) -> Option<Self> {
        bytes.take().map(Self)
    }
}

/// A payload that is carried without being looked into.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Opaque(
    /// Its bytes.
    pub Vec<u8>,
);

impl Payload for Opaque {
    const LENGTH: Length = Length::Counted {
        fixed: 0,
        element: 1,
    };

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    fn decode(bytes: &mut Cursor<'_>) -> Option<Self> {
        Some(Self(bytes.rest()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<P: Payload + PartialEq + fmt::Debug>(value: P, golden: &[u8]) {
        let mut bytes = Vec::new();
        value.encode(&mut bytes);
        assert_eq!(bytes, golden);
        assert_eq!(P::from_bytes(golden), Some(value));
        assert_eq!(
            P::from_bytes(&golden[..golden.len() - 1]),
            None,
            "one byte short"
        );
        let longer = [golden, &[0]].concat();
        assert_eq!(P::from_bytes(&longer), None, "one byte long");
        if let Length::Exact(length) = P::LENGTH {
            assert_eq!(length, golden.len());
        }
    }

    /// Golden bytes are written for a little-endian machine.
    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn structures_have_the_bytes_of_the_specification() {
        check(7u64, &[7, 0, 0, 0, 0, 0, 0, 0]);
        check(VringState { index: 1, num: 256 }, &[1, 0, 0, 0, 0, 1, 0, 0]);
        check(
            VringAddresses {
                index: 2,
                flags: 1,
                desc: 3,
                used: 4,
                avail: 5,
                log_guest_addr: 6,
            },
            &words(&[2 | 1 << 32, 3, 4, 5, 6]),
        );
        check(
            MemoryRegion {
                guest_addr: 1,
                size: 2,
                user_addr: 3,
                mmap_offset: 4,
            },
            &words(&[1, 2, 3, 4]),
        );
        check(
            LogArea {
                mmap_size: 1,
                mmap_offset: 2,
            },
            &words(&[1, 2]),
        );
        check(
            Iotlb {
                iova: 1,
                size: 2,
                user_addr: 3,
                permission: 3,
                kind: 2,
            },
            &words(&[1, 2, 3, 0x0203]),
        );
        check(
            VringArea {
                word: 0x101,
                size: 2,
                offset: 3,
            },
            &words(&[0x101, 2, 3]),
        );
        check(
            InflightArea {
                mmap_size: 1,
                mmap_offset: 2,
                num_queues: 3,
                queue_size: 4,
            },
            &words(&[1, 2, 0x0004_0003]),
        );
        check(
            DeviceState {
                direction: 1,
                phase: 0,
            },
            &words(&[1]),
        );
        check(
            ShmemMapping {
                shmid: 1,
                fd_offset: 2,
                shm_offset: 3,
                len: 4,
                flags: 1,
            },
            &words(&[1, 2, 3, 4, 1]),
        );
        check(VringFd { word: 0x103 }, &words(&[0x103]));
        check(Uuid(*b"0123456789abcdef"), b"0123456789abcdef");
        check(
            SingleRegion(MemoryRegion {
                size: 9,
                ..Default::default()
            }),
            &words(&[0, 0, 9, 0, 0]),
        );
    }

    #[test]
    fn counted_structures_are_as_long_as_they_say() {
        let region = MemoryRegion {
            guest_addr: 1,
            size: 2,
            user_addr: 3,
            mmap_offset: 4,
        };
        check(
            MemoryTable(vec![region, region]),
            &words(&[2, 1, 2, 3, 4, 1, 2, 3, 4]),
        );
        check(
            Config {
                offset: 6,
                flags: 0,
                data: vec![1, 0],
            },
            &[6, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        );
        assert_eq!(
            MemoryTable::from_bytes(&words(&[u64::from(u32::MAX)])),
            None
        );
    }

    #[test]
    fn a_word_for_a_descriptor_says_which_ring_and_whether() {
        assert_eq!(
            (
                VringFd::new(3, true).index(),
                VringFd::new(3, true).has_fd()
            ),
            (3, true)
        );
        assert_eq!(
            (
                VringFd::new(255, false).index(),
                VringFd::new(255, false).has_fd()
            ),
            (255, false)
        );
        // Bits beyond the ring never name a ring that exists.
        assert_eq!(VringFd { word: 1 << 32 | 1 }.index(), 1 << 32 | 1);
    }
}
