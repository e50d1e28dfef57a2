//! VLAN tags of packets in a burst: looked at, put in, taken out, wherever a body lies.
//!
//! A tag stands in the private head, so the body is left alone but for the bytes at the border between the two: what a tag moves
//! out of the head becomes bytes of the burst's own, and what moves in is copied from the body. Spec: IEEE 802.1Q-2022, 9.

use super::{Body, Burst, HEAD_MAX, len_u32};
use crate::Offload;

/// Bytes of a tag.
pub const TAG_LEN: usize = 4;

/// What the EtherType of a tag says.
const TPID: [u8; 2] = [0x81, 0x00];

/// Where the first tag of a frame stands: behind the addresses.
const TAG_AT: usize = 12;

/// Tag control information of the frame that starts with `head`: VLAN in the low 12 bits, priority above; `None` if it has no tag.
/// A service tag (0x88a8) is none of these.
#[inline]
#[must_use]
pub fn tag_of(head: &[u8]) -> Option<u16> {
    let &[a, b, c, d] = head.get(TAG_AT..)?.first_chunk()?;
    ([a, b] == TPID).then(|| u16::from_be_bytes([c, d]))
}

impl Burst {
    /// The tag of packet `i`; see [`tag_of`].
    #[inline]
    #[must_use]
    pub fn tag(&self, i: usize) -> Option<u16> {
        tag_of(self.head(i))
    }

    /// Changes what the first tag of packet `i` says; one without a tag stays as it is.
    pub fn set_tag(&mut self, i: usize, tci: u16) {
        if self.tag(i).is_some()
            && let Some(place) = self.head_mut(i).get_mut(TAG_AT + 2..TAG_AT + 4)
        {
            place.copy_from_slice(&tci.to_be_bytes());
        }
    }

    /// Puts a tag in front of all other tags of packet `i`. A frame that is too short to have an Ethernet header stays as it is.
    pub fn push_tag(&mut self, i: usize, tci: u16) {
        let len = self.frame_len(i);
        let head = len.min(HEAD_MAX);
        if head < TAG_AT + 2 {
            return;
        }
        // What does not stay in the head.
        let over = (head + TAG_LEN).saturating_sub(HEAD_MAX);
        if over > 0 {
            self.put_before_body(i, head - over);
        }
        let row = &mut self.rows[i].0;
        row.copy_within(TAG_AT..head - over, TAG_AT + TAG_LEN);
        let [c, d] = tci.to_be_bytes();
        row[TAG_AT..TAG_AT + TAG_LEN].copy_from_slice(&[TPID[0], TPID[1], c, d]);
        self.resized(i, len + TAG_LEN, |at| at.saturating_add(4));
    }

    /// Takes the first tag out of packet `i`: its control information, or `None` if there was no tag.
    pub fn pop_tag(&mut self, i: usize) -> Option<u16> {
        let tci = self.tag(i)?;
        let len = self.frame_len(i);
        let head = len.min(HEAD_MAX);
        // What moves into the head.
        let n = (len - head).min(TAG_LEN);
        let moved = self.take_from_body(i, n);
        let row = &mut self.rows[i].0;
        row.copy_within(TAG_AT + TAG_LEN..head, TAG_AT);
        row[head - TAG_LEN..head - TAG_LEN + n].copy_from_slice(&moved[..n]);
        self.resized(i, len - TAG_LEN, |at| at.saturating_sub(4));
        Some(tci)
    }

    /// Makes the head's bytes from `start` on the first of the body: bytes of the burst's own.
    fn put_before_body(&mut self, i: usize, start: usize) {
        let end = self.frame_len(i).min(HEAD_MAX);
        let (first, count) = self.body_as_run(i);
        let moved = self.rows[i].0;
        let moved = &moved[start..end];
        let moved = self.own_segment(moved.len(), |own| own.copy_from_slice(moved));
        let before = len_u32(self.segments.len());
        self.segments.push(moved);
        let first = first as usize;
        self.segments
            .extend_from_within(first..first + count as usize);
        self.metas[i].body = Body::run(before, count + 1);
        self.lasting = 0;
    }

    /// Takes up to `n` bytes, at most a tag's, from the front of the body.
    fn take_from_body(&mut self, i: usize, n: usize) -> [u8; TAG_LEN] {
        let mut taken = [0; TAG_LEN];
        if n == 0 {
            return taken;
        }
        let mut filled = 0;
        let (mut first, mut count) = self.body_as_run(i);
        while filled < n {
            let at = first as usize;
            let (true, Some(&segment)) = (count > 0, self.segments.get(at)) else {
                break;
            };
            let wanted = (n - filled).min(segment.len as usize);
            self.piece(segment)
                .copy_to(&mut taken[filled..filled + wanted]);
            filled += wanted;
            if wanted == segment.len as usize {
                (first, count) = (first + 1, count - 1);
            } else {
                self.segments[at] = segment.skip(len_u32(wanted));
            }
        }
        self.metas[i].body = Body::run(first, count);
        self.lasting = 0;
        taken
    }

    /// A frame's length has changed in front of everything that its metadata points at.
    fn resized(&mut self, i: usize, len: usize, shifted: impl Fn(u16) -> u16) {
        self.heads_last = false;
        let meta = &mut self.metas[i];
        meta.frame_len = len_u32(len);
        let offload = &mut meta.offload;
        if offload.is_plain() {
            return;
        }
        if offload.hdr_len > 0 {
            offload.hdr_len = shifted(offload.hdr_len);
        }
        if offload.flags & Offload::NEEDS_CSUM != 0 {
            offload.csum_start = shifted(offload.csum_start);
            // A checksum over what is not there any more: its sender asked for nonsense.
            if !offload.fits(meta.frame_len) {
                *offload = Offload::default();
            }
        }
    }
}
