//! ELF files: ELF64 with a PVH note, the form in which a guest kernel is loaded, and the ELF32 and
//! ELF64 files of multiboot kernels.
//!
//! System V ABI, chapters 4 and 5 (file header, program headers, notes); PVH boot protocol (the
//! note of the owner "Xen" with the 32-bit entry).

use dunlin_guest::{GuestAddress, Memory, layout};
use vm_memory::Bytes;

const MAGIC: &[u8] = b"\x7fELF";
const HEADER_SIZE: usize = 64;
const HEADER_SIZE_32: usize = 52;
const PROGRAM_HEADER_SIZE: usize = 56;
const PROGRAM_HEADER_SIZE_32: usize = 32;
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const NOTE_PVH_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";

/// Why an ELF file cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The image ends before something that it announces.
    #[error("the ELF file is truncated: {what} ends at byte {end}, the file has {size}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// Bytes in the file.
        size: usize,
    },
    /// The image announces something that cannot be.
    #[error("the ELF file is damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
    /// Another architecture.
    #[error(
        "the ELF file is not for x86-64 (class {class}, byte order {order}, machine {machine})"
    )]
    WrongMachine {
        /// EI_CLASS.
        class: u8,
        /// EI_DATA.
        order: u8,
        /// e_machine.
        machine: u16,
    },
    /// Another architecture, in a multiboot kernel.
    #[error(
        "the ELF file is not for 32-bit or 64-bit x86 (class {class}, byte order {order}, machine {machine})"
    )]
    NotX86 {
        /// EI_CLASS.
        class: u8,
        /// EI_DATA.
        order: u8,
        /// e_machine.
        machine: u16,
    },
    /// Not built for PVH.
    #[error("the ELF file has no PVH entry note: Linux needs CONFIG_PVH=y")]
    NoPvhNote,
    /// The entry lies in no segment.
    #[error("the entry {entry:#x} lies in no segment of the ELF file")]
    EntryOutside {
        /// The entry.
        entry: u64,
    },
    /// A segment does not fit.
    #[error(
        "segment {start:#x}+{size:#x} lies outside of the RAM from {:#x} to {ram_end:#x}",
        layout::LEGACY_HOLE_END
    )]
    OutsideRam {
        /// First guest physical address.
        start: u64,
        /// Bytes.
        size: u64,
        /// End of low RAM.
        ram_end: u64,
    },
    /// No segment at all.
    #[error("the ELF file has no segment to load")]
    Empty,
    /// Guest memory refused.
    #[error("failed to write a segment to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LoadedKernel {
    /// The first instruction.
    pub(crate) entry: u32,
    /// First address above the kernel.
    pub(crate) end: u64,
}

#[derive(Debug, Clone, Copy)]
struct ProgramHeader {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

pub(crate) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(MAGIC)
}

/// Is it an ELF64 file with a readable PVH note?
pub(crate) fn has_pvh_note(image: &[u8]) -> bool {
    let headers = program_headers(image);
    headers.is_ok_and(|headers| pvh_entry(image, &headers).is_ok())
}

/// Loads the segments and finds the entry that the PVH note names. Nothing is written unless all
/// of it fits.
pub(crate) fn load(image: &[u8], memory: &Memory) -> Result<LoadedKernel, ElfError> {
    let headers = program_headers(image)?;
    let end = check_segments(image, &headers, memory)?;
    let entry = pvh_entry(image, &headers)?;
    load_checked(image, &headers, memory, LoadedEntry { entry, end })
}

/// Loads an ELF32 or ELF64 file that starts at the entry in its header, in 32-bit code. That is a
/// virtual address; a kernel that is linked for another one starts at the physical address of the
/// same byte, as with other loaders.
pub(crate) fn load_by_entry(image: &[u8], memory: &Memory) -> Result<LoadedKernel, ElfError> {
    let (headers, entry) = program_headers_of_any(image)?;
    let end = check_segments(image, &headers, memory)?;
    let physical = |h: &ProgramHeader| {
        let at = entry.checked_sub(h.virtual_address)?;
        (at < h.memory_size).then(|| h.physical + at)
    };
    let entry = loads(&headers).find_map(physical).unwrap_or(entry);
    load_checked(image, &headers, memory, LoadedEntry { entry, end })
}

