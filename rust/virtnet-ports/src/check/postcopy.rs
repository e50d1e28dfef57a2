//! Checks of memory whose pages arrive after the guest: a post-copy move to another host, of which this is the front-end there.
//!
//! The driver's memory (`Rig`) is what the guest has where it comes from. The back-end gets other files, in which there is nothing;
//! a page appears in them when the back-end waits for it, and only such pages are looked at here, because looking makes pages too.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use virtnet_mem::{GuestAddr, GuestMemory};
use virtnet_sys::Userfault;
use virtnet_vhost::ProtocolFeatures;
use virtnet_vhost::message::Request;
use virtnet_vhost::payload::{MemoryRegion, MemoryTable, Payload};
use virtnet_virtio::RingFormat::{self, Packed, Split};

use super::migration::memory;
use super::rig::{self, QUIET, Rig, SLOT, Shape};
use super::session::Session;
use super::traffic::frame;
use super::{Bench, Check, Stop, Verdict, failed, holds, skipped};
use crate::{Huge, OwnMemory, RegionLayout};

const POSTCOPY: &str = "vhost-user, Front-end message types, VHOST_USER_POSTCOPY_ADVISE";
const LISTEN: &str = "vhost-user, Front-end message types, VHOST_USER_POSTCOPY_LISTEN";

/// A page, as small as they are.
const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

/// Frames that wait in the rings when the guest arrives.
const FRAMES: u32 = 24;

/// How long nobody looks whether a page is waited for.
const NAP: Duration = Duration::from_micros(100);

pub(super) static CHECKS: &[Check] = &[
    Check::must(
        "postcopy-userfaultfd",
        "POSTCOPY_ADVISE is answered with one descriptor, a userfaultfd",
        POSTCOPY,
        |bench| advise(&session(bench)?).map(|_| "one came".to_owned()),
    ),
    Check::must(
        "postcopy-places",
        "memory that is told after POSTCOPY_LISTEN is answered with the same regions, each with the address at which the \
         back-end has it",
        "vhost-user, Front-end message types, VHOST_USER_SET_MEM_TABLE",
        |bench| Arrival::of(bench, Split).map(|arrival| arrival.said()),
    ),
    Check::must(
        "postcopy-touches-nothing",
        "no page is touched before the front-end says that it serves faults",
        LISTEN,
        |bench| {
            let arrival = Arrival::of(bench, Split)?;
            thread::sleep(QUIET);
            let mut blocks = 0;
            for region in arrival.here.regions() {
                let file = region.as_fd().try_clone_to_owned().map_err(Stop::host)?;
                blocks += File::from(file).metadata().map_err(Stop::host)?.blocks();
            }
            holds(
                blocks == 0,
                format!("{blocks} blocks of 512 bytes are there"),
            )
        },
    ),
    Check::must(
        "postcopy-waits-split",
        "what lies in rings and buffers whose pages have not arrived is taken when they have, and nothing else",
        LISTEN,
        |bench| waits(bench, Split),
    ),
    Check::must(
        "postcopy-waits-packed",
        "the same on packed rings",
        LISTEN,
        |bench| waits(bench, Packed),
    ),
    Check::must(
        "postcopy-returns",
        "frames that are received into pages which have not arrived are whole",
        LISTEN,
        |bench| {
            bench.needs_return()?;
            let mut arrival = Arrival::of(bench, Split)?;
            arrival.run()?;
            let mut came = Vec::new();
            arrival.eventually(|arrival| {
                came.extend(arrival.rig.received(0)?);
                Ok((came.len() >= FRAMES as usize).then_some(()))
            })?;
            // An echo may change the addresses of Ethernet.
            let whole = (0..FRAMES).zip(&came);
            let whole = whole.filter(|(n, (_, got))| got.get(12..) == sent(*n).get(12..));
            let whole = whole.count();
            holds(
                whole == FRAMES as usize && came.len() == whole,
                format!(
                    "of {FRAMES} frames {} came back, {whole} of them whole",
                    came.len()
                ),
            )
        },
    ),
    Check::must(
        "postcopy-ends",
        "POSTCOPY_END is answered with 0, and packets go on",
        "vhost-user, Front-end message types, VHOST_USER_POSTCOPY_END",
        |bench| {
            let mut arrival = Arrival::of(bench, Split)?;
            arrival.run()?;
            arrival.wait_taken(FRAMES as usize)?;
            arrival.end()?;
            arrival.send(&frame(1, 60))?;
            arrival.wait_taken(1)?;
            Ok("a frame was taken afterwards".to_owned())
        },
    ),
];

