//! A host: a virtual machine's network stack in miniature, for demonstrations and tests.
//!
//! It answers ARP and pings, finds its peers by ARP, pings them one ping after the other and notes how long each took, and
//! sends bulk UDP packets. It has no routes, no fragments and no sockets. Whatever arrives ends here, counted by what it was.
//!
//! Times are those of the worker's breaths: a ping that is answered within the same breath took no time.

use std::net::Ipv4Addr;
use std::time::Duration;

use virtnet_packet::header::{self, Mac};
use virtnet_packet::{Burst, Offload, Picks};

use super::Fate;
use super::frame::{self, Echo, Seen, Udp};
use super::source::{RETRY_NS, Source, SourceOrders};
use crate::{EngineError, Histogram};

/// How long a host waits for an answer to an ARP request before it asks again.
const ARP_RETRY_NS: u64 = 100_000_000;

/// Who a host is and what it does from the start.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Its address on the link.
    pub mac: Mac,
    /// Its address in the network.
    pub ip: Ipv4Addr,
    /// What it does beside answering.
    pub orders: HostOrders,
}

/// What a host does beside answering, from the moment it is said; by default nothing.
#[derive(Clone, Debug, Default)]
pub struct HostOrders {
    /// Ping peers.
    pub ping: Option<Ping>,
    /// Send bulk packets to a peer.
    pub blast: Option<Blast>,
}

/// Pings to several peers, at most one on its way to each.
#[derive(Clone, Debug)]
pub struct Ping {
    /// Whom to ping.
    pub peers: Vec<Ipv4Addr>,
    /// From one ping to the next to the same peer; zero: the next as soon as the last was answered.
    pub interval: Duration,
    /// After how long a ping counts as lost.
    pub timeout: Duration,
    /// Pings to each peer; `None`: without end.
    pub count: Option<u64>,
}

impl Default for Ping {
    /// Nobody, without pause, lost after a second, without end.
    fn default() -> Self {
        Self {
            peers: Vec::new(),
            interval: Duration::ZERO,
            timeout: Duration::from_secs(1),
            count: None,
        }
    }
}

/// Bulk UDP packets to one peer.
#[derive(Clone, Copy, Debug)]
pub struct Blast {
    /// Whom to send to.
    pub peer: Ipv4Addr,
    /// Bytes of each frame.
    pub frame_len: usize,
    /// How fast and how many.
    pub orders: SourceOrders,
}

impl HostOrders {
    pub(super) fn check(&self) -> Result<(), EngineError> {
        let Some(blast) = self.blast else {
            return Ok(());
        };
        blast.orders.check()?;
        let (min, max) = (Source::FRAME_LEN_MIN, Source::FRAME_LEN_MAX);
        let size = blast.frame_len;
        if !(min..=max).contains(&size) {
            return Err(EngineError::FrameSize { size, min, max });
        }
        Ok(())
    }
}

/// What a host has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCounters {
    /// ARP requests for its address that it answered.
    pub arp_answered: u64,
    /// Pings to its address that it answered.
    pub echo_answered: u64,
    /// Requests it could not answer because too many answers were waiting.
    pub unanswered: u64,
    /// Pings it sent.
    pub pings_sent: u64,
    /// Pings of its own that were answered.
    pub pings_answered: u64,
    /// Pings of its own that were not answered in time.
    pub pings_lost: u64,
    /// Peers in its orders whose address on the link it knows.
    pub resolved: u64,
    /// UDP packets to it.
    pub udp_received: u64,
    /// Bytes of their frames.
    pub udp_bytes: u64,
    /// Bulk packets it sent.
    pub blasted: u64,
    /// Frames to it, or to all, that it has no use for.
    pub other_received: u64,
    /// Frames to other stations.
    pub foreign_received: u64,
    /// Times from ping to answer in ns, since the pings were last ordered.
    pub rtt: Histogram,
}

