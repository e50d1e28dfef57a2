//! The `vhost` crate of rust-vmm at the other end: its front-end against our back-end, our front-end against its back-end.
//!
//! It blocks, so it runs on a thread of its own, and this one serves our end until it is done.

use std::fs::File;
use std::io::Result as IoResult;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, Frontend as TheirFrontend, GpuBackend, Result,
    VhostUserBackendReqHandlerMut, VhostUserFrontend,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use virtnet_sys::{EventFd, Events, Poller, Stream};
use virtnet_vhost::{
    Frontend, FrontendEvent, FrontendRing, FrontendSetup, ProtocolFeatures, Region, RingAddresses,
    SessionError,
};
use vmm_sys_util::eventfd;

use crate::fake::{LOG_ALL, MEMORY, PROTOCOL, RING_PACKED, Scene, VERSION_1, memory, ring_at};

/// Longer than any of this takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A stream of ours as one that blocks.
fn blocking(stream: Stream) -> UnixStream {
    let stream = UnixStream::from(OwnedFd::from(stream));
    stream.set_nonblocking(false).unwrap();
    stream
}

/// Calls `serve` whenever there is something to read, until it says that it is done.
fn serve_until(fd: impl AsFd, mut serve: impl FnMut() -> bool) {
    let (poller, mut events) = (Poller::new().unwrap(), Events::with_capacity(1));
    poller.add(fd, 0).unwrap();
    let start = Instant::now();
    while !serve() {
        assert!(start.elapsed() < PATIENCE, "the other end does not go on");
        poller
            .wait(&mut events, Some(Duration::from_millis(100)))
            .unwrap();
    }
}

#[test]
fn its_front_end_brings_our_back_end_up_and_down() {
    let mut scene = Scene::new();
    scene.device.base = 0x77;
    scene.device.config = (0..24).collect();
    let (unused, _) = Stream::pair().unwrap();
    let peer = blocking(std::mem::replace(&mut scene.peer, unused));
    let driver = thread::spawn(move || {
        let mut frontend = TheirFrontend::from_stream(peer, 4);
        frontend.set_owner()?;
        assert_eq!(
            frontend.get_features()?,
            VERSION_1 | RING_PACKED | PROTOCOL | LOG_ALL
        );
        let ours = frontend.get_protocol_features()?.bits();
        assert_eq!(ours & ProtocolFeatures::BACKEND.bits(), ours);
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        frontend.set_protocol_features(wanted)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert_eq!(frontend.get_queue_num()?, 2);
        assert_eq!(frontend.get_max_mem_slots()?, 509);
        frontend.set_features(VERSION_1 | PROTOCOL)?;
        let (_, config) = frontend.get_config(4, 8, VhostUserConfigFlags::empty(), &[0xee; 8])?;
        assert_eq!(config, [4, 5, 6, 7, 8, 9, 10, 11]);

        let file = memory();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: MEMORY.guest_addr,
            memory_size: MEMORY.size,
            userspace_addr: MEMORY.user_addr,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        frontend.set_mem_table(&[region])?;
        let event = eventfd::EventFd::new(0).unwrap();
        for ring in 0..2 {
            let at = ring_at(ring);
            let ring = usize::try_from(ring).unwrap();
            frontend.set_vring_num(ring, 256)?;
            frontend.set_vring_base(ring, 5)?;
            let config = VringConfigData {
                queue_max_size: 256,
                queue_size: 256,
                flags: 0,
                desc_table_addr: at.desc,
                used_ring_addr: at.used,
                avail_ring_addr: at.avail,
                log_addr: None,
            };
            frontend.set_vring_addr(ring, &config)?;
            frontend.set_vring_call(ring, &event)?;
            frontend.set_vring_kick(ring, &event)?;
            frontend.set_vring_err(ring, &event)?;
            frontend.set_vring_enable(ring, true)?;
        }
        let log = VhostUserDirtyLogRegion {
            mmap_size: 4096,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        frontend.set_log_base(0, Some(log))?;
        frontend.set_features(VERSION_1 | PROTOCOL | LOG_ALL)?;
        frontend.set_features(VERSION_1 | PROTOCOL)?;
        let elsewhere = VhostUserMemoryRegionInfo {
            guest_phys_addr: 1 << 32,
            userspace_addr: 1 << 40,
            ..region
        };
        frontend.add_mem_region(&elsewhere)?;
        frontend.add_mem_region(&elsewhere).unwrap_err();
        frontend.remove_mem_region(&elsewhere)?;
        frontend.set_vring_num(0, 128).unwrap_err();
        assert_eq!(frontend.get_vring_base(0)?, 0x77);
        frontend.reset_device()?;
        frontend.reset_owner()
    });
    let poll = scene.backend.as_fd().try_clone_to_owned().unwrap();
    serve_until(poll, || match scene.serve() {
        Ok(()) => false,
        Err(error) => {
            assert!(matches!(error, SessionError::Disconnected), "{error}");
            true
        }
    });
    driver.join().unwrap().unwrap();
    let expected = [
        "features 0x100000000",
        "memory 0x10000",
        "start 0 size 256 base 0x5 kick call",
        "err 0 true",
        "enable 0 true",
        "start 1 size 256 base 0x5 kick call",
        "err 1 true",
        "enable 1 true",
        "log 4096 0",
        "features 0x104000000",
        "features 0x100000000",
        "add 0x100000000",
        "remove 0x100000000",
        "stop 0",
        "stop 1",
        "reset",
    ];
    assert_eq!(scene.device.take_log(), expected);
    assert_eq!(
        scene.backend.counters().1,
        2,
        "those that had to be refused"
    );
}

/// Its back-end needs a device; this one writes down what it is told.
#[derive(Default)]
struct Notes(Vec<String>);

impl Notes {
    fn note(&mut self, line: String) -> Result<()> {
        self.0.push(line);
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Notes {
    fn set_owner(&mut self) -> Result<()> {
        self.note("owner".to_owned())
    }
    fn get_features(&mut self) -> Result<u64> {
        Ok(VERSION_1 | PROTOCOL)
    }
    fn set_features(&mut self, features: u64) -> Result<()> {
        self.note(format!("features {features:#x}"))
    }
    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        self.note(format!("memory {} {}", regions.len(), files.len()))
    }
    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.note(format!("num {index} {num}"))
    }
    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        self.note(format!(
            "addr {index} {descriptor:#x} {available:#x} {used:#x}"
        ))
    }
    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.note(format!("base {index} {base:#x}"))
    }
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, 0x99))
    }
    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.note(format!("kick {index} {}", fd.is_some()))
    }
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.note(format!("call {index} {}", fd.is_some()))
    }
    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.note(format!(
            "protocol {:?}",
            ProtocolFeatures::from_bits_retain(features).names()
        ))
    }
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(2)
    }
    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(16)
    }
    fn get_config(&mut self, _: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(vec![7; usize::try_from(size).unwrap()])
    }
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        // The second ring may not be disabled, so that there is something to refuse.
        if index == 1 && !enable {
            return Err(Error::InvalidParam);
        }
        self.note(format!("enable {index} {enable}"))
    }

    // Nothing below is ever asked of it.
    fn reset_owner(&mut self) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidMessage)
    }
    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidMessage)
    }
    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn add_mem_region(&mut self, _: &VhostUserSingleMemoryRegion, _: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidMessage)
    }
    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidMessage)
    }
    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidMessage)
    }
    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidMessage)
    }
}

