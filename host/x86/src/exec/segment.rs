//! Segment registers and descriptors (SDM vol. 3, chapters 3 and 5).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::flags::VM;
use super::op::{Op, slot};
use super::value::Value;
use super::{Exception, Result};
use crate::cpu::Cpu;
use crate::cpu::control::{CR0_PE, EFER_LMA};
use crate::state::{Segment, segment};

/// Bits of [`Segment::access`].
pub(crate) mod access {
    pub(crate) const ACCESSED: u16 = 1 << 0;
    /// Data: writable. Code: readable.
    pub(crate) const WRITABLE: u16 = 1 << 1;
    /// Data: expands down. Code: conforming.
    pub(crate) const EXPAND_DOWN: u16 = 1 << 2;
    pub(crate) const CODE: u16 = 1 << 3;
    /// Code or data, not a system segment.
    pub(crate) const S: u16 = 1 << 4;
    pub(crate) const PRESENT: u16 = 1 << 7;
    pub(crate) const LONG: u16 = 1 << 13;
    /// D of code, B of a stack.
    pub(crate) const BIG: u16 = 1 << 14;
    pub(crate) const GRANULARITY: u16 = 1 << 15;
}

/// The descriptor privilege level.
pub(crate) fn dpl(access: u16) -> u8 {
    (access >> 5 & 3) as u8
}

/// The register that an 8-byte descriptor describes.
pub(crate) fn parse(selector: u16, raw: u64) -> Segment {
    let access = (raw >> 40) as u16 & 0xf0ff;
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    Segment {
        selector,
        base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
        limit: if access & access::GRANULARITY != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        access,
        unusable: false,
    }
}

impl Cpu {
    /// In protected mode, and not in virtual-8086 mode?
    pub(crate) fn is_protected(&self) -> bool {
        self.cr0 & CR0_PE != 0 && self.system_flags & VM == 0
    }

    /// In IA-32e mode, 64-bit or compatibility?
    pub(crate) fn is_long(&self) -> bool {
        self.msrs.efer & EFER_LMA != 0
    }

    /// The descriptor of `selector` and its address; `fault` when the tables do not hold it.
    pub(crate) fn read_descriptor(
        &mut self,
        selector: u16,
        fault: fn(u16) -> Exception,
    ) -> Result<(u64, u64)> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.unusable {
            return Err(self.raise(fault(selector & !3)));
        } else {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        };
        if offset + 7 > limit {
            return Err(self.raise(fault(selector & !3)));
        }
        let at = base.wrapping_add(offset);
        Ok((self.load_system(at)?, at))
    }

    /// Sets the accessed bit of the descriptor at `at`.
    pub(crate) fn mark_accessed(&mut self, raw: u64, at: u64) -> Result {
        if raw >> 40 & 1 == 0 {
            self.store_system(at.wrapping_add(5), (raw >> 40) as u8 | 1)?;
        }
        Ok(())
    }

    /// Puts a descriptor into a segment register, unchecked.
    pub(crate) fn set_segment(&mut self, index: usize, value: Segment) {
        self.segments[index] = value;
        self.refresh_segment_bases();
    }

    /// What a segment register becomes in real and virtual-8086 mode.
    pub(crate) fn set_real_segment(&mut self, index: usize, selector: u16) {
        let mut value = self.segments[index];
        value.selector = selector;
        value.base = u64::from(selector) << 4;
        value.unusable = false;
        if self.system_flags & VM != 0 {
            value.limit = 0xffff;
            value.access = 0xf3;
        }
        self.set_segment(index, value);
    }

    /// Loads DS, ES, FS, GS or SS as MOV does.
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Result {
        if !self.is_protected() {
            self.set_real_segment(index, selector);
            return Ok(());
        }
        let stack = index == segment::SS;
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            let allowed = !stack || self.is_64_bit() && self.cpl < 3 && rpl == self.cpl;
            if !allowed {
                return Err(self.general_protection(0));
            }
            let access = if stack { u16::from(self.cpl) << 5 } else { 0 };
            self.set_segment(
                index,
                Segment {
                    selector,
                    base: 0,
                    limit: 0,
                    access,
                    unusable: true,
                },
            );
            return Ok(());
        }
        let (raw, at) = self.read_descriptor(selector, Exception::GeneralProtection)?;
        let value = parse(selector, raw);
        let code = selector & !3;
        let kind = value.access;
        let is_code = kind & access::CODE != 0;
        let fits = kind & access::S != 0
            && if stack {
                !is_code && kind & access::WRITABLE != 0 && rpl == self.cpl && dpl(kind) == self.cpl
            } else {
                let readable = !is_code || kind & access::WRITABLE != 0;
                let conforming = is_code && kind & access::EXPAND_DOWN != 0;
                readable && (conforming || rpl.max(self.cpl) <= dpl(kind))
            };
        if !fits {
            return Err(self.general_protection(code));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(if stack {
                Exception::StackFault(code)
            } else {
                Exception::SegmentNotPresent(code)
            }));
        }
        self.mark_accessed(raw, at)?;
        let access = kind | access::ACCESSED;
        self.set_segment(index, Segment { access, ..value });
        Ok(())
    }

    /// Checks an access of `bytes` at `offset` of a segment outside of 64-bit mode.
    pub(crate) fn check_segment(
        &mut self,
        index: usize,
        offset: u64,
        bytes: u64,
        write: bool,
    ) -> Result {
        let segment = self.segments[index];
        let last = offset + bytes.saturating_sub(1);
        let limit = u64::from(segment.limit);
        let kind = segment.access;
        let is_code = kind & access::CODE != 0;
        let mut allowed = !segment.unusable;
        if self.is_protected() {
            allowed &= if write {
                !is_code && kind & access::WRITABLE != 0
            } else {
                !is_code || kind & access::WRITABLE != 0
            };
        }
        allowed &= if !is_code && kind & access::EXPAND_DOWN != 0 {
            let top = if kind & access::BIG != 0 {
                0xffff_ffff
            } else {
                0xffff
            };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if allowed {
            return Ok(());
        }
        Err(self.raise(if index == segment::SS {
            Exception::StackFault(0)
        } else {
            Exception::GeneralProtection(0)
        }))
    }

    /// #GP(0) when a branch outside of 64-bit mode leaves its code segment.
    pub(crate) fn check_code_limit(&mut self, target: u64) -> Result {
        if target > u64::from(self.segments[segment::CS].limit) {
            return Err(self.general_protection(0));
        }
        Ok(())
    }
}

