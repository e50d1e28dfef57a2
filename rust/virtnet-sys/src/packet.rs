//! Packet sockets: every frame of a network interface, in and out, beside the kernel's own network stack.
//!
//! Frames come in a ring that is shared with the kernel ([`PacketRing`]) and go in batches, one system call each, with a
//! virtio-net header in front (10 bytes, little-endian): the
//! kernel hands over and accepts packets that are not segmented or checksummed yet. VLAN tags, which the kernel keeps beside
//! a frame, are put back into it. What the host itself sends on the interface is not received. Several sockets may share what
//! arrives, flow by flow.
//!
//! `recvmmsg` and the options of a packet socket have no safe wrapper, so this module speaks to libc.

mod fanout;
mod ring;

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use ring::PacketRing;

use fanout::Fanout;

use crate::error::SysError;

/// Bytes of the virtio-net header in front of every frame.
pub const PACKET_HEADER_LEN: usize = 10;

/// Frames that go in or out with one system call.
pub const PACKET_BATCH: usize = 32;

/// The longest frame: the largest segment, an Ethernet header and two tags.
pub const PACKET_FRAME_MAX: usize = 65_535 + 14 + 8;

/// A slot of a batch: the header, then the frame. One that comes has its addresses where a tag has room behind them.
const ADDRESSES: usize = 12;
const TAG: usize = ADDRESSES + 12;
const REST: usize = TAG + 4;
const SLOT: usize = REST + PACKET_FRAME_MAX - 12 + 3;

/// The option's numbers, where libc has no name for them. Source: linux/if_packet.h
const PACKET_IGNORE_OUTGOING: i32 = 23;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// Room for the one control message there is.
const CONTROL: usize = 64;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

/// Frames of one system call.
pub struct PacketBatch {
    bytes: Box<[u8]>,
    frames: [Frame; PACKET_BATCH],
    len: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Frame {
    start: usize,
    end: usize,
    tag_put_back: bool,
    /// It did not fit.
    cut: bool,
}

/// One frame of a batch.
#[derive(Clone, Copy, Debug)]
pub struct PacketFrame<'a> {
    /// The virtio-net header.
    pub header: &'a [u8; PACKET_HEADER_LEN],
    /// The frame.
    pub bytes: &'a [u8],
    /// The kernel had taken out a VLAN tag; what the header says of places in the frame is without it.
    pub tag_put_back: bool,
}

impl std::fmt::Debug for PacketBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PacketBatch({} frames)", self.len)
    }
}

impl Default for PacketBatch {
    fn default() -> Self {
        Self {
            bytes: vec![0; SLOT * PACKET_BATCH].into(),
            frames: [Frame::default(); PACKET_BATCH],
            len: 0,
        }
    }
}

impl PacketBatch {
    /// How many frames it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Frame `i`; `None` for one that was longer than any there should be.
    #[must_use]
    pub fn get(&self, i: usize) -> Option<PacketFrame<'_>> {
        let frame = self.frames.get(..self.len)?.get(i).filter(|f| !f.cut)?;
        let slot = &self.bytes[i * SLOT..(i + 1) * SLOT];
        Some(PacketFrame {
            header: slot.first_chunk()?,
            bytes: slot.get(frame.start..frame.end)?,
            tag_put_back: frame.tag_put_back,
        })
    }

    /// Forgets all frames.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends a frame of `frame_len` bytes, which `write` puts in place; false when there is no room.
    pub fn push(
        &mut self,
        header: [u8; PACKET_HEADER_LEN],
        frame_len: usize,
        write: impl FnOnce(&mut [u8]),
    ) -> bool {
        if self.len == PACKET_BATCH || frame_len > PACKET_FRAME_MAX {
            return false;
        }
        let slot = &mut self.bytes[self.len * SLOT..(self.len + 1) * SLOT];
        let end = PACKET_HEADER_LEN + frame_len;
        slot[..PACKET_HEADER_LEN].copy_from_slice(&header);
        write(&mut slot[PACKET_HEADER_LEN..end]);
        self.frames[self.len] = Frame {
            start: PACKET_HEADER_LEN,
            end,
            ..Frame::default()
        };
        self.len += 1;
        true
    }
}

