//! A VXLAN as a port: frames travel inside UDP datagrams to other hosts, whose addresses are given beforehand.
//!
//! In front of each frame are eight bytes: a flag that says they mean something, and the number of the virtual network (VNI).
//! What is for everybody or for nobody known goes to every remote, a copy each; with learning, what is for a station that was
//! heard of goes to its remote only. The source port is chosen by the flow of the frame inside, so that routers spread flows and
//! keep the order of each. Datagrams are never cut into fragments: one that is longer than its way allows is dropped and counted.
//! Spec: RFC 7348, 4 and 5
//!
//! It guarantees that nothing is received from somebody who is no remote (unless asked for), or of another network, and that what
//! anybody sends fills no table beyond its bound.
//!
//! In a packet's way this is a first and a last step with one copy by the kernel and one by us on each side. Nothing is left to be
//! done by the other end: frames leave with their checksums, no longer than a datagram.

mod stations;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, PortCounters, flow_hash};
use virtnet_sys::{
    DATAGRAM_BATCH, DatagramBatch, DatagramSocket, Destination, Endpoint, Events, Poller,
    is_nobody, monotonic_ns,
};

use crate::{EventLog, PortError, What};
use stations::Stations;

/// The port that VXLAN has. Source: RFC 7348, 5, and IANA's registry of service names
pub const VXLAN_PORT: u16 = 4789;

/// The most remotes of a port: each gets a copy of what is flooded.
pub const VXLAN_REMOTES_MAX: usize = 64;

/// The most sockets to send from.
pub const VXLAN_SOURCE_PORTS_MAX: usize = 64;

/// Bytes in front of a frame.
const HEADER_LEN: usize = 8;

/// The flag that says that there is a network's number. Spec: RFC 7348, 5, I flag
const HAS_VNI: u8 = 0x08;

/// The longest frame: what fits into a UDP datagram over IPv4.
const FRAME_MAX: usize = 65_535 - 20 - 8 - HEADER_LEN;

/// Bytes that the kernel is asked to keep for us until we take them.
const SOCKET_BUFFER: usize = 4 << 20;

/// What the kernel answers to a datagram longer than its way allows.
const EMSGSIZE: i32 = 90;
const ENOBUFS: i32 = 105;

/// What a VXLAN port is to be.
#[derive(Clone, Debug)]
pub struct VxlanOptions {
    /// Where datagrams are received and sent from: an address of this host, or the unspecified one.
    pub local: SocketAddr,
    /// The virtual network's number, below 2^24.
    pub vni: u32,
    /// The other hosts, of the same version of IP.
    pub remotes: Vec<SocketAddr>,
    /// Send to stations that were heard of where they were heard of only.
    pub learn: bool,
    /// Forget those that were not heard of for so long.
    pub ageing: Duration,
    /// Receive from anybody who knows the number.
    pub anyone: bool,
    /// How many source ports to use, by flow; 0 for the local port itself.
    pub source_ports: usize,
}

impl VxlanOptions {
    /// The usual options.
    #[must_use]
    pub fn new(local: SocketAddr, vni: u32, remotes: Vec<SocketAddr>) -> Self {
        Self {
            local,
            vni,
            remotes,
            learn: true,
            ageing: Duration::from_secs(300),
            anyone: false,
            source_ports: 16,
        }
    }

    fn check(&self) -> Result<(), PortError> {
        let wrong = |option, found: String, expected: &str| {
            Err(PortError::Option {
                option,
                found,
                expected: expected.to_owned(),
            })
        };
        if self.vni >= 1 << 24 {
            let expected = "a number from 0 to 16777215";
            return wrong("vni", self.vni.to_string(), expected);
        }
        let n = self.remotes.len();
        if n > VXLAN_REMOTES_MAX || n == 0 && !(self.anyone && self.learn) {
            let expected = "1 to 64 of them (none only with learn and anyone)";
            return wrong("remotes", format!("{n} addresses"), expected);
        }
        if let Some(odd) = (self.remotes.iter()).find(|to| to.is_ipv4() != self.local.is_ipv4()) {
            let expected = "addresses of the same version of IP as the local one";
            return wrong("remotes", odd.to_string(), expected);
        }
        if self.source_ports > VXLAN_SOURCE_PORTS_MAX {
            return wrong("source_ports", self.source_ports.to_string(), "0 to 64");
        }
        Ok(())
    }
}

