//! The third door: memory, and both sides of a virtqueue, one descriptor at a time. For teaching, tests and fault injection.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use virtnet_mem::{GuestAddr, GuestMemory as RustMemory, UserAddr};
use virtnet_virtio::{
    Access, Chains, DeviceQueue as RustDevice, DriverBuffer, DriverQueue as RustDriver, Features,
    QueueConfig, RingError, RingFormat, Used, packed, split,
};

use crate::errors::{ConfigError, GuestError, StateError};

/// Where a piece of memory begins that was asked for by its size alone.
const START: u64 = 0x1_0000_0000;

/// Areas and buffers start on lines of their own.
const LINE: u64 = 64;

/// Memory that both sides of a queue see.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct GuestMemory {
    memory: Arc<RustMemory>,
    size: u64,
    /// First byte that is not given out yet, from the start.
    free: Mutex<u64>,
}

#[pymethods]
impl GuestMemory {
    #[new]
    fn make(size: u64) -> PyResult<Self> {
        let memory = RustMemory::anonymous(size, GuestAddr(START)).map_err(config_error)?;
        Ok(Self {
            memory,
            size,
            free: Mutex::new(0),
        })
    }

    #[getter]
    fn start(&self) -> u64 {
        START
    }

    #[getter]
    fn size(&self) -> u64 {
        self.size
    }

    fn alloc(&self, size: u64) -> PyResult<u64> {
        let mut free = lock(&self.free);
        let end = free.checked_add(size).filter(|&end| end <= self.size);
        let end = end.ok_or_else(|| {
            let left = self.size - *free;
            ConfigError::new_err(format!(
                "{size} bytes were asked for, {left} of {} are left",
                self.size
            ))
        })?;
        let at = START + *free;
        *free = end.next_multiple_of(LINE).min(self.size);
        Ok(at)
    }

    fn read(&self, addr: u64, len: u32) -> PyResult<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        let mut filled = 0;
        let whole = self.memory.translate_all(GuestAddr(addr), len, |piece| {
            filled += self.memory.slice(piece).copy_to(&mut bytes[filled..]);
        });
        if whole {
            Ok(bytes)
        } else {
            Err(self.outside(addr, len))
        }
    }

    fn write(&self, addr: u64, data: &[u8]) -> PyResult<()> {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        // Looked at first, so that a write that does not fit writes nothing.
        if !self.memory.translate_all(GuestAddr(addr), len, drop) {
            return Err(self.outside(addr, len));
        }
        let mut written = 0;
        let _ = self.memory.translate_all(GuestAddr(addr), len, |piece| {
            written += self.memory.slice(piece).copy_from(&data[written..]);
        });
        Ok(())
    }
}

impl GuestMemory {
    fn outside(&self, addr: u64, len: u32) -> PyErr {
        let end = START + self.size;
        ConfigError::new_err(format!(
            "{len} bytes at {addr:#x} are not inside {START:#x} to {end:#x}"
        ))
    }
}

/// Both sides of a queue that was laid out in `memory`.
#[pyfunction]
pub(crate) fn queue_pair(
    memory: &GuestMemory,
    size: u32,
    ring: &str,
    features: u64,
) -> PyResult<(DriverQueue, DeviceQueue)> {
    let format = if ring == "packed" {
        RingFormat::Packed
    } else {
        RingFormat::Split
    };
    let mut features = Features::from_bits_retain(features) | Features::VERSION_1;
    features.set(Features::RING_PACKED, format == RingFormat::Packed);
    let size = u16::try_from(size).ok().filter(|_| QueueConfig::size_is_valid(size, format)).ok_or_else(|| {
        ConfigError::new_err(format!(
            "a {format} ring has 1 to 32768 entries, a power of two if it is split; {size} were asked for"
        ))
    })?;
    let area = |bytes: usize| memory.alloc(bytes as u64).map(UserAddr);
    let config = QueueConfig {
        size,
        desc_area: area(split::layout::desc_bytes(size))?,
        driver_area: area(split::layout::avail_bytes(size, true).max(packed::layout::EVENT_BYTES))?,
        device_area: area(split::layout::used_bytes(size, true).max(packed::layout::EVENT_BYTES))?,
        base: format.fresh_base(),
        features,
    };
    let driver = RustDriver::new(&config, &memory.memory).map_err(config_error)?;
    let device = RustDevice::new(&config, &memory.memory).map_err(config_error)?;
    let areas = [
        config.desc_area.0,
        config.driver_area.0,
        config.device_area.0,
    ];
    Ok((
        DriverQueue {
            queue: Mutex::new(driver),
            areas,
        },
        DeviceQueue {
            inner: Mutex::new(Device {
                queue: device,
                chains: Chains::new(),
                broken: None,
            }),
            memory: Arc::clone(&memory.memory),
            areas,
        },
    ))
}

