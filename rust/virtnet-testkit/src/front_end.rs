//! A front-end that is written by hand: it says what it is told to, true or not, and drives real rings beside it.
//!
//! [`FrontEnd`] is the socket: any bytes with any descriptors, and requests with their answers. [`FakeVm`] adds what a virtual
//! machine has: a [`FakeGuest`] in memory that can be shared, queue pairs in it, and the events of every ring. It tells a
//! back-end of them all at once ([`FakeVm::start`]) or piece by piece, in whatever order a test likes.
//!
//! It waits for answers, with a deadline; a back-end that does not give one makes it panic.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use virtnet_packet::Offload;
use virtnet_sys::{EventFd, Events, Listener, Poller, Stream};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::{HEADER_LEN as MESSAGE_HEADER_LEN, Header, Reply, Request};
use virtnet_vhost::payload::{LogArea, MemoryTable, VringAddresses, VringFd, VringState};
use virtnet_virtio::{Features, QueueConfig};

use crate::dirty_pages::DirtyPages;
use crate::guest::{
    FakeGuest, GuestQueue, PackedQueue, SplitQueue, length, net_header, offer_frame, packets,
};
use crate::memory::{Backing, VmMemory};

/// How long a back-end may take for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// One end of a vhost-user connection, in the hands of a test.
#[derive(Debug)]
pub struct FrontEnd {
    stream: Stream,
}

