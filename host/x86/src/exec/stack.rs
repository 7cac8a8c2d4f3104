//! The stack outside of 64-bit mode's quick forms, and near transfers through it.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::op::{Op, slot};
use super::value::Value;
use super::{Exception, Result};
use crate::cpu::Cpu;
use crate::exec::segment::access;
use crate::mmu::is_canonical;
use crate::state::segment;

impl Cpu {
    /// Cuts a stack pointer to the stack's size.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.is_64_bit() {
            u64::MAX
        } else if self.segments[segment::SS].access & access::BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the stack pointer, as wide as the stack is.
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        match self.stack_mask() {
            0xffff => self.set_reg(slot::RSP, value as u16),
            0xffff_ffff => self.set_reg(slot::RSP, value as u32),
            _ => self.set_reg(slot::RSP, value),
        }
    }

    /// The linear address of `size` bytes at stack offset `at`.
    fn stack_address(&mut self, at: u64, size: u64, write: bool) -> Result<u64> {
        if self.is_64_bit() {
            return Ok(at);
        }
        self.check_segment(segment::SS, at, size, write)?;
        Ok(at.wrapping_add(self.slot(slot::SS)) & 0xffff_ffff)
    }

    /// Pushes `size` bytes of `value`.
    pub(crate) fn push(&mut self, size: u64, value: u64) -> Result {
        let at = self.rsp().wrapping_sub(size) & self.stack_mask();
        let address = self.stack_address(at, size, true)?;
        self.store_sized(address, size, value)?;
        self.set_stack_pointer(at);
        Ok(())
    }

    /// Reads `size` bytes `above` the stack pointer; also the stack pointer behind them.
    pub(crate) fn peek(&mut self, above: u64, size: u64) -> Result<(u64, u64)> {
        let at = self.rsp().wrapping_add(above) & self.stack_mask();
        let address = self.stack_address(at, size, false)?;
        let value = self.load_sized(address, size)?;
        Ok((value, at.wrapping_add(size) & self.stack_mask()))
    }

    /// Loads `size` bytes from the stack segment's linear address.
    pub(crate) fn load_sized(&mut self, address: u64, size: u64) -> Result<u64> {
        Ok(match size {
            1 => self.load::<u8>(address, slot::SS)?.zero_extend(),
            2 => self.load::<u16>(address, slot::SS)?.zero_extend(),
            4 => self.load::<u32>(address, slot::SS)?.zero_extend(),
            _ => self.load::<u64>(address, slot::SS)?,
        })
    }

    /// Stores `size` bytes at the stack segment's linear address.
    pub(crate) fn store_sized(&mut self, address: u64, size: u64, value: u64) -> Result {
        match size {
            1 => self.store(address, slot::SS, value as u8),
            2 => self.store(address, slot::SS, value as u16),
            4 => self.store(address, slot::SS, value as u32),
            _ => self.store(address, slot::SS, value),
        }
    }

    /// Writes a general register of `size` bytes.
    pub(crate) fn set_reg_sized(&mut self, number: u8, size: u64, value: u64) {
        match size {
            1 => self.set_reg(number, value as u8),
            2 => self.set_reg(number, value as u16),
            4 => self.set_reg(number, value as u32),
            _ => self.set_reg(number, value),
        }
    }

    /// #GP(0) for a near target that cannot be.
    fn check_target(&mut self, target: u64) -> Result {
        if self.is_64_bit() {
            if !is_canonical(target) {
                return Err(self.general_protection(0));
            }
            return Ok(());
        }
        self.check_code_limit(target)
    }
}

fn size_of_push(instruction: &Instruction) -> u64 {
    instruction.stack_pointer_increment().unsigned_abs().into()
}

/// The value of operand 0: register, memory or immediate.
fn operand(cpu: &mut Cpu, op: &Op, instruction: &Instruction, size: u64) -> Result<u64> {
    Ok(match instruction.op0_kind() {
        OpKind::Register => cpu.slot(op.dst),
        OpKind::Memory => {
            let at = cpu.ea(op);
            match size {
                2 => cpu.load::<u16>(at, op.seg)?.zero_extend(),
                4 => cpu.load::<u32>(at, op.seg)?.zero_extend(),
                _ => cpu.load::<u64>(at, op.seg)?,
            }
        }
        _ => instruction.immediate(0),
    })
}

/// PUSH.
pub(crate) fn push(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let size = size_of_push(instruction);
    let value = operand(cpu, op, instruction, size)?;
    cpu.push(size, value)
}

/// POP, to a register.
pub(crate) fn pop(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let size = size_of_push(instruction);
    let (value, rsp) = cpu.peek(0, size)?;
    cpu.set_stack_pointer(rsp);
    cpu.set_reg_sized(op.dst, size, value);
    Ok(())
}