/// A VXLAN as a port.
#[derive(Debug)]
pub struct VxlanPort {
    socket: DatagramSocket,
    /// To send from, by flow; if there are none, it is `socket`.
    senders: Vec<DatagramSocket>,
    vni: [u8; 3],
    remotes: Vec<(SocketAddr, Destination)>,
    /// Where to send what is for a station of a sender that is no remote.
    usual_port: u16,
    anyone: bool,
    stations: Option<Stations>,
    poller: Poller,
    events: Events,
    received: DatagramBatch,
    to_send: DatagramBatch,
    /// Of each frame in `to_send`: the socket it leaves by, and the station's remote; all of them if none.
    plans: Vec<(usize, Option<Destination>)>,
    shared: Arc<Shared>,
    counters: PortCounters,
}

/// What is of interest elsewhere.
#[derive(Debug, Default)]
struct Shared {
    copies: AtomicU64,
    copies_lost: AtomicU64,
    stations: AtomicU64,
    events: EventLog,
}

/// Asks a VXLAN port what it does, wherever the port is.
#[derive(Clone, Debug)]
pub struct VxlanWatch(Arc<Shared>);

impl VxlanWatch {
    /// What has happened.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.0.events
    }

    /// What there is to count beside packets, by name: datagrams sent, those that could not be sent though others of their packet
    /// were, and stations that are known now.
    #[must_use]
    pub fn detail(&self) -> [(&'static str, u64); 3] {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        [
            ("copies", read(&self.0.copies)),
            ("copies_lost", read(&self.0.copies_lost)),
            ("stations", read(&self.0.stations)),
        ]
    }
}

/// How a frame of a batch has fared.
#[derive(Clone, Copy, Debug, Default)]
struct Fared {
    sent: bool,
    lost: u64,
    why: Option<DropReason>,
}

impl VxlanPort {
    /// Opens the port.
    ///
    /// # Errors
    /// [`PortError::Option`]; [`PortError::System`]: the address is not of this host, or another socket has the port.
    pub fn open(options: &VxlanOptions) -> Result<Self, PortError> {
        options.check()?;
        let failed = |source| PortError::io("set up a socket for VXLAN", source);
        let bind = |at: SocketAddr| -> Result<DatagramSocket, PortError> {
            let socket = DatagramSocket::bind(&Endpoint::Inet(at))?;
            socket.widen(SOCKET_BUFFER);
            socket.never_fragment().map_err(failed)?;
            Ok(socket)
        };
        let socket = bind(options.local)?;
        if options.local.is_ipv6() {
            socket.take_without_checksum().map_err(failed)?;
        }
        let senders = (0..options.source_ports).map(|_| {
            let mut from = options.local;
            from.set_port(0);
            let sender = bind(from)?;
            sender.only_send().map_err(failed)?;
            Ok::<_, PortError>(sender)
        });
        let senders = senders.collect::<Result<_, _>>()?;
        let failed = |source| PortError::io("wait for a socket", source);
        let poller = Poller::new().map_err(failed)?;
        poller.add(&socket, 0).map_err(failed)?;
        let [_, vni @ ..] = options.vni.to_be_bytes();
        Ok(Self {
            socket,
            senders,
            vni,
            remotes: options.remotes.iter().map(|&to| (to, to.into())).collect(),
            usual_port: options.local.port(),
            anyone: options.anyone,
            // With one remote there is nothing to choose.
            stations: (options.learn && (options.remotes.len() > 1 || options.anyone))
                .then(|| Stations::new(options.ageing)),
            poller,
            events: Events::with_capacity(1),
            received: DatagramBatch::default(),
            to_send: DatagramBatch::default(),
            plans: Vec::with_capacity(DATAGRAM_BATCH),
            shared: Arc::default(),
            counters: PortCounters::default(),
        })
    }

    /// Asks what the port does, wherever it is.
    #[must_use]
    pub fn watch(&self) -> VxlanWatch {
        VxlanWatch(Arc::clone(&self.shared))
    }

