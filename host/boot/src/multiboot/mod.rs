//! Multiboot 1 kernels (Multiboot Specification 0.6.96): what many bare-metal programs are.
//!
//! ```text
//!  file ─► header in the first 8 KiB ─┬─ address fields ─► one piece of the file
//!                                     └─ none ─► ELF32, or ELF64, by its segments
//!  modules ─► page by page above the kernel       information ─► below 640 KiB
//! ```
//!
//! As under GRUB, and unlike under QEMU, an ELF64 file is loaded as well; like any other kernel
//! it starts in 32-bit protected mode. The command line begins with the kernel's path, as both
//! do it. A wish for a video mode is not met: there is no screen, and the information says so.

mod header;
mod info;

use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use dunlin_guest::{GuestAddress, Memory, PAGE_SIZE, layout};
use vm_memory::Bytes;

use crate::elf::{self, ElfError, LoadedKernel};
use crate::{EntryState, LoadContext, LoadError, Module, open};
use header::Addresses;
pub(crate) use header::Header;
use info::LoadedModule;

/// What EAX holds when a multiboot kernel starts.
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The most modules.
pub const MAX_MODULES: usize = 64;

/// Why a multiboot kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum MultibootError {
    /// The header announces addresses and ends before them.
    #[error(
        "the multiboot header at byte {offset} has no room for its addresses in the first 8 KiB of the file"
    )]
    HeaderTruncated {
        /// Where the header starts in the file.
        offset: usize,
    },
    /// The kernel cannot do without something that is not known here.
    #[error("the multiboot header requires unknown features (flags {unknown:#x})")]
    Flags {
        /// The unknown bits among those that a loader must know.
        unknown: u32,
    },
    /// The header's addresses contradict each other or the file.
    #[error("the addresses in the multiboot header cannot be: {what}")]
    Addresses {
        /// What is wrong.
        what: &'static str,
    },
    /// What is to be loaded is not in the file.
    #[error("the multiboot header announces bytes up to {end} of the file, which has {size}")]
    Truncated {
        /// Where the last byte should be.
        end: u64,
        /// Bytes in the file.
        size: u64,
    },
    /// The kernel does not fit.
    #[error(
        "the kernel's {start:#x}+{size:#x} lies outside of the RAM from {:#x} to {ram_end:#x}",
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
    /// Neither addresses in the header nor an ELF file.
    #[error("the multiboot header has no addresses, and the file is no ELF file")]
    NoAddresses,
    /// The ELF file cannot be used.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// Too much to tell the kernel.
    #[error("{size} bytes of command line and module names are more than the guest can be told")]
    InfoTooLarge {
        /// Bytes of all of it.
        size: usize,
    },
    /// Too many modules.
    #[error("{count} modules are more than the {MAX_MODULES} that are possible")]
    TooManyModules {
        /// How many.
        count: usize,
    },
    /// Guest memory refused.
    #[error("failed to write the kernel to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Loads kernel, modules and information.
pub(crate) fn load(
    context: &LoadContext<'_>,
    image: &[u8],
    header: &Header,
) -> Result<EntryState, LoadError> {
    let failed = |source| LoadError::Multiboot {
        path: context.kernel.to_owned(),
        source,
    };
    if header.wants_video {
        tracing::warn!(
            kernel = %context.kernel.display(),
            "the kernel asks for a video mode; there is no screen"
        );
    }
    let count = context.modules.len() + usize::from(context.initrd.is_some());
    if count > MAX_MODULES {
        return Err(failed(MultibootError::TooManyModules { count }));
    }
    let kernel = load_kernel(image, header, context.memory).map_err(failed)?;
    let initrd = context.initrd.map(|path| Module {
        path: path.to_owned(),
        arguments: String::new(),
    });
    let mut end = kernel.end;
    let mut modules = Vec::new();
    for module in initrd.iter().chain(context.modules) {
        let loaded = load_module(context.memory, module, end)?;
        end = loaded.end.into();
        modules.push(loaded);
    }
    let command_line = text_of(context.kernel, context.command_line);
    let start_info = info::write(context, &command_line, &modules)?;
    Ok(EntryState {
        entry: kernel.entry,
        start_info,
        magic: LOADER_MAGIC,
    })
}

