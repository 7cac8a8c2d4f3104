//! Stores of ST(0) to memory as a number of some format.

use super::super::format::{Format, extended};
use super::super::number::{Class, Extremes, round};
use super::super::{INVALID, OVERFLOW, UNDERFLOW};
use super::{C1, Stack};

impl Stack<'_> {
    /// FST and FSTP to single or double precision.
    pub(super) fn store_float(&mut self, format: Format, memory: &mut [u8; 16], pops: usize) {
        let bits = if !self.is_empty(0) {
            self.converted(format)
        } else {
            self.stack_fault(false).then(|| format.indefinite())
        };
        if let Some(bits) = bits {
            let bytes = format.bytes();
            memory[..bytes].copy_from_slice(&bits.to_le_bytes()[..bytes]);
            self.pop(pops);
        }
    }

    fn converted(&mut self, format: Format) -> Option<u64> {
        let operand = self.operand(0);
        match operand.class {
            Class::Zero => Some(format.zero(operand.negative)),
            Class::Infinity => Some(format.infinity(operand.negative)),
            Class::Unsupported => self.raise(INVALID).then(|| format.indefinite()),
            Class::QuietNan(significand) | Class::SignallingNan(significand) => {
                let invalid = operand.invalid();
                self.raise(invalid)
                    .then(|| format.nan(operand.negative, significand) | format.quiet())
            }
            Class::Finite(number) => {
                let underflows = self.unmasked(UNDERFLOW);
                let extremes = if underflows {
                    // The result goes nowhere then; what counts is that exact ones count too.
                    Extremes::Adjust {
                        exceptions: UNDERFLOW,
                        by: super::ADJUSTMENT,
                    }
                } else {
                    Extremes::Gradual
                };
                let rounded = round(number, format.target(), self.mode(), extremes);
                let stopping = rounded.flags & (OVERFLOW | UNDERFLOW);
                if self.unmasked(stopping) {
                    self.raise(stopping);
                    return None;
                }
                self.raise(rounded.flags);
                self.condition(C1, rounded.away);
                Some(format.pack(operand.negative, rounded))
            }
        }
    }

    /// FSTP to all 80 bits.
    pub(super) fn store_extended(&mut self, memory: &mut [u8; 16]) {
        let register = if !self.is_empty(0) {
            self.get(0)
        } else if self.stack_fault(false) {
            extended::INDEFINITE
        } else {
            return;
        };
        memory[..10].copy_from_slice(&register.to_le_bytes()[..10]);
        self.pop(1);
    }
}
