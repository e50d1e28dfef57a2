//! What keeps the process alive when memory goes away under it.
//!
//! Whoever shares a file with us can shorten it while we have it mapped, or the pool its pages come from can run dry. Then the
//! next access raises SIGBUS, and a process that does nothing about it dies. Here something is done: the handler finds out
//! whether the page belongs to a [`Guard`], puts a private page of zeros in its place, marks the guard as lost and lets the
//! access happen. Nobody waits and nobody is told: whoever uses such memory compares [`losses`] with what it was, once in a
//! while, and asks its own regions only where that has changed.
//!
//! A signal has one handler in a process, so this module is the one place with state that everybody shares. A SIGBUS that is
//! none of our mappings' goes to the handler that was there before ours, as if we were not there.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering, Ordering::SeqCst,
};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libc::{c_int, c_void, sigaction, siginfo_t};

/// How many mappings a chunk of the register has room for.
const CHUNK: usize = 256;

/// Pages that have been replaced so far.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// The register of guarded mappings. Chunks are only ever added, so the handler can walk it without a lock.
static REGISTER: Chunk = Chunk::new();

/// Held by whoever changes the register or the handler. The handler never takes it.
static CHANGE: Mutex<()> = Mutex::new(());

/// Who had the signal before us; null until we have it.
static PREVIOUS: AtomicPtr<sigaction> = AtomicPtr::new(ptr::null_mut());

/// The thread whose fault was passed on last: a handler that gives up raises the signal once more.
static PASSED_ON: AtomicI32 = AtomicI32::new(0);

/// How many pages of guarded memory have been lost in this process: a number that changes when there is something to look for.
#[inline]
#[must_use]
pub fn losses() -> u64 {
    LOSSES.load(Ordering::Relaxed)
}

/// Makes sure that the handler is ours. Mapping a file does it too; to be called now and then, because a library that takes the
/// signal later (Python's `faulthandler`, for one) is not aware of us.
pub fn arm() {
    let _change = lock();
    let mut found = no_action();
    // SAFETY: a call without a new action only writes the present one to `found`.
    unsafe { sigaction(libc::SIGBUS, ptr::null(), &raw mut found) };
    let ours = handler_address();
    if found.sa_sigaction == ours {
        return;
    }
    // SAFETY: what PREVIOUS points to was leaked and is never changed.
    let known = unsafe { PREVIOUS.load(SeqCst).as_ref() };
    let same = |known: &sigaction| {
        (known.sa_sigaction, known.sa_flags) == (found.sa_sigaction, found.sa_flags)
    };
    if !known.is_some_and(same) {
        // Never freed, because a handler may be looking at it; there are as many as there are different handlers before ours.
        PREVIOUS.store(Box::into_raw(Box::new(found)), SeqCst);
    }
    set_handler(ours, libc::SA_SIGINFO | libc::SA_ONSTACK);
}

/// A mapping whose pages are replaced when they are lost.
#[derive(Debug)]
pub(crate) struct Guard {
    entry: &'static Entry,
}

impl Guard {
    /// Guards `len` bytes from `start` on, in pages of `page` bytes.
    ///
    /// # Safety
    /// The bytes are a mapping that begins with a page, and stay one until the guard is dropped; nobody relies on what is in them.
    pub(crate) unsafe fn new(start: *mut u8, len: usize, page: usize) -> Self {
        arm();
        let _change = lock();
        let entry = REGISTER.free();
        entry.set(start.addr(), len, page);
        Self { entry }
    }

    /// Whether a page of it has been lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.entry.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _change = lock();
        self.entry.set(0, 0, 1);
    }
}

/// One guarded mapping, or room for one.
#[derive(Debug)]
struct Entry {
    /// Odd while the entry changes: whoever reads it then takes it for free. An entry whose page is faulting does not change.
    version: AtomicUsize,
    /// Zero if the entry is free.
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
}

impl Entry {
    const fn new() -> Self {
        Self {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page: AtomicUsize::new(1),
            lost: AtomicBool::new(false),
        }
    }

    fn set(&self, start: usize, len: usize, page: usize) {
        self.version.fetch_add(1, SeqCst);
        self.start.store(start, SeqCst);
        self.len.store(len, SeqCst);
        self.page.store(page.max(1), SeqCst);
        self.lost.store(false, SeqCst);
        self.version.fetch_add(1, SeqCst);
    }

    /// The page that has this address, as start and length.
    fn page_of(&self, addr: usize) -> Option<(usize, usize)> {
        let version = self.version.load(SeqCst);
        let (start, len) = (self.start.load(SeqCst), self.len.load(SeqCst));
        let page = self.page.load(SeqCst);
        if version % 2 == 1 || version != self.version.load(SeqCst) || start == 0 {
            return None;
        }
        let offset = addr.checked_sub(start).filter(|&offset| offset < len)?;
        let first = offset - offset % page;
        Some((start + first, page.min(len - first)))
    }
}

