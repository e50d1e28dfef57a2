//! A device that can do everything and writes down what it was told, and a front-end without any manners.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtnet_sys::{EventFd, Stream, memfd};
use virtnet_vhost::message::{Request, RequestKind};
use virtnet_vhost::payload::{
    Config, Iotlb, MemoryRegion, MemoryTable, VringAddresses, VringFd, VringState,
};
use virtnet_vhost::{
    Backend, BackendDevice, DeviceError, LogFile, Offer, ProtocolFeatures, Region, RingAddresses,
    RingSetup, SessionError,
};

pub const VERSION_1: u64 = 1 << 32;
pub const RING_PACKED: u64 = 1 << 34;
pub const PROTOCOL: u64 = 1 << 30;
pub const LOG_ALL: u64 = 1 << 26;

/// Where the fake device has memory that comes later, above where the guest has it.
pub const MAPPED_AT: u64 = 1 << 45;

/// All that a back-end can do, with events for all notifications.
pub const BY_EVENTS: ProtocolFeatures =
    ProtocolFeatures::BACKEND.difference(ProtocolFeatures::INBAND_NOTIFICATIONS);

/// Writes down every call; refuses those it is told to, and panics at those that make no sense.
#[derive(Default)]
pub struct FakeDevice {
    pub log: Vec<String>,
    /// The first word of a call that fails.
    pub refuses: Option<&'static str>,
    /// Where rings stop.
    pub base: u32,
    pub config: Vec<u8>,
    pub features: Option<u64>,
    /// Held, as a real device would hold them.
    pub regions: Vec<Region>,
    pub dirty_log: Option<LogFile>,
    /// The rings that run, as they are now.
    pub rings: BTreeMap<usize, RingSetup>,
    /// To be given away for post-copy: a stand-in, nobody here looks what it is.
    pub userfault: Option<OwnedFd>,
    pub disconnected: u32,
}

impl FakeDevice {
    fn note(&mut self, line: String) -> Result<(), DeviceError> {
        assert_eq!(self.disconnected, 0, "{line} after the connection was gone");
        let refused = self
            .refuses
            .is_some_and(|word| line.split(' ').next() == Some(word));
        self.log.push(line);
        if refused {
            Err("the fake device was told to refuse this".into())
        } else {
            Ok(())
        }
    }

    /// Takes what was written down.
    pub fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }

    /// The ring that a call is about, which has to be running.
    #[track_caller]
    fn running(&mut self, ring: usize) -> &mut RingSetup {
        let setup = self.rings.get_mut(&ring);
        setup.unwrap_or_else(|| panic!("ring {ring} does not run"))
    }
}

