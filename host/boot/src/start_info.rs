//! What a PVH kernel is told: memory map, modules, command line, ACPI root pointer.
//!
//! `hvm_start_info`, version 1, of Xen's `public/arch-x86/hvm/start_info.h`. All of it lies in
//! conventional memory below the kernel; a kernel copies what it needs before it reuses that.

use dunlin_guest::{GuestAddress, Memory, layout};
use vm_memory::Bytes;

use crate::{Initrd, LoadContext, LoadError};

const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x8000;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// What a range of guest physical address space is for; the numbers are those of E820.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM that the kernel may use.
    Ram = 1,
    /// Not for the kernel to use.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// One entry of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What it is for.
    pub kind: MemoryKind,
}

impl MemoryRange {
    fn between(start: u64, end: u64, kind: MemoryKind) -> Self {
        Self {
            start,
            size: end.saturating_sub(start),
            kind,
        }
    }
}

/// The memory map of a machine, ascending: RAM without the legacy hole and the ACPI tables in
/// it, and ECAM, which a guest trusts only if it is reserved.
pub fn memory_map(memory: &Memory) -> Vec<MemoryRange> {
    let ecam_end = layout::PCI_ECAM_START + layout::PCI_ECAM_SIZE;
    let low_end = memory.size().min(layout::LOW_RAM_END);
    let (hole, tables) = (layout::LEGACY_HOLE_START, layout::ACPI_TABLES_START);
    let mut map = vec![
        MemoryRange::between(0, hole, MemoryKind::Ram),
        MemoryRange::between(hole, tables, MemoryKind::Reserved),
        MemoryRange::between(tables, layout::LEGACY_HOLE_END, MemoryKind::Acpi),
        MemoryRange::between(layout::LEGACY_HOLE_END, low_end, MemoryKind::Ram),
        MemoryRange::between(layout::PCI_ECAM_START, ecam_end, MemoryKind::Reserved),
    ];
    let high = memory
        .regions()
        .filter(|region| region.start >= layout::HIGH_RAM_START);
    map.extend(high.map(|region| MemoryRange {
        start: region.start,
        size: region.size,
        kind: MemoryKind::Ram,
    }));
    map.retain(|range| range.size > 0);
    map
}

/// Writes everything; returns the address of the start info.
pub(crate) fn write(context: &LoadContext<'_>, initrd: Option<Initrd>) -> Result<u32, LoadError> {
    let put = |what, address, bytes: &[u8]| {
        let mapping = context.memory.mapping();
        let written = mapping.write_slice(bytes, GuestAddress(address));
        written.map_err(|source| LoadError::Memory { what, source })
    };
    let mut command_line = context.command_line.as_bytes().to_vec();
    command_line.push(0);
    put("command line", COMMAND_LINE, &command_line)?;

    let map = memory_map(context.memory);
    let mut entries = Vec::new();
    for range in &map {
        entries.extend(range.start.to_le_bytes());
        entries.extend(range.size.to_le_bytes());
        entries.extend((range.kind as u32).to_le_bytes());
        entries.extend([0; 4]);
    }
    put("memory map", MEMORY_MAP, &entries)?;

    if let Some(Initrd { start, size }) = initrd {
        let module = [start, size, 0, 0].map(u64::to_le_bytes);
        put("module list", MODULES, module.as_flattened())?;
    }

    let mut info = Vec::new();
    let flags = 0u32;
    for field in [MAGIC, VERSION, flags, u32::from(initrd.is_some())] {
        info.extend(field.to_le_bytes());
    }
    let modules = if initrd.is_some() { MODULES } else { 0 };
    for address in [modules, COMMAND_LINE, context.rsdp.0, MEMORY_MAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.extend([0; 4]);
    put("start info", START_INFO, &info)?;
    Ok(START_INFO as u32)
}
