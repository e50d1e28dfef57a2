//! A back-end as its peers see it: bytes and descriptors go in at one end of a socket, answers come out, and a recording
//! device notes what was asked of it.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod descriptors;
mod device;
mod line;
mod orders;
mod random;
mod together;
mod wire;