impl BackendDevice for FakeDevice {
    fn set_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.note(format!("features {features:#x}"))?;
        self.features = Some(features);
        Ok(())
    }

    fn set_memory(&mut self, regions: Vec<Region>) -> Result<(), DeviceError> {
        let sizes: Vec<_> = regions
            .iter()
            .map(|region| format!("{:#x}", region.layout.size))
            .collect();
        self.note(format!("memory {}", sizes.join(" ")))?;
        self.regions = regions;
        Ok(())
    }

    fn add_memory(&mut self, region: Region) -> Result<(), DeviceError> {
        self.note(format!("add {:#x}", region.layout.guest_addr))?;
        self.regions.push(region);
        Ok(())
    }

    fn remove_memory(&mut self, region: MemoryRegion) -> Result<(), DeviceError> {
        self.note(format!("remove {:#x}", region.guest_addr))?;
        self.regions
            .retain(|held| held.layout.guest_addr != region.guest_addr);
        Ok(())
    }

    fn set_log(&mut self, log: LogFile) -> Result<(), DeviceError> {
        let area = log.area;
        self.note(format!("log {} {}", area.mmap_size, area.mmap_offset))?;
        self.dirty_log = Some(log);
        Ok(())
    }

    fn start_ring(&mut self, ring: usize, setup: RingSetup) -> Result<(), DeviceError> {
        let RingSetup {
            size,
            base,
            kick,
            call,
            err,
            enabled,
            ..
        } = &setup;
        let events = [
            ("kick", kick.is_some()),
            ("call", call.is_some()),
            ("err", err.is_some()),
        ];
        let events: String = events
            .iter()
            .filter(|(_, there)| *there)
            .map(|(name, _)| format!(" {name}"))
            .collect();
        let enabled = if *enabled { " enabled" } else { "" };
        self.note(format!(
            "start {ring} size {size} base {base:#x}{events}{enabled}"
        ))?;
        assert!(self.features.is_some() && !self.regions.is_empty());
        let before = self.rings.insert(ring, setup);
        assert!(before.is_none(), "ring {ring} runs already");
        Ok(())
    }

    fn stop_ring(&mut self, ring: usize) -> Result<Option<u32>, DeviceError> {
        self.running(ring);
        self.note(format!("stop {ring}"))?;
        self.rings.remove(&ring);
        Ok(Some(self.base))
    }

    fn enable_ring(&mut self, ring: usize, enabled: bool) {
        drop(self.note(format!("enable {ring} {enabled}")));
        self.running(ring).enabled = enabled;
    }

    fn set_kick(&mut self, ring: usize, kick: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        self.note(format!("kick {ring} {}", kick.is_some()))?;
        self.running(ring).kick = kick;
        Ok(())
    }

    fn set_call(&mut self, ring: usize, call: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        self.note(format!("call {ring} {}", call.is_some()))?;
        self.running(ring).call = call;
        Ok(())
    }

    fn set_err(&mut self, ring: usize, err: Option<Arc<EventFd>>) -> Result<(), DeviceError> {
        self.note(format!("err {ring} {}", err.is_some()))?;
        self.running(ring).err = err;
        Ok(())
    }

    fn set_addresses(&mut self, ring: usize, addresses: RingAddresses) -> Result<(), DeviceError> {
        self.note(format!("addresses {ring} {:#x}", addresses.descriptor_area))?;
        self.running(ring).addresses = addresses;
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.note("reset".to_owned()));
        assert!(self.rings.is_empty(), "rings stop before a reset");
    }

    fn set_status(&mut self, status: u8) {
        drop(self.note(format!("status {status}")));
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), DeviceError> {
        self.note(format!("mtu {mtu}"))
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), DeviceError> {
        self.note(format!("rarp {mac:02x?}"))
    }

    fn advise_postcopy(&mut self) -> Result<OwnedFd, DeviceError> {
        self.note("advise".to_owned())?;
        self.userfault
            .take()
            .ok_or_else(|| "none was prepared".into())
    }

    fn translate(&mut self, change: Iotlb) -> Result<(), DeviceError> {
        self.note(format!(
            "translate {:#x} to {:#x}",
            change.iova, change.user_addr
        ))
    }

    fn mapped_at(&self, region: &MemoryRegion) -> u64 {
        MAPPED_AT + region.guest_addr
    }

    fn catch_faults(&mut self) -> Result<(), DeviceError> {
        self.note("catch".to_owned())
    }

    fn end_postcopy(&mut self) {
        drop(self.note("end".to_owned()));
    }

    fn read_config(&mut self, offset: u32, buffer: &mut [u8]) {
        let rest = self.config.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
    }

    fn write_config(&mut self, config: &Config) -> Result<(), DeviceError> {
        self.note(format!("config {} {}", config.offset, config.flags))
    }

    fn disconnected(&mut self) {
        self.disconnected += 1;
        self.regions.clear();
        self.dirty_log = None;
        self.rings.clear();
    }
}

/// A back-end, the device behind it, and the far end of its socket.
pub struct Scene {
    pub peer: Stream,
    pub backend: Backend,
    pub device: FakeDevice,
}

impl Scene {
    /// Two queue pairs, and every protocol feature there is.
    pub fn new() -> Self {
        Self::with(BY_EVENTS)
    }

    pub fn with(protocol: ProtocolFeatures) -> Self {
        Self::offering(Offer::new(VERSION_1 | RING_PACKED, protocol, 2))
    }

    pub fn offering(offer: Offer) -> Self {
        let (peer, ours) = Stream::pair().unwrap();
        Self {
            peer,
            backend: Backend::new(ours, offer),
            device: FakeDevice::default(),
        }
    }

    /// A scene in which these protocol features are in force.
    pub fn agreed(protocol: ProtocolFeatures) -> Self {
        let mut scene = Self::new();
        scene.tell(&Request::SetProtocolFeatures(protocol.bits()), &[]);
        scene
    }

