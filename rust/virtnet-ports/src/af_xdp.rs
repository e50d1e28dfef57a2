//! A network interface of the host as a port, by AF_XDP: an uplink that takes packets before the host's own network stack.
//!
//! A program on the interface hands what it receives to sockets of this port, one for each receive queue, and the host's stack
//! sees none of it. Frames lie in memory shared with the kernel, and with the card where its driver can do that (zero-copy): what
//! is received is copied once, into its receiver's memory. Nothing is left to be done by the interface or by us: frames leave with
//! their checksums, and those that arrive are taken for whole. (An interface of the kernel's own making, such as a veth pair, may
//! leave them undone at its other end: `ethtool -K PEER tx off` ends that.)
//!
//! It guarantees that what the kernel had to drop for us is a counted drop, that a full transmit ring is "no room", that an
//! interface which goes down comes back by itself, that one which is deleted leaves the port quiet, and that nothing stays
//! attached when the port is closed or the process ends.
//!
//! In a packet's way this is a first and a last step with one copy by us on each side, and another by the kernel where it does not
//! share the memory with the card.

mod queue;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use virtnet_mem::{GuestAddr, GuestMemory, Region};
use virtnet_packet::header::ETHERNET_LEN;
use virtnet_packet::{Burst, DropReason, Picks, Port, PortCounters};
use virtnet_sys::{
    Events, LinkWatch, Poller, Promiscuous, SysError, XDP_HEADROOM, XdpAttach, XdpBound, XdpMode,
    XdpProgram, XdpSocket, mtu_of, receive_queues,
};

use queue::{CHUNK, Queue, Sender};

use crate::link::{InterfaceWatch, Link, LinkService};
use crate::{Control, PortError, Served, What};

/// Bytes of a VLAN tag, and what says that there is one.
const TAG_LEN: usize = 4;
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

/// The most queues of an interface that a port takes.
pub const XDP_QUEUES_MAX: u32 = 256;

/// What an AF_XDP port is to be.
#[derive(Clone, Debug)]
pub struct AfXdpOptions {
    /// The interface's name.
    pub interface: String,
    /// How many of its receive queues to take, from the first on; all if not given.
    pub queues: Option<u32>,
    /// Entries of each ring: a power of two. So many frames of a queue can wait for us.
    pub ring_size: u32,
    /// Whether the card shares our memory.
    pub mode: XdpMode,
    /// Where the program is attached.
    pub attach: XdpAttach,
    /// Receive frames for other stations too.
    pub promiscuous: bool,
}

impl AfXdpOptions {
    /// The usual options for an interface.
    #[must_use]
    pub fn new(interface: impl Into<String>) -> Self {
        Self {
            interface: interface.into(),
            queues: None,
            ring_size: 2048,
            mode: XdpMode::Auto,
            attach: XdpAttach::Auto,
            promiscuous: true,
        }
    }
}

/// An interface as a port, or some of its queues as a part of one.
#[derive(Debug)]
pub struct AfXdpPort {
    /// First, so that nothing is handed to sockets any more when these go.
    _program: Arc<XdpProgram>,
    queues: Vec<Queue>,
    /// What leaves, leaves by the first queue.
    sender: Sender,
    memory: Arc<GuestMemory>,
    /// Which queue is asked first.
    turn: usize,
    poller: Poller,
    events: Events,
    link: Arc<Link>,
    counters: PortCounters,
    _watched: Arc<(Served<LinkService>, Option<Promiscuous>)>,
}

