//! The local APIC's state in the form that all engines share: the register page.

use super::registers::{LVT_WRITABLE, offset};
use super::timer::Mode;
use super::{
    BASE_ADDRESS, BASE_BSP, BASE_ENABLE, BASE_X2APIC, LocalApic, SVR_ENABLE, SVR_NO_EOI_BROADCAST,
    lvt,
};
use crate::state::LocalApicState;

/// Why a local APIC's state was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApicStateError {
    /// IA32_APIC_BASE has reserved bits set, or x2APIC mode without being enabled.
    #[error("local APIC base {0:#x} is not a legal mode")]
    Base(u64),
    /// The ID is another processor's.
    #[error("local APIC ID {found} does not belong to processor {expected}")]
    Id {
        /// In the state.
        found: u32,
        /// This processor's.
        expected: u32,
    },
    /// Vectors below 16 are in request or in service.
    #[error("local APIC has an illegal vector in register {0:#x}")]
    Vector(u32),
    /// A register has reserved bits set.
    #[error("local APIC register {register:#x} cannot hold {value:#x}")]
    Register {
        /// Offset of the register.
        register: u32,
        /// What the state holds.
        value: u32,
    },
}

fn get(state: &LocalApicState, offset: u32) -> u32 {
    let at = offset as usize;
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&state.registers[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn put(state: &mut LocalApicState, offset: u32, value: u32) {
    let at = offset as usize;
    state.registers[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn get_bits(state: &LocalApicState, base: u32) -> [u32; 8] {
    std::array::from_fn(|index| get(state, base + index as u32 * 16))
}

impl LocalApic {
    /// The state at TSC `tsc_now`.
    pub fn state(&mut self, tsc_now: u64) -> LocalApicState {
        self.tick(tsc_now);
        // Every field is named: one that is added and not saved must not compile.
        let Self {
            id,
            base,
            tpr,
            svr,
            ldr: _, // Read through `logical_id`.
            dfr,
            isr,
            tmr,
            irr,
            esr,
            errors: _, // Lost, as in KVM: nothing but a later ESR write shows them.
            icr,
            lvt: entries,
            timer,
            mailbox: _,
            router: _,
        } = self;
        let mut state = LocalApicState {
            base: *base,
            tsc_deadline: timer.tsc_deadline(entries[lvt::TIMER]),
            ..LocalApicState::default()
        };
        let x2apic = *base & BASE_X2APIC != 0;
        put(&mut state, offset::ID, if x2apic { *id } else { *id << 24 });
        put(&mut state, offset::TPR, u32::from(*tpr));
        put(&mut state, offset::SVR, *svr);
        put(&mut state, offset::DFR, *dfr);
        put(&mut state, offset::ESR, *esr);
        put(&mut state, offset::ICR_LOW, *icr as u32);
        put(&mut state, offset::ICR_HIGH, (*icr >> 32) as u32);
        for (base, bits) in [(offset::ISR, isr), (offset::TMR, tmr), (offset::IRR, irr)] {
            for (index, word) in bits.iter().enumerate() {
                put(&mut state, base + index as u32 * 16, *word);
            }
        }
        for (index, entry) in entries.iter().enumerate() {
            put(&mut state, offset::LVT + index as u32 * 16, *entry);
        }
        for register in [
            offset::VERSION,
            offset::PPR,
            offset::LDR,
            offset::INITIAL_COUNT,
            offset::CURRENT_COUNT,
            offset::DIVIDE,
        ] {
            let value = self.read(register, tsc_now).unwrap_or(0);
            put(&mut state, register, value);
        }
        state
    }

    /// Replaces the state at TSC `tsc_now`. Unchanged when it fails.
    ///
    /// # Errors
    /// [`ApicStateError`] for a state that no local APIC of this ID can be in.
    pub fn set_state(
        &mut self,
        state: &LocalApicState,
        tsc_now: u64,
    ) -> Result<(), ApicStateError> {
        check(state, self.id)?;
        self.base = state.base;
        self.reset_registers();
        self.tpr = get(state, offset::TPR) as u8;
        self.svr = get(state, offset::SVR);
        if state.base & BASE_X2APIC == 0 {
            self.ldr = get(state, offset::LDR) & 0xff00_0000;
        }
        self.dfr = get(state, offset::DFR) | 0x0fff_ffff;
        self.esr = get(state, offset::ESR);
        self.isr = get_bits(state, offset::ISR);
        self.tmr = get_bits(state, offset::TMR);
        self.irr = get_bits(state, offset::IRR);
        self.icr =
            u64::from(get(state, offset::ICR_LOW)) | u64::from(get(state, offset::ICR_HIGH)) << 32;
        for (index, entry) in self.lvt.iter_mut().enumerate() {
            *entry = lvt_of(state, index);
        }
        let timer = self.lvt[lvt::TIMER];
        self.timer
            .set_divide(timer, get(state, offset::DIVIDE), tsc_now);
        let initial = get(state, offset::INITIAL_COUNT);
        match Mode::of(timer) {
            Mode::TscDeadline => self.timer.set_tsc_deadline(timer, state.tsc_deadline),
            Mode::OneShot => {
                let left = get(state, offset::CURRENT_COUNT);
                self.timer.resume(initial, left, tsc_now);
            }
            Mode::Periodic => {
                let left = match get(state, offset::CURRENT_COUNT) {
                    0 => initial,
                    left => left,
                };
                self.timer.resume(initial, left, tsc_now);
            }
            Mode::Reserved => {}
        }
        self.publish();
        Ok(())
    }
}

/// The entry without its read-only bits (delivery status, remote IRR).
fn lvt_of(state: &LocalApicState, index: usize) -> u32 {
    get(state, offset::LVT + index as u32 * 16) & !(1 << 12 | 1 << 14)
}

fn check(state: &LocalApicState, id: u32) -> Result<(), ApicStateError> {
    let x2apic = state.base & BASE_X2APIC != 0;
    let reserved = state.base & !(BASE_ADDRESS | BASE_BSP | BASE_X2APIC | BASE_ENABLE);
    if reserved != 0 || x2apic && state.base & BASE_ENABLE == 0 {
        return Err(ApicStateError::Base(state.base));
    }
    let found = match get(state, offset::ID) {
        found if x2apic => found,
        found => found >> 24,
    };
    if found != id {
        return Err(ApicStateError::Id {
            found,
            expected: id,
        });
    }
    for register in [offset::ISR, offset::IRR] {
        if get(state, register) & 0xffff != 0 {
            return Err(ApicStateError::Vector(register));
        }
    }
    let mut limits = vec![
        (offset::TPR, 0xff),
        (offset::SVR, 0x3ff | SVR_ENABLE | SVR_NO_EOI_BROADCAST),
        (offset::ESR, 0xff),
        (offset::DIVIDE, 0b1011),
    ];
    for (index, writable) in LVT_WRITABLE.into_iter().enumerate() {
        limits.push((
            offset::LVT + index as u32 * 16,
            writable | 1 << 12 | 1 << 14,
        ));
    }
    for (register, allowed) in limits {
        let value = get(state, register);
        if value & !allowed != 0 {
            return Err(ApicStateError::Register { register, value });
        }
    }
    let timer = lvt_of(state, lvt::TIMER);
    if Mode::of(timer) == Mode::Reserved {
        return Err(ApicStateError::Register {
            register: offset::LVT,
            value: timer,
        });
    }
    Ok(())
}
