//! From a block's instructions to the host's.

use iced_x86::{
    FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic as M,
    OpAccess, OpKind, Register,
};
use std::mem::offset_of;

use super::branches::Far;
use super::emit::{Assembler, Jump, Mem, Part, R10, R13, R14, R15, RCX, Reg, at};
use super::enter::{BIAS, CONTEXT};
use super::plain::is_plain;
use super::sharing::{self, Member};
use super::stack::row;
use super::trace::Segment;
use super::{Context, Kind, KnownJump, Leaving, Translator, WAY_OUT, slot_at};
use crate::cpu::Cpu;
use crate::cpuid::Baseline;
use crate::decode::{Block, Mode, is_offered};
use crate::mmu::{Privilege, Tlb};

/// Host registers of the guest's sixteen.
pub(super) const PLACES: [Option<Reg>; 16] = [
    Some(Reg(0)),
    Some(R13),
    Some(Reg(2)),
    Some(Reg(3)),
    Some(R14),
    Some(Reg(5)),
    Some(Reg(6)),
    Some(Reg(7)),
    Some(Reg(8)),
    Some(Reg(9)),
    None,
    None,
    Some(Reg(12)),
    None,
    None,
    None,
];

/// Bytes of code that a block may take, at most: more is no block that this makes.
const MOST: usize = 32 << 10;

/// Bytes of the look whether something is due, with which a block begins.
const CHECK: usize = 14;

/// What the interpreter has to do by itself.
pub(super) struct Unable;
pub(super) type Able<T = ()> = Result<T, Unable>;

/// Where translated code leaves, when its place is known.
pub(super) struct Stub<'a> {
    /// The block that is left.
    pub(super) block: &'a Block,
    /// `None`: other code names the place and leaves by itself.
    pub(super) jump: Option<Jump>,
    pub(super) kind: StubKind,
}

pub(super) enum StubKind {
    Link {
        link: u8,
        offset: u16,
        calls: bool,
    },
    Away {
        offset: i32,
    },
    /// The interpreter does the instruction with this number.
    Step(usize),
}

/// Where code runs.
#[derive(Clone, Copy)]
pub(super) struct Site {
    /// The linear page, when it was translated. It may run at others that show the same.
    pub(super) page: u64,
    /// The table of jumps.
    pub(super) jumps: *const KnownJump,
}

impl Site {
    /// Code that this may lead to has its context in the upper half.
    pub(super) fn is_upper(&self) -> bool {
        self.page >> 63 != 0
    }
}

/// An instruction.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// The block that it belongs to.
    block: &'a Block,
    /// It ends that block, and the one that this link leads to follows.
    link: Option<u8>,
    op: u16,
    count: u16,
    /// Where the code behind it begins.
    resume: usize,
}

pub(super) struct Work<'a> {
    pub(super) assembler: &'a mut Assembler,
    pub(super) encoder: &'a mut iced_x86::Encoder,
    pub(super) information: InstructionInfoFactory,
    /// The block that the next instruction belongs to.
    pub(super) block: &'a Block,
    pub(super) baseline: &'static Baseline,
    pub(super) mark: u8,
    /// From R15 to the TLB's entries of the block's privilege.
    pub(super) entries: i32,
    /// Places where code left before this block was translated.
    pub(super) first_leaving: usize,
    /// From the beginning of this block's code to that which returns by the table.
    pub(super) by_table: isize,
    /// Where the code runs, and what it finds there.
    pub(super) site: Site,
    /// Whether SSE instructions run was looked at before.
    pub(super) sse_checked: bool,
    places: Vec<Place<'a>>,
    /// Instructions whose operands share looks into the TLB, in the copy of the block that has these.
    sharing: Vec<Option<Member>>,
    /// The slot of what R10 was made to point to last.
    pub(super) kept: Option<usize>,
    /// Where that copy goes on in the other, with the instruction of this number.
    pub(super) goes_wrong: Vec<(Jump, usize)>,
    pub(super) stubs: Vec<Stub<'a>>,
    pub(super) far: Vec<Far<'a>>,
}

/// From R15 to a field of the processor.
macro_rules! field {
    ($($path:tt)+) => {
        $crate::native::emit::at(
            $crate::native::emit::R15,
            offset_of!(Cpu, $($path)+) as i32 - $crate::native::enter::BIAS as i32,
        )
    };
}
pub(super) use field;

pub(super) fn context(offset: usize) -> Mem {
    at(R15, (offset + CONTEXT) as i32)
}

pub(super) fn slot_mem(number: u8) -> Mem {
    at(R15, slot_at(number))
}

pub(super) fn page() -> Mem {
    context(offset_of!(Context, page))
}

pub(super) fn scratch() -> Mem {
    scratch_at(0)
}

