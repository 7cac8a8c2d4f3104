//! Power: the registers with which a guest ends or restarts its machine, and the power button.
//!
//! - Hardware-reduced ACPI (ACPI 6.5, 4.8.3.7): sleep control, sleep status and reset register at
//!   [`layout::POWER_PORT`]. Entering S5 switches the machine off.
//! - The keyboard controller's command port 0x64, of which only the command "pulse the reset
//!   line" exists; guests try it when they know no other way.
//! - The power button: an edge on the pin [`layout::SCI_IRQ`], which the generic event device of the
//!   ACPI tables turns into a notification of the button.
//!
//! (Port 0xcf9, the third way to reset, lies between the PCI configuration ports.)

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use dunlin_guest::{InterruptLine, RestoreError, SavedState, layout};

use crate::bus::{Bus, BusDevice, RangeError};
use crate::component::{Component, Reach};

const KIND: &str = "power";
const VERSION: u32 = 1;

/// Offsets from [`layout::POWER_PORT`], which the ACPI tables repeat.
pub(crate) mod register {
    pub(crate) const SLEEP_CONTROL: u16 = 0;
    pub(crate) const SLEEP_STATUS: u16 = 1;
    pub(crate) const RESET: u16 = 2;
    pub(super) const COUNT: u64 = 3;
}

/// The sleep type of S5, as `_S5` says.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
/// What the guest writes to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;

/// Bits of the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7 << SLEEP_TYPE_SHIFT;

/// The keyboard controller's command port.
const KEYBOARD_COMMAND_PORT: u64 = 0x64;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;

/// Hears what the guest asks of the machine. Called from a vCPU thread: must not wait for one.
pub trait PowerEvents: Debug + Send + Sync {
    /// The guest switched itself off (S5).
    fn power_off(&self);

    /// The guest asks for a reset.
    fn reset(&self);
}

/// The power registers and the power button.
#[derive(Debug)]
pub struct PowerDevice {
    sleep_control: AtomicU8,
    events: Arc<dyn PowerEvents>,
    button: Arc<dyn InterruptLine>,
}

/// Saved state of [`PowerDevice`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct PowerState {
    /// The sleep control register.
    #[prost(uint32, tag = "1")]
    pub sleep_control: u32,
}

impl PowerDevice {
    /// Registers that report to `events`; `button` leads to the pin [`layout::SCI_IRQ`].
    pub fn new(events: Arc<dyn PowerEvents>, button: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self {
            sleep_control: AtomicU8::new(0),
            events,
            button,
        })
    }

    /// Puts the registers on the port bus.
    ///
    /// # Errors
    /// [`RangeError`] when another device has the ports.
    pub fn attach(self: &Arc<Self>, ports: &Bus) -> Result<(), RangeError> {
        let start = u64::from(layout::POWER_PORT);
        ports.insert(start, register::COUNT, Arc::clone(self) as _)?;
        let keyboard = Arc::new(KeyboardController(Arc::clone(&self.events)));
        ports.insert(KEYBOARD_COMMAND_PORT, 1, keyboard)
    }

    /// Presses the power button: asks the guest to shut down by itself. A guest that does not
    /// listen ignores it.
    pub fn press_button(&self) {
        self.button.pulse();
    }
}

impl BusDevice for PowerDevice {
    fn label(&self) -> String {
        "power".into()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Some(byte), true) = (
            data.first_mut(),
            offset == u64::from(register::SLEEP_CONTROL),
        ) {
            *byte = self.sleep_control.load(Ordering::Relaxed);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        if offset == u64::from(register::SLEEP_CONTROL) {
            let sleep_type = value & SLEEP_TYPE_MASK;
            self.sleep_control.store(sleep_type, Ordering::Relaxed);
            let off = SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT | SLEEP_ENABLE;
            if value & (SLEEP_TYPE_MASK | SLEEP_ENABLE) == off {
                self.events.power_off();
            }
        } else if offset == u64::from(register::RESET) && *value == RESET_VALUE {
            self.events.reset();
        }
    }
}

