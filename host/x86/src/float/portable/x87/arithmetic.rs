//! The basic operations, square root, scaling, and what only moves registers.

use super::super::format::extended;
use super::super::number::{
    Class, Mode, Number, Operand, Value, add, divide, multiply, square_root, subtract,
};
use super::super::{DIVIDE, PRECISION};
use super::{Basic, C1, Stack};

/// The NaN that comes out of an operation with these operands (SDM vol. 1, table 4-7): a quiet
/// one before a signalling one, then the larger significand, then the positive sign.
pub(super) fn propagate(operands: &[&Operand]) -> u128 {
    let nans = operands.iter().filter_map(|operand| match operand.class {
        Class::QuietNan(significand) => Some((true, significand, !operand.negative)),
        Class::SignallingNan(significand) => Some((false, significand, !operand.negative)),
        _ => None,
    });
    nans.max()
        .map_or(extended::INDEFINITE, |(_, significand, positive)| {
            extended::nan(!positive, significand)
        })
}

impl Stack<'_> {
    /// The result of a basic operation; `None` when an exception that is not masked forbids it.
    fn basic(&mut self, operation: Basic, a: Operand, b: Operand) -> Option<u128> {
        if let Err(result) = self.check_operands(&[&a, &b]) {
            return result;
        }
        let mode = self.mode();
        let value = match operation {
            Basic::Add => add(&a, &b, mode),
            Basic::Multiply => multiply(&a, &b, mode),
            Basic::Subtract => subtract(&a, &b, mode),
            Basic::SubtractReversed => subtract(&b, &a, mode),
            Basic::Divide => divide(&a, &b, mode),
            Basic::DivideReversed => divide(&b, &a, mode),
        };
        let denormal_counts = !matches!(value, Value::Invalid | Value::DivisionByZero(_));
        if denormal_counts && !self.check_denormal(&[&a, &b]) {
            return None;
        }
        let target = self.precision();
        self.register_of(value, target)
    }

    pub(super) fn basic_registers(&mut self, group: u8, to: usize, with: usize, pops: usize) {
        let Some(operation) = Basic::from_group(group) else {
            return;
        };
        if self.is_empty(to) || self.is_empty(with) {
            if self.stack_fault(false) {
                self.set(to, extended::INDEFINITE);
                self.pop(pops);
            }
            return;
        }
        let (a, b) = (self.operand(to), self.operand(with));
        if let Some(result) = self.basic(operation, a, b) {
            self.set(to, result);
            self.pop(pops);
        }
    }

    pub(super) fn basic_memory(&mut self, group: u8, memory: &Operand) {
        let Some(operation) = Basic::from_group(group) else {
            return;
        };
        if self.present(&[0])
            && let Some(result) = self.basic(operation, self.operand(0), *memory)
        {
            self.set(0, result);
        }
    }

    /// FSQRT.
    pub(super) fn root(&mut self) {
        if !self.present(&[0]) {
            return;
        }
        let a = self.operand(0);
        let result = match self.check_operands(&[&a]) {
            Err(result) => result,
            Ok(()) => {
                let value = square_root(&a);
                if value != Value::Invalid && !self.check_denormal(&[&a]) {
                    return;
                }
                let target = self.precision();
                self.register_of(value, target)
            }
        };
        if let Some(result) = result {
            self.set(0, result);
        }
    }

    /// FCHS and FABS.
    pub(super) fn change_sign(&mut self, f: impl Fn(u128) -> u128) {
        if self.present(&[0]) {
            let register = f(self.get(0));
            self.set(0, register);
        }
    }

    /// FRNDINT.
    pub(super) fn round_to_integral(&mut self) {
        if !self.present(&[0]) {
            return;
        }
        let a = self.operand(0);
        if let Err(result) = self.check_operands(&[&a]) {
            if let Some(result) = result {
                self.set(0, result);
            }
            return;
        }
        if !self.check_denormal(&[&a]) {
            return;
        }
        let Class::Finite(number) = a.class else {
            return;
        };
        if let Some(integer) = number.to_integer(self.mode())
            && integer.inexact
        {
            self.raise(PRECISION);
            self.condition(C1, integer.away);
            let register = Number::integer(a.negative, integer.magnitude)
                .map_or(extended::zero(a.negative), extended::exact);
            self.set(0, register);
        }
    }

    /// FSCALE.
    pub(super) fn scale(&mut self) {
        if !self.present(&[0, 1]) {
            return;
        }
        let (a, b) = (self.operand(0), self.operand(1));
        let result = match self.check_operands(&[&a, &b]) {
            Err(result) => result,
            Ok(()) => {
                let value = scaled(&a, &b);
                if value != Value::Invalid && !self.check_denormal(&[&a, &b]) {
                    return;
                }
                self.register_of(value, extended::target(64))
            }
        };
        if let Some(result) = result {
            self.set(0, result);
        }
    }

    /// FXTRACT.
    pub(super) fn extract(&mut self) {
        if self.is_empty(0) || !self.is_empty(7) {
            if self.stack_fault(!self.is_empty(0)) {
                self.set(0, extended::INDEFINITE);
                self.push(extended::INDEFINITE);
            }
            return;
        }
        let a = self.operand(0);
        let (exponent, significand) = match self.check_operands(&[&a]) {
            Err(None) => return,
            Err(Some(nan)) => (nan, nan),
            Ok(()) => match a.class {
                Class::Zero => {
                    if !self.raise(DIVIDE) {
                        return;
                    }
                    (extended::infinity(true), self.get(0))
                }
                Class::Finite(number) => {
                    if !self.check_denormal(&[&a]) {
                        return;
                    }
                    let significand = Number {
                        exponent: 0,
                        ..number
                    };
                    let exponent = super::integer::from_i64(number.exponent.into());
                    (exponent, extended::exact(significand))
                }
                _ => (extended::infinity(false), self.get(0)),
            },
        };
        self.set(0, exponent);
        self.push(significand);
    }

    /// FLD ST(i).
    pub(super) fn load_register(&mut self, index: usize) {
        if !self.is_empty(index) {
            self.push_register(self.get(index));
        } else if self.stack_fault(false) {
            self.push(extended::INDEFINITE);
        }
    }

    /// FLD and FILD of numbers in memory.
    pub(super) fn load_memory(&mut self, memory: &Operand) {
        if !self.is_empty(7) {
            self.push_register(extended::INDEFINITE);
            return;
        }
        let register = match self.check_operands(&[memory]) {
            Err(result) => result,
            Ok(()) => {
                // Even if that is not masked, the number is loaded.
                self.check_denormal(&[memory]);
                self.register_of(memory.value(), extended::target(64))
            }
        };
        if let Some(register) = register {
            self.push(register);
        }
    }

    /// FXCH.
    pub(super) fn exchange(&mut self, index: usize) {
        for index in [0, index] {
            if self.is_empty(index) && !self.stack_fault(false) {
                return;
            }
        }
        let value = |stack: &Self, index| {
            if stack.is_empty(index) {
                extended::INDEFINITE
            } else {
                stack.get(index)
            }
        };
        let (a, b) = (value(self, 0), value(self, index));
        self.set(0, b);
        self.set(index, a);
    }

    /// FST and FSTP to a register.
    pub(super) fn store_register(&mut self, index: usize, pops: usize) {
        let value = if !self.is_empty(0) {
            self.get(0)
        } else if self.stack_fault(false) {
            extended::INDEFINITE
        } else {
            return;
        };
        self.set(index, value);
        self.pop(pops);
    }

    /// FSTPNCE: FSTP that never faults.
    pub(super) fn store_unchecked(&mut self, index: usize) {
        if !self.is_empty(0) {
            self.set(index, self.get(0));
        }
        self.pop(1);
    }

    /// FCMOVcc.
    pub(super) fn conditional_move(&mut self, escape: u8, group: u8, index: usize) {
        if !self.present(&[0, index]) {
            return;
        }
        const CF: u64 = 1 << 0;
        const PF: u64 = 1 << 2;
        const ZF: u64 = 1 << 6;
        let mask = [CF, ZF, CF | ZF, PF][usize::from(group & 3)];
        if (self.flags & mask != 0) == (escape == 2) {
            self.set(0, self.get(index));
        }
    }

    /// FLD1 and its like.
    pub(super) fn load_constant(&mut self, form: u8) {
        // Twice as many bits as a register has; FLD1 and FLDZ are exact.
        let (exponent, significand) = match form {
            0x29 => (1, super::wide::LOG2_10),
            0x2a => (0, super::wide::LOG2_E),
            0x2b => (1, super::wide::PI),
            0x2c => (-2, super::wide::LOG10_2),
            0x2d => (-1, super::wide::LN_2),
            0x28 => return self.push_register(extended::ONE),
            _ => return self.push_register(extended::zero(false)),
        };
        let number = Number {
            negative: false,
            exponent,
            significand,
        };
        let rounded = self.round(number, extended::target(64));
        self.push_register(extended::pack(false, rounded));
    }
}

/// The first operand times two to the power of the second's integer part.
fn scaled(a: &Operand, b: &Operand) -> Value {
    match (a.class, b.class) {
        (Class::Zero, Class::Infinity) if !b.negative => Value::Invalid,
        (Class::Infinity, Class::Infinity) if b.negative => Value::Invalid,
        (_, Class::Infinity) if b.negative => Value::Zero(a.negative),
        (_, Class::Infinity) => Value::Infinity(a.negative),
        (Class::Finite(a), Class::Finite(b)) => {
            // Beyond this every result overflows or underflows.
            const LIMIT: i32 = 1 << 17;
            let magnitude = b
                .to_integer(Mode::Truncate)
                .and_then(|integer| i32::try_from(integer.magnitude).ok())
                .map_or(LIMIT, |magnitude| magnitude.min(LIMIT));
            let by = if b.negative { -magnitude } else { magnitude };
            Value::Finite(Number {
                exponent: a.exponent + by,
                ..a
            })
        }
        _ => a.value(),
    }
}
