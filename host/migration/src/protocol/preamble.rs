//! What stands before everything else on a connection and in a file.
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic, `"DUNLIN\x1aM"` |
//! | 8..10 | protocol version |
//! | 10..12 | purpose: 1 move, 2 inquiry, 3 file, 4 page lane, 5 post-copy, 6 hand-over |
//! | 12..16 | length of the preamble itself: 64 |
//! | 16..24 | features that the reader must have |
//! | 24..40 | session token |
//! | 40..48 | bytes that follow, for a file; which set of connections, for a post-copy; else 0 |
//! | 48..50 | number of a page lane, or of a post-copy's connection; else 0 |
//! | 50..60 | reserved, zero |
//! | 60..64 | CRC-32 of bytes 0..60 |
//!
//! Numbers are little-endian. Magic and version keep their place in every version to come.

use std::fmt;

use super::ProtocolError;

/// The version of the protocol and the file format that this build speaks.
pub const VERSION: u16 = 2;

/// Bytes in a preamble.
pub const LENGTH: usize = 64;

/// Features that this build has.
pub const FEATURES: u64 = 0;

/// First bytes of a connection, and of a file.
pub(crate) const MAGIC: [u8; 8] = *b"DUNLIN\x1aM";

/// Names one attempt to move a guest; unguessable, new for each attempt.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token([u8; 16]);

impl Token {
    /// A token from its bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// A new token from the kernel's random numbers.
    ///
    /// # Errors
    /// What the kernel said when it has no random numbers.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0u8; 16];
        // SAFETY: the pointer and length describe `bytes`, which the call fills.
        #[expect(unsafe_code, reason = "getrandom has no safe wrapper in std")]
        let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if count != bytes.len() as isize {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({self})")
    }
}

/// What a connection, or a file, is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A guest moves.
    Move,
    /// The source asks who owns a guest after a connection broke.
    Inquiry,
    /// A guest at rest.
    File,
    /// One more connection of a session, which carries pages.
    Lane,
    /// A guest passes to another process of the same host.
    HandOver,
    /// One of the connections of a post-copy; see [`crate::postcopy`].
    PostCopy,
}

/// The preamble, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What the connection is for.
    pub purpose: Purpose,
    /// The session.
    pub token: Token,
    /// Bytes that follow, in a file; which set of connections, for a post-copy; else zero.
    pub body_length: u64,
    /// Number of a page lane, or of a post-copy's connection; else zero.
    pub lane: u16,
}

impl Preamble {
    /// The preamble of a connection.
    pub fn connection(purpose: Purpose, token: Token) -> Self {
        Self {
            purpose,
            token,
            body_length: 0,
            lane: 0,
        }
    }

    /// The preamble as it travels.
    pub fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0u8; LENGTH];
        let purpose: u16 = match self.purpose {
            Purpose::Move => 1,
            Purpose::Inquiry => 2,
            Purpose::File => 3,
            Purpose::Lane => 4,
            Purpose::PostCopy => 5,
            Purpose::HandOver => 6,
        };
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&purpose.to_le_bytes());
        bytes[12..16].copy_from_slice(&(LENGTH as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&FEATURES.to_le_bytes());
        bytes[24..40].copy_from_slice(self.token.as_bytes());
        bytes[40..48].copy_from_slice(&self.body_length.to_le_bytes());
        bytes[48..50].copy_from_slice(&self.lane.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Checks and decodes a preamble. Magic and version are looked at first, so that a peer of
    /// another version is named as such whatever the rest of its preamble looks like.
    ///
    /// # Errors
    /// [`ProtocolError`] when it is not ours, not of our version, or damaged.
    pub fn decode(bytes: &[u8; LENGTH]) -> Result<Self, ProtocolError> {
        if bytes[..8] != MAGIC {
            return Err(ProtocolError::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != VERSION {
            return Err(ProtocolError::Version {
                theirs: version,
                ours: VERSION,
            });
        }
        let damaged = |reason| Err(ProtocolError::Preamble { reason });
        if bytes[60..] != crc32fast::hash(&bytes[..60]).to_le_bytes() {
            return damaged("its checksum does not fit");
        }
        if bytes[12..16] != (LENGTH as u32).to_le_bytes() {
            return damaged("its length is not 64");
        }
        let features = u64_at(bytes, 16);
        if features & !FEATURES != 0 {
            return Err(ProtocolError::Features {
                unknown: features & !FEATURES,
            });
        }
        let purpose = match u16::from_le_bytes([bytes[10], bytes[11]]) {
            1 => Purpose::Move,
            2 => Purpose::Inquiry,
            3 => Purpose::File,
            4 => Purpose::Lane,
            5 => Purpose::PostCopy,
            6 => Purpose::HandOver,
            _ => return damaged("its purpose is unknown"),
        };
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[24..40]);
        Ok(Self {
            purpose,
            token: Token(token),
            body_length: u64_at(bytes, 40),
            lane: u16::from_le_bytes([bytes[48], bytes[49]]),
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

    fn preamble() -> Preamble {
        Preamble {
            purpose: Purpose::Inquiry,
            token: Token::from_bytes([7; 16]),
            body_length: 9,
            lane: 3,
        }
    }

    #[test]
    fn a_preamble_survives_the_round_trip() {
        assert_eq!(Preamble::decode(&preamble().encode()).unwrap(), preamble());
    }

    #[test]
    fn another_version_is_named_with_ours() {
        let mut bytes = preamble().encode();
        bytes[8] = 99;
        let message = Preamble::decode(&bytes).unwrap_err().to_string();
        assert!(message.contains("99") && message.contains(&VERSION.to_string()));
    }

    proptest! {
        #[test]
        fn no_flipped_bit_passes(byte in 0usize..LENGTH, bit in 0u8..8) {
            let mut bytes = preamble().encode();
            bytes[byte] ^= 1 << bit;
            prop_assert!(Preamble::decode(&bytes).is_err());
        }

        #[test]
        fn random_bytes_are_refused(bytes in proptest::array::uniform32(any::<u8>())) {
            let mut whole = [0; LENGTH];
            whole[..32].copy_from_slice(&bytes);
            prop_assert!(Preamble::decode(&whole).is_err());
        }
    }
}
