//! Our split device and another implementation's look at the same bytes: they must see the same chains in the same order.
//!
//! Theirs ends a chain silently where it makes no sense; ours says why. The random schedules of [`crate::rings`] drive theirs
//! with our driver as well.

use std::sync::atomic::Ordering;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtnet_mem::GuestMemory;
use virtnet_virtio::split::SplitDevice;
use virtnet_virtio::{Access, ChainBytes, ChainError, Chains, RingError, RingFormat};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::support::driver::{Desc, INDIRECT, NEXT, WRITE};
use crate::support::theirs::{their_memory, their_queue};
use crate::support::{Ram, Random, Setup, region_of, user, zero_file};

/// Bytes behind the rings that buffers and tables may lie in.
const DATA: u64 = 8 * 4096;

/// A descriptor that makes sense more often than not.
fn any_descriptor(random: &mut Random, setup: &Setup, entries: u16, access: Access) -> Desc {
    let addr = setup.data()
        + match random.below(12) {
            0 => DATA - 8,
            1 => DATA,
            2 => u64::MAX - setup.data(),
            _ => random.below(4 * 4096) as u64,
        };
    let len = match random.below(12) {
        0 => 0,
        1 => u32::MAX - random.below(3) as u32,
        _ => 1 + random.below(100) as u32,
    };
    let mut desc = Desc::new(addr, len, 0, random.below(usize::from(entries)) as u16);
    if random.below(3) == 0 {
        desc.flags |= NEXT;
    }
    if (access == Access::Write) != (random.below(30) == 0) {
        desc.flags |= WRITE;
    }
    if random.below(6) == 0 {
        desc.fourth = entries.wrapping_add(random.below(2) as u16);
    }
    if random.below(6) == 0 {
        // Bits that mean nothing in a split ring.
        desc.flags |= random.next() as u16 & !7;
    }
    desc
}

/// Fills the descriptor table and eight indirect tables behind it with descriptors.
fn fill_tables(random: &mut Random, setup: &Setup, ram: &Ram, access: Access) {
    let tables = setup.data() + 4 * 4096;
    for table in 0..8 {
        for index in 0..u64::from(setup.size) {
            let mut desc = any_descriptor(random, setup, setup.size, access);
            if random.below(20) == 0 {
                desc.flags |= INDIRECT;
            }
            desc.write(ram, tables + table * 512, index, false);
        }
    }
    for index in 0..u64::from(setup.size) {
        let mut desc = any_descriptor(random, setup, setup.size, access);
        if random.below(3) == 0 {
            desc.flags |= INDIRECT;
            desc.addr = tables + random.below(8) as u64 * 512;
            desc.len = match random.below(12) {
                0 => 0,
                1 => 16 * u32::from(setup.size) + 16,
                2 => 24,
                _ => 16 * (1 + random.below(usize::from(setup.size))) as u32,
            };
            if random.below(4) > 0 {
                desc.flags &= !NEXT;
            }
        }
        desc.write(ram, setup.desc(), index, false);
    }
}

fn is_mapped(setup: &Setup, addr: u64, len: u32) -> bool {
    let (start, end) = (setup.desc(), setup.data() + DATA);
    let inside = addr.checked_add(u64::from(len)).is_some_and(|to| to <= end);
    len == 0 || (addr >= start && inside)
}

/// Address and length of the buffers of chain `i`, as one run where they follow each other (regions are not looked at).
fn ours(ram: &Ram, chains: &Chains, i: usize) -> Vec<(u64, u32)> {
    let start = |region: u32| ram.0.regions()[region as usize].guest().0;
    let segments = chains.segments(i).iter();
    segments
        .map(|s| (start(s.region) + s.offset as u64, s.len))
        .collect()
}

