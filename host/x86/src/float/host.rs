//! The seam behind which floating-point arithmetic happens: the host's own instructions.
//!
//! SSE functions run with all exceptions masked, in the rounding, flush and denormal modes that
//! [`Environment`] carries, and collect the exception flags there; whether a flag raises #XM is
//! for [`super::arithmetic`] to say. x87 runs on the guest's own registers and control word.
//! On other hosts `portable` takes this file's place, function by function.

#![expect(
    unsafe_code,
    reason = "executes the host's own SSE and x87 instructions"
)]

use std::arch::{asm, global_asm};

use super::state::FloatState;
use super::x87::{X87Operand, X87Routine};

/// Modes and flags of SSE arithmetic, in MXCSR's layout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Environment {
    mxcsr: u32,
}

const FLAGS: u32 = 0x3f;
const MASKS: u32 = 0x1f80;

/// MXCSR as Rust code expects it: all masked, to nearest.
static HOST_MXCSR: u32 = MASKS;

/// The exception flags of this thread's MXCSR.
pub(super) fn flags() -> u32 {
    let mut mxcsr = 0_u32;
    // SAFETY: writes the number.
    unsafe {
        asm!(
            "stmxcsr [{mxcsr}]",
            mxcsr = in(reg) &raw mut mxcsr,
            options(nostack, preserves_flags),
        );
    }
    mxcsr & FLAGS
}

/// Makes this thread's MXCSR what Rust code expects, with no flag set.
pub(super) fn clear_flags() {
    // SAFETY: reads the constant.
    unsafe {
        asm!(
            "ldmxcsr [{host}]",
            host = in(reg) &raw const HOST_MXCSR,
            options(nostack, preserves_flags, readonly),
        );
    }
}

impl Environment {
    /// Takes the modes from `mxcsr`; no flag is set yet.
    pub(super) fn new(mxcsr: u32) -> Self {
        Self {
            mxcsr: mxcsr & !FLAGS | MASKS,
        }
    }

    /// The flags of all operations since.
    pub(super) fn flags(self) -> u32 {
        self.mxcsr & FLAGS
    }

    /// Forgets flags that are set in `flags`.
    pub(super) fn drop_flags(&mut self, flags: u32) {
        self.mxcsr &= !(flags & FLAGS);
    }
}

/// Two registers in, one out: most of SSE. The source is read from memory, so that scalar forms,
/// and those that take integers or MMX-sized operands, read just what they should.
pub(super) type Arithmetic = fn(u128, u128, &mut Environment) -> u128;

macro_rules! arithmetic {
    ($($name:ident: $instruction:literal;)*) => {$(
        pub(super) fn $name(a: u128, b: u128, environment: &mut Environment) -> u128 {
            let mut a = a;
            // SAFETY: reads `b` and `a`, writes `a` and the environment, all alive and aligned;
            // leaves MXCSR as it was. All exceptions are masked.
            unsafe {
                asm!(
                    "movaps xmm0, [{a}]",
                    "ldmxcsr [{environment}]",
                    concat!($instruction, " [{b}]"),
                    "stmxcsr [{environment}]",
                    "ldmxcsr [{host}]",
                    "movaps [{a}], xmm0",
                    a = in(reg) &raw mut a,
                    b = in(reg) &raw const b,
                    environment = in(reg) &raw mut environment.mxcsr,
                    host = in(reg) &raw const HOST_MXCSR,
                    out("xmm0") _,
                    options(nostack, preserves_flags),
                );
            }
            a
        }
    )*};
}