/// A virtual machine's network stack in miniature.
#[derive(Debug)]
pub struct Host {
    mac: Mac,
    ip: Ipv4Addr,
    /// Tells its pings from those of others.
    id: u16,
    ping: Ping,
    peers: Vec<Peer>,
    blast: Option<Blast>,
    /// Made of `blast` once the peer's address is known.
    blaster: Option<Source>,
    /// Frames that wait to be sent, from `out_at` on. Taken out while they are.
    out: Option<Box<Burst>>,
    out_at: usize,
    blocked_until: Option<u64>,
    counters: HostCounters,
}

/// A station that orders name.
#[derive(Clone, Debug)]
struct Peer {
    ip: Ipv4Addr,
    mac: Option<Mac>,
    /// When to ask for its address again.
    ask_at: u64,
    /// Whether it is to be pinged at all, and how often still.
    pings_left: u64,
    sequence: u16,
    /// When the ping on its way was sent.
    sent_at: Option<u64>,
    next_at: u64,
}

impl Host {
    /// A host.
    ///
    /// # Errors
    /// [`EngineError::FrameSize`], [`EngineError::ZeroRate`]. The caller's fault.
    pub fn new(options: HostOptions) -> Result<Self, EngineError> {
        options.orders.check()?;
        let [_, _, a, b] = options.ip.octets();
        let mut host = Self {
            mac: options.mac,
            ip: options.ip,
            id: u16::from_be_bytes([a, b]),
            ping: Ping::default(),
            peers: Vec::new(),
            blast: None,
            blaster: None,
            out: Some(Box::default()),
            out_at: 0,
            blocked_until: None,
            counters: HostCounters::default(),
        };
        host.order(options.orders, 0);
        Ok(host)
    }

    /// What it has counted.
    #[must_use]
    pub fn counters(&self) -> HostCounters {
        HostCounters {
            resolved: self.peers.iter().filter(|peer| peer.mac.is_some()).count() as u64,
            ..self.counters.clone()
        }
    }

    /// Takes new orders. Addresses that are known stay known. Gives back what is needed no more.
    pub(super) fn order(&mut self, orders: HostOrders, now: u64) -> impl Send + use<> {
        let known = std::mem::take(&mut self.peers);
        let mut ping_before = None;
        if let Some(ping) = orders.ping {
            self.counters.rtt = Histogram::default();
            ping_before = Some(std::mem::replace(&mut self.ping, ping));
            for &ip in &self.ping.peers {
                let mut peer = Peer::new(ip, &known, now);
                peer.pings_left = self.ping.count.unwrap_or(u64::MAX);
                self.peers.push(peer);
            }
        }
        let blaster = self.blaster.take();
        self.blast = orders.blast;
        if let Some(blast) = orders.blast
            && !self.peers.iter().any(|peer| peer.ip == blast.peer)
        {
            self.peers.push(Peer::new(blast.peer, &known, now));
        }
        (known, ping_before, blaster)
    }

    /// Looks at what has arrived. Answers wait until the host's turn.
    #[inline]
    pub(super) fn receive(&mut self, burst: &Burst, picks: &Picks, now: u64) -> Fate {
        for i in picks.iter() {
            self.receive_one(burst, i, now);
        }
        Fate::Consumed
    }

