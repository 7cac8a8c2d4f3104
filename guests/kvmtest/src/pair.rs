//! A kernel whose two processors count in ring 3, at native speed also under a KVM that emulates
//! ring 0.
//!
//! The first processor starts at [`LOAD`] as PVH starts a kernel (32-bit protected mode, flat, no
//! paging), sends the second one INIT and a start-up IPI, and both go to ring 3 of long mode. There
//! each counts rounds in its page ([`counter`]), writes a page of its own range each round
//! ([`data_pages`]), and after each [`ROUNDS_PER_LETTER`] prints a letter to the serial port: the
//! first small ones, the second capitals, in the order of the alphabet and round again. With one
//! processor it works as well, without capitals.
//!
//! ```text
//! 0x00_8000  where the second processor starts, copied there by the first
//! 0x10_0000  code of ring 0, then of ring 3; GDT; page tables: one image
//! 0x20_0000  counters, a page each      0x21_0000  stacks, a page each
//! 0x30_0000  data of the first          0x40_0000  data of the second
//! ```

use std::ops::Range;

use dunlin_guest::{Memory, PageIndex};
use dunlin_x86::state::CpuState;
use vm_memory::{Bytes, GuestAddress};

use crate::assembler::Code;
use crate::{CODE_3, CODE_64, DATA_0, DATA_3};

/// Bytes of RAM that the guest needs.
pub const MEMORY: u64 = 8 << 20;
/// Where the image lies, and its first instruction.
pub const LOAD: u64 = 0x10_0000;
/// Rounds from one letter to the next.
pub const ROUNDS_PER_LETTER: u64 = 1 << 17;
/// Pages that each processor writes in turns: the first many, the second few.
pub const DATA_PAGES: [u64; 2] = [256, 16];

const COUNTERS: u64 = 0x20_0000;
const STACKS: u64 = 0x21_0000;
const DATA: u64 = 0x30_0000;
/// Where a processor starts that gets a start-up IPI.
const SECOND: u64 = 0x8000;
const PROGRAM: u64 = LOAD + 0x1000;
const GDT: u64 = LOAD + 0x2000;
const GDT_LIMIT: u16 = TASK + 2 * 16 - 1;
const GDT_POINTER: u64 = GDT + 0x80;
const PML4: u64 = LOAD + 0x3000;
const PDPT: u64 = LOAD + 0x4000;
const PD: u64 = LOAD + 0x5000;
const END: u64 = LOAD + 0x6000;

/// 32-bit code, beside the segments that the other programs use.
const CODE_32: u16 = 0x28;
/// Task state segment of the first processor; the second's is 16 on, as its descriptor is.
const TASK: u16 = 0x30;
const SERIAL: u16 = 0x3f8;
/// The task state segments, which let ring 3 print by their I/O permission map. (By its IOPL it
/// may not where a host's kernel withholds that.)
const TASKS: u64 = GDT + 0x800;
/// Bytes of one: as many as name the serial port, and the last one.
const TASK_BYTES: u64 = 0x68 + (SERIAL as u64 + 8) / 8 + 1;
/// From one to the next.
const TASK_STRIDE: u64 = 0x200;

const JMP: &[u8] = &[0xe9];
const JNE: &[u8] = &[0x0f, 0x85];

/// Address of the 64-bit counter of a processor.
pub fn counter(processor: u64) -> u64 {
    COUNTERS + (processor << 12)
}

/// Pages that a processor writes besides its counter.
pub fn data_pages(processor: usize) -> Range<PageIndex> {
    let first = (DATA + ((processor as u64) << 20)) >> 12;
    PageIndex(first)..PageIndex(first + DATA_PAGES[processor])
}

/// Writes the guest into `memory`.
///
/// # Panics
/// When the memory is smaller than [`MEMORY`].
pub fn load(memory: &Memory) {
    memory
        .mapping()
        .write_slice(&image(), GuestAddress(LOAD))
        .expect("guest memory holds the test guest");
}

/// The state in which processor 0 starts, made from its reset state.
pub fn boot_state(reset: &CpuState) -> CpuState {
    let mut state = crate::boot_state(reset);
    state.rip = LOAD;
    state
}

/// The guest as a kernel: an ELF file with a PVH note.
pub fn kernel() -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let image = image();
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes()); // executable
    elf.extend(62u16.to_le_bytes()); // x86-64
    elf.extend(1u32.to_le_bytes());
    for word in [LOAD, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for (kind, offset, address, size) in [
        (4u32, HEADERS, 0, NOTE),
        (1, HEADERS + NOTE, LOAD, image.len() as u64),
    ] {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            elf.extend(word.to_le_bytes());
        }
    }
    for word in [4u32, 4, 18] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(b"Xen\0");
    elf.extend((LOAD as u32).to_le_bytes());
    elf.extend(image);
    elf
}