arithmetic! {
    addps: "addps xmm0, xmmword ptr";
    addpd: "addpd xmm0, xmmword ptr";
    addss: "addss xmm0, dword ptr";
    addsd: "addsd xmm0, qword ptr";
    subps: "subps xmm0, xmmword ptr";
    subpd: "subpd xmm0, xmmword ptr";
    subss: "subss xmm0, dword ptr";
    subsd: "subsd xmm0, qword ptr";
    mulps: "mulps xmm0, xmmword ptr";
    mulpd: "mulpd xmm0, xmmword ptr";
    mulss: "mulss xmm0, dword ptr";
    mulsd: "mulsd xmm0, qword ptr";
    divps: "divps xmm0, xmmword ptr";
    divpd: "divpd xmm0, xmmword ptr";
    divss: "divss xmm0, dword ptr";
    divsd: "divsd xmm0, qword ptr";
    minps: "minps xmm0, xmmword ptr";
    minpd: "minpd xmm0, xmmword ptr";
    minss: "minss xmm0, dword ptr";
    minsd: "minsd xmm0, qword ptr";
    maxps: "maxps xmm0, xmmword ptr";
    maxpd: "maxpd xmm0, xmmword ptr";
    maxss: "maxss xmm0, dword ptr";
    maxsd: "maxsd xmm0, qword ptr";
    sqrtps: "sqrtps xmm0, xmmword ptr";
    sqrtpd: "sqrtpd xmm0, xmmword ptr";
    sqrtss: "sqrtss xmm0, dword ptr";
    sqrtsd: "sqrtsd xmm0, qword ptr";
    rcpps: "rcpps xmm0, xmmword ptr";
    rcpss: "rcpss xmm0, dword ptr";
    rsqrtps: "rsqrtps xmm0, xmmword ptr";
    rsqrtss: "rsqrtss xmm0, dword ptr";
    addsubps: "addsubps xmm0, xmmword ptr";
    addsubpd: "addsubpd xmm0, xmmword ptr";
    haddps: "haddps xmm0, xmmword ptr";
    haddpd: "haddpd xmm0, xmmword ptr";
    hsubps: "hsubps xmm0, xmmword ptr";
    hsubpd: "hsubpd xmm0, xmmword ptr";
    cmpeqps: "cmpeqps xmm0, xmmword ptr";
    cmpeqpd: "cmpeqpd xmm0, xmmword ptr";
    cmpeqss: "cmpeqss xmm0, dword ptr";
    cmpeqsd: "cmpeqsd xmm0, qword ptr";
    cmpltps: "cmpltps xmm0, xmmword ptr";
    cmpltpd: "cmpltpd xmm0, xmmword ptr";
    cmpltss: "cmpltss xmm0, dword ptr";
    cmpltsd: "cmpltsd xmm0, qword ptr";
    cmpleps: "cmpleps xmm0, xmmword ptr";
    cmplepd: "cmplepd xmm0, xmmword ptr";
    cmpless: "cmpless xmm0, dword ptr";
    cmplesd: "cmplesd xmm0, qword ptr";
    cmpunordps: "cmpunordps xmm0, xmmword ptr";
    cmpunordpd: "cmpunordpd xmm0, xmmword ptr";
    cmpunordss: "cmpunordss xmm0, dword ptr";
    cmpunordsd: "cmpunordsd xmm0, qword ptr";
    cvtps2pd: "cvtps2pd xmm0, qword ptr";
    cvtpd2ps: "cvtpd2ps xmm0, xmmword ptr";
    cvtss2sd: "cvtss2sd xmm0, dword ptr";
    cvtsd2ss: "cvtsd2ss xmm0, qword ptr";
    cvtdq2ps: "cvtdq2ps xmm0, xmmword ptr";
    cvtdq2pd: "cvtdq2pd xmm0, qword ptr";
    cvtps2dq: "cvtps2dq xmm0, xmmword ptr";
    cvttps2dq: "cvttps2dq xmm0, xmmword ptr";
    cvtpd2dq: "cvtpd2dq xmm0, xmmword ptr";
    cvttpd2dq: "cvttpd2dq xmm0, xmmword ptr";
    cvtsi2ss_32: "cvtsi2ss xmm0, dword ptr";
    cvtsi2ss_64: "cvtsi2ss xmm0, qword ptr";
    cvtsi2sd_32: "cvtsi2sd xmm0, dword ptr";
    cvtsi2sd_64: "cvtsi2sd xmm0, qword ptr";
}

macro_rules! rounding {
    ($($name:ident: $instruction:literal;)*) => {$(
        /// Rounds to an integer in the environment's rounding mode.
        pub(super) fn $name(a: u128, b: u128, environment: &mut Environment) -> u128 {
            let mut a = a;
            // SAFETY: as for the functions above.
            unsafe {
                asm!(
                    "movaps xmm0, [{a}]",
                    "ldmxcsr [{environment}]",
                    concat!($instruction, " [{b}], 4"),
                    "stmxcsr [{environment}]",
                    "ldmxcsr [{host}]",
                    "movaps [{a}], xmm0",
                    a = in(reg) &raw mut a,
                    b = in(reg) &raw const b,
                    environment = in(reg) &raw mut environment.mxcsr,
                    host = in(reg) &raw const HOST_MXCSR,
                    out("xmm0") _,
                    options(nostack, preserves_flags),
                );
            }
            a
        }
    )*};
}

rounding! {
    roundps: "roundps xmm0, xmmword ptr";
    roundpd: "roundpd xmm0, xmmword ptr";
    roundss: "roundss xmm0, dword ptr";
    roundsd: "roundsd xmm0, qword ptr";
}

/// One register in, an integer out.
pub(super) type ToInteger = fn(u128, &mut Environment) -> u64;

macro_rules! to_integer {
    ($($name:ident: $instruction:literal, $modifier:literal, $operand:literal;)*) => {$(
        pub(super) fn $name(source: u128, environment: &mut Environment) -> u64 {
            let result: u64;
            // SAFETY: as for the functions above.
            unsafe {
                asm!(
                    "ldmxcsr [{environment}]",
                    concat!(
                        $instruction, " {result", $modifier, "}, ", $operand, " ptr [{source}]"
                    ),
                    "stmxcsr [{environment}]",
                    "ldmxcsr [{host}]",
                    result = out(reg) result,
                    source = in(reg) &raw const source,
                    environment = in(reg) &raw mut environment.mxcsr,
                    host = in(reg) &raw const HOST_MXCSR,
                    options(nostack, preserves_flags),
                );
            }
            result
        }
    )*};
}

