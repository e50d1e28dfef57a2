//! AF_XDP: packets of a network interface's queue, shared with the kernel in rings over memory of our own.
//!
//! [`XdpProgram`] hands what the interface receives to [`XdpSocket`]s, one for each of its queues. A socket has four rings
//! ([`XdpRings`]): the process gives empty chunks of its memory to the fill ring and gets them back, with frames in them, from
//! the receive ring; chunks with frames that it gives to the transmit ring come back in the completion ring. The memory is
//! registered by whoever owns it (`virtnet-mem`).
//!
//! Nothing here has a safe wrapper elsewhere, so these modules speak to libc. Source: Documentation/networking/af_xdp.rst.

mod program;
mod ring;

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use program::{XdpAttach, XdpProgram};
pub use ring::{Consumer, Producer, XdpDesc};

use crate::error::SysError;
use ring::Mapped;

/// Bytes that the kernel keeps free in front of a frame it puts into a chunk. Source: linux/bpf.h, XDP_PACKET_HEADROOM
pub const XDP_HEADROOM: usize = 256;

/// How a socket is to share its memory with the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpMode {
    /// Without copying where the driver can do that.
    #[default]
    Auto,
    /// The kernel copies: works with every driver.
    Copy,
    /// The card reads and writes our memory, or it is an error.
    ZeroCopy,
}

/// How a socket came to be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpBound {
    /// The card reads and writes our memory.
    pub zero_copy: bool,
    /// A frame may have several chunks.
    pub multi_buffer: bool,
}

/// The rings of a socket. A part that only receives has no transmit ring.
#[derive(Debug)]
pub struct XdpRings {
    /// Empty chunks, by their offset in the memory.
    pub fill: Producer<u64>,
    /// Frames that have arrived.
    pub rx: Consumer<XdpDesc>,
    /// Chunks whose frames have been sent.
    pub completion: Consumer<u64>,
    /// Frames to send.
    pub tx: Option<Producer<XdpDesc>>,
}

/// What the kernel has counted at a socket since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpStatistics {
    /// Frames that found no chunk or did not fit into one.
    pub rx_dropped: u64,
    /// Frames that found the receive ring full.
    pub rx_ring_full: u64,
    /// Times that the fill ring was empty.
    pub fill_ring_empty: u64,
    /// Descriptors of ours that the kernel would not send.
    pub tx_invalid: u64,
}

/// A socket for one queue of an interface.
#[derive(Debug)]
pub struct XdpSocket {
    fd: OwnedFd,
}

