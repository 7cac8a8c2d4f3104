//! x87 instructions: which one it is, the stack, and what exceptions do to destinations
//! (SDM vol. 1, chapter 8; AMD APM vol. 1, chapter 6).

mod arithmetic;
mod compare;
mod integer;
mod remainder;
mod store;
mod transcendental;
mod wide;

use super::super::state::FloatState;
use super::super::x87::{X87Operand, X87Routine};
use super::format::{DOUBLE, SINGLE, extended};
use super::number::{Extremes, Mode, Number, Operand, Rounded, Target, Value, round};
use super::{DENORMAL, DIVIDE, INVALID, OVERFLOW, UNDERFLOW};

const STACK_FAULT: u16 = 1 << 6;
const C0: u16 = 1 << 8;
const C1: u16 = 1 << 9;
const C2: u16 = 1 << 10;
const C3: u16 = 1 << 14;
/// By how much the exponent of a result is moved when overflow or underflow is not masked.
const ADJUSTMENT: i32 = 24_576;

/// Runs one x87 instruction on the registers in `state`; `flags` are those of RFLAGS, for
/// conditional moves and comparisons, and what comes back is what they are then.
///
/// `state` must have no exception pending. Afterwards it may have one; then the destination is
/// as the processor leaves it. Instruction and data pointers are not touched.
pub(in super::super) fn x87(
    routine: X87Routine,
    state: &mut FloatState,
    operand: &mut X87Operand,
    flags: u64,
) -> u64 {
    debug_assert!(!state.exception_pending());
    let mut stack = Stack {
        state,
        flags,
        faulted: false,
    };
    let c1 = stack.state.status & C1;
    stack.condition(C1, false);
    if let Some(memory) = routine.0.checked_sub(X87Routine::MEMORY) {
        stack.memory_form((memory >> 3) as u8 & 7, memory as u8 & 7, &mut operand.0);
    } else {
        let (escape, form) = ((routine.0 >> 6) as u8, routine.0 as u8 & 0x3f);
        stack.register_form(escape, form);
        // FCMOV, FCOMI and FUCOMI clear C1 in a stack fault only, and else leave it alone.
        if keeps_c1(escape, form) && !stack.faulted {
            stack.condition(C1, c1 != 0);
        }
    }
    stack.state.summarise();
    stack.flags
}

/// The register stack, while one instruction runs.
struct Stack<'a> {
    state: &'a mut FloatState,
    flags: u64,
    /// A register was empty, or none was free.
    faulted: bool,
}

/// The basic operations, as the middle field of opcodes numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Basic {
    Add,
    Multiply,
    Subtract,
    SubtractReversed,
    Divide,
    DivideReversed,
}

impl Basic {
    /// `None`: a comparison.
    fn from_group(group: u8) -> Option<Self> {
        Some(match group {
            0 => Self::Add,
            1 => Self::Multiply,
            4 => Self::Subtract,
            5 => Self::SubtractReversed,
            6 => Self::Divide,
            7 => Self::DivideReversed,
            _ => return None,
        })
    }
}

/// Whether comparisons take quiet NaNs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quiet {
    Invalid,
    Unordered,
}

