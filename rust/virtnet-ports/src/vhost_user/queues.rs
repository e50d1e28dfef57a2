//! The data half of a vhost-user port: the queue pairs of a network device, and the memory they lie in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtnet_mem::{GuestAddr, GuestMemory, Permission, Region, Window, losses};
use virtnet_packet::{BURST_MAX, Burst, DropReason, Offload, Offloads, Picks, PortCounters};
use virtnet_sys::{EventFd, Events, Poller};
use virtnet_vhost::{DeviceError, RingAddresses, RingSetup};
use virtnet_virtio::net::control::{QueueCounts, Settings};
use virtnet_virtio::net::{ReceiveQueue, TransmitQueue, offloads_to_driver};
use virtnet_virtio::{
    Access, Chains, DeviceQueue, Features, QueueConfig, RingError, RingFormat, StartError,
};

use super::iommu::{Misses, touches};
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
}

/// A ring that is to run as soon as it is known where it is.
#[derive(Debug)]
struct Waiting {
    setup: RingSetup,
    record: Option<Window>,
    /// It has not run yet: where it begins may have to be found out.
    is_new: bool,
}

/// How many chains of a ring are looked at ahead for addresses that have to be asked for.
const AHEAD: u16 = 64;

/// Why a ring was given up although nobody had asked for it.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub(super) enum Broken {
    /// It cannot be followed any further.
    #[error("its driver is at fault: {0}")]
    Driver(RingError),
    /// Its memory was taken away.
    #[error("it does not lie in the memory of the front-end any more")]
    Memory,
    /// Pages of the guest's memory are gone, be they its own or those of buffers.
    #[error("pages of the front-end's memory region at {0} are gone")]
    Lost(GuestAddr),
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
    /// What has passed, of a ring whose driver may ask.
    counts: QueueCounts,
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
            if let Some(before) = passed {
                add(&mut ring.counts, received(&self.counters), before);
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
        for &pair in &self.sources {
            let Some(ring) = &mut self.pairs[pair].transmit else {
                continue;
            };
            if ring.queue.complete() {
                ring.call(&mut self.counters);
            }
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

    /// Several receiveqs: a flow goes where the driver sends of it, and always to the same.
    fn tx_spread(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let mut pairs = [0; BURST_MAX];
        for i in picks.iter() {
            pairs[i] = self.steering.pair(burst.head(i), &self.sinks);
        }
        self.tx_to_each(&pairs, burst, picks);
        picks.len()
    }

    /// Sends each pick to the pair that stands in its place. What that has no room for is dropped here, and what it does not take.
    fn tx_to_each(&mut self, pairs: &[usize; BURST_MAX], burst: &Burst, picks: &Picks) {
        let mut left = picks.len();
        for at in 0..self.sinks.len() {
            let Some(&pair) = self.sinks.get(at) else {
                break;
            };
            let mut share = Picks::default();
            picks
                .iter()
                .filter(|&i| pairs[i] == pair)
                .for_each(|i| share.push(i));
            if share.is_empty() {
                continue;
            }
            left -= share.len();
            self.tx_or_drop(pair, burst, &share);
        }
        self.counters.tx_drops.add(DropReason::PortDown, left);
    }

    /// Sends to a pair; what it has no room for is dropped here.
    fn tx_or_drop(&mut self, pair: usize, burst: &Burst, picks: &Picks) {
        let before = sent(&self.counters);
        let n = self.tx_to(pair, burst, picks);
        self.counters
            .tx_drops
            .add(DropReason::NoRoom, picks.len() - n);
        if let (Some(_), Some(ring)) = (&self.settings, &mut self.pairs[pair].receive) {
            add(&mut ring.counts, sent(&self.counters), before);
        }
    }

    /// The driver has a control queue: what it wants to receive, and where.
    #[inline(never)]
    fn tx_as_asked(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let Some(settings) = self.settings.clone() else {
            return 0;
        };
        let mut wanted = *picks;
        if !settings.filter.takes_all() {
            wanted.clear();
            let taken = picks
                .iter()
                .filter(|&i| settings.filter.takes(burst.head(i)));
            taken.for_each(|i| wanted.push(i));
            self.counters
                .tx_drops
                .add(DropReason::NotWanted, picks.len() - wanted.len());
        }
        match (&settings.rss, self.sinks.as_slice()) {
            (Some(rss), _) => {
                let mut pairs = [usize::MAX; BURST_MAX];
                for i in wanted.iter() {
                    pairs[i] = self.place.here(rss.pair(burst.head(i)).into());
                }
                self.tx_to_each(&pairs, burst, &wanted);
            }
            (None, &[pair]) => self.tx_or_drop(pair, burst, &wanted),
            (None, _) => drop(self.tx_spread(burst, &wanted)),
        }
        picks.len()
    }

    #[inline]
    pub(super) fn flush(&mut self) {
        for &pair in &self.sinks {
            let Some(ring) = &mut self.pairs[pair].receive else {
                continue;
            };
            if ring.dirty {
                ring.dirty = false;
                if ring.queue.publish() {
                    ring.call(&mut self.counters);
                }
            }
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
            if let Some(counts) = counts_of(&mut self.pairs, ring) {
                counts.kicks += 1;
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

    /// Follows what the driver has asked for from now on; without it, nothing.
    pub(super) fn set_settings(&mut self, settings: Option<Arc<Settings>>, place: Place) {
        self.settings = settings;
        self.place = place;
        for pair in 0..self.pairs.len() {
            self.set_hasher(pair);
        }
        self.note_active();
    }

    fn set_hasher(&mut self, pair: usize) {
        let hasher = self
            .settings
            .as_ref()
            .and_then(|settings| settings.hasher.clone());
        if let Some(ring) = &mut self.pairs[pair].receive {
            ring.queue.set_hasher(hasher);
        }
    }

    /// What has passed a ring that runs.
    pub(super) fn counts(&mut self, ring: usize) -> QueueCounts {
        counts_of(&mut self.pairs, ring).map_or_else(QueueCounts::default, |counts| *counts)
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

    /// Starts a ring where its base says, or where it says itself that a device before this one had got to that was killed.
    pub(super) fn start_ring(
        &mut self,
        ring: usize,
        mut setup: RingSetup,
        record: Option<Window>,
    ) -> Result<(), DeviceError> {
        let format = RingFormat::of(self.features);
        if !QueueConfig::size_is_valid(setup.size.into(), format) {
            return Err(format!("a {format} ring cannot have {} entries", setup.size).into());
        }
        let config = queue_config(&setup, self.features, setup.base);
        if self.must_wait(&config) {
            return self.wait(ring, setup, record, true);
        }
        let start = match &record {
            Some(record) => DeviceQueue::resume(&config, &self.memory, record).map(|q| q.base()),
            None => DeviceQueue::recover(&config, &self.memory),
        };
        setup.base = match start {
            Ok(base) => base,
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
        self.go_on(ring, setup, record)?;
        // What was used before may not have reached anyone.
        call(first_call.as_deref(), &mut self.counters);
        Ok(())
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
                counts: QueueCounts::default(),
            });
            self.set_hasher(ring / 2);
        } else {
            pair.transmit = Some(Ring {
                queue: TransmitQueue::new(queue, self.features),
                setup,
                record,
                dirty: false,
                counts: QueueCounts::default(),
            });
        }
        self.note_active();
        Ok(())
    }

    /// The memory is seen through other translations, which differ in `size` bytes at `iova`.
    pub(super) fn set_view(&mut self, memory: Arc<GuestMemory>, iova: u64, size: u64) {
        self.memory = memory;
        self.misses.settle(iova, size);
        for ring in 0..2 * self.pairs.len() {
            let Some(setup) = self.setup(ring) else {
                continue;
            };
            let base = self.base(ring).unwrap_or(setup.base);
            let areas = queue_config(setup, self.features, base).areas();
            let is_touched = areas
                .iter()
                .any(|(at, len)| touches(at.0, *len as u64, iova, size));
            if is_touched || self.waiting[ring].is_some() {
                let err = setup.err.clone();
                // All of it is known then, and it is in several pieces, or somewhere a ring cannot be.
                if self.restart(ring).is_err() {
                    self.given_up_at[ring] = Some(base);
                    self.note_broken(ring, Broken::Memory, err.as_deref());
                }
            }
        }
    }

    /// Starts a ring anew where it is, or one that waits.
    fn restart(&mut self, ring: usize) -> Result<(), DeviceError> {
        let Some(setup) = self.setup(ring).cloned() else {
            return Ok(());
        };
        let setup = RingSetup {
            base: self.base(ring).unwrap_or(setup.base),
            ..setup
        };
        let is_new = self.waiting[ring].as_ref().is_some_and(|it| it.is_new);
        let record = self.record(ring);
        self.drop_ring(ring);
        if is_new {
            self.start_ring(ring, setup, record)
        } else {
            self.go_on(ring, setup, record)
        }
    }

    /// Whether it is not known yet where a ring is; what is missing is asked for. Only with an IOMMU.
    fn must_wait(&mut self, config: &QueueConfig) -> bool {
        let Some(iotlb) = self.memory.iotlb() else {
            return false;
        };
        let areas = config.areas().map(|(at, len)| (at.0, len as u64));
        let is_refused = areas.iter().any(|&(at, len)| iotlb.is_refused(at, len));
        let missing = areas
            .iter()
            .flat_map(|&(at, len)| iotlb.missing(at, len, Permission::BOTH));
        let mut missing = missing.peekable();
        let must_wait = is_refused || missing.peek().is_some();
        self.misses.ask(missing);
        must_wait
    }

    fn wait(
        &mut self,
        ring: usize,
        setup: RingSetup,
        record: Option<Window>,
        is_new: bool,
    ) -> Result<(), DeviceError> {
        let Some(place) = self.waiting.get_mut(ring) else {
            return Err(format!("there is no ring {ring}").into());
        };
        *place = Some(Waiting {
            setup,
            record,
            is_new,
        });
        Ok(())
    }

    /// Asks for what the next chains of a ring need.
    #[cold]
    fn ask_ahead(&mut self, ring: usize) {
        let Some(pair) = self.pairs.get(ring / 2) else {
            return;
        };
        let (queue, access) = if ring.is_multiple_of(2) {
            let queue = pair.receive.as_ref().map(|ring| ring.queue.queue());
            (queue, Access::Write)
        } else {
            let queue = pair.transmit.as_ref().map(|ring| ring.queue.queue());
            (queue, Access::Read)
        };
        if let Some(queue) = queue {
            let missing = queue.missing(&self.memory, access, AHEAD, &mut self.scratch);
            self.misses.ask(missing);
        }
    }

    /// Asks for what receiveqs need, before there is a packet that would find no room.
    #[cold]
    fn ask_ahead_of_packets(&mut self) {
        for i in 0..self.sinks.len() {
            self.ask_ahead(2 * self.sinks[i]);
        }
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

    /// The ring that had to be given up last in this session, and why.
    pub(super) fn broken(&self) -> Option<(usize, Broken)> {
        self.broken
    }

    /// The rings that had to be given up since the last question, and why.
    pub(super) fn take_untold(&mut self) -> Vec<(usize, Broken)> {
        let (untold, why) = (&mut self.untold, &self.why);
        untold
            .drain(..)
            .filter_map(|ring| Some((ring, why.get(ring).copied().flatten()?)))
            .collect()
    }

    /// How all rings stand; what the session knows besides is not here.
    pub(super) fn rings(&self) -> Vec<RingStatus> {
        let status = |index: usize| {
            let pair = self.pairs.get(index / 2);
            let queue = pair.and_then(|pair| match index % 2 {
                0 => pair.receive.as_ref().map(|ring| ring.queue.queue()),
                _ => pair.transmit.as_ref().map(|ring| ring.queue.queue()),
            });
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
                broken: self
                    .why
                    .get(index)
                    .copied()
                    .flatten()
                    .map(|why| why.to_string()),
            }
        };
        (0..2 * self.pairs.len()).map(status).collect()
    }

    /// Numbers of queue pairs whose transmitq runs, and whose receiveq takes packets.
    pub(super) fn running(&self) -> (usize, usize) {
        (self.sources.len(), self.sinks.len())
    }

    /// Some memory has been lost in this process: stops all rings if it was this guest's.
    #[cold]
    fn look_for_losses(&mut self) {
        self.losses = losses();
        let Some(lost) = self.memory.lost_region().map(Region::guest) else {
            return;
        };
        for ring in 0..2 * self.pairs.len() {
            if self.setup(ring).is_some() {
                self.give_up(ring, Broken::Lost(lost));
            }
        }
    }

    #[cold]
    fn break_ring(&mut self, ring: usize, error: RingError) {
        // What was taken before the error is still on its way; a transmitq gives it back when it is completed.
        if let Some(transmit) = self
            .pairs
            .get_mut(ring / 2)
            .and_then(|pair| pair.transmit.as_mut())
            && !ring.is_multiple_of(2)
        {
            transmit.queue.complete();
        }
        self.give_up(ring, Broken::Driver(error));
    }

    /// Stops a ring that cannot go on, tells its driver, and remembers where that was.
    fn give_up(&mut self, ring: usize, why: Broken) {
        let err = self.setup(ring).and_then(|setup| setup.err.clone());
        let base = self.base(ring);
        if let Some(place) = self.given_up_at.get_mut(ring) {
            *place = base;
        }
        self.note_broken(ring, why, err.as_deref());
        self.drop_ring(ring);
    }

    fn note_broken(&mut self, ring: usize, why: Broken, err: Option<&EventFd>) {
        if let Some(err) = err {
            // An eventfd that cannot be written is its owner's loss.
            drop(err.signal());
        }
        self.broken = Some((ring, why));
        if let Some(place) = self.why.get_mut(ring) {
            *place = Some(why);
        }
        if !self.untold.contains(&ring) {
            self.untold.push(ring);
        }
        self.needs_reset.store(true, Ordering::Relaxed);
    }

    fn drop_ring(&mut self, ring: usize) {
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
        let pair = self.pairs.get(ring / 2)?;
        if ring.is_multiple_of(2) {
            pair.receive.as_ref().map(|ring| ring.queue.queue().base())
        } else {
            pair.transmit.as_ref().map(|ring| ring.queue.queue().base())
        }
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

impl<Q> Ring<Q> {
    #[inline]
    fn call(&mut self, counters: &mut PortCounters) {
        self.counts.calls += 1;
        call(self.setup.call.as_deref(), counters);
    }
}

fn counts_of(pairs: &mut [Pair], ring: usize) -> Option<&mut QueueCounts> {
    let pair = pairs.get_mut(ring / 2)?;
    if ring.is_multiple_of(2) {
        pair.receive.as_mut().map(|ring| &mut ring.counts)
    } else {
        pair.transmit.as_mut().map(|ring| &mut ring.counts)
    }
}

/// What a transmitq's statistics are made of: packets, bytes, drops, and those that made no sense.
fn received(counters: &PortCounters) -> [u64; 4] {
    let drops = &counters.rx_drops;
    [
        counters.received,
        counters.received_bytes,
        drops.total(),
        drops.of(DropReason::Malformed) + drops.of(DropReason::BadOffload),
    ]
}

/// The same of a receiveq's: packets, bytes, drops, and those for lack of buffers.
fn sent(counters: &PortCounters) -> [u64; 4] {
    let drops = &counters.tx_drops;
    [
        counters.sent,
        counters.sent_bytes,
        drops.total(),
        drops.of(DropReason::NoRoom),
    ]
}

/// Adds what has passed between two readings.
fn add(counts: &mut QueueCounts, now: [u64; 4], before: [u64; 4]) {
    let numbers = [
        &mut counts.packets,
        &mut counts.bytes,
        &mut counts.drops,
        &mut counts.drops_by_driver,
    ];
    for (number, (now, before)) in numbers.into_iter().zip(now.into_iter().zip(before)) {
        *number += now - before;
    }
}

fn call(to: Option<&EventFd>, counters: &mut PortCounters) {
    if let Some(to) = to {
        // An eventfd that cannot be written is its owner's loss.
        drop(to.signal());
        counters.notifications += 1;
    }
}