/// A session in which post-copy was agreed on; without memory slots, with which there is none.
fn session(bench: &Bench) -> Result<Session, Stop> {
    let mut session = bench.connect()?;
    let wanted = rig::PROTOCOL - ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    session.greet(wanted | ProtocolFeatures::PAGEFAULT)?;
    if session.protocol.contains(ProtocolFeatures::PAGEFAULT) {
        Ok(session)
    } else {
        skipped("PAGEFAULT is not offered")
    }
}

/// Announces post-copy: where the back-end's faults are served.
fn advise(session: &Session) -> Result<Userfault, Stop> {
    let (_, mut files) = session.ask_with(&Request::PostcopyAdvise, &[])?;
    let (Some(file), true) = (files.pop(), files.is_empty()) else {
        return failed(
            "the answer came without one: the kernel may not let the back-end have it (sysctl vm.unprivileged_userfaultfd)",
        );
    };
    let userfault = Userfault::from_owned(file);
    match userfault.next_fault() {
        Ok(None) => Ok(userfault),
        Ok(Some(at)) => failed(format!(
            "a page is waited for at {at:#x} before there is memory"
        )),
        Err(error) => failed(format!(
            "what came cannot be read as a userfaultfd: {error}"
        )),
    }
}

fn waits(bench: &Bench, format: RingFormat) -> Verdict {
    let mut arrival = Arrival::of(bench, format)?;
    arrival.run()?;
    arrival.wait_taken(FRAMES as usize)?;
    let brought = arrival.brought().len();
    holds(
        brought > 0,
        format!("{FRAMES} frames were taken, and {brought} pages waited for"),
    )
}

/// A frame that waits in the ring.
fn sent(number: u32) -> Vec<u8> {
    frame(number, 60 + 32 * number as usize)
}

/// A guest that arrives: its rings and frames are in the memory that it comes from.
struct Arrival {
    /// Before the session, which ends when nobody waits for a page any more: a back-end may not get over that.
    source: Source,
    rig: Rig,
    /// Its memory here, in which there is nothing at first.
    here: OwnMemory,
    /// Where the back-end has that.
    places: Vec<MemoryRegion>,
}

impl Arrival {
    /// Told is everything up to the memory; faults are not served yet.
    fn of(bench: &Bench, format: RingFormat) -> Result<Self, Stop> {
        let size = 0x8_0000;
        let layout = [0, 2 * size].map(|at| RegionLayout {
            guest: GuestAddr(0x10_0000 + at),
            size,
            offset: 0,
        });
        let shape = Shape {
            layout: Some(layout.to_vec()),
            ..Shape::new(format)
        };
        let session = session(bench)?;
        let userfault = advise(&session)?;
        session.insist(&Request::PostcopyListen, &[])?;
        let mut rig = Rig::new(session, &shape)?;
        rig.tell_features()?;
        for ring in 0..rig.rings.len() {
            rig.set_call(ring, true)?;
        }
        rig.make_room(0, FRAMES as usize, 2048)?;
        for number in 0..FRAMES {
            rig.send(0, &sent(number))?;
        }
        let here = OwnMemory::with_layout(&layout, Huge::No).map_err(Stop::host)?;
        let files: Vec<BorrowedFd<'_>> = here.regions().iter().map(AsFd::as_fd).collect();
        let (payload, _) = rig.session.ask_with(&rig.memory_table(), &files)?;
        let Some(MemoryTable(places)) = MemoryTable::from_bytes(&payload) else {
            let bytes = payload.len();
            return failed(format!(
                "SET_MEM_TABLE was answered with {bytes} bytes, which are no table"
            ));
        };
        check_places(&rig.regions(), &places)?;
        let source = Source::new(userfault, &places, memory(&rig));
        Ok(Self {
            source,
            rig,
            here,
            places,
        })
    }

