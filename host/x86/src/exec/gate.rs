//! Call gates, and the stacks of inner privileges (SDM vol. 3, 5.8).

use super::op::slot;
use super::segment::{access, dpl, parse};
use super::{Exception, Result};
use crate::cpu::Cpu;
use crate::mmu::is_canonical;
use crate::state::{Segment, segment};

/// What a far jump or call leads through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    Jump,
    Call,
}

/// A call gate.
#[derive(Debug, Clone, Copy)]
struct CallGate {
    selector: u16,
    offset: u64,
    /// Bytes of a pushed value.
    size: u64,
    /// Values that are copied from the outer stack.
    parameters: u64,
}

/// A system descriptor that a far pointer names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target {
    pub(crate) selector: u16,
    pub(crate) raw: u64,
    pub(crate) at: u64,
}

impl Segment {
    /// Do `bytes` at `offset` lie within it, outside of 64-bit mode?
    pub(crate) fn holds(&self, offset: u64, bytes: u64) -> bool {
        let last = offset + bytes.saturating_sub(1);
        let limit = u64::from(self.limit);
        let is_code = self.access & access::CODE != 0;
        if is_code || self.access & access::EXPAND_DOWN == 0 {
            return last <= limit;
        }
        let top = if self.access & access::BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        offset > limit && last <= top
    }

    /// What its stack pointers are cut to, outside of 64-bit mode.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.access & access::BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }
}

