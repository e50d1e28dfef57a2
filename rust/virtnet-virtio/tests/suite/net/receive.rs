//! Into a receiveq: frames of every length into buffers of every length, and buffers that make no sense.

use virtnet_packet::{Burst, DropReason, Offload, Picks, PortCounters};
use virtnet_virtio::net::{ReceiveQueue, TransmitQueue};
use virtnet_virtio::{DeviceQueue, Features, RingError, RingFormat};

use super::{Guest, LENGTHS, Net, all, both, burst_of, frame};
use crate::support::driver::{Desc, Driver};
use crate::support::{Random, Setup};

const POISON: u8 = 0xee;
/// Bytes of a guest's buffers that are watched.
const IMAGE: usize = 1 << 18;

/// A guest with buffers, the queue that fills them, and what its memory has to look like.
struct Receiver {
    guest: Guest,
    queue: ReceiveQueue,
    counters: PortCounters,
    /// Chains that were offered and are not used yet: id and buffers.
    chains: Vec<(u16, Vec<(u64, usize)>)>,
    /// What stands in the guest's buffers, from `start` on.
    image: Vec<u8>,
    start: u64,
}

impl Receiver {
    fn new(net: Net) -> Self {
        let guest = Guest::new(net, false);
        let start = guest.next;
        let mut receiver = Self {
            queue: ReceiveQueue::new(
                DeviceQueue::new(&net.config(), guest.memory()).unwrap(),
                net.features,
            ),
            counters: PortCounters::default(),
            chains: Vec::new(),
            image: Vec::new(),
            start,
            guest,
        };
        receiver.poison();
        receiver
    }

    /// All of a new guest's buffers hold the same byte.
    fn poison(&mut self) {
        self.image = vec![POISON; IMAGE];
        self.guest.ram.write(self.start, &self.image);
    }

    fn offer(&mut self, chain: &[usize]) {
        self.chains.push(self.guest.offer_room(chain));
    }

    fn fill(&mut self, burst: &Burst) -> Result<usize, RingError> {
        let picks = all(burst);
        let filled = self
            .queue
            .fill(self.guest.memory(), burst, &picks, &mut self.counters);
        self.queue.publish();
        filled
    }

    /// The next packet must have gone into the first `n` chains.
    fn expect_packet(&mut self, offload_bytes: [u8; 10], frame: &[u8], n: usize) {
        let mut bytes = offload_bytes.to_vec();
        if self.guest.net.header_len() == 12 {
            bytes.extend((n as u16).to_le_bytes());
        }
        bytes.extend(frame);
        let mut left = &bytes[..];
        for (id, buffers) in self.chains.drain(..n) {
            let room = buffers.iter().map(|&(_, len)| len).sum::<usize>();
            let here = room.min(left.len());
            let used = self.guest.driver.reap(1);
            assert_eq!(
                used.first().map(|u| (u.id, u.len as usize)),
                Some((id, here))
            );
            for (addr, len) in buffers {
                let (now, rest) = left.split_at(len.min(left.len()));
                let at = (addr - self.start) as usize;
                self.image[at..at + now.len()].copy_from_slice(now);
                left = rest;
            }
        }
        assert!(left.is_empty(), "{} bytes have no place", left.len());
    }

    /// The next chain must have come back with nothing in it.
    fn expect_empty(&mut self) {
        let (id, _) = self.chains.remove(0);
        let used = self.guest.driver.reap(1);
        assert_eq!(used.first().map(|u| (u.id, u.len)), Some((id, 0)));
    }

    /// No other chain was used, and no other byte written.
    fn expect_nothing_else(&mut self) {
        assert!(self.guest.driver.reap(1).is_empty());
        let bytes = self.guest.ram.read(self.start, self.image.len());
        let wrong = bytes.iter().zip(&self.image).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "a byte that is nobody's was written");
    }
}

const PLAIN: [u8; 10] = [0; 10];

/// Buffers that hold `need` bytes, in one chain: exactly, with room to spare, cut in odd places.
fn one_chain(need: usize, header_len: usize) -> Vec<Vec<usize>> {
    let mut tiny = vec![1; header_len + 3];
    tiny.push(need);
    vec![
        vec![need],
        vec![need + 1],
        vec![need + 4000],
        vec![header_len, need - header_len],
        vec![header_len - 1, need],
        vec![header_len + 1, 7, need],
        vec![0, header_len, 0, need, 0],
        vec![need / 2, need - need / 2],
        vec![need - 1, 1],
        tiny,
    ]
}

