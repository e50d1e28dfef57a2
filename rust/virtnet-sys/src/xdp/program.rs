//! The program that an interface runs for each packet it receives, and its attachment.
//!
//! It is six instructions long, so it is written down here: no compiler and no library is needed on the host. A packet goes to
//! the socket of the queue it came in on; where that queue has none, it goes on to the host's own network stack.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::XdpSocket;
use crate::error::SysError;

/// How a program is to be attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpAttach {
    /// To the driver where that knows XDP, to the network stack otherwise.
    #[default]
    Auto,
    /// To the driver, or it is an error.
    Native,
    /// To the network stack, behind the driver: slower, for every driver.
    Generic,
}

/// Commands and numbers of bpf(2). Source: linux/bpf.h
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const XDP_PASS: i32 = 2;

/// Parts of the kernel's `union bpf_attr`, each as far as it is used; the kernel takes what is missing for zeros.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    _gap: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instructions_len: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

/// A program that is attached to an interface for as long as this value lives: the kernel takes it off when the process is
/// gone, however it went.
#[derive(Debug)]
pub struct XdpProgram {
    /// First, so that nothing is handed to sockets any more when the map goes.
    _link: OwnedFd,
    _program: OwnedFd,
    map: OwnedFd,
    native: bool,
}

impl XdpProgram {
    /// Attaches a program for up to `queues` sockets to the interface with this name and number.
    ///
    /// # Errors
    /// [`SysError::Refused`]: a right is missing (CAP_BPF and CAP_NET_ADMIN), another program is there, the driver knows no XDP
    /// and [`XdpAttach::Native`] was asked for, or the kernel is older than 5.9.
    pub fn attach(
        interface: &str,
        index: u32,
        queues: u32,
        how: XdpAttach,
    ) -> Result<Self, SysError> {
        let (map, program) = Self::load(queues)?;
        let attach = |flags| {
            let create = LinkCreate {
                program: number(program.as_raw_fd()),
                interface: index,
                attach_type: BPF_XDP,
                flags,
            };
            bpf_fd(BPF_LINK_CREATE, &create)
        };
        let is_taken = |error: &io::Error| error.raw_os_error() == Some(libc::EBUSY);
        let (link, native) = match how {
            XdpAttach::Native => (attach(XDP_FLAGS_DRV_MODE), true),
            XdpAttach::Generic => (attach(XDP_FLAGS_SKB_MODE), false),
            XdpAttach::Auto => match attach(XDP_FLAGS_DRV_MODE) {
                Err(error) if !is_taken(&error) => (attach(XDP_FLAGS_SKB_MODE), false),
                native => (native, true),
            },
        };
        let link =
            link.map_err(|error| refused(format!("attach an XDP program to {interface}"), error))?;
        Ok(Self {
            _link: link,
            _program: program,
            map,
            native,
        })
    }

    /// Loads a program that goes nowhere: whether this kernel and these rights allow it.
    ///
    /// # Errors
    /// [`SysError::Refused`]: why not.
    pub fn try_load() -> Result<(), SysError> {
        Self::load(1).map(drop)
    }

    /// A map for so many sockets, and the program that looks into it.
    fn load(queues: u32) -> Result<(OwnedFd, OwnedFd), SysError> {
        let create = MapCreate {
            map_type: BPF_MAP_TYPE_XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: queues,
        };
        let map = bpf_fd(BPF_MAP_CREATE, &create)
            .map_err(|error| refused("make a map of AF_XDP sockets".to_owned(), error))?;
        // Without this flag, for kernels before 5.18, a native program keeps an interface from long frames.
        let program = load(&map, BPF_F_XDP_HAS_FRAGS)
            .or_else(|_| load(&map, 0))
            .map_err(|error| refused("load an XDP program".to_owned(), error))?;
        Ok((map, program))
    }

    /// Whether it is the driver that runs it.
    #[must_use]
    pub fn is_native(&self) -> bool {
        self.native
    }

