//! Near branches, calls and returns in 64-bit mode, and relative branches in every mode.
//!
//! `imm` is the distance from the block's start to the target.

use super::Result;
use super::alu::{Alu, Cmp, Test};
use super::flags::{Flags, condition};
use super::moves::push64;
use super::op::{At, Exit, Op, slot};
use super::value::Value;
use crate::cpu::Cpu;
use crate::mmu::is_canonical;

/// Goes to a target that the links of a block do not lead to.
pub(crate) trait Reach: Copy + 'static {
    const TAKEN: Exit;
    const FALL_THROUGH: Exit;
    /// Cuts RIP to its size.
    const MASK: u64;
}

macro_rules! reach {
    ($name:ident, $taken:ident, $fall_through:ident, $mask:expr) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name;
        impl Reach for $name {
            const TAKEN: Exit = Exit::$taken;
            const FALL_THROUGH: Exit = Exit::$fall_through;
            const MASK: u64 = $mask;
        }
    };
}

// Linked where both ends are in the same page, by whether the target and the successor are.
reach!(LinkBoth, Taken, FallThrough, u64::MAX);
reach!(LinkTaken, Taken, Next, u64::MAX);
reach!(LinkFallThrough, Next, FallThrough, u64::MAX);
reach!(LinkNone, Next, Next, u64::MAX);
reach!(Bits32, Next, Next, 0xffff_ffff);
reach!(Bits16, Next, Next, 0xffff);

#[inline(always)]
fn jump<R: Reach>(cpu: &mut Cpu, op: &Op) -> Result<Exit> {
    let target = cpu.slot(slot::RIP).wrapping_add(op.imm) & R::MASK;
    if R::MASK == u64::MAX {
        if matches!(R::TAKEN, Exit::Next) && !is_canonical(target) {
            return Err(cpu.general_protection(0));
        }
    } else {
        cpu.check_code_limit(target)?;
    }
    cpu.rip = target;
    Ok(R::TAKEN)
}

#[inline(always)]
fn fall_through<R: Reach>(cpu: &mut Cpu, at: At) -> Result<Exit> {
    cpu.rip = at.next_rip(cpu)
        & if R::MASK == 0xffff {
            0xffff_ffff
        } else {
            R::MASK
        };
    Ok(R::FALL_THROUGH)
}

/// JMP relative.
pub(crate) fn jmp<R: Reach>(cpu: &mut Cpu, at: At) -> Result<Exit> {
    jump::<R>(cpu, at.get())
}

/// Jcc.
pub(crate) fn jcc<R: Reach, const C: u8>(cpu: &mut Cpu, at: At) -> Result<Exit> {
    if condition::<C>(cpu.flags) {
        jump::<R>(cpu, at.get())
    } else {
        fall_through::<R>(cpu, at)
    }
}

/// A comparison whose outcome a branch can take without a detour by the flags.
pub(crate) trait Compare: Alu {
    /// Does condition `C` hold after comparing `a` with `b`, which gave `flags`?
    fn holds<T: Value, const C: u8>(a: T, b: T, flags: Flags) -> bool;
}

impl Compare for Cmp {
    #[inline(always)]
    fn holds<T: Value, const C: u8>(a: T, b: T, flags: Flags) -> bool {
        let (ua, ub) = (a.zero_extend(), b.zero_extend());
        let (sa, sb) = (a.sign_extend() as i64, b.sign_extend() as i64);
        let holds = match C >> 1 {
            1 => ua < ub,
            2 => ua == ub,
            3 => ua <= ub,
            6 => sa < sb,
            7 => sa <= sb,
            _ => return condition::<C>(flags),
        };
        holds != (C & 1 != 0)
    }
}

impl Compare for Test {
    #[inline(always)]
    fn holds<T: Value, const C: u8>(a: T, b: T, flags: Flags) -> bool {
        let result = a.sign_extend() & b.sign_extend();
        let holds = match C >> 1 {
            0 | 1 => false,
            2 | 3 => result == 0,
            4 | 6 => (result as i64) < 0,
            7 => result as i64 <= 0,
            _ => return condition::<C>(flags),
        };
        holds != (C & 1 != 0)
    }
}

