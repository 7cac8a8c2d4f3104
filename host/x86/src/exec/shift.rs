//! Shifts and rotates.

use super::Result;
use super::flags::Flags;
use super::op::Op;
use super::value::Value;
use crate::cpu::Cpu;

/// A shift or rotate by a count that is masked to 5 or 6 bits and not zero.
pub(crate) trait Shift: Copy + 'static {
    fn apply<T: Value>(a: T, count: u32, before: Flags) -> (T, Flags);
}

#[inline(always)]
fn bit(value: u64, at: u32) -> bool {
    value.checked_shr(at).unwrap_or(0) & 1 != 0
}

macro_rules! shift {
    ($name:ident, |$a:ident, $count:ident, $before:ident| $body:block) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: Value>($a: T, $count: u32, $before: Flags) -> (T, Flags) $body
        }
    };
}

shift!(Shl, |a, count, _before| {
    let a = a.zero_extend();
    let value = T::from_u64(a.checked_shl(count).unwrap_or(0));
    let carry = count <= T::BITS && bit(a, T::BITS - count);
    let top = bit(value.zero_extend(), T::BITS - 1);
    (value, Flags::shift(value, carry, carry != top))
});
shift!(Shr, |a, count, _before| {
    let a = a.zero_extend();
    let r = a.checked_shr(count).unwrap_or(0);
    let value = T::from_u64(r);
    let carry = bit(a, count - 1);
    // For a count of 1 the old top bit; 0 for more.
    let overflow = bit(r, T::BITS - 2);
    (value, Flags::shift(value, carry, overflow))
});
shift!(Sar, |a, count, _before| {
    let a = a.sign_extend() as i64;
    let value = T::from_u64((a >> count.min(63)) as u64);
    let carry = a >> (count - 1).min(63) & 1 != 0;
    (value, Flags::shift(value, carry, false))
});
shift!(Rol, |a, count, before| {
    let a = a.zero_extend();
    let by = count % T::BITS;
    let r = if by == 0 {
        a
    } else {
        a << by | a >> (T::BITS - by)
    };
    let value = T::from_u64(r);
    let carry = bit(r, 0);
    let overflow = carry != bit(r, T::BITS - 1);
    (value, before.with_carry_overflow(carry, overflow))
});
shift!(Ror, |a, count, before| {
    let a = a.zero_extend();
    let by = count % T::BITS;
    let r = if by == 0 {
        a
    } else {
        a >> by | a << (T::BITS - by)
    };
    let value = T::from_u64(r);
    let carry = bit(r, T::BITS - 1);
    let overflow = carry != bit(r, T::BITS - 2);
    (value, before.with_carry_overflow(carry, overflow))
});
shift!(Rcl, |a, count, before| {
    let by = count % (T::BITS + 1);
    let wide = u128::from(before.carry()) << T::BITS | u128::from(a.zero_extend());
    let r = if by == 0 {
        wide
    } else {
        wide << by | wide >> (T::BITS + 1 - by)
    };
    let value = T::from_u64(r as u64);
    let carry = r >> T::BITS & 1 != 0;
    let overflow = carry != bit(value.zero_extend(), T::BITS - 1);
    (value, before.with_carry_overflow(carry, overflow))
});
shift!(Rcr, |a, count, before| {
    let by = count % (T::BITS + 1);
    let wide = u128::from(before.carry()) << T::BITS | u128::from(a.zero_extend());
    let r = if by == 0 {
        wide
    } else {
        wide >> by | wide << (T::BITS + 1 - by)
    };
    let value = T::from_u64(r as u64);
    let carry = r >> T::BITS & 1 != 0;
    let overflow = bit(value.zero_extend(), T::BITS - 1) != bit(value.zero_extend(), T::BITS - 2);
    (value, before.with_carry_overflow(carry, overflow))
});

#[inline(always)]
fn mask<T: Value>(count: u32) -> u32 {
    count & if T::BITS == 64 { 63 } else { 31 }
}

/// Register by a constant (masked, not zero).
pub(crate) fn ri<T: Value, S: Shift>(cpu: &mut Cpu, op: &Op) -> Result {
    let (value, flags) = S::apply::<T>(cpu.reg(op.dst), op.imm as u32 & 63, cpu.flags);
    cpu.set_reg(op.dst, value);
    cpu.flags = flags;
    Ok(())
}

