//! TCP connections of guests, each ended here and carried on by a socket of the host.
//!
//! The guest's side is a `smoltcp` socket of its own, alone in its set, so that a packet costs the same however many connections
//! there are. A SYN is held until the host is connected, so that a guest hears of a refusal as if it had been there itself.
//! What one side does not take stays in the buffers, whose ends are the windows: nobody can make us keep more. Each side's end,
//! and its reset, is handed on to the other.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken,
};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint, IpListenEndpoint};
use virtnet_sys::{Interest, reset_on_drop};

use super::options::UserNetOptions;

/// Bytes that wait on each side: the windows.
const BUFFER: usize = 64 * 1024;

/// How long a connection may take to come about, and a guest to answer what it was sent.
const CONNECT_NS: u64 = 30_000_000_000;
const UNANSWERED_NS: u64 = 120_000_000_000;

/// The stack that all connections of a network share: its addresses and its clock.
pub(super) struct Stack {
    interface: Interface,
    link: Link,
}

/// The link of a stack: one packet to it, the packets from it.
#[derive(Default)]
struct Link {
    arrived: Option<Vec<u8>>,
    leaving: Vec<Vec<u8>>,
    /// How many packets may leave now.
    room: usize,
    mtu: usize,
}

impl Stack {
    /// A stack that takes whatever is sent to any address for its own.
    pub(super) fn new(options: &UserNetOptions, seed: u64) -> Self {
        let mut link = Link {
            mtu: usize::from(options.mtu),
            ..Link::default()
        };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut link, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // There is room for both.
            let _ = addresses.push(IpCidr::new(options.gateway.into(), options.prefix));
            if let Some(gateway) = options.gateway6() {
                let _ = addresses.push(IpCidr::new(gateway.into(), 64));
            }
        });
        let _ = interface
            .routes_mut()
            .add_default_ipv4_route(options.gateway);
        if let Some(gateway) = options.gateway6() {
            let _ = interface.routes_mut().add_default_ipv6_route(gateway);
        }
        interface.set_any_ip(true);
        Self { interface, link }
    }

    /// Runs a packet, or only the clock, through a set of sockets; the packets that follow from it.
    fn run(
        &mut self,
        sockets: &mut SocketSet<'static>,
        packet: Option<Vec<u8>>,
        room: usize,
        now_ns: u64,
    ) -> Vec<Vec<u8>> {
        let now = instant(now_ns);
        self.link.arrived = packet;
        self.link.room = room;
        self.interface.poll(now, &mut self.link, sockets);
        let mut before = 0;
        while self.link.leaving.len() > before {
            before = self.link.leaving.len();
            self.interface.poll_egress(now, &mut self.link, sockets);
        }
        self.link.arrived = None;
        std::mem::take(&mut self.link.leaving)
    }

    /// What a packet is answered with that belongs to no connection: a reset, or nothing.
    pub(super) fn refuse(&mut self, packet: Vec<u8>, now_ns: u64) -> Vec<Vec<u8>> {
        self.run(&mut SocketSet::new(Vec::new()), Some(packet), 1, now_ns)
    }
}

/// A connection.
pub(super) struct TcpFlow {
    /// The guest's end, and the other as the guest knows it.
    pub(super) guest: SocketAddr,
    pub(super) remote: SocketAddr,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    pub(super) host: TcpStream,
    phase: Phase,
    /// The host will send nothing more; it was told that the guest will not.
    host_ended: bool,
    guest_ended: bool,
    /// The guest has said that it will send nothing more.
    guest_left: bool,
    host_full: bool,
    /// Given up by us.
    aborted: bool,
    /// What the host's socket is waited for.
    pub(super) interest: Option<Interest>,
    started_ns: u64,
    heard_ns: u64,
}

enum Phase {
    /// The guest's SYN waits for the host.
    Connecting(Vec<u8>),
    /// Both ends are there, or the guest is being connected to.
    Open,
}

/// What became of a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Goes,
    /// It is to be forgotten.
    Over,
    /// The host did not get through.
    Refused,
}

impl TcpFlow {
    /// A connection that a guest has asked for by `syn`, and a host that is being connected to.
    pub(super) fn outward(
        (guest, remote): (SocketAddr, SocketAddr),
        syn: Vec<u8>,
        host: TcpStream,
        now_ns: u64,
    ) -> Self {
        Self::new(guest, remote, host, Phase::Connecting(syn), now_ns)
    }

