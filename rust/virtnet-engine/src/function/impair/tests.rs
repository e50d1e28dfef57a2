//! Against a clock moved by hand: what was asked for is what comes of it, to the nanosecond where nothing is left to chance, and as
//! the formulas of the distributions say where something is.

use virtnet_packet::Offload;

use super::*;

const MS: u64 = 1_000_000;
const START: u64 = 7_000_000_000;

fn ms(ms: f64) -> Track {
    Track::constant(ms * 1e6)
}

struct Lab {
    cable: Impairment,
    now: u64,
    /// What has left: when, and the frame.
    left: Vec<(u64, Vec<u8>)>,
    dropped: Vec<Fate>,
}

impl Lab {
    fn new(orders: &ImpairOrders) -> Self {
        Self {
            cable: Impairment::new(orders, [true, false], 1).unwrap(),
            now: START,
            left: Vec::new(),
            dropped: Vec::new(),
        }
    }

    fn send(&mut self, frames: &[Vec<u8>]) {
        for frames in frames.chunks(64) {
            let mut burst = Burst::new();
            frames
                .iter()
                .for_each(|frame| burst.push_bytes(frame, Offload::default()));
            let mut fates = [Fate::Consumed; 64];
            let all = Picks::first(frames.len());
            if let Verdict::All(fate) = self.cable.classify(&burst, &all, 0, self.now, &mut fates) {
                fates.fill(fate);
            }
            for (fate, frame) in fates.iter().zip(frames) {
                match fate {
                    Fate::To(1) => self.left.push((self.now, frame.clone())),
                    Fate::Held => {}
                    other => self.dropped.push(*other),
                }
            }
        }
    }

    /// Goes on to a moment, stopping where something is due, as a worker does.
    fn run_to(&mut self, end: u64) {
        loop {
            while let Some(out) = self.cable.release(0, self.now) {
                for i in 0..out.len() {
                    let mut frame = vec![0; out.frame_len(i)];
                    out.copy_frame(i, &mut frame);
                    self.left.push((self.now, frame));
                }
                self.cable.left(out);
            }
            match self.cable.due() {
                Some(due) if due <= end => self.now = due.max(self.now),
                _ => break,
            }
        }
        self.now = end;
    }

    fn counters(&self) -> LineCounters {
        let counters = self.cable.counters()[0].clone().unwrap();
        let books = self.cable.books();
        let income = counters.received + books.copied;
        assert_eq!(
            income,
            counters.sent + counters.lost + counters.queue_full + counters.held
        );
        counters
    }

    /// When packets have left, after the start.
    fn times(&self) -> Vec<u64> {
        self.left.iter().map(|(at, _)| at - START).collect()
    }

    fn numbers(&self) -> Vec<u32> {
        let number = |frame: &Vec<u8>| u32::from_be_bytes(frame[..4].try_into().unwrap());
        self.left.iter().map(|(_, frame)| number(frame)).collect()
    }
}

fn frames(n: u32, len: usize) -> Vec<Vec<u8>> {
    (0..n)
        .map(|i| {
            let mut frame = i.to_be_bytes().to_vec();
            frame.resize(len, 0);
            frame
        })
        .collect()
}

#[test]
fn a_good_cable_keeps_nothing() {
    let mut lab = Lab::new(&ImpairOrders::default());
    lab.send(&frames(100, 60));
    assert_eq!(lab.times(), vec![0; 100]);
    assert_eq!(lab.cable.due(), None);
    assert_eq!(lab.counters().sent, 100);
}

#[test]
fn a_delay_is_exact_whatever_comes_meanwhile() {
    let mut lab = Lab::new(&ImpairOrders {
        delay_ns: ms(10.0),
        ..ImpairOrders::default()
    });
    for round in 0..50 {
        lab.run_to(START + round * MS / 2);
        lab.send(&frames(200, 1_500));
    }
    lab.run_to(START + 100 * MS);
    let times = lab.times();
    assert_eq!(times.len(), 10_000);
    for (k, at) in (0..).zip(times) {
        assert_eq!(at, 10 * MS + k / 200 * MS / 2);
    }
    let counters = lab.counters();
    assert_eq!((counters.late.summary().max, counters.reordered), (0, 0));
    assert_eq!(counters.achieved, counters.asked);
}

