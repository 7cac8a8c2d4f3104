//! SSE floating point, conversions, comparisons, MXCSR, and the string instructions of SSE4.2.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::from::{M32, M64, M128, M128_UNALIGNED, MMX, R32, R64, XMM};
use super::{check_mmx, is_register, set_xmm, simd_exception, source, xmm};
use crate::cpu::Cpu;
use crate::exec::Result;
use crate::exec::flags::{CF, Flags, OF, SF, ZF};
use crate::exec::op::{Handler, straight};
use crate::float::arithmetic::{self, Tiny};
use crate::float::host::{self, Arithmetic, Compare, ToInteger};
use crate::float::string;

pub(super) fn lower(instruction: &Instruction) -> Option<Handler> {
    arithmetic_table(instruction)
        .or_else(|| by_immediate(instruction))
        .or_else(|| conversions(instruction))
        .or_else(|| with_mmx(instruction))
        .or_else(|| to_integers(instruction))
        .or_else(|| comparisons(instruction))
        .or_else(|| strings(instruction))
        .or_else(|| control(instruction))
}

/// A function of destination, source, immediate and MXCSR; `None` raises #XM.
trait Float: Fn((u128, u128), u8, &mut u32) -> Option<u128> + Copy + 'static {}
impl<F: Fn((u128, u128), u8, &mut u32) -> Option<u128> + Copy + 'static> Float for F {}

fn float_from<const FROM: u8>(f: impl Float) -> Handler {
    straight(move |cpu, op| {
        cpu.check_sse()?;
        let b = source::<FROM>(cpu, op)?;
        let a = xmm(cpu, op.dst);
        match f((a, b), op.imm as u8, &mut cpu.float.mxcsr) {
            Some(result) => {
                set_xmm(cpu, op.dst, result);
                Ok(())
            }
            None => Err(simd_exception(cpu)),
        }
    })
}

fn float<const MEMORY: u8>(instruction: &Instruction, f: impl Float) -> Handler {
    if is_register(instruction, 1) {
        float_from::<XMM>(f)
    } else {
        float_from::<MEMORY>(f)
    }
}

/// Lines of mnemonic, width of memory, function of the host, lanes that can be tiny.
macro_rules! table {
    ($instruction:expr; $($mnemonic:ident: $memory:ident, $f:ident, $tiny:expr;)*) => {
        match $instruction.mnemonic() {
            $(Mnemonic::$mnemonic => Some(float::<$memory>($instruction, |ab, _, mxcsr| {
                arithmetic::compute(host::$f as Arithmetic, $tiny, ab, mxcsr)
            })),)*
            _ => None,
        }
    };
}

const NEVER: Tiny = Tiny::Never;
const PS: Tiny = Tiny::Single(4);
const SS: Tiny = Tiny::Single(1);
const PD: Tiny = Tiny::Double(2);
const SD: Tiny = Tiny::Double(1);

fn arithmetic_table(instruction: &Instruction) -> Option<Handler> {
    table! { instruction;
        Addps: M128, addps, PS; Addpd: M128, addpd, PD;
        Addss: M32, addss, SS; Addsd: M64, addsd, SD;
        Subps: M128, subps, PS; Subpd: M128, subpd, PD;
        Subss: M32, subss, SS; Subsd: M64, subsd, SD;
        Mulps: M128, mulps, PS; Mulpd: M128, mulpd, PD;
        Mulss: M32, mulss, SS; Mulsd: M64, mulsd, SD;
        Divps: M128, divps, PS; Divpd: M128, divpd, PD;
        Divss: M32, divss, SS; Divsd: M64, divsd, SD;
        Minps: M128, minps, NEVER; Minpd: M128, minpd, NEVER;
        Minss: M32, minss, NEVER; Minsd: M64, minsd, NEVER;
        Maxps: M128, maxps, NEVER; Maxpd: M128, maxpd, NEVER;
        Maxss: M32, maxss, NEVER; Maxsd: M64, maxsd, NEVER;
        Sqrtps: M128, sqrtps, NEVER; Sqrtpd: M128, sqrtpd, NEVER;
        Sqrtss: M32, sqrtss, NEVER; Sqrtsd: M64, sqrtsd, NEVER;
        Rcpps: M128, rcpps, NEVER; Rcpss: M32, rcpss, NEVER;
        Rsqrtps: M128, rsqrtps, NEVER; Rsqrtss: M32, rsqrtss, NEVER;
        Addsubps: M128, addsubps, PS; Addsubpd: M128, addsubpd, PD;
        Haddps: M128, haddps, PS; Haddpd: M128, haddpd, PD;
        Hsubps: M128, hsubps, PS; Hsubpd: M128, hsubpd, PD;
    }
}