/// CMP or TEST of a register with a register or (`IMMEDIATE`) with `imm`, and the Jcc behind it,
/// both of whose ways stay in the page. `disp` is the distance to the target.
pub(crate) fn compare_jcc<T: Value, O: Compare, const IMMEDIATE: bool, const C: u8>(
    cpu: &mut Cpu,
    at: At,
) -> Result<Exit> {
    let op = at.get();
    let a: T = cpu.reg(op.dst);
    let b = if IMMEDIATE {
        T::from_u64(op.imm)
    } else {
        cpu.reg(op.src)
    };
    let flags = O::apply(a, b, cpu.flags).1;
    cpu.flags = flags;
    if O::holds::<T, C>(a, b, flags) {
        cpu.rip = cpu.slot(slot::RIP).wrapping_add(op.disp as u64);
        Ok(Exit::Taken)
    } else {
        cpu.rip = at.next_rip(cpu);
        Ok(Exit::FallThrough)
    }
}

/// The end of a block that goes on behind it. `offset` is the block's length.
pub(crate) fn end<R: Reach>(cpu: &mut Cpu, at: At) -> Result<Exit> {
    cpu.rip = cpu.slot(slot::RIP).wrapping_add(at.get().offset.into())
        & if R::MASK == 0xffff {
            0xffff_ffff
        } else {
            R::MASK
        };
    Ok(R::FALL_THROUGH)
}

/// CALL relative, 64-bit.
pub(crate) fn call<R: Reach>(cpu: &mut Cpu, at: At) -> Result<Exit> {
    let target = cpu.slot(slot::RIP).wrapping_add(at.get().imm);
    if matches!(R::TAKEN, Exit::Next) && !is_canonical(target) {
        return Err(cpu.general_protection(0));
    }
    push64::<u64>(cpu, at.next_rip(cpu))?;
    cpu.rip = target;
    Ok(R::TAKEN)
}

#[inline(always)]
fn to(cpu: &mut Cpu, target: u64) -> Result<Exit> {
    if !is_canonical(target) {
        return Err(cpu.general_protection(0));
    }
    cpu.rip = target;
    Ok(Exit::Next)
}

/// CALL register, 64-bit.
pub(crate) fn call_r(cpu: &mut Cpu, at: At) -> Result<Exit> {
    let target = cpu.slot(at.get().src);
    if !is_canonical(target) {
        return Err(cpu.general_protection(0));
    }
    push64::<u64>(cpu, at.next_rip(cpu))?;
    to(cpu, target)
}

/// CALL memory, 64-bit.
pub(crate) fn call_m(cpu: &mut Cpu, at: At) -> Result<Exit> {
    let target = cpu.read::<u64>(at.get())?;
    if !is_canonical(target) {
        return Err(cpu.general_protection(0));
    }
    push64::<u64>(cpu, at.next_rip(cpu))?;
    to(cpu, target)
}

/// JMP register, 64-bit.
pub(crate) fn jmp_r(cpu: &mut Cpu, at: At) -> Result<Exit> {
    let target = cpu.slot(at.get().src);
    to(cpu, target)
}

/// JMP memory, 64-bit.
pub(crate) fn jmp_m(cpu: &mut Cpu, at: At) -> Result<Exit> {
    let target = cpu.read::<u64>(at.get())?;
    to(cpu, target)
}

/// RET, 64-bit; `imm` bytes of arguments are dropped.
pub(crate) fn ret(cpu: &mut Cpu, at: At) -> Result<Exit> {
    let rsp = cpu.rsp();
    let target = cpu.load::<u64>(rsp, slot::SS)?;
    if !is_canonical(target) {
        return Err(cpu.general_protection(0));
    }
    cpu.set_reg(slot::RSP, rsp.wrapping_add(8).wrapping_add(at.get().imm));
    cpu.rip = target;
    Ok(Exit::Next)
}

/// JrCXZ with a counter of size `T`.
pub(crate) fn jcxz<R: Reach, T: Value>(cpu: &mut Cpu, at: At) -> Result<Exit> {
    if cpu.reg::<T>(slot::RCX).zero_extend() == 0 {
        jump::<R>(cpu, at.get())
    } else {
        fall_through::<R>(cpu, at)
    }
}

/// LOOP, LOOPE, LOOPNE (`src` 0, 1, 2) with a counter of size `T`.
pub(crate) fn looped<R: Reach, T: Value>(cpu: &mut Cpu, at: At) -> Result<Exit> {
    let count = T::from_u64(cpu.reg::<T>(slot::RCX).zero_extend().wrapping_sub(1));
    let condition = match at.get().src {
        0 => true,
        1 => cpu.flags.zero(),
        _ => !cpu.flags.zero(),
    };
    let exit = if count.zero_extend() != 0 && condition {
        jump::<R>(cpu, at.get())?
    } else {
        fall_through::<R>(cpu, at)?
    };
    cpu.set_reg(slot::RCX, count);
    Ok(exit)
}
