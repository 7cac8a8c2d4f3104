//! The way into translated code and out of it.

use std::arch::naked_asm;
use std::mem::offset_of;

use super::{Context, slot_at};
use crate::cpu::Cpu;

/// From the processor to what R15 holds in translated code: 124 bytes before it the guest's R10 is, and
/// what is used most lies within 127 bytes behind it, so that a byte tells the distance.
///
/// R15 ends with the number of bits that an offset in a page has, for shifts, which look at no more than
/// the last six bits of their count.
pub(super) const BIAS: usize = offset_of!(Cpu, regs) + 10 * 8 + 124;
const _: () = assert!(BIAS % 64 == 12 && align_of::<Cpu>() == 64);
/// From there to the context.
pub(super) const CONTEXT: usize = offset_of!(Cpu, native) - BIAS;

const FLAGS: usize = CONTEXT + offset_of!(Context, flags);
const TARGET: usize = CONTEXT + offset_of!(Context, scratch);
const EXIT: usize = CONTEXT + offset_of!(Context, exit);
const STACK: usize = CONTEXT + offset_of!(Context, host_stack);
const BOTTOM: usize = CONTEXT + offset_of!(Context, bottom);

/// Runs translated code at `target` until it leaves; the number of the exit.
///
/// # Safety
/// `cpu` is a processor whose translated code is at `target`, and nothing else uses it meanwhile.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn enter(cpu: *mut Cpu, target: *const u8) -> u32 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "lea r15, [rdi + {bias}]",
        "mov [r15 + {target}], rsi",
        "mov [r15 + {stack}], rsp",
        "push qword ptr [r15 + {bottom}]",
        // AL is 1 for an overflow, AH the other flags.
        "movzx eax, word ptr [r15 + {flags}]",
        "add al, 0x7f",
        "sahf",
        "mov rax, [r15 + {rax}]",
        "mov r13, [r15 + {rcx}]",
        "mov rdx, [r15 + {rdx}]",
        "mov rbx, [r15 + {rbx}]",
        "mov r14, [r15 + {rsp}]",
        "mov rbp, [r15 + {rbp}]",
        "mov rsi, [r15 + {rsi}]",
        "mov rdi, [r15 + {rdi}]",
        "mov r8, [r15 + {r8}]",
        "mov r9, [r15 + {r9}]",
        "mov r12, [r15 + {r12}]",
        "jmp [r15 + {target}]",
        bias = const BIAS,
        target = const TARGET,
        stack = const STACK,
        bottom = const BOTTOM,
        flags = const FLAGS,
        rax = const slot_at(0),
        rcx = const slot_at(1),
        rdx = const slot_at(2),
        rbx = const slot_at(3),
        rsp = const slot_at(4),
        rbp = const slot_at(5),
        rsi = const slot_at(6),
        rdi = const slot_at(7),
        r8 = const slot_at(8),
        r9 = const slot_at(9),
        r12 = const slot_at(12),
    )
}

/// Where translated code goes when it leaves: never called.
///
/// # Safety
/// Only to be jumped to by translated code that [`enter`] has entered.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn leave() {
    naked_asm!(
        "mov [r15 + {rax}], rax",
        "mov [r15 + {rcx}], r13",
        "mov [r15 + {rdx}], rdx",
        "mov [r15 + {rbx}], rbx",
        "mov [r15 + {rsp}], r14",
        "mov [r15 + {rbp}], rbp",
        "mov [r15 + {rsi}], rsi",
        "mov [r15 + {rdi}], rdi",
        "mov [r15 + {r8}], r8",
        "mov [r15 + {r9}], r9",
        "mov [r15 + {r12}], r12",
        "seto al",
        "lahf",
        "mov [r15 + {flags}], ax",
        "mov eax, [r15 + {exit}]",
        // Calls that have not returned yet are forgotten.
        "mov rsp, [r15 + {stack}]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        flags = const FLAGS,
        stack = const STACK,
        exit = const EXIT,
        rax = const slot_at(0),
        rcx = const slot_at(1),
        rdx = const slot_at(2),
        rbx = const slot_at(3),
        rsp = const slot_at(4),
        rbp = const slot_at(5),
        rsi = const slot_at(6),
        rdi = const slot_at(7),
        r8 = const slot_at(8),
        r9 = const slot_at(9),
        r12 = const slot_at(12),
    )
}
