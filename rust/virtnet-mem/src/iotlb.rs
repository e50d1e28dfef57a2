//! Translations of I/O addresses: what an IOMMU lets a device touch, as the device's front-end tells it.
//!
//! An [`Iotlb`] belongs to a [`GuestMemory`] and names pieces of its regions. A changed one is a new value, swapped in between bursts
//! together with its memory; so an address that was taken back cannot be used by anyone who has the new value.
//!
//! It is a sorted list. Neighbours that continue each other are one entry, and there are at most [`Iotlb::MAX_ENTRIES`]: a change costs
//! a search and a copy of the list, 64 KiB at most (a few microseconds, where the message that asks for it takes tens), and finding an
//! address is a look at the entry of the last one or a search.

use std::cell::RefCell;

use crate::{Extent, GuestAddr, GuestMemory, GuestSlice, MemoryError, Segment, UserAddr};

/// What a device may do with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Permission(u8);

impl Permission {
    /// Nothing: the address is known not to be for the device.
    pub const NONE: Self = Self(0);
    /// Read them.
    pub const READ: Self = Self(1);
    /// Write them.
    pub const WRITE: Self = Self(2);
    /// Both.
    pub const BOTH: Self = Self(3);

    /// The permission with these bits, 1 to read and 2 to write.
    #[must_use]
    pub fn from_bits(bits: u8) -> Option<Self> {
        (bits <= 3).then_some(Self(bits))
    }

    /// Its bits.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether everything that `wanted` allows is allowed.
    #[must_use]
    #[inline]
    pub fn allows(self, wanted: Self) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// An address that a device needs and has no translation for: the beginning of a page, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Miss {
    /// First address of the page.
    pub iova: u64,
    /// What the device wants to do there.
    pub wanted: Permission,
}

/// The translations that a device has been told.
#[derive(Clone, Debug, Default)]
pub struct Iotlb {
    /// By address, none over another.
    entries: Vec<Entry>,
}

/// So many bytes from an I/O address on, and where they are.
#[derive(Clone, Copy, Debug)]
struct Entry {
    first: u64,
    /// The last byte, so that the end of the address space can be one.
    last: u64,
    /// Bytes from the region's start.
    offset: u64,
    region: u32,
    permission: Permission,
}

impl Entry {
    /// The part of it from `first` to `last`, which lies within it.
    fn part(self, first: u64, last: u64) -> Self {
        Self {
            first,
            last,
            offset: self.offset.wrapping_add(first - self.first),
            ..self
        }
    }

    /// Whether `next` goes on where this one ends, in both spaces.
    fn is_continued_by(&self, next: &Self) -> bool {
        self.last.checked_add(1) == Some(next.first)
            && (self.region, self.permission) == (next.region, next.permission)
            && self.offset.wrapping_add(next.first - self.first) == next.offset
    }
}

impl Iotlb {
    /// The most entries there can be; what comes then displaces another one, which will be asked for again when it is needed.
    pub const MAX_ENTRIES: usize = 2048;

    /// The unit of what is asked for: the smallest page of an IOMMU.
    pub const PAGE: u64 = 4096;

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// Learns that `size` bytes at the I/O address `iova` are those at the front-end's `user` in `memory`, in place of what was known
    /// of them.
    ///
    /// # Errors
    /// [`MemoryError::EmptyRegion`], [`MemoryError::Overflow`]; [`MemoryError::NotMapped`] when some of them are in no region. Nothing
    /// has changed then.
    pub fn insert(
        &mut self,
        memory: &GuestMemory,
        iova: u64,
        size: u64,
        user: UserAddr,
        permission: Permission,
    ) -> Result<(), MemoryError> {
        let guest = GuestAddr(iova);
        let Some(reach) = size.checked_sub(1) else {
            return Err(MemoryError::EmptyRegion { guest });
        };
        if iova.checked_add(reach).is_none() || user.0.checked_add(reach).is_none() {
            return Err(MemoryError::Overflow { guest, size });
        }
        let (mut pieces, mut done) = (Vec::new(), 0);
        while done < size {
            let at = user.0 + done;
            let found = memory.regions().iter().zip(0..).find_map(|(region, n)| {
                let offset = at.wrapping_sub(region.user().0);
                (offset < region.size()).then(|| (n, offset, region.size() - offset))
            });
            let Some((region, offset, room)) = found else {
                return Err(MemoryError::NotMapped { addr: user, size });
            };
            let len = room.min(size - done);
            pieces.push(Entry {
                first: iova + done,
                last: iova + done + (len - 1),
                offset,
                region,
                permission,
            });
            done += len;
        }
        self.remove(iova, size);
        for piece in pieces {
            self.put(piece);
        }
        Ok(())
    }

