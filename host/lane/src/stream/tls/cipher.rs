//! The ciphers of TLS 1.3, from memory of any kind into memory of any kind.
//!
//! Encrypting and copying in one go costs little more than copying. That takes a library that reads
//! here and writes there; and since "there" may be guest RAM, where no Rust reference may go, it is
//! called by address.

use std::ptr::NonNull;

use aws_lc_sys::{
    EVP_AEAD, EVP_AEAD_CTX, EVP_AEAD_CTX_free, EVP_AEAD_CTX_new, EVP_AEAD_CTX_open_gather,
    EVP_AEAD_CTX_seal_scatter, EVP_aead_aes_128_gcm, EVP_aead_aes_256_gcm,
    EVP_aead_chacha20_poly1305,
};
use rustls::ConnectionTrafficSecrets;

use super::TlsFailure;
use super::records::HEADER;
use crate::stream::RawSlice;

/// Bytes of a tag.
pub(super) const TAG: usize = 16;
/// Bytes of a nonce.
pub(super) const NONCE: usize = 12;

/// A record on its way between sealed and open.
pub(super) struct Record<'a> {
    pub(super) header: &'a [u8],
    /// Content and kind, encrypted.
    pub(super) sealed: &'a mut [u8],
    pub(super) tag: &'a [u8],
}

/// A key with its algorithm.
pub(super) struct Cipher(NonNull<EVP_AEAD_CTX>);

// SAFETY: the context belongs to this value alone, and is only read after it was made.
#[expect(unsafe_code, reason = "the context is an owned allocation")]
unsafe impl Send for Cipher {}

impl Cipher {
    /// The cipher for `secrets`, and the bytes that its nonces are made from.
    pub(super) fn new(
        secrets: &ConnectionTrafficSecrets,
    ) -> Result<(Self, [u8; NONCE]), TlsFailure> {
        // SAFETY: these functions take nothing, and give addresses of constants.
        #[expect(unsafe_code, reason = "the library is C")]
        let (algorithm, key, iv) = unsafe {
            match secrets {
                ConnectionTrafficSecrets::Aes128Gcm { key, iv } => {
                    (EVP_aead_aes_128_gcm(), key, iv)
                }
                ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
                    (EVP_aead_aes_256_gcm(), key, iv)
                }
                ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                    (EVP_aead_chacha20_poly1305(), key, iv)
                }
                _ => return Err(TlsFailure::Suite),
            }
        };
        let bytes = iv.as_ref().first_chunk().ok_or(TlsFailure::Suite)?;
        Ok((Self::with(algorithm, key.as_ref())?, *bytes))
    }

    fn with(algorithm: *const EVP_AEAD, key: &[u8]) -> Result<Self, TlsFailure> {
        // SAFETY: the algorithm is one of the library's constants, the key is read and copied; a
        // length that does not fit is refused.
        #[expect(unsafe_code, reason = "the library is C")]
        let context = unsafe { EVP_AEAD_CTX_new(algorithm, key.as_ptr(), key.len(), TAG) };
        NonNull::new(context).map(Self).ok_or(TlsFailure::Cipher)
    }

    /// Appends `header`, what `content` and behind it `kind` encrypt to, and the tag. When others write
    /// `content` meanwhile, what is encrypted is each byte as it was at some moment of the call.
    pub(super) fn seal(
        &self,
        nonce: &[u8; NONCE],
        header: &[u8; HEADER],
        (content, kind): (RawSlice, u8),
        to: &mut Vec<u8>,
    ) -> Result<(), TlsFailure> {
        to.extend_from_slice(header);
        let start = to.len();
        to.reserve(content.len() + 1 + TAG);
        let room = &mut to.spare_capacity_mut()[..content.len() + 1 + TAG];
        let (sealed, behind) = room.split_at_mut(content.len());
        let mut written = 0;
        // SAFETY: the content is valid for reads of its length, which `RawSlice` vouches for; `room`
        // has as many bytes for it and the tag with the sealed kind behind it, and is elsewhere,
        // being ours alone. Everything else is a slice that lives across the call.
        #[expect(unsafe_code, reason = "the library is C")]
        let result = unsafe {
            EVP_AEAD_CTX_seal_scatter(
                self.0.as_ptr(),
                sealed.as_mut_ptr().cast(),
                behind.as_mut_ptr().cast(),
                &raw mut written,
                behind.len(),
                nonce.as_ptr(),
                NONCE,
                content.address(),
                content.len(),
                &raw const kind,
                1,
                header.as_ptr(),
                header.len(),
            )
        };
        if result != 1 || written != 1 + TAG {
            return Err(TlsFailure::Cipher);
        }
        // SAFETY: the call succeeded, so it has written all of the room behind `start`.
        #[expect(unsafe_code, reason = "the library has filled the vector")]
        unsafe {
            to.set_len(start + content.len() + 1 + TAG);
        }
        Ok(())
    }

    /// Decrypts to the beginning of `to`, which has to have room for as many bytes as were sealed.
    /// They are worth nothing when it fails.
    pub(super) fn open(
        &self,
        nonce: &[u8; NONCE],
        record: &Record<'_>,
        to: RawSlice,
    ) -> Result<(), TlsFailure> {
        if to.len() < record.sealed.len() {
            return Err(TlsFailure::Cipher);
        }
        self.decrypt(nonce, record, to.address())
    }

    /// Decrypts where it lies.
    pub(super) fn open_in_place(
        &self,
        nonce: &[u8; NONCE],
        record: &mut Record<'_>,
    ) -> Result<(), TlsFailure> {
        let here = record.sealed.as_mut_ptr();
        self.decrypt(nonce, record, here)
    }

    /// Decrypts to `to`: as many bytes as were sealed, elsewhere or where they lie.
    fn decrypt(
        &self,
        nonce: &[u8; NONCE],
        record: &Record<'_>,
        to: *mut u8,
    ) -> Result<(), TlsFailure> {
        // SAFETY: `to` is valid for writes of as many bytes as were sealed: the callers have a raw
        // slice of that length, or the sealed bytes themselves, borrowed for writing, which the
        // library allows. Everything else is a slice that lives across the call.
        #[expect(unsafe_code, reason = "the library is C")]
        let result = unsafe {
            EVP_AEAD_CTX_open_gather(
                self.0.as_ptr(),
                to,
                nonce.as_ptr(),
                NONCE,
                record.sealed.as_ptr(),
                record.sealed.len(),
                record.tag.as_ptr(),
                record.tag.len(),
                record.header.as_ptr(),
                record.header.len(),
            )
        };
        if result == 1 {
            Ok(())
        } else {
            Err(TlsFailure::Damaged)
        }
    }
}

