//! Between workers: packets whose way leads to a node that another worker has, and what the parts of a switch tell each other.
//!
//! Every worker has the whole network before it and some of its nodes: queue pairs of ports, functions that make packets; functions
//! that only decide are with every worker. Where the next node is not here, the packets are copied into a [`Parcel`] and handed to
//! the worker that has it, through a ring with one producer and one consumer: no lock, and no line that two write. Parcels leave
//! when the breath ends, so that what goes to one place in a breath goes together.
//!
//! It guarantees that packets for one node arrive in the order they were handed over, that none is lost between two workers
//! (what is handed over is taken over, or found when all have stopped), and that a worker that sleeps is woken. A change of the
//! network comes to one worker before the other: what the one sends after it, the other takes over after it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rtrb::{Consumer, Producer, RingBuffer};
use virtnet_packet::{Burst, Picks};
use virtnet_sys::EventFd;

use crate::function::SwitchNews;
use crate::graph::{NodeId, Slot, Target};

/// Parcels on their way from one worker to another. What finds no room is for the sender to drop.
const PARCELS: usize = 64;

/// Parcels of one worker that another takes over in one breath.
pub(crate) const PARCELS_A_BREATH: usize = 8;

/// News on their way from one worker to another; more wait with the sender.
const NEWS: usize = 4_096;

/// News that wait with the sender. Beyond that the oldest are lost: a switch floods for whom it was not told of, and goes on sending to
/// where a station was of which it was not told that it is gone, until that is heard of again.
const NEWS_WAITING: usize = 65_536;

/// Wakes a worker, if it sleeps.
#[derive(Debug)]
pub(crate) struct Bell {
    asleep: AtomicBool,
    wake: EventFd,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            asleep: AtomicBool::new(false),
            wake: EventFd::new()?,
        })
    }

    /// What it rings: readable until it is drained.
    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Rings, also for one that is awake.
    pub(crate) fn ring(&self) {
        // It cannot fail: the eventfd is ours, and a full one is signalled.
        let _ = self.wake.signal();
    }

    /// Says that its worker is about to sleep, or awake again. What is there already must be looked for after this.
    pub(crate) fn set_asleep(&self, asleep: bool) {
        self.asleep.store(asleep, Ordering::Relaxed);
        if asleep {
            fence(Ordering::SeqCst);
        }
    }
}

/// Where a parcel goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) to: Target,
    /// Which node that was: there may be another one by now.
    pub(crate) node: NodeId,
    /// Functions that its packets have entered so far.
    pub(crate) depth: usize,
}

/// Packets that go to one node together. They are copies, bodies and all.
pub(crate) struct Parcel {
    /// How many changes its sender had adopted.
    changes: u64,
    pub(crate) address: Address,
    pub(crate) burst: Box<Burst>,
}

/// What a part of a switch tells the other parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct News {
    /// How many changes who tells it had adopted.
    pub(crate) changes: u64,
    /// The switch: where it is, and which node that was.
    pub(crate) slot: usize,
    pub(crate) node: NodeId,
    pub(crate) what: SwitchNews,
}

/// The way to another worker.
struct Outlet {
    /// To leave when the breath ends. There is room for as many.
    packed: Vec<Parcel>,
    parcels: Producer<Parcel>,
    empties: Consumer<Box<Burst>>,
    waiting: VecDeque<News>,
    news: Producer<News>,
    bell: Arc<Bell>,
}

/// The way from another worker.
struct Inlet {
    parcels: Consumer<Parcel>,
    empties: Producer<Box<Burst>>,
    news: Consumer<News>,
}

/// One worker's ways to and from all others; a worker that is alone has none.
#[derive(Default)]
pub(crate) struct Passages {
    /// This worker's number.
    me: usize,
    /// By worker number; none to itself.
    outlets: Vec<Option<Outlet>>,
    inlets: Vec<Inlet>,
    /// How many changes of the network this worker has adopted.
    pub(crate) changes: u64,
    pub(crate) handed_over: u64,
    pub(crate) taken_over: u64,
}

