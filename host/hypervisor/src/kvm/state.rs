//! The architectural state of a processor, to and from the kernel.

use std::io;

use dunlin_x86::kvmclock::{ClockReading, MSR_SYSTEM_TIME, MSR_WALL_CLOCK, host_tsc};
use dunlin_x86::lapic::MSR_TSC_DEADLINE;
use dunlin_x86::state::{Activity, CpuState, LocalApicState, Msrs, PendingEvents};
use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET,
    Msrs as MsrBatch, kvm_clock_data, kvm_debugregs, kvm_device_attr, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry,
};

use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::convert::{
    XCR0_LEGACY, XSAVE_BYTES, XSAVE_LEGACY, from_kvm_segment, from_kvm_table, from_kvm_xsave,
    level_vectors, registers, segments, to_kvm_events, to_kvm_regs, to_kvm_sregs, to_kvm_xcrs,
    to_kvm_xsave,
};
use super::vcpu::{GuestClocks, KvmVcpu};
use super::{host_error, lock};
use crate::EngineError;

const MSR_TSC: u32 = 0x10;

ioctl_iow_nr!(
    KVM_SET_DEVICE_ATTR,
    kvm_bindings::KVMIO,
    0xe1,
    kvm_device_attr
);

/// The model-specific registers of a state: number and place.
type MsrPlace = (u32, fn(&mut Msrs) -> &mut u64);
const MSRS: [MsrPlace; 16] = [
    (0xc000_0081, |m| &mut m.star),
    (0xc000_0082, |m| &mut m.lstar),
    (0xc000_0083, |m| &mut m.cstar),
    (0xc000_0084, |m| &mut m.sfmask),
    (0xc000_0102, |m| &mut m.kernel_gs_base),
    (0x174, |m| &mut m.sysenter_cs),
    (0x175, |m| &mut m.sysenter_esp),
    (0x176, |m| &mut m.sysenter_eip),
    (0x277, |m| &mut m.pat),
    (0x1a0, |m| &mut m.misc_enable),
    (0xc000_0103, |m| &mut m.tsc_aux),
    (0x3b, |m| &mut m.tsc_adjust),
    (0x2ff, |m| &mut m.mtrr_def_type),
    (MSR_SYSTEM_TIME, |m| &mut m.kvmclock_system_time),
    (MSR_WALL_CLOCK, |m| &mut m.kvmclock_wall_clock),
    // EFER is the kernel's with the system registers; it is last so that it can be left out.
    (0xc000_0080, |m| &mut m.efer),
];

impl KvmVcpu {
    /// Notes which model-specific registers the kernel can read.
    pub(super) fn find_known_msrs(&mut self) {
        self.known_msrs = MSRS
            .iter()
            .map(|(index, _)| *index)
            .filter(|index| self.read_msr(*index).is_ok())
            .collect();
    }

    fn read_msr(&self, index: u32) -> Result<u64, EngineError> {
        let failed = host_error::<io::Error>("read a model-specific register");
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut batch = MsrBatch::from_entries(&[entry])
            .map_err(|error| failed(io::Error::other(format!("{error:?}"))))?;
        let read = self
            .fd
            .get_msrs(&mut batch)
            .map_err(host_error("read a model-specific register"))?;
        match (read, batch.as_slice()) {
            (1, [entry]) => Ok(entry.data),
            _ => Err(failed(io::Error::other(format!("no register {index:#x}")))),
        }
    }

    /// Reads many at once: each call is a visit to the processor.
    fn read_known_msrs(&self) -> Result<Msrs, EngineError> {
        let failed = host_error::<io::Error>("read model-specific registers");
        let known = MSRS
            .iter()
            .filter(|(index, _)| self.known_msrs.contains(index));
        let entries: Vec<_> = known
            .clone()
            .map(|(index, _)| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut batch = MsrBatch::from_entries(&entries)
            .map_err(|error| failed(io::Error::other(format!("{error:?}"))))?;
        let read = self
            .fd
            .get_msrs(&mut batch)
            .map_err(host_error("read model-specific registers"))?;
        let mut msrs = Msrs::default();
        for ((index, place), entry) in known.zip(batch.as_slice()) {
            if entry.index != *index || read != entries.len() {
                let reason = format!("only {read} of {}", entries.len());
                return Err(failed(io::Error::other(reason)));
            }
            *place(&mut msrs) = entry.data;
        }
        Ok(msrs)
    }

    /// Writes many at once. The kernel stops at the first that it refuses.
    fn write_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), EngineError> {
        let batch = MsrBatch::from_entries(entries).map_err(|error| {
            host_error("write model-specific registers")(io::Error::other(format!("{error:?}")))
        })?;
        let written = self
            .fd
            .set_msrs(&batch)
            .map_err(host_error("write model-specific registers"))?;
        match entries.get(written) {
            None => Ok(()),
            Some(kvm_msr_entry { index, data, .. }) => Err(self.invalid(format!(
                "register {index:#x} cannot be {data:#x} on this host"
            ))),
        }
    }