    /// Where datagrams are received.
    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        self.socket.local()
    }

    /// Where to send what is for stations behind `sender`; `None` if nothing is to be received from there.
    fn way_back(&self, sender: SocketAddr) -> Option<SocketAddr> {
        let is_it = |(remote, _): &&(SocketAddr, Destination)| remote.ip() == sender.ip();
        match self.remotes.iter().find(is_it) {
            Some((remote, _)) => Some(*remote),
            None if self.anyone => {
                let mut there = sender;
                there.set_port(self.usual_port);
                Some(there)
            }
            None => None,
        }
    }

    /// The frame in a datagram, and where its sender is to be reached.
    fn opened<'d>(
        &self,
        datagram: &'d [u8],
        from: Option<SocketAddr>,
    ) -> Result<(&'d [u8], SocketAddr), DropReason> {
        let way_back = from.and_then(|from| self.way_back(from));
        let way_back = way_back.ok_or(DropReason::UnknownSender)?;
        let (header, frame) = datagram
            .split_first_chunk::<HEADER_LEN>()
            .ok_or(DropReason::Malformed)?;
        // What else is in the header is reserved, and not looked at. Spec: RFC 7348, 5
        if header[0] & HAS_VNI == 0 {
            return Err(DropReason::Malformed);
        }
        if header[4..7] != self.vni {
            return Err(DropReason::WrongVni);
        }
        if frame.len() < ETHERNET_LEN {
            return Err(DropReason::Runt);
        }
        Ok((frame, way_back))
    }

    fn take(&mut self, i: usize, now_ns: u64, burst: &mut Burst) {
        self.counters.received += 1;
        let Some((datagram, from)) = self.received.get(i) else {
            self.counters.rx_drops.add(DropReason::TooBig, 1);
            return;
        };
        let frame_len = datagram.len().saturating_sub(HEADER_LEN) as u64;
        self.counters.received_bytes += frame_len;
        match self.opened(datagram, from) {
            Ok((frame, way_back)) => {
                burst.push_bytes(frame, Offload::default());
                if let (Some(stations), Some(mac)) = (&mut self.stations, frame.get(6..12)) {
                    stations.learn(mac, way_back, now_ns);
                }
            }
            Err(reason) => self.counters.rx_drops.add(reason, 1),
        }
    }

    /// Sends what is in `to_send`; whether the kernel had room for all of it.
    fn send_batch(&mut self) -> bool {
        let mut fared = [Fared::default(); DATAGRAM_BATCH];
        let (mut room, mut copies) = (true, 0);
        for (number, socket) in sockets(&self.socket, &self.senders).enumerate() {
            let (remotes, plans) = (&self.remotes, &self.plans);
            let mine = plans.iter().enumerate();
            let mine = mine.filter(|(_, (by, _))| *by == number);
            // A station's remote, or all there are.
            let mine = mine.flat_map(|(i, (_, to))| {
                let all = if to.is_none() { &remotes[..] } else { &[] };
                to.iter()
                    .chain(all.iter().map(|(_, to)| to))
                    .map(move |to| (i, Some(to)))
            });
            let (mut left, mut refused) = (mine.peekable(), None);
            while left.peek().is_some() {
                match socket.send(&self.to_send, left.clone()) {
                    Ok(n) => {
                        copies += n as u64;
                        left.by_ref()
                            .take(n)
                            .for_each(|(i, _)| fared[i].sent = true);
                    }
                    Err(error) => {
                        let full = matches!(
                            (error.kind(), error.raw_os_error()),
                            (ErrorKind::WouldBlock, _) | (_, Some(ENOBUFS))
                        );
                        let reason = match error.raw_os_error() {
                            _ if error.kind() == ErrorKind::Interrupted => continue,
                            _ if full => DropReason::NoRoom,
                            Some(EMSGSIZE) => DropReason::TooBig,
                            _ if is_nobody(&error) => DropReason::PortDown,
                            _ => DropReason::SendError,
                        };
                        room &= !full;
                        let rest = if full { usize::MAX } else { 1 };
                        for (i, _) in left.by_ref().take(rest) {
                            fared[i].lost += 1;
                            fared[i].why = Some(reason);
                        }
                        refused = (!full && reason != DropReason::TooBig).then_some(error);
                    }
                }
            }
            if let Some(why) = refused {
                let why = why.to_string();
                self.shared.events.record_if_new(What::Nobody { why });
            }
        }
        self.shared.copies.fetch_add(copies, Ordering::Relaxed);
        self.count(&fared);
        room
    }

    fn count(&mut self, fared: &[Fared]) {
        for (i, fared) in fared.iter().enumerate().take(self.plans.len()) {
            let bytes = self.to_send.get(i).map_or(0, |(bytes, _)| bytes.len());
            match (fared.sent, fared.why) {
                (true, _) => {
                    self.counters.sent += 1;
                    self.counters.sent_bytes += bytes.saturating_sub(HEADER_LEN) as u64;
                    if fared.lost > 0 {
                        let lost = &self.shared.copies_lost;
                        lost.fetch_add(fared.lost, Ordering::Relaxed);
                    }
                }
                // With nobody to send it to, it is nobody's.
                (false, why) => self
                    .counters
                    .tx_drops
                    .add(why.unwrap_or(DropReason::PortDown), 1),
            }
        }
    }
}

