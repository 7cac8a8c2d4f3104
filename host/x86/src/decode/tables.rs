//! Which handler runs which instruction, for all that is common.

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic as M, OpKind, Register};

use super::Mode;
use super::branches::by_condition;
use super::cold::Ends;
use super::lower::{Comparison, Flow, Lowering};
use crate::cpu::Cpu;
use crate::cpuid::Baseline;
use crate::exec::op::{Handler, Op, straight};
use crate::exec::{Result, alu, bits, moves, segment, shift, stack, system};

/// One instance of a generic handler for each operand size in bytes.
macro_rules! by_size {
    ($size:expr, $($function:ident)::+ $(, $more:ty)*) => {
        match $size {
            1 => straight($($function)::+::<u8 $(, $more)*>),
            2 => straight($($function)::+::<u16 $(, $more)*>),
            4 => straight($($function)::+::<u32 $(, $more)*>),
            _ => straight($($function)::+::<u64 $(, $more)*>),
        }
    };
}

/// #UD.
pub(super) fn undefined(cpu: &mut Cpu, _op: &Op) -> Result {
    Err(cpu.undefined())
}

/// The number by which handlers address a register.
pub(super) fn number(register: Register) -> u8 {
    match register {
        Register::None => 0,
        Register::AH => 0x20,
        Register::CH => 0x21,
        Register::DH => 0x22,
        Register::BH => 0x23,
        _ => register.full_register().number() as u8,
    }
}

/// Does the baseline offer the instruction?
pub(crate) fn is_offered(baseline: &Baseline, mode: Mode, instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        M::Lahf | M::Sahf => return mode != Mode::Bits64 || baseline.has("lahf_lm"),
        M::Rdtscp => return baseline.has("rdtscp"),
        // These fall back to BSF and BSR, see `hot`.
        M::Tzcnt | M::Lzcnt => return true,
        M::Endbr32 | M::Endbr64 | M::Rdsspd | M::Rdsspq | M::Prefetchw => return true,
        _ => {}
    }
    instruction.cpuid_features().iter().all(|feature| {
        use CpuidFeature as F;
        match feature {
            F::SSE3 => baseline.has("sse3"),
            F::SSSE3 => baseline.has("ssse3"),
            F::SSE4_1 => baseline.has("sse4_1"),
            F::SSE4_2 => baseline.has("sse4_2"),
            F::POPCNT => baseline.has("popcnt"),
            F::CMPXCHG16B => baseline.has("cx16"),
            F::MOVBE => baseline.has("movbe"),
            F::BMI1 => baseline.has("bmi1"),
            F::BMI2 => baseline.has("bmi2"),
            F::ADX => baseline.has("adx"),
            F::AES => baseline.has("aes"),
            F::PCLMULQDQ => baseline.has("pclmulqdq"),
            F::XSAVE => baseline.has("xsave"),
            F::AVX => baseline.has("avx"),
            F::AVX2 => baseline.has("avx2"),
            F::FMA => baseline.has("fma"),
            F::F16C => baseline.has("f16c"),
            _ => true,
        }
    })
}

/// Is it an instruction of general registers with a VEX prefix?
pub(crate) fn is_general_vex(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
    )
}

/// #UD where there is no VEX prefix.
pub(super) fn check_vex(cpu: &mut Cpu, _op: &Op) -> Result {
    cpu.check_vex()
}

/// Is a memory operand that comes first written (or at least to be checked as if)?
pub(super) fn writes_first(mnemonic: M) -> bool {
    !matches!(
        mnemonic,
        M::Cmp
            | M::Test
            | M::Push
            | M::Call
            | M::Jmp
            | M::Bt
            | M::Mul
            | M::Imul
            | M::Div
            | M::Idiv
            | M::Lgdt
            | M::Lidt
            | M::Lldt
            | M::Ltr
            | M::Lmsw
            | M::Verr
            | M::Verw
            | M::Invlpg
            | M::Fld
            | M::Fild
            | M::Fldcw
            | M::Fldenv
            | M::Frstor
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xrstor
            | M::Xrstor64
            | M::Ldmxcsr
            | M::Vldmxcsr
            | M::Nop
            | M::Clflush
            | M::Fadd
            | M::Fsub
            | M::Fmul
            | M::Fdiv
            | M::Fcom
            | M::Fcomp
            | M::Fsubr
            | M::Fdivr
            | M::Fiadd
            | M::Fisub
            | M::Fimul
            | M::Fidiv
            | M::Ficom
            | M::Ficomp
            | M::Fisubr
            | M::Fidivr
            | M::Fbld
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetchw
    )
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// Bytes of the first operand.
fn size_of(instruction: &Instruction) -> usize {
    size_at(instruction, 0)
}

fn size_at(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        _ => instruction.memory_size().size(),
    }
}

