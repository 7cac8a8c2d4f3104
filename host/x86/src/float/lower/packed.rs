//! Integer SIMD and shuffles: functions of two registers and an immediate.

use iced_x86::{Instruction, Mnemonic};

use super::from::{M16, M32, M64, M128};
use super::{mm_mmm, xmm, xmm_from, xmm_xmmm};
use crate::exec::op::{Handler, straight};
use crate::float::integer as int;
use crate::float::shuffle;

/// A table of mnemonics: each line names the width of memory and the function.
macro_rules! xmm_table {
    ($instruction:expr; $($mnemonic:ident: $memory:ident, $f:expr;)*) => {
        match $instruction.mnemonic() {
            $(Mnemonic::$mnemonic => Some(xmm_xmmm::<$memory>($instruction, |a, b, _| $f(a, b))),)*
            _ => None,
        }
    };
}

/// The same for functions that take the immediate too.
macro_rules! immediate_table {
    ($instruction:expr; $($mnemonic:ident: $memory:ident, $f:expr;)*) => {
        match $instruction.mnemonic() {
            $(Mnemonic::$mnemonic => Some(xmm_xmmm::<$memory>($instruction, $f)),)*
            _ => None,
        }
    };
}

/// Instructions that exist for MMX and XMM registers; `wide` ones depend on the width.
macro_rules! both_table {
    ($instruction:expr; $($mnemonic:ident: $f:ident;)* ; wide $($mnemonic_wide:ident: $wide:ident;)*) => {{
        let mmx = $instruction.op0_register().is_mm();
        match $instruction.mnemonic() {
            $(Mnemonic::$mnemonic => Some(if mmx {
                mm_mmm::<M64>($instruction, |a, b, _| int::$f(a, b))
            } else {
                xmm_xmmm::<M128>($instruction, |a, b, _| int::$f(a, b))
            }),)*
            $(Mnemonic::$mnemonic_wide => Some(if mmx {
                mm_mmm::<M64>($instruction, |a, b, _| int::$wide::<8>(a, b))
            } else {
                xmm_xmmm::<M128>($instruction, |a, b, _| int::$wide::<16>(a, b))
            }),)*
            _ => None,
        }
    }};
}

pub(super) fn lower(instruction: &Instruction) -> Option<Handler> {
    vectors(instruction)
        .or_else(|| both(instruction))
        .or_else(|| unpack_low(instruction))
        .or_else(|| xmm_only(instruction))
        .or_else(|| shuffles(instruction))
        .or_else(|| by_immediate(instruction))
        .or_else(|| blend_by_xmm0(instruction))
}

