//! How a device reaches a vCPU.
//!
//! Every interrupt of the machine ends as a message: a device with MSI-X sends one, the I/O APIC
//! sends one for a pin. The engine delivers it to the local APICs (software or in-kernel).

use std::fmt::Debug;

/// A message-signalled interrupt: a write of `data` to `address` (Intel SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Address with destination and addressing mode; in `0xfee0_0000 ..= 0xfeef_ffff`.
    pub address: u64,
    /// Vector, delivery mode, trigger mode and level.
    pub data: u32,
}

/// Takes messages to the local APICs. Implemented by each engine.
pub trait MsiSink: Send + Sync + Debug {
    /// Delivers the message. A message that addresses no vCPU is dropped, as the bus does.
    /// Never blocks on a vCPU.
    fn signal(&self, msi: Msi);
}

/// An interrupt controller that the processor itself asks for the vector (ExtINT; SDM vol. 3,
/// 11.5.1), as the pair of 8259A is one.
pub trait VectoredController: Send + Sync + Debug {
    /// The processor takes the interrupt that the controller's output announced (the two INTA
    /// cycles of the bus): the vector. Called from a vCPU thread: must not wait for one. An
    /// interrupt that is gone meanwhile is a spurious one, which has a vector, too.
    fn acknowledge(&self) -> u8;
}

/// One input pin of an interrupt controller.
pub trait InterruptLine: Send + Sync + Debug {
    /// Drives the pin. Setting the level that it already has changes nothing.
    fn set_level(&self, high: bool);

    /// Drives an edge: up, then down.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}
