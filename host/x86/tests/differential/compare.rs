//! What must be equal afterwards.

use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpKind, Register};

use crate::layout::{DATA, End, Machine, STACK};

pub(crate) const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
pub(crate) const AF: u64 = 1 << 4;
pub(crate) const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const DF: u64 = 1 << 10;
pub(crate) const OF: u64 = 1 << 11;
const NT: u64 = 1 << 14;
const AC: u64 = 1 << 18;
const ID: u64 = 1 << 21;
pub(crate) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// The flags that the architecture leaves undefined (SDM vol. 1, appendix A, and vol. 2).
///
/// | instructions | undefined |
/// |---|---|
/// | AND, OR, XOR, TEST | AF |
/// | SHL, SHR, SAR by 1 | AF |
/// | SHL, SHR by more | AF, OF; CF too when the count is the operand's size or more |
/// | SAR by more | AF, OF |
/// | ROL, ROR, RCL, RCR by more than 1 | OF |
/// | SHLD, SHRD | AF; OF too when by more than 1 |
/// | MUL, IMUL | SF, ZF, AF, PF |
/// | DIV, IDIV | all six |
/// | BSF, BSR | all but ZF |
/// | BT, BTS, BTR, BTC | OF, SF, AF, PF |
/// | ANDN, BLSI, BLSR, BLSMSK, BZHI | AF, PF |
/// | BEXTR | SF, AF, PF |
/// | LZCNT, TZCNT | OF, SF, AF, PF |
fn undefined_flags(instruction: &Instruction, input: &Machine) -> u64 {
    use Mnemonic::*;
    let size = operand_size(instruction);
    let count = shift_count(instruction, input, size);
    let beyond_one = if count == 1 { 0 } else { OF };
    match instruction.mnemonic() {
        And | Or | Xor | Test => AF,
        Shl | Shr | Sal | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd if count == 0 => 0,
        Shl | Shr | Sal if count >= size => AF | OF | CF,
        Shl | Shr | Sal | Sar | Shld | Shrd => AF | beyond_one,
        Rol | Ror | Rcl | Rcr => beyond_one,
        Mul | Imul => SF | ZF | AF | PF,
        Div | Idiv => ARITHMETIC,
        Bsf | Bsr => ARITHMETIC & !ZF,
        Bt | Bts | Btr | Btc | Lzcnt | Tzcnt => OF | SF | AF | PF,
        Andn | Blsi | Blsr | Blsmsk | Bzhi => AF | PF,
        Bextr => SF | AF | PF,
        _ => 0,
    }
}

/// Bits of the first operand.
pub(crate) fn operand_size(instruction: &Instruction) -> u64 {
    let bytes = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    };
    bytes as u64 * 8
}

fn shift_count(instruction: &Instruction, input: &Machine, size: u64) -> u64 {
    let Some(last) = instruction.op_count().checked_sub(1) else {
        return 0;
    };
    let count = match instruction.op_kind(last) {
        OpKind::Immediate8 => instruction.immediate8().into(),
        OpKind::Register if instruction.op_register(last) == Register::CL => input.gpr[1] & 0xff,
        _ => 0,
    };
    count & if size == 64 { 63 } else { 31 }
}

/// Bits of RFLAGS that are compared. RF, IF and IOPL are the kernels' own.
const FLAGS: u64 = ARITHMETIC | DF | NT | AC | ID;

/// The first thing that differs, in words.
pub(crate) fn difference(
    instruction: &Instruction,
    input: &Machine,
    native: &(Machine, End),
    software: &(Machine, End),
) -> Option<String> {
    let (native, native_end) = native;
    let (software, software_end) = software;
    if !same_end(instruction, native_end, software_end) {
        return Some(format!(
            "end: native {native_end:x?}, software {software_end:x?}"
        ));
    }
    let partial = partly_written(instruction, native);
    let undefined = match native_end {
        End::At(_) => undefined_flags(instruction, input),
        End::Fault { .. } | End::Differs => 0,
    };
    let mut difference = general_difference(native, software, partial);
    if difference.is_none() {
        difference = flags_difference(native, software, undefined);
    }
    difference.or_else(|| state_difference(native, software, native_end))
}

/// Of general registers; of `partial` only the low half.
pub(crate) fn general_difference(
    native: &Machine,
    software: &Machine,
    partial: Option<usize>,
) -> Option<String> {
    for (index, (native, software)) in native.gpr.iter().zip(&software.gpr).enumerate() {
        let compared = if partial == Some(index) {
            u64::from(u32::MAX)
        } else {
            u64::MAX
        };
        if (native ^ software) & compared != 0 {
            let name = Register::RAX + index as u32;
            return Some(format!(
                "{name:?}: native {native:#x}, software {software:#x}"
            ));
        }
    }
    None
}

/// Of flags but those that are undefined.
pub(crate) fn flags_difference(
    native: &Machine,
    software: &Machine,
    undefined: u64,
) -> Option<String> {
    let flags = FLAGS & !undefined;
    if (native.rflags ^ software.rflags) & flags != 0 {
        return Some(format!(
            "flags: native {:#x}, software {:#x}, undefined {undefined:#x}",
            native.rflags & flags,
            software.rflags & flags
        ));
    }
    None
}