/// XMM forms for which the host has one instruction.
#[cfg(target_arch = "x86_64")]
fn vectors(instruction: &Instruction) -> Option<Handler> {
    use crate::float::vector;
    if instruction.op0_register().is_mm() {
        return None;
    }
    xmm_table! { instruction;
        Paddb: M128, vector::paddb; Paddw: M128, vector::paddw;
        Paddd: M128, vector::paddd; Paddq: M128, vector::paddq;
        Psubb: M128, vector::psubb; Psubw: M128, vector::psubw;
        Psubd: M128, vector::psubd; Psubq: M128, vector::psubq;
        Psubusb: M128, vector::psubusb;
        Pminub: M128, vector::pminub; Pmaxub: M128, vector::pmaxub;
        Pcmpeqb: M128, vector::pcmpeqb; Pcmpeqw: M128, vector::pcmpeqw;
        Pcmpeqd: M128, vector::pcmpeqd;
        Pcmpgtb: M128, vector::pcmpgtb; Pcmpgtw: M128, vector::pcmpgtw;
        Pcmpgtd: M128, vector::pcmpgtd;
        Packuswb: M128, vector::packuswb;
        Punpcklbw: M128, vector::punpcklbw; Punpcklwd: M128, vector::punpcklwd;
        Punpckldq: M128, vector::punpckldq; Unpcklps: M128, vector::punpckldq;
        Punpckhbw: M128, vector::punpckhbw; Punpckhwd: M128, vector::punpckhwd;
        Punpckhdq: M128, vector::punpckhdq; Unpckhps: M128, vector::punpckhdq;
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vectors(_: &Instruction) -> Option<Handler> {
    None
}

fn both(instruction: &Instruction) -> Option<Handler> {
    both_table! { instruction;
        Paddb: paddb; Paddw: paddw; Paddd: paddd; Paddq: paddq;
        Psubb: psubb; Psubw: psubw; Psubd: psubd; Psubq: psubq;
        Paddsb: paddsb; Paddsw: paddsw; Paddusb: paddusb; Paddusw: paddusw;
        Psubsb: psubsb; Psubsw: psubsw; Psubusb: psubusb; Psubusw: psubusw;
        Pminub: pminub; Pminsw: pminsw; Pmaxub: pmaxub; Pmaxsw: pmaxsw;
        Pavgb: pavgb; Pavgw: pavgw; Psadbw: psadbw;
        Pcmpeqb: pcmpeqb; Pcmpeqw: pcmpeqw; Pcmpeqd: pcmpeqd;
        Pcmpgtb: pcmpgtb; Pcmpgtw: pcmpgtw; Pcmpgtd: pcmpgtd;
        Pmullw: pmullw; Pmulhw: pmulhw; Pmulhuw: pmulhuw; Pmulhrsw: pmulhrsw;
        Pmuludq: pmuludq; Pmaddwd: pmaddwd; Pmaddubsw: pmaddubsw;
        Psignb: psignb; Psignw: psignw; Psignd: psignd;
        Pabsb: pabsb; Pabsw: pabsw; Pabsd: pabsd;
        Pand: pand; Pandn: pandn; Por: por; Pxor: pxor;
        Psllw: psllw; Pslld: pslld; Psllq: psllq;
        Psrlw: psrlw; Psrld: psrld; Psrlq: psrlq;
        Psraw: psraw; Psrad: psrad;
        ; wide
        Packsswb: packsswb; Packuswb: packuswb; Packssdw: packssdw;
        Punpckhbw: punpckhbw; Punpckhwd: punpckhwd; Punpckhdq: punpckhdq;
        Phaddw: phaddw; Phaddd: phaddd; Phaddsw: phaddsw;
        Phsubw: phsubw; Phsubd: phsubd; Phsubsw: phsubsw;
        Pshufb: pshufb;
    }
}

/// Their MMX forms read only as much memory as they use.
fn unpack_low(instruction: &Instruction) -> Option<Handler> {
    macro_rules! form {
        ($f:ident) => {
            if instruction.op0_register().is_mm() {
                mm_mmm::<M32>(instruction, |a, b, _| int::$f(a, b))
            } else {
                xmm_xmmm::<M128>(instruction, |a, b, _| int::$f(a, b))
            }
        };
    }
    Some(match instruction.mnemonic() {
        Mnemonic::Punpcklbw => form!(punpcklbw),
        Mnemonic::Punpcklwd => form!(punpcklwd),
        Mnemonic::Punpckldq => form!(punpckldq),
        _ => return None,
    })
}

fn xmm_only(instruction: &Instruction) -> Option<Handler> {
    xmm_table! { instruction;
        Andps: M128, int::pand; Andpd: M128, int::pand;
        Andnps: M128, int::pandn; Andnpd: M128, int::pandn;
        Orps: M128, int::por; Orpd: M128, int::por;
        Xorps: M128, int::pxor; Xorpd: M128, int::pxor;
        Punpcklqdq: M128, int::punpcklqdq; Punpckhqdq: M128, int::punpckhqdq::<16>;
        Unpcklps: M128, int::punpckldq; Unpckhps: M128, int::punpckhdq::<16>;
        Unpcklpd: M128, int::punpcklqdq; Unpckhpd: M128, int::punpckhqdq::<16>;
        Pslldq: M128, int::pslldq; Psrldq: M128, int::psrldq;
        Packusdw: M128, int::packusdw::<16>;
        Pcmpeqq: M128, int::pcmpeqq; Pcmpgtq: M128, int::pcmpgtq;
        Pmulld: M128, int::pmulld; Pmuldq: M128, int::pmuldq;
        Pminsb: M128, int::pminsb; Pminsd: M128, int::pminsd;
        Pminuw: M128, int::pminuw; Pminud: M128, int::pminud;
        Pmaxsb: M128, int::pmaxsb; Pmaxsd: M128, int::pmaxsd;
        Pmaxuw: M128, int::pmaxuw; Pmaxud: M128, int::pmaxud;
        Phminposuw: M128, int::phminposuw;
        Pmovsxbw: M64, int::pmovsxbw; Pmovsxbd: M32, int::pmovsxbd;
        Pmovsxbq: M16, int::pmovsxbq; Pmovsxwd: M64, int::pmovsxwd;
        Pmovsxwq: M32, int::pmovsxwq; Pmovsxdq: M64, int::pmovsxdq;
        Pmovzxbw: M64, int::pmovzxbw; Pmovzxbd: M32, int::pmovzxbd;
        Pmovzxbq: M16, int::pmovzxbq; Pmovzxwd: M64, int::pmovzxwd;
        Pmovzxwq: M32, int::pmovzxwq; Pmovzxdq: M64, int::pmovzxdq;
        Movsldup: M128, shuffle::movsldup; Movshdup: M128, shuffle::movshdup;
        Movddup: M64, shuffle::movddup;
    }
}

/// Shuffles with MMX forms.
fn shuffles(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Pshufw => mm_mmm::<M64>(instruction, shuffle::pshuflw),
        Mnemonic::Palignr if instruction.op0_register().is_mm() => {
            mm_mmm::<M64>(instruction, shuffle::palignr::<8>)
        }
        Mnemonic::Palignr => xmm_xmmm::<M128>(instruction, shuffle::palignr::<16>),
        // The register form takes the lane that bits 6-7 name.
        Mnemonic::Insertps if super::is_register(instruction, 1) => {
            xmm_from::<{ super::from::XMM }>(|a, b, control| {
                shuffle::insertps(a, b >> ((control >> 6) * 32), control)
            })
        }
        Mnemonic::Insertps => xmm_from::<M32>(shuffle::insertps),
        _ => return None,
    })
}

