//! Packets that move together: private heads, bodies in place, in arrays made once.

mod tag;
mod trim;

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtnet_mem::{Gather, GuestMemory, GuestSlice, Segment};

use crate::{Offload, Offloads, PacketHash};

pub use tag::{TAG_LEN, tag_of};

/// The most packets in a burst.
pub const BURST_MAX: usize = 64;

/// The most bytes of a frame that are private to the burst; the rest is its body.
pub const HEAD_MAX: usize = 192;
const HEAD_MAX_U32: u32 = 192;

/// A cache line.
const LINE: usize = 64;

/// A head's row. Rows are whole lines, so that neighbours never share one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Row([u8; HEAD_MAX]);

/// What is known of a packet beside its head: half a line, written once.
#[derive(Clone, Copy, Default)]
struct Meta {
    frame_len: u32,
    offload: Offload,
    body: Body,
}

/// Where the bytes behind a head are, as one segment that may mean something else: see [`Place`].
#[derive(Clone, Copy, Default)]
struct Body(Segment);

/// What a [`Body`] says.
enum Place {
    /// There are none.
    Nowhere,
    /// In one piece, of the sender's memory or the burst's own: the usual case.
    One(Segment),
    /// In several: a run of `segments`.
    Run { first: u32, count: u32 },
}

impl Body {
    /// A segment of `count` bytes from `first` on in the region [`RUN`] is a run of segments.
    fn run(first: u32, count: u32) -> Self {
        Self(Segment {
            offset: first as usize,
            len: count,
            region: RUN,
        })
    }

    #[inline(always)]
    fn place(self) -> Place {
        match self.0 {
            Segment {
                offset,
                len: count,
                region: RUN,
            } => Place::Run {
                first: len_u32(offset),
                count,
            },
            Segment { len: 0, .. } => Place::Nowhere,
            one => Place::One(one),
        }
    }
}

/// A region number that says: not bytes, but segments.
const RUN: u32 = u32::MAX - 1;

/// A region number that says: the burst's own bytes.
const OWN: u32 = u32::MAX;

/// Up to [`BURST_MAX`] packets from one source.
///
/// A head is a private copy, valid until [`clear`](Self::clear). A body may lie in the memory of the peer that sent it, which
/// can garble it (its own bytes and nothing else); it is valid until the port it came from completes the burst.
pub struct Burst {
    n: usize,
    rows: Box<[Row; BURST_MAX]>,
    metas: [Meta; BURST_MAX],
    segments: Vec<Segment>,
    memory: Option<Arc<GuestMemory>>,
    /// Bodies of the burst's own: of these bytes, so many. They stay when the burst is cleared, so that room for the next ones is
    /// there without being written first.
    own: Vec<u8>,
    own_len: usize,
    /// What its bodies are called as long as they stay what they are; 0: they may change.
    lasting: u64,
    /// Heads and offload metadata stay what they are, too.
    heads_last: bool,
    /// What the packets in it, or some that were, leave to be done.
    needs: Offloads,
    /// Hashes that packets came with, up to the last that did.
    hashes: Vec<PacketHash>,
}

impl Default for Burst {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Burst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Burst({} packets)", self.n)
    }
}

impl Burst {
    /// An empty burst. Allocates all it needs for ordinary traffic once.
    #[must_use]
    pub fn new() -> Self {
        Self {
            n: 0,
            rows: Box::new([Row([0; HEAD_MAX]); BURST_MAX]),
            metas: [Meta::default(); BURST_MAX],
            segments: Vec::with_capacity(BURST_MAX * 4),
            memory: None,
            own: Vec::new(),
            own_len: 0,
            lasting: 0,
            heads_last: false,
            needs: Offloads::NONE,
            hashes: Vec::new(),
        }
    }

    /// Takes all packets out. Keeps the room that was allocated.
    pub fn clear(&mut self) {
        self.n = 0;
        self.segments.clear();
        self.own_len = 0;
        self.lasting = 0;
        self.heads_last = false;
        self.needs = Offloads::NONE;
        self.hashes.clear();
    }