impl XdpSocket {
    /// Makes a socket that is not bound yet.
    ///
    /// # Errors
    /// [`SysError::Refused`]: the kernel has no such sockets, or the right to have one (CAP_NET_RAW) is missing.
    pub fn new() -> Result<Self, SysError> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: a plain system call.
        let fd = unsafe { libc::socket(libc::AF_XDP, kind, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            let remedy = match error.raw_os_error() {
                Some(libc::EAFNOSUPPORT) => {
                    "this kernel is built without them (CONFIG_XDP_SOCKETS): use af-packet, which every kernel has"
                }
                Some(libc::EPERM) => "run as root or with CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF",
                _ => "see socket(2)",
            };
            return Err(SysError::refused("open an AF_XDP socket", remedy, error));
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Makes the rings: `rx` entries to receive with, and `tx` to send, or none. Both are powers of two. The memory must be
    /// registered.
    ///
    /// # Errors
    /// [`SysError::Os`]: the numbers are impossible, or memory is short; [`SysError::Refused`] before Linux 5.4.
    pub fn make_rings(&self, rx: u32, tx: Option<u32>) -> Result<XdpRings, SysError> {
        let failed = |error| SysError::os("make the rings of an AF_XDP socket", error);
        let sizes = [
            (libc::XDP_UMEM_FILL_RING, rx),
            (libc::XDP_UMEM_COMPLETION_RING, tx.unwrap_or(1)),
            (libc::XDP_RX_RING, rx),
        ];
        let tx_size = tx.map(|tx| (libc::XDP_TX_RING, tx));
        for (option, size) in sizes.into_iter().chain(tx_size) {
            self.set(option, &size).map_err(failed)?;
        }
        let mut offsets = libc::xdp_mmap_offsets {
            rx: NO_OFFSET,
            tx: NO_OFFSET,
            fr: NO_OFFSET,
            cr: NO_OFFSET,
        };
        let told = self
            .get(libc::XDP_MMAP_OFFSETS, &mut offsets)
            .map_err(failed)?;
        if told < size_of::<libc::xdp_mmap_offsets>() {
            let error = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            let remedy = "Linux 5.4 or newer is needed";
            return Err(SysError::refused("use AF_XDP rings", remedy, error));
        }
        Ok(XdpRings {
            fill: Producer::new(self.map(libc::XDP_UMEM_PGOFF_FILL_RING, offsets.fr, rx)?),
            rx: Consumer::new(self.map(0, offsets.rx, rx)?),
            completion: Consumer::new(self.map(
                libc::XDP_UMEM_PGOFF_COMPLETION_RING,
                offsets.cr,
                tx.unwrap_or(1),
            )?),
            tx: match tx {
                Some(tx) => Some(Producer::new(self.map(PGOFF_TX_RING, offsets.tx, tx)?)),
                None => None,
            },
        })
    }

    /// Binds it to a queue of the interface with this number; from now on the kernel takes chunks out of the fill ring.
    ///
    /// # Errors
    /// [`SysError::Refused`]: there is no such queue, another socket has it, or the driver cannot do without copying.
    pub fn bind(
        &self,
        interface: &str,
        index: u32,
        queue: u32,
        mode: XdpMode,
    ) -> Result<XdpBound, SysError> {
        let how = match mode {
            XdpMode::Auto => 0,
            XdpMode::Copy => libc::XDP_COPY,
            XdpMode::ZeroCopy => libc::XDP_ZEROCOPY,
        } | libc::XDP_USE_NEED_WAKEUP;
        // Kernels before 6.6, and some drivers without copying, know frames of one chunk only.
        let several = self.bind_as(index, queue, how | libc::XDP_USE_SG);
        let one = |_| self.bind_as(index, queue, how);
        let multi_buffer = several.is_ok();
        several.or_else(one).map_err(|error| {
            let remedy = match error.raw_os_error() {
                Some(libc::EBUSY) => "another AF_XDP socket has this queue: end that program first",
                Some(libc::EINVAL) => "the interface has no such queue: see `ethtool -l`",
                Some(libc::EOPNOTSUPP) if mode == XdpMode::ZeroCopy => {
                    "its driver cannot do without copying: say mode=auto or mode=copy"
                }
                Some(libc::ENOENT) if mode == XdpMode::ZeroCopy => {
                    "its device cannot have a queue reset for that (virtio, RING_RESET): say mode=auto or mode=copy"
                }
                Some(libc::ENETDOWN) => "bring it up first: `ip link set up`",
                _ => "see AF_XDP in the kernel's documentation",
            };
            SysError::refused(
                format!("bind to queue {queue} of {interface}"),
                remedy,
                error,
            )
        })?;
        let mut options = libc::xdp_options { flags: 0 };
        let zero_copy = self.get(libc::XDP_OPTIONS, &mut options).is_ok()
            && options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0;
        Ok(XdpBound {
            zero_copy,
            multi_buffer,
        })
    }

    /// Lets so many bytes be on their way out at once, as far as that is allowed; the ring is the limit then.
    pub fn widen(&self, bytes: u64) {
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX / 2);
        let set = |option| {
            // SAFETY: the kernel reads an integer during the call.
            unsafe {
                libc::setsockopt(
                    self.fd.as_raw_fd(),
                    libc::SOL_SOCKET,
                    option,
                    (&raw const bytes).cast(),
                    4,
                )
            }
        };
        if set(libc::SO_SNDBUFFORCE) < 0 {
            set(libc::SO_SNDBUF);
        }
    }

    /// Has the kernel send what is in the transmit ring.
    ///
    /// # Errors
    /// Nothing is wrong with EAGAIN, EBUSY and ENOBUFS: some of it is still there.
    pub fn kick_tx(&self) -> io::Result<()> {
        let (none, flags) = (std::ptr::null(), libc::MSG_DONTWAIT);
        // SAFETY: a message of no bytes and without an address.
        let sent =
            unsafe { libc::sendto(self.fd.as_raw_fd(), none, 0, flags, std::ptr::null(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Has the driver look at the fill ring again.
    pub fn kick_rx(&self) {
        let (none, flags) = (std::ptr::null_mut(), libc::MSG_DONTWAIT);
        // SAFETY: receives into no bytes, and no address is asked for.
        unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                none,
                0,
                flags,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
        }
    }

    /// What the kernel has counted.
    ///
    /// # Errors
    /// None in practice.
    pub fn statistics(&self) -> io::Result<XdpStatistics> {
        let mut found = libc::xdp_statistics {
            rx_dropped: 0,
            rx_invalid_descs: 0,
            tx_invalid_descs: 0,
            rx_ring_full: 0,
            rx_fill_ring_empty_descs: 0,
            tx_ring_empty_descs: 0,
        };
        self.get(libc::XDP_STATISTICS, &mut found)?;
        Ok(XdpStatistics {
            rx_dropped: found.rx_dropped,
            rx_ring_full: found.rx_ring_full,
            fill_ring_empty: found.rx_fill_ring_empty_descs,
            tx_invalid: found.tx_invalid_descs,
        })
    }

    /// Takes out the error that made the socket ready, if one did: its interface is gone.
    #[must_use]
    pub fn take_error(&self) -> Option<io::Error> {
        rustix::net::sockopt::socket_error(&self.fd)
            .unwrap_or_else(Err)
            .err()
            .map(io::Error::from)
    }

    fn bind_as(&self, index: u32, queue: u32, flags: u16) -> io::Result<()> {
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::sa_family_t::try_from(libc::AF_XDP).unwrap_or_default(),
            sxdp_flags: flags,
            sxdp_ifindex: index,
            sxdp_queue_id: queue,
            sxdp_shared_umem_fd: 0,
        };
        let len = length_of::<libc::sockaddr_xdp>();
        // SAFETY: the kernel reads `len` bytes of the address during the call.
        check(unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), len) })
    }