#[test]
fn both_devices_see_the_same_chains_in_random_tables() {
    let mut good = 0;
    let mut bad = [0; 8];
    for seed in 0..4000_u64 {
        let mut random = Random::new(seed);
        let size = [1, 2, 4, 8, 16][random.below(5)];
        let setup = Setup {
            start: random.next(),
            ..Setup::new(RingFormat::Split, size)
        };
        let access = [Access::Read, Access::Write][random.below(2)];
        let (memory, file) = setup.memory(DATA);
        let ram = Ram(memory);
        fill_tables(&mut random, &setup, &ram, access);
        let n = random.below(usize::from(size) + 1) as u64;
        for k in 0..n {
            let slot = setup.start.wrapping_add(k) % u64::from(size);
            let head = random.below(usize::from(size)) as u16;
            ram.set_u16(setup.driver_area() + 4 + 2 * slot, head);
        }
        let found = setup.start.wrapping_add(n) as u16;
        ram.set_u16(setup.driver_area() + 2, found);
        ram.set_u16(setup.device_area() + 2, setup.start as u16);

        let mut device = SplitDevice::new(&setup.config(), &ram.0).unwrap();
        let mut chains = Chains::new();
        // Fetching a line of theirs changes nothing, wherever it would be.
        let mut bytes = ChainBytes::owned_at((seed % 2 == 0).then_some(64));
        let taken = device
            .take(&*ram.0, access, 64, &mut chains, &mut bytes)
            .unwrap();
        // The bytes of those that are one buffer are that buffer's.
        for (i, bytes) in bytes
            .as_slice()
            .iter()
            .enumerate()
            .filter(|(_, b)| !b.is_empty())
        {
            let [only] = chains.segments(i) else {
                panic!("seed {seed}, chain {i}: bytes of no buffer");
            };
            assert_eq!(bytes.len(), only.len as usize, "seed {seed}, chain {i}");
        }
        let memory = their_memory(&setup, &file);
        let mut queue = their_queue(&setup);
        let theirs: Vec<(u16, Vec<Descriptor>)> = queue
            .iter(&memory)
            .unwrap()
            .map(|chain| (chain.head_index(), chain.collect()))
            .collect();
        assert_eq!(taken, theirs.len());

        for (i, (_, descs)) in theirs.iter().enumerate() {
            let cut = descs.last().is_none_or(Descriptor::has_next);
            let write = access == Access::Write;
            let turned = descs.iter().any(|d| d.is_write_only() != write);
            let outside = descs
                .iter()
                .any(|d| !is_mapped(&setup, d.addr().0, d.len()));
            let empty = descs.iter().all(|d| d.len() == 0);
            let context = format!("seed {seed}, chain {i}: {:?} {descs:?}", chains.bytes(i));
            match chains.bytes(i) {
                Ok(bytes) => {
                    assert!(!cut && !turned && !outside && !empty, "{context}");
                    let descs = descs.iter().filter(|d| d.len() > 0);
                    let expected: Vec<(u64, u32)> = descs.map(|d| (d.addr().0, d.len())).collect();
                    assert_eq!(ours(&ram, &chains, i), expected, "{context}");
                    assert_eq!(bytes, expected.iter().map(|&(_, len)| len).sum::<u32>());
                    good += 1;
                }
                Err(error) => {
                    let agreed = match error {
                        // What they cut off for its length may be wrong in another way that we see first.
                        ChainError::Direction => turned || cut,
                        ChainError::Address => outside || cut,
                        ChainError::Empty => empty && !cut,
                        ChainError::TooLong | ChainError::NextRange => cut,
                        // They follow a table that also has NEXT, and one longer than the ring.
                        ChainError::Indirect | ChainError::IndirectLen => true,
                        ChainError::TooBig => cut,
                    };
                    assert!(agreed, "{context}");
                    bad[error as usize] += 1;
                }
            }
            if !cut && !turned && !outside && !empty {
                let stricter = matches!(
                    chains.bytes(i),
                    Ok(_) | Err(ChainError::Indirect | ChainError::IndirectLen)
                );
                assert!(stricter, "{context}");
            }
        }

        // What they write when the same chains are given back is what ours writes.
        let used = setup.device_area();
        let before = ram.read(used, 6 + 8 * usize::from(size));
        for i in 0..taken {
            device.give(&chains, i, &[i as u32]);
        }
        device.publish();
        let by_ours = ram.read(used, before.len());
        ram.write(used, &before);
        for (i, &(head, _)) in theirs.iter().enumerate() {
            queue.add_used(&memory, head, i as u32).unwrap();
        }
        assert_eq!(by_ours, ram.read(used, before.len()), "seed {seed}");
    }
    assert!(good > 3000, "only {good} chains made sense");
    let all_seen = bad
        .iter()
        .enumerate()
        .all(|(e, &n)| n > 20 || e == ChainError::TooBig as usize);
    assert!(all_seen, "errors seen: {bad:?}");
}

#[test]
fn both_devices_refuse_the_same_available_indexes() {
    for size in [1_u16, 2, 8, 256, 32_768] {
        let setup = Setup {
            start: 65_530,
            ..Setup::new(RingFormat::Split, size)
        };
        let (memory, file) = setup.memory(DATA);
        let (ram, theirs) = (Ram(memory), their_memory(&setup, &file));
        ram.set_u16(setup.device_area() + 2, setup.start as u16);
        let mut random = Random::new(u64::from(size));
        for ahead in (0..300_u16)
            .chain([
                size - 1,
                size,
                size.wrapping_add(1),
                0x7fff,
                0x8000,
                0x8001,
                u16::MAX,
            ])
            .chain((0..500).map(|_| random.next() as u16))
        {
            let found = (setup.start as u16).wrapping_add(ahead);
            ram.set_u16(setup.driver_area() + 2, found);
            let mut device = SplitDevice::new(&setup.config(), &ram.0).unwrap();
            let ours = device.take(
                &*ram.0,
                Access::Read,
                1,
                &mut Chains::new(),
                &mut ChainBytes::new(),
            );
            let refused = their_queue(&setup).iter(&theirs).is_err();
            assert_eq!(ours.is_err(), refused, "{ahead} ahead in a ring of {size}");
            if let Err(error) = ours {
                let expected = RingError::AvailIndex {
                    found,
                    expected: setup.start as u16,
                    size,
                };
                assert_eq!(error, expected);
            }
        }
    }
}

