//! Near branches, calls and returns.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

use super::Mode;
use super::lower::{Comparison, Flow, Lowering};
use super::tables::number;
use crate::exec::op::ending;
use crate::exec::{alu, branch};

/// One instance of an expression for each condition.
macro_rules! by_condition {
    ($code:expr, $name:ident => $handler:expr) => {
        by_condition!(@ $code, $name => $handler; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    };
    (@ $code:expr, $name:ident => $handler:expr; $($value:literal)*) => {
        match $code {
            $($value => {
                const $name: u8 = $value;
                $handler
            })*
            _ => {
                const $name: u8 = 15;
                $handler
            }
        }
    };
}

pub(super) use by_condition;

impl Lowering {
    /// Near jumps, calls and returns; `None` for those that are rare.
    pub(super) fn transfer(&mut self, i: &Instruction) -> Option<Flow> {
        use branch::{LinkNone, LinkTaken};
        let relative = matches!(
            i.op0_kind(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        ) && i.op_count() == 1;
        let distance = if relative { self.distance(i) } else { 0 };
        let linked = relative && self.in_page(distance);
        let long = self.mode == Mode::Bits64;
        let handler = match i.mnemonic() {
            M::Jmp if relative && long && linked => ending(branch::jmp::<LinkTaken>),
            M::Jmp if relative && long => ending(branch::jmp::<LinkNone>),
            M::Jmp if i.op0_kind() == OpKind::NearBranch32 => ending(branch::jmp::<branch::Bits32>),
            M::Jmp if relative => ending(branch::jmp::<branch::Bits16>),
            M::Call if relative && long && linked => ending(branch::call::<LinkTaken>),
            M::Call if relative && long => ending(branch::call::<LinkNone>),
            M::Call if long && i.code() == Code::Call_rm64 => match i.op0_kind() {
                OpKind::Register => ending(branch::call_r),
                _ => ending(branch::call_m),
            },
            M::Jmp if long && i.code() == Code::Jmp_rm64 => match i.op0_kind() {
                OpKind::Register => ending(branch::jmp_r),
                _ => ending(branch::jmp_m),
            },
            M::Ret if long && matches!(i.code(), Code::Retnq | Code::Retnq_imm16) => {
                ending(branch::ret)
            }
            _ => return None,
        };
        let mut op = self.op(i, handler);
        op.src = number(i.op0_register());
        op.imm = if relative {
            distance as u64
        } else if i.code() == Code::Retnq_imm16 {
            i.immediate16().into()
        } else {
            0
        };
        self.push(i, op);
        Some(Flow::Ends)
    }

    pub(super) fn jcc(&mut self, i: &Instruction) -> Flow {
        use branch::{Bits16, Bits32, LinkBoth, LinkFallThrough, LinkNone, LinkTaken, jcc};
        let code = (i.condition_code() as u8).saturating_sub(1);
        let distance = self.distance(i);
        let near = (self.in_page(distance), self.next_in_page(i));
        let comparison = self
            .comparison
            .filter(|comparison| comparison.at + 1 == self.ops.len());
        if let (OpKind::NearBranch64, (true, true), Some(comparison)) =
            (i.op0_kind(), near, comparison)
            && self.fuse(comparison, code, distance)
        {
            return Flow::Ends;
        }
        let handler = match (i.op0_kind(), near) {
            (OpKind::NearBranch16, _) => by_condition!(code, C => ending(jcc::<Bits16, C>)),
            (OpKind::NearBranch32, _) => by_condition!(code, C => ending(jcc::<Bits32, C>)),
            (_, (true, true)) => by_condition!(code, C => ending(jcc::<LinkBoth, C>)),
            (_, (true, false)) => by_condition!(code, C => ending(jcc::<LinkTaken, C>)),
            (_, (false, true)) => by_condition!(code, C => ending(jcc::<LinkFallThrough, C>)),
            (_, (false, false)) => by_condition!(code, C => ending(jcc::<LinkNone, C>)),
        };
        let mut op = self.op(i, handler);
        op.imm = distance as u64;
        self.push(i, op);
        Flow::Ends
    }

    /// Makes one operation of a comparison and the branch behind it; false where there is none
    /// for its form.
    fn fuse(&mut self, comparison: Comparison, code: u8, distance: i64) -> bool {
        use alu::{Cmp, Test};
        use branch::compare_jcc;
        let Comparison {
            at,
            bytes,
            immediate,
            test,
        } = comparison;
        let handler = match (bytes, test, immediate) {
            (4, false, false) => {
                by_condition!(code, C => ending(compare_jcc::<u32, Cmp, false, C>))
            }
            (4, false, true) => by_condition!(code, C => ending(compare_jcc::<u32, Cmp, true, C>)),
            (4, true, false) => {
                by_condition!(code, C => ending(compare_jcc::<u32, Test, false, C>))
            }
            (8, false, false) => {
                by_condition!(code, C => ending(compare_jcc::<u64, Cmp, false, C>))
            }
            (8, false, true) => by_condition!(code, C => ending(compare_jcc::<u64, Cmp, true, C>)),
            (8, true, false) => {
                by_condition!(code, C => ending(compare_jcc::<u64, Test, false, C>))
            }
            (1, false, true) => by_condition!(code, C => ending(compare_jcc::<u8, Cmp, true, C>)),
            (1, true, false) => by_condition!(code, C => ending(compare_jcc::<u8, Test, false, C>)),
            (1, true, true) => by_condition!(code, C => ending(compare_jcc::<u8, Test, true, C>)),
            _ => return false,
        };
        let op = &mut self.ops[at];
        op.handler = handler;
        op.disp = distance;
        true
    }

    /// LOOPcc and JrCXZ.
    pub(super) fn counted(&mut self, i: &Instruction) -> Flow {
        use branch::{Bits16, Bits32, LinkNone, jcxz, looped};
        // The size of the counter is that of addresses, not of the operand.
        let counter = match i.code() {
            Code::Jcxz_rel8_16
            | Code::Jcxz_rel8_32
            | Code::Loop_rel8_16_CX
            | Code::Loop_rel8_32_CX
            | Code::Loope_rel8_16_CX
            | Code::Loope_rel8_32_CX
            | Code::Loopne_rel8_16_CX
            | Code::Loopne_rel8_32_CX => 2,
            Code::Jrcxz_rel8_16
            | Code::Jrcxz_rel8_64
            | Code::Loop_rel8_16_RCX
            | Code::Loop_rel8_64_RCX
            | Code::Loope_rel8_16_RCX
            | Code::Loope_rel8_64_RCX
            | Code::Loopne_rel8_16_RCX
            | Code::Loopne_rel8_64_RCX => 8,
            _ => 4,
        };
        let looping = matches!(i.mnemonic(), M::Loop | M::Loope | M::Loopne);
        macro_rules! pick {
            ($reach:ty) => {
                match (looping, counter) {
                    (false, 2) => ending(jcxz::<$reach, u16>),
                    (false, 4) => ending(jcxz::<$reach, u32>),
                    (false, _) => ending(jcxz::<$reach, u64>),
                    (true, 2) => ending(looped::<$reach, u16>),
                    (true, 4) => ending(looped::<$reach, u32>),
                    (true, _) => ending(looped::<$reach, u64>),
                }
            };
        }
        let handler = match i.op0_kind() {
            OpKind::NearBranch16 => pick!(Bits16),
            OpKind::NearBranch32 => pick!(Bits32),
            _ => pick!(LinkNone),
        };
        let mut op = self.op(i, handler);
        op.imm = self.distance(i) as u64;
        op.src = match i.mnemonic() {
            M::Loope => 1,
            M::Loopne => 2,
            _ => 0,
        };
        self.push(i, op);
        Flow::Ends
    }
}
