//! RDMSR and WRMSR.

use std::sync::atomic::{AtomicU32, Ordering};

use iced_x86::{Instruction, Mnemonic};

use super::Result;
use super::op::{Op, slot};
use crate::cpu::Cpu;
use crate::cpu::control::{CR0_PG, EFER_ALL, EFER_LMA, EFER_LME, EFER_NXE};
use crate::kvmclock::{MSR_SYSTEM_TIME, MSR_WALL_CLOCK};
use crate::lapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE};
use crate::mmu::is_canonical;
use crate::state::segment;

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const TSC_ADJUST: u32 = 0x3b;
const BIOS_SIGNATURE: u32 = 0x8b;
const MTRR_CAP: u32 = 0xfe;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MISC_ENABLE: u32 = 0x1a0;
const PAT: u32 = 0x277;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;
/// AMD's system configuration: read by every Linux on a processor that says it is AMD's.
const SYSCFG: u32 = 0xc001_0010;
/// AMD's hardware configuration.
const HWCR: u32 = 0xc001_0015;
/// AMD's north bridge configuration: Linux switches on extended PCI configuration cycles by it.
const NB_CFG: u32 = 0xc001_001f;
/// AMD's patch level is [`BIOS_SIGNATURE`]; this is its decode configuration.
const DE_CFG: u32 = 0xc001_1029;

/// Lines about unknown registers, over the life of the process.
const MAX_COMPLAINTS: u32 = 64;

fn complain(what: &'static str, msr: u32, value: u64) {
    static COMPLAINTS: AtomicU32 = AtomicU32::new(0);
    if COMPLAINTS.load(Ordering::Relaxed) < MAX_COMPLAINTS {
        COMPLAINTS.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(msr = format_args!("{msr:#x}"), value, "unknown MSR {what}");
    }
}

/// RDMSR, WRMSR.
pub(crate) fn msr(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    cpu.check_supervisor()?;
    let index = cpu.slot(slot::RCX) as u32;
    if instruction.mnemonic() == Mnemonic::Rdmsr {
        cpu.counters.msr_reads += 1;
        let value = read(cpu, index)?;
        cpu.set_reg(slot::RAX, value as u32);
        cpu.set_reg(slot::RDX, (value >> 32) as u32);
        return Ok(());
    }
    cpu.counters.msr_writes += 1;
    let value = u64::from(cpu.reg::<u32>(slot::RAX)) | u64::from(cpu.reg::<u32>(slot::RDX)) << 32;
    write(cpu, index, value)
}

fn read(cpu: &mut Cpu, index: u32) -> Result<u64> {
    let msrs = &cpu.msrs;
    Ok(match index {
        TSC => cpu.tsc(),
        TSC_ADJUST => msrs.tsc_adjust,
        PLATFORM_ID | BIOS_SIGNATURE | MCG_CAP | MCG_STATUS | MTRR_CAP => 0,
        SYSCFG | HWCR | NB_CFG | DE_CFG => 0,
        SYSENTER_CS => msrs.sysenter_cs,
        SYSENTER_ESP => msrs.sysenter_esp,
        SYSENTER_EIP => msrs.sysenter_eip,
        MISC_ENABLE => msrs.misc_enable,
        PAT => msrs.pat,
        MTRR_DEF_TYPE => msrs.mtrr_def_type,
        EFER => msrs.efer,
        STAR => msrs.star,
        LSTAR => msrs.lstar,
        CSTAR => msrs.cstar,
        SFMASK => msrs.sfmask,
        KERNEL_GS_BASE => msrs.kernel_gs_base,
        TSC_AUX => msrs.tsc_aux,
        FS_BASE => cpu.segments[segment::FS].base,
        GS_BASE => cpu.segments[segment::GS].base,
        MSR_SYSTEM_TIME => cpu.kvmclock.system_time_msr(),
        MSR_WALL_CLOCK => cpu.kvmclock.wall_clock_msr(),
        MSR_APIC_BASE | MSR_TSC_DEADLINE => read_apic(cpu, index)?,
        _ if X2APIC.contains(&index) => read_apic(cpu, index)?,
        _ => {
            complain("read", index, 0);
            return Err(cpu.general_protection(0));
        }
    })
}

