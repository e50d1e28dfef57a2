//! How packets are written down: pcap and pcapng, with times in nanoseconds.
//!
//! Spec: draft-ietf-opsawg-pcapng.

use virtnet_packet::{Direction, Origin};

use super::writer::CapturePlace;

/// The longest packet kept whole: more than any port carries.
const SNAP_LEN: u32 = 262_144;

/// Link type of Ethernet.
const ETHERNET: u32 = 1;

/// What ends a list of options.
const END_OF_OPTIONS: u32 = 0;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Pcap,
    Pcapng,
}

/// What was captured, for the end of a capture.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    pub(super) began_ns: u64,
    pub(super) ended_ns: u64,
    /// Packets that were to be written.
    pub(super) offered: u64,
    /// Of them, those that were not.
    pub(super) dropped: u64,
    /// There was a filter before them: nobody knows how many it has met.
    pub(super) filtered: bool,
}

/// What the file begins with. pcap has one interface and does not describe it.
pub(super) fn header<'a>(
    format: Format,
    places: impl Iterator<Item = &'a CapturePlace>,
    out: &mut Vec<u8>,
) {
    match format {
        Format::Pcap => pcap_header(out),
        Format::Pcapng => {
            pcapng_section(out);
            places.for_each(|place| pcapng_interface(place, out));
        }
    }
}

/// One packet; `frame` appends its bytes.
pub(super) fn record(
    format: Format,
    from: Origin,
    time_ns: u64,
    out: &mut Vec<u8>,
    frame: impl FnOnce(&mut Vec<u8>),
) {
    match format {
        Format::Pcap => pcap_record(out, time_ns, frame),
        Format::Pcapng => pcapng_record(out, from, time_ns, frame),
    }
}

fn pcap_header(out: &mut Vec<u8>) {
    const NANOSECONDS: u32 = 0xa1b2_3c4d;
    const VERSION: u32 = 0x0004_0002;
    words(out, [NANOSECONDS, VERSION, 0, 0, SNAP_LEN, ETHERNET]);
}

fn pcap_record(out: &mut Vec<u8>, time_ns: u64, frame: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    let seconds = low_word(time_ns / 1_000_000_000);
    let fraction = low_word(time_ns % 1_000_000_000);
    words(out, [seconds, fraction, 0, 0]);
    frame(out);
    let len = len_word(out.len() - start - 16);
    set_word(out, start + 8, len);
    set_word(out, start + 12, len);
}

fn pcapng_section(out: &mut Vec<u8>) {
    const BYTE_ORDER: u32 = 0x1a2b_3c4d;
    const VERSION: u32 = 1;
    const UNKNOWN_LENGTH: u32 = u32::MAX;
    const USER_APPLICATION: u16 = 4;
    block(out, 0x0a0d_0d0a, |out| {
        words(out, [BYTE_ORDER, VERSION, UNKNOWN_LENGTH, UNKNOWN_LENGTH]);
        option(
            out,
            USER_APPLICATION,
            concat!("virtnet ", env!("CARGO_PKG_VERSION")).as_bytes(),
        );
        words(out, [END_OF_OPTIONS]);
    });
}

/// An interface of the section, which counts in nanoseconds.
fn pcapng_interface(place: &CapturePlace, out: &mut Vec<u8>) {
    const INTERFACE_NAME: u16 = 2;
    const TIME_RESOLUTION: u16 = 9;
    const FILTER: u16 = 11;
    const NANOSECONDS: u8 = 9;
    /// The filter is text in the language of libpcap.
    const TEXT: u8 = 0;
    let CapturePlace { name, filter } = place;
    block(out, 1, |out| {
        words(out, [ETHERNET, SNAP_LEN]);
        if !name.is_empty() {
            option(out, INTERFACE_NAME, name.as_bytes());
        }
        option(out, TIME_RESOLUTION, &[NANOSECONDS]);
        if !filter.is_empty() {
            option(out, FILTER, &[&[TEXT], filter.as_bytes()].concat());
        }
        words(out, [END_OF_OPTIONS]);
    });
}

fn pcapng_record(out: &mut Vec<u8>, from: Origin, time_ns: u64, frame: impl FnOnce(&mut Vec<u8>)) {
    const FLAGS: u16 = 2;
    let interface = u32::from(from.place);
    block(out, 6, |out| {
        let (high, low) = (low_word(time_ns >> 32), low_word(time_ns));
        words(out, [interface, high, low, 0, 0]);
        let start = out.len();
        frame(out);
        let len = out.len() - start;
        out.resize(start + len.next_multiple_of(4), 0);
        let len = len_word(len);
        set_word(out, start - 8, len);
        set_word(out, start - 4, len);
        if from.direction != Direction::Unknown {
            option(out, FLAGS, &(from.direction as u32).to_le_bytes());
            words(out, [END_OF_OPTIONS]);
        }
    });
}

/// The statistics of interface number `interface` that a capture ends with; pcap has none.
pub(super) fn statistics(format: Format, interface: usize, tally: &Tally, out: &mut Vec<u8>) {
    const START_TIME: u16 = 2;
    const END_TIME: u16 = 3;
    const RECEIVED: u16 = 4;
    const DROPPED: u16 = 5;
    const FILTER_ACCEPT: u16 = 6;
    const DELIVERED: u16 = 8;
    if format == Format::Pcap {
        return;
    }
    let time = |ns: u64| [low_word(ns >> 32).to_le_bytes(), low_word(ns).to_le_bytes()].concat();
    block(out, 5, |out| {
        let ended = tally.ended_ns;
        words(
            out,
            [len_word(interface), low_word(ended >> 32), low_word(ended)],
        );
        option(out, START_TIME, &time(tally.began_ns));
        option(out, END_TIME, &time(ended));
        let passed = if tally.filtered {
            FILTER_ACCEPT
        } else {
            RECEIVED
        };
        let delivered = tally.offered.saturating_sub(tally.dropped);
        let counts = [
            (passed, tally.offered),
            (DROPPED, tally.dropped),
            (DELIVERED, delivered),
        ];
        let mut sorted = counts;
        sorted.sort_unstable();
        for (code, count) in sorted {
            option(out, code, &count.to_le_bytes());
        }
        words(out, [END_OF_OPTIONS]);
    });
}

/// A block of pcapng: type, length, body, length again.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    words(out, [kind, 0]);
    body(out);
    let len = len_word(out.len() + 4 - start);
    words(out, [len]);
    set_word(out, start + 4, len);
}

/// An option of a block; what does not fit into one is cut.
fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    let len = u16::try_from(value.len()).unwrap_or(u16::MAX);
    let value = &value[..usize::from(len)];
    out.extend(code.to_le_bytes());
    out.extend(len.to_le_bytes());
    out.extend(value);
    out.resize(out.len() + value.len().next_multiple_of(4) - value.len(), 0);
}

fn words<const N: usize>(out: &mut Vec<u8>, words: [u32; N]) {
    out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn set_word(out: &mut [u8], at: usize, word: u32) {
    out[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

/// The lower half of `value`.
fn low_word(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// A length or number in the file. All are far smaller than this can hold.
fn len_word(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
