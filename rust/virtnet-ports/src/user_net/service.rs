//! The thread's half of a user-mode network: what the guests' packets meet.

mod conversations;
mod streams;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use smoltcp::wire::{EthernetProtocol, IpProtocol};
use virtnet_packet::{Backlog, Burst, MemoryPort, Offload, Picks, Port};
use virtnet_sys::{Events, Poller};

use super::datagrams::{Carried, Conversations};
use super::dhcp::Dhcp;
use super::dns::{self, Verdict};
use super::frame::{
    BROADCAST, Inbound, IpIn, Mac, Unreachable, ethernet, ethertype_of, fragments, icmpv4_checksum,
    icmpv6_checksum, ip_packet, parse, udp_packet, unreachable,
};
use super::neighbours::Neighbours;
use super::options::{Transport, UserNetOptions};
use super::policy::DNS_PORT;
use super::status::{Lost, UserNetStatus};
use super::tcp::{Stack, TcpFlow};
use crate::{PortError, Service};

/// Bursts and events that are dealt with before everything else has its turn.
const BURSTS: usize = 4;
const EVENTS: usize = 64;
/// Packets that one socket may bring in a turn, and connections that one port accepts.
const PER_SOCKET: usize = 32;

/// How long to wait for room in the port, which nobody tells of.
const NO_ROOM_NS: u64 = 1_000_000;
const NO_ROOM_MAX_NS: u64 = 100_000_000;
/// How often routers say that they are there, and conversations are looked at.
const ADVERT_NS: u64 = 200_000_000_000;
const SWEEP_NS: u64 = 1_000_000_000;

/// Tokens: the bell, then the forwarded ports, then flows.
const BELL: u64 = 0;

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// Ports of the gateway that inward connections come from.
const FIRST_PORT: u16 = 32_768;

/// What other threads may look at.
pub(super) type Shared = Arc<Mutex<UserNetStatus>>;

/// The gateway of a user-mode network.
pub(super) struct UserNetService {
    options: UserNetOptions,
    mac: Mac,
    resolver: Option<SocketAddr>,
    port: MemoryPort,
    /// What the worker has not taken of what was sent.
    backlog: Backlog,
    burst: Burst,
    poller: Poller,
    events: Events,
    outbox: Outbox,
    neighbours: Neighbours,
    dhcp: Dhcp,
    stack: Stack,
    tcp: HashMap<u64, TcpFlow>,
    tcp_by_ends: HashMap<(SocketAddr, SocketAddr), u64>,
    /// Connections that something has happened to in this turn.
    touched: Vec<u64>,
    /// When connections want to be looked at.
    due: BTreeSet<(u64, u64)>,
    due_of: HashMap<u64, u64>,
    datagrams: Conversations,
    tcp_forwards: Vec<Option<TcpListener>>,
    udp_forwards: Vec<Option<UdpSocket>>,
    next_token: u64,
    next_port: u16,
    next_ident: u16,
    buffer: Box<[u8]>,
    next_advert_ns: u64,
    next_sweep_ns: u64,
    /// More waits than one turn takes.
    again: bool,
    /// How long to wait for room in the port: longer and longer.
    pause_ns: u64,
    /// Ports whose connections cannot be accepted now, as there are no descriptors.
    resting: Vec<usize>,
    leases_changed: bool,
    status: UserNetStatus,
    shared: Shared,
}

/// Frames for guests.
#[derive(Default)]
struct Outbox {
    frames: VecDeque<Vec<u8>>,
    room: usize,
}

