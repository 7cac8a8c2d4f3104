//! Moves between registers and memory, inserts, extracts and masks of signs.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::from::{M32, M64, M128, M128_UNALIGNED, MMX, R32, R64, XMM};
use super::{check_mmx, is_register, mm_from, set_xmm, xmm, xmm_from, xmm_xmmm};
use crate::cpu::Cpu;
use crate::exec::Result;
use crate::exec::op::{Handler, Op, straight};
use crate::float::integer::{sign_mask, sign_mask_bytes};
use crate::float::shuffle::{self, extract, insert};

pub(super) fn lower(instruction: &Instruction) -> Option<Handler> {
    whole(instruction)
        .or_else(|| parts(instruction))
        .or_else(|| general(instruction))
        .or_else(|| inserts(instruction))
        .or_else(|| extracts(instruction))
        .or_else(|| masks(instruction))
        .or_else(|| masked_stores(instruction))
}

/// Stores `f` of the XMM register `op.src`: 4, 8 or 16 bytes.
fn store_xmm<const TO: u8>(f: impl Fn(u128) -> u128 + Copy + 'static) -> Handler {
    straight(move |cpu, op| {
        cpu.check_sse()?;
        let value = f(xmm(cpu, op.src));
        match TO {
            M32 => cpu.write(op, value as u32),
            M64 => cpu.write(op, value as u64),
            M128 => {
                cpu.check_aligned(op, 16)?;
                cpu.write_u128(op, value)
            }
            _ => cpu.write_u128(op, value),
        }
    })
}

/// A move to or from memory of `MEMORY`, or between registers, where `merge` makes the result.
fn mov<const MEMORY: u8>(
    instruction: &Instruction,
    merge: impl Fn(u128, u128) -> u128 + Copy + 'static,
) -> Handler {
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Register) => xmm_from::<XMM>(move |a, b, _| merge(a, b)),
        (OpKind::Register, _) => xmm_from::<MEMORY>(|_, b, _| b),
        _ => store_xmm::<MEMORY>(|value| value),
    }
}

fn second(_: u128, b: u128) -> u128 {
    b
}

/// Whole registers, and the scalars that a register form merges.
fn whole(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match instruction.mnemonic() {
        Movups | Movupd | Movdqu | Lddqu => mov::<M128_UNALIGNED>(instruction, second),
        Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa => {
            mov::<M128>(instruction, second)
        }
        Movss => mov::<M32>(instruction, shuffle::merge_low_32),
        // The string move has the same name.
        Movsd if is_register(instruction, 0) && instruction.op0_register().is_xmm() => {
            mov::<M64>(instruction, shuffle::merge_low_64)
        }
        Movsd if is_register(instruction, 1) && instruction.op1_register().is_xmm() => {
            store_xmm::<M64>(|value| value)
        }
        _ => return None,
    })
}

/// Halves of registers.
fn parts(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    let loads = is_register(instruction, 0);
    Some(match instruction.mnemonic() {
        Movlps | Movlpd if loads => xmm_from::<M64>(|a, b, _| shuffle::merge_low_64(a, b)),
        Movlps | Movlpd => store_xmm::<M64>(|value| value),
        Movhps | Movhpd if loads => xmm_from::<M64>(|a, b, _| shuffle::merge_high(a, b)),
        Movhps | Movhpd => store_xmm::<M64>(|value| value >> 64),
        Movhlps => xmm_from::<XMM>(|a, b, _| shuffle::movhlps(a, b)),
        Movlhps => xmm_from::<XMM>(|a, b, _| shuffle::merge_high(a, b)),
        _ => return None,
    })
}

/// Writes `value` to the general register of `op.dst`.
fn to_register<const WIDE: bool>(cpu: &mut Cpu, op: &Op, value: u64) {
    if WIDE {
        cpu.set_reg::<u64>(op.dst, value);
    } else {
        cpu.set_reg::<u32>(op.dst, value as u32);
    }
}

/// A general register gets `f` of an XMM register and the immediate.
fn register_from_xmm<const WIDE: bool>(f: impl Fn(u128, u8) -> u64 + Copy + 'static) -> Handler {
    straight(move |cpu, op| {
        cpu.check_sse()?;
        let value = f(xmm(cpu, op.src), op.imm as u8);
        to_register::<WIDE>(cpu, op, value);
        Ok(())
    })
}

