//! Linux for virtnet: eventfd, pipes, epoll, timers, unix sockets with descriptors, datagrams, TCP, memfd, userfaultfd, tun,
//! packet sockets, AF_XDP, network namespaces, threads and the clock.
//!
//! Every descriptor that goes in or out is owned or borrowed, never a bare number; every descriptor made or received
//! here is close-on-exec and non-blocking where it can be. Nothing here knows virtio: these are the system calls the
//! crates above need, each with the one behaviour they need.
//!
//! Plain calls return [`std::io::Result`] with the operation named in the text; where a person has to act (a socket
//! path in use, a missing right) the error is a [`SysError`] that says what to do.

mod clock;
mod connection;
mod datagram;
mod endpoint;
mod error;
mod event;
mod inet;
mod line;
mod link;
pub mod memfd;
mod netns;
mod packet;
mod pipe;
mod poll;
mod thread;
mod timer;
mod tun;
mod unix;
mod userfault;
mod xdp;

pub use clock::monotonic_ns;
pub use connection::{Acceptor, Connection};
pub use datagram::{
    DATAGRAM_BATCH, DATAGRAM_MAX, DatagramBatch, DatagramSocket, Destination, is_nobody,
};
pub use endpoint::Endpoint;
pub use error::{Fault, SysError};
pub use event::EventFd;
pub use inet::{begin_connect, ping_socket, reset_on_drop};
pub use line::line_cost;
pub use link::{LinkNews, LinkState, LinkWatch};
pub use netns::{in_network_namespace, in_network_namespace_of};
pub use packet::{
    PACKET_BATCH, PACKET_FRAME_MAX, PACKET_HEADER_LEN, PacketBatch, PacketFrame, PacketRing,
    PacketSocket, Promiscuous,
};
pub use pipe::PipeEnd;
pub use poll::{Event, Events, Interest, Poller, wait_readable};
pub use thread::{cpu_count, pin_current_thread, thread_cpu_time};
pub use timer::Timer;
pub use tun::{Tap, TapOffloads, TapQueue, mtu_of};
pub use unix::{Listener, MAX_FDS, PeerCredentials, Stream};
pub use userfault::Userfault;
pub use xdp::{
    Consumer, Producer, XDP_HEADROOM, XdpAttach, XdpBound, XdpDesc, XdpMode, XdpProgram, XdpRings,
    XdpSocket, XdpStatistics, receive_queues,
};
