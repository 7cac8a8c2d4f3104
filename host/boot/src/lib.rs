//! Loads a kernel into guest memory: ELF by PVH, multiboot 1; a bzImage is unpacked on the host first.
//!
//! ```text
//!  file ─┬─ ELF64 (vmlinux) ───────────────────────────┬─► segments at 1 MiB and above
//!        ├─ bzImage ─► setup header ─► unpacked payload ┘             ▲
//!        └─ multiboot header ─► ELF or one piece ─────────────────────┘
//!  initrd ─► end of low RAM        command line, memory map, start info ─► below 640 KiB
//! ```
//!
//! What a file is, is decided in this order: an ELF file with a PVH note, a bzImage, a file with a
//! multiboot header. The guest then starts at [`EntryState::entry`] as the PVH boot protocol says
//! (<https://xenbits.xen.org/docs/unstable/misc/pvh.html>), or as [`multiboot`] does. Files are
//! untrusted: every offset in them is checked, and an unpacked kernel has a bound. Must not depend
//! on anything of ours but the guest.

mod bzimage;
mod elf;
pub mod multiboot;
mod start_info;
mod unpack;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use dunlin_guest::{GuestAddress, Memory, layout};
use vm_memory::Bytes;

pub use bzimage::BzImageError;
pub use elf::ElfError;
pub use multiboot::MultibootError;
pub use start_info::{MemoryKind, MemoryRange, memory_map};
pub use unpack::{Compression, UnpackError};

/// The longest command line that Linux on x86 keeps, without the terminator; it would cut a
/// longer one without a word.
pub const MAX_COMMAND_LINE: usize = 2047;
/// The largest kernel file, and the largest unpacked kernel.
const MAX_KERNEL: u64 = 1 << 30;

/// What to load, and where to.
#[derive(Debug, Clone, Copy)]
pub struct LoadContext<'a> {
    /// RAM of the guest.
    pub memory: &'a Memory,
    /// The kernel: an ELF file with a PVH note, a bzImage of one, or a file with a multiboot header.
    pub kernel: &'a Path,
    /// Initial RAM disk, handed to the guest as it is; the first module of a multiboot kernel.
    pub initrd: Option<&'a Path>,
    /// Further modules, for a multiboot kernel only.
    pub modules: &'a [Module],
    /// Command line.
    pub command_line: &'a str,
    /// Address of the ACPI root pointer.
    pub rsdp: GuestAddress,
}

/// A file that is handed to a multiboot kernel, with a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// What the kernel finds behind the path in the module's text.
    pub arguments: String,
}

/// How the first processor starts (PVH boot protocol, "initial machine state", and Multiboot
/// 0.6.96, 3.2, which asks for nothing more):
///
/// - EIP = `entry`, EAX = `magic`, EBX = `start_info`, EFLAGS with VM, IF and TF clear (0x2);
/// - CR0 with PE set and the other writable bits clear (0x11 with the fixed ET): protected mode,
///   no paging; CR4 = 0, EFER = 0;
/// - CS: 32-bit execute/read code, base 0, limit 4 GiB - 1 (access rights 0xc09b);
///   DS, ES, SS: 32-bit read/write data, base 0, limit 4 GiB - 1 (0xc093);
/// - TR: 32-bit TSS, busy, base 0, limit 0x67 (0x8b).
///
/// Everything else, GDTR and the stack included, is as after reset: the kernel loads its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryState {
    /// Address of the first instruction.
    pub entry: u32,
    /// Address of the start info, or of the multiboot information.
    pub start_info: u32,
    /// By what a multiboot kernel knows its loader (0x2badb002); 0 for PVH.
    pub magic: u32,
}

