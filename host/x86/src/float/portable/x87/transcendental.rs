//! The transcendental instructions: special operands, and where the series start.

use super::super::format::extended;
use super::super::number::{Class, Number, Operand, Value};
use super::super::{PRECISION, UNDERFLOW};
use super::remainder;
use super::wide::{self, HALF_PI, ONE, REDUCING_HALF_PI};
use super::{C2, Stack};

/// Angles from 2^63 on are refused (SDM vol. 1, 8.3.8).
const LARGEST_ANGLE: i32 = 63;

/// An angle reduced: the rest within π/4 (`None` is zero), and how many half π it is away.
struct Reduced {
    rest: Option<Number>,
    quadrant: u64,
}

fn reduce(angle: Number) -> Reduced {
    let (mut rest, mut quadrant) = if angle.smaller(REDUCING_HALF_PI) {
        (Some(angle.abs()), 0)
    } else {
        let distance = angle.exponent - REDUCING_HALF_PI.exponent;
        let division = remainder::divide(angle, REDUCING_HALF_PI, distance);
        (division.rest, division.quotient)
    };
    let half = Number {
        exponent: REDUCING_HALF_PI.exponent - 1,
        ..REDUCING_HALF_PI
    };
    if let Some(value) = rest
        && half.smaller(value)
    {
        rest = value.add(REDUCING_HALF_PI.negated());
        quadrant = quadrant.wrapping_add(1);
    }
    if angle.negative {
        rest = rest.map(Number::negated);
        quadrant = quadrant.wrapping_neg();
    }
    Reduced { rest, quadrant }
}

impl Reduced {
    fn sine_of_rest(&self) -> Value {
        self.rest
            .map_or(Value::Zero(false), |rest| Value::Finite(wide::sine(rest)))
    }

    fn cosine_of_rest(&self) -> Value {
        Value::Finite(self.rest.map_or(ONE, wide::cosine))
    }

    fn sine(&self) -> Value {
        let value = if self.quadrant & 1 == 0 {
            self.sine_of_rest()
        } else {
            self.cosine_of_rest()
        };
        signed(value, self.quadrant & 2 != 0)
    }

    fn cosine(&self) -> Value {
        Self {
            rest: self.rest,
            quadrant: self.quadrant.wrapping_add(1),
        }
        .sine()
    }

    fn tangent(&self) -> Value {
        match (self.sine(), self.cosine()) {
            (Value::Finite(sine), Value::Finite(cosine)) => Value::Finite(sine.div(cosine)),
            (sine, _) => sine,
        }
    }
}

fn signed(value: Value, negate: bool) -> Value {
    match value {
        Value::Finite(number) if negate => Value::Finite(number.negated()),
        other => other,
    }
}

impl Stack<'_> {
    /// A result as a register. Processors take all of them for inexact, even log2 8.
    fn transcendental(&mut self, value: Value) -> Option<u128> {
        let register = self.register_of(value, extended::target(64))?;
        if matches!(value, Value::Finite(_)) {
            let denormal = extended::unpack(register).denormal;
            self.raise(PRECISION | if denormal { UNDERFLOW } else { 0 });
        }
        Some(register)
    }

    /// What becomes of an operand that is no angle; `Ok` is one.
    fn angle(&mut self, operand: &Operand) -> Result<Number, Option<u128>> {
        self.check_operands(&[operand])?;
        match operand.class {
            Class::Finite(number) if number.exponent >= LARGEST_ANGLE => {
                self.condition(C2, true);
                Err(None)
            }
            Class::Finite(number) => {
                if self.check_denormal(&[operand]) {
                    Ok(number)
                } else {
                    Err(None)
                }
            }
            Class::Zero => Err(Some(extended::zero(operand.negative))),
            _ => Err(self.transcendental(Value::Invalid)),
        }
    }

    /// FSIN.
    pub(super) fn sine(&mut self) {
        self.condition(C2, false);
        if !self.present(&[0]) {
            return;
        }
        let operand = self.operand(0);
        let result = match self.angle(&operand) {
            Err(result) => result,
            Ok(angle) => self.transcendental(reduce(angle).sine()),
        };
        if let Some(result) = result {
            self.set(0, result);
        }
    }

    /// FCOS.
    pub(super) fn cosine(&mut self) {
        self.condition(C2, false);
        if !self.present(&[0]) {
            return;
        }
        let operand = self.operand(0);
        let result = match self.angle(&operand) {
            Err(result) if operand.class == Class::Zero => result.map(|_| extended::ONE),
            Err(result) => result,
            Ok(angle) => self.transcendental(reduce(angle).cosine()),
        };
        if let Some(result) = result {
            self.set(0, result);
        }
    }

    /// FSINCOS.
    pub(super) fn sine_and_cosine(&mut self) {
        self.two_results(|stack, operand| match stack.angle(operand) {
            Err(Some(zero)) if operand.class == Class::Zero => Some((zero, extended::ONE)),
            Err(result) => result.map(|result| (result, result)),
            Ok(angle) => {
                let reduced = reduce(angle);
                let cosine = stack.transcendental(reduced.cosine())?;
                let sine = stack.transcendental(reduced.sine())?;
                Some((sine, cosine))
            }
        });
    }

    /// FPTAN.
    pub(super) fn tangent(&mut self) {
        self.two_results(|stack, operand| match stack.angle(operand) {
            Err(Some(zero)) if operand.class == Class::Zero => Some((zero, extended::ONE)),
            Err(result) => result.map(|result| (result, result)),
            Ok(angle) => {
                let tangent = stack.transcendental(reduce(angle).tangent())?;
                Some((tangent, extended::ONE))
            }
        });
    }

    /// Replaces ST(0) and pushes.
    fn two_results(&mut self, f: impl FnOnce(&mut Self, &Operand) -> Option<(u128, u128)>) {
        self.condition(C2, false);
        if self.is_empty(0) || !self.is_empty(7) {
            if self.stack_fault(!self.is_empty(0)) {
                self.set(0, extended::INDEFINITE);
                self.push(extended::INDEFINITE);
            }
            return;
        }
        let operand = self.operand(0);
        if let Some((first, second)) = f(self, &operand) {
            self.set(0, first);
            self.push(second);
        }
    }

    /// F2XM1.
    pub(super) fn power(&mut self) {
        if !self.present(&[0]) {
            return;
        }
        let a = self.operand(0);
        let result = match self.check_operands(&[&a]) {
            Err(result) => result,
            Ok(()) if !self.check_denormal(&[&a]) => None,
            Ok(()) => self.transcendental(power_minus_one(&a)),
        };
        if let Some(result) = result {
            self.set(0, result);
        }
    }

    /// FYL2X.
    pub(super) fn logarithm(&mut self) {
        self.consuming(|x, y| match x.class {
            Class::Zero => match y.class {
                Class::Zero => Value::Invalid,
                Class::Infinity => Value::Infinity(!y.negative),
                _ => Value::DivisionByZero(!y.negative),
            },
            _ if x.negative => Value::Invalid,
            Class::Finite(x) => times(y, wide::logarithm(x), false),
            _ => infinite_times(y),
        });
    }

    /// FYL2XP1.
    pub(super) fn logarithm_plus_one(&mut self) {
        self.consuming(|x, y| match x.class {
            Class::Zero => times(y, None, x.negative),
            Class::Finite(x) => times(y, logarithm_of_one_and(x), false),
            _ if x.negative => Value::Invalid,
            _ => infinite_times(y),
        });
    }

    /// FPATAN.
    pub(super) fn arctangent(&mut self) {
        self.consuming(angle_of);
    }

    /// An operation on ST(0) and ST(1) whose result replaces both.
    fn consuming(&mut self, f: impl FnOnce(&Operand, &Operand) -> Value) {
        if self.is_empty(0) || self.is_empty(1) {
            if self.stack_fault(false) {
                self.set(1, extended::INDEFINITE);
                self.pop(1);
            }
            return;
        }
        let (x, y) = (self.operand(0), self.operand(1));
        let result = match self.check_operands(&[&x, &y]) {
            Err(result) => result,
            Ok(()) => {
                let value = f(&x, &y);
                let computes = !matches!(value, Value::Invalid | Value::DivisionByZero(_));
                if computes && !self.check_denormal(&[&x, &y]) {
                    return;
                }
                self.transcendental(value)
            }
        };
        if let Some(result) = result {
            self.set(1, result);
            self.pop(1);
        }
    }
}