/// Works out a memory operand's address ahead of its instruction, where it wraps or is checked.
/// `imm`: bits 0-15 size, 16 write, 17 16-bit address, 18 check the segment (outside of 64-bit
/// mode: the address becomes linear), 19 add no base (LEA).
pub(crate) fn address(cpu: &mut Cpu, op: &Op) -> Result {
    let mask = if op.imm & ADDRESS_16 != 0 {
        0xffff
    } else {
        0xffff_ffff
    };
    let mut address = cpu.offset(op) & mask;
    if op.imm & ADDRESS_CHECK != 0 {
        let index = usize::from(op.seg - slot::SEGMENT);
        cpu.check_segment(index, address, op.imm & 0xffff, op.imm & ADDRESS_WRITE != 0)?;
        address = address.wrapping_add(cpu.slot(op.seg)) & 0xffff_ffff;
    }
    cpu.set_reg(slot::ADDRESS, address);
    Ok(())
}

/// See [`address`].
pub(crate) const ADDRESS_WRITE: u64 = 1 << 16;
/// See [`address`].
pub(crate) const ADDRESS_16: u64 = 1 << 17;
/// See [`address`].
pub(crate) const ADDRESS_CHECK: u64 = 1 << 18;

/// The index of a segment register.
pub(crate) fn index_of(register: Register) -> usize {
    match register {
        Register::ES => segment::ES,
        Register::CS => segment::CS,
        Register::SS => segment::SS,
        Register::FS => segment::FS,
        Register::GS => segment::GS,
        _ => segment::DS,
    }
}

/// MOV segment register.
pub(crate) fn mov_to(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let index = index_of(instruction.op0_register());
    if instruction.op0_register() == Register::CS {
        return Err(cpu.undefined());
    }
    let selector = match instruction.op1_kind() {
        OpKind::Memory => cpu.read::<u16>(op)?,
        _ => cpu.slot(op.src) as u16,
    };
    cpu.load_segment(index, selector)?;
    if index == segment::SS {
        cpu.shadow = true;
        cpu.watch.after_stack_load = true;
        cpu.budget = 0;
    }
    Ok(())
}

/// MOV from a segment register.
pub(crate) fn mov_from(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let selector = cpu.segments[index_of(instruction.op1_register())].selector;
    if instruction.op0_kind() == OpKind::Memory {
        return cpu.write(op, selector);
    }
    match instruction.op0_register().size() {
        2 => cpu.set_reg(op.dst, selector),
        4 => cpu.set_reg(op.dst, u32::from(selector)),
        _ => cpu.set_reg(op.dst, u64::from(selector)),
    }
    Ok(())
}

/// PUSH segment register.
pub(crate) fn push(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let selector = cpu.segments[index_of(instruction.op0_register())].selector;
    let size = instruction.stack_pointer_increment().unsigned_abs() as u64;
    cpu.push(size, selector.into())
}