    /// Learns that the device may not touch `size` bytes at `iova`, so that nobody asks for them again before
    /// [`Self::forget_refused`].
    pub fn refuse(&mut self, iova: u64, size: u64) {
        let Some(reach) = size.checked_sub(1) else {
            return;
        };
        self.remove(iova, size);
        self.put(Entry {
            first: iova,
            last: iova.saturating_add(reach),
            offset: 0,
            region: u32::MAX,
            permission: Permission::NONE,
        });
    }

    /// Forgets what was refused; whether there was anything.
    pub fn forget_refused(&mut self) -> bool {
        let before = self.len();
        self.entries
            .retain(|entry| entry.permission != Permission::NONE);
        self.len() < before
    }

    /// Forgets `size` bytes from `iova` on; all from there when `size` is 0 or reaches beyond the last address.
    pub fn remove(&mut self, iova: u64, size: u64) {
        let last = last_of(iova, size);
        let from = self.entries.partition_point(|entry| entry.last < iova);
        let to = self.entries.partition_point(|entry| entry.first <= last);
        let Some([begin, .., end]) = pair(self.entries.get(from..to)) else {
            return;
        };
        let before = (begin.first < iova).then(|| begin.part(begin.first, iova - 1));
        let behind = (end.last > last).then(|| end.part(last + 1, end.last));
        self.entries
            .splice(from..to, before.into_iter().chain(behind));
    }

    /// Whether any of `size` bytes at `iova` have been refused.
    #[must_use]
    pub fn is_refused(&self, iova: u64, size: u64) -> bool {
        let from = self.entries.partition_point(|entry| entry.last < iova);
        let last = last_of(iova, size.max(1));
        let overlapping = self
            .entries
            .iter()
            .skip(from)
            .take_while(|e| e.first <= last);
        overlapping
            .into_iter()
            .any(|entry| entry.permission == Permission::NONE)
    }

    /// The pages among `size` bytes at `iova` that the device may not do with what is `wanted`, and that may still be told.
    pub fn missing(
        &self,
        iova: u64,
        size: u64,
        wanted: Permission,
    ) -> impl Iterator<Item = Miss> + '_ {
        let (start, last) = (iova & !(Self::PAGE - 1), last_of(iova, size.max(1)));
        (start..=last)
            .step_by(Self::PAGE.try_into().unwrap_or(usize::MAX))
            .filter_map(move |page| {
                let known = self.at(page.max(iova), &mut 0);
                let known = known.map_or(Permission::NONE, |entry| match entry.permission {
                    // Refused: as if there were nothing to wish for.
                    Permission::NONE => wanted,
                    known => known,
                });
                // Together with what is known, or somebody else would miss that next.
                (!known.allows(wanted)).then_some(Miss {
                    iova: page,
                    wanted: Permission(known.0 | wanted.0),
                })
            })
    }

    /// Where the bytes are that begin at `iova`, as many as there are in one piece; `hint` remembers the entry of the last one.
    #[inline]
    fn at(&self, iova: u64, hint: &mut u32) -> Option<&Entry> {
        let covers = |entry: &&Entry| (entry.first..=entry.last).contains(&iova);
        if let Some(entry) = self.entries.get(*hint as usize).filter(covers) {
            return Some(entry);
        }
        let index = self.entries.partition_point(|entry| entry.last < iova);
        *hint = u32::try_from(index).unwrap_or(u32::MAX);
        self.entries.get(index).filter(covers)
    }

    /// Puts an entry into its place, where nothing is, and joins it with its neighbours.
    fn put(&mut self, mut entry: Entry) {
        let mut at = self.entries.partition_point(|e| e.last < entry.first);
        if let Some(next) = self.entries.get(at)
            && entry.is_continued_by(next)
        {
            entry.last = next.last;
            self.entries.remove(at);
        }
        if let Some(before) = at.checked_sub(1).and_then(|i| self.entries.get_mut(i))
            && before.is_continued_by(&entry)
        {
            before.last = entry.last;
            return;
        }
        if self.entries.len() >= Self::MAX_ENTRIES {
            // The one opposite: it is as good as any, and not the neighbour that is likely to be needed next.
            let victim = (at + Self::MAX_ENTRIES / 2) % Self::MAX_ENTRIES;
            self.entries.remove(victim);
            at -= usize::from(victim < at);
        }
        self.entries.insert(at, entry);
    }
}

