//! Power: the events with which a guest ends or restarts its machine.

use std::fmt::Debug;

/// Hears what the guest asks of the machine. Called from a vCPU thread: must not wait for one.
pub trait PowerEvents: Debug + Send + Sync {
    /// The guest switched itself off (S5).
    fn power_off(&self);

    /// The guest asks for a reset.
    fn reset(&self);
}
