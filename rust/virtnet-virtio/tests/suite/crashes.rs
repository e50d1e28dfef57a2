//! Devices that die at any store while they record what is in flight, one after the other, and a driver that counts.
//!
//! A device of ours that is followed by one of ours or, in a split ring, by one that is written here from the specification and keeps
//! no order; and the other way round. Whoever dies in the middle of what it writes is had by taking back what a call has changed, but
//! for the first of its stores, in the order in which the specification wants them. That they are made in this order is what killing
//! processes shows (`kills`).
//!
//! Spec: vhost-user, Inflight I/O tracking
#![allow(
    clippy::single_range_in_vec_init,
    reason = "fields are ranges of bytes, and some lists of them have one"
)]

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr, Window};
use virtnet_virtio::inflight::region_bytes;
use virtnet_virtio::{Access, Chains, DeviceQueue, DriverBuffer, DriverQueue, QueueConfig, Used};

use crate::support::{Ram, Random, Setup, zero_file};

const SIZE: u16 = 8;

struct World {
    setup: Setup,
    config: QueueConfig,
    memory: Arc<GuestMemory>,
    ram: Ram,
    driver: DriverQueue,
    record: Ram,
    window: Window,
    /// What the driver waits for.
    outstanding: BTreeSet<u16>,
    returned: usize,
}

impl World {
    fn new(setup: Setup) -> Self {
        let (memory, _) = setup.memory(1 << 12);
        let config = setup.config();
        let file = zero_file(4096).into();
        let region = Region::map_file(file, 0, 4096, GuestAddr(0), UserAddr(0)).unwrap();
        let record = Arc::new(GuestMemory::new(vec![region]).unwrap());
        let bytes = region_bytes(setup.format, setup.size);
        Self {
            setup,
            driver: DriverQueue::new(&config, &memory).unwrap(),
            config,
            ram: Ram(Arc::clone(&memory)),
            memory,
            window: record.window(UserAddr(0), bytes, 64).unwrap(),
            record: Ram(record),
            outstanding: BTreeSet::new(),
            returned: 0,
        }
    }

    /// Makes up to `most` chains available, of one or two buffers each.
    fn add(&mut self, most: usize, random: &mut Random) {
        for _ in 0..most {
            let buffer = DriverBuffer {
                addr: GuestAddr(self.setup.data()),
                len: 64,
                writable: false,
            };
            let buffers = [buffer; 2];
            let n = 1 + random.below(2);
            if let Some(id) = self.driver.add(&buffers[..n]) {
                assert!(self.outstanding.insert(id), "{:?}", self.setup);
            }
        }
        self.driver.publish();
    }

    /// Takes back what has come back: each only once.
    #[track_caller]
    fn reap(&mut self) {
        let mut used = [Used::default(); 16];
        let n = self.driver.reap(&mut used).unwrap();
        for used in &used[..n] {
            let expected = self.outstanding.remove(&used.id);
            assert!(expected, "{:?}: {} came twice", self.setup, used.id);
        }
        self.returned += n;
    }

    fn ours(&self) -> DeviceQueue {
        DeviceQueue::resume(&self.config, &self.memory, &self.window).unwrap()
    }

    fn record_bytes(&self) -> Vec<u8> {
        self.record.read(0, self.window.len())
    }

    fn ring_bytes(&self) -> Vec<u8> {
        let start = self.setup.desc();
        self.ram.read(start, (self.setup.data() - start) as usize)
    }

    fn head(&self, at: u16) -> u16 {
        let slot = u64::from(at % self.setup.size);
        self.ram.u16(self.setup.driver_area() + 4 + 2 * slot)
    }
}

/// Fields of a record: within its beginning, and within each of its entries.
type Fields = (Vec<Range<usize>>, Vec<Range<usize>>);

/// Takes back what differs from `before` and was not stored yet after `stores` of the changes, which are made in the order of `fields`;
/// how many changes there are.
fn tear(before: &[u8], after: &mut [u8], packed: bool, fields: &[Fields], stores: usize) -> usize {
    let (entries, entry) = if packed { (32, 32) } else { (16, 16) };
    let mut changes = 0;
    for (beginning, each) in fields {
        let of_entries = (entries..after.len() / entry * entry).step_by(entry);
        let places = of_entries
            .flat_map(|at| each.iter().map(move |f| at + f.start..at + f.end))
            .chain(beginning.iter().cloned());
        for place in places {
            if before[place.clone()] != after[place.clone()] {
                if changes >= stores {
                    after[place.clone()].copy_from_slice(&before[place]);
                }
                changes += 1;
            }
        }
    }
    changes
}

