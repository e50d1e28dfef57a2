//! Peers that write anything anywhere in the ring, at any time.

use virtnet_mem::GuestAddr;
use virtnet_packet::{BURST_MAX, Burst, Offload, Picks, PortCounters};
use virtnet_virtio::net::{ReceiveQueue, TransmitQueue};
use virtnet_virtio::{
    Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, Features, QueueConfig, Used,
};

use super::{Attack, DATA, FIRST, SECOND, THIRD};
use crate::support::{Random, Setup};

const SIZES: [u16; 5] = [1, 2, 3, 8, 64];

/// Writes something to some words of the rings: mostly plausible, sometimes not.
fn scribble(attack: &Attack, random: &mut Random) {
    let setup = &attack.setup;
    let size = usize::from(setup.size);
    for _ in 0..1 + random.below(6) {
        let desc = setup.desc() + 16 * random.below(size) as u64;
        match random.below(8) {
            0 => attack.ram.set_u64(desc, random.next()),
            1 => {
                let starts = [
                    setup.data(),
                    FIRST.start,
                    SECOND.start,
                    THIRD.start,
                    setup.desc(),
                ];
                let addr = starts[random.below(5)] + random.below(0x2000) as u64;
                attack.ram.set_u64(desc, addr);
            }
            2 => {
                let lens = [
                    0,
                    16,
                    32,
                    1 + random.below(9000) as u32,
                    random.next() as u32,
                ];
                attack.ram.set_u32(desc + 8, lens[random.below(5)]);
            }
            // Flags of a split descriptor, or an id; `next`, or the flags of a packed one.
            3 => attack.ram.set_u16(desc + 12, random.below(8) as u16),
            4 => attack.ram.set_u16(desc + 14, random.below(size + 1) as u16),
            5 => attack
                .ram
                .set_u16(desc + 14, (random.next() as u16) & 0x8087),
            6 => {
                let at = setup.driver_area() + 2 * random.below(size + 3) as u64;
                attack.ram.set_u16(at, random.below(size + 1) as u16);
            }
            _ => {
                let index = attack.ram.u16(setup.driver_area() + 2);
                let ahead = [1, 1, 1, size as u16, random.next() as u16][random.below(5)];
                attack
                    .ram
                    .set_u16(setup.driver_area() + 2, index.wrapping_add(ahead));
            }
        }
    }
}

/// What the device answered stays inside memory, whatever the ring says.
fn check_chains(attack: &Attack, chains: &Chains) {
    for i in 0..chains.len() {
        let regions = attack.ram.0.regions();
        let segments = chains.segments(i);
        for segment in segments {
            let size = regions[segment.region as usize].size();
            assert!(segment.offset as u64 + u64::from(segment.len) <= size);
        }
        let sum: u64 = segments.iter().map(|s| u64::from(s.len)).sum();
        match chains.bytes(i) {
            Ok(bytes) => assert!(bytes > 0 && u64::from(bytes) == sum),
            Err(_) => assert!(segments.is_empty()),
        }
    }
}

#[test]
fn a_device_survives_a_driver_that_writes_anything() {
    for size in SIZES {
        for (seed, setup) in Setup::all(size).enumerate() {
            let mut random = Random::new(seed as u64 * 77 + u64::from(size));
            for round in 0..150 {
                let access = [Access::Read, Access::Write][round % 2];
                let mut attack = Attack::new(setup, access);
                for _ in 0..60 {
                    scribble(&attack, &mut random);
                    let room = attack.chains.room();
                    let n = attack
                        .device
                        .take(&attack.ram.0, access, 8, &mut attack.chains);
                    if let Ok(n) = n {
                        assert!(n <= room.min(8) && n <= usize::from(size));
                    }
                    check_chains(&attack, &attack.chains);
                    if random.below(4) == 0 {
                        let n = random.below(attack.chains.len() + 1);
                        attack.device.untake(n, &mut attack.chains);
                    }
                    if random.below(3) == 0 {
                        attack.device.give_all(&attack.chains);
                        attack.chains.clear();
                        attack.device.publish();
                        attack.device.arm();
                    }
                    attack.device.disarm();
                    let _ = attack.device.has_work();
                    if random.below(20) == 0 {
                        attack.chains.clear();
                        let config = QueueConfig {
                            base: attack.device.base(),
                            ..setup.config()
                        };
                        attack.device = DeviceQueue::new(&config, &attack.ram.0).unwrap();
                    }
                }
            }
        }
    }
}