impl fmt::Debug for Passages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Passages({} of {})", self.me, self.inlets.len() + 1)
    }
}

/// Connects each worker, given by its bell, with each.
pub(crate) fn connect(bells: &[Arc<Bell>]) -> Vec<Passages> {
    let n = bells.len();
    let mut all: Vec<Passages> = (0..n)
        .map(|me| Passages {
            me,
            outlets: (0..n).map(|_| None).collect(),
            ..Passages::default()
        })
        .collect();
    for (from, to) in (0..n).flat_map(|from| (0..n).map(move |to| (from, to))) {
        if from == to {
            continue;
        }
        let (parcels_in, parcels_out) = RingBuffer::new(PARCELS);
        // Whatever is on its way or packed may be on its way back.
        let (empties_in, empties_out) = RingBuffer::new(2 * PARCELS);
        let (news_in, news_out) = RingBuffer::new(NEWS);
        all[from].outlets[to] = Some(Outlet {
            packed: Vec::with_capacity(PARCELS),
            parcels: parcels_in,
            empties: empties_out,
            waiting: VecDeque::new(),
            news: news_in,
            bell: Arc::clone(&bells[to]),
        });
        all[to].inlets.push(Inlet {
            parcels: parcels_out,
            empties: empties_in,
            news: news_out,
        });
    }
    all
}

impl Passages {
    /// Whether there is nobody to hand anything to.
    #[inline]
    pub(crate) fn is_alone(&self) -> bool {
        self.inlets.is_empty()
    }

    /// How many workers there are.
    pub(crate) fn workers(&self) -> usize {
        self.inlets.len() + 1
    }

    /// Whether this worker has what is in `slot`, or the first part of it.
    #[inline]
    pub(crate) fn is_home(&self, slot: Slot) -> bool {
        self.is_alone() || slot.home(self.workers()) == self.me
    }

    /// Packs copies of the picked packets for `worker`; how many found room, counted from the front.
    pub(crate) fn hand_over(
        &mut self,
        worker: usize,
        address: Address,
        burst: &Burst,
        picks: &Picks,
    ) -> usize {
        let Some(Some(outlet)) = self.outlets.get_mut(worker) else {
            return 0;
        };
        let changes = self.changes;
        let mut open = outlet
            .packed
            .iter()
            .rposition(|parcel| parcel.address == address);
        let mut accepted = 0;
        for i in picks.iter() {
            let has_room = open.is_some_and(|at| outlet.packed[at].burst.room() > 0);
            if !has_room {
                open = outlet.open(address, changes);
            }
            let Some(at) = open else { break };
            outlet.packed[at].burst.push_copy(burst, i);
            accepted += 1;
        }
        self.handed_over += accepted as u64;
        accepted
    }

    /// Tells all others.
    pub(crate) fn tell(&mut self, news: News) {
        for outlet in self.outlets.iter_mut().flatten() {
            if outlet.waiting.len() == NEWS_WAITING {
                outlet.waiting.pop_front();
            }
            outlet.waiting.push_back(news);
        }
    }

    /// Sends everything that was packed and told, and wakes those that sleep.
    #[inline]
    pub(crate) fn flush(&mut self) {
        for outlet in self.outlets.iter_mut().flatten() {
            if !outlet.packed.is_empty() || !outlet.waiting.is_empty() {
                outlet.flush();
            }
        }
    }

    /// How many others there are to take parcels from.
    #[inline]
    pub(crate) fn inlets(&self) -> usize {
        self.inlets.len()
    }

    /// The next parcel from the other number `inlet`, unless it comes out of a network that this worker has still to adopt.
    #[inline]
    pub(crate) fn next_parcel(&mut self, inlet: usize) -> Option<Parcel> {
        let parcels = &mut self.inlets[inlet].parcels;
        if parcels.peek().ok()?.changes > self.changes {
            return None;
        }
        let parcel = parcels.pop().ok()?;
        self.taken_over += parcel.burst.len() as u64;
        Some(parcel)
    }

