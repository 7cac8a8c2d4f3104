//! From instructions to operations: the block, its end, and memory operands.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::block::Block;
use super::cache::no_links;
use super::cold::{self, Body, Cold, Ends};
use super::{Mode, tables};
use crate::cpuid::Baseline;
use crate::exec::branch::{self, Bits16, Bits32, LinkFallThrough, LinkNone};
use crate::exec::op::{Handler, Op, ending, slot, straight};
use crate::exec::segment::{self, ADDRESS_16, ADDRESS_CHECK, ADDRESS_WRITE};

/// Most instructions in a block.
const MAX_INSTRUCTIONS: u32 = 48;

/// Does the block go on behind an instruction?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Continues,
    Ends,
}

/// A CMP or TEST of a register.
#[derive(Debug, Clone, Copy)]
pub(super) struct Comparison {
    /// Where it is in the operations.
    pub(super) at: usize,
    pub(super) bytes: usize,
    pub(super) immediate: bool,
    pub(super) test: bool,
}

/// A block in the making.
pub(super) struct Lowering {
    pub(super) mode: Mode,
    pub(super) baseline: &'static Baseline,
    pub(super) ops: Vec<Op>,
    /// The comparison that is the last operation so far, if it is one that a branch can take in.
    pub(super) comparison: Option<Comparison>,
    #[expect(clippy::vec_box, reason = "operations point to them")]
    cold: Vec<Box<Cold>>,
    /// Offset of the block in its page, which is the address that decoding starts from.
    start: u64,
    instructions: u32,
    apart: Option<Apart>,
}

/// The block that begins with `bytes`, which reach to the end of their page; `offset` is its
/// offset in the page. `None` when not even the first instruction is complete.
pub(super) fn block(
    bytes: &[u8],
    offset: u16,
    mode: Mode,
    baseline: &'static Baseline,
    apart: Option<Apart>,
) -> Option<Block> {
    let mut lowering = Lowering::new(offset, mode, baseline);
    lowering.apart = apart;
    lowering.run(bytes, MAX_INSTRUCTIONS)
}

/// Which instructions are to be blocks of their own.
pub(super) type Apart = fn(&Instruction) -> bool;

/// The block of the first instruction of `bytes` alone.
pub(super) fn single(bytes: &[u8], offset: u16, mode: Mode, baseline: &'static Baseline) -> Block {
    Lowering::new(offset, mode, baseline)
        .run(bytes, 1)
        .unwrap_or_else(|| {
            // Longer than an instruction can be.
            Lowering::new(offset, mode, baseline).undefined_block()
        })
}

/// Do `bytes` begin with a complete instruction (or one that never will be)?
pub(super) fn is_complete(bytes: &[u8], mode: Mode) -> bool {
    let mut decoder = Decoder::new(mode.bits(), bytes, DecoderOptions::NONE);
    let _first = decoder.decode();
    decoder.last_error() != DecoderError::NoMoreBytes
}

impl Lowering {
    fn new(offset: u16, mode: Mode, baseline: &'static Baseline) -> Self {
        Self {
            mode,
            baseline,
            ops: Vec::with_capacity(16),
            comparison: None,
            cold: Vec::new(),
            start: offset.into(),
            instructions: 0,
            apart: None,
        }
    }

    fn run(mut self, bytes: &[u8], mut most: u32) -> Option<Block> {
        let mut decoder =
            Decoder::with_ip(self.mode.bits(), bytes, self.start, DecoderOptions::NONE);
        let mut flow = Flow::Continues;
        let mut instruction = Instruction::default();
        while flow == Flow::Continues && self.instructions < most {
            let at = decoder.position();
            decoder.decode_out(&mut instruction);
            if decoder.last_error() == DecoderError::NoMoreBytes {
                if self.instructions == 0 {
                    return None;
                }
                return Some(self.finish(at, Flow::Continues));
            }
            let apart = self.apart.is_some_and(|apart| apart(&instruction));
            if apart && self.instructions > 0 {
                return Some(self.finish(at, Flow::Continues));
            }
            most = if apart { 1 } else { most };
            if instruction.is_invalid() {
                self.push_undefined(at);
                flow = Flow::Ends;
            } else {
                flow = self.instruction(&instruction);
            }
            self.instructions += 1;
        }
        let bytes = decoder.position();
        Some(self.finish(bytes, flow))
    }

