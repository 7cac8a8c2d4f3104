//! AVX, AVX2 and FMA: the host's own instructions, on registers that live in the processor's state.
//!
//! Between two instructions the upper halves of the host's vector registers are zero, so that what comes
//! between need not care for them.

use std::mem::offset_of;

use iced_x86::{CpuidFeature, Instruction, Mnemonic as M, OpKind, Register};

use super::Context;
use super::emit::{Mem, R10, R15, RCX, at};
use super::enter::BIAS;
use super::sse::vector_mem;
use super::translate::{Able, PLACES, Unable, Work, context, number, renamed, slot_mem, writes};
use crate::cpu::Cpu;
use crate::float::{FloatState, host_executes};

/// A vector register of the host that is free.
const FREE: u8 = 7;

/// Is it an instruction of this file? The rest, the interpreter does: what touches memory element by
/// element, or other state than its operands, comparisons of strings, and dot products, which choose
/// among NaNs as each vendor likes.
pub(super) fn is_known(i: &Instruction) -> bool {
    let executed = |feature: &CpuidFeature| match feature {
        CpuidFeature::AVX => host_executes("avx"),
        CpuidFeature::AVX2 => host_executes("avx2"),
        CpuidFeature::FMA => host_executes("fma"),
        _ => false,
    };
    !i.is_vsib()
        && i.cpuid_features().iter().all(executed)
        && !matches!(
            i.mnemonic(),
            M::Vmaskmovps
                | M::Vmaskmovpd
                | M::Vpmaskmovd
                | M::Vpmaskmovq
                | M::Vmaskmovdqu
                | M::Vldmxcsr
                | M::Vstmxcsr
                | M::Vzeroupper
                | M::Vzeroall
                | M::Vdpps
                | M::Vdppd
                | M::Vpcmpistri
                | M::Vpcmpistrm
                | M::Vpcmpestri
                | M::Vpcmpestrm
                | M::Vpcmpestri64
                | M::Vpcmpestrm64
        )
}

/// Has it nothing to do with MXCSR? Of those that are not listed, it does not matter.
fn ignores_mxcsr(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Vmovups
            | M::Vmovupd
            | M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqu
            | M::Vmovdqa
            | M::Vlddqu
            | M::Vmovntps
            | M::Vmovntdq
            | M::Vmovd
            | M::Vmovq
            | M::Vmovss
            | M::Vmovsd
            | M::Vmovhps
            | M::Vmovlps
            | M::Vmovhlps
            | M::Vmovlhps
            | M::Vmovddup
            | M::Vpxor
            | M::Vpor
            | M::Vpand
            | M::Vpandn
            | M::Vxorps
            | M::Vxorpd
            | M::Vandps
            | M::Vandpd
            | M::Vandnps
            | M::Vorps
            | M::Vpaddb
            | M::Vpaddw
            | M::Vpaddd
            | M::Vpaddq
            | M::Vpsubb
            | M::Vpsubw
            | M::Vpsubd
            | M::Vpsubq
            | M::Vpmulld
            | M::Vpmullw
            | M::Vpmuludq
            | M::Vpcmpeqb
            | M::Vpcmpeqw
            | M::Vpcmpeqd
            | M::Vpcmpeqq
            | M::Vpcmpgtb
            | M::Vpcmpgtd
            | M::Vpminub
            | M::Vpminud
            | M::Vpmaxub
            | M::Vpmovmskb
            | M::Vmovmskps
            | M::Vmovmskpd
            | M::Vptest
            | M::Vpshufb
            | M::Vpshufd
            | M::Vshufps
            | M::Vshufpd
            | M::Vpalignr
            | M::Vpslld
            | M::Vpsllq
            | M::Vpsrld
            | M::Vpsrlq
            | M::Vpslldq
            | M::Vpsrldq
            | M::Vpsllvd
            | M::Vpsrlvd
            | M::Vpunpcklbw
            | M::Vpunpcklwd
            | M::Vpunpckldq
            | M::Vpunpcklqdq
            | M::Vpunpckhbw
            | M::Vpunpckhwd
            | M::Vpunpckhdq
            | M::Vpunpckhqdq
            | M::Vunpcklps
            | M::Vunpcklpd
            | M::Vpblendd
            | M::Vpblendvb
            | M::Vpblendw
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
            | M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vbroadcasti128
            | M::Vbroadcastf128
            | M::Vinserti128
            | M::Vinsertf128
            | M::Vextracti128
            | M::Vextractf128
            | M::Vperm2i128
            | M::Vperm2f128
            | M::Vpermq
            | M::Vpermd
            | M::Vpermilps
            | M::Vpermilpd
            | M::Vpextrd
            | M::Vpextrq
            | M::Vpinsrd
            | M::Vpinsrq
    )
}

/// Does the address of its memory operand have to be a multiple of the operand's size?
fn is_aligned(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    )
}

fn upper_mem(guest: u8) -> Mem {
    let registers = offset_of!(Cpu, float) + offset_of!(FloatState, upper);
    at(
        R15,
        (registers + usize::from(guest) * 16) as i32 - BIAS as i32,
    )
}