#[test]
fn a_frame_of_any_length_is_written_to_one_chain_and_nowhere_else() {
    for more in [Features::empty(), Features::MRG_RXBUF] {
        for net in Net::every(64, more) {
            let header_len = net.header_len();
            let mut receiver = Receiver::new(net);
            let (mut packets, mut bytes) = (0, 0);
            for len in LENGTHS {
                for chain in one_chain(header_len + len, header_len) {
                    receiver.guest.next = receiver.start;
                    receiver.offer(&chain);
                    let sent = frame(len, packets);
                    let burst = burst_of(std::slice::from_ref(&sent));
                    assert_eq!(receiver.fill(&burst), Ok(1), "{len} bytes into {chain:?}");
                    receiver.expect_packet(PLAIN, &sent, 1);
                    packets += 1;
                    bytes += len as u64;
                }
                receiver.expect_nothing_else();
                receiver.poison();
            }
            let expected = PortCounters {
                sent: packets,
                sent_bytes: bytes,
                ..PortCounters::default()
            };
            assert_eq!(receiver.counters, expected);
        }
    }
}

#[test]
fn a_mergeable_frame_fills_buffer_after_buffer() {
    let sizes: [&[usize]; 6] = [
        &[1526],
        &[2048, 100],
        &[1100, 1500, 4096],
        &[12, 1400],
        &[60_000],
        &[65_600, 12],
    ];
    for net in Net::every(64, Features::MRG_RXBUF) {
        let header_len = net.header_len();
        for len in LENGTHS {
            for sizes in sizes {
                for cut in [1, 2] {
                    let mut receiver = Receiver::new(net);
                    let (mut room, mut need_chains) = (0, 0);
                    let need = header_len + len;
                    for &size in sizes.iter().cycle() {
                        // One more than needed, which must not be touched.
                        let enough = room >= need;
                        if receiver.guest.driver.free() < cut {
                            break;
                        }
                        match cut {
                            1 => receiver.offer(&[size]),
                            _ => receiver.offer(&[size / 2, size - size / 2]),
                        }
                        if enough {
                            break;
                        }
                        room += size;
                        need_chains += 1;
                    }
                    if room < need {
                        continue;
                    }
                    let sent = frame(len, 3);
                    let burst = burst_of(std::slice::from_ref(&sent));
                    assert_eq!(receiver.fill(&burst), Ok(1), "{len} bytes into {sizes:?}");
                    receiver.expect_packet(PLAIN, &sent, need_chains);
                    receiver.expect_nothing_else();
                    assert_eq!(receiver.counters.sent, 1);
                }
            }
        }
    }
}

#[test]
fn a_packets_offload_stands_in_its_header() {
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        gso_type: Offload::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 0x1234,
        csum_start: 34,
        csum_offset: 16,
    };
    for net in Net::every(8, Features::empty()) {
        let mut receiver = Receiver::new(net);
        for asked in [offload, Offload::default(), offload, offload] {
            receiver.guest.next = receiver.start;
            receiver.offer(&[200]);
            let mut burst = burst_of(&[frame(60, 1)]);
            burst.set_offload(0, asked);
            assert_eq!(receiver.fill(&burst), Ok(1));
            let bytes = if asked == offload {
                [1, 1, 54, 0, 0x34, 0x12, 34, 0, 16, 0]
            } else {
                PLAIN
            };
            receiver.expect_packet(bytes, &frame(60, 1), 1);
            receiver.expect_nothing_else();
        }
    }
}

#[test]
fn a_frame_longer_than_its_buffer_is_dropped_and_the_buffer_stays() {
    for net in Net::every(8, Features::empty()) {
        let mut receiver = Receiver::new(net);
        receiver.offer(&[net.header_len() + 100]);
        receiver.offer(&[net.header_len() + 100]);
        let frames = [frame(101, 1), frame(100, 2), frame(65_589, 3), frame(14, 4)];
        assert_eq!(receiver.fill(&burst_of(&frames)), Ok(4));
        receiver.expect_packet(PLAIN, &frames[1], 1);
        receiver.expect_packet(PLAIN, &frames[3], 1);
        receiver.expect_nothing_else();
        let counters = &receiver.counters;
        assert_eq!(
            (counters.sent, counters.tx_drops.of(DropReason::TooBig)),
            (2, 2)
        );
        assert_eq!(counters.tx_drops.total(), 2);
    }
}

