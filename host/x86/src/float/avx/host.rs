//! The seam behind which AVX happens: single instructions of the guest, with other registers, that the
//! host's processor executes.
//!
//! Each form gets a routine of its own: the instruction with its vector operands in YMM0 to YMM3, its
//! general register in RAX, its memory operand in a [`Frame`], and a return. There are as many routines
//! as there are forms and immediate operands, so that their memory does not fill up; they live as long as
//! the process.

#![expect(unsafe_code, reason = "executes the host's own AVX instructions")]

use std::arch::asm;
use std::mem::offset_of;
use std::sync::{Mutex, OnceLock, PoisonError};

use iced_x86::{Code, Encoder, Instruction, OpKind, Register};

use super::super::arithmetic::Tiny;
use crate::native::{CodeMemory, Part};

/// Room for the routines of all forms; a test counts them.
const ROOM: usize = 8 << 20;

const FLAGS: u32 = 0x3f;
const MASKS: u32 = 0x1f80;

/// The operands of a routine.
#[derive(Debug, Clone)]
#[repr(C, align(32))]
pub(super) struct Frame {
    /// YMM0 to YMM3, each as its lower and its upper half.
    pub(super) vectors: [[u128; 2]; 4],
    pub(super) memory: [u8; 32],
    /// RAX, RCX, RDX.
    pub(super) general: [u64; 3],
    /// RFLAGS afterwards.
    pub(super) rflags: u64,
    mxcsr: u32,
    host_mxcsr: u32,
}

impl Frame {
    /// No operands yet; `mxcsr` gives rounding, flush and denormal modes.
    pub(super) fn new(mxcsr: u32) -> Self {
        Self {
            vectors: [[0; 2]; 4],
            memory: [0; 32],
            general: [0; 3],
            rflags: 0,
            mxcsr: mxcsr & !FLAGS | MASKS,
            host_mxcsr: MASKS,
        }
    }

    /// The exception flags that the instruction has raised.
    pub(super) fn exceptions(&self) -> u32 {
        self.mxcsr & FLAGS
    }
}

/// One operand of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operand {
    Vector,
    General,
    /// Memory, an immediate, or nothing.
    Other,
}

/// The memory operand of a form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    None,
    Load,
    Store,
}

/// What is the same for all instances of an instruction but for registers and addresses.
#[derive(Debug)]
pub(super) struct Form {
    routine: Routine,
    pub(super) operands: [Operand; 4],
    pub(super) memory: Memory,
    /// Bytes of the memory operand.
    pub(super) bytes: usize,
    /// The address must be a multiple of `bytes`.
    pub(super) aligned: bool,
    /// Flags are a result.
    pub(super) sets_flags: bool,
    /// Lanes of the result, the lower and the upper half, that can be too small for their format.
    pub(super) tiny: [Tiny; 2],
    pub(super) code: Code,
    pub(super) immediate: u8,
}

/// Where a routine is: an executable address that stays what it is.
#[derive(Debug, Clone, Copy)]
struct Routine(*const u8);

// SAFETY: what it points to never changes, and any thread may execute it.
unsafe impl Send for Routine {}
// SAFETY: as above.
unsafe impl Sync for Routine {}

/// All forms that were asked for.
#[derive(Debug)]
struct Table {
    memory: CodeMemory,
    forms: std::collections::HashMap<(Code, u8, bool), &'static Form>,
}

fn table() -> Option<&'static Mutex<Table>> {
    static TABLE: OnceLock<Option<Mutex<Table>>> = OnceLock::new();
    let make = || {
        let memory = CodeMemory::new(ROOM)
            .inspect_err(|error| {
                tracing::warn!(%error, "no memory for AVX instructions");
            })
            .ok()?;
        Some(Mutex::new(Table {
            memory,
            forms: std::collections::HashMap::new(),
        }))
    };
    TABLE.get_or_init(make).as_ref()
}

/// Does the host's processor execute instructions of `feature`?
pub(crate) fn host_executes(feature: &str) -> bool {
    let has = match feature {
        "avx" => is_x86_feature_detected!("avx"),
        "avx2" => is_x86_feature_detected!("avx2"),
        "fma" => is_x86_feature_detected!("fma"),
        "f16c" => is_x86_feature_detected!("f16c"),
        _ => false,
    };
    has && table().is_some()
}

