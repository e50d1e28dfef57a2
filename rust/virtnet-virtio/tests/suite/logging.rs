//! Which pages of a ring a device marks in the dirty log: those it has written, and no others.
//!
//! The Device Area is said to be logged four bytes before a page begins, so that flags and indexes have a page of their own.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use virtnet_mem::{DirtyLog, GuestAddr, GuestMemory, Iotlb, Permission, Region, UserAddr};
use virtnet_virtio::{
    Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, Features, QueueConfig, RingFormat, Used,
};

const PAGE: u64 = DirtyLog::PAGE;
const SIZE: u16 = 1024;

/// Where memory begins, and the page behind the first words of the Device Area as it is logged: beyond all memory.
const START: u64 = 16 * PAGE;
const LOGGED: u64 = 400;

/// Both sides of a queue in logged memory.
struct Logged {
    driver: DriverQueue,
    device: DeviceQueue,
    memory: GuestMemory,
    file: File,
}

impl Logged {
    fn new(format: RingFormat, more: Features) -> Self {
        let path = std::env::temp_dir().join(format!(
            "virtnet-log-{}-{format}-{}",
            std::process::id(),
            more.bits()
        ));
        fs::write(&path, [0; 64]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let log = DirtyLog::map_file(file.try_clone().unwrap().into(), 0, 64).unwrap();
        let region = Region::anonymous(64 * PAGE, GuestAddr(START)).unwrap();
        let memory = GuestMemory::new(vec![region]).unwrap();
        let memory = memory.with_log(Some(Arc::new(log)));
        let packed = match format {
            RingFormat::Packed => Features::RING_PACKED,
            RingFormat::Split => Features::empty(),
        };
        let config = QueueConfig {
            size: SIZE,
            desc_area: UserAddr(START),
            driver_area: UserAddr(START + 8 * PAGE),
            device_area: UserAddr(START + 16 * PAGE),
            base: format.fresh_base(),
            features: Features::VERSION_1 | packed | more,
        };
        let driver = DriverQueue::new(&config, &memory).unwrap();
        let mut device = DeviceQueue::new(&config, &memory).unwrap();
        device.log_to(&memory, &config, GuestAddr(LOGGED * PAGE - 4));
        Self {
            driver,
            device,
            memory,
            file,
        }
    }

    /// Has the device give back `n` chains, one after the other or all at once; the pages that it marked.
    fn pass(&mut self, n: usize, at_once: bool) -> BTreeSet<u64> {
        let buffer = |_| DriverBuffer {
            addr: GuestAddr(START + 40 * PAGE),
            len: 100,
            writable: true,
        };
        self.driver.add_each(n, buffer);
        self.driver.publish();
        let mut chains = Chains::new();
        let taken = self
            .device
            .take(&self.memory, Access::Write, n, &mut chains);
        assert_eq!(taken, Ok(n));
        if at_once {
            self.device.give_all(&chains);
        } else {
            self.device.give(&chains, 0, &vec![10; n]);
        }
        assert_eq!(
            self.marked(),
            [].into(),
            "nothing is marked before it is published"
        );
        self.device.publish();
        assert_eq!(self.driver.reap(&mut [Used::default(); 64]), Ok(n));
        self.marked()
    }

    /// Moves on to descriptor `slot`.
    fn go_to(&mut self, from: usize, slot: usize) {
        (from..slot).for_each(|_| drop(self.pass(1, false)));
    }

    /// Numbers of the pages that are marked, which are not marked any more.
    fn marked(&self) -> BTreeSet<u64> {
        let mut bytes = [0; 64];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        self.file.write_all_at(&[0; 64], 0).unwrap();
        let is_set = |page: &u64| bytes[(page / 8) as usize] >> (page % 8) & 1 == 1;
        (0..512).filter(is_set).collect()
    }
}

#[test]
fn u21_a_split_ring_marks_the_used_elements_it_writes_and_the_index() {
    // Flags and index lie before the first page; a page has 512 elements; the event is behind them.
    let (words, first, second, event) = (LOGGED - 1, LOGGED, LOGGED + 1, LOGGED + 2);
    for more in [
        Features::EVENT_IDX,
        Features::EVENT_IDX | Features::IN_ORDER,
    ] {
        let at_once = more.contains(Features::IN_ORDER);
        let mut ring = Logged::new(RingFormat::Split, more);
        assert_eq!(ring.pass(3, at_once), [words, first].into());
        ring.go_to(3, 510);
        assert_eq!(ring.pass(2, false), [words, first].into());
        assert_eq!(ring.pass(2, false), [words, second].into());
        ring.go_to(514, 1022);
        assert_eq!(ring.pass(2, false), [words, second].into());
        ring.go_to(0, 508);
        assert_eq!(ring.pass(8, false), [words, first, second].into());
        ring.go_to(516, 1020);
        assert_eq!(ring.pass(8, false), [words, first, second].into());
        assert!(!ring.device.arm());
        assert_eq!(ring.marked(), [event].into());
        ring.device.disarm();
        assert_eq!(ring.marked(), [].into(), "nothing is written");
        assert!(!ring.device.publish());
        assert_eq!(ring.marked(), [].into(), "nothing is published");
    }
    let mut ring = Logged::new(RingFormat::Split, Features::empty());
    assert!(!ring.device.arm());
    assert_eq!(ring.marked(), [words].into());
    ring.device.disarm();
    assert_eq!(ring.marked(), [words].into());
}

#[test]
fn u21_a_packed_ring_marks_the_descriptors_it_writes_and_its_event() {
    // A page has 256 descriptors.
    let page = |slot: u64| START / PAGE + slot / 256;
    for more in [Features::EVENT_IDX, Features::IN_ORDER] {
        let at_once = more.contains(Features::IN_ORDER);
        let mut ring = Logged::new(RingFormat::Packed, more);
        assert_eq!(ring.pass(3, at_once), [page(0)].into());
        ring.go_to(3, 252);
        assert_eq!(ring.pass(4, false), [page(0)].into());
        assert_eq!(ring.pass(4, false), [page(256)].into());
        ring.go_to(260, 510);
        assert_eq!(ring.pass(4, false), [page(510), page(512)].into());
        ring.go_to(514, 1020);
        assert_eq!(ring.pass(8, false), [page(1020), page(0)].into());
        ring.go_to(4, 1020);
        assert_eq!(ring.pass(4, false), [page(1020)].into());
        // Four bytes, all of them before the page.
        assert!(!ring.device.arm());
        assert_eq!(ring.marked(), [LOGGED - 1].into());
        ring.device.disarm();
        assert_eq!(ring.marked(), [LOGGED - 1].into());
    }
}

#[test]
fn u21_behind_an_iommu_the_guest_addresses_of_a_ring_are_marked_not_its_io_addresses() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let mut ring = Logged::new(format, Features::CSUM);
        let mut iotlb = Iotlb::default();
        let io = 200 * PAGE;
        iotlb
            .insert(
                &ring.memory,
                io,
                64 * PAGE,
                UserAddr(START),
                Permission::BOTH,
            )
            .unwrap();
        let memory = ring.memory.translated(iotlb);
        let packed = match format {
            RingFormat::Packed => Features::RING_PACKED,
            RingFormat::Split => Features::empty(),
        };
        let config = QueueConfig {
            size: SIZE,
            desc_area: UserAddr(io),
            driver_area: UserAddr(io + 8 * PAGE),
            device_area: UserAddr(io + 16 * PAGE),
            base: format.fresh_base(),
            features: Features::VERSION_1 | packed,
        };
        ring.device = DeviceQueue::new(&config, &memory).unwrap();
        ring.device
            .log_to(&memory, &config, GuestAddr(config.device_area.0));
        ring.device.arm();
        assert_eq!(ring.marked(), [START / PAGE + 16].into());
    }
}