/// The stores of a publication to the record: those before the driver can see it, and those after it.
fn publication(packed: bool) -> (Vec<Fields>, Vec<Fields>) {
    if packed {
        let before = vec![
            (vec![], vec![2..4]),
            (vec![12..14], vec![]),
            (vec![16..18, 20..21], vec![]),
        ];
        let after = vec![
            (vec![], vec![0..1]),
            (vec![14..16], vec![]),
            (vec![18..20, 21..22], vec![]),
        ];
        (before, after)
    } else {
        let before = vec![(vec![], vec![6..8]), (vec![12..14], vec![])];
        let after = vec![(vec![], vec![0..1]), (vec![14..16], vec![])];
        (before, after)
    }
}

/// A device of ours lives for a while, and dies at some store or between two calls.
fn live(world: &mut World, random: &mut Random) {
    let packed = world.setup.is_packed();
    let mut device = world.ours();
    let mut chains = Chains::new();
    for _ in 0..random.below(12) {
        world.add(random.below(4), random);
        match random.below(4) {
            0 | 1 => {
                let before = world.record_bytes();
                let n = device.take(
                    &world.memory,
                    Access::Read,
                    1 + random.below(4),
                    &mut chains,
                );
                n.unwrap();
                if packed && random.below(8) == 0 {
                    // Some of the entries that were free have been written, and they are free yet.
                    let mut after = world.record_bytes();
                    let entry = [0..8, 8..16, 16..24, 24..32].to_vec();
                    let fields = [(vec![], entry), (vec![12..16], vec![])];
                    let stores = random.below(12);
                    if stores < tear(&before, &mut after.clone(), packed, &fields, usize::MAX) {
                        tear(&before, &mut after, packed, &fields, stores);
                        world.record.write(0, &after);
                        return;
                    }
                }
            }
            2 if !chains.is_empty() => {
                // What was given back in the same burst is not among them.
                let before = world.record_bytes();
                device.untake(1, &mut chains);
                if packed && random.below(4) == 0 {
                    let mut after = world.record_bytes();
                    let fields = [
                        (vec![], vec![0..1]),
                        (vec![], vec![2..4]),
                        (vec![12..16], vec![]),
                    ];
                    tear(&before, &mut after, packed, &fields, random.below(4));
                    world.record.write(0, &after);
                    return;
                }
            }
            _ => {
                if random.below(2) == 0 {
                    device.give_all(&chains);
                } else {
                    device.give(&chains, 0, &vec![0; chains.len()]);
                }
                chains.clear();
                if random.below(3) == 0 {
                    // Not published yet: what comes is given back together with these.
                    continue;
                }
                let (record, ring) = (world.record_bytes(), world.ring_bytes());
                device.publish();
                if random.below(3) == 0 {
                    let mut after = world.record_bytes();
                    let (first, second) = publication(packed);
                    let all: Vec<_> = first.iter().chain(&second).cloned().collect();
                    let whole = tear(&record, &mut after.clone(), packed, &all, usize::MAX);
                    let shown = tear(&record, &mut after.clone(), packed, &first, usize::MAX);
                    let stores = random.below(whole + 1);
                    tear(&record, &mut after, packed, &all, stores);
                    world.record.write(0, &after);
                    if stores < shown || stores == shown && random.below(2) == 0 {
                        world.ram.write(world.setup.desc(), &ring);
                    }
                    return;
                }
                world.reap();
            }
        }
    }
}

