//! The ELF file: one segment with tables and code, and the note that says where PVH begins.
//!
//! ```text
//! 0x10_0000 PML4, PDPT, 16 page directories: all memory up to 16 GiB, 2 MiB a page, for ring 3 too
//! 0x11_2000 GDT, task state   0x11_3000 IDT
//! 0x11_4000 code              0x11_8000 variables, then names of parameters
//! 0x11_a000 stack of ring 0   0x11_b000 stack of ring 3            (each ends there)
//! ```

use crate::parameters::KEYS;
use crate::program::{self, NAMES, vector};

/// Where memory begins that may be filled; everything of the guest's own and of the loader's is
/// below.
pub(crate) const USABLE: u32 = 0x20_0000;
/// Where the memory ends that the guest can reach.
pub(crate) const LIMIT: u64 = DIRECTORIES << 30;
/// The local APIC.
pub(crate) const APIC: u64 = 0xfee0_0000;

const BASE: u32 = 0x10_0000;
pub(crate) const PML4: u32 = BASE;
const PDPT: u32 = BASE + 0x1000;
const DIRECTORY: u32 = BASE + 0x2000;
const DIRECTORIES: u64 = 16;
const GDT: u32 = BASE + 0x1_2000;
pub(crate) const GDT_POINTER: u32 = GDT + 0x100;
pub(crate) const IDT_POINTER: u32 = GDT + 0x110;
const TASK_STATE: u32 = GDT + 0x200;
/// The last byte of the task state and of the map of 0x100 ports that follows it.
const TASK_LIMIT: u64 = 0x68 + 0x20;
const IDT: u32 = BASE + 0x1_3000;
pub(crate) const PROGRAM: u32 = BASE + 0x1_4000;
pub(crate) const VARIABLES: u32 = BASE + 0x1_8000;
pub(crate) const STACK_RING_0: u32 = BASE + 0x1_a000;
pub(crate) const STACK_RING_3: u32 = BASE + 0x1_b000;
const END: u32 = STACK_RING_3;

pub(crate) const CODE_0: u16 = 0x08;
pub(crate) const DATA_0: u16 = 0x10;
pub(crate) const DATA_3: u16 = 0x18 | 3;
pub(crate) const CODE_3: u16 = 0x20 | 3;
pub(crate) const TASK: u16 = 0x28;

/// An interrupt gate that ring 3 cannot call.
const GATE: u64 = 0x8e00;
/// Exceptions have the vectors below this.
const EXCEPTIONS: u8 = 32;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Where the note lies in the file.
const NOTE: usize = HEADER + 2 * PROGRAM_HEADER;
const NOTE_SIZE: usize = 20;
/// Where the segment lies in the file.
const SEGMENT: usize = 0x1000;

/// The guest as an ELF file that every loader of PVH kernels takes.
pub fn elf() -> Vec<u8> {
    let program = program::program();
    let entry = PROGRAM + program.entry as u32;
    let mut file = headers(entry);
    file.resize(SEGMENT, 0);
    file.extend(segment(&program));
    file
}

fn headers(entry: u32) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec(); // 64 bits, little-endian, version 1
    file.resize(16, 0);
    for field in [2u16, 62] {
        file.extend(field.to_le_bytes()); // executable, x86-64
    }
    file.extend(1u32.to_le_bytes());
    for field in [u64::from(entry), HEADER as u64, 0] {
        file.extend(field.to_le_bytes()); // entry, program headers, no section headers
    }
    file.extend(0u32.to_le_bytes());
    for field in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    let size = u64::from(END - BASE);
    let (load, note) = (1u32, 4u32);
    let mut header = |kind: u32, flags: u32, fields: [u64; 6]| {
        file.extend(kind.to_le_bytes());
        file.extend(flags.to_le_bytes());
        fields
            .iter()
            .for_each(|field| file.extend(field.to_le_bytes()));
    };
    // Offset in the file, virtual and physical address, size there and in memory, alignment.
    let base = u64::from(BASE);
    header(load, 7, [SEGMENT as u64, base, base, size, size, 4096]);
    let note_size = NOTE_SIZE as u64;
    header(note, 4, [NOTE as u64, 0, 0, note_size, note_size, 4]);
    for field in [4u32, 4, 18] {
        file.extend(field.to_le_bytes()); // sizes of owner and content; XEN_ELFNOTE_PHYS32_ENTRY
    }
    file.extend(b"Xen\0");
    file.extend(entry.to_le_bytes());
    file
}