#[test]
fn u21_what_a_device_finds_and_mends_in_a_ring_is_marked_with_all_of_it() {
    for (format, pages) in [
        (
            RingFormat::Split,
            vec![LOGGED - 1, LOGGED, LOGGED + 1, LOGGED + 2],
        ),
        (
            RingFormat::Packed,
            (0..4)
                .map(|n| START / PAGE + n)
                .chain([LOGGED - 1])
                .collect(),
        ),
    ] {
        let mut ring = Logged::new(format, Features::EVENT_IDX);
        ring.pass(3, false);
        ring.device.log_all();
        assert_eq!(ring.marked(), pages.into_iter().collect(), "{format}");
    }
}

#[test]
fn u22_a_ring_in_memory_that_is_not_logged_marks_nothing() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let mut ring = Logged::new(format, Features::CSUM);
        let logged = std::mem::take(&mut ring.memory);
        ring.memory = logged.with_log(None);
        let config = QueueConfig {
            size: SIZE,
            desc_area: UserAddr(START),
            driver_area: UserAddr(START + 8 * PAGE),
            device_area: UserAddr(START + 16 * PAGE),
            base: format.fresh_base(),
            features: match format {
                RingFormat::Packed => Features::RING_PACKED,
                RingFormat::Split => Features::empty(),
            },
        };
        ring.device = DeviceQueue::new(&config, &ring.memory).unwrap();
        ring.device
            .log_to(&ring.memory, &config, GuestAddr(LOGGED * PAGE));
        assert_eq!(ring.pass(5, false), [].into());
        ring.device.arm();
        ring.device.disarm();
        ring.device.log_all();
        assert_eq!(ring.marked(), [].into());
    }
}
