//! The dirty log as a virtual machine monitor sees it: it makes the file, hands it over, and takes out what a back-end marks.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use virtnet_mem::DirtyLog;
use virtnet_sys::memfd;

use crate::FakeGuest;

/// A dirty log that reaches to the end of a guest's memory.
#[derive(Debug)]
pub struct DirtyPages {
    file: File,
    size: u64,
}

impl DirtyPages {
    /// A log in which nothing is marked.
    ///
    /// # Panics
    /// When the system has no memory, or the guest none.
    #[must_use]
    pub fn new(guest: &FakeGuest) -> Self {
        let ends = guest.memory().regions().iter();
        let end = ends.map(|region| region.guest().0 + region.size()).max();
        let pages = end.expect("a guest needs memory").div_ceil(DirtyLog::PAGE);
        let size = pages.div_ceil(8);
        let file = memfd::create_resizable("virtnet-log", size, false).expect("memory for a log");
        Self {
            file: file.into(),
            size,
        }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Takes the log away from whoever has it mapped.
    ///
    /// # Panics
    /// Never: the file is ours.
    pub fn shorten(&self) {
        self.file.set_len(0).expect("our own file");
    }

    /// Takes out what has been marked: addresses of pages. Nobody may be marking any while this happens.
    ///
    /// # Panics
    /// Never: the file is ours.
    #[must_use]
    pub fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; usize::try_from(self.size).expect("a log is small")];
        self.file
            .read_exact_at(&mut bytes, 0)
            .expect("our own file");
        let mut pages = BTreeSet::new();
        for (at, &byte) in (0..).zip(&bytes).filter(|&(_, &byte)| byte != 0) {
            let marked = (0..8).filter(|bit| byte >> bit & 1 == 1);
            pages.extend(marked.map(|bit| DirtyLog::PAGE * (8 * at + bit)));
            self.file.write_all_at(&[0], at).expect("our own file");
        }
        pages
    }
}

impl AsFd for DirtyPages {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