/// Memory by a constant (masked, not zero).
pub(crate) fn mi<T: Value, S: Shift>(cpu: &mut Cpu, op: &Op) -> Result {
    let before = cpu.flags;
    let count = op.imm as u32 & 63;
    cpu.flags = cpu.modify(cpu.ea(op), op.seg, |a: T| S::apply(a, count, before))?;
    Ok(())
}

/// Register by CL.
pub(crate) fn rc<T: Value, S: Shift>(cpu: &mut Cpu, op: &Op) -> Result {
    let count = mask::<T>(cpu.reg::<u8>(1).into());
    if count == 0 {
        // A 32-bit destination still loses its upper half.
        cpu.set_reg(op.dst, cpu.reg::<T>(op.dst));
        return Ok(());
    }
    let (value, flags) = S::apply::<T>(cpu.reg(op.dst), count, cpu.flags);
    cpu.set_reg(op.dst, value);
    cpu.flags = flags;
    Ok(())
}

/// Memory by CL.
pub(crate) fn mc<T: Value, S: Shift>(cpu: &mut Cpu, op: &Op) -> Result {
    let count = mask::<T>(cpu.reg::<u8>(1).into());
    let before = cpu.flags;
    cpu.flags = cpu.modify(cpu.ea(op), op.seg, |a: T| match count {
        0 => (a, before),
        _ => S::apply(a, count, before),
    })?;
    Ok(())
}

/// A double shift's direction.
pub(crate) trait DoubleShift: Copy + 'static {
    fn apply<T: Value>(a: T, b: T, count: u32) -> (T, Flags);
}

/// SHLD.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shld;
/// SHRD.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shrd;

impl DoubleShift for Shld {
    #[inline(always)]
    fn apply<T: Value>(a: T, b: T, count: u32) -> (T, Flags) {
        if T::BITS == 64 {
            let pair = u128::from(a.zero_extend()) << 64 | u128::from(b.zero_extend());
            let value = T::from_u64((pair << count >> 64) as u64);
            return finish(a, value, bit(a.zero_extend(), 64 - count));
        }
        // For 16 bits, counts beyond 16 shift the destination in again.
        let wide = u128::from(a.zero_extend()) << (2 * T::BITS)
            | u128::from(b.zero_extend()) << T::BITS
            | u128::from(a.zero_extend());
        let value = T::from_u64((wide << count >> (2 * T::BITS)) as u64);
        let carry = wide >> (3 * T::BITS - count) & 1 != 0;
        finish(a, value, carry)
    }
}

impl DoubleShift for Shrd {
    #[inline(always)]
    fn apply<T: Value>(a: T, b: T, count: u32) -> (T, Flags) {
        let mut wide = u128::from(b.zero_extend()) << T::BITS | u128::from(a.zero_extend());
        if T::BITS == 16 {
            wide |= u128::from(a.zero_extend()) << 32;
        }
        let value = T::from_u64((wide >> count) as u64);
        finish(a, value, wide >> (count - 1) & 1 != 0)
    }
}

#[inline(always)]
fn finish<T: Value>(before: T, value: T, carry: bool) -> (T, Flags) {
    let changed = bit(before.zero_extend() ^ value.zero_extend(), T::BITS - 1);
    (value, Flags::shift(value, carry, changed))
}

#[inline(always)]
fn double_count<T: Value>(cpu: &Cpu, op: &Op) -> u32 {
    // Bit 8 of the immediate: by CL.
    let raw = if op.imm & 0x100 != 0 {
        u32::from(cpu.reg::<u8>(1))
    } else {
        op.imm as u32
    };
    mask::<T>(raw)
}

/// SHLD or SHRD register, register.
pub(crate) fn double_rr<T: Value, S: DoubleShift>(cpu: &mut Cpu, op: &Op) -> Result {
    let count = double_count::<T>(cpu, op);
    if count == 0 {
        cpu.set_reg(op.dst, cpu.reg::<T>(op.dst));
        return Ok(());
    }
    let (value, flags) = S::apply::<T>(cpu.reg(op.dst), cpu.reg(op.src), count);
    cpu.set_reg(op.dst, value);
    cpu.flags = flags;
    Ok(())
}

/// SHLD or SHRD memory, register.
pub(crate) fn double_mr<T: Value, S: DoubleShift>(cpu: &mut Cpu, op: &Op) -> Result {
    let count = double_count::<T>(cpu, op);
    let (b, before): (T, _) = (cpu.reg(op.src), cpu.flags);
    cpu.flags = cpu.modify(cpu.ea(op), op.seg, |a: T| match count {
        0 => (a, before),
        _ => S::apply(a, b, count),
    })?;
    Ok(())
}