impl AfXdpPort {
    /// Opens an interface in as many parts as there are workers, at most one for each queue; at least one.
    ///
    /// # Errors
    /// [`PortError::System`]: which right is missing, what the kernel or the driver cannot do, or who has the queue;
    /// [`PortError::Option`]: the interface has fewer queues, or the size is no power of two.
    pub fn in_lanes(
        options: &AfXdpOptions,
        workers: usize,
        control: &Control,
    ) -> Result<Vec<Self>, PortError> {
        let name = options.interface.as_str();
        let watch = LinkWatch::open(name)?;
        let index = watch.index();
        let found = receive_queues(name)
            .map_err(|source| PortError::io(format!("ask for the queues of {name}"), source))?;
        let queues = check(options, found)?;
        let program = Arc::new(XdpProgram::attach(name, index, queues, options.attach)?);
        let mode = match options.mode {
            XdpMode::ZeroCopy if !program.is_native() => {
                return Err(PortError::Option {
                    option: "mode",
                    found: "zero-copy".to_owned(),
                    expected: format!("auto or copy for {name}, whose driver knows no XDP"),
                });
            }
            // Memory that the card shares gets nothing from a program behind the driver.
            _ if !program.is_native() => XdpMode::Copy,
            mode => mode,
        };
        let promiscuous = options.promiscuous.then(|| Promiscuous::on(name));
        let promiscuous = promiscuous.transpose()?;

        let lanes = workers.clamp(1, queues as usize);
        let mut parts: Vec<Part> = (0..lanes).map(|_| Part::default()).collect();
        for queue in 0..queues {
            let part = &mut parts[queue as usize % lanes];
            part.add(options, index, queue, mode, &program)?;
        }
        let how = match (program.is_native(), parts[0].is_zero_copy()) {
            (true, true) => "native, zero-copy",
            (true, false) => "native, copy",
            (false, _) => "generic, copy",
        };
        let link = Arc::new(Link::new(name, Some(how)));
        link.events.record(What::Attached {
            native: program.is_native(),
            zero_copy: parts[0].is_zero_copy(),
            queues: queues as usize,
        });
        let service = LinkService::new(watch, Arc::clone(&link))?;
        let watched = Arc::new((control.add(service)?, promiscuous));
        let part = |part: Part| part.into_port(&program, &link, &watched);
        parts.into_iter().map(part).collect()
    }

    /// Asks how the interface stands, wherever the port is.
    #[must_use]
    pub fn watch(&self) -> InterfaceWatch {
        InterfaceWatch::of(&self.link)
    }

    /// Nothing will come of a queue any more, and nobody is to be woken for it.
    fn lose(&mut self, at: usize) {
        if let Some(queue) = self.queues.get_mut(at)
            && !queue.gone
        {
            queue.gone = true;
            // It was added when the port was made, and only this takes it out.
            drop(self.poller.remove(&queue.socket));
        }
    }

    fn is_down(&self) -> bool {
        self.queues[0].gone || !self.link.is_up()
    }
}

/// Whether there could be AF_XDP ports here, as far as that can be told without an interface.
///
/// # Errors
/// [`PortError::System`]: what is missing, a right or the kernel's support.
pub fn try_af_xdp() -> Result<(), PortError> {
    XdpSocket::new()?;
    Ok(XdpProgram::try_load()?)
}

/// How many queues to take of an interface that has `found`.
fn check(options: &AfXdpOptions, found: u32) -> Result<u32, PortError> {
    let wrong = |option, found: u32, expected: String| PortError::Option {
        option,
        found: found.to_string(),
        expected,
    };
    if !options.ring_size.is_power_of_two() || !(8..=32_768).contains(&options.ring_size) {
        let expected = "a power of two from 8 to 32768".to_owned();
        return Err(wrong("ring_size", options.ring_size, expected));
    }
    let most = found.min(XDP_QUEUES_MAX);
    let queues = options.queues.unwrap_or(most);
    if queues == 0 || queues > most {
        let name = &options.interface;
        let expected =
            format!("1 to {most}, which is what {name} receives on (`ethtool -l {name}`)");
        return Err(wrong("queues", queues, expected));
    }
    Ok(queues)
}

/// Binds a socket to a queue.
fn bind(
    socket: &XdpSocket,
    name: &str,
    index: u32,
    queue: u32,
    mode: XdpMode,
) -> Result<XdpBound, SysError> {
    // The kernel rather copies frames of several chunks than share memory for frames of one, even where none is longer.
    let longest = mtu_of(name)? as usize + ETHERNET_LEN + 2 * TAG_LEN;
    if mode == XdpMode::Auto && longest <= CHUNK as usize - XDP_HEADROOM {
        let shared = socket.bind(name, index, queue, XdpMode::ZeroCopy);
        return shared.or_else(|_| socket.bind(name, index, queue, XdpMode::Copy));
    }
    socket.bind(name, index, queue, mode)
}

/// A port that is being made.
#[derive(Default)]
struct Part {
    queues: Vec<Queue>,
    sender: Option<Sender>,
    regions: Vec<Region>,
    zero_copy: bool,
}