    /// The parcel was unpacked.
    pub(crate) fn give_back(&mut self, inlet: usize, mut burst: Box<Burst>) {
        burst.clear();
        // One too many is freed here.
        drop(self.inlets[inlet].empties.push(burst));
    }

    /// The next piece of news from the other number `inlet`, likewise.
    #[inline]
    pub(crate) fn next_news(&mut self, inlet: usize) -> Option<News> {
        let news = &mut self.inlets[inlet].news;
        if news.peek().ok()?.changes > self.changes {
            return None;
        }
        news.pop().ok()
    }

    /// Whether something has come, or is still to be told.
    pub(crate) fn is_waiting(&self) -> bool {
        let comes = |inlet: &Inlet| !inlet.parcels.is_empty() || !inlet.news.is_empty();
        let mut outlets = self.outlets.iter().flatten();
        self.inlets.iter().any(comes) || outlets.any(|outlet| !outlet.waiting.is_empty())
    }

    /// Packets that are still on their way here when all workers have stopped.
    pub(crate) fn left_behind(&mut self) -> u64 {
        let mut left = 0;
        for inlet in &mut self.inlets {
            while let Ok(parcel) = inlet.parcels.pop() {
                left += parcel.burst.len() as u64;
            }
        }
        left
    }
}

impl Outlet {
    /// Begins a parcel, if there is room for it on the way; its place.
    fn open(&mut self, address: Address, changes: u64) -> Option<usize> {
        if self.packed.len() >= self.parcels.slots() {
            return None;
        }
        self.packed.push(Parcel {
            changes,
            address,
            burst: self.empties.pop().unwrap_or_default(),
        });
        Some(self.packed.len() - 1)
    }

    fn flush(&mut self) {
        for parcel in self.packed.drain(..) {
            let sent = self.parcels.push(parcel);
            debug_assert!(sent.is_ok(), "there is room for what was packed");
        }
        while let Some(&news) = self.waiting.front() {
            if self.news.push(news).is_err() {
                break;
            }
            self.waiting.pop_front();
        }
        // Either the other one sees what was sent before it sleeps, or we see that it sleeps.
        fence(Ordering::SeqCst);
        if self.bell.asleep.load(Ordering::Relaxed) {
            self.bell.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use virtnet_packet::{Port, memory_pair};

    use super::*;
    use crate::plan::Plan;
    use crate::{Change, Source, SourceOptions, SourceOrders, Worker};

    #[test]
    fn packets_of_a_changed_network_wait_for_whoever_has_still_to_adopt_it() {
        let bells = [(), ()].map(|()| Arc::new(Bell::new().unwrap()));
        let mut workers = Worker::team(&bells);
        let orders = SourceOrders {
            count: Some(10),
            rate: None,
        };
        let options = SourceOptions {
            orders,
            ..SourceOptions::default()
        };
        let (here, _) = memory_pair(64);
        let (there, mut outside) = memory_pair(64);
        // The source is with the first worker, and the second port with the second.
        let change = Change::new()
            .add(NodeId(1), Source::new(options).unwrap())
            .add(NodeId(2), here)
            .add(NodeId(3), there)
            .connect(NodeId(1), NodeId(3));
        let plan = Plan::new(workers[0].graph(), change).unwrap();
        let mut shares = plan.spread(2, 0);
        workers[0].adopt(&mut shares[0], 0);
        assert_eq!(workers[0].step(0), 10);
        assert!(workers[1].is_awaited(), "it does not sleep over it");
        assert_eq!(
            workers[1].step(0),
            0,
            "they go to a port that it has not seen"
        );
        workers[1].adopt(&mut shares[1], 0);
        assert_eq!(workers[1].step(0), 10);
        let arrived = outside.rx(&mut Burst::new());
        assert_eq!(arrived, 10);
        let dropped = workers
            .iter()
            .map(|worker| worker.snapshot(0).balance.dropped);
        assert_eq!(dropped.sum::<u64>(), 0);
    }
}
