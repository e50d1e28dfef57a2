use virtnet_mem::Region;

use super::*;

/// A device that is as simple as the guest: what it does is said by the test, straight into memory.
struct SplitDevice {
    config: QueueConfig,
    next: u16,
}

fn guest_addr(guest: &FakeGuest, user: UserAddr) -> u64 {
    let region: &Region = &guest.memory().regions()[0];
    region.guest().0 + (user.0 - region.user().0)
}

/// Writes as the device does: not known to the guest.
fn scribble(guest: &FakeGuest, addr: u64, bytes: &[u8]) {
    let segment = guest
        .memory()
        .translate(GuestAddr(addr), length(bytes.len()), &mut 0)
        .unwrap();
    guest.memory().slice(segment).copy_from(bytes);
}

impl SplitDevice {
    fn give(&mut self, guest: &FakeGuest, id: u16, len: u32) {
        let used = guest_addr(guest, self.config.device_area);
        let slot = u64::from(self.next % self.config.size);
        scribble(guest, used + 4 + 8 * slot, &u32::from(id).to_le_bytes());
        scribble(guest, used + 8 + 8 * slot, &len.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        scribble(guest, used + 2, &self.next.to_le_bytes());
    }
}

fn setup(features: Features) -> (FakeGuest, SplitQueue, SplitDevice) {
    let mut guest = FakeGuest::new(64 << 10);
    let queue = SplitQueue::new(&mut guest, 4, features);
    let config = queue.config(&guest, features);
    (guest, queue, SplitDevice { config, next: 0 })
}

#[test]
fn what_the_device_wrote_comes_back_and_descriptors_are_free_again() {
    let (mut guest, mut queue, mut device) = setup(Features::empty());
    for round in 0..10u8 {
        let buffers = [guest.writable(3), guest.writable(5)];
        let id = queue.offer(&mut guest, &buffers);
        assert_eq!((queue.free(), queue.outstanding()), (2, 1));
        assert_eq!(queue.collect(&mut guest), []);
        scribble(&guest, buffers[0].addr.0, &[round; 3]);
        scribble(&guest, buffers[1].addr.0, &[9]);
        device.give(&guest, id, 4);
        let returned = Returned {
            id,
            len: 4,
            bytes: vec![round, round, round, 9],
        };
        assert_eq!(queue.collect(&mut guest), [returned]);
        assert_eq!(queue.free(), 4);
    }
}

#[test]
fn a_returned_buffer_is_poisoned() {
    let (mut guest, mut queue, mut device) = setup(Features::empty());
    let buffer = guest.readable(b"secret");
    let id = queue.offer(&mut guest, &[buffer]);
    assert_eq!(guest.read(buffer.addr, 6), b"secret");
    device.give(&guest, id, 0);
    queue.collect(&mut guest);
    assert_eq!(guest.read(buffer.addr, 6), [RETURNED; 6]);
}

fn caught(test: impl FnOnce()) -> String {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test));
    let panic = outcome.expect_err("it was not noticed");
    panic.downcast_ref::<String>().cloned().unwrap_or_default()
}

#[test]
fn a_device_that_writes_where_it_may_not_is_caught() {
    // Behind what it says it wrote; behind the buffer; into a readable one; into the table; into the available ring.
    for fault in 0..5 {
        let (mut guest, mut queue, mut device) = setup(Features::empty());
        let buffers = [guest.readable(b"abcd"), guest.writable(8)];
        let id = queue.offer(&mut guest, &buffers);
        let wrong = match fault {
            0 => buffers[1].addr.0 + 4,
            1 => buffers[1].addr.0 + 8,
            2 => buffers[0].addr.0,
            3 => guest_addr(&guest, device.config.desc_area) + 16 * u64::from(id),
            _ => guest_addr(&guest, device.config.driver_area) + 2,
        };
        scribble(&guest, buffers[1].addr.0, &[1; 4]);
        scribble(&guest, wrong, &[0x77]);
        device.give(&guest, id, 4);
        let message = caught(|| drop(queue.collect(&mut guest)));
        let place = format!("{}", GuestAddr(wrong));
        assert!(
            message.contains(&place) && message.contains("0x77"),
            "{message}"
        );
    }
}

#[test]
fn a_device_that_returns_nonsense_is_caught() {
    let faults: [fn(&FakeGuest, &mut SplitDevice, u16); 3] = [
        |guest, device, id| device.give(guest, id, 9),
        |guest, device, id| device.give(guest, id + 1, 0),
        |guest, device, id| {
            device.give(guest, id, 0);
            device.give(guest, id, 0);
        },
    ];
    let complaints = ["room for 8", "does not hold", "2 ahead"];
    for (fault, complaint) in faults.iter().zip(complaints) {
        let (mut guest, mut queue, mut device) = setup(Features::empty());
        let buffer = guest.writable(8);
        let id = queue.offer(&mut guest, &[buffer]);
        fault(&guest, &mut device, id);
        let message = caught(|| drop(queue.collect(&mut guest)));
        assert!(message.contains(complaint), "{message}");
    }
}

