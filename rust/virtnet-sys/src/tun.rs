//! Tap devices: network interfaces whose wire is a descriptor.
//!
//! [`Tap::open`] makes the interface, or takes one that an administrator made beforehand, with one descriptor per
//! queue. A packet is one read or one write; with a virtio-net header in front of it (12 bytes, little-endian) the
//! kernel hands over and accepts packets that are not segmented or checksummed yet. Reads and writes never wait.
//!
//! Where a right is missing the error says which, and how to live without it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, readv, writev};
use rustix::ioctl::{Opcode, Setter, Updater, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::error::SysError;

/// Bytes of the virtio-net header in front of every packet.
const NET_HEADER_LEN: i32 = 12;

/// Longest interface name, without its end mark.
const MAX_NAME: usize = 15;

const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETOFFLOAD: Opcode = 0x4004_54d0;
const TUNSETVNETHDRSZ: Opcode = 0x4004_54d8;
const TUNSETVNETLE: Opcode = 0x4004_54dc;
const TUNGETDEVNETNS: Opcode = 0x54e3;
const SIOCGIFFLAGS: Opcode = 0x8913;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCGIFMTU: Opcode = 0x8921;
const SIOCSIFMTU: Opcode = 0x8922;
const SIOCGIFHWADDR: Opcode = 0x8927;

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_UP: u16 = 0x0001;

bitflags::bitflags! {
    /// What the kernel may leave unfinished in packets it hands to us.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct TapOffloads: u32 {
        /// Checksums.
        const CSUM = 0x01;
        /// Segmentation of TCP over IPv4.
        const TSO4 = 0x02;
        /// Segmentation of TCP over IPv6.
        const TSO6 = 0x04;
        /// Segmentation of TCP with ECN.
        const TSO_ECN = 0x08;
        /// Fragmentation of UDP.
        const UFO = 0x10;
        /// Segmentation of UDP over IPv4.
        const USO4 = 0x20;
        /// Segmentation of UDP over IPv6.
        const USO6 = 0x40;
    }
}

/// A tap interface, known by its name.
#[derive(Debug)]
pub struct Tap {
    name: String,
    control: OwnedFd,
}

impl Tap {
    /// Opens the tap `name` with `queues` queues, making it if it is not there; a `%d` in the name is numbered.
    ///
    /// Returns the interface and its queues. It is down until [`Tap::set_up`]. One that was made here goes away when
    /// the last queue is closed.
    ///
    /// # Errors
    /// [`SysError::TapPermission`], [`SysError::TapMismatch`], [`SysError::InterfaceName`], [`SysError::NoTun`]: each
    /// says what to do.
    pub fn open(
        name: &str,
        queues: usize,
        vnet_hdr: bool,
    ) -> Result<(Self, Vec<TapQueue>), SysError> {
        let mut name = name.to_owned();
        let mut opened = Vec::with_capacity(queues);
        for _ in 0..queues.max(1) {
            let (queue, given) = TapQueue::open(&name, queues, vnet_hdr)?;
            name = given;
            opened.push(queue);
        }
        let tap = Self::named(name)?;
        Ok((tap, opened))
    }

