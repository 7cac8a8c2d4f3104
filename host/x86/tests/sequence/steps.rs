//! Steps that are more than an instruction whose operands are drawn.

use iced_x86::{Code, Instruction, OpCodeOperandKind, OpKind, Register};

use crate::catalog::Catalog;
use crate::compare::{AF, CF, OF, ZF};
use crate::layout::*;
use crate::operands::{data_address, free, memory_operand, plain};
use crate::program::*;
use crate::random::Random;

const PF: u64 = 1 << 2;
const SF: u64 = 1 << 7;

/// What each pair of conditions looks at, in the order of their codes.
const CONDITIONS: [u64; 8] = [OF, CF, ZF, CF | ZF, SF, PF, SF | OF, ZF | SF | OF];

/// What mostly precedes a conditional branch.
const COMPARISONS: [Code; 14] = [
    Code::Cmp_r64_rm64,
    Code::Cmp_r32_rm32,
    Code::Cmp_rm32_r32,
    Code::Cmp_rm8_imm8,
    Code::Cmp_rm16_imm8,
    Code::Cmp_rm64_imm8,
    Code::Test_rm8_r8,
    Code::Test_rm64_r64,
    Code::Test_rm32_imm32,
    Code::Sub_r32_rm32,
    Code::And_rm32_imm8,
    Code::Dec_rm32,
    Code::Bt_rm32_imm8,
    Code::Comisd_xmm_xmmm64,
];

/// A condition by its code, of flags that are defined.
fn condition(program: &mut Program, random: &mut Random) -> u8 {
    if random.chance(70) {
        plain(program, random, &COMPARISONS);
    }
    let condition = random.below(16) as u8;
    if CONDITIONS[usize::from(condition / 2)] & program.known.undefined != 0 {
        program.define_flags();
    }
    condition
}

/// A conditional branch.
pub(crate) fn conditional(program: &mut Program, random: &mut Random) -> Hole {
    let condition = condition(program, random);
    program.raw_with_hole(&[0x0f, 0x80 | condition], true)
}

/// A short branch over one instruction.
pub(crate) fn short_skip(program: &mut Program, random: &mut Random) {
    let counts = !program.is_reserved(RCX);
    let opcode = match random.below(8) {
        0 => 0xe3,
        1 if counts => 0xe2,
        2 if counts && program.known.undefined & ZF == 0 => 0xe0 | random.below(2) as u8,
        _ => 0x70 | condition(program, random),
    };
    if matches!(opcode, 0xe0..=0xe2) {
        program.forget(1 << RCX);
    }
    if opcode == 0xe3 && random.chance(20) {
        program.raw(&[0x67, opcode, 0]);
    } else {
        program.raw(&[opcode, 0]);
    }
    let (behind, known) = (program.bytes.len(), program.known);
    plain(program, random, &Catalog::get().frequent);
    let distance = program.bytes.len() - behind;
    assert!(distance < 0x80, "one instruction and what leads to it");
    program.bytes[behind - 1] = distance as u8;
    program.join(&known);
}

/// A string instruction, mostly repeated.
pub(crate) fn string(program: &mut Program, random: &mut Random) {
    if [RCX, RSI, RDI]
        .iter()
        .any(|register| program.is_reserved(*register))
    {
        return;
    }
    let code = random.pick(&Catalog::get().strings);
    let info = code.op_code();
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    for operand in 0..info.op_count() {
        use OpCodeOperandKind::*;
        let (kind, register) = match info.op_kind(operand) {
            es_rDI => (OpKind::MemoryESRDI, Register::None),
            seg_rSI => (OpKind::MemorySegRSI, Register::None),
            al => (OpKind::Register, Register::AL),
            ax => (OpKind::Register, Register::AX),
            eax => (OpKind::Register, Register::EAX),
            rax => (OpKind::Register, Register::RAX),
            _ => return,
        };
        instruction.set_op_kind(operand, kind);
        if kind == OpKind::Register {
            instruction.set_op_register(operand, register);
        }
    }
    // Far enough from both ends for all counts, either way.
    let place = |random: &mut Random| DATA + 0x200 + random.below(DATA_BYTES as u64 - 0x400);
    let source = place(random);
    let destination = match random.below(3) {
        0 => (source + random.below(64)).wrapping_sub(32),
        _ => place(random),
    };
    program.set(RSI, source);
    program.set(RDI, destination);
    if random.chance(70) {
        program.set(RCX, random.pick(&[0, 1, 2, 3, 7, 16, 33, 60]));
        let not_equal = info.can_use_repne_prefix() && random.chance(40);
        instruction.set_has_repne_prefix(not_equal);
        instruction.set_has_rep_prefix(!not_equal && info.can_use_rep_prefix());
    }
    program.emit(&instruction);
}

