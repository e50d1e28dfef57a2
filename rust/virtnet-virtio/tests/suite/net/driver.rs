//! Our driver's queues against our device's, both ways; and against devices that lie.

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory};
use virtnet_packet::{Burst, DropReason, Offload, PacketHash, Picks, PortCounters};
use virtnet_virtio::net::rss::{HashTypes, Hasher};
use virtnet_virtio::net::{BufferArea, DriverReceive, DriverTransmit, ReceiveQueue, TransmitQueue};
use virtnet_virtio::{DeviceQueue, DriverQueue, Features, RingError, RingFormat};

use super::{LENGTHS, Net, all, both, burst_of, frame, frame_of};
use crate::support::{Ram, Random, Setup};

/// One queue with both of its sides, in memory of its own.
fn memory_of(net: &Net) -> (Arc<GuestMemory>, BufferArea) {
    let size = net.setup.size;
    let (memory, _) = net.setup.memory(BufferArea::bytes(size) as u64);
    let area = BufferArea {
        start: GuestAddr(net.setup.data()),
        count: size,
    };
    (memory, area)
}

/// A transmitq with our driver and our device.
struct Outward {
    memory: Arc<GuestMemory>,
    send: DriverTransmit,
    drain: TransmitQueue,
    sent: PortCounters,
    drained: PortCounters,
}

impl Outward {
    fn new(net: Net) -> Self {
        let (memory, area) = memory_of(&net);
        let driver = DriverQueue::new(&net.config(), &memory).unwrap();
        let device = DeviceQueue::new(&net.config(), &memory).unwrap();
        Self {
            send: DriverTransmit::new(driver, Arc::clone(&memory), area, net.features).unwrap(),
            drain: TransmitQueue::new(device, net.features),
            memory,
            sent: PortCounters::default(),
            drained: PortCounters::default(),
        }
    }

    fn send(&mut self, burst: &Burst) -> usize {
        let n = self.send.send(burst, &all(burst), &mut self.sent).unwrap();
        self.send.publish();
        n
    }

    /// Everything that waits in the ring.
    fn drain(&mut self) -> Vec<(Vec<u8>, Offload)> {
        let mut frames = Vec::new();
        let mut burst = Burst::new();
        loop {
            let n = self
                .drain
                .drain(&self.memory, &mut burst, &mut self.drained)
                .unwrap();
            frames.extend((0..burst.len()).map(|i| (frame_of(&burst, i), burst.offload(i))));
            burst.clear();
            self.drain.complete();
            if n == 0 {
                return frames;
            }
        }
    }
}

/// A receiveq with our device and our driver.
struct Inward {
    memory: Arc<GuestMemory>,
    fill: ReceiveQueue,
    receive: DriverReceive,
    filled: PortCounters,
    received: PortCounters,
}

impl Inward {
    fn new(net: Net) -> Self {
        let (memory, area) = memory_of(&net);
        let driver = DriverQueue::new(&net.config(), &memory).unwrap();
        let device = DeviceQueue::new(&net.config(), &memory).unwrap();
        let mut receive =
            DriverReceive::new(driver, Arc::clone(&memory), area, net.features).unwrap();
        assert!(
            receive.publish(),
            "a device that has said nothing wants kicks"
        );
        Self {
            fill: ReceiveQueue::new(device, net.features),
            receive,
            memory,
            filled: PortCounters::default(),
            received: PortCounters::default(),
        }
    }

    fn fill(&mut self, burst: &Burst) -> usize {
        let n = self
            .fill
            .fill(&self.memory, burst, &all(burst), &mut self.filled)
            .unwrap();
        self.fill.publish();
        n
    }

    /// Everything that waits in the ring.
    fn receive(&mut self) -> Vec<(Vec<u8>, Offload)> {
        let mut frames = Vec::new();
        let mut burst = Burst::new();
        while self.receive.has_work() {
            self.receive
                .receive(&mut burst, &mut self.received)
                .unwrap();
            frames.extend((0..burst.len()).map(|i| (frame_of(&burst, i), burst.offload(i))));
            burst.clear();
            self.receive.complete();
        }
        frames
    }
}

fn plain(frames: &[Vec<u8>]) -> Vec<(Vec<u8>, Offload)> {
    frames
        .iter()
        .map(|frame| (frame.clone(), Offload::default()))
        .collect()
}

