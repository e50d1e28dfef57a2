//! The data half of a virtio-user port: the driver's side of queue pairs, in memory of our own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtnet_packet::{BURST_MAX, Burst, DropReason, Offloads, Picks, PortCounters, flow_hash};
use virtnet_sys::{EventFd, Poller};
use virtnet_virtio::net::control::DriverControl;
use virtnet_virtio::net::{BufferArea, DriverReceive, DriverTransmit, offloads_to_device};
use virtnet_virtio::{DriverQueue, Features, QueueConfig, RingError};

use super::layout::QueueLayout;
use crate::{Huge, OwnMemory, PortError, RingStatus};

/// Token of the slot's bell; a call has its ring's number.
pub(super) const BELL: u64 = u64::MAX;

/// The queue pairs of a driver, while there is a device.
#[derive(Debug)]
pub(super) struct DriverQueues {
    pairs: Vec<DriverPair>,
    /// How many of them are sent by; all of them are received from.
    in_use: usize,
    /// What may be left to the device.
    offloads: Offloads,
    /// The device has said that it runs.
    running: bool,
    /// The device says that packets can pass.
    link_up: bool,
    turn: usize,
    poller: Arc<Poller>,
    counters: PortCounters,
    broken: Option<(usize, RingError)>,
    /// Tells the control half that a ring is broken.
    gave_up: Arc<AtomicBool>,
}

/// A receiveq and a transmitq with their events. Ring numbers are twice the pair's, and one more.
#[derive(Debug)]
struct DriverPair {
    receive: DriverReceive,
    transmit: DriverTransmit,
    receive_events: RingEvents,
    transmit_events: RingEvents,
    dirty: bool,
    /// Kicks given, of the receiveq and of the transmitq, and times that buffers were made available.
    kicks: [u64; 2],
    bursts: [u64; 2],
}

/// The two eventfds of a ring.
#[derive(Clone, Debug)]
pub(super) struct RingEvents {
    pub(super) kick: Arc<EventFd>,
    pub(super) call: Arc<EventFd>,
}

impl RingEvents {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            kick: Arc::new(EventFd::new()?),
            call: Arc::new(EventFd::new()?),
        })
    }
}

/// Queues laid out in fresh memory, before a device sees them.
#[derive(Debug)]
pub(super) struct NewQueues {
    pub(super) laid_out: LaidOut,
    pub(super) control: Option<(DriverControl, RingEvents)>,
    pairs: Vec<DriverPair>,
    offloads: Offloads,
}

/// What a back-end has to be told about queues: their memory, where the rings lie in it, and their events.
#[derive(Debug)]
pub(super) struct LaidOut {
    pub(super) memory: OwnMemory,
    pub(super) rings: Vec<(QueueConfig, RingEvents)>,
}

/// Descriptors of a control queue; as many buffers have the room that it needs.
const CONTROL_SIZE: u16 = 4;
const _: () = assert!(
    BufferArea::STRIDE * CONTROL_SIZE as u32 >= DriverControl::AREA
        && CONTROL_SIZE >= DriverControl::DESCRIPTORS
);

impl NewQueues {
    /// Lays out `queue_pairs` pairs of `size` descriptors each; all receive buffers are made available.
    pub(super) fn new(queue_pairs: u16, size: u16, features: Features) -> Result<Self, PortError> {
        let mut layouts = Vec::new();
        let mut end = 0;
        for _ in 0..2 * queue_pairs {
            let layout = QueueLayout::new(size, end);
            end = layout.end;
            layouts.push(layout);
        }
        let control_layout = QueueLayout::new(CONTROL_SIZE, end);
        if features.contains(Features::CTRL_VQ) {
            end = control_layout.end;
        }
        let memory = OwnMemory::new(end, Huge::Auto)?;
        let base = memory
            .regions()
            .first()
            .map(|region| region.guest)
            .unwrap_or_default();
        let failed = |source| PortError::io("make the events of a virtio-user port", source);
        let mut rings = Vec::new();
        let mut pairs = Vec::new();
        for pair in layouts.chunks_exact(2) {
            let [receive_layout, transmit_layout] = pair else {
                continue;
            };
            let receive_config = receive_layout.config(memory.memory(), base, features)?;
            let transmit_config = transmit_layout.config(memory.memory(), base, features)?;
            let mut receive = DriverReceive::new(
                DriverQueue::new(&receive_config, memory.memory())?,
                Arc::clone(memory.memory()),
                receive_layout.buffers(base),
                features,
            )?;
            let mut transmit = DriverTransmit::new(
                DriverQueue::new(&transmit_config, memory.memory())?,
                Arc::clone(memory.memory()),
                transmit_layout.buffers(base),
                features,
            )?;
            // Whoever polls does not need calls; whoever sleeps arms again when it takes these queues over.
            receive.queue_mut().disarm();
            transmit.queue_mut().disarm();
            receive.publish();
            let (receive_events, transmit_events) = (
                RingEvents::new().map_err(failed)?,
                RingEvents::new().map_err(failed)?,
            );
            rings.push((receive_config, receive_events.clone()));
            rings.push((transmit_config, transmit_events.clone()));
            pairs.push(DriverPair {
                receive,
                transmit,
                receive_events,
                transmit_events,
                dirty: false,
                kicks: [0; 2],
                bursts: [0; 2],
            });
        }
        let mut control = None;
        if features.contains(Features::CTRL_VQ) {
            let config = control_layout.config(memory.memory(), base, features)?;
            let queue = DriverQueue::new(&config, memory.memory())?;
            let area = control_layout.buffers(base).start;
            let queue = DriverControl::new(queue, Arc::clone(memory.memory()), area)?;
            let events = RingEvents::new().map_err(failed)?;
            rings.push((config, events.clone()));
            control = Some((queue, events));
        }
        Ok(Self {
            laid_out: LaidOut { memory, rings },
            control,
            pairs,
            offloads: offloads_to_device(features),
        })
    }
}