/// The driver's side of a queue.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct DriverQueue {
    queue: Mutex<RustDriver>,
    areas: [u64; 3],
}

#[pymethods]
impl DriverQueue {
    #[getter]
    fn free(&self) -> usize {
        lock(&self.queue).free()
    }

    #[getter]
    fn areas(&self) -> [u64; 3] {
        self.areas
    }

    fn add(&self, readable: Vec<(u64, u32)>, writable: Vec<(u64, u32)>) -> PyResult<Option<u16>> {
        if readable.is_empty() && writable.is_empty() {
            return Err(ConfigError::new_err("a chain has at least one buffer"));
        }
        let buffer = |writable| {
            move |(addr, len)| DriverBuffer {
                addr: GuestAddr(addr),
                len,
                writable,
            }
        };
        let buffers: Vec<_> = readable
            .into_iter()
            .map(buffer(false))
            .chain(writable.into_iter().map(buffer(true)))
            .collect();
        Ok(lock(&self.queue).add(&buffers))
    }

    fn publish(&self) -> bool {
        lock(&self.queue).publish()
    }

    fn reap(&self, max: usize) -> PyResult<Vec<(u16, u32)>> {
        let mut used = vec![Used::default(); max.min(usize::from(u16::MAX))];
        let n = lock(&self.queue).reap(&mut used).map_err(ring_error)?;
        Ok(used
            .iter()
            .take(n)
            .map(|used| (used.id, used.len))
            .collect())
    }

    fn arm(&self) -> bool {
        lock(&self.queue).arm()
    }

    fn disarm(&self) {
        lock(&self.queue).disarm();
    }
}

/// The device's side of a queue.
#[pyclass(frozen, module = "virtnet._virtnet")]
#[derive(Debug)]
pub(crate) struct DeviceQueue {
    inner: Mutex<Device>,
    memory: Arc<RustMemory>,
    areas: [u64; 3],
}

#[derive(Debug)]
struct Device {
    queue: RustDevice,
    /// Taken and not given back, oldest first.
    chains: Chains,
    broken: Option<RingError>,
}

/// The pieces of a chain as address and length, or what is wrong with it.
type ChainView = (Vec<(u64, u32)>, Option<String>);

#[pymethods]
impl DeviceQueue {
    #[getter]
    fn areas(&self) -> [u64; 3] {
        self.areas
    }

    #[getter]
    fn base(&self) -> u32 {
        lock(&self.inner).queue.base()
    }

    #[getter]
    fn taken(&self) -> usize {
        lock(&self.inner).chains.len()
    }

    fn take(&self, max: usize, writable: bool) -> PyResult<Vec<ChainView>> {
        let mut guard = lock(&self.inner);
        let Device {
            queue,
            chains,
            broken,
        } = &mut *guard;
        if let Some(error) = *broken {
            return Err(ring_error(error));
        }
        let before = chains.len();
        let access = if writable {
            Access::Write
        } else {
            Access::Read
        };
        let outcome = queue.take(&self.memory, access, max, chains);
        if let Err(error) = outcome {
            *broken = Some(error);
            if chains.len() == before {
                return Err(ring_error(error));
            }
        }
        Ok((before..chains.len())
            .map(|i| self.view(chains, i))
            .collect())
    }

    fn give(&self, lengths: Vec<u32>) -> PyResult<()> {
        let mut guard = lock(&self.inner);
        let Device { queue, chains, .. } = &mut *guard;
        if lengths.len() != chains.len() {
            let (found, expected) = (lengths.len(), chains.len());
            return Err(StateError::new_err(format!(
                "one length for each of the {expected} chains taken was expected, found {found}"
            )));
        }
        for (i, len) in lengths.into_iter().enumerate() {
            queue.give(chains, i, &[len]);
        }
        chains.clear();
        Ok(())
    }

    fn publish(&self) -> bool {
        lock(&self.inner).queue.publish()
    }

    fn arm(&self) -> bool {
        lock(&self.inner).queue.arm()
    }

    fn disarm(&self) {
        lock(&self.inner).queue.disarm();
    }
}

impl DeviceQueue {
    fn view(&self, chains: &Chains, i: usize) -> ChainView {
        let addr = |region: u32, offset: usize| {
            let region = self.memory.regions().get(region as usize);
            region.map_or(0, |region| region.guest().0) + offset as u64
        };
        let pieces = chains
            .segments(i)
            .iter()
            .map(|s| (addr(s.region, s.offset), s.len))
            .collect();
        (pieces, chains.bytes(i).err().map(|error| error.to_string()))
    }
}

fn config_error(error: impl std::fmt::Display) -> PyErr {
    ConfigError::new_err(error.to_string())
}

fn ring_error(error: RingError) -> PyErr {
    GuestError::new_err(format!("the ring cannot be followed any further: {error}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
