//! Single bits, bit counts, and the bit manipulation extensions.

use super::Result;
use super::flags::{CF, Flags, OF, SF, ZF};
use super::op::Op;
use super::value::Value;
use crate::cpu::Cpu;

/// What BT, BTS, BTR, BTC do to a bit.
pub(crate) trait BitOperation: Copy + 'static {
    const WRITES: bool = true;
    fn apply(value: u64, bit: u64) -> u64;
}

/// BT.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keep;
/// BTS.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Set;
/// BTR.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reset;
/// BTC.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Complement;

impl BitOperation for Keep {
    const WRITES: bool = false;
    #[inline(always)]
    fn apply(value: u64, _bit: u64) -> u64 {
        value
    }
}
impl BitOperation for Set {
    #[inline(always)]
    fn apply(value: u64, bit: u64) -> u64 {
        value | bit
    }
}
impl BitOperation for Reset {
    #[inline(always)]
    fn apply(value: u64, bit: u64) -> u64 {
        value & !bit
    }
}
impl BitOperation for Complement {
    #[inline(always)]
    fn apply(value: u64, bit: u64) -> u64 {
        value ^ bit
    }
}

#[inline(always)]
fn register<T: Value, B: BitOperation>(cpu: &mut Cpu, op: &Op, index: u64) -> Result {
    let value = cpu.reg::<T>(op.dst).zero_extend();
    let bit = 1u64 << (index & u64::from(T::BITS - 1));
    if B::WRITES {
        cpu.set_reg(op.dst, T::from_u64(B::apply(value, bit)));
    }
    cpu.flags = cpu.flags.with_carry(value & bit != 0);
    Ok(())
}

/// Register, register.
pub(crate) fn rr<T: Value, B: BitOperation>(cpu: &mut Cpu, op: &Op) -> Result {
    register::<T, B>(cpu, op, cpu.reg::<T>(op.src).zero_extend())
}

/// Register, immediate.
pub(crate) fn ri<T: Value, B: BitOperation>(cpu: &mut Cpu, op: &Op) -> Result {
    register::<T, B>(cpu, op, op.imm)
}

#[inline(always)]
fn memory<T: Value, B: BitOperation>(cpu: &mut Cpu, op: &Op, address: u64, bit: u64) -> Result {
    let change = |value: T| {
        let new = B::apply(value.zero_extend(), bit);
        (T::from_u64(new), value.zero_extend() & bit != 0)
    };
    let was = if !B::WRITES {
        cpu.load::<T>(address, op.seg)?.zero_extend() & bit != 0
    } else if op.src & 0x80 != 0 {
        cpu.modify_locked(address, op.seg, change)?
    } else {
        cpu.modify(address, op.seg, change)?
    };
    cpu.flags = cpu.flags.with_carry(was);
    Ok(())
}

/// Memory, immediate; bit 7 of `src`: locked.
pub(crate) fn mi<T: Value, B: BitOperation>(cpu: &mut Cpu, op: &Op) -> Result {
    memory::<T, B>(
        cpu,
        op,
        cpu.ea(op),
        1u64 << (op.imm & u64::from(T::BITS - 1)),
    )
}

/// Memory, register: the register's upper bits address beyond the operand. `imm` is the mask of
/// the address size for segments without a base (the address is linear in 64-bit mode).
pub(crate) fn mr<T: Value, B: BitOperation>(cpu: &mut Cpu, op: &Op) -> Result {
    let index = cpu.reg::<T>(op.src & 0x1f).sign_extend() as i64;
    let beyond = (index >> T::BITS.trailing_zeros()).wrapping_mul(T::BYTES as i64);
    // What wraps is the offset in the segment.
    let base = cpu.slot(op.seg);
    let offset = cpu.ea(op).wrapping_sub(base).wrapping_add(beyond as u64) & op.imm;
    let address = offset.wrapping_add(base);
    memory::<T, B>(
        cpu,
        op,
        address,
        1u64 << (index as u64 & u64::from(T::BITS - 1)),
    )
}

/// An operation from one operand to another that sets flags.
pub(crate) trait Count: Copy + 'static {
    /// The result (`None`: the destination is left alone) and the flags.
    fn apply<T: Value>(value: T, before: Flags) -> (Option<T>, Flags);
}

macro_rules! count {
    ($name:ident, |$value:ident, $before:ident| $body:block) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name;
        impl Count for $name {
            #[inline(always)]
            fn apply<T: Value>(value: T, $before: Flags) -> (Option<T>, Flags) {
                let $value = value.zero_extend();
                $body
            }
        }
    };
}

#[inline(always)]
fn zero_and_carry<T: Value>(result: u64, carry: bool) -> (Option<T>, Flags) {
    let zero = if result == 0 { ZF } else { 0 };
    let carry = if carry { CF } else { 0 };
    (Some(T::from_u64(result)), Flags::from_rflags(zero | carry))
}

