//! What packets leave to be done, done for a port that cannot be left with it: checksums and the cutting of long frames.

use virtnet_packet::{Burst, DropReason, Offload, Picks, Resolver};

use super::PortNode;
use super::giving::Giving;

/// Does for a port what packets leave to be done.
#[derive(Debug, Default)]
pub(super) struct Finisher {
    resolver: Resolver,
    finished: Burst,
}

impl Finisher {
    /// Sends what becomes of packet `i`; whether it was accepted. What of its segments finds no room behind the first is dropped.
    pub(super) fn send<G: Giving>(
        &mut self,
        node: &mut PortNode,
        giving: G,
        burst: &Burst,
        i: usize,
    ) -> bool {
        if self.resolver.take(burst, i).is_err() {
            giving.drop(&mut *node.port, DropReason::BadOffload, 1);
            return true;
        }
        let mut sent_before = 0;
        loop {
            self.finished.clear();
            while self.finished.room() > 0
                && let Some(frame) = self.resolver.next_frame()
            {
                self.finished.push_bytes(frame, Offload::default());
            }
            let n = self.finished.len();
            if n == 0 {
                return true;
            }
            let accepted = giving.give(&mut *node.port, &self.finished, &Picks::first(n));
            if accepted == 0 && sent_before == 0 {
                return false;
            }
            if accepted < n {
                giving.drop(&mut *node.port, DropReason::NoRoom, n - accepted);
            }
            // The packet itself is counted already.
            node.segmented += n as u64 - u64::from(sent_before == 0);
            sent_before += n;
        }
    }
}
