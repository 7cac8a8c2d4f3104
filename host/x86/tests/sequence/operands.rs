//! Instructions that only compute: registers by chance, memory operands that are in the scratch memory.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use crate::forms::BYTE_REGISTERS;
use crate::layout::*;
use crate::program::*;
use crate::random::Random;

/// Above what programs push, so that nothing stored here is returned to.
const ABOVE: u64 = STACK + 0x900;
const ABOVE_BYTES: u64 = 0x600;
/// How far a register reaches that is made an index.
const INDEX: u64 = 0xff;

/// Appends an instance of one of the forms; false when no draw fitted.
pub(crate) fn plain(program: &mut Program, random: &mut Random, codes: &[Code]) -> bool {
    for _ in 0..8 {
        if codes.is_empty() {
            return false;
        }
        let code = random.pick(codes);
        if instance(program, random, code) {
            return true;
        }
    }
    false
}

fn instance(program: &mut Program, random: &mut Random, code: Code) -> bool {
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    let memory = random.chance(60);
    for operand in 0..code.op_code().op_count() {
        let kind = code.op_code().op_kind(operand);
        match register(random, kind, memory) {
            Some(register) => {
                instruction.set_op_kind(operand, OpKind::Register);
                instruction.set_op_register(operand, register);
            }
            None if !constant(random, &mut instruction, operand, kind) => return false,
            None => {}
        }
    }
    let operand =
        (0..instruction.op_count()).find(|operand| instruction.op_kind(*operand) == OpKind::Memory);
    if let Some(operand) = operand {
        let lockable = code.op_code().can_use_lock_prefix() && operand == 0;
        instruction.set_has_lock_prefix(lockable && random.chance(20));
        let absolute = code.op_code().op_kind(operand) == OpCodeOperandKind::mem_offs;
        if code.mnemonic() == Mnemonic::Lea {
            any_address(random, &mut instruction);
        } else if absolute {
            let size = instruction.memory_size().size() as u64;
            instruction.set_memory_displ_size(8);
            instruction.set_memory_displacement64(data_address(random, size, 1));
        } else {
            memory_operand(program, random, &mut instruction);
            if !bit_offset(program, random, &instruction) {
                return false;
            }
        }
    }
    program.emit(&instruction)
}

fn general(random: &mut Random, first: Register) -> Register {
    let number = random.below(15) as u32;
    first
        + if number >= RSP as u32 {
            number + 1
        } else {
            number
        }
}

fn register(random: &mut Random, kind: OpCodeOperandKind, memory: bool) -> Option<Register> {
    use OpCodeOperandKind::*;
    use std::option::Option::None;
    Some(match kind {
        r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem | ymm_or_mem
            if memory =>
        {
            return None;
        }
        r8_or_mem | r8_reg | r8_opcode => random.pick(&BYTE_REGISTERS[1..]),
        r16_or_mem | r16_reg | r16_rm | r16_opcode => general(random, Register::AX),
        r32_or_mem | r32_reg | r32_rm | r32_opcode | r32_vvvv => general(random, Register::EAX),
        r64_or_mem | r64_reg | r64_rm | r64_opcode | r64_vvvv => general(random, Register::RAX),
        mm_or_mem | mm_reg | mm_rm => Register::MM0 + random.below(8) as u32,
        xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 => {
            Register::XMM0 + random.below(16) as u32
        }
        ymm_or_mem | ymm_reg | ymm_rm | ymm_vvvv | ymm_is4 => {
            Register::YMM0 + random.below(16) as u32
        }
        al => Register::AL,
        cl => Register::CL,
        ax => Register::AX,
        dx => Register::DX,
        eax => Register::EAX,
        rax => Register::RAX,
        st0 => Register::ST0,
        sti_opcode => Register::ST0 + random.below(8) as u32,
        _ => return None,
    })
}

