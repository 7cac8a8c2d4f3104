//! Binary numbers wider than any format of the guest: exact products, quotients and roots with
//! what was lost kept in the lowest bit, and the one place where results are rounded.

use super::{INVALID, OVERFLOW, PRECISION, UNDERFLOW};

/// The rounding modes, as MXCSR and the x87 control word number them (SDM vol. 1, 4.8.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// To nearest, ties to even.
    Nearest,
    /// Toward minus infinity.
    Down,
    /// Toward plus infinity.
    Up,
    /// Toward zero.
    Truncate,
}

impl Mode {
    /// From a field of two bits.
    pub(super) fn from_field(field: u32) -> Self {
        match field & 3 {
            0 => Self::Nearest,
            1 => Self::Down,
            2 => Self::Up,
            _ => Self::Truncate,
        }
    }

    /// Does a number of this sign, of which `odd` is the last bit that stays and `lost` what
    /// does not, come to be rounded away from zero? `half` is half a unit of the last bit.
    fn away(self, negative: bool, odd: bool, lost: u128, half: u128) -> bool {
        match self {
            Self::Nearest => lost > half || lost == half && odd,
            Self::Down => negative && lost != 0,
            Self::Up => !negative && lost != 0,
            Self::Truncate => false,
        }
    }
}

/// A finite number that is not zero: `significand` × 2^(`exponent` − 127). Bit 127 of the
/// significand is set; its lowest bit also stands for everything that lies below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number {
    pub(super) negative: bool,
    pub(super) exponent: i32,
    pub(super) significand: u128,
}

/// What arithmetic gives before it is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    /// Zero of this sign (`true` is negative).
    Zero(bool),
    /// Infinity of this sign.
    Infinity(bool),
    /// Anything between.
    Finite(Number),
    /// No number: invalid operation.
    Invalid,
    /// Infinity of this sign as the quotient of a finite number and zero.
    DivisionByZero(bool),
}

/// Shifts right; what falls out is kept as the lowest bit.
pub(super) fn shift_right_jam(value: u128, by: u32) -> u128 {
    match by {
        0 => value,
        1..=127 => value >> by | u128::from(value << (128 - by) != 0),
        _ => u128::from(value != 0),
    }
}

impl Number {
    /// `significand` × 2^(`exponent` − 127); `None` when that is zero.
    pub(super) fn new(negative: bool, exponent: i32, significand: u128) -> Option<Self> {
        let zeros = significand.leading_zeros();
        (significand != 0).then(|| Self {
            negative,
            exponent: exponent - zeros as i32,
            significand: significand << zeros,
        })
    }

    /// An integer that is not zero.
    pub(super) fn integer(negative: bool, magnitude: u128) -> Option<Self> {
        Self::new(negative, 127, magnitude)
    }

    /// The same number with the other sign.
    pub(super) fn negated(self) -> Self {
        Self {
            negative: !self.negative,
            ..self
        }
    }

    /// Its magnitude.
    pub(super) fn abs(self) -> Self {
        Self {
            negative: false,
            ..self
        }
    }

    /// Is its magnitude less than the other's?
    pub(super) fn smaller(self, other: Self) -> bool {
        (self.exponent, self.significand) < (other.exponent, other.significand)
    }

    /// The sum; `None` is an exact zero.
    pub(super) fn add(self, other: Self) -> Option<Self> {
        let (large, small) = if self.smaller(other) {
            (other, self)
        } else {
            (self, other)
        };
        let distance = large.exponent.abs_diff(small.exponent);
        // One bit of room for the carry.
        let a = shift_right_jam(large.significand, 1);
        let b = shift_right_jam(small.significand, distance.saturating_add(1));
        let sum = if large.negative == small.negative {
            a + b
        } else {
            a - b
        };
        Self::new(large.negative, large.exponent + 1, sum)
    }

    /// The product.
    pub(super) fn mul(self, other: Self) -> Self {
        let (high, low) = wide_product(self.significand, other.significand);
        let carry = high >> 127 != 0;
        let (high, low) = if carry {
            (high, low)
        } else {
            (high << 1 | low >> 127, low << 1)
        };
        Self {
            negative: self.negative != other.negative,
            exponent: self.exponent + other.exponent + i32::from(carry),
            significand: high | u128::from(low != 0),
        }
    }

