//! The guest's programs. Each line holds one instruction, or a few that belong together.

use crate::assembler::Code;
use crate::{
    BOOT, CODE_3, CODE_64, COUNTER, DATA, DATA_0, DATA_3, DATA_PAGES, GDT_POINTER, IDT_POINTER,
    MMIO_REPORT, PML4, PORT_ECHO, PORT_INTERRUPT, PORT_QUESTION, PORT_READY, PORT_SECOND, PROGRAM,
    Program, ROUNDS_PER_REPORT, SECOND, STACK_TOP, TIMER_TICKS, VECTOR_ARM_TIMER, VECTOR_LEVEL,
    VECTOR_PLAIN, VECTOR_START_SECOND, VECTOR_TIMER,
};

/// `jmp` and `jne` with 32-bit displacements.
const JMP: &[u8] = &[0xe9];
const JNE: &[u8] = &[0x0f, 0x85];

/// From 32-bit protected mode to the program in long mode.
pub(crate) fn boot(program: Program) -> Vec<u8> {
    let mut code = Code::default();
    code.raw(&[0x0f, 0x20, 0xe0]) // mov eax, cr4
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
    let long = BOOT as u32 + code.here() as u32 + 7;
    code.imm32(&[0xea], long) // jmp far to the next instruction
        .raw(&CODE_64.to_le_bytes())
        .imm32(&[0xb8], DATA_0.into()) // mov eax, data
        .raw(&[0x8e, 0xd0, 0x8e, 0xd8, 0x8e, 0xc0]) // mov ss, ds, es
        .imm32(&[0xbc], STACK_TOP as u32) // mov esp, stack
        .imm32(&[0x0f, 0x01, 0x1c, 0x25], IDT_POINTER as u32); // lidt
    match program {
        Program::Interrupts => {
            code.imm32(&[0xb8], PROGRAM as u32); // mov eax, program
            code.raw(&[0xff, 0xe0]); // jmp rax
        }
        Program::Count => {
            // To ring 3 with interrupts off.
            code.raw(&[0x6a, DATA_3 as u8]) // push ss
                .imm32(&[0x68], STACK_TOP as u32) // push rsp
                .imm32(&[0x68], 2) // push rflags
                .raw(&[0x6a, CODE_3 as u8]) // push cs
                .imm32(&[0x68], PROGRAM as u32) // push rip
                .raw(&[0x48, 0xcf]); // iretq
        }
    }
    code.finish()
}

/// Ring 3: counts in r15 and xmm1, writes pages, reports.
pub(crate) fn count() -> Vec<u8> {
    let mut code = Code::default();
    code.raw(&[0x45, 0x31, 0xff]) // xor r15d, r15d
        .imm32(&[0x41, 0xbe], COUNTER as u32) // mov r14d, counter
        .imm32(&[0x41, 0xbd], DATA as u32) // mov r13d, data
        .imm32(&[0xbb], MMIO_REPORT as u32) // mov ebx, mmio
        .raw(&[0x66, 0x0f, 0xef, 0xc9]); // pxor xmm1, xmm1
    let round = code.here();
    code.raw(&[0x49, 0xff, 0xc7]) // inc r15
        .raw(&[0x66, 0x49, 0x0f, 0x6e, 0xc7]) // movq xmm0, r15
        .raw(&[0x66, 0x0f, 0xd4, 0xc8]) // paddq xmm1, xmm0
        .raw(&[0x4d, 0x89, 0x3e]) // mov [r14], r15
        .raw(&[0x49, 0x6b, 0xc7, 0x07]) // imul rax, r15, 7
        .imm32(&[0x25], DATA_PAGES as u32 - 1) // and eax, pages - 1
        .raw(&[0xc1, 0xe0, 12]) // shl eax, 12
        .raw(&[0x4d, 0x89, 0x7c, 0x05, 0x00]) // mov [r13 + rax], r15
        .imm32(&[0x41, 0xf7, 0xc7], ROUNDS_PER_REPORT as u32 - 1) // test r15d, rounds - 1
        .back(JNE, round)
        .raw(&[0x66, 0x41, 0x0f, 0xd6, 0x4e, 0x08]) // movq [r14 + 8], xmm1
        .raw(&[0x4c, 0x89, 0x3b]) // mov [rbx], r15
        .raw(&[0x48, 0x8b, 0x43, 0x08]) // mov rax, [rbx + 8]
        .raw(&[0x4c, 0x89, 0xf9]) // mov rcx, r15
        .raw(&[0x48, 0xf7, 0xd1]) // not rcx
        .raw(&[0x48, 0x39, 0xc8]); // cmp rax, rcx
    let wrong = code.forward(JNE);
    code.raw(&[0x89, 0x43, 0x10]) // mov [rbx + 0x10], eax
        .back(JMP, round)
        .land(wrong)
        .raw(&[0x4c, 0x89, 0x7b, 0x18]) // mov [rbx + 0x18], r15
        .raw(&[0xeb, 0xfe]); // jmp $
    code.finish()
}