    #[inline]
    fn receive_one(&mut self, burst: &Burst, i: usize, now: u64) {
        let (head, frame_len) = (burst.head(i), burst.frame_len(i));
        match header::destination(head) {
            Some(mac) if mac == self.mac || mac.is_group() => {}
            _ => {
                self.counters.foreign_received += 1;
                return;
            }
        }
        match frame::look_at(head, frame_len) {
            Seen::Udp => {
                self.counters.udp_received += 1;
                self.counters.udp_bytes += frame_len as u64;
            }
            Seen::ArpRequest {
                mac,
                sender,
                target,
            } if target == self.ip => {
                self.learn(sender, mac);
                let reply = frame::arp_reply(self.mac, self.ip, mac, sender);
                let queued = self.queue(|out| out.push_bytes(&reply, Offload::default()));
                self.counters.arp_answered += u64::from(queued);
            }
            Seen::ArpReply { mac, sender } => self.learn(sender, mac),
            Seen::EchoRequest { target } if target == self.ip => {
                let queued = self.queue(|out| {
                    let at = out.len();
                    out.push_copy(burst, i);
                    out.set_offload(at, Offload::default());
                    frame::answer_echo(out.head_mut(at));
                });
                self.counters.echo_answered += u64::from(queued);
            }
            Seen::EchoReply {
                sender,
                id,
                sequence,
            } if id == self.id => self.ping_answered(sender, sequence, now),
            _ => self.counters.other_received += 1,
        }
    }

    fn learn(&mut self, ip: Ipv4Addr, mac: Mac) {
        for peer in self.peers.iter_mut().filter(|peer| peer.ip == ip) {
            peer.mac = Some(mac);
        }
    }

    fn ping_answered(&mut self, from: Ipv4Addr, sequence: u16, now: u64) {
        let awaited = self
            .peers
            .iter_mut()
            .find(|peer| peer.ip == from && peer.sequence == sequence && peer.sent_at.is_some());
        match awaited.and_then(|peer| peer.sent_at.take()) {
            Some(sent_at) => {
                self.counters.pings_answered += 1;
                self.counters.rtt.record(now.saturating_sub(sent_at));
            }
            // Too late, or never asked for.
            None => self.counters.other_received += 1,
        }
    }

    /// Adds a frame to those that wait, if there is room.
    fn queue(&mut self, push: impl FnOnce(&mut Burst)) -> bool {
        match &mut self.out {
            Some(out) if out.room() > 0 => {
                push(out);
                true
            }
            _ => {
                self.counters.unanswered += 1;
                false
            }
        }
    }

    fn has_room(&self) -> bool {
        self.out.as_ref().is_some_and(|out| out.room() > 0)
    }

    /// Adds what is due by now to the frames that wait.
    pub(crate) fn prepare(&mut self, now: u64) {
        for at in 0..self.peers.len() {
            if !self.has_room() {
                return;
            }
            if let Some(frame) = self.due_frame(at, now) {
                self.queue(|out| out.push_bytes(&frame, Offload::default()));
            }
        }
    }

    /// What peer number `at` is to be sent now: a question for its address, or a ping.
    fn due_frame(&mut self, at: usize, now: u64) -> Option<Vec<u8>> {
        let timeout = nanos(self.ping.timeout);
        let interval = nanos(self.ping.interval);
        let peer = self.peers.get_mut(at)?;
        let Some(mac) = peer.mac else {
            if now < peer.ask_at {
                return None;
            }
            peer.ask_at = now.saturating_add(ARP_RETRY_NS);
            return Some(frame::arp_request(self.mac, self.ip, peer.ip));
        };
        if let Some(sent_at) = peer.sent_at {
            if now < sent_at.saturating_add(timeout) {
                return None;
            }
            peer.sent_at = None;
            self.counters.pings_lost += 1;
        }
        if peer.pings_left == 0 || now < peer.next_at {
            return None;
        }
        if peer.pings_left != u64::MAX {
            peer.pings_left -= 1;
        }
        peer.sequence = peer.sequence.wrapping_add(1);
        peer.sent_at = Some(now);
        peer.next_at = now.saturating_add(interval);
        self.counters.pings_sent += 1;
        Some(frame::echo_request(&Echo {
            source: self.mac,
            destination: mac,
            source_ip: self.ip,
            destination_ip: peer.ip,
            id: self.id,
            sequence: peer.sequence,
        }))
    }

