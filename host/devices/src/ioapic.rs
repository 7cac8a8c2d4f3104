//! The I/O APIC: turns the levels of 24 pins into messages (Intel 82093AA, version 0x20).
//!
//! ```text
//!  edge:   line rises, unmasked ──► message             (masked: the edge is lost)
//!  level:  line high, unmasked, remote IRR clear ──► message, remote IRR set
//!          end_of_interrupt(vector) ──► remote IRR clear ──► again, if the line is still high
//! ```
//!
//! A line is high when it is asserted: the polarity of a redirection entry is kept for the guest
//! to read, as there are no wires that could be active low.

use std::sync::{Arc, Mutex};

use dunlin_guest::{InterruptLine, Msi, MsiSink, RestoreError, SavedState};

use crate::bus::BusDevice;
use crate::component::{Component, Reach};
use crate::lock;

const KIND: &str = "ioapic";
const VERSION: u32 = 1;

/// Number of pins.
pub const PINS: usize = 24;

/// Offsets of the memory-mapped registers.
mod register {
    pub(super) const SELECT: u64 = 0x00;
    pub(super) const WINDOW: u64 = 0x10;
    pub(super) const END_OF_INTERRUPT: u64 = 0x40;
}

/// Indices of the registers behind the window.
mod index {
    pub(super) const ID: u8 = 0;
    pub(super) const VERSION: u8 = 1;
    pub(super) const ARBITRATION: u8 = 2;
    pub(super) const REDIRECTION: u8 = 0x10;
}

/// Highest entry in bits 16 to 23, version 0x20 (it has the end-of-interrupt register).
const VERSION_REGISTER: u32 = (PINS as u32 - 1) << 16 | 0x20;
const ID_MASK: u32 = 0x0f00_0000;

/// Bits of a redirection entry.
mod entry {
    pub(super) const LOGICAL: u64 = 1 << 11;
    pub(super) const REMOTE_IRR: u64 = 1 << 14;
    pub(super) const LEVEL: u64 = 1 << 15;
    pub(super) const MASKED: u64 = 1 << 16;
    /// Delivery status (always idle: a message needs no time) and remote IRR.
    pub(super) const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;
    /// Vector, delivery mode, destination mode, polarity, trigger mode, mask, destination with
    /// the extension to 15 bits.
    pub(super) const WRITABLE: u64 = 0xfffe_0000_0001_afff;
}

const DELIVERY_LOWEST: u64 = 1;

/// The message that an entry sends (SDM vol. 3, 11.11: the same fields at other places).
fn message(entry: u64) -> Msi {
    let delivery = entry >> 8 & 7;
    let mut address = 0xfee0_0000 | (entry >> 56) << 12;
    // Bits 8 to 14 of the destination, for guests that know them (KVM_FEATURE_MSI_EXT_DEST_ID).
    address |= (entry >> 49 & 0x7f) << 5;
    if delivery == DELIVERY_LOWEST {
        address |= 1 << 3;
    }
    if entry & entry::LOGICAL != 0 {
        address |= 1 << 2;
    }
    let mut data = (entry & 0xff | delivery << 8) as u32;
    if entry & entry::LEVEL != 0 {
        data |= 1 << 15 | 1 << 14;
    }
    Msi { address, data }
}

#[derive(Debug)]
struct Registers {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// Level of each pin.
    lines: u32,
}

impl Registers {
    const RESET: Self = Self {
        id: 0,
        select: 0,
        entries: [entry::MASKED; PINS],
        lines: 0,
    };

    fn is_high(&self, pin: usize) -> bool {
        self.lines & 1 << pin != 0
    }

    /// What a pin in level mode sends now.
    fn level_message(&mut self, pin: usize) -> Option<Msi> {
        let high = self.is_high(pin);
        let entry = self.entries.get_mut(pin)?;
        let blocked = *entry & (entry::MASKED | entry::REMOTE_IRR) != 0;
        if !high || blocked || *entry & entry::LEVEL == 0 {
            return None;
        }
        *entry |= entry::REMOTE_IRR;
        Some(message(*entry))
    }

