//! Pieces of datagrams: later ones have no ports, and go where the first one went.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;

use super::packet::Packet;

/// Datagrams whose pieces are on their way, at most.
const DATAGRAMS: usize = 1_024;

/// How long pieces may be on their way. Spec: RFC 8200, 4.5 has 60 s; nobody sends them that far apart.
const WITHIN_NS: u64 = 5_000_000_000;

/// The datagrams of which a first piece has passed: seeded hashes, each in a place that others may take.
#[derive(Debug, Default)]
pub(super) struct Datagrams {
    hash: RandomState,
    passed: Vec<(u64, u64)>,
}

impl Datagrams {
    /// A first piece has passed.
    pub(super) fn pass(&mut self, packet: &Packet, now: u64) {
        if self.passed.is_empty() {
            self.passed = vec![(0, 0); DATAGRAMS];
        }
        let name = self.name(packet);
        self.passed[place(name)] = (name, now + WITHIN_NS);
    }

    /// Whether the first piece of the same datagram has passed.
    pub(super) fn has_passed(&self, packet: &Packet, now: u64) -> bool {
        let name = self.name(packet);
        let found = self.passed.get(place(name));
        found.is_some_and(|&(passed, until)| passed == name && now < until)
    }

    fn name(&self, packet: &Packet) -> u64 {
        let ends = (packet.from.address, packet.to.address);
        let kind = (packet.identification, packet.protocol, packet.vlan);
        self.hash.hash_one((ends, kind))
    }
}

fn place(name: u64) -> usize {
    usize::try_from(name % DATAGRAMS as u64).unwrap_or_default()
}