/// How many buffers a frame takes.
fn buffers(frame: usize) -> usize {
    frame.div_ceil(BufferArea::FRAME_ROOM as usize)
}

#[test]
fn what_our_driver_sends_our_device_drains() {
    for (size, more) in [
        (32, Features::empty()),
        (256, Features::empty()),
        (32, Features::HASH_REPORT),
    ] {
        for net in Net::every(size, more) {
            let mut queue = Outward::new(net);
            let mut bytes = 0;
            for round in 0..3 {
                for len in LENGTHS {
                    let sent = [frame(len, round), frame(60, round), frame(len, round + 9)];
                    let fits = sent.iter().scan(0, |used, frame| {
                        *used += buffers(frame.len());
                        Some(*used <= usize::from(size))
                    });
                    let fits = fits.take_while(|&fits| fits).count();
                    assert_eq!(queue.send(&burst_of(&sent)), fits, "{len} bytes");
                    assert!(queue.send.in_flight() > 0);
                    assert_eq!(queue.drain(), plain(&sent[..fits]), "{len} bytes");
                    bytes += sent[..fits].iter().map(Vec::len).sum::<usize>();
                }
            }
            assert_eq!(queue.sent.sent, queue.drained.received);
            assert_eq!(queue.sent.sent_bytes, bytes as u64);
            assert_eq!(queue.drained.received_bytes, bytes as u64);
            assert_eq!(
                (queue.sent.tx_drops.total(), queue.drained.rx_drops.total()),
                (0, 0)
            );
        }
    }
}

#[test]
fn what_our_device_fills_our_driver_receives() {
    for (size, more) in [
        (64, Features::MRG_RXBUF),
        (256, Features::MRG_RXBUF),
        (8, Features::empty()),
        (64, Features::MRG_RXBUF | Features::HASH_REPORT),
        (8, Features::HASH_REPORT),
    ] {
        for net in Net::every(size, more) {
            let mut queue = Inward::new(net);
            for round in 0..3 {
                for len in LENGTHS {
                    let fits = len <= BufferArea::FRAME_ROOM as usize
                        || net.features.contains(Features::MRG_RXBUF);
                    let sent = [frame(len, round), frame(60, round)];
                    assert_eq!(queue.fill(&burst_of(&sent)), 2, "{len} bytes");
                    let first = if fits { 0 } else { 1 };
                    assert_eq!(queue.receive(), plain(&sent[first..]), "{len} bytes");
                }
            }
            assert_eq!(queue.filled.sent, queue.received.received);
            assert_eq!(queue.filled.sent_bytes, queue.received.received_bytes);
            assert_eq!(queue.received.rx_drops.total(), 0);
            assert_eq!(
                queue.filled.tx_drops.total(),
                queue.filled.tx_drops.of(DropReason::TooBig)
            );
        }
    }
}

#[test]
fn offloads_travel_both_ways_when_negotiated() {
    let more = Features::CSUM | Features::HOST_TSO4 | Features::GUEST_CSUM | Features::GUEST_TSO4;
    let asked = Offload {
        flags: Offload::NEEDS_CSUM,
        gso_type: Offload::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
    };
    let all = more | Features::MRG_RXBUF;
    for net in Net::every(64, all).chain(Net::every(64, all | Features::HASH_REPORT)) {
        let (mut out, mut back) = (Outward::new(net), Inward::new(net));
        for len in [60, 1500, 9000] {
            // A buffer whose header differs from the last one's, in either direction.
            for offload in [asked, Offload::default(), asked] {
                let mut burst = burst_of(&[frame(len, 1)]);
                burst.set_offload(0, offload);
                assert_eq!((out.send(&burst), back.fill(&burst)), (1, 1));
                let expected = vec![(frame(len, 1), offload)];
                assert_eq!(out.drain(), expected);
                assert_eq!(back.receive(), expected);
            }
        }
    }
    // The device asks for what this driver has not negotiated.
    let mut queue = Inward::new(Net::new(both(8)[0], Features::GUEST_TSO6));
    let mut burst = burst_of(&[frame(100, 1), frame(100, 2)]);
    burst.set_offload(0, asked);
    queue.fill(&burst);
    assert_eq!(queue.receive(), plain(&[frame(100, 2)]));
    assert_eq!(queue.received.rx_drops.of(DropReason::BadOffload), 1);
}

