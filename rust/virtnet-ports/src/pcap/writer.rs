//! A capture being written: into a file, one buffer per breath and one write per flush, always ending with a whole record; or
//! to somebody who reads it meanwhile.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use virtnet_packet::{Burst, DropReason, Origin, Picks};

use super::format::{self, Format, Tally};
use super::pipe::{Pipe, Reader};
use crate::PortError;

/// When the buffer is this full, it is written without waiting for the flush.
const BUFFER_MAX: usize = 1 << 20;

/// A place where packets are captured: an interface of the file.
#[derive(Clone, Debug, Default)]
pub struct CapturePlace {
    /// Its name; empty: none.
    pub name: String,
    /// The filter that its packets have passed, in the language of tcpdump; empty: none.
    pub filter: String,
}

/// What a capture says of itself beside its packets, and how it begins.
#[derive(Clone, Debug, Default)]
pub struct CaptureOptions {
    /// The places that it takes copies from. None: it takes packets, and does not know where they come from.
    pub places: Vec<CapturePlace>,
    /// Written as pcap, not pcapng, whatever the file is called.
    pub pcap: bool,
    /// A file is continued at its end, not made anew: somebody else has opened it.
    pub append: bool,
}

/// How the writing of a capture goes on, for whoever does not own the port.
#[derive(Clone, Debug, Default)]
pub struct PcapWatch(Arc<Watched>);

#[derive(Debug, Default)]
struct Watched {
    state: AtomicU8,
    why: OnceLock<String>,
}

const WRITING: u8 = 0;
const WAITING: u8 = 1;
const ENDED: u8 = 2;

impl PcapWatch {
    /// `writing`; `waiting` for somebody who reads; or `ended`.
    #[must_use]
    pub fn state(&self) -> &'static str {
        match self.0.state.load(Ordering::Acquire) {
            WAITING => "waiting",
            ENDED => "ended",
            _ => "writing",
        }
    }

    /// Why it has ended, once it has.
    #[must_use]
    pub fn why(&self) -> Option<&str> {
        self.0.why.get().map(String::as_str)
    }

    fn set(&self, state: u8) {
        self.0.state.store(state, Ordering::Release);
    }

    fn end(&self, why: &str) {
        // The first reason is the one.
        let _ = self.0.why.set(why.to_owned());
        self.set(ENDED);
    }
}

/// What became of packets since the last flush.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Flushed {
    pub(super) written: u64,
    pub(super) written_bytes: u64,
    pub(super) lost: usize,
}

/// What is written to.
#[derive(Debug)]
enum Target {
    File {
        file: File,
        /// Its length, where it ends with a whole record.
        len: u64,
        buffer: Vec<u8>,
    },
    Pipe(Box<Pipe>),
}

impl Target {
    fn buffer(&mut self) -> &mut Vec<u8> {
        match self {
            Self::File { buffer, .. } => buffer,
            Self::Pipe(pipe) => pipe.buffer(),
        }
    }
}

/// An interface of the file.
#[derive(Debug)]
struct Interface {
    place: CapturePlace,
    tally: Tally,
    /// Packets in the buffer.
    buffered: u64,
}

impl Interface {
    fn new(place: CapturePlace) -> Self {
        let filtered = !place.filter.is_empty();
        Self {
            place,
            tally: Tally {
                filtered,
                ..Tally::default()
            },
            buffered: 0,
        }
    }
}

#[derive(Debug)]
pub(super) struct CaptureWriter {
    target: Target,
    format: Format,
    /// At least one.
    interfaces: Vec<Interface>,
    began_ns: u64,
    /// Bytes of the packets in the buffer.
    buffered_bytes: u64,
    flushed: Flushed,
    error: Option<io::Error>,
    watch: PcapWatch,
}

impl CaptureWriter {
    fn over(target: Target, format: Format, options: CaptureOptions) -> Self {
        let mut places = options.places;
        if places.is_empty() {
            places.push(CapturePlace::default());
        }
        Self {
            target,
            format,
            interfaces: places.into_iter().map(Interface::new).collect(),
            began_ns: wall_ns(),
            buffered_bytes: 0,
            flushed: Flushed::default(),
            error: None,
            watch: PcapWatch::default(),
        }
    }

