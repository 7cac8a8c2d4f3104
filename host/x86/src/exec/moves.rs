//! MOV and its kin, and the stack in 64-bit mode.

use super::Result;
use super::flags::condition;
use super::op::{Op, slot};
use super::value::Value;
use crate::cpu::Cpu;

/// MOV register, register.
pub(crate) fn rr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.set_reg(op.dst, cpu.reg::<T>(op.src));
    Ok(())
}

/// MOV register, immediate.
pub(crate) fn ri<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.set_reg(op.dst, T::from_u64(op.imm));
    Ok(())
}

/// MOV register, memory.
pub(crate) fn rm<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.read::<T>(op)?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

/// MOV memory, register.
pub(crate) fn mr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.write(op, cpu.reg::<T>(op.src))
}

/// MOV memory, immediate.
pub(crate) fn mi<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.write(op, T::from_u64(op.imm))
}

/// MOVZX register, register: to `T` from `S`.
pub(crate) fn zx_rr<T: Value, S: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.set_reg(op.dst, T::from_u64(cpu.reg::<S>(op.src).zero_extend()));
    Ok(())
}

/// MOVZX register, memory.
pub(crate) fn zx_rm<T: Value, S: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.read::<S>(op)?;
    cpu.set_reg(op.dst, T::from_u64(value.zero_extend()));
    Ok(())
}

/// MOVSX register, register.
pub(crate) fn sx_rr<T: Value, S: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.set_reg(op.dst, T::from_u64(cpu.reg::<S>(op.src).sign_extend()));
    Ok(())
}

/// MOVSX register, memory.
pub(crate) fn sx_rm<T: Value, S: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.read::<S>(op)?;
    cpu.set_reg(op.dst, T::from_u64(value.sign_extend()));
    Ok(())
}

/// LEA; the address is cut to the operand's size.
pub(crate) fn lea<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.set_reg(op.dst, T::from_u64(cpu.offset(op)));
    Ok(())
}

/// CMOVcc register, register.
pub(crate) fn cmov_rr<T: Value, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result {
    let source = if condition::<C>(cpu.flags) {
        op.src
    } else {
        op.dst
    };
    cpu.set_reg(op.dst, cpu.reg::<T>(source));
    Ok(())
}

/// CMOVcc register, memory: reads whatever the condition.
pub(crate) fn cmov_rm<T: Value, const C: u8>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.read::<T>(op)?;
    let value = if condition::<C>(cpu.flags) {
        value
    } else {
        cpu.reg(op.dst)
    };
    cpu.set_reg(op.dst, value);
    Ok(())
}

/// SETcc register.
pub(crate) fn set_r<const C: u8>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.set_reg(op.dst, u8::from(condition::<C>(cpu.flags)));
    Ok(())
}

/// SETcc memory.
pub(crate) fn set_m<const C: u8>(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.write(op, u8::from(condition::<C>(cpu.flags)))
}

/// CBW, CWDE, CDQE: to `T` from its half `S`.
pub(crate) fn extend_accumulator<T: Value, S: Value>(cpu: &mut Cpu, _op: &Op) -> Result {
    cpu.set_reg(
        slot::RAX,
        T::from_u64(cpu.reg::<S>(slot::RAX).sign_extend()),
    );
    Ok(())
}

/// CWD, CDQ, CQO.
pub(crate) fn sign_to_rdx<T: Value>(cpu: &mut Cpu, _op: &Op) -> Result {
    let sign = (cpu.reg::<T>(slot::RAX).sign_extend() as i64) >> 63;
    cpu.set_reg(slot::RDX, T::from_u64(sign as u64));
    Ok(())
}

/// BSWAP.
pub(crate) fn bswap<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.reg::<T>(op.dst).zero_extend().swap_bytes() >> (64 - T::BITS);
    cpu.set_reg(op.dst, T::from_u64(value));
    Ok(())
}

/// MOVBE register, memory.
pub(crate) fn movbe_rm<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.read::<T>(op)?.zero_extend().swap_bytes() >> (64 - T::BITS);
    cpu.set_reg(op.dst, T::from_u64(value));
    Ok(())
}

/// MOVBE memory, register.
pub(crate) fn movbe_mr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.reg::<T>(op.src).zero_extend().swap_bytes() >> (64 - T::BITS);
    cpu.write(op, T::from_u64(value))
}

/// Does nothing.
pub(crate) fn nop(_cpu: &mut Cpu, _op: &Op) -> Result {
    Ok(())
}

/// PUSH in 64-bit mode, of an operand of size `T`.
#[inline(always)]
pub(crate) fn push64<T: Value>(cpu: &mut Cpu, value: T) -> Result {
    let rsp = cpu.rsp().wrapping_sub(T::BYTES);
    cpu.store(rsp, slot::SS, value)?;
    cpu.set_reg(slot::RSP, rsp);
    Ok(())
}

/// PUSH register.
pub(crate) fn push_r<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    push64::<T>(cpu, cpu.reg(op.src))
}

/// PUSH immediate.
pub(crate) fn push_i<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    push64(cpu, T::from_u64(op.imm))
}

/// PUSH memory.
pub(crate) fn push_m<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.read::<T>(op)?;
    push64(cpu, value)
}

/// POP register.
pub(crate) fn pop_r<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let rsp = cpu.rsp();
    let value = cpu.load::<T>(rsp, slot::SS)?;
    cpu.set_reg(slot::RSP, rsp.wrapping_add(T::BYTES));
    cpu.set_reg(op.dst, value);
    Ok(())
}

/// POP memory: an address with RSP as base uses its new value.
pub(crate) fn pop_m<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let rsp = cpu.rsp();
    let value = cpu.load::<T>(rsp, slot::SS)?;
    let moved = if op.base == slot::RSP { T::BYTES } else { 0 };
    cpu.store(cpu.ea(op).wrapping_add(moved), op.seg, value)?;
    cpu.set_reg(slot::RSP, rsp.wrapping_add(T::BYTES));
    Ok(())
}

/// LEAVE.
pub(crate) fn leave(cpu: &mut Cpu, _op: &Op) -> Result {
    let rbp = cpu.slot(slot::RBP);
    let value = cpu.load::<u64>(rbp, slot::SS)?;
    cpu.set_reg(slot::RSP, rbp.wrapping_add(8));
    cpu.set_reg(slot::RBP, value);
    Ok(())
}