impl UserNetService {
    /// A gateway at one end of a pair of memory ports; `backlog` is that of the other.
    pub(super) fn new(
        options: UserNetOptions,
        port: MemoryPort,
        backlog: Backlog,
        shared: Shared,
        now_ns: u64,
    ) -> Result<Self, PortError> {
        let failed = |source| PortError::io("wait for the sockets of a user-mode network", source);
        let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let mut service = Self {
            mac: options.gateway_mac(),
            resolver: options.resolver.or_else(|| dns::resolver_of(&host)),
            port,
            backlog,
            burst: Burst::new(),
            poller: Poller::new().map_err(failed)?,
            events: Events::with_capacity(EVENTS),
            outbox: Outbox::default(),
            neighbours: Neighbours::new(&options),
            dhcp: Dhcp::new(&options),
            // Seeded by the system: whoever could guess sequence numbers could speak for others.
            stack: Stack::new(&options, RandomState::new().hash_one(now_ns)),
            tcp: HashMap::new(),
            tcp_by_ends: HashMap::new(),
            touched: Vec::new(),
            due: BTreeSet::new(),
            due_of: HashMap::new(),
            datagrams: Conversations::default(),
            tcp_forwards: Vec::new(),
            udp_forwards: Vec::new(),
            next_token: 1,
            next_port: FIRST_PORT,
            next_ident: 1,
            buffer: vec![0; 65_536].into(),
            next_advert_ns: now_ns,
            next_sweep_ns: now_ns + SWEEP_NS,
            again: false,
            pause_ns: NO_ROOM_NS,
            resting: Vec::new(),
            leases_changed: true,
            status: UserNetStatus::default(),
            shared,
            options,
        };
        service.listen()?;
        let _ = service.port.arm();
        let bell = service
            .port
            .wait_fd()
            .ok_or_else(|| failed(ErrorKind::OutOfMemory.into()))?;
        service.poller.add(bell, BELL).map_err(failed)?;
        service.publish();
        Ok(service)
    }

    /// Opens the ports of the host that are forwarded.
    fn listen(&mut self) -> Result<(), PortError> {
        for forward in &self.options.forward {
            let failed = |source| PortError::io(format!("listen at {}", forward.host), source);
            let (mut tcp, mut udp) = (None, None);
            match forward.transport {
                Transport::Tcp => {
                    let listener = TcpListener::bind(forward.host).map_err(failed)?;
                    listener.set_nonblocking(true).map_err(failed)?;
                    self.poller
                        .add(&listener, self.next_token)
                        .map_err(failed)?;
                    tcp = Some(listener);
                }
                Transport::Udp => {
                    let socket = UdpSocket::bind(forward.host).map_err(failed)?;
                    socket.set_nonblocking(true).map_err(failed)?;
                    self.poller.add(&socket, self.next_token).map_err(failed)?;
                    udp = Some(socket);
                }
            }
            self.tcp_forwards.push(tcp);
            self.udp_forwards.push(udp);
            self.next_token += 1;
        }
        Ok(())
    }

    /// Where the ports really are that are forwarded.
    pub(super) fn listening(&self) -> Vec<Option<SocketAddr>> {
        let tcp = |listener: &TcpListener| listener.local_addr().ok();
        let udp = |socket: &UdpSocket| socket.local_addr().ok();
        let both = self.tcp_forwards.iter().zip(&self.udp_forwards);
        both.map(|(a, b)| {
            a.as_ref()
                .and_then(tcp)
                .or_else(|| b.as_ref().and_then(udp))
        })
        .collect()
    }

    /// Everything that can be done now, a bounded part of it.
    fn turn(&mut self, now_ns: u64) {
        self.again = false;
        self.port.disarm();
        self.outbox.room = self.backlog.room();
        self.pause_ns = if self.outbox.room > 0 {
            NO_ROOM_NS
        } else {
            (self.pause_ns * 2).min(NO_ROOM_MAX_NS)
        };
        self.serve_sockets(now_ns);
        self.take_frames(now_ns);
        while let Some(&(at, token)) = self.due.first()
            && at <= now_ns
        {
            self.due.pop_first();
            self.due_of.remove(&token);
            self.touch(token);
        }
        for token in std::mem::take(&mut self.touched) {
            self.pump(token, now_ns);
        }
        if self.next_sweep_ns <= now_ns {
            self.sweep(now_ns);
        }
        if self.next_advert_ns <= now_ns {
            self.next_advert_ns = now_ns + ADVERT_NS;
            let advert = self.neighbours.router_advert();
            self.send_frame(advert);
        }
        self.flush();
        self.again |= self.port.arm();
        self.publish();
    }

