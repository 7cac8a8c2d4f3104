//! The guest's program. Each line holds one instruction, or a few that belong together.
//!
//! ```text
//!  PVH entry ─► long mode ─► APIC timer, frequency of the TSC ─► ring 3
//!     parameters ─► ranges of RAM ─► fill ─► first values of the working set ─► READY
//!       ┌─► writes that are due ─► tick, when one is due ─► scrub ─► sleep (ring 0, HLT) ─┐
//!       └─────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! In ring 3 these registers keep their meaning:
//!
//! | register | holds |
//! |---|---|
//! | R8 | writes so far |
//! | R9 | page of the working set that is written next |
//! | R10, R11 | start and pages of the working set |
//! | R12, R13 | TSC at which the next write, the next tick is due |
//! | R14 | ticks so far |
//! | R15, RBX | page that is scrubbed next, and its range |
//! | RBP | scrubs of all memory so far |

mod routines;
mod setup;
mod work;

use crate::assembler::Condition::{Below, Equal, NotEqual};
use crate::assembler::Operation::{Add, Compare, Sub};
use crate::assembler::Place::{At, By};
use crate::assembler::Register::{Rax, Rcx, Rdi, Rdx, Rsi, Rsp};
use crate::assembler::{Code, Label};
use crate::image::{
    APIC, CODE_0, CODE_3, DATA_0, DATA_3, GDT_POINTER, IDT_POINTER, PML4, PROGRAM, STACK_RING_0,
    STACK_RING_3, TASK, VARIABLES,
};
use crate::parameters::{KEYS, Key};
use crate::stream::kind;
use routines::Routines;

/// Vectors of the guest.
pub(crate) mod vector {
    /// General protection: what HLT means in ring 3. It is how ring 3 asks for sleep, since all
    /// machines deliver it,
    /// and some no INT: for as many nanoseconds as RCX says, or for ever when that is 0.
    pub(crate) const PROTECTION: u8 = 13;
    /// The timer's interrupt.
    pub(crate) const TIMER: u8 = 0x50;
    /// The APIC's word for an interrupt that went away.
    pub(crate) const SPURIOUS: u8 = 0xff;
}

const COMMAND_LINE: u32 = VARIABLES;
const INTERVAL: u32 = VARIABLES + 0x08;
/// TSC ticks from one write to the next; 0 without writes.
const SPACING: u32 = VARIABLES + 0x10;
/// Ticks of lateness that are made up for.
const LATENESS: u32 = VARIABLES + 0x18;
/// Shortest time that is slept, in TSC ticks.
const NAP: u32 = VARIABLES + 0x20;
/// Where the ranges of RAM end that are filled.
const RANGES_END: u32 = VARIABLES + 0x28;
const PAGES: u32 = VARIABLES + 0x30;
const MAP: u32 = VARIABLES + 0x38;
const MAP_LEFT: u32 = VARIABLES + 0x40;
/// TSC ticks in a millisecond, as measured.
const MEASURED: u32 = VARIABLES + 0x48;
/// Parameters, 8 bytes each.
const VALUES: u32 = VARIABLES + 0x80;
/// Ranges of RAM: start and end, 8 bytes each.
const RANGES: u32 = VARIABLES + 0x200;
const RANGES_LIMIT: u32 = VARIABLES + 0x400;
/// Names of the parameters, each ended by a zero.
pub(crate) const NAMES: u32 = VARIABLES + 0x800;

const PORT: u16 = 0xe9;
/// `hlt`.
const HLT: u8 = 0xf4;
const PAGE: i32 = 4096;
/// Pages from one write to the next, so that neighbours are not written one after the other; a
/// prime, so that all pages have their turn.
const STRIDE: i32 = 7919;
/// Nanoseconds over which the TSC is compared to the APIC's timer, which counts nanoseconds in
/// every machine that is known.
const CALIBRATION: u32 = 10_000_000;
/// Longest sleep, in nanoseconds: a clock that jumped is noticed by then.
const LONGEST_SLEEP: u64 = 10_000_000;

/// Where the value of a parameter is.
fn value(key: Key) -> u32 {
    VALUES + key as u32 * 8
}

/// Address of a parameter's name.
fn name(key: Key) -> u32 {
    let before = &KEYS[..key as usize];
    NAMES + before.iter().map(|name| name.len() as u32 + 1).sum::<u32>()
}

/// The code, and the offsets of its entry points.
pub(crate) struct Program {
    pub(crate) code: Vec<u8>,
    /// For 32-bit protected mode, as PVH begins.
    pub(crate) entry: usize,
    pub(crate) protection: usize,
    pub(crate) timer: usize,
    pub(crate) spurious: usize,
    pub(crate) trap: usize,
}

/// Assembles everything.
pub(crate) fn program() -> Program {
    let mut code = Code::default();
    let main = code.label();
    let entry = code.length();
    enter_long_mode(&mut code);
    prepare_ring_0(&mut code);
    enter_ring_3(&mut code, main);
    let routines = Routines::write(&mut code);
    let [protection, timer, spurious, trap] = ring_0_handlers(&mut code, &routines);
    code.place(main);
    setup::write(&mut code, &routines);
    work::write(&mut code, &routines);
    Program {
        entry,
        protection,
        timer,
        spurious,
        trap,
        code: code.finish(),
    }
}

