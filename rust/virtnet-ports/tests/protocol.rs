//! Protocol features of the vhost-user port beyond rings and memory: state on its way, pages that come later, messages for events.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use support::host::{FORMATS, Honest, Host};
use support::{beside_others, until};
use virtnet_mem::{GuestAddr, GuestMemory};
use virtnet_packet::header::Mac;
use virtnet_sys::{Stream, Userfault};
use virtnet_testkit::{Backing, Calls, FakeVm, FrontEnd, VmMemory, frame, is_signalled};
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{
    DeviceState, MemoryRegion, MemoryTable, Payload, SingleRegion, VringFd, VringState,
};
use virtnet_virtio::Features;
use virtnet_virtio::net::control::Command;

const ACK: ProtocolFeatures = ProtocolFeatures::REPLY_ACK;

fn number(answer: &[u8]) -> u64 {
    u64::from_ne_bytes(answer.try_into().unwrap())
}

fn state_fd(direction: u32) -> Request {
    let phase = 0;
    Request::SetDeviceStateFd(DeviceState { direction, phase })
}

#[test]
fn u26_a_state_may_come_before_the_features() {
    let _gate = beside_others();
    let (from, to) = (Host::new(1), Host::new(1));
    let state = save(&with_state(&from, Some(3000)));
    let target = to.machine(Features::MTU, 1);
    let protocol = ACK | ProtocolFeatures::DEVICE_STATE;
    target.front_end.ask(&Request::GetFeatures, &[]);
    target
        .front_end
        .insist(&Request::SetProtocolFeatures(protocol.bits()), &[]);
    assert!(load(&target, &state));
    drop(target);
    from.assert_unharmed();
    to.assert_unharmed();
}

/// A machine that has agreed on the transfer of state and has told an MTU, or not.
fn with_state(host: &Host, mtu: Option<u64>) -> FakeVm {
    let mut machine = host.machine(Features::MTU, 1);
    machine.agree_on(ACK | ProtocolFeatures::DEVICE_STATE | ProtocolFeatures::MTU);
    if let Some(mtu) = mtu {
        machine.front_end.insist(&Request::NetSetMtu(mtu), &[]);
    }
    machine
}

/// The state of the machine's device, as it comes out of a pipe.
#[track_caller]
fn save(machine: &FakeVm) -> Vec<u8> {
    let (mut reader, writer) = pipe().unwrap();
    let answer = machine.front_end.ask(&state_fd(0), &[writer.as_fd()]);
    assert_eq!(number(&answer), 0x100, "done, and no other descriptor");
    drop(writer);
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    let checked = machine.front_end.ask(&Request::CheckDeviceState, &[]);
    assert_eq!(number(&checked), 0);
    state
}

/// Whether a device takes a state.
#[track_caller]
fn load(machine: &FakeVm, state: &[u8]) -> bool {
    let (reader, mut writer) = pipe().unwrap();
    let answer = machine.front_end.ask(&state_fd(1), &[reader.as_fd()]);
    assert_eq!(number(&answer), 0x100);
    writer.write_all(state).unwrap();
    drop(writer);
    let checked = machine.front_end.ask(&Request::CheckDeviceState, &[]);
    number(&checked) == 0
}

#[test]
fn u26_a_device_goes_on_with_the_state_of_another() {
    let _gate = beside_others();
    let (from, to) = (Host::new(1), Host::new(1));
    let source = with_state(&from, Some(3000));
    let state = save(&source);
    let mut target = with_state(&to, None);
    assert!(load(&target, &state));
    assert_eq!(save(&target), state);
    target.tell_memory();
    (0..2).for_each(|ring| target.start_ring(ring));
    target.echo_some(0);
    // While it runs there is no state that stands still.
    let (_reader, writer) = pipe().unwrap();
    let answer = target.front_end.ask(&state_fd(0), &[writer.as_fd()]);
    assert_eq!(number(&answer), 0x101);
    drop((source, target));
    from.assert_unharmed();
    to.assert_unharmed();
}

