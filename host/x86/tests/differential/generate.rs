//! Random instances of an instruction form, and the state that they run in.

use iced_x86::{
    Code, CpuidFeature, Encoder, Instruction, MemorySize, Mnemonic, OpCodeOperandKind, OpKind,
    Register,
};

use crate::forms::BYTE_REGISTERS;
use crate::layout::*;
use crate::random::Random;

/// Bytes to put into the scratch memory before a case runs.
pub(crate) struct Patch {
    pub(crate) address: u64,
    pub(crate) bytes: Vec<u8>,
}

/// One instruction with its input.
pub(crate) struct Case {
    pub(crate) instruction: Instruction,
    pub(crate) bytes: Vec<u8>,
    pub(crate) input: Machine,
    pub(crate) patches: Vec<Patch>,
}

const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;
const RSI: usize = 6;
const RDI: usize = 7;

/// The generator of one form's cases.
pub(crate) struct Generator<'a> {
    code: Code,
    random: &'a mut Random,
    float: bool,
}

/// A case in the making.
struct Draft {
    instruction: Instruction,
    input: Machine,
    patches: Vec<Patch>,
    address: u64,
}

impl<'a> Generator<'a> {
    pub(crate) fn new(code: Code, random: &'a mut Random) -> Self {
        use CpuidFeature::*;
        let float = code.cpuid_features().iter().any(|feature| {
            matches!(
                feature,
                FPU | FPU287
                    | FPU387
                    | MMX
                    | SSE
                    | SSE2
                    | SSE3
                    | SSSE3
                    | SSE4_1
                    | SSE4_2
                    | FXSR
                    | AVX
                    | AVX2
                    | FMA
                    | F16C
            )
        });
        Self {
            code,
            random,
            float,
        }
    }

    /// An instance to be placed in `slot`; `None` when the draw has no encoding.
    pub(crate) fn case(&mut self, slot: usize) -> Option<Case> {
        let address = slot_address(slot);
        let mut draft = Draft {
            instruction: Instruction::new(),
            input: Machine::ZERO,
            patches: Vec::new(),
            address,
        };
        draft.instruction.set_code(self.code);
        draft.input.rip = address;
        self.registers(&mut draft.input);
        for operand in 0..self.code.op_code().op_count() {
            self.operand(&mut draft, operand)?;
        }
        self.prefixes(&mut draft.instruction);
        self.special(&mut draft);
        self.memory(&mut draft);
        if undefined_shift(&draft) {
            return None;
        }
        let mut encoder = Encoder::new(64);
        let length = encoder.encode(&draft.instruction, address).ok()?;
        let bytes = encoder.take_buffer();
        assert_eq!(length, bytes.len());
        let mut decoder = iced_x86::Decoder::with_ip(64, &bytes, address, 0);
        let decoded = decoder.decode();
        if decoded.code() != self.code || decoded.len() != length {
            return None;
        }
        Some(Case {
            instruction: decoded,
            bytes,
            input: draft.input,
            patches: draft.patches,
        })
    }

    fn registers(&mut self, input: &mut Machine) {
        for register in &mut input.gpr {
            *register = self.random.integer();
        }
        let near_border = self.random.chance(4);
        input.gpr[RSP] = STACK
            + if near_border {
                self.random
                    .pick(&[0, 2, 4, 6, 8, 0xff0, 0xff8, 0xffa, 0xffc, 0xffe, 0x1000])
            } else {
                0x800 + (self.random.below(0x80) << 3) - self.random.pick(&[0, 0, 0, 1, 2, 4])
            };
        // The six arithmetic flags and DF; interrupts are enabled in user mode.
        input.rflags = self.random.next() & 0xcd5 | 0x202;
        input.float = self.random.float_image(self.float);
        if self.float && is_x86_feature_detected!("avx") {
            for half in input.upper.chunks_exact_mut(16) {
                half.copy_from_slice(&self.random.vector().to_le_bytes());
            }
        }
    }

    fn pick_gpr(&mut self, first: Register) -> Register {
        first + self.random.below(16) as u32
    }