    /// The interface of this name, if there is one.
    fn named(name: String) -> Result<Self, SysError> {
        let control = socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| SysError::os("open a socket", errno))?;
        Ok(Self { name, control })
    }

    /// Returns the name of the interface, as the kernel gave it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Brings the link up or down.
    ///
    /// # Errors
    /// Changing the link takes CAP_NET_ADMIN even where opening it does not: the error says so.
    pub fn set_up(&self, up: bool) -> Result<(), SysError> {
        let mut request = self.request::<SIOCGIFFLAGS>("read the flags")?;
        let flags = request.flags();
        let wanted = if up { flags | IFF_UP } else { flags & !IFF_UP };
        if wanted == flags {
            return Ok(());
        }
        request.set_flags(wanted);
        self.apply::<SIOCSIFFLAGS>(&mut request, "bring up or down the link")
    }

    /// Tells whether the link is up.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn is_up(&self) -> Result<bool, SysError> {
        Ok(self.request::<SIOCGIFFLAGS>("read the flags")?.flags() & IFF_UP != 0)
    }

    /// Returns the largest packet the interface takes, without its Ethernet header.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn mtu(&self) -> Result<u32, SysError> {
        Ok(self.request::<SIOCGIFMTU>("read the MTU")?.number())
    }

    /// Sets the largest packet the interface takes.
    ///
    /// # Errors
    /// CAP_NET_ADMIN is missing, or the kernel does not allow the size.
    pub fn set_mtu(&self, mtu: u32) -> Result<(), SysError> {
        let mut request = InterfaceRequest::new(&self.name)?;
        request.set_number(mtu);
        self.apply::<SIOCSIFMTU>(&mut request, "set the MTU")
    }

    /// Returns the MAC address of the interface.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn mac(&self) -> Result<[u8; 6], SysError> {
        Ok(self
            .request::<SIOCGIFHWADDR>("read the MAC address")?
            .hardware_address())
    }

    fn request<const OPCODE: Opcode>(&self, operation: &str) -> Result<InterfaceRequest, SysError> {
        let mut request = InterfaceRequest::new(&self.name)?;
        self.apply::<OPCODE>(&mut request, operation)?;
        Ok(request)
    }

    fn apply<const OPCODE: Opcode>(
        &self,
        request: &mut InterfaceRequest,
        what: &str,
    ) -> Result<(), SysError> {
        request
            .exchange::<OPCODE>(self.control.as_fd())
            .map_err(|errno| {
                let remedy = if errno == Errno::PERM {
                    " (needs root or CAP_NET_ADMIN)"
                } else {
                    ""
                };
                SysError::os(format!("{what} of {}{remedy}", self.name), errno)
            })
    }
}

/// One queue of a tap interface.
#[derive(Debug)]
pub struct TapQueue {
    fd: OwnedFd,
}

