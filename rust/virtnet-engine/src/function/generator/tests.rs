use virtnet_packet::Writable;
use virtnet_packet::checksum::Sum;

use super::super::signature::Found;
use super::*;

const MS: u64 = 1_000_000;

/// A UDP packet between two addresses; over IPv4 with a checksum if asked for.
fn udp(len: usize, with_sum: bool) -> Vec<u8> {
    let mut frame = vec![0; len];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    let total = u16::try_from(len - 14).unwrap();
    frame[14..16].copy_from_slice(&[0x45, 0]);
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 17]);
    frame[26..34].copy_from_slice(&[198, 18, 0, 1, 198, 19, 0, 1]);
    let header = Sum::of(&frame[14..34]).checksum();
    frame[24..26].copy_from_slice(&header.to_be_bytes());
    frame[34..38].copy_from_slice(&[0x12, 0x34, 0, 9]);
    frame[38..40].copy_from_slice(&(total - 20).to_be_bytes());
    (0..251_u8)
        .cycle()
        .zip(&mut frame[42..])
        .for_each(|(n, byte)| *byte = n);
    if with_sum {
        let sum = udp_sum(&frame).checksum_not_zero();
        frame[40..42].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// Over the pseudo-header and all of a UDP packet in IPv4 without options.
fn udp_sum(frame: &[u8]) -> Sum {
    let len = u16::try_from(frame.len() - 34).unwrap();
    Sum::of(&frame[34..])
        .and(Sum::of(&frame[26..34]))
        .and_word(17)
        .and_word(len)
}

fn stream(id: u16, frame: &[u8]) -> StreamOrders {
    StreamOrders {
        id,
        frame: frame.into(),
        vary: Vec::new(),
        rate: None,
        burst: 1,
        count: None,
    }
}

fn generator(streams: &[StreamOrders]) -> Result<Generator, EngineError> {
    Generator::new(&GeneratorOrders {
        streams: streams.to_vec(),
    })
}

/// What it offers, of which `taken` are taken, whole frames.
fn run(generator: &mut Generator, paced: bool, now: u64, taken: usize) -> Vec<Vec<u8>> {
    let Some((burst, picks)) = generator.offer(paced, now) else {
        return Vec::new();
    };
    let frames = picks.iter().map(|i| {
        let mut frame = vec![0; burst.frame_len(i)];
        burst.copy_frame(i, &mut frame);
        frame
    });
    let frames = frames.collect();
    let n = picks.len().min(taken);
    generator.sent(burst, picks.len(), n, now);
    frames
}

fn number(frame: &[u8]) -> (u16, u64, u64) {
    match Signature::find(frame, signature::place(&Fields::parse(frame))) {
        Found::Signature(found) => (found.stream, found.number, found.sent_ns),
        other => panic!("{other:?}"),
    }
}

#[test]
fn packets_are_numbered_and_stamped_and_those_not_taken_come_again() {
    let mut made = generator(&[stream(7, &udp(60, true))]).unwrap();
    let first = run(&mut made, false, 100, 10);
    assert_eq!(first.len(), 64);
    assert_eq!(number(&first[63]), (7, 63, 100));
    let second = run(&mut made, false, 200, 64);
    assert_eq!(number(&second[0]), (7, 10, 200));
    assert!(run(&mut made, true, 200, 64).is_empty(), "it has no rate");
    assert_eq!(run(&mut made, false, 300, 0).len(), 64);
    assert!(
        run(&mut made, false, 301, 64).is_empty(),
        "nothing was taken"
    );
    assert_eq!(made.due(), Some(300 + RETRY_NS));
    let counters = made.counters()[0];
    assert_eq!((counters.sent, counters.sent_bytes), (74, 74 * 60));
    assert_eq!((counters.first_ns, counters.last_ns), (Some(100), 200));
}

#[test]
fn fields_vary_and_checksums_stay_right() {
    for (len, with_sum) in [
        (60, true),
        (61, true),
        (200, true),
        (1_514, true),
        (60, false),
    ] {
        let mut orders = stream(0, &udp(len, with_sum));
        let field = |field, values| Vary {
            place: VaryPlace::Field(field),
            values,
        };
        orders.vary = vec![
            field(
                Writable::IpSrc,
                Values::Counter {
                    start: 0x0a00_0001,
                    step: 3,
                    count: 50,
                },
            ),
            field(Writable::L4Dst, Values::List([1, 70_000, 3].into())),
            field(
                Writable::L4Src,
                Values::Random {
                    low: 1_000,
                    high: 1_009,
                    seed: 1,
                },
            ),
            field(
                Writable::IpTtl,
                Values::Counter {
                    start: 64,
                    step: u128::MAX,
                    count: 3,
                },
            ),
            Vary {
                place: VaryPlace::Bytes {
                    offset: 3,
                    width: 3,
                },
                values: Values::Counter {
                    start: 0,
                    step: 1,
                    count: u64::MAX,
                },
            },
        ];
        let mut made = generator(&[orders]).unwrap();
        let mut frames = run(&mut made, false, 0, 64);
        frames.extend(run(&mut made, false, 12_345, 64));
        for (n, frame) in frames.iter().enumerate() {
            let fields = Fields::parse(frame);
            assert_eq!(Sum::of(&frame[14..34]).checksum(), 0, "packet {n} of {len}");
            if with_sum {
                assert_eq!(udp_sum(frame).checksum(), 0, "packet {n} of {len}");
            } else {
                assert_eq!(frame[40..42], [0, 0]);
            }
            let n32 = u32::try_from(n).unwrap();
            assert_eq!(fields.ip_src, 0x0a00_0001 + 3 * (n32 % 50));
            assert_eq!(fields.l4_dst, [1, 4_464, 3][n % 3]);
            assert!((1_000..1_010).contains(&fields.l4_src));
            assert_eq!(fields.ip_ttl, [64, 63, 62][n % 3]);
            assert_eq!(fields.eth_dst & 0xff_ffff, n as u64);
            assert_eq!(frame[60..], udp(len, with_sum)[60..], "the rest stays");
        }
        let sources: std::collections::BTreeSet<u16> = frames
            .iter()
            .map(|frame| Fields::parse(frame).l4_src)
            .collect();
        assert_eq!(sources.len(), 10, "all of them come");
    }
}

#[test]
fn streams_keep_their_own_rates_bursts_and_counts() {
    let (fast, slow) = (stream(1, &udp(60, true)), stream(2, &udp(100, true)));
    let fast = StreamOrders {
        rate: Some(100_000 * 1_000),
        ..fast
    };
    let slow = StreamOrders {
        rate: Some(10_000 * 1_000),
        burst: 5,
        count: Some(12),
        ..slow
    };
    let mut made = generator(&[fast, slow]).unwrap();
    let mut counts = Vec::new();
    for tenth in 0..100 {
        let frames = run(&mut made, true, tenth * MS / 10, 64);
        let of_slow = frames.iter().filter(|frame| number(frame).0 == 2).count();
        if of_slow > 0 {
            counts.push((tenth, of_slow));
        }
    }
    // Half a millisecond for five, and two are left at the end.
    assert_eq!(counts, [(0, 5), (5, 5), (10, 2)]);
    let counters = made.counters();
    assert_eq!(counters[0].sent, 991);
    assert_eq!((counters[1].sent, counters[1].left), (12, Some(0)));
}

#[test]
fn new_orders_go_on_with_the_numbers() {
    let mut made = generator(&[stream(3, &udp(60, true))]).unwrap();
    run(&mut made, false, 0, 64);
    let mut paused = stream(3, &udp(60, true));
    paused.count = Some(0);
    let orders = |streams| GeneratorOrders { streams };
    made.order(&orders(vec![paused]));
    assert_eq!((made.due(), run(&mut made, false, 5, 64).len()), (None, 0));
    assert_eq!(made.counters()[0].first_ns, None);
    made.order(&orders(vec![
        stream(3, &udp(80, true)),
        stream(4, &udp(60, true)),
    ]));
    let frames = run(&mut made, false, 9, 64);
    assert_eq!(frames.len(), 64, "half of the rows each");
    let mut seen: Vec<_> = frames.iter().map(|frame| number(frame)).collect();
    seen.sort_unstable();
    assert_eq!((seen[0], seen[32]), ((3, 64, 9), (4, 0, 9)));
}

#[test]
fn what_cannot_be_made_is_refused_with_what_would_be_right() {
    let small = udp(60, true);
    let mut zero = stream(0, &small);
    zero.rate = Some(0);
    let vary = |place| {
        let mut orders = stream(5, &small);
        orders.vary.push(Vary {
            place,
            values: Values::List([0].into()),
        });
        orders
    };
    let over = |offset, width| vary(VaryPlace::Bytes { offset, width });
    let mut tcp = small.clone();
    tcp[23] = 6;
    tcp[46] = 0x50;
    for (orders, text) in [
        (vec![], "1 to 64"),
        (vec![stream(0, &small); 65], "1 to 64"),
        (vec![stream(0, &small); 2], "another stream"),
        (vec![stream(0, &small[..59])], "60 to 65535"),
        (vec![stream(0, &tcp)], "18 bytes behind the headers"),
        (vec![zero], "rate of 0"),
        (
            vec![vary(VaryPlace::Field(Writable::Ip6Dst))],
            "a field that its frame has",
        ),
        (vec![over(50, 2)], "overlaps the signature"),
        (vec![over(41, 2)], "overlaps the signature"),
        (vec![over(0, 17)], "1 to 16 bytes"),
        (vec![over(usize::MAX, 4)], "1 to 16 bytes"),
    ] {
        let error = generator(&orders).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
}