count!(Bsf, |value, before| {
    if value == 0 {
        return (None, before.with_zero(true));
    }
    (
        Some(T::from_u64(value.trailing_zeros().into())),
        before.with_zero(false),
    )
});
count!(Bsr, |value, before| {
    if value == 0 {
        return (None, before.with_zero(true));
    }
    (
        Some(T::from_u64(value.ilog2().into())),
        before.with_zero(false),
    )
});
count!(Tzcnt, |value, _before| {
    zero_and_carry(value.trailing_zeros().min(T::BITS).into(), value == 0)
});
count!(Lzcnt, |value, _before| {
    zero_and_carry((value.leading_zeros() - (64 - T::BITS)).into(), value == 0)
});
count!(Popcnt, |value, _before| {
    let zero = if value == 0 { ZF } else { 0 };
    (
        Some(T::from_u64(value.count_ones().into())),
        Flags::from_rflags(zero),
    )
});
count!(Blsi, |value, _before| {
    bls(value & value.wrapping_neg(), value != 0)
});
count!(Blsr, |value, _before| {
    bls(value & value.wrapping_sub(1), value == 0)
});
count!(Blsmsk, |value, _before| {
    let (result, flags) = bls::<T>(value ^ value.wrapping_sub(1), value == 0);
    (result, flags.with_zero(false))
});

#[inline(always)]
fn bls<T: Value>(result: u64, carry: bool) -> (Option<T>, Flags) {
    let value = T::from_u64(result);
    (Some(value), Flags::shift(value, carry, false))
}

/// Register, register.
pub(crate) fn count_rr<T: Value, C: Count>(cpu: &mut Cpu, op: &Op) -> Result {
    let (result, flags) = C::apply::<T>(cpu.reg(op.src), cpu.flags);
    if let Some(result) = result {
        cpu.set_reg(op.dst, result);
    }
    cpu.flags = flags;
    Ok(())
}

/// Register, memory.
pub(crate) fn count_rm<T: Value, C: Count>(cpu: &mut Cpu, op: &Op) -> Result {
    let value = cpu.read::<T>(op)?;
    let (result, flags) = C::apply::<T>(value, cpu.flags);
    if let Some(result) = result {
        cpu.set_reg(op.dst, result);
    }
    cpu.flags = flags;
    Ok(())
}

/// BMI with three operands: `imm` holds the second source's register number, unless it is memory
/// (then `MEMORY`), and the first source's register is `src`. Which comes first depends on the
/// instruction; see [`crate::decode`].
pub(crate) trait Three: Copy + 'static {
    fn apply<T: Value>(cpu: &mut Cpu, op: &Op, a: T, b: T) -> T;
}

macro_rules! three {
    ($name:ident, |$cpu:ident, $op:ident, $a:ident, $b:ident| $body:block) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct $name;
        impl Three for $name {
            #[inline(always)]
            fn apply<T: Value>($cpu: &mut Cpu, $op: &Op, a: T, b: T) -> T {
                let ($a, $b) = (a.zero_extend(), b.zero_extend());
                T::from_u64($body)
            }
        }
    };
}

fn sized<T: Value>(count: u64) -> u32 {
    (count & u64::from(T::BITS - 1)) as u32
}

