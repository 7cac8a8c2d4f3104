//! Whatever a peer or a file says, its frames are understood or refused.
//!
//! The input's frames get correct checksums and numbers, since a peer that means harm does so.

#![no_main]

use dunlin_fuzz::MemoryFile;
use dunlin_guest::{Memory, SavedState};
use dunlin_migration::protocol::frame::HEADER_LENGTH;
use dunlin_migration::protocol::message::{Configuration, FileHeader, Region, RoundBegin};
use dunlin_migration::protocol::{Header, Kind, Message, Preamble, Purpose, Token, preamble, runs};
use dunlin_migration::{DestinationMachine, MachineError, file};
use libfuzzer_sys::{arbitrary, fuzz_target};

const RAM: u64 = 1 << 20;

#[derive(Debug, arbitrary::Arbitrary)]
struct Input<'a> {
    /// How many of a good file's first messages come first.
    good: u8,
    frames: Vec<(u8, &'a [u8])>,
    raw: &'a [u8],
}

#[derive(Debug)]
struct Machine(Memory);

impl DestinationMachine for Machine {
    fn memory(&self) -> &Memory {
        &self.0
    }

    fn restore(&mut self, _states: Vec<SavedState>) -> Result<(), MachineError> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

fuzz_target!(|input: Input<'_>| {
    decode_raw(input.raw);
    let mut body = Vec::new();
    let mut sequence = 0;
    let mut add = |kind: Kind, payload: &[u8]| {
        let header = Header {
            length: payload.len() as u32,
            kind,
            sequence,
            payload_crc: crc32fast::hash(payload),
        };
        sequence += 1;
        body.extend_from_slice(&header.encode());
        body.extend_from_slice(payload);
    };
    for message in good_start().iter().take(usize::from(input.good % 4)) {
        add(message.kind(), &message.encode());
    }
    for (kind, payload) in &input.frames {
        let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
        if let Ok(message) = Message::decode(kind, payload) {
            assert_eq!(message.kind(), kind);
            let again = Message::decode(kind, &message.encode());
            assert_eq!(again.ok(), Some(message), "a message changed on its way");
        }
        add(kind, payload);
    }
    body.extend_from_slice(input.raw);
    let start = Preamble {
        purpose: Purpose::File,
        token: Token::from_bytes([0; 16]),
        body_length: body.len() as u64,
    };
    let mut bytes = start.encode().to_vec();
    bytes.extend(body);
    let saved = MemoryFile::new(&bytes);
    let _refused = file::inspect(&saved.path());
    let machine = |_: &[u8]| {
        Ok(Machine(
            Memory::new(RAM).expect("there is memory for a guest"),
        ))
    };
    let _refused = file::restore(&saved.path(), machine);
});

fn good_start() -> [Message; 3] {
    let region = Region {
        start: 0,
        size: RAM,
        offset: 0,
    };
    [
        Message::FileHeader(FileHeader {
            created: 1,
            ram_bytes: RAM,
            components: Vec::new(),
        }),
        Message::Configuration(Configuration {
            machine: Vec::new(),
            ram_bytes: RAM,
            regions: vec![region],
            verification: 1,
        }),
        Message::RoundBegin(RoundBegin {
            round: 0,
            pages: RAM / 4096,
        }),
    ]
}

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
