//! A network of its own behind one port, and its way out: what QEMU calls user-mode networking.
//!
//! The port's other end is a gateway. It gives guests their addresses (DHCP, router advertisements), knows names (DNS), answers
//! ARP, neighbour discovery and echo requests, and carries TCP, UDP and echo requests to the outside through ordinary sockets of
//! the user that runs it: no rights, no interface, no address of the host's is needed. Ports of the host can be forwarded to guests.
//!
//! It guarantees that workers never wait for any of it: the gateway lives on a thread of its own behind a pair of memory ports. All
//! its tables have an end, packets that make no sense are counted and go no further, and guests reach neither the host's loopback
//! (unless that is asked for) nor addresses that no router hands on.
//!
//! In a packet's way this is a first and a last step, with one copy on each side.

mod datagrams;
mod dhcp;
mod dns;
mod frame;
mod neighbours;
mod options;
mod policy;
mod service;
mod status;
mod tcp;

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError};

use virtnet_packet::{
    Burst, DropReason, MemoryPort, Offloads, Picks, Port, PortCounters, memory_pair,
};
use virtnet_sys::monotonic_ns;

pub use options::{Forward, StaticLease, Transport, UserNetOptions};
use service::{Shared, UserNetService};
pub use status::{LeaseStatus, Lost, UserNetStatus};

use crate::{Control, PortError, Served};

/// Packets that may wait in each direction.
const QUEUE: usize = 1024;

/// The port of a user-mode network.
#[derive(Debug)]
pub struct UserNetPort {
    end: MemoryPort,
    watch: UserNetWatch,
    _served: Served<UserNetService>,
    /// The gateway's thread, which ends with the port.
    _thread: Control,
}

impl UserNetPort {
    /// Makes the network, and opens the ports that are forwarded to it.
    ///
    /// # Errors
    /// [`PortError::Option`]: addresses that do not fit together; [`PortError::Io`]: a port of the host is taken.
    pub fn new(options: UserNetOptions) -> Result<Self, PortError> {
        options.check()?;
        let (end, far) = memory_pair(QUEUE);
        let shared = Shared::default();
        let now_ns = monotonic_ns();
        let service =
            UserNetService::new(options, far, end.backlog(), Arc::clone(&shared), now_ns)?;
        let listening = service.listening().into();
        let thread = Control::start("virtnet-usernet")?;
        let served = thread.add(service)?;
        let watch = UserNetWatch { shared, listening };
        Ok(Self {
            end,
            watch,
            _served: served,
            _thread: thread,
        })
    }

    /// Asks how the network stands, wherever the port is.
    #[must_use]
    pub fn watch(&self) -> UserNetWatch {
        self.watch.clone()
    }
}

/// Asks a user-mode network how it stands, from anywhere; what it said last when its port is gone.
#[derive(Clone, Debug)]
pub struct UserNetWatch {
    shared: Shared,
    listening: Arc<[Option<SocketAddr>]>,
}

impl UserNetWatch {
    /// How it stands.
    #[must_use]
    pub fn status(&self) -> UserNetStatus {
        let mut status = self
            .shared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let now_ns = monotonic_ns();
        status
            .leases
            .retain(|lease| lease.until_ns.is_none_or(|until| until > now_ns));
        status
    }

    /// Where the host listens for each forwarded port, in their order: the system chooses where that was left to it.
    #[must_use]
    pub fn listening(&self) -> &[Option<SocketAddr>] {
        &self.listening
    }
}

impl Port for UserNetPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        self.end.rx(burst)
    }

    fn offloads(&self) -> Offloads {
        // Checksums are not needed on the way to a thread of ours, and a long segment is as good as many.
        Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        self.end.tx(burst, picks)
    }

    fn flush(&mut self) {
        self.end.flush();
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.end.drop_tx(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        self.end.wait_fd()
    }

    fn arm(&mut self) -> bool {
        self.end.arm()
    }

    fn disarm(&mut self) {
        self.end.disarm();
    }

    fn counters(&self) -> PortCounters {
        self.end.counters()
    }
}
