//! Which instruction forms there are, and which of them are not compared, with the reason.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind, Register};

/// What becomes of a form.
pub(crate) enum Verdict {
    Compare,
    /// The baseline does not offer it, or 64-bit user mode does not have it.
    Outside,
    /// On the list of exclusions.
    Excluded(&'static str),
    /// The host's processor lacks the feature.
    HostLacks(&'static str),
}

/// What the newest baseline offers, in the decoder's terms; with it the name by which the
/// baseline promises it, if it has one of its own, and whether this host has it.
fn offered(feature: CpuidFeature) -> Option<(&'static str, bool)> {
    use CpuidFeature::*;
    Some(match feature {
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | FPU287 | FPU387 | PAUSE
        | MULTIBYTENOP | HLE_or_RTM => ("", true),
        // No-operations on processors that do not have them.
        CET_IBT | PREFETCHW => ("", true),
        FPU => ("fpu", true),
        TSC => ("tsc", true),
        MSR => ("msr", true),
        CX8 => ("cx8", true),
        SEP => ("sep", true),
        CMOV => ("cmov", true),
        CLFSH => ("clflush", true),
        MMX => ("mmx", is_x86_feature_detected!("mmx")),
        FXSR => ("fxsr", is_x86_feature_detected!("fxsr")),
        SSE => ("sse", is_x86_feature_detected!("sse")),
        SSE2 => ("sse2", is_x86_feature_detected!("sse2")),
        SSE3 => ("sse3", is_x86_feature_detected!("sse3")),
        SSSE3 => ("ssse3", is_x86_feature_detected!("ssse3")),
        SSE4_1 => ("sse4_1", is_x86_feature_detected!("sse4.1")),
        SSE4_2 => ("sse4_2", is_x86_feature_detected!("sse4.2")),
        POPCNT => ("popcnt", is_x86_feature_detected!("popcnt")),
        CMPXCHG16B => ("cx16", is_x86_feature_detected!("cmpxchg16b")),
        SYSCALL => ("syscall", true),
        RDTSCP => ("rdtscp", true),
        CPUID => ("", true),
        MOVBE => ("movbe", is_x86_feature_detected!("movbe")),
        BMI1 => ("bmi1", is_x86_feature_detected!("bmi1")),
        BMI2 => ("bmi2", is_x86_feature_detected!("bmi2")),
        LZCNT => ("abm", is_x86_feature_detected!("lzcnt")),
        XSAVE => ("xsave", is_x86_feature_detected!("xsave")),
        AVX => ("avx", is_x86_feature_detected!("avx")),
        AVX2 => ("avx2", is_x86_feature_detected!("avx2")),
        FMA => ("fma", is_x86_feature_detected!("fma")),
        F16C => ("f16c", is_x86_feature_detected!("f16c")),
        _ => return None,
    })
}

/// Features of the newest baseline that have no instructions of their own, or only such as run
/// in the kernel. With [`offered`] this must cover the baseline.
const WITHOUT_FORMS: &[&str] = &[
    "pse",
    "pae",
    "apic",
    "pge",
    "pat",
    "x2apic",
    "tsc_deadline_timer",
    "hypervisor",
    "nx",
    "lm",
    "lahf_lm",
];

/// A feature that the newest baseline promises and this table does not know.
pub(crate) fn unknown_features() -> Vec<&'static str> {
    let known: Vec<_> = CpuidFeature::values().filter_map(offered).collect();
    let [.., newest] = dunlin_x86::cpuid::Baseline::all();
    newest
        .features()
        .map(|feature| feature.name)
        .filter(|name| !WITHOUT_FORMS.contains(name))
        .filter(|name| !known.iter().any(|(offered, _)| offered == name))
        .collect()
}

/// Says what becomes of `code`.
pub(crate) fn verdict(code: Code) -> Verdict {
    let info = code.op_code();
    let encoded = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    if !encoded || !info.mode64() || !info.is_instruction() {
        return Verdict::Outside;
    }
    let [.., newest] = dunlin_x86::cpuid::Baseline::all();
    for feature in code.cpuid_features() {
        match offered(*feature) {
            Some((name, true)) if name.is_empty() || newest.has(name) => {}
            Some((name, false)) => return Verdict::HostLacks(name),
            _ => return Verdict::Outside,
        }
    }
    match exclusion(code) {
        Some(reason) => Verdict::Excluded(reason),
        None => Verdict::Compare,
    }
}

/// Why a form is not compared.
fn exclusion(code: Code) -> Option<&'static str> {
    use Mnemonic::*;
    let info = code.op_code();
    let near_16 = matches!(
        code,
        Code::Retnw | Code::Retnw_imm16 | Code::Call_rm16 | Code::Jmp_rm16
    );
    if info.fwait() {
        return Some("two instructions, WAIT and another, each compared alone");
    }
    for operand in info.op_kinds() {
        match operand {
            OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2 => {
                return Some("near branch of 16 bits: vendors differ in 64-bit mode");
            }
            OpCodeOperandKind::fs | OpCodeOperandKind::gs => {
                return Some("loads or stores a segment register that the host's threads use");
            }
            _ => {}
        }
    }
    if near_16 {
        return Some("near branch of 16 bits: vendors differ in 64-bit mode");
    }
    if matches!(code, Code::Bswap_r16) {
        return Some("result is undefined");
    }
    if matches!(code, Code::Movsxd_r16_rm16) {
        return Some("vendors differ in how much memory is read");
    }
    if matches!(
        code,
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16
    ) {
        return Some("descriptor tables are the host's own");
    }
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Some("prefetch of a register: vendors differ");
    }
    if matches!(code, Code::Ud0) {
        return Some("a form that the decoder gives only to old processors");
    }
    Some(match code.mnemonic() {
        Mov if code.is_privileged() => "privileged: faults in user mode whatever the operands",
        Lss | Lfs | Lgs | Lar | Lsl | Verr | Verw => "descriptor tables are the host's own",
        Retf | Iret | Iretd | Iretq => "far transfer: descriptor tables are the host's own",
        Call | Jmp if is_far(code) => "far transfer: descriptor tables are the host's own",
        Syscall | Sysenter | Int => "calls the host's kernel",
        Cpuid | Rdtsc | Rdtscp => "reads what differs between host and guest",
        Sgdt | Sidt | Sldt | Str | Smsw => {
            "reads what differs between host and guest, or faults by UMIP"
        }
        Into => "not in 64-bit mode",
        Xsave | Xsave64 | Xrstor | Xrstor64 | Xgetbv => {
            "depends on which components the system has enabled; tested by itself"
        }
        Xtest | Xbegin | Xend | Xabort => "transactions are not offered",
        _ if code.is_privileged() => "privileged: faults in user mode whatever the operands",
        _ => return None,
    })
}

fn is_far(code: Code) -> bool {
    matches!(
        code,
        Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
            | Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
    )
}

/// The stack pointer's comes first.
pub(crate) const BYTE_REGISTERS: [Register; 20] = [
    Register::SPL,
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::AH,
    Register::CH,
    Register::DH,
    Register::BH,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];
