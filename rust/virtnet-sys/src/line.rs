//! What it costs to hand a cache line from one CPU to another: the unit in which virtqueues pay for everything.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::thread::pin_current_thread;

/// Hand-overs in a round, and rounds: a few milliseconds in all.
const HAND_OVERS: u32 = 4_000;
const ROUNDS: usize = 5;

/// How long a round may take before it is given up: the CPUs are busy with something else.
const PATIENCE: Duration = Duration::from_secs(1);

/// A counter on lines of its own, so that it shares none with what lies beside it.
#[repr(align(128))]
struct Line(AtomicU32);

/// Measures how long a cache line takes from one CPU to another: the median of some rounds between two spinning threads.
///
/// Far apart (another cluster of cores, another socket) it takes several times as long as nearby, and so does everything that
/// two sides of a ring tell each other. A virtual CPU may be moved from near to far while it runs.
///
/// # Errors
/// CPUs that are the same, or that this process may not use; [`io::ErrorKind::TimedOut`] when they are too busy to tell.
pub fn line_cost(cpu: usize, other: usize) -> io::Result<Duration> {
    if cpu == other {
        let text = format!("CPU {cpu} hands nothing over to itself: name two CPUs");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let line = Line(AtomicU32::new(0));
    std::thread::scope(|scope| {
        let there = scope.spawn(|| play(&line, other, 1));
        let here = scope.spawn(|| play(&line, cpu, 0));
        let end = |side: std::thread::ScopedJoinHandle<'_, io::Result<[Duration; ROUNDS]>>| {
            side.join()
                .unwrap_or_else(|_| Err(io::Error::other("a measuring thread panicked")))
        };
        let (here, there) = (end(here), end(there));
        there?;
        let mut rounds = here?;
        rounds.sort_unstable();
        Ok(rounds[ROUNDS / 2] / HAND_OVERS)
    })
}

/// Adds one whenever the counter's parity is `turn`; how long each round took.
fn play(line: &Line, cpu: usize, turn: u32) -> io::Result<[Duration; ROUNDS]> {
    // A side that gives up lets the other run into its patience.
    pin_current_thread(&[cpu])?;
    let (mut rounds, mut next) = ([Duration::ZERO; ROUNDS], turn);
    for round in &mut rounds {
        let began = Instant::now();
        for _ in 0..HAND_OVERS / 2 {
            wait_for(line, next, began)?;
            line.0.store(next.wrapping_add(1), Ordering::Release);
            next = next.wrapping_add(2);
        }
        *round = began.elapsed();
    }
    Ok(rounds)
}

fn wait_for(line: &Line, value: u32, began: Instant) -> io::Result<()> {
    loop {
        for _ in 0..100_000 {
            if line.0.load(Ordering::Acquire) == value {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        if began.elapsed() > PATIENCE {
            let text =
                "the other CPU did not answer within a second: it is busy, or not to be used";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_takes_between_a_nanosecond_and_a_millisecond() {
        let cost = match line_cost(0, 1) {
            Err(error) if crate::cpu_count() < 2 => return assert!(!error.to_string().is_empty()),
            cost => cost.unwrap(),
        };
        assert!((1..1_000_000).contains(&cost.as_nanos()), "{cost:?}");
    }

    #[test]
    fn impossible_cpus_are_refused() {
        assert!(
            line_cost(0, 0)
                .unwrap_err()
                .to_string()
                .contains("two CPUs")
        );
        line_cost(0, 1 << 20).unwrap_err();
    }
}
