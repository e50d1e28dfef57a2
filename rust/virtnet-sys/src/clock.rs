//! The monotonic clock, as one number.
//!
//! Wall-clock time is never used: it jumps. Whatever needs to be tested with a clock that a test moves takes the number
//! as an argument and does not call this.

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Returns nanoseconds since some fixed moment; never goes backwards.
#[must_use]
pub fn monotonic_ns() -> u64 {
    nanoseconds(clock_gettime(ClockId::Monotonic))
}

/// Folds a kernel time into nanoseconds; the kernel's clocks used here are never negative.
pub(crate) fn nanoseconds(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_moves_forward() {
        let before = monotonic_ns();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(monotonic_ns() >= before + 2_000_000);
    }
}
