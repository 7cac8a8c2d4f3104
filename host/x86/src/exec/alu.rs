//! Integer arithmetic and logic with one or two operands.

use super::flags::Flags;
use super::op::Op;
use super::value::Value;
use super::{Exception, Result};
use crate::cpu::Cpu;

/// An operation with two operands.
pub(crate) trait Alu: Copy + 'static {
    /// Is the result written back (not for CMP and TEST)?
    const WRITES: bool = true;
    fn apply<T: Value>(a: T, b: T, before: Flags) -> (T, Flags);
}

macro_rules! alu {
    ($name:ident, $writes:literal, |$a:ident, $b:ident, $before:ident| $body:expr) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name;
        impl Alu for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<T: Value>(a: T, b: T, $before: Flags) -> (T, Flags) {
                let ($a, $b) = (a.zero_extend(), b.zero_extend());
                $body
            }
        }
    };
}

#[inline(always)]
fn add<T: Value>(a: u64, b: u64, carry: u64) -> (T, Flags) {
    let r = a.wrapping_add(b).wrapping_add(carry);
    let carries = a & b | (a | b) & !r;
    (
        T::from_u64(r),
        Flags::arithmetic(T::from_u64(r), T::from_u64(carries)),
    )
}

#[inline(always)]
fn sub<T: Value>(a: u64, b: u64, borrow: u64) -> (T, Flags) {
    let r = a.wrapping_sub(b).wrapping_sub(borrow);
    let borrows = !a & b | (!a | b) & r;
    (
        T::from_u64(r),
        Flags::arithmetic(T::from_u64(r), T::from_u64(borrows)),
    )
}

#[inline(always)]
fn logic<T: Value>(r: u64) -> (T, Flags) {
    (T::from_u64(r), Flags::logic(T::from_u64(r)))
}

alu!(Add, true, |a, b, _before| add(a, b, 0));
alu!(Adc, true, |a, b, before| add(a, b, before.carry().into()));
alu!(Sub, true, |a, b, _before| sub(a, b, 0));
alu!(Sbb, true, |a, b, before| sub(a, b, before.carry().into()));
alu!(Cmp, false, |a, b, _before| sub(a, b, 0));
alu!(And, true, |a, b, _before| logic(a & b));
alu!(Or, true, |a, b, _before| logic(a | b));
alu!(Xor, true, |a, b, _before| logic(a ^ b));
alu!(Test, false, |a, b, _before| logic(a & b));

/// Register, register.
pub(crate) fn rr<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op) -> Result {
    let (r, flags) = O::apply::<T>(cpu.reg(op.dst), cpu.reg(op.src), cpu.flags);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    cpu.flags = flags;
    Ok(())
}

/// Register, immediate.
pub(crate) fn ri<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op) -> Result {
    let (r, flags) = O::apply::<T>(cpu.reg(op.dst), T::from_u64(op.imm), cpu.flags);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    cpu.flags = flags;
    Ok(())
}

/// Register, memory.
pub(crate) fn rm<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op) -> Result {
    let b = cpu.read::<T>(op)?;
    let (r, flags) = O::apply::<T>(cpu.reg(op.dst), b, cpu.flags);
    if O::WRITES {
        cpu.set_reg(op.dst, r);
    }
    cpu.flags = flags;
    Ok(())
}

#[inline(always)]
fn memory<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op, b: T) -> Result {
    let before = cpu.flags;
    if O::WRITES {
        cpu.flags = cpu.modify(cpu.ea(op), op.seg, |a: T| O::apply(a, b, before))?;
    } else {
        let a = cpu.read::<T>(op)?;
        cpu.flags = O::apply(a, b, before).1;
    }
    Ok(())
}

/// Memory, register.
pub(crate) fn mr<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op) -> Result {
    memory::<T, O>(cpu, op, cpu.reg(op.src))
}

/// Memory, immediate.
pub(crate) fn mi<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op) -> Result {
    memory::<T, O>(cpu, op, T::from_u64(op.imm))
}

/// LOCK, memory, register.
pub(crate) fn mr_locked<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op) -> Result {
    let (b, before) = (cpu.reg(op.src), cpu.flags);
    cpu.flags = cpu.modify_locked(cpu.ea(op), op.seg, |a: T| O::apply(a, b, before))?;
    Ok(())
}

/// LOCK, memory, immediate.
pub(crate) fn mi_locked<T: Value, O: Alu>(cpu: &mut Cpu, op: &Op) -> Result {
    let (b, before) = (T::from_u64(op.imm), cpu.flags);
    cpu.flags = cpu.modify_locked(cpu.ea(op), op.seg, |a: T| O::apply(a, b, before))?;
    Ok(())
}

/// An operation with one operand.
pub(crate) trait Unary: Copy + 'static {
    fn apply<T: Value>(a: T, before: Flags) -> (T, Flags);
}

