//! The configuration space of a function: a type 0 header and a list of capabilities.

use std::sync::Arc;

use dunlin_guest::{RestoreError, SavedState};

use super::msix::{Msix, MsixState};

/// Bytes that this type models; the extended space up to 4 KiB reads as zeros (no capabilities).
const SIZE: usize = 256;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;
const BARS: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;

/// Bits of the command register (PCI 3.0, 6.2.2).
pub mod command {
    /// The function answers at its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may read and write memory, and send MSIs.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The bits that a guest can change: I/O, memory, bus master, parity, SERR, INTx disable.
    pub(super) const WRITABLE: u16 = 0x0547;
}

/// Capability IDs.
pub mod capability {
    /// Vendor-specific; virtio uses it.
    pub const VENDOR: u8 = 0x09;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

const STATUS_CAPABILITIES: u16 = 1 << 4;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Base class, sub-class and programming interface: `0xCCSSPP`.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Width of a memory BAR's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Below 4 GiB; takes one register.
    Memory32,
    /// Anywhere; takes two registers.
    Memory64,
}

/// A window of a function's registers in the memory address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Index of its first register, 0 to 5.
    pub index: u8,
    /// Bytes: a power of two, 16 at least and 2 GiB at most.
    pub size: u64,
    /// Width of the address.
    pub kind: BarKind,
}

/// Why a configuration space cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Index, size or overlap of a BAR.
    #[error("BAR {index} of {size:#x} bytes does not fit: {reason}")]
    Bar {
        /// Index of the BAR.
        index: u8,
        /// Its size.
        size: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The 192 bytes for capabilities are used up.
    #[error("capability {id:#x} of {size} bytes does not fit into configuration space")]
    NoRoom {
        /// The capability's ID.
        id: u8,
        /// Its size with the header.
        size: usize,
    },
    /// The MSI-X table lies outside of its BAR.
    #[error("MSI-X table or pending bits do not fit into BAR {bar}")]
    Msix {
        /// Index of the BAR.
        bar: u8,
    },
}

#[derive(Debug, Clone, Copy)]
struct BarSlot {
    bar: Bar,
    /// The address that was written last and was no sizing probe.
    address: u64,
}

impl BarSlot {
    fn register(&self) -> usize {
        BARS + 4 * usize::from(self.bar.index)
    }

    fn length(&self) -> usize {
        match self.bar.kind {
            BarKind::Memory32 => 4,
            BarKind::Memory64 => 8,
        }
    }

    fn is_aligned(&self, address: u64) -> bool {
        let fits = self.bar.kind == BarKind::Memory64 || address <= u64::from(u32::MAX);
        fits && address & (self.bar.size - 1) == 0
    }
}

#[derive(Debug)]
struct MsixSlot {
    msix: Arc<Msix>,
    /// Offset of the message control register.
    control: usize,
}

/// Configuration space of one function.
#[derive(Debug)]
pub struct ConfigSpace {
    registers: [u8; SIZE],
    /// Bits that the guest can change.
    writable: [u8; SIZE],
    bars: Vec<BarSlot>,
    msix: Option<MsixSlot>,
    /// Where the next capability goes.
    free: usize,
    /// The byte that shall point to the next capability.
    link: usize,
}

/// Saved state of [`ConfigSpace`], with that of its MSI-X table.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConfigState {
    /// The 256 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub registers: Vec<u8>,
    /// Where each BAR lies, in the order of their indices.
    #[prost(uint64, repeated, tag = "2")]
    pub bar_addresses: Vec<u64>,
    /// The MSI-X table, if the function has one.
    #[prost(message, optional, tag = "3")]
    pub msix: Option<MsixState>,
}

