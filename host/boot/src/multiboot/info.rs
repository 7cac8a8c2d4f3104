//! What a multiboot kernel is told: memory, command line, modules (Multiboot 0.6.96, 3.3).
//!
//! All of it lies in conventional memory, in one piece:
//!
//! ```text
//! INFO ─ information ─ memory map ─ list of modules ─ strings ─ ... LIMIT
//! ```

use dunlin_guest::{GuestAddress, layout};
use vm_memory::Bytes;

use super::MultibootError;
use crate::{LoadContext, LoadError, memory_map};

/// Where the information lies.
const INFO: u32 = 0x6000;
/// Where it must end: programs of the first PCs have their extended BIOS data area from there.
const LIMIT: u32 = 0x9_0000;
/// Bytes of the information, the fields for video included (which stay zero).
const INFO_SIZE: usize = 116;

/// Bits that say which fields are valid.
const HAS_MEMORY: u32 = 1 << 0;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MEMORY_MAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;

/// Offsets of the fields.
mod field {
    pub(super) const FLAGS: usize = 0;
    pub(super) const MEMORY_LOWER: usize = 4;
    pub(super) const MEMORY_UPPER: usize = 8;
    pub(super) const COMMAND_LINE: usize = 16;
    pub(super) const MODULE_COUNT: usize = 20;
    pub(super) const MODULES: usize = 24;
    pub(super) const MEMORY_MAP_LENGTH: usize = 44;
    pub(super) const MEMORY_MAP: usize = 48;
    pub(super) const LOADER_NAME: usize = 64;
}

const LOADER_NAME: &[u8] = b"Dunlin";

/// A module in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoadedModule {
    pub(super) start: u32,
    pub(super) end: u32,
    /// Its file and its arguments.
    pub(super) text: Vec<u8>,
}

/// The bytes from [`INFO`] on.
struct Block(Vec<u8>);

impl Block {
    /// Adds bytes at a border of four; where they come to lie.
    fn append(&mut self, bytes: &[u8]) -> u32 {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        // Strings and lists are bounded; an end beyond the limit is found before it is written.
        let at = INFO.saturating_add(u32::try_from(self.0.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(bytes);
        at
    }

    fn append_text(&mut self, text: &[u8]) -> u32 {
        self.append(&[text, &[0]].concat())
    }

    fn set(&mut self, field: usize, value: u32) {
        self.0[field..field + 4].copy_from_slice(&value.to_le_bytes());
    }
}

/// Writes everything; returns the address of the information.
pub(super) fn write(
    context: &LoadContext<'_>,
    command_line: &[u8],
    modules: &[LoadedModule],
) -> Result<u32, LoadError> {
    let mut block = Block(vec![0; INFO_SIZE]);
    let kib_from = |start: u64, end: u64| (end.saturating_sub(start) >> 10) as u32;
    let low_end = context.memory.size().min(layout::LOW_RAM_END);
    let lower = kib_from(0, layout::LEGACY_HOLE_START);
    block.set(field::MEMORY_LOWER, lower);
    let upper = kib_from(layout::LEGACY_HOLE_END, low_end);
    block.set(field::MEMORY_UPPER, upper);

    let map = map_entries(context);
    let at = block.append(&map);
    block.set(field::MEMORY_MAP, at);
    block.set(field::MEMORY_MAP_LENGTH, map.len() as u32);

    let at = block.append_text(command_line);
    block.set(field::COMMAND_LINE, at);
    let at = block.append_text(LOADER_NAME);
    block.set(field::LOADER_NAME, at);

    let mut list = Vec::new();
    for module in modules {
        let text = block.append_text(&module.text);
        list.extend([module.start, module.end, text, 0].map(u32::to_le_bytes));
    }
    let at = block.append(list.as_flattened());
    block.set(field::MODULES, at);
    block.set(field::MODULE_COUNT, modules.len() as u32);
    let flags = HAS_MEMORY | HAS_COMMAND_LINE | HAS_MODULES | HAS_MEMORY_MAP | HAS_LOADER_NAME;
    block.set(field::FLAGS, flags);

    let size = block.0.len();
    if size > (LIMIT - INFO) as usize {
        return Err(LoadError::Multiboot {
            path: context.kernel.to_owned(),
            source: MultibootError::InfoTooLarge { size },
        });
    }
    let mapping = context.memory.mapping();
    let written = mapping.write_slice(&block.0, GuestAddress(INFO.into()));
    written.map_err(|source| LoadError::Memory {
        what: "multiboot information",
        source,
    })?;
    Ok(INFO)
}

/// The memory map. An entry's size does not count the field that holds it.
fn map_entries(context: &LoadContext<'_>) -> Vec<u8> {
    let mut entries = Vec::new();
    for range in memory_map(context.memory) {
        entries.extend(20u32.to_le_bytes());
        entries.extend(range.start.to_le_bytes());
        entries.extend(range.size.to_le_bytes());
        entries.extend((range.kind as u32).to_le_bytes());
    }
    entries
}