/// The sockets to send from.
fn sockets<'s>(
    socket: &'s DatagramSocket,
    senders: &'s [DatagramSocket],
) -> impl Iterator<Item = &'s DatagramSocket> {
    let only = senders.is_empty().then_some(socket);
    only.into_iter().chain(senders)
}

impl Port for VxlanPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        let before = burst.len();
        let mut now_ns = 0;
        while burst.room() > 0 {
            let wanted = burst.room().min(DATAGRAM_BATCH);
            // Whatever is wrong with the host's network, there is nothing to receive from it now.
            let Ok(n) = self.socket.receive(&mut self.received, wanted) else {
                break;
            };
            if self.stations.is_some() && now_ns == 0 {
                now_ns = monotonic_ns();
            }
            for i in 0..n {
                self.take(i, now_ns, burst);
            }
            if n < wanted {
                break;
            }
        }
        if let (Some(stations), 1..) = (&self.stations, now_ns) {
            let known = stations.len() as u64;
            self.shared.stations.store(known, Ordering::Relaxed);
        }
        burst.len() - before
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        let now_ns = self.stations.as_ref().map_or(0, |_| monotonic_ns());
        let mut done = 0;
        while done < picks.len() {
            self.to_send.clear();
            self.plans.clear();
            for i in picks.iter().skip(done).take(DATAGRAM_BATCH) {
                done += 1;
                let (len, head) = (burst.frame_len(i), burst.head(i));
                if len > FRAME_MAX {
                    self.counters.tx_drops.add(DropReason::TooBig, 1);
                    continue;
                }
                let vni = self.vni;
                let pushed = self.to_send.push(HEADER_LEN + len, |bytes| {
                    let (header, frame) = bytes.split_at_mut(HEADER_LEN);
                    header.copy_from_slice(&[HAS_VNI, 0, 0, 0, vni[0], vni[1], vni[2], 0]);
                    burst.copy_frame(i, frame);
                });
                debug_assert!(pushed, "there is room for a batch of the longest frames");
                let by = match self.senders.len() {
                    0 | 1 => 0,
                    n => flow_hash(head) as usize % n,
                };
                let station = head.get(..6).and_then(|mac| {
                    let stations = self.stations.as_ref()?;
                    stations.find(mac, now_ns)
                });
                self.plans.push((by, station.map(Destination::from)));
            }
            if !self.send_batch() {
                break;
            }
        }
        done
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.poller
            .wait(&mut self.events, Some(Duration::ZERO))
            .is_ok_and(|ready| ready > 0)
    }

    fn counters(&self) -> PortCounters {
        with_lost(self.counters, &self.socket)
    }
}

/// The counters, with what the kernel has dropped before we saw it.
pub(crate) fn with_lost(mut counters: PortCounters, socket: &DatagramSocket) -> PortCounters {
    let lost = socket.lost();
    counters.received += lost;
    let lost = usize::try_from(lost).unwrap_or(usize::MAX);
    counters.rx_drops.add(DropReason::Overrun, lost);
    counters
}
