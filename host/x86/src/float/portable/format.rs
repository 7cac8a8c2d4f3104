//! The formats of the guest's numbers: single, double, and the x87's 80 bits.

use super::number::{Class, Number, Operand, Rounded, Target};

/// A format of IEEE 754 with an implied leading bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// Bits of the fraction.
    fraction: u32,
    /// The exponent field of infinities and NaNs.
    special: u64,
}

/// 32 bits.
pub(super) const SINGLE: Format = Format {
    fraction: 23,
    special: 0xff,
};

/// 64 bits.
pub(super) const DOUBLE: Format = Format {
    fraction: 52,
    special: 0x7ff,
};

impl Format {
    fn bias(self) -> i32 {
        (self.special / 2) as i32
    }

    fn sign(self, negative: bool) -> u64 {
        (u64::from(negative) * (self.special + 1)) << self.fraction
    }

    /// How many it has.
    pub(super) fn bytes(self) -> usize {
        (self.fraction as usize + 12) / 8
    }

    /// The bit that makes a NaN quiet.
    pub(super) fn quiet(self) -> u64 {
        1 << (self.fraction - 1)
    }

    /// What an invalid operation gives: the negative quiet NaN without further bits.
    pub(super) fn indefinite(self) -> u64 {
        self.sign(true) | self.special << self.fraction | self.quiet()
    }

    pub(super) fn zero(self, negative: bool) -> u64 {
        self.sign(negative)
    }

    pub(super) fn infinity(self, negative: bool) -> u64 {
        self.sign(negative) | self.special << self.fraction
    }

    /// A NaN from its sign and a significand of 64 bits.
    pub(super) fn nan(self, negative: bool, significand: u64) -> u64 {
        let fraction = significand << 1 >> (64 - self.fraction);
        self.infinity(negative) | fraction
    }

    pub(super) fn target(self) -> Target {
        Target {
            bits: self.fraction + 1,
            min: 1 - self.bias(),
            max: self.bias(),
        }
    }

    /// Reads an operand.
    pub(super) fn unpack(self, bits: u64) -> Operand {
        let negative = bits & self.sign(true) != 0;
        let field = bits >> self.fraction & self.special;
        let fraction = bits & ((1 << self.fraction) - 1);
        let aligned = fraction << (63 - self.fraction);
        let number = |exponent: i32, significand: u64| {
            Number::new(negative, exponent, u128::from(significand) << 64)
                .map_or(Class::Zero, Class::Finite)
        };
        let class = if field == self.special {
            special(aligned | 1 << 63)
        } else if field == 0 {
            number(1 - self.bias(), aligned)
        } else {
            number(field as i32 - self.bias(), aligned | 1 << 63)
        };
        Operand {
            negative,
            class,
            denormal: field == 0 && fraction != 0,
        }
    }

    /// Writes what was rounded to [`Self::target`].
    pub(super) fn pack(self, negative: bool, rounded: Rounded) -> u64 {
        if rounded.infinite {
            return self.infinity(negative);
        }
        let significand = (rounded.significand >> (127 - self.fraction)) as u64;
        let field = if significand >> self.fraction != 0 {
            (rounded.exponent + self.bias()) as u64
        } else {
            0
        };
        self.sign(negative) | field << self.fraction | significand & ((1 << self.fraction) - 1)
    }
}

/// Infinity or a NaN, by its significand with the leading bit set.
fn special(significand: u64) -> Class {
    if significand << 1 == 0 {
        Class::Infinity
    } else if significand >> 62 & 1 != 0 {
        Class::QuietNan(significand)
    } else {
        Class::SignallingNan(significand)
    }
}

/// The 80 bits of the x87's registers (SDM vol. 1, 4.2.2).
pub(super) mod extended {
    use super::{Class, Number, Operand, Rounded, Target, special};

    const SPECIAL: u64 = 0x7fff;
    const BIAS: i32 = 0x3fff;
    const LEADING: u64 = 1 << 63;

    /// What an invalid operation gives.
    pub(in super::super) const INDEFINITE: u128 = 0xffff_c000_0000_0000_0000;

    /// One.
    pub(in super::super) const ONE: u128 = 0x3fff_8000_0000_0000_0000;

    /// Rounds to as many bits; the exponents are always the register's.
    pub(in super::super) fn target(bits: u32) -> Target {
        Target {
            bits,
            min: 1 - BIAS,
            max: BIAS,
        }
    }

    fn assemble(negative: bool, field: u64, significand: u64) -> u128 {
        u128::from(u64::from(negative) << 15 | field) << 64 | u128::from(significand)
    }

    pub(in super::super) fn is_negative(register: u128) -> bool {
        register >> 79 & 1 != 0
    }

    pub(in super::super) fn zero(negative: bool) -> u128 {
        assemble(negative, 0, 0)
    }

    pub(in super::super) fn infinity(negative: bool) -> u128 {
        assemble(negative, SPECIAL, LEADING)
    }

    /// A quiet NaN from a significand.
    pub(in super::super) fn nan(negative: bool, significand: u64) -> u128 {
        assemble(negative, SPECIAL, significand | 3 << 62)
    }

    pub(in super::super) fn unpack(register: u128) -> Operand {
        let negative = is_negative(register);
        let field = (register >> 64) as u64 & SPECIAL;
        let significand = register as u64;
        let number = |exponent: i32| {
            Number::new(negative, exponent, u128::from(significand) << 64)
                .map_or(Class::Zero, Class::Finite)
        };
        let class = match field {
            0 => number(1 - BIAS),
            _ if significand & LEADING == 0 => Class::Unsupported,
            SPECIAL => special(significand),
            _ => number(field as i32 - BIAS),
        };
        Operand {
            negative,
            class,
            denormal: field == 0 && significand != 0,
        }
    }

    /// Writes what was rounded to [`target`].
    pub(in super::super) fn pack(negative: bool, rounded: Rounded) -> u128 {
        if rounded.infinite {
            return infinity(negative);
        }
        let significand = (rounded.significand >> 64) as u64;
        let field = if significand & LEADING != 0 {
            (rounded.exponent + BIAS) as u64 & SPECIAL
        } else {
            0
        };
        assemble(negative, field, significand)
    }

    /// A number that fits: it has no more than 64 bits and a normal exponent.
    pub(in super::super) fn exact(number: Number) -> u128 {
        let field = (number.exponent + BIAS) as u64 & SPECIAL;
        assemble(number.negative, field, (number.significand >> 64) as u64)
    }
}
