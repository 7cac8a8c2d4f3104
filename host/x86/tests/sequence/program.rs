//! A program in the making: its bytes, and what is known of the state at each of them.

use iced_x86::{
    Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, RflagsBits,
};

use crate::compare::{AF, ARITHMETIC, CF, OF, ZF, operand_size};
use crate::layout::*;

pub(crate) const RAX: usize = 0;
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
pub(crate) const RSP: usize = 4;
pub(crate) const RBP: usize = 5;
pub(crate) const RSI: usize = 6;
pub(crate) const RDI: usize = 7;

/// Bytes of code at most, the tables behind it included.
pub(crate) const ROOM: usize = 2 * PAGE;

/// What a general register may be, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    pub(crate) low: u64,
    pub(crate) high: u64,
}

impl Range {
    pub(crate) fn exactly(value: u64) -> Self {
        Self {
            low: value,
            high: value,
        }
    }

    pub(crate) fn value(self) -> Option<u64> {
        (self.low == self.high).then_some(self.low)
    }
}

/// What is known of the state where the next instruction will be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) registers: [Option<Range>; 16],
    /// Flags of RFLAGS that are undefined.
    pub(crate) undefined: u64,
    /// RSP, the same on every way that leads here.
    pub(crate) stack: u64,
}

/// Where a displacement of four bytes is to be filled in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hole {
    /// Offset of the displacement.
    at: usize,
    /// Relative to the address behind it, and so many bytes further.
    behind: Option<u64>,
    /// To the address of a word with the target, in the table.
    by_table: bool,
}

/// A word behind the code that has an address in it.
#[derive(Clone, Copy, Debug)]
struct Word {
    hole: Hole,
    first: usize,
}

/// Code that is being written.
pub(crate) struct Program {
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) known: Known,
    /// Registers that nothing but their loop may write.
    pub(crate) reserved: u16,
    /// Where instructions begin, and the flags that are undefined there.
    pub(crate) borders: Vec<(u64, u64)>,
    /// Immediates that the program changes, and what they were.
    pub(crate) patches: Vec<(u64, u32)>,
    words: Vec<Word>,
    table: Vec<u64>,
    encoder: Encoder,
    information: InstructionInfoFactory,
}

impl Program {
    pub(crate) fn new(start: u64, stack: u64) -> Self {
        Self {
            start,
            bytes: Vec::with_capacity(ROOM),
            known: Known {
                registers: [None; 16],
                undefined: 0,
                stack,
            },
            reserved: 1 << RSP,
            borders: Vec::new(),
            patches: Vec::new(),
            words: Vec::new(),
            table: Vec::new(),
            encoder: Encoder::new(64),
            information: InstructionInfoFactory::new(),
        }
    }

    pub(crate) fn here(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    pub(crate) fn is_reserved(&self, register: usize) -> bool {
        self.reserved >> register & 1 != 0
    }

    /// Appends an instruction unless it writes a reserved register or has no encoding.
    pub(crate) fn emit(&mut self, instruction: &Instruction) -> bool {
        self.emit_with(instruction, 0)
    }

    /// The same for one that may write some reserved registers.
    pub(crate) fn emit_with(&mut self, instruction: &Instruction, allowed: u16) -> bool {
        let written = self.written(instruction);
        if written & self.reserved & !allowed != 0 {
            return false;
        }
        if flags(instruction.rflags_read()) & self.known.undefined != 0 {
            self.define_flags();
        }
        let here = self.here();
        if self.encoder.encode(instruction, here).is_err() {
            // What it wrote of the instruction is dropped.
            drop(self.encoder.take_buffer());
            return false;
        }
        let bytes = self.encoder.take_buffer();
        self.border();
        self.bytes.extend_from_slice(&bytes);
        self.forget(written);
        let keeps = keeps_flags(instruction);
        let modified = if keeps {
            0
        } else {
            flags(instruction.rflags_modified())
        };
        self.known.undefined &= !modified;
        self.known.undefined |= flags(instruction.rflags_undefined()) | shifted_out(instruction);
        true
    }

    /// Appends bytes that are one instruction, which changes neither flags nor registers but RSP.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.border();
        self.bytes.extend_from_slice(bytes);
    }

    /// The same, with a displacement or immediate of four bytes to be filled in later.
    pub(crate) fn raw_with_hole(&mut self, opcode: &[u8], relative: bool) -> Hole {
        self.raw(opcode);
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        Hole {
            at,
            behind: relative.then_some(0),
            by_table: false,
        }
    }

    /// The hole in an instruction that finds its target in the table.
    pub(crate) fn raw_by_table(&mut self, opcode: &[u8]) -> Hole {
        let mut hole = self.raw_with_hole(opcode, true);
        hole.by_table = true;
        hole
    }

    /// The hole in an instruction that has so many bytes behind it.
    pub(crate) fn raw_with_hole_before(&mut self, opcode: &[u8], behind: &[u8]) -> Hole {
        let mut hole = self.raw_with_hole(opcode, true);
        self.bytes.extend_from_slice(behind);
        hole.behind = Some(behind.len() as u64);
        hole
    }