    fn serve_sockets(&mut self, now_ns: u64) {
        // The set is a valid one; without events there is nothing to do.
        let n = self
            .poller
            .wait(&mut self.events, Some(Duration::ZERO))
            .unwrap_or(0);
        self.again |= n == EVENTS;
        for at in 0..n {
            let token = self.events.token(at);
            let forward = usize::try_from(token).unwrap_or(usize::MAX).wrapping_sub(1);
            if token == BELL {
            } else if forward < self.tcp_forwards.len() {
                self.accept(forward, now_ns);
                self.hear_forwarded(forward, now_ns);
            } else if self.tcp.contains_key(&token) {
                self.touch(token);
            } else {
                self.hear(token, now_ns);
            }
        }
    }

    fn take_frames(&mut self, now_ns: u64) {
        let mut bytes = Vec::new();
        for _ in 0..BURSTS {
            let mut burst = std::mem::take(&mut self.burst);
            burst.clear();
            let n = self.port.rx(&mut burst);
            for i in 0..n {
                bytes.resize(burst.frame_len(i), 0);
                burst.copy_frame(i, &mut bytes);
                if let Err(lost) = self.take(&bytes, burst.offload(i), now_ns) {
                    self.lose(lost);
                }
            }
            self.port.complete();
            self.burst = burst;
            if n == 0 {
                return;
            }
        }
        self.again = true;
    }

    /// One frame of a guest's.
    fn take(&mut self, frame: &[u8], offload: Offload, now_ns: u64) -> Result<(), Lost> {
        match parse(frame, self.mac, offload)? {
            Inbound::Arp {
                request,
                mac,
                ip,
                target,
            } => {
                if self.neighbours.is_ours(ip.into()) {
                    return Err(Lost::ForeignSource);
                }
                if self.options.contains(ip.into()) {
                    self.learn(ip.into(), mac, now_ns);
                }
                let answer = if request {
                    self.neighbours.answer_arp(mac, ip, target)
                } else {
                    None
                };
                self.answer_frame(answer);
                Ok(())
            }
            Inbound::Ip(packet) => self.take_ip(&packet, now_ns),
        }
    }

    fn take_ip(&mut self, packet: &IpIn<'_>, now_ns: u64) -> Result<(), Lost> {
        if packet.protocol == IpProtocol::Udp
            && packet.ends().1.port() == DHCP_SERVER
            && packet.src.is_ipv4()
        {
            return self.take_dhcp(packet, now_ns);
        }
        if self.neighbours.is_ours(packet.src) {
            return Err(Lost::ForeignSource);
        }
        let link_local = matches!(packet.src, IpAddr::V6(ip) if ip.is_unspecified() || ip.is_unicast_link_local());
        if packet.protocol == IpProtocol::Icmpv6
            && (link_local || self.options.contains(packet.src))
        {
            if !packet.src.is_unspecified() {
                self.learn(packet.src, packet.mac, now_ns);
            }
            if packet
                .payload
                .first()
                .is_some_and(|kind| (130..=137).contains(kind) || *kind == 143)
            {
                let answer = self.neighbours.answer_icmpv6(packet);
                self.answer_frame(answer);
                return Ok(());
            }
        }
        let here = link_local && self.neighbours.is_ours(packet.dst);
        if !here && !self.options.contains(packet.src) {
            return Err(Lost::ForeignSource);
        }
        self.learn(packet.src, packet.mac, now_ns);
        let group = packet.dst.is_multicast()
            || packet.dst == IpAddr::from([255; 4])
            || packet.dst == IpAddr::V4(self.options.broadcast());
        if group {
            return Err(Lost::NotForUs);
        }
        match packet.protocol {
            IpProtocol::Tcp => self.take_tcp(packet, now_ns),
            IpProtocol::Udp => self.take_udp(packet, now_ns),
            IpProtocol::Icmp | IpProtocol::Icmpv6 => self.take_echo(packet, now_ns),
            _ => Err(Lost::Unsupported),
        }
    }

    fn take_dhcp(&mut self, packet: &IpIn<'_>, now_ns: u64) -> Result<(), Lost> {
        let gateway = self.options.gateway;
        let everybody = [
            IpAddr::from([255; 4]),
            self.options.broadcast().into(),
            gateway.into(),
        ];
        if !everybody.contains(&packet.dst) {
            return Err(Lost::NotForUs);
        }
        let message = packet.payload.get(8..).ok_or(Lost::Malformed)?;
        self.leases_changed = true;
        let Some(answer) = self.dhcp.answer(message, now_ns)? else {
            return Ok(());
        };
        let to_mac = if answer.to.is_broadcast() {
            BROADCAST
        } else {
            answer.mac
        };
        let (from, to) = (
            SocketAddr::new(gateway.into(), DHCP_SERVER),
            SocketAddr::new(answer.to.into(), DHCP_CLIENT),
        );
        let reply = udp_packet(from, to, &answer.message).ok_or(Lost::Malformed)?;
        self.status.answered += 1;
        self.send_packet(reply, to_mac);
        Ok(())
    }