    /// Hands the packets of a queue to a socket that is bound to it, until the socket is closed.
    ///
    /// # Errors
    /// [`SysError::Os`]: the program has no room for this queue, or the socket is not bound.
    pub fn redirect(&self, queue: u32, socket: &XdpSocket) -> Result<(), SysError> {
        let value = number(socket.as_fd().as_raw_fd());
        let update = MapUpdate {
            map: number(self.map.as_raw_fd()),
            _gap: 0,
            key: (&raw const queue).addr() as u64,
            value: (&raw const value).addr() as u64,
            flags: 0,
        };
        bpf(BPF_MAP_UPDATE_ELEM, &update)
            .map(drop)
            .map_err(|error| SysError::os(format!("hand queue {queue} to its socket"), error))
    }
}

/// What to do about a refusal.
fn refused(operation: String, error: io::Error) -> SysError {
    let remedy = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW in the first user namespace"
        }
        Some(libc::EBUSY | libc::EEXIST) => {
            "another XDP program is there: end its program, or take it off with `ip link set dev ... xdp off`"
        }
        Some(libc::EOPNOTSUPP) => "its driver knows no XDP: say attach=auto or attach=generic",
        Some(libc::ENOSYS | libc::E2BIG) => "Linux 5.9 or newer is needed",
        Some(libc::EINVAL) => {
            "its driver takes no program now (too few queues, too large an MTU), or Linux is older than 5.9"
        }
        Some(libc::ERANGE) => "its MTU is too large for XDP: make it smaller",
        _ => "see XDP in the kernel's documentation",
    };
    SysError::refused(operation, remedy, error)
}

/// One instruction: operation, destination and source register, offset, immediate. Source: linux/bpf.h, `struct bpf_insn`
fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> [u8; 8] {
    let registers = if cfg!(target_endian = "little") {
        src << 4 | dst
    } else {
        dst << 4 | src
    };
    let ([a, b], [c, d, e, f]) = (offset.to_ne_bytes(), immediate.to_ne_bytes());
    [code, registers, a, b, c, d, e, f]
}

/// `return bpf_redirect_map(map, context->rx_queue_index, XDP_PASS)`
fn redirect_to(map: RawFd) -> [[u8; 8]; 6] {
    /// Offset of `rx_queue_index` in `struct xdp_md`.
    const RX_QUEUE_INDEX: i16 = 16;
    const REDIRECT_MAP: i32 = 51;
    /// Says that the immediate is a map's descriptor.
    const PSEUDO_MAP_FD: u8 = 1;
    [
        instruction(0x61, 2, 1, RX_QUEUE_INDEX, 0), // r2 = *(u32 *)(r1 + 16)
        instruction(0x18, 1, PSEUDO_MAP_FD, 0, map), // r1 = map, in two instructions
        instruction(0, 0, 0, 0, 0),
        instruction(0xb7, 3, 0, 0, XDP_PASS), // r3 = XDP_PASS
        instruction(0x85, 0, 0, 0, REDIRECT_MAP), // call
        instruction(0x95, 0, 0, 0, 0),        // exit
    ]
}

fn load(map: &OwnedFd, flags: u32) -> io::Result<OwnedFd> {
    let instructions = redirect_to(map.as_raw_fd());
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"virtnet_");
    let load = ProgramLoad {
        program_type: BPF_PROG_TYPE_XDP,
        instructions_len: u32::try_from(instructions.len()).unwrap_or_default(),
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags,
        name,
        interface: 0,
        attach_type: BPF_XDP,
    };
    bpf_fd(BPF_PROG_LOAD, &load)
}

fn bpf_fd<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: these commands answer with a new descriptor, which is nobody else's (and close-on-exec, as all of bpf(2) are).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    /// How often the verifier may be interrupted.
    const TRIES: usize = 5;
    let mut tries = 0;
    loop {
        let (at, len) = (std::ptr::from_ref(attributes), size_of::<T>());
        // SAFETY: the kernel reads `len` bytes of a plain struct, and what it points to, which lives as long as the call.
        let answer = unsafe { libc::syscall(libc::SYS_bpf, command, at, len) };
        if answer >= 0 {
            return RawFd::try_from(answer).map_err(io::Error::other);
        }
        let error = io::Error::last_os_error();
        tries += 1;
        if error.raw_os_error() != Some(libc::EAGAIN) || tries == TRIES {
            return Err(error);
        }
    }
}

fn number(fd: RawFd) -> u32 {
    u32::try_from(fd).unwrap_or(u32::MAX)
}
