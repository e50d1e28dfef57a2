//! Frames for which the other end had no room yet: a unix socket holds few datagrams (`net.unix.max_dgram_qlen`).

use std::collections::VecDeque;

/// How many bytes and frames wait at most.
const BYTES: usize = 256 << 10;
const FRAMES: usize = 512;

/// How long to wait for room, at first and at most, in nanoseconds: nobody says when there is some.
const NAP_MIN_NS: u64 = 200_000;
const NAP_MAX_NS: u64 = 50_000_000;

#[derive(Debug)]
pub(super) struct Backlog {
    /// The frames, one behind the other, from `start` on.
    bytes: Vec<u8>,
    start: usize,
    lens: VecDeque<usize>,
    nap_ns: u64,
}

impl Default for Backlog {
    fn default() -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
            lens: VecDeque::with_capacity(FRAMES),
            nap_ns: NAP_MIN_NS,
        }
    }
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        self.lens.is_empty()
    }

    /// Appends a frame; false if there is no room.
    pub(super) fn push(&mut self, len: usize, write: impl FnOnce(&mut [u8])) -> bool {
        if self.lens.len() == FRAMES || self.bytes.len() + len > BYTES {
            return false;
        }
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        write(&mut self.bytes[at..]);
        self.lens.push_back(len);
        true
    }

    /// The frames, in order.
    pub(super) fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.lens.iter().scan(self.start, |at, &len| {
            let frame = self.bytes.get(*at..*at + len);
            *at += len;
            frame
        })
    }

    /// Forgets the first `n` frames.
    pub(super) fn gone(&mut self, n: usize) {
        self.start += self.lens.drain(..n.min(self.lens.len())).sum::<usize>();
        if self.lens.is_empty() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start > BYTES / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        if n > 0 {
            self.nap_ns = NAP_MIN_NS;
        }
    }

    /// How long to wait before it is tried again; longer each time that nothing could be sent.
    pub(super) fn nap_ns(&mut self) -> u64 {
        let nap = self.nap_ns;
        self.nap_ns = (2 * nap).min(NAP_MAX_NS);
        nap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_leave_in_order_and_there_are_no_more_than_so_many() {
        let mut backlog = Backlog::default();
        let (mut put, mut taken) = (0_usize, 0_usize);
        for _ in 0..2000 {
            while backlog.push(100 + put % 1000, |bytes| {
                bytes.fill(u8::try_from(put % 251).unwrap())
            }) {
                put += 1;
            }
            assert!(put - taken <= FRAMES);
            let first = backlog.frames().take(7);
            for (i, frame) in first.enumerate() {
                assert_eq!(frame.len(), 100 + (taken + i) % 1000);
                assert!(frame.iter().all(|&b| usize::from(b) == (taken + i) % 251));
            }
            backlog.gone(7);
            taken += 7;
        }
        backlog.gone(usize::MAX);
        assert!(backlog.is_empty() && backlog.frames().next().is_none());
    }

    #[test]
    fn waiting_takes_longer_each_time_until_something_leaves() {
        let mut backlog = Backlog::default();
        backlog.push(1, |_| ());
        let naps: Vec<_> = (0..20).map(|_| backlog.nap_ns()).collect();
        assert_eq!(
            (naps[0], naps[1], naps[19]),
            (NAP_MIN_NS, 2 * NAP_MIN_NS, NAP_MAX_NS)
        );
        backlog.gone(1);
        assert_eq!(backlog.nap_ns(), NAP_MIN_NS);
    }
}