#[test]
fn a_full_ring_takes_no_more_and_goes_on_when_it_is_emptied() {
    for net in Net::every(16, Features::MRG_RXBUF) {
        let (mut out, mut back) = (Outward::new(net), Inward::new(net));
        for round in 0..50 {
            let frames: Vec<Vec<u8>> = (0..40).map(|k| frame(100 + k, round)).collect();
            let burst = burst_of(&frames);
            for _ in 0..2 {
                let n = out.send(&burst);
                assert!(n == 16 || n == 0);
                let n = back.fill(&burst);
                assert!(n == 16 || n == 0);
            }
            assert_eq!(out.send.in_flight(), 16);
            assert_eq!(out.drain(), plain(&frames[..16]));
            assert_eq!(back.receive(), plain(&frames[..16]));
        }
        assert_eq!((out.sent.sent, back.filled.sent), (800, 800));
    }
}

#[test]
fn a_long_frame_finds_the_buffers_that_have_come_back() {
    for net in Net::every(16, Features::empty()) {
        let mut queue = Outward::new(net);
        let long = frame(4 * BufferArea::FRAME_ROOM as usize, 1);
        for _ in 0..20 {
            // Ten buffers are with the device, and it is done with them.
            let short: Vec<Vec<u8>> = (0..10).map(|k| frame(60, k)).collect();
            assert_eq!(queue.send(&burst_of(&short)), 10);
            queue.drain();
            let burst = burst_of(&[long.clone(), long.clone(), long.clone(), long.clone()]);
            assert_eq!(queue.send(&burst), 4);
            assert_eq!(queue.drain(), plain(&vec![long.clone(); 4]));
        }
    }
}

#[test]
fn a_frame_longer_than_all_buffers_together_is_dropped() {
    for net in Net::every(4, Features::empty()) {
        let mut queue = Outward::new(net);
        let frames = [frame(60, 1), frame(9000, 2), frame(8900, 3), frame(60, 4)];
        assert_eq!(
            queue.send(&burst_of(&frames)),
            2,
            "one sent, one dropped, one waits"
        );
        assert_eq!(queue.drain(), plain(&frames[..1]));
        assert_eq!(queue.send(&burst_of(&frames[2..])), 1);
        assert_eq!(queue.drain(), plain(&frames[2..3]));
        assert_eq!(queue.send(&burst_of(&frames[3..])), 1);
        assert_eq!(queue.drain(), plain(&frames[3..]));
        assert_eq!(
            (queue.sent.sent, queue.sent.tx_drops.of(DropReason::TooBig)),
            (3, 1)
        );
    }
}

/// A body that still lies in the memory of another guest, in pieces.
#[test]
fn a_frame_crosses_two_queues_without_being_put_together() {
    for (from, to) in both(64).into_iter().zip(both(64).into_iter().rev()) {
        let net = Net::new(from, Features::MRG_RXBUF);
        let mut first = Outward::new(net);
        let mut second = Outward::new(Net::new(to, Features::empty()));
        let mut third = Inward::new(net);
        for len in LENGTHS {
            let sent = frame(len, 5);
            assert_eq!(first.send(&burst_of(std::slice::from_ref(&sent))), 1);
            let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
            first
                .drain
                .drain(&first.memory, &mut burst, &mut counters)
                .unwrap();
            assert_eq!((second.send(&burst), third.fill(&burst)), (1, 1));
            first.drain.complete();
            let expected = plain(std::slice::from_ref(&sent));
            assert_eq!(second.drain(), expected, "{len} bytes");
            assert_eq!(third.receive(), expected, "{len} bytes");
        }
    }
}

#[test]
fn a_body_that_stands_in_a_buffer_is_written_again_only_where_it_has_changed() {
    let lens = [300, 60, 1_514, 4_000];
    let one = lens.map(|len| frame(len, 1)).to_vec();
    let mut again = burst_of(&one);
    again.keep_bodies();
    let mut another = burst_of(&lens.map(|len| frame(len, 2)));
    let passing = burst_of(&lens.map(|len| frame(len, 3)));
    another.keep_bodies();
    for net in Net::every(8, Features::empty()) {
        let mut out = Outward::new(net);
        let mut random = Random::new(11);
        for round in 0..200_u16 {
            // Heads may change from one time to the next; what is in a buffer was sent by anyone.
            again.head_mut(0)[20..22].copy_from_slice(&round.to_le_bytes());
            let burst = [&again, &another, &passing][(random.next() % 3) as usize];
            let expected: Vec<_> = (0..burst.len()).map(|i| frame_of(burst, i)).collect();
            assert_eq!(out.send(burst), 4, "{net:?}");
            let got: Vec<_> = out.drain().into_iter().map(|(frame, _)| frame).collect();
            assert!(got == expected, "{net:?} round {round}");
        }
    }
    let mut copy = Burst::new();
    copy.push_copy(&again, 0);
    assert_eq!(copy.lasting_body(0), None, "a copy may change");
    again.clear();
    assert_eq!(again.lasting_body(0), None);
}

