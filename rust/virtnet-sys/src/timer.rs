//! A moment to wait for, as a descriptor: what makes time one more thing that a [`Poller`](crate::Poller) waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// A descriptor that becomes readable at a moment of the monotonic clock, and stays so until it is set again.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
}

impl Timer {
    /// Makes a timer that is not set.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            fd: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        })
    }

    /// Sets the moment, as [`monotonic_ns`](crate::monotonic_ns) counts; one that is over is now, `None` is never.
    ///
    /// # Errors
    /// None in practice: the descriptor is a timer.
    pub fn set(&self, at_ns: Option<u64>) -> io::Result<()> {
        // The kernel reads zero as "never".
        let at_ns = at_ns.map_or(0, |ns| ns.max(1));
        let never = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let moment = Timespec {
            tv_sec: i64::try_from(at_ns / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(at_ns % 1_000_000_000).unwrap_or(0),
        };
        let timing = Itimerspec {
            it_interval: never,
            it_value: moment,
        };
        timerfd_settime(&self.fd, TimerfdTimerFlags::ABSTIME, &timing)?;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Events, Poller, monotonic_ns};

    #[test]
    fn a_timer_is_readable_from_its_moment_until_it_is_set_again() {
        let (poller, timer) = (Poller::new().unwrap(), Timer::new().unwrap());
        poller.add(&timer, 1).unwrap();
        let mut events = Events::with_capacity(1);
        let mut ready_within = |ms| {
            poller
                .wait(&mut events, Some(Duration::from_millis(ms)))
                .unwrap()
                == 1
        };
        assert!(!ready_within(0));
        let moment = monotonic_ns() + 5_000_000;
        timer.set(Some(moment)).unwrap();
        assert!(ready_within(1000));
        assert!(monotonic_ns() >= moment);
        assert!(ready_within(0));
        timer.set(None).unwrap();
        assert!(!ready_within(10));
        timer.set(Some(0)).unwrap();
        assert!(ready_within(0));
    }
}
