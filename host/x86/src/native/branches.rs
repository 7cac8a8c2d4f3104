//! Ways out of a block: links within a page, the table of jumps, calls and returns.

use std::mem::offset_of;

use iced_x86::{Code, FlowControl, Instruction, OpKind};

use super::emit::{Assembler, Jump, Part, R10, R11, R14, R15, RCX, at, at_index};
use super::enter::BIAS;
use super::translate::{Able, Stub, StubKind, Unable, Work, context, field, number, page, scratch};
use super::{Context, KnownJump, WAY_OUT};
use crate::cpu::Cpu;
use crate::decode::{Block, BlockCache};
use crate::mmu::PAGE_OFFSET;

/// A way on that is out of the page, to be written behind the rest: a jump leads there.
pub(super) struct Far<'a> {
    block: &'a Block,
    jump: Jump,
    offset: i32,
    instruction: Option<usize>,
}

impl Work<'_> {
    /// On to an offset from the page's beginning: a jump that a stub, or code behind the rest, takes
    /// up.
    pub(super) fn go(&mut self, jump: Jump, link: u8, offset: i64, instruction: Option<usize>) {
        self.go_or_call(jump, (link, false), offset, instruction);
    }

    fn go_or_call(
        &mut self,
        jump: Jump,
        (link, calls): (u8, bool),
        offset: i64,
        instruction: Option<usize>,
    ) {
        let near = u16::try_from(offset).ok();
        match (
            near.filter(|&o| u64::from(o) <= PAGE_OFFSET),
            i32::try_from(offset),
            instruction,
        ) {
            (Some(offset), ..) => self.stubs.push(Stub {
                block: self.block,
                jump: Some(jump),
                kind: StubKind::Link {
                    link,
                    offset,
                    calls,
                },
            }),
            (None, Ok(offset), _) => self.far.push(Far {
                block: self.block,
                jump,
                offset,
                instruction,
            }),
            // From the page's beginning it is further than an instruction can say.
            (None, Err(_), instruction) => self.step_at(jump, instruction.unwrap_or_default()),
        }
    }

    /// Finds the jump to the linear address in R10 in the table: R11 points to it. What is not there
    /// goes to the jumps that are given back. `offset`: the address is so far from the page's beginning.
    fn look_up_jump(&mut self, offset: Option<i32>) -> [Jump; 2] {
        let upper = self.site.is_upper();
        let often = self.assembler.part() == Part::Often;
        let elsewhere = match offset.filter(|_| often) {
            Some(offset) => {
                let linear = self.site.page.wrapping_add_signed(offset.into());
                // Where it is if the page is where it was.
                let entry = self.site.jumps.wrapping_add(KnownJump::index(linear));
                let asm = self.asm();
                asm.set_wide(R11, entry.addr() as u64);
                let other = is_jump(asm);
                let found = asm.here();
                asm.go_on_in(Part::Rarely);
                asm.land(other);
                find_jump(asm);
                let elsewhere = is_jump(asm);
                let back = asm.jump();
                asm.land_at(back, found as isize);
                asm.go_on_in(Part::Often);
                elsewhere
            }
            None => {
                let asm = self.asm();
                find_jump(asm);
                is_jump(asm)
            }
        };
        let asm = self.asm();
        let key = offset_of!(BlockCache, keys) + usize::from(upper) * 8;
        let key = offset_of!(Cpu, blocks) + key;
        asm.load(R10, at(R15, key as i32 - BIAS as i32));
        asm.load(RCX, at(R11, offset_of!(KnownJump, context) as i32));
        [elsewhere, asm.unless_zero(at_index(RCX, R10, 0, 0))]
    }

    /// As [`Work::look_up_jump`]; the interpreter does the instruction when the jump is not known.
    fn known_jump(&mut self, offset: Option<i32>, instruction: usize) {
        for unknown in self.look_up_jump(offset) {
            self.step_at(unknown, instruction);
        }
    }

    /// Goes where the entry of the table that R11 points to leads.
    fn take_jump(&mut self) {
        let asm = self.asm();
        asm.load(RCX, at(R11, offset_of!(KnownJump, page) as i32));
        asm.store(page(), RCX);
        asm.jump_to_mem(at(R11, offset_of!(KnownJump, code) as i32));
    }

    /// The target of an indirect branch, in R10.
    fn target(&mut self, i: &Instruction, instruction: usize) -> Able {
        match i.op0_kind() {
            OpKind::Register => {
                let guest = number(i.op0_register())?;
                self.fetch(R10, guest);
            }
            OpKind::Memory => {
                self.address(i)?;
                let from = self.probe_read(R10, 8, instruction);
                self.assembler.load(R10, from);
            }
            _ => return Err(Unable),
        }
        Ok(())
    }

    /// Pushes the address of the next instruction.
    fn push_return(&mut self, i: &Instruction, instruction: usize) -> Able {
        let next = i.next_ip() as i32;
        self.push_value(instruction, |work| {
            work.assembler.load(RCX, page());
            work.assembler.lea(RCX, at(RCX, next));
            RCX
        })
    }

    /// A branch, which ends the block.
    pub(super) fn branch(&mut self, i: &Instruction, instruction: usize) -> Able {
        let condition = (i.condition_code() as u8).saturating_sub(1);
        let follows = self
            .goes_on_by(instruction)
            .filter(|_| i.flow_control() != FlowControl::Call)
            .filter(|_| i.flow_control() != FlowControl::IndirectCall);
        match (follows, i.code()) {
            // The block that it leads to follows.
            (Some(0), Code::Jmp_rel8_64 | Code::Jmp_rel32_64) => return Ok(()),
            (Some(0), _) => {
                // Encodings of a condition and its opposite differ in the last bit.
                let past = self.assembler.jump_if(condition ^ 1);
                self.go(past, 1, i.next_ip() as i64, Some(instruction));
                return Ok(());
            }
            (Some(_), _) => {
                let taken = self.assembler.jump_if(condition);
                self.go(taken, 0, i.near_branch_target() as i64, Some(instruction));
                return Ok(());
            }
            (None, _) => {}
        }
        match i.code() {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => {
                let jump = self.assembler.jump();
                self.go(jump, 0, i.near_branch_target() as i64, Some(instruction));
            }
            Code::Call_rel32_64 => {
                let offset = i.near_branch_target() as i64;
                if (0..=PAGE_OFFSET as i64).contains(&offset) {
                    self.push_return(i, instruction)?;
                    self.assembler.push_mem(page());
                    let call = self.assembler.call();
                    self.go_or_call(call, (0, true), offset, Some(instruction));
                    self.land_return(i, instruction);
                } else {
                    self.assembler.load(R10, page());
                    let offset = i32::try_from(offset).map_err(|_far| Unable)?;
                    self.assembler.lea(R10, at(R10, offset));
                    self.call_in_r10(i, Some(offset), instruction)?;
                }
            }
            Code::Call_rm64 => {
                self.target(i, instruction)?;
                self.call_in_r10(i, None, instruction)?;
            }
            Code::Jmp_rm64 => {
                self.target(i, instruction)?;
                self.known_jump(None, instruction);
                self.take_jump();
            }
            Code::Retnq => {
                let from = self.read_stack(R14, 8, instruction)?;
                self.assembler.load(R10, from);
                // Where nobody knows the way, the interpreter does it.
                let number = (self.first_leaving + 1 + self.stubs.len()) as u32;
                self.stubs.push(Stub {
                    block: self.block,
                    jump: None,
                    kind: StubKind::Step(instruction),
                });
                let exit = context(offset_of!(Context, exit));
                self.assembler.store_imm_32(exit, number);
                self.assembler.ret();
            }
            Code::Retnq_imm16 => {
                self.assembler.copy(R10, R14);
                let from = self.probe_read(R10, 8, instruction);
                self.assembler.load(R10, from);
                self.known_jump(None, instruction);
                let popped = 8 + i32::from(i.immediate16());
                self.assembler.lea(R14, at(R14, popped));
                self.take_jump();
            }
            _ if i.is_jcc_short_or_near() && i.op0_kind() == OpKind::NearBranch64 => {
                let taken = self.assembler.jump_if(condition);
                self.go(taken, 0, i.near_branch_target() as i64, Some(instruction));
                let on = self.assembler.jump();
                self.go(on, 1, i.next_ip() as i64, Some(instruction));
            }
            _ => return Err(Unable),
        }
        Ok(())
    }

    /// Calls what R10 names, if that is known.
    fn call_in_r10(&mut self, i: &Instruction, offset: Option<i32>, instruction: usize) -> Able {
        self.known_jump(offset, instruction);
        self.assembler.store(scratch(), R11);
        self.push_return(i, instruction)?;
        let asm = self.asm();
        asm.push_mem(page());
        asm.load(R11, scratch());
        asm.load(RCX, at(R11, offset_of!(KnownJump, page) as i32));
        asm.store(page(), RCX);
        asm.call_mem(at(R11, offset_of!(KnownJump, code) as i32));
        self.land_return(i, instruction);
        Ok(())
    }

    /// Where the host returns to behind a call: R10 says where the guest returns to. That is the
    /// instruction behind the call, or the table knows where.
    fn land_return(&mut self, i: &Instruction, instruction: usize) {
        // Whatever ran meanwhile.
        self.kept = None;
        self.sse_checked = false;
        let by_table = self.by_table;
        let next = i.next_ip() as i32;
        let asm = self.asm();
        asm.pop(R11);
        if i.next_ip() > PAGE_OFFSET {
            // Behind the lower half it is no address, which the return itself has to say.
            let away = asm.jump();
            asm.land_at(away, by_table);
            return;
        }
        asm.not(R10);
        let elsewhere = asm.unless_zero(at_index(R11, R10, 0, next + 1));
        asm.store(page(), R11);
        asm.lea(R14, at(R14, 8));
        let part = asm.part();
        let over = (part == Part::Rarely).then(|| asm.jump());
        asm.go_on_in(Part::Rarely);
        asm.land(elsewhere);
        asm.not(R10);
        let away = asm.jump();
        asm.land_at(away, by_table);
        if let Some(over) = over {
            asm.land(over);
        }
        asm.go_on_in(part);
        if self.goes_on_by(instruction).is_none() {
            let on = self.assembler.jump();
            self.go(on, 1, next.into(), None);
        }
    }

    /// Code for the ways out of the page, behind all else.
    pub(super) fn far_ways(&mut self) {
        for Far {
            block,
            jump,
            offset,
            instruction,
        } in std::mem::take(&mut self.far)
        {
            self.block = block;
            self.assembler.land(jump);
            self.assembler.load(R10, page());
            self.assembler.lea(R10, at(R10, offset));
            match instruction {
                Some(instruction) => self.known_jump(Some(offset), instruction),
                None => {
                    let unknown = self.look_up_jump(Some(offset));
                    let kind = |jump| Stub {
                        block,
                        jump: Some(jump),
                        kind: StubKind::Away { offset },
                    };
                    self.stubs.extend(unknown.map(kind));
                }
            }
            self.take_jump();
        }
    }
}