/// The last of `size` bytes at `first`, or the last address.
fn last_of(first: u64, size: u64) -> u64 {
    match size.checked_sub(1) {
        Some(reach) => first.saturating_add(reach),
        None => u64::MAX,
    }
}

/// The first and the last of some entries.
fn pair(entries: Option<&[Entry]>) -> Option<[Entry; 2]> {
    let entries = entries?;
    Some([*entries.first()?, *entries.last()?])
}

/// Finds the bytes behind the addresses that descriptors carry.
pub trait Translate {
    /// Finds a buffer that is in one piece; `hint` remembers where the last one was.
    ///
    /// `None` when it is not: it may still be in several, see [`Self::translate_all`].
    fn translate(
        &self,
        addr: GuestAddr,
        len: u32,
        wanted: Permission,
        hint: &mut u32,
    ) -> Option<Segment>;

    /// Where to begin with [`Self::translate_near`], if `hint` says so.
    fn extent(&self, hint: u32) -> Extent<'_>;

    /// The same as [`Self::translate`] for buffers in a row, with their bytes: `near` is where the last one was.
    fn translate_near<'mem>(
        &'mem self,
        addr: GuestAddr,
        len: u32,
        wanted: Permission,
        hint: &mut u32,
        near: &mut Extent<'mem>,
    ) -> Option<(Segment, GuestSlice<'mem>)>;

    /// Finds a buffer piece by piece; false when the device may not touch all of it.
    fn translate_all(
        &self,
        addr: GuestAddr,
        len: u32,
        wanted: Permission,
        each: impl FnMut(Segment),
    ) -> bool;

    /// The memory that the pieces are pieces of.
    fn memory(&self) -> &GuestMemory;

    /// Whether a translation was missing that may still be told.
    fn has_missed(&self) -> bool;
}

/// Addresses are those of the guest's memory itself.
impl Translate for GuestMemory {
    #[inline(always)]
    fn translate(
        &self,
        addr: GuestAddr,
        len: u32,
        _: Permission,
        hint: &mut u32,
    ) -> Option<Segment> {
        self.translate(addr, len, hint)
    }

    #[inline(always)]
    fn extent(&self, hint: u32) -> Extent<'_> {
        self.extent(hint)
    }

    #[inline(always)]
    fn translate_near<'mem>(
        &'mem self,
        addr: GuestAddr,
        len: u32,
        _: Permission,
        hint: &mut u32,
        near: &mut Extent<'mem>,
    ) -> Option<(Segment, GuestSlice<'mem>)> {
        if let Some(found) = near.find(addr, len) {
            return Some(found);
        }
        self.look_elsewhere(addr, hint);
        *near = self.extent(*hint);
        near.find(addr, len)
    }

    #[inline]
    fn translate_all(
        &self,
        addr: GuestAddr,
        len: u32,
        _: Permission,
        each: impl FnMut(Segment),
    ) -> bool {
        self.translate_all(addr, len, each)
    }

    #[inline(always)]
    fn memory(&self) -> &GuestMemory {
        self
    }

    #[inline(always)]
    fn has_missed(&self) -> bool {
        false
    }
}

