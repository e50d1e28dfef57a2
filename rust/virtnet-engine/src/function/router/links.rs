//! Questions and answers about addresses on the links, as they come in and as they are asked.
//!
//! Spec: RFC 826, RFC 4861.

use std::net::IpAddr;
use std::sync::Arc;

use virtnet_packet::header::{self, Mac};
use virtnet_packet::{Burst, Offload};

use super::made::{ALL_NODES, Arp, Discovery, solicited};
use super::neighbours::Question;
use super::tables::RouterInterface;
use super::{Fate, Last, Router};

impl Router {
    #[cold]
    pub(super) fn arp(&mut self, here: &RouterInterface, arp: Arp, now: u64) -> Fate {
        self.last = Last::default();
        let is_asked = arp.is_request && here.has(arp.target.into());
        let sender = IpAddr::V4(arp.sender);
        if here.reaches(sender) && !here.has(sender) {
            self.neighbours
                .hear((here.gate, sender), arp.mac, is_asked, now);
        }
        if is_asked {
            let answer = Arp {
                is_request: false,
                mac: here.mac,
                sender: arp.target,
                target: arp.sender,
            };
            self.counters.answered += 1;
            self.outbox
                .push(here.gate, &answer.frame(arp.mac), Offload::default());
        }
        Fate::Consumed
    }

    #[cold]
    pub(super) fn discovery(
        &mut self,
        burst: &Burst,
        i: usize,
        here: &RouterInterface,
        seen: Discovery,
        now: u64,
    ) -> Fate {
        let gate = here.gate;
        self.last = Last::default();
        if !seen.is_question {
            if let Some(mac) = seen.mac.or_else(|| header::source(burst.head(i)))
                && here.reaches(seen.target.into())
                && !here.has(seen.target.into())
            {
                self.neighbours
                    .hear((gate, seen.target.into()), mac, false, now);
            }
            return Fate::Consumed;
        }
        if !here.has(seen.target.into()) {
            return Fate::Consumed;
        }
        let asker = header::source(burst.head(i)).unwrap_or_default();
        // One that only tries whether the address is free has none of its own yet.
        let (destination, mac) = if seen.source.is_unspecified() {
            ALL_NODES
        } else {
            (seen.source, seen.mac.unwrap_or(asker))
        };
        if !seen.source.is_unspecified() && here.reaches(seen.source.into()) {
            self.neighbours
                .hear((gate, seen.source.into()), mac, true, now);
        }
        let answer = Discovery {
            is_question: false,
            source: seen.target,
            destination,
            target: seen.target,
            mac: Some(here.mac),
        };
        self.counters.answered += 1;
        self.outbox
            .push(gate, &answer.frame(here.mac, mac), Offload::default());
        Fate::Consumed
    }

    pub(super) fn ask(&mut self, Question { station, of }: Question) {
        let tables = Arc::clone(&self.tables);
        let (gate, ip) = station;
        let Some(here) = tables.at(gate) else { return };
        let frame = match (ip, tables.source(gate, ip)) {
            (IpAddr::V4(target), Some(IpAddr::V4(sender))) => Arp {
                is_request: true,
                mac: here.mac,
                sender,
                target,
            }
            .frame(of.unwrap_or(Mac::BROADCAST)),
            (IpAddr::V6(target), Some(IpAddr::V6(source))) => {
                let (group, group_mac) = solicited(target);
                let (destination, to) = of.map_or((group, group_mac), |mac| (target, mac));
                let question = Discovery {
                    is_question: true,
                    source,
                    destination,
                    target,
                    mac: Some(here.mac),
                };
                question.frame(here.mac, to)
            }
            _ => return,
        };
        self.counters.asked += 1;
        self.outbox.push(gate, &frame, Offload::default());
    }
}
