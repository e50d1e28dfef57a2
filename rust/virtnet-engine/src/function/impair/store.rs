//! The packets that wait, in buffers that are used again.

use virtnet_packet::{Burst, Offload, PacketHash};

/// A buffer larger than this is not kept for the next packet.
const SPARE_BYTES_MAX: usize = 2048;

/// A packet that waits.
#[derive(Debug, Default)]
pub(super) struct Packet {
    pub(super) frame: Vec<u8>,
    pub(super) offload: Offload,
    pub(super) hash: PacketHash,
    /// Its number among those that were taken.
    pub(super) number: u64,
    /// When it came.
    pub(super) came: u64,
    /// When the limits of rate let it go.
    pub(super) went: u64,
    /// How long it is to be on its way then.
    pub(super) delay: u64,
}

/// Packets by small numbers.
#[derive(Debug, Default)]
pub(super) struct Store {
    packets: Vec<Packet>,
    free: Vec<u32>,
    bytes: usize,
}

impl Store {
    pub(super) fn len(&self) -> usize {
        self.packets.len() - self.free.len()
    }

    /// Bytes of all frames.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keeps a copy of packet `i`.
    #[inline]
    pub(super) fn keep(&mut self, burst: &Burst, i: usize) -> (u32, &mut Packet) {
        let key = self.place();
        let packet = &mut self.packets[key as usize];
        let (len, head) = (burst.frame_len(i), burst.head(i));
        packet.frame.extend_from_slice(head);
        if len > head.len() {
            packet.frame.resize(len, 0);
            burst.copy_frame(i, &mut packet.frame);
        }
        (packet.offload, packet.hash) = (burst.offload(i), burst.hash(i));
        self.bytes += len;
        (key, packet)
    }

    /// Keeps a copy of a frame with nothing left to do.
    pub(super) fn keep_frame(&mut self, frame: &[u8]) -> u32 {
        let key = self.place();
        let packet = &mut self.packets[key as usize];
        packet.frame.extend_from_slice(frame);
        (packet.offload, packet.hash) = (Offload::default(), PacketHash::default());
        self.bytes += frame.len();
        key
    }

    #[inline]
    fn place(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.packets.push(Packet::default());
            // There is a bound on their bytes, which is far below this.
            u32::try_from(self.packets.len() - 1).unwrap_or(u32::MAX)
        })
    }

    #[inline]
    pub(super) fn get(&mut self, key: u32) -> &mut Packet {
        &mut self.packets[key as usize]
    }

    /// Lets a packet go.
    #[inline]
    pub(super) fn free(&mut self, key: u32) {
        let frame = &mut self.packets[key as usize].frame;
        self.bytes -= frame.len();
        frame.clear();
        if frame.capacity() > SPARE_BYTES_MAX {
            *frame = Vec::new();
        }
        self.free.push(key);
    }
}