impl TapQueue {
    fn open(name: &str, queues: usize, vnet_hdr: bool) -> Result<(Self, String), SysError> {
        let mut request = InterfaceRequest::new(name)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => SysError::NoTun,
            Errno::ACCESS | Errno::PERM => SysError::TapPermission {
                name: name.to_owned(),
                queues,
            },
            _ => SysError::os("open /dev/net/tun", errno),
        })?;
        let mut mode = IFF_TAP | IFF_NO_PI;
        if vnet_hdr {
            mode |= IFF_VNET_HDR;
        }
        if queues > 1 {
            mode |= IFF_MULTI_QUEUE;
        }
        request.set_flags(mode);
        let attached = match request.exchange::<TUNSETIFF>(fd.as_fd()) {
            // A device that was made for several queues serves one as well, if told so.
            Err(Errno::INVAL) if queues <= 1 => {
                request.set_flags(mode | IFF_MULTI_QUEUE);
                request.exchange::<TUNSETIFF>(fd.as_fd())
            }
            other => other,
        };
        attached.map_err(|errno| match errno {
            Errno::PERM | Errno::ACCESS => SysError::TapPermission {
                name: name.to_owned(),
                queues,
            },
            Errno::INVAL | Errno::BUSY | Errno::EXIST => SysError::TapMismatch {
                name: name.to_owned(),
                queues,
            },
            _ => SysError::os(format!("open tap {name:?}"), errno),
        })?;
        let queue = Self { fd };
        if vnet_hdr {
            queue.set_number::<TUNSETVNETHDRSZ>(
                NET_HEADER_LEN,
                "size the virtio-net header of a tap",
            )?;
            queue.set_number::<TUNSETVNETLE>(
                1,
                "make the virtio-net header of a tap little-endian",
            )?;
        }
        Ok((queue, request.name()))
    }

    /// Takes over a tap queue that somebody with the rights opened and configured.
    ///
    /// # Errors
    /// [`SysError::WrongKind`] if it is no character device; the descriptor is closed.
    pub fn from_owned(fd: OwnedFd) -> Result<Self, SysError> {
        let failed = |errno| SysError::os("look at a tap descriptor", errno);
        let found = crate::event::kind(&fd).map_err(failed)?;
        if found != "device" {
            return Err(SysError::WrongKind {
                expected: "tap queue",
                found,
            });
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(failed)?;
        Ok(Self { fd })
    }

    /// Says what the kernel may leave unfinished in packets it hands to us.
    ///
    /// # Errors
    /// The kernel does not know one of them: try with fewer.
    pub fn set_offloads(&self, offloads: TapOffloads) -> Result<(), SysError> {
        // SAFETY: TUNSETOFFLOAD takes its argument as a plain number, which is what this pattern passes.
        let request = unsafe {
            rustix::ioctl::IntegerSetter::<TUNSETOFFLOAD>::new_usize(offloads.bits() as usize)
        };
        // SAFETY: the request reads and writes no memory.
        unsafe { ioctl(&self.fd, request) }.map_err(|errno| {
            SysError::os(format!("set the offloads of a tap to {offloads:?}"), errno)
        })
    }

    /// Another descriptor of the same queue.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let fd = self.fd.try_clone()?;
        Ok(Self { fd })
    }

    /// The network namespace that the interface is in now.
    ///
    /// # Errors
    /// The interface is gone, or the right to ask (CAP_NET_ADMIN) is missing.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        // SAFETY: a plain system call, which takes no argument and makes a descriptor.
        let fd = unsafe { libc::ioctl(self.fd.as_raw_fd(), u64::from(TUNGETDEVNETNS), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Reads one packet, behind its virtio-net header if the tap has one; returns its length with the header.
    ///
    /// A packet longer than `buffer` is cut.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, buffer)?)
    }

    /// Reads one packet into several pieces.
    ///
    /// # Errors
    /// As [`TapQueue::read`].
    pub fn read_vectored(&self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(readv(&self.fd, pieces)?)
    }

    /// Writes one packet given in pieces, the virtio-net header first if the tap has one.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if the kernel has no room; anything else concerns this packet or says that the
    /// link is down.
    pub fn write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(writev(&self.fd, pieces)?)
    }

    fn set_number<const OPCODE: Opcode>(
        &self,
        value: i32,
        operation: &str,
    ) -> Result<(), SysError> {
        // SAFETY: the requests used with this function take a pointer to one C int.
        let request = unsafe { Setter::<OPCODE, i32>::new(value) };
        // SAFETY: the kernel reads one int through the pointer, which `request` holds, and writes nothing.
        unsafe { ioctl(&self.fd, request) }.map_err(|errno| SysError::os(operation, errno))
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<TapQueue> for File {
    fn from(queue: TapQueue) -> Self {
        queue.fd.into()
    }
}

/// The kernel's `struct ifreq`: a name, and a union that is read as what the request says.
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

impl InterfaceRequest {
    fn new(name: &str) -> Result<Self, SysError> {
        let bytes = name.as_bytes();
        let plain = !bytes
            .iter()
            .any(|byte| matches!(byte, 0 | b'/' | b':') || byte.is_ascii_whitespace());
        if bytes.is_empty() || bytes.len() > MAX_NAME || !plain {
            return Err(SysError::InterfaceName {
                name: name.to_owned(),
            });
        }
        let mut field = [0; 16];
        field[..bytes.len()].copy_from_slice(bytes);
        Ok(Self {
            name: field,
            value: [0; 24],
        })
    }

    fn exchange<const OPCODE: Opcode>(&mut self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        // SAFETY: the requests used with this function take a pointer to a struct ifreq, which this type is.
        let request = unsafe { Updater::<OPCODE, Self>::new(self) };
        // SAFETY: the kernel reads and writes at most the 40 bytes of the struct, all of them plain bytes.
        unsafe { ioctl(fd, request) }
    }

    fn name(&self) -> String {
        let end = self
            .name
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(MAX_NAME);
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }

    fn flags(&self) -> u16 {
        u16::from_ne_bytes([self.value[0], self.value[1]])
    }

    fn set_flags(&mut self, flags: u16) {
        self.value[..2].copy_from_slice(&flags.to_ne_bytes());
    }

    fn number(&self) -> u32 {
        u32::from_ne_bytes([self.value[0], self.value[1], self.value[2], self.value[3]])
    }

    fn set_number(&mut self, number: u32) {
        self.value[..4].copy_from_slice(&number.to_ne_bytes());
    }

    /// The address of a `sockaddr`, which follows its two-byte family.
    fn hardware_address(&self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f, ..] = self.value;
        [a, b, c, d, e, f]
    }
}

