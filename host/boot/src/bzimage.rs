//! The bzImage: a real-mode setup, a decompressor, and the packed kernel, of which only the last
//! is used (Linux `Documentation/arch/x86/boot.rst`).
//!
//! ```text
//! 0x1f1 setup header        (1 + setup sectors) × 512      + payload offset
//! ├── real-mode setup ──────┼── 64-bit decompressor ───────┼── payload, 4 bytes of its unpacked size
//! ```

use crate::unpack::{self, Compression, UnpackError};

const SETUP_SECTORS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const HEADER_END: usize = 0x250;
const SECTOR: usize = 512;
/// The first protocol version whose header says where the payload is.
const VERSION_WITH_PAYLOAD: u16 = 0x208;

/// Why a bzImage cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// The image ends before something that it announces.
    #[error("the file is truncated: {what} ends at byte {end}, the file has {size}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it should end.
        end: usize,
        /// Bytes in the file.
        size: usize,
    },
    /// Older than Linux 2.6.26.
    #[error(
        "boot protocol {version:#x} does not say where the packed kernel is, 0x208 and later do"
    )]
    TooOld {
        /// The version.
        version: u16,
    },
    /// The payload is packed in a way that is unknown here.
    #[error("the kernel is packed in an unknown format (it starts with {magic:02x?})")]
    UnknownCompression {
        /// The first bytes.
        magic: Vec<u8>,
    },
    /// The payload does not unpack.
    #[error("failed to unpack the kernel ({compression})")]
    Unpack {
        /// How it is packed.
        compression: Compression,
        /// What went wrong.
        #[source]
        source: UnpackError,
    },
}

pub(crate) fn is_bzimage(image: &[u8]) -> bool {
    image.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(&[0x55, 0xaa])
        && image.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS")
}

/// The unpacked kernel, of `limit` bytes at most.
pub(crate) fn unpack(image: &[u8], limit: u64) -> Result<Vec<u8>, BzImageError> {
    let payload = payload(image)?;
    let Some(compression) = Compression::of(payload) else {
        let magic = payload[..payload.len().min(6)].to_vec();
        return Err(BzImageError::UnknownCompression { magic });
    };
    unpack::unpack(compression, payload, limit).map_err(|source| BzImageError::Unpack {
        compression,
        source,
    })
}

fn payload(image: &[u8]) -> Result<&[u8], BzImageError> {
    let truncated = |what, end| BzImageError::Truncated {
        what,
        end,
        size: image.len(),
    };
    let header = image
        .get(..HEADER_END)
        .ok_or_else(|| truncated("the setup header", HEADER_END))?;
    let version = u16::from_le_bytes([header[PROTOCOL_VERSION], header[PROTOCOL_VERSION + 1]]);
    if version < VERSION_WITH_PAYLOAD {
        return Err(BzImageError::TooOld { version });
    }
    let field = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize
    };
    let sectors = match usize::from(header[SETUP_SECTORS]) {
        // For reasons of age, zero means four.
        0 => 4,
        sectors => sectors,
    };
    let start = (1 + sectors) * SECTOR + field(PAYLOAD_OFFSET);
    let end = start + field(PAYLOAD_LENGTH);
    let payload = image.get(start..end);
    payload.ok_or_else(|| truncated("the packed kernel", end))
}