    fn undefined_block(mut self) -> Block {
        self.push_undefined(0);
        self.instructions = 1;
        self.finish(1, Flow::Ends)
    }

    fn push_undefined(&mut self, at: usize) {
        let mut op = blank(straight(tables::undefined));
        op.offset = at as u16;
        self.ops.push(op);
    }

    fn finish(mut self, bytes: usize, flow: Flow) -> Block {
        let linked = self.start as usize + bytes <= 0xfff;
        let mut end = blank(match self.mode {
            Mode::Bits64 if linked => ending(branch::end::<LinkFallThrough>),
            Mode::Bits64 => ending(branch::end::<LinkNone>),
            Mode::Bits32 => ending(branch::end::<Bits32>),
            Mode::Bits16 => ending(branch::end::<Bits16>),
        });
        end.offset = bytes as u16;
        if flow == Flow::Continues {
            self.ops.push(end);
        }
        // Never run; holds the block's length for the last one.
        self.ops.push(end);
        Block {
            ops: self.ops.into_boxed_slice(),
            cold: self.cold.into_boxed_slice(),
            instructions: self.instructions,
            bytes: bytes as u16,
            start: self.start as u16,
            user: false,
            code: std::cell::Cell::new(std::ptr::null()),
            woven: std::cell::Cell::new(false),
            runs: std::cell::Cell::new(0),
            links: no_links(),
            frame: None,
            second: None,
        }
    }

    fn instruction(&mut self, instruction: &Instruction) -> Flow {
        if !tables::is_offered(self.baseline, self.mode, instruction) {
            return self.undefined(instruction);
        }
        if self.mode == Mode::Bits16 && tables::is_general_vex(instruction.mnemonic()) {
            let check = self.op(instruction, straight(tables::check_vex));
            self.ops.push(check);
        }
        if let Some(flow) = self.hot(instruction) {
            return flow;
        }
        if let Some((body, ends)) = cold::body(instruction) {
            return self.cold(instruction, body, ends);
        }
        if let Some(lowered) = crate::float::lower(instruction) {
            let mut op = self.op(instruction, lowered.handler);
            op.dst = lowered.dst;
            op.src = lowered.src;
            op.imm = lowered.imm;
            return self.push(instruction, op);
        }
        self.undefined(instruction)
    }

    /// #UD.
    pub(super) fn undefined(&mut self, instruction: &Instruction) -> Flow {
        self.push_undefined((instruction.ip().wrapping_sub(self.start)) as usize);
        Flow::Ends
    }

    /// A rare instruction.
    pub(super) fn cold(&mut self, instruction: &Instruction, body: Body, ends: Ends) -> Flow {
        let cold = Box::new(Cold {
            body,
            instruction: *instruction,
        });
        let handler = match ends {
            Ends::Never => cold::STRAIGHT,
            Ends::Sometimes => cold::MAY_END,
            Ends::Always => cold::ENDING,
        };
        let mut op = self.op(instruction, handler);
        op.imm = std::ptr::from_ref::<Cold>(&cold).expose_provenance() as u64;
        op.dst = tables::number(instruction.op0_register());
        op.src = tables::number(instruction.op1_register());
        self.cold.push(cold);
        if is_near_branch(instruction) {
            op.disp = self.distance(instruction);
        }
        self.push(instruction, op);
        match ends {
            Ends::Always => Flow::Ends,
            Ends::Never | Ends::Sometimes => Flow::Continues,
        }
    }

    /// From the block's start to a near branch's target.
    pub(super) fn distance(&self, instruction: &Instruction) -> i64 {
        let target = instruction.near_branch_target();
        let distance = target.wrapping_sub(self.start);
        match self.mode {
            Mode::Bits64 => distance as i64,
            _ => (distance as u32 as i32).into(),
        }
    }

    /// Is what lies `distance` from the block's start in the same page?
    pub(super) fn in_page(&self, distance: i64) -> bool {
        (self.start as i64).wrapping_add(distance) >> 12 == 0
    }

    /// Is the instruction behind this one in the same page?
    pub(super) fn next_in_page(&self, instruction: &Instruction) -> bool {
        instruction.next_ip() >> 12 == 0
    }

    /// An operation for the instruction, with nothing but its place.
    pub(super) fn op(&self, instruction: &Instruction, handler: Handler) -> Op {
        let mut op = blank(handler);
        op.offset = instruction.ip().wrapping_sub(self.start) as u16;
        op
    }

