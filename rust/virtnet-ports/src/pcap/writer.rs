//! A capture file being written: one buffer per breath, one write per flush, always ending with a whole record.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use virtnet_packet::{Burst, Picks};

use crate::PortError;

/// The longest packet kept whole: more than any port carries.
const SNAP_LEN: u32 = 262_144;

/// Link type of Ethernet.
const ETHERNET: u32 = 1;

/// When the buffer is this full, it is written without waiting for the flush.
const BUFFER_MAX: usize = 1 << 20;

#[derive(Clone, Copy, Debug)]
enum Format {
    Pcap,
    Pcapng,
}

/// What became of packets since the last flush.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Flushed {
    pub(super) written: u64,
    pub(super) written_bytes: u64,
    pub(super) lost: usize,
}

#[derive(Debug)]
pub(super) struct CaptureWriter {
    file: File,
    format: Format,
    buffer: Vec<u8>,
    /// Packets in the buffer and their bytes.
    buffered: (u64, u64),
    /// Length of the file, which ends with a whole record there.
    file_len: u64,
    flushed: Flushed,
    error: Option<io::Error>,
}

impl CaptureWriter {
    fn over(file: File, format: Format) -> Self {
        Self {
            file,
            format,
            buffer: Vec::new(),
            buffered: (0, 0),
            file_len: 0,
            flushed: Flushed::default(),
            error: None,
        }
    }

    pub(super) fn create(path: &Path) -> Result<Self, PortError> {
        let failed =
            |source| PortError::io(format!("write the capture {}", path.display()), source);
        let is_pcap = path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("pcap"));
        let (format, header): (_, fn(&mut Vec<u8>)) = if is_pcap {
            (Format::Pcap, pcap_header)
        } else {
            (Format::Pcapng, pcapng_header)
        };
        let mut writer = Self::over(File::create(path).map_err(failed)?, format);
        header(&mut writer.buffer);
        writer.write_buffer();
        match writer.error.take() {
            Some(error) => Err(failed(error)),
            None => Ok(writer),
        }
    }

    pub(super) fn error(&self) -> Option<&io::Error> {
        self.error.as_ref()
    }

    /// Takes the picked packets; what becomes of them is known at the flush.
    pub(super) fn append(&mut self, burst: &Burst, picks: &Picks) {
        if self.error.is_some() {
            self.flushed.lost += picks.len();
            return;
        }
        let time_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
            });
        for i in picks.iter() {
            let frame = |out: &mut Vec<u8>| {
                let start = out.len();
                out.resize(start + burst.frame_len(i), 0);
                burst.copy_frame(i, &mut out[start..]);
            };
            match self.format {
                Format::Pcap => pcap_record(&mut self.buffer, time_ns, frame),
                Format::Pcapng => pcapng_record(&mut self.buffer, time_ns, frame),
            }
            self.buffered.0 += 1;
            self.buffered.1 += burst.frame_len(i) as u64;
        }
        if self.buffer.len() >= BUFFER_MAX {
            self.write_buffer();
        }
    }

    /// Writes what has been taken, and tells what became of it.
    pub(super) fn flush(&mut self) -> Flushed {
        self.write_buffer();
        std::mem::take(&mut self.flushed)
    }

    fn write_buffer(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let (packets, bytes) = std::mem::take(&mut self.buffered);
        match self.file.write_all(&self.buffer) {
            Ok(()) => {
                self.file_len += self.buffer.len() as u64;
                self.flushed.written += packets;
                self.flushed.written_bytes += bytes;
            }
            Err(error) => {
                // Part of it may have arrived. Where the file cannot be cut (a pipe), its reader sees half a record.
                drop(self.file.set_len(self.file_len));
                self.flushed.lost += usize::try_from(packets).unwrap_or(usize::MAX);
                self.error = Some(error);
            }
        }
        self.buffer.clear();
    }
}

fn pcap_header(out: &mut Vec<u8>) {
    const NANOSECONDS: u32 = 0xa1b2_3c4d;
    const VERSION: u32 = 0x0004_0002;
    words(out, [NANOSECONDS, VERSION, 0, 0, SNAP_LEN, ETHERNET]);
}

fn pcap_record(out: &mut Vec<u8>, time_ns: u64, frame: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    let seconds = low_word(time_ns / 1_000_000_000);
    let fraction = low_word(time_ns % 1_000_000_000);
    words(out, [seconds, fraction, 0, 0]);
    frame(out);
    let len = len_word(out.len() - start - 16);
    set_word(out, start + 8, len);
    set_word(out, start + 12, len);
}

/// A section and its one interface, which counts in nanoseconds.
pub(super) fn pcapng_header(out: &mut Vec<u8>) {
    const BYTE_ORDER: u32 = 0x1a2b_3c4d;
    const VERSION: u32 = 1;
    const UNKNOWN_LENGTH: u32 = u32::MAX;
    const TIME_RESOLUTION: u32 = 9 | 1 << 16;
    const NANOSECONDS: u32 = 9;
    block(out, 0x0a0d_0d0a, |out| {
        words(out, [BYTE_ORDER, VERSION, UNKNOWN_LENGTH, UNKNOWN_LENGTH]);
    });
    block(out, 1, |out| {
        words(out, [ETHERNET, SNAP_LEN, TIME_RESOLUTION, NANOSECONDS, 0]);
    });
}

pub(super) fn pcapng_record(out: &mut Vec<u8>, time_ns: u64, frame: impl FnOnce(&mut Vec<u8>)) {
    block(out, 6, |out| {
        words(out, [0, low_word(time_ns >> 32), low_word(time_ns), 0, 0]);
        let start = out.len();
        frame(out);
        let len = out.len() - start;
        out.resize(start + len.next_multiple_of(4), 0);
        let len = len_word(len);
        set_word(out, start - 8, len);
        set_word(out, start - 4, len);
    });
}

/// A block of pcapng: type, length, body, length again.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    words(out, [kind, 0]);
    body(out);
    let len = len_word(out.len() + 4 - start);
    words(out, [len]);
    set_word(out, start + 4, len);
}

fn words<const N: usize>(out: &mut Vec<u8>, words: [u32; N]) {
    out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn set_word(out: &mut [u8], at: usize, word: u32) {
    out[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

/// The lower half of `value`.
fn low_word(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// A length in the file. Frames are far shorter than this can hold.
fn len_word(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use virtnet_packet::Offload;

    use super::*;

    #[test]
    fn a_full_disk_loses_packets_that_are_counted_and_ends_the_writing() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut writer = CaptureWriter::over(full, Format::Pcapng);
        let mut burst = Burst::new();
        (0..5).for_each(|_| burst.push_bytes(&[0; 60], Offload::default()));
        writer.append(&burst, &Picks::first(5));
        let flushed = writer.flush();
        assert_eq!((flushed.written, flushed.lost), (0, 5));
        let kind = writer.error().unwrap().kind();
        assert_eq!(kind, io::ErrorKind::StorageFull);
        writer.append(&burst, &Picks::first(2));
        let flushed = writer.flush();
        assert_eq!((flushed.written, flushed.lost), (0, 2));
    }

    #[test]
    fn a_breath_that_is_too_long_for_the_buffer_is_written_at_once() {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let mut writer = CaptureWriter::over(null, Format::Pcap);
        let mut burst = Burst::new();
        (0..40).for_each(|_| burst.push_bytes(&[0; 60_000], Offload::default()));
        writer.append(&burst, &Picks::first(40));
        assert!(writer.buffer.is_empty());
        let flushed = writer.flush();
        assert_eq!((flushed.written, flushed.written_bytes), (40, 2_400_000));
    }
}