impl PacketSocket {
    /// Opens `queues` sockets (at least one) on an interface, which from now on hand over every frame that arrives, all frames of a
    /// flow to the same of them; with `promiscuous` also frames for other stations.
    ///
    /// # Errors
    /// [`SysError::Os`]: there is no such interface, or the right to look at all packets (CAP_NET_RAW) is missing;
    /// [`SysError::Refused`]: the kernel cannot have several, or not while the interface is down.
    pub fn open(
        interface: &str,
        promiscuous: bool,
        queues: u32,
    ) -> Result<Vec<(Self, PacketRing)>, SysError> {
        if queues <= 1 {
            let (socket, ring, index) = Self::prepared(interface, promiscuous)?;
            socket.bind(index).map_err(|error| {
                SysError::os(format!("bind a packet socket on {interface}"), error)
            })?;
            return Ok(vec![(socket, ring)]);
        }
        let mut fanout = Fanout::of(interface, queues);
        let mut sockets = Vec::new();
        for _ in 0..queues {
            let (socket, ring, index) = Self::prepared(interface, promiscuous)?;
            fanout.join(&socket, index)?;
            sockets.push((socket, ring));
        }
        // Together, so that no flow changes from one to another.
        for (socket, _) in &sockets {
            fanout.open(socket)?;
        }
        Ok(sockets)
    }

    /// A socket with its ring that is to be bound, and the interface's number.
    fn prepared(interface: &str, promiscuous: bool) -> Result<(Self, PacketRing, i32), SysError> {
        let what = |what: &str| format!("{what} a packet socket on {interface}");
        let (socket, index) = Self::unbound(interface)?;
        for option in [
            libc::PACKET_VNET_HDR,
            libc::PACKET_AUXDATA,
            PACKET_IGNORE_OUTGOING,
        ] {
            socket
                .set(option, &1_i32)
                .map_err(|error| SysError::os(what("set up"), error))?;
        }
        let ring = PacketRing::new(&socket)
            .map_err(|error| SysError::os(what("share memory with"), error))?;
        if promiscuous {
            socket
                .join_all(index)
                .map_err(|error| SysError::os(what("have all frames on"), error))?;
        }
        Ok((socket, ring, index))
    }

