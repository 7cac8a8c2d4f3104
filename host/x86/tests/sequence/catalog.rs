//! Which instruction forms programs are made of.

use std::sync::OnceLock;

use iced_x86::{Code, CpuidFeature, FlowControl, Mnemonic, OpCodeOperandKind};

use crate::forms::{Verdict, verdict};

/// Forms by what they work on.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    /// What compilers use most.
    pub(crate) frequent: Vec<Code>,
    pub(crate) integer: Vec<Code>,
    pub(crate) x87: Vec<Code>,
    pub(crate) mmx: Vec<Code>,
    pub(crate) sse: Vec<Code>,
    pub(crate) avx: Vec<Code>,
    /// Numbers in vectors to and from general registers.
    pub(crate) conversions: Vec<Code>,
    pub(crate) strings: Vec<Code>,
    pub(crate) divisions: Vec<Code>,
}

impl Catalog {
    /// All that the host's processor has.
    pub(crate) fn get() -> &'static Self {
        static CATALOG: OnceLock<Catalog> = OnceLock::new();
        CATALOG.get_or_init(|| {
            let mut catalog = Self::default();
            for code in Code::values() {
                if matches!(verdict(code), Verdict::Compare) {
                    catalog.add(code);
                }
            }
            catalog
        })
    }

    fn add(&mut self, code: Code) {
        use CpuidFeature::*;
        let mut instruction = iced_x86::Instruction::new();
        instruction.set_code(code);
        if instruction.is_string_instruction() {
            self.strings.push(code);
            return;
        }
        if matches!(code.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) {
            self.divisions.push(code);
            return;
        }
        let next = instruction.flow_control() == FlowControl::Next;
        if !next || instruction.is_stack_instruction() || is_excluded(code) {
            return;
        }
        let info = code.op_code();
        if !info.op_kinds().iter().all(|kind| is_possible(*kind)) {
            return;
        }
        if is_conversion(code.mnemonic()) {
            self.conversions.push(code);
        }
        let has = |wanted: &[CpuidFeature]| {
            let features = code.cpuid_features();
            features.iter().any(|feature| wanted.contains(feature))
        };
        let list = if has(&[AVX, AVX2, FMA, F16C]) {
            &mut self.avx
        } else if has(&[MMX]) || info.op_kinds().iter().any(|kind| is_mmx(*kind)) {
            &mut self.mmx
        } else if has(&[SSE, SSE2, SSE3, SSSE3, SSE4_1, SSE4_2]) && !has(&[FPU]) {
            &mut self.sse
        } else if has(&[FPU, FPU287, FPU387]) {
            &mut self.x87
        } else if is_frequent(code) {
            &mut self.frequent
        } else {
            &mut self.integer
        };
        list.push(code);
    }
}

fn is_mmx(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(kind, mm_or_mem | mm_reg | mm_rm)
}

/// Can [`super::operands`] make up such an operand?
fn is_possible(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    !matches!(
        kind,
        seg_reg | seg_rBX_al | seg_rDI | mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y
    )
}

fn is_conversion(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Cvtsd2si
            | Cvttsd2si
            | Cvtss2si
            | Cvttss2si
            | Cvtsi2sd
            | Cvtsi2ss
            | Vcvtsd2si
            | Vcvttsd2si
            | Vcvtss2si
            | Vcvttss2si
            | Vcvtsi2sd
            | Vcvtsi2ss
            | Movmskps
            | Movmskpd
            | Pmovmskb
            | Vpmovmskb
            | Vmovmskps
            | Vmovmskpd
            | Pextrb
            | Pextrw
            | Pextrd
            | Pextrq
            | Movd
            | Movq
            | Vmovd
            | Vmovq
            | Comisd
            | Ucomisd
            | Comiss
            | Ucomiss
    )
}

fn is_frequent(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        Mov | Add
            | Sub
            | Cmp
            | Test
            | And
            | Or
            | Xor
            | Lea
            | Movzx
            | Movsx
            | Movsxd
            | Inc
            | Dec
            | Neg
            | Not
            | Adc
            | Sbb
            | Xchg
            | Imul
            | Shl
            | Shr
            | Sar
    )
}

/// Left out, since what they do depends on more than a program knows, or since processors differ.
fn is_excluded(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        // They have steps of their own.
        Ldmxcsr | Vldmxcsr | Fldcw | Xlatb | Enter | Leave
            // Images with pointers and selectors, which processors keep differently.
            | Fldenv | Fnstenv | Fnsave | Frstor | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
            // Their address is RDI's.
            | Maskmovq | Maskmovdqu | Vmaskmovdqu
            // Vendors choose among NaNs.
            | Dpps | Dppd | Vdpps | Vdppd
            // Many forms that do nothing.
            | Reservednop
    ) || matches!(
        code,
        // Vendors differ in the upper half of a register that is not exchanged.
        Code::Cmpxchg_rm32_r32
            // Undefined for counts beyond 16.
            | Code::Shld_rm16_r16_CL
            | Code::Shrd_rm16_r16_CL
            | Code::Shld_rm16_r16_imm8
            | Code::Shrd_rm16_r16_imm8
    )
}
