//! Internet sockets of an ordinary user, where the standard library has no call that does not block: connecting, and echo requests.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt};

/// Begins to connect, without waiting: the stream is writable when that has succeeded or failed, and
/// [`take_error`](TcpStream::take_error) says which.
///
/// # Errors
/// The system's: out of descriptors, no route, or refused at once.
pub fn begin_connect(to: SocketAddr) -> io::Result<TcpStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family(to), SocketType::STREAM, flags, Some(ipproto::TCP))?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(TcpStream::from(socket)),
        Err(error) => Err(error.into()),
    }
}

/// Has a stream that is dropped tell its other end that it was reset, not that it came to its end.
///
/// # Errors
/// None in practice.
pub fn reset_on_drop(stream: &TcpStream) -> io::Result<()> {
    Ok(sockopt::set_socket_linger(stream, Some(Duration::ZERO))?)
}

/// A socket for echo requests to one host, and its replies: ICMP messages, whose identifier is the system's.
///
/// # Errors
/// The system's: this user may not (`net.ipv4.ping_group_range`), out of descriptors, no route.
pub fn ping_socket(to: SocketAddr) -> io::Result<UdpSocket> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let protocol = match to {
        SocketAddr::V4(_) => ipproto::ICMP,
        SocketAddr::V6(_) => ipproto::ICMPV6,
    };
    let socket = socket_with(family(to), SocketType::DGRAM, flags, Some(protocol))?;
    connect(&socket, &to)?;
    Ok(UdpSocket::from(socket))
}

fn family(of: SocketAddr) -> AddressFamily {
    match of {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::TcpListener;
    use std::os::fd::AsFd;

    use super::*;
    use crate::{Events, Interest, Poller};

    fn wait_writable(stream: &TcpStream) {
        let poller = Poller::new().unwrap();
        let mut events = Events::with_capacity(1);
        poller
            .add_with(stream.as_fd(), 0, Interest::Writable)
            .unwrap();
        let n = poller.wait(&mut events, Some(Duration::from_secs(10)));
        assert_eq!(n.unwrap(), 1);
    }

    #[test]
    fn a_connection_is_made_without_waiting() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = begin_connect(server.local_addr().unwrap()).unwrap();
        wait_writable(&stream);
        assert!(stream.take_error().unwrap().is_none());
        let (mut accepted, _) = server.accept().unwrap();
        reset_on_drop(&stream).unwrap();
        drop(stream);
        let error = accepted.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_refusal_is_told_when_it_is_known() {
        let nobody = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        match begin_connect(nobody) {
            Ok(stream) => {
                wait_writable(&stream);
                let error = stream.take_error().unwrap().unwrap();
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        }
    }
}
