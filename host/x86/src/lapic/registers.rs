//! Access to the registers: by MMIO offset (xAPIC) and by MSR (x2APIC).

use super::timer::Mode;
use super::{
    ESR_REGISTER_ILLEGAL, GeneralProtection, LVT_MASKED, LocalApic, MSR_APIC_BASE,
    MSR_TSC_DEADLINE, MSR_X2APIC, SVR_ENABLE, SVR_NO_EOI_BROADCAST, Trigger, lvt,
};

/// Offsets in the register page (SDM vol. 3, table 11-1).
pub(super) mod offset {
    pub(in super::super) const ID: u32 = 0x20;
    pub(in super::super) const VERSION: u32 = 0x30;
    pub(in super::super) const TPR: u32 = 0x80;
    pub(in super::super) const APR: u32 = 0x90;
    pub(in super::super) const PPR: u32 = 0xa0;
    pub(in super::super) const EOI: u32 = 0xb0;
    pub(in super::super) const LDR: u32 = 0xd0;
    pub(in super::super) const DFR: u32 = 0xe0;
    pub(in super::super) const SVR: u32 = 0xf0;
    pub(in super::super) const ISR: u32 = 0x100;
    pub(in super::super) const TMR: u32 = 0x180;
    pub(in super::super) const IRR: u32 = 0x200;
    pub(in super::super) const ESR: u32 = 0x280;
    pub(in super::super) const ICR_LOW: u32 = 0x300;
    pub(in super::super) const ICR_HIGH: u32 = 0x310;
    pub(in super::super) const LVT: u32 = 0x320;
    pub(in super::super) const LVT_LAST: u32 = 0x370;
    pub(in super::super) const INITIAL_COUNT: u32 = 0x380;
    pub(in super::super) const CURRENT_COUNT: u32 = 0x390;
    pub(in super::super) const DIVIDE: u32 = 0x3e0;
    pub(in super::super) const SELF_IPI: u32 = 0x3f0;
}

/// Version 0x14, six entries in the local vector table, EOI broadcast can be suppressed.
const VERSION: u32 = 0x0105_0014;

const SVR_WRITABLE: u32 = 0xff | SVR_ENABLE | 1 << 9 | SVR_NO_EOI_BROADCAST;
/// Vector, delivery mode, destination mode, level, trigger mode, shorthand.
const ICR_WRITABLE: u32 = 0x000c_cfff;
/// Writable bits of the entries of the local vector table.
pub(super) const LVT_WRITABLE: [u32; 6] = [
    0x0007_00ff,
    0x0001_07ff,
    0x0001_07ff,
    0x0001_a7ff,
    0x0001_a7ff,
    0x0001_00ff,
];

impl LocalApic {
    /// A 32-bit load at `offset` (below 4096) of the register page. Reserved registers read 0.
    pub fn read_mmio(&mut self, offset: u32, tsc_now: u64) -> u32 {
        if offset & 0xf != 0 {
            return 0;
        }
        self.tick(tsc_now);
        match offset {
            offset::ID => self.id << 24,
            offset::DFR => self.dfr,
            offset::ICR_HIGH => (self.icr >> 32) as u32,
            _ => self.read(offset, tsc_now).unwrap_or_else(|| {
                if !matches!(offset, offset::APR | offset::EOI) {
                    self.report(ESR_REGISTER_ILLEGAL);
                }
                0
            }),
        }
    }