three!(Andn, |cpu, _op, a, b| {
    let r = T::from_u64(!a & b);
    cpu.flags = Flags::logic(r);
    r.zero_extend()
});
three!(Bextr, |cpu, _op, a, b| {
    let (start, length) = (b as u8, (b >> 8) as u8);
    let shifted = a.checked_shr(start.into()).unwrap_or(0);
    let mask = 1u64
        .checked_shl(length.into())
        .map_or(u64::MAX, |bit| bit - 1);
    let r = shifted & mask;
    cpu.flags = Flags::from_rflags(if r == 0 { ZF } else { 0 });
    r
});
three!(Bzhi, |cpu, _op, a, b| {
    let count = u32::from(b as u8);
    let r = if count < T::BITS {
        a & ((1u64 << count) - 1)
    } else {
        a
    };
    cpu.flags = Flags::shift(T::from_u64(r), count >= T::BITS, false);
    r
});
three!(Pdep, |_cpu, _op, a, mask| {
    let (mut rest, mut from, mut r) = (mask, 0, 0);
    while rest != 0 {
        r |= (a >> from & 1) << rest.trailing_zeros();
        rest &= rest - 1;
        from += 1;
    }
    r
});
three!(Pext, |_cpu, _op, a, mask| {
    let (mut rest, mut to, mut r) = (mask, 0, 0);
    while rest != 0 {
        r |= (a >> rest.trailing_zeros() & 1) << to;
        rest &= rest - 1;
        to += 1;
    }
    r
});
three!(Shlx, |_cpu, _op, a, b| { a << sized::<T>(b) });
three!(Shrx, |_cpu, _op, a, b| { a >> sized::<T>(b) });
three!(Sarx, |_cpu, _op, a, b| {
    (T::from_u64(a).sign_extend() as i64 >> sized::<T>(b)) as u64
});
three!(Rorx, |_cpu, _op, a, b| {
    let by = sized::<T>(b);
    if by == 0 {
        a
    } else {
        a >> by | a << (T::BITS - by)
    }
});
three!(Mulx, |cpu, op, a, b| {
    let product = u128::from(a) * u128::from(b);
    cpu.set_reg(op.dst >> 4, T::from_u64(product as u64));
    (product >> T::BITS) as u64
});
three!(Adcx, |cpu, _op, a, b| {
    let sum = u128::from(a) + u128::from(b) + u128::from(cpu.flags.carry());
    let (carry, overflow) = (sum >> T::BITS != 0, cpu.flags.overflow());
    cpu.flags = cpu.flags.with_carry_overflow(carry, overflow);
    sum as u64
});
three!(Adox, |cpu, _op, a, b| {
    let sum = u128::from(a) + u128::from(b) + u128::from(cpu.flags.overflow());
    let (carry, overflow) = (cpu.flags.carry(), sum >> T::BITS != 0);
    cpu.flags = cpu.flags.with_carry_overflow(carry, overflow);
    sum as u64
});

/// Registers: the first source is `src`, the second `imm`.
pub(crate) fn three_rr<T: Value, O: Three>(cpu: &mut Cpu, op: &Op) -> Result {
    let (a, b) = (cpu.reg::<T>(op.src), cpu.reg::<T>(op.imm as u8));
    let r = O::apply(cpu, op, a, b);
    cpu.set_reg(op.dst & 15, r);
    Ok(())
}

/// The first source is memory, the second register `imm`.
pub(crate) fn three_mr<T: Value, O: Three>(cpu: &mut Cpu, op: &Op) -> Result {
    let a = cpu.read::<T>(op)?;
    let b = cpu.reg::<T>(op.imm as u8);
    let r = O::apply(cpu, op, a, b);
    cpu.set_reg(op.dst & 15, r);
    Ok(())
}

/// The first source is register `src`, the second memory.
pub(crate) fn three_rm<T: Value, O: Three>(cpu: &mut Cpu, op: &Op) -> Result {
    let b = cpu.read::<T>(op)?;
    let a = cpu.reg::<T>(op.src);
    let r = O::apply(cpu, op, a, b);
    cpu.set_reg(op.dst & 15, r);
    Ok(())
}

/// The first source is register `src`, the second the constant `imm` (RORX).
pub(crate) fn three_ri<T: Value, O: Three>(cpu: &mut Cpu, op: &Op) -> Result {
    let a = cpu.reg::<T>(op.src);
    let r = O::apply(cpu, op, a, T::from_u64(op.imm));
    cpu.set_reg(op.dst & 15, r);
    Ok(())
}

/// The first source is memory, the second the constant `imm` (RORX).
pub(crate) fn three_mi<T: Value, O: Three>(cpu: &mut Cpu, op: &Op) -> Result {
    let a = cpu.read::<T>(op)?;
    let r = O::apply(cpu, op, a, T::from_u64(op.imm));
    cpu.set_reg(op.dst & 15, r);
    Ok(())
}

/// CLC, STC, CMC by `imm` (0, 1, 2).
pub(crate) fn set_carry(cpu: &mut Cpu, op: &Op) -> Result {
    let carry = match op.imm {
        0 => false,
        1 => true,
        _ => !cpu.flags.carry(),
    };
    cpu.flags = cpu.flags.with_carry(carry);
    Ok(())
}

/// CLD, STD by `imm`.
pub(crate) fn set_direction(cpu: &mut Cpu, op: &Op) -> Result {
    let flag = super::flags::DF;
    cpu.system_flags = cpu.system_flags & !flag | if op.imm != 0 { flag } else { 0 };
    Ok(())
}

/// LAHF.
pub(crate) fn lahf(cpu: &mut Cpu, _op: &Op) -> Result {
    let flags = cpu.flags.to_rflags() & !OF | 2;
    cpu.set_reg(0x20, flags as u8);
    Ok(())
}

/// SAHF.
pub(crate) fn sahf(cpu: &mut Cpu, _op: &Op) -> Result {
    let overflow = if cpu.flags.overflow() { OF } else { 0 };
    let ah = u64::from(cpu.reg::<u8>(0x20)) & (SF | ZF | super::flags::AF | super::flags::PF | CF);
    cpu.flags = Flags::from_rflags(ah | overflow);
    Ok(())
}