    pub(crate) fn fill(&mut self, hole: Hole, target: u64) {
        if hole.by_table {
            self.fill_with_table(hole, &[target]);
            return;
        }
        let value = match hole.behind {
            Some(bytes) => target.wrapping_sub(self.start + hole.at as u64 + 4 + bytes),
            None => target,
        };
        self.bytes[hole.at..hole.at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    }

    /// The hole gets the address of a table behind the code with these addresses.
    pub(crate) fn fill_with_table(&mut self, mut hole: Hole, targets: &[u64]) {
        hole.by_table = false;
        let first = self.table.len();
        self.table.extend_from_slice(targets);
        self.words.push(Word { hole, first });
    }

    fn border(&mut self) {
        self.borders.push((self.here(), self.known.undefined));
    }

    /// General registers that an instruction writes, as bits.
    fn written(&mut self, instruction: &Instruction) -> u16 {
        let information = self.information.info(instruction);
        let mut written = 0;
        for used in information.used_registers() {
            let register = used.register();
            let writes = matches!(
                used.access(),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            );
            if writes && register.is_gpr() {
                written |= 1 << register.full_register().number();
            }
        }
        written
    }

    pub(crate) fn forget(&mut self, registers: u16) {
        for (index, range) in self.known.registers.iter_mut().enumerate() {
            if registers >> index & 1 != 0 {
                *range = None;
            }
        }
    }

    /// Nothing is known of registers but of those that loops have to themselves.
    pub(crate) fn forget_all(&mut self) {
        self.forget(!self.reserved);
    }

    /// What is known on one way and on another.
    pub(crate) fn join(&mut self, other: &Known) {
        for (mine, other) in self.known.registers.iter_mut().zip(other.registers) {
            if *mine != other {
                *mine = None;
            }
        }
        self.known.undefined |= other.undefined;
        assert_eq!(self.known.stack, other.stack, "both ways have the same RSP");
    }

    /// Defines all arithmetic flags.
    pub(crate) fn define_flags(&mut self) {
        // CMP of two registers that follow from where it is.
        let at = self.bytes.len() as u8;
        self.raw(&[0x48, 0x39, 0xc0 | (at & 0x3f)]);
        self.known.undefined = 0;
    }

    /// Puts a number into a register.
    pub(crate) fn set(&mut self, register: usize, value: u64) {
        let low = register as u8 & 7;
        let high = register as u8 >> 3;
        if value <= u64::from(u32::MAX) {
            let mut code = vec![0xb8 | low];
            if high != 0 {
                code.insert(0, 0x41);
            }
            code.extend_from_slice(&(value as u32).to_le_bytes());
            self.raw(&code);
        } else {
            self.set_wide(register, value);
        }
        self.known.registers[register] = Some(Range::exactly(value));
    }

    /// The same in ten bytes, whatever the number.
    pub(crate) fn set_wide(&mut self, register: usize, value: u64) {
        let mut code = vec![0x48 | register as u8 >> 3, 0xb8 | register as u8 & 7];
        code.extend_from_slice(&value.to_le_bytes());
        self.raw(&code);
        self.known.registers[register] = Some(Range::exactly(value));
    }

    /// Moves RSP, by LEA.
    pub(crate) fn move_stack(&mut self, to: u64) {
        let distance = to.wrapping_sub(self.known.stack) as u32;
        let mut code = vec![0x48, 0x8d, 0xa4, 0x24];
        code.extend_from_slice(&distance.to_le_bytes());
        self.raw(&code);
        self.known.stack = to;
    }

    /// Undoes what the program did to its own code; where this ends, the program ends.
    pub(crate) fn finish(&mut self) {
        for (address, value) in std::mem::take(&mut self.patches) {
            let hole = self.raw_with_hole_before(&[0xc7, 0x05], &value.to_le_bytes());
            self.fill(hole, address);
        }
        self.border();
    }

    /// The tables, to be put at the address.
    pub(crate) fn place_tables(&mut self, at: u64) -> Vec<u8> {
        for word in std::mem::take(&mut self.words) {
            self.fill(word.hole, at + 8 * word.first as u64);
        }
        self.table
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }
}

/// RFLAGS as the decoder names them.
pub(crate) fn flags(bits: u32) -> u64 {
    let pairs = [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, OF),
    ];
    let named = pairs.into_iter().filter(|(bit, _)| bits & bit != 0);
    named.fold(0, |flags, (_, flag)| flags | flag)
}

/// May the instruction leave flags as they were?
fn keeps_flags(instruction: &Instruction) -> bool {
    let last = instruction.op_count().saturating_sub(1);
    let immediate = instruction.op_kind(last) == OpKind::Immediate8;
    match instruction.mnemonic() {
        // By the operand's size and one, nothing changes.
        Mnemonic::Rcl | Mnemonic::Rcr => !immediate || instruction.immediate8() != 1,
        _ if is_shift(instruction) => !immediate,
        _ => instruction.has_rep_prefix() || instruction.has_repne_prefix(),
    }
}

fn is_shift(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        instruction.mnemonic(),
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd
    )
}

/// Undefined flags that depend on counts, some of which the decoder does not look at.
fn shifted_out(instruction: &Instruction) -> u64 {
    use Mnemonic::*;
    let last = instruction.op_count().saturating_sub(1);
    let one = instruction.op_kind(last) == OpKind::Immediate8 && instruction.immediate8() == 1;
    // Bits may be shifted out twice over.
    let narrow = if operand_size(instruction) < 32 {
        CF
    } else {
        0
    };
    match instruction.mnemonic() {
        Shl | Sal | Shr | Sar if one => AF,
        Sar => AF | OF,
        Shl | Sal | Shr | Shld | Shrd => narrow | AF | OF,
        Rol | Ror | Rcl | Rcr if !one => OF,
        Div | Idiv => ARITHMETIC,
        Bsf | Bsr => ARITHMETIC & !ZF,
        _ => 0,
    }
}