    fn map<T: Copy>(
        &self,
        place: u64,
        offset: libc::xdp_ring_offset,
        size: u32,
    ) -> Result<Mapped<T>, SysError> {
        Mapped::new(self.fd.as_fd(), place, offset, size)
            .map_err(|error| SysError::os("map a ring of an AF_XDP socket", error))
    }

    fn set<T>(&self, option: i32, value: &T) -> io::Result<()> {
        let (fd, value) = (self.fd.as_raw_fd(), std::ptr::from_ref(value).cast());
        // SAFETY: the kernel reads a plain struct during the call.
        check(unsafe { libc::setsockopt(fd, libc::SOL_XDP, option, value, length_of::<T>()) })
    }

    /// How many bytes of `value` the kernel has filled in.
    fn get<T>(&self, option: i32, value: &mut T) -> io::Result<usize> {
        let mut len = length_of::<T>();
        let (fd, value) = (self.fd.as_raw_fd(), std::ptr::from_mut(value).cast());
        // SAFETY: the kernel writes at most `len` bytes of a plain struct of numbers.
        check(unsafe { libc::getsockopt(fd, libc::SOL_XDP, option, value, &raw mut len) })?;
        Ok(len as usize)
    }
}

impl AsFd for XdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where the transmit ring is mapped.
const PGOFF_TX_RING: u64 = 0x8000_0000;

const NO_OFFSET: libc::xdp_ring_offset = libc::xdp_ring_offset {
    producer: 0,
    consumer: 0,
    desc: 0,
    flags: 0,
};

/// How many queues an interface receives on now; 1 where it does not say.
///
/// # Errors
/// There is no socket to ask through.
pub fn receive_queues(interface: &str) -> io::Result<u32> {
    /// The kernel's `struct ethtool_channels`.
    #[repr(C)]
    #[derive(Default)]
    struct Channels {
        command: u32,
        max: [u32; 4],
        rx: u32,
        tx: u32,
        other: u32,
        combined: u32,
    }
    const ETHTOOL_GCHANNELS: u32 = 0x3c;
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor was just made and is nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut channels = Channels {
        command: ETHTOOL_GCHANNELS,
        ..Channels::default()
    };
    let request = MaybeUninit::<libc::ifreq>::zeroed();
    // SAFETY: all zeros is a valid value of this plain struct.
    let mut request = unsafe { request.assume_init() };
    let bytes = interface.as_bytes().iter().take(libc::IFNAMSIZ - 1);
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut channels).cast();
    // SAFETY: the kernel reads the request and writes the channels that it names, which are as long as it thinks.
    let asked = unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if asked < 0 {
        return Ok(1);
    }
    Ok(channels.rx.saturating_add(channels.combined).max(1))
}

fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default()
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