    fn said(&self) -> String {
        let places = self.places.iter();
        let places =
            places.map(|region| format!("{:#x} is at {:#x}", region.guest_addr, region.user_addr));
        places.collect::<Vec<_>>().join(", ")
    }

    /// Says that faults are served, and tells of the rings.
    fn run(&mut self) -> Result<(), Stop> {
        self.source.serve();
        // As QEMU says it: a table of no regions, which has no answer.
        let ready = Request::SetMemTable(MemoryTable(Vec::new()));
        self.rig.session.tell(&ready, &[])?;
        for ring in 0..self.rig.rings.len() {
            // Enabled before it starts: what lies on a ring that runs and is disabled is thrown away.
            self.rig
                .configure_ring(ring, self.rig.rings[ring].config.base)?;
            self.rig.set_call(ring, true)?;
            self.rig.enable(ring, true)?;
            self.rig.set_kick(ring, true)?;
            // It was rung before there was anybody to hear it.
            drop(self.rig.rings[ring].kick.signal());
        }
        Ok(())
    }

    /// The pages that were waited for, by guest address.
    fn brought(&self) -> BTreeSet<u64> {
        self.source.brought()
    }

    /// Asks again and again, with what has become of the pages that are here.
    fn eventually<T>(
        &mut self,
        mut question: impl FnMut(&mut Self) -> Result<Option<T>, Stop>,
    ) -> Result<Option<T>, Stop> {
        let start = Instant::now();
        loop {
            let late = start.elapsed() > self.rig.session.patience();
            for page in self.brought() {
                copy_page(&self.here, &self.rig.memory, page);
            }
            let answer = question(self)?;
            if answer.is_some() || late {
                return Ok(answer);
            }
            thread::sleep(NAP);
        }
    }

    fn wait_taken(&mut self, n: usize) -> Result<(), Stop> {
        let mut taken = 0;
        self.eventually(|arrival| {
            taken += arrival.rig.taken(0)?;
            Ok((taken >= n).then_some(()))
        })?;
        if taken == n {
            return Ok(());
        }
        let pages = self.brought().len();
        failed(format!(
            "of {n} frames {taken} were taken, {pages} pages were waited for"
        ))
    }

    /// All pages arrive, and post-copy ends.
    fn end(&mut self) -> Result<(), Stop> {
        self.source.bring_all();
        match self.rig.session.number(&Request::PostcopyEnd)? {
            0 => Ok(()),
            code => failed(format!("POSTCOPY_END was answered with {code}")),
        }
    }

    /// Sends one more frame when none is on its way, from memory that is all here: what the driver writes is carried over before it
    /// is shown.
    fn send(&mut self, frame: &[u8]) -> Result<(), Stop> {
        let bytes = [&[0; rig::HEADER], frame].concat();
        self.rig.add(1, bytes, &[], false)?;
        self.carry_over();
        self.rig.publish(1);
        self.carry_over();
        drop(self.rig.rings[1].kick.signal());
        Ok(())
    }

    /// The pages of the transmitq and its buffers, which lie behind it.
    fn carry_over(&self) {
        let ring = &self.rig.rings[1];
        let start = self.rig.guest_addr(ring.config.desc_area).0;
        let end = ring.slots.0 + u64::from(ring.config.size) * SLOT;
        for page in (start..end).step_by(PAGE_LEN) {
            copy_page(&self.rig.memory, &self.here, page);
        }
    }
}