/// The form of an instruction; `describe` fills in what is not its routine. `None`: the host cannot
/// execute it.
pub(super) fn form(
    instruction: &Instruction,
    immediate: u8,
    describe: impl FnOnce(&mut Form),
) -> Option<&'static Form> {
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    let key = (instruction.code(), immediate, memory);
    // A panic in between leaves nothing half done.
    let mut table = table()?.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(form) = table.forms.get(&key) {
        return Some(form);
    }
    let (renamed, operands) = renamed(instruction)?;
    let mut encoder = Encoder::new(64);
    encoder.encode(&renamed, 0).ok()?;
    let mut code = encoder.take_buffer();
    code.push(0xc3);
    let start = table.memory.append(Part::Often, &code)?;
    let mut form = Form {
        routine: Routine(table.memory.address(start)),
        operands,
        memory: Memory::None,
        bytes: 0,
        aligned: false,
        sets_flags: false,
        tiny: [Tiny::Never; 2],
        code: instruction.code(),
        immediate,
    };
    describe(&mut form);
    let form: &'static Form = Box::leak(Box::new(form));
    table.forms.insert(key, form);
    Some(form)
}

/// The instruction with the operands that routines have.
fn renamed(original: &Instruction) -> Option<(Instruction, [Operand; 4])> {
    let mut i = *original;
    let mut operands = [Operand::Other; 4];
    let mut vectors = 0;
    for n in 0..i.op_count().min(4) {
        match i.op_kind(n) {
            OpKind::Register => {}
            OpKind::Memory => {
                i.set_memory_base(Register::RDI);
                i.set_memory_index(Register::None);
                i.set_memory_index_scale(1);
                i.set_memory_displacement64(offset_of!(Frame, memory) as u64);
                i.set_memory_displ_size(8);
                i.set_segment_prefix(Register::None);
                continue;
            }
            OpKind::Immediate8 => continue,
            _ => return None,
        }
        let register = i.op_register(n);
        let (first, kind) = if register.is_ymm() {
            (Register::YMM0, Operand::Vector)
        } else if register.is_xmm() {
            (Register::XMM0, Operand::Vector)
        } else if register.is_gpr64() {
            (Register::RAX, Operand::General)
        } else if register.is_gpr32() {
            (Register::EAX, Operand::General)
        } else {
            return None;
        };
        operands[n as usize] = kind;
        if kind == Operand::Vector {
            i.set_op_register(n, first + vectors);
            vectors += 1;
        } else {
            i.set_op_register(n, first);
        }
    }
    Some((i, operands))
}

/// Executes the instruction on the operands in `frame`.
pub(super) fn execute(form: &Form, frame: &mut Frame) {
    // SAFETY: the routine is one instruction that touches YMM0 to YMM3, RAX, RCX, RDX, flags, and at most
    // 32 bytes of memory in the frame, which RDI points to; all exceptions are masked. The frame is
    // aligned. MXCSR is put back to what Rust code expects. That the host has the instruction is checked
    // before a guest gets it.
    unsafe {
        asm!(
            "vmovdqa ymm0, [rdi]",
            "vmovdqa ymm1, [rdi + 32]",
            "vmovdqa ymm2, [rdi + 64]",
            "vmovdqa ymm3, [rdi + 96]",
            "mov rax, [rdi + {general}]",
            "mov rcx, [rdi + {general} + 8]",
            "mov rdx, [rdi + {general} + 16]",
            "ldmxcsr [rdi + {mxcsr}]",
            "call {routine}",
            "pushfq",
            "pop [rdi + {rflags}]",
            "stmxcsr [rdi + {mxcsr}]",
            "ldmxcsr [rdi + {host}]",
            "mov [rdi + {general}], rax",
            "mov [rdi + {general} + 8], rcx",
            "mov [rdi + {general} + 16], rdx",
            "vmovdqa [rdi], ymm0",
            "vzeroupper",
            routine = in(reg) form.routine.0,
            in("rdi") &raw mut *frame,
            general = const offset_of!(Frame, general),
            rflags = const offset_of!(Frame, rflags),
            mxcsr = const offset_of!(Frame, mxcsr),
            host = const offset_of!(Frame, host_mxcsr),
            out("rax") _, out("rcx") _, out("rdx") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{CpuidFeature, EncodingKind, OpCodeOperandKind};

    #[test]
    fn there_is_room_for_each_form_with_each_immediate_operand() {
        use CpuidFeature::{AVX, AVX2, F16C, FMA};
        // Prefix, opcode, ModRM, SIB, displacement, immediate operand, return.
        const MOST: usize = 3 + 1 + 1 + 1 + 4 + 1 + 1;
        let routines: usize = Code::values()
            .filter(|code| {
                let all = |feature: &CpuidFeature| matches!(feature, AVX | AVX2 | FMA | F16C);
                code.encoding() == EncodingKind::VEX && code.cpuid_features().iter().all(all)
            })
            .map(|code| {
                let info = code.op_code();
                let immediate = info.op_kinds().contains(&OpCodeOperandKind::imm8);
                // With a register or with memory.
                2 * if immediate { 256 } else { 1 }
            })
            .sum();
        assert!(routines > 1000);
        assert!(routines * MOST.next_multiple_of(16) <= ROOM, "{routines}");
    }
}
