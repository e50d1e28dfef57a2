//! The control queue of a vhost-user port, where a front-end leaves it to the back-end: served by the control thread, a few commands
//! a second, while packets go on.
//!
//! Behind an IOMMU the ring starts when it is known where it is, and a command waits for the pages that it lies in, as packets do.
//!
//! A command is in force on every worker before it is answered. Most front-ends (QEMU, DPDK) keep the queue to themselves; then there
//! is none here, and the driver's wishes come as messages, or not at all.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use virtnet_mem::GuestMemory;
use virtnet_packet::header::Mac;
use virtnet_sys::{EventFd, Events, Poller};
use virtnet_vhost::{DeviceError, RingAddresses, RingSetup};
use virtnet_virtio::net::control::{ControlQueue, Controls};
use virtnet_virtio::{Access, Chains, DeviceQueue, Features, QueueConfig, RingError, RingFormat};

use super::iommu::{Misses, touches_ring};
use super::lanes::Lanes;
use super::queue_config;

/// The most commands that are carried out in one go: each waits for all workers, and other sockets wait meanwhile.
const COMMANDS_PER_CALL: usize = 16;

/// How often a queue is looked at that nobody kicks.
const POLL_NS: u64 = 10_000_000;

/// The control queue's ring, while it runs, and what was asked for through it.
#[derive(Debug)]
pub(super) struct ControlHalf {
    pairs: u16,
    /// The device's address as long as the driver has not given it another.
    mac: Option<Mac>,
    features: Features,
    controls: Controls,
    memory: Arc<GuestMemory>,
    ring: Option<Ring>,
    /// What is to run as soon as it is known where it is. Only with an IOMMU.
    waiting: Option<RingSetup>,
    misses: Misses,
    /// Room to look ahead in.
    scratch: Chains,
    /// Why the ring was given up, and where it was.
    broken: Option<(String, u32)>,
    /// Whether there may be more to do, though nobody kicks.
    more: bool,
}

#[derive(Debug)]
struct Ring {
    queue: ControlQueue,
    setup: RingSetup,
    /// Waits for the kick: one that stays readable for ever is heard once.
    poller: Poller,
    kicks: Events,
}

impl ControlHalf {
    /// The control queue of a device with so many queue pairs and this address. `misses` is told what has no translation.
    pub(super) fn new(pairs: u16, mac: Option<Mac>, misses: Misses) -> Self {
        Self {
            pairs,
            mac,
            features: Features::empty(),
            controls: Controls::new(Features::empty(), pairs, mac),
            memory: Arc::default(),
            ring: None,
            waiting: None,
            misses,
            scratch: Chains::new(),
            broken: None,
            more: false,
        }
    }

    /// The ring's number.
    pub(super) fn number(&self) -> usize {
        2 * usize::from(self.pairs)
    }

    /// Another driver, or none: nothing has been asked for.
    pub(super) fn reset(&mut self) {
        self.controls = Controls::new(self.features, self.pairs, self.mac);
    }

    /// Everything of a session is over.
    pub(super) fn end(&mut self) {
        (self.ring, self.waiting, self.broken) = (None, None, None);
        self.memory = Arc::default();
        self.features = Features::empty();
        self.misses.clear();
        self.reset();
    }

    /// What was asked for, and how it is told to a device that goes on in place of this one.
    pub(super) fn controls(&self) -> &Controls {
        &self.controls
    }

    /// Has the driver announce itself, if it agreed to and its control queue is here; whether it is to.
    pub(super) fn ask_announce(&mut self) -> bool {
        self.controls.ask_announce()
    }

    /// Goes on with what another device was asked for under these features.
    pub(super) fn restore(
        &mut self,
        features: Features,
        commands: &[Vec<u8>],
        vlans: Option<&[u8]>,
    ) -> Option<()> {
        let mut controls = Controls::new(features, self.pairs, self.mac);
        controls.restore(commands, vlans)?;
        (self.features, self.controls) = (features, controls);
        Some(())
    }

    /// Whether these features are other ones, for which everything begins anew.
    pub(super) fn set_features(&mut self, features: Features) -> bool {
        let changed = (self.features ^ features) - Features::LOG_ALL;
        self.features = features;
        !changed.is_empty()
    }

