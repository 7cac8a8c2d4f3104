//! The local APIC in software (Intel SDM vol. 3, chapter 11), in xAPIC and x2APIC mode.
//!
//! [`LocalApic`] belongs to its processor's thread. Others reach it through its [`Mailbox`], which
//! also publishes how interrupts address it; an [`InterruptRouter`] turns an interrupt command
//! into posts to mailboxes. Time enters as the guest's TSC; the timer's bus clock runs at
//! [`BUS_KHZ`].

mod mailbox;
mod registers;
mod saved;
#[cfg(test)]
mod tests;
mod timer;

use std::fmt::Debug;
use std::sync::Arc;

pub use mailbox::{Address, ExternalController, Mailbox, Posted, Trigger};
pub use saved::ApicStateError;

use timer::Timer;

/// Frequency of the bus clock that the timer divides: 1 GHz, the same as KVM's.
pub const BUS_KHZ: u64 = 1_000_000;

/// Reset value of IA32_APIC_BASE without the BSP bit: enabled, xAPIC mode, at 0xfee00000.
pub const BASE_RESET: u64 = 0xfee0_0000 | BASE_ENABLE;
/// IA32_APIC_BASE: the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: enabled.
pub const BASE_ENABLE: u64 = 1 << 11;
/// Address bits of IA32_APIC_BASE that a guest may set.
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// MSR IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// MSR IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First MSR of the x2APIC register space, which is 256 long.
pub const MSR_X2APIC: u32 = 0x800;

const SVR_ENABLE: u32 = 1 << 8;
const SVR_NO_EOI_BROADCAST: u32 = 1 << 12;
const LVT_MASKED: u32 = 1 << 16;
/// The delivery mode of an entry of the local vector table.
const LVT_MODE: u32 = 7 << 8;
const LVT_EXTERNAL: u32 = 7 << 8;

const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_REGISTER_ILLEGAL: u32 = 1 << 7;

/// Indices of `LocalApic::lvt`, in the order of the registers 0x320-0x370.
mod lvt {
    pub(super) const TIMER: usize = 0;
    pub(super) const LINT0: usize = 3;
    pub(super) const ERROR: usize = 5;
}

/// The access raises #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("general protection fault")]
pub struct GeneralProtection;

/// Carries interrupt commands to local APICs.
pub trait InterruptRouter: Debug + Send + Sync {
    /// Carries out the interrupt command that local APIC `from` was given. Bits 0-31 are those of
    /// the ICR; bits 32-63 hold the destination as a number, whatever the mode of the sender (an
    /// 8-bit physical destination 0xff arrives as all ones).
    fn send_ipi(&self, from: u32, icr: u64);
}

/// A local APIC. Made by its processor, used by its thread only.
#[derive(Debug)]
pub struct LocalApic {
    id: u32,
    base: u64,
    tpr: u8,
    svr: u32,
    /// xAPIC mode only, bits 24-31.
    ldr: u32,
    dfr: u32,
    isr: [u32; 8],
    tmr: [u32; 8],
    irr: [u32; 8],
    /// What ESR reads as.
    esr: u32,
    /// Errors since the last write of ESR.
    errors: u32,
    icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    timer: Timer,
    mailbox: Arc<Mailbox>,
    router: Arc<dyn InterruptRouter>,
}

impl LocalApic {
    /// A local APIC after power-up. Its ID is the mailbox's; ID 0 is the bootstrap processor.
    /// `tsc_khz` is the frequency of the TSC that all times are given in.
    pub fn new(mailbox: Arc<Mailbox>, router: Arc<dyn InterruptRouter>, tsc_khz: u64) -> Self {
        let id = mailbox.id();
        let mut apic = Self {
            id,
            base: BASE_RESET | if id == 0 { BASE_BSP } else { 0 },
            tpr: 0,
            svr: 0,
            ldr: 0,
            dfr: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [0; 6],
            timer: Timer::new(tsc_khz),
            mailbox,
            router,
        };
        apic.reset_registers();
        apic.publish();
        apic
    }