/// Immediates, and that an operand is in memory.
fn constant(
    random: &mut Random,
    instruction: &mut Instruction,
    operand: u32,
    kind: OpCodeOperandKind,
) -> bool {
    use OpCodeOperandKind::*;
    let value = random.integer();
    let (op_kind, value) = match kind {
        mem | mem_offs | r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem
        | xmm_or_mem | ymm_or_mem => {
            instruction.set_op_kind(operand, OpKind::Memory);
            return true;
        }
        imm8_const_1 => (OpKind::Immediate8, 1),
        imm8 => (OpKind::Immediate8, value as u8 as u64),
        imm8sex16 => (OpKind::Immediate8to16, value as i8 as u64),
        imm8sex32 => (OpKind::Immediate8to32, value as i8 as u64),
        imm8sex64 => (OpKind::Immediate8to64, value as i8 as u64),
        imm16 => (OpKind::Immediate16, value as u16 as u64),
        imm32 => (OpKind::Immediate32, value as u32 as u64),
        imm32sex64 => (OpKind::Immediate32to64, value as i32 as u64),
        imm64 => (OpKind::Immediate64, value),
        _ => return false,
    };
    instruction.set_op_kind(operand, op_kind);
    match op_kind {
        OpKind::Immediate8 => instruction.set_immediate8(value as u8),
        OpKind::Immediate8to16 => instruction.set_immediate8to16(value as i16),
        OpKind::Immediate8to32 => instruction.set_immediate8to32(value as i32),
        OpKind::Immediate8to64 => instruction.set_immediate8to64(value as i64),
        OpKind::Immediate16 => instruction.set_immediate16(value as u16),
        OpKind::Immediate32 => instruction.set_immediate32(value as u32),
        OpKind::Immediate32to64 => instruction.set_immediate32to64(value as i64),
        _ => instruction.set_immediate64(value),
    }
    true
}

/// An address for LEA, which leads nowhere.
fn any_address(random: &mut Random, instruction: &mut Instruction) {
    let short = random.chance(15);
    let registers = if short { Register::EAX } else { Register::RAX };
    if random.chance(90) {
        instruction.set_memory_base(registers + random.below(16) as u32);
    }
    if random.chance(60) {
        instruction.set_memory_index(general(random, registers));
        instruction.set_memory_index_scale(random.pick(&[1, 2, 4, 8]));
    }
    if random.chance(60) || instruction.memory_base() == Register::None {
        let value = random.integer() as i32 as u64;
        let value = if short { value & 0xffff_ffff } else { value };
        instruction.set_memory_displ_size(if short { 4 } else { 8 });
        instruction.set_memory_displacement64(value);
    }
}

/// BT and its family reach beyond their operand by a register; false when that is one of the operand's.
fn bit_offset(program: &mut Program, random: &mut Random, instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let register = instruction.op1_register();
    let reaches = matches!(instruction.mnemonic(), Bt | Bts | Btr | Btc) && register.is_gpr();
    if !reaches {
        return true;
    }
    let register = register.full_register();
    let number = register.number();
    let address = [instruction.memory_base(), instruction.memory_index()];
    if program.is_reserved(number) || address.map(Register::full_register).contains(&register) {
        return false;
    }
    // At most 64 bytes to either side, which operands are away from the ends.
    let offset = random.below(0x400).wrapping_sub(0x200);
    program.set_wide(number, offset);
    true
}

/// May the instruction's operand of 16 bytes and more be anywhere?
fn is_aligned_only(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let legacy = instruction.code().encoding() == EncodingKind::Legacy;
    match instruction.mnemonic() {
        Movups | Movupd | Movdqu | Lddqu => false,
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => true,
        _ => legacy,
    }
}

fn is_locked(instruction: &Instruction) -> bool {
    instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg
}