/// What lies in memory from [`BASE`] to [`END`].
fn segment(program: &program::Program) -> Vec<u8> {
    let mut memory = Image(vec![0; (END - BASE) as usize]);
    // Present, writable, for users, accessed; in the leaves also dirty, 2 MiB.
    let (table, leaf) = (0x27, 0xe7);
    memory.entry(PML4, u64::from(PDPT) | table);
    for index in 0..DIRECTORIES as u32 {
        let directory = DIRECTORY + index * 4096;
        memory.entry(PDPT + index * 8, u64::from(directory) | table);
    }
    for index in 0..DIRECTORIES as u32 * 512 {
        let address = u64::from(index) << 21;
        let uncached = if address == APIC { 0x10 } else { 0 };
        memory.entry(DIRECTORY + index * 8, address | leaf | uncached);
    }
    let task = u64::from(TASK_STATE);
    let descriptors = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        // An available 64-bit task state; its upper half follows.
        TASK_LIMIT | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56,
        0,
    ];
    for (index, descriptor) in (0..).zip(descriptors) {
        memory.entry(GDT + index * 8, descriptor);
    }
    memory.entry(TASK_STATE + 4, STACK_RING_0.into());
    // The map of allowed ports follows; some machines look there in spite of IOPL 3. It lets ports
    // below 0x100
    // pass, and ends with a byte of ones (SDM vol. 1, 19.5.2).
    memory.write(TASK_STATE + 0x66, &0x68u16.to_le_bytes());
    memory.write(TASK_STATE + TASK_LIMIT as u32, &[0xff]);
    for (pointer, address, limit) in [(GDT_POINTER, GDT, 0x37u16), (IDT_POINTER, IDT, 0xfff)] {
        memory.write(pointer, &limit.to_le_bytes());
        memory.entry(pointer + 2, address.into());
    }
    for exception in 0..EXCEPTIONS {
        memory.gate(exception, program.trap);
    }
    memory.gate(vector::PROTECTION, program.protection);
    memory.gate(vector::TIMER, program.timer);
    memory.gate(vector::SPURIOUS, program.spurious);
    memory.write(PROGRAM, &program.code);
    let mut at = NAMES;
    for key in KEYS {
        memory.write(at, key.as_bytes());
        at += key.len() as u32 + 1;
    }
    memory.0
}

/// Memory from [`BASE`] on.
struct Image(Vec<u8>);

impl Image {
    fn write(&mut self, address: u32, bytes: &[u8]) {
        let at = (address - BASE) as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn entry(&mut self, address: u32, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    fn gate(&mut self, vector: u8, offset: usize) {
        let handler = u64::from(PROGRAM) + offset as u64;
        let low = handler & 0xffff | u64::from(CODE_0) << 16 | GATE << 32;
        let at = IDT + u32::from(vector) * 16;
        self.entry(at, low | (handler >> 16 & 0xffff) << 48);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_before_the_variables() {
        assert!(program::program().code.len() < (VARIABLES - PROGRAM) as usize);
    }

    #[test]
    fn the_note_says_where_the_program_begins() {
        let file = elf();
        let entry = &file[NOTE + NOTE_SIZE - 4..][..4];
        assert_eq!(entry, &file[24..28]);
        assert_eq!(file.len(), SEGMENT + (END - BASE) as usize);
    }
}
