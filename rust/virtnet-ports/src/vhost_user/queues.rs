//! The data half of a vhost-user port: the queue pairs of a network device, and the memory they lie in.

mod asked;
mod broken;
mod notify;
mod translated;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtnet_mem::{GuestAddr, GuestMemory, Window, losses};
use virtnet_packet::{Burst, DropReason, Offload, Offloads, Picks, PortCounters};
use virtnet_sys::{EventFd, Events, Poller, Timer};
use virtnet_vhost::{DeviceError, RingAddresses, RingSetup};
use virtnet_virtio::net::control::Settings;
use virtnet_virtio::net::{ReceiveQueue, TransmitQueue, offloads_to_driver};
use virtnet_virtio::{Chains, DeviceQueue, Features, QueueConfig, RingFormat, StartError};

use self::asked::{add, received};
use self::broken::Broken;
use self::notify::{Books, call};
use self::translated::Waiting;
use super::iommu::Misses;
use super::steering::Steering;
use super::{queue_config, rarp};
use crate::RingStatus;

/// Token of the slot's bell; a kick has its ring's number.
pub(super) const BELL: u64 = u64::MAX;

/// The queue pairs of a device, or those of them that one worker has.
#[derive(Debug)]
pub(super) struct Queues {
    memory: Arc<GuestMemory>,
    /// What [`losses`] was when the memory was last looked at.
    losses: u64,
    features: Features,
    pairs: Box<[Pair]>,
    /// Numbers of the pairs whose transmitq runs, and of those whose receiveq runs and is enabled.
    sources: Vec<usize>,
    sinks: Vec<usize>,
    /// Whether packets may pass at all.
    link_up: bool,
    /// Where flows were seen.
    steering: Steering,
    /// What the driver has asked for through a control queue, if it has one with us.
    settings: Option<Arc<Settings>>,
    /// Which of the device's pairs the first one here is, and how far apart they are.
    place: Place,
    /// Where the next burst starts to look for packets.
    turn: usize,
    /// The address of a guest that has moved here, until the network has been told.
    moved_here: Option<[u8; 6]>,
    poller: Arc<Poller>,
    /// Room for what the poller has to say.
    kicked: Events,
    counters: PortCounters,
    /// The ring that had to be given up last.
    broken: Option<(usize, Broken)>,
    /// Why each ring had to be given up, until it starts again.
    why: Box<[Option<Broken>]>,
    /// Rings that had to be given up and were not told of yet.
    untold: Vec<usize>,
    /// Where each ring was when it had to be given up.
    given_up_at: Box<[Option<u32>]>,
    /// Tells the control half that a ring had to be given up.
    needs_reset: Arc<AtomicBool>,
    /// Rings that are to run as soon as it is known where they are. Only with an IOMMU.
    waiting: Box<[Option<Waiting>]>,
    misses: Misses,
    /// Room to look ahead in.
    scratch: Chains,
    /// What has passed each ring.
    books: Box<[Books]>,
    /// How many rings have a notification that is held back.
    held: usize,
    /// Wakes the port when one of them is due, and when that is.
    timer: Option<Timer>,
    timer_at_ns: Option<u64>,
}

/// Where a ring goes on that a device before this one had, which was killed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Recovered {
    /// Where the front-end had said.
    pub(super) given: u32,
    pub(super) base: u32,
    /// Chains that had been taken and are taken again, as far as that is known.
    pub(super) taken_again: u16,
}

/// Which pairs of a device these are: every `step`-th from the `first` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) first: usize,
    pub(super) step: usize,
}

/// A receiveq and a transmitq. Ring numbers are twice the pair's, and one more. Spec: virtio 1.4, 5.1.2, Virtqueues.
#[derive(Debug, Default)]
struct Pair {
    receive: Option<Ring<ReceiveQueue>>,
    transmit: Option<Ring<TransmitQueue>>,
}

/// A queue that runs, and what goes with it.
#[derive(Debug)]
struct Ring<Q> {
    queue: Q,
    setup: RingSetup,
    /// Where it records what is in flight.
    record: Option<Window>,
    /// Sent to, and not published yet.
    dirty: bool,
}

