//! FPREM and FPREM1.

use super::super::format::extended;
use super::super::number::{Class, Mode, Number, Operand, Value};
use super::{C0, C1, C2, C3, Stack};

/// How far exponents may be apart for a remainder to be found at once.
const WHOLE: i32 = 64;

/// What one round of division leaves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Division {
    /// `None` is zero.
    pub(super) rest: Option<Number>,
    /// The lowest bits of the quotient.
    pub(super) quotient: u64,
}

/// The rest of |a| / |b| when the quotient is cut off after `steps` bits below the first; exact.
/// Neither may have more than 127 bits.
pub(super) fn divide(a: Number, b: Number, steps: i32) -> Division {
    let (divisor, mut rest) = (b.significand >> 1, a.significand >> 1);
    let mut quotient = 0_u64;
    let mut exponent = a.exponent;
    for step in 0..=steps {
        if step > 0 {
            rest <<= 1;
            exponent -= 1;
        }
        quotient <<= 1;
        if rest >= divisor {
            rest -= divisor;
            quotient |= 1;
        }
    }
    Division {
        rest: Number::new(false, exponent + 1, rest),
        quotient,
    }
}

impl Stack<'_> {
    /// Rounding to nearest makes FPREM1, cutting off FPREM.
    pub(super) fn partial_remainder(&mut self, mode: Mode) {
        self.condition(C2, false);
        if !self.present(&[0, 1]) {
            return;
        }
        let (a, b) = (self.operand(0), self.operand(1));
        let result = match self.check_operands(&[&a, &b]) {
            Err(result) => result,
            Ok(()) => self.remainder(&a, &b, mode),
        };
        if let Some(result) = result {
            self.set(0, result);
        }
    }

    fn remainder(&mut self, a: &Operand, b: &Operand, mode: Mode) -> Option<u128> {
        if a.class == Class::Infinity || b.class == Class::Zero {
            return self.register_of(Value::Invalid, extended::target(64));
        }
        if !self.check_denormal(&[a, b]) {
            return None;
        }
        self.condition(C0 | C1 | C2 | C3, false);
        let (Class::Finite(x), Class::Finite(y)) = (a.class, b.class) else {
            // A zero stays, and so does what is divided by infinity.
            return self.register_of(a.value(), extended::target(64));
        };
        let distance = x.exponent - y.exponent;
        if distance >= WHOLE {
            // The result of a partial step has the sign of the dividend, and its exponent is
            // smaller by a number between 32 and 63.
            let steps = 32 + distance % 32;
            let far = Number {
                exponent: y.exponent + distance - steps,
                ..y
            };
            self.condition(C2, true);
            let division = divide(x, far, steps);
            return self.signed_rest(a.negative, division.rest);
        }
        let mut division = if distance < 0 {
            Division {
                rest: Some(x.abs()),
                quotient: 0,
            }
        } else {
            divide(x, y, distance)
        };
        let mut negative = a.negative;
        if mode == Mode::Nearest
            && let Some(rest) = division.rest
            && closer_to_next(rest, y, division.quotient & 1 != 0)
        {
            division.quotient = division.quotient.wrapping_add(1);
            division.rest = y.abs().add(rest.abs().negated());
            negative = !negative;
        }
        self.condition(C0, division.quotient & 4 != 0);
        self.condition(C3, division.quotient & 2 != 0);
        self.condition(C1, division.quotient & 1 != 0);
        let zero_sign = a.negative;
        match division.rest {
            None => Some(extended::zero(zero_sign)),
            rest => self.signed_rest(negative, rest),
        }
    }

    fn signed_rest(&mut self, negative: bool, rest: Option<Number>) -> Option<u128> {
        let quotient_bit = self.state.status & C1;
        let value = rest.map_or(Value::Zero(negative), |rest| {
            Value::Finite(Number { negative, ..rest })
        });
        let register = self.register_of(value, extended::target(64));
        self.state.status = self.state.status & !C1 | quotient_bit;
        register
    }
}

/// Is the rest more than half the divisor, or just half with an odd quotient?
fn closer_to_next(rest: Number, divisor: Number, odd: bool) -> bool {
    let twice = (rest.exponent + 1, rest.significand);
    let once = (divisor.exponent, divisor.significand);
    twice > once || twice == once && odd
}