/// The segments to load.
fn loads(headers: &[ProgramHeader]) -> impl Iterator<Item = &ProgramHeader> {
    let all = headers.iter().filter(|header| header.kind == SEGMENT_LOAD);
    all.filter(|header| header.memory_size > 0)
}

/// Checks all segments; the end of the highest.
fn check_segments(
    image: &[u8],
    headers: &[ProgramHeader],
    memory: &Memory,
) -> Result<u64, ElfError> {
    let ram_end = memory.size().min(layout::LOW_RAM_END);
    let mut end = 0;
    for header in loads(headers) {
        end = end.max(check_segment(image, header, ram_end)?);
    }
    if end == 0 {
        return Err(ElfError::Empty);
    }
    Ok(end)
}

/// Where a kernel starts and ends.
#[derive(Debug, Clone, Copy)]
struct LoadedEntry {
    entry: u64,
    end: u64,
}

/// Writes segments that were checked.
fn load_checked(
    image: &[u8],
    headers: &[ProgramHeader],
    memory: &Memory,
    LoadedEntry { entry, end }: LoadedEntry,
) -> Result<LoadedKernel, ElfError> {
    let inside = |h: &ProgramHeader| (h.physical..h.physical + h.memory_size).contains(&entry);
    let (true, Ok(entry32)) = (loads(headers).any(inside), u32::try_from(entry)) else {
        return Err(ElfError::EntryOutside { entry });
    };
    for header in loads(headers) {
        let data = slice(image, header.offset, header.file_size, "a segment")?;
        write_cleared(memory, header.physical, data, header.memory_size)
            .map_err(ElfError::Memory)?;
    }
    let entry = entry32;
    Ok(LoadedKernel { entry, end })
}

fn program_headers(image: &[u8]) -> Result<Vec<ProgramHeader>, ElfError> {
    let header = slice(image, 0, HEADER_SIZE as u64, "the file header")?;
    let (class, order, machine) = (header[4], header[5], u16_at(header, 18));
    if class != CLASS_64 || order != LITTLE_ENDIAN || machine != MACHINE_X86_64 {
        return Err(ElfError::WrongMachine {
            class,
            order,
            machine,
        });
    }
    let (start, size, count) = (u64_at(header, 32), u16_at(header, 54), u16_at(header, 56));
    if usize::from(size) != PROGRAM_HEADER_SIZE {
        return Err(ElfError::Damaged {
            what: "program headers are not 56 bytes each",
        });
    }
    let length = u64::from(count) * PROGRAM_HEADER_SIZE as u64;
    let table = slice(image, start, length, "the program header table")?;
    let entries = table.chunks_exact(PROGRAM_HEADER_SIZE);
    Ok(entries.map(program_header).collect())
}

/// The program headers and the entry of an ELF32 or ELF64 file.
fn program_headers_of_any(image: &[u8]) -> Result<(Vec<ProgramHeader>, u64), ElfError> {
    let header = slice(image, 0, HEADER_SIZE_32 as u64, "the file header")?;
    let (class, order, machine) = (header[4], header[5], u16_at(header, 18));
    match (class, order, machine) {
        (CLASS_64, LITTLE_ENDIAN, MACHINE_X86_64) => {
            let headers = program_headers(image)?;
            Ok((headers, u64_at(image, 24)))
        }
        (CLASS_32, LITTLE_ENDIAN, MACHINE_386) => {
            let entry = u32_at(header, 24).into();
            let (start, size) = (u32_at(header, 28), u16_at(header, 42));
            if usize::from(size) != PROGRAM_HEADER_SIZE_32 {
                return Err(ElfError::Damaged {
                    what: "program headers are not 32 bytes each",
                });
            }
            let length = u64::from(u16_at(header, 44)) * PROGRAM_HEADER_SIZE_32 as u64;
            let table = slice(image, start.into(), length, "the program header table")?;
            let entries = table.chunks_exact(PROGRAM_HEADER_SIZE_32);
            Ok((entries.map(program_header_32).collect(), entry))
        }
        _ => Err(ElfError::NotX86 {
            class,
            order,
            machine,
        }),
    }
}