impl Lowering {
    /// The common instructions; `None` for others.
    #[expect(clippy::too_many_lines, reason = "an instruction table")]
    pub(super) fn hot(&mut self, i: &Instruction) -> Option<Flow> {
        Some(match i.mnemonic() {
            M::Mov => return self.mov(i),
            M::Add => self.alu::<alu::Add>(i),
            M::Or => self.alu::<alu::Or>(i),
            M::Adc => self.alu::<alu::Adc>(i),
            M::Sbb => self.alu::<alu::Sbb>(i),
            M::And => self.alu::<alu::And>(i),
            M::Sub => self.alu::<alu::Sub>(i),
            M::Xor => self.alu::<alu::Xor>(i),
            M::Cmp => self.alu::<alu::Cmp>(i),
            M::Test => self.alu::<alu::Test>(i),
            M::Inc => self.unary::<alu::Inc>(i),
            M::Dec => self.unary::<alu::Dec>(i),
            M::Neg => self.unary::<alu::Neg>(i),
            M::Not => self.unary::<alu::Not>(i),
            M::Lea => {
                let handler = match size_of(i) {
                    2 => straight(moves::lea::<u16>),
                    4 => straight(moves::lea::<u32>),
                    _ => straight(moves::lea::<u64>),
                };
                self.simple(i, handler)
            }
            M::Movzx | M::Movsx | M::Movsxd => self.extend(i),
            M::Shl | M::Sal => self.shift::<shift::Shl>(i),
            M::Shr => self.shift::<shift::Shr>(i),
            M::Sar => self.shift::<shift::Sar>(i),
            M::Rol => self.shift::<shift::Rol>(i),
            M::Ror => self.shift::<shift::Ror>(i),
            M::Rcl => self.shift::<shift::Rcl>(i),
            M::Rcr => self.shift::<shift::Rcr>(i),
            M::Shld => self.double_shift::<shift::Shld>(i),
            M::Shrd => self.double_shift::<shift::Shrd>(i),
            M::Mul => self.wide::<alu::Mul>(i),
            M::Imul if i.op_count() == 1 => self.wide::<alu::Imul>(i),
            M::Imul => self.imul(i),
            M::Div => self.wide::<alu::Div>(i),
            M::Idiv => self.wide::<alu::Idiv>(i),
            M::Xchg => {
                let memory_first = i.op0_kind() == OpKind::Memory;
                let memory = memory_first || i.op1_kind() == OpKind::Memory;
                let handler = if memory {
                    by_size!(size_of(i), alu::xchg_mr)
                } else {
                    by_size!(size_of(i), alu::xchg_rr)
                };
                let mut op = self.op(i, handler);
                op.dst = number(i.op0_register());
                op.src = number(if i.op1_kind() == OpKind::Memory {
                    i.op0_register()
                } else {
                    i.op1_register()
                });
                self.push(i, op)
            }
            M::Xadd => {
                let handler = if i.op0_kind() == OpKind::Memory {
                    by_size!(size_of(i), alu::xadd_mr)
                } else {
                    by_size!(size_of(i), alu::xadd_rr)
                };
                self.simple(i, handler)
            }
            M::Cmpxchg => {
                let handler = if i.op0_kind() == OpKind::Memory {
                    by_size!(size_of(i), alu::cmpxchg_mr)
                } else {
                    by_size!(size_of(i), alu::cmpxchg_rr)
                };
                self.simple(i, handler)
            }
            M::Bt => self.bit::<bits::Keep>(i),
            M::Bts => self.bit::<bits::Set>(i),
            M::Btr => self.bit::<bits::Reset>(i),
            M::Btc => self.bit::<bits::Complement>(i),
            M::Bsf => self.count::<bits::Bsf>(i),
            M::Bsr => self.count::<bits::Bsr>(i),
            M::Tzcnt if self.baseline.has("bmi1") => self.count::<bits::Tzcnt>(i),
            M::Tzcnt => self.count::<bits::Bsf>(i),
            M::Lzcnt if self.baseline.has("abm") => self.count::<bits::Lzcnt>(i),
            M::Lzcnt => self.count::<bits::Bsr>(i),
            M::Popcnt => self.count::<bits::Popcnt>(i),
            M::Blsi => self.count::<bits::Blsi>(i),
            M::Blsr => self.count::<bits::Blsr>(i),
            M::Blsmsk => self.count::<bits::Blsmsk>(i),
            M::Andn => self.three::<bits::Andn>(i),
            M::Bextr => self.three::<bits::Bextr>(i),
            M::Bzhi => self.three::<bits::Bzhi>(i),
            M::Pdep => self.three::<bits::Pdep>(i),
            M::Pext => self.three::<bits::Pext>(i),
            M::Shlx => self.three::<bits::Shlx>(i),
            M::Shrx => self.three::<bits::Shrx>(i),
            M::Sarx => self.three::<bits::Sarx>(i),
            M::Rorx => self.three::<bits::Rorx>(i),
            M::Mulx => self.mulx(i),
            M::Adcx => self.adx::<bits::Adcx>(i),
            M::Adox => self.adx::<bits::Adox>(i),
            M::Cbw => self.simple(i, straight(moves::extend_accumulator::<u16, u8>)),
            M::Cwde => self.simple(i, straight(moves::extend_accumulator::<u32, u16>)),
            M::Cdqe => self.simple(i, straight(moves::extend_accumulator::<u64, u32>)),
            M::Cwd => self.simple(i, straight(moves::sign_to_rdx::<u16>)),
            M::Cdq => self.simple(i, straight(moves::sign_to_rdx::<u32>)),
            M::Cqo => self.simple(i, straight(moves::sign_to_rdx::<u64>)),
            M::Bswap => self.simple(i, by_size!(size_of(i), moves::bswap)),
            M::Movbe if i.op0_kind() == OpKind::Memory => {
                self.simple(i, by_size!(size_of(i), moves::movbe_mr))
            }
            M::Movbe => self.simple(i, by_size!(size_of(i), moves::movbe_rm)),
            M::Clc | M::Stc | M::Cmc => {
                let mut op = self.op(i, straight(bits::set_carry));
                op.imm = match i.mnemonic() {
                    M::Clc => 0,
                    M::Stc => 1,
                    _ => 2,
                };
                self.push(i, op)
            }
            M::Cld | M::Std => {
                let mut op = self.op(i, straight(bits::set_direction));
                op.imm = u64::from(i.mnemonic() == M::Std);
                self.push(i, op)
            }
            M::Lahf => self.simple(i, straight(bits::lahf)),
            M::Sahf => self.simple(i, straight(bits::sahf)),
            M::Nop
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Reservednop
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetchw
            | M::Prefetch => {
                let op = self.op(i, straight(moves::nop));
                self.ops.push(op);
                Flow::Continues
            }
            M::Push | M::Pop => self.stack(i),
            M::Leave if self.mode == Mode::Bits64 && i.code() == Code::Leaveq => {
                self.simple(i, straight(moves::leave))
            }
            M::Ud0 | M::Ud1 | M::Ud2 => self.undefined(i),
            M::Jmp | M::Call | M::Ret => return self.transfer(i),
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => self.counted(i),
            _ if i.is_jcc_short_or_near() => self.jcc(i),
            _ => return self.conditional(i),
        })
    }