    /// A socket that receives nothing yet, and the interface's number.
    fn unbound(interface: &str) -> Result<(Self, i32), SysError> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: a plain system call; protocol 0 receives nothing before it is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => " (needs root or CAP_NET_RAW)",
                _ => "",
            };
            return Err(SysError::os(
                format!("open a packet socket on {interface}") + remedy,
                error,
            ));
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let socket = Self { fd };
        let index = rustix::net::netdevice::name_to_index(&socket.fd, interface)
            .map_err(|errno| SysError::os(format!("find interface {interface:?}"), errno))?;
        let index = i32::try_from(index).unwrap_or_default();
        Ok((socket, index))
    }

    /// Receives frames that are too long for the ring, up to `max` and to [`PACKET_BATCH`], instead of what is in `batch`; how many.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there are none; others say that the interface went down, once.
    fn receive(&self, batch: &mut PacketBatch, max: usize) -> io::Result<usize> {
        batch.clear();
        let n = max.min(PACKET_BATCH);
        let mut controls = [[0_u64; CONTROL / 8]; PACKET_BATCH];
        // SAFETY: all zeros is a valid value of these plain structs: no buffers.
        let mut pieces: [[libc::iovec; 3]; PACKET_BATCH] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; PACKET_BATCH] = unsafe { zeroed() };
        let slots = batch.bytes.chunks_exact_mut(SLOT);
        for (((slot, pieces), control), message) in slots
            .zip(&mut pieces)
            .zip(&mut controls)
            .zip(&mut messages)
            .take(n)
        {
            let (front, rest) = slot.split_at_mut(REST);
            let (header, addresses) = front.split_at_mut(ADDRESSES);
            let parts = [
                &mut header[..PACKET_HEADER_LEN],
                &mut addresses[..TAG - ADDRESSES],
                rest,
            ];
            for (piece, part) in pieces.iter_mut().zip(parts) {
                *piece = libc::iovec {
                    iov_base: part.as_mut_ptr().cast(),
                    iov_len: part.len(),
                };
            }
            message.msg_hdr.msg_iov = pieces.as_mut_ptr();
            message.msg_hdr.msg_iovlen = pieces.len();
            message.msg_hdr.msg_control = control.as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = CONTROL;
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
            let frame_len = (message.msg_len as usize).saturating_sub(PACKET_HEADER_LEN);
            let tag = tag_of(&message.msg_hdr);
            let slot = &mut batch.bytes[i * SLOT..(i + 1) * SLOT];
            let start = match tag {
                Some(tag) => {
                    slot[TAG..REST].copy_from_slice(&tag);
                    ADDRESSES
                }
                // Next to the rest, where the tag would be.
                None => {
                    slot.copy_within(ADDRESSES..TAG, ADDRESSES + 4);
                    ADDRESSES + 4
                }
            };
            let rest = frame_len.saturating_sub(TAG - ADDRESSES);
            let end = if frame_len < TAG - ADDRESSES {
                start + frame_len
            } else {
                REST + rest
            };
            batch.frames[i] = Frame {
                start,
                end,
                tag_put_back: tag.is_some(),
                cut: end > SLOT || message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            };
        }
        batch.len = received;
        Ok(received)
    }

    /// How many frames the kernel has lost since the last time this was asked, because they were not taken out fast enough.
    ///
    /// # Errors
    /// None in practice.
    pub fn take_lost(&self) -> io::Result<u32> {
        let mut found = libc::tpacket_stats {
            tp_packets: 0,
            tp_drops: 0,
        };
        let mut len = libc::socklen_t::try_from(size_of_val(&found)).unwrap_or_default();
        let (fd, value) = (self.fd.as_raw_fd(), (&raw mut found).cast());
        // SAFETY: the kernel writes at most `len` bytes of a plain struct of numbers.
        let asked = unsafe {
            let option = libc::PACKET_STATISTICS;
            libc::getsockopt(fd, libc::SOL_PACKET, option, value, &raw mut len)
        };
        check(asked)?;
        Ok(found.tp_drops)
    }

    /// Sends the frames of a batch from the `first` on; how many were accepted.
    ///
    /// # Errors
    /// None was accepted, and why: [`io::ErrorKind::WouldBlock`] if the kernel has no room, anything else concerns the first
    /// frame or the interface.
    pub fn send(&self, batch: &PacketBatch, first: usize) -> io::Result<usize> {
        // SAFETY: all zeros is a valid value of these plain structs: no buffers.
        let mut pieces: [libc::iovec; PACKET_BATCH] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; PACKET_BATCH] = unsafe { zeroed() };
        let mut n = 0;
        for (i, frame) in batch.frames.iter().enumerate().take(batch.len).skip(first) {
            let bytes = &batch.bytes[i * SLOT..i * SLOT + frame.end];
            pieces[n] = libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            };
            messages[n].msg_hdr.msg_iov = &raw mut pieces[n];
            messages[n].msg_hdr.msg_iovlen = 1;
            n += 1;
        }
        if n == 0 {
            return Ok(0);
        }
        let count = libc::c_uint::try_from(n).unwrap_or_default();
        // SAFETY: the first `n` messages name bytes of `batch`, which the kernel only reads, during the call.
        let sent = unsafe { libc::sendmmsg(self.fd.as_raw_fd(), messages.as_mut_ptr(), count, 0) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Has the interface receive what is for other stations too, as long as the socket is open.
    fn join_all(&self, index: i32) -> io::Result<()> {
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut membership: libc::packet_mreq = unsafe { zeroed() };
        membership.mr_ifindex = index;
        membership.mr_type = u16::try_from(libc::PACKET_MR_PROMISC).unwrap_or_default();
        self.set(libc::PACKET_ADD_MEMBERSHIP, &membership)
    }

    /// Takes out the error that made the socket ready, if one did: the interface went down, or is gone.
    #[must_use]
    pub fn take_error(&self) -> Option<io::Error> {
        rustix::net::sockopt::socket_error(&self.fd)
            .unwrap_or_else(Err)
            .err()
            .map(io::Error::from)
    }

    /// Lets so many bytes of frames wait in the socket's queue, as far as that is allowed.
    fn widen(&self, bytes: i32) {
        let set = |option| {
            let (fd, value) = (self.fd.as_raw_fd(), (&raw const bytes).cast());
            // SAFETY: the kernel reads an integer during the call.
            unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, value, 4) }
        };
        if set(libc::SO_RCVBUFFORCE) < 0 {
            set(libc::SO_RCVBUF);
        }
    }

    fn set<T>(&self, option: i32, value: &T) -> io::Result<()> {
        let len = libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default();
        let (fd, value) = (self.fd.as_raw_fd(), std::ptr::from_ref(value).cast());
        // SAFETY: the kernel reads `len` bytes of `value`, a plain struct, during the call.
        check(unsafe { libc::setsockopt(fd, libc::SOL_PACKET, option, value, len) })
    }

    fn bind(&self, index: i32) -> io::Result<()> {
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::sa_family_t::try_from(libc::AF_PACKET).unwrap_or_default();
        address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap_or_default().to_be();
        address.sll_ifindex = index;
        let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap_or_default();
        // SAFETY: the kernel reads `len` bytes of the address during the call.
        check(unsafe { libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), len) })
    }
}