/// Ring 0: waits for interrupts. Returns the code and the handlers' vectors and offsets.
pub(crate) fn interrupts() -> (Vec<u8>, Vec<(u8, usize)>) {
    let mut code = Code::default();
    code.imm32(&[0xb9], 0x1b) // mov ecx, IA32_APIC_BASE
        .raw(&[0x0f, 0x32]) // rdmsr
        .imm32(&[0x0d], 0x400) // or eax, x2APIC
        .raw(&[0x0f, 0x30]) // wrmsr
        .wrmsr(0x80f, 0x1ff) // enable it
        .wrmsr(0x832, 0x4_0000 | u64::from(VECTOR_TIMER)) // timer in TSC-deadline mode
        .port(PORT_QUESTION)
        .raw(&[0xed]) // in eax, dx
        .port(PORT_ECHO)
        .raw(&[0xef]) // out dx, eax
        .raw(&[0x66, 0xed]) // in ax, dx
        .raw(&[0x66, 0xef]) // out dx, ax
        .port(PORT_READY)
        .raw(&[0xee]); // out dx, al
    let idle = code.here();
    code.raw(&[0xfb, 0xf4]) // sti; hlt
        .back(JMP, idle);
    let mut handlers = Vec::new();
    for vector in [
        VECTOR_PLAIN,
        VECTOR_LEVEL,
        VECTOR_ARM_TIMER,
        VECTOR_START_SECOND,
        VECTOR_TIMER,
    ] {
        handlers.push((vector, code.here()));
        code.raw(&[0x50, 0x51, 0x52]) // push rax, rcx, rdx
            .raw(&[0xb0, vector]) // mov al, vector
            .port(PORT_INTERRUPT)
            .raw(&[0xee]); // out dx, al
        if vector == VECTOR_ARM_TIMER {
            code.raw(&[0x0f, 0x31]) // rdtsc
                .imm32(&[0x05], TIMER_TICKS) // add eax, ticks
                .raw(&[0x83, 0xd2, 0x00]) // adc edx, 0
                .imm32(&[0xb9], 0x6e0) // mov ecx, IA32_TSC_DEADLINE
                .raw(&[0x0f, 0x30]); // wrmsr
        }
        if vector == VECTOR_START_SECOND {
            code.wrmsr(0x830, 1 << 32 | 0x4500) // INIT to processor 1
                .wrmsr(0x830, 1 << 32 | 0x4600 | SECOND >> 12); // start-up IPI
        }
        code.wrmsr(0x80b, 0) // end of interrupt
            .raw(&[0x5a, 0x59, 0x58]) // pop rdx, rcx, rax
            .raw(&[0x48, 0xcf]); // iretq
    }
    (code.finish(), handlers)
}

/// Real mode: reports, then sleeps for ever.
pub(crate) fn second() -> Vec<u8> {
    let mut code = Code::default();
    code.raw(&[0xba]) // mov dx, port
        .raw(&PORT_SECOND.to_le_bytes())
        .raw(&[0xb0, 0x01]) // mov al, 1
        .raw(&[0xee]) // out dx, al
        .raw(&[0xfa, 0xf4]) // cli; hlt
        .raw(&[0xeb, 0xfc]); // jmp back
    code.finish()
}