    fn write_msr(&self, index: u32, value: u64) -> Result<(), EngineError> {
        let entry = kvm_msr_entry {
            index,
            data: value,
            ..Default::default()
        };
        self.write_msrs(&[entry])
    }

    fn invalid(&self, reason: String) -> EngineError {
        EngineError::InvalidState {
            vcpu: self.id.0,
            reason,
        }
    }

    /// Turns a refusal into "invalid state", another error into a failure of the host.
    fn refused(
        &self,
        what: &'static str,
        action: &'static str,
    ) -> impl Fn(kvm_ioctls::Error) -> EngineError {
        let vcpu = self.id.0;
        move |errno| match errno.errno() {
            libc::EINVAL => EngineError::InvalidState {
                vcpu,
                reason: format!("the host's kernel refuses {what}"),
            },
            _ => host_error(action)(errno),
        }
    }

    pub(super) fn read_state(&self) -> Result<CpuState, EngineError> {
        let failed = |action| host_error::<kvm_ioctls::Error>(action);
        // First: it brings INIT and SIPI that wait into effect.
        let activity = match self
            .fd
            .get_mp_state()
            .map_err(failed("read whether a vCPU runs"))?
            .mp_state
        {
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        };
        let events = self
            .fd
            .get_vcpu_events()
            .map_err(failed("read pending events"))?;
        let regs = self.fd.get_regs().map_err(failed("read registers"))?;
        let sregs = self
            .fd
            .get_sregs()
            .map_err(failed("read system registers"))?;
        let debug = self
            .fd
            .get_debug_regs()
            .map_err(failed("read debug registers"))?;
        let xcrs = self.fd.get_xcrs().map_err(failed("read XCR0"))?;
        let xsave = self.fd.get_xsave().map_err(failed("read the FPU"))?;
        let lapic = self.fd.get_lapic().map_err(failed("read the local APIC"))?;
        let mut msrs = self.read_known_msrs()?;
        if let Some(GuestClocks { system_time, wall }) = self.pending_clocks {
            msrs.kvmclock_system_time = system_time;
            msrs.kvmclock_wall_clock = wall;
        }
        let xcr0 = match xcrs.xcrs.first() {
            Some(first) if xcrs.nr_xcrs > 0 && self.has_xsave => first.value,
            _ => XCR0_LEGACY,
        };
        let clock = self.read_clock(msrs.tsc_adjust)?;
        Ok(CpuState {
            gpr: registers(&regs),
            rip: regs.rip,
            rflags: regs.rflags,
            segments: segments(&sregs),
            tr: from_kvm_segment(&sregs.tr),
            ldtr: from_kvm_segment(&sregs.ldt),
            gdtr: from_kvm_table(&sregs.gdt),
            idtr: from_kvm_table(&sregs.idt),
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            cr8: sregs.cr8,
            dr: debug.db,
            dr6: debug.dr6,
            dr7: debug.dr7,
            xcr0,
            xsave: from_kvm_xsave(&xsave, xcr0),
            msrs,
            tsc: clock.tsc,
            tsc_khz: clock.tsc_khz,
            realtime_ns: clock.realtime_ns,
            kvmclock_ns: clock.kvmclock_ns,
            apic: LocalApicState {
                base: sregs.apic_base,
                registers: Box::new(lapic.regs.map(|byte| byte as u8)),
                tsc_deadline: self.read_msr(MSR_TSC_DEADLINE)?,
            },
            events: PendingEvents {
                injected_interrupt: (events.interrupt.injected != 0 && events.interrupt.soft == 0)
                    .then_some(events.interrupt.nr),
                // An exception or software interrupt that was being delivered comes again when
                // its instruction is executed again; an NMI does not.
                nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
                nmi_masked: events.nmi.masked != 0 && events.nmi.injected == 0,
                interrupt_shadow: events.interrupt.shadow != 0,
            },
            activity,
        })
    }

