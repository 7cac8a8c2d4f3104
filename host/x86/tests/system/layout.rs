//! Where things lie in a case's memory. All of it is below 640 KiB, which every machine has.

/// Bytes of RAM that a case may use.
pub(crate) const RAM: u64 = 0xa_0000;
/// The image that is loaded begins here.
pub(crate) const IMAGE: u64 = 0x1000;

pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
/// A second task's state, or another table of the case's own.
pub(crate) const SPARE: u64 = 0x5000;
/// Stubs of the vectors, 16 bytes each, and what they share.
pub(crate) const HANDLERS: u64 = 0x6000;
pub(crate) const HANDLER: u64 = 0x7000;
/// Where the machine begins, in flat 32-bit protected mode.
pub(crate) const ENTRY: u64 = 0x8000;
pub(crate) const CODE: u64 = 0x9000;
/// Code of the case's own, one page.
pub(crate) const MORE_CODE: u64 = 0xd000;
/// Variables of the driver.
pub(crate) const VARIABLES: u64 = 0xf000;
pub(crate) const RESUME: u64 = VARIABLES;
pub(crate) const ROUND: u64 = VARIABLES + 8;
pub(crate) const CHAIN: u64 = VARIABLES + 16;
/// What is added to the instruction pointer that is returned to.
pub(crate) const SKIP: u64 = VARIABLES + 24;
pub(crate) const GDTR: u64 = VARIABLES + 32;
pub(crate) const IDTR: u64 = VARIABLES + 48;
/// Variables of the case.
pub(crate) const DATA: u64 = VARIABLES + 0x100;

pub(crate) const PML4: u64 = 0x1_0000;
pub(crate) const PDPT: u64 = 0x1_1000;
pub(crate) const PD: u64 = 0x1_2000;
/// The first 2 MiB, the same at both sides, open to all.
pub(crate) const PT: u64 = 0x1_3000;
/// The page table of [`TEST`].
pub(crate) const TEST_PT: u64 = 0x1_4000;
/// Tables of the case's own: four pages.
pub(crate) const TABLES: u64 = 0x1_8000;

pub(crate) const KERNEL_STACK: u64 = 0x2_4000;
pub(crate) const USER_STACK: u64 = 0x2_8000;
pub(crate) const IST_STACK: u64 = 0x2_c000;
/// Where entries from user mode begin.
pub(crate) const INNER_STACK: u64 = 0x3_0000;

/// A page for cases to map as they like; so is the next.
pub(crate) const TEST: u64 = 0x40_0000;
/// What is mapped there.
pub(crate) const FRAME: u64 = 0x5_0000;

pub(crate) const KERNEL_CS: u16 = 0x08;
pub(crate) const KERNEL_SS: u16 = 0x10;
/// SYSRET wants these three in a row: 32-bit code, data, 64-bit code.
pub(crate) const USER_CS_32: u16 = 0x1b;
pub(crate) const USER_SS: u16 = 0x23;
pub(crate) const USER_CS: u16 = 0x2b;
pub(crate) const TASK: u16 = 0x30;
pub(crate) const KERNEL_CS_32: u16 = 0x40;
pub(crate) const KERNEL_SS_32: u16 = 0x48;
/// The first of the case's own descriptors.
pub(crate) const OWN: u16 = 0x80;

pub(crate) const CR0: u64 = 0x8001_0033;
pub(crate) const CR4: u64 = 0x6a0;
pub(crate) const EFER: u64 = 0xd01;

/// A vector that is open to user mode.
pub(crate) const OPEN: u64 = 0xf0;
/// Records go out here, byte by byte.
pub(crate) const REPORT_PORT: u16 = 0xe9;
/// And this ends the machine.
pub(crate) const EXIT_PORT: u16 = 0xf4;
/// How often a case's body runs: interpreted first, then translated, with the TLB warm.
pub(crate) const ROUNDS: u64 = 4;