impl DriverQueues {
    pub(super) fn new(poller: Arc<Poller>) -> Self {
        Self {
            pairs: Vec::new(),
            in_use: 0,
            offloads: Offloads::NONE,
            running: false,
            link_up: true,
            turn: 0,
            poller,
            counters: PortCounters::default(),
            broken: None,
            gave_up: Arc::default(),
        }
    }

    /// True when the device has broken a ring: the queues wait for another device.
    pub(super) fn gave_up(&self) -> &Arc<AtomicBool> {
        &self.gave_up
    }

    // Changes, between two breaths.

    /// Takes over new queues; packets flow from now on, by the first `in_use` pairs. What the next back-end would have to be told.
    pub(super) fn start(&mut self, queues: NewQueues, in_use: usize) -> Result<LaidOut, PortError> {
        self.stop();
        for (number, pair) in queues.pairs.iter().enumerate() {
            let failed = |source| PortError::io("wait for a virtio-user port", source);
            self.poller
                .add(&*pair.receive_events.call, 2 * number as u64)
                .map_err(failed)?;
        }
        self.pairs = queues.pairs;
        self.use_pairs(in_use);
        self.offloads = queues.offloads;
        for pair in &self.pairs {
            // Buffers were made available before anyone could be kicked.
            drop(pair.receive_events.kick.signal());
        }
        self.running = true;
        self.broken = None;
        Ok(queues.laid_out)
    }

    /// Stands still, with all that is in the queues, until there is another device.
    pub(super) fn pause(&mut self) {
        self.running = false;
    }

    /// Where that device is to go on in each ring.
    pub(super) fn bases(&self) -> Vec<u32> {
        let bases = |pair: &DriverPair| [pair.receive.queue().base(), pair.transmit.queue().base()];
        self.pairs.iter().flat_map(bases).collect()
    }

    /// Goes on with it.
    pub(super) fn go_on(&mut self) {
        for pair in &self.pairs {
            // What was made available meanwhile has been kicked for nobody.
            drop(pair.receive_events.kick.signal());
            drop(pair.transmit_events.kick.signal());
        }
        self.running = !self.pairs.is_empty();
    }

    /// The device says whether packets can pass.
    pub(super) fn set_link(&mut self, up: bool) {
        self.link_up = up;
    }

    /// Gives all queues up, with what is in them.
    pub(super) fn stop(&mut self) {
        for pair in self.pairs.drain(..) {
            // It was added when the queues started.
            drop(self.poller.remove(&*pair.receive_events.call));
        }
        self.running = false;
    }

    /// What may be left to the device. Where there is none, nothing is worth doing.
    pub(super) fn offloads(&self) -> Offloads {
        if self.running {
            self.offloads
        } else {
            Offloads::ALL
        }
    }

    /// Sends by the first `n` pairs only. Spec: virtio 1.4, 5.1.9.5.6.
    pub(super) fn use_pairs(&mut self, n: usize) {
        self.in_use = n.min(self.pairs.len());
    }

    /// How many pairs are in use.
    pub(super) fn running(&self) -> usize {
        if self.running { self.in_use } else { 0 }
    }

    pub(super) fn broken(&self) -> Option<(usize, RingError)> {
        self.broken
    }

