//! A burst of usual packets, which are read and written in place, fares as the same packets do among others, which are parsed.

use proptest::prelude::*;
use virtnet_packet::{BURST_MAX, Fields, HEAD_MAX, Offload};

use super::*;

const COLUMNS: [(&str, &str); 15] = [
    ("length", "uint32"),
    ("eth_dst", "uint64"),
    ("eth_src", "uint64"),
    ("eth_type", "uint16"),
    ("vlan", "int16"),
    ("ip_version", "uint8"),
    ("ip_proto", "uint8"),
    ("ip_ttl", "uint8"),
    ("ip_src", "uint32"),
    ("ip_dst", "uint32"),
    ("ip6_src.0", "uint64"),
    ("l4_src", "uint16"),
    ("l4_dst", "uint16"),
    ("tcp_flags", "uint8"),
    ("payload", "uint32"),
];

const WRITTEN: [&str; 8] = [
    "eth_dst", "eth_src", "vlan", "ip_ttl", "ip_src", "ip_dst", "l4_src", "l4_dst",
];

/// Writes to one field what is in a column, or a number, one pair after the other, and lets pass what has an even sum of all columns.
fn program(writes: &[(usize, usize, u64)]) -> Program {
    let step = |op: &str, dtype: &str, args: &[i128]| Step {
        op: op.to_owned(),
        dtype: dtype.to_owned(),
        args: args.to_vec(),
    };
    let mut steps = Vec::new();
    for &(column, field, number) in writes {
        let at = steps.len() as i128;
        steps.push(match COLUMNS.get(column) {
            Some((name, dtype)) => step(&format!("column:{name}"), dtype, &[]),
            None => step("number", "uint64", &[number.into()]),
        });
        steps.push(step(&format!("write:{}", WRITTEN[field]), "uint64", &[at]));
    }
    steps.push(step("number", "uint64", &[0]));
    for (name, dtype) in COLUMNS {
        let sum = steps.len() as i128 - 1;
        steps.push(step(&format!("column:{name}"), dtype, &[]));
        steps.push(step("add", "uint64", &[sum, sum + 1]));
    }
    let sum = steps.len() as i128 - 1;
    steps.push(step("number", "uint64", &[1]));
    steps.push(step("bitwise_and", "uint64", &[sum, sum + 1]));
    steps.push(step("answer", "uint64", &[sum + 2]));
    Program::new(&steps, Vec::new()).unwrap()
}

fn usual() -> impl Strategy<Value = (Vec<u8>, u8)> {
    let protocol = prop_oneof![3 => Just(6), 3 => Just(17), 1 => Just(1), 1 => Just(132)];
    let bytes = prop::collection::vec(any::<u8>(), 54..=HEAD_MAX + 10);
    (bytes, protocol, prop::bool::weighted(0.2), 0..2_u8).prop_map(
        |(mut frame, protocol, no_checksum, flags)| {
            frame[12..15].copy_from_slice(&[8, 0, 0x45]);
            frame[20..22].copy_from_slice(&[0x20, 0]);
            frame[23] = protocol;
            if protocol == 6 {
                frame[46] = 0x50;
            }
            if no_checksum {
                frame[40..42].fill(0);
            }
            (frame, flags * Offload::NEEDS_CSUM)
        },
    )
}

fn run(program: &Program, frames: &[(Vec<u8>, u8)]) -> Vec<(Vec<u8>, Fate)> {
    let mut burst = Burst::new();
    for (frame, flags) in frames {
        let offload = Offload {
            flags: *flags,
            ..Offload::default()
        };
        burst.push_bytes(frame, offload);
    }
    let picks = Picks::first(burst.len());
    let mut fates = [Fate::Consumed; BURST_MAX];
    let mut element = Element::new(program.clone());
    if let Verdict::All(fate) = element.classify(&mut burst, &picks, 0, &mut fates) {
        fates.fill(fate);
    }
    let heads = (0..burst.len()).map(|i| burst.head(i).to_vec());
    heads.zip(fates).collect()
}

proptest! {
    #[test]
    fn usual_packets_fare_by_themselves_as_they_do_among_others(
        mut frames in prop::collection::vec(usual(), 1..8),
        writes in prop::collection::vec((0..COLUMNS.len() + 3, 0..WRITTEN.len(), any::<u64>()), 0..6),
    ) {
        prop_assert!(frames.iter().all(|(frame, _)| Fields::is_usual(frame)));
        let program = program(&writes);
        let mut other = frames[0].clone();
        other.0.splice(12..12, [0x81, 0, 0x60, 7]);
        let mut alone = run(&program, &frames);
        alone.extend(run(&program, std::slice::from_ref(&other)));
        frames.push(other);
        prop_assert_eq!(alone, run(&program, &frames));
    }
}

#[test]
fn columns_are_what_packets_came_with() {
    let mut frame = vec![0; 60];
    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
    frame[22..24].copy_from_slice(&[64, 17]);
    // What is written to the source port is its time to live, whatever that was written to before.
    let program = program(&[(15, 3, 9), (7, 6, 0)]);
    let left = run(&program, &[(frame, 0)]);
    assert_eq!((left[0].0[22], &left[0].0[34..36]), (9, &[0, 64][..]));
}
