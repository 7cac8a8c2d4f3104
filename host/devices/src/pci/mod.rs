//! PCI Express: configuration space, MSI-X, and the root complex that routes to functions.
//!
//! A device author writes a [`Function`]:
//!
//! 1. build a [`ConfigSpace`] with the device's [`Identity`], add its BARs ([`ConfigSpace::add_bar`])
//!    and capabilities ([`ConfigSpace::add_capability`]), and its [`Msix`], if it has interrupts
//!    ([`ConfigSpace::add_msix`]);
//! 2. keep it in a `Mutex` that [`Function::config`] returns: reads and writes of configuration
//!    space, BAR sizing and the MSI-X control register then need no code of the device;
//! 3. answer [`Function::bar_read`] and [`Function::bar_write`]; ask [`Msix::read`] and
//!    [`Msix::write`] first, they know which part of which BAR is theirs;
//! 4. put [`ConfigSpace::save`] (it includes the MSI-X state) into the saved state of the device.
//!
//! The [`RootComplex`] does the rest: it gives addresses to the BARs, keeps their routes on the
//! MMIO bus where the guest wants them, and registers the doorbells of [`Function::doorbells`] with
//! the engine for as long as their BAR is mapped.
//!
//! ```text
//!  ECAM, 0xcf8/0xcfc ──► RootComplex ──► Function::config_write ──► ConfigSpace ──► Msix control
//!                            │ BARs that moved                                        │
//!                            ▼                                                        ▼
//!             MMIO bus ──► BAR route ──► Function::bar_write ──► device worker ──► Msix::trigger
//! ```
//!
//! Specifications: PCI Local Bus 3.0 (chapter 6: configuration space, MSI-X), PCI Express Base
//! 4.0 (7.2.2: ECAM). There are no I/O BARs, no INTx pins and no bridges.

mod config;
mod host_bridge;
mod msix;
mod root;
#[cfg(test)]
mod tests;
mod window;

use std::fmt;
use std::sync::{Arc, Mutex};

use dunlin_guest::Doorbell;
use vmm_sys_util::eventfd::EventFd;

use crate::component::Component;
use crate::lock;

pub use config::{
    Bar, BarKind, ConfigError, ConfigSpace, ConfigState, Identity, capability, command,
};
pub use host_bridge::HostBridge;
pub use msix::{Msix, MsixLayout, MsixState};
pub use root::{ConfigPorts, Ecam, RootComplex, RootError, RootState};
pub use window::Windows;

/// Device number on bus 0, 0 to 31, and function number, 0 to 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Device number.
    pub device: u8,
    /// Function number.
    pub function: u8,
}

impl Address {
    /// Function 0 of a device on bus 0.
    pub fn device(device: u8) -> Self {
        Self {
            device,
            function: 0,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{:x}", self.device, self.function)
    }
}

/// A doorbell by its place in a BAR; the root complex turns it into a [`Doorbell`].
#[derive(Debug, Clone)]
pub struct BarDoorbell {
    /// Index of the BAR.
    pub bar: u8,
    /// Bytes from the start of the BAR.
    pub offset: u64,
    /// Signalled at each write.
    pub event: Arc<EventFd>,
}

/// Hears where doorbells come to lie. Implemented over the engine.
pub trait DoorbellHost: fmt::Debug + Send + Sync {
    /// From now on, writes to the doorbell's address may signal its event without an exit.
    fn add(&self, doorbell: &Doorbell);

    /// The address is no doorbell any more.
    fn remove(&self, doorbell: &Doorbell);
}

/// One PCI function. See the [module](self) for how to write one.
///
/// Methods are called from vCPU threads, any of them at any time.
pub trait Function: Component {
    /// The configuration space. Never keep it locked while waiting for another thread.
    fn config(&self) -> &Mutex<ConfigSpace>;

    /// A load of `data.len()` bytes (1 to 8) at `offset` of a BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// A store at `offset` of a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// The registers that only mean "wake up". Must not change over the life of the function.
    fn doorbells(&self) -> Vec<BarDoorbell>;

    /// A load from configuration space. Override it only for registers with side effects.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(self.config()).read(offset, data);
    }

    /// A store to configuration space. Override it only for registers with side effects.
    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(self.config()).write(offset, data);
    }
}
