//! From a block's instructions to the host's.

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, Mnemonic as M, OpAccess, OpKind, Register,
};
use std::mem::offset_of;

use super::emit::{Assembler, Jump, Mem, R10, R11, R13, R14, R15, RCX, Reg, at, at_index};
use super::enter::{BIAS, CONTEXT};
use super::{Context, Kind, KnownJump, Leaving, Translator, WAY_OUT, slot_at};
use crate::cpu::Cpu;
use crate::cpuid::Baseline;
use crate::decode::{Block, BlockCache, Mode, is_offered};
use crate::exec::op::slot;
use crate::mmu::{PAGE_OFFSET, Privilege, Tlb, TlbEntry};

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

/// Pushes or pops in a row that share a look into the TLB, at most.
const MOST_IN_A_ROW: usize = 8;

/// Where translated code leaves, when its place is known.
struct Stub {
    jump: Jump,
    kind: StubKind,
}

enum StubKind {
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

/// A way on that is out of the page, to be written behind the rest: a jump leads there.
struct Far {
    jump: Jump,
    offset: i32,
    instruction: Option<usize>,
}

/// An instruction of the block.
#[derive(Clone, Copy)]
struct Place {
    op: u16,
    count: u16,
    /// Where the code behind it begins.
    resume: usize,
}

pub(super) struct Work<'a> {
    pub(super) assembler: &'a mut Assembler,
    encoder: &'a mut iced_x86::Encoder,
    information: InstructionInfoFactory,
    block: &'a Block,
    baseline: &'static Baseline,
    mark: u8,
    /// From R15 to the TLB's entries of the block's privilege.
    entries: i32,
    /// Places where code left before this block was translated.
    first_leaving: usize,
    /// From the beginning of this block's code to that which returns by the table.
    by_table: isize,
    /// Where code that this block's may lead to has its context: that of the lower or upper half.
    upper: bool,
    /// Whether SSE instructions run was looked at before.
    pub(super) sse_checked: bool,
    places: Vec<Place>,
    stubs: Vec<Stub>,
    far: Vec<Far>,
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

fn scratch() -> Mem {
    scratch_at(0)
}

pub(super) fn scratch_at(number: usize) -> Mem {
    context(offset_of!(Context, scratch) + number * 8)
}

/// May an instruction be run as it is, with other registers?
fn is_plain(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Mov
            | M::Add
            | M::Or
            | M::Adc
            | M::Sbb
            | M::And
            | M::Sub
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Shl
            | M::Sal
            | M::Shr
            | M::Sar
            | M::Rol
            | M::Ror
            | M::Rcl
            | M::Rcr
            | M::Shld
            | M::Shrd
            | M::Imul
            | M::Mul
            | M::Xchg
            | M::Xadd
            | M::Cmpxchg
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Bsf
            | M::Bsr
            | M::Bswap
            | M::Cbw
            | M::Cwde
            | M::Cdqe
            | M::Cwd
            | M::Cdq
            | M::Cqo
            | M::Clc
            | M::Stc
            | M::Cmc
            | M::Lahf
            | M::Sahf
            | M::Popcnt
            | M::Tzcnt
            | M::Lzcnt
            | M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
            | M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
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

fn is_high(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
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

    pub(super) fn is_user(&self) -> bool {
        self.block.user
    }

    pub(super) fn step_at(&mut self, jump: Jump, instruction: usize) {
        self.stubs.push(Stub {
            jump,
            kind: StubKind::Step(instruction),
        });
    }

    /// Puts a guest register into a host register.
    fn fetch(&mut self, to: Reg, guest: u8) {
        match PLACES[usize::from(guest)] {
            Some(place) if place == to => {}
            Some(place) => self.assembler.copy(to, place),
            None => self.assembler.load(to, slot_mem(guest)),
        }
    }

    /// The host register that has a guest register, or `otherwise` with a copy of it.
    fn held(&mut self, guest: u8, otherwise: Reg) -> Reg {
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
    fn offset(&mut self, i: &Instruction, to: Reg, narrow: bool) -> Able {
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
        at_index(R15, R11, 0, self.entries + field as i32)
    }

    /// Finds the TLB's entry for the address in R10: R11 tells which ([`Work::entry`]).
    pub(super) fn find_entry(&mut self) {
        let asm = self.asm();
        asm.pext(R11, R10, context(offset_of!(Context, tlb_bits)));
        // Times the size of an entry.
        asm.rorx(R11, R11, 64 - TlbEntry::SHIFT);
    }

    /// Finds the TLB's entry for the address in R10; RCX is lost. Leaves to the interpreter when it
    /// does not serve `bytes` from there.
    fn probe(&mut self, bytes: u32, write: bool, instruction: usize) {
        self.find_entry();
        let tag = self.entry(if write {
            TlbEntry::WRITE
        } else {
            TlbEntry::READ
        });
        let asm = self.asm();
        asm.load(RCX, tag);
        asm.lea(RCX, at_index(RCX, R10, 0, bytes as i32 - 1));
        asm.pext(RCX, RCX, context(offset_of!(Context, page_bits)));
        let miss = asm.unless_rcx_zero();
        self.step_at(miss, instruction);
    }

    /// The host address of what is to be read: R10 and R11 together. RCX is free.
    pub(super) fn probe_read(&mut self, bytes: u32, instruction: usize) -> Mem {
        self.probe(bytes, false, instruction);
        let addend = self.entry(TlbEntry::ADDEND);
        self.assembler.load(R11, addend);
        at_index(R10, R11, 0, 0)
    }

    /// The host address of what is to be written, in R10; R11 points to the mark to be set then
    /// ([`Work::mark`]). RCX is free.
    pub(super) fn probe_write(&mut self, bytes: u32, instruction: usize) {
        self.probe(bytes, true, instruction);
        self.for_a_write();
    }

    /// The entry that R11 tells apart serves a write to R10: makes both what [`Work::probe_write`] does.
    pub(super) fn for_a_write(&mut self) {
        let (addend, mark) = (self.entry(TlbEntry::ADDEND), self.entry(TlbEntry::MARK));
        let asm = self.asm();
        asm.load(RCX, addend);
        asm.lea(R10, at_index(R10, RCX, 0, 0));
        asm.load(R11, mark);
    }

    pub(super) fn mark(&mut self) {
        let mark = self.mark;
        self.assembler.store_imm_8(at(R11, 0), mark);
    }

    /// Encodes an instruction of the host.
    pub(super) fn encode(&mut self, i: &Instruction) -> Able {
        self.encoder.encode(i, 0).map_err(|_no_encoding| Unable)?;
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

    /// An instruction that is run as it is.
    fn plain(&mut self, original: &Instruction, instruction: usize) -> Able {
        let mut i = *original;
        if i.code() == Code::Movsxd_r16_rm16 {
            // Some processors read 32 bits of memory, others 16.
            return Err(Unable);
        }
        // Hints for a lock's elision, which would begin on a host that has it.
        i.set_has_repe_prefix(false);
        i.set_has_repne_prefix(false);
        let memory = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
        let by_count = (1..i.op_count())
            .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n) == Register::CL)
            && matches!(
                i.mnemonic(),
                M::Shl
                    | M::Sal
                    | M::Shr
                    | M::Sar
                    | M::Rol
                    | M::Ror
                    | M::Rcl
                    | M::Rcr
                    | M::Shld
                    | M::Shrd
            );
        // What is not renamed: the count.
        let count_at = by_count.then(|| i.op_count() - 1);
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register if !i.op_register(n).is_gpr() => return Err(Unable),
                OpKind::Register
                | OpKind::Memory
                | OpKind::Immediate8
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {}
                _ => return Err(Unable),
            }
        }
        let whole_address = matches!(
            i.code(),
            Code::Mov_AL_moffs8
                | Code::Mov_AX_moffs16
                | Code::Mov_EAX_moffs32
                | Code::Mov_RAX_moffs64
                | Code::Mov_moffs8_AL
                | Code::Mov_moffs16_AX
                | Code::Mov_moffs32_EAX
                | Code::Mov_moffs64_RAX
        );
        if whole_address {
            return Err(Unable);
        }
        // Without these, their encodings are others'.
        match i.code() {
            Code::Tzcnt_r32_rm32 if !self.baseline.has("bmi1") => i.set_code(Code::Bsf_r32_rm32),
            Code::Tzcnt_r64_rm64 if !self.baseline.has("bmi1") => i.set_code(Code::Bsf_r64_rm64),
            Code::Lzcnt_r32_rm32 if !self.baseline.has("abm") => i.set_code(Code::Bsr_r32_rm32),
            Code::Lzcnt_r64_rm64 if !self.baseline.has("abm") => i.set_code(Code::Bsr_r64_rm64),
            _ if matches!(i.mnemonic(), M::Tzcnt | M::Lzcnt) => return Err(Unable),
            _ => {}
        }
        let bit_string = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
            && memory.is_some()
            && i.op1_kind() == OpKind::Register;
        if bit_string {
            return self.bit_string(&i, instruction);
        }
        let access = self.access(original);

        // Which scratch registers are there for guest registers in memory.
        let stores = memory.is_some_and(|n| writes(access[n as usize]));
        let mut free: &[Reg] = match (memory, by_count) {
            (Some(_), true) => &[],
            (Some(_), false) => &[RCX],
            (None, _) => &[R10, R11],
        };
        let mut high = false;
        let mut extended = memory.is_some();
        let mut held = [None; 3];
        for n in 0..i.op_count() {
            if i.op_kind(n) != OpKind::Register || count_at == Some(n) {
                continue;
            }
            let register = i.op_register(n);
            if is_high(register) {
                if register == Register::CH {
                    return Err(Unable);
                }
                high = true;
                continue;
            }
            let guest = number(register)?;
            let host = match PLACES[usize::from(guest)] {
                Some(place) => place,
                None => {
                    let earlier = held[..n as usize].iter().flatten();
                    let again = earlier.copied().find(|&(other, _)| other == guest);
                    let host = match (again, free) {
                        (Some((_, host)), _) => host,
                        (None, [first, rest @ ..]) => {
                            free = rest;
                            *first
                        }
                        (None, []) => return Err(Unable),
                    };
                    held[n as usize] = Some((guest, host));
                    host
                }
            };
            extended |= host.0 >= 8 || register.size() == 1 && (4..8).contains(&host.0);
            i.set_op_register(n, renamed(register, host));
        }
        if high && extended {
            // No encoding has both.
            return Err(Unable);
        }
        if memory.is_some() {
            let bytes = original.memory_size().size() as u32;
            if bytes == 0 {
                return Err(Unable);
            }
            self.address(original)?;
            i.set_segment_prefix(Register::None);
            i.set_memory_displacement64(0);
            i.set_memory_displ_size(0);
            i.set_memory_index_scale(1);
            i.set_memory_base(Register::R10);
            if stores {
                self.probe_write(bytes, instruction);
                i.set_memory_index(Register::None);
            } else {
                let _at = self.probe_read(bytes, instruction);
                i.set_memory_index(Register::R11);
            }
        }
        for (guest, host) in held.into_iter().flatten() {
            self.assembler.load(host, slot_mem(guest));
        }
        if by_count {
            self.assembler.copy(RCX, R13);
        }
        self.encode(&i)?;
        if stores {
            self.mark();
        }
        for n in 0..3 {
            if let Some((guest, host)) = held[n]
                && writes(access[n])
            {
                self.assembler.store(slot_mem(guest), host);
            }
        }
        Ok(())
    }