    /// The quotient.
    pub(super) fn div(self, other: Self) -> Self {
        let (a, b) = (self.significand, other.significand);
        let exponent = self.exponent - other.exponent - i32::from(a < b);
        let significand = if a as u64 == 0 && b as u64 == 0 {
            quotient_of_halves(a, b)
        } else {
            quotient(a, b)
        };
        Self {
            negative: self.negative != other.negative,
            exponent,
            significand,
        }
    }

    /// The square root of its magnitude, exact to 70 bits and with what is lost in the lowest.
    /// The significand must have no more than 64 bits.
    pub(super) fn sqrt(self) -> Self {
        const BITS: u32 = 70;
        let odd = self.exponent & 1 != 0;
        // 1 to 4 as a fixed-point number of 2 + 126 bits; two bits make one of the root.
        let radicand = if odd {
            self.significand
        } else {
            self.significand >> 1
        };
        let (mut root, mut rest) = (0_u128, 0_u128);
        for step in 0..BITS {
            let pair = if step < 64 {
                radicand >> (126 - 2 * step) & 3
            } else {
                0
            };
            rest = rest << 2 | pair;
            let trial = root << 2 | 1;
            root <<= 1;
            if rest >= trial {
                rest -= trial;
                root |= 1;
            }
        }
        Self {
            negative: false,
            exponent: self.exponent >> 1,
            significand: root << (128 - BITS) | u128::from(rest != 0),
        }
    }

    /// Its integer part's magnitude, rounded; `None` when that needs more than 64 bits.
    pub(super) fn to_integer(self, mode: Mode) -> Option<Integer> {
        if self.exponent > 64 {
            return None;
        }
        // The integer in the upper half plus a bit, the fraction in the lower.
        let fixed = shift_right_jam(self.significand, (64 - self.exponent) as u32);
        const HALF: u128 = 1 << 62;
        let lost = fixed & (2 * HALF - 1);
        let whole = fixed >> 63;
        let away = mode.away(self.negative, whole & 1 != 0, lost, HALF);
        Some(Integer {
            magnitude: whole + u128::from(away),
            inexact: lost != 0,
            away,
        })
    }
}

/// A number rounded to an integer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Integer {
    pub(super) magnitude: u128,
    pub(super) inexact: bool,
    /// The magnitude grew.
    pub(super) away: bool,
}

/// All 256 bits of a product.
fn wide_product(a: u128, b: u128) -> (u128, u128) {
    let halves = |value: u128| (value >> 64, value & u128::from(u64::MAX));
    let ((a1, a0), (b1, b0)) = (halves(a), halves(b));
    let (low, high) = (a0 * b0, a1 * b1);
    let (cross, carry) = (a1 * b0).overflowing_add(a0 * b1);
    let (low, carry_low) = low.overflowing_add(cross << 64);
    let high = high + (cross >> 64) + (u128::from(carry) << 64) + u128::from(carry_low);
    (high, low)
}

/// The quotient of two significands, normalised, when both have 64 bits only.
fn quotient_of_halves(a: u128, b: u128) -> u128 {
    let divisor = b >> 64;
    let dividend = if a < b { a } else { a >> 1 };
    let (high, rest) = (dividend / divisor, dividend % divisor);
    let (low, rest) = ((rest << 64) / divisor, (rest << 64) % divisor);
    high << 64 | low | u128::from(rest != 0)
}

/// The quotient of two significands, normalised.
fn quotient(a: u128, b: u128) -> u128 {
    // The first bit is known to be one.
    let mut rest = if a < b {
        (a << 1).wrapping_sub(b)
    } else {
        a - b
    };
    let mut result = 1_u128;
    for _ in 0..127 {
        let carry = rest >> 127 != 0;
        rest <<= 1;
        result <<= 1;
        if carry || rest >= b {
            rest = rest.wrapping_sub(b);
            result |= 1;
        }
    }
    result | u128::from(rest != 0)
}