    /// An operation whose registers are the first and the second operand.
    fn simple(&mut self, i: &Instruction, handler: Handler) -> Flow {
        let mut op = self.op(i, handler);
        op.dst = number(i.op0_register());
        op.src = number(i.op1_register());
        self.push(i, op)
    }

    /// The same with the last operand as immediate.
    fn with_immediate(&mut self, i: &Instruction, handler: Handler, imm: u64) -> Flow {
        let mut op = self.op(i, handler);
        op.dst = number(i.op0_register());
        op.src = number(i.op1_register());
        op.imm = imm;
        self.push(i, op)
    }

    fn mov(&mut self, i: &Instruction) -> Option<Flow> {
        let (to, from) = (i.op0_register(), i.op1_register());
        if to.is_segment_register() {
            return Some(self.cold(i, segment::mov_to, Ends::Always));
        }
        if from.is_segment_register() {
            return Some(self.cold(i, segment::mov_from, Ends::Never));
        }
        if to.is_cr() || from.is_cr() || to.is_dr() || from.is_dr() {
            return Some(self.cold(i, system::mov_control, Ends::Always));
        }
        let size = size_of(i);
        Some(match (i.op0_kind(), i.op1_kind()) {
            (OpKind::Register, OpKind::Register) if to.is_gpr() && from.is_gpr() => {
                self.simple(i, by_size!(size, moves::rr))
            }
            (OpKind::Register, OpKind::Memory) => self.simple(i, by_size!(size, moves::rm)),
            (OpKind::Memory, OpKind::Register) => self.simple(i, by_size!(size, moves::mr)),
            (OpKind::Register, kind) if is_immediate(kind) => {
                self.with_immediate(i, by_size!(size, moves::ri), i.immediate(1))
            }
            (OpKind::Memory, kind) if is_immediate(kind) => {
                self.with_immediate(i, by_size!(size, moves::mi), i.immediate(1))
            }
            _ => return None,
        })
    }