impl FrontEnd {
    /// Connects to a back-end as soon as it listens.
    ///
    /// # Panics
    /// When nobody ever listens there.
    #[must_use]
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let mut latest = None;
        let stream = poll(|| {
            Stream::connect(path)
                .map_err(|error| latest = Some(error))
                .ok()
        });
        match stream {
            Some(stream) => Self { stream },
            None => panic!("cannot connect: {latest:?}"),
        }
    }

    /// Speaks over a connection that is there already.
    #[must_use]
    pub fn over(stream: Stream) -> Self {
        Self { stream }
    }

    /// Waits for a back-end that connects.
    ///
    /// # Panics
    /// When none does.
    #[must_use]
    #[track_caller]
    pub fn accept(listener: &Listener) -> Self {
        let stream = poll(|| listener.accept().ok());
        Self {
            stream: stream.expect("a back-end connects"),
        }
    }

    /// Sends bytes, descriptors beside the first of them; whether anybody took them.
    ///
    /// # Panics
    /// When there are more than the socket takes at once.
    #[track_caller]
    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        match self.stream.send(bytes, fds) {
            Ok(sent) => {
                assert_eq!(sent, bytes.len(), "the socket is full");
                true
            }
            Err(error) if error.kind() == ErrorKind::BrokenPipe => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Sends a request and asks for no answer.
    #[track_caller]
    pub fn tell(&self, request: &Request, fds: &[BorrowedFd<'_>]) {
        let mut bytes = Vec::new();
        request.encode(false, &mut bytes);
        self.send_bytes(&bytes, fds);
    }

    /// Sends a request and waits for its answer: its own, or an acknowledgement where that has been agreed on.
    ///
    /// # Panics
    /// When anything else comes, or nothing.
    #[track_caller]
    pub fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Vec<u8> {
        let (payload, files) = self.ask_for_files(request, fds);
        assert!(files.is_empty(), "an answer that carries descriptors");
        payload
    }

    /// The same where the answer carries descriptors.
    ///
    /// # Panics
    /// As [`Self::ask`].
    #[track_caller]
    pub fn ask_for_files(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> (Vec<u8>, Vec<OwnedFd>) {
        let mut bytes = Vec::new();
        request.encode(request.kind().reply() == Reply::Ack, &mut bytes);
        assert!(self.send_bytes(&bytes, fds), "the back-end has gone");
        let (header, payload, files) = self.message();
        assert_eq!(
            (header.request, header.flags),
            (request.kind().code(), 5),
            "the answer to {}",
            request.kind().name()
        );
        (payload, files)
    }

    /// Sends a request and waits for the acknowledgement; whether it was carried out.
    ///
    /// # Panics
    /// As [`Self::ask`].
    #[track_caller]
    pub fn accepts(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> bool {
        match self.ask(request, fds).try_into() {
            Ok(code) => u64::from_ne_bytes(code) == 0,
            Err(other) => panic!("{other:?} is no acknowledgement"),
        }
    }

    /// Sends a request that has to be carried out.
    ///
    /// # Panics
    /// When it is refused, and as [`Self::ask`].
    #[track_caller]
    pub fn insist(&self, request: &Request, fds: &[BorrowedFd<'_>]) {
        let done = self.accepts(request, fds);
        assert!(done, "{} was refused", request.kind().name());
    }

    /// Stops a ring; where.
    ///
    /// # Panics
    /// When the answer is about another ring, and as [`Self::ask`].
    #[track_caller]
    pub fn stop_ring(&self, index: u32) -> u32 {
        let request = Request::GetVringBase(VringState { index, num: 0 });
        let answer = self.ask(&request, &[]);
        assert_eq!(answer.len(), 8, "GET_VRING_BASE was refused");
        let word = |at: usize| [answer[at], answer[at + 1], answer[at + 2], answer[at + 3]];
        assert_eq!(u32::from_ne_bytes(word(0)), index, "another ring's base");
        u32::from_ne_bytes(word(4))
    }

    /// Whether the back-end ends the connection, within a time that it would be impolite to wait longer.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        let mut buffer = [0; 4096];
        poll(|| match self.stream.recv(&mut buffer, &mut Vec::new()) {
            Ok(0) => Some(()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(()),
            _ => None,
        })
        .is_some()
    }

    /// Waits for the next whole message, which has no descriptors.
    ///
    /// # Panics
    /// When none comes, or one with descriptors.
    #[track_caller]
    pub fn answer(&self) -> (Header, Vec<u8>) {
        let (header, payload, files) = self.message();
        assert!(files.is_empty(), "descriptors came with it");
        (header, payload)
    }

    #[track_caller]
    fn message(&self) -> (Header, Vec<u8>, Vec<OwnedFd>) {
        let mut files = Vec::new();
        let header = self.receive(MESSAGE_HEADER_LEN, &mut files);
        let header = Header::from_bytes(header.try_into().expect("as long as was asked for"));
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        assert!(size <= 4096, "an answer of {size} bytes");
        let payload = self.receive(size, &mut files);
        (header, payload, files)
    }

    #[track_caller]
    fn receive(&self, len: usize, files: &mut Vec<OwnedFd>) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut at = 0;
        let whole = poll(|| {
            while at < len {
                match self.stream.recv(&mut bytes[at..], files) {
                    Ok(0) => panic!("the back-end has ended the connection"),
                    Ok(count) => at += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                    Err(error) => panic!("{error}"),
                }
            }
            Some(())
        });
        assert!(whole.is_some(), "the back-end does not answer");
        bytes
    }
}

/// A ring's queue and the three events that go with it.
#[derive(Debug)]
pub struct VmRing {
    /// The driver's side of it.
    pub queue: Box<dyn GuestQueue>,
    /// Ours to signal.
    pub kick: EventFd,
    /// The back-end's to signal.
    pub call: EventFd,
    /// The back-end's to signal, when the ring is broken.
    pub err: EventFd,
}

/// A virtual machine without a processor: a guest, its queue pairs, and the front-end that tells of them.
#[derive(Debug)]
pub struct FakeVm {
    /// The connection.
    pub front_end: FrontEnd,
    /// The guest whose memory is shared.
    pub guest: FakeGuest,
    /// Receiveqs at even places, transmitqs at odd ones.
    pub rings: Vec<VmRing>,
    /// What the driver accepts.
    pub features: Features,
    /// Its memory, region by region.
    pub memory: VmMemory,
    /// Its rings are logged.
    logging: bool,
}

impl FakeVm {
    /// Bytes of memory.
    const MEMORY: u64 = 1 << 20;

    /// Lays out queue pairs of `size` entries; the back-end has not been told anything.
    ///
    /// # Panics
    /// When the machine has no memory or descriptors for it.
    #[must_use]
    pub fn new(front_end: FrontEnd, features: Features, queue_pairs: usize, size: u16) -> Self {
        let memory = VmMemory::of_size(Self::MEMORY, Backing::Sealed).expect("memory for a guest");
        Self::over(front_end, features, queue_pairs, size, memory)
    }

    /// As [`Self::new`], in given memory: queues lie in the first of its regions, if they fit.
    ///
    /// # Panics
    /// When the machine has no descriptors for it, or the memory no room.
    #[must_use]
    pub fn over(
        front_end: FrontEnd,
        features: Features,
        queue_pairs: usize,
        size: u16,
        memory: VmMemory,
    ) -> Self {
        let mut guest = FakeGuest::over(memory.memory());
        let ring = |guest: &mut FakeGuest| VmRing {
            queue: if features.contains(Features::RING_PACKED) {
                Box::new(PackedQueue::new(guest, size, features))
            } else {
                Box::new(SplitQueue::new(guest, size, features))
            },
            kick: EventFd::new().expect("an eventfd"),
            call: EventFd::new().expect("an eventfd"),
            err: EventFd::new().expect("an eventfd"),
        };
        let rings = (0..2 * queue_pairs).map(|_| ring(&mut guest)).collect();
        Self {
            front_end,
            guest,
            rings,
            features,
            memory,
            logging: false,
        }
    }

    /// Tells the back-end everything; packets can flow from now on.
    ///
    /// # Panics
    /// When the back-end refuses any of it.
    #[track_caller]
    pub fn start(&mut self) {
        self.agree();
        self.tell_memory();
        for ring in 0..self.rings.len() {
            self.start_ring(ring);
        }
    }

    /// Agrees on features, and on acknowledgements for everything that comes after it.
    ///
    /// # Panics
    /// When the back-end refuses.
    #[track_caller]
    pub fn agree(&mut self) {
        let protocol = ProtocolFeatures::MQ
            | ProtocolFeatures::LOG_SHMFD
            | ProtocolFeatures::RARP
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::INFLIGHT_SHMFD
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS;
        self.agree_on(protocol);
    }

    /// The same with these protocol features; REPLY_ACK has to be among them.
    ///
    /// # Panics
    /// When the back-end refuses.
    #[track_caller]
    pub fn agree_on(&mut self, protocol: ProtocolFeatures) {
        let front_end = &self.front_end;
        front_end.tell(&Request::SetOwner, &[]);
        front_end.ask(&Request::GetFeatures, &[]);
        front_end.insist(&Request::SetProtocolFeatures(protocol.bits()), &[]);
        self.tell_features(self.features);
    }

    /// Tells the memory.
    ///
    /// # Panics
    /// When the back-end refuses it.
    #[track_caller]
    pub fn tell_memory(&self) {
        let (request, files) = self.memory_table();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.front_end.insist(&request, &files);
    }

    /// The message that tells the memory, and the files that go with it.
    ///
    /// # Panics
    /// When the machine is out of descriptors.
    #[must_use]
    pub fn memory_table(&self) -> (Request, Vec<OwnedFd>) {
        let layouts = self.memory.regions().to_vec();
        let files = (0..layouts.len()).map(|region| self.memory.file(region));
        (Request::SetMemTable(MemoryTable(layouts)), files.collect())
    }

    /// Tells everything about one ring, where its queue is now, and enables it.
    ///
    /// # Panics
    /// When the back-end refuses any of it.
    #[track_caller]
    pub fn start_ring(&mut self, ring: usize) {
        let QueueConfig { size, base, .. } =
            self.rings[ring].queue.config(&self.guest, self.features);
        self.start_ring_at(ring, size, base);
    }

    /// As [`Self::start_ring`], with another size or base than the queue has.
    ///
    /// # Panics
    /// When the back-end refuses any of it.
    #[track_caller]
    pub fn start_ring_at(&mut self, ring: usize, size: u16, base: u32) {
        let index = length(ring);
        let num = u32::from(size);
        self.front_end
            .insist(&Request::SetVringNum(VringState { index, num }), &[]);
        let state = VringState { index, num: base };
        self.front_end.insist(&Request::SetVringBase(state), &[]);
        self.front_end
            .insist(&Request::SetVringAddr(self.addresses(ring)), &[]);
        let word = Self::word(ring);
        let VmRing {
            kick, call, err, ..
        } = &self.rings[ring];
        self.front_end
            .insist(&Request::SetVringCall(word), &[call.as_fd()]);
        self.front_end
            .insist(&Request::SetVringErr(word), &[err.as_fd()]);
        self.front_end
            .insist(&Request::SetVringKick(word), &[kick.as_fd()]);
        let state = VringState { index, num: 1 };
        self.front_end.insist(&Request::SetVringEnable(state), &[]);
    }

    /// Where a ring lies, as SET_VRING_ADDR tells it.
    ///
    /// # Panics
    /// Never: its rings lie in memory.
    #[must_use]
    pub fn addresses(&self, ring: usize) -> VringAddresses {
        let config = self.rings[ring].queue.config(&self.guest, self.features);
        let device_area = self.guest.memory().guest_addr(config.device_area);
        VringAddresses {
            index: length(ring),
            flags: self.logging.into(),
            desc: config.desc_area.0,
            used: config.device_area.0,
            avail: config.driver_area.0,
            log_guest_addr: device_area.expect("a ring lies in memory").0,
        }
    }

    /// The word that names a ring in a message with a descriptor.
    ///
    /// # Panics
    /// When there can be no such ring.
    #[must_use]
    pub fn word(ring: usize) -> VringFd {
        VringFd::new(u8::try_from(ring).expect("at most 256 rings"), true)
    }

    /// Makes a frame available on a transmitq, as one buffer, and kicks if the device asks for it.
    #[track_caller]
    pub fn transmit(&mut self, pair: usize, frame: &[u8]) {
        let header = net_header(&Offload::default(), 0);
        let ring = &mut self.rings[2 * pair + 1];
        offer_frame(&mut self.guest, &mut *ring.queue, &header, frame, &[]);
        self.kick(2 * pair + 1);
    }

    /// Makes `n` buffers of `len` bytes available on a receiveq.
    #[track_caller]
    pub fn make_room(&mut self, pair: usize, n: usize, len: u32) {
        for _ in 0..n {
            let buffer = self.guest.writable(len);
            self.rings[2 * pair].queue.offer(&mut self.guest, &[buffer]);
        }
        self.kick(2 * pair);
    }

    /// Kicks a ring if its device asks for it.
    ///
    /// # Panics
    /// Never: the eventfd is ours.
    pub fn kick(&mut self, ring: usize) {
        let ring = &mut self.rings[ring];
        if ring.queue.take_kick(&self.guest) {
            ring.kick.signal().expect("our own eventfd");
        }
    }

    /// How many frames of a transmitq have been taken since the last question.
    #[track_caller]
    pub fn transmitted(&mut self, pair: usize) -> usize {
        self.rings[2 * pair + 1]
            .queue
            .collect(&mut self.guest)
            .len()
    }

    /// The frames that have arrived in a receiveq since the last question.
    #[track_caller]
    pub fn received(&mut self, pair: usize) -> Vec<Vec<u8>> {
        let returned = self.rings[2 * pair].queue.collect(&mut self.guest);
        let packets = packets(&returned).into_iter();
        packets.map(|(_, frame)| frame).collect()
    }

    /// Sends frames of one flow to a back-end that sends them back, and expects them all, in order.
    ///
    /// They may come back on any queue pair: which one is the back-end's choice.
    ///
    /// # Panics
    /// When they do not come back as they were.
    #[track_caller]
    pub fn echo(&mut self, pair: usize, frames: &[Vec<u8>]) {
        let pairs = self.rings.len() / 2;
        for pair in 0..pairs {
            let room = self.rings[2 * pair].queue.outstanding();
            self.make_room(pair, frames.len().saturating_sub(room), 2048);
        }
        for frame in frames {
            self.transmit(pair, frame);
        }
        let (mut back, mut taken) = (Vec::new(), 0);
        // A packet is on its way back before its own buffer is.
        let all = poll(|| {
            taken += self.transmitted(pair);
            for pair in 0..pairs {
                back.extend(self.received(pair));
            }
            (back.len() >= frames.len() && taken >= frames.len()).then_some(())
        });
        let (n, sent) = (back.len(), frames.len());
        assert!(
            all.is_some(),
            "of {sent} frames {taken} were taken and {n} came back"
        );
        assert!(back == frames, "other frames came back");
    }

    /// Whether a ring's error event is signalled, now or soon.
    #[must_use]
    pub fn is_told_of_error(&self, ring: usize) -> bool {
        is_signalled(&self.rings[ring].err)
    }

    /// Has the back-end log what it writes from now on, as a monitor does whose guest is about to move.
    ///
    /// # Panics
    /// When the back-end refuses.
    #[track_caller]
    pub fn start_log(&mut self, log: &DirtyPages) {
        let area = LogArea {
            mmap_size: log.size(),
            mmap_offset: 0,
        };
        let answer = self
            .front_end
            .ask(&Request::SetLogBase(area), &[log.as_fd()]);
        assert_eq!(answer.len(), 16, "SET_LOG_BASE was refused");
        self.tell_features(self.features | Features::LOG_ALL);
        self.log_rings(true);
    }

    /// Ends that.
    ///
    /// # Panics
    /// As [`Self::start_log`].
    #[track_caller]
    pub fn stop_log(&mut self) {
        self.log_rings(false);
        self.tell_features(self.features);
    }

    #[track_caller]
    fn tell_features(&self, features: Features) {
        let features = features | Features::PROTOCOL_FEATURES;
        self.front_end
            .insist(&Request::SetFeatures(features.bits()), &[]);
    }

    #[track_caller]
    fn log_rings(&mut self, on: bool) {
        self.logging = on;
        for ring in 0..self.rings.len() {
            let request = Request::SetVringAddr(self.addresses(ring));
            self.front_end.insist(&request, &[]);
        }
    }

    /// The same guest at another back-end, which has not been told anything, in memory of its own that contains this.
    ///
    /// # Panics
    /// When the machine has no memory for it.
    #[must_use]
    pub fn move_to(mut self, front_end: FrontEnd, contents: &[u8]) -> Self {
        self.memory = VmMemory::of_size(Self::MEMORY, Backing::Sealed).expect("memory for a guest");
        self.guest.move_to(self.memory.memory(), contents);
        self.logging = false;
        self.reconnect(front_end)
    }

    /// Ends the connection as a process that dies does; the guest stays.
    #[must_use]
    pub fn disconnect(self) -> FakeGuest {
        self.guest
    }

    /// The same guest and queues with another back-end, which has not been told anything.
    #[must_use]
    pub fn reconnect(self, front_end: FrontEnd) -> Self {
        Self { front_end, ..self }
    }
}

/// Whether an event is signalled, now or soon.
///
/// # Panics
/// When the system has no descriptors.
#[must_use]
pub fn is_signalled(event: &EventFd) -> bool {
    let poller = Poller::new().expect("a poller");
    poller.add(event, 0).expect("an event can be waited for");
    let mut events = Events::with_capacity(1);
    poller
        .wait(&mut events, Some(PATIENCE))
        .is_ok_and(|n| n > 0)
        && event.drain()
}

/// Asks again and again, for as long as a back-end may take.
fn poll<T>(mut question: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        let answer = question();
        if answer.is_some() || start.elapsed() > PATIENCE {
            return answer;
        }
        thread::sleep(Duration::from_micros(100));
    }
}