    /// BT and its kin with a bit's offset in a register, which may lead out of the memory operand.
    fn bit_string(&mut self, original: &Instruction, instruction: usize) -> Able {
        let bytes = original.memory_size().size();
        let narrow = [original.memory_base(), original.memory_index()].map(|r| r.size() == 4);
        if bytes != 4 && bytes != 8 || narrow.contains(&true) || original.memory_displ_size() == 4 {
            // With 32-bit addresses, what is further than the operand wraps as well.
            return Err(Unable);
        }
        let wide = usize::from(bytes == 8);
        let masks = |first: usize| context(first + wide * 8);
        let guest = number(original.op1_register())?;
        self.address(original)?;
        let offset = self.held(guest, RCX);
        let asm = self.asm();
        asm.pext(RCX, offset, masks(offset_of!(Context, bit_far)));
        let far = asm.unless_rcx_zero();
        self.step_at(far, instruction);
        let offset = self.held(guest, RCX);
        let asm = self.asm();
        asm.pext(R11, offset, masks(offset_of!(Context, bit_unit)));
        asm.lea(R10, at_index(R10, R11, 2 + wide as u8, 0));
        let stores = original.mnemonic() != M::Bt;
        let mut i = *original;
        i.set_segment_prefix(Register::None);
        i.set_memory_displacement64(0);
        i.set_memory_displ_size(0);
        i.set_memory_index_scale(1);
        i.set_memory_base(Register::R10);
        if stores {
            self.probe_write(bytes as u32, instruction);
            i.set_memory_index(Register::None);
        } else {
            self.probe_read(bytes as u32, instruction);
            i.set_memory_index(Register::R11);
        }
        let offset = self.held(guest, RCX);
        let within = masks(offset_of!(Context, bit_within));
        self.assembler.pext(RCX, offset, within);
        i.set_op_register(1, renamed(original.op1_register(), RCX));
        self.encode(&i)?;
        if stores {
            self.mark();
        }
        Ok(())
    }

