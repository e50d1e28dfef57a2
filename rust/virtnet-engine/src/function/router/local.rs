//! What is addressed to the router itself: pings are answered, other packets refused, as a host does that serves nothing.
//!
//! Nobody here puts fragments together, so those that are for the router say nothing to it.
//!
//! Spec: RFC 1122 (3.2.2, 3.3.8), RFC 8200 (4), RFC 4443, RFC 9293 (3.10.7.1).

use std::net::IpAddr;

use virtnet_packet::checksum::Sum;
use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload};

use super::errors::{NO_PORT, NO_PORT6, NO_PROTOCOL, unknown_header};
use super::made::{self, Discovery, reset4, reset6};
use super::packet::{ICMP, ICMPV6, TCP, UDP, V4, V6, V6_LEN, answer_echo, renew, word};
use super::tables::RouterInterface;
use super::{Fate, Router, to_us};
use crate::function::tcp_reset::reset;
use crate::graph::Gate;

/// Time to live of what begins here.
const TTL: u8 = 64;

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
pub(super) const ECHO6_REQUEST: u8 = 128;
const ECHO6_REPLY: u8 = 129;

/// Groups of IPv4 that stations tell routers of: taken, and left at that.
const IGMP: u8 = 2;
/// Nothing comes behind the headers.
const NO_NEXT: u8 = 59;

impl Router {
    /// A packet of IPv4 for the router itself.
    #[cold]
    pub(super) fn local_v4(
        &mut self,
        burst: &mut Burst,
        i: usize,
        gate: Gate,
        ip: V4,
        now: u64,
    ) -> Fate {
        if ip.later && self.nat.is_some() {
            return self.keep_fragment(burst, i, gate, &ip, now);
        }
        if ip.fragment {
            return Fate::Consumed;
        }
        let at = ip.transport();
        match ip.protocol {
            ICMP if burst.head(i).get(at..at + 2) == Some(&[ECHO_REQUEST, 0]) => {
                self.answer_ping4(burst, i, gate, &ip, now)
            }
            ICMP | IGMP => Fate::Consumed,
            TCP | UDP => {
                let ends = Sum::of(&ip.source.octets()).and(Sum::of(&ip.destination.octets()));
                if !is_whole(burst, i, ip.protocol, at, ends) {
                    return Fate::Drop(DropReason::Malformed);
                }
                if ip.protocol == UDP {
                    self.tell_v4(burst, i, gate, &ip, NO_PORT, now);
                } else if let Some(segment) = reset(burst.head(i), at, ETHERNET_LEN + ip.total_len)
                {
                    let service = burst.head(i)[ETHERNET_LEN + 1];
                    let frame = reset4(ip.destination, ip.source, service, segment);
                    self.refuse(frame, ip.source.into(), gate, now);
                }
                Fate::Consumed
            }
            _ => {
                self.tell_v4(burst, i, gate, &ip, NO_PROTOCOL, now);
                Fate::Consumed
            }
        }
    }

    fn answer_ping4(&mut self, burst: &mut Burst, i: usize, gate: Gate, ip: &V4, now: u64) -> Fate {
        let Some(station) = self.back_to(ip.source.into(), gate) else {
            return Fate::Drop(DropReason::NoRoute);
        };
        let is_finished = burst.offload(i).flags & Offload::NEEDS_CSUM == 0;
        let head = burst.head_mut(i);
        // Swapped addresses have the same sum.
        head[ETHERNET_LEN + 12..ETHERNET_LEN + 20].rotate_left(4);
        let was = word(head, ETHERNET_LEN + 8);
        head[ETHERNET_LEN + 8] = TTL;
        let is = word(head, ETHERNET_LEN + 8);
        renew(head, ETHERNET_LEN + 10, was, is);
        answer_echo(head, ip.transport(), ECHO_REPLY, is_finished);
        self.counters.echo_answered += 1;
        self.send_on(burst, i, station, now)
    }

    /// A packet that stays on its link: for a group, by an address of the link, or from a station that has none yet.
    #[cold]
    pub(super) fn near_v6(
        &mut self,
        burst: &mut Burst,
        i: usize,
        here: &RouterInterface,
        ip: V6,
        now: u64,
    ) -> Fate {
        if ip.next == ICMPV6
            && matches!(
                burst.head(i).get(ETHERNET_LEN + 40),
                Some(&made::SOLICITATION | &made::ADVERTISEMENT)
            )
        {
            return match Discovery::of(burst.head(i), ip.source, ip.destination) {
                Some(seen) => self.discovery(burst, i, here, seen, now),
                None => Fate::Drop(DropReason::Malformed),
            };
        }
        if ip.destination.is_unicast_link_local() && here.has(ip.destination.into()) {
            return self.local_v6(burst, i, here, ip, now);
        }
        Fate::Drop(DropReason::NotForUs)
    }

