//! AVX, AVX2, FMA and F16C: the host's own instructions on operands that are fetched for them.
//!
//! What touches memory element by element is done here: gathers, and loads and stores under a mask.

mod elements;
mod host;

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic as M, OpKind};

pub(crate) use host::host_executes;

use super::arithmetic::{self, Tiny, UNDERFLOW};
use super::lower::{Lowered, register_number, simd_exception};
use crate::cpu::Cpu;
use crate::exec::Result;
use crate::exec::flags::Flags;
use crate::exec::op::{Handler, Op, slot, straight};
use host::{Form, Frame, Memory, Operand};

/// The handler of an AVX, AVX2, FMA or F16C instruction; `None` for any other.
pub(super) fn lower(instruction: &Instruction) -> Option<Lowered> {
    use CpuidFeature::{AVX, AVX2, F16C, FMA};
    let features = instruction.cpuid_features();
    let all = |feature: &CpuidFeature| matches!(feature, AVX | AVX2 | FMA | F16C);
    if !features.iter().all(all) {
        return None;
    }
    special(instruction)
        .or_else(|| elements::lower(instruction))
        .or_else(|| by_the_host(instruction))
}

/// An operation whose registers are the first and the second operand.
fn lowered(instruction: &Instruction, handler: Handler, imm: u64) -> Lowered {
    Lowered {
        handler,
        dst: register_number(instruction.op0_register()),
        src: register_number(instruction.op1_register()),
        imm,
    }
}

fn vector(cpu: &Cpu, number: u8) -> [u128; 2] {
    let number = usize::from(number & 15);
    [cpu.float.xmm[number], cpu.float.upper[number]]
}

fn set_vector(cpu: &mut Cpu, number: u8, [low, high]: [u128; 2]) {
    let number = usize::from(number & 15);
    cpu.float.xmm[number] = low;
    cpu.float.upper[number] = high;
}

/// What changes other state than one register.
fn special(instruction: &Instruction) -> Option<Lowered> {
    let handler = match instruction.mnemonic() {
        M::Vzeroupper => straight(|cpu, _| {
            cpu.check_avx()?;
            zero(cpu, false);
            Ok(())
        }),
        M::Vzeroall => straight(|cpu, _| {
            cpu.check_avx()?;
            zero(cpu, true);
            Ok(())
        }),
        M::Vldmxcsr => straight(|cpu, op| {
            cpu.check_avx()?;
            let value: u32 = cpu.read(op)?;
            if cpu.float.set_mxcsr(value).is_err() {
                return Err(cpu.general_protection(0));
            }
            Ok(())
        }),
        M::Vstmxcsr => straight(|cpu, op| {
            cpu.check_avx()?;
            let value = cpu.float.mxcsr;
            cpu.write(op, value)
        }),
        _ => return None,
    };
    Some(lowered(instruction, handler, 0))
}

/// Zeroes the registers that the mode can name, or their upper halves.
fn zero(cpu: &mut Cpu, whole: bool) {
    let count = if cpu.is_64_bit() { 16 } else { 8 };
    cpu.float.upper[..count].fill(0);
    if whole {
        cpu.float.xmm[..count].fill(0);
    }
}

/// Which bits of [`Op::imm`] are the form; the rest are the third and the fourth register.
const FORM: u64 = (1 << 48) - 1;

fn by_the_host(instruction: &Instruction) -> Option<Lowered> {
    let last = instruction.op_count().checked_sub(1)?;
    let immediate = match instruction.op_kind(last) {
        OpKind::Immediate8 => instruction.immediate8(),
        _ => 0,
    };
    let form = host::form(instruction, immediate, |form| describe(instruction, form))?;
    let address = std::ptr::from_ref(form).expose_provenance() as u64;
    if address & !FORM != 0 {
        return None;
    }
    let register = |n: u32| match instruction.op_count() > n {
        true => u64::from(register_number(instruction.op_register(n))),
        false => 0,
    };
    let imm = address | register(2) << 48 | register(3) << 56;
    let handler = match instruction.mnemonic() {
        M::Vpcmpistri
        | M::Vpcmpistrm
        | M::Vpcmpestri
        | M::Vpcmpestrm
        | M::Vpcmpestri64
        | M::Vpcmpestrm64 => straight(strings),
        M::Vdpps | M::Vdppd => straight(dot),
        _ => straight(plain),
    };
    Some(lowered(instruction, handler, imm))
}