/// An address for an operand of `size` bytes: aligned, not, across lines and pages.
pub(crate) fn data_address(random: &mut Random, size: u64, alignment: u64) -> u64 {
    let size = size.max(1);
    // Far enough from both ends for bits by offset.
    let room = DATA_BYTES as u64 - size - 0x100;
    let any = DATA + 0x80;
    let address = match random.below(20) {
        0..=5 => any + random.below(room / 64) * 64,
        6..=9 => any + random.below(room / size) / 2 * size,
        10..=12 if size > 1 => DATA + PAGE as u64 - 1 - random.below(size - 1),
        13..=15 if size > 1 => any + 63 + random.below(room / 64 - 1) * 64 - random.below(size - 1),
        // Few places, so that stores and loads meet.
        16 | 17 => any + random.below(64),
        _ => any + random.below(room),
    };
    address & !(alignment - 1)
}

/// Chooses address and form of the memory operand, and puts into registers what leads there.
pub(crate) fn memory_operand(
    program: &mut Program,
    random: &mut Random,
    instruction: &mut Instruction,
) {
    let size = instruction.memory_size().size() as u64;
    let alignment = match size {
        // A lock across lines stops the whole host for a while.
        1..=8 if is_locked(instruction) && !random.chance(3) => size.next_power_of_two(),
        16.. if is_aligned_only(instruction) && !random.chance(1) => {
            16.max(size.next_power_of_two().min(32))
        }
        _ => 1,
    };
    let address = data_address(random, size, alignment);
    match random.below(16) {
        // [RIP + displacement]
        0 => place(instruction, Register::RIP, address),
        // [displacement]
        1 => place(instruction, Register::None, address),
        // [RSP + displacement], sometimes with an index.
        2..=4 => {
            let at = (ABOVE + random.below(ABOVE_BYTES - size)) & !(alignment - 1);
            place(
                instruction,
                Register::RSP,
                at.wrapping_sub(program.known.stack),
            );
            if alignment == 1 && size < 64 && random.chance(20) {
                index(program, random, instruction);
            }
        }
        // [base + index * scale + displacement]
        5..=9 if alignment == 1 && size <= 32 => indexed(program, random, instruction, size),
        // [base of 32 bits + displacement]
        10 => {
            let base = pointer(program, random, address);
            let displacement = address.wrapping_sub(base.1) & 0xffff_ffff;
            place(instruction, Register::EAX + base.0 as u32, displacement);
        }
        _ => {
            let base = pointer(program, random, address);
            let displacement = address.wrapping_sub(base.1);
            place(instruction, Register::RAX + base.0 as u32, displacement);
        }
    }
    if random.below(400) == 0 {
        // In the page behind, which does not exist.
        let beyond = DATA + DATA_BYTES as u64 - size / 2;
        instruction.set_memory_index(Register::None);
        place(instruction, Register::RIP, beyond);
    }
}

fn place(instruction: &mut Instruction, base: Register, displacement: u64) {
    instruction.set_memory_base(base);
    let size = match base {
        _ if displacement == 0 => 0,
        Register::None => 4,
        _ if base.is_gpr32()
            && displacement as u32 as i32 == i32::from(displacement as u8 as i8) =>
        {
            1
        }
        _ if base.is_gpr32() => 4,
        _ if displacement as i64 == i64::from(displacement as i8) => 1,
        _ => 8,
    };
    instruction.set_memory_displ_size(size);
    instruction.set_memory_displacement64(displacement);
}

/// A register that has an address in the scratch memory exactly, and which.
fn pointer(program: &mut Program, random: &mut Random, near: u64) -> (usize, u64) {
    let first = random.below(16) as usize;
    let found = (0..16).map(|index| (first + index) % 16).find_map(|index| {
        let value = program.known.registers[index]?.value()?;
        let inside = value.wrapping_sub(DATA) < DATA_BYTES as u64;
        (inside && !program.is_reserved(index)).then_some((index, value))
    });
    if let Some(found) = found.filter(|_| random.chance(80)) {
        return found;
    }
    let register = free(program, random);
    let distance = match random.below(3) {
        0 => 0,
        1 => random.below(256).wrapping_sub(128),
        _ => random.below(0x1000).wrapping_sub(0x800),
    };
    let value = near.wrapping_sub(distance);
    program.set(register, value);
    (register, value)
}