fn conversions(instruction: &Instruction) -> Option<Handler> {
    let from_table = table! { instruction;
        Cvtps2pd: M64, cvtps2pd, NEVER; Cvtpd2ps: M128, cvtpd2ps, Tiny::Single(2);
        Cvtss2sd: M32, cvtss2sd, NEVER; Cvtsd2ss: M64, cvtsd2ss, SS;
        Cvtdq2ps: M128, cvtdq2ps, NEVER; Cvtdq2pd: M64, cvtdq2pd, NEVER;
        Cvtps2dq: M128, cvtps2dq, NEVER; Cvttps2dq: M128, cvttps2dq, NEVER;
        Cvtpd2dq: M128, cvtpd2dq, NEVER; Cvttpd2dq: M128, cvttpd2dq, NEVER;
    };
    if from_table.is_some() {
        return from_table;
    }
    macro_rules! form {
        ($register:ident, $memory:ident, $f:ident) => {{
            let f = |ab, _: u8, mxcsr: &mut u32| {
                arithmetic::compute(host::$f as Arithmetic, NEVER, ab, mxcsr)
            };
            if is_register(instruction, 1) {
                float_from::<$register>(f)
            } else {
                float_from::<$memory>(f)
            }
        }};
    }
    Some(match instruction.code() {
        Code::Cvtsi2ss_xmm_rm32 => form!(R32, M32, cvtsi2ss_32),
        Code::Cvtsi2ss_xmm_rm64 => form!(R64, M64, cvtsi2ss_64),
        Code::Cvtsi2sd_xmm_rm32 => form!(R32, M32, cvtsi2sd_32),
        Code::Cvtsi2sd_xmm_rm64 => form!(R64, M64, cvtsi2sd_64),
        _ => return None,
    })
}

fn by_immediate(instruction: &Instruction) -> Option<Handler> {
    macro_rules! predicate {
        ($memory:ident, $mask:expr, $eq:ident, $lt:ident, $le:ident, $unord:ident) => {
            float::<$memory>(instruction, |ab, control, mxcsr| {
                let predicates = [host::$eq, host::$lt, host::$le, host::$unord];
                arithmetic::predicate(predicates, $mask, ab, control, mxcsr)
            })
        };
    }
    macro_rules! round {
        ($memory:ident, $f:ident) => {
            float::<$memory>(instruction, |ab, control, mxcsr| {
                arithmetic::round(host::$f, ab, control, mxcsr)
            })
        };
    }
    const LOW_32: u128 = u32::MAX as u128;
    const LOW_64: u128 = u64::MAX as u128;
    Some(match instruction.code() {
        Code::Cmpps_xmm_xmmm128_imm8 => {
            predicate!(M128, u128::MAX, cmpeqps, cmpltps, cmpleps, cmpunordps)
        }
        Code::Cmppd_xmm_xmmm128_imm8 => {
            predicate!(M128, u128::MAX, cmpeqpd, cmpltpd, cmplepd, cmpunordpd)
        }
        Code::Cmpss_xmm_xmmm32_imm8 => {
            predicate!(M32, LOW_32, cmpeqss, cmpltss, cmpless, cmpunordss)
        }
        Code::Cmpsd_xmm_xmmm64_imm8 => {
            predicate!(M64, LOW_64, cmpeqsd, cmpltsd, cmplesd, cmpunordsd)
        }
        Code::Roundps_xmm_xmmm128_imm8 => round!(M128, roundps),
        Code::Roundpd_xmm_xmmm128_imm8 => round!(M128, roundpd),
        Code::Roundss_xmm_xmmm32_imm8 => round!(M32, roundss),
        Code::Roundsd_xmm_xmmm64_imm8 => round!(M64, roundsd),
        Code::Dpps_xmm_xmmm128_imm8 => float::<M128>(instruction, |ab, control, mxcsr| {
            arithmetic::dpps([ab], control, mxcsr).map(|[sum]| sum)
        }),
        Code::Dppd_xmm_xmmm128_imm8 => float::<M128>(instruction, arithmetic::dppd),
        _ => return None,
    })
}