pub(super) fn scratch_at(number: usize) -> Mem {
    context(offset_of!(Context, scratch) + number * 8)
}

/// Does nothing that can be seen.
fn is_nothing(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Nop
            | M::Endbr32
            | M::Endbr64
            | M::Reservednop
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetchw
            | M::Prefetch
    )
}

/// The host's register of the same size.
pub(super) fn renamed(register: Register, host: Reg) -> Register {
    let base = match register.size() {
        1 => match host.0 {
            0..4 => {
                return [Register::AL, Register::CL, Register::DL, Register::BL]
                    [usize::from(host.0)];
            }
            4..8 => {
                return [Register::SPL, Register::BPL, Register::SIL, Register::DIL]
                    [usize::from(host.0 - 4)];
            }
            _ => return Register::R8L + u32::from(host.0 - 8),
        },
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + u32::from(host.0)
}

pub(super) fn number(register: Register) -> Able<u8> {
    if !register.is_gpr() {
        return Err(Unable);
    }
    Ok(register.full_register().number() as u8)
}

pub(super) fn writes(access: OpAccess) -> bool {
    matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    )
}

impl Work<'_> {
    pub(super) fn asm(&mut self) -> &mut Assembler {
        self.assembler
    }

    /// The interpreter does the instruction.
    fn leave_to_interpreter(&mut self, instruction: usize) {
        let jump = self.assembler.jump();
        self.step_at(jump, instruction);
    }

    /// How an instruction shares its look into the TLB.
    pub(super) fn member(&self, instruction: usize) -> Option<Member> {
        self.sharing.get(instruction).copied().flatten()
    }

    pub(super) fn is_user(&self) -> bool {
        self.block.user
    }

    /// The link of the branch with this number that leads to the block which follows here.
    pub(super) fn goes_on_by(&self, instruction: usize) -> Option<u8> {
        self.places[instruction].link
    }

    pub(super) fn step_at(&mut self, jump: Jump, instruction: usize) {
        self.stubs.push(Stub {
            block: self.block,
            jump: Some(jump),
            kind: StubKind::Step(instruction),
        });
    }

    /// Encodes an instruction of the host.
    pub(super) fn encode(&mut self, i: &Instruction) -> Able {
        self.encoder.encode(i, 0).map_err(|_no_encoding| Unable)?;
        let mut operands = i.op_kinds().zip(0..);
        let r10 = operands.any(|(kind, n)| {
            kind == OpKind::Register && i.op_register(n).full_register() == Register::R10
        });
        if r10 {
            self.assembler.changes(R10);
        }
        let bytes = self.encoder.take_buffer();
        self.assembler.raw(&bytes);
        let mut bytes = bytes;
        bytes.clear();
        self.encoder.set_buffer(bytes);
        Ok(())
    }

    /// What is done to the first three operands.
    pub(super) fn access(&mut self, i: &Instruction) -> [OpAccess; 3] {
        let options =
            InstructionInfoOptions::NO_REGISTER_USAGE | InstructionInfoOptions::NO_MEMORY_USAGE;
        let info = self.information.info_options(i, options);
        [0, 1, 2].map(|n| info.op_access(n))
    }

    fn instruction(&mut self, i: &Instruction, instruction: usize) -> Able {
        if !is_offered(self.baseline, Mode::Bits64, i) {
            return Err(Unable);
        }
        match i.mnemonic() {
            mnemonic if is_nothing(mnemonic) => Ok(()),
            M::Lea => self.lea(i),
            M::Push => self.push(i, instruction),
            M::Pop => self.pop(i, instruction),
            M::Leave => self.leave(i, instruction),
            M::Jmp | M::Call | M::Ret => self.branch(i, instruction),
            _ if i.is_jcc_short_or_near() => self.branch(i, instruction),
            M::Div | M::Idiv => self.divide(i, instruction),
            mnemonic if is_plain(mnemonic) => self.plain(i, instruction),
            _ if super::system::is_known(i) || super::system::is_done_once(i) => {
                self.rare(i, instruction)
            }
            _ if super::avx::is_known(i) => self.avx(i, instruction),
            _ => self.vector(i, instruction),
        }
    }

    /// The way into the code: looks whether something is due.
    fn front(&mut self) -> (Jump, usize) {
        let asm = self.asm();
        let due = asm.here();
        let look = asm.jump();
        let entry = asm.here();
        asm.load_32(RCX, field!(budget));
        asm.lea_32(RCX, at(RCX, -1));
        asm.store_32(field!(budget), RCX);
        asm.back_if_ecx_zero(due);
        let unchecked = asm.here() - entry;
        assert_eq!(unchecked, CHECK, "alike in all blocks");
        (look, entry)
    }
}