    /// The 32-bit ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Tells the frequency of the TSC anew, before `set_state` of a state with another.
    pub fn set_tsc_khz(&mut self, tsc_khz: u64) {
        self.timer.set_tsc_khz(tsc_khz);
    }

    /// INIT: everything but the ID and IA32_APIC_BASE is as after power-up.
    /// [`LocalApic::poll_mailbox`] has done it when it reports INIT.
    pub fn init(&mut self) {
        self.reset_registers();
        self.publish();
    }

    fn reset_registers(&mut self) {
        self.tpr = 0;
        self.svr = 0xff;
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.isr = [0; 8];
        self.tmr = [0; 8];
        self.irr = [0; 8];
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 6];
        self.timer.reset();
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE. Legal transitions: disabled to xAPIC, xAPIC to x2APIC, any to
    /// disabled (SDM vol. 3, 11.12.5).
    ///
    /// # Errors
    /// [`GeneralProtection`] for reserved bits and illegal transitions.
    pub fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        if value & !(BASE_ADDRESS | BASE_BSP | BASE_X2APIC | BASE_ENABLE) != 0 {
            return Err(GeneralProtection);
        }
        let mode = |base: u64| (base & BASE_ENABLE != 0, base & BASE_X2APIC != 0);
        match (mode(self.base), mode(value)) {
            (_, (false, true)) | ((true, true), (true, false)) | ((false, _), (true, true)) => {
                return Err(GeneralProtection);
            }
            ((true, _), (false, false)) => self.reset_registers(),
            ((true, false), (true, true)) => self.icr &= 0xffff_ffff,
            _ => {}
        }
        self.base = value;
        self.publish();
        Ok(())
    }

    /// Is it enabled in IA32_APIC_BASE? If not, CPUID shows no APIC.
    pub fn is_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    /// Is it in x2APIC mode?
    pub fn is_x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    /// The guest physical page address of the registers, in xAPIC mode.
    pub fn mmio_page(&self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.base & BASE_ADDRESS)
    }

    /// CR8: bits 4-7 of the task priority.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// Writes CR8.
    ///
    /// # Errors
    /// [`GeneralProtection`] for reserved bits.
    pub fn set_cr8(&mut self, value: u64) -> Result<(), GeneralProtection> {
        if value > 15 {
            return Err(GeneralProtection);
        }
        self.set_tpr((value as u8) << 4);
        Ok(())
    }

    fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
        self.publish();
    }

    /// The highest vector that may interrupt the processor now, if RFLAGS.IF lets it.
    pub fn pending_vector(&self) -> Option<u8> {
        if !self.is_enabled() || self.svr & SVR_ENABLE == 0 {
            return None;
        }
        highest(&self.irr).filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// Does INTR reach the processor? Through LINT0 in ExtINT mode, or past an APIC that is
    /// disabled in IA32_APIC_BASE (SDM vol. 3, 11.4.3 and 11.5.1).
    pub fn passes_external(&self) -> bool {
        let lint0 = self.lvt[lvt::LINT0];
        !self.is_enabled() || lint0 & LVT_MASKED == 0 && lint0 & LVT_MODE == LVT_EXTERNAL
    }

    /// Takes the pending vector: it moves from request to service. The spurious vector when none
    /// is pending.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.pending_vector() else {
            return self.svr as u8;
        };
        clear(&mut self.irr, vector);
        set(&mut self.isr, vector);
        self.publish();
        vector
    }

    /// Undoes `acknowledge`: the vector was taken but not delivered, and is requested again.
    pub fn request_again(&mut self, vector: u8) {
        if vector < 16 {
            return;
        }
        clear(&mut self.isr, vector);
        set(&mut self.irr, vector);
        self.publish();
    }

    /// Ends the highest interrupt in service. Returns its vector when it was level-triggered and
    /// its end must be broadcast to the I/O APIC.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        clear(&mut self.isr, vector);
        self.publish();
        let broadcast = self.svr & SVR_NO_EOI_BROADCAST == 0;
        (is_set(&self.tmr, vector) && broadcast).then_some(vector)
    }

    /// Takes what other threads posted. Vectors become requests; the rest is for the processor.
    pub fn poll_mailbox(&mut self) -> Posted {
        let mailbox = Arc::clone(&self.mailbox);
        let posted = mailbox.take(|vector, trigger| self.accept(vector, trigger));
        if posted.init {
            self.init();
        }
        posted
    }

    /// The TSC value at which [`LocalApic::tick`] must be called next.
    pub fn next_deadline_tsc(&self) -> Option<u64> {
        let masked = self.lvt[lvt::TIMER] & LVT_MASKED != 0;
        self.timer.deadline().filter(|_| !masked)
    }

    /// Lets the timer fire when its time has come.
    pub fn tick(&mut self, tsc_now: u64) {
        if self.timer.expire(self.lvt[lvt::TIMER], tsc_now) {
            self.deliver_local(self.lvt[lvt::TIMER]);
        }
    }

    /// A fixed interrupt arrives.
    fn accept(&mut self, vector: u8, trigger: Trigger) {
        if !self.is_enabled() || self.svr & SVR_ENABLE == 0 {
            return;
        }
        if vector < 16 {
            self.report(ESR_RECEIVE_ILLEGAL);
            return;
        }
        match trigger {
            Trigger::Level => set(&mut self.tmr, vector),
            Trigger::Edge => clear(&mut self.tmr, vector),
        }
        set(&mut self.irr, vector);
    }

    /// An entry of the local vector table fires.
    fn deliver_local(&mut self, entry: u32) {
        if entry & LVT_MASKED != 0 {
            return;
        }
        let vector = entry as u8;
        // The error entry must not report its own illegal vector for ever.
        if vector >= 16 || entry != self.lvt[lvt::ERROR] {
            self.accept(vector, Trigger::Edge);
        }
    }

    fn report(&mut self, error: u32) {
        self.errors |= error;
        self.deliver_local(self.lvt[lvt::ERROR]);
    }

    /// Carries out the command in the ICR.
    fn send(&mut self) {
        let vector = self.icr as u8;
        let fixed = matches!(self.icr >> 8 & 7, 0 | 1);
        if fixed && vector < 16 {
            self.report(ESR_SEND_ILLEGAL);
            return;
        }
        let to_self = self.icr >> 18 & 3 == 1;
        if to_self && fixed {
            self.accept(vector, Trigger::Edge);
            return;
        }
        let mut destination = self.icr >> 32;
        if !self.is_x2apic() {
            destination >>= 24;
            let logical = self.icr & (1 << 11) != 0;
            if destination == 0xff && !logical {
                destination = 0xffff_ffff;
            }
        }
        self.router
            .send_ipi(self.id, self.icr & 0xffff_ffff | destination << 32);
    }

    fn ppr(&self) -> u8 {
        let serving = highest(&self.isr).unwrap_or(0);
        if self.tpr >> 4 >= serving >> 4 {
            self.tpr
        } else {
            serving & 0xf0
        }
    }

    fn logical_id(&self) -> u32 {
        if self.is_x2apic() {
            (self.id >> 4) << 16 | 1 << (self.id & 15)
        } else {
            self.ldr
        }
    }

    fn publish(&self) {
        self.mailbox.publish(Address {
            id: self.id,
            enabled: self.is_enabled(),
            x2apic: self.is_x2apic(),
            logical: self.logical_id(),
            flat: self.dfr >> 28 == 0xf,
            priority: self.ppr() & 0xf0,
        });
    }
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    bits.iter()
        .enumerate()
        .rev()
        .find(|(_, word)| **word != 0)
        .map(|(index, word)| (index as u32 * 32 + word.ilog2()) as u8)
}

fn set(bits: &mut [u32; 8], vector: u8) {
    bits[usize::from(vector / 32)] |= 1 << (vector % 32);
}

fn clear(bits: &mut [u32; 8], vector: u8) {
    bits[usize::from(vector / 32)] &= !(1 << (vector % 32));
}

fn is_set(bits: &[u32; 8], vector: u8) -> bool {
    bits[usize::from(vector / 32)] >> (vector % 32) & 1 != 0
}
