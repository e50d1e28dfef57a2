//! Checks with rings that no driver writes. Whatever becomes of that ring and its session, the next one is served.
//!
//! Spec: what a device has to do with such a ring is hardly said (virtio 1.4, 2.1.2: it may ask for a reset); that one guest costs
//! another one nothing is what everybody relies on.

use std::sync::atomic::Ordering;
use std::thread;

use virtnet_mem::{Table, Window, Word};
use virtnet_virtio::RingFormat::{Packed, Split};
use virtnet_virtio::{Features, RingFormat};

use super::rig::{QUIET, Rig, Shape};
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
/// A packed descriptor that is available on the first lap. Spec: virtio 1.4, 2.8.1.
const AVAILABLE: u16 = 1 << 7;

const SPLIT: &str = "virtio 1.4, 2.7.5 (a driver never does that)";
const PACKED: &str = "virtio 1.4, 2.8 (a driver never does that)";

const RECEIVEQ: usize = 0;
const TRANSMITQ: usize = 1;

/// Where no memory is.
const NOWHERE: u64 = 0xdead_0000_0000;

pub(super) static CHECKS: &[Check] = &[
    attack(
        "head-beyond-table",
        "a head beyond the descriptor table",
        SPLIT,
        |bench| survives(bench, Split, TRANSMITQ, |raw| raw.show(0, raw.size + 5, 1)),
    ),
    attack(
        "next-beyond-table",
        "a chain that goes on beyond the descriptor table",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.split(0, raw.good, 60, NEXT, raw.size + 9);
                raw.show(0, 0, 1);
            })
        },
    ),
    attack(
        "loop-of-descriptors",
        "a chain that never ends",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.split(0, raw.good, 60, NEXT, 1);
                raw.split(1, raw.good, 60, NEXT, 0);
                raw.show(0, 0, 1);
            })
        },
    ),
    attack(
        "descriptor-to-itself",
        "a descriptor that is its own next one",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.split(0, raw.good, 60, NEXT, 0);
                raw.show(0, 0, 1);
            })
        },
    ),
    attack(
        "available-index-jumps",
        "an available index far ahead of what there is room for",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.split(0, raw.good, 60, 0, 0);
                raw.show(0, 0, raw.size.wrapping_mul(3) + 1);
            })
        },
    ),
    attack(
        "outside-memory-split",
        "a buffer outside of memory",
        SPLIT,
        |bench| survives(bench, Split, TRANSMITQ, |raw| raw.offer_one(NOWHERE, 60, 0)),
    ),
    attack(
        "outside-memory-packed",
        "a buffer outside of memory, on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.offer_one(NOWHERE, 60, 0)
            })
        },
    ),
    attack(
        "past-last-address-split",
        "a buffer whose end passes the last address",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.offer_one(u64::MAX - 20, 60, 0)
            })
        },
    ),
    attack(
        "past-last-address-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.offer_one(u64::MAX - 20, 60, 0)
            })
        },
    ),
    attack(
        "past-region-split",
        "a buffer that goes on behind its region's end",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.offer_one(raw.end - 20, 100, 0)
            })
        },
    ),
    attack(
        "past-region-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.offer_one(raw.end - 20, 100, 0)
            })
        },
    ),
    attack(
        "four-gigabytes-split",
        "a buffer of 4 GiB less one byte",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, u32::MAX, 0)
            })
        },
    ),
    attack(
        "four-gigabytes-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, u32::MAX, 0)
            })
        },
    ),
    attack(
        "shorter-than-header-split",
        "a frame shorter than its header",
        SPLIT,
        |bench| survives(bench, Split, TRANSMITQ, |raw| raw.offer_one(raw.good, 7, 0)),
    ),
    attack(
        "shorter-than-header-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, 7, 0)
            })
        },
    ),
    attack(
        "header-and-nothing-split",
        "a header without a frame",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, 12, 0)
            })
        },
    ),
    attack("nothing-split", "a buffer of no bytes", SPLIT, |bench| {
        survives(bench, Split, TRANSMITQ, |raw| raw.offer_one(raw.good, 0, 0))
    }),
    attack(
        "nothing-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, 0, 0)
            })
        },
    ),
    attack(
        "writable-to-send-split",
        "a device-writable buffer on a transmitq",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, 72, WRITE)
            })
        },
    ),
    attack(
        "writable-to-send-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, 72, WRITE)
            })
        },
    ),
    attack(
        "readable-to-receive-split",
        "a device-readable buffer on a receiveq",
        SPLIT,
        |bench| {
            survives(bench, Split, RECEIVEQ, |raw| {
                raw.offer_one(raw.good, 2048, 0)
            })
        },
    ),
    attack(
        "readable-to-receive-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, RECEIVEQ, |raw| {
                raw.offer_one(raw.good, 2048, 0)
            })
        },
    ),
    attack(
        "nowhere-to-receive-split",
        "a receive buffer outside of memory",
        SPLIT,
        |bench| {
            survives(bench, Split, RECEIVEQ, |raw| {
                raw.offer_one(NOWHERE, 2048, WRITE)
            })
        },
    ),
    attack(
        "nowhere-to-receive-packed",
        "the same on a packed ring",
        PACKED,
        |bench| {
            survives(bench, Packed, RECEIVEQ, |raw| {
                raw.offer_one(NOWHERE, 2048, WRITE)
            })
        },
    ),
    attack(
        "tiny-to-receive-split",
        "a receive buffer smaller than a header",
        SPLIT,
        |bench| {
            survives(bench, Split, RECEIVEQ, |raw| {
                raw.offer_one(raw.good, 5, WRITE)
            })
        },
    ),
    attack(
        "indirect-not-negotiated",
        "a table of descriptors that was not negotiated",
        SPLIT,
        |bench| {
            survives(bench, Split, TRANSMITQ, |raw| {
                raw.offer_one(raw.good, 32, INDIRECT)
            })
        },
    ),
    attack(
        "indirect-of-odd-length-split",
        "a table of descriptors whose length is no multiple of 16",
        SPLIT,
        |bench| survives_indirect(bench, Split, |raw| raw.offer_one(raw.good, 30, INDIRECT)),
    ),
    attack(
        "indirect-of-odd-length-packed",
        "the same on a packed ring",
        PACKED,
        |bench| survives_indirect(bench, Packed, |raw| raw.offer_one(raw.good, 30, INDIRECT)),
    ),
    attack(
        "indirect-empty-split",
        "an empty table of descriptors",
        SPLIT,
        |bench| survives_indirect(bench, Split, |raw| raw.offer_one(raw.good, 0, INDIRECT)),
    ),
    attack(
        "indirect-nowhere-split",
        "a table of descriptors outside of memory",
        SPLIT,
        |bench| survives_indirect(bench, Split, |raw| raw.offer_one(NOWHERE, 32, INDIRECT)),
    ),
    attack(
        "indirect-nowhere-packed",
        "the same on a packed ring",
        PACKED,
        |bench| survives_indirect(bench, Packed, |raw| raw.offer_one(NOWHERE, 32, INDIRECT)),
    ),
    attack(
        "indirect-in-itself",
        "a table of descriptors that is the ring's own table",
        SPLIT,
        |bench| {
            survives_indirect(bench, Split, |raw| {
                raw.offer_one(raw.table_addr, 64, INDIRECT)
            })
        },
    ),
    attack(
        "chain-round-the-ring",
        "a chain as long as the packed ring that goes on",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                for slot in (0..raw.size).rev() {
                    raw.packed(slot, raw.good, 60, NEXT);
                }
            })
        },
    ),
    attack(
        "id-beyond-ring",
        "a buffer id beyond the packed ring's size",
        PACKED,
        |bench| {
            survives(bench, Packed, TRANSMITQ, |raw| {
                raw.store(0, raw.good, 72, 0xfff0, AVAILABLE);
            })
        },
    ),
];