fn image() -> Vec<u8> {
    let mut image = vec![0; (END - LOAD) as usize];
    let mut put = |address: u64, bytes: &[u8]| {
        let at = (address - LOAD) as usize;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(LOAD, &boot());
    put(PROGRAM, &program());
    for (index, descriptor) in [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_9b00_0000_ffffu64,
    ]
    .into_iter()
    .enumerate()
    {
        put(GDT + index as u64 * 8, &descriptor.to_le_bytes());
    }
    for processor in 0..2 {
        let task = TASKS + processor * TASK_STRIDE;
        let available = (TASK_BYTES - 1) | (task & 0xff_ffff) << 16 | 0x89 << 40;
        put(
            GDT + u64::from(TASK) + processor * 16,
            &available.to_le_bytes(),
        );
        // The map of permissions begins behind the fixed part; zeros permit.
        put(task + 0x66, &0x68u16.to_le_bytes());
        put(task + TASK_BYTES - 1, &[0xff]);
    }
    put(GDT_POINTER, &GDT_LIMIT.to_le_bytes());
    put(GDT_POINTER + 2, &GDT.to_le_bytes());
    // Present, writable, for users, accessed; in the leaves also dirty, 2 MiB.
    put(PML4, &(PDPT | 0x27).to_le_bytes());
    put(PDPT, &(PD | 0x27).to_le_bytes());
    for index in 0..MEMORY >> 21 {
        put(PD + index * 8, &(index << 21 | 0xe7).to_le_bytes());
    }
    image
}

/// From 32-bit protected mode, or the start-up IPI, to ring 3. EBP holds the processor's number.
fn boot() -> Vec<u8> {
    let second = second();
    let mut code = Code::default();
    // The second processor's first instructions go below 1 MiB; they are the last of the code.
    code.imm32(&[0xbe], 0); // mov esi, their place
    let place = code.here() - 4;
    code.imm32(&[0xbf], SECOND as u32) // mov edi, where they go
        .imm32(&[0xb9], second.len() as u32) // mov ecx, their length
        .raw(&[0xfc, 0xf3, 0xa4]) // cld; rep movsb
        .raw(&[0x31, 0xed]); // xor ebp, ebp
    let first = code.forward(JMP);
    debug_assert_eq!(LOAD + code.here() as u64, SECOND_32);
    code.imm32(&[0xb8], DATA_0.into()) // mov eax, data
        .raw(&[0x8e, 0xd0, 0x8e, 0xd8, 0x8e, 0xc0]) // mov ss, ds, es
        .imm32(&[0xbd], 1) // mov ebp, 1
        .land(first)
        .raw(&[0x0f, 0x20, 0xe0]) // mov eax, cr4
        .imm32(&[0x0d], 0x220) // or eax, PAE | OSFXSR
        .raw(&[0x0f, 0x22, 0xe0]) // mov cr4, eax
        .imm32(&[0xb8], PML4 as u32) // mov eax, PML4
        .raw(&[0x0f, 0x22, 0xd8]) // mov cr3, eax
        .imm32(&[0xb9], 0xc000_0080) // mov ecx, EFER
        .raw(&[0x0f, 0x32]) // rdmsr
        .imm32(&[0x0d], 0x100) // or eax, LME
        .raw(&[0x0f, 0x30]) // wrmsr
        .raw(&[0x0f, 0x20, 0xc0]) // mov eax, cr0
        .imm32(&[0x0d], 0x8000_0001) // or eax, PG | PE
        .raw(&[0x0f, 0x22, 0xc0]) // mov cr0, eax
        .imm32(&[0x0f, 0x01, 0x15], GDT_POINTER as u32); // lgdt
    let long = LOAD as u32 + code.here() as u32 + 7;
    code.imm32(&[0xea], long) // jmp far to the next instruction
        .raw(&CODE_64.to_le_bytes())
        .imm32(&[0xb8], DATA_0.into()) // mov eax, data
        .raw(&[0x8e, 0xd0, 0x8e, 0xd8, 0x8e, 0xc0]) // mov ss, ds, es
        .raw(&[0x89, 0xe8, 0xc1, 0xe0, 12]) // mov eax, ebp; shl eax, 12
        .imm32(&[0x05], STACKS as u32 + 0x1000) // add eax, end of the stack
        .raw(&[0x89, 0xc4]) // mov esp, eax
        .raw(&[0x89, 0xe8, 0xc1, 0xe0, 4]) // mov eax, ebp; shl eax, 4
        .imm32(&[0x05], TASK.into()) // add eax, task
        .raw(&[0x0f, 0x00, 0xd8]) // ltr ax
        .raw(&[0x85, 0xed]); // test ebp, ebp
    let to_ring_3 = code.forward(JNE);
    code.imm32(&[0xb9], 0x1b) // mov ecx, IA32_APIC_BASE
        .raw(&[0x0f, 0x32]) // rdmsr
        .imm32(&[0x0d], 0x400) // or eax, x2APIC
        .raw(&[0x0f, 0x30]) // wrmsr
        .wrmsr(0x80f, 0x1ff) // enable it
        .wrmsr(0x830, 1 << 32 | 0x4500) // INIT to processor 1
        .wrmsr(0x830, 1 << 32 | 0x4600 | SECOND >> 12) // start-up IPI
        .land(to_ring_3)
        .raw(&[0x6a, DATA_3 as u8]) // push ss
        .raw(&[0x54]) // push rsp
        .imm32(&[0x68], 2) // push rflags
        .raw(&[0x6a, CODE_3 as u8]) // push cs
        .imm32(&[0x68], PROGRAM as u32) // push rip
        .raw(&[0x48, 0xcf]); // iretq
    let mut code = code.finish();
    let at = LOAD as u32 + code.len() as u32;
    code[place..place + 4].copy_from_slice(&at.to_le_bytes());
    code.extend(second);
    code
}

/// Where the second processor goes on in 32-bit mode: behind the first 25 bytes of [`boot`].
const SECOND_32: u64 = LOAD + 25;

/// Real mode, at [`SECOND`]: to 32-bit protected mode.
fn second() -> Vec<u8> {
    let mut code = Code::default();
    // The pointer to the GDT lies behind these 28 bytes.
    code.raw(&[0xfa, 0x8c, 0xc8, 0x8e, 0xd8]) // cli; mov ax, cs; mov ds, ax
        .raw(&[0x66, 0x0f, 0x01, 0x16, 28, 0]) // lgdt [28], with all of its base
        .raw(&[0x0f, 0x20, 0xc0]) // mov eax, cr0
        .raw(&[0x0c, 0x01]) // or al, PE
        .raw(&[0x0f, 0x22, 0xc0]) // mov cr0, eax
        .imm32(&[0x66, 0xea], SECOND_32 as u32) // jmp far
        .raw(&CODE_32.to_le_bytes())
        .raw(&[0x90]) // nop
        .raw(&GDT_LIMIT.to_le_bytes())
        .raw(&(GDT as u32).to_le_bytes());
    code.finish()
}

/// Ring 3: counts in R15, writes pages, prints. EBP holds the processor's number.
fn program() -> Vec<u8> {
    let [many, few] = DATA_PAGES.map(|pages| pages as u32 - 1);
    let mut code = Code::default();
    code.raw(&[0x89, 0xe8, 0xc1, 0xe0, 12]) // mov eax, ebp; shl eax, 12
        .imm32(&[0x4c, 0x8d, 0xb0], COUNTERS as u32) // lea r14, [rax + counters]
        .raw(&[0xc1, 0xe0, 8]) // shl eax, 8
        .imm32(&[0x4c, 0x8d, 0xa8], DATA as u32) // lea r13, [rax + data]
        .raw(&[0x89, 0xe8, 0xc1, 0xe0, 5]) // mov eax, ebp; shl eax, 5
        .imm32(&[0x41, 0xbc], 'a' as u32) // mov r12d, 'a'
        .raw(&[0x41, 0x29, 0xc4]) // sub r12d, eax
        .imm32(&[0x41, 0xbb], many) // mov r11d, mask
        .raw(&[0x85, 0xed]) // test ebp, ebp
        .raw(&[0x74, 0x06]) // je over the next instruction
        .imm32(&[0x41, 0xbb], few) // mov r11d, mask
        .raw(&[0x45, 0x31, 0xff]); // xor r15d, r15d
    let round = code.here();
    code.raw(&[0x49, 0xff, 0xc7]) // inc r15
        .raw(&[0x4d, 0x89, 0x3e]) // mov [r14], r15
        .raw(&[0x44, 0x89, 0xf8]) // mov eax, r15d
        .raw(&[0x44, 0x21, 0xd8]) // and eax, r11d
        .raw(&[0xc1, 0xe0, 12]) // shl eax, 12
        .raw(&[0x4d, 0x89, 0x7c, 0x05, 0x00]) // mov [r13 + rax], r15
        .imm32(&[0x41, 0xf7, 0xc7], ROUNDS_PER_LETTER as u32 - 1) // test r15d, rounds - 1
        .back(JNE, round)
        .raw(&[0x4c, 0x89, 0xf8]) // mov rax, r15
        .raw(&[0x48, 0xc1, 0xe8, ROUNDS_PER_LETTER.ilog2() as u8]) // shr rax, rounds
        .raw(&[0x31, 0xd2]) // xor edx, edx
        .imm32(&[0xb9], 26) // mov ecx, 26
        .raw(&[0xf7, 0xf1]) // div ecx
        .raw(&[0x42, 0x8d, 0x04, 0x22]) // lea eax, [rdx + r12]
        .port(SERIAL)
        .raw(&[0xee]) // out dx, al
        .back(JMP, round);
    code.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_lie_where_they_look_for_each_other() {
        let boot = boot();
        assert!(boot.len() < 0x1000);
        // mov eax, data
        assert_eq!(boot[(SECOND_32 - LOAD) as usize], 0xb8);
        let second = second();
        assert_eq!(second.len(), 28 + 6);
        assert!(boot.ends_with(&second));
        assert_eq!(second[28..30], GDT_LIMIT.to_le_bytes());
    }
}