/// A general register gets `f` of an MMX register and the immediate.
fn register_from_mmx<const WIDE: bool>(f: impl Fn(u64, u8) -> u64 + Copy + 'static) -> Handler {
    straight(move |cpu, op| {
        check_mmx(cpu)?;
        cpu.float.enter_mmx();
        let value = f(cpu.float.mmx(op.src.into()), op.imm as u8);
        to_register::<WIDE>(cpu, op, value);
        Ok(())
    })
}

/// Stores an MMX register.
fn store_mmx<const TO: u8>() -> Handler {
    straight(|cpu, op| {
        check_mmx(cpu)?;
        let value = cpu.float.mmx_before_entry(op.src.into());
        match TO {
            M32 => cpu.write(op, value as u32)?,
            _ => cpu.write(op, value)?,
        }
        cpu.float.enter_mmx();
        Ok(())
    })
}

/// MOVD, MOVQ and their like: by code, since one mnemonic has many forms.
fn general(instruction: &Instruction) -> Option<Handler> {
    use Code::*;
    let registers = is_register(instruction, 0) && is_register(instruction, 1);
    Some(match instruction.code() {
        Movd_xmm_rm32 if registers => xmm_from::<R32>(|_, b, _| b),
        Movd_xmm_rm32 => xmm_from::<M32>(|_, b, _| b),
        Movq_xmm_rm64 if registers => xmm_from::<R64>(|_, b, _| b),
        Movq_xmm_rm64 | Movq_xmm_xmmm64 => {
            xmm_xmmm::<M64>(instruction, |_, b, _| b & u128::from(u64::MAX))
        }
        Movq_xmmm64_xmm if registers => xmm_from::<XMM>(|_, b, _| b & u128::from(u64::MAX)),
        Movd_rm32_xmm if registers => register_from_xmm::<false>(|value, _| value as u64),
        Movd_rm32_xmm => store_xmm::<M32>(|value| value),
        Movq_rm64_xmm if registers => register_from_xmm::<true>(|value, _| value as u64),
        Movq_rm64_xmm | Movq_xmmm64_xmm => store_xmm::<M64>(|value| value),
        Movd_mm_rm32 if registers => mm_from::<R32>(|_, b, _| b),
        Movd_mm_rm32 => mm_from::<M32>(|_, b, _| b),
        Movq_mm_rm64 if registers => mm_from::<R64>(|_, b, _| b),
        Movq_mm_mmm64 if registers => mm_from::<MMX>(|_, b, _| b),
        Movq_mm_rm64 | Movq_mm_mmm64 => mm_from::<M64>(|_, b, _| b),
        Movd_rm32_mm if registers => register_from_mmx::<false>(|value, _| value),
        Movd_rm32_mm => store_mmx::<M32>(),
        Movq_rm64_mm if registers => register_from_mmx::<true>(|value, _| value),
        Movq_mmm64_mm if registers => mm_from::<MMX>(|_, b, _| b),
        Movq_rm64_mm | Movq_mmm64_mm | Movntq_m64_mm => store_mmx::<M64>(),
        Movdq2q_mm_xmm => straight(|cpu, op| {
            cpu.check_sse()?;
            check_mmx(cpu)?;
            let value = xmm(cpu, op.src);
            cpu.float.enter_mmx();
            cpu.float.set_mmx(op.dst.into(), value as u64);
            Ok(())
        }),
        Movq2dq_xmm_mm => straight(|cpu, op| {
            cpu.check_sse()?;
            check_mmx(cpu)?;
            cpu.float.enter_mmx();
            let value = cpu.float.mmx(op.src.into());
            set_xmm(cpu, op.dst, value.into());
            Ok(())
        }),
        Movnti_m32_r32 => straight(|cpu, op| {
            let value: u32 = cpu.reg(op.src);
            cpu.write(op, value)
        }),
        Movnti_m64_r64 => straight(|cpu, op| {
            let value: u64 = cpu.reg(op.src);
            cpu.write(op, value)
        }),
        Emms => straight(|cpu, _| {
            check_mmx(cpu)?;
            cpu.float.leave_mmx();
            Ok(())
        }),
        _ => return None,
    })
}

