//! Whatever a kernel file holds, it is loaded into guest memory or refused.

#![no_main]

use dunlin_boot::LoadContext;
use dunlin_fuzz::MemoryFile;
use dunlin_guest::{GuestAddress, Memory, layout};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let memory = Memory::new(4 << 20).expect("there is memory for a guest");
    let kernel = MemoryFile::new(data);
    let _refused = dunlin_boot::load(&LoadContext {
        memory: &memory,
        kernel: &kernel.path(),
        initrd: None,
        modules: &[],
        command_line: "console=ttyS0",
        rsdp: GuestAddress(layout::ACPI_TABLES_START),
    });
});