/// Packets that last leave what stands in their buffers alone, and whatever else passes by those buffers is written.
#[test]
fn a_packet_that_stands_in_a_buffer_is_written_again_only_where_something_has_changed() {
    let lens = [60, 300, 1_514, 60, 4_000];
    let several = |tag| burst_of(&lens.map(|len| frame(len, tag)));
    let (mut again, mut another, mut bodies) = (several(1), several(2), several(3));
    let passing = several(4);
    again.keep_packets();
    another.keep_packets();
    bodies.keep_bodies();
    for net in Net::every(8, Features::empty()) {
        let mut out = Outward::new(net);
        let mut random = Random::new(12);
        for round in 0..200_u16 {
            bodies.head_mut(0)[20..22].copy_from_slice(&round.to_le_bytes());
            let burst = [&again, &again, &another, &bodies, &passing][(random.next() % 5) as usize];
            let expected: Vec<_> = (0..burst.len()).map(|i| frame_of(burst, i)).collect();
            assert_eq!(out.send(burst), lens.len(), "{net:?}");
            let got: Vec<_> = out.drain().into_iter().map(|(frame, _)| frame).collect();
            assert!(got == expected, "{net:?} round {round}");
        }
    }
    // Eight times a short frame fill the ring once. Nobody writes there again, so what the device puts there is what it reads.
    let mut short = burst_of(&vec![frame(60, 5); 8]);
    short.keep_packets();
    for net in Net::every(8, Features::empty()) {
        let mut out = Outward::new(net);
        for _ in 0..3 {
            assert_eq!(out.send(&short), 8, "{net:?}");
            out.drain();
        }
        let (_, area) = memory_of(&net);
        let written = frame(60, 6);
        for i in 0..8 {
            let at = GuestAddr(area.start.0 + u64::from(i * BufferArea::STRIDE) + 64);
            let place = out.memory.translate(at, 60, &mut 0).unwrap();
            out.memory.slice(place).copy_from(&written);
        }
        assert_eq!(out.send(&short), 8);
        assert!(
            out.drain().iter().all(|(frame, _)| *frame == written),
            "{net:?}"
        );
        short.set_offload(0, Offload::default());
        assert_eq!(out.send(&short), 8);
        assert!(
            out.drain().iter().all(|(got, _)| *got == frame(60, 5)),
            "{net:?}"
        );
        short.keep_packets();
    }
}

/// Any frames in any rhythm: everything that was accepted arrives, in order, and every drop is counted.
#[test]
fn what_the_driver_accepts_arrives_in_order() {
    for (seed, net) in Net::every(64, Features::MRG_RXBUF).enumerate() {
        let (mut out, mut back) = (Outward::new(net), Inward::new(net));
        let mut random = Random::new(seed as u64);
        let (mut out_sent, mut back_sent) = (Vec::new(), Vec::new());
        let (mut out_arrived, mut back_arrived) = (Vec::new(), Vec::new());
        for round in 0..600 {
            if random.below(2) == 0 {
                let frames: Vec<Vec<u8>> = (0..random.below(40))
                    .map(|k| {
                        let len = match random.below(10) {
                            0 => 14 + random.below(20_000),
                            _ => 14 + random.below(2000),
                        };
                        frame(len, round << 8 | k as u64)
                    })
                    .collect();
                let burst = burst_of(&frames);
                let n = out.send(&burst);
                out_sent.extend(plain(&frames[..n]));
                let n = back.fill(&burst);
                back_sent.extend(plain(&frames[..n]));
            }
            if random.below(3) == 0 {
                out_arrived.extend(out.drain());
            }
            if random.below(3) == 0 {
                back_arrived.extend(back.receive());
            }
        }
        out_arrived.extend(out.drain());
        back_arrived.extend(back.receive());
        assert!(out_arrived == out_sent, "{net:?}: out");
        assert!(back_arrived == back_sent, "{net:?}: back");
        assert_eq!(out.sent.sent, out_sent.len() as u64);
        assert_eq!(back.filled.sent, back_sent.len() as u64);
        assert_eq!(back.filled.tx_drops.total(), 0);
        assert!(out_sent.len() > 1000 && back_sent.len() > 1000);
    }
}

