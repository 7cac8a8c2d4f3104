//! Elementary functions with 128 bits: constants and series.
//!
//! Sums stop when a term is below the 110th bit. Every step's error is less than 2^−117 of the
//! result, and there are fewer than a hundred.

use super::super::number::Number;

pub(super) const PI: u128 = 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1;
pub(super) const LN_2: u128 = 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af;
pub(super) const LOG2_E: u128 = 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e89;
pub(super) const LOG2_10: u128 = 0xd49a_784b_cd1b_8afe_492b_f6ff_4daf_db4d;
pub(super) const LOG10_2: u128 = 0x9a20_9a84_fbcf_f798_8f89_59ac_0b7c_9178;

/// Bits below which a term no longer counts.
const ENOUGH: i32 = 110;
/// No series here needs as many terms; the slowest gains 2.5 bits with each.
const MOST_TERMS: u32 = 64;

/// A positive constant from its significand.
pub(super) const fn constant(exponent: i32, significand: u128) -> Number {
    Number {
        negative: false,
        exponent,
        significand,
    }
}

pub(super) const ONE: Number = constant(0, 1 << 127);
pub(super) const HALF_PI: Number = constant(0, PI);

/// Half of π as the processor reduces angles by it: π with 66 bits (SDM vol. 1, 8.3.8).
pub(super) const REDUCING_HALF_PI: Number = constant(0, 0xc90f_daa2_2168_c234_c000 << 48);

/// `number` divided by a small number.
fn divided(number: Number, by: u32) -> Option<Number> {
    Number::new(
        number.negative,
        number.exponent,
        number.significand / u128::from(by),
    )
}

/// The sum of `first` and the terms that `next` makes of the one before, with a factor that is
/// not carried on.
fn series(
    first: Number,
    mut next: impl FnMut(Number, u32) -> Option<Number>,
    factor: impl Fn(Number, u32) -> Option<Number>,
) -> Number {
    let (mut sum, mut term) = (first, first);
    for index in 1..MOST_TERMS {
        let Some(following) = next(term, index) else {
            break;
        };
        term = following;
        let Some(part) = factor(term, index) else {
            break;
        };
        sum = sum.add(part).unwrap_or(part);
        if part.exponent < sum.exponent - ENOUGH {
            break;
        }
    }
    sum
}

fn as_it_is(term: Number, _: u32) -> Option<Number> {
    Some(term)
}

/// sin `x` for |x| ≤ π/4.
pub(super) fn sine(x: Number) -> Number {
    let square = x.mul(x).negated();
    series(
        x,
        |term, index| divided(term.mul(square), 2 * index * (2 * index + 1)),
        as_it_is,
    )
}

/// cos `x` for |x| ≤ π/4.
pub(super) fn cosine(x: Number) -> Number {
    let square = x.mul(x).negated();
    series(
        ONE,
        |term, index| divided(term.mul(square), 2 * index * (2 * index - 1)),
        as_it_is,
    )
}

/// e^`x` − 1 for |x| < 1.
pub(super) fn exponential_minus_one(x: Number) -> Number {
    series(x, |term, index| divided(term.mul(x), index + 1), as_it_is)
}

/// arctan `x` for 0 < x ≤ 1.
pub(super) fn arctangent(x: Number) -> Number {
    /// tan π/8.
    const LIMIT: Number = constant(-2, 0xd413_cccf_e779_9211_65f6_26cd_d52a_fa7c);
    if x.smaller(LIMIT) {
        return arctangent_series(x);
    }
    let quarter = constant(-1, PI);
    let Some(above) = ONE.add(x.negated()) else {
        return quarter;
    };
    let rest = above.div(ONE.add(x).unwrap_or(ONE));
    quarter
        .add(arctangent_series(rest).negated())
        .unwrap_or(quarter)
}

fn arctangent_series(x: Number) -> Number {
    let square = x.mul(x).negated();
    series(
        x,
        |term, _| Some(term.mul(square)),
        |term, index| divided(term, 2 * index + 1),
    )
}

/// The base-two logarithm of a positive `x`; `None` is zero.
pub(super) fn logarithm(x: Number) -> Option<Number> {
    /// The square root of two.
    const ROOT: u128 = 0xb504_f333_f9de_6484_597d_89b3_754a_be9f;
    let (whole, exponent) = if x.significand > ROOT {
        (x.exponent + 1, -1)
    } else {
        (x.exponent, 0)
    };
    let fraction = Number { exponent, ..x }
        .add(ONE.negated())
        .map(logarithm_plus_one);
    let whole = Number::integer(whole < 0, whole.unsigned_abs().into());
    match (whole, fraction) {
        (Some(whole), Some(fraction)) => whole.add(fraction),
        (whole, fraction) => whole.or(fraction),
    }
}

/// The base-two logarithm of 1 + `x`, for 1 + x between √½ and √2.
pub(super) fn logarithm_plus_one(x: Number) -> Number {
    // ln(1 + x) = 2 artanh(x / (2 + x))
    let two = constant(1, 1 << 127);
    let ratio = x.div(two.add(x).unwrap_or(two));
    let square = ratio.mul(ratio);
    let artanh = series(
        ratio,
        |term, _| Some(term.mul(square)),
        |term, index| divided(term, 2 * index + 1),
    );
    artanh.mul(constant(1, LOG2_E))
}
