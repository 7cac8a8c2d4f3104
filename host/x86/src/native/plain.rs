//! Instructions that the host does as they are, with other operands.

use std::mem::offset_of;

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

use super::Context;
use super::emit::{Assembler, R10, R11, R13, RCX, Reg, at, at_index};
use super::translate::{Able, PLACES, Unable, Work, context, number, renamed, slot_mem, writes};
use crate::decode::is_general_vex;

/// May an instruction be run as it is, with other registers?
pub(super) fn is_plain(mnemonic: M) -> bool {
    is_general_vex(mnemonic)
        || matches!(
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
                | M::Movbe
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

/// Does the host have it? BMI2, it has in any case.
fn host_has(mnemonic: M) -> bool {
    match mnemonic {
        M::Movbe => is_x86_feature_detected!("movbe"),
        M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr => is_x86_feature_detected!("bmi1"),
        _ => true,
    }
}

fn is_high(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::BH | Register::CH | Register::DH
    )
}

impl Work<'_> {
    /// An instruction that is run as it is.
    pub(super) fn plain(&mut self, original: &Instruction, instruction: usize) -> Able {
        let mut i = *original;
        if i.code() == Code::Movsxd_r16_rm16 {
            // Some processors read 32 bits of memory, others 16.
            return Err(Unable);
        }
        if !host_has(i.mnemonic()) {
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
            Code::Tzcnt_r32_rm32 | Code::Tzcnt_r64_rm64 if is_x86_feature_detected!("bmi1") => {}
            Code::Lzcnt_r32_rm32 | Code::Lzcnt_r64_rm64 if is_x86_feature_detected!("lzcnt") => {}
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
            self.locate(&mut i, (bytes, stores, false), instruction)?;
        }
        for (guest, host) in held.into_iter().flatten() {
            self.assembler.load(host, slot_mem(guest));
        }
        if by_count {
            self.assembler.copy(RCX, R13);
        }
        self.encode(&i)?;
        if stores {
            self.mark_for(instruction);
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
        self.redirect(&mut i, R10, (bytes as u32, stores), instruction);
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

    pub(super) fn lea(&mut self, i: &Instruction) -> Able {
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

    /// A division that cannot fail: of a small number by what is not zero. The interpreter does all
    /// others.
    pub(super) fn divide(&mut self, original: &Instruction, instruction: usize) -> Able {
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
                let from = self.probe_read(R10, bytes as u32, instruction);
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
}