impl Queues {
    /// Room for `queue_pairs` pairs. `needs_reset` is set when a ring had to be given up, for the driver to be told by the device
    /// status.
    pub(super) fn new(
        queue_pairs: u16,
        poller: Arc<Poller>,
        needs_reset: Arc<AtomicBool>,
        misses: Misses,
    ) -> Self {
        Self {
            memory: Arc::default(),
            losses: losses(),
            features: Features::empty(),
            pairs: (0..queue_pairs).map(|_| Pair::default()).collect(),
            sources: Vec::with_capacity(queue_pairs.into()),
            sinks: Vec::with_capacity(queue_pairs.into()),
            link_up: true,
            steering: Steering::new(queue_pairs),
            settings: None,
            place: Place { first: 0, step: 1 },
            turn: 0,
            moved_here: None,
            poller,
            kicked: Events::with_capacity(1 + 2 * usize::from(queue_pairs)),
            counters: PortCounters::default(),
            broken: None,
            why: vec![None; 2 * usize::from(queue_pairs)].into(),
            untold: Vec::with_capacity(2 * usize::from(queue_pairs)),
            given_up_at: vec![None; 2 * usize::from(queue_pairs)].into(),
            needs_reset,
            waiting: (0..2 * queue_pairs).map(|_| None).collect(),
            misses,
            scratch: Chains::new(),
            books: (0..2 * queue_pairs).map(|_| Books::default()).collect(),
            held: 0,
            timer: None,
            timer_at_ns: None,
        }
    }

    // The packet's way.

    #[inline]
    pub(super) fn rx(&mut self, burst: &mut Burst) -> usize {
        if losses() != self.losses {
            self.look_for_losses();
        }
        let before = burst.len();
        for _ in 0..self.sources.len() {
            let Some(&pair) = self.sources.get(self.turn) else {
                self.turn = 0;
                continue;
            };
            self.turn = if self.turn + 1 < self.sources.len() {
                self.turn + 1
            } else {
                0
            };
            let Some(ring) = &mut self.pairs[pair].transmit else {
                continue;
            };
            let first = burst.len();
            let passed = self.settings.is_some().then(|| received(&self.counters));
            let drained = if ring.setup.enabled && self.link_up {
                ring.queue.drain(&self.memory, burst, &mut self.counters)
            } else {
                ring.queue
                    .discard(&self.memory, DropReason::Disabled, &mut self.counters)
            };
            let has_missed = ring.queue.has_missed();
            let books = &mut self.books[2 * pair + 1];
            books.bursts += u64::from(burst.len() > first);
            if let Some(before) = passed {
                add(&mut books.counts, received(&self.counters), before);
            }
            if self.sinks.len() > 1 {
                self.steering.learn(burst, first, pair);
            }
            if let Err(error) = drained {
                self.break_ring(2 * pair + 1, error);
                break;
            }
            if has_missed {
                self.ask_ahead(2 * pair + 1);
            }
            if burst.room() == 0 {
                break;
            }
        }
        if self.moved_here.is_some() && burst.room() > 0 {
            self.announce(burst);
        }
        burst.len() - before
    }

    /// Says to the network that the guest is here, in its name.
    #[cold]
    fn announce(&mut self, burst: &mut Burst) {
        if let Some(mac) = self.moved_here.take() {
            let frame = rarp::request(mac);
            burst.set_memory(&self.memory);
            burst.push_bytes(&frame, Offload::default());
            self.counters.received += 1;
            self.counters.received_bytes += frame.len() as u64;
        }
    }

    #[inline]
    pub(super) fn complete(&mut self) {
        for at in 0..self.sources.len() {
            let pair = self.sources[at];
            let Some(ring) = &mut self.pairs[pair].transmit else {
                continue;
            };
            if ring.queue.complete() {
                self.notify(2 * pair + 1);
            }
        }
        if self.held > 0 {
            self.release_held();
        }
    }