/// The burst is small, the ring is not: nothing is taken that has no place, and nothing twice.
#[test]
fn a_burst_without_room_leaves_packets_for_the_next() {
    for setup in both(256) {
        let mut queue = Inward::new(Net::new(setup, Features::MRG_RXBUF));
        let frames: Vec<Vec<u8>> = (0..60).map(|k| frame(1000 + 50 * k, k as u64)).collect();
        assert_eq!(queue.fill(&burst_of(&frames)), 60);
        let mut burst = Burst::new();
        burst.set_memory(&queue.memory);
        (0..60).for_each(|_| burst.push_bytes(&[0; 14], Offload::default()));
        let mut arrived = Vec::new();
        let mut first = 60;
        while queue.receive.has_work() {
            queue
                .receive
                .receive(&mut burst, &mut queue.received)
                .unwrap();
            assert!(burst.len() <= 64);
            arrived.extend((first..burst.len()).map(|i| frame_of(&burst, i)));
            burst.clear();
            first = 0;
            queue.receive.complete();
        }
        assert!(arrived == frames);
        assert_eq!(queue.received.received, 60);
    }
}

/// A hostile device: writes what it likes over the first buffers of a receiveq and returns them.
struct Liar {
    net: Net,
    ram: Ram,
    receive: DriverReceive,
    counters: PortCounters,
    used: u16,
}

impl Liar {
    fn new(net: Net) -> Self {
        let (memory, area) = memory_of(&net);
        let driver = DriverQueue::new(&net.config(), &memory).unwrap();
        let mut receive =
            DriverReceive::new(driver, Arc::clone(&memory), area, net.features).unwrap();
        receive.publish();
        Self {
            net,
            ram: Ram(memory),
            receive,
            counters: PortCounters::default(),
            used: 0,
        }
    }

    /// Returns buffers in order, each with a header that says so, and a length.
    fn give(&mut self, buffers: &[(u16, u32)]) {
        let setup = self.net.setup;
        for &(num_buffers, len) in buffers {
            let slot = u64::from(self.used % setup.size);
            let desc = setup.desc() + 16 * slot;
            let addr = self.ram.u64(desc);
            self.ram.fill(addr, 10, 0);
            self.ram.set_u16(addr + 10, num_buffers);
            if setup.is_packed() {
                self.ram.set_u32(desc + 8, len);
                let lap_is_odd = (self.used / setup.size).is_multiple_of(2);
                self.ram
                    .set_u16(desc + 14, 2 | if lap_is_odd { 0x8080 } else { 0 });
            } else {
                let element = setup.device_area() + 4 + 8 * slot;
                self.ram.set_u32(element, slot as u32);
                self.ram.set_u32(element + 4, len);
            }
            self.used += 1;
        }
        if !setup.is_packed() {
            self.ram.set_u16(setup.device_area() + 2, self.used);
        }
    }

    fn receive(&mut self) -> Result<usize, RingError> {
        let mut burst = Burst::new();
        let taken = self.receive.receive(&mut burst, &mut self.counters);
        assert_eq!(
            self.counters.received,
            burst.len() as u64 + self.counters.rx_drops.total()
        );
        taken
    }
}

#[test]
fn n22_a_hash_arrives_with_the_packet_it_is_of() {
    let hasher = Hasher::new(HashTypes::SUPPORTED, &[0x5a; 40]);
    for net in Net::every(32, Features::MRG_RXBUF | Features::HASH_REPORT) {
        let mut queue = Inward::new(net);
        // Of one buffer, of several, and of no protocol that is hashed; before somebody asks for hashes there are none.
        let mut frames = vec![frame(60, 1), frame(5000, 2), frame(100, 3)];
        for frame in &mut frames[..2] {
            frame[12..15].copy_from_slice(&[8, 0, 0x45]);
        }
        frames[2][12..14].copy_from_slice(&[8, 6]);
        for asked in [false, true] {
            if asked {
                queue.fill.set_hasher(Some(Arc::new(hasher.clone())));
            }
            assert_eq!(queue.fill(&burst_of(&frames)), 3);
            let mut burst = Burst::new();
            queue
                .receive
                .receive(&mut burst, &mut queue.received)
                .unwrap();
            assert_eq!(burst.len(), 3);
            for (i, frame) in frames.iter().enumerate() {
                let expected = hasher.hash(frame);
                assert_eq!(expected.report > 0, i < 2);
                let expected = if asked {
                    expected
                } else {
                    PacketHash::default()
                };
                assert_eq!(burst.hash(i), expected);
            }
            burst.clear();
            assert_eq!(burst.hash(0), PacketHash::default());
            queue.receive.complete();
        }
    }
}