/// A register that no loop has to itself.
pub(crate) fn free(program: &Program, random: &mut Random) -> usize {
    let first = random.below(16) as usize;
    (0..16)
        .map(|index| (first + index) % 16)
        .find(|index| !program.is_reserved(*index))
        .expect("loops take a few registers only")
}

/// Adds an index to an operand that has 255 times the scale of room behind it; answers how far it leads.
fn index(program: &mut Program, random: &mut Random, instruction: &mut Instruction) -> Range {
    let base = instruction.memory_base().number();
    let first = random.below(16) as usize;
    let known = (0..16).map(|index| (first + index) % 16).find(|index| {
        let range = program.known.registers[*index];
        *index != RSP && *index != base && range.is_some_and(|range| range.high <= INDEX)
    });
    let register = match known.filter(|_| random.chance(70)) {
        Some(register) => register,
        None => {
            let mut register = free(program, random);
            while register == base {
                register = free(program, random);
            }
            bound(program, random, register);
            register
        }
    };
    let scale = match instruction.memory_base() {
        Register::RSP => 1,
        _ => random.pick(&[1, 2, 4, 8]),
    };
    instruction.set_memory_index(Register::RAX + register as u32);
    instruction.set_memory_index_scale(scale);
    let range = program.known.registers[register].unwrap_or(Range {
        low: 0,
        high: INDEX,
    });
    Range {
        low: range.low * u64::from(scale),
        high: range.high * u64::from(scale),
    }
}

/// Makes a register at most [`INDEX`].
fn bound(program: &mut Program, random: &mut Random, register: usize) {
    let mut instruction = Instruction::new();
    let narrow = Register::EAX + register as u32;
    let byte = match register {
        RAX..=RBX => Register::AL + register as u32,
        _ => Register::SPL + (register - RSP) as u32,
    };
    instruction.set_op0_kind(OpKind::Register);
    instruction.set_op0_register(narrow);
    match random.below(3) {
        0 => {
            instruction.set_code(Code::Movzx_r32_rm8);
            instruction.set_op1_kind(OpKind::Register);
            instruction.set_op1_register(byte);
        }
        1 => {
            instruction.set_code(Code::And_rm32_imm32);
            instruction.set_op1_kind(OpKind::Immediate32);
            instruction.set_immediate32(random.pick(&[0x1f, 0x38, 0xff, 0xf0]));
        }
        _ => {
            program.set(register, random.below(INDEX + 1));
            return;
        }
    }
    let done = program.emit(&instruction);
    assert!(done, "the register is free");
    program.known.registers[register] = Some(Range {
        low: 0,
        high: INDEX,
    });
}

/// Base, or a loop's pointer, and index.
fn indexed(program: &mut Program, random: &mut Random, instruction: &mut Instruction, size: u64) {
    // A place with room for the index behind it.
    let low = DATA + 0x80 + random.below(DATA_BYTES as u64 - 8 * INDEX - 0x100 - size);
    let first = random.below(16) as usize;
    let moving = (0..16).map(|index| (first + index) % 16).find(|index| {
        let range = program.known.registers[*index];
        range.is_some_and(|range| {
            range.low.wrapping_sub(DATA) < DATA_BYTES as u64 && range.value().is_none()
        })
    });
    if let Some(base) = moving.filter(|_| random.chance(60)) {
        // The pointer has been all over its range of a few hundred bytes.
        place(instruction, Register::RAX + base as u32, random.below(64));
        if random.chance(30) {
            index(program, random, instruction);
            instruction.set_memory_index_scale(1);
        }
        return;
    }
    if random.chance(25) {
        // [index * scale + displacement]
        index(program, random, instruction);
        instruction.set_memory_displ_size(4);
        instruction.set_memory_displacement64(low);
        return;
    }
    let base = pointer(program, random, low);
    instruction.set_memory_base(Register::RAX + base.0 as u32);
    index(program, random, instruction);
    place(
        instruction,
        Register::RAX + base.0 as u32,
        low.wrapping_sub(base.1),
    );
}
