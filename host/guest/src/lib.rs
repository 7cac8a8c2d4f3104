//! The guest as data, shared by everything that runs, connects or moves it.
//!
//! - [`memory`]: guest RAM in a memfd, addressed by guest physical address;
//! - [`dirty`]: the one dirty log, written by vCPUs and devices alike, harvested by migration;
//! - [`interrupt`]: how a device reaches a vCPU (MSI, interrupt lines);
//! - [`doorbell`]: how a vCPU reaches a device without an exit through the VM's loop;
//! - [`saved`]: the form in which a component's state travels;
//! - [`layout`]: where RAM, devices and tables sit in guest physical address space.
//!
//! Data flows through here, decisions do not: this crate knows no engine, no device and no
//! protocol, and depends on none of ours.

pub mod dirty;
pub mod doorbell;
pub mod interrupt;
pub mod layout;
pub mod memory;
pub mod saved;

pub use dirty::{Authorship, DirtyLog, DirtyRange, PageSet, Writer};
pub use doorbell::Doorbell;
pub use interrupt::{InterruptLine, Msi, MsiSink, VectoredController};
pub use memory::{Memory, MemoryError, PageIndex, RamRegion};
pub use saved::{RestoreError, SavedState};
pub use vm_memory::GuestAddress;

/// Bytes in a page, the unit of the dirty log and of migration.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes of a huge page of the host: guest RAM is mapped so that it can have them.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;
