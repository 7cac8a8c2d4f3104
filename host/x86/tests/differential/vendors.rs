//! What Intel's processors do otherwise than AMD's, where manuals leave it open or differ. The software CPU
//! is one and the same processor on every host, and does as AMD's do.

use std::arch::x86_64::__cpuid;

use iced_x86::{Instruction, MemorySize, Mnemonic, OpKind, Register};

use crate::layout::{End, Machine};

const ARITHMETIC: u64 = 0x8d5;
/// TOP in the second byte of x87's status word.
const TOP: u8 = 0x38;
/// An unmasked x87 exception waits (ES), in the first byte of the status word.
const WAITS: u8 = 0x80;
/// Flags of SSE exceptions in MXCSR.
const EXCEPTIONS: u8 = 0x3f;

/// A machine, and how the instruction ended on it.
type Outcome = (Machine, End);

/// Is the host's processor one that does what this file says?
pub(crate) fn is_intel() -> bool {
    let vendor = __cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    name.as_flattened() == b"GenuineIntel"
}

/// Makes what Intel's processor did what AMD's would have done, where it is known to differ and did what
/// it is known for; anything else stays and shows. Says whether memory is to be the same.
///
/// | instructions | Intel's processor |
/// |---|---|
/// | string instructions with REP and 32-bit addresses | clears the upper halves of the registers that count, even when nothing is done |
/// | CMPS, SCAS with REP that fault | have the flags from before (SDM vol. 2, REP) |
/// | x87 stores of what raises an unmasked exception | do not touch memory, so never fault |
/// | stores of ten bytes that fault in the second of two pages | have stored to the first |
/// | stores of MMX registers that fault | have cleared TOP |
/// | stores by mask that fault | name any byte of the operand as the address |
/// | gathers that fault | have extended the signs of the mask's elements, and cleared upper halves |
/// | VCVTPS2PH that faults in memory | has set flags of MXCSR, or raises their exception |
/// | DPPS, DPPD of several NaNs | choose another of them |
pub(crate) fn as_amd(
    instruction: &Instruction,
    input: &Machine,
    native: &mut Outcome,
    software: &Outcome,
) -> bool {
    // By what is mapped, or by an address that is not canonical.
    let faulted = |outcome: &Outcome| {
        matches!(
            outcome.1,
            End::Fault {
                vector: 12..=14,
                ..
            }
        )
    };
    if is_repeated(instruction) {
        strings(instruction, input, native, software);
    }
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Dpps | Mnemonic::Vdpps | Mnemonic::Dppd | Mnemonic::Vdppd
    ) {
        not_numbers(instruction, native, software);
    }
    if !faulted(software) {
        return true;
    }
    let waits = native.0.float[2] & WAITS != 0;
    if is_x87_store(instruction) && matches!(native.1, End::At(_)) && waits {
        // Had it stored, that would show in memory.
        *native = *software;
    }
    if instruction.mnemonic() == Mnemonic::Vcvtps2ph
        && matches!(native.1, End::Fault { vector: 19, .. })
    {
        *native = *software;
    }
    if !faulted(native) {
        return true;
    }
    match instruction.mnemonic() {
        Mnemonic::Movd | Mnemonic::Movq | Mnemonic::Movntq if native.0.float[3] & TOP == 0 => {
            let top = software.0.float[3] & TOP;
            native.0.float[3] |= top;
            // Registers are saved in their order from there on.
            native.0.float[32..160].rotate_left(usize::from(top / 8) * 16);
        }
        Mnemonic::Fbstp => return false,
        Mnemonic::Fstp if instruction.memory_size() == MemorySize::Float80 => return false,
        Mnemonic::Maskmovq
        | Mnemonic::Maskmovdqu
        | Mnemonic::Vmaskmovdqu
        | Mnemonic::Vmaskmovps
        | Mnemonic::Vmaskmovpd
        | Mnemonic::Vpmaskmovd
        | Mnemonic::Vpmaskmovq => {
            let bytes = instruction.memory_size().size() as u64;
            if let (End::Fault { address, .. }, End::Fault { address: first, .. }) =
                (&mut native.1, software.1)
                && address.wrapping_sub(first) < bytes
            {
                *address = first;
            }
        }
        Mnemonic::Vcvtps2ph => {
            let (native, software) = (&mut native.0.float[24], software.0.float[24]);
            if *native & !EXCEPTIONS == software & !EXCEPTIONS && *native & software == software {
                *native = software;
            }
        }
        _ if instruction.is_vsib() => gathered(instruction, native, software),
        _ => {}
    }
    true
}

