//! A sink: packets end here, counted, and copied out if asked.

use virtnet_packet::{Burst, HEAD_MAX, Picks};

use super::Fate;

/// Room for the last packets of a copying sink: a burst of full frames, as a program keeps that works burst by burst.
const KEPT_BYTES: usize = 128 << 10;

/// Copies start at a line's start, as buffers of a pool do.
const ALIGN: usize = 64;

/// Takes every packet and counts it.
///
/// One that copies behaves as a program does that keeps its packets: whole frames, head and body, go into memory of its
/// own, frame behind frame, the oldest overwritten first.
#[derive(Debug, Default)]
pub struct Sink {
    kept: Vec<u8>,
    at: usize,
    bytes: u64,
    copied_bytes: u64,
}

impl Sink {
    /// A sink that counts and lets go.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A sink that copies every frame out.
    #[must_use]
    pub fn copying() -> Self {
        Self {
            kept: vec![0; KEPT_BYTES + ALIGN],
            ..Self::default()
        }
    }

    /// The same for another worker.
    pub(super) fn part(&self) -> Self {
        if self.kept.is_empty() {
            Self::new()
        } else {
            Self::copying()
        }
    }

    /// Bytes of the frames taken.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes copied out.
    #[must_use]
    pub fn copied_bytes(&self) -> u64 {
        self.copied_bytes
    }

    #[inline]
    pub(super) fn take(&mut self, burst: &Burst, picks: &Picks) -> Fate {
        if self.kept.is_empty() {
            self.bytes += picks.iter().map(|i| burst.frame_len(i) as u64).sum::<u64>();
        } else {
            self.copy_out(burst, picks);
        }
        Fate::Consumed
    }

    #[inline]
    fn copy_out(&mut self, burst: &Burst, picks: &Picks) {
        // What a vector of bytes is aligned to is a matter of luck, and a copy across lines takes a tenth longer.
        let first_line = self.kept.as_ptr().align_offset(ALIGN).min(ALIGN);
        let kept = &mut self.kept[first_line..];
        let (mut at, mut bytes, mut copied_bytes) = (self.at, 0, 0);
        for i in picks.iter() {
            let len = burst.frame_len(i);
            if KEPT_BYTES - at < len {
                at = 0;
            }
            let room = &mut kept[at..];
            let room_len = room.len().min(len.max(HEAD_MAX));
            let copied = burst.copy_frame_loosely(i, &mut room[..room_len]);
            bytes += len as u64;
            copied_bytes += copied as u64;
            at = (at + copied).next_multiple_of(ALIGN) % KEPT_BYTES;
        }
        self.at = at;
        self.bytes += bytes;
        self.copied_bytes += copied_bytes;
    }
}

#[cfg(test)]
mod tests {
    use virtnet_packet::Offload;

    use super::*;

    #[test]
    fn a_copying_sink_keeps_whole_frames_and_never_runs_out() {
        let mut sink = Sink::copying();
        let frame: Vec<u8> = (0..=255).cycle().take(9_000).collect();
        let mut burst = Burst::new();
        for _ in 0..64 {
            burst.push_bytes(&frame, Offload::default());
        }
        for _ in 0..3 {
            assert_eq!(sink.take(&burst, &Picks::first(64)), Fate::Consumed);
        }
        assert_eq!(sink.bytes(), 3 * 64 * 9_000);
        assert_eq!(sink.copied_bytes(), sink.bytes());
        let first = sink.kept.as_ptr().align_offset(ALIGN);
        assert_eq!(sink.kept[first..first + 9_000], frame);
    }

    #[test]
    fn a_plain_sink_counts_bytes_and_copies_none() {
        let mut sink = Sink::new();
        let mut burst = Burst::new();
        burst.push_bytes(&[0; 60], Offload::default());
        burst.push_bytes(&[0; 1_500], Offload::default());
        sink.take(&burst, &Picks::first(2));
        assert_eq!((sink.bytes(), sink.copied_bytes()), (1_560, 0));
    }
}