impl Work<'_> {
    /// Code for an instruction or a row; how many instructions it is for.
    fn row(&mut self, instructions: &[Instruction], number: usize) -> Able<usize> {
        let row = row(&instructions[number..]);
        self.block = self.places[number].block;
        match row {
            [one] => self.instruction(one, number)?,
            [first, ..] if first.mnemonic() == M::Push => self.push_row(row, number)?,
            _ => self.pop_row(row, number)?,
        }
        Ok(row.len())
    }

    /// The copy of the block whose operands share looks into the TLB. It ends where the interpreter
    /// has to do something, and goes on in the other.
    fn copy_that_shares(&mut self, instructions: &[Instruction]) {
        let mut number = 0;
        while number < instructions.len() {
            let before = self.state();
            match self.row(instructions, number) {
                Ok(taken) => number += taken,
                Err(Unable) => {
                    self.back_to(before);
                    let on = self.assembler.jump();
                    self.goes_wrong.push((on, number));
                    break;
                }
            }
        }
        if number == instructions.len() {
            self.falls_through(instructions);
        }
        self.sharing.clear();
        self.sse_checked = false;
    }

    /// The copy in which each operand looks by itself: the only one where none share. `None`: there is
    /// nothing that can be done for an instruction.
    fn copy_that_does_not(&mut self, instructions: &[Instruction]) -> Option<()> {
        let mut number = 0;
        let mut wrong = std::mem::take(&mut self.goes_wrong);
        while let Some(i) = instructions.get(number) {
            for (jump, _) in wrong.extract_if(.., |&mut (_, at)| at == number) {
                self.assembler.land(jump);
            }
            let before = self.state();
            let mut taken = 1;
            match self.row(instructions, number) {
                Ok(row) => taken = row,
                Err(Unable) => {
                    self.back_to(before);
                    if self.places[number].count == 0 {
                        // There is nothing that the interpreter could do for it.
                        return None;
                    }
                    self.leave_to_interpreter(number);
                }
            }
            self.places[number].count = self.places[number..number + taken]
                .iter()
                .map(|place| place.count)
                .sum();
            self.places[number].resume = self.assembler.here();
            number += taken;
            if i.is_invalid() || self.assembler.len() > MOST {
                return None;
            }
        }
        debug_assert!(wrong.is_empty(), "each instruction was reached");
        self.falls_through(instructions);
        Some(())
    }

    /// On behind the block's last instruction, where that does not branch.
    fn falls_through(&mut self, instructions: &[Instruction]) {
        let falls = |i: &Instruction| i.flow_control() == FlowControl::Next;
        if self.block.goes_on() || instructions.last().is_some_and(falls) {
            // Some of the latter do not get here: the interpreter ends the block with them.
            let offset = i64::from(self.block.start) + i64::from(self.block.bytes);
            let on = self.assembler.jump();
            self.go(on, 1, offset, None);
        }
    }

    fn state(&self) -> State {
        State {
            code: self.assembler.here(),
            stubs: self.stubs.len(),
            far: self.far.len(),
            goes_wrong: self.goes_wrong.len(),
            sse_checked: self.sse_checked,
        }
    }

    /// Takes back what was made since.
    fn back_to(&mut self, state: State) {
        self.kept = None;
        self.assembler.cut(state.code);
        self.stubs.truncate(state.stubs);
        self.far.truncate(state.far);
        self.goes_wrong.truncate(state.goes_wrong);
        self.sse_checked = state.sse_checked;
    }
}

/// The operations of each instruction of a block; one that a comparison took in has none.
fn places_of<'a>(segment: &Segment<'a>) -> Vec<Place<'a>> {
    let block = segment.block;
    let last = segment.instructions.len().wrapping_sub(1);
    let mut op = 0;
    let mut places = Vec::with_capacity(segment.instructions.len());
    for (number, i) in segment.instructions.iter().enumerate() {
        let from = i.ip() as u16 - block.start;
        let first = op;
        while op + 1 < block.ops.len() && block.ops[op].offset == from {
            op += 1;
        }
        places.push(Place {
            block,
            link: segment.link.filter(|_| number == last),
            op: first as u16,
            count: (op - first) as u16,
            resume: 0,
        });
    }
    places
}

/// What an instruction that could not be translated has to leave as it was.
struct State {
    code: usize,
    stubs: usize,
    far: usize,
    goes_wrong: usize,
    sse_checked: bool,
}