    fn operand(&mut self, draft: &mut Draft, operand: u32) -> Option<()> {
        use OpCodeOperandKind::*;
        use std::option::Option::None;
        let kind = self.code.op_code().op_kind(operand);
        let memory = self.random.chance(50);
        let register = match kind {
            mem | sibmem | mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y => None,
            r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem
            | ymm_or_mem
                if memory =>
            {
                None
            }
            r8_or_mem | r8_reg | r8_opcode => Some(self.random.pick(&BYTE_REGISTERS)),
            r16_or_mem | r16_reg | r16_rm | r16_opcode => Some(self.pick_gpr(Register::AX)),
            r32_or_mem | r32_reg | r32_rm | r32_opcode | r32_vvvv => {
                Some(self.pick_gpr(Register::EAX))
            }
            r64_or_mem | r64_reg | r64_rm | r64_opcode | r64_vvvv => {
                Some(self.pick_gpr(Register::RAX))
            }
            mm_or_mem | mm_reg | mm_rm => Some(Register::MM0 + self.random.below(8) as u32),
            xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 => {
                Some(self.pick_gpr(Register::XMM0))
            }
            ymm_or_mem | ymm_reg | ymm_rm | ymm_vvvv | ymm_is4 => {
                Some(self.pick_gpr(Register::YMM0))
            }
            seg_reg => Some(Register::ES + self.random.below(6) as u32),
            al => Some(Register::AL),
            cl => Some(Register::CL),
            ax => Some(Register::AX),
            dx => Some(Register::DX),
            eax => Some(Register::EAX),
            rax => Some(Register::RAX),
            st0 => Some(Register::ST0),
            sti_opcode => Some(Register::ST0 + self.random.below(8) as u32),
            _ => return self.implied_operand(draft, operand, kind),
        };
        let instruction = &mut draft.instruction;
        match register {
            Some(register) => {
                instruction.set_op_kind(operand, OpKind::Register);
                instruction.set_op_register(operand, register);
            }
            None => instruction.set_op_kind(operand, OpKind::Memory),
        }
        Some(())
    }

    /// Immediates, branch targets and the operands of string instructions.
    fn implied_operand(
        &mut self,
        draft: &mut Draft,
        operand: u32,
        kind: OpCodeOperandKind,
    ) -> Option<()> {
        use OpCodeOperandKind::*;
        use std::option::Option::None;
        let short_addresses = self.random.chance(10);
        let value = self.random.integer();
        let instruction = &mut draft.instruction;
        let string = |long, short| if short_addresses { short } else { long };
        let op_kind = match kind {
            imm8 | imm8_const_1
                if operand > 0 && instruction.op_kind(operand - 1) == OpKind::Immediate16 =>
            {
                OpKind::Immediate8_2nd
            }
            imm8 | imm8_const_1 => OpKind::Immediate8,
            imm8sex16 => OpKind::Immediate8to16,
            imm8sex32 => OpKind::Immediate8to32,
            imm8sex64 => OpKind::Immediate8to64,
            imm16 => OpKind::Immediate16,
            imm32 => OpKind::Immediate32,
            imm32sex64 => OpKind::Immediate32to64,
            imm64 => OpKind::Immediate64,
            seg_rSI => string(OpKind::MemorySegRSI, OpKind::MemorySegESI),
            es_rDI => string(OpKind::MemoryESRDI, OpKind::MemoryESEDI),
            seg_rDI => string(OpKind::MemorySegRDI, OpKind::MemorySegEDI),
            seg_rBX_al | mem_offs => OpKind::Memory,
            br64_1 | br64_4 => OpKind::NearBranch64,
            _ => return None,
        };
        instruction.set_op_kind(operand, op_kind);
        match op_kind {
            OpKind::Immediate8 if kind == imm8_const_1 => instruction.set_immediate8(1),
            OpKind::Immediate8 => instruction.set_immediate8(value as u8),
            OpKind::Immediate8_2nd => instruction.set_immediate8_2nd(value as u8),
            OpKind::Immediate8to16 => instruction.set_immediate8to16(i16::from(value as i8)),
            OpKind::Immediate8to32 => instruction.set_immediate8to32(i32::from(value as i8)),
            OpKind::Immediate8to64 => instruction.set_immediate8to64(i64::from(value as i8)),
            OpKind::Immediate16 => instruction.set_immediate16(value as u16),
            OpKind::Immediate32 => instruction.set_immediate32(value as u32),
            OpKind::Immediate32to64 => instruction.set_immediate32to64(i64::from(value as i32)),
            OpKind::Immediate64 => instruction.set_immediate64(value),
            OpKind::NearBranch64 => {
                let target = landing(self.random, draft.address);
                instruction.set_near_branch64(target);
            }
            OpKind::Memory if kind == seg_rBX_al => {
                instruction.set_memory_base(Register::RBX);
                instruction.set_memory_index(Register::AL);
            }
            _ => {}
        }
        Some(())
    }