#[test]
fn tc9_a_length_that_is_no_frame_is_a_drop() {
    for setup in both(8) {
        for more in [
            Features::empty(),
            Features::MRG_RXBUF,
            Features::HASH_REPORT,
            Features::HASH_REPORT | Features::MRG_RXBUF,
        ] {
            let header = if more.contains(Features::HASH_REPORT) {
                20
            } else {
                12
            };
            for (len, reason) in [
                (0, DropReason::Malformed),
                (1, DropReason::Malformed),
                (11, DropReason::Malformed),
                (header - 1, DropReason::Malformed),
                (header, DropReason::Runt),
                (header + 13, DropReason::Runt),
            ] {
                let mut liar = Liar::new(Net::new(setup, more));
                // Whatever the header would say.
                for num_buffers in [1, 0, 7] {
                    let num_buffers = if len < header { num_buffers } else { 1 };
                    liar.give(&[(num_buffers, len)]);
                    assert_eq!(liar.receive(), Ok(1), "{len} bytes");
                    assert!(liar.receive.complete());
                }
                assert_eq!(liar.counters.rx_drops.of(reason), 3, "{len} bytes");
                assert_eq!(liar.counters.received, 3);
            }
        }
    }
}

#[test]
fn tc11_a_packet_of_no_buffers_or_too_many_breaks_the_ring() {
    for setup in both(8) {
        for num_buffers in [0, 2, 3, 8, 9, 64, 65, 0x7fff, u16::MAX] {
            let mut liar = Liar::new(Net::new(setup, Features::MRG_RXBUF));
            liar.give(&[(num_buffers, 100)]);
            let expected = Err(RingError::NumBuffers {
                found: num_buffers,
                available: 1,
            });
            assert_eq!(liar.receive(), expected);
            assert_eq!(liar.receive(), expected, "it stays broken");
        }
        // Behind a good one, and with some of its buffers there.
        let mut liar = Liar::new(Net::new(setup, Features::MRG_RXBUF));
        liar.give(&[(1, 100), (3, 100), (0, 100)]);
        let mut burst = Burst::new();
        let error = liar.receive.receive(&mut burst, &mut liar.counters);
        let expected = RingError::NumBuffers {
            found: 3,
            available: 2,
        };
        assert_eq!(error, Err(expected));
        // Without mergeable buffers the field means nothing.
        for num_buffers in [0, 1, 2, u16::MAX] {
            let mut liar = Liar::new(Net::new(setup, Features::empty()));
            liar.give(&[(num_buffers, 100)]);
            assert_eq!(liar.receive(), Ok(1));
        }
    }
}

#[test]
fn a_packet_whose_further_buffers_are_empty_is_what_is_there() {
    for setup in both(8) {
        let mut liar = Liar::new(Net::new(setup, Features::MRG_RXBUF));
        liar.give(&[(3, 112), (0, 0), (0, 40)]);
        let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
        assert_eq!(liar.receive.receive(&mut burst, &mut counters), Ok(3));
        assert_eq!((burst.len(), burst.frame_len(0)), (1, 140));
        assert_eq!(frame_of(&burst, 0).len(), 140);
        // The head alone is no packet.
        burst.clear();
        liar.receive.complete();
        liar.give(&[(2, 12), (0, 0), (2, 12), (0, 14)]);
        assert_eq!(liar.receive.receive(&mut burst, &mut counters), Ok(4));
        assert_eq!(
            (burst.len(), counters.rx_drops.of(DropReason::Runt)),
            (1, 1)
        );
        assert_eq!(counters.received, 3);
    }
}