impl Drop for Cipher {
    fn drop(&mut self) {
        // SAFETY: the context came from `EVP_AEAD_CTX_new`, and nobody else has it.
        #[expect(unsafe_code, reason = "the library is C")]
        unsafe {
            EVP_AEAD_CTX_free(self.0.as_ptr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex
            .bytes()
            .map(|c| (c as char).to_digit(16).unwrap() as u8)
            .collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    fn raw(bytes: &mut [u8]) -> RawSlice {
        // SAFETY: the memory is the test's own, and outlives the slice.
        #[expect(unsafe_code, reason = "the test vouches for its memory")]
        unsafe {
            RawSlice::new(NonNull::from(&mut *bytes).cast(), bytes.len())
        }
    }

    fn aes_128(key: &[u8]) -> Cipher {
        // SAFETY: gives the address of a constant.
        #[expect(unsafe_code, reason = "the library is C")]
        Cipher::with(unsafe { EVP_aead_aes_128_gcm() }, key).unwrap()
    }

    /// Splits what was sealed behind a header.
    fn record(sealed: &mut [u8]) -> Record<'_> {
        let (header, sealed) = sealed.split_at_mut(HEADER);
        let (sealed, tag) = sealed.split_at_mut(sealed.len() - TAG);
        Record {
            header,
            sealed,
            tag,
        }
    }

    /// Test case 3 of GCM's proposal (McGrew and Viega, appendix B), which has no header: its tag is
    /// left out, and the last byte of its text stands for the record's kind.
    #[test]
    fn a_published_text_comes_out_whatever_the_memory() {
        let cipher = aes_128(&bytes("feffe9928665731c6d6a8f9467308308"));
        let nonce: [u8; NONCE] = bytes("cafebabefacedbaddecaf888").try_into().unwrap();
        let mut plain = bytes(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72\
             1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255",
        );
        let kind = plain.pop().unwrap();
        let sealed = bytes(
            "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e\
             21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091473f5985",
        );
        let mut out = vec![1, 2];
        let content = (raw(&mut plain), kind);
        cipher
            .seal(&nonce, &[7; HEADER], content, &mut out)
            .unwrap();
        assert_eq!(out[..2], [1, 2]);
        assert_eq!(out[2..2 + HEADER], [7; HEADER]);
        assert_eq!(out[2 + HEADER..out.len() - TAG], sealed);
        plain.push(kind);
        let mut elsewhere = vec![0; plain.len() + 3];
        let mut parts = record(&mut out[2..]);
        cipher.open(&nonce, &parts, raw(&mut elsewhere)).unwrap();
        assert_eq!(elsewhere[..plain.len()], plain);
        assert_eq!(elsewhere[plain.len()..], [0; 3]);
        let small = raw(&mut elsewhere[..plain.len() - 1]);
        assert!(cipher.open(&nonce, &parts, small).is_err());
        cipher.open_in_place(&nonce, &mut parts).unwrap();
        assert_eq!(parts.sealed, plain);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let cipher = aes_128(&[7; 16]);
        let mut out = Vec::new();
        let content = (raw(&mut [9; 20]), 23);
        cipher
            .seal(&[1; NONCE], &[5; HEADER], content, &mut out)
            .unwrap();
        for bit in 0..out.len() * 8 {
            let mut damaged = out.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let opened = cipher.open_in_place(&[1; NONCE], &mut record(&mut damaged));
            assert!(matches!(opened, Err(TlsFailure::Damaged)), "bit {bit}");
        }
    }

    #[test]
    fn a_key_of_the_wrong_length_is_refused() {
        // SAFETY: gives the address of a constant.
        #[expect(unsafe_code, reason = "the library is C")]
        let algorithm = unsafe { EVP_aead_aes_256_gcm() };
        assert!(Cipher::with(algorithm, &[1; 16]).is_err());
    }
}