    fn set_line(&mut self, pin: usize, high: bool) -> Option<Msi> {
        let rises = high && !self.is_high(pin);
        let entry = *self.entries.get(pin)?;
        if high {
            self.lines |= 1 << pin;
        } else {
            self.lines &= !(1 << pin);
        }
        if entry & entry::LEVEL != 0 {
            return self.level_message(pin);
        }
        (rises && entry & entry::MASKED == 0).then(|| message(entry))
    }

    fn read_window(&self) -> u32 {
        match self.select {
            index::ID | index::ARBITRATION => self.id,
            index::VERSION => VERSION_REGISTER,
            select => {
                let Some(word) = select.checked_sub(index::REDIRECTION) else {
                    return 0;
                };
                let entry = self.entries.get(usize::from(word / 2)).copied();
                (entry.unwrap_or(0) >> (32 * (word % 2))) as u32
            }
        }
    }

    fn write_window(&mut self, value: u32) -> Option<Msi> {
        if self.select == index::ID {
            self.id = value & ID_MASK;
        }
        let word = self.select.checked_sub(index::REDIRECTION)?;
        let pin = usize::from(word / 2);
        let entry = self.entries.get_mut(pin)?;
        let shift = 32 * (word % 2);
        let mask = entry::WRITABLE & 0xffff_ffff << shift;
        *entry = *entry & !mask | u64::from(value) << shift & mask;
        if *entry & entry::LEVEL == 0 {
            *entry &= !entry::REMOTE_IRR;
        }
        self.level_message(pin)
    }
}

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    registers: Mutex<Registers>,
    sink: Arc<dyn MsiSink>,
}

/// Saved state of [`IoApic`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct IoApicState {
    /// ID register.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// Selected register.
    #[prost(uint32, tag = "2")]
    pub select: u32,
    /// Redirection entries.
    #[prost(uint64, repeated, tag = "3")]
    pub entries: Vec<u64>,
    /// Level of each pin, one bit each.
    #[prost(uint32, tag = "4")]
    pub lines: u32,
}

impl TryFrom<IoApicState> for Registers {
    type Error = &'static str;

    fn try_from(state: IoApicState) -> Result<Self, Self::Error> {
        let IoApicState {
            id,
            select,
            entries,
            lines,
        } = state;
        if id & !ID_MASK != 0 || lines >> PINS != 0 {
            return Err("reserved bits are set");
        }
        let select = u8::try_from(select).or(Err("the selected register is above 255"))?;
        let entries = <[u64; PINS]>::try_from(entries).or(Err("there are not 24 entries"))?;
        let known = entry::WRITABLE | entry::READ_ONLY;
        if entries.iter().any(|entry| entry & !known != 0) {
            return Err("an entry has reserved bits set");
        }
        Ok(Self {
            id,
            select,
            entries,
            lines,
        })
    }
}

impl IoApic {
    /// An I/O APIC with all pins low and masked, that sends to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>) -> Arc<Self> {
        Arc::new(Self {
            registers: Mutex::new(Registers::RESET),
            sink,
        })
    }

    /// The line that leads to a pin; a pin above 23 leads nowhere.
    pub fn pin(self: &Arc<Self>, pin: u32) -> Arc<dyn InterruptLine> {
        Arc::new(Pin {
            ioapic: Arc::clone(self),
            pin: pin as usize,
        })
    }

    /// A local APIC finished a level-triggered interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut registers = lock(&self.registers);
        for pin in 0..PINS {
            let entry = &mut registers.entries[pin];
            let waits = *entry & entry::REMOTE_IRR != 0 && *entry as u8 == vector;
            if waits {
                *entry &= !entry::REMOTE_IRR;
                self.send(registers.level_message(pin));
            }
        }
    }

    /// Sends under the caller's lock, so that no message follows after the guest masked the pin.
    fn send(&self, message: Option<Msi>) {
        if let Some(message) = message {
            self.sink.signal(message);
        }
    }
}

