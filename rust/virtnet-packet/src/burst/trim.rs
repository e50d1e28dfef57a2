//! Packets in a burst that become shorter.

use super::{Body, Burst, HEAD_MAX, len_u32};

impl Burst {
    /// Takes off what packet `i` has behind its first `len` bytes; one that is no longer stays as it is.
    #[cold]
    pub fn trim(&mut self, i: usize, len: usize) {
        if len >= self.frame_len(i) {
            return;
        }
        let (first, count) = self.body_as_run(i);
        let mut left = len_u32(len.saturating_sub(HEAD_MAX));
        let mut kept = 0;
        for segment in self
            .segments
            .iter_mut()
            .skip(first as usize)
            .take(count as usize)
        {
            if left == 0 {
                break;
            }
            segment.len = segment.len.min(left);
            left -= segment.len;
            kept += 1;
        }
        let meta = &mut self.metas[i];
        meta.body = Body::run(first, kept);
        meta.frame_len = len_u32(len);
        self.lasting = 0;
    }
}

#[cfg(test)]
mod tests {
    use crate::{Burst, Offload};

    #[test]
    fn a_packet_becomes_as_long_as_is_said_and_others_stay() {
        let frame: Vec<u8> = (0..=255).cycle().take(1_000).collect();
        for len in [0, 14, 191, 192, 193, 500, 999, 1_000, 1_001, 2_000] {
            let mut burst = Burst::new();
            (0..3).for_each(|_| burst.push_bytes(&frame, Offload::default()));
            burst.push_tag(1, 5);
            burst.trim(1, len);
            for (i, wanted) in [1_000, len.min(1_004), 1_000].into_iter().enumerate() {
                let mut out = vec![0; 1_100];
                let n = burst.copy_frame(i, &mut out);
                assert_eq!(
                    (n, burst.frame_len(i)),
                    (wanted, wanted),
                    "packet {i} to {len}"
                );
                if i != 1 {
                    assert_eq!(&out[..n], &frame[..n]);
                } else if n > 16 {
                    assert_eq!(&out[16..n], &frame[12..n - 4]);
                }
            }
        }
    }
}
