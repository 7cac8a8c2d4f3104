//! The header by which a multiboot kernel is known (Multiboot 0.6.96, 3.1).

use super::MultibootError;

/// Where a header may lie: completely within so many bytes of the file.
const SEARCHED: usize = 8192;
const MAGIC: u32 = 0x1bad_b002;
/// Magic, flags, checksum.
const SHORT: usize = 12;
/// The same, and the addresses.
const LONG: usize = 32;

/// Bits of the flags.
mod flag {
    /// Modules start at page borders.
    pub(super) const PAGE_ALIGN: u32 = 1 << 0;
    /// The kernel wants to know the memory.
    pub(super) const MEMORY: u32 = 1 << 1;
    /// It has a wish for the video mode.
    pub(super) const VIDEO: u32 = 1 << 2;
    /// Bits that a loader must know, or else refuse the kernel.
    pub(super) const REQUIRED: u32 = 0xffff;
    /// The header says where the file is to be loaded.
    pub(super) const ADDRESSES: u32 = 1 << 16;
}

/// Where a file that is no ELF file, or must not be taken for one, is to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Where the header itself comes to lie.
    pub(super) header: u32,
    /// Where the first byte that is loaded comes to lie.
    pub(super) load: u32,
    /// End of what is loaded; 0 for all of the file.
    pub(super) load_end: u32,
    /// End of what is cleared behind that; 0 for nothing.
    pub(super) bss_end: u32,
    /// The first instruction.
    pub(super) entry: u32,
}

/// A multiboot header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Where it lies in the file.
    pub(super) offset: usize,
    /// The address fields, when they are to be used.
    pub(super) addresses: Option<Addresses>,
    /// The kernel would like a video mode, and gets none.
    pub(super) wants_video: bool,
}

impl Header {
    /// The first header in `image`, if it has one.
    ///
    /// # Errors
    /// [`MultibootError`] when it is cut off or asks for what is not offered here.
    pub(crate) fn find(image: &[u8]) -> Result<Option<Self>, MultibootError> {
        let searched = &image[..image.len().min(SEARCHED)];
        let mut at = 0;
        while let Some(fields) = searched.get(at..at + SHORT) {
            let [magic, flags, checksum] = [0, 4, 8].map(|field| u32_at(fields, field));
            if magic == MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0 {
                return Self::read(searched, at, flags).map(Some);
            }
            at += 4;
        }
        Ok(None)
    }

    fn read(searched: &[u8], offset: usize, flags: u32) -> Result<Self, MultibootError> {
        // Modules always start at a page border here, and memory is always told.
        let known = flag::PAGE_ALIGN | flag::MEMORY | flag::VIDEO;
        let unknown = flags & flag::REQUIRED & !known;
        if unknown != 0 {
            return Err(MultibootError::Flags { unknown });
        }
        let addresses = if flags & flag::ADDRESSES == 0 {
            None
        } else {
            let fields = searched.get(offset..offset + LONG);
            let fields = fields.ok_or(MultibootError::HeaderTruncated { offset })?;
            let [header, load, load_end, bss_end, entry] =
                [12, 16, 20, 24, 28].map(|field| u32_at(fields, field));
            Some(Addresses {
                header,
                load,
                load_end,
                bss_end,
                entry,
            })
        };
        Ok(Self {
            offset,
            addresses,
            wants_video: flags & flag::VIDEO != 0,
        })
    }
}

/// The callers have checked that the field lies within the slice.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}