/// What the handler has to know about an instruction.
fn describe(instruction: &Instruction, form: &mut Form) {
    let memory = (0..instruction.op_count()).find(|n| instruction.op_kind(*n) == OpKind::Memory);
    form.memory = match memory {
        None => Memory::None,
        Some(0) => Memory::Store,
        Some(_) => Memory::Load,
    };
    if memory.is_some() {
        form.bytes = instruction.memory_size().size().min(32);
    }
    form.aligned = matches!(
        instruction.mnemonic(),
        M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    );
    form.sets_flags = matches!(
        instruction.mnemonic(),
        M::Vptest
            | M::Vtestps
            | M::Vtestpd
            | M::Vcomiss
            | M::Vcomisd
            | M::Vucomiss
            | M::Vucomisd
            | M::Vpcmpistri
            | M::Vpcmpistrm
            | M::Vpcmpestri
            | M::Vpcmpestrm
            | M::Vpcmpestri64
            | M::Vpcmpestrm64
    );
    form.tiny = tiny(instruction);
}

/// Which lanes of the result can be tiny: by the operation, and by the precision that its name ends with.
fn tiny(instruction: &Instruction) -> [Tiny; 2] {
    const PS: Tiny = Tiny::Single(4);
    const SS: Tiny = Tiny::Single(1);
    const PD: Tiny = Tiny::Double(2);
    const SD: Tiny = Tiny::Double(1);
    let wide = instruction.op0_register().is_ymm();
    let both = |tiny| [tiny, if wide { tiny } else { Tiny::Never }];
    let name = format!("{:?}", instruction.mnemonic());
    match instruction.mnemonic() {
        M::Vcvtsd2ss => return [SS, Tiny::Never],
        // The destination is one XMM register, of which half is used.
        M::Vcvtpd2ps
            if instruction.memory_size().size() == 32 || instruction.op1_register().is_ymm() =>
        {
            return [PS, Tiny::Never];
        }
        M::Vcvtpd2ps => return [Tiny::Single(2), Tiny::Never],
        M::Vcvtps2ph => {
            let lanes = if instruction.op1_register().is_ymm() {
                8
            } else {
                4
            };
            return [Tiny::Half(lanes), Tiny::Never];
        }
        _ => {}
    }
    const OPERATIONS: [&str; 10] = [
        "Vadd", "Vsub", "Vmul", "Vdiv", "Vhadd", "Vhsub", "Vfmadd", "Vfmsub", "Vfnmadd", "Vfnmsub",
    ];
    if !OPERATIONS
        .iter()
        .any(|operation| name.starts_with(operation))
    {
        return [Tiny::Never; 2];
    }
    match &name[name.len() - 2..] {
        "ps" => both(PS),
        "pd" => both(PD),
        "ss" => [SS, Tiny::Never],
        "sd" => [SD, Tiny::Never],
        _ => [Tiny::Never; 2],
    }
}

#[expect(
    unsafe_code,
    reason = "an operation has no room for more than an address"
)]
fn form_of(op: &Op) -> &'static Form {
    let pointer = std::ptr::with_exposed_provenance::<Form>((op.imm & FORM) as usize);
    // SAFETY: `by_the_host` puts the address of a form there, and forms live for ever.
    unsafe { &*pointer }
}

/// The frame with the operands of an instruction.
fn fetch(cpu: &mut Cpu, op: &Op, form: &Form, mxcsr: u32) -> Result<Frame> {
    let mut frame = Frame::new(mxcsr);
    let numbers = [op.dst, op.src, (op.imm >> 48) as u8, (op.imm >> 56) as u8];
    let mut vectors = 0;
    for (operand, number) in form.operands.iter().zip(numbers) {
        match operand {
            Operand::Vector => {
                frame.vectors[vectors] = vector(cpu, number);
                vectors += 1;
            }
            Operand::General => frame.general[0] = cpu.slot(number),
            Operand::Other => {}
        }
    }
    if form.aligned && form.memory != Memory::None {
        cpu.check_aligned(op, form.bytes as u64)?;
    }
    if form.memory == Memory::Load {
        let at = cpu.ea(op);
        cpu.read_bytes(at, op.seg, &mut frame.memory[..form.bytes])?;
    }
    Ok(frame)
}