/// Conversions between MMX and XMM registers.
fn with_mmx(instruction: &Instruction) -> Option<Handler> {
    /// XMM register from an MMX register; with memory the x87 state is left alone.
    fn from_mmx<const FROM: u8, const ENTERS: bool>(f: impl Float) -> Handler {
        straight(move |cpu, op| {
            cpu.check_sse()?;
            if ENTERS {
                check_mmx(cpu)?;
            }
            let b = source::<FROM>(cpu, op)?;
            let a = xmm(cpu, op.dst);
            if ENTERS {
                cpu.float.enter_mmx();
            }
            let Some(result) = f((a, b), 0, &mut cpu.float.mxcsr) else {
                return Err(simd_exception(cpu));
            };
            set_xmm(cpu, op.dst, result);
            Ok(())
        })
    }
    /// MMX register from an XMM register or memory.
    fn to_mmx<const MEMORY: u8>(instruction: &Instruction, f: Arithmetic2) -> Handler {
        let body = |cpu: &mut Cpu, op: &crate::exec::op::Op, b: u128, f: Arithmetic| -> Result {
            // The state has changed over even when #XM comes.
            cpu.float.enter_mmx();
            let Some(result) = arithmetic::compute(f, NEVER, (0, b), &mut cpu.float.mxcsr) else {
                return Err(simd_exception(cpu));
            };
            cpu.float.set_mmx(op.dst.into(), result as u64);
            Ok(())
        };
        macro_rules! form {
            ($f:ident, $mask:expr) => {
                if is_register(instruction, 1) {
                    straight(move |cpu, op| {
                        cpu.check_sse()?;
                        check_mmx(cpu)?;
                        let b = source::<XMM>(cpu, op)?;
                        body(cpu, op, b & $mask, host::$f)
                    })
                } else {
                    straight(move |cpu, op| {
                        cpu.check_sse()?;
                        check_mmx(cpu)?;
                        let b = source::<MEMORY>(cpu, op)?;
                        body(cpu, op, b & $mask, host::$f)
                    })
                }
            };
        }
        match f {
            Arithmetic2::Single => form!(cvtps2dq, u128::from(u64::MAX)),
            Arithmetic2::SingleTruncated => form!(cvttps2dq, u128::from(u64::MAX)),
            Arithmetic2::Double => form!(cvtpd2dq, u128::MAX),
            Arithmetic2::DoubleTruncated => form!(cvttpd2dq, u128::MAX),
        }
    }
    let register = is_register(instruction, 1);
    // The packed conversion of four integers does for two: zero converts exactly.
    let to_single = |(a, b): (u128, u128), _: u8, mxcsr: &mut u32| {
        let result = arithmetic::compute(host::cvtdq2ps, NEVER, (0, b), mxcsr)?;
        Some(crate::float::shuffle::merge_low_64(a, result))
    };
    let to_double =
        |ab, _: u8, mxcsr: &mut u32| arithmetic::compute(host::cvtdq2pd, NEVER, ab, mxcsr);
    Some(match instruction.mnemonic() {
        Mnemonic::Cvtpi2ps if register => from_mmx::<MMX, true>(to_single),
        Mnemonic::Cvtpi2ps => from_mmx::<M64, false>(to_single),
        Mnemonic::Cvtpi2pd if register => from_mmx::<MMX, true>(to_double),
        Mnemonic::Cvtpi2pd => from_mmx::<M64, false>(to_double),
        Mnemonic::Cvtps2pi => to_mmx::<M64>(instruction, Arithmetic2::Single),
        Mnemonic::Cvttps2pi => to_mmx::<M64>(instruction, Arithmetic2::SingleTruncated),
        Mnemonic::Cvtpd2pi => to_mmx::<M128>(instruction, Arithmetic2::Double),
        Mnemonic::Cvttpd2pi => to_mmx::<M128>(instruction, Arithmetic2::DoubleTruncated),
        _ => return None,
    })
}