fn is_repeated(instruction: &Instruction) -> bool {
    instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

fn is_x87_store(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Fst
            | Mnemonic::Fstp
            | Mnemonic::Fist
            | Mnemonic::Fistp
            | Mnemonic::Fisttp
            | Mnemonic::Fbstp
    )
}

fn strings(instruction: &Instruction, input: &Machine, native: &mut Outcome, software: &Outcome) {
    let narrow = (0..instruction.op_count()).any(|n| {
        matches!(
            instruction.op_kind(n),
            OpKind::MemorySegESI | OpKind::MemoryESEDI
        )
    });
    let registers = native.0.gpr.iter_mut().zip(software.0.gpr).enumerate();
    for (index, (native, software)) in registers {
        // RCX, RSI and RDI.
        if narrow && matches!(index, 1 | 6 | 7) && *native == software & u64::from(u32::MAX) {
            *native = software;
        }
    }
    let faulted = matches!(native.1, End::Fault { vector: 14, .. });
    if faulted && (native.0.rflags ^ input.rflags) & ARITHMETIC == 0 {
        native.0.rflags ^= (native.0.rflags ^ software.0.rflags) & ARITHMETIC;
    }
}

/// The halves of a vector register, on both sides.
fn halves_of<'a>(
    register: Register,
    native: &'a mut Machine,
    software: &'a Machine,
) -> [(&'a mut [u8], &'a [u8]); 2] {
    let upper = register.number() * 16;
    let lower = 160 + upper;
    let (lower, upper) = (lower..lower + 16, upper..upper + 16);
    [
        (&mut native.float[lower.clone()], &software.float[lower]),
        (&mut native.upper[upper.clone()], &software.upper[upper]),
    ]
}

/// What a gather leaves of its mask, which is the last operand, and of upper halves.
fn gathered(instruction: &Instruction, native: &mut Outcome, software: &Outcome) {
    let register = instruction.op_register(instruction.op_count() - 1);
    let bytes = instruction.memory_size().element_size().max(4);
    // As many as there are elements or indices.
    let wide = register.is_ymm() || instruction.memory_index().is_ymm();
    let halves = if wide { 2 } else { 1 };
    let both = halves_of(register, &mut native.0, &software.0);
    for (native, software) in both.into_iter().take(halves) {
        for (native, software) in native.chunks_mut(bytes).zip(software.chunks(bytes)) {
            let set = software[bytes - 1] & 0x80 != 0;
            if native
                .iter()
                .all(|byte| *byte == if set { 0xff } else { 0 })
            {
                native.copy_from_slice(software);
            }
        }
    }
    for register in [instruction.op0_register(), register] {
        let at = register.number() * 16;
        let upper = &mut native.0.upper[at..at + 16];
        if register.is_xmm() && upper.iter().all(|byte| *byte == 0) {
            upper.copy_from_slice(&software.0.upper[at..at + 16]);
        }
    }
}

/// Elements of the destination that are no numbers on both sides.
fn not_numbers(instruction: &Instruction, native: &mut Outcome, software: &Outcome) {
    let wide = matches!(instruction.mnemonic(), Mnemonic::Dppd | Mnemonic::Vdppd);
    let register = instruction.op0_register();
    for (native, software) in halves_of(register, &mut native.0, &software.0) {
        let bytes = if wide { 8 } else { 4 };
        for (native, software) in native.chunks_mut(bytes).zip(software.chunks(bytes)) {
            if is_quiet(native) && is_quiet(software) {
                native.copy_from_slice(software);
            }
        }
    }
}

/// Is it a quiet NaN of 4 or 8 bytes?
fn is_quiet(element: &[u8]) -> bool {
    match *element {
        [.., high, top] if element.len() == 4 => top & 0x7f == 0x7f && high & 0xc0 == 0xc0,
        [.., high, top] => top & 0x7f == 0x7f && high & 0xf8 == 0xf8,
        _ => false,
    }
}