/// 2^`a` − 1.
fn power_minus_one(a: &Operand) -> Value {
    match a.class {
        Class::Infinity if a.negative => Value::Finite(ONE.negated()),
        // Beyond one the result is undefined: the operand stays.
        Class::Finite(x) if x.exponent < 0 => {
            let power = x.mul(wide::constant(-1, wide::LN_2));
            Value::Finite(wide::exponential_minus_one(power))
        }
        Class::Finite(x) if x == ONE.negated() => Value::Finite(Number {
            exponent: -1,
            ..ONE.negated()
        }),
        _ => a.value(),
    }
}

/// `y` times a finite factor, of which `None` is zero with the sign `zero_negative`.
fn times(y: &Operand, factor: Option<Number>, zero_negative: bool) -> Value {
    let negative = y.negative != factor.map_or(zero_negative, |factor| factor.negative);
    match (y.class, factor) {
        (Class::Infinity, None) => Value::Invalid,
        (Class::Infinity, Some(_)) => Value::Infinity(negative),
        (Class::Finite(y), Some(factor)) => Value::Finite(y.mul(factor)),
        _ => Value::Zero(negative),
    }
}

/// `y` times infinity.
fn infinite_times(y: &Operand) -> Value {
    match y.class {
        Class::Zero => Value::Invalid,
        _ => Value::Infinity(y.negative),
    }
}

/// log2(1 + `x`), also beyond the range that the manual allows.
fn logarithm_of_one_and(x: Number) -> Option<Number> {
    if x.exponent < -2 {
        return Some(wide::logarithm_plus_one(x));
    }
    let sum = ONE.add(x)?;
    wide::logarithm(sum.abs())
}

/// The angle of the point `x`, `y`.
fn angle_of(x: &Operand, y: &Operand) -> Value {
    let pi = |exponent| wide::constant(exponent, wide::PI);
    let angle = match (x.class, y.class) {
        (Class::Infinity, Class::Infinity) => Some(pi(-1)),
        (Class::Zero | Class::Finite(_) | Class::Infinity, Class::Zero) => None,
        (Class::Infinity, _) => None,
        (_, Class::Infinity) | (Class::Zero, _) => Some(HALF_PI),
        (Class::Finite(x), Class::Finite(y)) => Some(acute(x.abs(), y.abs())),
        _ => return Value::Invalid,
    };
    let angle = if x.negative {
        angle.map_or(Some(pi(1)), |angle| pi(1).add(angle.negated()))
    } else {
        angle
    };
    angle.map_or(Value::Zero(y.negative), |angle| {
        Value::Finite(Number {
            negative: y.negative,
            ..angle
        })
    })
}

/// The angle of a point in the first quadrant.
fn acute(x: Number, y: Number) -> Number {
    if x.smaller(y) {
        let rest = wide::arctangent(x.div(y));
        HALF_PI.add(rest.negated()).unwrap_or(HALF_PI)
    } else {
        wide::arctangent(y.div(x))
    }
}