/// POP segment register.
pub(crate) fn pop(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let index = index_of(instruction.op0_register());
    let size = instruction.stack_pointer_increment().unsigned_abs() as u64;
    let (selector, rsp) = cpu.peek(0, size)?;
    cpu.load_segment(index, selector as u16)?;
    cpu.set_stack_pointer(rsp);
    if index == segment::SS {
        cpu.shadow = true;
        cpu.watch.after_stack_load = true;
        cpu.budget = 0;
    }
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS.
pub(crate) fn load_far(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let index = match instruction.mnemonic() {
        Mnemonic::Lds => segment::DS,
        Mnemonic::Les => segment::ES,
        Mnemonic::Lfs => segment::FS,
        Mnemonic::Lgs => segment::GS,
        _ => segment::SS,
    };
    let at = cpu.ea(op);
    let size = instruction.op0_register().size() as u64;
    let offset = match size {
        2 => cpu.load::<u16>(at, op.seg)?.zero_extend(),
        4 => cpu.load::<u32>(at, op.seg)?.zero_extend(),
        _ => cpu.load::<u64>(at, op.seg)?,
    };
    let selector = cpu.load::<u16>(at.wrapping_add(size), op.seg)?;
    cpu.load_segment(index, selector)?;
    match size {
        2 => cpu.set_reg(op.dst, offset as u16),
        4 => cpu.set_reg(op.dst, offset as u32),
        _ => cpu.set_reg(op.dst, offset),
    }
    Ok(())
}

/// LAR, LSL, VERR, VERW.
pub(crate) fn inspect(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    if !cpu.is_protected() {
        return Err(cpu.undefined());
    }
    let mnemonic = instruction.mnemonic();
    let operand = instruction.op_count() - 1;
    let selector = match instruction.op_kind(operand) {
        OpKind::Memory => cpu.read::<u16>(op)?,
        _ => cpu.slot(op.src) as u16,
    };
    let found = inspect_selector(cpu, selector, mnemonic)?;
    cpu.flags = cpu.flags.with_zero(found.is_some());
    let Some(value) = found else {
        return Ok(());
    };
    if matches!(mnemonic, Mnemonic::Lar | Mnemonic::Lsl) {
        match instruction.op0_register().size() {
            2 => cpu.set_reg(op.dst, value as u16),
            4 => cpu.set_reg(op.dst, value),
            _ => cpu.set_reg(op.dst, u64::from(value)),
        }
    }
    Ok(())
}

fn inspect_selector(cpu: &mut Cpu, selector: u16, mnemonic: Mnemonic) -> Result<Option<u32>> {
    if selector & !3 == 0 {
        return Ok(None);
    }
    let limit = if selector & 4 == 0 {
        u32::from(cpu.gdtr.limit)
    } else if cpu.ldtr.unusable {
        return Ok(None);
    } else {
        cpu.ldtr.limit
    };
    if u32::from(selector | 7) > limit {
        return Ok(None);
    }
    let (raw, _) = cpu.read_descriptor(selector, Exception::GeneralProtection)?;
    let value = parse(selector, raw);
    let kind = value.access;
    let is_code = kind & access::CODE != 0;
    let user = kind & access::S != 0;
    let conforming = user && is_code && kind & access::EXPAND_DOWN != 0;
    let privileged = conforming || (selector & 3) as u8 <= dpl(kind) && cpu.cpl <= dpl(kind);
    let system_type = kind & 0xf;
    let fits = privileged
        && match mnemonic {
            Mnemonic::Verr => user && (!is_code || kind & access::WRITABLE != 0),
            Mnemonic::Verw => user && !is_code && kind & access::WRITABLE != 0,
            Mnemonic::Lar if cpu.is_long() => user || matches!(system_type, 2 | 9 | 11 | 12),
            Mnemonic::Lar => user || matches!(system_type, 1..=5 | 9 | 11 | 12),
            _ if cpu.is_long() => user || matches!(system_type, 2 | 9 | 11),
            _ => user || matches!(system_type, 1..=3 | 9 | 11),
        };
    Ok(fits.then_some(if mnemonic == Mnemonic::Lar {
        (raw >> 32) as u32 & 0x00ff_ff00
    } else {
        value.limit
    }))
}

/// ARPL.
pub(crate) fn arpl(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    if !cpu.is_protected() {
        return Err(cpu.undefined());
    }
    let rpl = cpu.slot(op.src) as u16 & 3;
    let adjust = |old: u16| {
        if old & 3 < rpl {
            (old & !3 | rpl, true)
        } else {
            (old, false)
        }
    };
    let changed = if instruction.op0_kind() == OpKind::Memory {
        cpu.modify(cpu.ea(op), op.seg, adjust)?
    } else {
        let (new, changed) = adjust(cpu.slot(op.dst) as u16);
        cpu.set_reg(op.dst, new);
        changed
    };
    cpu.flags = cpu.flags.with_zero(changed);
    Ok(())
}