    /// Appends an operation, after its memory operand is described.
    pub(super) fn push(&mut self, instruction: &Instruction, mut op: Op) -> Flow {
        let operand = (0..instruction.op_count()).find(|&index| {
            matches!(
                instruction.op_kind(index),
                OpKind::Memory | OpKind::MemorySegRDI | OpKind::MemorySegEDI | OpKind::MemorySegDI
            )
        });
        // XLAT works its address out by itself, string instructions too.
        let by_itself =
            instruction.mnemonic() == Mnemonic::Xlatb || instruction.is_string_instruction();
        if let (Some(operand), false) = (operand, by_itself) {
            self.memory(instruction, operand, &mut op);
        }
        self.ops.push(op);
        Flow::Continues
    }

    /// The slot of the segment base. In 64-bit mode prefixes other than FS and GS mean nothing.
    fn segment(&self, instruction: &Instruction, base: Register) -> u8 {
        let named = instruction.memory_segment();
        let effective = match (self.mode, named, base) {
            (_, Register::FS | Register::GS, _) => named,
            (Mode::Bits64, _, Register::RSP | Register::RBP | Register::ESP | Register::EBP) => {
                Register::SS
            }
            (Mode::Bits64, _, _) => Register::DS,
            _ => named,
        };
        slot::SEGMENT + segment::index_of(effective) as u8
    }

    /// Describes the memory operand in `op`; where the address wraps or is checked, an operation
    /// before it works it out.
    fn memory(&mut self, instruction: &Instruction, operand: u32, op: &mut Op) {
        let (mut index, mut displacement) = (Register::None, 0);
        let base = match instruction.op_kind(operand) {
            OpKind::Memory => {
                // The index of a gather is a vector, which the instruction adds itself.
                if !instruction.is_vsib() {
                    index = instruction.memory_index();
                }
                displacement = instruction.memory_displacement64() as i64;
                instruction.memory_base()
            }
            OpKind::MemorySegRDI => Register::RDI,
            OpKind::MemorySegEDI => Register::EDI,
            _ => Register::DI,
        };
        let bytes = match (base.size(), index.size()) {
            (0, 0) => instruction.memory_displ_size(),
            (0, size) | (size, _) => size as u32,
        };
        let lea = instruction.mnemonic() == Mnemonic::Lea;
        let mut recipe = blank(straight(segment::address));
        recipe.offset = op.offset;
        recipe.base = match base {
            Register::None => slot::ZERO,
            Register::RIP | Register::EIP => slot::RIP,
            _ => tables::number(base),
        };
        if recipe.base == slot::RIP {
            displacement = displacement.wrapping_sub(self.start as i64);
        }
        recipe.index = match index {
            Register::None => slot::ZERO,
            _ => tables::number(index),
        };
        recipe.scale = instruction.memory_index_scale().trailing_zeros() as u8;
        recipe.disp = displacement;
        recipe.seg = self.segment(instruction, base);
        if self.mode == Mode::Bits64 && bytes != 4 {
            op.base = recipe.base;
            op.index = recipe.index;
            op.scale = recipe.scale;
            op.disp = recipe.disp;
            op.seg = recipe.seg;
            return;
        }
        recipe.imm = match instruction.mnemonic() {
            // Legacy region and header; what follows depends on XCR0.
            Mnemonic::Xsave | Mnemonic::Xrstor => crate::float::XSAVE_BYTES as u64,
            _ => (instruction.memory_size().size() as u64).min(0xffff),
        };
        if bytes == 2 {
            recipe.imm |= ADDRESS_16;
        }
        if self.mode != Mode::Bits64 && !lea {
            recipe.imm |= ADDRESS_CHECK;
            if operand == 0 && tables::writes_first(instruction.mnemonic()) {
                recipe.imm |= ADDRESS_WRITE;
            }
        }
        op.base = slot::ADDRESS;
        op.index = slot::ZERO;
        op.scale = 0;
        op.disp = 0;
        op.seg = if self.mode == Mode::Bits64 {
            recipe.seg
        } else {
            slot::ZERO
        };
        self.ops.push(recipe);
    }
}

fn is_near_branch(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
}

fn blank(handler: Handler) -> Op {
    Op {
        handler,
        imm: 0,
        disp: 0,
        dst: 0,
        src: 0,
        base: slot::ZERO,
        index: slot::ZERO,
        scale: 0,
        seg: slot::ZERO,
        offset: 0,
    }
}