/// The largest payload of a frame that an interface takes, in bytes; of any interface of the network namespace that the calling
/// thread is in.
///
/// # Errors
/// There is no such interface.
pub fn mtu_of(interface: &str) -> Result<u32, SysError> {
    Tap::named(interface.to_owned())?.mtu()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens a tap, or says why this machine cannot and passes.
    fn open(name: &str, queues: usize) -> Option<(Tap, Vec<TapQueue>)> {
        match Tap::open(name, queues, true) {
            Ok(opened) => Some(opened),
            Err(error @ (SysError::TapPermission { .. } | SysError::NoTun)) => {
                eprintln!("skipped: {error}");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_packet_written_with_its_header_is_accepted_and_none_waits() {
        let Some((tap, queues)) = open("vntest%d", 1) else {
            return;
        };
        assert!(tap.name().starts_with("vntest") && !tap.name().contains('%'));
        tap.set_up(true).unwrap();
        assert!(tap.is_up().unwrap());
        let packet = [0xffu8; 60];
        let pieces = [IoSlice::new(&[0; 12]), IoSlice::new(&packet)];
        assert_eq!(queues[0].write_vectored(&pieces).unwrap(), 72);
        // The kernel may have sent its own greetings (neighbour discovery); each has a header and then silence.
        let mut buffer = [0; 2048];
        let end = loop {
            match queues[0].read(&mut buffer) {
                Ok(len) => assert!(len >= 12 + 14),
                Err(error) => break error,
            }
        };
        assert_eq!(end.kind(), io::ErrorKind::WouldBlock);
        tap.set_up(false).unwrap();
        assert!(!tap.is_up().unwrap());
        queues[0].write_vectored(&pieces).unwrap_err();
    }

    #[test]
    fn properties_can_be_read_and_set() {
        let Some((tap, queues)) = open("vnprop%d", 1) else {
            return;
        };
        assert_eq!(tap.mtu().unwrap(), 1500);
        tap.set_mtu(9000).unwrap();
        assert_eq!(tap.mtu().unwrap(), 9000);
        assert_ne!(tap.mac().unwrap(), [0; 6]);
        queues[0]
            .set_offloads(TapOffloads::CSUM | TapOffloads::TSO4 | TapOffloads::TSO6)
            .unwrap();
        queues[0].set_offloads(TapOffloads::empty()).unwrap();
        assert!(
            queues[0].set_offloads(TapOffloads::TSO4).is_err(),
            "segmentation without checksum"
        );
    }

    #[test]
    fn several_queues_share_one_interface() {
        let Some((tap, queues)) = open("vnmq%d", 3) else {
            return;
        };
        assert_eq!(queues.len(), 3);
        // One that was made for several queues also takes somebody who wants one.
        let (same, _queue) = Tap::open(tap.name(), 1, true).unwrap();
        assert_eq!(same.name(), tap.name());
    }

    #[test]
    fn a_busy_single_queue_tap_is_explained() {
        let Some((tap, _queues)) = open("vnbusy%d", 1) else {
            return;
        };
        let error = Tap::open(tap.name(), 2, true).unwrap_err();
        assert!(error.to_string().contains("without multi_queue"), "{error}");
        assert!(matches!(
            Tap::open(tap.name(), 1, true).unwrap_err(),
            SysError::TapMismatch { .. }
        ));
    }

    #[test]
    fn impossible_names_are_refused_before_the_kernel_sees_them() {
        for name in ["", "a/b", "sixteen-bytes-xx", "a b", "a\0b"] {
            assert!(
                matches!(
                    Tap::open(name, 1, false),
                    Err(SysError::InterfaceName { .. })
                ),
                "{name:?}"
            );
        }
    }

    #[test]
    fn te21_a_missing_right_says_what_to_do() {
        let error = SysError::TapPermission {
            name: "tap0".to_owned(),
            queues: 2,
        };
        let text = error.to_string();
        assert!(
            text.contains("CAP_NET_ADMIN")
                && text.contains("ip tuntap add dev tap0 mode tap user $USER multi_queue")
        );
    }

    #[test]
    fn what_is_no_tap_is_not_taken_over() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(
            TapQueue::from_owned(socket.into()),
            Err(SysError::WrongKind { .. })
        ));
    }
}
