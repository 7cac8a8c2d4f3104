//! XSAVE, XRSTOR, XGETBV, XSETBV: extended state in the standard format (SDM vol. 1, chapter 13).
//!
//! The components are x87, SSE and AVX. XSAVE says of AVX alone that it is in its initial state; the
//! others count as always in use, as the architecture permits.

use iced_x86::{Instruction, Mnemonic};

use super::Result;
use super::op::{Op, slot};
use crate::cpu::Cpu;
use crate::cpu::control::{CR0_TS, CR4_OSXSAVE};
use crate::cpu::is_xcr0;
use crate::float::{
    FXSAVE_BYTES, MXCSR_MASK, XSAVE_AVX, XSAVE_AVX_BYTES, XSAVE_BYTES, XSAVE_SSE, XSAVE_X87,
};

const HEADER: u64 = FXSAVE_BYTES as u64;
const XMM: usize = 160;
const MXCSR: std::ops::Range<usize> = 24..28;

/// EDX:EAX.
fn requested(cpu: &Cpu) -> u64 {
    u64::from(cpu.reg::<u32>(slot::RAX)) | u64::from(cpu.reg::<u32>(slot::RDX)) << 32
}

/// Registers that the mode can name.
fn vectors(cpu: &Cpu) -> usize {
    if cpu.is_64_bit() { 16 } else { 8 }
}

fn check(cpu: &mut Cpu, op: &Op) -> Result {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(cpu.undefined());
    }
    if cpu.cr0 & CR0_TS != 0 {
        return Err(cpu.device_not_available());
    }
    cpu.check_aligned(op, 64)
}

/// Bytes of an area that are touched for `components`.
fn area_bytes(components: u64) -> u64 {
    let avx = if components & XSAVE_AVX != 0 {
        XSAVE_AVX_BYTES
    } else {
        0
    };
    (XSAVE_BYTES + avx) as u64
}

/// XSAVE.
pub(crate) fn save(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    check(cpu, op)?;
    let components = requested(cpu) & cpu.xcr0;
    let (at, seg) = (cpu.ea(op), op.seg);
    cpu.check_writable(at, area_bytes(components), seg)?;
    let before: u64 = cpu.load(at.wrapping_add(HEADER), seg)?;
    let mut image = cpu.float.to_fxsave();
    if instruction.mnemonic() == Mnemonic::Xsave {
        // The selectors that follow 32-bit pointers are no longer kept and read as zero.
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    if components & XSAVE_X87 != 0 {
        cpu.write_bytes(at, seg, &image[..24])?;
        cpu.write_bytes(at.wrapping_add(32), seg, &image[32..XMM])?;
    }
    if components & (XSAVE_SSE | XSAVE_AVX) != 0 {
        cpu.write_bytes(at.wrapping_add(24), seg, &image[24..32])?;
    }
    if components & XSAVE_SSE != 0 {
        let end = XMM + vectors(cpu) * 16;
        cpu.write_bytes(at.wrapping_add(XMM as u64), seg, &image[XMM..end])?;
    }
    let mut in_use = XSAVE_X87 | XSAVE_SSE;
    if cpu.float.upper_in_use() {
        in_use |= XSAVE_AVX;
    }
    if components & in_use & XSAVE_AVX != 0 {
        for index in 0..vectors(cpu) {
            let half = cpu.float.upper[index].to_le_bytes();
            let place = at.wrapping_add((XSAVE_BYTES + index * 16) as u64);
            cpu.write_bytes(place, seg, &half)?;
        }
    }
    let present = before & !components | in_use & components;
    cpu.store(at.wrapping_add(HEADER), seg, present)
}

/// XRSTOR.
pub(crate) fn restore(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    check(cpu, op)?;
    let components = requested(cpu) & cpu.xcr0;
    let (at, seg) = (cpu.ea(op), op.seg);
    let mut header = [0; 24];
    cpu.read_bytes(at.wrapping_add(HEADER), seg, &mut header)?;
    let present = u64::from_le_bytes(header.first_chunk().copied().unwrap_or_default());
    // The compacted format is not offered.
    let reserved = header[8..].iter().any(|byte| *byte != 0);
    if reserved || present & !cpu.xcr0 != 0 {
        return Err(cpu.general_protection(0));
    }
    let mut image = [0; FXSAVE_BYTES];
    cpu.read_bytes(at, seg, &mut image[..XMM + vectors(cpu) * 16])?;
    let mut upper = [0; XSAVE_AVX_BYTES];
    let upper = &mut upper[..vectors(cpu) * 16];
    if components & present & XSAVE_AVX != 0 {
        cpu.read_bytes(at.wrapping_add(XSAVE_BYTES as u64), seg, upper)?;
    }
    if components & (XSAVE_SSE | XSAVE_AVX) != 0 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|byte| image[MXCSR.start + byte]);
        let mxcsr = u32::from_le_bytes([a, b, c, d]);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(cpu.general_protection(0));
        }
        cpu.float.mxcsr = mxcsr;
    }
    if components & XSAVE_X87 != 0 {
        if instruction.mnemonic() == Mnemonic::Xrstor {
            image[12..16].fill(0);
            image[20..24].fill(0);
        }
        if present & XSAVE_X87 == 0 {
            cpu.float.initialise_x87();
        } else {
            cpu.float.load_x87(&image);
        }
    }
    if components & XSAVE_SSE != 0 {
        if present & XSAVE_SSE == 0 {
            image[XMM..].fill(0);
        }
        cpu.float.load_xmm(&image, vectors(cpu));
    }
    if components & XSAVE_AVX != 0 {
        cpu.float.load_upper(upper);
    }
    Ok(())
}

/// XGETBV.
pub(crate) fn get(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(cpu.undefined());
    }
    if cpu.reg::<u32>(slot::RCX) != 0 {
        return Err(cpu.general_protection(0));
    }
    cpu.set_reg(slot::RAX, cpu.xcr0 as u32);
    cpu.set_reg(slot::RDX, (cpu.xcr0 >> 32) as u32);
    Ok(())
}

/// XSETBV.
pub(crate) fn set(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(cpu.undefined());
    }
    cpu.check_supervisor()?;
    let value = requested(cpu);
    if cpu.reg::<u32>(slot::RCX) != 0 || !is_xcr0(value, cpu.config.baseline.xcr0()) {
        return Err(cpu.general_protection(0));
    }
    cpu.xcr0 = value;
    Ok(())
}
