//! What a session remembers: what was agreed, and how far each ring has come.

use std::sync::Arc;

use virtnet_sys::EventFd;

use super::DRIVER_OK;
use crate::bits;
use crate::error::Refusal;
use crate::features::ProtocolFeatures;
use crate::payload::VringAddresses;
use crate::regions::Regions;
use crate::ring_state::RingState;

/// Where a fresh packed ring begins: slot 0 on both sides, both wrap counters 1.
const PACKED_BASE: u32 = 0x8000_8000;

/// A fresh packed ring as front-ends write it that know of one side only.
const PACKED_BASE_HALF: u32 = 0x8000;

/// Where the three areas of a ring lie, as user addresses of the front-end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RingAddresses {
    /// The Descriptor Area: descriptor table, or descriptor ring.
    pub descriptor_area: u64,
    /// The Driver Area: available ring, or driver event suppression.
    pub driver_area: u64,
    /// The Device Area: used ring, or device event suppression.
    pub device_area: u64,
    /// Where writes to the Device Area are logged, as a guest physical address; `None` if they are not.
    pub log_guest_addr: Option<u64>,
}

impl From<VringAddresses> for RingAddresses {
    fn from(wire: VringAddresses) -> Self {
        Self {
            descriptor_area: wire.desc,
            driver_area: wire.avail,
            device_area: wire.used,
            log_guest_addr: (wire.flags & 1 != 0).then_some(wire.log_guest_addr),
        }
    }
}

impl RingAddresses {
    /// As SET_VRING_ADDR tells them of ring `index`.
    pub(crate) fn of_ring(self, index: u32) -> VringAddresses {
        VringAddresses {
            index,
            flags: u32::from(self.log_guest_addr.is_some()),
            desc: self.descriptor_area,
            used: self.device_area,
            avail: self.driver_area,
            log_guest_addr: self.log_guest_addr.unwrap_or(0),
        }
    }
}

/// All that is needed to run a ring.
#[derive(Debug, Clone)]
pub struct RingSetup {
    /// How many descriptors it has.
    pub size: u16,
    /// Where to begin: the next available index of a split ring, or both positions of a packed one.
    pub base: u32,
    /// Where it lies.
    pub addresses: RingAddresses,
    /// Says that there are available buffers; without it the ring has to be polled.
    pub kick: Option<Arc<EventFd>>,
    /// To be signalled when there are used buffers; without it the driver polls.
    pub call: Option<Arc<EventFd>>,
    /// To be signalled when the ring is broken.
    pub err: Option<Arc<EventFd>>,
    /// Whether it is enabled.
    pub enabled: bool,
}
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub(super) features: Option<u64>,
    pub(super) features_refused: bool,
    /// Addresses of rings and descriptors go through an IOMMU, whose translations are told.
    pub(super) translates: bool,
    pub(super) protocol: ProtocolFeatures,
    pub(super) regions: Regions,
    pub(super) rings: Vec<Ring>,
    pub(super) status: u8,
    pub(super) postcopy: Postcopy,
    /// Held for the front-end. That it is signalled is asked for by no specification, and expected by no front-end.
    pub(super) log_event: Option<Arc<EventFd>>,
}

/// How far a migration has come whose memory arrives after the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Postcopy {
    /// There is none.
    #[default]
    Off,
    /// The front-end has the descriptor.
    Advised,
    /// The memory that comes now has pages that are missing.
    Listening,
    /// It has come, and must not be touched before the front-end knows where it is.
    Told,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Ring {
    pub(super) size: Option<u16>,
    pub(super) base: Option<u32>,
    pub(super) addresses: Option<RingAddresses>,
    pub(super) kick: Option<Arc<EventFd>>,
    pub(super) call: Option<Arc<EventFd>>,
    pub(super) err: Option<Arc<EventFd>>,
    pub(super) state: RingState,
    /// Whether the device uses it: it is started and has all it needs.
    pub(super) runs: bool,
}
impl State {
    pub(super) fn is_packed(&self) -> bool {
        self.features
            .is_some_and(|features| features & bits::RING_PACKED != 0)
    }

    /// Tells whether the rings are known to be split; before the features are known they may be either.
    pub(super) fn is_split(&self) -> bool {
        self.features.is_some() && !self.is_packed()
    }

    /// Returns where a ring begins, in the full form: a fresh packed ring begins at slot 0 on both sides.
    pub(super) fn base(&self, ring: usize) -> u32 {
        match (
            self.is_packed(),
            self.rings.get(ring).and_then(|ring| ring.base),
        ) {
            (true, None | Some(PACKED_BASE_HALF)) => PACKED_BASE,
            (_, base) => base.unwrap_or(0),
        }
    }

    /// Tells whether a ring has been started, does not run yet, and has all it needs.
    pub(super) fn is_complete(&self, ring: usize) -> bool {
        let driver_ok =
            !self.protocol.contains(ProtocolFeatures::STATUS) || self.status & DRIVER_OK != 0;
        let ring = &self.rings[ring];
        ring.state.started
            && !ring.runs
            && ring.size.is_some()
            && ring.addresses.is_some()
            && self.features.is_some()
            && !self.regions.is_empty()
            && self.postcopy != Postcopy::Told
            && driver_ok
    }

    /// Checks that the areas of a ring begin in memory there is; whoever maps them checks the rest.
    pub(super) fn check_mapped(&self, request: &'static str, ring: usize) -> Result<(), Refusal> {
        let Some(addresses) = self.rings[ring].addresses else {
            return Ok(());
        };
        if self.translates {
            // Where they are is told when somebody asks, and may change at any time.
            return Ok(());
        }
        let areas = [
            ("Descriptor Area", addresses.descriptor_area),
            ("Driver Area", addresses.driver_area),
            ("Device Area", addresses.device_area),
        ];
        match areas
            .into_iter()
            .find(|(_, address)| !self.regions.contains_user(*address))
        {
            Some((area, address)) => Err(Refusal::RingUnmapped {
                request,
                ring,
                area,
                address,
            }),
            None => Ok(()),
        }
    }
}
pub(super) fn check_alignment(
    request: &'static str,
    addresses: RingAddresses,
    packed: bool,
) -> Result<(), Refusal> {
    let driver_alignment = if packed { 4 } else { 2 };
    let areas = [
        (
            "the Descriptor Area",
            addresses.descriptor_area,
            16,
            "a multiple of 16",
        ),
        (
            "the Driver Area",
            addresses.driver_area,
            driver_alignment,
            "a multiple of 2 (packed: 4)",
        ),
        (
            "the Device Area",
            addresses.device_area,
            4,
            "a multiple of 4",
        ),
    ];
    for (what, address, alignment, expected) in areas {
        if !address.is_multiple_of(alignment) {
            return Err(Refusal::Value {
                request,
                what,
                found: address,
                expected,
            });
        }
    }
    Ok(())
}