#[test]
fn ta84_a_frame_that_needs_more_buffers_than_there_are_takes_none() {
    for net in Net::every(8, Features::MRG_RXBUF) {
        let mut receiver = Receiver::new(net);
        let frames = [frame(900, 1), frame(3000, 2), frame(50, 3)];
        (0..3).for_each(|_| receiver.offer(&[1000]));
        let base = receiver.queue.queue().base();
        // The second does not fit behind the first, and the third must not overtake it.
        assert_eq!(receiver.fill(&burst_of(&frames)), Ok(1));
        receiver.expect_packet(PLAIN, &frames[0], 1);
        receiver.expect_nothing_else();
        assert_ne!(receiver.queue.queue().base(), base);
        let base = receiver.queue.queue().base();
        assert_eq!(receiver.fill(&burst_of(&frames[1..])), Ok(0));
        assert_eq!(receiver.queue.queue().base(), base, "nothing was consumed");
        (0..2).for_each(|_| receiver.offer(&[1000]));
        receiver.offer(&[2000]);
        assert_eq!(receiver.fill(&burst_of(&frames[1..])), Ok(2));
        receiver.expect_packet(PLAIN, &frames[1], 4);
        receiver.expect_packet(PLAIN, &frames[2], 1);
        receiver.expect_nothing_else();
        assert_eq!(
            (receiver.counters.sent, receiver.counters.tx_drops.total()),
            (3, 0)
        );
    }
}

#[test]
fn ta85_a_frame_that_no_ring_full_of_buffers_holds_is_dropped() {
    // A ring of small buffers, and one with more of them than a packet may span.
    for (size, room, len) in [(8, 100, 2000), (256, 200, 13_000)] {
        for net in Net::every(size, Features::MRG_RXBUF) {
            let mut receiver = Receiver::new(net);
            (0..size).for_each(|_| receiver.offer(&[room]));
            let frames = [
                frame(len, 1),
                frame(150 / (usize::from(size) / 8).max(1), 2),
            ];
            assert_eq!(receiver.fill(&burst_of(&frames)), Ok(2));
            let n = (frames[1].len() + net.header_len()).div_ceil(room);
            receiver.expect_packet(PLAIN, &frames[1], n);
            receiver.expect_nothing_else();
            assert_eq!(receiver.counters.tx_drops.of(DropReason::TooBig), 1);
        }
    }
}

#[test]
fn a_burst_of_long_frames_uses_all_buffers_there_are() {
    for net in Net::every(256, Features::MRG_RXBUF) {
        for (frames, chains) in [(64, 3), (40, 6), (3, 60), (2, 64)] {
            let mut receiver = Receiver::new(net);
            let len = chains * 500 - net.header_len();
            (0..256).for_each(|_| receiver.offer(&[500]));
            let sent: Vec<Vec<u8>> = (0..frames).map(|k| frame(len, k)).collect();
            let expected = (256 / chains).min(frames as usize);
            assert_eq!(
                receiver.fill(&burst_of(&sent)),
                Ok(expected),
                "{chains} chains each"
            );
            for frame in &sent[..expected] {
                receiver.expect_packet(PLAIN, frame, chains);
            }
            receiver.expect_nothing_else();
            assert_eq!(receiver.counters.sent, expected as u64);
        }
    }
}

#[test]
fn ta83_a_buffer_too_small_for_a_header_is_given_back() {
    for more in [Features::empty(), Features::MRG_RXBUF] {
        for net in Net::every(16, more) {
            let mut receiver = Receiver::new(net);
            let small = [0, 1, net.header_len() - 1];
            for len in small {
                receiver.offer(&[len]);
            }
            receiver.offer(&[500]);
            receiver.offer(&[1]);
            receiver.offer(&[500]);
            let frames = [frame(100, 1), frame(200, 2)];
            // Bad ones cost the room they pretended to be.
            let mut accepted = 0;
            for _ in 0..8 {
                accepted += receiver.fill(&burst_of(&frames[accepted..])).unwrap();
            }
            assert_eq!(accepted, 2);
            for _ in small {
                receiver.expect_empty();
            }
            receiver.expect_packet(PLAIN, &frames[0], 1);
            receiver.expect_empty();
            receiver.expect_packet(PLAIN, &frames[1], 1);
            receiver.expect_nothing_else();
            assert_eq!(
                (receiver.counters.sent, receiver.counters.bad_buffers),
                (2, 4)
            );
        }
    }
}

