//! Where an instruction's operands are: registers of the host, and memory by the software TLB.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::Context;
use super::emit::{Jump, Mem, R10, R11, R14, R15, RCX, Reg, at, at_index};
use super::sharing::Member;
use super::translate::{Able, PLACES, Unable, Work, context, number, page, renamed, slot_mem};
use crate::exec::op::slot;
use crate::mmu::TlbEntries;

impl Work<'_> {
    /// Puts a guest register into a host register.
    pub(super) fn fetch(&mut self, to: Reg, guest: u8) {
        match PLACES[usize::from(guest)] {
            Some(place) if place == to => {}
            Some(place) => self.assembler.copy(to, place),
            None => self.assembler.load(to, slot_mem(guest)),
        }
    }

    /// The host register that has a guest register, or `otherwise` with a copy of it.
    pub(super) fn held(&mut self, guest: u8, otherwise: Reg) -> Reg {
        match PLACES[usize::from(guest)] {
            Some(place) => place,
            None => {
                self.assembler.load(otherwise, slot_mem(guest));
                otherwise
            }
        }
    }

    /// Works out the offset of the memory operand into `to`, its low 32 bits where it is to be `narrow`;
    /// R10 and R11 may change.
    pub(super) fn offset(&mut self, i: &Instruction, to: Reg, narrow: bool) -> Able {
        let (base, index) = (i.memory_base(), i.memory_index());
        let narrow = narrow
            || match (base.size(), index.size()) {
                (0, 0) => i.memory_displ_size() == 4,
                (0, size) | (size, _) => size == 4,
            };
        let mut displacement = i.memory_displacement64() as i64;
        let index = match index {
            Register::None => None,
            _ => {
                let scale = i.memory_index_scale().trailing_zeros() as u8;
                Some((self.held(number(index)?, R11), scale))
            }
        };
        let base = match base {
            Register::None => None,
            Register::RIP => {
                // Decoding started from the offset in the page.
                self.assembler.load(R10, page());
                Some(R10)
            }
            Register::EIP => return Err(Unable),
            _ => Some(self.held(number(base)?, R10)),
        };
        if narrow {
            displacement = (displacement as i32).into();
        }
        let displacement = i32::try_from(displacement).map_err(|_far| Unable)?;
        let mem = match (base, index) {
            (Some(base), Some((index, scale))) => at_index(base, index, scale, displacement),
            (Some(base), None) => at(base, displacement),
            (None, Some((index, scale))) => {
                // Without a base.
                self.assembler.lea_scaled(to, index, scale, displacement);
                if narrow {
                    self.assembler.lea_32(to, at(to, 0));
                }
                return Ok(());
            }
            (None, None) => {
                self.assembler.set(to, displacement);
                if narrow {
                    self.assembler.lea_32(to, at(to, 0));
                }
                return Ok(());
            }
        };
        if narrow {
            self.assembler.lea_32(to, mem);
        } else {
            self.assembler.lea(to, mem);
        }
        Ok(())
    }

    /// The register that has the linear address of the memory operand, or R10 gets it; R11 may change.
    fn address_held(&mut self, i: &Instruction) -> Able<Reg> {
        let bare = i.memory_index() == Register::None
            && i.memory_displacement64() == 0
            && i.memory_base().is_gpr64()
            && !matches!(i.segment_prefix(), Register::FS | Register::GS);
        if bare && let Some(place) = PLACES[usize::from(number(i.memory_base())?)] {
            return Ok(place);
        }
        self.address(i)?;
        Ok(R10)
    }

    /// Works out the linear address of the memory operand into R10; R11 may change.
    pub(super) fn address(&mut self, i: &Instruction) -> Able {
        self.offset(i, R10, false)?;
        let segment = match i.segment_prefix() {
            Register::FS => slot::SEGMENT + 4,
            Register::GS => slot::SEGMENT + 5,
            _ => return Ok(()),
        };
        self.assembler.load(R11, slot_mem(segment));
        self.assembler.lea(R10, at_index(R10, R11, 0, 0));
        Ok(())
    }

    /// A field of the TLB's entry that R11 tells apart.
    pub(super) fn entry(&self, field: usize) -> Mem {
        at_index(R15, R11, TlbEntries::SHIFT, self.entries + field as i32)
    }

    /// Loads the tag of the TLB's entry for an address into RCX; R11 tells which entry it is
    /// ([`Work::entry`]).
    pub(super) fn load_tag(&mut self, address: Reg, write: bool) {
        let tag = if write {
            TlbEntries::WRITE
        } else {
            TlbEntries::READ
        };
        let tag = self.entry(tag);
        let asm = self.asm();
        asm.pext(R11, address, context(offset_of!(Context, tlb_bits)));
        asm.load(RCX, tag);
    }

    /// Finds the TLB's entry for an address; RCX is lost. The jump is taken when it does not serve
    /// `bytes` from there.
    fn look(&mut self, address: Reg, bytes: u32, write: bool) -> Jump {
        self.load_tag(address, write);
        let asm = self.asm();
        asm.unless_in_first_page(at_index(RCX, address, 0, bytes as i32 - 1))
    }

    /// As [`Work::look`]; leaves to the interpreter instead of a jump.
    fn probe(&mut self, address: Reg, bytes: u32, write: bool, instruction: usize) {
        let miss = self.look(address, bytes, write);
        self.step_at(miss, instruction);
    }

    /// R10 becomes the host's address of the first byte that the member's look is for; RCX and R11
    /// change.
    fn reach(&mut self, member: Member, instruction: usize) -> Able {
        let Some(lead) = member.lead else {
            if !self.keeps(member.slot) {
                self.assembler.load(R10, shared(member.slot, 0));
            }
            self.keep(member.slot);
            return Ok(());
        };
        let index = match lead.key.index {
            Register::None => None,
            index => Some(self.held(number(index)?, R11)),
        };
        let base = match lead.key.base {
            Register::RIP => {
                self.assembler.load(R10, page());
                R10
            }
            base => self.held(number(base)?, R10),
        };
        let address = match index {
            Some(index) => {
                let mem = at_index(base, index, lead.key.scale, lead.displacement);
                self.assembler.lea(R10, mem);
                R10
            }
            None if lead.displacement == 0 => base,
            None => {
                self.assembler.lea(R10, at(base, lead.displacement));
                R10
            }
        };
        let miss = self.look(address, lead.bytes, lead.write);
        self.goes_wrong.push((miss, instruction));
        if lead.write {
            self.for_a_write(address);
            self.assembler.store(shared(member.slot, 1), R11);
        } else {
            let addend = self.entry(TlbEntries::ADDEND);
            self.assembler.load(R11, addend);
            self.assembler.lea(R10, at_index(address, R11, 0, 0));
        }
        self.assembler.store(shared(member.slot, 0), R10);
        self.keep(member.slot);
        Ok(())
    }

    /// R10 is what this slot remembers.
    fn keep(&mut self, slot: usize) {
        self.assembler.take_r10_changed();
        self.kept = Some(slot);
    }

    /// Is R10 still what this slot remembers?
    fn keeps(&mut self, slot: usize) -> bool {
        !self.assembler.take_r10_changed() && self.kept == Some(slot)
    }

    /// Makes an instruction's memory operand what the host has there: so many bytes, which it stores or
    /// only reads, and which are to be a `whole` unit. R10 and R11 point there, and RCX is free.
    pub(super) fn locate(
        &mut self,
        i: &mut Instruction,
        (bytes, stores, whole): (u32, bool, bool),
        instruction: usize,
    ) -> Able {
        let original = *i;
        let Some(member) = self.member(instruction) else {
            let address = self.address_held(&original)?;
            if whole {
                self.whole(address, instruction);
            }
            self.redirect(i, address, (bytes, stores), instruction);
            return Ok(());
        };
        self.reach(member, instruction)?;
        let mut delta = member.delta;
        if whole {
            // Pages of both are alike in their lower bits.
            self.assembler.lea(R10, at(R10, delta));
            delta = 0;
            self.whole(R10, instruction);
        }
        strip(i, R10);
        i.set_memory_displacement64(i64::from(delta) as u64);
        i.set_memory_displ_size(u32::from(delta != 0));
        i.set_memory_index(Register::None);
        Ok(())
    }

    /// Where bytes of the stack are that an instruction reads from `base` on, which is the register or
    /// R10, maybe with R11.
    pub(super) fn read_stack(&mut self, base: Reg, bytes: u32, instruction: usize) -> Able<Mem> {
        match self.member(instruction) {
            Some(member) => {
                self.reach(member, instruction)?;
                Ok(at(R10, member.delta))
            }
            None => Ok(self.probe_read(base, bytes, instruction)),
        }
    }

    /// The same for bytes that it writes: from R10. [`Work::mark_for`] marks them.
    pub(super) fn write_stack(
        &mut self,
        displacement: i32,
        bytes: u32,
        instruction: usize,
    ) -> Able<Mem> {
        match self.member(instruction) {
            Some(member) => {
                self.reach(member, instruction)?;
                Ok(at(R10, member.delta))
            }
            None => {
                self.assembler.lea(R10, at(R14, displacement));
                self.probe_write(R10, bytes, instruction);
                Ok(at(R10, 0))
            }
        }
    }

    /// Makes an instruction's memory operand what lies at a guest's address: so many bytes, which it
    /// stores or only reads. R10 and R11 change, and RCX is free.
    pub(super) fn redirect(
        &mut self,
        i: &mut Instruction,
        address: Reg,
        (bytes, stores): (u32, bool),
        instruction: usize,
    ) {
        if stores {
            strip(i, R10);
            self.probe_write(address, bytes, instruction);
            i.set_memory_index(Register::None);
        } else {
            strip(i, address);
            self.probe_read(address, bytes, instruction);
            i.set_memory_index(Register::R11);
        }
    }

    /// The host address of what is to be read: the guest's and R11 together. RCX is free.
    pub(super) fn probe_read(&mut self, address: Reg, bytes: u32, instruction: usize) -> Mem {
        self.probe(address, bytes, false, instruction);
        let addend = self.entry(TlbEntries::ADDEND);
        self.assembler.load(R11, addend);
        at_index(address, R11, 0, 0)
    }

    /// The host address of what is to be written, in R10; R11 points to the mark to be set then
    /// ([`Work::mark`]). RCX is free.
    pub(super) fn probe_write(&mut self, address: Reg, bytes: u32, instruction: usize) {
        self.probe(address, bytes, true, instruction);
        self.for_a_write(address);
    }

    /// The entry that R11 tells apart serves a write to an address: makes R10 and R11 what
    /// [`Work::probe_write`] does.
    pub(super) fn for_a_write(&mut self, address: Reg) {
        let (addend, mark) = (self.entry(TlbEntries::ADDEND), self.entry(TlbEntries::MARK));
        let asm = self.asm();
        asm.load(RCX, addend);
        asm.lea(R10, at_index(address, RCX, 0, 0));
        asm.load(R11, mark);
    }

    /// Marks what an instruction has stored to, whether it looked for that by itself or not.
    pub(super) fn mark_for(&mut self, instruction: usize) {
        if let Some(Member {
            slot, lead: None, ..
        }) = self.member(instruction)
        {
            self.assembler.load(R11, shared(slot, 1));
        }
        self.mark();
    }

    pub(super) fn mark(&mut self) {
        let mark = self.mark;
        self.assembler.store_imm_8(at(R11, 0), mark);
    }
}

/// Where a look that is shared is remembered: the host's address, or the mark.
fn shared(slot: usize, part: usize) -> Mem {
    context(offset_of!(Context, shared) + slot * 16 + part * 8)
}

/// Takes from a memory operand all but a register of the host.
fn strip(i: &mut Instruction, base: Reg) {
    i.set_segment_prefix(Register::None);
    i.set_memory_displacement64(0);
    i.set_memory_displ_size(0);
    i.set_memory_index_scale(1);
    i.set_memory_base(renamed(Register::RAX, base));
}