/// Addresses go through an IOMMU.
#[derive(Debug)]
pub struct Iommu<'a> {
    memory: &'a GuestMemory,
    iotlb: &'a Iotlb,
    misses: RefCell<Vec<Miss>>,
}

impl<'a> Iommu<'a> {
    /// Translates as `memory` has been told to, if it has.
    #[must_use]
    #[inline]
    pub fn of(memory: &'a GuestMemory) -> Option<Self> {
        Some(Self {
            memory,
            iotlb: memory.iotlb()?,
            misses: RefCell::default(),
        })
    }

    /// What was missing so far.
    #[must_use]
    pub fn into_misses(self) -> Vec<Miss> {
        self.misses.into_inner()
    }
}

impl Translate for Iommu<'_> {
    #[inline]
    fn translate(
        &self,
        addr: GuestAddr,
        len: u32,
        wanted: Permission,
        hint: &mut u32,
    ) -> Option<Segment> {
        let entry = self.iotlb.at(addr.0, hint)?;
        let is_whole = u64::from(len) <= (entry.last - addr.0).saturating_add(1);
        (is_whole && len > 0 && entry.permission.allows(wanted)).then(|| Segment {
            offset: crate::memory::to_usize(entry.offset + (addr.0 - entry.first)),
            len,
            region: entry.region,
        })
    }

    /// None: what may be done differs from page to page.
    #[inline]
    fn extent(&self, _: u32) -> Extent<'_> {
        Extent::none()
    }

    #[inline]
    fn translate_near<'mem>(
        &'mem self,
        addr: GuestAddr,
        len: u32,
        wanted: Permission,
        hint: &mut u32,
        _: &mut Extent<'mem>,
    ) -> Option<(Segment, GuestSlice<'mem>)> {
        let segment = self.translate(addr, len, wanted, hint)?;
        Some((segment, self.memory.slice(segment)))
    }

    fn translate_all(
        &self,
        addr: GuestAddr,
        len: u32,
        wanted: Permission,
        mut each: impl FnMut(Segment),
    ) -> bool {
        let (mut at, mut left, mut hint) = (addr.0, len, 0);
        if addr.0.checked_add(u64::from(len)).is_none() {
            return false;
        }
        while left > 0 {
            let entry = self.iotlb.at(at, &mut hint);
            let Some(entry) = entry.filter(|entry| entry.permission.allows(wanted)) else {
                // All that is missing of this buffer can be asked for at once, but for a buffer that is refused.
                let rest = u64::from(left).min(MISSES_PER_BUFFER * Iotlb::PAGE);
                if !self.iotlb.is_refused(at, rest) {
                    let missing = self.iotlb.missing(at, rest, wanted);
                    self.misses.borrow_mut().extend(missing);
                }
                return false;
            };
            let here = u32::try_from(entry.last - at)
                .unwrap_or(u32::MAX)
                .saturating_add(1)
                .min(left);
            each(Segment {
                offset: crate::memory::to_usize(entry.offset + (at - entry.first)),
                len: here,
                region: entry.region,
            });
            left -= here;
            at += u64::from(here);
        }
        true
    }

    #[inline]
    fn memory(&self) -> &GuestMemory {
        self.memory
    }

    #[inline]
    fn has_missed(&self) -> bool {
        !self.misses.borrow().is_empty()
    }
}

/// The most pages of one buffer that are asked for at once: more than the longest packet has.
const MISSES_PER_BUFFER: u64 = 20;

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "tests choose their numbers"
)]
mod tests {
    use super::*;
    use crate::Region;

    const BASE: u64 = 1 << 40;

    /// Two regions that follow each other in the front-end's addresses, of 64 pages each.
    fn memory() -> GuestMemory {
        let region = |n: u64| {
            let mut region = Region::anonymous(64 * 4096, GuestAddr(n << 32)).unwrap();
            region.user = UserAddr(BASE + n * 64 * 4096);
            region
        };
        GuestMemory::new(vec![region(0), region(1)]).unwrap()
    }

