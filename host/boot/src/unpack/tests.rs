use super::*;
use std::io::Write;

use proptest::prelude::*;

/// What the packed fixtures hold: calls to one address from many places, so that xz's filter for
/// x86 code has something to do.
fn code() -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 4000 {
        let number = (code.len() / 11) as u8 & 0x3f;
        let distance = 0x2000 - (code.len() as i32 + 5);
        code.push(0xe8);
        code.extend(distance.to_le_bytes());
        code.extend([0x90, 0x55, 0x48, 0x89, 0xe5, 0xc3, number]);
    }
    code.truncate(4000);
    code
}

fn gzip() -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&code()).unwrap();
    encoder.finish().unwrap()
}

/// A payload as Linux's build makes it, by the programs of that name.
fn payload(compression: Compression) -> Vec<u8> {
    let packed: &[u8] = match compression {
        Compression::None => return code(),
        Compression::Gzip => return gzip(),
        Compression::Xz => include_bytes!("code.xz"),
        Compression::Lzma => include_bytes!("code.lzma"),
        Compression::Lz4 => include_bytes!("code.lz4"),
        Compression::Zstd => include_bytes!("code.zstd"),
    };
    [packed, &4000u32.to_le_bytes()].concat()
}

const PACKED: [Compression; 5] = [
    Compression::Gzip,
    Compression::Xz,
    Compression::Lzma,
    Compression::Lz4,
    Compression::Zstd,
];

#[test]
fn every_format_of_linux_is_recognised_and_unpacks() {
    for compression in PACKED {
        let payload = payload(compression);
        assert_eq!(Compression::of(&payload), Some(compression));
        let unpacked = unpack(compression, &payload, 1 << 20).unwrap();
        assert_eq!(unpacked, code(), "{compression}");
    }
    assert_eq!(Compression::of(b"\x7fELF"), Some(Compression::None));
    assert_eq!(Compression::of(b"BZh9"), None);
    assert_eq!(Compression::of(b""), None);
}

#[test]
fn what_is_announced_above_the_limit_is_not_unpacked() {
    for compression in PACKED {
        let refused = unpack(compression, &payload(compression), 3999);
        assert!(
            matches!(refused, Err(UnpackError::TooLarge { .. })),
            "{compression}"
        );
    }
}

#[test]
fn another_size_than_announced_is_an_error() {
    for compression in PACKED {
        for announced in [0, 3999, 4001u32] {
            let mut payload = payload(compression);
            let at = payload.len() - 4;
            payload[at..].copy_from_slice(&announced.to_le_bytes());
            assert!(
                unpack(compression, &payload, 1 << 20).is_err(),
                "{compression} {announced}"
            );
        }
    }
}

#[test]
fn a_truncated_payload_is_an_error() {
    for compression in PACKED {
        let whole = payload(compression);
        for length in [0, 3, 6, whole.len() / 2, whole.len() - 1] {
            let refused = unpack(compression, &whole[..length], 1 << 20);
            assert!(refused.is_err(), "{compression} {length}");
        }
    }
}

proptest! {
    #[test]
    fn damage_never_panics_and_never_unpacks_to_more_than_announced(
        which in 0usize..5,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut payload = payload(PACKED[which]);
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        if let Ok(unpacked) = unpack(PACKED[which], &payload, 1 << 16) {
            prop_assert!(unpacked.len() <= 1 << 16);
        }
    }
}