    fn take_udp(&mut self, packet: &IpIn<'_>, now_ns: u64) -> Result<(), Lost> {
        let (guest, remote) = packet.ends();
        let data = packet.payload.get(8..).ok_or(Lost::Malformed)?;
        // The header's own length, which may be less. It was checked.
        let len = usize::from(u16::from_be_bytes([packet.payload[4], packet.payload[5]]))
            .saturating_sub(8);
        let data = data.get(..len).ok_or(Lost::Malformed)?;
        if remote.port() == DNS_PORT && self.neighbours.is_ours(remote.ip()) {
            let closed = !self.options.outside || self.resolver.is_none();
            if let Verdict::Answer(bytes) = dns::answer(data, closed, |name| self.known(name))? {
                let reply = udp_packet(remote, guest, &bytes).ok_or(Lost::Malformed)?;
                self.status.answered += 1;
                self.send_packet(reply, packet.mac);
                return Ok(());
            }
        }
        self.carry(Carried::Udp, (guest, remote), data, packet, now_ns)
    }

    fn take_echo(&mut self, packet: &IpIn<'_>, now_ns: u64) -> Result<(), Lost> {
        let (request, reply) = if packet.src.is_ipv4() {
            (8, 0)
        } else {
            (128, 129)
        };
        let [kind, 0, _, _, high, low, ..] = *packet.payload else {
            return Err(Lost::Unsupported);
        };
        if kind != request || packet.payload.len() < 8 {
            return Err(Lost::Unsupported);
        }
        if self.neighbours.is_ours(packet.dst) {
            let mut message = packet.payload.to_vec();
            message[0] = reply;
            match (packet.dst, packet.src) {
                (IpAddr::V6(src), IpAddr::V6(dst)) => icmpv6_checksum(&mut message, src, dst),
                _ => icmpv4_checksum(&mut message),
            }
            let answer = ip_packet(packet.dst, packet.src, packet.protocol, &message)
                .ok_or(Lost::Malformed)?;
            self.status.answered += 1;
            self.send_packet(answer, packet.mac);
            return Ok(());
        }
        let ends = (
            SocketAddr::new(packet.src, u16::from_be_bytes([high, low])),
            SocketAddr::new(packet.dst, 0),
        );
        self.carry(Carried::Ping, ends, packet.payload, packet, now_ns)
    }

    /// The addresses of a name that is known here.
    fn known(&self, name: &str) -> Option<Vec<IpAddr>> {
        let options = &self.options;
        let named: Vec<IpAddr> = options
            .names
            .iter()
            .filter(|(own, _)| own.eq_ignore_ascii_case(name))
            .map(|(_, ip)| *ip)
            .collect();
        if !named.is_empty() {
            return Some(named);
        }
        let short = match &options.domain {
            Some(domain) => name
                .strip_suffix(domain.as_str())
                .and_then(|rest| rest.strip_suffix('.'))
                .unwrap_or(name),
            None => name,
        };
        if short == "gateway" {
            let both = [
                Some(options.gateway.into()),
                options.gateway6().map(IpAddr::V6),
            ];
            return Some(both.into_iter().flatten().collect());
        }
        self.dhcp.by_name(short).map(|ip| vec![ip.into()])
    }

    fn learn(&mut self, ip: IpAddr, mac: Mac, now_ns: u64) {
        for frame in self.neighbours.learn(ip, mac, now_ns) {
            self.send_frame(Some(frame));
        }
    }

    fn tell_unreachable(&mut self, why: Unreachable, packet: &IpIn<'_>) {
        // Nobody is told of what an error said. Spec: RFC 1122, 3.2.2.
        let own = if packet.src.is_ipv4() {
            Some(self.options.gateway.into())
        } else {
            self.options.gateway6().map(IpAddr::V6)
        };
        let told = own.and_then(|own| unreachable(why, packet.packet, own, packet.src));
        if let Some(told) = told {
            self.send_packet(told, packet.mac);
        }
    }