#[test]
fn u26_what_a_driver_has_asked_for_travels_with_its_device() {
    let _gate = beside_others();
    let (from, to) = (Host::new(1), Host::new(1));
    let agreed = |host: &Host| {
        let control = Features::CTRL_VQ | Features::CTRL_RX | Features::CTRL_MAC_ADDR;
        let more = Features::STATUS | Features::GUEST_ANNOUNCE;
        let mut machine = host.machine(control | more, 1);
        machine.agree_on(ACK | ProtocolFeatures::DEVICE_STATE);
        machine
    };
    let (source, target) = (agreed(&from), agreed(&to));
    // As the source's driver would have had it: another address.
    let part = |command: &Command| {
        let bytes = command.encode();
        let len = u16::try_from(bytes.len()).unwrap();
        [&[3, 0][..], &len.to_le_bytes(), &bytes].concat()
    };
    let mac = Mac([2, 0, 0, 0, 0, 9]);
    let state = [save(&source), part(&Command::SetMac(mac))].concat();
    assert!(load(&source, &state));
    assert_eq!(from.status().config.unwrap().mac, Some(mac.0));
    let state = save(&source);
    assert!(load(&target, &state));
    let config = to.status().config.unwrap();
    assert_eq!((config.mac, config.announce), (Some(mac.0), true));
    assert_eq!(save(&target), state);
    let nonsense = [state.clone(), part(&Command::SetPairs(1))].concat();
    assert!(
        !load(&target, &nonsense),
        "several pairs were not agreed on"
    );
    let error = to.status().last_error.unwrap();
    assert!(error.contains("does not do"), "{error}");
    assert_eq!(save(&target), state);
    drop((source, target));
    from.assert_unharmed();
    to.assert_unharmed();
}

#[test]
fn u26_what_is_no_state_of_this_device_is_refused_and_changes_nothing() {
    let _gate = beside_others();
    let host = Host::new(1);
    let machine = with_state(&host, Some(2000));
    let state = save(&machine);
    let refused = |state: &[u8], why: &str| {
        assert!(!load(&machine, state), "{why}");
        let error = host.status().last_error.unwrap();
        assert!(error.contains(why), "{error}");
    };
    refused(b"", "are not the state");
    refused(&state[..state.len() - 1], "are not the state");
    refused(&[7; 8193], "at most 8192 bytes");
    let mut other = state.clone();
    other[4] = 9;
    refused(&other, "version 9");
    let mut other = state.clone();
    other[10] ^= 1;
    refused(&other, "other features");
    assert_eq!(save(&machine), state);

    // A pipe whose other end stays open is not waited for, and neither is one that nobody reads.
    let (reader, writer) = pipe().unwrap();
    machine.front_end.ask(&state_fd(1), &[reader.as_fd()]);
    let checked = machine.front_end.ask(&Request::CheckDeviceState, &[]);
    assert_eq!(number(&checked), 1);
    let (closed, full) = pipe().unwrap();
    drop(closed);
    let answer = machine.front_end.ask(&state_fd(0), &[full.as_fd()]);
    assert_eq!(number(&answer), 0x101);
    // Nothing was begun, and these are not ends of pipes.
    let checked = machine.front_end.ask(&Request::CheckDeviceState, &[]);
    assert_eq!(number(&checked), 1);
    let (stream, _other) = Stream::pair().unwrap();
    for fd in [
        stream.as_fd(),
        reader.as_fd(),
        machine.rings[0].kick.as_fd(),
    ] {
        let answer = machine.front_end.ask(&state_fd(0), &[fd]);
        assert_eq!(number(&answer), 0x101);
    }
    drop((machine, writer));
    host.assert_unharmed();
}

/// Tells where a ring lies and starts it without events.
#[track_caller]
fn start_in_band(machine: &mut FakeVm, ring: u8) {
    let queue = usize::from(ring);
    let size = machine.rings[queue]
        .queue
        .config(&machine.guest, machine.features)
        .size;
    let index = u32::from(ring);
    let state = |num| VringState { index, num };
    let addresses = machine.addresses(queue);
    let front_end = &machine.front_end;
    front_end.insist(&Request::SetVringNum(state(size.into())), &[]);
    front_end.insist(&Request::SetVringAddr(addresses), &[]);
    for request in [Request::SetVringCall, Request::SetVringErr] {
        front_end.insist(&request(VringFd::new(ring, false)), &[]);
    }
    front_end.insist(&Request::SetVringEnable(state(1)), &[]);
    // The first kick starts it.
    front_end.insist(&Request::VringKick(state(0)), &[]);
}