fn inserts(instruction: &Instruction) -> Option<Handler> {
    use super::from::M16;
    use Mnemonic::*;
    let register = is_register(instruction, 1);
    Some(match instruction.mnemonic() {
        Pinsrb if register => xmm_from::<R32>(|a, b, at| insert(a, b as u8, at)),
        Pinsrb => straight(|cpu, op| {
            cpu.check_sse()?;
            let value: u8 = cpu.read(op)?;
            let result = insert(xmm(cpu, op.dst), value, op.imm as u8);
            set_xmm(cpu, op.dst, result);
            Ok(())
        }),
        Pinsrw if instruction.op0_register().is_mm() => {
            let f = |a, b, at| insert(a, b as u16, at & 3);
            if register {
                mm_from::<R32>(f)
            } else {
                mm_from::<M16>(f)
            }
        }
        Pinsrw if register => xmm_from::<R32>(|a, b, at| insert(a, b as u16, at)),
        Pinsrw => xmm_from::<M16>(|a, b, at| insert(a, b as u16, at)),
        Pinsrd if register => xmm_from::<R32>(|a, b, at| insert(a, b as u32, at)),
        Pinsrd => xmm_from::<M32>(|a, b, at| insert(a, b as u32, at)),
        Pinsrq if register => xmm_from::<R64>(|a, b, at| insert(a, b as u64, at)),
        Pinsrq => xmm_from::<M64>(|a, b, at| insert(a, b as u64, at)),
        _ => return None,
    })
}

fn extracts(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    let register = is_register(instruction, 0);
    macro_rules! form {
        ($lane:ty) => {
            if register {
                register_from_xmm::<true>(|value, at| extract::<$lane>(value, at).into())
            } else {
                straight(|cpu, op| {
                    cpu.check_sse()?;
                    let value: $lane = extract(xmm(cpu, op.src), op.imm as u8);
                    cpu.write(op, value)
                })
            }
        };
    }
    Some(match instruction.mnemonic() {
        Pextrb => form!(u8),
        Pextrw if instruction.op1_register().is_mm() => {
            register_from_mmx::<true>(|value, at| value >> ((at & 3) * 16) & 0xffff)
        }
        Pextrw => form!(u16),
        Pextrd | Extractps => form!(u32),
        Pextrq => form!(u64),
        _ => return None,
    })
}

fn masks(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match instruction.mnemonic() {
        Movmskps => register_from_xmm::<true>(|value, _| sign_mask::<i32>(value).into()),
        Movmskpd => register_from_xmm::<true>(|value, _| sign_mask::<i64>(value).into()),
        Pmovmskb if instruction.op1_register().is_mm() => {
            register_from_mmx::<true>(|value, _| sign_mask_bytes(value.into()).into())
        }
        Pmovmskb => register_from_xmm::<true>(|value, _| sign_mask_bytes(value).into()),
        _ => return None,
    })
}

/// MASKMOVQ and MASKMOVDQU, to the address in RDI.
fn masked_stores(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match instruction.mnemonic() {
        Maskmovq => straight(|cpu, op| {
            check_mmx(cpu)?;
            let value = cpu.float.mmx_before_entry(op.dst.into());
            let mask = cpu.float.mmx_before_entry(op.src.into());
            // Here the change-over comes first, as processors have it, and stays after a fault.
            cpu.float.enter_mmx();
            store_masked(cpu, op, &value.to_le_bytes(), &mask.to_le_bytes())
        }),
        Maskmovdqu => straight(|cpu, op| {
            cpu.check_sse()?;
            let (value, mask) = (xmm(cpu, op.dst), xmm(cpu, op.src));
            store_masked(cpu, op, &value.to_le_bytes(), &mask.to_le_bytes())
        }),
        _ => return None,
    })
}

/// Stores the bytes whose mask byte is negative.
pub(in crate::float) fn store_masked(cpu: &mut Cpu, op: &Op, value: &[u8], mask: &[u8]) -> Result {
    let at = cpu.ea(op);
    cpu.check_writable(at, value.len() as u64, op.seg)?;
    for (index, (byte, mask)) in value.iter().zip(mask).enumerate() {
        if mask & 0x80 != 0 {
            cpu.store(at.wrapping_add(index as u64), op.seg, *byte)?;
        }
    }
    Ok(())
}