#[test]
fn tc12_a_header_that_makes_no_sense_is_a_drop() {
    let more = Features::GUEST_CSUM | Features::GUEST_TSO4 | Features::GUEST_USO6;
    let rows: [(&str, [u8; 10], bool); 9] = [
        ("plain", [0; 10], true),
        ("validated", [2, 0, 0, 0, 0, 0, 0, 0, 0, 0], true),
        (
            "flags nobody knows",
            [0xfe, 0, 1, 2, 3, 4, 5, 6, 7, 8],
            true,
        ),
        ("checksum", [1, 0, 0, 0, 0, 0, 34, 0, 16, 0], true),
        (
            "checksum behind the frame",
            [1, 0, 0, 0, 0, 0, 99, 0, 0, 0],
            false,
        ),
        (
            "checksum far behind",
            [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            false,
        ),
        ("udp", [1, 5, 0, 0, 1, 0, 34, 0, 6, 0], true),
        ("tcp6", [1, 4, 0, 0, 1, 0, 34, 0, 6, 0], false),
        (
            "segments of nothing",
            [1, 1, 0, 0, 0, 0, 34, 0, 16, 0],
            false,
        ),
    ];
    for setup in both(8) {
        for (name, header, good) in rows {
            let mut liar = Liar::new(Net::new(setup, more));
            let addr = liar.ram.u64(setup.desc());
            liar.give(&[(1, 112)]);
            liar.ram.write(addr, &header);
            assert_eq!(liar.receive(), Ok(1), "{name}");
            let bad = liar.counters.rx_drops.of(DropReason::BadOffload);
            assert_eq!(bad, u64::from(!good), "{name}");
        }
    }
}

/// A long frame's metadata is held against all of it, not against what stands in its first buffer.
#[test]
fn a_checksum_in_the_second_buffer_is_legal() {
    let net = Net::new(both(8)[0], Features::GUEST_CSUM | Features::MRG_RXBUF);
    let mut liar = Liar::new(net);
    let addr = liar.ram.u64(net.setup.desc());
    liar.give(&[(2, 12 + 20), (0, 100)]);
    liar.ram.write(addr, &[1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
    assert_eq!(liar.receive(), Ok(2));
    assert_eq!(liar.counters.rx_drops.total(), 0);
}

#[test]
fn tc17_a_device_that_takes_nothing_stops_the_sender_and_no_more() {
    for setup in both(8) {
        let mut queue = Outward::new(Net::new(setup, Features::empty()));
        let burst = burst_of(&vec![frame(60, 1); 20]);
        assert_eq!(queue.send(&burst), 8);
        for _ in 0..10 {
            assert_eq!(queue.send(&burst), 0);
        }
        assert_eq!((queue.send.in_flight(), queue.sent.sent), (8, 8));
        let none = queue.send.send(&burst, &Picks::default(), &mut queue.sent);
        assert_eq!(none, Ok(0));
    }
}

#[test]
fn tc7_a_broken_transmitq_is_told_once_nothing_more_can_be_accepted() {
    let setup = Setup::new(RingFormat::Split, 8);
    let mut queue = Outward::new(Net::new(setup, Features::empty()));
    let ram = Ram(Arc::clone(&queue.memory));
    assert_eq!(queue.send(&burst_of(&vec![frame(60, 1); 4])), 4);
    ram.set_u16(setup.device_area() + 2, 5);
    let broken = RingError::UsedIndex {
        found: 5,
        expected: 0,
        outstanding: 4,
    };
    // Three long frames want more buffers than are left, which is when the lie is found.
    let long = frame(2 * BufferArea::FRAME_ROOM as usize, 2);
    let burst = burst_of(&[long.clone(), long.clone(), long]);
    let sent = queue.send.send(&burst, &all(&burst), &mut queue.sent);
    assert_eq!((sent, queue.sent.sent), (Ok(2), 6));
    let sent = queue.send.send(&burst, &all(&burst), &mut queue.sent);
    assert_eq!((sent, queue.sent.sent), (Err(broken), 6));
}

#[test]
fn buffers_outside_the_memory_are_refused() {
    let net = Net::new(both(8)[0], Features::empty());
    let (memory, area) = memory_of(&net);
    for start in [area.start.0 + 4096, 0, u64::MAX - 8 * 2304] {
        let area = BufferArea {
            start: GuestAddr(start),
            ..area
        };
        let queue = || DriverQueue::new(&net.config(), &memory).unwrap();
        DriverTransmit::new(queue(), Arc::clone(&memory), area, net.features).unwrap_err();
        DriverReceive::new(queue(), Arc::clone(&memory), area, net.features).unwrap_err();
    }
}