/// Writes the results of an instruction.
fn finish(cpu: &mut Cpu, op: &Op, form: &Form, frame: &Frame) -> Result {
    match form.operands[0] {
        Operand::Vector => set_vector(cpu, op.dst, frame.vectors[0]),
        Operand::General => cpu.set_reg::<u64>(op.dst, frame.general[0]),
        Operand::Other => {
            if form.memory == Memory::Store {
                let at = cpu.ea(op);
                cpu.write_bytes(at, op.seg, &frame.memory[..form.bytes])?;
            }
        }
    }
    if form.sets_flags {
        cpu.flags = Flags::from_rflags(frame.rflags);
    }
    Ok(())
}

/// Most instructions: operands, a result, and perhaps exceptions.
fn plain(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.check_avx()?;
    let form = form_of(op);
    let (modes, catches_tiny) = arithmetic::modes(cpu.float.mxcsr);
    let mut frame = fetch(cpu, op, form, modes)?;
    host::execute(form, &mut frame);
    let mut exceptions = frame.exceptions();
    if catches_tiny {
        let result = match form.memory {
            Memory::Store => [
                frame
                    .memory
                    .first_chunk()
                    .map_or(0, |bytes| u128::from_le_bytes(*bytes)),
                0,
            ],
            _ => frame.vectors[0],
        };
        let mut halves = form.tiny.iter().zip(result);
        if halves.any(|(tiny, half)| tiny.in_result(half)) {
            exceptions |= UNDERFLOW;
        }
    }
    if exceptions != 0 {
        let mut mxcsr = cpu.float.mxcsr;
        let settled = arithmetic::settle(&mut mxcsr, exceptions);
        if settled.is_none() {
            if form.memory == Memory::Store {
                // A page fault comes first.
                let at = cpu.ea(op);
                cpu.check_writable(at, form.bytes as u64, op.seg)?;
            }
            cpu.float.mxcsr = mxcsr;
            return Err(simd_exception(cpu));
        }
        finish(cpu, op, form, &frame)?;
        cpu.float.mxcsr = mxcsr;
        return Ok(());
    }
    finish(cpu, op, form, &frame)
}

/// Comparisons of strings: lengths in RAX and RDX, the result in RCX or XMM0.
fn strings(cpu: &mut Cpu, op: &Op) -> Result {
    cpu.check_avx()?;
    let form = form_of(op);
    let mut frame = fetch(cpu, op, form, cpu.float.mxcsr)?;
    frame.general = [slot::RAX, slot::RCX, slot::RDX].map(|number| cpu.slot(number));
    host::execute(form, &mut frame);
    match form.code.mnemonic() {
        M::Vpcmpistri | M::Vpcmpestri | M::Vpcmpestri64 => {
            cpu.set_reg::<u64>(slot::RCX, frame.general[1])
        }
        _ => set_vector(cpu, 0, frame.vectors[0]),
    }
    cpu.flags = Flags::from_rflags(frame.rflags);
    Ok(())
}

/// Dot products. With unmasked exceptions each step may raise one, so that they are done step by step.
fn dot(cpu: &mut Cpu, op: &Op) -> Result {
    if arithmetic::unmasked(cpu.float.mxcsr) == 0 {
        return plain(cpu, op);
    }
    cpu.check_avx()?;
    let form = form_of(op);
    let frame = fetch(cpu, op, form, cpu.float.mxcsr)?;
    let b = match form.memory {
        Memory::Load => {
            let half = |at: usize| {
                let bytes = frame.memory[at..].first_chunk();
                bytes.map_or(0, |bytes| u128::from_le_bytes(*bytes))
            };
            [half(0), half(16)]
        }
        _ => frame.vectors[2],
    };
    let a = frame.vectors[1];
    let pairs = [(a[0], b[0]), (a[1], b[1])];
    let (control, mxcsr) = (form.immediate, &mut cpu.float.mxcsr);
    let result = match form.code {
        Code::VEX_Vdpps_ymm_ymm_ymmm256_imm8 => arithmetic::dpps(pairs, control, mxcsr),
        Code::VEX_Vdpps_xmm_xmm_xmmm128_imm8 => {
            arithmetic::dpps([pairs[0]], control, mxcsr).map(|[sum]| [sum, 0])
        }
        _ => arithmetic::dppd(pairs[0], control, mxcsr).map(|sum| [sum, 0]),
    };
    let Some(result) = result else {
        return Err(simd_exception(cpu));
    };
    set_vector(cpu, op.dst, result);
    Ok(())
}
