//! Records of buffers in flight as the specification lays them out, written here by hand: by a device that died at every step of it,
//! by one that does not keep the order, and by somebody who means no good.

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr, Window};
use virtnet_virtio::inflight::region_bytes;
use virtnet_virtio::{
    Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, QueueConfig, StartError, Used,
};

use crate::support::{Ram, Random, Setup, zero_file};

const SIZE: u16 = 8;

/// A driver whose five chains of one buffer each stand in the ring, and an empty record.
struct Scene {
    setup: Setup,
    config: QueueConfig,
    memory: Arc<GuestMemory>,
    driver: DriverQueue,
    record: Ram,
    window: Window,
}

impl Scene {
    fn new(setup: Setup) -> Self {
        let (memory, _) = setup.memory(1 << 16);
        let config = setup.config();
        let mut driver = DriverQueue::new(&config, &memory).unwrap();
        for k in 0..5 {
            let buffer = DriverBuffer {
                addr: GuestAddr(setup.data() + 64 * k),
                len: 64,
                writable: false,
            };
            driver.add(&[buffer]).unwrap();
        }
        driver.publish();
        let bytes = region_bytes(setup.format, SIZE);
        let file = zero_file(4096).into();
        let region = Region::map_file(file, 0, 4096, GuestAddr(0), UserAddr(0)).unwrap();
        let record = Arc::new(GuestMemory::new(vec![region]).unwrap());
        let window = record.window(UserAddr(0), bytes, 64).unwrap();
        Self {
            setup,
            config,
            memory,
            driver,
            record: Ram(record),
            window,
        }
    }

    fn start(&self) -> Result<DeviceQueue, StartError> {
        DeviceQueue::resume(&self.config, &self.memory, &self.window)
    }

    /// Which buffers a device takes, by their number.
    fn taken(&self, device: &mut DeviceQueue) -> Vec<u64> {
        let mut chains = Chains::new();
        device
            .take(&self.memory, Access::Read, 64, &mut chains)
            .unwrap();
        let start = self.memory.regions()[0].guest().0;
        let numbers = (0..chains.len()).map(|i| {
            let [only] = *chains.segments(i) else {
                panic!("chain {i}: {:?}", chains.bytes(i));
            };
            (start + only.offset as u64 - self.setup.data()) / 64
        });
        numbers.collect()
    }

    /// Takes everything, in two bursts, gives it back and checks that the driver gets each chain once.
    fn finish(&mut self, mut device: DeviceQueue, expected: &[u64], ids: &[u16]) {
        assert_eq!(self.taken(&mut device), expected, "{:?}", self.setup);
        drop(device);
        // Gone again, before it has given anything back.
        let mut device = self.start().unwrap();
        let mut chains = Chains::new();
        for max in [2, 64] {
            device
                .take(&self.memory, Access::Read, max, &mut chains)
                .unwrap();
        }
        assert_eq!(chains.len(), expected.len());
        device.give_all(&chains);
        device.publish();
        let mut used = [Used::default(); 16];
        let n = self.driver.reap(&mut used).unwrap();
        let found: Vec<_> = used[..n].iter().map(|used| used.id).collect();
        assert_eq!(found, ids, "{:?}", self.setup);
        assert_eq!(self.taken(&mut self.start().unwrap()), [0_u64; 0]);
    }
}

fn setups() -> impl Iterator<Item = Setup> {
    Setup::all(SIZE).filter(|setup| !setup.event_idx && !setup.in_order)
}

