//! What a worker thread wants to know and say about itself.
//!
//! Pinning concerns the calling thread only, so that a library inside somebody's Python process never moves the
//! threads of that process.

use std::io;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::clock::nanoseconds;

/// Keeps the calling thread on the given CPUs.
///
/// # Errors
/// An empty list, a number beyond what the kernel's mask holds, or CPUs this process may not use.
pub fn pin_current_thread(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU {
            let text = format!(
                "there is no CPU {cpu}: at most {} are known",
                CpuSet::MAX_CPU
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        set.set(cpu);
    }
    sched_setaffinity(None, &set).map_err(|errno| {
        let text = format!(
            "cannot pin the thread to CPUs {cpus:?}: {errno}; {} may be used",
            cpu_count()
        );
        io::Error::new(io::Error::from(errno).kind(), text)
    })
}

/// Returns how much CPU time the calling thread has used.
#[must_use]
pub fn thread_cpu_time() -> Duration {
    Duration::from_nanos(nanoseconds(clock_gettime(ClockId::ThreadCPUTime)))
}

/// Returns how many CPUs the calling thread may run on, at least one.
#[must_use]
pub fn cpu_count() -> usize {
    let count = sched_getaffinity(None).map_or(1, |set| set.count());
    usize::try_from(count).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_sees_one_cpu() {
        std::thread::spawn(|| {
            let allowed = sched_getaffinity(None).unwrap();
            let first = (0..CpuSet::MAX_CPU)
                .find(|&cpu| allowed.is_set(cpu))
                .unwrap();
            pin_current_thread(&[first]).unwrap();
            assert_eq!(cpu_count(), 1);
            assert_eq!(rustix::thread::sched_getcpu(), first);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn impossible_cpus_are_refused_by_number() {
        let error = pin_current_thread(&[1 << 20]).unwrap_err();
        assert!(error.to_string().contains("1048576"), "{error}");
        pin_current_thread(&[]).unwrap_err();
    }

    #[test]
    fn work_costs_cpu_time_and_sleep_does_not() {
        let start = thread_cpu_time();
        std::thread::sleep(Duration::from_millis(20));
        let slept = thread_cpu_time() - start;
        assert!(slept < Duration::from_millis(10), "{slept:?}");
        let mut sum = 0u64;
        while thread_cpu_time() - start < slept + Duration::from_millis(2) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(sum > 0);
    }
}