to_integer! {
    cvtss2si_32: "cvtss2si", ":e", "dword";
    cvtss2si_64: "cvtss2si", ":r", "dword";
    cvttss2si_32: "cvttss2si", ":e", "dword";
    cvttss2si_64: "cvttss2si", ":r", "dword";
    cvtsd2si_32: "cvtsd2si", ":e", "qword";
    cvtsd2si_64: "cvtsd2si", ":r", "qword";
    cvttsd2si_32: "cvttsd2si", ":e", "qword";
    cvttsd2si_64: "cvttsd2si", ":r", "qword";
}

/// Two registers in, the flags ZF, PF and CF in RFLAGS' places out.
pub(super) type Compare = fn(u128, u128, &mut Environment) -> u64;

macro_rules! compare {
    ($($name:ident: $instruction:literal;)*) => {$(
        pub(super) fn $name(a: u128, b: u128, environment: &mut Environment) -> u64 {
            let flags: u64;
            // SAFETY: as for the functions above.
            unsafe {
                asm!(
                    "movaps xmm0, [{a}]",
                    "ldmxcsr [{environment}]",
                    concat!($instruction, " [{b}]"),
                    "lahf",
                    "stmxcsr [{environment}]",
                    "ldmxcsr [{host}]",
                    a = in(reg) &raw const a,
                    b = in(reg) &raw const b,
                    environment = in(reg) &raw mut environment.mxcsr,
                    host = in(reg) &raw const HOST_MXCSR,
                    out("rax") flags,
                    out("xmm0") _,
                    options(nostack),
                );
            }
            flags >> 8 & 0x45
        }
    )*};
}

compare! {
    comiss: "comiss xmm0, dword ptr";
    comisd: "comisd xmm0, qword ptr";
    ucomiss: "ucomiss xmm0, dword ptr";
    ucomisd: "ucomisd xmm0, qword ptr";
}

// Every x87 instruction as a routine of four bytes: opcodes D8 to DF, register forms C0 to FF
// (512 of them), then the eight memory forms with the operand at RDI.
global_asm!(
    ".pushsection .text.dunlin_x87_table, \"ax\", @progbits",
    ".balign 64",
    ".global dunlin_x87_table",
    ".hidden dunlin_x87_table",
    "dunlin_x87_table:",
    ".set dunlin_escape, 0xd8",
    ".rept 8",
    ".set dunlin_form, 0xc0",
    ".rept 64",
    ".byte dunlin_escape, dunlin_form, 0xc3, 0xcc",
    ".set dunlin_form, dunlin_form + 1",
    ".endr",
    ".set dunlin_escape, dunlin_escape + 1",
    ".endr",
    ".set dunlin_escape, 0xd8",
    ".rept 8",
    ".set dunlin_form, 0x07",
    ".rept 8",
    ".byte dunlin_escape, dunlin_form, 0xc3, 0xcc",
    ".set dunlin_form, dunlin_form + 8",
    ".endr",
    ".set dunlin_escape, dunlin_escape + 1",
    ".endr",
    ".popsection",
);

unsafe extern "C" {
    /// The first byte of the table above.
    static dunlin_x87_table: u8;
}

/// Runs one x87 instruction on the registers in `state`; `flags` are those of RFLAGS, for
/// conditional moves and comparisons.
///
/// `state` must have no exception pending. Afterwards it may have one; then the destination is
/// as the processor leaves it. The XMM registers and MXCSR pass through unchanged; the
/// instruction and data pointers are those of the host and must be overwritten.
pub(super) fn x87(
    routine: X87Routine,
    state: &mut FloatState,
    operand: &mut X87Operand,
    flags: u64,
) -> u64 {
    debug_assert!(!state.exception_pending());
    const STATUS_FLAGS: u64 = 0xd5;
    let mut ax = (flags & STATUS_FLAGS) << 8;
    // SAFETY: the table has 576 routines of four bytes, and `X87Routine` is below that. Each
    // touches the x87 registers and at most ten bytes at RDI. `FloatState` is an FXSAVE image of
    // 512 aligned bytes without reserved MXCSR bits. Waiting instructions run before an exception
    // can be pending and the state is reset by one that does not wait; MXCSR is put back.
    unsafe {
        let target = (&raw const dunlin_x87_table).add(usize::from(routine.0) * 4);
        asm!(
            "fxrstor64 [rsi]",
            "sahf",
            "call {target}",
            "lahf",
            "fxsave64 [rsi]",
            "fninit",
            "ldmxcsr [{host}]",
            target = in(reg) target,
            host = in(reg) &raw const HOST_MXCSR,
            in("rsi") &raw mut *state,
            in("rdi") &raw mut operand.0,
            inout("rax") ax,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    flags & !STATUS_FLAGS | ax >> 8 & STATUS_FLAGS
}