fn by_immediate(instruction: &Instruction) -> Option<Handler> {
    immediate_table! { instruction;
        Pshufd: M128, shuffle::pshufd;
        Pshuflw: M128, shuffle::pshuflw;
        Pshufhw: M128, shuffle::pshufhw;
        Shufps: M128, shuffle::shufps;
        Shufpd: M128, shuffle::shufpd;
        Pblendw: M128, shuffle::pblendw;
        Blendps: M128, shuffle::blendps;
        Blendpd: M128, shuffle::blendpd;
        Mpsadbw: M128, shuffle::mpsadbw;
    }
}

/// Blends whose mask is XMM0.
fn blend_by_xmm0(instruction: &Instruction) -> Option<Handler> {
    fn form<F>(instruction: &Instruction, f: F) -> Handler
    where
        F: Fn(u128, u128, u128) -> u128 + Copy + 'static,
    {
        fn from<const FROM: u8, F>(f: F) -> Handler
        where
            F: Fn(u128, u128, u128) -> u128 + Copy + 'static,
        {
            straight(move |cpu, op| {
                cpu.check_sse()?;
                let b = super::source::<FROM>(cpu, op)?;
                let result = f(xmm(cpu, op.dst), b, xmm(cpu, 0));
                super::set_xmm(cpu, op.dst, result);
                Ok(())
            })
        }
        if super::is_register(instruction, 1) {
            from::<{ super::from::XMM }, F>(f)
        } else {
            from::<M128, F>(f)
        }
    }
    Some(match instruction.mnemonic() {
        Mnemonic::Pblendvb => form(instruction, shuffle::pblendvb),
        Mnemonic::Blendvps => form(instruction, shuffle::blendvps),
        Mnemonic::Blendvpd => form(instruction, shuffle::blendvpd),
        _ => return None,
    })
}