    fn lea(&mut self, i: &Instruction) -> Able {
        let to = number(i.op0_register())?;
        let place = PLACES[usize::from(to)];
        let host = place.unwrap_or(R10);
        match i.op0_register().size() {
            8 => self.offset(i, host, false)?,
            4 => self.offset(i, host, true)?,
            _ => return Err(Unable),
        }
        if place.is_none() {
            self.assembler.store(slot_mem(to), host);
        }
        Ok(())
    }

    /// Pushes what `value` puts into a register that it is given, RCX, or has already.
    pub(super) fn push_value(&mut self, instruction: usize, value: impl FnOnce(&mut Self) -> Reg) {
        self.assembler.lea(R10, at(R14, -8));
        self.probe_write(8, instruction);
        let value = value(self);
        self.assembler.store(at(R10, 0), value);
        self.mark();
        self.assembler.lea(R14, at(R14, -8));
    }

    fn push(&mut self, i: &Instruction, instruction: usize) -> Able {
        match i.code() {
            Code::Push_r64 => {
                let guest = number(i.op0_register())?;
                self.push_value(instruction, |work| work.held(guest, RCX));
            }
            Code::Pushq_imm8 | Code::Pushq_imm32 => {
                let value = i.immediate(0) as i64 as i32;
                self.assembler.lea(R10, at(R14, -8));
                self.probe_write(8, instruction);
                self.assembler.store_imm_64(at(R10, 0), value);
                self.mark();
                self.assembler.lea(R14, at(R14, -8));
            }
            Code::Push_rm64 if i.op0_kind() == OpKind::Memory => {
                self.address(i)?;
                let from = self.probe_read(8, instruction);
                self.assembler.load(RCX, from);
                self.assembler.store(scratch(), RCX);
                self.push_value(instruction, |work| {
                    work.assembler.load(RCX, scratch());
                    RCX
                });
            }
            _ => return Err(Unable),
        }
        Ok(())
    }

