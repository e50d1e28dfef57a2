//! Chains taken from a queue: which buffers they describe, as a structure of arrays.

use std::fmt;

use virtnet_mem::Segment;

use crate::ChainError;

/// The most chains taken in one go.
pub const CHAINS_MAX: usize = 64;

/// What the device may do with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Device-readable: a packet of the driver, on a transmitq.
    Read,
    /// Device-writable: room for a packet, on a receiveq.
    Write,
}

/// Chains taken from a queue and not yet given back, in ring order.
pub struct Chains {
    n: usize,
    entries: [Entry; CHAINS_MAX],
    segments: Vec<Segment>,
}

/// One chain: what the ring needs to give it back, and where its bytes are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Head descriptor (split) or buffer id (packed).
    pub(crate) id: u16,
    /// Ring slots it occupies: 1, or the number of its descriptors in a packed ring.
    pub(crate) slots: u16,
    first: u32,
    count: u32,
    /// Sum of its segments.
    len: u32,
    error: Option<ChainError>,
}

impl fmt::Debug for Chains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.entries[..self.n]).finish()
    }
}

impl Default for Chains {
    fn default() -> Self {
        Self::new()
    }
}

impl Chains {
    /// No chains.
    #[must_use]
    pub fn new() -> Self {
        let none = Entry {
            id: 0,
            slots: 0,
            first: 0,
            count: 0,
            len: 0,
            error: None,
        };
        Self {
            n: 0,
            entries: [none; CHAINS_MAX],
            segments: Vec::with_capacity(4 * CHAINS_MAX),
        }
    }

    /// Forgets all chains.
    #[inline]
    pub fn clear(&mut self) {
        self.n = 0;
        self.segments.clear();
    }

    /// How many chains there are.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there are none.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// How many more can be taken.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        CHAINS_MAX - self.n
    }

    /// The buffers of chain `i`, in order.
    #[inline]
    #[must_use]
    pub fn segments(&self, i: usize) -> &[Segment] {
        let Entry { first, count, .. } = self.entries[i];
        let first = first as usize;
        self.segments
            .get(first..first + count as usize)
            .unwrap_or_default()
    }

    /// Bytes of chain `i`, or what is wrong with it.
    ///
    /// # Errors
    /// The chain's own error; it is to be given back with length 0.
    #[inline]
    pub fn bytes(&self, i: usize) -> Result<u32, ChainError> {
        let entry = &self.entries[i];
        match entry.error {
            None => Ok(entry.len),
            Some(error) => Err(error),
        }
    }

    /// Id and ring slots of each chain, in order.
    #[inline]
    pub(crate) fn entry(&self, i: usize) -> &Entry {
        &self.entries[i]
    }

    /// Appends a chain of one buffer.
    #[inline]
    pub(crate) fn push_one(&mut self, id: u16, slots: u16, segment: Segment) {
        let first = self.mark();
        self.segments.push(segment);
        self.push(Entry {
            id,
            slots,
            first,
            count: 1,
            len: segment.len,
            error: None,
        });
    }

    /// Where the segments of the next chain will start.
    #[inline]
    pub(crate) fn mark(&self) -> u32 {
        u32::try_from(self.segments.len()).unwrap_or(u32::MAX)
    }

    /// Appends a segment of the chain that [`Self::close`] will end.
    #[inline]
    pub(crate) fn push_segment(&mut self, segment: Segment) {
        self.segments.push(segment);
    }

    /// Ends the chain whose segments were pushed since `first`; `walked` is its length or its error.
    pub(crate) fn close(
        &mut self,
        id: u16,
        slots: u16,
        first: u32,
        walked: Result<u32, ChainError>,
    ) {
        let walked = match walked {
            Ok(0) => Err(ChainError::Empty),
            other => other,
        };
        let (len, error) = match walked {
            Ok(len) => (len, None),
            Err(error) => {
                self.segments.truncate(first as usize);
                (0, Some(error))
            }
        };
        let count = self.mark() - first;
        self.push(Entry {
            id,
            slots,
            first,
            count,
            len,
            error,
        });
    }

    #[inline]
    fn push(&mut self, entry: Entry) {
        if let Some(slot) = self.entries.get_mut(self.n) {
            *slot = entry;
            self.n += 1;
        }
    }

    /// Forgets the last `n` chains; ring slots they occupied.
    pub(crate) fn pop(&mut self, n: usize) -> u16 {
        let keep = self.n - n.min(self.n);
        let slots = self.entries[keep..self.n].iter().map(|e| e.slots).sum();
        if let Some(entry) = self.entries.get(keep).filter(|_| keep < self.n) {
            self.segments.truncate(entry.first as usize);
        }
        self.n = keep;
        slots
    }
}
