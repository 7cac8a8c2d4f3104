//! What follows from the control registers and CS: mode, privilege, segment bases; and reset.

use super::Cpu;
use super::control::{CR0_CD, CR0_ET, CR0_NW, CR0_PE};
use crate::decode::Mode;
use crate::exec::flags::{Flags, VM};
use crate::exec::op::slot;
use crate::exec::segment::access;
use crate::exec::system::{DR6_FIXED, DR7_FIXED};
use crate::float::{FloatState, XCR0_LEGACY, XSAVE_X87};
use crate::state::{Activity, DescriptorTable, Msrs, Segment, segment};

/// PAT after power-up.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// What RDX holds after a reset: family, model and stepping.
const SIGNATURE_LEAF: u32 = 1;

impl Cpu {
    /// The state after power-up.
    pub(super) fn reset(&mut self) {
        self.float = FloatState::power_up();
        self.xcr0 = if self.config.baseline.has("xsave") {
            XSAVE_X87
        } else {
            XCR0_LEGACY
        };
        self.msrs = Msrs {
            pat: PAT_RESET,
            ..Msrs::default()
        };
        self.cr0 = 0;
        self.reset_for_init();
        self.activity = if self.config.id == 0 {
            Activity::Running
        } else {
            Activity::WaitForSipi
        };
        self.apic_changed();
    }

    /// The state after INIT (SDM vol. 3, table 10-1).
    pub(super) fn reset_for_init(&mut self) {
        self.regs = [0; 32];
        let context = crate::cpuid::CpuidContext {
            apic_id: self.config.id,
            cpus: self.config.cpus,
            apic_enabled: true,
            osxsave: false,
            xcr0: self.xcr0,
            tsc_khz: self.config.clock.tsc_khz(),
        };
        let signature = self.config.baseline.cpuid(SIGNATURE_LEAF, 0, context)[0];
        self.set_reg(slot::RDX, signature);
        self.flags = Flags::from_rflags(0);
        self.system_flags = 0;
        self.shadow = false;
        self.shadow_at = super::NOWHERE;
        self.nmi_pending = false;
        self.nmi_masked = false;
        // Caching is what it was; nothing else is.
        self.cr0 = CR0_ET | self.cr0 & (CR0_CD | CR0_NW);
        (self.cr2, self.cr3, self.cr4) = (0, 0, 0);
        self.msrs.efer = 0;
        self.dr = [0; 4];
        (self.dr6, self.dr7) = (DR6_FIXED, DR7_FIXED);
        self.watch = super::debug::Watch::default();
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            access: 0x93,
            unusable: false,
        };
        self.segments = [data; 6];
        self.segments[segment::CS] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            access: 0x9b,
            ..data
        };
        self.ldtr = Segment {
            access: 0x82,
            ..data
        };
        self.tr = Segment {
            access: 0x8b,
            ..data
        };
        self.gdtr = DescriptorTable {
            base: 0,
            limit: 0xffff,
        };
        self.idtr = self.gdtr;
        self.rip = 0xfff0;
        self.cpl = 0;
        self.replay.clear();
        self.flush_tlb();
        self.refresh_mode();
        self.budget = 0;
    }

    /// A start-up IPI arrives.
    pub(super) fn start_up(&mut self, vector: u8) {
        if self.activity != Activity::WaitForSipi {
            return;
        }
        self.activity = Activity::Running;
        let selector = u16::from(vector) << 8;
        self.segments[segment::CS].selector = selector;
        self.segments[segment::CS].base = u64::from(selector) << 4;
        self.rip = 0;
        self.refresh_mode();
    }

    /// Executing 64-bit code?
    #[inline(always)]
    pub(crate) fn is_64_bit(&self) -> bool {
        self.mode == Mode::Bits64
    }

    /// The linear address of the next instruction.
    #[inline(always)]
    pub(crate) fn linear_rip(&self) -> u64 {
        let linear = self.rip.wrapping_add(self.slot(slot::CS));
        if self.is_64_bit() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Enters a code segment at privilege `cpl`.
    pub(crate) fn set_code_segment(&mut self, code: Segment, cpl: u8) {
        self.segments[segment::CS] = code;
        self.cpl = cpl;
        self.refresh_mode();
    }

    /// Works out again what depends on CS, CR0, EFER and the privilege.
    pub(crate) fn refresh_mode(&mut self) {
        let code = self.segments[segment::CS].access;
        let protected = self.cr0 & CR0_PE != 0;
        self.mode = if self.is_long() && code & access::LONG != 0 {
            Mode::Bits64
        } else if protected && self.system_flags & VM == 0 && code & access::BIG != 0 {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        self.tlb.set_privilege(self.privilege());
        self.blocks.set_context(self.mode, self.cpl == 3);
        self.refresh_segment_bases();
        self.refresh_watch();
    }

    /// Works out the bases that operations add.
    pub(crate) fn refresh_segment_bases(&mut self) {
        let long = self.is_64_bit();
        for (index, segment) in self.segments.iter().enumerate() {
            let flat = long && index < segment::FS;
            self.regs[usize::from(slot::SEGMENT) + index] = if flat { 0 } else { segment.base };
        }
    }

    /// Drops all translations.
    pub(crate) fn flush_tlb(&mut self) {
        self.counters.tlb_flushes += 1;
        self.tlb.flush();
        self.blocks.flush(false);
    }

    /// Drops all translations but global ones.
    pub(crate) fn flush_local_tlb(&mut self) {
        self.counters.tlb_flushes += 1;
        self.tlb.flush_local();
        self.blocks.flush(true);
    }

    /// Drops the translation of one address.
    pub(crate) fn flush_tlb_page(&mut self, address: u64) {
        self.counters.page_flushes += 1;
        self.tlb.flush_page(address);
        self.blocks.flush_page(address);
    }
}