/// A division whose quotient mostly fits.
pub(crate) fn division(program: &mut Program, random: &mut Random) {
    if program.is_reserved(RAX) || program.is_reserved(RDX) {
        return;
    }
    let code = random.pick(&Catalog::get().divisions);
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    let signed = code.mnemonic() == iced_x86::Mnemonic::Idiv;
    let bytes = match code.op_code().op_kind(0) {
        OpCodeOperandKind::r8_or_mem => 1,
        OpCodeOperandKind::r16_or_mem => 2,
        OpCodeOperandKind::r32_or_mem => 4,
        _ => 8,
    };
    let divisor = free(program, random);
    if matches!(divisor, RAX | RDX) || random.chance(15) {
        instruction.set_op0_kind(OpKind::Memory);
        memory_operand(program, random, &mut instruction);
    } else {
        let (low, high) = (divisor as u8 & 7, divisor as u8 >> 3);
        // OR of the divisor with 1.
        program.raw(&[0x48 | high, 0x83, 0xc8 | low, 1]);
        program.forget(1 << divisor);
        program.known.undefined = AF;
        let number = divisor as u32;
        let register = match bytes {
            1 if divisor <= RBX => Register::AL + number,
            1 => Register::SPL + (number - RSP as u32),
            2 => Register::AX + number,
            4 => Register::EAX + number,
            _ => Register::RAX + number,
        };
        instruction.set_op0_kind(OpKind::Register);
        instruction.set_op0_register(register);
    }
    match (bytes, signed) {
        // MOVZX EAX, AL.
        (1, _) => program.raw(&[0x0f, 0xb6, 0xc0]),
        (_, false) => program.set(RDX, 0),
        // CWD, CDQ, CQO.
        (2, true) => program.raw(&[0x66, 0x99]),
        (4, true) => program.raw(&[0x99]),
        (_, true) => program.raw(&[0x48, 0x99]),
    }
    program.emit(&instruction);
}

/// Something onto the stack.
pub(crate) fn push(program: &mut Program, random: &mut Random) {
    if program.known.stack < STACK + 0x400 {
        return;
    }
    let register = random.below(16) as u8;
    let (low, high) = (register & 7, register >> 3);
    let bytes = match random.below(8) {
        0 => {
            program.raw(&[0x6a, random.next() as u8]);
            8
        }
        1 => {
            let value = random.next() as u32;
            let hole = program.raw_with_hole(&[0x68], false);
            program.fill(hole, value.into());
            8
        }
        2 => {
            program.raw(&[0x66, 0x40 | high, 0x50 | low]);
            2
        }
        3 | 4 => {
            let mut instruction = Instruction::new();
            instruction.set_code(Code::Push_rm64);
            instruction.set_op0_kind(OpKind::Memory);
            memory_operand(program, random, &mut instruction);
            let done = program.emit_with(&instruction, 1 << RSP);
            if done { 8 } else { 0 }
        }
        _ => {
            program.raw(&[0x40 | high, 0x50 | low]);
            8
        }
    };
    program.known.stack -= bytes;
}

/// Something from the stack, on which there is so much.
pub(crate) fn pop(program: &mut Program, random: &mut Random, room: u64) {
    let register = free(program, random) as u8;
    let (low, high) = (register & 7, register >> 3);
    match random.below(8) {
        0 if room >= 2 => {
            program.raw(&[0x66, 0x40 | high, 0x58 | low]);
            program.known.stack += 2;
            program.forget(1 << register);
        }
        1 | 2 if room >= 8 => {
            let mut instruction = Instruction::new();
            instruction.set_code(Code::Pop_rm64);
            instruction.set_op0_kind(OpKind::Memory);
            memory_operand(program, random, &mut instruction);
            if program.emit_with(&instruction, 1 << RSP) {
                program.known.stack += 8;
            }
        }
        _ if room >= 8 => {
            program.raw(&[0x40 | high, 0x58 | low]);
            program.known.stack += 8;
            program.forget(1 << register);
        }
        _ => {}
    }
}

/// A call to what the hole is filled with.
pub(crate) fn call(program: &mut Program, random: &mut Random) -> Hole {
    match random.below(4) {
        0 => {
            let register = free(program, random) as u8;
            let (low, high) = (register & 7, register >> 3);
            let hole = program.raw_with_hole(&[0x40 | high, 0xb8 | low], false);
            program.forget(1 << register);
            program.raw(&[0x40 | high, 0xff, 0xd0 | low]);
            hole
        }
        1 => program.raw_by_table(&[0xff, 0x15]),
        _ => program.raw_with_hole(&[0xe8], true),
    }
}

