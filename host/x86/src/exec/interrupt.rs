//! Delivery of interrupts and exceptions, and IRET (SDM vol. 3, chapter 6).

use iced_x86::{Code, Instruction};

use super::flags::{self, AC, Flags, IF, NT, RF, TF, VM};
use super::op::{Op, slot};
use super::segment::{access, dpl, parse};
use super::task::Switch;
use super::{Exception, Result};
use crate::cpu::{AbortReason, Cpu};
use crate::mmu::is_canonical;
use crate::state::{Segment, segment};

/// Where an interrupt comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A device, another processor, or an exception.
    Event,
    /// An exception that is a fault: RF is set in the saved flags.
    Fault,
    /// INT n, INT3, INTO: the gate's privilege level is checked.
    Software,
}

impl Cpu {
    /// RFLAGS, complete.
    pub(crate) fn rflags(&self) -> u64 {
        self.system_flags | self.flags.to_rflags() | 2
    }

    /// Replaces all of RFLAGS.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.flags = Flags::from_rflags(value);
        self.system_flags = value & flags::ALL & !flags::ARITHMETIC;
        self.refresh_watch();
        self.budget = 0;
    }

    /// Delivers `vector`; `Cpu::rip` is where the handler will return to.
    pub(crate) fn interrupt(&mut self, vector: u8, source: Source, error: Option<u32>) -> Result {
        self.vectors[usize::from(vector)] += 1;
        if !self.is_protected() && self.system_flags & VM == 0 {
            return self.interrupt_real(vector);
        }
        let outcome = self.interrupt_protected(vector, source, error);
        if outcome.is_ok() {
            // The handler is no instruction that is stepped over.
            self.watch.step = false;
        } else if source != Source::Software
            && let AbortReason::Exception(exception) = &mut self.abort
        {
            exception.mark_external();
        }
        outcome
    }

    fn interrupt_protected(&mut self, vector: u8, source: Source, error: Option<u32>) -> Result {
        let size = if self.is_long() { 16 } else { 8 };
        let offset = u64::from(vector) * size;
        let selector_error = u16::from(vector) << 3 | 2;
        if offset + size - 1 > u64::from(self.idtr.limit) {
            return Err(self.general_protection(selector_error));
        }
        let at = self.idtr.base.wrapping_add(offset);
        let low = self.load_system::<u64>(at)?;
        let high = if self.is_long() {
            self.load_system::<u64>(at.wrapping_add(8))?
        } else {
            0
        };
        let gate = Gate::parse(low, high, self.is_long());
        let Some(gate) = gate else {
            return Err(self.general_protection(selector_error));
        };
        let from_v86 = self.system_flags & VM != 0;
        if source == Source::Software && gate.dpl < self.cpl {
            return Err(self.general_protection(selector_error));
        }
        if !gate.present {
            return Err(self.raise(Exception::SegmentNotPresent(selector_error)));
        }
        if gate.task {
            return self.switch_task(gate.selector, Switch::Nested, error);
        }
        if gate.selector & !3 == 0 {
            return Err(self.general_protection(0));
        }
        let (raw, at) = self.read_descriptor(gate.selector, Exception::GeneralProtection)?;
        let mut code = parse(gate.selector, raw);
        let index = gate.selector & !3;
        let kind = code.access;
        let is_code = kind & access::S != 0 && kind & access::CODE != 0;
        let long_fits = !self.is_long() || kind & access::LONG != 0 && kind & access::BIG == 0;
        if !is_code || dpl(kind) > self.cpl || !long_fits {
            return Err(self.general_protection(index));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(index)));
        }
        let conforming = kind & access::EXPAND_DOWN != 0;
        let new_cpl = if conforming { self.cpl } else { dpl(kind) };
        if from_v86 && new_cpl != 0 {
            return Err(self.general_protection(index));
        }
        self.mark_accessed(raw, at)?;
        code.selector = gate.selector & !3 | u16::from(new_cpl);
        code.access |= access::ACCESSED;
        let mut pushed_flags = self.rflags();
        if source == Source::Fault {
            pushed_flags |= RF;
        }
        if self.is_long() {
            self.enter_long(&gate, code, new_cpl, (pushed_flags, error))?;
        } else {
            self.enter_protected(&gate, code, new_cpl, (pushed_flags, error))?;
        }
        self.system_flags &= !(TF | NT | RF | VM);
        if gate.interrupt {
            self.system_flags &= !IF;
        }
        self.rip = gate.offset;
        self.budget = 0;
        Ok(())
    }

    fn enter_long(
        &mut self,
        gate: &Gate,
        code: Segment,
        new_cpl: u8,
        (rflags, error): (u64, Option<u32>),
    ) -> Result {
        let outer = new_cpl != self.cpl;
        let stack = if gate.stack != 0 {
            self.load_task_stack(28 + 8 * u64::from(gate.stack))?
        } else if outer {
            self.load_task_stack(4 + 8 * u64::from(new_cpl))?
        } else {
            self.rsp()
        };
        if !is_canonical(gate.offset) {
            return Err(self.general_protection(0));
        }
        let mut frame = vec![
            u64::from(self.segments[segment::SS].selector),
            self.rsp(),
            rflags,
            u64::from(self.segments[segment::CS].selector),
            self.rip,
        ];
        frame.extend(error.map(u64::from));
        let new_stack = if outer {
            Segment::null_stack(new_cpl)
        } else {
            self.segments[segment::SS]
        };
        let at = self.push_frame(&new_stack, (stack & !15, 8), &frame, new_cpl)?;
        self.segments[segment::SS] = new_stack;
        self.set_reg(slot::RSP, at);
        self.set_code_segment(code, new_cpl);
        Ok(())
    }

    fn enter_protected(
        &mut self,
        gate: &Gate,
        code: Segment,
        new_cpl: u8,
        (rflags, error): (u64, Option<u32>),
    ) -> Result {
        let from_v86 = self.system_flags & VM != 0;
        let outer = new_cpl != self.cpl || from_v86;
        let (mut stack_segment, mut stack) = (self.segments[segment::SS], self.rsp());
        if outer {
            (stack_segment, stack) = self.inner_stack(new_cpl)?;
        }
        if gate.offset > u64::from(code.limit) {
            return Err(self.general_protection(0));
        }
        let selector = |index: usize| Some(u64::from(self.segments[index].selector));
        let v86 = |index: usize| if from_v86 { selector(index) } else { None };
        let frame = [
            v86(segment::GS),
            v86(segment::FS),
            v86(segment::DS),
            v86(segment::ES),
            if outer { selector(segment::SS) } else { None },
            outer.then(|| self.rsp()),
            Some(rflags),
            selector(segment::CS),
            Some(self.rip),
            error.map(u64::from),
        ];
        let frame: Vec<u64> = frame.into_iter().flatten().collect();
        let at = self.push_frame(&stack_segment, (stack, gate.size), &frame, new_cpl)?;
        if from_v86 {
            for index in [segment::ES, segment::DS, segment::FS, segment::GS] {
                self.segments[index] = Segment {
                    unusable: true,
                    ..Segment::default()
                };
            }
        }
        self.system_flags &= !VM;
        self.segments[segment::SS] = stack_segment;
        self.set_code_segment(code, new_cpl);
        self.set_stack_pointer(at);
        Ok(())
    }

    fn interrupt_real(&mut self, vector: u8) -> Result {
        let offset = u64::from(vector) * 4;
        if offset + 3 > u64::from(self.idtr.limit) {
            return Err(self.general_protection(0));
        }
        let target = self.load_system::<u32>(self.idtr.base.wrapping_add(offset))?;
        let (rflags, cs, ip) = (self.rflags(), self.segments[segment::CS].selector, self.rip);
        let rsp = self.rsp();
        for value in [rflags, cs.into(), ip] {
            if let Err(abort) = self.push(2, value & 0xffff) {
                self.set_stack_pointer(rsp);
                return Err(abort);
            }
        }
        self.system_flags &= !(IF | TF | AC | RF);
        self.set_real_segment(segment::CS, (target >> 16) as u16);
        self.rip = u64::from(target & 0xffff);
        self.budget = 0;
        Ok(())
    }
}

