//! For tests: a fake guest, a scripted front-end, packet builders, port conformance.
#![forbid(unsafe_code)]
