//! The device that a front-end sees, as its session changes it: memory, features and rings, handed on to the workers that have them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use virtnet_mem::{DirtyLog, GuestAddr, GuestMemory, Iotlb, Miss, Region, UserAddr};
use virtnet_sys::{EventFd, Userfault};
use virtnet_vhost::message::BackRequest;
use virtnet_vhost::payload::{self, InflightArea, MemoryRegion};
use virtnet_vhost::{
    BackendDevice, DeviceError, InflightFile, LogFile, Refusal, RingAddresses, RingSetup,
    SessionError,
};
use virtnet_virtio::net::NetConfig;
use virtnet_virtio::{Features, RingFormat};

use super::controlq::ControlHalf;
use super::inflight::Record;
use super::iommu::{Asked, Translations};
use super::lanes::Lanes;
use super::queues::Queues;
use super::service::Step;
use super::state::State;
use crate::events::{EventLog, What};

/// The device that a session changes: a network device behind its slots.
pub(super) struct Device {
    pub(super) lanes: Lanes,
    pub(super) config: NetConfig,
    /// What the memory is made of, so that slots can come and go.
    regions: Vec<Region>,
    /// How far the front-end has come; it may be gone before anybody asks.
    pub(super) reached: Step,
    /// Where writes are logged while they are, which the features say.
    log: Option<Arc<DirtyLog>>,
    logging: bool,
    events: EventLog,
    /// Which format the features say.
    format: RingFormat,
    /// Where rings record what is in flight, where the front-end wants that.
    record: Option<Record>,
    memory: Arc<GuestMemory>,
    /// With an IOMMU: what the front-end has told.
    translations: Option<Translations>,
    /// The time of what is being served.
    now_ns: u64,
    features: Features,
    /// The longest packet, if the front-end has said so.
    mtu: Option<u16>,
    /// What faults in the memory are told to, while pages of it are still to come.
    userfault: Option<Userfault>,
    pub(super) control: ControlHalf,
    /// The configuration space has changed by itself, and the driver has not been told.
    has_news: bool,
}

impl Device {
    /// A device without memory and rings.
    pub(super) fn new(
        lanes: Lanes,
        config: NetConfig,
        control: ControlHalf,
        events: EventLog,
        now_ns: u64,
    ) -> Self {
        Self {
            lanes,
            config,
            regions: Vec::new(),
            reached: Step::Greeting,
            log: None,
            logging: false,
            events,
            format: RingFormat::Split,
            record: None,
            memory: Arc::default(),
            translations: None,
            now_ns,
            features: Features::empty(),
            mtu: None,
            userfault: None,
            control,
            has_news: false,
        }
    }

    /// It is so late when what comes is served.
    pub(super) fn set_now(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    pub(super) fn has_memory(&self) -> bool {
        !self.regions.is_empty()
    }

    /// What `peer` has taken away of the memory that it shared, if it has.
    pub(super) fn lost(&self, peer: String) -> Option<SessionError> {
        if self.log.as_ref().is_some_and(|log| log.is_lost()) {
            return Some(SessionError::LogLost { peer });
        }
        let region = self.regions.iter().find(|region| region.is_lost())?;
        Some(SessionError::MemoryLost {
            peer,
            guest_addr: region.guest().0,
            size: region.size(),
        })
    }

    /// Notes that a translation is to be asked for; whether it has to be.
    pub(super) fn note_asked(&mut self, miss: Miss) -> Asked {
        let now_ns = self.now_ns;
        let translations = self.translations.as_mut();
        translations.map_or(Asked::Before, |it| it.note_asked(miss, now_ns))
    }

    /// Makes `regions` the memory of the queues. With an IOMMU nothing is known of it then.
    fn install(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        if let Some(translations) = &mut self.translations {
            translations.clear();
        }
        self.show(regions)
    }

    /// Lets the queues see `regions`, logged and translated as it is now.
    fn show(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        let log = self.log.clone().filter(|_| self.logging);
        let memory = Arc::new(GuestMemory::new(regions.clone())?.with_log(log));
        let seen = match &self.translations {
            None => Arc::clone(&memory),
            Some(translations) => translations.view(&memory),
        };
        self.control.set_memory(&seen);
        self.lanes
            .run_all(move |queues| queues.set_memory(Arc::clone(&seen)))?;
        (self.regions, self.memory) = (regions, memory);
        Ok(())
    }

    /// The same, because the front-end says so.
    fn install_new(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        self.install(regions)?;
        self.reached = self.reached.max(Step::Memory);
        self.events.record(What::Memory {
            regions: self.regions.len(),
            bytes: self.regions.iter().map(Region::size).sum(),
        });
        Ok(())
    }

    /// Makes the memory anew, because it is logged elsewhere from now on, or not any more.
    fn install_again(&mut self) -> Result<(), DeviceError> {
        self.show(self.regions.clone())
    }

    /// The configuration space as the driver sees it now.
    pub(super) fn config(&self) -> NetConfig {
        let controls = self.control.controls();
        NetConfig {
            mac: controls.settings().filter.mac().map(|mac| mac.0),
            announce: controls.announces(),
            ..self.config
        }
    }

    /// Whether the driver is to be told that the configuration space has changed.
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }

    /// Lets the queues see translations that differ in `size` bytes at `iova`, at their next look.
    fn post_view(&mut self, iova: u64, size: u64) {
        if let Some(translations) = &self.translations {
            let view = translations.view(&self.memory);
            self.control.set_view(&view, iova, size);
            self.lanes
                .post_all(move |queues| queues.set_view(Arc::clone(&view), iova, size));
        }
    }

    /// A page has no translation: what needs it is given back.
    pub(super) fn refuse(&mut self, iova: u64) {
        if let Some(translations) = &mut self.translations {
            translations.refuse(iova, self.now_ns);
            self.post_view(iova, Iotlb::PAGE);
        }
    }

    /// The page that was refused last.
    pub(super) fn last_refused(&self) -> Option<u64> {
        self.translations.as_ref()?.last_refused
    }

    /// Refuses what was not told in time, and lets go of refusals that are old.
    pub(super) fn forget_and_refuse(&mut self) {
        let now_ns = self.now_ns;
        let Some(translations) = &mut self.translations else {
            return;
        };
        let (overdue, forgiven) = (translations.overdue(now_ns), translations.forgive(now_ns));
        if forgiven {
            // Nothing is known that was not, but rings that wait may ask again.
            self.post_view(u64::MAX, 1);
        }
        for iova in overdue {
            self.refuse(iova);
        }
    }
}

fn map(region: virtnet_vhost::Region) -> Result<Region, DeviceError> {
    let MemoryRegion {
        guest_addr,
        size,
        user_addr,
        mmap_offset,
    } = region.layout;
    Ok(Region::map_file(
        region.file,
        mmap_offset,
        size,
        GuestAddr(guest_addr),
        UserAddr(user_addr),
    )?)
}

impl BackendDevice for Device {
    fn set_features(&mut self, features: u64) -> Result<(), DeviceError> {
        let features = Features::from_bits_retain(features);
        self.features = features;
        self.lanes
            .run_all(move |queues| queues.set_features(features))?;
        self.format = RingFormat::of(features);
        let logging = features.contains(Features::LOG_ALL);
        if std::mem::replace(&mut self.logging, logging) != logging && self.log.is_some() {
            self.install_again()?;
        }
        if self.control.set_features(features) {
            self.reset();
        }
        self.reached = self.reached.max(Step::Features);
        self.events.record(What::Features {
            features: features.bits(),
        });
        let translates = features.contains(Features::ACCESS_PLATFORM);
        if translates != self.translations.is_some() {
            // No ring runs while features change.
            self.translations = translates.then(Translations::default);
            self.install(self.regions.clone())?;
        }
        Ok(())
    }

    fn set_memory(&mut self, regions: Vec<virtnet_vhost::Region>) -> Result<(), DeviceError> {
        let regions = regions.into_iter().map(map).collect::<Result<_, _>>()?;
        self.install_new(regions)
    }

    fn add_memory(&mut self, region: virtnet_vhost::Region) -> Result<(), DeviceError> {
        let mut regions = self.regions.clone();
        regions.push(map(region)?);
        self.install_new(regions)
    }