/// What a result is rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    /// Bits of the significand, the leading one included.
    pub(super) bits: u32,
    /// Exponents of normal numbers.
    pub(super) min: i32,
    pub(super) max: i32,
}

/// What becomes of results that are too large or too small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extremes {
    /// Infinity or the largest number, and gradual underflow.
    Gradual,
    /// Infinity or the largest number, and zero.
    Flush,
    /// For the exceptions that are set, the exponent is moved by so much toward zero, unless
    /// it is too far out even for that: then it is infinity or zero.
    Adjust {
        /// [`OVERFLOW`] and [`UNDERFLOW`].
        exceptions: u32,
        /// 24,576 in the x87's registers (SDM vol. 1, 8.5.4).
        by: i32,
    },
}

impl Extremes {
    fn adjusts(self, exception: u32) -> Option<i32> {
        match self {
            Self::Adjust { exceptions, by } if exceptions & exception != 0 => Some(by),
            _ => None,
        }
    }
}

/// A rounded result. Denormal numbers have the least exponent and the upper bits clear; zero has
/// no bit set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rounded {
    pub(super) infinite: bool,
    pub(super) exponent: i32,
    pub(super) significand: u128,
    /// [`OVERFLOW`], [`UNDERFLOW`], [`PRECISION`].
    pub(super) flags: u32,
    /// The magnitude grew.
    pub(super) away: bool,
}

/// Rounds a significand to its upper bits.
fn round_at(number: Number, bits: u32, mode: Mode) -> Rounded {
    let unit = 1_u128 << (128 - bits);
    let lost = number.significand & (unit - 1);
    let odd = number.significand & unit != 0;
    let away = mode.away(number.negative, odd, lost, unit / 2);
    let whole = number.significand - lost;
    let (significand, carry) = whole.overflowing_add(if away { unit } else { 0 });
    Rounded {
        infinite: false,
        exponent: number.exponent + i32::from(carry),
        significand: if carry { 1 << 127 } else { significand },
        flags: if lost != 0 { PRECISION } else { 0 },
        away,
    }
}

/// Rounds to a format. Results are tiny if they are after rounding, as all x86 processors have it.
pub(super) fn round(number: Number, target: Target, mode: Mode, extremes: Extremes) -> Rounded {
    let unbounded = round_at(number, target.bits, mode);
    if unbounded.exponent > target.max {
        return overflow(unbounded, number.negative, target, mode, extremes);
    }
    if number.exponent >= target.min {
        return unbounded;
    }
    let tiny = unbounded.exponent < target.min;
    if tiny {
        let by = extremes.adjusts(UNDERFLOW);
        if let Some(by) = by
            && unbounded.exponent + by >= target.min
        {
            return Rounded {
                exponent: unbounded.exponent + by,
                flags: unbounded.flags | UNDERFLOW,
                ..unbounded
            };
        }
        if by.is_some() || extremes == Extremes::Flush {
            return Rounded {
                infinite: false,
                exponent: target.min,
                significand: 0,
                flags: UNDERFLOW | PRECISION,
                away: false,
            };
        }
    }
    let distance = number.exponent.abs_diff(target.min);
    let denormal = Number {
        exponent: target.min,
        significand: shift_right_jam(number.significand, distance),
        ..number
    };
    let mut rounded = round_at(denormal, target.bits, mode);
    if tiny && rounded.flags & PRECISION != 0 {
        rounded.flags |= UNDERFLOW;
    }
    rounded
}

fn overflow(
    unbounded: Rounded,
    negative: bool,
    target: Target,
    mode: Mode,
    extremes: Extremes,
) -> Rounded {
    let by = extremes.adjusts(OVERFLOW);
    if let Some(by) = by
        && unbounded.exponent - by <= target.max
    {
        return Rounded {
            exponent: unbounded.exponent - by,
            flags: unbounded.flags | OVERFLOW,
            ..unbounded
        };
    }
    let infinite = match mode {
        _ if by.is_some() => true,
        Mode::Nearest => true,
        Mode::Down => negative,
        Mode::Up => !negative,
        Mode::Truncate => false,
    };
    Rounded {
        infinite,
        exponent: target.max,
        significand: u128::MAX << (128 - target.bits),
        flags: OVERFLOW | PRECISION,
        away: infinite,
    }
}