    pub(super) fn write_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.check(state)?;
        self.pending_clocks = Some(GuestClocks {
            system_time: state.msrs.kvmclock_system_time,
            wall: state.msrs.kvmclock_wall_clock,
        });
        let failed = |what, action| self.refused(what, action);
        if self.has_xsave {
            self.fd
                .set_xcrs(&to_kvm_xcrs(state.xcr0))
                .map_err(failed("XCR0", "write XCR0"))?;
        }
        let xsave = to_kvm_xsave(&state.xsave);
        // SAFETY: the area is the 4096 bytes that KVM_SET_XSAVE reads; dynamically enabled
        // features, which would make it read more, are in no baseline and so not enabled.
        #[expect(unsafe_code, reason = "the kernel could read beyond the structure")]
        unsafe { self.fd.set_xsave(&xsave) }.map_err(failed("the FPU", "write the FPU"))?;
        let sregs = to_kvm_sregs(state);
        self.fd
            .set_sregs(&sregs)
            .map_err(failed("the system registers", "write the system registers"))?;
        self.fd
            .set_regs(&to_kvm_regs(state))
            .map_err(failed("the registers", "write the registers"))?;
        self.fd
            .set_debug_regs(&kvm_debugregs {
                db: state.dr,
                dr6: state.dr6,
                dr7: state.dr7,
                ..Default::default()
            })
            .map_err(failed("the debug registers", "write the debug registers"))?;
        self.write_clock(state)?;
        let mut msrs = state.msrs;
        let mut entries = Vec::with_capacity(MSRS.len());
        for (index, place) in &MSRS[..MSRS.len() - 1] {
            let is_clock = matches!(*index, MSR_SYSTEM_TIME | MSR_WALL_CLOCK);
            if self.known_msrs.contains(index) && !is_clock {
                entries.push(kvm_msr_entry {
                    index: *index,
                    data: *place(&mut msrs),
                    ..Default::default()
                });
            }
        }
        self.write_msrs(&entries)?;
        let lapic = kvm_lapic_state {
            regs: state.apic.registers.map(|byte| byte as i8),
        };
        self.fd
            .set_lapic(&lapic)
            .map_err(failed("the local APIC", "write the local APIC"))?;
        self.write_msr(MSR_TSC_DEADLINE, state.apic.tsc_deadline)?;
        for vector in level_vectors(&state.apic) {
            self.interrupts.expect_end(self.id.0, vector);
        }
        let mp_state = match state.activity {
            Activity::Running => KVM_MP_STATE_RUNNABLE,
            Activity::Halted => KVM_MP_STATE_HALTED,
            Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        };
        self.fd
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(failed("the activity", "write whether a vCPU runs"))?;
        self.fd
            .set_vcpu_events(&to_kvm_events(state))
            .map_err(failed("the pending events", "write pending events"))
    }

    /// Tells the kernel where the guest's clocks lie, if a state was restored since the last run.
    /// It writes them into guest memory, which may be another process's before that.
    pub(super) fn place_clocks(&mut self) -> Result<(), EngineError> {
        let Some(GuestClocks { system_time, wall }) = self.pending_clocks.take() else {
            return Ok(());
        };
        for (index, place) in [(MSR_SYSTEM_TIME, system_time), (MSR_WALL_CLOCK, wall)] {
            if !self.known_msrs.contains(&index) {
                continue;
            }
            self.write_msr(index, place)?;
            // Behind the dirty log.
            let memory = &self.shared.memory;
            if let Some(page) = memory.page_of(place & !1) {
                memory.dirty_log().mark(page);
            }
        }
        Ok(())
    }

    /// What the kernel would not check, or only after other things were changed.
    fn check(&self, state: &CpuState) -> Result<(), EngineError> {
        let id = u32::from_le_bytes([0, 1, 2, 3].map(|byte| state.apic.registers[0x20 + byte]));
        let x2apic = state.apic.base & dunlin_x86::lapic::BASE_X2APIC != 0;
        let id = if x2apic { id } else { id >> 24 };
        if id != self.id.0 {
            return Err(self.invalid(format!("its local APIC has ID {id}")));
        }
        if !(XSAVE_LEGACY..=XSAVE_BYTES).contains(&state.xsave.len()) {
            return Err(self.invalid(format!("its XSAVE area has {} bytes", state.xsave.len())));
        }
        Ok(())
    }

    fn read_clock(&self, tsc_adjust: u64) -> Result<ClockReading, EngineError> {
        let clock = &self.shared.clock;
        let kernel = self
            .shared
            .vm
            .get_clock()
            .map_err(host_error("read the paravirtual clock"))?;
        let exact = KVM_CLOCK_HOST_TSC | KVM_CLOCK_REALTIME;
        if clock.tsc_khz() == self.host_khz() && kernel.flags & exact == exact {
            return Ok(ClockReading {
                tsc: clock.tsc_at(kernel.host_tsc).wrapping_add(tsc_adjust),
                tsc_khz: clock.tsc_khz(),
                kvmclock_ns: kernel.clock,
                realtime_ns: kernel.realtime,
            });
        }
        // One after the other: the clocks are off by the time that the calls take.
        Ok(ClockReading {
            tsc: self.read_msr(MSR_TSC)?,
            tsc_khz: clock.tsc_khz(),
            kvmclock_ns: kernel.clock,
            realtime_ns: clock.read().realtime_ns,
        })
    }

    fn write_clock(&self, state: &CpuState) -> Result<(), EngineError> {
        let clock = &self.shared.clock;
        clock
            .resume(&ClockReading {
                tsc: state.tsc.wrapping_sub(state.msrs.tsc_adjust),
                tsc_khz: state.tsc_khz,
                kvmclock_ns: state.kvmclock_ns,
                realtime_ns: state.realtime_ns,
            })
            .map_err(|error| self.invalid(error.to_string()))?;
        self.set_tsc(state.msrs.tsc_adjust)?;
        let mut resumed = lock(&self.shared.kvmclock_resumed);
        let kernel = self
            .shared
            .vm
            .get_clock()
            .map_err(host_error("read the paravirtual clock"))?;
        let now = clock.kvmclock_ns(clock.tsc());
        if !*resumed || kernel.clock.abs_diff(now) > 1_000_000_000 {
            let data = kvm_clock_data {
                clock: clock.kvmclock_ns(clock.tsc()),
                ..Default::default()
            };
            self.shared
                .vm
                .set_clock(&data)
                .map_err(host_error("write the paravirtual clock"))?;
            *resumed = true;
        }
        Ok(())
    }

    fn host_khz(&self) -> u64 {
        crate::soft::host_tsc_khz()
    }

    /// Puts the processor's counter on the VM's clock, `adjust` ahead of it.
    pub(super) fn set_tsc(&self, adjust: u64) -> Result<(), EngineError> {
        let clock = &self.shared.clock;
        let khz = clock.tsc_khz();
        if khz != u64::from(self.fd.get_tsc_khz().unwrap_or(0)) {
            let khz = u32::try_from(khz).unwrap_or(u32::MAX);
            self.fd.set_tsc_khz(khz).map_err(|_errno| {
                self.invalid(format!(
                    "its TSC runs at {khz} kHz, and this host cannot scale it from {} kHz",
                    self.host_khz()
                ))
            })?;
        }
        if khz == self.host_khz() {
            let host = host_tsc();
            let offset = clock.tsc_at(host).wrapping_sub(host).wrapping_add(adjust);
            let attribute = kvm_device_attr {
                group: KVM_VCPU_TSC_CTRL,
                attr: KVM_VCPU_TSC_OFFSET.into(),
                addr: &raw const offset as u64,
                ..Default::default()
            };
            // Older kernels have no such attribute; they synchronise counters by themselves.
            // SAFETY: the kernel reads the attribute and the eight bytes that it points to; both
            // live until the call returns.
            #[expect(unsafe_code, reason = "kvm-ioctls lacks a vCPU's attributes on x86")]
            let result = unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &attribute) };
            if result == 0 {
                return Ok(());
            }
        }
        self.write_msr(MSR_TSC, clock.tsc().wrapping_add(adjust))
    }
}