    #[inline]
    pub(super) fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        match *self.sinks.as_slice() {
            [] => 0,
            _ if self.settings.is_some() => self.tx_as_asked(burst, picks),
            [pair] => self.tx_to(pair, burst, picks),
            _ => self.tx_spread(burst, picks),
        }
    }

    #[inline]
    fn tx_to(&mut self, pair: usize, burst: &Burst, picks: &Picks) -> usize {
        let Some(ring) = &mut self.pairs[pair].receive else {
            return 0;
        };
        ring.dirty = true;
        match ring
            .queue
            .fill(&self.memory, burst, picks, &mut self.counters)
        {
            Ok(accepted) => accepted,
            Err(error) => {
                self.break_ring(2 * pair, error);
                0
            }
        }
    }

    #[inline]
    pub(super) fn flush(&mut self) {
        for at in 0..self.sinks.len() {
            let pair = self.sinks[at];
            let Some(ring) = &mut self.pairs[pair].receive else {
                continue;
            };
            if ring.dirty {
                ring.dirty = false;
                let wants_call = ring.queue.publish();
                self.books[2 * pair].bursts += 1;
                if wants_call {
                    self.notify(2 * pair);
                }
            }
        }
        if self.held > 0 {
            self.release_held();
        }
        if self.memory.iotlb().is_some() {
            self.ask_ahead_of_packets();
        }
    }

    pub(super) fn drop_tx(&mut self, reason: DropReason, n: usize) {
        let down = self.sinks.is_empty() && reason == DropReason::NoRoom;
        self.counters
            .tx_drops
            .add(if down { DropReason::PortDown } else { reason }, n);
    }

    // Sleeping and waking.

    /// Asks for kicks; whether there is work already, or a ring that nobody kicks.
    pub(super) fn arm(&mut self) -> bool {
        self.forget_kicks();
        if self.held > 0 || self.timer_at_ns.is_some() {
            self.release_held();
            self.set_timer();
        }
        let mut busy = self.moved_here.is_some();
        for &pair in &self.sources {
            let Some(ring) = &mut self.pairs[pair].transmit else {
                continue;
            };
            let has_work = ring.queue.queue_mut().arm();
            // What waits for a translation is woken when it comes.
            busy |= has_work && !ring.queue.has_missed() || ring.setup.kick.is_none();
        }
        if self.memory.iotlb().is_some() {
            self.ask_ahead_of_packets();
        }
        busy
    }

    pub(super) fn disarm(&mut self) {
        for &pair in &self.sources {
            if let Some(ring) = &mut self.pairs[pair].transmit {
                ring.queue.queue_mut().disarm();
            }
        }
    }

    /// Lets the poller wait for kicks that are still to come. One that stays readable for ever has been heard with this.
    fn forget_kicks(&mut self) {
        // It cannot fail; and if it did, the kicks would be heard once more.
        drop(self.poller.wait(&mut self.kicked, Some(Duration::ZERO)));
        for event in self.kicked.iter().filter(|event| event.token != BELL) {
            let ring = usize::try_from(event.token).unwrap_or(usize::MAX);
            if let Some(kick) = self.setup(ring).and_then(|setup| setup.kick.as_ref()) {
                kick.drain();
            }
            if let Some(books) = self.books.get_mut(ring) {
                books.counts.kicks += 1;
            }
        }
    }

    pub(super) fn counters(&self) -> PortCounters {
        self.counters
    }

    // Changes, between two breaths.

    pub(super) fn set_features(&mut self, features: Features) {
        self.features = features;
    }

    /// Takes the link down, or up: while it is down nothing is delivered, and what drivers send is thrown away.
    pub(super) fn set_link(&mut self, up: bool) {
        self.link_up = up;
        self.note_active();
    }

    pub(super) fn features(&self) -> Features {
        self.features
    }

    /// Has the next burst contain an announcement of this address.
    pub(super) fn set_moved_here(&mut self, mac: [u8; 6]) {
        self.moved_here = Some(mac);
    }

    /// What may be left to the driver. Where nobody is, nothing is worth doing.
    pub(super) fn offloads(&self) -> Offloads {
        if self.sinks.is_empty() {
            Offloads::ALL
        } else {
            let wanted = match &self.settings {
                Some(settings) => (self.features - Features::GUEST_OFFLOADS) | settings.offloads,
                None => self.features,
            };
            offloads_to_driver(wanted)
        }
    }

    /// Moves all running rings to other memory; one that does not lie in it any more is stopped.
    pub(super) fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        self.memory = memory;
        self.misses.clear();
        for ring in 0..2 * self.pairs.len() {
            let Some(setup) = self.setup(ring) else {
                continue;
            };
            let base = self.base(ring).unwrap_or(setup.base);
            let config = queue_config(setup, self.features, base);
            let may_wait = self.memory.iotlb().is_some();
            if may_wait || DeviceQueue::new(&config, &self.memory).is_ok() {
                // It has just been found to be possible.
                drop(self.restart(ring));
            } else {
                self.give_up(ring, Broken::Memory);
            }
        }
    }

    /// Starts a ring where its base says, or where it says itself that a device before this one had got to that was killed; the difference, if
    /// there is one.
    pub(super) fn start_ring(
        &mut self,
        ring: usize,
        mut setup: RingSetup,
        record: Option<Window>,
    ) -> Result<Option<Recovered>, DeviceError> {
        let format = RingFormat::of(self.features);
        if !QueueConfig::size_is_valid(setup.size.into(), format) {
            return Err(format!("a {format} ring cannot have {} entries", setup.size).into());
        }
        let config = queue_config(&setup, self.features, setup.base);
        if self.must_wait(&config) {
            self.wait(ring, setup, record, true)?;
            return Ok(None);
        }
        let given = setup.base;
        let start = match &record {
            Some(record) => DeviceQueue::resume(&config, &self.memory, record),
            None => DeviceQueue::recover(&config, &self.memory).and_then(|base| {
                Ok(DeviceQueue::new(
                    &QueueConfig { base, ..config },
                    &self.memory,
                )?)
            }),
        };
        let taken_again;
        (setup.base, taken_again) = match start {
            Ok(queue) => (queue.base(), queue.taken_again()),
            Err(error) => {
                if !matches!(error, StartError::Memory(_)) {
                    self.needs_reset.store(true, Ordering::Relaxed);
                    // An eventfd that cannot be written is its owner's loss.
                    drop(setup.err.map(|err| err.signal()));
                }
                return Err(error.into());
            }
        };
        let first_call = (setup.base != format.fresh_base())
            .then(|| setup.call.clone())
            .flatten();
        let base = setup.base;
        self.go_on(ring, setup, record)?;
        self.open_books(ring, taken_again);
        if base == format.fresh_base() && taken_again == 0 {
            return Ok(None);
        }
        if let Some(queue) = self.queue(ring) {
            queue.log_all();
        }
        // What was used before may not have reached anyone.
        call(first_call.as_deref(), &mut self.counters);
        let recovered = Recovered {
            given,
            base,
            taken_again,
        };
        Ok((base != given || taken_again > 0).then_some(recovered))
    }

    /// A ring that runs.
    fn queue(&self, ring: usize) -> Option<&DeviceQueue> {
        let pair = self.pairs.get(ring / 2)?;
        if ring.is_multiple_of(2) {
            pair.receive.as_ref().map(|ring| ring.queue.queue())
        } else {
            pair.transmit.as_ref().map(|ring| ring.queue.queue())
        }
    }

    /// Starts a ring exactly where its base says.
    fn go_on(
        &mut self,
        ring: usize,
        setup: RingSetup,
        record: Option<Window>,
    ) -> Result<(), DeviceError> {
        let config = queue_config(&setup, self.features, setup.base);
        if self.must_wait(&config) {
            return self.wait(ring, setup, record, false);
        }
        let mut queue = match &record {
            Some(record) => DeviceQueue::resume(&config, &self.memory, record)?,
            None => DeviceQueue::new(&config, &self.memory)?,
        };
        if let Some(log_addr) = setup.addresses.log_guest_addr {
            queue.log_to(&self.memory, &config, GuestAddr(log_addr));
        }
        // Whoever polls does not need kicks, and whoever sleeps is woken by this change and arms again.
        queue.disarm();
        let Some(pair) = self.pairs.get_mut(ring / 2) else {
            return Err(format!("there is no ring {ring}").into());
        };
        if let Some(kick) = &setup.kick {
            self.poller.add_edge(&**kick, ring as u64)?;
        }
        self.given_up_at[ring] = None;
        self.why[ring] = None;
        if ring.is_multiple_of(2) {
            pair.receive = Some(Ring {
                queue: ReceiveQueue::new(queue, self.features),
                setup,
                record,
                dirty: false,
            });
            self.set_hasher(ring / 2);
        } else {
            pair.transmit = Some(Ring {
                queue: TransmitQueue::new(queue, self.features),
                setup,
                record,
                dirty: false,
            });
        }
        self.note_active();
        Ok(())
    }

    /// Stops a ring; where to go on. Everything of it has been completed, because changes come between breaths.
    pub(super) fn stop_ring(&mut self, ring: usize) -> Option<u32> {
        let given_up_at = self.given_up_at.get(ring).copied().flatten();
        let waits_at = self
            .waiting
            .get(ring)
            .and_then(|waiting| Some(waiting.as_ref()?.setup.base));
        let base = self.base(ring).or(waits_at).or(given_up_at);
        self.drop_ring(ring);
        base
    }

    pub(super) fn stop_all(&mut self) {
        for ring in 0..2 * self.pairs.len() {
            self.drop_ring(ring);
        }
        self.memory = Arc::default();
        self.moved_here = None;
        self.misses.clear();
        self.settings = None;
        self.books
            .iter_mut()
            .for_each(|books| *books = Books::default());
        self.held = 0;
        self.steering.forget();
        self.broken = None;
        self.given_up_at.fill(None);
        self.why.fill(None);
        self.untold.clear();
        self.needs_reset.store(false, Ordering::Relaxed);
    }

    pub(super) fn enable_ring(&mut self, ring: usize, enabled: bool) {
        if let Some(setup) = self.setup_mut(ring) {
            setup.enabled = enabled;
        }
        self.note_active();
    }

    pub(super) fn set_kick(
        &mut self,
        ring: usize,
        kick: Option<Arc<EventFd>>,
    ) -> Result<(), DeviceError> {
        let poller = Arc::clone(&self.poller);
        if let Some(Some(waiting)) = self.waiting.get_mut(ring) {
            waiting.setup.kick = kick;
            return Ok(());
        }
        let Some(setup) = self.setup_mut(ring) else {
            return Ok(());
        };
        if let Some(kick) = &kick {
            poller.add_edge(&**kick, ring as u64)?;
        }
        if let Some(old) = std::mem::replace(&mut setup.kick, kick) {
            poller.remove(&*old)?;
        }
        Ok(())
    }

    pub(super) fn set_call(&mut self, ring: usize, to: Option<Arc<EventFd>>) {
        if let Some(setup) = self.setup_mut(ring) {
            setup.call = to;
            // What was used before the change may not have reached anyone.
            call(setup.call.clone().as_deref(), &mut self.counters);
        }
    }

    pub(super) fn set_err(&mut self, ring: usize, err: Option<Arc<EventFd>>) {
        if let Some(setup) = self.setup_mut(ring) {
            setup.err = err;
        }
    }

    /// Moves a running ring, going on where it is.
    pub(super) fn set_addresses(
        &mut self,
        ring: usize,
        addresses: RingAddresses,
    ) -> Result<(), DeviceError> {
        let Some(setup) = self.setup(ring).cloned() else {
            return Ok(());
        };
        let base = self.base(ring).unwrap_or(setup.base);
        let moved = RingSetup {
            addresses,
            base,
            ..setup.clone()
        };
        if self.memory.iotlb().is_none() {
            DeviceQueue::new(&queue_config(&moved, self.features, base), &self.memory)?;
        }
        let record = self.record(ring);
        self.drop_ring(ring);
        self.go_on(ring, moved, record)
    }

    /// How all rings stand; what the session knows besides is not here.
    pub(super) fn rings(&self) -> Vec<RingStatus> {
        let status = |index: usize| {
            let queue = self.queue(index);
            let Books {
                counts,
                bursts,
                taken_again,
                ..
            } = self.books[index];
            let setup = self.setup(index);
            RingStatus {
                index,
                started: queue.is_some(),
                enabled: setup.is_some_and(|setup| setup.enabled),
                size: queue.map(DeviceQueue::size),
                format: queue.map(|queue| queue.format().name()),
                positions: queue.map(DeviceQueue::positions),
                kick: setup.is_some_and(|setup| setup.kick.is_some()),
                call: setup.is_some_and(|setup| setup.call.is_some()),
                kicks: counts.kicks,
                calls: counts.calls,
                bursts,
                taken_again,
                broken: self.why[index].map(|why| why.to_string()),
            }
        };
        (0..2 * self.pairs.len()).map(status).collect()
    }

    /// Numbers of queue pairs whose transmitq runs, and whose receiveq takes packets.
    pub(super) fn running(&self) -> (usize, usize) {
        (self.sources.len(), self.sinks.len())
    }

    fn drop_ring(&mut self, ring: usize) {
        if ring < self.books.len() {
            self.release(ring);
        }
        if let Some(waiting) = self.waiting.get_mut(ring) {
            *waiting = None;
        }
        if let Some(kick) = self.setup(ring).and_then(|setup| setup.kick.clone()) {
            // It was added when the ring started.
            drop(self.poller.remove(&*kick));
        }
        if let Some(pair) = self.pairs.get_mut(ring / 2) {
            if ring.is_multiple_of(2) {
                pair.receive = None
            } else {
                pair.transmit = None
            }
        }
        self.note_active();
    }

    fn note_active(&mut self) {
        self.sources.clear();
        self.sinks.clear();
        for (number, pair) in self.pairs.iter().enumerate() {
            if pair.transmit.is_some() {
                self.sources.push(number);
            }
            // With RSS its table says which are used.
            let is_used = self.settings.as_ref().is_none_or(|settings| {
                settings.rss.is_some() || self.place.device(number) < settings.pairs.into()
            });
            let enabled = pair.receive.as_ref().is_some_and(|ring| ring.setup.enabled);
            if enabled && is_used && self.link_up {
                self.sinks.push(number);
            }
        }
    }

    fn base(&self, ring: usize) -> Option<u32> {
        self.queue(ring).map(DeviceQueue::base)
    }

    fn record(&self, ring: usize) -> Option<Window> {
        if let Some(waiting) = self.waiting.get(ring)?.as_ref() {
            return waiting.record.clone();
        }
        let pair = self.pairs.get(ring / 2)?;
        if ring.is_multiple_of(2) {
            pair.receive.as_ref()?.record.clone()
        } else {
            pair.transmit.as_ref()?.record.clone()
        }
    }

    /// What a ring that runs was started with, or one that waits for its place.
    fn setup(&self, ring: usize) -> Option<&RingSetup> {
        if let Some(waiting) = self.waiting.get(ring)?.as_ref() {
            return Some(&waiting.setup);
        }
        let pair = self.pairs.get(ring / 2)?;
        if ring.is_multiple_of(2) {
            pair.receive.as_ref().map(|ring| &ring.setup)
        } else {
            pair.transmit.as_ref().map(|ring| &ring.setup)
        }
    }

    fn setup_mut(&mut self, ring: usize) -> Option<&mut RingSetup> {
        if let Some(waiting) = self.waiting.get_mut(ring)?.as_mut() {
            return Some(&mut waiting.setup);
        }
        let pair = self.pairs.get_mut(ring / 2)?;
        if ring.is_multiple_of(2) {
            pair.receive.as_mut().map(|ring| &mut ring.setup)
        } else {
            pair.transmit.as_mut().map(|ring| &mut ring.setup)
        }
    }
}

impl Place {
    /// The number in the device of pair `here`.
    fn device(self, here: usize) -> usize {
        self.first + here * self.step
    }

    /// The number here of a pair of the device, or one that there is not.
    fn here(self, device: usize) -> usize {
        let from = device.wrapping_sub(self.first);
        if from.is_multiple_of(self.step) {
            from / self.step
        } else {
            usize::MAX
        }
    }
}
