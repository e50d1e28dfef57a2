//! The way to somebody who reads a capture while it is taken: who may be late, slow, or gone.
//!
//! What he has not read waits here, up to a limit, so that nobody waits for him. A reader that leaves ends the way for good.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use virtnet_sys::{Interest, PipeEnd, Poller, Timer, monotonic_ns};

/// With as much waiting, no more packets are taken.
const WAITING_MAX: usize = 4 << 20;

/// How often a reader is looked for that has not come yet.
const READER_EVERY_NS: u64 = 100_000_000;

/// How often room is looked for where nothing tells that there is some.
const ROOM_EVERY_NS: u64 = 1_000_000;

/// How long the end waits for a reader to take what is left.
const LAST: Duration = Duration::from_secs(1);

/// What is true of a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    Awaited,
    There,
    Gone,
}

#[derive(Debug)]
pub(super) struct Pipe {
    path: PathBuf,
    end: Option<PipeEnd>,
    reader: Reader,
    /// Written and not taken; from `taken` on.
    waiting: Vec<u8>,
    taken: usize,
    /// Readable when there is something to look after.
    poller: Poller,
    timer: Timer,
    /// What the end is watched for.
    interest: Interest,
    next_try_ns: u64,
    /// Something has happened: look now.
    called: bool,
}

impl Pipe {
    /// The way to whoever reads at `path`, who need not be there yet.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let (poller, timer) = (Poller::new()?, Timer::new()?);
        poller.add(&timer, 0)?;
        let mut pipe = Self {
            path: path.to_owned(),
            end: None,
            reader: Reader::Awaited,
            waiting: Vec::new(),
            taken: 0,
            poller,
            timer,
            interest: Interest::Neither,
            next_try_ns: 0,
            called: false,
        };
        pipe.look_for_reader(monotonic_ns())?;
        Ok(pipe)
    }

    pub(super) fn reader(&self) -> Reader {
        self.reader
    }

    /// Whether more may be written.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.len() - self.taken < WAITING_MAX
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// What is to be written behind what waits already.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.waiting
    }

    /// Does what is due: cheap where nothing is.
    pub(super) fn attend(&mut self) {
        let is_idle = self.reader == Reader::There && self.waiting.is_empty() && !self.called;
        if is_idle || self.reader == Reader::Gone {
            return;
        }
        let now = monotonic_ns();
        if !std::mem::take(&mut self.called) && now < self.next_try_ns {
            return;
        }
        match self.reader {
            // What cannot be opened any more is tried again: it may come back.
            Reader::Awaited => drop(self.look_for_reader(now)),
            _ => self.write(now),
        }
    }

    fn look_for_reader(&mut self, now: u64) -> io::Result<()> {
        self.next_try_ns = now.saturating_add(READER_EVERY_NS);
        self.timer.set(Some(self.next_try_ns))?;
        let Some(end) = PipeEnd::writer_at(&self.path)? else {
            return Ok(());
        };
        self.next_try_ns = 0;
        self.timer.set(None)?;
        self.poller.add_with(&end, 1, Interest::Neither)?;
        self.interest = Interest::Neither;
        self.end = Some(end);
        self.reader = Reader::There;
        Ok(())
    }

    fn write(&mut self, now: u64) {
        let Some(end) = &self.end else { return };
        if self.taken == self.waiting.len() && !end.has_reader() {
            return self.leave();
        }
        while self.taken < self.waiting.len() {
            match end.write_some(&self.waiting[self.taken..]) {
                Ok(n) => self.taken += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.next_try_ns = now.saturating_add(ROOM_EVERY_NS);
                    break;
                }
                Err(_) => return self.leave(),
            }
        }
        // What was taken is moved out of when that is cheap.
        if self.taken == self.waiting.len() {
            self.waiting.clear();
            self.taken = 0;
        } else if self.taken > self.waiting.len() / 2 {
            self.waiting.drain(..self.taken);
            self.taken = 0;
        }
    }

    fn leave(&mut self) {
        if let Some(end) = self.end.take() {
            // A duplicate may exist elsewhere, and would go on to be reported.
            drop(self.poller.remove(&end));
        }
        self.reader = Reader::Gone;
        (self.waiting, self.taken) = (Vec::new(), 0);
    }

    /// Has the descriptor tell when there is something to look after; nothing is ever there already.
    pub(super) fn arm(&mut self) {
        let wanted = if self.waiting.is_empty() {
            Interest::Neither
        } else {
            Interest::Writable
        };
        if let Some(end) = &self.end
            && self.interest != wanted
            && self.poller.modify(end, 1, wanted).is_ok()
        {
            self.interest = wanted;
        }
    }

    /// It may have told something.
    pub(super) fn call(&mut self) {
        self.called = true;
    }

    /// Lets the reader take what is left, for a short time.
    pub(super) fn finish(&mut self) {
        let deadline = Instant::now() + LAST;
        loop {
            self.call();
            self.attend();
            let left = deadline.saturating_duration_since(Instant::now());
            match &self.end {
                Some(end) if !self.waiting.is_empty() && !left.is_zero() => {
                    let _ = end.wait_writable(left);
                }
                _ => return,
            }
        }
    }
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}