    /// A connection to a guest from a stream that the host has accepted.
    ///
    /// # Errors
    /// The addresses are none that a guest can be connected to.
    pub(super) fn inward(
        (guest, remote): (SocketAddr, SocketAddr),
        host: TcpStream,
        stack: &mut Stack,
        now_ns: u64,
    ) -> io::Result<Self> {
        let mut flow = Self::new(guest, remote, host, Phase::Open, now_ns);
        let (to, from) = (IpEndpoint::from(guest), IpEndpoint::from(remote));
        let context = stack.interface.context();
        let socket = flow.sockets.get_mut::<Socket<'_>>(flow.handle);
        socket
            .connect(context, to, from)
            .map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
        Ok(flow)
    }

    fn new(
        guest: SocketAddr,
        remote: SocketAddr,
        host: TcpStream,
        phase: Phase,
        now_ns: u64,
    ) -> Self {
        let buffer = || SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            guest,
            remote,
            sockets,
            handle,
            host,
            phase,
            host_ended: false,
            guest_ended: false,
            guest_left: false,
            host_full: false,
            aborted: false,
            interest: None,
            started_ns: now_ns,
            heard_ns: now_ns,
        }
    }

    /// Takes a packet of the guest's. Packets for it are returned.
    pub(super) fn receive(
        &mut self,
        packet: Vec<u8>,
        stack: &mut Stack,
        room: usize,
        now_ns: u64,
    ) -> Vec<Vec<u8>> {
        self.heard_ns = now_ns;
        match self.phase {
            // It is patient, or sends its SYN once more.
            Phase::Connecting(_) => Vec::new(),
            Phase::Open => stack.run(&mut self.sockets, Some(packet), room, now_ns),
        }
    }

    /// Whether a guest that has asked for the connection does not want it any more.
    pub(super) fn is_connecting(&self) -> bool {
        matches!(self.phase, Phase::Connecting(_))
    }

    /// Moves what can be moved between both sides, and what follows from the time; packets for the guest, and how it stands.
    pub(super) fn pump(
        &mut self,
        stack: &mut Stack,
        room: usize,
        idle_ns: u64,
        now_ns: u64,
    ) -> (Vec<Vec<u8>>, Fate) {
        let mut leaving = Vec::new();
        if let Phase::Connecting(syn) = &mut self.phase {
            match connected(&self.host) {
                Ok(false) if now_ns.saturating_sub(self.started_ns) < CONNECT_NS => {
                    return (leaving, Fate::Goes);
                }
                Ok(true) => {}
                Ok(false) | Err(_) => {
                    return (stack.refuse(std::mem::take(syn), now_ns), Fate::Refused);
                }
            }
            let syn = std::mem::take(syn);
            self.phase = Phase::Open;
            self.heard_ns = now_ns;
            let here = IpEndpoint::from(self.remote);
            let here = IpListenEndpoint {
                addr: Some(here.addr),
                port: here.port,
            };
            // The port is not 0 and the socket is new.
            let _ = self.socket().listen(here);
            leaving = stack.run(&mut self.sockets, Some(syn), room, now_ns);
        }
        if self.exchange(now_ns).is_err() {
            self.abort();
        }
        let silent_ns = now_ns.saturating_sub(self.heard_ns);
        let unanswered = self.socket().send_queue() > 0 && silent_ns > UNANSWERED_NS;
        let coming = matches!(self.socket().state(), State::SynSent | State::SynReceived);
        if unanswered || silent_ns > idle_ns || (coming && silent_ns > CONNECT_NS) {
            self.abort();
        }
        let more = room.saturating_sub(leaving.len());
        leaving.extend(stack.run(&mut self.sockets, None, more, now_ns));
        let state = self.socket().state();
        // What the guest said before it left is still for the host; that it waits for strays is nobody's loss.
        let heard_out = self.aborted || !self.socket().can_recv();
        let is_over = match state {
            State::Closed => heard_out || !self.host_ended,
            State::TimeWait => self.guest_ended,
            _ => false,
        };
        if is_over {
            if !(self.host_ended && self.guest_ended) {
                // None in practice, and then the host hears of an end instead of a reset.
                drop(reset_on_drop(&self.host));
            }
            return (leaving, Fate::Over);
        }
        (leaving, Fate::Goes)
    }

    /// One way, then the other; an error is the host's, and the end of the connection.
    fn exchange(&mut self, now_ns: u64) -> io::Result<()> {
        let Self {
            sockets,
            handle,
            host,
            ..
        } = self;
        let socket = sockets.get_mut::<Socket<'_>>(*handle);
        self.host_full = false;
        while socket.can_recv() && !self.host_full {
            let taken = socket.recv(|bytes| match host.write(bytes) {
                Ok(n) => (n, Ok(n)),
                Err(error) => (0, Err(error)),
            });
            match taken {
                Ok(Ok(0)) | Err(_) => break,
                Ok(Ok(_)) => self.heard_ns = now_ns,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.host_full = true,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
            }
        }
        let ended = matches!(
            socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        // A reset is no end.
        self.guest_left |= ended;
        if self.guest_left && !socket.can_recv() && !self.guest_ended {
            self.guest_ended = true;
            match host.shutdown(Shutdown::Write) {
                Err(error) if error.kind() != ErrorKind::NotConnected => return Err(error),
                _ => {}
            }
        }
        while socket.can_send() && !self.host_ended {
            let taken = socket.send(|bytes| match host.read(bytes) {
                Ok(n) => (n, Ok(n)),
                Err(error) => (0, Err(error)),
            });
            match taken {
                Ok(Ok(0)) => {
                    self.host_ended = true;
                    socket.close();
                }
                Ok(Ok(_)) => self.heard_ns = self.heard_ns.max(now_ns),
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// What to wait for at the host's socket.
    pub(super) fn wants(&self) -> Interest {
        if self.is_connecting() {
            return Interest::Writable;
        }
        let socket = self.sockets.get::<Socket<'_>>(self.handle);
        let reads = !self.host_ended && socket.can_send();
        match (reads, self.host_full) {
            (true, true) => Interest::Both,
            (true, false) => Interest::Readable,
            (false, true) => Interest::Writable,
            (false, false) => Interest::Neither,
        }
    }

    /// When to be looked at again, whatever happens.
    pub(super) fn deadline_ns(&self, stack: &mut Stack, idle_ns: u64, now_ns: u64) -> u64 {
        if self.is_connecting() {
            return self.started_ns + CONNECT_NS;
        }
        let patience = if self.sockets.get::<Socket<'_>>(self.handle).send_queue() > 0 {
            UNANSWERED_NS
        } else {
            idle_ns
        };
        let idle = self
            .heard_ns
            .saturating_add(patience.min(idle_ns))
            .saturating_add(1);
        let due = stack.interface.poll_at(instant(now_ns), &self.sockets);
        let due = due.map_or(u64::MAX, |at| {
            u64::try_from(at.total_micros())
                .unwrap_or(0)
                .saturating_mul(1000)
        });
        idle.min(due)
    }

    fn abort(&mut self) {
        self.aborted = true;
        self.socket().abort();
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }
}

/// Whether a connection that was begun has come about; an error if it never will.
fn connected(stream: &TcpStream) -> io::Result<bool> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    match stream.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

fn instant(now_ns: u64) -> Instant {
    Instant::from_micros(i64::try_from(now_ns / 1000).unwrap_or(i64::MAX))
}

impl Device for Link {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived, Leaving<'_>)> {
        let packet = self.arrived.take()?;
        Some((Arrived(packet), Leaving(&mut self.leaving)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Leaving<'_>> {
        (self.leaving.len() < self.room).then_some(Leaving(&mut self.leaving))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        // What arrives has been checked, or was left undone on purpose.
        let mut checksum = ChecksumCapabilities::ignored();
        checksum.ipv4 = Checksum::Tx;
        checksum.tcp = Checksum::Tx;
        checksum.icmpv4 = Checksum::Tx;
        checksum.icmpv6 = Checksum::Tx;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = checksum;
        capabilities
    }
}

/// A packet on its way into the stack.
struct Arrived(Vec<u8>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

/// Room for a packet on its way out.
struct Leaving<'a>(&'a mut Vec<Vec<u8>>);

impl TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}