#[test]
fn a_bad_buffer_in_the_middle_costs_the_frame_that_needs_it() {
    for net in Net::every(16, Features::MRG_RXBUF) {
        let mut receiver = Receiver::new(net);
        receiver.offer(&[300]);
        receiver.offer(&[0]);
        receiver.offer(&[300]);
        receiver.offer(&[300]);
        let frames = [frame(500, 1), frame(100, 2), frame(400, 3)];
        assert_eq!(receiver.fill(&burst_of(&frames)), Ok(3));
        receiver.expect_packet(PLAIN, &frames[1], 1);
        receiver.expect_empty();
        receiver.expect_packet(PLAIN, &frames[2], 2);
        receiver.expect_nothing_else();
        assert_eq!(receiver.counters.tx_drops.of(DropReason::BadBuffer), 1);
        assert_eq!(
            (receiver.counters.sent, receiver.counters.bad_buffers),
            (2, 1)
        );
        assert_eq!(receiver.counters.tx_drops.total(), 1);
    }
}

#[test]
fn ta32_a_buffer_that_is_only_to_be_read_is_given_back_untouched() {
    for setup in both(8) {
        let mut receiver = Receiver::new(Net::new(setup, Features::empty()));
        let secret = frame(300, 9);
        let id = receiver.guest.offer(&[&secret]);
        let before = receiver
            .guest
            .ram
            .read(receiver.start, receiver.image.len());
        receiver.image = before;
        receiver.chains.push((id, Vec::new()));
        receiver.offer(&[300]);
        let sent = frame(60, 1);
        let burst = burst_of(&[sent.clone(), sent.clone()]);
        assert_eq!(receiver.fill(&burst), Ok(1));
        receiver.expect_empty();
        receiver.expect_packet(PLAIN, &sent, 1);
        receiver.expect_nothing_else();
        assert_eq!(receiver.counters.bad_buffers, 1);
    }
}

#[test]
fn a_broken_ring_is_told_once_nothing_more_can_be_accepted() {
    for mergeable in [false, true] {
        let setup = Setup::new(RingFormat::Split, 16);
        let more = if mergeable {
            Features::MRG_RXBUF
        } else {
            Features::empty()
        };
        let net = Net::new(setup, more);
        let mut receiver = Receiver::new(net);
        (0..3).for_each(|_| receiver.offer(&[500]));
        // The fourth entry names a descriptor that is not there.
        receiver
            .guest
            .ram
            .set_u16(setup.driver_area() + 4 + 2 * 3, 99);
        receiver.guest.ram.set_u16(setup.driver_area() + 2, 4);
        let frames = [frame(100, 1), frame(100, 2), frame(900, 3), frame(100, 4)];
        let broken = Err(RingError::HeadRange { head: 99, size: 16 });
        if mergeable {
            assert_eq!(receiver.fill(&burst_of(&frames)), Ok(2));
            assert_eq!(receiver.fill(&burst_of(&frames[2..])), broken);
        } else {
            assert_eq!(receiver.fill(&burst_of(&frames)), Ok(4));
            assert_eq!(receiver.fill(&burst_of(&frames)), broken);
        }
        let first = [&frames[0], &frames[1]];
        for frame in first {
            receiver.expect_packet(PLAIN, frame, 1);
        }
        if !mergeable {
            receiver.expect_packet(PLAIN, &frames[3], 1);
        }
        receiver.expect_nothing_else();
        let counters = &receiver.counters;
        let accepted = if mergeable { 2 } else { 4 };
        assert_eq!(counters.sent + counters.tx_drops.total(), accepted);
        // Whoever starts the ring again finds the buffers that were not used.
        let used = if mergeable { 2 } else { 3 };
        assert_eq!(receiver.queue.queue().base(), used);
    }
}