    pub(super) fn create(path: &Path, options: CaptureOptions) -> Result<Self, PortError> {
        let failed =
            |source| PortError::io(format!("write the capture {}", path.display()), source);
        let is_pcap = options.pcap
            || path
                .extension()
                .is_some_and(|extension| extension.eq_ignore_ascii_case("pcap"));
        let format = if is_pcap {
            Format::Pcap
        } else {
            Format::Pcapng
        };
        let is_pipe = path
            .metadata()
            .is_ok_and(|found| found.file_type().is_fifo());
        let target = if is_pipe {
            Target::Pipe(Box::new(Pipe::open(path).map_err(failed)?))
        } else {
            let mut opening = File::options();
            if options.append {
                opening.append(true);
            } else {
                opening.write(true).create(true).truncate(true);
            }
            let file = opening.open(path).map_err(failed)?;
            let len = file.metadata().map_or(0, |found| found.len());
            Target::File {
                file,
                len: if options.append { len } else { 0 },
                buffer: Vec::new(),
            }
        };
        let mut writer = Self::over(target, format, options);
        match &writer.target {
            Target::Pipe(pipe) if pipe.reader() != Reader::There => writer.watch.set(WAITING),
            _ => writer.begin(),
        }
        writer.write_buffer();
        match writer.error.take() {
            Some(error) => Err(failed(error)),
            None => Ok(writer),
        }
    }

    pub(super) fn error(&self) -> Option<&io::Error> {
        self.error.as_ref()
    }

    pub(super) fn watch(&self) -> PcapWatch {
        self.watch.clone()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        match &self.target {
            Target::File { buffer, .. } => buffer.is_empty(),
            Target::Pipe(pipe) => pipe.is_empty(),
        }
    }

    fn begin(&mut self) {
        self.began_ns = wall_ns();
        let places = self.interfaces.iter().map(|interface| &interface.place);
        format::header(self.format, places, self.target.buffer());
    }

    /// Why packets are not written now, if they are not.
    pub(super) fn is_down(&self) -> Option<DropReason> {
        if self.error.is_some() {
            return Some(DropReason::SendError);
        }
        match &self.target {
            Target::Pipe(pipe) if pipe.reader() != Reader::There => Some(DropReason::PortDown),
            _ => None,
        }
    }

    /// Takes the picked packets, as many as there is room for; what becomes of those is known at the flush.
    pub(super) fn append(&mut self, from: Origin, burst: &Burst, picks: &Picks) -> usize {
        if let Target::Pipe(pipe) = &self.target
            && !pipe.has_room()
        {
            return 0;
        }
        let Some(interface) = self.interfaces.get_mut(usize::from(from.place)) else {
            return 0;
        };
        let time_ns = wall_ns();
        for i in picks.iter() {
            let frame = |out: &mut Vec<u8>| {
                let start = out.len();
                out.resize(start + burst.frame_len(i), 0);
                burst.copy_frame(i, &mut out[start..]);
            };
            format::record(self.format, from, time_ns, self.target.buffer(), frame);
            self.buffered_bytes += burst.frame_len(i) as u64;
        }
        interface.buffered += picks.len() as u64;
        interface.tally.offered += picks.len() as u64;
        if matches!(&self.target, Target::File { buffer, .. } if buffer.len() >= BUFFER_MAX) {
            self.write_buffer();
        }
        picks.len()
    }

    /// Counts packets that it had no room for.
    pub(super) fn refused(&mut self, from: Origin, n: usize) {
        if let Some(interface) = self.interfaces.get_mut(usize::from(from.place)) {
            interface.tally.offered += n as u64;
            interface.tally.dropped += n as u64;
        }
    }

    /// Writes what has been taken, and tells what became of it.
    pub(super) fn flush(&mut self) -> Flushed {
        self.write_buffer();
        std::mem::take(&mut self.flushed)
    }