#[test]
fn u24_kicks_and_calls_may_be_messages() {
    let _gate = beside_others();
    let host = Host::with(|options| options.in_band = true);
    let protocol = ACK | ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::INBAND_NOTIFICATIONS;
    let mut machine = host.machine(Features::empty(), 1);
    machine.agree_on(protocol);
    let (ours, theirs) = Stream::pair().unwrap();
    machine
        .front_end
        .insist(&Request::SetBackendReqFd, &[theirs.as_fd()]);
    drop(theirs);
    let channel = FrontEnd::over(ours);
    machine.tell_memory();
    for ring in 0..2 {
        start_in_band(&mut machine, ring);
    }
    // Nobody polls: without a kick the worker stays asleep.
    host.echo.assert_falls_asleep();
    for n in 0..20 {
        let frame = frame::pattern(300, n);
        let FakeVm { rings, guest, .. } = &mut machine;
        for ring in rings {
            ring.queue.set_calls(guest, Calls::At(n as u16));
        }
        machine.make_room(0, 1, 2048);
        machine.transmit(0, &frame);
        for index in [0, 1] {
            let state = VringState { index, num: 0 };
            machine.front_end.insist(&Request::VringKick(state), &[]);
        }
        // Each ring has something to tell, in either order; the next call comes after the answer only.
        let mut told = Vec::new();
        while told.len() < 2 {
            let (header, payload) = channel.answer();
            assert_eq!(header.request, 4, "VRING_CALL");
            told.push(VringState::from_bytes(&payload).unwrap().index);
            let answer: Vec<_> = [4, 5, 8, 0, 0_u32]
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .collect();
            assert!(channel.send_bytes(&answer, &[]));
        }
        told.sort_unstable();
        assert_eq!(told, [0, 1]);
        until("the frame is back", || {
            machine.received(0) == [frame.clone()]
        });
        until("its buffer too", || machine.transmitted(0) == 1);
    }
    drop(machine);
    host.assert_unharmed();
}

#[test]
fn u24_messages_for_events_need_a_channel_and_answers() {
    let _gate = beside_others();
    let host = Host::with(|options| options.in_band = true);
    let alone = ProtocolFeatures::INBAND_NOTIFICATIONS;
    for accepted in [alone, alone | ACK, alone | ProtocolFeatures::BACKEND_REQ] {
        let front_end = host.front_end();
        front_end.tell(&Request::SetProtocolFeatures(accepted.bits()), &[]);
        assert!(front_end.is_hung_up());
        until("it is forgotten", || host.status().state == "listening");
        let error = host.status().last_error.unwrap();
        assert!(error.contains("needs REPLY_ACK and BACKEND_REQ"), "{error}");
    }
    host.assert_unharmed();
}

#[test]
fn guest_addresses_may_stand_for_user_addresses() {
    let _gate = beside_others();
    for format in FORMATS {
        let host = Host::new(1);
        let region = MemoryRegion {
            user_addr: VmMemory::START,
            ..VmMemory::region(VmMemory::START, 1 << 20)
        };
        let memory = VmMemory::new(&[region], Backing::Sealed).unwrap();
        let mut machine = host.machine_in(format, 1, memory);
        machine.agree_on(ACK | ProtocolFeatures::GPA_ADDRESSES);
        let agreed = ProtocolFeatures::from_bits_retain(host.status().protocol);
        assert!(agreed.contains(ProtocolFeatures::GPA_ADDRESSES));
        machine.tell_memory();
        (0..2).for_each(|ring| machine.start_ring(ring));
        machine.echo_some(0);
        drop(machine);
        host.assert_unharmed();
    }
}

#[test]
fn what_is_not_served_is_not_offered_and_refused_by_name() {
    let _gate = beside_others();
    let host = Host::new(1);
    let mut machine = host.machine(Features::empty(), 1);
    machine.agree();
    let offered = machine.front_end.ask(&Request::GetProtocolFeatures, &[]);
    let offered = ProtocolFeatures::from_bits_retain(number(&offered));
    let never = ProtocolFeatures::SHMEM
        | ProtocolFeatures::XEN_MMAP
        | ProtocolFeatures::SHARED_OBJECT
        | ProtocolFeatures::CRYPTO_SESSION
        | ProtocolFeatures::CROSS_ENDIAN
        | ProtocolFeatures::PAGEFAULT
        | ProtocolFeatures::INBAND_NOTIFICATIONS;
    assert!(offered.intersection(never).is_empty(), "{offered:?}");
    for request in [Request::GetShmemConfig, Request::PostcopyAdvise] {
        assert_eq!(machine.front_end.ask(&request, &[]), b"");
        let error = host.status().last_error.unwrap();
        assert!(error.contains(request.kind().name()), "{error}");
    }
    let state = VringState { index: 0, num: 0 };
    assert!(!machine.front_end.accepts(&Request::VringKick(state), &[]));
    drop(machine);
    host.assert_unharmed();
}