/// POP, to memory. The address (see `decode`) is worked out with the stack pointer as it was; one
/// with the stack pointer as base is corrected here.
pub(crate) fn pop_memory(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let size = size_of_push(instruction);
    let (value, rsp) = cpu.peek(0, size)?;
    let base = instruction.memory_base().full_register();
    let moved = if base == iced_x86::Register::RSP {
        size
    } else {
        0
    };
    let at = cpu.ea(op).wrapping_add(moved) & 0xffff_ffff;
    cpu.store_sized(at, size, value)?;
    cpu.set_stack_pointer(rsp);
    Ok(())
}

/// PUSHA, PUSHAD.
pub(crate) fn push_all(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let size = size_of_push(instruction) / 8;
    let mask = cpu.stack_mask();
    let top = cpu.rsp();
    for register in 0..8u8 {
        let at = top.wrapping_sub(size * (u64::from(register) + 1)) & mask;
        let address = cpu.stack_address(at, size, true)?;
        cpu.check_writable(address, size, slot::SS)?;
    }
    for register in 0..8u8 {
        let value = if register == slot::RSP {
            top
        } else {
            cpu.slot(register)
        };
        let at = top.wrapping_sub(size * (u64::from(register) + 1)) & mask;
        let address = cpu.stack_address(at, size, true)?;
        cpu.store_sized(address, size, value)?;
    }
    cpu.set_stack_pointer(top.wrapping_sub(8 * size) & mask);
    Ok(())
}

/// POPA, POPAD.
pub(crate) fn pop_all(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let size = size_of_push(instruction) / 8;
    let mut values = [0; 8];
    let mut rsp = 0;
    for (index, value) in values.iter_mut().enumerate() {
        (*value, rsp) = cpu.peek(size * index as u64, size)?;
    }
    for (index, value) in values.into_iter().enumerate() {
        let register = 7 - index as u8;
        if register != slot::RSP {
            cpu.set_reg_sized(register, size, value);
        }
    }
    cpu.set_stack_pointer(rsp);
    Ok(())
}

/// CALL near, direct or indirect.
pub(crate) fn call(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let size = size_of_push(instruction);
    let target = near_target(cpu, op, instruction, size)?;
    cpu.check_target(target)?;
    cpu.push(size, cpu.rip)?;
    cpu.rip = target;
    Ok(())
}

/// JMP near, indirect.
pub(crate) fn jmp(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let size = match instruction.op0_kind() {
        OpKind::Memory => instruction.memory_size().size() as u64,
        _ => instruction.op0_register().size() as u64,
    };
    let target = near_target(cpu, op, instruction, size)?;
    cpu.check_target(target)?;
    cpu.rip = target;
    Ok(())
}

fn near_target(cpu: &mut Cpu, op: &Op, instruction: &Instruction, size: u64) -> Result<u64> {
    let mask = match size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let target = match instruction.op0_kind() {
        // The distance from the block's start, put there when the instruction was lowered.
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            cpu.slot(slot::RIP).wrapping_add(op.disp as u64)
        }
        _ => operand(cpu, op, instruction, size)?,
    };
    Ok(target & mask)
}

/// RET near.
pub(crate) fn ret(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let dropped = if instruction.op_count() == 1 {
        u64::from(instruction.immediate16())
    } else {
        0
    };
    let size = u64::from(instruction.stack_pointer_increment().unsigned_abs()) - dropped;
    let (target, rsp) = cpu.peek(0, size)?;
    cpu.check_target(target)?;
    cpu.set_stack_pointer(rsp.wrapping_add(dropped) & cpu.stack_mask());
    cpu.rip = target;
    Ok(())
}

/// LEAVE outside of its quick form.
pub(crate) fn leave(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let size = match instruction.code() {
        iced_x86::Code::Leavew => 2,
        iced_x86::Code::Leaved => 4,
        _ => 8,
    };
    let mask = cpu.stack_mask();
    let rbp = cpu.slot(slot::RBP) & mask;
    let address = cpu.stack_address(rbp, size, false)?;
    let value = cpu.load_sized(address, size)?;
    cpu.set_stack_pointer(rbp.wrapping_add(size) & mask);
    cpu.set_reg_sized(slot::RBP, size, value);
    Ok(())
}