#[test]
fn what_leaves_is_what_came() {
    let mut lab = Lab::new(&ImpairOrders {
        delay_ns: ms(1.0),
        ..ImpairOrders::default()
    });
    let sent: Vec<Vec<u8>> = [14, 60, 192, 193, 1_514, 9_000, 65_535]
        .map(|len: usize| (0..=255).cycle().take(len).collect())
        .to_vec();
    lab.send(&sent);
    lab.run_to(START + MS);
    let left: Vec<_> = lab.left.into_iter().map(|(_, frame)| frame).collect();
    assert_eq!(left, sent);
}

/// A delay of 10 ms with a jitter of 2 ms: mean and deviation of what 200 000 packets met, in ms.
fn delays(distribution: Distribution) -> (f64, f64, Vec<f64>) {
    let mut lab = Lab::new(&ImpairOrders {
        delay_ns: ms(10.0),
        jitter_ns: ms(2.0),
        distribution,
        ..ImpairOrders::default()
    });
    let mut all = Vec::new();
    for _ in 0..200 {
        let sent = lab.now;
        lab.send(&frames(1_000, 60));
        lab.run_to(sent + 500 * MS);
        all.extend(lab.left.drain(..).map(|(at, _)| (at - sent) as f64 / 1e6));
    }
    assert!(all.len() >= 199_990);
    let n = all.len() as f64;
    let mean = all.iter().sum::<f64>() / n;
    let variance = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    all.sort_by(f64::total_cmp);
    (mean, variance.sqrt(), all)
}

#[test]
fn jitter_has_the_shape_that_was_asked_for() {
    let near = |found: f64, expected: f64, by: f64| {
        assert!((found - expected).abs() < by, "{found}, not {expected}");
    };
    let quantile = |all: &[f64], q: usize| all[all.len() * q / 1_000];
    let (mean, deviation, all) = delays(Distribution::Uniform);
    near(mean, 10.0, 0.02);
    near(deviation, 2.0 / 3_f64.sqrt(), 0.02);
    near(quantile(&all, 250), 9.0, 0.03);
    assert!(all[0] >= 8.0 && all[all.len() - 1] <= 12.0);
    let (mean, deviation, all) = delays(Distribution::Normal);
    near(mean, 10.0, 0.02);
    near(deviation, 2.0, 0.02);
    near(quantile(&all, 841), 12.0, 0.05); // one deviation above
    near(quantile(&all, 977), 14.0, 0.1); // two
    let (mean, _, all) = delays(Distribution::Pareto);
    near(mean, 10.0, 0.04);
    // Its quantile function is (1 - q)^(-1/3), moved and stretched.
    let scale = 2.0 / 0.75_f64.sqrt();
    near(
        quantile(&all, 500),
        10.0 + scale * (2_f64.cbrt() - 1.5),
        0.02,
    );
    near(
        quantile(&all, 990),
        10.0 + scale * (100_f64.cbrt() - 1.5),
        0.3,
    );
    let (mean, _, all) = delays(Distribution::Table([-1.0, 0.0, 4.0].into()));
    near(mean, 12.0, 0.05);
    assert!(all.iter().all(|&delay| [8.0, 10.0, 18.0].contains(&delay)));
}

#[test]
fn order_is_kept_if_asked() {
    for keep_order in [false, true] {
        let mut lab = Lab::new(&ImpairOrders {
            delay_ns: ms(10.0),
            jitter_ns: ms(5.0),
            keep_order,
            ..ImpairOrders::default()
        });
        lab.send(&frames(1_000, 60));
        lab.run_to(START + 100 * MS);
        let numbers = lab.numbers();
        assert_eq!(numbers.is_sorted(), keep_order);
        // Each that left behind a later one (RFC 4737).
        let mut latest = 0;
        let reordered = numbers.iter().filter(|&&number| {
            latest = number.max(latest);
            number < latest
        });
        assert_eq!(lab.counters().reordered, reordered.count() as u64);
    }
}

