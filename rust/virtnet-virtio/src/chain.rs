//! Chains taken from a queue: which buffers they describe, as a structure of arrays.

use std::fmt;

use virtnet_mem::{GuestSlice, Permission, Segment};

use crate::ChainError;

/// The most chains taken in one go.
pub const CHAINS_MAX: usize = 64;

/// The most descriptors of one chain that are followed, and of one table: more than any packet needs, and few enough that no
/// driver can keep a device busy for long with chains that cost it nothing.
pub const DESCS_MAX: u16 = 1024;

/// What the device may do with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Device-readable: a packet of the driver, on a transmitq.
    Read,
    /// Device-writable: room for a packet, on a receiveq.
    Write,
    /// Device-readable buffers, then device-writable ones: a request with room for its answer, on a control queue. Such chains are
    /// taken one at a time, because [`Chains::request`] knows of one.
    Request,
}

impl Access {
    /// What the device has to be allowed for that.
    #[must_use]
    #[inline(always)]
    pub fn permission(self) -> Permission {
        match self {
            // The buffers of a request that are written say so themselves.
            Self::Read | Self::Request => Permission::READ,
            Self::Write => Permission::WRITE,
        }
    }
}

/// The bytes of chains that are one plain buffer each, at the numbers that they have in [`Chains`]; of others, none.
#[derive(Debug)]
pub struct ChainBytes<'mem> {
    slices: [GuestSlice<'mem>; CHAINS_MAX],
    own_at: Option<usize>,
}

impl<'mem> ChainBytes<'mem> {
    /// None yet.
    #[must_use]
    #[inline(always)]
    pub fn new() -> Self {
        Self::owned_at(None)
    }

    /// None yet, and as they are found the line `own_at` bytes on in each is asked for, to be written: while descriptors are read
    /// there is time for that. Only for what the peer has handed over.
    #[must_use]
    #[inline(always)]
    pub fn owned_at(own_at: Option<usize>) -> Self {
        Self {
            slices: [GuestSlice::empty(); CHAINS_MAX],
            own_at,
        }
    }

    /// Each by its chain's number.
    #[must_use]
    #[inline(always)]
    pub fn as_slice(&self) -> &[GuestSlice<'mem>] {
        &self.slices
    }

    /// Those from chain `first` on, to say what they are.
    #[inline(always)]
    pub(crate) fn places_from(&mut self, first: usize) -> &mut [GuestSlice<'mem>] {
        self.slices.get_mut(first..).unwrap_or_default()
    }
}

impl Default for ChainBytes<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// Chains taken from a queue and not yet given back, in ring order.
pub struct Chains {
    n: usize,
    entries: [Entry; CHAINS_MAX],
    segments: Vec<Segment>,
    /// The last look ended at a chain whose place is not known yet.
    missed: bool,
    /// Where the device-writable segments of a request start, if it has any.
    answer_at: Option<usize>,
}

/// One chain: what the ring needs to give it back, and where its bytes are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Its only buffer, where it has just one: the usual case, kept in place.
    one: Segment,
    buffers: Buffers,
    /// Head descriptor (split) or buffer id (packed).
    pub(crate) id: u16,
    /// Ring slots it occupies: 1, or the number of its descriptors in a packed ring.
    pub(crate) slots: u16,
}

impl Entry {
    /// Its buffer, where it has just one: the usual case.
    #[inline(always)]
    pub(crate) fn only(&self) -> Option<Segment> {
        matches!(self.buffers, Buffers::One).then_some(self.one)
    }
}

#[derive(Clone, Copy, Debug)]
enum Buffers {
    One,
    /// A run of `segments`, and their sum in bytes.
    Many {
        first: u32,
        count: u32,
        len: u32,
    },
    Bad(ChainError),
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
    /// How many buffers there are in chains of several.
    #[inline]
    pub(crate) fn listed(&self) -> usize {
        self.segments.len()
    }

    /// No chains.
    #[must_use]
    pub fn new() -> Self {
        let none = Entry {
            one: Segment::default(),
            buffers: Buffers::One,
            id: 0,
            slots: 0,
        };
        Self {
            n: 0,
            entries: [none; CHAINS_MAX],
            segments: Vec::with_capacity(4 * CHAINS_MAX),
            missed: false,
            answer_at: None,
        }
    }

    /// Forgets all chains.
    #[inline]
    pub fn clear(&mut self) {
        self.n = 0;
        self.segments.clear();
        self.answer_at = None;
    }