    fn prefixes(&mut self, instruction: &mut Instruction) {
        let info = self.code.op_code();
        let memory = instruction.op0_kind() == OpKind::Memory;
        if info.can_use_lock_prefix() && memory && self.random.chance(25) {
            instruction.set_has_lock_prefix(true);
        }
        if info.can_use_rep_prefix()
            && instruction.is_string_instruction()
            && self.random.chance(50)
        {
            instruction.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix()
            && instruction.is_string_instruction()
            && self.random.chance(50)
        {
            instruction.set_has_repne_prefix(true);
        }
    }

    /// Inputs without which a form would mostly fault, or do the same always.
    fn special(&mut self, draft: &mut Draft) {
        use Mnemonic::*;
        let random = &mut *self.random;
        let gpr = &mut draft.input.gpr;
        match self.code.mnemonic() {
            Div | Idiv if random.chance(70) => {
                gpr[RDX] = random.pick(&[0, 0, 1, 2, u64::MAX, gpr[0] >> 63]);
                if random.chance(50) {
                    gpr[0] = random.integer() & 0xff_ffff;
                }
            }
            Xlatb => gpr[RBX] = DATA + random.below((DATA_BYTES - 256) as u64),
            Maskmovq | Maskmovdqu | Vmaskmovdqu => gpr[RDI] = operand_address(random, 16),
            Enter => {
                let level = random.pick(&[0, 0, 1, 2, 3, 31, 33]);
                draft.instruction.set_immediate8_2nd(level);
                draft.instruction.set_immediate16(random.below(256) as u16);
                gpr[RBP] = STACK + 0x400 + random.below(0x100) * 8;
            }
            Leave => gpr[RBP] = STACK + random.pick(&[0x100, 0x7f1, 0xff8, 0xffc]),
            Loop | Loope | Loopne | Jrcxz | Jecxz => {
                let any = random.integer();
                gpr[RCX] = random.pick(&[0, 1, 2, 1 << 32, 1 << 32 | 1, any]);
            }
            Popfq | Popf => {
                // TF would trap after the next instruction, which is not the same on both sides.
                let flags = (random.next() & !0x100).to_le_bytes().to_vec();
                draft.patches.push(Patch {
                    address: gpr[RSP],
                    bytes: flags,
                });
            }
            Ret => {
                let target = landing(random, draft.address).to_le_bytes().to_vec();
                draft.patches.push(Patch {
                    address: gpr[RSP],
                    bytes: target,
                });
            }
            _ => {}
        }
        if draft.instruction.is_string_instruction() {
            self.string(draft);
        }
    }

    fn string(&mut self, draft: &mut Draft) {
        let random = &mut *self.random;
        let input = &mut draft.input;
        let short = (0..draft.instruction.op_count()).any(|operand| {
            matches!(
                draft.instruction.op_kind(operand),
                OpKind::MemorySegESI | OpKind::MemoryESEDI
            )
        });
        let high = |random: &mut Random| if short { random.next() << 32 } else { 0 };
        let size = draft.instruction.memory_size().size().max(1) as u64;
        let source = string_address(random);
        let destination = if random.chance(30) {
            source
                .wrapping_add(random.below(9 * size))
                .wrapping_sub(4 * size)
        } else {
            string_address(random)
        };
        input.gpr[RSI] = source | high(random);
        input.gpr[RDI] = destination | high(random);
        let repeated = draft.instruction.has_rep_prefix() || draft.instruction.has_repne_prefix();
        if repeated {
            input.gpr[RCX] = random.pick(&[0, 1, 2, 3, 5, 9, 30]) | high(random);
        }
        if random.chance(50) {
            // Something to find, or to be equal.
            let text: Vec<u8> = (0..64).map(|_| random.below(2) as u8).collect();
            for address in [source, destination] {
                let address = address.clamp(DATA, DATA + DATA_BYTES as u64 - 64);
                let bytes = if random.chance(50) {
                    text.clone()
                } else {
                    vec![text[0]; 64]
                };
                draft.patches.push(Patch { address, bytes });
            }
            input.gpr[0] = random.pick(&[0, 0x0101_0101_0101_0101, input.gpr[0]]);
        }
    }

    /// Gives the memory operand an address form, and registers that lead to the scratch memory.
    fn memory(&mut self, draft: &mut Draft) {
        let instruction = &mut draft.instruction;
        let operand = (0..instruction.op_count())
            .find(|operand| instruction.op_kind(*operand) == OpKind::Memory);
        let indirect = matches!(self.code, Code::Jmp_rm64 | Code::Call_rm64);
        let Some(operand) = operand else {
            if indirect {
                let register = instruction.op0_register().number();
                draft.input.gpr[register] = landing(self.random, draft.address);
            }
            return;
        };
        if self.code == Code::Xlat_m8 {
            return;
        }
        let size = instruction.memory_size().size();
        if self.code.op_code().op_kind(operand) == OpCodeOperandKind::mem_offs {
            let address = operand_address(self.random, size);
            instruction.set_memory_displ_size(8);
            instruction.set_memory_displacement64(address);
            return;
        }
        if draft.instruction.is_vsib() {
            self.gathered(draft);
            return;
        }
        self.bit_offset(draft);
        let address = self.address_form(draft, size);
        let content = if indirect {
            landing(self.random, draft.address).to_le_bytes().to_vec()
        } else {
            content(self.random, draft.instruction.memory_size(), self.code)
        };
        draft.patches.push(Patch {
            address,
            bytes: content,
        });
    }

    /// A gather: a base register, and lanes of a vector that lead from there to the scratch memory, rarely
    /// beyond it.
    fn gathered(&mut self, draft: &mut Draft) {
        use OpCodeOperandKind::*;
        let random = &mut *self.random;
        let kind = self.code.op_code().op_kind(1);
        let wide = matches!(kind, mem_vsib32y | mem_vsib64y);
        let bytes: usize = match kind {
            mem_vsib32x | mem_vsib32y => 4,
            _ => 8,
        };
        let scale = random.pick(&[1_u32, 2, 4, 8]);
        let index = random.below(16) as usize;
        let faults = random.chance(30);
        let mut lanes = Vec::new();
        while lanes.len() < if wide { 32 } else { 16 } {
            let reach = if faults && random.chance(20) {
                0x3000
            } else {
                0xff8
            };
            let distance = random.below(2 * reach) as i64 - reach as i64;
            let lane = distance / i64::from(scale);
            lanes.extend_from_slice(&lane.to_le_bytes()[..bytes]);
        }
        let input = &mut draft.input;
        input.float[160 + index * 16..][..16].copy_from_slice(&lanes[..16]);
        if wide {
            input.upper[index * 16..][..16].copy_from_slice(&lanes[16..]);
        }
        let mask = draft.instruction.op2_register().number();
        if random.chance(70) && mask != index {
            for byte in &mut input.float[160 + mask * 16..][..16] {
                *byte |= if random.chance(80) { 0x80 } else { 0 };
            }
        }
        let base = random.below(16) as usize;
        let short = random.chance(10) && base != RSP;
        let displacement = random_displacement(random);
        input.gpr[base] = (DATA + 0x1000).wrapping_sub(displacement.1);
        if short {
            input.gpr[base] = input.gpr[base] & 0xffff_ffff | random.next() << 32;
        }
        let instruction = &mut draft.instruction;
        let bases = if short { Register::EAX } else { Register::RAX };
        instruction.set_memory_base(bases + base as u32);
        let indices = if wide { Register::YMM0 } else { Register::XMM0 };
        instruction.set_memory_index(indices + index as u32);
        instruction.set_memory_index_scale(scale);
        let (size, value) = match short {
            true => (displacement.0.min(4), displacement.1 & 0xffff_ffff),
            false => displacement,
        };
        instruction.set_memory_displ_size(size);
        instruction.set_memory_displacement64(value);
    }

    /// BT and its family with a register reach beyond the operand.
    fn bit_offset(&mut self, draft: &mut Draft) {
        use Mnemonic::*;
        let instruction = &draft.instruction;
        if matches!(instruction.mnemonic(), Bt | Bts | Btr | Btc)
            && instruction.op1_kind() == OpKind::Register
        {
            let register = instruction.op1_register().number();
            let reach = self.random.pick(&[64, 512, 0x8000]);
            let offset = self.random.below(2 * reach).wrapping_sub(reach);
            draft.input.gpr[register] = match instruction.op1_register().size() {
                2 => draft.input.gpr[register] & !0xffff | offset & 0xffff,
                4 => draft.input.gpr[register] & !0xffff_ffff | offset & 0xffff_ffff,
                _ => offset,
            };
        }
    }

    /// Chooses base, index, scale and displacement; answers the linear address.
    fn address_form(&mut self, draft: &mut Draft, size: usize) -> u64 {
        let random = &mut *self.random;
        let instruction = &mut draft.instruction;
        let gpr = &mut draft.input.gpr;
        let mut address = operand_address(random, size);
        if random.chance(2) {
            instruction.set_segment_prefix(random.pick(&[
                Register::ES,
                Register::CS,
                Register::SS,
                Register::DS,
            ]));
        }
        let base = random.below(16) as usize;
        let index = random.below(16) as usize;
        match random.below(10) {
            // [rip + displacement]
            0 => {
                instruction.set_memory_base(Register::RIP);
                instruction.set_memory_displ_size(8);
                instruction.set_memory_displacement64(address);
            }
            // [displacement]
            1 => {
                instruction.set_memory_displ_size(random.pick(&[4, 8]));
                instruction.set_memory_displacement64(address);
            }
            // [index * scale + displacement]
            2 if index != RSP => {
                let scale = random.pick(&[1, 2, 4, 8]);
                let displacement = u64::from(random.next() as u16 & 0xfff8);
                gpr[index] = (address - displacement) / u64::from(scale);
                address = gpr[index] * u64::from(scale) + displacement;
                instruction.set_memory_index(Register::RAX + index as u32);
                instruction.set_memory_index_scale(scale);
                instruction.set_memory_displ_size(4);
                instruction.set_memory_displacement64(displacement);
            }
            // [base + index * scale + displacement]
            3..=5 if index != RSP && index != base => {
                let scale = random.pick(&[1_u32, 2, 4, 8]);
                let displacement = random_displacement(random);
                gpr[index] = random.integer();
                let rest = gpr[index]
                    .wrapping_mul(u64::from(scale))
                    .wrapping_add(displacement.1);
                if base == RSP {
                    address = STACK + 0x800 + random.below(0x100);
                }
                gpr[base] = address.wrapping_sub(rest);
                instruction.set_memory_base(Register::RAX + base as u32);
                instruction.set_memory_index(Register::RAX + index as u32);
                instruction.set_memory_index_scale(scale);
                instruction.set_memory_displ_size(displacement.0);
                instruction.set_memory_displacement64(displacement.1);
            }
            // [32-bit base + displacement]
            6 if base != RSP => {
                let displacement = random_displacement(random);
                let low = address.wrapping_sub(displacement.1) as u32;
                gpr[base] = u64::from(low) | random.next() << 32;
                instruction.set_memory_base(Register::EAX + base as u32);
                instruction.set_memory_displ_size(displacement.0.min(4));
                instruction.set_memory_displacement64(displacement.1 & 0xffff_ffff);
            }
            // [base + displacement], sometimes not canonical
            _ => {
                let displacement = random_displacement(random);
                if base == RSP {
                    address = STACK + 0x800 + random.below(0x100);
                } else if random.chance(1) {
                    address ^= 1 << 60;
                }
                gpr[base] = address.wrapping_sub(displacement.1);
                instruction.set_memory_base(Register::RAX + base as u32);
                instruction.set_memory_displ_size(displacement.0);
                instruction.set_memory_displacement64(displacement.1);
            }
        }
        address
    }
}

/// SHLD and SHRD by more than the operand's size have no defined result.
fn undefined_shift(draft: &Draft) -> bool {
    let instruction = &draft.instruction;
    let count = match instruction.op2_kind() {
        OpKind::Immediate8 => instruction.immediate8().into(),
        _ => draft.input.gpr[RCX],
    };
    matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && instruction.op1_register().size() == 2
        && count & 31 > 16
}

/// Bytes of a displacement, as the encoder has it for 64-bit addresses (8 means 4 that are extended), and
/// its value.
fn random_displacement(random: &mut Random) -> (u32, u64) {
    match random.below(3) {
        0 => (0, 0),
        1 => (1, random.next() as i8 as u64),
        _ => (8, random.integer() as i32 as u64),
    }
}

/// An address of a place in `address`'s slot where a breakpoint is.
fn landing(random: &mut Random, address: u64) -> u64 {
    let slot = address - SLOT_LEAD as u64;
    slot + if random.chance(50) {
        random.below(SLOT_LEAD as u64 - 1)
    } else {
        44 + random.below(SLOT_BYTES as u64 - 45)
    }
}

/// An address for an operand of `size` bytes: aligned, not, across pages, rarely beyond the end.
fn operand_address(random: &mut Random, size: usize) -> u64 {
    let size = size.max(1) as u64;
    let room = DATA_BYTES as u64 - size;
    match random.below(100) {
        0..=59 => DATA + random.below(room / 64) * 64,
        60..=79 => DATA + random.below(room),
        80..=96 if size > 1 => DATA + PAGE as u64 - 1 - random.below(size - 1),
        97 => DATA + DATA_BYTES as u64 - random.below(size),
        98 => DATA - 1 - random.below(size),
        _ => DATA + random.below(room),
    }
}

fn string_address(random: &mut Random) -> u64 {
    match random.below(20) {
        0 => DATA + random.below(16),
        1 => DATA + DATA_BYTES as u64 - random.below(16),
        2..=5 => DATA + PAGE as u64 - 16 + random.below(32),
        _ => DATA + 0x300 + random.below(DATA_BYTES as u64 - 0x600),
    }
}

/// Bytes for a memory operand.
fn content(random: &mut Random, size: MemorySize, code: Code) -> Vec<u8> {
    use MemorySize::*;
    match size {
        Fxsave_512Byte | Fxsave64_512Byte => {
            let mut image = random.float_image(true);
            if random.chance(5) {
                // Not bit 17, which some hosts have.
                image[26] = random.next() as u8 & !2;
            }
            image.to_vec()
        }
        FpuEnv14 | FpuEnv28 | FpuState94 | FpuState108 => {
            (0..size.size()).map(|_| random.next() as u8).collect()
        }
        Float32 => random.single().to_le_bytes().to_vec(),
        Float64 => random.double().to_le_bytes().to_vec(),
        Float80 => random.extended().to_le_bytes()[..10].to_vec(),
        Bcd => {
            let digit = |random: &mut Random| {
                let limit = if random.chance(3) { 16 } else { 10 };
                random.below(limit)
            };
            let digits = random.below(11);
            (0..10)
                .map(|byte| {
                    let pair = digit(random) as u8 | (digit(random) as u8) << 4;
                    if byte == 9 {
                        (random.next() as u8) & if random.chance(80) { 0x80 } else { 0xff }
                    } else if byte < digits {
                        pair
                    } else {
                        0
                    }
                })
                .collect()
        }
        _ if is_load_of_mxcsr(code) && random.chance(90) => {
            u32::from(random.next() as u16).to_le_bytes().to_vec()
        }
        _ if is_load_of_mxcsr(code) => (random.next() as u32 & !(1 << 17)).to_le_bytes().to_vec(),
        _ if size.size() >= 16 => (0..size.size() / 16)
            .flat_map(|_| random.vector().to_le_bytes())
            .collect(),
        _ => {
            let bytes = random.integer().to_le_bytes();
            bytes[..size.size().min(8)].to_vec()
        }
    }
}

fn is_load_of_mxcsr(code: Code) -> bool {
    matches!(code.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr)
}
