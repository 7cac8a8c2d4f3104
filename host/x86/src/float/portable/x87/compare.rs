//! Comparisons, and FXAM.

use super::super::INVALID;
use super::super::format::extended;
use super::super::number::{Class, Operand};
use super::super::sse::{compare_flags, order};
use super::{C0, C1, C2, C3, Quiet, Stack};

/// ZF, PF and CF.
const RESULT_FLAGS: u64 = 0x45;
/// What FCOMI clears beside: SF and AF.
const CLEARED_FLAGS: u64 = 0x90;

impl Stack<'_> {
    /// Compares: ZF, PF and CF as FCOMI sets them, and whether the stack may be popped. An
    /// exception that is not masked keeps it from that, but not from setting flags.
    fn compared(&mut self, a: &Operand, b: &Operand, quiet: Quiet) -> (u64, bool) {
        let order = order(a, b);
        let allowed = match order {
            Some(_) => self.check_denormal(&[a, b]),
            None if quiet == Quiet::Invalid => self.raise(INVALID),
            None => {
                let invalid = a.invalid() | b.invalid();
                self.raise(invalid)
            }
        };
        (compare_flags(order), allowed)
    }

    fn set_conditions(&mut self, flags: u64) {
        self.condition(C0, flags & 1 != 0);
        self.condition(C2, flags & 4 != 0);
        self.condition(C3, flags & 0x40 != 0);
    }

    /// A comparison of registers, or the fault that one is not there.
    fn compare_present(&mut self, index: usize, quiet: Quiet) -> (u64, bool) {
        if self.is_empty(0) || self.is_empty(index) {
            return (RESULT_FLAGS, self.stack_fault(false));
        }
        let (a, b) = (self.operand(0), self.operand(index));
        self.compared(&a, &b, quiet)
    }

    pub(super) fn compare_registers(&mut self, index: usize, quiet: Quiet, pops: usize) {
        let (flags, pop) = self.compare_present(index, quiet);
        self.set_conditions(flags);
        self.pop(if pop { pops } else { 0 });
    }

    pub(super) fn compare_to_flags(&mut self, index: usize, quiet: Quiet, pops: usize) {
        let (flags, pop) = self.compare_present(index, quiet);
        self.flags = self.flags & !(RESULT_FLAGS | CLEARED_FLAGS) | flags;
        self.pop(if pop { pops } else { 0 });
    }

    pub(super) fn compare_memory(&mut self, memory: &Operand, pops: usize) {
        let (flags, pop) = if self.is_empty(0) {
            (RESULT_FLAGS, self.stack_fault(false))
        } else {
            let a = self.operand(0);
            self.compared(&a, memory, Quiet::Invalid)
        };
        self.set_conditions(flags);
        self.pop(if pop { pops } else { 0 });
    }

    /// FTST.
    pub(super) fn test(&mut self) {
        self.compare_memory(&extended::unpack(extended::zero(false)), 0);
    }

    /// FXAM.
    pub(super) fn examine(&mut self) {
        let operand = self.operand(0);
        let conditions = if self.is_empty(0) {
            C3 | C0
        } else {
            match operand.class {
                Class::Unsupported => 0,
                Class::QuietNan(_) | Class::SignallingNan(_) => C0,
                Class::Infinity => C2 | C0,
                Class::Zero => C3,
                Class::Finite(_) if operand.denormal => C3 | C2,
                Class::Finite(_) => C2,
            }
        };
        self.condition(C0 | C1 | C2 | C3, false);
        self.condition(conditions, true);
        self.condition(C1, operand.negative);
    }
}