#[test]
fn picks_are_written_in_their_order() {
    for net in Net::every(8, Features::empty()) {
        let mut receiver = Receiver::new(net);
        (0..3).for_each(|_| receiver.offer(&[300]));
        let frames: Vec<Vec<u8>> = (0..6).map(|k| frame(50 + k, k as u64)).collect();
        let burst = burst_of(&frames);
        let mut picks = Picks::default();
        [4, 1, 1, 0].into_iter().for_each(|i| picks.push(i));
        let memory = receiver.guest.memory().clone();
        let filled = receiver
            .queue
            .fill(&memory, &burst, &picks, &mut receiver.counters);
        assert_eq!(filled, Ok(3), "the ring is full");
        receiver.queue.publish();
        for i in [4, 1, 1] {
            receiver.expect_packet(PLAIN, &frames[i], 1);
        }
        receiver.expect_nothing_else();
        let nothing =
            receiver
                .queue
                .fill(&memory, &burst, &Picks::default(), &mut receiver.counters);
        assert_eq!(nothing, Ok(0));
        assert!(!receiver.queue.publish());
    }
}

/// Any frames into any buffers: what was accepted is what the driver got and what was dropped, byte for byte.
#[test]
fn what_is_accepted_is_written_or_dropped() {
    for more in [Features::empty(), Features::MRG_RXBUF] {
        for (seed, net) in Net::every(64, more).chain(Net::every(8, more)).enumerate() {
            let mergeable = net.features.contains(Features::MRG_RXBUF);
            let mut random = Random::new(seed as u64);
            let mut receiver = Receiver::new(net);
            let (mut accepted, mut finished) = (0, 0);
            for round in 0..150 {
                for _ in 0..random.below(20) {
                    let chain: Vec<usize> = match random.below(10) {
                        0 => vec![random.below(net.header_len())],
                        1 => vec![100, 0, 1500 + random.below(3000)],
                        2 if mergeable => vec![12 + random.below(30)],
                        _ => vec![1500 + random.below(1000)],
                    };
                    if receiver.guest.driver.free() < chain.len() {
                        break;
                    }
                    receiver.offer(&chain);
                }
                let sent: Vec<Vec<u8>> = (0..random.below(64))
                    .map(|k| frame(14 + random.below(4000), round * 64 + k as u64))
                    .collect();
                let before = receiver.counters;
                let n = receiver.fill(&burst_of(&sent)).unwrap();
                accepted += n as u64;
                assert!(n <= sent.len());

                // The same, by looking at one packet at a time.
                for frame in &sent[..n] {
                    let need = net.header_len() + frame.len();
                    while room(&receiver.chains[0].1) < net.header_len() {
                        receiver.expect_empty();
                    }
                    let mut total = 0;
                    let enough = receiver.chains.iter().position(|(_, buffers)| {
                        total += room(buffers);
                        total >= need
                    });
                    let whole = |n| receiver.chains[..n].iter().all(|(_, b)| room(b) > 0);
                    match enough.map(|k| k + 1) {
                        Some(n) if (mergeable || n == 1) && n <= 64 && whole(n) => {
                            receiver.expect_packet(PLAIN, frame, n);
                            finished += 1;
                        }
                        _ => {}
                    }
                }
                while !receiver.chains.is_empty()
                    && room(&receiver.chains[0].1) < net.header_len()
                    && receiver.guest.driver.has_work()
                {
                    receiver.expect_empty();
                }
                assert!(
                    !receiver.guest.driver.has_work(),
                    "a chain that nobody expects"
                );
                let after = receiver.counters;
                let moved =
                    after.sent + after.tx_drops.total() - before.sent - before.tx_drops.total();
                assert_eq!(moved, n as u64, "accepted = sent + dropped");
                if random.below(10) == 0 {
                    receiver.expect_nothing_else();
                }
                if receiver.guest.next > receiver.start + IMAGE as u64 / 2
                    && receiver.chains.is_empty()
                {
                    receiver.guest.next = receiver.start;
                    receiver.poison();
                }
                if receiver.guest.next > receiver.start + IMAGE as u64 - 100_000 {
                    break;
                }
            }
            receiver.expect_nothing_else();
            assert_eq!(receiver.counters.sent, finished);
            assert_eq!(accepted, finished + receiver.counters.tx_drops.total());
            assert!(finished > 20, "only {finished} packets went through");
        }
    }
}

