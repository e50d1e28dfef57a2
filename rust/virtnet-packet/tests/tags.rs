//! VLAN tags: wherever the bytes of a frame lie, a tag goes in and comes out as if the frame were one run of bytes.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use virtnet_mem::{GuestAddr, GuestMemory, Segment};
use virtnet_packet::{Burst, HEAD_MAX, Offload, Offloads};

/// Lengths around every border of a tag and of a head.
const LENGTHS: [usize; 16] = [
    14, 15, 16, 17, 18, 60, 187, 188, 189, 191, 192, 193, 196, 197, 1_514, 65_535,
];

const TCI: u16 = 0x600a;

fn pattern(len: usize) -> Vec<u8> {
    let byte = |at: usize| u8::try_from((at * 7 + at / 256) % 251).unwrap();
    (0..len).map(byte).collect()
}

fn tagged(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0x60, 0x0a], &frame[12..]].concat()
}

fn whole(burst: &Burst, i: usize) -> Vec<u8> {
    let mut frame = vec![0; burst.frame_len(i)];
    assert_eq!(burst.copy_frame(i, &mut frame), frame.len());
    assert_eq!(burst.head(i).len(), frame.len().min(HEAD_MAX));
    assert_eq!(burst.head(i), &frame[..frame.len().min(HEAD_MAX)]);
    frame
}

/// The frame as bytes of the burst, in one run of guest memory, and in runs of `run` bytes of it.
fn bursts(frame: &[u8], run: usize) -> Vec<Burst> {
    let memory = GuestMemory::anonymous(1 << 20, GuestAddr(0)).unwrap();
    let segment = |offset, len: usize| Segment {
        offset,
        len: u32::try_from(len).unwrap(),
        region: 0,
    };
    let all = segment(0, frame.len());
    assert_eq!(memory.slice(all).copy_from(frame), frame.len());
    let mut bursts = vec![Burst::new(), Burst::new(), Burst::new()];
    bursts[0].push_bytes(frame, Offload::default());
    bursts[1].set_memory(&memory);
    bursts[1].push_guest(memory.slice(all), all, Offload::default());
    bursts[2].set_memory(&memory);
    let runs = (0..frame.len())
        .step_by(run)
        .map(|at| segment(at, run.min(frame.len() - at)));
    bursts[2].push_guest_runs(&memory, runs, all.len, Offload::default());
    bursts
}

#[test]
fn a_tag_goes_in_and_comes_out_wherever_the_bytes_lie() {
    for len in LENGTHS {
        for run in [3, 190, 5_000] {
            let frame = pattern(len);
            for mut burst in bursts(&frame, run) {
                burst.push_tag(0, TCI);
                assert_eq!(whole(&burst, 0), tagged(&frame), "{len} in runs of {run}");
                assert_eq!(burst.tag(0), Some(TCI));
                burst.push_tag(0, 7);
                assert_eq!(burst.pop_tag(0), Some(7));
                assert_eq!(burst.pop_tag(0), Some(TCI));
                assert_eq!(whole(&burst, 0), frame, "{len} in runs of {run}");
                assert_eq!(burst.pop_tag(0), None);
            }
            for mut burst in bursts(&tagged(&frame), run) {
                assert_eq!(burst.pop_tag(0), Some(TCI));
                assert_eq!(whole(&burst, 0), frame, "{len} in runs of {run}");
            }
        }
    }
}

#[test]
fn what_is_left_to_be_done_moves_along() {
    let offload = Offload {
        flags: Offload::NEEDS_CSUM,
        gso_type: Offload::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1_448,
        csum_start: 34,
        csum_offset: 16,
    };
    let mut burst = Burst::new();
    burst.push_bytes(&pattern(9_000), offload);
    burst.push_tag(0, 5);
    let moved = burst.offload(0);
    assert_eq!((moved.csum_start, moved.hdr_len), (38, 58));
    burst.pop_tag(0);
    assert_eq!(burst.offload(0), offload);
    assert_eq!(burst.needs(), Offloads::CSUM | Offloads::TSO4);
}

#[test]
fn a_checksum_over_a_tag_that_is_gone_is_none() {
    let nonsense = Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start: 2,
        csum_offset: 14,
        ..Offload::default()
    };
    let mut burst = Burst::new();
    burst.push_bytes(&tagged(&pattern(14)), nonsense);
    assert!(nonsense.fits(18));
    assert_eq!(burst.pop_tag(0), Some(TCI));
    assert_eq!(burst.offload(0), Offload::default());
}

#[test]
fn runts_and_other_tags_stay_as_they_are() {
    let mut burst = Burst::new();
    burst.push_bytes(&[1; 13], Offload::default());
    let mut service = tagged(&pattern(60));
    service[12..14].copy_from_slice(&[0x88, 0xa8]);
    burst.push_bytes(&service, Offload::default());
    burst.push_tag(0, 1);
    assert_eq!(burst.frame_len(0), 13);
    assert_eq!((burst.pop_tag(0), burst.pop_tag(1)), (None, None));
    burst.set_tag(1, 9);
    assert_eq!(whole(&burst, 1), service);
}
