//! What a router tells the senders of packets that it does not send on.
//!
//! Spec: RFC 1812 (4.3), RFC 4443 (2.4).

use std::net::IpAddr;

use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload};

use super::local::ECHO6_REQUEST;
use super::made::IcmpError;
use super::neighbours::Waiting;
use super::npt::Unmappable;
use super::packet::{ICMP, ICMPV6, V4, V6};
use super::tables::Next;
use super::{Fate, Router};
use crate::graph::Gate;

const REDIRECT6: u8 = 137;

pub(super) const NO_NETWORK: IcmpError = error(3, 0);
const NO_HOST: IcmpError = error(3, 1);
pub(super) const NO_PROTOCOL: IcmpError = error(3, 2);
pub(super) const NO_PORT: IcmpError = error(3, 3);
pub(super) const TTL_EXPIRED: IcmpError = error(11, 0);
pub(super) const NO_ROUTE6: IcmpError = error(1, 0);
pub(super) const BEYOND_SCOPE6: IcmpError = error(1, 2);
const NO_ADDRESS6: IcmpError = error(1, 3);
pub(super) const NO_PORT6: IcmpError = error(1, 4);
pub(super) const HOPS_EXPIRED6: IcmpError = error(3, 0);

/// The header that is named at `at` of the packet is one that nobody knows here.
pub(super) fn unknown_header(at: usize) -> IcmpError {
    IcmpError {
        rest: u32::try_from(at).unwrap_or_default(),
        ..UNKNOWN_HEADER6
    }
}

const UNKNOWN_HEADER6: IcmpError = error(4, 1);

pub(super) const fn error(kind: u8, code: u8) -> IcmpError {
    IcmpError {
        kind,
        code,
        rest: 0,
    }
}

impl Router {
    /// Tells the sender of a packet what has become of it: as whom it was for, or from the link that the error leaves by.
    /// Spec: RFC 1812, 4.3.2.4 and 4.3.2.7.
    #[cold]
    pub(super) fn tell_v4(
        &mut self,
        burst: &Burst,
        i: usize,
        gate: Gate,
        ip: &V4,
        what: IcmpError,
        now: u64,
    ) {
        let kind = burst.head(i).get(ip.transport());
        // Not of errors, whose kinds are these.
        let is_error = ip.protocol == ICMP && matches!(kind, None | Some(3 | 4 | 5 | 11 | 12));
        if is_error || ip.later || !ip.has_source() {
            return;
        }
        let Some(station) = self.back_to(ip.source.into(), gate) else {
            return;
        };
        let source = match what {
            NO_PORT | NO_PROTOCOL => ip.destination,
            _ => match self.tables.source(station.0, ip.source.into()) {
                Some(IpAddr::V4(source)) => source,
                _ => return,
            },
        };
        if !self.may_tell(now) {
            return;
        }
        let mut quoted = [0; 600];
        let n = burst.copy_frame(i, &mut quoted);
        let quoted = quoted.get(ETHERNET_LEN..n.min(ETHERNET_LEN + ip.total_len));
        let frame = what.v4(source, ip.source, quoted.unwrap_or_default());
        self.counters.errors_sent += 1;
        self.send_frame(frame, Offload::default(), station, now);
    }

    /// Tells the sender of a packet what has become of it. Spec: RFC 4443, 2.2 (a) and 2.4 (e).
    #[cold]
    pub(super) fn tell_v6(
        &mut self,
        burst: &Burst,
        i: usize,
        gate: Gate,
        ip: &V6,
        what: IcmpError,
        now: u64,
    ) {
        let is_error = match ip.transport(burst.head(i)) {
            Some(upper) if upper.kind == ICMPV6 => {
                let kind = burst.head(i).get(upper.at);
                kind.is_none_or(|&kind| kind < ECHO6_REQUEST || kind == REDIRECT6)
            }
            _ => false,
        };
        if is_error || ip.source.is_unspecified() {
            return;
        }
        let Some(station) = self.back_to(ip.source.into(), gate) else {
            return;
        };
        let source = match what {
            NO_PORT6
            | IcmpError {
                kind: 4, code: 1, ..
            } => ip.destination,
            _ => match self.tables.source(station.0, ip.source.into()) {
                Some(IpAddr::V6(source)) => source,
                _ => return,
            },
        };
        if !self.may_tell(now) {
            return;
        }
        let mut quoted = [0; 1_300];
        let n = burst.copy_frame(i, &mut quoted);
        let quoted = quoted.get(ETHERNET_LEN..n.min(ETHERNET_LEN + ip.total_len));
        let frame = what.v6(source, ip.source, quoted.unwrap_or_default());
        self.counters.errors_sent += 1;
        self.send_frame(frame, Offload::default(), station, now);
    }

    /// An address cannot be translated. Spec: RFC 6296, 3.7.
    #[cold]
    pub(super) fn tell_unmappable(
        &mut self,
        burst: &Burst,
        i: usize,
        gate: Gate,
        ip: &V6,
        Unmappable(at): Unmappable,
        now: u64,
    ) -> Fate {
        let what = IcmpError {
            rest: u32::try_from(at).unwrap_or_default(),
            ..error(4, 0)
        };
        self.tell_v6(burst, i, gate, ip, what, now);
        Fate::Drop(DropReason::NoMapping)
    }

    pub(super) fn may_tell(&mut self, now: u64) -> bool {
        let may = self.errors.allowed(now) > 0;
        if may {
            self.errors.spend(1);
        } else {
            self.counters.errors_suppressed += 1;
        }
        may
    }

    /// A packet's receiver has not answered: its sender is told so.
    pub(super) fn tell_of_unanswered(&mut self, gate: Gate, waiting: &Waiting, now: u64) {
        let mut burst = Burst::new();
        burst.push_bytes(&waiting.frame, waiting.offload);
        let frame_len = burst.frame_len(0);
        if let Some(nat) = &self.nat
            && let Some(ip) = V4::of(burst.head(0), frame_len)
            && !ip.later
        {
            // Whoever has sent it does not know it as it was to leave.
            nat.restore(burst.head_mut(0), &ip, waiting.offload, now);
        }
        if let Some(nat) = &self.nat
            && nat.has_prefixes()
            && let Some(ip) = V6::of(burst.head(0), frame_len)
        {
            nat.restore6(burst.head_mut(0), &ip);
        }
        if let Some(ip) = V4::of(burst.head(0), frame_len) {
            if self.tables.next(ip.source.into()) != Next::Local {
                self.tell_v4(&burst, 0, gate, &ip, NO_HOST, now);
            }
        } else if let Some(ip) = V6::of(burst.head(0), frame_len)
            && self.tables.next(ip.source.into()) != Next::Local
            && !ip.source.is_unicast_link_local()
        {
            self.tell_v6(&burst, 0, gate, &ip, NO_ADDRESS6, now);
        }
    }
}
