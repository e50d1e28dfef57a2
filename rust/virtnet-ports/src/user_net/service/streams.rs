//! TCP connections: which there are, and when each is moved on.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};

use virtnet_sys::{Interest, begin_connect};

use super::super::frame::IpIn;
use super::super::policy::target;
use super::super::status::Lost;
use super::super::tcp::{Fate, TcpFlow};
use super::{PER_SOCKET, UserNetService, seconds};

/// The most connections. Each has a descriptor and two buffers.
const TCP_MAX: usize = 256;

impl UserNetService {
    pub(super) fn take_tcp(&mut self, packet: &IpIn<'_>, now_ns: u64) -> Result<(), Lost> {
        let (guest, remote) = packet.ends();
        let room = self.outbox.left();
        if let Some(&token) = self.tcp_by_ends.get(&(guest, remote)) {
            if let Some(flow) = self.tcp.get_mut(&token) {
                let leaving = flow.receive(packet.packet.to_vec(), &mut self.stack, room, now_ns);
                self.send_to(leaving, packet.mac);
            }
            self.touch(token);
            return Ok(());
        }
        let flags = packet.payload.get(13).copied().unwrap_or(0);
        // A SYN, and neither ACK nor RST with it. Spec: RFC 9293, 3.1.
        let begins = flags & 0b1_0110 == 0b0_0010;
        let opened = if begins {
            self.open_tcp(guest, remote)
        } else {
            Err(None)
        };
        match opened {
            Ok(host) => {
                let token = self.token();
                let flow = TcpFlow::outward((guest, remote), packet.packet.to_vec(), host, now_ns);
                self.add_tcp(token, flow);
                Ok(())
            }
            Err(why) => {
                let leaving = self.stack.refuse(packet.packet.to_vec(), now_ns);
                self.send_to(leaving, packet.mac);
                why.map_or(Ok(()), Err)
            }
        }
    }

    pub(super) fn open_tcp(
        &self,
        _guest: SocketAddr,
        remote: SocketAddr,
    ) -> Result<TcpStream, Option<Lost>> {
        let to = target(&self.options, self.resolver, remote).ok_or(Lost::Prohibited)?;
        if self.tcp.len() >= TCP_MAX {
            return Err(Some(Lost::TableFull));
        }
        begin_connect(to).map_err(|_| Some(Lost::Refused))
    }

    /// Connections from outside to a port that is forwarded.
    pub(super) fn accept(&mut self, forward: usize, now_ns: u64) {
        for _ in 0..PER_SOCKET {
            let Some(Some(listener)) = self.tcp_forwards.get(forward) else {
                return;
            };
            let host = match listener.accept() {
                Ok((host, _)) => host,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Whoever it was is gone.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(_) => {
                    // It would be told of again at once. It was in the set.
                    drop(self.poller.remove(listener));
                    self.resting.push(forward);
                    return;
                }
            };
            let Some(guest) = self
                .options
                .forward
                .get(forward)
                .map(|forward| forward.guest)
            else {
                return;
            };
            if self.tcp.len() >= TCP_MAX {
                self.lose(Lost::TableFull);
                continue;
            }
            let Some(own) = self
                .own_end(guest)
                .filter(|_| host.set_nonblocking(true).is_ok())
            else {
                self.lose(Lost::Refused);
                continue;
            };
            match TcpFlow::inward((guest, own), host, &mut self.stack, now_ns) {
                Ok(flow) => {
                    let token = self.token();
                    self.add_tcp(token, flow);
                }
                Err(_) => self.lose(Lost::Refused),
            }
        }
    }

    pub(super) fn add_tcp(&mut self, token: u64, flow: TcpFlow) {
        self.tcp_by_ends.insert((flow.guest, flow.remote), token);
        self.tcp.insert(token, flow);
        self.status.flows += 1;
        self.touch(token);
    }

    pub(super) fn touch(&mut self, token: u64) {
        if self.touched.last() != Some(&token) {
            self.touched.push(token);
        }
    }

    /// Moves a connection on, and says when it is to be looked at again.
    pub(super) fn pump(&mut self, token: u64, now_ns: u64) {
        let idle_ns = seconds(self.options.tcp_idle_s);
        let room = self.outbox.left();
        let Some(flow) = self.tcp.get_mut(&token) else {
            return;
        };
        let (leaving, fate) = flow.pump(&mut self.stack, room, idle_ns, now_ns);
        let guest = flow.guest.ip();
        let wants = flow.wants();
        let watched = match (flow.interest, wants) {
            _ if fate != Fate::Goes => Ok(()),
            (None, Interest::Neither) => Ok(()),
            // A hang-up is told for as long as it is asked for: who wants nothing is not in the set.
            (Some(_), Interest::Neither) => self.poller.remove(&flow.host),
            (None, wants) => self.poller.add_with(&flow.host, token, wants),
            (Some(before), wants) if before != wants => {
                self.poller.modify(&flow.host, token, wants)
            }
            _ => Ok(()),
        };
        flow.interest = (wants != Interest::Neither).then_some(wants);
        let deadline = flow.deadline_ns(&mut self.stack, idle_ns, now_ns);
        for packet in leaving {
            self.send_ip(packet, guest, None);
        }
        if fate == Fate::Refused {
            self.lose(Lost::Refused);
        }
        if fate != Fate::Goes || watched.is_err() {
            self.forget_tcp(token);
            return;
        }
        // What is due already waits for room; to look again at once would not help.
        let deadline = deadline.max(now_ns + self.pause_ns);
        if let Some(before) = self.due_of.insert(token, deadline) {
            self.due.remove(&(before, token));
        }
        self.due.insert((deadline, token));
    }

    pub(super) fn forget_tcp(&mut self, token: u64) {
        if let Some(at) = self.due_of.remove(&token) {
            self.due.remove(&(at, token));
        }
        if let Some(gone) = self.tcp.remove(&token) {
            self.tcp_by_ends.remove(&(gone.guest, gone.remote));
        }
    }
}