/// Why the guest cannot be started from these files.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened or read.
    #[error("failed to read {what} \"{}\"", path.display())]
    Read {
        /// "kernel", "initrd" or "module".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// A directory, or another thing that is no file.
    #[error("{what} \"{}\" is not a regular file", path.display())]
    NotAFile {
        /// "kernel", "initrd" or "module".
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The kernel's file is absurdly large.
    #[error("kernel \"{}\" has {size} bytes, at most {MAX_KERNEL} are possible", path.display())]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Nothing that can be booted.
    #[error(
        "kernel \"{}\" is neither an ELF file nor a bzImage, and has no multiboot header",
        path.display()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// A bzImage that cannot be used.
    #[error("kernel \"{}\" is not a usable bzImage", path.display())]
    BzImage {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: BzImageError,
    },
    /// An ELF file that cannot be used, by itself or in a bzImage.
    #[error("kernel \"{}\" cannot be booted", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// A multiboot kernel that cannot be used.
    #[error("multiboot kernel \"{}\" cannot be booted", path.display())]
    Multiboot {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: MultibootError,
    },
    /// Modules for a kernel that takes none.
    #[error(
        "kernel \"{}\" takes no modules: only a multiboot kernel does, others one initrd",
        path.display()
    )]
    Modules {
        /// The kernel.
        path: PathBuf,
    },
    /// No room above the kernel.
    #[error(
        "module \"{}\" has {size} bytes, {room} are free above the kernel: give the guest more memory",
        path.display()
    )]
    ModuleTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// What is free.
        room: u64,
    },
    /// No room between the kernel and the end of low RAM.
    #[error(
        "initrd \"{}\" has {size} bytes, {room} are free beside the kernel: give the guest more memory",
        path.display()
    )]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// What is free.
        room: u64,
    },
    /// The command line cannot be passed on.
    #[error("command line of {length} bytes: at most {MAX_COMMAND_LINE} are possible, without NUL")]
    CommandLine {
        /// Its length.
        length: usize,
    },
    /// Guest memory refused.
    #[error("failed to write {what} to guest memory")]
    Memory {
        /// What was to be written.
        what: &'static str,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

/// Loads kernel, initrd and start info.
///
/// # Errors
/// [`LoadError`] when a file is missing, damaged, of the wrong kind or too large; guest memory
/// may have been written then.
pub fn load(context: &LoadContext<'_>) -> Result<EntryState, LoadError> {
    let command_line = context.command_line;
    let length = command_line.len();
    if length > MAX_COMMAND_LINE || command_line.contains('\0') {
        return Err(LoadError::CommandLine { length });
    }
    let path = context.kernel;
    let image = read(path)?;
    if !elf::has_pvh_note(&image) && !bzimage::is_bzimage(&image) {
        let header = multiboot::Header::find(&image).map_err(|source| LoadError::Multiboot {
            path: path.to_owned(),
            source,
        })?;
        if let Some(header) = header {
            return multiboot::load(context, &image, &header);
        }
    }
    if !context.modules.is_empty() {
        let path = path.to_owned();
        return Err(LoadError::Modules { path });
    }
    let image = unpacked(path, image)?;
    let loaded = elf::load(&image, context.memory).map_err(|source| LoadError::Elf {
        path: path.to_owned(),
        source,
    })?;
    let initrd = match context.initrd {
        Some(path) => Some(load_initrd(context.memory, path, loaded.end)?),
        None => None,
    };
    let start_info = start_info::write(context, initrd)?;
    tracing::debug!(
        kernel = %path.display(),
        entry = format_args!("{:#x}", loaded.entry),
        end = format_args!("{:#x}", loaded.end),
        "kernel loaded"
    );
    Ok(EntryState {
        entry: loaded.entry,
        start_info,
        magic: 0,
    })
}

/// The kernel in `path` as an ELF image, unpacked where it is a bzImage.
///
/// # Errors
/// [`LoadError`] when the file cannot be read, is of another kind, or does not unpack.
pub fn kernel_image(path: &Path) -> Result<Vec<u8>, LoadError> {
    unpacked(path, read(path)?)
}

/// All of the kernel's file.
fn read(path: &Path) -> Result<Vec<u8>, LoadError> {
    let (mut file, size) = open("kernel", path)?;
    let path = || path.to_owned();
    if size > MAX_KERNEL {
        return Err(LoadError::KernelTooLarge { path: path(), size });
    }
    let mut image = Vec::new();
    let read = (&mut file).take(MAX_KERNEL).read_to_end(&mut image);
    read.map_err(|source| LoadError::Read {
        what: "kernel",
        path: path(),
        source,
    })?;
    Ok(image)
}

/// The ELF image in what was read from `path`.
fn unpacked(path: &Path, image: Vec<u8>) -> Result<Vec<u8>, LoadError> {
    if elf::is_elf(&image) {
        return Ok(image);
    }
    let path = || path.to_owned();
    if !bzimage::is_bzimage(&image) {
        return Err(LoadError::UnknownFormat { path: path() });
    }
    bzimage::unpack(&image, MAX_KERNEL).map_err(|source| LoadError::BzImage {
        path: path(),
        source,
    })
}

fn open(what: &'static str, path: &Path) -> Result<(File, u64), LoadError> {
    let error = |source| LoadError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    // A pipe would block the open; look first.
    let metadata = std::fs::metadata(path).map_err(error)?;
    if !metadata.is_file() {
        let path = path.to_owned();
        return Err(LoadError::NotAFile { what, path });
    }
    let file = File::open(path).map_err(error)?;
    let size = file.metadata().map_err(error)?.len();
    Ok((file, size))
}

/// Where the initrd lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    start: u64,
    size: u64,
}

/// Puts the initrd at the end of low RAM, above the kernel.
fn load_initrd(memory: &Memory, path: &Path, kernel_end: u64) -> Result<Initrd, LoadError> {
    let (mut file, size) = open("initrd", path)?;
    let low_end = memory.size().min(layout::LOW_RAM_END);
    let first = kernel_end.next_multiple_of(dunlin_guest::PAGE_SIZE);
    let room = low_end.saturating_sub(first);
    if size > room {
        let path = path.to_owned();
        return Err(LoadError::InitrdTooLarge { path, size, room });
    }
    let start = (low_end - size) & !(dunlin_guest::PAGE_SIZE - 1);
    let mapping = memory.mapping();
    mapping
        .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
        .map_err(|source| LoadError::Memory {
            what: "initrd",
            source,
        })?;
    Ok(Initrd { start, size })
}

#[cfg(test)]
mod tests;