    /// What wakes the control thread.
    pub(super) fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ring.as_ref().map(|ring| ring.poller.as_fd())
    }

    /// When to look by ourselves.
    pub(super) fn deadline_ns(&self, now_ns: u64) -> Option<u64> {
        let ring = self.ring.as_ref()?;
        if self.more {
            Some(now_ns)
        } else {
            ring.setup.kick.is_none().then_some(now_ns + POLL_NS)
        }
    }

    /// Why the ring had to be given up, if it had.
    pub(super) fn broken(&self) -> Option<&str> {
        self.broken.as_ref().map(|(why, _)| why.as_str())
    }

    /// Carries out what the driver has asked for; whether its ring had to be given up.
    pub(super) fn serve(&mut self, lanes: &Lanes) -> bool {
        let Some(ring) = &mut self.ring else {
            return false;
        };
        let (controls, memory) = (&mut self.controls, &self.memory);
        match ring.serve(memory, controls, lanes) {
            Ok(more) => {
                let queue = ring.queue.queue();
                let missing = queue.missing(memory, Access::Request, 1, &mut self.scratch);
                // What waits for a translation goes on when that comes.
                self.more = more && missing.is_empty();
                self.misses.ask(missing);
                false
            }
            Err(error) => {
                self.give_up(format!("its driver is at fault: {error}"));
                true
            }
        }
    }

    fn give_up(&mut self, why: String) {
        self.waiting = None;
        if let Some(ring) = self.ring.take() {
            if let Some(err) = &ring.setup.err {
                // An eventfd that cannot be written is its owner's loss.
                drop(err.signal());
            }
            self.broken = Some((why, ring.queue.queue().base()));
        }
    }

    // What the session asks for.

    pub(super) fn start(&mut self, setup: RingSetup, lanes: &Lanes) -> Result<(), DeviceError> {
        self.run(setup)?;
        lanes.set_settings(Some(&Arc::new(self.controls.settings().clone())))?;
        Ok(())
    }

    fn run(&mut self, setup: RingSetup) -> Result<(), DeviceError> {
        let format = RingFormat::of(self.features);
        if !QueueConfig::size_is_valid(setup.size.into(), format) {
            return Err(format!("a {format} ring cannot have {} entries", setup.size).into());
        }
        let config = queue_config(&setup, self.features, setup.base);
        if self.misses.must_wait(&self.memory, &config) {
            (self.ring, self.waiting) = (None, Some(setup));
            return Ok(());
        }
        let queue = DeviceQueue::new(&config, &self.memory)?;
        let poller = Poller::new()?;
        if let Some(kick) = &setup.kick {
            poller.add_edge(&**kick, 0)?;
        }
        self.waiting = None;
        self.ring = Some(Ring {
            queue: ControlQueue::new(queue),
            setup,
            poller,
            kicks: Events::with_capacity(1),
        });
        self.broken = None;
        // What is there already has been kicked for before, or never.
        self.more = true;
        Ok(())
    }

    /// Stops the ring; where to go on.
    pub(super) fn stop(&mut self) -> Option<u32> {
        let at = self.ring.take().map(|ring| ring.queue.queue().base());
        let waited = self.waiting.take().map(|setup| setup.base);
        let broken = self.broken.take().map(|(_, base)| base);
        at.or(waited).or(broken)
    }

    /// The ring goes on in other memory, or not at all if it is not there.
    pub(super) fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        self.memory = Arc::clone(memory);
        self.misses.clear();
        self.run_again();
    }

    /// The memory is seen through other translations, which differ in `size` bytes at `iova`.
    pub(super) fn set_view(&mut self, memory: &Arc<GuestMemory>, iova: u64, size: u64) {
        self.memory = Arc::clone(memory);
        self.misses.settle(iova, size);
        let is_touched = self.ring.as_ref().is_some_and(|ring| {
            let config = queue_config(&ring.setup, self.features, ring.setup.base);
            touches_ring(&config, iova, size)
        });
        if is_touched || self.waiting.is_some() {
            self.run_again();
        }
        self.more = self.ring.is_some();
    }

    fn run_again(&mut self) {
        if let Some(error) = self.rerun(|_| ()).err() {
            self.give_up(format!("its memory is gone: {error}"));
        }
    }

    pub(super) fn set_kick(&mut self, kick: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        self.rerun(|setup| setup.kick = kick)
    }

    pub(super) fn set_addresses(&mut self, addresses: RingAddresses) -> Result<(), DeviceError> {
        self.rerun(|setup| setup.addresses = addresses)
    }

    /// Begins anew where the ring is, or is to be, with something changed.
    fn rerun(&mut self, change: impl FnOnce(&mut RingSetup)) -> Result<(), DeviceError> {
        let mut setup = match (&self.ring, &self.waiting) {
            (Some(ring), _) => RingSetup {
                base: ring.queue.queue().base(),
                ..ring.setup.clone()
            },
            (None, Some(setup)) => setup.clone(),
            (None, None) => return Ok(()),
        };
        change(&mut setup);
        self.run(setup)
    }

    fn setup_mut(&mut self) -> Option<&mut RingSetup> {
        let running = self.ring.as_mut().map(|ring| &mut ring.setup);
        running.or(self.waiting.as_mut())
    }

    pub(super) fn set_call(&mut self, to: Option<Arc<EventFd>>) {
        if let Some(setup) = self.setup_mut() {
            setup.call = to;
        }
        if let Some(ring) = &self.ring {
            // What was answered before the change may not have reached anyone.
            ring.call();
        }
    }

    pub(super) fn set_err(&mut self, err: Option<Arc<EventFd>>) {
        if let Some(setup) = self.setup_mut() {
            setup.err = err;
        }
    }

    pub(super) fn enable(&mut self, enabled: bool) {
        if let Some(setup) = self.setup_mut() {
            setup.enabled = enabled;
            self.more = true;
        }
    }
}

impl Ring {
    /// Carries out some commands; whether there may be more.
    fn serve(
        &mut self,
        memory: &GuestMemory,
        controls: &mut Controls,
        lanes: &Lanes,
    ) -> Result<bool, RingError> {
        // It cannot fail; and if it did, the kick would be heard once more.
        drop(self.poller.wait(&mut self.kicks, Some(Duration::ZERO)));
        if let Some(kick) = &self.setup.kick {
            kick.drain();
        }
        if !self.setup.enabled {
            return Ok(false);
        }
        for _ in 0..COMMANDS_PER_CALL {
            let served = self.queue.serve(memory, |request, answer| {
                let counts = |queue: u16| {
                    let counts = lanes.run(queue.into(), |queues, ring| queues.counts(ring));
                    counts.unwrap_or_default()
                };
                if controls.serve(request, counts, answer) {
                    let settings = Arc::new(controls.settings().clone());
                    // A worker that does not answer in time has been given the change all the same.
                    drop(lanes.set_settings(Some(&settings)));
                }
            })?;
            if !served {
                return Ok(self.queue.queue_mut().arm());
            }
            if self.queue.publish() {
                self.call();
            }
        }
        Ok(true)
    }

    fn call(&self) {
        if let Some(call) = &self.setup.call {
            // An eventfd that cannot be written is its owner's loss.
            drop(call.signal());
        }
    }
}
