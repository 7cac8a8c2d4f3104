//! To and from the architectural state.

use super::control::{
    CR0_ALL, CR0_CD, CR0_ET, CR0_NW, CR0_PE, CR0_PG, CR4_PAE, EFER_ALL, EFER_LMA, EFER_LME,
};
use super::{Cpu, StateError};
use crate::cpuid::PHYSICAL_BITS;
use crate::exec::flags::{self, Flags, VM};
use crate::exec::msr::is_pat;
use crate::exec::op::slot;
use crate::exec::segment::{access, dpl};
use crate::exec::system::{DR6_FIXED, DR7_FIXED};
use crate::float::{FloatState, XCR0_LEGACY, XSAVE_AVX, XSAVE_SSE, XSAVE_X87};
use crate::kvmclock::ClockReading;
use crate::mmu::is_canonical;
use crate::state::{Activity, CpuState, Msrs, PendingEvents, Segment, segment};

impl Cpu {
    /// The architectural state, at an instruction border. What others have posted to this
    /// processor by now is in it.
    pub fn state(&mut self) -> CpuState {
        if self.mailbox.has_events() && self.take_mail().is_some() {
            // A kick is for the engine, not part of the state.
            self.mailbox.kick();
        }
        let reading = self.config.clock.read();
        let tsc = reading.tsc.wrapping_add(self.tsc_offset);
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.regs[..16]);
        CpuState {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            segments: self.segments,
            tr: self.tr,
            ldtr: self.ldtr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.apic.cr8(),
            dr: self.dr,
            dr6: self.dr6,
            dr7: self.dr7,
            xcr0: self.xcr0,
            xsave: self.float.to_xsave(self.xcr0),
            msrs: Msrs {
                kvmclock_system_time: self.kvmclock.system_time_msr(),
                kvmclock_wall_clock: self.kvmclock.wall_clock_msr(),
                ..self.msrs
            },
            tsc,
            tsc_khz: reading.tsc_khz,
            realtime_ns: reading.realtime_ns,
            kvmclock_ns: reading.kvmclock_ns,
            apic: self.apic.state(tsc),
            events: PendingEvents {
                injected_interrupt: None,
                nmi_pending: self.nmi_pending,
                nmi_masked: self.nmi_masked,
                interrupt_shadow: self.shadow || self.shadow_at == self.rip,
            },
            activity: self.activity,
        }
    }

    /// Replaces the architectural state.
    ///
    /// The VM's clock goes on from the saved moment, so that the guest's TSC is the saved one and
    /// the real time that has passed since.
    ///
    /// # Errors
    /// [`StateError`] for a state that no processor can be in; nothing has changed then.
    pub fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        check(state)?;
        self.check_xsave(state)?;
        let float = FloatState::from_xsave(&state.xsave, self.config.baseline.xcr0())?;
        let clock = &self.config.clock;
        let before = clock.read();
        let offset = state.msrs.tsc_adjust;
        clock.resume(&ClockReading {
            tsc: state.tsc.wrapping_sub(offset),
            tsc_khz: state.tsc_khz,
            kvmclock_ns: state.kvmclock_ns,
            realtime_ns: state.realtime_ns,
        })?;
        self.apic.set_tsc_khz(state.tsc_khz);
        let now = clock.tsc().wrapping_add(offset);
        if let Err(refused) = self.apic.set_state(&state.apic, now) {
            self.apic.set_tsc_khz(before.tsc_khz);
            clock.resume(&before)?;
            return Err(refused.into());
        }
        self.tsc_offset = offset;
        self.float = float;
        self.regs = [0; 32];
        self.regs[..16].copy_from_slice(&state.gpr);
        self.regs[usize::from(slot::ZERO)] = 0;
        self.rip = state.rip;
        self.flags = Flags::from_rflags(state.rflags);
        self.system_flags = state.rflags & flags::ALL & !flags::ARITHMETIC;
        self.segments = state.segments;
        self.tr = state.tr;
        self.ldtr = state.ldtr;
        self.gdtr = state.gdtr;
        self.idtr = state.idtr;
        self.cr0 = state.cr0 | CR0_ET;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.xcr0 = if self.config.baseline.has("xsave") {
            state.xcr0
        } else {
            XCR0_LEGACY
        };
        self.dr = state.dr;
        self.dr6 = state.dr6 & 0xe00f | DR6_FIXED;
        self.dr7 = state.dr7 & 0xffff_2bff | DR7_FIXED;
        self.msrs = state.msrs;
        self.nmi_pending = state.events.nmi_pending;
        self.nmi_masked = state.events.nmi_masked;
        self.shadow = state.events.interrupt_shadow;
        self.shadow_at = super::NOWHERE;
        self.activity = state.activity;
        self.ended = None;
        self.watch = super::debug::Watch::default();
        self.replay.clear();
        self.cpl = privilege(state);
        let clocks = (
            state.msrs.kvmclock_system_time,
            state.msrs.kvmclock_wall_clock,
        );
        self.kvmclock.restore(clocks);
        let pae = self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && !self.is_long();
        if pae && !self.load_pdptes(self.cr3) {
            // As a load of CR3 would have faulted; the first access does.
            self.pdpte = [0; 4];
        }
        if let Some(vector) = state.events.injected_interrupt {
            // It was taken out of the local APIC but not delivered: it is requested again.
            self.apic.request_again(vector);
        }
        self.flush_tlb();
        self.refresh_mode();
        self.apic_changed();
        Ok(())
    }

    /// What depends on whether the baseline has XSAVE: CR4 and XCR0.
    fn check_xsave(&self, state: &CpuState) -> Result<(), StateError> {
        let refuse = |register, value| Err(StateError::Register { register, value });
        if state.cr4 & !self.cr4_offered() != 0 {
            return refuse("CR4", state.cr4);
        }
        if !is_xcr0(state.xcr0, self.config.baseline.xcr0()) {
            return refuse("XCR0", state.xcr0);
        }
        Ok(())
    }
}

