//! Datagram sockets, UDP and unix: many datagrams with one system call.
//!
//! Nothing waits. What the kernel had to drop because nobody took it is counted ([`DatagramSocket::lost`]).
//!
//! `recvmmsg` and `sendmmsg` have no safe wrapper, so this module speaks to libc.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

use crate::endpoint::Endpoint;
use crate::error::SysError;
use crate::unix::{DatagramFile, bind_datagram};

/// Datagrams that come in or go out with one system call.
pub const DATAGRAM_BATCH: usize = 32;

/// The longest datagram that there is room for.
pub const DATAGRAM_MAX: usize = 69_632;

/// How many messages one system call sends.
const MESSAGES: usize = 64;

/// Numbers that libc has no names for. Source: linux/sock_diag.h, linux/udp.h
const SK_MEMINFO_VARS: usize = 9;
const SK_MEMINFO_DROPS: usize = 8;
const UDP_NO_CHECK6_RX: i32 = 102;

/// A datagram socket. A path that it was bound to goes with it.
#[derive(Debug)]
pub struct DatagramSocket {
    fd: OwnedFd,
    _file: Option<DatagramFile>,
}

/// Where datagrams go, as the kernel wants it.
#[derive(Clone, Copy)]
pub struct Destination {
    storage: libc::sockaddr_storage,
    len: libc::socklen_t,
}

/// Datagrams of one system call.
pub struct DatagramBatch {
    bytes: Box<[u8]>,
    lens: [usize; DATAGRAM_BATCH],
    /// Who sent them, where that has an IP address.
    from: [Option<SocketAddr>; DATAGRAM_BATCH],
    len: usize,
}

impl std::fmt::Debug for DatagramBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DatagramBatch({} datagrams)", self.len)
    }
}

impl Default for DatagramBatch {
    fn default() -> Self {
        Self {
            bytes: vec![0; DATAGRAM_MAX * DATAGRAM_BATCH].into(),
            lens: [0; DATAGRAM_BATCH],
            from: [None; DATAGRAM_BATCH],
            len: 0,
        }
    }
}

impl DatagramBatch {
    /// How many datagrams it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Datagram `i`, and who sent it where that has an IP address; `None` for one longer than [`DATAGRAM_MAX`].
    #[must_use]
    pub fn get(&self, i: usize) -> Option<(&[u8], Option<SocketAddr>)> {
        let len = *self.lens.get(..self.len)?.get(i)?;
        let slot = &self.bytes[i * DATAGRAM_MAX..(i + 1) * DATAGRAM_MAX];
        Some((slot.get(..len)?, self.from[i]))
    }

    /// Forgets all datagrams.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends a datagram of `len` bytes, which `write` puts in place; false when there is no room.
    pub fn push(&mut self, len: usize, write: impl FnOnce(&mut [u8])) -> bool {
        if self.len == DATAGRAM_BATCH || len > DATAGRAM_MAX {
            return false;
        }
        let at = self.len * DATAGRAM_MAX;
        write(&mut self.bytes[at..at + len]);
        self.lens[self.len] = len;
        self.len += 1;
        true
    }
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Destination({} bytes)", self.len)
    }
}

impl From<SocketAddr> for Destination {
    fn from(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(address) => Self::of(libc::sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(address.ip().octets()),
                },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(address) => Self::of(libc::sockaddr_in6 {
                sin6_family: family(libc::AF_INET6),
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: address.ip().octets(),
                },
                sin6_scope_id: address.scope_id(),
            }),
        }
    }
}

impl TryFrom<&Endpoint> for Destination {
    type Error = SysError;

    fn try_from(endpoint: &Endpoint) -> Result<Self, SysError> {
        let path = match endpoint {
            Endpoint::Inet(address) => return Ok((*address).into()),
            Endpoint::Unix(path) => path,
        };
        // Says what is wrong with a path that cannot be one.
        crate::unix::address(path)?;
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut address: libc::sockaddr_un = unsafe { zeroed() };
        address.sun_family = family(libc::AF_UNIX);
        for (to, from) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        Ok(Self::of(address))
    }
}

