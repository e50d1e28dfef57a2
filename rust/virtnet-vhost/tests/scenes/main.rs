//! A back-end over a real socket, before front-ends that keep every rule, old ones, odd ones, and none at all.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod addresses;
mod descriptors;
mod fake;
mod framing;
mod handshakes;
mod orders;
mod postcopy;
mod random;
mod requests;
mod rust_vmm;
mod together;
mod wire;
mod words;