/// Can XCR0 have the value where only the components in `offered` exist (SDM vol. 1, 13.3)?
pub(crate) fn is_xcr0(value: u64, offered: u64) -> bool {
    let avx_without_sse = value & (XSAVE_AVX | XSAVE_SSE) == XSAVE_AVX;
    value & !offered == 0 && value & XSAVE_X87 != 0 && !avx_without_sse
}

fn privilege(state: &CpuState) -> u8 {
    if state.cr0 & CR0_PE == 0 {
        return 0;
    }
    if state.rflags & VM != 0 {
        return 3;
    }
    dpl(state.segments[segment::SS].access)
}

/// Can a processor be in the state?
fn check(state: &CpuState) -> Result<(), StateError> {
    let refuse = |register, value| Err(StateError::Register { register, value });
    if state.cr0 & !CR0_ALL != 0 {
        return refuse("CR0", state.cr0);
    }
    if state.cr3 >> PHYSICAL_BITS != 0 {
        return refuse("CR3", state.cr3);
    }
    if state.cr8 > 15 {
        return refuse("CR8", state.cr8);
    }
    if state.msrs.efer & !EFER_ALL != 0 {
        return refuse("EFER", state.msrs.efer);
    }
    if state.rflags & !(flags::ALL | 2) != 0 {
        return refuse("RFLAGS", state.rflags);
    }
    if !is_pat(state.msrs.pat) {
        return refuse("PAT", state.msrs.pat);
    }
    let canonical = [
        ("GDTR", state.gdtr.base),
        ("IDTR", state.idtr.base),
        ("TR", state.tr.base),
        ("LDTR", state.ldtr.base),
        ("FS", state.segments[segment::FS].base),
        ("GS", state.segments[segment::GS].base),
        ("LSTAR", state.msrs.lstar),
        ("CSTAR", state.msrs.cstar),
        ("KERNEL_GS_BASE", state.msrs.kernel_gs_base),
        ("SYSENTER_ESP", state.msrs.sysenter_esp),
        ("SYSENTER_EIP", state.msrs.sysenter_eip),
    ];
    for (register, value) in canonical {
        if !is_canonical(value) {
            return refuse(register, value);
        }
    }
    check_mode(state)?;
    for (register, segment) in ["ES", "CS", "SS", "DS"].into_iter().zip(&state.segments) {
        if segment.base > u64::from(u32::MAX) {
            return refuse(register, segment.base);
        }
    }
    if state.activity == Activity::WaitForSipi && state.cr0 & CR0_PG != 0 {
        return Err(StateError::Inconsistent(
            "waiting for a start-up IPI with paging on",
        ));
    }
    Ok(())
}

fn check_mode(state: &CpuState) -> Result<(), StateError> {
    let (paging, protected) = (state.cr0 & CR0_PG != 0, state.cr0 & CR0_PE != 0);
    let (enabled, active) = (
        state.msrs.efer & EFER_LME != 0,
        state.msrs.efer & EFER_LMA != 0,
    );
    let code = state.segments[segment::CS];
    let inconsistent = |what| Err(StateError::Inconsistent(what));
    if paging && !protected {
        return inconsistent("paging without protection");
    }
    if state.cr0 & (CR0_CD | CR0_NW) == CR0_NW {
        return inconsistent("write-through without caches disabled");
    }
    if active != (enabled && paging) {
        return inconsistent("EFER.LMA is not EFER.LME with paging");
    }
    if active && state.cr4 & CR4_PAE == 0 {
        return inconsistent("IA-32e mode without PAE");
    }
    let long = active && code.access & access::LONG != 0;
    if long && code.access & access::BIG != 0 {
        return inconsistent("CS is both 64-bit and 32-bit");
    }
    if !long && state.rip > u64::from(u32::MAX) {
        return inconsistent("RIP beyond 32 bits outside of 64-bit mode");
    }
    if state.rflags & VM != 0 && (!protected || active) {
        return inconsistent("virtual-8086 mode in real or IA-32e mode");
    }
    if protected && state.rflags & VM == 0 && !is_code(&code) {
        return inconsistent("CS is not a code segment");
    }
    Ok(())
}

fn is_code(segment: &Segment) -> bool {
    const CODE: u16 = access::S | access::CODE | access::PRESENT;
    !segment.unusable && segment.access & CODE == CODE
}