impl Destination {
    fn of<T: Copy>(address: T) -> Self {
        const { assert!(size_of::<T>() <= size_of::<libc::sockaddr_storage>()) };
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
        // SAFETY: the storage is as long as every address, was just compared, and is aligned for all of them.
        unsafe { (&raw mut storage).cast::<T>().write(address) };
        Self {
            storage,
            len: length::<T>(),
        }
    }
}

impl DatagramSocket {
    /// Makes a socket at an address of this host, or at a path that only this user may send to.
    ///
    /// # Errors
    /// [`SysError`]: somebody else has the address or path, or this host does not have the address.
    pub fn bind(at: &Endpoint) -> Result<Self, SysError> {
        let failed = |error: io::Error| SysError::os(format!("open a socket at {at}"), error);
        let domain = match at {
            Endpoint::Inet(SocketAddr::V4(_)) => libc::AF_INET,
            Endpoint::Inet(SocketAddr::V6(_)) => libc::AF_INET6,
            Endpoint::Unix(_) => libc::AF_UNIX,
        };
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: a plain system call.
        let fd = unsafe { libc::socket(domain, kind, 0) };
        if fd < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if let Endpoint::Unix(path) = at {
            let file = bind_datagram(&fd, path)?;
            return Ok(Self {
                fd,
                _file: Some(file),
            });
        }
        let socket = Self { fd, _file: None };
        if domain == libc::AF_INET6 {
            socket
                .set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &1_i32)
                .map_err(failed)?;
        }
        let address = Destination::try_from(at)?;
        // SAFETY: the kernel reads `len` bytes of the address during the call.
        check(unsafe {
            libc::bind(
                socket.fd.as_raw_fd(),
                (&raw const address.storage).cast(),
                address.len,
            )
        })
        .map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => SysError::os(
                format!("open a socket at {at} (another socket has it: `ss -ulpn` tells which)"),
                error,
            ),
            io::ErrorKind::AddrNotAvailable => SysError::os(
                format!("open a socket at {at} (no interface of this host has the address)"),
                error,
            ),
            _ => failed(error),
        })?;
        Ok(socket)
    }

    /// Receives from `to` only, and hears when nobody is there.
    ///
    /// # Errors
    /// There is no way to it.
    pub fn connect(&self, to: &Destination) -> io::Result<()> {
        // SAFETY: the kernel reads `len` bytes of the address during the call.
        check(unsafe { libc::connect(self.fd.as_raw_fd(), (&raw const to.storage).cast(), to.len) })
    }

    /// Where the socket is, of one that has an IP address.
    #[must_use]
    pub fn local(&self) -> Option<SocketAddr> {
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
        let mut len = length::<libc::sockaddr_storage>();
        // SAFETY: the kernel writes at most `len` bytes of the storage during the call.
        let answer = unsafe {
            libc::getsockname(self.fd.as_raw_fd(), (&raw mut storage).cast(), &raw mut len)
        };
        check(answer).ok()?;
        address_of(&storage)
    }

    /// Asks for room for so many bytes in each direction, as far as the system allows.
    pub fn widen(&self, bytes: usize) {
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        for (forced, usual) in [
            (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
            (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
        ] {
            if self.set(libc::SOL_SOCKET, forced, &bytes).is_err() {
                // Whatever the limit of the system leaves of it is good as well.
                drop(self.set(libc::SOL_SOCKET, usual, &bytes));
            }
        }
    }

    /// Has a datagram that is longer than its way allows refused, rather than cut into fragments.
    ///
    /// # Errors
    /// It is no UDP socket.
    pub fn never_fragment(&self) -> io::Result<()> {
        match self.local() {
            Some(SocketAddr::V6(_)) => self.set(
                libc::IPPROTO_IPV6,
                libc::IPV6_MTU_DISCOVER,
                &libc::IPV6_PMTUDISC_DO,
            ),
            _ => self.set(
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                &libc::IP_PMTUDISC_DO,
            ),
        }
    }

    /// Takes UDP datagrams over IPv6 without a checksum, which tunnels may send. Spec: RFC 6935, 5
    ///
    /// # Errors
    /// It is no UDP socket.
    pub fn take_without_checksum(&self) -> io::Result<()> {
        self.set(libc::IPPROTO_UDP, UDP_NO_CHECK6_RX, &1_i32)
    }

    /// Takes nothing that is sent to it: it is there to send from.
    ///
    /// # Errors
    /// None in practice.
    pub fn only_send(&self) -> io::Result<()> {
        // The one instruction of a program that lets no byte through.
        let mut nothing = libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k: 0,
        };
        let program = libc::sock_fprog {
            len: 1,
            filter: &raw mut nothing,
        };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
    }

    /// How many datagrams that had arrived were dropped by the kernel, for want of room or because they were damaged.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let mut numbers = [0_u32; SK_MEMINFO_VARS];
        let mut len = length::<[u32; SK_MEMINFO_VARS]>();
        // SAFETY: the kernel writes at most `len` bytes of the array during the call.
        let answer = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                numbers.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        check(answer).map_or(0, |()| numbers[SK_MEMINFO_DROPS].into())
    }

    /// Receives datagrams that have arrived, up to `max` and to [`DATAGRAM_BATCH`], instead of what is in `batch`; how many.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there are none; [`io::ErrorKind::ConnectionRefused`], once, if a peer that this is
    /// connected to has said that nobody is there.
    pub fn receive(&self, batch: &mut DatagramBatch, max: usize) -> io::Result<usize> {
        batch.clear();
        let n = max.min(DATAGRAM_BATCH);
        // SAFETY: all zeros is a valid value of these plain structs: no buffers.
        let mut pieces: [libc::iovec; DATAGRAM_BATCH] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut names: [libc::sockaddr_storage; DATAGRAM_BATCH] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; DATAGRAM_BATCH] = unsafe { zeroed() };
        let slots = batch.bytes.chunks_exact_mut(DATAGRAM_MAX);
        for (((slot, piece), name), message) in slots
            .zip(&mut pieces)
            .zip(&mut names)
            .zip(&mut messages)
            .take(n)
        {
            piece.iov_base = slot.as_mut_ptr().cast();
            piece.iov_len = slot.len();
            message.msg_hdr.msg_iov = piece;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_name = std::ptr::from_mut(name).cast();
            message.msg_hdr.msg_namelen = length::<libc::sockaddr_storage>();
        }
        let count = libc::c_uint::try_from(n).unwrap_or_default();
        // SAFETY: the first `n` messages name buffers of this function and of `batch`, which outlive the call.
        let received = unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                messages.as_mut_ptr(),
                count,
                libc::MSG_TRUNC,
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (i, message) in messages.iter().enumerate().take(received) {
            batch.lens[i] = message.msg_len as usize;
            batch.from[i] = address_of(&names[i]);
        }
        batch.len = received;
        Ok(received)
    }

    /// Sends datagrams of a batch, in the order given, each to where it is said to go (`None`: to the connected peer). How many
    /// were accepted, at most 64 of them.
    ///
    /// # Errors
    /// None was accepted, and why: [`io::ErrorKind::WouldBlock`] if the kernel has no room, anything else concerns the first
    /// datagram or its destination.
    pub fn send<'d>(
        &self,
        batch: &DatagramBatch,
        which: impl Iterator<Item = (usize, Option<&'d Destination>)>,
    ) -> io::Result<usize> {
        // SAFETY: all zeros is a valid value of these plain structs: no buffers.
        let mut pieces: [libc::iovec; MESSAGES] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; MESSAGES] = unsafe { zeroed() };
        let mut n = 0;
        for (i, to) in which.take(MESSAGES) {
            let (bytes, _) = batch.get(i).unwrap_or_default();
            pieces[n] = libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            };
            let header = &mut messages[n].msg_hdr;
            header.msg_iov = &raw mut pieces[n];
            header.msg_iovlen = 1;
            if let Some(to) = to {
                header.msg_name = (&raw const to.storage).cast_mut().cast();
                header.msg_namelen = to.len;
            }
            n += 1;
        }
        if n == 0 {
            return Ok(0);
        }
        let count = libc::c_uint::try_from(n).unwrap_or_default();
        let fd = self.fd.as_raw_fd();
        // SAFETY: the first `n` messages name bytes of `batch` and addresses, which the kernel only reads, during the call.
        let sent = unsafe { libc::sendmmsg(fd, messages.as_mut_ptr(), count, libc::MSG_NOSIGNAL) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn set<T>(&self, level: i32, option: i32, value: &T) -> io::Result<()> {
        let (fd, value) = (self.fd.as_raw_fd(), std::ptr::from_ref(value).cast());
        // SAFETY: the kernel reads the plain struct, and what a filter's program points to, during the call.
        check(unsafe { libc::setsockopt(fd, level, option, value, length::<T>()) })
    }
}