/// The network queues on such rings: every chain is a packet or a drop, every packet is accepted or not.
#[test]
fn network_queues_survive_a_driver_that_writes_anything() {
    let mut frames = Burst::new();
    for len in [60, 1514, 14, 9000, 200, 65_589] {
        frames.push_bytes(&vec![0x5a; len], Offload::default());
    }
    let picks = Picks::first(frames.len());
    for size in SIZES {
        for (seed, setup) in Setup::all(size).enumerate() {
            let mut random = Random::new(seed as u64 * 99 + u64::from(size));
            for round in 0..60 {
                let more = if round % 2 == 0 {
                    Features::MRG_RXBUF
                } else {
                    Features::CSUM
                };
                let features = setup.features() | more;
                let attack = Attack::new(setup, Access::Read);
                let queue = || DeviceQueue::new(&setup.config(), &attack.ram.0).unwrap();
                let mut transmit = TransmitQueue::new(queue(), features);
                let mut receive = ReceiveQueue::new(queue(), features);
                let (mut burst, mut counters) = (Burst::new(), PortCounters::default());
                let mut packets = 0;
                for _ in 0..60 {
                    scribble(&attack, &mut random);
                    let before = counters.received;
                    let drained = transmit.drain(&attack.ram.0, &mut burst, &mut counters);
                    if let Ok(n) = drained {
                        assert_eq!(counters.received - before, n as u64);
                    }
                    packets += burst.len();
                    assert!(burst.len() <= BURST_MAX);
                    assert_eq!(
                        counters.received,
                        packets as u64 + counters.rx_drops.total()
                    );
                    for i in 0..burst.len() {
                        let mut bytes = vec![0; burst.frame_len(i)];
                        assert_eq!(burst.copy_frame(i, &mut bytes), bytes.len());
                    }
                    burst.clear();
                    transmit.complete();

                    scribble(&attack, &mut random);
                    let before = counters.sent + counters.tx_drops.total();
                    let filled = receive.fill(&attack.ram.0, &frames, &picks, &mut counters);
                    let after = counters.sent + counters.tx_drops.total();
                    assert_eq!(after - before, filled.unwrap_or(0) as u64);
                    receive.publish();
                }
            }
        }
    }
}

/// Our driver under a device that writes anything: it gets back what it gave, once.
#[test]
fn a_driver_survives_a_device_that_writes_anything() {
    for size in SIZES {
        for (seed, setup) in Setup::all(size).enumerate() {
            let mut random = Random::new(seed as u64 * 55 + u64::from(size));
            let mut reaped = 0;
            for _ in 0..200 {
                let attack = Attack::new(setup, Access::Read);
                let ram = &attack.ram;
                let mut driver = DriverQueue::new(&setup.config(), &ram.0).unwrap();
                // Buffers of each chain that is out.
                let mut out = vec![0; usize::from(size)];
                let mut honest = 0;
                for _ in 0..80 {
                    let buffer = DriverBuffer {
                        addr: GuestAddr(setup.data()),
                        len: 100,
                        writable: true,
                    };
                    let n = 1 + random.below(3);
                    if let Some(id) = driver.add(&vec![buffer; n]) {
                        assert_eq!(std::mem::replace(&mut out[usize::from(id)], n), 0);
                    }
                    driver.publish();
                    let slot = random.below(usize::from(size)) as u64;
                    for _ in 0..random.below(4) {
                        let id = random.below(usize::from(size) + 1) as u16;
                        if setup.is_packed() {
                            let desc = setup.desc() + 16 * slot;
                            ram.set_u16(desc + 12, id);
                            ram.set_u32(desc + 8, random.below(210) as u32);
                            ram.set_u16(desc + 14, (random.next() as u16) & 0x8083);
                        } else {
                            let area = setup.device_area();
                            ram.set_u32(area + 4 + 8 * slot, u32::from(id));
                            ram.set_u32(area + 8 + 8 * slot, random.below(210) as u32);
                            honest += random.below(2) as u16;
                            let index = [honest, honest, honest, random.next() as u16];
                            ram.set_u16(area + 2, index[random.below(4)]);
                        }
                    }
                    let mut used = [Used::default(); 8];
                    let Ok(n) = driver.reap(&mut used) else {
                        break;
                    };
                    for used in &used[..n] {
                        let buffers = std::mem::take(&mut out[usize::from(used.id)]);
                        assert!(buffers > 0, "{} was not out", used.id);
                        assert!(used.len as usize <= 100 * buffers);
                        reaped += 1;
                    }
                    let free = usize::from(size) - out.iter().sum::<usize>();
                    assert_eq!(driver.free(), free);
                    let _ = driver.has_work();
                    driver.arm();
                    driver.disarm();
                }
                let data = ram.read(setup.data(), DATA as usize);
                assert!(
                    data.iter().all(|&byte| byte == 0),
                    "a driver writes no data"
                );
            }
            assert!(reaped > 4, "{setup:?}: only {reaped} came back");
        }
    }
}