#[test]
fn our_front_end_brings_its_back_end_up_and_stops_a_ring() -> IoResult<()> {
    let (ours, theirs) = Stream::pair()?;
    let notes = Arc::new(Mutex::new(Notes::default()));
    let mut handler = BackendReqHandler::from_stream(blocking(theirs), Arc::clone(&notes));
    let device = thread::spawn(move || {
        loop {
            match handler.handle_request() {
                // What the device refuses it reports here as well.
                Ok(()) | Err(Error::InvalidParam) => {}
                Err(Error::Disconnected) => return None,
                Err(error) => return Some(error.to_string()),
            }
        }
    });
    let mut frontend = Frontend::start_with(ours, ProtocolFeatures::all()).unwrap();
    let (file, event) = (memory(), || Arc::new(EventFd::new().unwrap()));
    let mut seen = Vec::new();
    let poll = frontend.as_fd().try_clone_to_owned()?;
    serve_until(poll, || {
        for event_seen in frontend.on_readable().unwrap() {
            match &event_seen {
                FrontendEvent::Offered(offered) => {
                    assert_eq!(
                        (offered.queue_pairs, offered.memory_slots),
                        (Some(2), Some(16))
                    );
                    assert_eq!(offered.config, Some(vec![7; 24]));
                    let ring = |index| {
                        let at = ring_at(index);
                        let addresses = RingAddresses {
                            descriptor_area: at.desc,
                            driver_area: at.avail,
                            device_area: at.used,
                            log_guest_addr: None,
                        };
                        FrontendRing {
                            size: 256,
                            base: 5,
                            addresses,
                            kick: event(),
                            call: event(),
                        }
                    };
                    let region = Region {
                        layout: MEMORY,
                        file: file.try_clone().unwrap(),
                    };
                    let setup = FrontendSetup {
                        features: VERSION_1,
                        mtu: Some(1500),
                        regions: vec![region],
                        rings: vec![ring(0), ring(1)],
                        inflight: None,
                    };
                    frontend.set_up(setup).unwrap();
                }
                FrontendEvent::Running => frontend.enable_ring(1, false).unwrap(),
                FrontendEvent::Refused { .. } => frontend.stop_ring(1).unwrap(),
                FrontendEvent::Logging(_) => panic!("nobody asked for a log"),
                FrontendEvent::RingStopped { ring, base } => assert_eq!((*ring, *base), (1, 0x99)),
                other => panic!("{other:?}"),
            }
            seen.push(event_seen);
        }
        matches!(seen.last(), Some(FrontendEvent::RingStopped { .. }))
    });
    assert_eq!(seen.len(), 4, "{seen:?}");
    drop(frontend);
    assert_eq!(device.join().unwrap(), None, "it had nothing to object to");
    let notes = std::mem::take(&mut notes.lock().unwrap().0);
    let at =
        [ring_at(0), ring_at(1)].map(|at| format!("{:#x} {:#x} {:#x}", at.desc, at.avail, at.used));
    let expected = [
        "owner",
        "protocol [\"MQ\", \"REPLY_ACK\", \"CONFIG\", \"INFLIGHT_SHMFD\", \"CONFIGURE_MEM_SLOTS\"]",
        "call 0 true",
        "call 1 true",
        "features 0x140000000",
        "memory 1 1",
        "num 0 256",
        "base 0 0x5",
        &format!("addr 0 {}", at[0]),
        "kick 0 true",
        "num 1 256",
        "base 1 0x5",
        &format!("addr 1 {}", at[1]),
        "kick 1 true",
        "enable 0 true",
        "enable 1 true",
    ];
    assert_eq!(notes, expected);
    Ok(())
}