macro_rules! unary {
    ($name:ident, |$a:ident, $before:ident| $body:expr) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Value>(a: T, $before: Flags) -> (T, Flags) {
                let $a = a.zero_extend();
                $body
            }
        }
    };
}

unary!(Inc, |a, before| {
    let r = a.wrapping_add(1);
    let (value, carries) = (T::from_u64(r), T::from_u64(a & !r | a & 1));
    (
        value,
        Flags::arithmetic_keeping_carry(value, carries, before),
    )
});
unary!(Dec, |a, before| {
    let r = a.wrapping_sub(1);
    let (value, borrows) = (T::from_u64(r), T::from_u64(!a & r | !a & 1));
    (
        value,
        Flags::arithmetic_keeping_carry(value, borrows, before),
    )
});
unary!(Neg, |a, _before| sub(0, a, 0));
unary!(Not, |a, before| (T::from_u64(!a), before));

/// Register.
pub(crate) fn r<T: Value, O: Unary>(cpu: &mut Cpu, op: &Op) -> Result {
    let (r, flags) = O::apply::<T>(cpu.reg(op.dst), cpu.flags);
    cpu.set_reg(op.dst, r);
    cpu.flags = flags;
    Ok(())
}

/// Memory.
pub(crate) fn m<T: Value, O: Unary>(cpu: &mut Cpu, op: &Op) -> Result {
    let before = cpu.flags;
    cpu.flags = cpu.modify(cpu.ea(op), op.seg, |a: T| O::apply(a, before))?;
    Ok(())
}

/// LOCK, memory.
pub(crate) fn m_locked<T: Value, O: Unary>(cpu: &mut Cpu, op: &Op) -> Result {
    let before = cpu.flags;
    cpu.flags = cpu.modify_locked(cpu.ea(op), op.seg, |a: T| O::apply(a, before))?;
    Ok(())
}

/// XADD register, register.
pub(crate) fn xadd_rr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let (a, b): (T, T) = (cpu.reg(op.dst), cpu.reg(op.src));
    let (sum, flags) = Add::apply(a, b, cpu.flags);
    cpu.set_reg(op.src, a);
    cpu.set_reg(op.dst, sum);
    cpu.flags = flags;
    Ok(())
}

/// XADD memory, register; always as one access.
pub(crate) fn xadd_mr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let (b, before): (T, _) = (cpu.reg(op.src), cpu.flags);
    let (old, flags) = cpu.modify_locked(cpu.ea(op), op.seg, |a: T| {
        let (sum, flags) = Add::apply(a, b, before);
        (sum, (a, flags))
    })?;
    cpu.set_reg(op.src, old);
    cpu.flags = flags;
    Ok(())
}

/// CMPXCHG register, register.
pub(crate) fn cmpxchg_rr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let (expected, found): (T, T) = (cpu.reg(0), cpu.reg(op.dst));
    cpu.flags = Cmp::apply(expected, found, cpu.flags).1;
    if expected == found {
        cpu.set_reg(op.dst, cpu.reg::<T>(op.src));
    } else {
        // A 32-bit destination is written either way, and so loses its upper half.
        cpu.set_reg(op.dst, found);
        cpu.set_reg(0, found);
    }
    Ok(())
}

/// CMPXCHG memory, register; always as one access.
pub(crate) fn cmpxchg_mr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let (expected, new): (T, T) = (cpu.reg(0), cpu.reg(op.src));
    let found = cpu.modify_locked(cpu.ea(op), op.seg, |found: T| {
        (if found == expected { new } else { found }, found)
    })?;
    cpu.flags = Cmp::apply(expected, found, cpu.flags).1;
    if found != expected {
        cpu.set_reg(0, found);
    }
    Ok(())
}

/// XCHG register, register.
pub(crate) fn xchg_rr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let (a, b): (T, T) = (cpu.reg(op.dst), cpu.reg(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Ok(())
}

/// XCHG memory, register; always as one access.
pub(crate) fn xchg_mr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let new: T = cpu.reg(op.src);
    let old = cpu.modify_locked(cpu.ea(op), op.seg, |old: T| (new, old))?;
    cpu.set_reg(op.src, old);
    Ok(())
}

#[inline(always)]
fn signed<T: Value>(value: T) -> i128 {
    i128::from(value.sign_extend() as i64)
}

#[inline(always)]
fn product<T: Value>(wide: i128) -> (T, Flags) {
    let low = T::from_u64(wide as u64);
    let lost = signed(low) != wide;
    (low, Flags::shift(low, lost, lost))
}

/// IMUL register, register.
pub(crate) fn imul_rr<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let wide = signed(cpu.reg::<T>(op.dst)) * signed(cpu.reg::<T>(op.src));
    let (low, flags) = product::<T>(wide);
    cpu.set_reg(op.dst, low);
    cpu.flags = flags;
    Ok(())
}

