//! How long a port is left alone after it has given less than a burst.
//!
//! A look at a ring takes lines from the sender that is just writing them, and what is published for a few packets costs as much as
//! for many. A sender that is left alone for some microseconds builds bursts: with DPDK's driver at 64 bytes on an Intel Xeon between
//! nothing and 1.35 times as many packets came through. Packets that go round get slower by every wait instead, and nobody can tell the two
//! apart by looking. So it is tried: a port that many packets come from is left alone for some periods and not left alone in
//! others, and what moved more packets stays until the next trial. A port that few packets come from is always asked at once.

use virtnet_packet::BURST_MAX;

/// How long a port is left alone: what 16 million packets a second need for a burst, and a fraction of the usual ring.
const WAIT_NS: u64 = 4_000;

/// Packets per ns: below one in 400 ns, a wait would gather none worth it.
const RATE_LEAST: f64 = 1.0 / 400.0;

/// What was found holds for so long.
const SETTLED_NS: u64 = 50_000_000;

/// One period of a trial.
const PERIOD_NS: u64 = 250_000;

/// Whether to wait in each period of a trial; in this order what changes steadily meanwhile cancels out.
const TRIAL: [bool; 4] = [true, false, false, true];

/// Waiting must move so many times the packets, since it makes them late.
const GAIN_LEAST: f64 = 1.04;

/// What is known of one port.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    /// Not to be asked before.
    until: u64,
    /// How long it is left alone now.
    wait_ns: u64,
    /// Packets since the present period began.
    packets: u64,
    began: u64,
    ends: u64,
    /// The period of the trial that is going on.
    period: Option<usize>,
    /// Packets and ns of a trial's periods so far, without and with waiting.
    found: [(u64, u64); 2],
}

impl Patience {
    /// Whether the port is to be left alone.
    #[inline(always)]
    pub(crate) fn waits(&self, now: u64) -> bool {
        now < self.until
    }

    /// Notes that `n` packets came, at least one.
    #[inline(always)]
    pub(crate) fn came(&mut self, n: usize, now: u64) {
        self.packets += n as u64;
        if now >= self.ends {
            self.end_period(now);
        }
        if n < BURST_MAX {
            self.until = now + self.wait_ns;
        }
    }

    /// Draws the conclusions from a period that is over, and begins the next.
    #[cold]
    fn end_period(&mut self, now: u64) {
        let (packets, ns) = (self.packets, now - self.began);
        let next = match self.period {
            // A port that was silent for part of the time has nothing to be compared with, and begins anew.
            Some(period) if ns < 2 * PERIOD_NS => {
                let (all_packets, all_ns) = &mut self.found[usize::from(TRIAL[period])];
                *all_packets += packets;
                *all_ns += ns;
                Some(period + 1).filter(|&next| next < TRIAL.len())
            }
            Some(_) => {
                self.found = Default::default();
                None
            }
            None => {
                self.found = Default::default();
                // The first period of all ends with its first packet.
                Some(0).filter(|_| ns >= SETTLED_NS && rate((packets, ns)) >= RATE_LEAST)
            }
        };
        let waits = next.map_or_else(|| self.is_better_late(), |period| TRIAL[period]);
        self.wait_ns = if waits { WAIT_NS } else { 0 };
        self.period = next;
        self.packets = 0;
        self.began = now;
        self.ends = now
            + if next.is_some() {
                PERIOD_NS
            } else {
                SETTLED_NS
            };
    }

    /// Whether waiting moved more packets in the last trial.
    fn is_better_late(&self) -> bool {
        let [at_once, late] = self.found.map(rate);
        late > GAIN_LEAST * at_once
    }
}

/// Packets per ns.
#[expect(clippy::cast_precision_loss, reason = "counts of a period are small")]
fn rate((packets, ns): (u64, u64)) -> f64 {
    packets as f64 / ns.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Asks a port for a second, each look taking 100 ns and as much as `look` says for what it finds; how many packets came late.
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
            if n > 0 {
                patience.came(n, now);
                all += n as u64;
                late += if patience.wait_ns > 0 { n as u64 } else { 0 };
            }
            now += took;
        }
        (all, late)
    }

    /// A sender that has a packet every 50 ns, but loses 200 ns with every look.
    fn disturbed() -> impl FnMut(u64) -> (usize, u64) {
        let mut last = 0;
        move |now| {
            let n = ((now - last).saturating_sub(200) / 50).min(BURST_MAX as u64);
            last = now;
            (n as usize, 200)
        }
    }

    #[test]
    fn a_sender_that_looks_disturb_is_left_alone() {
        let mut patience = Patience::default();
        let (all, late) = ask(&mut patience, 1, disturbed());
        assert!(late > all * 9 / 10, "{late} of {all}");
    }

    #[test]
    fn a_sender_that_looks_do_not_disturb_is_not_left_alone() {
        let mut patience = Patience::default();
        let mut last = 0;
        let (all, late) = ask(&mut patience, 1, |now| {
            let n = (now - last) / 50;
            last = now;
            (n as usize, 0)
        });
        assert!(all > SECOND / 60 && late < all / 50, "{late} of {all}");
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
        assert!(all > 0 && late < all / 50, "{late} of {all}");
    }

    #[test]
    fn few_packets_are_never_waited_for() {
        let mut patience = Patience::default();
        let (all, late) = ask(&mut patience, 1, |now| (usize::from(now % 1_000 < 100), 0));
        assert!(all > 500_000);
        assert_eq!(late, 0);
    }

    #[test]
    fn a_port_that_pauses_is_asked_at_once_again() {
        let mut patience = Patience::default();
        ask(&mut patience, 1, disturbed());
        assert!(patience.wait_ns > 0);
        patience.came(1, 3 * SECOND);
        assert!(!patience.waits(3 * SECOND));
    }
}
