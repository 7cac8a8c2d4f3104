//! The devices of the machine that a guest sees, a folder or file each.
//!
//! An access arrives through [`bus::Bus`] from the vCPU's loop; interrupts leave through
//! `dunlin_guest::MsiSink`; data flows to `dunlin_storage` and `dunlin_vswitch`. A device never
//! learns which engine runs the CPU. Must not depend on engines, migration or assembly.

pub mod acpi;
pub mod bus;
pub mod component;
pub mod debug_console;
pub mod debug_exit;
pub mod ioapic;
pub mod legacy;
pub mod pci;
pub mod power;
#[cfg(test)]
pub(crate) mod recorder;
pub mod serial;
pub mod virtio;

use std::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Locks; a thread that panicked while it held the lock must not stop the machine's other devices.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// As [`lock`], shared.
pub(crate) fn read_lock<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// As [`lock`], exclusive.
pub(crate) fn write_lock<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
