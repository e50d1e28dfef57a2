//! Which receiveq a flow goes to: the one beside the transmitq on which the driver sent of it last.
//!
//! Spec: virtio 1.4, 5.1.9.5.6, Automatic receive steering in multiqueue mode.

use virtnet_packet::{Burst, flow_hash};

/// Flows that are remembered; one that falls on the place of another takes it.
const FLOWS: usize = 4096;

/// The bits of an entry that are the pair's number; the others are those of the flow.
const PAIR: u32 = 0x7f;

/// Remembers on which queue pair each flow was seen.
#[derive(Debug)]
pub(super) struct Steering {
    /// By the low bits of a flow's number: its high bits, and a pair. Empty for a device of one pair.
    flows: Box<[u32]>,
}

impl Steering {
    /// For a device of so many queue pairs, 128 at most.
    pub(super) fn new(pairs: u16) -> Self {
        let flows = if pairs > 1 { FLOWS } else { 0 };
        Self {
            flows: vec![0; flows].into(),
        }
    }

    /// Notes that the packets of a burst from the `first` on came by this pair.
    #[inline(never)]
    pub(super) fn learn(&mut self, burst: &Burst, first: usize, pair: usize) {
        let pair = u32::try_from(pair).unwrap_or_default() & PAIR;
        for i in first..burst.len() {
            let flow = flow_hash(burst.head(i));
            if let Some(entry) = self.flows.get_mut(flow as usize % FLOWS) {
                *entry = flow & !PAIR | pair;
            }
        }
    }

    /// The pair of the frame that starts with `head`, one of `pairs`: where its flow was seen, or any that stays the same.
    #[inline]
    pub(super) fn pair(&self, head: &[u8], pairs: &[usize]) -> usize {
        let flow = flow_hash(head);
        let entry = self.flows.get(flow as usize % FLOWS).copied().unwrap_or(0);
        let seen = (entry & PAIR) as usize;
        if entry != 0 && (entry ^ flow) & !PAIR == 0 && pairs.contains(&seen) {
            return seen;
        }
        let any = flow as usize % pairs.len().max(1);
        pairs.get(any).copied().unwrap_or_default()
    }

    /// Forgets all flows: another driver has come.
    pub(super) fn forget(&mut self) {
        self.flows.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use virtnet_packet::Offload;

    use super::*;

    fn udp(from: [u8; 4], to: [u8; 4], ports: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[12..15].copy_from_slice(&[8, 0, 0x45]);
        frame[23] = 17;
        frame[26..30].copy_from_slice(&from);
        frame[30..34].copy_from_slice(&to);
        frame[34..38].copy_from_slice(&ports);
        frame
    }

    fn learn(steering: &mut Steering, frame: &[u8], pair: usize) {
        let mut burst = Burst::new();
        burst.push_bytes(&[0; 60], Offload::default());
        burst.push_bytes(frame, Offload::default());
        steering.learn(&burst, 1, pair);
    }

    #[test]
    fn an_answer_goes_where_the_question_came_from() {
        let mut steering = Steering::new(4);
        let ask = udp([10, 0, 0, 1], [10, 0, 0, 2], [0, 7, 0, 53]);
        let answer = udp([10, 0, 0, 2], [10, 0, 0, 1], [0, 53, 0, 7]);
        for pair in [3, 0, 2, 1] {
            learn(&mut steering, &ask, pair);
            assert_eq!(steering.pair(&answer, &[0, 1, 2, 3]), pair);
        }
        // A pair that is not in use any more.
        assert_eq!(steering.pair(&answer, &[0]), 0);
        steering.forget();
        let any = steering.pair(&answer, &[0, 1, 2, 3]);
        assert_eq!(any, steering.pair(&answer, &[0, 1, 2, 3]));
    }

    #[test]
    fn flows_that_nobody_has_seen_spread() {
        let steering = Steering::new(2);
        let pairs = [0, 1];
        let n = (0..=255)
            .filter(|&k| steering.pair(&udp([10, 0, 0, k], [10, 0, 1, 1], [0; 4]), &pairs) == 1)
            .count();
        assert!((60..196).contains(&n), "{n} of 256");
        let alone = Steering::new(1);
        assert_eq!(alone.pair(&[0; 60], &[0]), 0);
        assert_eq!(alone.pair(&[], &[]), 0);
    }
}
