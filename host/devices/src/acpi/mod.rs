//! The ACPI tables, from which a guest learns what the machine has (ACPI 6.5).
//!
//! ```text
//! RSDP ─► XSDT ─┬─► FADT ─► DSDT   hardware-reduced: sleep and reset registers, no timer, no GPE
//!               ├─► MADT           local APICs, one I/O APIC, no PIC
//!               └─► MCFG           where ECAM lies
//! ```
//!
//! With hardware-reduced ACPI, Linux expects EFI to restart the machine, and without EFI it jumps
//! to the reset vector of a PC's firmware rather than try the reset register. So the reset vector
//! gets the few instructions that write that register.
//!
//! The tables are written into guest memory once, at [`layout::ACPI_TABLES_START`], and are guest
//! memory from then on: a migration moves them with it.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use dunlin_guest::{GuestAddress, Memory, layout};
use vm_memory::Bytes;

use crate::power;

const OEM: [u8; 6] = *b"DUNLIN";
const OEM_TABLE: [u8; 8] = *b"DUNLINVM";
const OEM_REVISION: u32 = 1;
/// Bytes of the header that all tables share.
const HEADER_SIZE: u32 = 36;

/// The most processors that the tables can describe.
pub const MAX_CPUS: u32 = 1024;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// None or too many.
    #[error("cannot describe {cpus} processors: 1 to {MAX_CPUS} are possible")]
    Cpus {
        /// What was asked for.
        cpus: u32,
    },
    /// The tables need more room than there is.
    #[error(
        "the ACPI tables take {size} bytes, {} are available",
        layout::ACPI_TABLES_SIZE
    )]
    TooLarge {
        /// What they need.
        size: u64,
    },
    /// RAM ends too early.
    #[error("failed to write the ACPI tables to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Are there 8259A and 8254?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegacyDevices {
    /// Only the APICs.
    Absent,
    /// Both; the timer is at I/O APIC pin [`layout::TIMER_PIN`] as well.
    Present,
}

/// Writes the tables and the reset vector of a machine with `cpus` processors, whose local APIC IDs count from 0.
/// Returns the address of the root pointer (RSDP).
///
/// # Errors
/// [`AcpiError`] when the number of processors cannot be or memory is too small.
pub fn build(memory: &Memory, cpus: u32, legacy: LegacyDevices) -> Result<GuestAddress, AcpiError> {
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(AcpiError::Cpus { cpus });
    }
    let rsdp = layout::ACPI_TABLES_START;
    let mut tables = Tables {
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = tables.append(dsdt::dsdt(cpus).as_slice());
    let fadt = tables.append(&bytes_of(&fadt(dsdt)));
    let madt = tables.append(madt(cpus, legacy).as_slice());
    let mcfg = tables.append(&bytes_of(&mcfg()));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = tables.append(&bytes_of(&xsdt));
    tables.bytes[..Rsdp::len()].copy_from_slice(&bytes_of(&Rsdp::new(OEM, xsdt)));

    let size = tables.bytes.len() as u64;
    if size > layout::ACPI_TABLES_SIZE {
        return Err(AcpiError::TooLarge { size });
    }
    let write = |bytes: &[u8], address| {
        let written = memory.mapping().write_slice(bytes, GuestAddress(address));
        written.map_err(AcpiError::Memory)
    };
    write(&tables.bytes, rsdp)?;
    write(&reset_code(), layout::RESET_VECTOR)?;
    Ok(GuestAddress(rsdp))
}

/// Real-mode code that writes the reset register and then waits.
fn reset_code() -> [u8; 9] {
    let [low, high] = (layout::POWER_PORT + power::register::RESET).to_le_bytes();
    let (move_to_al, move_to_dx, out_dx_al) = (0xb0, 0xba, 0xee);
    let (halt, jump_short, to_halt) = (0xf4, 0xeb, 0xfd);
    [
        move_to_al,
        power::RESET_VALUE,
        move_to_dx,
        low,
        high,
        out_dx_al,
        halt,
        jump_short,
        to_halt,
    ]
}

/// The image of the tables, from [`layout::ACPI_TABLES_START`] on.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Adds a table; returns its guest physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = layout::ACPI_TABLES_START + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(
        signature,
        HEADER_SIZE,
        revision,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    )
}

/// A byte register in the power device.
fn power_register(offset: u16) -> GAS {
    let port = u64::from(layout::POWER_PORT + offset);
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

/// IA-PC boot architecture flags (ACPI 6.5, table 5.11): no VGA, no CMOS clock; and, by the bits
/// that are clear, no keyboard controller and no other legacy devices.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Buttons and clock wake-up are no fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = power_register(power::register::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = power_register(power::register::SLEEP_CONTROL);
    fadt.sleep_status_reg = power_register(power::register::SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

/// Local APIC IDs from here on need the entry with 32-bit IDs.
const FIRST_WIDE_APIC_ID: u32 = 255;
const ENABLED: u32 = 1;

/// Flags: there is a pair of 8259s.
const PCAT_COMPATIBLE: u32 = 1;

fn madt(cpus: u32, legacy: LegacyDevices) -> Sdt {
    let mut body = Vec::new();
    body.extend((layout::LOCAL_APIC_START as u32).to_le_bytes());
    let flags = match legacy {
        LegacyDevices::Absent => 0,
        LegacyDevices::Present => PCAT_COMPATIBLE,
    };
    body.extend(flags.to_le_bytes());
    for cpu in 0..cpus {
        match u8::try_from(cpu) {
            Ok(id) if cpu < FIRST_WIDE_APIC_ID => {
                // Processor local APIC: processor UID, APIC ID.
                body.extend([0, 8, id, id]);
                body.extend(ENABLED.to_le_bytes());
            }
            _ => {
                // Processor local x2APIC.
                body.extend([9, 16, 0, 0]);
                body.extend(cpu.to_le_bytes());
                body.extend(ENABLED.to_le_bytes());
                body.extend(cpu.to_le_bytes());
            }
        }
    }
    // I/O APIC: ID 0, interrupts from 0.
    body.extend([1, 12, 0, 0]);
    body.extend((layout::IOAPIC_START as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    if legacy == LegacyDevices::Present {
        // Interrupt source override: ISA interrupt 0, polarity and trigger as the bus has them.
        body.extend([2, 10, 0, 0]);
        body.extend(layout::TIMER_PIN.to_le_bytes());
        body.extend([0, 0]);
    }
    // The NMI is LINT1 of every processor.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    body.extend([10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    let mut madt = table(*b"APIC", 5);
    madt.append_slice(&body);
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    let last_bus = (layout::PCI_ECAM_SIZE >> 20) - 1;
    mcfg.add_ecam(layout::PCI_ECAM_START, 0, 0, last_bus as u8);
    mcfg
}

#[cfg(test)]
mod tests;