    /// Whether the queue holds back a chain whose translation is missing.
    #[inline]
    #[must_use]
    pub fn has_missed(&self) -> bool {
        self.missed
    }

    /// Notes whether it does.
    pub(crate) fn set_missed(&mut self, missed: bool) {
        self.missed = missed;
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

    /// The buffers of chain `i`, in order; none for a chain that makes no sense.
    #[inline]
    #[must_use]
    pub fn segments(&self, i: usize) -> &[Segment] {
        let entry = &self.entries[i];
        match entry.buffers {
            Buffers::One => std::slice::from_ref(&entry.one),
            Buffers::Many { first, count, .. } => {
                let first = first as usize;
                self.segments
                    .get(first..first + count as usize)
                    .unwrap_or_default()
            }
            Buffers::Bad(_) => &[],
        }
    }

    /// The only chain, taken as [`Access::Request`]: its device-readable buffers, and its device-writable ones. Of a chain that makes no
    /// sense, none.
    #[must_use]
    pub fn request(&self) -> (&[Segment], &[Segment]) {
        let whole = if self.n == 1 { self.segments(0) } else { &[] };
        whole.split_at(self.answer_at.unwrap_or(whole.len()).min(whole.len()))
    }

    /// Notes a buffer of a request that is about to be pushed; whether it may stand there.
    pub(crate) fn request_buffer(&mut self, writable: bool) -> bool {
        if writable {
            self.answer_at.get_or_insert(self.segments.len());
        }
        writable || self.answer_at.is_none()
    }

    /// Bytes of chain `i`, or what is wrong with it.
    ///
    /// # Errors
    /// The chain's own error; it is to be given back with length 0.
    #[inline]
    pub fn bytes(&self, i: usize) -> Result<u32, ChainError> {
        let entry = &self.entries[i];
        match entry.buffers {
            Buffers::One => Ok(entry.one.len),
            Buffers::Many { len, .. } => Ok(len),
            Buffers::Bad(error) => Err(error),
        }
    }

    /// The chains themselves, in order.
    #[inline(always)]
    pub(crate) fn entries(&self) -> &[Entry] {
        self.entries.get(..self.n).unwrap_or_default()
    }

    /// Those from the `first` on.
    #[inline(always)]
    pub(crate) fn entries_from(&self, first: usize) -> &[Entry] {
        self.entries().get(first..).unwrap_or_default()
    }

    /// The same of the last `n` chains.
    #[inline]
    pub(crate) fn last(&self, n: usize) -> &[Entry] {
        let entries = self.entries();
        &entries[entries.len().saturating_sub(n)..]
    }

    /// Appends chains of one buffer in one slot: what `plain` says of `items`, an id and a buffer each, as long as it says something; how
    /// many. The buffer's bytes go where its chain's number says.
    #[inline(always)]
    pub(crate) fn push_plain<'mem, T>(
        &mut self,
        items: &[T],
        bytes: &mut ChainBytes<'mem>,
        mut plain: impl FnMut(&T) -> Option<(u16, (Segment, GuestSlice<'mem>))>,
    ) -> usize {
        let places = self.entries.get_mut(self.n..).unwrap_or_default();
        let own_at = bytes.own_at;
        let bytes = bytes.places_from(self.n);
        let mut n = 0;
        for ((place, bytes), item) in places.iter_mut().zip(bytes).zip(items) {
            let Some((id, (one, found))) = plain(item) else {
                break;
            };
            if let Some(offset) = own_at {
                found.prefetch_write_at(offset);
            }
            *place = Entry {
                one,
                buffers: Buffers::One,
                id,
                slots: 1,
            };
            *bytes = found;
            n += 1;
        }
        self.n += n;
        n
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
        let buffers = match walked {
            Ok(0) => Buffers::Bad(ChainError::Empty),
            Ok(len) => Buffers::Many {
                first,
                count: self.mark() - first,
                len,
            },
            Err(error) => Buffers::Bad(error),
        };
        if let Buffers::Bad(_) = buffers {
            self.segments.truncate(first as usize);
        }
        self.push(Entry {
            one: Segment::default(),
            buffers,
            id,
            slots,
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
        let popped = &self.entries[keep..self.n];
        let first = popped.iter().find_map(|entry| match entry.buffers {
            Buffers::Many { first, .. } => Some(first as usize),
            Buffers::One | Buffers::Bad(_) => None,
        });
        let slots = popped.iter().map(|entry| entry.slots).sum();
        if let Some(first) = first {
            self.segments.truncate(first);
        }
        self.n = keep;
        slots
    }
}