/// Is it done here, and not by the interpreter in any case?
pub(crate) fn is_known(i: &Instruction) -> bool {
    let (to, from) = (i.op0_register(), i.op1_register());
    let of_system = |r: Register| r.is_cr() || r.is_dr() || r.is_segment_register();
    let far = i.is_call_far() || i.is_call_far_indirect();
    let far = far || i.is_jmp_far() || i.is_jmp_far_indirect();
    if far || of_system(to) || of_system(from) {
        return false;
    }
    matches!(
        i.mnemonic(),
        M::Lea | M::Push | M::Pop | M::Leave | M::Jmp | M::Call | M::Ret | M::Div | M::Idiv
    ) || is_nothing(i.mnemonic())
        || i.is_jcc_short_or_near()
        || is_plain(i.mnemonic())
        || super::sse::is_known(i)
        || super::avx::is_known(i)
        || super::system::is_known(i)
}

impl Translator {
    /// Translates blocks of 64-bit code that follow each other. Where the code of the first is, if it
    /// became any.
    pub(super) fn translate(
        &mut self,
        trace: &[Segment<'_>],
        (baseline, mark, site): (&'static Baseline, u8, Site),
    ) -> Option<*const u8> {
        let memory = self.memory.as_mut()?;
        if memory.room() < 2 * MOST {
            self.full = true;
            return None;
        }
        let block = trace.first()?.block;
        let [start, aside] = [Part::Often, Part::Rarely].map(|part| memory.next(part));
        self.assembler.begin(aside as isize - start as isize);
        let privilege = if block.user {
            Privilege::User
        } else {
            Privilege::Supervisor
        };
        let mut work = Work {
            assembler: &mut self.assembler,
            encoder: &mut self.encoder,
            information: InstructionInfoFactory::new(),
            block,
            baseline,
            mark,
            entries: (offset_of!(Cpu, tlb) + Tlb::distance(privilege)) as i32 - BIAS as i32,
            first_leaving: self.leavings.len(),
            by_table: self.by_table as isize - start as isize,
            site,
            sse_checked: false,
            places: Vec::new(),
            sharing: Vec::new(),
            kept: None,
            goes_wrong: Vec::new(),
            stubs: Vec::new(),
            far: Vec::new(),
        };
        let mut instructions = Vec::new();
        for segment in trace {
            work.places.extend(places_of(segment));
            instructions.extend_from_slice(&segment.instructions);
        }
        if self.verifies && !instructions.iter().all(is_known) {
            // Something that is not to be done twice.
            return None;
        }
        let (look, entry) = work.front();
        work.sharing = sharing::find(&instructions, &mut work.information);
        if !work.sharing.is_empty() {
            work.copy_that_shares(&instructions);
            work.assembler.go_on_in(Part::Rarely);
        }
        work.copy_that_does_not(&instructions)?;
        work.assembler.go_on_in(Part::Often);
        work.far_ways();
        let Work {
            assembler: asm,
            places,
            stubs,
            ..
        } = work;
        let way_out = WAY_OUT as isize - start as isize;
        let exit = context(offset_of!(Context, exit));
        asm.go_on_in(Part::Rarely);
        let leavings = &mut self.leavings;
        let at = |asm: &Assembler, place| (start as isize + asm.distance(place)) as u32;
        let mut leave = |asm: &mut Assembler, jump: Option<Jump>, block, kind: Kind| {
            if let Some(jump) = jump {
                asm.land(jump);
                asm.store_imm_32(exit, leavings.len() as u32);
                let out = asm.jump();
                asm.land_at(out, way_out);
            }
            leavings.push(Leaving { block, kind });
        };
        leave(asm, Some(look), block, Kind::Look);
        for Stub { block, jump, kind } in stubs {
            let kind = match kind {
                StubKind::Link {
                    link,
                    offset,
                    calls,
                } => Kind::Link {
                    link,
                    offset,
                    calls,
                    place: jump.map_or(0, |jump| at(asm, jump.place())),
                },
                StubKind::Away { offset } => Kind::Away { offset },
                StubKind::Step(number) => {
                    let place = places[number];
                    Kind::Step {
                        op: place.op,
                        count: place.count,
                        resume: at(asm, place.resume),
                    }
                }
            };
            leave(asm, jump, block, kind);
        }
        for (part, place) in [(Part::Often, start), (Part::Rarely, aside)] {
            let at = memory.append(part, asm.bytes(part))?;
            debug_assert_eq!(at, place, "where it was made for");
        }
        self.made.note(block, Part::Often, start + entry);
        self.made.note(block, Part::Rarely, aside);
        Some(memory.address(start + entry))
    }

    /// Makes a jump lead to other code of the same page. What leads forward need not look whether
    /// something is due: sooner or later it has to lead back, or out of the page.
    pub(super) fn link(&mut self, place: u32, code: *const u8, forward: bool) {
        let unchecked = forward && !self.verifies;
        if let Some(memory) = &mut self.memory {
            let past = if unchecked { CHECK } else { 0 };
            let target = code as usize - memory.address(0) as usize + past;
            memory.patch(place as usize, target);
        }
    }
}