/// Where their mock driver puts its rings, and where it always puts indirect tables.
const MOCK_RINGS: u64 = 0x10_0000;
const MOCK_TABLES: u64 = 0x3000_0000;

/// Their mock driver makes chains available; ours takes them and gives them back. Answers what ours saw.
fn with_mock(
    size: u16,
    make: impl FnOnce(&mut MockSplitQueue<'_, GuestMemoryMmap>),
) -> Vec<Vec<u32>> {
    let (low, high) = (zero_file(0x20_0000), zero_file(0x1_0000));
    let ranges = [(0, &low), (MOCK_TABLES, &high)].map(|(addr, file)| {
        let len = file.metadata().unwrap().len() as usize;
        let file = FileOffset::new(file.try_clone().unwrap(), 0);
        (GuestAddress(addr), len, Some(file))
    });
    let theirs = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
    let regions = vec![
        region_of(&low, 0, 0x20_0000, 0),
        region_of(&high, 0, 0x1_0000, MOCK_TABLES),
    ];
    let memory = GuestMemory::new(regions).unwrap();
    let mut mock = MockSplitQueue::create(&theirs, GuestAddress(MOCK_RINGS), size);
    make(&mut mock);

    let mut config = Setup::new(RingFormat::Split, size).config();
    config.desc_area = user(mock.desc_table_addr().0);
    config.driver_area = user(mock.avail_addr().0);
    config.device_area = user(mock.used_addr().0);
    let mut device = SplitDevice::new(&config, &memory).unwrap();
    let mut chains = Chains::new();
    let n = device
        .take(
            &memory,
            Access::Read,
            64,
            &mut chains,
            &mut ChainBytes::new(),
        )
        .unwrap();
    let lens = (0..n).map(|i| chains.segments(i).iter().map(|s| s.len).collect());
    let lens = lens.collect();
    (0..n).for_each(|i| device.give(&chains, i, &[i as u32]));
    device.publish();

    let mut queue = mock.create_queue::<Queue>().unwrap();
    let heads: Vec<u16> = queue
        .iter(&theirs)
        .unwrap()
        .map(|c| c.head_index())
        .collect();
    assert_eq!(heads.len(), n);
    for (k, head) in heads.into_iter().enumerate() {
        let element = mock.used().ring().ref_at(k).unwrap().load();
        assert_eq!((element.id(), element.len()), (u32::from(head), k as u32));
    }
    let used = queue.used_idx(&theirs, Ordering::Relaxed).unwrap();
    assert_eq!(usize::from(used.0), n);
    lens
}

/// Their generated descriptors all name 4 KiB.
#[test]
fn our_device_takes_the_chain_that_their_mock_driver_generates() {
    for n in 1..=16 {
        let whole = vec![vec![0x1000; usize::from(n)]];
        assert_eq!(with_mock(16, |mock| mock.add_chain(n).unwrap()), whole);
        assert_eq!(
            with_mock(16, |mock| mock.add_indirect_chain(n).unwrap()),
            whole
        );
    }
}

#[test]
fn our_device_takes_the_chains_that_their_mock_driver_writes() {
    // Lengths of the buffers of each chain. (Their mock's used ring leaves room for half the available entries.)
    let chains = [
        vec![10],
        vec![20, 30, 40],
        vec![1, 1],
        vec![4096],
        vec![5, 0, 6],
    ];
    let seen = with_mock(16, |mock| {
        let mut descs = Vec::new();
        for chain in &chains {
            for (k, &len) in chain.iter().enumerate() {
                let last = k + 1 == chain.len();
                let next = descs.len() as u16 + 1;
                let flags = if last { 0 } else { NEXT };
                descs.push(RawDescriptor::from(Descriptor::new(
                    0x2000, len, flags, next,
                )));
            }
        }
        mock.add_desc_chains(&descs, 0).unwrap();
    });
    let expected: Vec<Vec<u32>> = chains
        .into_iter()
        .map(|chain| chain.into_iter().filter(|&len| len > 0).collect())
        .collect();
    assert_eq!(seen, expected);
}