/// A split device as the specification describes it, which gives back in any order, lives for a while, and dies.
fn live_by_the_book(world: &mut World, random: &mut Random) {
    let entry = |head: u16| 16 + 16 * u64::from(head);
    let (used_at, record) = (world.setup.device_area(), world.record.clone());
    if record.u16(8) == 0 {
        record.set_u16(10, SIZE);
        record.set_u16(14, world.ram.u16(used_at + 2));
        record.set_u16(8, 1);
    }
    let mut used = world.ram.u16(used_at + 2);
    let mut last = record.u16(12);
    for _ in 0..used.wrapping_sub(record.u16(14)) {
        record.write(entry(last), &[0]);
        last = record.u16(entry(last) + 6);
    }
    record.set_u16(14, used);
    let mut held: Vec<_> = (0..SIZE)
        .filter(|&head| record.read(entry(head), 1) == [1])
        .map(|head| (record.u64(entry(head) + 8), head))
        .collect();
    held.sort_unstable();
    let mut counter = held.last().map_or(0, |&(last, _)| last + 1);
    let mut held: Vec<_> = held.into_iter().map(|(_, head)| head).collect();
    let mut taken = used.wrapping_add(held.len() as u16);
    let mut steps = random.below(40);
    let mut dies = || {
        steps = steps.saturating_sub(1);
        steps == 0
    };
    for _ in 0..8 {
        world.add(2, &mut Random::new(u64::from(used)));
        while taken != world.ram.u16(world.setup.driver_area() + 2) {
            let head = world.head(taken);
            record.set_u64(entry(head) + 8, counter);
            if dies() {
                return;
            }
            record.write(entry(head), &[1]);
            if dies() {
                return;
            }
            counter += 1;
            held.push(head);
            taken = taken.wrapping_add(1);
        }
        let mut batch = Vec::new();
        for _ in 0..random.below(held.len() + 1).min(3) {
            let head = held.remove(random.below(held.len()));
            let element = used_at + 4 + 8 * u64::from(used % SIZE);
            world.ram.set_u32(element, head.into());
            world.ram.set_u32(element + 4, 0);
            used = used.wrapping_add(1);
            record.set_u16(entry(head) + 6, record.u16(12));
            if dies() {
                return;
            }
            record.set_u16(12, head);
            batch.push(head);
            if dies() {
                return;
            }
        }
        world.ram.set_u16(used_at + 2, used);
        for head in batch {
            if dies() {
                return;
            }
            record.write(entry(head), &[0]);
        }
        if dies() {
            return;
        }
        record.set_u16(14, used);
        world.reap();
    }
}

/// The last device: all that the driver waits for comes back, and nothing else.
#[track_caller]
fn finish(world: &mut World) {
    let mut device = world.ours();
    let mut chains = Chains::new();
    loop {
        let n = device.take(&world.memory, Access::Read, 64, &mut chains);
        if n.unwrap() == 0 {
            break;
        }
        device.give_all(&chains);
        chains.clear();
        device.publish();
        world.reap();
    }
    let left = &world.outstanding;
    assert!(left.is_empty(), "{:?}: {left:?} are lost", world.setup);
}

#[test]
fn u23_whichever_store_devices_die_at_each_buffer_comes_back_once() {
    for setup in Setup::all(SIZE) {
        let others = !setup.is_packed() && !setup.in_order;
        for seed in 0..400 {
            let mut random = Random::new(seed);
            let mut world = World::new(setup);
            for _ in 0..12 {
                if others && random.below(3) == 0 {
                    live_by_the_book(&mut world, &mut random);
                } else {
                    live(&mut world, &mut random);
                }
                world.reap();
            }
            finish(&mut world);
            assert!(world.returned > 0);
        }
    }
}

#[test]
fn a_queue_that_is_never_empty_takes_nothing_twice_however_long_it_runs() {
    for setup in Setup::all(SIZE).filter(|setup| !setup.is_packed() && !setup.in_order) {
        let mut world = World::new(setup);
        let mut random = Random::new(5);
        // Somebody else has left it out of order.
        let mut device = loop {
            live_by_the_book(&mut world, &mut random);
            world.reap();
            let first = world.head(world.ram.u16(setup.device_area() + 2));
            let is_held = world.record.read(16 + 16 * u64::from(first), 1) == [1];
            if !is_held && (0..SIZE).any(|h| world.record.u16(16 + 16 * u64::from(h)) & 1 == 1) {
                break world.ours();
            }
        };
        let (mut chains, mut next) = (Chains::new(), Chains::new());
        for _ in 0..70_000 {
            world.add(1, &mut random);
            device
                .take(&world.memory, Access::Read, 1, &mut next)
                .unwrap();
            device.give_all(&chains);
            chains.clear();
            device.publish();
            world.reap();
            std::mem::swap(&mut chains, &mut next);
        }
        device.give_all(&chains);
        device.publish();
        world.reap();
        finish(&mut world);
    }
}