impl AsFd for DatagramSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn length<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default()
}

fn family(number: i32) -> libc::sa_family_t {
    libc::sa_family_t::try_from(number).unwrap_or_default()
}

fn address_of(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let place = std::ptr::from_ref(storage);
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the storage is longer than this plain struct, and aligned for it.
            let address = unsafe { place.cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes());
            let port = u16::from_be(address.sin_port);
            Some(SocketAddrV4::new(ip, port).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let address = unsafe { place.cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
            let port = u16::from_be(address.sin6_port);
            Some(SocketAddrV6::new(ip, port, 0, address.sin6_scope_id).into())
        }
        _ => None,
    }
}

/// What the kernel answers where there is no way, or nobody: the errors after which a datagram is one for nobody.
#[must_use]
pub fn is_nobody(error: &io::Error) -> bool {
    let nobody = [
        Errno::CONNREFUSED,
        Errno::NOENT,
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::HOSTDOWN,
        Errno::HOSTUNREACH,
        Errno::NODEV,
        Errno::ADDRNOTAVAIL,
    ];
    error
        .raw_os_error()
        .is_some_and(|number| nobody.contains(&Errno::from_raw_os_error(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(at: &str) -> DatagramSocket {
        DatagramSocket::bind(&Endpoint::parse(at)).unwrap()
    }

    #[test]
    fn datagrams_go_to_several_places_and_say_where_they_come_from() {
        for any in ["127.0.0.1:0", "[::1]:0"] {
            if any.starts_with('[') && std::net::UdpSocket::bind(any).is_err() {
                continue;
            }
            let (a, b, c) = (socket(any), socket(any), socket(any));
            let to: Vec<Destination> = [&b, &c].map(|s| s.local().unwrap().into()).into();
            let mut batch = DatagramBatch::default();
            for byte in 1..=3 {
                assert!(batch.push(usize::from(byte), |bytes| bytes.fill(byte)));
            }
            let which = (0..3).flat_map(|i| to.iter().map(move |to| (i, Some(to))));
            assert_eq!(a.send(&batch, which).unwrap(), 6);
            for socket in [&b, &c] {
                assert_eq!(socket.receive(&mut batch, 2).unwrap(), 2);
                assert_eq!(batch.get(1), Some((&[2, 2][..], a.local())));
                assert_eq!(socket.receive(&mut batch, 9).unwrap(), 1);
                let error = socket.receive(&mut batch, 9).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            }
        }
    }

    #[test]
    fn what_nobody_takes_is_counted_and_what_only_sends_takes_nothing() {
        let (a, b) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
        let to: Destination = b.local().unwrap().into();
        b.set(libc::SOL_SOCKET, libc::SO_RCVBUF, &500_000_i32)
            .unwrap();
        let mut batch = DatagramBatch::default();
        batch.push(60_000, |_| ());
        for _ in 0..100 {
            assert_eq!(a.send(&batch, [(0, Some(&to))].into_iter()).unwrap(), 1);
        }
        let mut received = 0;
        while let Ok(n) = b.receive(&mut batch, 9) {
            received += n as u64;
        }
        assert!(received > 0 && b.lost() > 0);
        assert_eq!(received + b.lost(), 100);
        b.only_send().unwrap();
        batch.push(1, |_| ());
        a.send(&batch, [(0, Some(&to))].into_iter()).unwrap();
        b.receive(&mut batch, 9).unwrap_err();
    }

    #[test]
    fn an_address_in_use_and_a_foreign_one_are_told_apart() {
        let a = socket("127.0.0.1:0");
        let taken = Endpoint::Inet(a.local().unwrap());
        let error = DatagramSocket::bind(&taken).unwrap_err();
        assert!(
            error.to_string().contains("another socket has it"),
            "{error}"
        );
        let error = DatagramSocket::bind(&Endpoint::parse("192.0.2.1:0")).unwrap_err();
        assert!(
            error.to_string().contains("no interface of this host"),
            "{error}"
        );
    }
}