    /// The frames that wait, and which of them comes first. They come back with [`sent`](Self::sent).
    #[inline]
    pub(crate) fn offer(&mut self) -> Option<(Box<Burst>, usize)> {
        let out = self.out.take_if(|out| !out.is_empty())?;
        Some((out, self.out_at))
    }

    /// The frames before `out_at` are sent.
    pub(crate) fn sent(&mut self, mut out: Box<Burst>, out_at: usize, now: u64) {
        self.out_at = out_at;
        self.blocked_until = None;
        if out_at == out.len() {
            out.clear();
            self.out_at = 0;
        } else {
            self.blocked_until = Some(now.saturating_add(RETRY_NS));
        }
        self.out = Some(out);
    }

    /// The source of its bulk packets, once it knows where to send them.
    #[inline]
    pub(crate) fn blaster(&mut self) -> Option<&mut Source> {
        if self.blaster.is_none() {
            self.blaster = self.make_blaster();
        }
        self.blaster.as_mut()
    }

    fn make_blaster(&self) -> Option<Source> {
        let blast = self.blast?;
        let peer = self.peers.iter().find(|peer| peer.ip == blast.peer)?;
        let frame = frame::udp(&Udp {
            source: self.mac,
            destination: peer.mac?,
            source_ip: self.ip,
            destination_ip: peer.ip,
            frame_len: blast.frame_len,
        });
        // The orders were checked when they were given.
        Source::of_frame(&frame, blast.orders).ok()
    }

    /// `n` bulk packets have left.
    #[inline]
    pub(crate) fn blasted(&mut self, n: usize) {
        self.counters.blasted += n as u64;
    }

    /// When it has something to do again if nothing arrives.
    pub(super) fn due(&self) -> Option<u64> {
        let waiting = self.out.as_ref().is_some_and(|out| !out.is_empty());
        let out = waiting.then(|| self.blocked_until.unwrap_or(0));
        let blast = self.blaster.as_ref().and_then(Source::due);
        let peers = self
            .peers
            .iter()
            .filter_map(|peer| peer.due(nanos(self.ping.timeout)));
        peers.chain(out).chain(blast).min()
    }
}

impl Peer {
    fn new(ip: Ipv4Addr, known: &[Self], now: u64) -> Self {
        let before = known.iter().find(|peer| peer.ip == ip);
        Self {
            ip,
            mac: before.and_then(|peer| peer.mac),
            ask_at: now,
            pings_left: 0,
            // An answer to an earlier ping is not taken for one to the next.
            sequence: before.map_or(0, |peer| peer.sequence),
            sent_at: None,
            next_at: now,
        }
    }

