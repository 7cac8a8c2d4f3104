//! Integers and packed decimals in memory.

use super::super::format::extended;
use super::super::number::{Class, Integer, Mode, Number, Operand};
use super::super::{INVALID, PRECISION};
use super::{C1, Stack, load_bytes};

/// An integer as an operand.
pub(super) fn operand(value: i64) -> Operand {
    Operand {
        negative: value < 0,
        class: Number::integer(value < 0, value.unsigned_abs().into())
            .map_or(Class::Zero, Class::Finite),
        denormal: false,
    }
}

/// An integer as a register.
pub(super) fn from_i64(value: i64) -> u128 {
    from_magnitude(value < 0, value.unsigned_abs())
}

fn from_magnitude(negative: bool, magnitude: u64) -> u128 {
    Number::integer(negative, magnitude.into()).map_or(extended::zero(negative), extended::exact)
}

impl Stack<'_> {
    /// ST(0) as an integer of at most `limits` (for positive and negative numbers), with its
    /// exceptions raised; `Err` is what to store instead, if anything.
    fn integer(
        &mut self,
        mode: Mode,
        limit: impl FnOnce(bool) -> u128,
    ) -> Result<(bool, u128), bool> {
        if self.is_empty(0) {
            return Err(self.stack_fault(false));
        }
        let operand = self.operand(0);
        let integer = match operand.class {
            Class::Zero => return Ok((operand.negative, 0)),
            Class::Finite(number) => number.to_integer(mode),
            _ => None,
        };
        match integer {
            Some(Integer {
                magnitude,
                inexact,
                away,
            }) if magnitude <= limit(operand.negative) => {
                self.raise(if inexact { PRECISION } else { 0 });
                self.condition(C1, away);
                Ok((operand.negative, magnitude))
            }
            _ => Err(self.raise(INVALID)),
        }
    }

    /// FIST, FISTP, FISTTP.
    pub(super) fn store_integer(
        &mut self,
        bits: u32,
        mode: Mode,
        memory: &mut [u8; 16],
        pops: usize,
    ) {
        let least = 1_u128 << (bits - 1);
        let value = match self.integer(mode, |negative| least - u128::from(!negative)) {
            Ok((true, magnitude)) => magnitude.wrapping_neg(),
            Ok((false, magnitude)) => magnitude,
            Err(true) => least,
            Err(false) => return,
        };
        let bytes = bits as usize / 8;
        memory[..bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        self.pop(pops);
    }

    /// FBLD: 18 digits and a sign.
    pub(super) fn load_decimal(&mut self, memory: &[u8; 16]) {
        let digits = load_bytes(memory, 9);
        let magnitude = (0..18).rev().fold(0_u64, |value, digit| {
            value * 10 + (digits >> (4 * digit)) as u64 % 16
        });
        self.push_register(from_magnitude(memory[9] & 0x80 != 0, magnitude));
    }

    /// FBSTP.
    pub(super) fn store_decimal(&mut self, memory: &mut [u8; 16]) {
        const LARGEST: u128 = 999_999_999_999_999_999;
        let (sign, mut magnitude) = match self.integer(self.mode(), |_| LARGEST) {
            Ok((negative, magnitude)) => (u8::from(negative) << 7, magnitude),
            Err(true) => {
                memory[..10].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff]);
                self.pop(1);
                return;
            }
            Err(false) => return,
        };
        for byte in &mut memory[..9] {
            let (low, high) = (magnitude % 10, magnitude / 10 % 10);
            *byte = (low | high << 4) as u8;
            magnitude /= 100;
        }
        memory[9] = sign;
        self.pop(1);
    }
}
