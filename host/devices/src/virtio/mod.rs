//! Virtio devices (Virtual I/O Device version 1.2), modern only, over PCI.
//!
//! ```text
//!  vCPU ── BAR write ──► pci::VirtioPci ── activate, reset ──► worker ──► VirtioDevice
//!    │                        registers                          ▲   │
//!    └── doorbell (EventFd), with or without an exit ────────────┘   ├──► Port, Disk, console
//!  vCPU ◄── MSI-X ◄── Interrupt ◄── used buffers ◄── Queue ◄─────────┘
//! ```
//!
//! A device author implements [`VirtioDevice`]: everything that a driver can say reaches it through
//! [`Queue`] and [`Chain`], which check it. [`pci::VirtioPci`] adds registers, interrupts, saving.

pub mod block;
mod chain;
pub mod console;
mod device;
pub mod entropy;
mod interrupt;
mod log_limit;
pub mod net;
pub mod pci;
mod ring;
#[cfg(test)]
mod testing;
mod worker;

pub use chain::Chain;
pub use device::{DeviceConfig, DeviceType, Queues, VirtioDevice, Wait};
pub use interrupt::{Interrupt, NO_VECTOR};
pub use ring::{MAX_QUEUE_SIZE, Queue, QueueLayout, QueuePosition, RingError, Suppression};

/// Feature bits that do not depend on the device's type (virtio 1.2, chapter 6).
pub mod feature {
    /// Descriptors may name a table of descriptors.
    pub const INDIRECT_DESCRIPTORS: u64 = 1 << 28;
    /// Both sides say by index when they want to hear.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// The device follows version 1 of the specification.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device here offers.
    pub const ALL: u64 = INDIRECT_DESCRIPTORS | EVENT_INDEX | VERSION_1;
}