impl Part {
    fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    fn add(
        &mut self,
        options: &AfXdpOptions,
        index: u32,
        queue: u32,
        mode: XdpMode,
        program: &XdpProgram,
    ) -> Result<(), PortError> {
        let (name, size) = (options.interface.as_str(), options.ring_size);
        let sends = self.sender.is_none();
        let chunks = u64::from(size) * if sends { 2 } else { 1 };
        let bytes = chunks * u64::from(CHUNK);
        let at = GuestAddr(self.regions.iter().map(Region::size).sum());
        let region = Region::anonymous(bytes, at)?;
        let socket = XdpSocket::new()?;
        region
            .register_umem(socket.as_fd(), CHUNK)
            .map_err(|error| {
                SysError::locking(format!("share memory with {name}"), bytes, error)
            })?;
        let rings = socket.make_rings(size, sends.then_some(size))?;
        let number = u32::try_from(self.regions.len()).unwrap_or(u32::MAX);
        let (mut made, tx) = Queue::new(socket, rings, number, size);
        made.fill_all();
        let bound = bind(&made.socket, name, index, queue, mode)?;
        made.zero_copy = bound.zero_copy;
        program.redirect(queue, &made.socket)?;
        if let Some((tx, completion)) = tx {
            made.socket.widen(2 * bytes);
            let sender = Sender::new(tx, completion, size, bound.multi_buffer);
            self.sender = Some(sender);
            self.zero_copy = bound.zero_copy;
        }
        self.regions.push(region);
        self.queues.push(made);
        Ok(())
    }

    fn into_port(
        self,
        program: &Arc<XdpProgram>,
        link: &Arc<Link>,
        watched: &Arc<(Served<LinkService>, Option<Promiscuous>)>,
    ) -> Result<AfXdpPort, PortError> {
        let failed = |source| PortError::io("wait for an AF_XDP socket", source);
        let poller = Poller::new().map_err(failed)?;
        for (token, queue) in self.queues.iter().enumerate() {
            poller.add(&queue.socket, token as u64).map_err(failed)?;
        }
        Ok(AfXdpPort {
            _program: Arc::clone(program),
            events: Events::with_capacity(self.queues.len()),
            queues: self.queues,
            sender: self.sender.ok_or(PortError::NoService)?,
            memory: Arc::new(GuestMemory::new(self.regions)?),
            turn: 0,
            poller,
            link: Arc::clone(link),
            counters: PortCounters::default(),
            _watched: Arc::clone(watched),
        })
    }
}

impl Port for AfXdpPort {
    fn rx(&mut self, burst: &mut Burst) -> usize {
        if self.sender.unsent {
            self.sender.kick(&self.queues[0].socket);
        }
        let before = burst.len();
        burst.set_memory(&self.memory);
        let n = self.queues.len();
        for k in 0..n {
            if burst.room() == 0 {
                break;
            }
            let queue = &mut self.queues[(self.turn + k) % n];
            queue.receive(&self.memory, burst, &mut self.counters);
        }
        self.turn = (self.turn + 1) % n;
        burst.len() - before
    }

    fn complete(&mut self) {
        for queue in &mut self.queues {
            queue.give_back();
        }
    }

    fn tx(&mut self, burst: &Burst, picks: &Picks) -> usize {
        if self.is_down() {
            self.drop_tx(DropReason::PortDown, picks.len());
            return picks.len();
        }
        self.sender.reap();
        let longest = ETHERNET_LEN + self.link.mtu();
        for (done, i) in picks.iter().enumerate() {
            let len = burst.frame_len(i);
            let is_tagged = || {
                TAGS.iter()
                    .any(|tag| burst.head(i).get(12..14) == Some(tag))
            };
            if len > longest && (len > longest + TAG_LEN || !is_tagged()) || !self.sender.takes(len)
            {
                self.drop_tx(DropReason::TooBig, 1);
            } else if len < ETHERNET_LEN {
                self.drop_tx(DropReason::SendError, 1);
            } else if self.sender.send(&self.memory, burst, i) {
                self.counters.sent += 1;
                self.counters.sent_bytes += len as u64;
            } else {
                return done;
            }
        }
        picks.len()
    }

    fn flush(&mut self) {
        self.sender.publish(&self.queues[0].socket);
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.as_fd())
    }

    fn arm(&mut self) -> bool {
        let ready = self.poller.wait(&mut self.events, Some(Duration::ZERO));
        if ready.is_ok_and(|ready| ready > 0) {
            let gone: Vec<_> = self.events.iter().filter(|event| event.hangup).collect();
            for event in gone {
                self.lose(usize::try_from(event.token).unwrap_or(usize::MAX));
            }
        }
        self.sender.wants_another_try() || self.queues.iter().any(Queue::has_frames)
    }

    fn counters(&self) -> PortCounters {
        let mut counters = self.counters;
        for queue in &self.queues {
            queue.count_drops(&mut counters);
        }
        counters
    }
}
