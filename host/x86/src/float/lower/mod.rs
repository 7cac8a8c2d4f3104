//! From decoded x87, MMX, SSE and AVX instructions to handlers.
//!
//! The tables below match on mnemonics and name the function that does the work; the builders
//! here fetch its operands by the instruction's form and write its result. A form is fixed when
//! the handler is made, so that no handler asks at run time where its operand is.

mod fpu;
pub(super) mod moves;
mod packed;
mod sse;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::cpu::Cpu;
use crate::exec::op::{Handler, Op, straight};
use crate::exec::{Exception, Result};

/// What the integer core puts into its [`Op`]; the memory operand is its own work.
#[derive(Clone, Copy)]
pub(crate) struct Lowered {
    pub(crate) handler: Handler,
    /// Number of the first operand's register.
    pub(crate) dst: u8,
    /// Number of the second operand's register.
    pub(crate) src: u8,
    pub(crate) imm: u64,
}

/// The handler of an x87, MMX or SSE instruction; `None` for any other, and for those that no
/// CPU baseline offers.
pub(crate) fn lower(instruction: &Instruction) -> Option<Lowered> {
    if let Some(lowered) = fpu::lower(instruction) {
        return Some(lowered);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(lowered) = crate::float::avx::lower(instruction) {
        return Some(lowered);
    }
    let handler = moves::lower(instruction)
        .or_else(|| packed::lower(instruction))
        .or_else(|| sse::lower(instruction))?;
    // The masked stores have an implied memory operand before their registers.
    let first = match instruction.mnemonic() {
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => 1,
        _ => 0,
    };
    Some(Lowered {
        handler,
        dst: register_number(instruction.op_register(first)),
        src: register_number(instruction.op_register(first + 1)),
        imm: immediate(instruction),
    })
}

/// The number by which handlers address a register.
pub(super) fn register_number(register: Register) -> u8 {
    match register {
        Register::None => 0,
        Register::AH => 0x20,
        Register::CH => 0x21,
        Register::DH => 0x22,
        Register::BH => 0x23,
        _ => register.full_register().number() as u8,
    }
}

/// The last operand, if it is an immediate.
fn immediate(instruction: &Instruction) -> u64 {
    let last = instruction.op_count().saturating_sub(1);
    match instruction.op_kind(last) {
        OpKind::Immediate8 => instruction.immediate8().into(),
        _ => 0,
    }
}

/// Where a second operand comes from.
mod from {
    /// The immediate.
    pub(super) const IMMEDIATE: u8 = 0;
    pub(super) const M16: u8 = 2;
    pub(super) const M32: u8 = 4;
    pub(super) const M64: u8 = 8;
    /// Memory that must be aligned.
    pub(super) const M128: u8 = 16;
    /// Memory that need not be aligned.
    pub(super) const M128_UNALIGNED: u8 = 17;
    pub(super) const XMM: u8 = 32;
    /// After `enter_mmx`, if that is due.
    pub(super) const MMX: u8 = 33;
    pub(super) const R32: u8 = 34;
    pub(super) const R64: u8 = 35;
}

#[inline(always)]
fn xmm(cpu: &Cpu, number: u8) -> u128 {
    cpu.float.xmm[usize::from(number & 15)]
}

#[inline(always)]
fn set_xmm(cpu: &mut Cpu, number: u8, value: u128) {
    cpu.float.xmm[usize::from(number & 15)] = value;
}

/// Fetches the second operand; may end the instruction only where it reads memory.
#[inline(always)]
fn source<const FROM: u8>(cpu: &mut Cpu, op: &Op) -> Result<u128> {
    Ok(match FROM {
        from::IMMEDIATE => op.imm.into(),
        from::M16 => cpu.read::<u16>(op)?.into(),
        from::M32 => cpu.read::<u32>(op)?.into(),
        from::M64 => cpu.read::<u64>(op)?.into(),
        from::M128 => {
            cpu.check_aligned(op, 16)?;
            cpu.read_u128(op)?
        }
        from::M128_UNALIGNED => cpu.read_u128(op)?,
        from::XMM => xmm(cpu, op.src),
        from::MMX => cpu.float.mmx_before_entry(op.src.into()).into(),
        from::R32 => cpu.reg::<u32>(op.src).into(),
        _ => cpu.reg::<u64>(op.src).into(),
    })
}

/// May an MMX instruction run?
#[inline]
fn check_mmx(cpu: &mut Cpu) -> Result {
    if cpu.cr0 & crate::cpu::control::CR0_EM != 0 {
        return Err(cpu.undefined());
    }
    cpu.check_x87()
}

/// #XM, or #UD where the system does not expect it.
#[cold]
pub(super) fn simd_exception(cpu: &mut Cpu) -> crate::exec::Abort {
    const CR4_OSXMMEXCPT: u64 = 1 << 10;
    if cpu.cr4 & CR4_OSXMMEXCPT != 0 {
        cpu.raise(Exception::Simd)
    } else {
        cpu.undefined()
    }
}

/// A function of destination, source and immediate.
trait Packed: Fn(u128, u128, u8) -> u128 + Copy + 'static {}
impl<F: Fn(u128, u128, u8) -> u128 + Copy + 'static> Packed for F {}

fn is_register(instruction: &Instruction, operand: u32) -> bool {
    instruction.op_kind(operand) == OpKind::Register
}

/// XMM register, source of `FROM`.
fn xmm_from<const FROM: u8>(f: impl Packed) -> Handler {
    straight(move |cpu, op| {
        cpu.check_sse()?;
        let b = source::<FROM>(cpu, op)?;
        let a = xmm(cpu, op.dst);
        set_xmm(cpu, op.dst, f(a, b, op.imm as u8));
        Ok(())
    })
}

/// XMM register, XMM register or memory of `MEMORY`.
fn xmm_xmmm<const MEMORY: u8>(instruction: &Instruction, f: impl Packed) -> Handler {
    match instruction.op1_kind() {
        OpKind::Register => xmm_from::<{ from::XMM }>(f),
        OpKind::Immediate8 => xmm_from::<{ from::IMMEDIATE }>(f),
        _ => xmm_from::<MEMORY>(f),
    }
}

/// MMX register, source of `FROM`.
fn mm_from<const FROM: u8>(f: impl Packed) -> Handler {
    straight(move |cpu, op| {
        check_mmx(cpu)?;
        let b = source::<FROM>(cpu, op)?;
        cpu.float.enter_mmx();
        let a = cpu.float.mmx(op.dst.into());
        let result = f(a.into(), b, op.imm as u8);
        cpu.float.set_mmx(op.dst.into(), result as u64);
        Ok(())
    })
}

/// MMX register, MMX register or memory of `MEMORY`.
fn mm_mmm<const MEMORY: u8>(instruction: &Instruction, f: impl Packed) -> Handler {
    match instruction.op1_kind() {
        OpKind::Register => mm_from::<{ from::MMX }>(f),
        OpKind::Immediate8 => mm_from::<{ from::IMMEDIATE }>(f),
        _ => mm_from::<MEMORY>(f),
    }
}