/// A piece of the register.
struct Chunk {
    entries: [Entry; CHUNK],
    next: AtomicPtr<Self>,
}

impl Chunk {
    const fn new() -> Self {
        Self {
            entries: [const { Entry::new() }; CHUNK],
            next: AtomicPtr::new(ptr::null_mut()),
        }
    }

    fn next(&self) -> Option<&'static Self> {
        // SAFETY: chunks are leaked and never given back.
        unsafe { self.next.load(SeqCst).as_ref() }
    }

    /// An entry that nobody uses, in a new chunk if need be. Called with the lock held.
    fn free(&'static self) -> &'static Entry {
        let mut chunk = self;
        loop {
            let free = |entry: &&Entry| entry.start.load(SeqCst) == 0;
            if let Some(entry) = chunk.entries.iter().find(free) {
                return entry;
            }
            chunk = chunk.next().unwrap_or_else(|| {
                let more = Box::leak(Box::new(Self::new()));
                chunk.next.store(more, SeqCst);
                more
            });
        }
    }
}

fn lock() -> MutexGuard<'static, ()> {
    CHANGE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn handler_address() -> usize {
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigbus;
    handler as usize
}

/// The default action, with nothing masked.
fn no_action() -> sigaction {
    // SAFETY: a sigaction is numbers and an optional pointer; all zeros is one.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn set_handler(address: usize, flags: c_int) {
    let action = sigaction {
        sa_sigaction: address,
        sa_flags: flags,
        ..no_action()
    };
    // SAFETY: the handler is ours, of the form that SA_SIGINFO says, or the default one.
    unsafe { sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
}

/// The handler. It allocates nothing, takes no lock and touches only what is above.
extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: every thread has a place for its errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: it is this thread's own.
    let before = unsafe { errno.read() };
    // SAFETY: with SA_SIGINFO the kernel hands over a whole siginfo.
    let told = unsafe { &*info };
    // SAFETY: a SIGBUS carries an address if the kernel itself raised it; otherwise the number is not used.
    let addr = unsafe { told.si_addr() }.addr();
    let is_fault = matches!(told.si_code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR);
    if !(is_fault && replace(addr)) {
        pass_on(signal, told.si_code, info, context);
    }
    // SAFETY: as above; the interrupted code has to find it as it was.
    unsafe { errno.write(before) };
}

/// Puts zeros where a guarded page was lost; whether the address is guarded and that was possible.
fn replace(addr: usize) -> bool {
    let mut chunk = Some(&REGISTER);
    while let Some(here) = chunk {
        for entry in &here.entries {
            let Some((start, len)) = entry.page_of(addr) else {
                continue;
            };
            // SAFETY: the thread that faulted is using this mapping, so it stays mapped until we return, and its guard was made
            // with the promise that its bytes may change.
            let mapped = unsafe {
                libc::mmap(
                    ptr::without_provenance_mut(start),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if mapped == libc::MAP_FAILED {
                return false;
            }
            entry.lost.store(true, SeqCst);
            LOSSES.fetch_add(1, SeqCst);
            return true;
        }
        chunk = here.next();
    }
    false
}

/// Gives a signal that is not about us to the handler before ours, which may be the default one.
fn pass_on(signal: c_int, code: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: gettid has no preconditions.
    let thread = unsafe { libc::gettid() };
    // A handler that was told of a fault, and could only report it, raises the signal again to end the process. It may have put
    // us back as the one before it; to tell it again would never end.
    let given_up = code == libc::SI_TKILL && PASSED_ON.swap(0, SeqCst) == thread;
    // SAFETY: what PREVIOUS points to was leaked and is never changed.
    let previous = unsafe { PREVIOUS.load(SeqCst).as_ref() };
    let address = previous.map_or(libc::SIG_DFL, |previous| previous.sa_sigaction);
    if code > 0 {
        PASSED_ON.store(thread, SeqCst);
    }
    match (address, previous) {
        (libc::SIG_IGN, _) if code <= 0 => {}
        (address, Some(previous))
            if !given_up && address != libc::SIG_DFL && address != libc::SIG_IGN =>
        {
            if previous.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: it was installed to be called by the kernel with these three arguments.
                let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                    unsafe { std::mem::transmute(address) };
                handler(signal, info, context);
            } else {
                // SAFETY: as above, with one argument.
                let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(address) };
                handler(signal);
            }
        }
        _ => {
            set_handler(libc::SIG_DFL, 0);
            // A fault comes again when we return; whatever else it was is sent again.
            if code <= 0 || code == libc::BUS_MCEERR_AO {
                // SAFETY: raise has no preconditions; the signal is delivered when we return.
                unsafe { libc::raise(signal) };
            }
        }
    }
}
