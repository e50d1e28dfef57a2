//! Flows whose addresses are translated: each by both of its tuples, as its packets arrive from either side.
//!
//! The table has a bound, and where it is full a flow that has expired makes room, if a few looks find one.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::net::Ipv4Addr;

use virtnet_packet::checksum::Sum;

use super::packet::{ICMP, TCP, UDP};

/// How many flows are looked at to make room for one.
const LOOKS: usize = 16;
/// How often all flows are looked at once.
const SWEEP_NS: u64 = 8_000_000_000;

const SECOND: u64 = 1_000_000_000;
/// An open connection. Spec: RFC 5382, REQ-5.
const TCP_OPEN_NS: u64 = 7_440 * SECOND;
/// One that opens or closes. Spec: the same.
const TCP_SHORT_NS: u64 = 240 * SECOND;
/// Spec: RFC 4787, REQ-5.
const UDP_NS: u64 = 300 * SECOND;
/// Spec: RFC 5508, REQ-1.
const ICMP_NS: u64 = 60 * SECOND;
const OTHER_NS: u64 = 600 * SECOND;

const FIN: u8 = 1;
const RST: u8 = 4;

/// An address and a port; of a ping, its identifier in place of the asker's port.
pub(super) type End = (Ipv4Addr, u16);

/// Which flow a packet belongs to, by what stands in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tuple {
    pub(super) protocol: u8,
    pub(super) source: End,
    pub(super) destination: End,
}

impl Hash for Tuple {
    /// As two words instead of field by field: every packet's is asked for.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let end = |(ip, port): End| u64::from(ip.to_bits()) << 16 | u64::from(port);
        state.write_u64(end(self.source) << 8 | u64::from(self.protocol));
        state.write_u64(end(self.destination));
    }
}

impl Tuple {
    /// The other direction's.
    pub(super) fn turned(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ..self
        }
    }
}

/// What translation adds to checksums. Spec: RFC 1624, 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Addresses, which are in the sums of IP and of TCP and UDP.
    pub(super) addresses: u16,
    /// Ports, or a ping's identifier.
    pub(super) ports: u16,
}

impl Change {
    fn new(from: &Tuple, to: &Tuple) -> Self {
        let without = |words: [u16; 2]| Sum::default().and_word(!words[0]).and_word(!words[1]);
        let address = |(ip, _): End| Sum::of(&ip.octets());
        let addresses = address(to.source)
            .and(address(to.destination))
            .and_word(address(from.source).checksum())
            .and_word(address(from.destination).checksum());
        let ports = without([from.source.1, from.destination.1])
            .and_word(to.source.1)
            .and_word(to.destination.1);
        Self {
            addresses: !addresses.checksum(),
            ports: !ports.checksum(),
        }
    }
}

/// A flow: how its packets look when they arrive, those of whoever began and those of whoever answers.
#[derive(Clone, Copy, Debug)]
struct Flow {
    original: Tuple,
    reply: Tuple,
    /// What either direction's packets are changed by.
    changes: [Change; 2],
    expires: u64,
    answered: bool,
    /// Which sides have closed.
    closed: [bool; 2],
}

impl Flow {
    #[inline]
    fn changed(&self, place: Place) -> (Tuple, Change) {
        let leaving = if place.is_reply {
            self.original
        } else {
            self.reply
        };
        (leaving.turned(), self.changes[usize::from(place.is_reply)])
    }

    fn lifetime(&self) -> u64 {
        match self.original.protocol {
            TCP if self.answered && self.closed == [false; 2] => TCP_OPEN_NS,
            TCP => TCP_SHORT_NS,
            UDP => UDP_NS,
            ICMP => ICMP_NS,
            _ => OTHER_NS,
        }
    }
}

/// Where a flow is in the table, and which of its directions is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    slot: u32,
    is_reply: bool,
}

/// All flows.
#[derive(Debug, Default)]
pub(super) struct Flows {
    index: HashMap<Tuple, Place, foldhash::fast::RandomState>,
    slots: Vec<Option<Flow>>,
    free: Vec<u32>,
    look_at: usize,
    swept: u64,
    pub(super) created: u64,
    pub(super) expired: u64,
}