    fn alu<O: alu::Alu>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let locked = i.has_lock_prefix() && O::WRITES;
        if !O::WRITES && i.op0_kind() == OpKind::Register && i.op1_kind() != OpKind::Memory {
            self.comparison = Some(Comparison {
                at: self.ops.len(),
                bytes: size,
                immediate: i.op1_kind() != OpKind::Register,
                test: i.mnemonic() == M::Test,
            });
        }
        match (i.op0_kind(), i.op1_kind()) {
            (OpKind::Register, OpKind::Register) => self.simple(i, by_size!(size, alu::rr, O)),
            (OpKind::Register, OpKind::Memory) => self.simple(i, by_size!(size, alu::rm, O)),
            (OpKind::Memory, OpKind::Register) if locked => {
                self.simple(i, by_size!(size, alu::mr_locked, O))
            }
            (OpKind::Memory, OpKind::Register) => self.simple(i, by_size!(size, alu::mr, O)),
            (OpKind::Register, _) => {
                self.with_immediate(i, by_size!(size, alu::ri, O), i.immediate(1))
            }
            _ if locked => {
                self.with_immediate(i, by_size!(size, alu::mi_locked, O), i.immediate(1))
            }
            _ => self.with_immediate(i, by_size!(size, alu::mi, O), i.immediate(1)),
        }
    }

    fn unary<O: alu::Unary>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let handler = match i.op0_kind() {
            OpKind::Register => by_size!(size, alu::r, O),
            _ if i.has_lock_prefix() => by_size!(size, alu::m_locked, O),
            _ => by_size!(size, alu::m, O),
        };
        self.simple(i, handler)
    }

    fn wide<O: alu::Wide>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let handler = match i.op0_kind() {
            OpKind::Register => by_size!(size, alu::wide_r, O),
            _ => by_size!(size, alu::wide_m, O),
        };
        self.simple(i, handler)
    }

    fn imul(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let memory = i.op1_kind() == OpKind::Memory;
        if i.op_count() == 3 {
            let handler = if memory {
                by_size!(size, alu::imul_rmi)
            } else {
                by_size!(size, alu::imul_rri)
            };
            return self.with_immediate(i, handler, i.immediate(2));
        }
        let handler = if memory {
            by_size!(size, alu::imul_rm)
        } else {
            by_size!(size, alu::imul_rr)
        };
        self.simple(i, handler)
    }

    fn extend(&mut self, i: &Instruction) -> Flow {
        let memory = i.op1_kind() == OpKind::Memory;
        let zero = i.mnemonic() == M::Movzx;
        macro_rules! pick {
            ($($to:ty, $to_size:literal, $from:ty, $from_size:literal;)*) => {
                match (size_of(i), size_at(i, 1), zero, memory) {
                    $(
                        ($to_size, $from_size, true, false) => straight(moves::zx_rr::<$to, $from>),
                        ($to_size, $from_size, true, true) => straight(moves::zx_rm::<$to, $from>),
                        ($to_size, $from_size, false, false) => straight(moves::sx_rr::<$to, $from>),
                        ($to_size, $from_size, false, true) => straight(moves::sx_rm::<$to, $from>),
                    )*
                    _ => straight(undefined),
                }
            };
        }
        let handler = pick! {
            u16, 2, u8, 1;
            u32, 4, u8, 1;
            u64, 8, u8, 1;
            u16, 2, u16, 2;
            u32, 4, u16, 2;
            u64, 8, u16, 2;
            u16, 2, u32, 4;
            u32, 4, u32, 4;
            u64, 8, u32, 4;
        };
        self.simple(i, handler)
    }

    fn shift<S: shift::Shift>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let memory = i.op0_kind() == OpKind::Memory;
        if i.op1_kind() == OpKind::Register {
            let handler = if memory {
                by_size!(size, shift::mc, S)
            } else {
                by_size!(size, shift::rc, S)
            };
            return self.simple(i, handler);
        }
        let count = i.immediate(1) & if size == 8 { 63 } else { 31 };
        let handler = match (memory, count) {
            // A 32-bit register still loses its upper half; memory is still written.
            (false, 0) => {
                let mut op = self.op(i, by_size!(size, moves::rr));
                op.dst = number(i.op0_register());
                op.src = op.dst;
                return self.push(i, op);
            }
            (true, 0) => by_size!(size, alu::mi, NoChange),
            (false, _) => by_size!(size, shift::ri, S),
            (true, _) => by_size!(size, shift::mi, S),
        };
        self.with_immediate(i, handler, count)
    }

    fn double_shift<S: shift::DoubleShift>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let handler = if i.op0_kind() == OpKind::Memory {
            by_size!(size, shift::double_mr, S)
        } else {
            by_size!(size, shift::double_rr, S)
        };
        let count = if i.op2_kind() == OpKind::Register {
            0x100
        } else {
            i.immediate(2) & 0xff
        };
        self.with_immediate(i, handler, count)
    }

    fn bit<B: bits::BitOperation>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let locked = if i.has_lock_prefix() { 0x80 } else { 0 };
        let register = i.op1_kind() == OpKind::Register;
        if i.op0_kind() == OpKind::Register {
            let handler = if register {
                by_size!(size, bits::rr, B)
            } else {
                by_size!(size, bits::ri, B)
            };
            let imm = if register { 0 } else { i.immediate(1) };
            return self.with_immediate(i, handler, imm);
        }
        let handler = if register {
            by_size!(size, bits::mr, B)
        } else {
            by_size!(size, bits::mi, B)
        };
        let mut op = self.op(i, handler);
        op.src = locked
            | if register {
                number(i.op1_register())
            } else {
                0
            };
        op.imm = match (register, self.mode) {
            (false, _) => i.immediate(1),
            (true, Mode::Bits64) if i.memory_base().size() != 4 && i.memory_index().size() != 4 => {
                u64::MAX
            }
            (true, _) => 0xffff_ffff,
        };
        self.push(i, op)
    }

    fn count<C: bits::Count>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        // The VEX-coded ones have their destination first, too.
        let handler = if i.op1_kind() == OpKind::Memory {
            by_size!(size, bits::count_rm, C)
        } else {
            by_size!(size, bits::count_rr, C)
        };
        self.simple(i, handler)
    }

    fn three<O: bits::Three>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let (handler, imm) = match (i.op1_kind(), i.op2_kind()) {
            (OpKind::Register, OpKind::Register) => (
                by_size!(size, bits::three_rr, O),
                number(i.op2_register()).into(),
            ),
            (OpKind::Register, OpKind::Memory) => (by_size!(size, bits::three_rm, O), 0),
            (OpKind::Memory, OpKind::Register) => (
                by_size!(size, bits::three_mr, O),
                number(i.op2_register()).into(),
            ),
            (OpKind::Register, _) => (by_size!(size, bits::three_ri, O), i.immediate(2)),
            _ => (by_size!(size, bits::three_mi, O), i.immediate(2)),
        };
        self.with_immediate(i, handler, imm)
    }

    /// MULX high, low, source: the high half is written last, and the other factor is rDX.
    fn mulx(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let memory = i.op2_kind() == OpKind::Memory;
        let handler = if memory {
            by_size!(size, bits::three_rm, bits::Mulx)
        } else {
            by_size!(size, bits::three_rr, bits::Mulx)
        };
        let mut op = self.op(i, handler);
        op.dst = number(i.op0_register()) | number(i.op1_register()) << 4;
        op.src = number(Register::RDX);
        op.imm = if memory {
            0
        } else {
            number(i.op2_register()).into()
        };
        self.push(i, op)
    }

    fn adx<O: bits::Three>(&mut self, i: &Instruction) -> Flow {
        let size = size_of(i);
        let memory = i.op1_kind() == OpKind::Memory;
        let handler = if memory {
            by_size!(size, bits::three_rm, O)
        } else {
            by_size!(size, bits::three_rr, O)
        };
        let mut op = self.op(i, handler);
        op.dst = number(i.op0_register());
        op.src = op.dst;
        op.imm = if memory {
            0
        } else {
            number(i.op1_register()).into()
        };
        self.push(i, op)
    }

    fn conditional(&mut self, i: &Instruction) -> Option<Flow> {
        let code = (i.condition_code() as u8).checked_sub(1)?;
        let memory = i.op1_kind() == OpKind::Memory;
        let handler = match (i.op_count(), size_of(i), memory) {
            (1, _, _) if i.op0_kind() == OpKind::Memory => {
                by_condition!(code, C => straight(moves::set_m::<C>))
            }
            (1, _, _) => by_condition!(code, C => straight(moves::set_r::<C>)),
            _ if !i.op0_register().is_gpr() => return None,
            (_, 2, false) => by_condition!(code, C => straight(moves::cmov_rr::<u16, C>)),
            (_, 4, false) => by_condition!(code, C => straight(moves::cmov_rr::<u32, C>)),
            (_, _, false) => by_condition!(code, C => straight(moves::cmov_rr::<u64, C>)),
            (_, 2, true) => by_condition!(code, C => straight(moves::cmov_rm::<u16, C>)),
            (_, 4, true) => by_condition!(code, C => straight(moves::cmov_rm::<u32, C>)),
            (_, _, true) => by_condition!(code, C => straight(moves::cmov_rm::<u64, C>)),
        };
        Some(self.simple(i, handler))
    }

    fn stack(&mut self, i: &Instruction) -> Flow {
        let push = i.mnemonic() == M::Push;
        if i.op0_register().is_segment_register() {
            return if push {
                self.cold(i, segment::push, Ends::Never)
            } else {
                self.cold(i, segment::pop, Ends::Always)
            };
        }
        let size = i.stack_pointer_increment().unsigned_abs();
        let memory = i.op0_kind() == OpKind::Memory;
        if self.mode != Mode::Bits64 {
            return match (push, memory) {
                (true, _) => self.cold(i, stack::push, Ends::Never),
                (false, false) => self.cold(i, stack::pop, Ends::Never),
                (false, true) => self.cold(i, stack::pop_memory, Ends::Never),
            };
        }
        let handler = match (push, i.op0_kind()) {
            (true, OpKind::Register) => by_size!(size, moves::push_r),
            (true, OpKind::Memory) => by_size!(size, moves::push_m),
            (true, _) => by_size!(size, moves::push_i),
            (false, OpKind::Register) => by_size!(size, moves::pop_r),
            (false, _) => by_size!(size, moves::pop_m),
        };
        let mut op = self.op(i, handler);
        op.dst = number(i.op0_register());
        op.src = op.dst;
        if is_immediate(i.op0_kind()) {
            op.imm = i.immediate(0);
        }
        self.push(i, op)
    }
}

/// Writes its memory operand back as it is: a shift by zero.
#[derive(Debug, Clone, Copy)]
struct NoChange;

impl alu::Alu for NoChange {
    fn apply<T: crate::exec::value::Value>(
        a: T,
        _b: T,
        before: crate::exec::flags::Flags,
    ) -> (T, crate::exec::flags::Flags) {
        (a, before)
    }
}
