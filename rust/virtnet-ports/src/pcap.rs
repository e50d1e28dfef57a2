//! A capture file as a port: a source of recorded packets, or a record of what is sent to it.
//!
//! Opened for reading, the port receives the packets of a pcap or pcapng file, once or over and over, at once or in the rhythm
//! in which they were recorded. Opened for writing, it appends every packet sent to it, with nanosecond times, as pcapng or (by
//! the extension `.pcap`) as pcap.
//!
//! It guarantees that a file that is cut or malformed is refused when the port is opened, with the record and the offset, and
//! that a written file ends with a whole record after every breath, even when the disk fills up. Where a pipe is written to,
//! somebody reads while it is written: who has not come yet, does not keep up or has left costs packets that are counted, and
//! never time. What is written as pcapng ends with what was dropped; where copies are taken from several places, each is an
//! interface with its own counts, and every packet says which way it was going. It refuses captures of anything but Ethernet. A file to
//! be read is held in memory, so that no breath ever waits for a disk.
//!
//! In a packet's way this is a first or a last step.

mod format;
mod pipe;
mod reader;
mod writer;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload, Origin, Picks, Port, PortCounters};
use virtnet_sys::{Timer, monotonic_ns};

use crate::PortError;
use reader::Capture;
pub use reader::read_capture;
use writer::CaptureWriter;
pub(crate) use writer::wall_ns;
pub use writer::{CaptureOptions, CapturePlace, PcapWatch};

/// What a capture file is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PcapMode {
    /// Packets of the file arrive at the port.
    Read {
        /// Whether to begin again at the end.
        looped: bool,
        /// When packets arrive.
        pace: Pace,
    },
    /// Packets sent to the port go into the file, which is made anew.
    Write,
}

impl PcapMode {
    /// Once, as fast as they are taken.
    pub const READ: Self = Self::Read {
        looped: false,
        pace: Pace::Fast,
    };
}

/// When the packets of a capture arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// As fast as they are taken.
    #[default]
    Fast,
    /// As they were recorded, counted from the first look at the port.
    Recorded,
}

/// A capture file as a port.
#[derive(Debug)]
pub struct PcapPort {
    side: Side,
    /// From how many places it takes copies; 0: it takes packets.
    places: u16,
    counters: PortCounters,
}

#[derive(Debug)]
enum Side {
    Read(Player),
    Write(CaptureWriter),
}

impl PcapPort {
    /// Opens the capture file at `path`.
    ///
    /// # Errors
    /// [`PortError::Io`] if it cannot be read or made; [`PortError::Capture`] if it is cut, malformed or not Ethernet;
    /// [`PortError::Option`] if a capture without any duration is to be looped as recorded.
    pub fn open(path: impl AsRef<Path>, mode: PcapMode) -> Result<Self, PortError> {
        let path = path.as_ref();
        let side = match mode {
            PcapMode::Read { looped, pace } => {
                Side::Read(Player::new(Capture::open(path)?, looped, pace)?)
            }
            PcapMode::Write => return Self::capture(path, CaptureOptions::default()),
        };
        Ok(Self {
            side,
            places: 0,
            counters: PortCounters::default(),
        })
    }

    /// Writes a capture to the file or pipe at `path`, with what it says of itself.
    ///
    /// # Errors
    /// [`PortError::Io`] if it cannot be made; [`PortError::Option`] if there are more places than a port has gates. That nobody
    /// reads from a pipe yet is no error.
    pub fn capture(path: impl AsRef<Path>, options: CaptureOptions) -> Result<Self, PortError> {
        let places = options.places.len();
        let places = u16::try_from(places).map_err(|_| PortError::Option {
            option: "places",
            found: places.to_string(),
            expected: format!("at most {}", u16::MAX),
        })?;
        Ok(Self {
            side: Side::Write(CaptureWriter::create(path.as_ref(), options)?),
            places,
            counters: PortCounters::default(),
        })
    }

    /// Whoever wants to know how the writing goes on; none where the port is read from.
    #[must_use]
    pub fn watch(&self) -> Option<PcapWatch> {
        match &self.side {
            Side::Read(_) => None,
            Side::Write(writer) => Some(writer.watch()),
        }
    }

    /// How many packets are still to come; `None` when they never end, 0 for a port that writes.
    #[must_use]
    pub fn remaining(&self) -> Option<usize> {
        match &self.side {
            Side::Read(player) => player.remaining(),
            Side::Write(_) => Some(0),
        }
    }

    /// Why writing has ended, once it has: packets sent since are counted as dropped.
    #[must_use]
    pub fn error(&self) -> Option<&io::Error> {
        match &self.side {
            Side::Read(_) => None,
            Side::Write(writer) => writer.error(),
        }
    }

    fn rx_at(&mut self, burst: &mut Burst, now_ns: u64) -> usize {
        let player = match &mut self.side {
            Side::Read(player) => player,
            Side::Write(writer) => {
                writer.attend();
                return 0;
            }
        };
        let before = burst.len();
        while burst.room() > 0 {
            let Some(frame) = player.next(now_ns) else {
                break;
            };
            self.counters.received += 1;
            self.counters.received_bytes += frame.len() as u64;
            if frame.len() < ETHERNET_LEN {
                self.counters.rx_drops.add(DropReason::Runt, 1);
            } else {
                burst.push_bytes(frame, Offload::default());
            }
        }
        burst.len() - before
    }
}