fn program_header_32(bytes: &[u8]) -> ProgramHeader {
    let field = |at| u64::from(u32_at(bytes, at));
    ProgramHeader {
        kind: u32_at(bytes, 0),
        offset: field(4),
        virtual_address: field(8),
        physical: field(12),
        file_size: field(16),
        memory_size: field(20),
        align: field(28),
    }
}

fn program_header(bytes: &[u8]) -> ProgramHeader {
    ProgramHeader {
        kind: u32_at(bytes, 0),
        offset: u64_at(bytes, 8),
        virtual_address: u64_at(bytes, 16),
        physical: u64_at(bytes, 24),
        file_size: u64_at(bytes, 32),
        memory_size: u64_at(bytes, 40),
        align: u64_at(bytes, 48),
    }
}

/// Checks one segment; returns where it ends in guest memory.
fn check_segment(image: &[u8], header: &ProgramHeader, ram_end: u64) -> Result<u64, ElfError> {
    slice(image, header.offset, header.file_size, "a segment")?;
    if header.file_size > header.memory_size {
        return Err(ElfError::Damaged {
            what: "a segment is larger in the file than in memory",
        });
    }
    let end = header.physical.checked_add(header.memory_size);
    match end.filter(|end| header.physical >= layout::LEGACY_HOLE_END && *end <= ram_end) {
        Some(end) => Ok(end),
        None => Err(ElfError::OutsideRam {
            start: header.physical,
            size: header.memory_size,
            ram_end,
        }),
    }
}

/// Copies `data` to `start`, and clears what it does not fill of `size` bytes: after a reset, RAM
/// is not zero.
pub(crate) fn write_cleared(
    memory: &Memory,
    start: u64,
    data: &[u8],
    size: u64,
) -> Result<(), vm_memory::GuestMemoryError> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mapping = memory.mapping();
    mapping.write_slice(data, GuestAddress(start))?;
    let end = start + size;
    let mut at = start + data.len() as u64;
    while at < end {
        let length = (end - at).min(ZEROS.len() as u64);
        mapping.write_slice(&ZEROS[..length as usize], GuestAddress(at))?;
        at += length;
    }
    Ok(())
}

fn pvh_entry(image: &[u8], headers: &[ProgramHeader]) -> Result<u64, ElfError> {
    for header in headers.iter().filter(|header| header.kind == SEGMENT_NOTE) {
        let notes = slice(image, header.offset, header.file_size, "a note segment")?;
        if let Some(entry) = find_entry(notes, header.align)? {
            return Ok(entry);
        }
    }
    Err(ElfError::NoPvhNote)
}

/// Walks the notes: sizes of owner and content, type, owner, content, the last two padded.
fn find_entry(notes: &[u8], align: u64) -> Result<Option<u64>, ElfError> {
    let align = if align == 8 { 8 } else { 4 };
    let damaged = ElfError::Damaged {
        what: "a note reaches beyond its segment",
    };
    let mut rest = notes;
    while rest.len() >= 12 {
        let (owner, content) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize);
        let kind = u32_at(rest, 8);
        let Some(owner_bytes) = rest.get(12..).and_then(|r| r.get(..owner)) else {
            return Err(damaged);
        };
        let start = (12 + owner).next_multiple_of(align);
        let Some(content_bytes) = rest.get(start..).and_then(|r| r.get(..content)) else {
            return Err(damaged);
        };
        if kind == NOTE_PVH_ENTRY && owner_bytes == NOTE_OWNER {
            return match content_bytes.len() {
                4 => Ok(Some(u64::from(u32_at(content_bytes, 0)))),
                8 => Ok(Some(u64_at(content_bytes, 0))),
                _ => Err(ElfError::Damaged {
                    what: "the PVH entry note has neither 4 nor 8 bytes",
                }),
            };
        }
        let next = (start + content).next_multiple_of(align);
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}

fn slice<'a>(
    image: &'a [u8],
    start: u64,
    length: u64,
    what: &'static str,
) -> Result<&'a [u8], ElfError> {
    let end = start.saturating_add(length);
    let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    let part = range.and_then(|(start, end)| image.get(start..end));
    part.ok_or(ElfError::Truncated {
        what,
        end,
        size: image.len(),
    })
}

/// The callers have checked that the field lies within the slice.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}