/// 32-bit code, up to a far jump into 64-bit code. EBX stays: the start info.
fn enter_long_mode(code: &mut Code) {
    code.raw(&[0x0f, 0x20, 0xe0]) // mov eax, cr4
        .imm32(&[0x0d], 0x220) // or eax, PAE | OSFXSR
        .raw(&[0x0f, 0x22, 0xe0]) // mov cr4, eax
        .imm32(&[0xb8], PML4) // mov eax, PML4
        .raw(&[0x0f, 0x22, 0xd8]) // mov cr3, eax
        .imm32(&[0xb9], 0xc000_0080) // mov ecx, EFER
        .raw(&[0x0f, 0x32]) // rdmsr
        .imm32(&[0x0d], 0x100) // or eax, LME
        .raw(&[0x0f, 0x30]) // wrmsr
        .raw(&[0x0f, 0x20, 0xc0]) // mov eax, cr0
        .imm32(&[0x0d], 0x8000_0001) // or eax, PG | PE
        .raw(&[0x0f, 0x22, 0xc0]) // mov cr0, eax
        .imm32(&[0x0f, 0x01, 0x15], GDT_POINTER); // lgdt
    let long = PROGRAM + code.length() as u32 + 7;
    code.imm32(&[0xea], long) // jmp far to the next instruction
        .raw(&CODE_0.to_le_bytes());
}

/// Segments, stack, interrupts; the timer; how fast the TSC counts.
fn prepare_ring_0(code: &mut Code) {
    code.set(Rax, DATA_0.into())
        .raw(&[0x8e, 0xd0, 0x8e, 0xd8, 0x8e, 0xc0]) // mov ss, ds, es
        .set(Rsp, STACK_RING_0.into())
        .raw(&[0x89, 0xdb]) // mov ebx, ebx: the upper half is not defined
        .imm32(&[0x0f, 0x01, 0x1c, 0x25], IDT_POINTER) // lidt
        .set(Rax, TASK.into())
        .raw(&[0x0f, 0x00, 0xd8]) // ltr ax
        // No interrupts of old controllers, where there are some.
        .raw(&[0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1]); // mov al, 0xff; out 0x21, al; out 0xa1, al
    apic(code, 0xf0, 0x100 | u32::from(vector::SPURIOUS)); // enabled
    apic(code, 0x3e0, 0xb); // the timer counts at full speed
    apic(code, 0x320, 0x1_0000 | u32::from(vector::TIMER)); // masked, once
    apic(code, 0x380, u32::MAX);
    code.time().copy(Rdi, Rax).set(Rdx, APIC);
    let wait = code.here();
    code.load_four(Rcx, By(Rdx, 0x390))
        .set(Rsi, u32::MAX.into())
        .apply(Sub, Rsi, Rcx)
        .apply_value(Compare, Rsi, CALIBRATION as i32)
        .jump_if(Below, wait)
        .time()
        .apply(Sub, Rax, Rdi)
        .set(Rcx, 1_000_000)
        .multiply(Rax, Rcx)
        .divide(Rsi)
        .store(At(MEASURED), Rax);
    apic(code, 0x380, 0);
    apic(code, 0x320, vector::TIMER.into());
}

/// Writes a register of the local APIC; changes RDX and RAX.
fn apic(code: &mut Code, register: i32, value: u32) {
    code.set(Rdx, APIC)
        .set(Rax, value.into())
        .store_four(By(Rdx, register), Rax);
}

/// To ring 3, with interrupts off and all ports allowed.
fn enter_ring_3(code: &mut Code, main: Label) {
    code.raw(&[0x6a, DATA_3 as u8]) // push ss
        .imm32(&[0x68], STACK_RING_3) // push rsp
        .imm32(&[0x68], 0x3002) // push rflags, IOPL 3
        .raw(&[0x6a, CODE_3 as u8]); // push cs
    let jump = PROGRAM + code.length() as u32 + 7;
    code.imm32(&[0x68], jump) // push rip
        .raw(&[0x48, 0xcf]) // iretq
        .jump(main);
}

/// Handlers, in the order of [`Program`]'s fields. Ring 3 runs with interrupts off, so that they
/// come at the HLT of the first one alone, and no register has to be kept but ring 3's own.
fn ring_0_handlers(code: &mut Code, routines: &Routines) -> [usize; 4] {
    let (report, halt) = (code.label(), code.label());
    let protection = code.length();
    code.load(Rax, By(Rsp, 8))
        .load_byte(Rax, By(Rax, 0))
        .apply_value(Compare, Rax, HLT.into())
        .jump_if(NotEqual, report)
        .apply_value(Compare, Rcx, 0)
        .jump_if(Equal, halt)
        .set(Rdx, APIC)
        .store_four(By(Rdx, 0x380), Rcx)
        .raw(&[0x58]) // pop rax: the error code
        .load(Rax, By(Rsp, 0))
        .apply_value(Add, Rax, 1)
        .store(By(Rsp, 0), Rax)
        .raw(&[0xfb, HLT, 0xfa, 0x48, 0xcf]); // sti; hlt; cli; iretq
    let timer = code.length();
    apic(code, 0xb0, 0); // end of interrupt
    let spurious = code.length();
    code.raw(&[0x48, 0xcf]); // iretq
    let trap = code.length();
    // What lies on the stack first: the instruction's address, or an error code and then that.
    code.place(report)
        .load(Rax, By(Rsp, 0))
        .load(Rdi, By(Rsp, 8))
        .set(Rsi, kind::TRAP.into())
        .call(routines.emit)
        .place(halt)
        .raw(&[0xfa, HLT]) // cli; hlt
        .jump(halt);
    [protection, timer, spurious, trap]
}
