//! How long a port is left alone after a look that found nothing.
//!
//! A look at a ring takes lines from the sender that is just writing them, and what is published for a few packets costs as much
//! as for many. A sender that is left alone until nearly half of its ring is full builds bursts: DPDK's driver moves a tenth more
//! packets then. Packets that go round get slower by every wait instead, and looking cannot tell the two apart. So it is tried: a
//! port that many packets come from is left alone in some periods and not in others, and what moved more packets in most pairs of
//! them holds until the next trial. A port that few packets come from is always asked at once.

/// So many packets are waited for, at the rate at which they came lately: a little less than half of the usual ring.
const AWAITED: f64 = 112.0;

/// No packet is made late by more.
const WAIT_MOST_NS: f64 = 12_000.0;

/// Packets per ns: fewer gather no burst that is worth a wait.
const RATE_LEAST: f64 = 1.0 / 400.0;

/// What was found holds for so long.
const SETTLED_NS: u64 = 50_000_000;

/// One period of a trial: some thousands of packets, among which those that were there when it began count little.
const PERIOD_NS: u64 = 250_000;

/// Periods of a trial. Each pair has one with waiting and one without, in turn first, so that what changes steadily cancels out.
const PERIODS: u8 = 16;

/// Waiting must move so many times the packets for a pair to count for it.
const GAIN_LEAST: f64 = 1.02;

/// How many of the eight pairs must count for waiting to begin it, and how many to go on with it.
const BEGIN_WITH: u8 = 6;
const GO_ON_WITH: u8 = 4;

/// What is known of one port.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    /// Not to be asked before.
    until: u64,
    /// How long it is left alone after an empty look now.
    wait_ns: u64,
    /// Packets since the present period began, when that was, and when it is to end.
    packets: u64,
    began: u64,
    ends: u64,
    /// The last trial found that it should be left alone.
    waiting_pays: bool,
    trial: Option<Trial>,
}

/// A trial that is going on.
#[derive(Clone, Copy, Debug)]
struct Trial {
    /// The wait that is tried.
    wait_ns: u64,
    /// The period that is going on, of [`PERIODS`].
    period: u8,
    /// Packets per ns in the first period of this pair.
    first: f64,
    /// Pairs that counted for waiting.
    won: u8,
}

impl Patience {
    /// Whether the port is to be left alone.
    #[inline(always)]
    pub(crate) fn waits(&self, now: u64) -> bool {
        now < self.until
    }

    /// Notes that a look found `n` packets.
    #[inline(always)]
    pub(crate) fn found(&mut self, n: usize, now: u64) {
        self.packets += n as u64;
        if n == 0 {
            self.until = now + self.wait_ns;
        }
        if now >= self.ends {
            self.end_period(now);
        }
    }

    /// Has the port asked at once, as far as its last look is concerned.
    pub(crate) fn end_wait(&mut self) {
        self.until = 0;
    }

    /// One that leaves a port alone for so long whenever it has nothing.
    #[cfg(test)]
    pub(crate) fn of_wait(wait_ns: u64) -> Self {
        Self {
            wait_ns,
            ends: u64::MAX,
            ..Self::default()
        }
    }

    /// Draws the conclusions from a period that is over, and begins the next.
    #[cold]
    #[expect(clippy::cast_precision_loss, reason = "counts of a period are small")]
    fn end_period(&mut self, now: u64) {
        let ns = (now - self.began).max(1);
        let rate = self.packets as f64 / ns as f64;
        let is_whole = ns < 2 * PERIOD_NS;
        self.trial = match self.trial.take() {
            Some(trial) if is_whole => match trial.next(rate) {
                Ok(next) => Some(next),
                Err(won) => {
                    let enough = if self.waiting_pays {
                        GO_ON_WITH
                    } else {
                        BEGIN_WITH
                    };
                    self.waiting_pays = won >= enough;
                    None
                }
            },
            // It was not asked for part of the period: there is nothing to compare.
            Some(_) => None,
            None if rate >= RATE_LEAST => Some(Trial::at(rate)),
            None => {
                self.waiting_pays = false;
                None
            }
        };
        self.wait_ns = match self.trial {
            Some(trial) if trial.waits() => trial.wait_ns,
            Some(_) => 0,
            None if self.waiting_pays => wait_ns(rate),
            None => 0,
        };
        self.packets = 0;
        self.began = now;
        self.ends = now
            + match self.trial {
                Some(_) => PERIOD_NS,
                None => SETTLED_NS,
            };
    }
}