/// What converts to two integers in an MMX register.
#[derive(Clone, Copy)]
enum Arithmetic2 {
    Single,
    SingleTruncated,
    Double,
    DoubleTruncated,
}

fn to_integers(instruction: &Instruction) -> Option<Handler> {
    macro_rules! form {
        ($memory:ident, $f:ident) => {
            if is_register(instruction, 1) {
                form!(@ XMM, $f)
            } else {
                form!(@ $memory, $f)
            }
        };
        (@ $from:ident, $f:ident) => {
            straight(|cpu, op| {
                cpu.check_sse()?;
                let value = source::<{ $from }>(cpu, op)?;
                let f = host::$f as ToInteger;
                match arithmetic::to_integer(f, value, &mut cpu.float.mxcsr) {
                    Some(result) => {
                        cpu.set_reg::<u64>(op.dst, result);
                        Ok(())
                    }
                    None => Err(simd_exception(cpu)),
                }
            })
        };
    }
    Some(match instruction.code() {
        Code::Cvtss2si_r32_xmmm32 => form!(M32, cvtss2si_32),
        Code::Cvtss2si_r64_xmmm32 => form!(M32, cvtss2si_64),
        Code::Cvttss2si_r32_xmmm32 => form!(M32, cvttss2si_32),
        Code::Cvttss2si_r64_xmmm32 => form!(M32, cvttss2si_64),
        Code::Cvtsd2si_r32_xmmm64 => form!(M64, cvtsd2si_32),
        Code::Cvtsd2si_r64_xmmm64 => form!(M64, cvtsd2si_64),
        Code::Cvttsd2si_r32_xmmm64 => form!(M64, cvttsd2si_32),
        Code::Cvttsd2si_r64_xmmm64 => form!(M64, cvttsd2si_64),
        _ => return None,
    })
}

/// Instructions whose result is flags: the others of the arithmetic flags are cleared.
fn comparisons(instruction: &Instruction) -> Option<Handler> {
    macro_rules! compare {
        ($memory:ident, $f:ident) => {
            if is_register(instruction, 1) {
                compare!(@ XMM, $f)
            } else {
                compare!(@ $memory, $f)
            }
        };
        (@ $from:ident, $f:ident) => {
            straight(|cpu, op| {
                cpu.check_sse()?;
                let ab = (xmm(cpu, op.dst), source::<{ $from }>(cpu, op)?);
                let f = host::$f as Compare;
                match arithmetic::compare(f, ab, &mut cpu.float.mxcsr) {
                    Some(flags) => {
                        cpu.flags = Flags::from_rflags(flags);
                        Ok(())
                    }
                    None => Err(simd_exception(cpu)),
                }
            })
        };
    }
    fn test<const FROM: u8>() -> Handler {
        straight(|cpu, op| {
            cpu.check_sse()?;
            let b = source::<FROM>(cpu, op)?;
            let a = xmm(cpu, op.dst);
            let zero = if a & b == 0 { ZF } else { 0 };
            let carry = if !a & b == 0 { CF } else { 0 };
            cpu.flags = Flags::from_rflags(zero | carry);
            Ok(())
        })
    }
    Some(match instruction.mnemonic() {
        Mnemonic::Comiss => compare!(M32, comiss),
        Mnemonic::Comisd => compare!(M64, comisd),
        Mnemonic::Ucomiss => compare!(M32, ucomiss),
        Mnemonic::Ucomisd => compare!(M64, ucomisd),
        Mnemonic::Ptest if is_register(instruction, 1) => test::<XMM>(),
        Mnemonic::Ptest => test::<M128>(),
        _ => return None,
    })
}

