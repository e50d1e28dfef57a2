//! Every port to the outside: tap, packet socket, AF_XDP, pcap, and what vhost-user and virtio-user ports are built on.
//!
//! A port has two halves. The data half moves packets and belongs to one worker at a time; the control half answers sockets
//! and timers on a [`Control`] thread. They meet in a [`Slot`]. Ports without a session ([`TapPort`], [`VxlanPort`], [`PcapPort`]) have no
//! control half.
//!
//! [`check`] is no port: it puts somebody else's back-end to the test.
//!
//! It guarantees that a peer, a guest or a file can make a port stop but never panic or block its worker, that every packet
//! offered to a port is counted once, and that dropping a port gives everything back. There is no global state: ports and
//! control threads of several networks live side by side.
//!
//! In a packet's way ports are its first and its last step (see `ARCHITECTURE.md`).
#![forbid(unsafe_code)]

mod af_packet;
mod af_xdp;
pub mod check;
mod control;
mod dgram;
mod error;
mod events;
mod link;
mod owned;
mod pcap;
mod recorder;
mod ring_status;
mod slot;
mod stream;
mod tap;
mod user_net;
mod vhost_user;
mod virtio_user;
mod vxlan;

pub use af_packet::AfPacketPort;
pub use af_xdp::{AfXdpOptions, AfXdpPort, XDP_QUEUES_MAX, try_af_xdp};
pub use control::{Control, REST, Served, Service};
pub use dgram::{DgramPort, DgramWatch};
pub use error::PortError;
pub use events::{Datum, Event, EventLog, KEPT, Peer, What};
pub use link::InterfaceWatch;
pub use owned::{Huge, OwnMemory, OwnRegion, RegionLayout};
pub use pcap::{CaptureOptions, CapturePlace, Pace, PcapMode, PcapPort, PcapWatch, read_capture};
pub use recorder::{Recorded, RecorderPort, Recording, recorder};
pub use ring_status::RingStatus;
pub use slot::{DEADLINE, Held, Slot, SlotError};
pub use stream::{StreamPort, StreamWatch};
pub use tap::TapPort;
pub use user_net::{
    Forward, LeaseStatus, Lost, StaticLease, Transport, UserNetOptions, UserNetPort, UserNetStatus,
    UserNetWatch,
};
pub use vhost_user::{
    OFFLOADS, Step, VhostUserOptions, VhostUserPort, VhostUserStatus, VhostUserWatch,
};
pub use virtio_user::{VirtioUserOptions, VirtioUserPort, VirtioUserStatus, VirtioUserWatch};
pub use virtnet_sys::{
    Endpoint, Fault, XdpAttach, XdpMode, in_network_namespace, monotonic_ns, wait_readable,
};
pub use virtnet_vhost::{Offered, SessionError, probe};
pub use vxlan::{
    VXLAN_PORT, VXLAN_REMOTES_MAX, VXLAN_SOURCE_PORTS_MAX, VxlanOptions, VxlanPort, VxlanWatch,
};
