//! Virtqueues and the network queues on them: against each other, against naive peers written from the specification,
//! against another implementation, and against peers that lie.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod crashes;
mod features;
mod hostile;
mod inflight;
mod logging;
mod net;
mod oracle;
mod positions;
mod recover;
mod rings;
mod support;
