//! What a session of a front-end acts on: the device behind it, as its back-end sees it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtnet_sys::EventFd;

use crate::error::Refusal;
use crate::message::BackRequest;
use crate::payload::{Config, InflightArea, Iotlb, MemoryRegion};
use crate::regions::{InflightFile, LogFile, Region};
use crate::session::{RingAddresses, RingSetup};

/// Why a device could not do something; the text reaches a person, the front-end only learns that it failed.
pub type DeviceError = Box<dyn std::error::Error + Send + Sync>;

/// What is behind a session: it owns the memory and the queues.
///
/// Calls come from the thread that serves the connection, one at a time, and each is finished when it returns: the
/// front-end may take back memory or descriptors as soon as it has its answer. An error is a refusal that changed nothing.
pub trait BackendDevice {
    /// These virtio features are in force from now on, without bit 30.
    ///
    /// # Errors
    /// The set makes no sense for this device.
    fn set_features(&mut self, features: u64) -> Result<(), DeviceError>;

    /// This is the whole guest memory; regions that were there before and are not among these are gone.
    ///
    /// Running rings go on in the new memory, or break if they no longer lie in it.
    ///
    /// # Errors
    /// A region cannot be mapped; the memory is as it was.
    fn set_memory(&mut self, regions: Vec<Region>) -> Result<(), DeviceError>;

    /// Guest memory grows by a region.
    ///
    /// # Errors
    /// The region cannot be mapped; the memory is as it was.
    fn add_memory(&mut self, region: Region) -> Result<(), DeviceError>;

    /// Guest memory shrinks by a region, which was added before with the same numbers.
    ///
    /// # Errors
    /// It cannot be given up.
    fn remove_memory(&mut self, region: MemoryRegion) -> Result<(), DeviceError>;

    /// Marks what is written from now on in this log, while feature bit 26 is in force; the log before it is gone.
    ///
    /// # Errors
    /// It cannot be mapped; writes are logged as they were.
    fn set_log(&mut self, log: LogFile) -> Result<(), DeviceError>;

    /// Makes an empty record of buffers in flight, for as many rings and descriptors as `area` says. It is not used before the
    /// front-end hands it back.
    ///
    /// # Errors
    /// There is no memory for it.
    fn make_inflight(&mut self, _area: InflightArea) -> Result<InflightFile, DeviceError> {
        Err("this device does not record what is in flight".into())
    }

    /// Rings that start from now on record in this file what is in flight, and begin with what it says.
    ///
    /// # Errors
    /// It cannot be mapped, or is too short for as many rings and descriptors.
    fn set_inflight(&mut self, _record: InflightFile) -> Result<(), DeviceError> {
        Err("this device does not record what is in flight".into())
    }

    /// Begins to use a ring; what is available is processed at once, kicked or not.
    ///
    /// # Errors
    /// The ring does not lie in guest memory; it stays stopped and waits for another kick.
    fn start_ring(&mut self, ring: usize, setup: RingSetup) -> Result<(), DeviceError>;

    /// Stops a running ring when all its buffers in flight are returned, and says where to begin again; `None` for one
    /// that had stopped by itself, because its driver broke it.
    ///
    /// # Errors
    /// The ring's state is unknown; the connection ends.
    fn stop_ring(&mut self, ring: usize) -> Result<Option<u32>, DeviceError>;

    /// Enables or disables a running ring.
    fn enable_ring(&mut self, ring: usize, enabled: bool);

    /// Gives a running ring another kick.
    ///
    /// # Errors
    /// It cannot be waited for.
    fn set_kick(&mut self, ring: usize, kick: Option<Arc<EventFd>>) -> Result<(), DeviceError>;

    /// Gives a running ring another call.
    ///
    /// # Errors
    /// It cannot be used.
    fn set_call(&mut self, ring: usize, call: Option<Arc<EventFd>>) -> Result<(), DeviceError>;

    /// Gives a running ring another error event.
    ///
    /// # Errors
    /// It cannot be used.
    fn set_err(&mut self, ring: usize, err: Option<Arc<EventFd>>) -> Result<(), DeviceError>;

    /// Moves a running ring, or begins or ends logging it, without losing a buffer.
    ///
    /// # Errors
    /// The ring would not lie in guest memory; it stays where it is.
    fn set_addresses(&mut self, ring: usize, addresses: RingAddresses) -> Result<(), DeviceError>;

    /// Returns to the state of the beginning; all rings have been stopped, memory stays.
    fn reset(&mut self) {}

    /// The device status has changed.
    fn set_status(&mut self, _status: u8) {}

    /// No packet will be longer than this.
    ///
    /// # Errors
    /// It cannot be kept.
    fn set_mtu(&mut self, _mtu: u16) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Announces a MAC address to the network, because a guest has moved here.
    ///
    /// # Errors
    /// It cannot be announced.
    fn send_rarp(&mut self, _mac: [u8; 6]) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Fills in the configuration space from `offset` on; what lies beyond its end stays zero.
    fn read_config(&mut self, _offset: u32, _buffer: &mut [u8]) {}

    /// Writes to the configuration space.
    ///
    /// # Errors
    /// The field is read-only: by default all of them are.
    fn write_config(&mut self, config: &Config) -> Result<(), DeviceError> {
        Err(format!(
            "the configuration space is read-only at offset {}",
            config.offset
        )
        .into())
    }

    /// A request was not carried out, and this is why.
    fn refused(&mut self, _refusal: &Refusal) {}

    /// Prepares for memory whose pages arrive after the guest does; the descriptor through which the front-end serves our faults.
    ///
    /// # Errors
    /// This device does not wait for pages, or the kernel does not let it.
    fn advise_postcopy(&mut self) -> Result<OwnedFd, DeviceError> {
        Err("this device does not wait for pages that arrive later".into())
    }

    /// Where a region of guest memory begins in this process; 0 if it is not there.
    fn mapped_at(&self, _region: &MemoryRegion) -> u64 {
        0
    }

    /// The front-end serves faults in all of guest memory from now on: whoever touches a page that is missing waits for it.
    ///
    /// # Errors
    /// The kernel does not catch faults in such memory; it must not be touched then.
    fn catch_faults(&mut self) -> Result<(), DeviceError> {
        Err("this device does not wait for pages that arrive later".into())
    }

    /// All pages have arrived.
    fn end_postcopy(&mut self) {}

    /// What another device has to know to go on where this one stopped, beyond what a front-end tells it. At most
    /// [`MAX_STATE_LEN`](crate::MAX_STATE_LEN) bytes; all rings are stopped.
    ///
    /// # Errors
    /// It cannot be said.
    fn save_state(&mut self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }

    /// Goes on where another device stopped.
    ///
    /// # Errors
    /// That makes no sense to this device; it is as it was.
    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        match state {
            [] => Ok(()),
            _ => Err("this device has no state of its own".into()),
        }
    }

    /// A translation of I/O addresses appears ([`Iotlb::UPDATE`]) or goes ([`Iotlb::INVALIDATE`]); comes only with ACCESS_PLATFORM.
    ///
    /// What goes is not touched any more when this returns.
    ///
    /// # Errors
    /// It makes no sense, or cannot be carried out; by default, nothing is translated.
    fn translate(&mut self, _change: Iotlb) -> Result<(), DeviceError> {
        Err("this device takes no translations".into())
    }

    /// The front-end has answered a request of ours; 0 says that it was carried out.
    fn answered(&mut self, _request: &BackRequest, _code: u64) {}

    /// The connection is gone: all rings stop, memory and descriptors are given up.
    fn disconnected(&mut self);
}
