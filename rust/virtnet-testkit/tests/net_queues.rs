//! The network device between two fake guests: what one transmits the other receives, whatever shape the buffers have.

use virtnet_packet::{Burst, HEAD_MAX, Offload, Picks, PortCounters};
use virtnet_testkit::frame::pattern;
use virtnet_testkit::{
    FakeGuest, GuestQueue, HEADER_LEN, PackedQueue, SplitQueue, net_header, offer_frame, packets,
};
use virtnet_virtio::net::{ReceiveQueue, TransmitQueue};
use virtnet_virtio::{DeviceQueue, Features};

const SIZE: u16 = 64;

struct Side {
    guest: FakeGuest,
    queue: Box<dyn GuestQueue>,
    counters: PortCounters,
}

impl Side {
    fn new(features: Features) -> (Self, DeviceQueue) {
        let mut guest = FakeGuest::new(1 << 20);
        let queue: Box<dyn GuestQueue> = if features.contains(Features::RING_PACKED) {
            Box::new(PackedQueue::new(&mut guest, SIZE, features))
        } else {
            Box::new(SplitQueue::new(&mut guest, SIZE, features))
        };
        let config = queue.config(&guest, features);
        let device = DeviceQueue::new(&config, guest.memory()).expect("areas in memory");
        let counters = PortCounters::default();
        let side = Self {
            guest,
            queue,
            counters,
        };
        (side, device)
    }
}

/// A sender, a receiver, and the device between them.
struct Wire {
    sender: Side,
    transmit: TransmitQueue,
    receiver: Side,
    receive: ReceiveQueue,
    burst: Burst,
}

impl Wire {
    fn new(features: Features) -> Self {
        let (sender, transmit) = Side::new(features);
        let (receiver, receive) = Side::new(features);
        Self {
            sender,
            transmit: TransmitQueue::new(transmit, features),
            receiver,
            receive: ReceiveQueue::new(receive, features),
            burst: Burst::new(),
        }
    }

    fn offer(&mut self, frame: &[u8], cuts: &[usize]) {
        let header = net_header(&Offload::default(), 0);
        let Side { guest, queue, .. } = &mut self.sender;
        offer_frame(guest, &mut **queue, &header, frame, cuts);
    }

    /// Room for a packet: one chain of buffers.
    fn make_room(&mut self, lens: &[u32]) {
        let Side { guest, queue, .. } = &mut self.receiver;
        let buffers: Vec<_> = lens.iter().map(|&len| guest.writable(len)).collect();
        queue.offer(guest, &buffers);
    }

    fn drain(&mut self) {
        self.burst.clear();
        let memory = self.sender.guest.memory();
        self.transmit
            .drain(memory, &mut self.burst, &mut self.sender.counters)
            .expect("an honest ring");
    }

    /// The second half of a breath; the packets that arrived.
    fn deliver(&mut self) -> Vec<Vec<u8>> {
        let picks = Picks::first(self.burst.len());
        let memory = self.receiver.guest.memory();
        self.receive
            .fill(memory, &self.burst, &picks, &mut self.receiver.counters)
            .expect("an honest ring");
        self.receive.publish();
        self.transmit.complete();
        self.sender.queue.collect(&mut self.sender.guest);
        let returned = self.receiver.queue.collect(&mut self.receiver.guest);
        let packets = packets(&returned);
        for (header, _) in &packets {
            assert_eq!(header[..10], [0; 10], "a plain frame has a plain header");
        }
        packets.into_iter().map(|(_, frame)| frame).collect()
    }
}

/// Both formats, with what changes how buffers are taken and given back.
fn everywhere(mut test: impl FnMut(Features)) {
    for format in [Features::empty(), Features::RING_PACKED] {
        for order in [Features::empty(), Features::IN_ORDER] {
            for merge in [Features::empty(), Features::MRG_RXBUF] {
                test(Features::VERSION_1 | format | order | merge);
            }
        }
    }
}

#[test]
fn every_length_in_every_shape_arrives_as_it_was_sent() {
    let shapes: [&[usize]; 7] = [
        &[],
        &[HEADER_LEN],
        &[5],
        &[1, 2, 3],
        &[HEADER_LEN, HEADER_LEN + 14],
        &[HEADER_LEN + 1, HEADER_LEN + 13],
        &[4, 8, HEADER_LEN, 20],
    ];
    everywhere(|features| {
        let mut wire = Wire::new(features);
        let lens = [14, 15, 60, HEAD_MAX - 1, HEAD_MAX, HEAD_MAX + 1, 1514, 9014];
        for (seed, &len) in lens.iter().enumerate() {
            for cuts in shapes {
                let frame = pattern(len, seed);
                wire.offer(&frame, cuts);
                wire.make_room(&[7, 20_000]);
                wire.drain();
                assert_eq!(
                    wire.deliver(),
                    [frame],
                    "{len} cut at {cuts:?}, {features:?}"
                );
            }
        }
    });
}

#[test]
fn a_long_packet_is_spread_over_buffers_where_that_was_negotiated() {
    everywhere(|features| {
        let mut wire = Wire::new(features);
        let frame = pattern(1514, 1);
        wire.offer(&frame, &[]);
        for len in [100, 700, 64, 2000, 50] {
            wire.make_room(&[len]);
        }
        wire.drain();
        let merged = features.contains(Features::MRG_RXBUF);
        let expected = if merged { vec![frame] } else { vec![] };
        // Without merging it needs a chain that is long enough, and the first one is not.
        let arrived = if merged {
            wire.deliver()
        } else {
            let picks = Picks::first(1);
            let memory = wire.receiver.guest.memory();
            let counters = &mut wire.receiver.counters;
            wire.receive
                .fill(memory, &wire.burst, &picks, counters)
                .unwrap();
            wire.receive.publish();
            wire.receiver.guest.check();
            assert_eq!(counters.sent, 0);
            vec![]
        };
        assert_eq!(arrived, expected);
    });
}

#[test]
fn bursts_go_round_the_ring_many_times() {
    everywhere(|features| {
        let mut wire = Wire::new(features);
        let mut sent = 0;
        for round in 0..20 {
            let n = 1 + round * 7 % 30;
            let frames: Vec<_> = (0..n)
                .map(|i| pattern(60 + (i * 97 + round) % 400, sent + i))
                .collect();
            sent += n;
            for frame in &frames {
                wire.offer(frame, &[HEADER_LEN]);
                wire.make_room(&[600]);
            }
            wire.drain();
            assert_eq!(wire.deliver(), frames);
        }
        assert_eq!(wire.sender.counters.received, sent as u64);
        assert_eq!(wire.receiver.counters.sent, sent as u64);
    });
}

/// A guest that rewrites its buffers while they are on their way garbles its own body bytes; what was decided on stays.
#[test]
fn the_head_of_a_packet_is_what_was_decided_on() {
    everywhere(|features| {
        let mut wire = Wire::new(features);
        let frame = pattern(1000, 1);
        let header = net_header(&Offload::default(), 0);
        let guest = &mut wire.sender.guest;
        let buffer = guest.readable(&[&header[..], &frame].concat());
        wire.sender.queue.offer(guest, &[buffer]);
        wire.make_room(&[2000]);
        wire.drain();
        wire.sender.guest.write(buffer.addr, &[0xee; 1012]);
        let arrived = wire.deliver().remove(0);
        assert_eq!(arrived[..HEAD_MAX], frame[..HEAD_MAX]);
        assert_eq!(arrived[HEAD_MAX..], [0xee; 1000 - HEAD_MAX]);
    });
}
