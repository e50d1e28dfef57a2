//! Datagrams: which conversations there are, and what passes in them.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use super::super::datagrams::{Carried, Conversation};
use super::super::frame::{IpIn, Mac, Unreachable, udp_packet, unreachable};
use super::super::policy::target;
use super::super::status::Lost;
use super::{FIRST_PORT, PER_SOCKET, SWEEP_NS, UserNetService, seconds};

/// The most conversations of each kind. Each has a descriptor.
const UDP_MAX: usize = 256;
const PING_MAX: usize = 32;

impl UserNetService {
    /// Sends a datagram on in its conversation, which is begun if there is none.
    pub(super) fn carry(
        &mut self,
        carried: Carried,
        (guest, remote): (SocketAddr, SocketAddr),
        data: &[u8],
        packet: &IpIn<'_>,
        now_ns: u64,
    ) -> Result<(), Lost> {
        let ends = (carried, guest, remote);
        let token = match self.datagrams.find(&ends) {
            Some(token) => token,
            None => match self.begin(ends, packet.mac, now_ns) {
                Ok(token) => token,
                Err(lost) => {
                    self.tell_unreachable(Unreachable::Prohibited, packet);
                    return Err(lost);
                }
            },
        };
        let Some(conversation) = self.datagrams.get_mut(token) else {
            return Ok(());
        };
        conversation.mac = Some(packet.mac);
        let sent = match conversation.send(data, &self.udp_forwards, now_ns) {
            // It tells of what was sent before, and this was not sent.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                self.tell_unreachable(Unreachable::Port, packet);
                return Err(Lost::Refused);
            }
            sent => sent,
        };
        sent.map_err(|error| {
            if error.kind() == ErrorKind::WouldBlock {
                Lost::NoRoom
            } else {
                Lost::Refused
            }
        })
    }

    pub(super) fn begin(
        &mut self,
        ends: (Carried, SocketAddr, SocketAddr),
        mac: Mac,
        now_ns: u64,
    ) -> Result<u64, Lost> {
        let (carried, _, remote) = ends;
        let to = target(&self.options, self.resolver, remote).ok_or(Lost::Prohibited)?;
        let most = if carried == Carried::Udp {
            UDP_MAX
        } else {
            PING_MAX
        };
        if self.datagrams.count(carried) >= most {
            return Err(Lost::TableFull);
        }
        let conversation =
            Conversation::outward(ends, mac, to, now_ns).map_err(|_| Lost::Refused)?;
        let token = self.token();
        if let Some(socket) = conversation.socket() {
            self.poller.add(socket, token).map_err(|_| Lost::Refused)?;
        }
        self.datagrams.add(token, conversation);
        self.status.flows += 1;
        Ok(token)
    }

    /// Packets for a guest from the socket of its conversation.
    pub(super) fn hear(&mut self, token: u64, now_ns: u64) {
        for _ in 0..PER_SOCKET {
            if self.outbox.left() == 0 {
                // They wait in the socket, whose buffer has an end.
                self.again = true;
                return;
            }
            let Some(conversation) = self.datagrams.get_mut(token) else {
                return;
            };
            let (ends, mac) = (conversation.ends, conversation.mac);
            match conversation.receive(&mut self.buffer, now_ns) {
                Ok(None) => return,
                Ok(Some(packet)) => self.send_ip(packet, ends.1.ip(), mac),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                    // Which datagram it was is not told; its header is what a guest looks at.
                    let sent = udp_packet(ends.1, ends.2, &[]);
                    let told = sent.and_then(|sent| {
                        unreachable(Unreachable::Port, &sent, ends.2.ip(), ends.1.ip())
                    });
                    if let Some(told) = told {
                        self.send_ip(told, ends.1.ip(), mac);
                    }
                }
                Err(_) => {
                    self.forget(token);
                    self.lose(Lost::Refused);
                    return;
                }
            }
        }
    }

    /// Datagrams from outside for a port that is forwarded.
    pub(super) fn hear_forwarded(&mut self, forward: usize, now_ns: u64) {
        for _ in 0..PER_SOCKET {
            if self.outbox.left() == 0 {
                self.again = true;
                return;
            }
            let Some(Some(socket)) = self.udp_forwards.get(forward) else {
                return;
            };
            let (len, client) = match socket.recv_from(&mut self.buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // It tells of what was sent before.
                Err(_) => continue,
            };
            let Some(token) = self
                .datagrams
                .of_client(forward, client)
                .or_else(|| self.invite(forward, client, now_ns))
            else {
                self.lose(Lost::TableFull);
                continue;
            };
            let Some(conversation) = self.datagrams.get_mut(token) else {
                continue;
            };
            conversation.heard_ns = now_ns;
            let guest = conversation.ends.1.ip();
            let mac = conversation.mac;
            if let Some(packet) =
                conversation.packet(self.buffer.get_mut(..len).unwrap_or_default())
            {
                self.send_ip(packet, guest, mac);
            }
        }
    }

    /// Begins a conversation for somebody outside.
    pub(super) fn invite(
        &mut self,
        forward: usize,
        client: SocketAddr,
        now_ns: u64,
    ) -> Option<u64> {
        if self.datagrams.count(Carried::Udp) >= UDP_MAX {
            return None;
        }
        let guest = self.options.forward.get(forward)?.guest;
        let ends = (Carried::Udp, guest, self.own_end(guest)?);
        let token = self.token();
        self.datagrams
            .add(token, Conversation::inward(ends, forward, client, now_ns));
        self.status.flows += 1;
        Some(token)
    }

    /// An end of the gateway's that is free for a conversation with a guest.
    pub(super) fn own_end(&mut self, guest: SocketAddr) -> Option<SocketAddr> {
        let own: IpAddr = if guest.is_ipv4() {
            self.options.gateway.into()
        } else {
            self.options.gateway6()?.into()
        };
        for _ in FIRST_PORT..u16::MAX {
            let end = SocketAddr::new(own, self.next_port);
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            let taken = self.tcp_by_ends.contains_key(&(guest, end))
                || self.datagrams.find(&(Carried::Udp, guest, end)).is_some();
            if !taken {
                return Some(end);
            }
        }
        None
    }

    pub(super) fn forget(&mut self, token: u64) {
        // Closing takes a socket out of the set.
        self.datagrams.remove(token);
    }

    pub(super) fn sweep(&mut self, now_ns: u64) {
        self.next_sweep_ns = now_ns + SWEEP_NS;
        for forward in std::mem::take(&mut self.resting) {
            let token = u64::try_from(forward).unwrap_or(u64::MAX).saturating_add(1);
            if let Some(Some(listener)) = self.tcp_forwards.get(forward)
                && self.poller.add(listener, token).is_err()
            {
                self.resting.push(forward);
            }
        }
        let before = now_ns.saturating_sub(seconds(self.options.udp_idle_s));
        for token in self.datagrams.silent(before) {
            self.forget(token);
        }
    }
}