#[test]
fn losses_are_as_likely_and_as_long_as_asked() {
    let n = 200_000;
    let survivors = |orders: &ImpairOrders| {
        let mut lab = Lab::new(orders);
        lab.send(&frames(n, 60));
        assert!(
            lab.dropped
                .iter()
                .all(|&fate| fate == Fate::Drop(virtnet_packet::DropReason::Lost))
        );
        lab.counters();
        lab.numbers()
    };
    let share = |left: &[u32]| 1.0 - left.len() as f64 / f64::from(n);
    let random = survivors(&ImpairOrders {
        loss: Track::constant(0.05),
        ..ImpairOrders::default()
    });
    // Three standard deviations of a binomial distribution.
    assert!((share(&random) - 0.05).abs() < 3.0 * (0.05 * 0.95 / f64::from(n)).sqrt());
    let (to_bad, to_good) = (0.01, 0.2);
    let bursts = survivors(&ImpairOrders {
        burst_loss: Some(GilbertElliott {
            to_bad,
            to_good,
            loss_bad: 1.0,
            loss_good: 0.0,
        }),
        ..ImpairOrders::default()
    });
    let expected = to_bad / (to_bad + to_good);
    assert!(
        (share(&bursts) - expected).abs() < 0.003,
        "{}",
        share(&bursts)
    );
    let gaps: Vec<u32> = bursts
        .windows(2)
        .map(|pair| pair[1] - pair[0] - 1)
        .filter(|&gap| gap > 0)
        .collect();
    let mean = f64::from(gaps.iter().sum::<u32>()) / gaps.len() as f64;
    assert!((mean - 1.0 / to_good).abs() < 0.3, "bursts of {mean}");
}

#[test]
fn the_same_seed_does_the_same_and_one_fault_moves_no_other() {
    let run = |orders: &ImpairOrders, seed| {
        let mut lab = Lab::new(orders);
        lab.cable = Impairment::new(orders, [true, true], seed).unwrap();
        lab.send(&frames(5_000, 60));
        lab.run_to(START + 100 * MS);
        let mut numbers = lab.numbers();
        numbers.sort_unstable();
        numbers
    };
    let loss = ImpairOrders {
        loss: Track::constant(0.1),
        ..ImpairOrders::default()
    };
    let both = ImpairOrders {
        jitter_ns: ms(3.0),
        reorder: 0.3,
        ..loss.clone()
    };
    assert_eq!(run(&loss, 5), run(&loss, 5));
    assert_ne!(run(&loss, 5), run(&loss, 6));
    assert_eq!(run(&loss, 5), run(&both, 5));
}

#[test]
fn doubles_and_turned_bits() {
    let mut lab = Lab::new(&ImpairOrders {
        duplicate: 0.2,
        corrupt: 0.1,
        ..ImpairOrders::default()
    });
    let sent = frames(10_000, 60);
    lab.send(&sent);
    lab.run_to(START);
    let counters = lab.counters();
    let near = |found: u64, expected: u64| found.abs_diff(expected) < expected / 10;
    assert!(near(counters.duplicated, 2_000) && near(counters.corrupted, 1_000));
    assert_eq!(lab.left.len() as u64, 10_000 + counters.duplicated);
    let wrong = lab.left.iter().filter(|(_, frame)| !sent.contains(frame));
    // Two bits of the number may make another number.
    assert!(near(wrong.count() as u64, counters.corrupted));
}

