//! For tests: a fake guest, a scripted front-end, packet builders, and a conformance suite for ports.
//!
//! [`FakeGuest`] and its queues write virtqueues byte by byte, slowly and in the obvious way, in every shape a guest can think
//! of, hostile ones included ([`Attack`]). [`frame`] builds packets with correct checksums. [`check_port`] holds a pair of
//! connected ports to what the [`Port`](virtnet_packet::Port) trait promises. [`FrontEnd`] says to a back-end whatever a test wants
//! said, and [`FakeVm`] drives rings beside it; with [`DirtyPages`] it moves from one back-end to another.
//!
//! What is found wrong is a panic that says what: this crate is a development dependency and nothing else. It shares no ring
//! code with the crates it tests, so that a mistake would have to be made twice to go unseen.
#![forbid(unsafe_code)]

mod conformance;
mod dirty_pages;
pub mod frame;
mod front_end;
mod guest;
mod memory;
mod temp;

pub use conformance::{Limits, check_port, check_port_with, receive, send};
pub use dirty_pages::DirtyPages;
pub use front_end::{FakeVm, FrontEnd, VmRing, is_signalled};
pub use guest::{
    Attack, Buffer, Calls, Expect, FakeGuest, GuestQueue, HEADER_LEN, PackedQueue, RawDescriptor,
    Returned, SplitQueue, net_header, offer_frame, packets,
};
pub use memory::{Backing, VmMemory};
pub use temp::TempDir;
