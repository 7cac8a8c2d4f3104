//! SSE instructions: the host's own, on registers that live in the processor's state.

use iced_x86::{CpuidFeature, Instruction, Mnemonic as M, OpKind, Register};
use std::mem::offset_of;

use super::Context;
use super::emit::{Mem, R10, R13, R15, RCX, Reg, at};
use super::enter::BIAS;
use super::translate::{Able, PLACES, Unable, Work, context, number, renamed, slot_mem, writes};
use crate::cpu::Cpu;
use crate::float::FloatState;

/// What an instruction has to do with MXCSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nothing,
    Arithmetic,
}

/// Instructions with at most two vector registers and one general register, all of them named.
fn kind(mnemonic: M) -> Option<Kind> {
    Some(match mnemonic {
        M::Movaps
        | M::Movapd
        | M::Movups
        | M::Movupd
        | M::Movdqa
        | M::Movdqu
        | M::Lddqu
        | M::Movss
        | M::Movsd
        | M::Movd
        | M::Movq
        | M::Movlps
        | M::Movlpd
        | M::Movhps
        | M::Movhpd
        | M::Movhlps
        | M::Movlhps
        | M::Movddup
        | M::Movsldup
        | M::Movshdup
        | M::Movntps
        | M::Movntpd
        | M::Movntdq
        | M::Movmskps
        | M::Movmskpd
        | M::Andps
        | M::Andpd
        | M::Andnps
        | M::Andnpd
        | M::Orps
        | M::Orpd
        | M::Xorps
        | M::Xorpd
        | M::Shufps
        | M::Shufpd
        | M::Unpcklps
        | M::Unpcklpd
        | M::Unpckhps
        | M::Unpckhpd
        | M::Insertps
        | M::Extractps
        | M::Blendps
        | M::Blendpd
        | M::Pxor
        | M::Por
        | M::Pand
        | M::Pandn
        | M::Paddb
        | M::Paddw
        | M::Paddd
        | M::Paddq
        | M::Paddsb
        | M::Paddsw
        | M::Paddusb
        | M::Paddusw
        | M::Psubb
        | M::Psubw
        | M::Psubd
        | M::Psubq
        | M::Psubsb
        | M::Psubsw
        | M::Psubusb
        | M::Psubusw
        | M::Pmullw
        | M::Pmulhw
        | M::Pmulhuw
        | M::Pmuludq
        | M::Pmulld
        | M::Pmuldq
        | M::Pmaddwd
        | M::Pmaddubsw
        | M::Pmulhrsw
        | M::Pavgb
        | M::Pavgw
        | M::Psadbw
        | M::Pminub
        | M::Pminsw
        | M::Pminsb
        | M::Pminuw
        | M::Pminud
        | M::Pminsd
        | M::Pmaxub
        | M::Pmaxsw
        | M::Pmaxsb
        | M::Pmaxuw
        | M::Pmaxud
        | M::Pmaxsd
        | M::Pcmpeqb
        | M::Pcmpeqw
        | M::Pcmpeqd
        | M::Pcmpeqq
        | M::Pcmpgtb
        | M::Pcmpgtw
        | M::Pcmpgtd
        | M::Pcmpgtq
        | M::Pmovmskb
        | M::Pshufd
        | M::Pshuflw
        | M::Pshufhw
        | M::Pshufb
        | M::Palignr
        | M::Punpcklbw
        | M::Punpcklwd
        | M::Punpckldq
        | M::Punpcklqdq
        | M::Punpckhbw
        | M::Punpckhwd
        | M::Punpckhdq
        | M::Punpckhqdq
        | M::Packsswb
        | M::Packssdw
        | M::Packuswb
        | M::Packusdw
        | M::Psllw
        | M::Pslld
        | M::Psllq
        | M::Pslldq
        | M::Psrlw
        | M::Psrld
        | M::Psrlq
        | M::Psrldq
        | M::Psraw
        | M::Psrad
        | M::Pabsb
        | M::Pabsw
        | M::Pabsd
        | M::Psignb
        | M::Psignw
        | M::Psignd
        | M::Phaddw
        | M::Phaddd
        | M::Phsubw
        | M::Phsubd
        | M::Pinsrw
        | M::Pinsrb
        | M::Pinsrd
        | M::Pinsrq
        | M::Pextrw
        | M::Pextrb
        | M::Pextrd
        | M::Pextrq
        | M::Pblendw
        | M::Ptest
        | M::Pmovsxbw
        | M::Pmovsxbd
        | M::Pmovsxbq
        | M::Pmovsxwd
        | M::Pmovsxwq
        | M::Pmovsxdq
        | M::Pmovzxbw
        | M::Pmovzxbd
        | M::Pmovzxbq
        | M::Pmovzxwd
        | M::Pmovzxwq
        | M::Pmovzxdq
        | M::Pcmpistri
        | M::Pcmpestri => Kind::Nothing,
        M::Addss
        | M::Addsd
        | M::Addps
        | M::Addpd
        | M::Subss
        | M::Subsd
        | M::Subps
        | M::Subpd
        | M::Mulss
        | M::Mulsd
        | M::Mulps
        | M::Mulpd
        | M::Divss
        | M::Divsd
        | M::Divps
        | M::Divpd
        | M::Sqrtss
        | M::Sqrtsd
        | M::Sqrtps
        | M::Sqrtpd
        | M::Minss
        | M::Minsd
        | M::Minps
        | M::Minpd
        | M::Maxss
        | M::Maxsd
        | M::Maxps
        | M::Maxpd
        | M::Cmpss
        | M::Cmpsd
        | M::Cmpps
        | M::Cmppd
        | M::Comiss
        | M::Comisd
        | M::Ucomiss
        | M::Ucomisd
        | M::Cvtsi2ss
        | M::Cvtsi2sd
        | M::Cvtss2si
        | M::Cvtsd2si
        | M::Cvttss2si
        | M::Cvttsd2si
        | M::Cvtss2sd
        | M::Cvtsd2ss
        | M::Cvtps2pd
        | M::Cvtpd2ps
        | M::Cvtdq2ps
        | M::Cvtps2dq
        | M::Cvttps2dq
        | M::Cvtdq2pd
        | M::Cvtpd2dq
        | M::Cvttpd2dq
        | M::Roundss
        | M::Roundsd
        | M::Roundps
        | M::Roundpd => Kind::Arithmetic,
        _ => return None,
    })
}