    /// A 32-bit store at `offset` (below 4096) of the register page. Returns the vector of a
    /// level-triggered interrupt that it ended.
    pub fn write_mmio(&mut self, offset: u32, value: u32, tsc_now: u64) -> Option<u8> {
        if offset & 0xf != 0 {
            return None;
        }
        self.tick(tsc_now);
        match offset {
            offset::EOI => return self.end_of_interrupt(),
            offset::ID | offset::VERSION | offset::PPR | offset::CURRENT_COUNT => {}
            offset::LDR => self.ldr = value & 0xff00_0000,
            offset::DFR => self.dfr = value | 0x0fff_ffff,
            offset::ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            offset::ICR_LOW => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & ICR_WRITABLE);
                self.send();
            }
            offset::SELF_IPI => self.report(ESR_REGISTER_ILLEGAL),
            _ => {
                if !self.write(offset, value, tsc_now) {
                    self.report(ESR_REGISTER_ILLEGAL);
                }
            }
        }
        self.publish();
        None
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or 0x800-0x8ff.
    ///
    /// # Errors
    /// [`GeneralProtection`] outside of x2APIC mode and for registers that cannot be read.
    pub fn read_msr(&mut self, msr: u32, tsc_now: u64) -> Result<u64, GeneralProtection> {
        match msr {
            MSR_APIC_BASE => return Ok(self.base),
            MSR_TSC_DEADLINE => {
                self.tick(tsc_now);
                return Ok(self.timer.tsc_deadline(self.lvt[lvt::TIMER]));
            }
            _ => {}
        }
        let offset = self.x2apic_offset(msr)?;
        self.tick(tsc_now);
        match offset {
            offset::ID => Ok(u64::from(self.id)),
            offset::ICR_LOW => Ok(self.icr),
            _ => self
                .read(offset, tsc_now)
                .map(u64::from)
                .ok_or(GeneralProtection),
        }
    }

    /// WRMSR to IA32_APIC_BASE, IA32_TSC_DEADLINE or 0x800-0x8ff. Returns the vector of a
    /// level-triggered interrupt that it ended.
    ///
    /// # Errors
    /// [`GeneralProtection`] outside of x2APIC mode, for reserved bits and for registers that
    /// cannot be written.
    pub fn write_msr(
        &mut self,
        msr: u32,
        value: u64,
        tsc_now: u64,
    ) -> Result<Option<u8>, GeneralProtection> {
        match msr {
            MSR_APIC_BASE => return self.set_base(value).map(|()| None),
            MSR_TSC_DEADLINE => {
                self.tick(tsc_now);
                self.timer.set_tsc_deadline(self.lvt[lvt::TIMER], value);
                self.tick(tsc_now);
                return Ok(None);
            }
            _ => {}
        }
        let offset = self.x2apic_offset(msr)?;
        self.tick(tsc_now);
        if offset == offset::ICR_LOW {
            if value as u32 & !ICR_WRITABLE != 0 {
                return Err(GeneralProtection);
            }
            self.icr = value;
            self.send();
            return Ok(None);
        }
        let Ok(value) = u32::try_from(value) else {
            return Err(GeneralProtection);
        };
        match offset {
            offset::EOI if value == 0 => return Ok(self.end_of_interrupt()),
            offset::SELF_IPI if value <= 0xff => self.accept(value as u8, Trigger::Edge),
            _ if self.reserved_bits(offset) & value != 0 => return Err(GeneralProtection),
            _ if !self.write(offset, value, tsc_now) => return Err(GeneralProtection),
            _ => {}
        }
        self.publish();
        Ok(None)
    }

    fn x2apic_offset(&self, msr: u32) -> Result<u32, GeneralProtection> {
        match msr.checked_sub(MSR_X2APIC) {
            Some(index @ 0..=0xff) if self.is_enabled() && self.is_x2apic() => Ok(index << 4),
            _ => Err(GeneralProtection),
        }
    }

    /// Bits that must be zero in an x2APIC write.
    fn reserved_bits(&self, offset: u32) -> u32 {
        match offset {
            offset::TPR => !0xff,
            offset::SVR => !SVR_WRITABLE,
            offset::ESR => u32::MAX,
            offset::DIVIDE => !0b1011,
            offset::LVT..=offset::LVT_LAST => {
                // The delivery status may be written back as it was read.
                !(LVT_WRITABLE[lvt_index(offset)] | 1 << 12)
            }
            offset::EOI | offset::SELF_IPI => u32::MAX,
            _ => 0,
        }
    }

    /// Registers that read the same in both modes; `None` for those that do not exist.
    pub(super) fn read(&self, offset: u32, tsc_now: u64) -> Option<u32> {
        let word = |base: u32| ((offset - base) >> 4) as usize;
        Some(match offset {
            offset::VERSION => VERSION,
            offset::TPR => u32::from(self.tpr),
            offset::PPR => u32::from(self.ppr()),
            offset::LDR => self.logical_id(),
            offset::SVR => self.svr,
            0x100..=0x170 => self.isr[word(offset::ISR)],
            0x180..=0x1f0 => self.tmr[word(offset::TMR)],
            0x200..=0x270 => self.irr[word(offset::IRR)],
            offset::ESR => self.esr,
            offset::ICR_LOW => self.icr as u32,
            offset::LVT..=offset::LVT_LAST => self.lvt[lvt_index(offset)],
            offset::INITIAL_COUNT => self.timer.initial(),
            offset::CURRENT_COUNT => self.timer.current(self.lvt[lvt::TIMER], tsc_now),
            offset::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Registers that are written the same in both modes; false for those that cannot be.
    fn write(&mut self, offset: u32, value: u32, tsc_now: u64) -> bool {
        match offset {
            offset::TPR => self.tpr = value as u8,
            offset::SVR => {
                self.svr = value & SVR_WRITABLE;
                if value & SVR_ENABLE == 0 {
                    for entry in &mut self.lvt {
                        *entry |= LVT_MASKED;
                    }
                }
            }
            offset::ESR => self.esr = std::mem::take(&mut self.errors),
            offset::LVT..=offset::LVT_LAST => self.write_lvt(lvt_index(offset), value),
            offset::INITIAL_COUNT => self.timer.start(self.lvt[lvt::TIMER], value, tsc_now),
            offset::DIVIDE => self.timer.set_divide(self.lvt[lvt::TIMER], value, tsc_now),
            _ => return false,
        }
        true
    }

    fn write_lvt(&mut self, index: usize, value: u32) {
        let mut value = value & LVT_WRITABLE[index];
        if self.svr & SVR_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        if index == lvt::TIMER {
            if Mode::of(value) == Mode::Reserved {
                return;
            }
            self.timer.change_mode(self.lvt[index], value);
        }
        self.lvt[index] = value;
    }
}

fn lvt_index(offset: u32) -> usize {
    ((offset - offset::LVT) >> 4) as usize & 7
}
