//! Guest memory: regions, address translation, checked windows over shared memory.
//!
//! Everything that another process can write while we read it goes through this crate: it maps regions (on
//! `vm-memory`), translates the peer's addresses, and hands out views that are checked once when made and on every
//! access: [`Window`] and [`Table`] (ring areas, long-lived, own their mapping), [`Segment`] (a plain number pair that names
//! bytes of a [`GuestMemory`]) and [`GuestSlice`] (those bytes, borrowed). While a guest is moved, a [`DirtyLog`] says which pages
//! were written.
//!
//! It guarantees that no access leaves a mapping, that a mapping lives as long as anything made from it, and that no
//! reference to bytes of shared memory is ever formed: bytes are copied in or out, words are loaded and stored atomically. It does
//! not guarantee what the bytes say: a peer may change them at any time, so every caller reads a shared word once and
//! decides on its copy. A peer may even take the pages away, by shortening their file: zeros take their place then, and
//! [`losses`] and [`Region::is_lost`] tell.
//!
//! In a packet's way this crate is the only place that touches guest bytes (see `ARCHITECTURE.md`).

mod address;
mod copy;
mod dirty_log;
mod error;
mod extent;
mod gather;
mod guard;
mod iotlb;
mod mapping;
mod memory;
mod region;
mod slice;
mod slots;
mod table;
mod window;

pub use address::{GuestAddr, UserAddr};
pub use dirty_log::{DirtyLog, LoggedArea};
pub use error::MemoryError;
pub use extent::Extent;
pub use gather::Gather;
pub use guard::{arm as arm_guard, losses};
pub use iotlb::{Iommu, Iotlb, Miss, Permission, Translate};
pub use memory::{GuestMemory, Segment};
pub use region::Region;
pub use slice::GuestSlice;
pub use slots::Slots;
pub use table::{Table, TableEntry, Word};
pub use window::{Pair32, Window, Word16};
