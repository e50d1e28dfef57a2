//! The memory of a machine as its front-end has it: regions, and the files they lie in.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtnet_mem::{GuestAddr, GuestMemory, Region, UserAddr};
use virtnet_sys::memfd;
use virtnet_vhost::payload::MemoryRegion;

use crate::TempDir;

/// What the regions of a machine are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Memory files whose size is sealed.
    Sealed,
    /// Memory files that can be shortened.
    Resizable,
    /// Files of a file system.
    File,
    /// Huge pages, sealed. There may be none.
    HugePages,
    /// Huge pages that can be taken away.
    ResizableHugePages,
}

/// Memory of a machine. Each region has a file of its own.
#[derive(Debug)]
pub struct VmMemory {
    memory: Arc<GuestMemory>,
    regions: Vec<MemoryRegion>,
    files: Vec<File>,
}

impl VmMemory {
    /// Guest address of memory that was asked for by size alone.
    pub const START: u64 = 1 << 32;

    /// What is added to a guest address to get the user address.
    pub const USER_BASE: u64 = 0x7000_0000_0000;

    /// A region of `size` bytes at guest address `guest`, with nothing before it in its file.
    #[must_use]
    pub fn region(guest: u64, size: u64) -> MemoryRegion {
        MemoryRegion {
            guest_addr: guest,
            size,
            user_addr: guest + Self::USER_BASE,
            mmap_offset: 0,
        }
    }

    /// One region of `size` bytes.
    ///
    /// # Errors
    /// What the system says; mostly that there are no huge pages.
    pub fn of_size(size: u64, backing: Backing) -> io::Result<Self> {
        Self::new(&[Self::region(Self::START, size)], backing)
    }

    /// Regions exactly as told.
    ///
    /// # Errors
    /// As [`Self::of_size`].
    ///
    /// # Panics
    /// When the regions make no sense together.
    pub fn new(regions: &[MemoryRegion], backing: Backing) -> io::Result<Self> {
        let mut files = Vec::with_capacity(regions.len());
        let mut mapped = Vec::with_capacity(regions.len());
        for region in regions {
            let file = file(region.mmap_offset + region.size, backing)?;
            let fd = OwnedFd::from(file.try_clone()?);
            let (guest, user) = (GuestAddr(region.guest_addr), UserAddr(region.user_addr));
            let map = Region::map_file(fd, region.mmap_offset, region.size, guest, user);
            mapped.push(map.expect("a region of our own can be mapped"));
            files.push(file);
        }
        let memory = GuestMemory::new(mapped).expect("regions that do not overlap");
        Ok(Self {
            memory: Arc::new(memory),
            regions: regions.to_vec(),
            files,
        })
    }

    /// The memory as the machine itself sees it.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The regions as a back-end is told of them.
    #[must_use]
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// The file of a region, to be given away.
    ///
    /// # Panics
    /// When there is no such region, or the process is out of descriptors.
    #[must_use]
    pub fn file(&self, region: usize) -> OwnedFd {
        let file = self.files[region].try_clone();
        file.expect("a descriptor").into()
    }

    /// Makes the file of a region `size` bytes long, whoever has it mapped.
    ///
    /// # Panics
    /// When its size is sealed.
    pub fn resize(&self, region: usize, size: u64) {
        let done = self.files[region].set_len(size);
        done.expect("a file that can change its size");
    }
}

fn file(size: u64, backing: Backing) -> io::Result<File> {
    let name = "virtnet-vm";
    let made = match backing {
        Backing::Sealed => memfd::create(name, size, false),
        Backing::Resizable => memfd::create_resizable(name, size, false),
        Backing::HugePages => memfd::create(name, whole_pages(size), true),
        Backing::ResizableHugePages => memfd::create_resizable(name, whole_pages(size), true),
        Backing::File => {
            let directory = TempDir::new();
            let path = directory.join("memory");
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)?;
            file.set_len(size)?;
            return Ok(file);
        }
    };
    Ok(made.map_err(io::Error::other)?.into())
}

/// The size in huge pages that this needs.
fn whole_pages(size: u64) -> u64 {
    size.next_multiple_of(memfd::HUGE_PAGE_SIZE)
}