fn read_apic(cpu: &mut Cpu, index: u32) -> Result<u64> {
    let now = cpu.tsc();
    match cpu.apic.read_msr(index, now) {
        Ok(value) => {
            cpu.apic_changed();
            Ok(value)
        }
        Err(_) => Err(cpu.general_protection(0)),
    }
}

fn write(cpu: &mut Cpu, index: u32, value: u64) -> Result {
    match index {
        TSC => {
            let delta = value.wrapping_sub(cpu.tsc());
            cpu.adjust_tsc(delta);
        }
        TSC_ADJUST => cpu.adjust_tsc(value.wrapping_sub(cpu.msrs.tsc_adjust)),
        SYSENTER_CS => cpu.msrs.sysenter_cs = value & 0xffff_ffff,
        SYSENTER_ESP => cpu.msrs.sysenter_esp = canonical(cpu, value)?,
        SYSENTER_EIP => cpu.msrs.sysenter_eip = canonical(cpu, value)?,
        BIOS_SIGNATURE | MISC_ENABLE | MTRR_DEF_TYPE | MCG_STATUS | SYSCFG | HWCR | NB_CFG
        | DE_CFG => match index {
            MISC_ENABLE => cpu.msrs.misc_enable = value,
            MTRR_DEF_TYPE if value & !0xcff == 0 => cpu.msrs.mtrr_def_type = value,
            MTRR_DEF_TYPE => return Err(cpu.general_protection(0)),
            _ => {}
        },
        PAT => {
            if !is_pat(value) {
                return Err(cpu.general_protection(0));
            }
            cpu.msrs.pat = value;
        }
        EFER => write_efer(cpu, value)?,
        STAR => cpu.msrs.star = value,
        LSTAR => cpu.msrs.lstar = canonical(cpu, value)?,
        CSTAR => cpu.msrs.cstar = canonical(cpu, value)?,
        SFMASK => cpu.msrs.sfmask = value & 0xffff_ffff,
        KERNEL_GS_BASE => cpu.msrs.kernel_gs_base = canonical(cpu, value)?,
        TSC_AUX => cpu.msrs.tsc_aux = value & 0xffff_ffff,
        FS_BASE | GS_BASE => {
            let at = if index == FS_BASE {
                segment::FS
            } else {
                segment::GS
            };
            cpu.segments[at].base = canonical(cpu, value)?;
            cpu.refresh_segment_bases();
        }
        MSR_SYSTEM_TIME => {
            let (clock, memory) = (&cpu.config.clock, &*cpu.memory);
            cpu.kvmclock.set_system_time(value, clock, memory);
        }
        MSR_WALL_CLOCK => {
            let (clock, memory) = (&cpu.config.clock, &*cpu.memory);
            cpu.kvmclock.set_wall_clock(value, clock, memory);
        }
        MSR_APIC_BASE | MSR_TSC_DEADLINE => write_apic(cpu, index, value)?,
        _ if X2APIC.contains(&index) => write_apic(cpu, index, value)?,
        _ => {
            complain("write", index, value);
            return Err(cpu.general_protection(0));
        }
    }
    Ok(())
}

/// Is each byte a memory type that PAT knows?
pub(crate) fn is_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7))
}

fn canonical(cpu: &mut Cpu, value: u64) -> Result<u64> {
    if !is_canonical(value) {
        return Err(cpu.general_protection(0));
    }
    Ok(value)
}

fn write_apic(cpu: &mut Cpu, index: u32, value: u64) -> Result {
    let now = cpu.tsc();
    match cpu.apic.write_msr(index, value, now) {
        Ok(ended) => {
            cpu.ended_interrupt(ended);
            cpu.apic_changed();
            Ok(())
        }
        Err(_) => Err(cpu.general_protection(0)),
    }
}

fn write_efer(cpu: &mut Cpu, value: u64) -> Result {
    let old = cpu.msrs.efer;
    let paging = cpu.cr0 & CR0_PG != 0;
    if value & !EFER_ALL != 0 || paging && (old ^ value) & EFER_LME != 0 {
        return Err(cpu.general_protection(0));
    }
    cpu.msrs.efer = value & !EFER_LMA | old & EFER_LMA;
    if (old ^ value) & EFER_NXE != 0 {
        cpu.flush_tlb();
    }
    Ok(())
}
