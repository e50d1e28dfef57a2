//! A device that does nothing but remember, and that complains when it is asked for what makes no sense.

use std::collections::BTreeMap;
use std::sync::Arc;

use virtnet_sys::EventFd;
use virtnet_vhost::payload::{Config, MemoryRegion};
use virtnet_vhost::{BackendDevice, DeviceError, Region, RingAddresses, RingSetup};

/// Where a ring stops, unless told otherwise.
pub(crate) const STOPS_AT: u32 = 77;

/// Notes what a session asks for. Rings and memory are what they would be in a real device.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// The names of all calls.
    pub(crate) calls: Vec<&'static str>,
    pub(crate) features: Option<u64>,
    pub(crate) regions: Vec<Region>,
    /// The rings that run.
    pub(crate) rings: BTreeMap<usize, RingSetup>,
    /// The call that is to be refused.
    pub(crate) refuses: Option<&'static str>,
    /// Where rings stop; `None` for a ring that its driver broke.
    pub(crate) stops_at: Option<u32>,
    pub(crate) config: Vec<u8>,
    /// What the front-end told beside rings and memory, in words.
    pub(crate) told: Vec<String>,
    pub(crate) gone: bool,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        Self {
            calls: Vec::new(),
            features: None,
            regions: Vec::new(),
            rings: BTreeMap::new(),
            refuses: None,
            stops_at: Some(STOPS_AT),
            config: (0..40).collect(),
            told: Vec::new(),
            gone: false,
        }
    }

    /// The names of the calls since the last time.
    pub(crate) fn take_calls(&mut self) -> Vec<&'static str> {
        std::mem::take(&mut self.calls)
    }

    fn note(&mut self, call: &'static str) -> Result<(), DeviceError> {
        assert!(!self.gone, "{call} after the connection was gone");
        self.calls.push(call);
        if self.refuses == Some(call) {
            return Err(format!("{call} is to be refused").into());
        }
        Ok(())
    }

    /// The ring that a call about a running ring is for.
    #[track_caller]
    fn running(&mut self, ring: usize) -> &mut RingSetup {
        let setup = self.rings.get_mut(&ring);
        setup.unwrap_or_else(|| panic!("ring {ring} does not run"))
    }
}

impl BackendDevice for Recorder {
    fn set_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.note("set_features")?;
        self.features = Some(features);
        Ok(())
    }

    fn set_memory(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        self.note("set_memory")?;
        self.regions = regions;
        Ok(())
    }

    fn add_memory(&mut self, region: Region) -> Result<(), DeviceError> {
        self.note("add_memory")?;
        self.regions.push(region);
        Ok(())
    }

    fn remove_memory(&mut self, region: MemoryRegion) -> Result<(), DeviceError> {
        self.note("remove_memory")?;
        let place = self.regions.iter().position(|r| r.layout == region);
        self.regions
            .remove(place.expect("only what was added is removed"));
        Ok(())
    }

    fn start_ring(&mut self, ring: usize, setup: RingSetup) -> Result<(), DeviceError> {
        self.note("start_ring")?;
        assert!(self.features.is_some() && !self.regions.is_empty());
        let before = self.rings.insert(ring, setup);
        assert!(before.is_none(), "ring {ring} runs already");
        Ok(())
    }

    fn stop_ring(&mut self, ring: usize) -> Result<Option<u32>, DeviceError> {
        self.note("stop_ring")?;
        self.running(ring);
        self.rings.remove(&ring);
        Ok(self.stops_at)
    }

    fn enable_ring(&mut self, ring: usize, enabled: bool) {
        self.calls.push("enable_ring");
        self.running(ring).enabled = enabled;
    }

    fn set_kick(&mut self, ring: usize, kick: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        self.note("set_kick")?;
        self.running(ring).kick = kick;
        Ok(())
    }

    fn set_call(&mut self, ring: usize, call: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        self.note("set_call")?;
        self.running(ring).call = call;
        Ok(())
    }

    fn set_err(&mut self, ring: usize, err: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        self.note("set_err")?;
        self.running(ring).err = err;
        Ok(())
    }

    fn set_addresses(&mut self, ring: usize, addresses: RingAddresses) -> Result<(), DeviceError> {
        self.note("set_addresses")?;
        self.running(ring).addresses = addresses;
        Ok(())
    }

    fn reset(&mut self) {
        self.calls.push("reset");
        assert!(self.rings.is_empty(), "rings stop before a reset");
    }

    fn set_status(&mut self, status: u8) {
        self.told.push(format!("status {status}"));
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), DeviceError> {
        self.note("set_mtu")?;
        self.told.push(format!("mtu {mtu}"));
        Ok(())
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), DeviceError> {
        self.note("send_rarp")?;
        self.told.push(format!("rarp {mac:x?}"));
        Ok(())
    }

    fn read_config(&mut self, offset: u32, buffer: &mut [u8]) {
        let there = self.config.iter().skip(offset as usize);
        for (byte, &value) in buffer.iter_mut().zip(there) {
            *byte = value;
        }
    }

    fn write_config(&mut self, config: &Config) -> Result<(), DeviceError> {
        self.note("write_config")?;
        self.told
            .push(format!("config {} {:?}", config.offset, config.data));
        Ok(())
    }

    fn disconnected(&mut self) {
        assert!(!self.gone, "the connection was gone already");
        self.gone = true;
        self.rings.clear();
        self.regions.clear();
    }
}