    fn user(page: u64) -> UserAddr {
        UserAddr(BASE + page * 4096)
    }

    /// Where each byte of some pages is, as `(region, offset)` and permission; looked up the slow way.
    fn lookup(iotlb: &Iotlb, iova: u64) -> Option<(u32, u64, u8)> {
        iotlb
            .at(iova, &mut 7)
            .map(|e| (e.region, e.offset + (iova - e.first), e.permission.bits()))
    }

    #[test]
    fn neighbours_that_continue_each_other_are_one_entry() {
        let memory = memory();
        let mut iotlb = Iotlb::default();
        for page in [5, 3, 4, 0, 1, 2, 6] {
            iotlb
                .insert(&memory, page * 4096, 4096, user(page), Permission::BOTH)
                .unwrap();
        }
        assert_eq!(iotlb.len(), 1);
        iotlb
            .insert(&memory, 7 * 4096, 4096, user(9), Permission::BOTH)
            .unwrap();
        iotlb
            .insert(&memory, 8 * 4096, 4096, user(10), Permission::READ)
            .unwrap();
        assert_eq!(iotlb.len(), 3, "another place, another permission");
        iotlb.remove(3 * 4096 + 5, 10);
        assert_eq!(iotlb.len(), 4);
        assert_eq!(lookup(&iotlb, 3 * 4096 + 4), Some((0, 3 * 4096 + 4, 3)));
        assert_eq!(lookup(&iotlb, 3 * 4096 + 5), None);
        assert_eq!(lookup(&iotlb, 3 * 4096 + 15), Some((0, 3 * 4096 + 15, 3)));
    }

    #[test]
    fn what_is_told_last_holds_whatever_it_lies_over() {
        let memory = memory();
        // Seeded: the same mixture each time.
        let mut seed = 7_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        let (mut iotlb, mut model) = (Iotlb::default(), [None; 80]);
        for _ in 0..20_000 {
            let (at, n) = (random(64), 1 + random(16));
            let pages = at as usize..(at + n) as usize;
            match random(4) {
                0 => {
                    iotlb.remove(at * 4096, n * 4096);
                    model[pages].fill(None);
                }
                1 => {
                    iotlb.refuse(at * 4096, n * 4096);
                    model[pages].fill(Some((u32::MAX, 0, 0)));
                }
                _ => {
                    let (to, bits) = (random(128 - n), 1 + random(3) as u8);
                    let permission = Permission::from_bits(bits).unwrap();
                    iotlb
                        .insert(&memory, at * 4096, n * 4096, user(to), permission)
                        .unwrap();
                    for (k, page) in pages.enumerate() {
                        let to = to + k as u64;
                        model[page] = Some(((to / 64) as u32, to % 64 * 4096, bits));
                    }
                }
            }
            for (page, expected) in model.iter().enumerate() {
                let found = lookup(&iotlb, page as u64 * 4096);
                let found =
                    found.map(|(r, o, p)| if r == u32::MAX { (r, 0, p) } else { (r, o, p) });
                assert_eq!(found, *expected, "page {page}");
            }
            assert!(iotlb.entries.windows(2).all(|e| e[0].last < e[1].first));
        }
    }