/// A vector register of the guest that an instruction names.
#[derive(Clone, Copy)]
struct Named {
    guest: u8,
    /// As a YMM register.
    wide: bool,
}

/// The general register of an instruction: operand, guest register, and the scratch register that holds
/// it, if one does.
type General = Option<(u32, u8, Option<super::emit::Reg>)>;

/// Gives the instruction registers of the host.
fn rename(i: &mut Instruction, memory: bool) -> Able<([Option<Named>; 4], General)> {
    let mut vectors = [None::<Named>; 4];
    let mut general = None;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {}
            OpKind::Memory | OpKind::Immediate8 => continue,
            _ => return Err(Unable),
        }
        let register = i.op_register(n);
        if register.is_xmm() || register.is_ymm() {
            let (guest, wide) = (register.number() as u8, register.is_ymm());
            let host = vectors
                .iter()
                .position(|known| known.is_none_or(|known| known.guest == guest))
                .ok_or(Unable)?;
            let known = vectors[host].is_some_and(|known| known.wide);
            vectors[host] = Some(Named {
                guest,
                wide: wide || known,
            });
            let first = if wide { Register::YMM0 } else { Register::XMM0 };
            i.set_op_register(n, first + host as u32);
        } else if register.is_gpr() && general.is_none() {
            let guest = number(register)?;
            let place = PLACES[usize::from(guest)];
            let scratch = if memory { RCX } else { R10 };
            general = Some((n, guest, place.is_none().then_some(scratch)));
            i.set_op_register(n, renamed(register, place.unwrap_or(scratch)));
        } else {
            return Err(Unable);
        }
    }
    Ok((vectors, general))
}

impl Work<'_> {
    /// An AVX instruction.
    pub(super) fn avx(&mut self, original: &Instruction, instruction: usize) -> Able {
        let mut i = *original;
        let memory = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
        let (vectors, general) = rename(&mut i, memory.is_some())?;
        let access = self.access(original);
        let stores = memory.is_some_and(|n| writes(access[n as usize]));
        self.check_avx(original, instruction);
        if memory.is_some() {
            let bytes = original.memory_size().size() as u32;
            if bytes == 0 || bytes > 32 {
                return Err(Unable);
            }
            self.address(original)?;
            if is_aligned(original.mnemonic()) {
                self.aligned(bytes, instruction);
            }
            self.redirect(&mut i, R10, (bytes, stores), instruction);
        }
        let named = || {
            (0..)
                .zip(vectors)
                .filter_map(|(host, named)| Some((host, named?)))
        };
        for (host, named) in named() {
            self.assembler.load_vector(host, vector_mem(named.guest));
            if named.wide {
                self.assembler.load_upper(host, upper_mem(named.guest));
            }
        }
        if let Some((_, guest, Some(scratch))) = general {
            self.assembler.load(scratch, slot_mem(guest));
        }
        self.encode(&i)?;
        if stores {
            self.mark();
        }
        // The destination comes first.
        if i.op0_kind() == OpKind::Register && writes(access[0]) {
            match (general, vectors[0]) {
                (Some((0, guest, scratch)), _) => {
                    if let Some(scratch) = scratch {
                        self.assembler.store(slot_mem(guest), scratch);
                    }
                }
                (_, Some(Named { guest, .. })) => {
                    self.assembler.store_vector(vector_mem(guest), 0);
                    if original.op0_register().is_ymm() {
                        self.assembler.store_upper(upper_mem(guest), 0);
                    } else {
                        self.assembler.zero_vector(FREE);
                        self.assembler.store_vector(upper_mem(guest), FREE);
                    }
                }
                _ => return Err(Unable),
            }
        }
        if named().any(|(_, named)| named.wide) {
            self.assembler.zero_uppers();
        }
        Ok(())
    }

    /// Leaves to the interpreter what does not run here, or not as on the host.
    fn check_avx(&mut self, original: &Instruction, instruction: usize) {
        self.assembler
            .load(RCX, context(offset_of!(Context, avx_blocked)));
        let blocked = self.assembler.unless_rcx_zero();
        self.step_at(blocked, instruction);
        if !ignores_mxcsr(original.mnemonic()) {
            self.assembler
                .load(RCX, context(offset_of!(Context, arithmetic_blocked)));
            let blocked = self.assembler.unless_rcx_zero();
            self.step_at(blocked, instruction);
            self.assembler
                .store_imm_8(context(offset_of!(Context, arithmetic_done)), 1);
        }
    }

    /// The address in R10 has to be a multiple of `bytes`.
    fn aligned(&mut self, bytes: u32, instruction: usize) {
        if bytes != 32 {
            self.whole(R10, instruction);
            return;
        }
        let low_bits = context(offset_of!(Context, low_bits_wide));
        self.assembler.pext(RCX, R10, low_bits);
        let astray = self.assembler.unless_rcx_zero();
        self.step_at(astray, instruction);
    }
}
