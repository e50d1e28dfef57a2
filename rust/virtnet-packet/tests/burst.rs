//! Bursts: whatever a frame is made of, what comes out is what went in.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::Read;
use std::os::unix::net::UnixStream;

use virtnet_mem::{Gather, GuestAddr, GuestMemory, Segment};
use virtnet_packet::{BURST_MAX, Burst, HEAD_MAX, Offload, Picks, Piece};

/// Lengths around every border: runs of wide moves, the head's end, a page, the largest frame.
const LENGTHS: [usize; 18] = [
    1, 2, 13, 14, 60, 64, 65, 128, 129, 191, 192, 193, 256, 257, 1_514, 4_096, 9_000, 65_535,
];

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 7 + at / 256 + seed * 31) % 251).unwrap())
        .collect()
}

fn whole(burst: &Burst, i: usize) -> Vec<u8> {
    let mut frame = vec![0xee; burst.frame_len(i) + 8];
    let copied = burst.copy_frame(i, &mut frame);
    assert_eq!(copied, burst.frame_len(i));
    assert_eq!(frame[copied..], [0xee; 8], "nothing is written behind it");
    let mut loose = vec![0xee; copied.max(HEAD_MAX) + 8];
    assert_eq!(burst.copy_frame_loosely(i, &mut loose), copied);
    assert_eq!(loose[..copied], frame[..copied]);
    assert_eq!(
        loose[copied.max(HEAD_MAX)..],
        [0xee; 8],
        "only a head is loose"
    );
    frame.truncate(copied);
    frame
}

fn segment(offset: usize, len: usize) -> Segment {
    Segment {
        offset,
        len: u32::try_from(len).unwrap(),
        region: 0,
    }
}

/// Guest memory that holds `bytes` from its start.
fn guest_with(bytes: &[u8]) -> std::sync::Arc<GuestMemory> {
    let memory = GuestMemory::anonymous(1 << 20, GuestAddr(0)).unwrap();
    assert_eq!(
        memory.slice(segment(0, bytes.len())).copy_from(bytes),
        bytes.len()
    );
    memory
}

#[test]
fn frames_given_as_bytes_come_out_as_they_went_in() {
    let mut burst = Burst::new();
    for (i, len) in LENGTHS.into_iter().enumerate() {
        burst.push_bytes(&pattern(len, i), Offload::default());
    }
    for (i, len) in LENGTHS.into_iter().enumerate() {
        let frame = pattern(len, i);
        assert_eq!(whole(&burst, i), frame);
        assert_eq!(burst.head(i), &frame[..len.min(HEAD_MAX)]);
        let body: usize = burst.body(i).map(|piece| piece.len()).sum();
        assert_eq!(body, len - burst.head(i).len());
    }
}

#[test]
fn frames_read_into_a_burst_come_out_as_they_were_read() {
    let mut burst = Burst::new();
    // The second time over what the first left.
    for seed in [0, 100] {
        burst.clear();
        for (i, len) in LENGTHS.into_iter().enumerate() {
            let room = burst.own_room(3 + 65_535);
            room[..3 + len].copy_from_slice(&[&[9; 3], &pattern(len, seed + i)[..]].concat());
            burst.push_read(3, len, Offload::default());
            burst.push_bytes(&pattern(len, seed + i + 1), Offload::default());
        }
        for (i, len) in LENGTHS.into_iter().enumerate() {
            assert_eq!(whole(&burst, 2 * i), pattern(len, seed + i));
            assert_eq!(whole(&burst, 2 * i + 1), pattern(len, seed + i + 1));
        }
    }
}

#[test]
fn frames_can_be_written_from_where_they_lie() {
    let len = 9_000;
    let memory = guest_with(&pattern(len, 1));
    let mut burst = Burst::new();
    burst.set_memory(&memory);
    let runs = [segment(0, 100), segment(100, 4_000), segment(4_100, 4_900)];
    burst.push_guest_runs(&memory, runs.into_iter(), 9_000, Offload::default());
    burst.push_bytes(&pattern(5_000, 2), Offload::default());
    for (i, frame) in [pattern(len, 1), pattern(5_000, 2)].into_iter().enumerate() {
        let (to, mut from) = UnixStream::pair().unwrap();
        let mut gather = Gather::default();
        assert!(burst.gather_frame(i, &mut gather));
        assert_eq!(gather.write(&to).unwrap(), frame.len());
        drop(to);
        let mut found = Vec::new();
        from.read_to_end(&mut found).unwrap();
        assert_eq!(found, frame);
    }
    // Of more pieces than a system call takes.
    let runs = (0..90).map(|k| segment(100 * k, 100));
    burst.push_guest_runs(&memory, runs, 9_000, Offload::default());
    assert!(!burst.gather_frame(2, &mut Gather::default()));
}