fn copy_page(from: &OwnMemory, to: &OwnMemory, page: u64) {
    let (from, to) = (from.memory(), to.memory());
    let len = rig::length(PAGE_LEN);
    let place = |memory: &GuestMemory| memory.translate(GuestAddr(page), len, &mut 0);
    if let (Some(source), Some(target)) = (place(from), place(to)) {
        from.slice(source).copy_to_guest(&to.slice(target));
    }
}

/// Whether these are the regions that were told, each at a place of its own.
fn check_places(told: &[MemoryRegion], places: &[MemoryRegion]) -> Result<(), Stop> {
    let name = |region: &MemoryRegion| (region.guest_addr, region.size);
    if !told.iter().map(name).eq(places.iter().map(name)) {
        return failed(format!("{told:x?} was told, and {places:x?} answered"));
    }
    let mut ends: Vec<_> = places
        .iter()
        .map(|region| {
            (
                region.user_addr,
                region.user_addr.saturating_add(region.size),
            )
        })
        .collect();
    ends.sort_unstable();
    let apart = ends.windows(2).all(|pair| pair[0].1 <= pair[1].0);
    let whole = ends
        .iter()
        .all(|(start, _)| *start > 0 && start % PAGE == 0);
    if apart && whole {
        return Ok(());
    }
    failed(format!("places that cannot be: {places:x?}"))
}

/// The host that a guest comes from: has all pages, and brings each when somebody waits for it.
struct Source {
    shared: Arc<Pages>,
    thread: Option<JoinHandle<()>>,
}

struct Pages {
    userfault: Userfault,
    regions: Vec<Place>,
    /// Guest addresses of the pages that were brought.
    brought: Mutex<BTreeSet<u64>>,
    stop: AtomicBool,
}

/// A region: where it begins for the guest and in the back-end, and what it contains.
struct Place {
    guest: u64,
    mapped_at: u64,
    bytes: Vec<u8>,
}

impl Source {
    fn new(userfault: Userfault, places: &[MemoryRegion], contents: Vec<(u64, Vec<u8>)>) -> Self {
        let regions = places
            .iter()
            .zip(contents)
            .map(|(place, (guest, bytes))| Place {
                guest,
                mapped_at: place.user_addr,
                bytes,
            });
        let shared = Arc::new(Pages {
            userfault,
            regions: regions.collect(),
            brought: Mutex::default(),
            stop: AtomicBool::default(),
        });
        Self {
            shared,
            thread: None,
        }
    }

    fn serve(&mut self) {
        let pages = Arc::clone(&self.shared);
        self.thread = Some(thread::spawn(move || {
            while !pages.stop.load(Ordering::Relaxed) {
                match pages.userfault.next_fault() {
                    Ok(Some(at)) => pages.bring(at - at % PAGE),
                    Ok(None) => thread::sleep(NAP),
                    // Whoever waits for pages then notices that none come.
                    Err(_) => return,
                }
            }
        }));
    }

    fn brought(&self) -> BTreeSet<u64> {
        self.shared.brought().clone()
    }

    /// Brings what nobody has waited for.
    fn bring_all(&self) {
        for place in &self.shared.regions {
            let len = u64::try_from(place.bytes.len()).unwrap_or_default();
            for page in (place.mapped_at..place.mapped_at + len).step_by(PAGE_LEN) {
                self.shared.bring(page);
            }
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.bring_all();
        }
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say.
            drop(thread.join());
        }
    }
}

impl Pages {
    fn brought(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.brought.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the page at an address of the back-end's. What cannot be brought is missed there, and found out by that.
    fn bring(&self, page: u64) {
        for place in &self.regions {
            let offset = page.wrapping_sub(place.mapped_at);
            let Some(bytes) = usize::try_from(offset)
                .ok()
                .and_then(|at| place.bytes.get(at..at.checked_add(PAGE_LEN)?))
            else {
                continue;
            };
            match self.userfault.copy(page, bytes) {
                Ok(()) => {}
                // Somebody else has waited for it too.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    drop(self.userfault.wake(page, PAGE));
                }
                Err(_) => return,
            }
            self.brought().insert(place.guest + offset);
        }
    }
}