/// Has an interface receive frames for other stations too, for as long as this value lives.
#[derive(Debug)]
pub struct Promiscuous {
    _socket: PacketSocket,
}

impl Promiscuous {
    /// Switches it on for the interface of this name.
    ///
    /// # Errors
    /// As [`PacketSocket::open`].
    pub fn on(interface: &str) -> Result<Self, SysError> {
        let (socket, index) = PacketSocket::unbound(interface)?;
        socket.join_all(index).map_err(|error| {
            SysError::os(format!("have all frames of {interface} received"), error)
        })?;
        Ok(Self { _socket: socket })
    }
}

impl AsFd for PacketSocket {
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

/// The VLAN tag that the kernel has taken out of a frame, as it was there.
fn tag_of(message: &libc::msghdr) -> Option<[u8; 4]> {
    // SAFETY: the kernel has filled in the message, whose control buffer is still there.
    let control = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: it is null or points into that buffer, which is aligned and long enough for a header.
    let control = unsafe { control.as_ref() }?;
    let wanted = (libc::SOL_PACKET, libc::PACKET_AUXDATA);
    let needed = size_of::<libc::cmsghdr>() + size_of::<libc::tpacket_auxdata>();
    if (control.cmsg_level, control.cmsg_type) != wanted || control.cmsg_len < needed {
        return None;
    }
    // SAFETY: the message is as long as its length says, which has room for the struct.
    let data = unsafe { libc::CMSG_DATA(control) };
    // SAFETY: as above; the struct is plain numbers, and nothing is said about its alignment.
    let data: libc::tpacket_auxdata =
        unsafe { data.cast::<libc::tpacket_auxdata>().read_unaligned() };
    if data.tp_status & TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let kind = if data.tp_status & TP_STATUS_VLAN_TPID_VALID == 0 {
        0x8100
    } else {
        data.tp_vlan_tpid
    };
    let ([a, b], [c, d]) = (kind.to_be_bytes(), data.tp_vlan_tci.to_be_bytes());
    Some([a, b, c, d])
}
