//! A device behind an IOMMU: what its queues miss, and what its front-end has told.
//!
//! A queue that meets an address it has no translation for stops there ([`Misses`], on the worker), and the front-end is asked, once
//! for each page. What it tells is put into a list ([`Translations`], on the control thread), and the queues get a new view of the
//! memory between two bursts; what it takes back is gone from all of them before it has its answer. What it does not tell in time
//! is refused: the chain that needs it is given back, and counted as any that makes no sense.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use virtnet_mem::{GuestMemory, Iotlb, MemoryError, Miss, Permission, UserAddr};
use virtnet_sys::EventFd;
use virtnet_vhost::payload;
use virtnet_virtio::QueueConfig;

/// The most pages that one worker has asked for and not got; what else is missing is found again when these are there.
const MOST_ASKED: usize = 256;

/// The most pages that a front-end has been asked for and not told, by all workers.
const MOST_AWAITED: usize = 1024;

/// How long a front-end may take to tell a translation, and how long its refusal holds.
const PATIENCE_NS: u64 = 1_000_000_000;

/// What the queues of one worker miss.
#[derive(Debug)]
pub(super) struct Misses {
    /// Asked for, and neither told nor refused.
    asked: Vec<Miss>,
    to: Sender<Miss>,
    bell: Arc<EventFd>,
}

/// Where the misses of all workers arrive.
#[derive(Debug)]
pub(super) struct Missed {
    from: Receiver<Miss>,
    to: Sender<Miss>,
    bell: Arc<EventFd>,
}

impl Missed {
    pub(super) fn new() -> std::io::Result<Self> {
        let (to, from) = channel();
        let bell = Arc::new(EventFd::new()?);
        Ok(Self { from, to, bell })
    }

    /// The end for one worker.
    pub(super) fn of_worker(&self) -> Misses {
        Misses {
            asked: Vec::new(),
            to: self.to.clone(),
            bell: Arc::clone(&self.bell),
        }
    }

    /// Readable when there is something.
    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Takes what has come.
    pub(super) fn take(&self) -> impl Iterator<Item = Miss> + '_ {
        self.bell.drain();
        self.from.try_iter()
    }
}

impl Misses {
    /// Has these asked for, unless they are already.
    pub(super) fn ask(&mut self, misses: impl IntoIterator<Item = Miss>) {
        let before = self.asked.len();
        for miss in misses {
            if self.asked.len() < MOST_ASKED && !self.asked.contains(&miss) {
                self.asked.push(miss);
                // Only while the port is being closed nobody listens.
                self.to.send(miss).ok();
            }
        }
        if self.asked.len() > before {
            // Our own eventfd: it cannot refuse a signal.
            drop(self.bell.signal());
        }
    }

    /// Whether it is not known yet where a ring is; what is missing is asked for. Only with an IOMMU.
    pub(super) fn must_wait(&mut self, memory: &GuestMemory, config: &QueueConfig) -> bool {
        let Some(iotlb) = memory.iotlb() else {
            return false;
        };
        let areas = config.areas().map(|(at, len)| (at.0, len as u64));
        let is_refused = areas.iter().any(|&(at, len)| iotlb.is_refused(at, len));
        let missing = areas
            .iter()
            .flat_map(|&(at, len)| iotlb.missing(at, len, Permission::BOTH));
        let mut missing = missing.peekable();
        let must_wait = is_refused || missing.peek().is_some();
        self.ask(missing);
        must_wait
    }

    /// Something was told about `size` bytes at `iova`: what is still missing there may be asked for anew.
    pub(super) fn settle(&mut self, iova: u64, size: u64) {
        self.asked.retain(|miss| !overlaps(miss, iova, size));
    }

    pub(super) fn clear(&mut self) {
        self.asked.clear();
    }
}

/// Whether a translation is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// It has to be.
    Now,
    /// It has been.
    Before,
    /// It cannot be: the front-end owes too many answers.
    TooMuch,
}

