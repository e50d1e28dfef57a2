//! Whoever leaves takes everything along: a worker keeps nothing of a guest that has gone.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtnet_engine::{Change, NodeId, Place, Sink, Worker};
use virtnet_mem::GuestMemory;
use virtnet_packet::{Burst, DropReason, Offload, Picks, Port, PortCounters};

const PORT: NodeId = NodeId(1);
const SINK: NodeId = NodeId(2);

/// A guest that sends a frame in every breath until it leaves.
#[derive(Debug)]
struct Guest {
    memory: Option<Arc<GuestMemory>>,
    leaves: Arc<AtomicBool>,
    counters: PortCounters,
}

impl Port for Guest {
    fn sync(&mut self) -> bool {
        self.leaves.load(Ordering::Relaxed) && self.memory.take().is_some()
    }

    fn rx(&mut self, burst: &mut Burst) -> usize {
        let Some(memory) = &self.memory else {
            return 0;
        };
        burst.set_memory(memory);
        burst.push_bytes(&[0; 60], Offload::default());
        self.counters.received += 1;
        1
    }

    fn tx(&mut self, _: &Burst, _: &Picks) -> usize {
        0
    }

    fn drop_tx(&mut self, reason: DropReason, n: usize) {
        self.counters.tx_drops.add(reason, n);
    }

    fn counters(&self) -> PortCounters {
        self.counters
    }
}

/// A worker that has a guest, that guest's memory, and what makes it leave.
fn scene() -> (Worker, Arc<GuestMemory>, Arc<AtomicBool>) {
    let (memory, leaves) = (Arc::default(), Arc::default());
    let guest = Guest {
        memory: Some(Arc::clone(&memory)),
        leaves: Arc::clone(&leaves),
        counters: PortCounters::default(),
    };
    let change = Change::new()
        .add(PORT, guest)
        .add(SINK, Sink::default())
        .connect(PORT, Place::new(SINK, 0));
    let mut worker = Worker::new();
    worker.apply(change, 0).unwrap();
    assert_eq!(worker.step(0), 1);
    (worker, memory, leaves)
}

#[test]
fn a_worker_lets_go_of_the_memory_of_a_guest_that_leaves() {
    let (mut worker, memory, leaves) = scene();
    leaves.store(true, Ordering::Relaxed);
    assert_eq!(worker.step(0), 0);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn a_worker_lets_go_of_the_memory_of_a_port_that_is_removed() {
    let (mut worker, memory, _) = scene();
    drop(worker.apply(Change::new().remove(PORT), 0).unwrap());
    assert_eq!(Arc::strong_count(&memory), 1);
}