    /// A packet of IPv6 for the router itself.
    #[cold]
    pub(super) fn local_v6(
        &mut self,
        burst: &mut Burst,
        i: usize,
        here: &RouterInterface,
        ip: V6,
        now: u64,
    ) -> Fate {
        let gate = here.gate;
        let Some(upper) = ip.transport(burst.head(i)) else {
            return Fate::Consumed;
        };
        let at = upper.at;
        let is_direct = at == ETHERNET_LEN + V6_LEN;
        match (upper.kind, burst.head(i).get(at)) {
            _ if upper.is_piece => Fate::Consumed,
            (ICMPV6, Some(&(made::SOLICITATION | made::ADVERTISEMENT))) if is_direct => {
                match Discovery::of(burst.head(i), ip.source, ip.destination) {
                    Some(seen) => self.discovery(burst, i, here, seen, now),
                    None => Fate::Drop(DropReason::Malformed),
                }
            }
            (ICMPV6, Some(&ECHO6_REQUEST)) if is_direct => {
                self.answer_ping6(burst, i, gate, &ip, now)
            }
            (ICMPV6 | NO_NEXT, _) => Fate::Consumed,
            // To everybody on the link, though it is for one.
            _ if !to_us(burst, i, here) => Fate::Consumed,
            (kind @ (TCP | UDP), _) => {
                let ends = Sum::of(&ip.source.octets()).and(Sum::of(&ip.destination.octets()));
                let has_sum = kind == TCP || word(burst.head(i), at + 6) != 0;
                if !has_sum || !is_whole(burst, i, kind, at, ends) {
                    return Fate::Drop(DropReason::Malformed);
                }
                if kind == UDP {
                    self.tell_v6(burst, i, gate, &ip, NO_PORT6, now);
                } else if let Some(segment) = reset(burst.head(i), at, ETHERNET_LEN + ip.total_len)
                {
                    let class = (word(burst.head(i), ETHERNET_LEN) >> 4).to_be_bytes()[1];
                    let frame = reset6(ip.destination, ip.source, class, segment);
                    self.refuse(frame, ip.source.into(), gate, now);
                }
                Fate::Consumed
            }
            _ => {
                let what = unknown_header(upper.named_at - ETHERNET_LEN);
                self.tell_v6(burst, i, gate, &ip, what, now);
                Fate::Consumed
            }
        }
    }

    fn answer_ping6(&mut self, burst: &mut Burst, i: usize, gate: Gate, ip: &V6, now: u64) -> Fate {
        let Some(station) = self.back_to(ip.source.into(), gate) else {
            return Fate::Drop(DropReason::NoRoute);
        };
        let is_finished = burst.offload(i).flags & Offload::NEEDS_CSUM == 0;
        let head = burst.head_mut(i);
        head[ETHERNET_LEN + 8..ETHERNET_LEN + 40].rotate_left(16);
        head[ETHERNET_LEN + 7] = TTL;
        answer_echo(head, ETHERNET_LEN + V6_LEN, ECHO6_REPLY, is_finished);
        self.counters.echo_answered += 1;
        self.send_on(burst, i, station, now)
    }

    /// Sends a reset, as often as errors are sent.
    fn refuse(&mut self, frame: Vec<u8>, to: IpAddr, gate: Gate, now: u64) {
        if let Some(station) = self.back_to(to, gate)
            && self.may_tell(now)
        {
            self.counters.errors_sent += 1;
            self.send_frame(frame, Offload::default(), station, now);
        }
    }
}

/// Whether what is at `at`, of TCP or UDP, is as long as it says and has the right checksum, if it is finished; `ends` is the
/// sum of its addresses.
fn is_whole(burst: &Burst, i: usize, protocol: u8, at: usize, ends: Sum) -> bool {
    let head = burst.head(i);
    let room = burst.frame_len(i).saturating_sub(at);
    // TCP says how long its header is, UDP how long the datagram.
    let (least, said, len, sum_at) = match protocol {
        TCP => {
            let words = head.get(at + 12).map_or(0, |words| words >> 4);
            (20, usize::from(words) * 4, room, at + 16)
        }
        _ => {
            let said = usize::from(word(head, at + 4));
            (8, said, said, at + 6)
        }
    };
    if said < least || said > room {
        return false;
    }
    let is_unfinished = burst.offload(i).flags & Offload::NEEDS_CSUM != 0;
    if is_unfinished || (protocol == UDP && word(head, sum_at) == 0) {
        return true;
    }
    let mut frame = vec![0; burst.frame_len(i)];
    burst.copy_frame(i, &mut frame);
    let Some(bytes) = frame.get(at..at + len) else {
        return false;
    };
    let len = u16::try_from(len).unwrap_or_default();
    let pseudo = ends.and_word(protocol.into()).and_word(len);
    pseudo.and(Sum::of(bytes)).checksum() == 0
}