impl Cpu {
    /// A far jump or call by a gate or to a task.
    pub(crate) fn transfer_by_system(
        &mut self,
        target: Target,
        rpl: u8,
        transfer: Transfer,
    ) -> Result {
        let index = target.selector & !3;
        let kind = (target.raw >> 40) as u16;
        let long = self.is_long();
        let is_gate = match kind & 0xf {
            12 => true,
            4 | 5 | 1 | 9 => !long,
            // A busy task is refused below, by its type.
            _ => false,
        };
        if !is_gate || dpl(kind) < rpl.max(self.cpl) {
            return Err(self.general_protection(index));
        }
        if matches!(kind & 0xf, 1 | 9) {
            return self.switch_task(target.selector, transfer.into(), None);
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(index)));
        }
        if kind & 0xf == 5 {
            let task = (target.raw >> 16) as u16;
            return self.switch_task(task, transfer.into(), None);
        }
        let gate = self.call_gate(target, long)?;
        self.pass_call_gate(&gate, transfer)
    }

    fn call_gate(&mut self, target: Target, long: bool) -> Result<CallGate> {
        let raw = target.raw;
        let wide = raw >> 40 & 0xf == 12;
        let mut offset = raw & 0xffff;
        if wide {
            offset |= raw >> 32 & 0xffff_0000;
        }
        if long {
            let index = target.selector & !3;
            let last = u64::from(index) + 15;
            let table = if target.selector & 4 == 0 {
                u64::from(self.gdtr.limit)
            } else {
                u64::from(self.ldtr.limit)
            };
            if last > table {
                return Err(self.general_protection(index));
            }
            let high = self.load_system::<u64>(target.at.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return Err(self.general_protection(index));
            }
            offset |= high << 32;
        }
        Ok(CallGate {
            selector: (raw >> 16) as u16,
            offset,
            size: match (long, wide) {
                (true, _) => 8,
                (false, true) => 4,
                (false, false) => 2,
            },
            parameters: if long { 0 } else { raw >> 32 & 0x1f },
        })
    }

    fn pass_call_gate(&mut self, gate: &CallGate, transfer: Transfer) -> Result {
        let index = gate.selector & !3;
        if index == 0 {
            return Err(self.general_protection(0));
        }
        let (raw, at) = self.read_descriptor(gate.selector, Exception::GeneralProtection)?;
        let mut code = parse(gate.selector, raw);
        let kind = code.access;
        let is_code = kind & access::S != 0 && kind & access::CODE != 0;
        let conforming = kind & access::EXPAND_DOWN != 0;
        let long_fits = !self.is_long() || kind & (access::LONG | access::BIG) == access::LONG;
        let jumps_inwards = transfer == Transfer::Jump && !conforming && dpl(kind) != self.cpl;
        if !is_code || dpl(kind) > self.cpl || !long_fits || jumps_inwards {
            return Err(self.general_protection(index));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(index)));
        }
        let new_cpl = if conforming { self.cpl } else { dpl(kind) };
        code.selector = index | u16::from(new_cpl);
        code.access |= access::ACCESSED;
        let reachable = if self.is_long() {
            is_canonical(gate.offset)
        } else {
            gate.offset <= u64::from(code.limit)
        };
        if !reachable {
            return Err(self.general_protection(0));
        }
        if transfer == Transfer::Call && new_cpl < self.cpl {
            return self.call_inwards(gate, (code, raw, at), new_cpl);
        }
        if transfer == Transfer::Call {
            let rsp = self.rsp();
            let (cs, rip) = (self.segments[segment::CS].selector, self.rip);
            self.push(gate.size, cs.into())?;
            if let Err(abort) = self.push(gate.size, rip) {
                self.set_stack_pointer(rsp);
                return Err(abort);
            }
        }
        self.mark_accessed(raw, at)?;
        self.set_code_segment(code, new_cpl);
        self.rip = gate.offset;
        Ok(())
    }

    /// To an inner privilege, with its stack.
    fn call_inwards(
        &mut self,
        gate: &CallGate,
        (code, raw, at): (Segment, u64, u64),
        new_cpl: u8,
    ) -> Result {
        let mut frame = vec![u64::from(self.segments[segment::SS].selector), self.rsp()];
        for parameter in (0..gate.parameters).rev() {
            frame.push(self.peek(parameter * gate.size, gate.size)?.0);
        }
        frame.push(self.segments[segment::CS].selector.into());
        frame.push(self.rip);
        let (stack, top) = if self.is_long() {
            let top = self.load_task_stack(4 + 8 * u64::from(new_cpl))?;
            (Segment::null_stack(new_cpl), top)
        } else {
            self.inner_stack(new_cpl)?
        };
        let rsp = self.push_frame(&stack, (top, gate.size), &frame, new_cpl)?;
        self.mark_accessed(raw, at)?;
        self.segments[segment::SS] = stack;
        self.set_code_segment(code, new_cpl);
        if gate.size == 8 {
            self.set_reg(slot::RSP, rsp);
        } else {
            self.set_stack_pointer(rsp);
        }
        self.rip = gate.offset;
        self.budget = 0;
        Ok(())
    }

    /// Pushes `values` on a stack that is not the current one; the stack pointer below them. #SS where
    /// they do not fit, with the selector of a stack that was switched to.
    pub(crate) fn push_frame(
        &mut self,
        stack: &Segment,
        (top, size): (u64, u64),
        values: &[u64],
        cpl: u8,
    ) -> Result<u64> {
        let switched = stack.selector != self.segments[segment::SS].selector;
        let error = if switched { stack.selector & !3 } else { 0 };
        let mut at = top;
        if size == 8 {
            let lowest = top.wrapping_sub(8 * values.len() as u64);
            if !is_canonical(lowest) || !is_canonical(top.wrapping_sub(1)) {
                return Err(self.raise(Exception::StackFault(error)));
            }
        }
        for &value in values {
            at = at.wrapping_sub(size);
            let mut linear = at;
            if size != 8 {
                at &= stack.stack_mask();
                if stack.unusable || !stack.holds(at, size) {
                    return Err(self.raise(Exception::StackFault(error)));
                }
                linear = stack.base.wrapping_add(at) & 0xffff_ffff;
            }
            match size {
                _ if cpl == 3 => self.store_sized(linear, size, value)?,
                2 => self.store_system(linear, value as u16)?,
                4 => self.store_system(linear, value as u32)?,
                _ => self.store_system(linear, value)?,
            }
        }
        Ok(at)
    }

    /// The stack of an inner privilege, from the task's state.
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Result<(Segment, u64)> {
        let (selector, pointer) = self.load_task_stack_32(cpl)?;
        let index = selector & !3;
        if index == 0 {
            return Err(self.raise(Exception::InvalidTss(0)));
        }
        let (raw, at) = self.read_descriptor(selector, Exception::InvalidTss)?;
        let mut stack = parse(selector, raw);
        let kind = stack.access;
        let fits = kind & (access::S | access::CODE | access::WRITABLE)
            == access::S | access::WRITABLE
            && dpl(kind) == cpl
            && (selector & 3) as u8 == cpl;
        if !fits {
            return Err(self.raise(Exception::InvalidTss(index)));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::StackFault(index)));
        }
        self.mark_accessed(raw, at)?;
        stack.access |= access::ACCESSED;
        Ok((stack, pointer))
    }

    /// A stack pointer from the 64-bit task state segment.
    pub(crate) fn load_task_stack(&mut self, offset: u64) -> Result<u64> {
        if self.tr.unusable || offset + 7 > u64::from(self.tr.limit) {
            return Err(self.raise(Exception::InvalidTss(self.tr.selector & !3)));
        }
        self.load_system(self.tr.base.wrapping_add(offset))
    }

    /// Stack segment and pointer of a 16- or 32-bit task state segment.
    fn load_task_stack_32(&mut self, cpl: u8) -> Result<(u16, u64)> {
        let big = self.tr.access & 8 != 0;
        let (offset, size) = if big {
            (4 + 8 * u64::from(cpl), 6)
        } else {
            (2 + 4 * u64::from(cpl), 4)
        };
        if self.tr.unusable || offset + size - 1 > u64::from(self.tr.limit) {
            return Err(self.raise(Exception::InvalidTss(self.tr.selector & !3)));
        }
        let at = self.tr.base.wrapping_add(offset);
        if big {
            let pointer = self.load_system::<u32>(at)?;
            Ok((self.load_system::<u16>(at.wrapping_add(4))?, pointer.into()))
        } else {
            let pointer = self.load_system::<u16>(at)?;
            Ok((self.load_system::<u16>(at.wrapping_add(2))?, pointer.into()))
        }
    }
}

impl Segment {
    /// The stack segment that 64-bit mode gives an inner privilege.
    pub(crate) fn null_stack(cpl: u8) -> Self {
        Self {
            selector: cpl.into(),
            base: 0,
            limit: 0,
            access: u16::from(cpl) << 5,
            unusable: true,
        }
    }
}
