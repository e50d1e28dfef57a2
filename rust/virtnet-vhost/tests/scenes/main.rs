//! A back-end over a real socket, before front-ends that keep every rule, old ones, odd ones, and none at all.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "a test")]

mod fake;
mod framing;
mod orders;
mod requests;
mod rust_vmm;
