//! The first bytes of a file, readable without anything that follows.
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic, as on a connection |
//! | 8..10 | version of the format |
//! | 10..12 | 3: a file |
//! | 12..16 | length of this head: 64 |
//! | 16..24 | features that the reader must have |
//! | 24..32 | where the page table begins, from version 2 on |
//! | 32..40 | reserved, zero |
//! | 40..48 | bytes that follow the head |
//! | 48..60 | reserved, zero |
//! | 60..64 | CRC-32 of bytes 0..60 |
//!
//! Numbers are little-endian. Magic and version keep their place in every version to come.

use super::error::SnapshotError;
use crate::protocol::preamble::MAGIC;

/// Bytes in a head.
pub(super) const LENGTH: usize = 64;
/// What a preamble says in a file.
const PURPOSE: u16 = 3;
/// Features that this build has.
const FEATURES: u64 = 0;

/// The head, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Version of the format.
    pub(super) version: u16,
    /// Offset of the page table, in bytes from the beginning of the file.
    pub(super) table: u64,
    /// Bytes that follow.
    pub(super) body: u64,
}

impl Head {
    pub(super) fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10..12].copy_from_slice(&PURPOSE.to_le_bytes());
        bytes[12..16].copy_from_slice(&(LENGTH as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&FEATURES.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.table.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.body.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Checks and decodes a head of a version up to `newest`. A newer version is named as such
    /// whatever the rest looks like.
    pub(super) fn decode(bytes: &[u8; LENGTH], newest: u16) -> Result<Self, SnapshotError> {
        if bytes[..8] != MAGIC {
            return Err(SnapshotError::not_whole("it begins like something else"));
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version > newest {
            return Err(SnapshotError::Version {
                found: version,
                newest,
            });
        }
        let refused = |reason: &str| Err(SnapshotError::not_whole(reason));
        if bytes[60..] != crc32fast::hash(&bytes[..60]).to_le_bytes() {
            return refused("the checksum of its head does not fit");
        }
        if bytes[10..12] != PURPOSE.to_le_bytes() {
            return refused("it begins like a connection");
        }
        if version == 0 || bytes[12..16] != (LENGTH as u32).to_le_bytes() {
            return refused("its head has a form that never was");
        }
        let unknown = u64_at(bytes, 16) & !FEATURES;
        if unknown != 0 {
            return Err(SnapshotError::Features { unknown });
        }
        Ok(Self {
            version,
            table: u64_at(bytes, 24),
            body: u64_at(bytes, 40),
        })
    }
}

fn u64_at(bytes: &[u8; LENGTH], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD: Head = Head {
        version: 2,
        table: 4096,
        body: 9000,
    };

    #[test]
    fn a_newer_version_is_named_whatever_the_rest_is() {
        let mut bytes = HEAD.encode();
        bytes[8] = 9;
        bytes[16] = 0xff;
        let refused = Head::decode(&bytes, 2);
        let (found, newest) = (9, 2);
        assert!(
            matches!(refused, Err(SnapshotError::Version { found: f, newest: n }) if (f, n) == (found, newest))
        );
    }

    #[test]
    fn an_unknown_feature_is_refused() {
        let mut bytes = HEAD.encode();
        bytes[16] = 4;
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        let refused = Head::decode(&bytes, 2);
        assert!(matches!(
            refused,
            Err(SnapshotError::Features { unknown: 4 })
        ));
    }

    proptest! {
        #[test]
        fn no_flipped_bit_passes(byte in 0usize..LENGTH, bit in 0u8..8) {
            let mut bytes = HEAD.encode();
            prop_assert_eq!(Head::decode(&bytes, 2).unwrap(), HEAD);
            bytes[byte] ^= 1 << bit;
            prop_assert!(Head::decode(&bytes, 2).is_err());
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), LENGTH)) {
            let mut whole = [0; LENGTH];
            whole.copy_from_slice(&bytes);
            prop_assert!(Head::decode(&whole, 2).is_err());
        }
    }
}
