//! The frame around every message.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | length of the payload |
//! | 4..6 | kind |
//! | 6..8 | reserved, zero |
//! | 8..16 | sequence number: counts frames of one direction from 0 |
//! | 16..20 | CRC-32 of the payload |
//! | 20..24 | CRC-32 of bytes 0..20 |
//!
//! The header has a checksum of its own because its length decides how much is read next: with
//! one checksum behind the payload, a flipped bit in the length would look like a stalled peer.

use super::ProtocolError;

/// Bytes in a frame header.
pub const HEADER_LENGTH: usize = 24;

/// Most pages in one frame: 1 MiB of data.
pub const MAX_PAGES: usize = 256;

/// Most runs in one frame of zero pages.
pub const MAX_ZERO_RUNS: usize = 4096;

/// Bytes of one extent in a frame of a page table.
pub const EXTENT_LENGTH: usize = 24;

/// Most extents in one frame of a page table.
pub const MAX_EXTENTS: usize = 4096;

/// Longest configuration or set of states.
pub const MAX_BLOB: u32 = 64 << 20;

/// Longest of all other messages.
pub const MAX_CONTROL: u32 = 16 << 10;

macro_rules! kinds {
    ($($name:ident = $number:literal),* $(,)?) => {
        /// The kind of a frame: see the table in [`crate::protocol`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        #[expect(missing_docs, reason = "the protocol's table describes each kind")]
        pub enum Kind { $($name = $number),* }

        impl Kind {
            /// All kinds, in the order of their numbers.
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    Configuration = 1, Ready = 2, RoundBegin = 3, Pages = 4, ZeroPages = 5, RoundEnd = 6,
    Stored = 7, SwitchOver = 8, States = 9, Prepared = 10, Back = 11, Commit = 12, Running = 13,
    Settled = 14, Abort = 15, KeepAlive = 16, WhoOwns = 17, Ownership = 18, FileHeader = 19,
    End = 20, Lanes = 21,
    Missing = 30, Wanted = 31, Resume = 32, Gone = 33, Complete = 34, Ended = 35,
    Descriptors = 40, Leftovers = 41, PageTable = 45,
}

impl Kind {
    /// The longest payload that a frame of this kind may have.
    pub fn max_payload(self) -> u32 {
        match self {
            Self::Configuration | Self::States => MAX_BLOB,
            Self::FileHeader | Self::Leftovers | Self::Missing => MAX_BLOB,
            Self::Pages => (4 + MAX_PAGES * (super::runs::RUN_LENGTH + 4096)) as u32,
            Self::PageTable => (4 + MAX_EXTENTS * EXTENT_LENGTH) as u32,
            Self::ZeroPages => (4 + MAX_ZERO_RUNS * super::runs::RUN_LENGTH) as u32,
            _ => MAX_CONTROL,
        }
    }
}

/// A frame's header, decoded and checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload.
    pub length: u32,
    /// What the payload is.
    pub kind: Kind,
    /// Place in the sequence of its direction.
    pub sequence: u64,
    /// CRC-32 of the payload.
    pub payload_crc: u32,
}

impl Header {
    /// The header as it travels.
    pub fn encode(&self) -> [u8; HEADER_LENGTH] {
        let mut bytes = [0; HEADER_LENGTH];
        bytes[..4].copy_from_slice(&self.length.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Checks and decodes a header that has to have sequence number `expected`.
    ///
    /// # Errors
    /// [`ProtocolError`] when the header is damaged, out of sequence, of unknown kind or too long.
    pub fn decode(bytes: &[u8; HEADER_LENGTH], expected: u64) -> Result<Self, ProtocolError> {
        if bytes[20..] != crc32fast::hash(&bytes[..20]).to_le_bytes() {
            return Err(ProtocolError::Checksum {
                part: "header",
                sequence: expected,
            });
        }
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let sequence = u64::from(word(8)) | u64::from(word(12)) << 32;
        if sequence != expected {
            return Err(ProtocolError::Sequence {
                found: sequence,
                expected,
            });
        }
        let number = u16::from_le_bytes([bytes[4], bytes[5]]);
        let kind = Kind::from_number(number).ok_or(ProtocolError::UnknownKind { kind: number })?;
        let length = word(0);
        if length > kind.max_payload() {
            return Err(ProtocolError::Length {
                kind,
                length: u64::from(length),
                limit: u64::from(kind.max_payload()),
            });
        }
        if bytes[6..8] != [0, 0] {
            return Err(ProtocolError::invalid(kind, "reserved bytes are not zero"));
        }
        Ok(Self {
            length,
            kind,
            sequence,
            payload_crc: word(16),
        })
    }

    /// Does the payload fit its checksum?
    ///
    /// # Errors
    /// [`ProtocolError::Checksum`] when it does not.
    pub fn check_payload(&self, crc: u32) -> Result<(), ProtocolError> {
        if crc == self.payload_crc {
            Ok(())
        } else {
            Err(ProtocolError::Checksum {
                part: "payload",
                sequence: self.sequence,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_survives_the_round_trip() {
        for &kind in Kind::ALL {
            let header = Header {
                length: 3,
                kind,
                sequence: 1 << 40,
                payload_crc: 0xdead_beef,
            };
            assert_eq!(Header::decode(&header.encode(), 1 << 40).unwrap(), header);
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_anything_is_read() {
        for &kind in Kind::ALL {
            let header = Header {
                length: u32::MAX,
                kind,
                sequence: 0,
                payload_crc: 0,
            };
            assert!(matches!(
                Header::decode(&header.encode(), 0),
                Err(ProtocolError::Length { .. })
            ));
        }
    }

    proptest! {
        #[test]
        fn no_flipped_bit_passes(byte in 0usize..HEADER_LENGTH, bit in 0u8..8) {
            let header = Header { length: 8, kind: Kind::Commit, sequence: 5, payload_crc: 1 };
            let mut bytes = header.encode();
            bytes[byte] ^= 1 << bit;
            prop_assert!(Header::decode(&bytes, 5).is_err());
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::array::uniform24(any::<u8>()), fix in any::<bool>()) {
            let mut bytes = bytes;
            if fix {
                let crc = crc32fast::hash(&bytes[..20]);
                bytes[20..].copy_from_slice(&crc.to_le_bytes());
            }
            let sequence = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
            if let Ok(header) = Header::decode(&bytes, sequence) {
                prop_assert!(header.length <= header.kind.max_payload());
            }
        }
    }
}