/// What the bits of an operand say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Zero,
    Finite(Number),
    Infinity,
    /// The significand with the bit that makes it quiet, in 64 bits.
    QuietNan(u64),
    SignallingNan(u64),
    /// Encodings of the 8087 that are none any more (SDM vol. 1, 8.2.2).
    Unsupported,
}

/// An operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operand {
    pub(super) negative: bool,
    pub(super) class: Class,
    /// Its exponent is the least, its leading bit not implied.
    pub(super) denormal: bool,
}

impl Operand {
    /// A NaN of either kind.
    pub(super) fn is_nan(&self) -> bool {
        matches!(self.class, Class::QuietNan(_) | Class::SignallingNan(_))
    }

    /// [`INVALID`] when arithmetic may not even see it.
    pub(super) fn invalid(&self) -> u32 {
        match self.class {
            Class::SignallingNan(_) | Class::Unsupported => INVALID,
            _ => 0,
        }
    }

    /// The operand with the other sign.
    pub(super) fn negated(self) -> Self {
        Self {
            negative: !self.negative,
            class: match self.class {
                Class::Finite(number) => Class::Finite(number.negated()),
                other => other,
            },
            ..self
        }
    }

    /// Its value, unless it is a NaN or unsupported.
    pub(super) fn value(&self) -> Value {
        match self.class {
            Class::Zero => Value::Zero(self.negative),
            Class::Infinity => Value::Infinity(self.negative),
            Class::Finite(number) => Value::Finite(number),
            _ => Value::Invalid,
        }
    }
}

/// The sum of two operands that are no NaN.
pub(super) fn add(a: &Operand, b: &Operand, mode: Mode) -> Value {
    match (a.class, b.class) {
        (Class::Infinity, Class::Infinity) if a.negative != b.negative => Value::Invalid,
        (Class::Infinity, _) => Value::Infinity(a.negative),
        (_, Class::Infinity) => Value::Infinity(b.negative),
        (Class::Finite(a), Class::Finite(b)) => a
            .add(b)
            .map_or(Value::Zero(mode == Mode::Down), Value::Finite),
        (Class::Zero, Class::Zero) if a.negative == b.negative => Value::Zero(a.negative),
        (Class::Zero, Class::Zero) => Value::Zero(mode == Mode::Down),
        (Class::Zero, _) => b.value(),
        (_, _) => a.value(),
    }
}

/// The difference of two operands that are no NaN.
pub(super) fn subtract(a: &Operand, b: &Operand, mode: Mode) -> Value {
    add(a, &b.negated(), mode)
}

/// The product of two operands that are no NaN.
pub(super) fn multiply(a: &Operand, b: &Operand, _: Mode) -> Value {
    let negative = a.negative != b.negative;
    match (a.class, b.class) {
        (Class::Infinity, Class::Zero) | (Class::Zero, Class::Infinity) => Value::Invalid,
        (Class::Infinity, _) | (_, Class::Infinity) => Value::Infinity(negative),
        (Class::Finite(a), Class::Finite(b)) => Value::Finite(a.mul(b)),
        _ => Value::Zero(negative),
    }
}

/// The quotient of two operands that are no NaN.
pub(super) fn divide(a: &Operand, b: &Operand, _: Mode) -> Value {
    let negative = a.negative != b.negative;
    match (a.class, b.class) {
        (Class::Infinity, Class::Infinity) | (Class::Zero, Class::Zero) => Value::Invalid,
        (Class::Infinity, _) => Value::Infinity(negative),
        (_, Class::Infinity) | (Class::Zero, _) => Value::Zero(negative),
        (Class::Finite(a), Class::Finite(b)) => Value::Finite(a.div(b)),
        _ => Value::DivisionByZero(negative),
    }
}

/// The square root of an operand that is no NaN.
pub(super) fn square_root(a: &Operand) -> Value {
    match a.class {
        Class::Zero => Value::Zero(a.negative),
        _ if a.negative => Value::Invalid,
        Class::Finite(number) => Value::Finite(number.sqrt()),
        _ => a.value(),
    }
}