/// An interrupt, trap or task gate.
struct Gate {
    selector: u16,
    offset: u64,
    dpl: u8,
    present: bool,
    /// Clears IF.
    interrupt: bool,
    /// Switches to the task that the selector names.
    task: bool,
    /// Bytes of a pushed value.
    size: u64,
    /// Interrupt stack table entry, 0 for none.
    stack: u8,
}

impl Gate {
    fn parse(low: u64, high: u64, long: bool) -> Option<Self> {
        let kind = low >> 40 & 0x1f;
        let size = match (kind, long) {
            (0xe | 0xf, true) => 8,
            (0xe | 0xf, false) => 4,
            (6 | 7, false) => 2,
            (5, false) => 0,
            _ => return None,
        };
        let offset = low & 0xffff
            | if size == 2 {
                0
            } else {
                low >> 32 & 0xffff_0000
            }
            | high << 32;
        Some(Self {
            selector: (low >> 16) as u16,
            offset,
            dpl: (low >> 45 & 3) as u8,
            present: low >> 47 & 1 != 0,
            interrupt: kind & 1 == 0,
            task: kind == 5,
            size,
            stack: if long { (low >> 32 & 7) as u8 } else { 0 },
        })
    }
}

/// INT n, INT3, INT1, INTO.
pub(crate) fn int(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let vector = match instruction.code() {
        Code::Int3 => 3,
        Code::Int1 => 1,
        Code::Into => {
            if !cpu.flags.overflow() {
                return Ok(());
            }
            4
        }
        _ => instruction.immediate8(),
    };
    let source = if instruction.code() == Code::Int1 {
        Source::Event
    } else {
        Source::Software
    };
    if cpu.system_flags & VM != 0
        && cpu.system_flags & flags::IOPL != flags::IOPL
        && matches!(instruction.code(), Code::Int_imm8)
    {
        return Err(cpu.general_protection(0));
    }
    cpu.software_interrupt(vector, source)
}