/// IMUL register, memory.
pub(crate) fn imul_rm<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let b = cpu.read::<T>(op)?;
    let (low, flags) = product::<T>(signed(cpu.reg::<T>(op.dst)) * signed(b));
    cpu.set_reg(op.dst, low);
    cpu.flags = flags;
    Ok(())
}

/// IMUL register, register, immediate.
pub(crate) fn imul_rri<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let wide = signed(cpu.reg::<T>(op.src)) * signed(T::from_u64(op.imm));
    let (low, flags) = product::<T>(wide);
    cpu.set_reg(op.dst, low);
    cpu.flags = flags;
    Ok(())
}

/// IMUL register, memory, immediate.
pub(crate) fn imul_rmi<T: Value>(cpu: &mut Cpu, op: &Op) -> Result {
    let b = cpu.read::<T>(op)?;
    let (low, flags) = product::<T>(signed(b) * signed(T::from_u64(op.imm)));
    cpu.set_reg(op.dst, low);
    cpu.flags = flags;
    Ok(())
}

/// One-operand multiplication and division: the accumulator pair with a factor or divisor.
pub(crate) trait Wide: Copy + 'static {
    fn apply<T: Value>(cpu: &mut Cpu, operand: T) -> Result;
}

/// Reads the accumulator pair: AX for bytes, else rDX:rAX.
#[inline(always)]
fn pair<T: Value>(cpu: &Cpu) -> u128 {
    if T::BITS == 8 {
        return u128::from(cpu.reg::<u16>(0));
    }
    u128::from(cpu.reg::<T>(2).zero_extend()) << T::BITS | u128::from(cpu.reg::<T>(0).zero_extend())
}

#[inline(always)]
fn set_pair<T: Value>(cpu: &mut Cpu, low: T, high: T) {
    if T::BITS == 8 {
        let both = high.zero_extend() << 8 | low.zero_extend();
        cpu.set_reg::<u16>(0, both as u16);
    } else {
        cpu.set_reg(0, low);
        cpu.set_reg(2, high);
    }
}

macro_rules! wide {
    ($name:ident, |$cpu:ident, $operand:ident| $body:block) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name;
        impl Wide for $name {
            #[inline(always)]
            fn apply<T: Value>($cpu: &mut Cpu, $operand: T) -> Result $body
        }
    };
}

wide!(Mul, |cpu, operand| {
    let product = u128::from(cpu.reg::<T>(0).zero_extend()) * u128::from(operand.zero_extend());
    let (low, high) = (
        T::from_u64(product as u64),
        T::from_u64((product >> T::BITS) as u64),
    );
    set_pair(cpu, low, high);
    let lost = high.zero_extend() != 0;
    cpu.flags = Flags::shift(low, lost, lost);
    Ok(())
});
wide!(Imul, |cpu, operand| {
    let product = signed(cpu.reg::<T>(0)) * signed(operand);
    let (low, high) = (
        T::from_u64(product as u64),
        T::from_u64((product >> T::BITS) as u64),
    );
    set_pair(cpu, low, high);
    let lost = signed(low) != product;
    cpu.flags = Flags::shift(low, lost, lost);
    Ok(())
});
wide!(Div, |cpu, operand| {
    let divisor = operand.zero_extend();
    if divisor == 0 {
        return Err(cpu.raise(Exception::DivideError));
    }
    let dividend = pair::<T>(cpu);
    let (quotient, remainder) = match u64::try_from(dividend) {
        Ok(small) => (u128::from(small / divisor), small % divisor),
        Err(_) => (
            dividend / u128::from(divisor),
            (dividend % u128::from(divisor)) as u64,
        ),
    };
    if quotient >> T::BITS != 0 {
        return Err(cpu.raise(Exception::DivideError));
    }
    set_pair(cpu, T::from_u64(quotient as u64), T::from_u64(remainder));
    Ok(())
});
wide!(Idiv, |cpu, operand| {
    let divisor = signed(operand);
    let unsigned = pair::<T>(cpu);
    let shift = 128 - 2 * T::BITS;
    let dividend = (unsigned << shift) as i128 >> shift;
    let (Some(quotient), Some(remainder)) =
        (dividend.checked_div(divisor), dividend.checked_rem(divisor))
    else {
        return Err(cpu.raise(Exception::DivideError));
    };
    let value = T::from_u64(quotient as u64);
    if signed(value) != quotient {
        return Err(cpu.raise(Exception::DivideError));
    }
    set_pair(cpu, value, T::from_u64(remainder as u64));
    Ok(())
});

/// The accumulator with a register.
pub(crate) fn wide_r<T: Value, O: Wide>(cpu: &mut Cpu, op: &Op) -> Result {
    O::apply::<T>(cpu, cpu.reg(op.dst))
}

/// The accumulator with memory.
pub(crate) fn wide_m<T: Value, O: Wide>(cpu: &mut Cpu, op: &Op) -> Result {
    let operand = cpu.read::<T>(op)?;
    O::apply::<T>(cpu, operand)
}
