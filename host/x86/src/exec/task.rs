//! Task switches by the processor, outside of IA-32e mode (SDM vol. 3, chapter 7).

use super::flags::{self, NT, VM};
use super::gate::Transfer;
use super::segment::{access, dpl, parse};
use super::{Exception, Result};
use crate::cpu::Cpu;
use crate::cpu::control::{CR0_PG, CR0_TS};
use crate::state::{Segment, segment};

/// What switches tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Switch {
    Jump,
    /// The new task is nested in the old one: CALL, an interrupt or an exception.
    Nested,
    /// IRET from a nested task.
    Return,
}

impl From<Transfer> for Switch {
    fn from(transfer: Transfer) -> Self {
        match transfer {
            Transfer::Jump => Self::Jump,
            Transfer::Call => Self::Nested,
        }
    }
}

/// Where a task state segment of a size has what (SDM vol. 3, 7.2.1 and 7.6).
struct Layout {
    /// Bytes of a register.
    size: u64,
    /// Least limit.
    limit: u32,
    cr3: Option<u64>,
    eip: u64,
    eflags: u64,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    registers: u64,
    /// ES, CS, SS, DS, FS, GS: so many, each as wide as a register.
    segments: u64,
    segment_count: usize,
    ldt: u64,
    /// Bit 0: trap when the task is entered.
    trap: Option<u64>,
}

const LAYOUT_32: Layout = Layout {
    size: 4,
    limit: 0x67,
    cr3: Some(0x1c),
    eip: 0x20,
    eflags: 0x24,
    registers: 0x28,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
    trap: Some(0x64),
};

const LAYOUT_16: Layout = Layout {
    size: 2,
    limit: 0x2b,
    cr3: None,
    eip: 0x0e,
    eflags: 0x10,
    registers: 0x12,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2a,
    trap: None,
};

fn layout(access: u16) -> &'static Layout {
    if access & 8 != 0 {
        &LAYOUT_32
    } else {
        &LAYOUT_16
    }
}

/// A task as its state segment holds it.
struct Task {
    cr3: u64,
    eip: u64,
    eflags: u64,
    registers: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    traps: bool,
}

