//! Transfers to another code segment: far jumps, calls and returns, SYSCALL and its kin.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::flags::{self, IF, RF, TF, VM};
use super::gate::{Target, Transfer};
use super::op::{Op, slot};
use super::segment::{access, dpl, parse};
use super::value::Value;
use super::{Exception, Result};
use crate::cpu::Cpu;
use crate::cpu::control::EFER_SCE;
use crate::mmu::is_canonical;
use crate::state::{Segment, segment};

impl Cpu {
    /// The code segment that a far return or IRET to `selector` enters, checked.
    pub(crate) fn check_return(&mut self, selector: u16) -> Result<(Segment, u64, u64)> {
        let index = selector & !3;
        if index == 0 {
            return Err(self.general_protection(0));
        }
        let rpl = (selector & 3) as u8;
        let (raw, at) = self.read_descriptor(selector, Exception::GeneralProtection)?;
        let mut code = parse(selector, raw);
        let kind = code.access;
        let is_code = kind & access::S != 0 && kind & access::CODE != 0;
        let conforming = kind & access::EXPAND_DOWN != 0;
        let level_fits = if conforming {
            dpl(kind) <= rpl
        } else {
            dpl(kind) == rpl
        };
        let both = self.is_long() && kind & access::LONG != 0 && kind & access::BIG != 0;
        if !is_code || rpl < self.cpl || !level_fits || both {
            return Err(self.general_protection(index));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(index)));
        }
        code.access |= access::ACCESSED;
        Ok((code, raw, at))
    }

    /// The stack segment that a return to privilege `rpl` takes, checked.
    pub(crate) fn check_return_stack(
        &mut self,
        selector: u16,
        rpl: u8,
        to_64bit: bool,
    ) -> Result<Segment> {
        let index = selector & !3;
        if index == 0 {
            if to_64bit && rpl < 3 && (selector & 3) as u8 == rpl {
                return Ok(Segment {
                    selector,
                    base: 0,
                    limit: 0,
                    access: u16::from(rpl) << 5,
                    unusable: true,
                });
            }
            return Err(self.general_protection(0));
        }
        let (raw, at) = self.read_descriptor(selector, Exception::GeneralProtection)?;
        let mut stack = parse(selector, raw);
        let kind = stack.access;
        let fits = kind & (access::S | access::CODE | access::WRITABLE)
            == access::S | access::WRITABLE
            && dpl(kind) == rpl
            && (selector & 3) as u8 == rpl;
        if !fits {
            return Err(self.general_protection(index));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::StackFault(index)));
        }
        self.mark_accessed(raw, at)?;
        stack.access |= access::ACCESSED;
        Ok(stack)
    }

    /// After a return to an outer privilege: data segments of the inner one become null.
    pub(crate) fn drop_inner_segments(&mut self) {
        for index in [segment::ES, segment::DS, segment::FS, segment::GS] {
            let kind = self.segments[index].access;
            let conforming = kind & access::CODE != 0 && kind & access::EXPAND_DOWN != 0;
            if !self.segments[index].unusable && !conforming && dpl(kind) < self.cpl {
                self.segments[index] = Segment {
                    unusable: true,
                    ..Segment::default()
                };
            }
        }
        self.refresh_segment_bases();
    }

    /// The code segment that a far jump or call to `selector` enters, checked; or the gate or task
    /// that it leads through.
    fn check_transfer(&mut self, selector: u16) -> Result<std::result::Result<Segment, Target>> {
        let index = selector & !3;
        if index == 0 {
            return Err(self.general_protection(0));
        }
        let rpl = (selector & 3) as u8;
        let (raw, at) = self.read_descriptor(selector, Exception::GeneralProtection)?;
        let mut code = parse(index | u16::from(self.cpl), raw);
        let kind = code.access;
        if kind & access::S == 0 {
            return Ok(Err(Target { selector, raw, at }));
        }
        let is_code = kind & access::S != 0 && kind & access::CODE != 0;
        let conforming = kind & access::EXPAND_DOWN != 0;
        let level_fits = if conforming {
            dpl(kind) <= self.cpl
        } else {
            rpl <= self.cpl && dpl(kind) == self.cpl
        };
        let both = self.is_long() && kind & access::LONG != 0 && kind & access::BIG != 0;
        if !is_code || !level_fits || both {
            return Err(self.general_protection(index));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(index)));
        }
        self.mark_accessed(raw, at)?;
        code.access |= access::ACCESSED;
        Ok(Ok(code))
    }

    fn check_far_target(&mut self, code: &Segment, target: u64) -> Result {
        let long = self.is_long() && code.access & access::LONG != 0;
        if long && !is_canonical(target) || !long && target > u64::from(code.limit) {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// A flat code or stack segment as SYSCALL and its kin load it.
    fn flat(selector: u16, access: u16) -> Segment {
        Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            access,
            unusable: false,
        }
    }
}