impl Component for PowerDevice {
    fn name(&self) -> String {
        "power".into()
    }

    fn pause(&self, _reach: Reach) {}

    fn resume(&self) {}

    fn save(&self) -> SavedState {
        let Self {
            sleep_control,
            events: _,
            button: _,
        } = self;
        let state = PowerState {
            sleep_control: u32::from(sleep_control.load(Ordering::Relaxed)),
        };
        SavedState::encode(&self.name(), KIND, VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let PowerState { sleep_control } = state.decode(KIND, VERSION)?;
        let valid = u8::try_from(sleep_control)
            .ok()
            .filter(|value| value & !SLEEP_TYPE_MASK == 0)
            .ok_or_else(|| state.invalid("sleep control has reserved bits set"))?;
        self.sleep_control.store(valid, Ordering::Relaxed);
        Ok(())
    }
}

/// What is left of the keyboard controller.
#[derive(Debug)]
struct KeyboardController(Arc<dyn PowerEvents>);

impl BusDevice for KeyboardController {
    fn label(&self) -> String {
        "keyboard".into()
    }

    /// The status: ready for a command.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [KEYBOARD_PULSE_RESET] {
            self.0.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::{Line, Power};
    use proptest::prelude::*;

    fn machine() -> (Bus, Arc<Power>, Arc<Line>, Arc<PowerDevice>) {
        let (ports, power, line) = (Bus::new(), Arc::<Power>::default(), Arc::<Line>::default());
        let device = PowerDevice::new(power.clone(), line.clone());
        device.attach(&ports).unwrap();
        (ports, power, line, device)
    }

    #[test]
    fn only_s5_with_sleep_enable_switches_off() {
        let (ports, power, ..) = machine();
        for value in 0..=255u8 {
            let before = power.offs();
            ports.write(0x600, &[value]);
            let is_off = value >> 2 & 0xf == 0b1101;
            assert_eq!(power.offs() - before, usize::from(is_off), "{value:#x}");
        }
        assert_eq!(power.resets(), 0);
    }

    #[test]
    fn each_way_to_reset_resets() {
        let (ports, power, ..) = machine();
        ports.write(0x602, &[0]);
        ports.write(0x64, &[0xd1]);
        assert_eq!(power.resets(), 0);
        ports.write(0x602, &[RESET_VALUE]);
        assert_eq!(power.resets(), 1);
        ports.write(0x64, &[0xfe]);
        assert_eq!(power.resets(), 2);
    }

    #[test]
    fn the_button_is_an_edge() {
        let (_, _, line, device) = machine();
        device.press_button();
        assert_eq!(line.take_edges(), 1);
        assert!(!line.is_high());
    }

    #[test]
    fn the_state_survives_the_round_trip_and_reserved_bits_are_refused() {
        let (ports, _, _, device) = machine();
        ports.write(0x600, &[3 << 2]);
        let (_, power, _, target) = machine();
        target.restore(&device.save()).unwrap();
        assert_eq!(target.save(), device.save());
        assert_eq!(power.offs(), 0);
        for sleep_control in [1, 0x20, 0x100] {
            let state = PowerState { sleep_control };
            let state = SavedState::encode("power", KIND, VERSION, &state);
            assert!(target.restore(&state).is_err(), "{sleep_control:#x}");
        }
    }

    proptest! {
        #[test]
        fn no_access_panics_and_every_state_can_be_restored(
            accesses in proptest::collection::vec((any::<bool>(), 0u64..4, any::<u32>(), 0usize..3), 0..50),
        ) {
            let (ports, _, _, device) = machine();
            for (write, offset, value, length) in accesses {
                let data = &mut value.to_le_bytes()[..1 << length];
                let address = if offset == 3 { 0x64 } else { 0x600 + offset };
                if write {
                    ports.write(address, data);
                } else {
                    ports.read(address, data);
                }
            }
            prop_assert!(device.restore(&device.save()).is_ok());
        }
    }
}