    fn pop(&mut self, i: &Instruction, instruction: usize) -> Able {
        if i.code() != Code::Pop_r64 {
            return Err(Unable);
        }
        let guest = number(i.op0_register())?;
        self.assembler.copy(R10, R14);
        let from = self.probe_read(8, instruction);
        match PLACES[usize::from(guest)] {
            Some(R14) => {
                self.assembler.load(R14, from);
                return Ok(());
            }
            Some(place) => self.assembler.load(place, from),
            None => {
                self.assembler.load(RCX, from);
                self.assembler.store(slot_mem(guest), RCX);
            }
        }
        self.assembler.lea(R14, at(R14, 8));
        Ok(())
    }

    fn leave(&mut self, i: &Instruction, instruction: usize) -> Able {
        if i.code() != Code::Leaveq {
            return Err(Unable);
        }
        const RBP: Reg = Reg(5);
        self.assembler.copy(R10, RBP);
        let from = self.probe_read(8, instruction);
        self.assembler.lea(R14, at(RBP, 8));
        self.assembler.load(RBP, from);
        Ok(())
    }

    /// Registers that are pushed in a row, the first first.
    fn push_row(&mut self, row: &[Instruction], instruction: usize) -> Able {
        let bytes = 8 * row.len() as i32;
        self.assembler.lea(R10, at(R14, -bytes));
        self.probe_write(bytes as u32, instruction);
        for (n, i) in row.iter().enumerate() {
            let guest = number(i.op0_register())?;
            let value = self.held(guest, RCX);
            self.assembler
                .store(at(R10, bytes - 8 * (n as i32 + 1)), value);
        }
        self.mark();
        self.assembler.lea(R14, at(R14, -bytes));
        Ok(())
    }