    /// Lets go of the memory that bodies lay in, if it is empty. [`clear`](Self::clear) does not, because most bursts come from the
    /// same memory as the one before; to be called when that may be gone.
    pub fn forget_memory(&mut self) {
        if self.is_empty() {
            self.memory = None;
        }
    }

    /// Says that the bodies in it stay what they are until it is cleared: each has a name then that no other body has.
    pub fn keep_bodies(&mut self) {
        static LAST: AtomicU64 = AtomicU64::new(0);
        self.lasting = 1 + LAST.fetch_add(1, Ordering::Relaxed);
        self.heads_last = false;
    }

    /// The same of whole packets, until one of them is changed.
    pub fn keep_packets(&mut self) {
        self.keep_bodies();
        self.heads_last = true;
    }

    /// The name of the body of packet `i`, if it is one that lasts: whoever has a body of this name has the same bytes.
    #[inline]
    #[must_use]
    pub fn lasting_body(&self, i: usize) -> Option<NonZeroU64> {
        let name = self.lasting * BURST_MAX as u64;
        NonZeroU64::new(name).map(|name| name.saturating_add(i as u64))
    }

    /// Whether whole packets last.
    #[inline(always)]
    #[must_use]
    pub fn packets_last(&self) -> bool {
        self.heads_last
    }

    /// The same name, if head and offload metadata last as well: whoever has a packet of this name need not look at this one.
    #[inline(always)]
    #[must_use]
    pub fn lasting_packet(&self, i: usize) -> Option<NonZeroU64> {
        if self.heads_last {
            self.lasting_body(i)
        } else {
            None
        }
    }