const FLAT_CODE_64: u16 = 0xa09b;
const FLAT_CODE_32: u16 = 0xc09b;
const FLAT_DATA: u16 = 0xc093;
const USER: u16 = 3 << 5;

/// Selector, offset and operand size of a far pointer operand.
fn far_pointer(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result<(u16, u64, u64)> {
    match instruction.op0_kind() {
        OpKind::FarBranch16 => Ok((
            instruction.far_branch_selector(),
            instruction.far_branch16().into(),
            2,
        )),
        OpKind::FarBranch32 => Ok((
            instruction.far_branch_selector(),
            instruction.far_branch32().into(),
            4,
        )),
        _ => {
            let size = instruction.memory_size().size() as u64 - 2;
            let at = cpu.ea(op);
            let offset = match size {
                2 => cpu.load::<u16>(at, op.seg)?.zero_extend(),
                4 => cpu.load::<u32>(at, op.seg)?.zero_extend(),
                _ => cpu.load::<u64>(at, op.seg)?,
            };
            let selector = cpu.load::<u16>(at.wrapping_add(size), op.seg)?;
            Ok((selector, offset, size))
        }
    }
}

/// JMP far.
pub(crate) fn jmp(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let (selector, offset, _) = far_pointer(cpu, op, instruction)?;
    if !cpu.is_protected() {
        cpu.set_real_segment(segment::CS, selector);
        cpu.rip = offset;
        return Ok(());
    }
    let code = match cpu.check_transfer(selector)? {
        Ok(code) => code,
        Err(target) => {
            return cpu.transfer_by_system(target, (selector & 3) as u8, Transfer::Jump);
        }
    };
    cpu.check_far_target(&code, offset)?;
    let cpl = cpu.cpl;
    cpu.set_code_segment(code, cpl);
    cpu.rip = offset;
    Ok(())
}

/// CALL far.
pub(crate) fn call(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let (selector, offset, size) = far_pointer(cpu, op, instruction)?;
    let old = u64::from(cpu.segments[segment::CS].selector);
    let rsp = cpu.rsp();
    let push_both = |cpu: &mut Cpu| {
        cpu.push(size, old)?;
        let rip = cpu.rip;
        cpu.push(size, rip)
            .inspect_err(|_| cpu.set_stack_pointer(rsp))
    };
    if !cpu.is_protected() {
        push_both(cpu)?;
        cpu.set_real_segment(segment::CS, selector);
        cpu.rip = offset;
        return Ok(());
    }
    let code = match cpu.check_transfer(selector)? {
        Ok(code) => code,
        Err(target) => {
            return cpu.transfer_by_system(target, (selector & 3) as u8, Transfer::Call);
        }
    };
    cpu.check_far_target(&code, offset)?;
    push_both(cpu)?;
    let cpl = cpu.cpl;
    cpu.set_code_segment(code, cpl);
    cpu.rip = offset;
    Ok(())
}

/// RET far.
pub(crate) fn ret(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let dropped = if instruction.op_count() == 1 {
        u64::from(instruction.immediate16())
    } else {
        0
    };
    let size = (u64::from(instruction.stack_pointer_increment().unsigned_abs()) - dropped) / 2;
    let (target, _) = cpu.peek(0, size)?;
    let (selector, rsp) = cpu.peek(size, size)?;
    let selector = selector as u16;
    if !cpu.is_protected() {
        cpu.set_stack_pointer(rsp.wrapping_add(dropped));
        cpu.set_real_segment(segment::CS, selector);
        cpu.rip = target;
        return Ok(());
    }
    let (code, raw, at) = cpu.check_return(selector)?;
    cpu.check_far_target(&code, target)?;
    let rpl = (selector & 3) as u8;
    let to_64bit = cpu.is_long() && code.access & access::LONG != 0;
    if rpl == cpu.cpl {
        cpu.mark_accessed(raw, at)?;
        cpu.set_stack_pointer(rsp.wrapping_add(dropped));
        cpu.set_code_segment(code, rpl);
        cpu.rip = target;
        return Ok(());
    }
    let (pointer, _) = cpu.peek(2 * size + dropped, size)?;
    let (stack, _) = cpu.peek(3 * size + dropped, size)?;
    let stack = cpu.check_return_stack(stack as u16, rpl, to_64bit)?;
    cpu.mark_accessed(raw, at)?;
    cpu.segments[segment::SS] = stack;
    cpu.set_code_segment(code, rpl);
    cpu.set_stack_pointer(pointer.wrapping_add(dropped));
    cpu.drop_inner_segments();
    cpu.rip = target;
    Ok(())
}

/// SYSCALL, SYSRET, SYSENTER, SYSEXIT.
pub(crate) fn system_call(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    match instruction.mnemonic() {
        Mnemonic::Syscall => syscall(cpu)?,
        Mnemonic::Sysret | Mnemonic::Sysretq => sysret(cpu, instruction.mnemonic())?,
        // What the baselines' processor, one of AMD's, lacks in IA-32e mode.
        _ if cpu.is_long() => return Err(cpu.undefined()),
        Mnemonic::Sysenter => return sysenter(cpu),
        _ => return sysexit(cpu),
    }
    // Of these two, the flag counts that they leave.
    cpu.watch.step = cpu.system_flags & TF != 0;
    Ok(())
}

fn syscall(cpu: &mut Cpu) -> Result {
    if cpu.msrs.efer & EFER_SCE == 0 || !cpu.is_protected() {
        return Err(cpu.undefined());
    }
    let star = cpu.msrs.star;
    let selector = (star >> 32) as u16 & !3;
    let stack = (star >> 32) as u16;
    if cpu.is_long() {
        let rflags = cpu.rflags() & !RF;
        let target = if cpu.is_64_bit() {
            cpu.msrs.lstar
        } else {
            cpu.msrs.cstar
        };
        cpu.set_reg(slot::RCX, cpu.rip);
        cpu.set_reg(11, rflags);
        cpu.rip = target;
        cpu.set_rflags(rflags & !cpu.msrs.sfmask);
        cpu.segments[segment::SS] = Cpu::flat(stack.wrapping_add(8), FLAT_DATA);
        cpu.set_code_segment(Cpu::flat(selector, FLAT_CODE_64), 0);
    } else {
        cpu.set_reg(slot::RCX, cpu.rip as u32);
        cpu.rip = star & 0xffff_ffff;
        cpu.system_flags &= !(IF | RF | VM);
        cpu.segments[segment::SS] = Cpu::flat(stack.wrapping_add(8), FLAT_DATA);
        cpu.set_code_segment(Cpu::flat(selector, FLAT_CODE_32), 0);
    }
    Ok(())
}

fn sysret(cpu: &mut Cpu, mnemonic: Mnemonic) -> Result {
    if cpu.msrs.efer & EFER_SCE == 0 {
        return Err(cpu.undefined());
    }
    if cpu.cpl != 0 || !cpu.is_protected() {
        return Err(cpu.general_protection(0));
    }
    let base = (cpu.msrs.star >> 48) as u16 | 3;
    let stack = Cpu::flat(base.wrapping_add(8), FLAT_DATA | USER);
    let rcx = cpu.slot(slot::RCX);
    if cpu.is_long() {
        let rflags = cpu.slot(11) & flags::ALL & !(RF | VM);
        if mnemonic == Mnemonic::Sysretq {
            // An address that is not canonical faults in user mode, at its first fetch.
            cpu.rip = rcx;
            cpu.set_rflags(rflags);
            cpu.segments[segment::SS] = stack;
            cpu.set_code_segment(Cpu::flat(base.wrapping_add(16), FLAT_CODE_64 | USER), 3);
            return Ok(());
        }
        cpu.set_rflags(rflags);
    } else {
        cpu.system_flags |= IF;
        cpu.budget = 0;
    }
    cpu.rip = rcx & 0xffff_ffff;
    cpu.segments[segment::SS] = stack;
    cpu.set_code_segment(Cpu::flat(base, FLAT_CODE_32 | USER), 3);
    Ok(())
}

fn sysenter(cpu: &mut Cpu) -> Result {
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.is_protected() || selector == 0 {
        return Err(cpu.general_protection(0));
    }
    cpu.system_flags &= !(VM | IF | RF);
    cpu.segments[segment::SS] = Cpu::flat(selector.wrapping_add(8), FLAT_DATA);
    cpu.set_code_segment(Cpu::flat(selector, FLAT_CODE_32), 0);
    cpu.set_reg(slot::RSP, cpu.msrs.sysenter_esp as u32);
    cpu.rip = cpu.msrs.sysenter_eip & 0xffff_ffff;
    Ok(())
}

fn sysexit(cpu: &mut Cpu) -> Result {
    let base = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.is_protected() || cpu.cpl != 0 || base == 0 {
        return Err(cpu.general_protection(0));
    }
    let (ecx, edx) = (cpu.slot(slot::RCX) as u32, cpu.slot(slot::RDX) as u32);
    let (code, stack) = (base.wrapping_add(16) | 3, base.wrapping_add(24) | 3);
    cpu.segments[segment::SS] = Cpu::flat(stack, FLAT_DATA | USER);
    cpu.set_code_segment(Cpu::flat(code, FLAT_CODE_32 | USER), 3);
    cpu.set_reg(slot::RSP, ecx);
    cpu.rip = edx.into();
    Ok(())
}