/// ENTER.
pub(crate) fn enter(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let size = match instruction.code() {
        iced_x86::Code::Enterw_imm16_imm8 => 2,
        iced_x86::Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let mask = cpu.stack_mask();
    let level = u64::from(instruction.immediate8_2nd()) & 31;
    let top = cpu.rsp();
    let frame = top.wrapping_sub(size) & mask;
    let pushes = if level > 0 { level + 1 } else { 1 };
    let push_at = |index: u64| top.wrapping_sub(size * (index + 1)) & mask;
    let outer_at = |cpu: &Cpu, index: u64| cpu.slot(slot::RBP).wrapping_sub(size * index) & mask;
    let local = u64::from(instruction.immediate16());
    let rsp = top.wrapping_sub(size * pushes).wrapping_sub(local) & mask;
    // One push after another: an outer frame may lie where this one comes. What was pushed before a
    // fault stays; the registers do not change.
    for index in 0..pushes {
        let value = if index == 0 {
            cpu.slot(slot::RBP)
        } else if index < level {
            let outer = cpu.stack_address(outer_at(cpu, index), size, false)?;
            cpu.load_sized(outer, size)?
        } else {
            frame
        };
        let address = cpu.stack_address(push_at(index), size, true)?;
        cpu.store_sized(address, size, value)?;
    }
    // The new stack pointer must be writable, too.
    let last = cpu.stack_address(rsp, size, true)?;
    cpu.check_writable(last, size, slot::SS)?;
    cpu.set_reg_sized(slot::RBP, size, frame);
    cpu.set_stack_pointer(rsp);
    Ok(())
}

/// BOUND.
pub(crate) fn bound(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let at = cpu.ea(op);
    let size = instruction.op0_register().size() as u64;
    let (index, low, high) = if size == 2 {
        (
            cpu.reg::<u16>(op.dst).sign_extend(),
            cpu.load::<u16>(at, op.seg)?.sign_extend(),
            cpu.load::<u16>(at.wrapping_add(2), op.seg)?.sign_extend(),
        )
    } else {
        (
            cpu.reg::<u32>(op.dst).sign_extend(),
            cpu.load::<u32>(at, op.seg)?.sign_extend(),
            cpu.load::<u32>(at.wrapping_add(4), op.seg)?.sign_extend(),
        )
    };
    if (index as i64) < low as i64 || index as i64 > high as i64 {
        return Err(cpu.raise(Exception::BoundRange));
    }
    Ok(())
}

/// XLAT.
pub(crate) fn xlat(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let index = super::segment::index_of(instruction.memory_segment());
    let mask = match instruction.memory_base().size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = cpu
        .slot(slot::RBX)
        .wrapping_add(cpu.reg::<u8>(slot::RAX).into())
        & mask;
    let base = cpu.slot(slot::SEGMENT + index as u8);
    let mut at = offset.wrapping_add(base);
    if !cpu.is_64_bit() {
        cpu.check_segment(index, offset, 1, false)?;
        at &= 0xffff_ffff;
    }
    let value = cpu.load::<u8>(at, slot::SEGMENT + index as u8)?;
    cpu.set_reg(slot::RAX, value);
    Ok(())
}

/// AAA, AAS, AAD, AAM, DAA, DAS.
pub(crate) fn decimal(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    use super::flags::{AF, CF, Flags};
    let (al, ah): (u8, u8) = (cpu.reg(0), cpu.reg(0x20));
    let (carry, half) = (cpu.flags.carry(), cpu.flags.auxiliary());
    let with = |flags: Flags, carry: bool, half: bool| {
        let set = if carry { CF } else { 0 } | if half { AF } else { 0 };
        Flags::from_rflags(flags.to_rflags() & !(CF | AF) | set)
    };
    match instruction.mnemonic() {
        Mnemonic::Aaa | Mnemonic::Aas => {
            let adjust = al & 0xf > 9 || half;
            let add = instruction.mnemonic() == Mnemonic::Aaa;
            let mut ax = cpu.reg::<u16>(0);
            if adjust {
                ax = if add {
                    ax.wrapping_add(0x106)
                } else {
                    ax.wrapping_sub(0x106)
                };
            }
            cpu.set_reg(0, ax & 0xff0f);
            cpu.flags = with(Flags::logic(ax as u8 & 0xf), adjust, adjust);
        }
        Mnemonic::Daa | Mnemonic::Das => {
            let add = instruction.mnemonic() == Mnemonic::Daa;
            let step = |value: u8, by: u8| {
                if add {
                    value.wrapping_add(by)
                } else {
                    value.wrapping_sub(by)
                }
            };
            let (mut value, mut out) = (al, false);
            let low = al & 0xf > 9 || half;
            if low {
                out = carry || if add { al > 0xf9 } else { al < 6 };
                value = step(value, 6);
            }
            if al > 0x99 || carry {
                value = step(value, 0x60);
                out = true;
            }
            cpu.set_reg(0, value);
            cpu.flags = with(Flags::logic(value), out, low);
        }
        Mnemonic::Aam => {
            let base = instruction.immediate8();
            if base == 0 {
                return Err(cpu.raise(Exception::DivideError));
            }
            cpu.set_reg(0, al % base);
            cpu.set_reg(0x20, al / base);
            cpu.flags = Flags::logic(al % base);
        }
        _ => {
            let value = al.wrapping_add(ah.wrapping_mul(instruction.immediate8()));
            cpu.set_reg::<u16>(0, value.into());
            cpu.flags = Flags::logic(value);
        }
    }
    Ok(())
}

/// SALC: AL becomes the carry in all bits.
pub(crate) fn salc(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    let value = if cpu.flags.carry() { 0xffu8 } else { 0 };
    cpu.set_reg(slot::RAX, value);
    Ok(())
}