/// A jump by a table to one of a few instructions.
pub(crate) fn choice(program: &mut Program, random: &mut Random) {
    let index = free(program, random) as u8;
    let (low, high) = (index & 7, index >> 3);
    let count = random.pick(&[1, 2, 4]);
    // AND of the index with how many there are, less one.
    program.raw(&[0x40 | high, 0x83, 0xe0 | low, count - 1]);
    program.forget(1 << index);
    program.known.undefined = AF;
    let sib = 0xc5 | low << 3;
    let hole = program.raw_with_hole(&[0x40 | high << 1, 0xff, 0x24, sib], false);
    let before = program.known;
    let mut targets = Vec::new();
    let mut exits = Vec::new();
    let mut all = before;
    for way in 0..count {
        program.known = before;
        targets.push(program.here());
        plain(program, random, &Catalog::get().frequent);
        if way + 1 < count {
            exits.push(program.raw_with_hole(&[0xe9], true));
        }
        program.join(&all);
        all = program.known;
    }
    for exit in exits {
        program.fill(exit, program.here());
    }
    program.fill_with_table(hole, &targets);
}

/// Stores a number and has it loaded by an instruction with one memory operand.
fn load_number(program: &mut Program, random: &mut Random, code: Code, value: u32) {
    let address = data_address(random, 8, 8);
    // MOV dword ptr [address], value.
    let mut store = vec![0xc7, 0x04, 0x25];
    store.extend_from_slice(&(address as u32).to_le_bytes());
    store.extend_from_slice(&value.to_le_bytes());
    program.raw(&store);
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    instruction.set_op0_kind(OpKind::Memory);
    instruction.set_memory_displ_size(4);
    instruction.set_memory_displacement64(address);
    program.emit(&instruction);
}

/// Another MXCSR or x87 control word, mostly with all exceptions masked.
pub(crate) fn floating_control(program: &mut Program, random: &mut Random) {
    let masked = random.chance(92);
    match random.below(6) {
        0 | 1 => {
            let mask = if masked { 0x3f } else { random.below(0x40) };
            let value = 0x40 | mask | (random.next() & 0xf00);
            load_number(program, random, Code::Fldcw_m2byte, value as u32);
        }
        way => {
            let mask = if masked {
                0x1f80
            } else {
                random.next() & 0x1f80
            };
            let others = random.pick(&[0, 0, 0x3f, 0x6000, 0x603f, 0xe07f]);
            let value = (mask | random.next() & others) as u32;
            let code = match way {
                2 if is_x86_feature_detected!("avx") => Code::VEX_Vldmxcsr_m32,
                _ => Code::Ldmxcsr_m32,
            };
            load_number(program, random, code, value);
        }
    }
}

/// RFLAGS to the stack, or from there.
pub(crate) fn flags(program: &mut Program, random: &mut Random) {
    if program.known.stack < STACK + 0x400 {
        return;
    }
    if random.chance(50) {
        if program.known.undefined != 0 {
            program.define_flags();
        }
        program.raw(&[0x9c]);
        program.known.stack -= 8;
        return;
    }
    let direction = if random.chance(10) { 0x400 } else { 0 };
    let hole = program.raw_with_hole(&[0x68], false);
    program.fill(hole, random.next() & 0x8d5 | direction | 0x202);
    program.raw(&[0x9d]);
    program.known.undefined = 0;
}

/// ENTER, an instruction, LEAVE.
pub(crate) fn frame(program: &mut Program, random: &mut Random) {
    if program.is_reserved(RBP) || program.known.stack < STACK + 0x400 {
        return;
    }
    let before = program.known.stack;
    let bytes = random.below(0x40) as u8;
    program.raw(&[0xc8, bytes, 0, 0]);
    program.known.stack = before - 8 - u64::from(bytes);
    program.forget(1 << RBP);
    program.reserved |= 1 << RBP;
    plain(program, random, &Catalog::get().frequent);
    program.reserved &= !(1 << RBP);
    program.raw(&[0xc9]);
    program.known.stack = before;
}

/// Changes an immediate of an instruction that follows.
pub(crate) fn patch(program: &mut Program, random: &mut Random) {
    let source = free(program, random) as u8;
    // MOV dword ptr [RIP + distance], source.
    let modrm = 0x05 | (source & 7) << 3;
    let hole = program.raw_with_hole(&[0x40 | (source >> 3) << 2, 0x89, modrm], true);
    if random.chance(50) {
        plain(program, random, &Catalog::get().frequent);
    }
    let value = random.next() as u32;
    let target = free(program, random) as u8;
    let opcode: [u8; 3] = match random.below(2) {
        // MOV of 32 bits in its long form, ADD of 64.
        0 => [0x40 | target >> 3, 0xc7, 0xc0 | target & 7],
        _ => {
            program.known.undefined = 0;
            [0x48 | target >> 3, 0x81, 0xc0 | target & 7]
        }
    };
    let place = program.here() + opcode.len() as u64;
    let number = program.raw_with_hole(&opcode, false);
    program.fill(number, value.into());
    program.forget(1 << target);
    program.fill(hole, place);
    program.patches.push((place, value));
}

/// XLAT.
pub(crate) fn translate_byte(program: &mut Program, random: &mut Random) {
    if program.is_reserved(RAX) || program.is_reserved(RBX) {
        return;
    }
    program.set(RBX, DATA + random.below(DATA_BYTES as u64 - 256));
    program.raw(&[0xd7]);
    program.forget(1 << RAX);
}