#[test]
fn frames_in_guest_memory_come_out_as_they_lie_there() {
    for len in LENGTHS {
        let frame = pattern(len, 1);
        let memory = guest_with(&frame);
        let mut burst = Burst::new();
        burst.set_memory(&memory);
        burst.push_guest(
            memory.slice(segment(0, len)),
            segment(0, len),
            Offload::default(),
        );
        assert_eq!(whole(&burst, 0), frame, "{len} bytes");
    }
}

#[test]
fn frames_in_many_runs_come_out_whole_wherever_the_head_ends() {
    for len in LENGTHS {
        for run in [1, 7, 100, 192, 193, 4_096] {
            if len / run > 1_024 {
                continue;
            }
            let frame = pattern(len, run);
            let memory = guest_with(&frame);
            let runs = (0..len)
                .step_by(run)
                .map(|at| segment(at, run.min(len - at)));
            let mut burst = Burst::new();
            burst.set_memory(&memory);
            // A neighbour's runs must not be taken for its own.
            burst.push_guest(
                memory.slice(segment(0, 300)),
                segment(0, 300),
                Offload::default(),
            );
            let frame_len = u32::try_from(len).unwrap();
            burst.push_guest_runs(&memory, runs, frame_len, Offload::default());
            assert_eq!(whole(&burst, 1), frame, "{len} bytes in runs of {run}");
        }
    }
}

#[test]
fn a_head_is_private_and_a_body_is_not() {
    let frame = pattern(1_000, 0);
    let memory = guest_with(&frame);
    let mut burst = Burst::new();
    burst.set_memory(&memory);
    burst.push_guest(
        memory.slice(segment(0, 1_000)),
        segment(0, 1_000),
        Offload::default(),
    );
    memory.slice(segment(0, 1_000)).copy_from(&[0xff; 1_000]);
    assert_eq!(burst.head(0), &frame[..HEAD_MAX]);
    assert!(
        whole(&burst, 0)[HEAD_MAX..]
            .iter()
            .all(|&byte| byte == 0xff)
    );
    // What is written to the head is what leaves, and the guest does not see it.
    burst.head_mut(0)[0] = 0x77;
    assert_eq!(whole(&burst, 0)[0], 0x77);
    assert_eq!(memory.slice(segment(0, 1)).read::<1>(), Some([0xff]));
}

#[test]
fn a_copy_is_independent_of_the_guest_and_of_its_original() {
    for len in LENGTHS {
        let frame = pattern(len, 2);
        let memory = guest_with(&frame);
        let offload = Offload {
            csum_start: 34,
            ..Offload::default()
        };
        let mut burst = Burst::new();
        burst.set_memory(&memory);
        burst.push_guest(memory.slice(segment(0, len)), segment(0, len), offload);
        let mut copies = Burst::new();
        copies.push_bytes(&pattern(500, 9), Offload::default());
        copies.push_copy(&burst, 0);
        memory.slice(segment(0, len)).copy_from(&vec![0xff; len]);
        burst.head_mut(0).fill(0xff);
        drop(burst);
        assert_eq!(whole(&copies, 1), frame);
        assert_eq!(whole(&copies, 0), pattern(500, 9));
        assert_eq!(copies.offload(1), offload);
    }
}

#[test]
fn packets_last_until_one_is_changed_and_bodies_beyond_that() {
    let changes: [fn(&mut Burst); 5] = [
        |burst| burst.head_mut(1)[0] = 1,
        |burst| burst.set_offload(1, Offload::default()),
        |burst| burst.push_tag(1, 7),
        |burst| burst.trim(1, 100),
        Burst::clear,
    ];
    for change in changes {
        let mut burst = Burst::new();
        (0..2).for_each(|_| burst.push_bytes(&pattern(500, 1), Offload::default()));
        assert_eq!(burst.lasting_packet(0), None);
        burst.keep_packets();
        assert!(burst.lasting_packet(0).is_some());
        assert_ne!(burst.lasting_packet(0), burst.lasting_packet(1));
        assert_eq!(burst.lasting_packet(1), burst.lasting_body(1));
        let mut copy = Burst::new();
        copy.push_copy(&burst, 0);
        assert_eq!(copy.lasting_packet(0), None);
        change(&mut burst);
        assert_eq!(burst.lasting_packet(0), None);
        let before = burst.lasting_body(0);
        burst.keep_packets();
        assert!(burst.lasting_packet(0) != before, "another name");
    }
    let mut burst = Burst::new();
    burst.push_bytes(&pattern(500, 1), Offload::default());
    burst.keep_bodies();
    burst.head_mut(0)[0] = 1;
    assert!(burst.lasting_body(0).is_some() && burst.lasting_packet(0).is_none());
}

