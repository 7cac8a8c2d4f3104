//! The arithmetic flags, kept as the last result and a vector of carries until somebody asks.
//!
//! `result` is the last result, sign-extended: ZF is `result == 0`, SF its top bit, PF the parity
//! of its low byte. `carries` holds the carry out of the top bit in bit 63 (CF), the carry into it
//! in bit 62 (OF is the difference), and the carry out of bit 3 in bit 3 (AF). So that any
//! combination can be expressed, bit 0 of `carries` inverts SF and bits 8-15 are added to the byte
//! whose parity is PF.

use super::value::Value;

/// CF of RFLAGS.
pub(crate) const CF: u64 = 1 << 0;
/// PF of RFLAGS.
pub(crate) const PF: u64 = 1 << 2;
/// AF of RFLAGS.
pub(crate) const AF: u64 = 1 << 4;
/// ZF of RFLAGS.
pub(crate) const ZF: u64 = 1 << 6;
/// SF of RFLAGS.
pub(crate) const SF: u64 = 1 << 7;
/// TF of RFLAGS.
pub(crate) const TF: u64 = 1 << 8;
/// IF of RFLAGS.
pub(crate) const IF: u64 = 1 << 9;
/// DF of RFLAGS.
pub(crate) const DF: u64 = 1 << 10;
/// OF of RFLAGS.
pub(crate) const OF: u64 = 1 << 11;
/// IOPL of RFLAGS.
pub(crate) const IOPL: u64 = 3 << 12;
/// NT of RFLAGS.
pub(crate) const NT: u64 = 1 << 14;
/// RF of RFLAGS.
pub(crate) const RF: u64 = 1 << 16;
/// VM of RFLAGS.
pub(crate) const VM: u64 = 1 << 17;
/// AC of RFLAGS.
pub(crate) const AC: u64 = 1 << 18;
/// VIF of RFLAGS.
pub(crate) const VIF: u64 = 1 << 19;
/// VIP of RFLAGS.
pub(crate) const VIP: u64 = 1 << 20;
/// ID of RFLAGS.
pub(crate) const ID: u64 = 1 << 21;
/// The six arithmetic flags.
pub(crate) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
/// Every flag that exists apart from the fixed bit 1.
pub(crate) const ALL: u64 = ARITHMETIC | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

const TOP: u64 = 3 << 62;
const AUXILIARY: u64 = 1 << 3;
const INVERT_SIGN: u64 = 1;
const PARITY_DELTA: u64 = 0xff << 8;

/// The arithmetic flags in their lazy form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Flags {
    result: u64,
    carries: u64,
}

impl Flags {
    /// Flags of a logical operation: CF, OF and AF are clear.
    #[inline(always)]
    pub(crate) fn logic<T: Value>(result: T) -> Self {
        Self {
            result: result.sign_extend(),
            carries: 0,
        }
    }

    /// Flags of an operation with the given carry out of each bit.
    #[inline(always)]
    pub(crate) fn arithmetic<T: Value>(result: T, carries: T) -> Self {
        let carries = carries.zero_extend();
        let carries = if T::BITS == 64 {
            carries & !(INVERT_SIGN | PARITY_DELTA)
        } else {
            carries << (64 - T::BITS) | carries & AUXILIARY
        };
        Self {
            result: result.sign_extend(),
            carries,
        }
    }

    /// As `arithmetic`, with CF from `before`: INC and DEC.
    #[inline(always)]
    pub(crate) fn arithmetic_keeping_carry<T: Value>(result: T, carries: T, before: Self) -> Self {
        let mut new = Self::arithmetic(result, carries);
        let differ = (new.carries ^ before.carries) >> 63;
        new.carries ^= differ.wrapping_neg() & TOP;
        new
    }

    /// Flags of a shift: from the result, with CF and OF given; AF is clear.
    #[inline(always)]
    pub(crate) fn shift<T: Value>(result: T, carry: bool, overflow: bool) -> Self {
        Self {
            result: result.sign_extend(),
            carries: top(carry, overflow),
        }
    }

