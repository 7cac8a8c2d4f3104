//! Pushes and pops.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::emit::{R10, R14, RCX, Reg, at};
use super::translate::{Able, PLACES, Unable, Work, number, scratch, slot_mem};

/// Pushes or pops in a row that share a look into the TLB, at most.
const MOST_IN_A_ROW: usize = 8;

/// The instructions that are done together: pushes or pops of registers.
pub(super) fn row(instructions: &[Instruction]) -> &[Instruction] {
    let Some(first) = instructions.first() else {
        return instructions;
    };
    let same = |i: &&Instruction| {
        i.code() == first.code() && i.op0_register() != Register::RSP && i.op0_register().is_gpr()
    };
    let count = match first.code() {
        Code::Push_r64 | Code::Pop_r64 => instructions.iter().take_while(same).count(),
        _ => 1,
    };
    &instructions[..count.clamp(1, MOST_IN_A_ROW)]
}

impl Work<'_> {
    /// Pushes what `value` puts into a register that it is given, RCX, or has already.
    pub(super) fn push_value(
        &mut self,
        instruction: usize,
        value: impl FnOnce(&mut Self) -> Reg,
    ) -> Able {
        let to = self.write_stack(-8, 8, instruction)?;
        let value = value(self);
        self.assembler.store(to, value);
        self.mark_for(instruction);
        self.assembler.lea(R14, at(R14, -8));
        Ok(())
    }

    pub(super) fn push(&mut self, i: &Instruction, instruction: usize) -> Able {
        match i.code() {
            Code::Push_r64 => {
                let guest = number(i.op0_register())?;
                self.push_value(instruction, |work| work.held(guest, RCX))
            }
            Code::Pushq_imm8 | Code::Pushq_imm32 => {
                let value = i.immediate(0) as i64 as i32;
                let to = self.write_stack(-8, 8, instruction)?;
                self.assembler.store_imm_64(to, value);
                self.mark_for(instruction);
                self.assembler.lea(R14, at(R14, -8));
                Ok(())
            }
            Code::Push_rm64 if i.op0_kind() == OpKind::Memory => {
                self.address(i)?;
                let from = self.probe_read(R10, 8, instruction);
                self.assembler.load(RCX, from);
                self.assembler.store(scratch(), RCX);
                self.push_value(instruction, |work| {
                    work.assembler.load(RCX, scratch());
                    RCX
                })
            }
            _ => Err(Unable),
        }
    }

    pub(super) fn pop(&mut self, i: &Instruction, instruction: usize) -> Able {
        if i.code() != Code::Pop_r64 {
            return Err(Unable);
        }
        let guest = number(i.op0_register())?;
        let from = self.read_stack(R14, 8, instruction)?;
        match PLACES[usize::from(guest)] {
            Some(R14) => {
                self.assembler.load(R14, from);
                return Ok(());
            }
            Some(place) => self.assembler.load(place, from),
            None => {
                self.assembler.load(RCX, from);
                self.assembler.store(slot_mem(guest), RCX);
            }
        }
        self.assembler.lea(R14, at(R14, 8));
        Ok(())
    }

    pub(super) fn leave(&mut self, i: &Instruction, instruction: usize) -> Able {
        if i.code() != Code::Leaveq {
            return Err(Unable);
        }
        const RBP: Reg = Reg(5);
        let from = self.read_stack(RBP, 8, instruction)?;
        self.assembler.lea(R14, at(RBP, 8));
        self.assembler.load(RBP, from);
        Ok(())
    }

    /// Registers that are pushed in a row, the first first.
    pub(super) fn push_row(&mut self, row: &[Instruction], instruction: usize) -> Able {
        let bytes = 8 * row.len() as i32;
        let to = self.write_stack(-bytes, bytes as u32, instruction)?;
        for (n, i) in row.iter().enumerate() {
            let guest = number(i.op0_register())?;
            let value = self.held(guest, RCX);
            let place = to.beyond(bytes - 8 * (n as i32 + 1));
            self.assembler.store(place, value);
        }
        self.mark_for(instruction);
        self.assembler.lea(R14, at(R14, -bytes));
        Ok(())
    }

    /// Registers that are popped in a row.
    pub(super) fn pop_row(&mut self, row: &[Instruction], instruction: usize) -> Able {
        let bytes = 8 * row.len() as i32;
        let first = self.read_stack(R14, bytes as u32, instruction)?;
        for (n, i) in row.iter().enumerate() {
            let guest = number(i.op0_register())?;
            let from = first.beyond(8 * n as i32);
            match PLACES[usize::from(guest)] {
                Some(place) => self.assembler.load(place, from),
                None => {
                    self.assembler.load(RCX, from);
                    self.assembler.store(slot_mem(guest), RCX);
                }
            }
        }
        self.assembler.lea(R14, at(R14, bytes));
        Ok(())
    }
}
