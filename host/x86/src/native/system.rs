//! Instructions of the kernel's, and those on strings.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Context;
use super::emit::{R10, R11, R13, R15, RCX, Reg, at, at_index};
use super::enter::BIAS;
use super::translate::{Able, Unable, Work, context, field, page, scratch_at, slot_mem};
use crate::cpu::Cpu;
use crate::exec::flags::IF;
use crate::exec::op::slot;
use crate::mmu::TlbEntries;
use crate::state::{Segment, segment};

/// Is it an instruction of this file?
pub(super) fn is_known(i: &Instruction) -> bool {
    repeated(i).is_some()
        || matches!(
            i.code(),
            Code::Cli
                | Code::Cld
                | Code::Pushfq
                | Code::Cmpxchg16b_m128
                | Code::Lfence
                | Code::Mfence
                | Code::Sfence
        )
}

/// Is it done by translated code, but not in lockstep, where it is not to be done twice?
pub(super) fn is_done_once(i: &Instruction) -> bool {
    matches!(i.code(), Code::Sti | Code::Swapgs)
}

/// REP STOS or REP MOVS: two to which power an item's bytes are, and whether it copies.
fn repeated(i: &Instruction) -> Option<(u8, bool)> {
    let form = match i.code() {
        Code::Stosb_m8_AL => (0, false),
        Code::Stosd_m32_EAX => (2, false),
        Code::Stosq_m64_RAX => (3, false),
        Code::Movsb_m8_m8 => (0, true),
        Code::Movsd_m32_m32 => (2, true),
        Code::Movsq_m64_m64 => (3, true),
        _ => return None,
    };
    let plain = i.has_rep_prefix()
        && i.segment_prefix() == Register::None
        && (0..i.op_count())
            .all(|n| !matches!(i.op_kind(n), OpKind::MemoryESEDI | OpKind::MemorySegESI));
    plain.then_some(form)
}

