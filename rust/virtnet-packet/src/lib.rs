//! The vocabulary of virtnet: packets in bursts, ports, offload metadata, header views, drop reasons.
//!
//! A [`Burst`] is what moves: up to [`BURST_MAX`] packets as a structure of arrays. The first bytes of each frame (its head)
//! are private to the burst, and every decision is taken on them; the rest (its body) stays where it came from until a port
//! copies it out. A [`Port`] is a place where bursts enter and leave.
//!
//! It guarantees that a head never changes under its reader, whoever sent it, and that every packet is accounted for: what a
//! port received is what was sent on plus what was dropped, by reason ([`DropReason`], [`PortCounters`]).
//!
//! In a packet's way this crate is what the layers say to each other (see `ARCHITECTURE.md`).
#![forbid(unsafe_code)]

mod burst;
pub mod checksum;
mod counters;
mod drop_reason;
mod fields;
pub mod flow;
pub mod header;
mod offload;
mod port;
mod resolve;
mod writable;

pub use burst::{BURST_MAX, Burst, HEAD_MAX, Picks, Piece, TAG_LEN, tag_of};
pub use counters::{DropCounters, PortCounters};
pub use drop_reason::DropReason;
pub use fields::Fields;
pub use flow::{Flow, PacketHash, flow_hash};
pub use offload::{Offload, Offloads};
pub use port::{Backlog, Direction, MemoryPort, Origin, Port, PortPair, memory_pair};
pub use resolve::{Resolver, Unresolvable};
pub use writable::Writable;