    /// The same with CF and OF replaced.
    #[inline(always)]
    pub(crate) fn with_carry_overflow(self, carry: bool, overflow: bool) -> Self {
        Self {
            carries: self.carries & !TOP | top(carry, overflow),
            ..self
        }
    }

    /// The same with CF replaced.
    #[inline(always)]
    pub(crate) fn with_carry(self, carry: bool) -> Self {
        self.with_carry_overflow(carry, self.overflow())
    }

    /// The same with ZF replaced.
    #[inline]
    pub(crate) fn with_zero(self, zero: bool) -> Self {
        Self::from_rflags(self.to_rflags() & !ZF | if zero { ZF } else { 0 })
    }

    #[inline(always)]
    pub(crate) fn zero(self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub(crate) fn carry(self) -> bool {
        (self.carries as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn sign(self) -> bool {
        ((self.result ^ self.carries << 63) as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn overflow(self) -> bool {
        ((self.carries ^ self.carries << 1) as i64) < 0
    }

    #[inline(always)]
    pub(crate) fn parity(self) -> bool {
        ((self.result ^ self.carries >> 8) as u8).count_ones() & 1 == 0
    }

    #[inline(always)]
    pub(crate) fn auxiliary(self) -> bool {
        self.carries & AUXILIARY != 0
    }

    /// SF differs from OF.
    #[inline(always)]
    pub(crate) fn less(self) -> bool {
        ((self.result ^ self.carries << 63 ^ self.carries ^ self.carries << 1) as i64) < 0
    }

    /// The six flags as they stand in RFLAGS.
    #[inline]
    pub(crate) fn to_rflags(self) -> u64 {
        let bit = |set: bool, flag: u64| if set { flag } else { 0 };
        bit(self.carry(), CF)
            | bit(self.parity(), PF)
            | bit(self.auxiliary(), AF)
            | bit(self.zero(), ZF)
            | bit(self.sign(), SF)
            | bit(self.overflow(), OF)
    }

    /// The lazy form of the six flags of `rflags`.
    #[inline]
    pub(crate) fn from_rflags(rflags: u64) -> Self {
        let has = |flag: u64| rflags & flag != 0;
        // A result of 0 or 1, both of known sign and parity, from which the deltas lead on.
        let result = u64::from(!has(ZF));
        let even = result == 0;
        let mut carries = top(has(CF), has(OF));
        if has(SF) {
            carries |= INVERT_SIGN;
        }
        if has(PF) != even {
            carries |= 1 << 8;
        }
        if has(AF) {
            carries |= AUXILIARY;
        }
        Self { result, carries }
    }
}

#[inline(always)]
fn top(carry: bool, overflow: bool) -> u64 {
    u64::from(carry) << 63 | u64::from(carry != overflow) << 62
}

/// A condition by its encoding (the low four bits of Jcc).
#[inline(always)]
pub(crate) fn condition<const CODE: u8>(flags: Flags) -> bool {
    let holds = match CODE >> 1 {
        0 => flags.overflow(),
        1 => flags.carry(),
        2 => flags.zero(),
        3 => flags.carry() | flags.zero(),
        4 => flags.sign(),
        5 => flags.parity(),
        6 => flags.less(),
        _ => flags.less() | flags.zero(),
    };
    holds != (CODE & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives_the_lazy_form() {
        for bits in 0..64u64 {
            let flags = [CF, PF, AF, ZF, SF, OF];
            let rflags = (0..6)
                .filter(|i| bits >> i & 1 != 0)
                .map(|i| flags[i])
                .sum();
            assert_eq!(Flags::from_rflags(rflags).to_rflags(), rflags);
        }
    }

    #[test]
    fn carry_is_kept_across_inc_and_overflow_is_new() {
        for before in [0, CF] {
            let flags = Flags::arithmetic_keeping_carry(0x80u8, 0x7f, Flags::from_rflags(before));
            assert_eq!(flags.to_rflags(), before | OF | SF | AF);
        }
    }
}
