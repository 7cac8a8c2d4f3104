//! Records of TLS 1.3 (RFC 8446, section 5).

use std::io::IoSlice;
use std::ptr::NonNull;

use rustls::ConnectionTrafficSecrets;

use super::TlsFailure;
use super::cipher::{Cipher, NONCE, Record, TAG};
use crate::stream::RawSlice;

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
/// Records under one key. The weakest suite bears 2^24 full ones (RFC 8446, section 5.5).
pub(super) const RECORDS_PER_KEY: u64 = 1 << 23;

pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const DATA: u8 = 23;

/// What protects one direction, until the next key.
pub(super) struct Keys {
    cipher: Cipher,
    iv: [u8; NONCE],
    sequence: u64,
}

impl Keys {
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, TlsFailure> {
        let (sequence, secrets) = secrets;
        let (cipher, iv) = Cipher::new(&secrets)?;
        Ok(Self {
            cipher,
            iv,
            sequence,
        })
    }

    /// Records under this key so far.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The nonce of the next record; no two records have the same.
    fn nonce(&mut self) -> [u8; NONCE] {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence += 1;
        nonce
    }

    /// Appends one record with the first bytes of `plain`, as many as it takes, and drops them
    /// from there; says how many.
    pub(super) fn seal(
        &mut self,
        kind: u8,
        plain: &mut &mut [IoSlice<'_>],
        to: &mut Vec<u8>,
    ) -> Result<usize, TlsFailure> {
        let mut small = Vec::new();
        let first = plain.first().map_or(0, |first| first.len());
        let taken = if first >= MAX_PLAIN || plain.len() == 1 {
            let taken = first.min(MAX_PLAIN);
            self.seal_raw(kind, readable(&plain[0][..taken]), to)?;
            IoSlice::advance_slices(plain, taken);
            taken
        } else {
            while small.len() < MAX_PLAIN
                && let Some(first) = plain.first()
            {
                let count = first.len().min(MAX_PLAIN - small.len());
                small.extend_from_slice(&first[..count]);
                IoSlice::advance_slices(plain, count);
            }
            self.seal_raw(kind, readable(&small), to)?;
            small.len()
        };
        Ok(taken)
    }

    /// Appends one record with all of `content`, [`MAX_PLAIN`] bytes at most.
    pub(super) fn seal_raw(
        &mut self,
        kind: u8,
        content: RawSlice,
        to: &mut Vec<u8>,
    ) -> Result<(), TlsFailure> {
        let [high, low] = ((content.len() + 1 + TAG) as u16).to_be_bytes();
        let header = [DATA, 3, 3, high, low];
        let nonce = self.nonce();
        self.cipher.seal(&nonce, &header, (content, kind), to)
    }

    /// Opens a whole record, as [`whole`] found it; gives its type, and where its content lies in
    /// it.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<(u8, usize), TlsFailure> {
        let nonce = self.nonce();
        let mut record = parts(record)?;
        self.cipher.open_in_place(&nonce, &mut record)?;
        unpad(record.sealed)
    }

    /// Opens a whole record; data without padding goes to `to`, which has room for [`opened_bytes`]
    /// of it: as many are overwritten, whatever the content.
    pub(super) fn open_to(&mut self, record: &mut [u8], to: RawSlice) -> Result<Where, TlsFailure> {
        let nonce = self.nonce();
        let record = parts(record)?;
        self.cipher.open(&nonce, &record, to)?;
        let sealed = record.sealed;
        let mut kind = [0];
        let mut last = to;
        let content = last.split_front(sealed.len() - 1);
        last.copy_to(&mut kind);
        if kind == [DATA] {
            return Ok(Where::There(content.len()));
        }
        to.copy_to(sealed);
        let (kind, length) = unpad(sealed)?;
        Ok(Where::Here(kind, length))
    }
}

/// Where a record's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Where {
    /// Where it was to go: so many bytes of data.
    There(usize),
    /// In the record itself: its type, and bytes.
    Here(u8, usize),
}

/// Bytes that opening a record writes.
pub(super) fn opened_bytes(record: usize) -> usize {
    record.saturating_sub(HEADER + TAG)
}

/// Takes a record apart.
fn parts(record: &mut [u8]) -> Result<Record<'_>, TlsFailure> {
    let (header, sealed) = record
        .split_at_mut_checked(HEADER)
        .ok_or(TlsFailure::Damaged)?;
    let length = sealed.len().checked_sub(TAG).filter(|&length| length > 0);
    let (sealed, tag) = sealed.split_at_mut(length.ok_or(TlsFailure::Damaged)?);
    Ok(Record {
        header,
        sealed,
        tag,
    })
}

/// The type of what was opened, and the bytes before it: padding of zeros may follow.
fn unpad(content: &[u8]) -> Result<(u8, usize), TlsFailure> {
    let at = content.iter().rposition(|&byte| byte != 0);
    let at = at
        .filter(|&at| at <= MAX_PLAIN)
        .ok_or(TlsFailure::Damaged)?;
    Ok((content[at], at))
}

/// Bytes that are only read, by address.
fn readable(bytes: &[u8]) -> RawSlice {
    // SAFETY: the memory is borrowed for as long as the callers use the slice, and they read it.
    #[expect(unsafe_code, reason = "the cipher reads by address")]
    unsafe {
        RawSlice::new(NonNull::from(bytes).cast(), bytes.len())
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