impl Port for PcapPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        let timed = matches!(&self.side, Side::Read(player) if player.pace == Pace::Recorded);
        self.rx_at(burst, if timed { monotonic_ns() } else { 0 })
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        self.tx_copies(Origin::default(), burst, picks)
    }

    fn places(&self) -> u16 {
        self.places
    }

    fn tx_copies(&mut self, from: Origin, burst: &Burst, picks: &Picks) -> usize {
        let down = match &mut self.side {
            Side::Write(writer) => match writer.is_down() {
                None => return writer.append(from, burst, picks),
                Some(reason) => reason,
            },
            Side::Read(_) => DropReason::PortDown,
        };
        self.counters.tx_drops.add(down, picks.len());
        picks.len()
    }

    fn flush(&mut self) {
        let Side::Write(writer) = &mut self.side else {
            return;
        };
        let flushed = writer.flush();
        self.counters.sent += flushed.written;
        self.counters.sent_bytes += flushed.written_bytes;
        self.counters
            .tx_drops
            .add(DropReason::SendError, flushed.lost);
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.drop_copies(Origin::default(), reason, n);
    }

    fn drop_copies(&mut self, from: Origin, reason: DropReason, n: usize) {
        if let Side::Write(writer) = &mut self.side {
            writer.refused(from, n);
        }
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.side {
            Side::Read(player) => player.timer.as_ref().map(AsFd::as_fd),
            Side::Write(writer) => writer.wait_fd(),
        }
    }

    fn arm(&mut self) -> bool {
        match &mut self.side {
            Side::Read(player) => player.arm(monotonic_ns()),
            Side::Write(writer) => {
                writer.arm();
                false
            }
        }
    }

    fn disarm(&mut self) {
        if let Side::Write(writer) = &mut self.side {
            writer.disarm();
        }
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

impl Drop for PcapPort {
    /// Nobody waits for it: ports are dropped by whoever has removed them, not by their worker.
    fn drop(&mut self) {
        self.flush();
        if let Side::Write(writer) = &mut self.side {
            writer.finish();
        }
    }
}

/// Plays a capture: which packet is next, and when.
#[derive(Debug)]
struct Player {
    capture: Capture,
    /// The next packet.
    at: usize,
    looped: bool,
    pace: Pace,
    /// The moment that stands for the time of the first packet in this round. Set by the first look.
    started_ns: Option<u64>,
    /// How long a round takes: from the first packet to the last, and one mean distance more.
    round_ns: u64,
    /// Only when paced.
    timer: Option<Timer>,
}

impl Player {
    fn new(capture: Capture, looped: bool, pace: Pace) -> Result<Self, PortError> {
        let duration_ns = capture.duration_ns();
        if looped && pace == Pace::Recorded && duration_ns == 0 && capture.len() > 0 {
            return Err(PortError::Option {
                option: "pace",
                found: "recorded, looped, and all packets have the same time".to_owned(),
                expected: "a pace that does not need times".to_owned(),
            });
        }
        let gaps = u64::try_from(capture.len())
            .unwrap_or(u64::MAX)
            .saturating_sub(1)
            .max(1);
        let failed = |source| PortError::io("make a timer for a capture", source);
        let timer = match pace {
            Pace::Fast => None,
            Pace::Recorded => Some(Timer::new().map_err(failed)?),
        };
        Ok(Self {
            capture,
            at: 0,
            looped,
            pace,
            started_ns: None,
            round_ns: duration_ns.saturating_add(duration_ns / gaps),
            timer,
        })
    }

    fn remaining(&self) -> Option<usize> {
        let endless = self.looped && self.capture.len() > 0;
        (!endless).then(|| self.capture.len() - self.at)
    }

    /// When the next packet is due: `None` if there is none.
    fn due_ns(&mut self, now_ns: u64) -> Option<u64> {
        let at_ns = self.capture.time_ns(self.at)?;
        let started_ns = *self.started_ns.get_or_insert(now_ns);
        Some(match self.pace {
            Pace::Fast => now_ns,
            Pace::Recorded => started_ns.saturating_add(at_ns),
        })
    }

    /// The next packet, if it is due.
    fn next(&mut self, now_ns: u64) -> Option<&[u8]> {
        if self.due_ns(now_ns)? > now_ns {
            return None;
        }
        let index = self.at;
        self.at += 1;
        if self.looped && self.at == self.capture.len() {
            self.at = 0;
            self.started_ns = self
                .started_ns
                .map(|started| started.saturating_add(self.round_ns));
        }
        self.capture.frame(index)
    }

    /// Whether a packet is due; otherwise the timer is set to when one is.
    fn arm(&mut self, now_ns: u64) -> bool {
        let due_ns = self.due_ns(now_ns);
        if due_ns.is_some_and(|due| due <= now_ns) {
            return true;
        }
        if let Some(timer) = &self.timer {
            // Our own timer: it cannot refuse.
            drop(timer.set(due_ns));
        }
        false
    }
}

#[cfg(test)]
mod tests;