const fn attack(
    id: &'static str,
    demand: &'static str,
    source: &'static str,
    run: fn(&Bench) -> Verdict,
) -> Check {
    Check::must(id, demand, source, run).hostile()
}

/// A ring's areas, to be written to as nobody should. Only for rings that nothing was added to.
pub(super) struct Raw {
    table: Table,
    avail: Window,
    used: Window,
    format: RingFormat,
    size: u16,
    /// The ring's own table, as a guest address.
    table_addr: u64,
    /// A buffer that is there.
    good: u64,
    /// The end of memory.
    end: u64,
}

impl Raw {
    pub(super) fn new(rig: &Rig, ring: usize) -> Result<Self, Stop> {
        let memory = rig.memory.memory();
        let ring = &rig.rings[ring];
        let config = ring.config;
        let size = usize::from(config.size);
        let format = RingFormat::of(config.features);
        let (driver, device) = match format {
            Split => (4 + 2 * size, 4 + 8 * size),
            Packed => (4, 4),
        };
        let region = &rig.memory.regions()[0];
        Ok(Self {
            table: memory.table(config.desc_area, size).map_err(Stop::host)?,
            avail: memory
                .window(config.driver_area, driver, 2)
                .map_err(Stop::host)?,
            used: memory
                .window(config.device_area, device, 4)
                .map_err(Stop::host)?,
            format,
            size: config.size,
            table_addr: region.guest.0 + (config.desc_area.0 - region.user.0),
            good: ring.slots.0,
            end: region.guest.0 + region.size,
        })
    }

