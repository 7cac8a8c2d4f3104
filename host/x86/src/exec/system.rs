//! Instructions that see or change the state of the system.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::flags::{self, IF, IOPL, VM};
use super::op::{Op, slot};
use super::segment::{access, parse};
use super::value::Value;
use super::{Exception, Result};
use crate::cpu::Cpu;
use crate::cpu::control::*;
use crate::cpuid::CpuidContext;
use crate::mmu::is_canonical;
use crate::state::{Activity, DescriptorTable, Segment};

impl Cpu {
    /// #GP(0) unless at privilege level 0.
    pub(crate) fn check_supervisor(&mut self) -> Result {
        if self.cpl != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// #GP(0) unless IOPL allows what the instruction does.
    fn check_iopl(&mut self) -> Result {
        let iopl = (self.system_flags & IOPL) >> 12;
        if self.cr0 & CR0_PE != 0 && u64::from(self.cpl) > iopl {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// Writes CR0.
    pub(crate) fn write_cr0(&mut self, value: u64) -> Result {
        if value >> 32 != 0 {
            return Err(self.general_protection(0));
        }
        let value = value & CR0_ALL | CR0_ET;
        let changed = self.cr0 ^ value;
        let paging_without_protection = value & (CR0_PG | CR0_PE) == CR0_PG;
        let write_through_without_cache = value & (CR0_CD | CR0_NW) == CR0_NW;
        if paging_without_protection || write_through_without_cache {
            return Err(self.general_protection(0));
        }
        let switched = (self.cr0 ^ value) & CR0_PG != 0;
        if switched && value & CR0_PG != 0 {
            if self.msrs.efer & EFER_LME != 0 {
                let code = self.segments[crate::state::segment::CS].access;
                let short_task = !self.tr.unusable && matches!(self.tr.access & 0x1f, 1 | 3);
                if self.cr4 & CR4_PAE == 0 || code & access::LONG != 0 || short_task {
                    return Err(self.general_protection(0));
                }
                self.msrs.efer |= EFER_LMA;
            }
        } else if switched {
            if self.is_64_bit() {
                return Err(self.general_protection(0));
            }
            self.msrs.efer &= !EFER_LMA;
        }
        let pae = value & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && !self.is_long();
        if pae && changed & (CR0_PG | CR0_CD | CR0_NW) != 0 && !self.load_pdptes(self.cr3) {
            return Err(self.general_protection(0));
        }
        let old = self.cr0;
        self.cr0 = value;
        if (old ^ value) & (CR0_PG | CR0_WP | CR0_PE) != 0 {
            self.flush_tlb();
        }
        self.refresh_mode();
        Ok(())
    }

    /// Writes CR3.
    pub(crate) fn write_cr3(&mut self, value: u64) -> Result {
        let value = if self.is_long() {
            value
        } else {
            value & 0xffff_ffff
        };
        if value >> crate::cpuid::PHYSICAL_BITS != 0 {
            return Err(self.general_protection(0));
        }
        let pae = self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && !self.is_long();
        if pae && !self.load_pdptes(value) {
            return Err(self.general_protection(0));
        }
        self.cr3 = value;
        self.flush_local_tlb();
        Ok(())
    }

    /// Writes CR4.
    pub(crate) fn write_cr4(&mut self, value: u64) -> Result {
        if value & !self.cr4_offered() != 0 || self.is_long() && value & CR4_PAE == 0 {
            return Err(self.general_protection(0));
        }
        let changed = self.cr4 ^ value;
        let pae = self.cr0 & CR0_PG != 0 && value & CR4_PAE != 0 && !self.is_long();
        let reloads = changed & (CR4_PAE | CR4_PGE | CR4_PSE) != 0;
        if pae && reloads && !self.load_pdptes(self.cr3) {
            return Err(self.general_protection(0));
        }
        self.cr4 = value;
        if changed & (CR4_PAE | CR4_PSE | CR4_PGE) != 0 {
            self.flush_tlb();
        }
        Ok(())
    }

    /// The bits of CR4 that the baseline has.
    pub(crate) fn cr4_offered(&self) -> u64 {
        if self.config.baseline.has("xsave") {
            CR4_ALL | CR4_OSXSAVE
        } else {
            CR4_ALL
        }
    }

    fn cpuid_context(&self) -> CpuidContext {
        CpuidContext {
            apic_id: self.config.id,
            cpus: self.config.cpus,
            apic_enabled: self.apic.is_enabled(),
            osxsave: self.cr4 & CR4_OSXSAVE != 0,
            xcr0: self.xcr0,
            tsc_khz: self.config.clock.tsc_khz(),
        }
    }
}

/// MOV to and from control and debug registers.
pub(crate) fn mov_control(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let (to, from) = (instruction.op0_register(), instruction.op1_register());
    let (register, debug) = (
        if to.is_gpr() { from } else { to },
        to.is_dr() || from.is_dr(),
    );
    let exists = match register.number() {
        4 | 5 if debug => cpu.cr4 & CR4_DE == 0,
        number if debug => number < 8,
        number => matches!(number, 0 | 2..=4 | 8),
    };
    if !exists {
        return Err(cpu.undefined());
    }
    cpu.check_supervisor()?;
    if debug {
        cpu.check_debug_access()?;
    }
    let wide = cpu.is_64_bit();
    if to.is_cr() {
        let value = if wide {
            cpu.slot(op.src)
        } else {
            u64::from(cpu.slot(op.src) as u32)
        };
        match to {
            Register::CR0 => cpu.write_cr0(value)?,
            Register::CR2 => cpu.cr2 = value,
            Register::CR3 => cpu.write_cr3(value)?,
            Register::CR4 => cpu.write_cr4(value)?,
            Register::CR8 => {
                if cpu.apic.set_cr8(value).is_err() {
                    return Err(cpu.general_protection(0));
                }
                cpu.budget = 0;
            }
            _ => return Err(cpu.undefined()),
        }
        cpu.synchronise_code();
        return Ok(());
    }
    if to.is_dr() {
        let value = if wide {
            cpu.slot(op.src)
        } else {
            u64::from(cpu.slot(op.src) as u32)
        };
        return mov_to_debug(cpu, to.number(), value);
    }
    let value = match from {
        Register::CR0 => cpu.cr0,
        Register::CR2 => cpu.cr2,
        Register::CR3 => cpu.cr3,
        Register::CR4 => cpu.cr4,
        Register::CR8 => cpu.apic.cr8(),
        _ if from.is_dr() => match from.number() {
            index @ 0..=3 => cpu.dr[index],
            4 | 6 => cpu.dr6,
            _ => cpu.dr7,
        },
        _ => return Err(cpu.undefined()),
    };
    cpu.set_reg_sized(op.dst, if wide { 8 } else { 4 }, value);
    Ok(())
}

fn mov_to_debug(cpu: &mut Cpu, index: usize, value: u64) -> Result {
    match index {
        0..=3 => cpu.dr[index] = value,
        4..=7 if value >> 32 != 0 => return Err(cpu.general_protection(0)),
        4 | 6 => cpu.dr6 = value & 0xe00f | DR6_FIXED,
        _ => cpu.dr7 = value & 0xffff_2bff | DR7_FIXED,
    }
    cpu.refresh_watch();
    cpu.budget = 0;
    Ok(())
}

/// Bits of DR6 that read as one.
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;
/// Bits of DR7 that read as one.
pub(crate) const DR7_FIXED: u64 = 0x400;

/// LMSW, SMSW, CLTS.
pub(crate) fn machine_status(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    match instruction.mnemonic() {
        Mnemonic::Clts => {
            cpu.check_supervisor()?;
            cpu.cr0 &= !CR0_TS;
            Ok(())
        }
        Mnemonic::Lmsw => {
            cpu.check_supervisor()?;
            let value = match instruction.op0_kind() {
                OpKind::Memory => cpu.read::<u16>(op)?,
                _ => cpu.slot(op.dst) as u16,
            };
            // PE can be set so, but not cleared.
            let kept = cpu.cr0 & !(CR0_MP | CR0_EM | CR0_TS);
            cpu.write_cr0(kept | u64::from(value) & 0xf)
        }
        _ => {
            if instruction.op0_kind() == OpKind::Memory {
                return cpu.write(op, cpu.cr0 as u16);
            }
            let size = instruction.op0_register().size() as u64;
            cpu.set_reg_sized(op.dst, size, cpu.cr0);
            Ok(())
        }
    }
}

/// LGDT, LIDT.
pub(crate) fn load_table(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    cpu.check_supervisor()?;
    let at = cpu.ea(op);
    let limit = cpu.load::<u16>(at, op.seg)?;
    let base = if cpu.is_64_bit() {
        cpu.load::<u64>(at.wrapping_add(2), op.seg)?
    } else {
        let base = u64::from(cpu.load::<u32>(at.wrapping_add(2), op.seg)?);
        let short = instruction.code().op_code().operand_size() == 16;
        if short { base & 0xff_ffff } else { base }
    };
    if !is_canonical(base) {
        return Err(cpu.general_protection(0));
    }
    let table = DescriptorTable { base, limit };
    if instruction.mnemonic() == Mnemonic::Lgdt {
        cpu.gdtr = table;
    } else {
        cpu.idtr = table;
    }
    Ok(())
}

/// SGDT, SIDT.
pub(crate) fn store_table(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let table = if instruction.mnemonic() == Mnemonic::Sgdt {
        cpu.gdtr
    } else {
        cpu.idtr
    };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let used = if cpu.is_64_bit() { 10 } else { 6 };
    cpu.write_bytes(cpu.ea(op), op.seg, &bytes[..used])
}

/// LLDT, LTR.
pub(crate) fn load_system_segment(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    if !cpu.is_protected() {
        return Err(cpu.undefined());
    }
    cpu.check_supervisor()?;
    let selector = match instruction.op0_kind() {
        OpKind::Memory => cpu.read::<u16>(op)?,
        _ => cpu.slot(op.dst) as u16,
    };
    let task = instruction.mnemonic() == Mnemonic::Ltr;
    if selector & !3 == 0 {
        if task {
            return Err(cpu.general_protection(0));
        }
        cpu.ldtr = Segment {
            selector,
            unusable: true,
            ..Segment::default()
        };
        return Ok(());
    }
    let index = selector & !3;
    if selector & 4 != 0 {
        return Err(cpu.general_protection(index));
    }
    let (raw, at) = cpu.read_descriptor(selector, Exception::GeneralProtection)?;
    let mut value = parse(selector, raw);
    let kind = value.access & 0x1f;
    let fits = if task {
        matches!(kind, 1 | 9) && !(cpu.is_long() && kind == 1)
    } else {
        kind == 2
    };
    if !fits {
        return Err(cpu.general_protection(index));
    }
    if value.access & access::PRESENT == 0 {
        return Err(cpu.raise(Exception::SegmentNotPresent(index)));
    }
    if cpu.is_long() {
        if u64::from(index & !7) + 15 > u64::from(cpu.gdtr.limit) {
            return Err(cpu.general_protection(index));
        }
        let high = cpu.load_system::<u64>(at.wrapping_add(8))?;
        value.base |= high << 32;
        if !is_canonical(value.base) {
            return Err(cpu.general_protection(index));
        }
    }
    if task {
        // Busy.
        cpu.store_system(at.wrapping_add(5), (raw >> 40) as u8 | 2)?;
        value.access |= 2;
        cpu.tr = value;
    } else {
        cpu.ldtr = value;
    }
    Ok(())
}

/// SLDT, STR.
pub(crate) fn store_system_segment(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    if !cpu.is_protected() {
        return Err(cpu.undefined());
    }
    let selector = match instruction.mnemonic() {
        Mnemonic::Sldt => cpu.ldtr.selector,
        _ => cpu.tr.selector,
    };
    if instruction.op0_kind() == OpKind::Memory {
        return cpu.write(op, selector);
    }
    let size = instruction.op0_register().size() as u64;
    cpu.set_reg_sized(op.dst, size, selector.into());
    Ok(())
}

/// INVLPG.
pub(crate) fn invalidate_page(cpu: &mut Cpu, op: &Op, _instruction: &Instruction) -> Result {
    cpu.check_supervisor()?;
    cpu.flush_tlb_page(cpu.ea(op));
    cpu.synchronise_code();
    Ok(())
}

/// INVD, WBINVD: caches are coherent here.
pub(crate) fn cache(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    cpu.check_supervisor()
}

/// CLFLUSH: only its address is checked.
pub(crate) fn flush_line(cpu: &mut Cpu, op: &Op, _instruction: &Instruction) -> Result {
    cpu.read::<u8>(op).map(drop)
}

/// MFENCE, LFENCE, SFENCE.
pub(crate) fn fence(_cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// PAUSE. Who spins for long gives the host's processor away: the one that is waited for may have
/// none.
pub(crate) fn pause(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    const SPINS: u32 = 512;
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(SPINS) {
        std::thread::yield_now();
    }
    std::hint::spin_loop();
    if cpu.mailbox.has_events() {
        cpu.budget = 0;
    }
    Ok(())
}

/// HLT.
pub(crate) fn halt(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    cpu.check_supervisor()?;
    cpu.activity = Activity::Halted;
    cpu.budget = 0;
    Ok(())
}

/// CLI, STI.
pub(crate) fn interrupt_flag(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    cpu.check_iopl()?;
    if instruction.mnemonic() == Mnemonic::Cli {
        cpu.system_flags &= !IF;
        return Ok(());
    }
    if cpu.system_flags & IF == 0 {
        cpu.system_flags |= IF;
        cpu.begin_shadow();
    }
    Ok(())
}

/// PUSHF.
pub(crate) fn push_flags(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    check_v86(cpu)?;
    let size = instruction.stack_pointer_increment().unsigned_abs().into();
    let value = cpu.rflags() & !(flags::RF | VM);
    cpu.push(size, value)
}

/// POPF.
pub(crate) fn pop_flags(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    check_v86(cpu)?;
    let size = instruction.stack_pointer_increment().unsigned_abs().into();
    let (value, rsp) = cpu.peek(0, size)?;
    let mut kept = flags::VIF | flags::VIP | VM | flags::RF | !flags::ALL;
    if size == 2 {
        kept |= !0xffff;
    }
    if cpu.cr0 & CR0_PE != 0 {
        if cpu.cpl > 0 {
            kept |= IOPL;
        }
        if u64::from(cpu.cpl) > (cpu.system_flags & IOPL) >> 12 {
            kept |= IF;
        }
    }
    cpu.set_stack_pointer(rsp);
    let merged = cpu.rflags() & kept | value & !kept;
    cpu.set_rflags(merged & !flags::RF);
    Ok(())
}

fn check_v86(cpu: &mut Cpu) -> Result {
    if cpu.system_flags & VM != 0 && cpu.system_flags & IOPL != IOPL {
        return Err(cpu.general_protection(0));
    }
    Ok(())
}

/// CPUID.
pub(crate) fn cpuid(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    let (leaf, subleaf) = (cpu.slot(slot::RAX) as u32, cpu.slot(slot::RCX) as u32);
    let [eax, ebx, ecx, edx] = cpu
        .config
        .baseline
        .cpuid(leaf, subleaf, cpu.cpuid_context());
    cpu.set_reg(slot::RAX, eax);
    cpu.set_reg(slot::RBX, ebx);
    cpu.set_reg(slot::RCX, ecx);
    cpu.set_reg(slot::RDX, edx);
    cpu.synchronise_code();
    Ok(())
}

/// RDTSC, RDTSCP.
pub(crate) fn time_stamp(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    if cpu.cr4 & CR4_TSD != 0 && cpu.cpl != 0 {
        return Err(cpu.general_protection(0));
    }
    let tsc = cpu.tsc();
    cpu.set_reg(slot::RAX, tsc as u32);
    cpu.set_reg(slot::RDX, (tsc >> 32) as u32);
    if instruction.mnemonic() == Mnemonic::Rdtscp {
        cpu.set_reg(slot::RCX, cpu.msrs.tsc_aux as u32);
    }
    Ok(())
}

/// RDPMC: there are no counters.
pub(crate) fn performance_counter(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    Err(cpu.general_protection(0))
}

/// SWAPGS.
pub(crate) fn swap_gs(cpu: &mut Cpu, _op: &Op, _instruction: &Instruction) -> Result {
    if !cpu.is_64_bit() {
        return Err(cpu.undefined());
    }
    cpu.check_supervisor()?;
    let gs = &mut cpu.segments[crate::state::segment::GS];
    std::mem::swap(&mut gs.base, &mut cpu.msrs.kernel_gs_base);
    cpu.refresh_segment_bases();
    Ok(())
}

/// CMPXCHG8B, CMPXCHG16B.
pub(crate) fn compare_exchange_wide(cpu: &mut Cpu, op: &Op, instruction: &Instruction) -> Result {
    let at = cpu.ea(op);
    let equal = if instruction.mnemonic() == Mnemonic::Cmpxchg16b {
        cpu.check_aligned(op, 16)?;
        let old = (cpu.slot(slot::RAX), cpu.slot(slot::RDX));
        let new = (cpu.slot(slot::RBX), cpu.slot(slot::RCX));
        match cpu.compare_exchange_16(at, op.seg, (old, new))? {
            Ok(()) => true,
            Err((low, high)) => {
                cpu.set_reg(slot::RAX, low);
                cpu.set_reg(slot::RDX, high);
                false
            }
        }
    } else {
        let pair = |cpu: &Cpu, low: u8, high: u8| {
            u64::from(cpu.reg::<u32>(low)) | u64::from(cpu.reg::<u32>(high)) << 32
        };
        let old = pair(cpu, slot::RAX, slot::RDX);
        let new = pair(cpu, slot::RBX, slot::RCX);
        let found = cpu.modify_locked(at, op.seg, |found: u64| {
            (if found == old { new } else { found }, found)
        })?;
        if found != old {
            cpu.set_reg(slot::RAX, found as u32);
            cpu.set_reg(slot::RDX, (found >> 32) as u32);
        }
        found == old
    };
    cpu.flags = cpu.flags.with_zero(equal);
    Ok(())
}

/// IN, OUT.
pub(crate) fn port(cpu: &mut Cpu, _op: &Op, instruction: &Instruction) -> Result {
    let input = instruction.mnemonic() == Mnemonic::In;
    let (port, accumulator) = if input { (1, 0) } else { (0, 1) };
    let number = match instruction.op_kind(port) {
        OpKind::Register => cpu.reg::<u16>(slot::RDX),
        _ => u16::from(instruction.immediate8()),
    };
    let size = instruction.op_register(accumulator).size() as u8;
    cpu.check_port(number, size)?;
    if input {
        let value = cpu.port_read(number, size)?;
        cpu.set_reg_sized(slot::RAX, size.into(), value);
    } else {
        let value = match size {
            1 => cpu.reg::<u8>(slot::RAX).zero_extend(),
            2 => cpu.reg::<u16>(slot::RAX).zero_extend(),
            _ => cpu.reg::<u32>(slot::RAX).zero_extend(),
        };
        cpu.port_write(number, size, value as u32)?;
    }
    Ok(())
}

impl Cpu {
    /// #GP(0) unless the ports may be used: by IOPL, or by the task's permission map.
    pub(crate) fn check_port(&mut self, port: u16, size: u8) -> Result {
        let iopl = (self.system_flags & IOPL) >> 12;
        let allowed =
            self.cr0 & CR0_PE == 0 || self.system_flags & VM == 0 && u64::from(self.cpl) <= iopl;
        if allowed {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        if self.tr.unusable || self.tr.access & 0xd != 9 || limit < 103 {
            return Err(self.general_protection(0));
        }
        let map = u64::from(self.load_system::<u16>(self.tr.base.wrapping_add(102))?);
        let at = map + u64::from(port / 8);
        if at + 1 > limit {
            return Err(self.general_protection(0));
        }
        let bits = self.load_system::<u16>(self.tr.base.wrapping_add(at))?;
        let mask = (1u16 << size) - 1;
        if bits >> (port & 7) & mask != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }
}
