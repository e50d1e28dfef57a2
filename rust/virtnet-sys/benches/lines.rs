//! What cache lines cost when many are on their way at once: the limit of any ring between two cores.
//!
//! One thread writes items of so many lines into slots of a ring, another reads them, in bursts and each as fast as the other lets it:
//! no descriptor, no header, no decision. A line of JSON for each point. `cargo bench -p virtnet-sys`; `CORES=0,1` says where.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    missing_docs
)]

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use virtnet_sys::pin_current_thread;

/// As many slots as a ring has, as far apart as buffers are.
const SLOTS: u64 = 256;
const STRIDE: usize = 36;
const BURST: u64 = 32;
const ITEMS: u64 = 400_000;
const RUNS: usize = 7;

#[repr(align(64))]
#[derive(Default)]
struct Line([AtomicU64; 8]);

/// An index on lines of its own.
#[repr(align(128))]
#[derive(Default)]
struct Index(AtomicU64);

/// ns an item of `lines` lines.
fn stream(lines: usize, cores: [usize; 2]) -> f64 {
    let slots: Vec<Line> = (0..SLOTS as usize * STRIDE)
        .map(|_| Line::default())
        .collect();
    let (written, read) = (Index::default(), Index::default());
    let items = ITEMS / lines as u64 / BURST * BURST;
    let slot = |item: u64| {
        let first = (item % SLOTS) as usize * STRIDE;
        &slots[first..first + lines]
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            pin_current_thread(&cores[..1]).unwrap();
            for burst in 0..items / BURST {
                let first = burst * BURST;
                while first + BURST - read.0.load(Ordering::Acquire) > SLOTS {
                    spin_loop();
                }
                for item in first..first + BURST {
                    for line in slot(item) {
                        line.0[0].store(item, Ordering::Relaxed);
                    }
                }
                written.0.store(first + BURST, Ordering::Release);
            }
        });
        let reader = scope.spawn(|| {
            pin_current_thread(&cores[1..]).unwrap();
            let mut seen = 0;
            let mut began = Instant::now();
            for burst in 0..items / BURST {
                if burst == items / BURST / 4 {
                    began = Instant::now();
                }
                let first = burst * BURST;
                while written.0.load(Ordering::Acquire) < first + BURST {
                    spin_loop();
                }
                for item in first..first + BURST {
                    for line in slot(item) {
                        seen ^= line.0[0].load(Ordering::Relaxed);
                    }
                }
                read.0.store(first + BURST, Ordering::Release);
            }
            black_box(seen);
            let counted = items - items / BURST / 4 * BURST;
            #[expect(clippy::cast_precision_loss, reason = "a figure to print")]
            let ns = began.elapsed().as_secs_f64() * 1e9 / counted as f64;
            ns
        });
        reader.join().unwrap()
    })
}

fn main() {
    let cores = std::env::var("CORES").unwrap_or_else(|_| "0,1".to_owned());
    let (a, b) = cores.split_once(',').unwrap();
    let cores = [a.parse().unwrap(), b.parse().unwrap()];
    for lines in [1, 2, 3, 4, 8, 16, 24] {
        let mut runs: Vec<_> = (0..RUNS).map(|_| stream(lines, cores)).collect();
        runs.sort_by(f64::total_cmp);
        let ns = runs[RUNS / 2];
        println!(
            "{{\"curve\": \"lines\", \"series\": \"stream\", \"x\": {lines}, \"y\": {ns:.2}}}"
        );
    }
}