#[test]
fn a_loose_copy_is_the_frame_and_changes_no_more_than_a_heads_room() {
    for len in LENGTHS.into_iter().chain([1, 63, 64, 65]) {
        let frame = pattern(len, 3);
        let mut burst = Burst::new();
        burst.push_bytes(&frame, Offload::default());
        for room in [len, len.max(64), len.max(HEAD_MAX), len + HEAD_MAX] {
            let mut dst = vec![0xee; room];
            assert_eq!(burst.copy_frame_loosely(0, &mut dst), len);
            assert_eq!(dst[..len], frame);
            let behind = dst.iter().skip(len.max(HEAD_MAX));
            assert!(behind.into_iter().all(|&byte| byte == 0xee));
        }
    }
}

#[test]
fn a_cleared_burst_is_as_good_as_new() {
    let mut burst = Burst::new();
    for round in 0..3 {
        for i in 0..BURST_MAX {
            assert_eq!(burst.room(), BURST_MAX - i);
            burst.push_bytes(&pattern(300 + i, round), Offload::default());
        }
        assert_eq!(whole(&burst, BURST_MAX - 1), pattern(363, round));
        burst.clear();
        assert!(burst.is_empty());
    }
}

#[test]
fn a_copy_into_too_little_room_is_cut_there() {
    let frame = pattern(1_000, 0);
    let mut burst = Burst::new();
    burst.push_bytes(&frame, Offload::default());
    for room in [0, 1, 191, 192, 193, 999] {
        let mut some = vec![0; room];
        assert_eq!(burst.copy_frame(0, &mut some), room);
        assert_eq!(some, frame[..room]);
    }
}

#[test]
fn pieces_can_be_skipped_into_and_copied_to_another_guest() {
    let frame = pattern(1_000, 0);
    let memory = guest_with(&frame);
    let mut burst = Burst::new();
    burst.set_memory(&memory);
    burst.push_guest(
        memory.slice(segment(0, 1_000)),
        segment(0, 1_000),
        Offload::default(),
    );
    burst.push_bytes(&frame, Offload::default());
    let other = GuestMemory::anonymous(1 << 16, GuestAddr(0)).unwrap();
    for i in 0..2 {
        let pieces: Vec<Piece<'_>> = burst.body(i).collect();
        let [piece] = pieces[..] else {
            panic!("one run has one piece, not {pieces:?}");
        };
        for skipped in [0, 1, 500, 808, 900] {
            let rest = piece.skip(skipped);
            let expected = &frame[(HEAD_MAX + skipped).min(1_000)..];
            assert_eq!(
                (rest.len(), rest.is_empty()),
                (expected.len(), expected.is_empty())
            );
            let there = other.slice(segment(0, 1_000));
            assert_eq!(rest.copy_to_guest(&there), expected.len());
            let mut back = vec![0; expected.len()];
            there.copy_to(&mut back);
            assert_eq!(back, expected);
        }
    }
}

#[test]
fn picks_keep_their_order_and_never_more_than_a_burst() {
    let mut picks = Picks::default();
    assert!(picks.is_empty());
    for i in [5, 3, 63, 3] {
        picks.push(i);
    }
    assert_eq!(picks.iter().collect::<Vec<_>>(), [5, 3, 63, 3]);
    assert_eq!((picks.len(), picks.get(2)), (4, 63));
    assert_eq!(picks.skip(1).iter().collect::<Vec<_>>(), [3, 63, 3]);
    assert!(picks.skip(4).is_empty());
    picks.clear();
    assert!(picks.is_empty());
    for n in [0, 1, 63, 64, 65, 1_000] {
        let first = Picks::first(n);
        let expected: Vec<_> = (0..n.min(BURST_MAX)).collect();
        assert_eq!(first.iter().collect::<Vec<_>>(), expected);
    }
    let mut full = Picks::first(BURST_MAX);
    full.push(0);
    assert_eq!(full.len(), BURST_MAX);
}

#[test]
fn offloads_fit_a_frame_or_they_do_not() {
    let csum = |csum_start, csum_offset| Offload {
        flags: Offload::NEEDS_CSUM,
        csum_start,
        csum_offset,
        ..Offload::default()
    };
    let gso = |flags, gso_size, hdr_len| Offload {
        flags,
        gso_type: Offload::GSO_TCPV4,
        gso_size,
        hdr_len,
        ..Offload::default()
    };
    let cases = [
        (Offload::default(), 1, true),
        (csum(34, 16), 52, true),
        (csum(34, 16), 51, false),
        (csum(u16::MAX, u16::MAX), 65_535, false),
        (gso(Offload::NEEDS_CSUM, 1_460, 54), 60, true),
        (gso(Offload::NEEDS_CSUM, 0, 54), 60, false),
        (gso(0, 1_460, 54), 60, false),
        (gso(Offload::NEEDS_CSUM, 1_460, 61), 60, false),
    ];
    for (offload, frame_len, fits) in cases {
        assert_eq!(offload.fits(frame_len), fits, "{offload:?} of {frame_len}");
    }
    assert!(Offload::default().is_plain() && !csum(0, 0).is_plain());
}
