//! Records of TLS 1.3 (RFC 8446, section 5), sealed and opened where they lie.

use std::io::IoSlice;

use ring::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::ConnectionTrafficSecrets;

use super::TlsFailure;

/// Bytes in front of a record.
pub(super) const HEADER: usize = 5;
/// Plain bytes in a record, at most.
pub(super) const MAX_PLAIN: usize = 16 << 10;
/// Bytes behind a record's header, at most: content, its type, padding and tag.
const MAX_SEALED: usize = MAX_PLAIN + 256;
/// Bytes of a record, at most.
pub(super) const MAX_RECORD: usize = HEADER + MAX_SEALED;
/// Bytes that a record of data is larger than what it carries.
const OVERHEAD: usize = HEADER + 1 + TAG;
const TAG: usize = 16;
const NONCE: usize = 12;
/// Records under one key. The weakest suite bears 2^24 full ones (RFC 8446, section 5.5).
pub(super) const RECORDS_PER_KEY: u64 = 1 << 23;

pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const DATA: u8 = 23;

/// What protects one direction, until the next key.
pub(super) struct Keys {
    key: LessSafeKey,
    iv: [u8; NONCE],
    sequence: u64,
}

impl Keys {
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, TlsFailure> {
        let (sequence, secrets) = secrets;
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (&aead::CHACHA20_POLY1305, key, iv)
            }
            _ => return Err(TlsFailure::Suite),
        };
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(TlsFailure::Cipher)?;
        let mut bytes = [0; NONCE];
        bytes.copy_from_slice(iv.as_ref().get(..NONCE).ok_or(TlsFailure::Suite)?);
        Ok(Self {
            key: LessSafeKey::new(key),
            iv: bytes,
            sequence,
        })
    }

    /// Records under this key so far.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The nonce of the next record; no two records have the same.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// Appends one record with the first bytes of `plain`, as many as it takes, and drops them
    /// from there; says how many.
    pub(super) fn seal(
        &mut self,
        kind: u8,
        plain: &mut &mut [IoSlice<'_>],
        to: &mut Vec<u8>,
    ) -> Result<usize, TlsFailure> {
        let start = to.len();
        to.extend_from_slice(&[DATA, 3, 3, 0, 0]);
        let mut taken = 0;
        while taken < MAX_PLAIN
            && let Some(first) = plain.first()
        {
            let count = first.len().min(MAX_PLAIN - taken);
            to.extend_from_slice(&first[..count]);
            IoSlice::advance_slices(plain, count);
            taken += count;
        }
        to.push(kind);
        let sealed = (taken + 1 + TAG) as u16;
        to[start + 3..start + HEADER].copy_from_slice(&sealed.to_be_bytes());
        let (header, content) = to[start..].split_at_mut(HEADER);
        let nonce = self.nonce();
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&*header), content)
            .map_err(TlsFailure::Cipher)?;
        to.extend_from_slice(tag.as_ref());
        Ok(taken)
    }

    /// Encrypts a full record's content where it lies: all of `content` but its last byte, which is
    /// kept, as the next record's content begins with it. Gives what belongs in front of the content
    /// and behind it.
    pub(super) fn seal_in_place(
        &mut self,
        kind: u8,
        content: &mut [u8; MAX_PLAIN + 1],
    ) -> Result<([u8; HEADER], [u8; 1 + TAG]), TlsFailure> {
        let [high, low] = ((MAX_PLAIN + 1 + TAG) as u16).to_be_bytes();
        let header = [DATA, 3, 3, high, low];
        let kept = std::mem::replace(&mut content[MAX_PLAIN], kind);
        let nonce = self.nonce();
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&header), content)
            .map_err(TlsFailure::Cipher)?;
        let mut behind = [0; 1 + TAG];
        behind[0] = std::mem::replace(&mut content[MAX_PLAIN], kept);
        behind[1..].copy_from_slice(tag.as_ref());
        Ok((header, behind))
    }

    /// Opens a whole record, as [`whole`] found it; gives its type, and where its content lies in
    /// it.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<(u8, usize), TlsFailure> {
        let (header, sealed) = record
            .split_at_mut_checked(HEADER)
            .ok_or(TlsFailure::Damaged)?;
        let nonce = self.nonce();
        let Ok(content) = self.key.open_in_place(nonce, Aad::from(&*header), sealed) else {
            return Err(TlsFailure::Damaged);
        };
        // Padding of zeros may follow the type.
        let at = content.iter().rposition(|&byte| byte != 0);
        let at = at
            .filter(|&at| at <= MAX_PLAIN)
            .ok_or(TlsFailure::Damaged)?;
        Ok((content[at], at))
    }
}

/// Bytes of the record that `bytes` begins with, when all of it is there.
pub(super) fn whole(bytes: &[u8]) -> Result<Option<usize>, TlsFailure> {
    let Some(&[kind, major, _, high, low]) = bytes.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let sealed = usize::from(u16::from_be_bytes([high, low]));
    // Behind the handshake nothing comes in the clear.
    if kind != DATA || major != 3 || !(TAG + 1..=MAX_SEALED).contains(&sealed) {
        return Err(TlsFailure::Damaged);
    }
    Ok(Some(HEADER + sealed).filter(|&length| length <= bytes.len()))
}

/// Bytes that records for `plain` bytes take.
pub(super) fn room_for(plain: usize) -> usize {
    plain + plain.div_ceil(MAX_PLAIN) * OVERHEAD
}