    /// Makes one descriptor available as a chain of its own.
    pub(super) fn offer_one(&self, addr: u64, len: u32, flags: u16) {
        match self.format {
            Split => {
                self.split(0, addr, len, flags, 0);
                self.show(0, 0, 1);
            }
            Packed => self.packed(0, addr, len, flags),
        }
    }

    /// Whether the first chain has come back.
    pub(super) fn is_used(&self) -> bool {
        match self.format {
            Split => self.used.load_u16(2, Ordering::Acquire) == 1,
            Packed => {
                let flags = self.table.load(0, Word::Second, Ordering::Acquire) >> 48;
                flags & 0x8080 == 0x8080
            }
        }
    }

    fn split(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.store(index, addr, len, flags, next);
    }

    fn packed(&self, slot: u16, addr: u64, len: u32, flags: u16) {
        self.store(slot, addr, len, slot, flags | AVAILABLE);
    }

    /// Writes a descriptor: the two last words are flags and next, or id and flags.
    fn store(&self, index: u16, addr: u64, len: u32, third: u16, fourth: u16) {
        let rest = u64::from(len) | u64::from(third) << 32 | u64::from(fourth) << 48;
        let at = usize::from(index);
        self.table.store(at, Word::First, addr, Ordering::Release);
        self.table.store(at, Word::Second, rest, Ordering::Release);
    }

    /// Writes an entry of the available ring, and its index.
    fn show(&self, entry: u16, head: u16, index: u16) {
        let at = 4 + 2 * usize::from(entry);
        self.avail.store_u16(at, head, Ordering::Release);
        self.avail.store_u16(2, index, Ordering::Release);
    }
}

fn survives(bench: &Bench, format: RingFormat, ring: usize, attack: fn(&Raw)) -> Verdict {
    try_out(bench, &Shape::new(format), ring, attack)
}

fn survives_indirect(bench: &Bench, format: RingFormat, attack: fn(&Raw)) -> Verdict {
    let shape = Shape::new(format).with(Features::INDIRECT_DESC);
    try_out(bench, &shape, TRANSMITQ, attack)
}

/// Attacks on one ring, leaves, and expects the next session to be served.
fn try_out(bench: &Bench, shape: &Shape, ring: usize, attack: fn(&Raw)) -> Verdict {
    let mut rig = bench.running(shape)?;
    attack(&Raw::new(&rig, ring)?);
    drop(rig.rings[ring].kick.signal());
    if ring == RECEIVEQ {
        // Something has to arrive for the buffer to be looked at.
        rig.send(0, &frame(0, 60))?;
        rig.rings[TRANSMITQ].kick.signal().map_err(Stop::host)?;
    }
    thread::sleep(QUIET / 3);
    drop(rig);
    let mut next = bench.running(shape)?;
    next.send(0, &frame(1, 60))?;
    next.wait_taken(0, 1)?;
    Ok("the next session is served".to_owned())
}