/// A file's path, and what follows it.
fn text_of(path: &Path, arguments: &str) -> Vec<u8> {
    let path = path.as_os_str().as_bytes();
    if arguments.is_empty() {
        return path.to_vec();
    }
    [path, b" ", arguments.as_bytes()].concat()
}

fn load_kernel(
    image: &[u8],
    header: &Header,
    memory: &Memory,
) -> Result<LoadedKernel, MultibootError> {
    match header.addresses {
        Some(addresses) => load_piece(image, header.offset, addresses, memory),
        None if elf::is_elf(image) => Ok(elf::load_by_entry(image, memory)?),
        None => Err(MultibootError::NoAddresses),
    }
}

/// Loads the piece of the file that the header's addresses name.
fn load_piece(
    image: &[u8],
    offset: usize,
    addresses: Addresses,
    memory: &Memory,
) -> Result<LoadedKernel, MultibootError> {
    let wrong = |what| MultibootError::Addresses { what };
    let Addresses {
        header,
        load,
        load_end,
        bss_end,
        entry,
    } = addresses;
    let before_header = header
        .checked_sub(load)
        .ok_or(wrong("the header lies below the load address"))?;
    let first = (offset as u64)
        .checked_sub(before_header.into())
        .ok_or(wrong("they begin before the file"))?;
    let size = image.len() as u64;
    let length = match load_end {
        0 => size - first,
        end => u64::from(end)
            .checked_sub(load.into())
            .ok_or(wrong("the load end lies below the load address"))?,
    };
    let end = first + length;
    let data = image
        .get(first as usize..end as usize)
        .ok_or(MultibootError::Truncated { end, size })?;
    let (start, loaded_end) = (u64::from(load), u64::from(load) + length);
    let end = match bss_end {
        0 => loaded_end,
        end => Some(u64::from(end))
            .filter(|end| *end >= loaded_end)
            .ok_or(wrong("the end of the bss lies below that of the data"))?,
    };
    if !(start..loaded_end).contains(&entry.into()) {
        return Err(wrong("the entry lies outside of what is loaded"));
    }
    let ram_end = memory.size().min(layout::LOW_RAM_END);
    if start < layout::LEGACY_HOLE_END || end > ram_end {
        return Err(MultibootError::OutsideRam {
            start,
            size: end - start,
            ram_end,
        });
    }
    elf::write_cleared(memory, start, data, end - start).map_err(MultibootError::Memory)?;
    Ok(LoadedKernel { entry, end })
}

/// Puts a module on the next page above `below`.
fn load_module(memory: &Memory, module: &Module, below: u64) -> Result<LoadedModule, LoadError> {
    let path = &module.path;
    let (mut file, size) = open("module", path)?;
    let start = below.next_multiple_of(PAGE_SIZE);
    let low_end = memory.size().min(layout::LOW_RAM_END);
    let room = low_end.saturating_sub(start);
    let too_large = || LoadError::ModuleTooLarge {
        path: path.clone(),
        size,
        room,
    };
    if size > room {
        return Err(too_large());
    }
    // Low RAM ends far below 4 GiB.
    let (Ok(start32), Ok(end)) = (u32::try_from(start), u32::try_from(start + size)) else {
        return Err(too_large());
    };
    memory
        .mapping()
        .read_exact_volatile_from(GuestAddress(start), &mut file.by_ref(), size as usize)
        .map_err(|source| LoadError::Memory {
            what: "module",
            source,
        })?;
    Ok(LoadedModule {
        start: start32,
        end,
        text: text_of(path, &module.arguments),
    })
}

#[cfg(test)]
mod tests;