#[test]
fn one_element_stands_for_a_batch_in_order() {
    let (mut guest, mut queue, mut device) = setup(Features::IN_ORDER);
    let ids: Vec<_> = (0..3)
        .map(|_| {
            let buffer = guest.readable(b"x");
            queue.offer(&mut guest, &[buffer])
        })
        .collect();
    assert_eq!(ids, [0, 1, 2]);
    device.give(&guest, 2, 0);
    device.next = 3;
    let used = guest_addr(&guest, device.config.device_area);
    scribble(&guest, used + 2, &3u16.to_le_bytes());
    let returned: Vec<_> = queue.collect(&mut guest).iter().map(|r| r.id).collect();
    assert_eq!(returned, [0, 1, 2]);
}

#[test]
fn a_split_device_asks_for_kicks_by_flag_or_by_index() {
    let (mut guest, mut queue, device) = setup(Features::empty());
    let used = guest_addr(&guest, device.config.device_area);
    let offer = |guest: &mut FakeGuest, queue: &mut SplitQueue| {
        let buffer = guest.readable(b"x");
        queue.offer(guest, &[buffer]);
    };
    assert!(!queue.take_kick(&guest));
    offer(&mut guest, &mut queue);
    assert!(queue.take_kick(&guest));
    scribble(&guest, used, &[1, 0]);
    offer(&mut guest, &mut queue);
    assert!(!queue.take_kick(&guest));

    let (mut guest, mut queue, device) = setup(Features::EVENT_IDX);
    let used = guest_addr(&guest, device.config.device_area);
    scribble(&guest, used + 4 + 8 * 4, &[1, 0]);
    offer(&mut guest, &mut queue);
    assert!(!queue.take_kick(&guest));
    offer(&mut guest, &mut queue);
    assert!(queue.take_kick(&guest));
    offer(&mut guest, &mut queue);
    assert!(!queue.take_kick(&guest));
}

#[test]
fn a_packed_queue_wraps_with_chains_of_any_length() {
    let mut guest = FakeGuest::new(64 << 10);
    let mut queue = PackedQueue::new(&mut guest, 5, Features::empty());
    let config = queue.config(&guest, Features::RING_PACKED);
    assert_eq!(config.base, 0x8000_8000);
    let ring = guest_addr(&guest, config.desc_area);
    let (mut slot, mut wrap) = (0u16, true);
    for round in 0..40u16 {
        let n = 1 + round % 3;
        let buffers: Vec<_> = (0..n).map(|_| guest.writable(2)).collect();
        let id = queue.offer(&mut guest, &buffers);
        let bits = |addr: u64| guest.read_u16(addr + 14) & (AVAIL_BIT | USED_BIT);
        let available = if wrap { AVAIL_BIT } else { USED_BIT };
        assert_eq!(bits(ring + 16 * u64::from(slot)), available);
        assert_eq!(queue.free(), usize::from(5 - n));

        let written = RawDescriptor {
            addr: buffers[0].addr.0,
            len: 2,
            flags: RawDescriptor::WRITE | if wrap { AVAIL_BIT | USED_BIT } else { 0 },
            next_or_id: id,
        };
        scribble(&guest, buffers[0].addr.0, b"ok");
        scribble(&guest, ring + 16 * u64::from(slot), &written.packed_bytes());
        let returned = queue.collect(&mut guest);
        assert_eq!(returned.len(), 1);
        assert_eq!((returned[0].id, &returned[0].bytes[..]), (id, &b"ok"[..]));
        slot += n;
        if slot >= 5 {
            (slot, wrap) = (slot - 5, !wrap);
        }
        assert_eq!(queue.next_slot(), slot);
    }
}

const AVAIL_BIT: u16 = 1 << 7;
const USED_BIT: u16 = 1 << 15;

#[test]
fn a_packed_device_asks_for_kicks_by_flag_or_by_slot() {
    let mut guest = FakeGuest::new(64 << 10);
    let mut queue = PackedQueue::new(&mut guest, 4, Features::empty());
    let config = queue.config(&guest, Features::RING_PACKED);
    let event = guest_addr(&guest, config.device_area);
    // Flags, event; chain of one descriptor each.
    for (flags, place, expected) in [
        (0u16, 0u16, true),
        (1, 0, false),
        (2, 0x8002, true),
        (2, 0x8002, false),
    ] {
        scribble(&guest, event, &place.to_le_bytes());
        scribble(&guest, event + 2, &flags.to_le_bytes());
        let buffer = guest.readable(b"x");
        queue.offer(&mut guest, &[buffer]);
        assert_eq!(queue.take_kick(&guest), expected, "{flags} {place:#x}");
        assert!(!queue.take_kick(&guest));
    }
}
