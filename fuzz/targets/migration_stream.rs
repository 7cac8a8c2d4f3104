//! Whatever a peer says, its preambles, frames, messages and runs are understood or refused.

#![no_main]

use dunlin_migration::postcopy::{self, parcel::Parcel};
use dunlin_migration::protocol::frame::HEADER_LENGTH;
use dunlin_migration::protocol::message::Missing;
use dunlin_migration::protocol::{Header, Kind, Message, Preamble, lane, preamble, runs};
use libfuzzer_sys::{arbitrary, fuzz_target};

/// Pages of the guest that messages on lanes are about.
const PAGES: u64 = 256;

#[derive(Debug, arbitrary::Arbitrary)]
struct Input<'a> {
    frames: Vec<(u8, &'a [u8])>,
    raw: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    decode_raw(input.raw);
    for (kind, payload) in &input.frames {
        let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
        if let Ok(message) = Message::decode(kind, payload) {
            assert_eq!(message.kind(), kind);
            let again = Message::decode(kind, &message.encode());
            assert_eq!(again.ok(), Some(message), "a message changed on its way");
        }
        let _refused = lane::LaneMessage::decode(payload, PAGES);
        if let Ok(Parcel::Pages { runs, content, .. }) = Parcel::decode(payload, PAGES) {
            let pages: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
            assert!(pages <= PAGES, "a parcel names pages beyond RAM");
            assert!(content.is_none_or(|content| content.len() as u64 == pages * 4096));
        }
        let missing = Missing {
            count: u64::from(payload.first().copied().unwrap_or(0)),
            bitmap: payload.to_vec(),
            packed: payload.len() % 2 == 1,
            ..Missing::default()
        };
        if let Ok(set) = postcopy::hear(&missing, PAGES) {
            assert!(set.iter().all(|page| page.0 < PAGES));
        }
        let _refused = lane::unpack(payload, payload.len() % 9, &mut Vec::new());
    }
});

/// Headers and runs as they come; their checksums are put right.
fn decode_raw(raw: &[u8]) {
    if let Some(bytes) = raw.first_chunk::<{ preamble::LENGTH }>() {
        let mut bytes = *bytes;
        let _refused = Preamble::decode(&bytes);
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(preamble) = Preamble::decode(&bytes) {
            let again = Preamble::decode(&preamble.encode());
            assert_eq!(again.ok(), Some(preamble));
        }
    }
    if let Some(bytes) = raw.first_chunk::<HEADER_LENGTH>() {
        let mut bytes = *bytes;
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(header) = Header::decode(&bytes, 0) {
            assert!(header.length <= header.kind.max_payload());
        }
    }
    if let Some((count, rest)) = raw.split_first_chunk::<4>() {
        let _refused = runs::decode_count(Kind::Pages, *count, 256);
        if let Ok(runs) = runs::decode(Kind::Pages, rest, 256) {
            let pages: usize = runs.iter().map(|run| run.pages().count()).sum();
            assert!(pages <= 256, "runs name pages beyond RAM");
        }
    }
}
