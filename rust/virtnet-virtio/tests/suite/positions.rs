//! Where a queue stands, told by both of its sides after every step.

use virtnet_mem::{GuestAddr, GuestMemory};
use virtnet_virtio::{
    Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, Features, Positions, QueueConfig,
    RingFormat, Used,
};

const SIZE: u16 = 4;
const START: u64 = 0x1_0000;

fn both_sides(format: RingFormat) -> (DriverQueue, DeviceQueue, std::sync::Arc<GuestMemory>) {
    let memory = GuestMemory::anonymous(0x4000, GuestAddr(START)).unwrap();
    let user = |at: u64| memory.user_addr(GuestAddr(START + at)).unwrap();
    let config = QueueConfig {
        size: SIZE,
        desc_area: user(0),
        driver_area: user(0x1000),
        device_area: user(0x2000),
        base: format.fresh_base(),
        features: match format {
            RingFormat::Split => Features::VERSION_1,
            RingFormat::Packed => Features::VERSION_1 | Features::RING_PACKED,
        },
    };
    let driver = DriverQueue::new(&config, &memory).unwrap();
    let device = DeviceQueue::new(&config, &memory).unwrap();
    (driver, device, memory)
}

fn send(driver: &mut DriverQueue, n: usize) {
    for _ in 0..n {
        let buffer = DriverBuffer {
            addr: GuestAddr(START + 0x3000),
            len: 64,
            writable: false,
        };
        driver.add(&[buffer]).unwrap();
    }
    driver.publish();
}

fn take_and_give(device: &mut DeviceQueue, memory: &GuestMemory) {
    let mut chains = Chains::default();
    device.take(memory, Access::Read, 64, &mut chains).unwrap();
    device.give_all(&chains);
    device.publish();
}

#[test]
fn a_split_queue_tells_free_running_indexes_and_what_the_other_side_published() {
    let (mut driver, mut device, memory) = both_sides(RingFormat::Split);
    let at = |avail, used, published, waiting| Positions {
        avail,
        used,
        wraps: None,
        published: Some(published),
        waiting,
    };
    assert_eq!(device.positions(), at(0, 0, 0, 0));
    send(&mut driver, 3);
    assert_eq!(device.positions(), at(0, 0, 3, 3));
    assert_eq!(driver.positions(), at(3, 0, 0, 0));
    take_and_give(&mut device, &memory);
    assert_eq!(device.positions(), at(3, 3, 3, 0));
    assert_eq!(driver.positions(), at(3, 0, 3, 3));
    assert_eq!(driver.reap(&mut [Used::default(); 8]).unwrap(), 3);
    assert_eq!(driver.positions(), at(3, 3, 3, 0));
    send(&mut driver, 4);
    assert_eq!(device.positions(), at(3, 3, 7, 4));
}

#[test]
fn a_packed_queue_tells_slots_and_wrap_counters() {
    let (mut driver, mut device, memory) = both_sides(RingFormat::Packed);
    let at = |avail, used, wraps, waiting| Positions {
        avail,
        used,
        wraps: Some(wraps),
        published: None,
        waiting,
    };
    send(&mut driver, 3);
    assert_eq!(device.positions(), at(0, 0, [true; 2], 3));
    assert_eq!(driver.positions(), at(3, 0, [true; 2], 0));
    take_and_give(&mut device, &memory);
    assert_eq!(device.positions(), at(3, 3, [true; 2], 0));
    assert_eq!(driver.positions().waiting, 1);
    assert_eq!(driver.reap(&mut [Used::default(); 8]).unwrap(), 3);
    // Round the end: the ring is full, and its counters have turned.
    send(&mut driver, 4);
    assert_eq!(device.positions(), at(3, 3, [true; 2], 4));
    assert_eq!(driver.positions(), at(3, 3, [false, true], 0));
    take_and_give(&mut device, &memory);
    assert_eq!(device.positions(), at(3, 3, [false; 2], 0));
}

#[test]
fn an_index_that_cannot_be_is_told_as_it_is_and_counts_no_more_than_there_is_room_for() {
    let (_driver, device, memory) = both_sides(RingFormat::Split);
    let index = memory.slice(
        memory
            .translate(GuestAddr(START + 0x1002), 2, &mut 0)
            .unwrap(),
    );
    index.copy_from(&0xfff0_u16.to_le_bytes());
    let found = device.positions();
    assert_eq!((found.published, found.waiting), (Some(0xfff0), SIZE));
}