#[derive(Debug)]
struct Pin {
    ioapic: Arc<IoApic>,
    pin: usize,
}

impl InterruptLine for Pin {
    fn set_level(&self, high: bool) {
        let mut registers = lock(&self.ioapic.registers);
        let message = registers.set_line(self.pin, high);
        self.ioapic.send(message);
    }
}

impl BusDevice for IoApic {
    fn label(&self) -> String {
        "ioapic".into()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = lock(&self.registers);
        let value = match offset {
            register::SELECT => u32::from(registers.select),
            register::WINDOW => registers.read_window(),
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::SELECT => lock(&self.registers).select = value as u8,
            register::WINDOW => {
                let mut registers = lock(&self.registers);
                let message = registers.write_window(value);
                self.send(message);
            }
            register::END_OF_INTERRUPT => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl Component for IoApic {
    fn name(&self) -> String {
        "ioapic".into()
    }

    fn pause(&self, _reach: Reach) {}

    fn resume(&self) {}

    fn save(&self) -> SavedState {
        let Self { registers, sink: _ } = self;
        let Registers {
            id,
            select,
            entries,
            lines,
        } = &*lock(registers);
        let state = IoApicState {
            id: *id,
            select: u32::from(*select),
            entries: entries.to_vec(),
            lines: *lines,
        };
        SavedState::encode(&self.name(), KIND, VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let body: IoApicState = state.decode(KIND, VERSION)?;
        let registers = Registers::try_from(body).map_err(|reason| state.invalid(reason))?;
        *lock(&self.registers) = registers;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Messages;
    use proptest::prelude::*;

    fn ioapic() -> (Arc<IoApic>, Arc<Messages>) {
        let messages = Arc::<Messages>::default();
        (IoApic::new(messages.clone()), messages)
    }

    fn write(ioapic: &IoApic, index: u8, value: u32) {
        ioapic.write(register::SELECT, &[index, 0, 0, 0]);
        ioapic.write(register::WINDOW, &value.to_le_bytes());
    }

    fn read(ioapic: &IoApic, index: u8) -> u32 {
        let mut data = [0; 4];
        ioapic.write(register::SELECT, &[index, 0, 0, 0]);
        ioapic.read(register::WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    const PIN4: u8 = index::REDIRECTION + 8;

    #[test]
    fn an_edge_sends_one_message() {
        let (ioapic, messages) = ioapic();
        write(&ioapic, PIN4 + 1, 2 << 24);
        write(&ioapic, PIN4, 0x34);
        let line = ioapic.pin(4);
        line.set_level(true);
        line.set_level(true);
        let expected = Msi {
            address: 0xfee0_2000,
            data: 0x34,
        };
        assert_eq!(messages.take(), [expected]);
        line.set_level(false);
        assert_eq!(messages.take(), []);
        line.pulse();
        assert_eq!(messages.take(), [expected]);
    }

    #[test]
    fn a_masked_edge_is_lost() {
        let (ioapic, messages) = ioapic();
        ioapic.pin(4).pulse();
        write(&ioapic, PIN4, 0x34);
        assert_eq!(messages.take(), []);
    }

    #[test]
    fn a_level_repeats_after_each_end_of_interrupt_while_it_is_high() {
        let (ioapic, messages) = ioapic();
        write(&ioapic, PIN4, 0x8034);
        let line = ioapic.pin(4);
        line.set_level(true);
        let sent = messages.take();
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].data, 0xc034);
        assert_ne!(read(&ioapic, PIN4) & 1 << 14, 0);
        line.set_level(true);
        ioapic.end_of_interrupt(0x35);
        assert_eq!(messages.take(), []);
        ioapic.end_of_interrupt(0x34);
        assert_eq!(messages.take().len(), 1);
        line.set_level(false);
        ioapic.write(register::END_OF_INTERRUPT, &[0x34, 0, 0, 0]);
        assert_eq!(messages.take(), []);
        assert_eq!(read(&ioapic, PIN4) & 1 << 14, 0);
    }

    #[test]
    fn a_level_that_rose_while_masked_is_sent_when_unmasked() {
        let (ioapic, messages) = ioapic();
        write(&ioapic, PIN4, 0x1_8034);
        ioapic.pin(4).set_level(true);
        assert_eq!(messages.take(), []);
        write(&ioapic, PIN4, 0x8034);
        assert_eq!(messages.take().len(), 1);
    }

    #[test]
    fn destination_and_delivery_mode_reach_the_message() {
        // Logical, lowest priority, destination 0x5a with extension 3.
        let entry = 0x5a << 56 | 3 << 49 | entry::LOGICAL | 1 << 8 | 0x77;
        let expected = Msi {
            address: 0xfee5_a000 | 3 << 5 | 0b1100,
            data: 0x177,
        };
        assert_eq!(message(entry), expected);
    }

    #[test]
    fn the_registers_say_what_kind_it_is() {
        let (ioapic, _) = ioapic();
        assert_eq!(read(&ioapic, index::VERSION), 0x0017_0020);
        write(&ioapic, index::ID, u32::MAX);
        assert_eq!(read(&ioapic, index::ID), 0x0f00_0000);
        assert_eq!(read(&ioapic, PIN4), 1 << 16);
        assert_eq!(read(&ioapic, 0x40), 0);
        // Read-only and reserved bits stay.
        write(&ioapic, PIN4, u32::MAX);
        assert_eq!(read(&ioapic, PIN4), 0x1_afff);
    }

    #[test]
    fn the_state_survives_the_round_trip() {
        let (source, _) = ioapic();
        write(&source, PIN4, 0x8034);
        write(&source, index::ID, 0x0100_0000);
        source.pin(4).set_level(true);
        let (target, messages) = ioapic();
        target.restore(&source.save()).unwrap();
        assert_eq!(target.save(), source.save());
        assert_eq!(messages.take(), []);
        target.end_of_interrupt(0x34);
        assert_eq!(messages.take().len(), 1);
    }

    #[test]
    fn an_impossible_state_is_refused() {
        let (ioapic, _) = ioapic();
        let good = ioapic.save();
        let state: IoApicState = good.decode(KIND, VERSION).unwrap();
        let mut entry_bits = state.clone();
        entry_bits.entries[3] |= 1 << 20;
        let mut entry_count = state.clone();
        entry_count.entries.pop();
        let lines = IoApicState {
            lines: 1 << 24,
            ..state.clone()
        };
        let select = IoApicState {
            select: 256,
            ..state.clone()
        };
        let id = IoApicState { id: 1, ..state };
        for body in [entry_bits, entry_count, lines, select, id] {
            let state = SavedState::encode("ioapic", KIND, VERSION, &body);
            assert!(ioapic.restore(&state).is_err(), "{body:?}");
        }
        assert_eq!(ioapic.save(), good);
    }

    proptest! {
        #[test]
        fn no_access_panics_and_every_state_can_be_restored(
            accesses in proptest::collection::vec((0u8..4, 0u64..0x50, any::<u32>(), 0usize..4), 0..200),
        ) {
            let (ioapic, _) = ioapic();
            for (what, offset, value, length) in accesses {
                let mut data = [0; 8];
                data[..4].copy_from_slice(&value.to_le_bytes());
                let data = &mut data[..1 << length];
                match what {
                    0 => ioapic.read(offset, data),
                    1 => ioapic.write(offset, data),
                    2 => write(&ioapic, value as u8, value),
                    _ => ioapic.pin(value % 32).set_level(offset % 2 == 0),
                }
            }
            prop_assert!(ioapic.restore(&ioapic.save()).is_ok());
        }
    }
}