    fn send_to(&mut self, packets: Vec<Vec<u8>>, mac: Mac) {
        for packet in packets {
            self.send_packet(packet, mac);
        }
    }

    /// Sends a packet to a guest, whose place has to be found if `mac` does not say it.
    fn send_ip(&mut self, packet: Vec<u8>, guest: IpAddr, mac: Option<Mac>) {
        match mac.or_else(|| self.neighbours.find(guest)) {
            Some(mac) => self.send_packet(packet, mac),
            None => {
                let asks = self.neighbours.wait_for(guest, packet);
                self.send_frame(asks);
            }
        }
    }

    fn send_packet(&mut self, packet: Vec<u8>, mac: Mac) {
        let ethertype: EthernetProtocol = ethertype_of(&packet);
        self.next_ident = self.next_ident.wrapping_add(1);
        let pieces = fragments(packet, usize::from(self.options.mtu), self.next_ident);
        if pieces.is_empty() {
            self.lose(Lost::TooBig);
        }
        for piece in pieces {
            self.send_frame(Some(ethernet(mac, self.mac, ethertype, &piece)));
        }
    }

    fn answer_frame(&mut self, frame: Option<Vec<u8>>) {
        self.status.answered += u64::from(frame.is_some());
        self.send_frame(frame);
    }

    fn send_frame(&mut self, frame: Option<Vec<u8>>) {
        let Some(frame) = frame else {
            return;
        };
        if self.outbox.left() == 0 {
            self.lose(Lost::NoRoom);
        } else {
            self.outbox.frames.push_back(frame);
        }
    }

    /// Hands the worker what was sent.
    fn flush(&mut self) {
        while !self.outbox.frames.is_empty() {
            self.burst.clear();
            while self.burst.room() > 0
                && let Some(frame) = self.outbox.frames.pop_front()
            {
                self.burst.push_bytes(&frame, Offload::default());
            }
            let n = self.burst.len();
            let accepted = self.port.tx(&self.burst, &Picks::first(n));
            for _ in accepted..n {
                self.lose(Lost::NoRoom);
            }
        }
        self.port.flush();
    }

    fn lose(&mut self, why: Lost) {
        self.status.lost[why as usize] += 1;
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token - 1
    }

    fn publish(&mut self) {
        self.status.tcp_flows = self.tcp.len();
        self.status.udp_flows = self.datagrams.count(Carried::Udp);
        self.status.ping_flows = self.datagrams.count(Carried::Ping);
        if std::mem::take(&mut self.leases_changed) {
            self.status.leases = self.dhcp.status();
        }
        self.shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&self.status);
    }
}

impl Outbox {
    fn left(&self) -> usize {
        self.room.saturating_sub(self.frames.len())
    }
}

fn seconds(n: u32) -> u64 {
    u64::from(n) * 1_000_000_000
}

impl Service for UserNetService {
    fn source(&self) -> Option<BorrowedFd<'_>> {
        // Without room whatever waits in sockets would be told of again and again.
        (self.outbox.room > 0).then(|| self.poller.as_fd())
    }

    fn on_ready(&mut self, now_ns: u64) -> Result<(), PortError> {
        self.turn(now_ns);
        Ok(())
    }

    fn deadline_ns(&self) -> Option<u64> {
        if self.outbox.room == 0 {
            return Some(virtnet_sys::monotonic_ns() + self.pause_ns);
        }
        if self.again {
            return Some(0);
        }
        let due = self.due.first().map_or(u64::MAX, |&(at, _)| at);
        let advert = if self.options.network6.is_some() {
            self.next_advert_ns
        } else {
            u64::MAX
        };
        let sweep = if self.datagrams.is_empty() && self.resting.is_empty() {
            u64::MAX
        } else {
            self.next_sweep_ns
        };
        let first = due.min(advert).min(sweep);
        (first < u64::MAX).then_some(first)
    }

    fn on_timer(&mut self, now_ns: u64) -> Result<(), PortError> {
        self.turn(now_ns);
        Ok(())
    }
}
