//! Memory that goes away under us, in this process and in one that is to die of it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use virtnet_mem::{GuestAddr, GuestMemory, MemoryError, Region, UserAddr, losses};

use crate::{PAGE, byte_at, file_of};

const PAGES: u64 = 16;

/// A memory of one region over a file, and the file.
fn memory_of(file: &File, at: u64) -> Arc<GuestMemory> {
    let fd = OwnedFd::from(file.try_clone().unwrap());
    let region = Region::map_file(fd, 0, PAGES * PAGE, GuestAddr(at), UserAddr(at)).unwrap();
    Arc::new(GuestMemory::new(vec![region]).unwrap())
}

fn read(memory: &GuestMemory, at: u64) -> u8 {
    let segment = memory.translate(GuestAddr(at), 1, &mut 0).unwrap();
    let mut byte = [0xee];
    memory.slice(segment).copy_to(&mut byte);
    byte[0]
}

fn write(memory: &GuestMemory, at: u64, byte: u8) {
    let segment = memory.translate(GuestAddr(at), 1, &mut 0).unwrap();
    memory.slice(segment).copy_from(&[byte]);
}

#[test]
fn tb45_a_file_that_is_shortened_leaves_zeros_and_a_mark_and_no_signal() {
    let (file, other) = (file_of(PAGES * PAGE), file_of(PAGES * PAGE));
    let (memory, neighbour) = (memory_of(&file, 0), memory_of(&other, 0));
    file.set_len(4 * PAGE).unwrap();
    // Nothing has been touched, so nobody knows.
    assert!(memory.lost_region().is_none());
    let before = losses();
    assert_eq!(read(&memory, 3 * PAGE + 7), byte_at(3 * PAGE + 7));
    assert_eq!(read(&memory, 4 * PAGE + 7), 0);
    assert!(losses() > before);
    assert_eq!(memory.lost_region().unwrap().guest(), GuestAddr(0));
    // What took its place can be used, and the pages before it are what they were.
    write(&memory, 4 * PAGE + 7, 9);
    assert_eq!(read(&memory, 4 * PAGE + 7), 9);
    assert_eq!(read(&memory, 3 * PAGE), byte_at(3 * PAGE));
    // A page that is first written is lost in the same way, and a ring area too.
    write(&memory, 9 * PAGE, 1);
    let window = memory.window(UserAddr(12 * PAGE), 64, 4).unwrap();
    assert_eq!(window.load_u16(0, Ordering::Relaxed), 0);
    assert!(neighbour.lost_region().is_none());
    assert_eq!(read(&neighbour, 9 * PAGE), byte_at(9 * PAGE));
    // A new mapping in the same place begins without a mark.
    drop((memory, window));
    let file = file_of(PAGES * PAGE);
    assert!(memory_of(&file, 0).lost_region().is_none());
}

#[test]
fn tb45_every_thread_may_lose_every_page_at_once() {
    for _ in 0..50 {
        let file = file_of(PAGES * PAGE);
        let memory = memory_of(&file, 0);
        file.set_len(0).unwrap();
        let readers: Vec<_> = (0..4)
            .map(|n| {
                let memory = Arc::clone(&memory);
                thread::spawn(move || {
                    (0..PAGES).for_each(|page| assert_eq!(read(&memory, page * PAGE + n), 0));
                })
            })
            .collect();
        readers
            .into_iter()
            .for_each(|reader| reader.join().unwrap());
        assert!(memory.lost_region().is_some());
    }
}

#[test]
fn tb45_more_mappings_than_one_chunk_of_the_register_are_told_apart() {
    let files: Vec<_> = (0..400).map(|_| file_of(PAGES * PAGE)).collect();
    let memories: Vec<_> = files.iter().map(|file| memory_of(file, 0)).collect();
    for n in (0..400).step_by(57) {
        files[n].set_len(0).unwrap();
        assert_eq!(read(&memories[n], 5), 0);
    }
    for (n, memory) in memories.iter().enumerate() {
        assert_eq!(memory.lost_region().is_some(), n % 57 == 0, "mapping {n}");
        assert!(n % 57 == 0 || read(memory, 5) == byte_at(5));
    }
}

#[test]
fn mappings_come_and_go_while_others_are_lost() {
    let churn = thread::spawn(|| {
        let file = file_of(PAGES * PAGE);
        for _ in 0..3000 {
            assert!(memory_of(&file, 0).lost_region().is_none());
        }
    });
    while !churn.is_finished() {
        let file = file_of(PAGES * PAGE);
        let memory = memory_of(&file, 0);
        file.set_len(PAGE).unwrap();
        for page in 1..PAGES {
            assert_eq!(read(&memory, page * PAGE), 0);
        }
        assert!(memory.lost_region().is_some());
    }
    churn.join().unwrap();
}

#[test]
fn a_file_that_is_short_already_is_refused() {
    let file = file_of(PAGE);
    let fd = OwnedFd::from(file);
    let refused = Region::map_file(fd, 0, 2 * PAGE, GuestAddr(0), UserAddr(0));
    assert!(matches!(refused, Err(MemoryError::ShortFile { .. })));
}

/// Not a test of its own: what the child does that the next test starts.
#[test]
#[ignore = "ends its process"]
fn child_that_is_killed() {
    // The handler is ours, and a signal that is none of our faults is not kept from anyone.
    let file = file_of(PAGES * PAGE);
    let memory = memory_of(&file, 0);
    file.set_len(0).unwrap();
    assert_eq!(read(&memory, 0), 0);
    let pid = std::process::id().to_string();
    // Rust's own handler, which was there first, takes the first one for a fault and waits for it to come again.
    for _ in 0..2 {
        let sent = Command::new("kill").args(["-BUS", &pid]).status().unwrap();
        assert!(sent.success());
    }
    thread::sleep(std::time::Duration::from_secs(20));
}

#[test]
fn a_signal_that_is_not_about_our_memory_still_ends_the_process() {
    let ended = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "guard::child_that_is_killed", "--ignored"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    // 7 is SIGBUS.
    assert_eq!(ended.signal(), Some(7), "{ended}");
}