    #[test]
    fn tb84_translations_that_make_no_sense_change_nothing() {
        let memory = memory();
        let mut iotlb = Iotlb::default();
        iotlb
            .insert(&memory, 0, 4096, user(0), Permission::BOTH)
            .unwrap();
        let mut put = |iova, size, to: u64| {
            let error = iotlb
                .insert(&memory, iova, size, UserAddr(to), Permission::BOTH)
                .unwrap_err();
            assert_eq!(lookup(&iotlb, 0), Some((0, 0, 3)));
            error
        };
        assert!(matches!(put(0, 0, BASE), MemoryError::EmptyRegion { .. }));
        assert!(matches!(
            put(u64::MAX, 2, BASE),
            MemoryError::Overflow { .. }
        ));
        assert!(matches!(
            put(0, 4096, u64::MAX - 10),
            MemoryError::Overflow { .. }
        ));
        for (size, to) in [
            (4096, 0),
            (4096, BASE - 1),
            (129 * 4096, BASE),
            (u64::MAX, BASE),
        ] {
            let error = put(0, size, to);
            assert!(
                matches!(
                    error,
                    MemoryError::NotMapped { .. } | MemoryError::Overflow { .. }
                ),
                "{error}"
            );
        }
        iotlb
            .insert(&memory, u64::MAX - 4095, 4096, user(1), Permission::READ)
            .unwrap();
        assert_eq!(lookup(&iotlb, u64::MAX), Some((0, 2 * 4096 - 1, 1)));
        iotlb.remove(4096, 0);
        assert_eq!(iotlb.len(), 1, "no size means all from there");
        iotlb.remove(0, u64::MAX);
        assert!(iotlb.is_empty());
    }

    #[test]
    fn tb84_the_list_does_not_grow_without_end() {
        let memory = memory();
        let mut iotlb = Iotlb::default();
        for n in 0..100_000_u64 {
            // Never continued: every other page.
            let iova = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) & !0x1fff;
            iotlb
                .insert(&memory, iova, 4096, user(n % 128), Permission::BOTH)
                .unwrap();
            assert!(lookup(&iotlb, iova).is_some(), "the newest is there");
        }
        assert_eq!(iotlb.len(), Iotlb::MAX_ENTRIES);
    }

    #[test]
    fn a_buffer_is_found_in_as_many_pieces_as_it_has() {
        let memory = memory();
        let mut iotlb = Iotlb::default();
        for (page, to) in [(0, 9), (1, 3), (2, 64)] {
            iotlb
                .insert(&memory, page * 4096, 4096, user(to), Permission::READ)
                .unwrap();
        }
        let memory = memory.translated(iotlb);
        let iommu = Iommu::of(&memory).unwrap();
        let mut pieces = Vec::new();
        let each = |s: Segment| pieces.push((s.region, s.offset, s.len));
        assert!(iommu.translate_all(GuestAddr(100), 3 * 4096 - 200, Permission::READ, each));
        assert_eq!(
            pieces,
            [(0, 9 * 4096 + 100, 3996), (0, 3 * 4096, 4096), (1, 0, 3996)]
        );
        let mut hint = 0;
        let mut one = |at, len, wanted| iommu.translate(GuestAddr(at), len, wanted, &mut hint);
        assert_eq!(one(4096, 4097, Permission::READ), None);
        assert_eq!(one(4096, 4096, Permission::WRITE), None);
        assert_eq!(one(4096, 4096, Permission::READ).unwrap().offset, 3 * 4096);
        assert!(!iommu.has_missed());
    }

    #[test]
    fn what_is_missing_is_named_by_pages_once_and_not_where_it_was_refused() {
        let memory = memory();
        let mut iotlb = Iotlb::default();
        iotlb
            .insert(&memory, 4096, 4096, user(0), Permission::READ)
            .unwrap();
        iotlb.refuse(1 << 30, 4096);
        let memory = memory.translated(iotlb);
        let missing = |at: u64, len, wanted| {
            let iommu = Iommu::of(&memory).unwrap();
            assert!(!iommu.translate_all(GuestAddr(at), len, wanted, |_| {}));
            let misses = iommu.into_misses();
            let pair = |miss: &Miss| (miss.iova, miss.wanted.bits());
            misses.iter().map(pair).collect::<Vec<_>>()
        };
        let three = [(0, 1), (8192, 1), (12288, 1)];
        assert_eq!(missing(100, 3 * 4096, Permission::READ), three);
        let both = [(4096, 3)];
        assert_eq!(
            missing(4100, 100, Permission::WRITE),
            both,
            "what is known as well"
        );
        assert!(missing(1 << 30, 100, Permission::READ).is_empty());
        assert!(missing(u64::MAX - 5, 100, Permission::READ).is_empty());
        let most = missing(1 << 40, u32::MAX, Permission::WRITE);
        assert_eq!(most.len(), 20);
    }
}