    fn due(&self, timeout: u64) -> Option<u64> {
        if self.mac.is_none() {
            return Some(self.ask_at);
        }
        match self.sent_at {
            Some(sent_at) => Some(sent_at.saturating_add(timeout)),
            None => (self.pings_left > 0).then_some(self.next_at),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    fn host(n: u8, orders: HostOrders) -> Host {
        Host::new(HostOptions {
            mac: mac(n),
            ip: ip(n),
            orders,
        })
        .unwrap()
    }

    fn mac(n: u8) -> Mac {
        Mac([2, 0, 0, 0, 0, n])
    }

    fn ip(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, n)
    }

    fn pinging(peer: u8) -> HostOrders {
        HostOrders {
            ping: Some(Ping {
                peers: vec![ip(peer)],
                ..Ping::default()
            }),
            blast: None,
        }
    }

    /// Lets `from` send what is due and gives it to `to`; how many frames.
    fn pass(from: &mut Host, to: &mut Host, now: u64) -> usize {
        from.prepare(now);
        let Some((out, at)) = from.offer() else {
            return 0;
        };
        let n = out.len();
        to.receive(&out, &Picks::first(n).skip(at), now);
        from.sent(out, n, now);
        n - at
    }

    #[test]
    fn a_peer_is_resolved_and_pinged_and_the_time_is_noted() {
        let (mut a, mut b) = (host(1, pinging(2)), host(2, HostOrders::default()));
        let mut now = 0;
        for _ in 0..8 {
            pass(&mut a, &mut b, now);
            now += MILLISECOND;
            pass(&mut b, &mut a, now);
            now += MILLISECOND;
        }
        let counters = a.counters();
        assert_eq!((counters.pings_sent, counters.pings_answered), (7, 7));
        assert_eq!(counters.rtt.summary().min, MILLISECOND);
        assert_eq!(b.counters().arp_answered, 1);
        assert_eq!(b.counters().echo_answered, 7);
    }

    #[test]
    fn a_ping_without_an_answer_is_lost_and_the_next_one_sent() {
        let (mut a, mut b) = (host(1, pinging(2)), host(2, HostOrders::default()));
        let mut nobody = host(3, HostOrders::default());
        pass(&mut a, &mut b, 0);
        pass(&mut b, &mut a, 0);
        assert_eq!(pass(&mut a, &mut nobody, 0), 1);
        assert_eq!(a.due(), Some(1_000 * MILLISECOND));
        assert_eq!(pass(&mut a, &mut nobody, 999 * MILLISECOND), 0);
        assert_eq!(pass(&mut a, &mut nobody, 1_000 * MILLISECOND), 1);
        assert_eq!(a.counters().pings_lost, 1);
        assert_eq!(nobody.counters().foreign_received, 2);
    }

    #[test]
    fn an_unknown_address_is_asked_for_again() {
        let (mut a, mut nobody) = (host(1, pinging(9)), host(2, HostOrders::default()));
        assert_eq!(pass(&mut a, &mut nobody, 0), 1);
        assert_eq!(a.due(), Some(ARP_RETRY_NS));
        assert_eq!(pass(&mut a, &mut nobody, 1), 0);
        assert_eq!(pass(&mut a, &mut nobody, ARP_RETRY_NS), 1);
        assert_eq!(nobody.counters().other_received, 2);
    }

    #[test]
    fn bulk_starts_when_the_address_is_known() {
        let blast = Blast {
            peer: ip(2),
            frame_len: 1_000,
            orders: SourceOrders::default(),
        };
        let orders = HostOrders {
            ping: None,
            blast: Some(blast),
        };
        let (mut a, mut b) = (host(1, orders), host(2, HostOrders::default()));
        assert!(a.blaster().is_none());
        pass(&mut a, &mut b, 0);
        pass(&mut b, &mut a, 0);
        let (bulk, picks) = a.blaster().unwrap().offer(0).unwrap();
        b.receive(&bulk, &picks, 0);
        assert_eq!(b.counters().udp_received, 64);
        assert_eq!(b.counters().udp_bytes, 64_000);
    }

    #[test]
    fn new_orders_keep_the_addresses_and_start_the_times_anew() {
        let (mut a, mut b) = (host(1, pinging(2)), host(2, HostOrders::default()));
        for now in 0..4 {
            pass(&mut a, &mut b, now);
            pass(&mut b, &mut a, now);
        }
        assert!(a.counters().rtt.count() > 0);
        a.order(pinging(2), 5);
        assert_eq!(a.counters().rtt.count(), 0);
        assert_eq!(a.counters().resolved, 1);
        a.order(HostOrders::default(), 6);
        assert_eq!(a.due(), None);
    }

    #[test]
    fn more_requests_than_answers_have_room_are_counted() {
        let mut a = host(1, HostOrders::default());
        let mut burst = Burst::new();
        for _ in 0..64 {
            let request = frame::arp_request(mac(2), ip(2), ip(1));
            burst.push_bytes(&request, Offload::default());
        }
        a.receive(&burst, &Picks::first(64), 0);
        a.receive(&burst, &Picks::first(3), 0);
        assert_eq!(a.counters().arp_answered, 64);
        assert_eq!(a.counters().unanswered, 3);
    }
}