#[test]
fn a_rate_is_kept_to_the_bit_and_a_full_buffer_drops() {
    let mut lab = Lab::new(&ImpairOrders {
        rate_bps: Some(Track::constant(8e6)),
        queue_packets: 100,
        ..ImpairOrders::default()
    });
    lab.send(&frames(150, 1_000));
    assert_eq!(
        lab.dropped,
        vec![Fate::Drop(virtnet_packet::DropReason::QueueFull); 50]
    );
    lab.run_to(START + 1_000 * MS);
    let expected: Vec<u64> = (1..=100).map(|k| k * MS).collect();
    assert_eq!(
        lab.times(),
        expected,
        "1000 bytes at 8 Mbit/s take a millisecond"
    );
    // In bytes.
    let mut lab = Lab::new(&ImpairOrders {
        rate_bps: Some(Track::constant(8e6)),
        queue_bytes: 10_500,
        ..ImpairOrders::default()
    });
    lab.send(&frames(150, 1_000));
    assert_eq!(lab.counters().held, 10);
}

#[test]
fn a_burst_leaves_at_once_and_the_rest_at_the_rate() {
    let mut lab = Lab::new(&ImpairOrders {
        rate_bps: Some(Track::constant(8e6)),
        burst_bytes: 5_000.0,
        ..ImpairOrders::default()
    });
    for _ in 0..2 {
        lab.left.clear();
        let begin = lab.now;
        lab.send(&frames(8, 1_000));
        lab.run_to(begin + 100 * MS);
        let times: Vec<u64> = lab.left.iter().map(|(at, _)| at - begin).collect();
        assert_eq!(times, [0, 0, 0, 0, 0, MS, 2 * MS, 3 * MS]);
    }
    let mut lab = Lab::new(&ImpairOrders {
        rate_pps: Some(Track::constant(1_000.0)),
        burst_packets: 1.0,
        ..ImpairOrders::default()
    });
    lab.send(&frames(4, 60));
    lab.run_to(START + 100 * MS);
    assert_eq!(lab.times(), [0, MS, 2 * MS, 3 * MS]);
}

#[test]
fn rates_and_delays_change_over_time_and_by_order() {
    let mut lab = Lab::new(&ImpairOrders {
        rate_pps: Some(Track::of(vec![1_000.0, 0.0, 2_000.0], 10 * MS)),
        ..ImpairOrders::default()
    });
    lab.send(&frames(20, 60));
    lab.run_to(START + 25 * MS);
    let mut expected: Vec<u64> = (1..=10).map(|k| k * MS).collect();
    expected.extend((1..=10).map(|k| 20 * MS + k * MS / 2));
    assert_eq!(lab.times(), expected);
    // What waits leaves at the new rate, what is on its way keeps its time.
    let slow = ImpairOrders {
        rate_pps: Some(Track::constant(1.0)),
        delay_ns: ms(5.0),
        ..ImpairOrders::default()
    };
    let mut lab = Lab::new(&slow);
    lab.send(&frames(3, 60));
    lab.run_to(START + 1_001 * MS);
    assert_eq!(lab.left.len(), 0);
    lab.cable.order(&ImpairOrders::default(), lab.now);
    lab.run_to(START + 2_000 * MS);
    assert_eq!(lab.times(), [1_001 * MS, 1_001 * MS, 1_005 * MS]);
}

#[test]
fn what_waits_at_the_end_is_dropped_and_counted() {
    let mut lab = Lab::new(&ImpairOrders {
        delay_ns: ms(5.0),
        ..ImpairOrders::default()
    });
    lab.send(&frames(70, 60));
    assert_eq!(lab.cable.books().held, 70);
    let books = lab.cable.close();
    assert_eq!((books.held, books.drops.total()), (0, 70));
    assert_eq!(lab.cable.books(), FunctionCounters::default());
    assert_eq!(lab.cable.due(), None);
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |orders: ImpairOrders| {
        Impairment::new(&orders, [true, true], 0)
            .unwrap_err()
            .to_string()
    };
    let chance = ImpairOrders {
        loss: Track::of(vec![0.1, 1.1], 1),
        ..ImpairOrders::default()
    };
    assert!(refused(chance).contains("from 0 to 1"));
    let delay = ImpairOrders {
        delay_ns: Track::constant(f64::NAN),
        ..ImpairOrders::default()
    };
    assert!(refused(delay).contains("3600 seconds"));
}