/// What a front-end has told, and has been asked.
#[derive(Debug, Default)]
pub(super) struct Translations {
    iotlb: Iotlb,
    /// What it has been asked for, and since when.
    asked: Vec<(Miss, u64)>,
    /// Since when something is refused.
    refused_since: Option<u64>,
    /// How many pages have been refused, and the last one.
    pub(super) refused: u64,
    pub(super) last_refused: Option<u64>,
}

impl Translations {
    /// The memory as the queues see it now.
    pub(super) fn view(&self, memory: &GuestMemory) -> Arc<GuestMemory> {
        Arc::new(memory.translated(self.iotlb.clone()))
    }

    /// Notes that `miss` is asked for.
    pub(super) fn note_asked(&mut self, miss: Miss, now_ns: u64) -> Asked {
        if self.asked.iter().any(|(asked, _)| *asked == miss) {
            Asked::Before
        } else if self.asked.len() < MOST_AWAITED {
            self.asked.push((miss, now_ns));
            Asked::Now
        } else {
            Asked::TooMuch
        }
    }

    /// Puts in what was told.
    pub(super) fn insert(
        &mut self,
        memory: &GuestMemory,
        told: &payload::Iotlb,
    ) -> Result<(), MemoryError> {
        let permission = Permission::from_bits(told.permission).unwrap_or(Permission::NONE);
        let user = UserAddr(told.user_addr);
        self.iotlb
            .insert(memory, told.iova, told.size, user, permission)?;
        // Less than was asked for is no answer: it stays asked for, until it is refused.
        self.asked.retain(|(miss, _)| {
            !overlaps(miss, told.iova, told.size) || !permission.allows(miss.wanted)
        });
        Ok(())
    }

    /// Takes out what was taken back.
    pub(super) fn remove(&mut self, iova: u64, size: u64) {
        self.iotlb.remove(iova, size);
    }

    /// Refuses a page that the front-end does not tell.
    pub(super) fn refuse(&mut self, iova: u64, now_ns: u64) {
        self.asked.retain(|(miss, _)| miss.iova != iova);
        self.iotlb.refuse(iova, Iotlb::PAGE);
        self.refused_since.get_or_insert(now_ns);
        self.refused += 1;
        self.last_refused = Some(iova);
    }

    /// Forgets everything, because the memory is another.
    pub(super) fn clear(&mut self) {
        self.iotlb.clear();
        self.asked.clear();
    }

    /// The pages that have been asked for too long ago.
    pub(super) fn overdue(&self, now_ns: u64) -> Vec<u64> {
        let is_over = |since: u64| now_ns.saturating_sub(since) >= PATIENCE_NS;
        let overdue = self.asked.iter().filter(|(_, since)| is_over(*since));
        overdue.map(|(miss, _)| miss.iova).collect()
    }

    /// Lets go of refusals that are old enough to ask again; whether there were any.
    pub(super) fn forgive(&mut self, now_ns: u64) -> bool {
        let since = self.refused_since;
        if since.is_none_or(|since| now_ns.saturating_sub(since) < PATIENCE_NS) {
            return false;
        }
        self.refused_since = None;
        self.iotlb.forget_refused()
    }
}

/// Whether a ring lies in some of `size` bytes at `iova`, or all from there when there is no size.
pub(super) fn touches_ring(config: &QueueConfig, iova: u64, size: u64) -> bool {
    let areas = config.areas();
    let mut areas = areas.iter();
    areas.any(|(at, len)| touches(at.0, *len as u64, iova, size))
}

/// Whether a page is touched by `size` bytes at `iova`, or by all from there when there is no size.
fn overlaps(miss: &Miss, iova: u64, size: u64) -> bool {
    touches(miss.iova, Iotlb::PAGE, iova, size)
}

/// Whether `len` bytes at `at` are among `size` bytes at `iova`, or all from there when there is no size.
fn touches(at: u64, len: u64, iova: u64, size: u64) -> bool {
    let last = |first: u64, size: u64| {
        size.checked_sub(1)
            .map_or(u64::MAX, |reach| first.saturating_add(reach))
    };
    at <= last(iova, size) && iova <= last(at, len)
}