impl Stack<'_> {
    fn register_form(&mut self, escape: u8, form: u8) {
        let (group, index) = (form >> 3 & 7, usize::from(form & 7));
        match (escape, group) {
            (0, 2 | 3) => self.compare_registers(index, Quiet::Invalid, usize::from(group == 3)),
            (0, _) => self.basic_registers(group, 0, index, 0),
            (1, 0) => self.load_register(index),
            (1 | 5 | 7, 1) => self.exchange(index),
            (1, 3) => self.store_unchecked(index),
            (1, _) => self.single_operand(form),
            (2 | 3, 0..=3) => self.conditional_move(escape, group, index),
            (2, 5) => self.compare_registers(1, Quiet::Unordered, 2),
            (3, 5) => self.compare_to_flags(index, Quiet::Unordered, 0),
            (3, 6) => self.compare_to_flags(index, Quiet::Invalid, 0),
            (4, 2 | 3) => self.compare_registers(index, Quiet::Invalid, usize::from(group == 3)),
            // The order of subtraction and division is the other way round.
            (4, _) => self.basic_registers(swapped(group), index, 0, 0),
            (5, 0) => self.free(index),
            (5, 2) => self.store_register(index, 0),
            (5 | 7, 3) | (7, 2) => self.store_register(index, 1),
            (5, 4) => self.compare_registers(index, Quiet::Unordered, 0),
            (5, 5) => self.compare_registers(index, Quiet::Unordered, 1),
            (6, 2) => self.compare_registers(index, Quiet::Invalid, 1),
            (6, 3) => self.compare_registers(1, Quiet::Invalid, 2),
            (6, _) => self.basic_registers(swapped(group), index, 0, 1),
            (7, 0) => {
                self.free(index);
                self.pop(1);
            }
            (7, 5) => self.compare_to_flags(index, Quiet::Unordered, 1),
            (7, 6) => self.compare_to_flags(index, Quiet::Invalid, 1),
            _ => {}
        }
    }

    /// D9 D0 to D9 FF.
    fn single_operand(&mut self, form: u8) {
        match form {
            0x20 => self.change_sign(|register| register ^ 1 << 79),
            0x21 => self.change_sign(|register| register & !(1 << 79)),
            0x24 => self.test(),
            0x25 => self.examine(),
            0x28..=0x2e => self.load_constant(form),
            0x30 => self.power(),
            0x31 => self.logarithm(),
            0x32 => self.tangent(),
            0x33 => self.arctangent(),
            0x34 => self.extract(),
            0x35 => self.partial_remainder(Mode::Nearest),
            0x36 => self.turn(7),
            0x37 => self.turn(1),
            0x38 => self.partial_remainder(Mode::Truncate),
            0x39 => self.logarithm_plus_one(),
            0x3a => self.root(),
            0x3b => self.sine_and_cosine(),
            0x3c => self.round_to_integral(),
            0x3d => self.scale(),
            0x3e => self.sine(),
            0x3f => self.cosine(),
            _ => {}
        }
    }

    fn memory_form(&mut self, escape: u8, group: u8, memory: &mut [u8; 16]) {
        match (escape, group) {
            (0 | 2 | 4 | 6, 2 | 3) => {
                self.compare_memory(&read(escape, memory), usize::from(group == 3));
            }
            (0 | 2 | 4 | 6, _) => self.basic_memory(group, &read(escape, memory)),
            (1 | 5, 0) => self.load_memory(&read(escape - 1, memory)),
            (3 | 7, 0) => self.load_memory(&read(escape - 1, memory)),
            (1, 2 | 3) => self.store_float(SINGLE, memory, usize::from(group == 3)),
            (5, 2 | 3) => self.store_float(DOUBLE, memory, usize::from(group == 3)),
            (3, 5) => self.push_register(load_bytes(memory, 10)),
            (3, 7) => self.store_extended(memory),
            (7, 4) => self.load_decimal(memory),
            (7, 5) => self.push_register(integer::from_i64(load_bytes(memory, 8) as i64)),
            (7, 6) => self.store_decimal(memory),
            (7, 7) => self.store_integer(64, self.mode(), memory, 1),
            (3 | 5 | 7, 1..=3) => {
                let bits = match escape {
                    3 => 32,
                    5 => 64,
                    _ => 16,
                };
                let mode = if group == 1 {
                    Mode::Truncate
                } else {
                    self.mode()
                };
                self.store_integer(bits, mode, memory, usize::from(group != 2));
            }
            _ => {}
        }
    }

    // The state's parts.

    fn condition(&mut self, bit: u16, value: bool) {
        self.state.status = self.state.status & !bit | if value { bit } else { 0 };
    }

    fn unmasked(&self, flags: u32) -> bool {
        flags & !u32::from(self.state.control) & 0x3f != 0
    }

    /// Sets flags of the status word; `false` when one is not masked.
    fn raise(&mut self, flags: u32) -> bool {
        self.state.status |= flags as u16;
        !self.unmasked(flags)
    }

    /// The stack has no such register, or no room; `false` when that is not masked.
    fn stack_fault(&mut self, overflow: bool) -> bool {
        self.faulted = true;
        self.state.status |= STACK_FAULT;
        self.condition(C1, overflow);
        self.raise(INVALID)
    }

    fn mode(&self) -> Mode {
        Mode::from_field(u32::from(self.state.control >> 10))
    }

    /// What arithmetic that obeys precision control rounds to.
    fn precision(&self) -> Target {
        extended::target(match self.state.control >> 8 & 3 {
            0 => 24,
            2 => 53,
            _ => 64,
        })
    }

    fn physical(&self, index: usize) -> u8 {
        1 << ((self.state.top() + index) & 7)
    }

    fn is_empty(&self, index: usize) -> bool {
        self.state.tags & self.physical(index) == 0
    }

    fn get(&self, index: usize) -> u128 {
        self.state.st[index & 7]
    }

    fn operand(&self, index: usize) -> Operand {
        extended::unpack(self.get(index))
    }

    fn set(&mut self, index: usize, register: u128) {
        self.state.st[index & 7] = register;
        self.state.tags |= self.physical(index);
    }

    fn free(&mut self, index: usize) {
        self.state.tags &= !self.physical(index);
    }

    fn turn(&mut self, by: usize) {
        self.state.rotate_to((self.state.top() + by) & 7);
    }

    fn pop(&mut self, count: usize) {
        for _ in 0..count {
            self.free(0);
            self.turn(1);
        }
    }

    fn push(&mut self, register: u128) {
        self.turn(7);
        self.set(0, register);
    }

    /// Pushes, if there is room.
    fn push_register(&mut self, register: u128) {
        if self.is_empty(7) {
            self.push(register);
        } else if self.stack_fault(true) {
            self.push(extended::INDEFINITE);
        }
    }

    /// Are the registers in use? If not, and that is masked, the first becomes indefinite.
    fn present(&mut self, indices: &[usize]) -> bool {
        if indices.iter().all(|index| !self.is_empty(*index)) {
            return true;
        }
        if self.stack_fault(false) {
            self.set(indices[0], extended::INDEFINITE);
        }
        false
    }

    // Results.

    /// Rounds a result for a register, and raises its exceptions. They are found after the
    /// result, which therefore is stored in any case.
    fn rounded(&mut self, number: Number, target: Target) -> u128 {
        let rounded = self.round(number, target);
        self.raise(rounded.flags);
        self.condition(C1, rounded.away);
        extended::pack(number.negative, rounded)
    }

    fn round(&self, number: Number, target: Target) -> Rounded {
        let exceptions = (OVERFLOW | UNDERFLOW) & !u32::from(self.state.control);
        let extremes = if exceptions == 0 {
            Extremes::Gradual
        } else {
            Extremes::Adjust {
                exceptions,
                by: ADJUSTMENT,
            }
        };
        round(number, target, self.mode(), extremes)
    }

    /// A value as a register; `None` when an exception that is not masked forbids it.
    fn register_of(&mut self, value: Value, target: Target) -> Option<u128> {
        match value {
            Value::Zero(negative) => Some(extended::zero(negative)),
            Value::Infinity(negative) => Some(extended::infinity(negative)),
            Value::Finite(number) => Some(self.rounded(number, target)),
            Value::Invalid => self.raise(INVALID).then_some(extended::INDEFINITE),
            Value::DivisionByZero(negative) => {
                self.raise(DIVIDE).then_some(extended::infinity(negative))
            }
        }
    }

    /// Raises what is found before anything is computed; `Err` has the result, if any, when one
    /// of the operands is a NaN or no number at all.
    fn check_operands(&mut self, operands: &[&Operand]) -> Result<(), Option<u128>> {
        let invalid = operands
            .iter()
            .fold(0, |flags, operand| flags | operand.invalid());
        if operands
            .iter()
            .any(|operand| operand.class == super::number::Class::Unsupported)
        {
            return Err(self.raise(INVALID).then_some(extended::INDEFINITE));
        }
        if operands.iter().any(|operand| operand.is_nan()) {
            if !self.raise(invalid) {
                return Err(None);
            }
            return Err(Some(arithmetic::propagate(operands)));
        }
        Ok(())
    }

    /// Raises the denormal exception; `false` when it is not masked.
    fn check_denormal(&mut self, operands: &[&Operand]) -> bool {
        let denormal = operands.iter().any(|operand| operand.denormal);
        !denormal || self.raise(DENORMAL)
    }
}

/// Is it an instruction that leaves C1 alone: DA and DB C0 to DF, DB and DF E8 to F7?
fn keeps_c1(escape: u8, form: u8) -> bool {
    match escape {
        2 => form < 0x20,
        3 => !(0x20..0x28).contains(&form),
        7 => form >= 0x28,
        _ => false,
    }
}

/// DC and DE have SUB and SUBR, DIV and DIVR in the other order.
fn swapped(group: u8) -> u8 {
    if group >= 4 { group ^ 1 } else { group }
}

fn load_bytes(memory: &[u8; 16], count: usize) -> u128 {
    let mut bytes = [0; 16];
    bytes[..count].copy_from_slice(&memory[..count]);
    u128::from_le_bytes(bytes)
}

/// The memory operand of D8, DA, DC and DE.
fn read(escape: u8, memory: &[u8; 16]) -> Operand {
    match escape {
        0 => SINGLE.unpack(load_bytes(memory, 4) as u64),
        2 => integer::operand(i64::from(load_bytes(memory, 4) as i32)),
        4 => DOUBLE.unpack(load_bytes(memory, 8) as u64),
        _ => integer::operand(i64::from(load_bytes(memory, 2) as i16)),
    }
}