impl Trial {
    /// Of the wait that suits packets at `rate`.
    fn at(rate: f64) -> Self {
        Self {
            wait_ns: wait_ns(rate),
            period: 0,
            first: 0.0,
            won: 0,
        }
    }

    /// Whether the port is left alone in this period: in turn in the first and in the second of a pair.
    fn waits(&self) -> bool {
        matches!(self.period % 4, 0 | 3)
    }

    /// The trial after a period with this rate; or, if that was the last, how many pairs counted for waiting.
    fn next(mut self, rate: f64) -> Result<Self, u8> {
        if self.period.is_multiple_of(2) {
            self.first = rate;
        } else {
            let (late, at_once) = if self.waits() {
                (rate, self.first)
            } else {
                (self.first, rate)
            };
            self.won += u8::from(late > GAIN_LEAST * at_once);
        }
        self.period += 1;
        if self.period < PERIODS {
            Ok(self)
        } else {
            Err(self.won)
        }
    }
}

/// How long [`AWAITED`] packets take at `rate`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and the most"
)]
fn wait_ns(rate: f64) -> u64 {
    (AWAITED / rate).min(WAIT_MOST_NS) as u64
}

#[cfg(test)]
mod tests {
    use virtnet_packet::BURST_MAX;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Asks a port for a second, each look taking 100 ns and as much as `look` says for what it finds; how many packets came,
    /// and how many of them while it was left alone after empty looks.
    fn ask(
        patience: &mut Patience,
        from: u64,
        mut look: impl FnMut(u64) -> (usize, u64),
    ) -> (u64, u64) {
        let (mut now, mut all, mut late) = (from, 0, 0);
        while now < from + SECOND {
            now += 100;
            if patience.waits(now) {
                continue;
            }
            let (n, took) = look(now);
            patience.found(n, now);
            all += n as u64;
            late += if patience.wait_ns > 0 { n as u64 } else { 0 };
            now += took;
        }
        (all, late)
    }

    /// A sender that has a packet every 50 ns and publishes 32 together, loses `lost` ns of its time with every look, and has a
    /// ring of 256.
    fn sender(lost: u64) -> impl FnMut(u64) -> (usize, u64) {
        let (mut last, mut ready_ns, mut there) = (0, 0, 0_usize);
        move |now| {
            ready_ns += (now - last).saturating_sub(lost);
            last = now;
            while ready_ns >= 32 * 50 {
                ready_ns -= 32 * 50;
                there = (there + 32).min(256);
            }
            let n = there.min(BURST_MAX);
            there -= n;
            (n, 0)
        }
    }

    #[test]
    fn a_sender_that_looks_disturb_is_left_alone() {
        let mut patience = Patience::default();
        let (all, late) = ask(&mut patience, 1, sender(20));
        assert!(late > all * 8 / 10, "{late} of {all}");
    }

    #[test]
    fn a_sender_that_looks_do_not_disturb_is_asked_at_once() {
        let mut patience = Patience::default();
        let (all, late) = ask(&mut patience, 1, sender(0));
        assert!(all > SECOND / 60 && late < all / 20, "{late} of {all}");
    }

    #[test]
    fn packets_that_go_round_are_asked_for_at_once() {
        let mut patience = Patience::default();
        // Thirty-two come back two microseconds after they were taken.
        let mut back = 0;
        let (all, late) = ask(&mut patience, 1, |now| {
            if now < back {
                return (0, 0);
            }
            back = now + 2_000;
            (32, 0)
        });
        assert!(all > 0 && late < all / 20, "{late} of {all}");
    }

    #[test]
    fn few_packets_are_never_waited_for() {
        let mut patience = Patience::default();
        let (all, late) = ask(&mut patience, 1, |now| (usize::from(now % 1_000 < 100), 0));
        assert!(all > 500_000);
        assert_eq!(late, 0);
    }

    #[test]
    fn a_port_that_becomes_slow_is_asked_at_once_again() {
        let mut patience = Patience::default();
        ask(&mut patience, 1, sender(20));
        assert!(patience.waiting_pays);
        ask(&mut patience, SECOND, |now| {
            (usize::from(now % 1_000 < 100), 0)
        });
        assert!(!patience.waiting_pays);
        assert_eq!(patience.wait_ns, 0);
    }

    #[test]
    fn a_wait_ends_when_its_time_is_over_or_when_it_is_told_to() {
        let mut patience = Patience::of_wait(5_000);
        patience.found(0, 10);
        assert!(patience.waits(5_009) && !patience.waits(5_010));
        patience.end_wait();
        assert!(!patience.waits(11));
    }
}