impl Cpu {
    /// Switches to the task of a state segment's `selector`; `error`: what its stack gets.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        switch: Switch,
        error: Option<u32>,
    ) -> Result {
        let (task, raw, at) = self.check_task(selector, switch)?;
        let new = layout(task.access);
        let loaded = self.load_task(&task, new)?;
        let old = layout(self.tr.access);
        // What is touched below can be written, so that nothing is left half done.
        let old_base = self.tr.base;
        self.load_system::<u16>(old_base)?;
        self.save_task(old, switch)?;
        if switch != Switch::Nested {
            self.set_busy(self.tr.selector, false)?;
        }
        if switch == Switch::Nested {
            self.store_system(task.base, self.tr.selector)?;
        }
        if switch != Switch::Return {
            self.store_system(at.wrapping_add(5), (raw >> 40) as u8 | 2)?;
        }
        self.tr = Segment {
            access: task.access | 2,
            ..task
        };
        self.enter_task(&loaded, new, switch)?;
        if let Some(error) = error {
            self.task_entered = true;
            self.push(new.size, error.into())?;
            self.task_entered = false;
        }
        if loaded.traps {
            self.watch.step = false;
            self.watch.met |= 1 << 15;
        }
        Ok(())
    }

    /// The state segment of a task, with its descriptor and where that is.
    fn check_task(&mut self, selector: u16, switch: Switch) -> Result<(Segment, u64, u64)> {
        let fault = match switch {
            Switch::Return => Exception::InvalidTss,
            _ => Exception::GeneralProtection,
        };
        let index = selector & !3;
        if selector & 4 != 0 || index == 0 {
            return Err(self.raise(fault(index)));
        }
        let (raw, at) = self.read_descriptor(selector, fault)?;
        let task = parse(selector, raw);
        let busy = if switch == Switch::Return { 2 } else { 0 };
        if task.access & 0x17 != 1 | busy {
            return Err(self.raise(fault(index)));
        }
        if task.access & access::PRESENT == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(index)));
        }
        if task.limit < layout(task.access).limit {
            return Err(self.raise(Exception::InvalidTss(index)));
        }
        Ok((task, raw, at))
    }

    fn load_task(&mut self, task: &Segment, layout: &Layout) -> Result<Task> {
        let base = task.base;
        let load = |cpu: &mut Self, at: u64| -> Result<u64> {
            let at = base.wrapping_add(at) & 0xffff_ffff;
            Ok(if layout.size == 4 {
                cpu.load_system::<u32>(at)?.into()
            } else {
                cpu.load_system::<u16>(at)?.into()
            })
        };
        let mut loaded = Task {
            cr3: match layout.cr3 {
                Some(at) => load(self, at)?,
                None => self.cr3,
            },
            eip: load(self, layout.eip)?,
            eflags: load(self, layout.eflags)?,
            registers: [0; 8],
            segments: [0; 6],
            ldt: load(self, layout.ldt)? as u16,
            traps: match layout.trap {
                Some(at) => load(self, at)? & 1 != 0,
                None => false,
            },
        };
        for (index, register) in loaded.registers.iter_mut().enumerate() {
            *register = load(self, layout.registers + index as u64 * layout.size)?;
            if layout.size == 2 {
                *register |= 0xffff_0000;
            }
        }
        for index in 0..layout.segment_count {
            let at = layout.segments + index as u64 * layout.size;
            loaded.segments[index] = load(self, at)? as u16;
        }
        Ok(loaded)
    }

    /// Saves the state of the task that is left.
    fn save_task(&mut self, layout: &Layout, switch: Switch) -> Result {
        let base = self.tr.base;
        let mut eflags = self.rflags();
        if switch == Switch::Return {
            eflags &= !NT;
        }
        let mut values = vec![(layout.eip, self.rip), (layout.eflags, eflags)];
        for index in 0..8u64 {
            let at = layout.registers + index * layout.size;
            values.push((at, self.slot(index as u8)));
        }
        for (at, value) in values {
            let at = base.wrapping_add(at) & 0xffff_ffff;
            if layout.size == 4 {
                self.store_system(at, value as u32)?;
            } else {
                self.store_system(at, value as u16)?;
            }
        }
        for index in 0..layout.segment_count {
            let at = base.wrapping_add(layout.segments + index as u64 * layout.size) & 0xffff_ffff;
            self.store_system(at, self.segments[index].selector)?;
        }
        Ok(())
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> Result {
        let (raw, at) = self.read_descriptor(selector, Exception::InvalidTss)?;
        let kind = (raw >> 40) as u8 & !2 | u8::from(busy) << 1;
        self.store_system(at.wrapping_add(5), kind)
    }

    /// Takes over the new task's state. What it refuses is the new task's to answer for.
    fn enter_task(&mut self, task: &Task, layout: &Layout, switch: Switch) -> Result {
        self.task_entered = true;
        self.cr0 |= CR0_TS;
        for (index, value) in task.registers.iter().enumerate() {
            self.set_reg(index as u8, *value as u32);
        }
        self.rip = task.eip;
        let mut eflags = task.eflags;
        if switch == Switch::Nested {
            eflags |= NT;
        }
        if layout.size == 2 {
            eflags &= 0xffff;
        }
        self.set_rflags(eflags & flags::ALL);
        let nothing = Segment {
            unusable: true,
            ..Segment::default()
        };
        for (index, selector) in task.segments.iter().enumerate() {
            self.segments[index] = Segment {
                selector: *selector,
                // Of the code segment, what it was counts until the new one is there.
                ..if index == segment::CS {
                    self.segments[index]
                } else {
                    nothing
                }
            };
        }
        self.ldtr = Segment {
            selector: task.ldt,
            ..nothing
        };
        if layout.cr3.is_some() && self.cr0 & CR0_PG != 0 {
            self.write_cr3(task.cr3)?;
        }
        self.load_task_table(task.ldt)?;
        if eflags & VM != 0 {
            for (index, selector) in task.segments.iter().enumerate() {
                self.set_real_segment(index, *selector);
            }
            let code = self.segments[segment::CS];
            self.set_code_segment(code, 3);
        } else {
            self.load_task_segments(task)?;
        }
        if task.eip > u64::from(self.segments[segment::CS].limit) {
            return Err(self.general_protection(0));
        }
        self.task_entered = false;
        Ok(())
    }

    fn load_task_table(&mut self, selector: u16) -> Result {
        let index = selector & !3;
        if index == 0 {
            return Ok(());
        }
        let refused = Exception::InvalidTss(index);
        if selector & 4 != 0 {
            return Err(self.raise(refused));
        }
        let (raw, _) = self.read_descriptor(selector, Exception::InvalidTss)?;
        let table = parse(selector, raw);
        if table.access & 0x1f != 2 || table.access & access::PRESENT == 0 {
            return Err(self.raise(refused));
        }
        self.ldtr = table;
        Ok(())
    }

    fn load_task_segments(&mut self, task: &Task) -> Result {
        let selector = task.segments[segment::CS];
        let cpl = (selector & 3) as u8;
        let index = selector & !3;
        let (raw, at) = self.read_descriptor(selector, Exception::InvalidTss)?;
        let mut code = parse(selector, raw);
        let kind = code.access;
        let is_code = kind & access::S != 0 && kind & access::CODE != 0;
        let level_fits = if kind & access::EXPAND_DOWN != 0 {
            dpl(kind) <= cpl
        } else {
            dpl(kind) == cpl
        };
        if !is_code || !level_fits || index == 0 {
            return Err(self.raise(Exception::InvalidTss(index)));
        }
        if kind & access::PRESENT == 0 {
            return Err(self.raise(Exception::SegmentNotPresent(index)));
        }
        self.mark_accessed(raw, at)?;
        code.access |= access::ACCESSED;
        self.set_code_segment(code, cpl);
        for index in [
            segment::SS,
            segment::ES,
            segment::DS,
            segment::FS,
            segment::GS,
        ] {
            let selector = task.segments[index];
            let refused = Exception::InvalidTss(selector & !3);
            let outcome = self.load_segment(index, selector);
            if let Err(abort) = outcome {
                if let crate::cpu::AbortReason::Exception(Exception::GeneralProtection(_)) =
                    self.abort
                {
                    return Err(self.raise(refused));
                }
                return Err(abort);
            }
        }
        Ok(())
    }

    /// IRET from a nested task.
    pub(crate) fn return_from_task(&mut self) -> Result {
        if self.tr.unusable {
            return Err(self.raise(Exception::InvalidTss(0)));
        }
        let link = self.load_system::<u16>(self.tr.base)?;
        self.switch_task(link, Switch::Return, None)?;
        self.unmask_nmi();
        Ok(())
    }
}