impl Flows {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The flow that a packet belongs to, and the address that it goes to then.
    #[inline]
    pub(super) fn find(&self, tuple: &Tuple, now: u64) -> Option<(Place, Ipv4Addr)> {
        let place = *self.index.get(tuple)?;
        let flow = self.slots[place.slot as usize].as_ref()?;
        let other = if place.is_reply {
            &flow.original
        } else {
            &flow.reply
        };
        (now < flow.expires).then_some((place, other.source.0))
    }

    /// How packets of this direction of a flow look when they arrive, and how they are to leave.
    #[inline]
    pub(super) fn tuples(&self, place: Place) -> Option<(Tuple, Tuple)> {
        let flow = self.slots.get(place.slot as usize)?.as_ref()?;
        Some(if place.is_reply {
            (flow.reply, flow.original.turned())
        } else {
            (flow.original, flow.reply.turned())
        })
    }

    /// How packets of this direction of a flow leave, and by what they are changed.
    pub(super) fn changed(&self, place: Place) -> Option<(Tuple, Change)> {
        let flow = self.slots.get(place.slot as usize)?.as_ref()?;
        Some(flow.changed(place))
    }

    /// A packet of a flow was seen, with these flags of TCP: how it is to leave.
    #[inline]
    pub(super) fn pass(&mut self, place: Place, flags: u8, now: u64) -> Option<(Tuple, Change)> {
        let flow = self.slots.get_mut(place.slot as usize)?.as_mut()?;
        flow.answered |= place.is_reply;
        if flags & (FIN | RST) != 0 {
            flow.closed[usize::from(place.is_reply)] = true;
        }
        flow.expires = now + flow.lifetime();
        Some(flow.changed(place))
    }

    /// Whether a tuple is free to be a flow's.
    pub(super) fn is_free(&mut self, tuple: &Tuple, now: u64) -> bool {
        let Some(&place) = self.index.get(tuple) else {
            return true;
        };
        let slot = place.slot as usize;
        let is_over = self.slots[slot].is_none_or(|flow| now >= flow.expires);
        if is_over {
            self.remove(slot);
        }
        is_over
    }

    /// Remembers a flow, whose tuples are free; none if there is no room for more than `limit`.
    pub(super) fn insert(
        &mut self,
        original: Tuple,
        reply: Tuple,
        limit: usize,
        now: u64,
    ) -> Option<Place> {
        if self.len() >= limit && !self.make_room(now) {
            return None;
        }
        let mut flow = Flow {
            original,
            reply,
            changes: [
                Change::new(&original, &reply.turned()),
                Change::new(&reply, &original.turned()),
            ],
            expires: 0,
            answered: false,
            closed: [false; 2],
        };
        flow.expires = now + flow.lifetime();
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(None);
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.slots[slot as usize] = Some(flow);
        for (tuple, is_reply) in [(original, false), (reply, true)] {
            self.index.insert(tuple, Place { slot, is_reply });
        }
        self.created += 1;
        Some(Place {
            slot,
            is_reply: false,
        })
    }

    fn make_room(&mut self, now: u64) -> bool {
        for _ in 0..LOOKS.min(self.slots.len()) {
            self.look_at = (self.look_at + 1) % self.slots.len();
            if self.slots[self.look_at].is_some_and(|flow| now >= flow.expires) {
                self.remove(self.look_at);
                return true;
            }
        }
        false
    }

    fn remove(&mut self, slot: usize) {
        if let Some(flow) = self.slots[slot].take() {
            self.index.remove(&flow.original);
            self.index.remove(&flow.reply);
            self.free.push(u32::try_from(slot).unwrap_or(u32::MAX));
            self.expired += 1;
        }
    }

    /// Forgets what has expired, now and then.
    pub(super) fn sweep(&mut self, now: u64) {
        if now < self.swept + SWEEP_NS {
            return;
        }
        self.swept = now;
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_some_and(|flow| now >= flow.expires) {
                self.remove(slot);
            }
        }
    }

    /// When it is to be swept.
    pub(super) fn due(&self) -> Option<u64> {
        (self.len() > 0).then_some(self.swept + SWEEP_NS)
    }
}