    /// A scene in which ring 0 runs.
    pub fn running(protocol: ProtocolFeatures) -> Self {
        let mut scene = Self::agreed(protocol);
        let event = EventFd::new().unwrap();
        scene.tell(&Request::SetFeatures(VERSION_1 | PROTOCOL), &[]);
        scene.tell(&table(&[MEMORY]), &[memory().as_fd()]);
        scene.tell(
            &Request::SetVringNum(VringState { index: 0, num: 256 }),
            &[],
        );
        scene.tell(&Request::SetVringAddr(ring_at(0)), &[]);
        scene.tell(
            &Request::SetVringCall(VringFd::new(0, true)),
            &[event.as_fd()],
        );
        scene.tell(
            &Request::SetVringKick(VringFd::new(0, true)),
            &[event.as_fd()],
        );
        assert!(scene.backend.session().ring_runs(0));
        scene.device.take_log();
        scene
    }

    pub fn serve(&mut self) -> Result<(), SessionError> {
        self.backend.on_readable(&mut self.device)
    }

    /// Sends bytes and has the back-end serve them.
    pub fn raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SessionError> {
        assert_eq!(self.peer.send(bytes, fds).unwrap(), bytes.len());
        self.serve()
    }

    /// Sends a request that asks for no answer and gets none.
    pub fn tell(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) {
        self.raw(&bytes(request, false), fds).unwrap();
        assert_eq!(self.answer(), None, "{request:?}");
    }

    /// Sends a request that has an answer of its own, and returns its payload.
    pub fn ask(&mut self, request: &Request) -> Vec<u8> {
        self.ask_with(request, &[])
    }

    /// The same with descriptors.
    pub fn ask_with(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Vec<u8> {
        self.raw(&bytes(request, false), fds).unwrap();
        self.answer_to(request.kind())
    }

    /// Sends a request that asks for an acknowledgement, and returns it.
    pub fn ack(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> u64 {
        self.raw(&bytes(request, true), fds).unwrap();
        u64::from_ne_bytes(self.answer_to(request.kind()).try_into().unwrap())
    }

    /// Asks for a number.
    pub fn number(&mut self, request: &Request) -> u64 {
        u64::from_ne_bytes(self.ask(request).try_into().unwrap())
    }

    /// Returns the payload of the one answer there is, which has to have exactly the right header.
    pub fn answer_to(&mut self, kind: RequestKind) -> Vec<u8> {
        let bytes = self
            .answer()
            .unwrap_or_else(|| panic!("{kind:?} was not answered"));
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (kind.code(), 5));
        assert_eq!(
            word(8) as usize,
            bytes.len() - 12,
            "one answer, as long as it says"
        );
        bytes[12..].to_vec()
    }

    /// Returns all bytes that have come back.
    pub fn answer(&mut self) -> Option<Vec<u8>> {
        let (mut buffer, mut fds) = ([0; 8192], Vec::new());
        let count = self.peer.recv(&mut buffer, &mut fds).ok()?;
        assert!(fds.is_empty());
        Some(buffer[..count].to_vec())
    }
}

/// 64 KiB of guest memory at 0, mapped by the front-end at 0x7000_0000.
pub const MEMORY: MemoryRegion = MemoryRegion {
    guest_addr: 0,
    size: 0x10000,
    user_addr: 0x7000_0000,
    mmap_offset: 0,
};

pub fn memory() -> OwnedFd {
    memfd::create("virtnet-test", MEMORY.size, false).unwrap()
}

/// A place for a ring of 256 descriptors in [`MEMORY`].
pub fn ring_at(index: u32) -> VringAddresses {
    let start = MEMORY.user_addr + u64::from(index) * 0x3000;
    VringAddresses {
        index,
        flags: 0,
        desc: start,
        avail: start + 0x1000,
        used: start + 0x2000,
        log_guest_addr: 0,
    }
}

pub fn table(regions: &[MemoryRegion]) -> Request {
    Request::SetMemTable(MemoryTable(regions.to_vec()))
}

pub fn bytes(request: &Request, need_reply: bool) -> Vec<u8> {
    let mut out = Vec::new();
    request.encode(need_reply, &mut out);
    out
}

pub fn state(index: u32, num: u32) -> VringState {
    VringState { index, num }
}