/// Of x87, SSE and AVX state.
pub(crate) fn state_difference(native: &Machine, software: &Machine, end: &End) -> Option<String> {
    let (mut native_float, mut software_float) = (native.float, software.float);
    if matches!(end, End::Fault { vector: 19, .. }) {
        hide_precision(&mut native_float, &mut software_float);
    }
    float_difference(&native_float, &software_float)
        .or_else(|| upper_difference(&native.upper, &software.upper))
}

fn upper_difference(native: &[u8; 256], software: &[u8; 256]) -> Option<String> {
    let halves = native.chunks(16).zip(software.chunks(16));
    let (index, (native, software)) = halves
        .enumerate()
        .find(|(_, (native, software))| native != software)?;
    Some(format!(
        "upper half of YMM{index}: native {}, software {}",
        number(native),
        number(software)
    ))
}

/// PE beside an unmasked overflow or underflow: the one known deviation, which
/// `float/arithmetic.rs` states.
fn hide_precision(native: &mut [u8; 512], software: &mut [u8; 512]) {
    const OVERFLOW_UNDERFLOW: u8 = 0x18;
    const PRECISION: u8 = 0x20;
    let masks = native[24] >> 7 | native[25] << 1;
    if native[24] & !masks & OVERFLOW_UNDERFLOW != 0 {
        native[24] &= !PRECISION;
        software[24] &= !PRECISION;
    }
}

/// The register of which only the low half is compared: the destination of a 32-bit CMPXCHG that
/// found another value, which Intel writes (SDM vol. 2A) and AMD does not.
fn partly_written(instruction: &Instruction, after: &Machine) -> Option<usize> {
    let failed = after.rflags & ZF == 0;
    let register = instruction.op0_kind() == OpKind::Register;
    (instruction.code() == Code::Cmpxchg_rm32_r32 && failed && register)
        .then(|| instruction.op0_register().number())
}

pub(crate) fn same_end(instruction: &Instruction, native: &End, software: &End) -> bool {
    // Moved in several accesses, of which any may be the first.
    let whole_page = matches!(
        instruction.memory_size(),
        MemorySize::FpuEnv14
            | MemorySize::FpuEnv28
            | MemorySize::FpuState94
            | MemorySize::FpuState108
            | MemorySize::Fxsave_512Byte
            | MemorySize::Fxsave64_512Byte
    );
    // Two operands in the same missing page, one of them by its second half only: no manual says
    // which is read first, and processors differ.
    let two_operands = matches!(
        instruction.mnemonic(),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq
    );
    let ignored = if whole_page || two_operands { 0xfff } else { 0 };
    match (native, software) {
        (
            End::Fault {
                vector: 14,
                code: native_code,
                address: native_address,
            },
            End::Fault {
                vector: 14,
                code,
                address,
            },
        ) => {
            // The kernel hides from user programs what is mapped in its half.
            let kernel = *native_address >> 47 != 0;
            native_address | ignored == address | ignored && (kernel || native_code == code)
        }
        _ => native == software,
    }
}

/// Fields of the FXSAVE image: name, place, bytes.
const FIELDS: [(&str, usize, usize); 4] = [
    ("x87 control word", 0, 2),
    ("x87 status word", 2, 2),
    ("x87 tags", 4, 1),
    ("MXCSR", 24, 4),
];

/// The same, where an exception is pending. FXSAVE need not save them elsewhere (AMD APM vol. 5,
/// FXSAVE), and some processors write zeros.
const POINTERS: [(&str, usize, usize); 3] = [
    ("x87 opcode", 6, 2),
    ("x87 instruction pointer", 8, 8),
    ("x87 data pointer", 16, 8),
];

fn float_difference(native: &[u8; 512], software: &[u8; 512]) -> Option<String> {
    if native[..28] == software[..28] && native[32..416] == software[32..416] {
        return None;
    }
    let pending = native[2] & 0x80 != 0;
    let pointers = POINTERS.into_iter().filter(|_| pending);
    let fields = FIELDS.into_iter().chain(pointers);
    let fields = fields.map(|(name, at, bytes)| (name.to_owned(), at, bytes));
    let stack = (0..8).map(|index| (format!("ST({index})"), 32 + index * 16, 10));
    let vectors = (0..16).map(|index| (format!("XMM{index}"), 160 + index * 16, 16));
    for (name, at, bytes) in fields.chain(stack).chain(vectors) {
        let (native, software) = (&native[at..at + bytes], &software[at..at + bytes]);
        if native != software {
            return Some(format!(
                "{name}: native {}, software {}",
                number(native),
                number(software)
            ));
        }
    }
    None
}

/// The first bytes of both memories that differ, in words.
pub(crate) fn memory_difference(
    native: [&mut [u8]; 2],
    software: [&mut [u8]; 2],
) -> Option<String> {
    let parts = native.into_iter().zip(software).zip([DATA, STACK]);
    let ((native, software), base) = parts
        .into_iter()
        .find(|((native, software), _)| native != software)?;
    let pairs = native.iter().zip(&*software);
    let at = pairs
        .take_while(|(native, software)| native == software)
        .count();
    let end = (at + 16).min(native.len());
    Some(format!(
        "memory at {:#x}: native {}, software {}",
        base + at as u64,
        number(&native[at..end]),
        number(&software[at..end])
    ))
}

/// Little-endian bytes as a hexadecimal number.
pub(crate) fn number(bytes: &[u8]) -> String {
    let digits: String = bytes
        .iter()
        .rev()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("0x{digits}")
}