/// IRET.
pub(crate) fn iret(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let size = match instruction.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        _ => 8,
    };
    if !cpu.is_protected() {
        if cpu.system_flags & VM != 0 && cpu.system_flags & flags::IOPL != flags::IOPL {
            return Err(cpu.general_protection(0));
        }
        let (ip, _) = cpu.peek(0, size)?;
        let (cs, _) = cpu.peek(size, size)?;
        let (rflags, rsp) = cpu.peek(2 * size, size)?;
        cpu.set_stack_pointer(rsp);
        cpu.set_real_segment(segment::CS, cs as u16);
        cpu.rip = ip & 0xffff_ffff;
        let fixed = VM
            | flags::VIF
            | flags::VIP
            | if cpu.system_flags & VM != 0 {
                flags::IOPL
            } else {
                0
            };
        restore_flags(cpu, rflags, size, fixed);
        return Ok(());
    }
    if cpu.system_flags & NT != 0 {
        if cpu.is_long() {
            return Err(cpu.general_protection(0));
        }
        return cpu.return_from_task();
    }
    let (rip, _) = cpu.peek(0, size)?;
    let (cs, _) = cpu.peek(size, size)?;
    let (rflags, after) = cpu.peek(2 * size, size)?;
    if !cpu.is_long() && rflags & VM != 0 && size == 4 && cpu.cpl == 0 {
        return iret_to_v86(cpu, rip, cs as u16, rflags);
    }
    let selector = cs as u16;
    let rpl = (selector & 3) as u8;
    let (code, raw, at) = cpu.check_return(selector)?;
    let outer = rpl > cpu.cpl;
    let to_long = code.access & access::LONG != 0 && cpu.is_long();
    if to_long && !is_canonical(rip) || !to_long && rip > u64::from(code.limit) {
        return Err(cpu.general_protection(0));
    }
    let mut stack = None;
    let mut rsp = after;
    if outer || cpu.is_64_bit() {
        let (pointer, _) = cpu.peek(3 * size, size)?;
        let (selector, _) = cpu.peek(4 * size, size)?;
        let selector = selector as u16;
        stack = Some(cpu.check_return_stack(selector, rpl, to_long)?);
        rsp = pointer;
    }
    cpu.mark_accessed(raw, at)?;
    let old_cpl = cpu.cpl;
    // What may change depends on the privilege that is left.
    let mut fixed = flags::VIF | flags::VIP | VM;
    if old_cpl > 0 {
        fixed |= flags::IOPL;
    }
    if u64::from(old_cpl) > (cpu.system_flags & flags::IOPL) >> 12 {
        fixed |= IF;
    }
    if old_cpl == 0 {
        fixed &= !(flags::VIF | flags::VIP);
    }
    if let Some(stack) = stack {
        cpu.segments[segment::SS] = stack;
    }
    cpu.set_code_segment(code, rpl);
    if stack.is_some() && size == 8 {
        cpu.set_reg(slot::RSP, rsp);
    } else {
        cpu.set_stack_pointer(rsp & cpu.stack_mask());
    }
    if outer {
        cpu.drop_inner_segments();
    }
    cpu.rip = rip;
    restore_flags(cpu, rflags, size, fixed);
    cpu.unmask_nmi();
    Ok(())
}

fn restore_flags(cpu: &mut Cpu, rflags: u64, size: u64, fixed: u64) {
    let mut kept = fixed | !flags::ALL;
    if size == 2 {
        kept |= !0xffff;
    }
    let value = cpu.rflags() & kept | rflags & !kept;
    cpu.set_rflags(value);
    cpu.unmask_nmi();
}

fn iret_to_v86(cpu: &mut Cpu, rip: u64, cs: u16, rflags: u64) -> Result {
    let mut values = [0; 6];
    for (index, value) in values.iter_mut().enumerate() {
        (*value, _) = cpu.peek(12 + 4 * index as u64, 4)?;
    }
    cpu.set_rflags(rflags | VM);
    let [rsp, ss, es, ds, fs, gs] = values;
    for (index, selector) in [
        (segment::SS, ss),
        (segment::ES, es),
        (segment::DS, ds),
        (segment::FS, fs),
        (segment::GS, gs),
        (segment::CS, cs.into()),
    ] {
        cpu.set_real_segment(index, selector as u16);
    }
    let code = cpu.segments[segment::CS];
    cpu.set_code_segment(code, 3);
    cpu.set_reg(slot::RSP, rsp as u32);
    cpu.rip = rip & 0xffff;
    cpu.unmask_nmi();
    Ok(())
}