    /// How many packets there are.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there are no packets.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// How many packets more it can take.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        BURST_MAX - self.n
    }

    /// Length of frame `i` in bytes.
    #[inline]
    #[must_use]
    pub fn frame_len(&self, i: usize) -> usize {
        self.metas[i].frame_len as usize
    }

    /// The private first bytes of frame `i`: the whole frame, or [`HEAD_MAX`] bytes of a longer one.
    #[inline]
    #[must_use]
    pub fn head(&self, i: usize) -> &[u8] {
        &self.rows[i].0[..self.frame_len(i).min(HEAD_MAX)]
    }

    /// The same, to change: what is written here is what leaves.
    #[inline]
    pub fn head_mut(&mut self, i: usize) -> &mut [u8] {
        self.heads_last = false;
        let len = self.frame_len(i).min(HEAD_MAX);
        &mut self.rows[i].0[..len]
    }

    /// Offload metadata of packet `i`.
    #[inline]
    #[must_use]
    pub fn offload(&self, i: usize) -> Offload {
        self.metas[i].offload
    }

    /// Changes the offload metadata of packet `i`.
    #[inline]
    pub fn set_offload(&mut self, i: usize, offload: Offload) {
        self.heads_last = false;
        self.metas[i].offload = offload;
        self.needs |= offload.into();
    }

    /// The hash that packet `i` came with; where it came with none, that says so.
    #[inline]
    #[must_use]
    pub fn hash(&self, i: usize) -> PacketHash {
        self.hashes.get(i).copied().unwrap_or_default()
    }

    /// Says which hash packet `i` came with.
    pub fn set_hash(&mut self, i: usize, hash: PacketHash) {
        if self.hashes.len() <= i {
            self.hashes.resize(i + 1, PacketHash::default());
        }
        self.hashes[i] = hash;
    }

    /// What its packets leave to be done, all together: a receiver that can be left with all of it can be given any of them.
    #[inline]
    #[must_use]
    pub fn needs(&self) -> Offloads {
        self.needs
    }

    /// Says whose memory the segments given to [`push_guest`](Self::push_guest) belong to: one memory for all of a burst.
    #[inline]
    pub fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        if !self
            .memory
            .as_ref()
            .is_some_and(|held| Arc::ptr_eq(held, memory))
        {
            debug_assert!(self.is_empty(), "a burst has one source");
            self.memory = Some(Arc::clone(memory));
        }
    }

    /// Appends a frame that lies in one run of the memory of [`set_memory`](Self::set_memory), given as its bytes and by name: its
    /// head is copied now, its body stays.
    ///
    /// # Panics
    /// When the burst is full, which is a caller's defect.
    #[inline(always)]
    pub fn push_guest(&mut self, bytes: GuestSlice<'_>, frame: Segment, offload: Offload) {
        self.push_guest_named(bytes, || frame, offload);
    }

    /// The same for a frame whose name is asked for only if it is a long one.
    ///
    /// # Panics
    /// When the burst is full, which is a caller's defect.
    #[inline(always)]
    pub fn push_guest_named(
        &mut self,
        bytes: GuestSlice<'_>,
        frame: impl FnOnce() -> Segment,
        offload: Offload,
    ) {
        let row = &mut self.rows[self.n].0;
        // A whole row is moves in line, whatever is shorter a choice among copies.
        if !bytes.copy_whole(row) {
            bytes.copy_to(row);
        }
        let at = self.n;
        self.finish_push(len_u32(bytes.len()), offload, Body::default());
        if bytes.len() > HEAD_MAX {
            self.metas[at].body = Body(frame().skip(HEAD_MAX_U32));
        }
    }

    /// Appends a frame that lies in several runs of the memory of [`set_memory`](Self::set_memory), `frame_len` bytes together.
    ///
    /// # Panics
    /// When the burst is full, which is a caller's defect.
    #[inline(never)]
    pub fn push_guest_runs(
        &mut self,
        memory: &GuestMemory,
        runs: impl Iterator<Item = Segment>,
        frame_len: u32,
        offload: Offload,
    ) {
        let row = &mut self.rows[self.n].0;
        let first = self.segments.len();
        let mut filled = 0;
        for run in runs {
            let taken = memory.slice(run).copy_to(&mut row[filled..]);
            filled += taken;
            let rest = run.skip(len_u32(taken));
            if rest.len > 0 {
                self.segments.push(rest);
            }
        }
        let body = Body::run(len_u32(first), len_u32(self.segments.len() - first));
        self.finish_push(frame_len, offload, body);
    }

    /// Appends a frame given as bytes; the burst keeps a copy.
    ///
    /// # Panics
    /// When the burst is full, which is a caller's defect.
    #[inline]
    pub fn push_bytes(&mut self, frame: &[u8], offload: Offload) {
        match self.rows[self.n].0.get_mut(..frame.len()) {
            Some(room) => {
                room.copy_from_slice(frame);
                self.finish_push(len_u32(frame.len()), offload, Body::default());
            }
            None => self.push_long_bytes(frame, offload),
        }
    }

    #[inline(never)]
    fn push_long_bytes(&mut self, frame: &[u8], offload: Offload) {
        let (head, rest) = frame.split_at(HEAD_MAX);
        self.rows[self.n].0.copy_from_slice(head);
        let body = self.own_body(rest.len(), |own| own.copy_from_slice(rest));
        self.finish_push(len_u32(frame.len()), offload, body);
    }

    /// Appends a copy of packet `i` of another burst, body and all.
    ///
    /// # Panics
    /// When the burst is full, which is a caller's defect.
    pub fn push_copy(&mut self, from: &Self, i: usize) {
        // Another worker fetches these lines: of a short frame, one.
        let (row, head) = (&mut self.rows[self.n].0, &from.rows[i].0);
        match from.frame_len(i) {
            0..=LINE => row[..LINE].copy_from_slice(&head[..LINE]),
            _ => *row = *head,
        }
        let body = self.own_body(from.frame_len(i) - from.head(i).len(), |own| {
            from.copy_body(i, own);
        });
        self.finish_push(from.metas[i].frame_len, from.metas[i].offload, body);
        if !from.hashes.is_empty() {
            self.set_hash(self.n - 1, from.hash(i));
        }
    }

    /// Makes room for a body of `len` bytes of the burst's own and has it filled.
    fn own_body(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> Body {
        if len == 0 {
            return Body::default();
        }
        Body(self.own_segment(len, fill))
    }

    /// The same, by name.
    fn own_segment(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> Segment {
        fill(self.own_room(len));
        let offset = self.own_len;
        self.own_len += len;
        Segment {
            offset,
            len: len_u32(len),
            region: OWN,
        }
    }

    /// Room for `len` bytes in the burst, to read a frame into that [`push_read`](Self::push_read) appends. What stands there is left over.
    #[inline]
    pub fn own_room(&mut self, len: usize) -> &mut [u8] {
        let end = self.own_len + len;
        if self.own.len() < end {
            self.own.resize(end, 0);
        }
        &mut self.own[self.own_len..end]
    }

    /// Appends the frame that stands in [`own_room`](Self::own_room) behind `skip` bytes of something else; its body stays there.
    ///
    /// # Panics
    /// When the burst is full, which is a caller's defect, or the frame not inside of the room.
    #[inline]
    pub fn push_read(&mut self, skip: usize, frame_len: usize, offload: Offload) {
        let start = self.own_len + skip;
        let head = frame_len.min(HEAD_MAX);
        self.rows[self.n].0[..head].copy_from_slice(&self.own[start..start + head]);
        let body = if frame_len > head {
            self.own_len = start + frame_len;
            Body(Segment {
                offset: start + head,
                len: len_u32(frame_len - head),
                region: OWN,
            })
        } else {
            Body::default()
        };
        self.finish_push(len_u32(frame_len), offload, body);
    }

    #[inline(always)]
    fn finish_push(&mut self, frame_len: u32, offload: Offload, body: Body) {
        if !offload.is_plain() {
            self.needs |= offload.into();
        }
        self.metas[self.n] = Meta {
            frame_len,
            offload,
            body,
        };
        self.n += 1;
    }

    /// Copies frame `i` into `dst`, as much of it as fits; how many bytes.
    #[inline]
    pub fn copy_frame(&self, i: usize, dst: &mut [u8]) -> usize {
        if self.frame_len(i) > HEAD_MAX && dst.len() >= HEAD_MAX {
            return self.copy_frame_loosely(i, dst);
        }
        let head = self.head(i);
        let n = head.len().min(dst.len());
        dst[..n].copy_from_slice(&head[..n]);
        n + self.copy_body(i, &mut dst[n..])
    }

    /// The same for a `dst` that is written from front to back: behind a short frame, up to [`HEAD_MAX`] bytes of it change too. So
    /// a head is moves in line, which a length that only the frame knows is not: the call was 7 % of the samples of receiving short ones.
    #[inline]
    pub fn copy_frame_loosely(&self, i: usize, dst: &mut [u8]) -> usize {
        let (len, row) = (self.frame_len(i), &self.rows[i].0);
        if let (..=LINE, Some(room), Some(line)) = (len, dst.first_chunk_mut(), row.first_chunk()) {
            let (room, line): (&mut [u8; LINE], _) = (room, line);
            *room = *line;
            return len;
        }
        match dst.split_first_chunk_mut() {
            Some((room, rest)) => {
                *room = *row;
                if len <= HEAD_MAX {
                    return len;
                }
                HEAD_MAX + self.copy_body(i, rest)
            }
            None => self.copy_frame(i, dst),
        }
    }

    /// Copies frame `i` into guest memory, as much of it as fits.
    #[inline(always)]
    pub fn copy_frame_to_guest(&self, i: usize, dst: &GuestSlice<'_>) {
        if self.frame_len(i) > HEAD_MAX {
            return self.copy_long_frame_to_guest(i, *dst);
        }
        dst.copy_from(self.head(i));
    }

    /// The same for a frame with a body.
    #[inline(never)]
    fn copy_long_frame_to_guest(&self, i: usize, dst: GuestSlice<'_>) {
        let head = &self.rows[i].0;
        if !dst.copy_whole_from(head) {
            dst.copy_from(head);
            return;
        }
        let rest = dst.split_at(HEAD_MAX).1;
        match self.metas[i].body.place() {
            Place::One(only) => {
                self.copy_segment_to_guest(only, &rest);
            }
            _ => self.copy_run_to_guest(i, rest),
        }
    }

    /// The same of a body in several pieces, with no head.
    #[inline(never)]
    fn copy_run_to_guest(&self, i: usize, mut rest: GuestSlice<'_>) {
        for &segment in self.body_segments(i) {
            let written = self.copy_segment_to_guest(segment, &rest);
            rest = rest.split_at(written).1;
        }
    }

    // Not by way of a `Piece`, which is two copy routines to choose from twice.

    #[inline(always)]
    fn copy_segment_to_guest(&self, segment: Segment, dst: &GuestSlice<'_>) -> usize {
        match self.memory.as_deref() {
            Some(memory) if segment.region != OWN => memory.slice(segment).copy_to_guest(dst),
            _ => dst.copy_from(self.own_bytes(segment)),
        }
    }

    #[inline(always)]
    fn copy_segment(&self, segment: Segment, dst: &mut [u8]) -> usize {
        match self.memory.as_deref() {
            Some(memory) if segment.region != OWN => memory.slice(segment).copy_to(dst),
            _ => {
                let bytes = self.own_bytes(segment);
                let n = bytes.len().min(dst.len());
                dst[..n].copy_from_slice(&bytes[..n]);
                n
            }
        }
    }

    /// Names the bytes of frame `i` for a system call; false when there are more pieces than one takes.
    #[must_use]
    pub fn gather_frame<'a>(&'a self, i: usize, gather: &mut Gather<'a>) -> bool {
        gather.push(self.head(i))
            && self.body(i).all(|piece| match piece {
                Piece::Own(bytes) => gather.push(bytes),
                Piece::Guest(slice) => gather.push_guest(slice),
            })
    }

    #[inline]
    fn copy_body(&self, i: usize, dst: &mut [u8]) -> usize {
        if let Place::One(only) = self.metas[i].body.place() {
            return self.copy_segment(only, dst);
        }
        self.copy_run(i, dst)
    }

    /// The same of one in several pieces.
    #[inline(never)]
    fn copy_run(&self, i: usize, dst: &mut [u8]) -> usize {
        let mut at = 0;
        for &segment in self.body_segments(i) {
            at += self.copy_segment(segment, &mut dst[at..]);
        }
        at
    }

    /// The pieces of frame `i` behind its head, in order.
    #[inline]
    pub fn body(&self, i: usize) -> impl Iterator<Item = Piece<'_>> {
        let segments = self.body_segments(i).iter();
        segments.map(|&segment| self.piece(segment))
    }

    #[inline]
    fn body_segments(&self, i: usize) -> &[Segment] {
        let body = &self.metas[i].body;
        match body.place() {
            Place::Nowhere => &[],
            Place::One(_) => std::slice::from_ref(&body.0),
            Place::Run { first, count } => {
                let first = first as usize;
                let run = self.segments.get(first..first + count as usize);
                run.unwrap_or_default()
            }
        }
    }

    /// Makes the body of packet `i` a run of `segments`, whatever it was; the first of them, and how many there are.
    fn body_as_run(&mut self, i: usize) -> (u32, u32) {
        let end = len_u32(self.segments.len());
        let (first, count) = match self.metas[i].body.place() {
            Place::Nowhere => (end, 0),
            Place::One(only) => {
                self.segments.push(only);
                (end, 1)
            }
            Place::Run { first, count } => (first, count),
        };
        self.metas[i].body = Body::run(first, count);
        (first, count)
    }

    /// A piece of the burst's own.
    #[inline]
    fn own_bytes(&self, segment: Segment) -> &[u8] {
        let start = segment.offset;
        self.own
            .get(start..start + segment.len as usize)
            .unwrap_or_default()
    }

    #[inline]
    fn piece(&self, segment: Segment) -> Piece<'_> {
        if segment.region == OWN {
            return Piece::Own(self.own_bytes(segment));
        }
        Piece::Guest(
            self.memory
                .as_deref()
                .map_or_else(GuestSlice::empty, |memory| memory.slice(segment)),
        )
    }
}

