//! Guest memory against naive models: translation, mapping of files, windows, slices.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers and fail loudly"
)]

mod dirty_log;
mod guard;
mod region;
mod slice;
mod table;
mod translate;
mod window;

use std::fs::{self, File};
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// A nameless file of `len` bytes, each telling its place.
fn file_of(len: u64) -> File {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "virtnet-mem-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
    let bytes: Vec<u8> = (0..len).map(byte_at).collect();
    fs::write(&path, bytes).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    file
}

/// What stands at byte `at` of a [`file_of`].
fn byte_at(at: u64) -> u8 {
    (at ^ (at >> 8).wrapping_mul(37)) as u8
}
