//! How a vCPU reaches a device's worker without an exit through the VM's loop.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A guest physical address at which a 16- or 32-bit write only means "wake up".
///
/// An engine that can (KVM's ioeventfd, the software CPU's store path) signals `event` by itself;
/// where it cannot, the write reaches the device as an ordinary MMIO write and the device does
/// the same. Both must have the same effect, so a doorbell may ring more often than written.
#[derive(Debug, Clone)]
pub struct Doorbell {
    /// Guest physical address of the register.
    pub address: u64,
    /// Signalled at each write.
    pub event: Arc<EventFd>,
}