#[test]
fn what_a_device_took_out_of_order_comes_again_in_the_order_in_which_it_was_taken() {
    for setup in setups().filter(|setup| !setup.is_packed()) {
        let mut scene = Scene::new(setup);
        drop(scene.start().unwrap());
        // It took four, gave the second one back, and died while it was clearing its mark: used index 1, record 0.
        let entry = |head: u64| 16 + 16 * head;
        for (head, counter) in [(0, 10), (1, 11), (2, 12), (3, 13)] {
            scene.record.set_u64(entry(head) + 8, counter);
            scene.record.set_u16(entry(head), 1);
        }
        scene.record.set_u16(12, 1);
        let ram = Ram(Arc::clone(&scene.memory));
        ram.set_u32(setup.device_area() + 4, 1);
        ram.set_u16(setup.device_area() + 2, 1);
        let mut used = [Used::default(); 4];
        assert_eq!(scene.driver.reap(&mut used).unwrap(), 1);
        let device = scene.start().unwrap();
        assert_eq!(scene.record.u16(14), 1, "the used index is recorded");
        assert_eq!(
            scene.record.u16(entry(1)),
            0,
            "what was given back is not in flight"
        );
        let mut twice = scene.start().unwrap();
        assert_eq!(
            scene.taken(&mut twice),
            [0, 2, 3],
            "first what was in flight"
        );
        drop((device, twice));
        let mut device = scene.start().unwrap();
        let mut chains = Chains::new();
        for expected in [2, 1, 1] {
            let n = device.take(&scene.memory, Access::Read, 2, &mut chains);
            assert_eq!(n.unwrap(), expected);
        }
        device.untake(3, &mut chains);
        for expected in [2, 1] {
            let n = device.take(&scene.memory, Access::Read, 2, &mut chains);
            assert_eq!(n.unwrap(), expected);
        }
        device.give_all(&chains);
        device.publish();
        let n = scene.driver.reap(&mut [Used::default(); 16]);
        assert_eq!(n.unwrap(), 4);
        assert_eq!(scene.taken(&mut scene.start().unwrap()), [0_u64; 0]);
    }
}

#[test]
fn descriptors_that_were_written_over_come_again_from_the_record() {
    for setup in setups().filter(Setup::is_packed) {
        for shown in [false, true] {
            let mut scene = Scene::new(setup);
            let mut device = scene.start().unwrap();
            assert_eq!(scene.taken(&mut device), [0, 1, 2, 3, 4]);
            drop(device);
            // It gave the first two back, and died before the record said so: entries 1 and 0 are free in front of the others.
            let ram = Ram(Arc::clone(&scene.memory));
            ram.set_u64(setup.desc() + 16 + 8, 0x8080 << 48 | 1 << 32);
            let entry = |index: u64| 32 + 32 * index;
            scene.record.set_u16(entry(0) + 2, 5);
            scene.record.set_u16(entry(1) + 2, 0);
            scene.record.set_u16(12, 1);
            scene.record.set_u16(16, 2);
            let ids: &[u16] = if shown {
                ram.set_u64(setup.desc() + 8, 0x8080 << 48);
                assert_eq!(scene.driver.reap(&mut [Used::default(); 4]).unwrap(), 2);
                &[2, 3, 4]
            } else {
                &[0, 1, 2, 3, 4]
            };
            let expected: Vec<_> = ids.iter().map(|&id| id.into()).collect();
            let device = scene.start().unwrap();
            scene.finish(device, &expected, ids);
        }
    }
}

#[test]
fn a_record_that_makes_no_sense_is_refused_and_nothing_worse() {
    let mut random = Random::new(3);
    for setup in setups() {
        let (mut refused, mut taken) = (0, 0);
        for _ in 0..3000 {
            let scene = Scene::new(setup);
            drop(scene.start().unwrap());
            for _ in 0..1 + random.below(6) {
                let at = random.below(scene.window.len()) as u64 & !1;
                scene.record.set_u16(at, random.below(12) as u16);
            }
            match scene.start() {
                Ok(mut device) => {
                    let mut chains = Chains::new();
                    let _ = device.take(&scene.memory, Access::Read, 64, &mut chains);
                    assert!(chains.len() <= usize::from(SIZE));
                    device.give_all(&chains);
                    device.publish();
                    taken += 1;
                }
                Err(StartError::Record(_)) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(refused > 100 && taken > 100, "{refused} {taken}");
    }
}
