//! A control queue between our device and our driver, and what drivers may put into it instead of a command.

use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory};
use virtnet_virtio::net::control::{
    CONTROL_MAX, Command, ControlQueue, Controls, DriverControl, ERR, OK, QueueCounts,
};
use virtnet_virtio::{DeviceQueue, DriverBuffer, DriverQueue, Features, Used};

use crate::support::{Ram, Setup};

const NEGOTIATED: Features = Features::CTRL_VQ
    .union(Features::CTRL_RX)
    .union(Features::MQ)
    .union(Features::DEVICE_STATS);

/// Bytes behind the ring.
const ROOM: u64 = 1 << 20;

struct World {
    memory: Arc<GuestMemory>,
    ram: Ram,
    data: u64,
    device: ControlQueue,
    controls: Controls,
}

impl World {
    fn new(setup: &Setup) -> (Self, DriverQueue) {
        let (memory, _file) = setup.memory(ROOM);
        let driver = DriverQueue::new(&setup.config(), &memory).unwrap();
        let device = DeviceQueue::new(&setup.config(), &memory).unwrap();
        let world = Self {
            ram: Ram(Arc::clone(&memory)),
            memory,
            data: setup.data(),
            device: ControlQueue::new(device),
            controls: Controls::new(NEGOTIATED, 8, None),
        };
        (world, driver)
    }

    /// Whether there was a request, and whether the driver is to be called.
    fn serve(&mut self) -> (bool, bool) {
        let counts = |_| QueueCounts::default();
        let controls = &mut self.controls;
        let served = self
            .device
            .serve(&self.memory, |request, answer| {
                controls.serve(request, counts, answer);
            })
            .unwrap();
        (served, self.device.publish())
    }
}

fn readable(at: u64, len: u32) -> DriverBuffer {
    DriverBuffer {
        addr: GuestAddr(at),
        len,
        writable: false,
    }
}

fn writable(at: u64, len: u32) -> DriverBuffer {
    DriverBuffer {
        writable: true,
        ..readable(at, len)
    }
}

#[test]
fn commands_are_answered_one_after_the_other_over_many_laps() {
    for setup in Setup::all(4) {
        let (mut world, queue) = World::new(&setup);
        let area = GuestAddr(setup.data());
        let mut driver = DriverControl::new(queue, Arc::clone(&world.memory), area).unwrap();
        for round in 0..50 {
            let pairs = round % 10;
            assert_eq!(driver.answer().unwrap(), None);
            assert!(driver.ask(&Command::SetPairs(pairs).encode()).is_some());
            assert!(driver.is_asking() && driver.ask(&[4, 0, 1, 0]).is_none());
            assert!(world.serve().0);
            assert!(!world.serve().0);
            let verdict = if (1..=8).contains(&pairs) { OK } else { ERR };
            assert_eq!(driver.answer().unwrap(), Some(vec![verdict]), "{setup:?}");
            if verdict == OK {
                assert_eq!(world.controls.settings().pairs, pairs);
            }
        }
        assert!(driver.ask(&Command::AskStats.encode()).is_some());
        world.serve();
        let expected = [&[OK][..], &(1_u64 | 1 << 16 | 1 << 32).to_le_bytes()].concat();
        assert_eq!(driver.answer().unwrap(), Some(expected));
        assert_eq!(driver.ask(&vec![0; DriverControl::ROOM as usize + 1]), None);
    }
}

/// Every buffer of a request may be cut anywhere, and the answer's may be too.
#[test]
fn framing_is_the_drivers_own_business() {
    for setup in Setup::all(16) {
        let (mut world, mut driver) = World::new(&setup);
        let request = Command::SetPairs(5).encode();
        for cut in 1..request.len() {
            world.ram.write(world.data, &request);
            world.ram.fill(world.data + 100, 4, 0x55);
            let (first, rest) = (cut as u32, (request.len() - cut) as u32);
            let chain = [
                readable(world.data, first),
                readable(world.data + u64::from(first), rest),
                writable(world.data + 100, 1),
                writable(world.data + 101, 3),
            ];
            driver.add(&chain).unwrap();
            driver.publish();
            assert!(world.serve().0);
            let mut used = [Used::default(); 2];
            assert_eq!(driver.reap(&mut used).unwrap(), 1);
            assert_eq!(used[0].len, 1);
            assert_eq!(world.ram.read(world.data + 100, 4), [OK, 0x55, 0x55, 0x55]);
        }
    }
}

#[test]
fn what_is_no_request_comes_back_and_the_queue_goes_on() {
    for setup in Setup::all(16) {
        let (mut world, mut driver) = World::new(&setup);
        let at = world.data;
        let nowhere = 0x7fff_ffff_0000;
        // What is made available, how many bytes come back, and the first of them.
        let cases: Vec<(Vec<DriverBuffer>, u32, Option<u8>)> = vec![
            // No room for a verdict, or no request.
            (vec![readable(at, 4)], 0, None),
            (vec![writable(at + 100, 4)], 1, Some(ERR)),
            // Half a command, and half a header.
            (vec![readable(at, 3), writable(at + 100, 4)], 1, Some(ERR)),
            (vec![readable(at, 1), writable(at + 100, 4)], 1, Some(ERR)),
            // Longer than any command.
            (
                vec![readable(at, CONTROL_MAX + 1), writable(at + 100, 4)],
                1,
                Some(ERR),
            ),
            (vec![readable(at, 4), writable(nowhere, 4)], 0, None),
            (vec![readable(nowhere, 4), writable(at + 100, 4)], 0, None),
            // Room before the request.
            (vec![writable(at + 100, 4), readable(at, 4)], 0, None),
        ];
        for (chain, len, verdict) in cases {
            world.ram.write(at, &Command::SetPairs(5).encode());
            world.ram.write(at + 100, &[0x55]);
            let before = world.controls.settings().clone();
            driver.add(&chain).unwrap();
            driver.publish();
            assert!(world.serve().0);
            let mut used = [Used::default(); 2];
            assert_eq!(driver.reap(&mut used).unwrap(), 1);
            assert_eq!(used[0].len, len, "{chain:?}");
            let expected = verdict.unwrap_or(0x55);
            assert_eq!(world.ram.read(at + 100, 1), [expected], "{chain:?}");
            if verdict == Some(ERR) {
                assert_eq!(*world.controls.settings(), before);
            }
        }
        // A longer answer than there is room for ends where the room does.
        world.ram.write(at, &Command::AskStats.encode());
        driver
            .add(&[readable(at, 2), writable(at + 100, 5)])
            .unwrap();
        driver.publish();
        assert!(world.serve().0);
        let mut used = [Used::default(); 2];
        assert_eq!(driver.reap(&mut used).unwrap(), 1);
        assert_eq!(used[0].len, 5);
    }
}
