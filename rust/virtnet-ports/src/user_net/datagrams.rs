//! UDP conversations and series of echo requests, each carried by a connected socket of the host.
//!
//! A conversation is a guest's port and where it sends to: only from there does anything come back. It ends when nothing has passed
//! for a while, or when its place is needed and it is the one that was silent for longest.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};

use smoltcp::wire::IpProtocol;
use virtnet_sys::ping_socket;

use super::frame::{Mac, icmpv4_checksum, icmpv6_checksum, ip_packet, udp_packet};

/// What is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Carried {
    Udp,
    /// Echo requests; the identifier stands for the guest's port.
    Ping,
}

/// A conversation as the guest knows it.
pub(super) type Ends = (Carried, SocketAddr, SocketAddr);

/// A conversation.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) ends: Ends,
    pub(super) mac: Option<Mac>,
    way: Way,
    pub(super) heard_ns: u64,
}

/// How the host carries it.
#[derive(Debug)]
enum Way {
    Own(UdpSocket),
    /// By a port that is forwarded: which, and who is at the other end.
    Forwarded(usize, SocketAddr),
}

/// All conversations, by the number of their socket.
#[derive(Debug, Default)]
pub(super) struct Conversations {
    by_token: HashMap<u64, Conversation>,
    by_ends: HashMap<Ends, u64>,
    by_client: HashMap<(usize, SocketAddr), u64>,
}

impl Conversations {
    pub(super) fn count(&self, carried: Carried) -> usize {
        self.by_token
            .values()
            .filter(|one| one.ends.0 == carried)
            .count()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_token.is_empty()
    }

    pub(super) fn find(&self, ends: &Ends) -> Option<u64> {
        self.by_ends.get(ends).copied()
    }

    pub(super) fn of_client(&self, forward: usize, client: SocketAddr) -> Option<u64> {
        self.by_client.get(&(forward, client)).copied()
    }

    pub(super) fn get_mut(&mut self, token: u64) -> Option<&mut Conversation> {
        self.by_token.get_mut(&token)
    }

    pub(super) fn add(&mut self, token: u64, conversation: Conversation) {
        self.by_ends.insert(conversation.ends, token);
        if let Way::Forwarded(forward, client) = conversation.way {
            self.by_client.insert((forward, client), token);
        }
        self.by_token.insert(token, conversation);
    }

    pub(super) fn remove(&mut self, token: u64) {
        if let Some(gone) = self.by_token.remove(&token) {
            self.by_ends.remove(&gone.ends);
            if let Way::Forwarded(forward, client) = gone.way {
                self.by_client.remove(&(forward, client));
            }
        }
    }

    /// Those that were silent since `before_ns`.
    pub(super) fn silent(&self, before_ns: u64) -> Vec<u64> {
        let old =
            |(token, one): (&u64, &Conversation)| (one.heard_ns < before_ns).then_some(*token);
        self.by_token.iter().filter_map(old).collect()
    }
}

impl Conversation {
    /// A conversation of a guest with `to`, which it knows as the second of its ends.
    ///
    /// # Errors
    /// The host's: no socket, no route, not for this user.
    pub(super) fn outward(ends: Ends, mac: Mac, to: SocketAddr, now_ns: u64) -> io::Result<Self> {
        let socket = match ends.0 {
            Carried::Ping => ping_socket(to)?,
            Carried::Udp => {
                let any: IpAddr = if to.is_ipv4() {
                    [0; 4].into()
                } else {
                    [0u16; 8].into()
                };
                let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
                socket.set_nonblocking(true)?;
                socket.connect(to)?;
                socket
            }
        };
        Ok(Self {
            ends,
            mac: Some(mac),
            way: Way::Own(socket),
            heard_ns: now_ns,
        })
    }

    /// A conversation that somebody outside has begun by way of a forwarded port.
    pub(super) fn inward(ends: Ends, forward: usize, client: SocketAddr, now_ns: u64) -> Self {
        Self {
            ends,
            mac: None,
            way: Way::Forwarded(forward, client),
            heard_ns: now_ns,
        }
    }

    /// Its own socket, if it has one.
    pub(super) fn socket(&self) -> Option<&UdpSocket> {
        match &self.way {
            Way::Own(socket) => Some(socket),
            Way::Forwarded(..) => None,
        }
    }

    /// Sends what a guest has sent.
    ///
    /// # Errors
    /// The socket's; [`ErrorKind::ConnectionRefused`] tells of an earlier datagram.
    pub(super) fn send(
        &mut self,
        data: &[u8],
        forwards: &[Option<UdpSocket>],
        now_ns: u64,
    ) -> io::Result<()> {
        self.heard_ns = now_ns;
        match &self.way {
            Way::Own(socket) => socket.send(data)?,
            Way::Forwarded(forward, client) => {
                let socket = forwards.get(*forward).and_then(Option::as_ref);
                socket
                    .ok_or(ErrorKind::NotConnected)?
                    .send_to(data, client)?
            }
        };
        Ok(())
    }

    /// The next packet for the guest from its own socket; `None` when there is none now.
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn receive(
        &mut self,
        buffer: &mut [u8],
        now_ns: u64,
    ) -> io::Result<Option<Vec<u8>>> {
        let Way::Own(socket) = &self.way else {
            return Ok(None);
        };
        let len = match socket.recv(buffer) {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        self.heard_ns = now_ns;
        Ok(self.packet(buffer.get_mut(..len).unwrap_or_default()))
    }

    /// What has come from the other end as a packet for the guest; none comes of what makes no sense.
    pub(super) fn packet(&self, data: &mut [u8]) -> Option<Vec<u8>> {
        let (carried, guest, remote) = self.ends;
        if carried == Carried::Udp {
            return udp_packet(remote, guest, data);
        }
        // The identifier on the way is the host's own. Spec: RFC 792, Echo; RFC 4443, 4.2.
        let reply = if guest.is_ipv4() { 0 } else { 129 };
        if data.len() < 8 || data[0] != reply {
            return None;
        }
        data[4..6].copy_from_slice(&guest.port().to_be_bytes());
        let protocol = match (remote.ip(), guest.ip()) {
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                icmpv6_checksum(data, src, dst);
                IpProtocol::Icmpv6
            }
            _ => {
                icmpv4_checksum(data);
                IpProtocol::Icmp
            }
        };
        ip_packet(remote.ip(), guest.ip(), protocol, data)
    }
}