/// Does it take a memory operand of 16 bytes wherever that is?
fn takes_any_address(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu | M::Pcmpistri | M::Pcmpestri
    )
}

/// Is it one of the extensions that the host has, too (checked where the translator is made)?
fn is_vector(i: &Instruction) -> bool {
    !i.is_string_instruction()
        && i.cpuid_features().iter().all(|feature| {
            matches!(
                feature,
                CpuidFeature::SSE
                    | CpuidFeature::SSE2
                    | CpuidFeature::SSE3
                    | CpuidFeature::SSSE3
                    | CpuidFeature::SSE4_1
                    | CpuidFeature::SSE4_2
            )
        })
}

/// Is it an instruction of this file?
pub(super) fn is_known(i: &Instruction) -> bool {
    kind(i.mnemonic()).is_some() && is_vector(i)
}

pub(super) fn vector_mem(guest: u8) -> Mem {
    let registers = offset_of!(Cpu, float) + offset_of!(FloatState, xmm);
    at(
        R15,
        (registers + usize::from(guest) * 16) as i32 - BIAS as i32,
    )
}

impl Work<'_> {
    /// The address has to be a multiple of 16.
    pub(super) fn whole(&mut self, address: Reg, instruction: usize) {
        let low_bits = context(offset_of!(Context, low_bits));
        self.assembler.pext(RCX, address, low_bits);
        let astray = self.assembler.unless_rcx_zero();
        self.step_at(astray, instruction);
    }

    /// An SSE instruction.
    pub(super) fn vector(&mut self, original: &Instruction, instruction: usize) -> Able {
        let kind = kind(original.mnemonic())
            .filter(|_| is_vector(original))
            .ok_or(Unable)?;
        let mut i = *original;
        // Known before a register is chosen: it may be the operand that comes first.
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        // Vector registers of the host, and the guest's that they stand for.
        let mut vectors = [None::<u8>; 3];
        let mut general = None;
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register => {}
                OpKind::Memory | OpKind::Immediate8 => continue,
                _ => return Err(Unable),
            }
            let register = i.op_register(n);
            if register.is_xmm() {
                let guest = register.number() as u8;
                let host = vectors
                    .iter()
                    .position(|&known| known.is_none() || known == Some(guest))
                    .ok_or(Unable)?;
                vectors[host] = Some(guest);
                i.set_op_register(n, Register::XMM0 + host as u32);
            } else if register.is_gpr() && general.is_none() {
                let guest = number(register)?;
                let host = PLACES[usize::from(guest)];
                let scratch = if memory { RCX } else { R10 };
                let held = host.unwrap_or(scratch);
                general = Some((n, guest, host.is_none().then_some(scratch)));
                i.set_op_register(n, renamed(register, held));
            } else {
                return Err(Unable);
            }
        }
        let access = self.access(original);
        let stores = memory
            && (0..i.op_count())
                .any(|n| i.op_kind(n) == OpKind::Memory && writes(access[n as usize]));
        if !self.sse_checked {
            self.assembler
                .load(RCX, context(offset_of!(Context, sse_blocked)));
            let blocked = self.assembler.unless_rcx_zero();
            self.step_at(blocked, instruction);
            self.sse_checked = true;
        }
        if kind == Kind::Arithmetic {
            self.assembler
                .load(RCX, context(offset_of!(Context, arithmetic_blocked)));
            let blocked = self.assembler.unless_rcx_zero();
            self.step_at(blocked, instruction);
            self.assembler
                .store_imm_8(context(offset_of!(Context, arithmetic_done)), 1);
        }
        if memory {
            let bytes = original.memory_size().size() as u32;
            if bytes == 0 || bytes > 16 {
                return Err(Unable);
            }
            let whole = bytes == 16 && !takes_any_address(original.mnemonic());
            self.locate(&mut i, (bytes, stores, whole), instruction)?;
        }
        for (host, guest) in vectors.iter().enumerate() {
            if let Some(guest) = guest {
                self.assembler.load_vector(host as u8, vector_mem(*guest));
            }
        }
        if let Some((_, guest, Some(scratch))) = general {
            self.assembler.load(scratch, slot_mem(guest));
        }
        self.encode(&i)?;
        if matches!(i.mnemonic(), M::Pcmpistri | M::Pcmpestri) {
            // The index is in ECX.
            self.assembler.copy(R13, RCX);
        }
        if stores {
            self.mark_for(instruction);
        }
        for n in 0..i.op_count() {
            if !writes(access[n as usize]) || i.op_kind(n) != OpKind::Register {
                continue;
            }
            if original.op_register(n).is_xmm() {
                let guest = original.op_register(n).number() as u8;
                let host = vectors.iter().position(|&known| known == Some(guest));
                if let Some(host) = host {
                    self.assembler.store_vector(vector_mem(guest), host as u8);
                }
            } else if let Some((at, guest, Some(scratch))) = general
                && at == n
            {
                self.assembler.store(slot_mem(guest), scratch);
            }
        }
        Ok(())
    }
}