/// A run of body bytes: of the burst, or still in the memory of the peer that sent them.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'burst> {
    /// Bytes of the burst.
    Own(&'burst [u8]),
    /// Bytes of a peer, which may change under us.
    Guest(GuestSlice<'burst>),
}

impl Piece<'_> {
    /// Length in bytes.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        match self {
            Self::Own(bytes) => bytes.len(),
            Self::Guest(slice) => slice.len(),
        }
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the first bytes to `dst`, as many as both have; how many.
    #[inline]
    pub fn copy_to(&self, dst: &mut [u8]) -> usize {
        match self {
            Self::Own(bytes) => {
                let n = bytes.len().min(dst.len());
                dst[..n].copy_from_slice(&bytes[..n]);
                n
            }
            Self::Guest(slice) => slice.copy_to(dst),
        }
    }

    /// Copies the first bytes into guest memory, as many as both have; how many.
    #[inline]
    pub fn copy_to_guest(&self, dst: &GuestSlice<'_>) -> usize {
        match self {
            Self::Own(bytes) => dst.copy_from(bytes),
            Self::Guest(slice) => slice.copy_to_guest(dst),
        }
    }

    /// The piece without its first `n` bytes.
    #[inline]
    #[must_use]
    pub fn skip(self, n: usize) -> Self {
        match self {
            Self::Own(bytes) => Self::Own(bytes.get(n..).unwrap_or_default()),
            Self::Guest(slice) => Self::Guest(slice.split_at(n).1),
        }
    }
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Some packets of a burst, in order.
#[derive(Clone, Copy)]
pub struct Picks {
    n: usize,
    indexes: [u8; BURST_MAX],
}