    /// Registers that are popped in a row.
    fn pop_row(&mut self, row: &[Instruction], instruction: usize) -> Able {
        let bytes = 8 * row.len() as i32;
        self.assembler.copy(R10, R14);
        self.probe_read(bytes as u32, instruction);
        for (n, i) in row.iter().enumerate() {
            let guest = number(i.op0_register())?;
            let from = at_index(R10, R11, 0, 8 * n as i32);
            match PLACES[usize::from(guest)] {
                Some(place) => self.assembler.load(place, from),
                None => {
                    self.assembler.load(RCX, from);
                    self.assembler.store(slot_mem(guest), RCX);
                }
            }
        }
        self.assembler.lea(R14, at(R14, bytes));
        Ok(())
    }

    /// A division that cannot fail: of a small number by what is not zero. The interpreter does all
    /// others.
    fn divide(&mut self, original: &Instruction, instruction: usize) -> Able {
        const RDX: Reg = Reg(2);
        let bytes = match original.op0_kind() {
            OpKind::Register => original.op0_register().size(),
            _ => original.memory_size().size(),
        };
        if bytes != 4 && bytes != 8 {
            return Err(Unable);
        }
        let wide = bytes == 8;
        match original.op0_kind() {
            OpKind::Register => {
                let guest = number(original.op0_register())?;
                self.fetch(R11, guest);
            }
            _ => {
                self.address(original)?;
                let from = self.probe_read(bytes as u32, instruction);
                if wide {
                    self.assembler.load(R11, from);
                } else {
                    self.assembler.load_32(R11, from);
                }
            }
        }
        let asm = self.asm();
        let cut = |asm: &mut Assembler, mem| {
            if wide {
                asm.lea(RCX, mem);
            } else {
                asm.lea_32(RCX, mem);
            }
        };
        cut(asm, at(R11, 0));
        let by_nothing = asm.if_rcx_zero();
        let (large, other) = if original.mnemonic() == M::Div {
            cut(asm, at(RDX, 0));
            (asm.unless_rcx_zero(), None)
        } else {
            // RDX is to be the sign of RAX, and the divisor not -1.
            let sign = offset_of!(Context, sign_bits) + usize::from(wide) * 8;
            asm.pext(R10, Reg(0), context(sign));
            cut(asm, at_index(RDX, R10, 0, 0));
            let large = asm.unless_rcx_zero();
            cut(asm, at(R11, 1));
            (large, Some(asm.if_rcx_zero()))
        };
        for jump in [Some(by_nothing), Some(large), other].into_iter().flatten() {
            self.step_at(jump, instruction);
        }
        let code = match (original.mnemonic(), wide) {
            (M::Div, true) => Code::Div_rm64,
            (M::Div, false) => Code::Div_rm32,
            (_, true) => Code::Idiv_rm64,
            (_, false) => Code::Idiv_rm32,
        };
        let register = if wide { Register::R11 } else { Register::R11D };
        let i = Instruction::with1(code, register).map_err(|_no_encoding| Unable)?;
        self.encode(&i)
    }

