//! The DSDT: the devices that cannot be found by looking, in ACPI's byte code.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
};
use acpi_tables::sdt::Sdt;
use dunlin_guest::layout;

use super::table;
use crate::power;

/// The notification "status changed" of a button: it was pressed.
const BUTTON_PRESSED: u8 = 0x80;

/// The DSDT of a machine with `cpus` processors.
pub(super) fn dsdt(cpus: u32) -> Sdt {
    let mut code = Vec::new();
    pci(&mut code);
    motherboard(&mut code);
    serial(&mut code);
    power_button(&mut code);
    for cpu in 0..cpus {
        processor(&mut code, cpu);
    }
    sleep_off(&mut code);
    let mut dsdt = table(*b"DSDT", 6);
    dsdt.append_slice(&code);
    dsdt
}

fn path(name: &str) -> Path {
    Path::new(name)
}

fn device(code: &mut Vec<u8>, name: &str, children: Vec<&dyn Aml>) {
    Device::new(path(name), children).to_aml_bytes(code);
}

/// The root bridge. Its windows are where BARs may lie. Nobody uses INTx, so `_PRT` is empty.
fn pci(code: &mut Vec<u8>) {
    let window32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MMIO32_START as u32,
        (layout::PCI_MMIO32_START + layout::PCI_MMIO32_SIZE - 1) as u32,
        None,
    );
    let window64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MMIO64_START,
        layout::PCI_MMIO64_START + layout::PCI_MMIO64_SIZE - 1,
        None,
    );
    let buses = AddressSpace::new_bus_number(0u16, 255u16);
    let config = IO::new(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_PORT, 1, 8);
    let resources = ResourceTemplate::new(vec![&buses, &config, &window32, &window64]);
    device(
        code,
        "\\_SB_.PCI0",
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(path("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(path("_UID"), &0u8),
            &Name::new(path("_SEG"), &0u8),
            &Name::new(path("_BBN"), &0u8),
            &Name::new(path("_CCA"), &1u8),
            &Name::new(path("_CRS"), &resources),
            &Name::new(path("_PRT"), &Package::new(Vec::new())),
        ],
    );
}

/// Claims ECAM, so that the guest trusts MCFG.
fn motherboard(code: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(
        true,
        layout::PCI_ECAM_START as u32,
        layout::PCI_ECAM_SIZE as u32,
    );
    device(
        code,
        "\\_SB_.MBRD",
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(path("_UID"), &0u8),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&ecam])),
        ],
    );
}

fn serial(code: &mut Vec<u8>) {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    device(
        code,
        "\\_SB_.COM1",
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0501")),
            &Name::new(path("_UID"), &0u8),
            &Name::new(path("_CRS"), &resources),
        ],
    );
}

/// The power button and the generic event device that notifies it of its interrupt.
fn power_button(code: &mut Vec<u8>) {
    device(
        code,
        "\\_SB_.PWRB",
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(path("_UID"), &0u8),
        ],
    );
    let interrupt = Interrupt::new(true, true, false, false, layout::SCI_IRQ);
    let (source, line) = (Arg(0), layout::SCI_IRQ);
    let is_button = Equal::new(&source, &line);
    let target = path("\\_SB_.PWRB");
    let notify = Notify::new(&target, &BUTTON_PRESSED);
    device(
        code,
        "\\_SB_.GED0",
        vec![
            &Name::new(path("_HID"), &"ACPI0013"),
            &Name::new(path("_UID"), &0u8),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(
                path("_EVT"),
                1,
                true,
                vec![&If::new(&is_button, vec![&notify])],
            ),
        ],
    );
}

fn processor(code: &mut Vec<u8>, cpu: u32) {
    device(
        code,
        &format!("\\_SB_.C{cpu:03X}"),
        vec![
            &Name::new(path("_HID"), &"ACPI0007"),
            &Name::new(path("_UID"), &cpu),
        ],
    );
}

fn sleep_off(code: &mut Vec<u8>) {
    let zero = 0u8;
    let state: Vec<&dyn Aml> = vec![&power::SLEEP_TYPE_OFF, &zero, &zero, &zero];
    Name::new(path("\\_S5_"), &Package::new(state)).to_aml_bytes(code);
}
