//! The serial port: a 16550A UART, the guest's console.
//!
//! ```text
//!  guest ──THR──► Console::write                      (at once: the line has no speed)
//!  guest ◄──RBR── FIFO (16) ◄── backlog ◄── push_input
//!                            while the guest holds RTS and the loop is open
//! ```
//!
//! Input waits in a backlog until the guest asserts "request to send", as a peer with hardware
//! flow control would have it wait: a guest that is still booting, or that resets the FIFO when it opens
//! the port, loses nothing. The backlog is bounded; who pushes hears how much was taken, and
//! hears through [`Console::input_ready`] when there is room again. National Semiconductor
//! PC16550D data sheet, section 8.

mod uart;

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use dunlin_guest::{InterruptLine, RestoreError, SavedState, layout};

use crate::bus::{Bus, BusDevice, RangeError};
use crate::component::{Component, Reach};
use crate::lock;

pub use uart::UartState;
use uart::{Effect, Uart};

const KIND: &str = "serial-16550a";
const VERSION: u32 = 1;
/// Number of ports.
const PORTS: u64 = 8;

/// What is at the other end of the line.
pub trait Console: Debug + Send + Sync {
    /// Output of the guest, in order. Called from a vCPU thread with the port locked: must
    /// neither block on a slow reader (buffer, and drop when the buffer is full) nor call back.
    fn write(&self, bytes: &[u8]);

    /// There is room for input again, after [`Serial::push_input`] took less than it was given.
    /// Called from a vCPU thread: should wake whoever holds the input.
    fn input_ready(&self);
}

/// The serial port.
#[derive(Debug)]
pub struct Serial {
    uart: Mutex<Uart>,
    line: Arc<dyn InterruptLine>,
    console: Arc<dyn Console>,
}

impl Serial {
    /// A port after reset; `line` leads to the pin [`layout::SERIAL_IRQ`].
    pub fn new(line: Arc<dyn InterruptLine>, console: Arc<dyn Console>) -> Arc<Self> {
        Arc::new(Self {
            uart: Mutex::new(Uart::new()),
            line,
            console,
        })
    }

    /// Puts the registers on the port bus.
    ///
    /// # Errors
    /// [`RangeError`] when another device has the ports.
    pub fn attach(self: &Arc<Self>, ports: &Bus) -> Result<(), RangeError> {
        let start = u64::from(layout::SERIAL_PORT);
        ports.insert(start, PORTS, Arc::clone(self) as _)
    }

    /// Offers input to the guest. Returns how many bytes were taken; keep the rest until
    /// [`Console::input_ready`].
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut uart = lock(&self.uart);
        let taken = uart.push_input(bytes);
        self.line.set_level(uart.interrupts());
        taken
    }

    /// Does what a register access entails, with the port still locked to keep the order.
    fn perform(&self, uart: &Uart, effect: &Effect) {
        if let Some(byte) = effect.sent {
            self.console.write(&[byte]);
        }
        self.line.set_level(uart.interrupts());
    }
}

impl BusDevice for Serial {
    fn label(&self) -> String {
        "serial".into()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(byte) = data.first_mut() else { return };
        let mut uart = lock(&self.uart);
        let effect;
        (*byte, effect) = uart.read(offset);
        self.perform(&uart, &effect);
        drop(uart);
        if effect.has_room_again {
            self.console.input_ready();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut uart = lock(&self.uart);
        let effect = uart.write(offset, value);
        self.perform(&uart, &effect);
        drop(uart);
        if effect.has_room_again {
            self.console.input_ready();
        }
    }
}

impl Component for Serial {
    fn name(&self) -> String {
        "serial".into()
    }

    fn pause(&self, _reach: Reach) {}

    fn resume(&self) {}

    fn save(&self) -> SavedState {
        let Self {
            uart,
            line: _,
            console: _,
        } = self;
        SavedState::encode(&self.name(), KIND, VERSION, &lock(uart).save())
    }

    /// The line takes the level that the registers imply; the interrupt controller, whose state
    /// has that level too, sees no edge in whichever order the two are restored: a new one has all
    /// pins masked.
    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let body: UartState = state.decode(KIND, VERSION)?;
        let restored = Uart::try_from(body).map_err(|reason| state.invalid(reason))?;
        let mut uart = lock(&self.uart);
        *uart = restored;
        self.line.set_level(uart.interrupts());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
