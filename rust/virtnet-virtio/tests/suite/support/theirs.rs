//! Another implementation's device, on the same bytes: rust-vmm's `virtio-queue`.

use std::fs::File;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtnet_virtio::Access;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::Setup;
use super::device::Device;

/// `file` as their memory, where `setup` has it.
pub(crate) fn their_memory(setup: &Setup, file: &File) -> GuestMemoryMmap {
    let len = file.metadata().unwrap().len() as usize;
    let file = FileOffset::new(file.try_clone().unwrap(), 0);
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(setup.desc()), len, Some(file))])
        .unwrap()
}

/// Their queue, where `setup` starts.
pub(crate) fn their_queue(setup: &Setup) -> Queue {
    assert!(!setup.is_packed(), "they have split queues only");
    let mut queue = Queue::new(setup.size).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(setup.desc()))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(setup.driver_area()))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(setup.device_area()))
        .unwrap();
    queue.set_event_idx(setup.event_idx);
    queue.set_next_avail(setup.start as u16);
    queue.set_next_used(setup.start as u16);
    queue.set_ready(true);
    queue
}

/// Their queue with the chains it holds.
#[derive(Debug)]
pub(crate) struct TheirDevice {
    queue: Queue,
    memory: GuestMemoryMmap,
    held: Vec<Held>,
    /// Used elements to be written when published: they would show each at once.
    staged: Vec<(u16, u32)>,
}

#[derive(Debug)]
struct Held {
    head: u16,
    descs: Vec<Descriptor>,
}

impl TheirDevice {
    pub(crate) fn new(setup: &Setup, file: &File) -> Self {
        let memory = their_memory(setup, file);
        let queue = their_queue(setup);
        assert!(queue.is_valid(&memory));
        Self {
            queue,
            memory,
            held: Vec::new(),
            staged: Vec::new(),
        }
    }
}

impl Device for TheirDevice {
    fn take(&mut self, access: Access, max: usize) -> usize {
        let before = self.held.len();
        for chain in self.queue.iter(&self.memory).unwrap().take(max) {
            let chain: DescriptorChain<&GuestMemoryMmap> = chain;
            let head = chain.head_index();
            let descs: Vec<Descriptor> = chain.collect();
            let write = access == Access::Write;
            assert!(descs.iter().all(|d| d.is_write_only() == write));
            assert!(!descs.last().unwrap().has_next(), "the chain is cut off");
            self.held.push(Held { head, descs });
        }
        self.held.len() - before
    }

    fn held(&self) -> usize {
        self.held.len()
    }

    fn room(&self) -> usize {
        usize::MAX
    }

    fn any_order(&self) -> bool {
        true
    }

    fn knows_suppression(&self) -> bool {
        self.queue.event_idx_enabled()
    }

    fn buffers(&self, i: usize) -> Vec<(u64, u32)> {
        let descs = self.held[i].descs.iter();
        descs
            .filter(|d| d.len() > 0)
            .map(|d| (d.addr().0, d.len()))
            .collect()
    }

    fn give(&mut self, i: usize, len: u32) {
        self.staged.push((self.held.remove(i).head, len));
    }

    fn batch(&self, _n: usize, _access: Access) -> Option<usize> {
        None
    }

    fn give_batch(&mut self, _n: usize, _last_len: u32) {
        unreachable!("they know no batches");
    }

    fn untake(&mut self, _n: usize) -> bool {
        false
    }

    fn publish(&mut self) -> bool {
        let any = !self.staged.is_empty();
        for (head, len) in self.staged.drain(..) {
            self.queue.add_used(&self.memory, head, len).unwrap();
        }
        any && self.queue.needs_notification(&self.memory).unwrap()
    }

    fn has_work(&self) -> bool {
        let found = self
            .queue
            .avail_idx(&self.memory, std::sync::atomic::Ordering::Acquire);
        found.unwrap().0 != self.queue.next_avail()
    }

    fn arm(&mut self) -> bool {
        self.queue.enable_notification(&self.memory).unwrap()
    }

    fn disarm(&mut self) {
        self.queue.disable_notification(&self.memory).unwrap();
    }

    fn restart(&mut self) {
        let (avail, used) = (self.queue.next_avail(), self.queue.next_used());
        self.queue.set_next_avail(avail);
        self.queue.set_next_used(used);
    }
}