/// Where the lengths of a string comparison come from.
mod lengths {
    pub(super) const IMPLICIT: u8 = 0;
    pub(super) const EXPLICIT_32: u8 = 1;
    pub(super) const EXPLICIT_64: u8 = 2;
}

fn strings(instruction: &Instruction) -> Option<Handler> {
    fn comparison<const FROM: u8, const LENGTHS: u8, const INDEX: bool>() -> Handler {
        straight(|cpu, op| {
            use crate::exec::op::slot::{RAX, RCX, RDX};
            cpu.check_sse()?;
            let b = source::<FROM>(cpu, op)?;
            let a = xmm(cpu, op.dst);
            let control = op.imm as u8;
            let signed = |low: u32| low as i32 as i64 as u64;
            let lengths = match LENGTHS {
                lengths::IMPLICIT => None,
                lengths::EXPLICIT_32 => Some((signed(cpu.reg(RAX)), signed(cpu.reg(RDX)))),
                _ => Some((cpu.reg(RAX), cpu.reg(RDX))),
            };
            let result = string::compare(a, b, lengths, control);
            if INDEX {
                cpu.set_reg::<u32>(RCX, result.index(control));
            } else {
                set_xmm(cpu, 0, result.mask(control));
            }
            let flag = |condition, flag| if condition { flag } else { 0 };
            cpu.flags = Flags::from_rflags(
                flag(result.bits != 0, CF)
                    | flag(result.second_short, ZF)
                    | flag(result.first_short, SF)
                    | flag(result.bits & 1 != 0, OF),
            );
            Ok(())
        })
    }
    macro_rules! form {
        ($lengths:ident, $index:literal) => {
            if is_register(instruction, 1) {
                comparison::<XMM, { lengths::$lengths }, $index>()
            } else {
                comparison::<M128_UNALIGNED, { lengths::$lengths }, $index>()
            }
        };
    }
    Some(match instruction.code() {
        Code::Pcmpestrm_xmm_xmmm128_imm8 => form!(EXPLICIT_32, false),
        Code::Pcmpestrm64_xmm_xmmm128_imm8 => form!(EXPLICIT_64, false),
        Code::Pcmpestri_xmm_xmmm128_imm8 => form!(EXPLICIT_32, true),
        Code::Pcmpestri64_xmm_xmmm128_imm8 => form!(EXPLICIT_64, true),
        Code::Pcmpistrm_xmm_xmmm128_imm8 => form!(IMPLICIT, false),
        Code::Pcmpistri_xmm_xmmm128_imm8 => form!(IMPLICIT, true),
        Code::Crc32_r32_rm8 | Code::Crc32_r64_rm8 => crc32::<u8>(instruction),
        Code::Crc32_r32_rm16 => crc32::<u16>(instruction),
        Code::Crc32_r32_rm32 => crc32::<u32>(instruction),
        Code::Crc32_r64_rm64 => crc32::<u64>(instruction),
        _ => return None,
    })
}

fn crc32<T: crate::exec::value::Value>(instruction: &Instruction) -> Handler {
    fn update<T: crate::exec::value::Value>(cpu: &mut Cpu, number: u8, data: T) {
        let crc = string::crc32c(cpu.reg(number), data.zero_extend(), size_of::<T>());
        cpu.set_reg::<u32>(number, crc);
    }
    if instruction.op1_kind() == OpKind::Register {
        straight(|cpu, op| {
            let data: T = cpu.reg(op.src);
            update(cpu, op.dst, data);
            Ok(())
        })
    } else {
        straight(|cpu, op| {
            let data: T = cpu.read(op)?;
            update(cpu, op.dst, data);
            Ok(())
        })
    }
}

fn control(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Ldmxcsr => straight(|cpu, op| {
            cpu.check_sse()?;
            let value: u32 = cpu.read(op)?;
            if cpu.float.set_mxcsr(value).is_err() {
                return Err(cpu.general_protection(0));
            }
            Ok(())
        }),
        Mnemonic::Stmxcsr => straight(|cpu, op| {
            cpu.check_sse()?;
            let value = cpu.float.mxcsr;
            cpu.write(op, value)
        }),
        _ => return None,
    })
}
