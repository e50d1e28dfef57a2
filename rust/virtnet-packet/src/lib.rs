//! The vocabulary of virtnet: packets in bursts, ports, offload metadata, header views, drop reasons.
#![forbid(unsafe_code)]