    fn remove_memory(&mut self, region: MemoryRegion) -> Result<(), DeviceError> {
        let mut regions = self.regions.clone();
        regions.retain(|r| {
            (r.guest().0, r.user().0, r.size())
                != (region.guest_addr, region.user_addr, region.size)
        });
        self.install_new(regions)
    }

    fn set_log(&mut self, log: LogFile) -> Result<(), DeviceError> {
        let (area, file) = (log.area, log.file);
        let log = DirtyLog::map_file(file, area.mmap_offset, area.mmap_size)
            .map_err(|error| format!("the dirty log cannot be mapped: {error}"))?;
        self.log = Some(Arc::new(log));
        if self.logging {
            self.install_again()?;
        }
        Ok(())
    }

    fn make_inflight(&mut self, area: InflightArea) -> Result<InflightFile, DeviceError> {
        Record::make(area, self.format)
    }

    fn set_inflight(&mut self, record: InflightFile) -> Result<(), DeviceError> {
        self.record = Some(Record::map(record)?);
        Ok(())
    }

    fn start_ring(&mut self, ring: usize, setup: RingSetup) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            return self.control.start(setup, &self.lanes);
        }
        let started = What::RingStarted {
            ring,
            size: setup.size,
            base: setup.base,
            enabled: setup.enabled,
        };
        let record = match &self.record {
            Some(record) => record.window(ring, setup.size, self.format)?,
            None => None,
        };
        let recovered = self.lanes.run(ring, move |queues, ring| {
            queues.start_ring(ring, setup, record)
        })??;
        self.reached = self.reached.max(Step::Rings);
        self.events.record(started);
        if let Some(recovered) = recovered {
            self.events.record(What::RingRecovered {
                ring,
                given: recovered.given,
                base: recovered.base,
                taken_again: recovered.taken_again,
            });
        }
        Ok(())
    }

    fn stop_ring(&mut self, ring: usize) -> Result<Option<u32>, DeviceError> {
        if ring == self.control.number() {
            return Ok(self.control.stop());
        }
        let base = self
            .lanes
            .run(ring, |queues, ring| queues.stop_ring(ring))?;
        self.events.record(What::RingStopped { ring, base });
        Ok(base)
    }

    fn enable_ring(&mut self, ring: usize, enabled: bool) {
        if ring == self.control.number() {
            return self.control.enable(enabled);
        }
        // A worker that does not answer has been reported by the call before, and will be by the next.
        drop(
            self.lanes
                .run(ring, move |queues, ring| queues.enable_ring(ring, enabled)),
        );
        self.events.record(What::RingEnabled { ring, enabled });
    }

    fn set_kick(&mut self, ring: usize, kick: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            return self.control.set_kick(kick);
        }
        self.lanes
            .run(ring, |queues, ring| queues.set_kick(ring, kick))?
    }

    fn set_call(&mut self, ring: usize, call: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            self.control.set_call(call);
            return Ok(());
        }
        Ok(self
            .lanes
            .run(ring, |queues, ring| queues.set_call(ring, call))?)
    }

    fn set_err(&mut self, ring: usize, err: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            self.control.set_err(err);
            return Ok(());
        }
        Ok(self
            .lanes
            .run(ring, |queues, ring| queues.set_err(ring, err))?)
    }

    fn set_addresses(&mut self, ring: usize, addresses: RingAddresses) -> Result<(), DeviceError> {
        if ring == self.control.number() {
            return self.control.set_addresses(addresses);
        }
        self.lanes.run(ring, move |queues, ring| {
            queues.set_addresses(ring, addresses)
        })?
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), DeviceError> {
        // A guest that says itself where it is says it to more than this network.
        self.has_news |= self.control.ask_announce();
        // Which worker says it is all the same.
        Ok(self
            .lanes
            .run(0, move |queues, _| queues.set_moved_here(mac))?)
    }

    fn reset(&mut self) {
        self.control.reset();
        // A worker that does not answer has been reported by the call before, and will be by the next.
        drop(self.lanes.set_settings(None));
        self.events.record(What::Reset);
    }

    fn advise_postcopy(&mut self) -> Result<OwnedFd, DeviceError> {
        self.end_postcopy();
        let userfault = Userfault::new()?;
        let theirs = userfault.to_owned_fd()?;
        self.userfault = Some(userfault);
        Ok(theirs)
    }

    fn mapped_at(&self, region: &MemoryRegion) -> u64 {
        let key = (region.guest_addr, region.size);
        let mut regions = self.regions.iter();
        let mapped = regions.find(|mapped| (mapped.guest().0, mapped.size()) == key);
        mapped.map_or(0, Region::host_addr)
    }

    fn catch_faults(&mut self) -> Result<(), DeviceError> {
        let userfault = self.userfault.as_ref();
        let userfault = userfault.ok_or("nobody has asked for faults to be caught")?;
        for region in &self.regions {
            region.catch_faults(userfault.as_fd()).map_err(|error| {
                let (at, size) = (region.guest(), region.size());
                format!("the kernel does not catch faults in the region at {at} ({size:#x} bytes): {error}")
            })?;
        }
        Ok(())
    }

    fn end_postcopy(&mut self) {
        let Some(userfault) = self.userfault.take() else {
            return;
        };
        for region in &self.regions {
            // One that was never registered says so, and has nobody waiting.
            drop(region.release_faults(userfault.as_fd()));
        }
    }

    fn save_state(&mut self) -> Result<Vec<u8>, DeviceError> {
        let (commands, vlans) = self.control.controls().save();
        let state = State {
            features: self.features - Features::LOG_ALL,
            mtu: self.mtu,
            commands,
            vlans,
        };
        Ok(state.to_bytes())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let state = State::from_bytes(state)?;
        let (saved, ours) = (state.features, self.features - Features::LOG_ALL);
        // QEMU loads the state of a device before it has told the features.
        if !ours.is_empty() && saved != ours {
            let differ = saved ^ ours;
            return Err(
                format!("the state was saved under other features: {differ:?} differ").into(),
            );
        }
        self.control
            .restore(saved, &state.commands, state.vlans.as_deref())
            .ok_or("the driver had asked for what this device does not do")?;
        // The network here does not know the guest yet.
        self.has_news |= self.control.ask_announce();
        if let Some(mtu) = state.mtu {
            self.set_mtu(mtu)?;
        }
        Ok(())
    }

    fn refused(&mut self, refusal: &Refusal) {
        self.events.record(What::Refused {
            why: refusal.to_string(),
        });
    }

    fn translate(&mut self, change: payload::Iotlb) -> Result<(), DeviceError> {
        let Some(translations) = &mut self.translations else {
            return Err("no addresses are translated".into());
        };
        let (iova, size) = (change.iova, change.size);
        if change.kind == payload::Iotlb::UPDATE {
            translations.insert(&self.memory, &change)?;
            self.post_view(iova, size);
            return Ok(());
        }
        translations.remove(iova, size);
        let view = translations.view(&self.memory);
        self.control.set_view(&view, iova, size);
        let see = move |queues: &mut Queues| queues.set_view(Arc::clone(&view), iova, size);
        // The front-end has its answer when every worker has let go.
        let seen = self.lanes.run_all(see.clone());
        if seen.is_err() {
            self.lanes.post_all(see);
        }
        seen?;
        Ok(())
    }

    fn answered(&mut self, request: &BackRequest, code: u64) {
        match request {
            BackRequest::IotlbMsg(miss) if code != 0 => self.refuse(miss.iova),
            _ => {}
        }
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), DeviceError> {
        self.config.mtu = Some(mtu);
        self.mtu = Some(mtu);
        Ok(())
    }

    fn read_config(&mut self, offset: u32, buffer: &mut [u8]) {
        let space = self.config().to_bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        let rest = rest.unwrap_or_default();
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
    }

    fn disconnected(&mut self) {
        // A worker that waits for a page would wait for ever.
        self.end_postcopy();
        self.regions.clear();
        self.log = None;
        self.logging = false;
        self.record = None;
        self.control.end();
        // When the worker does not answer in time the change waits for it all the same.
        self.lanes.post_all(Queues::stop_all);
    }
}
