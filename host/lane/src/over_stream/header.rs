//! What goes in front of each operation's payload.

use crate::page::Placement;

/// Bytes of a header.
pub(super) const HEADER: usize = 28;
/// Bytes of one entry of the placement table.
pub(super) const ENTRY: usize = 12;
/// Where the checksum of the table stands.
const TABLE_CRC: usize = 20;
/// The part of the header that its checksum covers.
const COVERED: usize = 24;

const WRITE: u8 = 1;
const MESSAGE: u8 = 2;
const CHECKED: u8 = 1;

/// Kinds of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Message,
}

/// A header, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// Entries of the placement table, which follows the header.
    pub(super) placements: u16,
    /// Bytes of payload behind the table.
    pub(super) payload: u32,
    pub(super) sequence: u64,
    /// CRC-32 of the payload, when it is checked at all.
    pub(super) payload_crc: Option<u32>,
}

impl Header {
    /// Appends the header and the table to `to`.
    pub(super) fn encode(&self, table: &[Placement], to: &mut Vec<u8>) {
        let start = to.len();
        to.push(match self.kind {
            Kind::Write => WRITE,
            Kind::Message => MESSAGE,
        });
        to.push(self.payload_crc.map_or(0, |_| CHECKED));
        to.extend_from_slice(&self.placements.to_le_bytes());
        to.extend_from_slice(&self.payload.to_le_bytes());
        to.extend_from_slice(&self.sequence.to_le_bytes());
        to.extend_from_slice(&self.payload_crc.unwrap_or(0).to_le_bytes());
        to.extend_from_slice(&[0; HEADER - TABLE_CRC]);
        for placement in table {
            to.extend_from_slice(&placement.target.to_le_bytes());
            to.extend_from_slice(&placement.length.to_le_bytes());
        }
        let crc = crc32fast::hash(&to[start + HEADER..]);
        to[start + TABLE_CRC..start + COVERED].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32fast::hash(&to[start..start + COVERED]);
        to[start + COVERED..start + HEADER].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads a header.
    pub(super) fn decode(bytes: &[u8; HEADER]) -> Result<Self, String> {
        if crc32fast::hash(&bytes[..COVERED]) != u32_at(bytes, COVERED) {
            return Err("the checksum of a header does not fit".to_owned());
        }
        let kind = match bytes[0] {
            WRITE => Kind::Write,
            MESSAGE => Kind::Message,
            other => return Err(format!("operation of unknown kind {other}")),
        };
        let payload_crc = match bytes[1] {
            0 => None,
            CHECKED => Some(u32_at(bytes, 16)),
            other => return Err(format!("operation with unknown flags {other:#x}")),
        };
        Ok(Self {
            kind,
            placements: u16::from_le_bytes([bytes[2], bytes[3]]),
            payload: u32_at(bytes, 4),
            sequence: u64_at(bytes, 8),
            payload_crc,
        })
    }

    /// Bytes of the placement table.
    pub(super) fn table_bytes(&self) -> usize {
        usize::from(self.placements) * ENTRY
    }

    /// Does the table fit the checksum that the header in `bytes` has for it?
    pub(super) fn check_table(bytes: &[u8; HEADER], table: &[u8]) -> Result<(), String> {
        if crc32fast::hash(table) == u32_at(bytes, TABLE_CRC) {
            Ok(())
        } else {
            Err("the checksum of a placement table does not fit".to_owned())
        }
    }
}

/// The entries of an encoded table.
pub(super) fn placements(table: &[u8]) -> impl Iterator<Item = Placement> + '_ {
    table.chunks_exact(ENTRY).map(|entry| Placement {
        target: u64_at(entry, 0),
        length: u32_at(entry, 8),
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(header: Header, table: &[Placement]) -> Vec<u8> {
        let mut bytes = Vec::new();
        header.encode(table, &mut bytes);
        bytes
    }

    fn head(bytes: &[u8]) -> [u8; HEADER] {
        bytes[..HEADER].try_into().unwrap()
    }

    #[test]
    fn what_was_encoded_comes_back() {
        let table = [
            Placement {
                target: 1 << 40,
                length: 4096,
            },
            Placement {
                target: 0,
                length: 1,
            },
        ];
        for payload_crc in [None, Some(0), Some(0x1234_5678)] {
            let header = Header {
                kind: Kind::Write,
                placements: 2,
                payload: 4097,
                sequence: 77,
                payload_crc,
            };
            let bytes = encoded(header, &table);
            assert_eq!(bytes.len(), HEADER + header.table_bytes());
            assert_eq!(Header::decode(&head(&bytes)), Ok(header));
            assert_eq!(Header::check_table(&head(&bytes), &bytes[HEADER..]), Ok(()));
            assert_eq!(placements(&bytes[HEADER..]).collect::<Vec<_>>(), table);
        }
    }

    #[test]
    fn every_flipped_bit_of_head_and_table_is_noticed() {
        let table = [Placement {
            target: 4096,
            length: 3,
        }];
        let header = Header {
            kind: Kind::Write,
            placements: 1,
            payload: 3,
            sequence: 1,
            payload_crc: Some(5),
        };
        let bytes = encoded(header, &table);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let head = head(&damaged);
            let decoded = Header::decode(&head);
            let checked = decoded.and_then(|_| Header::check_table(&head, &damaged[HEADER..]));
            assert!(checked.is_err(), "bit {bit}");
        }
    }
}
