//! The formats in which Linux packs its kernel, each with a bound on what comes out.

use std::fmt;
use std::io::{self, Read};

/// How a kernel is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not packed: the payload is the ELF file.
    None,
    /// CONFIG_KERNEL_GZIP.
    Gzip,
    /// CONFIG_KERNEL_XZ: LZMA2 behind the filter for x86 code.
    Xz,
    /// CONFIG_KERNEL_LZMA, the format before xz.
    Lzma,
    /// CONFIG_KERNEL_LZ4: the legacy frame format.
    Lz4,
    /// CONFIG_KERNEL_ZSTD.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "not packed",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

const LZ4_LEGACY_MAGIC: &[u8] = &[0x02, 0x21, 0x4c, 0x18];

impl Compression {
    /// The format, by the first bytes.
    pub(crate) fn of(payload: &[u8]) -> Option<Self> {
        let formats: [(&[u8], Self); 6] = [
            (b"\x7fELF", Self::None),
            (&[0x1f, 0x8b], Self::Gzip),
            (b"\xfd7zXZ\0", Self::Xz),
            // Properties of lc=3, lp=0, pb=2; low bytes of the dictionary size.
            (&[0x5d, 0, 0], Self::Lzma),
            (LZ4_LEGACY_MAGIC, Self::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Self::Zstd),
        ];
        let mut formats = formats.into_iter();
        formats
            .find(|(magic, _)| payload.starts_with(magic))
            .map(|(_, format)| format)
    }
}

/// Why a payload does not unpack.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The decoder refused.
    #[error("the packed data is damaged")]
    Decode(#[source] io::Error),
    /// The payload ends too early.
    #[error("the packed data is truncated")]
    Truncated,
    /// More comes out than may.
    #[error("the unpacked kernel is announced with {size} bytes, at most {limit} are possible")]
    TooLarge {
        /// What the payload announces.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// More or less comes out than announced.
    #[error("the kernel unpacks to {found} bytes or more, it is announced with {announced}")]
    Size {
        /// What came out.
        found: u64,
        /// What the payload announces.
        announced: u64,
    },
}

/// The most memory that a dictionary or window may take, in bytes. Linux packs with 128 MiB
/// windows (zstd) at most.
const MAX_DICTIONARY: u64 = 128 << 20;

/// Unpacks a payload: packed data, and the size of what is packed in its last four bytes. (In
/// gzip's format those four bytes are part of the data.)
pub(crate) fn unpack(
    compression: Compression,
    payload: &[u8],
    limit: u64,
) -> Result<Vec<u8>, UnpackError> {
    if compression == Compression::None {
        return Ok(payload.to_vec());
    }
    let Some((data, size)) = payload.split_last_chunk::<4>() else {
        return Err(UnpackError::Truncated);
    };
    let announced = u64::from(u32::from_le_bytes(*size));
    if announced > limit {
        let size = announced;
        return Err(UnpackError::TooLarge { size, limit });
    }
    // The decoder's own memory, with some room for its tables.
    let memory_kib = ((MAX_DICTIONARY + (16 << 20)) >> 10) as u32;
    let unpacked = match compression {
        Compression::None => payload.to_vec(),
        Compression::Gzip => collect(flate2::read::GzDecoder::new(payload), announced)?,
        Compression::Xz => {
            let reader = lzma_rust2::XzReader::new_mem_limit(data, false, memory_kib);
            collect(reader, announced)?
        }
        Compression::Lzma => {
            let reader = lzma_rust2::LzmaReader::new_mem_limit(data, memory_kib, None);
            collect(reader.map_err(UnpackError::Decode)?, announced)?
        }
        Compression::Lz4 => lz4(data, announced)?,
        Compression::Zstd => {
            let reader =
                ruzstd::decoding::StreamingDecoder::new_with_max_window_size(data, MAX_DICTIONARY);
            let reader = reader.map_err(|error| UnpackError::Decode(io::Error::other(error)))?;
            collect(reader, announced)?
        }
    };
    let found = unpacked.len() as u64;
    if found != announced {
        return Err(UnpackError::Size { found, announced });
    }
    Ok(unpacked)
}

/// Reads to the end, but one byte more than announced at most.
fn collect(reader: impl Read, announced: u64) -> Result<Vec<u8>, UnpackError> {
    let mut unpacked = Vec::new();
    let read = reader.take(announced + 1).read_to_end(&mut unpacked);
    read.map_err(UnpackError::Decode)?;
    Ok(unpacked)
}

/// The most that a block of the legacy format unpacks to.
const LZ4_BLOCK: usize = 8 << 20;

/// The legacy frame format of LZ4: magic, then blocks, each behind its packed size.
fn lz4(data: &[u8], announced: u64) -> Result<Vec<u8>, UnpackError> {
    let mut rest = data.get(LZ4_LEGACY_MAGIC.len()..).unwrap_or_default();
    let mut unpacked = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((size, behind)) = rest.split_first_chunk::<4>() {
        let size = u32::from_le_bytes(*size) as usize;
        let Some((packed, behind)) = behind.split_at_checked(size) else {
            return Err(UnpackError::Truncated);
        };
        let length = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| UnpackError::Decode(io::Error::other(error)))?;
        unpacked.extend_from_slice(&block[..length]);
        let found = unpacked.len() as u64;
        if found > announced {
            return Err(UnpackError::Size { found, announced });
        }
        rest = behind;
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests;