impl ConfigSpace {
    /// A header without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            registers: [0; SIZE],
            writable: [0; SIZE],
            bars: Vec::new(),
            msix: None,
            free: FIRST_CAPABILITY,
            link: CAPABILITY_POINTER,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &command::WRITABLE.to_le_bytes());
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds a BAR. It has no address until the root complex or the guest gives it one.
    ///
    /// # Errors
    /// [`ConfigError::Bar`] when index or size cannot be or registers are taken.
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), ConfigError> {
        let error = |reason| ConfigError::Bar {
            index: bar.index,
            size: bar.size,
            reason,
        };
        let slot = BarSlot { bar, address: 0 };
        let taken = |s: &BarSlot| s.register()..s.register() + s.length();
        if slot.register() + slot.length() > BARS + 24 {
            return Err(error("a function has six BAR registers"));
        }
        if !bar.size.is_power_of_two() || !(16..=1 << 31).contains(&bar.size) {
            return Err(error("the size is no power of two from 16 to 2 GiB"));
        }
        let (new, old) = (taken(&slot), self.bars.iter().map(taken));
        if old
            .into_iter()
            .any(|o| o.start < new.end && new.start < o.end)
        {
            return Err(error("its registers are taken"));
        }
        let mask = !(bar.size - 1);
        self.allow(slot.register(), &mask.to_le_bytes()[..slot.length()]);
        if bar.kind == BarKind::Memory64 {
            self.put(slot.register(), &[0b100]);
        }
        self.bars.push(slot);
        self.bars.sort_by_key(|slot| slot.bar.index);
        Ok(())
    }

    /// Adds a capability: `body` is what follows its ID and next pointer. Returns the offset of
    /// its header. All of it is read-only until [`ConfigSpace::allow`] says otherwise.
    ///
    /// # Errors
    /// [`ConfigError::NoRoom`] when the space is used up.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Result<u8, ConfigError> {
        let (start, size) = (self.free, 2 + body.len());
        let error = ConfigError::NoRoom { id, size };
        if start + size > SIZE {
            return Err(error);
        }
        let Ok(offset) = u8::try_from(start) else {
            return Err(error);
        };
        self.put(start, &[id, 0]);
        self.put(start + 2, body);
        self.put(self.link, &[offset]);
        let status = self.word(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        self.link = start + 1;
        self.free = (start + size).next_multiple_of(4);
        Ok(offset)
    }

    /// Adds the MSI-X capability, and follows its control register from now on.
    ///
    /// # Errors
    /// [`ConfigError`] when the table does not fit into its BAR or there is no room.
    pub fn add_msix(&mut self, msix: Arc<Msix>) -> Result<(), ConfigError> {
        let layout = msix.layout();
        let bar = self.bars.iter().find(|slot| slot.bar.index == layout.bar);
        if !bar.is_some_and(|slot| msix.fits(slot.bar.size)) {
            return Err(ConfigError::Msix { bar: layout.bar });
        }
        let mut body = Vec::with_capacity(10);
        body.extend((msix.vectors() - 1).to_le_bytes());
        body.extend((layout.table | u32::from(layout.bar)).to_le_bytes());
        body.extend((layout.pending | u32::from(layout.bar)).to_le_bytes());
        let control = usize::from(self.add_capability(capability::MSIX, &body)?) + 2;
        self.allow(control, &(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes());
        self.msix = Some(MsixSlot { msix, control });
        Ok(())
    }

    /// Lets the guest change the bits that are set in `mask`, from `offset` on.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (bits, mask) in self.writable.iter_mut().skip(offset).zip(mask) {
            *bits |= mask;
        }
    }

    /// Sets registers from the device's side, whatever the guest may write there. Bits that the
    /// guest cannot change are part of the device's identity: set them before the guest runs.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.registers.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    /// A load by the guest.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let register = self.registers.get(usize::from(offset) + index);
            *byte = register.copied().unwrap_or(0);
        }
    }

    /// A store by the guest: read-only bits keep their value.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        for (index, value) in data.iter().enumerate() {
            let Some(register) = self.registers.get_mut(start + index) else {
                break;
            };
            let mask = self.writable[start + index];
            *register = (*register & !mask) | (value & mask);
        }
        let end = start + data.len();
        for index in 0..self.bars.len() {
            let slot = &self.bars[index];
            if slot.register() < end && start < slot.register() + slot.length() {
                self.latch(index);
            }
        }
        self.update_msix();
    }

    /// The command register; see [`command`].
    pub fn command(&self) -> u16 {
        self.word(COMMAND)
    }

    /// May the function read and write memory?
    pub fn is_bus_master(&self) -> bool {
        self.command() & command::BUS_MASTER != 0
    }

    /// The BARs that the function has.
    pub fn bars(&self) -> impl Iterator<Item = Bar> + '_ {
        self.bars.iter().map(|slot| slot.bar)
    }

    /// Where the guest wants the BAR to answer; `None` while memory decoding is off.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        if self.command() & command::MEMORY == 0 {
            return None;
        }
        let slot = self.bars.iter().find(|slot| slot.bar.index == index)?;
        Some(slot.address)
    }

    /// Gives a BAR its address, as firmware would. False when the BAR does not exist or the
    /// address is not aligned.
    pub fn set_bar_address(&mut self, index: u8, address: u64) -> bool {
        let Some(at) = self.bars.iter().position(|slot| slot.bar.index == index) else {
            return false;
        };
        if !self.bars[at].is_aligned(address) {
            return false;
        }
        self.bars[at].address = address;
        let (register, length) = (self.bars[at].register(), self.bars[at].length());
        let flags = u64::from(self.registers[register] & 0xf);
        self.put(register, &(address | flags).to_le_bytes()[..length]);
        true
    }

    /// Says in function 0 of a device that it has others.
    pub(super) fn set_multi_function(&mut self) {
        self.put(HEADER_TYPE, &[MULTI_FUNCTION]);
    }

    /// Takes over the address in BAR registers, unless they hold the answer to a sizing probe.
    fn latch(&mut self, index: usize) {
        let slot = &self.bars[index];
        let (register, length) = (slot.register(), slot.length());
        let mut raw = [0; 8];
        raw[..length].copy_from_slice(&self.registers[register..register + length]);
        let (value, mask) = (u64::from_le_bytes(raw), !(slot.bar.size - 1));
        let low_probe = value as u32 & mask as u32 == mask as u32;
        let high_probe = length == 8 && value >> 32 == u64::from(u32::MAX);
        if !low_probe && !high_probe {
            self.bars[index].address = value & mask;
        }
    }

    fn update_msix(&self) {
        if let Some(slot) = &self.msix {
            let control = self.word(slot.control);
            // A function that is no bus master cannot send: what happens meanwhile stays pending.
            let masked = control & MSIX_FUNCTION_MASK != 0 || !self.is_bus_master();
            slot.msix.set_control(control & MSIX_ENABLE != 0, masked);
        }
    }

    fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.registers[offset], self.registers[offset + 1]])
    }

    /// The state, with that of the MSI-X table.
    pub fn save(&self) -> ConfigState {
        let Self {
            registers,
            writable: _,
            bars,
            msix,
            free: _,
            link: _,
        } = self;
        ConfigState {
            registers: registers.to_vec(),
            bar_addresses: bars.iter().map(|slot| slot.address).collect(),
            msix: msix.as_ref().map(|slot| slot.msix.save()),
        }
    }

    /// Takes over a saved state. `of` is the state that contains it, for messages.
    ///
    /// # Errors
    /// [`RestoreError::Invalid`] when the state is that of another device; nothing has changed
    /// then.
    pub fn restore(&mut self, state: &ConfigState, of: &SavedState) -> Result<(), RestoreError> {
        let ConfigState {
            registers,
            bar_addresses,
            msix,
        } = state;
        let Ok(registers) = <[u8; SIZE]>::try_from(registers.as_slice()) else {
            return Err(of.invalid(format!("configuration space is not {SIZE} bytes")));
        };
        self.check_identity(&registers, of)?;
        if bar_addresses.len() != self.bars.len() {
            return Err(of.invalid(format!("expected {} BARs", self.bars.len())));
        }
        for (slot, address) in self.bars.iter().zip(bar_addresses) {
            if !slot.is_aligned(*address) {
                let index = slot.bar.index;
                return Err(of.invalid(format!("address {address:#x} of BAR {index}")));
            }
        }
        match (&self.msix, msix) {
            (Some(slot), Some(state)) => slot.msix.restore(state, of)?,
            (None, None) => {}
            _ => return Err(of.invalid("one side has MSI-X, the other has not")),
        }
        self.registers = registers;
        for (slot, address) in self.bars.iter_mut().zip(bar_addresses) {
            slot.address = *address;
        }
        self.update_msix();
        Ok(())
    }

    /// What a guest cannot change must be equal: it says which device this is.
    fn check_identity(&self, saved: &[u8; SIZE], of: &SavedState) -> Result<(), RestoreError> {
        let differs = |offset: &usize| {
            (saved[*offset] ^ self.registers[*offset]) & !self.writable[*offset] != 0
        };
        match (0..SIZE).find(differs) {
            Some(offset) => Err(of.invalid(format!(
                "configuration space differs at {offset:#x}, which no guest can change"
            ))),
            None => Ok(()),
        }
    }
}