    /// How all rings stand. A driver's are started and enabled as long as they are there.
    pub(super) fn rings(&self) -> Vec<RingStatus> {
        let rings = self.pairs.iter().flat_map(|pair| {
            let queues = [pair.receive.queue(), pair.transmit.queue()];
            let counts = pair.kicks.into_iter().zip(pair.bursts);
            queues.into_iter().zip(counts)
        });
        let status = |(index, (queue, (kicks, bursts))): (usize, (&DriverQueue, _))| RingStatus {
            index,
            started: self.running,
            enabled: self.running,
            size: Some(queue.size()),
            format: Some(queue.format().name()),
            positions: Some(queue.positions()),
            kick: true,
            call: true,
            kicks,
            bursts,
            ..RingStatus::default()
        };
        rings.enumerate().map(status).collect()
    }

    pub(super) fn counters(&self) -> PortCounters {
        self.counters
    }

    // The packet's way.

    #[inline]
    pub(super) fn rx(&mut self, burst: &mut Burst) -> usize {
        if !self.running {
            return 0;
        }
        let before = burst.len();
        let n = self.pairs.len();
        for _ in 0..n {
            let number = self.turn;
            self.turn = if number + 1 < n { number + 1 } else { 0 };
            let Some(pair) = self.pairs.get_mut(number) else {
                break;
            };
            let first = burst.len();
            let received = pair.receive.receive(burst, &mut self.counters);
            pair.bursts[0] += u64::from(burst.len() > first);
            if let Err(error) = received {
                self.break_ring(2 * number, error);
                break;
            }
            // All pairs lie in one memory, but a burst has room for one full drain only.
            if burst.room() == 0 {
                break;
            }
        }
        burst.len() - before
    }

    #[inline]
    pub(super) fn complete(&mut self) {
        for pair in &mut self.pairs {
            if pair.receive.complete() {
                pair.kicks[0] += 1;
                kick(&pair.receive_events, &mut self.counters);
            }
        }
    }

    #[inline]
    pub(super) fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        match (self.running && self.link_up, self.in_use) {
            (true, 1) => self.tx_to(0, burst, picks),
            (true, n) if n > 1 => self.tx_spread(n, burst, picks),
            _ => 0,
        }
    }

    #[inline]
    fn tx_to(&mut self, number: usize, burst: &Burst, picks: &Picks) -> usize {
        let Some(pair) = self.pairs.get_mut(number) else {
            return 0;
        };
        pair.dirty = true;
        match pair.transmit.send(burst, picks, &mut self.counters) {
            Ok(accepted) => accepted,
            Err(error) => {
                self.break_ring(2 * number + 1, error);
                0
            }
        }
    }

    /// Several transmitqs: a flow always takes the same. What one of them has no room for is dropped here.
    fn tx_spread(&mut self, n: usize, burst: &Burst, picks: &Picks) -> usize {
        let mut lanes = [0_u8; BURST_MAX];
        for i in picks.iter() {
            lanes[i] = u8::try_from(flow_hash(burst.head(i)) as usize % n).unwrap_or(0);
        }
        for lane in 0..n {
            let mut share = Picks::default();
            picks
                .iter()
                .filter(|&i| usize::from(lanes[i]) == lane)
                .for_each(|i| share.push(i));
            if share.is_empty() {
                continue;
            }
            let accepted = self.tx_to(lane, burst, &share);
            self.counters
                .tx_drops
                .add(DropReason::NoRoom, share.len() - accepted);
        }
        picks.len()
    }

    #[inline]
    pub(super) fn flush(&mut self) {
        for pair in &mut self.pairs {
            if pair.dirty {
                pair.dirty = false;
                pair.bursts[1] += 1;
                if pair.transmit.publish() {
                    pair.kicks[1] += 1;
                    kick(&pair.transmit_events, &mut self.counters);
                }
            }
        }
    }

    pub(super) fn drop_tx(&mut self, reason: DropReason, n: usize) {
        let down = !(self.running && self.link_up) && reason == DropReason::NoRoom;
        self.counters
            .tx_drops
            .add(if down { DropReason::PortDown } else { reason }, n);
    }

    // Sleeping and waking.

    /// Asks for calls; whether packets wait already.
    pub(super) fn arm(&mut self) -> bool {
        let mut busy = false;
        for pair in &mut self.pairs {
            pair.receive_events.call.drain();
            pair.receive.queue_mut().arm();
            busy |= pair.receive.has_work();
        }
        busy && self.running
    }

    pub(super) fn disarm(&mut self) {
        for pair in &mut self.pairs {
            pair.receive.queue_mut().disarm();
            pair.receive_events.call.drain();
        }
    }

    #[cold]
    fn break_ring(&mut self, ring: usize, error: RingError) {
        self.broken = Some((ring, error));
        self.gave_up.store(true, Ordering::Relaxed);
        self.stop();
    }
}

#[inline]
fn kick(events: &RingEvents, counters: &mut PortCounters) {
    // Our own eventfd: it cannot refuse a signal.
    drop(events.kick.signal());
    counters.notifications += 1;
}