const PAGE: usize = 4096;

/// The other end of a migration: has all pages, and brings each when somebody waits for it.
struct Source {
    stop: Arc<AtomicBool>,
    /// Guest addresses of the pages that were brought.
    brought: Arc<Mutex<BTreeSet<u64>>>,
    thread: thread::JoinHandle<()>,
}

/// A region at the source: where it begins for the guest and in the device's process, and what it contains.
struct Pages {
    guest: u64,
    mapped_at: u64,
    bytes: Vec<u8>,
}

impl Source {
    fn start(userfault: Userfault, regions: Vec<Pages>) -> Self {
        let (stop, brought) = (
            Arc::<AtomicBool>::default(),
            Arc::<Mutex<BTreeSet<u64>>>::default(),
        );
        let (stopped, noted) = (Arc::clone(&stop), Arc::clone(&brought));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let Some(fault) = userfault.next_fault().unwrap() else {
                    thread::sleep(Duration::from_micros(200));
                    continue;
                };
                let page = fault - fault % PAGE as u64;
                let of = |region: &&Pages| {
                    (region.mapped_at..region.mapped_at + region.bytes.len() as u64).contains(&page)
                };
                let region = regions
                    .iter()
                    .find(of)
                    .expect("a fault in memory that was told");
                let offset = (page - region.mapped_at) as usize;
                noted.lock().unwrap().insert(region.guest + offset as u64);
                match userfault.copy(page, &region.bytes[offset..offset + PAGE]) {
                    Ok(()) => {}
                    // Two threads waited for the same page.
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                        userfault.wake(page, PAGE as u64).unwrap();
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        Self {
            stop,
            brought,
            thread,
        }
    }

    fn brought(&self) -> BTreeSet<u64> {
        self.brought.lock().unwrap().clone()
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// Lets the machine see what has become of pages elsewhere.
fn fetch(pages: &BTreeSet<u64>, from: &GuestMemory, to: &GuestMemory) {
    for &page in pages {
        let slice = |memory| GuestMemory::translate(memory, GuestAddr(page), PAGE as u32, &mut 0);
        let (source, target) = (slice(from).unwrap(), slice(to).unwrap());
        from.slice(source).copy_to_guest(&to.slice(target));
    }
}

/// Asks for the descriptor that serves faults; `None` where the kernel gives none.
fn advise(host: &Host, machine: &FakeVm) -> Option<Userfault> {
    let (payload, mut files) = machine
        .front_end
        .ask_for_files(&Request::PostcopyAdvise, &[]);
    assert_eq!(payload, b"");
    let fd: Option<OwnedFd> = files.pop();
    if fd.is_none() {
        eprintln!("skipped: {}", host.status().last_error.unwrap());
    }
    fd.map(Userfault::from_owned)
}

#[test]
fn u27_pages_that_arrive_after_the_guest_are_waited_for() {
    let _gate = beside_others();
    let protocol = ACK | ProtocolFeatures::PAGEFAULT;
    for (format, slots) in [(FORMATS[0], false), (FORMATS[1], true)] {
        let host = Host::with(|options| options.postcopy = true);
        let regions = [0, 1].map(|n| VmMemory::region(VmMemory::START + n * (1 << 20), 1 << 20));
        // The machine as it is where it comes from: rings with frames in them that nobody has taken yet.
        let there = VmMemory::new(&regions, Backing::Sealed).unwrap();
        let mut machine = host.machine_in(format, 1, there);
        machine.make_room(0, 30, 2048);
        machine
            .guest
            .allocate_from(GuestAddr(regions[1].guest_addr));
        let frames: Vec<_> = (0..30).map(|n| frame::pattern(1000 + n, n)).collect();
        frames.iter().for_each(|frame| machine.transmit(0, frame));
        // The device calls when it has used the last of them; in a packed ring the place has the wrap counter beside it.
        let last = 29 | if format.is_empty() { 0 } else { 0x8000 };
        let FakeVm { rings, guest, .. } = &mut machine;
        for ring in rings {
            ring.queue.set_calls(guest, Calls::At(last));
        }
        let contents = regions.map(|region| {
            let start = GuestAddr(region.guest_addr);
            machine.guest.read(start, region.size as usize)
        });
        // Its memory here, of which not a page has arrived.
        let here = VmMemory::new(&regions, Backing::Sealed).unwrap();

        machine.agree_on(if slots {
            protocol | ProtocolFeatures::CONFIGURE_MEM_SLOTS
        } else {
            protocol
        });
        let Some(userfault) = advise(&host, &machine) else {
            continue;
        };
        machine.front_end.insist(&Request::PostcopyListen, &[]);
        let bases: Vec<u64> = if slots {
            (0..2)
                .map(|n| {
                    let request = Request::AddMemReg(SingleRegion(regions[n]));
                    let answer = machine.front_end.ask(&request, &[here.file(n).as_fd()]);
                    let SingleRegion(region) = SingleRegion::from_bytes(&answer).unwrap();
                    assert_eq!(region.guest_addr, regions[n].guest_addr);
                    region.user_addr
                })
                .collect()
        } else {
            let request = Request::SetMemTable(MemoryTable(regions.to_vec()));
            let files = [here.file(0), here.file(1)];
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let answer = machine.front_end.ask(&request, &files);
            let MemoryTable(told) = MemoryTable::from_bytes(&answer).unwrap();
            told.iter().map(|region| region.user_addr).collect()
        };
        for ring in 0..2 {
            machine.start_ring(ring);
        }
        assert_eq!(
            host.status().sources,
            0,
            "nothing runs before faults are served"
        );
        let pages = bases.into_iter().zip(regions).zip(contents);
        let pages = pages.map(|((mapped_at, region), bytes)| Pages {
            guest: region.guest_addr,
            mapped_at,
            bytes,
        });
        let source = Source::start(userfault, pages.collect());
        // QEMU's way of saying that it is ready: the same message with a zero and no regions.
        let code = if slots { 37 } else { 5_u32 };
        let ready: Vec<_> = [code, 1, 8, 0, 0]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert!(machine.front_end.send_bytes(&ready, &[]));

        for ring in &machine.rings {
            assert!(is_signalled(&ring.call), "all frames have come back");
        }
        let brought = source.brought();
        assert!(brought.len() > 10, "pages were waited for");
        fetch(&brought, here.memory(), machine.guest.memory());
        let (back, taken) = (machine.received(0), machine.transmitted(0));
        assert_eq!((back.len(), taken), (frames.len(), frames.len()));
        assert!(back == frames, "other bytes came back");
        let ended = machine.front_end.ask(&Request::PostcopyEnd, &[]);
        assert_eq!(number(&ended), 0);
        source.stop();
        // What never arrived is nobody's business any more; packets go on in the pages that are there.
        drop(machine);
        host.assert_unharmed();
    }
}

#[test]
fn u27_whoever_waits_for_a_page_goes_on_when_the_front_end_leaves() {
    let _gate = beside_others();
    let host = Host::with(|options| options.postcopy = true);
    let mut machine = host.machine(Features::empty(), 1);
    machine.agree_on(ACK | ProtocolFeatures::PAGEFAULT);
    let Some(userfault) = advise(&host, &machine) else {
        return;
    };
    machine.front_end.insist(&Request::PostcopyListen, &[]);
    let (request, _) = machine.memory_table();
    let empty = VmMemory::of_size(1 << 20, Backing::Sealed).unwrap();
    machine.front_end.ask(&request, &[empty.file(0).as_fd()]);
    (0..2).for_each(|ring| machine.start_ring(ring));
    let ready: Vec<_> = [5, 1, 0_u32]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    assert!(machine.front_end.send_bytes(&ready, &[]));
    until("the worker waits for a page", || {
        userfault.next_fault().unwrap().is_some()
    });
    // The page never comes, and the descriptor stays open.
    drop(machine);
    host.assert_unharmed();
    drop(userfault);
}
