//! The guest physical address map, the same for every engine.
//!
//! ```text
//! 0x0000_0000 ─ RAM (up to 3 GiB); 0xA_0000 to 0x10_0000 is kept for ACPI tables (from 0xE_0000)
//! 0xC000_0000 ─ 32-bit window for PCI memory BARs
//! 0xE000_0000 ─ PCI Express ECAM, 256 buses
//! 0xFEC0_0000 ─ I/O APIC
//! 0xFEE0_0000 ─ local APIC (and the MSI doorbell range)
//! 0x1_0000_0000 ─ RAM above 3 GiB
//! 0x80_0000_0000 ─ 64-bit window for PCI memory BARs
//! ```

/// End of conventional memory. From here to [`LEGACY_HOLE_END`] a guest expects no usable RAM
/// (PC convention: video memory, option ROMs, firmware).
pub const LEGACY_HOLE_START: u64 = 0xa_0000;
/// End of the hole for legacy devices: 1 MiB.
pub const LEGACY_HOLE_END: u64 = 0x10_0000;
/// The ACPI tables, the root pointer first; where PC firmware has it too.
pub const ACPI_TABLES_START: u64 = 0xe_0000;
/// Bytes for the ACPI tables.
pub const ACPI_TABLES_SIZE: u64 = RESET_VECTOR - ACPI_TABLES_START;
/// Where a guest jumps in real mode (f000:fff0) to have the firmware restart the machine.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First guest physical address above low RAM: RAM beyond it continues at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM that does not fit below [`LOW_RAM_END`] continues.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// Window for 32-bit PCI memory BARs.
pub const PCI_MMIO32_START: u64 = 0xc000_0000;
/// Bytes in the window for 32-bit PCI memory BARs.
pub const PCI_MMIO32_SIZE: u64 = 0x2000_0000;
/// PCI Express enhanced configuration access, 1 MiB per bus.
pub const PCI_ECAM_START: u64 = 0xe000_0000;
/// Bytes of ECAM: 256 buses.
pub const PCI_ECAM_SIZE: u64 = 0x1000_0000;
/// I/O APIC registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Bytes decoded by the I/O APIC.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Local APIC registers, and the address range that MSI writes target.
pub const LOCAL_APIC_START: u64 = 0xfee0_0000;
/// Bytes decoded by the local APICs for MSI.
pub const LOCAL_APIC_SIZE: u64 = 0x10_0000;
/// Window for 64-bit PCI memory BARs.
pub const PCI_MMIO64_START: u64 = 0x80_0000_0000;
/// Bytes in the window for 64-bit PCI memory BARs.
pub const PCI_MMIO64_SIZE: u64 = 0x40_0000_0000;

/// RAM for the largest guest: it must end below [`PCI_MMIO64_START`].
pub const MAX_RAM: u64 = PCI_MMIO64_START - HIGH_RAM_START + LOW_RAM_END;

/// I/O APIC pin of the legacy timer, where PCs have it; ISA interrupt 0 at the legacy controllers.
pub const TIMER_PIN: u32 = 2;
/// I/O APIC pin of the first serial port (the ISA interrupt 4).
pub const SERIAL_IRQ: u32 = 4;
/// I/O APIC pin of the ACPI system control interrupt.
pub const SCI_IRQ: u32 = 9;
/// First port of the 8250 serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// First port of the ACPI sleep and reset registers (see the chipset's power device):
/// sleep control, sleep status, reset; one byte each.
pub const POWER_PORT: u16 = 0x600;
/// PCI configuration address port (configuration mechanism 1).
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
