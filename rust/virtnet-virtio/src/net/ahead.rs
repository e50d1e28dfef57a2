//! Fetching the lines of frames a few frames ahead of their copies.
//!
//! The other side touched these lines last. Fetched one by one, each is waited for, in the order of the copies; fetched all at once,
//! before the first copy, most wait for a place among the dozen or so that a core has under way, and the copies wait behind them. For
//! frames of one line each that is as good, and costs fewest instructions.

use std::ops::Range;

/// Bytes of a line.
pub(super) const LINE: usize = 64;

/// Lines that are asked for at once, while those that were asked for before are used.
const LINES: usize = 16;

/// Bytes of a frame that are fetched in advance to be read, and to be written: further on, the processor sees where a copy goes.
pub(super) const READ: usize = 256;
pub(super) const WRITE: usize = 512;

/// Cuts `n` frames, of which `bytes` each are fetched, into runs: which are to be fetched, and which to be used while they come.
#[inline(always)]
pub(super) fn runs(n: usize, bytes: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let run = match bytes.div_ceil(LINE) {
        0 | 1 => n.max(1),
        lines => (LINES / lines).max(1),
    };
    (0..n).step_by(run).map(move |start| {
        let end = (start + run).min(n);
        let fetched = if start == 0 { 0 } else { end };
        (fetched..(end + run).min(n), start..end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every frame is fetched once and used once, in order, and no later than it is used.
    #[test]
    fn runs_cover_all_frames_once_and_fetch_ahead() {
        for n in [0, 1, 2, 7, 8, 9, 63, 64] {
            for bytes in [0, 1, LINE, LINE + 1, READ, WRITE, 65_000] {
                let (mut fetched, mut used) = (0, 0);
                for (fetch, take) in runs(n, bytes) {
                    assert!(fetch.is_empty() || fetch.start == fetched, "{n} of {bytes}");
                    fetched = fetched.max(fetch.end);
                    assert_eq!(take.start, used, "{n} of {bytes}");
                    used = take.end;
                    assert!(
                        used <= fetched && (used < fetched || used == n),
                        "{n} of {bytes}"
                    );
                }
                assert_eq!((fetched, used), (n, n), "{n} of {bytes}");
            }
        }
    }

    /// Few lines at a time, whatever the frames; frames of one line are all fetched at once.
    #[test]
    fn runs_are_short_where_frames_are_long() {
        let first = |bytes| runs(64, bytes).next();
        assert_eq!(first(LINE), Some((0..64, 0..64)));
        assert_eq!(first(READ), Some((0..8, 0..4)));
        assert_eq!(first(WRITE), Some((0..4, 0..2)));
        assert_eq!(first(65_000), Some((0..2, 0..1)));
    }
}
