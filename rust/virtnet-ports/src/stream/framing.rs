//! Frames in a stream of bytes: four bytes of length, big-endian, then the frame.

use std::collections::VecDeque;
use std::fmt;

/// The longest frame we send: the largest segment, an Ethernet header and two tags.
pub(super) const FRAME_MAX: usize = 65_535 + 14 + 8;

/// The longest frame that QEMU sends or takes. Source: QEMU's include/net/net.h, NET_BUFSIZE
const LENGTH_MAX: usize = 4096 + 65_536;

/// Bytes of a length.
const LENGTH: usize = 4;

/// What is read at once, and what may wait to be written.
const BUFFER: usize = 256 << 10;

/// A length that no frame has: whoever sends it speaks of something else.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WrongLength(u32);

impl fmt::Display for WrongLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "it announced a frame of {} bytes, and none has more than {LENGTH_MAX}",
            self.0
        )
    }
}

/// Bytes that have come, and are not frames yet.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// Made when the first bytes come.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    /// Where to put what comes: there is room for a whole frame beyond what is there, or what is there is one.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = vec![0; BUFFER];
        }
        if self.start > BUFFER / 2 || self.start == self.end {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    /// Says that so many bytes were put there.
    pub(super) fn filled(&mut self, n: usize) {
        self.end = (self.end + n).min(self.buffer.len());
    }

    /// The length of the frame that is next, if that has come.
    fn length(&self) -> Option<u32> {
        let length = self.buffer.get(self.start..self.end)?.first_chunk()?;
        Some(u32::from_be_bytes(*length))
    }

    /// Whether a whole frame is there, or what can be none.
    pub(super) fn has_frame(&self) -> bool {
        self.length().is_some_and(|length| {
            length as usize > LENGTH_MAX || self.end - self.start >= LENGTH + length as usize
        })
    }

    /// The next frame, if it has come whole.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, WrongLength> {
        let Some(length) = self.length() else {
            return Ok(None);
        };
        let len = length as usize;
        if len > LENGTH_MAX {
            return Err(WrongLength(length));
        }
        let from = self.start + LENGTH;
        if from + len > self.end {
            return Ok(None);
        }
        self.start = from + len;
        Ok(self.buffer.get(from..from + len))
    }
}

/// Frames that are to leave.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    /// How many of them have left.
    written: usize,
    /// Of each frame that has not left whole: where it ends in `bytes`, and its length.
    frames: VecDeque<(usize, usize)>,
}

impl Outgoing {
    pub(super) fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    /// What is to be written.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    pub(super) fn has_room(&self, len: usize) -> bool {
        self.bytes.len() + LENGTH + len <= BUFFER
    }

    /// Appends a frame of `len` bytes, at most [`FRAME_MAX`], which `write` puts in place.
    pub(super) fn push(&mut self, len: usize, write: impl FnOnce(&mut [u8])) {
        let length = u32::try_from(len).unwrap_or(u32::MAX);
        self.bytes.extend(length.to_be_bytes());
        let at = self.bytes.len();
        self.bytes.resize(at + len, 0);
        write(&mut self.bytes[at..]);
        self.frames.push_back((at + len, len));
    }

    /// Says that so many bytes have left.
    pub(super) fn written(&mut self, n: usize) {
        self.written = (self.written + n).min(self.bytes.len());
        while self
            .frames
            .front()
            .is_some_and(|(end, _)| *end <= self.written)
        {
            self.frames.pop_front();
        }
        if self.is_empty() {
            self.bytes.clear();
            self.written = 0;
        } else if self.written > BUFFER / 2 {
            self.bytes.drain(..self.written);
            for (end, _) in &mut self.frames {
                *end -= self.written;
            }
            self.written = 0;
        }
    }

    /// Forgets what has not left: how many frames, and their bytes.
    pub(super) fn abandon(&mut self) -> (u64, u64) {
        let bytes = self.frames.iter().map(|(_, len)| *len as u64).sum();
        let frames = self.frames.len() as u64;
        *self = Self::default();
        (frames, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(incoming: &mut Incoming, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = incoming.room();
            let n = room.len().min(bytes.len());
            assert!(n > 0, "there is no room");
            room[..n].copy_from_slice(&bytes[..n]);
            incoming.filled(n);
            bytes = &bytes[n..];
        }
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let lens = [0, 1, 14, 60, 1514, FRAME_MAX, LENGTH_MAX, 5, 65_535];
        for step in [1, 3, 4, 5, 1000, 65_536, BUFFER] {
            let (mut outgoing, mut incoming, mut found) =
                (Outgoing::default(), Incoming::default(), Vec::new());
            let mut wanted = lens.iter().peekable();
            while wanted.peek().is_some() || !outgoing.is_empty() {
                while let Some(&&len) = wanted.peek()
                    && outgoing.has_room(len)
                {
                    outgoing.push(len, |bytes| bytes.fill(u8::try_from(len % 251).unwrap()));
                    wanted.next();
                }
                let n = outgoing.bytes().len().min(step);
                put(&mut incoming, &outgoing.bytes()[..n]);
                outgoing.written(n);
                while incoming.has_frame() {
                    let frame = incoming.next().unwrap().unwrap();
                    assert!(frame.iter().all(|&b| usize::from(b) == frame.len() % 251));
                    found.push(frame.len());
                }
                assert_eq!(incoming.next(), Ok(None));
            }
            assert_eq!(found, lens);
            assert_eq!(outgoing.abandon(), (0, 0));
        }
    }

    #[test]
    fn lengths_that_no_frame_has_are_refused() {
        for length in [69_633, 1 << 24, 0x4745_5420, u32::MAX] {
            let mut incoming = Incoming::default();
            put(&mut incoming, &length.to_be_bytes()[..3]);
            assert!(!incoming.has_frame());
            put(&mut incoming, &length.to_be_bytes()[3..]);
            assert!(incoming.has_frame());
            assert_eq!(incoming.next(), Err(WrongLength(length)));
        }
    }

    #[test]
    fn what_has_not_left_whole_is_told() {
        let mut outgoing = Outgoing::default();
        for len in [100, 200, 300] {
            outgoing.push(len, |_| ());
        }
        outgoing.written(104 + 203);
        assert_eq!(outgoing.abandon(), (2, 500));
        assert!(outgoing.is_empty());
    }
}