    fn write_buffer(&mut self) {
        let bytes = std::mem::take(&mut self.buffered_bytes);
        let written = match &mut self.target {
            Target::Pipe(pipe) => {
                // Given to the reader, whatever he does with it. One who comes is welcomed elsewhere.
                if pipe.reader() == Reader::There {
                    pipe.attend();
                }
                Ok(())
            }
            Target::File { buffer, .. } if buffer.is_empty() => return,
            Target::File { file, len, buffer } => {
                let written = file.write_all(buffer);
                if written.is_ok() {
                    *len += buffer.len() as u64;
                } else {
                    // Part of it may have arrived.
                    drop(file.set_len(*len));
                }
                buffer.clear();
                written
            }
        };
        let mut packets = 0;
        for interface in &mut self.interfaces {
            let buffered = std::mem::take(&mut interface.buffered);
            packets += buffered;
            if written.is_err() {
                interface.tally.dropped += buffered;
            }
        }
        match written {
            Ok(()) => {
                self.flushed.written += packets;
                self.flushed.written_bytes += bytes;
            }
            Err(error) => {
                self.flushed.lost += usize::try_from(packets).unwrap_or(usize::MAX);
                self.watch.end(&error.to_string());
                self.error = Some(error);
            }
        }
        self.look_at_reader();
    }

    /// Looks after a reader: who has come, has left, or may have made room.
    pub(super) fn attend(&mut self) {
        let Target::Pipe(pipe) = &mut self.target else {
            return;
        };
        let before = pipe.reader();
        pipe.attend();
        if before == Reader::Awaited && pipe.reader() == Reader::There {
            self.watch.set(WRITING);
            self.begin();
        }
        self.look_at_reader();
    }

    fn look_at_reader(&mut self) {
        if let Target::Pipe(pipe) = &self.target
            && pipe.reader() == Reader::Gone
            && self.watch.state() != "ended"
        {
            self.watch.end("its reader has left");
        }
    }

    pub(super) fn arm(&mut self) {
        if let Target::Pipe(pipe) = &mut self.target {
            pipe.arm();
        }
    }

    pub(super) fn disarm(&mut self) {
        if let Target::Pipe(pipe) = &mut self.target {
            pipe.call();
        }
    }

    pub(super) fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.target {
            Target::Pipe(pipe) => Some(pipe.as_fd()),
            Target::File { .. } => None,
        }
    }

    /// Writes what a capture ends with.
    pub(super) fn finish(&mut self) {
        if self.is_down().is_none() {
            let (began_ns, ended_ns) = (self.began_ns, wall_ns());
            for (i, interface) in self.interfaces.iter().enumerate() {
                let tally = Tally {
                    began_ns,
                    ended_ns,
                    ..interface.tally
                };
                format::statistics(self.format, i, &tally, self.target.buffer());
            }
            self.write_buffer();
            if let Target::Pipe(pipe) = &mut self.target {
                pipe.finish();
            }
        }
        self.watch.end("it was stopped");
    }
}

/// Now, in nanoseconds since 1970.
pub(crate) fn wall_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        })
}

#[cfg(test)]
mod tests {
    use virtnet_packet::Offload;

    use super::*;

    fn over(path: &str, format: Format) -> CaptureWriter {
        let target = Target::File {
            file: File::options().write(true).open(path).unwrap(),
            len: 0,
            buffer: Vec::new(),
        };
        CaptureWriter::over(target, format, CaptureOptions::default())
    }

    #[test]
    fn a_full_disk_loses_packets_that_are_counted_and_ends_the_writing() {
        let mut writer = over("/dev/full", Format::Pcapng);
        let mut burst = Burst::new();
        (0..5).for_each(|_| burst.push_bytes(&[0; 60], Offload::default()));
        writer.append(Origin::default(), &burst, &Picks::first(5));
        let flushed = writer.flush();
        assert_eq!((flushed.written, flushed.lost), (0, 5));
        let kind = writer.error().unwrap().kind();
        assert_eq!(kind, io::ErrorKind::StorageFull);
        assert_eq!(writer.is_down(), Some(DropReason::SendError));
        assert_eq!(writer.watch().state(), "ended");
        assert!(writer.watch().why().unwrap().contains("No space"));
    }

    #[test]
    fn a_breath_that_is_too_long_for_the_buffer_is_written_at_once() {
        let mut writer = over("/dev/null", Format::Pcap);
        let mut burst = Burst::new();
        (0..40).for_each(|_| burst.push_bytes(&[0; 60_000], Offload::default()));
        writer.append(Origin::default(), &burst, &Picks::first(40));
        assert!(writer.target.buffer().is_empty());
        let flushed = writer.flush();
        assert_eq!((flushed.written, flushed.written_bytes), (40, 2_400_000));
    }
}