impl Work<'_> {
    pub(super) fn rare(&mut self, i: &Instruction, instruction: usize) -> Able {
        match i.code() {
            Code::Cli => {
                if self.is_user() {
                    return Err(Unable);
                }
                self.change_flag(offset_of!(Context, not_interrupt_bit), 0);
                Ok(())
            }
            Code::Cld => {
                self.change_flag(offset_of!(Context, not_direction_bit), 0);
                Ok(())
            }
            Code::Lfence | Code::Mfence | Code::Sfence => self.encode(i),
            Code::Sti => {
                if self.is_user() {
                    return Err(Unable);
                }
                let asm = self.asm();
                asm.load(RCX, context(offset_of!(Context, due)));
                let due = asm.unless_rcx_zero();
                self.step_at(due, instruction);
                self.change_flag(offset_of!(Context, not_interrupt_bit), IF as i32);
                let asm = self.asm();
                asm.load(RCX, page());
                asm.lea(RCX, at(RCX, i.next_ip() as i32));
                asm.store(field!(shadow_at), RCX);
                Ok(())
            }
            Code::Swapgs => {
                if self.is_user() {
                    return Err(Unable);
                }
                let gs = offset_of!(Cpu, segments)
                    + segment::GS * size_of::<Segment>()
                    + offset_of!(Segment, base);
                let base = slot_mem(slot::SEGMENT + segment::GS as u8);
                let asm = self.asm();
                asm.load(RCX, base);
                asm.load(R10, field!(msrs.kernel_gs_base));
                asm.store(field!(msrs.kernel_gs_base), RCX);
                asm.store(base, R10);
                asm.store(at(R15, gs as i32 - BIAS as i32), R10);
                Ok(())
            }
            Code::Pushfq => {
                // PUSHFQ; POP RCX, on the host's stack.
                let asm = self.asm();
                asm.raw(&[0x9c, 0x59]);
                let arithmetic = context(offset_of!(Context, arithmetic_bits));
                asm.pext(RCX, RCX, arithmetic);
                asm.pdep(RCX, RCX, arithmetic);
                asm.load(R11, field!(system_flags));
                let pushed = context(offset_of!(Context, pushed_bits));
                asm.pext(R11, R11, pushed);
                asm.pdep(R11, R11, pushed);
                // Bit 1 is always set.
                asm.lea(RCX, at_index(RCX, R11, 0, 2));
                asm.store(scratch_at(0), RCX);
                self.push_value(instruction, |work| {
                    work.asm().load(RCX, scratch_at(0));
                    RCX
                })
            }
            Code::Cmpxchg16b_m128 => {
                self.address(i)?;
                self.whole(R10, instruction);
                self.probe_write(R10, 16, instruction);
                let asm = self.asm();
                asm.copy(RCX, R13);
                // LOCK CMPXCHG16B [R10]
                asm.raw(&[0xf0, 0x49, 0x0f, 0xc7, 0x0a]);
                self.mark();
                Ok(())
            }
            _ => self.repeat(i, instruction),
        }
    }

    /// Clears a bit of the system flags, that which the mask in the context lacks, and adds another.
    fn change_flag(&mut self, others: usize, set: i32) {
        let asm = self.asm();
        asm.load(RCX, field!(system_flags));
        asm.pext(RCX, RCX, context(others));
        asm.pdep(RCX, RCX, context(others));
        if set != 0 {
            asm.lea(RCX, at(RCX, set));
        }
        asm.store(field!(system_flags), RCX);
    }

    /// REP STOS and REP MOVS, forward, within one page on each side.
    fn repeat(&mut self, i: &Instruction, instruction: usize) -> Able {
        const RSI: Reg = Reg(6);
        const RDI: Reg = Reg(7);
        let (scale, copies) = repeated(i).ok_or(Unable)?;
        let asm = self.asm();
        // Backward, or more than a page: the interpreter.
        asm.load(RCX, field!(system_flags));
        asm.pext(RCX, RCX, context(offset_of!(Context, direction_bit)));
        let backward = asm.unless_rcx_zero();
        asm.copy(RCX, R13);
        asm.page_of(RCX);
        let long = asm.unless_rcx_zero();
        asm.copy(RCX, R13);
        let nothing = asm.if_rcx_zero();
        self.step_at(backward, instruction);
        self.step_at(long, instruction);
        if copies {
            self.probe_row(RSI, (scale, false), instruction);
            let addend = self.entry(TlbEntries::ADDEND);
            self.assembler.load(R11, addend);
            self.assembler.lea(R10, at_index(RSI, R11, 0, 0));
            self.assembler.store(scratch_at(1), R10);
        }
        self.probe_row(RDI, (scale, true), instruction);
        self.for_a_write(RDI);
        let asm = self.asm();
        asm.store(scratch_at(0), RDI);
        asm.copy(RDI, R10);
        asm.copy(RCX, R13);
        if copies {
            asm.store(scratch_at(2), RSI);
            asm.load(RSI, scratch_at(1));
        }
        let code = match (scale, copies) {
            (0, false) => &[0xf3, 0xaa][..],
            (2, false) => &[0xf3, 0xab],
            (_, false) => &[0xf3, 0x48, 0xab],
            (0, true) => &[0xf3, 0xa4],
            (2, true) => &[0xf3, 0xa5],
            (_, true) => &[0xf3, 0x48, 0xa5],
        };
        asm.raw(code);
        asm.load(RDI, scratch_at(0));
        asm.lea(RDI, at_index(RDI, R13, scale, 0));
        if copies {
            asm.load(RSI, scratch_at(2));
            asm.lea(RSI, at_index(RSI, R13, scale, 0));
        }
        asm.set(R13, 0);
        self.mark();
        self.assembler.land(nothing);
        Ok(())
    }

    /// As [`Work::probe`], for R13 items of `1 << scale` bytes, fewer than 4096 and at least one.
    fn probe_row(&mut self, address: Reg, (scale, write): (u8, bool), instruction: usize) {
        self.load_tag(address, write);
        let asm = self.asm();
        asm.lea(RCX, at_index(RCX, address, 0, 0));
        // The first byte is in the page ...
        asm.store(scratch_at(0), RCX);
        asm.page_of(RCX);
        let miss = asm.unless_rcx_zero();
        // ... and so is the last.
        asm.load(RCX, scratch_at(0));
        asm.lea(RCX, at_index(RCX, R13, scale, -1));
        asm.page_of(RCX);
        let across = asm.unless_rcx_zero();
        self.step_at(miss, instruction);
        self.step_at(across, instruction);
    }
}