    /// On to an offset from the page's beginning: a jump that a stub, or code behind the rest, takes
    /// up.
    fn go(&mut self, jump: Jump, link: u8, offset: i64, instruction: Option<usize>) {
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
                jump,
                kind: StubKind::Link {
                    link,
                    offset,
                    calls,
                },
            }),
            (None, Ok(offset), _) => self.far.push(Far {
                jump,
                offset,
                instruction,
            }),
            // From the page's beginning it is further than an instruction can say.
            (None, Err(_), instruction) => self.step_at(jump, instruction.unwrap_or_default()),
        }
    }

    /// Finds the jump to the linear address in R10 in the table: R11 points to it. What is not there
    /// goes to the jumps that are given back.
    fn look_up_jump(&mut self) -> [Jump; 2] {
        let upper = self.upper;
        let asm = self.asm();
        find_jump(asm);
        asm.load(RCX, at(R11, offset_of!(KnownJump, linear) as i32));
        asm.lea(RCX, at_index(RCX, R10, 0, 0));
        let elsewhere = asm.unless_rcx_zero();
        let key = offset_of!(BlockCache, keys) + usize::from(upper) * 8;
        let key = offset_of!(Cpu, blocks) + key;
        asm.load(R10, at(R15, key as i32 - BIAS as i32));
        asm.load(RCX, at(R11, offset_of!(KnownJump, context) as i32));
        asm.lea(RCX, at_index(RCX, R10, 0, 0));
        [elsewhere, asm.unless_rcx_zero()]
    }

    /// As [`Work::look_up_jump`]; the interpreter does the instruction when the jump is not known.
    fn known_jump(&mut self, instruction: usize) {
        for unknown in self.look_up_jump() {
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
                let from = self.probe_read(8, instruction);
                self.assembler.load(R10, from);
            }
            _ => return Err(Unable),
        }
        Ok(())
    }

    /// Pushes the address of the next instruction.
    fn push_return(&mut self, i: &Instruction, instruction: usize) {
        let next = i.next_ip() as i32;
        self.push_value(instruction, |work| {
            work.assembler.load(RCX, page());
            work.assembler.lea(RCX, at(RCX, next));
            RCX
        });
    }

    /// A branch, which ends the block.
    fn branch(&mut self, i: &Instruction, instruction: usize) -> Able {
        match i.code() {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => {
                let jump = self.assembler.jump();
                self.go(jump, 0, i.near_branch_target() as i64, Some(instruction));
            }
            Code::Call_rel32_64 => {
                let offset = i.near_branch_target() as i64;
                if (0..=PAGE_OFFSET as i64).contains(&offset) {
                    self.push_return(i, instruction);
                    self.assembler.push_mem(page());
                    let call = self.assembler.call();
                    self.go_or_call(call, (0, true), offset, Some(instruction));
                    self.land_return(i);
                } else {
                    self.assembler.load(R10, page());
                    let offset = i32::try_from(offset).map_err(|_far| Unable)?;
                    self.assembler.lea(R10, at(R10, offset));
                    self.call_in_r10(i, instruction);
                }
            }
            Code::Call_rm64 => {
                self.target(i, instruction)?;
                self.call_in_r10(i, instruction);
            }
            Code::Jmp_rm64 => {
                self.target(i, instruction)?;
                self.known_jump(instruction);
                self.take_jump();
            }
            Code::Retnq => {
                self.assembler.copy(R10, R14);
                let from = self.probe_read(8, instruction);
                self.assembler.load(R10, from);
                // Where nobody knows the way, the interpreter does it, as if the look had failed.
                let number = (self.first_leaving + 1 + self.stubs.len() - 1) as u32;
                let exit = context(offset_of!(Context, exit));
                self.assembler.store_imm_32(exit, number);
                self.assembler.ret();
            }
            Code::Retnq_imm16 => {
                self.assembler.copy(R10, R14);
                let from = self.probe_read(8, instruction);
                self.assembler.load(R10, from);
                self.known_jump(instruction);
                let popped = 8 + i32::from(i.immediate16());
                self.assembler.lea(R14, at(R14, popped));
                self.take_jump();
            }
            _ if i.is_jcc_short_or_near() && i.op0_kind() == OpKind::NearBranch64 => {
                let condition = (i.condition_code() as u8).saturating_sub(1);
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
    fn call_in_r10(&mut self, i: &Instruction, instruction: usize) {
        self.known_jump(instruction);
        self.assembler.store(scratch(), R11);
        self.push_return(i, instruction);
        let asm = self.asm();
        asm.push_mem(page());
        asm.load(R11, scratch());
        asm.load(RCX, at(R11, offset_of!(KnownJump, page) as i32));
        asm.store(page(), RCX);
        asm.call_mem(at(R11, offset_of!(KnownJump, code) as i32));
        self.land_return(i);
    }

    /// Where the host returns to behind a call: R10 says where the guest returns to. That is the
    /// instruction behind the call, or the table knows where.
    fn land_return(&mut self, i: &Instruction) {
        let by_table = self.by_table;
        let next = i.next_ip() as i32;
        let asm = self.asm();
        asm.pop(R11);
        asm.not(R10);
        asm.lea(RCX, at_index(R11, R10, 0, next + 1));
        let elsewhere = asm.unless_rcx_zero();
        asm.store(page(), R11);
        asm.lea(R14, at(R14, 8));
        let on = asm.jump();
        self.go(on, 1, next.into(), None);
        self.assembler.land(elsewhere);
        self.assembler.not(R10);
        let away = self.assembler.jump();
        self.assembler.land_at(away, by_table);
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
            _ => self.vector(i, instruction),
        }
    }

    /// The way into the block: looks whether something is due, and counts.
    fn front(&mut self) -> (Jump, usize) {
        let instructions = self.block.instructions;
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
        asm.load(RCX, field!(instructions));
        asm.lea(RCX, at(RCX, instructions as i32));
        asm.store(field!(instructions), RCX);
        (look, entry)
    }

    /// Code for the ways out of the page, behind all else.
    fn far_ways(&mut self) {
        for Far {
            jump,
            offset,
            instruction,
        } in std::mem::take(&mut self.far)
        {
            self.assembler.land(jump);
            self.assembler.load(R10, page());
            self.assembler.lea(R10, at(R10, offset));
            match instruction {
                Some(instruction) => self.known_jump(instruction),
                None => {
                    let unknown = self.look_up_jump();
                    let kind = |jump| Stub {
                        jump,
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
    asm.load(RCX, at(R11, offset_of!(KnownJump, linear) as i32));
    asm.lea(RCX, at_index(RCX, R10, 0, 0));
    let elsewhere = asm.unless_rcx_zero();
    // The half of the address tells which context has to be that of now.
    asm.pext(RCX, R10, context(offset_of!(Context, sign_bits) + 8));
    let keys = offset_of!(Cpu, blocks) + offset_of!(BlockCache, keys);
    asm.load(R10, at_index(R15, RCX, 3, keys as i32 - BIAS as i32));
    asm.load(RCX, at(R11, offset_of!(KnownJump, context) as i32));
    asm.lea(RCX, at_index(RCX, R10, 0, 0));
    let stale = asm.unless_rcx_zero();
    asm.lea(R14, at(R14, 8));
    asm.load(RCX, at(R11, offset_of!(KnownJump, page) as i32));
    asm.store(page(), RCX);
    asm.jump_to_mem(at(R11, offset_of!(KnownJump, code) as i32));
    for jump in [elsewhere, stale] {
        asm.land_at(jump, WAY_OUT as isize - start as isize);
    }
    Returns { bottom, by_table }
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

/// The instructions that are done together: pushes or pops of registers.
fn row(instructions: &[Instruction]) -> &[Instruction] {
    let Some(first) = instructions.first() else {
        return instructions;
    };
    let same = |i: &&Instruction| {
        i.code() == first.code() && i.op0_register() != Register::RSP && i.op0_register().is_gpr()
    };
    let count = match first.code() {
        Code::Push_r64 | Code::Pop_r64 => instructions.iter().take_while(same).count(),
        _ => 1,
    };
    &instructions[..count.clamp(1, MOST_IN_A_ROW)]
}

/// Is it done here, and not by the interpreter in any case?
pub(crate) fn is_known(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        M::Lea | M::Push | M::Pop | M::Leave | M::Jmp | M::Call | M::Ret | M::Div | M::Idiv
    ) || is_nothing(i.mnemonic())
        || i.is_jcc_short_or_near()
        || is_plain(i.mnemonic())
        || super::sse::is_known(i)
        || super::system::is_known(i)
}

impl Translator {
    /// Translates a block of 64-bit code whose bytes are given; `upper`: it runs in the upper half.
    /// Where its code is, if it became any.
    pub(crate) fn translate(
        &mut self,
        block: &Block,
        bytes: &[u8],
        (baseline, mark, upper): (&'static Baseline, u8, bool),
    ) -> Option<*const u8> {
        let memory = self.memory.as_mut()?;
        if memory.room() < 2 * MOST {
            self.full = true;
            return None;
        }
        self.assembler.clear();
        let start = memory.used().next_multiple_of(16);
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
            upper,
            sse_checked: false,
            places: Vec::new(),
            stubs: Vec::new(),
            far: Vec::new(),
        };
        let decoder = Decoder::with_ip(64, bytes, block.start.into(), DecoderOptions::NONE);
        let instructions: Vec<Instruction> = decoder.into_iter().collect();
        if self.verifies && !instructions.iter().all(is_known) {
            // Something that is not to be done twice.
            return None;
        }
        let (look, entry) = work.front();
        // The operations of each instruction; one that a comparison took in has none.
        let mut op = 0;
        for i in &instructions {
            let from = i.ip() as u16 - block.start;
            let first = op;
            while op + 1 < block.ops.len() && block.ops[op].offset == from {
                op += 1;
            }
            work.places.push(Place {
                op: first as u16,
                count: (op - first) as u16,
                resume: 0,
            });
        }
        let mut number = 0;
        while let Some(i) = instructions.get(number) {
            let row = row(&instructions[number..]);
            let before = (
                work.assembler.here(),
                work.stubs.len(),
                work.far.len(),
                work.sse_checked,
            );
            let done = match row {
                [one] => work.instruction(one, number),
                [first, ..] if first.mnemonic() == M::Push => work.push_row(row, number),
                _ => work.pop_row(row, number),
            };
            let mut taken = row.len();
            if done.is_err() {
                let (code, stubs, far, sse_checked) = before;
                work.assembler.cut(code);
                work.stubs.truncate(stubs);
                work.far.truncate(far);
                work.sse_checked = sse_checked;
                taken = 1;
                if work.places[number].count == 0 {
                    // There is nothing that the interpreter could do for it.
                    return None;
                }
                work.leave_to_interpreter(number);
            }
            work.places[number].count = work.places[number..number + taken]
                .iter()
                .map(|place| place.count)
                .sum();
            work.places[number].resume = work.assembler.here();
            number += taken;
            if i.is_invalid() || work.assembler.here() > MOST {
                return None;
            }
        }
        let falls = |i: &Instruction| i.flow_control() == FlowControl::Next;
        if block.goes_on() || instructions.last().is_some_and(falls) {
            // Some of the latter do not get here: the interpreter ends the block with them.
            let offset = i64::from(block.start) + i64::from(block.bytes);
            let on = work.assembler.jump();
            work.go(on, 1, offset, None);
        }
        work.far_ways();
        let Work { places, stubs, .. } = work;
        let way_out = WAY_OUT as isize - start as isize;
        let exit = context(offset_of!(Context, exit));
        let asm = &mut self.assembler;
        let leavings = &mut self.leavings;
        let mut leave = |jump: Jump, kind: Kind| {
            asm.land(jump);
            asm.store_imm_32(exit, leavings.len() as u32);
            let out = asm.jump();
            asm.land_at(out, way_out);
            leavings.push(Leaving { block, kind });
        };
        leave(look, Kind::Look);
        for Stub { jump, kind } in stubs {
            let kind = match kind {
                StubKind::Link {
                    link,
                    offset,
                    calls,
                } => Kind::Link {
                    link,
                    offset,
                    calls,
                    place: (start + jump.place()) as u32,
                },
                StubKind::Away { offset } => Kind::Away { offset },
                StubKind::Step(number) => {
                    let place = places[number];
                    Kind::Step {
                        op: place.op,
                        count: place.count,
                        resume: (start + place.resume) as u32,
                    }
                }
            };
            leave(jump, kind);
        }
        let at = memory.append(self.assembler.bytes())?;
        debug_assert_eq!(at, start, "where it was made for");
        Some(memory.address(at + entry))
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
