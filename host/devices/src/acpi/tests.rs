use super::*;

fn built(cpus: u32) -> (Memory, Vec<u8>) {
    let memory = Memory::new(1 << 20).unwrap();
    assert_eq!(
        build(&memory, cpus, LegacyDevices::Absent).unwrap().0,
        0xe0000
    );
    let mut image = vec![0; layout::ACPI_TABLES_SIZE as usize];
    memory
        .mapping()
        .read_slice(&mut image, GuestAddress(layout::ACPI_TABLES_START))
        .unwrap();
    (memory, image)
}

fn number(bytes: &[u8], at: usize, size: usize) -> u64 {
    let mut value = [0; 8];
    value[..size].copy_from_slice(&bytes[at..at + size]);
    u64::from_le_bytes(value)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest physical address, checked.
fn table_at(image: &[u8], address: u64) -> &[u8] {
    let start = (address - layout::ACPI_TABLES_START) as usize;
    let length = number(image, start + 4, 4) as usize;
    let table = &image[start..start + length];
    assert_eq!(sum(table), 0, "{:?}", &table[..4]);
    assert_eq!(address % 16, 0);
    table
}

fn tables(image: &[u8]) -> Vec<&[u8]> {
    assert_eq!(&image[..8], b"RSD PTR ");
    assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
    let xsdt = table_at(image, number(image, 24, 8));
    assert_eq!(&xsdt[..4], b"XSDT");
    let entries = xsdt[36..].chunks(8).map(|entry| number(entry, 0, 8));
    entries.map(|address| table_at(image, address)).collect()
}

fn find<'a>(image: &'a [u8], signature: &[u8; 4]) -> &'a [u8] {
    let mut all = tables(image).into_iter();
    all.find(|table| table.starts_with(signature)).unwrap()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}

#[test]
fn the_root_pointer_leads_to_every_table() {
    let (_, image) = built(4);
    let signatures: Vec<_> = tables(&image).iter().map(|t| t[..4].to_vec()).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
    let dsdt = table_at(&image, number(find(&image, b"FACP"), 140, 8));
    assert!(dsdt.starts_with(b"DSDT"));
}

#[test]
fn the_fixed_table_names_the_power_registers() {
    let (_, image) = built(1);
    let fadt = find(&image, b"FACP");
    assert_eq!(fadt.len(), 276);
    let flags = number(fadt, 112, 4);
    assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
    assert_ne!(flags & 1 << 10, 0, "reset register");
    // No VGA, no CMOS clock, no keyboard controller, no legacy devices.
    assert_eq!(number(fadt, 109, 2), 0b10_0100);
    // Space (1 is I/O), width, offset, access size, address.
    assert_eq!(number(fadt, 116, 4), 0x0100_0801);
    assert_eq!(number(fadt, 120, 8), 0x602);
    assert_eq!(fadt[128], 1);
    assert_eq!(number(fadt, 248, 8), 0x600);
    assert_eq!(number(fadt, 260, 8), 0x601);
}

#[test]
fn every_processor_and_the_io_apic_are_listed() {
    let (_, image) = built(300);
    let madt = find(&image, b"APIC");
    assert_eq!(number(madt, 36, 4), 0xfee0_0000);
    assert_eq!(number(madt, 40, 4), 0);
    let (mut rest, mut ids, mut io_apics) = (&madt[44..], Vec::new(), 0);
    while let [kind, length, ..] = *rest {
        match kind {
            0 => ids.push(u64::from(rest[3])),
            9 => ids.push(number(rest, 4, 4)),
            1 => {
                io_apics += 1;
                assert_eq!(number(rest, 4, 4), 0xfec0_0000);
            }
            _ => {}
        }
        rest = &rest[usize::from(length)..];
    }
    assert_eq!(ids, (0..300).collect::<Vec<_>>());
    assert_eq!(io_apics, 1);
}

#[test]
fn legacy_devices_are_told_with_where_the_timer_is() {
    let memory = Memory::new(1 << 20).unwrap();
    build(&memory, 1, LegacyDevices::Present).unwrap();
    let mut image = vec![0; layout::ACPI_TABLES_SIZE as usize];
    let tables = GuestAddress(layout::ACPI_TABLES_START);
    memory.mapping().read_slice(&mut image, tables).unwrap();
    let madt = find(&image, b"APIC");
    assert_eq!(number(madt, 40, 4), 1);
    // ISA interrupt 0 is global interrupt 2.
    let entry = [2, 10, 0, 0, 2, 0, 0, 0, 0, 0];
    assert!(madt[44..].windows(10).any(|bytes| bytes == entry));
}

#[test]
fn the_reset_vector_writes_the_reset_register() {
    let (memory, _) = built(1);
    let mut code = [0; 9];
    let vector = GuestAddress(0xf_fff0);
    memory.mapping().read_slice(&mut code, vector).unwrap();
    // mov al, 1; mov dx, 0x602; out dx, al; hlt; jmp to the hlt
    let expected = [0xb0, 1, 0xba, 0x02, 0x06, 0xee, 0xf4, 0xeb, 0xfd];
    assert_eq!(code, expected);
}

#[test]
fn ecam_is_where_the_root_complex_has_it() {
    let (_, image) = built(1);
    let mcfg = find(&image, b"MCFG");
    assert_eq!(number(mcfg, 44, 8), layout::PCI_ECAM_START);
    assert_eq!((mcfg[54], mcfg[55]), (0, 255));
}

#[test]
fn the_byte_code_names_devices_and_windows() {
    let (_, image) = built(2);
    let fadt = find(&image, b"FACP");
    let dsdt = table_at(&image, number(fadt, 140, 8));
    for name in [
        "PCI0", "COM1", "PWRB", "GED0", "_EVT", "C000", "C001", "_S5_",
    ] {
        assert!(contains(dsdt, name.as_bytes()), "{name}");
    }
    assert!(!contains(dsdt, b"C002"));
    assert!(contains(dsdt, &layout::PCI_MMIO64_START.to_le_bytes()));
    assert!(contains(
        dsdt,
        &(layout::PCI_MMIO32_START as u32).to_le_bytes()
    ));
}

#[test]
fn a_number_of_processors_that_cannot_be_is_refused() {
    let memory = Memory::new(1 << 20).unwrap();
    for cpus in [0, MAX_CPUS + 1, u32::MAX] {
        let refused = build(&memory, cpus, LegacyDevices::Absent);
        assert!(matches!(refused, Err(AcpiError::Cpus { .. })), "{cpus}");
    }
    build(&memory, MAX_CPUS, LegacyDevices::Absent).unwrap();
}
