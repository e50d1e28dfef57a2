//! What negotiated features decide, and what they are called.

use virtnet_virtio::{ChainError, Features, RingError, RingFormat};

#[test]
fn n1_a_header_has_twelve_bytes_unless_everything_is_legacy_or_hashes_are_in_it() {
    let rows = [
        (Features::empty(), 10),
        (
            Features::CSUM | Features::EVENT_IDX | Features::ANY_LAYOUT,
            10,
        ),
        (Features::MRG_RXBUF, 12),
        (Features::VERSION_1, 12),
        (Features::VERSION_1 | Features::MRG_RXBUF, 12),
        (Features::RING_PACKED, 12),
        (Features::all() - Features::HASH_REPORT, 12),
        (Features::HASH_REPORT, 20),
        (Features::all(), 20),
    ];
    for (features, len) in rows {
        assert_eq!(features.header_len(), len, "{:?}", features.names());
    }
}

#[test]
fn the_format_follows_from_one_feature() {
    for (features, format, name, base) in [
        (Features::empty(), RingFormat::Split, "split", 0),
        (Features::VERSION_1, RingFormat::Split, "split", 0),
        (
            Features::RING_PACKED,
            RingFormat::Packed,
            "packed",
            0x8000_8000,
        ),
        (Features::all(), RingFormat::Packed, "packed", 0x8000_8000),
    ] {
        assert_eq!(RingFormat::of(features), format);
        assert_eq!((format.name(), format.fresh_base()), (name, base));
        assert_eq!(format.to_string(), name);
    }
}

#[test]
fn every_bit_has_a_name_or_its_number() {
    assert_eq!(Features::empty().names(), Vec::<String>::new());
    let some = Features::from_bits_retain(1 | 1 << 15 | 1 << 32 | 1 << 44 | 1 << 63);
    let names = ["CSUM", "MRG_RXBUF", "VERSION_1", "BIT_44", "SPEED_DUPLEX"];
    assert_eq!(some.names(), names);
    let all = Features::from_bits_retain(u64::MAX).names();
    assert_eq!(all.len(), 64);
    let mut unique = all.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), 64, "{all:?}");
}

#[test]
fn an_error_says_what_was_found_and_what_was_expected() {
    let rows: [(String, &str); 4] = [
        (
            RingError::AvailIndex {
                found: 9,
                expected: 0,
                size: 8,
            }
            .to_string(),
            "the available index 9 is more than 8 ahead of 0",
        ),
        (
            RingError::HeadRange { head: 8, size: 8 }.to_string(),
            "available ring entry names descriptor 8 of 8",
        ),
        (
            RingError::UsedLen {
                id: 1,
                len: 11,
                size: 10,
            }
            .to_string(),
            "the device wrote 11 bytes to buffer 1 of 10",
        ),
        (ChainError::Empty.to_string(), "the chain has no bytes"),
    ];
    for (said, expected) in rows {
        assert_eq!(said, expected);
    }
}