/// Where code is that returns.
pub(super) struct Returns {
    pub(super) bottom: usize,
    pub(super) by_table: usize,
}

/// Writes what returns to where R10 says when no call is known that it would return from: by the table
/// of jumps, or else by the interpreter, as [`Context::exit`] says already. It goes to `start`.
pub(super) fn write_returns(asm: &mut Assembler, start: usize) -> Returns {
    // Below the first call on the host's stack there always is the way to here.
    let again = asm.here();
    let call = asm.call();
    let bottom = asm.here();
    let back = asm.jump();
    asm.land_at(back, again as isize);
    asm.land(call);
    let by_table = asm.here();
    find_jump(asm);
    let elsewhere = is_jump(asm);
    // The half of the address tells which context has to be that of now.
    asm.pext(RCX, R10, context(offset_of!(Context, sign_bits) + 8));
    let keys = offset_of!(Cpu, blocks) + offset_of!(BlockCache, keys);
    asm.load(R10, at_index(R15, RCX, 3, keys as i32 - BIAS as i32));
    asm.load(RCX, at(R11, offset_of!(KnownJump, context) as i32));
    let stale = asm.unless_zero(at_index(RCX, R10, 0, 0));
    asm.lea(R14, at(R14, 8));
    asm.load(RCX, at(R11, offset_of!(KnownJump, page) as i32));
    asm.store(page(), RCX);
    asm.jump_to_mem(at(R11, offset_of!(KnownJump, code) as i32));
    for jump in [elsewhere, stale] {
        asm.land_at(jump, WAY_OUT as isize - start as isize);
    }
    Returns { bottom, by_table }
}

/// The jump is taken when the entry of the table of jumps that R11 points to is not for the address in
/// R10.
fn is_jump(asm: &mut Assembler) -> Jump {
    asm.load(RCX, at(R11, offset_of!(KnownJump, linear) as i32));
    asm.unless_zero(at_index(RCX, R10, 0, 0))
}

/// R11 points to the entry of the table of jumps where that to the address in R10 would be.
fn find_jump(asm: &mut Assembler) {
    asm.set(R11, 0);
    // CRC32 R11, R10: changes no flag.
    asm.raw(&[0xf2, 0x4d, 0x0f, 0x38, 0xf1, 0xda]);
    asm.pdep(R11, R11, context(offset_of!(Context, jump_bits)));
    asm.load(RCX, field!(blocks.translated_at));
    asm.lea(R11, at_index(R11, RCX, 0, 0));
}