impl Default for Picks {
    fn default() -> Self {
        Self {
            n: 0,
            indexes: [0; BURST_MAX],
        }
    }
}

impl fmt::Debug for Picks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Picks {
    /// The first `n` packets.
    #[must_use]
    pub fn first(n: usize) -> Self {
        let mut picks = Self::default();
        for i in 0..n.min(BURST_MAX) {
            picks.push(i);
        }
        picks
    }

    /// Appends packet `i`. More than [`BURST_MAX`] are not kept.
    #[inline]
    pub fn push(&mut self, i: usize) {
        if let Some(slot) = self.indexes.get_mut(self.n) {
            *slot = u8::try_from(i % BURST_MAX).unwrap_or_default();
            self.n += 1;
        }
    }

    /// Takes all out.
    #[inline]
    pub fn clear(&mut self) {
        self.n = 0;
    }

    /// How many packets are picked.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether none is picked.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// The `k`-th packet picked.
    #[inline]
    #[must_use]
    pub fn get(&self, k: usize) -> usize {
        usize::from(self.indexes[k]) % BURST_MAX
    }

    /// The packets picked, in order.
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.iter_from(0)
    }

    /// Those from the `k`-th on. (Skipped in an iterator, they would make every loop over them a slow one.)
    #[inline(always)]
    pub fn iter_from(&self, k: usize) -> impl Iterator<Item = usize> + Clone + '_ {
        let indexes = self.indexes.get(k..self.n).unwrap_or_default();
        indexes.iter().map(|&i| usize::from(i) % BURST_MAX)
    }

    /// The picks without the first `k`.
    #[must_use]
    pub fn skip(&self, k: usize) -> Self {
        let mut rest = Self::default();
        self.iter().skip(k).for_each(|i| rest.push(i));
        rest
    }
}