fn room(buffers: &[(u64, usize)]) -> usize {
    buffers.iter().map(|&(_, len)| len).sum()
}

/// From one guest to another, bodies in place: every framing of the sender into every framing of the receiver.
#[test]
fn a_frame_crosses_from_guest_to_guest() {
    for (from, to) in both(64).into_iter().zip(both(64).into_iter().rev()) {
        let net = Net::new(from, Features::empty());
        let mut sender = Guest::new(net, true);
        let queue = DeviceQueue::new(&net.config(), sender.memory()).unwrap();
        let mut transmit = TransmitQueue::new(queue, net.features);
        let mut receiver = Receiver::new(Net::new(to, Features::MRG_RXBUF));
        for len in LENGTHS {
            for pieces in [1, 2, 5, 13] {
                for chain in one_chain(12 + len, 12) {
                    receiver.guest.next = receiver.start;
                    receiver.offer(&chain);
                    let sent = frame(len, pieces);
                    let bytes = [vec![0; 12], sent.clone()].concat();
                    let cut: Vec<&[u8]> = bytes
                        .chunks(bytes.len().div_ceil(pieces as usize))
                        .collect();
                    sender.offer(&cut);
                    let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
                    transmit
                        .drain(sender.memory(), &mut burst, &mut counters)
                        .unwrap();
                    assert_eq!(receiver.fill(&burst), Ok(1));
                    transmit.complete();
                    assert_eq!(sender.driver.reap(8).len(), 1);
                    receiver.expect_packet(PLAIN, &sent, 1);
                }
            }
            receiver.expect_nothing_else();
            receiver.poison();
        }
    }
}

/// Receive buffers of one guest that lie on top of each other: its bytes are garbage, everybody else's are not.
#[test]
fn ta43_buffers_that_alias_each_other_harm_their_owner_only() {
    for setup in both(8) {
        let net = Net::new(setup, Features::empty());
        let mut receiver = Receiver::new(net);
        let (id, places) = receiver.guest.offer_room(&[500]);
        receiver.guest.next = places[0].0 - 3 + 100;
        let (other, _) = receiver.guest.offer_room(&[500]);
        let frames = [frame(400, 1), frame(400, 2)];
        assert_eq!(receiver.fill(&burst_of(&frames)), Ok(2));
        let used = receiver.guest.driver.reap(4);
        assert_eq!(used.iter().map(|u| u.id).collect::<Vec<_>>(), [id, other]);
        let at = (places[0].0 - receiver.start) as usize;
        let bytes = receiver
            .guest
            .ram
            .read(receiver.start, receiver.image.len());
        assert!(bytes[..at].iter().all(|&b| b == POISON));
        assert!(bytes[at + 600 + 12..].iter().all(|&b| b == POISON));
    }
}

/// A receive buffer that covers the ring: the guest breaks its own ring, nothing else.
#[test]
fn ta10_a_buffer_in_the_ring_itself_breaks_the_ring_at_most() {
    for setup in both(8) {
        let net = Net::new(setup, Features::empty());
        let guest = Guest::new(net, false);
        let flags = if setup.is_packed() { 2 | 1 << 7 } else { 2 };
        for slot in 0..8 {
            let desc = Desc::new(setup.desc(), 3 * 4096, flags, slot as u16);
            desc.write(&guest.ram, setup.desc(), slot, setup.is_packed());
        }
        if !setup.is_packed() {
            guest.ram.set_u16(setup.driver_area() + 2, 8);
        }
        let queue = DeviceQueue::new(&net.config(), guest.memory()).unwrap();
        let mut queue = ReceiveQueue::new(queue, net.features);
        let mut counters = PortCounters::default();
        for seed in 0..50 {
            let burst = burst_of(&[frame(200, seed), frame(1000, seed), frame(12_000, seed)]);
            if queue
                .fill(guest.memory(), &burst, &all(&burst), &mut counters)
                .is_err()
            {
                break;
            }
            queue.publish();
        }
        assert!(guest.buffers().iter().all(|&byte| byte == 0));
    }
}
