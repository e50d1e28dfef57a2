//! What can be wrong with memory that somebody else describes to us.

use crate::{GuestAddr, UserAddr};

/// Why a region or a memory table was refused. The peer that described it is at fault, except for [`Self::Map`].
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region of no bytes.
    #[error("memory region at {guest} has size 0")]
    EmptyRegion {
        /// Where the region was to be.
        guest: GuestAddr,
    },
    /// Guest address plus size, user address plus size, or file offset plus size passes 2^64.
    #[error("memory region at {guest} of {size:#x} bytes wraps around the address space")]
    Overflow {
        /// Where the region was to be.
        guest: GuestAddr,
        /// Its size in bytes.
        size: u64,
    },
    /// The file behind a region is shorter than the region says; touching the rest would raise SIGBUS.
    #[error(
        "memory region at {guest} needs {needed:#x} bytes of its file, the file has {found:#x}"
    )]
    ShortFile {
        /// Where the region was to be.
        guest: GuestAddr,
        /// Offset plus size, in bytes.
        needed: u64,
        /// Length of the file, in bytes.
        found: u64,
    },
    /// Two regions share guest or user addresses.
    #[error("memory regions at {first} and {second} overlap")]
    Overlap {
        /// The lower one.
        first: GuestAddr,
        /// The higher one.
        second: GuestAddr,
    },
    /// More regions than a table can hold.
    #[error("memory table has {found} regions, at most {limit} are possible")]
    TooManyRegions {
        /// How many there are.
        found: usize,
        /// How many there may be.
        limit: usize,
    },
    /// A ring area (or another fixed structure) does not lie wholly inside one region.
    #[error("{size:#x} bytes at {addr} are not inside one memory region")]
    NotMapped {
        /// First byte.
        addr: UserAddr,
        /// Length in bytes.
        size: u64,
    },
    /// A ring area is not aligned as the specification demands.
    #[error("{addr} is not aligned to {align} bytes")]
    Misaligned {
        /// First byte.
        addr: UserAddr,
        /// Alignment in bytes.
        align: usize,
    },
    /// The system refused the mapping.
    #[error("cannot map {size:#x} bytes of memory for the region at {guest}: {cause}")]
    Map {
        /// Where the region was to be.
        guest: GuestAddr,
        /// Bytes to map.
        size: u64,
        /// What the system said.
        cause: String,
    },
}
