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

use crate::assembler::Condition::{Above, Below, Equal, Greater, Less, NotEqual, NotLess};
use crate::assembler::Operation::{Add, And, Compare, Sub, Xor};
use crate::assembler::Place::{At, By};
use crate::assembler::Register::{
    R8, R9, R10, R11, R12, R13, R14, R15, Rax, Rbp, Rbx, Rcx, Rdi, Rdx, Rsi, Rsp,
};
use crate::assembler::{Code, Label, Register};
use crate::image::{
    APIC, CODE_0, CODE_3, DATA_0, DATA_3, GDT_POINTER, IDT_POINTER, LIMIT, PML4, PROGRAM,
    STACK_RING_0, STACK_RING_3, TASK, USABLE, VARIABLES,
};
use crate::parameters::{KEYS, Key};
use crate::stream::kind;

/// Vectors of the guest.
pub(crate) mod vector {
    /// General protection: what HLT means in ring 3. It is how ring 3 asks for sleep, since all machines deliver it,
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
/// Spreads page numbers over all seeds.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
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
    read_parameters(&mut code, &routines);
    find_memory(&mut code);
    derive_times(&mut code);
    fill(&mut code, &routines);
    work(&mut code, &routines);
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

/// Subroutines. They change RAX, RCX, RDX, RSI and RDI.
struct Routines {
    /// Sends a record: its kind in RSI, its numbers in RAX and RDI.
    emit: Label,
    /// Where the value of the parameter begins whose name is at RSI: RAX, 0 when it is not given.
    find: Label,
    /// The decimal number at RAX.
    number: Label,
    /// Fills the page at RDI.
    fill_page: Label,
    /// Looks whether the page at RDI holds what it was filled with; sends a record if not.
    check_page: Label,
}

impl Routines {
    fn write(code: &mut Code) -> Self {
        let emit = emit(code);
        Self {
            emit,
            find: find(code),
            number: number(code),
            fill_page: fill_page(code),
            check_page: check_page(code, emit),
        }
    }
}

fn out(code: &mut Code) {
    code.raw(&[0xee]); // out dx, al
}

fn port(code: &mut Code) {
    code.raw(&[0x66, 0xba]).raw(&PORT.to_le_bytes()); // mov dx, port
}

fn emit(code: &mut Code) -> Label {
    let (five, next) = (code.label(), code.label());
    let start = code.here();
    port(code);
    code.raw(&[0x57, 0x50]).copy(Rax, Rsi); // push rdi; push rax
    out(code);
    code.raw(&[0x58])
        .call(five) // pop rax
        .raw(&[0x58]) // pop rax
        .place(five)
        .set(Rcx, 5)
        .place(next)
        .copy(Rsi, Rax)
        .apply_value(And, Rax, 0x7f);
    out(code);
    code.copy(Rax, Rsi)
        .shift_right(Rax, 7)
        .apply_value(Sub, Rcx, 1)
        .jump_if(NotEqual, next)
        .done();
    start
}

fn find(code: &mut Code) -> Label {
    let (compare, found, differs, none) = (code.label(), code.label(), code.label(), code.label());
    let start = code.here();
    code.load(Rdi, At(COMMAND_LINE))
        .apply_value(Compare, Rdi, 0)
        .jump_if(Equal, none);
    let next = code.here();
    code.set(Rcx, 0)
        .place(compare)
        .copy(Rdx, Rsi)
        .apply(Add, Rdx, Rcx)
        .load_byte(Rax, By(Rdx, 0))
        .apply_value(Compare, Rax, 0)
        .jump_if(Equal, found)
        .copy(Rdx, Rdi)
        .apply(Add, Rdx, Rcx)
        .load_byte(Rdx, By(Rdx, 0))
        .apply(Compare, Rax, Rdx)
        .jump_if(NotEqual, differs)
        .apply_value(Add, Rcx, 1)
        .jump(compare)
        .place(differs)
        .load_byte(Rax, By(Rdi, 0))
        .apply_value(Compare, Rax, 0)
        .jump_if(Equal, none)
        .apply_value(Add, Rdi, 1)
        .jump(next)
        .place(found)
        .copy(Rax, Rdi)
        .apply(Add, Rax, Rcx)
        .done()
        .place(none)
        .set(Rax, 0)
        .done();
    start
}

fn number(code: &mut Code) -> Label {
    let end = code.label();
    let start = code.here();
    code.copy(Rsi, Rax).set(Rax, 0);
    let next = code.here();
    code.load_byte(Rcx, By(Rsi, 0))
        .apply_value(Sub, Rcx, b'0'.into())
        .apply_value(Compare, Rcx, 9)
        .jump_if(Above, end)
        .set(Rdx, 10)
        .multiply(Rax, Rdx)
        .apply(Add, Rax, Rcx)
        .apply_value(Add, Rsi, 1)
        .jump(next)
        .place(end)
        .done();
    start
}

/// RAX becomes the seed of the page at RDI; changes RCX.
fn seed(code: &mut Code) {
    code.copy(Rax, Rdi)
        .shift_right(Rax, 12)
        .apply_value(Add, Rax, 1)
        .set(Rcx, SPREAD)
        .multiply(Rax, Rcx);
}

/// RAX becomes the next random number (Marsaglia, "Xorshift RNGs", 13, 7, 17); changes RCX.
fn random(code: &mut Code) {
    code.copy(Rcx, Rax)
        .shift_left(Rcx, 13)
        .apply(Xor, Rax, Rcx)
        .copy(Rcx, Rax)
        .shift_right(Rcx, 7)
        .apply(Xor, Rax, Rcx)
        .copy(Rcx, Rax)
        .shift_left(Rcx, 17)
        .apply(Xor, Rax, Rcx);
}

/// Leads to `zero` or `compressible` when that is how pages are filled; changes RCX.
fn by_content(code: &mut Code, zero: Label, compressible: Label) {
    code.load(Rcx, At(value(Key::Fill)))
        .apply_value(Compare, Rcx, b'z'.into())
        .jump_if(Equal, zero)
        .apply_value(Compare, Rcx, b'c'.into())
        .jump_if(Equal, compressible);
}

fn fill_page(code: &mut Code) -> Label {
    let (zero, compressible) = (code.label(), code.label());
    let start = code.here();
    by_content(code, zero, compressible);
    seed(code);
    code.set(Rdx, 512);
    let next = code.here();
    random(code);
    code.store(By(Rdi, 0), Rax)
        .apply_value(Add, Rdi, 8)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done()
        .place(zero)
        .set(Rax, 0)
        .set(Rcx, 512)
        .raw(&[0xf3, 0x48, 0xab]) // rep stosq
        .done()
        .place(compressible);
    seed(code);
    code.set(Rdx, 128).copy(Rsi, Rax);
    let next = code.here();
    random(code);
    code.store(By(Rdi, 0), Rax);
    for offset in [8, 16, 24] {
        code.store(By(Rdi, offset), Rsi);
    }
    code.apply_value(Add, Rdi, 32)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done();
    start
}

fn check_page(code: &mut Code, emit: Label) -> Label {
    let (zero, any, compressible) = (code.label(), code.label(), code.label());
    let start = code.here();
    by_content(code, zero, compressible);
    seed(code);
    code.jump(any)
        .place(zero)
        // The random numbers that follow zero are zero.
        .set(Rax, 0)
        .place(any)
        .set(Rdx, 512);
    let next = code.here();
    random(code);
    check(code, Rax, 0, emit);
    code.apply_value(Add, Rdi, 8)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done()
        .place(compressible);
    seed(code);
    code.set(Rdx, 128).copy(Rsi, Rax);
    let next = code.here();
    random(code);
    check(code, Rax, 0, emit);
    for offset in [8, 16, 24] {
        check(code, Rsi, offset, emit);
    }
    code.apply_value(Add, Rdi, 32)
        .apply_value(Sub, Rdx, 1)
        .jump_if(NotEqual, next)
        .done();
    start
}

/// Sends a record and returns from the routine when the memory at RDI plus `offset` is not
/// `expected`, unless a write of the working set made that so. Changes RCX.
fn check(code: &mut Code, expected: Register, offset: i32, emit: Label) {
    let (right, wrong) = (code.label(), code.label());
    code.apply_memory(Compare, expected, By(Rdi, offset))
        .jump_if(Equal, right);
    if offset == 0 {
        // The first 8 bytes of a page of the working set hold the number of its last write.
        code.copy(Rcx, Rdi)
            .apply_value(And, Rcx, PAGE - 1)
            .jump_if(NotEqual, wrong)
            .copy(Rcx, Rdi)
            .apply(Sub, Rcx, R10)
            .shift_right(Rcx, 12)
            .apply(Compare, Rcx, R11)
            .jump_if(Below, right)
            .place(wrong);
    }
    code.copy(Rax, Rdi)
        .shift_right(Rax, 12)
        .load(Rdi, By(Rdi, offset))
        .set(Rsi, kind::WRONG.into())
        .jump(emit)
        .place(right);
}

fn read_parameters(code: &mut Code, routines: &Routines) {
    code.load(Rax, By(Rbx, 24)) // the start info's command line …
        .store(At(COMMAND_LINE), Rax)
        .load(Rax, By(Rbx, 40)) // … its memory map …
        .store(At(MAP), Rax)
        .load_four(Rax, By(Rbx, 48)) // … and how many entries that has
        .store(At(MAP_LEFT), Rax);
    for key in Key::ALL {
        let (given, known) = (code.label(), code.label());
        code.set(Rsi, name(key).into())
            .call(routines.find)
            .apply_value(Compare, Rax, 0)
            .jump_if(NotEqual, given)
            .set(Rax, key.default_value())
            .jump(known)
            .place(given);
        if key.is_word() {
            code.load_byte(Rax, By(Rax, 0));
        } else {
            code.call(routines.number);
        }
        code.place(known).store(At(value(key)), Rax);
    }
}

/// Lists the RAM from [`USABLE`] to [`LIMIT`], and of that no more than is to be filled; puts the
/// working set at the start of the first range.
fn find_memory(code: &mut Code) {
    let (entry, skip, low, high, some, end) = (
        code.label(),
        code.label(),
        code.label(),
        code.label(),
        code.label(),
        code.label(),
    );
    code.set(Rdi, RANGES.into())
        .load(Rsi, At(MAP))
        .load(R8, At(value(Key::FillMebibytes)))
        .shift_left(R8, 20) // bytes that may still be filled
        .place(entry)
        .load(Rax, At(MAP_LEFT))
        .apply_value(Sub, Rax, 1)
        .jump_if(Less, end)
        .store(At(MAP_LEFT), Rax)
        .load_four(Rax, By(Rsi, 16))
        .apply_value(Compare, Rax, 1) // RAM
        .jump_if(NotEqual, skip)
        .load(Rax, By(Rsi, 0))
        .load(Rcx, By(Rsi, 8))
        .apply(Add, Rcx, Rax)
        .apply_value(Compare, Rax, USABLE as i32)
        .jump_if(NotLess, low)
        .set(Rax, USABLE.into())
        .place(low)
        .apply_value(Add, Rax, PAGE - 1)
        .apply_value(And, Rax, -PAGE)
        .apply_value(And, Rcx, -PAGE)
        .set(Rdx, LIMIT)
        .apply(Compare, Rcx, Rdx)
        .jump_if(Below, high)
        .copy(Rcx, Rdx)
        .place(high)
        .copy(Rdx, Rcx)
        .apply(Sub, Rdx, Rax) // bytes in this range
        .jump_if(Less, skip)
        .jump_if(Equal, skip)
        .apply(Compare, Rdx, R8)
        .jump_if(Below, some)
        .copy(Rdx, R8)
        .copy(Rcx, Rax)
        .apply(Add, Rcx, Rdx)
        .place(some)
        .apply_value(Compare, Rdx, 0)
        .jump_if(Equal, end)
        .apply(Sub, R8, Rdx)
        .store(By(Rdi, 0), Rax)
        .store(By(Rdi, 8), Rcx)
        .apply_value(Add, Rdi, 16)
        .apply_value(Compare, Rdi, RANGES_LIMIT as i32)
        .jump_if(Equal, end)
        .place(skip)
        .apply_value(Add, Rsi, 24)
        .jump(entry)
        .place(end)
        .store(At(RANGES_END), Rdi);
    let fits = code.label();
    code.load(R10, At(RANGES))
        .load(R11, At(value(Key::WorkingSetMebibytes)))
        .shift_left(R11, 8)
        .load(Rax, At(RANGES + 8))
        .apply(Sub, Rax, R10)
        .shift_right(Rax, 12)
        .apply(Compare, R11, Rax)
        .jump_if(Below, fits)
        .copy(R11, Rax)
        .place(fits);
}

/// From microseconds and mebibytes to TSC ticks.
fn derive_times(code: &mut Code) {
    let (known, idle, some) = (code.label(), code.label(), code.label());
    code.load(R8, At(value(Key::TscKilohertz)))
        .apply_value(Compare, R8, 0)
        .jump_if(NotEqual, known)
        .load(R8, At(MEASURED))
        .store(At(value(Key::TscKilohertz)), R8)
        .place(known)
        .set(Rcx, 1000)
        .load(Rax, At(value(Key::IntervalMicroseconds)))
        .multiply(Rax, R8)
        .divide(Rcx)
        .store(At(INTERVAL), Rax)
        .shift_left(Rax, 2)
        .store(At(LATENESS), Rax)
        .copy(Rax, R8)
        .set(Rcx, 50) // a fiftieth of a millisecond
        .divide(Rcx)
        .store(At(NAP), Rax)
        .set(Rax, 0)
        .load(Rcx, At(value(Key::RateMebibytes)))
        .shift_left(Rcx, 8) // pages a second
        .jump_if(Equal, idle)
        .apply_value(Compare, R11, 0)
        .jump_if(Equal, idle)
        .set(Rax, 1000)
        .multiply(Rax, R8)
        .divide(Rcx)
        .apply_value(Compare, Rax, 0)
        .jump_if(NotEqual, some)
        .set(Rax, 1)
        .place(some)
        .place(idle)
        .store(At(SPACING), Rax);
}

/// Fills all ranges, gives the working set its first values, and says so.
fn fill(code: &mut Code, routines: &Routines) {
    let (range, page, filled) = (code.label(), code.label(), code.label());
    code.set(R14, 0) // pages
        .set(Rbx, RANGES.into())
        .place(range)
        .apply_memory(Compare, Rbx, At(RANGES_END))
        .jump_if(Equal, filled)
        .load(R15, By(Rbx, 0))
        .place(page)
        .copy(Rdi, R15)
        .call(routines.fill_page)
        .apply_value(Add, R14, 1)
        .apply_value(Add, R15, PAGE)
        .apply_memory(Compare, R15, By(Rbx, 8))
        .jump_if(Below, page)
        .apply_value(Add, Rbx, 16)
        .jump(range)
        .place(filled)
        .store(At(PAGES), R14);
    // Write number n expects to find n less the number of pages.
    let (next, done) = (code.label(), code.label());
    code.set(R9, 0)
        .set(R8, 0)
        .place(next)
        .apply(Compare, R8, R11)
        .jump_if(Equal, done)
        .copy(Rax, R8)
        .apply(Sub, Rax, R11);
    page_of_working_set(code);
    code.store(By(Rdi, 0), Rax);
    advance(code);
    code.apply_value(Add, R8, 1).jump(next).place(done);
    code.set(R9, 0)
        .set(R8, 0)
        .load(Rax, At(value(Key::TscKilohertz)))
        .load(Rdi, At(PAGES))
        .set(Rsi, kind::READY.into())
        .call(routines.emit);
}

/// RDI becomes the address of the page that is written next.
fn page_of_working_set(code: &mut Code) {
    code.copy(Rdi, R9).shift_left(Rdi, 12).apply(Add, Rdi, R10);
}

/// R9 becomes the page after that. A working set may be smaller than a stride.
fn advance(code: &mut Code) {
    let (inside, wrap) = (code.label(), code.label());
    code.apply_value(Add, R9, STRIDE)
        .place(wrap)
        .apply(Compare, R9, R11)
        .jump_if(Below, inside)
        .apply(Sub, R9, R11)
        .jump(wrap)
        .place(inside);
}

fn work(code: &mut Code, routines: &Routines) {
    let (ticks, sleep) = (code.label(), code.label());
    let idle = code.label();
    code.load(Rax, At(INTERVAL))
        .apply_value(Compare, Rax, 0)
        .jump_if(NotEqual, idle)
        .set(Rcx, 0)
        .raw(&[HLT])
        .place(idle)
        .set(R14, 0)
        .set(Rbp, 0)
        .set(Rbx, RANGES.into())
        .load(R15, By(Rbx, 0));
    count(code, routines);
    code.time().copy(R12, Rax).copy(R13, Rax);
    let top = code.here();
    code.time();
    write_what_is_due(code, routines, ticks);
    code.place(ticks);
    tick_when_due(code, routines, sleep);
    scrub(code, routines);
    code.place(sleep);
    rest(code, top);
}

/// Sends how many ticks and writes there were.
fn count(code: &mut Code, routines: &Routines) {
    code.copy(Rax, R14)
        .copy(Rdi, R8)
        .set(Rsi, kind::COUNT.into())
        .call(routines.emit);
}

/// Makes the writes that are due at the time in RAX. After a long wait, most are left out: a guest that could
/// not work for a second does not work twice as fast in the next. A clock that went back, as one
/// may that changed its host, sets a new beginning.
fn write_what_is_due(code: &mut Code, routines: &Routines, done: Label) {
    let (late, early, next, right) = (code.label(), code.label(), code.label(), code.label());
    code.load(Rcx, At(SPACING))
        .apply_value(Compare, Rcx, 0)
        .jump_if(Equal, done)
        .raw(&[0x50]) // push rax
        .copy(Rdx, Rax)
        .apply(Sub, Rdx, R12)
        .apply_memory(Compare, Rdx, At(LATENESS))
        .jump_if(Less, late)
        .copy(R12, Rax)
        .apply_memory(Sub, R12, At(LATENESS))
        .place(late)
        .apply_memory(Add, Rdx, At(LATENESS))
        .jump_if(NotLess, early)
        .copy(R12, Rax)
        .place(early)
        .place(next)
        .load(Rax, By(Rsp, 0))
        .apply(Sub, Rax, R12)
        .apply_value(Compare, Rax, 0);
    let over = code.label();
    code.jump_if(Less, over);
    page_of_working_set(code);
    code.copy(Rdx, R8)
        .apply(Sub, Rdx, R11)
        .load(Rcx, By(Rdi, 0))
        .store(By(Rdi, 0), R8)
        .apply(Compare, Rcx, Rdx)
        .jump_if(Equal, right)
        .copy(Rax, Rdi)
        .shift_right(Rax, 12)
        .copy(Rdi, Rcx)
        .set(Rsi, kind::WRONG.into())
        .call(routines.emit)
        .place(right);
    advance(code);
    code.apply_value(Add, R8, 1)
        .apply_memory(Add, R12, At(SPACING))
        .jump(next)
        .place(over)
        .raw(&[0x58]); // pop rax
}

/// Ticks when that is due at the time in RAX, and every so often sends the counts.
fn tick_when_due(code: &mut Code, routines: &Routines, not_due: Label) {
    let (forward, due, counted, ahead) = (code.label(), code.label(), code.label(), code.label());
    code.copy(Rdx, Rax)
        .apply(Sub, Rdx, R13)
        .jump_if(NotLess, due)
        .apply_memory(Add, Rdx, At(LATENESS))
        .jump_if(NotLess, forward)
        .copy(R13, Rax) // the clock went back
        .jump(due)
        .place(forward)
        .jump(not_due)
        .place(due)
        .copy(Rax, R14)
        .apply_value(And, Rax, 0x7f);
    port(code);
    out(code);
    code.apply_value(Add, R14, 1)
        .copy(Rax, R14)
        .apply_value(And, Rax, 0x7f)
        .jump_if(NotEqual, counted);
    count(code, routines);
    code.place(counted)
        .apply_memory(Add, R13, At(INTERVAL))
        .time()
        .apply(Compare, R13, Rax)
        .jump_if(Greater, ahead)
        .copy(R13, Rax)
        .apply_memory(Add, R13, At(INTERVAL))
        .place(ahead);
}

/// Checks as many pages as are to be checked at each tick, and tells when all have been.
fn scrub(code: &mut Code, routines: &Routines) {
    let (next, over, go) = (code.label(), code.label(), code.label());
    code.load(Rcx, At(value(Key::ScrubPages)))
        .raw(&[0x51]) // push rcx
        .place(next)
        .raw(&[0x59]) // pop rcx
        .apply_value(Sub, Rcx, 1)
        .jump_if(Less, over)
        .raw(&[0x51]) // push rcx
        .copy(Rdi, R15)
        .call(routines.check_page)
        .apply_value(Add, R15, PAGE)
        .apply_memory(Compare, R15, By(Rbx, 8))
        .jump_if(Below, next)
        .apply_value(Add, Rbx, 16)
        .apply_memory(Compare, Rbx, At(RANGES_END))
        .jump_if(Below, go)
        .apply_value(Add, Rbp, 1)
        .copy(Rax, Rbp)
        .load(Rdi, At(PAGES))
        .set(Rsi, kind::SCRUBBED.into())
        .call(routines.emit)
        .set(Rbx, RANGES.into())
        .place(go)
        .load(R15, By(Rbx, 0))
        .jump(next)
        .place(over);
}

/// Sleeps until the next tick, when that is worth it.
fn rest(code: &mut Code, top: Label) {
    let short = code.label();
    code.load(Rax, At(value(Key::Wait)))
        .apply_value(Compare, Rax, b'h'.into())
        .jump_if(NotEqual, top)
        .time()
        .copy(Rcx, R13)
        .apply(Sub, Rcx, Rax)
        .apply_memory(Compare, Rcx, At(NAP))
        .jump_if(Less, top)
        .set(Rax, 1_000_000)
        .multiply(Rax, Rcx)
        .load(Rcx, At(value(Key::TscKilohertz)))
        .divide(Rcx)
        .copy(Rcx, Rax)
        .set(Rdx, LONGEST_SLEEP)
        .apply(Compare, Rcx, Rdx)
        .jump_if(Below, short)
        .copy(Rcx, Rdx)
        .place(short)
        .raw(&[HLT])
        .jump(top);
}
