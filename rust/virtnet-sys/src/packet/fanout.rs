//! Several packet sockets as the queues of one interface: each flow on one of them, in both of its directions.
//!
//! The kernel hashes a frame's addresses and ports (frames without any, such as ARP, go to one socket all). A group has a number
//! that the kernel gives out, so nobody has it already, and room for its own sockets only, so nobody joins it later: whoever did would
//! take flows away. It ends with its last socket. Source: packet(7), PACKET_FANOUT; net/packet/af_packet.c.

use std::io;
use std::os::fd::AsRawFd;

use super::{PacketSocket, check};
use crate::error::SysError;

/// The option's flags, where libc has no name for them. Source: linux/if_packet.h
const PACKET_FANOUT_FLAG_UNIQUEID: u16 = 0x2000;
const PACKET_FANOUT_FLAG_IGNORE_OUTGOING: u16 = 0x4000;

/// The kernel's `struct fanout_args`, on a little-endian machine.
#[repr(C)]
struct FanoutArgs {
    id: u16,
    kind: u16,
    max_members: u32,
}

/// A group of sockets that is being made.
pub(super) struct Fanout<'a> {
    interface: &'a str,
    members: u32,
    id: Option<u16>,
}

impl<'a> Fanout<'a> {
    /// A group that will have `members` sockets, all of them on `interface`.
    pub(super) fn of(interface: &'a str, members: u32) -> Self {
        Self {
            interface,
            members,
            id: None,
        }
    }

    /// Binds a socket and makes it the group's next. It receives nothing before it is [opened](Self::open), since a socket that is
    /// bound and no member yet would have every frame once more.
    pub(super) fn join(&mut self, socket: &PacketSocket, index: i32) -> Result<(), SysError> {
        let what = || format!("bind one of several packet sockets on {}", self.interface);
        let failed = |error| SysError::os(what(), error);
        filter(socket, &NOTHING).map_err(failed)?;
        socket.bind(index).map_err(failed)?;
        let kind = u16::try_from(libc::PACKET_FANOUT_HASH).unwrap_or_default()
            | PACKET_FANOUT_FLAG_IGNORE_OUTGOING;
        let args = FanoutArgs {
            id: self.id.unwrap_or_default(),
            kind: match self.id {
                Some(_) => kind,
                None => kind | PACKET_FANOUT_FLAG_UNIQUEID,
            },
            max_members: self.members,
        };
        if let Err(error) = socket.set(libc::PACKET_FANOUT, &args) {
            let is_down = |error: io::Error| error.raw_os_error() == Some(libc::ENETDOWN);
            let remedy = match error.raw_os_error() {
                Some(libc::EINVAL) if socket.take_error().is_some_and(is_down) => format!(
                    "it is down, and this kernel wants it up for that: `ip link set {} up`",
                    self.interface
                ),
                Some(libc::EINVAL) => "several need Linux 5.11; open one (queues=1)".to_owned(),
                _ => return Err(failed(error)),
            };
            return Err(SysError::refused(what(), remedy, error));
        }
        if self.id.is_none() {
            self.id = Some(group_of(socket).map_err(failed)?);
        }
        Ok(())
    }

    /// Lets a member receive what arrives.
    pub(super) fn open(&self, socket: &PacketSocket) -> Result<(), SysError> {
        let what = || format!("receive by several packet sockets on {}", self.interface);
        filter(socket, &INCOMING).map_err(|error| SysError::os(what(), error))
    }
}

/// The number of the group that a socket is in.
fn group_of(socket: &PacketSocket) -> io::Result<u16> {
    let mut found = 0_u32;
    let mut len = libc::socklen_t::try_from(size_of_val(&found)).unwrap_or_default();
    let (fd, value) = (socket.fd.as_raw_fd(), (&raw mut found).cast());
    // SAFETY: the kernel writes at most `len` bytes of a number.
    let asked = unsafe {
        let option = libc::PACKET_FANOUT;
        libc::getsockopt(fd, libc::SOL_PACKET, option, value, &raw mut len)
    };
    check(asked)?;
    // The number is the lower half, what kind of group it is the upper one.
    Ok((found & 0xffff) as u16)
}

/// Codes of a filter's instructions, what stands for a packet's type among the bytes to load, and the type of one that is sent.
/// Source: Documentation/networking/filter.rst; linux/bpf_common.h, linux/filter.h, linux/if_packet.h
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const PACKET_TYPE: u32 = 0xffff_f004;
const OUTGOING: u32 = 4;

/// An instruction: its code, how many to leave out if a comparison holds, and its operand.
const fn instruction(code: u16, jt: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf: 0, k }
}

/// Takes no frame.
const NOTHING: [libc::sock_filter; 1] = [instruction(RETURN, 0, 0)];

/// Takes what arrives, and not what is sent: kernels before 6.2 know nothing of the flag that keeps that from a group, and later ones
/// with it do not even come here.
const INCOMING: [libc::sock_filter; 4] = [
    instruction(LOAD_WORD, 0, PACKET_TYPE),
    instruction(JUMP_IF_EQUAL, 1, OUTGOING),
    instruction(RETURN, 0, u32::MAX),
    instruction(RETURN, 0, 0),
];

/// Has a socket take only what a filter says, from now on.
fn filter(socket: &PacketSocket, program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or_default(),
        filter: program.as_ptr().cast_mut(),
    };
    let len = libc::socklen_t::try_from(size_of_val(&program)).unwrap_or_default();
    let (fd, value) = (socket.fd.as_raw_fd(), (&raw const program).cast());
    // SAFETY: the kernel reads the struct and the instructions it names, which outlive the call.
    let set = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, value, len) };
    check(set)
}
